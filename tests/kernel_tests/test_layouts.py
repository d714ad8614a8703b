"""That an autoencoder on a GPU copies no feature map from one memory format into the other.

Tensors without values on the meta device stand for a GPU's: kernels and PyTorch's functions say there which
format their results have, but for convolutions, whose rule is written out below.
"""

import collections

import pytest
import torch
from torch._prims_common import suggest_memory_format
from torch.utils._python_dispatch import TorchDispatchMode

from joyedit import ops
from joyedit.checkpoints.network import build_on_meta
from joyedit.models import layers, sd_vae, wan_vae

aten = torch.ops.aten
COPIES = (aten.clone.default, aten._to_copy.default, aten.copy_.default, aten._reshape_alias_copy.default)


class Copies(TorchDispatchMode):
    """Bytes that are copied; and that convolutions transpose, where maps and weight differ in format."""

    def __init__(self):
        super().__init__()
        self.bytes = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in COPIES:
            self.bytes["copy"] += out.nbytes
        elif func is aten.convolution.default:
            x, weight = args[:2]
            layout = format_of_convolution(x, weight)
            self.bytes["transposed"] += sum(
                t.nbytes for t in (x, weight) if suggest_memory_format(t) != layout
            )
            out = out.to(memory_format=layout)
        return out


def format_of_convolution(x, weight):
    """cuDNN's: channels last if the maps or the weight are. Source: PyTorch `ConvUtils.h`."""
    last = layers.CHANNELS_LAST[weight.ndim]
    is_last = last in (suggest_memory_format(x), suggest_memory_format(weight))
    return last if is_last else torch.contiguous_format


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Every operation takes its kernel where it has one for these shapes."""
    monkeypatch.setattr(ops, "_triton", lambda *tensors, problem=None, has_backward=True: problem is None)
    with torch.no_grad(), torch.device("meta"):
        yield


def wan():
    config = wan_vae.AutoencoderKLWanConfig(base_dim=8)
    return build_on_meta(wan_vae.AutoencoderKLWan, config).bfloat16()


def sd():
    config = sd_vae.AutoencoderKLConfig(block_out_channels=(32, 32, 64, 64))
    return build_on_meta(sd_vae.AutoencoderKL, config).half()


@pytest.mark.parametrize(
    ("make", "pixels", "latents"),
    [
        pytest.param(wan, (2, 3, 1, 64, 96), (2, 16, 1, 8, 12), id="pictures"),
        pytest.param(wan, (1, 3, 13, 64, 96), (1, 16, 4, 8, 12), id="video"),
        pytest.param(wan, (2, 3, 13, 64, 96), (2, 16, 4, 8, 12), id="videos"),
        pytest.param(sd, (2, 3, 64, 96), (2, 4, 8, 12), id="sd"),
    ],
)
def test_channels_last_costs_no_copies(make, pixels, latents):
    """Besides the copies of contiguous maps there are those of what comes in and goes out."""
    network = make()
    runs = {
        "encode": lambda x: network.encode(x).latent_dist.parameters,
        "decode": lambda z: network.decode(z).sample,
    }
    for run, shape in zip(runs.values(), (pixels, latents), strict=True):
        copied = {}
        given = torch.empty(shape, dtype=network.dtype)
        for last in (False, True):
            layers.lay_out(network, channels_last=last)
            with Copies() as copies:
                result = run(given)
            copied[last] = copies.bytes
            assert result.is_contiguous()
        assert copied[True]["transposed"] == 0
        assert copied[True]["copy"] <= copied[False]["copy"] + given.nbytes + result.nbytes
