"""The pictures that `joyedit demo` edits: scenes of the held-out world, and what to do with them.

    python -m benchmarks.shapes.demo_scenes

draws `joyedit/assets/demo/`. The edits below were chosen by hand, for variety and scenes that are easy to
take in, from held-out ones that are not scored; success over many is in `benchmarks/results/shapes/`.
"""

from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.shapes import scenes, sd_vae
from joyedit.checkpoints.json_files import write_json

FOLDER = Path(__file__).resolve().parents[2] / "joyedit" / "assets" / "demo"
SEED = 0

# Kind and number of a held-out edit.
JOYIMAGE = {"recolour": 505, "remove": 507, "add": 502, "move": 504, "replace": 506, "grey": 504}
DIFFEDIT = (505, 515)
CHRONOEDIT = {"recolour": 502, "add": 503}
REASONING = "add"
JOYIMAGE_COUNTS, CHRONOEDIT_COUNTS = (2, 3), (2,)  # shapes in a scene


def save(scene: scenes.Scene, name: str, size: int) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scenes.to_levels(scenes.draw(scene, size))).save(FOLDER / f"{name}.png", optimize=True)


def main() -> None:
    plan: dict[str, list[dict[str, Any]]] = {"joyimage": [], "diffedit": [], "chronoedit": []}
    for kind, number in JOYIMAGE.items():
        edit = scenes.make_edit(number, "held-out", (kind,), JOYIMAGE_COUNTS)
        save(edit.source, f"joyimage-{kind}", scenes.SIZE)
        plan["joyimage"].append({"name": kind, "instruction": edit.instruction, "seed": SEED})
    for i, number in enumerate(DIFFEDIT):
        pair = scenes.make_caption_pair(number, "held-out", size=sd_vae.SIZE)
        save(pair.source, f"diffedit-{i + 1}", sd_vae.SIZE)
        captions = {"source": pair.source_caption, "target": pair.target_caption}
        plan["diffedit"].append({"name": str(i + 1), **captions, "seed": SEED})
    for kind, number in CHRONOEDIT.items():
        edit = scenes.make_edit(number, "held-out", (kind,), CHRONOEDIT_COUNTS)
        save(edit.source, f"chronoedit-{kind}", scenes.SIZE)
        reasoning = {"reasoning": True} if kind == REASONING else {}
        plan["chronoedit"].append({"name": kind, "instruction": edit.instruction, "seed": SEED, **reasoning})
    write_json(FOLDER / "demo.json", plan)


if __name__ == "__main__":
    main()
