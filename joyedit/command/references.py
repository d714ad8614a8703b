"""An edit by instruction with several pictures: JoyAI-Image-Edit-Plus.

The photograph is the first reference, and those of --reference follow in their order. A result records them
by name and SHA-256, and `--config-from` finds the files that have these.
"""

import argparse
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from joyedit.command.calls import EVERY_CALL, said, say_steps
from joyedit.command.captions import TEXTS as CAPTIONS
from joyedit.command.instruction import Instruction
from joyedit.command.photos import Photo, read_again

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger("joyedit")

MOST_REFERENCES = 6  # as the pipeline takes; its module loads torch
RELEASED = "--model jdopensource/JoyAI-Image-Edit-Plus-Diffusers"


class References(Instruction):
    """See `systems.System`."""

    pipeline: str = "JoyImageEditPlusPipeline"
    model: str = ""
    occasion: str = "with --reference"
    options: Mapping[str, str] = {"references": "--reference"}
    settings: Mapping[str, type | tuple[type, ...]] = {"references": dict}
    places: Sequence[str] = ()
    foreign: str = f"{{model}} takes one picture: {{option}} is for JoyAI-Image-Edit-Plus, as in {RELEASED}"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument_group("for JoyAI-Image-Edit-Plus, which takes several pictures").add_argument(
            "--reference",
            metavar="FILE",
            action="append",
            dest="references",
            help="another picture (path or URL) that the instruction speaks of; may be repeated: up to "
            f"{MOST_REFERENCES} with the photograph, which is the first. The result has the shape of the "
            "last, or --height and --width as they are",
        )

    def is_meant(self, args: argparse.Namespace) -> bool:
        return bool(args.references)

    def misuse(self, args: argparse.Namespace) -> str | None:
        if args.references and said(args, CAPTIONS):
            return "--reference goes with an instruction, not with --source and --target"
        return None

    def contradiction(self, args: argparse.Namespace) -> str | None:
        if not args.references:
            return None
        count = len(args.references) + (args.photos is not None)
        if count > MOST_REFERENCES:
            return f"{count} pictures, the photograph and each --reference: at most {MOST_REFERENCES} go in"
        if args.model is None:
            return f"--reference is for JoyAI-Image-Edit-Plus: name its checkpoint, as in {RELEASED}"
        return None

    def call(self, pipe: Any, photo: "Image | None", args: argparse.Namespace) -> dict[str, Any]:
        from joyedit.media.images import fit_cover

        call = said(args, (*self.texts, *EVERY_CALL, "height", "width"))
        pictures = [photo] if photo is not None else []
        pictures += [reference.image for reference in args.references or ()]
        if not pictures:
            return call
        for picture in pictures:
            fit_cover((picture.height, picture.width), pipe.bucket_of(picture))  # raises for a stripe
        height, width = pipe.choose_size(pictures, call.get("height"), call.get("width"))
        log.info("making %d x %d pixels of %d pictures", width, height, len(pictures))
        return {**call, "images": pictures}

    def seen(self, pipe: Any, call: Mapping[str, Any]) -> "Image":
        from joyedit.media.images import resize_center_crop

        photo = call["images"][0]
        return resize_center_crop(photo, *pipe.bucket_of(photo))

    def run(
        self, pipe: Any, call: Mapping[str, Any], seeds: Sequence[int], args: argparse.Namespace
    ) -> list[dict[str, Any]]:
        """All seeds at once, as prompts of one batch."""
        import torch

        several: dict[str, Any] = {**call, "prompt": [call["prompt"]] * len(seeds)}
        if "images" in call:
            several["images"] = [call["images"]] * len(seeds)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images = pipe(**several, generator=generators).images
        say_steps(pipe, args, pipe.num_timesteps)
        return [{"output": image} for image in images]

    def shape(self, pipe: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        return pipe.choose_size(call.get("images"), call.get("height"), call.get("width"))

    def facts(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
        references = [reference.facts for reference in args.references or ()]
        return {**super().facts(pipe, call, args), "references": references or None}


def open_references(args: argparse.Namespace) -> list[Photo] | None:
    """The pictures of `args.references`: paths and URLs of the command line, or names and SHA-256 as a result
    records them. Raises as `photos.read_again`."""
    if args.references is None:
        return None
    remedy = "name all references with --reference"
    return [read_again(reference, args, "reference", remedy) for reference in args.references]
