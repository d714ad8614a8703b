"""A tiny JoyAI-Image-Edit checkpoint with seeded random weights, in the published folder layout.

It goes through the same loader, networks and pipeline as the 16 B model, on any machine and offline, in
seconds. Its weights were never trained: what it makes of a photograph is noise.
"""

import logging
import os
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers

from joyedit import __version__
from joyedit.images import buckets
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from joyedit.models.wan_vae import AutoencoderKLWan, AutoencoderKLWanConfig
from joyedit.pipelines.joyimage import JoyImageEditPipeline
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.tokenizers import Qwen2Tokenizer, Qwen3VLProcessor
from joyedit.weights import write_json

log = logging.getLogger("joyedit")

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def cached_random_checkpoint() -> Path:
    """The folder of the checkpoint, made on first use in JOYEDIT_CACHE or the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("JOYEDIT_CACHE") or home / "joyedit")
    folder = cache / f"tiny-joyimage-random-{__version__}"
    if not (folder / "model_index.json").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            made = Path(temporary) / "checkpoint"
            write_random_checkpoint(made)
            try:
                made.replace(folder)
            except OSError:  # another process was faster
                if not (folder / "model_index.json").is_file():
                    raise
    log.warning("tiny-joyimage has random weights: the result is only noise")
    return folder


def write_random_checkpoint(folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the checkpoint to `folder`."""
    tokenizer = _byte_tokenizer(folder / "tokenizer")
    write_json(
        folder / "tokenizer" / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 16384, "longest_edge": 65536},
            "patch_size": 16,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "resample": 3,
        },
    )
    processor = Qwen3VLProcessor.from_pretrained(folder / "tokenizer")
    (folder / "tokenizer" / "preprocessor_config.json").unlink()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = JoyImageEditTransformer3DModel(
            JoyImageEditConfig(
                hidden_size=64,
                num_attention_heads=2,
                num_layers=3,
                mlp_width_ratio=2.0,
                text_dim=32,
                rope_dim_list=(8, 12, 12),
            )
        )
        vae = AutoencoderKLWan(AutoencoderKLWanConfig(base_dim=8, num_res_blocks=1))
        encoder = Qwen3VLForConditionalGeneration(_encoder_config(tokenizer))
    pipe = JoyImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
        vae=vae.to(dtype),
        text_encoder=encoder.to(dtype),
        tokenizer=tokenizer,
        transformer=transformer.to(dtype),
        processor=processor,
        buckets=buckets(256),
    )
    pipe.save_pretrained(folder)


def _byte_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """One token per byte and no merges, with the special tokens of the real vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    added = {token: len(vocab) + i for i, token in enumerate(SPECIAL_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_json(folder / "added_tokens.json", added)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in added.items()},
            "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 262144,
        },
    )
    return Qwen2Tokenizer.from_pretrained(folder)


def _encoder_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen3VLConfig.from_dict(
        {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": "qwen3_vl",
            "text_config": {
                "model_type": "qwen3_vl_text",
                "vocab_size": 288,
                "hidden_size": 32,
                "intermediate_size": 80,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "rope_theta": 5000000.0,
                "rope_scaling": {
                    "rope_type": "default",
                    "mrope_interleaved": True,
                    "mrope_section": [4, 2, 2],
                },
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|im_end|>"],
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 100,
                "deepstack_visual_indexes": [0, 1],
            },
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "tie_word_embeddings": False,
        }
    )
