"""Parameters that a network has and its files have not: which may be missing, and what they are then.

A fork adds a parameter and loads published weights. A pattern (`new_parameters=("*.temperature",)`) names
what the files need not hold; everything else stays as strict as without one. Such a parameter is what the
modules' own `__init__` makes of it. Networks are built on the meta device, where nothing has a value, so they
are built twice more: on meta again, to see which created tensors have a part in the new parameters, and once
with these on the CPU and all others on meta. This takes the memory of the new parameters alone, whatever the
size of the network, and knows no module in particular.
"""

import difflib
import fnmatch
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

log = logging.getLogger("joyedit")


class NewParameters:
    """Patterns, as fnmatch has them, of names that files need not hold, and what all networks of one load
    made of them: a pattern has to serve one network only."""

    def __init__(self, patterns: str | Sequence[str] = ()):
        self.patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        self._stored: set[str] = set()
        self._absent: dict[str, list[str]] = {}  # network -> names

    def among(self, names: Iterable[str]) -> list[str]:
        """The names that match a pattern."""
        return [name for name in names if any(fnmatch.fnmatchcase(name, p) for p in self.patterns)]

    def note(self, network: str, stored: Iterable[str], absent: Sequence[str]) -> None:
        """What the files of one network hold, and what they lack and need not hold."""
        self._stored.update(stored)
        if absent:
            self._absent[network] = [*self._absent.get(network, ()), *absent]

    def check(self) -> None:
        """To be called when all networks were planned, before their tensors are read: says once what keeps
        its initial value. Raises ValueError for a pattern that nobody needed, naming the nearest names."""
        absent = [name for names in self._absent.values() for name in names]
        for pattern in self.patterns:
            if fnmatch.filter(absent, pattern):
                continue
            if stored := fnmatch.filter(sorted(self._stored), pattern):
                found = f"only what is in the files ({_shown(stored)})"
            else:
                found = f"no parameter (nearest: {', '.join(_nearest(pattern, absent or self._stored))})"
            lacking = f"they lack {_shown(absent)}" if absent else "nothing is missing there"
            raise ValueError(f"new_parameters: {pattern!r} matches {found}; {lacking}")
        for network, names in self._absent.items():
            log.info("%s: %d parameters keep their initial value: %s", network, len(names), _shown(names))


def without_numbers(names: Iterable[str]) -> list[str]:
    """Names with `*` for the number of a layer, each once: the patterns that match them."""
    return list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))


def _shown(names: Iterable[str]) -> str:
    """A few of the names, those of all layers as one."""
    alike = without_numbers(names)
    return ", ".join(alike[:4]) + (", ..." if len(alike) > 4 else "")


def _nearest(pattern: str, names: Iterable[str], count: int = 3) -> list[str]:
    """The names most like a pattern, or like its end."""

    def likeness(name: str) -> float:
        end = ".".join(name.split(".")[-len(pattern.split(".")) :])
        return max(difflib.SequenceMatcher(None, pattern, other).ratio() for other in (name, end))

    return sorted(without_numbers(sorted(names)), key=likeness, reverse=True)[:count]


def initial_values(construct: Callable[[], nn.Module], names: Collection[str]) -> dict[str, Tensor]:
    """What `construct`, the constructor of a network, makes of these names of its state dict: real tensors on
    the CPU. Nothing else of the network takes memory. What is random is drawn from the global generator.

    Raises ValueError when the second construction goes another way than the first.
    """
    with torch.device("meta"), WithoutInit(), _Traced() as traced:
        first = construct().state_dict()
    needed = traced.leading_to([first[name] for name in names])
    with WithoutInit(), _Partly(traced.creations, needed) as partly:
        second = construct().state_dict()
    if not partly.is_through or any(second[name].is_meta for name in names):
        raise ValueError(f"{_shown(names)}: no initial value, since each construction creates other tensors")
    return {name: second[name].detach() for name in names}


class WithoutInit(TorchFunctionMode):
    """Skips `torch.nn.init` on the meta device. There it does nothing, but `normal_` imports torch._dynamo: a
    second and 120 MB."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


class _Traced(TorchFunctionMode):
    """A construction on the meta device, watched: which calls of PyTorch touch which storages.

    `creations`: the calls that make a tensor out of none, in order.
    """

    def __init__(self):
        super().__init__()
        self.creations: list[str] = []
        self._made: dict[int, int] = {}  # storage -> number of its creation
        self._touched: list[set[int]] = []  # by each call
        self._alive: list[Any] = []  # a storage that was freed might lend its identity to another

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = _places_in((args, kwargs), self._alive)  # before the call, which may give a tensor another one
        result = func(*args, **kwargs)
        made = _places_in(result, self._alive)
        if made and not _tensors((args, kwargs)):
            self._made.update(dict.fromkeys(made, len(self.creations)))
            self.creations.append(_spelled(func, args, kwargs))
        self._touched.append(read | made)
        return result

    def leading_to(self, tensors: Sequence[Tensor]) -> set[int]:
        """The numbers of the creations that have a part in these tensors, or in one that a call puts together
        with them: a call takes no tensors of which some have values and some have none."""
        places: set[int] = set()
        grown = _places_in(tensors, self._alive)
        while grown != places:
            places = grown
            grown = places.union(*(touched for touched in self._touched if not places.isdisjoint(touched)))
        return {self._made[place] for place in places if place in self._made}


class _Partly(TorchFunctionMode):
    """The same construction again, for real where it is `needed`, the rest on the meta device.

    Where tensors have values, an initialisation may take a way that it did not take without, and create what
    the first construction did not: this is real.
    """

    def __init__(self, creations: Sequence[str], needed: Collection[int]):
        super().__init__()
        self._creations, self._needed, self._number = creations, needed, 0

    @property
    def is_through(self) -> bool:
        """Whether everything was created that the first construction did."""
        return self._number == len(self._creations)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = self._number < len(self._creations)
        if known and not _tensors((args, kwargs)):
            if self._creations[self._number] == _spelled(func, args, kwargs):
                self._number += 1
                if self._number - 1 not in self._needed:
                    with torch.device("meta"):
                        return func(*args, **kwargs)
        return func(*args, **kwargs)


def _spelled(func: Callable, args: Any, kwargs: Any) -> str:
    return f"{getattr(func, '__name__', func)}{args}{kwargs}"


def _places_in(tree: Any, alive: list[Any]) -> set[int]:
    """The storages of the tensors on meta, which from now on are kept alive."""
    storages = [tensor.untyped_storage() for tensor in _tensors(tree) if tensor.is_meta]
    alive += storages
    return {storage._cdata for storage in storages}


def _tensors(tree: Any) -> list[Tensor]:
    """Those in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for value in tree for tensor in _tensors(value)]
