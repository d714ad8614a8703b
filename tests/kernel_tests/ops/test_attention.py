"""attention against float64: segments, packing, causality, grouped queries and every kind of tile."""

import contextvars
import dataclasses
import functools
import itertools
import re
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from joyedit import ops

# Whose tiles, in what dtype: masked pointers, tensor descriptors, AMD's tiles and those of fp32. Slow are the
# way and the dtype that others have.
KINDS = [
    pytest.param(("sm_80", torch.float16), id="sm_80-float16", marks=pytest.mark.slow),
    pytest.param(("sm_80", torch.bfloat16), id="sm_80-bfloat16"),
    pytest.param(("sm_90", torch.float16), id="sm_90-float16"),
    pytest.param(("sm_90", torch.bfloat16), id="sm_90-bfloat16", marks=pytest.mark.slow),
    pytest.param(("gfx942", torch.float32), id="gfx942-float32"),
]

# For what the tiles of AMD and of fp32 do as the others do.
FEWER = pytest.mark.parametrize(
    "dtype",
    [*KINDS[:-1], pytest.param(*KINDS[-1].values, id=KINDS[-1].id, marks=pytest.mark.slow)],
    indirect=True,
)


@pytest.fixture(params=KINDS)
def dtype(request, monkeypatch) -> torch.dtype:
    """Another path through the kernel each. On a GPU, all take its own."""
    from joyedit.kernels import attention

    family, dtype = request.param
    if attention.triton.knobs.runtime.interpret:
        monkeypatch.setattr(attention, "family", lambda device: family)
    return dtype


@dataclasses.dataclass
class Shape:
    """Token counts of the segments of q and of k; one number: of one segment."""

    queries: tuple[int, ...] = (33,)
    keys: tuple[int, ...] = (70,)
    heads: int = 2
    groups: int = 2
    width: int = 32
    batch: int = 1


def part(tokens: int, heads: int, width: int, shape: Shape, dtype, device) -> Tensor:
    """(B, N, H, E) as a slice of a fused projection of more tokens; what lies around it is NaN."""
    whole = torch.full((shape.batch, tokens + 3, 3, heads, width), float("nan"), dtype=dtype, device=device)
    view = whole[:, 1 : tokens + 1, 1]
    drawn = torch.float64 if device.type == "cpu" else torch.float32  # as in conftest.py
    # Scores of ten and more, whose rounding in fp32 would be nearly all of an error in fp32.
    size = 1 if dtype == torch.float32 else 2
    return view.copy_(size * torch.randn(view.shape, device=device, dtype=drawn))


def tensors(shape: Shape, dtype, device) -> list[Tensor]:
    """Segments of q, then of k, then of v."""
    q = [part(n, shape.heads, shape.width, shape, dtype, device) for n in shape.queries]
    k, v = ([part(m, shape.groups, shape.width, shape, dtype, device) for m in shape.keys] for _ in "kv")
    return q + k + v


def plain(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """PyTorch's own kernel; visible (N, M)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=k.shape[1] != q.shape[1])
    return out.transpose(1, 2)


@pytest.fixture
def check(compare, dtype, device):
    """A function that holds attention over `shape` with some options against PyTorch's of q, k, v joined."""

    def check(shape: Shape, reference=None, **options):
        n, m = len(shape.queries), len(shape.keys)

        def attention(*given):
            return ops.attention(given[:n], given[n : n + m], given[n + m :], **options)

        def joined(*given):
            parts = given[:n], given[n : n + m], given[n + m :]
            if reference is None:
                return plain(*(torch.cat(x, dim=1) for x in parts))
            return reference(*parts)

        compare(attention, joined, *tensors(shape, dtype, device), backward=None)

    return check


WIDTHS = [8, 12, 40, 64, 96, 160, *(pytest.param(n, marks=pytest.mark.slow) for n in (32, 72, 80, 128, 200))]


@pytest.mark.parametrize("width", WIDTHS)
def test_head_widths(check, width):
    check(Shape(width=width))


LENGTHS = [(1, 1), (1, 131), (131, 1), (65, 128)]
LENGTHS += [pytest.param(*lengths, marks=pytest.mark.slow) for lengths in ((2, 127), (64, 257), (129, 3))]


@pytest.mark.parametrize(("queries", "keys"), LENGTHS, ids=str)
def test_ragged_lengths(check, queries, keys):
    check(Shape((queries,), (keys,), batch=2, heads=1, groups=1))


@pytest.mark.parametrize("groups", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6))])
def test_grouped_queries(check, groups):
    check(Shape(heads=6, groups=groups, batch=2))


def causal(q, k, v):
    q, k, v = (torch.cat(x, dim=1) for x in (q, k, v))
    n, m = q.shape[1], k.shape[1]
    return plain(q, k, v, torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n))


# The last two: the first key that the first query does not see begins a tile of keys.
CAUSAL = [(1, 70), (33, 33), (70, 200), (5, 132)]
CAUSAL += [pytest.param(*n, marks=pytest.mark.slow) for n in ((1, 1), (131, 131), (3, 70), (40, 103))]


@pytest.mark.parametrize(("queries", "keys"), CAUSAL, ids=str)
def test_causal_up_to_the_last_key(check, queries, keys):
    check(Shape((queries,), (keys,), groups=1), causal, causal=True)


@FEWER
@pytest.mark.parametrize("keys", [(1, 40), (70, 41), (64, 64)], ids=str)
def test_causal_after_a_prefix_in_a_segment_of_its_own(check, keys):
    check(Shape((40,), keys), causal, causal=True)


@FEWER
def test_causal_with_two_segments_of_queries(check):
    check(Shape((35, 70), (33, 110), groups=1), causal, causal=True)


SEGMENTS = [
    ((33, 5), (70, 9)),
    pytest.param((130, 1), (1, 131), marks=pytest.mark.slow),
    pytest.param((64, 128), (128, 64), marks=pytest.mark.slow),
    ((3,), (64, 66)),
    ((7, 2), (40,)),
]


@FEWER
@pytest.mark.parametrize(("queries", "keys"), SEGMENTS, ids=str)
def test_segments_as_if_they_were_joined(check, queries, keys):
    check(Shape(queries, keys, batch=2, heads=2, groups=1))


@FEWER
def test_segments_of_unlike_strides(compare, dtype, device):
    """One a slice of a projection, the other not: each is read by its own."""
    shape = Shape((33, 5), (70, 9), batch=2)
    q1, q2, k1, k2, v1, v2 = tensors(shape, dtype, device)

    def attention(*given):
        return ops.attention(given[:2], given[2:4], given[4:])

    def joined(*given):
        return plain(*(torch.cat(given[i : i + 2], dim=1) for i in (0, 2, 4)))

    given = q1, q2.contiguous(), k1.contiguous(), k2, v1, v2.contiguous()
    compare(attention, joined, *given, backward=None)


def added(q, k, v):
    return sum(plain(torch.cat(q, dim=1), *pair) for pair in zip(k, v, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 72, 128])
@pytest.mark.parametrize("keys", [(70, 9), (3, 130), (64, 32), (5,)], ids=str)
def test_summed_softmaxes(check, keys, width):
    check(Shape((33,), keys, width=width), added, summed=True)


@FEWER
def test_summed_softmaxes_of_two_segments_of_queries(check):
    check(Shape((5, 66), (70, 9)), added, summed=True)


def packed(lengths, one):
    def reference(q, k, v):
        samples = zip(*(x[0].split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([one([a], [b], [c]) for a, b, c in samples], dim=1)

    return reference


LENGTHS_OF_SAMPLES = [[70], [5, 1, 0, 67, 64], [1, 131, 2]]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS_OF_SAMPLES, ids=str)
def test_packed_samples(check, lengths):
    shape = Shape((sum(lengths),), (sum(lengths),), width=72, groups=1)
    check(shape, packed(lengths, added), lengths=lengths)


@FEWER
def test_packed_samples_are_causal_each_by_itself(check):
    lengths = [5, 67, 130]
    check(Shape((202,), (202,)), packed(lengths, causal), lengths=lengths, causal=True)


@FEWER
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the NaN that is put in
def test_a_packed_sample_never_reads_another(dtype, device):
    shape = Shape((100,), (100,))
    q, k, v = tensors(shape, dtype, device)
    with ops.backend("triton"):
        clean = ops.attention(q, k, v, lengths=[30, 40, 30])
        k[:, 30:70], v[:, 30:70] = float("inf"), float("nan")
        spoilt = ops.attention(q, k, v, lengths=[30, 40, 30])
    same = torch.ones(100, dtype=torch.bool, device=device)
    same[30:70] = False
    assert torch.equal(spoilt[:, same], clean[:, same])
    assert spoilt[:, 30:70].isnan().all()


def test_scale(check):
    check(Shape(), lambda q, k, v: plain(q[0], k[0], v[0], scale=1.0), scale=1.0)


def test_scores_beyond_the_range_of_exp(dtype, device):
    """The largest score is subtracted first: weights of 1 and 0, not inf / inf."""
    q, k, v = tensors(Shape(keys=(200,)), dtype, device)
    q[..., 1:], k[..., 1:], q[..., 0] = 0, 0, 60
    k[..., 0] = torch.arange(200, device=device)[:, None] - 300.0
    with ops.backend("triton"):
        out = ops.attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out, v[:, -1:].expand_as(out))


@FEWER
def test_one_for_all_samples(device, dtype):
    """Keys of one sample, expanded over the batch: a stride of zero."""
    q, k, v = tensors(Shape(batch=3), dtype, device)
    k, v = (x[:1].expand(3, -1, -1, -1) for x in (k, v))
    with ops.backend("triton"):
        out = ops.attention(q, k, v)
        alone = ops.attention(q[1:2], k[:1], v[:1])
    assert torch.equal(out[1:2], alone)


ORDERS = {"heads first": (0, 2, 1, 3), "channels before heads": (0, 1, 3, 2)}


@FEWER
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_other_orders_in_memory(compare, dtype, device, order):
    """Of the axes (B, N, H, E): where heads are not E apart, or the channels of one not adjacent."""
    sizes = [(1, 7, 2, 32)[axis] for axis in order]
    given = [torch.randn(sizes, device=device).to(dtype).permute(order) for _ in range(3)]

    def attention(q, k, v):
        return ops.attention(q, k, v)

    compare(attention, plain, *given, backward=None)


def test_nothing_to_ask(device, dtype):
    q, k, v = tensors(Shape(queries=(0,)), dtype, device)
    with ops.backend("triton"):
        assert ops.attention(q, k, v).shape == (1, 0, 2, 32)


@pytest.fixture
def tiles(monkeypatch, device):
    """A function that gives the constants which the kernel gets for shaped bf16 tensors on a family."""
    from joyedit.kernels import attention

    def tiles(
        family: str, shape: Shape, dtype=torch.bfloat16, change=lambda x: x, **options
    ) -> SimpleNamespace:
        given, found = tensors(shape, dtype, device), {}

        class Kernel:
            def __getitem__(self, grid):
                return lambda *args, **constants: found.update(constants, grid=grid, segments=args[:6])

        n, m = len(shape.queries), len(shape.keys)
        with monkeypatch.context() as patch, ops.backend("triton"):
            patch.setattr(attention, "family", lambda device: family)
            patch.setattr(attention, "attention_forward", Kernel())
            given = [change(x) for x in given]
            ops.attention(given[:n], given[n : n + m], given[n + m :], **options)
        return SimpleNamespace(**found)

    return tiles


def test_descriptors_where_the_device_has_them_and_the_memory_allows(tiles):
    assert tiles("sm_90", Shape(width=64)).TMA
    assert tiles("sm_100", Shape(width=128)).WARP_SPECIALIZE
    assert not tiles("sm_80", Shape(width=64)).TMA and not tiles("gfx950", Shape(width=64)).TMA
    assert not tiles("sm_90", Shape(width=64), torch.float32).TMA
    assert not tiles("sm_90", Shape(width=12)).TMA, "24 bytes from token to token"
    off = tiles("sm_100", Shape(width=128), change=lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape))
    assert off.TMA and off.WARP_SPECIALIZE, "copied from an address that is no multiple of 16 bytes"
    read = [x[0] for x in off.segments if x is not None][1:]
    assert [x.data_ptr() % 16 for x in read] == [0, 0]


def test_keys_at_an_odd_address(check, monkeypatch):
    """As in the test above, and the result is still right."""
    given = tensors
    odd = functools.partial(map, lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape))
    monkeypatch.setitem(globals(), "tensors", lambda *args: [*odd(given(*args))])
    check(Shape((33,), (70, 9), batch=2))


def test_a_tile_of_its_own_for_two_segments_of_keys_alone(tiles):
    """JoyImage's last block asks with one segment."""
    joint, alone = (tiles("sm_80", Shape(queries, (70, 9), width=128)) for queries in ((33, 9), (33,)))
    assert (joint.BLOCK_M, alone.BLOCK_M) == (64, 32)
    assert tiles("sm_90", Shape((33,), (70, 9), width=128)).BLOCK_M == 128


def test_tiles_of_their_own_for_an_older_triton(monkeypatch):
    """Rows of the tables before 3.6 take the place of all others, and only those."""
    from joyedit.kernels import attention, attention_tiles

    kinds = itertools.product((False, True), (False, True), ((1, 1), (1, 2), (2, 2)))
    calls = [(causal, summed, parts) for causal, summed, parts in kinds if not (causal and summed)]
    differ = 0
    for family, width, (causal, summed, segments) in itertools.product(
        attention_tiles.TILES, (64, 128, 256), calls
    ):
        found = []
        for version in ("3.10.0", "3.5.1"):
            monkeypatch.setattr(attention.triton, "__version__", version)
            found.append(attention.choose(family, width, torch.float16, causal, summed, segments))
        table = "CAUSAL_OR_SUMMED_TILES" if causal or summed else "TILES"
        widest = min(
            widest
            for widest in attention.tiles_for(family, torch.float16, causal, summed, segments)
            if width <= widest
        )
        row = getattr(attention_tiles, f"{table}_BEFORE_3_6").get(family, {}).get(widest)
        new, (constants, options) = found
        if row is None:
            assert (constants, options) == new
        else:
            assert row[:2] == (constants["BLOCK_N"], constants["BLOCK_M"])
            assert row[2:4] == (options["num_warps"], options["num_stages"])
            differ += (constants, options) != new
    assert differ > 5


def test_every_row_of_the_tables_is_a_line_and_has_its_evidence():
    """What rewrites them goes by lines."""
    from joyedit.kernels import attention_tiles

    written = Path(attention_tiles.__file__).read_text(encoding="utf-8")
    found = re.findall(r"^        (\d+): (Tile\(.+?\)),  # (\w.+)$", written, re.MULTILINE)
    tables = [table for name, table in vars(attention_tiles).items() if "TILES" in name]
    rows = [row for table in tables for rows in table.values() for row in rows.items()]
    made = [(int(width), eval(tile, vars(attention_tiles))) for width, tile, _ in found]
    assert made == rows and len(rows) > 30
    for _, _, evidence in found:
        assert re.search(r"with Triton 3\.\d|Triton 3\.\d+\.\d+$", evidence), evidence
    for table in tables:
        for rows in table.values():
            assert list(rows) == sorted(rows)


def test_first_tokens_of_samples(monkeypatch, device):
    """Kept outside of a graph's capture, made anew within it."""
    from joyedit.kernels import attention

    lengths = (3, 0, 5)
    kept = attention.first_tokens(lengths, device)
    assert kept.tolist() == [0, 3, 3, 8] and kept.dtype == torch.int32
    assert attention.first_tokens(lengths, device) is kept
    monkeypatch.setattr(attention, "capturing", lambda device: True)
    filled = attention.first_tokens(lengths, device)
    assert filled is not kept and torch.equal(filled, kept) and filled.dtype == torch.int32


def test_a_device_without_tiles(monkeypatch, device):
    from joyedit.kernels import attention

    monkeypatch.setattr(attention, "family", lambda device: None)
    q, k, v = tensors(Shape(), torch.float32, device)
    with ops.backend("triton"), pytest.raises(RuntimeError, match="can run here: there are no tiles"):
        ops.attention(q, k, v)
    with pytest.raises(RuntimeError, match="can run here: there are no tiles"):
        attention.attention([q], [k], [v], [], False, False, 1.0)
    with ops.backend("auto"):
        torch.testing.assert_close(ops.attention(q, k, v), plain(q, k, v).contiguous())


def test_every_family_has_tiles_for_every_width(tiles):
    from joyedit.kernels import attention_tiles

    for family in attention_tiles.TILES:
        for width in (1, 8, 40, 64, 72, 80, 128, 160, 256):
            for options in ({}, {"causal": True}, {"summed": True}):
                for dtype in (torch.float32, torch.float16):
                    found = tiles(family, Shape((70, 5), (70, 80), width=width), dtype, **options)
                    rows = found.BLOCK_N
                    assert found.grid == (-(-70 // rows) + -(-5 // rows), 2, 1)
                    assert found.MAIN + found.REST >= width
                    assert found.MAIN >= 16 and (found.REST == 0 or 16 <= found.REST < found.MAIN)


def test_parts_of_a_head_width():
    from joyedit.kernels.attention import head_parts

    known = {8: (16, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 128: (128, 0), 160: (128, 32)}
    assert {width: head_parts(width) for width in known} == known
    assert head_parts(100) == (128, 0) and head_parts(96) == (64, 32)


@pytest.fixture
def stock(monkeypatch):
    """A function that says whether "auto" leaves a call to PyTorch on a family of devices with some cuDNN."""
    from joyedit.kernels import attention

    def stock(
        family,
        queries=(100,),
        keys=(100,),
        width=128,
        dtype=torch.bfloat16,
        lengths=(),
        cudnn: int | None = 91501,
        **options,
    ):
        monkeypatch.setattr(attention, "family", lambda device: family)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        q, k = ([torch.empty(1, n, 2, width, dtype=dtype, device="meta") for n in x] for x in (queries, keys))
        return attention.stock_is_faster(q, k, lengths, **{"causal": False, "summed": False, **options})

    return stock


def test_pytorch_where_it_is_faster(stock):
    """The rule of "auto", for devices that this machine does not have."""
    from joyedit.kernels.attention_tiles import TILES

    for family in TILES:
        assert stock(family) and stock(family, width=64) and stock(family, causal=True)
        assert not stock(family, width=72) and not stock(family, lengths=[40, 60])
        assert not stock(family, keys=(80, 20)) and not stock(family, keys=(80, 20), summed=True)
        assert not stock(family, queries=(50,), causal=True)
        assert stock(family, dtype=torch.float32) == family.startswith("sm")
        assert stock(family, dtype=torch.float32, lengths=[40, 60]) == family.startswith("sm")
    joyimage = {"queries": (8192, 1100), "keys": (8192, 1100)}
    assert all(stock(family, **joyimage) for family in TILES)
    assert stock("sm_90", keys=(2048, 9)) and not stock("sm_80", keys=(2048, 9))
    assert stock(None)


@pytest.mark.parametrize("cudnn", [91500, 90800, None])
def test_pytorch_is_not_faster_where_it_would_not_take_cudnn(stock, cudnn):
    """It does after 9.15.0, on devices that cuDNN's attention is made for."""
    from joyedit.kernels.attention_tiles import TILES

    joyimage = {"queries": (8192, 1100), "keys": (8192, 1100)}
    for family in TILES:
        elsewhere = family not in ("sm_90", "sm_100")
        for call in ({}, {"width": 64}, {"causal": True}, joyimage):
            assert stock(family, cudnn=cudnn, **call) == elsewhere
            assert stock(family, **call)
    assert stock("sm_90", cudnn=cudnn, dtype=torch.float32), "by FFMA in any case"


ALLOCATIONS = {"Triton 3.4": lambda kept: kept, "Triton 3.6": lambda kept: ContextVar("kept", default=kept)}


@pytest.mark.parametrize("holder", ALLOCATIONS.values(), ids=ALLOCATIONS)
def test_an_allocator_of_the_program_stays(monkeypatch, device, holder):
    """However Triton keeps it: it is asked for memory at a launch with descriptors, not ours."""
    from joyedit.kernels import attention

    null, own = attention._allocation.NullAllocator(), lambda size, alignment, stream: None
    found = []
    monkeypatch.setattr(attention, "family", lambda device: "sm_90")
    monkeypatch.setattr(attention.triton, "set_allocator", found.append)
    for kept, wanted in ((null, [attention.workspace]), (own, [])):
        monkeypatch.setattr(attention._allocation, "_allocator", holder(kept))
        with ops.backend("triton"):
            ops.attention(*tensors(Shape((3,), (5,)), torch.float16, device))
        assert found == wanted
        found.clear()


def test_the_allocator_is_found_where_this_triton_keeps_it():
    """Each in a context of its own, so that none is left behind."""
    from joyedit.kernels import attention

    def kept():
        found = attention._allocation._allocator
        return found.get() if isinstance(found, ContextVar) else found

    def own(size, alignment, stream):
        raise AssertionError("nothing is launched")

    def after(allocator):
        before = kept()
        try:
            attention.triton.set_allocator(allocator)
            attention.provide_workspace()
            return kept()
        finally:
            attention.triton.set_allocator(before)

    assert contextvars.copy_context().run(after, own) is own
    null = attention._allocation.NullAllocator()
    assert contextvars.copy_context().run(after, null) is attention.workspace


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"summed": True}, {"lengths": [3, 4]}], ids=str)
@pytest.mark.slow
def test_registration(device, options):
    from joyedit.kernels.attention import attention

    options = {"lengths": [], "causal": False, "summed": False, "scale": 0.5} | options
    q, k, v = tensors(Shape((7,), (7,)), torch.float32, device)
    torch.library.opcheck(attention, ([q], [k], [v], *options.values()))


def test_what_is_refused(device):
    q, k, v = tensors(Shape((7,), (7,)), torch.float32, device)
    for options in ({"lengths": [3, 3]}, {"lengths": [8, -1]}, {"lengths": [7], "mask": torch.ones(7, 7)}):
        with pytest.raises(ValueError, match="lengths|packed"):
            ops.attention(q, k, v, **options)
    with pytest.raises(ValueError, match="lengths"):
        ops.attention(q, k[:, :5], v[:, :5], lengths=[7])
    with pytest.raises(ValueError, match="lengths"):
        ops.attention(*(x.expand(2, -1, -1, -1) for x in (q, k, v)), lengths=[7])
    with pytest.raises(ValueError, match="segment"):
        ops.attention(q, (k, k), (v, v), lengths=[7])
    for options in ({"causal": True}, {"lengths": [7]}, {"mask": torch.ones(7, 7)}):
        with pytest.raises(ValueError, match="neither causal nor packed nor masked"):
            ops.attention(q, k, v, summed=True, **options)
    reasons = {
        "batch of k": lambda: ops.attention(q.expand(2, -1, -1, -1), k, v),
        "heads of k": lambda: ops.attention(q.repeat(1, 1, 2, 1)[:, :, :3], k, v),
        "tokens of v": lambda: ops.attention(q, k, v[:, :5]),
        "segments of v": lambda: ops.attention(q, (k, k), v),
        "widths": lambda: ops.attention(q, (k, k[..., :8]), (v, v[..., :8])),
        "wider than 256": lambda: ops.attention(*(x.repeat(1, 1, 1, 9) for x in (q, k, v))),
        "two segments": lambda: ops.attention(q, (k, k, k), (v, v, v)),
        "several dtypes": lambda: ops.attention(q, k.half(), v),
        "no keys": lambda: ops.attention(q, (k, k[:, :0]), (v, v[:, :0])),
        "more queries than keys": lambda: ops.attention(q, k[:, :5], v[:, :5], causal=True),
        "the second segment": lambda: ops.attention(q, (k, k[:, :5]), (v, v[:, :5]), causal=True),
        "not positive": lambda: ops.attention(q, k, v, scale=-1.0),
        "no backward": lambda: ops.attention(q.clone().requires_grad_(), k, v),
    }
    shapes = ("batch of k", "heads of k", "tokens of v", "segments of v", "widths")
    for reason, call in reasons.items():
        with (
            ops.backend("triton"),
            pytest.raises(RuntimeError, match="do not fit" if reason in shapes else reason),
        ):
            call()


def test_a_mask_is_pytorchs_under_every_backend(launches, device):
    q, k, v = tensors(Shape(), torch.float32, device)
    bias = torch.randn(33, 70, device=device)
    with ops.backend("triton"), launches() as counts:
        out = ops.attention(q, k, v, mask=bias)
    assert not counts
    torch.testing.assert_close(out, plain(q, k, v, bias).contiguous())


def test_pytorchs_way_of_the_same(device):
    """The reference that the kernel replaces, against the one of these tests."""
    lengths = [5, 67, 28]
    q, k, v = tensors(Shape((100,), (100,), groups=1), torch.float64, device)
    q2, k2, v2 = tensors(Shape((9,), (100,), groups=1), torch.float64, device)
    with ops.backend("torch"):
        torch.testing.assert_close(
            ops.attention(q, k, v, lengths=lengths, causal=True), packed(lengths, causal)([q], [k], [v])
        )
        torch.testing.assert_close(
            ops.attention((q, q2), (k, k2), (v, v2), summed=True), added([q, q2], [k, k2], [v, v2])
        )
        torch.testing.assert_close(
            ops.attention(q2, (k, k2), (v, v2), causal=True), causal([q2], [k, k2], [v, v2])
        )


@pytest.mark.slow
def test_fullgraph(device):
    """One graph for several lengths, with the options that networks pass."""

    def network(q, k, v, lengths):
        joint = ops.attention((q, k), (k, q), (v, v))
        return ops.attention(q, k, v, lengths=lengths) + ops.attention(q, (k, q), (v, v), summed=True), joint

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for tokens in (5, 9, 12):
        q, k, v = tensors(Shape((tokens,), (tokens,), width=16), torch.float32, device)
        with ops.backend("triton"):
            out = compiled(q, k, v, [2, tokens - 2])
        with ops.backend("torch"):
            torch.testing.assert_close(out, network(q, k, v, [2, tokens - 2]))
