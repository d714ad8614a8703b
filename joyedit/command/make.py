"""`joyedit edit` and `joyedit generate`: from the arguments to files.

What differs between the systems is in their own files (`systems.py`).
"""

import argparse
import logging
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joyedit.command.arguments import contradiction
from joyedit.command.calls import origin_options, said, source_options, spelt
from joyedit.command.photos import Photo, read_photo
from joyedit.command.recorded import facts_of_run, fill_from_image
from joyedit.command.results import numbered, output_paths, refuse_files, write_results
from joyedit.command.systems import SYSTEMS, System, system_of
from joyedit.command.values import LARGEST_SEED

if TYPE_CHECKING:
    from joyedit.pipelines.made_for import MadeFor

log = logging.getLogger("joyedit")


def make(args: argparse.Namespace) -> Iterator[list[Path]]:
    """Make images from what `args` say and, unless `args.photo` is None, the photograph at that path or URL.

    Yields what was written for each seed. Everything that can be refused is refused before the model is
    loaded. What nobody says is filled in: from the image of `--config-from`, then by the checkpoint.
    """
    photo = None if args.photo is None else read_photo(args.photo)
    if args.config_from is not None:
        fill_from_image(args, photo)
        refuse_contradictions(args)
    seeds = seeds_of(args)
    paths = paths_of(args, photo, seeds)

    system = system_for(args)
    refuse_adapter(args)
    made_for = fill_from_checkpoint(args, system)
    image = None if photo is None else system.prepare(photo.image, args, made_for)

    pipe = open_pipeline(args)
    log.info("seed %s", " ".join(map(str, seeds)))
    call = system.call(pipe, image, args)
    warn_of_the_unknown(args, system, pipe, call, made_for)

    for seed, files, results in zip(seeds, paths, system.run(pipe, call, seeds, args), strict=True):
        metadata = None
        if args.metadata:
            size = {"height": results["output"].height, "width": results["output"].width}
            metadata = {**facts_of_run(args, system, pipe, call, photo), "seed": seed, **size}
        profile = None if photo is None else photo.profile
        write_results(results, files, metadata, profile, force=args.force)
        yield [*files.values()]


def refuse_contradictions(args: argparse.Namespace) -> None:
    if wrong := contradiction(args):
        raise ValueError(wrong)


def seeds_of(args: argparse.Namespace) -> list[int]:
    """One per image. Raises ValueError for a recorded one that cannot be."""
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed {seed} is not within 0 and {LARGEST_SEED}")
    return list(range(seed, seed + (args.num_images or 1)))


def paths_of(args: argparse.Namespace, photo: Photo | None, seeds: list[int]) -> list[dict[str, Path]]:
    """For each seed the results that are asked for, and where they go. Raises as `refuse_files`."""
    files = {"output": output_paths(args.output, None if photo is None else photo.name, seeds)}
    for name in (name for system in SYSTEMS for name in system.files if getattr(args, name)):
        files[name] = numbered(Path(getattr(args, name)), seeds)
    refuse_files(files, args.force)
    return [dict(zip(files, paths, strict=True)) for paths in zip(*files.values(), strict=True)]


def system_for(args: argparse.Namespace) -> System:
    """The system of the model; where none is named, the model of the system that is meant.

    Raises ValueError for a model that is not told what to do in its own way, or gets options of another.
    """
    from joyedit.loading.layouts import pipeline_name

    args.model = args.model or next(system for system in SYSTEMS if system.is_meant(args)).model
    pipeline = pipeline_name(args.model, **origin_options(args))
    chosen = system_of(pipeline)
    if chosen is None:
        raise ValueError(f"{args.model} holds a {pipeline}, which this command does not know")
    if args.command not in chosen.commands:
        raise ValueError(f"{args.model} edits photographs here: {chosen.usage}")
    if len(said(args, chosen.texts)) < len(chosen.texts):
        raise ValueError(chosen.untold.format(model=args.model))
    for system in SYSTEMS:
        if system is not chosen and (options := spelt(args, system.options)):
            raise ValueError(system.foreign.format(model=args.model, option=options[0]))
    return chosen


def refuse_adapter(args: argparse.Namespace) -> None:
    """Raises FileNotFoundError or ValueError for an adapter that cannot be read."""
    from joyedit.checkpoints.lora_files import open_lora

    if args.lora is not None:
        open_lora(args.lora, None, "", adapter_options(args))


def fill_from_checkpoint(args: argparse.Namespace, system: System) -> "MadeFor":
    """What the model says it was made for, whose settings are taken over where nothing else says them."""
    from joyedit.loading.layouts import read_made_for

    made_for = read_made_for(args.model, **origin_options(args))
    for name, value in made_for.call.items():
        if getattr(args, name) is None and name not in system.replaced(args, made_for.call):
            setattr(args, name, value)
    refuse_contradictions(args)
    return made_for


def open_pipeline(args: argparse.Namespace) -> Any:
    from joyedit.loading.layouts import load
    from joyedit.media.images import buckets

    table = None if args.basesize is None else buckets(args.basesize)
    options = said(args, ("device", "dtype", "offload", "reference_quirks", "prediction_type", "preset"))
    pipe = load(args.model, **options, **source_options(args), **(args.parts or {}))
    if args.lora is not None:
        add_adapter(pipe, args)
    if table is not None:
        pipe.buckets = table
    # Shown on a terminal only (None), unless asked for or against.
    pipe.set_progress_bar_config(disable={-1: True, 0: None}.get(args.verbosity, False))
    return pipe


def add_adapter(pipe: Any, args: argparse.Namespace) -> None:
    """Put the adapter into the weights, where it costs nothing per step; nothing here takes it out again."""
    name = pipe.load_lora_weights(args.lora, **adapter_options(args)).name
    pipe.fuse_lora(1.0 if args.lora_scale is None else args.lora_scale, [name], reversible=False)


def adapter_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"cache_dir": args.cache_dir, "local_files_only": args.offline}


def warn_of_the_unknown(
    args: argparse.Namespace, system: System, pipe: Any, call: dict[str, Any], made_for: "MadeFor"
) -> None:
    """One line, where a model that knows little is given something else. It edits that all the same."""
    from joyedit.loading.layouts import RELEASED
    from joyedit.pipelines.made_for import round_trip

    world = made_for.world
    if world is None:
        return
    if "image" not in call:
        unknown = "a text without a picture"
    else:
        texts = [call[name] for name in system.texts]
        words = ", ".join(repr(word) for word in world.unknown(texts)[:4])
        pictured = "this photograph" if round_trip(pipe, system.seen(pipe, call)) < world.psnr else ""
        unknown = " and of ".join(filter(None, (pictured, words)))
    if unknown:
        log.warning(
            "%s knows only %s: expect little of %s; real edits need real weights, as in --model %s",
            args.model,
            world.about,
            unknown,
            RELEASED[system.pipeline],
        )
