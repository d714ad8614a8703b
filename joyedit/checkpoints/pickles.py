"""PyTorch's pickles, followed step by step before torch opens them.

A pickle is a program for a stack machine. torch's own reader with `weights_only=True` runs no foreign code,
but a program of a hundred bytes may still ask it for a bytearray, a tensor or a storage of gigabytes. Here
the program is followed first, with stand-ins for whatever it makes: only the instructions, classes and
functions that state dicts need are known, and every storage and tensor must lie within what the file holds.

Forms: a zip archive of data.pkl and one record for each storage (torch 1.6 and later), whose storages are
then mapped; five pickles in a row and the storages' bytes after them (before), which cannot be mapped: each
tensor is read when it is asked for.

Source: torch `serialization.py`, `_weights_only_unpickler.py`; CPython `pickletools.py`.
"""

import functools
import io
import math
import pickletools
import sys
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from joyedit.checkpoints.mapped_files import IS_LINUX, MappedFile
from joyedit.checkpoints.plain_text import shown, visible
from joyedit.checkpoints.safetensors_files import check_name, check_shape
from joyedit.checkpoints.stored_tensors import FromFile, StoredTensor

LONGEST_READ = 2**24  # bytes of a pickle, of a list of records; of SD 1.5 they are 260 thousand
MOST_INSTRUCTIONS = 2_000_000  # of SD 1.5: 46 thousand

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how the older form begins

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {
    name: getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}
REBUILD = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
ORDERED_DICT = "collections.OrderedDict"
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"
SETS = {"__builtin__.set", "builtins.set"}  # in the attributes of a ParameterDict
SMALL = {"torch.Size", "torch.device", "_codecs.encode"}  # of what they are given they make as much

# Checkpoints that Lightning wrote, Stable Diffusion's among them, name this class; an empty one stands in.
CALLBACK = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
CALLBACK_NAME = f"{CALLBACK.__module__}.{CALLBACK.__name__}"

KNOWN = {
    *(f"torch.{name}" for name in (*STORAGES, *DTYPES)),
    *("torch.storage.UntypedStorage", REBUILD_PARAMETER, ORDERED_DICT, CALLBACK_NAME),
    *REBUILD,
    *SETS,
    *SMALL,
}
# What other functions and classes in a file say of it.
STRANGE = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without numbers",
    "torch.ComplexFloatStorage": "complex numbers",
    "torch.ComplexDoubleStorage": "complex numbers",
    "torch.ComplexHalfStorage": "complex numbers",
    "torch.QInt8Storage": "a quantised tensor",
    "torch.QUInt8Storage": "a quantised tensor",
}


def load_pickle(path: Path, parameter_dicts: bool = False) -> Any:
    """What a PyTorch file holds, mapped where its form allows. parameter_dicts: it may be a ParameterDict.

    Raises ValueError for damage, and for whatever is no tensor, number or text, or a container of them;
    nothing of the file's size or larger is allocated before.
    """
    contents = _follow(path, {PARAMETER_DICT} if parameter_dicts else set())
    classes = [CALLBACK, nn.ParameterDict] if parameter_dicts else [CALLBACK]
    return _load(path, contents.can_be_mapped, classes)


def _load(path: Path, mapped: bool, classes: list[type]) -> Any:
    try:
        with torch.serialization.safe_globals(classes):  # pyright: ignore[reportArgumentType]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # torch raises half a dozen types for damage, with advice that is not ours
        raise ValueError(f"{path} is not a readable PyTorch file ({type(error).__name__})") from error


class _Damage(Exception):
    """Why a file is not opened."""


@dataclass(frozen=True)
class _Contents:
    """A file that was followed. value: its object, made of stand-ins. starts: storage -> its first byte."""

    can_be_mapped: bool
    value: Any
    starts: Mapping[str, int]


def _follow(path: Path, also: Collection[str]) -> _Contents:
    """Follow all pickles of a file. Raises ValueError for damage."""
    try:
        with path.open("rb") as file:
            bounded = _Bounded(file)
            if file.read(4) == b"PK\x03\x04":
                return _check_zip(bounded, also)
            file.seek(0)
            if not file.read(1):
                raise _Damage("it is empty")
            file.seek(0)
            return _check_row(bounded, path.stat().st_size, also)
    except _Damage as damage:
        raise ValueError(f"{path} cannot be opened as weights only: {damage}") from None


class _Bounded(io.RawIOBase):
    """A file of which no single piece is so large that it is a danger."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.tell, self.seek = file.tell, file.seek  # type: ignore[assignment]

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(min(size, LONGEST_READ + 1) if size >= 0 else LONGEST_READ + 1)
        if len(piece) > LONGEST_READ:
            raise _Damage(f"one piece of it has more than {LONGEST_READ:,} bytes")
        return piece

    def readline(self, size: int | None = -1) -> bytes:
        return self._file.readline(LONGEST_READ)


def _check_zip(file: _Bounded, also: Collection[str]) -> _Contents:
    try:
        with zipfile.ZipFile(file) as archive:  # type: ignore[arg-type]
            entries = archive.infolist()
            names = {entry.filename.lower() for entry in entries}
            if len(names) < len(entries) or archive.comment:
                raise _Damage("two of its records have one name")
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
                    raise _Damage(f"its record {visible(entry.filename, 60)!r} is compressed")
            top = entries[0].filename.partition("/")[0] if entries else ""
            if f"{top}/constants.pkl" in names or f"{top}/code/" in names:
                raise _Damage("it is a TorchScript archive")
            if f"{top}/data.pkl" not in archive.NameToInfo:
                raise _Damage("it is a zip archive without data.pkl")
            if archive.getinfo(f"{top}/data.pkl").file_size > LONGEST_READ:
                raise _Damage(f"its data.pkl has more than {LONGEST_READ:,} bytes")
            program = archive.read(f"{top}/data.pkl")
            if f"{top}/byteorder" in archive.NameToInfo:
                order = archive.read(f"{top}/byteorder").decode("latin-1")
                if order != sys.byteorder:
                    raise _Damage(f"its numbers have the byte order {visible(order, 20)!r}")
            starts = {entry.filename: _first_byte(file, entry) for entry in entries}
    except _Damage:
        raise
    except Exception as error:  # zipfile raises half a dozen types for damage
        raise _Damage(f"it is no whole zip archive ({type(error).__name__})") from None
    prefix = f"{top}/data/"
    records = {e.filename.removeprefix(prefix): e.file_size for e in entries if e.filename.startswith(prefix)}
    machine = _Machine(KNOWN | set(also))
    value = machine.follow(io.BytesIO(program))
    for key, size in machine.storages.items():
        if size > records.get(key, -1):
            raise _Damage(f"its storage {visible(key, 60)!r} is larger than its record")
    return _Contents(True, value, {key: starts[prefix + key] for key in machine.storages})


def _first_byte(file: _Bounded, entry: zipfile.ZipInfo) -> int:
    """Where a record's content begins: behind a header of its own, with lengths that the directory lacks."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise _Damage(f"its record {visible(entry.filename, 60)!r} has no header")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return entry.header_offset + 30 + lengths


def _check_row(file: _Bounded, size: int, also: Collection[str]) -> _Contents:
    """The older form: a number, a version, a description of the system, the object, names of storages."""
    known = KNOWN | set(also)
    first = [_Machine(known).follow(file) for _ in range(3)]
    if first[:2] != [MAGIC, PROTOCOL]:
        raise _Damage("it does not begin as a PyTorch file")
    machine = _Machine(known)
    value = machine.follow(file)
    names = _Machine(known).follow(file)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Damage("its list of storages is none")
    if sorted(names) != sorted(machine.storages):
        raise _Damage("its list of storages is not that of its tensors")
    starts, end = {}, file.tell()
    for name in names:  # before each storage stands its number of elements, in eight bytes
        starts[name] = end + 8
        end = starts[name] + machine.storages[name]
    if end > size:
        raise _Damage(f"it was cut off: {size} bytes, its tensors need {end}")
    return _Contents(False, value, starts)


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True, eq=False)
class _Made:
    """What a known class or function would return."""

    name: str


@dataclass(frozen=True, eq=False)
class _Tensor(_Made):
    """offset: of its first element in the storage, in elements."""

    storage: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Machine:
    """Follows one pickle. `storages`: key -> bytes."""

    def __init__(self, known: Collection[str]):
        self.known = known
        self.storages: dict[str, int] = {}
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def follow(self, file: Any) -> Any:
        """The object of the pickle, made of stand-ins. Raises _Damage."""
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if count > MOST_INSTRUCTIONS:
                    raise _Damage(f"its pickle has more than {MOST_INSTRUCTIONS:,} instructions")
                if opcode.name == "STOP":
                    return self.stack.pop()
                self.step(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            raise _Damage(f"its pickle is damaged ({type(error).__name__})") from None
        raise _Damage("its pickle does not end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO":
                if argument != 2:
                    raise _Damage(f"its pickle has protocol {argument}, PyTorch writes 2")
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise IndexError
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self.pop_mark()
                target = self.stack[-1]
                if type(target) is not list:
                    raise TypeError
                target.extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self.pop_mark()
                self.set_items(self.stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(self.find(argument.replace(" ", ".")))
            case "BINPERSID":
                stack.append(self.storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(arguments, tuple) or not isinstance(function, _Global):
                    raise TypeError
                stack.append(self.call(function.name, arguments))
            case "NEWOBJ":
                arguments, made = stack.pop(), stack.pop()
                if not isinstance(made, _Global) or made.name != PARAMETER_DICT or arguments != ():
                    raise _Damage("it makes an object of a class that state dicts do not have")
                stack.append(_Made(made.name))
            case "BUILD":
                state, made = stack.pop(), stack[-1]
                if isinstance(made, _Made) and made.name == PARAMETER_DICT:
                    return
                if type(made) is not dict or type(state) is not dict or set(state) - {"_metadata"}:
                    raise _Damage("it sets attributes that state dicts do not have")
            case _:
                raise _Damage(f"its pickle has the instruction {name}, which PyTorch does not write")

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    @staticmethod
    def set_items(target: Any, items: list[Any]) -> None:
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, bool, type(None), _Global)):
                raise _Damage(f"a {type(key).__name__} is a key in it")
            target[key] = value

    def find(self, name: str) -> _Global:
        if name in STRANGE:
            raise _Damage(f"it holds {STRANGE[name]}, which is not supported")
        if name not in self.known:
            raise _Damage(f"it asks for {visible(name, 80)!r}, which no weights need")
        return _Global(name)

    def storage(self, described: Any) -> _Storage:
        """The storage of a persistent id: ("storage", class, key, device, number of elements)."""
        if not isinstance(described, tuple) or len(described) not in (5, 6) or described[0] != "storage":
            raise _Damage("it refers to what is no storage")
        _, kind, key, _, numel, *views = described
        if not isinstance(kind, _Global) or not isinstance(key, str) or views not in ([], [None]):
            raise _Damage("it refers to what is no storage")
        module, _, name = kind.name.rpartition(".")
        dtype = torch.uint8 if name == "UntypedStorage" else STORAGES.get(name)
        if dtype is None or module not in ("torch", "torch.storage"):
            raise _Damage(f"it has a storage of {visible(kind.name, 80)!r}")
        if type(numel) is not int or not 0 <= numel < 2**48:
            raise _Damage(f"its storage {visible(key, 60)!r} is said to have {shown(numel, 40)} elements")
        nbytes = numel * dtype.itemsize
        if self.storages.setdefault(key, nbytes) != nbytes:
            raise _Damage(f"its storage {visible(key, 60)!r} has two sizes")
        return _Storage(key, dtype, numel)

    def call(self, name: str, arguments: tuple) -> Any:
        """What a known function makes of these arguments. Raises _Damage for any that it should not get."""
        if name == ORDERED_DICT:
            made: dict[Any, Any] = {}
            for pair in arguments[0] if arguments else ():
                self.set_items(made, list(pair))
            return made
        if name in REBUILD:
            of_v3 = name.endswith("_v3")
            if any(arguments[7 if of_v3 else 6 :]):  # torch notes there what its bytes alone do not say
                raise _Damage("a tensor in it is stored negated or conjugated")
            return self.tensor(name, *arguments[:4], kind=arguments[6] if of_v3 else None)
        if name == REBUILD_PARAMETER and isinstance(arguments[0], _Made) and arguments[0].name in REBUILD:
            return replace(arguments[0], name=REBUILD_PARAMETER)
        if name in SETS and all(isinstance(one, list) and self.is_small(tuple(one)) for one in arguments):
            return _Made(name)
        if name in SMALL and all(self.is_small(one) for one in arguments):
            return _Made(name)
        raise _Damage(f"it calls {visible(name, 80)!r} with other arguments than PyTorch does")

    @staticmethod
    def is_small(value: Any) -> bool:
        values = value if isinstance(value, tuple) else (value,)
        return all(isinstance(one, (str, int)) for one in values)

    @staticmethod
    def tensor(name: str, storage: Any, offset: Any, size: Any, stride: Any, kind: Any) -> _Tensor:
        if not isinstance(storage, _Storage):
            raise _Damage("it has a tensor without a storage")
        try:
            shape, strides = check_shape(size), check_shape(stride)
        except ValueError as error:
            raise _Damage(f"a tensor in it has the {error}") from None
        dtype = storage.dtype
        if kind is not None:
            if not isinstance(kind, _Global) or kind.name.removeprefix("torch.") not in DTYPES:
                raise _Damage("a tensor in it has no known dtype")
            dtype = DTYPES[kind.name.removeprefix("torch.")]
        held = storage.numel * storage.dtype.itemsize // dtype.itemsize
        if type(offset) is not int or offset < 0 or len(shape) != len(strides):
            raise _Damage(f"a tensor in it of shape {shape} has a wrong offset or stride")
        numel = math.prod(shape)
        last = offset + sum((axis - 1) * step for axis, step in zip(shape, strides, strict=True))
        if numel > held or (numel and last >= held):
            raise _Damage(f"a tensor in it of shape {shape} is larger than its storage of {held} elements")
        return _Tensor(name, storage.key, dtype, offset, shape, strides)


def open_pickle(
    path: Path, numbers: dict[str, float]
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, FromFile]]:
    """(name, shape, dtype, function that reads it) of each tensor; the numbers that a training program notes
    beside them go into `numbers`. Raises ValueError as `load_pickle`."""
    contents = _follow(path, ())
    stored = _stored(path, contents, numbers)
    if contents.can_be_mapped and IS_LINUX:
        file = MappedFile(path)
        mapped = {name: functools.partial(file.tensor, place) for name, place in stored.items()}
    else:
        whole = _inner(_load(path, True, [CALLBACK]), {}) if contents.can_be_mapped else {}
        mapped = {name: tensor.detach for name, tensor in whole.items()}
    for name, place in stored.items():
        yield name, place.shape, place.dtype, FromFile(place, mapped.get(name))


def _stored(path: Path, contents: _Contents, numbers: dict[str, float]) -> dict[str, StoredTensor]:
    state = _inner(contents.value, numbers)
    if not isinstance(state, Mapping) or not all(isinstance(value, _Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors)")
    stored = {}
    for key, one in state.items():
        start = contents.starts[one.storage] + one.offset * one.dtype.itemsize
        stored[check_name(path, key)] = StoredTensor(path, start, one.dtype, one.shape, one.strides)
    return stored


def _inner(state: Any, numbers: dict[str, float]) -> Any:
    """The state dict in what training programs write around it."""
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            beside = {key: value for key, value in state.items() if isinstance(key, str)}
            numbers.update({key: value for key, value in beside.items() if isinstance(value, (int, float))})
            state = state[wrapper]
    return state
