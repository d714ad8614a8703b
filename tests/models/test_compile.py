"""Every network goes through torch.compile as one graph, at two shapes, and computes what it computed.

Backend `aot_eager`: traced as for any backend, run without a compiler. Where a network begins with reading
ids and masks on the host, the part that follows is compiled.
"""

from collections.abc import Callable

import pytest
import torch

from joyedit.models import chronoedit_dit, clip, joyimage_mmdit, qwen3_vl, sd_unet, sd_vae, umt5, wan_vae


def random_weights(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return network.eval().requires_grad_(False)


def joyimage():
    config = joyimage_mmdit.JoyImageEditConfig(
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        text_dim=8,
        rope_dim_list=(4, 6, 6),
        in_channels=4,
    )
    network = random_weights(joyimage_mmdit.JoyImageEditTransformer3DModel(config))

    def inputs(n):
        return torch.randn(2, 2, 4, 1, 4, 2 * n), torch.full((2,), 500.0), torch.randn(2, n, 8)

    return lambda *x: network(*x).sample, inputs


def chronoedit():
    config = chronoedit_dit.ChronoEditConfig(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, in_channels=12, out_channels=4,
        text_dim=8, image_dim=6, added_kv_proj_dim=24, ffn_dim=40, freq_dim=16,
    )  # fmt: skip
    network = random_weights(chronoedit_dit.ChronoEditTransformer3DModel(config))

    def inputs(n):
        latents = torch.randn(2, 12, 2, 4, 2 * n)
        return latents, torch.tensor([500, 500]), torch.randn(2, n, 8), torch.randn(2, 5, 6)

    return lambda *x: network(*x).sample, inputs


def unet():
    config = sd_unet.UNet2DConditionConfig(
        block_out_channels=(32, 64), cross_attention_dim=8, attention_head_dim=4, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    network = random_weights(sd_unet.UNet2DConditionModel(config))

    def inputs(n):
        return torch.randn(2, 4, 8, 4 * n), torch.tensor(500), torch.randn(2, n, 8)

    return lambda *x: network(*x).sample, inputs


def kl_encoder():
    network = kl()
    return lambda x: network.encode(x).latent_dist.mean, lambda n: (torch.rand(1, 3, 16, 8 * n),)


def kl_decoder():
    network = kl()
    return lambda z: network.decode(z).sample, lambda n: (torch.randn(1, 4, 4, 2 * n),)


def kl():
    config = sd_vae.AutoencoderKLConfig(
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return random_weights(sd_vae.AutoencoderKL(config))


def wan_encoder():
    network = wan()
    return lambda x: network.encode(x).latent_dist.mean, lambda n: (
        torch.rand(1, 3, 1 + 4 * (n - 2), 16, 24),
    )


def wan_decoder():
    network = wan()
    return lambda z: network.decode(z).sample, lambda n: (torch.randn(1, 16, n - 1, 2, 3),)


def wan():
    return random_weights(
        wan_vae.AutoencoderKLWan(wan_vae.AutoencoderKLWanConfig(base_dim=4, num_res_blocks=1))
    )


def text_config():
    return qwen3_vl.Qwen3VLConfig(
        text_config=qwen3_vl.Qwen3VLTextConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
            num_key_value_heads=1, vocab_size=50,
            rope_scaling=qwen3_vl.RopeScaling(mrope_section=(2, 1, 1)),
        ),
        vision_config=qwen3_vl.Qwen3VLVisionConfig(
            depth=2, hidden_size=16, num_heads=2, intermediate_size=24, out_hidden_size=16,
            num_position_embeddings=16, deepstack_visual_indexes=(0,),
        ),
    )  # fmt: skip


def qwen_text():
    network = random_weights(qwen3_vl.Qwen3VLForConditionalGeneration(text_config()))
    decoder = network.model.language_model

    def inputs(n):
        x, angles = torch.randn(2, n, 16), torch.randn(2, n, 4)
        return x, (angles.cos(), angles.sin()), torch.zeros(2, n, dtype=torch.bool)

    return lambda x, rope, places: decoder(x, rope, None, places, (), None, 0, None), inputs


def qwen_vision():
    network = random_weights(qwen3_vl.Qwen3VLForConditionalGeneration(text_config()))
    return (lambda x, grids: network.model.visual(x, grids)[0]), lambda n: (
        torch.randn(8 * n, 1536),
        [(4, 2 * n)],
    )


def umt5_encoder():
    config = umt5.UMT5Config(
        d_model=16, d_ff=24, d_kv=4, num_heads=4, num_layers=2, vocab_size=40, num_decoder_layers=2
    )
    network = random_weights(umt5.UMT5EncoderModel(config))
    return network.encoder, lambda n: (torch.randn(2 * n + 1, 16), [n, n + 1])


def clip_text():
    config = clip.CLIPTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    network = random_weights(clip.CLIPTextModel(config))
    return (lambda x: network.final_layer_norm(network.encoder(x, 2))), lambda n: (torch.randn(n, 77, 16),)


def clip_vision():
    config = clip.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28
    )
    network = random_weights(clip.CLIPVisionModel(config))
    return (lambda x: network.hidden_states(x, layer=-2)), lambda n: (torch.randn(n, 3, 28, 28),)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [joyimage, chronoedit, unet, kl_encoder, kl_decoder, wan_encoder, wan_decoder, qwen_text, qwen_vision,
     umt5_encoder, clip_text, clip_vision],
)  # fmt: skip
def test_one_graph_at_two_shapes(network: Callable):
    torch.manual_seed(0)
    torch.compiler.reset()
    run, inputs = network()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for n in (2, 3):
        x = inputs(n)
        with torch.no_grad():
            wanted, found = run(*x), compiled(*x)
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())
