"""An edit by instruction, or an image from text alone: JoyAI-Image-Edit.

The model has sizes of its own, and its pipeline brings the photograph to the nearest.
"""

import argparse
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from joyedit.command.calls import EVERY_CALL, in_effect, said
from joyedit.command.photos import working_at

if TYPE_CHECKING:
    from PIL.Image import Image

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
    options: Mapping[str, str] = {}
    settings: Mapping[str, type | tuple[type, ...]] = {}
    files: Sequence[str] = ()
    usage: str = "joyedit generate PROMPT"
    untold: str = UNTOLD
    foreign: str = "{option} is for JoyAI-Image-Edit"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """It has those that all have."""

    def is_meant(self, args: argparse.Namespace) -> bool:
        return True

    def misuse(self, args: argparse.Namespace) -> str | None:
        return None

    def contradiction(self, args: argparse.Namespace) -> str | None:
        return None

    def replaced(self, args: argparse.Namespace, source: Mapping[str, Any]) -> Collection[str]:
        return ()

    def prepare(self, photo: "Image", args: argparse.Namespace, made_for: "MadeFor") -> "Image":
        return photo

    def call(self, pipe: Any, photo: "Image | None", args: argparse.Namespace) -> dict[str, Any]:
        from joyedit.media.images import fit_cover

        call = said(args, (*self.texts, *EVERY_CALL, "height", "width"))
        if photo is None:
            return call
        height, width = pipe.choose_size([photo], call.get("height"), call.get("width"))
        if (width, height) != photo.size:
            fit = fit_cover((photo.height, photo.width), (height, width))
            cropped = ", cropped" if (fit.height, fit.width) != (height, width) else ""
            log.info("%s%s", working_at((width, height), photo.size), cropped)
        return {**call, "image": photo}

    def seen(self, pipe: Any, call: Mapping[str, Any]) -> "Image":
        from joyedit.media.images import resize_center_crop

        photo = call["image"]
        return resize_center_crop(photo, *pipe.choose_size([photo], call.get("height"), call.get("width")))

    def run(
        self, pipe: Any, call: Mapping[str, Any], seeds: Sequence[int], args: argparse.Namespace
    ) -> list[dict[str, Any]]:
        """All seeds at once. The generators are the CPU's: the noise of an image depends on nothing else."""
        import torch

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        torch.manual_seed(seeds[0])  # some of the reference's defects draw from the global generator
        images = pipe(**call, generator=generators, num_images_per_prompt=len(seeds)).images
        return [{"output": image} for image in images]

    def guidance(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> float:
        return in_effect(pipe.__call__, call, ("guidance_scale",))["guidance_scale"]

    def facts(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
        return in_effect(pipe.__call__, call, ("num_inference_steps", "guidance_scale"))
