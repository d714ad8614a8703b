"""LoRA files: every spelling against the formula, what is reported, and what is refused.

The keys of each format are written by rules of their own, not by the tables that read them.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from joyedit.checkpoints.config import Config
from joyedit.checkpoints.lora_files import layer_spellings
from joyedit.checkpoints.network import Network, build_on_meta
from joyedit.convert.table import IDENTITY, Layout, rename
from joyedit.lora import Adapters
from joyedit.models.clip import CLIPTextModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionModel
from tests.lora_layers import (
    ATTENTION,
    BLOCK,
    JOY,
    JOY_LAYERS,
    UNET,
    assert_changed_by,
    factors,
    filled,
    joined,
    product,
    snapshot,
)

TEXT = dict(vocab_size=40, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)

UNET_LAYERS = [  # our name, and the one of the original code
    (f"{BLOCK}.attn1.to_q", "input_blocks.2.1.transformer_blocks.0.attn1.to_q"),
    (f"{BLOCK}.attn2.to_out.0", "input_blocks.2.1.transformer_blocks.0.attn2.to_out.0"),
    (f"{BLOCK}.ff.net.0.proj", "input_blocks.2.1.transformer_blocks.0.ff.net.0.proj"),
    ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
    ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
    ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
    ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
    ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
    (
        "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v",
        "output_blocks.5.1.transformer_blocks.0.attn2.to_v",
    ),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),
    ("up_blocks.1.resnets.0.conv2", "output_blocks.3.0.out_layers.3"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_out", "out.2"),
    ("time_embedding.linear_2", "time_embed.2"),
]


@pytest.fixture
def unet():
    return filled(UNet2DConditionModel.from_config(UNET))


@pytest.fixture
def joy():
    return filled(JoyImageEditTransformer3DModel.from_config(JOY))


UNET_FORMATS = {
    "diffusers": lambda ours, ldm: (f"unet.{ours}.lora.down.weight", f"unet.{ours}.lora.up.weight", None),
    "peft": lambda ours, ldm: (f"unet.{ours}.lora_A.weight", f"unet.{ours}.lora_B.weight", None),
    "peft, whole model": lambda ours, ldm: (
        f"base_model.model.{ours}.lora_A.weight",
        f"base_model.model.{ours}.lora_B.weight",
        None,
    ),
    "peft, adapter's name": lambda ours, ldm: (
        f"unet.base_model.model.{ours}.lora_A.default.weight",
        f"unet.base_model.model.{ours}.lora_B.default.weight",
        None,
    ),
    "kohya": lambda ours, ldm: (
        f"lora_unet_{joined(ours)}.lora_down.weight",
        f"lora_unet_{joined(ours)}.lora_up.weight",
        f"lora_unet_{joined(ours)}.alpha",
    ),
    "kohya, original names": lambda ours, ldm: (
        f"lora_unet_{joined(ldm)}.lora_down.weight",
        f"lora_unet_{joined(ldm)}.lora_up.weight",
        f"lora_unet_{joined(ldm)}.alpha",
    ),
    "original names": lambda ours, ldm: (
        f"diffusion_model.{ldm}.lora_down.weight",
        f"diffusion_model.{ldm}.lora_up.weight",
        f"diffusion_model.{ldm}.alpha",
    ),
}


@pytest.mark.parametrize("name", UNET_FORMATS)
def test_fused_unet_weights_follow_the_formula(name, unet, tmp_path):
    state, wanted = {}, {}
    for number, (ours, ldm) in enumerate(UNET_LAYERS):
        rank = 1 + number % 4
        down, up = factors(unet, ours, rank)
        down_key, up_key, alpha_key = UNET_FORMATS[name](ours, ldm)
        state |= {down_key: down, up_key: up}
        scale = 1.0
        if alpha_key and number % 3:  # a layer without alpha has strength 1
            state[alpha_key] = torch.tensor(0.5 * number)
            scale = 0.5 * number / rank
        wanted[f"{ours}.weight"] = scale * product(down, up)
    save_file(state, tmp_path / "style.safetensors")
    before = snapshot(unet)
    adapters = Adapters({"unet": unet})
    report = adapters.load_lora_weights(tmp_path / "style.safetensors")
    assert sorted(report.matched["unet"]) == sorted(wanted) and report.unmatched == ()
    assert_changed_by(unet, before, {})
    adapters.fuse_lora()
    assert_changed_by(unet, before, wanted)


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("processor", [".processor", ""])
def test_layers_of_attention_processors(unet, prefix, processor):
    state, wanted = {}, {}
    for layer in ATTENTION:
        attention, _, leaf = layer.removesuffix(".0").rpartition(".")
        down, up = factors(unet, layer)
        state[f"{prefix}{attention}{processor}.{leaf}_lora.down.weight"] = down
        state[f"{prefix}{attention}{processor}.{leaf}_lora.up.weight"] = up
        wanted[f"{layer}.weight"] = product(down, up)
    before = snapshot(unet)
    adapters = Adapters({"unet": unet})
    adapters.load_lora_weights(state)
    adapters.fuse_lora()
    assert_changed_by(unet, before, wanted)


def test_linear_factors_fit_a_1x1_convolution_and_the_other_way_round(unet):
    """SD 1.x has convolutions where 2.x has linear layers, and tools write either."""
    layer, linear = "mid_block.attentions.0.proj_out", f"{BLOCK}.attn1.to_v"
    down, up = factors(unet, layer)
    down2, up2 = factors(unet, linear)
    state = {
        f"unet.{layer}.lora.down.weight": down[..., 0, 0],
        f"unet.{layer}.lora.up.weight": up[..., 0, 0],
        f"unet.{linear}.lora.down.weight": down2[..., None, None],
        f"unet.{linear}.lora.up.weight": up2[..., None, None],
    }
    before = snapshot(unet)
    adapters = Adapters({"unet": unet})
    adapters.load_lora_weights(state)
    adapters.fuse_lora()
    assert_changed_by(
        unet, before, {f"{layer}.weight": product(down, up), f"{linear}.weight": product(down2, up2)}
    )


JOY_FORMATS = {
    "diffusers": "transformer.{}.lora_A.weight",
    "comfyui": "diffusion_model.{}.lora_A.weight",
    "original": "diffusion_model.{original}.lora_A.weight",
    "raw": "{}.lora_A.default.weight",
    "musubi": "lora_unet_{joined}.lora_down.weight",
}


@pytest.mark.parametrize("name", JOY_FORMATS)
def test_fused_joyimage_weights_follow_the_formula(name, joy):
    state, wanted = {}, {}
    for layer in JOY_LAYERS:
        down, up = factors(joy, layer)
        original = layer.replace(".attn.", ".")
        key = JOY_FORMATS[name].format(layer, original=original, joined=joined(layer))
        state[key] = down
        state[key.replace("lora_A", "lora_B").replace("down", "up")] = up
        wanted[f"{layer}.weight"] = product(down, up)
    before = snapshot(joy)
    adapters = Adapters({"transformer": joy})
    assert not adapters.load_lora_weights(state).unmatched
    adapters.fuse_lora()
    assert_changed_by(joy, before, wanted)


class TinyConfig(Config):
    pass


class TinyWan(Network):
    """A few layers with the names of a WAN transformer, original ones included."""

    Config = TinyConfig

    def __init__(self, config=None):
        super().__init__(config or TinyConfig())
        width = 6
        for name in ("attn1", "attn2"):
            setattr(
                self,
                name,
                nn.ModuleDict({"to_q": nn.Linear(width, width), "add_k_proj": nn.Linear(width, width)}),
            )
        self.norm2 = nn.LayerNorm(width)
        self.patch_embedding = nn.Conv3d(5, width, (1, 2, 2))
        self.proj_out = nn.Linear(width, 4, bias=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, width))

    def layouts(self):
        rules = (
            rename("self_attn.q.{leaf}", "attn1.to_q.{leaf}"),
            rename("cross_attn.k_img.{leaf}", "attn2.add_k_proj.{leaf}"),
            rename("norm3.{leaf}", "norm2.{leaf}"),
            rename("head.head.{leaf}", "proj_out.{leaf}"),
            rename("head.modulation", "scale_shift_table"),
            rename("patch_embedding.{leaf}", "patch_embedding.{leaf}"),
        )
        return Layout("diffusers", (IDENTITY,)), Layout("original", rules)


def test_whole_differences_and_biases():
    wan = filled(TinyWan())
    down, up = torch.randn(2, 6), torch.randn(6, 2)
    q_bias, norm, norm_bias, head, table = (
        torch.randn(6),
        torch.randn(6),
        torch.randn(6),
        torch.randn(4, 6),
        torch.randn(1, 2, 6),
    )
    patch_down, patch_up = torch.randn(2, 5, 1, 2, 2), torch.randn(6, 2, 1, 1, 1)
    state = {
        "diffusion_model.self_attn.q.lora_down.weight": down,
        "diffusion_model.self_attn.q.lora_up.weight": up,
        "diffusion_model.self_attn.q.alpha": torch.tensor([3.0]),
        "diffusion_model.self_attn.q.diff_b": q_bias,
        "diffusion_model.norm3.diff": norm,
        "diffusion_model.norm3.diff_b": norm_bias,
        "diffusion_model.head.head.diff": head,
        "diffusion_model.head.modulation.diff": table,
        "diffusion_model.patch_embedding.lora_down.weight": patch_down,
        "diffusion_model.patch_embedding.lora_up.weight": patch_up,
    }
    before = snapshot(wan)
    adapters = Adapters({"transformer": wan})
    assert not adapters.load_lora_weights(state).unmatched
    adapters.set_adapters("default_0", 0.5)
    adapters.fuse_lora(lora_scale=3.0)
    wanted = {
        "attn1.to_q.weight": 1.5 * 1.5 * product(down, up),
        "attn1.to_q.bias": 1.5 * q_bias,
        "norm2.weight": 1.5 * norm,
        "norm2.bias": 1.5 * norm_bias,
        "proj_out.weight": 1.5 * head,
        "scale_shift_table": 1.5 * table,
        "patch_embedding.weight": 1.5 * product(patch_down, patch_up),
    }
    assert_changed_by(wan, before, wanted)


def test_peft_bias_counts_with_alpha(tmp_path):
    wan = filled(TinyWan())
    down, up, bias = torch.randn(2, 6), torch.randn(6, 2), torch.randn(6)
    state = {
        "transformer.attn1.to_q.lora_A.weight": down,
        "transformer.attn1.to_q.lora_B.weight": up,
        "transformer.attn1.to_q.lora_B.bias": bias,
        "transformer.attn2.to_q.lora_A.weight": down.clone(),
        "transformer.attn2.to_q.lora_B.weight": up.clone(),
    }
    metadata = {
        "transformer.r": 8,
        "transformer.lora_alpha": 5,
        "transformer.alpha_pattern": {"attn2.to_q": 7},
    }
    file = tmp_path / "a.safetensors"
    save_file(state, file, {"lora_adapter_metadata": json.dumps(metadata)})
    before = snapshot(wan)
    adapters = Adapters({"transformer": wan})
    adapters.load_lora_weights(file)
    adapters.fuse_lora()
    wanted = {
        "attn1.to_q.weight": 2.5 * product(down, up),
        "attn1.to_q.bias": 2.5 * bias,
        "attn2.to_q.weight": 3.5 * product(down, up),
    }
    assert_changed_by(wan, before, wanted)


def test_settings_of_a_peft_folder(tmp_path):
    wan = filled(TinyWan())
    down, up = torch.randn(4, 6), torch.randn(6, 4)
    prefix = "base_model.model.attn2.add_k_proj"
    save_file(
        {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up},
        tmp_path / "adapter_model.safetensors",
    )
    settings = {"r": 4, "lora_alpha": 6, "use_rslora": True, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    before = snapshot(wan)
    adapters = Adapters({"transformer": wan})
    adapters.load_lora_weights(tmp_path)
    adapters.fuse_lora()
    assert_changed_by(wan, before, {"attn2.add_k_proj.weight": 3.0 * product(down, up)})


NETWORKS = {
    "sd1 unet": (UNet2DConditionModel, {}),
    "sd2 unet": (UNet2DConditionModel, {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024}),
    "sd1 text": (CLIPTextModel, {}),
    "sd2 text": (CLIPTextModel, {"hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16}),
    "joyimage": (JoyImageEditTransformer3DModel, {}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_spelling_means_one_layer(name):
    kind, settings = NETWORKS[name]
    network = build_on_meta(kind, kind.Config.from_dict(settings))
    spellings = layer_spellings({"network": network})
    assert not {spelled: hits for spelled, hits in spellings.items() if len(hits) > 1}
    ours = {n.removesuffix(".weight").removesuffix(".bias") for n in network.state_dict()}
    assert {layer for hits in spellings.values() for _, layer in hits} == ours


def lora(network, prefix, layers, rank=3, size=0.3):
    state = {}
    for layer in layers:
        down, up = factors(network, layer, rank, size)
        state |= {f"{prefix}.{layer}.lora_A.weight": down, f"{prefix}.{layer}.lora_B.weight": up}
    return state


def test_saved_differences_load_equal(tmp_path):
    wan = filled(TinyWan())
    state = {
        "diffusion_model.self_attn.q.lora_down.weight": torch.randn(2, 6),
        "diffusion_model.self_attn.q.lora_up.weight": torch.randn(6, 2),
        "diffusion_model.self_attn.q.diff_b": torch.randn(6),
        "diffusion_model.cross_attn.k_img.diff_b": torch.randn(6),
        "diffusion_model.norm3.diff": torch.randn(6),
        "diffusion_model.head.modulation.diff": torch.randn(1, 2, 6),
    }
    adapters = Adapters({"transformer": wan})
    adapters.load_lora_weights(state)
    adapters.save_lora_weights(tmp_path, weight_name="mine.safetensors")
    adapters.fuse_lora()
    fused = snapshot(wan)
    adapters.unfuse_lora()
    adapters.unload_lora_weights()
    adapters.load_lora_weights(tmp_path)
    adapters.fuse_lora()
    assert all(torch.equal(tensor, fused[name]) for name, tensor in wan.state_dict().items())


def test_one_file_for_unet_and_text_encoder(unet):
    text = filled(CLIPTextModel.from_config({**TEXT, "hidden_size": 12}))
    layers = {"unet": ATTENTION, "te": ["encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc2"]}
    state, wanted = {}, {}
    for kind, network, prefix in (("unet", unet, "lora_unet_"), ("te", text, "lora_te_text_model_")):
        for layer in layers[kind]:
            down, up = factors(network, layer)
            key = prefix + joined(layer)
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            state[f"{key}.alpha"] = torch.tensor(6.0)
            wanted[f"{layer}.weight"] = 2.0 * product(down, up)
    before = snapshot(unet), snapshot(text)
    adapters = Adapters({"unet": unet, "text_encoder": text})
    report = adapters.load_lora_weights(state, "style")
    assert {network: len(tensors) for network, tensors in report.matched.items()} == {
        "unet": 3,
        "text_encoder": 2,
    }
    assert str(report).startswith(
        "adapter 'style' changes 3 tensors of unet, 2 tensors of text_encoder; nothing for"
    )
    adapters.set_adapters("style", {"unet": 0.5, "text_encoder": 2.0})
    adapters.fuse_lora()
    for network, old, strength in ((unet, before[0], 0.5), (text, before[1], 2.0)):
        inside = {name: strength * delta for name, delta in wanted.items() if name in old}
        assert_changed_by(network, old, inside)
    adapters.unfuse_lora(components=["text_encoder"])
    assert_changed_by(text, before[1], {})
    assert adapters.fused_loras == {"style"}

    half = Adapters({"unet": unet}).load_lora_weights(state, "half")
    assert half.matched.keys() == {"unet"} and len(half.unmatched) == 6


def test_report_has_both_sides(unet, caplog):
    adapters = Adapters({"unet": unet})
    state = lora(unet, "unet", ATTENTION)
    state["unet.down_blocks.7.attentions.0.proj_in.lora_A.weight"] = torch.ones(2, 16)
    state["unet.down_blocks.7.attentions.0.proj_in.lora_B.weight"] = torch.ones(16, 2)
    state[f"unet.{BLOCK}.attn1.to_v.alpha"] = torch.tensor(1.0)
    state["bundle_emb.thing"] = torch.ones(3)
    with caplog.at_level(logging.INFO, "joyedit"):
        report = adapters.load_lora_weights(state, "style")
    assert sorted(report.matched["unet"]) == sorted(f"{layer}.weight" for layer in ATTENTION)
    assert sorted(report.unmatched) == sorted(list(state)[-4:])
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight" in report.lacking["unet"]
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight" not in report.lacking["unet"]
    assert "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q.weight" not in report.lacking["unet"]
    assert caplog.records[0].levelname == "WARNING"
    assert "adapter 'style' changes 3 tensors of unet; 4 keys of the file match nothing" in caplog.text


FOREIGN = {
    "Stable Diffusion XL": "lora_te2_text_model_encoder_layers_3_mlp_fc1.lora_down.weight",
    "FLUX": "transformer.single_transformer_blocks.3.attn.to_q.lora_A.weight",
    "Stable Diffusion 3 or Qwen-Image": "transformer.transformer_blocks.3.attn.add_q_proj.lora_A.weight",
    "WAN": "diffusion_model.blocks.3.self_attn.q.lora_A.weight",
    "JoyAI-Image-Edit": "diffusion_model.double_blocks.3.attn.img_attn_qkv.lora_A.weight",
    "does not look like any": "somewhere.lora_A.weight",
}


@pytest.mark.parametrize("family", FOREIGN)
def test_a_file_in_which_nothing_matches_says_whose_it_is(family, unet, tmp_path):
    key = FOREIGN[family]
    other = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    save_file({key: torch.ones(2, 8), other: torch.ones(8, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=rf"x\.safetensors: none of its 2 keys .*UNet2DConditionModel.*{family}"
    ):
        Adapters({"unet": unet}).load_lora_weights(tmp_path)


def broken(unet, how):
    state = lora(unet, "unet", ATTENTION)
    first, second = f"unet.{ATTENTION[0]}", f"unet.{ATTENTION[1]}"
    match how:
        case "width":
            state[f"{second}.lora_A.weight"] = torch.ones(3, 1024)
        case "rank":
            state[f"{second}.lora_A.weight"] = torch.ones(4, 12)
        case "half":
            del state[f"{first}.lora_B.weight"]
        case "twice":
            state[f"{first}.lora.down.weight"] = torch.ones(3, 16)
        case "dora":
            state[f"{first}.dora_scale"] = torch.ones(16)
        case "loha":
            state[f"{first}.hada_w1_a"] = torch.ones(16)
        case "bias":
            state[f"{first}.lora_B.bias"] = torch.ones(16)
        case "difference":
            state[f"{first}.diff"] = torch.ones(16, 15)
        case "no factors":
            state = {"conv_in.weight": torch.ones(3)}
        case "empty":
            state = {}
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "width",
            r"attn2.to_k.weight is \(16, 12\), and up \(16, 3\) @ down \(3, 1024\).*like.*Diffusion 2.x",
        ),
        ("rank", r"up \(16, 3\) @ down \(4, 12\) does not fit"),
        ("half", "attn1.to_q: the other factor is missing"),
        ("twice", "are both the down of unet"),
        ("dora", "this is DoRA"),
        ("loha", "this is LoHa"),
        ("bias", r"attn1.to_q.bias does not exist, and a difference \(16,\) is for it"),
        ("difference", r"weight is \(16, 16\), and a difference \(16, 15\) does not fit"),
        ("no factors", "it holds no LoRA: none of its 1 keys"),
        ("empty", "it holds no LoRA"),
    ],
)
def test_files_that_do_not_fit_are_refused_whole(how, message, unet):
    adapters = Adapters({"unet": unet})
    with pytest.raises(ValueError, match=message):
        adapters.load_lora_weights(broken(unet, how))
    assert adapters.get_list_adapters() == {} and adapters.get_active_adapters() == []


def test_which_file_of_a_folder(unet, tmp_path):
    adapters = Adapters({"unet": unet})
    with pytest.raises(FileNotFoundError, match="looks like a path"):
        adapters.load_lora_weights(tmp_path / "none.safetensors")
    state = lora(unet, "unet", ATTENTION)
    torch.save(state, tmp_path / "one.bin")
    adapters.load_lora_weights(tmp_path, "pickle")
    with pytest.raises(FileNotFoundError, match="use_safetensors=True"):
        adapters.load_lora_weights(tmp_path, use_safetensors=True)
    save_file(state, tmp_path / "two.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"name one of \['one.bin', 'two.safetensors'\] with weight_name="
    ):
        adapters.load_lora_weights(tmp_path)
    adapters.load_lora_weights(tmp_path, "named", weight_name="two.safetensors")
    with pytest.raises(FileNotFoundError, match="has no three.safetensors"):
        adapters.load_lora_weights(tmp_path, weight_name="three.safetensors")
    adapters.load_lora_weights(
        tmp_path.parent, "inside", subfolder=tmp_path.name, weight_name="two.safetensors"
    )
    assert adapters.get_list_adapters() == {"unet": ["pickle", "named", "inside"]}
