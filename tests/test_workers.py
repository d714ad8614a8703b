"""The processes that tests of several processes share."""

import os
import time

import pytest
import torch

from tests.workers import Failed


def total(start, more=0):
    import torch.distributed as dist

    mine = torch.tensor([start + more + dist.get_rank()])
    dist.all_reduce(mine)
    return mine.item(), os.environ["RANK"], os.getpid()


def broken(rank):
    """One raises, the others wait for it."""
    import torch.distributed as dist

    if dist.get_rank() == rank:
        raise KeyError("what is wrong here")
    dist.barrier()


def hanging():
    import torch.distributed as dist

    if dist.get_rank() == 1:
        time.sleep(1000)


def dying():
    os._exit(7)


@pytest.mark.slow
def test_results_and_failures_of_every_process(workers):
    first = workers.run(total, 3, more=1)
    assert [found[:2] for found in first] == [(9, "0"), (9, "1")]
    with pytest.raises(Failed, match="(?s)process 1: .*in broken.*what is wrong here"):
        workers.run(broken, 1)
    again = workers.run(total, 3)
    assert [found[2] for found in again] == [found[2] for found in first]  # the same processes go on
    with pytest.raises(Failed, match=r"(?s)process 1: did not answer and was stopped.*in hanging"):
        workers.run(hanging, limit=1)
    with pytest.raises(Failed, match=r"process 0: the process ended with exit code 7"):
        workers.run(dying)
    assert [found[0] for found in workers.run(total, 0, count=3)] == [3, 3, 3]
