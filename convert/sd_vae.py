"""Key tables of the VAE of Stable Diffusion.

diffusers       Diffusers folders since 0.18; our names
diffusers-old   older Diffusers folders, most published ones: other names in the attention
ldm             VAE files of the original code: `kl-f8`, `vae-ft-mse-840000` and their like
ldm-first-stage, ldm-vae   the original names under the prefix of a whole-model single file

The attention of the original has 1x1 convolutions where ours has linear layers; its decoder counts the stages
from the pixels, ours from the latents.
Source: CompVis latent-diffusion `ldm/modules/diffusionmodules/model.py`; diffusers `single_file_utils.py`.
"""

from collections.abc import Mapping
from typing import Any

from joyedit.convert.table import IDENTITY, Layout, Rule, drop, prefixed, rename, reshape

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
LDM_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def layouts(config: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts in which these weights are found; the first is the network's own."""
    diffusers = Layout("diffusers", (IDENTITY,))
    ldm = Layout("ldm", tuple(_ldm(len(config["block_out_channels"]))))
    return (
        diffusers,
        Layout("diffusers-old", (*_old_attention("encoder"), *_old_attention("decoder"), IDENTITY)),
        ldm,
        prefixed(ldm, "first_stage_model.", "ldm-first-stage"),
        prefixed(ldm, "vae.", "ldm-vae"),
    )


def _old_attention(part: str) -> list[Rule]:
    place = f"{part}.mid_block.attentions.0"
    rules = []
    for old, new in OLD_ATTENTION.items():
        rules += [
            # a no-op, except in files whose 1x1 convolutions were copied from the original as they were
            reshape(f"{place}.{old}.weight", f"{place}.{new}.weight", lambda t: t.flatten(1), lambda t: t),
            rename(f"{place}.{old}.bias", f"{place}.{new}.bias"),
        ]
    return rules


def _ldm(stages: int) -> list[Rule]:
    rules = [
        rename("quant_conv.{leaf}", "quant_conv.{leaf}"),
        rename("post_quant_conv.{leaf}", "post_quant_conv.{leaf}"),
        *_ends("encoder"),
        *_ends("decoder"),
        drop("loss.{rest*}", "the networks of the training loss"),
        drop("model_ema.{rest*}", "a count of training steps"),
    ]
    for i in range(stages):
        down, up = f"encoder.down_blocks.{i}", f"decoder.up_blocks.{i}"
        mirrored = f"decoder.up.{stages - 1 - i}"
        rules += [
            *_residual(f"encoder.down.{i}.block.{{n}}", f"{down}.resnets.{{n}}"),
            rename(f"encoder.down.{i}.downsample.conv.{{leaf}}", f"{down}.downsamplers.0.conv.{{leaf}}"),
            *_residual(f"{mirrored}.block.{{n}}", f"{up}.resnets.{{n}}"),
            rename(f"{mirrored}.upsample.conv.{{leaf}}", f"{up}.upsamplers.0.conv.{{leaf}}"),
        ]
    return rules


def _ends(part: str) -> list[Rule]:
    """First convolution, middle and last layers, alike in encoder and decoder."""
    attention = f"{part}.mid_block.attentions.0"
    rules = [
        *(rename(f"{part}.{conv}.{{leaf}}", f"{part}.{conv}.{{leaf}}") for conv in ("conv_in", "conv_out")),
        rename(f"{part}.norm_out.{{leaf}}", f"{part}.conv_norm_out.{{leaf}}"),
        *_residual(f"{part}.mid.block_1", f"{part}.mid_block.resnets.0"),
        *_residual(f"{part}.mid.block_2", f"{part}.mid_block.resnets.1"),
        rename(f"{part}.mid.attn_1.norm.{{leaf}}", f"{attention}.group_norm.{{leaf}}"),
    ]
    for old, new in LDM_ATTENTION.items():
        src, dst = f"{part}.mid.attn_1.{old}", f"{attention}.{new}"
        rules += [
            reshape(f"{src}.weight", f"{dst}.weight", lambda t: t.flatten(1), lambda t: t[..., None, None]),
            rename(f"{src}.bias", f"{dst}.bias"),
        ]
    return rules


def _residual(src: str, dst: str) -> list[Rule]:
    return [
        rename(f"{src}.nin_shortcut.{{leaf}}", f"{dst}.conv_shortcut.{{leaf}}"),
        rename(f"{src}.{{layer}}.{{leaf}}", f"{dst}.{{layer}}.{{leaf}}"),
    ]
