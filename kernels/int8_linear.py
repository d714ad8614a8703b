"""A linear layer whose weight is stored in eight bits, multiplied as it is: `int8_linear`.

Activations are rotated as the weight was, in groups of inputs, and rounded to whole numbers with one scale
for each row (`int8_linear_rows_forward`). Then whole numbers are multiplied, twice as many at a time as
half-precision ones, and both scales and the bias come last (`int8_linear_forward`). No weight is rebuilt.

Fused in the first: rotation, largest value, rounding. Rows are read twice, the second time from the L2 cache,
because the scale is known at a row's end only, and rotated twice: 2 G products for each number, few beside
the outputs that it is multiplied for. R is no tensor. Its signs are made of row and column numbers: an entry
is negative where an odd number of their digits to the base 4 add up to 3, which is where the digit of one is
the complement of the other's.

R rows   I inputs   O outputs   G inputs that are rotated together, a power of 4 up to 256; 1: none
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from joyedit.kernels.shared import options, register

LEAST_SCALE = tl.constexpr(1e-30)  # of rows of zeros
SMALLEST = 16  # inputs of a product of matrices; smaller groups are blocks on its diagonal


def rows_tile(group: int) -> dict[str, int]:
    """Rows of a program, and as many columns of R at a time as registers hold: their signs are made there."""
    inputs, columns = max(group, SMALLEST), 32 if torch.version.hip else 64
    return {"ROWS": 32, "INPUTS": inputs, "COLUMNS": min(inputs, columns), **options(32 * 64, 8)}


def product_tile() -> dict[str, int]:
    """The usual square of outputs; three stages of inputs, 48 KiB, are on their way. On Instinct two, whose
    64 KiB of local memory hold no more beside what is computed with."""
    stages = 2 if torch.version.hip else 3
    return {
        "ROWS": 128,
        "OUTPUTS": 128,
        "INPUTS": 64,
        "STACK": 8,
        "num_stages": stages,
        **options(128 * 128, 64),
    }


@triton.jit
def signs(ROW_COUNT: tl.constexpr, first, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Some columns of R times sqrt(G), (ROW_COUNT, COLUMNS), in fp32; 0 between two groups."""
    i = tl.arange(0, ROW_COUNT)[:, None]
    j = first + tl.arange(0, COLUMNS)[None]
    apart = (i % GROUP) ^ (255 - j % GROUP)  # a digit is 0 where both add up to 3; above G none is
    odd = (apart | (apart >> 1)) & 0x55
    odd = odd ^ (odd >> 4)
    odd = odd ^ (odd >> 2)  # the parity of four digits that are not 0, and so of those that are
    sign = 1.0 - 2.0 * (odd & 1).to(tl.float32)
    return tl.where(i // GROUP == j // GROUP, sign, 0.0)


@triton.jit(do_not_specialize=["num_rows"])
def int8_linear_rows_forward(
    x_ptr,  # (R, I) in half precision, rows stride_x apart
    out_ptr,  # (R, I) int8, contiguous
    scale_ptr,  # (R) fp32
    num_rows,
    width,
    stride_x,
    root,  # sqrt(G)
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i = tl.arange(0, INPUTS)[None]
    j = tl.arange(0, COLUMNS)[None]
    here = r < num_rows
    most = tl.zeros([ROWS], tl.float32)
    for first in range(0, INPUTS, COLUMNS):
        turn = signs(INPUTS, first, COLUMNS, GROUP).to(x_ptr.dtype.element_ty)
        for start in range(0, width, INPUTS):
            x = tl.load(x_ptr + r * stride_x + start + i, here & (start + i < width), other=0.0)
            turned = tl.dot(x, turn)
            most = tl.maximum(most, tl.max(tl.abs(turned), 1))
    scale = tl.maximum(most / root / 127, LEAST_SCALE)
    tl.store(scale_ptr + r, scale[:, None], here)
    for first in range(0, INPUTS, COLUMNS):
        turn = signs(INPUTS, first, COLUMNS, GROUP).to(x_ptr.dtype.element_ty)
        for start in range(0, width, INPUTS):
            x = tl.load(x_ptr + r * stride_x + start + i, here & (start + i < width), other=0.0)
            level = tl.dot(x, turn) / root / scale[:, None]
            # Half a unit away from 0: where a number is halfway, either neighbour is as near.
            whole = tl.where(level < 0, level - 0.5, level + 0.5).to(tl.int32)
            place = start + first + j
            tl.store(out_ptr + r * width + place, whole.to(tl.int8), here & (place < width))


@triton.jit(do_not_specialize=["num_rows"])
def int8_linear_forward(
    x_ptr,  # (R, I) int8, contiguous
    row_scale_ptr,  # (R) fp32
    weight_ptr,  # (O, I) int8, contiguous
    scale_ptr,  # (O) or (1) fp32
    bias_ptr,  # (O), or None
    out_ptr,  # (R, O) contiguous
    num_rows,
    num_outputs,
    width,
    ONE_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    STACK: tl.constexpr,
):
    # Programs that run together share rows and outputs: STACK blocks of rows for each block of outputs.
    blocks, columns = tl.cdiv(num_rows, ROWS), tl.cdiv(num_outputs, OUTPUTS)
    stack = tl.program_id(0) // (STACK * columns)
    height = tl.minimum(blocks - stack * STACK, STACK)
    inside = tl.program_id(0) % (STACK * columns)
    r = (stack * STACK + inside % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o = (inside // height).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    i = tl.arange(0, INPUTS)
    here, there = r < num_rows, o < num_outputs
    x = x_ptr + r[:, None] * width + i[None]
    weight = weight_ptr + o[None] * width + i[:, None]
    total = tl.zeros([ROWS, OUTPUTS], tl.int32)
    for start in range(0, width, INPUTS):
        inner = start + i < width
        left = tl.load(x + start, here[:, None] & inner[None], other=0)
        right = tl.load(weight + start, inner[:, None] & there[None], other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    out = total.to(tl.float32) * tl.load(row_scale_ptr + r, here, other=0.0)[:, None]
    if ONE_SCALE:
        out *= tl.load(scale_ptr)
    else:
        out *= tl.load(scale_ptr + o, there, other=0.0)[None]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + o, there, other=0.0).to(tl.float32)[None]
    tl.store(out_ptr + r[:, None] * num_outputs + o[None], out, here[:, None] & there[None])


def run(x: Tensor, stored: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    (outputs, width), rows = stored.shape, x.reshape(-1, x.shape[-1])
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    stored = stored.contiguous()
    whole = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    row_scale = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    choice, product = rows_tile(group), product_tile()
    blocks = triton.cdiv(len(rows), product["ROWS"]) * triton.cdiv(outputs, product["OUTPUTS"])
    with torch.cuda.device_of(x):
        int8_linear_rows_forward[triton.cdiv(len(rows), choice["ROWS"]),](
            rows,
            whole,
            row_scale,
            len(rows),
            width,
            rows.stride(0),
            float(math.isqrt(group)),
            GROUP=group,
            **choice,
        )
        int8_linear_forward[blocks,](
            whole,
            row_scale,
            stored,
            scale.reshape(-1),
            bias,
            out,
            len(rows),
            outputs,
            width,
            ONE_SCALE=scale.numel() == 1,
            **product,
        )
    return out


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
LIBRARY.define("int8_linear(Tensor x, Tensor stored, Tensor scale, Tensor? bias, int group) -> Tensor")
register(LIBRARY, "int8_linear", run)


@torch.library.register_fake("joyedit::int8_linear", lib=LIBRARY)
def _(x, stored, scale, bias, group):
    return torch.empty(*x.shape[:-1], len(stored), dtype=x.dtype, device=x.device)


int8_linear = torch.ops.joyedit.int8_linear.default
