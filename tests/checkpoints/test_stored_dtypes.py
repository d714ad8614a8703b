"""Stored dtypes: fp8 is read as bf16, what needs scales or holds integers is refused by name."""

import importlib
import json

import pytest
import torch
from safetensors.torch import save_file

import joyedit
from joyedit.checkpoints.network import build_on_meta, load_network
from joyedit.checkpoints.stored_dtypes import QUANTISED
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel

UNET = UNet2DConditionConfig.from_dict(
    dict(
        block_out_channels=[16, 32],
        layers_per_block=1,
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=8,
    )
)
FP8 = pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)


def unet_state():
    network = UNet2DConditionModel(UNET)
    return {name: tensor.detach().half() for name, tensor in network.state_dict().items()}


def opened(tmp_path, state, dtype=None):
    save_file(state, tmp_path / "x.safetensors")
    return load_network(UNet2DConditionModel, UNET, TensorFiles([tmp_path / "x.safetensors"]), dtype)


def run(network):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 12, generator=generator)
    return network(latents.to(network.dtype), torch.tensor([500]), text.to(network.dtype)).sample


@FP8
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_fp8_weights_are_brought_to_bf16_or_as_told(tmp_path, fp8, dtype):
    """Norms and biases of such files stay in fp16: all of the network gets one dtype, and runs."""
    state = {name: t.to(fp8) if t.ndim > 1 else t for name, t in unet_state().items()}
    network = opened(tmp_path, state, dtype)
    wanted = dtype or torch.bfloat16
    for name, parameter in network.named_parameters():
        assert parameter.dtype is wanted
        assert torch.equal(parameter, state[name].float().to(wanted)), name
    with torch.no_grad():
        assert run(network).isfinite().all()


@FP8
def test_every_fp8_number_is_a_bf16_number(fp8):
    every = torch.arange(256, dtype=torch.uint8).view(fp8)
    assert torch.equal(every.bfloat16().float().nan_to_num(), every.float().nan_to_num())


@FP8
def test_fp8_parts_that_one_of_our_tensors_is_made_of(tmp_path, fp8):
    """torch cannot join fp8 with another dtype: a layout that splits or joins reads bf16."""
    config = ChronoEditConfig.from_dict(
        dict(num_attention_heads=2, attention_head_dim=12, added_kv_proj_dim=24, text_dim=8, ffn_dim=20)
        | dict(num_layers=1, image_dim=6, freq_dim=8)
    )
    network = ChronoEditTransformer3DModel(config)
    layouts = {layout.name: layout for layout in network.layouts()}
    for name, layout in layouts.items():
        state = {
            key: value.detach().contiguous().clone()
            for key, value in layout.invert(network.state_dict()).items()
        }
        state = {key: value.to(fp8) if i % 2 else value for i, (key, value) in enumerate(state.items())}
        save_file(state, tmp_path / "x.safetensors")
        files = TensorFiles([tmp_path / "x.safetensors"])
        loaded = load_network(ChronoEditTransformer3DModel, config, files)
        assert {p.dtype for p in loaded.parameters()} <= {torch.bfloat16, torch.float32}, name


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.bool, torch.int64], ids=str)
def test_integers_where_weights_belong_are_refused_by_name(tmp_path, stored, dtype):
    state = unet_state()
    state["conv_in.weight"] = state["conv_in.weight"].to(stored)
    kind = str(stored).removeprefix("torch.")
    with pytest.raises(ValueError, match=f"x.safetensors.*conv_in.weight is stored as {kind}"):
        opened(tmp_path, state, dtype)


FORMATS = {
    "fp8 with a scale for each block": {"conv_in.weight_scale_inv": (1, 1)},
    "fp8 or int8 with scales": {"conv_in.weight_scale": (1,)},
    "NF4 of bitsandbytes": {"a.weight.absmax": (4,), "a.weight.quant_state.bitsandbytes__nf4": (9,)},
    "int8 of bitsandbytes": {"conv_in.SCB": (16,)},
    "GPTQ or AWQ": {"a.qweight": (4, 4), "a.qzeros": (1, 4), "a.scales": (1, 4)},
    "SVDQuant of nunchaku": {"a.qweight": (4, 4), "a.wscales": (4, 4)},
    "nvfp4": {"conv_in.weight_scale": (1,), "conv_in.weight_scale_2": (1,)},
}


@pytest.mark.parametrize("kind", FORMATS)
def test_quantised_files_are_refused_in_one_sentence(tmp_path, kind):
    state = unet_state() | {name: torch.ones(shape) for name, shape in FORMATS[kind].items()}
    with pytest.raises(ValueError, match=f"x.safetensors: this is {kind} .*take the file in bf16") as raised:
        opened(tmp_path, state)
    assert len(str(raised.value)) < 400 and "missing" not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    """joyimage_mmdit.JoyImageEditTransformer3DModel chronoedit_dit.ChronoEditTransformer3DModel
    clip.CLIPTextModel clip.StableDiffusionSafetyChecker qwen3_vl.Qwen3VLForConditionalGeneration
    sd_unet.UNet2DConditionModel sd_vae.AutoencoderKL
    umt5.UMT5EncoderModel wan_vae.AutoencoderKLWan""".split(),
)
def test_no_network_has_a_tensor_that_is_called_as_a_scale(name):
    module, _, kind = name.partition(".")
    cls = getattr(importlib.import_module(f"joyedit.models.{module}"), kind)
    network = build_on_meta(cls, cls.Config())
    for layout in network.layouts():
        for key in layout.invert(network.state_dict()):
            assert not key.endswith(tuple(QUANTISED)), key


def test_a_pipeline_takes_a_part_in_fp8(tmp_path):
    whole = joyedit.load("tiny-diffedit", device="cpu").unet
    state = {name: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for name, t in whole.state_dict().items()}
    save_file(state, tmp_path / "unet.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(whole.config_to_save()))
    unet = joyedit.load("tiny-diffedit", device="cpu", unet=tmp_path / "unet.safetensors").unet
    assert unet.dtype is torch.bfloat16
