"""How much memory there is to use, and how much is in use.

A budget bounds what a pipeline holds where it computes: of a GPU the memory that PyTorch has handed out, of a
CPU the process's resident set, its own pages and those of mapped files together.
"""

import contextlib
import logging
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch

from joyedit.checkpoints.sizes import written_size

log = logging.getLogger("joyedit")

MARGIN = 0.02  # of a budget, which is not given away: what allocators and threads take beside


COUNTING = threading.Lock()  # over the visits of all rooms: one that had a lock could not be pickled


class Room(Protocol):
    """How much a device may hold."""

    def begin(self) -> None:
        """A stretch of work begins."""
        ...

    def left(self) -> int:
        """Bytes that were free all the while since `begin`."""
        ...


class Watched:
    """Of `total` bytes of a device: what is left of them, and the most that visits of networks took."""

    def __init__(self, total: int):
        self.total = total
        self.peak = 0  # in the visits that run now
        self.enough = total  # what would have been enough for all visits so far
        self._visits = 0

    def most(self) -> int:
        """The most that was held since `forget`."""
        raise NotImplementedError

    def forget(self) -> None:
        raise NotImplementedError

    def begin(self) -> None:
        self.peak = max(self.peak, self.most())
        self.forget()

    def left(self) -> int:
        return int(self.total * (1 - MARGIN)) - self.most()

    @contextlib.contextmanager
    def visit(self, name: str) -> Iterator[None]:
        """Around the work of a network of that name. Warns of more than all earlier visits needed, when that
        is more than there may be."""
        with COUNTING:
            self._visits += 1
            if self._visits == 1:
                self.forget()
                self.peak = 0
        try:
            yield
        finally:
            with COUNTING:
                self._visits -= 1
                self.begin()
                needed = math.ceil(self.peak / (1 - MARGIN))
                if self.peak > self.total and needed > self.enough:
                    self.enough = needed
                    log.warning(
                        "memory=%r was not enough for this call: %s bytes were held while the %s ran; "
                        "as much as that takes memory=%r",
                        written_size(self.total), f"{self.peak:,}", name, written_size(needed),
                    )  # fmt: skip


class ProcessRoom(Watched):
    """Of the resident set of this process, on Linux."""

    def most(self) -> int:
        return resident_bytes("VmHWM")

    def forget(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the largest VmRSS, counts from now on


class DeviceRoom(Watched):
    """Of what PyTorch takes of a CUDA or ROCm device."""

    def __init__(self, total: int, device: torch.device):
        super().__init__(total)
        self.device = device

    def most(self) -> int:
        return torch.cuda.max_memory_reserved(self.device)

    def forget(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


def resident_bytes(field: str = "VmRSS") -> int:
    """What this process has in main memory; "VmHWM": the most it had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not say {field}")


def room_on(device: torch.device, total: int) -> Watched:
    """Raises ValueError for a device of which nobody says what is held."""
    if device.type == "cuda":
        return DeviceRoom(total, device)
    if device.type == "cpu" and sys.platform == "linux":
        return ProcessRoom(total)
    raise ValueError(
        f"memory: budgets are for CUDA and ROCm devices, and for CPUs on Linux, not for {device} on "
        f"{sys.platform}; offload='sequential' brings one block at a time"
    )
