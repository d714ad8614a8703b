"""Qwen3-VL: a vision tower and a language model, joined at several depths.

The vision tower turns each image into tokens that replace the <|image_pad|> tokens of the prompt; features
from three of its earlier blocks are added to the same tokens after the first decoder layers (DeepStack). The
rotary position of a token has three parts (time, row, column) whose frequencies are interleaved (MRoPE).

The diffusion networks read the output of the last decoder layer *before* the final RMSNorm: `hidden_states`.
Neither that norm nor `lm_head` takes part in it, so of a mapped file the 1.2 GB of `lm_head.weight` are never
read. Prompts that begin alike, say a positive and a negative one about one picture, share a `prefill`. An
answer goes on from one token by token, with `next_logits`, which take both.

B prompts   L tokens   P tokens of a cached prefix   D width   H heads (G for keys and values)   E head width
N patches of all images, one image after another   M = N / 4 image tokens   gh, gw patches down and across
Source: transformers `models/qwen3_vl`; DeepStack, arXiv 2406.04334; Qwen3-VL report, arXiv 2511.21631.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from joyedit import ops
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.encoder_spellings import answer, check_unused
from joyedit.checkpoints.hub import GENERATION_FILE
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.network import Network
from joyedit.checkpoints.plain_text import shown
from joyedit.models.layers import LayerNorm, Linear, RMSNorm
from joyedit.models.rope import axis_angles


@dataclass(frozen=True)
class RopeScaling(Config):
    """Which of the three positions each rotary frequency of the language model turns by."""

    rope_type: str = "default"
    mrope_section: tuple[int, ...] = (24, 20, 20)  # frequencies of time, row, column
    mrope_interleaved: bool = True

    aliases = {"type": "rope_type"}
    supported = {"rope_type": ("default",), "mrope_interleaved": (True,)}
    keeps_unknown = True


@dataclass(frozen=True)
class Qwen3VLTextConfig(Config):
    """The language model; defaults of the 8B."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5_000_000
    rope_scaling: RopeScaling = RopeScaling()
    attention_bias: bool = False
    max_position_embeddings: int = 262144
    bos_token_id: int | None = 151643
    eos_token_id: int | None = 151645
    dtype: str | None = "bfloat16"
    model_type: str = "qwen3_vl_text"

    aliases = {"torch_dtype": "dtype"}
    supported = {"hidden_act": ("silu",), "attention_bias": (False,), "model_type": ("qwen3_vl_text",)}
    keeps_unknown = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Also takes `rope_parameters` of transformers 5, which itself reads the fields of 4.57 used here."""
        values = {key: value for key, value in raw.items() if key != "rope_parameters"}
        rope = dict(raw.get("rope_parameters") or {})
        if "rope_theta" in rope:
            values["rope_theta"] = rope.pop("rope_theta")
        if rope:
            values["rope_scaling"] = rope
        if values.get("rope_scaling") is None:
            values.pop("rope_scaling", None)
        return super().from_dict(values)


@dataclass(frozen=True)
class VisionRope(Config):
    """Rotary positions of the vision tower; published files leave them out."""

    rope_theta: float = 10_000.0
    rope_type: str = "axial"

    supported = {"rope_type": ("axial",)}
    keeps_unknown = True


@dataclass(frozen=True)
class Qwen3VLVisionConfig(Config):
    """The vision tower; defaults of the 8B."""

    depth: int = 27
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_heads: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    out_hidden_size: int = 4096
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    rope_parameters: VisionRope = VisionRope()
    dtype: str | None = "bfloat16"
    model_type: str = "qwen3_vl"

    aliases = {"torch_dtype": "dtype"}
    supported = {"hidden_act": ("gelu_pytorch_tanh",), "model_type": ("qwen3_vl", "qwen3_vl_vision")}
    keeps_unknown = True

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        return super().from_dict({k: v for k, v in raw.items() if k != "rope_parameters" or v is not None})


@dataclass(frozen=True)
class Qwen3VLConfig(Config):
    """Qwen3-VL 8B, as in JoyAI-Image-Edit."""

    text_config: Qwen3VLTextConfig = Qwen3VLTextConfig()
    vision_config: Qwen3VLVisionConfig = Qwen3VLVisionConfig()
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    tie_word_embeddings: bool = False
    architectures: tuple[str, ...] | None = ("Qwen3VLForConditionalGeneration",)
    dtype: str | None = "bfloat16"
    model_type: str = "qwen3_vl"

    aliases = {"torch_dtype": "dtype"}
    supported = {"tie_word_embeddings": (False,), "model_type": ("qwen3_vl",)}
    keeps_unknown = True


class ImageFeatures(NamedTuple):
    """The images of a batch of prompts, in the order in which the prompts name them."""

    embeds: Tensor  # (M, D), in the place of the image tokens
    deepstack: tuple[Tensor, ...]  # each (M, D), added after decoder layer 0, 1, ...
    grid_thw: Tensor  # (images, 3): 1, gh, gw


class Prefix(NamedTuple):
    """The beginning of one or several prompts, already read."""

    states: Tensor  # (B, P - keep_from, D), as `hidden_states` returns them
    keys_values: list[tuple[Tensor, Tensor]]  # per layer, each (B, P, G, E)
    next_position: Tensor  # (B,), where the text goes on
    has_images: bool


class Logits(NamedTuple):
    logits: Tensor  # (B, L, vocabulary), of the next token


class Qwen3VLForConditionalGeneration(Network):
    Config = Qwen3VLConfig
    table = "qwen3_vl"
    weights_stem = "model"
    library = "transformers"
    mapped_modules = frozenset({"lm_head"})  # 1.2 GB that prompt embeddings never read

    def __init__(self, config: Qwen3VLConfig | None = None):
        config = config or Qwen3VLConfig()
        super().__init__(config)
        self.model = Towers(config)
        self.lm_head = Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.generation: Mapping[str, Any] = {}  # what generation_config.json says

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> ImageFeatures:
        """Run the vision tower.

        pixel_values (N, 1536): flattened patches, each (channel, time, row, column) in [-1, 1], ordered by
        2 x 2 blocks. grid_thw (images, 3) long: 1, gh, gw. The features are in the dtype of the computation.
        Raises ValueError when rows and grids do not fit one another, or for video.
        """
        vision = self.config.vision_config
        merge = vision.spatial_merge_size
        grids = []
        for t, gh, gw in grid_thw.tolist():
            if t != 1 or gh % merge or gw % merge:
                raise ValueError(
                    f"grid_thw {(t, gh, gw)}: must be 1 and two multiples of {merge}; stills only"
                )
            grids.append((gh, gw))
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        rows = sum(gh * gw for gh, gw in grids)
        if pixel_values.shape != (rows, width):
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)}: the grids {grids} need {(rows, width)}"
            )
        dtype = ops.compute_dtype(self.dtype, pixel_values.device)
        embeds, deepstack = self.model.visual(pixel_values.to(dtype), grids)
        return ImageFeatures(embeds, deepstack, grid_thw)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: ImageFeatures | None = None,
        prefix: Prefix | None = None,
        keep_from: int = 0,
    ) -> Tensor:
        """Output of the last decoder layer before the final norm.

        Returns (B, L - keep_from, D) in the dtype of the weights. input_ids (B, L). attention_mask (B, L),
        nonzero at valid tokens, right padded; it decides nothing but the rows of the padding, which see the
        valid tokens only, as in the reference. `images`: those that input_ids names. `prefix` comes before
        input_ids; a prefix of one row serves any number of rows.
        `keep_from`: leave out the states of that many first tokens. The value is what a forward hook on the
        last layer sees: with no more layers than DeepStack features, the last feature is not in it. Raises
        ValueError when the image tokens do not match the images or the padding is not on the right.
        """
        return self._decode(input_ids, attention_mask, images, prefix, keep_from).to(self.dtype)

    def prefill(
        self,
        input_ids: Tensor,
        images: ImageFeatures | None = None,
        keep_from: int = 0,
        prefix: Prefix | None = None,
    ) -> Prefix:
        """Read the beginning that prompts share: input_ids (B, P), no padding, after what `prefix` has read.
        Continue with `hidden_states`; `cat((prefix.states, states), 1)` is what the whole prompts give."""
        cache: list[tuple[Tensor, Tensor]] = []
        states = self._decode(input_ids, None, images, prefix, keep_from, cache).to(self.dtype)
        after = self.position_ids(input_ids, images.grid_thw if images else None).amax(dim=(0, 2)) + 1
        if prefix is None:
            return Prefix(states, cache, after, images is not None)
        has_images = prefix.has_images or images is not None
        return Prefix(states, cache, prefix.next_position + after, has_images)

    def next_logits(self, states: Tensor, head: Tensor) -> Tensor:
        """Logits (B, L, vocabulary) of the token after each that `prefill` or `hidden_states` gave the states
        of, (B, L, D); not after an image token, where there are no more layers than DeepStack features.

        head: `lm_head.weight`, on the device of the states. It is 1.2 GB that stay in main memory, so who
        asks for many tokens brings it there once. The logits are in the dtype of the computation.
        """
        x = states.to(ops.compute_dtype(self.dtype, states.device))
        return ops.linear(self.model.language_model.norm(x), head)

    def position_ids(
        self, input_ids: Tensor, grid_thw: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """(3, B, L) long: the time, row and column of each token; see `mrope_position_ids`."""
        merge = self.config.vision_config.spatial_merge_size
        return mrope_position_ids(input_ids, self.config.image_token_id, merge, grid_thw, attention_mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        mm_token_type_ids: Any = None,
        **unused: Any,
    ) -> Logits:
        """Logits of the next token; arguments as of `hidden_states` and `encode_images`. Which tokens stand
        for images is read from input_ids, not from mm_token_type_ids.

        output_hidden_states=True adds `hidden_states`: the embeddings, the outputs of all layers but the last
        without DeepStack features, and the normed output of the last.
        """
        check_unused(unused)
        images = None
        if pixel_values is not None:
            if image_grid_thw is None:
                raise ValueError("pixel_values need image_grid_thw")
            images = self.encode_images(pixel_values, image_grid_thw)
        kept: list[Tensor] | None = [] if output_hidden_states else None
        x = self._decode(input_ids, attention_mask, images, kept=kept)
        text = self.model.language_model
        if images and len(text.layers) <= len(images.deepstack):
            x = add_at(x, input_ids == self.config.image_token_id, images.deepstack[len(text.layers) - 1])
        x = text.norm(x)
        logits = ops.linear(x, self.lm_head.weight.to(x.device))
        states = kept and [state.to(self.dtype) for state in (*kept, x)]
        return answer(Logits(logits.to(self.dtype)), states, return_dict)

    def _decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: ImageFeatures | None = None,
        prefix: Prefix | None = None,
        keep_from: int = 0,
        cache: list[tuple[Tensor, Tensor]] | None = None,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """States of `hidden_states` in the dtype of the computation; `cache` collects the keys and values,
        `kept` the inputs of the layers, without DeepStack features."""
        mask = None if attention_mask is None else valid_tokens(attention_mask)
        text, config = self.model.language_model, self.config.text_config
        positions = self.position_ids(input_ids, images.grid_thw if images else None, mask)
        if prefix is not None:
            positions = positions + prefix.next_position[:, None]
            if mask is not None and (images or prefix.has_images):
                positions = positions.masked_fill(~mask, 0)
        x = text.embed_tokens(input_ids).to(ops.compute_dtype(self.dtype, input_ids.device))
        places = input_ids == self.config.image_token_id
        if images is not None:
            x = x.masked_scatter(places[..., None], images.embeds.to(x.dtype))
        rope = mrope(positions, config.head_dim, config.rope_theta, config.rope_scaling.mrope_section)
        past = prefix.keys_values if prefix else None
        visible = None if mask is None else visibility(mask, past[0][0].shape[1] if past else 0)
        deepstack = images.deepstack if images else ()
        return text(x, rope, visible, places, deepstack, past, keep_from, cache, kept)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer, as far as the checkpoint says it."""
        ends = self.generation.get("eos_token_id")
        return () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)

    def read_beside(self, folder: Path) -> None:
        """Takes generation_config.json. Raises ValueError where its eos_token_id is no token."""
        path = folder / GENERATION_FILE
        self.generation = read_json(path) if path.is_file() else {}
        size = self.config.text_config.vocab_size
        if any(type(token) is not int or not 0 <= token < size for token in self.stop_tokens):
            ends = shown(self.generation["eos_token_id"], 80)
            raise ValueError(f"{path}: eos_token_id={ends}: must be tokens from 0 to {size - 1}")

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]
        super().save_pretrained(save_directory, **options)
        if self.generation:
            write_json(Path(save_directory) / GENERATION_FILE, dict(self.generation))

    def config_to_save(self) -> dict[str, Any]:
        """As transformers writes it, with the dtype that the weights have now: transformers loads in it."""
        saved = self.config.to_dict()
        for part in (saved, saved["text_config"], saved["vision_config"]):
            part["dtype"] = str(self.dtype).removeprefix("torch.")
        return saved


class Towers(nn.Module):
    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.visual = VisionTower(config.vision_config)
        self.language_model = LanguageModel(config.text_config)


class LanguageModel(nn.Module):
    def __init__(self, config: Qwen3VLTextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,  # (B, L, D)
        rope: tuple[Tensor, Tensor],  # each (B, L, E / 2)
        visible: Tensor | None,  # (B, 1, L, P + L); None: causal
        places: Tensor,  # (B, L), true at image tokens
        deepstack: Sequence[Tensor],
        past: Sequence[tuple[Tensor, Tensor]] | None,
        keep_from: int,
        cache: list[tuple[Tensor, Tensor]] | None,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """The output of the last layer, without the norm; only that layer leaves out the first tokens."""
        for i, layer in enumerate(self.layers):
            if kept is not None:
                kept.append(x)
            if 0 < i <= len(deepstack):
                x = add_at(x, places, deepstack[i - 1])
            last = i + 1 == len(self.layers)
            x, keys_values = layer(x, rope, visible, past[i] if past else None, keep_from if last else 0)
            if cache is not None:
                cache.append(keys_values)
        return x


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3VLTextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
        keep_from: int,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, keys_values = self.self_attn(self.input_layernorm(x), rope, visible, past, keep_from)
        norm = self.post_attention_layernorm
        x, normed = ops.add_rms_norm(x[:, keep_from:], out, norm.weight, norm.eps)
        return x + self.mlp(normed), keys_values


class Attention(nn.Module):
    """Grouped-query causal self-attention with normalised queries and keys."""

    def __init__(self, config: Qwen3VLTextConfig):
        super().__init__()
        dim, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(dim, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = Linear(dim, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = Linear(dim, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = Linear(config.num_attention_heads * self.head_dim, dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, rope, visible, past, keep_from):
        """x (B, L, D) -> (B, L - keep_from, D), and the keys and values up to here, each (B, P + L, G, E)."""
        q, k, v = self.q_proj(x[:, keep_from:]), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(t, "b l (h e) -> b l h e", e=self.head_dim) for t in (q, k, v))
        weights, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps
        q, k = ops.qk_norm_rope(q, k, *weights, rope, eps, half_split=True, start=keep_from)
        if past is not None:
            k, v = (
                torch.cat((before.expand(len(now), -1, -1, -1), now), dim=1)
                for before, now in zip(past, (k, v), strict=True)
            )
        mask = None if visible is None else visible[:, :, keep_from:]
        out = ops.attention(q, k, v, causal=mask is None, mask=mask)
        return self.o_proj(out.flatten(2)), (k, v)


class SwiGLU(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.gate_proj = Linear(dim, hidden_dim, bias=False)
        self.up_proj = Linear(dim, hidden_dim, bias=False)
        self.down_proj = Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class VisionTower(nn.Module):
    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        dim, merge = config.hidden_size, config.spatial_merge_size
        self.merge, self.head_dim = merge, dim // config.num_heads
        self.theta = config.rope_parameters.rope_theta
        self.deepstack_after = config.deepstack_visual_indexes
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = PositionTable(config.num_position_embeddings, dim)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(dim, dim, merge, config.out_hidden_size)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(dim, dim * merge**2, merge, config.out_hidden_size) for _ in self.deepstack_after
        )

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """patches (N, channels * time * rows * columns) -> (M, D) of the language model, and as many for each
        DeepStack depth."""
        x = self.patch_embed(patches)
        positions = [merge_order(self.pos_embed(gh, gw), self.merge) for gh, gw in grids]
        x = (x + torch.cat(positions).to(x.dtype))[None]
        angles = [grid_angles(gh, gw, self.head_dim // 2, self.theta, x.device) for gh, gw in grids]
        angle = torch.cat([merge_order(a, self.merge) for a in angles])[None]  # (1, N, E / 2)
        rope = angle.cos(), angle.sin()
        lengths = [gh * gw for gh, gw in grids]
        deepstack = []
        for i, block in enumerate(self.blocks):
            x = block(x, rope, lengths)
            if i in self.deepstack_after:
                deepstack.append(self.deepstack_merger_list[self.deepstack_after.index(i)](x[0]))
        return self.merger(x[0]), tuple(deepstack)


class PatchEmbed(nn.Module):
    """A convolution whose kernel equals its stride: one product per flattened patch."""

    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, kernel)

    def forward(self, patches: Tensor) -> Tensor:
        return ops.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class PositionTable(nn.Embedding):
    """Learned positions on a square grid, stretched to the grid of an image, corner to corner."""

    def forward(self, gh: int, gw: int) -> Tensor:  # type: ignore[override]
        """(gh, gw, D) in fp32: bf16 weights of neighbouring entries would lose the position between them."""
        table = self.weight.float().unflatten(0, (isqrt(self.num_embeddings), -1))
        return stretch(stretch(table, gh).transpose(0, 1), gw).transpose(0, 1)


class VisionBlock(nn.Module):
    def __init__(self, config: Qwen3VLVisionConfig):
        super().__init__()
        self.norm1 = LayerNorm(config.hidden_size)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.norm2 = LayerNorm(config.hidden_size)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, lengths)
        return x + self.mlp(self.norm2(x))


class VisionAttention(nn.Module):
    """Each patch looks at the patches of its own image."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], lengths: list[int]) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b n h e", three=3, h=self.num_heads)
        q, k = ops.qk_norm_rope(q, k, None, None, rope, half_split=True)
        return self.proj(ops.attention(q, k, v, lengths=lengths).flatten(2))


class VisionMLP(nn.Module):
    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.linear_fc1 = Linear(dim, hidden_dim)
        self.linear_fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(ops.linear_gelu(x, self.linear_fc1.weight, self.linear_fc1.bias))


class PatchMerger(nn.Module):
    """Joins the patches of a block into one token. The last merger normalises each patch (norm_dim = dim),
    those of DeepStack the joined block. The GELU is the exact one, unlike that of the blocks."""

    def __init__(self, dim: int, norm_dim: int, merge: int, out_dim: int):
        super().__init__()
        self.norm_dim, self.joined_dim = norm_dim, dim * merge**2
        self.norm = LayerNorm(norm_dim)
        self.linear_fc1 = Linear(self.joined_dim, self.joined_dim)
        self.linear_fc2 = Linear(self.joined_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, dim) -> (M, out_dim)"""
        x = self.norm(x.reshape(-1, self.norm_dim)).reshape(-1, self.joined_dim)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


def mrope_position_ids(
    input_ids: Tensor,
    image_token_id: int,
    merge: int,
    grid_thw: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The three positions (time, row, column) of each token: (3, B, L) long.

    Text counts on, alike in all three. An image that starts at s has time s, rows s, s + 1, ... and columns
    likewise over its tokens, and the text after it goes on at s + max(rows, columns). With images, padding
    has position 0, without it counts on: so does the reference. Raises ValueError when runs of image tokens
    do not match the grids.
    """
    batch, length = input_ids.shape
    if grid_thw is None:
        return torch.arange(length, device=input_ids.device).expand(3, batch, length)
    sizes = [(gh // merge, gw // merge) for _, gh, gw in grid_thw.tolist()]
    counts = [length] * batch if attention_mask is None else attention_mask.count_nonzero(dim=1).tolist()
    positions = torch.zeros(3, batch, length, dtype=torch.long, device="cpu")
    used = 0
    for row, (ids, count) in enumerate(zip(input_ids.tolist(), counts, strict=True)):
        done = start = 0
        for is_image, run in groupby(ids[:count], key=image_token_id.__eq__):
            n = len(list(run))
            there = positions[:, row, done : done + n]
            if is_image:
                rows, columns = sizes[used] if used < len(sizes) else (0, 0)
                if rows * columns != n:
                    raise ValueError(f"prompt {row} has {n} image tokens in a row, the grids want {sizes}")
                there[1] = torch.arange(rows, device="cpu").repeat_interleave(columns)
                there[2] = torch.arange(columns, device="cpu").repeat(rows)
                used += 1
            else:
                there += torch.arange(n, device="cpu")
            there += start
            start += max(rows, columns) if is_image else n
            done += n
    if used != len(sizes):
        raise ValueError(f"the prompts name {used} images, the grids {sizes} are {len(sizes)}")
    return positions.to(input_ids.device)


def mrope(positions: Tensor, head_dim: int, theta: float, section: Sequence[int]) -> tuple[Tensor, Tensor]:
    """cos and sin, each (B, L, E / 2) in fp32, of positions (3, B, L).

    Frequency j turns by the row where j % 3 == 1 and j < 3 * section[1], by the column where j % 3 == 2 and
    j < 3 * section[2], and by the time elsewhere.
    """
    time, row, column = axis_angles(positions.flatten(), head_dim, theta).unflatten(0, positions.shape)
    j = torch.arange(head_dim // 2, device=positions.device)
    angle = torch.where((j % 3 == 1) & (j < 3 * section[1]), row, time)
    angle = torch.where((j % 3 == 2) & (j < 3 * section[2]), column, angle)
    return angle.cos(), angle.sin()


def grid_angles(gh: int, gw: int, dim: int, theta: float, device: torch.device) -> Tensor:
    """Rotary angles of a patch grid, (gh, gw, dim): half from the row, half from the column, in fp32."""
    rows, columns = (axis_angles(torch.arange(n, device=device), dim, theta) for n in (gh, gw))
    return torch.cat((rows[:, None].expand(-1, gw, -1), columns[None].expand(gh, -1, -1)), dim=-1)


def stretch(x: Tensor, size: int) -> Tensor:
    """Linear interpolation of the first axis to `size` entries, first to first and last to last."""
    side = len(x)
    at = torch.arange(size, dtype=torch.float32, device=x.device) * (side - 1) / max(size - 1, 1)
    low = at.long()
    weight = (at - low).view(-1, *[1] * (x.ndim - 1))
    return torch.lerp(x[low], x[(low + 1).clamp_max(side - 1)], weight)


def merge_order(x: Tensor, merge: int) -> Tensor:
    """(gh, gw, D) -> (N, D), block by block: the order of the patches everywhere in the tower."""
    return rearrange(x, "(bh ih) (bw iw) d -> (bh bw ih iw) d", ih=merge, iw=merge)


def add_at(x: Tensor, places: Tensor, feature: Tensor) -> Tensor:
    """x with `feature` (M, D) added at the M true places. x (B, L, D); places (B, L)."""
    return x + torch.zeros_like(x).masked_scatter(places[..., None], feature.to(x.dtype))


def valid_tokens(attention_mask: Tensor) -> Tensor | None:
    """The mask as booleans, None when nothing is padded. Raises ValueError if one follows padding."""
    mask = attention_mask.bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("attention_mask must be right padded: a valid token follows a padded one")
    return None if mask.all() else mask


def visibility(mask: Tensor, past: int) -> Tensor:
    """(B, 1, L, P + L): which keys a query sees; the past wholly, itself and those before it where valid."""
    length = mask.shape[1]
    causal = torch.ones(length, past + length, dtype=torch.bool, device=mask.device).tril(past)
    return causal & F.pad(mask, (past, 0), value=True)[:, None, None]
