"""Key tables of the JoyAI-Image-Edit MMDiT.

diffusers          the published Diffusers folder and the single files of JD's own ComfyUI nodes; our names
original           `transformer/transformer.pth` of the JoyAI-Image release: no level `attn` in the names
comfyui            single files with ComfyUI's prefix before the Diffusers names
comfyui-original   the same prefix before the original names

No layout splits, fuses or reshapes a tensor. Edit-Plus has the same names and shapes.
Source: the published checkpoints; diffusers' conversion script for JoyAI-Image.
"""

from collections.abc import Mapping
from typing import Any

from joyedit.convert.table import IDENTITY, Layout, prefixed, rename

COMFYUI_PREFIX = "model.diffusion_model."


def layouts(config: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts in which these weights are found; the first is the networks' own."""
    attention = rename(
        "double_blocks.{n}.{stream}_attn_{part}.{leaf}", "double_blocks.{n}.attn.{stream}_attn_{part}.{leaf}"
    )
    diffusers = Layout("diffusers", (IDENTITY,))
    original = Layout("original", (attention, IDENTITY))
    return (
        diffusers,
        original,
        prefixed(diffusers, COMFYUI_PREFIX, "comfyui"),
        prefixed(original, COMFYUI_PREFIX, "comfyui-original"),
    )
