"""All evidence of one GPU by one command: `python -m benchmarks.gpu --out gpu.json`.

It needs what joyedit itself needs and no more, and takes eight minutes at most. In order of their value:

    machine      what it is: clocks, versions, which attention PyTorch takes, bandwidth, matrix products
    correctness  every operation, forward and backward, against float64
    calls        the calls of a denoising step at real size: ours, PyTorch's, and others'
    block        a block of the transformers at full width
    step         a whole denoising step at full size, with random weights
    models       the small trained models against the CPU, and that no step waits for the device
    hazards      offsets beyond 2^31, streams, graphs, inference mode, autocast, torch.compile
    tiles        other tiles of attention than those that are used

The file is replaced, whole, after each row: {"dry_run": bool, "machine": {...}, "rows": [...]}, each row with
its "area", "name", "failed" (null, or why) and its figures, in seconds and bytes. A row that fails stops no
other. What no longer fits the time is written as failed. Exit status: 0 when every row was measured, 1 when
one was not, 2 when nothing can be, 130 after ctrl-C.

`--dry-run` does the same at tiny sizes on a CPU with Triton's interpreter: it shows that the benchmark works,
and its figures mean nothing.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.gpu.processes import NotReady, Workers


class Area(NamedTuple):
    module: str
    share: float  # of the time; what it does not need goes to those after it
    is_parallel: bool = False  # its rows are not timed, so that many may run at once


AREAS = {
    "machine": Area("benchmarks.gpu.machine", 1),
    "correctness": Area("benchmarks.gpu.correctness", 4, is_parallel=True),
    "calls": Area("benchmarks.gpu.calls", 6),
    "block": Area("benchmarks.gpu.block", 2),
    "step": Area("benchmarks.gpu.step", 5),
    "models": Area("benchmarks.gpu.models", 2),
    "hazards": Area("benchmarks.gpu.hazards", 2),
    "tiles": Area("benchmarks.gpu.tiles", 3),
}
BUDGET = 480.0  # seconds
RESERVE = 0.05  # of it, for starting, and for naming what is left out
ROW = 0.25  # of it, at most, for one row
PROCESS_MEMORY = 20 * 2**30  # bytes on the device that the largest case of `correctness` takes, in float64


def areas(text: str) -> list[str]:
    """Names separated by commas, in the order of AREAS."""
    given = text.split(",")
    if unknown := [name for name in given if name not in AREAS]:
        allowed = ", ".join(AREAS)
        raise argparse.ArgumentTypeError(f"unknown area {', '.join(map(repr, unknown))}: there are {allowed}")
    return [name for name in AREAS if name in given]


def parallel(machine: dict[str, Any], is_dry: bool) -> int:
    """How many processes may share the device and the cores."""
    cores = machine["cores"] or 1
    return min(2, cores) if is_dry else max(1, min(8, cores // 2, machine["memory"] // PROCESS_MEMORY))


def measure(workers: Workers, names: list[str], count: int, budget: float) -> Iterator[dict[str, Any]]:
    """The rows of the named areas. The time of an area ends when its share of the budget, and of those before
    it, is over."""
    begin, whole, passed = time.monotonic(), sum(AREAS[name].share for name in names), 0.0
    end = begin + (1 - RESERVE) * budget
    for name in names:
        area = AREAS[name]
        passed += area.share
        deadline = begin + (end - begin) * passed / whole
        processes = count if area.is_parallel else 1
        for row in workers.measure(area.module, processes, deadline, ROW * budget, end):
            yield {"area": name, **row}


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file at once: whoever reads it, or stops this process, finds it whole."""
    whole = path.with_name(path.name + ".part")
    whole.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(whole, path)


def line(row: dict[str, Any]) -> str:
    named = f"{row['area']}: {row['name']}"
    if row["failed"] is not None:
        return f"{named}: FAILED: {row['failed'].splitlines()[0]}"
    figures = {key: value for key, value in row.items() if key not in ("area", "name", "failed")}
    return f"{named}: {', '.join(f'{key} {shown(value)}' for key, value in figures.items())}"[:300]


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument(
        "--only", type=areas, default=list(AREAS), metavar="AREA,...", help="only these areas"
    )
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help="%(default)g")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    given = parser.parse_args(arguments)
    import torch

    if not given.dry_run and not torch.cuda.is_available():
        print("no GPU: only --dry-run works here", file=sys.stderr)
        return 2
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    try:
        with Workers(given.dry_run) as workers, tqdm(disable=None, leave=False, unit=" rows") as bar:
            machine = workers.first.machine()
            results = {"dry_run": given.dry_run, "machine": machine, "rows": rows}
            write(given.out, results)
            count = parallel(machine, given.dry_run)
            for row in measure(workers, given.only, count, given.budget):
                rows.append(row)
                write(given.out, results)
                bar.set_description(row["area"])
                bar.update()
                bar.write(line(row))
    except NotReady as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if rows:
            write(given.out, results)  # it may have come in the middle of that
        print(f"stopped; {given.out} holds the {len(rows)} rows that were done", file=sys.stderr)
        return 130
    failed = sum(row["failed"] is not None for row in rows)
    print(f"{given.out}: {len(rows)} rows, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
