"""The base class of the networks, and how one is filled from files.

A network is built on the meta device, its files are opened (headers only), the key table of its layout is
planned against the names and shapes it wants, and only then are tensors read, one by one: a file that does
not fit is refused before memory is taken, and the peak is the result plus one tensor.

Source: the Diffusers and transformers folder formats.
"""

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from joyedit.checkpoints.bounds import MOST_TENSORS, as_value_errors, most_tensors
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.hub import Origin, choose_weight_files
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.network_spellings import NetworkSpellings, local_file, tensors_of_one
from joyedit.checkpoints.new_parameters import NewParameters, WithoutInit, initial_values, without_numbers
from joyedit.checkpoints.option_spellings import check_saving
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.quantised_files import keep_stored, plain_tensors, read_forms
from joyedit.checkpoints.shard_index import shards_of
from joyedit.checkpoints.stored_dtypes import FP8, refuse_integers, widened
from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.convert.table import DoesNotFitError, Layout, Plan, plan_conversion
from joyedit.quantised import QuantisedLinear, is_stored

HALF = (torch.float16, torch.bfloat16)

# fp32 files of a network larger than this load as bf16 when no dtype is asked for.
AUTO_BF16_BYTES = 4 * 10**9


class Network(NetworkSpellings):
    """A network with a config, whose parameter names are those of the Diffusers checkpoint."""

    Config: ClassVar[type[Config]]
    table: ClassVar[str]  # module of joyedit.convert that knows the layouts of this network
    weights_stem: ClassVar[str] = "diffusion_pytorch_model"  # transformers networks use "model"
    library: ClassVar[str] = "diffusers"  # under which model_index.json lists it
    # Path components whose parameters stay fp32 in half precision, and of those that `to` leaves in memory.
    fp32_modules: ClassVar[frozenset[str]] = frozenset()
    mapped_modules: ClassVar[frozenset[str]] = frozenset()
    # Module lists whose members may be computed once more for a gradient, instead of being kept.
    recomputed_lists: ClassVar[frozenset[str]] = frozenset()

    # The weights of a network that was opened unread, to be written elsewhere: it computes nothing.
    unread: TensorFiles | None = None

    # The files whose bytes are its weights, or were when it was read, as `os.stat` had them then.
    mapped_files: Mapping[Path, os.stat_result] = MappingProxyType({})

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | Path | None = None, **changes: Any) -> Self:
        """Build with fresh weights from a config mapping, a config.json, or the folder that holds one."""
        if isinstance(config, (str, Path)):
            path = Path(config)
            config = read_json(path / "config.json" if path.is_dir() else path)
        made = config if isinstance(config, cls.Config) else cls.Config.from_dict(config or {})
        return cls(made.replace(**changes) if changes else made)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, subfolder: str | None = None, **options: Any
    ) -> Self:
        """Load from a Diffusers folder or Hub repository.

        Options: dtype (or torch_dtype), variant, use_safetensors, revision, token, cache_dir,
        local_files_only, force_download; device_map: the one device that it goes to; new_parameters: patterns
        of names ("*.temperature") that the files need not hold, and that keep the value that `__init__` gives
        them. Raises FileNotFoundError when files are missing, ValueError when they do not fit, or a pattern
        names nothing that they lack.
        """
        parsed = LoadOptions.parse(options)
        _check_one_dtype(parsed)
        origin = Origin(str(name_or_path), **parsed.origin)
        planned = plan_folder(cls, origin, subfolder or "", parsed)
        parsed.new_parameters.check()
        return planned.read_to(parsed.device)

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        config: Mapping[str, Any] | str | Path | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> Self:
        """Load from one weight file in any layout of this network, or from that of a whole model.

        config: settings, or the folder, file or Hub name (with `subfolder`) of them; None takes the
        config.json beside the file, or else the released ones. Options and errors as in `from_pretrained`.
        """
        parsed = LoadOptions.parse(options, also=("config", "subfolder"))
        _check_one_dtype(parsed)
        path = local_file(path)
        if config is None:
            beside = path.with_name("config.json")
            config = read_json(beside) if beside.is_file() else {}
        elif not isinstance(config, Mapping):
            config = cls.load_config(config, subfolder=subfolder, **parsed.origin)
        made = config if isinstance(config, cls.Config) else cls.Config.from_dict(config)
        files = tensors_of_one(TensorFiles([path]), cls.table)
        planned = plan_network(cls, made, files, parsed.dtype, parsed.new_parameters)
        parsed.new_parameters.check()
        return planned.read_to(parsed.device)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        metadata: Mapping[str, str] | None = None,
        class_name: str | None = None,
        **options: Any,
    ) -> None:
        """Write config.json and safetensors (in shards when larger than `max_shard_size`) that open equal
        here and in diffusers or transformers; weights that are quantised, as what they mean in the network's
        dtype. class_name: what config.json calls it; None, its class.
        options: safe_serialization=True, push_to_hub=False and their like, with no other value."""
        check_saving(options, ("max_shard_size", "variant", "metadata", "class_name"))
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.tensors().spelled(self.layouts()[0])
        save_tensors(folder, self.weights_stem, tensors, max_shard_size, variant, metadata)
        named = {} if class_name is None else {"_class_name": class_name}
        write_json(folder / "config.json", {**self.config_to_save(), **named})

    def tensors(self) -> TensorFiles:
        """The weights by name, from memory or, of a network that was opened unread, each from its file. Those
        that are quantised are rebuilt when they are read, in the dtype that the network computes in."""
        return plain_tensors(self, self.unread or TensorFiles.of(self.state_dict()))

    def read_beside(self, folder: Path) -> None:
        """Takes what the files beside config.json say, where a network knows such files. Raises ValueError
        for what they cannot mean."""

    def config_to_save(self) -> dict[str, Any]:
        return {"_class_name": type(self).__name__, **self.config.to_dict()}

    def layouts(self) -> Sequence[Layout]:
        return importlib.import_module(f"joyedit.convert.{self.table}").layouts(self.config)

    @classmethod
    def stays_fp32(cls, name: str) -> bool:
        """Whether the parameter `name` keeps fp32 when the network is held in half precision."""
        return not cls.fp32_modules.isdisjoint(name.split("."))

    @classmethod
    def stays_behind(cls, name: str) -> bool:
        """Whether the parameter `name` is left in main memory, or mapped from its file, by `to`."""
        return not cls.mapped_modules.isdisjoint(name.split("."))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weights are held and used: those that always stay fp32 left aside, and those
        that are quantised, which have that of what they mean."""
        parameters = ((n, p) for n, p in self.named_parameters() if not self.stays_fp32(n))
        return next((p.dtype for n, p in parameters if not is_stored(n, p)), torch.float32)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore
        ranks = {torch.channels_last: 4, torch.channels_last_3d: 5}  # what a memory format is a word about
        names = {}
        for name, parameter in self.named_parameters():
            names[id(parameter)] = names[id(parameter.grad)] = name

        for path, layer in self.named_modules():
            if isinstance(layer, QuantisedLinear) and dtype is not None:
                layer.dtype = _allowed(type(self), path, dtype)

        def move(t: Tensor) -> Tensor:
            name = names.get(id(t), "")
            kind = None if dtype is None or is_stored(name, t) else _allowed(type(self), name, dtype)
            return t.to(
                t.device if self.stays_behind(name) else device,
                kind if t.is_floating_point() else None,
                non_blocking,
                memory_format=layout if ranks.get(layout) == t.ndim else torch.preserve_format,
            )

        return self._apply(move)

    def half(self) -> Self:
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        return self.to(torch.float32)


def open_weights(
    folder: Path, stem: str, variant: str | None = None, use_safetensors: bool | None = None
) -> TensorFiles:
    """Open the weight files of one network in a Diffusers or transformers folder."""
    name = choose_weight_files(
        (p.name for p in folder.iterdir()), stem, variant, use_safetensors, str(folder)
    )[0]
    if not name.endswith(".json"):
        return TensorFiles([folder / name])
    return TensorFiles([folder / shard for shard in shards_of(folder / name)])


@dataclasses.dataclass(frozen=True)
class PlannedNetwork:
    """A network that its files are known to fit, before its tensors are read: `network` is on meta.

    new: names that the files lack and need not hold.
    """

    network: Network
    files: TensorFiles
    plan: Plan
    dtypes: Mapping[str, torch.dtype]
    new: Sequence[str] = ()

    def opened(self, unread: bool) -> Any:
        """The network, filled or `unread`. This or `read` is to be called once."""
        if not unread:
            return self.read()
        held = TensorFiles.made(self.plan.steps, self.files, self.dtypes)
        self.network.unread = held.replaced(TensorFiles.of(self._initial()).entries())
        return self.network.requires_grad_(False).eval()

    def _initial(self) -> dict[str, Tensor]:
        """What the files lack and need not hold."""
        if not self.new:
            return {}
        cls, config = type(self.network), self.network.config
        values = initial_values(lambda: cls(config), self.new)
        return {name: value.to(self.dtypes[name]) for name, value in values.items()}

    def read(self) -> Any:
        """The network, filled. To be called once."""
        if any(self.files.is_mapped(source) for step in self.plan.steps.values() for source in step.sources):
            self.network.mapped_files = {path: path.stat() for path in self.files.files}
        state = dict(read_planned(self.plan, self.files, self.dtypes)) | self._initial()
        self.network.load_state_dict(state, strict=True, assign=True)
        left = [name for name, tensor in self.network.state_dict().items() if tensor.is_meta]
        if left:
            raise ValueError(f"{self.files}: nothing was loaded for {left}")
        return self.network.requires_grad_(False).eval()

    def read_to(self, device: torch.device | None) -> Any:
        """`read`, and moved to the device if one is given."""
        network = self.read()
        return network if device is None else network.to(device)


def _check_one_dtype(options: LoadOptions) -> None:
    if options.dtypes:
        raise ValueError(f"torch_dtype names the parts {sorted(options.dtypes)}: a network takes one dtype")


def plan_folder(cls: type[Network], origin: Origin, subfolder: str, options: LoadOptions) -> PlannedNetwork:
    """Open one network of a folder of a local or Hub checkpoint. Errors as in `from_pretrained`, but for
    patterns that name nothing, see `NewParameters.check`."""
    folder = origin.fetch_network(subfolder, cls.weights_stem, options.variant, options.use_safetensors)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{config_path} is missing: {folder} is not the folder of a {cls.__name__}")
    try:
        config = cls.Config.from_dict(read_json(config_path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_path}: {error}") from None
    files = open_weights(folder, cls.weights_stem, options.variant, options.use_safetensors)
    planned = plan_network(cls, config, files, options.dtype, options.new_parameters)
    planned.network.read_beside(folder)
    return planned


def plan_network(
    cls: type[Network],
    config: Config,
    files: TensorFiles,
    dtype: torch.dtype | None = None,
    new_parameters: NewParameters | None = None,
) -> PlannedNetwork:
    """Build `cls` on the meta device and find out how `files`, in whatever layout, fill it.

    dtype None keeps what is stored, except that fp32 files above 4 GB become bf16; parameters that a network
    declares as fp32 stay so. Weights of linear layers that are quantised stay as they are stored, and the
    network computes in `dtype`, None: in that of the other weights, or bf16 where they have several.
    Raises ValueError with the two-sided key difference when the files do not fit.
    """
    patterns, stored = new_parameters or NewParameters(), files
    try:
        files, forms = read_forms(stored)
        network = build_on_meta(cls, config, most_tensors(len(files)))
    except ValueError as error:
        raise ValueError(f"{files}: {error}") from None
    tensors = network.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        plan = plan_conversion(network.layouts(), files.shapes, wanted, set(patterns.among(wanted)))
        refuse_integers({n: s.sources for n, s in plan.steps.items()}, files.dtypes, tensors)
    except ValueError as error:
        advice = _advice(error) if isinstance(error, DoesNotFitError) else ""
        raise ValueError(f"{files}: not the weights of this {cls.__name__}: {error}{advice}") from None
    new = [name for name in tensors if name not in plan.steps]
    patterns.note(cls.__name__, plan.steps, new)
    dtypes = target_dtypes(cls, plan, files, dtype or _dtype_beside(files, forms))
    others = next((kind for name, kind in dtypes.items() if not cls.stays_fp32(name)), torch.float32)
    for name in new:
        floats = tensors[name].is_floating_point()
        dtypes[name] = _allowed(cls, name, others) if floats else tensors[name].dtype
    kept = keep_stored(network, plan, stored, forms, dtypes)
    if kept:
        files = files.replaced(stored.entries([source for step in kept.values() for source in step.sources]))
        plan = dataclasses.replace(plan, steps={**plan.steps, **kept})
    return PlannedNetwork(network, files, plan, dtypes, new)


def _dtype_beside(files: TensorFiles, quantised: Container[str]) -> torch.dtype | None:
    """In what a network with quantised weights computes, unless it is told: None is as stored."""
    is_gguf = any(path.suffix == ".gguf" for path in files.files)
    kinds = {files.dtypes[name] for name in files if name not in quantised}
    kinds = {kind for kind in kinds if kind.is_floating_point}
    if kinds == {torch.float32} or not (quantised or is_gguf):
        return None
    if is_gguf:
        kinds.discard(torch.float32)  # in which norms and biases are there, whatever the rest is in
    return kinds.pop() if len(kinds) == 1 else torch.bfloat16


def _advice(error: DoesNotFitError) -> str:
    """How to load files that lack something and have nothing else in its place."""
    if error.unexpected or not error.missing:
        return ""
    patterns = without_numbers(error.missing)[:4]
    return f"; for parameters that your code adds to the published ones, pass new_parameters={patterns!r}"


def load_network(
    cls: type[Network],
    config: Config,
    files: TensorFiles,
    dtype: torch.dtype | None = None,
    new_parameters: Sequence[str] = (),
) -> Any:
    """`plan_network`, read. new_parameters: as in `from_pretrained`."""
    patterns = NewParameters(new_parameters)
    planned = plan_network(cls, config, files, dtype, patterns)
    patterns.check()
    return planned.read()


def build_on_meta(cls: type[Network], config: Config, most: int = MOST_TENSORS) -> Any:
    """A network of the right names and shapes that takes no memory. Nothing is initialised.

    Raises ValueError for settings that do not fit one another, and for a network of more than `most` tensors.
    """
    unfit = as_value_errors(f"{type(config).__name__}: the settings do not fit one another")
    with unfit, torch.device("meta"), WithoutInit(), _AtMost(type(config).__name__, most):
        return cls(config)


class _AtMost(TorchFunctionMode):
    """Counts the tensors that are made, and stops a network that does not end."""

    def __init__(self, settings: str, most: int):
        super().__init__()
        self.settings, self.left, self.most = settings, most, most

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.empty, torch.ones, torch.zeros, torch.randn):
            self.left -= 1
            if self.left < 0:
                raise ValueError(f"{self.settings} is of a network of more than {self.most} tensors")
        return func(*args, **(kwargs or {}))


def target_dtypes(
    cls: type[Network], plan: Plan, files: TensorFiles, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype that each parameter gets."""
    if dtype is None and files.nbytes() > AUTO_BF16_BYTES:
        floats = {d for d in files.dtypes.values() if d.is_floating_point}
        dtype = torch.bfloat16 if floats == {torch.float32} else None
    if dtype is None and not FP8.isdisjoint(files.dtypes.values()):
        dtype = torch.bfloat16  # all of it: what is not in fp8 is often in another half precision
    dtypes = {}
    for name, step in plan.steps.items():
        dtypes[name] = _allowed(cls, name, dtype or files.dtypes[step.sources[0]])
    return dtypes


def _allowed(cls: type[Network], name: str, wanted: torch.dtype) -> torch.dtype:
    """The dtype of a parameter in a network that is held in `wanted`."""
    return torch.float32 if wanted in HALF and cls.stays_fp32(name) else wanted


_PUT_AWAY: ContextVar[Callable[[Tensor], Tensor]] = ContextVar("put_away", default=lambda tensor: tensor)


@contextlib.contextmanager
def putting_away(put_away: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the block runs, tensors that are read and are no view of a file are what `put_away` makes of
    them."""
    token = _PUT_AWAY.set(put_away)
    try:
        yield
    finally:
        _PUT_AWAY.reset(token)


def read_planned(
    plan: Plan, files: TensorFiles, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) one by one. A tensor that needs no change stays a view of the mapped file; of a
    file nothing else stays in memory."""
    put_away = _PUT_AWAY.get()
    for name, step in plan.steps.items():
        if all(files.dtypes[source] == dtypes[name] for source in step.sources):
            read = {source: files[source] for source in step.sources}
            tensor = step.read(read).to(dtypes[name])  # GGUF's are said to be bf16, and read in fp32
            mapped = [tensor for source, tensor in read.items() if files.is_mapped(source)]
            places = {tensor.untyped_storage().data_ptr() for tensor in mapped}
            yield name, tensor if tensor.untyped_storage().data_ptr() in places else put_away(tensor)
        elif step.is_renaming:
            yield name, put_away(files.cast(step.sources[0], dtypes[name]))
        else:
            read = {source: widened(files.read_once(source)) for source in step.sources}
            yield name, put_away(step.read(read).to(dtypes[name]))
