"""Counts what a network does, while its own code runs on tensors that have no memory.

Every operation that PyTorch dispatches is seen: what it allocates, and what of that is still there, what it
reads and writes, and how much it multiplies. Attention is one operation that allocates its result, as in every
fused implementation; views are free. What an operation takes for itself while it runs is not seen.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from joyedit.estimates.shapes import result

CREATES = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}


class Counted(TorchDispatchMode):
    """While it is active, `bytes` read and written, `operations` (a multiplication and its addition are two),
    and the most bytes, `peak`, that tensors made since then took together.

    weights: of those, `read` has the ones that were read whole, by number of their storage; of a table of
    embeddings a few rows are.
    """

    def __init__(self, weights: Iterable[Tensor] = ()):
        super().__init__()
        self.bytes = self.operations = self.live = self.peak = 0
        self.weights = {storage(t): t for t in weights}
        self.read: set[int] = set()
        self._made: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, int] = {}
        self._attention = Attention(self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import all of torch.compile to say that nothing is compiled here

    def __enter__(self):
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = result(func, args, kwargs)
        if is_view(func):
            return out
        made = tensors_in(out)
        if func._schema.name not in CREATES:
            self.note(func, args, kwargs, out)
        self.add(made)
        return out

    def note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        given = tensors_in((*args, *kwargs.values()))
        self.bytes += stored(given) + stored(tensors_in(out))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.operations += formula(*args, **kwargs, out_val=out)
        if func._schema.name != "aten::embedding":
            self.read.update(self.weights.keys() & {storage(t) for t in given})

    def add(self, made: Iterable[Tensor]) -> None:
        """Count the memory of new tensors."""
        for tensor in made:
            number = storage(tensor)
            if number not in self._made and number not in self.weights:
                own = tensor.untyped_storage()
                self._made[number], self._sizes[number] = StorageWeakRef(own), own.nbytes()
                self.live += self._sizes[number]
        if self.live > self.peak:
            self.forget()
            self.peak = max(self.peak, self.live)

    def forget(self) -> None:
        """What is not there any more does not count."""
        for number in [n for n, made in self._made.items() if made.expired()]:
            self.live -= self._sizes.pop(number)
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
        out = torch.empty_like(q[..., : v.shape[-1]])
        self.counted.bytes += stored((q, k, v, out))
        self.counted.operations += 2 * out.numel() * k.shape[-2] * 2
        return out


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def stored(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors; what an expanded tensor repeats is counted once."""
    total = 0
    for t in tensors:
        sizes = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
        total += torch.Size(sizes).numel() * t.element_size() if t.numel() else 0
    return total


def is_view(func: Any) -> bool:
    returned = func._schema.returns
    aliases = bool(returned) and returned[0].alias_info is not None and not returned[0].alias_info.is_write
    return aliases or func.__name__ == "_unsafe_view.default"
