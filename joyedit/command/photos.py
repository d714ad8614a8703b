"""The photographs of a command: read from paths or URLs, named without their folders, and resized."""

import argparse
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import hides, shown, visible
from joyedit.media.download import is_url, shown_url, url_scheme

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
    """Errors as of `joyedit.load_image`, and IsADirectoryError for a folder."""
    from joyedit.media.images import load_photo

    if not is_url(source) and (path := expanded(source)).is_dir():
        raise IsADirectoryError(f"{path} is a folder: name the photographs in it, as in {path / '*.png'}")
    image, digest = load_photo(source)
    return Photo(image, {"name": photo_name(source), "sha256": digest}, image.info.get("icc_profile"))


def read_again(source: str | Mapping[str, str], args: argparse.Namespace, kind: str, remedy: str) -> Photo:
    """A picture beside the photograph: a path or URL of the command line, or name and SHA-256 as a result
    records them. kind: what it is; remedy: what to do where a recorded one is not here.

    Raises as `read_photo`, ValueError for a damaged record, and FileNotFoundError for a recorded one that
    lies neither beside the result nor beside a photograph nor in the current folder.
    """
    if isinstance(source, str):
        return read_photo(source)
    name, digest = source.get("name"), source.get("sha256")
    if not name or not digest:
        raise ValueError(f"{args.config_from}: the recorded {kind} is damaged: {shown(source)}")
    places = [expanded(args.config_from).parent]
    places += [expanded(photo).parent for photo in args.photos or () if not is_url(photo)]
    found = find_recorded(name, digest, (*places, Path()))
    if found is None:
        raise FileNotFoundError(
            f"{args.config_from} was made with the {kind} {visible(name, 80)}, and no such file with its "
            f"content (SHA-256 {visible(digest, 12)}...) lies beside it, beside the photograph or here: "
            f"{remedy}"
        )
    return read_photo(str(found))


def find_recorded(name: str, sha256: str, folders: Iterable[Path]) -> Path | None:
    """The file of that name, without its folder, and content in the first of these folders that has it."""
    for folder in folders:
        path = folder / Path(name).name
        if path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                    return path
    return None


def photo_name(source: str) -> str:
    """The file's name without its folder; of a URL without what may hold a key."""
    if not is_url(source):
        return Path(source).name
    path = shown_url(source).partition("://")[2].partition("/")[2]
    return "".join("_" if hides(letter) else letter for letter in PurePath(unquote(path)).name) or "photo"


def shown_file(source: str) -> str:
    """The path, or the URL without what may hold a key."""
    return shown_url(source) if url_scheme(source) else source


def resized(image: "Image", size: tuple[int, int], resample: "Resampling", own: tuple[int, int]) -> "Image":
    """The picture in that size, width x height; one line says so where it is another. own: the size that it
    would have got by itself, which is nearest to its shape."""
    if size == image.size:
        return image
    log.info("%s", working_at(size, image.size))
    if (ratio := stretched(image.size, size)) and ratio > (stretched(image.size, own) or 1):
        log.warning("this stretches the photograph: at %d x %d it would keep its shape", *own)
    return image.resize(size, resample)


def stretched(size: tuple[int, int], other: tuple[int, int]) -> float | None:
    """By which factor a picture is out of shape in another size, as far as that is worth a word."""
    from joyedit.media.images import STRETCH, stretch

    factor = stretch(size, other)
    return factor if factor > STRETCH else None


def working_at(size: tuple[int, int], photo: tuple[int, int]) -> str:
    """Both are width x height."""
    (width, height), (own_width, own_height) = size, photo
    return f"working at {width} x {height} pixels, the photograph has {own_width} x {own_height}"
