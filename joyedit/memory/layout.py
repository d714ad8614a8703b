"""Tensors side by side in one row of bytes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; where a tensor begins, within these, may decide how products are summed on a CPU


class Place(NamedTuple):
    """Where a tensor lies in a row of bytes: from `start`, with the stride that it has."""

    start: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, row: Tensor) -> Tensor:
        """The tensor there. row: bytes, the first one at a multiple of ALIGNMENT."""
        return row[self.start : self.start + self.nbytes].view(self.dtype).as_strided(self.shape, self.stride)


def laid_out(tensors: Sequence[Tensor]) -> tuple[list[Place], int]:
    """Places of dense tensors in one row of bytes, each as far into a line of ALIGNMENT bytes as it is now;
    and the length of the row."""
    places, end = [], 0
    for tensor in tensors:
        start = end + (tensor.data_ptr() - end) % ALIGNMENT
        places.append(Place(start, tensor.nbytes, tensor.dtype, tensor.shape, tensor.stride()))
        end = start + tensor.nbytes
    return places, -(-end // ALIGNMENT) * ALIGNMENT
