"""Photographs of Stable Diffusion pipelines: to scaled latents and back.

Between networks latents are fp32, whatever these are: a solver adds up small steps. Noise is drawn in the
dtype of the network that it is for, as the reference does, which a seed depends on.

I pictures   B images of a call, a multiple of I   C latent channels   h, w latent size
Source: arXiv 2112.10752; diffusers `pipeline_stable_diffusion_diffedit.py`.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from joyedit.media.masks import LATENT_CHANNELS, to_model_pixels
from joyedit.models.sd_vae import AutoencoderKL
from joyedit.noise import Generators, draw_noise

log = logging.getLogger("joyedit")


class LatentCoder:
    """An autoencoder, with the scale that diffusion models have latents in; without one, of latents alone."""

    def __init__(self, vae: AutoencoderKL):
        self.vae = vae
        self.factor = 8 if vae is None else vae.config.factor
        self.scale = 1.0 if vae is None else vae.config.scaling_factor

    def pixels(self, image: Any, batch: int) -> Tensor:
        """(I, 3, H, W) in [-1, 1], or latents (I, C, h, w) as they are. Raises ValueError or TypeError for
        what is no picture, and when the batch is no multiple of I."""
        if image is None:
            raise ValueError("image is needed: a photograph, or a list of them")
        pixels = to_model_pixels(image, self.factor)
        if batch % len(pixels):
            raise ValueError(f"{len(pixels)} images for {batch} prompts: give one image, or one per prompt")
        return pixels

    def size(self, pixels: Tensor) -> tuple[int, int]:
        """(h, w) of the latents of `pixels`."""
        factor = 1 if pixels.shape[1] == LATENT_CHANNELS else self.factor
        return pixels.shape[2] // factor, pixels.shape[3] // factor

    def encode(
        self,
        pixels: Tensor,
        batch: int,
        device: torch.device,
        *,
        copies: int = 1,
        sampled: bool = False,
        generator: Generators = None,
    ) -> Tensor:
        """Latents (B * copies, C, h, w), the copies of an image in a row; each picture is encoded once.

        sampled: draw each from the posterior, instead of its mean. One generator draws for I * copies, and
        the images that share a picture share the draws, as in the reference; a list draws for every image.
        """

        def for_all(x: Tensor) -> Tensor:
            return x.repeat(batch * copies // len(x), 1, 1, 1)

        if pixels.shape[1] == LATENT_CHANNELS:
            return for_all(pixels.to(device, torch.float32).repeat_interleave(copies, dim=0))
        posterior = self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist
        latents = posterior.mean.float().repeat_interleave(copies, dim=0)
        if sampled:
            std = posterior.std.float().repeat_interleave(copies, dim=0)
            if isinstance(generator, Sequence):
                latents, std = for_all(latents), for_all(std)
            latents = latents + std * draw(latents, generator, self.vae.dtype)
        return for_all(self.scale * latents)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) float32, about [-1, 1]."""
        return self.vae.decode((latents / self.scale).to(self.vae.dtype)).sample.float()


def draw(like: Tensor, generator: Generators, dtype: torch.dtype) -> Tensor:
    """Unit noise in the shape of latents (B, ...), drawn as `dtype`. Each of a list of generators draws an
    equal share of the batch."""
    if not isinstance(generator, Sequence):
        return draw_noise(like.shape, generator, like.device, dtype).to(like)
    share = (len(like) // len(generator), *like.shape[1:])
    return torch.cat([draw_noise(share, one, like.device, dtype) for one in generator]).to(like)


def check_levels(levels: Any, batch: int, taken: int) -> Tensor:
    """What a call for `taken` steps was given as image_latents -> (B, taken or taken + 1, C, h, w). Raises
    ValueError saying what would fit, or TypeError."""
    if isinstance(levels, (list, tuple)) and levels and all(isinstance(x, Tensor) for x in levels):
        levels = torch.cat(list(levels))
    if not isinstance(levels, Tensor):
        raise TypeError(f"image_latents is a {type(levels).__name__}: give the latents of invert")
    if levels.ndim == 4 and len(levels) % batch == 0:
        levels = levels.unflatten(0, (batch, -1))
    if levels.ndim != 5 or levels.shape[2] != LATENT_CHANNELS or 0 in levels.shape:
        wanted = f"(B, levels, {LATENT_CHANNELS}, h, w)"
        raise ValueError(f"image_latents have shape {tuple(levels.shape)}, wanted {wanted}")
    if len(levels) != batch:
        raise ValueError(f"image_latents are of {len(levels)} images, but there are {batch} prompts")
    if levels.shape[1] not in (taken, taken + 1):
        raise ValueError(
            f"image_latents have {levels.shape[1]} levels, but num_inference_steps and inpaint_strength make "
            f"{taken} steps, for {taken + 1} levels: give the values that `invert` was called with"
        )
    return levels


def with_clean_level(levels: Tensor, clean: Tensor | None) -> Tensor:
    """Levels (B, T, C, h, w) that end above the clean one (B, C, h, w), with it added; where it is not known,
    each is moved to where the reference blends it in."""
    if clean is not None:
        return torch.cat((levels, clean[:, None]), dim=1)
    log.warning(
        "image_latents lack the clean level, or are of another run: what is outside the mask keeps a "
        "little noise. Pass all that invert returns, or the photograph as image="
    )
    return torch.cat((levels[:, :1], levels), dim=1)
