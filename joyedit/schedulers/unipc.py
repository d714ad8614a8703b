"""UniPC: a multistep solver that predicts a sample and corrects it when the network has seen it.

A sample at noise level sigma is x = alpha x0 + s eps. Flow models: alpha = 1 - sigma, s = sigma, and the
network predicts the velocity eps - x0. Diffusion models: alpha = 1 / sqrt(1 + sigma^2), s = sigma alpha. With
lambda = log(alpha / s), an interval of length h = lambda_next - lambda is crossed by

    x_next = (s_next / s) x - alpha_next (e^-h - 1) m - alpha_next B(h) (weights . differences)

from the data m = x0 that the last network outputs stand for (`predict_x0=False`: from eps, with alpha and s
exchanged and h negative). The differences are those of older outputs to m, over their distance in lambda / h.
The predictor leads to the next level; there the corrector crosses the same interval again with the output at
its end as one more difference, and what it corrects is where the next predictor starts from.

All factors of an interval follow from the table: `set_timesteps` computes them, in fp32. A step is then a few
multiplications, in fp32 at least. A step into sigma = 0, where lambda is infinite, ends at x0 itself.

Defaults are those of the class in Diffusers: a scheduler serves many checkpoints, each of which brings its
own file (ChronoEdit: flow_prediction, use_flow_sigmas, flow_shift 5).

B samples   N training timesteps   S steps of a run   J intervals   p order
Source: diffusers `scheduling_unipc_multistep.py`; Zhao et al., arXiv 2302.04867, section 3 (UniC, UniP).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from joyedit.checkpoints.bounds import MOST_STEPS
from joyedit.schedulers.scheduler import (
    CountingScheduler,
    SchedulerConfig,
    as_numbers,
    beta_sigmas,
    cumulative_alphas,
    exponential_sigmas,
    karras_sigmas,
    shift_sigmas,
    threshold,
    to_fp32,
    training_betas,
)

SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
OLDER_SOLVER_TYPES = ("midpoint", "heun", "logrho")  # of DPM++ and DEIS files, for which UniPC takes bh2


@dataclasses.dataclass(frozen=True)
class UniPCConfig(SchedulerConfig):
    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None  # instead of the three above
    solver_order: int = 2
    prediction_type: str = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    predict_x0: bool = True
    solver_type: str = "bh2"  # B(h): bh1 is the length of the interval, bh2 its expm1
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()  # numbers of the steps whose result is not corrected
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    final_sigmas_type: str = "zero"
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: str = "exponential"
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    supported: ClassVar[Mapping[str, tuple]] = {
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
        "solver_type": ("bh1", "bh2"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "time_shift_type": ("exponential", "linear"),
    }

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_train_timesteps", "solver_order"):
            if self[name] < 1:
                raise ValueError(f"{name}={self[name]!r}: must be at least 1")
        if self.trained_betas == ():
            raise ValueError("trained_betas is empty")
        spacings = [name for name in SPACINGS if self[name]]
        if len(spacings) > 1:
            raise ValueError(f"only one of {spacings} can be set")
        if not self.flow_shift > 0:
            raise ValueError(f"flow_shift={self.flow_shift!r}: must be positive")
        if not self.use_flow_sigmas:
            if self.shift_terminal is not None:
                raise ValueError("shift_terminal needs use_flow_sigmas=True")
            if self.prediction_type == "flow_prediction":
                raise ValueError("prediction_type='flow_prediction' needs use_flow_sigmas=True")
        if self.prediction_type == "flow_prediction" and not self.predict_x0:
            # Where a flow starts, fp32 does not know eps from x: alpha is 1e-6, and eps steps divide by it.
            raise ValueError("prediction_type='flow_prediction' needs predict_x0=True")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """The config of a flow-match solver, which has a shift and no betas, makes a flow solver with that
        shift."""
        settings = dict(raw)
        if "shift" in raw:
            if "beta_start" not in raw:
                flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
                settings = {**flow, "flow_shift": raw["shift"], **raw}
            if settings.get("use_flow_sigmas") and "flow_shift" in settings:
                settings["shift"] = settings["flow_shift"]  # for the way back
        if settings.get("solver_type") in OLDER_SOLVER_TYPES:
            settings["solver_type"] = "bh2"
        if raw.get("trained_betas") is not None:
            settings["trained_betas"] = as_numbers(raw["trained_betas"])
        if settings.get("disable_corrector", ()) is None:
            settings["disable_corrector"] = ()
        if raw.get("solver_p") is not None:
            raise ValueError("solver_p is a scheduler, not a setting: pass it when the solver is built")
        return super().from_dict(settings)


class UniPCMultistepSchedulerOutput(NamedTuple):
    prev_sample: Tensor


class UniPCMultistepScheduler(CountingScheduler):
    """Predictor and corrector; see the module for what a step is and the config for the settings.

    `sigmas` (S + 1,) are fp32 on the CPU, `timesteps` (S,) int64: what the network is told is the level's
    timestep without its fraction. Before `set_timesteps` they hold the training levels.

    solver_p: another scheduler, whose steps replace those of the predictor.
    """

    Config = UniPCConfig
    config: UniPCConfig

    def __init__(self, config: Mapping[str, Any] | None = None, *, solver_p: Any = None, **settings: Any):
        super().__init__(config, **settings)
        self.betas = training_betas(self.config)
        self.alphas_cumprod = cumulative_alphas(self.betas)
        if self.config.rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = 2**-24  # so that the first sigma is finite
        self.solver_p = solver_p
        self.sigmas = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
        self.timesteps = torch.arange(
            self.config.num_train_timesteps, dtype=torch.float32, device="cpu"
        ).flip(0)
        self._training_sigmas = self.sigmas.numpy()
        self.num_inference_steps: int | None = None
        self._intervals: list[list[Interval]] = []
        self._reset()

    def _reset(self) -> None:
        """Forget the run."""
        self.model_outputs: list[Tensor] = []  # x0 (or eps) of the last steps, the newest last
        self.last_sample: Tensor | None = None  # where the predictor started from
        self._last_order = 0
        self.begin_run()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Build the table of a run, and forget the previous one.

        num_inference_steps: S; may be left out when `sigmas` are given.
        sigmas: S noise levels in (0, 1] before shifting, falling, for a flow solver; the last one is added.
        mu: strength of the shift where the config has `use_dynamic_shifting`.
        Raises ValueError for a missing or too large number, a missing `mu`, or `sigmas` that cannot be used.
        """
        settings = self.config
        if settings.use_dynamic_shifting and mu is None:
            raise ValueError("mu must be given: this scheduler has use_dynamic_shifting=True")
        levels = None if sigmas is None else self._read_sigmas(sigmas)
        steps = num_inference_steps if levels is None else len(levels)
        if num_inference_steps not in (None, steps):
            raise ValueError(f"num_inference_steps={num_inference_steps}, but {steps} sigmas")
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"num_inference_steps={steps!r}: must be an integer of at least 1")
        if steps > MOST_STEPS:
            raise ValueError(f"num_inference_steps={steps}: {MOST_STEPS:,} are the most that is supported")

        if any(settings[name] for name in SPACINGS):
            levels, timesteps = self._spaced_levels(steps)
        elif settings.use_flow_sigmas:
            if levels is None:
                levels = np.linspace(1, 1 / settings.num_train_timesteps, steps + 1)[:-1]
            levels = self._shifted(levels, mu)
            timesteps = levels * settings.num_train_timesteps
        else:
            timesteps = self._spaced_timesteps(steps)
            levels = np.interp(timesteps, np.arange(len(self._training_sigmas)), self._training_sigmas)

        last = 0.0
        if settings.final_sigmas_type == "sigma_min":
            diffusion = not settings.use_flow_sigmas and not any(settings[name] for name in SPACINGS)
            last = self._training_sigmas[0] if diffusion else levels[-1]
        table = np.append(levels, last).astype(np.float32)
        if (np.diff(table[:-1]) >= 0).any() or table[-1] > table[-2]:
            raise ValueError(f"num_inference_steps={steps}: the noise levels of that many steps do not fall")
        self.sigmas = torch.from_numpy(table)
        self.timesteps = torch.from_numpy(timesteps).to(device=device, dtype=torch.int64)
        self.num_inference_steps = steps
        self._intervals = self._all_intervals()
        if self.solver_p is not None:
            self.solver_p.set_timesteps(steps, device=device)
        self._reset()

    def _read_sigmas(self, sigmas: Sequence[float]) -> np.ndarray:
        spacings = [name for name in SPACINGS if self.config[name]]
        if not self.config.use_flow_sigmas or spacings:
            why = f"{spacings[0]}=True computes them" if spacings else "they need use_flow_sigmas=True"
            raise ValueError(f"sigmas cannot be given to this scheduler: {why}")
        array = np.asarray(sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas, dtype=np.float64)
        falls = array.ndim == 1 and array.size > 0 and array[0] <= 1 and (np.diff(array) < 0).all()
        if not falls or not array[-1] > 0:
            raise ValueError(f"sigmas must be falling numbers in (0, 1], got {sigmas!r}")
        return array

    def _shifted(self, levels: np.ndarray, mu: float | None) -> np.ndarray:
        """Flow levels (S,) moved up, and kept so far below 1 that alpha is not 0."""
        settings = self.config
        if settings.use_dynamic_shifting:
            assert mu is not None
            strength = math.exp(mu) if settings.time_shift_type == "exponential" else mu
            levels = strength / (strength + (1 / levels - 1))
        else:
            levels = shift_sigmas(levels, settings.flow_shift)
        # A single step from pure noise has nothing to stretch (the reference divides 0 by 0).
        if settings.shift_terminal and levels[-1] < 1:
            levels = 1 - (1 - levels) / ((1 - levels[-1]) / (1 - settings.shift_terminal))
        if abs(levels[0] - 1) < 1e-6:
            levels[0] -= 1e-6
        return levels

    def _spaced_levels(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Levels and timesteps (S,) between the ends of the training table, or `sigma_max` and `_min`."""
        settings = self.config
        low = self._training_sigmas[0].item() if settings.sigma_min is None else settings.sigma_min
        high = self._training_sigmas[-1].item() if settings.sigma_max is None else settings.sigma_max
        if settings.use_karras_sigmas:
            levels = karras_sigmas(high, low, steps)
        elif settings.use_exponential_sigmas:
            levels = exponential_sigmas(high, low, steps)
        else:
            levels = beta_sigmas(high, low, steps)
        if settings.use_flow_sigmas:
            levels = levels / (levels + 1)
            return levels, levels * settings.num_train_timesteps
        timesteps = timesteps_of(levels, np.log(self._training_sigmas))
        return levels, timesteps.round() if settings.use_karras_sigmas else timesteps

    def _spaced_timesteps(self, steps: int) -> np.ndarray:
        """Training timesteps (S,), falling. Only "leading" has an offset. arXiv 2305.08891, table 2."""
        count = self.config.num_train_timesteps
        if self.config.timestep_spacing == "linspace":
            return np.linspace(0, count - 1, steps + 1).round()[:0:-1].astype(np.int64)
        if self.config.timestep_spacing == "leading":
            return np.arange(steps, 0, -1) * (count // (steps + 1)) + self.config.steps_offset
        # `[:steps]`: for some counts, 61 of 1000 is one, rounding yields one more, which would be -1.
        return np.arange(count, 0, -count / steps)[:steps].round().astype(np.int64) - 1

    def _all_intervals(self) -> list[list["Interval"]]:
        """The intervals of the run for order 1, 2, ... A last one to sigma = 0, or of no length, is there for
        order 1 only."""
        last, end = self.sigmas[-2:]
        if end == 0:
            signal, noise = (factor.item() for factor in self._signal_and_noise(last))
            final = Interval(0, -1) if self.config.predict_x0 else Interval(1 / signal, noise / signal)
        else:
            final = Interval(1, 0) if end == last else None
        regular = self.sigmas if final is None else self.sigmas[:-1]
        signal, noise = self._signal_and_noise(regular)
        orders = range(1, self.config.solver_order + 1)
        table = [intervals(signal, noise, p, self.config.predict_x0, self.config.solver_type) for p in orders]
        if final is not None:
            table[0].append(final)
        return table

    def _signal_and_noise(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and s: the factors of x0 and eps at the level."""
        if self.config.use_flow_sigmas:
            return 1 - sigma, sigma
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha, sigma * alpha

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> UniPCMultistepSchedulerOutput | tuple[Tensor]:
        """One step: the sample at the next noise level, in the dtype of `sample`; computed in fp32 at least.

        model_output: what the network predicted at `timestep` for `sample` (B, ...), of the same shape.
        timestep: one of `timesteps`. It says where a run starts; after that, steps are counted.
        Raises ValueError before `set_timesteps`, for a timestep that is not in the table, or when the sample
        has another shape than the one before; IndexError after the last step.
        """
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        i = self.current_step(timestep)
        before = sample.shape if self.last_sample is None else self.last_sample.shape
        if not before == sample.shape == model_output.shape:
            shapes = f"sample {tuple(sample.shape)}, model_output {tuple(model_output.shape)}"
            raise ValueError(f"{shapes}, solver {tuple(before)}: not equal (select_frames cuts the solver's)")

        x = to_fp32(sample)
        output = self.convert_model_output(model_output, sample=x)
        if self.last_sample is not None and i - 1 not in self.config.disable_corrector:
            crossed = self._interval(i - 1, self._last_order)
            x = self._cross(crossed, crossed.correct, self.last_sample, end=output)

        self.model_outputs = [*self.model_outputs, output][-self.config.solver_order :]
        self.last_sample, self._last_order = x, self._order(i)
        if self.solver_p is None:
            ahead = self._interval(i, self._last_order)
            x = self._cross(ahead, ahead.predict, x)
        else:
            x = self.solver_p.step(model_output, timestep, x.to(sample.dtype)).prev_sample
        self.count_step(timestep)
        x = x.to(sample.dtype)
        return UniPCMultistepSchedulerOutput(x) if return_dict else (x,)

    def convert_model_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """x0 (`predict_x0=False`: eps) of the current step from what the network predicted for `sample`, in
        fp32 at least. Both (B, ...)."""
        level = self.sigmas[self._step_index or 0]
        signal, noise = (factor.item() for factor in self._signal_and_noise(level))
        kind, output, x = self.config.prediction_type, to_fp32(model_output), to_fp32(sample)
        if not self.config.predict_x0:
            if kind == "epsilon":
                return output
            if kind == "sample":
                return (x - signal * output) / noise
            return signal * output + noise * x
        if kind == "epsilon":
            x0 = (x - noise * output) / signal
        elif kind == "sample":
            x0 = output
        elif kind == "v_prediction":
            x0 = signal * x - noise * output
        else:
            x0 = x - noise * output
        if self.config.thresholding:
            x0 = threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)
        return x0

    def denoised(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor) -> Tensor:
        """x0 that the step which comes next heads for, in fp32 at least.

        model_output, sample (B, ...): as for `step`, which is called afterwards. Raises as `current_step`.
        """
        level = self.sigmas[self.current_step(timestep)]
        output = self.convert_model_output(model_output, sample)
        if self.config.predict_x0:
            return output
        signal, noise = (factor.item() for factor in self._signal_and_noise(level))
        return (to_fp32(sample) - noise * output) / signal

    def _order(self, i: int) -> int:
        """How many outputs the predictor of step i uses: few at the start, and at the end as well."""
        known = len(self.model_outputs)
        if self.config.lower_order_final:
            known = min(known, len(self.sigmas) - 1 - i)
        # Into sigma = 0 only a step of order 1 has a limit; one of no length has nothing to extrapolate.
        return known if len(self._intervals[known - 1]) > i - (known - 1) else 1

    def _interval(self, i: int, order: int) -> "Interval":
        """From level i to i + 1; order p has none before level p - 1, where p outputs are known."""
        return self._intervals[order - 1][i - (order - 1)]

    def _cross(
        self, interval: "Interval", weights: Sequence[float], x: Tensor, end: Tensor | None = None
    ) -> Tensor:
        """The sample x (B, ...) taken across the interval, with `end` the output on its other side."""
        newest = self.model_outputs[-1]
        older = self.model_outputs[-1 - len(interval.distances) : -1]
        differences = [(m - newest) / r for m, r in zip(reversed(older), interval.distances, strict=True)]
        if end is not None:
            differences.append(end - newest)
        x = interval.sample * x - interval.output * newest
        if not differences:
            return x
        slope = weights[0] * differences[0]
        for weight, difference in zip(weights[1:], differences[1:], strict=True):
            slope = slope + weight * difference
        return x - interval.slope * slope

    def select_frames(self, index: Sequence[int] | Tensor) -> None:
        """Go on with some of the latent frames only, without starting over: what the solver remembers of a
        video (B, C, T, h, w) is cut down to these positions, or this mask, of T."""

        def select(x: Tensor) -> Tensor:
            return x[..., torch.as_tensor(index, device=x.device), :, :]

        self.model_outputs = [select(output) for output in self.model_outputs]
        self.last_sample = None if self.last_sample is None else select(self.last_sample)
        if self.solver_p is not None:
            self.solver_p.select_frames(index)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The sample itself: this model's input is not scaled."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples (B, ...): alpha x0 + s eps, in their dtype; computed in fp32 at least.

        timesteps: (B,) of `timesteps`; in a run with a begin index the level of the current step is taken.
        """
        sigma = self.sigmas[self.level_indices(timesteps)].to(original_samples.device)
        signal, amount = self._signal_and_noise(sigma.reshape(-1, *[1] * (original_samples.ndim - 1)))
        mixed = signal * to_fp32(original_samples) + amount * to_fp32(noise)
        return mixed.to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` under the name and in the order of flow-match solvers."""
        return self.add_noise(sample, noise, timestep)

    def index_for_timestep(self, timestep: int | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """As everywhere, without the timestep's fraction: the table has none."""
        return super().index_for_timestep(int(timestep), schedule_timesteps)

    def first_step(self, timestep: int | Tensor) -> int:
        """The first timestep may be there twice, since many steps share a whole number: it is the first."""
        return 0 if int(timestep) == int(self.timesteps[0]) else self.index_for_timestep(timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps


class Interval(NamedTuple):
    """The factors that cross one interval, as Python floats that hold what fp32 arithmetic gives."""

    sample: float
    output: float
    slope: float = 0.0
    distances: Sequence[float] = ()  # from its start to the older outputs, over its length: (p - 1) negatives
    predict: Sequence[float] = ()  # weights of their differences (p - 1)
    correct: Sequence[float] = ()  # the same with the output at its end (p)


def intervals(
    signal: Tensor, noise: Tensor, order: int, predict_x0: bool, solver_type: str
) -> list[Interval]:
    """The intervals between levels (J + 1,) that an order p can cross: from level p - 1 on, so J - p + 1.

    signal, noise: alpha and s of the levels, both positive, with falling noise.
    Source: arXiv 2302.04867, theorem 3.1: the weights solve R(distances) w = b.
    """
    if len(signal) <= order:
        return []
    log_ratio = signal.log() - noise.log()
    start, after = log_ratio[order - 1 : -1], log_ratio[order:]
    length = after - start
    older = [(log_ratio[order - 1 - k : -1 - k] - start) / length for k in range(1, order)]
    distances = torch.stack([*older, torch.ones_like(length)], dim=-1)  # (J, p)

    exponent = -length if predict_x0 else length
    phi = growth = exponent.expm1()
    slope = exponent if solver_type == "bh1" else growth
    rows, right = [], []
    phi, factorial = phi / exponent - 1, 1
    for k in range(order):
        rows.append(distances**k)
        right.append(phi * factorial / slope)
        factorial *= k + 2
        phi = phi / exponent - 1 / factorial
    matrix, right = torch.stack(rows, dim=-2), torch.stack(right, dim=-1)  # (J, p, p), (J, p)

    def solved(size: int) -> Tensor:
        """The weights (J, size) of the first differences."""
        if size < 2:  # of a single one, 1/2 keeps the order of accuracy
            return torch.full_like(distances[:, :size], 0.5)
        return torch.linalg.solve(matrix[:, :size, :size], right[:, :size])

    if predict_x0:
        of_sample, scale = noise[order:] / noise[order - 1 : -1], signal[order:]
    else:
        of_sample, scale = signal[order:] / signal[order - 1 : -1], noise[order:]
    columns = (
        of_sample,
        scale * growth,
        scale * slope,
        distances[:, :-1],
        solved(order - 1),
        solved(order),
    )
    return [Interval(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def timesteps_of(sigmas: np.ndarray, log_training: np.ndarray) -> np.ndarray:
    """Fractional training timesteps of noise levels (S,), interpolated in log sigma (N,), rising."""
    logs = np.log(np.maximum(sigmas, 1e-10))
    below = np.searchsorted(log_training, logs, side="right") - 1
    below = below.clip(0, len(log_training) - 2)
    low, high = log_training[below], log_training[below + 1]
    share = ((low - logs) / (low - high)).clip(0, 1)
    return (1 - share) * below + share * (below + 1)
