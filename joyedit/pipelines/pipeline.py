"""What every pipeline has: its parts, loading and saving them, where they run, progress, and callbacks.

A pipeline names its parts and the classes they may have; a Diffusers folder holds one subfolder per part and
a `model_index.json` that lists them. The algorithm itself is in the pipeline's own file.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.network import Network, plan_folder
from joyedit.checkpoints.option_spellings import check_saving
from joyedit.checkpoints.options import LoadOptions
from joyedit.memory import BlockStreaming
from joyedit.pipelines.made_for import MadeFor
from joyedit.pipelines.pipeline_spellings import PipelineSpellings, move

log = logging.getLogger("joyedit")

Part = TypeVar("Part", bound=Network)


class Pipeline(PipelineSpellings):
    """Parts by name, and what users do with all of them at once.

    A subclass lists its parts in `parts`, and assigns each in `__init__`, which checks its class.
    `reference_quirks`: True reproduces every listed defect of the reference, a collection of names only
    those. `made_for`: what a small checkpoint says of its use; of others empty.
    """

    parts: ClassVar[Mapping[str, tuple[type, ...]]]  # part -> the classes it may have, the default first
    optional_parts: ClassVar[frozenset[str]] = frozenset()  # those that may be None
    relatives: ClassVar[frozenset[str]] = frozenset()  # other pipelines whose folders hold the same parts
    auto_dtypes: ClassVar[Mapping[str, torch.dtype]] = {}  # part -> what it gets where no dtype is asked for
    callback_tensors: ClassVar[frozenset[str]] = frozenset()  # what callbacks may ask for
    quirk_names: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, reference_quirks: bool | Sequence[str] = False):
        if isinstance(reference_quirks, str):
            reference_quirks = (reference_quirks,)
        self.quirks = self.quirk_names if reference_quirks is True else frozenset(reference_quirks or ())
        if unknown := self.quirks - self.quirk_names:
            raise ValueError(f"reference_quirks={sorted(unknown)}: known are {sorted(self.quirk_names)}")
        self.made_for = MadeFor()
        self._interrupt = False
        self._progress: dict[str, Any] = {}
        self._offload_device: torch.device | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises TypeError for a part of another class."""
        self.check_part(name, value)
        super().__setattr__(name, value)

    @classmethod
    def check_part(cls, name: str, value: Any) -> None:
        """Raises TypeError when `name` is that of a part, and `value` of another class than it may have."""
        kinds = cls.parts.get(name)
        if kinds and not isinstance(value, kinds) and not (value is None and name in cls.optional_parts):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            advice = ""
            if hasattr(value, "_orig_mod"):
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
                raise ValueError(f"{origin.name} holds a {index.get('_class_name')}, not a {cls.__name__}")
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
        loaded |= {name: one.read() for name, one in planned.items()}
        pipe = cls(**loaded, **replacements, **settings, reference_quirks=quirks)
        pipe.made_for = made_for
        return pipe

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
                    folder / name, max_shard_size=max_shard_size, variant=variant, metadata=metadata
                )
            elif part is not None:
                part.save_pretrained(folder / name)
        write_json(folder / self.config_name, self.config_to_save())

    def config_to_save(self) -> dict[str, Any]:
        """What `model_index.json` says."""
        index: dict[str, Any] = {"_class_name": type(self).__name__}
        for name, part in self.components.items():
            index[name] = [None, None] if part is None else [part.library, type(part).__name__]
        index.update(self.settings_to_save())
        if said := self.made_for.to_dict():
            index["made_for"] = said
        return index

    def settings_to_save(self) -> dict[str, Any]:
        return {}

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name; `Pipeline(**other.components)` shares them."""
        return {name: getattr(self, name) for name in self.parts}

    @property
    def networks(self) -> dict[str, Network]:
        return {name: part for name, part in self.components.items() if isinstance(part, Network)}

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes."""
        return self._offload_device or next(iter(self.networks.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the denoiser's weights."""
        return self.networks["transformer" if "transformer" in self.networks else "unet"].dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the networks to a device, a dtype, or both, as `torch.nn.Module.to`.

        Raises ValueError while the pipeline is offloaded.
        """
        if self._offload_device is not None:
            raise ValueError("the pipeline is offloaded: call disable_offload() before moving it")
        for network in self.networks.values():
            network.to(*args, **kwargs)
        return self

    def set_offload(self, offload: str, device: torch.device | str | None = None) -> None:
        """ "none", "model" (one network on the device at a time) or "sequential" (one block at a time)."""
        check_offload(offload)
        self.disable_offload()
        if offload == "none":
            return
        accelerator = torch.device(device) if device is not None else accelerator_device()
        if accelerator is None:
            log.info("offload=%r has no effect without an accelerator", offload)
            return
        self._offload_device = accelerator
        for network in self.networks.values():
            network.to("cpu")
            if offload == "sequential":
                BlockStreaming.attach(network, accelerator)

    def disable_offload(self) -> None:
        """Keep the networks in main memory from now on, until they are moved."""
        self._offload_device = None
        for network in self.networks.values():
            BlockStreaming.detach(network)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the networks in main memory and bring one at a time to the accelerator."""
        self.set_offload("model", device if device is not None else gpu_device(gpu_id))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the networks in main memory and bring one block at a time to the accelerator: least memory,
        slowest."""
        self.set_offload("sequential", device if device is not None else gpu_device(gpu_id))

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

    @contextlib.contextmanager
    def on_device(self, network: Part) -> Iterator[Part]:
        """The network, on the device that computes while the block runs."""
        if self._offload_device is None or BlockStreaming.is_attached(network):
            yield network
            return
        try:
            network.to(self._offload_device)
            yield network
        finally:
            network.to("cpu")

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Keyword arguments for every progress bar, as tqdm takes them (`disable=True` turns them off)."""
        self._progress = settings

    def progress_bar(self, total: int, description: str = "denoising") -> tqdm:
        return tqdm(total=total, **{"disable": None, "desc": description, **self._progress})

    @property
    def interrupt(self) -> bool:
        """Set to True, from a callback say, to skip the remaining steps."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    def call_back(
        self,
        callback: Callable | None,
        names: Sequence[str],
        step: int,
        timestep: Tensor,
        tensors: dict[str, Tensor | None],
    ) -> dict[str, Any]:
        """Run a step callback; the tensors it asked for, replaced by those it returned."""
        if callback is None:
            return tensors
        returned = callback(self, step, timestep, {name: tensors[name] for name in names})
        if returned is None:
            return tensors
        if unknown := set(returned) - set(tensors):
            raise ValueError(
                f"the callback returned {sorted(unknown)}; only {sorted(tensors)} can be replaced"
            )
        for name, tensor in returned.items():
            before = tensors[name]
            if tensor is before:  # None as well, where a run has no such tensor
                continue
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


def check_offload(offload: str) -> None:
    if offload not in ("none", "model", "sequential"):
        raise ValueError(f"offload={offload!r}: must be 'none', 'model' or 'sequential'")


def accelerator_device() -> torch.device | None:
    """The first CUDA or ROCm device, else Apple's, else none."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else None


def gpu_device(gpu_id: int | None) -> torch.device | None:
    device = accelerator_device()
    return device if device is None or gpu_id is None else torch.device(device.type, gpu_id)


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
        f"model_index.json: {name} is a {entry[1]}; {cls.__name__} takes {wanted}. For a class of your own, "
        f"pass {name}= with an object of it"
    )
