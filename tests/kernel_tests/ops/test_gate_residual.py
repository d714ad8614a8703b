"""gate_residual, gate_residual_norm and gate_residual_layer_norm against float64."""

import pytest
import torch
import torch.nn.functional as F

from joyedit import ops


def plain(x, y, gate):
    return x + y * gate[:, None]


def plain_norm(x, y, gate, shift, scale, eps):
    x = x + y if gate is None else plain(x, y, gate)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    return x, normed * (1 + scale[:, None]) + shift[:, None]


def plain_affine(x, y, gate, weight, bias, eps):
    x = plain(x, y, gate)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# Six rows of 2100 are those of a program and a half: the next sample's are another's.
SHAPES = [(2, 1, 1), (2, 7, 17), (2, 6, 2100), (1, 0, 8)]
SHAPES += [pytest.param(shape, marks=pytest.mark.slow) for shape in ((2, 70, 192), (2, 1, 5120))]
GATES = pytest.mark.parametrize(
    "one_gate", [pytest.param(False, marks=pytest.mark.slow), True], ids=["gates", "gate"]
)


@pytest.mark.parametrize("one_gate", [False, True], ids=["gates", "gate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_residual(compare, randn, dtype, shape, one_gate):
    b, n, d = shape
    x, y = (randn(b, n, d, dtype=dtype, strided=s) for s in (one_gate, not one_gate))
    compare(ops.gate_residual, plain, x, y, randn(1 if one_gate else b, 6, d)[:, 2])


@pytest.mark.parametrize("gated", [False, True], ids=["sum", "gate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_residual_norm(compare, randn, dtype, shape, gated):
    b, n, d = shape
    x, y = (randn(b, n, d, dtype=dtype, strided=s) for s in (gated, not gated))
    gate = randn(b, d) if gated else None
    compare(ops.gate_residual_norm, plain_norm, x, y, gate, randn(b, 6, d)[:, 3], randn(1, d), 1e-6)


@GATES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_residual_layer_norm(compare, randn, dtype, shape, one_gate):
    b, n, d = shape
    x, y = (randn(b, n, d, dtype=dtype, strided=s) for s in (one_gate, not one_gate))
    given = x, y, randn(1 if one_gate else b, 6, d)[:, 2], randn(d), randn(d, dtype=dtype), 1e-5
    compare(ops.gate_residual_layer_norm, plain_affine, *given, backward="gate_residual_norm_backward")


def test_a_stream_wider_than_what_is_added(compare, randn, dtype):
    compare(ops.gate_residual, plain, randn(2, 5, 33), randn(2, 5, 33, dtype=dtype), randn(2, 33))


def test_norm_is_that_of_the_rounded_sum(randn):
    """As the composition has it: the second result equals the norm of the first."""
    x, y, gate, shift, scale = (randn(2, 5, 64).bfloat16(), randn(2, 5, 64).bfloat16(), *randn(3, 2, 64))
    with ops.backend("triton"):
        out, normed = ops.gate_residual_norm(x, y, gate, shift, scale)
        assert torch.equal(out, ops.gate_residual(x, y, gate))
        assert torch.equal(normed, ops.ada_layer_norm(out, shift, scale))
        out, normed = ops.gate_residual_layer_norm(x, y, gate, scale[0], shift[0])
        assert torch.equal(out, ops.gate_residual(x, y, gate))
        assert torch.equal(normed, ops.layer_norm(out, scale[0], shift[0]))


def test_more_chunks_than_programs(compare, randn, monkeypatch):
    from joyedit.kernels import gate_residual

    monkeypatch.setattr(gate_residual, "PARTIAL_SUMS", 4)
    x, y, gate, shift, scale = *randn(2, 2, 7, 1280), randn(2, 1280), *randn(2, 1, 1280)
    compare(ops.gate_residual, plain, x, y, gate)
    compare(ops.gate_residual_norm, plain_norm, x, y, gate, shift, scale, 1e-6)


@pytest.mark.slow
def test_registration(randn):
    from joyedit.kernels.gate_residual import gate_residual, gate_residual_layer_norm, gate_residual_norm

    x, y = (randn(2, 3, 8, strided=s).requires_grad_() for s in (True, False))
    gate, shift, scale = (randn(1, 8).requires_grad_() for _ in range(3))
    torch.library.opcheck(gate_residual, (x, y, gate))
    torch.library.opcheck(gate_residual_norm, (x, y, gate, shift, scale, 1e-6))
    torch.library.opcheck(gate_residual_norm, (x, y, None, shift, scale, 1e-6))
    affine = (t[0].detach().requires_grad_() for t in (scale, shift))
    torch.library.opcheck(gate_residual_layer_norm, (x, y, gate, *affine, 1e-6))
    # The results are contiguous whatever the arguments are, and the fake must say so.
    turned = randn(3, 2, 8).transpose(0, 1)
    torch.library.opcheck(gate_residual, (turned, turned, gate))
