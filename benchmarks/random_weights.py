"""Checkpoints of any size with seeded random weights: they are drawn piece by piece while they are written,
so that no tensor of them is ever in memory.

Matrices have the scale with which what goes in comes out as large, norms are near 1: activations stay finite
at any depth. `read_tensor` reads a tensor back without mapping the file or knowing a network: what is
compared with that has gone another way.
"""

import dataclasses
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from joyedit.checkpoints.json_files import write_json
from joyedit.checkpoints.network import Network, build_on_meta
from joyedit.checkpoints.quantised_files import as_int8_convrot
from joyedit.checkpoints.tensor_files import Entry, TensorFiles, save_tensors
from joyedit.quantised import quantisable

PIECE = 2**20  # numbers that are drawn at a time
KINDS = {"BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8}
SPREAD = 32  # standard deviation of int8 weights, as large as rotated ones have it


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Reads a tensor of random numbers, the same every time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    mean: float
    std: float
    seed: int

    @property
    def entry(self) -> Entry:
        return self.shape, self.dtype, self

    def pieces(self) -> Iterator[Tensor]:
        generator, count = torch.Generator().manual_seed(self.seed), math.prod(self.shape)
        for done in range(0, count, PIECE):
            numbers = torch.randn(min(PIECE, count - done), generator=generator)
            numbers.mul_(self.std).add_(self.mean)
            yield (numbers.round_().clamp_(-127, 127) if self.dtype == torch.int8 else numbers).to(self.dtype)

    def __call__(self, once: bool = False) -> Tensor:
        return torch.cat(list(self.pieces())).view(self.shape)


def drawn(network: Network, dtype: torch.dtype, seed: int, form: str | None = None) -> TensorFiles:
    """The weights of a network that is on the meta device, under the names of a Diffusers folder. form:
    "int8_convrot" for those of its blocks."""
    names = quantisable(network) if form else set()
    entries = {}
    for name, tensor in network.state_dict().items():
        kind = torch.float32 if network.stays_fp32(name) else dtype
        number = zlib.crc32(f"{seed} {name}".encode())
        entries[name] = Drawn(tuple(tensor.shape), kind, *spread(name, tensor.shape), number).entry
    plain = TensorFiles([]).replaced(entries).spelled(network.layouts()[0])
    if not names:
        return plain
    made = as_int8_convrot(plain, names)  # for the marks; numbers and scales are drawn
    for name in names:
        shape, scale = plain.shapes[name], f"{name.removesuffix('.weight')}.weight_scale"
        number, std = zlib.crc32(f"{seed} {name}".encode()), shape[1] ** -0.5 / SPREAD
        made = made.replaced(
            {
                name: Drawn(shape, torch.int8, 0.0, SPREAD, number).entry,
                scale: Drawn((shape[0], 1), torch.float32, std, std / 10, number + 1).entry,
            }
        )
    return made


def spread(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation of a parameter."""
    if name.endswith("gamma") or len(shape) == 1:
        return float(name.endswith(("gamma", "weight"))), 0.02
    return 0.0, math.prod(shape[1:]) ** -0.5


def write_part(
    folder: Path, cls: type[Network], config: Any, dtype: torch.dtype, seed: int, form: str | None = None
) -> int:
    """One network of a Diffusers folder, all its weights in one file. Returns the bytes of that."""
    network = build_on_meta(cls, config).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", network.config_to_save())
    tensors = drawn(network, dtype, seed, form)
    save_tensors(folder, network.weights_stem, tensors, tensors.nbytes() + 1)
    return tensors.nbytes()


def part_bytes(cls: type[Network], config: Any, dtype: torch.dtype, form: str | None = None) -> int:
    """What `write_part` would write."""
    return drawn(build_on_meta(cls, config).to(dtype), dtype, 0, form).nbytes()


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def read_tensor(path: Path, name: str) -> np.ndarray:
    """A tensor of a safetensors file: in its own dtype, or of bf16 the same numbers in fp32."""
    header, data = read_header(path)
    entry = header[name]
    kind = {"BF16": np.uint16, "F32": np.float32, "I8": np.int8, "U8": np.uint8}[entry["dtype"]]
    begin, end = entry["data_offsets"]
    count = (end - begin) // np.dtype(kind).itemsize
    numbers = np.fromfile(path, kind, count, offset=data + begin).reshape(entry["shape"])
    return (numbers.astype(np.uint32) << 16).view(np.float32) if entry["dtype"] == "BF16" else numbers


def read_module(path: Path, prefix: str) -> dict[str, Tensor]:
    """The weights of one module, all as what they mean in fp32. int8_convrot: W = (Q s) R."""
    header, _ = read_header(path)
    names = [name for name in header if name.startswith(f"{prefix}.")]
    state: dict[str, Tensor] = {}
    for name in names:
        module = name.rpartition(".")[0]
        if name.endswith((".weight_scale", ".comfy_quant")):
            continue
        numbers = torch.from_numpy(read_tensor(path, name))
        if name.endswith(".weight") and f"{module}.weight_scale" in header:
            mark = json.loads(read_tensor(path, f"{module}.comfy_quant").tobytes())
            scale = torch.from_numpy(read_tensor(path, f"{module}.weight_scale"))
            numbers = rotated(numbers.float() * scale, mark)
        state[name.removeprefix(f"{prefix}.")] = numbers
    return state


def read_stored(path: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The weights of one module as they are stored, each as far into 64 bytes of memory as of the file; and
    of its layers that are in int8 the groups that are rotated."""
    header, data = read_header(path)
    state, groups = {}, {}
    for name in (name for name in header if name.startswith(f"{prefix}.")):
        entry, inside = header[name], name.removeprefix(f"{prefix}.")
        if name.endswith(".comfy_quant"):
            mark = json.loads(read_tensor(path, name).tobytes())
            groups[inside.removesuffix(".comfy_quant")] = (
                mark["convrot_groupsize"] if "convrot" in mark else 1
            )
            continue
        begin, end = (data + offset for offset in entry["data_offsets"])
        room = torch.empty(end - begin + 64, dtype=torch.uint8)
        shift = (begin - room.data_ptr()) % 64
        content = room[shift : shift + end - begin]
        with path.open("rb") as file:
            file.seek(begin)
            file.readinto(content.numpy().data)
        state[inside] = content.view(KINDS[entry["dtype"]]).view(entry["shape"])
    return state, groups


def rotated(weight: Tensor, mark: Mapping[str, Any]) -> Tensor:
    """weight (O, I), groups of its inputs times the Kronecker power of a 4 x 4 matrix."""
    size = mark.get("convrot_groupsize", 1)
    turn, four = torch.ones(1, 1), (1 - 2 * torch.eye(4).flip(1)) / 2
    while len(turn) < size:
        turn = torch.kron(turn, four)
    return (weight.unflatten(1, (-1, size)) @ turn).flatten(1)
