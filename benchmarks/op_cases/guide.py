"""Calls of kernels/guide.py."""

from typing import Any

import torch

from benchmarks.op_cases import Case, Op, T


def stepped(cond, uncond, scale, rescale, sample, delta):
    """JoyImage: combination, rescaling and the Euler step."""
    comb = uncond + scale * (cond - uncond)
    target, norm = (torch.norm(t, dim=1, keepdim=True) for t in (cond, comb))
    comb = comb * (target / norm.clamp_min(1e-6))
    return (sample.to(torch.float32) + delta * comb).to(comb.dtype)


def combined(cond, uncond, scale):
    """ChronoEdit and Stable Diffusion, whose solvers keep a history."""
    return uncond + scale * (cond - uncond)


def count(cond, uncond, scale, rescale=False, sample=None, delta=None) -> int:
    return (3 + 5 * rescale + 2 * (sample is not None)) * cond.numel()


def latents(*shape: int, dtype: torch.dtype = torch.bfloat16) -> T:
    return T(shape, dtype)


def branch(number: int) -> T:
    """One half of what the UNet predicts for both."""
    return T((2, 4, 96, 96), torch.float16, lambda x: x[number : number + 1])


SINGLE = torch.float32
DELTA: Any = T((4,), SINGLE, lambda x: x[1])
JOYIMAGE = (latents(1, 16, 1, 128, 128),) * 2
CHRONOEDIT = (latents(1, 16, 2, 90, 160, dtype=SINGLE),) * 2
OPS = {
    "guide": Op(
        "guidance, rescaled norm and Euler step",
        {"joyimage": stepped, "chronoedit": combined, "diffedit": combined},
        (latents(1, 4, 1, 4, 4), latents(1, 4, 1, 4, 4), 2.0),
        count,
    )
}
CASES = [
    Case("guide", "joyimage", "latents", (*JOYIMAGE, 4.0, True, JOYIMAGE[0], DELTA), 1),
    Case(
        "guide",
        "joyimage",
        "latents in fp32",
        (*JOYIMAGE, 4.0, True, latents(1, 16, 1, 128, 128, dtype=SINGLE), DELTA),
    ),
    Case("guide", "chronoedit", "latents", (*CHRONOEDIT, 5.0), 1),
    Case("guide", "diffedit", "latents", (branch(1), branch(0), 7.5), 1),
]
