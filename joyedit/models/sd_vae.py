"""Variational autoencoder of Stable Diffusion 1.x and 2.x.

A picture becomes four latent channels at an eighth of its height and width, and back. Other sizes than
multiples of eight are rounded down, as the convolutions leave them.

A picture larger than a tile may be coded in tiles of the size that the network was trained at, overlapping by
a quarter and blended. That takes less memory and does not give quite the same picture.

B batch   C channels   H, W height and width of pictures or feature maps   N = H * W positions
Source: diffusers `autoencoder_kl.py`, `vae.py`; CompVis latent-diffusion, arXiv 2112.10752.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from joyedit import ops
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.network import Network
from joyedit.models.latents import AutoencoderKLOutput, DecoderOutput, DiagonalGaussian, join_tiles
from joyedit.models.layers import (
    Conv2d,
    GroupNorm,
    GroupNormSiLU,
    Linear,
    keeps_channels_last,
    lay_out,
    layout_of_maps,
)
from joyedit.noise import Generators

EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(Config):
    """Settings of the VAE; the defaults are those of Stable Diffusion 1.5.

    `sample_size` is the size of a tile in pixels; 2.x has 768. The latents that the diffusion networks see
    are `scaling_factor` times those of this network. Raises ValueError for what this network does not
    compute.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    supported: ClassVar[Mapping[str, tuple]] = {
        "act_fn": ("silu", "swish"),
        "shift_factor": (None,),
        "latents_mean": (None,),
        "latents_std": (None,),
        "use_quant_conv": (True,),
        "use_post_quant_conv": (True,),
        "mid_block_add_attention": (True,),
    }

    def __post_init__(self):
        super().__post_init__()
        stages = len(self.block_out_channels)
        for name, kind in (
            ("down_block_types", "DownEncoderBlock2D"),
            ("up_block_types", "UpDecoderBlock2D"),
        ):
            if self[name] != (kind,) * stages:
                raise ValueError(
                    f"{name}={self[name]!r}: must be {stages} times {kind!r}, one for each of "
                    f"block_out_channels={self.block_out_channels!r}"
                )
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels={self.block_out_channels!r}: {width} is no multiple of "
                    f"norm_num_groups={self.norm_num_groups}"
                )
        if not isinstance(self.sample_size, int):
            raise ValueError(f"sample_size={self.sample_size!r}: must be one number, tiles are square")

    @property
    def factor(self) -> int:
        """Pixels for each latent in height and width."""
        return 2 ** (len(self.block_out_channels) - 1)


class AutoencoderKL(Network):
    """Encoder and decoder of images.

    `enable_slicing`: one sample of a batch at a time. `enable_tiling`: pictures larger than a tile in tiles.
    """

    Config = AutoencoderKLConfig
    table = "sd_vae"
    config: AutoencoderKLConfig

    def __init__(self, config: AutoencoderKLConfig | None = None):
        super().__init__(config or AutoencoderKLConfig())
        config = self.config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1)

        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_size = config.sample_size
        self.tile_latent_min_size = config.sample_size // config.factor
        self.tile_overlap_factor = 0.25

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput:
        """x (B, C, H, W) in [-1, 1] -> the posterior of latents (B, latent_channels, H / 8, W / 8), unscaled.

        Sizes are rounded down to multiples of 8. The result is a named 1-tuple, so it serves both values of
        `return_dict`. Raises ValueError for another shape.
        """
        _check("x", x, self.config.in_channels, self.config.factor)
        return AutoencoderKLOutput(DiagonalGaussian(self._code(self._encode, x)))

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput:
        """z (B, latent_channels, h, w), unscaled -> pixels (B, C, 8 h, 8 w), about [-1, 1], not clamped.

        The result is a named 1-tuple, so it serves both values of `return_dict`. Raises ValueError for
        another shape.
        """
        _check("z", z, self.config.latent_channels, 1)
        return DecoderOutput(self._code(self._decode, z))

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput:
        """Encode and decode, through the posterior's mean or a sample of it. sample: as x of `encode`."""
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict)

    def enable_slicing(self) -> None:
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Code pictures larger than `tile_sample_min_size` pixels, latents larger than
        `tile_latent_min_size`, in tiles; these two and `tile_overlap_factor` may be set."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def encode_tile(self, x: Tensor) -> Tensor:
        """A picture or a tile of one, x (B, C, H, W), to mean and logvar (B, 2 latent_channels, h, w)."""
        return self.quant_conv(self.encoder(x))

    def decode_tile(self, z: Tensor) -> Tensor:
        """The latents of a picture or of a tile, z (B, latent_channels, h, w), to pixels (B, C, 8 h, 8 w)."""
        return self.decoder(self.post_quant_conv(z))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the weights, and lay them out once as convolutions are fastest there."""
        super()._apply(fn, recurse)
        if keeps_channels_last(self.dtype, self.device):
            lay_out(self, channels_last=True)
        return self

    def _code(self, code: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`code` on the batch, or one sample at a time; the result is fresh, contiguous, in x's dtype."""
        dtype = ops.compute_dtype(self.dtype, x.device)
        inner = x.to(dtype).contiguous(memory_format=layout_of_maps(self.decoder.conv_in.weight))
        parts = inner.split(1) if self.use_slicing else (inner,)
        return torch.cat([code(part) for part in parts]).to(x.dtype).contiguous()

    def _encode(self, x: Tensor) -> Tensor:
        factor = self.config.factor
        return self._tiled(self.encode_tile, x, self.tile_sample_min_size // factor, factor, 1)

    def _decode(self, z: Tensor) -> Tensor:
        return self._tiled(self.decode_tile, z, self.tile_latent_min_size, 1, self.config.factor)

    def _tiled(
        self, code: Callable[[Tensor], Tensor], x: Tensor, size: int, step_in: int, step_out: int
    ) -> Tensor:
        """`code` on the whole of x, or on tiles of it, `size` latents square. A latent is `step_in` positions
        of x and `step_out` of the result; a rest at the edge that makes no latent is left out."""
        tile, (height, width) = size * step_in, x.shape[2:]
        if not self.use_tiling or (height <= tile and width <= tile):
            return code(x)
        keep = max(int(size * (1 - self.tile_overlap_factor)), 1)  # in latents, from one tile to the next
        rows = [
            [
                code(x[..., top : top + tile, left : left + tile])
                for left in range(0, width - step_in + 1, keep * step_in)
            ]
            for top in range(0, height - step_in + 1, keep * step_in)
        ]
        overlap = (size - keep) * step_out
        return join_tiles(rows, (overlap, overlap), (keep * step_out, keep * step_out))


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(before, width, config.layers_per_block, groups, halve=i < len(widths) - 1)
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNormSiLU(widths[-1], groups, EPS)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, 2 latent_channels, h, w), of which `quant_conv` makes mean and logvar."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            UpBlock(before, width, config.layers_per_block + 1, groups, double=i < len(widths) - 1)
            for i, (before, width) in enumerate(zip((widths[0], *widths), widths, strict=False))
        )
        self.conv_norm_out = GroupNormSiLU(widths[-1], groups, EPS)
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, latent_channels, h, w), after `post_quant_conv` -> pixels (B, C, 8 h, 8 w)."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class DownBlock(nn.Module):
    """Residual blocks of one encoder stage, then half the height and width; the last stage keeps them."""

    def __init__(self, in_dim: int, out_dim: int, num_layers: int, groups: int, halve: bool):
        super().__init__()
        self.resnets = residual_blocks(in_dim, out_dim, num_layers, groups)
        self.downsamplers = nn.ModuleList([Downsample(out_dim)] if halve else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks of one decoder stage, then twice the height and width; the last stage keeps them."""

    def __init__(self, in_dim: int, out_dim: int, num_layers: int, groups: int, double: bool):
        super().__init__()
        self.resnets = residual_blocks(in_dim, out_dim, num_layers, groups)
        self.upsamplers = nn.ModuleList([Upsample(out_dim)] if double else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([PositionAttention(dim, groups)])
        self.resnets = residual_blocks(dim, dim, 2, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


def residual_blocks(in_dim: int, out_dim: int, number: int, groups: int) -> nn.ModuleList:
    dims = [in_dim] + [out_dim] * number
    return nn.ModuleList(ResidualBlock(a, b, groups) for a, b in zip(dims, dims[1:], strict=False))


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int, groups: int):
        super().__init__()
        self.norm1 = GroupNormSiLU(in_dim, groups, EPS)
        self.conv1 = Conv2d(in_dim, out_dim, 3, padding=1)
        self.norm2 = GroupNormSiLU(out_dim, groups, EPS)
        self.conv2 = Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = Conv2d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        return h.add_(self.conv_shortcut(x))


class PositionAttention(nn.Module):
    """Self-attention with one head over all positions."""

    def __init__(self, dim: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(dim, groups, EPS)
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.group_norm(x), "b c h w -> b (h w) 1 c")
        out = ops.wide_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))  # (B, N, 1, C)
        return x + rearrange(self.to_out[0](out), "b (h w) 1 c -> b c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Half the height and width; the zeros of the border are below and to the right only."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the height and width: every pixel four times, then a convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest-exact"))


def _check(name: str, x: Tensor, channels: int, least: int) -> None:
    if x.ndim != 4 or x.shape[1] != channels or not len(x) or min(x.shape[2:]) < least:
        size = f" of at least {least}" if least > 1 else ""
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be (batch, {channels}, height, width){size}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; it must be floating point")
