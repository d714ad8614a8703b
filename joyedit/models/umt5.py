"""UMT5, the text encoder of WAN 2.1 and ChronoEdit.

A transformer encoder without a bias in its linear layers and without positions in its tokens. Where a token
is, only its distance to another one tells: to each attention score a learned number is added, that of its
layer, head and bucket of distances. (T5 has one such table for all layers, UMT5 one for each.) Scores are not
divided by sqrt(E).

The prompts of a batch are laid one behind the other, without their padding, and each attends to itself. A
prompt of 20 tokens therefore costs what 20 tokens cost, though the reference pads it to 512, and its result
is the same: padding is masked there. Rows of padding, which nothing reads, are zero here.

The residual stream is fp32 whatever the weights are. Of the embedding table, 2.1 GB in bf16, only the rows of
the tokens in the prompts are read: it stays in main memory, or in its file, when the encoder moves.

B prompts   L tokens of a padded prompt   n tokens of one prompt   N tokens of all   D width   H heads
E head width
Source: arXiv 2304.09151 (UMT5), arXiv 1910.10683 (T5); transformers `models/umt5`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from joyedit import ops
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.encoder_spellings import answer, check_unused
from joyedit.checkpoints.network import Network
from joyedit.models.layers import Linear, RMSNorm


@dataclass(frozen=True)
class UMT5Config(Config):
    """UMT5-XXL, as in ChronoEdit. What speaks of a decoder is kept for the round trip."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_decoder_layers: int | None = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    dense_act_fn: str = "gelu_new"
    is_gated_act: bool = True
    is_decoder: bool = False
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = False  # says nothing: the table of an encoder is one, whatever it is called
    pad_token_id: int | None = 0
    eos_token_id: int | None = 1
    decoder_start_token_id: int | None = 0
    architectures: tuple[str, ...] | None = ("UMT5EncoderModel",)
    dtype: str | None = "float32"
    model_type: str = "umt5"

    aliases = {"torch_dtype": "dtype"}
    supported = {
        "feed_forward_proj": ("gated-gelu",),
        "dense_act_fn": ("gelu_new",),
        "is_gated_act": (True,),
        "is_decoder": (False,),
        "model_type": ("umt5",),
    }
    keeps_unknown = True

    def __post_init__(self):
        super().__post_init__()
        buckets, longest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or longest <= buckets // 4:
            raise ValueError(
                f"relative_attention_num_buckets={buckets}, relative_attention_max_distance={longest}: must "
                "be an even number of at least 4, and more than a quarter of it"
            )


class EncoderOutput(NamedTuple):
    last_hidden_state: Tensor  # (B, L, D), normed


class UMT5EncoderModel(Network):
    Config = UMT5Config
    table = "umt5"
    weights_stem = "model"
    library = "transformers"
    mapped_modules = frozenset({"shared"})
    config: UMT5Config

    def __init__(self, config: UMT5Config | None = None):
        super().__init__(config or UMT5Config())
        # the encoder comes first, since `dtype` and `device` are those of the first parameter
        self.encoder = Encoder(self.config)
        self.shared = nn.Embedding(self.config.vocab_size, self.config.d_model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> EncoderOutput:
        """As `encode`, under the name that the reference gives it. output_hidden_states=True adds
        `hidden_states`: the embeddings, the outputs of all blocks but the last, and the prompt embeddings."""
        check_unused(unused)
        kept: list[Tensor] | None = [] if output_hidden_states else None
        last = self.encode(input_ids, attention_mask, kept)
        return answer(EncoderOutput(last), kept, return_dict)

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, kept: list[Tensor] | None = None
    ) -> Tensor:
        """Prompt embeddings (B, L, D) in the dtype of the weights, zero at the padding, which costs nothing.

        input_ids (B, L). attention_mask (B, L), nonzero at valid tokens; None: all are. `kept` gets the
        hidden states in the same form, see `forward`. Raises ValueError for ids that are not in the
        vocabulary, or a mask that is not one run of valid tokens in each row.
        """
        mask = self._checked(input_ids, attention_mask)
        table, device = self.shared.weight, input_ids.device
        dtype = torch.promote_types(ops.compute_dtype(self.dtype, device), torch.float32)
        x = table[input_ids[mask].to(table.device)].to(device, dtype)  # (N, D)
        packed: list[Tensor] | None = None if kept is None else []
        x = self.encoder(x, mask.sum(dim=1).tolist(), packed)

        def padded(x: Tensor) -> Tensor:
            x = x.to(self.dtype)
            return x.new_zeros(*input_ids.shape, x.shape[-1]).index_put_((mask,), x)

        if kept is not None and packed is not None:
            kept += map(padded, [*packed[:-1], x])
        return padded(x)

    def _checked(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The valid tokens, (B, L) boolean."""
        if input_ids.ndim != 2 or not input_ids.numel():
            raise ValueError(f"input_ids {tuple(input_ids.shape)}: must be (batch, tokens), and not empty")
        low, high = input_ids.aminmax()
        if low < 0 or high >= len(self.shared.weight):
            raise ValueError(
                f"input_ids from {low} to {high}: the encoder has {len(self.shared.weight)} tokens"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask {tuple(mask.shape)}: must be {tuple(input_ids.shape)}, as input_ids"
            )
        mask = mask.bool()
        starts = mask & ~F.pad(mask, (1, 0))[:, :-1]
        if (starts.sum(dim=1) != 1).any():
            raise ValueError("attention_mask: the valid tokens of each row must be one run, with no gap")
        return mask

    def config_to_save(self) -> dict[str, Any]:
        """As transformers writes it, with the dtype that the weights have now: transformers loads in it."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {**self.config.to_dict(), "architectures": [type(self).__name__], "dtype": dtype}


class Encoder(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.num_buckets = config.relative_attention_num_buckets
        self.max_distance = config.relative_attention_max_distance
        self.block = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, lengths: Sequence[int], kept: list[Tensor] | None = None) -> Tensor:
        """x (N, D) in fp32: prompts of these lengths, one behind the other. `kept` gets x and what each block
        gives."""
        longest = max(lengths)
        distances = torch.arange(1 - longest, longest, device=x.device)
        buckets = distance_buckets(distances, self.num_buckets, self.max_distance)
        states = [x]
        for block in self.block:
            x = block(x, lengths, buckets)
            if kept is not None:
                states.append(x)
        if kept is not None:
            kept += states
        return self.final_layer_norm(x)


class Block(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config), FeedForwardLayer(config)])

    def forward(self, x: Tensor, lengths: Sequence[int], buckets: Tensor) -> Tensor:
        attend, feed_forward = self.layer
        return feed_forward(x, attend(x, lengths, buckets))


class AttentionLayer(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.SelfAttention = SelfAttention(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, lengths: Sequence[int], buckets: Tensor) -> Tensor:
        """What attention adds to x (N, D)."""
        return self.SelfAttention(self.layer_norm(x), lengths, buckets)


class SelfAttention(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.num_heads = config.num_heads
        inner = config.num_heads * config.d_kv
        self.q = Linear(config.d_model, inner, bias=False)
        self.k = Linear(config.d_model, inner, bias=False)
        self.v = Linear(config.d_model, inner, bias=False)
        self.o = Linear(inner, config.d_model, bias=False)
        self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def forward(self, x: Tensor, lengths: Sequence[int], buckets: Tensor) -> Tensor:
        """x (N, D); buckets of the distances between the first and the last token of the longest prompt."""
        x = x.to(ops.compute_dtype(self.q.weight.dtype, x.device))
        q, k, v = (
            rearrange(project(x), "n (h e) -> 1 n h e", h=self.num_heads)
            for project in (self.q, self.k, self.v)
        )
        by_distance = self.relative_attention_bias.weight[buckets].to(x.dtype).T
        bias = {n: pairwise(by_distance, n) for n in set(lengths)}
        prompts = zip(lengths, *(t.split(list(lengths), dim=1) for t in (q, k, v)), strict=True)
        out = [ops.attention(q, k, v, mask=bias[n], scale=1.0) for n, q, k, v in prompts]
        return without_fp16(self.o(torch.cat(out, dim=1)[0].flatten(1)))


class FeedForwardLayer(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.DenseReluDense = GatedGELU(config)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """x and what attention adds to it, (N, D) -> x after the block."""
        norm = self.layer_norm
        x, normed = ops.add_rms_norm(x, attended, norm.weight, norm.eps)
        return x + self.DenseReluDense(normed)


class GatedGELU(nn.Module):
    def __init__(self, config: UMT5Config):
        super().__init__()
        self.wi_0 = Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = Linear(config.d_model, config.d_ff, bias=False)
        self.wo = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(ops.compute_dtype(self.wi_0.weight.dtype, x.device))
        gate, value = without_fp16(self.wi_0(x)), without_fp16(self.wi_1(x))
        return self.wo(ops.geglu_tanh(gate, value))


def without_fp16(x: Tensor) -> Tensor:
    """fp16 as fp32, at most the largest number of fp16 where that was exceeded.

    What T5 adds up leaves the range of fp16. The reference keeps `wo` in fp32 for it, and clamps what is
    still fp16; here `wo` is upcast where it is used.
    """
    if x.dtype != torch.float16:
        return x
    limit = torch.finfo(torch.float16).max
    return x.clamp(-limit, limit).float()


def distance_buckets(distances: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance (key position - query position): one half of them for keys at or before the
    query, one for those after it. In each the first half is one distance wide, the rest grow with the
    logarithm, and all from max_distance on share the last. fp32, since the truncation decides."""
    half = num_buckets // 2
    exact = half // 2
    far = distances.abs()
    growth = (far.float() / exact).log() / math.log(max_distance / exact) * (half - exact)
    # of distance 0 the logarithm is -inf, which has no integer, and is not used
    wide = (exact + growth.clamp_min(0).long()).clamp_max(half - 1)
    return torch.where(far < exact, far, wide) + half * (distances > 0)


def pairwise(by_distance: Tensor, n: int) -> Tensor:
    """From a value for each distance 1 - m .. m - 1, (H, 2 m - 1), the values of all pairs (query, key) of n
    <= m tokens: (1, H, n, n)."""
    zero = by_distance.shape[1] // 2
    near = by_distance[:, zero - n + 1 : zero + n]
    return near.unfold(1, n, 1).flip(1)[None]  # window i holds the distances i - n + 1 .. i
