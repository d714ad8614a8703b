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
from collections.abc import Mapping
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
    def read_once(self, name: str) -> Tensor: ...


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
            file.write(_content(tensors, name))


def write_pickle(path: Path, tensors: Tensors) -> None:
    """The state dict as `torch.save` writes it. Errors as of `write_safetensors`."""
    top = path.stem
    names = list(tensors.shapes)
    program = io.BytesIO()
    _Pickler(program).dump(OrderedDict((name, _Stored(key, tensors, name)) for key, name in enumerate(names)))
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:

        def record(name: str, content: Any) -> None:
            entry = zipfile.ZipInfo(f"{top}/{name}")
            # The content begins behind 30 bytes, the name, 20 of long lengths, 4 of the padding and itself.
            begin = file.tell() + 30 + len(entry.filename.encode()) + 20 + 4
            padding = -begin % ALIGNMENT
            entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            entry.file_size = len(content)
            with archive.open(entry, "w", force_zip64=True) as opened:
                opened.write(content)

        record("data.pkl", program.getvalue())
        record("byteorder", sys.byteorder.encode())
        for key, name in enumerate(names):
            record(f"data/{key}", _content(tensors, name))
        record("version", b"3\n")


def _content(tensors: Tensors, name: str) -> memoryview:
    """The bytes of a tensor."""
    tensor = tensors.read_once(name).detach().cpu().contiguous()
    if tuple(tensor.shape) != tensors.shapes[name] or tensor.dtype != tensors.dtypes[name]:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} of {tensor.dtype}, and not as was planned "
            f"{tensors.shapes[name]} of {tensors.dtypes[name]}"
        )
    return tensor.reshape(-1).view(torch.uint8).numpy().data


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
