"""A training that can be interrupted: its state in one file, its metrics, the average of its weights.

A `Run` owns a folder. `state.pt` has all that the next step depends on beside the data: weights, optimiser,
average, random state, the step. Each save replaces it whole, so that whatever ends a process leaves the last
one. `metrics.jsonl` is appended to; a run that goes on cuts it back to the step of the state.
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
from torch import nn

from joyedit.checkpoints.replacing import replacing

STATE, METRICS = "state.pt", "metrics.jsonl"


class Run:
    """What a training has done: `step` steps, with these parameters by name and this optimiser. Loads what
    `folder` holds; raises ValueError for a state of other parameters.

    decay: of the average of the weights; None: there is none.
    """

    def __init__(
        self,
        folder: Path,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        decay: float | None = None,
    ):
        self.folder, self.parameters, self.optimizer, self.decay = folder, dict(parameters), optimizer, decay
        self.step = 0
        self.average = None
        if decay is not None:
            self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        folder.mkdir(parents=True, exist_ok=True)
        self.resumed = (folder / STATE).is_file()
        if self.resumed:
            self._load()
        self._cut_metrics()

    def update(self, clip: float) -> float:
        """One step of the optimiser on the gradients there are, no longer together than `clip`, and of the
        average. Returns their length."""
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), clip).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None and self.decay is not None:
            decay = min(self.decay, self.step / (9 + self.step))  # early weights are soon forgotten
            live = [p.detach() for p in self.parameters.values()]
            for mean, p in zip(self.average.values(), live, strict=True):
                mean.lerp_(p, 1 - decay)
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
        live = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.average[name].to(p.device)
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = live[name]

    def log(self, **values: Any) -> None:
        """Append a line about the step to the metrics."""
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
        with replacing(self.folder / STATE) as temporary:
            torch.save(state, temporary)

    def _load(self) -> None:
        path = self.folder / STATE
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        saved = state["parameters"]
        shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in saved.items()}:
            raise ValueError(f"{path} is of {len(saved)} parameters, which are not the {len(shapes)} here")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(saved[name])
                if self.average is not None:
                    self.average[name].copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"].clone())
        self.step = state["step"]

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
    loop to save first; when it is left they have their way. A second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.number: int | None = None
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
        if self.number is not None and kind is None:
            signal.raise_signal(self.number)

    def _note(self, number: int, frame: Any) -> None:
        if self.number == number == signal.SIGINT:
            self.__exit__()
        self.number = number
