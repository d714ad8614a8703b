"""Where a training computes."""

import os

import torch

from joyedit.pipelines.placement import accelerator_device
from joyedit.training.processes import started
from joyedit.training.settings import Settings


def device_of(settings: Settings) -> torch.device:
    """Of several processes each has its own. Raises ValueError for what is no device, and for one that all
    would share."""
    if settings.device == "auto":
        return of_this_process(accelerator_device() or torch.device("cpu"))
    try:
        device = torch.device(settings.device)
    except RuntimeError:
        raise ValueError(f"device={settings.device!r}: must be auto, cpu, cuda, cuda:1, mps") from None
    if started().several and device.index is not None:
        raise ValueError(f"device={settings.device!r}: several processes have one each: say {device.type!r}")
    return of_this_process(device)


def of_this_process(device: torch.device) -> torch.device:
    if not started().several or device.type == "cpu":
        return device
    own = torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))
    torch.accelerator.set_device_index(own)
    return own
