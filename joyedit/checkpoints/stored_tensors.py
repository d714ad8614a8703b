"""Where a tensor lies in a file, and reading it from there into memory of its own.

A mapped tensor is quicker where it stays as it is. What is only passed through would leave its pages in
memory, and whoever touches a mapped page that the file has lost meanwhile is killed by the system. What is
read here leaves memory with the tensor, and a file that has become shorter is named.
"""

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

PIECE = 2**20  # bytes that are read at once of what need not be whole: the cache of a core holds them


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor's form, and the position of its first element in the file, in bytes."""

    path: Path
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """From the first element to the last, gaps between them included."""
        if 0 in self.shape:
            return 0
        last = sum((axis - 1) * step for axis, step in zip(self.shape, self.strides, strict=True))
        return (last + 1) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Raises ValueError naming the file when it ends before the tensor does, OSError when it cannot be
        read."""
        content = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu")
        with opened(self.path, self.start) as file:
            fill(file, content)
        return content.view(self.dtype).as_strided(self.shape, self.strides)

    def pieces(self) -> Iterator[Tensor]:
        """The numbers one after the other, in flat pieces, each of which is valid until the next one is asked
        for. Errors as of `read`."""
        if self.strides != row_major(self.shape):
            yield self.read().flatten()
            return
        content = torch.empty(min(PIECE, self.nbytes), dtype=torch.uint8, device="cpu")
        with opened(self.path, self.start) as file:
            for done in range(0, self.nbytes, PIECE):
                piece = content[: self.nbytes - done]
                fill(file, piece)
                yield piece.view(self.dtype)


@runtime_checkable
class InPieces(Protocol):
    """Reads a tensor bit by bit."""

    def pieces(self) -> Iterator[Tensor]:
        """As of `StoredTensor`."""
        ...


@dataclasses.dataclass(frozen=True)
class FromFile:
    """How a tensor of a file is read: mapped, where that is possible, or into memory of its own."""

    stored: StoredTensor
    mapped: Callable[[], Tensor] | None

    def __call__(self, once: bool = False) -> Tensor:
        # Pages of a mapping count as memory in use for as long as it lives.
        return self.stored.read() if once or self.mapped is None else self.mapped()

    def pieces(self) -> Iterator[Tensor]:
        return self.stored.pieces()


@contextlib.contextmanager
def opened(path: Path, start: int = 0) -> Iterator[io.FileIO]:
    """A file at one of its bytes. Raises OSError naming it for whatever goes wrong with it meanwhile."""
    try:
        with io.FileIO(path) as file:
            file.seek(start)
            yield file
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be read: {error.strerror}") from error


def fill(file: io.FileIO, content: Tensor) -> None:
    """Read the next bytes of a file into a tensor of bytes. Raises ValueError, naming it, when it ends."""
    place, done = content.numpy().data, 0
    while done < len(place):
        count = file.readinto(place[done:])
        if not count:
            raise ValueError(
                f"{file.name} has become shorter while it was read: it ends at byte {file.tell()}"
            )
        done += count


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps."""
    strides, step = [], 1
    for axis in reversed(shape):
        strides.append(step)
        step *= max(axis, 1)
    return tuple(reversed(strides))
