"""`joyedit edit` and `joyedit generate`: from the arguments to files.

What differs between the systems is in their own files (`systems.py`).
"""

import argparse
import contextlib
import logging
import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import shown
from joyedit.command import places, preview, several
from joyedit.command.arguments import blank, contradiction
from joyedit.command.calls import origin_options, said, source_options, spelt
from joyedit.command.photos import Photo, read_photo
from joyedit.command.recorded import facts_of_run, fill_from_image
from joyedit.command.references import open_references
from joyedit.command.results import numbered, output_paths, refuse_files, write_results
from joyedit.command.rewrite import LOCAL, refuse_rewriter, rewritten
from joyedit.command.systems import SYSTEMS, System, system_of
from joyedit.training.processes import ALONE, Processes

if TYPE_CHECKING:
    from PIL.Image import Image

    from joyedit.pipelines.made_for import MadeFor

log = logging.getLogger("joyedit")

LONGEST_PROMPT = 100_000  # bytes


def make(args: argparse.Namespace, processes: Processes = ALONE) -> Iterator[list[Path]]:
    """Make images from what `args` say and, unless `args.photos` is None, the photographs there.

    Yields what was written for each photograph and seed; of several processes (`several.py`) all compute, and
    the first writes. Everything that can be refused is refused before the model is loaded, and what only the
    model can refuse before the first run. What nobody says is filled in: from the image of `--config-from`,
    then by the checkpoint.
    """
    photos, seeds, paths = several.told(processes, args, lambda: taken_in(args))

    system = system_for(args)
    several.refuse_heads(args)
    refuse_adapters(args)
    made_for = fill_from_checkpoint(args, system)
    refuse_rewriter(args, system, made_for)
    images = [system.prepare(photo.image, args, made_for) for photo in photos]

    told = [args] * len(photos or [None])  # the arguments of each photograph, whose prompt may be its own
    if args.rewrite not in (None, LOCAL):
        told = rewritten(args, system, photos, processes)
    pipe = open_pipeline(args)
    if args.rewrite == LOCAL:
        told = rewritten(args, system, photos, processes, pipe)
    log.info("seed %s", " ".join(map(str, seeds)))
    calls = calls_of(told, system, pipe, photos, images)
    if processes.first:
        warn_of_no_effect(args, system, pipe, calls[0])
        warn_of_the_unknown(args, system, pipe, photos, calls, made_for)
        calls = preview.watched(calls, args)

    for own, photo, call, files_of_seeds in zip(told, photos or [None], calls, paths, strict=True):
        made = system.run(pipe, call, seeds, args)
        if not processes.first:
            continue
        for seed, files, results in zip(seeds, files_of_seeds, made, strict=True):
            metadata = record_of(own, system, pipe, call, photo, seed, results["output"])
            profile = None if photo is None else photo.profile
            write_results(results, files, metadata, profile, force=args.force)
            yield [*files.values()]


def record_of(
    args: argparse.Namespace,
    system: System,
    pipe: Any,
    call: dict[str, Any],
    photo: Photo | None,
    seed: int,
    made: "Image",
) -> dict[str, Any] | None:
    """What the image that a run has just made says of it; None where that is not wanted."""
    if not args.metadata:
        return None
    size = {"height": made.height, "width": made.width}
    return {**facts_of_run(args, system, pipe, call, photo), "seed": seed, **size}


def taken_in(
    args: argparse.Namespace,
) -> tuple[list[Photo], list[int], list[list[dict[str, Path]]]]:
    """What the user gives, wherever it is, opened and put among the arguments: the photographs, the seeds,
    and where the results go. Raises for what cannot be read, or written."""
    take_in_prompt(args)
    photos = [read_photo(source) for source in args.photos or ()]
    if args.config_from is not None:
        fill_from_image(args, photos)
        refuse_contradictions(args)
    args.references, args.mask = open_references(args), places.open_mask(args, photos)
    seeds = seeds_of(args)
    return photos, seeds, paths_of(args, photos, seeds)


def take_in_prompt(args: argparse.Namespace) -> None:
    """Read the instruction from where the arguments say that it is: a file, or standard input.

    Raises OSError, and ValueError for what is no text, or none.
    """
    if args.prompt_file not in (None, "-"):
        path = expanded(args.prompt_file)
        name, opened = str(path), path.open("rb")
    elif "-" in (args.prompt_file, args.prompt):
        if sys.stdin is None:
            raise ValueError("there is no standard input to read the instruction from")
        name, opened = "standard input", contextlib.nullcontext(sys.stdin.buffer)
    else:
        return
    with opened as file:
        content = file.read(LONGEST_PROMPT + 1)
    if len(content) > LONGEST_PROMPT:
        raise ValueError(f"{name} holds more than {LONGEST_PROMPT:,} bytes, which is no instruction")
    try:
        args.prompt = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not text in UTF-8: {error}") from None
    if wrong := blank(args):
        raise ValueError(f"{name}: {wrong}")


def refuse_contradictions(args: argparse.Namespace) -> None:
    if wrong := blank(args) or contradiction(args):
        raise ValueError(wrong)


def seeds_of(args: argparse.Namespace) -> list[int]:
    """One per image."""
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    return list(range(seed, seed + (args.num_images or 1)))


def paths_of(
    args: argparse.Namespace, photos: Sequence[Photo], seeds: list[int]
) -> list[list[dict[str, Path]]]:
    """For each photograph, or for none, and each seed the results that are asked for, and where they go.
    Raises as `refuse_files`."""
    extra = [name for system in SYSTEMS for name in system.files if getattr(args, name)]
    many = len(photos) > 1
    found = []
    for photo in [photo.name for photo in photos] or [None]:
        files = {"output": output_paths(args.output, photo, seeds, several=many)}
        for name in extra:
            files[name] = numbered(Path(getattr(args, name)), seeds, photo if many else None)
        found.append(files)
    together = {name: [path for files in found for path in files[name]] for name in ("output", *extra)}
    refuse_files({**together, "preview": preview.path_of(args)}, args.force)
    return [
        [dict(zip(files, each, strict=True)) for each in zip(*files.values(), strict=True)] for files in found
    ]


def system_for(args: argparse.Namespace) -> System:
    """The system of the model; where none is named, the model of the system that is meant.

    Raises ValueError for a model that is not told what to do in its own way, or gets options of another.
    """
    chosen = system_named(args)
    refuse_foreign(args, chosen)
    return chosen


def system_named(args: argparse.Namespace) -> System:
    """The system of the model, whatever it is told."""
    from joyedit.loading.layouts import pipeline_name

    args.model = args.model or next(system for system in SYSTEMS if system.is_meant(args)).model
    pipeline = pipeline_name(args.model, **origin_options(args))
    chosen = system_of(pipeline)
    if chosen is None:
        raise ValueError(f"{args.model} holds a {pipeline}, which this command does not know")
    return chosen


def refuse_foreign(args: argparse.Namespace, chosen: System) -> None:
    """Raises ValueError where the system is not told what to do in its own way, or gets options of another.
    args.model: its model."""
    if args.command not in chosen.commands:
        raise ValueError(f"{args.model} edits photographs here: {chosen.usage}")
    if len(said(args, chosen.texts)) < len(chosen.texts):
        raise ValueError(chosen.untold.format(model=args.model))
    for system in SYSTEMS:
        if system is not chosen and (options := spelt(args, system.options)):
            raise ValueError(system.foreign.format(model=args.model, option=options[0]))
    places.refuse(args, chosen.places, chosen.pipeline)


def refuse_adapters(args: argparse.Namespace) -> None:
    """Raises FileNotFoundError or ValueError for an adapter that cannot be read."""
    from joyedit.checkpoints.lora_files import open_lora

    for name in args.lora or ():
        open_lora(name, None, "", adapter_options(args))


def fill_from_checkpoint(args: argparse.Namespace, system: System) -> "MadeFor":
    """What the model says it was made for, whose settings are taken over where nothing else says them."""
    from joyedit.loading.layouts import read_made_for

    made_for = read_made_for(args.model, **origin_options(args))
    fill_from(made_for, args, system)
    return made_for


def fill_from(made_for: "MadeFor", args: argparse.Namespace, system: System) -> None:
    """Raises ValueError where what is filled in does not go with what is said."""
    for name, value in made_for.call.items():
        if getattr(args, name) is None and name not in system.replaced(args, made_for.call):
            setattr(args, name, value)
    refuse_contradictions(args)


def open_pipeline(args: argparse.Namespace) -> Any:
    from joyedit.loading.layouts import load
    from joyedit.media.images import buckets

    table = None if args.basesize is None else buckets(args.basesize)
    options = said(
        args, ("device", "dtype", "offload", "memory", "reference_quirks", "prediction_type", "preset")
    )
    pipe = load(args.model, **options, **source_options(args), **(args.parts or {}))
    add_adapters(pipe, args)
    if args.parallel is not None:
        pipe.parallelize(**args.parallel)
    if args.graphs:
        pipe.enable_graphs()
    if table is not None:
        pipe.buckets = table
    # Shown on a terminal only (None), unless asked for or against.
    pipe.set_progress_bar_config(disable={-1: True, 0: None}.get(args.verbosity, False))
    return pipe


def add_adapters(pipe: Any, args: argparse.Namespace) -> None:
    """Put the adapters beside the weights or, if that is asked for, into them: nothing here takes them
    out."""
    adapters, scales = args.lora or [], args.lora_scale or [1.0]
    names = [pipe.load_lora_weights(adapter, **adapter_options(args)).name for adapter in adapters]
    if names:
        pipe.set_adapters(names, scales * len(names) if len(scales) == 1 else scales)
    if args.fuse_lora:
        pipe.fuse_lora(adapter_names=names, reversible=False)


def adapter_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"cache_dir": args.cache_dir, "local_files_only": args.offline}


def calls_of(
    told: Sequence[argparse.Namespace],
    system: System,
    pipe: Any,
    photos: Sequence[Photo],
    images: Sequence[Any],
) -> list[dict[str, Any]]:
    """What the pipeline is called with, for each photograph, or once for none. Raises ValueError for one that
    the networks could not see."""
    if not photos:
        return [system.call(pipe, None, told[0])]
    calls = []
    for own, photo, image in zip(told, photos, images, strict=True):
        if len(photos) > 1:
            log.info("photograph %s", photo.name)
        calls.append(system.call(pipe, image, own))
    return calls


def warn_of_no_effect(args: argparse.Namespace, system: System, pipe: Any, call: dict[str, Any]) -> None:
    """One line, where a negative prompt is given and guidance, which looks at it, is off."""
    if not (args.negative_prompt or "").strip():
        return
    if (guidance := system.guidance(pipe, call, args)) <= 1:
        log.warning(
            "--negative-prompt has no effect at guidance %g: give a --guidance-scale above 1", guidance
        )


def warn_of_the_unknown(
    args: argparse.Namespace,
    system: System,
    pipe: Any,
    photos: Sequence[Photo],
    calls: Sequence[dict[str, Any]],
    made_for: "MadeFor",
) -> None:
    """One line, where a model that knows little is given something else. It edits that all the same.

    With an adapter it may know more words than it says.
    """
    from joyedit.loading.layouts import RELEASED
    from joyedit.pipelines.made_for import round_trip

    world = made_for.world
    if world is None:
        return
    real = f"real weights, as in --model {RELEASED[system.pipeline]}"
    if not photos:
        log.warning(
            "%s was made to edit %s, and cannot make a picture from text alone: for that it takes %s",
            args.model,
            world.about,
            real,
        )
        return
    strange = [
        photo.name
        for photo, call in zip(photos, calls, strict=True)
        if round_trip(pipe, system.seen(pipe, call)) < world.psnr
    ]
    pictured = "this photograph" if len(photos) == 1 else f"the photographs {', '.join(strange[:4])}"
    texts = [calls[0][name] for name in system.texts]
    words = ", ".join(shown(word, 40) for word in pipe.unknown_words(texts)[:4])
    if unknown := " and of ".join(filter(None, (pictured if strange else "", words))):
        edits = f"expect little of {unknown}; real edits need {real}"
        log.warning("%s knows only %s: %s", args.model, world.about, edits)
