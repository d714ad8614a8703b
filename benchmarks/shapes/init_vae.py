"""Where the training of the WAN VAE starts: as a linear transform codec.

Ordinary random weights spend their first thousands of pictures finding out what an average is. Here every
convolution that halves the picture takes the leading principal components of its own input, residual branches
start small, and a constant "carrier" channel beside pairs of channels of opposite sign makes the
normalisations nearly linear (silu(x) - silu(-x) = x), so that the untrained encoder is a whitened principal
component transform of the pictures, and the decoder has a linear path for its output.

All of a kernel but its last temporal slice is zero, and a clip starts as its pictures one by one: halving the
frames keeps the later of two, doubling them repeats.

B batch   C channels
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from joyedit.models.layers import Conv2d
from joyedit.models.wan_vae import (
    AutoencoderKLWan,
    CausalConv3d,
    DoubleFrames,
    Downsample2d,
    Downsample3d,
    FrameAttention,
    HalveFrames,
    ResidualBlock,
)

COLOURS = 3


@torch.no_grad()
def initialize_vae(vae: AutoencoderKLWan, pictures: Tensor, carrier: float = 12.0) -> None:
    """pictures (B, 3, 1, H, W) in [-1, 1]: a few dozen of those it will see.

    `carrier`: the constant channels as a multiple of the others' root mean square. Works for dim_mult whose
    last stage doubles the width.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            module.weight[:, :, :-1] = 0
        if isinstance(module, ResidualBlock):
            module.conv2.weight *= 0.1
            module.conv2.bias.zero_()
        if isinstance(module, FrameAttention):
            module.proj.weight *= 0.1
        if isinstance(module, (HalveFrames, DoubleFrames)):
            width = module.weight.shape[1]
            module.weight.zero_()
            module.bias.zero_()
            for i in range(module.weight.shape[0]):
                module.weight[i, i % width, -1] = 1
    _initialize_encoder(vae, pictures, carrier)
    _initialize_decoder(vae)


def _initialize_encoder(vae: AutoencoderKLWan, pictures: Tensor, carrier: float) -> None:
    encoder = vae.encoder
    centre(encoder.conv_in, range(COLOURS), range(COLOURS), rest=0.1)
    x = encoder.conv_in(pictures, None)
    widening = [
        b
        for b in encoder.down_blocks
        if isinstance(b, ResidualBlock) and not isinstance(b.conv_shortcut, torch.nn.Identity)
    ]
    for block in encoder.down_blocks:
        if block in widening:
            shortcut = block.conv_shortcut
            weight = shortcut.weight[:, :, 0, 0, 0]
            n = weight.shape[1]
            weight *= 0.1
            weight[:n] = torch.eye(n)
            shortcut.bias.zero_()
            if block is widening[-1]:  # x, -x and the carriers in the last channel of each
                weight[n:] = 0
                weight[n : 2 * n] = -torch.eye(n)
                for i in (n - 1, 2 * n - 1):
                    weight[i] = 0
                    shortcut.bias[i] = carrier * x.square().mean().sqrt()
        if isinstance(block, (Downsample2d, Downsample3d)):
            _principal_components(block.resample[1], x[:, :, 0])
        x = block(x, None)

    n = widening[-1].conv_shortcut.weight.shape[1]
    kept = min(n - 1, encoder.conv_out.out_channels)
    centre(encoder.conv_out, range(kept), range(kept), rest=0.02)
    encoder.conv_out.weight[range(kept), range(n, n + kept), -1, 1, 1] = -1
    _whiten(vae, torch.cat([encoder(part, None) for part in pictures.split(16)]))


def _principal_components(conv: Conv2d, x: Tensor) -> None:
    """A stride-2 convolution that gives the leading components of 2 x 2 patches. x (B, C, H, W)."""
    patches = rearrange(x, "b c (h p) (w q) -> (b h w) (c p q)", p=2, q=2)
    _, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    leading = 0.6 * vectors.flip(1)[:, : conv.out_channels].T
    conv.weight.zero_()
    conv.weight[:, :, :2, :2] = leading.unflatten(1, (-1, 2, 2))
    if conv.bias is not None:
        conv.bias.zero_()


def _whiten(vae: AutoencoderKLWan, features: Tensor) -> None:
    """Latents that are uncorrelated with unit variance. features (B, 2 z, 1, h, w)."""
    z = vae.config.z_dim
    rows = rearrange(features, "b c t h w -> (b t h w) c")
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    values = values.flip(0)[:z].clamp_min(values.max() * 1e-7)
    whitening = (vectors.flip(1)[:, :z] / values.sqrt()).T  # (z, 2 z)
    weight, bias = vae.quant_conv.weight[:, :, 0, 0, 0], vae.quant_conv.bias
    assert bias is not None
    weight[:z] = whitening
    bias[:z] = -whitening @ mean
    weight[z:] *= 0.1
    bias[z:] = -5  # the posterior starts narrow: with an ordinary one the latents collapse


def _initialize_decoder(vae: AutoencoderKLWan) -> None:
    decoder = vae.decoder
    upsampled = [block for block in decoder.up_blocks if block.upsamplers][-1].upsamplers[0].resample[1]
    upsampled.weight[COLOURS : 2 * COLOURS] = -upsampled.weight[:COLOURS]
    upsampled.weight[-1] = 0
    upsampled.bias.zero_()
    upsampled.bias[-1] = 2.0  # the carrier
    centre(decoder.conv_out, range(COLOURS), range(COLOURS), rest=0.1)
    decoder.conv_out.weight[range(COLOURS), range(COLOURS, 2 * COLOURS), -1, 1, 1] = -1
    vae.post_quant_conv.weight.zero_()
    vae.post_quant_conv.weight[range(vae.config.z_dim), range(vae.config.z_dim)] = 1
    vae.post_quant_conv.bias.zero_()


def centre(conv: CausalConv3d, outputs: range, inputs: range, rest: float) -> None:
    """The given outputs copy the given inputs, pixel by pixel; the others start `rest` times as large."""
    conv.weight *= rest
    conv.weight[list(outputs)] = 0
    conv.weight[list(outputs), list(inputs), -1, 1, 1] = 1
    assert conv.bias is not None
    conv.bias.zero_()


@torch.no_grad()
def linear_ceiling(vae: AutoencoderKLWan, pictures: Tensor) -> float:
    """PSNR in dB of the best linear map from latents back to 8 x 8 patches. pictures (B, 3, 1, H, W)."""
    scale = vae.config.scale_factor_spatial
    z = rearrange(vae.encode(pictures).latent_dist.mean, "b c t h w -> (b t h w) c")
    patches = rearrange(pictures, "b c t (h p) (w q) -> (b t h w) (c p q)", p=scale, q=scale)
    inputs = F.pad(z, (0, 1), value=1.0)
    rest = patches - inputs @ torch.linalg.lstsq(inputs, patches).solution
    return -10 * torch.log10((rest / 2).square().mean()).item()
