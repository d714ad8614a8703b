"""ChronoEdit: a photograph and an instruction in, a short film that ends with the edited photograph out.

Photograph and edited picture are the first and last frame of a film of five. The WAN VAE encodes the
photograph as the first frame, CLIP reads it, UMT5 reads the instruction, and the transformer denoises two
latent frames under classifier-free guidance. With temporal reasoning the film is longer (29 frames, as the
model was trained): the steps before `num_temporal_reasoning_steps` denoise the way from photograph to edit
too, which keeps the edit plausible; then the frames between are dropped from latents, condition and solver.
If they are kept to the end, the film shows them.

What does not change during a run is computed once: time modulation of all steps, keys and values of prompts
and photograph in every block (those of the photograph serve both branches of the guidance), one rotary table
for each number of frames. Texts are read without their padding, each once; a photograph is encoded once for
all films made of it. Between steps, guidance and latents are fp32, whatever the networks are.

B films   L prompt tokens   M tokens of the photograph   D width   C latent channels   F frames
T = 1 + (F - 1) / 4 latent frames   h, w latent size (pixels / 8)
Source: diffusers `pipeline_chronoedit.py`; nv-tlabs/ChronoEdit; arXiv 2510.04290.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from joyedit import ops
from joyedit.media import images as im
from joyedit.media.clip_images import CLIPImageProcessor
from joyedit.media.geometry import Geometry, stretched
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel, Context
from joyedit.models.clip import CLIPVisionModel, CLIPVisionModelWithProjection
from joyedit.models.umt5 import UMT5EncoderModel
from joyedit.models.wan_vae import AutoencoderKLWan
from joyedit.noise import Generators, draw_noise
from joyedit.pipelines.checks import (
    Text,
    adapter_scale,
    as_list,
    as_number,
    check_copies,
    check_count,
    check_generators,
    check_output_type,
    check_prompts,
    check_tensor,
    is_integer,
)
from joyedit.pipelines.chronoedit_adapters import PipelineWithPresets
from joyedit.pipelines.chronoedit_frames import ENDS, FrameCoder, for_all
from joyedit.pipelines.chronoedit_presets import Solver, preset_called
from joyedit.pipelines.chronoedit_request import (
    Photographs,
    Request,
    batch_of,
    check_embedded,
    check_size,
    text_of_each,
    warn_if_short,
    warn_if_stretched,
    working_area,
)
from joyedit.pipelines.defaults import Unsaid, unsaid
from joyedit.pipelines.pipeline import DENOISED
from joyedit.pipelines.places import Asked, Known, Places
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.unipc import UniPCMultistepScheduler
from joyedit.step_cache import StepCache, as_argument
from joyedit.text.t5_tokenizer import T5TokenizerFast, clean_prompt

log = logging.getLogger("joyedit")

# The defect of the reference that `reference_quirks` reproduces: of a photograph given as a float tensor CLIP
# sees next to nothing, since it is divided by 255 again; and it is resized without a filter.
TENSOR_IMAGES = "tensor_images"

EDIT_FRAMES, REASONING_FRAMES = 5, 29
DEFAULT_FRAMES, DEFAULT_STEPS, DEFAULT_GUIDANCE = 81, unsaid(50), unsaid(5.0)  # the reference's

Picture = Image.Image | np.ndarray | Tensor
Films = list[list[Image.Image]] | np.ndarray | Tensor


class Results(NamedTuple):
    """What a call returns as a tuple."""

    frames: Films


class ChronoEditPipelineOutput(Results):
    """Films: (B, F, H, W, 3) for "np", (B, F, 3, H, W) for "pt", a list of lists for "pil", latents
    (B, C, T, h, w) for "latent". The edited picture is the last frame, `frames[0][-1]`.

    `geometry`, which is no part of the tuple: how the first photograph was worked at, and the size of the
    result; None where there was no photograph."""

    geometry: Geometry | None = None


class ChronoEditPipeline(PipelineWithPresets):
    """Edit photographs by instruction.

    Parts: `tokenizer`, `text_encoder`, `image_encoder`, `image_processor`, `transformer`, `vae`, `scheduler`.
    `preset`: the name of the preset that calls run with when they name none; see `use_preset`. Raises
    ValueError for parts that do not fit each other.
    """

    parts = {
        "tokenizer": (T5TokenizerFast,),
        "text_encoder": (UMT5EncoderModel,),
        "image_encoder": (CLIPVisionModel, CLIPVisionModelWithProjection),
        "image_processor": (CLIPImageProcessor,),
        "transformer": (ChronoEditTransformer3DModel,),
        "vae": (AutoencoderKLWan,),
        "scheduler": (UniPCMultistepScheduler, FlowMatchEulerDiscreteScheduler),
    }
    relatives = frozenset({"WanImageToVideoPipeline"})
    # As in the published recipe: both run once, and what they give is all that is seen of the photograph.
    auto_dtypes = {"vae": torch.float32, "image_encoder": torch.float32}
    callback_tensors = frozenset({"latents", "prompt_embeds", "negative_prompt_embeds", DENOISED})
    quirk_names = frozenset({TENSOR_IMAGES})

    def __init__(
        self,
        tokenizer: T5TokenizerFast,
        text_encoder: UMT5EncoderModel,
        image_encoder: CLIPVisionModel | CLIPVisionModelWithProjection,
        image_processor: CLIPImageProcessor,
        transformer: ChronoEditTransformer3DModel,
        vae: AutoencoderKLWan,
        scheduler: Solver,
        reference_quirks: bool | Sequence[str] = False,
    ):
        super().__init__(reference_quirks)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        self.image_processor = image_processor
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.vae_scale_factor_spatial = 8 if vae is None else vae.config.scale_factor_spatial
        self.vae_scale_factor_temporal = 4 if vae is None else vae.config.scale_factor_temporal
        self._warned_of_short = False
        self._attention_kwargs: Mapping[str, Any] | None = None
        self.check_configs({name: network.config for name, network in self.networks.items()})

    @classmethod
    def check_configs(cls, configs: Mapping[str, Any]) -> None:
        """Raises ValueError for networks whose widths do not fit."""
        config, vae = configs.get("transformer"), configs.get("vae")
        if config is None:
            return
        wanted = {}
        if "text_encoder" in configs:
            wanted["text_dim"] = configs["text_encoder"].d_model
        if "image_encoder" in configs:
            wanted["image_dim"] = configs["image_encoder"].hidden_size
        if vae is not None:
            wanted["in_channels"] = 2 * vae.z_dim + vae.scale_factor_temporal
        for name, value in wanted.items():
            if config[name] != value:
                raise ValueError(f"transformer has {name}={config[name]}, but the other parts make {value}")
        if vae is None:
            return
        if (config.out_channels or config.in_channels) != vae.z_dim or vae.scale_factor_temporal != 4:
            raise ValueError(
                "transformer and vae do not fit: ChronoEdit has equal channels and 4 frames a latent"
            )

    @property
    def size_multiple(self) -> int:
        """What both sides of a film must be multiples of: the pixels of one token."""
        return self.vae_scale_factor_spatial * self.transformer.config.patch_size[1]

    @property
    def attention_kwargs(self) -> Mapping[str, Any] | None:
        """That of the running call, or of the last one, to look at: it has had its effect."""
        return self._attention_kwargs

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | list[Picture] | None = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = unsaid(480),
        width: int = unsaid(832),
        num_frames: int = DEFAULT_FRAMES,
        num_inference_steps: int = DEFAULT_STEPS,
        guidance_scale: float = DEFAULT_GUIDANCE,
        num_videos_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        enable_temporal_reasoning: bool = False,
        num_temporal_reasoning_steps: int = 0,
        only_last_frame: bool = False,
        preset: str | None = None,
        mask: Any = None,
        size: str | tuple[int, int] | None = None,
        match_colors: bool = False,
        step_cache: float | None = None,
    ) -> ChronoEditPipelineOutput | tuple:
        """Edit `image` as `prompt` says.

        image: one photograph, or a list with one per prompt (PIL, uint8 or [0, 1] arrays and tensors); one
            prompt serves several photographs, too. It is stretched to height x width, multiples of 16:
            `joyedit.images.size_of_area` finds the size that fits it. Without one, where only image_embeds
            are given, no pixel is known.
        enable_temporal_reasoning: denoise num_frames (1 + 4k; 29 as trained) instead of 5, for the first
            num_temporal_reasoning_steps (0 to num_inference_steps) steps. If that is all of them, num_frames
            come out, else 5.
        guidance_scale: 1 or less turns guidance off. generator: one for the whole batch, or a list with one
            per film.
        latents: starting noise (B, C, T, h, w). prompt_embeds, negative_prompt_embeds (B, L, D) replace the
            texts, image_embeds (1 or B, M, D) what CLIP sees.
        output_type: "np", "pt", "pil" or "latent"; see `ChronoEditPipelineOutput`. only_last_frame: films of
            one frame, the edited picture, and no more work than that needs; latents come whole.
        attention_kwargs: {"scale": s} multiplies adapters that are not fused.
        max_sequence_length: tokens that a prompt is cut or padded to. The padding is attended to.
        preset: a name of `PRESETS`: its shift, and its steps, guidance and words unless the call says them.
        num_inference_steps, guidance_scale, negative_prompt: a small checkpoint may have others to be left
            at, `made_for.call`.
        callback_on_step_end(pipe, step, timestep, tensors) may return replacements; `denoised`, if it asks
            for that, is the x0 of the step, to look at.
        mask, match_colors: as in `JoyImageEditPipeline`, in every frame.
        size: "input" or (height, width) of the films, as there. Then nothing is stretched: the photograph is
            padded to a size of the preset's area, else of `made_for.basesize` squared, else of 1280 x 720.
        step_cache: as in `JoyImageEditPipeline`. Where frames are dropped, the next step is computed.

        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        self = self.for_one_call()  # others may run at the same time
        self.require("transformer", "vae")  # the latter says what is known of a film, even if that is nothing
        names = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        if negative_prompt_embeds is None:
            negative_prompt = self.unless_said(negative_prompt=negative_prompt)["negative_prompt"]
        if (name := self.preset if preset is None else preset) is not None and prompt_embeds is None:
            prompt = preset_called(name).worded(prompt)
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        text.check()
        check_embedded(text, image_embeds, self.transformer.config)
        recipe = self._recipe(preset, num_inference_steps, guidance_scale)
        self.begin_together(recipe.guidance_scale)
        threshold = self.check_step_cache(step_cache)
        max_sequence_length = check_count("max_sequence_length", max_sequence_length)
        check_output_type(output_type)
        scale = self._scale(attention_kwargs)
        cut = check_cut(num_temporal_reasoning_steps, recipe.steps if enable_temporal_reasoning else None)
        frames = self._frames(num_frames, enable_temporal_reasoning, cut)
        sides = [None if isinstance(side, Unsaid) else side for side in (height, width)]
        asked = Asked.of(mask, size, match_colors, output_type, image, sides)
        area = working_area(self.made_for, name)
        request = self._request(
            *(image, image_embeds, text, num_videos_per_prompt, height, width, frames, generator, latents),
            *(asked, area),
        )

        if text.prompt is not None and not (self.made_for.to_dict() or self._warned_of_short):
            self._warned_of_short = warn_if_short(text.prompt)
        self._guidance_scale, self._attention_kwargs = recipe.guidance_scale, attention_kwargs
        self._require_parts(request)
        self.scheduler = recipe.scheduler  # where callbacks look for it
        self.scheduler.set_timesteps(recipe.steps, device=self.device)

        positive, negative = self._read(request, max_sequence_length)
        seen = self._see(request)
        latents, condition = self._start(request, latents)
        known = request.places.known(self._still(request), latents)
        with self.adapters_scaled(scale):
            latents = self._denoise(
                latents,
                condition,
                positive,
                negative,
                seen,
                cut=cut if enable_temporal_reasoning else None,
                known=known,
                step_cache=threshold,
                callback=callback_on_step_end,
                names=names,
            )
        result = self._decode(latents, output_type, only_last_frame, request.places)
        if not return_dict:
            return (result,)
        output = ChronoEditPipelineOutput(result)
        output.geometry = request.places.geometry if request.photos else None
        return output

    def _request(
        self,
        image: Picture | list[Picture] | None,
        image_embeds: Tensor | None,
        text: Text,
        copies: int | None,
        height: int,
        width: int,
        frames: int,
        generator: Generators,
        latents: Tensor | None,
        asked: Asked,
        area: int,
    ) -> Request:
        """What a call is to make, and from what. Raises ValueError or TypeError for what does not fit."""
        if image is None and image_embeds is None:
            raise ValueError("image is needed: a photograph, or a list of them")
        copies = check_copies("num_videos_per_prompt", copies)
        pictures = [] if image is None else im.to_pil_list(image, "image")
        if asked.size is not None:
            shape = asked.shape((pictures[0].height, pictures[0].width) if pictures else (1, 1))
            height, width = im.size_of_area(*shape, area, self.size_multiple)
        check_size(height, width, self.size_multiple, self.transformer.config.rope_max_seq_len)
        height, width = int(height), int(width)
        batch = batch_of(text, pictures, image_embeds)
        text = text_of_each(text, batch)
        generator = check_generators(generator, batch * copies)
        if latents is not None:
            shape = self.latent_shape(batch * copies, height, width, frames)
            check_tensor("latents", latents, shape, "B, C, T, h, w")
        bucket, raw = (height, width), image if self._is_raw(image) else None
        originals = pictures * (batch // len(pictures)) if pictures else None
        places = Places.of(asked, originals, batch, bucket, stretched, cell=self.vae_scale_factor_spatial)
        if asked.size is not None:
            pictures, raw = asked.padded(pictures, bucket, Image.Resampling.LANCZOS), None
        warn_if_stretched(pictures, height, width, self.size_multiple)
        photos = Photographs.of(pictures, raw) if pictures else None
        return Request(text, photos, image_embeds, batch, copies, height, width, frames, generator, places)

    def _require_parts(self, request: Request) -> None:
        """Raises ValueError for an encoder that a call needs and the pipeline does not have."""
        unread = self.do_classifier_free_guidance and request.text.negative_embeds is None
        if request.text.embeds is None or unread:
            self.require("text_encoder", "tokenizer")
        if request.image_embeds is None:
            self.require("image_encoder", "image_processor")

    def _read(self, request: Request, max_sequence_length: int) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompts of all films, (B, L, D) both: positive and, under guidance, negative."""
        prompt, negative, embeds, negative_embeds = request.text
        guided, copies = self.do_classifier_free_guidance, request.copies
        return self.encode_prompt(
            prompt, negative, guided, copies, embeds, negative_embeds, max_sequence_length
        )

    def _see(self, request: Request) -> Tensor:
        """What CLIP sees for all films, (B, M, D)."""
        seen, photos = request.image_embeds, request.photos
        if seen is None:
            assert photos is not None
            seen = self.encode_image(photos.distinct)[photos.order]
        return for_all(seen.to(self.device), request.batch, request.copies)

    def _start(self, request: Request, latents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Starting noise, and what is known of all films from their photographs; see `prepare_latents`."""
        pixels, order = None, []
        if request.photos is not None:
            pixels = self._pixels(request.photos.distinct, request.height, request.width)
            order = request.photos.order
        return self.prepare_latents(
            request.batch,
            request.copies,
            request.height,
            request.width,
            request.frames,
            request.generator,
            latents,
            pixels,
            order,
        )

    def _still(self, request: Request) -> Tensor | None:
        """Latents (B, C, T, h, w) of films in which the photograph stays as it is; None without a mask."""
        if request.places.cells is None or request.photos is None:
            return None
        pixels = self._pixels(request.photos.distinct, request.height, request.width)
        with self.on_device(self.vae) as vae:
            still = FrameCoder(vae).still(pixels, request.frames)
        return for_all(still[request.photos.order], request.batch, request.copies)

    def _denoise(
        self,
        latents: Tensor,
        condition: Tensor,
        positive: Tensor,
        negative: Tensor | None,
        seen: Tensor,
        *,
        cut: int | None,
        known: Known | None = None,
        step_cache: float | None = None,
        callback: Callable | None = None,
        names: Sequence[str] = (),
    ) -> Tensor:
        """Latents (B, C, T, h, w) from noise to film; guided when there is a negative prompt.

        condition (B, 4 + C, T, h, w); prompts (B, L, D); seen (B, M, D). Before step `cut`, all frames
        but the first and the last are dropped. known: what is put back after every step. step_cache: the
        threshold of a `StepCache`.
        """
        steps = self.scheduler.timesteps
        self._num_timesteps, self._steps_computed = len(steps), 0
        cache = StepCache(step_cache, len(steps))
        with self.on_device(self.transformer) as transformer, self.progress_bar(len(steps)) as bar:
            modulation = transformer.embed_time(steps)  # (S, 7, D)
            image = _context(transformer.embed_image, seen)
            cond = _context(transformer.embed_text, positive)
            uncond = None if negative is None else _context(transformer.embed_text, negative)
            predict = self.graphed(transformer, transformer.predict_branches)
            rope, caches = None, [cache.branch(), cache.branch()]
            for i, timestep in enumerate(steps):
                if self.ends_at(i, latents, positive, negative):
                    break
                self._current_timestep = timestep
                if i == cut:
                    latents, condition = latents[:, :, ENDS], condition[:, :, ENDS]
                    self.scheduler.select_frames(ENDS)
                    known = known and known.frames(ENDS)
                    rope, caches = None, [cache.branch(), cache.branch()]
                x = torch.cat((latents, condition), dim=1)
                rope = rope or transformer.rope(transformer.token_grid(x), x.device)
                guided = uncond is not None and self.guidance_scale > 1  # a callback may have turned it off
                texts = [cond, uncond] if guided else [cond]
                cache.begin(i)
                own = as_argument(caches[: len(texts)])
                velocity, *others = predict(x, modulation[i], texts, image, rope, **own)
                self._steps_computed = cache.computed
                for velocity_uncond in others:
                    velocity = ops.guide(velocity, velocity_uncond, self.guidance_scale)
                asked = DENOISED in names
                denoised = self.scheduler.denoised(velocity, timestep, latents) if asked else None
                latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
                if known is not None:
                    latents = known.put_back(latents, self.scheduler.sigmas[i + 1])
                    denoised = None if denoised is None else known.put_back(denoised, 0.0)

                tensors: dict[str, Tensor | None] = {"latents": latents, "prompt_embeds": positive}
                tensors |= {"negative_prompt_embeds": negative, DENOISED: denoised}
                returned = self.call_back(callback, names, i, timestep, tensors)
                latents = returned["latents"]
                if returned["prompt_embeds"] is not positive:
                    positive, caches[0] = returned["prompt_embeds"], cache.branch()
                    cond = _context(transformer.embed_text, positive)
                if returned["negative_prompt_embeds"] is not negative:
                    negative, caches[1] = returned["negative_prompt_embeds"], cache.branch()
                    uncond = None if negative is None else _context(transformer.embed_text, negative)
                bar.update()
        self._current_timestep = None
        return latents

    def _decode(self, latents: Tensor, output_type: str, only_last: bool, places: Places) -> Films:
        """Latents (B, C, T, h, w) to the output type."""
        if output_type == "latent":
            return latents
        with self.on_device(self.vae) as vae:
            pixels = FrameCoder(vae).decode(latents, only_last)
        films, count = len(pixels), pixels.shape[2]
        result = places.output(rearrange(pixels, "b c f h w -> (b f) c h w"), output_type)
        if isinstance(result, list):
            return [result[i * count : (i + 1) * count] for i in range(films)]
        return result.reshape(films, count, *result.shape[1:])

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed prompts, and without negative_prompt_embeds the negative ones, if there is guidance.

        Both (B, L, D), each prompt repeated `num_videos_per_prompt` times in a row; zeros follow its tokens.
        What is cut off is told in a warning. Raises ValueError unless there is one of prompt, prompt_embeds.
        """
        check_prompts("prompt", prompt, "prompt_embeds", prompt_embeds)
        texts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        batch = len(texts) if prompt_embeds is None else len(prompt_embeds)
        guided = do_classifier_free_guidance and negative_prompt_embeds is None
        texts += as_list(negative_prompt, batch, "negative_prompt") if guided else []
        read = self._embed(texts, max_sequence_length) if texts else None
        if prompt_embeds is None:
            assert read is not None
            prompt_embeds, read = read[:batch], read[batch:]
        negative = read if guided else negative_prompt_embeds if do_classifier_free_guidance else None

        def finish(embeds: Tensor | None) -> Tensor | None:
            if embeds is None:
                return None
            return embeds.to(device or self.device, dtype).repeat_interleave(num_videos_per_prompt, dim=0)

        embeds = finish(prompt_embeds)
        assert embeds is not None
        return embeds, finish(negative)

    def _embed(self, texts: list[str], length: int) -> Tensor:
        """Embeddings (B, L, D) of texts cut or padded to `length` tokens; equal texts are read once."""
        self.require("text_encoder", "tokenizer")
        cleaned = [clean_prompt(text) for text in texts]
        distinct = list(dict.fromkeys(cleaned))
        for text in distinct:
            ids = self.tokenizer.encode(text)
            if len(ids) > length:
                lost = self.tokenizer.decode(ids[length - 1 : -1])
                log.warning("a prompt was cut to %d tokens; lost: %r", length, lost)
        padded = {"padding": "max_length", "max_length": length, "truncation": True}
        tokens = self.tokenizer(distinct, **padded, return_tensors="pt").to(self.device)
        with self.on_device(self.text_encoder) as encoder:
            states = encoder.encode(tokens.input_ids, tokens.attention_mask)
        return states[[distinct.index(text) for text in cleaned]]

    @torch.no_grad()
    def encode_image(self, image: Picture | Sequence[Picture], device: torch.device | None = None) -> Tensor:
        """What CLIP sees of pictures: its last hidden state but one, (B, M, D)."""
        self.require("image_encoder", "image_processor")
        pixels = self.image_processor(image)["pixel_values"].to(self.device)
        if self._is_raw(image):
            config = self.image_processor.config
            mean, std = (
                rearrange(torch.tensor(values, dtype=torch.float32, device="cpu"), "c -> c 1 1").to(pixels)
                for values in (config.image_mean, config.image_std)
            )
            pixels = ((pixels * std + mean) * config.rescale_factor - mean) / std
        with self.on_device(self.image_encoder) as encoder:
            return encoder.hidden_states(pixels, layer=-2).to(device or self.device)

    def _pixels(self, photos: list[Image.Image] | Tensor, height: int, width: int) -> Tensor:
        """Photographs as the autoencoder takes them, (P, 3, 1, height, width) in [-1, 1]."""
        if isinstance(photos, Tensor):
            pictures = photos.to(self.device, torch.float32).reshape(-1, *photos.shape[-3:])
            return 2 * F.interpolate(pictures, (height, width))[:, :, None] - 1
        resized = [photo.resize((width, height), Image.Resampling.LANCZOS) for photo in photos]
        return im.to_latent_input(resized, device=self.device)

    def _is_raw(self, image: Any) -> TypeGuard[Tensor]:
        return TENSOR_IMAGES in self.quirks and isinstance(image, Tensor) and image.is_floating_point()

    def prepare_latents(
        self,
        batch: int,
        copies: int,
        height: int,
        width: int,
        frames: int,
        generator: Generators = None,
        latents: Tensor | None = None,
        pixels: Tensor | None = None,
        order: Sequence[int] = (0,),
    ) -> tuple[Tensor, Tensor]:
        """Starting noise (B, C, T, h, w) and what is known of the films (B, 4 + C, T, h, w), both fp32.

        pixels (P, 3, 1, H, W) in [-1, 1]: distinct photographs; `order`: that of each prompt, or of all.
        """
        shape = self.latent_shape(batch * copies, height, width, frames)
        if latents is None:
            latents = draw_noise(shape, generator, self.device)
        latents = latents.to(self.device, torch.float32)
        known = pixels is not None
        if pixels is None:
            pixels = torch.zeros(1, 3, 1, height, width, dtype=torch.float32, device=self.device)
        with self.on_device(self.vae) as vae:
            condition = FrameCoder(vae).condition(pixels, frames, known)
        return latents, for_all(condition[list(order) or [0]], batch, copies)

    def latent_shape(self, batch: int, height: int, width: int, frames: int) -> tuple[int, ...]:
        """(B, C, T, h, w) of a film."""
        spatial, temporal = self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        rest = (1 + (frames - 1) // temporal, height // spatial, width // spatial)
        return (batch, self.vae.config.z_dim, *rest)

    def _frames(self, frames: int, reasoning: bool, cut: int) -> int:
        """How many frames a run denoises. Says what else than asked for is done; raises ValueError."""
        frames = check_count("num_frames", frames)
        if not reasoning:
            if frames not in (EDIT_FRAMES, DEFAULT_FRAMES) or cut:
                asked = f"num_frames={frames} and num_temporal_reasoning_steps={cut}"
                log.warning("%s need enable_temporal_reasoning=True: %d frames are made", asked, EDIT_FRAMES)
            return EDIT_FRAMES
        temporal = self.vae_scale_factor_temporal
        rounded = frames // temporal * temporal + 1 if frames % temporal != 1 else frames
        if rounded != frames:
            log.warning("num_frames=%d is not 1 + %dk, and became %d", frames, temporal, rounded)
        if rounded != REASONING_FRAMES:
            log.warning("the model was trained with num_frames=%d, not %d", REASONING_FRAMES, rounded)
        if rounded > 1 + (self.transformer.config.rope_max_seq_len - 1) * temporal:
            raise ValueError(f"num_frames={rounded}: too many")
        return rounded

    def _scale(self, attention_kwargs: Mapping[str, Any] | None) -> float | None:
        """See `adapter_scale`. Says so when there is nothing to multiply."""
        scale = adapter_scale("attention_kwargs", attention_kwargs)
        if scale is not None and not set(self.get_active_adapters()) - self.adapters.fused_loras:
            log.warning("attention_kwargs: scale=%g has no effect, no adapter is loaded and not fused", scale)
        return scale


def check_cut(cut: Any, steps: int | None) -> int:
    """After how many of `steps` a run drops the frames between; None: of a run that does not reason. Raises
    ValueError for others than there are."""
    number = as_number(cut)
    if steps is not None and not (is_integer(number) and 0 <= number <= steps):
        raise ValueError(f"num_temporal_reasoning_steps={cut!r}: must be 0 to {steps}, the steps")
    return number


def _context(embed: Callable[[Tensor], Context], embeds: Tensor) -> Context:
    """Keys and values of each film's prompt or photograph (B, tokens, D); of one for all, if they are the
    same."""
    same = torch.equal(embeds, embeds[:1].expand_as(embeds))
    return embed(embeds[:1] if same else embeds)
