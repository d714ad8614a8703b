"""Qwen3-VL checkpoints: the published names, and the flat ones in the manner of Qwen2-VL.

The published files, the Diffusers folders and the ComfyUI single file all spell `model.visual.*` and
`model.language_model.*`. Flat files, which training and inference engines export, have the vision tower at
the top and the language model directly under `model`, as transformers had both before 4.52.
"""

from collections.abc import Mapping
from typing import Any

from joyedit.convert.table import IDENTITY, Layout, rename

FLAT = Layout(
    "flat",
    (
        rename("lm_head.weight", "lm_head.weight"),
        rename("visual.{key*}", "model.visual.{key*}"),
        rename("model.{key*}", "model.language_model.{key*}"),
    ),
)


def layouts(config: Mapping[str, Any]) -> tuple[Layout, ...]:
    return (Layout("diffusers", (IDENTITY,)), FLAT)
