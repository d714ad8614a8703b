"""What the solvers share: configs that survive a change of solver, the count of steps, levels of noise.

A scheduler holds a table, built by `set_timesteps`, and takes one step per call of `step`. Unlike a network
it is constructed with keywords, and a config is handed from one class to another, as in
`DDIMScheduler.from_config(pndm.config)`: keys of another solver of the family are kept and saved again, but
have no effect, and what the giver left at its default is left at that of the taker.

Source: `scheduler_config.json` of Diffusers; Karras et al., arXiv 2206.00364; Lee et al., arXiv 2407.12173;
Lin et al., arXiv 2305.08891, algorithm 1.
"""

import dataclasses
import math
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from joyedit.checkpoints.bounds import as_value_errors
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.config_spellings import ConfigSpellings
from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.missing import SCHEDULERS, lacking
from joyedit.checkpoints.option_spellings import check_saving, check_without_value
from joyedit.checkpoints.options import LoadOptions

FILE = "scheduler_config.json"

# The settings of every solver that a published scheduler_config.json may have been written by.
FAMILY = frozenset(
    """
    algorithm_type base_image_seq_len base_shift beta_end beta_schedule beta_start clip_sample
    clip_sample_range corrector_order disable_corrector dynamic_thresholding_ratio euler_at_final
    final_sigmas_type flow_shift interpolation_type invert_sigmas joyai_original lambda_min_clipped
    lower_order_final max_image_seq_len max_shift num_train_timesteps original_inference_steps
    predict_epsilon predict_x0 prediction_type predictor_order rescale_betas_zero_snr rho sample_max_value
    scale_factors set_alpha_to_one set_alpha_to_zero shift shift_terminal sigma_data sigma_max sigma_min
    sigma_schedule skip_prk_steps solver_order solver_p solver_type steps_offset stochastic_sampling
    tau_func tensor_format thresholding time_shift_type timestep_scaling timestep_spacing timestep_type
    trained_betas upscale_mode use_beta_sigmas use_dynamic_shifting use_exponential_sigmas use_flow_sigmas
    use_karras_sigmas use_lu_lambdas variance_type
    """.split()
)


class SchedulerConfig(Config):
    """Settings of a scheduler; keys of its relatives are kept for the round trip."""

    keeps_unknown: ClassVar[bool] = True

    _given: frozenset[str] = frozenset()  # the fields that were not left at their defaults

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a published JSON mapping. Raises ValueError for a key that no scheduler of the family has."""
        settings = {key: value for key, value in raw.items() if not key.startswith("_")}
        strangers = sorted(settings.keys() - cls.names() - cls.aliases.keys() - FAMILY)
        if strangers:
            raise ValueError(
                f"{cls.__name__}: no scheduler has {strangers}; this one has {sorted(cls.names())}"
            )
        config = super().from_dict(settings)
        object.__setattr__(config, "_given", frozenset(cls.aliases.get(key, key) for key in settings))
        return config

    def handed_on(self) -> dict[str, Any]:
        """What another scheduler takes from this config: what was given. Its other defaults are its own."""
        return {key: value for key, value in self.items() if key in self._given}

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed. Raises ValueError for a name that is not a key of this config."""
        super().replace(**changes)  # for its errors
        return type(self).from_dict({**self.handed_on(), **changes})

    def __reduce__(self):
        return type(self).from_dict, (self.handed_on(),)

    @classmethod
    def names(cls) -> set[str]:
        """The keys that have an effect."""
        return {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]


class Scheduler(ConfigSpellings):
    """A solver: `set_timesteps` builds its table, `step` takes one step.

    Settings are keywords; `config` is the config of this or another scheduler to start from.
    Raises TypeError for a setting that the class does not have.
    """

    Config: ClassVar[type[SchedulerConfig]]
    library: ClassVar[str] = "diffusers"  # under which model_index.json lists it
    config_name = FILE
    missing: ClassVar[Mapping[str, str]] = SCHEDULERS
    order: ClassVar[int] = 1  # calls of the network per step
    init_noise_sigma: float = 1.0  # what unit noise is multiplied by to start from

    def __init__(self, config: Mapping[str, Any] | None = None, **settings: Any):
        names = self.Config.names()
        for name in settings:
            if name not in names:
                raise TypeError(f"{type(self).__name__} has no setting {name!r}; it has {sorted(names)}")
        self.config = self.Config.from_dict({**given_settings(config or {}), **settings})

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property that failed: its own error
            return object.__getattribute__(self, name)
        raise lacking(type(self), name)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path, **changes: Any) -> Self:
        """Build from a config mapping of any scheduler of the family, a scheduler_config.json or its folder.
        What a scheduler in memory, ours or one of diffusers, left at its default is left at this class's.

        Raises TypeError for a change that the class does not know, ValueError for a config that none does.
        """
        check_without_value("return_unused_kwargs", changes.pop("return_unused_kwargs", None))
        where = cls.__name__
        if isinstance(config, (str, Path)):
            path = Path(config) / FILE if Path(config).is_dir() else Path(config)
            config, where = read_json(path), str(path)
        try:
            with as_value_errors("the settings do not fit one another"):
                return cls(config, **changes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, subfolder: str | None = None, **options: Any
    ) -> Self:
        """Load scheduler_config.json from a folder or Hub repository.

        Options: the settings of the class, to change them; revision, token, cache_dir, local_files_only,
        force_download. Raises FileNotFoundError when there is no such file.
        """
        names = cls.Config.names()
        changes = {name: options.pop(name) for name in list(options) if name in names}
        origin = Origin(str(name_or_path), **LoadOptions.parse(options, also=names).origin)
        file = posixpath.join(subfolder or "", FILE)
        return cls.from_config(origin.fetch([file]) / file, **changes)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write scheduler_config.json, with the keys of relatives that this scheduler was built from.
        options: push_to_hub=False."""
        check_saving(options)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, self.config_to_save())

    def config_to_save(self) -> dict[str, Any]:
        return {"_class_name": type(self).__name__, **self.config.to_dict()}

    def select_frames(self, index: Sequence[int] | Tensor) -> None:
        """Go on with some of the latent frames only: what a solver remembers of a video (B, C, T, h, w) is
        cut down to these positions, or this mask, of T. Most solvers remember nothing."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.config.items())})"


def given_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a scheduler takes from the config of another one, or from a file's."""
    if isinstance(config, SchedulerConfig):
        return config.handed_on()
    defaults = {*config.get("_use_default_values", ())}  # of a scheduler of diffusers in memory
    defaults -= {"shift"}  # that there is one tells a flow
    return {key: value for key, value in config.items() if key not in defaults}


class CountingScheduler(Scheduler):
    """A solver whose steps follow each other along a table: it is told where a run starts, and counts from
    there.

    A subclass builds `timesteps` (N,), what the network is told before each step, and `sigmas` (N + 1,), the
    levels before each step and after the last, and calls `begin_run`. Its `step` asks `count_step` which step
    it is: from `sigmas[i]` to `sigmas[i + 1]`.
    """

    timesteps: Tensor
    sigmas: Tensor
    _step_index: int | None = None
    _begin_index: int | None = None

    def begin_run(self) -> None:
        """Forget how far the previous run came: the next step may be any of the table."""
        self._step_index = self._begin_index = None

    def current_step(self, timestep: float | Tensor) -> int:
        """The number of the step that comes next. timestep: one of `timesteps`; it says where a run starts,
        and nothing after that. Raises ValueError for a first one that is not in the table, IndexError after
        the last step."""
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.first_step(timestep) if begin is None else begin
        count = len(self.sigmas) - 1
        if self._step_index >= count:
            raise IndexError(f"all {count} steps were taken; call set_timesteps before another run")
        return self._step_index

    def count_step(self, timestep: float | Tensor) -> int:
        """`current_step`, and the step counts as taken: the next call returns the number after it."""
        i = self.current_step(timestep)
        self._step_index = i + 1
        return i

    def first_step(self, timestep: float | Tensor) -> int:
        """The number of the step that a run starts with at this timestep."""
        return self.index_for_timestep(timestep)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep stands in the table; the second place if it is there more than once, so that a run
        that starts in the middle skips nothing. Raises ValueError when it is not there."""
        table = self.timesteps if schedule_timesteps is None else schedule_timesteps
        if isinstance(timestep, Tensor):
            timestep = timestep.to(table.device)
        found = (table == timestep).nonzero()[:2]
        if len(found) == 0:
            value = timestep.item() if isinstance(timestep, Tensor) else timestep
            raise ValueError(f"timestep {value} is not one of scheduler.timesteps")
        return int(found[-1])

    def level_indices(self, timesteps: Tensor) -> list[int]:
        """Where the levels of (B,) timesteps stand in `sigmas`; in a run with a begin index, which starts
        from a noised picture, that of the current step instead."""
        if self._begin_index is None:
            return [self.index_for_timestep(timestep) for timestep in timesteps.reshape(-1)]
        current = self._begin_index if self._step_index is None else self._step_index
        return [current] * timesteps.numel()

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at this step, whatever timestep the first `step` is given."""
        self._begin_index = begin_index


def shift_sigmas(sigmas: Any, shift: float) -> Any:
    """Noise levels (array or tensor in [0, 1]) moved up if shift > 1. arXiv 2403.03206, equation 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def karras_sigmas(sigma_max: float, sigma_min: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Noise levels evenly spaced in sigma^(1/rho), from high to low. arXiv 2206.00364, equation 5."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** rho


def exponential_sigmas(sigma_max: float, sigma_min: float, steps: int) -> np.ndarray:
    """Noise levels evenly spaced in log sigma, from high to low. Raises ValueError if one is not positive."""
    if min(sigma_max, sigma_min) <= 0:
        raise ValueError(f"exponential sigmas run between positive values, not {sigma_max} and {sigma_min}")
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))


def beta_sigmas(sigma_max: float, sigma_min: float, steps: int, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Noise levels at the quantiles of a Beta(a, b) distribution, from high to low. arXiv 2407.12173."""
    return sigma_min + beta_ppf(1 - np.linspace(0, 1, steps), a, b) * (sigma_max - sigma_min)


def beta_ppf(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """Quantiles of Beta(a, b): x in [0, 1] whose regularised incomplete beta function is p (any shape)."""
    p = np.asarray(p, dtype=np.float64)
    at_half = _beta_cdf(np.array(0.5), a, b)
    return np.where(p <= at_half, _lower_half_ppf(p, a, b), 1 - _lower_half_ppf(1 - p, b, a))


def _lower_half_ppf(p: np.ndarray, a: float, b: float) -> np.ndarray:
    """`beta_ppf` where the answer is at most 1/2, by bisection to the last bit."""
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = _beta_cdf(middle, a, b) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def _beta_cdf(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """Regularised incomplete beta function for x <= 1/2: the integrated binomial series of (1-t)^(b-1)."""
    k = np.arange(1, 64)
    series = np.cumprod((k - b) / k) / (a + k)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    return x**a * (1 / a + x[..., None] ** k @ series) / math.exp(log_beta)


def cumulative_alphas(betas: Tensor) -> Tensor:
    """abar: the product of 1 - beta up to and including each training timestep. (N,) float32, falling."""
    return (1 - betas).cumprod(dim=0)


def training_betas(config: SchedulerConfig) -> Tensor:
    """beta: the share of noise that each training timestep adds, (N,) float32. Given ones may be of another
    number than num_train_timesteps."""
    count, low, high = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32, device="cpu")
    elif config.beta_schedule == "linear":
        betas = torch.linspace(low, high, count, dtype=torch.float32, device="cpu")
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(low**0.5, high**0.5, count, dtype=torch.float32, device="cpu") ** 2
    else:
        abar = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        ratios = [min(1 - after / before, 0.999) for before, after in zip(abar, abar[1:], strict=False)]
        betas = torch.tensor(ratios, dtype=torch.float32, device="cpu")
    if config.rescale_betas_zero_snr:
        betas = without_final_signal(betas)
    return betas


def as_numbers(betas: Any) -> list:
    """A list of numbers from a list, array or tensor."""
    values = betas.tolist() if isinstance(betas, Tensor) else np.asarray(betas).tolist()
    return values if isinstance(values, list) else [values]


def without_final_signal(betas: Tensor) -> Tensor:
    """Betas (N,) whose last abar is 0 and whose first is unchanged. arXiv 2305.08891, algorithm 1."""
    signal = (1 - betas).cumprod(dim=0).sqrt()
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    abar = signal**2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


def threshold(x0: Tensor, ratio: float, largest: float) -> Tensor:
    """Clamp x0 (B, ...) to a quantile of its own size, between 1 and `largest`, and scale it to [-1, 1].
    Dynamic thresholding, arXiv 2205.11487, section 2.3."""
    flat = x0.flatten(1)
    limit = flat.abs().quantile(ratio, dim=1, keepdim=True).clamp(1, largest)
    return (flat.clamp(-limit, limit) / limit).reshape(x0.shape)


def to_fp32(x: Tensor) -> Tensor:
    """At least fp32: x0 divides by the signal's factor, which is below 0.1 where a run starts."""
    return x if x.dtype == torch.float64 else x.float()
