"""Files as memory: tensors whose bytes are a file's own.

A page of it is read when somebody looks at it, and may leave memory whenever the system needs the place. One
that is written to becomes the process's own: the file stays as it is.

Linux takes what may be written to for memory that will be, and refuses to map a file that is larger than main
memory, unless it is told to reserve nothing. The usual readers do not tell it.
"""

import functools
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

from joyedit.checkpoints.stored_tensors import StoredTensor

IS_LINUX = sys.platform == "linux"
MAP_NORESERVE = 0x4000  # of x86, ARM and RISC-V; not in Python's mmap before 3.13


class MappedFile:
    """A file that is mapped when its first tensor is asked for. On Linux alone."""

    def __init__(self, path: Path):
        self.path = path

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A tensor of this file, as far into a page of memory as it is into one of the file.

        Raises ValueError where the file ends before the tensor does, OSError when it cannot be mapped.
        """
        if not stored.nbytes:
            return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        if stored.start + stored.nbytes > len(self._memory):
            raise ValueError(f"{self.path} has become shorter: it has {len(self._memory)} bytes now")
        count = stored.nbytes // stored.dtype.itemsize
        flat = torch.frombuffer(self._memory, dtype=stored.dtype, count=count, offset=stored.start)
        return flat.as_strided(stored.shape, stored.strides)

    @functools.cached_property
    def _memory(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            try:
                return mmap.mmap(file.fileno(), 0, flags=flags, prot=access)
            except OSError as error:
                raise OSError(error.errno, f"{self.path} cannot be mapped: {error.strerror}") from error
