"""What stands for a CUDA graph on a CPU: a tape of operations and of the memory that they read and write.

It runs what was recorded in the memory where it was recorded, and knows nothing of what Python would do now.
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from joyedit.graphs import GraphedCalls


class Tape(TorchDispatchMode):
    """Operations as they run, with the memory that they read and write."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def record(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        same_memory = functools.partial(tree_map_only, Tensor, Tensor.detach)
        args, kwargs, out = map(same_memory, (args, kwargs or {}, out))
        given = set(map(memory, tensors_of((args, kwargs))))
        # Neither views nor what is changed in place: these have the memory of what was given.
        made = [tensor if memory(tensor) not in given else None for tensor in tensors_of(out)]
        self.calls.append((func, args, kwargs, made))
        return out

    def forget(self):
        """Between replays, other graphs have this memory."""
        with torch.inference_mode():  # where tensors of either mode may be changed
            for tensor in (tensor for *_, made in self.calls for tensor in made if tensor is not None):
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0)

    def replay(self):
        self.forget()
        for func, args, kwargs, made in self.calls:
            for old, new in zip(made, tensors_of(func(*args, **kwargs)), strict=True):
                if old is not None:
                    old.copy_(new)


Tape.__torch_dispatch__ = Tape.record  # not in the class, where PyTorch would load its compiler for it


def tensors_of(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def memory(tensor):
    return tensor.untyped_storage().data_ptr()


class TapeCapture:
    """Stands for `CudaCapture`."""

    def __init__(self, device):
        self.tapes, self.replays, self.using = [], 0, False

    @contextlib.contextmanager
    def in_turn(self):
        assert not self.using, "two at a time"
        self.using = True
        yield
        self.using = False

    def warm_up(self, run):
        return run()

    def capture(self, run):
        with Tape() as tape:
            result = run()
        tape.forget()
        self.tapes.append(tape)
        self.last = tape

        def replay():
            self.replays += 1
            self.last.forget()
            self.last = tape
            tape.replay()

        return result, replay

    def finish(self):
        pass


class Counted(GraphedCalls):
    """With tapes, whose numbers can be asked for."""

    def __init__(self, new_capture=TapeCapture, most=8):
        super().__init__(new_capture, most)

    @property
    def numbers(self):
        """Recorded, replayed."""
        captures = self.captures.values()
        return sum(len(one.tapes) for one in captures), sum(one.replays for one in captures)
