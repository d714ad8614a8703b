"""Pulling a predicted noise towards what noise is like: its pixels uncorrelated, its values unit normal.

Source: Parmar et al. (pix2pix-zero), arXiv 2302.03027, section 3.1; diffusers
`pipeline_stable_diffusion_diffedit.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from joyedit.noise import Generators


@torch.enable_grad()
def regularize(
    output: Tensor,
    to_noise: Callable[[Tensor], Tensor],
    steps: int,
    weights: tuple[float, float],
    rolls: int,
    generator: Generators = None,
) -> Tensor:
    """A network's output (B, C, h, w) after `steps` of descent on the losses of the noise it stands for.

    to_noise: from the output to that noise. weights: of auto-correlation and divergence; 0 leaves one out.
    rolls: gradients of the auto-correlation in each step, every one at random distances from `generator`.
    """
    auto_corr, kl = weights

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = output.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(to_noise(leaf)), leaf)[0]

    for _ in range(steps):
        if auto_corr > 0:
            for _ in range(rolls):
                output = output - auto_corr / rolls * gradient(lambda e: auto_correlation(e, generator))
        if kl > 0:
            output = output - kl * gradient(kl_divergence)
    return output.detach()


def predicted_noise(scheduler: Any, t: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """The noise in x (B, C, h, w) at training timestep t that a network's output stands for."""
    alpha = scheduler.alphas_cumprod[int(t)].to(x)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return output
    if kind == "sample":
        return (x - alpha.sqrt() * output) / (1 - alpha).sqrt()
    return alpha.sqrt() * output + (1 - alpha).sqrt() * x


def auto_correlation(noise: Tensor, generator: Generators = None) -> Tensor:
    """How much each channel resembles itself moved by a random distance, on a pyramid of halved sizes."""
    source = generator[0] if isinstance(generator, Sequence) else generator
    device = "cpu" if source is None else source.device
    loss = noise.new_zeros(())
    for channel in noise.flatten(0, 1)[:, None, None]:  # (1, 1, h, w)
        while True:
            distance = int(torch.randint(channel.shape[2] // 2, (1,), generator=source, device=device))
            for dim in (2, 3):
                loss = loss + (channel * channel.roll(distance, dim)).mean() ** 2
            if channel.shape[2] <= 8:
                break
            channel = F.avg_pool2d(channel, 2)
    return loss


def kl_divergence(noise: Tensor) -> Tensor:
    """From the unit normal: var + mean^2 - 1 - ln var, over the whole tensor."""
    variance = noise.var()
    return variance + noise.mean() ** 2 - 1 - (variance + 1e-7).log()
