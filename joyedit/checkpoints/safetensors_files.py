"""safetensors files: the header, checked before anything is made of it.

A file is eight bytes (the length of the header), the header (JSON: name -> dtype, shape, data_offsets, and
optionally "__metadata__", names to texts), and the data. What the header promises is compared with the size
of the file, so that no shape in it is larger than what is there.

Source: huggingface/safetensors, the format in its README.md.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from joyedit.checkpoints.json_files import parse_json
from joyedit.checkpoints.mapped_files import IS_LINUX, MappedFile
from joyedit.checkpoints.plain_text import shown, visible
from joyedit.checkpoints.stored_tensors import FromFile, StoredTensor, row_major

LARGEST_HEADER = 2**24  # bytes; published networks have 300 thousand, adapters up to 5 million
MOST_TENSORS = 50_000
LONGEST_NAME = 500
MOST_AXES = 16
LARGEST_EXTENT = 2**48  # product of the axes, those of length 0 left out

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# Dtypes of no tensor here -> what a file that has them is.
STRANGE = {
    "C64": "complex numbers",
    "F4": "numbers of 4 bits (nvfp4 or mxfp4)",
    "F8_E8M0": "scales of blocks (mxfp4 or mxfp8)",
}


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header, its entries checked: {name: {"dtype": str, "shape": [int], "data_offsets": [int, int]}},
    and "__metadata__": {str: str} where there is any.

    Raises ValueError when the file is truncated, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is not a safetensors file, or was cut off ({size} bytes)")
        if length > LARGEST_HEADER:
            raise ValueError(
                f"{path} is not a safetensors file that is read here: its header has {length:,} bytes, more "
                f"than {LARGEST_HEADER:,}"
            )
        raw = file.read(length)
    try:
        header = parse_json(raw.decode("utf-8"), "the header")
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path} is not a safetensors file: its header is unreadable ({error})") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header lists no tensors")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{path}: __metadata__ of its header must hold texts by name, not {shown(metadata)}")
    if len(header) > MOST_TENSORS:
        raise ValueError(f"{path} lists {len(header):,} tensors, more than {MOST_TENSORS:,}")
    places = sorted((*_check_entry(path, name, entry), name) for name, entry in header.items())
    end = max((end for _, end, _ in places), default=0)
    if 8 + length + end != size:
        raise ValueError(
            f"{path} was cut off or damaged: {size} bytes, its header promises {8 + length + end}"
        )
    for (_, before, _), (begin, _, name) in itertools.pairwise([(0, 0, ""), *places]):
        if begin != before:
            raise ValueError(
                f"{path} is not a valid safetensors file: tensor {name!r} begins at {begin}, the one before "
                f"it ends at {before}"
            )
    return {**header, "__metadata__": metadata} if metadata else header


def check_name(path: Path, name: Any) -> str:
    """A tensor's name. Raises ValueError for what is no text, or no name: it goes into messages."""
    if not isinstance(name, str):
        raise ValueError(f"{path}: the tensor's name {shown(name)} is no text")
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise ValueError(
            f"{path}: the tensor's name {visible(name, 60)!r} is too long or holds control characters"
        )
    return name


def check_shape(shape: Any) -> tuple[int, ...]:
    """Axes as a tuple. Raises ValueError for other than a few integers of at least 0."""
    if not isinstance(shape, (list, tuple)) or len(shape) > MOST_AXES:
        raise ValueError(f"shape {shown(shape)} is no list of at most {MOST_AXES} integers")
    if not all(type(axis) is int and axis >= 0 for axis in shape):
        raise ValueError(f"shape {shown(list(shape))} holds what is no length of an axis")
    if math.prod(max(axis, 1) for axis in shape) > LARGEST_EXTENT:
        raise ValueError(f"shape {shown(list(shape))} is larger than any file")
    return tuple(shape)


def _check_entry(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where its data begin and end. Raises ValueError for an entry that is none, or contradicts itself."""
    check_name(path, name)
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path} is not a safetensors file: {name!r} in its header lists no tensors")
    try:
        shape = check_shape(entry["shape"])
    except ValueError as error:
        raise ValueError(f"{path}: tensor {name!r}: {error}") from None
    kind, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        held = STRANGE.get(kind) if isinstance(kind, str) else None
        of = f" ({held})" if held else ""
        raise ValueError(f"{path}: tensor {name!r} has dtype {shown(kind, 20)}{of}, which is not supported")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int and 0 <= offset <= LARGEST_EXTENT for offset in offsets)
    ):
        raise ValueError(f"{path}: tensor {name!r}: data_offsets {shown(offsets)} are no two positions")
    wanted = math.prod(shape) * DTYPES[kind].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {shape} has {wanted} bytes, its data_offsets {offsets} "
            f"{offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1]


def open_safetensors(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, FromFile]]:
    """(name, shape, dtype, function that reads it) of each tensor. Raises ValueError as above."""
    header = safetensors_header(path)
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")

    @functools.cache
    def opened() -> Any:
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a valid safetensors file: {visible(error)}") from None

    def mapped(name: str) -> Tensor:
        return opened().get_tensor(name)

    file = MappedFile(path)
    for name, entry in header.items():
        if name != "__metadata__":
            shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
            stored = StoredTensor(path, data + entry["data_offsets"][0], dtype, shape, row_major(shape))
            read = functools.partial(file.tensor, stored) if IS_LINUX else functools.partial(mapped, name)
            yield name, shape, dtype, FromFile(stored, read)


def metadata_json(path: Path, key: str) -> dict[str, Any]:
    """A JSON object that a program noted in the header; {} where there is none. Raises ValueError for other
    than an object."""
    text = safetensors_header(path).get("__metadata__", {}).get(key)
    if not text:
        return {}
    value = parse_json(text, f"{path}: {key} in its header")
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} in its header holds a {type(value).__name__}, not a JSON object")
    return value
