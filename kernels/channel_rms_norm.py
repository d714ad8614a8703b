"""RMSNorm over the channels of feature maps, alone or with the SiLU that follows it: out = x / |x| * sqrt(C)
* gamma, where |x| is the length of a position's channels, at least 1e-12, in fp32.

x (B, C, ...), seen as (B, T, C, N) with four strides: contiguous, channels last, frames of a video before or
after the channels need no copy; gamma has C values; out is dense, in the memory format of x.

Fused: length, scale, SiLU and the casts around them, in one pass: forward reads x and writes out. Backward
reads the incoming gradient and x, which is in registers for its length anyway, and writes x's gradient; the
gradient of gamma is summed per program, then over programs. A program holds all channels of some positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from joyedit.kernels.shared import PARTIAL_SUMS, as_planes, empty_as, options, register


def tile(channels: int, positions: int, last: bool, most: int = 16384) -> dict[str, int]:
    """All channels, padded to a power of two. Channels last: 4096 elements, as the other norms. Contiguous:
    8192, or 32 positions if `most` allows it: 64 bytes of half precision next to each other in each channel.
    Up to 1024 threads: 32 elements each spill on Ampere."""
    c_block = triton.next_power_of_2(channels)
    wanted = 4096 // c_block if last else max(32, 8192 // c_block)
    n_block = max(1, min(wanted, most // c_block, triton.next_power_of_2(positions)))
    return {"C_BLOCK": c_block, "N_BLOCK": n_block, **options(c_block * n_block, most_threads=1024)}


@triton.jit(do_not_specialize=["num_frames"])
def channel_rms_norm_forward(
    x_ptr,  # (B, T, C, N), strides (stride_xb, stride_xt, stride_xc, stride_xn)
    gamma_ptr,  # (C)
    out_ptr,  # (B, T, C, N), strides (stride_ob, stride_ot, stride_oc, stride_on)
    num_frames,
    num_channels,
    num_positions,
    root,  # sqrt(C)
    stride_xb,
    stride_xt,
    stride_xc,
    stride_xn,
    stride_ob,
    stride_ot,
    stride_oc,
    stride_on,
    SILU: tl.constexpr,
    C_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(num_positions, N_BLOCK)
    frame = tl.program_id(0) // chunks
    b, t = (frame // num_frames).to(tl.int64), (frame % num_frames).to(tl.int64)
    n = (tl.program_id(0) % chunks).to(tl.int64) * N_BLOCK + tl.arange(0, N_BLOCK)[:, None]
    c = tl.arange(0, C_BLOCK)[None].to(tl.int64)
    mask = (c < num_channels) & (n < num_positions)
    x_ptr += b * stride_xb + t * stride_xt
    x = tl.load(x_ptr + c * stride_xc + n * stride_xn, mask, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + c, c < num_channels, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]
    out = x * (root / length) * gamma
    if SILU:
        out *= tl.sigmoid(out)
    out_ptr += b * stride_ob + t * stride_ot
    tl.store(out_ptr + c * stride_oc + n * stride_on, out, mask)


@triton.jit(do_not_specialize=["num_chunks", "num_frames"])
def channel_rms_norm_backward(
    grad_ptr,  # (B, T, C, N), strides (stride_gb, stride_gt, stride_gc, stride_gn)
    x_ptr,  # (B, T, C, N), strides (stride_xb, stride_xt, stride_xc, stride_xn)
    gamma_ptr,  # (C)
    dx_ptr,  # (B, T, C, N), strides (stride_db, stride_dt, stride_dc, stride_dn)
    dgamma_ptr,  # (programs, C) fp32
    num_chunks,  # B * T * ceil(N / N_BLOCK)
    num_frames,
    num_channels,
    num_positions,
    root,  # sqrt(C)
    stride_gb,
    stride_gt,
    stride_gc,
    stride_gn,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_xn,
    stride_db,
    stride_dt,
    stride_dc,
    stride_dn,
    SILU: tl.constexpr,
    C_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(num_positions, N_BLOCK)
    c = tl.arange(0, C_BLOCK)[None].to(tl.int64)
    gamma = tl.load(gamma_ptr + c, c < num_channels, other=0.0).to(tl.float32)
    dgamma = tl.zeros((N_BLOCK, C_BLOCK), tl.float32)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        n = (chunk % chunks * N_BLOCK + tl.arange(0, N_BLOCK)[:, None]).to(tl.int64)
        b, t = (chunk // chunks // num_frames).to(tl.int64), (chunk // chunks % num_frames).to(tl.int64)
        mask = (c < num_channels) & (n < num_positions)
        x = tl.load(x_ptr + b * stride_xb + t * stride_xt + c * stride_xc + n * stride_xn, mask, other=0.0)
        x = x.to(tl.float32)
        at = b * stride_gb + t * stride_gt + c * stride_gc + n * stride_gn
        grad = tl.load(grad_ptr + at, mask, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(x * x, 1))[:, None]
        scale = root / tl.maximum(length, 1e-12)
        normed = x * scale
        if SILU:
            out = normed * gamma
            share = tl.sigmoid(out)
            grad *= share * (1 + out * (1 - share))
        dgamma += grad * normed  # 0 outside
        grad *= gamma
        along = (tl.sum(grad * normed, 1) / num_channels)[:, None]
        along = tl.where(length >= 1e-12, along, 0.0)  # a length that is raised to 1e-12 does not depend on x
        at = b * stride_db + t * stride_dt + c * stride_dc + n * stride_dn
        tl.store(dx_ptr + at, (grad - normed * along) * scale, mask)
    p = tl.program_id(0).to(tl.int64)
    tl.store(dgamma_ptr + p * num_channels + c, tl.sum(dgamma, 0)[None], c < num_channels)


def first_axis(x: Tensor) -> int:
    """From which on the axes are positions: of videos the fourth, after the frames."""
    return 3 if x.ndim == 5 else 2


def as_frames(x: Tensor) -> Tensor:
    """(B, C, ...) -> (B, C, T, N), T frames of a video or 1: a view wherever one stride can describe the
    positions."""
    planes = as_planes(x, first_axis(x))
    return planes if planes.ndim == 4 else planes[:, :, None]


def strides(planes: Tensor) -> tuple[int, ...]:
    """(B, C, T, N) -> strides of (B, T, C, N)."""
    b, c, t, n = planes.stride()
    return b, t, c, n


def run_channel_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return run_forward(x, gamma, silu=False)


def run_channel_rms_norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    return run_forward(x, gamma, silu=True)


def run_forward(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    result = empty_as(x, first_axis(x))
    if x.numel() == 0:
        return result
    x, out = as_frames(x), as_frames(result)
    b, c, t, n = x.shape
    choice = tile(c, n, x.stride(1) == 1)
    with torch.cuda.device_of(x):
        channel_rms_norm_forward[b * t * triton.cdiv(n, choice["N_BLOCK"]),](
            x, gamma.contiguous(), out, t, c, n, c**0.5, *strides(x), *strides(out), SILU=silu, **choice
        )
    return result


def run_channel_rms_norm_backward(grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return run_backward(grad, x, gamma, silu=False)


def run_channel_rms_norm_silu_backward(grad: Tensor, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return run_backward(grad, x, gamma, silu=True)


def run_backward(grad: Tensor, x: Tensor, gamma: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    result = empty_as(x, first_axis(x))
    if x.numel() == 0:
        return result, torch.zeros_like(gamma)
    grad, x, dx = as_frames(grad), as_frames(x), as_frames(result)
    b, c, t, n = x.shape
    choice = tile(c, n, x.stride(1) == 1, most=8192)
    chunks = b * t * triton.cdiv(n, choice["N_BLOCK"])
    programs = min(chunks, PARTIAL_SUMS)
    dgamma = torch.empty((programs, c), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        channel_rms_norm_backward[programs,](
            *(grad, x, gamma.contiguous(), dx, dgamma, chunks, t, c, n, c**0.5),
            *(*strides(grad), *strides(x), *strides(dx)),
            SILU=silu,
            **choice,
        )
    return result, dgamma.sum(0).view(gamma.shape).to(gamma.dtype)


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
for name, kernel, gradient in (
    ("channel_rms_norm", run_channel_rms_norm, run_channel_rms_norm_backward),
    ("channel_rms_norm_silu", run_channel_rms_norm_silu, run_channel_rms_norm_silu_backward),
):
    LIBRARY.define(f"{name}(Tensor x, Tensor gamma) -> Tensor")
    LIBRARY.define(f"{name}_backward(Tensor grad, Tensor x, Tensor gamma) -> (Tensor, Tensor)")
    register(LIBRARY, name, kernel)
    register(LIBRARY, f"{name}_backward", gradient)


@torch.library.register_fake("joyedit::channel_rms_norm", lib=LIBRARY)
@torch.library.register_fake("joyedit::channel_rms_norm_silu", lib=LIBRARY)
def _(x, gamma):
    return empty_as(x, first_axis(x))


@torch.library.register_fake("joyedit::channel_rms_norm_backward", lib=LIBRARY)
@torch.library.register_fake("joyedit::channel_rms_norm_silu_backward", lib=LIBRARY)
def _(grad, x, gamma):
    return empty_as(x, first_axis(x)), torch.empty_like(gamma, memory_format=torch.contiguous_format)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate(ctx, grad):
    return torch.ops.joyedit.channel_rms_norm_backward(grad, *ctx.saved_tensors)


def differentiate_silu(ctx, grad):
    return torch.ops.joyedit.channel_rms_norm_silu_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("joyedit::channel_rms_norm", differentiate, setup_context=keep, lib=LIBRARY)
torch.library.register_autograd(
    "joyedit::channel_rms_norm_silu", differentiate_silu, setup_context=keep, lib=LIBRARY
)
channel_rms_norm = torch.ops.joyedit.channel_rms_norm.default
channel_rms_norm_silu = torch.ops.joyedit.channel_rms_norm_silu.default
