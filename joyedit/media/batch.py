"""What tokenizers and processors return."""

from typing import Any, Self

import torch
from torch import Tensor


class Batch(dict):
    """What tokenizers and processors return: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {sorted(self)}") from None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the tensors to `device`; those of floating point also to `dtype`. In place, returns itself."""
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(device, dtype if value.is_floating_point() else None)
        return self
