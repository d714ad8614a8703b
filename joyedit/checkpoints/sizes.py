"""Amounts of memory in words. Imports nothing heavy."""

import math
import re
from typing import Any

from joyedit.checkpoints.plain_text import shown

UNITS = {"": 1} | {f"{unit}{b}": base**power for b, base in (("", 1024), ("B", 1000))
                   for power, unit in enumerate("KMGT", 1)}  # fmt: skip


def parse_size(size: Any, name: str = "memory") -> int:
    """Bytes: a number of them, or "12G" in powers of 1024, or "12GB" in powers of ten.

    Raises ValueError, with the name of the argument, for anything else, and for nothing at all.
    """
    wanted = 'bytes, or a size like "12G" (12 * 1024**3) or "12GB" (12 * 1000**3)'
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", size, re.IGNORECASE)
        unit = found and found[2].upper()
        if not found or unit == "B" and "." in found[1]:
            raise ValueError(f"{name}={shown(size, 40)}: must be {wanted}")
        size = int(float(found[1]) * UNITS.get(unit or "", 1))
    elif isinstance(size, float) and size.is_integer():
        size = int(size)
    if isinstance(size, bool) or not isinstance(size, int):
        raise ValueError(f"{name}={shown(size, 40)}: must be {wanted}")
    if size <= 0:
        raise ValueError(f"{name}={size}: must be positive, {wanted}")
    return size


def written_size(nbytes: int) -> str:
    """At least so many bytes, as people write it and `parse_size` reads it: "2.3G", "320M"."""
    for unit, step in (("G", 0.1), ("M", 10), ("M", 1), ("K", 1)):
        if nbytes >= UNITS[unit] * (1 if unit == "G" else 10 * step):
            break
    count = math.ceil(nbytes / UNITS[unit] / step)
    texts = (f"{round((count + more) * step, 1):g}{unit}" for more in (0, 1))
    return next(text for text in texts if parse_size(text) >= nbytes)
