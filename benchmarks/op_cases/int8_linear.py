"""Calls of kernels/int8_linear.py, which are opt-in: JoyImage's products where weights are int8_convrot."""

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.op_cases import Case, Op, T
from joyedit.quantised import QuantisedWeight

SINGLE = torch.float32


def rebuilt(x, stored, scale, bias, group):
    """The exact reading: the weight rebuilt in fp32, rounded to the dtype of x, and multiplied."""
    return F.linear(x, QuantisedWeight(stored, scale, group, x.dtype).to(x.dtype), bias)


def count(x, stored, scale, bias, group) -> int:
    return 2 * x.numel() * len(stored) + (4 * group * x.numel() if group > 1 else 0)


def call(
    rows: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16, group: int = 256
) -> tuple[Any, ...]:
    scales, bias = T((outputs, 1), SINGLE, lambda x: x.abs() / 1000), T((outputs,), dtype)
    return T((*rows, inputs), dtype), T((outputs, inputs), torch.int8), scales, bias, group


IMAGE, TEXT = (1, 8192), (1, 1100)
OPS = {
    "int8_linear": Op(
        "rotation and rounding of the inputs, product of whole numbers, scales and bias",
        rebuilt,
        call((1, 4), 32, 32, group=16),
        count,
        matrix=True,
        instructions={
            "cuda": ("LDGSTS", ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "IGMMA", "UTCIMMA")),
            "hip": ("v_mfma",),
        },
        rounds=True,
    )
}
CASES = [
    Case("int8_linear", "joyimage", "q, k and v of the image", call(IMAGE, 4096, 12288)),
    Case("int8_linear", "joyimage", "end of the image's MLP", call(IMAGE, 16384, 4096)),
    Case("int8_linear", "joyimage", "q, k and v of the text", call(TEXT, 4096, 12288)),
    Case("int8_linear", "joyimage", "q, k and v in fp16", call(IMAGE, 4096, 12288, torch.float16)),
]
