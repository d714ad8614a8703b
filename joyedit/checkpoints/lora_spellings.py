"""What diffusers' users give for adapters beside files and numbers: weights by block, layers of a trainer,
settings of PEFT.

A weight by block is {"down": 0.5, "mid": 1, "up": {"block_0": 0.2, "block_1": [0, 0.5, 1]}}, of a UNet alone:
a number for a side, for a block, or for each transformer of a block. What is not named has 1.

Source: diffusers `loaders/unet_loader_utils.py`, `loaders/lora_base.py`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from joyedit.checkpoints.lora_files import METADATA_KEY

SIDES = ("down", "mid", "up")


@dataclasses.dataclass(frozen=True)
class BlockWeights:
    """The weight of an adapter by block. given: as typed. parts: beginning of tensors' names -> weight."""

    given: Mapping[str, Any]
    parts: Mapping[str, float]

    @classmethod
    def read(cls, given: Mapping[str, Any], tensors: Iterable[str]) -> Self:
        """tensors: names of the network's. Raises ValueError for a block that is not there or has no
        transformer, and for a list of another length than the block has transformers."""
        counts = transformers_of(tensors)
        if not counts:
            raise ValueError(f"adapter_weights: weights by block {dict(given)} are for a UNet")
        if strange := [name for name in given if name not in SIDES]:
            raise ValueError(f"adapter_weights: {strange} is none of {', '.join(SIDES)}")
        parts = {}
        for (side, block), count in counts.items():
            chosen = given.get(side)
            if isinstance(chosen, Mapping):
                known = [f"block_{n}" for s, n in counts if s == side]
                if strange := [name for name in chosen if name not in known]:
                    raise ValueError(
                        f"adapter_weights: {side} has no {strange}; with transformers are {known}"
                    )
                chosen = chosen.get(f"block_{block}")
            numbers = chosen if isinstance(chosen, (list, tuple)) else [chosen]
            if len(numbers) not in (1, count):
                raise ValueError(f"adapter_weights: {side} wants {count} numbers, {list(numbers)} are given")
            where = "mid_block" if side == "mid" else f"{side}_blocks.{block}"
            for n in range(count):
                number = numbers[n % len(numbers)]
                if number is not None and (isinstance(number, bool) or not isinstance(number, (int, float))):
                    raise ValueError(f"adapter_weights: {number!r} for {side} is not a number")
                parts[f"{where}.attentions.{n}."] = 1.0 if number is None else float(number)
        return cls(given, parts)

    def of(self, tensor: str) -> float:
        """Other layers of a block have the weight of the transformer of their number, as in the reference."""
        path = tensor.split(".")
        alike = ".".join((*path[:2], "attentions", *path[3:4], ""))
        starts = (start for start in self.parts if tensor.startswith(start) or start == alike)
        return next((self.parts[start] for start in starts), 1.0)

    def __mul__(self, factor: float) -> "BlockWeights | _Times":
        return _Times(self, factor)

    __rmul__ = __mul__


@dataclasses.dataclass(frozen=True)
class _Times:
    """Weights by block, all of them times a number: also of what no block names."""

    weights: BlockWeights
    factor: float

    def of(self, tensor: str) -> float:
        return self.factor * self.weights.of(tensor)

    def __mul__(self, factor: float) -> "_Times":
        return _Times(self.weights, self.factor * factor)

    __rmul__ = __mul__


Strength = float | BlockWeights | _Times  # of an adapter in one network


def strength_at(strength: Strength, tensor: str) -> float:
    """The number that a tensor's delta is multiplied with."""
    return strength.of(tensor) if isinstance(strength, (BlockWeights, _Times)) else strength


def as_given(weight: Strength) -> Any:
    """The weight as `set_adapters` takes it."""
    return weight.given if isinstance(weight, BlockWeights) else weight


def transformers_of(tensors: Iterable[str]) -> dict[tuple[str, int], int]:
    """(side, number of block) of a UNet -> how many transformers it has, of those that have any."""
    found: dict[tuple[str, int], set[str]] = {}
    for name in tensors:
        path = name.split(".")
        if name.startswith("mid_block.attentions."):
            found.setdefault(("mid", 0), set()).add(path[2])
        elif path[0] in ("down_blocks", "up_blocks") and path[2] == "attentions":
            found.setdefault((path[0].removesuffix("_blocks"), int(path[1])), set()).add(path[3])
    return {place: len(numbers) for place, numbers in found.items()}


def packed_layers(layers: Mapping[str, Any], networks: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of `unet_lora_layers=` and its like, each a state dict or a module, by network and name.

    networks: those that there may be. Raises TypeError for an argument of another name.
    """
    known = {f"{network}_lora_layers": network for network in networks}
    if unknown := set(layers) - set(known):
        raise TypeError(f"unknown arguments {sorted(unknown)}; accepted: {sorted(known)}")
    state: dict[str, Tensor] = {}
    for argument, given in layers.items():
        tensors = given.state_dict() if isinstance(given, nn.Module) else given or {}
        state.update({f"{known[argument]}.{key}": tensor for key, tensor in tensors.items()})
    return state


def packed_metadata(metadata: Mapping[str, Mapping[str, Any] | None]) -> dict[str, str]:
    """The entry of a file's header for `unet_lora_adapter_metadata=` and its like: PEFT's settings (r,
    lora_alpha, ...) of each network. Nothing, where none are given."""
    named = {
        f"{argument.removesuffix('_lora_adapter_metadata')}.{key}": sorted(value)
        if isinstance(value, (set, frozenset))
        else value
        for argument, settings in metadata.items()
        for key, value in (settings or {}).items()
    }
    return {METADATA_KEY: json.dumps(named, indent=2, sort_keys=True)} if named else {}
