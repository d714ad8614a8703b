"""Running a network that does not fit the accelerator: its repeated blocks come one at a time.

The blocks of a network (the members of its module lists) stay in main memory and are copied to the device for
the length of their own forward; everything else lives on the device. Where a pipeline calls a part of a block
by itself (the keys and values of a prompt, a decoder's last layers), only that part is copied.
"""

from typing import Any

import torch
from torch import nn

from joyedit.checkpoints.network import Network


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
