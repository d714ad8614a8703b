"""Adapters beside weights: what is small is not lost, what is new can be trained, on any base."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from benchmarks.quantised import in_form
from joyedit.adapted import AdaptedWeight
from joyedit.lora import Adapters
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.clip import CLIPTextModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionModel
from tests.lora_layers import JOY, TEXT, UNET, WAN, factors, filled, product

LAYER = "double_blocks.0.attn.txt_attn_proj"
CONVOLUTION = "down_blocks.0.downsamplers.0.conv"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def joy():
    return filled(JoyImageEditTransformer3DModel.from_config(JOY))


def unet():
    return filled(UNet2DConditionModel.from_config(UNET))


def x_of(layer, count=40):
    return torch.randn(1, count, layer.in_features, generator=torch.Generator().manual_seed(1))


def lora_of(network, layer, prefix="transformer", size=0.3):
    down, up = factors(network, layer, size=size)
    return {f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": up}, product(down, up)


@pytest.mark.parametrize("relative", [8e-3, 8e-4, 8e-5])
def test_an_update_that_bf16_would_round_away_has_its_whole_effect(relative):
    """The effect against that of the formula, of an adapter so small beside the weight; and what is left of
    it once it is fused, where it is rounded."""
    network = joy().to(torch.bfloat16)
    layer = network.get_submodule(LAYER)
    state, delta = lora_of(network, LAYER)
    weight = layer.weight.double()
    delta = delta * relative * weight.norm() / delta.norm()
    up = f"transformer.{LAYER}.lora_B.weight"
    state[up] = state[up] * (relative * weight.norm() / product(*state.values()).norm())
    x = x_of(layer)
    plain, wanted = layer(x), x.double() @ delta.T
    adapters = Adapters({"transformer": network})
    adapters.load_lora_weights(state)
    assert ((layer(x) - plain) - wanted).norm() < 5e-3 * wanted.norm()
    adapters.fuse_lora()
    lost = ((layer(x) - plain) - wanted).norm() / wanted.norm()
    assert lost > {8e-3: 0.1, 8e-4: 0.5, 8e-5: 0.8}[relative]


def test_it_is_the_products_that_are_added_and_not_the_weights():
    network = joy()
    layer = network.get_submodule(LAYER)
    state, delta = lora_of(network, LAYER)
    Adapters({"transformer": network}).load_lora_weights(state)
    weight = layer._parameters["weight"].double()
    x = x_of(layer)
    truth = x.double() @ (weight + delta).T + layer.bias.double()
    assert isinstance(layer.weight, AdaptedWeight) and (layer(x) - truth).abs().max() < 1e-5
    rows = layer.weight[5:9]
    assert rows.shape == (4, 48) and (rows.linear(x, None) - truth[..., 5:9]).abs().max() > 0  # no bias
    assert (rows.linear(x, layer.bias[5:9]) - truth[..., 5:9]).abs().max() < 1e-5
    assert (nn.functional.linear(x, layer.weight, layer.bias) - truth).abs().max() < 1e-5
    assert (
        torch.add(layer.weight, 0) - (weight + delta)
    ).abs().max() < 1e-6  # what else is asked gets the sum


def test_of_a_convolution_the_kernel_is_in_the_first_factor():
    network = unet()
    layer = network.get_submodule(CONVOLUTION)
    state, delta = lora_of(network, CONVOLUTION, "unet")
    Adapters({"unet": network}).load_lora_weights(state)
    x = torch.randn(2, 16, 7, 9)
    weight = layer._parameters["weight"].double() + delta.view(16, 16, 3, 3)
    truth = nn.functional.conv2d(x.double(), weight, layer.bias.double(), stride=2, padding=1)
    assert (layer(x) - truth).abs().max() < 1e-4 and truth.abs().max() > 1


@pytest.mark.parametrize("base", ["fp32", "bf16", "int8", "fp8"])
def test_new_factors_on_every_base(base):
    """Nothing at first; then, once they are something, the formula and its gradients."""
    network = joy()
    if base in ("int8", "fp8"):
        network = in_form(network, {"int8": "int8_convrot"}.get(base, base))
    elif base == "bf16":
        network = network.to(torch.bfloat16)
    layer = network.get_submodule(LAYER)
    meant = layer.weight if isinstance(layer.weight, torch.Tensor) else layer.weight.to(torch.float32)
    x, frozen = x_of(layer), [p.clone() for p in network.parameters()]
    plain = layer(x)
    made = Adapters({"transformer": network}).add_lora(4, alpha=8, targets=re.escape(LAYER))
    assert list(made) == [f"transformer.{LAYER}.lora_{part}.weight" for part in "AB"]
    down, up = made.values()
    assert down.shape == (4, 48) and up.shape == (48, 4)
    assert {p.dtype for p in made.values()} == {torch.float32} and not up.any()
    assert 0.8 < down.abs().max() * math.sqrt(48) <= 1  # uniform, as PEFT draws it
    assert torch.equal(layer(x), plain)
    with torch.no_grad():
        up.normal_(std=0.3)
    out = layer(x)
    out.square().sum().backward()
    a, b = (p.detach().double().requires_grad_() for p in (down, up))
    truth = x.double() @ meant.double().T + layer.bias.double() + 2 * (x.double() @ a.T) @ b.T
    truth.square().sum().backward()
    assert (out - truth).abs().max() < 1e-5 * truth.abs().max()
    for p, wanted in ((down, a), (up, b)):
        assert (p.grad - wanted.grad).abs().max() < 1e-5 * wanted.grad.abs().max()
    for p, before in zip(network.parameters(), frozen, strict=True):
        assert p.grad is None and torch.equal(p, before)
    with torch.no_grad():
        up -= 0.1 * up.grad
    assert not torch.allclose(layer(x), out)  # what runs is what an optimiser changes


def layers_of(made):
    return {name.partition(".")[2].rpartition(".lora_")[0] for name in made}


@pytest.mark.parametrize(
    ("prefix", "network", "attention"),
    [
        (
            "transformer",
            lambda: JoyImageEditTransformer3DModel.from_config(JOY),
            {
                f"double_blocks.{n}.attn.{s}_attn_{p}"
                for n in (0, 1)
                for s in ("img", "txt")
                for p in ("qkv", "proj")
            },
        ),
        (
            "transformer",
            lambda: ChronoEditTransformer3DModel.from_config(WAN),
            {f"blocks.{n}.attn{a}.to_{p}" for n in (0, 1) for a in (1, 2) for p in ("q", "k", "v", "out.0")}
            | {f"blocks.{n}.attn2.add_{p}_proj" for n in (0, 1) for p in "kv"},
        ),
        (
            "unet",
            lambda: UNet2DConditionModel.from_config(UNET),
            {
                f"{place}.transformer_blocks.0.attn{a}.to_{p}"
                for place in [
                    *(f"down_blocks.0.attentions.{n}" for n in (0, 1)),
                    "mid_block.attentions.0",
                    *(f"up_blocks.1.attentions.{n}" for n in (0, 1, 2)),
                ]
                for a in (1, 2)
                for p in ("q", "k", "v", "out.0")
            },
        ),
    ],
    ids=["joyimage", "chronoedit", "stable-diffusion"],
)
def test_targets_by_their_words_and_by_an_expression(prefix, network, attention):
    network = network().requires_grad_(False)
    adapters = Adapters({prefix: network})
    assert layers_of(adapters.add_lora(2)) == attention
    kinds = (nn.Linear, nn.Conv2d, nn.Conv3d)
    every = {name for name, module in network.named_modules() if isinstance(module, kinds)}
    assert layers_of(adapters.add_lora(2, targets="all", name="all")) == every
    some = layers_of(adapters.add_lora(2, targets=r"(ff|ffn|mlp)\.net\.2", name="some"))
    assert some and some == {
        name for name in every if name.endswith((".ffn.net.2", "mlp.net.2", ".ff.net.2"))
    }
    assert adapters.get_active_adapters() == ["some"]


def test_of_a_pipeline_the_denoiser_alone():
    text = CLIPTextModel.from_config(TEXT)
    adapters = Adapters({"unet": unet(), "text_encoder": text})
    assert all(name.startswith("unet.") for name in adapters.add_lora(2, targets="all"))
    assert all(
        name.startswith("text_encoder.") for name in Adapters({"text_encoder": text}).add_lora(2, name="t")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: must be a positive whole number"),
        ({"rank": True}, "rank=True"),
        ({"rank": 2.0}, "rank=2.0"),
        ({"rank": 2, "alpha": 0}, "alpha=0: must be a positive number"),
        ({"rank": 2, "alpha": float("inf")}, "alpha=inf"),
        ({"rank": 2, "targets": "to_q"}, "targets='to_q' matches no linear layer or convolution of JoyImage"),
        (
            {"rank": 2, "targets": "(attn"},
            r"targets='\(attn': must be attention, all, or a regular expression",
        ),
        ({"rank": 2, "name": "style"}, "name='style' is in use: choose another"),
    ],
)
def test_what_cannot_be_made_is_refused_by_name(options, message):
    network = joy()
    adapters = Adapters({"transformer": network})
    adapters.load_lora_weights(lora_of(network, LAYER)[0], "style")
    with pytest.raises(ValueError, match=message):
        adapters.add_lora(**options)
    assert adapters.get_list_adapters() == {"transformer": ["style"]}
    assert adapters.get_active_adapters() == ["style"]


def test_several_at_once_are_summed_each_with_its_strength():
    network = joy()
    adapters = Adapters({"transformer": network})
    (first, one), (second, two) = lora_of(network, LAYER), lora_of(network, LAYER, size=0.2)
    adapters.load_lora_weights(first, "first")
    adapters.load_lora_weights(second, "second")
    adapters.set_adapters(["first", "second"], [0.7, -0.4])
    layer, x = network.get_submodule(LAYER), torch.randn(1, 3, 48)
    truth = x.double() @ (layer._parameters["weight"].double() + 0.7 * one - 0.4 * two).T + layer.bias
    assert (layer(x) - truth).abs().max() < 1e-5


def test_a_difference_of_the_whole_weight_is_in_the_sum_and_factors_beside_it():
    network = joy()
    state, delta = lora_of(network, LAYER)
    whole, shift = 0.2 * torch.randn(48, 48), torch.randn(48)
    state |= {f"transformer.{LAYER}.diff": whole, f"transformer.{LAYER}.diff_b": shift}
    Adapters({"transformer": network}).load_lora_weights(state)
    layer, x = network.get_submodule(LAYER), torch.randn(1, 3, 48)
    weight, bias = (layer._parameters[name].double() for name in ("weight", "bias"))
    truth = x.double() @ (weight + delta + whole).T + bias + shift
    assert (layer(x) - truth).abs().max() < 1e-5
    assert len(layer.weight.terms) == 1


def test_trained_factors_are_fused_saved_and_copied(tmp_path):
    network = joy()
    adapters = Adapters({"transformer": network})
    made = adapters.add_lora(3, alpha=1.5, name="mine")
    with torch.no_grad():
        for factor in made.values():
            factor.normal_(std=0.2)
    layer, x = network.get_submodule(LAYER), torch.randn(1, 3, 48)
    out = layer(x)
    assert out.requires_grad
    assert torch.equal(copy.deepcopy(network).get_submodule(LAYER)(x), out)
    path = adapters.save_lora_weights(tmp_path)
    adapters.fuse_lora()
    assert not any(p.requires_grad for p in network.parameters())
    assert torch.allclose(layer(x), out, atol=1e-5)
    adapters.unfuse_lora()
    assert torch.equal(layer(x), out)
    adapters.unload_lora_weights()
    adapters.load_lora_weights(path)
    assert torch.equal(layer(x), out)  # half of a number is exact
