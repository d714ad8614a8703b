"""layer_norm and ada_layer_norm against float64."""

import pytest
import torch
import torch.nn.functional as F

from joyedit import ops


def plain_norm(x, weight=None, bias=None, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def plain_ada(x, shift, scale, eps):
    return plain_norm(x, eps=eps) * (1 + scale[:, None]) + shift[:, None]


# Six rows of 2100 are those of a program and a half.
SHAPES = [(1, 1), (2, 7, 17), (2, 3, 5, 64), (2, 6, 2100), (0, 8)]
SHAPES += [pytest.param(shape, marks=pytest.mark.slow) for shape in ((1, 5120), (70, 192))]
BATCHES = [(2, 1, 1), (2, 7, 17), (2, 6, 2100), pytest.param((2, 70, 192), marks=pytest.mark.slow)]


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(compare, randn, dtype, shape, strided):
    x, width = randn(*shape, dtype=dtype, strided=strided), shape[-1]
    compare(ops.layer_norm, plain_norm, x, randn(width), randn(width), 1e-6)


def test_layer_norm_without_scale_and_shift(compare, randn, dtype):
    compare(ops.layer_norm, plain_norm, randn(2, 5, 33, dtype=dtype))
    compare(ops.layer_norm, plain_norm, randn(33, dtype=dtype), randn(33, dtype=dtype))
    compare(ops.layer_norm, plain_norm, randn(5, 33, dtype=dtype), None, randn(33))


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", BATCHES, ids=str)
def test_ada_layer_norm(compare, randn, dtype, shape, strided):
    b, n, d = shape
    x = randn(b, n, d, dtype=dtype, strided=strided)
    shift, scale = randn(b, 6, d)[:, 3], randn(1, 6, d)[:, 4]
    compare(ops.ada_layer_norm, plain_ada, x, shift, scale, 1e-6, backward="layer_norm_backward")


def test_modulation_of_the_dtype_of_x(compare, randn, dtype):
    x, shift, scale = randn(2, 3, 65, dtype=dtype), randn(1, 65, dtype=dtype), randn(2, 65, dtype=dtype)
    compare(ops.ada_layer_norm, plain_ada, x, shift, scale, 1e-6, backward="layer_norm_backward")


def test_more_chunks_than_programs(compare, randn, monkeypatch):
    from joyedit.kernels import ada_layer_norm

    monkeypatch.setattr(ada_layer_norm, "PARTIAL_SUMS", 4)
    given = randn(2, 7, 1280, strided=True), randn(2, 1280), randn(1, 1280), 1e-6
    compare(ops.ada_layer_norm, plain_ada, *given, backward="layer_norm_backward")


def test_mean_far_from_zero(compare, randn):
    """The variance is that of the centred values: a difference of two large sums would lose it."""
    compare(ops.layer_norm, plain_norm, 300 + randn(5, 1280))


@pytest.mark.slow
def test_registration(randn):
    from joyedit.kernels.ada_layer_norm import ada_layer_norm, layer_norm

    x = randn(2, 3, 8, strided=True).requires_grad_()
    scale, shift = randn(1, 8).requires_grad_(), randn(2, 8).requires_grad_()
    torch.library.opcheck(ada_layer_norm, (x, shift, scale, 1e-6))
    torch.library.opcheck(layer_norm, (x, scale[0].detach().requires_grad_(), None, 1e-6))
    torch.library.opcheck(layer_norm, (x, None, None, 1e-6))
    # The result is contiguous whatever the argument is, and the fake must say so.
    torch.library.opcheck(layer_norm, (randn(3, 2, 8).transpose(0, 1), None, None, 1e-6))
