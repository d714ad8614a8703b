"""Pairs in one file: metadata.jsonl, metadata.json or metadata.csv, a line or row for each.

The columns have the names that ai-toolkit, musubi-tuner, diffusion-pipe, DiffSynth-Studio, Hugging Face's
image folders and FlyMyAI give them. Paths are relative to the file. Several references are a list, or columns
with numbers (control_path_0, control_path_1).
"""

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyedit.training.pairs import CLIPS, PICTURES, Fault, Pair

FILES = ("metadata.jsonl", "metadata.csv", "metadata.json")
TARGET = ("target", "image", "image_path", "file_name", "video", "video_path")
CONTROL = ("control", "edit_image", "control_path", "source", "input_image")
PROMPT = ("prompt", "caption", "text", "instruction")
MASK = ("mask", "mask_path", "mask_image")

Row = tuple[str, Mapping[str, Any]]  # what messages call it, and what it says


def find(folder: Path) -> Path | None:
    """The file in a folder. Raises ValueError when there are several."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{folder} holds {' and '.join(path.name for path in found)}: which one is meant?")
    return found[0] if found else None


def read_metadata(path: Path) -> tuple[list[Pair], list[Fault]]:
    """The pairs that are whole, and what is wrong with the others. Raises ValueError for another file."""
    faults: list[Fault] = []
    rows = read_rows(path, faults)
    with_controls = any(columns(row, CONTROL) for _, row in rows)
    pairs: dict[str, Pair] = {}
    for name, row in rows:
        pair = read_row(path.parent, name, row, with_controls, faults)
        if pair is None:
            continue
        if pair.name in pairs:  # one picture under several instructions
            number = 2
            while f"{pair.name}#{number}" in pairs:
                number += 1
            pair = Pair(f"{pair.name}#{number}", pair.target, pair.prompt, pair.controls, pair.mask)
        pairs[pair.name] = pair
    return list(pairs.values()), faults


def read_rows(path: Path, faults: list[Fault]) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        return [(f"{path.name} row {i}", row) for i, row in enumerate(reader, start=2)]
    rows: list[Row] = []
    if path.suffix == ".json":
        try:
            listed = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(listed, list):
            raise ValueError(f"{path} holds a {type(listed).__name__}: must be a list of rows")
        numbered = [(f"{path.name} row {i}", item) for i, item in enumerate(listed, start=1)]
    else:
        numbered = []
        for i, line in enumerate(text.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                numbered.append((f"{path.name} line {i}", json.loads(line)))
            except ValueError:
                faults.append(Fault(f"{path.name} line {i}", "is not JSON"))
    for name, item in numbered:
        if isinstance(item, dict):
            rows.append((name, item))
        else:
            faults.append(Fault(name, f"is a {type(item).__name__}, not an object"))
    return rows


def read_row(
    root: Path, name: str, row: Mapping[str, Any], with_controls: bool, faults: list[Fault]
) -> Pair | None:
    """The pair, or None and faults. with_controls: other rows have some."""
    before = len(faults)

    def files(names: tuple[str, ...], what: str, suffixes: tuple[str, ...]) -> list[Path]:
        found = []
        for given in columns(row, names):
            if not isinstance(given, str):
                faults.append(Fault(called, f"its {what} is a {type(given).__name__}, not a path"))
                continue
            path = root / given
            if path.suffix.lower() not in suffixes:
                faults.append(Fault(called, f"its {what} {given!r} is not of a kind that is read"))
            elif not path.is_file():
                faults.append(Fault(called, f"its {what} {given!r} does not exist"))
            found.append(path)
        return found

    given = next((one for one in columns(row, TARGET) if isinstance(one, str)), None)
    called = name if given is None else Path(given).with_suffix("").as_posix()
    targets = files(TARGET, "target", PICTURES + CLIPS)
    if not targets:
        faults.append(Fault(called, f"has no target (a column {', '.join(TARGET[:4])})"))
    controls = files(CONTROL, "control", PICTURES)
    masks = files(MASK, "mask", PICTURES)
    if with_controls and not controls and not (targets and targets[0].suffix.lower() in CLIPS):
        faults.append(Fault(called, "has no control"))
    prompts = columns(row, PROMPT)
    prompt = prompts[0] if prompts else ""
    if not isinstance(prompt, str) or not prompt.strip():
        reason = "is empty" if isinstance(prompt, str) else "is no text"
        faults.append(Fault(called, f"its caption {reason}"))
    if len(faults) > before:
        return None
    return Pair(called, targets[0], prompt.strip(), tuple(controls), masks[0] if masks else None)


def columns(row: Mapping[str, Any], names: tuple[str, ...]) -> list[Any]:
    """What the row says under the first of these names that it has, or under that name with numbers; empty
    cells say nothing."""
    for name in names:
        numbered = sorted(
            (int(match[1]), key) for key in row if key and (match := re.fullmatch(rf"{name}_(\d+)", key))
        )
        keys = [name] if name in row else []
        values = [value for key in keys + [key for _, key in numbered] for value in listed(row[key])]
        if values:
            return values
    return []


def listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.startswith("["):  # a list in a cell
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    values = value if isinstance(value, list) else [value]
    return [one for one in values if one is not None and one != ""]
