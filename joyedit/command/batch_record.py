"""`batch.json` in the folder of many results: the seed, and what tells this batch from others.

The first process that comes writes it, and every other one, later or at the same moment, goes by it. So all
shards have one seed, and nothing that another instruction made is taken for a result of this one.
"""

import argparse
import hashlib
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from joyedit import __version__
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.plain_text import shown
from joyedit.command.photos import shown_file
from joyedit.command.recorded import REPEATED, without
from joyedit.command.systems import SYSTEMS

RECORD = "batch.json"
PATIENCE = 5.0  # seconds until one who takes the name has written the file, where a file system has no links


def is_of_batch(name: str) -> bool:
    """Whether a file of that name, in the folder of the results, tells of the batch, in whatever case."""
    return re.fullmatch(rf"{re.escape(RECORD)}|errors-[0-9]+\.jsonl", name, re.IGNORECASE) is not None


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say that changes results; not the seed, nor the device, which changes rounding. Of
    URLs what may hold a key is left out."""
    names = [*without(REPEATED, ("seed", "device")), "num_images", "rewrite", "rewrite_model"]
    names += [name for system in SYSTEMS for name in (*system.texts, *system.settings)]
    said = {name: getattr(args, name) for name in names}
    said |= {name: without_keys(said[name]) for name in ("mask", "references", "rewrite")}
    return {name: value for name, value in said.items() if value is not None}


def without_keys(value: Any) -> Any:
    """A file or URL, or a list of some, as they may be shown: URLs that differ in what is left out are told
    apart by a part of their SHA-256."""
    if isinstance(value, (list, tuple)):
        return [without_keys(one) for one in value]
    if not isinstance(value, str) or (shown_one := shown_file(value)) == value:
        return value
    return f"{shown_one} ({hashlib.sha256(value.encode()).hexdigest()[:12]})"


def read_record(out: Path) -> dict[str, Any] | None:
    """What `out` records; None where there is nothing yet. Raises ValueError for a file that is damaged."""
    path, end = out / RECORD, time.monotonic() + PATIENCE
    while True:
        try:
            record = read_json(path)
            break
        except FileNotFoundError:
            return None
        except ValueError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
    if not isinstance(record.get("seed"), int) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{path} is damaged: it has no seed, or no settings")
    return record


def claim(out: Path, seed: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write down the batch unless it is there; what is there then, which may be of another process."""
    try:
        record = {"schema": 1, "version": __version__, "seed": seed, **facts}
        write_json(out / RECORD, record, force=False)
    except FileExistsError:
        pass
    record = read_record(out)
    assert record is not None
    return record


def differences(record: Mapping[str, Any], seed: int | None, facts: Mapping[str, Any]) -> list[str]:
    """How the recorded batch differs from the one at hand. seed: None, where none is asked for."""
    there = {**record["settings"], **without(dict(record), ("schema", "version", "settings", "seed"))}
    here = {**facts["settings"], **without(dict(facts), ("settings",))}
    if seed is not None:
        there["seed"], here["seed"] = record["seed"], seed
    return [*told(there, here, sorted({*there, *here}))]


def told(there: Mapping[str, Any], here: Mapping[str, Any], names: Iterable[str]) -> Iterable[str]:
    for name in names:
        if there.get(name) != here.get(name):
            yield f"{name} is {shown(there.get(name), 60)} there and {shown(here.get(name), 60)} here"
