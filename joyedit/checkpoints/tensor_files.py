"""Weight files: tensors by name out of safetensors files and pickles, and back into safetensors.

Opening reads headers alone; a tensor is read when it is asked for.

Source: safetensors; the Diffusers and transformers folder formats (shards and index).
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from joyedit.checkpoints.mistaken import refuse_pointers
from joyedit.checkpoints.replacing import replacing


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of one or several weight files by name, read when asked for.

    safetensors files are mapped, pickles are opened with `weights_only=True` and mapped where their format
    allows. `numbers` are what a training program notes in a pickle beside the tensors ("global_step", ...).
    """

    def __init__(self, files: Sequence[Path], prefix: str = ""):
        self.files = list(files)
        self.numbers: dict[str, float] = {}
        self._where: dict[str, Any] = {}  # name -> function that reads it
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        refuse_pointers(self.files)
        for path in self.files:
            is_pickle = path.suffix != ".safetensors"
            opened = _open_pickle(path, self.numbers) if is_pickle else _open_safetensors(path)
            for key, shape, dtype, read in opened:
                name = key.removeprefix(prefix)
                if name in self._where:
                    raise ValueError(
                        f"{path}: tensor {name!r} is in two of the files {[f.name for f in self.files]}"
                    )
                self._where[name], self._shapes[name], self._dtypes[name] = read, shape, dtype

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

    def nbytes(self) -> int:
        return sum(torch.Size(s).numel() * self._dtypes[n].itemsize for n, s in self._shapes.items())


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises ValueError when the file is truncated or not one."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size, 100_000_000):
            raise ValueError(f"{path} is not a safetensors file, or was cut off ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ValueError(f"{path} is not a safetensors file: its header is unreadable") from None
    try:
        end = max(
            (entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0
        )
    except (AttributeError, KeyError, TypeError, IndexError):
        raise ValueError(f"{path} is not a safetensors file: its header lists no tensors") from None
    if 8 + length + end != size:
        raise ValueError(
            f"{path} was cut off or damaged: {size} bytes, its header promises {8 + length + end}"
        )
    return header


def _open_safetensors(path: Path):
    header = safetensors_header(path)
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from None

    def read(key: str, once: bool = False) -> Tensor:
        # Pages of a mapping count as memory in use for as long as it lives: a copied tensor gets its own.
        return (safe_open(path, framework="pt") if once else opened).get_tensor(key)

    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{path}: tensor {key!r} has dtype {entry['dtype']}, which is not supported")
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        yield key, tuple(entry["shape"]), dtype, functools.partial(read, key)


# Checkpoints that Lightning wrote, Stable Diffusion's among them, name this class; an empty one stands in.
_CALLBACK = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})


def _unpickle(path: Path, mmap: bool) -> Any:
    with torch.serialization.safe_globals([_CALLBACK]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _open_pickle(path: Path, numbers: dict[str, float]):
    """The tensors of a pickle; the numbers beside them go into `numbers`."""
    try:
        state = _unpickle(path, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # the legacy format cannot be mapped, everything else is damage
            raise ValueError(f"{path} is not a readable PyTorch file: {error}") from None
        try:
            state = _unpickle(path, mmap=False)
        except Exception as damage:
            raise ValueError(f"{path} cannot be opened as weights only: {damage}") from None
    except Exception as error:  # the unpickler raises half a dozen types, for damage and for code alike
        raise ValueError(f"{path} cannot be opened as weights only: {error}") from None
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            numbers.update({key: value for key, value in state.items() if isinstance(value, (int, float))})
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict (names to tensors)")
    for key, tensor in state.items():
        yield key, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor, once=False: tensor


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
    with contextlib.ExitStack() as files:  # all are moved into place together, when the last one is written
        for name, shard in zip(names, shards, strict=True):
            tensors = {key: tensor.detach().contiguous() for key, tensor in shard.items()}
            header = {"format": "pt", **(metadata or {})}
            save_file(tensors, files.enter_context(replacing(folder / name)), header)
        if count > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(tensor.nbytes for tensor in state.values())
            content = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
            files.enter_context(replacing(index)).write_text(content + "\n", encoding="utf-8")
    stale = re.compile(re.escape(stem + tag) + r"(-\d{5}-of-\d{5})?\.safetensors")
    for path in folder.iterdir():
        if path.name not in names and stale.fullmatch(path.name) or (count == 1 and path == index):
            path.unlink()
