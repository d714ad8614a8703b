"""The three spatial edits that JoyAI-Image-Edit was trained on, in its own words: move, rotate, camera.

The model knows these sentences and no others of their kind, so they are built here from values that are
checked. Source: the "Spatial editing" section of the model's card; SpatialEdit.
"""

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

from joyedit.checkpoints.plain_text import shown

if TYPE_CHECKING:  # the sentences alone, which the command line checks at once, need no picture
    from PIL.Image import Image

VIEWS = ("front", "right", "left", "rear", "front right", "front left", "rear right", "rear left")
ZOOMS = ("in", "out", "unchanged")
RED = (255, 0, 0)
LARGEST_ANGLE = 360.0


class Move(NamedTuple):
    """`image`: the photograph with the red box. `prompt`: the instruction that speaks of it."""

    image: "Image"
    prompt: str


def move(photo: Any, object: str, box: Sequence[float]) -> Move:
    """The photograph with a red box, and the instruction to move an object there.

    photo: a picture (PIL, array or tensor). object: what to move, "the apple" or "apple". box: x, y, width
    and height, in shares of the picture when all four are at most 1, else in its pixels. Raises ValueError
    for a box without area or beyond the picture, for values that are no numbers, and for an empty object.
    """
    from PIL import ImageDraw

    from joyedit.media.images import to_pil_list

    prompt = move_prompt(object)
    pictures = to_pil_list(photo, "photo")
    if len(pictures) != 1:
        raise ValueError(f"photo: one picture is wanted, not {len(pictures)}")
    image = pictures[0].copy()
    left, top, right, bottom = pixels_of(box, image.width, image.height)
    line = max(2, round(min(image.size) / 100))
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), outline=RED, width=line)
    return Move(image, prompt)


def move_prompt(object: str) -> str:
    """The instruction of `move` alone. Raises ValueError for an empty object."""
    return f"Move the {_name(object)} into the red box and finally remove the red box."


def rotate(object: str, view: str) -> str:
    """The instruction to show an object from another side: one of `VIEWS`. Raises ValueError for another view
    and for an empty object."""
    name = _name(object)
    wanted = " ".join(view.lower().replace("-", " ").split()) if isinstance(view, str) else view
    if wanted not in VIEWS:
        raise ValueError(f"view={shown(view, 40)}: must be one of {', '.join(VIEWS)}")
    return f"Rotate the {name} to show the {wanted} side view."


def camera(yaw: float = 0, pitch: float = 0, zoom: str = "unchanged") -> str:
    """The instruction to look at the scene from elsewhere. yaw, pitch: degrees, -360 to 360. zoom: one of
    `ZOOMS`. Raises ValueError for other values."""
    angles = _angle("yaw", yaw), _angle("pitch", pitch)
    if zoom not in ZOOMS:
        raise ValueError(f"zoom={shown(zoom, 40)}: must be one of {', '.join(ZOOMS)}")
    return "\n".join(
        (
            "Move the camera.",
            f"- Camera rotation: Yaw {angles[0]}°, Pitch {angles[1]}°.",
            f"- Camera zoom: {zoom}.",
            "- Keep the 3D scene static; only change the viewpoint.",
        )
    )


def pixels_of(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a box in a picture, in whole pixels. Raises as `move`."""
    wanted = "four numbers x, y, width, height, in shares of the picture (at most 1) or in pixels"
    values = [] if isinstance(box, str) or not hasattr(box, "__len__") else list(box)
    if len(values) != 4 or not all(_is_number(value) for value in values):
        raise ValueError(f"box={shown(box, 80)}: wanted {wanted}")
    x, y, w, h = (float(value) for value in values)
    if w <= 0 or h <= 0:
        raise ValueError(f"box={shown(box, 80)}: width and height must be above 0")
    if max(x, y, w, h) <= 1:
        x, w, y, h = x * width, w * width, y * height, h * height
    slack = 1e-6 * max(width, height)
    if min(x, y) < 0 or x + w > width + slack or y + h > height + slack:
        raise ValueError(f"box={shown(box, 80)}: must lie within the picture of {width} x {height} pixels")
    left, top, right, bottom = round(x), round(y), round(x + w), round(y + h)
    if right - left < 1 or bottom - top < 1:
        raise ValueError(f"box={shown(box, 80)}: holds no pixel of the picture of {width} x {height}")
    return left, top, right, bottom


def _name(object: str) -> str:
    """The object without its article. It stands in the middle of a sentence of one line."""
    if not isinstance(object, str):
        raise ValueError(f"object={shown(object, 80)}: wanted a text")
    words = object.split()
    if words and words[0].lower() == "the":
        words = words[1:]
    if not words or not any(word.isprintable() for word in words):
        raise ValueError(f"object={shown(object, 80)}: say what, as in 'the apple'")
    return " ".join(words)


def _angle(name: str, value: float) -> str:
    if not _is_number(value) or abs(value) > LARGEST_ANGLE:
        limit = f"{LARGEST_ANGLE:g}"
        raise ValueError(
            f"{name}={shown(value, 40)}: must be a number of degrees within -{limit} and {limit}"
        )
    number = float(value)
    return str(int(number)) if number.is_integer() else repr(number)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
