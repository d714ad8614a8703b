"""Small networks that take LoRA, factors for their layers, and what fused weights must be."""

import torch

UNET = dict(
    block_out_channels=[16, 32],
    layers_per_block=2,
    sample_size=8,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=12,
    attention_head_dim=[2, 4],
    norm_num_groups=8,
)
JOY = dict(hidden_size=48, num_attention_heads=3, num_layers=2, text_dim=20, rope_dim_list=[4, 6, 6])
WAN = dict(
    patch_size=[1, 2, 2],
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=6,
    out_channels=4,
    text_dim=10,
    freq_dim=8,
    ffn_dim=20,
    num_layers=2,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    image_dim=14,
    added_kv_proj_dim=24,
    rope_max_seq_len=32,
)
TEXT = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)

BLOCK = "down_blocks.0.attentions.1.transformer_blocks.0"
ATTENTION = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_out.0"]
JOY_LAYERS = [
    "double_blocks.1.attn.img_attn_qkv",
    "double_blocks.0.attn.txt_attn_proj",
    "double_blocks.1.img_mlp.net.0.proj",
    "condition_embedder.time_embedder.linear_1",
    "img_in",
]


@torch.no_grad()
def filled(network):
    for parameter in network.parameters():
        parameter.copy_(torch.randn(parameter.shape) / max(parameter[0].numel(), 4) ** 0.5)
    return network.requires_grad_(False).eval()


def factors(network, layer, rank=3, size=0.3):
    """down and up as trainers store them: a convolution's down has its kernel, its up is 1x1."""
    shape = network.state_dict()[f"{layer}.weight"].shape
    ones = [1] * (len(shape) - 2)
    return size * torch.randn(rank, *shape[1:]), size * torch.randn(shape[0], rank, *ones)


def product(down, up):
    return torch.einsum("or,ri->oi", up.double().flatten(1), down.double().flatten(1))


def joined(name):
    """A layer's name as kohya's trainer writes it."""
    return name.replace(".", "_")


def assert_changed_by(network, before, wanted):
    """The stored weights are the old ones plus `wanted` (tensor -> difference), and nothing else changed."""
    for name, tensor in network.state_dict().items():
        if name in wanted:
            truth = before[name].double() + wanted[name].reshape(tensor.shape)
            assert (tensor.double() - truth).abs().max() < 1e-6 * (1 + truth.abs().max()), name
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name


def snapshot(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
