"""The spatial edits of JoyAI-Image-Edit on the command line: options in place of an instruction.

What the options hold stays text, as it is recorded, and is read where it is used.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from joyedit.command.calls import said, spelt
from joyedit.media import spatial

TELLING = ("move", "rotate", "camera")  # those that say what to do
OPTIONS: Mapping[str, str] = {
    "move": "--move",
    "box": "--box",
    "rotate": "--rotate",
    "view": "--view",
    "camera": "--camera",
}
CAMERA = "yaw=30,pitch=-10,zoom=in"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "spatial edits of JoyAI-Image-Edit, in place of an instruction"
    ).add_argument
    add("--move", metavar="OBJECT", help="move an object into the red box that --box draws on the photograph")
    add(
        "--box",
        metavar="X,Y,W,H",
        help="left, top, width and height: shares of the photograph when all are at most 1, else its pixels",
    )
    add("--rotate", metavar="OBJECT", help="turn an object so that --view is seen")
    add("--view", metavar="VIEW", help=", ".join(spatial.VIEWS))
    add(
        "--camera",
        metavar=CAMERA,
        help=f"look from elsewhere: degrees, and zoom {', '.join(spatial.ZOOMS)}; what is left out stays",
    )


def instruction(args: argparse.Namespace) -> str | None:
    """What the options say in the model's words; None where there are none. Raises ValueError for options
    that say nothing together, or too much, and for their values."""
    told = spelt(args, {name: OPTIONS[name] for name in TELLING})
    if len(told) > 1:
        raise ValueError(f"{' and '.join(told)}: one edit at a time")
    for detail, of in (("box", "move"), ("view", "rotate")):
        if (getattr(args, detail) is None) != (getattr(args, of) is None):
            raise ValueError(f"{OPTIONS[of]} and {OPTIONS[detail]} go together: give both, or neither")
    if args.move is not None:
        box_of(args.box)
        return spatial.move_prompt(args.move)
    if args.rotate is not None:
        return spatial.rotate(args.rotate, args.view)
    return None if args.camera is None else spatial.camera(**camera_of(args.camera))


def box_of(text: str) -> list[float]:
    """Four numbers. Raises ValueError for another text."""
    try:
        x, y, width, height = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--box {text}: wanted four numbers, x,y,width,height") from None
    return [x, y, width, height]


def camera_of(text: str) -> dict[str, Any]:
    """The arguments of `spatial.camera`. Raises ValueError for another text."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in ("yaw", "pitch", "zoom") or not value or name in found:
            raise ValueError(f"--camera {text}: wanted yaw, pitch and zoom once each, as in {CAMERA}")
        try:
            found[name] = value if name == "zoom" else float(value)
        except ValueError:
            raise ValueError(f"--camera {text}: {name} must be a number of degrees") from None
    return found


def take_over(args: argparse.Namespace) -> str | None:
    """Put what the options say in the place of the instruction; what is wrong with them, if anything."""
    if not said(args, OPTIONS):
        return None
    if args.prompt is not None:
        return f"{spelt(args, OPTIONS)[0]} stands for an instruction: give no other beside it"
    try:
        args.prompt = instruction(args)
    except ValueError as error:
        return str(error)
    return None
