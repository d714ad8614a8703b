"""Which kernel tests this process can run, and how a launch is counted.

Tests of the operations are in ops/ and run wherever kernels run: on a GPU (`pytest -m gpu`), and on any
machine under Triton's interpreter, in a process of its own that test_interpreter.py starts, because a kernel
is interpreted or compiled from its definition on. In a process without either they are not collected.
"""

import collections
import contextlib
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    collect_ignore = [
        "test_interpreter.py",
        "test_ahead_of_time.py",
        "test_dispatch.py",
        "test_layouts.py",
        "test_roofline.py",
    ]
elif not torch.cuda.is_available():
    collect_ignore = ["ops"]


def pytest_collection_modifyitems(items):
    """The longest tests begin first, so that other processes do the rest meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_interpreter.py")


class Launches(TorchDispatchMode):
    """Counts what is called of `torch.ops.joyedit`, by name; the rest passes."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "joyedit":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches():
    """A context manager that gives the Counter of the kernels launched within it, by operation."""

    @contextlib.contextmanager
    def launches():
        with Launches() as mode:
            yield mode.counts

    return launches
