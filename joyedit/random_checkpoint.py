"""Tiny checkpoints with seeded random weights, in the published folder layouts.

They go through the same loader, networks and pipeline as the large models, on any machine and offline, in
seconds. Their weights were never trained: what they make of a photograph is noise.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers

from joyedit import __version__
from joyedit.clip_images import CLIPImageConfig, CLIPImageProcessor
from joyedit.images import buckets
from joyedit.models.clip import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    StableDiffusionSafetyChecker,
    StableDiffusionSafetyCheckerConfig,
)
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel
from joyedit.models.sd_vae import AutoencoderKL, AutoencoderKLConfig
from joyedit.models.wan_vae import AutoencoderKLWan, AutoencoderKLWanConfig
from joyedit.pipelines.diffedit import StableDiffusionDiffEditPipeline
from joyedit.pipelines.joyimage import JoyImageEditPipeline
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.tokenizers import CLIPTokenizer, Qwen2Tokenizer, Qwen3VLProcessor
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


# What the tiny CLIP vocabulary joins into one token.
WORDS = "a of and the in on at is it an bowl basket photo fruit pear cat dog".split()


def cached_random_checkpoint(name: str) -> Path:
    """The folder of "tiny-joyimage" or "tiny-diffedit", made on first use in JOYEDIT_CACHE or the user's
    cache folder."""
    write = write_random_checkpoint if name == "tiny-joyimage" else write_random_diffedit_checkpoint
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("JOYEDIT_CACHE") or home / "joyedit")
    folder = cache / f"{name}-random-{__version__}-{_fingerprint()}"
    if not (folder / "model_index.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted copy may have left
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            made = Path(temporary) / "checkpoint"
            write(made)
            try:
                made.replace(folder)
            except OSError:  # another process was faster
                if not (folder / "model_index.json").is_file():
                    raise
    log.warning("%s has random weights: the result is only noise", name)
    return folder


def _fingerprint() -> str:
    """Of the code that decides what is in a checkpoint: a fork that changes a network gets a new one."""
    package = Path(__file__).parent
    files = [Path(__file__), *sorted(package.glob("models/*.py")), *sorted(package.glob("pipelines/*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def write_random_checkpoint(folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a JoyAI-Image-Edit checkpoint to `folder`."""
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


def write_random_diffedit_checkpoint(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, safety_checker: bool = False
) -> None:
    """Write a Stable Diffusion 1.x checkpoint to `folder`, as DiffEdit saves it.

    Its `safety_checker` flags nothing.
    """
    tokenizer = _clip_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            UNet2DConditionConfig(
                block_out_channels=(32, 32, 64, 64),
                layers_per_block=1,
                attention_head_dim=4,
                cross_attention_dim=32,
                norm_num_groups=8,
            )
        )
        vae = AutoencoderKL(
            AutoencoderKLConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=8)
        )
        with torch.no_grad():
            # Masks would be empty if a prompt did the same everywhere: latents must show through the noise,
            # and cross-attentions choose.
            vae.quant_conv.weight[: vae.config.latent_channels] *= 80
            for name, parameter in unet.named_parameters():
                if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight")):
                    parameter *= 2
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        )
        tower = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
        )
        checker = StableDiffusionSafetyChecker(
            StableDiffusionSafetyCheckerConfig(vision_config=tower, projection_dim=16)
        )
    pipe = StableDiffusionDiffEditPipeline(
        vae=vae.to(dtype),
        text_encoder=encoder.to(dtype),
        tokenizer=tokenizer,
        unet=unet.to(dtype),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=checker.to(dtype) if safety_checker else None,
        feature_extractor=CLIPImageProcessor(CLIPImageConfig(size=56, crop_size=(56, 56))),
        requires_safety_checker=safety_checker,
    )
    pipe.save_pretrained(folder)


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A vocabulary in CLIP's order: bytes within a word, bytes at its end, merges, the special tokens.

    Its merges put the few WORDS together letter by letter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for word in WORDS:
        ends = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(ends[:i]), ends[i]) for i in range(1, len(ends))]
    merges = list(dict.fromkeys(merges))
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*tokens, start, end]))}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", {**settings, **special})
    return CLIPTokenizer.from_pretrained(folder)
