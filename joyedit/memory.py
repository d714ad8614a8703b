"""Where weights are while they wait, and while they are run.

A network that does not fit beside the others comes to the accelerator while it runs (`visit`). Calls in
several threads may share networks: nobody moves one that another runs.

Of a network that does not fit at all, the repeated blocks come one at a time (`BlockStreaming`). They are the
members of its module lists, stay in main memory, and are copied to the device for the length of their own
forward; everything else lives on the device. Where a pipeline calls a part of a block by itself (the keys and
values of a prompt, a decoder's last layers), only that part is copied.
"""

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from joyedit.checkpoints.network import Network


@dataclasses.dataclass
class Visits:
    """Of one network: the threads that run it, and where they have brought it."""

    threads: list[int] = dataclasses.field(default_factory=list)
    device: torch.device | None = None
    change: threading.Condition = dataclasses.field(default_factory=threading.Condition)


_VISITS: "weakref.WeakKeyDictionary[nn.Module, Visits]" = weakref.WeakKeyDictionary()
_ENTERING = threading.Lock()  # over that table


def _visits_of(network: nn.Module) -> Visits:
    with _ENTERING:
        return _VISITS.setdefault(network, Visits())


@contextlib.contextmanager
def visit(network: Network, device: torch.device | None) -> Iterator[None]:
    """`network` stays on `device` while the block runs, and is in main memory after the last of those that
    run it there. device None: it stays where it is.

    Waits for other threads that run it elsewhere; and, where its blocks are streamed, for any other thread,
    since a block is in one place at a time. Raises RuntimeError when this thread itself runs it elsewhere.
    """
    visits, me = _visits_of(network), threading.get_ident()

    def free() -> bool:
        others = [thread for thread in visits.threads if thread != me]
        return not others or (visits.device == device and not BlockStreaming.is_attached(network))

    with visits.change:
        if me in visits.threads and visits.device != device:  # to wait for oneself would be for ever
            raise RuntimeError(f"the {type(network).__name__} runs on {visits.device} now, not on {device}")
        visits.change.wait_for(free)
        if not visits.threads:
            visits.device = device
            if device is not None:
                _move(network, device)
        visits.threads.append(me)
    try:
        yield
    finally:
        with visits.change:
            visits.threads.remove(me)
            if not visits.threads and device is not None:
                network.to("cpu")
            visits.change.notify_all()


def _move(network: Network, device: torch.device) -> None:
    try:
        network.to(device)
    except BaseException:  # it did not fit: what came goes back
        network.to("cpu")
        raise


def at_rest(network: Network) -> torch.device:
    """Where a network is when no call has brought it to an accelerator."""
    visits = _visits_of(network)
    with visits.change:
        return torch.device("cpu") if visits.threads and visits.device is not None else network.device


class BlockStreaming:
    """Hooks that bring each block, or a part that is called by itself, to a device before its forward, and
    drop the copy after it."""

    def __init__(self, network: Network, device: torch.device):
        self.blocks = [
            block for child in network.modules() if isinstance(child, nn.ModuleList) for block in child
        ]
        inner = {id(m) for block in self.blocks for m in block.modules() if m is not block}
        self.blocks = [block for block in self.blocks if id(block) not in inner]
        self.masters: dict[nn.Parameter, torch.Tensor] = {}  # of the parameters that are on the device now
        self.brought: dict[nn.Module, list[nn.Parameter]] = {}  # by which module
        streamed = {id(p) for block in self.blocks for p in block.parameters()}
        for name, parameter in network.named_parameters():
            if id(parameter) not in streamed and not network.stays_behind(name):
                parameter.data = parameter.data.to(device)
        self.device = device
        self.hooks = []
        for module in (module for block in self.blocks for module in block.modules()):
            self.hooks.append(module.register_forward_pre_hook(self._bring))
            self.hooks.append(module.register_forward_hook(self._drop, always_call=True))

    def _bring(self, module: nn.Module, args: Any) -> None:
        self.brought[module] = [p for p in module.parameters() if p not in self.masters]
        for parameter in self.brought[module]:
            self.masters[parameter] = parameter.data
            parameter.data = self.copied(parameter.data)

    def copied(self, data: torch.Tensor) -> torch.Tensor:
        return data.to(self.device, non_blocking=True)

    def _drop(self, module: nn.Module, args: Any, output: Any) -> None:
        for parameter in self.brought.pop(module, ()):
            parameter.data = self.masters.pop(parameter)

    @classmethod
    def attach(cls, network: Network, device: torch.device) -> None:
        """Stream the blocks of `network` to `device` from now on."""
        cls.detach(network)
        network.__dict__["block_streaming"] = cls(network, device)

    @classmethod
    def detach(cls, network: Network) -> None:
        """Stop streaming; the blocks stay in main memory until the network is moved."""
        streaming = network.__dict__.pop("block_streaming", None)
        if streaming is not None:
            for hook in streaming.hooks:
                hook.remove()
            network.to("cpu")

    @classmethod
    def is_attached(cls, network: Network) -> bool:
        return "block_streaming" in network.__dict__
