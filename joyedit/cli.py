"""The command line: `joyedit edit`, `generate`, `convert` and `info`.

The paths of what was made are all that goes to standard output; log, progress and errors go to standard
error. A run ends with 0, with 2 for arguments that are wrong in themselves, with 1 and one line for what else
is known to go wrong (`-v` adds the traceback), and with 130 after Ctrl-C, which leaves no file behind.

Nothing heavy is imported before the arguments are read, so `--help`, `--version` and a misspelt option are
quick. What the user did not say stays None down to the pipeline, whose own defaults then hold.
"""

import argparse
import contextlib
import inspect
import json
import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from joyedit import __version__

if TYPE_CHECKING:
    from joyedit.info import Checkpoint

log = logging.getLogger("joyedit")

DEFAULT_MODEL = "tiny-joyimage"
OUTPUT_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
DTYPES = ("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
LARGEST_SEED = 2**63 - 1

# What `--config-from` takes over: names of options and of the recorded metadata alike, and the JSON type.
REPEATED: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "height": int,
    "width": int,
    "basesize": int,
    "model": str,
    "revision": str,
    "variant": str,
    "parts": dict,
    "dtype": str,
    "device": str,
    "reference_quirks": bool,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; wrong arguments raise SystemExit(2)."""
    args = parse(argv)
    with log_to_stderr(args.verbosity):
        try:
            args.run(args)
        except KeyboardInterrupt:
            print("joyedit: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # the reader of our output went away, as in `joyedit info | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
            message = known_error(error)
            if message is None:
                raise
            if args.verbosity > 0:
                traceback.print_exc()
            print(f"joyedit: error: {message}", file=sys.stderr)
            return 1
    return 0


def known_error(error: Exception) -> str | None:
    """One line that says what went wrong; None for a failure that is a defect and deserves its traceback."""
    line = " ".join(str(error).split())
    full = (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in line
    )  # of the GPU, of the CPU
    if full or isinstance(error, MemoryError):
        return f"out of memory: try --offload model, a smaller --basesize, fewer --num-images ({line[:200]})"
    if isinstance(error, RuntimeError):
        return None
    return line or type(error).__name__


@contextlib.contextmanager
def log_to_stderr(verbosity: int) -> Iterator[None]:
    """Show the library's log: errors alone with -q, everything with -v."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel({-1: logging.ERROR, 0: logging.INFO}.get(verbosity, logging.DEBUG))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def edit(args: argparse.Namespace) -> None:
    make(args, args.photo)


def generate(args: argparse.Namespace) -> None:
    make(args, None)


def make(args: argparse.Namespace, source: str | None) -> None:
    """Make images from `args.prompt` and, unless `source` is None, the photograph at that path or URL.

    Everything that can be refused is refused before the model is loaded.
    """
    if args.prompt is None and args.config_from is None:
        args.parser.error(
            "say what to do: an instruction or prompt is missing, and there is no --config-from"
        )
    if (args.height is None) != (args.width is None):
        args.parser.error("give both --height and --width, or neither")
    if args.output and not Path(args.output).is_dir() and not args.output.lower().endswith(OUTPUT_SUFFIXES):
        suffixes = ", ".join(OUTPUT_SUFFIXES)
        args.parser.error(f"argument -o/--output: {args.output!r} is neither a folder nor ends in {suffixes}")

    photo, photo_facts = None, None
    if source is not None:
        from joyedit.images import load_photo

        photo, digest = load_photo(source)
        photo_facts = {"name": photo_name(source), "sha256": digest}
    if args.config_from is not None:
        fill_from_image(args, photo_facts)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed {seed} is not within 0 and {LARGEST_SEED}")
    seeds = list(range(seed, seed + (args.num_images or 1)))
    paths = output_paths(args.output, None if photo_facts is None else photo_facts["name"], seeds)
    refuse_unwritable(paths, args.force)

    pipe = open_pipeline(args)
    given = {
        name: getattr(args, name) for name in ("num_inference_steps", "guidance_scale", "height", "width")
    }
    given |= {"prompt": args.prompt, "negative_prompt": args.negative_prompt, "image": photo}
    given = {name: value for name, value in given.items() if value is not None}
    log.info("seed %s", " ".join(map(str, seeds)))
    images = run_pipeline(pipe, given, seeds)
    for image, seed, path in zip(images, seeds, paths, strict=True):
        metadata = None
        if args.metadata:
            metadata = facts_of_run(args, pipe, given, photo_facts)
            metadata |= {"seed": seed, "height": image.height, "width": image.width}
        write_image(image, path, metadata, args.force, photo.info.get("icc_profile") if photo else None)
        print(path, flush=True)


def open_pipeline(args: argparse.Namespace) -> Any:
    from joyedit.images import buckets
    from joyedit.loading import load

    table = None if args.basesize is None else buckets(args.basesize)
    options = {name: getattr(args, name) for name in ("device", "dtype", "offload", "reference_quirks")}
    options |= source_options(args)
    given = {name: value for name, value in options.items() if value is not None}
    pipe = load(args.model or DEFAULT_MODEL, **given, **(args.parts or {}))
    if table is not None:
        pipe.buckets = table
    # Shown on a terminal only (None), unless asked for or against.
    pipe.set_progress_bar_config(disable={-1: True, 0: None}.get(args.verbosity, False))
    return pipe


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Where a checkpoint's files come from, as `joyedit.load` takes it."""
    names = ("revision", "cache_dir", "variant")
    return {**{name: getattr(args, name) for name in names}, "local_files_only": args.offline}


def run_pipeline(pipe: Any, given: dict[str, Any], seeds: list[int]) -> list[Any]:
    """One image per seed, each with a CPU generator of its own: its noise depends on nothing else."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    torch.manual_seed(seeds[0])  # some of the reference's defects draw from the global generator
    return pipe(**given, generator=generators, num_images_per_prompt=len(seeds)).images


def facts_of_run(
    args: argparse.Namespace, pipe: Any, given: dict[str, Any], photo_facts: dict[str, str] | None
) -> dict[str, Any]:
    """What the image's metadata says about the run; the first part is what `--config-from` repeats."""
    import torch

    from joyedit.hub import Origin
    from joyedit.loading import BUILT_IN

    defaults = {name: p.default for name, p in inspect.signature(pipe.__call__).parameters.items()}
    model, revision = args.model or DEFAULT_MODEL, None
    if model not in BUILT_IN and not Path(model).exists():
        revision = Origin(model, args.revision, cache_dir=args.cache_dir, local_files_only=True).commit
    repeated = {
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "num_inference_steps": given.get("num_inference_steps", defaults["num_inference_steps"]),
        "guidance_scale": given.get("guidance_scale", defaults["guidance_scale"]),
        "basesize": args.basesize,
        "model": model,
        "revision": revision,
        "variant": args.variant,
        "parts": args.parts,
        "dtype": args.dtype or "auto",
        "device": pipe.device.type,
        "reference_quirks": bool(args.reference_quirks),
    }
    circumstances = {
        "input": photo_facts,
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "weights_dtype": str(pipe.dtype).removeprefix("torch."),
        "offload": args.offload,
        "version": __version__,
        "torch": torch.__version__,
    }
    return {name: value for name, value in (repeated | circumstances).items() if value is not None}


def fill_from_image(args: argparse.Namespace, photo_facts: dict[str, str] | None) -> None:
    """Take over what `args.config_from` records, where the command line says nothing itself.

    Raises ValueError for a file without such a record, or with one that is damaged.
    """
    from joyedit.images import read_metadata
    from joyedit.pipelines.pipeline import accelerator_device

    recorded = read_metadata(args.config_from)
    kept = set(REPEATED)
    if args.model is not None:
        kept -= {"revision", "variant", "parts"}  # they belong to the recorded model
    before = recorded.get("input", {})
    if not isinstance(before, dict):
        raise ValueError(f"{args.config_from}: the recorded input is damaged: {before!r}")
    if before.get("sha256") != (photo_facts or {}).get("sha256"):
        name = before.get("name", "none")
        log.warning("%s was made from another photograph (%s): expect another result", args.config_from, name)
        kept -= {"height", "width"}  # the shape of the photograph at hand decides
    for name in REPEATED:
        value = recorded.get(name)
        if name not in kept or value is None or getattr(args, name) is not None:
            continue
        if not isinstance(value, REPEATED[name]):
            raise ValueError(f"{args.config_from}: the recorded {name} is damaged: {value!r}")
        if name == "device" and value not in ("cpu", getattr(accelerator_device(), "type", "cpu")):
            log.warning("the recorded device (%s) is not here: the result will differ by rounding", value)
            continue
        setattr(args, name, value)
    if args.prompt is None:
        raise ValueError(f"{args.config_from} records no prompt: give one")


def photo_name(source: str) -> str:
    """The file's name without its folder; of a URL without the query, which may hold a key."""
    if source.startswith(("http://", "https://")):
        return PurePath(unquote(urlsplit(source).path)).name or "photo"
    return Path(source).name


def output_paths(output: str | None, photo: str | None, seeds: list[int]) -> list[Path]:
    """One path per seed: `output` itself for a single image, otherwise with the seed in its name."""
    chosen = Path(output or "").expanduser()
    if output is None or chosen.is_dir():
        stem = "generated" if photo is None else f"{PurePath(photo).stem}-edit"
        return [chosen / f"{stem}-{seed}.png" for seed in seeds]
    if len(seeds) == 1:
        return [chosen]
    return [chosen.with_name(f"{chosen.stem}-{seed}{chosen.suffix}") for seed in seeds]


def refuse_unwritable(paths: list[Path], force: bool) -> None:
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        if path.exists() and not force:
            raise FileExistsError(f"{path} exists: pass --force to replace it, or name another file with -o")
        folder = existing_parent(path)
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise PermissionError(f"{path} cannot be written: {folder} is no folder that you may write to")


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that is already there."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def write_image(image: Any, path: Path, metadata: dict[str, Any] | None, force: bool, profile: Any) -> None:
    """Write PNG with its metadata; JPEG and WebP, which are lossy, without."""
    from joyedit.images import save_png
    from joyedit.weights import replacing

    if path.suffix.lower() == ".png":
        save_png(image, path, metadata, force=force, icc_profile=profile)
        return
    if metadata is not None:
        log.info("%s carries no parameters: only .png files do", path)
    with replacing(path) as temporary:
        image.save(temporary, quality=95)


def convert(args: argparse.Namespace) -> None:
    """Write the checkpoint `args.source` to the folder `args.target` in another layout or dtype.

    The folder has a temporary name until it is whole. With --force it takes the place of a checkpoint, but
    never of a folder that holds something else.
    """
    from joyedit.info import describe
    from joyedit.loading import load, save_checkpoint

    target = Path(args.target).expanduser()
    refuse_target(target, Path(args.source), args.force)
    options = {name: value for name, value in source_options(args).items() if value is not None}
    checkpoint = describe(args.source, **options)
    refuse_full_disk(target, checkpoint, args.dtype)
    dtype = {} if args.dtype is None else {"dtype": args.dtype}
    pipe = load(args.source, device="cpu", **dtype, **options, **(args.parts or {}))
    local = Path(args.source).expanduser().exists()
    provenance = {
        "joyedit.version": __version__,
        "joyedit.source": Path(args.source).resolve().name if local else args.source,
        "joyedit.source_revision": checkpoint.revision or "",
        "license": checkpoint.licence,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        made, replaced = Path(temporary) / "made", Path(temporary) / "replaced"
        save_checkpoint(pipe, made, args.to, metadata=provenance)
        if not target.exists():
            made.rename(target)
        else:
            target.rename(replaced)
            try:
                made.rename(target)
            except BaseException:
                replaced.rename(target)
                raise
    print(target, flush=True)


def refuse_target(target: Path, source: Path, force: bool) -> None:
    from joyedit.hub import Origin
    from joyedit.loading import WEIGHT_SUFFIXES, layout_of

    if target.suffix in WEIGHT_SUFFIXES:
        raise ValueError(f"{target} looks like a file: DST is a folder")
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: DST is a folder")
    if source.exists():
        inner, outer = sorted((source.resolve(), target.resolve()), key=lambda p: len(p.parts), reverse=True)
        if inner.is_relative_to(outer):
            raise ValueError(f"{source} and {target} are in each other: choose a DST elsewhere")
    if target.exists() and any(target.iterdir()):
        if not force:
            raise FileExistsError(f"{target} exists and is not empty: pass --force to replace it")
        try:
            layout_of(str(target), Origin(str(target)).listing())
        except ValueError:
            raise FileExistsError(
                f"{target} exists and is no checkpoint: --force does not replace it"
            ) from None


def refuse_full_disk(target: Path, checkpoint: "Checkpoint", dtype: str | None) -> None:
    from joyedit.info import size

    needed, free = checkpoint.bytes_as(dtype), shutil.disk_usage(existing_parent(target)).free
    if needed > free:
        raise OSError(f"{target} needs {size(needed)}, and the disk has {size(free)} free")


def info(args: argparse.Namespace) -> None:
    from joyedit import info as facts
    from joyedit.images import read_metadata

    if args.target is None:
        found = facts.environment()
        shown = facts.lines_of(found)
    elif Path(args.target).suffix.lower() in OUTPUT_SUFFIXES:
        found = read_metadata(args.target)
        shown = facts.lines_of(found)
    else:
        options = {name: value for name, value in source_options(args).items() if value is not None}
        checkpoint = facts.describe(args.target, **options)
        found, shown = checkpoint.to_dict(), checkpoint.lines()
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else "\n".join(shown))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises SystemExit(2), with the reason on standard error, for wrong ones."""
    args, left = build_parser().parse_known_args(argv)
    if len(left) == 1 and not left[0].startswith("-") and getattr(args, "prompt", "") is None:
        args.prompt = left.pop()  # before Python 3.12.7 argparse loses it when an option follows PHOTO
    if left:
        args.parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="joyedit", description="Edit images by instruction.")
    parser.add_argument("--version", action="version", version=f"joyedit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, parents=[*parents, verbosity_options()])
        made.set_defaults(run=run, parser=made)
        return made

    made = command("edit", edit, "edit a photograph as an instruction says", image_options(), *part_options())
    made.add_argument("photo", metavar="PHOTO", help="path or http(s) URL of the photograph")
    made.add_argument("prompt", metavar="INSTRUCTION", nargs="?", help="what to change")

    made = command("generate", generate, "make an image from text", image_options(), *part_options())
    made.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to show")

    made = command("convert", convert, "write a checkpoint in another layout or dtype", *part_options())
    made.add_argument("source", metavar="SRC", help="folder, weight file or Hub name of the checkpoint")
    made.add_argument("target", metavar="DST", help="folder to write")
    made.add_argument(
        "--to", choices=("diffusers", "original", "comfyui"), default="diffusers", help="default: diffusers"
    )
    made.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES[:4])} (as stored)")
    made.add_argument("--force", action="store_true", help="replace a checkpoint that is there already")

    made = command(
        "info",
        info,
        "what a checkpoint holds, how an image was made, or (without TARGET) what this installation is",
        file_options(),
    )
    made.add_argument(
        "target", metavar="TARGET", nargs="?", help="folder, weight file, Hub name, or a PNG made here"
    )
    made.add_argument("--json", action="store_true", help="print JSON")
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
    add("--steps", type=positive, metavar="N", dest="num_inference_steps", help="denoising steps")
    add(
        "--guidance-scale",
        type=finite,
        metavar="G",
        help="how closely to follow the text; 1 turns guidance off",
    )
    add("--negative-prompt", metavar="TEXT", help="what to avoid")
    add("--height", type=pixels, help="with --width: the nearest size that the model knows is used")
    add("--width", type=pixels)
    add(
        "--basesize", type=int, choices=(256, 512, 768, 1024), help="work in sizes of about this edge squared"
    )
    add("--config-from", metavar="PNG", help="take every option that is not given from an image made here")
    add(
        "--no-metadata", action="store_false", dest="metadata", help="do not record the parameters in the PNG"
    )
    add("--force", action="store_true", help="replace files that are there already")
    add = parser.add_argument_group("the model").add_argument
    add("-m", "--model", metavar="NAME", help=f"folder, weight file or Hub name; default: {DEFAULT_MODEL}")
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
