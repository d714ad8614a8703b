"""Where a training, or a process of several, computes."""

import os

import torch

from joyedit.pipelines.placement import accelerator_device
from joyedit.training.processes import started


def device_of(name: str) -> torch.device:
    """Of several processes each has its own. Raises ValueError for what is no device, for one that all would
    share, and where there are fewer than processes."""
    if name == "auto":
        return of_this_process(accelerator_device() or torch.device("cpu"))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: must be auto, cpu, cuda, cuda:1, mps") from None
    if started().several and device.index is not None:
        raise ValueError(f"device={name!r}: several processes have one each: say {device.type!r}")
    return of_this_process(device)


def sees_one_alone(count: int) -> bool:
    """Whether who started the processes has shown each a device of its own, and no other."""
    shown = (os.environ.get(f"{kind}_VISIBLE_DEVICES", "") for kind in ("CUDA", "HIP", "ROCR"))
    return count == 1 and any(one and "," not in one for one in shown)


def of_this_process(device: torch.device) -> torch.device:
    if not started().several or device.type == "cpu":
        return device
    count = torch.accelerator.device_count()
    own = torch.device(device.type, 0 if sees_one_alone(count) else int(os.environ.get("LOCAL_RANK", 0)))
    if own.index >= count:
        raise ValueError(
            f"device={device.type!r}: each process has one of its own, and this machine has {count}: start "
            f"no more with torchrun --nproc-per-node"
        )
    torch.accelerator.set_device_index(own)
    return own
