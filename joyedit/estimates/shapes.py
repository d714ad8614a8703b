"""What operations return, without computing: tensors without memory in, tensors without memory out.

PyTorch knows that too. But its releases since 2025 do it in Python, 0.1 to 5 ms a call, and the first call
that checks anything imports sympy, which takes longer than a whole estimate. So the common operations are
answered here, and PyTorch is asked about the rest.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def result(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What the operation `func` returns for tensors on the meta device, and for those that it writes to."""
    if (rule := RULES.get(func.overloadpacket)) is not None:
        return rule(*args, **kwargs)
    if torch.Tag.pointwise in func.tags and not {"out", "dtype", "memory_format"} & kwargs.keys():
        if func._schema.is_mutable:
            return args[0]
        tensors = [x for x in args if isinstance(x, Tensor)]
        if all(t.is_floating_point() for t in tensors) and func._schema.name not in COMPARISONS:
            return pointwise(tensors)
    return func(*args, **kwargs)


def pointwise(tensors: Sequence[Tensor]) -> Tensor:
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    dtypes = [t.dtype for t in tensors if t.ndim] or [t.dtype for t in tensors]
    dtype = functools.reduce(torch.promote_types, dtypes)
    like = next((t for t in tensors if t.shape == shape), None)
    return tensors[0].new_empty(shape, dtype=dtype) if like is None else torch.empty_like(like, dtype=dtype)


def product(rows: Tensor, columns: Tensor, *, out: Tensor | None = None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], columns.shape[-1]) if out is None else out


def biased_product(bias: Tensor, rows: Tensor, columns: Tensor, *, out: Tensor | None = None, **_: Any) -> Tensor:
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
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
    is_last = x.is_contiguous(memory_format=layout)
    shape = (len(x), channels, *sizes)
    return torch.empty(
        shape,
        dtype=x.dtype,
        device=x.device,
        memory_format=layout if is_last else torch.contiguous_format,
    )


def layer_norm(x: Tensor, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
    rows = (*x.shape[: -len(shape)], *(1,) * len(shape))
    return torch.empty_like(x), x.new_empty(rows), x.new_empty(rows)


def group_norm(x: Tensor, weight: Any, bias: Any, n: int, c: int, size: int, groups: int, eps: float):
    return torch.empty_like(x), x.new_empty(n, groups), x.new_empty(n, groups)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return tensors[0].new_empty(shape)


def vector_norm(x: Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    gone = {d % x.ndim for d in (range(x.ndim) if dim is None else dim)}
    shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
    return x.new_empty(shape, dtype=dtype)


def padded(x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    shape = list(x.shape)
    for i, count in enumerate(pad):
        shape[-1 - i // 2] += count
    return x.new_empty(shape)


def another_view(x: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return x.as_strided(size, stride)


COMPARISONS = {f"aten::{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "logical_not", "isnan")}
RULES: dict[Any, Callable[..., Any]] = {
    aten.mm: product,
    aten.bmm: product,
    aten.addmm: biased_product,
    aten.baddbmm: biased_product,
    aten.convolution: convolution,
    aten.native_layer_norm: layer_norm,
    aten.native_group_norm: group_norm,
    aten.cat: cat,
    aten.linalg_vector_norm: vector_norm,
    aten.constant_pad_nd: padded,
    aten._reshape_alias: another_view,
}
