"""Colours of an edit brought back to those of its photograph: a gain and an offset per channel.

Autoencoders and denoisers shift colours a little over the whole picture, and what an instruction changes is
changed strongly. So the pixels that an edit left alone tell the shift, and those that it concerns are
outliers: the fit minimises the sum of r^2 / (1 + r^2 / c^2), where r is the largest difference among a
pixel's channels, by weighted least squares, while c falls from most of the range to a few levels.

N pixels. Values are in [0, 1].
Source: the loss of Geman and McClure with graduated non-convexity, Yang et al., arXiv 1909.08605.
"""

import torch
from torch import Tensor

SAMPLES = 65_536  # pixels that a fit looks at, at most about
FEWEST = 64  # pixels that it needs
NEAR = 0.05  # a pixel that differs by no more than this after the fit was left alone by the edit
LEAST_SHARE = 0.5  # of such pixels: with fewer, nearly everything was edited and nothing is known
LARGEST_GAIN = 2.0  # a larger one, or one below its inverse, is no drift but the edit itself
FLATNESS = 1e-5  # the variance below which a channel is too flat to tell a gain


def match_colors(pixels: Tensor, photo: Tensor, where: Tensor | None = None) -> Tensor:
    """`pixels` (3, H, W) with every channel times a gain plus an offset, in [0, 1]; as they are, if the edit
    covers nearly everything.

    photo (3, H, W). where (H, W) bool: the pixels to compare; all if there are none.
    """
    every = max(1, int((pixels[0].numel() / SAMPLES) ** 0.5))
    x, y = (picture[:, ::every, ::every].flatten(1).cpu().double() for picture in (pixels, photo))
    if where is not None:
        chosen = where[::every, ::every].flatten().cpu()
        x, y = x[:, chosen], y[:, chosen]
    gain, offset = fit_gain_and_offset(x, y)
    return (pixels * gain.to(pixels)[:, None, None] + offset.to(pixels)[:, None, None]).clamp(0, 1)


def fit_gain_and_offset(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gain and offset (3,) with gain * x + offset near y for the pixels that no edit concerns; x, y (3, N) of
    float64.

    1 and 0 where there are fewer than FEWEST pixels, where fewer than LEAST_SHARE of them are then within
    NEAR in all channels, and where a gain is beyond LARGEST_GAIN or its inverse.
    """
    gain, offset = torch.ones_like(x[:, 0:1]), torch.zeros_like(x[:, 0:1])
    identity = gain[:, 0], offset[:, 0]
    if x.shape[1] < FEWEST:
        return identity
    for scale in torch.logspace(-0.3, -2, 18, dtype=torch.float64).tolist():  # 0.5 to 0.01
        distance = (gain * x + offset - y).abs().amax(0)
        weight = (1 + (distance / scale) ** 2) ** -2
        weight = weight / weight.sum()
        mean_x, mean_y = (x * weight).sum(1, keepdim=True), (y * weight).sum(1, keepdim=True)
        variance = ((x - mean_x) ** 2 * weight).sum(1, keepdim=True)
        covariance = ((x - mean_x) * (y - mean_y) * weight).sum(1, keepdim=True)
        gain = (covariance + FLATNESS) / (variance + FLATNESS)  # of a flat channel 1
        offset = mean_y - gain * mean_x
    near = (gain * x + offset - y).abs().amax(0) <= NEAR
    plausible = ((gain >= 1 / LARGEST_GAIN) & (gain <= LARGEST_GAIN)).all()
    if near.double().mean() < LEAST_SHARE or not plausible:
        return identity
    return gain[:, 0], offset[:, 0]
