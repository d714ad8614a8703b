"""The networks of a checkpoint on the meta device, from its configs and the headers of its weight files.

Where a folder holds configs alone, the weights are taken to be as published: a large model in bf16, a small
one in fp32. What a file of one network lacks of the others is taken to be as released. Of a Hub repository
that is not in the cache, headers of safetensors files are read and nothing else of them.
"""

import dataclasses
import functools
import json
import posixpath
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from joyedit.checkpoints.hub import WEIGHT_SUFFIXES, Origin
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.network import AUTO_BF16_BYTES, HALF, Network, build_on_meta, plan_network
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.safetensors_files import DTYPES
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.eight_bits import largest_group
from joyedit.estimates.counting import storage
from joyedit.loading.comfyui import choose_file, comfyui_files
from joyedit.loading.layouts import ALIKE, ORIGINAL_TEXT_ENCODER, Checkpoint, read_infer_config
from joyedit.loading.single_file import read_single_file
from joyedit.memory import blocks_of, tensors_of
from joyedit.pipelines.pipeline import is_called
from joyedit.quantised import QuantisedLinear, quantisable

# What stands beside a quantised weight, where the text itself is not read.
MARKS = {
    torch.int8: {"format": "int8_tensorwise", "convrot": True},
    torch.float8_e4m3fn: {"format": "float8_e4m3fn"},
    torch.float8_e5m2: {"format": "float8_e5m2"},
}


@dataclasses.dataclass(frozen=True)
class Part:
    """A network on the meta device, its parameters in the dtypes in which they are held.

    disk: bytes of its files. mapped: whether it is held as it is stored, and so maps its files.
    """

    network: Network
    disk: int
    mapped: bool

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in tensors_of(self.network))

    @functools.cached_property
    def moved(self) -> int:
        """Without what stays in main memory wherever the network goes."""
        behind = (p for name, p in self.network.named_parameters() if self.network.stays_behind(name))
        return self.nbytes - sum(p.nbytes for p in behind)

    @functools.cached_property
    def blocks(self) -> list[int]:
        """Bytes of each block that can come by itself."""
        return [nbytes_of(block) for block in blocks_of(self.network)]

    def read_of(self, storages: Collection[int]) -> int:
        """Bytes of the weights that have one of these storages."""
        return sum(t.nbytes for t in tensors_of(self.network) if storage(t) in storages)

    def rest_of(self, storages: Collection[int]) -> int:
        """What a CPU holds beside the blocks when weights with these storages have been read."""
        if not self.mapped:
            return self.nbytes - sum(self.blocks)
        inside = {storage(t) for block in blocks_of(self.network) for t in tensors_of(block)}
        return self.read_of(set(storages) - inside)

    def quantised(self) -> "Part":
        """As `joyedit convert --quantize int8_convrot` writes it. Changes the network itself."""
        network = self.network
        dtype, before = network.dtype, nbytes_of(network)
        for name in quantisable(network):
            layer = network.get_submodule(name.removesuffix(".weight"))
            if type(layer).__name__ == "Linear" and isinstance(layer, nn.Linear):
                outputs, inputs = layer.weight.shape
                QuantisedLinear.replace(layer, torch.int8, outputs, largest_group(inputs), dtype)
        return Part(network, self.disk - before + nbytes_of(network), self.mapped)


def nbytes_of(module: nn.Module) -> int:
    return sum(t.nbytes for t in tensors_of(module))


def open_parts(found: Checkpoint, options: LoadOptions) -> dict[str, Part]:
    """The networks that a checkpoint's pipeline has. Raises FileNotFoundError and ValueError for configs and
    headers that do not fit, as `joyedit.load`."""
    if found.layout == "ldm":
        single = read_single_file(Path(found.origin.name))
        return {name: _planned(single.plan(name, options.of_part(name))) for name in single.networks}
    opened: dict[str, Part | tuple[type[Network], Any]] = {}
    for name, kind in _kinds(found).items():
        folder, files = _weights(found, name, kind, options)
        config = kind.Config.from_dict(_settings(found, name, folder))
        if not files:
            opened[name] = kind, config
            continue
        chosen = options.of_part(name, found.pipeline.auto_dtypes.get(name))
        read = _headers(found.origin, files)
        planned = plan_network(kind, config, read, chosen.dtype, chosen.new_parameters)
        size = sum(_sizes(found, files).values())
        opened[name] = _planned(planned, size)
    return _as_published(found, opened, options)


def config_of(found: Checkpoint, name: str, options: LoadOptions) -> Any:
    """The config of a network, without its weights."""
    kind = _kinds(found)[name]
    folder, _ = _weights(found, name, kind, options)
    return kind.Config.from_dict(_settings(found, name, folder))


def _planned(planned: Any, size: int | None = None) -> Part:
    """size: of its files; None: as much as its tensors."""
    stored, network = planned.files.dtypes, planned.network
    for name, tensor in network.state_dict(keep_vars=True).items():
        tensor.data = torch.empty(tensor.shape, dtype=planned.dtypes[name], device="meta")
    mapped = all(
        stored[source] == planned.dtypes[name] and len(step.sources) == 1
        for name, step in planned.plan.steps.items()
        for source in step.sources
    )
    disk = planned.files.nbytes() if size is None else size
    return Part(network.requires_grad_(False).eval(), disk, mapped)


def _as_published(
    found: Checkpoint, opened: Mapping[str, Part | tuple[type[Network], Any]], options: LoadOptions
) -> dict[str, Part]:
    """The parts that have no files made from their configs."""
    parts: dict[str, Part] = {}
    lacking = {name: build_on_meta(*one) for name, one in opened.items() if isinstance(one, tuple)}
    large = any(nbytes_of(network) > AUTO_BF16_BYTES for network in lacking.values())
    large = large or any(isinstance(one, Part) and one.network.dtype in HALF for one in opened.values())
    for name, one in opened.items():
        if isinstance(one, Part):
            parts[name] = one
            continue
        stored = torch.bfloat16 if large else torch.float32
        network = lacking[name].to(stored)
        disk = nbytes_of(network)
        asked = options.of_part(name, found.pipeline.auto_dtypes.get(name)).dtype
        network = network.to(stored if asked is None else asked)
        parts[name] = Part(network.requires_grad_(False).eval(), disk, asked in (None, stored))
    return parts


def _kinds(found: Checkpoint) -> dict[str, type[Network]]:
    """The classes of the networks."""
    kinds: dict[str, tuple[type, ...]] = dict(found.pipeline.parts)
    if found.layout == "diffusers":
        index = read_json(found.origin.fetch(["model_index.json"]) / "model_index.json")
        entries = {name: index[name][1] for name in kinds if isinstance(index.get(name), list)}
        kinds = {
            name: tuple(kind for kind in kinds[name] if isinstance(listed, str) and is_called(kind, listed))
            for name, listed in entries.items()
        }
    first = {name: classes[0] for name, classes in kinds.items() if classes}
    return {name: kind for name, kind in first.items() if issubclass(kind, Network)}


def _weights(
    found: Checkpoint, name: str, kind: type[Network], options: LoadOptions
) -> tuple[str, Sequence[str]]:
    """The folder of a network in the checkpoint, and its weight files; none where there are none."""
    if found.layout == "comfyui":
        if not found.listing:
            return "", [found.origin.name] if name == "transformer" else []
        plus = found.class_name == "JoyImageEditPlusPipeline" if found.class_name in ALIKE else None
        candidates = comfyui_files(found.listing).get(name, ())
        if not candidates:
            return "", []
        file = choose_file(found.origin.name, name, candidates, plus, options.variant)
        return posixpath.dirname(file), [file]
    folder = {"diffusers": name, "qwen3-vl": ""}.get(found.layout, name)
    if found.layout == "original" and name == "text_encoder":
        folder = ORIGINAL_TEXT_ENCODER
    elif found.layout == "original":
        inside = [file for file in found.listing if posixpath.dirname(file) == folder]
        return folder, [file for file in inside if file.endswith(WEIGHT_SUFFIXES)][:1]
    for variant in dict.fromkeys((options.variant, None)):
        try:
            files = found.origin.network_files(folder, kind.weights_stem, variant, None)
        except FileNotFoundError:
            continue
        return folder, [file for file in files if file.endswith(WEIGHT_SUFFIXES)]
    return folder, []


def _settings(found: Checkpoint, name: str, folder: str) -> Mapping[str, Any]:
    """What a network's config says; nothing, which is the released one, where there is none."""
    if found.layout == "original" and name == "transformer":
        file = "infer_config.py"
        known = file in found.listing
        return read_infer_config(found.origin.fetch([file]) / file).get("params", {}) if known else {}
    if not found.listing:  # a file
        beside = Path(found.origin.name).with_name("config.json")
        return read_json(beside) if name == "transformer" and beside.is_file() else {}
    file = posixpath.join(folder, "config.json")
    return read_json(found.origin.fetch([file]) / file) if file in found.listing else {}


def _sizes(found: Checkpoint, files: Sequence[str]) -> Mapping[str, int]:
    return found.origin.sizes(files) if found.listing else {f: Path(f).stat().st_size for f in files}


def _headers(origin: Origin, files: Sequence[str]) -> TensorFiles:
    """Names, shapes and dtypes of the tensors in these files."""
    if Path(origin.name).is_file():
        return TensorFiles([Path(origin.name)])
    places = [origin.find(file) for file in files]
    if all(places):
        return TensorFiles([place for place in places if place is not None])
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            raise ValueError(f"{origin.name}/{file} is no safetensors file: its header cannot be read alone")
        tensors |= _header_on_hub(origin, file)
    for name in list(tensors):
        weight = tensors.get(f"{name.removesuffix('.comfy_quant')}.weight")
        if name.endswith(".comfy_quant") and weight is not None and weight.dtype in MARKS:
            text = json.dumps(MARKS[weight.dtype]).encode()
            tensors[name] = torch.tensor(list(text), dtype=torch.uint8)
    return TensorFiles.of(tensors)


def _header_on_hub(origin: Origin, file: str) -> dict[str, torch.Tensor]:
    from huggingface_hub import HfApi

    with origin.explained():
        api = HfApi(token=origin.token)
        header = api.parse_safetensors_file_metadata(origin.name, file, revision=origin.commit)
    return {
        name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        for name, entry in header.tensors.items()
    }
