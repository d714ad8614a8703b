"""Stable Diffusion UNet (1.x and 2.x).

Convolutional U over latents: at every level resnets, which take the timestep, and transformers, which take
the prompt; the up path sees the down path's results again. Any latent size goes: halving rounds up, and the
up path returns to the sizes of the down path. Releases 1.x and 2.x differ in the number of heads, the width
of the prompt, and the shape of two projections. What predicts noise and what predicts v is the same network.

`forward` is the whole network. An edit calls its pieces instead, so that nothing is computed twice: the
schedule and the prompts once (`embed_time`, `embed_context`), and `predict` per step. No text enters before
the first cross-attention, so `predict` computes the layers before it once for all branches of the guidance.
To change the attention, change `SelfAttention` and `CrossAttention`.

B batch   C channels   h, w height and width of latents or feature maps   N = h * w image tokens
L text tokens   P prompts   S timesteps   D width   H heads   E = D / H
Source: diffusers `unet_2d_condition.py`; CompVis `openaimodel.py`; arXiv 2112.10752.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from joyedit import ops
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.network import Network
from joyedit.models.layers import (
    Conv2d,
    GroupNorm,
    GroupNormSiLU,
    LayerNorm,
    Linear,
    TimestepEmbedder,
    sinusoidal_embedding,
)
from joyedit.step_cache import BranchCache

Context = dict[nn.Module, tuple[Tensor, Tensor]]  # cross-attention -> K and V, each (P, L, H, E)

# The kinds of levels; in the second of each, a transformer follows every resnet.
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNet2DConditionConfig(Config):
    """Settings of the UNet; the defaults are those of Stable Diffusion 1.5.

    `attention_head_dim` is the number of heads, whatever its name says. Where a tuple is allowed, it has one
    value for each level, from the widest picture to the narrowest. `upcast_attention` has no effect, as in
    the reference with fused attention. Raises ValueError for what this network does not compute (SDXL among
    it), and for settings that contradict each other.
    """

    sample_size: int | tuple[int, int] | None = 64
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    only_cross_attention: bool = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int, ...] = 768
    transformer_layers_per_block: int | tuple[int, ...] = 1
    reverse_transformer_layers_per_block: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: None = None
    time_embedding_act_fn: None = None
    timestep_post_act: None = None
    time_cond_proj_dim: None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: None = None
    addition_embed_type_num_heads: int = 64  # of an embedding that is not computed here

    supported: ClassVar[Mapping[str, tuple]] = {
        "center_input_sample": (False,),
        "flip_sin_to_cos": (True,),
        "freq_shift": (0,),
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "only_cross_attention": (False,),
        "downsample_padding": (1,),
        "mid_block_scale_factor": (1,),
        "dropout": (0,),
        "act_fn": ("silu", "swish"),  # two names of one function
        "transformer_layers_per_block": (1,),
        "reverse_transformer_layers_per_block": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "class_embed_type": (None,),
        "addition_embed_type": (None,),
        "addition_time_embed_dim": (None,),
        "num_class_embeds": (None,),
        "resnet_time_scale_shift": ("default",),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "time_embedding_act_fn": (None,),
        "timestep_post_act": (None,),
        "time_cond_proj_dim": (None,),
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
        "projection_class_embeddings_input_dim": (None,),
        "attention_type": ("default",),
        "class_embeddings_concat": (False,),
        "mid_block_only_cross_attention": (None, False),
        "cross_attention_norm": (None,),
    }

    def __post_init__(self):
        if self.addition_embed_type == "text_time":
            self._refuse(
                "addition_embed_type", "is of an SDXL UNet, only Stable Diffusion 1.x and 2.x go here"
            )
        super().__post_init__()
        widths, levels = self.block_out_channels, len(self.block_out_channels)
        for name, kinds in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            if len(self[name]) != levels or not set(self[name]) <= set(kinds):
                self._refuse(name, f"must be {' or '.join(kinds)} for each of block_out_channels={widths!r}")
        for name in ("in_channels", "out_channels", "norm_num_groups"):
            if not isinstance(self[name], int) or self[name] < 1:
                self._refuse(name, "must be a positive number")
        for name in ("layers_per_block", "attention_head_dim", "cross_attention_dim"):
            values = self.per_level(name)
            if len(values) != levels or any(not isinstance(v, int) or v < 1 for v in values):
                self._refuse(name, f"must be one positive number, or {levels} of them")
        if len(set(self.per_level("cross_attention_dim"))) > 1:
            self._refuse("cross_attention_dim", "must be equal everywhere: all levels see the same prompt")
        if any(width < 1 or width % self.norm_num_groups for width in widths):
            self._refuse("block_out_channels", f"must be multiples of norm_num_groups={self.norm_num_groups}")
        heads = self.per_level("attention_head_dim")
        if any(width % count for width, count in zip(widths, heads, strict=True)):
            self._refuse("attention_head_dim", f"(the number of heads) must divide the widths {widths!r}")

    def _refuse(self, name: str, why: str) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {name}={self[name]!r} {why}")

    def per_level(self, name: str) -> tuple[int, ...]:
        """A setting that is one number for all levels or one for each."""
        return self[name] if isinstance(self[name], tuple) else (self[name],) * len(self.block_out_channels)

    @property
    def context_dim(self) -> int:
        return self.per_level("cross_attention_dim")[0]

    def check_input_is_latents(self) -> None:
        """Raises ValueError for a UNet whose input has more channels than the latents it denoises."""
        if self.in_channels != self.out_channels:
            kind = {9: "an inpainting", 8: "an InstructPix2Pix", 5: "a depth"}.get(self.in_channels)
            raise ValueError(
                f"in_channels={self.in_channels}: this is {f'{kind} UNet' if kind else 'a UNet'} that takes "
                f"more than the {self.out_channels} channels of the latents; a text-to-image UNet is needed"
            )


class UNet2DConditionOutput(NamedTuple):
    """`sample`: the predicted noise or v, (B, C, h, w)."""

    sample: Tensor


class UNet2DConditionModel(Network):
    """The denoiser of Stable Diffusion: noisy latents, timestep and prompt to noise or v.

    `forward` in pieces, for a whole run:

        time = unet.embed_time(timesteps)
        context = unet.embed_context(torch.cat((negative, prompt)))
        uncond, cond = unet.predict(latents, time[i], context, branches=2).chunk(2)

    Feature maps follow the memory format of the weights: `unet.to(memory_format=torch.channels_last)`.
    """

    Config = UNet2DConditionConfig
    table = "sd_unet"
    recomputed_lists = frozenset({"resnets", "attentions", "downsamplers", "upsamplers"})
    config: UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig | None = None):
        super().__init__(config or UNet2DConditionConfig())
        c = self.config
        first, levels = c.block_out_channels[0], len(c.block_out_channels)
        self.conv_in = Conv2d(c.in_channels, first, 3, padding=1)
        self.time_embedding = TimestepEmbedder(first, 4 * first)
        self.down_blocks = nn.ModuleList(DownBlock(c, level) for level in range(levels))
        self.mid_block = MidBlock(c)
        self.up_blocks = nn.ModuleList(UpBlock(c, level) for level in reversed(range(levels)))
        self.conv_norm_out = GroupNormSiLU(first, c.norm_num_groups, c.norm_eps)
        self.conv_out = Conv2d(first, c.out_channels, 3, padding=1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Noise or v of noisy latents, in the shape and dtype of `sample`.

        sample (B, in_channels, h, w); timestep in [0, 1000), one or (B); encoder_hidden_states
        (P, L, D_text), each prompt for B / P samples that follow one another. cross_attention_kwargs:
        {"scale": s}, the strength of adapters, without which it has no effect. The result is `.sample` or,
        with return_dict=False, a 1-tuple. Raises ValueError for shapes that do not fit and other keys.
        """
        unknown = set(cross_attention_kwargs or ()) - {"scale"}
        if unknown:
            raise ValueError(f"cross_attention_kwargs has {sorted(unknown)}; only 'scale' is known")
        time = self.embed_time(timestep)
        out = self.predict(sample, time, self.embed_context(encoder_hidden_states))
        return UNet2DConditionOutput(out) if return_dict else (out,)

    def embed_time(self, timesteps: Tensor | float) -> Tensor:
        """What the resnets take of each timestep, side by side. One or (S) timesteps -> (S, width)."""
        timesteps = torch.as_tensor(timesteps, device=self.device).reshape(-1)
        waves = sinusoidal_embedding(timesteps, self.config.block_out_channels[0])
        emb = F.silu(self.time_embedding(waves.to(ops.compute_dtype(self.dtype, self.device))))
        return torch.cat([resnet.time_emb_proj(emb) for resnet in self.resnets()], dim=1)

    def embed_context(self, encoder_hidden_states: Tensor) -> Context:
        """K and V of every cross-attention for prompts (P, L, D_text). Raises ValueError for other shapes."""
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[-1] != self.config.context_dim:
            raise ValueError(
                f"encoder_hidden_states {tuple(encoder_hidden_states.shape)}: wanted (prompts, tokens, "
                f"{self.config.context_dim})"
            )
        text = encoder_hidden_states.to(ops.compute_dtype(self.dtype, encoder_hidden_states.device))
        return {layer: layer.embed(text) for layer in self.modules() if isinstance(layer, CrossAttention)}

    def predict(
        self,
        sample: Tensor,
        time: Tensor,
        context: Context,
        branches: int = 1,
        caches: Sequence[BranchCache] | None = None,
    ) -> Tensor:
        """Noise or v, (branches * B, C, h, w) in the dtype of `sample`: the part of `forward` that every step
        repeats.

        sample (B, in_channels, h, w), taken `branches` times: [all samples, all samples, ...]; time: one row
        or (1 or B, width) of `embed_time`; context: P prompts from `embed_context`, each for
        branches * B / P samples that follow one another; caches: one for each branch, of a run that reuses
        what the inner levels gave in earlier steps. Raises ValueError for numbers that do not fit.
        """
        if sample.ndim != 4 or sample.shape[1] != self.config.in_channels or 0 in sample.shape:
            wanted = f"(batch, {self.config.in_channels}, height, width)"
            raise ValueError(f"sample {tuple(sample.shape)}: wanted {wanted}")
        time = time if time.ndim == 2 else time[None]
        if len(time) not in (1, len(sample)):
            raise ValueError(f"{len(time)} timesteps for {len(sample)} samples: wanted one, or one for each")
        batch = branches * len(sample)
        prompts = len(next(iter(context.values()))[0])
        if batch % prompts:
            raise ValueError(
                f"{prompts} prompts for {batch} samples: wanted one for each, or for equal shares"
            )

        dtype = ops.compute_dtype(self.dtype, sample.device)
        resnets = self.resnets()
        times = time.to(dtype).split([resnet.width for resnet in resnets], dim=1)
        conditions = Conditions(dict(zip(resnets, times, strict=True)), context, batch)

        x = self.conv_in(sample.to(dtype).contiguous(memory_format=self.layout))
        skips = [x]
        x = self.down_blocks[0](x, conditions, skips)
        if caches is None:
            x = self.inner(x, conditions, skips)
        else:
            x = self.cached_inner(x, conditions, skips, caches)
        x = self.up_blocks[-1](x, conditions, skips)
        return self.conv_out(self.conv_norm_out(x)).to(sample.dtype).contiguous()

    def inner(self, x: Tensor, conditions: "Conditions", skips: list[Tensor]) -> Tensor:
        """What the levels below the first make of it, for the last up block to begin with."""
        for block in self.down_blocks[1:]:
            x = block(x, conditions, skips)
        x = self.mid_block(x, conditions)
        for block in self.up_blocks[:-1]:
            x = block(x, conditions, skips)
        return x

    def cached_inner(
        self, x: Tensor, conditions: "Conditions", skips: list[Tensor], caches: Sequence[BranchCache]
    ) -> Tensor:
        """As `inner`, of the branches that are due; of the others what it gave when they were. How much the
        first level's resnets and transformers change tells which."""
        count, own = len(caches), self.config.per_level("layers_per_block")[0]  # results of the first level
        before, after, x = (repeat_to(each, conditions.batch) for each in (skips[0], skips[own], x))
        changes = (after - before).chunk(count)
        due = [i for i, cache in enumerate(caches) if cache.is_due(changes[i])]
        if due:
            x, after = branches_of(x, due, count), branches_of(after, due, count)
            rest = self.inner(x, conditions.of(due, count), [after, x])
            for i, part in zip(due, rest.chunk(len(due)), strict=True):
                caches[i].rest = part
        del skips[own + 1 :]  # the first level's result, which is no longer needed
        return torch.cat([cache.rest for cache in caches])

    @property
    def layout(self) -> torch.memory_format:
        """That of the weights. Feature maps follow it, or each convolution would copy its weight."""
        last = self.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if last else torch.contiguous_format

    def resnets(self) -> list["ResnetBlock"]:
        """All of them, in the order of `embed_time`."""
        return [module for module in self.modules() if isinstance(module, ResnetBlock)]


class Conditions(NamedTuple):
    """What a call is conditioned on; a layer finds its own part under itself."""

    time: Mapping[nn.Module, Tensor]  # resnet -> (1 or B, C)
    context: Context
    batch: int  # samples from the first cross-attention on; before it, the branches are still one

    def of(self, due: list[int], count: int) -> "Conditions":
        """Those of the branches of these numbers, of `count` that the prompts are for in equal shares."""
        context = {
            layer: (branches_of(k, due, count), branches_of(v, due, count))
            for layer, (k, v) in self.context.items()
        }
        return Conditions(self.time, context, self.batch // count * len(due))


class DownBlock(nn.Module):
    """The resnets of one level, each with a transformer or none, then half the height and width.

    `skips` is filled with every result on the way.
    """

    def __init__(self, config: UNet2DConditionConfig, level: int):
        super().__init__()
        widths = config.block_out_channels
        num_layers = config.per_level("layers_per_block")[level]
        dims = [widths[max(level - 1, 0)]] + [widths[level]] * (num_layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(config, dim, widths[level]) for dim in dims)
        follower = Transformer2D if config.down_block_types[level] == DOWN_BLOCKS[1] else NoTransformer
        self.attentions = nn.ModuleList(follower(config, level) for _ in range(num_layers))
        self.downsamplers = nn.ModuleList([Downsample(widths[level])] if level < len(widths) - 1 else [])

    def forward(self, x: Tensor, conditions: Conditions, skips: list[Tensor]) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x, conditions), conditions)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x


class MidBlock(nn.Module):
    def __init__(self, config: UNet2DConditionConfig):
        super().__init__()
        width = config.block_out_channels[-1]
        self.resnets = nn.ModuleList(ResnetBlock(config, width, width) for _ in range(2))
        self.attentions = nn.ModuleList([Transformer2D(config, -1)])

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, conditions), conditions)
        return self.resnets[1](x, conditions)


class UpBlock(nn.Module):
    """The resnets of one level, each on [x, the last of `skips`] and with a transformer or none, then the
    height and width of the level above."""

    def __init__(self, config: UNet2DConditionConfig, level: int):
        super().__init__()
        widths = config.block_out_channels
        num_layers = config.per_level("layers_per_block")[level] + 1
        below, width, above = (
            widths[min(level + 1, len(widths) - 1)],
            widths[level],
            widths[max(level - 1, 0)],
        )
        dims = [below] + [width] * (num_layers - 1)
        skip_dims = [width] * (num_layers - 1) + [above]
        self.resnets = nn.ModuleList(
            ResnetBlock(config, dim + skip_dim, width) for dim, skip_dim in zip(dims, skip_dims, strict=True)
        )
        follower = Transformer2D if config.up_block_types[-1 - level] == UP_BLOCKS[1] else NoTransformer
        self.attentions = nn.ModuleList(follower(config, level) for _ in range(num_layers))
        self.upsamplers = nn.ModuleList([Upsample(width)] if level > 0 else [])

    def forward(self, x: Tensor, conditions: Conditions, skips: list[Tensor]) -> Tensor:
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = torch.cat((x, repeat_to(skips.pop(), len(x))), dim=1)
            x = attention(resnet(x, conditions), conditions)
        for upsampler in self.upsamplers:
            x = upsampler(x, skips[-1].shape[-2:])
        return x


class ResnetBlock(nn.Module):
    """Two convolutions of normed input, the timestep added between them, beside a shortcut."""

    def __init__(self, config: UNet2DConditionConfig, in_dim: int, out_dim: int):
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.width = out_dim
        self.norm1 = GroupNormSiLU(in_dim, groups, eps)
        self.conv1 = Conv2d(in_dim, out_dim, 3, padding=1)
        self.time_emb_proj = Linear(4 * config.block_out_channels[0], out_dim)
        self.norm2 = GroupNormSiLU(out_dim, groups, eps)
        self.conv2 = Conv2d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = Conv2d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """x (B, C, h, w) -> (B, C', h, w)."""
        h = self.conv1(self.norm1(x)) + repeat_to(conditions.time[self], len(x))[:, :, None, None]
        return self.conv2(self.norm2(h)) + self.conv_shortcut(x)


class Transformer2D(nn.Module):
    """Self-attention, cross-attention and MLP on the positions of feature maps. (B, C, h, w) -> the same."""

    def __init__(self, config: UNet2DConditionConfig, level: int):
        super().__init__()
        width = config.block_out_channels[level]
        projection = Linear if config.use_linear_projection else TokenConv2d
        self.norm = GroupNorm(width, config.norm_num_groups, eps=1e-6)  # not the eps of the resnets
        self.proj_in = projection(width, width)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(width, config.per_level("attention_head_dim")[level], config.context_dim)]
        )
        self.proj_out = projection(width, width)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        height = x.shape[2]
        tokens = self.proj_in(rearrange(self.norm(x), "b c h w -> b (h w) c"))
        for block in self.transformer_blocks:
            tokens = block(tokens, conditions)
        out = rearrange(self.proj_out(tokens), "b (h w) c -> b c h w", h=height)
        return repeat_to(x, conditions.batch) + out  # in the memory format of x, which comes first


class NoTransformer(nn.Module):
    """In the place of a transformer, where a level has none."""

    def __init__(self, config: UNet2DConditionConfig, level: int):
        super().__init__()

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        return x


class TransformerBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, context_dim: int):
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-5)
        self.attn1 = SelfAttention(width, num_heads)
        self.norm2 = LayerNorm(width, eps=1e-5)
        self.attn2 = CrossAttention(width, num_heads, context_dim)
        self.norm3 = LayerNorm(width, eps=1e-5)
        self.ff = GEGLUFeedForward(width, 4 * width)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """x (B, N, D) -> (conditions.batch, N, D): here the branches part."""
        x = x + self.attn1(self.norm1(x))
        x = repeat_to(x, conditions.batch)
        x = x + self.attn2(self.norm2(x), conditions)
        return x + self.ff(self.norm3(x))


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(width, width, bias=False)
        self.to_v = Linear(width, width, bias=False)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = (split_heads(to(x), self.num_heads) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](ops.attention(q, k, v).flatten(2))


class CrossAttention(nn.Module):
    """Attention of image tokens over a prompt; copies of a sample share the keys and values of theirs."""

    def __init__(self, width: int, num_heads: int, context_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context_dim, width, bias=False)
        self.to_v = Linear(context_dim, width, bias=False)
        self.to_out = nn.ModuleList([Linear(width, width)])

    def embed(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of prompts. (P, L, D_text) -> two of (P, L, H, E)."""
        return split_heads(self.to_k(text), self.num_heads), split_heads(self.to_v(text), self.num_heads)

    def forward(self, x: Tensor, conditions: Conditions) -> Tensor:
        """x (B, N, D) -> (B, N, D). The tokens of all samples of a prompt are one sequence of queries."""
        k, v = conditions.context[self]
        q = split_heads(self.to_q(x).view(len(k), -1, x.shape[-1]), self.num_heads)  # (P, B / P * N, H, E)
        return self.to_out[0](ops.attention(q, k, v).view(x.shape))


class GEGLUFeedForward(nn.Module):
    """value * gelu(gate), then Linear; the names are those of the Diffusers checkpoints."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLUProjection(dim, hidden_dim), nn.Identity(), Linear(hidden_dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class GEGLUProjection(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.proj = Linear(dim, 2 * hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(self.proj(x))


class Downsample(nn.Module):
    """Half the height and width, rounded up."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest pixels at another height and width, twice as large or one less, then a convolution."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class TokenConv2d(nn.Conv2d):
    """1x1 convolution on tokens. (B, N, C) -> (B, N, C')."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim, 1)

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight.flatten(1), self.bias)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) -> a view (B, N, H, E)."""
    return rearrange(x, "b n (h e) -> b n h e", h=num_heads)


def branches_of(x: Tensor, due: list[int], count: int) -> Tensor:
    """Those of `count` equal parts of x (B, ...) that are due; x itself where all are."""
    return x if len(due) == count else torch.cat([x.chunk(count)[i] for i in due])


def repeat_to(x: Tensor, batch: int) -> Tensor:
    """x (B, ...) -> (batch, ...): all of x, again and again; x itself where that is once."""
    return x if len(x) == batch else torch.cat([x] * (batch // len(x)))
