"""The gated residual of a transformer block, alone or with the LayerNorm that follows it.

    gate_residual             x + gate * y
    gate_residual_norm        out = x + gate * y (x + y without a gate), and
                              LayerNorm(out) * (1 + scale) + shift
    gate_residual_layer_norm  out = x + gate * y, and LayerNorm(out) * weight + bias

x, y (B, N, D), which may be of two dtypes; gate, shift, scale (B or 1, D); weight, bias (D). Sums and
statistics in fp32; out has the dtype of x, and the norm is that of the rounded out, as if they were computed
one after the other.

Fused: gate, sum, both statistics, modulation and the casts around them: forward reads x and y and writes out
(and normed); a block thus touches its stream twice, not eight times. Backward of the norm reads the incoming
gradients and out and writes x's gradient; that of the gate reads it and y and writes y's. The gradients of
gate, shift and scale are summed per program, then over programs.

The kernels see x and y as rows with two strides, so that slices need no copy. A program goes over some tokens
of one sample, whole rows of them or, of the gated residual alone, a part of the width, and loads gate, scale
and shift once for them: at a width of 4096, with streams in bf16 and modulation in fp32, 44 KiB for each
token of `gate_residual_norm` pass between L2 cache and program, not 80; of `gate_residual` 26, not 40.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from joyedit.kernels.shared import (
    PARTIAL_SUMS,
    as_modulation,
    as_rows,
    backward_tile,
    like,
    options,
    register,
    tile,
)


def gate_tile() -> dict[str, int]:
    """A part of the width, for eight tokens one after the other."""
    return {"TOKENS": 8, "BLOCK": 1024, **options(1024, 8)}


@triton.jit(do_not_specialize=["num_tokens"])
def gate_residual_forward(
    x_ptr,  # (B, N, D), strides (stride_xb, stride_xn, 1)
    y_ptr,  # (B, N, D), strides (stride_yb, stride_yn, 1)
    gate_ptr,  # (B, D), strides (stride_gate, 1)
    out_ptr,  # (B, N, D) contiguous
    num_tokens,
    width,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_gate,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    parts, chunks = tl.cdiv(width, BLOCK), tl.cdiv(num_tokens, TOKENS)
    chunk = tl.program_id(0) // parts
    b = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks).to(tl.int64) * TOKENS
    d = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    mask = d < width
    gate = tl.load(gate_ptr + b * stride_gate + d, mask, other=0.0).to(tl.float32)
    for n in range(first, tl.minimum(first + TOKENS, num_tokens)):
        x = tl.load(x_ptr + b * stride_xb + n * stride_xn + d, mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + b * stride_yb + n * stride_yn + d, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + (b * num_tokens + n) * width + d, x + y * gate, mask)


@triton.jit(do_not_specialize=["programs", "num_tokens"])
def gate_residual_backward(
    dout_ptr,  # (B, N, D) contiguous
    y_ptr,  # (B, N, D), strides (stride_yb, stride_yn, 1)
    gate_ptr,  # (B, D), strides (stride_gate, 1)
    dy_ptr,  # (B, N, D) contiguous
    dgate_ptr,  # (B, programs, D) fp32
    programs,  # programs that share the tokens of one sample, for each part of the width
    num_tokens,
    width,
    stride_yb,
    stride_yn,
    stride_gate,
    BLOCK: tl.constexpr,
):
    parts = tl.cdiv(width, BLOCK)
    p = tl.program_id(0) // parts
    b = (p // programs).to(tl.int64)
    d = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    mask = d < width
    gate = tl.load(gate_ptr + b * stride_gate + d, mask, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK,), tl.float32)
    for n in range((p % programs).to(tl.int64), num_tokens, programs):
        row = (b * num_tokens + n) * width + d
        dout = tl.load(dout_ptr + row, mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + b * stride_yb + n * stride_yn + d, mask, other=0.0).to(tl.float32)
        dgate += dout * y
        tl.store(dy_ptr + row, dout * gate, mask)
    tl.store(dgate_ptr + p.to(tl.int64) * width + d, dgate, mask)


@triton.jit(do_not_specialize=["num_tokens"])
def gate_residual_norm_forward(
    x_ptr,  # (B, N, D), strides (stride_xb, stride_xn, 1)
    y_ptr,  # (B, N, D), strides (stride_yb, stride_yn, 1)
    gate_ptr,  # (B, D), strides (stride_gate, 1), or None
    shift_ptr,  # (B, D), strides (stride_shift, 1)
    scale_ptr,  # (B, D), strides (stride_scale, 1)
    out_ptr,  # (B, N, D) contiguous
    normed_ptr,  # (B, N, D) contiguous
    num_tokens,
    width,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_gate,
    stride_shift,
    stride_scale,
    eps,
    PLUS_ONE: tl.constexpr,
    ROWS_EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunks = tl.cdiv(num_tokens, ROWS_EACH)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * ROWS_EACH
    d = tl.arange(0, BLOCK)[None]
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + b * stride_gate + d, d < width, other=0.0).to(tl.float32)
    scale = PLUS_ONE + tl.load(scale_ptr + b * stride_scale + d, d < width, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + b * stride_shift + d, d < width, other=0.0).to(tl.float32)
    for start in tl.range(first, tl.minimum(first + ROWS_EACH, num_tokens), ROWS, num_stages=STAGES):
        n = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (n < num_tokens) & (d < width)
        x = tl.load(x_ptr + b * stride_xb + n * stride_xn + d, mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + b * stride_yb + n * stride_yn + d, mask, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            y *= gate
        row = (b * num_tokens + n) * width + d
        out = (x + y).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row, out, mask)
        x = out.to(tl.float32)
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
        x *= tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        tl.store(normed_ptr + row, x * scale + shift, mask)


@triton.jit(do_not_specialize=["programs", "num_tokens"])
def gate_residual_norm_backward(
    dout_ptr,  # (B, N, D) contiguous
    dnormed_ptr,  # (B, N, D) contiguous
    out_ptr,  # (B, N, D) contiguous
    scale_ptr,  # (B, D), strides (stride_scale, 1)
    dx_ptr,  # (B, N, D) contiguous: all that out's gradient comes to
    dy_ptr,  # (B, N, D) contiguous, or None: a gate makes another of it
    dshift_ptr,  # (B, programs, D) fp32
    dscale_ptr,  # (B, programs, D) fp32
    programs,  # programs that share the tokens of one sample
    num_tokens,
    width,
    stride_scale,
    eps,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = (tl.program_id(0) // programs).to(tl.int64)
    d = tl.arange(0, BLOCK)[None]
    dshift = tl.zeros((ROWS, BLOCK), tl.float32)
    dscale = tl.zeros((ROWS, BLOCK), tl.float32)
    scale = PLUS_ONE + tl.load(scale_ptr + b * stride_scale + d, d < width, other=0.0).to(tl.float32)
    for chunk in range(tl.program_id(0) % programs, tl.cdiv(num_tokens, ROWS), programs):
        n = (chunk * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (n < num_tokens) & (d < width)
        row = (b * num_tokens + n) * width + d
        dx = tl.load(dout_ptr + row, mask, other=0.0).to(tl.float32)
        x = tl.load(out_ptr + row, mask, other=0.0).to(tl.float32)
        grad = tl.load(dnormed_ptr + row, mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        normed = x * rstd
        dshift += grad
        dscale += grad * normed
        grad *= scale
        along = (tl.sum(grad * normed, 1) / width)[:, None]
        level = (tl.sum(grad, 1) / width)[:, None]
        dx += (grad - level - normed * along) * rstd
        tl.store(dx_ptr + row, dx, mask)
        if dy_ptr is not None:
            tl.store(dy_ptr + row, dx, mask)
    p = tl.program_id(0).to(tl.int64)
    tl.store(dshift_ptr + p * width + d, tl.sum(dshift, 0)[None], d < width)
    tl.store(dscale_ptr + p * width + d, tl.sum(dscale, 0)[None], d < width)


def run_gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    out = like(x)
    if x.numel() == 0:
        return out
    x, y, (gate, stride_gate) = as_rows(x), as_rows(y), as_modulation(gate)
    (b, n, d), choice = x.shape, gate_tile()
    strides = *x.stride()[:2], *y.stride()[:2], stride_gate
    with torch.cuda.device_of(x):
        gate_residual_forward[b * triton.cdiv(n, choice["TOKENS"]) * triton.cdiv(d, choice["BLOCK"]),](
            x, y, gate, out, n, d, *strides, **choice
        )
    return out


def run_gate_residual_backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y, and of the gate for each sample: (B, D) fp32."""
    dy, (b, n, d) = like(y), y.shape
    if y.numel() == 0:
        return dy, torch.zeros((b, d), dtype=torch.float32, device=y.device)
    y, (gate, stride_gate), choice = as_rows(y), as_modulation(gate), gate_tile()
    programs = min(triton.cdiv(n, choice.pop("TOKENS")), max(1, PARTIAL_SUMS // b))
    dgate = torch.empty((b, programs, d), dtype=torch.float32, device=y.device)
    with torch.cuda.device_of(y):
        gate_residual_backward[b * programs * triton.cdiv(d, choice["BLOCK"]),](
            *(dout.contiguous(), y, gate, dy, dgate, programs, n, d, *y.stride()[:2], stride_gate), **choice
        )
    return dy, dgate.sum(1)


def run_gate_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return run_norm(x, y, gate, shift, scale, eps, 1)


def run_gate_residual_layer_norm(
    x: Tensor, y: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return run_norm(x, y, gate, bias, weight, eps, 0)


def run_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, plus_one: int
) -> tuple[Tensor, Tensor]:
    out, normed = like(x), like(x)
    if x.numel() == 0:
        return out, normed
    x, y = as_rows(x), as_rows(y)
    (gate, stride_gate), (shift, stride_shift), (scale, stride_scale) = map(
        as_modulation, (gate, shift, scale)
    )
    (b, n, d), choice = x.shape, tile(x, y)
    strides = *x.stride()[:2], *y.stride()[:2], stride_gate, stride_shift, stride_scale
    with torch.cuda.device_of(x):
        gate_residual_norm_forward[b * triton.cdiv(n, choice["ROWS_EACH"]),](
            x, y, gate, shift, scale, out, normed, n, d, *strides, eps, PLUS_ONE=plus_one, **choice
        )
    return out, normed


def run_gate_residual_norm_backward(
    dout: Tensor,
    dnormed: Tensor,
    out: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    eps: float,
    plus_one: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and y, and of gate, shift and scale for each sample: (B, D) fp32; zeros without a
    gate."""
    dx, dy, (b, n, d) = like(out), like(y), y.shape
    dgate = torch.zeros((b, d), dtype=torch.float32, device=y.device)
    if y.numel() == 0:
        return dx, dy, dgate, dgate.clone(), dgate.clone()
    (scale, stride_scale), choice = as_modulation(scale), backward_tile(d)
    programs = min(triton.cdiv(n, choice["ROWS"]), max(1, PARTIAL_SUMS // b))
    dshift, dscale = torch.empty((2, b, programs, d), dtype=torch.float32, device=y.device)
    with torch.cuda.device_of(y):
        gate_residual_norm_backward[b * programs,](
            *(dout.contiguous(), dnormed.contiguous(), out, scale, dx, dy if gate is None else None),
            *(dshift, dscale, programs, n, d, stride_scale, eps),
            PLUS_ONE=int(plus_one),
            **choice,
        )
    if gate is not None:
        dy, dgate = run_gate_residual_backward(dx, y, gate)
    return dx, dy, dgate, dshift.sum(1), dscale.sum(1)


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
LIBRARY.define("gate_residual(Tensor x, Tensor y, Tensor gate) -> Tensor")
LIBRARY.define("gate_residual_backward(Tensor dout, Tensor y, Tensor gate) -> (Tensor, Tensor)")
LIBRARY.define(
    "gate_residual_norm(Tensor x, Tensor y, Tensor? gate, Tensor shift, Tensor scale, float eps)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "gate_residual_layer_norm(Tensor x, Tensor y, Tensor gate, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor)"
)
LIBRARY.define(
    "gate_residual_norm_backward(Tensor dout, Tensor dnormed, Tensor out, Tensor y, Tensor? gate,"
    " Tensor scale, float eps, bool plus_one) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
register(LIBRARY, "gate_residual", run_gate_residual)
register(LIBRARY, "gate_residual_backward", run_gate_residual_backward)
register(LIBRARY, "gate_residual_norm", run_gate_residual_norm)
register(LIBRARY, "gate_residual_layer_norm", run_gate_residual_layer_norm)
register(LIBRARY, "gate_residual_norm_backward", run_gate_residual_norm_backward)


def sums_like(y: Tensor) -> Tensor:
    return torch.empty((y.shape[0], y.shape[2]), dtype=torch.float32, device=y.device)


@torch.library.register_fake("joyedit::gate_residual", lib=LIBRARY)
def _(x, y, gate):
    return like(x)


@torch.library.register_fake("joyedit::gate_residual_backward", lib=LIBRARY)
def _(dout, y, gate):
    return like(y), sums_like(y)


@torch.library.register_fake("joyedit::gate_residual_norm", lib=LIBRARY)
@torch.library.register_fake("joyedit::gate_residual_layer_norm", lib=LIBRARY)
def _(x, *others):
    return like(x), like(x)


@torch.library.register_fake("joyedit::gate_residual_norm_backward", lib=LIBRARY)
def _(dout, dnormed, out, y, *others):
    return like(out), like(y), sums_like(y), sums_like(y), sums_like(y)


def keep(ctx, inputs, output):
    _, y, gate = inputs
    ctx.save_for_backward(y, gate)


def differentiate(ctx, dout):
    y, gate = ctx.saved_tensors
    dy, dgate = torch.ops.joyedit.gate_residual_backward(dout, y, gate)
    return dout, dy, dgate.sum_to_size(gate.shape).to(gate.dtype)


def keep_norm(ctx, inputs, output):
    _, y, gate, shift, scale, ctx.eps = inputs
    ctx.shift = shift.shape, shift.dtype
    ctx.save_for_backward(output[0], y, gate, scale)


def differentiate_norm(ctx, dout, dnormed):
    out, y, gate, scale = ctx.saved_tensors
    dx, dy, dgate, dshift, dscale = torch.ops.joyedit.gate_residual_norm_backward(
        dout, dnormed, out, y, gate, scale, ctx.eps, True
    )
    shape, dtype = ctx.shift
    return (
        dx,
        dy,
        None if gate is None else dgate.sum_to_size(gate.shape).to(gate.dtype),
        dshift.sum_to_size(shape).to(dtype),
        dscale.sum_to_size(scale.shape).to(scale.dtype),
        None,
    )


def keep_affine(ctx, inputs, output):
    _, y, gate, weight, bias, ctx.eps = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(output[0], y, gate, weight)


def differentiate_affine(ctx, dout, dnormed):
    out, y, gate, weight = ctx.saved_tensors
    dx, dy, dgate, dbias, dweight = torch.ops.joyedit.gate_residual_norm_backward(
        dout, dnormed, out, y, gate, weight, ctx.eps, False
    )
    dgate = dgate.sum_to_size(gate.shape).to(gate.dtype)
    return dx, dy, dgate, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(ctx.bias_dtype), None


torch.library.register_autograd("joyedit::gate_residual", differentiate, setup_context=keep, lib=LIBRARY)
torch.library.register_autograd(
    "joyedit::gate_residual_norm", differentiate_norm, setup_context=keep_norm, lib=LIBRARY
)
torch.library.register_autograd(
    "joyedit::gate_residual_layer_norm", differentiate_affine, setup_context=keep_affine, lib=LIBRARY
)
gate_residual = torch.ops.joyedit.gate_residual.default
gate_residual_norm = torch.ops.joyedit.gate_residual_norm.default
gate_residual_layer_norm = torch.ops.joyedit.gate_residual_layer_norm.default
