"""Counts what a network does, while its own code runs on tensors that have no memory.

Every operation that PyTorch dispatches is seen: what it allocates, and what of that is still there, what it
reads and writes, and how much it multiplies. Attention is one operation that allocates its result, as every
fused implementation is; views are free. What an operation takes for itself while it runs is mostly not seen.
"""

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from joyedit.estimates.shapes import multiplied, result, working_memory

CREATES = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty")}
PRODUCT, ATTENTION, OTHER = "product", "attention", "other"


@dataclasses.dataclass
class Tally:
    """What was done. bytes: read and written. operations: a multiplication and its addition are two.
    calls: (kind, operations, bytes) of one call -> how many there were; other operations are one entry.
    peak: the most bytes that tensors took together. read: the storages of weights that were read whole."""

    bytes: int = 0
    operations: int = 0
    calls: Counter[tuple[str, int, int]] = dataclasses.field(default_factory=Counter)
    peak: int = 0
    read: set[int] = dataclasses.field(default_factory=set)

    def note(self, kind: str, operations: int, moved: int) -> None:
        self.bytes += moved
        self.operations += operations
        self.calls[kind, operations, moved] += 1

    def add(self, other: "Tally") -> None:
        """All but the peak."""
        self.bytes += other.bytes
        self.operations += other.operations
        self.calls.update(other.calls)
        self.read |= other.read


class Counted(TorchDispatchMode):
    """Counts while it is active. weights: those of the networks, which are no activations."""

    def __init__(self, weights: Iterable[Tensor] = ()):
        super().__init__()
        self.tally = Tally()
        self.live = 0
        self.weights = {storage(t) for t in weights}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._attention = Attention(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to say that nothing is compiled here, PyTorch would import its compiler

    def __enter__(self):
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._attention.__exit__(*error)

    @contextlib.contextmanager
    def measure(self) -> Iterator[Tally]:
        """What is done while the block runs. Its peak has in it what is there already."""
        outer, inner = self.tally, Tally()
        self.forget()
        inner.peak = self.live
        self.tally = inner
        try:
            yield inner
        finally:
            self.tally = outer
            outer.add(inner)
            outer.peak = max(outer.peak, inner.peak)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = result(func, args, kwargs)
        if is_view(func):
            return out
        made = tensors_in((out,))
        if func._schema.name not in CREATES:
            operations = multiplied(func, args, out)
            self.tally.note(PRODUCT if operations else OTHER, operations, moved_by(args, kwargs, out))
            if func._schema.name != "aten::embedding":  # of a table a few rows are read
                self.tally.read |= self.weights & {storage(t) for t in tensors_in(args)}
        self.allocate(made, working_memory(func, args, kwargs, out))
        return out

    def allocate(self, made: Iterable[Tensor], beside: int = 0) -> None:
        """Count the memory of new tensors, and what is taken beside them for a moment."""
        for tensor in made:
            number = storage(tensor)
            if number not in self._made and number not in self.weights:
                own = tensor.untyped_storage()
                self._made[number] = StorageWeakRef(own), own.nbytes()
                self.live += own.nbytes()
        if self.live + beside > self.tally.peak:
            self.forget()
            self.tally.peak = max(self.tally.peak, self.live + beside)

    def forget(self) -> None:
        """What is not there any more does not count."""
        for number, (made, nbytes) in list(self._made.items()):
            if made.expired():
                self.live -= nbytes
                del self._made[number]


class Attention(TorchFunctionMode):
    """Attention as one operation, whose scores nobody stores."""

    def __init__(self, counted: Counted):
        super().__init__()
        self.counted = counted

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args[:3]
        out = Attended.apply(q, k, v) if torch.is_grad_enabled() else q.new_empty(*q.shape[:-1], v.shape[-1])
        operations = 2 * q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        self.counted.tally.note(ATTENTION, operations, stored((q, k, v, out)))
        return out


class Attended(torch.autograd.Function):
    """Keeps for the way back what fused attention keeps, and gives there what it gives."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Those among the arguments or results of an operation, and in lists of them."""
    found: list[Tensor] = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors_in(x)
    return found


def moved_by(args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that an operation reads and writes, as if nothing stayed in a cache."""
    return stored(tensors_in((*args, *kwargs.values()))) + stored(tensors_in((out,)))


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; what an expanded tensor repeats is counted once."""
    total = 0
    for t in tensors:
        sizes = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
        total += torch.Size(sizes).numel() * t.element_size() if t.numel() else 0
    return total


@functools.cache
def is_view(func: Any) -> bool:
    returned = func._schema.returns
    aliases = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
    return aliases or func.__name__ == "_unsafe_view.default"
