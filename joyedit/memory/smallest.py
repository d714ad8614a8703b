"""The least that a budget may be: what a pipeline needs before it has computed anything.

What the work itself takes goes with the size of the picture. A budget that has room for the weights and not
for the work is not refused here: a call says then how much it took, see `budget.py`.
"""

from bisect import bisect
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from joyedit.checkpoints.network import Network
from joyedit.memory.budget import MARGIN, resident_bytes
from joyedit.memory.pages import is_mapped, mapped_ranges
from joyedit.memory.streaming import blocks_of, tensors_of

# Room for the smallest work: what libraries take when they compute first, and pictures of 100 pixels.
WORK = 96 * 2**20


def least_budget(networks: Mapping[str, Network], device: torch.device) -> tuple[int, str]:
    """Bytes below which `networks` cannot run one at a time, block by block, on a device; and the reason in
    words. What is surely needed, no more: less than that works for nobody."""
    needs = {name: _of_one(network, device) for name, network in networks.items()}
    largest = max(needs, key=lambda name: needs[name], default="")
    need = needs.get(largest, 0)
    if device.type == "cpu":
        held = _held_by_process(networks.values())
        where = f"the process holds {held:,} bytes without weights"
    else:
        held = _held_by_others(networks.values(), device)
        where = f"{held:,} bytes are in use on {device}"
    return held + need, f"{where}, and the {largest} needs {need:,} at once"


def enough_for_work(least: int) -> int:
    """A budget for the smallest pictures, where so much is the least."""
    return int((least + WORK) / (1 - MARGIN))


def _of_one(network: Network, device: torch.device) -> int:
    """What of a network has to be there at the same time: all but its blocks, and two of these, or on a CPU,
    which reads ahead into the kernel's cache, one."""
    blocks = [tensors_of(block) for block in blocks_of(network)]
    sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in blocks]
    elsewhere = {tensor for tensors in blocks for tensor in tensors}
    elsewhere |= {tensor for name, tensor in network.named_parameters() if network.stays_behind(name)}
    rest = [tensor for tensor in tensors_of(network) if tensor not in elsewhere]
    if device.type == "cpu":  # of a table a few rows are read; what is in no file is in memory already
        tables = {m.weight for m in network.modules() if isinstance(m, nn.Embedding)}
        ranges = mapped_ranges()
        rest = [t for t in rest if t not in tables and is_mapped(t.data, ranges)]
    return sum(t.nbytes for t in rest) + max(sizes, default=0) * (1 if device.type == "cpu" else 2)


def _held_by_process(networks: Iterable[Network]) -> int:
    """The resident set without blocks, which leave it when they are streamed."""
    tensors = {t for network in networks for block in blocks_of(network) for t in tensors_of(block)}
    ranges = mapped_ranges()
    mapped = {t.data_ptr() for t in tensors if is_mapped(t.data, ranges)}
    alone = sum(t.nbytes for t in tensors if t.data_ptr() not in mapped)
    return max(resident_bytes() - alone - _resident_of_files(mapped), 0)


def _resident_of_files(addresses: Iterable[int]) -> int:
    """What is in memory of the mapped files that hold these addresses. Source: Linux
    `Documentation/filesystems/proc.rst`."""
    starts, total, holds = sorted(addresses), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines() if starts else ():
        first, *rest = line.split()
        if first == "Rss:":
            total += int(rest[0]) * 1024 * holds
        elif not first.endswith(":"):
            start, end = (int(address, 16) for address in first.split("-"))
            holds = bisect(starts, end - 1) > bisect(starts, start - 1)
    return total


def _held_by_others(networks: Iterable[Network], device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    own = {t for network in networks for t in tensors_of(network) if t.device.type == device.type}
    return max(torch.cuda.memory_allocated(device) - sum(t.nbytes for t in own), 0)
