"""ChronoEdit's transformer: WAN 2.1 image-to-video with a jump in time.

An edit is a video of two latent frames, the photograph and its edited form, which the rotary embedding holds
seven frames apart; with temporal reasoning, more frames lie between them. Every block attends over all video
tokens, then over the prompt and the CLIP tokens of the photograph (two softmaxes whose results are summed),
then runs an MLP. The first and the last are modulated from the timestep plus a table of the block's own, in
fp32; the cross-attention between them has neither shift, scale nor gate.

`forward` is the whole network. An edit calls its pieces instead, so that nothing is computed twice: all
timesteps (`embed_time`), and what every block's cross-attention reads of prompts and photograph
(`embed_text`, `embed_image`), once per run, the rotary table once per grid (`rope`), and `predict_branches`
per step, which brings all branches of the guidance through each block in turn.
Padded rows of a prompt are attended to like words, as in training.

B batch   C latent channels   T frames   N video tokens   L text tokens   M image tokens
D width   H heads   E = D / H   S timesteps
Source: diffusers `transformer_chronoedit.py`; WAN 2.1 `wan/modules/model.py`; arXiv 2503.20314, 2510.04290.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from joyedit import ops
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.network import Network
from joyedit.models.layers import (
    FeedForward,
    LayerNorm,
    Linear,
    RMSNorm,
    TimestepEmbedder,
    sinusoidal_embedding,
)
from joyedit.models.rope import axis_angles
from joyedit.step_cache import BranchCache, finished

Rope = tuple[Tensor, Tensor]  # cos, sin, each (N, E / 2)
Grid = tuple[int, int, int]  # frames, rows and columns of the token grid
KeyValue = tuple[Tensor, Tensor]  # k, v, each (B or 1, L or M, H, E)
Context = tuple[KeyValue | Tensor, ...]  # of every block; or what it makes its own of, (B, L or M, D)

THETA = 10000.0
IMAGE_NORM_EPS = 1e-5  # of the two norms around the image embedder's MLP, whatever `eps` says


@dataclasses.dataclass(frozen=True)
class ChronoEditConfig(Config):
    """Settings of the transformer; the defaults are the released ChronoEdit-14B's.

    Raises ValueError for values that do not fit one another, and for unsupported ones.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 36  # noisy latents 16, mask 4, latents of the photograph 16
    out_channels: int | None = 16  # None: as many as in_channels
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = 1280  # None: no image tokens
    added_kv_proj_dim: int | None = 5120  # None: image and text tokens share projections and softmax
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None
    rope_temporal_skip_len: int = 8

    supported: ClassVar[Mapping[str, tuple]] = {
        "qk_norm": ("rms_norm_across_heads",),
        "pos_embed_seq_len": (None,),  # for first and last frame, which ChronoEdit does not take
    }

    def __post_init__(self):
        super().__post_init__()
        for name in (
            *(
                "num_attention_heads",
                "attention_head_dim",
                "in_channels",
                "text_dim",
                "ffn_dim",
                "num_layers",
            ),
            *("rope_max_seq_len", "rope_temporal_skip_len"),
        ):
            if self[name] < 1:
                raise self._error(name, "must be positive")
        if self.freq_dim < 2 or self.freq_dim % 2:
            raise self._error("freq_dim", "must be positive and even")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1 or self.patch_size[0] != 1:
            raise self._error("patch_size", "must be three positive numbers, the first of them 1")
        # In other widths the reference cuts its table at other columns than it made it from.
        if self.attention_head_dim % 2 or self.attention_head_dim % 6 > 2:
            raise self._error("attention_head_dim", "must be a multiple of 6, or 2 more")
        if self.added_kv_proj_dim is not None and self.added_kv_proj_dim != self.width:
            raise self._error("added_kv_proj_dim", f"must be the width {self.width}, or None")
        if self.added_kv_proj_dim is not None and self.image_dim is None:
            raise self._error("added_kv_proj_dim", "needs an image_dim")

    def _error(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {name}={self[name]!r} {wanted}")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Rotated channels of a head along frames, rows and columns."""
        third = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * third, third, third


class ChronoEditTransformerOutput(NamedTuple):
    """`sample`: the velocity, (B, out_channels, T, H, W)."""

    sample: Tensor


class ChronoEditTransformer3DModel(Network):
    """The denoiser of ChronoEdit: latents, timestep, prompt and CLIP tokens of the photograph to velocity."""

    Config = ChronoEditConfig
    table = "chronoedit_dit"
    relatives = frozenset({"WanTransformer3DModel"})  # as the published folder calls it
    # As the reference loads it; norm1 and norm3 of a block have no parameters, the image embedder's have.
    fp32_modules = frozenset({"time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"})
    recomputed_lists = frozenset({"blocks"})

    def __init__(self, config: ChronoEditConfig | None = None):
        super().__init__(config or ChronoEditConfig())
        c = self.config
        self.patch_embedding = PatchEmbed(c.in_channels, c.width, c.patch_size)
        self.condition_embedder = ConditionEmbedder(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.proj_out = Linear(c.width, (c.out_channels or c.in_channels) * math.prod(c.patch_size))
        self.scale_shift_table = modulation_table(2, c.width)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
    ) -> ChronoEditTransformerOutput | tuple[Tensor]:
        """Velocity of all frames, (B, out_channels, T, H, W) in the input's dtype.

        hidden_states (B, in_channels, T, H, W); timestep (B) or (1), in [0, 1000]; encoder_hidden_states
        (B, L, text_dim), any L; encoder_hidden_states_image (B, M, image_dim), or None for none. The result
        is `.sample` or, with return_dict=False, a 1-tuple. attention_kwargs: empty or {"scale": 1}; the
        strength of adapters is an argument of the pipeline. Raises ValueError for other keys and for shapes
        that do not fit.
        """
        if {"scale": 1, **(attention_kwargs or {})} != {"scale": 1}:
            raise ValueError(
                f"attention_kwargs={attention_kwargs}: only a scale of 1 is known here; the pipeline's call "
                "takes another strength of adapters"
            )
        if timestep.ndim > 1:
            raise ValueError(f"timestep {tuple(timestep.shape)}: wanted one, or one for each sample")
        rope = self.rope(self.token_grid(hidden_states), hidden_states.device)
        vec, text = self.embed_time(timestep.reshape(-1)), self.embed_text(encoder_hidden_states)
        has_image = encoder_hidden_states_image is not None
        image = self.embed_image(encoder_hidden_states_image) if has_image else None
        out = self.predict(hidden_states, vec, text, image, rope)
        return ChronoEditTransformerOutput(out) if return_dict else (out,)

    def predict(
        self, latents: Tensor, vec: Tensor, text: Context, image: Context | None, rope: Rope
    ) -> Tensor:
        """`predict_branches` of one branch: velocity (B, out_channels, T, H, W)."""
        return self.predict_branches(latents, vec, [text], image, rope)[0]

    def predict_branches(
        self,
        latents: Tensor,
        vec: Tensor,
        texts: Sequence[Context],
        image: Context | None,
        rope: Rope,
        caches: Sequence[BranchCache] | None = None,
    ) -> list[Tensor]:
        """Velocity under each text, (B, out_channels, T, H, W) in the dtype of the latents: the part of
        `forward` that every step repeats. The branches go through the blocks together, so that each block is
        visited once.

        latents (B, in_channels, T, H, W); vec (7, D) or (B or 1, 7, D) from `embed_time`; texts and image
        from `embed_text` and `embed_image`, of B samples or one for all; rope from `rope(token_grid)`;
        caches: one for each text, of a run that reuses what blocks added in earlier steps. Raises ValueError
        for latents that do not fit the network or the rotary table.
        """
        grid = self.token_grid(latents)
        if rope[0].shape[0] != math.prod(grid):
            raise ValueError(f"a rotary table of {rope[0].shape[0]} tokens does not fit the grid {grid}")
        vec = vec if vec.ndim == 3 else vec[None]
        img = self.patch_embedding(latents.to(self.activation_dtype(latents.device)))  # (B, N, D)
        found = self.denoise([img] * len(texts), texts, image, vec, rope, grid, caches)
        return [velocity.to(latents.dtype) for velocity in found]

    def denoise(
        self,
        imgs: list[Tensor],
        texts: Sequence[Context],
        image: Context | None,
        vec: Tensor,
        rope: Rope,
        grid: Grid,
        caches: Sequence[BranchCache] | None = None,
    ) -> list[Tensor]:
        """The blocks and the head: velocities, unpatchified, of tokens (B, N, D) under each text."""
        count = len(self.blocks)
        if caches is None:
            imgs = self.through(range(count), imgs, texts, image, vec, rope)
        else:
            begun = self.through(range(1), imgs, texts, image, vec, rope)

            def others(due: list[int]) -> list[Tensor]:
                some, read = [begun[i] for i in due], [texts[i] for i in due]
                return self.through(range(1, count), some, read, image, vec, rope)

            imgs = finished(caches, imgs, begun, others)
        shift, scale = (self.scale_shift_table + vec[:, 6:]).unbind(1)
        patches = (self.proj_out(ops.ada_layer_norm(x, shift, scale, self.config.eps)) for x in imgs)
        return [self.unpatchify(x, grid) for x in patches]

    def through(
        self,
        numbers: range,
        imgs: list[Tensor],
        texts: Sequence[Context],
        image: Context | None,
        vec: Tensor,
        rope: Rope,
    ) -> list[Tensor]:
        """The blocks with these numbers: tokens (B, N, D) of each text."""
        for i in numbers:
            block, seen = self.blocks[i], image[i] if image else None
            imgs = [block(x, vec[:, :6], text[i], seen, rope) for x, text in zip(imgs, texts, strict=True)]
        return imgs

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Modulation by timesteps in [0, 1000], of a batch or of a whole schedule at once. (S) -> (S, 7, D)
        fp32: six rows for the blocks, one for the head."""
        device = self.device
        return self.condition_embedder.embed_time(timesteps.to(device), self.activation_dtype(device))

    def embed_text(self, prompt_embeds: Tensor) -> Context:
        """K and V of a prompt in every block. (B, L, text_dim). Raises ValueError for another shape."""
        txt = self._checked("prompt", prompt_embeds, self.config.text_dim)
        txt = self.condition_embedder.text_embedder(txt)
        return self._in_blocks("embed_text", txt)

    def embed_image(self, image_embeds: Tensor) -> Context:
        """K and V of a photograph's CLIP tokens in every block; they serve all prompts about it.

        image_embeds (B, M, image_dim). Raises ValueError for another shape, and for a network without
        image_dim.
        """
        embedder = self.condition_embedder.image_embedder
        if embedder is None:
            raise ValueError("image embeddings were given, and this network has no image_dim")
        img = embedder(self._checked("image", image_embeds, self.config.image_dim))
        return self._in_blocks("embed_image", img)

    def _in_blocks(self, method: str, embeds: Tensor) -> Context:
        """K and V of every block. Where blocks are computed once more for a gradient, each makes its own, so
        that they are not kept for all blocks at once."""
        layers = [module for module in self.modules() if isinstance(module, CrossAttention)]
        if torch.is_grad_enabled() and self.is_gradient_checkpointing:
            return (embeds,) * len(layers)
        return tuple(getattr(layer, method)(embeds) for layer in layers)

    def _checked(self, what: str, embeds: Tensor, width: int) -> Tensor:
        if embeds.ndim != 3 or embeds.shape[-1] != width:
            raise ValueError(f"{what} embeddings {tuple(embeds.shape)}: wanted (B, tokens, {width})")
        return embeds.to(self.activation_dtype(embeds.device))

    def rope(self, grid: Grid, device: torch.device | str | None = None) -> Rope:
        """cos and sin of every token of the grid, each (N, E / 2) fp32, from angles in fp64.

        Two frames are first and last of a longer video: the second one is at rope_temporal_skip_len - 1.
        Raises ValueError for a grid longer than rope_max_seq_len.
        """
        c = self.config
        if max(grid) > c.rope_max_seq_len:
            raise ValueError(f"token grid {grid}: no axis may be longer than {c.rope_max_seq_len}")
        frames, rows, columns = (torch.arange(n, device="cpu") for n in grid)
        if grid[0] == 2:
            frames = frames * (min(c.rope_temporal_skip_len, c.rope_max_seq_len) - 1)
        index = torch.cartesian_prod(frames, rows, columns)  # (N, 3)
        axes = zip(index.unbind(1), c.rope_dims, strict=True)
        angles = torch.cat([axis_angles(at, dim, THETA, torch.float64) for at, dim in axes], dim=-1)
        # Made on the CPU, once per grid: not every device has fp64.
        device = device or self.device
        return angles.cos().float().to(device), angles.sin().float().to(device)

    def token_grid(self, latents: Tensor) -> Grid:
        """Frames, rows and columns of tokens. latents (B, in_channels, T, H, W).

        Raises ValueError for another rank or channel count, and sizes that are not multiples of the patch.
        """
        shape, channels = tuple(latents.shape), self.config.in_channels
        _, ph, pw = self.config.patch_size
        if len(shape) != 5 or shape[1] != channels:
            raise ValueError(f"latents {shape}: wanted (B, {channels}, T, H, W)")
        if shape[3] % ph or shape[4] % pw:
            raise ValueError(f"latents {shape}: height and width must be multiples of the patch {(ph, pw)}")
        return shape[2], shape[3] // ph, shape[4] // pw

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        """(B, N, ph * pw * C), channels fastest -> (B, C, T, H, W)."""
        frames, rows, columns = grid
        _, ph, pw = self.config.patch_size
        pattern = "b (t h w) (ph pw c) -> b c t (h ph) (w pw)"
        return rearrange(patches, pattern, t=frames, h=rows, w=columns, ph=ph, pw=pw).contiguous()

    def activation_dtype(self, device: torch.device) -> torch.dtype:
        return ops.compute_dtype(self.dtype, device)


class Block(nn.Module):
    """Attention over the video, attention to prompt and photograph, MLP."""

    def __init__(self, config: ChronoEditConfig):
        super().__init__()
        c, cross_attention = (
            config,
            CrossAttention if config.added_kv_proj_dim is None else ImageCrossAttention,
        )
        self.eps = c.eps
        self.attn1 = SelfAttention(c.width, c.num_attention_heads, c.eps)
        self.attn2 = cross_attention(c.width, c.num_attention_heads, c.eps)
        self.norm2 = GatedResidualNorm(c.width, c.eps) if c.cross_attn_norm else GatedResidual()
        self.ffn = FeedForward(c.width, c.ffn_dim)
        self.scale_shift_table = modulation_table(6, c.width)

    def forward(self, x: Tensor, vec: Tensor, text: Any, image: Any, rope: Rope) -> Tensor:
        """x (B, N, D), vec (B or 1, 6, D) fp32; text, image: of a Context -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + vec).unbind(1)
        attended = self.attn1(ops.ada_layer_norm(x, shift1, scale1, self.eps), rope)
        x, normed = self.norm2(x, attended, gate1)
        attended = self.attn2(normed, text, image)
        x, normed = ops.gate_residual_norm(x, attended, None, shift2, scale2, self.eps)
        return ops.gate_residual(x, self.ffn(normed), gate2)


class GatedResidualNorm(LayerNorm):
    """The gated residual before the cross-attention, and its norm, in one pass over both."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """x, y (B, N, D), gate (B or 1, D) -> x + gate * y, and its LayerNorm."""
        return ops.gate_residual_layer_norm(x, y, gate, self.weight, self.bias, self.eps)


class GatedResidual(nn.Module):
    """The same without a norm."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        x = ops.gate_residual(x, y, gate)
        return x, x


class SelfAttention(nn.Module):
    """q and k are normed over all heads together, then rotated head by head. `attend` is another function
    where tokens are divided among processes."""

    def __init__(self, width: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.attend = ops.attention
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.norm_q, self.norm_k = RMSNorm(width, eps), RMSNorm(width, eps)

    def forward(self, x: Tensor, rope: Rope) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = (heads(linear(x), self.num_heads) for linear in (self.to_q, self.to_k, self.to_v))
        q, k = ops.qk_norm_rope(q, k, self.norm_q.weight, self.norm_k.weight, rope, self.norm_q.eps)
        return self.to_out[0](self.attend(q, k, v).flatten(2))


class CrossAttention(nn.Module):
    """To text and image tokens alike, in one softmax."""

    def __init__(self, width: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_k, self.to_v = (Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([Linear(width, width)])
        self.norm_q, self.norm_k = RMSNorm(width, eps), RMSNorm(width, eps)

    def embed_text(self, txt: Tensor) -> KeyValue:
        """(B, L, D) -> k, v, each (B, L, H, E)."""
        return heads(self.norm_k(self.to_k(txt)), self.num_heads), heads(self.to_v(txt), self.num_heads)

    embed_image = embed_text  # (B, M, D) -> k, v, each (B, M, H, E)

    def forward(self, x: Tensor, text: Any, image: Any) -> Tensor:
        """x (B, N, D) -> (B, N, D). A text or image of one sample serves all."""
        q = heads(self.norm_q(self.to_q(x)), self.num_heads)
        plain = type(self)  # without what may stand before its methods when they are called from outside
        text = plain.embed_text(self, text) if isinstance(text, Tensor) else text
        image = plain.embed_image(self, image) if isinstance(image, Tensor) else image
        pairs = [pair for pair in (image, text) if pair is not None]
        parts = [tuple(t.expand(len(x), -1, -1, -1) for t in pair) for pair in pairs]
        return self.to_out[0](self.attend(q, *zip(*parts, strict=True)).flatten(2))

    def attend(self, q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
        return ops.attention(q, keys, values)


class ImageCrossAttention(CrossAttention):
    """To text and, with projections of their own, to image tokens; the two results are summed."""

    def __init__(self, width: int, num_heads: int, eps: float):
        super().__init__(width, num_heads, eps)
        self.add_k_proj, self.add_v_proj = Linear(width, width), Linear(width, width)
        self.norm_added_k = RMSNorm(width, eps)

    def embed_image(self, img: Tensor) -> KeyValue:
        k = heads(self.norm_added_k(self.add_k_proj(img)), self.num_heads)
        return k, heads(self.add_v_proj(img), self.num_heads)

    def attend(self, q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
        return ops.attention(q, keys, values, summed=True)


def heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, D) -> (B, N, H, E)."""
    return x.unflatten(-1, (num_heads, -1))


class PatchEmbed(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product over flattened patches."""

    def __init__(self, channels: int, width: int, patch_size: Grid):
        super().__init__(channels, width, patch_size, patch_size)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T, H, W) -> (B, N, D)."""
        _, ph, pw = self.kernel_size
        patches = rearrange(input, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=ph, pw=pw)
        return ops.linear(patches, self.weight.flatten(1), self.bias)


class ConditionEmbedder(nn.Module):
    """Timestep, prompt and CLIP tokens to the transformer's width."""

    def __init__(self, config: ChronoEditConfig):
        super().__init__()
        c = config
        self.freq_dim = c.freq_dim
        self.time_embedder = TimestepEmbedder(c.freq_dim, c.width)
        self.time_proj = Linear(c.width, 6 * c.width)
        self.text_embedder = TextEmbedder(c.text_dim, c.width)
        self.image_embedder = None if c.image_dim is None else ImageEmbedder(c.image_dim, c.width)

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """(S) -> (S, 7, D) fp32. The two small layers run in fp32, the large projection in `dtype`."""
        temb = self.time_embedder(sinusoidal_embedding(timesteps, self.freq_dim))
        vec = self.time_proj(F.silu(temb.to(dtype))).float().unflatten(-1, (6, -1))
        return torch.cat((vec, temb[:, None]), dim=1)


class TextEmbedder(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, text_dim: int, width: int):
        super().__init__()
        self.linear_1 = Linear(text_dim, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(ops.linear_gelu(x, self.linear_1.weight, self.linear_1.bias))


class ImageEmbedder(nn.Module):
    """LayerNorm, Linear, exact GELU, Linear, LayerNorm."""

    def __init__(self, image_dim: int, width: int):
        super().__init__()
        self.norm1 = LayerNorm(image_dim, IMAGE_NORM_EPS)
        self.ff = ImageFeedForward(image_dim, width)
        self.norm2 = LayerNorm(width, IMAGE_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.ff(self.norm1(x)))


class ImageFeedForward(nn.Module):
    """Unlike `layers.FeedForward`, with the exact GELU and to another width."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.net = nn.ModuleList([ImageProjection(dim), nn.Identity(), Linear(dim, out_dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class ImageProjection(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x))


def modulation_table(rows: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(1, rows, width), std=width**-0.5))
