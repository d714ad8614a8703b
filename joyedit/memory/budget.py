"""How much memory there is to use, and how much is in use.

A budget bounds what a pipeline holds where it computes: of a GPU the memory that PyTorch has handed out, of a
CPU the process's resident set, its own pages and those of mapped files together.
"""

import re
from pathlib import Path
from typing import Any, Protocol

import torch

from joyedit.checkpoints.plain_text import shown

UNITS = {"": 1} | {f"{unit}{b}": base**power for b, base in (("", 1024), ("B", 1000))
                   for power, unit in enumerate("KMGT", 1)}  # fmt: skip
MARGIN = 0.02  # of a budget, which is not given away: what allocators and threads take beside


def parse_size(size: Any) -> int:
    """Bytes of a `memory`: a number of them, or "12G" in powers of 1024, or "12GB" in powers of ten.

    Raises ValueError for anything else, and for nothing at all.
    """
    wanted = 'bytes, or a size like "12G" (12 * 1024**3) or "12GB" (12 * 1000**3)'
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", size, re.IGNORECASE)
        unit = found and found[2].upper()
        if not found or unit == "B" and "." in found[1]:
            raise ValueError(f"memory={shown(size, 40)}: must be {wanted}")
        size = int(float(found[1]) * UNITS.get(unit or "", 1))
    elif isinstance(size, float) and size.is_integer():
        size = int(size)
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"memory={shown(size, 40)}: must be {wanted}")
    if size <= 0:
        raise ValueError(f"memory={size}: must be positive, {wanted}")
    return size


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
