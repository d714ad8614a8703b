"""DDIM: the deterministic solver of a diffusion model, from noise to image and from image to noise.

A sample at training timestep t is x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, where abar falls from almost
1 at t = 0 to almost 0 at t = N - 1. The network predicts eps, x0 or v = sqrt(abar) eps - sqrt(1 - abar) x0;
from any of these and x_t follow both x0 and eps, and a step puts them together again at another level.

A run of S steps moves N // S training timesteps at a time, whatever the spacing of its table. The solver goes
from t to t - N // S, and below 0 to a final level. The inverse goes the same way back, from t - N // S to t:
its network is asked about timestep t with a sample that is still at the level before.

Defaults are those of the classes in Diffusers: a scheduler serves many checkpoints, each of which brings its
own file (Stable Diffusion: scaled_linear from 0.00085 to 0.012, steps_offset 1, no clipping).

B samples   N training timesteps   S steps of a run
Source: diffusers `scheduling_ddim.py`, `scheduling_ddim_inverse.py`; Song et al., arXiv 2010.02502, equations
12 and 16; Lin et al., arXiv 2305.08891, algorithm 1 and table 2.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from joyedit.noise import Generators, draw_noise
from joyedit.schedulers.scheduler import (
    Scheduler,
    SchedulerConfig,
    as_numbers,
    cumulative_alphas,
    threshold,
    to_fp32,
    training_betas,
)

log = logging.getLogger("joyedit")


@dataclasses.dataclass(frozen=True)
class DiffusionConfig(SchedulerConfig):
    """The settings that solver and inverse have in common."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None  # instead of the three above
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True  # abar before timestep 0: 1, or that of timestep 0
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    supported: ClassVar[Mapping[str, tuple]] = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": ("leading", "trailing", "linspace"),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps={self.num_train_timesteps!r}: must be at least 1")
        if self.trained_betas == ():
            raise ValueError("trained_betas is empty")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """A file without `clip_sample` that a solver wrote which never clips (PNDM, Euler, DPM++) means
        False: the class's own default would clip latents."""
        settings = dict(raw)
        writer = str(raw.get("_class_name", "DDIM"))
        if "clip_sample" not in raw and not writer.startswith(("DDIM", "DDPM")):
            settings["clip_sample"] = False
        if raw.get("trained_betas") is not None:
            settings["trained_betas"] = as_numbers(raw["trained_betas"])
        return super().from_dict(settings)


@dataclasses.dataclass(frozen=True)
class DDIMConfig(DiffusionConfig):
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0


@dataclasses.dataclass(frozen=True)
class DDIMInverseConfig(DiffusionConfig):
    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """`set_alpha_to_zero` is an older name of `set_alpha_to_one`, with the same meaning, and wins."""
        settings = dict(raw)
        older = settings.pop("set_alpha_to_zero", None)
        return super().from_dict(settings if older is None else {**settings, "set_alpha_to_one": older})

    @classmethod
    def names(cls) -> set[str]:
        """`thresholding` is the solver's, kept here without effect, as in the reference."""
        return super().names() | {"set_alpha_to_zero", "thresholding"}


# The other solvers of Stable Diffusion; their files hold the settings that DDIM needs.
RELATIVES = frozenset(
    f"{name}Scheduler"
    for name in """
    DDPM PNDM LMSDiscrete EulerDiscrete EulerAncestralDiscrete HeunDiscrete KDPM2Discrete
    KDPM2AncestralDiscrete DEISMultistep DPMSolverMultistep DPMSolverSinglestep DPMSolverSDE UniPCMultistep
    """.split()
)


class DDIMSchedulerOutput(NamedTuple):
    prev_sample: Tensor
    pred_original_sample: Tensor


class DDIMScheduler(Scheduler):
    """Steps from noise to image; see the module for what a step is and the config for the settings.

    `timesteps` (S,) are int64, falling. Nothing is counted: a step may be taken at any training timestep and
    in any order.
    """

    Config = DDIMConfig
    config: DDIMConfig
    # Solvers of the same noise levels, any of which a Stable Diffusion folder may name.
    relatives: ClassVar[frozenset[str]] = RELATIVES

    def __init__(self, config: Mapping[str, Any] | None = None, **settings: Any):
        super().__init__(config, **settings)
        self.betas = training_betas(self.config)
        self.alphas_cumprod = cumulative_alphas(self.betas)
        first = self.alphas_cumprod[0]
        self.final_alpha_cumprod = torch.ones_like(first) if self.config.set_alpha_to_one else first
        self._levels = Levels(self.alphas_cumprod, self.final_alpha_cumprod)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.config.num_train_timesteps, device="cpu").flip(0)
        self._table = self.timesteps, self.timesteps.tolist()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Build the table of a run of S = `num_inference_steps`. Raises ValueError unless 1 <= S <= N."""
        rising = spaced_timesteps(self.config, num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(rising[::-1], device=device or "cpu")
        self._table = self.timesteps, rising[::-1]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step: the sample N // S training timesteps before, and the x0 that it heads for, both in the
        dtype of `sample`; half precision is computed in fp32.

        model_output: what the network predicted at `timestep` for `sample` (B, ...), of the same shape.
        eta: share of fresh noise in [0, 1]; 0 is DDIM, 1 is DDPM. The noise comes from `generator`, or is
            given as `variance_noise`.
        use_clipped_model_output: derive eps again from the clipped x0.
        Raises ValueError before `set_timesteps` and for settings that exclude each other, IndexError for a
        timestep that the model was not trained on.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta!r}: must be in [0, 1]")
        if eta > 0 and generator is not None and variance_noise is not None:
            raise ValueError("generator and variance_noise exclude each other: give one of them")
        here = self._levels.index(read_timestep(timestep, self._table))
        there = max(here - timestep_stride(self), -1)
        signal, noise = self._levels.signal, self._levels.noise

        x, output = to_fp32(sample), to_fp32(model_output)
        x0, eps = split(self.config.prediction_type, output, x, signal[here], noise[here])
        if self.config.thresholding:
            x0 = threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
        elif self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            eps = (x - signal[here] * x0) / noise[here]

        if eta > 0:
            kept, sigma = self._levels.noise_parts(here, there, eta)
            if variance_noise is None:
                shape, device, dtype = model_output.shape, model_output.device, model_output.dtype
                variance_noise = draw_noise(shape, generator, device, dtype)
            x_prev = signal[there] * x0 + kept * eps + sigma * to_fp32(variance_noise)
        else:
            x_prev = signal[there] * x0 + noise[there] * eps
        result = DDIMSchedulerOutput(x_prev.to(sample.dtype), x0.to(sample.dtype))
        return result if return_dict else (result.prev_sample, result.pred_original_sample)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: this model's input is not scaled."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """Noise clean samples (B, ...) to `timesteps` () or (B,): sqrt(abar) x0 + sqrt(1 - abar) eps, in the
        samples' dtype. Half precision is computed in fp32; the reference rounds abar to it first."""
        signal, amount = self._factors(original_samples, timesteps)
        mixed = signal * to_fp32(original_samples) + amount * to_fp32(noise)
        return mixed.to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """What a v-prediction network is to predict: sqrt(abar) eps - sqrt(1 - abar) x0; as `add_noise`."""
        signal, amount = self._factors(sample, timesteps)
        return (signal * to_fp32(noise) - amount * to_fp32(sample)).to(sample.dtype)

    def _factors(self, sample: Tensor, timesteps: int | Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar) of the timesteps, shaped to multiply `sample`."""
        timesteps = timesteps if isinstance(timesteps, Tensor) else torch.tensor(timesteps, device="cpu")
        abar = self.alphas_cumprod.to(timesteps.device)[timesteps]
        abar = abar.to(sample.device, torch.promote_types(sample.dtype, torch.float32))
        abar = abar.reshape(-1, *[1] * (sample.ndim - 1))
        return abar.sqrt(), (1 - abar).sqrt()

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class DDIMInverseScheduler(Scheduler):
    """Steps from image to noise: with the same eps, `DDIMScheduler` takes each of them back.

    `timesteps` (S,) are int64, rising. A step at t takes the sample from level t - N // S to level t.
    """

    Config = DDIMInverseConfig
    config: DDIMInverseConfig
    relatives: ClassVar[frozenset[str]] = frozenset({"DPMSolverMultistepInverseScheduler"})

    def __init__(self, config: Mapping[str, Any] | None = None, **settings: Any):
        super().__init__(config, **settings)
        self.betas = training_betas(self.config)
        self.alphas_cumprod = cumulative_alphas(self.betas)
        first = self.alphas_cumprod[0]
        clean = torch.ones_like(first) if self.config.set_alpha_to_one else first
        self.initial_alpha_cumprod = clean
        self._levels = Levels(self.alphas_cumprod, clean)
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(self.config.num_train_timesteps, device="cpu")
        self._table = self.timesteps, self.timesteps.tolist()

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Build the table of a run of S = `num_inference_steps`.

        Raises ValueError unless 1 <= S <= N, and for linspace: its steps are not N // S apart.
        """
        if self.config.timestep_spacing == "linspace":
            raise ValueError("timestep_spacing='linspace' cannot be inverted, only 'leading' and 'trailing'")
        rising = spaced_timesteps(self.config, num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.tensor(rising, device=device or "cpu")
        self._table = self.timesteps, rising

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """One step: the sample at level `timestep`, and the x0 that it comes from, both in the dtype of
        `sample`; half precision is computed in fp32.

        model_output: what the network predicted at `timestep` for `sample` (B, ...), of the same shape.
        Raises ValueError before `set_timesteps`, IndexError for a timestep that the model was not trained on.
        """
        there = self._levels.index(read_timestep(timestep, self._table))
        here = max(there - timestep_stride(self), -1)
        signal, noise = self._levels.signal, self._levels.noise
        output, x = to_fp32(model_output), to_fp32(sample)
        x0, eps = split(self.config.prediction_type, output, x, signal[here], noise[here])
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        x_next = signal[there] * x0 + noise[there] * eps
        result = DDIMSchedulerOutput(x_next.to(sample.dtype), x0.to(sample.dtype))
        return result if return_dict else (result.prev_sample, result.pred_original_sample)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: this model's input is not scaled."""
        return sample

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def ddim_pair(
    config: Mapping[str, Any], kind: type[DDIMScheduler] = DDIMScheduler, **changes: Any
) -> tuple[DDIMScheduler, DDIMInverseScheduler]:
    """Solver and inverse of the same timesteps from the config of any scheduler of the family. kind: the
    class of the solver, which may be a subclass.

    "linspace", the default of Euler and DPM++, has no inverse and becomes "leading", for both. Errors as in
    `from_config`.
    """
    solver = kind.from_config(config, **changes)
    if solver.config.timestep_spacing == "linspace":
        log.info("timestep_spacing='linspace' cannot be inverted: 'leading' is used")
        solver = kind.from_config(solver.config, timestep_spacing="leading")
    return solver, DDIMInverseScheduler.from_config(solver.config)


class Levels:
    """The factors of x0 and eps at every training timestep, as Python floats that hold what fp32 arithmetic
    gives. The last entry, [-1], is the level before timestep 0."""

    def __init__(self, alphas_cumprod: Tensor, clean: Tensor):
        abar = torch.cat([alphas_cumprod, clean.reshape(1)])
        self.signal: list[float] = abar.sqrt().tolist()
        self.noise: list[float] = (1 - abar).sqrt().tolist()
        self._abar = abar

    def index(self, timestep: int) -> int:
        last = len(self.signal) - 2
        if not 0 <= timestep <= last:
            raise IndexError(
                f"timestep {timestep}: the model was trained on 0 to {last}; is steps_offset right?"
            )
        return timestep

    def noise_parts(self, here: int, there: int, eta: float) -> tuple[float, float]:
        """The factors of predicted and of fresh noise (sigma, equation 16) in a step between two levels."""
        abar, before = self._abar[here], self._abar[there]
        sigma = eta * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
        # Where almost all noise is fresh, rounding may make the rest negative.
        return (1 - before - sigma**2).clamp(min=0).sqrt().item(), sigma.item()


def spaced_timesteps(config: DiffusionConfig, steps: int) -> list[int]:
    """The timesteps of a run, rising. Only "leading" has an offset. arXiv 2305.08891, table 2."""
    count = config.num_train_timesteps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= count:
        raise ValueError(f"num_inference_steps={steps!r}: must be an integer from 1 to {count}")
    if config.timestep_spacing == "leading":
        return [i * (count // steps) + config.steps_offset for i in range(steps)]
    if config.timestep_spacing == "trailing":
        # `[:steps]`: for some counts, 61 of 1000 is one, rounding yields one more, which would be -1.
        falling = np.arange(count, 0, -count / steps)[:steps].round() - 1
        return falling[::-1].astype(np.int64).tolist()
    return np.linspace(0, count - 1, steps).round().astype(np.int64).tolist()


def timestep_stride(scheduler: DDIMScheduler | DDIMInverseScheduler) -> int:
    """How many training timesteps a step moves. Raises ValueError when no run was prepared."""
    if scheduler.num_inference_steps is None:
        raise ValueError("call set_timesteps before step")
    return scheduler.config.num_train_timesteps // scheduler.num_inference_steps


def read_timestep(timestep: int | Tensor, table: tuple[Tensor, list[int]]) -> int:
    """The timestep as a Python int. An element of the table is known by its place there: to read a number
    back from an accelerator would make it wait."""
    if isinstance(timestep, Tensor):
        own, values = table
        if timestep.numel() != 1:
            raise ValueError(f"timestep of shape {tuple(timestep.shape)}: all samples of a step are at one")
        if timestep.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
            return values[timestep.storage_offset()]
    return int(timestep)


def split(kind: str, output: Tensor, sample: Tensor, signal: float, noise: float) -> tuple[Tensor, Tensor]:
    """x0 and eps from what the network predicted at the level of the sample (all of one shape)."""
    if kind == "epsilon":
        return (sample - noise * output) / signal, output
    if kind == "sample":
        return output, (sample - signal * output) / noise
    return signal * sample - noise * output, signal * output + noise * sample
