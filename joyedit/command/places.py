"""Where an edit may change the photograph, in which size the result comes back, and with whose colours.

These options are not of one system: each says in `places` which of them it takes. A mask is a file that a
result records by name and SHA-256, and `--config-from` finds. A size stays text, as it is recorded.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from joyedit.checkpoints.plain_text import shown, visible
from joyedit.command.calls import said, spelt
from joyedit.command.photos import Photo, read_again
from joyedit.command.values import LIMITS, MOST_PIXELS

if TYPE_CHECKING:
    from PIL.Image import Image

OPTIONS: Mapping[str, str] = {"mask": "--mask", "size": "--size", "match_colors": "--match-colors"}
MAKING_A_MASK = {
    name: f"--{name.replace('_', '-')}"
    for name in ("mask_encode_strength", "mask_thresholding_ratio", "num_maps_per_mask")
}
SHORTEST_SIDE = 16  # as the pipelines take; their module loads torch
WHITE = 128  # of 255: the least that says "edit here"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where, how large, in which colours").add_argument
    add(
        "--mask",
        metavar="FILE",
        help="white: edit here, and keep the photograph's pixels elsewhere; a picture (path or URL) of the "
        "photograph's size. Between captions it is the mask that is otherwise made",
    )
    add(
        "--size",
        metavar="SIZE",
        help="size of the result: input, the photograph's own, or WIDTHxHEIGHT in pixels; the photograph is "
        "padded to the size that the model works at, instead of cropped or stretched",
    )
    add(
        "--match-colors",
        action=argparse.BooleanOptionalAction,
        help="bring the colours back to the photograph's, by what the edit leaves alone",
    )


def given(args: argparse.Namespace, names: Sequence[str] = tuple(OPTIONS)) -> list[str]:
    """Those of the options that ask for something, as they are spelt."""
    return [OPTIONS[name] for name in names if getattr(args, name)]


def misuse(args: argparse.Namespace) -> str | None:
    """What is wrong with the options as they stand on the command line."""
    if args.command == "generate":
        about = given(args, ("mask", "match_colors"))
        about += ["--size input"] if args.size == "input" else []
        return f"{about[0]} is for a photograph: joyedit edit PHOTO" if about else None
    if args.references and (options := given(args)):
        return f"{options[0]} is for edits of one photograph: with --reference give --height and --width"
    if args.source_prompt is not None and (options := given(args, ("size", "match_colors"))):
        return f"{options[0]} is for an instruction, not for --source and --target"
    if args.mask and (options := spelt(args, MAKING_A_MASK)):
        return f"{options[0]} is for a mask that is made: --mask names one"
    return None


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with the options together, once all are known."""
    if args.mask and args.move is not None:
        return "--mask would keep the red box that --move draws: give one of them"
    if args.size is None:
        return None
    if args.height is not None or args.width is not None:
        return "--size says how large the result is: leave out --height and --width"
    try:
        size_of(args.size)
    except ValueError as error:
        return str(error)
    return None


def size_of(text: str | None) -> str | tuple[int, int] | None:
    """None, "input", or height and width. Raises ValueError for another text, and for sides or areas that no
    result has."""
    if text is None or text == "input":
        return text
    found = re.fullmatch(r"([0-9]{1,6})[xX]([0-9]{1,6})", text)
    if found is None:
        raise ValueError(f"--size {shown(text, 40)}: wanted input or WIDTHxHEIGHT in pixels, as in 640x480")
    width, height = int(found[1]), int(found[2])
    longest = LIMITS["height"][1]
    if not (SHORTEST_SIDE <= min(width, height) and max(width, height) <= longest):
        raise ValueError(f"--size {text}: both sides must be within {SHORTEST_SIDE} and {longest} pixels")
    if width * height > MOST_PIXELS:
        raise ValueError(f"--size {text} is more than {MOST_PIXELS:,} pixels in all")
    return height, width


def refuse(args: argparse.Namespace, taken: Sequence[str], pipeline: str) -> None:
    """Raises ValueError for an option that the system of the model does not take."""
    options = given(args, [name for name in OPTIONS if name not in taken])
    if options:
        edits = "edits of one photograph by instruction (JoyAI-Image-Edit, ChronoEdit)"
        raise ValueError(f"{options[0]} is for {edits}, and {args.model} holds a {pipeline}")


def left_out(args: argparse.Namespace, recorded: Mapping[str, Any]) -> set[str]:
    """Arguments that are not taken over from a record: where a size was asked for or is, its height and width
    are those of the result, and none to work at."""
    names = set()
    if args.height is not None:
        names.add("size")
    if args.size is not None or recorded.get("size") is not None:
        names |= {"height", "width"}
    if args.references:
        names |= {*OPTIONS}
    if args.move is not None:
        names.add("mask")
    return names


def open_mask(args: argparse.Namespace, photos: Sequence[Photo]) -> Photo | None:
    """The picture of `args.mask`, white where to edit and black elsewhere. Raises as `photos.read_again`, and
    ValueError for a mask that is all black or is not of the size of each photograph."""
    if not args.mask:
        return None
    mask = read_again(args.mask, args, "mask", "name one with --mask")
    name = visible(mask.name, 80)
    for photo in photos:
        if photo.image.size != mask.image.size:
            (width, height), (wanted_width, wanted_height) = mask.image.size, photo.image.size
            raise ValueError(
                f"the mask {name} has {width} x {height} pixels, and the photograph "
                f"{visible(photo.name, 80)} {wanted_width} x {wanted_height}: they must be of one size"
            )
    white = mask.image.convert("L").point([255 * (level >= WHITE) for level in range(256)])
    if white.getextrema()[1] == 0:
        raise ValueError(f"the mask {name} is all black: white, at least half, says where to edit")
    return mask._replace(image=white)


def call(args: argparse.Namespace) -> dict[str, Any]:
    """What a pipeline that takes all is called with."""
    found: dict[str, Any] = said(args, ("match_colors",))
    if args.mask:
        found["mask"] = args.mask.image
    if args.size is not None:
        found["size"] = size_of(args.size)
    return found


def mask_at(mask: "Image", size: tuple[int, int]) -> "Image":
    """A mask in another size, width x height: white where any white is."""
    import numpy as np
    import PIL.Image

    # In floating point: one white pixel among many is less than a level.
    shares = mask.convert("F").resize(size, PIL.Image.Resampling.BOX)
    return PIL.Image.fromarray(np.asarray(shares) > 0).convert("L")


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """What a result records; None for what there was not."""
    mask = args.mask.facts if args.mask else None
    return {"mask": mask, "size": args.size, "match_colors": args.match_colors or None}
