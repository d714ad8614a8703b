"""Settings of networks and schedulers, read from published JSON files.

Every key of a file is consumed, kept for the round trip, or refused by name, with the nearest known one.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

from joyedit.checkpoints.bounds import as_value_errors, check_value
from joyedit.checkpoints.plain_text import shown, visible
from joyedit.checkpoints.summary import settings


class Config(Mapping):
    """Immutable settings of a network or scheduler, readable as attribute, item and dict.

    Subclasses are frozen dataclasses whose fields are the keys of the published JSON file and whose defaults
    are the released checkpoint's.
    """

    aliases: ClassVar[Mapping[str, str]] = {}  # older spelling -> field
    ignored: ClassVar[frozenset[str]] = frozenset()  # keys of old files that never changed the computation
    supported: ClassVar[Mapping[str, tuple]] = {}  # field -> the only values that this code computes
    keeps_unknown: ClassVar[bool] = False  # whether keys without a field are kept for the round trip

    _extra = types.MappingProxyType({})

    def __post_init__(self):
        for name, allowed in self.supported.items():
            if self[name] not in allowed:
                wanted = " or ".join(repr(value) for value in allowed)
                raise ValueError(
                    f"{type(self).__name__}: {name}={shown(self[name])} is not supported, only {wanted}"
                )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read a published JSON mapping. Raises ValueError for a key that no field knows, and for a value of
        another type or beyond its bound (`bounds.py`)."""
        hints = typing.get_type_hints(cls)
        known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values, extra = {}, {}
        for key, value in raw.items():
            name = cls.aliases.get(key, key)
            if key == "quantization_config" and value:
                method = value.get("quant_method", key) if isinstance(value, Mapping) else key
                raise ValueError(
                    f"{cls.__name__}: the weights are quantized ({visible(str(method))}), which is not read "
                    "here: take the checkpoint in its own precision"
                )
            if name in known:
                hint = hints[name]
                if isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, Mapping):
                    value = value if isinstance(value, Config) else hint.from_dict(value)
                values[name] = _freeze(value)
                if not _fits(values[name], hint):
                    kind = _spelled(hint)
                    raise ValueError(
                        f"{cls.__name__}: {key}={shown(value)} is not supported: must be of type {kind}"
                    )
                try:
                    check_value(name, values[name])
                except ValueError as error:
                    raise ValueError(f"{cls.__name__}: {error}") from None
            elif cls.keeps_unknown:
                extra[key] = value
            elif not key.startswith("_") and key not in cls.ignored:
                raise ValueError(
                    f"{cls.__name__} has no {shown(key)}{nearest(key, known)}; known: {sorted(known)}"
                )
        with as_value_errors(f"{cls.__name__}: the settings do not fit one another"):
            config = cls(**values)
        object.__setattr__(config, "_extra", types.MappingProxyType(extra))
        return config

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed. Raises ValueError for a name that is not a key of this config."""
        for key in changes:
            if key not in self:
                raise ValueError(
                    f"{type(self).__name__} has no {key!r}{nearest(key, self)}; known: {sorted(self)}"
                )
        return type(self).from_dict({**self, **changes})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain lists and dicts."""
        return {key: _thaw(value) for key, value in self.items()}

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        cls.__repr__ = Config.__repr__  # which a dataclass would replace by its own

    def __repr__(self) -> str:
        """A setting a line, kept ones included."""
        return settings(type(self).__name__, self)

    def __getitem__(self, key: str) -> Any:
        if key in self._extra:
            return self._extra[key]
        if key in self.__dataclass_fields__:  # type: ignore[attr-defined]
            return getattr(self, key)
        raise KeyError(key)

    def __reduce__(self):  # for copy.deepcopy and pickle, which the read-only view of the extra keys refuses
        return type(self).from_dict, (self.to_dict(),)

    def __getattr__(self, name: str) -> Any:
        try:
            return self._extra[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; known: {sorted(self)}") from None

    def __iter__(self) -> Iterator[str]:
        yield from (field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]
        yield from self._extra

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is of an annotated type; an integer is a float too, a bool is no number."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, option) for option in typing.get_args(hint))
    origin = typing.get_origin(hint) or hint
    if origin is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, tuple) or not items:
            return isinstance(value, tuple)
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        return len(items) == len(value) and all(map(_fits, value, items))
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(origin, type) or isinstance(value, origin)


def _spelled(hint: Any) -> str:
    return hint.__name__.replace("NoneType", "None") if isinstance(hint, type) else str(hint)


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_thaw(item) for item in value]
    return value


def nearest(word: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
