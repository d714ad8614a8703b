"""rms_norm and add_rms_norm against float64."""

import pytest
import torch
import torch.nn.functional as F

from joyedit import ops


def plain(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def plain_sum(x, y, weight, eps):
    return x + y, plain(x + y, weight, eps)


STRIDED = pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
# Six rows of 2100 are those of a program and a half.
SHAPES = [(1, 1), (2, 7, 17), (2, 3, 5, 64), (2, 6, 2100), (0, 8)]
SHAPES += [pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 5120), (70, 192))]


@STRIDED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(compare, randn, dtype, shape, strided):
    compare(ops.rms_norm, plain, randn(*shape, dtype=dtype, strided=strided), randn(shape[-1]), 1e-6)


@STRIDED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(compare, randn, dtype, shape, strided):
    x, y = (randn(*shape, dtype=dtype, strided=s) for s in (strided, not strided))
    compare(ops.add_rms_norm, plain_sum, x, y, randn(shape[-1]), 1e-6)


def test_a_stream_wider_than_what_is_added(compare, randn, dtype):
    compare(ops.add_rms_norm, plain_sum, randn(7, 33), randn(7, 33, dtype=dtype), randn(33), 1e-5)


def test_norm_is_that_of_the_rounded_sum(randn):
    """As the composition has it: the second result equals the norm of the first."""
    x, y, weight = randn(2, 5, 64).bfloat16(), randn(2, 5, 64).bfloat16(), randn(64)
    with ops.backend("triton"):
        total, out = ops.add_rms_norm(x, y, weight)
        assert torch.equal(total, x + y)
        assert torch.equal(out, ops.rms_norm(total, weight))


def test_weight_of_the_dtype_and_one_row(compare, randn, dtype):
    compare(ops.rms_norm, plain, randn(33, dtype=dtype), randn(33, dtype=dtype), 1e-5)


def test_more_chunks_than_programs(compare, randn, monkeypatch):
    from joyedit.kernels import rms_norm

    monkeypatch.setattr(rms_norm, "PARTIAL_SUMS", 2)
    compare(ops.rms_norm, plain, randn(2, 5, 1280, strided=True), randn(1280), 1e-6)
    x, y = randn(2, 5, 1280, strided=True), randn(2, 5, 1280)
    compare(ops.add_rms_norm, plain_sum, x, y, randn(1280), 1e-6)


@pytest.mark.slow
def test_registration(randn):
    from joyedit.kernels.rms_norm import add_rms_norm, rms_norm

    x, weight = randn(2, 3, 8, strided=True).requires_grad_(), randn(8).requires_grad_()
    torch.library.opcheck(rms_norm, (x, weight, 1e-6))
    # The result is contiguous whatever the argument is, and the fake must say so.
    torch.library.opcheck(rms_norm, (randn(3, 2, 8).transpose(0, 1), weight, 1e-6))
    y = randn(3, 2, 8).transpose(0, 1).requires_grad_()
    torch.library.opcheck(add_rms_norm, (x, y, weight, 1e-6))
    torch.library.opcheck(add_rms_norm, (y.detach(), y.detach(), weight, 1e-6))
