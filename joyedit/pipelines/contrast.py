"""Where two prompts want different pictures: the predictions that tell, and the map that they make.

A prompt's guided prediction is the sum of two, g * positive + (1 - g) * negative. The difference of two such
sums is a sum of four, of which those of equal prompts are one. With equal negative prompts, the usual case,
two are left: the scale g is then only a factor, which the map does not have.

B images   L text tokens   D width   C latent channels   h, w latent size   M noises per image
Source: Couairon et al., arXiv 2210.11427, section 3.2; diffusers `pipeline_stable_diffusion_diffedit.py`.
"""

import torch
from torch import Tensor

from joyedit.models.sd_unet import UNet2DConditionModel
from joyedit.pipelines.sd_prompts import Embeds


def compare(
    unet: UNet2DConditionModel,
    noisy: Tensor,
    timestep: Tensor,
    target: Embeds,
    source: Embeds,
    scale: float,
    swapped: bool,
) -> Tensor:
    """What is predicted for noisy latents (B * M, C, h, w) under the target prompts, less what is under the
    source prompts; guided by `scale` where there are negative ones.

    swapped: see `difference_of`.
    """
    prompts, weights = difference_of(target, source, scale, swapped)
    context, time = unet.embed_context(torch.cat(prompts)), unet.embed_time(timestep)
    predicted = unet.predict(noisy, time, context, branches=len(prompts)).chunk(len(prompts))
    difference = torch.stack([w * eps for w, eps in zip(weights, predicted, strict=True)]).sum(dim=0)
    same = same_rows(target, source)
    # Rounding must not make a mask where there is nothing to see.
    return difference.masked_fill(same.repeat_interleave(len(noisy) // len(same))[:, None, None, None], 0)


def difference_of(
    target: Embeds, source: Embeds, scale: float, swapped: bool
) -> tuple[list[Tensor], list[float]]:
    """Prompts (B, L, D), and weights with which their predictions add up to the guided target's less the
    guided source's.

    swapped: take negative for positive prompts, and the reverse.
    """
    first, second = (1 - scale, scale) if swapped else (scale, 1 - scale)
    terms = [(target.positive, 1.0), (source.positive, -1.0)]
    if target.negative is not None and source.negative is not None:
        terms = [
            (target.positive, first),
            (target.negative, second),
            (source.positive, -first),
            (source.negative, -second),
        ]
    prompts: list[Tensor] = []
    weights: list[float] = []
    for prompt, weight in terms:
        for i, known in enumerate(prompts):
            if torch.equal(known, prompt):
                weights[i] += weight
                break
        else:
            prompts.append(prompt)
            weights.append(weight)
    kept = [i for i, weight in enumerate(weights) if weight]
    return [prompts[i] for i in kept], [weights[i] for i in kept]


def same_rows(target: Embeds, source: Embeds) -> Tensor:
    """(B,): whether the prompts of an image are the same in both."""
    pairs = [(a, b) for a, b in zip(target, source, strict=True) if a is not None and b is not None]
    return torch.stack([(a == b).flatten(1).all(dim=1) for a, b in pairs]).all(dim=0)


def heat_map(difference: Tensor, batch: int, ratio: float, shared: bool) -> Tensor:
    """Difference (B * M, C, h, w) of the predictions -> (B, h, w) in [0, 1]; the mask is what is above 1/2.

    Sizes are averaged over noises and channels, cut off at `ratio` times the mean over the image (shared:
    over all images), and divided by that. Where there is no difference, the map is zero.
    """
    size = difference.abs().unflatten(0, (batch, -1)).mean(dim=(1, 2))
    mean = size.mean() if shared else size.mean(dim=(1, 2), keepdim=True)
    cut = ratio * mean
    return size.clamp(max=cut) / cut.clamp(min=torch.finfo(cut.dtype).tiny)
