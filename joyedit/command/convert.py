"""`joyedit convert`: a checkpoint in another layout or dtype, or an adapter in other names, whole or not at
all."""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from joyedit import __version__
from joyedit.checkpoints.places import expanded
from joyedit.command.calls import said, source_options
from joyedit.command.results import existing_parent


def convert(args: argparse.Namespace) -> Path:
    """Write the checkpoint `args.source` to the folder `args.target` in another layout or dtype; that folder.
    Of an adapter, which is a file, source and target are files.

    It is elsewhere until it is whole. With --force it takes the place of a checkpoint, but never of a folder
    that holds something else, even if that appeared while the checkpoint was read.
    """
    from joyedit.checkpoints.replacing import replacing_folder
    from joyedit.command.info import describe
    from joyedit.loading.layouts import open_unread, save_checkpoint

    target = expanded(args.target)
    if is_adapter(expanded(args.source)):
        return convert_adapter(args)
    if args.to == "kohya":
        raise ValueError(f"--to kohya is for adapters, and {args.source} is none")
    if target.is_dir():
        target = target.resolve()  # of a link to a folder, the folder is replaced
    refuse_target(target, expanded(args.source), args.force)
    if args.quantize and args.to != "comfyui":
        raise ValueError(f"--quantize {args.quantize} is written with --to comfyui, not --to {args.to}")
    options = source_options(args)
    checkpoint = describe(args.source, **options)
    if not args.quantize:
        refuse_full_disk(target, checkpoint.bytes_as(args.dtype))
    options |= said(args, ("dtype", "prediction_type"))
    pipe = open_unread(args.source, components=args.parts, **options)
    refuse_full_disk(target, bytes_to_write(pipe, args.quantize))
    local = expanded(args.source).exists()
    provenance = {
        "joyedit.version": __version__,
        "joyedit.source": expanded(args.source).resolve().name if local else args.source,
        "joyedit.source_revision": checkpoint.revision or "",
        "license": checkpoint.licence,
    }
    with replacing_folder(target, refuse_other_than_checkpoint if args.force else None) as made:
        save_checkpoint(pipe, made, args.to, metadata=provenance, quantize=args.quantize)
    return target


def is_adapter(source: Path) -> bool:
    from joyedit.checkpoints.lora_files import is_lora
    from joyedit.checkpoints.tensor_files import TensorFiles

    return source.is_file() and source.suffix == ".safetensors" and is_lora(TensorFiles([source]))


def convert_adapter(args: argparse.Namespace) -> Path:
    """Write a LoRA file in the names of another program. Returns the file."""
    from joyedit.loading.adapters import convert_lora

    if args.to == "original":
        raise ValueError(f"{args.source} is an adapter: --to takes comfyui, diffusers or kohya")
    if others := [name for name in ("dtype", "quantize", "parts", "prediction_type") if getattr(args, name)]:
        raise ValueError(f"{args.source} is an adapter, which --{others[0].replace('_', '-')} is not for")
    return convert_lora(expanded(args.source), expanded(args.target), args.to, force=args.force)


def bytes_to_write(pipe: Any, quantize: str | None) -> int:
    from joyedit.loading.foreign_layouts import comfyui_tensors

    if quantize and "processor" in pipe.components:  # others are refused when they are written
        written = [comfyui_tensors(part, network, quantize) for part, network in pipe.networks.items()]
    else:
        written = [network.tensors() for network in pipe.networks.values()]
    return sum(tensors.nbytes() for tensors in written)


def refuse_target(target: Path, source: Path, force: bool) -> None:
    from joyedit.checkpoints.hub import WEIGHT_SUFFIXES

    if target.suffix in WEIGHT_SUFFIXES:
        raise ValueError(f"{target} looks like a file: DST is a folder")
    if os.path.lexists(target) and not target.is_dir():
        kind = "file" if target.exists() else "link to nothing"
        raise NotADirectoryError(f"{target} is a {kind}: DST is a folder")
    if source.exists():
        inner, outer = sorted((source.resolve(), target.resolve()), key=lambda p: len(p.parts), reverse=True)
        if inner.is_relative_to(outer):
            raise ValueError(f"{source} and {target} are in each other: choose a DST elsewhere")
    if target.exists() and any(target.iterdir()):
        if not force:
            raise FileExistsError(f"{target} exists and is not empty: pass --force to replace it")
        refuse_other_than_checkpoint(target)


def refuse_other_than_checkpoint(folder: Path) -> None:
    """Raises FileExistsError for a folder that is no checkpoint, or that holds something beside it."""
    from joyedit.checkpoints.hub import Origin
    from joyedit.loading.layouts import layout_of
    from joyedit.loading.own_files import refuse_strangers

    try:
        layout = layout_of(str(folder), Origin(str(folder)).listing())
    except ValueError:
        raise FileExistsError(f"{folder} exists and is no checkpoint: --force does not replace it") from None
    refuse_strangers(folder, layout)


def refuse_full_disk(target: Path, needed: int) -> None:
    from joyedit.command.info import size

    free = shutil.disk_usage(existing_parent(target)).free
    if needed > free:
        raise OSError(f"{target} needs {size(needed)}, and the disk has {size(free)} free")
