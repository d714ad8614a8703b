"""Tiny checkpoints with seeded random weights, in the published folder layouts.

They go through the same loader, networks and pipeline as the large models, on any machine and offline, in
seconds, and tests and benchmarks are made with them. Their weights were never trained: what they make of a
photograph is noise.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from joyedit.checkpoints.json_files import write_json
from joyedit.checkpoints.tensor_files import save_tensors
from joyedit.media.clip_images import CLIPImageConfig, CLIPImageProcessor
from joyedit.media.images import buckets
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.clip import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    StableDiffusionSafetyChecker,
    StableDiffusionSafetyCheckerConfig,
)
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel
from joyedit.models.sd_vae import AutoencoderKL, AutoencoderKLConfig
from joyedit.models.umt5 import UMT5Config, UMT5EncoderModel
from joyedit.models.wan_vae import AutoencoderKLWan, AutoencoderKLWanConfig
from joyedit.pipelines.diffedit import StableDiffusionDiffEditPipeline
from joyedit.pipelines.joyimage import JoyImageEditPipeline
from joyedit.pipelines.joyimage_plus import JoyImageEditPlusPipeline
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.unipc import UniPCMultistepScheduler
from joyedit.text.clip_tokenizer import CLIPTokenizer
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer
from joyedit.text.qwen3_vl_processor import Qwen3VLProcessor
from joyedit.text.t5_tokenizer import T5TokenizerFast

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


# What the tiny CLIP and UMT5 vocabularies hold as one token.
WORDS = "a of and the in on at is it an bowl basket photo fruit pear cat dog".split()


def write_random_checkpoint(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.bfloat16, plus: bool = False
) -> None:
    """Write a JoyAI-Image-Edit checkpoint to `folder`, or one of Edit-Plus."""
    tokenizer, processor = byte_processor(folder / "tokenizer")
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
    made = JoyImageEditPlusPipeline if plus else JoyImageEditPipeline
    pipe = made(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5),
        vae=vae.to(dtype),
        text_encoder=encoder.to(dtype),
        tokenizer=tokenizer,
        transformer=transformer.to(dtype),
        processor=processor,
        buckets=buckets(256),
    )
    pipe.save_pretrained(folder)


def byte_processor(folder: Path) -> tuple[Qwen2Tokenizer, Qwen3VLProcessor]:
    """A tokenizer of bytes, and what reads pictures of about 256 x 256 pixels with it. Writes the former to
    `folder`."""
    tokenizer = _byte_tokenizer(folder)
    settings = folder / "preprocessor_config.json"
    write_json(
        settings,
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
    processor = Qwen3VLProcessor.from_pretrained(folder)
    settings.unlink()
    return tokenizer, processor


def _byte_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """One token per byte and no merges, with the special tokens of the real vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    write_special_tokens(folder, len(vocab))
    return Qwen2Tokenizer.from_pretrained(folder)


def write_special_tokens(folder: Path, first: int) -> None:
    """Beside a Qwen vocabulary of `first` tokens, the files that give the special ones the ids after it."""
    added = {token: first + i for i, token in enumerate(SPECIAL_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
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


def write_random_chronoedit_checkpoint(folder: Path, seed: int = 0) -> None:
    """Write a ChronoEdit checkpoint to `folder` as the released one was published: the transformer in fp32
    shards, the vision tower with its projection in bf16, the classes under the names that WAN gave them, and
    the distillation LoRA in WAN's spelling."""
    tokenizer = unigram_tokenizer(WORDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ChronoEditTransformer3DModel(
            ChronoEditConfig(
                num_attention_heads=2,
                attention_head_dim=24,
                text_dim=32,
                freq_dim=32,
                ffn_dim=96,
                num_layers=3,
                image_dim=32,
                added_kv_proj_dim=48,
            )
        )
        vae = AutoencoderKLWan(AutoencoderKLWanConfig(base_dim=8, num_res_blocks=1))
        text_encoder = UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        )
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                projection_dim=16,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=56,
            )
        )
        lora = _wan_lora(transformer, rank=4)
    transformer.save_pretrained(folder / "transformer", max_shard_size="300KB")
    config = transformer.config_to_save()
    defaults = ("rope_temporal_skip_len", "pos_embed_seq_len")  # which the published file leaves out
    kept = {key: value for key, value in config.items() if key not in defaults}
    write_json(folder / "transformer" / "config.json", {**kept, "_class_name": "WanTransformer3DModel"})
    vae.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    image_encoder.to(torch.bfloat16).save_pretrained(folder / "image_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    CLIPImageProcessor(CLIPImageConfig(size=56, crop_size=(56, 56))).save_pretrained(
        folder / "image_processor"
    )
    UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ).save_pretrained(folder / "scheduler")
    save_tensors(folder / "lora", "chronoedit_distill_lora", lora)
    index = {
        "_class_name": "WanImageToVideoPipeline",
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "image_processor": ["transformers", "CLIPProcessor"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    write_json(folder / "model_index.json", index)


def unigram_tokenizer(vocabulary: Iterable[str]) -> T5TokenizerFast:
    """The special tokens of UMT5 under their ids, letters, a few words, and bytes for everything else."""
    special = ("<pad>", "</s>", "<s>", "<unk>")
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["\u2581", *map(chr, range(33, 127))]  # the first is how the vocabulary writes a space
    words = [f"\u2581{word}" for word in vocabulary]
    scores = {**dict.fromkeys(special, 0.0), **dict.fromkeys(spelled, -20.0), **dict.fromkeys(letters, -10.0)}
    scores |= dict.fromkeys(words, -5.0)
    backend = Tokenizer(models.Unigram(list(scores.items()), unk_id=3, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return T5TokenizerFast(backend, {**named, "tokenizer_class": "T5Tokenizer"})


def _wan_lora(transformer: ChronoEditTransformer3DModel, rank: int) -> dict[str, torch.Tensor]:
    """Factors for every linear layer of the blocks, in the names of the published LoRA."""
    layout = next(layout for layout in transformer.layouts() if layout.name == "comfyui-short")
    state, factors = transformer.state_dict(), {}
    for foreign, name in layout.renames(list(state)).items():
        if name.startswith("blocks.") and name.endswith(".weight") and state[name].ndim == 2:
            layer, (rows, columns) = foreign.removesuffix(".weight"), state[name].shape
            factors[f"{layer}.lora_A.weight"] = torch.randn(rank, columns) * columns**-0.5
            factors[f"{layer}.lora_B.weight"] = torch.randn(rows, rank) * 0.1
    return {name: factor.bfloat16() for name, factor in factors.items()}
