"""The files that a command makes: their names, what is refused before work, and how they appear.

A result is "output", the image that says how it was made, "video", Frames for a film or a folder of them, or
another image. Nothing heavy is imported before there is something to write.
"""

import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

log = logging.getLogger("joyedit")

OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Frames(NamedTuple):
    """Pictures in their order, and how many are shown per second."""

    images: Sequence[Any]
    fps: float


def output_paths(output: str | None, photo: str | None, seeds: list[int]) -> list[Path]:
    """One path per seed: `output` itself for a single image, otherwise with the seed in its name."""
    chosen = Path(output or "").expanduser()
    if output is None or chosen.is_dir():
        stem = "generated" if photo is None else f"{PurePath(photo).stem}-edit"
        return [chosen / f"{stem}-{seed}.png" for seed in seeds]
    return numbered(chosen, seeds)


def numbered(path: Path, seeds: list[int]) -> list[Path]:
    """`path` itself for one seed, otherwise one path for each with the seed in its name."""
    path = path.expanduser()
    if len(seeds) == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{seed}{path.suffix}") for seed in seeds]


def refuse_files(files: Mapping[str, Sequence[Path]], force: bool) -> None:
    """Raises OSError or ValueError for results that could not be written: name of the result -> its paths.

    "video" may be a folder, without a suffix, that is empty or holds what --force replaces.
    """
    paths = [path for each in files.values() for path in each]
    if len({path.absolute() for path in paths}) < len(paths):
        raise ValueError(f"two results would be written to one file: {', '.join(map(str, paths))}")
    for path in files.get("video", ()):
        refuse_film(path, paths)
    for path in paths:
        frames = path in files.get("video", ()) and not path.suffix and path.is_dir()
        if path.is_dir() and not frames:
            raise IsADirectoryError(f"{path} is a folder")
        if path.exists() and not force and not (frames and not any(path.iterdir())):
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
    colour profile go into "output", if that is a PNG.
    """
    from joyedit.checkpoints.replacing import replacing
    from joyedit.media.video import save_video

    refuse_files({name: [path] for name, path in paths.items()}, force)
    images = {name: path for name, path in paths.items() if name != "video"}
    with contextlib.ExitStack() as together:
        for name, path in images.items():
            carried = (metadata, profile) if name == "output" else (None, None)
            write_image(pictures[name], path, together.enter_context(replacing(path)), *carried)
        try:
            if "video" in paths:
                film: Frames = pictures["video"]
                save_video(film.images, paths["video"], film.fps, force=force)
        except Exception:
            together.close()
            log.warning("%s is written, but not the film", ", ".join(map(str, images.values())))
            raise


def write_image(
    image: Any, path: Path, temporary: Path, metadata: dict[str, Any] | None, profile: Any
) -> None:
    """Write PNG with its metadata; JPEG and WebP, which are lossy, without."""
    from joyedit.media.images import save_png

    if path.suffix.lower() == ".png":
        save_png(image, temporary, metadata, force=True, icc_profile=profile)
        return
    if metadata is not None:
        log.info("%s carries no parameters: only .png files do", path)
    image.save(temporary, quality=95)
