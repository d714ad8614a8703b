"""Settings of ChronoEdit that only work together: a row of a table for each of its adapters.

The 8-step distillation LoRA was made for 8 steps without guidance, at a noise schedule with shift 2. With
only some of these set the pictures are blurred or over-saturated, and nothing fails: so they are set
together, by name, and a run that has some of them says which are missing.

The upscaler and the paint-brush were trained with words of their own, which a preset says too.

Source: the recipes of nvidia/ChronoEdit-14B-Diffusers, and the cards of its adapters.
"""

import dataclasses
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.unipc import UniPCMultistepScheduler

log = logging.getLogger("joyedit")

Solver = UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler


class Recipe(NamedTuple):
    """With what a run denoises."""

    scheduler: Solver
    steps: int
    guidance_scale: float


class Published(NamedTuple):
    """An adapter: the name it gets in a pipeline, its file in lora/ of a checkpoint, and the repository that
    holds it where the checkpoint's own does not."""

    name: str
    file: str
    repository: str | None = None

    def __str__(self) -> str:
        return self.file if self.repository is None else f"{self.file}, published as {self.repository}"


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of a run, and the adapters that they belong to.

    prompt: the words that the adapters were trained with, and which a call gets that has no prompt. With {}
    in it, the place of the caller's words. area: pixels to work at, where nobody says a size.
    """

    name: str
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    adapters: tuple[Published, ...]
    prompt: str | None = None
    area: int | None = None

    def worded(self, prompt: Any) -> Any:
        """A prompt, or a list of them, in the words of the preset. Raises ValueError where one is needed."""
        if self.prompt is None:
            return prompt
        if prompt is None:
            if "{}" in self.prompt:
                raise ValueError(f"preset={self.name!r} needs a prompt that says what the sketch becomes")
            return self.prompt
        if isinstance(prompt, (list, tuple)):
            return [self.worded(text) for text in prompt]
        before = self.prompt.partition("{}")[0]
        if "{}" not in self.prompt or not isinstance(prompt, str) or prompt.startswith(before):
            return prompt
        first, _, others = prompt.strip().partition(" ")
        return self.prompt.format(others if first.lower() in ("a", "an") and others else prompt.strip())

    def warn_of_parts(self, steps: int, guidance: float, shift: float, adapted: bool) -> None:
        """Log a warning that names what a run has otherwise; `adapted`: whether there is any adapter."""
        actual = {"num_inference_steps": steps, "guidance_scale": guidance, "flow_shift": shift}
        wanted = dataclasses.asdict(self)
        others = [f"{key}={value:g}" for key, value in actual.items() if value != wanted[key]]
        if not adapted:
            others.append(f"no adapter (that is {' and '.join(map(str, self.adapters))})")
        if others:
            recipe = ", ".join(f"{key}={wanted[key]:g}" for key in actual)
            what = "distilled" if DISTILL in self.adapters else "this adapter's"
            message = "%s weights are made for %s, which preset=%r sets; here there is %s"
            log.warning(message, what, recipe, self.name, ", ".join(others))


DISTILL = Published("distill", "lora/chronoedit_distill_lora.safetensors")
UPSCALE = Published(
    "upscale",
    "lora/upsample_lora_diffusers.safetensors",
    "nvidia/ChronoEdit-14B-Diffusers-Upscaler-Lora",
)
PAINTBRUSH = Published(
    "paintbrush",
    "lora/paintbrush_lora_diffusers.safetensors",
    "nvidia/ChronoEdit-14B-Diffusers-Paint-Brush-Lora",
)
CLEARER = (
    "The user want to enhance image clarity and resolution while keeping the content identical. "
    "super-resolution, high detail, 4K clarity, same composition, natural texture."
)
SKETCHED = (
    "Turn the pencil sketch in the image into an actual object that is consistent with the image\u2019s "
    "content. The user wants to change the sketch to a {}"
)
_TABLE = (
    Preset("distill", 8, 1.0, 2.0, (DISTILL,)),
    Preset("upscale", 50, 5.0, 5.0, (UPSCALE,), CLEARER, area=1584 * 1056),
    Preset("paintbrush", 8, 1.0, 2.0, (DISTILL, PAINTBRUSH), SKETCHED),  # better with both, says its card
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _TABLE})


def preset_called(name: Any) -> Preset:
    """Raises ValueError for a name that is not known."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: known are {sorted(PRESETS)}")
    return PRESETS[name]


def shift_of(scheduler: Solver) -> float:
    is_euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    return scheduler.shift if is_euler else scheduler.config.flow_shift


def with_shift(scheduler: Solver, shift: float) -> Solver:
    """A scheduler like this one with that shift; itself, if it has it. Raises ValueError for a UniPC solver
    whose predictor is another scheduler."""
    if shift_of(scheduler) == shift:
        return scheduler
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return type(scheduler).from_config(scheduler.config, shift=shift)
    if scheduler.solver_p is not None:
        raise ValueError("a preset cannot set the shift of a scheduler with a solver_p")
    return type(scheduler).from_config(scheduler.config, flow_shift=shift)
