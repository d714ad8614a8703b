"""What machines are said to do by their makers, what share of it is assumed, and the time that follows."""

from collections import Counter
from typing import NamedTuple

from joyedit.estimates.counting import ATTENTION, OTHER, PRODUCT

# Shares of the makers' figures that are assumed: large products in half precision, attention by a fused
# kernel, streaming through memory. None of them was measured.
EFFICIENCY = {PRODUCT: 0.72, ATTENTION: 0.57, OTHER: 0.8}


class Machine(NamedTuple):
    """Bytes per second of memory, operations per second of matrix units (dense bf16, added up in fp32) and of
    vector units (fp32), and bytes per second from main memory."""

    bandwidth: float
    matrix: float
    vector: float
    link: float = 25e9


MACHINES = {
    "RTX 3060": Machine(0.36e12, 25.5e12, 12.7e12),
    "RTX 3090": Machine(0.936e12, 71e12, 35.6e12),
    "RTX 4090": Machine(1.01e12, 165e12, 83e12),
    "RTX 5090": Machine(1.79e12, 209e12, 105e12, 50e9),
    "L4": Machine(0.3e12, 121e12, 30.3e12),
    "A100": Machine(2.04e12, 312e12, 19.5e12),
    "H100": Machine(3.35e12, 989e12, 67e12, 50e9),
    "H200": Machine(4.8e12, 989e12, 67e12, 50e9),
    "B200": Machine(8.0e12, 2250e12, 75e12, 50e9),
    "MI300X": Machine(5.3e12, 1307e12, 163e12, 50e9),
}
USUAL = "RTX 4090"  # where no machine is named and the one at hand is none of these


def seconds_of(calls: Counter[tuple[str, int, int]], machine: Machine) -> float:
    """Of operations one after the other, each as long as it computes or reads and writes, whichever is
    longer."""
    return sum(
        count
        * max(
            operations / (EFFICIENCY[kind] * machine.matrix),
            moved / (EFFICIENCY[OTHER] * machine.bandwidth),
        )
        for (kind, operations, moved), count in calls.items()
    )


def machine_called(device: str) -> str:
    """The machine whose name is part of a device's, the usual one otherwise."""
    words = device.split()
    return next((name for name in MACHINES if name in device or name in words), USUAL)
