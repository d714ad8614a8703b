"""Key tables of the CLIP networks.

diffusers        what transformers 5 writes; our names
transformers-4   older folders, all published ones: one level more before the names, and position ids
ldm              the text encoder of Stable Diffusion 1.x in a whole-model single file
openclip, openclip-ldm   the text encoder of 2.x: OpenCLIP's own file, and as it is in a single file

A text encoder that ends before the last layer of OpenCLIP's leaves that layer out. The vision tower of a file
with the projection loads alone, as ChronoEdit wants it.
Source: transformers `models/clip`; mlfoundations/open_clip `open_clip/transformer.py`.
"""

from collections.abc import Mapping
from typing import Any

from joyedit.convert.table import IDENTITY, Layout, Rule, drop, prefixed, rename, split

POSITION_IDS = drop("{key*}.position_ids", "the positions are 0, 1, 2, ...")


def layouts(config: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts in which these weights are found; the first is the network's own. The vision towers with
    and without projection share theirs."""
    diffusers = Layout("diffusers", (POSITION_IDS, IDENTITY))
    if config["model_type"] == "clip_text_model":
        older = _older(rename("text_model.{key*}", "{key*}"))
        openclip = Layout("openclip", tuple(_openclip_text(config["num_hidden_layers"])))
        return (
            diffusers,
            older,
            prefixed(older, "cond_stage_model.transformer.", "ldm"),
            openclip,
            prefixed(openclip, "cond_stage_model.model.", "openclip-ldm"),
        )
    if config["model_type"] == "clip_vision_model":
        projection = drop("visual_projection.weight", "the network ends before the projection")
        return diffusers, _older(projection, rename("vision_model.{key*}", "{key*}"))
    return diffusers, _older(rename("vision_model.vision_model.{key*}", "vision_model.{key*}"), IDENTITY)


def _older(*rules: Rule) -> Layout:
    return Layout("transformers-4", (POSITION_IDS, *rules))


def _openclip_text(num_layers: int) -> list[Rule]:
    block, layer = "transformer.resblocks.{n}", "encoder.layers.{n}"
    attention = f"{layer}.self_attn"
    rules = [
        drop(f"transformer.resblocks.{num_layers}.{{rest*}}", "the layer after the last one that is used"),
        drop("text_projection", "prompts are not projected"),
        drop("logit_scale", "prompts are not compared with images"),
        drop("attn_mask", "the mask is causal"),
        drop("visual.{rest*}", "the vision tower"),
        rename("token_embedding.weight", "embeddings.token_embedding.weight"),
        rename("positional_embedding", "embeddings.position_embedding.weight"),
        rename("ln_final.{leaf}", "final_layer_norm.{leaf}"),
        rename(f"{block}.ln_1.{{leaf}}", f"{layer}.layer_norm1.{{leaf}}"),
        rename(f"{block}.ln_2.{{leaf}}", f"{layer}.layer_norm2.{{leaf}}"),
        rename(f"{block}.mlp.c_fc.{{leaf}}", f"{layer}.mlp.fc1.{{leaf}}"),
        rename(f"{block}.mlp.c_proj.{{leaf}}", f"{layer}.mlp.fc2.{{leaf}}"),
        rename(f"{block}.attn.out_proj.{{leaf}}", f"{attention}.out_proj.{{leaf}}"),
    ]
    for leaf in ("weight", "bias"):
        thirds = [f"{attention}.{part}_proj.{leaf}" for part in "qkv"]
        rules.append(split(f"{block}.attn.in_proj_{leaf}", thirds))
    return rules
