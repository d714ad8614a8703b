"""Defaults that a call can tell from what its caller passed.

A checkpoint may say in how many steps it is to be run, and a preset has its own. Both stand back where the
caller says something, and be it the very number of the signature. So those defaults are numbers of a type of
their own: they count, compare and print as any other (`inspect.signature` shows `num_inference_steps: int =
40`), and nobody passes one by accident.
"""

from typing import Any, TypeVar

Setting = TypeVar("Setting", int, float, bool)


class Unsaid:
    """What a default is an instance of, and nothing else."""


class UnsaidInt(Unsaid, int): ...


class UnsaidFloat(Unsaid, float): ...


class UnsaidBool(Unsaid, int):
    """A bool cannot have subclasses."""

    def __repr__(self) -> str:
        return repr(bool(self))


def unsaid(value: Setting) -> Setting:
    """The default `value` of a signature."""
    kinds: dict[type, Any] = {bool: UnsaidBool, int: UnsaidInt, float: UnsaidFloat}
    return kinds[type(value)](value)


def plain(value: Any) -> Any:
    """A default as the number that it is; anything else as it is."""
    if not isinstance(value, Unsaid):
        return value
    kind = next(
        kind
        for of, kind in ((UnsaidBool, bool), (UnsaidInt, int), (UnsaidFloat, float))
        if isinstance(value, of)
    )
    return kind(value)  # type: ignore[arg-type]
