"""Training the UNet of Stable Diffusion, which DiffEdit asks (`systems` says what each part is for)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from joyedit.estimates.parts import Part
from joyedit.media import images as im
from joyedit.noise import draw_noise
from joyedit.pipelines.checks import Text
from joyedit.pipelines.made_for import MadeFor
from joyedit.training import losses
from joyedit.training.cache import Hashes, name_of
from joyedit.training.data import Size
from joyedit.training.examples import Example, content, table_of
from joyedit.training.pairs import Fault, Pair
from joyedit.training.systems import Drawing, Kept, Said, Sample, drawn, embeds_of, stacked, with_weight

CLIP_TOKENS = 77


class StableDiffusion:
    """It learns to draw pictures from captions, and edits nothing."""

    denoiser = "unet"
    encoders: tuple[str, ...] = ("text_encoder", "safety_checker", "feature_extractor")

    def __init__(self, made_for: MadeFor, revisions: Mapping[str, str]):
        self.blank = made_for.call.get("negative_prompt", "")
        self.revisions = revisions

    def tables(self, bases: Sequence[int], own: Sequence[Size] | None, config: Any, made_for: MadeFor):
        bases = bases or [config.sample_size * 8]
        return [table_of(base, 64 if base % 64 == 0 and base >= 512 else 16) for base in bases]

    def accept(self, pair: Pair) -> Pair | Fault:
        if pair.is_clip:
            return Fault(pair.name, "its target is a clip, and Stable Diffusion makes pictures")
        return dataclasses.replace(pair, controls=())

    def names(self, pair: Pair, bucket: Size, hashes: Hashes) -> tuple[str, str, str]:
        seen = content(pair, bucket, hashes, {"vae": self.revisions["vae"]}, system="diffedit")
        texts = {"by text_encoder": self.revisions["text_encoder"], "system": "diffedit"}
        words = [name_of("words", {**texts, "prompt": text}) for text in (pair.prompt, self.blank)]
        return name_of("pictures", seen), words[0], words[1]

    def see(self, pipe: Any, example: Example, target: Image, controls: list[Image]) -> dict[str, Tensor]:
        """target_mean, target_std (C, h, w), scaled."""
        with pipe.on_device(pipe.vae) as vae:
            pixels = im.to_latent_input([target], vae.dtype, pipe.device)[:, :, 0]
            posterior = vae.encode(pixels).latent_dist
            scale = vae.config.scaling_factor
        return {
            "target_mean": scale * posterior.mean.float()[0],
            "target_std": scale * posterior.std.float()[0],
        }

    def read(self, pipe: Any, prompts: list[str], controls: list[Image]) -> list[Tensor]:
        """(L, D) each."""
        with pipe.on_device(pipe.text_encoder):
            (embeds,) = pipe.prompts.read([Text(prompts)], False, (0, 0), pipe.device)
        return list(embeds.positive)

    def stand_in(self, parts: Mapping[str, Part], example: Example) -> tuple[Kept, Tensor]:
        config, factor = parts[self.denoiser].network.config, parts["vae"].network.config.factor
        rows, columns = (side // factor for side in example.bucket)
        latent = torch.zeros(config.in_channels, rows, columns)
        return {"target_mean": latent}, torch.zeros(CLIP_TOKENS, config.context_dim)

    def draw(
        self,
        kept: Kept,
        prompt: Tensor,
        how: Drawing,
        generator: torch.Generator,
        sigma: float | None = None,
    ) -> Sample:
        """As of JoyImage; levels are those of timesteps, each as often as the others."""
        level = losses.draw_timestep_sigma(1, how.scheduler, generator)[0]
        level = level if sigma is None else torch.tensor(sigma)
        latents = drawn(kept, "target", generator, sigma is None)
        noise = draw_noise(latents.shape, generator)
        return Sample(latents, noise, level, with_weight({"prompt": prompt}, kept))

    def loss(self, network: Any, samples: Sequence[Sample], how: Drawing) -> Tensor:
        latents, noise, sigma, given = stacked(samples)
        conditioning = losses.StableDiffusionConditioning(given["prompt"])
        options = {"scheduler": how.scheduler, "min_snr": how.min_snr, "weight": given.get("weight")}
        return losses.stable_diffusion(network, latents, conditioning, noise, sigma, **options)

    def edit(
        self, pipe: Any, example: Example, kept: Kept, controls: list[Image], said: Said, seed: int
    ) -> Image:
        """A picture from nothing: all of it is repainted."""
        height, width = (side // pipe.vae_scale_factor for side in example.bucket)
        texts = embeds_of(said, pipe.unet.dtype, pipe.device)
        generator = torch.Generator().manual_seed(seed)
        noise = draw_noise((1, pipe.unet.config.in_channels, height, width), generator, pipe.device)
        steps = pipe.made_for.call.get("num_inference_steps", 50)
        return pipe(
            mask_image=torch.ones(1, height, width),
            image_latents=noise[:, None].expand(-1, steps + 1, -1, -1, -1),
            **texts,
            inpaint_strength=1.0,
            num_inference_steps=steps,
        ).images[0]
