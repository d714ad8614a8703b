"""CUDA graphs: what a call of a network launches is recorded once, and launched again all at once.

A step of a small network takes Python longer to launch than the GPU to compute. A graph repeats the launches
with their addresses: inputs are copied to where it reads them, results from where it writes them, and weights
must be where they were. What Python decided on the way, it repeats too. So a graph serves calls that have all
but the values of their tensors in common (`key_of`); for others there are other graphs.

What cannot be recorded runs as it is, after a warning that says why. With gradients nothing is recorded.

Source: PyTorch's notes on CUDA semantics, "CUDA Graphs".
"""

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from joyedit import ops, quantised
from joyedit.lora import running_deltas

log = logging.getLogger("joyedit")

MOST_GRAPHS = 8
CAPTURING = threading.Lock()  # a process may capture one graph at a time

PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))  # arguments that are their value


class NotRecorded(Exception):
    """Why a call cannot become a graph."""


class Capture(Protocol):
    """What records on one device. All its graphs compute in the same memory."""

    def in_turn(self) -> contextlib.AbstractContextManager[None]:
        """Around every use of the graphs and of their inputs and results: each after the one before."""
        ...

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """The result of `run`, after which nothing is left that is done the first time only."""
        ...

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record `run`: its result, which holds no values yet, and the function that computes them there."""
        ...

    def finish(self) -> None:
        """Wait until no graph is in use."""
        ...


class CudaCapture:
    """The graphs of a CUDA or ROCm device.

    They share one pool of memory: what one computes with is free for the others, since its results are copied
    before another is replayed. An event keeps that order across streams.
    """

    def __init__(self, device: torch.device):
        """Raises NotRecorded for another device."""
        if device.type != "cuda":
            raise NotRecorded(f"it computes on {device}, and graphs need a CUDA or ROCm device")
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.last_use = torch.cuda.Event()
        self.living: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, None] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(self.last_use)
        try:
            yield
        finally:
            self.last_use.record(stream)

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """On the stream of the capture, which needs workspaces of its own."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = run()
        current.wait_stream(self.stream)
        return result

    def capture(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        pool = next((one.pool() for one in self.living), None)  # a pool that no graph uses is gone
        try:
            # `torch.cuda.graph` stays on the stream when it fails; and other threads may go on meanwhile.
            with (
                CAPTURING,
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local"),
            ):
                result = run()
        except BaseException:
            self.living.clear()  # what failed may have left the pool half recorded
            raise
        self.living[graph] = None
        return result, graph.replay

    def finish(self) -> None:
        self.last_use.synchronize()


class Graph(NamedTuple):
    """A recorded call: where it reads its inputs, where it writes its result, and what computes that."""

    inputs: list[Tensor]
    result: Any
    replay: Callable[[], None]


class GraphedCalls:
    """Calls of networks: the first of a kind runs and is recorded, the others are replayed.

    Several threads may share it, one of which replays at a time. A copy, also a pickled one, begins anew.
    """

    def __init__(self, new_capture: Callable[[torch.device], Capture] = CudaCapture, most: int = MOST_GRAPHS):
        """new_capture: makes what records on a device. most: graphs that are kept; beyond, the one that was
        not used for the longest time goes."""
        self.new_capture, self.most = new_capture, most
        self.kept: dict[Hashable, Graph | None] = {}  # None: could not be recorded; the last used comes last
        self.captures: dict[torch.device, Capture] = {}
        self.told: set[str] = set()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), (self.new_capture, self.most)

    def __call__(self, network: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function(*args, **kwargs)` returns, in memory of its own.

        function: computes with the arguments and the weights of `network` alone. Arguments and result:
        tensors of one device, numbers and words, and tuples, lists and mappings of them.
        """
        if torch.is_grad_enabled() or inside_a_capture():
            return function(*args, **kwargs)
        inputs: list[Tensor] = []
        try:
            key = key_of(network, function, (args, kwargs), inputs)
            with self.lock:
                capture = self._capture_on(inputs)
                with capture.in_turn():
                    if key not in self.kept:
                        return self._record(capture, network, function, (args, kwargs), inputs)
                    graph = self.kept[key] = self.kept.pop(key)
                    if graph is not None:
                        copy_each(inputs, graph.inputs)
                        graph.replay()
                        return with_each(graph.result, torch.clone)
        except NotRecorded as reason:
            self._tell(network, reason)
        return function(*args, **kwargs)

    def __len__(self) -> int:
        """How many graphs there are."""
        return sum(graph is not None for graph in self.kept.values())

    def clear(self) -> None:
        """Forget all graphs, and free their memory."""
        with self.lock:
            for capture in self.captures.values():
                capture.finish()
            self.kept.clear()
            self.captures.clear()

    def _capture_on(self, inputs: list[Tensor]) -> Capture:
        """What records on the device of the inputs. Raises NotRecorded where there is nothing that does."""
        devices = {tensor.device for tensor in inputs}
        if len(devices) != 1:
            raise NotRecorded(f"its arguments are on {len(devices)} devices")
        (device,) = devices
        if device not in self.captures:
            self.captures[device] = self.new_capture(device)
        return self.captures[device]

    def _record(
        self,
        capture: Capture,
        network: nn.Module,
        function: Callable[..., Any],
        call: Any,
        inputs: list[Tensor],
    ) -> Any:
        own = [tensor.clone(memory_format=torch.contiguous_format) for tensor in inputs]
        following = iter(own)
        args, kwargs = with_each(call, lambda tensor: next(following))

        def run() -> Any:
            return function(*args, **kwargs)

        result = with_each(capture.warm_up(run), torch.clone)
        key = key_of(network, function, call, [])  # adapters come to the device when they are first used
        try:
            self.kept[key] = Graph(own, *capture.capture(run))
        except Exception as error:
            self.kept[key] = None
            self._tell(network, error.__context__ or error)
        if len(self.kept) > self.most:
            capture.finish()
            del self.kept[next(iter(self.kept))]
        return result

    def _tell(self, network: nn.Module, reason: BaseException) -> None:
        text = f"{type(network).__name__} runs without a graph: {str(reason).partition(chr(10))[0]}"
        if text not in self.told:
            self.told.add(text)
            log.warning("%s", text)


def inside_a_capture() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def key_of(network: nn.Module, function: Callable[..., Any], call: Any, inputs: list[Tensor]) -> Hashable:
    """What two calls have in common, if one is the replay of the other. The tensors of `call` are added to
    `inputs`. Raises NotRecorded for what no replay would repeat."""
    if any(map(torch.is_autocast_enabled, ("cuda", "cpu"))):
        raise NotRecorded("it runs under autocast, which keeps weights in other memory")
    method = getattr(function, "__func__", function)  # the key keeps no network alive
    return method, described(call, inputs), weights_of(network), settings()


def described(value: Any, tensors: list[Tensor]) -> Hashable:
    """A value by all but the numbers in its tensors, which are added to `tensors`, and their strides: graphs
    have copies."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype, value.device
    if isinstance(value, Mapping):
        return "mapping", *((described(k, tensors), described(v, tensors)) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), *(described(part, tensors) for part in value)
    if isinstance(value, nn.Module):  # of the network, under which something is found
        return "module", id(value)
    if isinstance(value, PLAIN):
        return type(value), value
    raise NotRecorded(f"a {type(value).__name__} is among its arguments")


def with_each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value of which each tensor is changed, in the order of `described`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: with_each(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [with_each(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def copy_each(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Copy, by one launch for all tensors of a dtype."""
    for dtype in {tensor.dtype for tensor in sources}:
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [tensor for tensor in targets if tensor.dtype == dtype],
            [tensor for tensor in sources if tensor.dtype == dtype],
        )


def weights_of(network: nn.Module) -> Hashable:
    """Where and what the weights of a network are, and what adapters add to them in the running call.

    Raises NotRecorded for a network with hooks, which a replay would leave out; streamed blocks are among
    them. (Twice as fast as `named_modules`, which matters here.)
    """
    found: list[Hashable] = []
    waiting: list[nn.Module | None] = [network]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotRecorded(f"its {type(module).__name__} has hooks, as streamed blocks have")
        waiting.extend(module._modules.values())
        found.append(type(module))
        found += [place(tensor) for tensor in module._parameters.values() if tensor is not None]
        found += [place(tensor) for tensor in module._buffers.values() if tensor is not None]
        for leaf, deltas in running_deltas(module).items():
            for delta, strength in deltas:
                factors = [place(factor) for factor in (delta.down, delta.up) if factor is not None]
                found.append((leaf, strength, delta.scale, *factors))
    return tuple(found)


def place(tensor: Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def settings() -> Hashable:
    """What else decides which kernels a call launches."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        ops._backend,
        quantised._products,
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        (cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark, cudnn.deterministic),
        (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        cuda.math_sdp_enabled(),
    )
