"""A network whose weights are divided among processes (FSDP2): each has some rows of every tensor, and what a
block needs comes together when the block is reached.

    apart      what stays in fp32 is gathered in fp32, all else in the dtype of computing
    entrances  what is called beside the forward of a block or of the network
    shard      block by block, then the rest
    fill       rows of tensors that are still in their files

A network is divided while it has no memory, so that none of the processes ever holds it whole. Trained rows
are fp32, gradients are added in fp32. The optimiser sees rows as parameters of their own (`own_rows`), and
knows nothing of the others.

Source: arXiv 2304.11277; PyTorch `torch/distributed/fsdp/_fully_shard`; torchtitan `flux/parallelize.py`.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from joyedit.checkpoints.network import Network
from joyedit.checkpoints.recomputing import members
from joyedit.models import chronoedit_dit, joyimage_mmdit, sd_unet
from joyedit.quantised import QuantisedLinear
from joyedit.training.processes import Processes

# What is called of a network or a part of it, beside `forward`, and reads weights there: they are gathered
# before, as they are before `forward`. What these call in turn needs no entry.
ENTRANCES: dict[type[nn.Module], tuple[str, ...]] = {
    joyimage_mmdit.JoyImageEditTransformer3DModel: (
        *("embed_image", "embed_text", "embed_time"),
        "predict_branches",
    ),
    chronoedit_dit.ChronoEditTransformer3DModel: (
        *("embed_image", "embed_text", "embed_time"),
        "predict_branches",
    ),
    chronoedit_dit.CrossAttention: ("embed_text", "embed_image"),
    sd_unet.UNet2DConditionModel: ("embed_time", "embed_context", "predict"),
    sd_unet.CrossAttention: ("embed",),
}
# Layers of a block whose own forward is called before the block is reached.
CALLED_AHEAD = ("time_emb_proj",)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of a tensor of this shape one of `count` processes has."""

    shape: torch.Size
    rank: int
    count: int

    @property
    def each(self) -> int:
        """Rows of a process; the last ones have fewer."""
        return -(-self.shape[0] // self.count)

    @property
    def start(self) -> int:
        return min(self.rank * self.each, self.shape[0])

    @property
    def stop(self) -> int:
        return min(self.start + self.each, self.shape[0])


def shard(
    network: Network, processes: Processes, device: torch.device, dtype: torch.dtype | None = None
) -> None:
    """Divide the weights of a network that was opened unread among the processes. dtype: what it computes in,
    except where it stays in fp32; None: what the weights are in."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    assert network.unread is not None
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(network.unread.dtypes[name])
    mesh = init_device_mesh(device.type, (processes.count,))
    # Networks cast what goes into a layer themselves, and leave in fp32 what shall be.
    policy: dict[str, Any] = {"reduce_dtype": torch.float32, "cast_forward_inputs": False}
    narrow = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, **policy)}
    wide = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(**policy)}
    # Hooks on views are lost when one is written to; nothing here writes to what a block returns.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)

    whole = set(left_whole(network).values())
    for module in fp32_parts(network):
        fully_shard(module, **wide)
    for name, module in network.named_modules():
        if module is not network and (entrances_of(module) or name.endswith(CALLED_AHEAD)):
            fully_shard(module, **narrow, ignored_params=whole)
    for block in members(network, network.recomputed_lists):
        if any(True for _ in block.parameters()):
            fully_shard(block, **narrow, ignored_params=whole)
    fully_shard(network, **narrow, ignored_params=whole)
    for module in network.modules():
        for method in entrances_of(module):
            register_fsdp_forward_method(module, method)


def entrances_of(module: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in ENTRANCES.items() if isinstance(module, kind)), ())


def fp32_parts(network: Network) -> list[nn.Module]:
    """The outermost modules that stay in fp32 and have parameters."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and network.stays_fp32(name) and any(True for _ in module.parameters()):
            found[name] = module
    return list(found.values())


def left_whole(network: Network) -> dict[str, nn.Parameter]:
    """Parameters that stay in fp32 in modules that do not: small tables, which every process has whole."""
    inside = {id(p) for module in fp32_parts(network) for p in module.parameters()}
    return {n: p for n, p in network.named_parameters() if network.stays_fp32(n) and id(p) not in inside}


def fill(network: Network, device: torch.device) -> None:
    """Give a network that was opened unread, and is divided, its memory on the device and what its files say.
    A tensor at a time is read, of a mapped file the rows of this process alone."""
    files = network.unread
    assert files is not None
    with read_as_stored(network):
        network.to_empty(device=device)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                held = local(parameter)
                rows = rows_of(parameter)
                tensor = files.read_once(name) if rows is None else files[name][rows.start : rows.stop]
                held.copy_(tensor)
        network.unread = None
        for module in divided_modules(network):  # now: when they begin, they ask for parameters as attributes
            module.unshard()
            module.reshard()


@contextlib.contextmanager
def read_as_stored(network: nn.Module) -> Iterator[None]:
    """While the block runs, quantised layers are plain ones, whose `.weight` is the parameter itself."""
    layers: list[Any] = [module for module in network.modules() if type(module) is QuantisedLinear]
    for layer in layers:
        layer.__class__ = nn.Linear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = QuantisedLinear


def divided_modules(network: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in network.modules() if isinstance(module, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """The rows that are here, in their own memory."""
    from torch.distributed.tensor import DTensor

    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def rows_of(tensor: Tensor) -> Rows | None:
    """Which they are; None: all of it."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return None
    return Rows(tensor.shape, tensor.device_mesh.get_local_rank(), tensor.device_mesh.size())


class Divided:
    """The trained parameters of a divided network by name: `own_rows` for an optimiser, which write to the
    network's memory, and which rows they are."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]):
        self.parameters = {name: p for name, p in parameters.items() if rows_of(p) is not None}
        self.own_rows = {name: nn.Parameter(local(p)) for name, p in self.parameters.items()}
        self.rows = {name: rows for name, p in parameters.items() if (rows := rows_of(p)) is not None}

    def take_gradients(self) -> None:
        """From the network, where the way back left their mean over the processes."""
        for name, parameter in self.parameters.items():
            grad = parameter.grad
            self.own_rows[name].grad = None if grad is None else local(grad)
            parameter.grad = None


@contextlib.contextmanager
def gathered_for_a_while(network: nn.Module, processes: Processes) -> Iterator[None]:
    """What passes without a gradient have gathered, and left so for the way back, goes in the end."""
    try:
        yield
    finally:
        for module in divided_modules(network) if processes.several else ():
            module.reshard()
