"""Key tables of ChronoEdit's transformer, which are those of WAN 2.1 image-to-video.

diffusers          the published Diffusers folder; our names
original           files of WAN's own code (`.pth`, `.safetensors`), and ComfyUI's of the same names
comfyui-*          either of them under a prefix of ComfyUI: of a whole-model file, or of a LoRA's

No layout splits, fuses or reshapes a tensor. A block's norm2 and norm3 have swapped places: the original
counts the cross-attention's norm, the only one with parameters, last.
Source: WAN 2.1 `wan/modules/model.py`; diffusers `scripts/convert_wan_to_diffusers.py`.
"""

from collections.abc import Mapping
from typing import Any

from joyedit.convert.table import IDENTITY, Layout, drop, prefixed, rename

PREFIXES = {"comfyui": "model.diffusion_model.", "comfyui-short": "diffusion_model."}

# original -> ours; `.{leaf}` is weight or bias
LAYERS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "blocks.{n}.self_attn.q": "blocks.{n}.attn1.to_q",
    "blocks.{n}.self_attn.k": "blocks.{n}.attn1.to_k",
    "blocks.{n}.self_attn.v": "blocks.{n}.attn1.to_v",
    "blocks.{n}.self_attn.o": "blocks.{n}.attn1.to_out.0",
    "blocks.{n}.self_attn.norm_q": "blocks.{n}.attn1.norm_q",
    "blocks.{n}.self_attn.norm_k": "blocks.{n}.attn1.norm_k",
    "blocks.{n}.cross_attn.q": "blocks.{n}.attn2.to_q",
    "blocks.{n}.cross_attn.k": "blocks.{n}.attn2.to_k",
    "blocks.{n}.cross_attn.v": "blocks.{n}.attn2.to_v",
    "blocks.{n}.cross_attn.o": "blocks.{n}.attn2.to_out.0",
    "blocks.{n}.cross_attn.norm_q": "blocks.{n}.attn2.norm_q",
    "blocks.{n}.cross_attn.norm_k": "blocks.{n}.attn2.norm_k",
    "blocks.{n}.cross_attn.k_img": "blocks.{n}.attn2.add_k_proj",
    "blocks.{n}.cross_attn.v_img": "blocks.{n}.attn2.add_v_proj",
    "blocks.{n}.cross_attn.norm_k_img": "blocks.{n}.attn2.norm_added_k",
    "blocks.{n}.norm3": "blocks.{n}.norm2",
    "blocks.{n}.ffn.0": "blocks.{n}.ffn.net.0.proj",
    "blocks.{n}.ffn.2": "blocks.{n}.ffn.net.2",
    "head.head": "proj_out",
}
TABLES = {"blocks.{n}.modulation": "blocks.{n}.scale_shift_table", "head.modulation": "scale_shift_table"}


def layouts(config: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts in which these weights are found; the first is the network's own."""
    stray = drop("blocks.{n}.attn2.norm_added_q.weight", "image tokens have no queries")
    diffusers = Layout("diffusers", (stray, IDENTITY))
    layers = (rename(f"{src}.{{leaf}}", f"{dst}.{{leaf}}") for src, dst in LAYERS.items())
    original = Layout("original", (*layers, *(rename(src, dst) for src, dst in TABLES.items())))
    found = [diffusers, original]
    for name, prefix in PREFIXES.items():
        found += [prefixed(diffusers, prefix, f"{name}-diffusers"), prefixed(original, prefix, name)]
    return tuple(found)
