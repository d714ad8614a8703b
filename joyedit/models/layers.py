"""Layers that the networks share, and no more."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from joyedit import ops

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes


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


def keeps_channels_last(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the weights of convolutions are kept with their channels last, and so the feature maps.

    In half precision on CUDA: there cuDNN's kernels for tensor cores read channels last, and contiguous
    tensors are transposed before and after; 3-D convolutions of contiguous ones PyTorch does not even give to
    cuDNN 9.8 to 9.14. In fp32, and by MIOpen, nothing asks for it. A CPU takes weights as they are stored.
    Not measured on a GPU. Source: PyTorch `aten/src/ATen/native/Convolution.cpp`.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return half and device.type == "cuda" and torch.version.hip is None


def lay_out(network: nn.Module, channels_last: bool) -> None:
    """Put the weights of all convolutions of a network in memory with their channels last, or contiguous."""
    for parameter in network.parameters():
        if parameter.ndim in CHANNELS_LAST:
            layout = CHANNELS_LAST[parameter.ndim] if channels_last else torch.contiguous_format
            parameter.data = parameter.data.to(memory_format=layout)


def layout_of_maps(weight: Tensor) -> torch.memory_format:
    """The memory format of feature maps that go through a convolution, weight (C_out, C_in, ...) with
    C_in > 1: that of the weight, so that neither is copied. On a CPU channels come last: norms read along
    them, large convolutions are a sixth faster, frames and tokens are views, and weights may be either."""
    layout = CHANNELS_LAST[weight.ndim]
    is_last = ops.kind_of(weight.device) == "cpu" or weight.is_contiguous(memory_format=layout)
    return layout if is_last else torch.contiguous_format
