"""LayerNorm over the last axis, then a scale and a shift of each sample or of all, statistics in fp32.

    ada_layer_norm  (x - mean) / sqrt(var + eps) * (1 + scale) + shift  x (B, N, D); scale, shift (B or 1, D)
    layer_norm      (x - mean) / sqrt(var + eps) * weight + bias        x (..., D); weight, bias (D) or None

Fused: both statistics, the modulation and the casts around them, in one pass: forward reads x and writes out.
Backward reads the incoming gradient and x and writes x's gradient; the statistics are computed anew, because
the row is in registers anyway. The gradients of scale and shift are summed per program, then over programs.

The kernels see x (A, R, D) as rows with two strides, so that slices need no copy, and one scale and shift per
A (batch stride 0: the same for all). out is contiguous. A program goes over ROWS_EACH whole rows of one
sample and loads scale and shift once for them: at a width of 4096, with x in bf16 and modulation in fp32, 24
KiB for each row pass between L2 cache and program, not 48.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from joyedit.kernels.shared import PARTIAL_SUMS, as_modulation, as_rows, backward_tile, like, register, tile


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_forward(
    x_ptr,  # (A, R, D), strides (stride_a, stride_r, 1)
    scale_ptr,  # (A, D), strides (stride_scale, 1), or None
    shift_ptr,  # (A, D), strides (stride_shift, 1), or None
    out_ptr,  # (A, R, D) contiguous
    num_rows,
    width,
    stride_a,
    stride_r,
    stride_scale,
    stride_shift,
    eps,
    PLUS_ONE: tl.constexpr,
    ROWS_EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunks = tl.cdiv(num_rows, ROWS_EACH)
    a = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * ROWS_EACH
    d = tl.arange(0, BLOCK)[None]
    if scale_ptr is not None:
        scale = PLUS_ONE + tl.load(scale_ptr + a * stride_scale + d, d < width, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + a * stride_shift + d, d < width, other=0.0).to(tl.float32)
    for start in tl.range(first, tl.minimum(first + ROWS_EACH, num_rows), ROWS, num_stages=STAGES):
        r = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (r < num_rows) & (d < width)
        x = tl.load(x_ptr + a * stride_a + r * stride_r + d, mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
        x *= tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        if scale_ptr is not None:
            x *= scale
        if shift_ptr is not None:
            x += shift
        tl.store(out_ptr + (a * num_rows + r) * width + d, x, mask)


@triton.jit(do_not_specialize=["programs", "num_rows"])
def layer_norm_backward(
    grad_ptr,  # (A, R, D) contiguous
    x_ptr,  # (A, R, D), strides (stride_a, stride_r, 1)
    scale_ptr,  # (A, D), strides (stride_scale, 1), or None
    dx_ptr,  # (A, R, D) contiguous
    dscale_ptr,  # (A, programs, D) fp32
    dshift_ptr,  # (A, programs, D) fp32
    programs,  # programs that share the rows of one A
    num_rows,
    width,
    stride_a,
    stride_r,
    stride_scale,
    eps,
    PLUS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    a = (tl.program_id(0) // programs).to(tl.int64)
    d = tl.arange(0, BLOCK)[None]
    if scale_ptr is not None:
        scale = PLUS_ONE + tl.load(scale_ptr + a * stride_scale + d, d < width, other=0.0).to(tl.float32)
    else:
        scale = tl.full((1, BLOCK), 1.0, tl.float32)
    dscale = tl.zeros((ROWS, BLOCK), tl.float32)
    dshift = tl.zeros((ROWS, BLOCK), tl.float32)
    for chunk in range(tl.program_id(0) % programs, tl.cdiv(num_rows, ROWS), programs):
        r = (chunk * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (r < num_rows) & (d < width)
        x = tl.load(x_ptr + a * stride_a + r * stride_r + d, mask, other=0.0).to(tl.float32)
        row = (a * num_rows + r) * width + d
        grad = tl.load(grad_ptr + row, mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        normed = x * rstd
        dnormed = grad * scale
        along = (tl.sum(dnormed * normed, 1) / width)[:, None]
        level = (tl.sum(dnormed, 1) / width)[:, None]
        tl.store(dx_ptr + row, (dnormed - level - normed * along) * rstd, mask)
        dscale += grad * normed
        dshift += grad
    p = tl.program_id(0).to(tl.int64)
    tl.store(dscale_ptr + p * width + d, tl.sum(dscale, 0)[None], d < width)
    tl.store(dshift_ptr + p * width + d, tl.sum(dshift, 0)[None], d < width)


def run_ada_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return run_forward(x, scale, shift, eps, 1)


def run_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return run_forward(x, weight, bias, eps, 0)


def run_forward(x: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, plus_one: int) -> Tensor:
    out = like(x)
    if x.numel() == 0:
        return out
    rows, choice = as_rows(x), tile(x)
    a, r, d = rows.shape
    (scale, stride_scale), (shift, stride_shift) = as_modulation(scale), as_modulation(shift)
    strides = rows.stride(0), rows.stride(1), stride_scale, stride_shift
    with torch.cuda.device_of(x):
        layer_norm_forward[a * triton.cdiv(r, choice["ROWS_EACH"]),](
            rows, scale, shift, out, r, d, *strides, eps, PLUS_ONE=plus_one, **choice
        )
    return out


def run_backward(
    grad: Tensor, x: Tensor, scale: Tensor | None, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = like(x)
    if x.numel() == 0:
        zeros = torch.zeros((x.shape[:-2].numel(), x.shape[-1]), dtype=torch.float32, device=x.device)
        return dx, zeros, zeros.clone()
    rows, choice = as_rows(x), backward_tile(x.shape[-1])
    a, r, d = rows.shape
    programs = min(triton.cdiv(r, choice["ROWS"]), max(1, PARTIAL_SUMS // a))
    dscale, dshift = (torch.empty((a, programs, d), dtype=torch.float32, device=x.device) for _ in range(2))
    scale, stride_scale = as_modulation(scale)
    sizes = programs, r, d, rows.stride(0), rows.stride(1), stride_scale
    with torch.cuda.device_of(x):
        layer_norm_backward[a * programs,](
            grad.contiguous(), rows, scale, dx, dscale, dshift, *sizes, eps, PLUS_ONE=int(plus_one), **choice
        )
    return dx, dscale.sum(1), dshift.sum(1)


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
LIBRARY.define("ada_layer_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor")
LIBRARY.define("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor")
# Gradients of x, and of scale and shift for each A: (A, D) fp32.
LIBRARY.define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? scale, float eps, bool plus_one)"
    " -> (Tensor, Tensor, Tensor)"
)
register(LIBRARY, "ada_layer_norm", run_ada_layer_norm)
register(LIBRARY, "layer_norm", run_layer_norm)
register(LIBRARY, "layer_norm_backward", run_backward)


@torch.library.register_fake("joyedit::ada_layer_norm", lib=LIBRARY)
@torch.library.register_fake("joyedit::layer_norm", lib=LIBRARY)
def fake_forward(x, *others):
    return like(x)


@torch.library.register_fake("joyedit::layer_norm_backward", lib=LIBRARY)
def fake_backward(grad, x, scale, eps, plus_one):
    sums = (x.shape[:-2].numel(), x.shape[-1])
    dscale, dshift = (torch.empty(sums, dtype=torch.float32, device=x.device) for _ in range(2))
    return like(x), dscale, dshift


def keep_ada(ctx, inputs, output):
    x, shift, scale, ctx.eps = inputs
    ctx.shift = shift.shape, shift.dtype
    ctx.save_for_backward(x, scale)


def differentiate_ada(ctx, grad):
    x, scale = ctx.saved_tensors
    dx, dscale, dshift = torch.ops.joyedit.layer_norm_backward(grad, x, scale, ctx.eps, True)
    (shape, dtype) = ctx.shift
    return dx, dshift.sum_to_size(shape).to(dtype), dscale.sum_to_size(scale.shape).to(scale.dtype), None


def keep_affine(ctx, inputs, output):
    x, weight, bias, ctx.eps = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def differentiate_affine(ctx, grad):
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.joyedit.layer_norm_backward(grad, x, weight, ctx.eps, False)
    dweight = None if weight is None else dweight.sum(0).to(weight.dtype)
    return dx, dweight, None if ctx.bias is None else dbias.sum(0).to(ctx.bias), None


torch.library.register_autograd(
    "joyedit::ada_layer_norm", differentiate_ada, setup_context=keep_ada, lib=LIBRARY
)
torch.library.register_autograd(
    "joyedit::layer_norm", differentiate_affine, setup_context=keep_affine, lib=LIBRARY
)
ada_layer_norm = torch.ops.joyedit.ada_layer_norm.default
layer_norm = torch.ops.joyedit.layer_norm.default
