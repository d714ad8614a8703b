"""`--preview FILE`: what the run is heading for, in a file that is written anew after every step.

It is there to be looked at while a run goes on, and no result: it has one name for all photographs and seeds,
carries no parameters, and stays as the last step leaves it. A result records the name of the file, which
`--config-from` does not take over: what replaces a file again and again is asked for each time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from joyedit.checkpoints.places import expanded
from joyedit.command.values import place


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group("while it runs").add_argument(
        "--preview",
        metavar="FILE",
        type=place,
        help="show what each step is heading for, roughly, in a file (.png, .jpg, .webp) that is written "
        "anew every time and stays; of several images the first four, side by side",
    )


def path_of(args: argparse.Namespace) -> list[Path]:
    """Where the preview goes, if one is asked for."""
    return [expanded(args.preview)] if args.preview else []


def watched(calls: Sequence[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The calls of pipelines, with the preview as their callback if one is asked for."""
    if not args.preview:
        return [*calls]
    from joyedit.pipelines.previews import Preview

    preview = Preview(*path_of(args), force=args.force)
    return [{**call, "callback_on_step_end": preview} for call in calls]
