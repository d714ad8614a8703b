"""What the machine is and what it can do at best: the figures that all others are read against."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from benchmarks import side_by_side
from benchmarks.gpu.setting import Row, Setting

CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit")


def described(setting: Setting) -> dict[str, Any]:
    """Name, memory and versions; what is not there is None."""
    found = {
        **side_by_side.machine(),
        "triton": next(filter(None, map(side_by_side.version, ("triton", "pytorch-triton"))), None),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }
    if setting.device.type != "cuda":
        return {**found, "device": "cpu", "memory": None, "capability": None, "driver": None}
    gpu = torch.cuda.get_device_properties(setting.device)
    return {
        **found,
        "device": gpu.name,
        "memory": gpu.total_memory,
        "capability": f"{gpu.major}.{gpu.minor}",
        "driver": asked(setting, "driver_version").get("driver_version"),
    }


def asked(setting: Setting, *fields: str) -> dict[str, str]:
    """What nvidia-smi says of the device; nothing where it is not installed or does not answer."""
    if setting.device.type != "cuda":
        return {}
    uuid = getattr(torch.cuda.get_device_properties(setting.device), "uuid", None)
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    command += [] if uuid is None else [f"--id=GPU-{uuid}"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        return dict(zip(fields, done.stdout.splitlines()[0].split(", "), strict=True))
    return {}


def rows(setting: Setting) -> Iterator[Row]:
    yield "device", lambda: device(setting)
    yield "copy", lambda: copy(setting)
    yield "matrix product", lambda: product(setting)
    from benchmarks.gpu.correctness import sized
    from benchmarks.op_cases import all_cases

    for case in all_cases():
        if case.op == "attention":
            yield (
                f"PyTorch's {case.title}",
                lambda case=case: attention(setting, *sized(case, setting).make(setting.device)),
            )


def device(setting: Setting) -> dict[str, Any]:
    """As it waits. Clocks in MHz, power in W."""
    found: dict[str, Any] = {"clocks": asked(setting, *CLOCKS)}
    if setting.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(setting.device)
        found |= {"processors": gpu.multi_processor_count, "l2_bytes": getattr(gpu, "L2_cache_size", None)}
    return found


def copy(setting: Setting) -> dict[str, Any]:
    """Bytes per second, read and written, of a copy much larger than the caches."""
    count = 2**16 if setting.dry else 2**31
    source = torch.zeros(count, dtype=torch.int8, device=setting.device)
    target = torch.empty_like(source)
    seconds = setting.kernel_seconds(lambda: target.copy_(source))
    return {"bytes": 2 * count, "seconds": seconds, "bytes_per_second": 2 * count / seconds}


def product(setting: Setting) -> dict[str, Any]:
    """Operations per second of a square product: alone, and as one of many, when the device is warm and its
    clocks are what it holds."""
    size = 64 if setting.dry else 8192
    a, b = (torch.randn(size, size, dtype=setting.half, device=setting.device) for _ in "ab")
    seconds = setting.kernel_seconds(lambda: a @ b)
    among_many = setting.call_seconds(lambda: a @ b, budget=1.0)
    for _ in range(1 if setting.dry else 500):
        a @ b
    clocks = asked(setting, *CLOCKS)  # while these are being computed
    operations = 2 * size**3
    return {
        "size": size,
        "seconds": seconds,
        "operations_per_second": operations / seconds,
        "operations_per_second_warm": operations / among_many,
        "clocks": clocks,
    }


def attention(setting: Setting, *args: Any) -> dict[str, Any]:
    """Which of its implementations PyTorch takes for a call of ours, and the kernel that takes most time."""
    from benchmarks.gpu.calls import joined, stock

    q, k, v, is_causal, options = joined(*args)[0]
    choice = torch._fused_sdp_choice(q, k, v, is_causal=is_causal, **options)
    return {
        "backend": SDPBackend(choice).name,
        "kernel": longest_kernel(setting, lambda: stock(q, k, v, is_causal, options)),
    }


def longest_kernel(setting: Setting, function: Callable[[], Any]) -> str | None:
    """Its name; None where the profiler is not allowed to see the device."""
    on_gpu = setting.device.type == "cuda"
    function()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        function()
        setting.finish()
    kernels = [e for e in seen.key_averages() if (e.device_type == torch.autograd.DeviceType.CUDA) == on_gpu]
    time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return max(kernels, key=lambda e: getattr(e, time)).key if kernels else None
