"""Calls of kernels/group_norm.py."""

import torch
import torch.nn.functional as F

from benchmarks.op_cases import Case, Op, T, per_element

HALF = torch.float16


def norm(x, weight, bias, groups, eps):
    return F.group_norm(x.contiguous(), groups, weight, bias, eps)


def norm_then_silu(x, weight, bias, groups, eps):
    return F.silu(norm(x, weight, bias, groups, eps))


def maps(batch: int, width: int, size: int, eps: float = 1e-5, dtype: torch.dtype = HALF) -> tuple:
    return T((batch, width, size, size), dtype), T((width,), dtype), T((width,), dtype), 32, eps


def channels_last(batch: int, width: int, size: int, eps: float = 1e-5) -> tuple:
    x = T((batch, size, size, width), HALF, lambda x: x.movedim(-1, 1))
    return x, T((width,), HALF), T((width,), HALF), 32, eps


OPS = {
    "group_norm": Op("GroupNorm and its scale and shift", norm, maps(1, 64, 2), per_element(8)),
    "group_norm_silu": Op(
        "GroupNorm, scale, shift and SiLU", norm_then_silu, maps(1, 64, 2), per_element(12)
    ),
}

# Width, size of the picture: calls in a step of the UNet.
RESNETS = {
    **{(320, 96): 8, (640, 96): 2, (960, 96): 1, (320, 48): 1, (640, 48): 6, (960, 48): 1, (1280, 48): 1},
    **{(1920, 48): 1, (640, 24): 1, (1280, 24): 6, (1920, 24): 1, (2560, 24): 2, (1280, 12): 11},
    **{(2560, 12): 3},
}
TRANSFORMERS = {(320, 96): 5, (640, 48): 5, (1280, 24): 5, (1280, 12): 1}
COMPILED = ((320, 96), (1280, 24))

CASES = [
    *(
        Case(
            "group_norm_silu",
            "diffedit",
            f"resnet, {width} x {size} x {size}",
            maps(2, width, size),
            per_step=calls,
            per_block=2 * ((width, size) == (320, 96)),
            trained=(width, size) == (320, 96),
            compiled=(width, size) in COMPILED,
        )
        for (width, size), calls in RESNETS.items()
    ),
    *(
        Case(
            "group_norm",
            "diffedit",
            f"transformer, {width} x {size} x {size}",
            maps(2, width, size, 1e-6),
            per_step=calls,
            per_block=int((width, size) == (320, 96)),
            compiled=(width, size) in COMPILED,
        )
        for (width, size), calls in TRANSFORMERS.items()
    ),
    Case("group_norm_silu", "diffedit", "resnet, channels last", channels_last(2, 320, 96), trained=True),
    Case("group_norm_silu", "diffedit", "small maps, channels last", channels_last(2, 1280, 24)),
    Case("group_norm_silu", "diffedit", "last stage of the decoder", maps(1, 128, 768, 1e-6)),
    Case("group_norm_silu", "diffedit", "in fp32", maps(1, 128, 768, 1e-6, torch.float32)),
    Case("group_norm", "diffedit", "attention of the decoder", maps(1, 512, 96, 1e-6), compiled=False),
]
