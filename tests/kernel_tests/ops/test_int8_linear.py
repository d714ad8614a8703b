"""int8_linear: rows as whole numbers against the rounding in float64, and the product exact."""

import pytest
import torch

from joyedit import ops
from joyedit.eight_bits import quantise, rotation, whole_product
from joyedit.kernels import int8_linear as kernel
from joyedit.quantised import QuantisedWeight, int8_products

HALF = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=str
)
GROUPS = pytest.mark.parametrize("group", [1, 4, 16, pytest.param(64, marks=pytest.mark.slow), 256])


def weight_of(randn, outputs, inputs, group):
    return quantise(randn(outputs, inputs), group)


def exact_rows(x, group):
    """x R in float64, and the scale of each row."""
    wide = x.double().reshape(-1, x.shape[-1])
    if group > 1:
        wide = (wide.unflatten(-1, (-1, group)) @ rotation(group, wide)).flatten(-2)
    return wide, wide.abs().amax(-1, keepdim=True) / 127


@HALF
@GROUPS
@pytest.mark.parametrize("rows", [1, 37])
def test_rows_are_rotated_and_rounded_to_nearest(device, randn, dtype, rows, group):
    """No number is further from the exact one than half a unit, but for the roundings of fp32."""
    inputs = 3 * max(group, 4)
    x = randn(rows, inputs, dtype=dtype)
    x[:, 1] *= 20
    whole = torch.full((rows, inputs), 99, dtype=torch.int8, device=device)
    scale = torch.full((rows,), torch.nan, device=device)
    choice = kernel.rows_tile(group)
    blocks = -(-rows // choice["ROWS"])
    kernel.int8_linear_rows_forward[blocks,](
        x, whole, scale, rows, inputs, x.stride(0), group**0.5, GROUP=group, **choice
    )
    wide, exact_scale = exact_rows(x, group)
    torch.testing.assert_close(scale.double()[:, None], exact_scale, rtol=1e-5, atol=0)
    assert (whole.double() - wide / exact_scale).abs().max() <= 0.5 + 1e-3
    assert whole.abs().max() <= 127


@HALF
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("one_scale", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    ("shape", "outputs", "group"),
    [((2, 3, 64), 5, 64), ((130, 48), 131, 16), ((1, 12), 130, 4), ((3, 10), 7, 1), ((2, 0, 16), 3, 16)],
    ids=str,
)
def test_the_whole_operation(randn, launches, dtype, shape, outputs, group, one_scale, with_bias):
    """The definition's result, but where rounding takes another neighbour: a unit of a row's scale, times
    the largest weight, for few of the inputs."""
    x = randn(*shape, dtype=dtype)
    stored, scale = weight_of(randn, outputs, shape[-1], group)
    scale = scale[:1] if one_scale else scale
    bias = randn(outputs, dtype=dtype) if with_bias else None
    with ops.backend("triton"), launches() as counts:
        ours = ops.int8_linear(x, stored, scale, bias, group)
    with ops.backend("torch"):
        wanted = ops.int8_linear(x, stored, scale, bias, group)
    assert counts == {"int8_linear": 1} and ours.is_contiguous() and ours.dtype == dtype
    assert ours.shape == (*shape[:-1], outputs)
    if not x.numel():
        return
    _, unit = exact_rows(x, group)
    step = unit.max() * 127 * scale.max()
    rounding = wanted.double().abs().max() * torch.finfo(dtype).eps
    assert (ours.double() - wanted.double()).abs().max() <= 2 * step + 2 * rounding
    meant = QuantisedWeight(stored, scale, group, dtype).to(torch.float32).double()
    exact = x.double() @ meant.T + (0 if bias is None else bias.double())
    # Half a unit of each input, as often as there are inputs, at random: four times the deviation.
    spread = 4 * unit.max() * (stored.double() * scale.double()).norm(dim=1).max() / 12**0.5
    assert (ours.double() - exact).abs().max() <= spread + 2 * rounding


def test_products_are_exact(device):
    """Sums of 4096 products that no fp32 holds: the same whole numbers as in int64."""
    rows = torch.randint(-127, 128, (3, 4096), dtype=torch.int8, device=device)
    rows[0] = 127
    weight = torch.randint(-127, 128, (5, 4096), dtype=torch.int8, device=device)
    weight[0] = 127
    out = torch.full((3, 5), torch.nan, dtype=torch.float64, device=device)
    ones = torch.ones(5, device=device)
    choice = kernel.product_tile()
    kernel.int8_linear_forward[1,](rows, ones, weight, ones, None, out, 3, 5, 4096, ONE_SCALE=False, **choice)
    wanted = (rows.cpu().long() @ weight.cpu().long().T).to(device)
    assert torch.equal(whole_product(rows, weight).long(), wanted)
    assert torch.equal(out, wanted.float().double())


def test_views_and_rows_that_are_not_dense(randn):
    half = torch.bfloat16
    x = randn(2, 5, 16, dtype=half, strided=True)
    stored, scale = weight_of(randn, 6, 16, 16)
    for given in (x, x[0], x.transpose(0, 1), randn(16, 4, dtype=half).T):
        with ops.backend("triton"):
            ours = ops.int8_linear(given, stored, scale, None, 16)
            again = ops.int8_linear(given.contiguous(), stored, scale, None, 16)
        assert torch.equal(ours, again)


def test_rows_of_zeros(randn):
    stored, scale = weight_of(randn, 4, 16, 16)
    bias = randn(4, dtype=torch.bfloat16)
    with ops.backend("triton"):
        out = ops.int8_linear(torch.zeros_like(randn(3, 16, dtype=bias.dtype)), stored, scale, bias, 16)
    assert torch.equal(out, bias.expand(3, -1))


def test_it_runs_where_it_is_asked_for_and_can(randn, launches):
    half = torch.bfloat16
    stored, scale = weight_of(randn, 8, 16, 16)
    weight, x = QuantisedWeight(stored, scale, 16, half), randn(3, 16, dtype=half)
    with ops.backend("triton"), launches() as counts, torch.no_grad():
        ops.linear(x, weight)
        with int8_products("fast"):
            ops.linear(x, weight[:4])
    assert counts == {"int8_linear": 1}
    with int8_products("fast"), launches() as counts:
        grown = x.clone().requires_grad_()
        ops.linear(grown, weight).sum().backward()
    assert counts == {} and grown.grad is not None
    large = quantise(randn(2, 1024), 1024)
    for given in (randn(1, 1024, dtype=half), randn(1, 1024)):
        with ops.backend("triton"), pytest.raises(RuntimeError, match="half precision, in groups of at most"):
            ops.int8_linear(given, *large, None, 1024)
