"""An instruction that tiny-joyimage does not know, learned by an adapter: "Make the picture sepia."

Pairs of it are drawn in training scenes, and twice as many of the known kinds: a set of one instruction
teaches that every instruction means it. In their masks shapes are white and the rest is a dark grey, so that
shapes count four times, as they did when the model was made. The adapter is then judged on held-out scenes,
by `evaluate.judge`, beside the model without it.

    python -m benchmarks.shapes.new_instruction pairs sepia-pairs
    joyedit train sepia-pairs --model tiny-joyimage --out runs/sepia ...
    python -m benchmarks.shapes.new_instruction judge runs/sepia/lora.safetensors --out sepia.json

`all` does these three, with the options below, and writes what README.md says of them:

    python -m benchmarks.shapes.new_instruction all runs/new --out benchmarks/results/new_instruction.json
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.shapes import evaluate, scenes
from joyedit.command import cli
from joyedit.loading.layouts import load
from joyedit.media.images import save_png

KIND = "sepia"
PHRASES = ("Make the picture sepia.", "Turn the photo sepia.", "Give the image a sepia tone.")
MODEL = "tiny-joyimage"
OPTIONS = (
    "--targets txt_ --rank 16 --steps 500 --batch 8 --lr 2e-3 --lr-schedule cosine "
    "--dropout 0 --no-checkpointing"
)
PAIRS, VALID = 150, 2  # of the new kind, and of all known ones together twice as many


def make_edit(index: int, split: str = "train", counts: Sequence[int] = evaluate.COUNTS) -> scenes.Edit:
    """Edit number `index` of the new kind."""
    edit = scenes.make_edit(index, split, ("grey",), counts)
    text = PHRASES[index % len(PHRASES)]
    return dataclasses.replace(edit, kind=KIND, instruction=text, tone=KIND)


def write_pairs(folder: Path, count: int, valid: int) -> None:
    """A training set in the documented form, folders target/, control/ and mask/: `count` pairs of the new
    kind, twice as many of the known ones; in valid/ so many from `valid`."""
    for place, first, size in ((folder, 0, count), (folder / "valid", 100_000, valid)):
        edits = [make_edit(first + i) for i in range(size)]
        edits += [
            scenes.make_edit(first + i, "train", scenes.KINDS, evaluate.COUNTS) for i in range(2 * size)
        ]
        for i, edit in enumerate(edits):
            name = f"{i:04}-{edit.kind}"
            save_png(picture(edit.source), place / "control" / f"{name}.png", force=True)
            save_png(picture(edit.target), place / "target" / f"{name}.png", force=True)
            save_png(mask(edit), place / "mask" / f"{name}.png", force=True)
            (place / "target" / f"{name}.txt").write_text(edit.instruction + "\n", encoding="utf-8")


def mask(edit: scenes.Edit) -> Image.Image:
    """White where a shape is, before or after, or where something small changes; else grey."""
    counts = edit.changed() if edit.kind in scenes.LOCAL else np.zeros((scenes.SIZE, scenes.SIZE), bool)
    for scene in (edit.source, edit.target):
        for thing in scene.things:
            counts |= scenes.coverage(thing) > 0
    return Image.fromarray(np.where(counts, 255, 255 // 4).astype(np.uint8))


def picture(scene: scenes.Scene) -> Image.Image:
    return Image.fromarray(scenes.to_levels(scenes.draw(scene)))


def judge(adapter: Path, count: int = evaluate.EDITS) -> tuple[dict[str, Any], Image.Image]:
    """Success on `count` held-out edits of each kind, without and with the adapter, and a picture of the
    first ones: input, without, with, truth."""
    edits = [make_edit(i, "held-out") for i in range(count)]
    edits += evaluate.held_out(count, evaluate.COUNTS, scenes.KINDS)
    pipe = load(MODEL, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    before = evaluate.run(pipe, edits, evaluate.STEPS)
    pipe.load_lora_weights(adapter)
    after = evaluate.run(pipe, edits, evaluate.STEPS)
    report = {
        name: evaluate.summarize(evaluate.judge(e, r) for e, r in zip(edits, results, strict=True))
        for name, results in (("before", before), ("after", after))
    }
    rows = [
        np.concatenate([scenes.draw(edits[i].source), before[i], after[i], scenes.draw(edits[i].target)], 1)
        for i in range(0, len(edits), max(count // 2, 1))
    ]
    tiles = [Image.fromarray(scenes.to_levels(row)) for row in rows]
    return report, evaluate.page(tiles, 4)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes.new_instruction", description=__doc__)
    parser.add_argument("what", choices=("pairs", "judge", "all"))
    parser.add_argument("place", type=Path, help="pairs: folder; judge: adapter; all: folder of both")
    parser.add_argument("--out", type=Path, help="JSON file; a picture is put beside it")
    parser.add_argument("--edits", type=int, default=evaluate.EDITS, help="held-out ones of each kind")
    given = parser.parse_args(arguments)
    if given.what != "pairs" and given.out is None:
        parser.error("--out is missing")
    adapter, seconds = given.place, None
    if given.what == "pairs":
        return write_pairs(given.place, PAIRS, VALID)
    if given.what == "all":
        write_pairs(given.place / "pairs", PAIRS, VALID)
        begin = time.process_time()
        words = ["train", str(given.place / "pairs"), "--model", MODEL, "--out", str(given.place / "run")]
        if cli.main([*words, *OPTIONS.split()]) != 0:
            raise SystemExit(1)
        adapter, seconds = given.place / "run" / "lora.safetensors", round(time.process_time() - begin)
    report, page = judge(adapter, given.edits)
    if seconds is not None:
        report = {
            "kind": KIND,
            "options": OPTIONS,
            "pairs": 3 * PAIRS,
            "processor_seconds": seconds,
            **report,
        }
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    page.save(given.out.with_suffix(".png"))
    for kind, row in report["after"]["kinds"].items():
        print(f"{kind:12} {report['before']['kinds'][kind]['ok']:.2f} -> {row['ok']:.2f}")


if __name__ == "__main__":
    main()
