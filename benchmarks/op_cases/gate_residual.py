"""Calls of kernels/gate_residual.py."""

import torch

from benchmarks.op_cases import Case, Op, T, per_element
from benchmarks.op_cases.ada_layer_norm import (
    AFFINE,
    CHRONOEDIT,
    JOYIMAGE,
    SINGLE,
    modulated_in_fp32,
    modulated_in_the_dtype,
    modulation,
    norm_in_fp32,
)


def gated_in_the_dtype(x, y, gate):
    """JoyImage."""
    return x + y * gate.to(x.dtype)[:, None]


def gated_in_fp32(x, y, gate):
    """ChronoEdit."""
    return (x.float() + y * gate[:, None]).to(x.dtype)


def gated_then_modulated(x, y, gate, shift, scale):
    """JoyImage."""
    x = gated_in_the_dtype(x, y, gate)
    return x, modulated_in_the_dtype(x, shift, scale)


def summed_then_modulated(x, y, gate, shift, scale):
    """ChronoEdit, after its cross-attention."""
    x = x + y
    return x, modulated_in_fp32(x, shift, scale)


def gated_then_normed(x, y, gate, weight, bias):
    """ChronoEdit, before its cross-attention."""
    x = gated_in_fp32(x, y, gate)
    return x, norm_in_fp32(x, weight, bias)


def tokens(count: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[T, T]:
    """The stream and what a layer adds to it."""
    return T((1, count, width), dtype), T((1, count, width), dtype)


OPS = {
    "gate_residual": Op(
        "gate and residual",
        {"joyimage": gated_in_the_dtype, "chronoedit": gated_in_fp32},
        (*tokens(4, 16), modulation(16)),
        per_element(2),
    ),
    "gate_residual_norm": Op(
        "gate, residual, LayerNorm, scale and shift",
        {"joyimage": gated_then_modulated, "chronoedit": summed_then_modulated},
        (*tokens(4, 16), *(modulation(16),) * 3),
        per_element(11),
    ),
    "gate_residual_layer_norm": Op(
        "gate, residual, LayerNorm, learned scale and shift",
        gated_then_normed,
        (*tokens(4, 16), modulation(16), T((16,)), T((16,))),
        per_element(11),
    ),
}
CASES = [
    Case("gate_residual", "joyimage", "image tokens", (*tokens(8192, 4096), JOYIMAGE), 80, 1, True),
    Case("gate_residual", "joyimage", "text tokens", (*tokens(1100, 4096), JOYIMAGE), 80, 1),
    Case("gate_residual", "chronoedit", "tokens", (*tokens(7200, 5120), CHRONOEDIT), 80, 1),
    Case("gate_residual", "chronoedit", "tokens in fp32", (*tokens(7200, 5120, SINGLE), CHRONOEDIT)),
    Case(
        "gate_residual_norm", "joyimage", "image tokens", (*tokens(8192, 4096), *(JOYIMAGE,) * 3), 80, 1, True
    ),
    Case("gate_residual_norm", "joyimage", "text tokens", (*tokens(1100, 4096), *(JOYIMAGE,) * 3), 80, 1),
    Case(
        "gate_residual_norm",
        "chronoedit",
        "after the cross-attention, no gate",
        (*tokens(7200, 5120), None, CHRONOEDIT, CHRONOEDIT),
        per_step=80,
        per_block=1,
    ),
    Case(
        "gate_residual_norm",
        "chronoedit",
        "tokens in fp32, no gate",
        (*tokens(7200, 5120, SINGLE), None, CHRONOEDIT, CHRONOEDIT),
    ),
    Case(
        "gate_residual_layer_norm",
        "chronoedit",
        "before the cross-attention",
        (*tokens(7200, 5120), CHRONOEDIT, *AFFINE),
        per_step=80,
        per_block=1,
        trained=True,
    ),
]
