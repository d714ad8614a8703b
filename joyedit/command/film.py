"""An edit by instruction that is the last frame of a film: ChronoEdit."""

import argparse
import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joyedit.checkpoints.plain_text import shown
from joyedit.command import places
from joyedit.command.calls import EVERY_CALL, merged, said, say_steps, spelt
from joyedit.command.captions import TEXTS as CAPTIONS
from joyedit.command.instruction import UNTOLD
from joyedit.command.photos import resized
from joyedit.command.results import Frames
from joyedit.command.values import finite, place, whole

if TYPE_CHECKING:
    from PIL.Image import Image

    from joyedit.media.geometry import Geometry
    from joyedit.pipelines.made_for import MadeFor

log = logging.getLogger("joyedit")

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webp")
FRAMES, REASONING_FRAMES = 5, 29  # the lengths of films that it was trained on
FPS, MOST_FPS = 16, 1000
# Steps and guidance that it takes by itself, and those of its presets.
PRESETS = {None: (50, 5.0), "distill": (8, 1.0), "upscale": (50, 5.0), "paintbrush": (8, 1.0)}
WORDED = ("upscale",)  # those that say themselves what to do
PHRASED = ("upscale", "paintbrush")  # those with words that their adapters were trained with


def take_over(args: argparse.Namespace) -> None:
    """Put the words of a preset that says itself what to do in the place of the instruction."""
    if args.preset in WORDED and args.prompt is None and args.prompt_file is None:
        from joyedit.pipelines.chronoedit_presets import preset_called

        args.prompt = preset_called(args.preset).prompt


class Film:
    """See `systems.System`."""

    pipeline: str = "ChronoEditPipeline"
    model: str = "tiny-chronoedit"
    occasion: str = "with options of ChronoEdit"
    commands: Sequence[str] = ("edit",)
    texts: Sequence[str] = ("prompt",)
    options: Mapping[str, str] = {
        "num_frames": "--frames",
        "num_temporal_reasoning_steps": "--reasoning-steps",
        "preset": "--preset",
        "video": "--video",
        "fps": "--fps",
    }
    settings: Mapping[str, type | tuple[type, ...]] = {
        "num_frames": int,
        "num_temporal_reasoning_steps": int,
        "preset": str,
        "fps": (int, float),
    }
    files: Sequence[str] = ("video",)
    places: Sequence[str] = tuple(places.OPTIONS)
    form: str = "chronoedit"
    answers: bool = False
    usage: str = "joyedit edit PHOTO INSTRUCTION"
    untold: str = UNTOLD
    foreign: str = (
        "{model} makes no film: {option} is for ChronoEdit, as in --model nvidia/ChronoEdit-14B-Diffusers, "
        "or tiny-chronoedit"
    )

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument_group("for ChronoEdit, whose edit is the last frame of a film").add_argument
        add(
            "--frames",
            type=whole("num_frames"),
            metavar="N",
            dest="num_frames",
            help=f"with --reasoning-steps: length of the film, 1 + 4 k; default {REASONING_FRAMES}, "
            f"and {FRAMES} without",
        )
        add(
            "--reasoning-steps",
            type=whole("num_temporal_reasoning_steps"),
            metavar="K",
            dest="num_temporal_reasoning_steps",
            help="denoise the whole film for K steps, then its first and last frame alone; as many as "
            "--steps: all of it to the end",
        )
        add(
            "--video",
            metavar="FILE",
            type=place,
            help=f"write the film too: {', '.join(VIDEO_SUFFIXES)}, or without a suffix a folder of PNG "
            "files; all but the last two need `pip install joyedit[video]`",
        )
        add("--fps", type=finite, metavar="F", help=f"frames per second of the film, default {FPS}")
        add(
            "--preset",
            choices=tuple(filter(None, PRESETS)),
            help="with its adapter, from lora/ of the checkpoint or a repository of its own: distill, 8 "
            "steps without guidance; upscale, clearer and larger, without an instruction; paintbrush, what "
            "is sketched in black becomes what the instruction names",
        )

    def is_meant(self, args: argparse.Namespace) -> bool:
        return bool(said(args, self.options))

    def misuse(self, args: argparse.Namespace) -> str | None:
        if said(args, CAPTIONS) and (options := spelt(args, self.options)):
            return f"{options[0]} is for ChronoEdit, which takes an instruction, not --source and --target"
        if args.video is not None and Path(args.video).suffix.lower() not in ("", *VIDEO_SUFFIXES):
            known = ", ".join(VIDEO_SUFFIXES)
            ends = f"does not end in {known}, or in nothing for a folder of PNG files"
            return f"argument --video: {shown(args.video, 80)} {ends}"
        if args.fps is not None and args.video is None:
            return "--fps is for the film that --video names"
        return None

    def contradiction(self, args: argparse.Namespace) -> str | None:
        frames, reasoning, preset = args.num_frames, args.num_temporal_reasoning_steps, args.preset
        steps = args.num_inference_steps or PRESETS.get(preset, PRESETS[None])[0]
        if frames is not None and frames != FRAMES and reasoning is None:
            return (
                f"--frames {frames} is for --reasoning-steps: without temporal reasoning there are {FRAMES}"
            )
        if reasoning is not None and reasoning > steps:
            return f"--reasoning-steps {reasoning} is above the {steps} steps that there are (--steps)"
        if args.fps is not None and not 0 < args.fps <= MOST_FPS:
            return f"--fps {args.fps:g} is not above 0, and at most {MOST_FPS}"
        return None

    def replaced(self, args: argparse.Namespace, source: Mapping[str, Any]) -> Collection[str]:
        """A preset brings its own steps and guidance, and a film with reasoning its own length."""
        names = set() if args.preset is None else {"num_inference_steps", "guidance_scale"}
        reasoning = "num_temporal_reasoning_steps"
        if getattr(args, reasoning) is not None and source.get(reasoning) is None:
            names.add("num_frames")
        return names

    def prepare(self, photo: "Image", args: argparse.Namespace, made_for: "MadeFor") -> "Image":
        """The photograph in the size that is asked for, or else in that which the model was made for: without
        a basesize that of ChronoEdit's own examples, which resize it as here. Where --size says how large the
        result is, the pipeline does it."""
        import PIL.Image

        from joyedit.media.images import size_of_area
        from joyedit.pipelines.chronoedit_request import working_area

        if args.basesize:
            made_for = dataclasses.replace(made_for, basesize=args.basesize)
        area = working_area(made_for, args.preset)
        if args.size is not None:
            return photo
        try:
            height, width = size_of_area(photo.height, photo.width, area)
        except ValueError:  # too narrow for any size of that area
            if args.height is None:
                raise
            height, width = args.height, args.width
        size = (width, height) if args.height is None else (args.width, args.height)
        return resized(photo, size, PIL.Image.Resampling.BICUBIC, (width, height))

    def call(self, pipe: Any, photo: "Image | None", args: argparse.Namespace) -> dict[str, Any]:
        assert photo is not None
        reasoning = args.num_temporal_reasoning_steps is not None
        names = (*self.texts, *EVERY_CALL, "num_frames", "num_temporal_reasoning_steps")
        call = {
            "num_frames": REASONING_FRAMES if reasoning else FRAMES,
            "enable_temporal_reasoning": reasoning,
            **said(args, names),
            **places.call(args),
            "image": photo,
        }
        if args.size is not None:
            if args.basesize:
                pipe.made_for = dataclasses.replace(pipe.made_for, basesize=args.basesize)
            log.info("%s", self.geometry(pipe, call))
            return call
        if args.mask:
            call["mask"] = places.mask_at(args.mask.image, photo.size)
        return {**call, "height": photo.height, "width": photo.width}

    def geometry(self, pipe: Any, call: Mapping[str, Any]) -> "Geometry":
        """How the pipeline brings the photograph to the size that it works at, where it is to come back in
        another. Raises ValueError where it cannot."""
        from joyedit.media.geometry import stretched
        from joyedit.media.images import size_of_area
        from joyedit.pipelines.chronoedit_request import working_area
        from joyedit.pipelines.places import Asked

        asked, photo = Asked(size=call["size"]), (call["image"].height, call["image"].width)
        height, width = asked.shape(photo)
        area = working_area(pipe.made_for, pipe.preset)
        return asked.geometry(photo, size_of_area(height, width, area, pipe.size_multiple), stretched)

    def seen(self, pipe: Any, call: Mapping[str, Any]) -> "Image":
        from joyedit.media.geometry import to_bucket

        photo = call["image"]
        return to_bucket(photo, self.geometry(pipe, call)) if "size" in call else photo

    def run(
        self, pipe: Any, call: Mapping[str, Any], seeds: Sequence[int], args: argparse.Namespace
    ) -> list[dict[str, Any]]:
        """For each seed the edit, which is the last frame, and where it is asked for the film."""
        import torch

        films = pipe(
            **call,
            num_videos_per_prompt=len(seeds),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="pil",
            only_last_frame=not args.video,
        ).frames
        say_steps(pipe, args, pipe.num_timesteps)
        fps = args.fps or FPS
        return [{"output": frames[-1], "video": Frames(frames, fps)} for frames in films]

    def shape(self, pipe: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        return self.geometry(pipe, call).bucket if "size" in call else (call["height"], call["width"])

    def run_together(
        self, pipe: Any, calls: Sequence[Mapping[str, Any]], seeds: Sequence[int], args: argparse.Namespace
    ) -> "list[Image]":
        import torch

        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        how = {"output_type": "pil", "only_last_frame": True}
        films = pipe(**merged(calls), generator=generators, **how).frames
        say_steps(pipe, args, pipe.num_timesteps)
        return [frames[-1] for frames in films]

    def guidance(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> float:
        usual = PRESETS.get(args.preset, PRESETS[None])[1]
        return call.get("guidance_scale", usual)

    def facts(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
        """Steps and guidance are the pipeline's: a preset has other defaults than its call."""
        return {
            "num_inference_steps": pipe.num_timesteps,
            "guidance_scale": pipe.guidance_scale,
            "num_frames": call.get("num_frames"),
            "num_temporal_reasoning_steps": call.get("num_temporal_reasoning_steps"),
            "preset": args.preset,
            "fps": args.fps,
        }
