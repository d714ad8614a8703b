"""The same weights in two networks: ours made of a reference network, names and shapes of both, and how far
results are apart."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from joyedit.checkpoints.network import Network, load_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.table import Layout, plan_conversion

N = TypeVar("N", bound=Network)


def with_weights_of(model: Any, network_class: type[N], new_parameters: Sequence[str] = ()) -> N:
    """Our network with the reference's weights, through its config and the key table; new_parameters:
    patterns of what a fork adds."""
    is_diffusers = hasattr(model, "to_json_string")
    config = json.loads(model.to_json_string()) if is_diffusers else model.config.to_dict()
    files = TensorFiles.of(model.state_dict())
    config = network_class.Config.from_dict(config)
    return load_network(network_class, config, files, new_parameters=new_parameters)


def shapes(of: nn.Module | dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors."""
    state = of.state_dict() if isinstance(of, nn.Module) else of
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def recorded_shapes(shared_data: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a reference network at its published size."""
    with gzip.open(shared_data / "goldens" / "keys" / f"{name}.json.gz") as file:
        return {key: tuple(shape) for key, shape in json.load(file)["keys"]}


def check_layouts_run_backwards(
    layouts: Sequence[Layout], state: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Tensors of ours that are written in a layout are read from it as they were. Returns what is written,
    by the layout's name."""
    written = {}
    for layout in layouts:
        foreign = written[layout.name] = layout.invert(state)
        plan = plan_conversion([layout], shapes(foreign), shapes(state))
        assert set(plan.steps) == set(state)
        assert all(torch.equal(plan.steps[name].read(foreign), tensor) for name, tensor in state.items())
    return written


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, over the largest value of b."""
    assert a.shape == b.shape
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
