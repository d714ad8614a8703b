"""The photograph of a command: read from a path or URL, named without its folder, and resized."""

import logging
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from PIL.Image import Image, Resampling

log = logging.getLogger("joyedit")


class Photo(NamedTuple):
    """`facts` are what a result records of it; `profile` is its ICC colour profile."""

    image: "Image"
    facts: dict[str, str]
    profile: bytes | None

    @property
    def name(self) -> str:
        return self.facts["name"]


def read_photo(source: str) -> Photo:
    """Errors as of `joyedit.load_image`."""
    from joyedit.media.images import load_photo

    image, digest = load_photo(source)
    return Photo(image, {"name": photo_name(source), "sha256": digest}, image.info.get("icc_profile"))


def photo_name(source: str) -> str:
    """The file's name without its folder; of a URL without the query, which may hold a key."""
    if source.startswith(("http://", "https://")):
        return PurePath(unquote(urlsplit(source).path)).name or "photo"
    return Path(source).name


def resized(image: "Image", size: tuple[int, int], resample: "Resampling") -> "Image":
    """The picture in that size, width x height; one line says so where it is another."""
    if size == image.size:
        return image
    log.info("working at %d x %d pixels, the photograph has %d x %d", *size, *image.size)
    return image.resize(size, resample)
