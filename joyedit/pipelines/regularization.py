"""Pulling a predicted noise towards what noise is like: its pixels uncorrelated, its values unit normal.

B samples   C channels   h, w height and width of the latents
Source: Parmar et al. (pix2pix-zero), arXiv 2302.03027, section 3.1; diffusers
`pipeline_stable_diffusion_diffedit.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from joyedit.noise import Generators
from joyedit.schedulers.ddim import DDIMInverseScheduler


@torch.enable_grad()
def regularize(
    scheduler: DDIMInverseScheduler,
    t: Tensor,
    x: Tensor,
    output: Tensor,
    *,
    steps: int,
    weights: tuple[float, float],
    rolls: int,
    generator: Generators = None,
) -> Tensor:
    """What a network predicted for x at timestep t, (B, C, h, w) both, after `steps` of gradient descent.

    weights: of auto-correlation and divergence; 0 leaves one out. rolls: gradients of the auto-correlation in
    each step, every one at random distances from `generator`. With a list of generators each sample is
    regularised on its own; else the losses are those of the batch, as in the reference.
    """
    if isinstance(generator, Sequence):
        alone = partial(regularize, scheduler, t, steps=steps, weights=weights, rolls=rolls)
        samples = zip(x.split(1), output.split(1), generator, strict=True)
        return torch.cat([alone(*pair, generator=own) for *pair, own in samples])
    auto_corr, kl = weights

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = output.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(predicted_noise(scheduler, t, x, leaf)), leaf)[0]

    for _ in range(steps):
        if auto_corr > 0:
            for _ in range(rolls):
                output = output - auto_corr / rolls * gradient(lambda eps: auto_correlation(eps, generator))
        if kl > 0:
            output = output - kl * gradient(kl_divergence)
    return output.detach()


def predicted_noise(scheduler: DDIMInverseScheduler, t: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """The noise that a network's output stands for, x taken to be at level t (it is one step before, which
    the reference passes over too)."""
    alpha = scheduler.alphas_cumprod[int(t)].to(x)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return output
    if kind == "sample":
        return (x - alpha.sqrt() * output) / (1 - alpha).sqrt()
    return alpha.sqrt() * output + (1 - alpha).sqrt() * x


def auto_correlation(noise: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """How much each channel resembles itself moved by a random distance, on a pyramid of halved sizes."""
    device = "cpu" if generator is None else generator.device
    loss = noise.new_zeros(())
    for channel in noise.flatten(0, 1)[:, None, None]:  # (1, 1, h, w)
        while True:
            farthest = max(channel.shape[2] // 2, 1)
            distance = int(torch.randint(farthest, (1,), generator=generator, device=device))
            for dim in (2, 3):
                loss = loss + (channel * channel.roll(distance, dim)).mean() ** 2
            if channel.shape[2] <= 8 or channel.shape[3] < 2:
                break
            channel = F.avg_pool2d(channel, 2)
    return loss


def kl_divergence(noise: Tensor) -> Tensor:
    """From the unit normal: var + mean^2 - 1 - ln var, over the whole tensor."""
    variance = noise.var()
    return variance + noise.mean() ** 2 - 1 - (variance + 1e-7).log()
