"""Products with weights that stay as they are, and are stored narrower than what they are multiplied with.

What a stored weight means is made where it is used. A gradient needs it once more; PyTorch would keep it
until then, wide, for all layers at once. Here it is made again: what is kept is what is stored.

O outputs   I inputs
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Meant = Callable[..., Tensor]  # (*stored, dtype) -> the weight (O, I) in that dtype


def linear(x: Tensor, bias: Tensor | None, meant: Meant, *stored: Tensor) -> Tensor:
    """F.linear(x, meant(*stored, x.dtype), bias) for x (..., I), whose gradient is that of x alone."""
    bias = None if bias is None else bias.to(x.dtype)
    wanted = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
    if not wanted or any(t is not None and t.requires_grad for t in (bias, *stored)):
        return F.linear(x, meant(*stored, x.dtype), bias)
    return _Linear.apply(x, bias, meant, *stored)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, meant: Meant, *stored: Tensor) -> Tensor:
        ctx.meant = meant
        ctx.save_for_backward(*stored)
        return F.linear(x, meant(*stored, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), stored = gradients, ctx.saved_tensors
        return gradient @ ctx.meant(*stored, gradient.dtype), *[None] * (2 + len(stored))
