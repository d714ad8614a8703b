"""Declarative, invertible key tables.

A layout is an ordered list of rules from a foreign file's tensor names to the names of our networks. In a
pattern `{name}` stands for one dotted component and `{name*}` for one or more; the same name on the other
side puts it back. The first rule that matches a key takes it. Rules rename one tensor to one, split one
along an axis, fuse several, reshape, or drop with a reason; each but the last can be run backwards.
"""

import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Transform = Callable[[list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Rule:
    """`src` names of the foreign layout, `dst` names of ours; a dropped key has no dst and a reason."""

    src: tuple[str, ...]
    dst: tuple[str, ...]
    forward: Transform
    backward: Transform
    reason: str = ""


def rename(src: str, dst: str) -> Rule:
    """One tensor, one tensor, same shape."""
    return Rule((src,), (dst,), list, list)


def split(src: str, dst: Sequence[str], dim: int = 0) -> Rule:
    """One foreign tensor holds several of ours, equal parts along `dim`."""
    parts = len(dst)
    return Rule((src,), tuple(dst), lambda t: list(t[0].chunk(parts, dim)), lambda t: [torch.cat(t, dim)])


def fuse(src: Sequence[str], dst: str, dim: int = 0) -> Rule:
    """Several foreign tensors, equal parts along `dim`, are one of ours."""
    parts = len(src)
    return Rule(tuple(src), (dst,), lambda t: [torch.cat(t, dim)], lambda t: list(t[0].chunk(parts, dim)))


def reshape(
    src: str, dst: str, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
) -> Rule:
    """One tensor, one tensor, another shape."""
    return Rule((src,), (dst,), lambda t: [forward(t[0])], lambda t: [backward(t[0])])


def drop(src: str, reason: str) -> Rule:
    """A foreign tensor that the computation does not need."""
    return Rule((src,), (), lambda t: [], lambda t: [], reason)


@dataclass(frozen=True)
class Step:
    """How one of our tensors is made: read `sources`, transform, take output number `index`."""

    sources: tuple[str, ...]
    transform: Transform
    index: int

    @property
    def is_renaming(self) -> bool:
        """Whether the tensor is its one source, under another name at most."""
        return self.transform is list

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return self.transform([tensors[name] for name in self.sources])[self.index]


@dataclass(frozen=True)
class Plan:
    """Which layout a file is in, and the step that makes each wanted tensor."""

    layout: "Layout"
    steps: Mapping[str, Step]
    dropped: Mapping[str, str]  # foreign key -> reason


@dataclass(frozen=True)
class Layout:
    """A named way to spell the tensors of a network."""

    name: str
    rules: tuple[Rule, ...]

    def plan(self, keys: Sequence[str]) -> tuple[dict[str, Step], dict[str, str], list[str]]:
        """Steps for our names, dropped foreign keys, and the foreign keys that no complete rule takes."""
        return _match([(r.src, r.dst, r.forward, r.reason) for r in self.rules], keys)

    def inverse(self, names: Sequence[str]) -> dict[str, Step]:
        """How each tensor of this layout is made of ours. Raises ValueError for a name that no rule takes."""
        sides = [(r.dst, r.src, r.backward, "") for r in self.rules if r.dst]
        steps, _, unmatched = _match(sides, names)
        if unmatched:
            raise ValueError(f"layout {self.name!r} has no name for {unmatched[:5]}")
        return steps

    def invert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under this layout's names. Raises ValueError as `inverse`."""
        return {name: step.read(state) for name, step in self.inverse(list(state)).items()}

    def renames(self, names: Sequence[str]) -> dict[str, str]:
        """This layout's name -> ours, for those of our tensors that it has one for one."""
        sides = [(r.dst, r.src, r.backward, "") for r in self.rules if len(r.src) == len(r.dst) == 1]
        steps, _, _ = _match(sides, names)
        return {foreign: step.sources[0] for foreign, step in steps.items()}


def _match(sides, keys: Sequence[str]) -> tuple[dict[str, Step], dict[str, str], list[str]]:
    groups: dict[tuple, dict[int, str]] = {}
    unmatched: list[str] = []
    for key in keys:
        for number, (src, _, _, _) in enumerate(sides):
            found = next(
                ((i, m) for i, pattern in enumerate(src) if (m := _compiled(pattern).fullmatch(key))), None
            )
            if found:
                index, match = found
                groups.setdefault((number, tuple(sorted(match.groupdict().items()))), {})[index] = key
                break
        else:
            unmatched.append(key)
    steps: dict[str, Step] = {}
    dropped: dict[str, str] = {}
    for (number, binding), members in groups.items():
        src, dst, transform, reason = sides[number]
        if len(members) != len(src):
            unmatched.extend(members.values())
            continue
        sources = tuple(members[i] for i in range(len(src)))
        if not dst:
            dropped[sources[0]] = reason
        for index, pattern in enumerate(dst):
            name = _fill(pattern, dict(binding))
            if name in steps:
                raise ValueError(f"{sources} and {steps[name].sources} both become {name!r}")
            steps[name] = Step(sources, transform, index)
    return steps, dropped, unmatched


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\*?\})", pattern)
    out = []
    for part in parts:
        if part.startswith("{"):
            name = part.strip("{}")
            out.append(f"(?P<{name[:-1]}>.+)" if name.endswith("*") else f"(?P<{name}>[^.]+)")
        else:
            out.append(re.escape(part))
    return re.compile("".join(out))


def _fill(pattern: str, binding: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\*?\}", lambda m: binding[m[1]], pattern)


IDENTITY = rename("{key*}", "{key*}")


def prefixed(layout: Layout, prefix: str, name: str | None = None) -> Layout:
    """The same layout with a constant prefix before every foreign key."""
    rules = tuple(
        Rule(tuple(prefix + s for s in r.src), r.dst, r.forward, r.backward, r.reason) for r in layout.rules
    )
    return Layout(name or layout.name, rules)


class DoesNotFitError(ValueError):
    """Tensors of other names than wanted: under the closest layout, our names that nothing gives, and foreign
    names that nothing takes."""

    def __init__(self, layout: str, wanted: int, missing: Sequence[str], unexpected: Sequence[str]):
        super().__init__(
            f"closest layout {layout!r}: {len(missing)} of {wanted} tensors missing{_sample(missing)}, "
            f"{len(unexpected)} unknown{_sample(unexpected)}"
        )
        self.missing, self.unexpected = missing, unexpected


def plan_conversion(
    layouts: Sequence[Layout],
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    may_lack: Collection[str] = (),
) -> Plan:
    """The layout under which `found` gives exactly `wanted` (names to shapes).

    may_lack: wanted names that `found` need not give; the plan has a step for those that it gives.
    Raises DoesNotFitError with the two-sided difference under the closest layout, or ValueError with the
    shapes that differ.
    """
    refusals = []
    for layout in layouts:
        steps, dropped, unmatched = layout.plan(list(found))
        missing = [name for name in wanted if name not in steps and name not in may_lack]
        unexpected = unmatched + [
            s for name, step in steps.items() if name not in wanted for s in step.sources
        ]
        if not missing and not unexpected:
            _check_shapes(steps, found, wanted)
            return Plan(layout, {name: steps[name] for name in wanted if name in steps}, dropped)
        refusals.append(DoesNotFitError(layout.name, len(wanted), missing, unexpected))
    raise min(refusals, key=lambda one: len(one.missing) + len(one.unexpected))


def _check_shapes(steps: Mapping[str, Step], found: Mapping, wanted: Mapping) -> None:
    for name, step in steps.items():
        sources = [torch.empty(found[s], device="meta") for s in step.sources]
        try:
            shape = tuple(step.transform(sources)[step.index].shape)
        except (IndexError, RuntimeError):  # too few axes, or parts that are not equal
            shapes = ", ".join(f"{s} {tuple(found[s])}" for s in step.sources)
            raise ValueError(f"{shapes} cannot become {name}, wanted {tuple(wanted[name])}") from None
        if shape != tuple(wanted[name]):
            raise ValueError(
                f"{', '.join(step.sources)} gives shape {shape} for {name}, wanted {tuple(wanted[name])}"
            )


def _sample(names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(sorted(names)[:4])
    return f" ({shown}{', ...' if len(names) > 4 else ''})"
