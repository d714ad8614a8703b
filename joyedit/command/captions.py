"""An edit between two captions: DiffEdit on Stable Diffusion, which says by itself where to change what."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from joyedit.command.calls import EVERY_CALL, in_effect, merged, said, say_steps, spelt
from joyedit.command.photos import resized
from joyedit.command.places import mask_at
from joyedit.command.values import above_zero, finite, place, share, whole
from joyedit.pipelines.made_for import CALL

if TYPE_CHECKING:
    from PIL.Image import Image

    from joyedit.pipelines.made_for import MadeFor

TEXTS = ("source_prompt", "target_prompt")
SETTINGS = (
    "inpaint_strength",
    "mask_encode_strength",
    "mask_thresholding_ratio",
    "num_maps_per_mask",
    "invert_guidance_scale",
    "composite",
)
FILES = ("mask_out", "grid")


class Captions:
    """See `systems.System`."""

    pipeline: str = "StableDiffusionDiffEditPipeline"
    model: str = "tiny-diffedit"
    occasion: str = "between captions"
    commands: Sequence[str] = ("edit",)
    texts: Sequence[str] = TEXTS
    options: Mapping[str, str] = {name: f"--{name.replace('_', '-')}" for name in (*SETTINGS, *FILES)}
    settings: Mapping[str, type | tuple[type, ...]] = {name: CALL[name] for name in SETTINGS}
    files: Sequence[str] = FILES
    places: Sequence[str] = ("mask",)
    form: str = ""
    answers: bool = False
    usage: str = "joyedit edit PHOTO --source TEXT --target TEXT"
    untold: str = (
        "{model} takes no instruction: say what the photograph shows and what it shall show, as in "
        "joyedit edit PHOTO --source 'a bowl of fruits' --target 'a bowl of pears'"
    )
    foreign: str = "{option} is for --source and --target, not for an instruction"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("instead of an INSTRUCTION, for Stable Diffusion").add_argument
        add("--source", dest="source_prompt", metavar="TEXT", help="what the photograph shows")
        add("--target", dest="target_prompt", metavar="TEXT", help="what it shall show")
        add(
            "--mask-out",
            metavar="FILE",
            type=place,
            help="write where the change is allowed: white is repainted",
        )
        add(
            "--grid",
            metavar="FILE",
            type=place,
            help="write photograph, mask in red on it, and result side by side",
        )
        add("--inpaint-strength", type=share, metavar="S", help="how much noise to repaint from, 0 to 1")
        add(
            "--mask-encode-strength",
            type=share,
            metavar="S",
            help="how much noise to find the mask in, 0 to 1",
        )
        add(
            "--mask-thresholding-ratio",
            type=above_zero,
            metavar="R",
            help="how far above the mean a change must be: larger, and the mask is smaller",
        )
        add(
            "--num-maps-per-mask",
            type=whole("num_maps_per_mask"),
            metavar="N",
            help="noises that the mask is averaged over",
        )
        add(
            "--invert-guidance-scale",
            type=finite,
            metavar="G",
            help="guidance of the way back to noise; 1, the default, reconstructs best",
        )
        add(
            "--composite",
            action=argparse.BooleanOptionalAction,
            help="paste the photograph's own pixels back outside the mask",
        )

    def is_meant(self, args: argparse.Namespace) -> bool:
        return args.source_prompt is not None

    def misuse(self, args: argparse.Namespace) -> str | None:
        captions = said(args, self.texts)
        if captions and args.prompt is not None:
            return "give an instruction or --source and --target, not both: a model takes one of them"
        if len(captions) == 1 and args.config_from is None:
            return "give both --source and --target, or neither"
        if captions and args.rewrite is not None:
            return "--rewrite is for an instruction, not for --source and --target"
        if args.prompt is not None and (options := spelt(args, self.options)):
            return self.foreign.format(option=options[0])
        return None

    def contradiction(self, args: argparse.Namespace) -> str | None:
        return None

    def replaced(self, args: argparse.Namespace, source: Mapping[str, Any]) -> Collection[str]:
        return ()

    def prepare(self, photo: "Image", args: argparse.Namespace, made_for: "MadeFor") -> "Image":
        """As it is: the size depends on the network, see `call`."""
        return photo

    def call(self, pipe: Any, photo: "Image | None", args: argparse.Namespace) -> dict[str, Any]:
        assert photo is not None
        call = said(args, (*self.texts, *EVERY_CALL, *self.settings))
        image = working_copy(photo, args, trained_side(pipe))
        if args.mask:
            latents = (image.width // pipe.vae_scale_factor, image.height // pipe.vae_scale_factor)
            call["mask_image"] = mask_at(args.mask.image, latents)
        return {**call, "image": image}

    def seen(self, pipe: Any, call: Mapping[str, Any]) -> "Image":
        return call["image"]

    def run(
        self, pipe: Any, call: Mapping[str, Any], seeds: Sequence[int], args: argparse.Namespace
    ) -> list[dict[str, Any]]:
        """One seed after the other; the mask comes in the size of the result."""
        import torch

        from joyedit.media.images import make_image_grid
        from joyedit.media.masks import mask_overlay, to_mask_images

        made = []
        for seed in seeds:
            (result,), _, mask, _ = pipe.edit(**call, generator=torch.Generator("cpu").manual_seed(seed))
            say_steps(pipe, args, 2 * pipe.num_timesteps)  # of inversion and of denoising
            (white,) = to_mask_images(torch.from_numpy(mask))
            white = white.resize(result.size, 0)  # 0: the nearest pixel
            shown = [call["image"], mask_overlay(call["image"], white), result]
            made.append({"output": result, "mask_out": white, "grid": make_image_grid(shown, 1, 3)})
        return made

    def shape(self, pipe: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        return call["image"].height, call["image"].width

    def run_together(
        self, pipe: Any, calls: Sequence[Mapping[str, Any]], seeds: Sequence[int], args: argparse.Namespace
    ) -> "list[Image]":
        import torch

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images, *_ = pipe.edit(**merged(calls), generator=generators)
        say_steps(pipe, args, 2 * pipe.num_timesteps)
        return images

    def guidance(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> float:
        names = ("guidance_scale", "invert_guidance_scale")
        return max(in_effect(pipe.edit, call, names).values())

    def facts(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
        return in_effect(pipe.edit, call, ("num_inference_steps", "guidance_scale", *self.settings))


def trained_side(pipe: Any) -> int:
    """The edge of the square pictures that the UNet of a Stable Diffusion was trained on."""
    size = pipe.unet.config.sample_size or 64
    return (size if isinstance(size, int) else min(size)) * pipe.vae_scale_factor


def working_copy(photo: "Image", args: argparse.Namespace, side: int) -> "Image":
    """The photograph in the size that is asked for, or else in its own, up to as many pixels as `side`
    squared."""
    import PIL.Image

    own = own_size(photo, args.basesize, side)
    size = own if args.height is None else (args.width, args.height)
    return resized(photo, size, PIL.Image.Resampling.LANCZOS, own)


def own_size(photo: "Image", basesize: int | None, side: int) -> tuple[int, int]:
    """Width and height of about the photograph's shape: its own, up to `side` squared, or about `basesize`
    squared."""
    scale = (basesize or side) / (photo.width * photo.height) ** 0.5
    scale = scale if basesize else min(scale, 1)
    width, height = (max(int(edge * scale) // 8 * 8, 8) for edge in photo.size)
    return width, height
