"""Presets and adapters of ChronoEdit at work: what a pipeline keeps of them, and what a run makes of that.

The table of presets is in `chronoedit_presets.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from joyedit.lora import LoraReport
from joyedit.pipelines.checks import check_count, check_number
from joyedit.pipelines.chronoedit_presets import (
    PRESETS,
    Recipe,
    Solver,
    preset_called,
    shift_of,
    with_shift,
)
from joyedit.pipelines.defaults import Unsaid
from joyedit.pipelines.pipeline import Pipeline


class PipelineWithPresets(Pipeline):
    """A pipeline whose runs may go by a preset, and that knows its distilled adapters.

    `preset`: the name of the preset that calls run with when they name none; see `use_preset`.
    """

    scheduler: Solver

    def __init__(self, reference_quirks: bool | Sequence[str] = False):
        super().__init__(reference_quirks)
        self.preset: str | None = None
        self._distilled: set[str] = set()  # adapters from files that are called so
        self._keeps_distilled = False  # whether such a one stayed in the weights when it was forgotten

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **options: Any) -> LoraReport:
        """Load an adapter; see `joyedit.lora.Adapters`."""
        report = super().load_lora_weights(source, adapter_name, **options)
        files = () if isinstance(source, Mapping) else (Path(source).name, options.get("weight_name") or "")
        if any("distill" in name.lower() for name in (report.name, *files)):
            self._distilled.add(report.name)
        else:
            self._distilled.discard(report.name)
        return report

    def unload_lora_weights(self) -> None:
        """Forget all adapters; see `joyedit.lora.Adapters`."""
        self._keeps_distilled |= bool(self.adapters.fused_loras & self._distilled)
        super().unload_lora_weights()
        self._distilled.clear()

    def use_preset(self, name: str, lora: Any = None, reversible: bool = False) -> LoraReport | None:
        """Set the pipeline up for a preset: `scheduler` gets its shift, and calls that do not say steps,
        guidance or prompt get its own. lora: its adapter, as `load_lora_weights` takes it, or a list of them
        in the order of the preset, which are fused into the weights, and the active ones stay so; reversible
        keeps the originals, as `fuse_lora` does. Returns what became of the last one.

        Raises ValueError for an unknown name or another number of adapters, and what loading them raises,
        with nothing changed.
        """
        chosen = preset_called(name)
        sources = [] if lora is None else list(lora) if isinstance(lora, (list, tuple)) else [lora]
        if sources and len(sources) != len(chosen.adapters):
            wanted = " and ".join(map(str, chosen.adapters))
            raise ValueError(f"preset={name!r} has {len(chosen.adapters)} adapters: lora=[...] with {wanted}")
        scheduler = with_shift(self.scheduler, chosen.flow_shift)
        report, added = None, []
        before = self.adapters.active_weights
        try:
            for adapter, source in zip(chosen.adapters, sources, strict=False):
                report = self.load_lora_weights(source, adapter.name)
                added.append(adapter.name)
            if added:
                self.fuse_lora(adapter_names=added, reversible=reversible)
        except BaseException:
            if added:
                self.adapters.delete_adapters(added)
            self._distilled.difference_update(added)
            self.set_adapters(list(before), list(before.values()))
            raise
        if added:
            self.set_adapters([*before, *added], [*before.values(), *[1.0] * len(added)])
        self.scheduler, self.preset = scheduler, name
        return report

    def _recipe(self, preset: str | None, steps: int, guidance: float) -> Recipe:
        """What a run denoises with: what the call says, else the preset, else what the checkpoint was made
        for, else the default."""
        name = self.preset if preset is None else preset
        scheduler, chosen = self.scheduler, None
        if name is not None:
            chosen = preset_called(name)
            scheduler = with_shift(scheduler, chosen.flow_shift)
            steps = chosen.num_inference_steps if isinstance(steps, Unsaid) else steps
            guidance = chosen.guidance_scale if isinstance(guidance, Unsaid) else guidance
        said = self.unless_said(num_inference_steps=steps, guidance_scale=guidance)
        steps = check_count("num_inference_steps", said["num_inference_steps"])
        guidance = check_number("guidance_scale", said["guidance_scale"])
        adapters = {*self.get_active_adapters(), *self.adapters.fused_loras}
        if self._keeps_distilled or adapters & self._distilled:
            chosen = chosen or PRESETS["distill"]
        if chosen is not None:
            adapted = self._keeps_distilled or bool(adapters)
            chosen.warn_of_parts(steps, guidance, shift_of(scheduler), adapted)
        return Recipe(scheduler, steps, guidance)
