"""What the areas of whole blocks and steps share: networks of random weights, and what a call of them costs.

Nothing here needs files: a network is built on the meta device, and each parameter is made where it runs, of
normal values that keep the scale of what passes. Operations are counted on the meta device too, since they
depend on shapes alone.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.setting import Setting
from benchmarks.roofline import GPUS
from joyedit import ops
from joyedit.checkpoints.network import Network, build_on_meta

META = torch.device("meta")
BESIDE = 4 * 10**9  # bytes of activations that must be free beside the weights of a network
SLOWER = {"PCIe", "NVL", "Laptop"}  # models with a smaller peak, sold under the names of the roofline


class NotHere(Exception):
    """Figures that cannot be had on this machine, which is no failure."""


def or_why(measure: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What it measures; on a machine with too little memory or without a library, why not."""
    try:
        return measure(*args)
    except (NotHere, torch.OutOfMemoryError) as reason:
        return {"seconds": None, "why": str(reason).splitlines()[0]}


def random_network(cls: type[Network], config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A network of ours, without gradients; what it keeps in fp32 stays so."""
    return filled(build_on_meta(cls, config).to(dtype), device)


def filled(network: nn.Module, device: torch.device) -> Any:
    """A network on the meta device, brought to another one with random weights in their dtypes."""
    return fill(network.to_empty(device=device))


def fill(network: nn.Module) -> Any:
    """Give a network random weights, where it is."""
    for name, parameter in network.eval().requires_grad_(False).named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.1)
    return network


def check_room(cls: type[Network], config: Any, dtype: torch.dtype, setting: Setting) -> None:
    """Raises NotHere for a network that will not fit the free memory of the device."""
    network = build_on_meta(cls, config).to(dtype)
    weights, free = sum(p.numel() * p.element_size() for p in network.parameters()), setting.free()
    beside = 0 if setting.dry else BESIDE
    if weights + beside > free:
        raise NotHere(f"needs {(weights + beside) / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=device, dtype=dtype).normal_()


def with_peak_bytes(function: Callable[[], Any], setting: Setting) -> tuple[Any, int | None]:
    """The result of a call, and the most memory that tensors held during it, weights and arguments among
    them; None on a CPU."""
    if setting.device.type != "cuda":
        return function(), None
    setting.finish()
    torch.cuda.reset_peak_memory_stats(setting.device)
    result = function()
    setting.finish()
    return result, torch.cuda.max_memory_allocated(setting.device)


def host_seconds(function: Callable[[], Any], setting: Setting) -> float:
    """Until a call has returned, whether or not the device is done. After about a thousand launches that the
    device has not begun, a launch waits for it."""
    setting.finish()
    begin = time.perf_counter()
    function()
    seconds = time.perf_counter() - begin
    setting.finish()
    return seconds


def operations(function: Callable[[], Any]) -> int:
    """Those of the matrix products, convolutions and attention in a call whose tensors are on META."""
    counter = FlopCounterMode(display=False)
    with ops.backend("torch"), counter:
        function()
    return counter.get_total_flops()


def share_of_peak(count: int, seconds: float, device: torch.device) -> float | None:
    """Of so many operations in a time. None for a device whose peak benchmarks.roofline does not know."""
    if device.type != "cuda":
        return None
    words = set(torch.cuda.get_device_name(device).replace("-", " ").split())
    peaks = (gpu.matrix for name, gpu in GPUS.items() if name in words and not words & SLOWER)
    peak = next(peaks, None)
    return None if peak is None else count / seconds / peak
