"""The command line: `joyedit edit`, `generate`, `demo`, `convert` and `info`.

The paths of what was made are all that goes to standard output; log, progress and errors go to standard
error. A run ends with 0, with 2 for arguments that are wrong in themselves, with 1 and one line for what else
is known to go wrong (`-v` adds the traceback), and with 130 after Ctrl-C, which leaves no file behind.

Nothing heavy is imported before the arguments are read, so `--help`, `--version` and a misspelt option are
quick. What the user did not say is what the checkpoint was made for (`pipelines/made_for.py`), if it says so;
else it stays None down to the pipeline, whose own defaults then hold.
"""

import argparse
import contextlib
import inspect
import json
import logging
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
from joyedit.command.arguments import (
    CAPTION_MODEL,
    CAPTION_SETTINGS,
    CAPTIONS,
    DEFAULT_MODEL,
    FILM_MODEL,
    FILM_OPTIONS,
    FILM_SETTINGS,
    FPS,
    FRAMES,
    LARGEST_SEED,
    OUTPUT_SUFFIXES,
    REASONING_FRAMES,
    SIDE_OUTPUTS,
    contradiction,
    parse,
)
from joyedit.command.results import existing_parent, numbered, output_paths, refuse_files, write_results

if TYPE_CHECKING:
    from joyedit.command.info import Checkpoint
    from joyedit.pipelines.made_for import MadeFor

log = logging.getLogger("joyedit")

# What `--config-from` takes over: names of options and of the recorded metadata alike, and the JSON type.
REPEATED: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "source_prompt": str,
    "target_prompt": str,
    "negative_prompt": str,
    "seed": int,
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "inpaint_strength": (int, float),
    "mask_encode_strength": (int, float),
    "mask_thresholding_ratio": (int, float),
    "num_maps_per_mask": int,
    "invert_guidance_scale": (int, float),
    "composite": bool,
    "num_frames": int,
    "num_temporal_reasoning_steps": int,
    "preset": str,
    "fps": (int, float),
    "lora": str,
    "lora_scale": (int, float),
    "height": int,
    "width": int,
    "basesize": int,
    "model": str,
    "revision": str,
    "variant": str,
    "parts": dict,
    "dtype": str,
    "device": str,
    "prediction_type": str,
    "reference_quirks": bool,
}
FILM = "ChronoEditPipeline"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; wrong arguments raise SystemExit(2)."""
    commands = {"edit": edit, "generate": generate, "demo": demo, "convert": convert, "info": info}
    args = parse(argv, commands)
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
    """Make images from what `args` say and, unless `source` is None, the photograph at that path or URL.

    Everything that can be refused is refused before the model is loaded.
    """
    photo = photo_facts = profile = None
    if source is not None:
        from joyedit.media.images import load_photo

        photo, digest = load_photo(source)
        profile = photo.info.get("icc_profile")
        photo_facts = {"name": photo_name(source), "sha256": digest}
    if args.config_from is not None:
        fill_from_image(args, photo_facts)
        if wrong := contradiction(args):
            raise ValueError(wrong)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed {seed} is not within 0 and {LARGEST_SEED}")
    seeds = list(range(seed, seed + (args.num_images or 1)))
    name = None if photo_facts is None else photo_facts["name"]
    files = {"output": output_paths(args.output, name, seeds)}
    asked = [name for name in (*SIDE_OUTPUTS, "video") if vars(args).get(name)]
    files |= {name: numbered(Path(vars(args)[name]), seeds) for name in asked}
    refuse_files(files, args.force)
    kind = refuse_other_model(args)
    refuse_adapter(args)
    made_for = fill_from_checkpoint(args)
    if kind == FILM:
        photo = film_copy(photo, args, made_for.basesize)

    pipe = open_pipeline(args)
    log.info("seed %s", " ".join(map(str, seeds)))
    given = given_options(args, kind)
    if is_by_captions(args):
        assert photo is not None
        given["image"] = photo = working_copy(photo, args, trained_side(pipe))
    warn_of_the_unknown(args, pipe, made_for, photo)
    if is_by_captions(args):
        made = edit_by_captions(pipe, given, seeds)
    elif kind == FILM:
        assert photo is not None
        made = edit_by_film(pipe, given | {"image": photo}, seeds, whole="video" in files)
    else:
        given |= {} if photo is None else {"image": photo}
        made = [{"output": image} for image in run_pipeline(pipe, given, seeds)]
    for i, (seed, pictures) in enumerate(zip(seeds, made, strict=True)):
        metadata = None
        if args.metadata:
            metadata = facts_of_run(args, pipe, given, photo_facts)
            metadata |= {"seed": seed, "height": pictures["output"].height, "width": pictures["output"].width}
        paths = {name: each[i] for name, each in files.items()}
        fps = vars(args).get("fps") or FPS
        write_results(pictures, paths, metadata, profile, fps=fps, force=args.force)
        print(*paths.values(), sep="\n", flush=True)


def is_by_captions(args: argparse.Namespace) -> bool:
    """Whether the edit is between two captions, as Stable Diffusion does it."""
    return vars(args).get("source_prompt") is not None


def film_options(args: argparse.Namespace) -> list[str]:
    """The options that are given and that only an edit by film knows."""
    return [option for name, option in FILM_OPTIONS.items() if vars(args).get(name) is not None]


def model_name(args: argparse.Namespace) -> str:
    usual = FILM_MODEL if film_options(args) else DEFAULT_MODEL
    return args.model or (CAPTION_MODEL if is_by_captions(args) else usual)


def model_kind(args: argparse.Namespace) -> str:
    """The class of the model's pipeline."""
    from joyedit.loading.layouts import pipeline_name

    return pipeline_name(model_name(args), **origin_options(args))


def origin_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"revision": args.revision, "cache_dir": args.cache_dir, "local_files_only": args.offline}


def refuse_other_model(args: argparse.Namespace) -> str:
    """The class of the model's pipeline. Raises ValueError for one that is not told what to do in this way,
    and for options that it does not know."""
    model, kind = model_name(args), model_kind(args)
    takes_captions = kind == "StableDiffusionDiffEditPipeline"
    if takes_captions and args.command == "generate":
        raise ValueError(f"{model} edits photographs here: joyedit edit PHOTO --source TEXT --target TEXT")
    if kind == FILM and args.command == "generate":
        raise ValueError(f"{model} edits photographs here: joyedit edit PHOTO INSTRUCTION")
    if takes_captions and not is_by_captions(args):
        raise ValueError(
            f"{model} takes no instruction: say what the photograph shows and what it shall show, as in "
            "joyedit edit PHOTO --source 'a bowl of fruits' --target 'a bowl of pears'"
        )
    if not takes_captions and is_by_captions(args):
        raise ValueError(
            f"{model} edits by instruction, not from --source to --target: say what to do, as in "
            "joyedit edit PHOTO 'Make it red.'"
        )
    if kind != FILM and film_options(args):
        raise ValueError(
            f"{model} makes no film: {film_options(args)[0]} is for ChronoEdit, as in "
            f"--model nvidia/ChronoEdit-14B-Diffusers, or {FILM_MODEL}"
        )
    return kind


def given_options(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What was said of the picture, as the pipeline's call takes it."""
    names = ["negative_prompt", "num_inference_steps", "guidance_scale"]
    names += [*CAPTIONS, *CAPTION_SETTINGS] if is_by_captions(args) else ["prompt"]
    names += ["height", "width"] if kind == "JoyImageEditPipeline" else []
    names += FILM_SETTINGS if kind == FILM else ()
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if kind == FILM:
        reasoning = "num_temporal_reasoning_steps" in given
        given = {"num_frames": REASONING_FRAMES if reasoning else FRAMES, **given}
        given["enable_temporal_reasoning"] = reasoning
    return given


def fill_from_checkpoint(args: argparse.Namespace) -> "MadeFor":
    """What the model says it was made for, whose settings are taken over where nothing else says them."""
    from joyedit.loading.layouts import made_for

    found = made_for(model_name(args), **origin_options(args))
    replaced = () if vars(args).get("preset") is None else ("num_inference_steps", "guidance_scale")
    for name, value in found.call.items():
        if name in vars(args) and getattr(args, name) is None and name not in replaced:
            setattr(args, name, value)
    if wrong := contradiction(args):
        raise ValueError(wrong)
    return found


def warn_of_the_unknown(args: argparse.Namespace, pipe: Any, made_for: "MadeFor", photo: Any) -> None:
    """One line, where a model that knows little is given something else. It edits that all the same."""
    from joyedit.loading.layouts import RELEASED
    from joyedit.media.images import resize_center_crop
    from joyedit.pipelines.made_for import round_trip

    world, kind = made_for.world, type(pipe).__name__
    if world is None:
        return
    if photo is None:
        unknown = "a text without a picture"
    else:
        seen = photo
        if kind == "JoyImageEditPipeline":
            seen = resize_center_crop(photo, *pipe.choose_size([photo], args.height, args.width))
        texts = [vars(args).get(name) for name in ("prompt", *CAPTIONS)]
        words = ", ".join(repr(word) for word in world.unknown(filter(None, texts))[:4])
        pictured = "this photograph" if round_trip(pipe, seen) < world.psnr else ""
        unknown = " and of ".join(filter(None, (pictured, words)))
    if unknown:
        log.warning(
            "%s knows only %s: expect little of %s; real edits need real weights, as in --model %s",
            model_name(args),
            world.about,
            unknown,
            RELEASED[kind],
        )


def trained_side(pipe: Any) -> int:
    """The edge of the square pictures that the UNet of a Stable Diffusion was trained on."""
    size = pipe.unet.config.sample_size or 64
    return (size if isinstance(size, int) else min(size)) * pipe.vae_scale_factor


def working_copy(photo: Any, args: argparse.Namespace, side: int) -> Any:
    """The photograph in the size that is asked for, or else in its own, up to as many pixels as `side`
    squared."""
    import PIL.Image

    size = (args.width, args.height)
    if args.height is None:
        scale = (args.basesize or side) / (photo.width * photo.height) ** 0.5
        scale = scale if args.basesize else min(scale, 1)
        size = tuple(max(int(side * scale) // 8 * 8, 8) for side in photo.size)
    return resized(photo, size, PIL.Image.Resampling.LANCZOS)


def film_copy(photo: Any, args: argparse.Namespace, basesize: int | None) -> Any:
    """The photograph in the size that is asked for, or else in that which the model was made for: without a
    basesize that of ChronoEdit's own examples, which resize it as here."""
    import PIL.Image

    from joyedit.media.images import STRETCH, size_of_area, stretch

    height, width = args.height, args.width
    if height is None:
        side = args.basesize or basesize
        height, width = size_of_area(photo.height, photo.width, **({} if side is None else {"area": side**2}))
    copy = resized(photo, (width, height), PIL.Image.Resampling.BICUBIC)
    if stretch((photo.height, photo.width), (height, width)) > STRETCH:
        log.warning("this stretches the photograph: without --height and --width it keeps its shape")
    return copy


def resized(photo: Any, size: tuple[int, ...], resample: Any) -> Any:
    if size == photo.size:
        return photo
    log.info("working at %d x %d pixels, the photograph has %d x %d", *size, *photo.size)
    return photo.resize(size, resample)


def refuse_adapter(args: argparse.Namespace) -> None:
    """Raises FileNotFoundError or ValueError for an adapter that cannot be read."""
    from joyedit.checkpoints.lora_files import open_lora

    if args.lora is not None:
        open_lora(args.lora, None, "", adapter_options(args))


def add_adapter(pipe: Any, args: argparse.Namespace) -> None:
    """Put the adapter into the weights, where it costs nothing per step; nothing here takes it out again."""
    name = pipe.load_lora_weights(args.lora, **adapter_options(args)).name
    pipe.fuse_lora(1.0 if args.lora_scale is None else args.lora_scale, [name], reversible=False)


def adapter_options(args: argparse.Namespace) -> dict[str, Any]:
    return {"cache_dir": args.cache_dir, "local_files_only": args.offline}


def open_pipeline(args: argparse.Namespace) -> Any:
    from joyedit.loading.layouts import load
    from joyedit.media.images import buckets

    table = None if args.basesize is None else buckets(args.basesize)
    names = ("device", "dtype", "offload", "reference_quirks", "prediction_type", "preset")
    options = {name: vars(args).get(name) for name in names} | source_options(args)
    given = {name: value for name, value in options.items() if value is not None}
    pipe = load(model_name(args), **given, **(args.parts or {}))
    if args.lora is not None:
        add_adapter(pipe, args)
    if table is not None:
        pipe.buckets = table
    # Shown on a terminal only (None), unless asked for or against.
    pipe.set_progress_bar_config(disable={-1: True, 0: None}.get(args.verbosity, False))
    return pipe


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """Where a checkpoint's files come from, as `joyedit.load` takes it."""
    return {**origin_options(args), "variant": args.variant}


def run_pipeline(pipe: Any, given: dict[str, Any], seeds: list[int]) -> list[Any]:
    """One image per seed, each with a CPU generator of its own: its noise depends on nothing else."""
    import torch

    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    torch.manual_seed(seeds[0])  # some of the reference's defects draw from the global generator
    return pipe(**given, generator=generators, num_images_per_prompt=len(seeds)).images


def edit_by_captions(pipe: Any, given: dict[str, Any], seeds: list[int]) -> list[dict[str, Any]]:
    """For each seed the result, the mask in its size, and the grid of photograph, mask on it and result."""
    import torch

    from joyedit.media.images import make_image_grid
    from joyedit.media.masks import mask_overlay, to_mask_images

    made = []
    for seed in seeds:
        (result,), _, mask, _ = pipe.edit(**given, generator=torch.Generator("cpu").manual_seed(seed))
        (white,) = to_mask_images(torch.from_numpy(mask))
        white = white.resize(result.size, 0)  # 0: the nearest pixel
        shown = [given["image"], mask_overlay(given["image"], white), result]
        made.append({"output": result, "mask_out": white, "grid": make_image_grid(shown, 1, 3)})
    return made


def edit_by_film(pipe: Any, given: dict[str, Any], seeds: list[int], whole: bool) -> list[dict[str, Any]]:
    """For each seed the edit, which is the last frame, and where `whole` is set the film."""
    import torch

    films = pipe(
        **given,
        height=given["image"].height,
        width=given["image"].width,
        num_videos_per_prompt=len(seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pil",
        only_last_frame=not whole,
    ).frames
    return [{"output": frames[-1], "video": frames} for frames in films]


def facts_of_run(
    args: argparse.Namespace, pipe: Any, given: dict[str, Any], photo_facts: dict[str, str] | None
) -> dict[str, Any]:
    """What the image's metadata says about the run; the first part is what `--config-from` repeats."""
    import torch

    from joyedit.checkpoints.hub import Origin
    from joyedit.loading.layouts import BUILT_IN

    by_captions = is_by_captions(args)
    call = pipe.edit if by_captions else pipe.__call__
    defaults = {name: parameter.default for name, parameter in inspect.signature(call).parameters.items()}
    settings = ["num_inference_steps", "guidance_scale", *(CAPTION_SETTINGS if by_captions else ())]
    made = {name: given.get(name, defaults[name]) for name in settings}
    if type(pipe).__name__ == FILM:  # a preset has other defaults
        made = {"num_inference_steps": pipe.num_timesteps, "guidance_scale": pipe.guidance_scale}
        made |= {name: given.get(name) for name in FILM_SETTINGS}
        made |= {name: getattr(args, name) for name in ("preset", "fps")}
    model, revision = model_name(args), None
    if model not in BUILT_IN and not Path(model).exists():
        revision = Origin(model, args.revision, cache_dir=args.cache_dir, local_files_only=True).commit
    repeated = {
        "prompt": args.prompt,
        **{name: vars(args).get(name) for name in CAPTIONS},
        "negative_prompt": args.negative_prompt,
        **made,
        "basesize": args.basesize,
        "model": model,
        "revision": revision,
        "variant": args.variant,
        "parts": args.parts,
        "lora": args.lora,
        "lora_scale": args.lora_scale,
        "dtype": args.dtype or "auto",
        "device": pipe.device.type,
        "prediction_type": args.prediction_type,
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
    from joyedit.media.images import read_metadata
    from joyedit.pipelines.pipeline import accelerator_device

    recorded = read_metadata(args.config_from)
    kept = set(REPEATED) & set(vars(args))
    if args.model is not None:
        kept -= {"revision", "variant", "parts", "prediction_type"}  # they belong to the recorded model
        maker, lora = recorded.get("pipeline"), recorded.get("lora")
        if (maker == FILM or lora is not None) and maker != model_kind(args):
            kept -= {*FILM_OPTIONS, "lora", "lora_scale"}
            if lora is not None and args.lora is None:
                log.warning("the recorded adapter (%s) is for a %s: it is left out", lora, maker)
    if vars(args).get("num_temporal_reasoning_steps") is not None:
        if recorded.get("num_temporal_reasoning_steps") is None:
            kept -= {"num_frames"}  # the length of a film without reasoning
    if vars(args).get("preset") is not None:
        kept -= {"num_inference_steps", "guidance_scale"}
    if args.prompt is not None:
        kept -= {*CAPTIONS, *CAPTION_SETTINGS}
    elif any(vars(args).get(name) is not None for name in CAPTIONS):
        kept -= {"prompt"}
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
    if args.prompt is None and any(vars(args).get(name) is None for name in CAPTIONS):
        raise ValueError(f"{args.config_from} records no prompt: give one")


def photo_name(source: str) -> str:
    """The file's name without its folder; of a URL without the query, which may hold a key."""
    if source.startswith(("http://", "https://")):
        return PurePath(unquote(urlsplit(source).path)).name or "photo"
    return Path(source).name


def demo(args: argparse.Namespace) -> None:
    """Write a picture of edits by the three built-in models, and the files behind it, to a folder."""
    from joyedit.command.demo import run

    disable = {-1: True, 0: None}.get(args.verbosity, False)
    print(run(Path(args.out).expanduser(), force=args.force, disable_progress=disable), flush=True)


def convert(args: argparse.Namespace) -> None:
    """Write the checkpoint `args.source` to the folder `args.target` in another layout or dtype.

    The folder has a temporary name until it is whole. With --force it takes the place of a checkpoint, but
    never of a folder that holds something else.
    """
    from joyedit.command.info import describe
    from joyedit.loading.layouts import load, save_checkpoint

    target = Path(args.target).expanduser()
    refuse_target(target, Path(args.source), args.force)
    options = {name: value for name, value in source_options(args).items() if value is not None}
    checkpoint = describe(args.source, **options)
    refuse_full_disk(target, checkpoint, args.dtype)
    dtype = {} if args.dtype is None else {"dtype": args.dtype}
    told = {} if args.prediction_type is None else {"prediction_type": args.prediction_type}
    pipe = load(args.source, device="cpu", **dtype, **told, **options, **(args.parts or {}))
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
    from joyedit.checkpoints.hub import Origin
    from joyedit.loading.layouts import WEIGHT_SUFFIXES, layout_of

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
    from joyedit.command.info import size

    needed, free = checkpoint.bytes_as(dtype), shutil.disk_usage(existing_parent(target)).free
    if needed > free:
        raise OSError(f"{target} needs {size(needed)}, and the disk has {size(free)} free")


def info(args: argparse.Namespace) -> None:
    from joyedit.command import info as facts
    from joyedit.media.images import read_metadata

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
