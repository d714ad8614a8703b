"""Where the training of the JoyImage editor starts: doing nothing, perfectly.

An editor must first of all copy its reference, and attention takes thousands of samples to find that out. The
weights below do it from the start, at every noise level: v = (x_t - reference) / sigma, so that the untrained
network returns the reference, and training only has to learn what to change.

The width D of a token is divided: A, the token's own latent patch (P = channels * 4 numbers); B, the patch
of the reference at the same place; the rest is work space that holds a constant +-1, beside which the patches
are small enough for LayerNorm to be nearly linear.

* Block 0: the first heads get queries and keys that depend on the position alone (biases on the fastest
  rotary frequencies). The keys are turned back by one frame, so a target token finds the reference token of
  its own place, and its A goes to B.
* Head: A - B, exact for sigma = 1.
* Last block: the same heads without the turn look at their own token and add g (A - B) to A, where the gate
  g = 1 / sigma - 1 comes from the time embedder, which is fitted to that in a few hundred steps.

All of it goes on learning with the rest, but slowly: noise of the optimiser would soon spoil the copy.
"""

import torch
from einops import rearrange
from torch import Tensor

from joyedit.models.joyimage_mmdit import JointAttention, JoyImageEditTransformer3DModel

PATCH_SCALE = 0.5  # of a latent patch in A
SHARPNESS = 3.0  # gain of the positional queries and keys
SLOW, SLOWER = 0.2, 0.05  # learning rates, as shares: time embedder; the arranged weights


@torch.no_grad()
def initialize_editor(
    model: JoyImageEditTransformer3DModel, seed: int = 0, gate_steps: int = 400
) -> dict[str, Tensor]:
    """Set the weights; returns the shares of the learning rate that parameters should have, by name, each of
    a shape that broadcasts to the parameter's. gate_steps: what fitting the gate takes.

    Works where two latent patches fit in the width twice over and patches are 1 x 2 x 2.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    patch = config.in_channels * 4
    _ordinary(model, generator)
    width, blocks = config.hidden_size, list(model.double_blocks)
    first, last = blocks[0].attn, blocks[-1].attn
    heads = -(-patch // config.head_dim)
    identity = torch.eye(patch)

    weight = model.img_in.weight.flatten(1)
    weight *= 0.3
    weight[:patch] = PATCH_SCALE * identity
    weight[patch : 2 * patch] = 0
    model.img_in.bias[2 * patch :: 2] = 1
    model.img_in.bias[2 * patch + 1 :: 2] = -1
    space = (width - 2 * patch) / width  # mean square of the constants
    std = (PATCH_SCALE**2 * patch / width + space) ** 0.5  # what LayerNorm divides by in block 0
    std_out = 1.05 * (PATCH_SCALE**2 * 2 * patch / width + space) ** 0.5  # and once B is filled

    for block in blocks:
        block.img_mlp.net[2].weight[: 2 * patch] *= 0.1
        block.attn.img_attn_proj.weight[: 2 * patch] *= 0.1
        if block is not blocks[-1]:
            block.attn.img_attn_proj.weight[:patch] = 0  # their gates on A are g, too

    look_at_place(first, heads, config.rope_dims, config.theta, frames=1)
    value = first.img_attn_qkv.weight[2 * width :]
    value[:patch] = 0
    value[:patch, :patch] = identity
    out = first.img_attn_proj.weight
    out[:, :patch] = 0
    out[patch : 2 * patch] = 0
    out[patch : 2 * patch, :patch] = std * identity

    look_at_place(last, heads, config.rope_dims, config.theta, frames=0)
    value = last.img_attn_qkv.weight[2 * width :]
    value[:patch] = 0
    value[:patch, :patch] = identity
    value[:patch, patch : 2 * patch] = -identity
    out = last.img_attn_proj.weight
    out[:, :patch] = 0
    out[:patch] = 0
    out[:patch, :patch] = std_out * identity
    blocks[-1].img_mod.modulate_table[:, 2, :patch] = 0  # g alone, not 1 + g

    # The head counts (row, column, channel), the patches of img_in (channel, row, column).
    order = rearrange(torch.arange(patch), "(c ph pw) -> (ph pw c)", ph=2, pw=2)
    model.proj_out.weight[:, : 2 * patch] = 0
    model.proj_out.weight[range(patch), order] = std_out / PATCH_SCALE
    model.proj_out.weight[range(patch), patch + order] = -std_out / PATCH_SCALE

    _fit_gate(model, patch, generator, gate_steps)
    return _rates(model, patch, heads)


def _ordinary(model: JoyImageEditTransformer3DModel, generator: torch.Generator) -> None:
    layers = len(model.double_blocks)
    for name, parameter in model.named_parameters():
        if name.endswith("modulate_table"):
            parameter.zero_()
            parameter[:, (2, 5)] = 1  # gates
        elif parameter.ndim >= 2:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter *= 0.7 * parameter[0].numel() ** -0.5
            if name.endswith(("attn_proj.weight", "mlp.net.2.weight")):
                parameter *= 0.5 * layers**-0.5
        elif name.endswith("bias"):
            parameter.zero_()
    model.condition_embedder.time_proj.weight *= 0.02
    model.proj_out.weight *= 0.05


def look_at_place(
    attn: JointAttention, heads: int, dims: tuple[int, int, int], theta: float, frames: int
) -> None:
    """The first `heads` heads of an attention look at the token of the same row and column, `frames` later.

    dims: rotated channels along frames, rows, columns.
    """
    width = attn.img_attn_proj.weight.shape[0]
    head_dim = width // attn.num_heads
    query = torch.zeros(head_dim // 2, 2)  # one direction per rotary frequency
    start = 0
    for dim in dims:
        strengths = (1.0, 0.8, 0.4) if dim > 4 else (1.0, 1.0)
        query[start : start + len(strengths), 0] = torch.tensor(strengths)
        start += dim // 2
    angle = torch.zeros(head_dim // 2)
    angle[: dims[0] // 2] = -frames / theta ** (torch.arange(0, dims[0], 2) / dims[0])
    cos, sin = angle.cos(), angle.sin()
    key = torch.stack((query[:, 0] * cos, query[:, 0] * sin), dim=1)

    weight, bias = attn.img_attn_qkv.weight, attn.img_attn_qkv.bias
    assert bias is not None
    rows = heads * head_dim
    used = (query.flatten() > 0) | (key.flatten() != 0)
    for offset, direction in ((0, query), (width, key)):
        weight[offset : offset + rows] *= 0.02
        bias[offset : offset + rows] = 4 * direction.flatten().repeat(heads)
        # All heads share the gains, so the others send less into those channels.
        others = weight[offset + rows : offset + width].unflatten(0, (-1, head_dim))
        others[:, used] *= 0.35
    attn.img_attn_q_norm.weight[used] = SHARPNESS
    attn.img_attn_k_norm.weight[used] = SHARPNESS


def _fit_gate(
    model: JoyImageEditTransformer3DModel, patch: int, generator: torch.Generator, steps: int
) -> None:
    """Fit the time embedder: gate 1 is 1 / sigma - 1 on A, and everything else is 0."""
    embedder = model.condition_embedder
    parameters = [*embedder.time_embedder.parameters(), *embedder.time_proj.parameters()]
    optimizer = torch.optim.Adam(parameters, 2e-3)
    with torch.enable_grad():
        for _ in range(steps):
            sigma = torch.rand(256, generator=generator) * 0.98 + 0.02
            gate = (1 / sigma - 1).clamp_max(4)
            vec = model.embed_time(1000 * sigma)  # (256, 6, D)
            wanted = torch.zeros_like(vec[:, 2])
            wanted[:, :patch] = gate[:, None]
            on_patch = (vec[:, 2, :patch] - wanted[:, :patch]).square().mean()
            elsewhere = vec[:, 2, patch:].square().mean() + vec[:, (0, 1, 3, 4, 5)].square().mean()
            loss = on_patch + elsewhere
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _rates(model: JoyImageEditTransformer3DModel, patch: int, heads: int) -> dict[str, Tensor]:
    config = model.config
    width, rows = config.hidden_size, heads * config.head_dim
    rates = {
        "img_in.weight": torch.tensor(SLOWER),
        "img_in.bias": torch.tensor(SLOWER),
    }
    for name in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj"):
        rates[f"condition_embedder.{name}.weight"] = torch.tensor(SLOW)
        rates[f"condition_embedder.{name}.bias"] = torch.tensor(SLOW)
    columns = torch.ones(width)
    columns[: 2 * patch] = SLOWER
    rates["proj_out.weight"] = columns
    for number in (0, config.num_layers - 1):
        attn = f"double_blocks.{number}.attn"
        rates[f"{attn}.img_attn_q_norm.weight"] = torch.tensor(SLOWER)
        rates[f"{attn}.img_attn_k_norm.weight"] = torch.tensor(SLOWER)
        qkv = torch.ones(3, width)
        qkv[:, :rows] = SLOWER
        rates[f"{attn}.img_attn_qkv.bias"] = qkv.flatten()
        rates[f"{attn}.img_attn_qkv.weight"] = qkv.flatten()[:, None]
        columns = torch.ones(width)
        columns[:patch] = SLOWER
        rates[f"{attn}.img_attn_proj.weight"] = columns
    return rates
