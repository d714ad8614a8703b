"""Training ChronoEdit on pairs and on clips (`systems` says what each part is for)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from joyedit.estimates.parts import Part
from joyedit.media import images as im
from joyedit.noise import draw_noise
from joyedit.pipelines.chronoedit_frames import FrameCoder
from joyedit.pipelines.made_for import MadeFor
from joyedit.training import losses
from joyedit.training.cache import Hashes, name_of
from joyedit.training.data import Size, load_film
from joyedit.training.examples import Example, content, table_of
from joyedit.training.pairs import Fault, Pair
from joyedit.training.systems import (
    Drawing,
    Kept,
    Said,
    Sample,
    drawn,
    embeds_of,
    flow_level,
    stacked,
    with_weight,
)

LONGEST = 512  # tokens of prompts, padding included


class ChronoEdit:
    """A pair is a film that ends with the target; a clip is a film with the way there."""

    denoiser = "transformer"
    encoders: tuple[str, ...] = ("text_encoder", "image_encoder")

    def __init__(self, made_for: MadeFor, revisions: Mapping[str, str], frames: int = 29):
        self.frames = frames
        self.blank = made_for.call.get("negative_prompt", "")
        self.revisions = revisions

    def tables(self, bases: Sequence[int], own: Sequence[Size] | None, config: Any, made_for: MadeFor):
        return [table_of(base) for base in bases or [made_for.basesize or 960]]

    def accept(self, pair: Pair) -> Pair | Fault:
        if not pair.is_clip and len(pair.controls) != 1:
            return Fault(pair.name, f"has {len(pair.controls)} controls: ChronoEdit edits one photograph")
        return dataclasses.replace(pair, controls=()) if pair.is_clip else pair

    def names(self, pair: Pair, bucket: Size, hashes: Hashes) -> tuple[str, str, str]:
        by = {name: self.revisions[name] for name in ("vae", "image_encoder")}
        frames = self.frames if pair.is_clip else 5
        seen = content(pair, bucket, hashes, by, system="chronoedit", frames=frames)
        texts = {"by text_encoder": self.revisions["text_encoder"], "system": "chronoedit"}
        words = [name_of("words", {**texts, "prompt": text}) for text in (pair.prompt, self.blank)]
        return name_of("pictures", seen), words[0], words[1]

    def see(self, pipe: Any, example: Example, target: Image, controls: list[Image]) -> dict[str, Tensor]:
        """target_mean, target_std (C, T, h, w) of the film, normalised; condition (4 + C, T, h, w); image
        (M, D_image), what CLIP sees of the photograph."""
        way = [controls[0]]
        if example.pair.is_clip:
            *way, target = load_film(example.pair, example.table, self.frames - 3)
        with pipe.on_device(pipe.vae) as vae:
            coder = FrameCoder(vae)

            def encode(pictures: list[Image]) -> tuple[Tensor, Tensor]:
                pixels = im.to_latent_input(pictures, device=pipe.device)  # (F, 3, 1, H, W)
                posterior = vae.encode(pixels[:, :, 0].movedim(0, 1)[None]).latent_dist
                mean, std = posterior.mean.float(), posterior.std.float()
                return (mean - coder.mean.to(mean)) / coder.std.to(mean), std / coder.std.to(std)

            ends = encode([way[0], *[target] * 4])
            ways = encode(way) if len(way) > 1 else [x[:, :, :1] for x in ends]
            mean, std = (torch.cat((a, b[:, :, 1:]), dim=2)[0] for a, b in zip(ways, ends, strict=True))
            first = im.to_latent_input(way[:1], device=pipe.device)
            condition = coder.condition(first, 1 + 4 * (mean.shape[1] - 1))[0]
        found = {"target_mean": mean, "target_std": std, "condition": condition}
        if pipe.image_encoder is not None:
            found["image"] = pipe.encode_image(way[0])[0]
        return found

    def read(self, pipe: Any, prompts: list[str], controls: list[Image]) -> list[Tensor]:
        """(L, D) each, without the zeros of their padding."""
        embeds, _ = pipe.encode_prompt(prompts, None, False, max_sequence_length=LONGEST)
        lengths = [int(row.any(-1).nonzero().max()) + 1 if row.any() else 1 for row in embeds]
        return [row[:length].clone() for row, length in zip(embeds, lengths, strict=True)]

    def stand_in(self, parts: Mapping[str, Part], example: Example) -> tuple[Kept, Tensor]:
        config, vae = parts[self.denoiser].network.config, parts["vae"].network.config
        rows, columns = (side // vae.scale_factor_spatial for side in example.bucket)
        frames = 1 + (self.frames - 1) // 4 if example.pair.is_clip else 2
        kept = {"target_mean": torch.zeros(vae.z_dim, frames, rows, columns)}
        kept["condition"] = torch.zeros(config.in_channels - vae.z_dim, frames, rows, columns)
        if config.image_dim and "image_encoder" in parts:
            sees = parts["image_encoder"].network.config
            kept["image"] = torch.zeros((sees.image_size // sees.patch_size) ** 2 + 1, config.image_dim)
        return kept, torch.zeros(LONGEST, config.text_dim)

    def draw(
        self,
        kept: Kept,
        prompt: Tensor,
        how: Drawing,
        generator: torch.Generator,
        sigma: float | None = None,
    ) -> Sample:
        """As of JoyImage. Half of the samples of a film are its ends alone, as a sampler goes on after its
        reasoning."""
        level = flow_level(how, generator, sigma)
        latents = drawn(kept, "target", generator, sigma is None)
        noise = draw_noise(latents.shape, generator)
        given = {"prompt": padded(prompt), "condition": kept["condition"]}
        given |= {"image": kept["image"]} if "image" in kept else {}
        if latents.shape[1] > 2 and sigma is None and torch.rand((), generator=generator) < 0.5:
            latents, noise = latents[:, losses.ENDS], noise[:, losses.ENDS]
            given["condition"] = given["condition"][:, losses.ENDS]
        return Sample(latents, noise, level, with_weight(given, kept))

    def loss(self, network: Any, samples: Sequence[Sample], how: Drawing) -> Tensor:
        latents, noise, sigma, given = stacked(samples)
        conditioning = losses.ChronoEditConditioning(given["condition"], given["prompt"], given.get("image"))
        return losses.chronoedit(network, latents, conditioning, noise, sigma, weight=given.get("weight"))

    def edit(
        self, pipe: Any, example: Example, kept: Kept, controls: list[Image], said: Said, seed: int
    ) -> Image:
        height, width = example.bucket
        dtype, device = pipe.transformer.dtype, pipe.device
        texts = embeds_of(Said(padded(said.words), padded(said.blank)), dtype, device)
        film = pipe(
            image=controls[0],
            **texts,
            image_embeds=kept["image"].to(device, dtype)[None] if "image" in kept else None,
            height=height,
            width=width,
            num_frames=5,
            only_last_frame=True,
            output_type="pil",
            generator=torch.Generator().manual_seed(seed),
        )
        return film.frames[0][-1]


def padded(prompt: Tensor) -> Tensor:
    """A prompt (L, D) with the zeros that the network attends to."""
    return F.pad(prompt, (0, 0, 0, LONGEST - len(prompt)))
