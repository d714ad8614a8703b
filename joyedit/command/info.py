"""What a checkpoint holds and what this installation is, for `joyedit info` and for decisions before work.

Of weights only names, shapes and dtypes are read: the headers of safetensors files, and pickles mapped into
memory. Of a Hub repository that is not in the cache only the small JSON files are fetched; sizes then come
from the Hub, and the number of parameters stays unknown.
"""

import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import platform
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from joyedit import __version__, ops
from joyedit.checkpoints.hub import Origin, choose_weight_files, shards_of
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.lora_files import family_of, is_lora
from joyedit.checkpoints.network import AUTO_BF16_BYTES, Network, build_on_meta
from joyedit.checkpoints.options import parse_dtype
from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import visible
from joyedit.checkpoints.quantised_files import read_forms, weights_among
from joyedit.checkpoints.tensor_files import TensorFiles, safetensors_header
from joyedit.convert.table import plan_conversion
from joyedit.loading.comfyui import COMFYUI_FOLDERS, comfyui_files
from joyedit.loading.layouts import (
    ORIGINAL_TEXT_ENCODER,
    PIPELINES,
    WEIGHT_SUFFIXES,
    layout_of,
    licence_of,
    pipeline_for,
    pipeline_name,
    place_of,
    read_infer_config,
)
from joyedit.loading.single_file import read_single_file
from joyedit.pipelines.chronoedit_presets import PRESETS
from joyedit.pipelines.made_for import MadeFor
from joyedit.pipelines.pipeline import is_called

# The settings that tell one checkpoint from another, where a config has them.
KEY_SETTINGS = """
    hidden_size num_layers num_hidden_layers depth num_attention_heads num_heads num_key_value_heads head_dim
    text_dim rope_dim_list in_channels patch_size vocab_size base_dim z_dim dim_mult num_res_blocks shift
    use_dynamic_shifting joyai_original num_train_timesteps block_out_channels layers_per_block
    cross_attention_dim attention_head_dim use_linear_projection scaling_factor hidden_act beta_schedule
    prediction_type image_dim d_model flow_shift
""".split()


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a checkpoint. `parameters`, and how many have each dtype, are None where no header is."""

    class_name: str
    files: tuple[str, ...]
    bytes: int
    parameters: int | None = None
    dtypes: Mapping[str, int] | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def bytes_as(self, dtype: torch.dtype | None) -> int:
        """Size when written in `dtype`; None as `joyedit.load` does by itself."""
        if not self.parameters or not self.dtypes:
            return self.bytes
        if dtype is None and (set(self.dtypes) != {"float32"} or self.bytes <= AUTO_BF16_BYTES):
            return self.bytes
        return self.parameters * (dtype or torch.bfloat16).itemsize


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: `revision` is the Hub's commit, `provenance` what `joyedit convert` noted,
    `presets` the names that `joyedit.load` takes for it and the adapters behind them, `made_for` what it says
    of its use."""

    name: str
    layout: str
    pipeline: str
    revision: str | None
    licence: str
    parts: Mapping[str, Part]
    bytes: int
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    presets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    made_for: MadeFor = MadeFor()

    @property
    def parameters(self) -> int | None:
        counts = [part.parameters for part in self.parts.values() if is_weights(part.files)]
        return None if None in counts else sum(filter(None, counts))

    def bytes_as(self, dtype: torch.dtype | str | None) -> int:
        """Size when written in `dtype`; None as `joyedit.load` does by itself."""
        asked = parse_dtype(dtype)
        auto = getattr(pipeline_class(self.pipeline), "auto_dtypes", {})
        return sum(part.bytes_as(asked or auto.get(name)) for name, part in self.parts.items())

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "made_for": self.made_for.to_dict(),
            "parameters": self.parameters,
        }

    def lines(self) -> list[str]:
        """As a table for people."""
        table = [("part", "class", "parameters", "dtype", "size")]
        for name, part in self.parts.items():
            dtypes = " + ".join(sorted(part.dtypes or ())) if part.files else "no files"
            table.append((name, part.class_name, count(part.parameters), dtypes, size(part.bytes)))
        table.append(("total", "", count(self.parameters or None), "", size(self.bytes)))
        facts = {
            "name": self.name,
            "pipeline": self.pipeline,
            "opened as": opened if (opened := pipeline_for(self.pipeline)) != self.pipeline else None,
            "layout": self.layout,
            "revision": self.revision,
            "licence": self.licence,
            "presets": dict(self.presets) or None,
            "made for": self.made_for.world.about if self.made_for.world else None,
            "basesize": self.made_for.basesize,
            "settings": dict(self.made_for.call) or None,
            **{key: text for key, text in self.provenance.items() if key != "license"},
        }
        settings = {
            name: ", ".join(f"{key}={value}" for key, value in key_settings(part.config))
            for name, part in self.parts.items()
        }
        return [*lines_of(facts), "", *columns(table), "", *lines_of(settings)]


def describe(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
) -> Checkpoint:
    """What the folder, weight file or Hub repository `name` holds; names and errors as in `joyedit.load`."""
    if (place := place_of(name)) != name:
        return dataclasses.replace(describe(place), name=name)
    path = expanded(name)
    if path.is_file():
        return describe_file(path)
    source = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    origin = Origin(name, **source)
    listing = origin.listing()
    layout = layout_of(name, listing)
    index: Mapping[str, Any] = {}
    if layout == "diffusers":
        index = read_json(origin.fetch(["model_index.json"]) / "model_index.json")
    pipeline = index.get("_class_name") or pipeline_name(name, **source)
    parts, headers = {}, []
    for part, (class_name, folder) in places(layout, pipeline, index).items():
        kind = known_class(pipeline, part, class_name)
        inside = [file for file in listing if posixpath.dirname(file) == folder]
        if layout == "comfyui":
            inside = comfyui_files(listing).get(part, [])
        if issubclass(kind, Network):
            files = weight_files(origin, layout, folder, inside, kind, variant)
        else:
            files = [file for file in inside if not is_weights([file])]
        found = [local for file in files if (local := origin.find(file))]
        counted = len(found) == len(files) and is_weights(files)
        dtypes = count_dtypes(found) if counted else None
        parts[part] = Part(
            class_name,
            tuple(files),
            sum(origin.sizes(files).values()),
            sum(dtypes.values()) if dtypes is not None else None,
            dtypes,
            read_config(origin, listing, layout, folder, part, kind),
        )
        headers += found
    provenance = read_provenance(headers)
    licence = licence_of(origin, listing)
    if licence == "not stated":
        licence = provenance.get("license", licence)
    used = {file for part in parts.values() for file in part.files}
    files = {name: [adapter.file for adapter in preset.adapters] for name, preset in PRESETS.items()}
    presets = {name: " and ".join(own) for name, own in files.items() if {*own} <= {*listing}}
    return Checkpoint(
        name,
        layout,
        pipeline,
        origin.commit,
        licence,
        parts,
        sum(origin.sizes(used).values()),
        provenance,
        presets if pipeline_for(pipeline) == "ChronoEditPipeline" else {},
        MadeFor.from_index(index, name),
    )


def describe_file(path: Path) -> Checkpoint:
    """What a single weight file holds: Stable Diffusion, the first network whose names and shapes it fits, or
    a LoRA."""
    layout = layout_of(str(path), [])
    if layout == "ldm":
        return describe_single_file(path)
    files = TensorFiles([path])
    beside = path.with_name("config.json")
    raw = read_json(beside) if beside.is_file() else {}
    part, class_name, config = "unknown", "not recognised", raw
    known = [(name, kind) for p in PIPELINES for name, kinds in pipeline_parts(p).items() for kind in kinds]
    for name, kind in known:
        if issubclass(kind, Network) and fits(kind, raw, files):
            part, class_name, config = name, kind.__name__, kind.Config.from_dict(raw).to_dict()
            break
    if part == "unknown" and is_lora(files):
        part, class_name = "adapter", f"LoRA of {family_of(files) or 'an unknown network'}"
    dtypes = count_dtypes([path])
    size = path.stat().st_size
    found = Part(class_name, (path.name,), size, sum(dtypes.values()), dtypes, config)
    provenance = read_provenance([path])
    licence = provenance.get("license", "not stated")
    return Checkpoint(str(path), layout, "one network", None, licence, {part: found}, size, provenance)


def describe_single_file(path: Path) -> Checkpoint:
    """Each network of a whole Stable Diffusion file."""
    parts = {}
    for part, (kind, config, files) in read_single_file(path).networks.items():
        dtypes = dtypes_of(files)
        parts[part] = Part(
            kind.__name__, (path.name,), files.nbytes(), sum(dtypes.values()), dtypes, config.to_dict()
        )
    provenance = read_provenance([path])
    licence = provenance.get("license", "not stated")
    name, size = "StableDiffusionDiffEditPipeline", path.stat().st_size
    return Checkpoint(str(path), "ldm", name, None, licence, parts, size, provenance)


def fits(kind: type[Network], raw: Mapping[str, Any], files: TensorFiles) -> bool:
    """Whether a file holds this network."""
    try:
        files, _ = read_forms(files)
        network = build_on_meta(kind, kind.Config.from_dict(raw))
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        plan_conversion(network.layouts(), files.shapes, wanted)
    except (TypeError, ValueError):
        return False
    return True


def places(layout: str, pipeline: str, index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The class and the folder of each part."""
    if layout == "diffusers":
        return {
            part: (entry[1], part)
            for part, entry in index.items()
            if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)
        }
    classes = {part: kinds[0].__name__ for part, kinds in pipeline_parts(pipeline).items()}
    folders: Mapping[str, str] = COMFYUI_FOLDERS
    if layout == "qwen3-vl":
        folders = dict.fromkeys(classes, "")
    if layout == "original":
        folders = dict.fromkeys(("text_encoder", "tokenizer", "processor"), ORIGINAL_TEXT_ENCODER)
        folders |= {"transformer": "transformer", "vae": "vae"}
    return {part: (classes[part], folder) for part, folder in folders.items() if part in classes}


def pipeline_parts(pipeline: str) -> Mapping[str, tuple[type, ...]]:
    """The parts of a pipeline of ours, or of the one of ours that opens its folders; none for others."""
    return getattr(pipeline_class(pipeline), "parts", {})


def pipeline_class(pipeline: str) -> type | None:
    ours = pipeline_for(pipeline)
    return getattr(importlib.import_module(PIPELINES[ours]), ours) if ours else None


def known_class(pipeline: str, part: str, class_name: str) -> type:
    """Our class of that name; for others `Network`, or `object` for what has no weights by its name."""
    for kind in pipeline_parts(pipeline).get(part, ()):
        if is_called(kind, class_name):
            return kind
    without_weights = ("Scheduler", "Tokenizer", "TokenizerFast", "Processor", "Extractor")
    return object if class_name.endswith(without_weights) else Network


def weight_files(
    origin: Origin, layout: str, folder: str, inside: Sequence[str], kind: type[Network], variant: str | None
) -> list[str]:
    """The files with the weights of one network; none where the folder holds a config alone."""
    if layout == "comfyui" or (layout == "original" and folder != ORIGINAL_TEXT_ENCODER):
        return [file for file in inside if is_weights([file])]
    names = [PurePosixPath(file).name for file in inside]
    stems = (kind.weights_stem,) if kind is not Network else ("diffusion_pytorch_model", "model")
    for stem, wanted in itertools.product(stems, dict.fromkeys((variant, None))):
        try:
            chosen = choose_weight_files(names, stem, wanted, None, f"{origin.name}/{folder}")
        except FileNotFoundError:
            continue
        if chosen[0].endswith(".json"):
            index = posixpath.join(folder, chosen[0])
            chosen = shards_of(origin.fetch([index]) / index)
        return [posixpath.join(folder, file) for file in chosen]
    return []


def read_config(
    origin: Origin, listing: Sequence[str], layout: str, folder: str, part: str, kind: type
) -> dict[str, Any]:
    """The settings of a part, in our spelling where they are those of a network that we have."""
    if layout == "original" and part == "transformer":
        settings = "infer_config.py"
        raw = (
            read_infer_config(origin.fetch([settings]) / settings).get("params", {})
            if settings in listing
            else {}
        )
    else:
        names = [posixpath.join(folder, name) for name in ("config.json", "scheduler_config.json")]
        file = next((name for name in names if name in listing), None)
        if file is None and not issubclass(kind, Network):
            return {}
        if layout in ("original", "qwen3-vl") and not issubclass(kind, Network):
            return {}  # the folder is shared, and its config.json is the text encoder's
        raw = read_json(origin.fetch([file]) / file) if file else {}
    if issubclass(kind, Network) and kind is not Network:
        try:
            return kind.Config.from_dict(raw).to_dict()
        except (TypeError, ValueError):
            pass  # `joyedit.load` says what is wrong with it
    return {key: value for key, value in raw.items() if not key.startswith("_")}


def count_dtypes(files: Sequence[Path]) -> dict[str, int]:
    """How many parameters of each dtype the weight files hold."""
    counted: Counter[str] = Counter()
    for file in files:
        counted.update(dtypes_of(TensorFiles([file])))
    return dict(counted)


def dtypes_of(files: TensorFiles) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for name in weights_among(files):
        dtype = str(files.dtypes[name]).removeprefix("torch.")
        counted[dtype] += torch.Size(files.shapes[name]).numel()
    return dict(counted)


def read_provenance(files: Iterable[Path]) -> dict[str, str]:
    """What the first safetensors file written by `joyedit convert` says about where it comes from."""
    for file in files:
        if file.suffix == ".safetensors":
            noted = safetensors_header(file).get("__metadata__", {})
            if "joyedit.version" in noted:
                return {key: noted[key] for key in sorted(noted) if key != "format" and noted[key]}
    return {}


def is_weights(files: Iterable[str]) -> bool:
    return any(file.endswith(WEIGHT_SUFFIXES) for file in files)


def environment() -> dict[str, Any]:
    """Versions, devices and what they compute in: what a bug report should hold."""
    bf16 = str(ops.compute_dtype(torch.bfloat16, "cpu")).removeprefix("torch.")
    found: dict[str, Any] = {
        "joyedit": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    for package in ("torch", "triton", "safetensors", "huggingface_hub", "tokenizers", "numpy", "pillow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    capability = torch.backends.cpu.get_cpu_capability()
    found["cpu"] = f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"
    found["bfloat16 weights on the cpu"] = f"computed in {bf16}"
    found["accelerators"] = accelerators() or "none"
    if torch.cuda.is_available():
        kinds = ("flash", "mem_efficient", "cudnn", "math")
        enabled = [kind for kind in kinds if getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()]
        found["attention on the accelerator"] = f"scaled_dot_product_attention ({', '.join(enabled)})"
    return found


def accelerators() -> list[str]:
    found = ["mps"] if torch.backends.mps.is_available() else []
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        capability = f"capability {facts.major}.{facts.minor}"
        found.append(f"cuda:{number} {facts.name}, {size(facts.total_memory)}, {capability}, {toolkit}")
    return found


def lines_of(facts: Mapping[str, Any]) -> list[str]:
    """ "name: value" for everything that has a value; nested values as JSON."""
    lines = []
    for name, value in facts.items():
        if value is not None and value != "":
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f"{visible(name, None)}: {visible(text, None)}")
    return lines


def json_text(found: Mapping[str, Any]) -> str:
    """JSON for people to read, with escapes for what a terminal would obey."""
    text = json.dumps(found, indent=2, ensure_ascii=False)
    escapes = {}
    for letter in {letter for letter in text if not letter.isprintable() and letter != "\n"}:
        beyond_ascii = json.dumps(letter)[1:-1]  # a pair of escapes above U+FFFF
        escapes[ord(letter)] = beyond_ascii if letter > "\x7f" else f"\\u{ord(letter):04x}"
    return text.translate(escapes)


def key_settings(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """The telling settings of a config and of the configs inside it."""
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += key_settings(value, f"{key}.")
        elif key in KEY_SETTINGS and value is not None:
            found.append((prefix + key, value))
    return found


def columns(table: Sequence[Sequence[str]]) -> list[str]:
    """Text in columns, numbers to the right."""
    table = [[visible(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in (2, 4) else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def count(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters:,}"


def size(number: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return f"{number} B"
