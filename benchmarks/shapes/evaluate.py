"""How well a small editor edits: held-out worlds, exact targets, by kind.

Success takes three things at once: inside the changed region the result is near the target, outside it is as
near the source as the VAE can make it, and what is new has the right outline (`outline`): a blob of the right
colour fails. Beside each score stand that of the input itself (`nothing`) and that of the target after a trip
through the VAE (`ceiling`). With `--wordings`, the same edits are also asked for in other letters, without
a full stop and politely (`wording.WORDINGS`).

    python -m benchmarks.shapes.evaluate runs/joyimage/checkpoint --out joyimage.json
"""

import argparse
import dataclasses
import importlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.shapes import scenes, wording
from joyedit.loading.layouts import load, pipeline_name
from joyedit.media import spatial
from joyedit.media.images import to_latent_input, to_output
from joyedit.pipelines.joyimage import JoyImageEditPipeline

INSIDE = 0.08  # largest mean absolute error in the changed region, of the full range
OUTSIDE = 26.0  # least PSNR in dB elsewhere
OVERLAP = 0.75  # least intersection over union of a new shape with the true one
WORDED = 20  # edits of each kind that are asked for in all wordings
EDITS, COUNTS = 40, (1, 2, 2, 3, 3, 4)  # of each kind; shapes in a scene, as often as listed
STEPS = 2

# The module that evaluates a pipeline, and the kinds of edits it knows.
EVALUATIONS = {
    "JoyImageEditPipeline": ("benchmarks.shapes.evaluate", scenes.KINDS),
    "ChronoEditPipeline": ("benchmarks.shapes.evaluate_chronoedit", scenes.KINDS),
    "StableDiffusionDiffEditPipeline": ("benchmarks.shapes.evaluate_diffedit", ("recolour", "replace")),
}


class Score(NamedTuple):
    """inside: mean absolute error where the target differs from the source. outside: PSNR in dB elsewhere,
    None when nothing is left there. overlap: the least IoU of the new shapes, None when none is seen."""

    kind: str
    ok: bool
    inside: float
    outside: float | None
    overlap: float | None


def judge(edit: scenes.Edit, result: np.ndarray) -> Score:
    """Score a result (H, W, 3) in [0, 1]."""
    size = len(result)
    truth, changed = scenes.draw(edit.target, size), edit.changed(size)
    error = result - truth
    inside = float(np.abs(error[changed]).mean())
    outside = None
    if (~changed).sum() > 0.01 * changed.size:
        outside = float(-10 * np.log10(np.square(error[~changed]).mean() + 1e-10))
    seen = [outline(edit.target, thing, result) for thing in edit.subjects()]
    visible = [(overlap, best) for overlap, best in seen if overlap is not None]
    overlap = min((overlap for overlap, _ in visible), default=None)
    ok = inside < INSIDE and (outside is None or outside > OUTSIDE)
    ok = ok and (overlap is None or overlap > OVERLAP)
    if edit.kind in scenes.LOCAL:
        ok = ok and all(best for _, best in visible)
    return Score(edit.kind, ok, inside, outside, overlap)


def outline(scene: scenes.Scene, thing: scenes.Thing, result: np.ndarray) -> tuple[float | None, bool]:
    """IoU of a shape with what has its colour in the result, and whether no other shape would fit better.

    A pixel has the shape's colour when it is nearer to that than to what would be there without it. (None,
    True) for a shape that the tone of the picture hides.
    """
    size = len(result)
    behind = scenes.draw(scene._replace(things=tuple(t for t in scene.things if t != thing)), size)
    flood = thing._replace(shape="circle", radius=9.0)
    full = scenes.draw(scene._replace(things=(flood,)), size)
    contrast = np.linalg.norm(full - behind, axis=-1)
    cover = {shape: scenes.coverage(thing._replace(shape=shape), size) > 0.5 for shape in scenes.SHAPES}
    truth = cover[thing.shape]
    if contrast[truth].mean() < 0.2:
        return None, True
    near = scenes.coverage(thing._replace(shape="square", radius=1.5 * thing.radius), size) > 0
    for other in scene.things:
        if other != thing:
            near &= scenes.coverage(other, size) == 0
    has_colour = np.linalg.norm(result - full, axis=-1) < np.linalg.norm(result - behind, axis=-1)
    overlaps = {
        shape: float((has_colour & mask & near).sum() / max(((has_colour | mask) & near).sum(), 1))
        for shape, mask in cover.items()
    }
    return overlaps[thing.shape], overlaps[thing.shape] == max(overlaps.values())


def summarize(scores: Iterable[Score]) -> dict[str, Any]:
    """Success rate and medians, over all and by kind."""
    by_kind: dict[str, list[Score]] = {}
    for score in scores:
        by_kind.setdefault(score.kind, []).append(score)
    everything = [score for group in by_kind.values() for score in group]
    rows = {kind: _row(group) for kind, group in by_kind.items()}
    return {"ok": _row(everything)["ok"], "kinds": rows}


def _row(scores: Sequence[Score]) -> dict[str, Any]:
    row: dict[str, Any] = {"edits": len(scores), "ok": round(sum(s.ok for s in scores) / len(scores), 3)}
    for name, digits in (("inside", 4), ("outside", 2), ("overlap", 3)):
        values = [v for s in scores if (v := getattr(s, name)) is not None]
        row[name] = round(statistics.median(values), digits) if values else None
    return row


def run(
    pipe: JoyImageEditPipeline,
    edits: Sequence[scenes.Edit],
    steps: int,
    guidance: float = 1.0,
    batch: int = 16,
) -> list[np.ndarray]:
    """The edited pictures, each (H, W, 3) in [0, 1]; edit number i is drawn from seed i."""
    results: list[np.ndarray] = []
    for start in range(0, len(edits), batch):
        part = edits[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        pictures, prompts = zip(*map(asked, part), strict=True)
        out = pipe(
            list(pictures),
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).images
        results += list(out)
    return results


def asked(edit: scenes.Edit) -> tuple[Image.Image, str]:
    """Picture and instruction as a user gives them: the red box of a move is drawn by `joyedit.spatial`,
    whose words are those of the plain instruction."""
    source = edit.source
    picture = Image.fromarray(scenes.to_levels(scenes.draw(source._replace(box=None))))
    if source.box is None:
        return picture, edit.instruction
    thing = next(before for before, after in edit.pairs if before != after and before is not None)
    half = source.box.half + scenes.BOX_LINE / 2
    box = ((source.box.x - half + 1) / 2, (source.box.y - half + 1) / 2, half, half)
    return spatial.move(picture, f"the {thing.name}", box).image, edit.instruction


@torch.no_grad()
def through_vae(pipe: JoyImageEditPipeline, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pictures encoded and decoded."""
    images = [Image.fromarray(scenes.to_levels(picture)) for picture in pictures]
    latents = pipe.vae.encode(to_latent_input(images).to(pipe.vae.device)).latent_dist.mode()
    return list(to_output(pipe.vae.decode(latents).sample[:, :, 0], "np"))


def grid(edits: Sequence[scenes.Edit], results: Sequence[np.ndarray], columns: int = 4) -> Image.Image:
    """Input, result and truth of every edit under its instruction, row by row."""
    tiles = []
    for edit, result in zip(edits, results, strict=True):
        size = len(result)
        row = np.concatenate([scenes.draw(edit.source, size), result, scenes.draw(edit.target, size)], axis=1)
        tile = Image.new("RGB", (3 * size + 4, size + 14), "white")
        tile.paste(Image.fromarray(scenes.to_levels(row)), (0, 14))
        ImageDraw.Draw(tile).text((0, 1), edit.instruction[:48], fill="black")
        tiles.append(tile)
    return page(tiles, columns)


def page(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size, row by row."""
    rows = -(-len(tiles) // columns)
    whole = Image.new("RGB", (columns * tiles[0].width, rows * tiles[0].height), "white")
    for i, tile in enumerate(tiles):
        whole.paste(tile, (i % columns * tile.width, i // columns * tile.height))
    return whole


def held_out(count: int, counts: Sequence[int], kinds: Sequence[str]) -> list[scenes.Edit]:
    """`count` edits of each kind that no training draws, in scenes of `counts` shapes."""
    return [
        scenes.make_edit(1000 * scenes.KINDS.index(kind) + i, "held-out", (kind,), counts)
        for kind in kinds
        for i in range(count)
    ]


def in_other_words(
    edits: Sequence[scenes.Edit], edited: Callable[[Sequence[scenes.Edit]], Sequence[np.ndarray]]
) -> dict[str, Any]:
    """Success when the same edits are asked for in each of `wording.WORDINGS`, over all and by kind; the
    first WORDED of each kind. `edited`: edits to results."""
    some = first_of_each(edits, [edit.kind for edit in edits], WORDED)
    report = {}
    for name, change in wording.WORDINGS.items():
        told = [dataclasses.replace(edit, instruction=change(edit.instruction)) for edit in some]
        report[name] = success(summarize(judge(e, r) for e, r in zip(some, edited(told), strict=True)))
    return report


def first_of_each(items: Sequence[Any], kinds: Sequence[str], count: int) -> list[Any]:
    """The first `count` items of each kind, in their order."""
    return [item for i, item in enumerate(items) if kinds[:i].count(kinds[i]) < count]


def success(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of a summary only the numbers of edits and the rates."""
    kinds = summary["kinds"]
    edits = sum(row["edits"] for row in kinds.values())
    return {"edits": edits, "ok": summary["ok"], "kinds": {kind: row["ok"] for kind, row in kinds.items()}}


def evaluate(
    pipe: JoyImageEditPipeline,
    count: int,
    counts: Sequence[int],
    kinds: Sequence[str],
    wordings: bool = False,
) -> tuple[dict[str, Any], Image.Image]:
    """`count` held-out edits of each kind in scenes of `counts` shapes: the model's scores, those of doing
    nothing and of the VAE, and with `wordings` the success in each of them."""
    edits = held_out(count, counts, kinds)
    results = run(pipe, edits, STEPS)
    ceiling = through_vae(pipe, [scenes.draw(edit.target) for edit in edits])
    sides = {"model": results, "nothing": [scenes.draw(edit.source) for edit in edits], "ceiling": ceiling}
    report = {
        name: summarize(judge(e, r) for e, r in zip(edits, side, strict=True)) for name, side in sides.items()
    }
    if wordings:
        report["wordings"] = in_other_words(edits, lambda told: run(pipe, told, STEPS))
    shown = [i for i in range(len(edits)) if i % count < 4]
    return report, grid([edits[i] for i in shown], [results[i] for i in shown])


def evaluate_checkpoint(
    folder: Path,
    count: int,
    counts: Sequence[int],
    kinds: Sequence[str] | None = None,
    wordings: bool = False,
) -> tuple[dict[str, Any], Image.Image]:
    """The report of a checkpoint of any of the three systems, and a picture of its first results."""
    module, known = EVALUATIONS[pipeline_name(folder)]
    pipe = load(folder, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return importlib.import_module(module).evaluate(pipe, count, counts, kinds or known, wordings=wordings)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes.evaluate", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a picture is put beside it")
    parser.add_argument("--edits", type=int, default=EDITS, help="of each kind")
    parser.add_argument("--shapes", type=int, nargs="+", default=COUNTS, help="in a scene")
    parser.add_argument("--kinds", nargs="+", choices=scenes.KINDS, help="of edits")
    parser.add_argument("--wordings", action="store_true", help="ask in each of them, too")
    given = parser.parse_args(arguments)
    report, picture = evaluate_checkpoint(
        given.checkpoint, given.edits, given.shapes, given.kinds, given.wordings
    )
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    picture.save(given.out.with_suffix(".png"))
    for name, side in report.items():
        if "kinds" not in side:
            print(name, side)
            continue
        rows = "  ".join(f"{kind} {row['ok']:.2f}" for kind, row in side["kinds"].items())
        print(f"{name:8} {side['ok']:.3f}  {rows}")


if __name__ == "__main__":
    main()
