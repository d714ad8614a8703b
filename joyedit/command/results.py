"""The files that a command makes: their names, what is refused before work, and how they appear.

A result is "output", the image that says how it was made, "video", Frames for a film or a folder of them, or
another image. Nothing heavy is imported before there is something to write.
"""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from joyedit.checkpoints.places import expanded

log = logging.getLogger("joyedit")

OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LONGEST_NAME = 255  # bytes, on all file systems in use


class Frames(NamedTuple):
    """Pictures in their order, and how many are shown per second."""

    images: Sequence[Any]
    fps: float


def output_paths(
    output: str | None, photo: str | None, seeds: list[int], *, several: bool = False
) -> list[Path]:
    """One path per seed: `output` itself for a single image, otherwise as `numbered` does it. Without
    `output`, or in that folder, the photograph's name is part of it, as far as there is room. several:
    whether there are other photographs."""
    chosen = expanded(output or "")
    if output is None or chosen.is_dir():
        ends = [f"-{seed}.png" if photo is None else f"-edit-{seed}.png" for seed in seeds]
        stem = "generated" if photo is None else PurePath(photo).stem
        return [chosen / f"{shortened(stem, LONGEST_NAME - len(end))}{end}" for end in ends]
    return numbered(chosen, seeds, photo if several else None)


def shortened(name: str, length: int) -> str:
    """The beginning of a name that takes at most `length` bytes."""
    return os.fsencode(name)[:length].decode(errors="ignore") if len(os.fsencode(name)) > length else name


def numbered(path: Path, seeds: list[int], photo: str | None = None) -> list[Path]:
    """`path` itself for one seed, otherwise one path for each with the seed in its name; before it stands the
    name of a photograph that is one of several."""
    path = expanded(path)
    if len(seeds) == 1 and photo is None:
        return [path]
    ends = [f"-{seed}{path.suffix}" for seed in seeds] if len(seeds) > 1 else [path.suffix]
    if photo is None:
        return [path.with_name(f"{path.stem}{end}") for end in ends]
    return [
        path.with_name(f"{shortened(f'{path.stem}-{PurePath(photo).stem}', LONGEST_NAME - len(end))}{end}")
        for end in ends
    ]


def refuse_files(files: Mapping[str, Sequence[Path]], force: bool) -> None:
    """Raises OSError or ValueError for results that could not be written: name of the result -> its paths.

    "video" may be a folder, without a suffix, that is empty or holds what --force replaces.
    """
    paths = [path for each in files.values() for path in each]
    counts = Counter(path.absolute() for path in paths)
    if twice := [path for path in dict.fromkeys(paths) if counts[path.absolute()] > 1]:
        raise ValueError(f"two results would be written to one file: {', '.join(map(str, twice[:4]))}")
    for path in files.get("video", ()):
        refuse_film(path, paths)
    for path in paths:
        frames = path in files.get("video", ()) and not path.suffix and path.is_dir()
        if path.is_dir() and not frames:
            raise IsADirectoryError(f"{path} is a folder")
        if os.path.lexists(path) and not force and not (frames and not any(path.iterdir())):
            raise FileExistsError(f"{path} exists: pass --force to replace it, or name another file")
        folder = existing_parent(path)
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise PermissionError(f"{path} cannot be written: {folder} is no folder that you may write to")


def refuse_film(path: Path, paths: Sequence[Path]) -> None:
    from joyedit.media.video import check_video_path

    if not path.suffix and path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: --video without a suffix names a folder")
    if inside := [other for other in paths if path.absolute() in other.absolute().parents]:
        raise ValueError(f"{inside[0]} would lie among the frames in {path}: name another file with -o")
    try:
        check_video_path(path, force=True)
    except ImportError as error:
        raise ValueError(str(error)) from None


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is already there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def write_results(
    pictures: Mapping[str, Any],
    paths: Mapping[str, Path],
    metadata: dict[str, Any] | None,
    profile: bytes | None,
    *,
    force: bool,
) -> None:
    """Write what was made of one seed, name of the result -> its path.

    The files appear together, or after Ctrl-C none; when only the film fails, the images do. metadata and the
    colour profile go into "output", metadata if that is a PNG.
    """
    from joyedit.checkpoints.replacing import replacing_all
    from joyedit.media.video import save_video

    refuse_files({name: [path] for name, path in paths.items()}, force)
    images = {name: path for name, path in paths.items() if name != "video"}
    without_film = None
    with replacing_all([*images.values()], force=force) as temporaries:
        for (name, path), temporary in zip(images.items(), temporaries, strict=True):
            carried = (metadata, profile) if name == "output" else (None, None)
            write_image(pictures[name], path, temporary, *carried)
        if "video" in paths:
            film: Frames = pictures["video"]
            try:
                save_video(film.images, paths["video"], film.fps, force=force)
            except Exception as error:
                without_film = error
    if without_film is not None:
        log.warning("%s is written, but not the film", ", ".join(map(str, images.values())))
        raise without_film


def write_image(
    image: Any, path: Path, temporary: Path, metadata: dict[str, Any] | None, profile: Any
) -> None:
    """Write PNG with its metadata; JPEG and WebP, which are lossy, without. All carry the colour profile."""
    from joyedit.media.images import save_picture

    if metadata is not None and path.suffix.lower() != ".png":
        log.info("%s carries no parameters: only .png files do", path)
    save_picture(image, temporary, metadata, force=True, icc_profile=profile)
