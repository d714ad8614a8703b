"""RMSNorm over the last axis, of x or of a stream after what a layer adds to it; statistics in fp32.

    rms_norm        x / sqrt(mean(x^2) + eps) * weight
    add_rms_norm    total = x + y in the dtype of x, and rms_norm(total)

Fused: sum, square, mean, root, scale and the casts around them, in one pass: forward reads x (and y) and
writes out (and total). Backward reads the incoming gradients and x, or total, and writes its gradient; the
statistics are computed anew, because the row is in registers anyway. The gradient of the weight is summed per
program, then over programs.

x, y (A, R, D), of one dtype or two: rows with two strides, so that slices need no copy; weight (D); results
are contiguous. A program goes over ROWS_EACH whole rows and loads the weight once for them: at a width of
5120 in bf16, 22.5 KiB for each row pass between L2 cache and program, not 30.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from joyedit.kernels.shared import PARTIAL_SUMS, as_rows, backward_tile, like, register, tile


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_forward(
    x_ptr,  # (A, R, D), strides (stride_a, stride_r, 1)
    y_ptr,  # (A, R, D), strides (stride_ya, stride_yr, 1), or None: nothing is added
    weight_ptr,  # (D)
    total_ptr,  # (A, R, D) contiguous, or None: nothing is added
    out_ptr,  # (A, R, D) contiguous
    num_rows,
    width,
    stride_a,
    stride_r,
    stride_ya,
    stride_yr,
    eps,
    ROWS_EACH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    chunks = tl.cdiv(num_rows, ROWS_EACH)
    a = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * ROWS_EACH
    d = tl.arange(0, BLOCK)[None]
    weight = tl.load(weight_ptr + d, d < width, other=0.0).to(tl.float32)
    for start in tl.range(first, tl.minimum(first + ROWS_EACH, num_rows), ROWS, num_stages=STAGES):
        r = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (r < num_rows) & (d < width)
        x = tl.load(x_ptr + a * stride_a + r * stride_r + d, mask, other=0.0).to(tl.float32)
        row = (a * num_rows + r) * width + d
        if y_ptr is not None:
            y = tl.load(y_ptr + a * stride_ya + r * stride_yr + d, mask, other=0.0).to(tl.float32)
            total = (x + y).to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row, total, mask)
            x = total.to(tl.float32)
        rrms = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        tl.store(out_ptr + row, x * rrms * weight, mask)


@triton.jit(do_not_specialize=["num_chunks", "num_rows"])
def rms_norm_backward(
    grad_ptr,  # (A, R, D) contiguous
    dtotal_ptr,  # (A, R, D) contiguous: the gradient that x has besides, or None
    x_ptr,  # (A, R, D), strides (stride_a, stride_r, 1)
    weight_ptr,  # (D)
    dx_ptr,  # (A, R, D) contiguous
    dweight_ptr,  # (programs, D) fp32
    num_chunks,  # A * ceil(R / ROWS)
    num_rows,
    width,
    stride_a,
    stride_r,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(num_rows, ROWS)
    d = tl.arange(0, BLOCK)[None]
    weight = tl.load(weight_ptr + d, d < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        a = (chunk // chunks).to(tl.int64)
        r = (chunk % chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        mask = (r < num_rows) & (d < width)
        x = tl.load(x_ptr + a * stride_a + r * stride_r + d, mask, other=0.0).to(tl.float32)
        row = (a * num_rows + r) * width + d
        grad = tl.load(grad_ptr + row, mask, other=0.0).to(tl.float32)
        rrms = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        normed = x * rrms
        dnormed = grad * weight
        along = (tl.sum(dnormed * normed, 1) / width)[:, None]
        dx = (dnormed - normed * along) * rrms
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row, mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row, dx, mask)
        dweight += grad * normed
    p = tl.program_id(0).to(tl.int64)
    tl.store(dweight_ptr + p * width + d, tl.sum(dweight, 0)[None], d < width)


def run_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return run_forward(x, None, weight, eps)[1]


def run_add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, out = run_forward(x, y, weight, eps)
    assert total is not None
    return total, out


def run_forward(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
    out = like(x)
    total = None if y is None else like(x)
    if x.numel() == 0:
        return total, out
    choice = tile(x) if y is None else tile(x, y)
    x, y = as_rows(x), None if y is None else as_rows(y)
    a, r, d = x.shape
    strides = x.stride(0), x.stride(1), *((0, 0) if y is None else y.stride()[:2])
    with torch.cuda.device_of(x):
        rms_norm_forward[a * triton.cdiv(r, choice["ROWS_EACH"]),](
            x, y, weight.contiguous(), total, out, r, d, *strides, eps, **choice
        )
    return total, out


def run_rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return run_backward(grad, None, x, weight, eps)


def run_backward(
    grad: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dx = like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(weight)
    rows, choice = as_rows(x), backward_tile(x.shape[-1])
    a, r, d = rows.shape
    chunks = a * triton.cdiv(r, choice["ROWS"])
    programs = min(chunks, PARTIAL_SUMS)
    dweight = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    strides = rows.stride(0), rows.stride(1)
    grad, dtotal = grad.contiguous(), None if dtotal is None else dtotal.contiguous()
    with torch.cuda.device_of(x):
        rms_norm_backward[programs,](
            *(grad, dtotal, rows, weight.contiguous(), dx, dweight, chunks, r, d, *strides, eps), **choice
        )
    return dx, dweight.sum(0).to(weight.dtype)


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
LIBRARY.define("add_rms_norm(Tensor x, Tensor y, Tensor weight, float eps) -> (Tensor, Tensor)")
# Gradients of the sum and of the weight.
LIBRARY.define(
    "add_rms_norm_backward(Tensor grad, Tensor dtotal, Tensor total, Tensor weight, float eps)"
    " -> (Tensor, Tensor)"
)
register(LIBRARY, "rms_norm", run_rms_norm)
register(LIBRARY, "rms_norm_backward", run_rms_norm_backward)
register(LIBRARY, "add_rms_norm", run_add_rms_norm)
register(LIBRARY, "add_rms_norm_backward", run_backward)


@torch.library.register_fake("joyedit::rms_norm", lib=LIBRARY)
def _(x, weight, eps):
    return like(x)


@torch.library.register_fake("joyedit::rms_norm_backward", lib=LIBRARY)
def _(grad, x, weight, eps):
    return like(x), torch.empty_like(weight)


@torch.library.register_fake("joyedit::add_rms_norm", lib=LIBRARY)
def _(x, y, weight, eps):
    total = like(x)
    return total, torch.empty_like(total)


@torch.library.register_fake("joyedit::add_rms_norm_backward", lib=LIBRARY)
def _(grad, dtotal, total, weight, eps):
    dx = like(total)
    return dx, torch.empty_like(weight)


def keep(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def differentiate(ctx, grad):
    return *torch.ops.joyedit.rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


def keep_total(ctx, inputs, output):
    _, y, weight, ctx.eps = inputs
    ctx.y_dtype = y.dtype
    ctx.save_for_backward(output[0], weight)


def differentiate_total(ctx, dtotal, grad):
    dx, dweight = torch.ops.joyedit.add_rms_norm_backward(grad, dtotal, *ctx.saved_tensors, ctx.eps)
    return dx, dx.to(ctx.y_dtype), dweight, None


torch.library.register_autograd("joyedit::rms_norm", differentiate, setup_context=keep, lib=LIBRARY)
torch.library.register_autograd(
    "joyedit::add_rms_norm", differentiate_total, setup_context=keep_total, lib=LIBRARY
)
rms_norm = torch.ops.joyedit.rms_norm.default
add_rms_norm = torch.ops.joyedit.add_rms_norm.default
