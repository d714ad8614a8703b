"""What the text of an option may be: each function turns it into a value, as argparse's `type` wants it.

Each raises argparse.ArgumentTypeError for what it does not take, which ends the program with one line.
"""

import argparse
import math
import re
from collections.abc import Callable

from joyedit.checkpoints.bounds import MOST_OF, MOST_STEPS
from joyedit.checkpoints.plain_text import shown, visible
from joyedit.checkpoints.sizes import parse_size

LARGEST_SEED = 2**63 - 1
HUB_PAGE = re.compile(r"https?://(?:hf\.co|huggingface\.co)/([\w.-]+/[\w.-]+)/?", re.IGNORECASE)
MOST_PIXELS = 8192**2  # of a size to work in

# Whole numbers by the name of their argument: the least and the most. They hold whoever says the number: the
# command line, an image of a stranger's that --config-from names, a checkpoint.
LIMITS: dict[str, tuple[int, int]] = {
    "seed": (0, LARGEST_SEED),
    "num_images": (1, 10_000),
    "num_inference_steps": (1, MOST_STEPS),
    "num_temporal_reasoning_steps": (0, MOST_STEPS),
    "num_frames": (1, 1_001),
    "max_new_tokens": (1, 262_144),
    "top_k": (0, 10**9),
    "num_maps_per_mask": (1, MOST_OF["num_maps_per_mask"]),
    "basesize": (16, MOST_OF["basesize"]),
    "height": (8, 16_384),
    "width": (8, 16_384),
}


def whole(name: str) -> Callable[[str], int]:
    """What reads the argument of that name, within its limits."""
    return lambda text: whole_number(text, *LIMITS[name])


def beyond(name: str, value: int) -> str | None:
    """What is wrong with the number that an argument has got, if anything."""
    low, high = LIMITS[name]
    return None if low <= value <= high else f"{name} {shown(value, 40)} is not within {low} and {high}"


def place(text: str) -> str:
    """A file, folder or Hub name, but no URL: that is neither opened nor repeated, for it may hold a key."""
    if re.match(r"[a-z][a-z0-9+.-]+://", text, re.IGNORECASE):
        found = HUB_PAGE.fullmatch(text)
        hint = f", here {found[1]}" if found else ""
        raise argparse.ArgumentTypeError(f"a URL is not read here: name a file, folder or Hub name{hint}")
    return text


def share(text: str) -> float:
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


def from_zero(text: str) -> float:
    value = finite(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def above_zero(text: str) -> float:
    value = finite(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def memory_size(text: str) -> str:
    """An amount of memory, which stays as it is written."""
    try:
        parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def pixels(text: str) -> int:
    value = whole_number(text, 16, LIMITS["height"][1])
    if value % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16")
    return value


def whole_number(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text, 40)} is not a whole number") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{visible(text, 40)} is not within {low} and {high}")
    return value


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text, 40)} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value
