"""What a product with a narrower weight keeps for its gradient, and that this is the formula's."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from joyedit import ops
from joyedit.adapted import AdaptedWeight
from joyedit.checkpoints.lora_files import Delta
from joyedit.eight_bits import quantise
from joyedit.quantised import QuantisedWeight


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored_as(form):
    """A weight (24, 32) that is stored so, and its bytes."""
    weight = drawn(24, 32, seed=0)
    if form == "bf16":
        return weight.bfloat16(), 24 * 32 * 2
    stored, scale = quantise(weight, 16)
    if form == "int8":
        return QuantisedWeight(stored, scale, 16, torch.float32), 24 * 32 + 24 * 4
    return QuantisedWeight(weight.to(torch.float8_e4m3fn), scale[:1], 1, torch.float32), 24 * 32 + 4


def kept_by(run):
    """What the run gives, and the bytes that are kept for its gradient."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr(), tensor.shape] = tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return out, sum(sizes.values())


@pytest.mark.parametrize("form", ["bf16", "int8", "fp8"])
def test_what_is_kept_is_what_is_stored(form):
    weight, nbytes = stored_as(form)
    x, bias, back = drawn(2, 5, 32, seed=1).requires_grad_(), drawn(24, seed=2), drawn(2, 5, 24, seed=3)
    out, kept = kept_by(lambda: ops.linear(x, weight, bias))
    assert kept == nbytes
    wide = weight.to(torch.float32).double()
    assert torch.allclose(out.double(), x.double() @ wide.T + bias, atol=1e-5)
    out.backward(back)
    assert torch.allclose(x.grad.double(), back.double() @ wide, atol=1e-5)


def test_beside_adapters():
    """Which have gradients of their own: what enters is kept for them, and the factors."""
    weight, nbytes = stored_as("int8")
    down, up = drawn(3, 32, seed=4).requires_grad_(), drawn(24, 3, seed=5).requires_grad_()
    x, back = drawn(2, 5, 32, seed=1).requires_grad_(), drawn(2, 5, 24, seed=3)
    adapted = AdaptedWeight(weight, [(Delta(down, up, 2.0), 1.0)])
    out, kept = kept_by(lambda: ops.linear(x, adapted, None))
    assert kept <= nbytes + x.nbytes + 2 * (down.nbytes + up.nbytes) + 2 * 5 * 3 * 4
    out.backward(back)
    a, b, y = (t.detach().double().requires_grad_() for t in (down, up, x))
    (y @ (weight.to(torch.float32).double() + 2 * b @ a).T).backward(back.double())
    for found, wanted in ((x, y), (down, a), (up, b)):
        assert torch.allclose(found.grad.double(), wanted.grad, atol=1e-4)


def test_a_weight_that_trains_has_a_gradient():
    weight, x = drawn(4, 3, seed=0).bfloat16().requires_grad_(), drawn(5, 3, seed=1).requires_grad_()
    ops.linear(x, weight).sum().backward()
    assert weight.grad is not None and torch.allclose(weight.grad.float(), x.sum(0).expand(4, 3), atol=2e-2)
