"""Settings of ChronoEdit that only work together.

The 8-step distillation LoRA was made for 8 steps without guidance, at a noise schedule with shift 2. With
only some of these set the pictures are blurred or over-saturated, and nothing fails: so they are set
together, by name, and a run that has some of them says which are missing.

Source: the recipes of nvidia/ChronoEdit-14B-Diffusers.
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


@dataclasses.dataclass(frozen=True)
class Preset:
    """Settings of a run, and the adapter that they belong to: `lora` is its file in the published
    repository."""

    name: str
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    lora: str

    def warn_of_parts(self, steps: int, guidance: float, shift: float, adapted: bool) -> None:
        """Log a warning that names what a run has otherwise; `adapted`: whether there is any adapter."""
        actual = {"num_inference_steps": steps, "guidance_scale": guidance, "flow_shift": shift}
        wanted = dataclasses.asdict(self)
        others = [f"{key}={value:g}" for key, value in actual.items() if value != wanted[key]]
        if not adapted:
            others.append(f"no adapter (that is {self.lora})")
        if others:
            recipe = ", ".join(f"{key}={wanted[key]:g}" for key in actual)
            message = "distilled weights are made for %s, which preset=%r sets; here there is %s"
            log.warning(message, recipe, self.name, ", ".join(others))


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {"distill": Preset("distill", 8, 1.0, 2.0, "lora/chronoedit_distill_lora.safetensors")}
)


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
