"""Calls of kernels/rms_norm.py."""

import torch
import torch.nn.functional as F

from benchmarks.op_cases import Case, Op, T, per_element


def in_one_kernel(x, weight, eps=1e-6):
    """ChronoEdit's torch.nn.RMSNorm, one kernel on a GPU. Elsewhere torch takes it apart, so the bytes
    are counted on the LayerNorm of the same size."""
    return F.layer_norm(x, x.shape[-1:], weight, eps=eps)


def separate(x, weight, eps=1e-6):
    """Qwen3-VL."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def added_then_separate(x, y, weight, eps=1e-6):
    """Qwen3-VL."""
    total = x + y
    return total, separate(total, weight, eps)


def added_in_fp32(x, y, weight, eps=1e-6):
    """UMT5: the stream is fp32, and a norm's result has the dtype of its weight."""
    total = x + y
    normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * normed.to(weight.dtype)


OPS = {
    "rms_norm": Op(
        "RMSNorm and its scale",
        {"joyimage": separate, "chronoedit": in_one_kernel},
        (T((1, 4, 16)), T((16,))),
        per_element(4),
    ),
    "add_rms_norm": Op(
        "residual, RMSNorm and its scale",
        {"joyimage": added_then_separate, "chronoedit": added_in_fp32},
        (T((1, 4, 16)), T((1, 4, 16)), T((16,))),
        per_element(5),
    ),
}
CASES = [
    Case("rms_norm", "chronoedit", "q of the cross-attention", (T((1, 7200, 5120)), T((5120,))), 80, 1),
    Case("rms_norm", "joyimage", "decoder layer of the prompt encoder", (T((1, 1098, 4096)), T((4096,)))),
    Case(
        "rms_norm",
        "joyimage",
        "q of the prompt encoder's heads",
        (T((1, 1098, 32, 128)), T((128,))),
        trained=True,
    ),
    Case(
        "add_rms_norm",
        "joyimage",
        "decoder layer of the prompt encoder",
        (T((1, 1098, 4096)), T((1, 1098, 4096)), T((4096,))),
        trained=True,
    ),
    Case(
        "add_rms_norm",
        "chronoedit",
        "layer of the prompt encoder",
        (T((512, 4096), torch.float32), T((512, 4096)), T((4096,))),
    ),
    Case("rms_norm", "chronoedit", "in fp32", (T((1, 7200, 5120), torch.float32), T((5120,), torch.float32))),
]
