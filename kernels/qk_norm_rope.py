"""RMSNorm of q and k and their rotary embedding: from the output of a projection to what attention reads.

    normed = x / sqrt(mean(x^2) + eps) * weight      over each head, or over all heads together
    out    = (a cos - b sin, b cos + a sin)          for pairs (a, b) of normed: neighbours, or the two halves

for x = q and x = k; without weights nothing is normed, without cos and sin nothing is rotated. Statistics and
rotation in fp32, rounded once at the end.

Fused: square, mean, root and scale, the products and sums of the rotation, the casts around them, and the
copies out of a fused projection: forward reads q and k and writes them. Backward turns the incoming gradient
back and norms anew, because the row is in registers anyway; the gradients of the weights are summed per
program, then over programs.

q (B, M, H, E), k (B, N, G, E): heads next to each other, samples and tokens with strides, so that slices of a
fused projection need no copy. `qk_norm_rope_out`, for inference, writes to tensors with such strides: to the
part of what attention reads that belongs to one of its streams. q may have more heads (grouped queries) and
fewer tokens: its first one is token `start` of k. Weights (E), or over all heads (H * E) and (G * E); cos,
sin (N, E / 2) or (B or 1, N, E / 2).

A piece of work is HEADS heads of one token, held as two tensors, the a and the b of every pair, so that cos
and sin are read once for all of them. The first pieces are q's, the rest k's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from joyedit.kernels.shared import PARTIAL_SUMS, like, options, register


def tile(q_heads: int, k_heads: int, head_dim: int, across: bool) -> dict[str, int]:
    """As many heads of a token as both q and k have, up to 4096 elements, or all that are normed together."""
    block = max(2, triton.next_power_of_2(head_dim))
    heads = max(q_heads, k_heads) if across else min(q_heads, k_heads, max(1, 4096 // block))
    heads = triton.next_power_of_2(heads)
    return {"HEADS": heads, "BLOCK": block, **options(heads * block)}


# Sizes that change from call to call: no kernel is compiled anew for multiples of 16 among them.
COUNTS = ["q_programs", "q_work", "k_work", "q_tokens", "k_tokens", "q_heads", "k_heads", "start"]


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_forward(
    q_ptr,  # (B, M, H, E), strides (stride_qb, stride_qn, E, 1)
    k_ptr,  # (B, N, G, E), strides (stride_kb, stride_kn, E, 1)
    q_weight_ptr,  # (E), or (H, E) if ACROSS, or None: no norm
    k_weight_ptr,  # (E), or (G, E) if ACROSS, or None: no norm
    cos_ptr,  # (B, N, E / 2), strides (stride_table, E / 2, 1), or None: no rotation
    sin_ptr,  # like cos
    q_out_ptr,  # (B, M, H, E), strides (stride_qob, stride_qon, E, 1)
    k_out_ptr,  # (B, N, G, E), strides (stride_kob, stride_kon, E, 1)
    q_work,  # pieces of work that are q's; there is a program for each piece
    q_tokens,
    k_tokens,
    q_heads,
    k_heads,
    start,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_kn,
    stride_table,
    stride_qob,
    stride_qon,
    stride_kob,
    stride_kon,
    eps,
    HEAD_DIM: tl.constexpr,
    ACROSS: tl.constexpr,
    HALF_SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    work = tl.program_id(0)
    if work < q_work:
        forward_piece(
            *(work, q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr),
            *(q_tokens, q_heads, start, stride_qb, stride_qn, stride_table, stride_qob, stride_qon, eps),
            *(HEAD_DIM, ACROSS, HALF_SPLIT, HEADS, BLOCK),
        )
    else:
        forward_piece(
            *(work - q_work, k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr),
            *(k_tokens, k_heads, 0, stride_kb, stride_kn, stride_table, stride_kob, stride_kon, eps),
            *(HEAD_DIM, ACROSS, HALF_SPLIT, HEADS, BLOCK),
        )


@triton.jit
def forward_piece(
    work,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    num_tokens,
    num_heads,
    start,
    stride_b,
    stride_n,
    stride_table,
    stride_ob,
    stride_on,
    eps,
    HEAD_DIM: tl.constexpr,
    ACROSS: tl.constexpr,
    HALF_SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, n, h, _ = place(work, num_tokens, num_heads, HEADS)
    x = x_ptr + b * stride_b + n * stride_n + h * HEAD_DIM
    x0, x1 = load_pairs(x, h < num_heads, HEAD_DIM, HALF_SPLIT, BLOCK)
    if weight_ptr is not None:
        w0, w1 = load_weight(weight_ptr, h, num_heads, HEAD_DIM, ACROSS, HALF_SPLIT, BLOCK)
        rrms = tl.rsqrt(mean(x0 * x0 + x1 * x1, num_heads, HEAD_DIM, ACROSS) + eps)
        x0, x1 = x0 * rrms * w0, x1 * rrms * w1
    if cos_ptr is not None:
        at = b * stride_table + (start + n) * (HEAD_DIM // 2)
        cos, sin = load_angles(cos_ptr + at, sin_ptr + at, HEAD_DIM, BLOCK)
        x0, x1 = x0 * cos - x1 * sin, x1 * cos + x0 * sin
    out = out_ptr + b * stride_ob + n * stride_on + h * HEAD_DIM
    store_pairs(out, x0, x1, h < num_heads, HEAD_DIM, HALF_SPLIT, BLOCK)


@triton.jit(do_not_specialize=COUNTS)
def qk_norm_rope_backward(
    dq_out_ptr,  # (B, M, H, E) contiguous
    dk_out_ptr,  # (B, N, G, E) contiguous
    q_ptr,  # (B, M, H, E), strides (stride_qb, stride_qn, E, 1)
    k_ptr,  # (B, N, G, E), strides (stride_kb, stride_kn, E, 1)
    q_weight_ptr,  # (E), or (H, E) if ACROSS, or None: no norm
    k_weight_ptr,  # (E), or (G, E) if ACROSS, or None: no norm
    cos_ptr,  # (B, N, E / 2), strides (stride_table, E / 2, 1), or None: no rotation
    sin_ptr,  # like cos
    dq_ptr,  # (B, M, H, E) contiguous
    dk_ptr,  # (B, N, G, E) contiguous
    dq_weight_ptr,  # (q_programs, E or H * E) fp32, or None: no norm
    dk_weight_ptr,  # (programs - q_programs, E or G * E) fp32, or None: no norm
    q_programs,  # the first programs, which share the work on q
    q_work,
    k_work,
    q_tokens,
    k_tokens,
    q_heads,
    k_heads,
    start,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_kn,
    stride_table,
    eps,
    HEAD_DIM: tl.constexpr,
    ACROSS: tl.constexpr,
    HALF_SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    if p < q_programs:
        backward_pieces(
            *(p, q_programs, q_work, dq_out_ptr, q_ptr, q_weight_ptr, cos_ptr, sin_ptr),
            *(dq_ptr, dq_weight_ptr, q_tokens, q_heads, start, stride_qb, stride_qn, stride_table, eps),
            *(HEAD_DIM, ACROSS, HALF_SPLIT, HEADS, BLOCK),
        )
    else:
        k_programs = tl.num_programs(0) - q_programs
        p -= q_programs
        backward_pieces(
            *(p, k_programs, k_work, dk_out_ptr, k_ptr, k_weight_ptr, cos_ptr, sin_ptr),
            *(dk_ptr, dk_weight_ptr, k_tokens, k_heads, 0, stride_kb, stride_kn, stride_table, eps),
            *(HEAD_DIM, ACROSS, HALF_SPLIT, HEADS, BLOCK),
        )


@triton.jit
def backward_pieces(
    p,
    programs,
    num_work,
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    dweight_ptr,
    num_tokens,
    num_heads,
    start,
    stride_b,
    stride_n,
    stride_table,
    eps,
    HEAD_DIM: tl.constexpr,
    ACROSS: tl.constexpr,
    HALF_SPLIT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dw0 = tl.zeros((HEADS, BLOCK // 2), tl.float32)
    dw1 = tl.zeros((HEADS, BLOCK // 2), tl.float32)
    for work in range(p, num_work, programs):
        b, n, h, row = place(work, num_tokens, num_heads, HEADS)
        g0, g1 = load_pairs(grad_ptr + row * HEAD_DIM, h < num_heads, HEAD_DIM, HALF_SPLIT, BLOCK)
        if cos_ptr is not None:
            at = b * stride_table + (start + n) * (HEAD_DIM // 2)
            cos, sin = load_angles(cos_ptr + at, sin_ptr + at, HEAD_DIM, BLOCK)
            g0, g1 = g0 * cos + g1 * sin, g1 * cos - g0 * sin
        if weight_ptr is not None:
            x = x_ptr + b * stride_b + n * stride_n + h * HEAD_DIM
            x0, x1 = load_pairs(x, h < num_heads, HEAD_DIM, HALF_SPLIT, BLOCK)
            rrms = tl.rsqrt(mean(x0 * x0 + x1 * x1, num_heads, HEAD_DIM, ACROSS) + eps)
            x0, x1 = x0 * rrms, x1 * rrms
            dw0 += g0 * x0
            dw1 += g1 * x1
            w0, w1 = load_weight(weight_ptr, h, num_heads, HEAD_DIM, ACROSS, HALF_SPLIT, BLOCK)
            g0, g1 = g0 * w0, g1 * w1
            along = mean(g0 * x0 + g1 * x1, num_heads, HEAD_DIM, ACROSS)
            g0, g1 = (g0 - x0 * along) * rrms, (g1 - x1 * along) * rrms
        store_pairs(dx_ptr + row * HEAD_DIM, g0, g1, h < num_heads, HEAD_DIM, HALF_SPLIT, BLOCK)
    if weight_ptr is not None:
        h = tl.arange(0, HEADS)[:, None]
        if not ACROSS:
            dw0, dw1, h = tl.sum(dw0, 0)[None], tl.sum(dw1, 0)[None], tl.zeros((1, 1), tl.int32)
        row = p.to(tl.int64) * (num_heads if ACROSS else 1) + h
        store_pairs(dweight_ptr + row * HEAD_DIM, dw0, dw1, h < num_heads, HEAD_DIM, HALF_SPLIT, BLOCK)


@triton.jit
def place(work, num_tokens, num_heads, HEADS: tl.constexpr):
    """Sample, token and heads (HEADS, 1) of a piece of work, and those heads' rows in a contiguous tensor.
    Heads run fastest."""
    groups = tl.cdiv(num_heads, HEADS)
    token = (work // groups).to(tl.int64)
    h = work % groups * HEADS + tl.arange(0, HEADS)[:, None]
    return token // num_tokens, token % num_tokens, h, token * num_heads + h


@triton.jit
def mean(x, num_heads, HEAD_DIM: tl.constexpr, ACROSS: tl.constexpr):
    """Over each head or over all, of sums of pairs. (HEADS, BLOCK / 2) -> (HEADS or 1, 1)."""
    x = tl.sum(x, 1, keep_dims=True) / HEAD_DIM
    if ACROSS:
        x = tl.sum(x, 0, keep_dims=True) / num_heads
    return x


@triton.jit
def load_pairs(ptr, mask, HEAD_DIM: tl.constexpr, HALF_SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """First and second of the pairs of the heads at ptr (., 1), each (., BLOCK / 2) fp32; zeros outside the
    mask."""
    if HALF_SPLIT:
        j = tl.arange(0, BLOCK // 2)[None]
        mask = mask & (j < HEAD_DIM // 2)
        first = tl.load(ptr + j, mask, other=0.0)
        second = tl.load(ptr + HEAD_DIM // 2 + j, mask, other=0.0)
    else:
        d = tl.arange(0, BLOCK)[None]
        x = tl.load(ptr + d, mask & (d < HEAD_DIM), other=0.0)
        first, second = tl.split(x.reshape(x.shape[0], BLOCK // 2, 2))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(
    ptr, first, second, mask, HEAD_DIM: tl.constexpr, HALF_SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    if HALF_SPLIT:
        j = tl.arange(0, BLOCK // 2)[None]
        mask = mask & (j < HEAD_DIM // 2)
        tl.store(ptr + j, first, mask)
        tl.store(ptr + HEAD_DIM // 2 + j, second, mask)
    else:
        d = tl.arange(0, BLOCK)[None]
        tl.store(ptr + d, tl.join(first, second).reshape(first.shape[0], BLOCK), mask & (d < HEAD_DIM))


@triton.jit
def load_weight(
    weight_ptr,
    h,
    num_heads,
    HEAD_DIM: tl.constexpr,
    ACROSS: tl.constexpr,
    HALF_SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pairs of the weight, each (HEADS or 1, BLOCK / 2)."""
    h = h if ACROSS else tl.zeros((1, 1), tl.int32)
    return load_pairs(weight_ptr + h * HEAD_DIM, h < num_heads, HEAD_DIM, HALF_SPLIT, BLOCK)


@triton.jit
def load_angles(cos_ptr, sin_ptr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin of a token, each (1, BLOCK / 2)."""
    j = tl.arange(0, BLOCK // 2)[None]
    cos = tl.load(cos_ptr + j, j < HEAD_DIM // 2, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + j, j < HEAD_DIM // 2, other=0.0).to(tl.float32)


def are_together(x: Tensor) -> bool:
    """Whether two strides can describe x (B, N, H, E): those of samples and of tokens."""
    return x.stride(3) == 1 and x.stride(2) == x.shape[3]


def heads_together(x: Tensor) -> Tensor:
    return x if are_together(x) else x.contiguous()


def arguments(
    q: Tensor, k: Tensor, weights: list[Tensor | None], cos: Tensor | None, start: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """What forward and backward have in common, from q_tokens to stride_table; and the choice of tile."""
    (_, m, h, e), (_, n, g, _) = q.shape, k.shape
    across = any(weight is not None and weight.numel() > e for weight in weights)
    stride_table = cos.stride(0) if cos is not None and cos.ndim == 3 and cos.shape[0] > 1 else 0
    sizes = m, n, h, g, start, q.stride(0), q.stride(1), k.stride(0), k.stride(1), stride_table
    return sizes, {"HEAD_DIM": e, "ACROSS": across, **tile(h, g, e, across)}


def pieces(x: Tensor, choice: dict[str, int]) -> int:
    b, n, h, e = x.shape
    return b * n * triton.cdiv(h, choice["HEADS"]) if e else 0


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def run_forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half_split: bool,
    start: int,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = like(q), like(k)
    run_into(q, k, q_weight, k_weight, cos, sin, eps, half_split, start, q_out, k_out)
    return q_out, k_out


def run_into(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half_split: bool,
    start: int,
    q_out: Tensor,
    k_out: Tensor,
) -> None:
    """Raises ValueError for results of other shapes than q and k, or whose heads are not next to each
    other."""
    for x, out in ((q, q_out), (k, k_out)):
        if out.shape != x.shape or not (are_together(out) or out.numel() == 0):
            raise ValueError(
                f"{tuple(x.shape)} cannot be written to {tuple(out.shape)}, strides {out.stride()}"
            )
    q, k = heads_together(q), heads_together(k)
    tables = contiguous(q_weight, k_weight, cos, sin)
    sizes, choice = arguments(q, k, tables[:2], tables[2], start)
    q_work, k_work = pieces(q, choice), pieces(k, choice)
    if q_work + k_work == 0:
        return
    out_strides = *q_out.stride()[:2], *k_out.stride()[:2]
    with torch.cuda.device_of(q):
        qk_norm_rope_forward[q_work + k_work,](
            *(q, k, *tables, q_out, k_out, q_work, *sizes, *out_strides, eps),
            HALF_SPLIT=half_split,
            **choice,
        )


def run_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    half_split: bool,
    start: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk = like(q), like(k)
    q, k = heads_together(q), heads_together(k)
    tables = contiguous(q_weight, k_weight, cos, sin)
    sizes, choice = arguments(q, k, tables[:2], tables[2], start)
    work = pieces(q, choice), pieces(k, choice)
    programs = [min(w, PARTIAL_SUMS) for w in work]
    sums = [
        None if weight is None else torch.empty((p, weight.numel()), dtype=torch.float32, device=q.device)
        for p, weight in zip(programs, (q_weight, k_weight), strict=True)
    ]
    if sum(programs) > 0:
        with torch.cuda.device_of(q):
            qk_norm_rope_backward[sum(programs),](
                *(dq_out.contiguous(), dk_out.contiguous(), q, k, *tables, dq, dk, *sums),
                *(programs[0], *work, *sizes, eps),
                HALF_SPLIT=half_split,
                **choice,
            )
    dq_weight, dk_weight = (
        q.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)
        for partial, weight in zip(sums, (q_weight, k_weight), strict=True)
    )
    return dq, dk, dq_weight, dk_weight


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
LIBRARY.define(
    "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin,"
    " float eps, bool half_split, SymInt start) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "qk_norm_rope_out(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin,"
    " float eps, bool half_split, SymInt start, Tensor(a!) q_out, Tensor(b!) k_out) -> ()"
)
# Gradients of q, k and their weights; without weights, two empty tensors.
LIBRARY.define(
    "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor? q_weight,"
    " Tensor? k_weight, Tensor? cos, Tensor? sin, float eps, bool half_split, SymInt start)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
register(LIBRARY, "qk_norm_rope", run_forward)
register(LIBRARY, "qk_norm_rope_out", run_into)
register(LIBRARY, "qk_norm_rope_backward", run_backward)


@torch.library.register_fake("joyedit::qk_norm_rope", lib=LIBRARY)
def _(q, k, *others):
    return like(q), like(k)


@torch.library.register_fake("joyedit::qk_norm_rope_out", lib=LIBRARY)
def _(*arguments):
    return None


@torch.library.register_fake("joyedit::qk_norm_rope_backward", lib=LIBRARY)
def _(dq_out, dk_out, q, k, q_weight, k_weight, *others):
    return like(q), like(k), *(q.new_empty(0) if w is None else like(w) for w in (q_weight, k_weight))


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.settings = inputs[6:]


def differentiate(ctx, dq_out, dk_out):
    tensors = ctx.saved_tensors
    dq, dk, *dweights = torch.ops.joyedit.qk_norm_rope_backward(dq_out, dk_out, *tensors, *ctx.settings)
    dweights = (None if w is None else dw for w, dw in zip(tensors[2:4], dweights, strict=True))
    return dq, dk, *dweights, None, None, None, None, None


torch.library.register_autograd("joyedit::qk_norm_rope", differentiate, setup_context=keep, lib=LIBRARY)
qk_norm_rope = torch.ops.joyedit.qk_norm_rope.default
qk_norm_rope_out = torch.ops.joyedit.qk_norm_rope_out.default
