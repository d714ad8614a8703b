"""Writing weight files tensor by tensor: each is asked for when its turn comes, and leaves memory when it is
written.

The names, shapes and dtypes of all are known before, so that a file begins with what it will hold: one that
breaks off is shorter than its header says, or lacks the list of records at its end, and does not open.

Source: huggingface/safetensors, the format in its README.md; torch `serialization.py`, whose reader opens the
pickles.
"""

import io
import json
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from joyedit.checkpoints.pickles import STORAGES as PICKLED
from joyedit.checkpoints.safetensors_files import DTYPES
from joyedit.checkpoints.stored_tensors import row_major

SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
STORAGES = {dtype: getattr(torch, name) for name, dtype in PICKLED.items()}
ALIGNMENT = 64  # of the storages in a pickle, as torch has it


class Tensors(Protocol):
    """What is to be written: TensorFiles, which this must not know."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def dtypes(self) -> Mapping[str, torch.dtype]: ...
    def nbytes_of(self, name: str) -> int: ...
    def pieces(self, name: str) -> Iterator[Tensor]: ...


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Raises ValueError for a tensor that is not what was said of it, and whatever reading it raises."""
    # Numbers of many bytes first, so that all begin at a multiple of their size.
    names = sorted(tensors.shapes, key=lambda name: (-tensors.dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + tensors.nbytes_of(name)
        kind, shape = SAFETENSORS_NAMES[tensors.dtypes[name]], list(tensors.shapes[name])
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            for content in _contents(tensors, name):
                file.write(content)


def write_pickle(path: Path, tensors: Tensors) -> None:
    """The state dict as `torch.save` writes it. Errors as of `write_safetensors`."""
    top = path.stem
    names = list(tensors.shapes)
    program = io.BytesIO()
    _Pickler(program).dump(OrderedDict((name, _Stored(key, tensors, name)) for key, name in enumerate(names)))
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:

        def record(name: str, contents: Iterable[Any]) -> None:
            entry = zipfile.ZipInfo(f"{top}/{name}")
            # The content begins behind 30 bytes, the name, 20 of long lengths, 4 of the padding and itself.
            begin = file.tell() + 30 + len(entry.filename.encode()) + 20 + 4
            padding = -begin % ALIGNMENT
            entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(entry, "w", force_zip64=True) as opened:
                for content in contents:
                    opened.write(content)

        record("data.pkl", [program.getvalue()])
        record("byteorder", [sys.byteorder.encode()])
        for key, name in enumerate(names):
            record(f"data/{key}", _contents(tensors, name))
        record("version", [b"3\n"])


def _contents(tensors: Tensors, name: str) -> Iterator[memoryview]:
    """The bytes of a tensor."""
    dtype, count = tensors.dtypes[name], 0
    for piece in tensors.pieces(name):
        count += piece.nbytes
        if piece.dtype != dtype or count > tensors.nbytes_of(name):
            break
        yield piece.cpu().contiguous().view(torch.uint8).numpy().data
    else:
        if count == tensors.nbytes_of(name):
            return
    raise ValueError(f"{name} is not of the size and dtype that were planned for it")


class _Stored:
    """Stands for a tensor in a pickle: torch's reader makes it of the storage with that number."""

    def __init__(self, key: int, tensors: Tensors, name: str):
        self.key, self.dtype, self.shape = str(key), tensors.dtypes[name], tensors.shapes[name]

    def __reduce__(self) -> tuple[Any, ...]:
        strides = row_major(self.shape)
        return _rebuild_tensor_v2, (
            _Storage(self),
            0,
            self.shape,
            strides,
            False,
            OrderedDict(),
        )


class _Storage:
    def __init__(self, tensor: _Stored):
        self.tensor = tensor


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            tensor = obj.tensor
            numel = torch.Size(tensor.shape).numel()
            return "storage", STORAGES[tensor.dtype], tensor.key, "cpu", numel
        return None
