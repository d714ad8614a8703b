"""Quantised weights in files, in the forms that ComfyUI writes; what they mean is in `joyedit.quantised`.

Beside the weight of a module `m` stand

    m.weight_scale    the scales: (O, 1) or one number; or, in files of scaled fp8 of 2025, m.scale_weight
    m.comfy_quant     JSON as bytes: {"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256},
                      {"format": "float8_e4m3fn"}, ...; some programs put all but the format under "params",
                      some the whole into the header, under _quantization_metadata
    m.scale_input     or input_scale: what activations in fp8 are multiplied with. Here they are not in fp8
    scaled_fp8        an empty tensor that says of a file that its weights in fp8 have an m.scale_weight

Nothing is guessed: a form that is not known, and scales that are missing or do not fit, are refused by name
before any weight is read.

Source: Comfy-Org/ComfyUI `comfy/utils.py`, `comfy/ops.py`; leejet/stable-diffusion.cpp
`docs/int8_convrot.md`.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from joyedit.checkpoints.json_files import parse_json
from joyedit.checkpoints.plain_text import shown
from joyedit.checkpoints.safetensors_files import metadata_json
from joyedit.checkpoints.stored_dtypes import PACKED, QUANTISED, refuse_quantised
from joyedit.checkpoints.tensor_files import Entry, TensorFiles
from joyedit.convert.table import Plan, Step
from joyedit.eight_bits import GROUP, largest_group, quantise
from joyedit.quantised import FP8, QuantisedLinear, QuantisedWeight, quantised_weights

MARK, SCALE, OLD_SCALE, OLD_MARK = ".comfy_quant", ".weight_scale", ".scale_weight", "scaled_fp8"
UNUSED = (".scale_input", ".input_scale")
METADATA = "_quantization_metadata"
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
LONGEST_MARK = 4096  # bytes
BLOCK = 2**20  # elements of a weight that are rebuilt or quantised at a time
# What a mark calls it -> the dtype of the weight.
FORMATS = {
    "int8_tensorwise": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
QUANTISE = ("int8_convrot",)  # what is written here


@dataclasses.dataclass(frozen=True)
class Form:
    """How one weight of a file is stored. scale: the tensor with its scales. group: of the rotation, or 1."""

    dtype: torch.dtype
    scale: str
    group: int


@dataclasses.dataclass(frozen=True)
class Rebuilt:
    """Reads a weight that is stored in a form as what it means, in `dtype`."""

    files: TensorFiles
    name: str
    form: Form
    dtype: torch.dtype

    @property
    def entry(self) -> Entry:
        return self.files.shapes[self.name], self.dtype, self

    def __call__(self, once: bool = False) -> Tensor:
        return self._weight().to(self.dtype).view(self.files.shapes[self.name])

    def pieces(self) -> Iterator[Tensor]:
        weight = self._weight()
        for start, end in _blocks(weight.shape):
            yield weight[start:end].to(self.dtype).flatten()

    def _weight(self) -> QuantisedWeight:
        stored = self.files.read_once(self.name).flatten(1)
        scale = column(self.form.scale, self.files.read_once(self.form.scale))
        return QuantisedWeight(stored, scale, self.form.group, self.dtype)


def _blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first and the last row, exclusively, of parts of a matrix."""
    rows, count = shape[0], max(BLOCK // max(shape[1], 1), 1)
    return ((start, min(start + count, rows)) for start in range(0, rows, count))


def column(name: str, scale: Tensor) -> Tensor:
    """Scales as (O, 1) or (1, 1) in fp32. Raises ValueError for what multiplies no weight."""
    wide = scale.float().reshape(-1, 1)
    if not wide.is_meta and not (wide.isfinite() & (wide >= 0)).all():
        raise ValueError(f"{name} holds scales that are negative, infinite or no numbers")
    return wide


def read_forms(files: TensorFiles) -> tuple[TensorFiles, dict[str, Form]]:
    """The tensors without what stands beside the weights, and how those weights are stored, by their names.

    Raises ValueError for a module whose form is unknown, or whose tensors do not fit it.
    """
    marks = dict(_marks(files))
    old = {name.removesuffix(OLD_SCALE) for name in files if name.endswith(OLD_SCALE)}
    found = {f"{module}.weight": _form(files, module, mark) for module, mark in marks.items()}
    for module in sorted(old - marks.keys()):
        found[f"{module}.weight"] = _old_form(files, module)
    scales = {form.scale for form in found.values()}
    left = [name for name in files if name not in scales and not _is_beside(name)]
    refuse_quantised(left)
    if found or len(left) < len(files):
        for name in left:
            if name not in found and files.dtypes[name] in FORMATS.values():
                kind = str(files.dtypes[name]).removeprefix("torch.")
                raise ValueError(f"{name} is quantised ({kind}), and its scales are missing")
    made = {name: Rebuilt(files, name, form, torch.float32).entry for name, form in found.items()}
    return files.renamed({name: name for name in left}).replaced(made), found


def keep_stored(
    network: nn.Module,
    plan: Plan,
    files: TensorFiles,
    forms: Mapping[str, Form],
    dtypes: dict[str, torch.dtype],
) -> dict[str, Step]:
    """Makes the layers of a network on meta that are filled from quantised weights hold them as they are
    stored. Returns their steps; sets their `dtypes`, which say until then in what they compute.

    Where a layout does more than rename, and where the weight is not that of a linear layer, there is no
    step: it is rebuilt when it is read.
    """
    steps = {}
    for name, step in plan.steps.items():
        form, (path, _, leaf) = forms.get(step.sources[0]), name.rpartition(".")
        layer = network.get_submodule(path)
        # Of a class derived from Linear nobody knows what it does with its weight.
        if form is None or leaf != "weight" or not step.is_renaming or not _is_linear(layer):
            continue
        scales = math.prod(files.shapes[form.scale])
        QuantisedLinear.replace(layer, form.dtype, scales, form.group, dtypes[name])
        scale = f"{path}{SCALE}"
        steps[name] = step
        steps[scale] = Step((form.scale,), functools.partial(_column_of, form.scale), 0)
        dtypes[name], dtypes[scale] = form.dtype, torch.float32
    return steps


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(layer, nn.Linear) and type(layer).__name__ == "Linear"


def _column_of(name: str, scale: list[Tensor]) -> list[Tensor]:
    return [column(name, scale[0])]


def plain_tensors(network: nn.Module, tensors: TensorFiles) -> TensorFiles:
    """The tensors of a network; those that are quantised are rebuilt when they are read, in the dtype that
    the network computes in."""
    weights = quantised_weights(network)
    forms = {
        name: Form(weight.stored.dtype, name.removesuffix(".weight") + SCALE, weight.group)
        for name, weight in weights.items()
    }
    scales = {form.scale for form in forms.values()}
    made = {name: Rebuilt(tensors, name, form, weights[name].dtype).entry for name, form in forms.items()}
    return tensors.renamed({name: name for name in tensors if name not in scales}).replaced(made)


def as_int8_convrot(tensors: TensorFiles, names: Collection[str]) -> TensorFiles:
    """`tensors`, those of `names` quantised when they are read, and beside each its scales and its mark."""
    made: dict[str, Entry] = {}
    for name in names:
        outputs, inputs = tensors.shapes[name]
        module, group = name.removesuffix(".weight"), largest_group(inputs)
        mark: dict[str, Any] = {"format": "int8_tensorwise"}
        if group > 1:
            mark |= {"convrot": True, "convrot_groupsize": group}
        text = torch.frombuffer(bytearray(json.dumps(mark).encode()), dtype=torch.uint8)
        made[name] = (outputs, inputs), torch.int8, _Quantised(tensors, name, group, 0)
        made[module + SCALE] = (outputs, 1), torch.float32, _Quantised(tensors, name, group, 1)
        made[module + MARK] = tuple(text.shape), torch.uint8, lambda text=text, once=False: text
    return tensors.replaced(made)


@dataclasses.dataclass(frozen=True)
class _Quantised:
    """Reads a weight in int8, part 0, or its scales, part 1."""

    tensors: TensorFiles
    name: str
    group: int
    part: int

    def __call__(self, once: bool = False) -> Tensor:
        return torch.cat(list(self.pieces())).view(self.tensors.shapes[self.name][0], -1)

    def pieces(self) -> Iterator[Tensor]:
        weight = self.tensors.read_once(self.name)
        for start, end in _blocks(weight.shape):
            rows = weight[start:end]
            if not rows.isfinite().all():
                raise ValueError(f"{self.name} holds infinite values or no numbers, and cannot be quantised")
            yield quantise(rows, self.group)[self.part].flatten()


def _is_beside(name: str) -> bool:
    return name == OLD_MARK or name.endswith((MARK, f".{OLD_MARK}", *UNUSED))


def weights_among(names: Iterable[str]) -> list[str]:
    """Names of tensors, those left out that say by their names how others are quantised, in any format."""
    scales = (*(end for end in QUANTISED if end != PACKED), OLD_SCALE)
    return [name for name in names if not _is_beside(name) and not name.endswith(scales)]


def _marks(files: TensorFiles) -> Iterator[tuple[str, dict[str, Any]]]:
    """(module, what its mark says), of the tensors and of the headers."""
    for path in files.files:
        if path.suffix == ".safetensors":
            layers = metadata_json(path, METADATA).get("layers", {})
            if not isinstance(layers, dict):
                raise ValueError(f"{path}: {METADATA} in its header names no layers")
            for module, mark in layers.items():
                # Of a view of some of the file's tensors those, which have lost their prefix there.
                names = (module, *(module.removeprefix(prefix) for prefix in PREFIXES))
                for name in dict.fromkeys(name for name in names if f"{name}.weight" in files):
                    yield name, _checked(name, mark)
    for name in files:
        if name.endswith(MARK):
            module = name.removesuffix(MARK)
            (length,) = files.shapes[name] if len(files.shapes[name]) == 1 else (0,)
            if files.dtypes[name] != torch.uint8 or not 0 < length <= LONGEST_MARK:
                raise ValueError(f"{name} is no text of at most {LONGEST_MARK} bytes")
            text = bytes(files.read_once(name).tolist()).decode("utf-8", "replace")
            yield module, _checked(module, parse_json(text, name))


def _checked(module: str, mark: Any) -> dict[str, Any]:
    if not isinstance(mark, dict) or not isinstance(mark.get("params", {}), dict):
        raise ValueError(f"{module}: its comfy_quant is no JSON object: {shown(mark)}")
    return {**mark.get("params", {}), **mark}


def _form(files: TensorFiles, module: str, mark: Mapping[str, Any]) -> Form:
    """Raises ValueError for a form that is not read here, or that the module's tensors do not fit."""
    kind = mark.get("format")
    if kind not in FORMATS:
        raise ValueError(
            f"{module} is quantised in the format {shown(kind)}, which is not read here: only "
            f"{', '.join(FORMATS)} are"
        )
    group = 1
    if kind == "int8_tensorwise" and mark.get("convrot", False):
        group = mark.get("convrot_groupsize", GROUP)
        if type(group) is not int or group < 4 or group & (group - 1) or group.bit_length() % 2 == 0:
            raise ValueError(f"{module}: convrot_groupsize must be a power of 4, not {shown(group)}")
    return _fitting(files, module, FORMATS[kind], SCALE, group)


def _old_form(files: TensorFiles, module: str) -> Form:
    stored = files.dtypes.get(f"{module}.weight")
    return _fitting(files, module, stored if stored in FP8 else FP8[0], OLD_SCALE, 1)


def _fitting(files: TensorFiles, module: str, dtype: torch.dtype, scale: str, group: int) -> Form:
    weight, scale = f"{module}.weight", module + scale
    for name in (weight, scale):
        if name not in files:
            raise ValueError(f"{module} is quantised, and {name} is missing")
    stored, shape = files.dtypes[weight], files.shapes[weight]
    if stored != dtype:
        kinds = [str(kind).removeprefix("torch.") for kind in (stored, dtype)]
        raise ValueError(f"{weight} is in {kinds[0]}, and the format of {module} is {kinds[1]}")
    if len(shape) < 2 or (dtype == torch.int8 and len(shape) > 2):
        raise ValueError(f"{weight} has shape {shape}: only matrices are quantised")
    if not files.dtypes[scale].is_floating_point:
        raise ValueError(f"{scale} holds no numbers of floating point")
    fits = [(), (1,), (1, 1)]
    if dtype == torch.int8 or scale.endswith(SCALE):
        fits += [(shape[0],), (shape[0], 1)]
    if files.shapes[scale] not in fits:
        raise ValueError(
            f"{scale} has shape {files.shapes[scale]}, which does not fit the weight of {module}, {shape}: "
            f"one number, or {(shape[0], 1)}"
        )
    if group > 1 and shape[1] % group:
        raise ValueError(f"{module}: convrot_groupsize {group} does not divide its {shape[1]} inputs")
    return Form(dtype, scale, group)
