"""Who runs a network, and where it is meanwhile.

A network that does not fit beside the others comes to the accelerator while it runs (`visit`). Calls in
several threads may share networks: nobody moves one that another runs. One whose blocks are streamed lets
them come by themselves, see `streaming.py`.
"""

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from joyedit.checkpoints.network import Network
from joyedit.memory.streaming import BlockStreaming


@dataclasses.dataclass
class Visits:
    """Of one network: the threads that run it, and where they have brought it."""

    threads: list[int] = dataclasses.field(default_factory=list)
    device: torch.device | None = None
    change: threading.Condition = dataclasses.field(default_factory=threading.Condition)


_VISITS: "weakref.WeakKeyDictionary[nn.Module, Visits]" = weakref.WeakKeyDictionary()
_ENTERING = threading.Lock()  # over that table


def _visits_of(network: nn.Module) -> Visits:
    with _ENTERING:
        return _VISITS.setdefault(network, Visits())


@contextlib.contextmanager
def visit(network: Network, device: torch.device | None) -> Iterator[None]:
    """`network` stays on `device` while the block runs, and is in main memory after the last of those that
    run it there. device None: it stays where it is.

    Waits for other threads that run it elsewhere; and, where its blocks are streamed, for any other thread,
    since a block is in one place at a time. Raises RuntimeError when this thread itself runs it elsewhere.
    """
    visits, me = _visits_of(network), threading.get_ident()

    def free() -> bool:
        others = [thread for thread in visits.threads if thread != me]
        return not others or (visits.device == device and not BlockStreaming.is_attached(network))

    with visits.change:
        if me in visits.threads and visits.device != device:  # to wait for oneself would be for ever
            raise RuntimeError(f"the {type(network).__name__} runs on {visits.device} now, not on {device}")
        visits.change.wait_for(free)
        if not visits.threads:
            visits.device = device
            if device is not None:
                _move(network, device)
            if (streaming := BlockStreaming.of(network)) is not None:
                streaming.begin()
        visits.threads.append(me)
    try:
        yield
    finally:
        with visits.change:
            visits.threads.remove(me)
            if not visits.threads and device is not None:
                network.to("cpu")
            if not visits.threads and (streaming := BlockStreaming.of(network)) is not None:
                streaming.end()
            visits.change.notify_all()


def _move(network: Network, device: torch.device) -> None:
    try:
        network.to(device)
    except BaseException:  # it did not fit: what came goes back
        network.to("cpu")
        raise


def at_rest(network: Network) -> torch.device:
    """Where a network is when no call has brought it to an accelerator."""
    visits = _visits_of(network)
    with visits.change:
        return torch.device("cpu") if visits.threads and visits.device is not None else network.device
