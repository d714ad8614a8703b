"""qk_norm_rope against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from joyedit import ops


def plain(q, k, q_weight, k_weight, rope, eps=1e-6, half_split=False, start=0):
    """As JoyImage's reference: the norm is rounded, the rotation is in fp32."""

    def one(x, weight, first):
        shape = x.shape
        if weight is not None:
            rows = x if weight.shape[0] == shape[-1] else x.flatten(-2)
            x = F.rms_norm(rows, rows.shape[-1:], weight, eps).view(shape)
        if rope is None:
            return x
        cos, sin = (t[..., first : first + shape[1], None, :] for t in rope)
        a, b = x.chunk(2, dim=-1) if half_split else (x[..., ::2], x[..., 1::2])
        turned = a * cos - b * sin, b * cos + a * sin
        joined = torch.cat(turned, dim=-1) if half_split else torch.stack(turned, dim=-1).flatten(-2)
        return joined.to(x.dtype)

    return one(q, q_weight, start), one(k, k_weight, 0)


# Beside the pairing: that of neighbours is slow where the other stands for it.
HALVES = pytest.mark.parametrize(
    "half_split", [pytest.param(False, marks=pytest.mark.slow), True], ids=["neighbours", "halves"]
)


@pytest.fixture
def projected(randn):
    """q (B, M, H, E), of the last M tokens, and k (B, N, G, E): views of one projection to q, k and v."""

    def projected(b, m, n, h, g, e, dtype) -> tuple[Tensor, Tensor]:
        qkv = randn(b, n, (h + 2 * g) * e, dtype=dtype)
        q, k, _ = qkv.split((h * e, g * e, g * e), dim=-1)
        return q[:, n - m :].unflatten(-1, (h, e)), k.unflatten(-1, (g, e))

    return projected


@pytest.fixture
def angles(randn):
    def angles(*shape: int) -> tuple[Tensor, Tensor]:
        angle = 3 * randn(*shape)
        return angle.cos(), angle.sin()

    return angles


@pytest.mark.parametrize("half_split", [False, True], ids=["neighbours", "halves"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 1, 2), (2, 2, 2, 5, 5, 12), (1, 1, 1, 3, 3, 128), (1, 0, 0, 2, 2, 8)], ids=str
)
def test_each_head_is_normed(compare, randn, projected, angles, dtype, shape, half_split):
    e, n = shape[-1], shape[2]
    given = *projected(*shape, dtype), randn(e), randn(e), angles(n, e // 2), 1e-6, half_split
    compare(ops.qk_norm_rope, plain, *given)


@HALVES
@pytest.mark.parametrize("shape", [(2, 2, 2, 3, 3, 10), (1, 1, 1, 40, 40, 6), (1, 2, 2, 1, 3, 4)], ids=str)
def test_all_heads_are_normed_together(compare, randn, projected, angles, dtype, shape, half_split):
    _, _, n, h, g, e = shape
    weights = randn(h * e, dtype=dtype), randn(g * e, dtype=dtype)
    given = *projected(*shape, dtype), *weights, angles(1, n, e // 2), 1e-5, half_split
    compare(ops.qk_norm_rope, plain, *given)


@HALVES
def test_grouped_queries_that_start_late_and_a_table_for_each_sample(
    compare, randn, projected, angles, dtype, half_split
):
    given = *projected(2, 2, 3, 3, 2, 16, dtype), randn(16), randn(16), angles(2, 3, 8), 1e-6, half_split, 1
    compare(ops.qk_norm_rope, plain, *given)


def test_first_tokens_ask(compare, randn, projected, angles, dtype):
    compare(ops.qk_norm_rope, plain, *projected(1, 2, 3, 2, 2, 8, dtype), randn(8), randn(8), angles(3, 4))


@HALVES
def test_without_a_norm(compare, projected, angles, dtype, half_split):
    given = *projected(1, 2, 2, 3, 3, 72, dtype), None, None, angles(1, 2, 36), 1e-6, half_split
    compare(ops.qk_norm_rope, plain, *given)


@pytest.mark.parametrize("width", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 32))])
def test_without_a_rotation(compare, randn, projected, dtype, width):
    q, _ = projected(2, 3, 3, 3, 1, width, dtype)
    _, k = projected(2, 1, 1, 1, 2, width, dtype)
    compare(ops.qk_norm_rope, plain, q, k, randn(width), randn(width, dtype=dtype), None)


def test_heads_apart_and_slices_of_tables_and_weights(compare, randn, angles, dtype):
    q, k = randn(2, 2, 4, 8, dtype=dtype, strided=True), randn(2, 2, 8, 4, dtype=dtype).transpose(2, 3)
    rope = tuple(t[:, 1::2] for t in angles(2, 9))
    compare(ops.qk_norm_rope, plain, q, k, randn(16)[::2], randn(3, 8)[:, 2:].flatten()[:8], rope)


def test_more_work_than_programs(compare, randn, projected, angles, monkeypatch):
    from joyedit.kernels import qk_norm_rope

    monkeypatch.setattr(qk_norm_rope, "PARTIAL_SUMS", 2)
    q, k = projected(2, 2, 3, 3, 2, 8, torch.float32)
    compare(ops.qk_norm_rope, plain, q, k, randn(8), randn(8), angles(3, 4), 1e-6, False, 1)
    compare(ops.qk_norm_rope, plain, q, k, randn(24), randn(16), angles(3, 4), 1e-6, True, 1)


def test_zeros_and_large_values(compare, randn, angles):
    q, k = torch.zeros_like(randn(1, 2, 2, 8)), 1e4 * randn(1, 2, 2, 8)
    compare(ops.qk_norm_rope, plain, q, k, randn(8), randn(8), angles(2, 4))


def test_one_gradient_is_enough(randn, angles):
    """What nothing is asked of, here k, has gradient zero."""
    q, k, weight = randn(1, 2, 2, 8).requires_grad_(), randn(1, 2, 2, 8), randn(8).requires_grad_()
    rope = angles(2, 4)
    for backend in ("triton", "torch"):
        with ops.backend(backend):
            out, _ = ops.qk_norm_rope(q, k, weight, weight, rope)
        found = torch.autograd.grad(out.square().sum(), (q, weight))
        wide = [t.detach().double().requires_grad_() for t in (q, weight)]
        exact, _ = plain(wide[0], k.double(), wide[1], wide[1], rope)
        torch.testing.assert_close(found, torch.autograd.grad(exact.square().sum(), wide), check_dtype=False)


@HALVES
@pytest.mark.parametrize("queries", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_results_in_parts_of_larger_tensors(
    launches, randn, projected, angles, dtype, device, queries, half_split
):
    q, k = projected(2, queries, 3, 3, 2, 8, dtype)
    given = q, k, randn(8), randn(8), angles(3, 4), 1e-6, half_split, 3 - queries
    joint = [torch.full((2, 6, heads, 8), 7.0, dtype=dtype, device=device) for heads in (3, 2)]
    places = joint[0][:, 2 : 2 + queries], joint[1][:, 2:5]
    with ops.backend("triton"):
        with launches() as counts:
            out = ops.qk_norm_rope(*given, out=places)
        wanted = ops.qk_norm_rope(*given)
    assert counts == {"qk_norm_rope_out": 1}
    for whole, written, place, exact in zip(joint, out, places, wanted, strict=True):
        assert written.data_ptr() == place.data_ptr() and torch.equal(place, exact)
        stop = 2 + place.shape[1]
        assert (whole[:, :2] == 7).all() and (whole[:, stop:] == 7).all(), "more was written"


def test_results_that_cannot_be_written(randn, angles):
    from joyedit.kernels.qk_norm_rope import qk_norm_rope_out

    q, k = randn(1, 3, 2, 8), randn(1, 3, 2, 8)
    given = q, k, None, None, *angles(3, 4), 1e-6, False, 0
    for place in (randn(1, 2, 3, 8).transpose(1, 2), randn(1, 3, 2, 16)[..., ::2], randn(1, 4, 2, 8)):
        with pytest.raises(ValueError, match=r"\(1, 3, 2, 8\) cannot be written to"):
            qk_norm_rope_out(*given, randn(1, 3, 2, 8), place)


@pytest.mark.parametrize("half_split", [False, True], ids=["neighbours", "halves"])
@pytest.mark.parametrize("steps", ["each, turned", "each", "together, turned", "together", "turned"])
def test_torch_is_the_same_function(randn, projected, angles, dtype, steps, half_split):
    q, k = projected(2, 3, 5, 4, 2, 6, dtype)
    widths = {"each": (6, 6), "together": (24, 12)}.get(steps.partition(",")[0], ())
    given = [q, k, *(randn(width, dtype=dtype) for width in widths)]
    rest = [*(() if widths else (None, None)), angles(2, 5, 3) if "turned" in steps else None]
    rest = [*rest, 1e-6, half_split, 2]
    with ops.backend("torch"):
        ours = ops.qk_norm_rope(*(given + rest))
    halves, exacts = plain(*(given + rest)), plain(*([t.double() for t in given] + rest))
    for out, half, exact in zip(ours, halves, exacts, strict=True):
        assert out.dtype == dtype and out.is_contiguous()
        unit = torch.finfo(dtype).eps * exact.abs().max()
        assert (out - exact).abs().max() <= (half - exact).abs().max() + unit


@pytest.mark.parametrize("half_split", [False, True], ids=["neighbours", "halves"])
def test_torch_does_not_write_to_its_arguments(randn, angles, half_split):
    q, k, weight = randn(1, 2, 2, 8), randn(1, 2, 2, 8), randn(8)
    before = [t.clone() for t in (q, k)]
    for weights in ((None, None), (weight, weight)):
        with ops.backend("torch"):
            ops.qk_norm_rope(q, k, *weights, angles(2, 4), 1e-6, half_split)
        assert torch.equal(q, before[0]) and torch.equal(k, before[1])


def test_torch_has_the_gradients_of_its_formula(randn, projected, angles):
    q, k = projected(1, 2, 3, 2, 1, 4, torch.float64)
    rope = tuple(t.double() for t in angles(3, 2))
    for weights in ((randn(4), randn(4)), (randn(8), randn(4))):
        for half_split in (False, True):

            def function(q, k, q_weight, k_weight, half_split=half_split):
                return ops.qk_norm_rope(q, k, q_weight, k_weight, rope, 1e-6, half_split, 1)

            given = [t.detach().double().requires_grad_() for t in (q, k, *weights)]
            with ops.backend("torch"):
                assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_table_that_does_not_fit(randn, angles, backend):
    q, k, weight = randn(1, 3, 2, 8), randn(1, 5, 2, 8), randn(8)
    with ops.backend(backend):
        with pytest.raises(ValueError, match="table of 4 rows does not fit 5 tokens"):
            ops.qk_norm_rope(q, k, weight, weight, angles(4, 4))
        with pytest.raises(ValueError, match="of which 3 from 3 on ask"):
            ops.qk_norm_rope(q, k, weight, weight, angles(5, 4), start=3)


@pytest.mark.slow
def test_fullgraph_with_a_start_that_varies(randn, angles):
    compiled = torch.compile(ops.qk_norm_rope, fullgraph=True, backend="aot_eager")
    for tokens, start in ((2, 1), (4, 2), (6, 3)):
        q, k = randn(1, tokens - start, 2, 6).requires_grad_(), randn(1, tokens, 1, 6).requires_grad_()
        given = q, k, randn(6), randn(6), angles(1, tokens, 3), 1e-6, True, start
        with ops.backend("triton"):
            out = compiled(*given)
        wanted = plain(*given)
        torch.testing.assert_close(out, wanted)
        ours, theirs = (torch.autograd.grad([t.square().sum() for t in o], (q, k)) for o in (out, wanted))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_registration(randn, projected, angles):
    from joyedit.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_out

    q, k = (t.detach().requires_grad_() for t in projected(1, 2, 3, 2, 1, 4, torch.float32))
    cos, sin = angles(3, 2)
    weights = randn(4).requires_grad_(), randn(4).requires_grad_()
    torch.library.opcheck(qk_norm_rope, (q, k, *weights, cos, sin, 1e-6, False, 1))
    torch.library.opcheck(qk_norm_rope, (q, k, None, None, cos, sin, 1e-6, True, 1))
    weights = randn(8).requires_grad_(), randn(4).requires_grad_()
    torch.library.opcheck(qk_norm_rope, (q, k, *weights, None, None, 1e-6, False, 0))
    q, k, *weights = (t.detach() for t in (q, k, *weights))
    places = randn(1, 4, 2, 4)[:, 1:3], randn(1, 5, 1, 4)[:, :3]
    torch.library.opcheck(qk_norm_rope_out, (q, k, *weights, cos, sin, 1e-6, False, 1, *places))
