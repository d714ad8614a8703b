"""What an image records of its making, and what `--config-from` takes over of it.

The record is JSON in the PNG (`media/images.py`). Its names are those of the arguments; what is the same for
all systems stands here, and what one alone knows in its own file.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from joyedit import __version__
from joyedit.checkpoints.plain_text import shown, visible
from joyedit.command import places, several
from joyedit.command.calls import origin_options, said
from joyedit.command.photos import Photo
from joyedit.command.rewrite import RECORDED
from joyedit.command.systems import SYSTEMS, System, system_of
from joyedit.pipelines.made_for import CALL

log = logging.getLogger("joyedit")

# What is taken over, whatever the system: arguments, and their types in JSON.
REPEATED: dict[str, type | tuple[type, ...]] = {
    **RECORDED,
    "negative_prompt": CALL["negative_prompt"],
    "seed": int,
    "num_inference_steps": CALL["num_inference_steps"],
    "guidance_scale": CALL["guidance_scale"],
    "step_cache": (int, float),
    "lora": str,
    "lora_scale": (int, float),
    "fuse_lora": bool,
    "height": int,
    "width": int,
    "basesize": int,
    "mask": dict,
    "size": str,
    "match_colors": bool,
    "model": str,
    "revision": str,
    "variant": str,
    "parts": dict,
    "dtype": str,
    "device": str,
    "prediction_type": str,
    "reference_quirks": bool,
}

# Those of which there may be several: recorded as a list, or one as itself.
SEVERAL = ("lora", "lora_scale", "references")


def facts_of_run(
    args: argparse.Namespace, system: System, pipe: Any, call: dict[str, Any], photo: Photo | None
) -> dict[str, Any]:
    """What the image's metadata says about the run; the first part is what `--config-from` repeats."""
    import torch

    from joyedit.checkpoints.hub import Origin
    from joyedit.loading.layouts import BUILT_IN

    revision = None
    if args.model not in BUILT_IN and not Path(args.model).exists():
        revision = Origin(args.model, args.revision, cache_dir=args.cache_dir, local_files_only=True).commit
    repeated = {
        **{name: getattr(args, name) for name in (*system.texts, *RECORDED)},
        "negative_prompt": args.negative_prompt,
        **system.facts(pipe, call, args),
        "step_cache": args.step_cache,
        "basesize": args.basesize,
        **places.facts(args),
        "model": args.model,
        "revision": revision,
        "variant": args.variant,
        "parts": args.parts,
        "lora": one_or_several(args.lora),
        "lora_scale": one_or_several(args.lora_scale),
        "fuse_lora": args.fuse_lora,
        "dtype": args.dtype or "auto",
        "device": pipe.device.type,
        "prediction_type": args.prediction_type,
        "reference_quirks": bool(args.reference_quirks),
    }
    circumstances = {
        "input": None if photo is None else photo.facts,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "weights_dtype": str(pipe.dtype).removeprefix("torch."),
        "offload": args.offload,
        "memory": args.memory,
        "graphs": args.graphs,
        "parallel": several.spelt(args),
        "preview": None if args.preview is None else Path(args.preview).name,
        "version": __version__,
        "torch": torch.__version__,
    }
    return {name: value for name, value in (repeated | circumstances).items() if value is not None}


def one_or_several(values: Sequence[Any] | None) -> Any:
    """As it is recorded: one as itself, as versions did that knew no more than one."""
    return values[0] if values is not None and len(values) == 1 else values


def fill_from_image(args: argparse.Namespace, photos: Sequence[Photo] | None) -> None:
    """Take over what `args.config_from` records, where the command line says nothing itself. photos: None
    for those of a batch, which nobody takes for the recorded one.

    Raises ValueError for a file without such a record, or with one that is damaged.
    """
    from joyedit.media.images import read_metadata
    from joyedit.pipelines.placement import accelerator_device

    recorded = read_metadata(args.config_from)
    kinds = kinds_taken_over(args, recorded)
    before = recorded.get("input", {})
    if not isinstance(before, dict):
        raise ValueError(f"{args.config_from}: the recorded input is damaged: {shown(before)}")
    digests = [one.facts["sha256"] for one in photos or ()] or [None]
    if any(before.get("sha256") != digest for digest in digests):
        if photos is not None:
            name, said_of = visible(str(before.get("name", "none")), 80), args.config_from
            log.warning("%s was made from another photograph (%s): expect another result", said_of, name)
        # The shape of the photograph at hand decides, and its mask is another.
        kinds = without(kinds, ("height", "width", "mask"))
    for name, kind in kinds.items():
        value = recorded.get(name)
        if value is None or getattr(args, name) is not None:
            continue
        listed = name in SEVERAL
        values = value if listed and isinstance(value, list) else [value]
        if not values or not all(fits(one, kind) for one in values):
            raise ValueError(f"{args.config_from}: the recorded {name} is damaged: {shown(value)}")
        if name == "device" and value not in ("cpu", getattr(accelerator_device(), "type", "cpu")):
            here = "the recorded device (%s) is not here: the result will differ by rounding"
            log.warning(here, visible(str(value), 40))
            continue
        setattr(args, name, list(values) if listed else value)
    if all(len(said(args, system.texts)) < len(system.texts) for system in SYSTEMS):
        raise ValueError(f"{args.config_from} records no prompt: give one")


def kinds_taken_over(
    args: argparse.Namespace, recorded: dict[str, Any]
) -> dict[str, type | tuple[type, ...]]:
    """The arguments that the record may fill, and their types: not what no longer fits what is said."""
    kinds = dict(REPEATED)
    told = [system for system in SYSTEMS if said(args, system.texts)]
    if told:
        kinds = without(kinds, RECORDED)  # they are about another prompt
    for system in told or SYSTEMS:
        if args.command in system.commands:
            kinds |= {**dict.fromkeys(system.texts, str), **system.settings}
    for system in SYSTEMS:
        kinds = without(kinds, system.replaced(args, recorded))
    kinds = without(kinds, places.left_out(args, recorded))
    if args.lora is not None and args.lora != recorded.get("lora") and [recorded.get("lora")] != args.lora:
        kinds = without(kinds, ("lora_scale",))  # it is that of another adapter
    if args.model is None:
        return kinds
    return without(kinds, belonging_to_the_recorded_model(args, recorded))


def belonging_to_the_recorded_model(args: argparse.Namespace, recorded: dict[str, Any]) -> list[str]:
    """Arguments that say nothing to the model that is named instead."""
    from joyedit.loading.layouts import pipeline_name

    names = ["revision", "variant", "parts", "prediction_type"]
    chosen = system_of(pipeline_name(args.model, **origin_options(args)))
    names += [] if chosen is None else [name for name in places.OPTIONS if name not in chosen.places]
    maker, lora = recorded.get("pipeline"), recorded.get("lora")
    system = system_of(maker)
    own = [] if system is None else [*system.settings]
    if (own or lora is not None) and maker != pipeline_name(args.model, **origin_options(args)):
        names += [*own, "lora", "lora_scale", "fuse_lora"]
        if lora is not None and args.lora is None:
            log.warning("the recorded adapter (%s) is for a %s: it is left out", visible(str(lora)), maker)
    return names


def fits(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether a recorded value is of its type; no bool is a number, nor is infinity one to compute with."""
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, dict):
        return kind is dict and all(isinstance(text, str) for text in value.values())
    if kind == (int, float) and isinstance(value, kind):
        return abs(value) < sys.float_info.max
    return isinstance(value, kind)


def without(kinds: dict[str, Any], names: Any) -> dict[str, Any]:
    return {name: kind for name, kind in kinds.items() if name not in names}
