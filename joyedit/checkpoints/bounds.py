"""How large the numbers in a file may be, and what a network that is built from them may take.

A file of a hundred bytes can ask for a million layers. Each count has a bound far above what was ever
published, which its error names; a network that a weight file is to fill is bounded by that file.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

from joyedit.checkpoints.plain_text import shown

# Steps of one run: what schedulers accept, and what a picture's metadata may ask to repeat.
MOST_STEPS = 10_000

LARGEST_NUMBER = 2**31 - 1
LARGEST_FLOAT = 1e30  # fp32 holds it
LONGEST_LIST = 1000

# Setting -> the largest value: layers, each of which is a Python object, and sizes of tables that are made.
MOST_OF = {
    **dict.fromkeys(
        (
            "num_layers",
            "num_hidden_layers",
            "num_decoder_layers",
            "depth",
            "num_res_blocks",
            "layers_per_block",
            "transformer_layers_per_block",
        ),
        1000,
    ),
    "num_train_timesteps": 100_000,
    "num_inference_steps": MOST_STEPS,
    "num_maps_per_mask": 1000,
    "basesize": 4096,
    "solver_order": 20,
    "rope_max_seq_len": 10**6,
    "rope_temporal_skip_len": 10**6,
    **dict.fromkeys(("size", "crop_size", "image_size"), 10_000),
    **dict.fromkeys(("patch_size", "merge_size", "spatial_merge_size", "temporal_patch_size"), 256),
    "min_pixels": 2**26,
}
LONGEST = {"trained_betas": 100_000}  # setting -> the most entries, where 1,000 are not enough

# Tensors that a network may have which no weight file bounds. The largest published ones have 1,300.
MOST_TENSORS = 20_000


def check_value(name: str, value: Any) -> None:
    """Raises ValueError, naming the setting and its bound, for numbers and lists beyond them."""
    if isinstance(value, tuple):
        longest = LONGEST.get(name, LONGEST_LIST)
        if len(value) > longest:
            raise ValueError(f"{name} has {len(value)} entries: {longest:,} are the most that is supported")
        for one in value:
            check_value(name, one)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = MOST_OF.get(name, LARGEST_NUMBER)
        if value > most:
            raise ValueError(f"{name}={shown(value, 40)}: {most:,} is the most that is supported")
        if value < -LARGEST_NUMBER:
            raise ValueError(f"{name}={shown(value, 40)}: {-LARGEST_NUMBER:,} is the least that is supported")
    elif isinstance(value, float) and (not math.isfinite(value) or abs(value) > LARGEST_FLOAT):
        raise ValueError(f"{name}={value!r}: must be a finite number, at most {LARGEST_FLOAT:g}")


def most_tensors(in_files: int) -> int:
    """The tensors that a network may have which that many tensors are to fill. Layouts that keep several of
    ours in one have at most three in one; the rest is for small networks."""
    return min(MOST_TENSORS, 4 * in_files + 100)


def count_numbered(names: Iterable[str], prefix: str, position: int) -> int:
    """How many different numbers stand at that component of the names with a prefix: 0, 1, 2, ...

    Raises ValueError when one is left out, or is no number: a loop up to the largest would be as long as a
    stranger likes.
    """
    found = {name.split(".")[position] for name in names if name.startswith(prefix)}
    if found != {str(number) for number in range(len(found))}:
        odd = sorted(found - {str(number) for number in range(len(found))})[0][:20]
        raise ValueError(
            f"the {len(found)} parts {prefix}* are not numbered one by one: {odd!r} is among them"
        )
    return len(found)


@contextlib.contextmanager
def as_value_errors(what: str) -> Iterator[None]:
    """Settings that make no sense together end somewhere in arithmetic or in torch: raises ValueError then,
    beginning with `what`."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{what}: {type(error).__name__} {reason}") from error
