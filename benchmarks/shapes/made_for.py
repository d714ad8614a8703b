"""What the small checkpoints say of their use (`pipelines/made_for.py`): steps, sizes, the world they know.

    python -m benchmarks.shapes.made_for joyimage runs/joyimage/checkpoint

writes it into the model_index.json of a folder, as the trainings do.
"""

import argparse
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.shapes import evaluate, evaluate_chronoedit, evaluate_diffedit, scenes
from benchmarks.shapes.vocabulary import captions, instructions
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.pipelines.made_for import words_of

# Scenes come through the autoencoders at 31 dB and more, of photographs only the smoothest at 30.
PSNR = 30.0
ABOUT = "drawn scenes of coloured shapes, such as {}"
MADE_FOR: dict[str, dict[str, Any]] = {
    "joyimage": {
        "call": {"num_inference_steps": evaluate.STEPS, "guidance_scale": 1.0},
        "about": "'Make the red circle blue.'",
        "kinds": scenes.KINDS,
    },
    "chronoedit": {
        "call": {
            "num_inference_steps": evaluate_chronoedit.STEPS,
            "guidance_scale": evaluate_chronoedit.GUIDANCE,
        },
        "basesize": scenes.SIZE,
        "about": "'Make the red circle blue.'",
        "kinds": ("recolour", "remove", "add", "grey", "negative"),
    },
    "diffedit": {
        "call": evaluate_diffedit.SETTINGS,
        "about": "'a red circle on a white background'",
    },
}


@functools.cache
def entry(name: str) -> dict[str, Any]:
    """The entry of the model_index.json of "joyimage", "chronoedit" or "diffedit"."""
    said = MADE_FOR[name]
    texts = captions(varied=True) if name == "diffedit" else instructions(kinds=said["kinds"], varied=True)
    world = {"about": ABOUT.format(said["about"]), "words": vocabulary(texts), "psnr": PSNR}
    found = {key: said[key] for key in ("call", "basesize") if said.get(key)}
    return {**found, "world": world}


def vocabulary(texts: Iterable[str]) -> list[str]:
    return sorted({word for text in texts for word in words_of(text)})


def stamp(folder: Path, name: str) -> None:
    """Write it into the model_index.json of a checkpoint."""
    index = read_json(folder / "model_index.json")
    write_json(folder / "model_index.json", {**index, "made_for": entry(name)})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shapes.made_for", description=__doc__)
    parser.add_argument("name", choices=MADE_FOR)
    parser.add_argument("checkpoint", type=Path)
    given = parser.parse_args(arguments)
    stamp(given.checkpoint, given.name)


if __name__ == "__main__":
    main()
