"""JoyAI-Image-Edit beside diffusers.

    OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.joyimage

Every row runs on seeded random weights that both sides read from the same files. The networks are smaller
than the published ones; their proportions are kept where they decide the ratio, as far as two blocks allow:

- The last block of a step works for the target alone. That is a quarter of a step of two blocks, 1.2 % of one
  of forty; of `forward_fp32` it saves less, and `block_fp32` does the very same work on both sides.
- The vocabulary of the prompt encoder is as much smaller as its layers are, so that the reference's logits
  weigh a tenth of the layers, as in the 8 B; all 151,936 words would flatter the ratio of so narrow a model.

B batch   C latent channels   T frames   H, W height and width
"""

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.random_checkpoint import write_random_checkpoint
from benchmarks.side_by_side import (
    Result,
    Row,
    UnequalResults,
    check,
    compare,
    difference,
    main,
    peak_memory,
    run_child,
    summary,
)
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.network import Network
from joyedit.media import images as im
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from joyedit.models.wan_vae import AutoencoderKLWan, AutoencoderKLWanConfig
from joyedit.pipelines.joyimage import JoyImageEditPipeline

# A byte is a token here: as long beside the picture as a real prompt is. The negative one is the default.
PROMPT, NEGATIVE = "Make the coffee red.", ""
BF16_RATIO = 5.0  # expected where the reference computes in bf16 on a CPU that has no units for it
IMPORT_RATIO = 1.35  # expected at most of the pipeline's import, over that of torch alone
# Instructions that oneDNN, MKL and PyTorch may use: those of a CPU without bf16 units.
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}


def transformer_config(quick: bool) -> JoyImageEditConfig:
    """Two blocks, a quarter of the published width, its head width and rotary split."""
    if quick:
        return JoyImageEditConfig(hidden_size=256, num_attention_heads=2, num_layers=2, text_dim=256)
    return JoyImageEditConfig(hidden_size=1024, num_attention_heads=8, num_layers=2, text_dim=1024)


def transformer_inputs(config: JoyImageEditConfig, quick: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Latents of reference and target (256 tokens each), two prompts of unlike length, a timestep."""
    generator = torch.Generator().manual_seed(1)
    side, lengths = (8, (20, 14)) if quick else (32, (300, 290))
    latents = torch.randn(1, 2, config.in_channels, 1, side, side, generator=generator)
    cond, uncond = (torch.randn(1, n, config.text_dim, generator=generator) for n in lengths)
    inputs = {"latents": latents, "cond": cond, "uncond": uncond}
    return {**{k: v.to(dtype) for k, v in inputs.items()}, "timestep": torch.tensor([737.0])}


def transformers(quick: bool, folder: Path, dtype: torch.dtype) -> tuple[JoyImageEditTransformer3DModel, Any]:
    """Ours and the reference's, from the same files in `dtype`."""
    from diffusers import JoyImageEditTransformer3DModel as Reference

    save_random(JoyImageEditTransformer3DModel, transformer_config(quick), folder, dtype)
    ours = JoyImageEditTransformer3DModel.from_pretrained(folder)
    return ours, Reference.from_pretrained(folder, torch_dtype=dtype).requires_grad_(False).eval()


def reference_step(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both guidance branches; of their results the target, (B, C, T, H, W)."""
    latents, timestep = inputs["latents"], inputs["timestep"]
    both = [model(latents, timestep, inputs[name], return_dict=False)[0] for name in ("cond", "uncond")]
    return both[0][:, -1], both[1][:, -1]


def our_step(model: JoyImageEditTransformer3DModel, inputs: dict[str, Tensor]) -> Callable[[], Any]:
    """What a run prepares once, and the step that is left, as `JoyImageEditPipeline` does both."""
    latents = inputs["latents"]
    reference = model.embed_image(latents[:, :-1])
    grid = model.token_grid(latents)
    rope, vec = model.rope(grid), model.embed_time(inputs["timestep"])
    branches = [model.embed_text(inputs[name]) for name in ("cond", "uncond")]

    def step() -> tuple[Tensor, ...]:
        target = model.embed_image(latents[:, -1:])
        return tuple(model.predict_target(target, reference, txt, vec, rope, grid) for txt in branches)

    return step


def step_shape(config: JoyImageEditConfig, inputs: dict[str, Tensor]) -> str:
    n = inputs["latents"][0, :, 0].numel() // 4
    lengths = f"{inputs['cond'].shape[1]} and {inputs['uncond'].shape[1]}"
    return f"width {config.hidden_size}, {config.num_layers} blocks, {n} image and {lengths} text tokens"


def step_fp32(quick: bool, folder: Path) -> Result:
    ours, reference = transformers(quick, folder, torch.float32)
    inputs = transformer_inputs(ours.config, quick, torch.float32)
    result = compare(
        lambda: reference_step(reference, inputs),
        our_step(ours, inputs),
        shape=step_shape(ours.config, inputs),
        equal="target velocities of both guidance branches",
        tolerance=1e-5,
        pairs=2 if quick else 9,
    )
    result.notes["savings"] = (
        "prompt, time, rotary table and reference tokens once per run; last block: target only"
    )
    return result


def forward_fp32(quick: bool, folder: Path) -> Result:
    ours, reference = transformers(quick, folder, torch.float32)
    inputs = transformer_inputs(ours.config, quick, torch.float32)
    call = (inputs["latents"], inputs["timestep"], inputs["cond"])
    result = compare(
        lambda: reference(*call, return_dict=False),
        lambda: ours(*call, return_dict=False),
        shape=step_shape(ours.config, inputs),
        equal="velocities of all items",
        tolerance=1e-5,
        pairs=2 if quick else 9,
    )
    result.notes["savings"] = "the prompt's half of the last block, which nothing reads"
    return result


def block_fp32(quick: bool, folder: Path) -> Result:
    ours, reference = transformers(quick, folder, torch.float32)
    inputs = transformer_inputs(ours.config, quick, torch.float32)
    img, txt = ours.embed_image(inputs["latents"]), ours.embed_text(inputs["cond"])
    vec = ours.embed_time(inputs["timestep"])
    grid = ours.token_grid(inputs["latents"])
    rope = ours.rope(grid)
    # The reference's tables hold every angle twice, for the two channels of a pair.
    table = tuple(angles.repeat_interleave(2, dim=1) for angles in rope)
    return compare(
        lambda: reference.double_blocks[0](img, txt, vec, (table, None)),
        lambda: ours.double_blocks[0](img, txt, vec, rope),
        shape=step_shape(ours.config, inputs),
        equal="image and text tokens after one block, the same work on both sides",
        tolerance=1e-5,
        pairs=2 if quick else 15,
    )


def step_bf16(quick: bool, folder: Path) -> Result:
    """From a bf16 checkpoint, each side as it computes by itself. Neither is exact: both are measured against
    float64 on the same weights and inputs."""
    from diffusers import JoyImageEditTransformer3DModel as Reference

    ours, reference = transformers(quick, folder, torch.bfloat16)
    inputs = transformer_inputs(ours.config, quick, torch.bfloat16)
    exact_model = Reference.from_pretrained(folder, torch_dtype=torch.float32).eval().double()
    exact = reference_step(exact_model, {name: x.double() for name, x in inputs.items()})
    del exact_model
    theirs = difference(reference_step(reference, inputs), exact)
    computed = "fp32" if ours.activation_dtype(ours.device) is torch.float32 else "bf16"
    result = compare(
        lambda: reference_step(reference, inputs),
        our_step(ours, inputs),
        shape=step_shape(ours.config, inputs),
        equal="target velocities; the difference is to float64, at most twice the reference's own",
        tolerance=2 * theirs,
        pairs=2 if quick else 5 if computed == "bf16" else 3,
        distance=lambda ours, _: difference(ours, exact),
    )
    result.notes = {"reference_error": theirs, "computed_in": computed}
    result.remark = f"ours computes in {computed}; error to float64: the reference's {theirs:.0e}"
    if computed == "fp32":
        result.met = result.ratio >= BF16_RATIO
    return result


def step_bf16_avx2(quick: bool, folder: Path) -> Result | None:
    """The row above as a CPU without bf16 units runs it; on such a CPU the row above is that already."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    path = folder / "row.json"
    arguments = ["-m", "benchmarks.joyimage", "--only", "step_bf16", "--out", str(path)]
    run_child(arguments + ["--quick"] * quick, AVX2)
    row = json.loads(path.read_text(encoding="utf-8"))["rows"]["step_bf16"]
    fields = {field.name for field in dataclasses.fields(Result)} - {"met"}
    result = Result(**{name: value for name, value in row.items() if name in fields})
    if result.notes["computed_in"] != "fp32":
        raise UnequalResults("the instruction set could not be limited: this computed in bf16")
    result.notes["environment"] = AVX2
    return result


def prompt_pair(quick: bool, folder: Path) -> Result:
    """Positive and negative prompt about one picture: the reference reads each by itself."""
    write_random_checkpoint(folder, seed=3, dtype=torch.float32)
    side = 128 if quick else 640
    save_encoder(folder, quick, side * side)
    ours, reference = pipelines(folder)
    picture = photograph(side, side)
    tokens = ours.processor.image_processor([picture])["image_grid_thw"].prod().item() // 4

    def theirs() -> tuple[Tensor, ...]:
        both = [reference.encode_prompt_multiple_images([p], images=[picture]) for p in (PROMPT, NEGATIVE)]
        return tuple(states for states, _ in both)

    def embeds() -> tuple[Tensor, ...]:
        both = ours._embed_prompts([[PROMPT], [NEGATIVE]], [picture], None)
        return tuple(states for states, _ in both)

    text = ours.text_encoder.config.text_config
    lengths = [states.shape[1] for states in embeds()]
    result = compare(
        theirs,
        embeds,
        shape=f"width {text.hidden_size}, {text.num_hidden_layers} layers, vocabulary {text.vocab_size}, "
        f"{tokens} image tokens, {lengths[0]} and {lengths[1]} tokens embedded",
        equal="embeddings of both prompts",
        tolerance=1e-5,
        pairs=2 if quick else 7,
    )
    result.notes["savings"] = "the picture and the common start of the prompts once; no logits"
    return result


def save_encoder(folder: Path, quick: bool, max_pixels: int) -> None:
    """Replace the checkpoint's prompt encoder by a larger one in the 8 B's proportions."""
    raw = read_json(folder / "text_encoder" / "config.json")
    width, heads, layers = (256, 2, 4) if quick else (768, 6, 8)
    raw["text_config"] |= {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 8 * width,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
    }
    raw["vision_config"] |= {
        "depth": 6,
        "hidden_size": width // 4,
        "intermediate_size": width,
        "num_heads": width // 64,
        "out_hidden_size": width,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [1, 3, 5],
    }
    config = Qwen3VLConfig.from_dict(raw)
    save_random(Qwen3VLForConditionalGeneration, config, folder / "text_encoder", torch.float32)
    path = folder / "processor" / "preprocessor_config.json"
    settings = read_json(path)
    settings["size"] = {"shortest_edge": 16384, "longest_edge": max_pixels}
    write_json(path, {k: v for k, v in settings.items() if k not in ("min_pixels", "max_pixels")})


def vaes(quick: bool, folder: Path) -> tuple[AutoencoderKLWan, Any]:
    """Ours and the reference's at full width and depth, from the same files."""
    from diffusers import AutoencoderKLWan as Reference

    save_random(AutoencoderKLWan, AutoencoderKLWanConfig(base_dim=16 if quick else 96), folder, torch.float32)
    reference = Reference.from_pretrained(folder, torch_dtype=torch.float32)
    return AutoencoderKLWan.from_pretrained(folder), reference.requires_grad_(False).eval()


def vae_encode(quick: bool, folder: Path) -> Result:
    ours, reference = vaes(quick, folder)
    side = 64 if quick else 256
    pixels = im.to_latent_input([photograph(side, side)])

    def posterior(vae: Any) -> tuple[Tensor, Tensor]:
        distribution = vae.encode(pixels).latent_dist
        return distribution.mean, distribution.logvar

    return compare(
        lambda: posterior(reference),
        lambda: posterior(ours),
        shape=f"one picture of {side} x {side} pixels, VAE of {'small' if quick else 'the published'} size",
        equal="mean and log variance",
        tolerance=1e-5,
        pairs=2 if quick else 5,
    )


def vae_decode(quick: bool, folder: Path) -> Result:
    ours, reference = vaes(quick, folder)
    side = 64 if quick else 256
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, ours.config.z_dim, 1, side // 8, side // 8, generator=generator)
    wanted = reference.decode(latents[-1:], return_dict=False)[0]
    if (wanted.abs() >= 1).float().mean() > 0.5:
        raise UnequalResults("most of the picture is clamped, which proves nothing")
    result = compare(
        lambda: reference.decode(latents, return_dict=False)[0][-1:],
        lambda: ours.decode(latents[-1:], return_dict=False)[0],
        shape=f"an edit of {side} x {side} pixels, VAE of {'small' if quick else 'the published'} size",
        equal="the picture",
        tolerance=1e-5,
        pairs=2 if quick else 3,
    )
    result.notes["savings"] = "the reference decodes the given picture as well and drops it"
    return result


def edit(quick: bool, folder: Path) -> Result:
    write_random_checkpoint(folder, seed=3, dtype=torch.float32)
    side = 64 if quick else 256
    if not quick:
        enlarge(folder)
    ours, reference = pipelines(folder)
    ours.buckets = [(side, side)]
    return compare(
        lambda: run_edit(reference, side),
        lambda: run_edit(ours, side),
        shape=f"{side} x {side} pixels, guidance, prompts included; "
        f"width {ours.transformer.config.hidden_size}, {ours.transformer.config.num_layers} blocks",
        equal="the picture",
        tolerance=1e-4,
        pairs=2 if quick else 5,
    )


def enlarge(folder: Path) -> None:
    """Replace the networks of the tiny checkpoint by ones of a few million parameters."""
    save_encoder(folder, True, 65536)
    transformer = JoyImageEditConfig(hidden_size=512, num_attention_heads=4, num_layers=4, text_dim=256)
    save_random(JoyImageEditTransformer3DModel, transformer, folder / "transformer", torch.float32)
    save_random(AutoencoderKLWan, AutoencoderKLWanConfig(base_dim=32), folder / "vae", torch.float32)


def run_edit(pipe: Any, side: int, steps: int = 4) -> Tensor:
    """(1, H, W, 3) in [0, 1]. The global generator serves both draws, as the reference does anyway."""
    find = "diffusers.pipelines.joyimage.image_processor.find_best_bucket"
    is_ours = isinstance(pipe, JoyImageEditPipeline)  # it has `buckets`, and must not load diffusers here
    with contextlib.nullcontext() if is_ours else patch(find, return_value=(side, side)):
        images = pipe(
            image=photograph(side + 30, side),
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=torch.manual_seed(11),
            output_type="np",
        ).images
    return torch.from_numpy(images)


class OurProcessor:
    """Our processor in the reference's place, equal to it; the reference's needs torchvision."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, **inputs: Any) -> Any:
        batch = self.processor(**inputs)
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.processor.image_token_id).long()
        return batch


def pipelines(folder: Path) -> tuple[JoyImageEditPipeline, Any]:
    return our_pipeline(folder), reference_pipeline(folder, torch.float32)


def our_pipeline(folder: Path) -> JoyImageEditPipeline:
    pipe = JoyImageEditPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    from joyedit.text.qwen3_vl_processor import Qwen3VLProcessor

    transformers.logging.disable_progress_bar()

    def part(kind: Any, name: str) -> Any:
        return kind.from_pretrained(folder / name, torch_dtype=dtype)

    encoder = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        folder / "text_encoder", dtype=dtype
    )
    pipe = diffusers.JoyImageEditPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=part(diffusers.AutoencoderKLWan, "vae").eval(),
        text_encoder=encoder.eval(),
        tokenizer=transformers.Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=part(diffusers.JoyImageEditTransformer3DModel, "transformer").eval(),
        processor=None,
    )
    processor = Qwen3VLProcessor.from_pretrained(folder / "processor")
    pipe.processor = OurProcessor(processor)
    # The byte vocabulary of these checkpoints has a longer system turn than the 34 tokens of the real one.
    system = pipe.prompt_template_encode["multiple_images"].partition("{}")[0] + "<|im_start|>"
    dropped = len(processor.tokenizer.encode(system))
    pipe.prompt_template_encode_start_idx = {"image": dropped, "multiple_images": dropped}
    pipe.set_progress_bar_config(disable=True)
    return pipe


IMPORTS = {
    "torch": "import torch",
    "ours": "from joyedit.pipelines.joyimage import JoyImageEditPipeline",
    "reference": "from diffusers import JoyImageEditPipeline",
}


def import_time(quick: bool, folder: Path) -> Result:
    """User seconds of fresh processes; the first run of each only warms the file cache."""
    runs = [
        {name: run_child(["-c", line]).user_seconds for name, line in IMPORTS.items()}
        for _ in range(2 if quick else 5)
    ][1:]
    result = summary(
        [(one["reference"], one["ours"]) for one in runs],
        shape="user CPU seconds of a process that imports the pipeline",
        equal="nothing to compare",
        unit="CPU s",
    )
    beside_torch = float(np.median([one["ours"] / one["torch"] for one in runs]))
    torch_seconds = float(np.median([one["torch"] for one in runs]))
    result.met = beside_torch <= IMPORT_RATIO
    result.notes = {"import_torch": torch_seconds, "ours_over_import_torch": beside_torch}
    result.remark = f"{beside_torch:.2f} x `import torch`"
    return result


def load_time(quick: bool, folder: Path) -> Result:
    """A transformer of 0.85 GB in bf16 whose file is in the page cache, until every page was touched once."""
    from diffusers import JoyImageEditTransformer3DModel as Reference

    save_random(JoyImageEditTransformer3DModel, large_config(quick), folder, torch.bfloat16)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    opened: dict[str, list[float]] = {"reference": [], "ours": []}

    def touched(side: str, load: Callable[[], nn.Module]) -> nn.Module:
        before = time.perf_counter()
        network = load()
        opened[side].append(time.perf_counter() - before)
        for parameter in network.parameters():
            parameter.flatten()[:: 4096 // parameter.element_size()].float().sum().item()
        return network

    result = compare(
        lambda: touched("reference", lambda: Reference.from_pretrained(folder, torch_dtype=torch.bfloat16)),
        lambda: touched("ours", lambda: JoyImageEditTransformer3DModel.from_pretrained(folder)),
        shape=f"{size / 1e9:.2f} GB bf16 transformer, file in the page cache; load, and touch every page",
        equal="all parameters, bit by bit",
        tolerance=0.0,
        pairs=2 if quick else 5,
        distance=different_bits,
    )
    result.notes = {f"{side}_until_loaded": float(np.median(s[1:])) for side, s in opened.items()}
    return result


def different_bits(ours: nn.Module, reference: nn.Module) -> float:
    a, b = ours.state_dict(), reference.state_dict()
    return float(
        a.keys() != b.keys() or any(not torch.equal(a[k], b[k]) or a[k].dtype != b[k].dtype for k in b)
    )


def large_config(quick: bool) -> JoyImageEditConfig:
    if quick:
        return transformer_config(quick)
    return JoyImageEditConfig(hidden_size=2048, num_attention_heads=16, num_layers=4, text_dim=32)


def peak(quick: bool, folder: Path) -> Result:
    """Load a bf16 checkpoint and run an edit with it, each side in a process of its own."""
    write_random_checkpoint(folder, seed=3)
    save_random(
        JoyImageEditTransformer3DModel,
        dataclasses.replace(large_config(quick), text_dim=32),
        folder / "transformer",
        torch.bfloat16,
    )
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    pairs, pictures, seconds = [], {}, {"reference": [], "ours": []}
    for _ in range(1 if quick else 3):
        peaks = {}
        for side in ("reference", "ours"):
            out = folder / f"{side}.npy"
            child = run_child(["-m", "benchmarks.joyimage", "--peak", side, str(folder), str(out)])
            seconds[side].append(child.user_seconds)
            peaks[side] = json.loads(out.with_suffix(".json").read_text())["bytes"] / 1e9
            pictures[side] = torch.from_numpy(np.load(out))
        pairs.append((peaks["reference"], peaks["ours"]))
    # Two bf16 runs are not equal in their last digits; that they made the same picture is seen all the same.
    off = check(difference(pictures["ours"], pictures["reference"]), 0.1)
    used = {f"{side}_user_seconds": float(np.median(each)) for side, each in seconds.items()}
    theirs, ours = used.values()
    return summary(
        pairs,
        shape=f"{size / 1e9:.2f} GB bf16 checkpoint: import, load and edit 64 x 64 pixels in 2 steps",
        equal="the picture, as far as bf16 allows",
        unit="GB",
        difference=off,
        tolerance=0.1,
        remark=f"the whole process {ours:.2g} instead of {theirs:.2g} CPU s",
        notes=used,
    )


def run_and_tell_peak(side: str, folder: Path, out: Path) -> None:
    """The process that `peak` starts: an edit to `out`, the peak of its memory beside it."""
    pipe = our_pipeline(folder) if side == "ours" else reference_pipeline(folder, torch.bfloat16)
    if side == "ours":
        pipe.buckets = [(64, 64)]
    with torch.no_grad():
        np.save(out, run_edit(pipe, 64, steps=2).numpy())
    write_json(out.with_suffix(".json"), {"bytes": peak_memory()})


@torch.no_grad()
def save_random(kind: type[Network], config: Any, folder: Path, dtype: torch.dtype) -> None:
    """Save a network with seeded weights that keep activations near 1; no gain is 1, no bias and no table
    0."""
    with torch.device("meta"):
        network = kind(config)
    network = network.to_empty(device="cpu").to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        last = name.rpartition(".")[2]
        if last == "modulate_table":
            parameter.normal_(0, 0.5, generator=generator)
        elif last == "bias":
            parameter.normal_(0, 0.1, generator=generator)
        elif last == "gamma" or parameter.ndim == 1:
            parameter.normal_(1, 0.2, generator=generator)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
    network.save_pretrained(folder)


@functools.cache
def photograph(width: int, height: int) -> Image.Image:
    """Smooth colour ramps with a rectangle: something for the networks to see."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    ramps = np.stack([np.sin(x * a + y * b) for a, b in generator.uniform(1, 9, (3, 2))], axis=-1)
    pixels = np.uint8(127 + 120 * ramps)
    pixels[height // 4 : height // 2, width // 3 : width // 2] = generator.integers(0, 255, 3)
    return Image.fromarray(pixels)


ROWS = {
    "step_fp32": Row("transformer step, fp32", step_fp32, least=1.0),
    "forward_fp32": Row("whole forward, fp32", forward_fp32, least=1.0),
    "block_fp32": Row("one transformer block, fp32 (same work)", block_fp32, least=1.0),
    "step_bf16": Row("transformer step, bf16 checkpoint", step_bf16, expected="5x in fp32"),
    "step_bf16_avx2": Row(
        "the same on a CPU without bf16 units (limited to AVX2)", step_bf16_avx2, least=BF16_RATIO
    ),
    "prompt_pair": Row("positive and negative prompt with a picture", prompt_pair, least=1.9),
    "vae_encode": Row("VAE encode, 256 px", vae_encode, least=2.4),
    "vae_decode": Row("VAE decode within an edit, 256 px", vae_decode, least=4.4),
    "edit": Row("whole small edit, 4 steps", edit),
    "import": Row("import of the pipeline", import_time, expected="1.35 x torch"),
    "load": Row("load a bf16 transformer", load_time),
    "peak": Row("peak memory of load and edit", peak),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        run_and_tell_peak(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main(ROWS, "joyimage")
