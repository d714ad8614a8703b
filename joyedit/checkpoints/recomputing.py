"""Gradients at less memory: blocks that keep what goes into them alone, and compute the rest once more when
the gradient comes back through them. Wrapped from outside: no network's code knows of it.

The second time a block is called as a whole, with what is hooked to it: where weights come when their block
is called, they come again, see `memory/streaming.py`.

Source: arXiv 1604.06174.
"""

import contextlib
import functools
import itertools
from collections.abc import Collection, Iterator
from contextvars import ContextVar
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


_AGAIN: ContextVar[nn.Module | None] = ContextVar("again", default=None)  # what is computed once more


def is_recomputing() -> bool:
    """Whether what computes now does so once more, on the way back."""
    return _AGAIN.get() is not None


@contextlib.contextmanager
def _again(block: nn.Module) -> Iterator[None]:
    token = _AGAIN.set(block)
    try:
        yield
    finally:
        _AGAIN.reset(token)


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    plain = functools.partial(type(block).forward, block)
    if not torch.is_grad_enabled() or _AGAIN.get() is block:
        return plain(*args, **kwargs)
    from torch.utils.checkpoint import checkpoint

    count = itertools.count()

    def compute(*args: Any, **kwargs: Any) -> Any:
        if next(count) == 0:
            return plain(*args, **kwargs)
        with _again(block):
            return block(*args, **kwargs)

    # Nothing is drawn inside of a block. What it reads beside its arguments gets its gradient, too.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(plain if torch.compiler.is_compiling() else compute, *args, **options, **kwargs)
