"""Weights in eight bits with scales: what they mean, by the formula in float64, and layers that hold one."""

import copy
import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

import joyedit
import joyedit.quantised
from joyedit import graphs, ops
from joyedit.eight_bits import largest_group, quantise, rotation, whole_product
from joyedit.models.layers import Linear
from joyedit.quantised import QuantisedLinear, QuantisedWeight, int8_products, quantise_by_torchao

H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
GROUPS = pytest.mark.parametrize("group", [4, 16, 64, 256, 1024])


def rotation_by_definition(group):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < group:
        matrix = torch.kron(matrix, H4)
    return matrix


def meant(stored, scale, group):
    """(Q s) R in float64."""
    weight = stored.double() * scale.double()
    if group == 1:
        return weight
    return (weight.unflatten(1, (-1, group)) @ rotation_by_definition(group)).flatten(1)


def weight_of(outputs, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight[:, 1] *= 30  # what a rotation is for
    return weight


def layer_of(stored, scale, group, bias=None, dtype=torch.float32):
    with torch.device("meta"):
        layer = Linear(stored.shape[1], len(stored), bias=bias is not None)
    QuantisedLinear.replace(layer, stored.dtype, len(scale), group, dtype)
    state = {"weight": stored, "weight_scale": scale} | ({} if bias is None else {"bias": bias})
    layer.load_state_dict(state, assign=True)
    return layer.requires_grad_(False)


@GROUPS
def test_the_rotation_is_the_kronecker_power_and_its_own_inverse(group):
    matrix = rotation(group, torch.zeros(1, dtype=torch.float64))
    assert torch.equal(matrix, rotation_by_definition(group))
    assert torch.equal(matrix @ matrix, torch.eye(group, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T)


# By comfy-kitchen 0.2.40 (`quantize_int8_convrot_weight`, eager) of the weight below, in groups of 16.
KITCHEN = """
  97  31 -71  55  41  79 -127 103 -51 -117 62 -92  86 124 -82   44
 -40  50  36 -30   9  -5  -19  19   5   -9 81  15   1 -13 -27   12
 -31  42  68 -11  62 -64  -39  82 -92  -19 102 -72 48 -78 -52   68
 -32  41 -85  87  61 -66    7 -19  54  127   0 -26 47 -80  -6  -33
 -32 -50 -18 -87 -37 -55  114 -91   9  127 -78  91 -46 -64 104 -101
   8 -10 -28  22 -64  54   35 -51  -1  -19 -37  12  -6 -24  94    8
"""
KITCHEN_SCALES = ("0x1.f0e1c4p-7", "0x1.03060cp-7", "0x1.7bf7f0p-7")


def test_numbers_and_scales_are_those_of_comfy_kitchen():
    weight = ((torch.arange(96) * 37) % 101 - 50).float().view(3, 32) / 64
    weight[:, 5] *= 9
    stored, scale = quantise(weight, 16)
    assert stored.dtype is torch.int8 and scale.dtype is torch.float32
    assert stored.flatten().tolist() == [int(number) for number in KITCHEN.split()]
    assert scale.flatten().tolist() == [float.fromhex(n) for n in KITCHEN_SCALES]


# SHA-256 of comfy-kitchen's numbers and scales, one after the other, of the weight below: group -> digest.
# And what it makes of those in groups of 256 (`dequantize_int8_convrot_weight`), of some rows and inputs.
KITCHEN_DIGESTS = {
    4: "69c39f5cb818da66e4afbe7f35a3b768412a6c01ba81f88ee7e7a281d98d1d98",
    16: "32fa01dfb723eae651df8360782199218073a29b549f760a1555d065e10c708c",
    64: "bf0273434d8b939aaea1edc37207b391bed7a4db59016b003a9b91dcaee643a6",
    256: "3cf0d3bcc586613ac71fc7440a99f85144cbbe30d24dade7ca5fd2924aad069b",
}
KITCHEN_LARGEST = 7.56197
KITCHEN_WEIGHTS = """
 -0.329497576 0.290612966 -0.550527453  0.378615379 -0.278333485
 -0.826456547 0.397155464 -0.872082949  0.315235436  0.103695929
  0.29216224  0.477982134 -0.522757888  0.619026065 -0.807084441
 -0.669036388 -0.0886908025 0.142676502 0.48105073   0.247755587
 -0.233896375 -0.400818408 -0.913948178 0.367846131  0.759391129
"""


def test_a_large_weight_is_that_of_comfy_kitchen_too():
    """Of whole numbers of 1/4096, whose sums are exact in any order, with an input that stands out."""
    numbers = np.random.RandomState(0).randint(-4096, 4097, (24, 512))
    weight = torch.from_numpy(numbers).float() / 4096
    weight[:, 7] *= 8
    for group, digest in KITCHEN_DIGESTS.items():
        stored, scale = quantise(weight, group)
        assert hashlib.sha256(stored.numpy().tobytes() + scale.numpy().tobytes()).hexdigest() == digest, group
    theirs = torch.tensor([float(number) for number in KITCHEN_WEIGHTS.split()])
    meant = QuantisedWeight(*quantise(weight, 256), 256, torch.float32)
    wide, half = (meant.to(dtype)[::5, ::127].flatten() for dtype in (torch.float32, torch.bfloat16))
    assert meant.to(torch.float32).abs().max() == pytest.approx(KITCHEN_LARGEST, rel=1e-5)
    assert (wide - theirs).abs().max() <= 1e-6 * KITCHEN_LARGEST
    assert (half.view(torch.int16).int() - theirs.bfloat16().view(torch.int16).int()).abs().max() <= 1


@pytest.mark.parametrize("block", [1, 2**18])
@pytest.mark.parametrize("group", [1, 4, 16, 64, 256])
def test_what_a_weight_means(monkeypatch, group, block):
    """In fp32 within 1e-6 of the largest, in bf16 and fp16 that rounded once; parts as the whole."""
    monkeypatch.setattr(joyedit.quantised, "CPU_BLOCK", block)
    stored, scale = quantise(weight_of(7, 3 * 256), group)
    weight = QuantisedWeight(stored, scale, group, torch.bfloat16)
    wanted = meant(stored, scale, group)
    wide = weight.to(torch.float32)
    assert (wide - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(weight.to(dtype), wide.to(dtype))
    assert torch.equal(torch.cat((weight[:3].to(torch.float32), weight[3:].to(torch.float32))), wide)


@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scales", [1, 7])
def test_what_scaled_fp8_means(fp8, scales):
    stored, scale = weight_of(7, 12).to(fp8), torch.rand(scales, 1)
    weight = QuantisedWeight(stored, scale, 1, torch.float32)
    assert torch.equal(weight[2:5].to(torch.float32), (stored.float() * scale)[2:5])


def test_a_rotation_spares_what_outliers_cost():
    weight = weight_of(64, 1024)
    errors = {}
    for group in (1, 256):
        stored, scale = quantise(weight, group)
        error = meant(stored, scale, group) - weight
        errors[group] = (error.norm() / weight.norm()).item()
    assert errors[256] < 0.012 and errors[1] > 3 * errors[256]


def test_rows_of_zeros_stay_zeros():
    stored, scale = quantise(torch.zeros(2, 16), 16)
    assert not QuantisedWeight(stored, scale, 16, torch.float32).to(torch.float32).any()


def test_the_group_of_a_layer():
    assert [largest_group(inputs) for inputs in (4096, 192, 48, 12, 6)] == [256, 64, 16, 4, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_multiplies_with_what_its_weight_means(dtype):
    stored, scale = quantise(weight_of(24, 64), 64)
    bias = torch.randn(24).to(dtype)
    layer = layer_of(stored, scale, 64, bias, dtype)
    x = torch.randn(2, 5, 64).to(dtype)
    wanted = x.double() @ meant(stored, scale, 64).to(dtype).double().T + bias
    tolerance = 2e-2 if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(layer(x).double(), wanted, atol=tolerance * wanted.abs().max(), rtol=0)


def test_a_gradient_goes_through_to_the_input():
    stored, scale = quantise(weight_of(8, 16), 16)
    x = torch.randn(3, 16, requires_grad=True)
    layer_of(stored, scale, 16)(x).sum().backward()
    torch.testing.assert_close(x.grad, meant(stored, scale, 16).sum(0).float().expand(3, -1))


def test_a_layer_can_be_copied_and_pickled():
    stored, scale = quantise(weight_of(8, 32), 16)
    layer, x = layer_of(stored, scale, 16), torch.randn(3, 32)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))


@pytest.mark.slow
def test_a_layer_can_be_compiled():
    stored, scale = quantise(weight_of(8, 32), 16)
    layer, x = layer_of(stored, scale, 16), torch.randn(3, 32)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_its_parameters_are_what_is_stored():
    stored, scale = quantise(weight_of(8, 32), 16)
    layer = layer_of(stored, scale, 16)
    assert isinstance(layer, nn.Linear) and layer.weight.shape == (8, 32)
    assert {name: p.dtype for name, p in layer.named_parameters()} == {
        "weight": torch.int8,
        "weight_scale": torch.float32,
    }


def test_products_in_eight_bits_are_a_choice():
    """Near the exact ones, and not the same; for int8 alone, and never where a gradient is wanted."""
    stored, scale = quantise(weight_of(48, 256), 256)
    layer, x = layer_of(stored, scale, 256, torch.randn(48)), torch.randn(5, 256)
    x[:, 3] *= 20
    exact = layer(x)
    with int8_products("fast"):
        fast, grown = layer(x), x.clone().requires_grad_()
        assert torch.equal(layer(grown), exact)
        stored8 = weight_of(4, 256).to(torch.float8_e4m3fn)
        fp8 = layer_of(stored8, torch.ones(1, 1), 1)
        assert torch.equal(fp8(x), x @ stored8.float().T)
    assert torch.equal(layer(x), exact)
    assert 1e-4 < (fast - exact).norm() / exact.norm() < 0.02
    # By the definition in float64: rows rotated and rounded, and the weight as it is stored.
    turned = x.double() @ rotation_by_definition(256)
    unit = turned.abs().amax(1, keepdim=True) / 127
    wanted = (turned / unit).round() @ stored.double().T * unit * scale.double().T + layer.bias
    torch.testing.assert_close(fast.double(), wanted, atol=1e-3 * wanted.abs().max().item(), rtol=0)
    with pytest.raises(ValueError, match="int8_products 'quick': wanted one of exact, fast"):
        int8_products("quick")


@pytest.mark.parametrize("shape", [(3, 24, 5), (40, 4096, 16)])
def test_products_of_whole_numbers_are_exact(shape):
    rows, inputs, outputs = shape
    a, b = (torch.full((n, inputs), 127, dtype=torch.int8) for n in (rows, outputs))
    a[0] = -127
    a[-1] = torch.arange(inputs) % 255 - 127
    assert torch.equal(whole_product(a, b).long(), a.long() @ b.long().T)


def test_torchao_quantises_the_blocks_of_a_network():
    quantization = pytest.importorskip("torchao.quantization")
    pipe = joyedit.load("tiny-joyimage", device="cpu", dtype="float32")
    photo = joyedit.load_image("examples/coffee.jpg")

    def edited():
        generator = torch.manual_seed(0)
        out = pipe(photo, "make the circle red", num_inference_steps=2, generator=generator, output_type="pt")
        return out.images

    plain = edited()
    quantise_by_torchao(pipe.transformer, quantization.Int8WeightOnlyConfig())
    kinds = {type(block.img_mlp.net[2].weight).__name__ for block in pipe.transformer.double_blocks}
    assert kinds == {"Int8Tensor"}
    assert 0 < (edited() - plain).abs().mean() < 0.01


def test_torchao_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r"pip install joyedit\[quant\]"):
        quantise_by_torchao(nn.Linear(1, 1), None)


def test_a_product_that_is_written_into_a_part_of_a_larger_tensor():
    stored, scale = quantise(weight_of(12, 32), 16)
    weight, x, bias = (
        QuantisedWeight(stored, scale, 16, torch.float32),
        torch.randn(2, 5, 32),
        torch.randn(12),
    )
    for products in ("exact", "fast"):
        with int8_products(products):
            wanted = ops.linear(x, weight, bias)
            joint = torch.full((2, 7, 3, 4), torch.nan)
            out = ops.linear_into(joint[:, :5], x, weight, bias)
        assert out.data_ptr() == joint.data_ptr() and torch.equal(joint[:, :5].flatten(2), wanted)


def test_a_recorded_graph_serves_one_choice_of_products():
    exact = graphs.settings()
    with int8_products("fast"):
        assert graphs.settings() != exact
    assert graphs.settings() == exact
