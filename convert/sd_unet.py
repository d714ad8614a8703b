"""Key tables of the Stable Diffusion UNet.

diffusers         the published Diffusers folders; our names
ldm               the names of the original code, as in a single file without its prefix
ldm-single-file   the same under `model.diffusion_model.`, the other networks' tensors left out

No layout splits, fuses or reshapes a tensor: 1.x has 1x1 convolutions and 2.x linear layers around its
transformers in both. The original counts the layers of all levels in one list, so its numbers depend on the
config; a level's last number is its downsampler, and an upsampler stands behind the resnet, and the
transformer if there is one, of its level's last number.
Source: CompVis `ldm/modules/diffusionmodules/openaimodel.py`; the published checkpoints.
"""

from collections.abc import Mapping
from typing import Any

from joyedit.convert.table import IDENTITY, Layout, Rule, prefixed, rename

SINGLE_FILE_PREFIX = "model.diffusion_model."


def layouts(config: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts in which these weights are found; the first is the network's own."""
    ldm = Layout("ldm", (*_ends(), *_down(config), *_middle(), *_up(config)))
    return Layout("diffusers", (IDENTITY,)), ldm, prefixed(ldm, SINGLE_FILE_PREFIX, "ldm-single-file")


def _ends() -> list[Rule]:
    return [
        _leaf("time_embed.0", "time_embedding.linear_1"),
        _leaf("time_embed.2", "time_embedding.linear_2"),
        _leaf("input_blocks.0.0", "conv_in"),
        _leaf("out.0", "conv_norm_out"),
        _leaf("out.2", "conv_out"),
    ]


def _down(config: Mapping[str, Any]) -> list[Rule]:
    rules = []
    counts, kinds = _layers_of_levels(config), config["down_block_types"]
    number = 1  # 0 is conv_in
    for level, (count, kind) in enumerate(zip(counts, kinds, strict=True)):
        block = f"down_blocks.{level}"
        for layer in range(count):
            rules += _resnet(f"input_blocks.{number}.0", f"{block}.resnets.{layer}")
            if kind == "CrossAttnDownBlock2D":
                rules.append(_all(f"input_blocks.{number}.1", f"{block}.attentions.{layer}"))
            number += 1
        if level < len(counts) - 1:
            rules.append(_leaf(f"input_blocks.{number}.0.op", f"{block}.downsamplers.0.conv"))
            number += 1
    return rules


def _middle() -> list[Rule]:
    return [
        *_resnet("middle_block.0", "mid_block.resnets.0"),
        _all("middle_block.1", "mid_block.attentions.0"),
        *_resnet("middle_block.2", "mid_block.resnets.1"),
    ]


def _up(config: Mapping[str, Any]) -> list[Rule]:
    rules = []
    counts, kinds = _layers_of_levels(config)[::-1], config["up_block_types"]
    number = 0
    for level, (count, kind) in enumerate(zip(counts, kinds, strict=True)):
        block, attends = f"up_blocks.{level}", kind == "CrossAttnUpBlock2D"
        for layer in range(count + 1):
            rules += _resnet(f"output_blocks.{number}.0", f"{block}.resnets.{layer}")
            if attends:
                rules.append(_all(f"output_blocks.{number}.1", f"{block}.attentions.{layer}"))
            number += 1
        if level < len(counts) - 1:
            place = f"output_blocks.{number - 1}.{2 if attends else 1}.conv"
            rules.append(_leaf(place, f"{block}.upsamplers.0.conv"))
    return rules


def _layers_of_levels(config: Mapping[str, Any]) -> list[int]:
    count = config["layers_per_block"]
    return [count] * len(config["block_out_channels"]) if isinstance(count, int) else list(count)


def _resnet(src: str, dst: str) -> list[Rule]:
    """The original numbers norm, SiLU, conv; SiLU, linear; norm, SiLU, dropout, conv."""
    return [
        _leaf(f"{src}.in_layers.0", f"{dst}.norm1"),
        _leaf(f"{src}.in_layers.2", f"{dst}.conv1"),
        _leaf(f"{src}.emb_layers.1", f"{dst}.time_emb_proj"),
        _leaf(f"{src}.out_layers.0", f"{dst}.norm2"),
        _leaf(f"{src}.out_layers.3", f"{dst}.conv2"),
        _leaf(f"{src}.skip_connection", f"{dst}.conv_shortcut"),
    ]


def _leaf(src: str, dst: str) -> Rule:
    return rename(f"{src}.{{leaf}}", f"{dst}.{{leaf}}")


def _all(src: str, dst: str) -> Rule:
    return rename(f"{src}.{{rest*}}", f"{dst}.{{rest*}}")
