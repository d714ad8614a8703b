"""group_norm and group_norm_silu against float64, in both memory formats and by both ways."""

import pytest
import torch
import torch.nn.functional as F

from joyedit import ops

OPERATIONS = pytest.mark.parametrize("silu", [False, True], ids=["norm", "silu"])
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
# B, C, H, W, groups: one channel a group, odd sizes, 30 channels a group, one position, no picture.
SHAPES = [
    (2, 1, 1, 1, 1),
    (2, 6, 5, 7, 6),
    (2, 60, 7, 5, 2),
    (1, 80, 2, 3, 8),
    (3, 34, 1, 1, 2),
    (0, 8, 2, 2, 4),
]


def plain(x, weight, bias, groups, eps):
    return F.group_norm(x.contiguous(), groups, weight, bias, eps)


def plain_silu(x, weight, bias, groups, eps):
    return F.silu(plain(x, weight, bias, groups, eps))


@pytest.fixture
def check(compare, randn):
    def check(silu, x, groups, eps=1e-5):
        op, formula = (ops.group_norm_silu, plain_silu) if silu else (ops.group_norm, plain)
        compare(op, formula, x, randn(x.shape[1]), randn(x.shape[1]), groups, eps, keeps_format=True)

    return check


@pytest.fixture
def shared(monkeypatch):
    """Groups that many programs share; one of them has less to do."""
    from joyedit.kernels import group_norm

    monkeypatch.setattr(group_norm, "ONE_PROGRAM", 0)
    return monkeypatch


def maps(randn, last, b, c, h, w, dtype=torch.float32):
    return randn(b, h, w, c, dtype=dtype).movedim(-1, 1) if last else randn(b, c, h, w, dtype=dtype)


@pytest.mark.slow
@OPERATIONS
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_program_per_group(check, randn, shape, last, silu):
    *sizes, groups = shape
    check(silu, maps(randn, last, *sizes), groups)


@OPERATIONS
@LAYOUTS
def test_shared_groups(check, randn, shared, dtype, last, silu):
    check(silu, maps(randn, last, 2, 12, 5, 7, dtype), 3, 1e-6)


@LAYOUTS
@pytest.mark.parametrize("partial_sums", [1, pytest.param(18, marks=pytest.mark.slow)])
def test_many_tiles(check, randn, shared, last, partial_sums):
    """2501 positions are three tiles of a contiguous map and 40 of one with channels last."""
    from joyedit.kernels import group_norm

    shared.setattr(group_norm, "SHARING", partial_sums)
    check(True, maps(randn, last, 1, 34, 61, 41), 2)


@pytest.mark.slow
@LAYOUTS
def test_one_program_takes_many_tiles(check, randn, dtype, last):
    check(True, maps(randn, last, 1, 8, 71, 61, dtype), 1)


@LAYOUTS
def test_halves_of_a_batch_and_of_channels(check, randn, shared, last):
    x = maps(randn, last, 4, 12, 5, 3)
    check(True, x[::2], 3)
    check(True, x[:, 4:], 2)


def test_positions_that_no_stride_describes(compare, randn):
    x = randn(2, 4, 5, 9)[..., 1:-2]
    compare(ops.group_norm, plain, x, randn(4), randn(4), 2, 1e-5)


def test_one_axis_of_positions_and_none(check, randn):
    check(True, randn(2, 6, 11), 3)
    check(False, randn(5, 6), 2)


def test_a_gradient_in_another_memory_format(randn, shared):
    x, weight, bias = randn(2, 8, 3, 5).requires_grad_(), *randn(2, 8)
    gradient = maps(randn, True, 2, 8, 3, 5)
    with ops.backend("triton"):
        (ours,) = torch.autograd.grad(ops.group_norm_silu(x, weight, bias, 2, 1e-5), x, gradient)
    (exact,) = torch.autograd.grad(plain_silu(x, weight, bias, 2, 1e-5), x, gradient)
    torch.testing.assert_close(ours, exact)
    (spread,) = torch.autograd.grad(plain_silu(x, weight, bias, 2, 1e-5).sum(), x)
    with ops.backend("triton"):
        (ours,) = torch.autograd.grad(ops.group_norm_silu(x, weight, bias, 2, 1e-5).sum(), x)
    torch.testing.assert_close(ours, spread)


@LAYOUTS
@pytest.mark.parametrize("elements", [0, 1 << 20], ids=["shared", "one program"])
def test_nearly_constant_maps(randn, monkeypatch, last, elements):
    """The level is 4096 and the deviation 0.05: squares in fp32 have steps of 1. What fp32 can give is the
    mean to two steps, divided by the deviation."""
    from joyedit.kernels import group_norm

    monkeypatch.setattr(group_norm, "ONE_PROGRAM", elements)
    monkeypatch.setattr(group_norm, "SHARING", 1)  # each element of a tile sees several values
    x = maps(randn, last, 1, 12, 71, 61) * 0.05 + 4096
    weight, bias = randn(2, 12)
    exact = plain(x.double(), weight.double(), bias.double(), 3, 1e-6)
    with ops.backend("triton"):
        out = ops.group_norm(x, weight, bias, 3, 1e-6)
    steps = 2 * torch.finfo(torch.float32).eps * 4096 / 0.05
    assert (out - exact).abs().max() <= steps * weight.abs().max()


def test_unequal_groups_are_refused(randn):
    with ops.backend("triton"), pytest.raises(RuntimeError, match="10 channels are not 4 equal groups"):
        ops.group_norm(randn(1, 10, 2, 2), randn(10), randn(10), 4, 1e-5)


@OPERATIONS
@LAYOUTS
@pytest.mark.slow
def test_registration(randn, last, silu):
    from joyedit.kernels.group_norm import group_norm, group_norm_silu

    kernel = group_norm_silu if silu else group_norm
    weight, bias = randn(6).requires_grad_(), randn(6).requires_grad_()
    torch.library.opcheck(kernel, (maps(randn, last, 2, 6, 3, 2).requires_grad_(), weight, bias, 3, 1e-5))
    half = maps(randn, last, 2, 12, 3, 2)[:, 6:]
    torch.library.opcheck(kernel, (half, weight, bias, 3, 1e-5), test_utils="test_faketensor")
