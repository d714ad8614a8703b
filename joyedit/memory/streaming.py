"""Networks that do not fit where they compute: their blocks come one at a time.

The repeated blocks of a network, the members of its module lists, wait in main memory; everything else of it
stays on the device. When a block is called, its weights are in one of two buffers of the device, and those of
the block after it are on their way into the other, on a stream of their own. Nothing is ever copied back. A
block that is called for both branches of guidance, one after the other, comes once. Where a pipeline calls a
part of a block by itself (the keys and values of a prompt, a decoder's last layers), that part alone comes.

With a budget (`Room`) the first pass through the blocks shows what the rest of the work takes; of the blocks
that pass next, as many stay as there is room for. A pass with more work lets them go again.

A gradient finds the weights that its block computes with once more: a network trains with gradient
checkpointing (`checkpoints/recomputing.py`), and the way back is a pass in the other direction.

On a CPU nothing is copied: it computes with the pages of mapped files, and gives those of a block back when
the next one is called. What is not a file's own bytes (a dtype that was cast, weights that an adapter was
fused into) is put into a file that has no name.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from joyedit.checkpoints.network import Network
from joyedit.checkpoints.recomputing import is_recomputing
from joyedit.memory.budget import Room
from joyedit.memory.layout import laid_out
from joyedit.memory.pages import (
    are_written,
    fetch_ahead,
    give_back,
    give_back_unused,
    is_mapped,
    mapped_copies,
    mapped_ranges,
    pinned,
)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list(dict.fromkeys(itertools.chain(module.parameters(), module.buffers())))


def load_of(args: Any) -> int:
    """How many numbers a block is called with; on the way back there is a gradient of each."""
    numbers = sum(leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    return 2 * numbers if is_recomputing() else numbers


SMALLEST_LIST = 1 / 50  # of a network's weights; a smaller list of modules belongs to the rest


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The members of module lists that lie in no other such member, in their order; not those of small
    lists."""
    lists = [list(child) for child in network.modules() if isinstance(child, nn.ModuleList)]
    inner = {part for blocks in lists for block in blocks for part in block.modules() if part is not block}
    least = SMALLEST_LIST * sum(tensor.nbytes for tensor in tensors_of(network))
    outer = [blocks for blocks in lists if not inner.intersection(blocks)]
    large = [blocks for blocks in outer if sum(t.nbytes for b in blocks for t in tensors_of(b)) >= least]
    return [block for blocks in large for block in dict.fromkeys(blocks) if tensors_of(block)]


class Passing:
    """Blocks that pass in their order, again and again: which is called now, and which of them stay.

    room: how much may be held where they compute; None: no block stays.
    """

    def __init__(self, blocks: Sequence[nn.Module], room: Room | None):
        self.tensors = [tensors_of(block) for block in blocks]
        self.nbytes = [sum(tensor.nbytes for tensor in tensors) for tensors in self.tensors]
        self.room = room
        self.current: int | None = None
        self.previous: int | None = None  # the one that was current before
        self.passed: set[int] = set()  # in this pass
        self.follower: dict[tuple[int | None, int], int] = {}  # which block came after which two
        self.staying: set[int] = set()
        self.free = 0  # bytes, for blocks that are to stay
        self.is_new = True  # whether `free` is of other work than what passes
        self.measured: dict[int, int] = {}  # block -> the most that it worked on when `free` was measured

    def enter(self, i: int, load: int) -> None:
        """Block `i` is about to be called, to work on `load` numbers."""
        if i == self.current:
            return
        before, self.current = self.current, i
        if before is not None:
            self.follower[self.previous, before] = i
            if before not in self.staying:
                self.leave(before)
        if before is None or i in self.passed:
            self.passed.clear()
            self._begin_pass(first=before is None)
        self.previous = before
        self.passed.add(i)
        if load > self.measured.get(i, -1):  # what was measured does not hold for this
            self.let_go()
            self.free, self.is_new = 0, True
            self.measured[i] = load
        if i not in self.staying and self.nbytes[i] <= self.free:
            self.free -= self.nbytes[i]
            self.staying.add(i)
            self.settle(i)
        else:
            self.bring(i)
        if (following := self._following(i)) is not None:
            self.fetch(following)

    def _following(self, i: int) -> int | None:
        """The next block that does not stay, in the order that was seen last, at first that of the list."""
        before, j = self.previous, i
        for _ in self.tensors:
            before, j = j, self.follower.get((before, j), (j + 1) % len(self.tensors))
            if j not in self.staying:
                return j if j != i else None
        return None

    def _begin_pass(self, first: bool) -> None:
        if self.room is None:
            return
        if not first:  # of two passes in turn, there and back, what the larger one leaves
            left = self.room.left()
            self.free, self.is_new = left if self.is_new else min(left, self.free), False
        self.room.begin()

    def let_go(self) -> None:
        """No block stays."""
        for i in self.staying:
            self.leave(i)
        self.staying.clear()

    def begin(self) -> None:
        """Blocks are about to be called."""

    def end(self) -> None:
        """No block is called for now: none stays."""
        if self.current is not None and self.current not in self.staying:
            self.leave(self.current)
        self.let_go()
        self.current, self.previous, self.free, self.is_new = None, None, 0, True
        self.passed.clear()
        self.measured.clear()

    def bring(self, i: int) -> None:
        """Block `i`, which does not stay unless it does already, is to compute."""
        raise NotImplementedError

    def settle(self, i: int) -> None:
        """Block `i` is to compute, and stays."""
        raise NotImplementedError

    def fetch(self, i: int) -> None:
        """Block `i` will be called next, of those that do not stay."""
        raise NotImplementedError

    def leave(self, i: int) -> None:
        """Block `i` is called no more in this pass."""
        raise NotImplementedError

    def lend(self, i: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Weights of block `i`, which is not the current one, are called by themselves; returns those that
        came for it."""
        raise NotImplementedError

    def take_back(self, i: int, tensors: Sequence[Tensor]) -> None:
        """What `lend` returned has been called."""
        raise NotImplementedError


class MappedPages(Passing):
    """Blocks on a CPU, which computes with them where they are: in pages of files."""

    def __init__(self, blocks: Sequence[nn.Module], room: Room | None):
        super().__init__(blocks, room)
        self.homes: dict[Tensor, int] = {}  # tensor -> where it is in a file
        self.settled = False

    def settle_in_files(self) -> None:
        """Put what is in no file, or is not what the file holds, into one of its own."""
        ranges = mapped_ranges()
        for tensors in self.tensors:
            mapped = [t for t in tensors if is_mapped(t.data, ranges)]
            kept = {t for t, changed in zip(mapped, are_written(mapped), strict=True) if not changed}
            moved = [t for t in tensors if t not in kept]
            for tensor, copy in zip(
                moved, mapped_copies([t.data for t in moved]) if moved else (), strict=True
            ):
                tensor.data = copy
            self.homes.update((tensor, tensor.data_ptr()) for tensor in tensors)

    def begin(self) -> None:
        give_back_unused()  # by whatever ran before, and would count as if this took it
        self.settle_in_files()
        self.settled = True  # parts may be called before the first block is

    def end(self) -> None:
        super().end()
        self.settled = False
        give_back_unused()

    def _begin_pass(self, first: bool) -> None:
        if first and not self.settled:
            self.settle_in_files()
        super()._begin_pass(first)

    def bring(self, i: int) -> None:
        pass

    def settle(self, i: int) -> None:
        pass

    def fetch(self, i: int) -> None:
        fetch_ahead(self.tensors[i])

    def leave(self, i: int) -> None:
        self._give_back(self.tensors[i])

    def lend(self, i: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if i not in self.staying else []

    def take_back(self, i: int, tensors: Sequence[Tensor]) -> None:
        self._give_back(tensors)

    def _give_back(self, tensors: Sequence[Tensor]) -> None:
        give_back(t for t in tensors if self.homes.get(t) == t.data_ptr())


class Transfers:
    """Copies to where blocks compute. On a CPU each is over when `start` returns.

    `start` gives a mark for the end of its copy, `mark` one for what was launched so far; what is launched
    after `wait` waits for the mark.
    """

    def start(self, target: Tensor, source: Tensor, after: Any) -> Any:
        """Copy, when the work that `after` marks is done."""
        target.copy_(source)

    def mark(self) -> Any:
        return None

    def wait(self, mark: Any) -> None:
        pass


class StreamTransfers(Transfers):
    """Copies on a stream of their own, beside what the current stream computes."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, target: Tensor, source: Tensor, after: Any) -> Any:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def mark(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)


class TwoBuffers(Passing):
    """Blocks on a device, two at a time; in main memory they wait in one arena, pinned for a CUDA device."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        room: Room | None = None,
        transfers: Transfers | None = None,
    ):
        super().__init__(blocks, room)
        self.device = device
        self.transfers = transfers or (StreamTransfers(device) if device.type == "cuda" else Transfers())
        homes = [[tensor.data for tensor in tensors] for tensors in self.tensors]
        self.places, self.rows = zip(*map(laid_out, homes), strict=True)  # of each block
        self.homes = [
            dict(zip(tensors, home, strict=True)) for tensors, home in zip(self.tensors, homes, strict=True)
        ]
        self.packed: dict[int, Tensor] = {}  # blocks that wait in one row each
        self.here: dict[int, Tensor] = {}  # blocks on the device, or on their way: the row of each
        self.stale: set[int] = set()  # those whose weights are others by now
        self.lent: set[Tensor] = set()  # on the device for the call of a part
        self.arrived: dict[int, Any] = {}  # marks
        self.buffers: list[Tensor] = []
        self.in_buffer: list[int | None] = [None, None]

    def pack(self, arena: Tensor) -> None:
        """Let all blocks wait in `arena`, sum(rows) bytes."""
        for i, row in enumerate(arena.split(list(self.rows))):
            for tensor, place in zip(self.tensors[i], self.places[i], strict=True):
                place.of(row).copy_(tensor.data)
                tensor.data = self.homes[i][tensor] = place.of(row)
            self.packed[i] = row

    def bring(self, i: int) -> None:
        self.fetch(i)
        self._use(i)

    def settle(self, i: int) -> None:
        if i in self.in_buffer:  # it was on its way there: that buffer is its own from now on
            slot = self.in_buffer.index(i)
            self.in_buffer[slot] = None
            self.buffers[slot] = self._new_buffer()
            self.fetch(i)
        else:
            self._adopt(i)
            self.here[i] = torch.empty(self.rows[i], dtype=torch.uint8, device=self.device)
            self._send(i)
        self._use(i)

    def fetch(self, i: int) -> None:
        self._adopt(i)
        if i in self.here:
            if i in self.stale:
                self._send(i)
            return
        if not self.buffers:
            self.buffers = [self._new_buffer(), self._new_buffer()]
        slot = next(s for s in (0, 1) if self.in_buffer[s] is None or self.in_buffer[s] != self.current)
        if (before := self.in_buffer[slot]) is not None:
            self.leave(before)
            del self.here[before]
        self.in_buffer[slot], self.here[i] = i, self.buffers[slot]
        self._send(i)

    def leave(self, i: int) -> None:
        """Block `i` has what waits in main memory. Its copy stays where it is until another needs the
        place."""
        self._adopt(i)
        for tensor, home in self.homes[i].items():
            tensor.data = home

    def _adopt(self, i: int) -> None:
        """What was assigned to block `i` from outside, as fusing an adapter does, waits from now on."""
        row = self.here.get(i)
        for tensor, place in zip(self.tensors[i], self.places[i], strict=True):
            address = tensor.data_ptr()
            copied = row is not None and address == row.data_ptr() + place.start
            if not copied and tensor not in self.lent and address != self.homes[i][tensor].data_ptr():
                self.homes[i][tensor] = tensor.data.to("cpu")
                self.packed.pop(i, None)
                self.stale.add(i)

    def let_go(self) -> None:
        for i in self.staying:
            self.leave(i)
            del self.here[i]
        self.staying.clear()

    def end(self) -> None:
        super().end()
        for i in self.here:
            self.transfers.wait(self.arrived[i])  # a copy that nobody waits for would write into freed memory
            self.leave(i)
        self.here, self.arrived, self.buffers, self.in_buffer = {}, {}, [], [None, None]

    def lend(self, i: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        self._adopt(i)
        lent = [tensor for tensor in tensors if tensor not in self.lent]
        self.lent.update(lent)
        after = self.transfers.mark()
        for tensor in lent:
            copy = torch.empty_like(tensor.data, device=self.device)
            self.transfers.wait(self.transfers.start(copy, tensor.data, after))
            tensor.data = copy
        return lent

    def take_back(self, i: int, tensors: Sequence[Tensor]) -> None:
        self.lent.difference_update(tensors)
        for tensor in tensors:
            tensor.data = self.homes[i][tensor]

    def copies(self, i: int, tensors: Sequence[Tensor]) -> list[Tensor]:
        """As `lend`, for a gradient that looks at them later: they stay as long as somebody holds them."""
        self._adopt(i)
        after, made = self.transfers.mark(), []
        for tensor in tensors:
            made.append(torch.empty_like(tensor.data, device=self.device))
            self.transfers.wait(self.transfers.start(made[-1], tensor.data, after))
        return made

    def _new_buffer(self) -> Tensor:
        return torch.empty(max(self.rows), dtype=torch.uint8, device=self.device)

    def _send(self, i: int) -> None:
        self.stale.discard(i)
        row, after = self.here[i], self.transfers.mark()
        if i in self.packed:
            self.arrived[i] = self.transfers.start(row[: self.rows[i]], self.packed[i], after)
            return
        for tensor, place in zip(self.tensors[i], self.places[i], strict=True):
            self.arrived[i] = self.transfers.start(place.of(row), self.homes[i][tensor], after)

    def _use(self, i: int) -> None:
        self.transfers.wait(self.arrived[i])
        for tensor, place in zip(self.tensors[i], self.places[i], strict=True):
            tensor.data = place.of(self.here[i])


class BlockStreaming:
    """Hooks that let a network's blocks come when they are called. Between `begin` and `end` the rest of the
    network is on the device.

    room: how much may be held there; None: nothing stays.
    """

    def __init__(
        self,
        network: Network,
        device: torch.device,
        room: Room | None = None,
        transfers: Transfers | None = None,
    ):
        self.device = device
        blocks = blocks_of(network)
        self.numbers = {part: i for i, block in enumerate(blocks) for part in block.modules()}
        if device.type == "cpu" and room is not None:
            self.passing: Passing = MappedPages(blocks, room)
        else:
            self.passing = TwoBuffers(blocks, device, room, transfers)
        streamed = {tensor for tensors in self.passing.tensors for tensor in tensors}
        behind = {tensor for name, tensor in network.named_parameters() if network.stays_behind(name)}
        self.rest = [tensor for tensor in tensors_of(network) if tensor not in streamed | behind]
        self.homes: list[Tensor] = []
        self.running: int | None = None  # the block that is called now
        self.lent: dict[nn.Module, list[Tensor]] = {}
        self.swapped: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter]]] = {}
        self.hooks = []
        for block in blocks:
            self.hooks.append(block.register_forward_pre_hook(self._enter))
            self.hooks.append(block.register_forward_hook(self._is_over, always_call=True))
            for part in block.modules():
                if part is not block and tensors_of(part):
                    self.hooks.append(part.register_forward_pre_hook(self._lend))
                    self.hooks.append(part.register_forward_hook(self._take_back, always_call=True))

    def begin(self) -> None:
        self.passing.begin()
        self.homes = [tensor.data for tensor in self.rest]
        for tensor in self.rest:
            tensor.data = tensor.data.to(self.device)

    def end(self) -> None:
        self.passing.end()
        for tensor, home in zip(self.rest, self.homes, strict=False):
            tensor.data = home
        self.homes = []

    def _enter(self, block: nn.Module, args: Any) -> None:
        self.running = self.numbers[block]
        self.passing.enter(self.running, load_of(args))

    def _is_over(self, block: nn.Module, args: Any, output: Any) -> None:
        self.running = None

    def _lend(self, part: nn.Module, args: Any) -> None:
        i = self.numbers[part]
        if is_recomputing():  # the rest of its block follows on the way back
            self.passing.enter(i, load_of(args))
        elif i == self.running:
            return
        elif torch.is_grad_enabled() and isinstance(self.passing, TwoBuffers):
            self._swap(part, self.passing.copies, i)
        elif i != self.passing.current and (lent := self.passing.lend(i, tensors_of(part))):
            self.lent[part] = lent

    def _swap(self, part: nn.Module, copied: Callable[[int, list[Tensor]], list[Tensor]], i: int) -> None:
        """For its call, a part has parameters that nobody gives other memory later: a gradient keeps them."""
        if any(part in other.modules() for other in self.swapped):
            return
        places = [(m, name, p) for m in part.modules() for name, p in m._parameters.items() if p is not None]
        for (module, name, p), copy in zip(places, copied(i, [p for *_, p in places]), strict=True):
            module._parameters[name] = nn.Parameter(copy, requires_grad=p.requires_grad)
        self.swapped[part] = places

    def _take_back(self, part: nn.Module, args: Any, output: Any) -> None:
        for module, name, p in self.swapped.pop(part, ()):
            module._parameters[name] = p
        if (lent := self.lent.pop(part, None)) is not None:
            self.passing.take_back(self.numbers[part], lent)

    @classmethod
    def attach(cls, network: Network, device: torch.device, room: Room | None = None) -> "BlockStreaming":
        """Stream the blocks of `network` to `device` from now on."""
        cls.detach(network)
        made = network.__dict__["block_streaming"] = cls(network, device, room)
        return made

    @classmethod
    def detach(cls, network: Network) -> None:
        """Stop streaming; the network is in main memory until it is moved."""
        if (streaming := network.__dict__.pop("block_streaming", None)) is not None:
            for hook in streaming.hooks:
                hook.remove()
            streaming.end()

    @classmethod
    def of(cls, network: Network) -> "BlockStreaming | None":
        """That of a network whose blocks are streamed."""
        return network.__dict__.get("block_streaming")

    @classmethod
    def is_attached(cls, network: Network) -> bool:
        return "block_streaming" in network.__dict__


def stream_blocks(networks: Iterable[Network], device: torch.device, room: Room | None = None) -> None:
    """Stream the blocks of all these networks to `device` from now on. For a CUDA or ROCm device they wait in
    pinned main memory, as far as there is any; otherwise where they are, which may be in mapped files."""
    for network in networks:
        passing = BlockStreaming.attach(network, device, room).passing
        if isinstance(passing, TwoBuffers) and device.type == "cuda":
            if (arena := pinned(sum(passing.rows))) is not None:
                passing.pack(arena)
