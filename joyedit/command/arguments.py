"""The arguments of the command line, but for what one system alone knows, which is in its own file
(`systems.py`).

Nothing heavy is imported here, so `--help`, `--version` and a misspelt option are quick.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from joyedit import __version__
from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import shown
from joyedit.command import ask, devices, estimate, film, places, preview, rewrite, several, spatial, train
from joyedit.command.parsing import Parser, take_in_question, take_in_words
from joyedit.command.results import OUTPUT_SUFFIXES
from joyedit.command.systems import SYSTEMS
from joyedit.command.values import LIMITS, MOST_PIXELS, beyond, finite, from_zero, pixels, place, whole
from joyedit.pipelines import together

DEMO_FOLDER = "joyedit-demo"
MAKING = ("edit", "generate")  # the commands that make pictures


def parse(argv: Sequence[str] | None, commands: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments; `run` among them is the command's function from `commands`.

    Raises SystemExit(2), with the reason on standard error, for wrong ones.
    """
    args, left = build_parser(commands).parse_known_args(argv)
    take_in = take_in_question if args.command == "ask" else take_in_words
    if wrong := take_in(args, left):
        args.parser.error(wrong)
    if args.command in MAKING and (wrong := misuse(args)):
        args.parser.error(wrong)
    return args


def misuse(args: argparse.Namespace) -> str | None:
    """What is wrong with the options of `edit` and `generate` as they stand on the command line."""
    if wrong := spatial.take_over(args):
        return wrong
    film.take_over(args)
    texts = {name for system in SYSTEMS for name in system.texts}
    told = any(getattr(args, name) is not None for name in texts) or args.prompt_file is not None
    if args.config_from is None and not told:
        hint = "" if args.command == "generate" else " (Stable Diffusion takes --source and --target)"
        return f"say what to do: an instruction or prompt is missing{hint}, and there is no --config-from"
    if args.prompt_file is not None and any(getattr(args, name) is not None for name in texts):
        return "--prompt-file holds what to do: give no instruction, --source or --target beside it"
    if wrong := blank(args):
        return wrong
    for system in SYSTEMS:
        if wrong := system.misuse(args):
            return wrong
    if wrong := places.misuse(args):
        return wrong
    if args.config_from is None and (wrong := contradiction(args)):
        return wrong
    if wrong := rewrite.misuse(args):
        return wrong
    if wrong := several.misuse(args):
        return wrong
    if (args.height is None) != (args.width is None):
        return "give both --height and --width, or neither"
    if args.graphs and not has_graphs():
        return "--graphs needs a CUDA or ROCm device, and PyTorch finds none here"
    files = [name for system in SYSTEMS for name in system.files]
    for name in ("output", "preview", *files):
        if name == "video":  # no picture: its system knows what it may be
            continue
        path = getattr(args, name)
        if not path:
            continue
        option = "-o/--output" if name == "output" else f"--{name.replace('_', '-')}"
        try:
            folder = name == "output" and os.path.isdir(expanded(path))  # `is_dir` raises for long names
        except ValueError as error:
            return f"argument {option}: {error}"
        if not folder and Path(path).suffix.lower() not in OUTPUT_SUFFIXES:
            choice = "is neither a folder nor ends" if name == "output" else "does not end"
            if Path(path).name.lower() in OUTPUT_SUFFIXES:
                choice = "has no name before its ending: a file's name ends"
            return f"argument {option}: {shown(path, 80)} {choice} in {', '.join(OUTPUT_SUFFIXES)}"
    return None


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with options together, or with numbers, once all are known."""
    for name in LIMITS:
        value = getattr(args, name, None)
        if value is not None and (wrong := beyond(name, value)):
            return wrong
    if args.height and args.width and args.height * args.width > MOST_PIXELS:
        return f"a size of {args.width} x {args.height} pixels is more than {MOST_PIXELS:,} in all"
    for system in SYSTEMS:
        if wrong := system.contradiction(args):
            return wrong
    if wrong := rewrite.contradiction(args) or places.contradiction(args) or several.contradiction(args):
        return wrong
    if args.graphs and args.device not in (None, "auto") and not args.device.startswith("cuda"):
        return f"--graphs needs a CUDA or ROCm device, and --device is {shown(args.device, 40)}"
    if args.step_cache is not None and args.step_cache < 0:
        return f"step_cache {args.step_cache:g} is below 0"
    if wrong := together.contradiction(asked_settings(args)):
        return wrong
    if args.lora_scale is not None and args.lora is None:
        return "--lora-scale is for the adapter that --lora names"
    if args.fuse_lora and args.lora is None:
        return "--fuse-lora is for the adapter that --lora names"
    if args.lora_scale is not None and len(args.lora_scale) not in (1, len(args.lora)):
        counts = f"{len(args.lora_scale)} times --lora-scale for {len(args.lora)} times --lora"
        return f"{counts}: give one scale for all adapters, or one for each"
    return None


def asked_settings(args: argparse.Namespace) -> dict[str, str]:
    """Of the settings in `joyedit/pipelines/together.py` those that the arguments ask for, in their words."""
    given = {
        "memory": (args.memory is not None, f"--memory {args.memory}"),
        "offload": (args.offload not in (None, "none"), f"--offload {args.offload}"),
        "graphs": (args.graphs, "--graphs"),
        "step_cache": (bool(args.step_cache), f"--step-cache {args.step_cache}"),
        "parallel": (args.parallel is not None, f"--parallel {several.spelt(args)}"),
    }
    return {name: words for name, (asked, words) in given.items() if asked}


def has_graphs() -> bool:
    """Whether PyTorch, which this imports, finds a device that has CUDA graphs."""
    import torch

    return torch.cuda.is_available()


def blank(args: argparse.Namespace) -> str | None:
    """What is wrong with a text that says nothing. A source may be empty: everything is compared with it."""
    for name in ("prompt", "target_prompt"):
        text = getattr(args, name)
        if text is not None and not any(letter.isprintable() and not letter.isspace() for letter in text):
            return f"{'--target' if name == 'target_prompt' else 'the instruction'} is empty: say what to do"
    return None


def build_parser(functions: Mapping[str, Any]) -> Parser:
    parser = Parser(prog="joyedit", description="Edit images by instruction.")
    parser.add_argument("--version", action="version", version=f"joyedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, text: str, *parents: Parser) -> Parser:
        made = commands.add_parser(name, help=text, description=text, parents=[*parents, verbosity_options()])
        made.set_defaults(run=functions[name], command=name, parser=made)
        return made

    def making(name: str, text: str) -> Parser:
        """A command that makes pictures: what one system alone knows is None where it has no such command."""
        others = [system for system in SYSTEMS if name not in system.commands]
        made = command(name, text, *system_options(name), image_options(), *part_options())
        made.set_defaults(**{key: None for system in others for key in (*system.texts, *system.options)})
        return made

    made = making("edit", "edit a photograph as an instruction says, or from one caption to another")
    made.add_argument("photos", metavar="PHOTO", nargs="+", help="path or http(s) URL of the photograph")
    made.add_argument(
        "prompt", metavar="INSTRUCTION", nargs="?", help="what to change; - reads it from standard input"
    )

    made = making("generate", "make an image from text")
    made.add_argument(
        "prompt", metavar="PROMPT", nargs="?", help="what to show; - reads it from standard input"
    )
    made.set_defaults(photos=None)

    made = command("ask", "answer a question about photographs, or about none", file_options())
    ask.add_options(made)

    made = command(
        "estimate", "what memory and time an edit will take, before anything is loaded", file_options()
    )
    estimate.add_options(made)

    made = command("train", "train an adapter, or all weights, on pairs of pictures")
    train.add_options(made)

    made = command("demo", "edit drawn scenes with the built-in models, and show it in one picture")
    made.add_argument(
        "--out",
        type=place,
        metavar="FOLDER",
        help=f"folder to write, default: {DEMO_FOLDER}, or {DEMO_FOLDER}-2 and so on where that is there",
    )
    made.add_argument("--force", action="store_true", help="replace files that are there already")

    made = command("convert", "write a checkpoint in another layout or dtype", *part_options())
    made.add_argument(
        "source",
        metavar="SRC",
        type=place,
        help="folder, weight file or Hub name of the checkpoint, or an adapter's file",
    )
    made.add_argument("target", metavar="DST", type=place, help="folder to write; of an adapter, the file")
    made.add_argument(
        "--to",
        choices=("diffusers", "original", "comfyui", "kohya"),
        default="diffusers",
        help="default: diffusers; original is for checkpoints, kohya for adapters",
    )
    made.add_argument(
        "--dtype",
        choices=devices.DTYPES,
        metavar="DTYPE",
        help=f"{', '.join(devices.DTYPES[:4])} (as stored)",
    )
    made.add_argument(
        "--quantize",
        choices=("int8_convrot",),
        metavar="FORM",
        help="int8_convrot: JoyAI's transformer and text encoder in 8 bits, with --to comfyui",
    )
    made.add_argument("--force", action="store_true", help="replace a checkpoint that is there already")

    made = command("verify", "whether the files of a checkpoint are whole: nothing cut off, nothing missing")
    made.add_argument(
        "target", metavar="PATH", type=place, help="folder, weight file, or Hub name of what is in the cache"
    )
    made.add_argument(
        "--full", action="store_true", help="read it all: hold it against the Hub's hashes, count NaN"
    )
    made.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    made.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")
    made.add_argument("--json", action="store_true", help="print JSON")

    made = command(
        "info",
        "what a checkpoint holds, how an image was made, or (without TARGET) what this installation is",
        file_options(),
    )
    made.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        type=place,
        help="folder, weight file, Hub name, or a PNG made here",
    )
    made.add_argument("--json", action="store_true", help="print JSON")
    return parser


def system_options(command: str) -> list[Parser]:
    """What each system alone knows, of those that have the command."""
    parsers = []
    for system in SYSTEMS:
        if command in system.commands:
            parsers.append(Parser(add_help=False))
            system.add_options(parsers[-1])
    return parsers


def image_options() -> Parser:
    """Options of the commands that make images. Those of the picture default to what the pipeline says."""
    parser = Parser(add_help=False)
    add = parser.add_argument_group("the image").add_argument
    add(
        "-o",
        "--output",
        metavar="OUT",
        type=place,
        help="file to write (.png, .jpg, .webp) or a folder; default: PHOTO-edit-SEED.png. Of several "
        "photographs or images the names say which",
    )
    add(
        "--seed",
        type=whole("seed"),
        help="seed of the first image, the next ones count up; default: a random one",
    )
    add("--num-images", type=whole("num_images"), metavar="N", help="how many images, default 1")
    add(
        "--steps",
        type=whole("num_inference_steps"),
        metavar="N",
        dest="num_inference_steps",
        help="denoising steps; default: what the model was made for",
    )
    add(
        "--step-cache",
        type=from_zero,
        metavar="X",
        help="faster and not quite equal: leave most blocks out of steps in which the first one changes by "
        "less than this share, 0.1 for example; default 0, out of none",
    )
    add(
        "--guidance-scale",
        type=finite,
        metavar="G",
        help="how closely to follow the text; 1 turns guidance off",
    )
    add("--negative-prompt", metavar="TEXT", help="what to avoid; without guidance it has no effect")
    add(
        "--prompt-file",
        metavar="FILE",
        type=place,
        help="take the instruction or prompt from a text file, or from standard input (-)",
    )
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
    add(
        "--config-from",
        metavar="PNG",
        type=place,
        help="take every option that is not given from an image made here",
    )
    add(
        "--no-metadata", action="store_false", dest="metadata", help="do not record the parameters in the PNG"
    )
    add("--force", action="store_true", help="replace files that are there already")
    places.add_options(parser)
    preview.add_option(parser)
    rewrite.add_options(parser)
    *others, usual = SYSTEMS
    special = (f"{system.occasion} {system.model}" for system in others if system.model)
    models = ", ".join([usual.model, *special])
    add = parser.add_argument_group("the model").add_argument
    add(
        "-m",
        "--model",
        metavar="NAME",
        type=place,
        help=f"folder, weight file or Hub name; default: {models}",
    )
    add(
        "--lora",
        metavar="NAME",
        action="append",
        type=place,
        help="adapter to run with: file, folder or Hub name; may be repeated",
    )
    add(
        "--lora-scale",
        metavar="S",
        action="append",
        type=finite,
        help="strength of the adapter, default 1; of several one for all, or one for each in their order",
    )
    add(
        "--fuse-lora",
        action="store_true",
        default=None,
        help="add the adapters to the weights, which spares their products; in half precision, what is small "
        "is rounded away",
    )
    devices.add_options(add)
    several.add_option(add)
    add(
        "--graphs",
        action="store_true",
        default=None,
        help="replay the steps as CUDA graphs: faster where launching takes longer than computing (small "
        "pictures, Stable Diffusion)",
    )
    add(
        "--reference-quirks",
        action=argparse.BooleanOptionalAction,
        help="repeat the defects of the reference implementation",
    )
    return parser


def file_options() -> Parser:
    """Where a checkpoint's files are."""
    parser = Parser(add_help=False)
    add = parser.add_argument_group("its files").add_argument
    add("--revision", help="branch, tag or commit of a Hub repository")
    add("--variant", help="files of this variant, such as fp16")
    add("--cache-dir", metavar="DIR", help="where downloads are kept")
    add("--offline", action="store_true", help="use only what is on this disk")
    return parser


def part_options() -> tuple[Parser, Parser]:
    """`file_options`, and parts from elsewhere."""
    parser = Parser(add_help=False)
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


def verbosity_options() -> Parser:
    parser = Parser(add_help=False)
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
            raise argparse.ArgumentError(self, f"{shown(values, 80)} is not of the form NAME=PATH")
        try:
            place(path)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), name: path})
