"""Record what the reference makes of a tiny JoyAI-Image-Edit checkpoint, for tests that lack torchvision.

    python tests/goldens/record.py --out FOLDER [--photos FOLDER] [--tokenizer FOLDER]

Writes photos/, tiny-joyimage-edit/ (seeded random bf16 weights in the published folder layout),
runs.safetensors, encoders.safetensors and recorded.json; the same machine and versions give the same bytes.
Networks, processor and pipeline are diffusers' and transformers' own, in fp32 on one CPU thread; only the
bucket table is replaced. Needs torchvision, diffusers 0.42.1 and transformers 5.23; no network.

B images   L prompt tokens   D text width   C latent channels   S steps   h, w latent sizes (pixels / 8)
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import numpy as np
import torch
import torchvision
import transformers
from diffusers.pipelines.joyimage import image_processor
from PIL import Image
from safetensors.torch import save_file

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CHECKPOINT = "tiny-joyimage-edit"
BUCKETS = [(64, 96), (96, 64), (64, 64), (32, 64)]  # (height, width), the nearest aspect ratio wins
PIXELS = {"shortest_edge": 2048, "longest_edge": 16384}  # of the processor; a bucket is never resized again

# name -> (photograph of scikit-image, box left, top, right, bottom, stored width, height).
# All but the last have the size of a bucket.
PHOTOS = {
    "coffee_96x64.png": ("coffee.png", (0, 0, 600, 400), (96, 64)),
    "coffee_64x32.png": ("coffee.png", (0, 60, 600, 360), (64, 32)),
    "chelsea_64x32.png": ("chelsea.png", (0, 20, 450, 245), (64, 32)),
    "astronaut_90x120.png": ("astronaut.png", (60, 0, 405, 460), (90, 120)),
}

SYSTEM = (
    "<|im_start|>system\n \\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n"
)
PREFIX = SYSTEM + "<|im_start|>"
DROPPED = 34  # tokens of PREFIX, fixed in the reference
IMAGE_TEXT = PREFIX + "user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
PLAIN_TEXT = PREFIX + "user\n{}<|im_end|>\n<|im_start|>assistant\n"
COVERED = PREFIX + "user\nassistant\nMake the coffee red add snow to a cat photo remove background and"

SHORT, LONG = "add snow", "Make the coffee red and remove the background."
CASES = {
    "edit": dict(
        what="one photograph that has the size of its bucket",
        seed=1234,
        image="coffee_96x64.png",
        call=dict(prompt="Make the coffee red, and add snow.", num_inference_steps=4, guidance_scale=4.0),
    ),
    "edit_negative": dict(
        what="resize and centre crop; a negative prompt of its own",
        seed=77,
        image="astronaut_90x120.png",
        call=dict(
            prompt="你好 add snow to the background",
            negative_prompt="blurry, low quality",
            num_inference_steps=3,
            guidance_scale=2.5,
        ),
    ),
    "edit_no_guidance": dict(
        what="guidance off: no negative prompt, no rescaling",
        seed=5,
        image="chelsea_64x32.png",
        call=dict(prompt="Make the cat red", num_inference_steps=2, guidance_scale=1.0),
    ),
    "edit_batch": dict(
        what="quirk of the reference: the shorter prompt is padded, and the padding is attended to",
        seed=99,
        image=["chelsea_64x32.png", "coffee_64x32.png"],
        call=dict(prompt=[SHORT, LONG], num_inference_steps=2, guidance_scale=3.0),
    ),
    "edit_single_0": dict(
        what="the first of edit_batch alone: what a batch with one generator per image must give for it",
        seed=100,
        image="chelsea_64x32.png",
        call=dict(prompt=SHORT, num_inference_steps=2, guidance_scale=3.0),
    ),
    "edit_single_1": dict(
        what="the second of edit_batch alone",
        seed=101,
        image="coffee_64x32.png",
        call=dict(prompt=LONG, num_inference_steps=2, guidance_scale=3.0),
    ),
    "edit_two_images": dict(
        what="two images of one prompt from one generator",
        seed=31,
        image="coffee_64x32.png",
        call=dict(
            prompt="add snow to the photo", num_inference_steps=2, guidance_scale=4.0, num_images_per_prompt=2
        ),
    ),
    "text": dict(
        what="text to image; the size is snapped to the bucket 96 x 64",
        seed=4321,
        call=dict(
            prompt="a cat and a photo", height=928, width=640, num_inference_steps=4, guidance_scale=3.0
        ),
    ),
    "text_batch": dict(
        what="text to image at the default size, the square bucket; the shorter prompt is zero-padded",
        seed=8,
        call=dict(
            prompt=["a cat", "red snow to the photo of a cat"], num_inference_steps=2, guidance_scale=4.0
        ),
    ),
    "edit_bf16": dict(
        what="edit_single_1, loaded with torch_dtype=bfloat16; compare loosely",
        seed=101,
        image="coffee_64x32.png",
        call=dict(prompt=LONG, num_inference_steps=2, guidance_scale=3.0),
    ),
}
FLOAT_IMAGES = ("edit",)  # the others keep round(255 x) in uint8, to stay small

# Weights: part of a name -> (mean, deviation, whether that is in units of 1 / sqrt(fan in)); the first that
# occurs in the name counts. Sharp attention, large gates and a strong time modulation make prompt, reference
# and timestep visible in the image.
USUAL = {
    "bias": (0.0, 0.1, False),
    "gamma": (1.0, 0.1, False),
    "norm": (1.0, 0.1, False),
    "": (0.0, 1.0, True),
}
SHARP = {"q_norm": (1.7, 0.1, False), "k_norm": (1.7, 0.1, False)}
TRANSFORMER = {
    "modulate_table": (0.0, 0.2, False),
    "time_proj.weight": (0.0, 2.5, True),
    "proj_out.weight": (0.0, 0.7, True),
}
EMBEDDINGS = {"embed_tokens": (0.0, 0.5, False), "pos_embed": (0.0, 0.5, False)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=Path, default=SHARED / "photos", help="scikit-image's data folder")
    parser.add_argument(
        "--tokenizer", type=Path, default=SHARED / "joyai-image-edit" / "tokenizer", help="Qwen2's folder"
    )
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)

    write_photos(given.photos, given.out / "photos")
    checkpoint = given.out / CHECKPOINT
    write_checkpoint(given.tokenizer, checkpoint)

    tensors, cases = {}, {}
    pipes = {dtype: open_checkpoint(checkpoint, dtype) for dtype in (torch.float32, torch.bfloat16)}
    for name, case in CASES.items():
        pipe = pipes[torch.bfloat16 if name.endswith("bf16") else torch.float32]
        photos = case.get("image")
        photos = [photos] if isinstance(photos, str) else photos
        opened = [Image.open(given.out / "photos" / photo) for photo in photos or ()]
        image = opened[0] if len(opened) == 1 else opened or None
        result = run(pipe, image, case["seed"], case["call"], BUCKETS)
        if name not in FLOAT_IMAGES:
            result["image"] = (result["image"] * 255).round().to(torch.uint8)
        tensors |= {f"{name}.{key}": value for key, value in result.items()}
        cases[name] = {**case, "image": photos}
    save(tensors, given.out / "runs.safetensors")
    encoders, described = encode(pipes[torch.float32], given.out / "photos")
    save(encoders, given.out / "encoders.safetensors")
    write_json(
        given.out / "recorded.json",
        {
            "versions": versions(),
            "buckets": BUCKETS,
            "generator": "torch.manual_seed(seed), the global one: the noise, then the references' posterior",
            "photos": PHOTOS,
            "cases": cases,
            "encoders": described,
        },
    )


def run(pipe, image, seed: int, call: dict, buckets: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """One call of the pipeline.

    noise and reference (B, 1, C, 1, h, w) before the first step; latents (S, B, 1, C, 1, h, w) of the target
    after each step; prompt_embeds (B, L, D) and prompt_mask (B, L), negative_ likewise; timesteps (S,);
    image (B, H, W, 3) in [0, 1].
    """
    encoded, first, latents = [], [], []

    def keep_encoded(method):
        def call_and_keep(*args, **kwargs):
            encoded.append(method(*args, **kwargs))
            return encoded[-1]

        return call_and_keep

    def keep_latents(pipe, step, timestep, tensors):
        latents.append((timestep.clone(), tensors["latents"][:, -1:].clone()))
        return {}

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(image_processor.BUCKETS, {1024: buckets}))
        for method in ("encode_prompt", "encode_prompt_multiple_images"):
            stack.enter_context(patch.object(pipe, method, keep_encoded(getattr(pipe, method))))
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: first.append(kwargs["hidden_states"].clone()) if not first else None,
            with_kwargs=True,
        )
        stack.callback(hook.remove)
        generator = torch.manual_seed(seed)
        made = pipe(
            image=image, generator=generator, output_type="np", callback_on_step_end=keep_latents, **call
        )
    result = {"noise": first[0][:, -1:], "timesteps": torch.stack([t for t, _ in latents])}
    if image is not None:
        result["reference"] = first[0][:, :1]
    result["latents"] = torch.stack([target for _, target in latents])
    for sign, (embeds, mask) in zip(("", "negative_"), encoded, strict=False):
        result |= {f"{sign}prompt_embeds": embeds, f"{sign}prompt_mask": mask}
    return {**result, "image": torch.from_numpy(made.images)}


def encode(pipe, photos: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The processor on a picture that fits and one that must be resized, Qwen3-VL with a picture and without.

    pixel_values are (levels - 127.5) / 127.5 exactly. states (1, L, D) come from the last layer, before the
    final norm, the 34 dropped tokens included; vision_merged and vision_deepstack_K (N, D) leave the tower.
    """
    described = {
        "image": {
            "photo": "chelsea_64x32.png",
            "box": [0, 0, 64, 32],
            "text": IMAGE_TEXT.format("Make the cat red, 你好"),
        },
        "resized": {"photo": "coffee_96x64.png", "box": [0, 0, 70, 45]},
        "plain": {"text": PLAIN_TEXT.format("a cat, and a photo")},
    }
    model, tensors = pipe.text_encoder.model, {}
    for name, case in described.items():
        picture = None
        if "photo" in case:
            picture = Image.open(photos / case["photo"]).crop(case["box"])
            inputs = pipe.processor.image_processor(images=[picture], return_tensors="pt")
            levels = (inputs["pixel_values"] * 127.5 + 127.5).round()
            assert torch.equal((levels - 127.5) / 127.5, inputs["pixel_values"])
            tensors |= {
                f"{name}.levels": levels.to(torch.uint8),
                f"{name}.image_grid_thw": inputs["image_grid_thw"],
            }
        if "text" in case:
            inputs = pipe.processor(text=[case["text"]], images=picture and [picture], return_tensors="pt")
            seen = []
            hook = model.language_model.layers[-1].register_forward_hook(
                lambda m, a, out, seen=seen: seen.append(out)
            )
            pipe.text_encoder(**inputs)
            hook.remove()
            tensors |= {f"{name}.input_ids": inputs["input_ids"], f"{name}.states": seen[0]}
        if name == "image":
            vision = model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
            tensors[f"{name}.vision_merged"] = vision.pooler_output
            for k, feature in enumerate(vision.deepstack_features):
                tensors[f"{name}.vision_deepstack_{k}"] = feature
    return tensors, described


def open_checkpoint(folder: Path, dtype: torch.dtype):
    """The reference pipeline. Published processor folders repeat the tokenizer's files, `folder` does not."""
    with tempfile.TemporaryDirectory() as temporary:
        whole = shutil.copytree(folder, Path(temporary) / folder.name)
        shutil.copytree(whole / "tokenizer", whole / "processor", dirs_exist_ok=True)
        pipe = diffusers.JoyImageEditPipeline.from_pretrained(whole, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_checkpoint(qwen: Path, folder: Path) -> None:
    """Weights are rounded to bf16 and stored so, as the published ones are."""
    ids = write_tokenizer(qwen, folder / "tokenizer")
    common = dict(patch_size=16, merge_size=2, temporal_patch_size=2, resample=3)
    common |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    names = dict(image_processor_type="Qwen2VLImageProcessorFast", processor_class="Qwen3VLProcessor")
    write_json(folder / "processor/preprocessor_config.json", {**names, **common, "size": PIXELS})
    names = dict(video_processor_type="Qwen3VLVideoProcessor", processor_class="Qwen3VLProcessor")
    write_json(folder / "processor/video_preprocessor_config.json", {**names, **common})

    transformer = diffusers.JoyImageEditTransformer3DModel(
        hidden_size=64, num_attention_heads=2, num_layers=3, mlp_width_ratio=2.0, text_dim=32,
        rope_dim_list=[8, 12, 12], theta=10000,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLWan(base_dim=4, num_res_blocks=1)  # latent mean and deviation are WAN 2.1's
    encoder = transformers.Qwen3VLForConditionalGeneration(encoder_config(ids))
    fill(transformer, 101, {**SHARP, **TRANSFORMER, **USUAL})
    fill(vae, 303, USUAL)
    vae.quant_conv.bias[vae.config.z_dim :] -= 3.0  # log variance: a posterior of visible, not large, spread
    fill(encoder, 404, {**SHARP, **EMBEDDINGS, **USUAL})
    for part, network in (("transformer", transformer), ("vae", vae), ("text_encoder", encoder)):
        network.to(torch.bfloat16).save_pretrained(folder / part)
    diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5).save_pretrained(folder / "scheduler")
    parts = {
        "processor": ["transformers", "Qwen3VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "JoyImageEditTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    head = {"_class_name": "JoyImageEditPipeline", "_diffusers_version": diffusers.__version__}
    write_json(folder / "model_index.json", {**head, **parts, "buckets": BUCKETS})


def fill(network: torch.nn.Module, seed: int, gains: dict[str, tuple[float, float, bool]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        mean, deviation, by_fan_in = next(gain for part, gain in gains.items() if part in name)
        if by_fan_in:
            deviation /= math.sqrt(parameter[0].numel())
        parameter.copy_(mean + deviation * torch.randn(parameter.shape, generator=generator))


def encoder_config(ids: dict[str, int]) -> transformers.Qwen3VLConfig:
    rope = dict(rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=[4, 2, 2])
    text = dict(
        vocab_size=math.ceil((max(ids.values()) + 1) / 8) * 8, hidden_size=32, intermediate_size=48,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=4096, rope_parameters=rope,
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
    )  # fmt: skip
    vision = dict(
        depth=3, hidden_size=16, num_heads=2, intermediate_size=48, out_hidden_size=32,
        num_position_embeddings=100, deepstack_visual_indexes=[0, 1],
    )  # fmt: skip
    return transformers.Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip


def write_tokenizer(qwen: Path, folder: Path) -> dict[str, int]:
    """Qwen's byte-level BPE cut down to the 256 bytes, the merges that COVERED takes, and the added tokens.

    Words of COVERED split as in the real one; any other text falls to pieces, down to its bytes.
    """
    real = transformers.Qwen2Tokenizer.from_pretrained(qwen)
    lines = (qwen / "merges.txt").read_text(encoding="utf-8").splitlines()
    ranks = {
        tuple(line.split(" ")): rank for rank, line in enumerate(lines) if " " in line and line[0:2] != "#v"
    }
    words = {word for word, _ in real.backend_tokenizer.pre_tokenizer.pre_tokenize_str(COVERED)}
    merges = sorted(set().union(*(merges_of(word, ranks) for word in words)), key=ranks.__getitem__)
    real_ids = json.loads((qwen / "vocab.json").read_text(encoding="utf-8"))
    pieces = sorted((p for p in real_ids if len(p) == 1), key=real_ids.__getitem__)[:256]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *(a + b for a, b in merges)]))}

    config = json.loads((qwen / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = [config["added_tokens_decoder"][key] for key in sorted(config["added_tokens_decoder"], key=int)]
    ids = {token["content"]: len(vocab) + i for i, token in enumerate(added)}
    config["added_tokens_decoder"] = {str(ids[token["content"]]): token for token in added}
    config.pop("chat_template", None)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8"
    )
    write_json(folder / "added_tokens.json", ids)
    write_json(folder / "tokenizer_config.json", config)

    small = transformers.Qwen2Tokenizer.from_pretrained(folder)
    assert len(small.encode(PREFIX)) == len(real.encode(PREFIX)) == DROPPED
    assert small.decode(small.encode(LONG + " żółć 你好\r\n")) == LONG + " żółć 你好\r\n"
    return ids


def merges_of(word: str, ranks: dict[tuple[str, str], int]) -> set[tuple[str, str]]:
    """The merges that byte-pair encoding applies to one word."""
    parts, used = list(word), set()
    while pairs := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        used.add(best)
        joined: list[str] = []
        for part in parts:
            if joined and (joined[-1], part) == best:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return used


def write_photos(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (photo, box, size) in PHOTOS.items():
        picture = Image.open(source / photo).convert("RGB").crop(box).resize(size, Image.Resampling.LANCZOS)
        picture.save(folder / name, optimize=True)


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def write_json(path: Path, value: dict) -> None:
    """One line for each entry of the two outer levels: small, and still readable in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def line(item) -> str:
        return json.dumps(item, ensure_ascii=False)

    def block(item) -> str:
        if not isinstance(item, dict) or not item:
            return line(item)
        return "{\n" + ",\n".join(f"  {line(key)}: {line(inner)}" for key, inner in item.items()) + "\n }"

    body = ",\n".join(f" {line(key)}: {block(item)}" for key, item in value.items())
    path.write_text("{\n" + body + "\n}\n", encoding="utf-8")


def versions() -> dict[str, str]:
    modules = (torch, torchvision, diffusers, transformers, np)
    return {module.__name__: module.__version__ for module in modules} | {"pillow": Image.__version__}


if __name__ == "__main__":
    main()
