"""Processes that work together, for tests of what runs in several: started once in a test run, used by many.

    def total(start):                       # at the top of the test's module: runs in every process
        import torch.distributed as dist

        mine = torch.tensor([start + dist.get_rank()])
        dist.all_reduce(mine)
        return mine.item()

    def test_total(workers):                # the fixture of conftest.py
        assert workers.run(total, 3) == [7, 7]

`run(function, *arguments, count=2, limit=300, **options)` calls a function in `count` processes and gives
what each returned, in the order of ranks. Functions are found again by their name, so they stand at the top
of a module; arguments and results are pickled (a folder of `tmp_path` serves for what is large). Each call
has a gloo group of its own, found through a file, and RANK, WORLD_SIZE and LOCAL_RANK are those that torchrun
sets; before it the seed is 0, and each process has one thread. What one process raises ends the call:
`Failed`, with the trace of every process that had one. One that does not answer within `limit` seconds is
killed, and `Failed` has where it was; the next call starts another. All end with the test run.

Tests that use the fixture are of one xdist group and are run first, so that one process of pytest-xdist has
them and starts these.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Where it can be, one process loads torch, and the others are copies of it.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
LOADED = ["torch", "torch.distributed", "torch.distributed.fsdp", "joyedit.pipelines.pipeline"]
GRACE = 10  # seconds that the others have when one has failed


class Failed(Exception):
    """What went wrong in which process."""


class Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context(METHOD)
        if METHOD == "forkserver":
            context.set_forkserver_preload(LOADED)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is noticed

    def answer(self) -> tuple[str, Any]:
        try:
            kind, content = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self.process.join()
            return "failed", f"the process ended with exit code {self.process.exitcode}\n"
        return kind, content

    def end(self) -> None:
        self.connection.close()
        self.process.join(GRACE)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Workers:
    def __init__(self) -> None:
        self.all: list[Worker] = []

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        count: int = 2,
        limit: float = 300,
        **options: Any,
    ) -> list[Any]:
        """What `function` returned in each process. Raises Failed."""
        while len(self.all) < count:
            self.all.append(Worker())
        used = self.all[:count]
        call = pickle.dumps((function, arguments, options))
        with tempfile.TemporaryDirectory() as folder:
            for rank, worker in enumerate(used):
                worker.connection.send((rank, count, folder, limit, call))
            answers = gathered(used, limit)
            for rank, worker in enumerate(used):
                if worker not in answers:
                    worker.kill()
                    stack = Path(folder, f"stack-{rank}").read_text() if has(folder, rank) else ""
                    answers[worker] = ("failed", f"did not answer and was stopped\n{stack}")
        self.all = [worker for worker in self.all if worker.process.is_alive()]
        found = [answers[worker] for worker in used]
        wrong = [f"process {rank}: {said}" for rank, (kind, said) in enumerate(found) if kind == "failed"]
        if wrong:
            raise Failed("\n".join(wrong))
        return [said for _, said in found]

    def stop(self) -> None:
        for worker in self.all:
            worker.end()
        self.all = []


def gathered(workers: list[Worker], limit: float) -> dict[Worker, tuple[str, Any]]:
    """What they answer within the limit, which is short when one has failed."""
    answers: dict[Worker, tuple[str, Any]] = {}
    end = time.monotonic() + limit + 1  # after which each has written where it was
    while len(answers) < len(workers):
        waiting = {worker.connection: worker for worker in workers if worker not in answers}
        ready = wait(list(waiting), max(0.0, end - time.monotonic()))
        if not ready:
            break
        for worker in (waiting[connection] for connection in ready):
            answers[worker] = worker.answer()
            if answers[worker][0] == "failed":
                end = min(end, time.monotonic() + GRACE)
    return answers


def has(folder: str, rank: int) -> bool:
    return Path(folder, f"stack-{rank}").is_file()


# --------------------------------------------------------------------------------------- in the new processes
def serve(connection: Connection) -> None:
    """Do calls until the other side closes."""
    import torch

    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of a machine may lead nowhere
    while True:
        try:
            rank, count, folder, limit, call = connection.recv()
        except (EOFError, OSError):
            return
        with Path(folder, f"stack-{rank}").open("w") as stack:
            faulthandler.dump_traceback_later(limit, file=stack)
            try:
                answer = pickle.dumps(("done", called(rank, count, folder, call)))
            except BaseException:
                answer = pickle.dumps(("failed", traceback.format_exc()))
            faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(answer)


def called(rank: int, count: int, folder: str, call: bytes) -> Any:
    """The result of a call, in a group of its own."""
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count)
    )
    function, arguments, options = pickle.loads(call)
    torch.manual_seed(0)
    store = dist.FileStore(str(Path(folder, "store")), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        dist.barrier()  # one that is done at once must not go before all have met
        return function(*arguments, **options)
    finally:
        with contextlib.suppress(Exception):  # of a group that is broken already
            dist.destroy_process_group()
