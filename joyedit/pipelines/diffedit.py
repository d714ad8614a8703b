"""DiffEdit on Stable Diffusion 1.x and 2.x: edit a photograph by two captions, without drawing a mask.

  generate_mask  noises the photograph half way, predicts that noise under the source and under the target
                 caption, and takes where the two differ, averaged over several noises.
  invert         runs DDIM backwards from the photograph to noise, and keeps the latents of every level.
  __call__       denoises from the noisiest level under the target caption; after each step, the latents of
                 the level that it reached are put back outside the mask.
  edit           is the three in one call, with settings that agree.

The levels end with the clean latents, so what lies outside the mask is the autoencoder's reconstruction of
the photograph. A caption's keys and values are computed once per call, and the photograph is encoded once for
all noises; of the predictions that make a mask, those that cancel are left out. Between steps latents are
fp32, whatever the networks are.

B images   L text tokens   D width   C latent channels   h, w latent size   M noises per mask   T steps taken
Source: Couairon et al., arXiv 2210.11427; diffusers `pipeline_stable_diffusion_diffedit.py`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from joyedit import ops
from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.options import LoadOptions
from joyedit.media import images as im
from joyedit.media.clip_images import CLIPImageProcessor
from joyedit.media.masks import paste_back, to_latent_mask, to_mask_images
from joyedit.models.clip import CLIPTextModel, StableDiffusionSafetyChecker
from joyedit.models.sd_unet import UNet2DConditionModel
from joyedit.models.sd_vae import AutoencoderKL
from joyedit.noise import Generators
from joyedit.pipelines.checks import (
    Text,
    adapter_scale,
    check_copies,
    check_count,
    check_generators,
    check_output_type,
)
from joyedit.pipelines.contrast import compare, heat_map, same_rows
from joyedit.pipelines.diffedit_request import (
    MaskRun,
    Repaint,
    Run,
    check_picture,
    check_repaint,
    check_start,
    mask_run,
    steps_taken,
)
from joyedit.pipelines.pipeline import Pipeline
from joyedit.pipelines.regularization import regularize
from joyedit.pipelines.sd_latents import LatentCoder, draw, with_clean_level
from joyedit.pipelines.sd_prompts import Embeds, PromptReader
from joyedit.schedulers.ddim import DDIMInverseScheduler, DDIMScheduler, ddim_pair
from joyedit.text.clip_tokenizer import CLIPTokenizer
from joyedit.text.textual_inversion import TextualInversion

log = logging.getLogger("joyedit")

# The defects of the reference that `reference_quirks` reproduces.
LATE_BLEND = "late_blend"  # each blend takes the level before the step, and the clean latents are not kept
SWAPPED_GUIDANCE = "swapped_guidance"  # masks are made with positive and negative prompts exchanged
BATCH_THRESHOLD = "batch_threshold"  # the masks of a batch share one threshold
SAMPLED_INVERSION = "sampled_inversion"  # inversion starts from a draw of the posterior, not from its mean
PARTIAL_CLIP_SKIP = "partial_clip_skip"  # clip_skip leaves the negative prompt alone

SCHEDULER_FILE = "scheduler/scheduler_config.json"
TIMESTEP_SETTINGS = ("num_train_timesteps", "timestep_spacing", "steps_offset")

Picture = Image.Image | np.ndarray | Tensor
Images = list[Image.Image] | np.ndarray | Tensor
AfterStep = Callable[[int, Tensor, Tensor], Tensor]  # step, timestep, latents -> the latents to go on with


class StableDiffusionPipelineOutput(NamedTuple):
    images: Images
    nsfw_content_detected: list[bool] | None


class DiffEditInversionPipelineOutput(NamedTuple):
    """latents (B, T + 1, C, h, w), noisiest first, clean ones last; the pictures decoded from them, or
    None."""

    latents: Tensor
    images: Images | None


class DiffEditOutput(NamedTuple):
    """Of `edit`. mask (B, h, w) int64 of 0 and 1; heat_map (B, h, w) in [0, 1] that it was cut from, None for
    a mask that was given."""

    images: Images
    nsfw_content_detected: list[bool] | None
    mask: np.ndarray
    heat_map: np.ndarray | None


class StableDiffusionDiffEditPipeline(Pipeline):
    """Edit photographs by a source and a target caption.

    Parts: `vae`, `text_encoder`, `tokenizer`, `unet`, `scheduler`, and optionally `safety_checker` with
    `feature_extractor`. `inverse_scheduler` is made from `scheduler` when it is missing or has other
    timesteps. Raises ValueError for parts that do not fit each other.
    """

    parts = {
        "vae": (AutoencoderKL,),
        "text_encoder": (CLIPTextModel,),
        "tokenizer": (CLIPTokenizer,),
        "unet": (UNet2DConditionModel,),
        "scheduler": (DDIMScheduler,),
        "safety_checker": (StableDiffusionSafetyChecker,),
        "feature_extractor": (CLIPImageProcessor,),
        "inverse_scheduler": (DDIMInverseScheduler,),
    }
    optional_parts = frozenset({"safety_checker", "feature_extractor", "inverse_scheduler"})
    relatives = frozenset(
        {"StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipelineLegacy"}
    )
    callback_tensors = frozenset({"latents"})
    quirk_names = frozenset(
        {LATE_BLEND, SWAPPED_GUIDANCE, BATCH_THRESHOLD, SAMPLED_INVERSION, PARTIAL_CLIP_SKIP}
    )

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        inverse_scheduler: DDIMInverseScheduler | None = None,
        requires_safety_checker: bool = True,
        reference_quirks: bool | Sequence[str] = False,
    ):
        super().__init__(reference_quirks)
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.unet = unet
        self.scheduler = scheduler
        self.safety_checker = safety_checker
        self.feature_extractor = feature_extractor
        self.inverse_scheduler = inverse_scheduler or ddim_pair(scheduler.config)[1]
        unet.config.check_input_is_latents()
        if (width := text_encoder.config.hidden_size) != (wanted := unet.config.context_dim):
            raise ValueError(f"text_encoder is {width} wide, but unet reads prompts that are {wanted} wide")
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs a feature_extractor; pass both, or safety_checker=None")
        if safety_checker is None and requires_safety_checker:
            log.warning("this checkpoint is meant to run with its safety_checker, and there is none")
        if scheduler.config.steps_offset != 1:  # an old file: the model was never asked about timestep 0
            self.scheduler = type(scheduler).from_config(scheduler.config, steps_offset=1)
        ours, theirs = self.scheduler.config, inverse_scheduler.config if inverse_scheduler else {}
        fits = all(theirs.get(key) == ours[key] for key in TIMESTEP_SETTINGS)
        if not fits or ours.timestep_spacing == "linspace":
            self.scheduler, self.inverse_scheduler = ddim_pair(ours, type(scheduler))
        self.requires_safety_checker = requires_safety_checker
        self.vae_scale_factor = vae.config.factor

    @classmethod
    def from_origin(
        cls,
        origin: Origin,
        options: LoadOptions,
        replacements: Mapping[str, Any],
        quirks: bool | Sequence[str] = False,
    ) -> Self:
        """As everywhere; but a scheduler file that does not mention `clip_sample` does not clip latents."""
        pipe = super().from_origin(origin, options, replacements, quirks)
        if "scheduler" not in replacements:
            file = origin.fetch([SCHEDULER_FILE]) / SCHEDULER_FILE
            if "clip_sample" not in read_json(file):
                pipe.scheduler, pipe.inverse_scheduler = ddim_pair(pipe.scheduler.config, clip_sample=False)
        return pipe

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        return ("requires_safety_checker",)

    def settings_to_save(self) -> dict[str, Any]:
        return {"requires_safety_checker": self.requires_safety_checker}

    @torch.no_grad()
    def edit(
        self,
        image: Picture | list[Picture],
        source_prompt: str | list[str],
        target_prompt: str | list[str],
        *,
        mask_image: Any = None,
        num_inference_steps: int = 50,
        inpaint_strength: float = 0.8,
        guidance_scale: float = 7.5,
        invert_guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | None = None,
        num_maps_per_mask: int = 10,
        mask_encode_strength: float = 0.5,
        mask_thresholding_ratio: float = 3.0,
        eta: float = 0.0,
        generator: Generators = None,
        output_type: str = "pil",
        composite: bool = False,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int | None = None,
    ) -> DiffEditOutput:
        """Mask, inversion and denoising in one call.

        source_prompt says what is there, target_prompt what shall be. mask_image: takes the place of the mask
            that would be made. negative_prompt: the source prompt if not given.
        invert_guidance_scale: 1, which is none, reconstructs best.
        generator: one, or a list with one per image.
        The other arguments are those of the three methods, and so are the errors.
        """
        target = Text(target_prompt, source_prompt if negative_prompt is None else negative_prompt)
        source = Text(source_prompt)
        batch = self.prompts.check_pair(target, source)
        check_generators(generator, batch)
        pixels = self.coder.pixels(image, batch)
        check_picture(output_type, eta, composite, pixels)
        scale = adapter_scale("cross_attention_kwargs", cross_attention_kwargs)
        contrast = mask_run(
            num_inference_steps,
            mask_encode_strength,
            num_maps_per_mask,
            mask_thresholding_ratio,
            guidance_scale,
            scale,
        )
        taken = steps_taken(num_inference_steps, "inpaint_strength", inpaint_strength)
        size = self.coder.size(pixels)
        mask = None if mask_image is None else to_latent_mask(mask_image, size, batch)  # (B, 1, h, w)
        self.scheduler.set_timesteps(num_inference_steps)
        self.inverse_scheduler.set_timesteps(num_inference_steps)
        self._interrupt = False

        wanted, known = self._embed((target, source), True, clip_skip, scale)
        heat = None
        if mask is None:
            empty = known.negative if guidance_scale > 1 else None
            pair = Embeds(wanted.positive, empty), Embeds(known.positive, empty)
            heat = self._heat(pixels, *pair, contrast, generator).cpu()
            mask = to_latent_mask(heat > 0.5, size, batch)
        backwards = self.inverse_scheduler.timesteps[:taken]
        levels = self._invert(pixels, Run(backwards, known, invert_guidance_scale, scale), generator)
        work = self._for_copies(Repaint(levels, mask, pixels), taken, 1, composite)
        run = Run(self.scheduler.timesteps[num_inference_steps - taken :], wanted, guidance_scale, scale)
        x = self._repaint(work, work.levels[:, 0], run, eta=eta, generator=generator)
        pictures, flagged = self._finish(x, work, output_type)
        found = None if heat is None else heat.numpy()
        return DiffEditOutput(pictures, flagged, mask[:, 0].long().numpy(), found)

    @torch.no_grad()
    def generate_mask(
        self,
        image: Picture | list[Picture] | None = None,
        target_prompt: str | list[str] | None = None,
        target_negative_prompt: str | list[str] | None = None,
        target_prompt_embeds: Tensor | None = None,
        target_negative_prompt_embeds: Tensor | None = None,
        source_prompt: str | list[str] | None = None,
        source_negative_prompt: str | list[str] | None = None,
        source_prompt_embeds: Tensor | None = None,
        source_negative_prompt_embeds: Tensor | None = None,
        num_maps_per_mask: int | None = 10,
        mask_encode_strength: float | None = 0.5,
        mask_thresholding_ratio: float | None = 3.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generator: Generators = None,
        output_type: str | None = "np",
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int | None = None,
    ) -> np.ndarray | list[Image.Image]:
        """Where source and target captions want different pictures, at latent resolution.

        image: photographs, scaled down to multiples of 8. num_maps_per_mask: noises to average over.
        mask_encode_strength in [0, 1]: how strong these are. mask_thresholding_ratio: differences are cut off
            at this multiple of their mean, and a half of that is the threshold: larger, and the mask is
            smaller.
        generator: one, or a list with one per image, or with one per image and noise.
        Equal prompts give an empty mask, with a warning.

        Returns "np", an int64 array (B, h, w) of 0 and 1; "pil", a list of grey images of 0 and 255; or
        "heat", a float32 array (B, h, w) in [0, 1] that the mask is where it is above one half.
        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        target = Text(
            target_prompt, target_negative_prompt, target_prompt_embeds, target_negative_prompt_embeds
        )
        source = Text(
            source_prompt, source_negative_prompt, source_prompt_embeds, source_negative_prompt_embeds
        )
        batch = self.prompts.check_pair(target, source)
        scale = adapter_scale("cross_attention_kwargs", cross_attention_kwargs)
        contrast = mask_run(
            num_inference_steps,
            mask_encode_strength,
            num_maps_per_mask,
            mask_thresholding_ratio,
            guidance_scale,
            scale,
        )
        check_output_type(output_type, ("np", "pil", "heat"))
        one_each = isinstance(generator, Sequence) and len(generator) == batch
        check_generators(generator, batch if one_each else batch * contrast.maps)
        pixels = self.coder.pixels(image, batch)
        self.scheduler.set_timesteps(num_inference_steps)

        wanted, known = self._embed((target, source), guidance_scale > 1, clip_skip, scale)
        heat = self._heat(pixels, wanted, known, contrast, generator)  # (B, h, w)
        if output_type == "heat":
            return heat.cpu().numpy()
        mask = (heat > 0.5).long().cpu()
        return to_mask_images(mask) if output_type == "pil" else mask.numpy()

    def _heat(
        self, pixels: Tensor, target: Embeds, source: Embeds, run: MaskRun, generator: Generators
    ) -> Tensor:
        """How much the target's prediction differs from the source's, (B, h, w) in [0, 1]; the mask is what
        is above one half."""
        same, swapped = same_rows(target, source), SWAPPED_GUIDANCE in self.quirks
        batch = len(same)
        if same.all():
            heat = torch.zeros(batch, *self.coder.size(pixels), dtype=torch.float32, device="cpu")
        else:
            timestep = self.scheduler.timesteps[run.at]
            drawn = {"copies": run.maps, "sampled": True, "generator": generator}
            latents = self._encode(pixels, batch, **drawn)  # (B * M, C, h, w)
            noise = draw(latents, generator, self.vae.dtype)
            noisy = self.scheduler.add_noise(latents, noise, timestep)
            with self.on_device(self.unet) as unet, self._adapters_scaled(run.adapter_scale):
                difference = compare(unet, noisy, timestep, target, source, run.guidance_scale, swapped)
            heat = heat_map(difference, batch, run.ratio, BATCH_THRESHOLD in self.quirks)
        if not heat.flatten(1).any(dim=1).all():
            log.warning("source and target prompts make no difference: the mask is empty")
        return heat

    @torch.no_grad()
    def invert(
        self,
        prompt: str | list[str] | None = None,
        image: Picture | list[Picture] | None = None,
        num_inference_steps: int = 50,
        inpaint_strength: float = 0.8,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        generator: Generators = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        decode_latents: bool = False,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], None] | None = None,
        callback_steps: int | None = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        lambda_auto_corr: float = 20.0,
        lambda_kl: float = 20.0,
        num_reg_steps: int = 0,
        num_auto_corr_rolls: int = 5,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DiffEditInversionPipelineOutput | tuple:
        """The photograph's latents at every level up to `inpaint_strength`, by DDIM backwards.

        prompt: a caption of the photograph. guidance_scale: 1, which is none, reconstructs best.
        decode_latents: the pictures of all levels too, image by image, noisiest first.
        num_reg_steps: above 0, pull each prediction towards uncorrelated unit noise as pix2pix-zero does,
            with the weights lambda_auto_corr and lambda_kl; `generator` is for this.
        A strength that leaves no step gives the clean latents alone.

        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        batch = self.prompts.check(text)[0]
        taken = steps_taken(num_inference_steps, "inpaint_strength", inpaint_strength)
        after_step = self._after_step(
            callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        check_output_type(output_type, ("pil", "np", "pt"))
        generator = check_generators(generator, batch)
        pixels = self.coder.pixels(image, batch)
        scale = adapter_scale("cross_attention_kwargs", cross_attention_kwargs)
        self.inverse_scheduler.set_timesteps(num_inference_steps)
        steps = self.inverse_scheduler.timesteps[:taken]
        self._interrupt = False

        (embeds,) = self._embed((text,), guidance_scale > 1, clip_skip, scale)
        regular = partial(
            regularize,
            self.inverse_scheduler,
            steps=num_reg_steps,
            weights=(lambda_auto_corr, lambda_kl),
            rolls=num_auto_corr_rolls,
            generator=generator,
        )
        run = Run(steps, embeds, guidance_scale, scale)
        levels = self._invert(pixels, run, generator, regular=regular, after_step=after_step)
        pictures = None
        if decode_latents:  # one by one: there are many
            pages = [self._decode(level).cpu() for level in levels.flatten(0, 1).split(1)]
            pictures = im.to_output(torch.cat(pages), output_type or "pil")
        out = DiffEditInversionPipelineOutput(levels, pictures)
        return out if return_dict else tuple(out)

    def _invert(
        self,
        pixels: Tensor,
        run: Run,
        generator: Generators,
        *,
        regular: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        after_step: AfterStep | None = None,
    ) -> Tensor:
        """Latents (B, T + 1, C, h, w) from noise to the photograph. regular: (timestep, latents, predicted
        noise) to a better one."""
        drawn = {"sampled": SAMPLED_INVERSION in self.quirks, "generator": generator}
        latents = self._encode(pixels, len(run.embeds.positive), **drawn)
        levels = [latents]
        with self._denoiser(run, "inverting") as predict:
            for i, t in enumerate(run.steps):
                if self.interrupt:
                    break
                output = predict(i, latents)
                if regular is not None:
                    output = regular(t, latents, output)
                latents = self.inverse_scheduler.step(output, t, latents)[0]
                if after_step is not None:
                    latents = after_step(i, t, latents)
                levels.append(latents)
        if LATE_BLEND in self.quirks:
            levels = levels[1:] or levels
        return torch.stack(levels[::-1], dim=1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        mask_image: Any = None,
        image_latents: Tensor | list[Tensor] | None = None,
        inpaint_strength: float | None = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        image: Picture | list[Picture] | None = None,
        composite: bool = False,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Repaint what is white in the mask as `prompt` says, and keep the rest.

        mask_image: from `generate_mask`; or PIL images of any size, or values in [0, 1] (h, w), (B, h, w) or
            (B, 1, h, w): one half and more is repainted. One mask serves all images.
        image_latents: `latents` of `invert`, made with the same num_inference_steps and inpaint_strength.
        negative_prompt: best the source caption. eta in [0, 1]: the share of fresh noise in each step.
        latents: (B, C, h, w) to start from, instead of the noisiest of image_latents.
        image: the photograph. `composite=True` pastes its pixels back outside the mask; and image_latents
            that lack the clean latents, as the reference makes them, get them from it.
        A strength that leaves no step returns what it would start from, the photograph's reconstruction.

        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        batch = self.prompts.check(text)[0]
        taken = steps_taken(num_inference_steps, "inpaint_strength", inpaint_strength)
        copies = check_copies("num_images_per_prompt", num_images_per_prompt)
        check_generators(generator, batch * copies)
        after_step = self._after_step(
            callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        pixels = None if image is None else self.coder.pixels(image, batch)
        check_picture(output_type, eta, composite, pixels)
        work = check_repaint(mask_image, image_latents, pixels, batch, taken, self.coder)
        check_start(latents, work.levels.shape[2:], batch, copies)
        scale = adapter_scale("cross_attention_kwargs", cross_attention_kwargs)
        self.scheduler.set_timesteps(num_inference_steps)
        steps = self.scheduler.timesteps[num_inference_steps - taken :]
        self._interrupt = False

        (embeds,) = self._embed((text,), guidance_scale > 1, clip_skip, scale)
        work = self._for_copies(work, taken, copies, composite)
        start = work.levels[:, 0]
        if latents is not None:
            start = latents.to(start).repeat_interleave(len(start) // len(latents), dim=0)
        run = Run(steps, embeds, guidance_scale, scale)
        x = self._repaint(work, start, run, eta=eta, generator=generator, after_step=after_step)
        out = self._finish(x, work, output_type or "pil")
        return out if return_dict else tuple(out)

    def _repaint(
        self,
        work: Repaint,
        x: Tensor,
        run: Run,
        *,
        eta: float,
        generator: Generators,
        after_step: AfterStep | None = None,
    ) -> Tensor:
        """Latents x (B, C, h, w) at the noisiest level, denoised in the mask, the photograph's outside."""
        late = LATE_BLEND in self.quirks
        with self._denoiser(run, "denoising") as predict:
            for i, t in enumerate(run.steps):
                if self.interrupt:
                    break
                output = predict(i, x)
                noise = draw(x, generator, self.unet.dtype) if eta > 0 else None
                x = self.scheduler.step(output, t, x, eta=eta, variance_noise=noise)[0]
                x = torch.where(work.mask, x, work.levels[:, i if late else i + 1])
                if after_step is not None:
                    x = after_step(i, t, x)
        return x

    def _for_copies(self, work: Repaint, taken: int, copies: int, composite: bool) -> Repaint:
        """For every copy, on the device that computes: levels that end with the clean one, the mask as bool,
        and the photograph, if its pixels are to be pasted."""
        levels, mask, pixels = work
        levels = levels.to(self.device, torch.float32)
        if levels.shape[1] == taken and LATE_BLEND not in self.quirks:
            levels = with_clean_level(levels, None if pixels is None else self._encode(pixels, len(levels)))
        photo = None
        if composite and pixels is not None:
            photo = pixels.repeat(len(levels) // len(pixels), 1, 1, 1).repeat_interleave(copies, dim=0)
        levels, mask = (x.to(self.device).repeat_interleave(copies, dim=0) for x in (levels, mask > 0))
        return Repaint(levels, mask, photo)

    def _finish(self, x: Tensor, work: Repaint, output_type: str) -> StableDiffusionPipelineOutput:
        """Latents (B, C, h, w) to the output type."""
        if output_type == "latent":
            return StableDiffusionPipelineOutput(x, None)
        pictures = self._decode(x)
        if work.pixels is not None:
            pictures = paste_back(pictures, work.pixels, work.mask)
        pictures, flagged = self._check_safety(pictures)
        return StableDiffusionPipelineOutput(im.to_output(pictures, output_type), flagged)

    @contextlib.contextmanager
    def _denoiser(self, run: Run, label: str) -> Iterator[Callable[[int, Tensor], Tensor]]:
        """A function: what the UNet predicts at run.steps[i] for x (B, C, h, w), guided if there are
        negatives. A prompt serves B / P samples in a row."""
        positive, negative = run.embeds
        prompts, guided = positive, False
        if run.guidance_scale > 1 and negative is not None and not torch.equal(negative, positive):
            prompts, guided = torch.cat((negative, positive)), True
        with (
            self.on_device(self.unet) as unet,
            self._adapters_scaled(run.adapter_scale),
            self.progress_bar(len(run.steps), label) as bar,
        ):
            context, times = unet.embed_context(prompts), unet.embed_time(run.steps)

            def predict(i: int, x: Tensor) -> Tensor:
                bar.update()
                if not guided:
                    return unet.predict(x, times[i], context)
                uncond, cond = unet.predict(x, times[i], context, branches=2).chunk(2)
                return ops.guide(cond, uncond, run.guidance_scale)

            yield predict

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Positive and negative embeddings (B, L, D), each prompt's repeated in a row; no negative ones
        without guidance.

        negative_prompt: one for all prompts, or a list with one each; "" if not given. lora_scale: strength
        of the text encoder's adapters. clip_skip: how many of its last layers are left out. Raises ValueError
        or TypeError for lists that do not match.
        """
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        self.prompts.check(text)
        copies = check_count("num_images_per_prompt", num_images_per_prompt)
        ((positive, negative),) = self._embed((text,), do_classifier_free_guidance, clip_skip, lora_scale)
        if negative is not None:
            negative = negative.repeat_interleave(copies, 0).to(device)
        return positive.repeat_interleave(copies, 0).to(device), negative

    def _embed(
        self, texts: Sequence[Text], guided: bool, clip_skip: int | None, scale: float | None
    ) -> list[Embeds]:
        skip = clip_skip or 0
        skips = (skip, 0 if PARTIAL_CLIP_SKIP in self.quirks else skip)
        idle = all(t.embeds is not None and not (guided and t.negative_embeds is None) for t in texts)
        encoder = contextlib.nullcontext() if idle else self.on_device(self.text_encoder)
        with encoder, self._adapters_scaled(scale):
            return self.prompts.read(texts, guided, skips, self.device)

    @property
    def prompts(self) -> PromptReader:
        return PromptReader(self.tokenizer, self.text_encoder)

    @property
    def textual_inversion(self) -> TextualInversion:
        """The learned words of tokenizer and text encoder."""
        return TextualInversion(self.tokenizer, self.text_encoder)

    def load_textual_inversion(self, source: Any, token: Any = None, **options: Any) -> list[str]:
        """Add words to the vocabulary; see `joyedit.text.textual_inversion.TextualInversion`."""
        return self.textual_inversion.load_textual_inversion(source, token, **options)

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        self.textual_inversion.unload_textual_inversion(tokens)

    def _adapters_scaled(self, scale: float | None) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if scale is None else self.adapters.scaled(scale)

    def _encode(self, pixels: Tensor, batch: int, **how: Any) -> Tensor:
        """Latents (B, C, h, w); see `LatentCoder.encode`."""
        with self.on_device(self.vae):
            return self.coder.encode(pixels, batch, self.device, **how)

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Latents (B, C, h, w) -> pictures (B, H, W, 3) in [0, 1]."""
        return im.to_output(self._decode(latents), "np")

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) float32, about [-1, 1]."""
        with self.on_device(self.vae):
            return self.coder.decode(latents.to(self.device))

    @property
    def coder(self) -> LatentCoder:
        return LatentCoder(self.vae)

    def _check_safety(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Pixels with flagged pictures black, and which those are."""
        if self.safety_checker is None or self.feature_extractor is None:
            return pixels, None
        inputs = self.feature_extractor(im.to_output(pixels, "pil"))["pixel_values"]
        with self.on_device(self.safety_checker) as checker:
            _, flagged = checker(inputs.to(self.device, checker.dtype), pixels)
        black = torch.tensor(flagged, device=pixels.device)[:, None, None, None]
        return pixels.masked_fill(black, -1), flagged

    def _after_step(
        self, legacy: Callable | None, every: Any, on_step_end: Callable | None, names: Sequence[str]
    ) -> AfterStep:
        """Calls the callbacks of both kinds."""
        names = self.check_callback(on_step_end, names)
        every = check_count("callback_steps", every)

        def run(i: int, t: Tensor, latents: Tensor) -> Tensor:
            latents = self.call_back(on_step_end, names, i, t, {"latents": latents})["latents"]
            if legacy is not None and i % every == 0:
                legacy(i, t, latents)
            return latents

        return run
