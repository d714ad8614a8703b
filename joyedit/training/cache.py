"""What encoders make of a pair, kept in files, so that the denoiser trains without them.

A file is named after everything that it depends on: the files of the pair by their content, the words, the
bucket, and the encoders. So what is there is right, whoever wrote it; a changed picture or instruction has
another name, and a run that is started again finds what it had.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from joyedit.checkpoints.json_files import write_json
from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.loading.layouts import Checkpoint

VERSION = 1  # of what is stored; with it all names change
SAMPLE, PLACES = 2**16, 16  # bytes of a weight file that are read to tell it from others, and how often


class Cache:
    """Named groups of tensors in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        """Whether a whole file of that name is there."""
        path = self._path(name)
        if not path.is_file():
            return False
        try:
            TensorFiles([path])
        except ValueError:
            return False
        return True

    def read(self, name: str) -> dict[str, Tensor]:
        """The tensors of that name, in memory. Raises FileNotFoundError or ValueError."""
        files = TensorFiles([self._path(name)])
        return {key: files[key].clone() for key in files}

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """The file appears whole, or not at all. Raises OSError where the disk is full."""
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_tensors(self.folder, name, held)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def name_of(kind: str, content: Mapping[str, Any]) -> str:
    """The name of what depends on this content alone."""
    text = json.dumps({"version": VERSION, **content}, sort_keys=True, ensure_ascii=False)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


class Hashes:
    """The sha256 of files, and of pictures that could be read their size. What is known of a file counts as
    long as its own size and time of change are the same; it is kept in a file."""

    def __init__(self, place: Path):
        self.place = place
        try:
            self.known = dict(json.loads(place.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            self.known = {}
        self._changed = False

    def __getitem__(self, path: Path) -> str:
        entry = self._entry(path)
        if "sha256" not in entry:
            with path.open("rb") as file:
                self._note(path, sha256=hashlib.file_digest(file, "sha256").hexdigest())
            entry = self._entry(path)
        return entry["sha256"]

    def shape_of(self, path: Path) -> tuple[int, int] | None:
        """Height and width of a picture that was read before, upright; None of any other file."""
        shape = self._entry(path).get("shape")
        return None if shape is None else (shape[0], shape[1])

    def note(self, path: Path, shape: tuple[int, int]) -> None:
        """That a picture could be read."""
        self._note(path, shape=list(shape))

    def save(self) -> None:
        if self._changed:
            write_json(self.place, self.known)
            self._changed = False

    def _entry(self, path: Path) -> dict[str, Any]:
        """What is known of a file as it is now."""
        entry, facts = self.known.get(str(path.absolute())), path.stat()
        stat = [facts.st_size, facts.st_mtime_ns]
        return entry if isinstance(entry, dict) and entry.get("stat") == stat else {"stat": stat}

    def _note(self, path: Path, **facts: Any) -> None:
        self.known[str(path.absolute())] = {**self._entry(path), **facts}
        self._changed = True


def revision_of(found: Checkpoint, part: str) -> str:
    """What tells a network of a checkpoint from others: the commit of a repository; of files here their
    names, sizes, and pieces of their content. A layout without folders for parts is one whole."""
    if (commit := found.origin.commit) is not None:
        return commit
    if not found.listing:
        return _digest([Path(found.origin.name).expanduser()])
    root = found.origin.fetch([])
    inside = [name for name in found.listing if name.startswith(f"{part}/")] or found.listing
    kinds = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".json", ".txt", ".model", ".py")
    return _digest([root / name for name in sorted(inside) if name.endswith(kinds)])


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in range(PLACES):
                file.seek(max(size - SAMPLE, 0) * place // (PLACES - 1))
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:40]
