"""Convolutions, as every device does them best: PyTorch's own, in another order of sums on a CPU.

Weights may be narrower than the activations, as in `ops`, of which these are a part.

B batch   C channels   T frames   H, W height and width
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | tuple[int, ...]  # one number for all axes, or one per axis

_STANDS_FOR: ContextVar[str] = ContextVar("stands_for", default="meta")


def kind_of(device: torch.device) -> str:
    """ "cpu", "cuda", ...: by what is computed there. Tensors without memory stand for those of a device."""
    return _STANDS_FOR.get() if device.type == "meta" else device.type


@contextlib.contextmanager
def standing_for(kind: str) -> Iterator[None]:
    """While the block runs, what is on the meta device is treated as if it was on one of this kind."""
    token = _STANDS_FOR.set(kind)
    try:
        yield
    finally:
        _STANDS_FOR.reset(token)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics and rotations of x: fp32, or float64 where x is that already."""
    return torch.promote_types(x.dtype, torch.float32)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Size = 1, padding: Size | str = 0
) -> Tensor:
    """x (B, C_in, H, W), weight (C_out, C_in, kh, kw), bias (C_out) -> (B, C_out, H', W') in x's dtype."""
    if not isinstance(weight, Tensor):  # one with adapters knows how it is convolved
        return weight.conv2d(x, bias, stride, padding)
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), stride, padding)


def doubling_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """3x3 convolution, padded by 1, of a picture whose pixels are doubled in both directions.

    x (B, C_in, H, W), weight (C_out, C_in, 3, 3), bias (C_out) -> (B, C_out, 2 H, 2 W) in the dtype of x.
    A kernel meets four different pixels at most. On a CPU the taps that meet the same one are added first,
    into a 4x4 kernel of a transposed convolution: 4 / 9 of the products, and the doubled picture is never
    made. Half precision would round the sums of taps.
    """
    if kind_of(x.device) != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    kernel = F.pad(weight.to(wide_dtype(x)).transpose(0, 1).flip(2, 3), (1, 1, 1, 1))
    kernel = kernel[:, :, 1:] + kernel[:, :, :-1]
    kernel = kernel[..., 1:] + kernel[..., :-1]
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv_transpose2d(x, kernel.to(x.dtype), bias, stride=2, padding=1)


def conv3d(
    segments: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    time_stride: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> Tensor:
    """Convolution over frames and pixels; only the pixels are padded.

    segments: (B, C_in, t, H, W) each, one after the other in time, T frames in all; weight (C_out, C_in, kt,
    kh, kw), bias (C_out) -> (B, C_out, T', H', W') in the dtype of the segments.
    """
    dtype, device = segments[0].dtype, segments[0].device
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    stride, padding3d = (time_stride, 1, 1), (0, *padding)
    if kind_of(device) != "cpu":
        return F.conv3d(torch.cat(tuple(segments), dim=2), weight, bias, stride, padding3d)
    frames = [frame for segment in segments for frame in segment.unbind(2)]
    # What pairs save on products, half precision would lose in their sums, and few channels spend on them.
    is_wide = min(weight.shape[:2]) >= 32 and dtype in (torch.float32, torch.float64)
    if is_wide and weight.shape[2] == 3 and time_stride == 1 and len(frames) > 3:
        return _conv3d_by_pairs(frames, weight, bias, padding)
    out = F.conv3d(_stack_frames(frames), weight, bias, stride, padding3d)
    return out.contiguous(memory_format=torch.channels_last_3d)


def _conv3d_by_pairs(
    frames: Sequence[Tensor], weight: Tensor, bias: Tensor | None, padding: tuple[int, int]
) -> Tensor:
    """`conv3d` with three taps in time, two frames of the result by four 2-D convolutions instead of six.

    The minimal filter F(2, 3) adds and subtracts frames, and taps, before it multiplies. A CPU convolves as
    fast as it multiplies matrices, so fewer products are the one way to less time.
    Source: S. Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, arXiv 1509.09308.
    """
    count = len(frames) - 2
    first, middle, last = weight.unbind(2)
    ends, half = (first + last) / 2, middle / 2
    both, unlike = ends + half, ends - half
    out = None
    for i in range(0, count - 1, 2):
        a, b, c, d = frames[i : i + 4]
        q = F.conv2d(b + c, both, bias, padding=padding)
        r = F.conv2d(c - b, unlike, padding=padding)
        if out is None:  # channels last in memory, as `_stack_frames` leaves it
            out = q.new_empty(len(q), count, *q.shape[2:], q.shape[1]).movedim(-1, 1)
        out[:, :, i] = F.conv2d(a - c, first, padding=padding).add_(q).add_(r)
        q = q.sub_(r)
        del r
        out[:, :, i + 1] = q.sub_(F.conv2d(b - d, last, padding=padding))
    assert out is not None
    if count % 2:
        single = F.conv3d(_stack_frames(frames[-3:]), weight, bias, 1, (0, *padding))
        out[:, :, -1] = single[:, :, 0]
    return out


def _stack_frames(frames: Sequence[Tensor]) -> Tensor:
    """(B, C, H, W) each -> (B, C, T, H, W), channels last in memory. `torch.stack` itself gives axes of size
    1 strides by which PyTorch does not know that layout again."""
    return torch.stack([frame.movedim(1, -1) for frame in frames], dim=1).movedim(-1, 1)
