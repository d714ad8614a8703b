"""How an operation's kernel is held against float64: the device, the inputs, and the bound of the error."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from joyedit import ops

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# How a processor draws normal values in fp32 depends on its vectors; in fp64 all draw the same. With other
# inputs the largest of many roundings, which the tests bound, is another.
DRAWN = torch.float64 if INTERPRETED else torch.float32

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    # The interpreter keeps bf16 as 16-bit integers: it truncates where a GPU rounds to nearest even, and
    # multiplies the bit patterns in a dot product. These two functions make it do what a GPU does.
    convert_float, create_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def bf16_to_fp32(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def fp32_to_bf16(values):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)

    def rounding_convert(x, source, target, mode):
        if source == tl.float32 and target == tl.bfloat16:
            return fp32_to_bf16(x)
        if source == tl.bfloat16 and target == tl.float32:
            return bf16_to_fp32(x).view(np.uint32)
        return convert_float(x, source, target, mode)

    def bf16_dot(self, a, b, accumulator, *rest):
        def widened(t):
            is_bf16 = t.dtype.scalar == tl.bfloat16
            return interpreter.TensorHandle(bf16_to_fp32(t.data), tl.float32) if is_bf16 else t

        return create_dot(self, widened(a), widened(b), accumulator, *rest)

    interpreter._convert_float, interpreter.InterpreterBuilder.create_dot = rounding_convert, bf16_dot


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if not INTERPRETED and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


# Kernels compute all of them alike, in fp32, so that under the interpreter one of them is enough for the fast
# tests: the one in which a missing cast is seen, too.
DTYPES = [
    pytest.param(torch.float32, id="fp32", marks=pytest.mark.slow),
    pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, id="bf16"),
]


@pytest.fixture(params=DTYPES)
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def unwritten_is_nan():
    """`torch.empty` and its kin give NaN, so that an element which no program writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def randn(device):
    """Normal values; strided: as a slice of a fused projection, of all tokens but the last one."""

    def randn(*shape: int, dtype: torch.dtype = torch.float32, strided: bool = False) -> Tensor:
        if not strided:
            return torch.randn(shape, device=device, dtype=DRAWN).to(dtype)
        *outer, rows, width = shape
        x = torch.randn((*outer, rows + 1, 3 * width), device=device, dtype=DRAWN).to(dtype)
        return x[..., :-1, width : 2 * width]

    return randn


@pytest.fixture
def compare(launches):
    """A function that holds `op(*args)` and its gradients, forced to Triton, against `plain` in float64."""

    def compare(op, plain, *args, backward: str | None = "same", keeps_format: bool = False):
        """plain: the formula, in torch operations without a cast. Its error in the dtype of the first
        argument is the measure: ours may be twice that, and one unit in the last place. backward: the
        registered backward's name where it is not the operation's with `_backward`; None: it has none.
        keeps_format: results are dense in the memory format of the first argument, not contiguous."""
        name = op.__name__
        backward = f"{name}_backward" if backward == "same" else backward
        args = tuple(a.detach().requires_grad_(backward is not None) if is_float(a) else a for a in args)
        before = [a.detach().clone() for a in args if is_float(a)]
        with launches() as counts, ops.backend("triton"):
            ours = results(op, args)
        assert counts == {name: 1}, "something else was launched"

        narrow = cast(args, args[0].dtype)
        half, exact = results(plain, narrow), results(plain, cast(args, torch.float64))
        for out, rounded, wanted in zip(ours, half, exact, strict=True):
            assert out.dtype == args[0].dtype and out.shape == wanted.shape
            assert out.stride() == torch.empty_like(args[0]).stride() if keeps_format else out.is_contiguous()
            assert not {out.data_ptr()} & {a.data_ptr() for a in args if is_float(a)} or not out.numel()
            bounded(out, rounded, wanted)

        if backward is not None:
            gradient = [torch.randn_like(out, dtype=DRAWN).to(out.dtype) for out in ours]
            with launches() as counts:
                ours = gradients(ours, gradient, args)
            assert counts == {backward: 1}, "something else was launched"
            half = gradients(half, [g.to(args[0].dtype) for g in gradient], narrow)
            wide = cast(args, torch.float64)
            exact = gradients(results(plain, wide), [g.double() for g in gradient], wide)
            inputs = [a for a in args if is_float(a)]
            for out, rounded, wanted, given in zip(ours, half, exact, inputs, strict=True):
                assert out.dtype == given.dtype and out.shape == given.shape
                bounded(out, rounded, wanted)
        for a, old in zip((a for a in args if is_float(a)), before, strict=True):
            assert torch.equal(a, old), "an argument was written to"

    return compare


def is_float(a) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def results(function, args) -> tuple[Tensor, ...]:
    out = function(*args)
    return out if isinstance(out, tuple) else (out,)


def cast(args, dtype: torch.dtype) -> tuple:
    return tuple(a.detach().to(dtype).requires_grad_() if is_float(a) else a for a in args)


def gradients(outputs, upstream, args) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, [a for a in args if is_float(a)], upstream)


def bounded(ours: Tensor, half: Tensor, exact: Tensor) -> None:
    """At most twice as far from float64 as the plain computation, and a unit in the last place of what is of
    order one."""
    if not exact.numel():
        return
    error, plain_error = ((t.double() - exact).abs().max().item() for t in (ours, half))
    unit = torch.finfo(ours.dtype).eps * max(1.0, exact.abs().max().item())
    assert error <= 2 * plain_error + unit, f"error {error:.2e}, plain computation {plain_error:.2e}"
