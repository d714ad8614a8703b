"""`joyedit batch`: its words and options, beside those that it has from `joyedit edit`."""

import argparse
import os
from collections.abc import Mapping, Sequence

from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import shown
from joyedit.command import several
from joyedit.command.calls import spelt
from joyedit.command.parsing import PHOTO_SUFFIXES, unrecognized
from joyedit.command.rewrite import LOCAL
from joyedit.command.shards import shard
from joyedit.command.systems import SYSTEMS
from joyedit.command.values import place, whole_number
from joyedit.media.download import is_url
from joyedit.training.processes import started

MOST_TOGETHER = 1024  # pictures of one call

# Options of `edit` that name a file beside one result, or are about one.
OF_ONE: Mapping[str, str] = {
    name: f"--{name.replace('_', '-')}" for system in SYSTEMS for name in (*system.files, "fps")
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="FOLDER|JOBS", type=place, help="folder of photographs, or JSON Lines"
    )
    parser.add_argument(
        "prompt",
        metavar="INSTRUCTION",
        nargs="?",
        help="what to change in each; - reads it from standard input. Not needed where lines say it",
    )
    add = parser.add_argument_group("many edits").add_argument
    add(
        "--out",
        metavar="DIR",
        type=place,
        required=True,
        help="folder of the results; the same command goes on",
    )
    add(
        "--shard",
        metavar="I/N",
        type=shard,
        help="do part I, from 0, of N; default: as SLURM, Kubernetes or torchrun say, or else all",
    )
    add(
        "--batch-size",
        metavar="N",
        type=lambda text: whole_number(text, 1, MOST_TOGETHER),
        default=1,
        help="edit N photographs of one size in one call; default 1, which is `joyedit edit` to the byte",
    )
    parser.set_defaults(photos=[], output=None, preview=None, force=False)


def take_in(args: argparse.Namespace, left: Sequence[str]) -> str | None:
    """Put the words that argparse had no place for in theirs; what is wrong with them, if anything."""
    words = [*([args.prompt] if args.prompt is not None else []), *left]
    if len(words) > 1 or any(word.startswith("-") and word != "-" for word in left):
        return unrecognized(args, left)
    args.prompt = words[0] if words else None
    return None


def misuse(args: argparse.Namespace) -> str | None:
    """What is wrong with the words and options as they stand on the command line."""
    if options := spelt(args, OF_ONE):
        return f"{options[0]} is about one result: joyedit edit has it"
    if args.rewrite not in (None, LOCAL) and not is_url(args.rewrite):
        return "--rewrite local or --rewrite URL: another model would be loaded beside the editor"
    if several.size(args) > 1 and not started().first:
        return None  # the first one looks at files, and tells
    source, out = expanded(args.source), expanded(args.out)
    if not os.path.exists(source):
        return f"{shown(args.source, 80)} is no folder, and no file with jobs"
    if source.suffix.lower() in PHOTO_SUFFIXES and not source.is_dir():
        return f"{shown(args.source, 80)} is one picture, no file with jobs: joyedit edit has it"
    if not source.is_dir() and not source.is_file():
        name = shown(args.source, 80)
        return f"{name} is neither a folder nor a file: jobs are read more than once, so write them to one"
    if has_lines(args) and args.num_images not in (None, 1):
        return "--num-images is for a folder: a line makes one picture"
    if os.path.lexists(out) and not out.is_dir():
        return f"argument --out: {shown(args.out, 80)} is no folder"
    if not has_lines(args) and out.resolve() == source.resolve():
        return "argument --out: the results would lie among the photographs: name another folder"
    return None


def has_lines(args: argparse.Namespace) -> bool:
    """Whether lines of a file say what to make, not a folder and the options."""
    return not expanded(args.source).is_dir()
