"""What is different from system to system: what a pair becomes, what the network is trained to do, and how an
edit is made of it.

    see      a pair's pictures -> what is kept of them         first pass, with encoders, without denoiser
    read     prompts -> embeddings
    draw     what is kept -> a sample: latents, noise, level   second pass, with the denoiser alone
    loss     samples of one form -> (B,)
    edit     a picture, as the pipeline makes it

Latents are kept as mean and deviation of the posterior, and drawn in every step.

C latent channels   T latent frames   h, w latent height and width   L prompt tokens   D text width
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from joyedit.media import images as im
from joyedit.noise import draw_noise
from joyedit.pipelines.checks import Text
from joyedit.pipelines.chronoedit_frames import FrameCoder
from joyedit.pipelines.joyimage_prompts import IMAGE_MARK, USER
from joyedit.pipelines.made_for import MadeFor
from joyedit.training import losses
from joyedit.training.cache import Hashes, name_of
from joyedit.training.data import Size, load_film
from joyedit.training.examples import Example, content, table_of
from joyedit.training.pairs import Fault, Pair

MOST_REFERENCES = 6
MOST_TOKENS = 4096  # of a prompt of JoyAI-Image with its pictures
LONGEST = 512  # tokens of ChronoEdit's prompts, padding included

Kept = Mapping[str, Tensor]  # what `see` made of the pictures of a pair, by name


class Said(NamedTuple):
    """Embeddings (L, D) of a prompt, and of the one that says nothing."""

    words: Tensor
    blank: Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one step sees of a pair, without a batch axis. sigma: noise level. given: the rest, by name."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    given: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "Sample":
        parts = (self.latents.to(device), self.noise.to(device), self.sigma.to(device))
        return Sample(*parts, {name: tensor.to(device) for name, tensor in self.given.items()})


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How samples are drawn. sigma: how levels are, see `losses.draw_sigma`; shift: of the checkpoint's own
    sampler, whose steps lie there. scheduler, min_snr: of Stable Diffusion."""

    sigma: str = "shifted"
    shift: float = 1.0
    scheduler: Any = None
    min_snr: float | None = None

    @classmethod
    def by(cls, scheduler: Any, sigma: str, min_snr: float | None) -> "Drawing":
        """As the sampler of a checkpoint wants it."""
        config = scheduler.config
        shift = next((float(config[name]) for name in ("shift", "flow_shift") if name in config), 1.0)
        return cls(sigma, shift, scheduler, min_snr)


class JoyImage:
    """JoyAI-Image-Edit, and Plus with several references. Its prompts are read with the pictures."""

    denoiser = "transformer"
    encoders = ("text_encoder",)  # what the second pass does without

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


class ChronoEdit:
    """A pair is a film that ends with the target; a clip is a film with the way there."""

    denoiser = "transformer"
    encoders = ("text_encoder", "image_encoder")

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


class StableDiffusion:
    """The UNet that DiffEdit asks: it learns to draw pictures from captions, and edits nothing."""

    denoiser = "unet"
    encoders = ("text_encoder", "safety_checker", "feature_extractor")

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


SYSTEMS = {
    "JoyImageEditPipeline": JoyImage,
    "JoyImageEditPlusPipeline": functools.partial(JoyImage, plus=True),
    "ChronoEditPipeline": ChronoEdit,
    "StableDiffusionDiffEditPipeline": StableDiffusion,
}
System = JoyImage | ChronoEdit | StableDiffusion


def flow_level(how: Drawing, generator: torch.Generator, sigma: float | None) -> Tensor:
    """The noise level of a flow."""
    if sigma is not None:
        return torch.tensor(sigma)
    return losses.draw_sigma(1, how.sigma, how.shift, generator)[0]


def drawn(kept: Kept, name: str, generator: torch.Generator, sampled: bool = True) -> Tensor:
    """Latents of that name: drawn of the posterior, or its mean where that is asked for or all there is."""
    mean = kept[f"{name}_mean"].float()
    if f"{name}_std" not in kept:
        return mean
    noise = draw_noise(mean.shape, generator)  # drawn in any case, so that what comes after it is the same
    return mean + kept[f"{name}_std"].float() * noise if sampled else mean


def with_weight(given: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    return {**given, "weight": kept["weight"]} if "weight" in kept else given


def weight_of(mask: Image, shape: Sequence[int]) -> Tensor:
    """What cells of latents (C, ..., h, w) count: how white the mask is there, (1, ..., h, w)."""
    levels = torch.from_numpy(np.array(mask, dtype=np.float32) / 255)
    cells = F.interpolate(levels[None, None], tuple(shape[-2:]), mode="area")[0]
    return cells.reshape(*[1] * (len(shape) - 2), *shape[-2:])


def padded(prompt: Tensor) -> Tensor:
    """ChronoEdit's prompts (L, D) with the zeros that the network attends to."""
    return F.pad(prompt, (0, 0, 0, LONGEST - len(prompt)))


def stacked(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Latents, noise, levels and the rest of samples of one form, with a batch axis."""
    parts = [(one.latents, one.noise, one.sigma) for one in samples]
    latents, noise, sigma = (torch.stack(each) for each in zip(*parts, strict=True))
    given = {name: torch.stack([one.given[name] for one in samples]) for name in samples[0].given}
    return latents, noise, sigma, given


def embeds_of(said: Said, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """As calls take them, (1, L, D)."""
    pairs = (("prompt_embeds", said.words), ("negative_prompt_embeds", said.blank))
    return {name: embeds.to(device, dtype)[None] for name, embeds in pairs}
