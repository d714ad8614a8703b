"""Files that are not what their names say, so that a message can name them as what they are.

Source: the git-lfs specification, version 1; the download folders of huggingface_hub.
"""

from collections.abc import Iterable
from pathlib import Path

POINTER = b"version https://git-lfs"
LONGEST_POINTER = 1024  # bytes, as the specification says


def is_pointer(path: Path) -> bool:
    """Whether a file is the text that git-lfs leaves in the place of a large file."""
    try:
        if path.stat().st_size > LONGEST_POINTER:
            return False
        with path.open("rb") as file:
            return file.read(len(POINTER)) == POINTER
    except OSError:
        return False


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Raises ValueError naming the first that is such a text."""
    for path in paths:
        if is_pointer(path):
            raise ValueError(
                f"{path} is a git-lfs pointer, not the file itself: fetch that with `git lfs pull`"
            )


def broken_off(folder: Path) -> str:
    """Words on downloads into a folder that did not come to their end, to be added to what is missing there.

    folder: that of a repository in the cache, or one that files were downloaded to.
    """
    places = (folder / "blobs", folder / ".cache" / "huggingface" / "download", folder)
    parts = [
        part
        for place in places
        for part in place.glob("**/*.incomplete" if place != folder else "*.incomplete")
    ]
    if not parts:
        return ""
    return (
        f"; a download was broken off ({len(parts)} files in {parts[0].parent} end in .incomplete): repeat it"
    )
