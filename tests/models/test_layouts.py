"""In which memory format the autoencoders keep the weights of their convolutions, by device and dtype."""

import pytest
import torch

from joyedit.checkpoints.network import build_on_meta
from joyedit.models import layers, sd_vae, wan_vae

CONTIGUOUS, LAST = "contiguous", "last"


@pytest.fixture(params=[wan_vae, sd_vae], ids=["wan", "sd"])
def network(request, monkeypatch):
    """Without values, on the meta device, which stands for CUDA."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        request.param, "keeps_channels_last", lambda dtype, device: layers.keeps_channels_last(dtype, cuda)
    )
    if request.param is wan_vae:
        return build_on_meta(wan_vae.AutoencoderKLWan, wan_vae.AutoencoderKLWanConfig())
    return build_on_meta(sd_vae.AutoencoderKL, sd_vae.AutoencoderKLConfig())


def formats(network):
    """Those of weights in which several channels are next to several positions."""
    found = set()
    for weight in network.parameters():
        if weight.ndim in layers.CHANNELS_LAST and weight.shape[1] > 1 and weight[0, 0].numel() > 1:
            last = weight.is_contiguous(memory_format=layers.CHANNELS_LAST[weight.ndim])
            assert last or weight.is_contiguous()
            found.add(LAST if last else CONTIGUOUS)
    return found


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.bfloat16, LAST), (torch.float16, LAST), (torch.float32, CONTIGUOUS), (torch.float64, CONTIGUOUS)],
)
def test_moved_weights_are_laid_out_and_maps_follow_them(network, dtype, wanted):
    assert formats(network) == {CONTIGUOUS}
    assert formats(network.to(dtype)) == {wanted}
    weight = network.decoder.conv_in.weight
    last = layers.CHANNELS_LAST[weight.ndim]
    assert layers.layout_of_maps(weight) == (last if wanted == LAST else torch.contiguous_format)


def test_weights_on_instinct_stay(network, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert formats(network.half()) == {CONTIGUOUS}


def test_they_can_be_laid_out_otherwise(network):
    for layout in (LAST, CONTIGUOUS, LAST):
        layers.lay_out(network, channels_last=layout == LAST)
        assert formats(network) == {layout}


def test_weights_on_a_cpu_stay_where_they_are():
    network = sd_vae.AutoencoderKL(sd_vae.AutoencoderKLConfig(block_out_channels=(32,) * 4)).bfloat16()
    places = [weight.data_ptr() for weight in network.parameters()]
    assert [weight.data_ptr() for weight in network.to("cpu").parameters()] == places
    assert formats(network) == {CONTIGUOUS}
    assert layers.layout_of_maps(network.decoder.conv_in.weight) == torch.channels_last


def test_no_layout_of_the_weights_changes_the_picture():
    config = wan_vae.AutoencoderKLWanConfig(base_dim=4, num_res_blocks=1)
    network = wan_vae.AutoencoderKLWan(config).eval().requires_grad_(False).double()
    x, z = torch.randn(2, 3, 5, 16, 24).double(), torch.randn(2, 16, 3, 2, 3).double()

    def coded():
        return torch.cat((network.encode(x).latent_dist.mean.flatten(), network.decode(z).sample.flatten()))

    wanted, state = coded(), {name: value.clone() for name, value in network.state_dict().items()}
    layers.lay_out(network, channels_last=True)
    torch.testing.assert_close(coded(), wanted, rtol=0, atol=1e-12 * wanted.abs().max().item())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
