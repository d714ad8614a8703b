"""Weights with low-rank terms beside them: what reading `.weight` of a layer with LoRA gives.

W' x = W x + s B (A x): the terms never meet the weight, which may be narrower than they are. In bf16 a sum
would round away what is small beside a weight; in eight bits there is nothing to add to. `ops.linear` and
its like take an `AdaptedWeight` as they take a weight that is quantised; so does `F.linear`, and what else
PyTorch is asked gets the sum.

O outputs   I inputs; of a convolution channels and kernel together   r rank   R ranks of all terms together
Source: arXiv 2106.09685, equation 3.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from joyedit import ops
from joyedit.checkpoints.lora_files import Delta
from joyedit.quantised import QuantisedWeight

Weighted = list[tuple[Delta, float]]  # deltas and their strengths


class AdaptedWeight:
    """A weight (O, I) or (O, C, kh, kw), and what is added to its products. Slices of rows, and `flatten(1)`,
    give the same of a part. It is not a parameter: what trains are the factors."""

    requires_grad = False

    def __init__(self, base: Tensor | QuantisedWeight, terms: Weighted, rows: slice = slice(None)):
        """terms: those of low rank. rows: the outputs of the terms that `base` has."""
        self.base, self.terms, self.rows = base, terms, rows

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        return self.base.device

    def is_contiguous(self, **options: Any) -> bool:
        return not isinstance(self.base, Tensor) or self.base.is_contiguous(**options)

    def __getitem__(self, rows: slice) -> "AdaptedWeight":
        """Of a whole one: nobody slices a slice."""
        assert self.rows == slice(None)
        return AdaptedWeight(self.base[rows], self.terms, rows)

    def flatten(self, start: int) -> "AdaptedWeight":
        base = self.base.flatten(start) if isinstance(self.base, Tensor) else self.base
        return AdaptedWeight(base, self.terms, self.rows)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `ops.linear`. The sum is made inside of the second product, and rounded once."""
        down, up = self.factors(x)
        out = ops.linear(x, self.base, bias)  # pyright: ignore[reportArgumentType]
        hidden = F.linear(x, down)
        return torch.addmm(out.flatten(0, -2), hidden.flatten(0, -2), up.t()).view(out.shape)

    def conv2d(self, x: Tensor, bias: Tensor | None, stride: ops.Size, padding: ops.Size | str) -> Tensor:
        """As `ops.conv2d`: A has the kernel, B is 1 x 1."""
        assert isinstance(self.base, Tensor)
        down, up = self.factors(x)
        out = ops.conv2d(x, self.base, bias, stride, padding)
        hidden = F.conv2d(x, down.view(-1, *self.shape[1:]), None, stride, padding)
        return out + F.conv2d(hidden, up[..., None, None])

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A (R, I) and s B (O, R) of all terms, in the dtype of x, each rounded once."""
        downs, ups = [], []
        for delta, strength in self.terms:
            down, up = delta.factors_on(x.device)
            wide = torch.promote_types(up.dtype, torch.float32)
            downs.append(down.to(x.dtype))
            ups.append((up[self.rows].to(wide) * (strength * delta.scale)).to(x.dtype))
        if len(downs) == 1:
            return downs[0], ups[0]
        return torch.cat(downs), torch.cat(ups, dim=1)

    def summed(self) -> Tensor:
        """The weight with its terms added, of a whole one."""
        assert self.rows == slice(None)
        return merge(self.base, self.terms)

    @classmethod
    def __torch_function__(
        cls, function: Callable, types: Any, args: Sequence = (), kwargs: Mapping | None = None
    ) -> Any:
        if function is F.linear and len(args) == 3 and not kwargs and not isinstance(args[0], cls):
            x, weight, bias = args
            return weight.linear(x, bias)
        args = [arg.summed() if isinstance(arg, cls) else arg for arg in args]
        given = {key: arg.summed() if isinstance(arg, cls) else arg for key, arg in (kwargs or {}).items()}
        return function(*args, **given)


def merge(base: Tensor | QuantisedWeight, deltas: Weighted) -> Tensor:
    """The sum of a parameter and its deltas, in fp32, rounded once to the dtype of the parameter, whose
    memory layout it keeps. One that is quantised is rebuilt for it, and stays what it is."""
    wide = torch.promote_types(base.dtype, torch.float32)
    if isinstance(base, QuantisedWeight):
        total = base.to(wide)
    else:
        total = base.reshape(base.shape[0], -1).to(wide)
    for delta, strength in deltas:
        total = delta.add_to(total, strength)
    if isinstance(base, QuantisedWeight):
        return total.to(base.dtype)
    return torch.empty_like(base).copy_(total.view(base.shape))
