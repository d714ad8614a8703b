"""Attention of tokens over tokens without the matrix of scores in memory: softmax(q k^T * scale) v.

    q (B, N, H, E);  k, v (B, M, G, E), H / G heads of q to one of k and v  ->  out (B, N, H, E) contiguous

FlashAttention's forward: a program keeps BLOCK_N queries of one head and walks over the keys, BLOCK_M at a
time, with a running maximum and sum of the softmax (arXiv 2205.14135, 2307.08691). Reads q once, and k and v
once per BLOCK_N queries, mostly from the L2 cache; scores and weights are never written. Beyond that:

    segments   q, and k with v, may each be two tensors that follow one another (image and text): nothing is
               concatenated. `summed`: each of the two has a softmax of its own, and the results are added.
    lengths    samples packed one after another along the token axis; each attends to its own tokens only.
    causal     the last query sees the last key, so that a cached prefix may come before; of two key segments
               the first is seen wholly.

The ragged end of the keys and the causal diagonal are masked, and walked first: what follows is a loop over
full tiles with no mask in it, and its registers are free of the mask's. A head whose width is no power of two
is done in two parts (MAIN + REST: 72 as 64 + 16, 160 as 128 + 32), which costs less than the next power. The
softmax is in powers of two and in fp32; the weights are rounded to the dtype of v. There is no backward.
"""

import functools
import itertools
from collections.abc import Sequence
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import _allocation

from joyedit.kernels import attention_tiles as tiles
from joyedit.kernels.shared import register

INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = 1.4426950408889634
TMA_FAMILIES = ("sm_90", "sm_100", "sm_120")
torch.backends.cudnn.version()  # asked once outside of torch.compile, which can then read the answer


def no_tiles(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device, None where it can."""
    return None if family(device) else "there are no tiles of attention for this device"


def stock_is_faster(
    q: Sequence[Tensor], k: Sequence[Tensor], lengths: Sequence[int], causal: bool, summed: bool
) -> bool:
    """Whether "auto" should leave this attention to PyTorch's own kernel."""
    device, width, keys = family(q[0].device), q[0].shape[-1], sum(part.shape[1] for part in k)
    if device is None:
        return True
    if q[0].dtype == torch.float32:
        return device.startswith("sm")  # it blocks for registers, which ours cannot
    if lengths or summed or width not in tiles.STOCK[device]:
        return False
    if device in tiles.STOCK_BY_CUDNN and not has_cudnn_attention():
        return False
    if causal and keys != sum(part.shape[1] for part in q):
        return False  # PyTorch would read a mask
    return len(q) == len(k) == 1 or keys >= tiles.STOCK_SEGMENTS[device]


def has_cudnn_attention() -> bool:
    """Whether PyTorch's attention is cuDNN's, on devices that it is made for: PyTorch does not take an older
    one, which errs at lengths that 128 does not divide (`check_prefer_cudnn_attention` in sdp_utils.cpp)."""
    version = torch.backends.cudnn.version()
    return version is not None and version > 91500


def family(device: torch.device) -> str | None:
    """The key of the tables of tiles, None for a device that is not in them."""
    if INTERPRETED:
        return "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = "sm_86" if properties.major == 8 and properties.minor else f"sm_{properties.major}0"
    return name if name in tiles.TILES else None


def head_parts(width: int) -> tuple[int, int]:
    """MAIN and REST, which cover a head width with little padding: powers of two from 16 on, or REST is 0."""
    whole = max(16, triton.next_power_of_2(width))
    main = whole // 2
    rest = max(16, triton.next_power_of_2(width - main))
    return (main, rest) if 16 <= main and rest < main else (whole, 0)


def choose(
    device: str, width: int, dtype: torch.dtype, causal: bool, summed: bool, segments: tuple[int, int]
) -> tuple[dict, dict]:
    """The constants of the kernel and the options of its compilation, for a family of devices; segments: how
    many there are of queries and of keys."""
    main, rest = head_parts(width)
    table = tiles_for(device, dtype, causal, summed, segments)
    tile = table[min(widest for widest in table if main + rest <= widest)]._asdict()
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"E": width, "MAIN": main, "REST": rest, "CAUSAL": causal, "SUMMED": summed, **tile}
    # Unrolled where the loop over two segments is not compiled: for AMD's devices Triton 3.6 takes no choice
    # between pointers, for sm_100 Triton 3.4 no head in two parts (and later ones spill).
    constants["UNROLL"] = 2 if device.startswith("gfx") or device == "sm_100" and rest else 1
    return constants, {**options, "enable_fp_fusion": True}


def before_3_6() -> bool:
    """Whether Triton is of the releases that have tables of their own."""
    return tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6)


def tiles_for(
    device: str, dtype: torch.dtype, causal: bool, summed: bool, segments: tuple[int, int]
) -> dict[int, tiles.Tile]:
    """The tables of tiles for such a call, one laid over the other: widest head of a row -> tile."""
    if dtype == torch.float32:
        return tiles.FP32_TILES[device[: 2 if device.startswith("sm") else 3]]
    is_old = before_3_6()
    if causal or summed:
        tables = [tiles.CAUSAL_OR_SUMMED_TILES]
        tables += [tiles.SUMMED_TILES] if summed else []
        tables += [tiles.CAUSAL_OR_SUMMED_TILES_BEFORE_3_6] if is_old else []
    else:
        tables = [tiles.TILES]
        tables += [tiles.TWO_KEY_SEGMENTS_TILES] if segments == (1, 2) else []
        tables += [tiles.TILES_BEFORE_3_6] if is_old else []
    return {widest: tile for table in tables for widest, tile in table.get(device, {}).items()}


@triton.jit(do_not_specialize=["N1", "N2", "M1", "M2"])
def attention_forward(
    q1,  # (B, N1, H, E): pointer, and strides of samples and tokens; heads are E apart; so are the next five
    q2,  # (B, N2, H, E) or None
    k1,  # (B, M1, G, E)
    k2,  # (B, M2, G, E) or None
    v1,  # (B, M1, G, E)
    v2,  # (B, M2, G, E) or None
    starts,  # (samples + 1) int32, the first token of each packed sample; None: not packed
    out,  # (B, N1 + N2, H, E) contiguous
    N1,
    N2,
    M1,
    M2,
    scale,  # times log2(e)
    GROUP: tl.constexpr,  # H / G
    E: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    CAUSAL: tl.constexpr,
    SUMMED: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tile = tl.program_id(0)
    if CAUSAL:
        tile = tl.num_programs(0) - 1 - tile  # the longest walks first
    row = tile * BLOCK_N
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    if starts is not None:
        first = tl.load(starts + sample).to(tl.int64)
        N1 = tl.load(starts + sample + 1) - first.to(tl.int32)
        M1 = N1
        if row >= N1:
            return
        sample = sample * 0
    else:
        first = sample * 0
    out_row = first + sample * (N1 + N2) + row
    position = row + M1 + M2 - N1 - N2  # of the tile's first query, counted as the keys are
    left = N1 - row
    if q2 is None:
        queries = load_queries(q1, sample, first + row, head, left, E, MAIN, REST, BLOCK_N)
    else:
        tiles1 = tl.cdiv(N1, BLOCK_N)
        if tile < tiles1:
            queries = load_queries(q1, sample, first + row, head, left, E, MAIN, REST, BLOCK_N)
        else:
            row -= tiles1 * BLOCK_N
            left = N2 - row
            out_row = sample * (N1 + N2) + N1 + row
            position = row + M1 + M2 - N2
            queries = load_queries(q2, sample, first + row, head, left, E, MAIN, REST, BLOCK_N)

    group = head // GROUP
    state = start_state(MAIN, REST, BLOCK_N)
    if k2 is None:
        k, v = rows_from(k1, sample, first, group, E), rows_from(v1, sample, first, group, E)
        state = attend(
            state, queries, k, v, M1, position, scale,
            E, MAIN, REST, CAUSAL, TMA, WARP_SPECIALIZE, BLOCK_N, BLOCK_M,
        )  # fmt: skip
        result = divided(state, REST)
    else:
        result = start_state(MAIN, REST, BLOCK_N)[:2]
        # A loop, not two calls: the code, and the registers it needs, are those of one segment.
        for segment in tl.range(0, 2, loop_unroll_factor=UNROLL):
            second = segment == 1
            k = selected(second, k1, k2, sample, first, group, E)
            v = selected(second, v1, v2, sample, first, group, E)
            M = tl.where(second, M2, M1)
            last = tl.where(second, position - M1, M1)  # behind all keys of the first: every query sees them
            state = attend(
                state, queries, k, v, M, last, scale,
                E, MAIN, REST, CAUSAL, TMA, WARP_SPECIALIZE, BLOCK_N, BLOCK_M,
            )  # fmt: skip
            if SUMMED:
                main, rest = divided(state, REST)
                result = (result[0] + main, result[1] + rest)
                state = start_state(MAIN, REST, BLOCK_N)
        if not SUMMED:
            result = divided(state, REST)

    heads = tl.num_programs(1)
    pointer = out + (out_row * heads + head) * E
    store(pointer, heads * E, left, result[0], 0, E, MAIN, BLOCK_N)
    if REST:
        store(pointer, heads * E, left, result[1], MAIN, E, REST, BLOCK_N)


@triton.jit
def selected(second, x1, x2, sample, row, head, E: tl.constexpr):
    """`rows_from` of one of two segments. Not by a branch: Triton 3.6 copies nothing ahead (cp.async) through
    a pointer that comes out of one."""
    pointer1, stride1 = rows_from(x1, sample, row, head, E)
    pointer2, stride2 = rows_from(x2, sample, row, head, E)
    return tl.where(second, pointer2, pointer1), tl.where(second, stride2, stride1)


@triton.jit
def attend(
    state,
    queries,
    k,  # pointer to the first key, and the stride of tokens
    v,
    M,
    position,
    scale,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The state after M more keys."""
    if TMA:  # descriptors of the M rows: what lies behind them reads as zeros
        k_main = tl.make_tensor_descriptor(k[0], [M, E], [k[1], 1], [BLOCK_M, MAIN])
        v_main = tl.make_tensor_descriptor(v[0], [M, E], [v[1], 1], [BLOCK_M, MAIN])
        k_rest = tl.make_tensor_descriptor(k[0], [M, E], [k[1], 1], [BLOCK_M, REST]) if REST else k_main
        v_rest = tl.make_tensor_descriptor(v[0], [M, E], [v[1], 1], [BLOCK_M, REST]) if REST else v_main
    else:
        k_main, v_main, k_rest, v_rest = None, None, None, None
    k, v = (k[0], k[1], k_main, k_rest), (v[0], v[1], v_main, v_rest)
    full = M // BLOCK_M * BLOCK_M
    if CAUSAL:
        full = tl.minimum(full, (position + 1) // BLOCK_M * BLOCK_M)
        end = tl.minimum(M, position + BLOCK_N)
        for start in tl.range(full, end, BLOCK_M, num_stages=1):
            state = step(
                state, queries, k, v, start, M, position, scale, E, MAIN, REST, True, True, BLOCK_N, BLOCK_M
            )
    elif full < M:
        state = step(
            state, queries, k, v, full, M, position, scale, E, MAIN, REST, True, False, BLOCK_N, BLOCK_M
        )
    for start in tl.range(0, full, BLOCK_M, warp_specialize=WARP_SPECIALIZE):
        state = step(
            state, queries, k, v, start, M, position, scale, E, MAIN, REST, False, False, BLOCK_N, BLOCK_M
        )
    return state


@triton.jit
def step(
    state,
    queries,
    k,
    v,
    start,
    M,
    position,
    scale,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    RAGGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The state after the BLOCK_M keys from `start` on."""
    main, rest, total, peak = state
    scores = tl.dot(queries[0], load_main(k, start, M, E, MAIN, BLOCK_M, RAGGED).T, input_precision="ieee")
    if REST:
        keys = load_rest(k, start, M, E, MAIN, REST, BLOCK_M, RAGGED)
        scores = tl.dot(queries[1], keys.T, scores, input_precision="ieee")
    if RAGGED:
        last = tl.minimum(position + tl.arange(0, BLOCK_N), M - 1)[:, None] if CAUSAL else M - 1
        scores = tl.where(start + tl.arange(0, BLOCK_M)[None] <= last, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * scale)
    # A query above the diagonal may have seen no key yet: its weights are zeros, not exp2(inf - inf).
    shift = tl.where(higher == float("-inf"), 0.0, higher) if CAUSAL else higher
    weights = tl.exp2(scores * scale - shift[:, None])
    shrink = tl.exp2(peak - shift)
    total = total * shrink + tl.sum(weights, 1)
    values = load_main(v, start, M, E, MAIN, BLOCK_M, RAGGED)
    weights = weights.to(values.dtype)
    main = tl.dot(weights, values, main * shrink[:, None], input_precision="ieee")
    if REST:
        values = load_rest(v, start, M, E, MAIN, REST, BLOCK_M, RAGGED)
        rest = tl.dot(weights, values, rest * shrink[:, None], input_precision="ieee")
    return main, rest, total, higher


@triton.jit
def start_state(MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Weighted sums of values (main and rest of the head), sum of the weights, largest score."""
    main = tl.zeros([BLOCK_N, MAIN], tl.float32)
    rest = tl.zeros([BLOCK_N, REST], tl.float32) if REST else 0.0
    return main, rest, tl.zeros([BLOCK_N], tl.float32), tl.full([BLOCK_N], float("-inf"), tl.float32)


@triton.jit
def divided(state, REST: tl.constexpr):
    main, rest, total, _ = state
    return main / total[:, None], (rest / total[:, None] if REST else rest)


@triton.jit
def rows_from(x, sample, row, head, E: tl.constexpr):
    """Pointer to (sample, row, head), and the stride of rows. The stride of heads is a constant: the compiler
    sees that 72 or 40 keeps loads of 16 bytes aligned, of a variable it knows only whether 16 divides it."""
    pointer, stride_b, stride_n = x
    return pointer + (sample * stride_b + row * stride_n + head * E), stride_n


@triton.jit
def load_queries(
    q, sample, row, head, left, E: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr
):
    pointer, stride = rows_from(q, sample, row, head, E)
    main = load_tile(pointer, stride, left, 0, E, MAIN, BLOCK, True)
    return main, (load_tile(pointer, stride, left, MAIN, E, REST, BLOCK, True) if REST else 0.0)


@triton.jit
def load_main(rows, start, M, E: tl.constexpr, MAIN: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr):
    pointer, stride, descriptor, _ = rows
    if descriptor is not None:
        return descriptor.load([start, 0])
    pointer += tl.cast(start, tl.int64) * stride
    return load_tile(pointer, stride, M - start, 0, E, MAIN, BLOCK, RAGGED)


@triton.jit
def load_rest(
    rows,
    start,
    M,
    E: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    pointer, stride, _, descriptor = rows
    if descriptor is not None:
        return descriptor.load([start, MAIN])
    pointer += tl.cast(start, tl.int64) * stride
    return load_tile(pointer, stride, M - start, MAIN, E, REST, BLOCK, RAGGED)


@triton.jit
def load_tile(
    pointer,
    stride,
    left,  # rows there are, from `pointer` on
    FROM: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """BLOCK rows and WIDTH columns, zeros behind the last of either. The offsets are small and the same at
    every step of a loop; what moves is one 64-bit pointer."""
    row, column = tl.arange(0, BLOCK)[:, None], FROM + tl.arange(0, WIDTH)[None]
    places = pointer + (row * stride + column)
    if RAGGED:
        return tl.load(places, (row < left) & (column < E), other=0.0)
    if FROM + WIDTH > E:
        return tl.load(places, column < E, other=0.0)
    return tl.load(places)


@triton.jit
def store(
    pointer,
    stride,
    left,
    x,
    FROM: tl.constexpr,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.arange(0, BLOCK)[:, None], FROM + tl.arange(0, WIDTH)[None]
    tl.store(pointer + (row * stride + column), x, (row < left) & (column < E))


def run_attention(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    lengths: list[int],
    causal: bool,
    summed: bool,
    scale: float,
) -> Tensor:
    first, out = q[0], fake_attention(q, k, v, lengths, causal, summed, scale)
    if out.numel() == 0:
        return out
    q, k, v = ([with_adjacent_heads(x) for x in part] for part in (q, k, v))
    device = family(first.device)
    if device is None:
        raise RuntimeError(f"no Triton kernel can run here: {no_tiles(first.device)}")
    constants, options = choose(device, first.shape[-1], first.dtype, causal, summed, (len(q), len(k)))
    if device in TMA_FAMILIES and first.dtype != torch.float32 and first.shape[-1] % 8 == 0:
        # Masked pointers would spill on these devices: a copy is the lesser cost.
        k, v = ([x if tma_reads(x) else copied(x) for x in part] for part in (k, v))
        constants["TMA"] = True
    else:
        constants["TMA"] = False
    constants["WARP_SPECIALIZE"] &= constants["TMA"]
    if constants["TMA"]:
        provide_workspace()

    n, m = ([x.shape[1] for x in part] for part in (q, k))
    rows = [max(lengths)] if lengths else n
    grid = (
        sum(triton.cdiv(count, constants["BLOCK_N"]) for count in rows),
        out.shape[2],
        len(lengths) or len(out),
    )
    sizes = (*n, 0)[:2] + (*m, 0)[:2]
    starts = first_tokens(tuple(lengths), first.device) if lengths else None
    segments = [(*map(strided, part), None)[:2] for part in (q, k, v)]
    with torch.cuda.device_of(first):
        attention_forward[grid](
            *segments[0],
            *segments[1],
            *segments[2],
            starts,
            out,
            *sizes,
            scale * LOG2_E,
            GROUP=out.shape[2] // k[0].shape[2],
            **constants,
            **options,
        )
    return out


def with_adjacent_heads(x: Tensor) -> Tensor:
    _, _, h, e = x.shape
    return x if x.stride(3) == 1 and (h == 1 or x.stride(2) == e) else x.contiguous()


def strided(x: Tensor) -> tuple[Tensor, int, int]:
    _, n, h, e = x.shape
    return x, x.stride(0), x.stride(1) if n > 1 else h * e


def tma_reads(x: Tensor) -> bool:
    """Whether address and strides are multiples of 16 bytes."""
    steps = *strided(x)[1:], x.shape[3]
    return all(step * x.element_size() % 16 == 0 for step in steps) and x.data_ptr() % 16 == 0


def copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def provide_workspace() -> None:
    """Memory for the descriptors, unless the program has an allocator of its own. Asked at each launch: newer
    versions of Triton keep one for each context of Python, so for each thread."""
    kept = _allocation._allocator
    if isinstance(kept.get() if isinstance(kept, ContextVar) else kept, _allocation.NullAllocator):
        triton.set_allocator(workspace)


def workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def first_tokens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(samples + 1) int32. Kept, because a copy to the device per call would wait for it. A graph that is
    being captured cannot copy, and its memory must not outlive it: there the numbers are filled in."""
    if not capturing(device):
        return kept_first_tokens(lengths, device)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    for i, first in enumerate(itertools.accumulate(lengths)):
        starts[i + 1].fill_(first)
    return starts


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=64)
def kept_first_tokens(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    starts = (0, *itertools.accumulate(lengths))
    return torch.tensor(starts, dtype=torch.int32, device=device)


def fake_attention(q, k, v, lengths, causal, summed, scale):
    b, _, h, e = q[0].shape
    tokens = sum(part.shape[1] for part in q)
    return torch.empty((b, tokens, h, e), dtype=q[0].dtype, device=q[0].device)


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
LIBRARY.define(
    "attention(Tensor[] q, Tensor[] k, Tensor[] v, int[] lengths, bool causal, bool summed, float scale)"
    " -> Tensor"
)
register(LIBRARY, "attention", run_attention)
torch.library.register_fake("joyedit::attention", fake_attention, lib=LIBRARY)
attention = torch.ops.joyedit.attention.default
