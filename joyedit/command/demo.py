"""`joyedit demo`: edits with the three built-in models, in one picture, and the files behind it.

The built-in models know drawn scenes of coloured shapes. `assets/demo/` holds such scenes, which no training
saw, and in `demo.json` what to do with them: system -> list of edits, each with the name of its picture, its
texts and a seed. They were drawn by `python -m benchmarks.shapes.demo_scenes`; steps and guidance are those
that the models were made for. Everything runs on the CPU, so that every machine makes the same pictures but
for rounding.

A result is a PNG that carries its parameters, as those of `joyedit edit` do.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from PIL import ImageDraw, ImageFont
from PIL.Image import Image, Resampling
from tqdm.auto import tqdm

from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.replacing import replacing_all
from joyedit.command.results import refuse_files
from joyedit.loading.layouts import ASSETS, load
from joyedit.media.images import save_png
from joyedit.media.masks import mask_overlay, to_mask_images
from joyedit.media.video import export_to_webp

log = logging.getLogger("joyedit")

SCENES = ASSETS / "demo"
PAGE = "demo.png"
FRAMES, REASONING_FRAMES, FPS = 5, 29, 8
# system -> the files that each of its edits leaves
FILES = {
    "joyimage": ("input.png", "result.png"),
    "diffedit": ("input.png", "mask.png", "result.png"),
    "chronoedit": ("input.png", "result.png", "film.webp"),
}


class Made(NamedTuple):
    """An edit. `results`: one for each of the FILES; a film is a list of frames."""

    edit: Mapping[str, Any]
    results: Sequence[Any]
    metadata: Mapping[str, Any]


def run(folder: Path, *, force: bool = False, disable_progress: bool | None = None) -> Path:
    """Write the picture and the files behind it to `folder`; the path of the picture.

    Raises FileExistsError when one of them is there already and not `force`, before any work. They appear
    together. disable_progress: None shows the bar on a terminal.
    """
    plan: dict[str, list[dict[str, Any]]] = read_json(SCENES / "demo.json")
    paths = {
        (system, edit["name"]): [folder / f"{system}-{edit['name']}-{file}" for file in FILES[system]]
        for system in FILES
        for edit in plan[system]
    }
    page = folder / PAGE
    refuse_files({"page": [page], "files": [path for each in paths.values() for path in each]}, force)
    pipes = {system: load(f"tiny-{system}", device="cpu") for system in FILES}
    made: dict[str, list[Made]] = {system: [] for system in FILES}
    with tqdm(total=len(paths), desc="editing", unit="edit", disable=disable_progress) as bar:
        for system, pipe in pipes.items():
            pipe.set_progress_bar_config(disable=True)
            for edit in plan[system]:
                made[system].append(EDITORS[system](pipe, edit))
                bar.update()
    results = [
        (system, one, path, result)
        for system, edits in made.items()
        for one in edits
        for path, result in zip(paths[system, one.edit["name"]], one.results, strict=True)
    ]
    with replacing_all([*(path for *_, path, _ in results), page], force=force) as temporaries:
        for (system, one, path, result), temporary in zip(results, temporaries, strict=False):
            if path.name.endswith("-input.png"):  # the same bytes, by which the result names it
                shutil.copyfile(_path(one.edit, system), temporary)
            elif path.suffix == ".png":
                metadata = one.metadata if path.name.endswith("-result.png") else None
                save_png(result, temporary, metadata, force=True)
            else:
                export_to_webp(result, temporary, fps=FPS)
        save_png(draw_page(made), temporaries[-1], force=True)
    log.info("the inputs, results and films behind it are beside it")
    return page


def edit_by_instruction(pipe: Any, edit: Mapping[str, Any]) -> Made:
    """With JoyAI-Image-Edit."""
    photo, settings = _opened(edit, "joyimage"), _settings(pipe)
    (result,) = pipe(photo, edit["instruction"], generator=[_generator(edit)], **settings).images
    said = {"prompt": edit["instruction"], **settings}
    return Made(edit, (photo, result), _metadata(pipe, edit, "joyimage", said, result))


def edit_by_captions(pipe: Any, edit: Mapping[str, Any]) -> Made:
    """With DiffEdit; the mask in the size of the picture."""
    photo, settings = _opened(edit, "diffedit"), _settings(pipe)
    said = {"source_prompt": edit["source"], "target_prompt": edit["target"], **settings}
    (result,), _, mask, _ = pipe.edit(photo, generator=_generator(edit), **said)
    (white,) = to_mask_images(torch.from_numpy(mask))
    results = (photo, white.resize(photo.size, Resampling.NEAREST), result)
    return Made(edit, results, _metadata(pipe, edit, "diffedit", said, result))


def edit_by_film(pipe: Any, edit: Mapping[str, Any]) -> Made:
    """With ChronoEdit; with temporal reasoning to the end, so that the film shows the way."""
    photo, settings = _opened(edit, "chronoedit"), _settings(pipe)
    reasoning = edit.get("reasoning", False)
    said: dict[str, Any] = {"num_frames": REASONING_FRAMES if reasoning else FRAMES}
    if reasoning:
        said["num_temporal_reasoning_steps"] = settings["num_inference_steps"]
    said = {"prompt": edit["instruction"], **settings, **said}
    (film,) = pipe(
        photo,
        height=photo.height,
        width=photo.width,
        generator=[_generator(edit)],
        output_type="pil",
        enable_temporal_reasoning=reasoning,
        **said,
    ).frames
    return Made(edit, (photo, film[-1], film), _metadata(pipe, edit, "chronoedit", said, film[-1]))


EDITORS = {"joyimage": edit_by_instruction, "diffedit": edit_by_captions, "chronoedit": edit_by_film}


def _path(edit: Mapping[str, Any], system: str) -> Path:
    return SCENES / f"{system}-{edit['name']}.png"


def _opened(edit: Mapping[str, Any], system: str) -> Image:
    with PIL.Image.open(_path(edit, system)) as opened:
        return opened.convert("RGB")


def _settings(pipe: Any) -> dict[str, Any]:
    return dict(pipe.made_for.call)


def _generator(edit: Mapping[str, Any]) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(edit["seed"])


def _metadata(
    pipe: Any, edit: Mapping[str, Any], system: str, said: Mapping[str, Any], result: Image
) -> dict[str, Any]:
    """What the result records: with it and the input, `joyedit edit` makes the same again."""
    digest = hashlib.sha256(_path(edit, system).read_bytes()).hexdigest()
    return {
        **said,
        "seed": edit["seed"],
        "model": f"tiny-{system}",
        "device": "cpu",
        "height": result.height,
        "width": result.width,
        "input": {"name": f"{system}-{edit['name']}-input.png", "sha256": digest},
        "pipeline": type(pipe).__name__,
    }


# The page, in pixels.
MARGIN, GAP, WIDTH = 36, 14, 1172
SECTION, ROW = 40, 22  # space before a section, and between its rows
INK, FAINT, LINE = (25, 25, 28), (120, 120, 126), (205, 205, 210)
KEY_FRAMES = 6  # of a film


class Page:
    """A white page that grows downwards: `y` is where it goes on."""

    def __init__(self) -> None:
        self.sheet = PIL.Image.new("RGB", (WIDTH + 2 * MARGIN, 4000), "white")
        self.pen = ImageDraw.Draw(self.sheet)
        self.y = MARGIN

    def text(self, x: int, y: int, text: str, size: int, ink: tuple[int, int, int] = INK) -> None:
        self.pen.text((MARGIN + x, y), text, ink, ImageFont.load_default(size))

    def title(self, name: str, what: str) -> None:
        self.text(0, self.y, name, 25)
        self.text(0, self.y + 36, what, 16, FAINT)
        self.y += 70

    def headings(self, starts: Sequence[int], places: Sequence[int], words: Sequence[str]) -> None:
        for start in starts:
            for place, word in zip(places, words, strict=True):
                self.text(start + place, self.y, word, 14, FAINT)
        self.y += 24

    def tile(self, x: int, y: int, picture: Image, side: int) -> None:
        """A picture, enlarged, in a thin frame."""
        box = (MARGIN + x, y, MARGIN + x + side - 1, y + side - 1)
        self.sheet.paste(picture.convert("RGB").resize((side, side), Resampling.LANCZOS), box[:2])
        self.pen.rectangle(box, outline=LINE)

    def paragraphs(
        self, x: int, y: int, width: int, parts: Sequence[tuple[str, bool]], height: int = 0
    ) -> int:
        """Texts, faint or not, wrapped to `width`, in the middle of `height`; where the next would start."""
        lines = []
        for text, faint in parts:
            size, step = (14, 20) if faint else (17, 23)
            lines += [(line, size, FAINT if faint else INK, step) for line in wrapped(text, size, width)]
        y += max(height - sum(line[-1] for line in lines), 0) // 2
        for text, size, ink, step in lines:
            self.text(x, y, text, size, ink)
            y += step
        return y

    def finish(self) -> Image:
        return self.sheet.crop((0, 0, self.sheet.width, self.y + MARGIN))


def wrapped(text: str, size: int, width: int) -> list[str]:
    """Lines of words, each at most `width` pixels wide where a word is not wider."""
    font, lines = ImageFont.load_default(size), [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_page(made: Mapping[str, Sequence[Made]]) -> Image:
    page = Page()
    page.title("JoyAI-Image-Edit", "tiny-joyimage: from a picture and an instruction to the edited picture")
    side, text = 192, 150
    block = 2 * side + text + 2 * GAP
    starts = (0, WIDTH - block)
    places = (0, side + GAP, side + text + 2 * GAP)
    page.headings(starts, places, ("input", "instruction", "result"))
    for pair in in_pairs(made["joyimage"]):
        for start, (edit, (photo, result), _) in zip(starts, pair, strict=False):
            page.tile(start, page.y, photo, side)
            page.paragraphs(start + places[1], page.y, text, [(edit["instruction"], False)], side)
            page.tile(start + places[2], page.y, result, side)
        page.y += side + ROW
    page.y += SECTION - ROW

    page.title("DiffEdit", "tiny-diffedit: from two captions to the place where they differ, repainted")
    side = (block - 2 * GAP) // 3
    places = (0, side + GAP, block - side)
    page.headings(starts, places, ("input", "mask, found by itself", "result"))
    for pair in in_pairs(made["diffedit"]):
        end = page.y
        for start, (edit, (photo, mask, result), _) in zip(starts, pair, strict=False):
            for place, picture in zip(places, (photo, mask_overlay(photo, mask), result), strict=True):
                page.tile(start + place, page.y, picture, side)
            y = page.y + side + 8
            for label, caption in (("from", edit["source"]), ("to", edit["target"])):
                page.text(start, y + 2, label, 14, FAINT)
                y = page.paragraphs(start + 40, y, block - 40, [(caption, False)])
            end = max(end, y)
        page.y = end + ROW
    page.y += SECTION - ROW

    page.title("ChronoEdit", "tiny-chronoedit: a film from the picture to the edited picture, its last frame")
    between = 8
    side = (WIDTH - text - 2 * GAP - (KEY_FRAMES - 1) * between) // (KEY_FRAMES + 1)
    start = side + text + 2 * GAP
    page.headings((0,), (0, side + GAP, start), ("input", "instruction", "frames of the film"))
    for edit, (photo, _, film), _ in made["chronoedit"]:
        page.tile(0, page.y, photo, side)
        parts = [(edit["instruction"], False)]
        parts += [("with temporal reasoning", True)] if edit.get("reasoning") else []
        page.paragraphs(side + GAP, page.y, text, parts, side)
        shown = np.linspace(0, len(film) - 1, min(len(film), KEY_FRAMES)).round().astype(int)
        for i, number in enumerate(shown.tolist()):
            x = start + i * (side + between)
            page.tile(x, page.y, film[number], side)
            page.text(x, page.y + side + 4, f"{number + 1} of {len(film)}", 13, FAINT)
        page.y += side + 22 + ROW
    page.y -= ROW
    return page.finish()


def in_pairs(made: Sequence[Made]) -> list[Sequence[Made]]:
    return [made[i : i + 2] for i in range(0, len(made), 2)]
