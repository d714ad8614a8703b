"""A look at a training before it begins: pairs, buckets, crops in a picture, memory. No weights are read."""

import dataclasses
from collections import Counter
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
from PIL.Image import Image

from joyedit.media.images import save_png
from joyedit.training.data import load_mask, load_pair
from joyedit.training.devices import device_of
from joyedit.training.examples import Example
from joyedit.training.needed import Needed, memory_needed
from joyedit.training.pairs import Fault
from joyedit.training.pictures import sheet
from joyedit.training.plan import make_plan
from joyedit.training.settings import Settings

SHEET = "contact-sheet.png"
SHOWN, ACROSS, SIDE, LINE = 120, 4, 160, 14  # examples on the sheet, in a row; pixels of a picture, of a line


@dataclasses.dataclass(frozen=True)
class Found:
    """faults: everything that is wrong with the set. buckets: how many examples each has. needed: None where
    nothing can be trained on. sheet: the picture, None where there is nothing to show."""

    pairs: int
    valid: int
    buckets: Counter[tuple[int, int]]
    faults: list[Fault]
    needed: Needed | None
    sheet: Path | None


def check(settings: Settings, out: str | Path) -> Found:
    """Look at the set, and draw a contact sheet into the folder `out`. Raises as `loop.train` does, but for
    faulty pairs, which it returns."""
    out = Path(out).expanduser()
    plan, faults = make_plan(settings, out / "cache")
    shown = [*plan.examples, *plan.valid]
    place = None
    if shown:
        cells = [cell(example) for example in shown[:SHOWN]]
        rows = [cells[i : i + ACROSS] for i in range(0, len(cells), ACROSS)]
        place = save_png(sheet(rows), out / SHEET, force=True)
    needed = memory_needed(settings, plan, device_of(settings.device)) if plan.examples else None
    buckets = Counter(example.bucket for example in plan.examples)
    return Found(len(plan.examples), len(plan.valid), buckets, faults, needed, place)


def cell(example: Example) -> Image:
    """The controls, the target and the mask of an example as they are cropped, under its name and bucket."""
    target, controls = load_pair(example.pair, example.table)
    mask = load_mask(example.pair, example.table)
    pictures = [*controls, target, *([] if mask is None else [mask])]
    small = []
    for picture in pictures:
        copy = picture.convert("RGB")
        copy.thumbnail((SIDE, SIDE))
        small.append(copy)
    below = sheet([small])
    made = PIL.Image.new("RGB", (max(below.width, SIDE), below.height + 2 * LINE), "silver")
    made.paste(below, (0, 2 * LINE))
    height, width = example.bucket
    text = f"{example.pair.name[-28:]}\n{width} x {height}"
    draw = PIL.ImageDraw.Draw(made)
    draw.multiline_text((4, 2), text.encode("ascii", "replace").decode(), "black", spacing=2)
    return made
