"""GroupNorm of feature maps, alone or with the SiLU that follows it: out = (x - mean) / sqrt(var + eps) *
weight + bias, mean and variance over the channels and positions of a group, in fp32.

x (B, C, ...), seen as (B, C, N) with three strides: contiguous, channels last, and slices of batch or
channels need no copy; weight, bias (C); out is dense, in the memory format of x.

Fused: statistics, scale, shift, SiLU and the casts around them. A group that one program can go over is read
from memory once and again from the cache, in one launch. Of larger ones every program takes a share of the
positions, then one program per group merges what they found, then all normalise: x is read twice. Backward
computes the statistics anew, sums the two gradients of each channel (those of weight and bias come from the
same sums) and then writes x's gradient.

Variances never come from sums of squares, which cancel where a map is nearly constant: each element of a
tile keeps the mean of what it has seen and the squares about it (Welford), and these are merged.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from joyedit.kernels.shared import as_planes, empty_as, options, register

ONE_PROGRAM = 32768  # elements of a group: 64 KiB in half precision, which stay in the caches near a program
SHARING = 1024  # programs that share larger groups; the same on every device, so that results are too


def tile(channels: int, positions: int, last: bool) -> dict[str, int]:
    """4096 elements: along the positions, or, channels last, along a power of two that divides the channels
    (320 are 5 times 64), so that loads are whole lines of memory."""
    if last:
        c_block = min(triton.next_power_of_2(channels), max(64, min(256, channels & -channels)))
        n_block = min(4096 // c_block, triton.next_power_of_2(positions))
    else:
        n_block = min(1024, triton.next_power_of_2(positions))
        c_block = min(4096 // n_block, triton.next_power_of_2(channels))
    return {"C_BLOCK": c_block, "N_BLOCK": n_block, **options(c_block * n_block)}


def group_tile(channels: int, positions: int) -> dict[str, int]:
    """All channels of a group, up to 8192 elements."""
    c_block = triton.next_power_of_2(channels)
    n_block = min(8192 // c_block, triton.next_power_of_2(positions))
    return {"C_BLOCK": c_block, "N_BLOCK": n_block, **options(c_block * n_block)}


def in_one_program(rows: Tensor, groups: int) -> bool:
    """Small groups; channels last only if they begin at multiples of 16 bytes, so that loads are wide."""
    channels = rows.shape[1] // groups
    aligned = rows.stride(1) != 1 or channels * rows.element_size() % 16 == 0
    return aligned and channels <= 2048 and channels * rows.shape[2] <= ONE_PROGRAM


@triton.jit
def merged(count, mean, squares, AXIS: tl.constexpr):
    """Statistics of the union of parts along an axis: from how many, their means and squares about them."""
    total = tl.sum(count, AXIS, keep_dims=True)
    some = tl.max(tl.where(count > 0, mean, float("-inf")), AXIS, keep_dims=True)
    some = tl.where(total > 0, some, 0.0)
    level = some + tl.sum(count * (mean - some), AXIS, keep_dims=True) / tl.maximum(total, 1.0)
    squares += count * (mean - level) * (mean - level)
    return total, level, tl.sum(squares, AXIS, keep_dims=True)


@triton.jit
def moments(
    x_ptr,  # (C_BLOCK, 1): a channel's positions, stride_n apart
    present,
    first,
    last,
    num_positions,
    stride_n,
    C_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    """Count, mean and squares about it, for each element of the tile, over tiles first, ..., last - 1."""
    mean = tl.zeros((C_BLOCK, N_BLOCK), tl.float32)
    squares = tl.zeros((C_BLOCK, N_BLOCK), tl.float32)
    for i in range(first, last):
        n = (i * N_BLOCK + tl.arange(0, N_BLOCK)[None]).to(tl.int64)
        mask = present & (n < num_positions)
        x = tl.load(x_ptr + n * stride_n, mask, other=0.0).to(tl.float32)
        step = tl.where(mask, x - mean, 0.0)
        mean += step * (1.0 / (i - first + 1))
        squares += step * (x - mean)
    # Only the last tile can reach beyond the positions.
    cut = (last - 1) * N_BLOCK + tl.arange(0, N_BLOCK)[None] >= num_positions
    count = tl.where(present, (last - first - cut.to(tl.int32)).to(tl.float32), 0.0)
    return count, mean, squares


@triton.jit(do_not_specialize=["num_groups"])
def group_norm_whole_groups(
    x_ptr,  # (B, C, N), strides (stride_xb, stride_xc, stride_xn)
    weight_ptr,  # (C)
    bias_ptr,  # (C)
    out_ptr,  # (B, C, N), strides (stride_ob, stride_oc, stride_on)
    num_groups,
    num_positions,
    stride_xb,
    stride_xc,
    stride_xn,
    stride_ob,
    stride_oc,
    stride_on,
    eps,
    CHANNELS: tl.constexpr,  # of a group
    SILU: tl.constexpr,
    C_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    b = (tl.program_id(0) // num_groups).to(tl.int64)
    first = (tl.program_id(0) % num_groups).to(tl.int64) * CHANNELS
    c = tl.arange(0, C_BLOCK)[:, None].to(tl.int64)
    present = c < CHANNELS
    x_ptr += b * stride_xb + first * stride_xc
    tiles = tl.cdiv(num_positions, N_BLOCK)
    count, mean, squares = moments(
        x_ptr + c * stride_xc, present, 0, tiles, num_positions, stride_xn, C_BLOCK, N_BLOCK
    )
    count, mean, squares = merged(count, mean, squares, None)
    rstd = tl.rsqrt(squares / count + eps)
    scale = tl.load(weight_ptr + first + c, present, other=0.0).to(tl.float32) * rstd
    bias = tl.load(bias_ptr + first + c, present, other=0.0).to(tl.float32)
    out_ptr += b * stride_ob + first * stride_oc
    for i in range(tiles):
        n = (i * N_BLOCK + tl.arange(0, N_BLOCK)[None]).to(tl.int64)
        mask = present & (n < num_positions)
        x = tl.load(x_ptr + c * stride_xc + n * stride_xn, mask, other=0.0).to(tl.float32)
        out = (x - mean) * scale + bias
        if SILU:
            out *= tl.sigmoid(out)
        tl.store(out_ptr + c * stride_oc + n * stride_on, out, mask)


@triton.jit(do_not_specialize=["programs", "tiles_each"])
def group_norm_partial_statistics(
    x_ptr,  # (B, C, N), strides (stride_b, stride_c, stride_n)
    mean_ptr,  # (B, C, pitch) fp32: of each channel, in the positions of each program
    squares_ptr,  # (B, C, pitch) fp32
    num_channels,
    num_positions,
    programs,  # that share the positions of a channel
    tiles_each,
    pitch,
    stride_b,
    stride_c,
    stride_n,
    C_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    p = tl.program_id(0) % programs
    blocks = tl.cdiv(num_channels, C_BLOCK)
    b = (tl.program_id(0) // programs // blocks).to(tl.int64)
    c = (tl.program_id(0) // programs % blocks).to(tl.int64) * C_BLOCK + tl.arange(0, C_BLOCK)[:, None]
    present = c < num_channels
    first = p * tiles_each
    last = tl.minimum(first + tiles_each, tl.cdiv(num_positions, N_BLOCK))
    count, mean, squares = moments(
        x_ptr + b * stride_b + c * stride_c, present, first, last, num_positions, stride_n, C_BLOCK, N_BLOCK
    )
    count, mean, squares = merged(count, mean, squares, 1)
    row = (b * num_channels + c) * pitch + p
    tl.store(mean_ptr + row, mean, present)
    tl.store(squares_ptr + row, squares, present)


@triton.jit(do_not_specialize=["share", "num_positions"])
def group_norm_merge_statistics(
    part_mean_ptr,  # (B, G, size) fp32, size: channels of a group times pitch
    part_squares_ptr,  # (B, G, size) fp32
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    num_positions,
    share,  # positions of a program; the last one has the rest
    size,
    pitch,
    eps,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    count = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = i < size
        left = num_positions - (i % pitch).to(tl.int64) * share
        more = tl.where(mask, tl.minimum(tl.maximum(left, 0), share), 0).to(tl.float32)
        step = tl.load(part_mean_ptr + group * size + i, mask, other=0.0) - mean
        about = tl.load(part_squares_ptr + group * size + i, mask, other=0.0)
        step = tl.where(more > 0, step, 0.0)  # between the programs and the pitch nothing was written
        part = more / tl.maximum(count + more, 1.0)
        mean += step * part
        squares += tl.where(more > 0, about, 0.0) + step * step * count * part
        count += more
    count, mean, squares = merged(count, mean, squares, 0)
    first = group + tl.arange(0, 1)
    tl.store(mean_ptr + first, mean)
    tl.store(rstd_ptr + first, tl.rsqrt(squares / count + eps))


@triton.jit(do_not_specialize=["group_channels"])
def group_norm_normalise(
    x_ptr,  # (B, C, N), strides (stride_xb, stride_xc, stride_xn)
    weight_ptr,  # (C)
    bias_ptr,  # (C)
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    out_ptr,  # (B, C, N), strides (stride_ob, stride_oc, stride_on)
    num_channels,
    group_channels,
    num_positions,
    stride_xb,
    stride_xc,
    stride_xn,
    stride_ob,
    stride_oc,
    stride_on,
    SILU: tl.constexpr,
    C_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(num_positions, N_BLOCK)
    blocks = tl.cdiv(num_channels, C_BLOCK)
    b = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    c = (tl.program_id(0) // tiles % blocks).to(tl.int64) * C_BLOCK + tl.arange(0, C_BLOCK)[:, None]
    n = (tl.program_id(0) % tiles).to(tl.int64) * N_BLOCK + tl.arange(0, N_BLOCK)[None]
    present = c < num_channels
    mask = present & (n < num_positions)
    group = (b * num_channels + c) // group_channels
    mean = tl.load(mean_ptr + group, present, other=0.0)
    scale = tl.load(weight_ptr + c, present, other=0.0).to(tl.float32)
    scale *= tl.load(rstd_ptr + group, present, other=0.0)
    bias = tl.load(bias_ptr + c, present, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * stride_xb + c * stride_xc + n * stride_xn, mask, other=0.0).to(tl.float32)
    out = (x - mean) * scale + bias
    if SILU:
        out *= tl.sigmoid(out)
    tl.store(out_ptr + b * stride_ob + c * stride_oc + n * stride_on, out, mask)


@triton.jit(do_not_specialize=["group_channels", "programs", "tiles_each"])
def group_norm_backward_sums(
    grad_ptr,  # (B, C, N), strides (stride_gb, stride_gc, stride_gn)
    x_ptr,  # (B, C, N), strides (stride_xb, stride_xc, stride_xn)
    weight_ptr,  # (C), or None: no SiLU
    bias_ptr,  # (C), or None: no SiLU
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    level_ptr,  # (B, C, programs) fp32: sums of the gradient after scale and shift
    along_ptr,  # (B, C, programs) fp32: sums of its product with the normalised x
    num_channels,
    group_channels,
    num_positions,
    programs,
    tiles_each,
    stride_gb,
    stride_gc,
    stride_gn,
    stride_xb,
    stride_xc,
    stride_xn,
    C_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    p = tl.program_id(0) % programs
    blocks = tl.cdiv(num_channels, C_BLOCK)
    b = (tl.program_id(0) // programs // blocks).to(tl.int64)
    c = (tl.program_id(0) // programs % blocks).to(tl.int64) * C_BLOCK + tl.arange(0, C_BLOCK)[:, None]
    present = c < num_channels
    group = (b * num_channels + c) // group_channels
    mean = tl.load(mean_ptr + group, present, other=0.0)
    rstd = tl.load(rstd_ptr + group, present, other=0.0)
    level = tl.zeros((C_BLOCK, N_BLOCK), tl.float32)
    along = tl.zeros((C_BLOCK, N_BLOCK), tl.float32)
    first = p * tiles_each
    for i in range(first, tl.minimum(first + tiles_each, tl.cdiv(num_positions, N_BLOCK))):
        n = (i * N_BLOCK + tl.arange(0, N_BLOCK)[None]).to(tl.int64)
        mask = present & (n < num_positions)
        x = tl.load(x_ptr + b * stride_xb + c * stride_xc + n * stride_xn, mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + b * stride_gb + c * stride_gc + n * stride_gn, mask, other=0.0)
        grad = grad.to(tl.float32)
        normed = (x - mean) * rstd
        if bias_ptr is not None:
            weight = tl.load(weight_ptr + c, present, other=0.0).to(tl.float32)
            out = normed * weight + tl.load(bias_ptr + c, present, other=0.0).to(tl.float32)
            share = tl.sigmoid(out)
            grad *= share * (1 + out * (1 - share))
        level += grad  # 0 where there is no position
        along += grad * normed
    row = (b * num_channels + c) * programs + p
    tl.store(level_ptr + row, tl.sum(level, 1)[:, None], present)
    tl.store(along_ptr + row, tl.sum(along, 1)[:, None], present)


@triton.jit(do_not_specialize=["group_channels"])
def group_norm_backward(
    grad_ptr,  # (B, C, N), strides (stride_gb, stride_gc, stride_gn)
    x_ptr,  # (B, C, N), strides (stride_xb, stride_xc, stride_xn)
    weight_ptr,  # (C)
    bias_ptr,  # (C), or None: no SiLU
    mean_ptr,  # (B, G) fp32
    rstd_ptr,  # (B, G) fp32
    level_ptr,  # (B, G) fp32: mean of the normalised x's gradient
    along_ptr,  # (B, G) fp32: mean of its product with the normalised x
    dx_ptr,  # (B, C, N), strides (stride_db, stride_dc, stride_dn)
    num_channels,
    group_channels,
    num_positions,
    stride_gb,
    stride_gc,
    stride_gn,
    stride_xb,
    stride_xc,
    stride_xn,
    stride_db,
    stride_dc,
    stride_dn,
    C_BLOCK: tl.constexpr,
    N_BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(num_positions, N_BLOCK)
    blocks = tl.cdiv(num_channels, C_BLOCK)
    b = (tl.program_id(0) // tiles // blocks).to(tl.int64)
    c = (tl.program_id(0) // tiles % blocks).to(tl.int64) * C_BLOCK + tl.arange(0, C_BLOCK)[:, None]
    n = (tl.program_id(0) % tiles).to(tl.int64) * N_BLOCK + tl.arange(0, N_BLOCK)[None]
    present = c < num_channels
    mask = present & (n < num_positions)
    group = (b * num_channels + c) // group_channels
    mean = tl.load(mean_ptr + group, present, other=0.0)
    rstd = tl.load(rstd_ptr + group, present, other=0.0)
    level = tl.load(level_ptr + group, present, other=0.0)
    along = tl.load(along_ptr + group, present, other=0.0)
    weight = tl.load(weight_ptr + c, present, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * stride_xb + c * stride_xc + n * stride_xn, mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + b * stride_gb + c * stride_gc + n * stride_gn, mask, other=0.0)
    grad = grad.to(tl.float32)
    normed = (x - mean) * rstd
    if bias_ptr is not None:
        out = normed * weight + tl.load(bias_ptr + c, present, other=0.0).to(tl.float32)
        share = tl.sigmoid(out)
        grad *= share * (1 + out * (1 - share))
    dx = (grad * weight - level - normed * along) * rstd
    tl.store(dx_ptr + b * stride_db + c * stride_dc + n * stride_dn, dx, mask)


def run_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return run_forward(x, weight, bias, groups, eps, silu=False)


def run_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    return run_forward(x, weight, bias, groups, eps, silu=True)


def run_forward(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    result = empty_as(x)
    if x.numel() == 0:
        return result
    x, out = as_planes(x), as_planes(result)
    weight, bias = weight.contiguous(), bias.contiguous()
    b, c, n = x.shape
    strides = *x.stride(), *out.stride()
    with torch.cuda.device_of(x):
        if in_one_program(x, groups):
            choice = group_tile(c // groups, n)
            group_norm_whole_groups[b * groups,](
                x, weight, bias, out, groups, n, *strides, eps, CHANNELS=c // groups, SILU=silu, **choice
            )
            return result
        mean, rstd = run_statistics(x, groups, eps)
        choice = tile(c, n, x.stride(1) == 1)
        grid = b * triton.cdiv(c, choice["C_BLOCK"]) * triton.cdiv(n, choice["N_BLOCK"])
        group_norm_normalise[grid,](
            x, weight, bias, mean, rstd, out, c, c // groups, n, *strides, SILU=silu, **choice
        )
    return result


def shares(x: Tensor, choice: dict[str, int]) -> tuple[int, int]:
    """How many programs share the positions of a block of channels, and how many tiles each takes."""
    b, c, n = x.shape
    tiles = triton.cdiv(n, choice["N_BLOCK"])
    programs = max(1, min(tiles, SHARING // (b * triton.cdiv(c, choice["C_BLOCK"]))))
    tiles_each = triton.cdiv(tiles, programs)
    return triton.cdiv(tiles, tiles_each), tiles_each


def run_statistics(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """x (B, C, N) -> mean and 1 / sqrt(var + eps) of its groups, (B, G) fp32 each."""
    (b, c, n), choice = x.shape, tile(x.shape[1], x.shape[2], x.stride(1) == 1)
    programs, tiles_each = shares(x, choice)
    pitch = 16 * triton.cdiv(programs, 16)  # so that a group begins where wide loads can
    part_mean, part_squares = torch.empty((2, b, c, pitch), dtype=torch.float32, device=x.device)
    mean, rstd = torch.empty((2, b, groups), dtype=torch.float32, device=x.device)
    group_norm_partial_statistics[b * triton.cdiv(c, choice["C_BLOCK"]) * programs,](
        x, part_mean, part_squares, c, n, programs, tiles_each, pitch, *x.stride(), **choice
    )
    share, size = tiles_each * choice["N_BLOCK"], c // groups * pitch
    group_norm_merge_statistics[b * groups,](
        *(part_mean, part_squares, mean, rstd, n, share, size, pitch, eps),
        BLOCK=512,
        **options(512, each=4),
    )
    return mean, rstd


def run_group_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return run_backward(grad, x, weight, None, groups, eps)


def run_group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return run_backward(grad, x, weight, bias, groups, eps)


def run_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    result = empty_as(x)
    if x.numel() == 0:
        zeros = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
        return result, zeros, zeros.clone()
    grad, x, dx = as_planes(grad), as_planes(x), as_planes(result)
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    (b, c, n), choice = x.shape, tile(x.shape[1], x.shape[2], x.stride(1) == 1)
    programs, tiles_each = shares(x, choice)
    blocks, tiles = triton.cdiv(c, choice["C_BLOCK"]), triton.cdiv(n, choice["N_BLOCK"])
    partial = torch.empty((2, b, c, programs), dtype=torch.float32, device=x.device)
    strides = *grad.stride(), *x.stride()
    with torch.cuda.device_of(x):
        mean, rstd = run_statistics(x, groups, eps)
        group_norm_backward_sums[b * blocks * programs,](
            *(grad, x, None if bias is None else weight, bias, mean, rstd, *partial),
            *(c, c // groups, n, programs, tiles_each, *strides),
            **choice,
        )
        sums = partial.sum(-1)  # (2, B, C)
        level, along = (sums * weight.float()).unflatten(2, (groups, -1)).sum(-1) / (c // groups * n)
        group_norm_backward[b * blocks * tiles,](
            *(grad, x, weight, bias, mean, rstd, level, along, dx, c, c // groups, n, *strides, *dx.stride()),
            **choice,
        )
    dbias, dweight = sums.sum(1)
    return result, dweight.clone(), dbias.clone()


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
ARGUMENTS = "Tensor x, Tensor weight, Tensor bias, int groups, float eps"
LIBRARY.define(f"group_norm({ARGUMENTS}) -> Tensor")
LIBRARY.define(f"group_norm_silu({ARGUMENTS}) -> Tensor")
# Gradients of x, weight and bias, the latter two in fp32.
LIBRARY.define(
    "group_norm_backward(Tensor grad, Tensor x, Tensor weight, int groups, float eps)"
    " -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(f"group_norm_silu_backward(Tensor grad, {ARGUMENTS}) -> (Tensor, Tensor, Tensor)")
register(LIBRARY, "group_norm", run_group_norm)
register(LIBRARY, "group_norm_silu", run_group_norm_silu)
register(LIBRARY, "group_norm_backward", run_group_norm_backward)
register(LIBRARY, "group_norm_silu_backward", run_group_norm_silu_backward)


def gradients_as(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.empty(weight.shape, dtype=torch.float32, device=x.device)
    return empty_as(x), sums, torch.empty_like(sums)


@torch.library.register_fake("joyedit::group_norm", lib=LIBRARY)
def _(x, weight, bias, groups, eps):
    return empty_as(x)


@torch.library.register_fake("joyedit::group_norm_silu", lib=LIBRARY)
def _(x, weight, bias, groups, eps):
    return empty_as(x)


@torch.library.register_fake("joyedit::group_norm_backward", lib=LIBRARY)
def _(grad, x, weight, groups, eps):
    return gradients_as(x, weight)


@torch.library.register_fake("joyedit::group_norm_silu_backward", lib=LIBRARY)
def _(grad, x, weight, bias, groups, eps):
    return gradients_as(x, weight)


def keep(ctx, inputs, output):
    x, weight, bias, ctx.groups, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def differentiate(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.joyedit.group_norm_backward(grad, x, weight, ctx.groups, ctx.eps)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


def differentiate_silu(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    dx, dweight, dbias = torch.ops.joyedit.group_norm_silu_backward(
        grad, x, weight, bias, ctx.groups, ctx.eps
    )
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None


torch.library.register_autograd("joyedit::group_norm", differentiate, setup_context=keep, lib=LIBRARY)
torch.library.register_autograd(
    "joyedit::group_norm_silu", differentiate_silu, setup_context=keep, lib=LIBRARY
)
group_norm = torch.ops.joyedit.group_norm.default
group_norm_silu = torch.ops.joyedit.group_norm_silu.default
