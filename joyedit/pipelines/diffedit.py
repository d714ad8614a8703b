"""DiffEdit on Stable Diffusion 1.x and 2.x: edit a photograph by two captions, without drawing a mask.

  generate_mask  noises the photograph half way, predicts that noise under the source and under the target
                 caption, and takes where the two differ, averaged over several noises.
  invert         runs DDIM backwards from the photograph to noise, and keeps the latents of every level.
  __call__       denoises from the noisiest level under the target caption; after each step, the latents of
                 the level that it reached are put back outside the mask.
  edit           calls these three, with settings that agree.

The levels end with the clean latents, so what lies outside the mask is the autoencoder's reconstruction of
the photograph. A caption's keys and values are computed once per call, and the photograph is encoded once for
all noises; of the predictions that make a mask, those that cancel are left out. Between steps latents are
fp32, whatever the networks are.

B images   L text tokens   D width   C latent channels   h, w latent size   M noises per mask   T steps taken
Source: Couairon et al., arXiv 2210.11427; diffusers `pipeline_stable_diffusion_diffedit.py`.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.options import LoadOptions
from joyedit.media import images as im
from joyedit.media.clip_images import CLIPImageProcessor
from joyedit.media.masks import LATENT_CHANNELS, to_latent_mask, to_mask_images
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
    check_number,
    check_output_type,
    check_share,
)
from joyedit.pipelines.contrast import compare, heat_map, same_rows
from joyedit.pipelines.defaults import Unsaid, unsaid
from joyedit.pipelines.diffedit_request import (
    MaskRun,
    Repaint,
    Run,
    check_mask_run,
    check_picture,
    check_repaint,
    check_start,
    steps_taken,
)
from joyedit.pipelines.diffedit_results import (
    DiffEditInversionPipelineOutput,
    DiffEditOutput,
    StableDiffusionPipelineOutput,
    finished,
)
from joyedit.pipelines.diffedit_steps import AfterStep, after_step, denoiser
from joyedit.pipelines.made_for import words_of
from joyedit.pipelines.pipeline import DENOISED, Pipeline
from joyedit.pipelines.pipeline_spellings import ImageProcessor
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
    callback_tensors = frozenset({"latents", DENOISED})
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
        requires_safety_checker: bool = unsaid(True),
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
        if unet is not None:
            unet.config.check_input_is_latents()
        if unet is not None and text_encoder is not None:
            if (width := text_encoder.config.hidden_size) != (wanted := unet.config.context_dim):
                raise ValueError(
                    f"text_encoder is {width} wide, but unet reads prompts that are {wanted} wide"
                )
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker needs a feature_extractor; pass both, or safety_checker=None")
        if isinstance(requires_safety_checker, Unsaid):
            requires_safety_checker = self.came_with_denoiser("requires_safety_checker") is not False
        if safety_checker is None and requires_safety_checker:
            log.warning("this checkpoint is meant to run with its safety_checker, and there is none")
        if scheduler.config.steps_offset != 1:  # an old file: the model was never asked about timestep 0
            self.scheduler = type(scheduler).from_config(scheduler.config, steps_offset=1)
        ours, theirs = self.scheduler.config, inverse_scheduler.config if inverse_scheduler else {}
        fits = all(theirs.get(key) == ours[key] for key in TIMESTEP_SETTINGS)
        if not fits or ours.timestep_spacing == "linspace":
            self.scheduler, self.inverse_scheduler = ddim_pair(ours, type(scheduler))
        self.requires_safety_checker = requires_safety_checker
        self.vae_scale_factor = 8 if vae is None else vae.config.factor

    @property
    def image_processor(self) -> ImageProcessor:
        return ImageProcessor(self.vae_scale_factor)

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
        num_inference_steps: int = unsaid(50),
        inpaint_strength: float = unsaid(0.8),
        guidance_scale: float = unsaid(7.5),
        invert_guidance_scale: float = unsaid(1.0),
        negative_prompt: str | list[str] | None = None,
        num_maps_per_mask: int = unsaid(10),
        mask_encode_strength: float = unsaid(0.5),
        mask_thresholding_ratio: float = unsaid(3.0),
        eta: float = 0.0,
        generator: Generators = None,
        output_type: str = "pil",
        composite: bool = unsaid(False),
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        step_cache: float | None = None,
    ) -> DiffEditOutput:
        """Mask, inversion and denoising in one call: `generate_mask`, `invert` and `__call__`, which a
        subclass may have of its own. All prompts are read at once, and reach these as embeddings.

        source_prompt says what is there, target_prompt what shall be. mask_image: takes the place of the mask
            that would be made. negative_prompt: the source prompt if not given.
        invert_guidance_scale: 1, which is none, reconstructs best.
        generator: one, or a list with one per image. callback_on_step_end: of the denoising, as `__call__`
            has it. step_cache: of inversion and denoising, whose `steps_computed` are added up.
        What is not passed is, of a small checkpoint, as `made_for.call` says.
        The other arguments are those of the three methods, and so are the errors.
        """
        self = self.for_one_call()  # others may run at the same time
        names = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        run = self.unless_said(num_inference_steps=num_inference_steps, inpaint_strength=inpaint_strength)
        guidance = self.unless_said(
            guidance_scale=guidance_scale, invert_guidance_scale=invert_guidance_scale
        )
        mask_settings = self.unless_said(
            num_maps_per_mask=num_maps_per_mask,
            mask_encode_strength=mask_encode_strength,
            mask_thresholding_ratio=mask_thresholding_ratio,
        )
        said = self.unless_said(negative_prompt=negative_prompt, composite=composite)
        negatives = source_prompt if said["negative_prompt"] is None else said["negative_prompt"]
        target, source = Text(target_prompt, negatives), Text(source_prompt)
        batch = self.prompts.check_pair(target, source)
        check_generators(generator, batch)
        pixels = self.coder.pixels(image, batch)
        check_picture(output_type, said["composite"], pixels)
        self._require_parts(pixels, output_type != "latent")
        scale = adapter_scale("cross_attention_kwargs", cross_attention_kwargs)
        for name, value in guidance.items():
            check_number(name, value)
        threshold = self.check_step_cache(step_cache)
        check_share("eta", eta)
        check_mask_run(run["num_inference_steps"], **mask_settings)
        count, taken = steps_taken(**run)
        run |= {} if threshold is None else {"step_cache": threshold}
        size = self.coder.size(pixels)
        mask = None if mask_image is None else to_latent_mask(mask_image, size, batch)  # (B, 1, h, w)
        self.scheduler.set_timesteps(count)  # refuses a number that is too large

        wanted, known = self._embed((target, source), True, clip_skip, scale)
        shared = {"generator": generator, "cross_attention_kwargs": cross_attention_kwargs}
        heat = None
        if mask is None:
            heat = self.generate_mask(
                image,
                target_prompt_embeds=wanted.positive,
                target_negative_prompt_embeds=known.negative,
                source_prompt_embeds=known.positive,
                source_negative_prompt_embeds=known.negative,
                num_inference_steps=count,
                guidance_scale=guidance["guidance_scale"],
                output_type="heat",
                **mask_settings,
                **shared,
            )
            assert isinstance(heat, np.ndarray)
            mask = to_latent_mask(heat > 0.5, size, batch)
        levels = self.invert(
            image=image,
            prompt_embeds=known.positive,
            negative_prompt_embeds=known.negative,
            guidance_scale=guidance["invert_guidance_scale"],
            **run,
            **shared,
        )[0]
        if self.interrupt:  # then the inversion is short: its noisiest level stands for those above it
            above = levels[:, :1].expand(-1, max(taken + 1 - levels.shape[1], 0), -1, -1, -1)
            levels = torch.cat((above, levels), dim=1)
        computed = self.steps_computed
        images, flagged = self(
            mask_image=mask,
            image_latents=levels,
            image=pixels if said["composite"] else None,
            prompt_embeds=wanted.positive,
            negative_prompt_embeds=wanted.negative,
            guidance_scale=guidance["guidance_scale"],
            eta=eta,
            output_type=output_type,
            composite=said["composite"],
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=names,
            **run,
            **shared,
        )
        self._steps_computed += computed
        return DiffEditOutput(images, flagged, mask[:, 0].long().numpy(), heat)

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
        num_maps_per_mask: int | None = unsaid(10),
        mask_encode_strength: float | None = unsaid(0.5),
        mask_thresholding_ratio: float | None = unsaid(3.0),
        num_inference_steps: int = unsaid(50),
        guidance_scale: float = unsaid(7.5),
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
        self = self.for_one_call()  # others may run at the same time
        mask_settings = self.unless_said(
            num_maps_per_mask=num_maps_per_mask,
            mask_encode_strength=mask_encode_strength,
            mask_thresholding_ratio=mask_thresholding_ratio,
        )
        said = self.unless_said(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        target = Text(
            target_prompt, target_negative_prompt, target_prompt_embeds, target_negative_prompt_embeds
        )
        source = Text(
            source_prompt, source_negative_prompt, source_prompt_embeds, source_negative_prompt_embeds
        )
        batch = self.prompts.check_pair(target, source)
        scale = adapter_scale("cross_attention_kwargs", cross_attention_kwargs)
        steps = check_count("num_inference_steps", said["num_inference_steps"])
        guidance = check_number("guidance_scale", said["guidance_scale"])
        contrast = MaskRun(*check_mask_run(steps, **mask_settings), guidance, scale)
        check_output_type(output_type, ("np", "pil", "heat"))
        one_each = isinstance(generator, Sequence) and len(generator) == batch
        check_generators(generator, batch if one_each else batch * contrast.maps)
        pixels = self.coder.pixels(image, batch)
        self._require_parts(pixels)
        self.scheduler.set_timesteps(steps)

        wanted, known = self._embed((target, source), guidance > 1, clip_skip, scale)
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
            noise = draw(latents, generator, (self.vae or self.unet).dtype)
            noisy = self.scheduler.add_noise(latents, noise, timestep)
            with self.on_device(self.unet) as unet, self.adapters_scaled(run.adapter_scale):
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
        num_inference_steps: int = unsaid(50),
        inpaint_strength: float = unsaid(0.8),
        guidance_scale: float = unsaid(7.5),
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
        step_cache: float | None = None,
    ) -> DiffEditInversionPipelineOutput | tuple:
        """The photograph's latents at every level up to `inpaint_strength`, by DDIM backwards.

        prompt: a caption of the photograph. guidance_scale: 1, which is none, reconstructs best.
        decode_latents: the pictures of all levels too, image by image, noisiest first.
        num_reg_steps: above 0, pull each prediction towards uncorrelated unit noise as pix2pix-zero does,
            with the weights lambda_auto_corr and lambda_kl; `generator` is for this.
        step_cache: as `__call__` has it.
        A strength that leaves no step gives the clean latents alone.

        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        self = self.for_one_call()  # others may run at the same time
        said = self.unless_said(num_inference_steps=num_inference_steps, inpaint_strength=inpaint_strength)
        guidance = self.unless_said(invert_guidance_scale=guidance_scale)["invert_guidance_scale"]
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        batch = self.prompts.check(text)[0]
        count, taken = steps_taken(**said)
        self._guidance_scale = check_number("guidance_scale", guidance)
        named = callback_on_step_end_tensor_inputs
        call_back = after_step(self, callback, callback_steps, callback_on_step_end, named)
        regular = partial(
            regularize,
            self.inverse_scheduler,
            steps=check_count("num_reg_steps", num_reg_steps, least=0),
            weights=(
                check_number("lambda_auto_corr", lambda_auto_corr),
                check_number("lambda_kl", lambda_kl),
            ),
            rolls=check_count("num_auto_corr_rolls", num_auto_corr_rolls),
        )
        check_output_type(output_type, ("pil", "np", "pt"))
        generator = check_generators(generator, batch)
        pixels = self.coder.pixels(image, batch)
        scale = adapter_scale("cross_attention_kwargs", cross_attention_kwargs)
        self._require_parts(pixels, decode_latents)
        threshold = self.check_step_cache(step_cache)
        self.inverse_scheduler.set_timesteps(count)
        steps = self.inverse_scheduler.timesteps[:taken]

        (embeds,) = self._embed((text,), self.do_classifier_free_guidance, clip_skip, scale)
        run = Run(steps, embeds, scale, threshold)
        levels = self._invert(pixels, run, generator, partial(regular, generator=generator), call_back)
        out = DiffEditInversionPipelineOutput(levels, None)
        if decode_latents:  # one by one: there are many
            pages = [self._decode(level).cpu() for level in levels.flatten(0, 1).split(1)]
            out = out._replace(images=im.to_output(torch.cat(pages), output_type or "pil"))
        return out if return_dict else tuple(out)

    def _invert(
        self,
        pixels: Tensor,
        run: Run,
        generator: Generators,
        regular: Callable[[Tensor, Tensor, Tensor], Tensor],
        call_back: AfterStep,
    ) -> Tensor:
        """Latents (B, T + 1, C, h, w) from noise to the photograph. regular: (timestep, latents, predicted
        noise) to a better one."""
        drawn = {"sampled": SAMPLED_INVERSION in self.quirks, "generator": generator}
        latents = self._encode(pixels, len(run.embeds.positive), **drawn)
        levels = [latents]
        with denoiser(self, self.unet, run, "inverting") as predict:
            for i, t in enumerate(run.steps):
                if self.interrupt:
                    break
                output = regular(t, latents, predict(i, latents))
                latents, x0 = self.inverse_scheduler.step(output, t, latents)
                latents = call_back(i, t, latents, x0)
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
        inpaint_strength: float | None = unsaid(0.8),
        num_inference_steps: int = unsaid(50),
        guidance_scale: float = unsaid(7.5),
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
        composite: bool = unsaid(False),
        step_cache: float | None = None,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Repaint what is white in the mask as `prompt` says, and keep the rest.

        mask_image: from `generate_mask`; or PIL images of any size, or values in [0, 1] (h, w), (B, h, w) or
            (B, 1, h, w): one half and more is repainted. One mask serves all images.
        image_latents: `latents` of `invert`, made with the same num_inference_steps and inpaint_strength.
        negative_prompt: best the source caption. eta in [0, 1]: the share of fresh noise in each step.
        latents: (B, C, h, w) to start from, instead of the noisiest of image_latents.
        image: the photograph. `composite=True` pastes its pixels back outside the mask; and image_latents
            that lack the clean latents, as the reference makes them, get them from it.
        step_cache: above 0, reuse what the levels below the first gave, where that one changes by less than
            this share; see `joyedit.step_cache`. None or 0: nothing is reused.
        A strength that leaves no step returns what it would start from, the photograph's reconstruction.

        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        self = self.for_one_call()  # others may run at the same time
        said = self.unless_said(num_inference_steps=num_inference_steps, inpaint_strength=inpaint_strength)
        guidance = self.unless_said(guidance_scale=guidance_scale)["guidance_scale"]
        if negative_prompt_embeds is None:
            negative_prompt = self.unless_said(negative_prompt=negative_prompt)["negative_prompt"]
        if image is not None:
            composite = self.unless_said(composite=composite)["composite"]
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        batch = self.prompts.check(text)[0]
        count, taken = steps_taken(**said)
        self._guidance_scale = check_number("guidance_scale", guidance)
        eta = check_share("eta", eta)
        copies = check_copies("num_images_per_prompt", num_images_per_prompt)
        check_generators(generator, batch * copies)
        named = callback_on_step_end_tensor_inputs
        call_back = after_step(self, callback, callback_steps, callback_on_step_end, named)
        pixels = None if image is None else self.coder.pixels(image, batch)
        check_picture(output_type, composite, pixels)
        self._require_parts(pixels, output_type != "latent")
        work = check_repaint(mask_image, image_latents, pixels, batch, taken, self.coder)
        check_start(latents, work.levels.shape[2:], batch, copies)
        scale = adapter_scale("cross_attention_kwargs", cross_attention_kwargs)
        threshold = self.check_step_cache(step_cache)
        self.scheduler.set_timesteps(count)
        steps = self.scheduler.timesteps[count - taken :]

        (embeds,) = self._embed((text,), self.do_classifier_free_guidance, clip_skip, scale)
        work = self._for_copies(work, taken, copies, composite)
        start = work.levels[:, 0]
        if latents is not None:
            start = latents.to(start).repeat_interleave(len(start) // len(latents), dim=0)
        x = self._repaint(work, start, Run(steps, embeds, scale, threshold), eta, generator, call_back)
        out = finished(self, self._decode, x, work, output_type or "pil")
        return out if return_dict else tuple(out)

    def _repaint(
        self,
        work: Repaint,
        x: Tensor,
        run: Run,
        eta: float,
        generator: Generators,
        call_back: AfterStep,
    ) -> Tensor:
        """Latents x (B, C, h, w) at the noisiest level, denoised in the mask, the photograph's outside."""
        late = LATE_BLEND in self.quirks
        with denoiser(self, self.unet, run, "denoising") as predict:
            for i, t in enumerate(run.steps):
                if self.interrupt:
                    break
                output = predict(i, x)
                noise = draw(x, generator, self.unet.dtype) if eta > 0 else None
                x, x0 = self.scheduler.step(output, t, x, eta=eta, variance_noise=noise)
                x = torch.where(work.mask, x, work.levels[:, i if late else i + 1])
                x = call_back(i, t, x, x0, work)
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

    def _require_parts(self, pixels: Tensor | None, decodes: bool = False) -> None:
        """Raises ValueError for a network that a call needs and the pipeline does not have. pixels: of the
        photograph, or its latents. decodes: whether pictures come out."""
        self.require("unet")
        if decodes or (pixels is not None and pixels.shape[1] != LATENT_CHANNELS):
            self.require("vae")

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
        skip = 0 if clip_skip is None else check_count("clip_skip", clip_skip, least=0)
        skips = (skip, 0 if PARTIAL_CLIP_SKIP in self.quirks else skip)
        idle = all(t.embeds is not None and not (guided and t.negative_embeds is None) for t in texts)
        if not idle:
            self.require("text_encoder", "tokenizer")
        encoder = contextlib.nullcontext() if idle else self.on_device(self.text_encoder)
        with encoder, self.adapters_scaled(scale):
            return self.prompts.read(texts, guided, skips, self.device)

    @property
    def prompts(self) -> PromptReader:
        """Of prompts as wide as what the text encoder makes, or else as the UNet reads."""
        part = self.text_encoder or self.unet
        self.require(*(["text_encoder"] if part is None else []))
        width = part.config.hidden_size if part is self.text_encoder else self.unet.config.context_dim
        return PromptReader(self.tokenizer, self.text_encoder, width, part.dtype)

    def learned_words(self) -> set[str]:
        if self.tokenizer is None or self.text_encoder is None:
            return set()
        return {part for word in self.textual_inversion.words() for part in words_of(word)}

    @property
    def textual_inversion(self) -> TextualInversion:
        """The learned words of tokenizer and text encoder."""
        return TextualInversion(self.tokenizer, self.text_encoder)

    def load_textual_inversion(self, source: Any, token: Any = None, **options: Any) -> list[str]:
        """Add words to the vocabulary; see `joyedit.text.textual_inversion.TextualInversion`."""
        return self.textual_inversion.load_textual_inversion(source, token, **options)

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        self.textual_inversion.unload_textual_inversion(tokens)

    def _encode(self, pixels: Tensor, batch: int, **how: Any) -> Tensor:
        """Latents (B, C, h, w); see `LatentCoder.encode`."""
        with contextlib.nullcontext() if self.vae is None else self.on_device(self.vae):
            return self.coder.encode(pixels, batch, self.device, **how)

    def decode_latents(self, latents: Tensor) -> np.ndarray:
        """Latents (B, C, h, w) -> pictures (B, H, W, 3) in [0, 1]."""
        return im.to_output(self._decode(latents), "np")

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, H, W) float32, about [-1, 1]."""
        self.require("vae")
        with self.on_device(self.vae):
            return self.coder.decode(latents.to(self.device))

    @property
    def coder(self) -> LatentCoder:
        return LatentCoder(self.vae)
