"""Activations of a feed-forward's hidden layer, alone or as the gate of a second projection.

    gelu_tanh     gelu(x), tanh-approximated
    geglu         value * gelu(gate), exact (erf); value and gate are the halves of one projection
    geglu_tanh    gelu(gate) * value, tanh-approximated
    swiglu        silu(gate) * up

Fused: the activation, the product and the split of one projection's halves, in fp32 and rounded once: forward
reads gate and value and writes the result, and the activated gate is never in memory. Backward reads both and
the incoming gradient, activates the gate anew, and writes both gradients, for `geglu` as the halves of one
tensor, in the same pass. (Alone, the activation moves no fewer bytes than PyTorch's; the bias is
the matrix product's to add, which costs nothing there.)

The kernels see gate and value (A, R, D) as rows with two strides, so that halves need no copy. A program
holds ROWS x BLOCK of them; rows may be of any length.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from joyedit.kernels.shared import as_rows, like, options, register


def tile() -> dict[str, int]:
    """2048 elements; all widths in use but one are multiples of 256."""
    return {"ROWS": 8, "BLOCK": 256, **options(2048)}


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of x, and its derivative."""
    if ACTIVATION == "gelu":
        part = 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u).
        part, slope = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope *= 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        tl.static_assert(ACTIVATION == "silu")
        part, slope = sigmoid(x)
    return x * part, part + x * slope


@triton.jit
def sigmoid(x):
    """Sigmoid and its derivative; where 1 - sigmoid is small, that difference would lose its digits."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) / (1 + small), small / ((1 + small) * (1 + small))


@triton.jit(do_not_specialize=["num_rows"])
def gated_forward(
    gate_ptr,  # (A, R, D), strides (stride_ga, stride_gr, 1)
    value_ptr,  # (A, R, D), strides (stride_va, stride_vr, 1), or None
    out_ptr,  # (A, R, D) contiguous
    num_rows,
    width,
    stride_ga,
    stride_gr,
    stride_va,
    stride_vr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK)
    chunk = tl.program_id(0) // columns
    chunks = tl.cdiv(num_rows, ROWS)
    a = (chunk // chunks).to(tl.int64)
    r = (chunk % chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)[None]
    mask = (r < num_rows) & (d < width)
    gate = tl.load(gate_ptr + a * stride_ga + r * stride_gr + d, mask, other=0.0).to(tl.float32)
    value = 1.0
    if value_ptr is not None:
        value = tl.load(value_ptr + a * stride_va + r * stride_vr + d, mask, other=0.0).to(tl.float32)
    active, _ = activate(gate, ACTIVATION)
    tl.store(out_ptr + (a * num_rows + r) * width + d, active * value, mask)


@triton.jit(do_not_specialize=["num_rows"])
def gated_backward(
    grad_ptr,  # (A, R, D) contiguous
    gate_ptr,  # (A, R, D), strides (stride_ga, stride_gr, 1)
    value_ptr,  # (A, R, D), strides (stride_va, stride_vr, 1), or None
    dgate_ptr,  # (A, R, D), rows stride_out apart
    dvalue_ptr,  # (A, R, D), rows stride_out apart, or None
    num_rows,
    width,
    stride_ga,
    stride_gr,
    stride_va,
    stride_vr,
    stride_out,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK)
    chunk = tl.program_id(0) // columns
    chunks = tl.cdiv(num_rows, ROWS)
    a = (chunk // chunks).to(tl.int64)
    r = (chunk % chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    d = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)[None]
    mask = (r < num_rows) & (d < width)
    row = a * num_rows + r
    grad = tl.load(grad_ptr + row * width + d, mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + a * stride_ga + r * stride_gr + d, mask, other=0.0).to(tl.float32)
    value = 1.0
    if value_ptr is not None:
        value = tl.load(value_ptr + a * stride_va + r * stride_vr + d, mask, other=0.0).to(tl.float32)
    active, slope = activate(gate, ACTIVATION)
    if dvalue_ptr is not None:
        tl.store(dvalue_ptr + row * stride_out + d, grad * active, mask)
    tl.store(dgate_ptr + row * stride_out + d, grad * value * slope, mask)


def run_forward(gate: Tensor, value: Tensor | None, activation: str) -> Tensor:
    out = like(gate)
    if gate.numel() == 0:
        return out
    gate, value = as_rows(gate), None if value is None else as_rows(value)
    (a, r, d), choice = gate.shape, tile()
    strides = *gate.stride()[:2], *(gate if value is None else value).stride()[:2]
    with torch.cuda.device_of(gate):
        gated_forward[a * triton.cdiv(r, choice["ROWS"]) * triton.cdiv(d, choice["BLOCK"]),](
            gate, value, out, r, d, *strides, activation, **choice
        )
    return out


def run_backward(
    grad: Tensor, gate: Tensor, value: Tensor | None, dgate: Tensor, dvalue: Tensor | None, activation: str
) -> None:
    """Writes the gradients, whose rows lie evenly one after the other."""
    if gate.numel() == 0:
        return
    gate, value = as_rows(gate), None if value is None else as_rows(value)
    (a, r, d), choice = gate.shape, tile()
    strides = *gate.stride()[:2], *(gate if value is None else value).stride()[:2]
    apart = dgate.stride(-2) if dgate.ndim > 1 else d
    with torch.cuda.device_of(gate):
        gated_backward[a * triton.cdiv(r, choice["ROWS"]) * triton.cdiv(d, choice["BLOCK"]),](
            grad.contiguous(), gate, value, dgate, dvalue, r, d, *strides, apart, activation, **choice
        )


def run_geglu(value_gate: Tensor) -> Tensor:
    value, gate = value_gate.chunk(2, dim=-1)
    return run_forward(gate, value, "gelu")


def run_geglu_backward(grad: Tensor, value_gate: Tensor) -> Tensor:
    out = like(value_gate)
    (value, gate), (dvalue, dgate) = value_gate.chunk(2, dim=-1), out.chunk(2, dim=-1)
    run_backward(grad, gate, value, dgate, dvalue, "gelu")
    return out


def run_geglu_tanh(gate: Tensor, value: Tensor) -> Tensor:
    return run_forward(gate, value, "gelu_tanh")


def run_geglu_tanh_backward(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dvalue = like(gate), like(value)
    run_backward(grad, gate, value, dgate, dvalue, "gelu_tanh")
    return dgate, dvalue


def run_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return run_forward(gate, up, "silu")


def run_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = like(gate), like(up)
    run_backward(grad, gate, up, dgate, dup, "silu")
    return dgate, dup


def run_gelu_tanh(x: Tensor) -> Tensor:
    return run_forward(x, None, "gelu_tanh")


def run_gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    dx = like(x)
    run_backward(grad, x, None, dx, None, "gelu_tanh")
    return dx


LIBRARY = torch.library.Library("joyedit", "FRAGMENT")
LIBRARY.define("geglu(Tensor value_gate) -> Tensor")
LIBRARY.define("geglu_backward(Tensor grad, Tensor value_gate) -> Tensor")
LIBRARY.define("geglu_tanh(Tensor gate, Tensor value) -> Tensor")
LIBRARY.define("geglu_tanh_backward(Tensor grad, Tensor gate, Tensor value) -> (Tensor, Tensor)")
LIBRARY.define("swiglu(Tensor gate, Tensor up) -> Tensor")
LIBRARY.define("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)")
LIBRARY.define("gelu_tanh(Tensor x) -> Tensor")
LIBRARY.define("gelu_tanh_backward(Tensor grad, Tensor x) -> Tensor")
register(LIBRARY, "geglu", run_geglu)
register(LIBRARY, "geglu_backward", run_geglu_backward)
register(LIBRARY, "geglu_tanh", run_geglu_tanh)
register(LIBRARY, "geglu_tanh_backward", run_geglu_tanh_backward)
register(LIBRARY, "swiglu", run_swiglu)
register(LIBRARY, "swiglu_backward", run_swiglu_backward)
register(LIBRARY, "gelu_tanh", run_gelu_tanh)
register(LIBRARY, "gelu_tanh_backward", run_gelu_tanh_backward)


@torch.library.register_fake("joyedit::geglu", lib=LIBRARY)
def _(value_gate):
    shape = *value_gate.shape[:-1], value_gate.shape[-1] // 2
    return torch.empty(shape, dtype=value_gate.dtype, device=value_gate.device)


@torch.library.register_fake("joyedit::geglu_backward", lib=LIBRARY)
def _(grad, value_gate):
    return like(value_gate)


@torch.library.register_fake("joyedit::geglu_tanh", lib=LIBRARY)
def _(gate, value):
    return like(gate)


@torch.library.register_fake("joyedit::geglu_tanh_backward", lib=LIBRARY)
def _(grad, gate, value):
    return like(gate), like(value)


@torch.library.register_fake("joyedit::swiglu", lib=LIBRARY)
def _(gate, up):
    return like(gate)


@torch.library.register_fake("joyedit::swiglu_backward", lib=LIBRARY)
def _(grad, gate, up):
    return like(gate), like(up)


@torch.library.register_fake("joyedit::gelu_tanh", lib=LIBRARY)
def _(x):
    return like(x)


@torch.library.register_fake("joyedit::gelu_tanh_backward", lib=LIBRARY)
def _(grad, x):
    return like(x)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def differentiate_geglu(ctx, grad):
    return torch.ops.joyedit.geglu_backward(grad, *ctx.saved_tensors)


def differentiate_geglu_tanh(ctx, grad):
    return torch.ops.joyedit.geglu_tanh_backward(grad, *ctx.saved_tensors)


def differentiate_swiglu(ctx, grad):
    return torch.ops.joyedit.swiglu_backward(grad, *ctx.saved_tensors)


def differentiate_gelu_tanh(ctx, grad):
    return torch.ops.joyedit.gelu_tanh_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd("joyedit::geglu", differentiate_geglu, setup_context=keep, lib=LIBRARY)
torch.library.register_autograd(
    "joyedit::geglu_tanh", differentiate_geglu_tanh, setup_context=keep, lib=LIBRARY
)
torch.library.register_autograd("joyedit::swiglu", differentiate_swiglu, setup_context=keep, lib=LIBRARY)
torch.library.register_autograd(
    "joyedit::gelu_tanh", differentiate_gelu_tanh, setup_context=keep, lib=LIBRARY
)
geglu = torch.ops.joyedit.geglu.default
geglu_tanh = torch.ops.joyedit.geglu_tanh.default
swiglu = torch.ops.joyedit.swiglu.default
gelu_tanh = torch.ops.joyedit.gelu_tanh.default
