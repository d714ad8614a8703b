"""What the trainings here add to the room that users train by, `joyedit.training`: what is written down.

Plans are in samples. Processor time is recorded, since wall time means little on a shared machine.
"""

import json
import statistics
import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from joyedit.training.run import METRICS, Run

SAVE_EVERY, LOG_EVERY = 250, 50  # steps


def parameters_of(networks: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """All of them, as a `Run` knows them."""
    return {f"{name}.{key}": p for name, network in networks.items() for key, p in network.named_parameters()}


class Log:
    """Lines of the metrics: mean losses now and then, in each line samples, processor minutes and the time.

    batch: samples of a step.
    """

    def __init__(self, run: Run, batch: int):
        self.run, self.batch = run, batch
        self._losses: list[Mapping[str, float]] = []  # since the last line
        path = run.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        minutes = json.loads(lines[-1])["cpu_minutes"] if lines else 0.0
        self._before = minutes - time.process_time() / 60  # of the processes before this one

    @property
    def samples(self) -> int:
        return self.run.step * self.batch

    def add(self, **losses: float) -> None:
        """The losses of a step that is done."""
        self._losses.append(losses)
        if self.run.step % LOG_EVERY == 0:
            self.write(**{key: statistics.fmean(step[key] for step in self._losses) for key in losses})
            self._losses = []

    def write(self, **values: Any) -> None:
        minutes = round(self._before + time.process_time() / 60, 2)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.run.log(samples=self.samples, cpu_minutes=minutes, time=now, **values)
