"""`joyedit convert`: a checkpoint in another layout or dtype, whole or not at all."""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from joyedit import __version__
from joyedit.command.calls import said, source_options
from joyedit.command.results import existing_parent

if TYPE_CHECKING:
    from joyedit.command.info import Checkpoint


def convert(args: argparse.Namespace) -> Path:
    """Write the checkpoint `args.source` to the folder `args.target` in another layout or dtype; that folder.

    It has a temporary name until it is whole. With --force it takes the place of a checkpoint, but never of a
    folder that holds something else.
    """
    from joyedit.command.info import describe
    from joyedit.loading.layouts import load, save_checkpoint

    target = Path(args.target).expanduser()
    refuse_target(target, Path(args.source), args.force)
    options = source_options(args)
    checkpoint = describe(args.source, **options)
    refuse_full_disk(target, checkpoint, args.dtype)
    options |= said(args, ("dtype", "prediction_type"))
    pipe = load(args.source, device="cpu", **options, **(args.parts or {}))
    local = Path(args.source).expanduser().exists()
    provenance = {
        "joyedit.version": __version__,
        "joyedit.source": Path(args.source).resolve().name if local else args.source,
        "joyedit.source_revision": checkpoint.revision or "",
        "license": checkpoint.licence,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        made, replaced = Path(temporary) / "made", Path(temporary) / "replaced"
        save_checkpoint(pipe, made, args.to, metadata=provenance)
        if not target.exists():
            made.rename(target)
        else:
            target.rename(replaced)
            try:
                made.rename(target)
            except BaseException:
                replaced.rename(target)
                raise
    return target


def refuse_target(target: Path, source: Path, force: bool) -> None:
    from joyedit.checkpoints.hub import Origin
    from joyedit.loading.layouts import WEIGHT_SUFFIXES, layout_of

    if target.suffix in WEIGHT_SUFFIXES:
        raise ValueError(f"{target} looks like a file: DST is a folder")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: DST is a folder")
    if source.exists():
        inner, outer = sorted((source.resolve(), target.resolve()), key=lambda p: len(p.parts), reverse=True)
        if inner.is_relative_to(outer):
            raise ValueError(f"{source} and {target} are in each other: choose a DST elsewhere")
    if target.exists() and any(target.iterdir()):
        if not force:
            raise FileExistsError(f"{target} exists and is not empty: pass --force to replace it")
        try:
            layout_of(str(target), Origin(str(target)).listing())
        except ValueError:
            raise FileExistsError(
                f"{target} exists and is no checkpoint: --force does not replace it"
            ) from None


def refuse_full_disk(target: Path, checkpoint: "Checkpoint", dtype: str | None) -> None:
    from joyedit.command.info import size

    needed, free = checkpoint.bytes_as(dtype), shutil.disk_usage(existing_parent(target)).free
    if needed > free:
        raise OSError(f"{target} needs {size(needed)}, and the disk has {size(free)} free")
