"""Running a network that does not fit the accelerator: its repeated blocks come one at a time.

The blocks of a network (the members of its module lists) stay in main memory and are copied to the device for
the length of their own forward; everything else lives on the device.
"""

from typing import Any

import torch
from torch import nn

from joyedit.weights import Network


class BlockStreaming:
    """Hooks that bring each block to a device before its forward and drop the copy after it."""

    def __init__(self, network: Network, device: torch.device):
        self.blocks = [
            block for child in network.modules() if isinstance(child, nn.ModuleList) for block in child
        ]
        inner = {id(m) for block in self.blocks for m in block.modules() if m is not block}
        self.blocks = [block for block in self.blocks if id(block) not in inner]
        self.masters: dict[nn.Parameter, torch.Tensor] = {}
        streamed = {id(p) for block in self.blocks for p in block.parameters()}
        for name, parameter in network.named_parameters():
            if id(parameter) not in streamed and not network.stays_behind(name):
                parameter.data = parameter.data.to(device)
        self.device = device
        self.hooks = [block.register_forward_pre_hook(self._bring) for block in self.blocks]
        self.hooks += [block.register_forward_hook(self._drop, always_call=True) for block in self.blocks]

    def _bring(self, block: nn.Module, args: Any) -> None:
        for parameter in block.parameters():
            self.masters[parameter] = parameter.data
            parameter.data = parameter.data.to(self.device, non_blocking=True)

    def _drop(self, block: nn.Module, args: Any, output: Any) -> None:
        for parameter in block.parameters():
            parameter.data = self.masters.pop(parameter, parameter.data)

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
