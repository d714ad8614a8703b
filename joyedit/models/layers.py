"""Layers that the networks share, and no more."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from joyedit import ops


class Linear(nn.Linear):
    """nn.Linear whose weight may be stored narrower than its input; it is upcast where it is used."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose weight may be stored narrower than its input; it is upcast where it is used."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.conv2d(input, self.weight, self.bias, self.stride, self.padding)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, statistics in fp32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """LayerNorm with learned scale and shift, statistics in fp32."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class GroupNorm(nn.Module):
    """GroupNorm with learned scale and shift, statistics in fp32. x (B, C, ...)."""

    def __init__(self, dim: int, groups: int, eps: float):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.weight, self.bias, self.groups, self.eps)


class GroupNormSiLU(GroupNorm):
    """silu(GroupNorm(x))."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.groups, self.eps)


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, Linear; the names are those of the Diffusers checkpoints."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(dim, hidden_dim), nn.Identity(), Linear(hidden_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class GELUProjection(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.proj = Linear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_gelu(x, self.proj.weight, self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Linear, SiLU, Linear on a sinusoidal embedding; the names are those of the Diffusers checkpoints."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.linear_1 = Linear(in_dim, dim)
        self.linear_2 = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoidal_embedding(timestep: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """[cos(t f), sin(t f)] with f_i = max_period ** (-2 i / dim), in fp32. timestep (B) -> (B, dim)."""
    half = dim // 2
    order = torch.arange(half, dtype=torch.float32, device=timestep.device)
    exponent = -math.log(max_period) * order / half  # rounded in the reference's order
    angle = timestep.float()[:, None] * exponent.exp()[None]
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
