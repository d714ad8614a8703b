"""A training that can be interrupted: its state in files, its metrics, the average of its weights.

A `Run` owns a folder. `state.pt` has all that the next step depends on beside the data: weights, optimiser,
average, random state, the step; of weights that are divided among processes it is the folder `state`. Each
save replaces it whole, so that whatever ends a process leaves the last one. `metrics.jsonl` is appended to; a
run that goes on cuts it back to the step of the state. Of several processes the first one writes.
"""

import contextlib
import json
import math
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from joyedit.checkpoints.replacing import replacing
from joyedit.training.processes import ALONE, Processes
from joyedit.training.sharding import Rows
from joyedit.training.states import cut, find_state, open_saved, write_divided, write_whole

METRICS = "metrics.jsonl"


class Run:
    """What a training has done: `step` steps, with these parameters by name and this optimiser. Loads what
    `folder` holds; raises ValueError for a state of other parameters.

    decay: of the average of the weights; None: there is none. rows: those of a parameter that this process
    has, of what is divided.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        decay: float | None = None,
        processes: Processes = ALONE,
        rows: Mapping[str, Rows] | None = None,
    ):
        self.folder, self.parameters, self.optimizer, self.decay = folder, dict(parameters), optimizer, decay
        self.processes, self.rows = processes, dict(rows or {})
        self.step = 0
        self.average = None
        if decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        folder.mkdir(parents=True, exist_ok=True)
        state = find_state(folder)
        self.resumed = state is not None
        if state is not None:
            self._load(state)
        if processes.first:
            self._cut_metrics()

    def update(self, clip: float) -> float:
        """One step of the optimiser on the gradients there are, no longer together than `clip`, and of the
        average. Returns their length."""
        norm = self._clip(clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None and self.decay is not None:
            decay = min(self.decay, self.step / (9 + self.step))  # early weights are soon forgotten
            live = [p.detach() for p in self.parameters.values()]
            for mean, p in zip(self.average.values(), live, strict=True):
                mean.lerp_(p, 1 - decay)
        return norm

    def _clip(self, most: float) -> float:
        if not self.rows:
            return nn.utils.clip_grad_norm_(self.parameters.values(), most).item()
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        divided = square_sum([grad for name, grad in grads.items() if name in self.rows])
        common = square_sum([grad for name, grad in grads.items() if name not in self.rows])
        norm = math.sqrt(self.processes.total(divided) + common)
        if norm > most:
            for grad in grads.values():
                grad.mul_(most / norm)
        return norm

    def set_rate(self, rate: float) -> None:
        """Of the optimiser; a group with a `share` has that share of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While the block runs, the parameters are their average, if there is one."""
        if self.average is None:
            yield
            return
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._set(self.average)
        try:
            yield
        finally:
            self._set(live)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        """In their memory: rows are that of a network, too."""
        for name, p in self.parameters.items():
            p.copy_(values[name])

    def log(self, **values: Any) -> None:
        """Append a line about the step to the metrics."""
        if not self.processes.first:
            return
        line = {
            "step": self.step,
            **{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()},
        }
        with (self.folder / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Raises OSError that names the file where the disk is full; the last state is there then."""
        state = {
            "step": self.step,
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
        }
        if self.rows:
            write_divided(self.folder, state, self.rows, self._order(), self.processes)
            return
        if self.processes.first:
            write_whole(self.folder, state)
        self.processes.wait()

    def _order(self) -> list[str]:
        """The parameters as the optimiser counts them."""
        names = {id(p): name for name, p in self.parameters.items()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def _load(self, path: Path) -> None:
        saved = open_saved(path)
        rows = {name: self.rows.get(name) for name in self.parameters}
        shapes = {n: tuple(own.shape if (own := rows[n]) else p.shape) for n, p in self.parameters.items()}
        if shapes != saved.shapes:
            raise ValueError(
                f"{path} is of {len(saved.shapes)} parameters, which are not the {len(shapes)} here"
            )
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(cut(saved.parameters[name], rows[name]))
                if self.average is not None and saved.average is not None:
                    self.average[name].copy_(cut(saved.average[name], rows[name]))
        self.optimizer.load_state_dict(saved.optimizer_state([rows[name] for name in self._order()]))
        torch.set_rng_state(saved.random.clone())
        self.step = saved.step

    def _cut_metrics(self) -> None:
        """Without the lines of steps that the state does not know of, and without a broken last one."""
        path = self.folder / METRICS
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if self.resumed and is_known(line, self.step)]
        if kept != lines:
            with replacing(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def square_sum(tensors: list[Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors))


def is_known(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def rate_at(
    step: int, steps: int, rate: float, schedule: str, warmup: int, held: float = 0.0, least: float = 0.0
) -> float:
    """The learning rate of step 0, 1, ...: rising over `warmup` steps, then constant, or down along half a
    cosine or a line. held: the share of the steps until which it stays; least: the share of the rate that it
    falls to."""
    if step < warmup:
        return rate * (step + 1) / warmup
    begin = max(warmup, held * steps)
    done = max(step - begin, 0) / max(steps - begin, 1)
    if schedule == "cosine":
        return rate * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * done)))
    return rate * (least + (1 - least) * (1 - done)) if schedule == "linear" else rate


class Stopping:
    """While this is entered, Ctrl-C and signals that would end the process are noted in `number`, for the
    loop to save first; when it is left they have their way. A second Ctrl-C does not wait; of several
    processes it does, since torchrun passes on what the terminal sends, too."""

    def __init__(self, processes: Processes = ALONE) -> None:
        self.number: int | None = None
        self._processes = processes
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    if signal.getsignal(number) not in (None, signal.SIG_IGN):
                        self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if kind is None and self.agree() and self.number is not None:
            signal.raise_signal(self.number)

    def agree(self) -> bool:
        """Whether any process was asked to stop: then all are."""
        self.number = self._processes.largest(self.number or 0) or None
        return self.number is not None

    def _note(self, number: int, frame: Any) -> None:
        if self.number == number == signal.SIGINT and not self._processes.several:
            self.__exit__()
        self.number = number
