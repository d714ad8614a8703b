"""The kernels compiled ahead of time for eight GPUs, without one: `python -m benchmarks.kernels_aot`.

Every case of `op_cases` is called through joyedit.ops with the launch of a kernel replaced: what would have
been launched, with the tiles chosen for that GPU and the specialisation of these very arguments, is compiled
instead. So the table cannot differ from what the systems launch. Required of each: no spilled register, no
more shared memory than the GPU has, and the machine instructions that the operation's `Op` names. An
operation that refuses a GPU (`joyedit.ops` then uses PyTorch there) has the reason in its place.

Results: results/kernels/<file of kernels/>.json, by call and GPU, with a hash of what was compiled; only
entries whose hash changed are compiled again (`--all`: every one). Commit them: a change that costs registers
shows in the diff. Arguments: files of kernels/ to bring up to date (default: all).
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks import op_cases
from benchmarks.op_cases import Case
from joyedit import ops

RESULTS = Path(__file__).resolve().parent / "results" / "kernels"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS |= {arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")}
# Bytes of shared memory that one block may ask for. Triton compiles more without a word; its launch then
# fails.
SHARED_LIMIT = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448}
SHARED_LIMIT |= {"sm_120": 101376, "gfx942": 65536, "gfx950": 163840}
# Counted in every kernel where they occur, so that a change of them shows in the diff.
COUNTED = {
    "cuda": (r"LDG\.E\.(\w+\.)*128", r"STG\.E\.(\w+\.)*128", "LDGSTS", "UTMALDG", "HMMA", "HGMMA", "UTCHMMA"),
    "hip": (r"(global|buffer)_load_(b128|dwordx4)", r"(global|buffer)_store_(b128|dwordx4)", "v_mfma"),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel and all that the compiler is told about one launch of it."""

    kernel: JITFunction
    source: ASTSource
    options: dict[str, Any]
    described: str  # types of the arguments and values of the constants
    digest: str


Entries = dict[str, Launch | str]  # GPU -> what is launched there, or why nothing is


@contextlib.contextmanager
def launches_on(name: str) -> Iterator[list[Launch]]:
    """Within it, kernels are not launched but collected, as if this machine had the GPU of that name."""
    target, found = TARGETS[name], []

    def collect(kernel: JITFunction, *args, grid, warmup, **kwargs):
        found.append(launch(kernel, target, args, kwargs))

    major, minor = divmod(target.arch, 10) if target.backend == "cuda" else (9, 5 if "950" in name else 4)
    properties = types.SimpleNamespace(gcnArchName=name, multi_processor_count=128, major=major, minor=minor)
    with (
        mock.patch.object(JITFunction, "run", collect),
        mock.patch.object(torch.version, "hip", "7.0" if target.backend == "hip" else None),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (major, minor)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        mock.patch.object(ops, "_interpreted", True),
        ops.backend("triton"),
    ):
        yield found


def launch(kernel: JITFunction, target: GPUTarget, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """As Triton's own launch specialises a kernel on its arguments."""
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constants, attributes)
    code = "".join(f.src for f in vars(sys.modules[kernel.__module__]).values() if isinstance(f, JITFunction))
    chosen = {key: kwargs[key] for key in sorted(kwargs) if key not in signature}
    told = [
        code,
        sorted(signature.items()),
        sorted(map(str, constants.items())),
        sorted(map(str, attributes.items())),
    ]
    described = ", ".join(str(v) for v in signature.values() if v != "constexpr")
    constants = {kernel.params[path[0]].name: value for path, value in constants.items()}
    described += "".join(f", {name}={value}" for name, value in [*constants.items(), *chosen.items()])
    digest = hashlib.sha256(repr([*told, chosen, target.arch]).encode()).hexdigest()[:16]
    return Launch(kernel, source, options.__dict__, described, digest)


def call(case: Case) -> None:
    """Make the call of a case, and its backward's, on memory that is never read."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in case.make("cpu", fill=False)]
    inputs = [a.requires_grad_() for a in args if case.trained and isinstance(a, Tensor)]
    out = getattr(ops, case.op)(*args)
    if case.trained:
        out = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
        torch.autograd.grad(out, inputs, [torch.empty_like(t) for t in out])


def table(module: Any) -> dict[str, Entries]:
    """Title of a call and name of its kernel -> GPU -> launch. A row whose launches are all in earlier rows
    is left out."""
    rows, seen = {}, set()
    for case in module.CASES:
        if not case.compiled:
            continue
        made: dict[str, Entries] = {}
        for target in TARGETS:
            try:
                with launches_on(target) as found:
                    call(case)
            except RuntimeError as refused:
                made.setdefault(case.title, {})[target] = str(refused)
                continue
            for i, one in enumerate(found):
                name = f"{case.title} [{one.kernel.__name__}]"
                if one.kernel in [other.kernel for other in found[:i]]:
                    name += f" {i}"
                made.setdefault(name, {})[target] = one
        for name, entries in made.items():
            new = {(target, e if isinstance(e, str) else e.digest) for target, e in entries.items()}
            if new - seen:
                rows[name] = entries
            seen |= new
    return rows


def compiled(one: Launch, target: str) -> dict[str, Any]:
    """What came out: registers of a thread, shared memory, spills, counts of instructions."""
    kernel = triton.compile(one.source, target=TARGETS[target], options=one.options)
    if TARGETS[target].backend == "hip":
        text = kernel.asm["amdgcn"]

        def stated(key: str) -> int:
            return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

        registers = stated("vgpr_count")
        spills = sum(map(stated, ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")))
        instructions = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
    else:
        registers, spills, instructions = disassembled(kernel.asm["cubin"])
    counts = {}
    for pattern in COUNTED[TARGETS[target].backend]:
        if count := sum(re.match(pattern, word) is not None for word in instructions):
            counts[pattern] = count
    return {
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": {"all": len(instructions), **counts},
    }


def disassembled(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers, spills (bytes of stack and local memory, instructions that use it) and all instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)

        def dump(flag: str) -> str:
            return subprocess.run([CUOBJDUMP, flag, path], capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", dump("-sass"))
    local = sum(word.startswith(("STL", "LDL")) for word in instructions)
    return int(usage[1]), int(usage[2]) + int(usage[3]) + local, instructions


def problems(op: op_cases.Op, one: Launch, target: str, result: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = [f"{result['spills']} spills"] if result["spills"] else []
    if result["shared"] > SHARED_LIMIT[target]:
        found.append(f"{result['shared']} bytes of shared memory, there are {SHARED_LIMIT[target]}")
    if op.matrix and "bf16" not in one.described and "fp16" not in one.described:
        return found  # without matrix units for fp32
    for key in (TARGETS[target].backend, target):
        for pattern in op.instructions.get(key, ()):
            if not result["instructions"].get(pattern):
                found.append(f"no instruction {pattern}")
    return found


def stale(name: str) -> list[str]:
    """Entries of results/kernels/<name>.json that are not of the kernels as they are."""
    recorded = read(name)
    rows = table(op_cases.modules()[name])
    old = [f"{row}: is no longer launched" for row in recorded if row not in rows]
    for row, entries in rows.items():
        for target, entry in entries.items():
            was = recorded.get(row, {}).get(target, {})
            now = {"refused": entry} if isinstance(entry, str) else {"source": entry.digest}
            if not now.items() <= was.items():
                old.append(f"{row} on {target}")
    return old


def read(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}


def update(name: str, everything: bool = False) -> list[str]:
    """Compile what changed in one file of kernels/, and write its results. Returns what is wrong."""
    module, recorded, rows, wrong = op_cases.modules()[name], read(name), {}, []
    todo = [(row, *pair) for row, entries in table(module).items() for pair in entries.items()]
    for row, target, entry in tqdm(todo, desc=name, disable=None, leave=False, dynamic_ncols=True):
        result = {"refused": entry} if isinstance(entry, str) else recorded.get(row, {}).get(target, {})
        if isinstance(entry, Launch):
            if everything or result.get("source") != entry.digest:
                described = {"source": entry.digest, "launch": entry.described}
                result = described | compiled(entry, target)
            op = module.OPS[row.partition(":")[0]]
            wrong += [f"{row} on {target}: {problem}" for problem in problems(op, entry, target, result)]
        rows.setdefault(row, {})[target] = result
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(written(rows), encoding="utf-8")
    return wrong


def written(rows: dict[str, Any]) -> str:
    """JSON with a line for each call and GPU, so that a diff shows which ones changed."""
    calls = []
    for row, entries in rows.items():
        lines = (f"   {json.dumps(target)}: {json.dumps(entry)}" for target, entry in entries.items())
        calls.append(f"  {json.dumps(row)}: {{\n" + ",\n".join(lines) + "\n  }")
    version = json.dumps(triton.__version__)
    return f'{{\n "triton": {version},\n "rows": {{\n' + ",\n".join(calls) + "\n }\n}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="name of a file of kernels/, without .py")
    parser.add_argument("--all", action="store_true", help="compile every entry again")
    given = parser.parse_args(arguments)
    wrong = []
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        for name in given.files or op_cases.modules():
            wrong += update(name, given.all)
            for row, entries in read(name).items():
                cells = (f"{t} {e.get('registers', 'torch')}" for t, e in entries.items())
                print(f"{row}\n    registers: {', '.join(cells)}")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
