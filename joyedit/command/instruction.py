"""An edit by instruction, or an image from text alone: JoyAI-Image-Edit.

The model has sizes of its own, and its pipeline brings the photograph to the nearest.
"""

import argparse
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from joyedit.command import places, spatial
from joyedit.command.calls import EVERY_CALL, in_effect, merged, said, say_steps, spelt

if TYPE_CHECKING:
    from PIL.Image import Image

    from joyedit.media.geometry import Geometry
    from joyedit.pipelines.made_for import MadeFor

log = logging.getLogger("joyedit")

# Of every model that takes an instruction.
UNTOLD = (
    "{model} edits by instruction, not from --source to --target: say what to do, as in joyedit edit PHOTO "
    "'Make it red.'"
)


class Instruction:
    """See `systems.System`."""

    pipeline: str = "JoyImageEditPipeline"
    model: str = "tiny-joyimage"
    occasion: str = "otherwise"
    commands: Sequence[str] = ("edit", "generate")
    texts: Sequence[str] = ("prompt",)
    options: Mapping[str, str] = spatial.OPTIONS
    settings: Mapping[str, type | tuple[type, ...]] = dict.fromkeys(spatial.OPTIONS, str)
    files: Sequence[str] = ()
    places: Sequence[str] = tuple(places.OPTIONS)
    form: str = "joyimage"
    answers: bool = True
    usage: str = "joyedit generate PROMPT"
    untold: str = UNTOLD
    foreign: str = "{option} is for JoyAI-Image-Edit"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        spatial.add_options(parser)

    def is_meant(self, args: argparse.Namespace) -> bool:
        return True

    def misuse(self, args: argparse.Namespace) -> str | None:
        if args.command == "generate" and (options := spelt(args, spatial.OPTIONS)):
            return f"{options[0]} is for a photograph: joyedit edit PHOTO"
        return None

    def contradiction(self, args: argparse.Namespace) -> str | None:
        try:
            spatial.instruction(args)
        except ValueError as error:
            return str(error)
        return None

    def replaced(self, args: argparse.Namespace, source: Mapping[str, Any]) -> Collection[str]:
        return () if args.prompt is None else tuple(spatial.OPTIONS)  # it is another edit

    def prepare(self, photo: "Image", args: argparse.Namespace, made_for: "MadeFor") -> "Image":
        if args.move is None:
            return photo
        from joyedit.media.spatial import move

        return move(photo, args.move, spatial.box_of(args.box)).image

    def call(self, pipe: Any, photo: "Image | None", args: argparse.Namespace) -> dict[str, Any]:
        call = said(args, (*self.texts, *EVERY_CALL, "height", "width")) | places.call(args)
        if photo is None:
            return call
        geometry = self.geometry(pipe, photo, call)
        if not geometry.photo == geometry.bucket == geometry.size:
            log.info("%s", geometry)
        return {**call, "image": photo}

    def geometry(self, pipe: Any, photo: "Image", call: Mapping[str, Any]) -> "Geometry":
        """How the pipeline brings the photograph to one of its sizes. Raises ValueError where it cannot."""
        from joyedit.media.geometry import covering
        from joyedit.media.images import nearest_bucket
        from joyedit.pipelines.places import Asked

        size = call.get("size")
        if isinstance(size, tuple):
            height, width = size
            bucket = nearest_bucket(height, width, pipe.buckets)
        else:
            bucket = pipe.choose_size([photo], call.get("height"), call.get("width"))
        return Asked(size=size).geometry((photo.height, photo.width), bucket, covering)

    def seen(self, pipe: Any, call: Mapping[str, Any]) -> "Image":
        from joyedit.media.geometry import to_bucket

        return to_bucket(call["image"], self.geometry(pipe, call["image"], call))

    def run(
        self, pipe: Any, call: Mapping[str, Any], seeds: Sequence[int], args: argparse.Namespace
    ) -> list[dict[str, Any]]:
        """All seeds at once. The generators are the CPU's: the noise of an image depends on nothing else."""
        import torch

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        torch.manual_seed(seeds[0])  # some of the reference's defects draw from the global generator
        images = pipe(**call, generator=generators, num_images_per_prompt=len(seeds)).images
        say_steps(pipe, args, pipe.num_timesteps)
        return [{"output": image} for image in images]

    def shape(self, pipe: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        if "image" not in call:
            return pipe.choose_size(None, call.get("height"), call.get("width"))
        return self.geometry(pipe, call["image"], call).bucket

    def run_together(
        self, pipe: Any, calls: Sequence[Mapping[str, Any]], seeds: Sequence[int], args: argparse.Namespace
    ) -> "list[Image]":
        import torch

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        torch.manual_seed(seeds[0])
        images = pipe(**merged(calls), generator=generators).images
        say_steps(pipe, args, pipe.num_timesteps)
        return images

    def guidance(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> float:
        return in_effect(pipe.__call__, call, ("guidance_scale",))["guidance_scale"]

    def facts(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
        facts = in_effect(pipe.__call__, call, ("num_inference_steps", "guidance_scale"))
        return {**facts, **{name: getattr(args, name) for name in self.settings}}
