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
LARGEST_KEPT = (
    32 * 2**20
)  # bytes; glibc keeps the memory of smaller pieces, and gives that of larger ones back
PRODUCT, ATTENTION, OTHER = "product", "attention", "other"


@dataclasses.dataclass
class Tally:
    """What was done. bytes: read and written. operations: a multiplication and its addition are two.
    calls: (kind, operations, bytes) of one call -> how many there were; other operations are one entry.
    peak: the most bytes that tensors took together. read: the storages of weights that were read whole.
    reading: the most that a CPU holds, of freed memory, too, with the mapped weights that were read until
    then. passing: the same with the block that runs, and with what this visit alone has freed. blocks: of
    each block that was called its bytes, and how often since it had most to work on."""

    bytes: int = 0
    operations: int = 0
    calls: Counter[tuple[str, int, int]] = dataclasses.field(default_factory=Counter)
    peak: int = 0
    read: set[int] = dataclasses.field(default_factory=set)
    reading: int = 0
    passing: int = 0
    blocks: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def note(self, kind: str, operations: int, moved: int) -> None:
        self.bytes += moved
        self.operations += operations
        self.calls[kind, operations, moved] += 1

    def add(self, other: "Tally") -> None:
        """All but what is the most of something."""
        self.bytes += other.bytes
        self.operations += other.operations
        self.calls.update(other.calls)
        self.read |= other.read


class Counted(TorchDispatchMode):
    """Counts while it is active. weights: those of the networks, which are no activations. mapped: those of
    them that take memory when they are read."""

    def __init__(self, weights: Iterable[Tensor] = (), mapped: Iterable[Tensor] = ()):
        super().__init__()
        self.tally = Tally()
        self.live = 0
        self.small = 0  # of `live` what glibc would keep
        self.heap = self.heap_of_visit = 0  # the most of that so far
        self.block = 0  # bytes of the block that runs
        self.resident = 0  # bytes of mapped weights that were read so far
        self.weights = {storage(t) for t in weights}
        self._unread = {storage(t): t.nbytes for t in mapped}
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
        self.tally = inner
        self.mark(0)
        try:
            yield inner
        finally:
            self.tally = outer
            outer.add(inner)
            for most in ("peak", "reading", "passing"):
                setattr(outer, most, max(getattr(outer, most), getattr(inner, most)))

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
                self.read(self.weights & {storage(t) for t in tensors_in(args)})
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
                self.small += own.nbytes() if own.nbytes() <= LARGEST_KEPT else 0
        if self._is_more(beside):
            self.forget()
            self.mark(beside)

    def read(self, storages: Iterable[int]) -> None:
        """Weights with these storages are read."""
        for number in storages:
            self.tally.read.add(number)
            self.resident += self._unread.pop(number, 0)

    def _most(self, beside: int) -> tuple[dict[str, int], int, int]:
        """What is held of each kind, with so many bytes beside, when the heap is as large as it was at most:
        in this edit, and in this visit."""
        small, large = self.small, self.live - self.small
        if beside <= LARGEST_KEPT:
            small += beside
        else:
            large += beside
        heap, own = max(self.heap, small), max(self.heap_of_visit, small)
        held = {"peak": small + large, "reading": heap + large + self.resident}
        return held | {"passing": own + large + self.block}, heap, own

    def _is_more(self, beside: int) -> bool:
        held, heap, own = self._most(beside)
        more = any(count > getattr(self.tally, name) for name, count in held.items())
        return more or heap > self.heap or own > self.heap_of_visit

    def mark(self, beside: int) -> None:
        """What is there now may be the most, with so many bytes for a moment."""
        held, self.heap, self.heap_of_visit = self._most(beside)
        for name, count in held.items():
            setattr(self.tally, name, max(getattr(self.tally, name), count))

    def forget(self) -> None:
        """What is not there any more does not count."""
        for number, (made, nbytes) in list(self._made.items()):
            if made.expired():
                self.live -= nbytes
                self.small -= nbytes if nbytes <= LARGEST_KEPT else 0
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
