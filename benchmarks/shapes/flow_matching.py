"""How both editors by instruction, JoyImage and ChronoEdit, meet the loss of the room, flow matching.

Half of the samples are pure noise, sigma = 1: that is where an edit is decided, the rest is polishing. Late
in a training, others start from the network's own answer to pure noise, as the second step of an edit does.

B batch   C latent channels   T latent frames   h, w latent height and width
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from joyedit.training.losses import draw_sigma

SHIFT = 3.0  # of the noise levels below 1, in training and in the checkpoints' schedulers


def flow_loss(
    loss: Callable[..., Tensor],
    velocity: Callable[..., Tensor],
    network: Any,
    latents: Tensor,
    conditioning: Any,
    weight: Tensor,
    own: float = 0.0,
) -> Tensor:
    """The mean over a batch. loss, velocity: of the system, in `joyedit.training.losses`. latents (B, C, T,
    h, w); weight: broadcasts to them; own: see `from_own_answers`."""
    count = len(latents)
    low = draw_sigma(count, "shifted", SHIFT)
    sigma = torch.where(torch.rand(count) < 0.5, 1.0, low).to(latents.device)
    noise = torch.randn(latents.shape).to(latents.device)  # drawn on the CPU: the same on every device
    if own > 0:
        with torch.no_grad():
            answer = noise - velocity(network, noise, conditioning, torch.ones_like(sigma))
        noise, weight = from_own_answers(answer, latents, noise, sigma, weight, own)
    return loss(network, latents, conditioning, noise, sigma, weight=weight).mean()


def from_own_answers(
    answer: Tensor, latents: Tensor, noise: Tensor, sigma: Tensor, weight: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """Noise and weights with which a share of the samples below sigma = 1 have an x_t that comes not from the
    truth but from the network's answer to pure noise:

        (1 - s) answer + s noise = (1 - s) x0 + s (noise + (1 - s) / s (answer - x0))

    Their error counts 1.5 sigma**2: that of x0.
    """
    s = sigma.view(-1, 1, 1, 1, 1)
    is_own = (torch.rand(s.shape).to(s.device) < share) & (s < 1)
    leading = noise + (1 - s) / s * (answer - latents)
    return torch.where(is_own, leading, noise), torch.where(is_own, 1.5 * s.square(), 1.0) * weight
