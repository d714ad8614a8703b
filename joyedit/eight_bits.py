"""Numbers of eight bits: rounding to them, the rotation before it, and products of them.

A row is rounded to whole numbers by one scale, its largest value being 127. What stands out in one place
costs all others their digits, so groups of a row are rotated first, by R of G inputs: of 4 that is
H = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] / 2, of 4 times as many the Kronecker
product of that with H. R is symmetric and its own inverse.

O outputs   I inputs   G inputs that are rotated together, a power of 4; 1: none
Source: leejet/stable-diffusion.cpp `docs/int8_convrot.md`; Comfy-Org/comfy-kitchen, whose whole numbers and
scales are the same.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

GROUP = 256  # of published files
LEAST_SCALE = 1e-30  # of rows of zeros


def largest_group(inputs: int) -> int:
    """The group in which a layer of so many inputs is rotated: that of published files, or the largest
    smaller power of 4 that divides them."""
    return next(group for group in (GROUP, 64, 16, 4, 1) if inputs % group == 0)


def quantise(rows: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """rows (..., I), computed in fp32 -> Q (..., I) int8, s (..., 1) fp32, with (Q s) R = rows."""
    wide = rows.float()
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


def int8_product(x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """What `ops.int8_linear` is: x rotated and rounded row by row, a product of whole numbers, two scales."""
    rows, row_scale = quantise(x.reshape(-1, x.shape[-1]), group)
    out = whole_product(rows, stored).float() * row_scale * scale.flatten()
    out = out if bias is None else out + bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], len(stored))


def whole_product(a: Tensor, b: Tensor) -> Tensor:
    """a (R, I), b (O, I) int8 -> a b^T (R, O), exact. cuBLAS has a kernel for sizes that are multiples of 8;
    for the others, fp64 holds every sum."""
    if a.device.type == "cpu" or (a.is_cuda and len(a) > 16 and a.shape[1] % 8 == 0 and len(b) % 8 == 0):
        return torch._int_mm(a, b.T)  # pyright: ignore[reportPrivateImportUsage]
    return a.double() @ b.double().T
