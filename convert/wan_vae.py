"""Key tables of the WAN 2.1 VAE.

diffusers   the published Diffusers folders and JD's `joy_image_edit_vae.safetensors`; our names
original    `Wan2.1_VAE.pth` of the WAN and JoyAI-Image repositories, and ComfyUI's `wan_2.1_vae.safetensors`
comfyui-*   the original names under the prefix of a whole-model single file

No layout splits, fuses or reshapes a tensor. The original counts the layers of all decoder stages in one
list, so its numbers depend on the config: resnets 0, 1, 2, upsampler 3, resnets 4, 5, 6, ... for the released
one.
Source: WAN `wan/modules/vae.py`; diffusers `scripts/convert_wan_to_diffusers.py`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from joyedit.convert.table import IDENTITY, Layout, Rule, prefixed, rename

PREFIXES = {"comfyui-first-stage": "first_stage_model.", "comfyui-vae": "vae."}


def layouts(config: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts in which these weights are found; the first is the network's own."""
    rules = [
        *_point("conv1", "quant_conv"),
        *_point("conv2", "post_quant_conv"),
        *_ends("encoder"),
        *_residual("encoder.downsamples.{n}", "encoder.down_blocks.{n}"),
        *_resample("encoder.downsamples.{n}", "encoder.down_blocks.{n}"),
        *_ends("decoder"),
    ]
    for number, name in enumerate(_decoder_layers(len(config["dim_mult"]), config["num_res_blocks"])):
        block = _resample if "upsamplers" in name else _residual
        rules += block(f"decoder.upsamples.{number}", name)
    original = Layout("original", tuple(rules))
    found_in_single_files = (prefixed(original, prefix, name) for name, prefix in PREFIXES.items())
    return (Layout("diffusers", (IDENTITY,)), original, *found_in_single_files)


def _decoder_layers(num_stages: int, num_res_blocks: int) -> Iterator[str]:
    """Our names of the decoder's layers in the order in which the original counts them."""
    for stage in range(num_stages):
        for number in range(num_res_blocks + 1):
            yield f"decoder.up_blocks.{stage}.resnets.{number}"
        if stage < num_stages - 1:
            yield f"decoder.up_blocks.{stage}.upsamplers.0"


def _point(src: str, dst: str) -> list[Rule]:
    return [rename(f"{src}.{{leaf}}", f"{dst}.{{leaf}}")]


def _residual(src: str, dst: str) -> list[Rule]:
    """The original numbers the layers of a block: norm, SiLU, conv, norm, SiLU, dropout, conv."""
    return [
        rename(f"{src}.residual.0.gamma", f"{dst}.norm1.gamma"),
        rename(f"{src}.residual.2.{{leaf}}", f"{dst}.conv1.{{leaf}}"),
        rename(f"{src}.residual.3.gamma", f"{dst}.norm2.gamma"),
        rename(f"{src}.residual.6.{{leaf}}", f"{dst}.conv2.{{leaf}}"),
        rename(f"{src}.shortcut.{{leaf}}", f"{dst}.conv_shortcut.{{leaf}}"),
    ]


def _resample(src: str, dst: str) -> list[Rule]:
    return [
        rename(f"{src}.{layer}.{{leaf}}", f"{dst}.{layer}.{{leaf}}") for layer in ("resample.1", "time_conv")
    ]


def _ends(part: str) -> list[Rule]:
    """First convolution, middle and head, alike in encoder and decoder."""
    return [
        *_point(f"{part}.conv1", f"{part}.conv_in"),
        *_residual(f"{part}.middle.0", f"{part}.mid_block.resnets.0"),
        rename(f"{part}.middle.1.{{rest*}}", f"{part}.mid_block.attentions.0.{{rest*}}"),
        *_residual(f"{part}.middle.2", f"{part}.mid_block.resnets.1"),
        rename(f"{part}.head.0.gamma", f"{part}.norm_out.gamma"),
        *_point(f"{part}.head.2", f"{part}.conv_out"),
    ]
