"""What every area of the GPU benchmark is given, and how it takes time and memory.

An area is a module of this package with one function,

    def rows(setting: Setting) -> Iterator[Row]

which gives the name of each row and a function that measures it: its figures, as they go into the JSON
(finite numbers, words, lists, dicts), or any exception. Rows are asked for one after the other, in a process
that may have been started for the rest of them after an earlier one broke it, or that only wants the names of
what is left out: what takes time belongs into the measuring function, and what it sets (gradients, the
backend of joyedit.ops, the sync debug mode) it brings back. Gradients are off and memory is given back
between rows.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Row = tuple[str, Callable[[], dict[str, Any]]]

CACHE = 2**30  # bytes that a timed call finds written before it: more than any L2, and longer than its launch


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where to measure. `dry`: tiny sizes on a CPU with Triton's interpreter; no figure means anything."""

    device: torch.device
    dry: bool

    @property
    def half(self) -> torch.dtype:
        """The dtype of the published networks. Triton's interpreter does not know bf16: fp32 in dry runs."""
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def kernels(self) -> str:
        """The backend of joyedit.ops that launches our kernels as a run on this device does: "auto" would
        take PyTorch on a CPU."""
        return "triton" if self.dry else "auto"

    def finish(self) -> None:
        """Wait for the device. Raises what went wrong there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> int:
        """Bytes of memory that are free on the device (a dry run: a made-up GiB)."""
        return 2**30 if self.dry else torch.cuda.mem_get_info(self.device)[0]

    def kernel_seconds(self, function: Callable[[], Any], budget: float = 0.08) -> float:
        """Median seconds that the device works on one call, its L2 cache emptied before.

        While the cache is being emptied the host is ahead, so that its own time does not show unless it is
        longer than that. `budget`: seconds to spend, at least five calls.
        """
        if self.dry:
            return self.once(function)
        function()
        emptied = torch.empty(CACHE, dtype=torch.int8, device=self.device)

        def between_events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            emptied.zero_()
            before.record()
            function()
            after.record()
            return before, after

        calls = max(5, min(100, int(budget / self.once(between_events))))
        events = [between_events() for _ in range(calls)]
        self.finish()
        return statistics.median(before.elapsed_time(after) for before, after in events) / 1000

    def once(self, function: Callable[[], Any]) -> float:
        """Seconds until the device has done one call."""
        self.finish()
        begin = time.perf_counter()
        function()
        self.finish()
        return time.perf_counter() - begin

    def call_seconds(self, function: Callable[[], Any], budget: float = 0.05) -> float:
        """Seconds of a call among many, one after the other without waiting: of the device or of the host,
        whichever is slower."""
        if self.dry:
            return self.once(function)
        function()
        calls = max(5, min(200, int(budget / self.once(function))))
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        self.finish()
        return (time.perf_counter() - begin) / calls
