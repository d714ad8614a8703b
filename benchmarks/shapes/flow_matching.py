"""The loss of both editors by instruction, JoyImage and ChronoEdit: flow matching.

x_t = (1 - sigma) x0 + sigma noise, and the network predicts the velocity noise - x0. Half of the samples are
pure noise, sigma = 1: that is where an edit is decided, the rest is polishing.

B batch   C latent channels   T latent frames   h, w latent height and width
"""

from collections.abc import Callable

import torch
from torch import Tensor

SHIFT = 3.0  # of the noise levels below 1, in training and in the checkpoints' schedulers


def flow_loss(
    predict: Callable[[Tensor, Tensor], Tensor], target: Tensor, weight: Tensor, own: float = 0.0
) -> Tensor:
    """The weighted mean squared error of the velocity (x_t - x0) / sigma.

    predict: noisy latents and their noise levels (B) to velocities, like target (B, C, T, h, w). weight:
    broadcasts to it. own: the share of the samples below sigma = 1 whose x_t comes not from the truth but
    from the network's own answer to pure noise, as it does when an edit is made. Their error counts
    1.5 sigma**2: that of x0.
    """
    count = len(target)
    u = torch.rand(count)  # drawn on the CPU: the same on every device
    low = (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp_min(1e-3)
    sigma = torch.where(torch.rand(count) < 0.5, 1.0, low).view(-1, 1, 1, 1, 1).to(target.device)
    noise = torch.randn(target.shape).to(target.device)
    clean = target
    if own > 0:
        is_own = (torch.rand(sigma.shape).to(sigma.device) < own) & (sigma < 1)
        with torch.no_grad():
            answer = noise - predict(noise, torch.ones_like(sigma).flatten())
        clean = torch.where(is_own, answer, target)
        weight = torch.where(is_own, 1.5 * sigma.square(), 1.0) * weight
    noisy = torch.lerp(clean, noise, sigma)
    velocity = predict(noisy, sigma.flatten())
    return (weight * (velocity - (noisy - target) / sigma).square()).mean()
