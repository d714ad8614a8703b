"""How well a small DiffEdit edits: held-out pairs of captions, exact regions and targets.

Judged are the mask, by its intersection over union with the region in which source and target are different
shapes; what is kept, in dB outside that region and outside the mask; and the edit itself, as in `evaluate`:
near the target inside the region, as good as the autoencoder outside it, and of the right outline. Beside
each score stand that of the source itself with an empty mask (`nothing`), and that of the target after a
trip through the VAE with the region cut to cells of latents (`ceiling`).
"""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.shapes import evaluate as evaluate_edits
from benchmarks.shapes import scenes, wording
from benchmarks.shapes.sd_vae import SIZE, to_tensor
from joyedit.media.images import to_output
from joyedit.pipelines.diffedit import StableDiffusionDiffEditPipeline

COUNTS = (1, 2)  # shapes in a scene
KINDS = ("recolour", "replace")

# What the small model is called with. Its pictures are small, so a shape is seen through more noise than in
# a photograph, and takes up more of the picture.
SETTINGS: dict[str, Any] = {
    "num_inference_steps": 14,
    "inpaint_strength": 0.7,
    "guidance_scale": 2.0,
    "negative_prompt": "",
    "num_maps_per_mask": 10,
    "mask_encode_strength": 0.5,
    "mask_thresholding_ratio": 10.0,
}


class Case(NamedTuple):
    """A held-out edit: `edit` and `pair` are the same scenes, and `pair` has the captions."""

    edit: scenes.Edit
    pair: scenes.CaptionPair


class Answer(NamedTuple):
    picture: np.ndarray  # (H, W, 3) in [0, 1]
    mask: np.ndarray  # (H, W) bool


class Score(NamedTuple):
    """edit: as any editor is judged. iou: of the mask. kept: dB outside the true region, masked: dB outside
    the mask, both against the source; None where nothing is outside."""

    edit: evaluate_edits.Score
    iou: float
    kept: float | None
    masked: float | None


def held_out(count: int, counts: Sequence[int] = COUNTS, kinds: Sequence[str] = KINDS) -> list[Case]:
    """`count` edits of each kind that no training draws, in scenes of `counts` shapes."""
    cases: dict[str, list[Case]] = {kind: [] for kind in kinds}
    index = 0
    while any(len(group) < count for group in cases.values()):
        edit = scenes.make_edit(index, "held-out", KINDS, counts)
        if len(cases.get(edit.kind, range(count))) < count:
            cases[edit.kind].append(Case(edit, scenes.make_caption_pair(index, "held-out", counts, SIZE)))
        index += 1
    return [case for group in cases.values() for case in group]


def score(case: Case, answer: Answer) -> Score:
    source, region = scenes.draw(case.pair.source, SIZE), case.pair.region
    union = (region | answer.mask).sum()
    iou = float((region & answer.mask).sum() / union) if union else 1.0
    kept, masked = (_decibel(answer.picture, source, ~inside) for inside in (region, answer.mask))
    return Score(evaluate_edits.judge(case.edit, answer.picture), iou, kept, masked)


def _decibel(result: np.ndarray, truth: np.ndarray, where: np.ndarray) -> float | None:
    if not where.any():
        return None
    return float(-10 * np.log10(np.square(result - truth)[where].mean() + 1e-10))


def summarize(scores: Sequence[Score]) -> dict[str, Any]:
    """Success rate, medians and the mean IoU, over all and by kind."""
    report = {**evaluate_edits.summarize(s.edit for s in scores), **_masks(scores)}
    for kind, row in report["kinds"].items():
        row |= _masks([s for s in scores if s.edit.kind == kind])
    return report


def _masks(scores: Sequence[Score]) -> dict[str, float | None]:
    row: dict[str, float | None] = {
        "iou": round(statistics.median(s.iou for s in scores), 3),
        "mean_iou": round(statistics.fmean(s.iou for s in scores), 3),
    }
    for name in ("kept", "masked"):
        values = [v for s in scores if (v := getattr(s, name)) is not None]
        row[name] = round(statistics.median(values), 2) if values else None
    return row


def run(
    pipe: StableDiffusionDiffEditPipeline, cases: Sequence[Case], batch: int = 8, **settings: Any
) -> list[Answer]:
    """What the model makes of each case; number i is drawn from seed i. `settings`: of `pipe.edit`, before
    those of SETTINGS."""
    answers: list[Answer] = []
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        out = pipe.edit(
            [as_image(case.pair.source) for case in part],
            [case.pair.source_caption for case in part],
            [case.pair.target_caption for case in part],
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(part))],
            output_type="np",
            **{**SETTINGS, **settings},
        )
        masks = [_to_pixels(mask > 0) for mask in out.mask]
        answers += [Answer(np.asarray(a), b) for a, b in zip(out.images, masks, strict=True)]
    return answers


@torch.no_grad()
def ceiling(pipe: StableDiffusionDiffEditPipeline, cases: Sequence[Case]) -> list[Answer]:
    """The targets through the VAE; masks are the cells that lie in the region for the larger part."""
    answers = []
    cell = pipe.vae.config.factor
    for case in cases:
        levels = scenes.to_levels(scenes.draw(case.pair.target, SIZE))
        pixels = to_tensor([levels.astype(np.float32) / 255]).to(pipe.vae.device, pipe.vae.dtype)
        back = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
        picture = np.asarray(to_output(back.float(), "np"))[0]
        side = SIZE // cell
        share = case.pair.region.reshape(side, cell, side, cell).mean(axis=(1, 3))
        answers.append(Answer(picture, _to_pixels(share > 0.5)))
    return answers


def nothing(cases: Sequence[Case]) -> list[Answer]:
    """The sources, and empty masks."""
    empty = np.zeros((SIZE, SIZE), bool)
    return [Answer(scenes.draw(case.pair.source, SIZE), empty) for case in cases]


def evaluate(
    pipe: StableDiffusionDiffEditPipeline,
    count: int,
    counts: Sequence[int] = COUNTS,
    kinds: Sequence[str] = KINDS,
    references: bool = True,
    wordings: bool = False,
    **settings: Any,
) -> tuple[dict[str, Any], Image.Image]:
    """`count` held-out edits of each kind in scenes of `counts` shapes: the model's scores and, with
    `references`, those of doing nothing and of the VAE, and with `wordings` the success in each of them; and
    the picture of the first edits of each kind."""
    cases = held_out(count, counts, kinds)
    answers = run(pipe, cases, **settings)
    sides = {"model": answers}
    if references:
        sides |= {"nothing": nothing(cases), "ceiling": ceiling(pipe, cases)}
    report = {
        name: summarize([score(case, answer) for case, answer in zip(cases, side, strict=True)])
        for name, side in sides.items()
    }
    if wordings:
        report["wordings"] = in_other_words(pipe, cases, **settings)
    shown = [i for i in range(len(cases)) if i % count < 12]
    return report, grid([cases[i] for i in shown], [answers[i] for i in shown])


def in_other_words(
    pipe: StableDiffusionDiffEditPipeline, cases: Sequence[Case], **settings: Any
) -> dict[str, Any]:
    """Success and the mean IoU of masks when both captions are in each of `wording.CAPTION_WORDINGS`; the
    first WORDED cases of each kind."""
    kinds = [case.edit.kind for case in cases]
    cases = evaluate_edits.first_of_each(cases, kinds, evaluate_edits.WORDED)
    report = {}
    for name, change in wording.CAPTION_WORDINGS.items():
        told = [
            case._replace(
                pair=case.pair._replace(
                    source_caption=change(case.pair.source_caption),
                    target_caption=change(case.pair.target_caption),
                )
            )
            for case in cases
        ]
        answers = run(pipe, told, **settings)
        found = summarize([score(case, answer) for case, answer in zip(cases, answers, strict=True)])
        report[name] = {**evaluate_edits.success(found), "mean_iou": found["mean_iou"]}
    return report


def grid(cases: Sequence[Case], answers: Sequence[Answer], columns: int = 3) -> Image.Image:
    """Source, mask, result and truth of every edit, under both captions."""
    tiles = []
    zoom = 2
    for case, answer in zip(cases, answers, strict=True):
        mask = np.repeat(answer.mask[..., None].astype(np.float32), 3, axis=-1)
        source, target = (scenes.draw(scene, SIZE) for scene in case.pair[:2])
        row = Image.fromarray(
            scenes.to_levels(np.concatenate([source, mask, answer.picture, target], axis=1))
        )
        row = row.resize((zoom * row.width, zoom * row.height), Image.Resampling.NEAREST)
        tile = Image.new("RGB", (row.width + 8, row.height + 30), "white")
        tile.paste(row, (0, 26))
        text = ImageDraw.Draw(tile)
        text.text((0, 1), case.pair.source_caption[:84], fill="black")
        text.text((0, 13), f"-> {case.pair.target_caption}"[:84], fill="black")
        tiles.append(tile)
    return evaluate_edits.page(tiles, columns)


def as_image(scene: scenes.Scene) -> Image.Image:
    return Image.fromarray(scenes.to_levels(scenes.draw(scene, SIZE)))


def _to_pixels(cells: np.ndarray) -> np.ndarray:
    """A mask of latents (h, w) at the size of the picture."""
    zoom = SIZE // len(cells)
    return cells.repeat(zoom, axis=0).repeat(zoom, axis=1)
