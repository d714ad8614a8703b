"""Rotary position tables: functions of (positions, widths, device), cached by the caller."""

import torch
from torch import Tensor


def axis_angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """position * theta ** (-2 j / dim), j = 0 .. dim/2 - 1, in `dtype`. positions (N) -> (N, dim / 2)."""
    frequency = 1.0 / theta ** (
        torch.arange(0, dim, 2, dtype=dtype, device=positions.device)[: dim // 2] / dim
    )
    return torch.outer(positions.to(dtype), frequency)


def grid_rope(
    grid: tuple[int, int, int],
    dims: tuple[int, int, int],
    theta: float,
    device: torch.device | str = "cpu",
    first_frame: int = 0,
) -> tuple[Tensor, Tensor]:
    """cos and sin of a (T, H, W) token grid in row-major order, each (T * H * W, sum(dims) / 2), fp32.

    The head width is shared out among the three axes; each axis counts its positions from 0, frames from
    `first_frame`.
    """
    index = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid)).reshape(-1, 3)
    index = index + torch.tensor((first_frame, 0, 0), device=device)
    angles = torch.cat([axis_angles(index[:, axis], dim, theta) for axis, dim in enumerate(dims)], dim=-1)
    return angles.cos(), angles.sin()
