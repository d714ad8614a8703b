"""Configs, weight files, and the base class of the networks.

A network is built on the meta device, its files are opened (headers only), the key table of its layout is
planned against the names and shapes it wants, and only then are tensors read, one by one: a file that does
not fit is refused before memory is taken, and the peak is the result plus one tensor.

Source: the Diffusers and transformers folder formats; safetensors.
"""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import json
import logging
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from joyedit.convert.table import Layout, Plan, plan_conversion
from joyedit.hub import Origin, choose_weight_files, shards_of

log = logging.getLogger("joyedit")

HALF = (torch.float16, torch.bfloat16)
# fp32 files of a network larger than this load as bf16 when no dtype is asked for.
AUTO_BF16_BYTES = 4 * 10**9


class Config(Mapping):
    """Immutable settings of a network or scheduler, readable as attribute, item and dict.

    Subclasses are frozen dataclasses whose fields are the keys of the published JSON file and whose defaults
    are the released checkpoint's.
    """

    aliases: ClassVar[Mapping[str, str]] = {}  # older spelling -> field
    ignored: ClassVar[frozenset[str]] = frozenset()  # keys of old files that never changed the computation
    supported: ClassVar[Mapping[str, tuple]] = {}  # field -> the only values that this code computes
    keeps_unknown: ClassVar[bool] = False  # whether keys without a field are kept for the round trip

    _extra = types.MappingProxyType({})

    def __post_init__(self):
        for name, allowed in self.supported.items():
            if self[name] not in allowed:
                wanted = " or ".join(repr(value) for value in allowed)
                raise ValueError(
                    f"{type(self).__name__}: {name}={self[name]!r} is not supported, only {wanted}"
                )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a published JSON mapping. Raises ValueError for a key that no field knows."""
        hints = typing.get_type_hints(cls)
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values, extra = {}, {}
        for key, value in raw.items():
            name = cls.aliases.get(key, key)
            if name in known:
                hint = hints[name]
                if isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, Mapping):
                    value = value if isinstance(value, Config) else hint.from_dict(value)
                values[name] = _freeze(value)
                if not _fits(values[name], hint):
                    kind = _spelled(hint)
                    raise ValueError(
                        f"{cls.__name__}: {key}={value!r} is not supported: must be of type {kind}"
                    )
            elif cls.keeps_unknown:
                extra[key] = value
            elif not key.startswith("_") and key not in cls.ignored:
                raise ValueError(
                    f"{cls.__name__} has no {key!r}{_nearest(key, known)}; known: {sorted(known)}"
                )
        config = cls(**values)
        object.__setattr__(config, "_extra", types.MappingProxyType(extra))
        return config

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed. Raises ValueError for a name that is not a key of this config."""
        for key in changes:
            if key not in self:
                raise ValueError(
                    f"{type(self).__name__} has no {key!r}{_nearest(key, self)}; known: {sorted(self)}"
                )
        return type(self).from_dict({**self, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain lists and dicts."""
        return {key: _thaw(value) for key, value in self.items()}

    def __getitem__(self, key: str) -> Any:
        if key in self._extra:
            return self._extra[key]
        if key in self.__dataclass_fields__:  # type: ignore[attr-defined]
            return getattr(self, key)
        raise KeyError(key)

    def __reduce__(self):  # for copy.deepcopy and pickle, which the read-only view of the extra keys refuses
        return type(self).from_dict, (self.to_dict(),)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._extra[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; known: {sorted(self)}") from None

    def __iter__(self) -> Iterator[str]:
        yield from (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        yield from self._extra

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; an integer is a float too, a bool is no number."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, option) for option in typing.get_args(hint))
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, tuple) or not items:
            return isinstance(value, tuple)
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        return len(items) == len(value) and all(map(_fits, value, items))
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(origin, type) or isinstance(value, origin)


def _spelled(hint: Any) -> str:
    return hint.__name__.replace("NoneType", "None") if isinstance(hint, type) else str(hint)


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_thaw(item) for item in value]
    return value


def _nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


class Network(nn.Module):
    """A network with a config, whose parameter names are those of the Diffusers checkpoint."""

    Config: ClassVar[type[Config]]
    table: ClassVar[str]  # module of joyedit.convert that knows the layouts of this network
    weights_stem: ClassVar[str] = "diffusion_pytorch_model"  # transformers networks use "model"
    library: ClassVar[str] = "diffusers"  # under which model_index.json lists it
    # Path components whose parameters stay fp32 in half precision, and of those that `to` leaves in memory.
    fp32_modules: ClassVar[frozenset[str]] = frozenset()
    mapped_modules: ClassVar[frozenset[str]] = frozenset()

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
        local_files_only, force_download. Raises FileNotFoundError when files are missing, ValueError when
        they do not fit.
        """
        parsed = LoadOptions.parse(options)
        origin = Origin(str(name_or_path), **parsed.origin)
        return plan_folder(cls, origin, subfolder or "", parsed).read()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Write config.json and safetensors (in shards when larger than `max_shard_size`) that open equal
        here and in diffusers or transformers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        inverse = self.layouts()[0].invert(self.state_dict())
        save_tensors(folder, self.weights_stem, inverse, max_shard_size, variant, metadata)
        write_json(folder / "config.json", self.config_to_save())

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
        """The dtype of the weights, those that always stay fp32 left aside."""
        return next((p.dtype for n, p in self.named_parameters() if not self.stays_fp32(n)), torch.float32)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore
        ranks = {torch.channels_last: 4, torch.channels_last_3d: 5}  # what a memory format is a word about
        names = {}
        for name, parameter in self.named_parameters():
            names[id(parameter)] = names[id(parameter.grad)] = name

        def move(t: Tensor) -> Tensor:
            name = names.get(id(t), "")
            kind = torch.float32 if dtype in HALF and self.stays_fp32(name) else dtype
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


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """What `from_pretrained` and `joyedit.load` accept beside the parts."""

    dtype: torch.dtype | None = None  # None: as stored, except large fp32 networks, which become bf16
    variant: str | None = None
    use_safetensors: bool | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    ORIGIN: ClassVar[tuple[str, ...]] = (
        "revision",
        "token",
        "cache_dir",
        "local_files_only",
        "force_download",
    )
    DTYPES: ClassVar[tuple[str, ...]] = ("dtype", "torch_dtype", "mindspore_dtype")
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (
        "low_cpu_mem_usage",
        "requires_safety_checker",
        "resume_download",
    )

    @classmethod
    def parse(cls, given: Mapping[str, Any], also: Iterable[str] = ()) -> Self:
        """Read keyword arguments. `also`: names that the caller takes itself, for the message.

        Raises TypeError for an unknown name, ValueError for two different dtypes.
        """
        accepted = {*cls.ORIGIN, *cls.DTYPES, *cls.WITHOUT_EFFECT, "variant", "use_safetensors"}
        for name in given:
            if name not in accepted:
                known = accepted | set(also)
                raise TypeError(
                    f"unknown argument {name!r}{_nearest(name, known)}; accepted: {sorted(known)}"
                )
            if name in cls.WITHOUT_EFFECT:
                log.info("%s has no effect here", name)
        dtypes = {name: parse_dtype(given[name]) for name in cls.DTYPES if name in given}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"two different dtypes were given: {dtypes}")
        return cls(
            dtype=next(iter(dtypes.values()), None),
            variant=given.get("variant"),
            use_safetensors=given.get("use_safetensors"),
            origin={name: given[name] for name in cls.ORIGIN if name in given},
        )


def parse_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from itself or its name ("bf16", "float32", ...); None and "auto" mean as stored."""
    names = {
        **dict.fromkeys(("fp32", "float32", "float"), torch.float32),
        **dict.fromkeys(("fp16", "float16", "half"), torch.float16),
        **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    }
    if value is None or value == "auto":
        return None
    found = names.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if found not in set(names.values()):
        raise ValueError(f"dtype={value!r}: must be float32, float16, bfloat16 or 'auto'")
    return found


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of one or several weight files by name, read when asked for.

    safetensors files are mapped, pickles are opened with `weights_only=True` and mapped where their format
    allows. `numbers` are what a training program notes in a pickle beside the tensors ("global_step", ...).
    """

    def __init__(self, files: Sequence[Path], prefix: str = ""):
        self.files = list(files)
        self.numbers: dict[str, float] = {}
        self._where: dict[str, Any] = {}  # name -> function that reads it
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for path in self.files:
            is_pickle = path.suffix != ".safetensors"
            opened = _open_pickle(path, self.numbers) if is_pickle else _open_safetensors(path)
            for key, shape, dtype, read in opened:
                name = key.removeprefix(prefix)
                if name in self._where:
                    raise ValueError(
                        f"{path}: tensor {name!r} is in two of the files {[f.name for f in self.files]}"
                    )
                self._where[name], self._shapes[name], self._dtypes[name] = read, shape, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name]()

    def read_once(self, name: str) -> Tensor:
        """A tensor that is about to be copied. What was read of a safetensors file leaves memory with it; of
        a pickle it stays until the system takes it back."""
        return self._where[name](once=True)

    def __contains__(self, name: object) -> bool:  # Mapping would read the tensor
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __str__(self) -> str:
        return ", ".join(str(path) for path in self.files)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return self._dtypes

    def renamed(self, names: Mapping[str, str]) -> "TensorFiles":
        """Some of these tensors under other names (new name -> name here). Nothing is read."""
        view = TensorFiles([])
        view.files, view.numbers = self.files, self.numbers
        for new, name in names.items():
            view._where[new], view._shapes[new] = self._where[name], self._shapes[name]
            view._dtypes[new] = self._dtypes[name]
        return view

    def nbytes(self) -> int:
        return sum(torch.Size(s).numel() * self._dtypes[n].itemsize for n, s in self._shapes.items())


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises ValueError when the file is truncated or not one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size, 100_000_000):
            raise ValueError(f"{path} is not a safetensors file, or was cut off ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{path} is not a safetensors file: its header is unreadable") from None
    try:
        end = max(
            (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0
        )
    except (AttributeError, KeyError, TypeError, IndexError):
        raise ValueError(f"{path} is not a safetensors file: its header lists no tensors") from None
    if 8 + length + end != size:
        raise ValueError(
            f"{path} was cut off or damaged: {size} bytes, its header promises {8 + length + end}"
        )
    return header


def _open_safetensors(path: Path):
    header = safetensors_header(path)
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from None

    def read(key: str, once: bool = False) -> Tensor:
        # Pages of a mapping count as memory in use for as long as it lives: a copied tensor gets its own.
        return (safe_open(path, framework="pt") if once else opened).get_tensor(key)

    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: tensor {key!r} has dtype {entry['dtype']}, which is not supported")
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        yield key, tuple(entry["shape"]), dtype, functools.partial(read, key)


# Checkpoints that Lightning wrote, Stable Diffusion's among them, name this class; an empty one stands in.
_CALLBACK = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def _unpickle(path: Path, mmap: bool) -> Any:
    with torch.serialization.safe_globals([_CALLBACK]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _open_pickle(path: Path, numbers: dict[str, float]):
    """The tensors of a pickle; the numbers beside them go into `numbers`."""
    try:
        state = _unpickle(path, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # the legacy format cannot be mapped, everything else is damage
            raise ValueError(f"{path} is not a readable PyTorch file: {error}") from None
        try:
            state = _unpickle(path, mmap=False)
        except Exception as damage:
            raise ValueError(f"{path} cannot be opened as weights only: {damage}") from None
    except Exception as error:  # the unpickler raises half a dozen types, for damage and for code alike
        raise ValueError(f"{path} cannot be opened as weights only: {error}") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            numbers.update({key: value for key, value in state.items() if isinstance(value, (int, float))})
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors)")
    for key, tensor in state.items():
        yield key, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor, once=False: tensor


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
    """A network that its files are known to fit, before its tensors are read: `network` is on meta."""

    network: Network
    files: TensorFiles
    plan: Plan
    dtypes: Mapping[str, torch.dtype]

    def read(self) -> Any:
        """The network, filled. To be called once."""
        state = dict(read_planned(self.plan, self.files, self.dtypes))
        self.network.load_state_dict(state, strict=True, assign=True)
        left = [name for name, tensor in self.network.state_dict().items() if tensor.is_meta]
        if left:
            raise ValueError(f"{self.files}: nothing was loaded for {left}")
        return self.network.requires_grad_(False).eval()


def plan_folder(cls: type[Network], origin: Origin, subfolder: str, options: LoadOptions) -> PlannedNetwork:
    """Open one network of a folder of a local or Hub checkpoint. Errors as in `from_pretrained`."""
    folder = origin.fetch_network(subfolder, cls.weights_stem, options.variant, options.use_safetensors)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{config_path} is missing: {folder} is not the folder of a {cls.__name__}")
    try:
        config = cls.Config.from_dict(read_json(config_path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_path}: {error}") from None
    files = open_weights(folder, cls.weights_stem, options.variant, options.use_safetensors)
    return plan_network(cls, config, files, options.dtype)


def plan_network(
    cls: type[Network], config: Config, files: TensorFiles, dtype: torch.dtype | None = None
) -> PlannedNetwork:
    """Build `cls` on the meta device and find out how `files`, in whatever layout, fill it.

    dtype None keeps what is stored, except that fp32 files above 4 GB become bf16; parameters that a network
    declares as fp32 stay so. Raises ValueError with the two-sided key difference when the files do not fit.
    """
    network = build_on_meta(cls, config)
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        plan = plan_conversion(network.layouts(), files.shapes, wanted)
    except ValueError as error:
        raise ValueError(f"{files}: not the weights of this {cls.__name__}: {error}") from None
    return PlannedNetwork(network, files, plan, target_dtypes(cls, plan, files, dtype))


def load_network(
    cls: type[Network], config: Config, files: TensorFiles, dtype: torch.dtype | None = None
) -> Any:
    """`plan_network`, read."""
    return plan_network(cls, config, files, dtype).read()


def build_on_meta(cls: type[Network], config: Config) -> Any:
    """A network of the right names and shapes that takes no memory. Nothing is initialised."""
    with torch.device("meta"), _WithoutInit():
        return cls(config)


class _WithoutInit(TorchFunctionMode):
    """Skips `torch.nn.init`. On the meta device it does nothing, but `normal_` imports torch._dynamo: a
    second and 120 MB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def target_dtypes(
    cls: type[Network], plan: Plan, files: TensorFiles, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The dtype that each parameter gets."""
    if dtype is None and files.nbytes() > AUTO_BF16_BYTES:
        floats = {d for d in files.dtypes.values() if d.is_floating_point}
        dtype = torch.bfloat16 if floats == {torch.float32} else None
    dtypes = {}
    for name, step in plan.steps.items():
        stored = files.dtypes[step.sources[0]]
        wanted = dtype or stored
        dtypes[name] = torch.float32 if wanted in HALF and cls.stays_fp32(name) else wanted
    return dtypes


def read_planned(
    plan: Plan, files: TensorFiles, dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) one by one. A tensor that needs no change stays a view of the mapped file; of a
    safetensors file nothing else stays in memory."""
    for name, step in plan.steps.items():
        as_stored = all(files.dtypes[source] == dtypes[name] for source in step.sources)
        read = files.__getitem__ if as_stored else files.read_once
        yield name, step.read({source: read(source) for source in step.sources}).to(dtypes[name])


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary name beside `path` and move it into place; nothing is left behind on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
        )


def parse_size(size: int | str) -> int:
    """Bytes from an integer or "5GB", "500MB" (powers of ten)."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(K|M|G)?B", size.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"size {size!r}: write it like '5GB' or '500MB'")
    return int(float(match[1]) * 10 ** {"": 0, "K": 3, "M": 6, "G": 9}[(match[2] or "").upper()])


def save_tensors(
    folder: Path,
    stem: str,
    state: Mapping[str, Tensor],
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict as one safetensors file, or as shards with an index. Shards of an older save with
    other names are removed only after the new ones are in place."""
    limit = parse_size(max_shard_size)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    tag = f".{variant}" if variant else ""
    count = len(shards)
    names = [f"{stem}{tag}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{stem}{tag}.safetensors"]
    index = folder / f"{stem}.safetensors.index{tag}.json"
    with contextlib.ExitStack() as files:  # all are moved into place together, when the last one is written
        for name, shard in zip(names, shards, strict=True):
            tensors = {key: tensor.detach().contiguous() for key, tensor in shard.items()}
            header = {"format": "pt", **(metadata or {})}
            save_file(tensors, files.enter_context(replacing(folder / name)), header)
        if count > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(tensor.nbytes for tensor in state.values())
            content = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
            files.enter_context(replacing(index)).write_text(content + "\n", encoding="utf-8")
    stale = re.compile(re.escape(stem + tag) + r"(-\d{5}-of-\d{5})?\.safetensors")
    for path in folder.iterdir():
        if path.name not in names and stale.fullmatch(path.name) or (count == 1 and path == index):
            path.unlink()
