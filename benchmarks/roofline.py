"""What the fused operations move and compute, and the least time that takes: `python -m benchmarks.roofline`.

For every case of `op_cases`: the bytes of the fused operation (each argument read once, each result written
once), the bytes of the reference's formulation (every torch operation reads its arguments from memory and
writes its result; views are free), the arithmetic, and the floor on each GPU: the longer of bytes / bandwidth
and operations / peak. Then the sums of a denoising step with guidance. Sizes are counted, nothing is timed.

Elementwise arithmetic is counted at the vector units' fp32 peak, matrix products at the dense bf16 peak.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.op_cases import Case, Op, all_cases, all_ops
from joyedit import ops


class GPU(NamedTuple):
    """Makers' figures: bytes per second of memory, operations per second of matrix (dense bf16) and vector
    (fp32) units."""

    bandwidth: float
    matrix: float
    vector: float


GPUS = {
    "H100": GPU(3.35e12, 989e12, 67e12),
    "H200": GPU(4.8e12, 989e12, 67e12),
    "B200": GPU(8.0e12, 2250e12, 75e12),
    "4090": GPU(1.01e12, 165e12, 83e12),
    "MI300X": GPU(5.3e12, 1307e12, 163e12),
}
SYSTEMS = {
    "joyimage": "JoyImage, 1024 x 1024 pixels, one reference",
    "chronoedit": "ChronoEdit, 5 frames of 720p",
    "diffedit": "Stable Diffusion 2.1, 768 x 768 pixels",
}


class Traffic(NamedTuple):
    """Of one call: bytes fused, bytes of the reference's operations, their number, arithmetic operations."""

    fused: int
    plain: int
    launches: int
    operations: int


class Moved(TorchDispatchMode):
    """Adds up what every operation but a view reads and writes."""

    def __init__(self):
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        if not (returned and returned[0].alias_info and not returned[0].alias_info.is_write):
            if func.__name__ not in ("empty.memory_format", "_unsafe_view.default"):
                self.bytes += stored(tree_leaves((args, kwargs))) + stored(tree_leaves(out))
                self.launches += 1
        return out


def stored(values: Iterable[Any]) -> int:
    """Bytes of tensors; what an expanded tensor repeats is counted once."""
    total = 0
    for t in values:
        if isinstance(t, Tensor):
            sizes = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
            total += torch.Size(sizes).numel() * t.element_size() if t.numel() else 0
    return total


def traffic(case: Case, op: Op) -> Traffic:
    args = case.make("meta", fill=False)
    with ops.backend("torch"):
        out = getattr(ops, case.op)(*args)
    plain = op.plain if callable(op.plain) else op.plain[case.system]
    with Moved() as moved:
        plain(*args)
    fused = stored(tree_leaves(args)) + stored(tree_leaves(out))
    return Traffic(fused, moved.bytes, moved.launches, op.operations(*args))


def floor(t: Traffic, op: Op, gpu: GPU) -> float:
    """Seconds of one call that no implementation can go below."""
    return max(t.fused / gpu.bandwidth, t.operations / (gpu.matrix if op.matrix else gpu.vector))


def rows() -> list[dict[str, Any]]:
    """One for each case: its traffic, and microseconds of its floor on each GPU."""
    known, found = all_ops(), []
    for case in all_cases():
        t, op = traffic(case, known[case.op]), known[case.op]
        floors = {name: 1e6 * floor(t, op, gpu) for name, gpu in GPUS.items()}
        found.append({"case": case, **t._asdict(), "floors": floors})
    return found


def sums(found: list[dict[str, Any]], system: str) -> dict[str, Any]:
    """Of one denoising step of a system."""
    mine = [(row["case"].per_step, row) for row in found if row["case"].system == system]
    total = {key: sum(n * row[key] for n, row in mine) for key in Traffic._fields}
    total["calls"] = sum(n for n, _ in mine)
    total["launches"] = sum(n * row["launches"] for n, row in mine)
    total["floors"] = {gpu: sum(n * row["floors"][gpu] for n, row in mine) / 1000 for gpu in GPUS}
    return total


def saved_per_block(found: list[dict[str, Any]], op: str) -> dict[str, int]:
    """System -> bytes that fusing spares in one block of its network."""
    saved: dict[str, int] = {}
    for row in found:
        case = row["case"]
        if case.op == op and case.per_block:
            saved[case.system] = saved.get(case.system, 0) + case.per_block * (row["plain"] - row["fused"])
    return saved


def line(name: str, *cells: str) -> str:
    return f"{name:<78.78}" + "".join(f"{cell:>11}" for cell in cells)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    out = parser.parse_args(arguments).out
    found = rows()
    print(line("one call (floor in microseconds)", "fused", "separate", "operations", *GPUS))
    for row in found:
        floors = (f"{value:.1f}" for value in row["floors"].values())
        counts = megabytes(row["fused"]), megabytes(row["plain"]), f"{row['operations']:.2g}"
        print(line(row["case"].title, *counts, *floors))
    print("\n" + line("a denoising step (floor in milliseconds)", "fused", "separate", "operations", *GPUS))
    for system, name in SYSTEMS.items():
        total = sums(found, system)
        floors = (f"{value:.2f}" for value in total["floors"].values())
        counts = megabytes(total["fused"]), megabytes(total["plain"]), f"{total['operations']:.2g}"
        print(line(f"{name} ({total['calls']} calls for {total['launches']})", *counts, *floors))
    if out:
        content = [{**row, "case": row["case"].title} for row in found]
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
