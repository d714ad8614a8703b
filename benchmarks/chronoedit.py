"""ChronoEdit beside diffusers.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.chronoedit

Every row runs on seeded random weights that both sides read from the same files. The autoencoder has the
published size. Of the others some layers of the published width run, or narrower ones where a CPU would take
hours; each row says which. Two things would flatter a ratio, and are kept in proportion or told:

- The video has as many tokens as a film of 480 x 832 pixels, so that what a step saves, the projections of
  the prompt and the photograph, has its real weight beside them.
- The vision tower leaves out one layer: one of 8 here, one of 32 there.

One thread, because two also measure what else runs here.

B batch   C channels   F frames   T latent frames   H, W height and width   L text tokens   M image tokens
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.joyimage import save_random
from benchmarks.random_checkpoint import write_random_chronoedit_checkpoint
from benchmarks.side_by_side import (
    ROOT,
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
from joyedit.checkpoints.json_files import write_json
from joyedit.checkpoints.network import Network
from joyedit.media import images as im
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.clip import CLIPVisionConfig, CLIPVisionModel
from joyedit.models.umt5 import UMT5Config, UMT5EncoderModel
from joyedit.models.wan_vae import AutoencoderKLWan, AutoencoderKLWanConfig
from joyedit.pipelines.chronoedit import ChronoEditPipeline
from joyedit.text.t5_tokenizer import T5TokenizerFast

PROMPT, NEGATIVE = "Make the coffee red.", ""
LENGTH, WORDS = 512, 24  # tokens that a prompt is padded to, and those of a short one
LEFT = 2e-5  # of the autoencoder's scale at full width: sixty layers, in sums of up to 10,368 products


def load(kind: type[Network], reference: Any, config: Any, folder: Path, option: str) -> tuple[Any, Any]:
    """Ours and the reference's, from the same fp32 files. `option`: the reference's name for the dtype."""
    import transformers

    transformers.logging.disable_progress_bar()
    save_random(kind, config, folder, torch.float32)
    theirs = reference.from_pretrained(folder, **{option: torch.float32})
    return kind.from_pretrained(folder), theirs.requires_grad_(False).eval()


def photograph(height: int, width: int) -> Image.Image:
    return Image.open(ROOT / "examples" / "coffee.jpg").convert("RGB").resize((width, height))


def step(quick: bool, folder: Path) -> Result:
    """Both branches of the guidance, with what a run prepares once prepared."""
    from diffusers import ChronoEditTransformer3DModel as Reference

    heads, (rows, columns), layers = (2, (4, 6), 2) if quick else (4, (60, 104), 2)
    width = 128 * heads
    config = ChronoEditConfig(
        num_attention_heads=heads,
        text_dim=width * 4 // 5,
        ffn_dim=width * 27 // 10,
        num_layers=layers,
        image_dim=width // 4,
        added_kv_proj_dim=width,
    )
    ours, reference = load(ChronoEditTransformer3DModel, Reference, config, folder, "torch_dtype")
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.in_channels, 2, rows, columns, generator=generator)
    prompts = [torch.randn(1, LENGTH, config.text_dim, generator=generator) for _ in range(2)]
    seen = torch.randn(1, 257, width // 4, generator=generator)
    time = torch.tensor([737])
    rope, vec = ours.rope(ours.token_grid(latents)), ours.embed_time(time)
    texts, image = [ours.embed_text(prompt) for prompt in prompts], ours.embed_image(seen)
    result = compare(
        lambda: tuple(reference(latents, time, prompt, seen, return_dict=False)[0] for prompt in prompts),
        lambda: tuple(ours.predict(latents, vec, text, image, rope) for text in texts),
        shape=f"{layers} blocks of width {width}, {rows * columns // 2} video, {LENGTH} text and 257 "
        "image tokens",
        equal="velocities of both guidance branches",
        tolerance=1e-5,
        pairs=2 if quick else 5,
    )
    result.notes["savings"] = "keys and values of prompt and photograph, time and rotary table once per run"
    return result


def text(quick: bool, folder: Path) -> Result:
    """A short prompt, padded to the length that the transformer reads."""
    from transformers import UMT5EncoderModel as Reference

    sizes = dict(d_model=64, d_kv=16, d_ff=160, num_heads=4) if quick else {}
    config = UMT5Config(vocab_size=1000, num_layers=2 if quick else 1, **sizes)
    ours, reference = load(UMT5EncoderModel, Reference, config, folder, "dtype")
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    ids[:, : WORDS - 1] = torch.randint(4, 1000, (WORDS - 1,), generator=torch.manual_seed(2))
    ids[:, WORDS - 1] = 1
    mask = (torch.arange(LENGTH) < WORDS).long()[None]

    def theirs() -> Tensor:
        """As the pipeline does: what the padding became is replaced by zeros."""
        states = reference(ids, mask).last_hidden_state[:, :WORDS]
        return F.pad(states, (0, 0, 0, LENGTH - WORDS))

    result = compare(
        theirs,
        lambda: ours.encode(ids, mask),
        shape=f"{config.num_layers} of 24 layers of width {config.d_model}, {WORDS} tokens, padded: {LENGTH}",
        equal="prompt embeddings",
        tolerance=1e-5,
        pairs=2 if quick else 7,
    )
    result.notes["savings"] = "the padding, which is masked and replaced by zeros"
    return result


def vision(quick: bool, folder: Path) -> Result:
    """What the transformer sees of the photograph: the tokens of the layer before the last."""
    from transformers import CLIPVisionModel as Reference

    layers = 3 if quick else 8
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4) if quick else {}
    config = CLIPVisionConfig(num_hidden_layers=layers, **sizes)
    ours, reference = load(CLIPVisionModel, Reference, config, folder, "dtype")
    pixels = torch.randn(1, 3, 224, 224, generator=torch.manual_seed(3))
    return compare(
        lambda: reference(pixels, output_hidden_states=True).hidden_states[-2],
        lambda: ours.hidden_states(pixels, layer=-2),
        shape=f"{layers} of 32 layers of width {config.hidden_size}, 257 tokens",
        equal="tokens of the layer before the last",
        tolerance=1e-5,
        pairs=2 if quick else 7,
    )


def vaes(quick: bool, folder: Path) -> tuple[AutoencoderKLWan, Any]:
    from diffusers import AutoencoderKLWan as Reference

    config = AutoencoderKLWanConfig(base_dim=32 if quick else 96)
    return load(AutoencoderKLWan, Reference, config, folder, "torch_dtype")


def vae_size(quick: bool, frames: int) -> tuple[int, int]:
    """Height and width; a sixteenth of 480 x 832 pixels, of long films a quarter of that."""
    return (32, 48) if quick else (64, 112) if frames > 5 else (128, 224)


def film(height: int, width: int, frames: int) -> Tensor:
    """(1, 3, F, H, W): a photograph that moves."""
    still = im.to_latent_input([photograph(height, width)])
    return torch.cat([still.roll(3 * i, dims=-1) for i in range(frames)], dim=2)


def noise(height: int, width: int, frames: int) -> Tensor:
    """Latents (1, 16, T, H / 8, W / 8)."""
    shape = (1, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
    return torch.randn(shape, generator=torch.manual_seed(4))


def encode(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    distribution = vae.encode(pixels).latent_dist
    return distribution.mean, distribution.logvar


def decode(vae: Any, latents: Tensor) -> Tensor:
    pixels = vae.decode(latents, return_dict=False)[0]
    if (pixels.abs() >= 1).float().mean() > 0.5:
        raise UnequalResults("most of the film is clamped, which proves nothing")
    return pixels


def vae_row(work: Callable, given: Callable, frames: int, quick: bool, folder: Path) -> Result:
    """`work`(vae, `given`(H, W, F)): coding of a film."""
    frames = min(frames, 9) if quick else frames
    ours, reference = vaes(quick, folder)
    height, width = vae_size(quick, frames)
    x = given(height, width, frames)
    return compare(
        lambda: work(reference, x),
        lambda: work(ours, x),
        shape=f"{frames} frames of {height} x {width}, VAE of {'small' if quick else 'the published'} size",
        equal="mean and log variance" if work is encode else "the film",
        tolerance=LEFT,
        pairs=2 if quick or frames > 5 else 3,
    )


def vae_peak(name: str, quick: bool, folder: Path) -> Result:
    """Load the autoencoder and code a film of five frames, each side in a process of its own."""
    save_random(AutoencoderKLWan, AutoencoderKLWanConfig(base_dim=32 if quick else 96), folder, torch.float32)
    pairs, results, before = [], {}, {}
    for _ in range(1 if quick else 2):
        peaks = {}
        for side in ("reference", "ours"):
            out = folder / f"{side}.npy"
            words = [
                "-m",
                "benchmarks.chronoedit",
                "--peak",
                side,
                name,
                str(folder),
                str(out),
                str(int(quick)),
            ]
            run_child(words)
            told = json.loads(out.with_suffix(".json").read_text())
            peaks[side], before[f"{side}_GB_before"] = told["bytes"] / 1e9, told["before"] / 1e9
            results[side] = torch.from_numpy(np.load(out))
        pairs.append((peaks["reference"], peaks["ours"]))
    height, width = vae_size(quick, 5)
    off = check(difference(results["ours"], results["reference"]), LEFT)
    return summary(
        pairs,
        shape=f"import, load and {name} 5 frames of {height} x {width}",
        equal="mean" if name == "encode" else "the film",
        unit="GB",
        difference=off,
        tolerance=LEFT,
        notes=before,
    )


def run_and_tell_peak(side: str, name: str, folder: Path, out: Path, quick: bool) -> None:
    """The process that `vae_peak` starts: a result to `out`, the peak of its memory beside it."""
    if side == "ours":
        vae: Any = AutoencoderKLWan.from_pretrained(folder)
    else:
        from diffusers import AutoencoderKLWan as Reference

        vae = Reference.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False).eval()
    given = (*vae_size(quick, 5), 5)
    x = film(*given) if name == "encode" else noise(*given)
    before = peak_memory()
    with torch.no_grad():
        result = encode(vae, x)[0] if name == "encode" else decode(vae, x)
    np.save(out, result.numpy())
    write_json(out.with_suffix(".json"), {"bytes": peak_memory(), "before": before})


def pipelines(quick: bool, folder: Path) -> tuple[ChronoEditPipeline, Any]:
    """Both on the tiny checkpoint, unless `quick` with larger networks."""
    write_random_chronoedit_checkpoint(folder, seed=3)
    tokenizer = T5TokenizerFast.from_pretrained(folder, subfolder="tokenizer")
    width, heads = (48, 2) if quick else (512, 4)
    networks: dict[str, tuple[type[Network], Any]] = {
        "transformer": (
            ChronoEditTransformer3DModel,
            ChronoEditConfig(
                num_attention_heads=heads,
                attention_head_dim=width // heads,
                text_dim=width,
                freq_dim=256,
                ffn_dim=width * 27 // 10,
                num_layers=2 if quick else 4,
                image_dim=32,
                added_kv_proj_dim=width,
            ),
        ),
        "vae": (AutoencoderKLWan, AutoencoderKLWanConfig(base_dim=8 if quick else 32)),
        "text_encoder": (
            UMT5EncoderModel,
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=width,
                d_kv=width // heads // 2,
                d_ff=width * 5 // 2,
                num_layers=2,
                num_heads=2 * heads,
            ),
        ),
        "image_encoder": (
            CLIPVisionModel,
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                image_size=56,
            ),
        ),
    }
    for part, (kind, config) in networks.items():
        for file in (folder / part).iterdir():
            file.unlink()
        save_random(kind, config, folder / part, torch.float32)
    ours = ChronoEditPipeline.from_pretrained(folder)
    ours.set_progress_bar_config(disable=True)
    return ours, reference_pipeline(folder, tokenizer)


class OurTokenizer:
    """Our tokenizer in the reference's place: transformers 5 makes another one of tokenizer.json."""

    def __init__(self, tokenizer: T5TokenizerFast):
        self.tokenizer = tokenizer

    def __call__(self, texts: Any, add_special_tokens: bool, return_attention_mask: bool, **how: Any) -> Any:
        return self.tokenizer(texts, **how)


def reference_pipeline(folder: Path, tokenizer: T5TokenizerFast) -> Any:
    import diffusers
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    diffusers.utils.logging.set_verbosity_error()
    for library in (diffusers.utils.logging, transformers.logging):
        library.disable_progress_bar()
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(folder / "scheduler")
    parts = {
        "transformer": diffusers.ChronoEditTransformer3DModel,
        "vae": diffusers.AutoencoderKLWan,
        "text_encoder": transformers.UMT5EncoderModel,
        "image_encoder": transformers.CLIPVisionModel,
    }
    networks = {part: kind.from_pretrained(folder / part).eval() for part, kind in parts.items()}
    processor = CLIPImageProcessorPil.from_pretrained(folder / "image_processor")
    pipe = diffusers.ChronoEditPipeline(
        **networks, tokenizer=None, image_processor=processor, scheduler=scheduler
    )
    pipe.tokenizer = OurTokenizer(tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_edit(pipe: Any, height: int, width: int, **options: Any) -> Tensor:
    """(1, F, H, W, 3) in [0, 1]."""
    frames = pipe(
        image=photograph(height, width),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.manual_seed(5),
        output_type="np",
        **options,
    ).frames
    return torch.from_numpy(np.asarray(frames))


def whole(quick: bool, folder: Path, what: str = "5 frames in 4 steps", **options: Any) -> Result:
    ours, reference = pipelines(quick, folder)
    height, width = (32, 48) if quick else (128, 224)
    config = ours.transformer.config
    return compare(
        lambda: run_edit(reference, height, width, **options),
        lambda: run_edit(ours, height, width, **options),
        shape=f"{height} x {width} pixels, {what}, guidance; {config.num_layers} blocks of width "
        f"{config.width}, VAE of a third of the published width",
        equal="the film",
        tolerance=1e-4,
        pairs=2 if quick else 3,
    )


def reasoning(quick: bool, folder: Path) -> Result:
    return whole(
        quick,
        folder,
        "29 frames in the first of 4 steps, then 5",
        num_frames=29,
        enable_temporal_reasoning=True,
        num_temporal_reasoning_steps=1,
    )


ROWS = {
    "step": Row("transformer step, two branches", step, least=1.0),
    "text": Row("text encoder, a short prompt", text, least=3.0),
    "vision": Row("vision tower", vision, least=1.0),
    "encode_5": Row("VAE encode, 5 frames", partial(vae_row, encode, film, 5), least=1.5),
    "decode_5": Row("VAE decode, 5 frames", partial(vae_row, decode, noise, 5), least=1.5),
    "encode_29": Row("VAE encode, 29 frames", partial(vae_row, encode, film, 29), least=1.5),
    "decode_29": Row("VAE decode, 29 frames", partial(vae_row, decode, noise, 29), least=1.5),
    "encode_peak": Row("peak memory of VAE encode", partial(vae_peak, "encode"), least=1.0),
    "decode_peak": Row("peak memory of VAE decode", partial(vae_peak, "decode"), least=1.0),
    "whole": Row("whole edit", whole),
    "reasoning": Row("whole edit with temporal reasoning", reasoning),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        side, name, folder, out, quick = sys.argv[2:]
        run_and_tell_peak(side, name, Path(folder), Path(out), quick == "1")
    else:
        main(ROWS, "chronoedit")
