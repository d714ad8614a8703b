"""What a pipeline can be set to at the same time: the pairs that exclude each other, and why."""

from collections.abc import Iterable

APART = {
    frozenset({"memory", "graphs"}): "it moves the weights that graphs read",
    frozenset({"offload", "graphs"}): "it moves the weights that graphs read",
    frozenset({"memory", "offload"}): "offload is a shorthand of a budget",
    frozenset({"step_cache", "graphs"}): "a graph repeats what it recorded, and cannot leave some of it out",
}
ENDED_BY = {"memory": "set_memory(None)", "offload": "disable_offload()", "graphs": "disable_graphs()"}


def check(name: str, asked: str, in_use: Iterable[str]) -> None:
    """`name` is asked for, as in `asked`. Raises ValueError where something in use excludes it."""
    for other in in_use:
        if (why := APART.get(frozenset({name, other}))) is not None:
            raise ValueError(f"{asked} does not go with {other}: {why}; call {ENDED_BY[other]} first")
