"""Calls of kernels/gated.py."""

import torch
import torch.nn.functional as F

from benchmarks.op_cases import Case, Op, T, per_element


def halves(value_gate):
    """Stable Diffusion."""
    value, gate = value_gate.chunk(2, dim=-1)
    return value * F.gelu(gate)


def gelu_new(gate, value):
    """UMT5: the GELU is made of single operations."""
    inner = 0.7978845608028654 * (gate + 0.044715 * torch.pow(gate, 3.0))
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * value


def silu_times(gate, up):
    """Qwen3-VL."""
    return F.silu(gate) * up


def gelu_alone(x):
    """One kernel, whose bytes cannot be fewer. The bias before it is added by the matrix product."""
    return F.gelu(x, approximate="tanh")


def pair(tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[T, T]:
    """Two projections."""
    return T((1, tokens, width), dtype), T((1, tokens, width), dtype)


HALF, SINGLE = torch.float16, torch.float32
OPS = {
    "geglu": Op("split, exact GELU and product", halves, (T((1, 4, 32)),), per_element(6)),
    "geglu_tanh": Op("tanh GELU and product", gelu_new, pair(4, 16), per_element(11)),
    "swiglu": Op("SiLU and product", silu_times, pair(4, 16), per_element(5)),
    "gelu_tanh": Op("tanh GELU", gelu_alone, (T((1, 4, 16)),), per_element(10)),
}
CASES = [
    Case("geglu", "diffedit", "96 x 96", (T((2, 9216, 2560), HALF),), 5, 1, True),
    Case("geglu", "diffedit", "48 x 48", (T((2, 2304, 5120), HALF),), 5, compiled=False),
    Case("geglu", "diffedit", "24 x 24", (T((2, 576, 10240), HALF),), 5, compiled=False),
    Case("geglu", "diffedit", "12 x 12", (T((2, 144, 10240), HALF),), 1, compiled=False),
    Case("geglu", "diffedit", "96 x 96 in fp32", (T((2, 9216, 2560), SINGLE),)),
    Case("geglu_tanh", "chronoedit", "layer of the prompt encoder", pair(512, 10240), trained=True),
    Case("geglu_tanh", "chronoedit", "the same in fp32", pair(512, 10240, SINGLE)),
    Case("swiglu", "joyimage", "decoder layer of the prompt encoder", pair(1098, 12288), trained=True),
    Case("swiglu", "joyimage", "the same in fp32", pair(1098, 12288, SINGLE)),
    Case("gelu_tanh", "joyimage", "image tokens", (T((1, 8192, 16384)),), 80, 1, True),
    Case("gelu_tanh", "joyimage", "text tokens", (T((1, 1100, 16384)),), 80, 1),
    Case("gelu_tanh", "chronoedit", "tokens", (T((1, 7200, 13824)),), 80, 1),
    Case("gelu_tanh", "chronoedit", "tokens in fp32", (T((1, 7200, 13824), SINGLE),)),
    Case("gelu_tanh", "joyimage", "layer of the vision tower", (T((4096, 4304)),)),
]
