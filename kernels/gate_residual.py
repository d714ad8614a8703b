"""The gated residual of a transformer block, alone or with the modulated LayerNorm that follows it.

    gate_residual         x + gate * y
    gate_residual_norm    out = x + gate * y (x + y without a gate), and
                          LayerNorm(out) * (1 + scale) + shift

x, y (B, N, D), which may be of two dtypes; gate, shift, scale (B or 1, D). Sums and statistics in fp32; out
has the dtype of x, and the norm is that of the rounded out, as if they were computed one after the other.

Fused: gate, sum, both statistics, modulation and the casts around them: forward reads x and y and writes out
(and normed); a block thus touches its stream twice, not eight times. Backward reads the incoming gradients, y
(and out) and writes the gradients of x and y; the gradients of gate, shift and scale are summed per program,
then over programs.

The kernels see x and y as rows with two strides, so that slices need no copy. A program holds ROWS whole
rows of one sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTIAL_SUMS = 256  # programs of a backward; the same on every device, so that gradients are too


def tile(width: int) -> dict[str, int]:
    """Whole rows, 4096 elements or one row, and 16 elements per thread: two 16-byte loads of half precision
    in flight for each of x and y. Instinct's warps are 64 wide. Products and sums fuse, whatever the default
    of a release of Triton is."""
    block = triton.next_power_of_2(width)
    rows = max(1, min(64, 4096 // block))
    lanes = 64 if torch.version.hip else 32
    num_warps = max(1, min(16, rows * block // (16 * lanes)))
    return {"ROWS": rows, "BLOCK": block, "num_warps": num_warps, "enable_fp_fusion": True}


@triton.jit(do_not_specialize=["num_tokens"])
def forward(
    x_ptr,  # (B, N, D), strides (stride_xb, stride_xn, 1)
    y_ptr,  # (B, N, D), strides (stride_yb, stride_yn, 1)
    gate_ptr,  # (B, D), strides (stride_gate, 1), or None
    shift_ptr,  # (B, D), strides (stride_shift, 1), or None: no norm
    scale_ptr,  # (B, D), strides (stride_scale, 1), or None: no norm
    out_ptr,  # (B, N, D) contiguous
    normed_ptr,  # (B, N, D) contiguous, or None
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(num_tokens, ROWS)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    n = (tl.program_id(0) % chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK)[None]
    mask = (n < num_tokens) & (d < width)
    x = tl.load(x_ptr + b * stride_xb + n * stride_xn + d, mask, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + b * stride_yb + n * stride_yn + d, mask, other=0.0).to(tl.float32)
    if gate_ptr is not None:
        y *= tl.load(gate_ptr + b * stride_gate + d, d < width, other=0.0).to(tl.float32)
    row = (b * num_tokens + n) * width + d
    out = (x + y).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row, out, mask)
    if normed_ptr is not None:
        x = out.to(tl.float32)
        x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
        x *= tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
        x *= 1 + tl.load(scale_ptr + b * stride_scale + d, d < width, other=0.0).to(tl.float32)
        x += tl.load(shift_ptr + b * stride_shift + d, d < width, other=0.0).to(tl.float32)
        tl.store(normed_ptr + row, x, mask)


@triton.jit(do_not_specialize=["programs", "num_tokens"])
def backward(
    dout_ptr,  # (B, N, D) contiguous
    dnormed_ptr,  # (B, N, D) contiguous, or None: no norm
    out_ptr,  # (B, N, D) contiguous, or None: no norm
    y_ptr,  # (B, N, D), strides (stride_yb, stride_yn, 1)
    gate_ptr,  # (B, D), strides (stride_gate, 1), or None
    scale_ptr,  # (B, D), strides (stride_scale, 1), or None: no norm
    dx_ptr,  # (B, N, D) contiguous, or None: it equals dout
    dy_ptr,  # (B, N, D) contiguous
    dgate_ptr,  # (B, programs, D) fp32, or None: no gate
    dshift_ptr,  # (B, programs, D) fp32, or None: no norm
    dscale_ptr,  # (B, programs, D) fp32, or None: no norm
    programs,  # programs that share the tokens of one sample
    num_tokens,
    width,
    stride_yb,
    stride_yn,
    stride_gate,
    stride_scale,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = (tl.program_id(0) // programs).to(tl.int64)
    d = tl.arange(0, BLOCK)[None]
    dgate = tl.zeros((ROWS, BLOCK), tl.float32)
    dshift = tl.zeros((ROWS, BLOCK), tl.float32)
    dscale = tl.zeros((ROWS, BLOCK), tl.float32)
    for chunk in range(tl.program_id(0) % programs, tl.cdiv(num_tokens, ROWS), programs):
        n = (chunk * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (n < num_tokens) & (d < width)
        row = (b * num_tokens + n) * width + d
        dx = tl.load(dout_ptr + row, mask, other=0.0).to(tl.float32)
        if dnormed_ptr is not None:
            x = tl.load(out_ptr + row, mask, other=0.0).to(tl.float32)
            x = tl.where(mask, x - (tl.sum(x, 1) / width)[:, None], 0.0)
            rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
            normed = x * rstd
            grad = tl.load(dnormed_ptr + row, mask, other=0.0).to(tl.float32)
            dshift += grad
            dscale += grad * normed
            grad *= 1 + tl.load(scale_ptr + b * stride_scale + d, d < width, other=0.0).to(tl.float32)
            along = (tl.sum(grad * normed, 1) / width)[:, None]
            level = (tl.sum(grad, 1) / width)[:, None]
            dx += (grad - level - normed * along) * rstd
            tl.store(dx_ptr + row, dx, mask)
        if gate_ptr is not None:
            y = tl.load(y_ptr + b * stride_yb + n * stride_yn + d, mask, other=0.0).to(tl.float32)
            dgate += dx * y
            dx *= tl.load(gate_ptr + b * stride_gate + d, d < width, other=0.0).to(tl.float32)
        tl.store(dy_ptr + row, dx, mask)
    p = tl.program_id(0).to(tl.int64)
    if gate_ptr is not None:
        tl.store(dgate_ptr + p * width + d, tl.sum(dgate, 0)[None], d < width)
    if dnormed_ptr is not None:
        tl.store(dshift_ptr + p * width + d, tl.sum(dshift, 0)[None], d < width)
        tl.store(dscale_ptr + p * width + d, tl.sum(dscale, 0)[None], d < width)


def unit_stride(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(-1) == 1 else t.contiguous()


def sample_stride(t: Tensor | None) -> int:
    """From one sample's modulation to the next one's: 0 when all share one."""
    return t.stride(0) if t is not None and t.shape[0] > 1 else 0


def run_gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return run_forward(x, y, gate, None, None, 0.0)[0]


def run_gate_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    out, normed = run_forward(x, y, gate, shift, scale, eps)
    assert normed is not None
    return out, normed


def run_forward(
    x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = None if scale is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out, normed
    x, y, gate, shift, scale = map(unit_stride, (x, y, gate, shift, scale))
    (b, n, d), choice = x.shape, tile(x.shape[-1])
    strides = x.stride(0), x.stride(1), y.stride(0), y.stride(1), *map(sample_stride, (gate, shift, scale))
    with torch.cuda.device_of(x):
        forward[b * triton.cdiv(n, choice["ROWS"]),](
            x, y, gate, shift, scale, out, normed, n, d, *strides, eps, **choice
        )
    return out, normed


def run_gate_residual_backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    _, dy, (dgate, _, _) = run_backward(dout, None, None, y, gate, None, 0.0)
    return dy, dgate


def run_gate_residual_norm_backward(
    dout: Tensor, dnormed: Tensor, out: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dy, sums = run_backward(dout, dnormed, out, y, gate, scale, eps)
    assert dx is not None
    return dx, dy, *sums


def run_backward(
    dout: Tensor,
    dnormed: Tensor | None,
    out: Tensor | None,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor | None, Tensor, list[Tensor]]:
    """Gradients of x (None: it is dout) and y, and sums (B, D) fp32 for gate, shift and scale: zeros for
    those that there are not."""
    b, n, d = y.shape
    dx = None if dnormed is None else torch.empty(y.shape, dtype=dout.dtype, device=y.device)
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    zeros = torch.zeros((b, d), dtype=torch.float32, device=y.device)
    if y.numel() == 0:
        return dx, dy, [zeros, zeros.clone(), zeros.clone()]
    choice = tile(d)
    programs = min(triton.cdiv(n, choice["ROWS"]), max(1, PARTIAL_SUMS // b))
    partial = [
        None if t is None else torch.empty((b, programs, d), dtype=torch.float32, device=y.device)
        for t in (gate, scale, scale)
    ]
    dout, dnormed = dout.contiguous(), None if dnormed is None else dnormed.contiguous()
    y, gate, scale = map(unit_stride, (y, gate, scale))
    sizes = programs, n, d, y.stride(0), y.stride(1), sample_stride(gate), sample_stride(scale)
    with torch.cuda.device_of(y):
        backward[b * programs,](dout, dnormed, out, y, gate, scale, dx, dy, *partial, *sizes, eps, **choice)
    return dx, dy, [zeros.clone() if t is None else t.sum(1) for t in partial]


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
LIBRARY.define("gate_residual(Tensor x, Tensor y, Tensor gate) -> Tensor")
LIBRARY.define("gate_residual_backward(Tensor dout, Tensor y, Tensor gate) -> (Tensor, Tensor)")
LIBRARY.define(
    "gate_residual_norm(Tensor x, Tensor y, Tensor? gate, Tensor shift, Tensor scale, float eps)"
    " -> (Tensor, Tensor)"
)
# Gradients of x and y, and of gate, shift and scale for each sample: (B, D) fp32.
LIBRARY.define(
    "gate_residual_norm_backward(Tensor dout, Tensor dnormed, Tensor out, Tensor y, Tensor? gate,"
    " Tensor scale, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for key in ("CUDA", "CPU"):  # AMD's devices are CUDA to PyTorch; the CPU is the interpreter's
    LIBRARY.impl("gate_residual", run_gate_residual, key)
    LIBRARY.impl("gate_residual_backward", run_gate_residual_backward, key)
    LIBRARY.impl("gate_residual_norm", run_gate_residual_norm, key)
    LIBRARY.impl("gate_residual_norm_backward", run_gate_residual_norm_backward, key)


def like(t: Tensor) -> Tensor:
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def sums_like(y: Tensor) -> Tensor:
    return torch.empty((y.shape[0], y.shape[2]), dtype=torch.float32, device=y.device)


@torch.library.register_fake("joyedit::gate_residual", lib=LIBRARY)
def _(x, y, gate):
    return like(x)


@torch.library.register_fake("joyedit::gate_residual_backward", lib=LIBRARY)
def _(dout, y, gate):
    return like(y), sums_like(y)


@torch.library.register_fake("joyedit::gate_residual_norm", lib=LIBRARY)
def _(x, y, gate, shift, scale, eps):
    return like(x), like(x)


@torch.library.register_fake("joyedit::gate_residual_norm_backward", lib=LIBRARY)
def _(dout, dnormed, out, y, gate, scale, eps):
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
        dout, dnormed, out, y, gate, scale, ctx.eps
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


torch.library.register_autograd("joyedit::gate_residual", differentiate, setup_context=keep, lib=LIBRARY)
torch.library.register_autograd(
    "joyedit::gate_residual_norm", differentiate_norm, setup_context=keep_norm, lib=LIBRARY
)
gate_residual = torch.ops.joyedit.gate_residual.default
gate_residual_norm = torch.ops.joyedit.gate_residual_norm.default
