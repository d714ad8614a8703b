"""Classifier-free guidance, its rescaled norm and the solver's update, in one pass.

    comb = uncond + scale * (cond - uncond)
    comb *= |cond| / max(|comb|, 1e-6)         with `rescale`: the norms over the channels of each position
    out = sample + delta * comb                with a sample; delta is a number, in memory

cond, uncond, sample (B, C, ...). In fp32; the result is rounded once. Fused: all of it; reads each argument
and writes the result, in the dtype of the sample, or of cond.

The kernel sees (B, C, P) with three strides each, so that neither halves of a batch nor channels-last maps
need a copy; out is contiguous. A program holds all channels of BLOCK positions of one sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from joyedit.kernels.shared import as_planes, options, register


def tile(channels: int) -> dict[str, int]:
    """1024 elements or 16 positions, 8 elements per thread: latents are small, and this way there are
    programs for all processors."""
    rows = triton.next_power_of_2(channels)
    block = max(16, 1024 // rows)
    return {"CHANNELS": rows, "BLOCK": block, **options(rows * block, each=8)}


@triton.jit(do_not_specialize=["num_channels"])
def guide_forward(
    cond_ptr,  # (B, C, P), strides (stride_cond_b, stride_cond_c, stride_cond_p)
    uncond_ptr,  # (B, C, P), strides (stride_uncond_b, stride_uncond_c, stride_uncond_p)
    sample_ptr,  # (B, C, P), strides (stride_sample_b, stride_sample_c, stride_sample_p), or None
    delta_ptr,  # one number, or None
    out_ptr,  # (B, C, P) contiguous
    num_channels,
    positions,
    stride_cond_b,
    stride_cond_c,
    stride_cond_p,
    stride_uncond_b,
    stride_uncond_c,
    stride_uncond_p,
    stride_sample_b,
    stride_sample_c,
    stride_sample_p,
    scale,
    RESCALE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(positions, BLOCK)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    c = tl.arange(0, CHANNELS)[:, None].to(tl.int64)
    p = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None]
    mask = (c < num_channels) & (p < positions)
    cond = cond_ptr + b * stride_cond_b + c * stride_cond_c + p * stride_cond_p
    cond = tl.load(cond, mask, other=0.0).to(tl.float32)
    uncond = uncond_ptr + b * stride_uncond_b + c * stride_uncond_c + p * stride_uncond_p
    uncond = tl.load(uncond, mask, other=0.0).to(tl.float32)
    out = uncond + scale * (cond - uncond)
    if RESCALE:
        norm = tl.maximum(tl.sqrt(tl.sum(out * out, 0)), 1e-6)
        out *= (tl.sqrt(tl.sum(cond * cond, 0)) / norm)[None]
    if sample_ptr is not None:
        sample = sample_ptr + b * stride_sample_b + c * stride_sample_c + p * stride_sample_p
        sample = tl.load(sample, mask, other=0.0).to(tl.float32)
        out = sample + tl.load(delta_ptr).to(tl.float32) * out
    tl.store(out_ptr + (b * num_channels + c) * positions + p, out, mask)


def run(
    cond: Tensor, uncond: Tensor, scale: float, rescale: bool, sample: Tensor | None, delta: Tensor | None
) -> Tensor:
    kept = cond if sample is None else sample
    out = torch.empty(cond.shape, dtype=kept.dtype, device=cond.device)
    if cond.numel() == 0:
        return out
    maps = [None if t is None else as_planes(t) for t in (cond, uncond, sample)]
    strides = [n for t in maps for n in ((0, 0, 0) if t is None else t.stride())]
    (b, c, *_), choice = cond.shape, tile(cond.shape[1])
    positions = cond[0, 0].numel()
    with torch.cuda.device_of(cond):
        guide_forward[b * triton.cdiv(positions, choice["BLOCK"]),](
            *maps, delta, out, c, positions, *strides, scale, rescale, **choice
        )
    return out


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
LIBRARY.define(
    "guide(Tensor cond, Tensor uncond, float scale, bool rescale, Tensor? sample, Tensor? delta) -> Tensor"
)
register(LIBRARY, "guide", run)


@torch.library.register_fake("joyedit::guide", lib=LIBRARY)
def _(cond, uncond, scale, rescale, sample, delta):
    kept = cond if sample is None else sample
    return torch.empty(cond.shape, dtype=kept.dtype, device=cond.device)


guide = torch.ops.joyedit.guide.default
