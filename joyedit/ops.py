"""The fused operations of the networks: each one in plain PyTorch, and the choice of its Triton kernel.

Models call these and know nothing of what runs underneath. Every function returns fresh tensors and never
writes to its arguments, but for those called `out`, which are for inference alone. `backend` chooses:

    auto     (the default) the kernel for what it supports on a CUDA or ROCm device, PyTorch for the rest; and
             where a kernel cannot be built, with a warning
    triton   the kernel, or a RuntimeError that says why it cannot run here: nothing falls back unseen
    torch    PyTorch, which is the definition of each operation and what its kernel is tested against

The environment variable JOYEDIT_OPS sets it at the start. Kernels are in kernels/, one operation per file,
and registered as `torch.ops.joyedit.*`: what is launched can be counted by a TorchDispatchMode, and
torch.compile sees one node. With TRITON_INTERPRET=1 they run on CPU tensors, slowly, under "triton".

Activations may be wider than the stored weights (bf16 weights, fp32 activations): a weight is brought to the
dtype of the activation where it is used, which keeps the memory of the narrow checkpoint and the arithmetic
of the wide one.

B batch   N tokens   D width   H heads   E = D / H
"""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from joyedit import frozen
from joyedit.convolutions import Size as Size
from joyedit.convolutions import conv2d as conv2d
from joyedit.convolutions import conv3d as conv3d
from joyedit.convolutions import doubling_conv2d as doubling_conv2d
from joyedit.convolutions import kind_of as kind_of
from joyedit.convolutions import standing_for as standing_for
from joyedit.convolutions import wide_dtype as wide_dtype
from joyedit.eight_bits import int8_product
from joyedit.rotary import norm_rope

log = logging.getLogger("joyedit")

CPU_HAS_BF16: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()

BACKENDS = ("auto", "triton", "torch")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_WIDTH = 16384  # the longest row that a program of the norms holds in registers
HEAD_WIDTH = 256  # the widest head of the attention
TRITON = (3, 4)  # the first version with what the kernels use
GUIDED_CHANNELS = 128  # the most that a program of `guide` holds in registers

_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
_backend = "auto"
_unbuilt: dict[str, str] = {}  # kernels that could not be built, and why: "auto" leaves them to PyTorch


def backend(name: str) -> contextlib.AbstractContextManager:
    """Choose what runs the operations from now on: "auto", "triton" or "torch" (see the top of this file).

    As a context manager, `with ops.backend("torch"): ...`, it brings back the previous choice at the end.
    Compiled networks notice a change and compile again. Raises ValueError for another name.
    """
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r}: wanted one of {', '.join(BACKENDS)}")
    previous, _backend = _backend, name
    restore = contextlib.ExitStack()
    restore.callback(backend, previous)
    return restore


def _triton(x: Tensor, *others: Tensor | None, problem: str | None = None, has_backward: bool = True) -> bool:
    """Whether the Triton kernel takes these tensors; `problem`: why it cannot, if the caller has a reason."""
    if _backend == "torch" or (_backend == "auto" and not _on_gpu(x)):
        return False
    if kind_of(x.device) != x.device.type:  # without memory: PyTorch's operations are counted
        return False
    problem = problem or _problem([x, *(t for t in others if t is not None)], has_backward)
    if problem and _backend == "triton":
        raise RuntimeError(f"no Triton kernel can run here: {problem}")
    return problem is None


def _on_gpu(x: Tensor) -> bool:
    """Whether it is on a CUDA or ROCm device; both are CUDA to PyTorch."""
    return x.is_cuda


def _problem(tensors: list[Tensor], has_backward: bool) -> str | None:
    if _no_triton:
        return _no_triton
    device = tensors[0].device
    if device.type != "cuda" and not (_interpreted and device.type == "cpu"):
        return f"the tensors are on {device}, not on a CUDA or ROCm device"
    for t in tensors:
        if t.dtype not in KERNEL_DTYPES:
            return f"it takes float32, float16 and bfloat16, not {t.dtype}"
        if t.device != device:
            return f"tensors are on {device} and {t.device}"
    if not has_backward and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "a gradient is wanted and the kernel has no backward"
    return None


def _launched(kernel: Callable[..., Any], *args: Any) -> Any:
    """What the kernel returns; NotImplemented where it cannot be built (there is no C compiler, or this
    version of Triton fails on it) and "auto" goes on with PyTorch, which a warning says the first time."""
    if _backend != "auto" or torch.compiler.is_compiling():
        return kernel(*args)
    name = str(kernel)
    if name in _unbuilt:
        return NotImplemented
    try:
        return kernel(*args)
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # PyTorch would meet them too
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip()
        if reason not in _unbuilt.values():
            log.warning("the kernel %s cannot run here, PyTorch computes it from now on: %s", name, reason)
        _unbuilt[name] = reason
        return NotImplemented


def _too_wide(x: Tensor, dim: int = -1) -> str | None:
    return f"rows of {x.shape[dim]} are longer than {KERNEL_WIDTH}" if x.shape[dim] > KERNEL_WIDTH else None


def _find_triton() -> str | None:
    """Why there is no Triton for the kernels; without importing it. An unknown version is taken for new."""
    try:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
    except ModuleNotFoundError:
        return "the package triton is not installed"
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            number = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(name))
            if number and tuple(map(int, number.groups())) < TRITON:
                return f"triton {number[0]} is older than {'.'.join(map(str, TRITON))}"
            return None
    return None


_no_triton = _find_triton()
backend(os.environ.get("JOYEDIT_OPS", "auto"))


def compute_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The dtype to compute in for weights of `dtype` on `device`.

    A CPU without bf16 units runs bf16 and fp16 matrix products 6-8 times slower than fp32, and bf16
    convolutions over 100 times slower; there the activations are fp32 and the weights are upcast where they
    are used.
    """
    if kind_of(torch.device(device)) == "cpu" and dtype in (torch.bfloat16, torch.float16):
        return dtype if dtype is torch.bfloat16 and CPU_HAS_BF16 else torch.float32
    return dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., D_in), weight (D_out, D_in), bias (D_out) -> (..., D_out) in the dtype of x."""
    if not isinstance(weight, Tensor):  # quantised or with adapters, it knows how it is multiplied
        return weight.linear(x, bias)
    if weight.dtype != x.dtype:
        return frozen.linear(x, bias, Tensor.to, weight)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`linear` whose result is written to `out`, a part of `joint_buffers`, and returned; inference only.

    out (B, N, H, E), x (B, N, D_in), weight (H * E, D_in), bias (H * E).
    """
    if not isinstance(weight, Tensor):
        return out.copy_(weight.linear(x, bias).view(out.shape))
    weight, bias = weight.to(x.dtype).t(), bias.to(x.dtype)
    for rows, place in zip(x, out.flatten(2), strict=True):
        torch.addmm(bias, rows, weight, out=place)
    return out


def int8_linear(x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x (..., D_in) rotated and rounded to eight bits row by row, times stored (D_out, D_in) int8, scale
    (D_out, 1) or (1, 1); -> (..., D_out) in the dtype of x, with an error of rounding x. group: see
    `eight_bits`."""
    given = (x, scale) if bias is None else (x, scale, bias)
    half = x.dtype in (torch.float16, torch.bfloat16) and group <= 256
    odd = None if half else "it takes half precision, in groups of at most 256"
    if _triton(*given, problem=odd, has_backward=False):
        from joyedit.kernels.int8_linear import int8_linear as kernel

        if (out := _launched(kernel, x, stored, scale, bias, group)) is not NotImplemented:
            return out
    return int8_product(x, stored, scale, bias, group)


def joint_buffers(
    count: int, first: Tensor, second: Tensor, num_heads: int
) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Where two streams (image and text) write what `attention` reads of both, so that nothing is joined.

    first (B, N, D), second (B, M, D). Returns `count` tensors (B, N, H, E), and as many (B, M, H, E) that lie
    behind them in memory. None and None where operations are to return fresh tensors: without a kernel, where
    a gradient may be wanted, and where torch.compile looks on.
    """
    has_kernels = _on_gpu(first) or (_interpreted and _backend == "triton")
    if not has_kernels or _backend == "torch" or first.dtype != second.dtype or _records():
        return None, None
    (b, n, d), m = first.shape, second.shape[1]
    joint = [first.new_empty(b, n + m, num_heads, d // num_heads) for _ in range(count)]
    return tuple(t[:, :n] for t in joint), tuple(t[:, n:] for t in joint)


def _records() -> bool:
    """Whether somebody may want to know how a tensor was computed."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _unsplit(segments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Segments from `joint_buffers` as the one tensor that they are, others as they are."""
    if len(segments) != 2 or _records():
        return segments
    x, y = segments
    (b, n, *_), m = x.shape, y.shape[1]
    if x.untyped_storage() is not y.untyped_storage() or x.stride() != y.stride() or x.dtype != y.dtype:
        return segments
    stride_b, stride_n = x.stride()[:2]
    if y.storage_offset() != x.storage_offset() + n * stride_n or (b > 1 and stride_b != (n + m) * stride_n):
        return segments
    return (x.as_strided((b, n + m, *x.shape[2:]), x.stride()),)


def attention(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    causal: bool = False,
    summed: bool = False,
    lengths: Sequence[int] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention over tokens; k and v may have fewer heads than q (grouped queries).

    q (B, N, H, E); k, v (B, M, H_kv, E); each may be a sequence of segments that follow one another along the
    token axis; those from `joint_buffers` are not copied. Returns (B, N, H, E).

    causal   the last query sees the last key: a cached prefix may be longer than the queries
    summed   each segment of k and v has a softmax of its own, and the results are added
    lengths  samples of so many tokens follow one another (B = 1); each attends to its own tokens only
    mask     broadcastable to (B, H, N, M): boolean, True where a query may look, or additive. There is no
             kernel for it: PyTorch computes it under every backend.
    scale    of the scores; the default is E ** -0.5

    Raises ValueError for `lengths` that are not those of q and k, or with segments; for `summed` with any of
    causal, lengths and mask; for a mask with lengths.
    """
    q, k, v = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (q, k, v))
    if summed and (causal or lengths is not None or mask is not None):
        raise ValueError("summed softmaxes are neither causal nor packed nor masked")
    if lengths is not None:
        _check_packing(q, k, lengths, mask)
    if scale is None:
        scale = float(q[0].shape[-1] ** -0.5)
    if not summed:
        q, k, v = map(_unsplit, (q, k, v))
    problem = _no_attention_kernel(q, k, v, causal, scale)
    if mask is None and _triton(*q, *k, *v, problem=problem, has_backward=False):
        from joyedit.kernels import attention as kernels

        lengths = lengths or ()
        stock = _backend != "triton" and kernels.stock_is_faster(q, k, lengths, causal, summed)
        if not stock and _triton(*q, problem=kernels.no_tiles(q[0].device), has_backward=False):
            if (
                out := _launched(kernels.attention, q, k, v, lengths, causal, summed, scale)
            ) is not NotImplemented:
                return out
    if summed:
        first, *others = (_attention(q, [a], [b], False, None, scale) for a, b in zip(k, v, strict=True))
        return sum(others, start=first)
    if lengths:
        samples = zip(*(x[0].split(list(lengths), dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([_attention([a], [b], [c], causal, None, scale) for a, b, c in samples], dim=1)
    return _attention(q, k, v, causal, mask, scale)


def _attention(q, k, v, causal: bool, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (q, k, v))
    n, m = q.shape[1], k.shape[1]
    if causal and (n != m or mask is not None):
        rows = torch.arange(m - n, m, device=q.device)[:, None]
        visible = torch.arange(m, device=q.device)[None] <= rows  # (N, M)
        mask = visible if mask is None else mask & visible
        causal = False
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2).contiguous()


def wide_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose heads are as wide as feature maps: 384 and 512 in the autoencoders, which have one.

    q, k, v (B, N, H, E). There is no kernel: PyTorch computes it under every backend. Rows so wide would not
    fit the registers where the kernel of `attention` keeps them, and they are attended to once per picture.
    """
    return _attention((q,), (k,), (v,), False, None, float(q.shape[-1] ** -0.5))


def _check_packing(q: Sequence[Tensor], k: Sequence[Tensor], lengths: Sequence[int], mask: Tensor | None):
    if len(q) > 1 or len(k) > 1 or mask is not None:
        raise ValueError("packed samples have one segment and no mask")
    batch, n, m = *q[0].shape[:2], k[0].shape[1]
    if batch != 1 or sum(lengths) != n or n != m or any(n < 0 for n in lengths):
        raise ValueError(
            f"lengths {tuple(lengths)} are not those of {batch} x {n} queries and {m} keys in a batch of one"
        )


def _no_attention_kernel(
    q: Sequence[Tensor], k: Sequence[Tensor], v: Sequence[Tensor], causal: bool, scale: float
) -> str | None:
    """Why the kernel cannot compute this attention."""
    batch, _, heads, width = q[0].shape
    groups = k[0].shape[2]
    if (
        any((x.shape[0], x.shape[3]) != (batch, width) for x in (*q, *k, *v))
        or any(x.shape[2] != heads for x in q)
        or any(x.shape[2] != groups for x in k)
        or [x.shape for x in k] != [x.shape for x in v]
        or heads % groups
    ):
        return "the shapes of q, k and v do not fit"
    if width > HEAD_WIDTH:
        return f"heads of {width} are wider than {HEAD_WIDTH}"
    if max(len(q), len(k)) > 2:
        return "it takes two segments, not more"
    if len({x.dtype for x in (*q, *k, *v)}) > 1:
        return "q, k and v are of several dtypes"
    if not all(x.shape[1] for x in k):
        return "a segment has no keys"
    if causal and sum(x.shape[1] for x in q) > k[-1].shape[1]:
        return "there are more queries than keys, or than keys of the second segment"
    return None if scale > 0 else f"the scale {scale} is not positive"


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """LayerNorm over the last axis, statistics in fp32. x (..., D); weight, bias (D)."""
    if _triton(x, weight, bias, problem=_too_wide(x)):
        from joyedit.kernels.ada_layer_norm import layer_norm as kernel

        if (out := _launched(kernel, x, weight, bias, eps)) is not NotImplemented:
            return out
    dtype = wide_dtype(x)
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift. x (B, N, D); shift, scale (B or 1, D)."""
    if _triton(x, shift, scale, problem=_too_wide(x)):
        from joyedit.kernels.ada_layer_norm import ada_layer_norm as kernel

        if (out := _launched(kernel, x, shift, scale, eps)) is not NotImplemented:
            return out
    dtype = wide_dtype(x)
    shift, scale = shift.to(dtype), 1 + scale.to(dtype)
    if len(shift) == 1:
        # One for all samples: the modulation is the affine part of the norm, and one pass over x is enough.
        return F.layer_norm(x.to(dtype), x.shape[-1:], scale[0], shift[0], eps).to(x.dtype)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normed, scale[:, None]).to(x.dtype)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y, in the dtype of x. x, y (B, N, D); gate (B or 1, D).

    In fp32: a gate rounded to half precision moves every token alike, block after block.
    """
    if _triton(x, y, gate, problem=_too_wide(x)):
        from joyedit.kernels.gate_residual import gate_residual as kernel

        if (out := _launched(kernel, x, y, gate)) is not NotImplemented:
            return out
    return torch.addcmul(x, y, gate[:, None].to(wide_dtype(x))).to(x.dtype)


def gate_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The gated residual (without a gate: x + y), and its `ada_layer_norm`: one pass over both.

    x, y (B, N, D); gate, shift, scale (B or 1, D). Returns the sum in the dtype of x, and its modulated norm.
    """
    if _triton(x, y, gate, shift, scale, problem=_too_wide(x)):
        from joyedit.kernels.gate_residual import gate_residual_norm as kernel

        if (out := _launched(kernel, x, y, gate, shift, scale, eps)) is not NotImplemented:
            return out
    x = (x + y).to(x.dtype) if gate is None else gate_residual(x, y, gate)
    return x, ada_layer_norm(x, shift, scale, eps)


def gate_residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """The gated residual and its `layer_norm` with learned scale and shift: one pass over both.

    x, y (B, N, D); gate (B or 1, D); weight, bias (D). Returns the sum in the dtype of x, and its norm.
    """
    if _triton(x, y, gate, weight, bias, problem=_too_wide(x)):
        from joyedit.kernels.gate_residual import gate_residual_layer_norm as kernel

        if (out := _launched(kernel, x, y, gate, weight, bias, eps)) is not NotImplemented:
            return out
    x = gate_residual(x, y, gate)
    return x, layer_norm(x, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / rms(x) * weight over the last axis, statistics in fp32. x (..., D); weight (D)."""
    if _triton(x, weight, problem=_too_wide(x)):
        from joyedit.kernels.rms_norm import rms_norm as kernel

        if (out := _launched(kernel, x, weight, eps)) is not NotImplemented:
            return out
    dtype = wide_dtype(x)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps).to(x.dtype)


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x + y in the dtype of x, and its `rms_norm`: one pass over both. x, y (..., D); weight (D)."""
    if _triton(x, y, weight, problem=_too_wide(x)):
        from joyedit.kernels.rms_norm import add_rms_norm as kernel

        if (out := _launched(kernel, x, y, weight, eps)) is not NotImplemented:
            return out
    x = (x + y).to(x.dtype)
    return x, rms_norm(x, weight, eps)


def channel_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / rms(x) * gamma over the channels of feature maps. x (B, C, ...); gamma has C values.

    Half precision is computed in fp32. Where all channels of a position are zero the result is zero: |x| is
    taken as at least 1e-12. Source: diffusers `WanRMS_norm`.
    """
    if _triton(x, gamma, problem=_too_wide(x, 1)):
        from joyedit.kernels.channel_rms_norm import channel_rms_norm as kernel

        if (out := _launched(kernel, x, gamma)) is not NotImplemented:
            return out
    return _channel_rms_norm(x, gamma).to(x.dtype)


def channel_rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """silu(x / rms(x) * gamma) over channels, as `channel_rms_norm`. x (B, C, ...); gamma has C values."""
    if _triton(x, gamma, problem=_too_wide(x, 1)):
        from joyedit.kernels.channel_rms_norm import channel_rms_norm_silu as kernel

        if (out := _launched(kernel, x, gamma)) is not NotImplemented:
            return out
    return F.silu(_channel_rms_norm(x, gamma), inplace=True).to(x.dtype)


def _channel_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    wide = wide_dtype(x)
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min(1e-12)
    scale = gamma.to(wide).view(-1, *(1,) * (x.ndim - 2)) * gamma.numel() ** 0.5  # |x| = rms(x) * sqrt(C)
    return (x * length.reciprocal()).mul_(scale)


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """GroupNorm, statistics in fp32, in the memory format of x. x (B, C, ...); weight, bias (C)."""
    if _triton(x, weight, bias, problem=_uneven(x, groups)):
        from joyedit.kernels.group_norm import group_norm as kernel

        if (out := _launched(kernel, x, weight, bias, groups, eps)) is not NotImplemented:
            return out
    return _group_norm(x, weight, bias, groups, eps).to(x.dtype)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """silu(GroupNorm(x)), as `group_norm`. x (B, C, ...); weight, bias (C)."""
    if _triton(x, weight, bias, problem=_uneven(x, groups)):
        from joyedit.kernels.group_norm import group_norm_silu as kernel

        if (out := _launched(kernel, x, weight, bias, groups, eps)) is not NotImplemented:
            return out
    return F.silu(_group_norm(x, weight, bias, groups, eps), inplace=True).to(x.dtype)


def _uneven(x: Tensor, groups: int) -> str | None:
    return f"{x.shape[1]} channels are not {groups} equal groups" if x.shape[1] % groups else None


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    wide = wide_dtype(x)
    x, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    if x.ndim == 4 and x.stride(1) == 1:
        # Channels last, PyTorch's kernel for CPUs adds up squares: the variance of a nearly constant plane
        # cancels. The one for GPUs takes a contiguous copy itself, and would leave the result contiguous.
        out = F.group_norm(x.contiguous(), groups, weight, bias, eps)
        return out.contiguous(memory_format=torch.channels_last)
    return F.group_norm(x, groups, weight, bias, eps)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    eps: float = 1e-6,
    half_split: bool = False,
    start: int = 0,
    out: tuple[Tensor | None, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and k and their rotary embedding: from slices of a projection to what attention reads.

    q (B, M, H, E), k (B, N, G, E). Weights: (E), each head is normed; (H * E) and (G * E), all heads of a
    token together; None, no norm. rope: cos and sin, each (N, E / 2) or (B or 1, N, E / 2); token n of k
    turns by row n, token m of q by row start + m; None, no rotation. What turns are the pairs
    (x[2 j], x[2 j + 1]) or, half_split, (x[j], x[j + E / 2]).

    out: where to write the results, from `joint_buffers`; in place of the first, None is a fresh tensor.

    Statistics and rotation in fp32, rounded once, at the end: the references round the norm too, and Qwen's
    also cos and sin. Raises ValueError for a table that does not fit the tokens.
    """
    if rope is not None and (rope[0].shape[-2] != k.shape[1] or start + q.shape[1] > k.shape[1]):
        tokens = f"{k.shape[1]} tokens, of which {q.shape[1]} from {start} on ask"
        raise ValueError(f"a rotary table of {rope[0].shape[-2]} rows does not fit {tokens}")
    tensors = q, k, q_weight, k_weight, *(rope or (None, None))
    if _triton(*tensors, problem=_too_wide(q if q_weight is None else q_weight)):
        from joyedit.kernels import qk_norm_rope as kernels

        settings = eps, half_split, start
        if out is not None:
            places = q.new_empty(q.shape) if out[0] is None else out[0], out[1]
            if _launched(kernels.qk_norm_rope_out, *tensors, *settings, *places) is not NotImplemented:
                return places
        elif (made := _launched(kernels.qk_norm_rope, *tensors, *settings)) is not NotImplemented:
            return made
    stop = start + q.shape[1]
    q_rope = None if rope is None else (rope[0][..., start:stop, :], rope[1][..., start:stop, :])
    q, k = norm_rope(q, q_weight, q_rope, eps, half_split), norm_rope(k, k_weight, rope, eps, half_split)
    if out is None:
        return q, k
    return q if out[0] is None else out[0].copy_(q), out[1].copy_(k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. gate, up (..., D) of one dtype."""
    if _triton(gate, up, problem=_unlike(gate, up)):
        from joyedit.kernels.gated import swiglu as kernel

        if (out := _launched(kernel, gate, up)) is not NotImplemented:
            return out
    return F.silu(gate) * up


def geglu(value_gate: Tensor) -> Tensor:
    """value * gelu(gate) with the exact (erf) GELU. value_gate (..., 2 D): value, then gate -> (..., D)."""
    width = value_gate.shape[-1]
    if _triton(value_gate, problem=f"there are no halves of {width}" if width % 2 else None):
        from joyedit.kernels.gated import geglu as kernel

        if (out := _launched(kernel, value_gate)) is not NotImplemented:
            return out
    value, gate = value_gate.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


def geglu_tanh(gate: Tensor, value: Tensor) -> Tensor:
    """gelu(gate) * value with the tanh-approximated GELU. gate, value (..., D) of one dtype."""
    if _triton(gate, value, problem=_unlike(gate, value)):
        from joyedit.kernels.gated import geglu_tanh as kernel

        if (out := _launched(kernel, gate, value)) is not NotImplemented:
            return out
    return F.gelu(gate, approximate="tanh") * value


def _unlike(x: Tensor, y: Tensor) -> str | None:
    alike = x.shape == y.shape and x.dtype == y.dtype
    return None if alike else f"{tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype} are not alike"


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh-approximated GELU, elementwise."""
    if _triton(x):
        from joyedit.kernels.gated import gelu_tanh as kernel

        if (out := _launched(kernel, x)) is not NotImplemented:
            return out
    return F.gelu(x, approximate="tanh")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(linear(x, weight, bias)), the tanh-approximated one. x (..., D_in) -> (..., D_out) in x's dtype.

    After the product, the GELU reads and writes the whole hidden layer, whatever kernel it is, and the bias
    costs nothing in the product. What spares both is the GELU in the product itself, where that pays.
    """
    if isinstance(weight, Tensor) and _product_ends_in_gelu(x, weight, bias):
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        out = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
        return out.view(*x.shape[:-1], -1)
    return gelu_tanh(linear(x, weight, bias))


# Compute capabilities where cuBLASLt's product with a GELU at its end is faster than two kernels: 1.18 times
# at widths like ours, 1.03 times in a whole step. On 8.9 and 12.0 it is slower; 8.0 has no recent figures.
# Source: sgl-project/sglang, pull requests 28168 and 34350.
GELU_IN_PRODUCT = ((9, 0), (10, 0))


def _product_ends_in_gelu(*tensors: Tensor) -> bool:
    """Whether PyTorch's product with a GELU at its end is used: under "auto", without gradients, of which it
    has none. Only on CUDA is its GELU the approximated one."""
    x = tensors[0]
    if _backend != "auto" or not _on_gpu(x) or torch.version.hip or x.numel() == 0:
        return False
    if x.dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    gpu = torch.cuda.get_device_properties(x.device)
    return (gpu.major, gpu.minor) in GELU_IN_PRODUCT


def guide(
    cond: Tensor,
    uncond: Tensor,
    scale: float,
    rescale: bool = False,
    sample: Tensor | None = None,
    delta: Tensor | None = None,
) -> Tensor:
    """Classifier-free guidance, and what may follow it. cond, uncond (B, C, ...): predictions.

    comb = uncond + scale * (cond - uncond). rescale: its norm over C is brought back to that of `cond`,
    position by position, comb * |cond| / max(|comb|, 1e-6). sample (B, C, ...) and delta (one number): the
    result is an Euler step, sample + delta * comb, in the dtype of the sample. Raises ValueError for one of
    them without the other. Source: diffusers `pipeline_joyimage_edit.py`.
    """
    if (sample is None) != (delta is None):
        raise ValueError("an Euler step needs sample and delta, not one of them")
    if _triton(cond, uncond, sample, delta, problem=_unguided(cond, uncond, sample), has_backward=False):
        from joyedit.kernels.guide import guide as kernel

        if (out := _launched(kernel, cond, uncond, scale, rescale, sample, delta)) is not NotImplemented:
            return out
    comb = uncond + scale * (cond - uncond)
    if rescale:
        comb = comb * (cond.norm(dim=1, keepdim=True) / comb.norm(dim=1, keepdim=True).clamp_min(1e-6))
    if sample is None or delta is None:
        return comb
    return (sample.to(wide_dtype(sample)) + delta * comb.to(sample.dtype)).to(sample.dtype)


def _unguided(cond: Tensor, uncond: Tensor, sample: Tensor | None) -> str | None:
    shapes = [tuple(t.shape) for t in (cond, uncond, sample) if t is not None]
    if cond.ndim < 3 or any(shape != shapes[0] for shape in shapes):
        return f"tensors of one shape (B, C, ...) are wanted, not {shapes}"
    if cond.shape[1] > GUIDED_CHANNELS:
        return f"{cond.shape[1]} channels are more than {GUIDED_CHANNELS}"
    return None
