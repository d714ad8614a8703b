"""What the text of an option may be: each function turns it into a value, as argparse's `type` wants it.

Each raises argparse.ArgumentTypeError for what it does not take, which ends the program with one line.
"""

import argparse
import math

LARGEST_SEED = 2**63 - 1


def positive(text: str) -> int:
    return whole_number(text, 1, 10**9)


def count(text: str) -> int:
    return whole_number(text, 0, 10**9)


def share(text: str) -> float:
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


def above_zero(text: str) -> float:
    value = finite(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def seed_number(text: str) -> int:
    return whole_number(text, 0, LARGEST_SEED)


def pixels(text: str) -> int:
    value = whole_number(text, 16, 10**6)
    if value % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16")
    return value


def whole_number(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
    return value


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value
