"""Gradients at less memory: blocks that keep what goes into them alone, and compute the rest once more when
the gradient comes back through them. Wrapped from outside: no network's code knows of it.

Source: arXiv 1604.06174.
"""

import functools
from collections.abc import Collection
from typing import Any

import torch
from torch import nn


def recompute(network: nn.Module, lists: Collection[str]) -> None:
    """Wrap the members of the module lists of these names; one that is wrapped already stays so."""
    for block in members(network, lists):
        block.forward = functools.partial(_recomputed, block)


def keep_all(network: nn.Module, lists: Collection[str]) -> None:
    """Undo `recompute`."""
    for block in members(network, lists):
        block.__dict__.pop("forward", None)


def members(network: nn.Module, lists: Collection[str]) -> list[nn.Module]:
    found = [m for name, m in network.named_modules() if name.rpartition(".")[2] in lists]
    return [block for one in found if isinstance(one, nn.ModuleList) for block in one]


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    from torch.utils.checkpoint import checkpoint

    # Nothing is drawn inside of a block. What it reads beside its arguments gets its gradient, too.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(type(block).forward, block, *args, **options, **kwargs)
