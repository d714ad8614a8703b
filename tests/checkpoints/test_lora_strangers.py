"""Adapters of more trainers, and adapters that do not hold what they seem to.

Keys and sums are written by rules of their own, not by the code that reads them.
"""

import dataclasses
import json
import time

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

from joyedit.checkpoints.config import Config
from joyedit.checkpoints.lora_settings import Settings
from joyedit.checkpoints.network import Network
from joyedit.convert.table import IDENTITY, Layout, rename
from joyedit.lora import Adapters

D = 6


@dataclasses.dataclass(frozen=True)
class WanConfig(Config):
    pass


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = nn.ModuleDict({"to_q": nn.Linear(D, D)})
        self.norm2 = nn.LayerNorm(D)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, D))
        self.shift = nn.Module()
        self.shift.bias = nn.Parameter(torch.randn(D))


class Wan(Network):
    """Two blocks and a head with the names of a WAN transformer, original ones included."""

    Config = WanConfig

    def __init__(self, config=None):
        super().__init__(config or WanConfig())
        self.blocks = nn.ModuleList([Block(), Block()])
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, D))

    def layouts(self):
        rules = (
            rename("blocks.{i}.self_attn.q.{leaf}", "blocks.{i}.attn1.to_q.{leaf}"),
            rename("blocks.{i}.norm3.{leaf}", "blocks.{i}.norm2.{leaf}"),
            rename("blocks.{i}.modulation", "blocks.{i}.scale_shift_table"),
            rename("head.modulation", "scale_shift_table"),
        )
        return Layout("diffusers", (IDENTITY,)), Layout("original", rules)


@pytest.fixture
def wan():
    network = Wan().requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    return network


def snapshot(network):
    return {name: tensor.double().clone() for name, tensor in network.state_dict().items()}


def assert_changed_by(network, before, wanted):
    for name, tensor in snapshot(network).items():
        difference = wanted[name].double() if name in wanted else torch.zeros(())
        assert (tensor - before[name] - difference).abs().max() < 1e-5, name
        assert name not in wanted or difference.abs().max() > 0.1


SPELLINGS = {
    "lycoris_": "lycoris_blocks_1_attn1_to_q",
    "lora_unet__": "lora_unet__blocks_1_self_attn_q",
    "pipe.dit.": "pipe.dit.blocks.1.self_attn.q",
    "dit.": "dit.blocks.1.self_attn.q",
    "module.": "module.blocks.1.attn1.to_q",
    "module.transformer.": "module.transformer.blocks.1.attn1.to_q",
    "_orig_mod.": "_orig_mod.blocks.1.attn1.to_q",
    "transformer._orig_mod.": "transformer._orig_mod.blocks.1.attn1.to_q",
    "a compiled block": "transformer.blocks.1._orig_mod.attn1.to_q",
    "unet.": "unet.blocks.1.self_attn.q",
    "base_model.model.module.": "base_model.model.module.blocks.1.attn1.to_q",
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_prefixes_of_trainers(wan, name):
    down, up = torch.randn(2, D), torch.randn(D, 2)
    layer = SPELLINGS[name]
    state = {
        f"{layer}.lora_down.weight": down,
        f"{layer}.lora_up.weight": up,
        f"{layer}.alpha": torch.tensor(3),
    }
    before = snapshot(wan)
    adapters = Adapters({"transformer": wan})
    assert adapters.load_lora_weights(state).unmatched == ()
    adapters.fuse_lora()
    wanted = torch.einsum("or,ri->oi", up.double(), down.double()) * 1.5
    assert_changed_by(wan, before, {"blocks.1.attn1.to_q.weight": wanted})


@pytest.mark.parametrize(
    ("block", "head"),
    [
        ("diffusion_model.blocks.1.diff_m", "diffusion_model.head.diff_m"),
        ("transformer.blocks.1.diff_m", "transformer.head.diff_m"),
        ("lora_unet_blocks_1.diff_m", "lora_unet_head.diff_m"),
        ("diffusion_model.blocks.1.modulation.diff", "diffusion_model.head.modulation.diff"),
    ],
)
def test_differences_of_modulations(wan, block, head):
    """`diff_m` is added to the modulation as it is, whatever alpha and rank say."""
    table, last = torch.randn(1, 6, D), torch.randn(1, 2, D)
    before = snapshot(wan)
    adapters = Adapters({"transformer": wan})
    assert adapters.load_lora_weights({block: table, head: last}).unmatched == ()
    adapters.set_adapters("default_0", 0.5)
    adapters.fuse_lora()
    wanted = {"blocks.1.scale_shift_table": 0.5 * table, "scale_shift_table": 0.5 * last}
    assert_changed_by(wan, before, wanted)


@pytest.mark.parametrize(
    "layer", ["lycoris_blocks_0_norm2", "lora_unet_blocks_0_norm3", "dit.blocks.0.norm3"]
)
def test_norms_as_lycoris_writes_them(wan, layer):
    """LyCORIS' NormModule runs with org_weight + w_norm * scale and org_bias + b_norm * scale."""
    weight, bias = torch.randn(D), torch.randn(D)
    network_norm, x = wan.blocks[0].norm2, torch.randn(3, D)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    normed = (x - mean) / (var + network_norm.eps).sqrt()
    wanted = normed * (network_norm.weight + 0.7 * weight) + network_norm.bias + 0.7 * bias
    adapters = Adapters({"transformer": wan})
    state = {f"{layer}.w_norm": weight, f"{layer}.b_norm": bias}
    assert adapters.load_lora_weights(state).unmatched == ()
    adapters.set_adapters("default_0", 0.7)
    assert (network_norm(x) - wanted).abs().max() < 1e-5


Q = "transformer.blocks.0.attn1.to_q"
GOOD = {"transformer.blocks.1.attn1.to_q.diff": torch.ones(D, D)}


def pair(down, up, **more):
    return {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up, **{f"{Q}.{k}": v for k, v in more.items()}}


BROKEN = {
    "rank 0": (
        pair(torch.ones(0, D), torch.ones(D, 0)),
        r"up \(6, 0\) and down \(0, 6\) are no two matrices",
    ),
    "0-dim down": (pair(torch.tensor(1.0), torch.ones(D, 1)), r"down \(\) are no two matrices"),
    "0-dim both": (pair(torch.tensor(1.0), torch.tensor(1.0)), "are no two matrices"),
    "1-dim": (pair(torch.ones(D), torch.ones(D)), "are no two matrices"),
    "alphas": (
        pair(torch.ones(2, D), torch.ones(D, 2), alpha=torch.ones(2)),
        r"alpha has the shape \(2,\), must be one number",
    ),
    "no alpha": (
        pair(torch.ones(2, D), torch.ones(D, 2), alpha=torch.ones(0)),
        r"alpha has the shape \(0,\)",
    ),
    "alpha nan": (
        pair(torch.ones(2, D), torch.ones(D, 2), alpha=torch.tensor(float("nan"))),
        "alpha is nan, must be a finite number",
    ),
    "alpha bool": (pair(torch.ones(2, D), torch.ones(D, 2), alpha=torch.tensor(True)), "alpha is True"),
    "integers": (
        pair(torch.ones(2, D, dtype=torch.int8), torch.ones(D, 2)),
        "its down is of torch.int8, not of floating point",
    ),
    "no weight": (
        {f"transformer.blocks.0.shift.lora_{x}.weight": torch.ones(2, 1) for x in "AB"},
        "blocks.0.shift.weight does not exist, and factors are for it",
    ),
    "modulation": ({"diffusion_model.blocks.0.diff_m": torch.ones(6)}, "a difference .* does not fit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_of_a_refused_file_nothing_remains(wan, name, tmp_path):
    """Nor of its other layers, which are good and come first."""
    state, message = BROKEN[name]
    save_file({**GOOD, **state}, tmp_path / "x.safetensors")
    before, adapters = snapshot(wan), Adapters({"transformer": wan})
    adapters.load_lora_weights(GOOD, "kept")
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}"):
        adapters.load_lora_weights(tmp_path / "x.safetensors")
    assert adapters.get_list_adapters() == {"transformer": ["kept"]}
    assert adapters.get_active_adapters() == ["kept"]
    adapters.unload_lora_weights()
    assert_changed_by(wan, before, {})
    assert type(wan.blocks[0].attn1["to_q"]) is type(wan.blocks[1].attn1["to_q"]) is nn.Linear


SETTINGS = {
    "alpha as text": ({"lora_alpha": "8"}, "lora_alpha='8' must be a number"),
    "alpha bool": ({"lora_alpha": True}, "lora_alpha=True must be a number"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a number"),
    "alpha list": ({"lora_alpha": [8]}, r"lora_alpha=\[8\] must be a number"),
    "pattern list": ({"alpha_pattern": ["a"]}, r"alpha_pattern=\['a'\] must be numbers by the names"),
    "pattern of text": ({"alpha_pattern": {"to_q": "8"}}, r"alpha_pattern\['to_q'\]='8' must be a number"),
    "nested repeats": ({"alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern: '\(a\+\)\+\$' is not read"),
    "many repeats": ({"alpha_pattern": {".*.*.*.*.*.*x": 1}}, "is not read"),
    "back reference": ({"alpha_pattern": {r"(a)\1": 1}}, "is not read"),
    "look-ahead": ({"alpha_pattern": {"(?=a)a": 1}}, "is not read"),
    "counted": ({"alpha_pattern": {"a{1000000}": 1}}, "is not read"),
    "unbalanced": ({"alpha_pattern": {"(a": 1}}, "is not read"),
    "many": ({"alpha_pattern": {f"a{i}|b": 1 for i in range(100)}}, "has 100 regular expressions"),
    "dora": ({"use_dora": True}, "DoRA"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_another_type_are_refused(wan, name, tmp_path):
    settings, message = SETTINGS[name]
    path = tmp_path / "x.safetensors"
    save_file(pair(torch.ones(2, D), torch.ones(D, 2)), path, {"lora_adapter_metadata": json.dumps(settings)})
    adapters, start = Adapters({"transformer": wan}), time.perf_counter()
    with pytest.raises(ValueError, match=rf"x\.safetensors: .*{message}"):
        adapters.load_lora_weights(path)
    assert time.perf_counter() - start < 2 and adapters.get_list_adapters() == {}


@pytest.mark.parametrize("settings", ["[1]", "3", "[" * 5000, '{"lora_alpha": 1' + "0" * 5000 + "}"], ids=len)
def test_settings_that_are_no_object(wan, settings, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(pair(torch.ones(2, D), torch.ones(D, 2)), path, {"lora_adapter_metadata": settings})
    with pytest.raises(ValueError, match=r"x\.safetensors: lora_adapter_metadata in its header"):
        Adapters({"transformer": wan}).load_lora_weights(path)


LAYERS = ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "blocks.11.ffn.net.0.proj", "a.to_q", "to_q", "xto_q"]
PATTERNS = [
    "to_q",
    "attn1.to_q",
    r"attn1\.to_q",
    "^to_q",
    "^blocks.1.attn1.to_q",
    r"blocks\.\d+\.attn1\.to_q",
]
PATTERNS += [
    r"blocks.1\d*.*",
    "(attn1|ffn).*",
    r"(?:to_q|proj)$",
    "[a-x]to_q",
    "nothing",
    "q",
    "^to_q|proj",
    "proj|^to_q",
    r".*\.0\..*",
]


@pytest.mark.parametrize("patterns", [[p] for p in PATTERNS] + [PATTERNS, PATTERNS[::-1]], ids=str)
def test_patterns_match_as_in_peft(patterns):
    table = {pattern: float(i + 1) for i, pattern in enumerate(patterns)}
    settings = Settings.of({"lora_alpha": 100.0, "alpha_pattern": table}, "transformer")
    for layer in LAYERS:
        theirs = table.get(get_pattern_key(table.keys(), layer), 100.0)
        assert settings.strength(layer, 4) == theirs / 4, layer


def test_many_plain_names_take_no_time():
    names = [f"blocks.{i}.attn{j}.to_{k}" for i in range(400) for j in (1, 2) for k in "qkv"]
    settings = Settings.of({"alpha_pattern": {name: 2 * i for i, name in enumerate(names)}}, "unet")
    start = time.perf_counter()
    assert [settings.strength(name, 2) for name in names] == list(range(len(names)))
    assert time.perf_counter() - start < 1


def test_the_slowest_pattern_that_is_read_takes_little_time():
    slow = {"a*" + "a" * i + ".*b": 1 for i in range(16)}
    settings = Settings.of({"alpha_pattern": slow}, "unet")
    start = time.perf_counter()
    for _ in range(20):
        settings.strength("a" * 250, 2)
    assert time.perf_counter() - start < 5
