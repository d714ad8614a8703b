"""Training JoyAI-Image-Edit, and Edit-Plus with several references (`systems` says what each part is for)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from joyedit.estimates.parts import Part
from joyedit.estimates.stages import END, PROMPT, TEMPLATE
from joyedit.media import images as im
from joyedit.noise import draw_noise
from joyedit.pipelines.joyimage_prompts import IMAGE_MARK, USER
from joyedit.pipelines.made_for import MadeFor
from joyedit.training import losses
from joyedit.training.cache import Hashes, name_of
from joyedit.training.data import Size
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

MOST_REFERENCES = 6
MOST_TOKENS = 4096  # of a prompt with its pictures


class JoyImage:
    """JoyAI-Image-Edit, and Plus with several references. Its prompts are read with the pictures."""

    denoiser = "transformer"
    encoders: tuple[str, ...] = ("text_encoder",)  # what the second pass does without

    def __init__(self, made_for: MadeFor, revisions: Mapping[str, str], plus: bool = False):
        self.plus = plus
        self.blank = made_for.call.get("negative_prompt", " " if plus else "")
        self.revisions = revisions

    def tables(self, bases: Sequence[int], own: Sequence[Size] | None, config: Any, made_for: MadeFor):
        """own: the buckets that the checkpoint was made for."""
        if not bases:
            return [tuple(own)] if own else [table_of(1024)]
        return [table_of(base) for base in bases]

    def accept(self, pair: Pair) -> Pair | Fault:
        most = MOST_REFERENCES if self.plus else 1
        if pair.is_clip:
            return Fault(pair.name, "its target is a clip, and JoyAI-Image makes pictures")
        if len(pair.controls) > most:
            advice = "" if self.plus else ", which Edit-Plus takes"
            return Fault(pair.name, f"has {len(pair.controls)} references{advice}: at most {most}")
        return pair

    def names(self, pair: Pair, bucket: Size, hashes: Hashes) -> tuple[str, str, str]:
        seen = content(
            pair, bucket, hashes, {"vae": self.revisions["vae"]}, system="joyimage", plus=self.plus
        )
        read = content(
            dataclasses.replace(pair, mask=None),
            bucket,
            hashes,
            {"text_encoder": self.revisions["text_encoder"]},
            system="joyimage",
            plus=self.plus,
        )
        if not pair.controls:
            del read["target"], read["bucket"]
        words = [name_of("words", {**read, "prompt": text}) for text in (pair.prompt, self.blank)]
        return name_of("pictures", seen), words[0], words[1]

    def see(self, pipe: Any, example: Example, target: Image, controls: list[Image]) -> dict[str, Tensor]:
        """target_mean, target_std, reference_0_mean, ... (C, 1, h, w), normalised. A reference of Plus is the
        mean, one of Edit is drawn, as in their pipelines."""
        found = {}
        for name, picture in [("target", target), *((f"reference_{i}", c) for i, c in enumerate(controls))]:
            with pipe.on_device(pipe.vae) as vae:
                posterior = vae.encode(im.to_latent_input([picture], vae.dtype, pipe.device)).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            zero = pipe.normalize_latents(torch.zeros_like(mean))
            found[f"{name}_mean"] = pipe.normalize_latents(mean)[0]
            if name == "target" or not self.plus:
                found[f"{name}_std"] = (pipe.normalize_latents(std) - zero)[0]
        return found

    def read(self, pipe: Any, prompts: list[str], controls: list[Image]) -> list[Tensor]:
        """(L, D) each; the pictures are seen once."""
        if not controls:
            embedded = [pipe.encode_prompt(text, max_sequence_length=MOST_TOKENS) for text in prompts]
        elif self.plus:
            turns = [f"{USER}{IMAGE_MARK * len(controls)}{text}<|im_end|>\n" for text in prompts]
            embedded = [
                pipe.encode_prompt_multiple_images(turn, images=controls, max_sequence_length=MOST_TOKENS)
                for turn in turns
            ]
        else:
            embeds, mask = pipe.encode_prompt_multiple_images(
                prompts, images=controls * len(prompts), max_sequence_length=MOST_TOKENS
            )
            return [row[kept.bool()] for row, kept in zip(embeds, mask, strict=True)]
        return [embeds[0] for embeds, _ in embedded]

    def stand_in(self, parts: Mapping[str, Part], example: Example) -> tuple[Kept, Tensor]:
        config = parts[self.denoiser].network.config
        rows, columns = (side // parts["vae"].network.config.scale_factor_spatial for side in example.bucket)
        latent = torch.zeros(config.in_channels, 1, rows, columns)
        count = len(example.pair.controls)
        seen = (example.bucket[0] // 32) * (example.bucket[1] // 32) * count
        references = {f"reference_{i}_mean": latent for i in range(count)}
        prompt = torch.zeros(TEMPLATE + seen + PROMPT + END, config.text_dim)
        return {"target_mean": latent, **references}, prompt

    def draw(
        self,
        kept: Kept,
        prompt: Tensor,
        how: Drawing,
        generator: torch.Generator,
        sigma: float | None = None,
    ) -> Sample:
        """sigma: that level, and the mean of the target's posterior, as validation wants it."""
        level = flow_level(how, generator, sigma)
        latents = drawn(kept, "target", generator, sigma is None)
        given = {"prompt": prompt}
        names = sorted(name for name in kept if name.startswith("reference_") and name.endswith("_mean"))
        for name in (name.removesuffix("_mean") for name in names):
            given[name] = drawn(kept, name, generator)
        return Sample(latents, draw_noise(latents.shape, generator), level, with_weight(given, kept))

    def loss(self, network: Any, samples: Sequence[Sample], how: Drawing) -> Tensor:
        latents, noise, sigma, given = stacked(samples)
        references = tuple(given[name] for name in sorted(given) if name.startswith("reference_"))
        conditioning = losses.JoyImageConditioning(given["prompt"], references)
        return losses.joyimage(network, latents, conditioning, noise, sigma, weight=given.get("weight"))

    def edit(
        self, pipe: Any, example: Example, kept: Kept, controls: list[Image], said: Said, seed: int
    ) -> Image:
        height, width = example.bucket
        texts = embeds_of(said, pipe.transformer.dtype, pipe.device)
        for name in list(texts):
            texts[f"{name}_mask"] = torch.ones(texts[name].shape[:2], dtype=torch.long, device=pipe.device)
        pipe.buckets = [*example.table]
        images = {"images": controls or None} if self.plus else {"image": controls[0] if controls else None}
        sides = {"height": height, "width": width} if self.plus or not controls else {}
        generator = torch.Generator().manual_seed(seed)
        return pipe(**images, **texts, **sides, generator=generator).images[0]
