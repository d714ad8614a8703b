"""Pictures of a training: what it makes of some pairs, beside what the base model made; sheets of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import ImageDraw, ImageFont
from PIL.Image import Image

from joyedit.media.images import save_png
from joyedit.training.data import load_pair
from joyedit.training.examples import Example
from joyedit.training.plan import Plan

GAP = 4  # pixels between pictures
LETTERS = (11, 1 / 32)  # their height in pixels at least, and as a share of the picture's width


class Samples:
    """A picture for each time that is looked at: a row for a pair under its prompt, with its controls, what
    the base model makes of them, what the trained one makes, and the target."""

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        store: Callable[[Example], Any],
        count: int,
        seed: int,
        writes: bool = True,
    ):
        """writes: False for a process that goes through a divided network with the one that does."""
        self.folder, self.system, self.store, self.seed = folder, plan.system, store, seed
        self.writes = writes
        chosen = {example.pair.name: example for example in reversed(plan.valid or plan.examples)}
        self.examples = list(reversed(chosen.values()))[:count]

    def make(self, step: int, pipe: Any) -> Path | None:
        """Write those of this step; step 0 is the base model's."""
        rows = []
        for i, example in enumerate(self.examples):
            target, controls = load_pair(example.pair, example.table)
            kept, said = self.store(example)
            made = self.system.edit(pipe, example, kept, controls, said, self.seed + i)
            if not self.writes:
                continue
            path = self.folder / f"base-{i}.png"
            if step == 0:
                save_png(made, path, force=True)
            base = PIL.Image.open(path) if path.is_file() else PIL.Image.new("RGB", made.size, "grey")
            named = [*(("control", control) for control in controls), ("base model", base)]
            named += [(f"after {step} steps", made), ("target", target)]
            rows.append([captioned(named, example.pair.prompt)])
        if not self.writes:
            return None
        return save_png(sheet(rows), self.folder / f"{step:06}.png", force=True)


def captioned(named: Sequence[tuple[str, Image]], text: str) -> Image:
    """A row of pictures, each above its name, under a text of as many lines as it takes."""
    row = sheet([[picture for _, picture in named]])
    least, share = LETTERS
    size = max(least, round(share * min(picture.width for _, picture in named)))
    font, line = ImageFont.load_default(size), round(1.4 * size)
    lines = wrapped(readable(text, font), row.width - 2 * GAP, font)
    page = PIL.Image.new("RGB", (row.width, row.height + line * (len(lines) + 1)), "silver")
    page.paste(row, (0, line * len(lines)))
    draw = ImageDraw.Draw(page)
    for i, words in enumerate(lines):
        draw.text((GAP, i * line), words, "black", font)
    left = GAP
    for name, picture in named:
        draw.text((left, page.height - line), name, "black", font)
        left += picture.width + GAP
    return page


def readable(text: str, font: Any) -> str:
    """With question marks for what the font does not have, which has little beyond Latin letters."""
    absent = bytes(font.getmask("\U0010ffff"))
    return "".join(
        "?" if letter.isprintable() and bytes(font.getmask(letter)) == absent else letter for letter in text
    )


def wrapped(text: str, width: int, font: Any) -> list[str]:
    """Lines of at most `width` pixels, where words allow it."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def sheet(rows: Sequence[Sequence[Image]]) -> Image:
    """Rows of pictures of any size, one below the other."""
    heights = [max(picture.height for picture in row) for row in rows]
    widths = [sum(picture.width + GAP for picture in row) for row in rows]
    page = PIL.Image.new("RGB", (max(widths) + GAP, sum(height + GAP for height in heights) + GAP), "silver")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for picture in row:
            page.paste(picture.convert("RGB"), (left, top))
            left += picture.width + GAP
        top += height + GAP
    return page
