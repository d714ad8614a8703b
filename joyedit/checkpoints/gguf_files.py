"""GGUF files: opened and dequantised by the package `gguf`, the format's own reader.

Weights come out as floating point: GGUF's forms are many, and none is kept in memory here. Tensors of more
axes than GGUF has, and those whose rows are no whole number of blocks, are stored in another shape; the true
one is noted beside them by ComfyUI-GGUF's converter.

Source: ggml-org/ggml docs/gguf.md; city96/ComfyUI-GGUF tools/convert.py.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from joyedit.checkpoints.plain_text import visible
from joyedit.checkpoints.safetensors_files import check_name, check_shape
from joyedit.checkpoints.stored_tensors import PIECE, FromFile, StoredTensor, fill, opened, row_major

TRUE_SHAPE = "comfy.gguf.orig_shape."
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_gguf(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Any]]:
    """(name, shape, dtype, function that reads it) of each tensor; what is quantised is said to be bf16, and
    read in fp32. Raises ValueError for a damaged file, or a type that the package cannot read, ImportError
    without the package."""
    gguf = _package()
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # a damaged file makes it raise half a dozen types
        raise ValueError(f"{path} is no readable GGUF file: {visible(error, 120)}") from None
    if reader.byte_order == "S":
        raise ValueError(f"{path} is a GGUF file of another byte order, which is not read here")
    readable: dict[Any, bool] = {}
    for tensor in reader.tensors:
        name, kind = check_name(path, tensor.name), tensor.tensor_type
        if kind not in readable:
            readable[kind] = kind.name in PLAIN or _can_read(gguf, kind)
        if not readable[kind]:
            raise ValueError(f"{path}: {name} is of the type {kind.name}, which is not read here")
        shape = tuple(int(axis) for axis in reversed(tensor.shape))
        noted = reader.get_field(TRUE_SHAPE + name)
        if noted is not None:
            shape = check_shape(noted.contents())
        if math.prod(shape) != tensor.n_elements:
            raise ValueError(f"{path}: {name} has {tensor.n_elements} numbers, and they do not fill {shape}")
        start, dtype = int(tensor.data_offset), PLAIN.get(kind.name, torch.bfloat16)
        if kind.name in PLAIN:
            read: Any = FromFile(StoredTensor(path, start, dtype, shape, row_major(shape)), None)
        else:
            read = _Packed(gguf, path, start, int(tensor.n_bytes), kind, shape)
        yield name, shape, dtype, read


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ImportError("GGUF files are read by the package gguf: pip install joyedit[gguf]") from None
    return gguf


def _can_read(gguf: Any, kind: Any) -> bool:
    """Whether the package dequantises a block of that type."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    try:
        gguf.dequantize(torch.zeros(1, size, dtype=torch.uint8, device="cpu").numpy(), kind)
    except NotImplementedError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class _Packed:
    """Reads a tensor that is stored in blocks of a type of GGUF, in fp32. start, nbytes: of the file."""

    gguf: Any
    path: Path
    start: int
    nbytes: int
    kind: Any
    shape: tuple[int, ...]

    def __call__(self, once: bool = False) -> Tensor:
        result, done = torch.empty(math.prod(self.shape), dtype=torch.float32, device="cpu"), 0
        for piece in self.pieces():
            result[done : done + len(piece)] = piece
            done += len(piece)
        return result.view(self.shape)

    def pieces(self) -> Iterator[Tensor]:
        block = self.gguf.GGML_QUANT_SIZES[self.kind][1]  # bytes
        count = max(PIECE // block, 1) * block
        content = torch.empty(min(count, self.nbytes), dtype=torch.uint8, device="cpu")
        with opened(self.path, self.start) as file:
            for done in range(0, self.nbytes, count):
                blocks = content[: self.nbytes - done]
                fill(file, blocks)
                numbers = self.gguf.dequantize(blocks.view(-1, block).numpy(), self.kind)
                yield torch.from_numpy(numbers).flatten()
