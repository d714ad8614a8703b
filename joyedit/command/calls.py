"""From the arguments of a command to those of a function: of a loader, or of a pipeline's call.

What the user did not say is None among the arguments, and is left out of the call: the function's own
defaults then hold.
"""

import argparse
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from joyedit.pipelines.defaults import plain

log = logging.getLogger("joyedit")

# What the call of every pipeline takes, whatever the system.
EVERY_CALL = ("negative_prompt", "num_inference_steps", "guidance_scale", "step_cache")
# What a call for several takes a list of, one for each.
OF_EACH = (
    *("image", "images", "mask", "mask_image"),
    *("prompt", "negative_prompt", "source_prompt", "target_prompt"),
)


def said(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of `names` that say something, with their values."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def spelt(args: argparse.Namespace, options: Mapping[str, str]) -> list[str]:
    """Those of `options`, argument -> its spelling, that say something, as they are spelt."""
    return [options[name] for name in said(args, options)]


def in_effect(function: Callable[..., Any], call: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What `function` works with for each of `names`, when called with `call`: its default where that is
    silent."""
    parameters = inspect.signature(function).parameters
    return {name: call.get(name, plain(parameters[name].default)) for name in names}


def merged(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One call of several, which differ in no more than what each has of its own (`OF_EACH`)."""
    return {
        name: [call[name] for call in calls] if name in OF_EACH else value for name, value in calls[0].items()
    }


def say_steps(pipe: Any, args: argparse.Namespace, steps: int) -> None:
    """One line after a run of that many steps with a step cache: in how many the blocks were computed."""
    if args.step_cache:
        log.info("--step-cache %g: %d of %d steps were computed", args.step_cache, pipe.steps_computed, steps)


def origin_options(args: argparse.Namespace) -> dict[str, Any]:
    """Where the files of a Hub repository come from."""
    return {"revision": args.revision, "cache_dir": args.cache_dir, "local_files_only": args.offline}


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Where a checkpoint's files come from, as `joyedit.load` takes it."""
    options = {**origin_options(args), "variant": args.variant}
    return {name: value for name, value in options.items() if value is not None}
