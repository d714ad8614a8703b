"""What every pipeline has: its parts, loading and saving them, where they run, progress, and callbacks.

A pipeline names its parts and the classes they may have; a Diffusers folder holds one subfolder per part and
a `model_index.json` that lists them. The algorithm itself is in the pipeline's own file.

Calls may run at once, in several threads, of one pipeline or of several that share parts: each runs on a
shallow copy of its pipeline (`for_one_call`), with schedulers, guidance and interrupt of its own.
"""

import contextlib
import copy
import dataclasses
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.network import Network, plan_folder
from joyedit.checkpoints.option_spellings import check_saving
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.plain_text import visible
from joyedit.checkpoints.summary import parts
from joyedit.memory import refuse_shrunk
from joyedit.pipelines import together
from joyedit.pipelines.checks import check_step_cache
from joyedit.pipelines.defaults import Unsaid, plain
from joyedit.pipelines.made_for import MadeFor
from joyedit.pipelines.pipeline_spellings import PipelineSpellings, move
from joyedit.pipelines.placement import Placed, check_offload
from joyedit.schedulers.scheduler import Scheduler

log = logging.getLogger("joyedit")

Part = TypeVar("Part", bound=Network)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DENOISERS = ("transformer", "unet")

# What a callback may ask for beside what it may replace: x0 that the step headed for, of the shape of the
# latents, in fp32 at least. It is computed where a callback asks for it, and changes nothing.
DENOISED = "denoised"

# What a running call is told from outside, and tells: under these names, which diffusers documents, too.
STATE_OF_CALLS = frozenset(
    {"_guidance_scale", "_interrupt", "_num_timesteps", "_current_timestep", "_attention_kwargs"}
)

# Over the sets of running calls of all pipelines: one that had a lock of its own could not be pickled.
REGISTERING = threading.Lock()


class Pipeline(Placed, PipelineSpellings):
    """Parts by name, and what users do with all of them at once.

    A subclass lists its parts in `parts`, and assigns each in `__init__`, which checks its class. All but
    schedulers may be None: what needs such a part raises ValueError then, see `require`.
    `reference_quirks`: True reproduces every listed defect of the reference, a collection of names only
    those.
    """

    parts: ClassVar[Mapping[str, tuple[type, ...]]]  # part -> the classes it may have, the default first
    optional_parts: ClassVar[frozenset[str]] = frozenset()  # those that may be None
    relatives: ClassVar[frozenset[str]] = frozenset()  # other pipelines whose folders hold the same parts
    saved_as: ClassVar[Mapping[str, str]] = {}  # class of a network -> its name in saved folders, if another
    auto_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}  # part -> what it gets where no dtype is asked for
    callback_tensors: ClassVar[frozenset[str]] = frozenset()  # what callbacks may ask for
    quirk_names: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, reference_quirks: bool | Sequence[str] = False):
        if isinstance(reference_quirks, str):
            reference_quirks = (reference_quirks,)
        self.quirks = self.quirk_names if reference_quirks is True else frozenset(reference_quirks or ())
        if unknown := self.quirks - self.quirk_names:
            raise ValueError(f"reference_quirks={sorted(unknown)}: known are {sorted(self.quirk_names)}")
        self._made_for: MadeFor | None = None
        self._guidance_scale: Any = 1.0
        self._interrupt = False
        self._num_timesteps = 0
        self._steps_computed = 0
        self._current_timestep: Tensor | None = None
        self._progress: dict[str, Any] = {}

    _outer: "Pipeline | None" = None  # of the copy that a call runs on: whose copy it is
    _calls: "weakref.WeakSet[Pipeline]"  # the copies of this one, while their calls run

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        made = super().__new__(cls)
        vars(made)["_calls"] = weakref.WeakSet()
        return made

    def for_one_call(self) -> Self:
        """What one call runs on, and its callbacks get: a copy with the same parts, but with schedulers and
        progress of its own. A call within a call is interrupted with it. Raises ValueError where a weight
        file has become shorter since it was loaded, or settings exclude each other."""
        if self._outer is None:
            together.check_call(self.in_use())
            refuse_shrunk(self.networks.values())
            vars(self)["_interrupt"] = False  # of an earlier call; those that run have their own
        call = copy.copy(self)
        solvers = {name: part for name, part in self.components.items() if isinstance(part, Scheduler)}
        vars(call).update(copy.deepcopy(solvers), _outer=self)
        with REGISTERING:
            self._calls.add(call)
        vars(call)["_interrupt"] = self._interrupt  # it may have been set since
        return call

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also a pickled one, is a pipeline of which no call runs."""
        return {name: value for name, value in vars(self).items() if name not in ("_outer", "_calls")}

    def __setattr__(self, name: str, value: Any) -> None:
        """What is set on a pipeline that calls run of, if it is about calls, holds for all of these. What a
        call sets, or its callback, but for parts, its pipeline has afterwards. Raises TypeError for a part of
        another class."""
        self.check_part(name, value)
        super().__setattr__(name, value)
        if name in STATE_OF_CALLS:
            with REGISTERING:
                running = list(self._calls)
            for call in running:
                setattr(call, name, value)
        outer = self._outer if name in vars(self) and name not in self.parts else None  # no property
        while outer is not None:
            vars(outer)[name] = value
            outer = outer._outer

    @classmethod
    def check_part(cls, name: str, value: Any) -> None:
        """Raises TypeError when `name` is that of a part, and `value` of another class than it may have."""
        kinds = cls.parts.get(name)
        needed = any(issubclass(kind, Scheduler) for kind in kinds or ()) and name not in cls.optional_parts
        if kinds and not isinstance(value, kinds) and (needed or value is not None):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            advice, home = "", type(value).__module__.partition(".")[0]
            if home in ("diffusers", "transformers"):
                advice = f" of joyedit, not of {home}"
                if hasattr(value, "config") and hasattr(value, "set_timesteps"):
                    advice += f": {kinds[0].__name__}.from_config({name}.config) makes one of it"
            elif hasattr(value, "_orig_mod"):
                advice = "; compile its blocks in place instead: `for block in blocks: block.compile()`"
            raise TypeError(f"{name} is a {type(value).__name__}: {cls.__name__} takes {wanted}{advice}")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        offload: str = "none",
        reference_quirks: bool | Sequence[str] = False,
        **options: Any,
    ) -> Self:
        """Load a Diffusers folder or Hub repository.

        Keyword arguments with the name of a part replace it; the others are those of
        `Network.from_pretrained`.
        Raises FileNotFoundError for missing files, ValueError for files that do not fit, TypeError for
        unknown arguments; all of it before a tensor is read.
        """
        check_offload(offload)
        replacements = {name: options.pop(name) for name in cls.parts if name in options}
        parsed = LoadOptions.parse(options, also=(*cls.parts, "offload", "reference_quirks"))
        pipe = cls.from_origin(
            Origin(str(name_or_path), **parsed.origin), parsed, replacements, reference_quirks
        )
        move(pipe, parsed.device, offload)
        return pipe

    @classmethod
    def from_origin(
        cls,
        origin: Origin,
        options: LoadOptions,
        replacements: Mapping[str, Any],
        quirks: bool | Sequence[str] = False,
    ) -> Self:
        """`from_pretrained` with its arguments sorted. replacements: the parts that are not loaded."""
        options.check_parts(cls.parts)
        for name, part in replacements.items():
            cls.check_part(name, part)
        classes, settings, made_for = {}, {}, MadeFor()
        if set(cls.parts) - set(replacements):
            index = read_json(origin.fetch(["model_index.json"]) / "model_index.json")
            if index.get("_class_name") not in {cls.__name__, *cls.relatives}:
                raise ValueError(
                    f"{origin.name} holds a {visible(index.get('_class_name'))}, not a {cls.__name__}"
                )
            listed = {name: _class_of(cls, name, index) for name in cls.parts if name not in replacements}
            classes = {name: kind for name, kind in listed.items() if kind is not None}
            settings = {key: index[key] for key in cls.settings() if key in index}
            made_for = MadeFor.from_index(index, origin.name)
        stems = {name: kind.weights_stem for name, kind in classes.items() if issubclass(kind, Network)}
        variants = origin.variants(stems, options.variant, options.use_safetensors)
        files: list[str] = []
        for name in classes:
            if name in stems:
                files += origin.network_files(name, stems[name], variants[name], options.use_safetensors)
            else:
                files += origin.small_files(name)
        root = origin.fetch(files)  # all at once: one commit, one total to announce
        loaded, planned = {}, {}
        for name, kind in classes.items():
            if name in stems:
                chosen = options.of_part(name, cls.auto_dtypes.get(name))
                chosen = dataclasses.replace(chosen, variant=variants[name])
                planned[name] = plan_folder(kind, Origin(str(root)), name, chosen)
            else:
                loaded[name] = kind.from_pretrained(root, subfolder=name)
        configs = {name: part.config for name, part in replacements.items() if isinstance(part, Network)}
        cls.check_configs(configs | {name: one.network.config for name, one in planned.items()})
        options.new_parameters.check()
        loaded |= {name: one.opened(options.unread) for name, one in planned.items()}
        for denoiser in (loaded[name] for name in DENOISERS if name in planned):
            denoiser.came_with = {**settings, "made_for": made_for}
        pipe = cls(**loaded, **replacements, **settings, reference_quirks=quirks)
        pipe.made_for = made_for
        return pipe

    @property
    def denoiser(self) -> Network | None:
        networks = self.networks
        return next((networks[name] for name in DENOISERS if name in networks), None)

    def came_with_denoiser(self, name: str) -> Any:
        """A setting of the checkpoint that the denoiser was loaded from. It is about what was trained, and so
        holds for another pipeline that is made of the parts, too. None, where nothing is known."""
        return getattr(self.denoiser, "came_with", {}).get(name)

    @property
    def made_for(self) -> MadeFor:
        """What a small checkpoint says of its use; of others empty."""
        return self._made_for or self.came_with_denoiser("made_for") or MadeFor()

    @made_for.setter
    def made_for(self, made_for: MadeFor) -> None:
        self._made_for = made_for

    @classmethod
    def check_configs(cls, configs: Mapping[str, Any]) -> None:
        """Raises ValueError for networks, by part, that do not fit each other."""

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """Constructor arguments beside the parts that `model_index.json` may carry."""
        return ()

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        metadata: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        """Write a Diffusers folder that opens equal here and in diffusers; `model_index.json` comes last.

        `metadata` goes into the header of every safetensors file. options: safe_serialization=True,
        push_to_hub=False and their like, with no other value.
        """
        check_saving(options, ("max_shard_size", "variant", "metadata"))
        folder = Path(save_directory)
        for name, part in self.components.items():
            if isinstance(part, Network):
                part.save_pretrained(
                    folder / name,
                    max_shard_size=max_shard_size,
                    variant=variant,
                    metadata=metadata,
                    class_name=self.saved_as.get(type(part).__name__),
                )
            elif part is not None:
                part.save_pretrained(folder / name)
        write_json(folder / self.config_name, self.config_to_save())

    def config_to_save(self) -> dict[str, Any]:
        """What `model_index.json` says."""
        index: dict[str, Any] = {"_class_name": type(self).__name__, **self.listed_parts()}
        index.update(self.settings_to_save())
        if said := self.made_for.to_dict():
            index["made_for"] = said
        return index

    def listed_parts(self) -> dict[str, tuple[str | None, str | None]]:
        """Library and class of each part, as `model_index.json` lists them; None for what is no part."""
        return {
            name: (None, None) if part is None else (part.library, self.saved_as.get(own, own))
            for name, part in self.components.items()
            for own in (type(part).__name__,)
        }

    def settings_to_save(self) -> dict[str, Any]:
        return {}

    @classmethod
    def from_pipe(cls, pipeline: "Pipeline", **changes: Any) -> Self:
        """A pipeline that shares the parts of another and has its settings. changes: constructor arguments to
        take instead, parts or settings.

        The settings (buckets, reference_quirks and so on; what the checkpoint was made for; the progress bar;
        offloading) are those of the other, where this class has them. Raises TypeError for parts that this
        class does not take, or an unknown change.
        """
        settings = {name: getattr(pipeline, name) for name in cls.settings() if hasattr(pipeline, name)}
        settings["reference_quirks"] = sorted(pipeline.quirks & cls.quirk_names)
        parts = {name: part for name, part in pipeline.components.items() if name in cls.parts}
        made = cls(**{**parts, **settings, **changes})
        made.made_for = pipeline.made_for
        made._progress, made._offload_device = pipeline._progress, pipeline._offload_device
        made._graphs, made._room = pipeline._graphs, pipeline._room
        return made

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name. `Pipeline(**other.components)` shares them, and has the settings that they were
        loaded with; what was set since is taken over by `from_pipe`."""
        return {name: getattr(self, name) for name in self.parts}

    def require(self, *names: str) -> None:
        """Raises ValueError unless these parts are there."""
        if missing := [name for name in names if getattr(self, name) is None]:
            parts = " and ".join(missing)
            raise ValueError(f"this needs {parts}, and the pipeline has none: assign pipe.{missing[0]}")

    @property
    def networks(self) -> dict[str, Network]:
        return {name: part for name, part in self.components.items() if isinstance(part, Network)}

    def __repr__(self) -> str:
        """A part a line, and what is set for all of them."""
        adapters = repr(self.adapters) if self.get_list_adapters() else ""
        facts = {"reference_quirks": ", ".join(sorted(self.quirks)), "adapters": adapters}
        facts |= self.placement()
        return parts(type(self).__name__, self.components, facts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the denoiser's weights; where there is none, that of the first network."""
        network = self.denoiser or next(iter(self.networks.values()), None)
        return torch.float32 if network is None else network.dtype

    def enable_vae_slicing(self) -> None:
        """Encode and decode a batch one image at a time."""
        self.components["vae"].enable_slicing()

    def disable_vae_slicing(self) -> None:
        self.components["vae"].disable_slicing()

    def enable_vae_tiling(self, **sizes: int) -> None:
        """Encode and decode in overlapping tiles; the result is close to, not equal to, the untiled one."""
        self.components["vae"].enable_tiling(**sizes)

    def disable_vae_tiling(self) -> None:
        self.components["vae"].disable_tiling()

    def adapters_scaled(self, scale: float | None) -> contextlib.AbstractContextManager[None]:
        """See `Adapters.scaled`; None leaves them alone."""
        return contextlib.nullcontext() if scale is None else self.adapters.scaled(scale)

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Keyword arguments for every progress bar, as tqdm takes them (`disable=True` turns them off)."""
        self._progress = settings

    def progress_bar(self, total: int, description: str = "denoising") -> tqdm:
        settings = {"disable": None, "desc": description, **self._progress}
        if self.mesh is not None and not self.mesh.first:
            settings["disable"] = True
        return tqdm(total=total, **settings)

    @property
    def guidance_scale(self) -> float:
        """That of the running call, or of the last one. A callback may change it: 1 or less ends guidance; a
        call that began without it has no negative prompt to begin it with."""
        return float(self._guidance_scale)

    @guidance_scale.setter
    def guidance_scale(self, value: float) -> None:
        self._guidance_scale = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """How many steps the running call has, or the last one had."""
        return self._num_timesteps

    @property
    def steps_computed(self) -> int:
        """In how many steps of the running call, or of the last one, the denoiser's blocks were computed, for
        all branches of the guidance or for one: all of them without `step_cache`."""
        return self._steps_computed

    def check_step_cache(self, value: Any) -> float | None:
        """The threshold that `step_cache=value` asks for, None where nothing is to be left out. Raises
        ValueError for other values, and for one beside what excludes it."""
        if (threshold := check_step_cache(value)) is not None:
            together.check("step_cache", f"step_cache={value!r}", self.in_use())
        return threshold

    @property
    def current_timestep(self) -> Tensor | None:
        """That of the step that runs; None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set it to True to skip the remaining steps: a callback those of its own call, others those of all
        calls that run. The next call begins without."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    def ends_at(self, step: int, *tensors: Tensor | None) -> bool:
        """Whether the remaining steps are left out, from this one on: on all processes among which the
        denoiser is divided, when one asks for it. Raises ValueError where these are not at the same, as far
        as steps, guidance, the shapes of the tensors and how each sample of the first one begins tell."""
        if (mesh := self.mesh) is None:
            return self.interrupt
        shapes = [None if tensor is None else tuple(tensor.shape) for tensor in tensors]
        drawn = None if step or tensors[0] is None else tensors[0].flatten(1)[:, 0].tolist()
        return mesh.any(self.interrupt, step, self.num_timesteps, self.guidance_scale, shapes, drawn)

    def unless_said(self, **arguments: Any) -> dict[str, Any]:
        """Arguments of a call: what was passed, else what the checkpoint was made for, else the default. A
        negative prompt that is None was not passed."""

        def settle(name: str, value: Any) -> Any:
            left_open = isinstance(value, Unsaid) or (name == "negative_prompt" and value is None)
            return self.made_for.call.get(name, plain(value)) if left_open else value

        return {name: settle(name, value) for name, value in arguments.items()}

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """The words of instructions or captions that a small checkpoint was not trained on; of others none.
        An adapter does not say what it was trained on: with one loaded, no word is known to be unknown."""
        if self.made_for.world is None or self.adapters.get_list_adapters():
            return []
        learned = self.learned_words()
        return [word for word in self.made_for.world.unknown(texts) if word.lower() not in learned]

    def learned_words(self) -> set[str]:
        """Words that were added to the vocabulary, in small letters and as `made_for.words_of` reads them."""
        return set()

    def call_back(
        self,
        callback: Callable | None,
        names: Sequence[str],
        step: int,
        timestep: Tensor,
        tensors: dict[str, Tensor | None],
    ) -> dict[str, Any]:
        """Run a step callback; the tensors it asked for, replaced by those it returned. `denoised` is there
        to look at: nothing that a step begins with."""
        if callback is None:
            return tensors
        returned = callback(self, step, timestep, {name: tensors[name] for name in names})
        if returned is None:
            return tensors
        if unknown := set(returned) - set(tensors):
            raise ValueError(
                f"the callback returned {sorted(unknown)}; only {sorted(set(tensors) - {DENOISED})} can be "
                "replaced"
            )
        for name, tensor in returned.items():
            before = tensors[name]
            if tensor is before:  # None as well, where a run has no such tensor
                continue
            if name == DENOISED:
                raise ValueError(f"the callback returned another {DENOISED}: that is computed at every step")
            if tensor is None or before is None:
                raise ValueError(f"the callback returned a {name} in place of none, or none in place of one")
            if tensor.shape != before.shape:
                shapes = f"{tuple(tensor.shape)}, wanted {tuple(before.shape)}"
                raise ValueError(f"the callback returned {name} of shape {shapes}")
        return {**tensors, **returned}

    def check_callback(self, callback: Callable | None, names: Sequence[str]) -> Sequence[str]:
        """The tensor names that a callback gets. Raises ValueError for one that cannot be had, TypeError for
        what cannot be called."""
        if callback is not None and not callable(callback):
            raise TypeError(f"callback_on_step_end is a {type(callback).__name__}, which cannot be called")
        names = (names,) if isinstance(names, str) else names
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        if unknown := set(names or ()) - self.callback_tensors:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs={sorted(unknown)}: only "
                f"{sorted(self.callback_tensors)} exist"
            )
        return tuple(names or ())


class PipelineCallback:
    """A step callback with its own list of tensors; subclasses define `tensor_inputs` and `callback_fn`.

    `cutoff_step_ratio` (0 to 1) or `cutoff_step_index` tells `callback_fn` when to act.
    """

    def __init__(self, cutoff_step_ratio: float | None = 1.0, cutoff_step_index: int | None = None):
        if (cutoff_step_ratio is None) == (cutoff_step_index is None):
            raise ValueError(
                "give exactly one of cutoff_step_ratio and cutoff_step_index; the other must be None"
            )
        if cutoff_step_ratio is not None and not 0.0 <= cutoff_step_ratio <= 1.0:
            raise ValueError(f"cutoff_step_ratio={cutoff_step_ratio}: must be in [0, 1]")
        self.cutoff_step_ratio = cutoff_step_ratio
        self.cutoff_step_index = cutoff_step_index

    @property
    def tensor_inputs(self) -> list[str]:
        raise NotImplementedError(f"{type(self).__name__} must define tensor_inputs")

    def callback_fn(
        self, pipeline: Pipeline, step_index: int, timestep: Tensor, callback_kwargs: dict
    ) -> dict:
        raise NotImplementedError(f"{type(self).__name__} must define callback_fn")

    def __call__(self, pipeline: Pipeline, step_index: int, timestep: Tensor, callback_kwargs: dict) -> dict:
        return self.callback_fn(pipeline, step_index, timestep, callback_kwargs)


class MultiPipelineCallbacks:
    """Several `PipelineCallback`s, one after the other."""

    def __init__(self, callbacks: Sequence[PipelineCallback]):
        self.callbacks = list(callbacks)

    @property
    def tensor_inputs(self) -> list[str]:
        return [name for callback in self.callbacks for name in callback.tensor_inputs]

    def __call__(self, pipeline: Pipeline, step_index: int, timestep: Tensor, callback_kwargs: dict) -> dict:
        for callback in self.callbacks:
            callback_kwargs = callback(pipeline, step_index, timestep, callback_kwargs)
        return callback_kwargs


def is_called(kind: type, class_name: str) -> bool:
    """Whether `model_index.json` may mean this class by that name."""
    own = {kind.__name__, f"{kind.__name__}Fast"}
    return class_name in own or class_name in getattr(kind, "relatives", ())


def _class_of(cls: type[Pipeline], name: str, index: Mapping[str, Any]) -> type | None:
    kinds = cls.parts[name]
    entry = index.get(name)
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or entry[1] is None:
        if name in cls.optional_parts:
            return None
        raise ValueError(f"model_index.json lists no {name!r}: pass {name}= to {cls.__name__}")
    for kind in kinds:
        if is_called(kind, entry[1]):
            return kind
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(
        f"model_index.json: {name} is a {visible(entry[1])}; {cls.__name__} takes {wanted}. For a class of "
        f"your own, pass {name}= with an object of it"
    )
