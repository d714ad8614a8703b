"""The processes that work together, on a training or on an edit: which of them this one is, and the few words
and numbers that they tell each other.

torchrun starts them, and says in the environment who is who. Each computes its share; the first one alone
writes, and shows progress. What all do together must be as often on all of them: a pass through weights that
are divided among them (`sharding.py`), or tokens (`joyedit/parallel.py`), asks every process for its part.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from joyedit.training.ending import FailedElsewhere, is_first_to_fail, is_lost, leave_group, watched

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Word = TypeVar("Word")


@dataclasses.dataclass(frozen=True)
class Processes:
    """This one is `rank` of `count`. One alone asks and tells nobody."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.count > 1

    def share(self, number: int) -> range:
        """The places of this process among so many."""
        return range(self.rank * number // self.count, (self.rank + 1) * number // self.count)

    def turns(self, number: int) -> list[tuple[int, bool]]:
        """Places among so many in turns, the same number on every process; False: another one has it, and it
        is only gone through again."""
        places = range(self.rank, -(-number // self.count) * self.count, self.count)
        return [(min(place, number - 1), place < number) for place in places]

    def in_step(self, items: Sequence[Any]) -> list[tuple[Any, bool]]:
        """These items, and the last of them again (False) until every process has as many."""
        missing = self.largest(len(items)) - len(items)
        return [(item, True) for item in items] + [(items[-1], False)] * missing

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process does it, and then the others, who find what it left."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        self.largest(0)

    def largest(self, number: int) -> int:
        if not self.several:
            return number
        import torch
        import torch.distributed as dist

        held = torch.tensor([number])
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def total(self, number: float) -> float:
        if not self.several:
            return number
        import torch

        return self.sum(torch.tensor([number], dtype=torch.float64)).item()

    def sum(self, tensor: "Tensor") -> "Tensor":
        """In place."""
        if self.several:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def told(self, word: Word) -> Word:
        """What the first process says, whatever it is."""
        if not self.several:
            return word
        import torch
        import torch.distributed as dist

        words = [word]
        dist.broadcast_object_list(words, device=torch.device("cpu"))
        return words[0]

    def average_(self, tensors: "Sequence[Tensor]") -> None:
        """The mean over the processes, in place of each tensor; all in one message."""
        if not self.several or not tensors:
            return
        import torch

        together = self.sum(torch.cat([tensor.flatten() for tensor in tensors])) / self.count
        places = together.split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, places, strict=True):
            tensor.copy_(mean.view_as(tensor))


ALONE = Processes()


def started() -> Processes:
    """Those that torchrun has started, before they know each other."""
    rank, count = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    if not (count.isdecimal() and int(count) > 1):
        return ALONE
    return Processes(int(rank) if rank.isdecimal() else 0, int(count))


@contextlib.contextmanager
def joined(device: "torch.device", at_signals: bool = False) -> Iterator[Processes]:
    """The processes that were started, while the block runs; those that the caller has joined stay so.

    When one fails, all end within seconds (`ending.py`): the others raise FailedElsewhere, or are ended where
    they wait. at_signals: so they do when one gets a signal that is to end it; else the caller sees to that.
    Raises ConnectionError where another process is gone and has said nothing.
    """
    processes = started()
    if not processes.several:
        yield ALONE
        return
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    from joyedit.parallel import connect

    if dist.is_initialized():
        yield processes
        return
    (store, rank, count), (watched_store, *_) = next(rendezvous("env://")), next(rendezvous("env://"))
    with watched(watched_store, rank, at_signals):
        try:
            connect(device, store=store, rank=rank, world_size=count)
            yield processes
        except BaseException as error:
            first = is_first_to_fail(watched_store, rank)
            leave_group()
            if not first:
                raise FailedElsewhere(f"another process has failed, and then this one: {error}") from error
            if is_lost(error):
                raise ConnectionError("another process has ended, and did not say why") from error
            raise
        processes.wait()  # who has the store may not go before the others have looked
        dist.destroy_process_group()
