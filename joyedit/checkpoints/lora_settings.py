"""What an adapter's settings say of its strength: rank, alpha, and the layers that have another alpha.

PEFT keeps them in adapter_config.json, Diffusers in the header of the file. A pattern of `alpha_pattern` is
a regular expression that must match a layer's whole name, or what follows one of its dots. Nearly all are
plain names. Of expressions only those are read that cannot take long: repeats of a single character or
class, two at most, and alternatives.

Source: PEFT `utils/other.py`, `get_pattern_key`; diffusers `loaders/lora_base.py`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any

from joyedit.checkpoints.plain_text import shown

MOST_EXPRESSIONS = 16
LONGEST_PATTERN = 300
# Letters and classes, each repeated or not; what stands in brackets or between bars is not repeated.
EXPRESSION = re.compile(r"(?:(?:[\w.^$-]|\\[.dw-]|\[[\w.^-]+\])[*+?]?|\((?:\?:)?(?![*+?])|\)(?![*+?{])|\|)+")
REPEAT = re.compile(r"[*+?](?!:)")
MOST_REPEATS = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of one network. alpha None: the strength is 1."""

    alpha: float | None = None
    rank_stabilised: bool = False  # alpha / sqrt(r) instead of alpha / r
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, metadata: Mapping[str, Any], network: str) -> "Settings":
        """Diffusers writes the network's name before each key, PEFT itself does not.

        Raises ValueError for DoRA, for values that are no numbers, and for patterns that are not read.
        """
        named = {k.removeprefix(f"{network}."): v for k, v in metadata.items() if k.startswith(f"{network}.")}
        settings = named or {key: value for key, value in metadata.items() if "." not in key}
        if settings.get("use_dora"):
            raise ValueError("this is DoRA (use_dora in its settings), which is not supported")
        alpha, patterns = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
        if not isinstance(patterns, Mapping):
            raise ValueError(f"alpha_pattern={shown(patterns)} must be numbers by the names of layers")
        for name, value in (
            ("lora_alpha", alpha),
            *((f"alpha_pattern[{shown(k)}]", v) for k, v in patterns.items()),
        ):
            if value is not None and not is_number(value):
                raise ValueError(f"{name}={shown(value)} must be a number")
        expressions = [pattern for pattern in patterns if not _is_name(pattern)]
        if len(expressions) > MOST_EXPRESSIONS:
            raise ValueError(
                f"alpha_pattern has {len(expressions)} regular expressions, more than {MOST_EXPRESSIONS}"
            )
        for pattern in expressions:
            _compiled(pattern)
        return cls(alpha, bool(settings.get("use_rslora")), dict(patterns))

    def strength(self, layer: str, rank: int) -> float:
        """alpha / r of a layer: the first pattern that matches it says what alpha is."""
        found = next((value for _, value in sorted(self._matches(layer))), self.alpha)
        if found is None:
            return 1.0
        return found / math.sqrt(rank) if self.rank_stabilised else found / rank

    def _matches(self, layer: str) -> list[tuple[int, float]]:
        """(position of the pattern, its alpha) of those that match."""
        starts = [0, *(i + 1 for i, letter in enumerate(layer) if letter == ".")]
        found = [self._names[layer[i:]] for i in starts if layer[i:] in self._names]
        for position, (pattern, alpha) in self._expressions:
            if any(pattern.fullmatch(layer, start) for start in starts):  # "^" is where the name begins
                found.append((position, alpha))
        return found

    @functools.cached_property
    def _names(self) -> dict[str, tuple[int, float]]:
        listed = enumerate(self.alpha_pattern.items())
        return {_plain(pattern): (i, alpha) for i, (pattern, alpha) in listed if _is_name(pattern)}

    @functools.cached_property
    def _expressions(self) -> list[tuple[int, tuple[re.Pattern[str], float]]]:
        listed = enumerate(self.alpha_pattern.items())
        return [(i, (_compiled(pattern), alpha)) for i, (pattern, alpha) in listed if not _is_name(pattern)]


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e30  # not of nan


def _plain(pattern: str) -> str:
    return pattern.replace(r"\.", ".")


def _is_name(pattern: str) -> bool:
    return re.fullmatch(r"[\w.-]*", _plain(pattern)) is not None


def _compiled(pattern: str) -> re.Pattern[str]:
    """Raises ValueError for an expression that is not read."""
    readable = len(pattern) <= LONGEST_PATTERN and EXPRESSION.fullmatch(pattern)
    if readable and len(REPEAT.findall(pattern)) <= MOST_REPEATS:
        try:
            return re.compile(pattern)
        except re.error:
            pass
    raise ValueError(
        f"alpha_pattern: {shown(pattern, 80)} is not read: names of layers are, and short regular "
        f"expressions of at most {MOST_REPEATS} repeats"
    )
