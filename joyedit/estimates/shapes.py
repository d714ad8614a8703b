"""What operations return, without computing: tensors without memory in, tensors without memory out.

PyTorch knows that too. But its releases since 2025 do it in Python, 0.1 to 5 ms a call, and the first call
that checks anything imports sympy, which takes longer than a whole estimate. So the operations of our
networks are answered here, and PyTorch is asked about the rest.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from joyedit.ops import kind_of

aten = torch.ops.aten
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}  # by the number of axes


def result(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the operation `func` returns for tensors on the meta device; itself, what it writes to."""
    rule = RULES.get(func.overloadpacket)
    if rule is not None and (made := rule(*args, **kwargs)) is not NotImplemented:
        return made
    if torch.Tag.pointwise in func.tags and not {"dtype", "memory_format"} & kwargs.keys():
        return kwargs.get("out", args[0]) if func._schema.is_mutable else pointwise(func, args)
    return func(*args, **kwargs)


def working_memory(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation takes for itself and gives back, as far as that is known: of tensors of several
    dtypes, and for norms in a wider one, a CPU makes copies that are alike; see also `convolved`."""
    if func.overloadpacket is aten.convolution:
        return convolved(args[0], out) if kind_of(out.device) == "cpu" else 0
    widens = func.overloadpacket is aten.linalg_vector_norm
    if not isinstance(out, Tensor) or kind_of(out.device) != "cpu":
        return 0
    if not widens and torch.Tag.pointwise not in func.tags or func._schema.name == "aten::_to_copy":
        return 0
    others = [x for x in args if isinstance(x, Tensor) and x.ndim and x.dtype != out.dtype]
    return sum(x.numel() * out.element_size() for x in others if x.dtype != torch.bool)


def convolved(x: Tensor, out: Tensor) -> int:
    """What oneDNN takes beside the result: unless channels come last, it works on copies in which they are in
    groups of 16, of what comes in and of what goes out, one after the other."""
    layout = LAYOUTS.get(x.ndim)
    if layout is None or x.is_contiguous(memory_format=layout):
        return 0
    padded = ((t.numel() // t.shape[1] * -(-t.shape[1] // 16) * 16, t.element_size()) for t in (x, out))
    return max(count * size for count, size in padded)


def multiplied(func: Any, args: tuple, out: Any) -> int:
    """Multiplications and additions of a product of matrices or a convolution; of others none. (PyTorch's own
    table of them, `torch.utils.flop_counter`, would import Triton.)"""
    if func.overloadpacket is aten.convolution:
        x, weight, transposed = args[0], args[1], args[6]
        return 2 * (x if transposed else out).numel() * weight[0].numel()
    if (first := PRODUCTS.get(func.overloadpacket)) is None:
        return 0
    return 2 * out.numel() * args[first].shape[-1]


def pointwise(func: Any, args: tuple) -> Tensor:
    tensors, name = [x for x in args if isinstance(x, Tensor)], func._schema.name.removeprefix("aten::")
    shape = broadcast(t.shape for t in tensors)
    dtypes = [t.dtype for t in tensors if t.ndim] or [t.dtype for t in tensors]
    dtype = functools.reduce(torch.promote_types, dtypes)
    if name in COMPARISONS:
        dtype = torch.bool
    elif not dtype.is_floating_point and not dtype.is_complex:
        if name in FRACTIONS or any(isinstance(x, float) for x in args):
            dtype = torch.get_default_dtype()
    same = next((t for t in tensors if t.shape == shape), None)
    return tensors[0].new_empty(shape, dtype=dtype) if same is None else like(same, dtype)


def broadcast(shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    reverse: list[int] = []
    for shape in shapes:
        reverse += [1] * (len(shape) - len(reverse))
        for i, n in enumerate(reversed(shape)):
            reverse[i] = n if reverse[i] == 1 else reverse[i]
    return tuple(reversed(reverse))


def like(x: Tensor, dtype: Any = None, memory_format: Any = None, device: Any = None, **_: Any) -> Any:
    """With its strides, if it fills its memory; else contiguous."""
    dtype = dtype or x.dtype
    if device not in (None, x.device) or memory_format not in (None, torch.preserve_format):
        return NotImplemented
    extent = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    if x.is_contiguous() or extent != x.numel():
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)


def product(rows: Tensor, columns: Tensor, *, out: Tensor | None = None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], columns.shape[-1]) if out is None else out


def biased_product(bias: Any, rows: Tensor, columns: Tensor, *, out: Any = None, **_: Any) -> Tensor:
    return product(rows, columns, out=out)


def convolution(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Tensor:
    sizes = []
    for i, (size, kernel) in enumerate(zip(x.shape[2:], weight.shape[2:], strict=True)):
        reach = dilation[i] * (kernel - 1)
        if transposed:
            sizes.append((size - 1) * stride[i] - 2 * padding[i] + reach + output_padding[i] + 1)
        else:
            sizes.append((size + 2 * padding[i] - reach - 1) // stride[i] + 1)
    channels = groups * weight.shape[1] if transposed else len(weight)
    layout = LAYOUTS.get(x.ndim, torch.contiguous_format)
    layout = layout if x.is_contiguous(memory_format=layout) else torch.contiguous_format
    shape = (len(x), channels, *sizes)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    rows = (*x.shape[: -len(shape)], *(1,) * len(shape))
    return like(x), x.new_empty(rows), x.new_empty(rows)


def group_norm(x: Tensor, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float):
    return like(x), x.new_empty(n, groups), x.new_empty(n, groups)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return tensors[0].new_empty(shape)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return tensors[0].new_empty(shape)


def mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    gone = {d % x.ndim for d in (range(x.ndim) if dim is None else dim)}
    shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
    return x.new_empty(shape, dtype=dtype)


def vector_norm(x: Tensor, order: Any = 2, *args: Any, **kwargs: Any) -> Tensor:
    return mean(x, *args, **kwargs)


def padded(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    shape = list(x.shape)
    for i, count in enumerate(pad):
        shape[-1 - i // 2] += count
    return x.new_empty(shape)


def embedding(table: Tensor, numbers: Tensor, *_: Any) -> Tensor:
    return table.new_empty(*numbers.shape, table.shape[1])


def index(x: Tensor, at: Sequence[Tensor | None]) -> Tensor:
    if len(at) != 1 or at[0] is None or at[0].dtype != torch.long:
        return NotImplemented
    return x.new_empty(*at[0].shape, *x.shape[1:])


def enlarged(x: Tensor, size: Any, scales: Any = None, *_: Any) -> Tensor:
    shape = size or [int(n * scale) for n, scale in zip(x.shape[2:], scales, strict=True)]
    return x.new_empty(*x.shape[:2], *shape)


def as_complex(real: Tensor, imaginary: Tensor) -> Tensor:
    return real.new_empty(broadcast((real.shape, imaginary.shape)), dtype=real.dtype.to_complex())


def arange(*bounds: Any, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    start, end, step = {1: (0, *bounds, 1), 2: (*bounds, 1)}.get(len(bounds), bounds)
    whole = all(isinstance(bound, int) for bound in bounds)
    dtype = dtype or (torch.long if whole else torch.get_default_dtype())
    return torch.empty(math.ceil((end - start) / step), dtype=dtype, device=device)


def another_view(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return x.as_strided(size, stride)


COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "isnan", "isfinite"}
FRACTIONS = {"div", "reciprocal", "rsqrt", "sqrt", "exp", "log", "cos", "sin"}  # also of whole numbers
PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}  # where the rows are
RULES: dict[Any, Callable[..., Any]] = {
    aten.mm: product,
    aten.bmm: product,
    aten.addmm: biased_product,
    aten.baddbmm: biased_product,
    aten.convolution: convolution,
    aten.native_layer_norm: layer_norm,
    aten.native_group_norm: group_norm,
    aten.cat: cat,
    aten.stack: stack,
    aten.mean: mean,
    aten.linalg_vector_norm: vector_norm,
    aten.constant_pad_nd: padded,
    aten.embedding: embedding,
    aten.index: index,
    aten.masked_scatter: lambda x, *_: like(x),
    aten.flip: lambda x, axes: like(x),
    aten.upsample_nearest2d: enlarged,
    aten._upsample_nearest_exact2d: enlarged,
    aten.complex: as_complex,
    aten.empty_like: like,
    aten.zeros_like: like,
    aten.arange: arange,
    aten._reshape_alias: another_view,
}
