"""Weight files: tensors by name out of safetensors and GGUF files and pickles, and back into safetensors.

Opening reads headers alone; a tensor is read when it is asked for.

Source: safetensors; the Diffusers and transformers folder formats (shards and index).
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from joyedit.checkpoints.gguf_files import open_gguf
from joyedit.checkpoints.mistaken import refuse_pointers
from joyedit.checkpoints.pickles import open_pickle
from joyedit.checkpoints.replacing import replacing_all
from joyedit.checkpoints.safetensors_files import open_safetensors
from joyedit.checkpoints.safetensors_files import safetensors_header as safetensors_header
from joyedit.checkpoints.sizes import parse_size
from joyedit.checkpoints.stored_dtypes import widened
from joyedit.checkpoints.stored_tensors import FromFile, InPieces, StoredTensor
from joyedit.checkpoints.writing import write_safetensors
from joyedit.convert.table import Layout, Step

# Of one tensor: shape, dtype, and what reads it, called with `once` as `TensorFiles.read_once` says. Where
# that is `InPieces`, too, the tensor need not be in memory whole.
Entry = tuple[tuple[int, ...], torch.dtype, Callable[..., Tensor]]


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of one or several weight files by name, read when asked for.

    safetensors files are mapped, pickles are mapped where their form allows; of GGUF files what is quantised
    is said to be bf16, and read in fp32. `numbers` are what a training program notes in a pickle beside the
    tensors ("global_step", ...). Raises ValueError for damaged files.
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

    @classmethod
    def made(
        cls,
        steps: Mapping[str, Step],
        sources: "TensorFiles",
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> "TensorFiles":
        """What the steps make of these tensors, each when it is asked for. dtypes: of the results, where they
        are not those of the sources."""
        held = cls([])
        held.files = sources.files
        for name, step in steps.items():
            on_meta = {
                source: torch.empty(sources.shapes[source], dtype=sources.dtypes[source], device="meta")
                for source in step.sources
            }
            result = step.read({source: widened(tensor) for source, tensor in on_meta.items()})
            dtype = result.dtype if dtypes is None else dtypes[name]
            held._where[name] = _Made(step, sources, dtype)
            held._shapes[name], held._dtypes[name] = tuple(result.shape), dtype
        return held

    def spelled(self, layout: Layout) -> "TensorFiles":
        """These tensors, which are a network's, as a layout has them. Raises ValueError for one for which it
        has no name."""
        return TensorFiles.made(layout.inverse(list(self)), self)

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name]()

    def read_once(self, name: str) -> Tensor:
        """A tensor that is about to be copied or written: what was read of a file leaves memory with it."""
        return self._where[name](once=True)

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of a file in another dtype: beside the result, one piece at a time is in memory."""
        result, done = torch.empty(self._shapes[name], dtype=dtype, device="cpu"), 0
        for piece in self.pieces(name):
            result.view(-1)[done : done + len(piece)] = widened(piece)
            done += len(piece)
        return result

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The numbers of a tensor one after the other, in flat pieces, each of which is valid until the next
        one is asked for: small ones, where what reads the tensor can give them, else one."""
        read = self._where[name]
        if isinstance(read, InPieces):
            yield from read.pieces()
        else:
            yield self.read_once(name).detach().flatten()

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

    @property
    def stored(self) -> dict[str, StoredTensor]:
        """Where the tensors are that lie in a file as they are."""
        return {name: read.stored for name, read in self._where.items() if isinstance(read, FromFile)}

    def is_mapped(self, name: str) -> bool:
        """Whether reading that tensor gives a view of a file that is mapped."""
        read = self._where[name]
        return isinstance(read, FromFile) and read.mapped is not None

    def renamed(self, names: Mapping[str, str]) -> "TensorFiles":
        """Some of these tensors under other names (new name -> name here). Nothing is read."""
        view = TensorFiles([])
        view.files, view.numbers = self.files, self.numbers
        for new, name in names.items():
            view._where[new], view._shapes[new] = self._where[name], self._shapes[name]
            view._dtypes[new] = self._dtypes[name]
        return view

    def entries(self, names: Iterable[str] | None = None) -> dict[str, Entry]:
        """Some of these tensors, or all, as `replaced` takes them. Nothing is read."""
        chosen = self if names is None else names
        return {name: (self._shapes[name], self._dtypes[name], self._where[name]) for name in chosen}

    def replaced(self, made: Mapping[str, Entry]) -> "TensorFiles":
        """These tensors and others, or others in their place."""
        view = self.renamed({name: name for name in self})
        for name, (shape, dtype, read) in made.items():
            view._where[name], view._shapes[name], view._dtypes[name] = read, shape, dtype
        return view

    def nbytes_of(self, name: str) -> int:
        return torch.Size(self._shapes[name]).numel() * self._dtypes[name].itemsize

    def nbytes(self) -> int:
        return sum(map(self.nbytes_of, self))


@dataclasses.dataclass(frozen=True)
class _Made:
    """How a tensor is made of others."""

    step: Step
    sources: TensorFiles
    dtype: torch.dtype

    def __call__(self, once: bool = False) -> Tensor:
        read = {name: widened(self.sources.read_once(name)) for name in self.step.sources}
        return self.step.read(read).to(self.dtype)

    def pieces(self) -> Iterator[Tensor]:
        if self.step.is_renaming:
            for piece in self.sources.pieces(self.step.sources[0]):
                yield widened(piece).to(self.dtype)
        else:
            yield self(once=True).detach().flatten()


def _opened(path: Path, numbers: dict[str, float]) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Any]]:
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    return open_gguf(path) if path.suffix == ".gguf" else open_pickle(path, numbers)


def save_tensors(
    folder: Path,
    stem: str,
    state: Mapping[str, Tensor],
    max_shard_size: int | str = "5GB",
    variant: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as one safetensors file, or as shards with an index; of TensorFiles one at a time is in
    memory. Shards of an older save with other names are removed only after the new ones are in place."""
    limit = parse_size(max_shard_size, "max_shard_size")
    tensors = state if isinstance(state, TensorFiles) else TensorFiles.of(state)
    shards: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        nbytes = tensors.nbytes_of(name)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
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
            held = tensors.renamed({name: name for name in shard})
            write_safetensors(place, held, {"format": "pt", **(metadata or {})})
        if count > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            content = {"metadata": {"total_size": tensors.nbytes()}, "weight_map": where}
            made[-1].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
