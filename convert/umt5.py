"""Key tables of the UMT5 encoder.

diffusers   what transformers writes, and ComfyUI's single file; our names
encoder     the same with the embedding table under its second name only
original    `models_t5_umt5-xxl-enc-bf16.pth` of the WAN repositories
llama.cpp   GGUF files

Files of the whole UMT5 load too, without their decoder. Where a file holds both names of the embedding table,
`shared` counts: some versions of transformers left zeros under the other (huggingface/transformers#43992).
Source: WAN `wan/modules/t5.py`; transformers `models/umt5`.
"""

from collections.abc import Mapping
from typing import Any

from joyedit.convert.table import IDENTITY, Layout, drop, rename

SECOND_NAME = "encoder.embed_tokens.weight"
UNUSED = (
    drop("decoder.{rest*}", "prompts are encoded only"),
    drop("lm_head.weight", "prompts are encoded only"),
    drop("spiece_model", "the vocabulary, which the tokenizer reads from its own file"),
)
BLOCK, LAYER = "blocks.{n}", "encoder.block.{n}.layer"


def layouts(config: Mapping[str, Any]) -> tuple[Layout, ...]:
    """The layouts in which these weights are found; the first is the network's own."""
    return (
        Layout("diffusers", (drop(SECOND_NAME, "shared.weight once more"), *UNUSED, IDENTITY)),
        Layout(
            "encoder", (rename(SECOND_NAME, "shared.weight"), *UNUSED, rename("encoder.{k*}", "encoder.{k*}"))
        ),
        ORIGINAL,
        LLAMA_CPP,
    )


ORIGINAL = Layout(
    "original",
    (
        rename("token_embedding.weight", "shared.weight"),
        rename(f"{BLOCK}.norm1.weight", f"{LAYER}.0.layer_norm.weight"),
        rename(
            f"{BLOCK}.pos_embedding.embedding.weight",
            f"{LAYER}.0.SelfAttention.relative_attention_bias.weight",
        ),
        rename(f"{BLOCK}.attn.{{part}}.weight", f"{LAYER}.0.SelfAttention.{{part}}.weight"),
        rename(f"{BLOCK}.norm2.weight", f"{LAYER}.1.layer_norm.weight"),
        rename(f"{BLOCK}.ffn.gate.0.weight", f"{LAYER}.1.DenseReluDense.wi_0.weight"),
        rename(f"{BLOCK}.ffn.fc1.weight", f"{LAYER}.1.DenseReluDense.wi_1.weight"),
        rename(f"{BLOCK}.ffn.fc2.weight", f"{LAYER}.1.DenseReluDense.wo.weight"),
        rename("norm.weight", "encoder.final_layer_norm.weight"),
    ),
)

# llama.cpp's name of a layer -> ours, both below the block
GGUF_LAYERS = {
    "attn_norm": "0.layer_norm",
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "ffn_norm": "1.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
}
LLAMA_CPP = Layout(
    "llama.cpp",
    (
        rename("token_embd.weight", "shared.weight"),
        *(rename(f"enc.blk.{{n}}.{src}.weight", f"{LAYER}.{dst}.weight") for src, dst in GGUF_LAYERS.items()),
        rename("enc.output_norm.weight", "encoder.final_layer_norm.weight"),
    ),
)
