"""The calls of the fused operations that the three systems make at real sizes: one file per file of kernels/.

Everything about kernels that is counted or measured away from the tests starts here: what is compiled ahead
of time (`benchmarks.kernels_aot`), the bytes and floors (`benchmarks.roofline`), the timings
(`benchmarks.ops`) and the table of docs/kernels.md. A file has

    OPS      name of the operation in joyedit.ops -> Op: what the reference does instead, and its arithmetic
    CASES    calls of these operations: whose, with what arguments, how many in a denoising step

Sizes: JoyImage edits 1024 x 1024 pixels with one reference (8192 image and 1100 text tokens, width 4096, 32
heads, 40 blocks); ChronoEdit makes 5 frames of 720p (7200 tokens, width 5120, 40 heads, 40 blocks, 512 text
and 257 image tokens); Stable Diffusion 2.1 edits 768 x 768 pixels (latents 96 x 96). A step is one denoising
step with guidance: two forwards of a transformer, one of the UNet with a batch of 2. JoyImage's last block is
counted like the others, but for its attention; it does half of their work.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class T(NamedTuple):
    """A tensor argument: `view` of a contiguous tensor of this shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    view: Callable[[Tensor], Tensor] = lambda x: x


class Op(NamedTuple):
    """fuses: what happens in one pass, for docs/kernels.md. plain: the formulation of the system's reference
    (`plain[system]`, or one for all), one torch operation after the other; what it moves is counted.

    small: arguments of a few elements, for what does not depend on their size. operations(*args): arithmetic
    operations of one call; matrix: they are done by matrix units. instructions: for each backend ("cuda",
    "hip") and architecture where it matters ("sm_90", "gfx942"), patterns of `kernels_aot.COUNTED` that must
    occur in every kernel: wide loads, matrix units, asynchronous copies. Of a tuple of patterns one must.
    rounds: it rounds its inputs, so that its error has other bounds; its own tests know them.
    """

    fuses: str
    plain: Callable[..., Any] | Mapping[str, Callable[..., Any]]
    small: tuple[Any, ...]
    operations: Callable[..., int]
    matrix: bool = False
    instructions: Mapping[str, tuple[str | tuple[str, ...], ...]] = {
        "cuda": ((r"LDG\.E\.(\w+\.)*128", "LDGSTS"),),
        "hip": (r"(global|buffer)_load_(b128|dwordx4)",),
    }
    rounds: bool = False


class Case(NamedTuple):
    """per_step: calls in a denoising step (0: elsewhere, or only for its dtype). per_block: calls in one
    block of the network, for docs/kernels.md. trained: gradients are taken too. compiled: it has a row among
    the kernels compiled ahead of time, unless an earlier call's kernel is the same but for sizes that the
    compiler does not see."""

    op: str
    system: str  # "joyimage", "chronoedit" or "diffedit"
    what: str
    args: tuple[Any, ...]
    per_step: int = 0
    per_block: int = 0
    trained: bool = False
    compiled: bool = True

    @property
    def title(self) -> str:
        return f"{self.op}: {self.system}, {self.what}"

    def make(self, device: torch.device | str, fill: bool = True) -> tuple[Any, ...]:
        return made(self.args, device, fill)


def made(args: tuple[Any, ...], device: torch.device | str, fill: bool = True) -> tuple[Any, ...]:
    """Described arguments as tensors on a device: normal values, of int8 all that have two signs, or memory
    as it is."""

    def tensor(t: T) -> Tensor:
        whole = torch.empty(t.shape, dtype=t.dtype, device=device)
        if fill:
            whole = whole.normal_() if t.dtype.is_floating_point else whole.random_(-127, 128)
        return t.view(whole)

    return tuple(
        tensor(a) if isinstance(a, T) else made(a, device, fill) if isinstance(a, tuple) else a for a in args
    )


def per_element(count: int) -> Callable[..., int]:
    """Operations of an elementwise pass: so many for each element of the first argument."""
    return lambda x, *others: count * x.numel()


def modules() -> dict[str, Any]:
    """Name of the kernel's file -> module of its cases."""
    names = sorted(found.name for found in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def all_ops() -> dict[str, Op]:
    return {name: op for module in modules().values() for name, op in module.OPS.items()}


def all_cases() -> list[Case]:
    return [case for module in modules().values() for case in module.CASES]


def exact_ops() -> dict[str, Op]:
    """Those that are held to the common bound of errors."""
    return {name: op for name, op in all_ops().items() if not op.rounds}


def exact_cases() -> list[Case]:
    return [case for case in all_cases() if case.op in exact_ops()]
