"""Qwen3-VL checkpoints: the names of transformers since 4.52, and the flat ones of before.

The published files, the Diffusers folders and the ComfyUI single file all spell `model.visual.*` and
`model.language_model.*`. Exports made for inference engines, and saves in the manner of Qwen2-VL, put the
vision tower at the top and the language model directly under `model`.
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
