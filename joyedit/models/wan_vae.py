"""WAN 2.1 variational autoencoder of images and videos.

Eight times smaller in height and width, four times in time: 1 + 4k frames are 1 + k latent frames, and the
first latent frame is the first frame alone. Everything is causal, so a video is coded in chunks (one frame,
then four at a time; one latent frame at a time in the decoder), and each temporal convolution keeps the last
frames of its input in a `Past`, which is an argument of the encoder and the decoder.

A first frame has only zeros before it, so only the last temporal slice of a 3x3x3 kernel meets data, and the
convolutions over time alone do nothing: a first frame takes 2-D convolutions, a third of the work. The slices
are cut from the weights at every call. That is under 5 % of a 128 px picture and nothing at 1024 px, needs no
second copy of the weights, and cannot go stale when they change. To change a convolution, see `CausalConv3d`.

B batch   C channels   T frames   H, W height and width of pictures or feature maps   N = H * W positions
Source: diffusers `autoencoder_kl_wan.py`; WAN `wan/modules/vae.py`; arXiv 2503.20314.
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
from joyedit.models.layers import Conv2d, keeps_channels_last, lay_out, layout_of_maps
from joyedit.noise import Generators

# Temporal convolution -> the last frames of its input. No tensor is ever written to: a copied dict is a fork.
Past = dict[nn.Module, Tensor]

CHUNK = 4  # frames that the encoder takes at a time after the first


@dataclasses.dataclass(frozen=True)
class AutoencoderKLWanConfig(Config):
    """Settings of the VAE; the defaults are those of WAN 2.1, which JoyAI-Image and ChronoEdit share.

    Raises ValueError for what this network does not compute (WAN 2.2 among it), and for scale factors that
    contradict the stages.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: as base_dim
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    )
    latents_std: tuple[float, ...] = (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    )
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    supported: ClassVar[Mapping[str, tuple]] = {
        "is_residual": (False,),
        "patch_size": (None,),
        "attn_scales": ((),),
        "dropout": (0.0,),
    }

    def __post_init__(self):
        super().__post_init__()
        halvings = len(self.dim_mult) - 1
        if len(self.temperal_downsample) != halvings:
            raise ValueError(
                f"temperal_downsample={self.temperal_downsample!r}: dim_mult={self.dim_mult!r} needs "
                f"{halvings} values, one for each stage but the last"
            )
        for name, factor in (
            ("scale_factor_spatial", 2**halvings),
            ("scale_factor_temporal", 2 ** sum(self.temperal_downsample)),
        ):
            if self[name] != factor:
                raise ValueError(f"{name}={self[name]!r}: dim_mult and temperal_downsample make it {factor}")
        if CHUNK % self.scale_factor_temporal:
            raise ValueError(
                f"temperal_downsample={self.temperal_downsample!r}: at most two of them may be true"
            )


class AutoencoderKLWan(Network):
    """Encoder and decoder of images (T = 1) and videos.

    `enable_slicing`: one sample of a batch at a time. `enable_tiling`: pictures larger than a tile in
    overlapping tiles that are blended, which takes less memory and does not give quite the same picture.
    """

    Config = AutoencoderKLWanConfig
    table = "wan_vae"
    config: AutoencoderKLWanConfig

    def __init__(self, config: AutoencoderKLWanConfig | None = None):
        super().__init__(config or AutoencoderKLWanConfig())
        config = self.config
        self.encoder = Encoder(config)
        self.quant_conv = PointConv3d(2 * config.z_dim, 2 * config.z_dim)
        self.post_quant_conv = PointConv3d(config.z_dim, config.z_dim)
        self.decoder = Decoder(config)

        self.use_slicing = False
        self.use_tiling = False
        self.tile_sample_min_height = 256
        self.tile_sample_min_width = 256
        self.tile_sample_stride_height = 192
        self.tile_sample_stride_width = 192

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput:
        """x (B, C, T, H, W) in [-1, 1] -> the posterior of latents (B, z_dim, 1 + (T - 1) / 4, H / 8, W / 8).

        The result is a named 1-tuple, so it serves both values of `return_dict`. Raises ValueError unless
        T = 1 + 4k and height and width are multiples of 8.
        """
        self._check_pixels(x)
        return AutoencoderKLOutput(DiagonalGaussian(self._code(self._encode, x)))

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput:
        """z (B, z_dim, T, h, w), not normalised -> pixels (B, C, 1 + 4 (T - 1), 8 h, 8 w) in [-1, 1].

        The result is a named 1-tuple, so it serves both values of `return_dict`.
        """
        return DecoderOutput(self.decode_with(self.decode_frames, z))

    def decode_with(self, frames: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """As `decode`, with another function in the place of `decode_frames`, which may take latent frames in
        another order, or return fewer pixels."""
        _check_video("z", z, self.config.z_dim)
        step = self.config.scale_factor_spatial
        return self._code(lambda part: self._tiled(frames, part, step, 1), z).clamp_(-1, 1)

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

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Code pictures larger than a tile in tiles of `min` pixels, one every `stride`; None keeps a size.

        Raises ValueError unless the sizes are multiples of 8 and 0 < stride <= min.
        """
        multiple = self.config.scale_factor_spatial
        sizes = {
            "tile_sample_min_height": tile_sample_min_height or self.tile_sample_min_height,
            "tile_sample_min_width": tile_sample_min_width or self.tile_sample_min_width,
            "tile_sample_stride_height": tile_sample_stride_height or self.tile_sample_stride_height,
            "tile_sample_stride_width": tile_sample_stride_width or self.tile_sample_stride_width,
        }
        for name, size in sizes.items():
            if size <= 0 or size % multiple:
                raise ValueError(f"{name}={size}: must be a positive multiple of {multiple}")
        for axis in ("height", "width"):
            stride, tile = sizes[f"tile_sample_stride_{axis}"], sizes[f"tile_sample_min_{axis}"]
            if stride > tile:
                raise ValueError(f"tile_sample_stride_{axis}={stride} leaves gaps between tiles of {tile}")
        for name, size in sizes.items():
            setattr(self, name, int(size))
        self.use_tiling = True

    def disable_tiling(self) -> None:
        self.use_tiling = False

    def encode_frames(self, x: Tensor) -> Tensor:
        """Pictures or tiles of them, x (B, C, T, H, W), to mean and logvar (B, 2 z_dim, T', H / 8, W / 8)."""
        if x.shape[2] == 1:
            return self.quant_conv(self.encoder(x, None))
        past: Past = {}
        chunks = (x[:, :, :1], *x[:, :, 1:].split(CHUNK, dim=2))
        return self.quant_conv(torch.cat([self.encoder(chunk, past) for chunk in chunks], dim=2))

    def decode_frames(self, z: Tensor) -> Tensor:
        """Pictures or tiles of them, z (B, z_dim, T, h, w), to unclamped pixels (B, C, T', 8 h, 8 w)."""
        z = self.post_quant_conv(z)
        if z.shape[2] == 1:
            return self.decoder(z, None)
        b, _, t, h, w = z.shape
        space, time = self.config.scale_factor_spatial, self.config.scale_factor_temporal
        frames = z.new_empty(b, self.config.out_channels, 1 + time * (t - 1), space * h, space * w)
        past: Past = {}
        frames[:, :, :1] = self.decoder(z[:, :, :1], past)
        for i in range(1, t):
            frames[:, :, 1 + time * (i - 1) : 1 + time * i] = self.decoder(z[:, :, i : i + 1], past)
        return frames

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
        return self._tiled(self.encode_frames, x, 1, self.config.scale_factor_spatial)

    def _tiled(self, code: Callable[[Tensor], Tensor], x: Tensor, step_in: int, step_out: int) -> Tensor:
        """`code` on the whole of x, or on tiles of it. One position of x is `step_in` pixels, of the result
        `step_out`."""
        tile_h, tile_w = self.tile_sample_min_height // step_in, self.tile_sample_min_width // step_in
        if not self.use_tiling or (x.shape[3] <= tile_h and x.shape[4] <= tile_w):
            return code(x)
        keep_h, keep_w = self.tile_sample_stride_height, self.tile_sample_stride_width
        rows = [
            [
                code(x[..., top : top + tile_h, left : left + tile_w])
                for left in range(0, x.shape[4], keep_w // step_in)
            ]
            for top in range(0, x.shape[3], keep_h // step_in)
        ]
        overlap_h, overlap_w = self.tile_sample_min_height - keep_h, self.tile_sample_min_width - keep_w
        return join_tiles(
            rows, (overlap_h // step_out, overlap_w // step_out), (keep_h // step_out, keep_w // step_out)
        )

    def _check_pixels(self, x: Tensor) -> None:
        _check_video("x", x, self.config.in_channels)
        if x.shape[2] % CHUNK != 1:
            raise ValueError(f"x has {x.shape[2]} frames; it must be 1 + {CHUNK}k: 1, 5, 9, ...")
        multiple = self.config.scale_factor_spatial
        for name, size in zip(("height", "width"), x.shape[3:], strict=True):
            if size % multiple:
                raise ValueError(f"x has {name} {size}; it must be a multiple of {multiple}")


class Encoder(nn.Module):
    def __init__(self, config: AutoencoderKLWanConfig):
        super().__init__()
        widths = [config.base_dim * mult for mult in config.dim_mult]
        self.conv_in = CausalConv3d(config.in_channels, config.base_dim)
        self.down_blocks = nn.ModuleList()
        dim = config.base_dim
        for stage, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(dim, width))
                dim = width
            if stage < len(widths) - 1:
                block = Downsample3d if config.temperal_downsample[stage] else Downsample2d
                self.down_blocks.append(block(dim))
        self.mid_block = MidBlock(dim)
        self.norm_out = NormSiLU(dim)
        self.conv_out = CausalConv3d(dim, 2 * config.z_dim)

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        """x (B, C, T, H, W), the frames after those in `past` -> mean and logvar (B, 2 z_dim, T', h, w).

        `past` is filled: give the same dict for the next frames. None: a lone frame; nothing is kept.
        """
        x = self.conv_in(x, past)
        for block in self.down_blocks:
            x = block(x, past)
        x = self.mid_block(x, past)
        return self.conv_out(self.norm_out(x), past)


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderKLWanConfig):
        super().__init__()
        base_dim = config.decoder_base_dim or config.base_dim
        widths = [base_dim * mult for mult in reversed(config.dim_mult)]
        upsamplers = [Upsample3d if time else Upsample2d for time in reversed(config.temperal_downsample)]
        dim = widths[0]
        self.conv_in = CausalConv3d(config.z_dim, dim)
        self.mid_block = MidBlock(dim)
        self.up_blocks = nn.ModuleList()
        for width, upsampler in zip(widths, [*upsamplers, None], strict=True):
            self.up_blocks.append(UpBlock(dim, width, config.num_res_blocks + 1, upsampler))
            dim = width // 2  # an upsampler halves the channels
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels)

    def forward(self, z: Tensor, past: Past | None) -> Tensor:
        """z (B, z_dim, 1, h, w), the latent frame after those in `past` -> pixels (B, C, 1 or 4, 8 h, 8 w).

        `past` is filled: give the same dict for the next frame, or copies of it to try several. None: a lone
        frame, of which nothing is kept.
        """
        x = self.conv_in(z, past)
        x = self.mid_block(x, past)
        for block in self.up_blocks:
            x = block(x, past)
        return self.conv_out(self.norm_out(x), past)


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([FrameAttention(dim)])

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        x = self.resnets[0](x, past)
        x = self.attentions[0](x)
        return self.resnets[1](x, past)


class UpBlock(nn.Module):
    """Residual blocks of one decoder stage, then its upsampler; the last stage has none."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, upsampler: type[nn.Module] | None):
        super().__init__()
        dims = [in_dim] + [out_dim] * num_res_blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in zip(dims, dims[1:], strict=False))
        self.upsamplers = nn.ModuleList([upsampler(out_dim)] if upsampler else [])

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, past)
        return x


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.norm1 = NormSiLU(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim)
        self.norm2 = NormSiLU(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim)
        self.conv_shortcut = PointConv3d(in_dim, out_dim) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        h = self.conv1(self.norm1(x), past)
        h = self.conv2(self.norm2(h), past)
        return h.add_(self.conv_shortcut(x))


class FrameAttention(nn.Module):
    """Self-attention with one head over the positions of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelRMSNorm(dim)
        self.to_qkv = TokenConv2d(dim, 3 * dim)
        self.proj = TokenConv2d(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + each_frame(self.attend, self.norm(x))

    def attend(self, frames: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        tokens = rearrange(frames, "b c h w -> b (h w) c")
        q, k, v = rearrange(self.to_qkv(tokens), "b n (qkv heads c) -> qkv b n heads c", qkv=3, heads=1)
        out = self.proj(ops.wide_attention(q, k, v)[:, :, 0])  # (B, N, C)
        return rearrange(out, "b (h w) c -> b c h w", h=frames.shape[2])


class Downsample2d(nn.Module):
    """Half the height and width; the zeros of the border are below and to the right only."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), Conv2d(dim, dim, 3, stride=2))

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        return each_frame(self.resample, x)


class Downsample3d(nn.Module):
    """Half the height and width, then half the frames after the first."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), Conv2d(dim, dim, 3, stride=2))
        self.time_conv = HalveFrames(dim, dim, (3, 1, 1), time_stride=2)

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        return self.time_conv(each_frame(self.resample, x), past)


class Upsample2d(nn.Module):
    """Twice the height and width, half the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), DoublingConv2d(dim, dim // 2))

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        return each_frame(self.resample, x)


class Upsample3d(nn.Module):
    """Twice the frames after the first, then twice the height and width, half the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), DoublingConv2d(dim, dim // 2))
        self.time_conv = DoubleFrames(dim, 2 * dim, (3, 1, 1))

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        return each_frame(self.resample, self.time_conv(x, past))


class CausalConv3d(nn.Conv3d):
    """Convolution over the frames up to the current one; before the first frame there are zeros."""

    def __init__(
        self, in_dim: int, out_dim: int, kernel_size: tuple[int, int, int] = (3, 3, 3), time_stride: int = 1
    ):
        _, kh, kw = kernel_size
        border = (kh // 2, kw // 2)
        super().__init__(in_dim, out_dim, kernel_size, (time_stride, 1, 1), (0, *border))
        self.border = border  # zeros around each frame
        self.kept = kernel_size[0] - time_stride  # frames of a chunk that the next one needs

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        """x (B, C, T, H, W) -> (B, C', T / time_stride, H, W). What the next frames need is put in `past`."""
        if past is None:
            return self.first_frame(x)
        if self not in past:
            past[self] = F.pad(x, (0, 0, 0, 0, self.kept - 1, 0))
            return self.first_frame(x)
        before, layout = past[self], layout_of_maps(self.weight)
        if x.shape[2] < self.kept:
            past[self] = torch.cat((before[:, :, x.shape[2] :], x), dim=2).contiguous(memory_format=layout)
        else:
            past[self] = x[:, :, -self.kept :].clone(memory_format=layout)
        return ops.conv3d((before, x), self.weight, self.bias, self.stride[0], self.border)

    def first_frame(self, x: Tensor) -> Tensor:
        """[0, 0, x]: only the last temporal slice of the kernel meets data. x (B, C, 1, H, W)."""
        return ops.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, padding=self.border)[:, :, None]


class HalveFrames(CausalConv3d):
    """A frame for every two, but the first frame passes as it is."""

    def first_frame(self, x: Tensor) -> Tensor:
        return x


class DoubleFrames(CausalConv3d):
    """Two frames for each, one in either half of the channels; the first frame passes as it is, and later
    ones see zeros in its place."""

    def forward(self, x: Tensor, past: Past | None) -> Tensor:
        if past is None:
            return x
        if self not in past:
            past[self] = F.pad(torch.zeros_like(x), (0, 0, 0, 0, self.kept - 1, 0))
            return x
        first, second = super().forward(x, past).chunk(2, dim=1)
        b, c, t, h, w = first.shape
        layout = layout_of_maps(self.weight)
        frames = torch.empty(b, c, 2 * t, h, w, dtype=x.dtype, device=x.device, memory_format=layout)
        frames[:, :, ::2], frames[:, :, 1::2] = first, second
        return frames


class PointConv3d(nn.Conv3d):
    """1x1x1 convolution. x (B, C, T, H, W) -> (B, C', T, H, W)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 1)

    def forward(self, input: Tensor) -> Tensor:
        return each_frame(lambda frames: ops.conv2d(frames, self.weight[:, :, 0], self.bias), input)


class TokenConv2d(nn.Conv2d):
    """1x1 convolution on tokens. (B, N, C) -> (B, N, C')."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 1)

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight.flatten(1), self.bias)


class DoublingConv2d(nn.Conv2d):
    """3x3 convolution of the picture with every pixel four times. x (B, C, H, W) -> (B, C', 2 H, 2 W)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return ops.doubling_conv2d(input, self.weight, self.bias)


class ChannelRMSNorm(nn.Module):
    """x / rms(x) * gamma over channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return ops.channel_rms_norm(x, self.gamma)


class NormSiLU(nn.Module):
    """silu(x / rms(x) * gamma) over channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return ops.channel_rms_norm_silu(x, self.gamma)


def each_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer of images on every frame of x (B, C, T, H, W)."""
    if x.shape[2] == 1:
        # Merged with another axis of size 1 it could get a stride that hides the layout from PyTorch.
        return layer(x[:, :, 0])[:, :, None]
    out = layer(x.transpose(1, 2).flatten(0, 1))
    return out.unflatten(0, (len(x), -1)).transpose(1, 2)


def _check_video(name: str, x: Tensor, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; it must be (batch, {channels}, frames, height, width)"
        )
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; it must be floating point")
