"""What `benchmarks.kernels_aot` recorded of the kernels, read without Triton.

results/kernels/<release of Triton>/<file of kernels/>.json: call and its kernel -> GPU -> one of

    {"source", "launch", "registers", "spills", "shared", "warps", "instructions", "binary"}
    {"source", "launch", "failed": why the compiler has nothing}
    {"refused": why the operation leaves this GPU to PyTorch}
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import op_cases

RESULTS = Path(__file__).resolve().parent / "results" / "kernels"
# Bytes of shared memory that one block may ask for. Triton compiles more without a word; its launch then
# fails.
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448}
SHARED_LIMIT |= {"sm_120": 101376, "gfx942": 65536, "gfx950": 163840}


class Problem(NamedTuple):
    row: str
    target: str
    what: str


def versions(results: Path = RESULTS) -> list[str]:
    """Releases of Triton that have results, the newest last."""
    found = {path.parent.name for path in results.glob("*/*.json")}
    numbers = [name for name in found if re.fullmatch(r"\d+\.\d+", name)]
    return sorted(numbers, key=lambda name: tuple(map(int, name.split("."))))


def read(name: str, version: str, results: Path = RESULTS) -> dict[str, Any]:
    """The rows of one file of kernels/; none where nothing was recorded."""
    path = results / version / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}


def problems(op: op_cases.Op, target: str, entry: Mapping[str, Any]) -> list[str]:
    """What keeps a compiled kernel from running, or slows it down."""
    if "refused" in entry:
        return []
    if "failed" in entry:
        return ["does not compile"]
    found = [f"{entry['spills']} spills"] if entry["spills"] else []
    if entry["shared"] > SHARED_LIMIT[target]:
        found.append(f"{entry['shared']} bytes of shared memory, there are {SHARED_LIMIT[target]}")
    if op.matrix and "bf16" not in entry["launch"] and "fp16" not in entry["launch"]:
        return found  # without matrix units for fp32
    for key in ("cuda" if target.startswith("sm") else "hip", target):
        for pattern in op.instructions.get(key, ()):
            alternatives = (pattern,) if isinstance(pattern, str) else pattern
            if not any(entry["instructions"].get(one) for one in alternatives):
                found.append(f"no instruction {' or '.join(alternatives)}")
    return found


def all_problems(name: str, version: str, results: Path = RESULTS) -> list[Problem]:
    """Those of one file of kernels/ under a release of Triton."""
    operations = op_cases.modules()[name].OPS
    return [
        Problem(row, target, what)
        for row, entries in read(name, version, results).items()
        for target, entry in entries.items()
        for what in problems(operations[row.partition(":")[0]], target, entry)
    ]
