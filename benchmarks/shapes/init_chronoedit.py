"""Where the training of the ChronoEdit editor starts: with films in which nothing happens, perfectly.

An editor must first of all copy what it is given, and attention takes thousands of samples to find that out.
The weights below do it from the start, at every noise level: v = (x_t - source) / sigma in every frame, so
that the untrained network returns the photograph, and training only has to learn what happens.

The width D of a token is divided: A, the token's own latent patch (P = channels * 4 numbers); B, the patch
of the photograph at the same place; the rest is work space that holds a constant, beside which the patches
are small enough for LayerNorm to be nearly linear. Only tokens of the first frame know the photograph, from
the channels of the condition; in those of the others there is mid-grey.

* Entrance: A and B both get the condition, and A the noisy patch. What is in both does no harm, since in the
  end only A - B counts. A pattern in the work space marks the first frame, as the mask does.
* Block 0: the first heads get queries that depend on the position alone (biases on the fastest rotary
  frequencies of rows and columns, nothing on those of frames), and keys that are alike, but zero where that
  pattern is missing. So every token looks at its own place in the first frame, and gets its B.
* Head: (A - B) / sigma. The modulation of the head is the time embedding itself, whose part on A and B is
  fitted to 1 / sigma - 1 in a few hundred steps. That it is also the shift does no harm for the same reason.

Padding of prompts is attended to, and there is a lot of it: up to 500 rows beside 10 words. Words differ from
it in the first number of their embeddings, and all heads get a direction in which that turns them away.

All of it goes on learning with the rest, but slowly: noise of the optimiser would soon spoil the copy.
"""

import torch
from einops import rearrange
from torch import Tensor

from joyedit.models.chronoedit_dit import (
    ChronoEditTransformer3DModel,
    ImageCrossAttention,
    SelfAttention,
)
from joyedit.models.clip import CLIPVisionModel
from joyedit.models.umt5 import UMT5EncoderModel

PATCH_SCALE = 0.5  # of a noisy latent patch in A, and of the photograph's in B behind block 0
SOURCE_SCALE = 0.1  # of the condition in A and B
CARRIER, MARK = 1.2, 0.3  # in the work space: of the constant, and of the pattern that tells the first frame
SHARPNESS = 2.0  # gain of the positional queries and keys
QUIET = 0.05  # what random weights write into A and B, as a share of what they write elsewhere
WORD = 2.0  # the first number of every word's embedding, the others being about 0.5
LARGEST_GATE = 2.0  # of 1 / sigma - 1: less noise is no place for a copy, what is seen is the edit
SLOW, SLOWER = 0.2, 0.05  # learning rates, as shares: time embedder; the arranged weights


@torch.no_grad()
def initialize_editor(
    model: ChronoEditTransformer3DModel, seed: int = 0, gate_steps: int = 400
) -> dict[str, Tensor]:
    """Set the weights; returns the shares of the learning rate that parameters should have, by name, each of
    a shape that broadcasts to the parameter's. gate_steps: what fitting the time embedding takes.

    Works where two latent patches fit in the width twice over and patches are 1 x 2 x 2.
    """
    generator = torch.Generator().manual_seed(seed)
    _ordinary(model, generator)
    config = model.config
    width, patch = config.width, 4 * (config.out_channels or 0)
    both, space = 2 * patch, (width - 2 * patch) / width
    eye = torch.eye(patch)

    entrance = model.patch_embedding
    assert entrance.bias is not None
    noisy, mask, known = entrance.weight.flatten(1).split((patch, 16, patch), dim=1)
    constant = torch.tensor([1.0, -1.0]).repeat((width - both) // 2)
    mark = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat((width - both) // 4)  # at right angles to it
    for part in (noisy, mask, known):
        part.zero_()
    noisy[:patch] = PATCH_SCALE * eye
    known[:patch] = known[patch:both] = SOURCE_SCALE * eye
    mask[both:] = MARK / 16 * mark[:, None]
    entrance.weight.copy_(torch.cat((noisy, mask, known), dim=1).view_as(entrance.weight))
    entrance.bias[both:] = CARRIER * constant

    # What LayerNorm divides by: a first frame's token in block 0, and any token in the end.
    content = PATCH_SCALE**2 + 2 * SOURCE_SCALE**2
    std = (content * patch / width + (CARRIER**2 + MARK**2) * space) ** 0.5
    content = 2 * PATCH_SCALE**2 + 2 * SOURCE_SCALE**2
    std_out = 1.03 * (content * patch / width + CARRIER**2 * space) ** 0.5

    look_at_source(model.blocks[0].attn1, mark * std / (MARK * (width - both)), patch, config.rope_dims)
    attn = model.blocks[0].attn1
    attn.to_v.weight[:patch] = 0
    attn.to_v.weight[:patch, patch:both] = eye
    attn.to_v.weight[:patch, both:] = -1 / (width - both)  # LayerNorm took the mean away
    attn.to_out[0].weight[:, :patch] = 0
    attn.to_out[0].weight[patch:both, :patch] = PATCH_SCALE / SOURCE_SCALE * std * eye

    # The head counts (row, column, channel), the patches of the entrance (channel, row, column).
    order = rearrange(torch.arange(patch), "(c ph pw) -> (ph pw c)", ph=2, pw=2)
    model.proj_out.weight[:, :both] = 0
    model.proj_out.weight[range(patch), order] = std_out / PATCH_SCALE
    model.proj_out.weight[range(patch), patch + order] = -std_out / PATCH_SCALE

    _turn_from_padding(model)
    _fit_time(model, both, generator, gate_steps)
    return _rates(model, patch)


def _ordinary(model: ChronoEditTransformer3DModel, generator: torch.Generator) -> None:
    layers, both = len(model.blocks), 8 * (model.config.out_channels or 0)
    for name, parameter in model.named_parameters():
        if name.endswith("scale_shift_table"):
            parameter.zero_()
            parameter[:, 2::3] = 1  # gates of a block; the head has none
        elif parameter.ndim >= 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter *= 0.7 * parameter[0].numel() ** -0.5
            if name.endswith(("to_out.0.weight", "ffn.net.2.weight")):
                parameter *= 0.5 * layers**-0.5
                parameter[:both] *= QUIET
        elif name.endswith("bias"):
            parameter.zero_()
    for block in model.blocks:
        if isinstance(block.attn2, ImageCrossAttention):
            block.attn2.add_v_proj.weight *= 0.1
    model.condition_embedder.time_proj.weight *= 0.02
    model.proj_out.weight *= 0.05


def look_at_source(attn: SelfAttention, mark: Tensor, patch: int, dims: tuple[int, int, int]) -> None:
    """The first heads of an attention, enough for a value of `patch` numbers, look at the token of the same
    row and column whose work space, the last numbers of it, has a product with `mark` of 1.

    The others have one of 0. dims: rotated channels along frames, rows, columns.
    """
    width, head_dim = attn.to_q.weight.shape[0], attn.to_q.weight.shape[0] // attn.num_heads
    starts = range(0, patch, head_dim)
    used = torch.zeros(width, dtype=torch.bool)
    for start in starts:
        for axis in (dims[0], dims[0] + dims[1]):  # of each the first, fastest frequency
            used[start + axis] = True
    for linear, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k)):
        linear.weight[:patch] *= 0.02
        norm.weight[used] = SHARPNESS
    attn.to_q.weight[used] = attn.to_k.weight[used] = 0
    attn.to_q.bias[used] = 4
    attn.to_k.weight[used, width - len(mark) :] = 4 * mark


def _turn_from_padding(model: ChronoEditTransformer3DModel) -> None:
    """In text embeddings, the first number is 1 for padding and 0 for words; keys and queries use it."""
    embedder = model.condition_embedder.text_embedder
    first, second = embedder.linear_1, embedder.linear_2
    first.weight[0] = 0
    first.weight[0, 0], first.bias[0] = -2, 2
    second.weight[0] = 0
    second.weight[:, 0] = 0
    second.weight[0, 0] = 0.5
    for block in model.blocks:
        attn = block.attn2
        flags = range(0, attn.to_q.weight.shape[0], attn.to_q.weight.shape[0] // attn.num_heads)
        attn.to_q.weight[flags] *= 0.02
        attn.to_q.bias[flags] = 2
        attn.to_k.weight[flags] = 0
        attn.to_k.weight[flags, 0] = -4
        attn.norm_q.weight[flags] = attn.norm_k.weight[flags] = SHARPNESS
        if isinstance(attn, ImageCrossAttention):
            attn.add_k_proj.weight[flags] = 0


@torch.no_grad()
def initialize_encoders(text_encoder: UMT5EncoderModel, image_encoder: CLIPVisionModel) -> None:
    """Embeddings of words are told from padding, which is zero, by their first number. What ChronoEdit never
    uses of the vision tower does not learn."""
    table = text_encoder.shared.weight
    table.normal_(std=0.5)
    table[:, 0] = WORD
    for block in text_encoder.encoder.block:
        attention, feed_forward = block.layer
        attention.SelfAttention.o.weight[0] = 0
        attention.SelfAttention.relative_attention_bias.weight *= 0.5
        feed_forward.DenseReluDense.wo.weight[0] = 0
    image_encoder.embeddings.position_embedding.weight *= 0.5
    for unused in (image_encoder.encoder.layers[-1], image_encoder.post_layernorm):
        unused.requires_grad_(False)


def _fit_time(model: ChronoEditTransformer3DModel, both: int, generator: torch.Generator, steps: int) -> None:
    """Fit the time embedder: 1 / sigma - 1 on A and B, anything small elsewhere, no modulation of blocks."""
    embedder = model.condition_embedder
    parameters = [*embedder.time_embedder.parameters(), *embedder.time_proj.parameters()]
    optimizer = torch.optim.Adam(parameters, 2e-3)
    with torch.enable_grad():
        for _ in range(steps):
            sigma = torch.rand(256, generator=generator) * 0.98 + 0.02
            sigma[:64] = 1
            gate = (1 / sigma - 1).clamp_max(LARGEST_GATE)
            vec = model.embed_time(1000 * sigma)  # (256, 7, D)
            fit = (vec[:, 6, :both] - gate[:, None]).square().mean()
            loss = fit + vec[:, :6].square().mean() + 0.01 * vec[:, 6, both:].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _rates(model: ChronoEditTransformer3DModel, patch: int) -> dict[str, Tensor]:
    rows = torch.ones(model.config.width)
    rows[: 2 * patch] = SLOWER
    rates = {
        "patch_embedding.weight": rows.view(-1, 1, 1, 1, 1),
        "patch_embedding.bias": torch.tensor(SLOWER),
    }
    rates["scale_shift_table"] = torch.tensor(SLOW)
    for name in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj"):
        for part in ("weight", "bias"):
            rates[f"condition_embedder.{name}.{part}"] = torch.tensor(SLOW)
    columns = torch.ones(model.config.width)
    columns[: 2 * patch] = SLOWER
    rates["proj_out.weight"] = columns
    rows = torch.ones(model.config.width)
    rows[:patch] = SLOWER
    for name in ("to_q", "to_k", "to_v"):
        rates[f"blocks.0.attn1.{name}.bias"] = rows
        rates[f"blocks.0.attn1.{name}.weight"] = rows[:, None]
    rates["blocks.0.attn1.to_out.0.weight"] = rows
    rates["blocks.0.attn1.norm_q.weight"] = rates["blocks.0.attn1.norm_k.weight"] = rows
    return rates
