"""The fused operations timed: `python -m benchmarks.ops --provider torch,compile,triton`.

On a CUDA or ROCm device, every case of `op_cases` is timed as plain torch operations (`torch`), as those
compiled by torch.compile (`compile`) and as the Triton kernel (`triton`); with the bytes of the fused
operation, each time becomes bytes per second. Before it is timed, each provider's result is held against
float64: one that is more than twice as far from it as the plain operations in the case's own dtype is not
timed but written down as failed, like one that raises, and the exit status at the end is 1. Of a large
attention, whose scores in float64 would take tens of gigabytes, that are the heads that share the first one
of k. The results are written after each case.

Without a device, `--overhead` measures what a call costs the host before a kernel is launched: the choice in
joyedit.ops, torch.library, shapes, strides and tiles. The launch itself is left out (its place in a kernel
takes a function that does nothing), so the figure is a lower bound; on a device it is included. Beside it:
the same call of the plain torch operations, on tensors so small that the host is all there is.

Results: results/kernels/timings/<device>.json, results/kernels/overhead.json.
"""

import argparse
import json
import re
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.op_cases import Case, all_cases, all_ops, made
from benchmarks.side_by_side import UnequalResults, machine
from joyedit import ops

RESULTS = Path(__file__).resolve().parent / "results" / "kernels"
PROVIDERS = ("torch", "compile", "triton")
MOST_SCORES = 2**28  # of an attention, that `check` computes for all heads: 2 GiB in float64


def call(case: Case, provider: str, compiler: str = "inductor") -> Callable[..., Any]:
    """The operation of a case as a provider computes it: a backend of joyedit.ops, or "compile", the plain
    operations compiled by torch.compile. What was compiled before is forgotten."""
    operation, backend = getattr(ops, case.op), provider
    if provider == "compile":
        torch.compiler.reset()
        operation, backend = torch.compile(operation, dynamic=False, backend=compiler), "torch"

    def chosen(*args):
        with ops.backend(backend):
            return operation(*args)

    return chosen


def floats(out: Any) -> list[Tensor]:
    return [t for t in (out if isinstance(out, tuple) else (out,)) if t.is_floating_point()]


def first_heads(tensors: Tensor | tuple[Tensor, ...], count: int) -> Any:
    """Of each (B, N, H, E)."""
    if isinstance(tensors, tuple):
        return tuple(first_heads(t, count) for t in tensors)
    return tensors[:, :, :count]


def widened(args: Any) -> Any:
    """In float64."""
    return tree_map_only(Tensor, lambda a: a.double() if a.is_floating_point() else a, args)


def check(case: Case, provider: str, function: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """Largest error relative to the scale of the exact result. Raises UnequalResults."""
    operation, narrow = getattr(ops, case.op), args
    found = [out.clone() for out in floats(function(*args))]  # into which the next one may write again
    if case.op == "attention":
        q, k, v, *options = args
        batch, _, heads, _ = tree_leaves(q)[0].shape
        groups = tree_leaves(k)[0].shape[2]
        queries, keys = (sum(x.shape[1] for x in tree_leaves(part)) for part in (q, k))
        if batch * heads * queries * keys > MOST_SCORES:
            share = heads // groups
            found = [first_heads(out, share) for out in found]
            narrow = (first_heads(q, share), first_heads(k, 1), first_heads(v, 1), *options)
    with ops.backend("torch"):
        exact, plain = floats(operation(*widened(narrow))), floats(operation(*narrow))
    return worst_error(f"{case.title}: {provider}", found, plain, exact)


def worst_error(
    title: str, found: Iterable[Tensor], plain: Iterable[Tensor], exact: Iterable[Tensor]
) -> float:
    """Largest error of what was found, relative to the scale of the exact result. Raises UnequalResults
    where it is more than twice that of the plain computation, and a unit in the last place."""
    worst = 0.0
    for ours, rounded, wanted in zip(found, plain, exact, strict=True):
        if not wanted.numel():
            continue
        scale = wanted.abs().max().item() or 1.0
        error, plain_error = ((t.double() - wanted).abs().max().item() / scale for t in (ours, rounded))
        if not error <= 2 * plain_error + torch.finfo(ours.dtype).eps:
            raise UnequalResults(f"{title} is {error:.1e} from float64, torch is {plain_error:.1e}")
        worst = max(worst, error)
    return worst


def fused_bytes(args: tuple[Any, ...], results: Any) -> int:
    """What the fused operation moves: each argument is read once, each result written once."""
    from benchmarks.roofline import once

    return once(args, floats(results))


def timed(function: Callable[..., Any], args: tuple[Any, ...]) -> float:
    """Median seconds of a call on a device whose L2 cache was emptied before."""
    from triton.testing import do_bench

    return do_bench(lambda: function(*args), warmup=50, rep=200, return_mode="median") / 1000


def measure(cases: list[Case], providers: list[str]) -> Iterator[dict[str, Any]]:
    """Times of every case and provider on the device: all there are, after each case. Prints a line for
    each."""
    rows = {}
    for case in cases:
        args = case.make("cuda")
        row: dict[str, Any] = {}
        for provider in providers:
            try:
                function = call(case, provider)
                error = check(case, provider, function, args)
                seconds = timed(function, args)
                fused = fused_bytes(args, function(*args))
            except Exception as wrong:
                row[provider] = {"failed": f"{type(wrong).__name__}: {wrong}"}
            else:
                figures = {"seconds": seconds, "bytes_per_second": fused / seconds, "error": error}
                row[provider] = {"failed": None, **figures}
        rows[case.title] = row
        print(f"{case.title}: {'; '.join(cell(name, result) for name, result in row.items())}")
        yield {"machine": machine(), "device": torch.cuda.get_device_name(), "rows": rows}


def cell(name: str, result: dict[str, Any]) -> str:
    if result["failed"]:
        return f"{name} FAILED ({result['failed'].splitlines()[0]})"
    return f"{name} {1e6 * result['seconds']:.1f} us, {result['bytes_per_second'] / 1e9:.0f} GB/s"


def host_seconds(function: Callable[..., Any], args: tuple[Any, ...], calls: int) -> float:
    """Median over rounds of the CPU seconds of one call, which other processes disturb little."""
    rounds = []
    for _ in range(9):
        begin = time.thread_time()
        for _ in range(calls):
            function(*args)
        rounds.append((time.thread_time() - begin) / calls)
    return statistics.median(rounds)


def overhead(names: Iterable[str], calls: int = 500) -> dict[str, Any]:
    """Microseconds of host work of a call of each operation."""
    from triton.runtime.jit import JITFunction

    has_device = torch.cuda.is_available()
    h100 = types.SimpleNamespace(major=9, minor=0)
    properties = torch.cuda.get_device_properties if has_device else lambda device=None: h100
    rows = {}
    for name in names:
        args = made(all_ops()[name].small, "cuda" if has_device else "cpu")
        operation = getattr(ops, name)
        with ops.backend("torch"):
            plain = host_seconds(operation, args, calls)
        with (
            ops.backend("triton"),
            mock.patch.object(ops, "_interpreted", True),
            mock.patch.object(JITFunction, "run", JITFunction.run if has_device else lambda *a, **k: None),
            mock.patch.object(torch.cuda, "get_device_properties", properties),
        ):
            fused = host_seconds(operation, args, calls)
        rows[name] = {"triton": round(1e6 * fused, 1), "torch": round(1e6 * plain, 1)}
        print(f"{name}: {1e6 * fused:.1f} us on the host, plain torch {1e6 * plain:.1f} us")
    return {"machine": machine(), "launch_included": has_device, "microseconds": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--provider", default=",".join(PROVIDERS), help="separated by commas")
    parser.add_argument("--op", action="append", help="only this operation (may be repeated)")
    parser.add_argument("--overhead", action="store_true", help="measure the host's work instead")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    given = parser.parse_args(arguments)
    providers = given.provider.split(",")
    if unknown := set(providers) - set(PROVIDERS):
        parser.error(f"unknown provider {', '.join(unknown)}: there are {', '.join(PROVIDERS)}")
    cases = [case for case in all_cases() if given.op is None or case.op in given.op]
    if given.overhead:
        found, path = [overhead(given.op or all_ops())], RESULTS / "overhead.json"
    elif torch.cuda.is_available():
        found = measure(cases, providers)
        path = RESULTS / "timings" / (re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower() + ".json")
    else:
        print("no GPU: only --overhead can be measured here", file=sys.stderr)
        return 1
    path = given.out or path
    path.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with torch.set_grad_enabled(given.overhead):
        for results in found:
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path)
    failed = [
        f"{title}: {name}"
        for title, row in results.get("rows", {}).items()
        for name in row
        if row[name]["failed"]
    ]
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
