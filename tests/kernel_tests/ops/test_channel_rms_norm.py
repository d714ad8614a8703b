"""channel_rms_norm and channel_rms_norm_silu against float64, in the memory formats of pictures and
videos."""

import pytest
import torch
import torch.nn.functional as F

from joyedit import ops

OPERATIONS = pytest.mark.parametrize("silu", [False, True], ids=["norm", "silu"])


def plain(x, gamma):
    length = (x * x).sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    return x / length * gamma.numel() ** 0.5 * gamma.view(-1, *(1,) * (x.ndim - 2))


def plain_silu(x, gamma):
    return F.silu(plain(x, gamma))


@pytest.fixture
def check(compare, randn):
    def check(silu, x, gamma=None):
        op, formula = (ops.channel_rms_norm_silu, plain_silu) if silu else (ops.channel_rms_norm, plain)
        gamma = randn(x.shape[1], *(1,) * (x.ndim - 2)) if gamma is None else gamma
        compare(op, formula, x, gamma, keeps_format=True)

    return check


# B, C, T, H, W: one value, odd sizes, one frame, more positions than a program takes, no video.
SHAPES = [(1, 1, 1, 1, 1), (2, 17, 3, 5, 3), (1, 96, 1, 9, 11), (1, 384, 2, 3, 5), (1, 8, 0, 2, 2)]
FORMATS = {
    "contiguous": (0, 1, 2, 3, 4),
    "channels_last": (0, 2, 3, 4, 1),
    "frames_first": (0, 2, 1, 3, 4),
}


def in_format(x, name):
    """The same values with axes in another order in memory."""
    order = FORMATS[name]
    return x.permute(order).contiguous().permute([order.index(axis) for axis in range(5)])


@OPERATIONS
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_videos(check, randn, shape, memory_format, silu):
    check(silu, in_format(randn(*shape), memory_format))


@OPERATIONS
@pytest.mark.parametrize("memory_format", FORMATS)
def test_dtypes(check, randn, dtype, memory_format, silu):
    check(silu, in_format(randn(2, 24, 2, 3, 7, dtype=dtype), memory_format))


@OPERATIONS
def test_pictures_and_rows(check, randn, dtype, silu):
    check(silu, randn(2, 5, 4, 7, dtype=dtype))
    check(silu, randn(2, 4, 7, 5, dtype=dtype).movedim(-1, 1), randn(5, 1, 1).to(dtype))
    check(silu, randn(2, 5, 7, dtype=dtype))
    check(silu, randn(3, 5, dtype=dtype))


def test_slices(check, randn):
    """Frames of a chunk, and channels; the rest of a video's positions need a copy."""
    x = randn(2, 12, 5, 3, 7)
    check(True, x[:, :, -2:])
    check(True, in_format(x, "channels_last")[:, 4:])


def test_tiles_of_a_picture_become_dense(randn):
    x, gamma = randn(1, 6, 1, 9, 8)[..., 2:, 1:6], randn(6)
    with ops.backend("triton"):
        out = ops.channel_rms_norm(x, gamma)
    assert out.is_contiguous()
    torch.testing.assert_close(out, plain(x, gamma))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_more_chunks_than_programs(check, randn, monkeypatch, memory_format):
    from joyedit.kernels import channel_rms_norm

    monkeypatch.setattr(channel_rms_norm, "PARTIAL_SUMS", 2)
    check(True, in_format(randn(2, 320, 2, 5, 7), memory_format))


def test_positions_without_length(randn):
    """Zeros stay zero, and a length below 1e-12 counts as 1e-12, in the gradient too."""
    x = randn(1, 4, 1, 3)
    x[..., 0], x[..., 1] = 0, x[..., 1] * 1e-14
    x, gamma = x.requires_grad_(), randn(4)
    gradient = randn(1, 4, 1, 3)
    for op, formula in ((ops.channel_rms_norm, plain), (ops.channel_rms_norm_silu, plain_silu)):
        with ops.backend("triton"):
            out = op(x, gamma)
            (ours,) = torch.autograd.grad(out, x, gradient)
        assert not out[..., 0].any()
        wide = x.detach().double().requires_grad_()
        exact = formula(wide, gamma.double())
        (wanted,) = torch.autograd.grad(exact, wide, gradient.double())
        torch.testing.assert_close(out, exact.float())
        torch.testing.assert_close(ours[..., 1:], wanted[..., 1:].float())


@OPERATIONS
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.slow
def test_registration(randn, memory_format, silu):
    from joyedit.kernels.channel_rms_norm import channel_rms_norm, channel_rms_norm_silu

    kernel = channel_rms_norm_silu if silu else channel_rms_norm
    x = in_format(randn(2, 6, 3, 2, 5), memory_format)
    torch.library.opcheck(kernel, (x.requires_grad_(), randn(6, 1, 1, 1).requires_grad_()))
    torch.library.opcheck(kernel, (x.detach()[:, 3:], randn(3)), test_utils="test_faketensor")
