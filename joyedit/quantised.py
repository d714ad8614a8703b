"""Weights that are stored in eight bits with scales, and read where they are used.

Two forms, as ComfyUI writes them; Q (O, I) is what is stored, s the scales, W the weight that is meant:

    fp8            W = Q s, one scale for the whole weight
    int8_convrot   W = (Q s) R, one scale for each row; R rotates groups of inputs, see `eight_bits`. int8
                   without a rotation is the same with groups of 1

A weight stays stored as it is. Reading `.weight` of a layer gives a `QuantisedWeight`, which `ops.linear` and
its like take. Its `to(dtype)` is the weight itself, computed in fp32 and rounded once; as (Q R) s it has sums
of whole numbers, which are exact, so that every device gives the same. With that it is multiplied, or, where
`int8_products("fast")` allows it, in eight bits as it is: then activations are rounded to eight bits, too.

O outputs   I inputs   G inputs that are rotated together
"""

import contextlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from joyedit import frozen, ops
from joyedit.eight_bits import turned_back

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE = "weight_scale"  # the parameter with the scales, (O, 1) or (1, 1)
# Elements of a weight that are rebuilt at a time: what a cache holds, and what keeps a GPU busy.
CPU_BLOCK, GPU_BLOCK = 2**18, 2**25
PRODUCTS = ("exact", "fast")

_products = "exact"


def int8_products(name: str) -> contextlib.AbstractContextManager:
    """Choose how weights in int8 are multiplied from now on: "exact", with what they mean, or "fast", in
    eight bits, for inference: activations are then rounded to eight bits, row by row.

    As a context manager it brings back the previous choice at the end; JOYEDIT_INT8 sets it at the start.
    fp8 is always exact, and so are the factors of adapters. Raises ValueError for another name.
    """
    global _products
    if name not in PRODUCTS:
        raise ValueError(f"int8_products {name!r}: wanted one of {', '.join(PRODUCTS)}")
    previous, _products = _products, name
    restore = contextlib.ExitStack()
    restore.callback(int8_products, previous)
    return restore


int8_products(os.environ.get("JOYEDIT_INT8") or "exact")


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

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """As `ops.linear`."""
        fast = _products == "fast" and self.stored.dtype == torch.int8
        if fast and not (torch.is_grad_enabled() and x.requires_grad):
            return ops.int8_linear(x, self.stored, self.scale, bias, self.group)
        return frozen.linear(x, bias, self._meant, self.stored, self.scale)

    def _meant(self, stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return QuantisedWeight(stored, scale, self.group, self.dtype).to(dtype)

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
    return tensor.dtype in FP8 or tensor.dtype == torch.int8 or is_scale(name)


def is_scale(name: str) -> bool:
    """Whether a parameter holds scales, which are no weights of their own."""
    return name.endswith(f".{SCALE}")


def quantised_weights(network: nn.Module) -> dict[str, QuantisedWeight]:
    """The weights of a network that are stored so, by their names."""
    layers = ((path, layer) for path, layer in network.named_modules() if isinstance(layer, QuantisedLinear))
    return {f"{path}.weight": layer.as_stored for path, layer in layers}


def quantisable(network: nn.Module) -> set[str]:
    """The weights that are worth eight bits: those of the linear layers in the network's repeated blocks."""
    blocks = [child for child in network.modules() if isinstance(child, nn.ModuleList)]
    inside = {id(layer) for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)}
    return {f"{path}.weight" for path, layer in network.named_modules() if id(layer) in inside}


def quantise_by_torchao(network: nn.Module, config: Any) -> None:
    """Quantise the same layers in place by the package torchao (`pip install joyedit[quant]`), whose configs
    say how: `torchao.quantization.Int8WeightOnlyConfig()`, `Float8WeightOnlyConfig()`, ...

    After `to(device, dtype)`: a weight computes in the dtype that it had. Weights that are quantised already
    stay as they are. Such a network is for running: it is neither saved nor given adapters.
    """
    try:
        from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ImportError("this needs the package torchao: pip install joyedit[quant]") from None
    names = quantisable(network) - quantised_weights(network).keys()
    quantize_(network, config, lambda layer, path: f"{path}.weight" in names)
