"""Pages of mapped files: which tensors are in some, giving back their memory, and fetching them ahead; and of
what `malloc` keeps.

The kernel keeps what was read of a file in its own cache, as long as there is memory for it. A process that
gives a page back has it no longer in its resident set, and gets it again, from that cache or from the disk,
when it looks there the next time.
"""

import ctypes
import ctypes.util
import errno
import functools
import mmap
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from joyedit.memory.layout import laid_out

PAGE = mmap.PAGESIZE


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)


@functools.cache
def _madvise():
    function = _libc().madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def give_back_unused() -> None:
    """What was allocated and is free leaves the resident set. glibc keeps it for the next allocation: of an
    autoencoder's feature maps that is more than its weights. Other C libraries are not asked."""
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def own_pages(tensor: Tensor) -> tuple[int, int]:
    """The pages that a tensor alone fills: addresses from, to."""
    start = -(-tensor.data_ptr() // PAGE) * PAGE
    return start, max((tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE, start)


def give_back(tensors: Iterable[Tensor]) -> None:
    """The pages that these tensors alone fill leave the resident set. All are in mapped files, or lost."""
    for tensor in tensors:
        start, end = own_pages(tensor)
        if end > start:
            _madvise()(start, end - start, mmap.MADV_DONTNEED)


def are_written(tensors: Sequence[Tensor]) -> list[bool]:
    """Which tensors in mapped files were written to: the pages that would be given back are not the file's
    any more. Source: Linux `Documentation/admin-guide/mm/pagemap.rst`."""
    found = []
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for tensor in tensors:
            start, end = own_pages(tensor)
            file.seek(start // PAGE * 8)
            flags = np.frombuffer(file.read((end - start) // PAGE * 8), np.uint64)
            there, of_file = flags >> 62, flags >> 61 & 1  # in memory or swapped out; a file's
            found.append(bool(((there > 0) & (of_file == 0)).any()))
    return found


def fetch_ahead(tensors: Iterable[Tensor]) -> None:
    """Let the kernel read what of these tensors is not in its cache, while others compute."""
    for tensor in tensors:
        start = tensor.data_ptr() // PAGE * PAGE
        _madvise()(start, tensor.data_ptr() + tensor.nbytes - start, mmap.MADV_WILLNEED)


def mapped_ranges(of: int | None = None) -> list[tuple[int, int]]:
    """Where this process has files mapped: addresses from, to. of: the number (inode) of one file."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
        if inode != "0" and of in (None, int(inode)):
            start, end = (int(address, 16) for address in addresses.split("-"))
            ranges.append((start, end))
    return ranges


def is_mapped(tensor: Tensor, ranges: Sequence[tuple[int, int]]) -> bool:
    first, last = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    return any(start <= first and last <= end for start, end in ranges)


def mapped_copies(tensors: Sequence[Tensor], folder: str | None = None) -> list[Tensor]:
    """The same tensors in a file of their own, which has no name any more and goes when they do.

    Raises OSError naming the folder where the disk has no room.
    """
    places, nbytes = laid_out(tensors)
    descriptor, name = tempfile.mkstemp(prefix="joyedit-", dir=folder)
    try:
        _take_room(descriptor, name, nbytes)
        row = torch.from_file(name, shared=True, size=nbytes, dtype=torch.uint8)
    finally:
        os.close(descriptor)
        os.unlink(name)
    for tensor, place in zip(tensors, places, strict=True):
        place.of(row).copy_(tensor)
    return [place.of(row) for place in places]


def _take_room(descriptor: int, name: str, nbytes: int) -> None:
    """Where a disk had no room for a page when it is written to, the system would end the process."""
    try:
        os.posix_fallocate(descriptor, 0, max(nbytes, 1))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        folder = os.path.dirname(name)
        free = shutil.disk_usage(folder).free
        raise OSError(
            error.errno,
            f"{folder} has no room for {nbytes:,} bytes of weights that are in no file as they are held "
            f"({free:,} are free): name another folder in the variable TMPDIR, or convert the weights first",
        ) from None


def in_a_file(tensor: Tensor) -> Tensor:
    """The same tensor in a file of its own, its pages given back."""
    (copy,) = mapped_copies([tensor])
    give_back([copy])
    return copy


def pinned(nbytes: int) -> Tensor | None:
    """So many bytes of main memory that a CUDA device reads by itself; None where there are not as many.

    PyTorch's own pinned memory comes in powers of two.
    """
    available = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    if available is None or nbytes > 0.9 * 1024 * int(available[1]):
        return None
    arena = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    runtime: Any = torch.cuda.cudart()
    if int(runtime.cudaHostRegister(arena.data_ptr(), nbytes, 0)) != 0:
        return None
    weakref.finalize(arena.untyped_storage(), runtime.cudaHostUnregister, arena.data_ptr())
    return arena
