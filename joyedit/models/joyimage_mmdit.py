"""JoyAI-Image-Edit MMDiT.

Double-stream transformer over latent tokens (target first, then references) and Qwen3-VL prompt tokens. Every
block modulates both streams from one timestep vector plus a learned table of its own, attends over [img, txt]
jointly, and runs one MLP per stream. Only image tokens have a position; the items of one edit (target,
reference 1, ...) are told apart by the frame axis of the rotary embedding and nothing else.

`forward` is the whole network on all items. An edit calls its pieces instead, so that nothing is computed
twice or thrown away: the prompt, all timesteps, the references and the rotary table once per run
(`embed_text`, `embed_time`, `embed_image`, `rope`), and per step `predict_branches`, which takes all branches
of the guidance through each block in turn, and whose last block and head see target tokens only. To change
the attention, change `JointAttention`.

Edit and Edit-Plus are this network with weights of their own. Of Plus, references have sizes of their own:
`rope` and `predict_branches` take a list of grids, the target's and one of each reference.

B batch   I items   C latent channels   T frames   N image tokens   M target tokens, the first M of N
L text tokens   D width   H heads   E = D / H
Source: diffusers `transformer_joyimage.py`, `transformer_joyimage_edit_plus.py`; arXiv 2605.04128.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from joyedit import ops
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.network import Network
from joyedit.models.layers import FeedForward, Linear, RMSNorm, TimestepEmbedder, sinusoidal_embedding
from joyedit.models.rope import grid_rope
from joyedit.step_cache import BranchCache, finished

Rope = tuple[Tensor, Tensor]  # cos, sin, each (N, E / 2)
Grid = tuple[int, int, int]  # frames (all items together), rows and columns of the token grid
Grids = Grid | list[Grid]  # one, or several after one another, each of a size of its own
Places = tuple[Any, ...] | None  # where q, k and v are written; None: to fresh tensors
Streams = tuple[Tensor, Tensor]  # image tokens (B, N, D), text tokens (B, L, D)

TIME_CHANNELS = 256  # width of the sinusoidal timestep embedding


@dataclasses.dataclass(frozen=True)
class JoyImageEditConfig(Config):
    """Settings of the MMDiT; the defaults are the released JoyAI-Image-Edit's.

    Raises ValueError for a head width that does not fit `rope_dim_list`, and for unsupported values.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    out_channels: int | None = 16  # None: as many as in_channels
    hidden_size: int = 4096
    num_attention_heads: int = 32
    text_dim: int = 4096
    mlp_width_ratio: float = 4.0
    num_layers: int = 40
    rope_dim_list: tuple[int, int, int] | None = (16, 56, 56)  # None: a third of the head width each
    rope_type: str = "rope"
    theta: float = 10000

    aliases: ClassVar[Mapping[str, str]] = {
        "heads_num": "num_attention_heads",
        "mm_double_blocks_depth": "num_layers",
        "text_states_dim": "text_dim",
        "rope_theta": "theta",
    }
    # Early spellings that name the only variant there is; another value would be another network.
    early: ClassVar[Mapping[str, Any]] = {"dit_modulation_type": "wanx", "unpatchify_new": True}
    ignored: ClassVar[frozenset[str]] = frozenset(
        {"attn_backend", "is_repa", "repa_layer", "enable_activation_checkpointing", *early}
    )
    supported: ClassVar[Mapping[str, tuple]] = {"rope_type": ("rope",)}  # "mrope" was never trained

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        for key, wanted in cls.early.items():
            if raw.get(key, wanted) != wanted:
                raise ValueError(f"{cls.__name__}: {key}={raw[key]!r} is not supported, only {wanted!r}")
        return super().from_dict(raw)

    def __post_init__(self):
        super().__post_init__()
        for name in ("hidden_size", "num_attention_heads", "num_layers", "in_channels", "text_dim"):
            if self[name] < 1:
                raise ValueError(f"{type(self).__name__}: {name}={self[name]!r} must be positive")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(
                f"{type(self).__name__}: patch_size={self.patch_size!r} must be three positive numbers"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"{type(self).__name__}: hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        dims = self.rope_dims
        if len(dims) != 3 or any(dim % 2 or dim < 0 for dim in dims) or sum(dims) != self.head_dim:
            raise ValueError(
                f"{type(self).__name__}: rope_dim_list={self.rope_dim_list!r} must be three even numbers "
                f"whose sum is the head width {self.head_dim}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rope_dims(self) -> tuple[int, int, int]:
        """Rotated channels of a head along frames, rows and columns."""
        third = self.head_dim // 3
        return (third, third, third) if self.rope_dim_list is None else self.rope_dim_list


class JoyImageTransformerOutput(NamedTuple):
    """`sample`: the velocity of every item, in the rank, shape and order of the input."""

    sample: Tensor


class JoyImageEditTransformer3DModel(Network):
    """The denoiser of JoyAI-Image-Edit: latents of target and references, timestep, prompt to velocities."""

    Config = JoyImageEditConfig
    table = "joyimage_mmdit"
    relatives = frozenset({"JoyImageEditPlusTransformer3DModel"})  # as folders of Edit-Plus call it
    # As the reference loads it: neighbouring timesteps differ by less than bf16 resolves.
    fp32_modules = frozenset({"time_embedder"})
    recomputed_lists = frozenset({"double_blocks"})

    def __init__(self, config: JoyImageEditConfig | None = None):
        super().__init__(config or JoyImageEditConfig())
        c = self.config
        width = c.hidden_size
        self.img_in = PatchEmbed(c.in_channels, width, c.patch_size)
        self.condition_embedder = ConditionEmbedder(width, c.text_dim)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(width, c.num_attention_heads, int(width * c.mlp_width_ratio))
            for _ in range(c.num_layers)
        )
        self.proj_out = Linear(width, (c.out_channels or c.in_channels) * math.prod(c.patch_size))

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> JoyImageTransformerOutput | tuple[Tensor]:
        """Velocities of all items.

        hidden_states (B, I, C, T, H, W): references first, the noisy target last; or (B, C, T, H, W), one
        item. timestep (B) or (1), in [0, 1000]; encoder_hidden_states (B, L, text_dim). Returns the input's
        rank and dtype, as `.sample` or, with return_dict=False, as a 1-tuple. Raises ValueError for shapes
        that do not fit.
        """
        items = hidden_states if hidden_states.ndim == 6 else hidden_states[:, None]
        items = items.roll(1, dims=1)  # the target goes first, to frame 0 of the rotary grid
        grid = self.token_grid(items)
        img = self.embed_image(items)
        txt, vec = self.embed_text(encoder_hidden_states), self.embed_time(timestep)
        rope = self.rope(grid, img.device)
        (out,) = self.denoise([(img, txt)], img.shape[1], vec, rope, grid)  # (B, C, I * T, H, W)
        out = rearrange(out, "b c (i t) h w -> b i c t h w", i=items.shape[1]).roll(-1, dims=1)
        out = (out if hidden_states.ndim == 6 else out[:, 0]).to(hidden_states.dtype)
        return JoyImageTransformerOutput(out) if return_dict else (out,)

    def predict_target(
        self, target: Tensor, reference: Tensor | None, txt: Tensor, vec: Tensor, rope: Rope, grid: Grids
    ) -> Tensor:
        """`predict_branches` of one branch: velocity of the target, (B, C, T, H, W)."""
        return self.predict_branches(target, reference, [txt], vec, rope, grid)[0]

    def predict_branches(
        self,
        target: Tensor | Sequence[Tensor],
        references: Tensor | Sequence[Tensor | None] | None,
        texts: Sequence[Tensor],
        vec: Tensor,
        rope: Rope,
        grid: Grids,
        caches: Sequence[BranchCache] | None = None,
    ) -> list[Tensor]:
        """Velocity of the target alone under each text, (B, C, T, H, W) in the dtype of its tokens: its part
        of `forward`. The branches go through the blocks together, so that each block is visited once.

        target (B, M, D) and references (B, N - M, D) or None, from `embed_image`: one for all texts, or one
        for each; texts (B, L, D) each, of any lengths, from `embed_text`; vec (6, D) or (B or 1, 6, D) from
        `embed_time`; rope from `rope(grid)`; grid: of target and references together, or the target's and
        those of the references in a list; caches: one for each text, of a run that reuses what blocks added
        in earlier steps. Raises ValueError when the tokens do not fill the grid.
        """
        targets = one_for_each(target, len(texts))
        branches = []
        for img, reference, txt in zip(targets, one_for_each(references, len(texts)), texts, strict=True):
            img = img if reference is None else torch.cat((img, reference), dim=1)
            if img.shape[1] != sum(map(math.prod, grids_of(grid))):
                raise ValueError(f"{img.shape[1]} image tokens do not fill the grid {grid}")
            branches.append((img, txt))
        return self.denoise(branches, targets[0].shape[1], vec, rope, grid, caches) if branches else []

    def denoise(
        self,
        branches: list[Streams],
        num_targets: int,
        vec: Tensor,
        rope: Rope,
        grid: Grids,
        caches: Sequence[BranchCache] | None = None,
    ) -> list[Tensor]:
        """The blocks and the head: of each branch the velocities of the first M = num_targets of N image
        tokens, unpatchified. Of several grids those tokens are of the first.

        Of the last block and the head, only what those tokens need is computed.
        """
        vec = vec if vec.ndim == 3 else vec[None]
        first, *others = self.double_blocks
        if caches is None or not others:
            targets = self.through([first, *others], branches, num_targets, vec, rope)
        else:
            begun = [first(img, txt, vec, rope) for img, txt in branches]
            before, after = ([img[:, :num_targets] for img, _ in streams] for streams in (branches, begun))

            def rest(due: list[int]) -> list[Tensor]:
                return self.through(others, [begun[i] for i in due], num_targets, vec, rope)

            targets = finished(caches, before, after, rest)
        return [self.unpatchify(self.proj_out(ops.layer_norm(x)), grids_of(grid)[0]) for x in targets]

    def through(
        self,
        blocks: Sequence[nn.Module],
        branches: list[Streams],
        num_targets: int,
        vec: Tensor,
        rope: Rope,
    ) -> list[Tensor]:
        """Blocks, of which the last gives the targets' tokens alone: (B, M, D) of each branch."""
        for block in blocks[:-1]:
            branches = [block(img, txt, vec, rope) for img, txt in branches]
        return [blocks[-1](img, txt, vec, rope, num_targets)[0] for img, txt in branches]

    def embed_image(self, latents: Tensor) -> Tensor:
        """(B, I, C, T, H, W) or (B, C, T, H, W) -> (B, N, D), item after item in the order given.

        Raises ValueError as `token_grid` does.
        """
        items = latents if latents.ndim == 6 else latents[:, None]
        self.token_grid(items)
        return self.img_in(items.to(self.activation_dtype(items.device)))

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """(B, L, text_dim) -> (B, L, D). Raises ValueError for another width."""
        if prompt_embeds.ndim != 3 or prompt_embeds.shape[-1] != self.config.text_dim:
            raise ValueError(
                f"prompt embeddings {tuple(prompt_embeds.shape)}: wanted (B, L, {self.config.text_dim})"
            )
        return self.condition_embedder.text_embedder(
            prompt_embeds.to(self.activation_dtype(prompt_embeds.device))
        )

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Timesteps in [0, 1000], of a batch or of a whole schedule at once. (S) -> (S, 6, D) fp32."""
        device = self.device
        return self.condition_embedder.embed_time(timesteps.to(device), self.activation_dtype(device))

    def rope(self, grid: Grids, device: torch.device | str | None = None) -> Rope:
        """cos and sin of every image token, each (N, E / 2) fp32. Of several grids each begins with the frame
        after the last one of the grid before it; rows and columns count from 0 in each."""
        dims, theta, first, tables = self.config.rope_dims, self.config.theta, 0, []
        for one in grids_of(grid):
            tables.append(grid_rope(one, dims, theta, device or self.device, first))
            first += one[0]
        cos, sin = zip(*tables, strict=True)
        return torch.cat(cos), torch.cat(sin)

    def token_grid(self, latents: Tensor) -> Grid:
        """Frames, rows and columns of tokens of all items together. (B, I, C, T, H, W) or (B, C, T, H, W).

        Raises ValueError for another rank or channel count, sizes that are not multiples of the patch, and
        several items with a patch that spans frames.
        """
        shape = tuple(latents.shape)
        patch = self.config.patch_size
        if len(shape) not in (5, 6) or shape[-4] != self.config.in_channels:
            c = self.config.in_channels
            raise ValueError(f"latents {shape}: wanted (B, {c}, T, H, W) or (B, items, {c}, T, H, W)")
        items = shape[1] if len(shape) == 6 else 1
        if items > 1 and patch[0] != 1:
            raise ValueError(f"{items} items need patch_size[0] == 1, this network has {patch}")
        if any(size % p for size, p in zip(shape[-3:], patch, strict=True)):
            raise ValueError(
                f"latents {shape}: frames, height and width must be multiples of the patch {patch}"
            )
        frames, rows, columns = (size // p for size, p in zip(shape[-3:], patch, strict=True))
        return items * frames, rows, columns

    def unpatchify(self, patches: Tensor, grid: Grid) -> Tensor:
        """(B, M, pt * ph * pw * C), channels fastest -> (B, C, T, H, W), as many frames as M tokens fill."""
        _, rows, columns = grid
        pt, ph, pw = self.config.patch_size
        pattern = "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)"
        return rearrange(patches, pattern, h=rows, w=columns, pt=pt, ph=ph, pw=pw).contiguous()

    def activation_dtype(self, device: torch.device) -> torch.dtype:
        return ops.compute_dtype(self.dtype, device)


JoyImageEditPlusTransformer3DModel = JoyImageEditTransformer3DModel  # its name in diffusers


class DoubleStreamBlock(nn.Module):
    """Joint attention and one MLP per stream, each on a modulated LayerNorm and added through a gate."""

    def __init__(self, width: int, num_heads: int, hidden_width: int):
        super().__init__()
        self.img_mod = Modulation(width)
        self.img_mlp = FeedForward(width, hidden_width)
        self.txt_mod = Modulation(width)
        self.txt_mlp = FeedForward(width, hidden_width)
        self.attn = JointAttention(width, num_heads)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope, num_targets: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """img (B, N, D), txt (B, L, D), vec (B or 1, 6, D) -> img, txt.

        With num_targets = M, only the first M image tokens are brought forward, (B, M, D), and txt is not.
        """
        if num_targets is not None:
            return self.forward_target(img, txt, vec, rope, num_targets), txt
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)

        img_attn, txt_attn = self.attn(
            ops.ada_layer_norm(img, img_shift1, img_scale1),
            ops.ada_layer_norm(txt, txt_shift1, txt_scale1),
            rope,
        )
        img, img_normed = ops.gate_residual_norm(img, img_attn, img_gate1, img_shift2, img_scale2)
        txt, txt_normed = ops.gate_residual_norm(txt, txt_attn, txt_gate1, txt_shift2, txt_scale2)

        img = ops.gate_residual(img, self.img_mlp(img_normed), img_gate2)
        txt = ops.gate_residual(txt, self.txt_mlp(txt_normed), txt_gate2)
        return img, txt

    def forward_target(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Rope, num_targets: int) -> Tensor:
        """The first M = num_targets image tokens after this block, (B, M, D): all the last one is for."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, *_ = self.txt_mod(vec)

        attn = self.attn.forward_target(
            ops.ada_layer_norm(img, shift1, scale1),
            ops.ada_layer_norm(txt, txt_shift1, txt_scale1),
            rope,
            num_targets,
        )
        img, normed = ops.gate_residual_norm(img[:, :num_targets], attn, gate1, shift2, scale2)
        return ops.gate_residual(img, self.img_mlp(normed), gate2)


class JointAttention(nn.Module):
    """Attention of all tokens over [img, txt]; each stream has its own projections and norms of q and k.

    `attend` is another function where tokens are divided among processes.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.attend = ops.attention
        self.img_attn_qkv = Linear(width, 3 * width)
        self.img_attn_q_norm = RMSNorm(width // num_heads)
        self.img_attn_k_norm = RMSNorm(width // num_heads)
        self.img_attn_proj = Linear(width, width)
        self.txt_attn_qkv = Linear(width, 3 * width)
        self.txt_attn_q_norm = RMSNorm(width // num_heads)
        self.txt_attn_k_norm = RMSNorm(width // num_heads)
        self.txt_attn_proj = Linear(width, width)

    def forward(self, img: Tensor, txt: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """img (B, N, D), txt (B, L, D) -> the same shapes."""
        img_out, txt_out = ops.joint_buffers(3, img, txt, self.num_heads)
        img_q, img_k, img_v = self.project(self.img_attn_qkv, img, img_out)
        txt_q, txt_k, txt_v = self.project(self.txt_attn_qkv, txt, txt_out)
        img_q, img_k = self.norm_img(img_q, img_k, rope, img_out)
        txt_q, txt_k = self.norm_txt(txt_q, txt_k, txt_out)

        out = self.attend((img_q, txt_q), (img_k, txt_k), (img_v, txt_v)).flatten(2)  # (B, N + L, D)
        img_attn, txt_attn = out.split((img.shape[1], txt.shape[1]), dim=1)
        return self.img_attn_proj(img_attn), self.txt_attn_proj(txt_attn)

    def forward_target(self, img: Tensor, txt: Tensor, rope: Rope, num_targets: int) -> Tensor:
        """As `forward`, when only the first M = num_targets image tokens ask. -> (B, M, D)."""
        img_out, txt_out = ops.joint_buffers(2, img, txt, self.num_heads)
        q, img_k, img_v = self.project(self.img_attn_qkv, img, img_out, num_targets)
        no_q, txt_k, txt_v = self.project(self.txt_attn_qkv, txt, txt_out, 0)
        q, img_k = self.norm_img(q, img_k, rope, img_out and (None, *img_out))
        _, txt_k = self.norm_txt(no_q, txt_k, txt_out and (None, *txt_out))

        out = self.attend(q, (img_k, txt_k), (img_v, txt_v)).flatten(2)  # (B, M, D)
        return self.img_attn_proj(out)

    def project(
        self, qkv: Linear, x: Tensor, out: Places, num_queries: int | None = None
    ) -> tuple[Tensor, ...]:
        """q of the first `num_queries` tokens (None: of all), k and v of all, each (B, N, H, E). x (B, N, D).

        Where the results have places, v is written to its own, the last one.
        """
        if out is None and num_queries is None:
            return self.heads(qkv(x))
        weight, bias, d = qkv.weight, qkv.bias, x.shape[-1]  # read once: reading adds adapters to them
        assert bias is not None
        if num_queries is None:
            q, k = self.heads(ops.linear(x, weight[: 2 * d], bias[: 2 * d]))
        else:
            (q,) = self.heads(ops.linear(x[:, :num_queries], weight[:d], bias[:d]))
            (k,) = self.heads(ops.linear(x, weight[d : 2 * d], bias[d : 2 * d]))
        if out is None:
            return q, k, *self.heads(ops.linear(x, weight[2 * d :], bias[2 * d :]))
        return q, k, ops.linear_into(out[-1], x, weight[2 * d :], bias[2 * d :])

    def norm_img(self, q: Tensor, k: Tensor, rope: Rope, out: Places) -> tuple[Tensor, Tensor]:
        q_norm, k_norm = self.img_attn_q_norm, self.img_attn_k_norm
        return ops.qk_norm_rope(q, k, q_norm.weight, k_norm.weight, rope, out=out and out[:2])

    def norm_txt(self, q: Tensor, k: Tensor, out: Places) -> tuple[Tensor, Tensor]:
        q_norm, k_norm = self.txt_attn_q_norm, self.txt_attn_k_norm
        return ops.qk_norm_rope(q, k, q_norm.weight, k_norm.weight, None, out=out and out[:2])

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, N, P * D) -> P views (B, N, H, E)."""
        return rearrange(
            x, "b n (p h e) -> p b n h e", h=self.num_heads, e=self.img_attn_q_norm.weight.shape[0]
        ).unbind()


class Modulation(nn.Module):
    """A block's own offset to the timestep conditioning of one stream."""

    def __init__(self, width: int):
        super().__init__()
        self.modulate_table = nn.Parameter(torch.zeros(1, 6, width))

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        """vec (B or 1, 6, D) -> shift, scale, gate of the attention, then of the MLP, each (B or 1, D)."""
        return (self.modulate_table + vec).unbind(1)


class PatchEmbed(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product over flattened patches."""

    def __init__(self, channels: int, width: int, patch_size: Grid):
        super().__init__(channels, width, patch_size, patch_size)

    def forward(self, input: Tensor) -> Tensor:
        """(B, I, C, T, H, W) -> (B, N, D)."""
        pt, ph, pw = self.kernel_size
        pattern = "b i c (t pt) (h ph) (w pw) -> b (i t h w) (c pt ph pw)"
        patches = rearrange(input, pattern, pt=pt, ph=ph, pw=pw)
        return ops.linear(patches, self.weight.flatten(1), self.bias)


class ConditionEmbedder(nn.Module):
    """Timestep and prompt to the transformer's width."""

    def __init__(self, width: int, text_dim: int):
        super().__init__()
        self.time_embedder = TimestepEmbedder(TIME_CHANNELS, width)
        self.time_proj = Linear(width, 6 * width)
        self.text_embedder = TextEmbedder(text_dim, width)

    def embed_time(self, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
        """(S) -> (S, 6, D). The two small layers run in fp32, the large projection in `dtype`.

        The result is fp32 again, so that its sum with a block's table is not rounded before it is used.
        """
        temb = self.time_embedder(sinusoidal_embedding(timesteps, TIME_CHANNELS)).to(dtype)
        return self.time_proj(F.silu(temb)).float().unflatten(-1, (6, -1))


class TextEmbedder(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, text_dim: int, width: int):
        super().__init__()
        self.linear_1 = Linear(text_dim, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(ops.linear_gelu(x, self.linear_1.weight, self.linear_1.bias))


def grids_of(grid: Grids) -> list[Grid]:
    """As a list: one, or those that there are."""
    return grid if isinstance(grid, list) else [grid]


def one_for_each(given: Any, count: int) -> list[Any]:
    """`given`, if it is a list or a tuple, else as often as there are branches."""
    return list(given) if isinstance(given, (list, tuple)) else [given] * count
