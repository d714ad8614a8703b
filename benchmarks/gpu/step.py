"""A whole guided denoising step of each system at its published size: see `systems.py`. Rows of each:

    eager           seconds, the host's seconds, peak of memory, share of the dense bf16 peak
    profile         what a step launches, and the shares of its time by groups of kernels, and idle
    graph           `eager` with the network replayed from a CUDA graph
    channels last   `eager` with the UNet's feature maps in that layout
    diffusers       the same of diffusers' network, with random weights of its own
    torch           `eager` with PyTorch's operations alone

Where figures cannot be had, `seconds` is None and `why` says so: too little memory, no diffusers.
"""

import contextlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._pytree import tree_leaves

from benchmarks.gpu.measuring import (
    META,
    NotHere,
    check_room,
    fill,
    host_seconds,
    operations,
    or_why,
    share_of_peak,
    with_peak_bytes,
)
from benchmarks.gpu.setting import Row, Setting
from benchmarks.gpu.systems import SYSTEMS, TINY, System
from benchmarks.op_cases import all_ops
from joyedit import ops
from joyedit.graphs import CudaCapture, GraphedCalls, copy_each
from joyedit.models.sd_unet import UNet2DConditionModel

LONGEST = 12  # kernels that a profile lists by name
# What a kernel computes, by its name: the first that fits. Ours begin with the name of their operation.
OPERATIONS = "|".join(sorted(all_ops(), key=len, reverse=True))
OURS = re.compile(rf"({OPERATIONS}|\w+?(?=_forward|_backward))\w*")
GROUPS = {
    "attention": r"attention|attn|flash|fmha|sdpa",
    "convolutions": r"fprop|convol|implicit|winograd|cudnn",
    "matrix products": r"gemm|cutlass|nvjet|cublas|splitK|^Cijk_|^sm\d+_xmma",
    "copies": r"^Mem(cpy|set)|copy_kernel|CatArray",
}


class Kernel(NamedTuple):
    name: str
    begin: float  # microseconds
    end: float


def rows(setting: Setting) -> Iterator[Row]:
    """In the order of their value: time may run out."""
    for kind, measure in KINDS.items():
        for name, system in (TINY if setting.dry else SYSTEMS).items():
            if kind != "channels last" or system.network is UNet2DConditionModel:
                yield f"{name}: {kind}", partial(or_why, with_room, measure, setting, system)


def with_room(measure: Callable[..., dict[str, Any]], setting: Setting, system: System) -> dict[str, Any]:
    check_room(system.network, system.config, system.dtype, setting)
    return measure(setting, system)


def eager(setting: Setting, system: System) -> dict[str, Any]:
    with ops.backend(setting.kernels):
        return figures(setting, system, system.ours(system, setting.device).whole)


def by_torch(setting: Setting, system: System) -> dict[str, Any]:
    with ops.backend("torch"):
        return figures(setting, system, system.ours(system, setting.device).whole)


def channels_last(setting: Setting, system: System) -> dict[str, Any]:
    step = system.ours(system, setting.device)
    step.network.to(memory_format=torch.channels_last)
    return figures(setting, system, step.whole)


def graph(setting: Setting, system: System) -> dict[str, Any]:
    """Raises RuntimeError where no graph was recorded."""
    calls = GraphedCalls(Again if setting.dry else CudaCapture)
    found = figures(setting, system, system.ours(system, setting.device, calls).whole)
    if not len(calls):
        raise RuntimeError("no graph was recorded, and the log says why")
    return found


def diffusers(setting: Setting, system: System) -> dict[str, Any]:
    name = system.network.__name__
    try:
        import diffusers as library

        cls = getattr(library, name)
    except ImportError:
        raise NotHere("diffusers is not installed") from None
    except AttributeError:
        raise NotHere(f"diffusers {library.__version__} has no {name}") from None
    network = made_by_diffusers(cls, system, setting.device)
    whole = system.theirs(system, network, setting.device)
    return {**figures(setting, system, whole), "diffusers": library.__version__}


def made_by_diffusers(cls: Any, system: System, device: torch.device) -> Any:
    """On the device and in its dtype from the start: its buffers must not be left on meta."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(system.dtype)
    try:
        with device:
            network = cls.from_config(system.config.to_dict())
    finally:
        torch.set_default_dtype(before)
    for name, parameter in network.named_parameters():
        if system.network.stays_fp32(name):
            parameter.data = parameter.data.float()
    return fill(network)


def figures(setting: Setting, system: System, whole: Callable[[], Tensor]) -> dict[str, Any]:
    """Of a step. Raises RuntimeError for a result that is not finite."""
    latents, peak = with_peak_bytes(whole, setting)
    if not latents.isfinite().all():
        raise RuntimeError("the step's result is not finite")
    seconds = setting.kernel_seconds(whole)
    count = operations(lambda: system.ours(system, META).predict(0))
    return {
        "seconds": seconds,
        "host_seconds": host_seconds(whole, setting),
        "peak_bytes": peak,
        "operations": count,
        "share_of_peak": share_of_peak(count, seconds, setting.device),
    }


def profile(setting: Setting, system: System) -> dict[str, Any]:
    whole = system.ours(system, setting.device).whole
    whole()
    return summary(launched(whole, setting))


def launched(function: Callable[[], Any], setting: Setting) -> list[Kernel]:
    """What a call launches on the device; in a dry run the operations of PyTorch, one within another.

    Raises RuntimeError where the profiler sees nothing.
    """
    is_cuda = setting.device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if is_cuda else ("cpu_op",)
    for _ in range(1 if setting.dry else 2):  # with the first one the profiler itself is loaded
        with torch.profiler.profile(activities=[activity]) as profiled:
            function()
            setting.finish()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    found = [
        Kernel(event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        for event in events
        if event.get("ph") == "X" and event.get("cat") in kinds
    ]
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return found


def summary(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """seconds: from the first kernel's begin to the last one's end; shares of it by groups; and by name the
    kernels that take most, with the seconds and number of all their launches."""
    span = max(k.end for k in kernels) - min(k.begin for k in kernels)
    groups, names, counts = Counter(), Counter(), Counter()
    busy, until = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.begin):
        groups[group(kernel.name)] += kernel.end - kernel.begin
        names[kernel.name] += kernel.end - kernel.begin
        counts[kernel.name] += 1
        busy += max(0.0, kernel.end - max(kernel.begin, until))
        until = max(until, kernel.end)
    shares = {name: time / span for name, time in groups.most_common()}
    longest = [
        {"name": name[:120], "group": group(name), "seconds": time / 1e6, "launches": counts[name]}
        for name, time in names.most_common(LONGEST)
    ]
    return {
        "seconds": span / 1e6,
        "launches": len(kernels),
        "shares": {**shares, "idle": 1 - busy / span},
        "longest": longest,
    }


def group(name: str) -> str:
    """What a kernel computes: the operation of ours, one of GROUPS, or "other"."""
    if (ours := OURS.fullmatch(name)) is not None:
        return ours[1]
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), "other")


class Again:
    """In the place of a capture in a dry run: what it records is computed again."""

    def __init__(self, device: torch.device):
        pass

    def in_turn(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def warm_up(self, run: Callable[[], Any]) -> Any:
        return run()

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        result = run()

        def replay() -> None:
            copy_each(tree_leaves(run()), tree_leaves(result))

        return result, replay

    def finish(self) -> None:
        pass


KINDS = {
    "eager": eager,
    "profile": profile,
    "graph": graph,
    "channels last": channels_last,
    "diffusers": diffusers,
    "torch": by_torch,
}
