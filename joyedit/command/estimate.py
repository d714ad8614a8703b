"""`joyedit estimate`: its options, and an estimate as people read it."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from joyedit.command.calls import said, source_options
from joyedit.command.devices import DTYPES
from joyedit.command.values import finite, memory_size, place, whole

if TYPE_CHECKING:
    from joyedit.estimates.estimating import Estimate

GIB = 2**30
OPTIONS = (
    *("height", "width", "frames", "steps", "dtype", "memory"),
    *("quantize", "tflops", "bandwidth", "device"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        type=place,
        help="folder, weight file or Hub name; a folder may hold configs alone",
    )
    add("--height", type=whole("height"), help="with --width: of the result, in pixels")
    add("--width", type=whole("width"))
    add("--frames", type=whole("num_frames"), metavar="N", help="of ChronoEdit's film, default 5")
    add("--steps", type=whole("num_inference_steps"), metavar="N", help="denoising steps")
    add("--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES[:4])} (as stored)")
    add("--memory", metavar="SIZE", type=memory_size, help="hold at most that where it is computed, as 12G")
    add("--quantize", choices=("int8_convrot",), metavar="FORM", help="as if convert --quantize wrote it")
    add("--device", choices=("auto", "cuda", "cpu"), help="a GPU, or a CPU; default: what is here")
    add("--tflops", type=finite, metavar="T", help="10^12 operations a second, in half precision")
    add("--bandwidth", type=finite, metavar="B", help="10^9 bytes a second, of that machine's memory")
    add("--json", action="store_true", help="print JSON")


def estimated(args: argparse.Namespace) -> "Estimate":
    from joyedit.estimates.estimating import estimate

    return estimate(args.model, **said(args, OPTIONS), **source_options(args))


def lines(found: "Estimate") -> list[str]:
    """An estimate as a page of text."""
    size = found.size
    film = f", {size.frames} frames" if size.frames > 1 else ""
    where = "a GPU" if found.device == "cuda" else "a CPU"
    head = f"{found.pipeline} on {where}: {size.width} x {size.height} pixels{film}, {size.steps} steps"
    weights = [(part, gigabytes(count)) for part, count in found.weights.items()]
    peaks = [(stage, gigabytes(count)) for stage, count in found.peak.items()]
    fits = [(f"{card} GB", "no" if flags is None else flags or "yes") for card, flags in found.fits.items()]
    operations = f"{found.operations_per_step / 1e12:.3g} * 10^12 operations"
    times = [(name, duration(seconds)) for name, seconds in found.times.items()]
    return [
        head,
        *table("weights", [*weights, ("files", gigabytes(found.disk))]),
        *table("memory at most in", [*peaks, ("smallest --memory", gigabytes(found.smallest))]),
        "",
        f"a step: {gigabytes(found.bytes_per_step)} moved, {operations}",
        f"time: {duration(found.seconds)} on {found.machine}, computed from its maker's figures",
        *table("elsewhere, with all of it in memory", times),
        *table("is enough", fits),
    ]


def table(head: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return ["", f"{head}:", *(f"  {name:<{width}}  {value}" for name, value in rows)]


def gigabytes(count: float) -> str:
    """In powers of 1024, as memory is sold, and as --memory takes it."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min"
