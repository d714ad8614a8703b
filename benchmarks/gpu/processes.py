"""Rows measured in processes of their own, so that a broken kernel takes one row with it and not the run.

After an illegal address no CUDA call of that process works any more, a kernel may never end, and a crash in a
library ends the process itself. The process that writes the file therefore never touches the device. A worker
says which row it begins and sends the result; one that breaks, ends or takes too long is replaced, and its
successor goes on with the next row.

This module imports neither torch nor triton: whether Triton interprets is settled before they are.
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

CONTEXT = multiprocessing.get_context("spawn")
LEFT_OUT = "left out: the time was spent"
STARTING = 120  # seconds that a process may take to load what it needs
NAMING = 5  # seconds to say that a row is left out
ENDING = 10  # seconds that one is waited for: the driver may hold on to it


class NotReady(Exception):
    """A process cannot load what it needs."""


class Task(NamedTuple):
    """Rows first, first + step, first + 2 step, ... of an area; those that would begin after `deadline` (of
    `time.monotonic`, which all processes of a machine share) are only named."""

    module: str
    first: int
    step: int
    deadline: float


# ----------------------------------------------------------------------------------------- in the new process
def work(connection: Connection, dry: bool) -> None:
    """Describe the machine, then do tasks until the other side closes. Sends pairs (kind, content):

    ("machine", description)                 once
    ("begin", (number, name, now))           before each row
    ("row", row)                             after it
    ("end", None)                            for each task
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C reaches all processes: one of them reports
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # the processes are parallel already
    import torch

    from benchmarks.gpu.machine import described
    from benchmarks.gpu.setting import Setting

    setting = Setting(torch.device("cpu" if dry else "cuda"), dry)
    connection.send(("machine", described(setting)))
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        do(task, setting, connection)
        connection.send(("end", None))


def do(task: Task, setting: Any, connection: Connection) -> None:
    import torch

    number = -1
    try:
        for number, (name, measure) in enumerate(importlib.import_module(task.module).rows(setting)):
            if number < task.first or (number - task.first) % task.step:
                continue
            connection.send(("begin", (number, name, time.monotonic())))
            if time.monotonic() > task.deadline:
                connection.send(("row", {"name": name, "failed": LEFT_OUT}))
                continue
            torch.manual_seed(0)
            with torch.no_grad():
                row = measured(name, measure, setting)
            connection.send(("row", row))
            del measure
            if row["failed"] is not None and broken(setting):
                os._exit(1)  # an ordinary end would wait for the device
            gc.collect()
            torch.cuda.empty_cache()
    except Exception as error:  # of the area itself: it has no more rows
        connection.send(("begin", (number + 1, "the rows of the area", time.monotonic())))
        connection.send(("row", {"name": "the rows of the area", "failed": reason(error)}))


def measured(name: str, measure: Any, setting: Any) -> dict[str, Any]:
    try:
        figures = measure()
        setting.finish()  # what went wrong on the device is this row's fault
        return {"name": name, "failed": None, **json.loads(json.dumps(figures, allow_nan=False))}
    except Exception as error:
        return {"name": name, "failed": reason(error)}


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def broken(setting: Any) -> bool:
    """Whether the device of this process can no longer be used."""
    try:
        setting.finish()
    except Exception:
        return True
    return False


# ------------------------------------------------------------------------------------- in the one that writes
class Worker:
    """A process, and what it is doing."""

    def __init__(self, dry: bool):
        self.dry = dry
        self.start(None)

    def start(self, task: Task | None) -> None:
        self.connection, theirs = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=work, args=(theirs, self.dry), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is noticed
        self.row: list[Any] | None = None  # number and name of the one that is being measured
        self.is_fresh = True  # no row is done yet
        self.give(task)

    def give(self, task: Task | None) -> None:
        self.task, self.since = task, time.monotonic()
        if task:
            self.connection.send(task)

    def machine(self) -> dict[str, Any]:
        """What the process says of its machine when it has loaded. Raises NotReady when it has not."""
        if not self.connection.poll(STARTING):
            raise NotReady(f"a process was not ready in {STARTING} s")
        try:
            return self.connection.recv()[1]
        except EOFError:
            raise NotReady(f"a process could not start: {self.ending()}") from None

    def ending(self) -> str:
        self.process.join(ENDING)
        return f"the process ended with exit code {self.process.exitcode}"

    def stop(self) -> None:
        self.process.kill()
        self.process.join(ENDING)
        self.connection.close()

    def latest(self, limit: float, end: float) -> float:
        """When it is given up: a row after `limit` seconds or at `end`, whichever is first, but one that is
        only named, after that, is left a moment."""
        if self.row is None:
            return self.since + STARTING
        return min(self.since + limit, max(end, self.since + NAMING))

    def heard(self) -> Iterator[dict[str, Any]]:
        """Take one message, or notice the end; a row that is done is given."""
        try:
            kind, content = self.connection.recv()
        except (EOFError, ConnectionResetError):
            yield from self.replaced(self.ending())
            return
        self.since = time.monotonic()
        if kind == "begin":
            *self.row, self.since = content
        elif kind == "row":
            self.passed()
            yield content
        elif kind == "end":
            self.task = None

    def passed(self) -> None:
        assert self.task and self.row
        self.task = self.task._replace(first=self.row[0] + self.task.step)
        self.row, self.is_fresh = None, False

    def replaced(self, why: str) -> Iterator[dict[str, Any]]:
        """The row that it was at has failed; a new process goes on with the rest. One that never came to a
        row would not get further the next time: the area has ended."""
        self.stop()
        if self.row is not None:
            name = self.row[1]
            self.passed()
            yield {"name": name, "failed": why}
        elif self.is_fresh:
            self.task = None
            yield {"name": "the rows of the area", "failed": why}
        self.start(self.task)


class Workers:
    """The processes of a run. Use as a context manager: at its end, however it comes, all are stopped."""

    def __init__(self, dry: bool):
        self.first = Worker(dry)
        self.others: list[Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in (self.first, *self.others):
            worker.stop()

    def measure(
        self, module: str, count: int, deadline: float, limit: float, end: float
    ) -> Iterator[dict[str, Any]]:
        """The rows of an area as they are done, by so many processes at a time.

        No row begins after `deadline`, and none is left more than `limit` seconds, or until `end`.
        """
        self.others = [Worker(self.first.dry) for _ in range(count - 1)]
        for share, worker in enumerate((self.first, *self.others)):
            worker.give(Task(module, share, count, deadline))
        while busy := [worker for worker in (self.first, *self.others) if worker.task]:
            patience = min(worker.latest(limit, end) for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(0.0, patience))
            for worker in busy:
                if worker.connection in ready:
                    yield from worker.heard()
                elif time.monotonic() >= worker.latest(limit, end):
                    is_last = time.monotonic() >= end
                    yield from worker.replaced(LEFT_OUT if is_last else f"given up after {limit:g} s")
        for worker in self.others:
            worker.stop()
        self.others = []
