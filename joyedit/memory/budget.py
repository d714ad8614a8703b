"""How much memory there is to use, and how much is in use.

A budget bounds what a pipeline holds where it computes: of a GPU the memory that PyTorch has handed out, of a
CPU the process's resident set, its own pages and those of mapped files together.
"""

from pathlib import Path
from typing import Protocol

import torch

MARGIN = 0.02  # of a budget, which is not given away: what allocators and threads take beside


class Room(Protocol):
    """How much a device may hold."""

    def begin(self) -> None:
        """A stretch of work begins."""
        ...

    def left(self) -> int:
        """Bytes that were free all the while since `begin`."""
        ...


class ProcessRoom:
    """Of `total` bytes of resident set, on Linux."""

    def __init__(self, total: int):
        self.total = total

    def begin(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the largest VmRSS, counts from now on

    def left(self) -> int:
        return int(self.total * (1 - MARGIN)) - resident_bytes("VmHWM")


class DeviceRoom:
    """Of `total` bytes of a CUDA or ROCm device."""

    def __init__(self, total: int, device: torch.device):
        self.total, self.device = total, device

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def left(self) -> int:
        return int(self.total * (1 - MARGIN)) - torch.cuda.max_memory_reserved(self.device)


def resident_bytes(field: str = "VmRSS") -> int:
    """What this process has in main memory; "VmHWM": the most it had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status does not say {field}")


def room_on(device: torch.device, total: int) -> Room:
    return ProcessRoom(total) if device.type == "cpu" else DeviceRoom(total, device)
