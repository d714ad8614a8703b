"""The files that a run goes on from, whichever number of processes wrote them.

    state.pt    all of it: {step, parameters, average, optimizer, random}
    state/      of weights that are divided: shard-*.safetensors with each process's rows of the parameters
                and of their average, by PyTorch's distributed checkpoints, and rest-<rank>.pt with its rows
                of what the optimiser keeps, the step and the random state

Both hold tensors and numbers alone, and are replaced whole.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from joyedit.checkpoints.replacing import DISK_FULL_WORDS, replacing, replacing_folder
from joyedit.checkpoints.safetensors_files import metadata_json
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.training.processes import Processes
from joyedit.training.sharding import Rows

STATE, SHARDS = "state.pt", "state"
AVERAGE = "average/"  # before the names of averages in shards
OFFSETS = "DCP_SHARDING_INFO"  # where the header of a shard says which rows it has

Pieces = list[tuple[int, Tensor]]  # rows that follow one another, with the number of the first


class Saved:
    """What files hold, each tensor until it is asked for."""

    step: int
    random: Tensor
    param_groups: list[dict[str, Any]]
    parameters: dict[str, Pieces]
    average: dict[str, Pieces] | None
    kept: list[dict[str, Pieces]]  # what the optimiser has of each parameter

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape_of(pieces) for name, pieces in self.parameters.items()}

    def optimizer_state(self, rows: list[Rows | None]) -> dict[str, Any]:
        """As an optimiser loads it that has these rows of its parameters."""
        kept = {}
        for i, found in enumerate(self.kept):
            if found:
                kept[i] = {name: cut(pieces, rows[i]) for name, pieces in found.items()}
        return {"state": kept, "param_groups": self.param_groups}


def find_state(folder: Path) -> Path | None:
    """The newer one, where a process that died has left both."""
    found = [path for path in (folder / STATE, folder / SHARDS) if path.exists()]
    return max(found, key=lambda path: open_saved(path).step, default=None)


def open_saved(path: Path) -> Saved:
    return WholeState(path) if path.name == STATE else DividedState(path)


class WholeState(Saved):
    def __init__(self, path: Path):
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        self.step, self.random = state["step"], state["random"]
        self.parameters = {name: [(0, tensor)] for name, tensor in state["parameters"].items()}
        average = state["average"]
        self.average = average and {name: [(0, tensor)] for name, tensor in average.items()}
        self.param_groups = state["optimizer"]["param_groups"]
        states = state["optimizer"]["state"]
        count = sum(len(group["params"]) for group in self.param_groups)
        self.kept = [{k: [(0, t)] for k, t in states.get(i, {}).items()} for i in range(count)]


class DividedState(Saved):
    def __init__(self, folder: Path):
        rests = [torch.load(path, weights_only=True, map_location="cpu", mmap=True)
                 for path in sorted(folder.glob("rest-*.pt"))]  # fmt: skip
        self.step, self.random = rests[0]["step"], rests[0]["random"]
        together = rows_in(folder)
        names = [name for name in together if not name.startswith(AVERAGE)]
        self.parameters = {name: together[name] for name in names}
        averaged = {name: together[AVERAGE + name] for name in names if AVERAGE + name in together}
        self.average = averaged or None
        self.param_groups = rests[0]["optimizer"]["param_groups"]
        self.kept = []
        for i, whole in enumerate(rests[0]["whole"]):
            parts = [(rest["starts"][i], rest["optimizer"]["state"].get(i, {})) for rest in rests]
            of_rows = {name for name, tensor in parts[0][1].items() if tensor.ndim and not whole}
            self.kept.append(
                {
                    name: [(start, part[name]) for start, part in (parts if name in of_rows else parts[:1])]
                    for name in parts[0][1]
                }
            )


def rows_in(folder: Path) -> dict[str, Pieces]:
    """The tensors of a folder's shards by name."""
    found: dict[str, Pieces] = {}
    for path in sorted(folder.glob("shard-*.safetensors")):
        files, places = TensorFiles([path]), metadata_json(path, OFFSETS)
        for name in files:
            found.setdefault(name, []).append((places[name]["saved_offsets"][0], files[name]))
    return {name: sorted(pieces, key=lambda piece: piece[0]) for name, pieces in found.items()}


def shape_of(pieces: Pieces) -> tuple[int, ...]:
    tensors = [tensor for _, tensor in pieces]
    return (sum(map(len, tensors)), *tensors[0].shape[1:]) if tensors[0].ndim else ()


def cut(pieces: Pieces, rows: Rows | None) -> Tensor:
    """These rows of a tensor, or all of it."""
    if pieces[0][1].ndim == 0:
        return pieces[0][1]
    start, stop = (0, shape_of(pieces)[0]) if rows is None else (rows.start, rows.stop)
    parts = [tensor[max(start - first, 0) : max(stop - first, 0)] for first, tensor in pieces]
    held = [part for part in parts if len(part)] or parts[:1]
    return held[0] if len(held) == 1 else torch.cat(held)


def write_whole(folder: Path, state: Mapping[str, Any]) -> None:
    """Raises OSError that names the file where the disk is full; the last state is there then."""
    with replacing(folder / STATE) as temporary:
        torch.save(dict(state), temporary)
    shutil.rmtree(folder / SHARDS, ignore_errors=True)


def write_divided(
    folder: Path, state: Mapping[str, Any], rows: Mapping[str, Rows], order: list[str], processes: Processes
) -> None:
    """As `write_whole`, of processes that each have some rows. order: the optimiser's parameters by name."""
    starts = [rows[name].start if name in rows else 0 for name in order]
    rest = {"step": state["step"], "random": state["random"], "optimizer": state["optimizer"],
            "starts": starts, "whole": [name not in rows for name in order]}  # fmt: skip
    tensors = dict(state["parameters"])
    for name, mean in (state["average"] or {}).items():
        tensors[AVERAGE + name] = mean
    with filled_together(folder / SHARDS, processes) as place:
        with replacing(place / f"rest-{processes.rank:05}.pt") as temporary:
            torch.save(rest, temporary)
        save_rows(place, tensors, rows, processes)
    if processes.first:
        (folder / STATE).unlink(missing_ok=True)
    processes.wait()


@contextlib.contextmanager
def filled_together(folder: Path, processes: Processes) -> Iterator[Path]:
    """A folder that all processes write to, and that replaces the one that is there when all have done so."""
    with contextlib.ExitStack() as stack:
        place = folder
        if processes.first:
            place = stack.enter_context(replacing_folder(folder, may_replace=lambda old: None))
            place.mkdir()
        place = Path(processes.told(str(place)))
        yield place
        processes.wait()
    processes.wait()


def save_rows(
    place: Path, tensors: Mapping[str, Tensor], rows: Mapping[str, Rows], processes: Processes
) -> None:
    """Tensors of which each process has some rows, by PyTorch's writer of distributed checkpoints."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    kinds = {tensor.device.type for tensor in tensors.values()}
    mesh = init_device_mesh(kinds.pop(), (processes.count,))
    held: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if own := rows.get(name.removeprefix(AVERAGE)):
            stride = torch.empty(own.shape, device="meta").stride()
            held[name] = DTensor.from_local(
                tensor, mesh, [Shard(0)], run_check=False, shape=own.shape, stride=stride
            )
        elif processes.first:
            held[name] = tensor
    writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
    try:
        save(held, storage_writer=writer)
    except CheckpointException as error:  # no Exception
        if any(words in str(error) for words in DISK_FULL_WORDS):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {place} cannot be written") from error
        raise RuntimeError(str(error)) from error
