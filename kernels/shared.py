"""What several kernels have in common outside of them: how tensors are seen as rows or planes, how much a
program holds, and how an operation is registered. Nothing here is compiled.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

PARTIAL_SUMS = 256  # programs of a backward; the same on every device, so that gradients are too


def options(elements: int, each: int = 16, most_threads: int = 512) -> dict[str, int]:
    """How a program that holds so many elements is compiled: `each` per thread, 16 of half precision being
    two 16-byte loads in flight. Instinct's warps are 64 wide. Products and sums fuse, whatever the default of
    a release of Triton is."""
    lanes = 64 if torch.version.hip else 32
    return {"num_warps": max(1, min(most_threads, elements // each) // lanes), "enable_fp_fusion": True}


def tile(*inputs: Tensor) -> dict[str, int]:
    """Of a norm: ROWS whole rows at a time, 4096 elements or one row, and at least four one after the other,
    for which scale and shift are loaded once and held in registers: hence 8 elements per thread. While some
    are normed, the next ones are on their way: STAGES - 1 times these rows of all inputs, in at most 64 KiB
    of shared memory, which every GPU has. Where ROWS are four already, nothing comes after them."""
    block = triton.next_power_of_2(inputs[0].shape[-1])
    rows = max(1, min(64, 4096 // block))
    rows_each = max(4, rows)
    size = rows * block * sum(x.element_size() for x in inputs)
    ahead = min(2, rows_each // rows - 1, 65536 // size)
    held = options(rows * block, 8, 1024) if ahead else options(rows * block)
    return {"ROWS_EACH": rows_each, "ROWS": rows, "BLOCK": block, "STAGES": 1 + ahead, **held}


def backward_tile(width: int) -> dict[str, int]:
    """Of a norm's backward: whole rows, 4096 elements or one row, at a time. A program goes over many, and
    keeps sums of gradients."""
    block = triton.next_power_of_2(width)
    rows = max(1, min(64, 4096 // block))
    return {"ROWS": rows, "BLOCK": block, **options(rows * block)}


def like(t: Tensor) -> Tensor:
    """Unwritten and contiguous, with the shape, dtype and device of t."""
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def as_rows(x: Tensor) -> Tensor:
    """(..., D) -> (A, R, D) with unit stride along D: a view wherever two strides can describe the rows."""
    x = x.reshape(-1, *x.shape[-2:]) if x.ndim > 1 else x[None, None]
    return x if x.stride(-1) == 1 else x.contiguous()


def as_modulation(t: Tensor | None) -> tuple[Tensor | None, int]:
    """(A, D), (1, D) or (D) with unit stride along D, and its stride along A: 0 where all share one."""
    if t is None:
        return None, 0
    t = t if t.stride(-1) == 1 else t.contiguous()
    return t, t.stride(0) if t.ndim == 2 and t.shape[0] > 1 else 0


def as_planes(x: Tensor, axis: int = 2) -> Tensor:
    """(B, C, ...) -> (B, C, ..., N), the axes from `axis` on as one: a view wherever one stride can describe
    them."""
    return x.flatten(axis) if x.ndim > axis else x[..., None]


def empty_as(x: Tensor, axis: int = 2) -> Tensor:
    """Unwritten, dense, in the memory format of x; contiguous where no stride can describe the axes from
    `axis` on."""
    out = torch.empty_like(x)
    axes = [i for i in range(axis, x.ndim) if x.shape[i] > 1]
    merge = all(out.stride(i) == out.stride(j) * out.shape[j] for i, j in zip(axes, axes[1:], strict=False))
    return out if merge else like(x)


def register(library: torch.library.Library, name: str, function: Callable) -> None:
    """What computes an operation. AMD's devices are CUDA to PyTorch; the CPU is the interpreter's."""
    for key in ("CUDA", "CPU"):
        library.impl(name, function, key)
