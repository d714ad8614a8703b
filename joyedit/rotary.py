"""Rotary embedding and the norm of heads before it, in plain PyTorch: `ops.qk_norm_rope` of one tensor.

B batch   N tokens   H heads   E = D / H
"""

import torch
from torch import Tensor

from joyedit.convolutions import wide_dtype


def norm_rope(
    x: Tensor, weight: Tensor | None, rope: tuple[Tensor, Tensor] | None, eps: float, half_split: bool
) -> Tensor:
    out = x.to(wide_dtype(x)) if weight is None else _head_norm(x, weight, eps)
    if rope is not None:
        cos, sin = (t.unsqueeze(-2) for t in rope)
        if half_split:
            out = _turn_halves(out, cos, sin)
        else:
            out = _turn_neighbours(out, cos, sin, in_place=weight is not None)
    return out.to(x.dtype)


def _head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = wide_dtype(x)
    rows = x if len(weight) == x.shape[-1] else x.flatten(-2)
    # One pass without a tensor of squares.
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide)
    normed = rows * (length.square() / rows.shape[-1] + eps).rsqrt()
    return normed.mul_(weight.to(wide)).reshape(x.shape)


def _turn_neighbours(x: Tensor, cos: Tensor, sin: Tensor, in_place: bool) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())  # (B, N, H, E / 2)
    angle = torch.complex(cos, sin)
    return torch.view_as_real(pairs.mul_(angle) if in_place else pairs * angle).flatten(-2)


def _turn_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * torch.cat((cos, cos), dim=-1)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    return out
