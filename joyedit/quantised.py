"""Weights that are stored in eight bits with scales, and read where they are used.

Two forms, as ComfyUI writes them; Q (O, I) is what is stored, s the scales, W the weight that is meant:

    fp8            W = Q s, one scale for the whole weight
    int8_convrot   W = (Q s) R, one scale for each row; R rotates groups of inputs, so that what stands out in
                   one of them is spread over its group. int8 without a rotation is the same with groups of 1

R of a group of 4 is H = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2, of 4 times as many
inputs the Kronecker product of that with H: symmetric, and its own inverse.

A weight stays stored as it is. Reading `.weight` of a layer gives a `QuantisedWeight`, whose `to(dtype)` is
the weight itself, computed in fp32 and rounded once; `ops.linear` and its like ask for it. As (Q R) s it has
sums of whole numbers, which are exact, so that every device gives the same.

O outputs   I inputs   G inputs that are rotated together, a power of 4
Source: leejet/stable-diffusion.cpp `docs/int8_convrot.md`; Comfy-Org/comfy-kitchen, whose int8 numbers and
scales are the same.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from joyedit import ops

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE = "weight_scale"  # the parameter with the scales, (O, 1) or (1, 1)
GROUP = 256  # of published files
# Elements of a weight that are rebuilt at a time: what a cache holds, and what keeps a GPU busy.
CPU_BLOCK, GPU_BLOCK = 2**18, 2**25
LEAST_SCALE = 1e-30  # of rows of zeros


class QuantisedWeight:
    """A weight (O, I) as `ops` takes one. dtype: that of the network it belongs to."""

    ndim, requires_grad = 2, False

    def __init__(self, stored: Tensor, scale: Tensor, group: int, dtype: torch.dtype):
        """stored (O, I) int8 or fp8, scale (O, 1) or (1, 1) fp32, group: G, 1 where nothing is rotated."""
        self.stored, self.scale, self.group, self.dtype = stored, scale, group, dtype

    @property
    def shape(self) -> torch.Size:
        return self.stored.shape

    @property
    def device(self) -> torch.device:
        return self.stored.device

    @property
    def form(self) -> str:
        if self.stored.dtype != torch.int8:
            return "scaled fp8"
        return "int8_convrot" if self.group > 1 else "int8"

    def __getitem__(self, rows: slice) -> "QuantisedWeight":
        scale = self.scale[rows] if len(self.scale) == len(self.stored) else self.scale
        return QuantisedWeight(self.stored[rows], scale, self.group, self.dtype)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The weight, in memory of its own."""
        turn = turned_back(self.group, self.scale)
        if torch.compiler.is_compiling():
            return (turn(self.stored.float()) * self.scale).to(dtype)
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        is_cpu = ops.kind_of(self.device) == "cpu"
        count = max((CPU_BLOCK if is_cpu else GPU_BLOCK) // max(self.shape[1], 1), 1)
        starts = range(0, len(self.stored), count)
        for start in starts[:1] if self.stored.is_meta else starts:  # without memory they are all alike
            part = self[start : start + count]
            torch.mul(turn(part.stored.float()), part.scale, out=out[start : start + count])
        return out


class QuantisedLinear(nn.Linear):
    """A linear layer whose parameters are `weight` in eight bits and `weight_scale`; and `bias`, as usual."""

    group: int
    dtype: torch.dtype  # of computing

    @classmethod
    def replace(
        cls, linear: nn.Linear, stored: torch.dtype, scales: int, group: int, dtype: torch.dtype
    ) -> None:
        """Make a layer that is on the meta device one of these. scales: O or 1."""
        weight = torch.empty(linear.weight.shape, dtype=stored, device="meta")
        scale = torch.empty(scales, 1, dtype=torch.float32, device="meta")
        for name, empty in (("weight", weight), (SCALE, scale)):
            linear._parameters[name] = nn.Parameter(empty, requires_grad=False)
        linear.__class__ = cls
        linear.__dict__.update(group=group, dtype=dtype)

    @property
    def as_stored(self) -> QuantisedWeight:
        stored, scale = self._parameters["weight"], self._parameters[SCALE]
        assert stored is not None and scale is not None
        return QuantisedWeight(stored, scale, self.group, self.dtype)

    @property
    def weight(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.as_stored

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


def is_stored(name: str, tensor: Tensor) -> bool:
    """Whether a parameter is one of a QuantisedLinear: it has its own dtype, whatever the network's is."""
    return tensor.dtype in FP8 or tensor.dtype == torch.int8 or name.endswith(f".{SCALE}")


def quantised_weights(network: nn.Module) -> dict[str, QuantisedWeight]:
    """The weights of a network that are stored so, by their names."""
    layers = ((path, layer) for path, layer in network.named_modules() if isinstance(layer, QuantisedLinear))
    return {f"{path}.weight": layer.as_stored for path, layer in layers}


def largest_group(inputs: int) -> int:
    """The group in which a layer of so many inputs is rotated: that of published files, or the largest
    smaller power of 4 that divides them."""
    return next(group for group in (GROUP, 64, 16, 4, 1) if inputs % group == 0)


def quantise(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """weight (O, I), computed in fp32 -> Q (O, I) int8, s (O, 1) fp32."""
    wide = weight.float()
    if group > 1:
        # R is symmetric; transposed, it is multiplied in the order of comfy-kitchen's sums.
        wide = (wide.unflatten(-1, (-1, group)) @ rotation(group, wide).T).flatten(-2)
    scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp_(min=LEAST_SCALE)
    return (wide / scale).round_().to(torch.int8), scale


def turned_back(group: int, like: Tensor) -> Callable[[Tensor], Tensor]:
    """The function of whole numbers (O, I) in fp32 that rotates them back: exact up to a G of 2 ** 17.

    R is the Kronecker product of two smaller ones: 2 sqrt(G) products for each number instead of G.
    """
    if group == 1:
        return lambda numbers: numbers
    inner = 4 ** (group.bit_length() // 4)
    right, left = rotation(inner, like), rotation(group // inner, like)

    def turn(numbers: Tensor) -> Tensor:
        grid = numbers.unflatten(-1, (-1, len(left), len(right)))
        return (left @ (grid @ right)).flatten(-3)

    return turn


def rotation(group: int, like: Tensor) -> Tensor:
    """R (G, G), with dtype and device of `like`. Made there, so that nothing is copied to a device.

    An entry of H is negative where the numbers of its row and column add up to 3, and one of R where that is
    so in an odd number of their digits to the base 4.
    """
    number = torch.arange(group, device=like.device)
    odd = torch.zeros(group, group, dtype=torch.bool, device=like.device)
    for digit in range(0, group.bit_length() - 1, 2):
        part = (number >> digit) & 3
        odd = odd ^ (part[:, None] + part == 3)
    return (1 - 2 * odd.to(like.dtype)) / math.isqrt(group)
