"""Euler solver for flow matching (rectified flow).

The path from noise to image is x = sigma * noise + (1 - sigma) * x0, and the network predicts its velocity
dx/dsigma = noise - x0. A step is x += (sigma_next - sigma) * velocity, for sigmas that fall from 1 to 0.
`timestep` = 1000 * sigma is what the network is fed.

Two grids of N steps exist for the same weights. Diffusers: N sigmas from sigma_max down to sigma_min, both
already shifted, are shifted once more, and a 0 is appended. The original JoyAI repository
(`joyai_original=True` with shift 4): N + 1 even points from 1 to 0, shifted once; its step keeps the sample
in fp32.

Defaults are those of the class in Diffusers (shift 1): a scheduler serves many checkpoints, each of which
brings its own file (JoyAI-Image-Edit: shift 1.5).

Another solver is a subclass with a `set_timesteps` and a `step` of its own, which asks `count_step` for the
number of the step and reads `sigmas`; docs/changing-the-code.md has one of second order.

Source: diffusers `scheduling_flow_match_euler_discrete.py`; arXiv 2403.03206, section 5.3.2; JoyAI-Image
`FlowMatchDiscreteScheduler`.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from joyedit.checkpoints.bounds import MOST_STEPS
from joyedit.noise import Generators, draw_noise
from joyedit.schedulers.scheduler import (
    CountingScheduler,
    SchedulerConfig,
    beta_sigmas,
    exponential_sigmas,
    karras_sigmas,
    shift_sigmas,
    to_fp32,
)

log = logging.getLogger("joyedit")


@dataclasses.dataclass(frozen=True)
class FlowMatchEulerConfig(SchedulerConfig):
    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5  # base_*, max_*: for callers who compute `mu` from the number of tokens
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    time_shift_type: str = "exponential"
    stochastic_sampling: bool = False
    joyai_original: bool = False

    supported: ClassVar[Mapping[str, tuple]] = {"time_shift_type": ("exponential", "linear")}

    def __post_init__(self):
        super().__post_init__()
        spacings = [n for n in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if self[n]]
        if len(spacings) > 1:
            raise ValueError(f"only one of {spacings} can be set")
        if not self.shift > 0:
            raise ValueError(f"shift={self.shift!r}: must be positive")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """A flow solver of the diffusion family (UniPC, DPM++) calls its shift `flow_shift`."""
        if raw.get("use_flow_sigmas") and "flow_shift" in raw and "shift" not in raw:
            raw = {**raw, "shift": raw["flow_shift"]}
        return super().from_dict(raw)

    def handed_on(self) -> dict[str, Any]:
        """As everywhere, and the shift: that there is one tells other solvers that this is a flow."""
        return {**super().handed_on(), "shift": self.shift}


class FlowMatchEulerDiscreteSchedulerOutput(NamedTuple):
    prev_sample: Tensor


class FlowMatchEulerDiscreteScheduler(CountingScheduler):
    """Euler steps along the flow; see the module for the settings' meaning.

    `sigmas` (N + 1,), `timesteps` (N,) and `step_lengths` (N,), the differences of the sigmas, are fp32
    tensors; before `set_timesteps` they hold the training levels, without a final 0.
    """

    Config = FlowMatchEulerConfig
    config: FlowMatchEulerConfig

    def __init__(self, config: Mapping[str, Any] | None = None, **settings: Any):
        super().__init__(config, **settings)
        count = self.config.num_train_timesteps
        levels = torch.arange(count, 0, -1, dtype=torch.float32, device="cpu") / count
        self._shift = self.config.shift
        self.sigmas = levels if self.config.use_dynamic_shifting else shift_sigmas(levels, self.shift)
        self.timesteps = self.sigmas * count
        self.sigma_max, self.sigma_min = self.sigmas[0].item(), self.sigmas[-1].item()
        self.num_inference_steps: int | None = None

    @property
    def sigmas(self) -> Tensor:
        """(N + 1,) the noise levels. Another table may be assigned, and `step_lengths` follow."""
        return self._sigmas

    @sigmas.setter
    def sigmas(self, sigmas: Tensor) -> None:
        self._sigmas = sigmas
        self.step_lengths = sigmas.diff()  # once per schedule, not per step

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Build the table of a run, and forget the previous one.

        num_inference_steps: N; may be left out when `sigmas` or `timesteps` are given.
        sigmas: N noise levels in (0, 1] before shifting, falling; a final 0 is added.
        timesteps: N values for the network, used as given; without `sigmas` the noise levels are these / 1000
            and then shifted.
        mu: strength of the shift where the config has `use_dynamic_shifting`, without effect elsewhere.
        Raises ValueError for lengths that do not match, values that are not finite, or a missing `mu`.
        """
        settings = self.config
        tables = {"sigmas": sigmas, "timesteps": timesteps}
        tables = {name: _levels(name, values) for name, values in tables.items() if values is not None}
        lengths = {name: len(values) for name, values in tables.items()}
        if num_inference_steps is not None:
            lengths["num_inference_steps"] = num_inference_steps
        if not lengths:
            raise ValueError("one of num_inference_steps, sigmas or timesteps must be given")
        if len(set(lengths.values())) > 1:
            raise ValueError(f"these must agree: {lengths}")
        steps = next(iter(lengths.values()))
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"num_inference_steps={steps}: must be at least 1, and at most {MOST_STEPS:,}")

        if "sigmas" in tables:
            levels = tables["sigmas"]
        elif "timesteps" in tables:
            _warn_timesteps_alone()
            levels = tables["timesteps"] / settings.num_train_timesteps
        elif settings.joyai_original:
            levels = np.linspace(1, 0, steps + 1)[:-1]
        else:
            scale = settings.num_train_timesteps  # not cancelled: the reference rounds here
            levels = np.linspace(self.sigma_max * scale, self.sigma_min * scale, steps) / scale

        if settings.use_dynamic_shifting:
            if mu is None:
                raise ValueError("mu must be given: this scheduler has use_dynamic_shifting=True")
            strength = math.exp(mu) if settings.time_shift_type == "exponential" else mu
            levels = strength / (strength + (1 / levels - 1))
        else:
            levels = shift_sigmas(levels, self.shift)
        # A single step from pure noise has nothing to stretch (the reference divides 0 by 0).
        if settings.shift_terminal and levels[-1] < 1:
            levels = 1 - (1 - levels) / ((1 - levels[-1]) / (1 - settings.shift_terminal))

        high, low = levels[0].item(), levels[-1].item()
        if settings.use_karras_sigmas:
            levels = karras_sigmas(high, low, steps)
        elif settings.use_exponential_sigmas:
            levels = exponential_sigmas(high, low, steps)
        elif settings.use_beta_sigmas:
            levels = beta_sigmas(high, low, steps)

        table = torch.from_numpy(levels).to(dtype=torch.float32, device=device)
        if settings.invert_sigmas:
            table = 1 - table
        self.timesteps = table * settings.num_train_timesteps
        if "timesteps" in tables and not settings.invert_sigmas:
            self.timesteps = torch.from_numpy(tables["timesteps"]).to(device)
        self.sigmas = torch.cat([table, table.new_full((1,), float(settings.invert_sigmas))])
        self.num_inference_steps = steps
        self.begin_run()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """One step: the sample at the next noise level, in the dtype of `model_output`.

        model_output: velocity, of the shape of `sample`; for a part of the latents pass that part of both.
        timestep: one of `timesteps`. It says where a run starts; after that, steps are counted.
        per_token_timesteps: (B, N) for samples (B, N, C) whose tokens are at levels of their own; the result
            is then fp32, and `model_output` the velocity with the opposite sign, as LTX feeds it.
        s_churn, s_tmin, s_tmax, s_noise: no effect; they keep the reference's argument order.
        Raises ValueError for an integer timestep or one that is not in the table, IndexError after the last
        step.
        """
        i = self.count_step(timestep)
        sample = sample.to(torch.float32)
        if self.config.joyai_original:
            model_output = model_output.to(torch.float32)  # before the product, and so is the result
        if per_token_timesteps is None:
            sigma, sigma_next, delta = self.sigmas[i], self.sigmas[i + 1], self.step_lengths[i]
        else:
            sigma = (per_token_timesteps / self.config.num_train_timesteps)[..., None]
            levels = self.sigmas.reshape(-1, *[1] * sigma.ndim)
            sigma_next = (levels * (levels < sigma - 1e-6)).amax(dim=0)
            delta = sigma - sigma_next

        if self.config.stochastic_sampling:
            x0 = sample - sigma * model_output
            noise = draw_noise(sample.shape, generator, sample.device)
            sample = (1 - sigma_next) * x0 + sigma_next * noise
        else:
            # `delta` has no dimensions, so in half precision the product is rounded, as in the reference.
            sample = sample + delta * model_output
        if per_token_timesteps is None:
            sample = sample.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(sample) if return_dict else (sample,)

    def step_length(self, timestep: float | Tensor) -> Tensor | None:
        """What `step` multiplies the velocity by, for a caller who takes the step himself, in one pass with
        other work: sample + length * velocity, in the dtype of the sample. A number; the step is counted.

        None, and nothing is counted, where a step is more than that: it draws noise, its result is fp32, or a
        subclass has a `step` of its own. Raises as `step` does.
        """
        euler = getattr(self.step, "__func__", None) is FlowMatchEulerDiscreteScheduler.step
        if not euler or self.config.stochastic_sampling or self.config.joyai_original:
            return None
        return self.step_lengths[self.count_step(timestep)]

    def denoised(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        """x0 that the step which comes next heads for: sample - sigma * velocity, in fp32 at least.

        model_output, sample (B, ...): as for `step`, which is called afterwards. Raises as `current_step`.
        """
        sigma = self.sigmas[self.current_step(timestep)]
        return to_fp32(sample) - sigma * to_fp32(model_output)

    def current_step(self, timestep: float | Tensor) -> int:
        """As everywhere; a ValueError also for an integer, which would be the index of a timestep."""
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep={timestep!r}: pass one of scheduler.timesteps, not its index")
        return super().current_step(timestep)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Noise a clean sample: sigma * noise + (1 - sigma) * sample, in the sample's dtype.

        timestep: (B,) of `timesteps`; during a run the level of the current step is taken instead.
        """
        sigma = self.sigmas.to(sample.device, sample.dtype)[self.level_indices(timestep)]
        sigma = sigma.reshape(-1, *[1] * (sample.ndim - 1))
        return sigma * noise + (1 - sigma) * sample

    @property
    def shift(self) -> float:
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Use another shift from the next `set_timesteps` on; sigma_min stays."""
        if not shift > 0:
            raise ValueError(f"shift={shift!r}: must be positive")
        self._shift = shift

    def config_to_save(self) -> dict[str, Any]:
        saved = super().config_to_save()
        if not saved["joyai_original"]:  # a key that diffusers would warn about
            del saved["joyai_original"]
        return saved

    def __len__(self) -> int:
        return self.config.num_train_timesteps


@functools.cache
def _warn_timesteps_alone() -> None:
    log.warning(
        "timesteps without sigmas: they are used as given, but the noise levels derived from them are shifted"
    )


def _levels(name: str, values: Sequence[float]) -> np.ndarray:
    try:
        array = np.asarray(values.tolist() if isinstance(values, Tensor) else values).astype(np.float32)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a list of finite numbers, got {values!r}")
    return array
