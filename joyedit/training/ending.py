"""How processes that work together end: all of them within seconds of the first that fails, and with its
words alone.

A process that waits for the others inside gloo or NCCL runs no Python in its main thread, and so no handler
of a signal either. A thread beside it looks for what ends them: a failure, which the first that has one notes
in the store that torchrun keeps for all; and signals, whose numbers Python's own handler in C writes to a
socket. The main thread then has GRACE seconds to end by itself, and leaves no half-written file. If it does
not, it waits for a message that nobody will send, and the process ends there: what writes waits for nobody.

Without this the others would wait: of NCCL for as long as its patience lasts, and after a signal until
torchrun kills them, 30 seconds later.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

log = logging.getLogger("joyedit")

NOTE = "joyedit failed"  # the key in the store, and the rank of the first that has failed
LOOK, GRACE = 0.5, 5.0  # seconds between two looks at the store, and to end by itself
LEFT = 0  # the byte that ends the thread; others are the numbers of signals
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class FailedElsewhere(RuntimeError):
    """Another process has failed, and said why."""


@contextlib.contextmanager
def watched(store: Any, rank: int, at_signals: bool) -> Iterator[None]:
    """While the block runs, nothing keeps the process waiting after a failure elsewhere or, `at_signals`,
    after a signal that is to end it; without, signals are the caller's matter, who may want to finish
    something.

    store: a connection that nobody else uses, since one who waits holds it.
    """
    looks, tells = socket.socketpair()
    tells.setblocking(False)
    catches = at_signals and threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False) if catches else None
    thread = threading.Thread(target=watch, args=(looks, store, rank), daemon=True)
    thread.start()
    try:
        yield
    finally:
        if before is not None:
            signal.set_wakeup_fd(before)
        tells.send(bytes([LEFT]))
        thread.join()
        looks.close()
        tells.close()


def watch(looks: socket.socket, store: Any, rank: int) -> None:
    """Until the block is left, or longer than it may last."""
    cause = None
    while cause is None:
        for byte in received(looks, LOOK):
            if byte == LEFT:
                return
            cause = byte if byte in ENDING else cause
        if cause is None and store is not None:
            try:
                cause = 0 if store.check([NOTE]) else None
            except Exception:  # it went with the process that kept it
                store = None
    end = time.monotonic() + GRACE
    while (left := end - time.monotonic()) > 0:
        if LEFT in received(looks, left):
            return
    if cause and is_first_to_fail(store, rank):
        log.error("joyedit: ended by %s while waiting for another process", signal.Signals(cause).name)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(128 + cause if cause else 1)


def received(looks: socket.socket, seconds: float) -> bytes:
    return looks.recv(64) if select.select([looks], [], [], seconds)[0] else b""


def is_first_to_fail(store: Any, rank: int) -> bool:
    """Whether no other process has noted its failure where all see it."""
    try:
        return store.compare_set(NOTE, "", str(rank)) == str(rank).encode()
    except Exception:  # the place is gone with the process that had it
        return rank == 0


def is_lost(error: BaseException) -> bool:
    """Whether it is of a message to a process that is gone, or from one."""
    import torch.distributed as dist

    return isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def leave_group() -> None:
    """Out of the process group after a failure, as far as that goes: NCCL waits there for what the others
    have not sent, and the message of this process is still to come."""
    import torch.distributed as dist

    def leave() -> None:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(GRACE / 2)
