"""Calls of kernels/ada_layer_norm.py."""

import torch
import torch.nn.functional as F

from benchmarks.op_cases import Case, Op, T, per_element


def modulated_in_the_dtype(x, shift, scale, eps=1e-6):
    """JoyImage: the norm alone is in fp32."""
    shift, scale = (t.to(x.dtype)[:, None] for t in (shift, scale))
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype) * (1 + scale) + shift


def modulated_in_fp32(x, shift, scale, eps=1e-6):
    """ChronoEdit."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def norm_in_fp32(x, weight=None, bias=None, eps=1e-6):
    """JoyImage and ChronoEdit."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def norm(x, weight, bias, eps=1e-6):
    """Stable Diffusion."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def modulation(width: int) -> T:
    """One of the six rows that a block adds to its timestep's."""
    return T((1, 6, width), torch.float32, lambda x: x[:, 1])


JOYIMAGE, CHRONOEDIT = modulation(4096), modulation(5120)
HALF, SINGLE = torch.float16, torch.float32
AFFINE = (T((5120,), SINGLE), T((5120,), SINGLE))

OPS = {
    "ada_layer_norm": Op(
        "LayerNorm, scale and shift of the timestep",
        {"joyimage": modulated_in_the_dtype, "chronoedit": modulated_in_fp32},
        (T((1, 4, 16)), modulation(16), modulation(16)),
        per_element(9),
    ),
    "layer_norm": Op(
        "LayerNorm, learned scale and shift",
        {"joyimage": norm_in_fp32, "chronoedit": norm_in_fp32, "diffedit": norm},
        (T((1, 4, 16)), T((16,)), T((16,))),
        per_element(9),
    ),
}
CASES = [
    Case(
        "ada_layer_norm",
        "joyimage",
        "image tokens",
        (T((1, 8192, 4096)), JOYIMAGE, JOYIMAGE),
        per_step=80,
        per_block=1,
        trained=True,
    ),
    Case("ada_layer_norm", "joyimage", "text tokens", (T((1, 1100, 4096)), JOYIMAGE, JOYIMAGE), 80, 1),
    Case("ada_layer_norm", "chronoedit", "tokens", (T((1, 7200, 5120)), CHRONOEDIT, CHRONOEDIT), 82, 1),
    Case(
        "ada_layer_norm",
        "chronoedit",
        "tokens in fp32",
        (T((1, 7200, 5120), SINGLE), CHRONOEDIT, CHRONOEDIT),
    ),
    Case("layer_norm", "joyimage", "the head", (T((1, 4096, 4096)),), 2),
    *(
        Case(
            "layer_norm",
            "diffedit",
            f"{n} tokens",
            (T((2, n, d), HALF), T((d,), HALF), T((d,), HALF)),
            calls,
            trained=n == 9216,
            compiled=d != 640,
        )
        for n, d, calls in ((9216, 320, 15), (2304, 640, 15), (576, 1280, 15), (144, 1280, 3))
    ),
]
