"""DiffEdit on Stable Diffusion 1.x and 2.x: edit a photograph by two captions, without drawing a mask.

  generate_mask   noise the photograph half way, predict the noise under the source and the target caption,
  and
                  take where the two differ, averaged over several noises
  invert          run DDIM backwards from the photograph to noise, keeping the latent of every level
  __call__        denoise from the noisiest of these under the target caption; after each step, put the kept
                  latent of the same level back outside the mask
  edit            the three in one call, with settings that agree

The levels end with the clean latent, so what lies outside the mask is the autoencoder's reconstruction of the
photograph. Captions are encoded once and their keys and values in the cross-attentions computed once; of the
mask's branches only those run that do not cancel; the photograph is encoded once for all noises.

B images   L text tokens   D width   C latent channels   h, w latent size   M noises per mask   T steps taken
Source: Couairon et al., arXiv 2210.11427; diffusers `pipeline_stable_diffusion_diffedit.py`.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from joyedit import images as im
from joyedit.clip_images import CLIPImageProcessor
from joyedit.masks import paste_back, to_latent_mask, to_mask_images, to_model_pixels
from joyedit.models.clip import CLIPTextModel, StableDiffusionSafetyChecker
from joyedit.models.sd_unet import UNet2DConditionModel
from joyedit.models.sd_vae import AutoencoderKL
from joyedit.noise import Generators, draw_noise
from joyedit.pipelines.pipeline import Pipeline, Text, as_list, check_count, check_generators
from joyedit.pipelines.regularization import predicted_noise, regularize
from joyedit.schedulers.ddim import DDIMInverseScheduler, DDIMScheduler, ddim_pair
from joyedit.textual_inversion import TextualInversion
from joyedit.tokenizers import CLIPTokenizer

log = logging.getLogger("joyedit")

# The defects of the reference that `reference_quirks` reproduces.
LATE_BLEND = "late_blend"  # the blend takes the level before the step, and the clean latent is never reached
SWAPPED_GUIDANCE = "swapped_guidance"  # masks are made with positive and negative prompt exchanged
BATCH_THRESHOLD = "batch_threshold"  # the masks of a batch share one threshold
SAMPLED_INVERSION = "sampled_inversion"  # inversion starts from a draw of the posterior, not from its mean
PARTIAL_CLIP_SKIP = "partial_clip_skip"  # clip_skip leaves the negative prompt alone

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MEAN = object()  # in a generator's place: no draw
Picture = Image.Image | np.ndarray | Tensor


class StableDiffusionPipelineOutput(NamedTuple):
    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None


class DiffEditInversionPipelineOutput(NamedTuple):
    """latents (B, T + 1, C, h, w), noisiest first, the clean latent last; images decoded from them, or
    None."""

    latents: Tensor
    images: list[Image.Image] | np.ndarray | Tensor | None


class DiffEditOutput(NamedTuple):
    """Of `edit`. mask (B, h, w) of 0 and 1; heat_map (B, h, w) in [0, 1], the difference that was
    thresholded."""

    images: list[Image.Image] | np.ndarray | Tensor
    nsfw_content_detected: list[bool] | None
    mask: np.ndarray
    heat_map: np.ndarray


class StableDiffusionDiffEditPipeline(Pipeline):
    """Edit photographs by a source and a target caption.

    Parts: `vae`, `text_encoder`, `tokenizer`, `unet`, `scheduler`, and optionally `safety_checker` with
    `feature_extractor`. `inverse_scheduler` is made from `scheduler` when there is none.
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
        unet.config.check_input_is_latents()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs a feature_extractor; pass both, or safety_checker=None")
        if scheduler.config.steps_offset != 1:  # as the reference does: the model never saw timestep 0 + 20 k
            scheduler = DDIMScheduler.from_config(scheduler.config, steps_offset=1)
        if inverse_scheduler is None:
            scheduler, inverse_scheduler = ddim_pair(scheduler.config)
        super().__init__(
            reference_quirks,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            inverse_scheduler=inverse_scheduler,
        )
        self.vae: AutoencoderKL
        self.text_encoder: CLIPTextModel
        self.tokenizer: CLIPTokenizer
        self.unet: UNet2DConditionModel
        self.scheduler: DDIMScheduler
        self.safety_checker: StableDiffusionSafetyChecker | None
        self.feature_extractor: CLIPImageProcessor | None
        self.inverse_scheduler: DDIMInverseScheduler
        self.requires_safety_checker = requires_safety_checker
        self.vae_scale_factor = vae.config.factor
        self.textual_inversion = TextualInversion(tokenizer, text_encoder)

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

        source_prompt says what is there, target_prompt what shall be. `mask_image` takes the place of the
        mask that would be made. negative_prompt: the source prompt if not given, as the guide recommends.
        invert_guidance_scale: 1 reconstructs best. The other arguments are those of the three methods.
        """
        kwargs = {"clip_skip": clip_skip, "cross_attention_kwargs": cross_attention_kwargs}
        heat = None
        if mask_image is None:
            heat = self._heat_map(
                image,
                Text(target_prompt),
                Text(source_prompt),
                num_maps_per_mask,
                mask_encode_strength,
                mask_thresholding_ratio,
                num_inference_steps,
                guidance_scale,
                generator,
                cross_attention_kwargs,
                clip_skip,
            )
            mask_image = _threshold(heat)
        levels: Tensor = self.invert(
            source_prompt,
            image,
            num_inference_steps=num_inference_steps,
            inpaint_strength=inpaint_strength,
            guidance_scale=invert_guidance_scale,
            generator=generator,
            **kwargs,
        )[0]
        height, width = levels.shape[-2:]
        mask = to_latent_mask(mask_image, (height, width), len(levels))  # (B, 1, h, w)
        out = self(
            target_prompt,
            mask,
            levels,
            inpaint_strength=inpaint_strength,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=source_prompt if negative_prompt is None else negative_prompt,
            eta=eta,
            generator=generator,
            output_type=output_type,
            image=image if composite else None,
            composite=composite,
            **kwargs,
        )
        mask = mask[:, 0].numpy().astype(np.int64)
        return DiffEditOutput(
            out[0], out[1], mask, mask.astype(np.float32) if heat is None else heat.cpu().numpy()
        )

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

        image: photographs, sides cut down to multiples of 8. num_maps_per_mask: noises to average over.
        mask_encode_strength in [0, 1]: how noisy they are. mask_thresholding_ratio: the difference is cut
        off at this multiple of its mean, and half of that is the threshold; a larger ratio gives a smaller
        mask.
        generator: one, or a list with one per image and map. Equal prompts give an empty mask, with a
        warning.

        Returns an int64 array (B, h, w) of 0 and 1, or with output_type "pil" a list of L images of 0 and
        255.
        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        if output_type not in ("np", "pil"):
            raise ValueError(f"output_type={output_type!r}: a mask is 'np' or 'pil'")
        heat = self._heat_map(
            image,
            Text(target_prompt, target_negative_prompt, target_prompt_embeds, target_negative_prompt_embeds),
            Text(source_prompt, source_negative_prompt, source_prompt_embeds, source_negative_prompt_embeds),
            num_maps_per_mask,
            mask_encode_strength,
            mask_thresholding_ratio,
            num_inference_steps,
            guidance_scale,
            generator,
            cross_attention_kwargs,
            clip_skip,
        )
        mask = _threshold(heat)
        return to_mask_images(torch.from_numpy(mask)) if output_type == "pil" else mask

    def _heat_map(
        self,
        image: Any,
        target: Text,
        source: Text,
        num_maps_per_mask: int | None,
        mask_encode_strength: float | None,
        mask_thresholding_ratio: float | None,
        num_inference_steps: int,
        guidance_scale: float,
        generator: Generators,
        cross_attention_kwargs: Mapping[str, Any] | None,
        clip_skip: int | None,
    ) -> Tensor:
        """(B, h, w) in [0, 1]: the mean difference of the two predictions over its cut-off."""
        target.check("target_")
        source.check("source_")
        steps = _taken(num_inference_steps, "mask_encode_strength", mask_encode_strength)
        maps = check_count("num_maps_per_mask", num_maps_per_mask)
        if mask_thresholding_ratio is None or not mask_thresholding_ratio > 0:
            raise ValueError(f"mask_thresholding_ratio={mask_thresholding_ratio}: must be above 0")
        batch = target.batch
        if source.batch != batch:
            raise ValueError(
                f"{batch} target prompts and {source.batch} source prompts: give as many of each"
            )
        pixels = self._pixels(image, batch)
        generator = check_generators(generator, batch * maps)
        self.scheduler.set_timesteps(num_inference_steps)
        timestep = self.scheduler.timesteps[min(num_inference_steps - steps, num_inference_steps - 1)]
        branches = _difference_branches(
            self._embed(target, guidance_scale > 1, 1, clip_skip, cross_attention_kwargs),
            self._embed(source, guidance_scale > 1, 1, clip_skip, cross_attention_kwargs),
            guidance_scale,
            SWAPPED_GUIDANCE in self.quirks,
        )

        latents = self._encode(pixels, maps, generator)  # (B * M, C, h, w)
        noise = draw_noise(latents.shape, generator, latents.device, latents.dtype)
        if not branches:
            log.warning("source and target prompts are the same: the mask is empty")
            return latents.new_zeros(batch, *latents.shape[-2:], dtype=torch.float32)
        noisy = self.scheduler.add_noise(latents, noise, timestep)
        with self.on_device(self.unet) as unet, self._adapters_scaled(cross_attention_kwargs):
            context = unet.embed_context(torch.cat([embeds for embeds, _ in branches]))
            time = unet.embed_time(timestep)
            predicted = unet.predict(noisy, time, context, branches=len(branches)).chunk(len(branches))
        weighted = [weight * eps.float() for eps, (_, weight) in zip(predicted, branches, strict=True)]
        difference = torch.stack(weighted).sum(0)
        heat = difference.abs().unflatten(0, (batch, maps)).mean(dim=(1, 2))  # (B, h, w)
        mean = heat.mean() if BATCH_THRESHOLD in self.quirks else heat.mean(dim=(1, 2), keepdim=True)
        cut = mask_thresholding_ratio * mean
        return heat.clamp(max=cut) / cut

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

        prompt: a caption of the photograph. guidance_scale 1 (no guidance) reconstructs best.
        decode_latents: the pictures of all levels too, image by image, noisiest first. num_reg_steps > 0
        pulls each prediction towards uncorrelated unit noise (weights lambda_auto_corr and lambda_kl), as
        pix2pix-zero does. A strength that leaves no step gives the clean latent alone.

        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        names = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        text.check()
        taken = _taken(num_inference_steps, "inpaint_strength", inpaint_strength)
        every = check_count("callback_steps", callback_steps)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
        pixels = self._pixels(image, text.batch)
        generator = check_generators(generator, text.batch)
        self._interrupt = False

        latents = self._encode(pixels, 1, generator if SAMPLED_INVERSION in self.quirks else MEAN)
        branches = self._embed(text, guidance_scale > 1, 1, clip_skip, cross_attention_kwargs)
        self.inverse_scheduler.set_timesteps(num_inference_steps)
        steps = self.inverse_scheduler.timesteps[:taken]
        levels = [latents]
        with (
            self.on_device(self.unet) as unet,
            self._adapters_scaled(cross_attention_kwargs),
            self.progress_bar(len(steps), "inverting") as bar,
        ):
            kv = unet.embed_context(torch.cat([e for e in reversed(branches) if e is not None]))
            times = unet.embed_time(steps) if taken else steps
            for i, t in enumerate(steps):
                if self.interrupt:
                    break
                eps = self._guided(latents, times[i], kv, guidance_scale)
                if num_reg_steps:
                    weights = (lambda_auto_corr, lambda_kl)
                    to_noise = partial(predicted_noise, self.inverse_scheduler, t, latents)
                    eps = regularize(eps, to_noise, num_reg_steps, weights, num_auto_corr_rolls, generator)
                latents = self.inverse_scheduler.step(eps, t, latents)[0]
                tensors = self.call_back(callback_on_step_end, names, i, t, {"latents": latents})
                latents = tensors["latents"]
                levels.append(latents)
                if callback is not None and i % every == 0:
                    callback(i, t, latents)
                bar.update()
        if LATE_BLEND in self.quirks and taken:
            levels = levels[1:]
        stacked = torch.stack(levels[::-1], dim=1)  # (B, T + 1, C, h, w)
        images = None
        if decode_latents:
            pages = [
                self._decode(level[None]) for level in stacked.flatten(0, 1)
            ]  # one by one: there are many
            images = im.to_output(torch.cat(pages), output_type)
        out = DiffEditInversionPipelineOutput(stacked, images)
        return out if return_dict else tuple(out)

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

        mask_image: from `generate_mask`, or a PIL image of any size, or (B or 1, h, w) values in [0, 1]; 0.5
        and
            more is repainted. image_latents: `latents` of `invert`, made with the same num_inference_steps
            and inpaint_strength. negative_prompt: best the source caption.
        latents: (B, C, h, w) to start from, instead of the noisiest of image_latents.
        image: the photograph, needed for `composite=True`, which pastes its pixels back outside the mask, and
            for image_latents without the clean latent at their end.
        A strength that leaves no step returns the reconstruction of the photograph.

        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        names = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        text.check()
        taken = _taken(num_inference_steps, "inpaint_strength", inpaint_strength)
        every = check_count("callback_steps", callback_steps)
        per_prompt = check_count(
            "num_images_per_prompt", 1 if num_images_per_prompt is None else num_images_per_prompt
        )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
        if mask_image is None or image_latents is None:
            raise ValueError(
                "mask_image (from generate_mask) and image_latents (from invert) are both needed"
            )
        if composite and image is None:
            raise ValueError("composite=True pastes the photograph's pixels back: pass it as image=")
        batch = text.batch
        generator = check_generators(generator, batch * per_prompt)
        self.scheduler.set_timesteps(num_inference_steps)
        steps = self.scheduler.timesteps[num_inference_steps - taken :]
        levels = _check_levels(
            image_latents, batch, len(steps), self.unet.config.in_channels
        )  # (B, T or T+1, C, h, w)
        height, width = levels.shape[-2:]
        mask = to_latent_mask(mask_image, (height, width), batch)  # (B, 1, h, w)
        if latents is not None and tuple(latents.shape) not in {
            (n, *levels.shape[2:]) for n in (batch, batch * per_prompt)
        }:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, wanted {(batch, *levels.shape[2:])}"
            )
        pixels = None if image is None else self._pixels(image, batch)
        self._interrupt = False
        self.guidance_scale = guidance_scale
        device, dtype = self.device, self.unet.dtype

        levels = levels.to(device, dtype)
        if levels.shape[1] == len(steps) and LATE_BLEND not in self.quirks:
            levels = self._with_clean_latent(levels, pixels)
        levels = levels.repeat_interleave(per_prompt, 0)
        mask = mask.repeat_interleave(per_prompt, 0).to(device, dtype)
        branches = self._embed(text, guidance_scale > 1, per_prompt, clip_skip, cross_attention_kwargs)
        x = levels[:, 0]
        if latents is not None:
            x = latents.to(device, dtype).repeat_interleave(len(levels) // len(latents), 0)
        late = LATE_BLEND in self.quirks
        with (
            self.on_device(self.unet) as unet,
            self._adapters_scaled(cross_attention_kwargs),
            self.progress_bar(len(steps)) as bar,
        ):
            kv = unet.embed_context(torch.cat([e for e in reversed(branches) if e is not None]))
            times = unet.embed_time(steps) if taken else steps
            for i, t in enumerate(steps):
                if self.interrupt:
                    break
                eps = self._guided(x, times[i], kv, guidance_scale)
                x = self.scheduler.step(eps, t, x, eta=eta, generator=generator)[0]
                x = torch.lerp(levels[:, i if late else i + 1], x, mask)
                x = self.call_back(callback_on_step_end, names, i, t, {"latents": x})["latents"]
                if callback is not None and i % every == 0:
                    callback(i, t, x)
                bar.update()
        images, flagged = x, None
        if output_type != "latent":
            pictures, flagged = self._check_safety(self._decode(x))
            if composite and pixels is not None:
                pictures = paste_back(pictures, pixels.repeat_interleave(per_prompt, 0), mask)
            images = im.to_output(pictures, output_type)
        out = StableDiffusionPipelineOutput(images, flagged)
        return out if return_dict else tuple(out)

    def _guided(self, x: Tensor, time: Tensor, context: Any, guidance_scale: float) -> Tensor:
        """The prediction for x (B, C, h, w), guided when there are two branches: negative first."""
        if guidance_scale <= 1:
            return self.unet.predict(x, time, context)
        negative, positive = self.unet.predict(x, time, context, branches=2).chunk(2)
        return negative + guidance_scale * (positive - negative)

    def _with_clean_latent(self, levels: Tensor, pixels: Tensor | None) -> Tensor:
        """Levels without their last one, completed from the photograph."""
        if pixels is None:
            log.warning(
                "image_latents end above the clean latent: what lies outside the mask keeps a little noise. "
                "Pass latents of `invert`, or image="
            )
            # The reference's blend: each step is given the level that it started from.
            return torch.cat((levels[:, :1], levels), dim=1)
        return torch.cat((levels, self._encode(pixels, 1, MEAN)[:, None].to(levels)), dim=1)

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
        """Positive and negative embeddings (B, L, D), each prompt repeated in a row; no negative without
        guidance.

        negative_prompt: one for all prompts, or a list with one each; "" if not given. clip_skip: layers of
        the text encoder left out at the end. lora_scale: strength of its adapters. Raises ValueError or
        TypeError for lists that do not match.
        """
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        text.check()
        kwargs = None if lora_scale is None else {"scale": lora_scale}
        positive, negative = self._embed(
            text, do_classifier_free_guidance, num_images_per_prompt, clip_skip, kwargs
        )
        return positive.to(device), None if negative is None else negative.to(device)

    def _embed(
        self,
        text: Text,
        guided: bool,
        copies: int,
        clip_skip: int | None,
        cross_attention_kwargs: Mapping[str, Any] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Positive and negative embeddings (B * copies, L, D); no negative unless guided."""
        batch = text.batch
        positive = [] if text.prompt is None else as_list(text.prompt, batch, "prompt")
        negative = (
            []
            if text.negative_embeds is not None or not guided
            else as_list(text.negative, batch, "negative_prompt")
        )
        known = self._read(positive, negative, clip_skip, cross_attention_kwargs)
        first = known[: len(positive)] if text.embeds is None else text.embeds
        second = known[len(positive) :] if text.negative_embeds is None else text.negative_embeds
        place = self.device, self.text_encoder.dtype
        first, second = (e.to(*place).repeat_interleave(copies, 0) for e in (first, second))
        return first, second if guided else None

    def _read(
        self,
        positive: list[str],
        negative: list[str],
        clip_skip: int | None,
        cross_attention_kwargs: Mapping[str, Any] | None,
    ) -> Tensor:
        """Embeddings (texts, 77, D), positive then negative; texts that are equal are encoded once."""
        skips = [clip_skip or 0] * len(positive)
        skips += [0 if PARTIAL_CLIP_SKIP in self.quirks else clip_skip or 0] * len(negative)
        wanted = list(zip(positive + negative, skips, strict=True))
        states: dict[tuple[str, int], Tensor] = {}
        with self.on_device(self.text_encoder) as encoder, self._adapters_scaled(cross_attention_kwargs):
            for skip in dict.fromkeys(skips):
                texts = list(dict.fromkeys(text for text, own in wanted if own == skip))
                found = encoder.encode(self._token_ids(texts).to(self.device), skip)
                states.update({(text, skip): row for text, row in zip(texts, found, strict=True)})
        return torch.stack([states[key] for key in wanted]) if wanted else torch.empty(0)

    def _token_ids(self, texts: list[str]) -> Tensor:
        texts = self.textual_inversion.expand(texts)
        limit = self.tokenizer.model_max_length
        for text in texts:
            ids = self.tokenizer.encode(text)
            if len(ids) > limit:
                log.warning(
                    "a prompt was cut to %d tokens; lost: %r",
                    limit,
                    self.tokenizer.decode(ids[limit - 1 : -1]),
                )
        return self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    def _adapters_scaled(self, cross_attention_kwargs: Mapping[str, Any] | None) -> Any:
        if unknown := set(cross_attention_kwargs or {}) - {"scale"}:
            raise ValueError(f"cross_attention_kwargs has {sorted(unknown)}; only 'scale' is known")
        scale = (cross_attention_kwargs or {}).get("scale")
        return contextlib.nullcontext() if scale is None else self.adapters.scaled(scale)

    def _pixels(self, image: Any, batch: int) -> Tensor:
        """(B, 3, H, W) in [-1, 1], or latents (B, 4, h, w) as they are; fewer images are repeated."""
        if image is None:
            raise ValueError("image is needed: a photograph, or a list of them")
        pixels = to_model_pixels(image, self.vae_scale_factor)
        if batch % len(pixels):
            raise ValueError(f"{len(pixels)} images for {batch} prompts: give one image, or one per prompt")
        return pixels.repeat(batch // len(pixels), 1, 1, 1)

    def _encode(self, pixels: Tensor, copies: int, generator: Any) -> Tensor:
        """Scaled latents (B * copies, C, h, w), each image's copies in a row; every copy is a draw of its own
        unless `generator` is MEAN."""
        if pixels.shape[1] == self.unet.config.in_channels:
            return pixels.to(self.device, self.vae.dtype).repeat_interleave(copies, 0)
        with self.on_device(self.vae) as vae:
            posterior = vae.encode(pixels.to(self.device, vae.dtype)).latent_dist
        mean = posterior.mean.repeat_interleave(copies, 0)
        if generator is not MEAN:
            std = posterior.std.repeat_interleave(copies, 0)
            mean = mean + std * draw_noise(mean.shape, generator, mean.device, mean.dtype)
        return mean * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Scaled latents (B, C, h, w) -> pictures (B, H, W, 3) in [0, 1]."""
        return im.to_output(self._decode(latents), "np")

    def _decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1]."""
        with self.on_device(self.vae) as vae:
            return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.clamp(-1, 1)

    def _check_safety(self, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
        """Pixels with flagged pictures blackened, and which ones were."""
        if self.safety_checker is None or self.feature_extractor is None:
            return pixels, None
        inputs = self.feature_extractor(im.to_output(pixels, "pil"))["pixel_values"]
        with self.on_device(self.safety_checker) as checker:
            shown, flagged = checker(inputs.to(self.device, checker.dtype), pixels * 0.5 + 0.5)
        return shown * 2 - 1, flagged


def _difference_branches(
    target: tuple[Tensor, Tensor | None], source: tuple[Tensor, Tensor | None], scale: float, swapped: bool
) -> list[tuple[Tensor, float]]:
    """Embeddings and weights whose weighted predictions add up to the guided target's minus the source's.

    Equal embeddings are one branch, and those whose weights cancel are none: with equal negative prompts two
    branches are left of four.
    """
    branches: list[tuple[Tensor, float]] = []
    for sign, (positive, negative) in ((1.0, target), (-1.0, source)):
        weights = (1.0, 0.0) if negative is None else (1 - scale, scale) if swapped else (scale, 1 - scale)
        for embeds, weight in zip((positive, negative), weights, strict=True):
            if embeds is None:
                continue
            same = next((i for i, (known, _) in enumerate(branches) if torch.equal(known, embeds)), None)
            if same is None:
                branches.append((embeds, sign * weight))
            else:
                branches[same] = (embeds, branches[same][1] + sign * weight)
    return [(embeds, weight) for embeds, weight in branches if weight]


def _threshold(heat: Tensor) -> np.ndarray:
    return (heat > 0.5).cpu().numpy().astype(np.int64)


def _taken(steps: Any, name: str, strength: Any) -> int:
    """How many of `steps` a strength in [0, 1] takes. Raises ValueError for others."""
    check_count("num_inference_steps", steps)
    if strength is None or not 0 <= strength <= 1:
        raise ValueError(f"{name}={strength!r}: must be in [0, 1]")
    return min(int(steps * strength), steps)


def _check_levels(levels: Any, batch: int, steps: int, channels: int) -> Tensor:
    """image_latents as (B, T or T + 1, C, h, w). Raises ValueError saying which settings would fit."""
    if isinstance(levels, (list, tuple)):
        levels = torch.cat(list(levels))
    if not isinstance(levels, Tensor):
        raise TypeError(f"image_latents is a {type(levels).__name__}: pass `latents` of invert")
    if levels.ndim == 4 and len(levels) % batch == 0:
        levels = levels.unflatten(0, (batch, -1))
    if levels.ndim != 5 or levels.shape[2] != channels:
        raise ValueError(
            f"image_latents have shape {tuple(levels.shape)}, wanted (B, levels, {channels}, h, w)"
        )
    if len(levels) != batch:
        raise ValueError(f"image_latents are of {len(levels)} images, but there are {batch} prompts")
    if levels.shape[1] not in (steps, steps + 1):
        raise ValueError(
            f"image_latents have {levels.shape[1]} levels, but these settings take {steps} steps: call with the "
            "num_inference_steps and inpaint_strength that `invert` was called with"
        )
    return levels
