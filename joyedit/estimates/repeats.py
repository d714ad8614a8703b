"""Blocks that are alike do the same: of forty, one is run.

A block of a network whose weights have the shapes of another's, and whose arguments are like those that the
other was called with, does as many operations, takes as much memory on the way, and returns tensors of the
same form.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from joyedit.estimates.counting import Counted, Tally, storage
from joyedit.memory import load_of


class Known(NamedTuple):
    """What a block did. rise: of memory, while it ran. read: names of its weights. outputs: of each leaf the
    number of its storage, in `sizes` or among the arguments, and its form; or itself, if it is no tensor."""

    tally: Tally
    rise: int
    read: list[str]
    spec: TreeSpec
    outputs: list[Any]
    sizes: dict[int, int]
    given: dict[int, int]  # storage of an argument -> its place among the arguments


class Repeats:
    """Remembers what blocks did, for networks that run while `counted` is active."""

    def __init__(self, counted: Counted):
        self.counted = counted
        self.known: dict[Hashable, Known] = {}

    def watch(self, blocks: Iterable[nn.Module]) -> None:
        """From now on these blocks run only where none did the same before."""
        for block in blocks:
            block.forward = self._in_place(block, self._remembering(block, block.forward))

    def _in_place(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, while which the block is the one that runs."""
        nbytes = sum(tensor.nbytes for tensor in block.parameters())
        most: dict[int, int] = {}  # visit -> what it worked on

        def run(*args: Any, **kwargs: Any) -> Any:
            counted, load = self.counted, load_of(args)
            visit, again = id(counted.tally), load <= most.get(id(counted.tally), -1)
            most[visit] = max(load, most.get(visit, 0))
            _, count = counted.tally.blocks.get(id(block), (nbytes, 0))
            counted.tally.blocks[id(block)] = nbytes, count + 1 if again else 1
            before, counted.block = counted.block, nbytes
            try:
                return forward(*args, **kwargs)
            finally:
                counted.block = before

        return run

    def _remembering(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        form = type(block), tuple((name, p.shape, p.dtype) for name, p in block.named_parameters())

        def run(*args: Any, **kwargs: Any) -> Any:
            if not all(map(is_plain, (*args, *kwargs.values()))):
                return forward(*args, **kwargs)
            leaves, spec = tree_flatten((args, kwargs))
            key = form, str(spec), tuple(map(described, leaves))
            if key not in self.known:
                return self._learn(key, block, forward, args, kwargs, leaves)
            return self._repeat(self.known[key], block, leaves)

        return run

    def _learn(self, key, block: nn.Module, forward, args, kwargs, leaves: list[Any]) -> Any:
        with self.counted.measure() as tally:
            before = self.counted.live
            out = forward(*args, **kwargs)
        given = {storage(x): i for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        returned, spec = tree_flatten(out)
        tensors = [x for x in returned if isinstance(x, Tensor)]
        sizes = {storage(x): x.untyped_storage().nbytes() for x in tensors}
        outputs = [
            (storage(x), x.dtype, x.shape, x.stride(), x.storage_offset()) if isinstance(x, Tensor) else x
            for x in returned
        ]
        read = [name for name, p in block.named_parameters() if storage(p) in tally.read]
        self.known[key] = Known(tally, tally.peak - before, read, spec, outputs, sizes, given)
        return out

    def _repeat(self, known: Known, block: nn.Module, leaves: list[Any]) -> Any:
        with self.counted.measure() as tally:
            tally.add(known.tally)
            weights = dict(block.named_parameters())
            self.counted.read(storage(weights[name]) for name in known.read)
            self.counted.mark(known.rise)
            new = {
                number: torch.empty(nbytes, dtype=torch.uint8, device="meta")
                for number, nbytes in known.sizes.items()
                if number not in known.given
            }

            def made(output: Any) -> Any:
                if not isinstance(output, tuple):
                    return output
                number, dtype, *form = output
                if number in known.given:
                    return leaves[known.given[number]].as_strided(*form)
                return new[number].view(dtype).as_strided(*form)

            return tree_unflatten(list(map(made, known.outputs)), known.spec)


def described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.stride(), leaf.storage_offset(), leaf.dtype
    return leaf


def is_plain(value: Any) -> bool:
    """Whether a block that is given this cannot change it: tensors and numbers, in tuples."""
    if isinstance(value, list):
        return all(isinstance(x, int | float) for x in value)
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return isinstance(value, Tensor | int | float | None)
