"""What the fused operations move and compute, and the least time that takes: `python -m benchmarks.roofline`.

For every case of `op_cases`: the bytes of the fused operation (each argument read once, each result written
once), the bytes of the reference's formulation (every torch operation reads its arguments from memory and
writes its result; views are free), the arithmetic, and the floor on each GPU: the longer of bytes / bandwidth
and operations / peak. Then the sums of a denoising step with guidance. Sizes are counted, nothing is timed.

Elementwise arithmetic is counted at the vector units' fp32 peak, matrix products at the dense bf16 peak.

Then what one transformer block really does under "auto" on a GPU (`block_bytes`, `block_work`): it is run on
tensors without memory, and every operation that is dispatched is counted, those of ours and PyTorch's. From
that, a step is predicted, with the efficiencies that `EFFICIENCY` assumes.
"""

import argparse
import collections
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.op_cases import Case, Op, all_cases, all_ops
from joyedit import ops
from joyedit.estimates.counting import ATTENTION, OTHER, PRODUCT, is_view, moved_by, stored
from joyedit.estimates.machines import EFFICIENCY, MACHINES, Machine

# Makers' figures: bytes per second of memory, operations per second of matrix (dense bf16) and vector (fp32)
# units.
GPUS = {name.removeprefix("RTX "): MACHINES[name] for name in ("H100", "H200", "B200", "RTX 4090", "MI300X")}
SYSTEMS = {
    "joyimage": "JoyImage, 1024 x 1024 pixels, one reference",
    "chronoedit": "ChronoEdit, 5 frames of 720p",
    "diffedit": "Stable Diffusion 2.1, 768 x 768 pixels",
}


class Traffic(NamedTuple):
    """Of one call: bytes fused, bytes of the reference's operations, their number, arithmetic operations."""

    fused: int
    plain: int
    launches: int
    operations: int


class Moved(TorchDispatchMode):
    """Adds up what every operation but a view reads and writes."""

    def __init__(self):
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not is_view(func) and func.__name__ != "empty.memory_format":
            self.bytes += moved_by(args, kwargs or {}, out)
            self.launches += 1
        return out


def once(*values: Any) -> int:
    """Bytes of arguments and results, each once, also where a result was written to an argument."""
    return stored({id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values())


def traffic(case: Case, op: Op) -> Traffic:
    args = case.make("meta", fill=False)
    with ops.backend("torch"):
        out = getattr(ops, case.op)(*args)
    plain = op.plain if callable(op.plain) else op.plain[case.system]
    with Moved() as moved:
        plain(*args)
    return Traffic(once(args, out), moved.bytes, moved.launches, op.operations(*args))


def floor(t: Traffic, op: Op, gpu: Machine) -> float:
    """Seconds of one call that no implementation can go below."""
    return max(t.fused / gpu.bandwidth, t.operations / (gpu.matrix if op.matrix else gpu.vector))


def rows() -> list[dict[str, Any]]:
    """One for each case: its traffic, and microseconds of its floor on each GPU."""
    known, found = all_ops(), []
    for case in all_cases():
        t, op = traffic(case, known[case.op]), known[case.op]
        floors = {name: 1e6 * floor(t, op, gpu) for name, gpu in GPUS.items()}
        found.append({"case": case, **t._asdict(), "floors": floors})
    return found


def sums(found: list[dict[str, Any]], system: str) -> dict[str, Any]:
    """Of one denoising step of a system."""
    mine = [(row["case"].per_step, row) for row in found if row["case"].system == system]
    total = {key: sum(n * row[key] for n, row in mine) for key in Traffic._fields}
    total["calls"] = sum(n for n, _ in mine)
    total["launches"] = sum(n * row["launches"] for n, row in mine)
    total["floors"] = {gpu: sum(n * row["floors"][gpu] for n, row in mine) / 1000 for gpu in GPUS}
    return total


def saved_per_block(found: list[dict[str, Any]], op: str) -> dict[str, int]:
    """System -> bytes that fusing spares in one block of its network."""
    saved: dict[str, int] = {}
    for row in found:
        case = row["case"]
        if case.op == op and case.per_block:
            saved[case.system] = saved.get(case.system, 0) + case.per_block * (row["plain"] - row["fused"])
    return saved


class Block(NamedTuple):
    """What one transformer block does in one branch of the guidance.

    bytes: moved by every operation but attention and matrix products. products, attention: their operations.
    """

    bytes: dict[str, int]
    products: int
    attention: int


class Dispatched(TorchDispatchMode):
    """Counts what a block does, operation by operation."""

    def __init__(self):
        super().__init__()
        self.bytes: collections.Counter[str] = collections.Counter()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if name in ("addmm", "mm", "bmm", "_addmm_activation"):
            rows, columns = args[name.endswith(("addmm", "activation")) :][:2]
            self.products += 2 * rows.numel() * columns.shape[-1]
        elif name != "attention" and not is_view(func) and name not in ("empty", "new_empty", "empty_like"):
            moved = moved_by(args, kwargs or {}, out)
            self.bytes[name.removesuffix("_out")] += moved
        return out


@contextlib.contextmanager
def on_a_gpu(separate: bool) -> Iterator[None]:
    """Operations choose as they do under "auto" on an H100 with a cuDNN that PyTorch uses."""
    from joyedit.kernels import attention

    def one_kernel(q, k, v, **options):
        return torch.empty_like(q)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(ops.backend("auto"))
        stack.enter_context(mock.patch.object(ops, "_on_gpu", lambda x: True))
        stack.enter_context(mock.patch.object(ops, "_problem", lambda tensors, has_backward: None))
        stack.enter_context(mock.patch.object(ops, "_product_ends_in_gelu", lambda *tensors: True))
        stack.enter_context(mock.patch.object(attention, "stock_is_faster", lambda *a: not a[-1]))
        stack.enter_context(mock.patch.object(attention, "no_tiles", lambda device: None))
        stack.enter_context(
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", one_kernel)
        )
        if separate:
            stack.enter_context(mock.patch.object(ops, "joint_buffers", lambda *a: (None, None)))
            stack.enter_context(mock.patch.object(ops, "gate_residual_layer_norm", separate_norm))
        yield


def separate_norm(x, y, gate, weight, bias, eps):
    x = ops.gate_residual(x, y, gate)
    return x, ops.layer_norm(x, weight, bias, eps)


def block_work(system: str, separate: bool = False) -> Block:
    """Of a block of "joyimage" (1024 x 1024 pixels, one reference) or "chronoedit" (5 frames of 720p).

    separate: without what spares traffic between operations: segments are joined by copies, and the gated
    residual and the norm after it are two passes.
    """
    make = {"joyimage": joyimage_block, "chronoedit": chronoedit_block}[system]
    with on_a_gpu(separate), torch.device("meta"):
        block, args, pairs, width = make()
        with Dispatched() as counted:
            block(*args)
    return Block(dict(counted.bytes), counted.products, 4 * pairs * width)


def block_bytes(system: str, separate: bool = False) -> dict[str, int]:
    """Operation -> bytes that it moves in one block; attention and matrix products are left out. See
    `block_work`."""
    return block_work(system, separate).bytes


def joyimage_block() -> tuple[torch.nn.Module, tuple, int, int]:
    """A block, its arguments, how many pairs of tokens attend to one another, and the width."""
    from joyedit.models.joyimage_mmdit import DoubleStreamBlock, JoyImageEditConfig

    c, image, text = JoyImageEditConfig(), 8192, 1100
    hidden = int(c.hidden_size * c.mlp_width_ratio)
    block = DoubleStreamBlock(c.hidden_size, c.num_attention_heads, hidden).bfloat16()
    img, txt = (torch.empty(1, n, c.hidden_size, dtype=torch.bfloat16) for n in (image, text))
    rope = torch.empty(image, c.head_dim // 2), torch.empty(image, c.head_dim // 2)
    args = img, txt, torch.empty(1, 6, c.hidden_size), rope
    return block, args, (image + text) ** 2, c.hidden_size


def chronoedit_block() -> tuple[torch.nn.Module, tuple, int, int]:
    from joyedit.models.chronoedit_dit import Block as ChronoEditBlock
    from joyedit.models.chronoedit_dit import ChronoEditConfig

    c, tokens, text, image = ChronoEditConfig(), 7200, 512, 257
    block = ChronoEditBlock(c).bfloat16()
    context = []
    for count in (text, image):
        pair = torch.empty(2, 1, count, c.num_attention_heads, c.attention_head_dim, dtype=torch.bfloat16)
        context.append(tuple(pair.unbind()))
    x = torch.empty(1, tokens, c.width, dtype=torch.bfloat16)
    rope = torch.empty(tokens, c.attention_head_dim // 2), torch.empty(tokens, c.attention_head_dim // 2)
    return block, (x, torch.empty(1, 6, c.width), *context, rope), tokens * (tokens + text + image), c.width


BLOCKS = {"joyimage": 40, "chronoedit": 40}


def predicted_step(system: str, gpu: Machine, separate: bool = False) -> float:
    """Seconds of the blocks of one guided step (two branches), computed."""
    work, share = block_work(system, separate), EFFICIENCY
    products = work.products / (share[PRODUCT] * gpu.matrix)
    attention = work.attention / (share[ATTENTION] * gpu.matrix)
    memory = sum(work.bytes.values()) / (share[OTHER] * gpu.bandwidth)
    return 2 * BLOCKS[system] * (products + attention + memory)


def floor_of_step(system: str, gpu: Machine) -> float:
    """The same if every unit reached its maker's figure, and nothing but products and attention took time."""
    work = block_work(system)
    return 2 * BLOCKS[system] * (work.products + work.attention) / gpu.matrix


def line(name: str, *cells: str) -> str:
    return f"{name:<78.78}" + "".join(f"{cell:>11}" for cell in cells)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    out = parser.parse_args(arguments).out
    found = rows()
    print(line("one call (floor in microseconds)", "fused", "separate", "operations", *GPUS))
    for row in found:
        floors = (f"{value:.1f}" for value in row["floors"].values())
        counts = megabytes(row["fused"]), megabytes(row["plain"]), f"{row['operations']:.2g}"
        print(line(row["case"].title, *counts, *floors))
    print("\n" + line("a denoising step (floor in milliseconds)", "fused", "separate", "operations", *GPUS))
    for system, name in SYSTEMS.items():
        total = sums(found, system)
        floors = (f"{value:.2f}" for value in total["floors"].values())
        counts = megabytes(total["fused"]), megabytes(total["plain"]), f"{total['operations']:.2g}"
        print(line(f"{name} ({total['calls']} calls for {total['launches']})", *counts, *floors))
    print("\n" + line("a block, by operation, in one branch", "joined", "before"))
    for system, name in SYSTEMS.items():
        if system not in BLOCKS:
            continue
        now, before = block_bytes(system), block_bytes(system, separate=True)
        for operation in sorted(now.keys() | before.keys()):
            counts = (megabytes(found.get(operation, 0)) for found in (now, before))
            print(line(f"{system}: {operation}", *counts))
        print(line(name, *(megabytes(sum(found.values())) for found in (now, before))))
        for when, separate in (("before", True), ("now", False)):
            seconds = (f"{predicted_step(system, gpu, separate):.3f}" for gpu in GPUS.values())
            print(line(f"    seconds of a guided step, predicted, {when}", "", "", "", *seconds))
        seconds = (f"{floor_of_step(system, gpu):.3f}" for gpu in GPUS.values())
        print(line("    its floor: products and attention at the maker's figure", "", "", "", *seconds))
    if out:
        content = [{**row, "case": row["case"].title} for row in found]
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
