"""A photograph's file to pixels: any format and mode that Pillow reads, to RGB, the right way up.

Files come from strangers, and decoders fail on them in ways of their own: whatever one raises becomes a
ValueError that names the file. Pillow's limit on decompression holds at its upper end: a photograph of more
than PIL.Image.MAX_IMAGE_PIXELS is read with a warning, one of twice as many is refused.
"""

import logging
import re
import struct
import warnings
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from PIL.Image import Image, Transpose

from joyedit.checkpoints.mistaken import POINTER
from joyedit.checkpoints.plain_text import visible

log = logging.getLogger("joyedit")

EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# What starts a file of this kind, which Pillow does not read by itself.
HEIC = re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|hevx|mif1|msf1)", re.DOTALL)


def decode(file: Any, name: str, size: tuple[int, int] | None = None) -> Image:
    """The picture in an open file, its pixels read. name: what messages call it.

    size: the (height, width) at which it is wanted. A JPEG above PIL.Image.MAX_IMAGE_PIXELS is then decoded
    at a half, a quarter or an eighth of its size, not smaller than that, which saves the memory of the rest.
    Raises ValueError for what is not a picture, is damaged, or has twice as many pixels as that limit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        try:
            opened = PIL.Image.open(file)
            if opened.format == "EPS":  # Pillow would start Ghostscript on it
                raise PIL.UnidentifiedImageError
            reduce_huge(opened, name, size)
            opened.load()
        except PIL.Image.DecompressionBombError:
            limit = f"{2 * (PIL.Image.MAX_IMAGE_PIXELS or 0):,} (twice PIL.Image.MAX_IMAGE_PIXELS)"
            raise ValueError(
                f"image {name!r} has more pixels than the limit of {limit}: scale it down first, or set that "
                "to None if you trust the file"
            ) from None
        except PIL.UnidentifiedImageError:
            kind = kind_of(file)
            raise ValueError(f"image {name!r} is not in an image format that Pillow reads{kind}") from None
        except MemoryError:
            raise ValueError(f"image {name!r} needs more memory than there is") from None
        except Exception as error:
            raise ValueError(f"image {name!r} is damaged: {reason(error)}") from None
    return opened


def kind_of(file: Any) -> str:
    """What a file is that no picture could be read from, where that is known, with what to do."""
    file.seek(0)
    start = file.read(64)
    if start.startswith(POINTER):
        return ": it is a git-lfs pointer, not the picture itself; `git lfs pull` fetches that"
    if HEIC.match(start):
        return (
            ": it is HEIC, as telephones write it; save it as JPEG or PNG, or open it in Python after "
            "`pillow_heif.register_heif_opener()` (pip install pillow-heif)"
        )
    return ""


def reduce_huge(opened: Image, name: str, size: tuple[int, int] | None) -> None:
    """Say so of a picture that is not yet read and has more pixels than Pillow warns of; where its decoder
    can, make it decode fewer."""
    width, height = opened.size
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is None or width * height <= limit:
        return
    if size is not None:
        tall, wide = size
        opened.draft(None, (tall, wide) if orientation(opened) >= 5 else (wide, tall))
    read_at = "" if opened.size == (width, height) else f", and is read at {opened.width} x {opened.height}"
    log.warning(
        "image %r has %d x %d pixels%s: above %s (PIL.Image.MAX_IMAGE_PIXELS) reading takes much memory",
        *(name, width, height, read_at, f"{limit:,}"),
    )


def reason(error: Exception) -> str:
    """What an exception says, or its kind where it says nothing or only a key."""
    said = visible(error)
    return said if said and isinstance(error, (OSError, ValueError, SyntaxError)) else f"{error!r}"


def to_rgb(image: Image, alpha: bool = False) -> Image:
    """The picture in mode RGB, turned as its EXIF orientation says; itself when nothing is to be done.

    Transparency is dropped; alpha=True keeps it, where there is any, in mode RGBA. Modes of wider numbers
    ("I", "I;16", "F") say nothing of their range, so the largest value in the picture decides what white is:
    up to 255 it is 255, up to 65535 it is 65535; and of floating point up to 1 it is 1. Raises ValueError for
    values outside these, NaN and infinity, and for modes that Pillow cannot convert.
    """
    image = turned(image)
    if alpha and ("A" in image.getbands() or image.info.get("transparency") is not None):
        return image.convert("RGBA")
    if image.mode == "RGB":
        return image
    if image.mode == "F" or image.mode == "I" or image.mode.startswith("I;16"):
        return PIL.Image.fromarray(to_levels(np.asarray(image), image.mode)).convert("RGB")
    if "transparency" in image.info:  # of palettes with several transparent colours Pillow warns otherwise
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_levels(values: np.ndarray, mode: str) -> np.ndarray:
    """Wide numbers (H, W) to uint8, by the rule of `to_rgb`."""
    if mode == "F" and not np.isfinite(values).all():
        raise ValueError("image of mode F holds NaN or infinity")
    low, high = values.min().item(), values.max().item()
    if low < 0 or high > 65535:
        raise ValueError(f"image of mode {mode} holds {low:g} to {high:g}: must be in 0 to 65535")
    if mode == "F":
        white = 1 if high <= 1 else 255 if high <= 255 else 65535
        return (values.astype(np.float32) * (255 / white)).round().astype(np.uint8)
    white = 255 if high <= 255 else 65535
    return ((values.astype(np.int32) * 255 + white // 2) // white).astype(np.uint8)


def turned(image: Image) -> Image:
    """The picture as its EXIF orientation says; itself when that is upright.

    Where Pillow can, the rest of the EXIF block is kept; else none of it.
    """
    image.load()
    number = orientation(image)
    if number == 1:
        return image
    try:
        if image.getexif().get(EXIF_ORIENTATION) == number:
            return PIL.ImageOps.exif_transpose(image)
    except Exception as error:
        log.debug("the EXIF block cannot be written again and is dropped: %s", reason(error))
    upright = image.transpose(TURNS[number])
    for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
        upright.info.pop(key, None)
    return upright


def orientation(image: Image) -> int:
    """The EXIF orientation, 1 to 8, whatever else the EXIF block holds; 1 when none is to be found.

    Pillow gives a block up at the first entry that it cannot read, which may come before the orientation.
    """
    raw = image.info.get("exif")
    try:
        value = image.getexif().get(EXIF_ORIENTATION)
    except Exception:
        value = None
    if value is None and isinstance(raw, bytes) and not pillow_finds_orientation(raw):
        value = orientation_in(raw)
    return next((number for number in TURNS if value == number), 1)


def pillow_finds_orientation(raw: bytes) -> bool:
    """Whether a block says an orientation that Pillow reads: then it was taken out of the picture since."""
    exif = PIL.Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif.load(raw)
            return EXIF_ORIENTATION in exif
        except Exception:
            return False


def orientation_in(raw: bytes) -> int | None:
    """The orientation in an EXIF block: its entry in the first directory, read alone.

    Source: TIFF 6.0, section 2 (entries of 12 bytes: tag, type, count, value).
    """
    raw = raw.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(raw[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(f"{order}L", raw, 4)
        (count,) = struct.unpack_from(f"{order}H", raw, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", raw, entry)
            if tag == EXIF_ORIENTATION and kind in (1, 3, 4):
                return struct.unpack_from(order + {1: "B", 3: "H", 4: "L"}[kind], raw, entry + 8)[0]
    except struct.error:  # the block ends
        return None
    return None


def size_in_header(path: Any) -> tuple[int, int] | None:
    """Width and height of the picture in a file, the right way up, from its first bytes; None for what is
    none."""
    try:
        with warnings.catch_warnings(), PIL.Image.open(path) as opened:
            width, height = opened.size
            return (height, width) if orientation(opened) >= 5 else (width, height)
    except Exception:  # of the decoder, which may raise anything
        return None
