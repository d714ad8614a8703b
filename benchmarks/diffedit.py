"""DiffEdit on Stable Diffusion 1.x beside diffusers.

    OMP_NUM_THREADS=1 python -m benchmarks.diffedit

Every row runs on seeded random weights that both sides read from the same folder: the four levels and eight
heads of the released UNet at a fifth of its width, and a VAE so narrow that coding a picture weighs about as
much beside a call of the UNet as it does there. One thread, because two also measure what else runs here.

Ours runs with `reference_quirks=True`, which makes the results comparable and saves nothing: its masks are
cut from the same differences, its inversion starts from the same draw.

B batch   T steps taken   h, w latent size
"""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.random_checkpoint import write_random_diffedit_checkpoint
from benchmarks.side_by_side import (
    ROOT,
    Result,
    Row,
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
from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel
from joyedit.models.sd_vae import AutoencoderKL, AutoencoderKLConfig
from joyedit.pipelines.diffedit import StableDiffusionDiffEditPipeline

SOURCE, TARGET = "a bowl of fruits", "a bowl of pears"
SIDE = 192
STEPS = 10  # of which 8 are taken
WHOLE = 1e-3  # of a whole edit: guidance multiplies the rounding of its 16 steps with untrained networks


def checkpoint(quick: bool, folder: Path) -> Path:
    """A folder of the tiny text encoder and, unless `quick`, of larger networks."""
    write_random_diffedit_checkpoint(folder, seed=3, dtype=torch.float32)
    if quick:
        return folder
    unet = UNet2DConditionConfig(block_out_channels=(64, 128, 256, 256), cross_attention_dim=32)
    vae = AutoencoderKLConfig(block_out_channels=(32, 64, 128, 128))
    save_random(UNet2DConditionModel(unet), folder / "unet")
    save_random(AutoencoderKL(vae), folder / "vae")
    return folder


@torch.no_grad()
def save_random(network: Network, folder: Path) -> None:
    """Save a network with seeded weights that keep activations near 1; no gain is 1, no bias 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=generator)
        else:
            parameter.normal_(1, 0.2, generator=generator)
    network.save_pretrained(folder)


def our_pipeline(folder: Path) -> StableDiffusionDiffEditPipeline:
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(folder, reference_quirks=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_pipeline(folder: Path) -> Any:
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    for library in (diffusers.utils.logging, transformers.logging):
        library.disable_progress_bar()
    pipe = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipelines(quick: bool, folder: Path) -> tuple[Any, StableDiffusionDiffEditPipeline]:
    checkpoint(quick, folder)
    return reference_pipeline(folder), our_pipeline(folder)


def photograph(quick: bool) -> Image.Image:
    side = 64 if quick else SIDE
    return Image.open(ROOT / "examples" / "coffee.jpg").convert("RGB").resize((side, side))


def make_mask(pipe: Any, image: Image.Image, quick: bool) -> Tensor:
    """(1, h, w) of 0 and 1."""
    mask = pipe.generate_mask(
        image,
        target_prompt=TARGET,
        source_prompt=SOURCE,
        num_maps_per_mask=3 if quick else 10,
        generator=torch.manual_seed(5),
    )
    return torch.from_numpy(np.asarray(mask))


def invert(pipe: Any, image: Image.Image) -> Tensor:
    """(1, T, C, h, w)."""
    generator = torch.manual_seed(6)
    return pipe.invert(SOURCE, image, num_inference_steps=STEPS, generator=generator).latents


def denoise(pipe: Any, mask: Tensor, levels: Tensor) -> Tensor:
    """(1, H, W, 3) in [0, 1]."""
    images = pipe(
        TARGET,
        mask,
        levels,
        num_inference_steps=STEPS,
        negative_prompt=SOURCE,
        generator=torch.manual_seed(7),
        output_type="np",
    ).images
    return torch.from_numpy(images)


def run_edit(pipe: Any, image: Image.Image, quick: bool) -> tuple[Tensor, Tensor]:
    """Mask and picture, by the three calls of the published guide."""
    mask = make_mask(pipe, image, quick)
    return mask, denoise(pipe, mask.float()[None], invert(pipe, image))


def shape(quick: bool, what: str) -> str:
    side = 64 if quick else SIDE
    return f"{side} x {side} pixels, {what}"


def mask_stage(quick: bool, folder: Path) -> Result:
    reference, ours = pipelines(quick, folder)
    image = photograph(quick)
    result = compare(
        lambda: make_mask(reference, image, quick),
        lambda: make_mask(ours, image, quick),
        shape=shape(quick, f"{3 if quick else 10} noises, guidance with the default negative prompts"),
        equal="the mask, pixel by pixel",
        tolerance=0.0,
        pairs=2 if quick else 3,
    )
    result.notes["savings"] = "two branches instead of four, the photograph is encoded once"
    return result


def mask_stage_of_own_negatives(quick: bool, folder: Path) -> Result:
    """No branch cancels: what is left is the one encoding."""
    reference, ours = pipelines(quick, folder)
    image = photograph(quick)
    options = {"target_negative_prompt": "a cat", "source_negative_prompt": "a dog"}

    def made(pipe: Any) -> Tensor:
        pipe = WithOptions(pipe, options)
        return make_mask(pipe, image, quick)

    return compare(
        partial(made, reference),
        partial(made, ours),
        shape=shape(quick, f"{3 if quick else 10} noises, two negative prompts"),
        equal="the mask, pixel by pixel",
        tolerance=0.0,
        pairs=2,
    )


class WithOptions:
    """A pipeline whose masks are made with more arguments."""

    def __init__(self, pipe: Any, options: dict[str, Any]):
        self.generate_mask = partial(pipe.generate_mask, **options)


def inversion(quick: bool, folder: Path) -> Result:
    reference, ours = pipelines(quick, folder)
    image = photograph(quick)
    return compare(
        lambda: invert(reference, image),
        lambda: invert(ours, image),
        shape=shape(quick, "8 steps, guidance"),
        equal="the latents of every level",
        tolerance=1e-4,
        pairs=2 if quick else 7,
    )


def denoising(quick: bool, folder: Path) -> Result:
    reference, ours = pipelines(quick, folder)
    image = photograph(quick)
    mask, levels = make_mask(ours, image, True).float()[None], invert(ours, image)
    return compare(
        lambda: denoise(reference, mask, levels),
        lambda: denoise(ours, mask, levels),
        shape=shape(quick, "8 steps, guidance, decoding"),
        equal="the picture",
        tolerance=1e-4,
        pairs=2 if quick else 5,
    )


def unet_step(quick: bool, folder: Path) -> Result:
    """What a step of inversion or denoising repeats."""
    reference, ours = pipelines(quick, folder)
    side = (64 if quick else SIDE) // 8
    latents = torch.randn(1, 4, side, side, generator=torch.manual_seed(1))
    text = torch.randn(2, 77, ours.unet.config.context_dim, generator=torch.manual_seed(2))
    time, context = ours.unet.embed_time(torch.tensor([481])), ours.unet.embed_context(text)
    return compare(
        lambda: reference.unet(torch.cat([latents] * 2), 481, text, return_dict=False)[0],
        lambda: ours.unet.predict(latents, time[0], context, branches=2),
        shape=shape(quick, "both branches of the guidance"),
        equal="both predictions",
        tolerance=1e-5,
        pairs=3 if quick else 15,
    )


def whole(quick: bool, folder: Path) -> Result:
    reference, ours = pipelines(quick, folder)
    image = photograph(quick)
    return compare(
        lambda: run_edit(reference, image, quick),
        lambda: run_edit(ours, image, quick),
        shape=shape(quick, "mask, 8 steps of inversion, 8 of denoising"),
        equal="mask and picture",
        tolerance=WHOLE,
        pairs=2 if quick else 3,
    )


def peak(quick: bool, folder: Path) -> Result:
    """Load the checkpoint and run a whole edit, each side in a process of its own."""
    checkpoint(quick, folder)
    pairs, pictures, seconds = [], {}, {"reference": [], "ours": []}
    for _ in range(1 if quick else 2):
        peaks = {}
        for side in seconds:
            out = folder / f"{side}.npy"
            words = ["-m", "benchmarks.diffedit", "--peak", side, str(folder), str(out), str(int(quick))]
            seconds[side].append(run_child(words).user_seconds)
            peaks[side] = json.loads(out.with_suffix(".json").read_text())["bytes"] / 1e9
            pictures[side] = torch.from_numpy(np.load(out))
        pairs.append((peaks["reference"], peaks["ours"]))
    off = check(difference(pictures["ours"], pictures["reference"]), WHOLE)
    used = {f"{side}_user_seconds": float(np.median(each)) for side, each in seconds.items()}
    theirs, ours = used.values()
    return summary(
        pairs,
        shape=shape(quick, "import, load, and the whole edit"),
        equal="the picture",
        unit="GB",
        difference=off,
        tolerance=WHOLE,
        remark=f"the whole process {ours:.2g} instead of {theirs:.2g} CPU s",
        notes=used,
    )


def run_and_tell_peak(side: str, folder: Path, out: Path, quick: bool) -> None:
    """The process that `peak` starts: a picture to `out`, the peak of its memory beside it."""
    open_side: Callable[[Path], Any] = our_pipeline if side == "ours" else reference_pipeline
    with torch.no_grad():
        np.save(out, run_edit(open_side(folder), photograph(quick), quick)[1].numpy())
    write_json(out.with_suffix(".json"), {"bytes": peak_memory()})


ROWS = {
    "mask": Row("mask, default negative prompts", mask_stage, least=1.8),
    "mask_negatives": Row("mask, two negative prompts (four branches)", mask_stage_of_own_negatives),
    "unet_step": Row("UNet, one step with guidance", unet_step, least=1.0),
    "invert": Row("inversion", inversion, least=1.0),
    "denoise": Row("denoising", denoising, least=1.0),
    "whole": Row("whole edit", whole),
    "peak": Row("peak memory of load and edit", peak),
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        run_and_tell_peak(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]), sys.argv[5] == "1")
    else:
        main(ROWS, "diffedit")
