"""Whether the files of a checkpoint are whole.

At once: what each header promises is held against the length of its file, an index against its shards, and
`model_index.json` against the folders. `full` reads every byte, files side by side and each once: the content
is held against the hash that the Hub gave it, where that is known, and numbers that are NaN or infinite are
counted; of blocks of GGUF, which are read again, what they mean. The name of a blob in the cache is such a
hash: SHA-256 of large files, git's SHA-1 of small ones; of a download into a folder, `.cache/huggingface/`
notes it.

Source: the cache and the download folders of huggingface_hub; git's hash of a blob.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from joyedit.checkpoints.hub import WEIGHT_SUFFIXES, Origin
from joyedit.checkpoints.json_files import parse_json, read_json
from joyedit.checkpoints.mistaken import broken_off, refuse_pointers
from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import visible
from joyedit.checkpoints.quantised_files import OLD_MARK
from joyedit.checkpoints.shard_index import shards_of
from joyedit.checkpoints.small_files import read_beginning, read_text
from joyedit.checkpoints.stored_dtypes import widened
from joyedit.checkpoints.stored_tensors import PIECE, StoredTensor, fill, opened, row_major
from joyedit.checkpoints.tensor_files import TensorFiles

SIDE_BY_SIDE = 4  # files that are read at a time, each in pieces
INDEX = ".index.json"
LARGEST_JSON = 2**27  # bytes; vocabularies have up to 34 million
# Ends of the names of tensors in which infinities are meant, or that hold whatever was in memory.
NO_NUMBERS = ("attn_mask", OLD_MARK)


@dataclasses.dataclass
class FileReport:
    """hash: "sha256" or "git-sha1" where the content was held against one. not_finite: tensor -> how many of
    its numbers are NaN or infinite."""

    bytes: int = 0
    hash: str | None = None
    problems: list[str] = dataclasses.field(default_factory=list)
    not_finite: dict[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found of the checkpoint `name`, by file. full: whether all was read."""

    name: str
    full: bool
    files: Mapping[str, FileReport]

    @property
    def ok(self) -> bool:
        return not any(report.problems for report in self.files.values())

    @property
    def not_finite(self) -> dict[str, int]:
        """Tensor -> how many of its numbers are NaN or infinite; those of one name in two files together."""
        counted: dict[str, int] = {}
        for report in self.files.values():
            for name, count in report.not_finite.items():
                counted[name] = counted.get(name, 0) + count
        return counted

    def to_dict(self) -> dict[str, Any]:
        files = {name: dataclasses.asdict(report) for name, report in self.files.items()}
        return {
            "ok": self.ok,
            "name": self.name,
            "full": self.full,
            "not_finite": self.not_finite,
            "files": files,
        }

    def lines(self) -> list[str]:
        """For people: each problem, and how it is on the whole."""
        lines = [f"{name}: {text}" for name, report in self.files.items() for text in report.problems]
        count = sum(bool(report.problems) for report in self.files.values())
        total = f"{len(self.files)} files, {sum(r.bytes for r in self.files.values()) / 1e9:.2f} GB"
        hashed = sum(report.hash is not None for report in self.files.values())
        read = f"; {hashed or 'none'} of them held against a hash" if self.full else ""
        lines.append(f"{total}: {count} with problems" if count else f"{total}: whole{read}")
        return lines


def verify(
    name_or_path: str | Path,
    *,
    full: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    disable_progress: bool | None = True,
) -> Verification:
    """Whether the files of a folder in any layout, a weight file, or a Hub repository in the cache are whole.

    full: read and hash all of it. Nothing is downloaded. disable_progress: None shows a bar on a terminal.
    Raises FileNotFoundError where there is no such checkpoint, or nothing in it that could be verified.
    """
    path = expanded(name_or_path)
    if path.is_file():
        places, root = {path.name: path}, path.parent
    else:
        origin = Origin(str(name_or_path), revision, cache_dir=cache_dir, local_files_only=True)
        names = origin.listing()  # of no checkpoint, this says what was looked for
        root = origin.fetch([])
        places = {name: root / name for name in sorted({*names, *_lost(root)})}
    reports: dict[str, FileReport] = {}
    tensors: dict[str, TensorFiles] = {}
    for name, place in places.items():
        if name.endswith((*WEIGHT_SUFFIXES, ".json")):
            reports[name], tensors[name] = _header(name, place)
    if not any(map(_is_weights, places)):
        raise FileNotFoundError(f"{name_or_path} holds no weights ({', '.join(WEIGHT_SUFFIXES)})")
    downloads = root.parents[1] if root.parent.name == "snapshots" else root
    for name in [name for name in reports if name.endswith(INDEX) and not reports[name].problems]:
        _check_index(name, places[name], reports, tensors, broken_off(downloads))
    if "model_index.json" in reports:
        _check_parts(places, reports)
    if full:
        hashes = {name: found for name, place in places.items() if (found := known_hash(root, name, place))}
        for name in {*hashes} - {*reports}:
            reports[name] = FileReport(places[name].stat().st_size)
        _read_all(places, reports, tensors, hashes, disable_progress)
    return Verification(str(name_or_path), full, dict(sorted(reports.items())))


def _lost(root: Path) -> list[str]:
    """Links to what is not there."""
    dangling = [path.relative_to(root) for path in root.rglob("*") if path.is_symlink() and not path.exists()]
    return [one.as_posix() for one in dangling if not any(part.startswith(".") for part in one.parts)]


def _header(name: str, path: Path) -> tuple[FileReport, TensorFiles]:
    """What can be said of a file at once, and its tensors."""
    report, none = FileReport(), TensorFiles([])
    try:
        if path.is_symlink() and not path.exists():
            raise ValueError(f"it is a link to nothing: {os.readlink(path)}")
        report.bytes = path.stat().st_size
        if name.endswith(WEIGHT_SUFFIXES):
            return report, TensorFiles([path])
        refuse_pointers([path])
        parse_json(read_text(path, LARGEST_JSON), "it")
        return report, none
    except (OSError, ValueError) as error:
        report.problems.append(_said(error, path))
        return report, none


def _said(error: Exception, path: Path) -> str:
    """What an error says, without the path with which most begin."""
    text = visible(str(error), None)
    return text.removeprefix(str(path)).removeprefix(": ").strip()


def _check_index(
    name: str,
    path: Path,
    reports: dict[str, FileReport],
    tensors: Mapping[str, TensorFiles],
    hint: str,
) -> None:
    """An index names files that are there and hold what it says."""
    try:
        shards = shards_of(path)
    except ValueError as error:
        reports[name].problems.append(_said(error, path))
        return
    promised: dict[str, list[str]] = {shard: [] for shard in shards}
    for tensor, shard in read_json(path)["weight_map"].items():
        promised[shard].append(tensor)
    for shard, wanted in promised.items():
        place = (Path(name).parent / shard).as_posix()
        if place not in reports:
            reports[place] = FileReport(problems=[f"it is missing: {name} names it{hint}"])
        elif not reports[place].problems:
            lost = [tensor for tensor in wanted if tensor not in tensors[place]]
            if lost:
                more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
                reports[place].problems.append(f"it lacks {visible(lost[0])}{more}, which {name} promises")


def _check_parts(places: Mapping[str, Path], reports: dict[str, FileReport]) -> None:
    """Each part that model_index.json lists has a folder, and a network weights in it."""

    def read(name: str) -> Mapping[str, Any]:
        if not reports[name].problems:
            try:
                return read_json(places[name])
            except ValueError as error:
                reports[name].problems.append(_said(error, places[name]))
        return {}

    for part, entry in read("model_index.json").items():
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(one, str) for one in entry):
            continue
        inside = [name for name in reports if name.startswith(f"{part}/")]
        if not any(name.startswith(f"{part}/") for name in places):
            reports["model_index.json"].problems.append(f"it lists {part}, and there is no such folder")
        elif f"{part}/config.json" in places and not any(map(_is_weights, inside)):
            if {"_class_name", "architectures"} & {*read(f"{part}/config.json")}:
                reports[f"{part}/config.json"].problems.append("there are no weights beside it")


def _is_weights(name: str) -> bool:
    return name.endswith((*WEIGHT_SUFFIXES, INDEX))


def known_hash(root: Path, name: str, path: Path) -> str | None:
    """The hash that the Hub gave a file of `root`, in hexadecimal digits; None where it is not known."""
    real = Path(os.path.realpath(path))
    found = real.name if real.parent.name == "blobs" and real.is_file() else ""
    noted = root / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    if noted.is_file():  # three lines: the commit, the hash, the time
        found = "".join(read_beginning(noted).splitlines()[1:2])
    return found if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", found) else None


class _Stopped(Exception):
    """Another file's reading ended with an error, or with Ctrl-C."""


def _read_all(
    places: Mapping[str, Path],
    reports: Mapping[str, FileReport],
    tensors: Mapping[str, TensorFiles],
    hashes: Mapping[str, str],
    disable_progress: bool | None,
) -> None:
    """Read the files that hold tensors, or whose hash is known, and add what is wrong to their reports."""
    chosen = [name for name in reports if name in hashes or tensors.get(name)]
    chosen = sorted((name for name in chosen if reports[name].bytes), key=lambda n: -reports[n].bytes)
    total = sum(reports[name].bytes for name in chosen)
    lock, stop = threading.Lock(), threading.Event()
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=disable_progress)

    def tick(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        with lock:
            bar.update(count)

    def read(name: str) -> None:
        report = reports[name]
        try:
            held = tensors.get(name, TensorFiles([]))
            report.hash, equal, counts = read_through(places[name], held, hashes.get(name), tick)
        except _Stopped:
            return
        except (OSError, ValueError) as error:
            report.problems.append(_said(error, places[name]))
            return
        if not equal:
            report.problems.append(f"its content is not that of its {report.hash}, {hashes[name]}")
        report.not_finite.update(counts)
        for tensor, count in counts.items():
            report.problems.append(f"{count} numbers of {visible(tensor)} are NaN or infinite")

    workers = min(SIDE_BY_SIDE, os.cpu_count() or 1)
    with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for done in concurrent.futures.as_completed([pool.submit(read, name) for name in chosen]):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def read_through(
    path: Path, tensors: TensorFiles, wanted: str | None, tick: Callable[[int], None]
) -> tuple[str | None, bool, dict[str, int]]:
    """The kind of hash that `wanted` is, whether the file has it, and how many numbers of which of its
    tensors are not finite. The file is read once, front to back, and those tensors again that do not lie in
    it as they are; tick gets the bytes of each piece.

    Raises OSError for what cannot be read, ValueError where the file is shorter than its tensors need.
    """
    size = path.stat().st_size
    kind = None if wanted is None else "sha256" if len(wanted) == 64 else "git-sha1"
    digest = (
        hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    )
    counts: dict[str, int] = {}
    buffer = torch.empty(PIECE, dtype=torch.uint8, device="cpu")
    stored = tensors.stored
    runs, others = _runs(stored)
    others += [name for name in tensors if name not in stored]
    with opened(path) as file:

        def pieces(end: int) -> Iterable[Tensor]:
            while (position := file.tell()) < end:
                piece = buffer[: min(PIECE, end - position)]
                fill(file, piece)
                if wanted is not None:
                    digest.update(piece.numpy().data)
                tick(len(piece))
                yield piece

        for begin, end, dtype, names in runs:
            for _ in pieces(begin):
                pass
            found = sum(count_not_finite(piece.view(dtype)) for piece in pieces(end))
            for name in names:
                counts[name] = found
        for _ in pieces(size):
            pass
    for name in others:
        counts[name] = 0
        for piece in tensors.pieces(name):
            counts[name] += count_not_finite(piece)
            tick(0)
    counts = {name: count for name, count in counts.items() if count and not name.endswith(NO_NUMBERS)}
    return kind, wanted is None or digest.hexdigest() == wanted, counts


def _runs(
    stored: Mapping[str, StoredTensor],
) -> tuple[list[tuple[int, int, torch.dtype, list[str]]], list[str]]:
    """Where numbers of floating point stand in the file, in order and without overlaps: first byte, end,
    dtype, names of the tensors. And the names of those that lie otherwise."""
    runs: list[tuple[int, int, torch.dtype, list[str]]] = []
    others = []
    floats = [name for name, one in stored.items() if one.dtype.is_floating_point and one.nbytes]
    for name in sorted(floats, key=lambda name: (stored[name].start, -stored[name].nbytes)):
        one = stored[name]
        begin, end = one.start, one.start + one.nbytes
        if runs and runs[-1][:3] == (begin, end, one.dtype):
            runs[-1][3].append(name)
        elif one.strides != row_major(one.shape) or (runs and begin < runs[-1][1]):
            others.append(name)
        else:
            runs.append((begin, end, one.dtype, [name]))
    return runs, others


def count_not_finite(numbers: Tensor) -> int:
    """How many are NaN or infinite."""
    if not numbers.numel():
        return 0
    numbers = widened(numbers)
    least, most = torch.aminmax(numbers)  # quick, and NaN where one of them is
    if torch.isfinite(least) and torch.isfinite(most):
        return 0
    return int((~torch.isfinite(numbers)).sum())
