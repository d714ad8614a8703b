"""What every side-by-side benchmark does: take turns, refuse unequal results, write them down, print a table.

The reference and ours run in one process, on the same weights, one after the other, several times; the ratio
is the median of the pairwise ratios, which a busy machine disturbs least. Before anything is timed the two
results are compared: a row whose results differ by more than its tolerance is not reported, the run ends with
an exception.
"""

import argparse
import contextlib
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "safetensors")


class UnequalResults(Exception):
    """The two sides of a row do not compute the same thing."""


@dataclasses.dataclass
class Result:
    """One row of a table. Times are medians; `pairs` are the single measurements (reference, ours)."""

    shape: str  # what was computed
    equal: str  # what was compared, and that it was equal
    reference: float
    ours: float
    ratio: float  # reference / ours, the median over the pairs
    pairs: list[tuple[float, float]]
    unit: str = "s"
    difference: float | None = None  # largest absolute difference over the largest absolute value
    tolerance: float | None = None
    met: bool | None = None  # whether what was expected is reached; set here where the ratio does not say it
    remark: str = ""  # for the table
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


class Row(NamedTuple):
    """`measure(quick, folder)` returns a Result, or None where the row says nothing new on this machine."""

    title: str
    measure: Callable[[bool, Path], Result | None]
    least: float | None = None  # the ratio that is expected
    expected: str = ""  # in words, where it is not a ratio


def difference(ours: Any, reference: Any) -> float:
    """Largest |ours - reference| over the largest |reference|, per tensor; the worst of a tuple of tensors.

    Raises UnequalResults for other shapes, values that are not finite, and results that are all alike: a
    comparison with those would prove nothing.
    """
    if not isinstance(reference, Tensor):
        if len(ours) != len(reference):
            raise UnequalResults(f"{len(ours)} results against {len(reference)}")
        return max(difference(a, b) for a, b in zip(ours, reference, strict=True))
    if ours.shape != reference.shape:
        raise UnequalResults(f"shape {tuple(ours.shape)} against {tuple(reference.shape)}")
    a, b = ours.double(), reference.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        raise UnequalResults("a result holds NaN or infinite values")
    scale = float(b.abs().max())
    if float(b.std()) < 1e-3 * scale or scale == 0:
        raise UnequalResults("the reference's result is constant, an equal one proves nothing")
    return float((a - b).abs().max()) / scale


def compare(
    reference: Callable[[], Any],
    ours: Callable[[], Any],
    *,
    shape: str,
    equal: str,
    tolerance: float,
    pairs: int,
    distance: Callable[[Any, Any], float] = difference,
) -> Result:
    """Check that both sides return the same, then time them in turns.

    Raises UnequalResults when `distance(ours, reference)` of the first results, or of the last, is above
    `tolerance`.
    """
    off = check(distance(ours(), reference()), tolerance)
    times = []
    results = (None, None)
    for _ in range(pairs):
        results = None
        before = time.perf_counter()
        theirs = reference()
        between = time.perf_counter()
        results = (ours(), theirs)
        times.append((between - before, time.perf_counter() - between))
    off = max(off, check(distance(*results), tolerance))
    return summary(times, shape=shape, equal=equal, difference=off, tolerance=tolerance)


def check(off: float, tolerance: float) -> float:
    if not off <= tolerance:
        raise UnequalResults(
            f"results differ by {off:.2e} of their scale, at most {tolerance:.0e} is allowed"
        )
    return off


def summary(pairs: Sequence[tuple[float, float]], **fields: Any) -> Result:
    """A Result of pairs of measurements (reference, ours)."""
    return Result(
        reference=statistics.median(pair[0] for pair in pairs),
        ours=statistics.median(pair[1] for pair in pairs),
        ratio=statistics.median(a / b for a, b in pairs),
        pairs=list(pairs),
        **fields,
    )


class Child(NamedTuple):
    """What another process took."""

    seconds: float
    user_seconds: float
    output: str


def run_child(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Child:
    """Run this Python with `arguments` from the root of the checkout. Raises RuntimeError when it fails."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=out,
            stderr=err,
            env={**os.environ, **(environment or {})},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(arguments)} failed ({process.returncode}):\n{err.read()[-4000:]}")
        return Child(seconds, usage.ru_utime, out.read())


def peak_memory() -> int:
    """Bytes of main memory that this process has held at most, mapped files included.

    The kernel's figure for the address space: `ru_maxrss` would count what the parent held when it forked.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the peak memory of a process")


def version(package: str) -> str | None:
    """None for a package that is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def machine() -> dict[str, Any]:
    """Where the measurement was taken."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model
        )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_units": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def run(rows: Mapping[str, Row], names: Sequence[str], quick: bool) -> dict[str, Any]:
    """Measure the named rows in order and print each when it is done. Returns what is written to the file."""
    measured = {}
    begin = time.perf_counter()
    print(line("row", "diffusers", "joyedit", "ratio", "expected", "difference", "load"))
    with tqdm(names, disable=None, leave=False, dynamic_ncols=True) as bar:
        for name in bar:
            bar.set_description(name)
            row = rows[name]
            with tempfile.TemporaryDirectory() as folder, torch.no_grad():
                result = row.measure(quick, Path(folder))
            gc.collect()
            if result is None:
                continue
            entry = {"title": row.title, **dataclasses.asdict(result), "expected": expected_text(row)}
            if quick:
                entry["met"] = None
            elif result.met is None and row.least is not None:
                entry["met"] = result.ratio >= row.least
            entry["load"] = round(os.getloadavg()[0], 2)
            measured[name] = rounded(entry)
            bar.write(table_line(name, measured[name]))
    return {
        "machine": machine(),
        "quick": quick,
        "seconds": round(time.perf_counter() - begin, 1),
        "rows": measured,
    }


def expected_text(row: Row) -> str:
    return row.expected or ("" if row.least is None else f"{row.least:g}x")


def rounded(value: Any) -> Any:
    """Four significant digits are more than the measurement holds."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def line(name: str, *cells: str) -> str:
    return f"{name:<18}" + "".join(f"{cell:>14}" for cell in cells)


def table_line(name: str, row: Mapping[str, Any]) -> str:
    unit = row["unit"]
    off = "-" if row["difference"] is None else f"{row['difference']:.1e}"
    below = " BELOW" if row["met"] is False else ""
    cells = (f"{row['reference']:.3g} {unit}", f"{row['ours']:.3g} {unit}", f"{row['ratio']:.2f}x")
    return line(name, *cells, row["expected"], off, f"{row['load']:.1f}") + below


def write(path: Path, results: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+([-+.e\d]+),\s+([-+.e\d]+)\s+\]", r"[\1, \2]", text)  # a pair on one line
    path.write_text(text + "\n", encoding="utf-8")


def main(rows: Mapping[str, Row], name: str, arguments: Sequence[str] | None = None) -> None:
    """The command line of a benchmark whose full results are `results/<name>.json`."""
    parser = argparse.ArgumentParser(description=f"Side by side with the reference: {', '.join(rows)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that it runs, not how fast")
    parser.add_argument("--only", action="append", choices=list(rows), help="this row; may be repeated")
    parser.add_argument("--out", type=Path, help=f"default: results/{name}.json for a full run, else none")
    given = parser.parse_args(arguments)
    results = run(rows, given.only or list(rows), given.quick)
    full = not (given.quick or given.only)
    path = given.out or (RESULTS / f"{name}.json" if full else None)
    if path is not None:
        write(path, results)
    print(
        f"{results['seconds']:.0f} s on {results['machine']['cpu']}, {results['machine']['threads']} threads"
    )
