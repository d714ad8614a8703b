"""Where the training of the SD VAE starts: its encoder is a linear transform codec.

As in `init_vae`: every convolution that halves the picture takes the leading principal components of its own
input, residual branches start small, and the latents are whitened. What is different is the norm, which takes
mean and deviation of all channels of a picture together: channels come in pairs of opposite sign, a constant
"carrier" among them, so that the mean is zero, the deviation nearly constant, and silu(x) - silu(-x) = x.

B batch   C channels
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from joyedit.models.sd_vae import (
    AutoencoderKL,
    DownBlock,
    Downsample,
    PositionAttention,
    ResidualBlock,
    UpBlock,
)

COLOURS = 3


@torch.no_grad()
def initialize_sd_vae(vae: AutoencoderKL, pictures: Tensor, carrier: float = 12.0) -> None:
    """pictures (B, 3, H, W) in [-1, 1]: a few dozen of those it will see.

    `carrier`: the constant channels as a multiple of the others' root mean square. Works for one group of the
    norms, eight channels or more at full size, and a last stage that at least doubles the width.
    """
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight *= 0.1
            no_bias(module.conv2)
        if isinstance(module, PositionAttention):
            for out in module.to_out.parameters():
                out *= 0.1
    _initialize_encoder(vae, pictures, carrier)
    _initialize_decoder(vae)


def _initialize_encoder(vae: AutoencoderKL, pictures: Tensor, carrier: float) -> None:
    encoder = vae.encoder
    centre(encoder.conv_in, COLOURS, rest=0.1)
    x = encoder.conv_in(pictures)
    n, last = x.shape[1], len(encoder.down_blocks) - 1
    for i, block in enumerate(encoder.down_blocks):
        assert isinstance(block, DownBlock)
        shortcut = first_shortcut(block)
        if isinstance(shortcut, nn.Conv2d):
            n = shortcut.in_channels
            weight = shortcut.weight[:, :, 0, 0]
            weight *= 0.1
            weight[:n] = torch.eye(n)
            bias = no_bias(shortcut)
            if i == last:  # x and -x, the last of each a carrier
                weight[n:] = 0
                weight[n : 2 * n] = -torch.eye(n)
                for row, sign in ((n - 1, 1), (2 * n - 1, -1)):
                    weight[row] = 0
                    bias[row] = sign * carrier * x.square().mean().sqrt()
        for resnet in block.resnets:
            x = resnet(x)
        for downsampler in block.downsamplers:
            assert isinstance(downsampler, Downsample)
            _principal_components(downsampler.conv, x)
            x = downsampler(x)

    kept = min(n - 1, encoder.conv_out.out_channels)
    centre(encoder.conv_out, kept, rest=0.02)
    encoder.conv_out.weight[range(kept), range(n, n + kept), 1, 1] = -1
    _whiten(vae, torch.cat([encoder(part) for part in pictures.split(16)]))


def _principal_components(conv: nn.Conv2d, x: Tensor) -> None:
    """A stride-2 convolution that gives the leading components of 2 x 2 patches. x (B, C, H, W)."""
    patches = rearrange(x, "b c (h p) (w q) -> (b h w) (c p q)", p=2, q=2)
    _, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    leading = 0.6 * vectors.flip(1)[:, : conv.out_channels].T
    nn.init.zeros_(conv.weight)
    conv.weight[:, :, :2, :2] = leading.unflatten(1, (-1, 2, 2))
    no_bias(conv)


def _whiten(vae: AutoencoderKL, features: Tensor) -> None:
    """Latents that are uncorrelated with unit variance. features (B, 2 z, h, w)."""
    z = vae.config.latent_channels
    rows = rearrange(features, "b c h w -> (b h w) c")
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    values = values.flip(0)[:z].clamp_min(values.max() * 1e-7)
    whitening = (vectors.flip(1)[:, :z] / values.sqrt()).T  # (z, 2 z)
    weight, bias = vae.quant_conv.weight[:, :, 0, 0], no_bias(vae.quant_conv)
    weight[:z] = whitening
    bias[:z] = -whitening @ mean
    weight[z:] *= 0.1
    bias[z:] = -5  # the posterior starts narrow: with an ordinary one the latents collapse


def _initialize_decoder(vae: AutoencoderKL) -> None:
    decoder, z = vae.decoder, vae.config.latent_channels
    block = decoder.up_blocks[-1]
    assert isinstance(block, UpBlock)
    shortcut = first_shortcut(block)
    assert isinstance(shortcut, nn.Conv2d)
    weight = shortcut.weight[:, :, 0, 0]
    weight[COLOURS : 2 * COLOURS] = -weight[:COLOURS]
    weight[2 * COLOURS :] = 0
    no_bias(shortcut)[-2:] = torch.tensor([2.0, -2.0])  # the carriers
    centre(decoder.conv_out, COLOURS, rest=0.1)
    decoder.conv_out.weight[range(COLOURS), range(COLOURS, 2 * COLOURS), 1, 1] = -1
    vae.post_quant_conv.weight[:, :, 0, 0] = torch.eye(z)
    no_bias(vae.post_quant_conv)


def centre(conv: nn.Conv2d, count: int, rest: float) -> None:
    """The first `count` outputs copy as many inputs, pixel by pixel; the others start `rest` times as
    large."""
    conv.weight *= rest
    conv.weight[:count] = 0
    conv.weight[range(count), range(count), 1, 1] = 1
    no_bias(conv)


def no_bias(conv: nn.Conv2d) -> Tensor:
    """Its bias, from now on zero."""
    assert conv.bias is not None
    return conv.bias.zero_()


def first_shortcut(block: DownBlock | UpBlock) -> nn.Module:
    """What stands beside the first residual block: a convolution where the width changes."""
    resnet = block.resnets[0]
    assert isinstance(resnet, ResidualBlock)
    return resnet.conv_shortcut
