"""Weight files: tensors by name out of safetensors and GGUF files and pickles, and back into safetensors.

Opening reads headers alone; a tensor is read when it is asked for.

Source: safetensors; the Diffusers and transformers folder formats (shards and index).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from joyedit.checkpoints.gguf_files import open_gguf
from joyedit.checkpoints.mistaken import refuse_pointers
from joyedit.checkpoints.pickles import state_dict_of
from joyedit.checkpoints.replacing import replacing_all
from joyedit.checkpoints.safetensors_files import check_name, open_safetensors
from joyedit.checkpoints.safetensors_files import safetensors_header as safetensors_header


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of one or several weight files by name, read when asked for.

    safetensors files are mapped, pickles are mapped where their form allows; of GGUF files what is quantised
    is said to be bf16, and read in fp32. `numbers` are what a training
    program notes in a pickle beside the tensors ("global_step", ...). Raises ValueError for damaged files.
    """

    def __init__(self, files: Sequence[Path], prefix: str = ""):
        self.files = list(files)
        self.numbers: dict[str, float] = {}
        self._where: dict[str, Any] = {}  # name -> function that reads it
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        refuse_pointers(self.files)
        for path in self.files:
            for key, shape, dtype, read in _opened(path, self.numbers):
                name = key.removeprefix(prefix)
                if name in self._where:
                    raise ValueError(
                        f"{path}: tensor {name!r} is in two of the files {[f.name for f in self.files]}"
                    )
                self._where[name], self._shapes[name], self._dtypes[name] = read, shape, dtype

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "TensorFiles":
        """Tensors that are in memory, as if they were in a file."""
        held = cls([])
        for name, tensor in state.items():
            held._where[name] = lambda tensor=tensor, once=False: tensor
            held._shapes[name], held._dtypes[name] = tuple(tensor.shape), tensor.dtype
        return held

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name]()

    def read_once(self, name: str) -> Tensor:
        """A tensor that is about to be copied. What was read of a safetensors file leaves memory with it; of
        a pickle it stays until the system takes it back."""
        return self._where[name](once=True)

    def __contains__(self, name: object) -> bool:  # Mapping would read the tensor
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __str__(self) -> str:
        return ", ".join(str(path) for path in self.files)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        return self._dtypes

    def renamed(self, names: Mapping[str, str]) -> "TensorFiles":
        """Some of these tensors under other names (new name -> name here). Nothing is read."""
        view = TensorFiles([])
        view.files, view.numbers = self.files, self.numbers
        for new, name in names.items():
            view._where[new], view._shapes[new] = self._where[name], self._shapes[name]
            view._dtypes[new] = self._dtypes[name]
        return view

    def entries(self, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], torch.dtype, Any]]:
        """Some of these tensors as `replaced` takes them. Nothing is read."""
        return {name: (self._shapes[name], self._dtypes[name], self._where[name]) for name in names}

    def replaced(self, made: Mapping[str, tuple[tuple[int, ...], torch.dtype, Any]]) -> "TensorFiles":
        """These tensors and others, or others in their place: name -> shape, dtype, function that reads it,
        with the argument `once` as of `read_once`."""
        view = self.renamed({name: name for name in self})
        for name, (shape, dtype, read) in made.items():
            view._where[name], view._shapes[name], view._dtypes[name] = read, shape, dtype
        return view

    def nbytes(self) -> int:
        return sum(torch.Size(s).numel() * self._dtypes[n].itemsize for n, s in self._shapes.items())


def _opened(path: Path, numbers: dict[str, float]):
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    return open_gguf(path) if path.suffix == ".gguf" else _open_pickle(path, numbers)


def _open_pickle(path: Path, numbers: dict[str, float]):
    for key, tensor in state_dict_of(path, numbers).items():
        name = check_name(path, key)
        yield name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor, once=False: tensor.detach()


def parse_size(size: int | str) -> int:
    """Bytes from an integer or "5GB", "500MB" (powers of ten)."""
    if isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(K|M|G)?B", size.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"size {size!r}: write it like '5GB' or '500MB'")
    return int(float(match[1]) * 10 ** {"": 0, "K": 3, "M": 6, "G": 9}[(match[2] or "").upper()])


def save_tensors(
    folder: Path,
    stem: str,
    state: Mapping[str, Tensor],
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a state dict as one safetensors file, or as shards with an index. Shards of an older save with
    other names are removed only after the new ones are in place."""
    limit = parse_size(max_shard_size)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    tag = f".{variant}" if variant else ""
    count = len(shards)
    names = [f"{stem}{tag}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{stem}{tag}.safetensors"]
    index = folder / f"{stem}.safetensors.index{tag}.json"
    written = [*names, index.name] if count > 1 else names
    stale = re.compile(re.escape(stem + tag) + r"(-\d{5}-of-\d{5})?\.safetensors")
    old = [path for path in folder.glob("*") if path.name not in written]
    removing = [path for path in old if stale.fullmatch(path.name) or path == index]
    # All appear together, when the last one is written; the index, which promises the others, after them.
    with replacing_all([folder / name for name in written], removing=removing) as made:
        for place, shard in zip(made, shards, strict=False):
            tensors = {key: tensor.detach().contiguous() for key, tensor in shard.items()}
            save_file(tensors, place, {"format": "pt", **(metadata or {})})
        if count > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(tensor.nbytes for tensor in state.values())
            content = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
            made[-1].write_text(content + "\n", encoding="utf-8")
