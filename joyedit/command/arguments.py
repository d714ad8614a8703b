"""The arguments of the command line, and what they may be.

Nothing heavy is imported here, so `--help`, `--version` and a misspelt option are quick.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from joyedit import __version__

DEFAULT_MODEL, CAPTION_MODEL, FILM_MODEL = "tiny-joyimage", "tiny-diffedit", "tiny-chronoedit"
DEMO_FOLDER = "joyedit-demo"
OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webp")
DTYPES = ("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
LARGEST_SEED = 2**63 - 1
FRAMES, REASONING_FRAMES = 5, 29  # the lengths of films that ChronoEdit was trained on
FPS, MOST_FPS = 16, 1000
PRESETS = {None: (50, 5.0), "distill": (8, 1.0)}  # steps and guidance that ChronoEdit takes by itself

# What only an edit between two captions knows: what is said, what of its pipeline is set, what else is
# written.
CAPTIONS = ("source_prompt", "target_prompt")
CAPTION_SETTINGS = tuple(
    """
    inpaint_strength mask_encode_strength mask_thresholding_ratio num_maps_per_mask invert_guidance_scale
    composite
    """.split()
)
SIDE_OUTPUTS = ("mask_out", "grid")

# What only an edit that is a film knows, and how its options are called.
FILM_OPTIONS = {
    "num_frames": "--frames",
    "num_temporal_reasoning_steps": "--reasoning-steps",
    "preset": "--preset",
    "video": "--video",
    "fps": "--fps",
}
FILM_SETTINGS = ("num_frames", "num_temporal_reasoning_steps")


def parse(argv: Sequence[str] | None, commands: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments; `run` among them is the command's function from `commands`.

    Raises SystemExit(2), with the reason on standard error, for wrong ones.
    """
    args, left = build_parser(commands).parse_known_args(argv)
    if len(left) == 1 and not left[0].startswith("-") and getattr(args, "prompt", "") is None:
        args.prompt = left.pop()  # before Python 3.12.7 argparse loses it when an option follows PHOTO
    if left:
        args.parser.error(f"unrecognized arguments: {' '.join(left)}")
    if "num_images" in args:
        check_images(args)
    return args


def check_images(args: argparse.Namespace) -> None:
    """Ends the program for options of `edit` and `generate` that contradict each other."""
    error = args.parser.error
    captions = [vars(args).get(name) is not None for name in CAPTIONS]
    if any(captions) and args.prompt is not None:
        error("give an instruction or --source and --target, not both: a model takes one of them")
    if any(captions) and not all(captions) and args.config_from is None:
        error("give both --source and --target, or neither")
    if args.prompt is None and not any(captions) and args.config_from is None:
        hint = "" if args.command == "generate" else " (Stable Diffusion takes --source and --target)"
        error(f"say what to do: an instruction or prompt is missing{hint}, and there is no --config-from")
    if args.prompt is not None:
        for name in (*CAPTION_SETTINGS, *SIDE_OUTPUTS):
            if vars(args).get(name) is not None:
                error(f"--{name.replace('_', '-')} is for --source and --target, not for an instruction")
    film = [option for name, option in FILM_OPTIONS.items() if vars(args).get(name) is not None]
    if film and any(captions):
        error(f"{film[0]} is for ChronoEdit, which takes an instruction, not --source and --target")
    check_film(args)
    if (args.height is None) != (args.width is None):
        error("give both --height and --width, or neither")
    for name in ("output", *SIDE_OUTPUTS):
        path = vars(args).get(name)
        folder = name == "output" and path and Path(path).is_dir()
        if path and not folder and not path.lower().endswith(OUTPUT_SUFFIXES):
            option = "-o/--output" if name == "output" else f"--{name.replace('_', '-')}"
            choice = "is neither a folder nor ends" if name == "output" else "does not end"
            error(f"argument {option}: {path!r} {choice} in {', '.join(OUTPUT_SUFFIXES)}")


def check_film(args: argparse.Namespace) -> None:
    """Ends the program for options of a film and of adapters that contradict each other."""
    error, video = args.parser.error, vars(args).get("video")
    if video is not None and Path(video).suffix.lower() not in ("", *VIDEO_SUFFIXES):
        known = ", ".join(VIDEO_SUFFIXES)
        error(f"argument --video: {video!r} does not end in {known}, or in nothing for a folder of PNG files")
    if vars(args).get("fps") is not None and video is None:
        error("--fps is for the film that --video names")
    if args.config_from is None and (wrong := contradiction(args)):
        error(wrong)


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with options of a film and of adapters together, once all are known."""
    frames, reasoning, preset, fps = (vars(args).get(name) for name in (*FILM_SETTINGS, "preset", "fps"))
    said = {"--steps": args.num_inference_steps, "--guidance-scale": args.guidance_scale}
    for (option, value), usual in zip(said.items(), PRESETS[None], strict=True):
        if preset is not None and value == usual:  # the pipeline cannot tell it from its default
            return f"{option} {value:g} is what --preset {preset} replaces: leave out one of them"
    steps = args.num_inference_steps or PRESETS.get(preset, PRESETS[None])[0]
    if frames is not None and frames != FRAMES and reasoning is None:
        return f"--frames {frames} is for --reasoning-steps: without temporal reasoning there are {FRAMES}"
    if reasoning is not None and reasoning > steps:
        return f"--reasoning-steps {reasoning} is above the {steps} steps that there are (--steps)"
    if fps is not None and not 0 < fps <= MOST_FPS:
        return f"--fps {fps:g} is not above 0, and at most {MOST_FPS}"
    if args.lora_scale is not None and args.lora is None:
        return "--lora-scale is for the adapter that --lora names"
    return None


def build_parser(functions: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="joyedit", description="Edit images by instruction.")
    parser.add_argument("--version", action="version", version=f"joyedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, parents=[*parents, verbosity_options()])
        made.set_defaults(run=functions[name], command=name, parser=made)
        return made

    made = command(
        "edit",
        "edit a photograph as an instruction says, or from one caption to another",
        caption_options(),
        film_options(),
        image_options(),
        *part_options(),
    )
    made.add_argument("photo", metavar="PHOTO", help="path or http(s) URL of the photograph")
    made.add_argument("prompt", metavar="INSTRUCTION", nargs="?", help="what to change")

    made = command("generate", "make an image from text", image_options(), *part_options())
    made.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to show")

    made = command("demo", "edit drawn scenes with the built-in models, and show it in one picture")
    made.add_argument(
        "--out", metavar="FOLDER", default=DEMO_FOLDER, help=f"folder to write, default: {DEMO_FOLDER}"
    )
    made.add_argument("--force", action="store_true", help="replace files that are there already")

    made = command("convert", "write a checkpoint in another layout or dtype", *part_options())
    made.add_argument("source", metavar="SRC", help="folder, weight file or Hub name of the checkpoint")
    made.add_argument("target", metavar="DST", help="folder to write")
    made.add_argument(
        "--to", choices=("diffusers", "original", "comfyui"), default="diffusers", help="default: diffusers"
    )
    made.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES[:4])} (as stored)")
    made.add_argument("--force", action="store_true", help="replace a checkpoint that is there already")

    made = command(
        "info",
        "what a checkpoint holds, how an image was made, or (without TARGET) what this installation is",
        file_options(),
    )
    made.add_argument(
        "target", metavar="TARGET", nargs="?", help="folder, weight file, Hub name, or a PNG made here"
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    return parser


def caption_options() -> argparse.ArgumentParser:
    """Options of an edit between two captions (DiffEdit), which says by itself where to change what."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("instead of an INSTRUCTION, for Stable Diffusion").add_argument
    add("--source", dest="source_prompt", metavar="TEXT", help="what the photograph shows")
    add("--target", dest="target_prompt", metavar="TEXT", help="what it shall show")
    add("--mask-out", metavar="FILE", help="write where the change is allowed: white is repainted")
    add("--grid", metavar="FILE", help="write photograph, mask in red on it, and result side by side")
    add("--inpaint-strength", type=share, metavar="S", help="how much noise to repaint from, 0 to 1")
    add("--mask-encode-strength", type=share, metavar="S", help="how much noise to find the mask in, 0 to 1")
    add(
        "--mask-thresholding-ratio",
        type=above_zero,
        metavar="R",
        help="how far above the mean a change must be: larger, and the mask is smaller",
    )
    add("--num-maps-per-mask", type=positive, metavar="N", help="noises that the mask is averaged over")
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
    return parser


def film_options() -> argparse.ArgumentParser:
    """Options of an edit that is the last frame of a film (ChronoEdit)."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("for ChronoEdit, whose edit is the last frame of a film").add_argument
    add(
        "--frames",
        type=positive,
        metavar="N",
        dest="num_frames",
        help=f"with --reasoning-steps: length of the film, 1 + 4 k; default {REASONING_FRAMES}, "
        f"and {FRAMES} without",
    )
    add(
        "--reasoning-steps",
        type=count,
        metavar="K",
        dest="num_temporal_reasoning_steps",
        help="denoise the whole film for K steps, then its first and last frame alone; as many as --steps: "
        "all of it to the end",
    )
    add(
        "--video",
        metavar="FILE",
        help=f"write the film too: {', '.join(VIDEO_SUFFIXES)}, or without a suffix a folder of PNG files; "
        "all but the last two need `pip install joyedit[video]`",
    )
    add("--fps", type=finite, metavar="F", help=f"frames per second of the film, default {FPS}")
    add(
        "--preset",
        choices=tuple(filter(None, PRESETS)),
        help="8 steps without guidance, with the adapter in lora/ of the checkpoint",
    )
    return parser


def image_options() -> argparse.ArgumentParser:
    """Options of the commands that make images. Those of the picture default to what the pipeline says."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("the image").add_argument
    add(
        "-o",
        "--output",
        metavar="OUT",
        help="file to write (.png, .jpg, .webp) or a folder; default: PHOTO-edit-SEED.png",
    )
    add(
        "--seed",
        type=seed_number,
        help="seed of the first image, the next ones count up; default: a random one",
    )
    add("--num-images", type=positive, metavar="N", help="how many images, default 1")
    add(
        "--steps",
        type=positive,
        metavar="N",
        dest="num_inference_steps",
        help="denoising steps; default: what the model was made for",
    )
    add(
        "--guidance-scale",
        type=finite,
        metavar="G",
        help="how closely to follow the text; 1 turns guidance off",
    )
    add("--negative-prompt", metavar="TEXT", help="what to avoid")
    add(
        "--height",
        type=pixels,
        help="with --width: the nearest size that the model knows is used; by ChronoEdit and between "
        "captions, this size",
    )
    add("--width", type=pixels)
    add(
        "--basesize",
        type=int,
        choices=(256, 512, 768, 1024),
        help="work in sizes of about this edge squared; if not given, in those that the model was made for: "
        "ChronoEdit takes as many pixels as 1280 x 720 have, an edit between captions the photograph's own "
        "size up to that of the model's training (Stable Diffusion 1.x 512 squared, 2.x 768 squared)",
    )
    add("--config-from", metavar="PNG", help="take every option that is not given from an image made here")
    add(
        "--no-metadata", action="store_false", dest="metadata", help="do not record the parameters in the PNG"
    )
    add("--force", action="store_true", help="replace files that are there already")
    add = parser.add_argument_group("the model").add_argument
    add(
        "-m",
        "--model",
        metavar="NAME",
        help=f"folder, weight file or Hub name; default: {DEFAULT_MODEL}, between captions {CAPTION_MODEL}, "
        f"with options of ChronoEdit {FILM_MODEL}",
    )
    add("--lora", metavar="NAME", help="adapter to run with: file, folder or Hub name")
    add("--lora-scale", type=finite, metavar="S", help="strength of the adapter, default 1")
    add("--device", metavar="DEVICE", help="auto (an accelerator if there is one), cpu, cuda, cuda:1, mps")
    add(
        "--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES[:4])}; default: auto (as stored)"
    )
    add(
        "--offload",
        choices=("none", "model", "sequential"),
        help="keep the networks in main memory and bring one, or one block, at a time to the accelerator",
    )
    add(
        "--reference-quirks",
        action=argparse.BooleanOptionalAction,
        help="repeat the defects of the reference implementation",
    )
    return parser


def file_options() -> argparse.ArgumentParser:
    """Where a checkpoint's files are."""
    parser = argparse.ArgumentParser(add_help=False)
    add = parser.add_argument_group("its files").add_argument
    add("--revision", help="branch, tag or commit of a Hub repository")
    add("--variant", help="files of this variant, such as fp16")
    add("--cache-dir", metavar="DIR", help="where downloads are kept")
    add("--offline", action="store_true", help="use only what is on this disk")
    return parser


def part_options() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """`file_options`, and parts from elsewhere."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--part",
        action=PartAction,
        dest="parts",
        metavar="NAME=PATH",
        help="take one part (vae, processor, ...) from another folder, file or Hub name; may be repeated",
    )
    parser.add_argument(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="of a single file of Stable Diffusion 2.x, which does not say what its network predicts",
    )
    return file_options(), parser


def verbosity_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.set_defaults(verbosity=0)
    parser.add_argument(
        "-q", "--quiet", action="store_const", const=-1, dest="verbosity", help="show errors only"
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_const",
        const=1,
        dest="verbosity",
        help="show everything, and tracebacks",
    )
    return parser


class PartAction(argparse.Action):
    """Collects NAME=PATH in a dict."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name, found, path = values.partition("=")
        if not found or not name.isidentifier() or not path:
            raise argparse.ArgumentError(self, f"{values!r} is not of the form NAME=PATH")
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), name: path})


def positive(text: str) -> int:
    return whole_number(text, 1, 10**9)


def count(text: str) -> int:
    return whole_number(text, 0, 10**9)


def share(text: str) -> float:
    value = finite(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


def above_zero(text: str) -> float:
    value = finite(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def seed_number(text: str) -> int:
    return whole_number(text, 0, LARGEST_SEED)


def pixels(text: str) -> int:
    value = whole_number(text, 16, 10**6)
    if value % 16:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 16")
    return value


def whole_number(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not within {low} and {high}")
    return value


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return value
