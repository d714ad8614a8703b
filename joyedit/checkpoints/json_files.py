"""JSON files, read with an error that names them and written whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyedit.checkpoints.replacing import replacing
from joyedit.checkpoints.small_files import read_text

# What files of settings and lists of shards stay far below. A byte may become a value of 30 bytes.
LARGEST = 4 * 2**20
DEEPEST = 50  # levels of lists and objects


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file when it is not one."""
    value = parse_json(read_text(path, LARGEST), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def parse_json(text: str, where: str) -> Any:
    """The value that a JSON text stands for. Raises ValueError, beginning with `where`, for other text, and
    for one that is nested more than 50 levels deep."""
    too_deep = f"{where} is not valid JSON here: it is nested more than {DEEPEST} levels deep"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(too_deep) from None
    except ValueError:  # Python's own limit for the digits of an integer
        raise ValueError(f"{where} is not valid JSON here: one of its numbers is too long") from None
    level, depth = [value], 0
    while level := [
        child
        for node in level
        if isinstance(node, (dict, list))
        for child in (node.values() if isinstance(node, dict) else node)
    ]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(too_deep)
    return value


def write_json(path: Path, value: Mapping[str, Any], *, force: bool = True) -> None:
    """Without `force` it raises FileExistsError for what exists, or has come to exist meanwhile.

    Texts that are no UTF-8, as names of files may be, are escaped, and read as they were.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    with replacing(path, force=force) as temporary:
        # A surrogate becomes a backslash, u and its number, which is how JSON spells it.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
