"""Calls of kernels/channel_rms_norm.py: WAN's autoencoder, which no denoising step calls."""

import torch
import torch.nn.functional as F

from benchmarks.op_cases import Case, Op, T, per_element


def norm(x, gamma):
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return F.normalize(wide, dim=1).to(x.dtype) * gamma.numel() ** 0.5 * gamma + 0.0


def norm_then_silu(x, gamma):
    return F.silu(norm(x, gamma))


def maps(channels: int, frames: int, height: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    return T((1, channels, frames, height, width), dtype), T((channels, 1, 1, 1), dtype)


def frames_first(channels: int, frames: int, height: int, width: int) -> tuple:
    """As a convolution of single frames leaves them."""
    x = T((1, frames, channels, height, width), view=lambda x: x.transpose(1, 2))
    return x, T((channels, 1, 1, 1))


def channels_last(channels: int, frames: int, height: int, width: int) -> tuple:
    x = T((1, frames, height, width, channels), view=lambda x: x.movedim(-1, 1))
    return x, T((channels, 1, 1, 1))


OPS = {
    "channel_rms_norm": Op("RMSNorm over channels", norm, maps(32, 1, 2, 2), per_element(5)),
    "channel_rms_norm_silu": Op(
        "RMSNorm over channels and SiLU", norm_then_silu, maps(32, 1, 2, 2), per_element(9)
    ),
}
CASES = [
    Case(
        "channel_rms_norm_silu",
        "joyimage",
        "last stage of the decoder",
        maps(96, 1, 1024, 1024),
        trained=True,
    ),
    Case(
        "channel_rms_norm_silu",
        "joyimage",
        "first stage of the decoder",
        maps(384, 1, 128, 128),
        trained=True,
    ),
    Case("channel_rms_norm_silu", "joyimage", "second stage of the decoder", maps(192, 1, 512, 512)),
    Case("channel_rms_norm_silu", "joyimage", "channels last", channels_last(384, 1, 128, 128), trained=True),
    Case("channel_rms_norm_silu", "chronoedit", "after an upsampler", frames_first(192, 4, 360, 640)),
    Case(
        "channel_rms_norm_silu",
        "chronoedit",
        "last stage of the decoder",
        maps(96, 4, 720, 1280),
        compiled=False,
    ),
    Case("channel_rms_norm_silu", "chronoedit", "in fp32", maps(96, 4, 720, 1280, torch.float32)),
    Case("channel_rms_norm", "joyimage", "attention of the decoder", maps(384, 1, 128, 128), trained=True),
]
