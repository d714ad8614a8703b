"""geglu, geglu_tanh, swiglu and gelu_tanh against float64, and the product that ends in a GELU."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from joyedit import ops


def geglu(value_gate):
    value, gate = value_gate.chunk(2, dim=-1)
    return value * F.gelu(gate)


def geglu_tanh(gate, value):
    return F.gelu(gate, approximate="tanh") * value


def swiglu(gate, up):
    return F.silu(gate) * up


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


SHAPES = [
    (1, 1, 1),
    (2, 7, 17),
    (2, 9, 320),
    (2, 0, 8),
    (40,),
    pytest.param((3, 1, 1280), marks=pytest.mark.slow),
]
PAIRS = [(ops.swiglu, swiglu), (ops.geglu_tanh, geglu_tanh)]
pairs = pytest.mark.parametrize("op, plain", PAIRS, ids=["swiglu", "geglu_tanh"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geglu(compare, randn, dtype, shape):
    *outer, width = shape
    compare(ops.geglu, geglu, 2 * randn(*outer, 2 * width, dtype=dtype))


@pairs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_projections(compare, randn, dtype, op, plain, shape):
    compare(op, plain, 2 * randn(*shape, dtype=dtype), randn(*shape, dtype=dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gelu_alone(compare, randn, dtype, shape):
    compare(ops.gelu_tanh, gelu_tanh, 2 * randn(*shape, dtype=dtype))


@pairs
def test_strided(compare, randn, dtype, op, plain):
    """The halves of a fused projection, one of them over strided batches."""
    compare(op, plain, *randn(2, 5, 2 * 40, dtype=dtype).chunk(2, dim=-1))
    compare(op, plain, randn(2, 5, 40, dtype=dtype), randn(2, 5, 40, dtype=dtype, strided=True))
    compare(op, plain, randn(2, 40, 5, dtype=dtype).transpose(1, 2), randn(2, 5, 40, dtype=dtype))


def test_strided_alone(compare, randn, dtype):
    compare(ops.gelu_tanh, gelu_tanh, randn(2, 3, 5, 40, dtype=dtype, strided=True))
    compare(ops.geglu, geglu, randn(2, 3, 40, dtype=dtype, strided=True))


def test_far_from_zero(randn, dtype):
    """What saturates: gates are passed or closed, and no exponential overflows into NaN."""
    gate = torch.tensor([-65000.0, -300.0, -30.0, 30.0, 300.0, 65000.0], device=randn(1).device).to(dtype)
    gate, value = gate.repeat(2, 3).requires_grad_(), torch.full((2, 18), 0.5, device=gate.device).to(dtype)
    wanted = gate.detach().clamp_min(0) * 0.5
    for op in (ops.swiglu, ops.geglu_tanh):
        with ops.backend("triton"):
            out = op(gate, value)
        (slope,) = torch.autograd.grad(out.sum(), gate)
        torch.testing.assert_close(out.detach(), wanted, rtol=1e-3, atol=1e-8)
        torch.testing.assert_close(slope, (wanted > 0).to(dtype) * 0.5, rtol=1e-3, atol=1e-8)
    with ops.backend("triton"):
        out = ops.geglu(torch.cat((value, gate), dim=-1).detach())
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-8)


def test_what_does_not_fit_is_refused(randn):
    x = randn(2, 3, 8)
    with ops.backend("triton"):
        for other in (x[:1], x.bfloat16()):
            for op in (ops.swiglu, ops.geglu_tanh):
                with pytest.raises(RuntimeError, match="not alike"):
                    op(x, other)
        with pytest.raises(RuntimeError, match="halves of 7"):
            ops.geglu(x[..., :7])


def test_linear_gelu(launches, randn, dtype):
    """Under "triton" the kernel follows the product; under "torch", PyTorch."""
    x, weight, bias = randn(2, 5, 24, dtype=dtype), randn(40, 24), randn(40)
    exact = F.gelu(
        F.linear(x.double(), weight.to(dtype).double(), bias.to(dtype).double()), approximate="tanh"
    )
    for backend, wanted in (("triton", {"gelu_tanh": 1}), ("torch", {})):
        with ops.backend(backend), launches() as counts:
            out = ops.linear_gelu(x, weight, bias)
        assert counts == wanted and out.dtype == dtype
        assert (out - exact).abs().max() <= 3 * torch.finfo(dtype).eps * exact.abs().max()


def made_up(dtype=torch.bfloat16, is_cuda=True, requires_grad=False, count=64):
    """What the choice looks at."""
    return SimpleNamespace(
        dtype=dtype,
        is_cuda=is_cuda,
        requires_grad=requires_grad,
        device=torch.device("cuda", 0),
        numel=lambda: count,
    )


def test_where_the_product_ends_in_the_gelu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    weight = made_up()
    chosen = {}
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        gpu = SimpleNamespace(major=capability[0], minor=capability[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, gpu=gpu: gpu)
        chosen[capability] = ops._product_ends_in_gelu(made_up(), weight)
    assert [c for c, yes in chosen.items() if yes] == [(9, 0), (10, 0)]
    hopper = SimpleNamespace(major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    assert ops._product_ends_in_gelu(made_up(torch.float16), weight)
    assert not ops._product_ends_in_gelu(made_up(torch.float32), weight)
    assert not ops._product_ends_in_gelu(made_up(is_cuda=False), weight)
    assert not ops._product_ends_in_gelu(made_up(count=0), weight)
    for trained in ((made_up(requires_grad=True), weight), (made_up(), made_up(requires_grad=True))):
        assert not ops._product_ends_in_gelu(*trained)
        with torch.no_grad():
            assert ops._product_ends_in_gelu(*trained)
    for other in ("triton", "torch"):
        with ops.backend(other):
            assert not ops._product_ends_in_gelu(made_up(), weight)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not ops._product_ends_in_gelu(made_up(), weight)


def test_product_that_ends_in_the_gelu(monkeypatch, launches, randn):
    """Same arguments and layout on any device; but on a CPU, where it is never chosen, its GELU is exact."""
    x, weight, bias = randn(2, 5, 24, dtype=torch.bfloat16), randn(40, 24) / 8, randn(40) / 8
    with torch.no_grad():
        if not x.is_cuda:
            monkeypatch.setattr(ops, "_product_ends_in_gelu", lambda *tensors: True)
        elif not ops._product_ends_in_gelu(x, weight, bias):
            return
        with launches() as counts:
            out = ops.linear_gelu(x, weight, bias)
    hidden = F.linear(x.double(), weight.to(x.dtype).double(), bias.to(x.dtype).double())
    exact = F.gelu(hidden, approximate="tanh" if x.is_cuda else "none")
    assert counts == {} and out.shape == exact.shape and out.dtype == x.dtype
    assert (out - exact).abs().max() <= 3 * torch.finfo(x.dtype).eps * exact.abs().max()


@pytest.mark.slow
def test_compiled(randn):
    """One graph at several sizes, and its gradients."""

    def mlp(x, weight, bias):
        x = ops.linear_gelu(x, weight, bias)
        x = ops.geglu(torch.cat((x, ops.swiglu(x, bias.expand_as(x))), dim=-1))
        return ops.geglu_tanh(x, x + 1)

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    for tokens in (3, 5, 7):
        given = [t.requires_grad_() for t in (randn(2, tokens, 8), randn(24, 8) / 3, randn(24))]
        with ops.backend("triton"):
            out = compiled(*given)
        with ops.backend("torch"):
            wanted = mlp(*given)
        torch.testing.assert_close(out, wanted)
        ours, theirs = (torch.autograd.grad(t.square().mean(), given) for t in (out, wanted))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_registration(randn):
    from joyedit.kernels.gated import geglu, geglu_tanh, gelu_tanh, swiglu

    for strided in (False, True):
        x, y = (randn(2, 3, 8, strided=s).requires_grad_() for s in (strided, False))
        torch.library.opcheck(geglu, (x,))
        torch.library.opcheck(swiglu, (x, y))
        torch.library.opcheck(geglu_tanh, (x, y))
        torch.library.opcheck(gelu_tanh, (x,))
    # The results are contiguous whatever the arguments are, and the fake must say so.
    turned = randn(3, 2, 8).transpose(0, 1).requires_grad_()
    torch.library.opcheck(gelu_tanh, (turned,))
    torch.library.opcheck(swiglu, (turned, turned))
    torch.library.opcheck(geglu, (turned,))
