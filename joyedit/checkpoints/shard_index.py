"""The index of a network that is kept in several files: which tensor is in which.

Source: the Diffusers and transformers folder formats (`*.index.json`).
"""

from pathlib import Path

from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.plain_text import shown


def shards_of(index: Path) -> list[str]:
    """The files that a *.index.json lists, all of them beside it. Raises ValueError naming the file when it
    is not one."""
    try:
        where = read_json(index).get("weight_map")
    except ValueError as error:
        raise ValueError(f"{index} is not an index of weight files: {error}") from None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} is not an index of weight files: it has no weight_map of names to files")
    for tensor, name in where.items():
        plain = isinstance(name, str) and name.isprintable() and name not in ("", ".", "..")
        if not plain or "/" in name or "\\" in name:
            raise ValueError(
                f"{index} is not an index of weight files: {shown(tensor, 60)} is said to be in "
                f"{shown(name, 60)}, which is no name of a file beside it"
            )
    return sorted(set(where.values()))
