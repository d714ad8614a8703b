"""Which files a checkpoint folder consists of, by layout: what may go when a new one takes its place.

Whoever replaces a folder loses all that lies in it, so anything that a checkpoint of that layout does not
consist of keeps it from being replaced: a model beside ours in ComfyUI's tree, a README, a thesis.
"""

import importlib
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from joyedit.checkpoints.hub import GENERATION_FILE, WEIGHT_SUFFIXES
from joyedit.checkpoints.network import Network
from joyedit.checkpoints.quantised_files import QUANTISE
from joyedit.loading.comfyui import COMFYUI_FOLDERS, PUBLISHED
from joyedit.loading.layouts import ORIGINAL_TEXT_ENCODER, PIPELINES
from joyedit.schedulers.scheduler import FILE as SCHEDULER_FILE
from joyedit.schedulers.scheduler import Scheduler
from joyedit.text.qwen3_vl_processor import IMAGE_FILES
from joyedit.text.tokenizer import TOKENIZER_FILES

# Of tokenizers and processors, ours and those that other programs write beside them.
SMALL_FILES = (*TOKENIZER_FILES, *IMAGE_FILES, "spiece.model", "tokenizer.model", "chat_template.json")


def refuse_strangers(folder: Path, layout: str) -> None:
    """Raises FileExistsError, naming it, for something in `folder` that no checkpoint of that layout has."""
    known = patterns(layout)
    for name in _entries(folder):
        if not any(_matches(name, pattern) for pattern in known):
            raise FileExistsError(
                f"{folder} holds {name}, which is no part of a checkpoint in the {layout} layout and would "
                "be lost: move it away, or choose another folder"
            )


def patterns(layout: str) -> list[str]:
    """The files of a checkpoint as fnmatch patterns of names relative to its folder."""
    if layout == "diffusers":
        return ["model_index.json", *_of_diffusers_parts()]
    if layout == "comfyui":
        ends = ("", "_plus", "-?????-of-?????", "_plus-?????-of-?????")
        own = ["config.json", *(f"*_joyimage{end}.safetensors" for end in ends)]
        ours = [f"{folder}/{name}" for folder in COMFYUI_FOLDERS.values() for name in own]
        for part, (name, _) in PUBLISHED.items():
            called = (name.format(plus=plus, form=form) for plus in ("", "_plus") for form in QUANTISE)
            ours += (f"{COMFYUI_FOLDERS[part]}/{stem}.safetensors" for stem in called)
        return ours
    if layout == "qwen3-vl":
        return [*_of_network("model"), *SMALL_FILES]
    networks = [
        "transformer/config.json",
        "transformer/transformer.pth",
        "vae/config.json",
        "vae/Wan2.1_VAE.pth",
    ]
    text = [*_of_network("model"), *SMALL_FILES]
    return ["infer_config.py", *networks, *(f"{ORIGINAL_TEXT_ENCODER}/{name}" for name in text)]


def _matches(name: str, pattern: str) -> bool:
    """Part by part: the star of a pattern stands for no slash."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _of_diffusers_parts() -> Iterator[str]:
    for name, module in PIPELINES.items():
        for part, kinds in getattr(importlib.import_module(module), name).parts.items():
            for kind in kinds:
                if issubclass(kind, Network):
                    files = _of_network(kind.weights_stem)
                else:
                    files = [SCHEDULER_FILE] if issubclass(kind, Scheduler) else SMALL_FILES
                yield from (f"{part}/{file}" for file in files)


def _of_network(stem: str) -> list[str]:
    endings = [*WEIGHT_SUFFIXES, ".safetensors.index*.json", ".bin.index*.json"]
    return [
        "config.json",
        GENERATION_FILE,
        *(f"{stem}{middle}{end}" for end in endings for middle in ("", ".*", "-*")),
    ]


def _entries(folder: Path) -> Iterator[str]:
    """Names of the files, links and empty folders below `folder`, relative and with forward slashes."""
    for root, folders, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        empty = [name for name in folders if name not in links and not any((Path(root) / name).iterdir())]
        for name in (*files, *links, *empty):
            yield (inside / name).as_posix()
