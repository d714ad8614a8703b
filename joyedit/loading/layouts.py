"""`joyedit.load`: which pipeline a folder, file or Hub repository holds, and in which layout.

Layouts of whole checkpoints:
  diffusers   model_index.json and one folder per part
  original    transformer/transformer.pth, vae/<one file>, JoyAI-Image-Und/, infer_config.py
  comfyui     diffusion_models/, text_encoders/, vae/ and of ChronoEdit clip_vision/ with one file each, or a
              file of the first alone, see `comfyui.py`
  ldm         one file with all of Stable Diffusion, see `single_file.py`
  qwen3-vl    config.json, the weights, tokenizer and processor of a Qwen3-VL in one folder

A Diffusers folder goes by its subfolders: that of ChronoEdit was published under the names of WAN's classes.
Edit and Edit-Plus have the same tensors: of ComfyUI's files one is Plus's that has `plus` in its name.
Files without a config beside them have the released one. Nothing of a repository is executed.
"""

import ast
import contextlib
import dataclasses
import importlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from joyedit.checkpoints.config import nearest
from joyedit.checkpoints.hub import WEIGHT_SUFFIXES, Origin
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.lora_files import family_of, is_lora
from joyedit.checkpoints.mistaken import broken_off, refuse_pointers
from joyedit.checkpoints.network import Network, PlannedNetwork, plan_folder, plan_network, putting_away
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import visible
from joyedit.checkpoints.quantised_files import QUANTISE
from joyedit.checkpoints.sizes import parse_size
from joyedit.checkpoints.small_files import read_beginning, read_text
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.loading.comfyui import (
    COMFYUI_FOLDERS,
    choose_file,
    comfyui_files,
    is_called_plus,
    is_comfyui,
)
from joyedit.loading.foreign_layouts import ORIGINAL_TEXT_ENCODER, write_comfyui, write_original
from joyedit.loading.single_file import is_single_file, open_single_file, read_single_file
from joyedit.memory import in_a_file
from joyedit.pipelines import together
from joyedit.pipelines.chronoedit_presets import preset_called
from joyedit.pipelines.made_for import MadeFor
from joyedit.pipelines.pipeline import Pipeline
from joyedit.pipelines.placement import accelerator_device, check_offload

log = logging.getLogger("joyedit")

PIPELINES = {  # class -> module
    "JoyImageEditPipeline": "joyedit.pipelines.joyimage",
    "JoyImageEditPlusPipeline": "joyedit.pipelines.joyimage_plus",
    "StableDiffusionDiffEditPipeline": "joyedit.pipelines.diffedit",
    "ChronoEditPipeline": "joyedit.pipelines.chronoedit",
    "Qwen3VLPipeline": "joyedit.pipelines.qwen3_vl",
}
BUILT_IN = ("tiny-joyimage", "tiny-diffedit", "tiny-chronoedit")  # small ones, trained on drawn scenes
ASSETS = Path(__file__).parents[1] / "assets"
RELEASED = {
    "JoyImageEditPipeline": "jdopensource/JoyAI-Image-Edit-Diffusers",
    "JoyImageEditPlusPipeline": "jdopensource/JoyAI-Image-Edit-Plus-Diffusers",
    "StableDiffusionDiffEditPipeline": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "ChronoEditPipeline": "nvidia/ChronoEdit-14B-Diffusers",
    "Qwen3VLPipeline": "Qwen/Qwen3-VL-8B-Instruct",
}

# Why some folders hold none of them, by the beginning of their pipeline's name.
REFUSED = {
    "StableDiffusionInpaintPipeline": "an inpainting UNet takes 9 channels: a text-to-image one is needed",
    "StableDiffusionXL": "Stable Diffusion XL has other networks than 1.x and 2.x, which are known here",
    "Wan": "of WAN's models only image-to-video of release 2.1 has the form of ChronoEdit",
}

ORIGINAL_SHIFT = 4.0  # of jd-opensource/JoyAI-Image where infer_config.py does not say
PROCESSOR_FILES = {"preprocessor_config.json", "processor_config.json"}
COMFYUI_SCHEDULERS = {  # JoyAI: as the published ComfyUI nodes use it; ChronoEdit: as its Diffusers folder
    **dict.fromkeys(("JoyImageEditPipeline", "JoyImageEditPlusPipeline"), {"shift": 1.5}),
    "ChronoEditPipeline": {
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 5.0,
    },
}
# Of the same tensors: a file does not say which of them it is.
ALIKE = {"JoyImageEditPipeline", "JoyImageEditPlusPipeline"}
# Tensors that tell ChronoEdit's transformer: its cross-attention reads an image.
READS_IMAGES = ("blocks.0.cross_attn.k_img.weight", "blocks.0.attn2.add_k_proj.weight")


def load(
    name_or_path: str | Path = "tiny-joyimage",
    *,
    pipeline: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | Mapping[str, Any] = "auto",
    torch_dtype: str | torch.dtype | Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    offload: str = "none",
    memory: int | str | None = None,
    reference_quirks: bool = False,
    prediction_type: str | None = None,
    ema: bool = False,
    preset: str | None = None,
    new_parameters: Sequence[str] = (),
    **components: Any,
) -> Any:
    """Load a pipeline from a folder, a weight file, a Hub repository, or one of the built-in names.

    pipeline: class name, where a checkpoint serves several, as ComfyUI's files of JoyAI's transformer do;
        "Qwen3VLPipeline" reads of JoyAI-Image what answers questions, and nothing else.
    device: "auto" takes the accelerator if there is one.
    dtype: "auto" keeps what is stored, except fp32 networks above 4 GB, which become bf16, and the VAE and
        vision tower of ChronoEdit, which become fp32. {"transformer": ..., "default": ...}: by part.
    torch_dtype: another name of dtype.
    variant: where only some folders hold it, the usual files of the others are used. Of ComfyUI's files side
        by side: how the names of the wanted ones end, as "int8_convrot".
    offload: "none", "model" or "sequential".
    memory: what the pipeline may hold where it computes, as "12G"; see `Pipeline.set_memory`.
    prediction_type, ema: of a single file of Stable Diffusion, which does not say it: "epsilon" or
        "v_prediction"; True takes the averaged UNet.
    preset: of ChronoEdit: "distill" for 8 steps, "upscale", or "paintbrush" to make sketches real, with the
        LoRAs that are in lora/ of the folder or repository, or in repositories of their own.
    new_parameters: patterns ("*.temperature") of names that your code adds to a network: where files lack
        them, they keep the value that `__init__` gives them.
    components: parts to use instead (`transformer=`, `vae=`, `scheduler=`, ...): an object, or the path or
        Hub name of one. The path may be that of a weight file in any layout that joyedit knows: ComfyUI's,
        and WAN's own `.pth` of transformer, VAE and UMT5.

    Returns the pipeline. Raises FileNotFoundError, ValueError or TypeError before any tensor of the
    checkpoint is read.
    """
    check_offload(offload)
    budget = None if memory is None else parse_size(memory)
    if budget is not None and offload != "none":
        asked = {"memory": f"memory={memory!r}", "offload": f"offload={offload!r}"}
        raise ValueError(together.contradiction(asked))
    target = _device(device)
    source = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    dtypes = {} if dtype == "auto" and torch_dtype is not None else {"dtype": dtype}
    dtypes |= {} if torch_dtype is None else {"torch_dtype": torch_dtype}
    options = LoadOptions.parse({**dtypes, **source, "variant": variant, "new_parameters": new_parameters})

    found = find_checkpoint(name_or_path, pipeline, **source)
    loras = None if preset is None else _preset_loras(found, preset)
    # On a CPU what is not a file's own bytes would stay in memory.
    in_files = budget is not None and target.type == "cpu"
    with putting_away(in_a_file) if in_files else contextlib.nullcontext():
        pipe = _assembled(found, components, options, reference_quirks, prediction_type, ema)
    _say(found, name_or_path)

    if offload == "none" and budget is None:
        pipe.to(target)
    if preset is not None:
        pipe.use_preset(preset, lora=loras)
    if budget is not None:
        pipe.set_memory(memory, target)
    if offload != "none":
        pipe.set_offload(offload, None if target.type == "cpu" else target)
    return pipe


def open_unread(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | Mapping[str, Any] = "auto",
    variant: str | None = None,
    prediction_type: str | None = None,
    components: Mapping[str, Any] | None = None,
    **source: Any,
) -> Any:
    """The pipeline that `load` returns, to be written elsewhere: its weights stay in their files, each tensor
    until it is asked for. Arguments and errors as there."""
    options = LoadOptions.parse({"dtype": dtype, "variant": variant, **source})
    options = dataclasses.replace(options, unread=True)
    found = find_checkpoint(name_or_path, **source)
    pipe = _assembled(found, components or {}, options, False, prediction_type, False)
    _say(found, name_or_path)
    return pipe


def _assembled(
    found: "Checkpoint",
    components: Mapping[str, Any],
    options: LoadOptions,
    quirks: bool,
    prediction_type: str | None,
    ema: bool,
) -> Any:
    """The pipeline of a checkpoint that was found, with its networks where they were read."""
    if found.layout != "ldm" and (prediction_type is not None or ema):
        raise ValueError(
            f"prediction_type and ema are for single files of Stable Diffusion, not {found.origin.name}"
        )
    options.check_parts(found.pipeline.parts)
    passed = _open_passed(found.pipeline, components, options)
    if found.layout == "diffusers":
        pipe: Any = found.pipeline.from_origin(found.origin, options, passed, quirks)
    else:
        if found.layout == "ldm":
            parts = open_single_file(Path(found.origin.name), options, passed, prediction_type, ema)
        else:
            open_parts = {"original": _open_original, "qwen3-vl": _open_qwen}.get(found.layout, _open_comfyui)
            parts = open_parts(found, options, passed)
        options.new_parameters.check()
        pipe = found.pipeline(**{**_read(parts, options.unread), **passed}, reference_quirks=quirks)
    return pipe


def _say(found: "Checkpoint", name: str | Path) -> None:
    licence = licence_of(found.origin, found.listing)
    what = "%s from %s (%s layout); licence of the weights: %s"
    log.info(what, found.class_name, name, found.layout, licence)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint that was found, and not opened.

    listing: its files; none, where it is a file itself. layout: see the module. class_name: of its pipeline.
    """

    origin: Origin
    listing: list[str]
    layout: str
    class_name: str

    @property
    def pipeline(self) -> type[Pipeline]:
        return _open_class(self.class_name)


def find_checkpoint(name_or_path: str | Path, pipeline: str | None = None, **options: Any) -> Checkpoint:
    """What `load` finds under a name; arguments as there. Names and small files alone are read.

    Raises FileNotFoundError for a place that does not exist, ValueError for one that holds no checkpoint, or
    that of another pipeline than the one asked for.
    """
    if pipeline is not None and pipeline not in PIPELINES:
        raise ValueError(f"pipeline={pipeline!r}: must be one of {', '.join(PIPELINES)}")
    name = place_of(name_or_path)
    origin = Origin(name, **options)
    listing = [] if Path(name).is_file() else origin.listing()
    if origin.is_local:  # git-lfs may have left texts in the place of large files
        refuse_pointers(expanded(name) / file for file in listing)
    layout = layout_of(name, listing)
    if pipeline is not None and layout == "diffusers":
        return Checkpoint(origin, listing, layout, pipeline)
    held = _pipeline_class(origin, layout)
    if pipeline == "Qwen3VLPipeline" and held in ALIKE:
        return Checkpoint(origin, listing, layout, pipeline)
    if pipeline is not None and layout == "comfyui" and ALIKE >= {pipeline, held}:
        return Checkpoint(origin, listing, layout, pipeline)
    if pipeline not in (None, held):
        raise ValueError(f"pipeline={pipeline!r}: {name} is of a {held}")
    return Checkpoint(origin, listing, layout, held)


def pipeline_name(name_or_path: str | Path, **options: Any) -> str:
    """Which pipeline `load` would return, from names and small files alone. Options: where a Hub repository's
    files come from, as in `load`. Raises FileNotFoundError or ValueError as `load` does."""
    return find_checkpoint(name_or_path, **options).class_name


def read_made_for(name_or_path: str | Path, **options: Any) -> MadeFor:
    """What a checkpoint says of its use; nothing, where it is not a Diffusers folder or does not say it.
    Options and errors as of `pipeline_name`."""
    name = place_of(name_or_path)
    origin = Origin(name, **options)
    if Path(name).is_file() or "model_index.json" not in origin.listing():
        return MadeFor()
    index = read_json(origin.fetch(["model_index.json"]) / "model_index.json")
    return MadeFor.from_index(index, str(name_or_path))


def place_of(name_or_path: str | Path) -> str:
    """The folder of a built-in checkpoint, unless something here has that name; other names as they are.

    Raises FileNotFoundError for a name that is nearly a built-in one.
    """
    name = str(name_or_path)
    if not re.fullmatch(r"[\w.-]{1,40}", name) or Path(name).exists():
        return name
    if name not in BUILT_IN and (match := nearest(name.lower(), BUILT_IN)):
        known = ", ".join(BUILT_IN)
        raise FileNotFoundError(f"{name!r} is no file or folder here, nor built in as {known} are{match}")
    return str(ASSETS / name) if name in BUILT_IN else name


def layout_of(name: str, listing: list[str]) -> str:
    """ "diffusers", "original", "comfyui", "ldm" or "qwen3-vl". Raises ValueError saying what was found."""
    if not listing and not Path(name).is_dir():
        if name.endswith(WEIGHT_SUFFIXES):
            return "ldm" if Path(name).is_file() and is_single_file(Path(name)) else "comfyui"
        raise ValueError(f"{name} is a file, but not of weights ({', '.join(WEIGHT_SUFFIXES)})")
    if "model_index.json" in listing:
        return "diffusers"
    folders = {PurePosixPath(file).parts[0] for file in listing if "/" in file}
    if ORIGINAL_TEXT_ENCODER in folders and "transformer" in folders:
        return "original"
    if is_comfyui(listing):
        return "comfyui"
    if "config.json" in listing and PROCESSOR_FILES & set(listing):  # what only models that see have
        return "qwen3-vl"
    found = ", ".join(sorted(folders | {file for file in listing if "/" not in file})[:12])
    raise ValueError(
        f"{name} is no checkpoint that joyedit knows: no model_index.json (Diffusers), no transformer/ with "
        f"{ORIGINAL_TEXT_ENCODER}/ (original JoyAI), no diffusion_models/ (ComfyUI), no config.json with "
        f"preprocessor_config.json (Qwen3-VL). "
        f"It holds: {found or 'nothing'}{broken_off(Path(name))}"
    )


def _preset_loras(found: Checkpoint, preset: str) -> list[Path]:
    """The adapters of a preset: from beside the checkpoint's parts or, of a published checkpoint, from their
    own repositories. Raises ValueError for an unknown preset, FileNotFoundError where one is missing."""
    if not hasattr(found.pipeline, "use_preset"):
        raise ValueError(f"preset={preset!r}: a {found.class_name} has no presets")
    paths = []
    for adapter in preset_called(preset).adapters:
        if found.layout == "diffusers" and adapter.file in found.listing:
            paths.append(found.origin.fetch([adapter.file]) / adapter.file)
            continue
        if adapter.repository is not None and not found.origin.is_local:
            file = Path(adapter.file).name
            own = dataclasses.replace(found.origin, name=adapter.repository, revision=None)
            with contextlib.suppress(FileNotFoundError):
                paths.append(own.fetch([file]) / file)
                continue
        raise FileNotFoundError(
            f"preset={preset!r}: {found.origin.name} has no {adapter}; load without a preset, then call "
            f"pipe.use_preset({preset!r}, lora=...) with the file or Hub name of that adapter"
        )
    return paths


def _pipeline_class(origin: Origin, layout: str) -> str:
    if layout == "comfyui":
        if _is_chronoedit(origin):
            return "ChronoEditPipeline"
        return "JoyImageEditPlusPipeline" if _is_plus(origin) else "JoyImageEditPipeline"
    if layout == "qwen3-vl":
        kind = read_json(origin.fetch(["config.json"]) / "config.json").get("model_type")
        if kind != "qwen3_vl":
            raise ValueError(f"{origin.name} holds a model of type {visible(kind)}: joyedit reads qwen3_vl")
        return "Qwen3VLPipeline"
    if layout != "diffusers":
        return "StableDiffusionDiffEditPipeline" if layout == "ldm" else "JoyImageEditPipeline"
    name = read_json(origin.fetch(["model_index.json"]) / "model_index.json").get("_class_name")
    found = pipeline_for(str(name))
    if found is None:
        reasons = [f": {REFUSED[start]}" for start in REFUSED if str(name).startswith(start)]
        ours = ", ".join(PIPELINES)
        raise ValueError(f"{origin.name} holds a {visible(name)}{''.join(reasons)}; joyedit has {ours}")
    return found


def _is_chronoedit(origin: Origin) -> bool:
    """Whether ComfyUI's files are ChronoEdit's: a folder has a vision tower, a file attention to images.
    Raises ValueError for an adapter."""
    path = Path(origin.name)
    if path.is_file():
        files = TensorFiles([path])
        if is_lora(files):
            raise ValueError(
                f"{path} is an adapter of {family_of(files) or 'an unknown network'}: load a checkpoint, "
                "then call load_lora_weights with this file"
            )
        return any(name.endswith(READS_IMAGES) for name in files)
    return "image_encoder" in comfyui_files(origin.listing())


def _is_plus(origin: Origin) -> bool:
    """Whether ComfyUI's file of the transformer, or each of several, is called Edit-Plus's."""
    files = [origin.name]
    if not Path(origin.name).is_file():
        files = comfyui_files(origin.listing()).get("transformer", [])
    return bool(files) and all(map(is_called_plus, files))


def pipeline_for(class_name: str) -> str | None:
    """Our pipeline for the folders of a Diffusers pipeline of that name; None if there is none."""
    if class_name in PIPELINES:
        return class_name
    return next((name for name in PIPELINES if class_name in _open_class(name).relatives), None)


def _open_class(name: str) -> type[Pipeline]:
    return getattr(importlib.import_module(PIPELINES[name]), name)


def licence_of(origin: Origin, listing: list[str]) -> str:
    """The licence that a checkpoint's own README.md states, "not stated" otherwise."""
    if "README.md" in listing:
        lines = read_beginning(origin.fetch(["README.md"]) / "README.md").splitlines()
        if lines and lines[0].strip() == "---":
            for line in lines[1:]:
                if line.startswith("license:"):
                    return visible(line.removeprefix("license:").strip())
                if line.strip() == "---":
                    break
    return "not stated"


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return accelerator_device() or torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r}: write 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: this PyTorch finds no CUDA or ROCm device")
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device={str(device)!r}: there are {count} devices, from cuda:0 on")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device={str(device)!r}: this PyTorch finds no Apple GPU")
    try:
        torch.empty(1, device=found).tolist()
    except (RuntimeError, AssertionError, ImportError):  # "meta" and devices of other makes
        raise ValueError(f"device={str(device)!r}: nothing can be computed there by this PyTorch") from None
    return found


def _open_passed(cls: type[Pipeline], components: Mapping[str, Any], options: LoadOptions) -> dict[str, Any]:
    """The parts that the caller passed. Raises TypeError for what is the name of none."""
    if unknown := set(components) - set(cls.parts):
        raise TypeError(
            f"unknown argument {sorted(unknown)}; {cls.__name__} has the parts {', '.join(cls.parts)}"
        )
    return {part: _open_part(cls, part, value, options) for part, value in components.items()}


def _open_part(cls: type[Pipeline], part: str, value: Any, options: LoadOptions) -> Any:
    """A part given as an object, a weight file, or the folder or Hub name of a part or of a whole
    checkpoint."""
    if not isinstance(value, (str, Path)):
        return value
    kind, path = cls.parts[part][0], Path(value)
    inside = part if path.joinpath(part).is_dir() or not path.exists() else ""
    if not issubclass(kind, Network):
        return kind.from_pretrained(str(value), subfolder=inside, **options.origin)  # type: ignore[attr-defined]
    options = _with_dtype(cls, part, options)
    if not path.is_file():
        return plan_folder(kind, Origin(str(value), **options.origin), inside, options).opened(options.unread)
    if is_single_file(path):
        whole = read_single_file(path)
        if part in whole.networks and whole.networks[part][0] is kind:
            return whole.plan(part, options).opened(options.unread)
    return plan_file(kind, path, options).opened(options.unread)


def _with_dtype(cls: type[Pipeline], part: str, options: LoadOptions) -> LoadOptions:
    """The options for one part: where no dtype is asked for, the one that the pipeline holds it in."""
    return options.of_part(part, cls.auto_dtypes.get(part))


def plan_file(kind: type[Network], path: Path, options: LoadOptions) -> PlannedNetwork:
    """A network from one weight file, with the config.json beside it, or the released config."""
    beside = path.with_name("config.json")
    try:
        config = kind.Config.from_dict(read_json(beside) if beside.is_file() else {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{beside}: {error}") from None
    return plan_network(kind, config, TensorFiles([path]), options.dtype, options.new_parameters)


def _read(parts: Mapping[str, Any], unread: bool) -> dict[str, Any]:
    """The parts, with the networks among them read, or left `unread`."""
    return {n: part.opened(unread) if isinstance(part, PlannedNetwork) else part for n, part in parts.items()}


def _only_file(found: Checkpoint, folder: str) -> str:
    files = [f for f in found.listing if f.startswith(f"{folder}/") and f.endswith(WEIGHT_SUFFIXES)]
    if len(files) != 1:
        raise FileNotFoundError(
            f"{found.origin.name}/{folder}: wanted exactly one weight file, found {files or 'none'}"
        )
    return files[0]


def _open_original(found: Checkpoint, options: LoadOptions, passed: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint in the layout of jd-opensource/JoyAI-Image, but for those that are passed;
    the networks planned."""
    kinds: dict[str, Any] = {
        name: kinds[0] for name, kinds in found.pipeline.parts.items() if name not in passed
    }
    single = {name: _only_file(found, name) for name in ("transformer", "vae") if name in kinds}
    optional = [*(f"{name}/config.json" for name in single), "infer_config.py"]
    files = [*single.values(), *(name for name in optional if name in found.listing)]
    files += found.origin.small_files(ORIGINAL_TEXT_ENCODER)
    if "text_encoder" in kinds:
        stem = kinds["text_encoder"].weights_stem
        files += found.origin.network_files(ORIGINAL_TEXT_ENCODER, stem, None, None)
    root = found.origin.fetch(sorted(set(files)))
    settings = read_infer_config(root / "infer_config.py") if "infer_config.py" in files else {}

    def transformer(kind: type[Network]) -> PlannedNetwork:
        config = kind.Config.from_dict(settings.get("params", {}))
        file = TensorFiles([root / single["transformer"]])
        dtype = options.of_part("transformer").dtype
        return plan_network(kind, config, file, dtype, options.new_parameters)

    def text_part(kind: Any) -> Any:
        return kind.from_pretrained(root, subfolder=ORIGINAL_TEXT_ENCODER)

    unvaried = dataclasses.replace(options.of_part("text_encoder"), variant=None)  # this layout has none
    openers: dict[str, Callable[[Any], Any]] = {
        "tokenizer": text_part,
        "processor": text_part,
        "scheduler": lambda kind: kind(
            shift=settings.get("shift", ORIGINAL_SHIFT),
            num_train_timesteps=settings.get("num_train_timesteps", 1000),
            joyai_original=True,
        ),
        "transformer": transformer,
        "vae": lambda kind: plan_file(kind, root / single["vae"], options.of_part("vae")),
        "text_encoder": lambda kind: plan_folder(kind, Origin(str(root)), ORIGINAL_TEXT_ENCODER, unvaried),
    }
    return {name: openers[name](kind) for name, kind in kinds.items()}


def _open_qwen(found: Checkpoint, options: LoadOptions, passed: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a Qwen3-VL folder, but for those that are passed; the network planned."""
    kinds: dict[str, Any] = {n: kinds[0] for n, kinds in found.pipeline.parts.items() if n not in passed}
    files = found.origin.small_files("")
    part = options.of_part("text_encoder")
    if "text_encoder" in kinds:
        stem = kinds["text_encoder"].weights_stem
        files += found.origin.network_files("", stem, part.variant, part.use_safetensors)
    root = found.origin.fetch(sorted(set(files)))
    return {
        name: plan_folder(kind, Origin(str(root)), "", part)
        if name == "text_encoder"
        else kind.from_pretrained(root)
        for name, kind in kinds.items()
    }


def read_infer_config(path: Path) -> dict[str, Any]:
    """The literal settings of an original `infer_config.py`, read as text and never run.

    Returns "params" (the transformer's) and, where stated, "shift" and "num_train_timesteps".
    """
    try:
        tree = ast.parse(read_text(path, 2**18))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise ValueError(f"{path} is not readable Python: {error}") from None
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.expr]] = []
        if isinstance(node, ast.Dict):
            pairs = [
                (str(k.value), v)
                for k, v in zip(node.keys, node.values, strict=True)
                if isinstance(k, ast.Constant)
            ]
        elif isinstance(node, ast.Call):
            pairs = [(k.arg, k.value) for k in node.keywords if k.arg]
        values = {}
        for key, value in pairs:
            try:
                values[key] = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
        if "hidden_size" in values:
            found["params"] = values
        for key in ("shift", "num_train_timesteps"):
            if key in values:
                found[key] = values[key]
    return found


def _open_comfyui(found: Checkpoint, options: LoadOptions, passed: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of ComfyUI's single files, but for those that are passed; the networks planned. The files
    hold no tokenizer, which must be passed."""
    cls, origin = found.pipeline, found.origin
    kinds: dict[str, Any] = {name: kinds[0] for name, kinds in cls.parts.items() if name not in passed}
    parts: dict[str, Any] = {}
    if "tokenizer" in kinds and "processor" in passed:
        parts["tokenizer"] = passed["processor"].tokenizer
    if "scheduler" in kinds:
        parts["scheduler"] = kinds["scheduler"](**COMFYUI_SCHEDULERS[cls.__name__])
    if "image_processor" in kinds:
        parts["image_processor"] = kinds["image_processor"]()

    held = [name for name in COMFYUI_FOLDERS if name in kinds] if found.listing else ["transformer"]
    lacking = [name for name in kinds if name not in parts and name not in held]
    if "processor" in lacking:  # it brings the tokenizer
        lacking = [name for name in lacking if name != "tokenizer"]
    if lacking:
        example = f"a Diffusers folder or Hub name such as {RELEASED[cls.__name__]!r}"
        raise ValueError(
            f"{origin.name} holds no {' and no '.join(lacking)}: pass {lacking[0]}= ({example}), ..."
        )
    paths = {name: Path(origin.name) for name in held if name in kinds}
    if found.listing:
        files, plus = comfyui_files(found.listing), None
        if found.class_name in ALIKE:
            plus = found.class_name == "JoyImageEditPlusPipeline"
        single = {
            name: choose_file(origin.name, name, files.get(name, ()), plus, options.variant) for name in paths
        }
        _warn_of_two_models(
            found, [single[name] for name in ("transformer", "text_encoder") if name in single]
        )
        configs = {str(PurePosixPath(file).with_name("config.json")) for file in single.values()}
        root = origin.fetch([*single.values(), *sorted(configs & set(found.listing))])
        paths = {name: root / file for name, file in single.items()}
    for name, path in paths.items():
        parts[name] = plan_file(kinds[name], path, _with_dtype(cls, name, options))
    return parts


def _warn_of_two_models(found: Checkpoint, files: Sequence[str]) -> None:
    if found.class_name in ALIKE and len(set(map(is_called_plus, files))) > 1:
        log.warning(
            "Edit and Edit-Plus have text encoders of their own, but %s are of both", " and ".join(files)
        )


def save_checkpoint(
    pipe: Any,
    folder: Path,
    to: str = "diffusers",
    metadata: Mapping[str, str] | None = None,
    quantize: str | None = None,
) -> None:
    """Write a pipeline as "diffusers", "original" (JoyAI) or "comfyui" files. Raises FileExistsError for a
    folder that holds something, ValueError for what is not JoyAI-Image in another layout than "diffusers".

    `metadata` goes into the header of every safetensors file. quantize: "int8_convrot", of "comfyui" files;
    without it, quantised weights are written as what they mean, in the dtype that their network computes in.
    In the foreign layouts, too, a network of another size than the released one gets a config.json beside
    its file.
    """
    if to not in ("diffusers", "original", "comfyui"):
        raise ValueError(f"to={to!r}: must be 'diffusers', 'original' or 'comfyui'")
    if quantize is not None and (quantize not in QUANTISE or to != "comfyui"):
        raise ValueError(f"quantize={quantize!r}, to={to!r}: 'int8_convrot' is written as 'comfyui' files")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty")
    if to == "diffusers":
        pipe.save_pretrained(folder, metadata=metadata)
        return
    plus = isinstance(pipe, _open_class("JoyImageEditPlusPipeline"))
    if plus and to == "original":
        raise ValueError(
            f"to={to!r}: JoyAI-Image-Edit-Plus has no such layout, only 'diffusers' and 'comfyui'"
        )
    if not {"processor", "transformer"} <= set(pipe.components):
        known = {"unet": "Stable Diffusion", "transformer": "ChronoEdit"}
        kind = next((known[part] for part in known if part in pipe.components), "Qwen3-VL")
        raise ValueError(f"to={to!r} is for JoyAI-Image: {kind} is written as 'diffusers' only")
    lost = list(pipe.settings_to_save()) + ["made_for"] * bool(pipe.made_for.to_dict())
    if lost:
        log.warning("the %s layout has no place for %s: the released ones will be used", to, ", ".join(lost))
    if to == "comfyui":
        write_comfyui(pipe.networks, folder, plus, quantize, metadata)
    else:
        write_original(pipe, folder, metadata)
