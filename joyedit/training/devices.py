"""Where a training computes."""

import torch

from joyedit.pipelines.placement import accelerator_device
from joyedit.training.settings import Settings


def device_of(settings: Settings) -> torch.device:
    """Raises ValueError for what is no device."""
    if settings.device == "auto":
        return accelerator_device() or torch.device("cpu")
    try:
        return torch.device(settings.device)
    except RuntimeError:
        raise ValueError(f"device={settings.device!r}: must be auto, cpu, cuda, cuda:1, mps") from None
