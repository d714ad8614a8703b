"""The kernels compiled ahead of time for eight GPUs, without one: `python -m benchmarks.kernels_aot`.

Every case of `op_cases` is called through joyedit.ops with the launch of a kernel replaced: what would have
been launched, with the tiles chosen for that GPU and the specialisation of these very arguments, is compiled
instead. So the table cannot differ from what the systems launch. Recorded of each: registers, shared memory,
spills, and counts of machine instructions, or in their place why an operation refuses a GPU (`joyedit.ops`
then uses PyTorch there) or why the compiler fails. `compiled_kernels` reads that, and names the problems.

Results: results/kernels/<Triton>/<file of kernels/>.json, one folder for each release of Triton that was
installed when this ran, by call and GPU, with a hash of what was compiled; only entries whose hash changed
are compiled again (`--all`: every one). Commit them: a change that costs registers shows in the diff. The
hash does not depend on Triton, so any release can tell which results of the others are out of date.

Arguments: files of kernels/ to bring up to date (default: all). `--check` compiles them and compares with
what is committed, and of the other files says which results are out of date; it writes nothing. The status is
1 where something differs or the newest Triton recorded has a problem; those of older ones are data.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks import op_cases
from benchmarks.compiled_kernels import RESULTS, all_problems, read, versions
from benchmarks.op_cases import Case
from joyedit import ops

VERSION = ".".join(triton.__version__.split(".")[:2])
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 86, 89, 90, 100, 120)}
TARGETS |= {arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")}
# No paths of this machine in the code. And Triton 3.4 calls ROCm's linker, where later ones have their own:
# nothing that is linked runs here.
COMPILING = {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_HIP_LLD_PATH": shutil.which("true") or ""}
# Counted in every kernel where they occur, so that a change of them shows in the diff.
COUNTED = {
    "cuda": (r"LDG\.E\.(\w+\.)*128", r"STG\.E\.(\w+\.)*128", "LDGSTS", "UTMALDG", "HMMA", "HGMMA", "UTCHMMA"),
    "hip": (r"(global|buffer)_load_(b128|dwordx4)", r"(global|buffer)_store_(b128|dwordx4)", "v_mfma"),
}
# Counted too: products of whole numbers. Not in the hash of results, which most of them are older than.
COUNTED_WHOLE = {"cuda": ("IMMA", "IGMMA", "UTCIMMA"), "hip": ()}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel and all that the compiler is told about one launch of it."""

    kernel: JITFunction
    source: ASTSource
    options: dict[str, Any]
    described: str  # types of the arguments and values of the constants
    digest: str


Entries = dict[str, Launch | str]  # GPU -> what is launched there, or why nothing is
Job = tuple[Launch, str, Mapping[str, Any]]  # a launch, a GPU, and what was recorded of them


@contextlib.contextmanager
def launches_on(name: str, version: str = triton.__version__) -> Iterator[list[Launch]]:
    """Within it, kernels are not launched but collected, as if this machine had the GPU of that name, and
    that Triton."""
    target, found = TARGETS[name], []

    def collect(kernel: JITFunction, *args, grid, warmup, **kwargs):
        found.append(launch(kernel, target, args, kwargs))

    major, minor = divmod(target.arch, 10) if target.backend == "cuda" else (9, 5 if "950" in name else 4)
    properties = types.SimpleNamespace(gcnArchName=name, multi_processor_count=128, major=major, minor=minor)
    with (
        mock.patch.object(JITFunction, "run", collect),
        mock.patch.object(triton, "__version__", version),
        mock.patch.object(torch.version, "hip", "7.0" if target.backend == "hip" else None),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (major, minor)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
        mock.patch.object(ops, "_interpreted", True),
        ops.backend("triton"),
    ):
        yield found


def launch(kernel: JITFunction, target: GPUTarget, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """As Triton's own launch specialises a kernel on its arguments."""
    backend, bind = binder(kernel, target)
    bound, specialization, _ = bind(*args, **kwargs)
    kinds = [kind for kind, _ in specialization]
    parts = list(leaves(kinds, [hint for _, hint in specialization], list(bound.values())))
    signature = dict(zip(bound, kinds, strict=True))
    constants = {path: value for path, kind, _, value in parts if kind == "constexpr"}
    attributes = {
        path: backend.parse_attr(hint) for path, kind, hint, _ in parts if kind != "constexpr" and hint
    }
    source = ASTSource(kernel, signature, constants, attributes)
    chosen = {key: kwargs[key] for key in sorted(kwargs) if key not in signature}
    described = ", ".join(str(kind) for kind in kinds if kind != "constexpr")
    named = {kernel.params[path[0]].name: value for path, value in constants.items()}
    described += "".join(f", {name}={value}" for name, value in [*named.items(), *chosen.items()])
    told = (code(kernel), kinds, sorted(constants.items()), known(parts), chosen, target.arch)
    digest = hashlib.sha256(repr(told).encode()).hexdigest()[:16]
    return Launch(kernel, source, backend.parse_options(kwargs).__dict__, described, digest)


@functools.cache
def binder(kernel: JITFunction, target: GPUTarget) -> tuple[Any, Callable[..., Any]]:
    backend = make_backend(target)
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def leaves(
    kinds: Any, hints: Any, values: Any, path: tuple[int, ...] = ()
) -> Iterator[tuple[tuple[int, ...], Any, Any, Any]]:
    """(path, type, what is known of the value, value) of every argument, and of every element of a tuple."""
    for i, (kind, hint, value) in enumerate(zip(kinds, hints, values, strict=True)):
        if isinstance(kind, tuple):
            yield from leaves(kind, hint, value, (*path, i))
        else:
            yield (*path, i), kind, hint, value


def known(parts: list[tuple[tuple[int, ...], Any, Any, Any]]) -> list[tuple[Any, ...]]:
    """Which values are multiples of 16, and which tensors are within 2 GiB: all that any release of Triton
    compiles for (3.4 does not ask for the second)."""
    found = []
    for path, kind, hint, value in parts:
        if kind != "constexpr" and hint is not None:
            small = isinstance(value, Tensor) and value.untyped_storage().nbytes() < 2**31
            found.append((path, "D" in hint, small))
    return found


def code(kernel: JITFunction) -> list[str]:
    """Source of a kernel, and of the functions and constants that it uses in any file of kernels/."""
    found: dict[JITFunction, str] = {}
    constants = set()

    def visit(function: JITFunction) -> None:
        found[function] = function.src
        names, seen = function.fn.__code__.co_names, function.fn.__globals__
        values = [seen.get(name) for name in names]
        modules = [value for value in values if isinstance(value, types.ModuleType)]
        values += [getattr(module, name, None) for module in modules for name in names]
        for value in values:
            if isinstance(value, JITFunction) and value not in found and not of_triton(value):
                visit(value)
            elif isinstance(value, tl.constexpr):
                constants.add(repr(value))

    visit(kernel)
    return sorted([*found.values(), *constants])


def of_triton(function: JITFunction) -> bool:
    return function.fn.__module__.partition(".")[0] == "triton"


def call(case: Case) -> None:
    """Make the call of a case, and its backward's, on memory that is never read."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in case.make("cpu", fill=False)]
    inputs = [a.requires_grad_() for a in args if case.trained and isinstance(a, Tensor)]
    out = getattr(ops, case.op)(*args)
    if case.trained:
        out = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
        torch.autograd.grad(out, inputs, [torch.empty_like(t) for t in out])


def table(module: Any, version: str = triton.__version__) -> dict[str, Entries]:
    """Title of a call and name of its kernel -> GPU -> launch under that Triton. A row whose launches are all
    in earlier rows is left out."""
    rows, seen = {}, set()
    for case in module.CASES:
        if not case.compiled:
            continue
        made: dict[str, Entries] = {}
        for target in TARGETS:
            try:
                with launches_on(target, version) as found:
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


def in_children(todo: Mapping[str, Job], processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, what `compiled` says) of every job in order of completion, or why it fails. So many processes
    compile: if one aborts, only the job in hand fails."""
    fork = multiprocessing.get_context("fork")  # nothing to pickle, and torch and Triton are loaded
    waiting, running = list(reversed(todo)), {}
    with tempfile.TemporaryDirectory() as folder:

        def start(key: str) -> None:
            ours, theirs = fork.Pipe()
            said = Path(folder, f"{len(waiting)}.txt")
            child = fork.Process(target=work, args=(theirs, said, todo), daemon=True)
            child.start()
            theirs.close()
            ours.send(key)
            running[ours] = key, child, said

        while waiting or running:
            while waiting and len(running) < processes:
                start(waiting.pop())
            for ours in wait(list(running)):
                key, child, said = running.pop(ours)
                try:
                    result = ours.recv()
                except EOFError:
                    child.join()
                    code = child.exitcode or 0
                    reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                    yield key, {"failed": f"{reason}: {last_words(said)}"}
                    continue
                ours.send(waiting[-1] if waiting else None)
                if waiting:
                    running[ours] = waiting.pop(), child, said
                yield key, result


def work(theirs: Connection, said: Path, todo: Mapping[str, Job]) -> None:
    """A child: key after key comes in, and what `compiled` says or the reason of its failure goes out. What
    the compiler prints goes to a file."""
    printed = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 2)
    while (key := theirs.recv()) is not None:
        os.truncate(printed, 0)
        try:
            result = compiled(*todo[key])
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            words = last_words(said)
            result = {"failed": f"{reason}: {words}" if words else reason}
        theirs.send(result)


def last_words(said: Path) -> str:
    """What a failed compiler printed: the assertion or the first error, without paths and line numbers."""
    text = said.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"Assertion .*|LLVM ERROR: .*|(?<=error: ).*", text)
    return found[0].strip() if found else ""


def compiled(one: Launch, target: str, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What came out: registers of a thread, shared memory, spills, counts of instructions, and a hash of
    these and the machine code. Where that is the recorded one the code is not disassembled, which takes half
    of the time."""
    backend = TARGETS[target].backend
    with mock.patch.dict(os.environ, COMPILING):
        kernel = triton.compile(one.source, target=TARGETS[target], options=one.options)
    code = kernel.asm["amdgcn"].encode() if backend == "hip" else kernel.asm["cubin"]

    def hashed(figures: dict[str, Any]) -> str:
        told = repr((COUNTED[backend], kernel.metadata.shared, kernel.metadata.num_warps, figures))
        return hashlib.sha256(code + told.encode()).hexdigest()[:16]

    known = {key: recorded[key] for key in recorded if key not in ("source", "launch", "binary")}
    if recorded.get("binary") == hashed(known):
        return {**known, "binary": recorded["binary"]}
    registers, spills, instructions = (parsed if backend == "hip" else disassembled)(code)
    counts = {}
    for pattern in (*COUNTED[backend], *COUNTED_WHOLE[backend]):
        if count := sum(re.match(pattern, word) is not None for word in instructions):
            counts[pattern] = count
    figures = {
        "registers": registers,
        "spills": spills,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": {"all": len(instructions), **counts},
    }
    return {**figures, "binary": hashed(figures)}


def parsed(code: bytes) -> tuple[int, int, list[str]]:
    """AMD's: registers, spills (registers, bytes of memory private to a thread) and all instructions."""
    text = code.decode()

    def stated(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

    spills = sum(map(stated, ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")))
    return stated("vgpr_count"), spills, re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)


def disassembled(cubin: bytes) -> tuple[int, int, list[str]]:
    """NVIDIA's: registers, spills (bytes of stack and local memory, and the instructions that use it) and all
    instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [CUOBJDUMP, "-res-usage", "-sass", path]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    local = sum(word.startswith(("STL", "LDL")) for word in instructions)
    return int(usage[1]), int(usage[2]) + int(usage[3]) + local, instructions


def stale(name: str, version: str = VERSION) -> list[str]:
    """Entries of results/kernels/<version>/<name>.json that are not of the kernels as they are."""
    recorded = read(name, version, RESULTS)
    rows = table(op_cases.modules()[name], f"{version}.0")
    old = [f"{row}: is no longer launched" for row in recorded if row not in rows]
    for row, entries in rows.items():
        for target, entry in entries.items():
            was = recorded.get(row, {}).get(target, {})
            now = {"refused": entry} if isinstance(entry, str) else {"source": entry.digest}
            if not now.items() <= was.items():
                old.append(f"{row} on {target}")
    return old


def made(name: str, recorded: Mapping[str, Any], again: bool, processes: int) -> dict[str, Any]:
    """Rows of one file of kernels/ as they are now: `recorded` where that is of the same code, the rest, or
    all of it `again`, compiled."""
    rows, todo = table(op_cases.modules()[name]), {}
    done = {e["source"]: e for entries in recorded.values() for e in entries.values() if "source" in e}
    done = {} if again else done
    for row, entries in rows.items():
        for target, entry in entries.items():
            if isinstance(entry, Launch) and entry.digest not in done:
                todo[entry.digest] = entry, target, recorded.get(row, {}).get(target, {})
    bar = tqdm(in_children(todo, processes), name, len(todo), disable=None, leave=False, dynamic_ncols=True)
    for digest, result in bar:
        done[digest] = {"source": digest, "launch": todo[digest][0].described, **result}
    return {
        row: {t: {"refused": e} if isinstance(e, str) else done[e.digest] for t, e in entries.items()}
        for row, entries in rows.items()
    }


def update(name: str, again: bool = False, processes: int = 2) -> None:
    """Compile what changed in one file of kernels/, and write its results."""
    rows = made(name, read(name, VERSION, RESULTS), again, processes)
    (RESULTS / VERSION).mkdir(parents=True, exist_ok=True)
    (RESULTS / VERSION / f"{name}.json").write_text(written(rows), encoding="utf-8")


def check(name: str, processes: int = 2) -> list[str]:
    """Compile one file of kernels/, and name the differences from its results."""
    committed = read(name, VERSION, RESULTS)
    now = made(name, committed, True, processes)
    found = [f"{row}: is no longer launched" for row in committed if row not in now]
    for row, entries in now.items():
        for target, result in entries.items():
            was = committed.get(row, {}).get(target, {})
            # Compilers order instructions now so, now so: what counts is what the code takes and holds.
            keys = sorted(k for k in {*was, *result} - {"binary"} if was.get(k) != result.get(k))
            parts = (f"{key} {was.get(key)}, now {result.get(key)}" for key in keys)
            found += [f"{row} on {target}: {'; '.join(parts)}"] if keys else []
    return found


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
    parser.add_argument("--check", action="store_true", help="compare with what is committed, write nothing")
    parser.add_argument("--processes", type=int, default=2, help="so many compilers at a time (default 2)")
    given = parser.parse_args(arguments)
    every = list(op_cases.modules())
    files = given.files or every
    wrong = []
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        for name in files:
            if given.check:
                wrong += check(name, given.processes)
            else:
                update(name, given.all, given.processes)
    if given.check:
        wrong += [f"out of date: {line}" for name in every if name not in files for line in stale(name)]
    for name in files:
        for row, target, what in all_problems(name, VERSION, RESULTS):
            found = f"{row} on {target}: {what}"
            print(found)
            wrong += [found] if VERSION == versions(RESULTS)[-1] else []
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
