"""JoyAI-Image-Edit: an instruction and a photograph in, the edited photograph out; or text to image.

The photograph is resized and cropped to the nearest bucket. Qwen3-VL reads it together with the instruction,
the WAN VAE encodes it as a reference latent, and the MMDiT denoises the target latent beside that reference
under classifier-free guidance whose norm is brought back to the conditional prediction's.

What does not change during a run is computed once: the vision tower per picture, the prompt prefix that
positive and negative share, text embedding, time modulation for all steps, rotary tables, reference tokens.
The last block, the head, the guidance, the solver and the decoder see the target alone. Samples whose
prompts differ in length run in groups of equal length, so that nothing is padded and each gets the image it
would get alone.

B images   L prompt tokens   D width   C latent channels   h, w latent height and width (pixels / 8)
Source: diffusers `pipeline_joyimage_edit.py`; jd-opensource/JoyAI-Image.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from joyedit import ops
from joyedit.media import images as im
from joyedit.media.geometry import Geometry, covering
from joyedit.models.joyimage_mmdit import Grids, JoyImageEditTransformer3DModel, Rope
from joyedit.models.qwen3_vl import Qwen3VLForConditionalGeneration
from joyedit.models.wan_vae import AutoencoderKLWan
from joyedit.noise import Generators, draw_noise
from joyedit.pipelines import questions
from joyedit.pipelines.checks import (
    Text,
    as_list,
    as_number,
    check_copies,
    check_count,
    check_generators,
    check_number,
    check_output_type,
    check_tensor,
)
from joyedit.pipelines.defaults import unsaid
from joyedit.pipelines.joyimage_prompts import SYSTEM, USER, VISION, Prompt, PromptReader
from joyedit.pipelines.joyimage_request import (
    Request,
    check_embedded,
    check_placeholders,
    check_sides,
    each_once,
    one_per_prompt,
)
from joyedit.pipelines.pipeline import DENOISED, Pipeline
from joyedit.pipelines.pipeline_spellings import ImageProcessor
from joyedit.pipelines.places import Asked, Known, Places
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.step_cache import BranchCache, StepCache, as_argument
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer
from joyedit.text.qwen3_vl_processor import Qwen3VLProcessor

log = logging.getLogger("joyedit")

# The defects of the reference that `reference_quirks` reproduces: the VAE posterior is drawn from the global
# generator, not the given one; in a batch, shorter prompts are padded and the padding is attended to; and
# num_images_per_prompt > 1 pairs prompts with other prompts' photographs.
GLOBAL_POSTERIOR = "global_posterior"
PADDED_PROMPTS = "padded_prompts"
MISPAIRED_REFERENCES = "mispaired_references"

DEFAULT_BASE = 1024

Picture = Image.Image | np.ndarray | Tensor
Images = list[Image.Image] | np.ndarray | Tensor


class Results(NamedTuple):
    """What a call returns as a tuple."""

    images: Images


class JoyImageEditPipelineOutput(Results):
    """`images` alone can be unpacked. `geometry`: how the first photograph was worked at, and the size of the
    result; None where there was no photograph."""

    geometry: Geometry | None = None


class Group(NamedTuple):
    """Samples of a batch whose prompts are of one length, and what the transformer reads beside the noise.
    b of the B samples, L tokens of text and M of references."""

    rows: Tensor  # (b,)
    txt: Tensor  # (b, L, D)
    references: Tensor | None  # (b, M, D)
    cache: BranchCache | None = None  # of a run that reuses what blocks added


Branch = list[Group]  # all samples, under the positive prompts or under the negative ones


def in_order(groups: Sequence[Any], parts: list[Tensor]) -> Tensor:
    """What was computed group by group, each with its `rows`, in the order of the samples."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat([group.rows for group in groups]).argsort()]


class JoyImageEditPipeline(Pipeline):
    """Edit images by instruction, or make them from text.

    Parts: `scheduler`, `vae`, `text_encoder`, `tokenizer`, `transformer`, `processor`.
    `text_token_max_length` cuts the prompt of text-to-image. `buckets` are the (height, width) sizes the
    model knows, 49 around 1024 x 1024 if the checkpoint does not say otherwise; assign
    `joyedit.images.buckets(512)` to work at another base.
    """

    parts = {
        "scheduler": (FlowMatchEulerDiscreteScheduler,),
        "vae": (AutoencoderKLWan,),
        "text_encoder": (Qwen3VLForConditionalGeneration,),
        "tokenizer": (Qwen2Tokenizer,),
        "transformer": (JoyImageEditTransformer3DModel,),
        "processor": (Qwen3VLProcessor,),
    }
    callback_tensors = frozenset({"latents", "prompt_embeds", "negative_prompt_embeds", DENOISED})
    quirk_names = frozenset({GLOBAL_POSTERIOR, PADDED_PROMPTS, MISPAIRED_REFERENCES})
    prompt_template_encode = {
        "image": SYSTEM + USER + "{}<|im_end|>\n<|im_start|>assistant\n",
        "multiple_images": SYSTEM + "{}<|im_start|>assistant\n",
    }
    ask = questions.ask

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLWan,
        text_encoder: Qwen3VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        transformer: JoyImageEditTransformer3DModel,
        processor: Qwen3VLProcessor,
        text_token_max_length: int = 2048,
        buckets: Sequence[Sequence[int]] | None = None,
        reference_quirks: bool | Sequence[str] = False,
    ):
        super().__init__(reference_quirks)
        self.scheduler = scheduler
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.processor = processor
        self.text_token_max_length = text_token_max_length
        table = self.came_with_denoiser("buckets") if buckets is None else buckets
        self.buckets = [(int(h), int(w)) for h, w in table or im.buckets(DEFAULT_BASE)]
        self.vae_scale_factor_spatial = 8 if vae is None else vae.config.scale_factor_spatial
        self.vae_scale_factor_temporal = 4 if vae is None else vae.config.scale_factor_temporal
        self._announced: set[tuple[int, int]] = set()  # sizes whose bucket was said

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        return ("buckets",)

    def settings_to_save(self) -> dict[str, Any]:
        default = self.buckets == im.buckets(DEFAULT_BASE)
        return {} if default else {"buckets": [list(size) for size in self.buckets]}

    @property
    def size_multiple(self) -> int:
        """What both sides of a picture must be multiples of: the pixels of one token."""
        return self.vae_scale_factor_spatial * self.transformer.config.patch_size[-1]

    @property
    def num_dropped_tokens(self) -> int:
        """The system turn and the user's <|im_start|>, 34 tokens in the real vocabulary, are not part of an
        embedding."""
        return len(self.tokenizer.encode(SYSTEM + "<|im_start|>"))

    @property
    def image_processor(self) -> ImageProcessor:
        return ImageProcessor(self.vae_scale_factor_spatial)

    @torch.no_grad()
    def __call__(
        self,
        image: Picture | list[Picture] | None = None,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = unsaid(40),
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = unsaid(4.0),
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 4096,
        enable_denormalization: bool = True,
        mask: Any = None,
        size: str | tuple[int, int] | None = None,
        match_colors: bool = False,
        step_cache: float | None = None,
    ) -> JoyImageEditPipelineOutput | tuple:
        """Edit `image` as `prompt` says; without an image, make one from the prompt.

        image: one photograph, or a list with one per prompt (PIL, uint8 or [0, 1] arrays and tensors); the
            first one's shape chooses the bucket for all. What is transparent the text encoder sees as white,
            and the autoencoder in the colour that the file has there, as in the reference.
        height, width: both or neither, multiples of 16; the nearest bucket by aspect ratio is used.
        guidance_scale: 1 or less turns guidance off.
        num_inference_steps, guidance_scale, negative_prompt: a small checkpoint may have others to be left
            at, `made_for.call`.
        generator: one for the whole batch, or a list with one per image. It draws the noise, then the
            posterior.
        latents: starting noise (B, 1, C, 1, h, w). prompt_embeds (B, L, D) with prompt_embeds_mask (B, L)
            replace the prompt, likewise the negative ones.
        output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent"
            (B, C, h, w), normalised.
        max_sequence_length: prompt tokens kept, the last ones with an image, the first without.
        callback_on_step_end(pipe, step, timestep, tensors) may return replacements; its `latents` are the
            target's, and `denoised`, if it asks for that, is the x0 of the step, to look at.
        mask: white where the edit may change the photograph, of its size: one for all or one for each (PIL,
            or (H, W) arrays and tensors); what is less than half white keeps the photograph's pixels.
        size: "input", the photograph's own, or (height, width), which its centre is cut to the shape of; at
            least 16 pixels each, at most 4 times the bucket's or as many as the photograph's in all. Either
            way the photograph is padded to its bucket, not cut. None: the bucket's.
        match_colors: bring colours back to the photograph's, by what the edit leaves alone; with a mask, by
            what is outside, and only inside of it anything changes.
        step_cache: above 0, leave blocks out of steps in which the first block's residual has changed by less
            than this share since they were last computed (0.1 is a tenth); see `joyedit.step_cache`. None or
            0: nothing is left out. `steps_computed` counts the others.

        Raises ValueError or TypeError before any work when an argument does not fit.
        """
        self = self.for_one_call()  # others may run at the same time
        said = self.unless_said(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        num_inference_steps = check_count("num_inference_steps", said["num_inference_steps"])
        guidance_scale = check_number("guidance_scale", said["guidance_scale"])
        self.begin_together(guidance_scale)
        threshold = self.check_step_cache(step_cache)
        if negative_prompt_embeds is None:
            negative_prompt = self.unless_said(negative_prompt=negative_prompt)["negative_prompt"]
        names = self.check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_embeds_mask,
            negative_prompt_embeds_mask,
            names,
        )
        max_sequence_length = check_count("max_sequence_length", max_sequence_length)
        check_output_type(output_type)
        if timesteps is not None and sigmas is not None:
            raise ValueError("give timesteps or sigmas, not both")
        embedded = [Prompt.of(prompt_embeds, prompt_embeds_mask)]
        embedded += [Prompt.of(negative_prompt_embeds, negative_prompt_embeds_mask)] * (guidance_scale > 1)
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        sides = (as_number(height), as_number(width))
        asked = Asked.of(mask, size, match_colors, output_type, image, sides)
        request = self._request(
            image, text, embedded, sides, num_images_per_prompt, generator, latents, asked
        )
        self._require_parts(request, output_type or "pil")

        count = num_inference_steps if timesteps is None and sigmas is None else None
        self.scheduler.set_timesteps(count, device=self.device, timesteps=timesteps, sigmas=sigmas)
        self._guidance_scale = guidance_scale

        prompts = self._read(request, max_sequence_length)
        dtype = prompts[0].embeds.dtype
        target, references = self._start(request, latents, dtype, enable_denormalization)
        known = request.places.known(references, target)
        watch = {"callback": callback_on_step_end, "names": names}
        target = self._denoise(target, references, *prompts, known=known, step_cache=threshold, **watch)
        result = self._decode(target[:, 0], output_type or "pil", enable_denormalization, request.places)
        if not return_dict:
            return (result,)
        output = JoyImageEditPipelineOutput(result)
        output.geometry = request.places.geometry if request.pictures else None
        return output

    def _request(
        self,
        image: Picture | list[Picture] | None,
        text: Text,
        embedded: list[Prompt | None],
        sides: tuple[int | None, int | None],
        copies: int | None,
        generator: Generators,
        latents: Tensor | None,
        asked: Asked,
    ) -> Request:
        """What a call is to make, and from what. embedded: an entry for the positive prompts and, under
        guidance, one for the negative ones. Raises ValueError or TypeError for what does not fit."""
        copies = check_copies("num_images_per_prompt", copies)
        batch = text.batch
        texts = [as_list(text.prompt, batch, "prompt"), as_list(text.negative, batch, "negative_prompt")]
        photos = one_per_prompt(None if image is None else im.to_pil_list(image, "image", alpha=True), batch)
        check_placeholders(texts, photos)
        generator = check_generators(generator, batch * copies)
        if isinstance(asked.size, tuple):
            bucket = im.nearest_bucket(*asked.size, self.buckets)
        else:
            bucket = self.choose_size(photos, *sides)
        if min(bucket) < 1 or any(side % self.size_multiple for side in bucket):
            raise ValueError(
                f"buckets hold {bucket}: both sides must be positive multiples of {self.size_multiple}"
            )
        if latents is not None:
            check_tensor("latents", latents, self.latent_shape(batch * copies, *bucket), "B, 1, C, 1, h, w")
        if asked.size is None or photos is None:
            pictures = each_once(photos, lambda photo: im.resize_center_crop(photo, *bucket))
        else:
            pictures = asked.padded(photos, bucket, Image.Resampling.BILINEAR)
        cell = self.vae_scale_factor_spatial
        places = Places.of(asked, photos, batch, bucket, covering, pictures, cell)
        return Request(texts[: len(embedded)], embedded, pictures, bucket, copies, generator, places)

    def _require_parts(self, request: Request, output_type: str) -> None:
        """Raises ValueError for a part that a call needs and the pipeline does not have."""
        if request.unread:
            self.require("text_encoder", "tokenizer", *(["processor"] if request.pictures else []))
        if request.pictures or output_type != "latent":
            self.require("vae")

    def _read(self, request: Request, max_sequence_length: int) -> list[Prompt]:
        """The prompts of all images on the device that computes: positive and, under guidance, negative."""
        read = iter(self._embed_prompts(request.unread, request.pictures, max_sequence_length))
        prompts = [known or next(read) for known in request.embedded]
        return [prompt.repeat(request.copies).to(self.device) for prompt in prompts]

    def _start(
        self, request: Request, latents: Tensor | None, dtype: torch.dtype, enable_denormalization: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Starting noise and encoded references of all images; see `prepare_latents`."""
        return self.prepare_latents(
            request.batch,
            self.transformer.config.in_channels,
            *request.size,
            1,
            dtype,
            self.device,
            request.generator,
            latents,
            request.pictures,
            enable_denormalization,
        )

    def _denoise(
        self,
        latents: Tensor,
        references: Tensor | None,
        positive: Prompt,
        negative: Prompt | None = None,
        *,
        known: Known | None = None,
        step_cache: float | None = None,
        callback: Callable | None = None,
        names: Sequence[str] = (),
    ) -> Tensor:
        """Target latents (B, 1, C, 1, h, w) from noise to image; guided when there is a negative prompt.
        known: what is put back after every step. step_cache: the threshold of a `StepCache`."""
        steps = self.scheduler.timesteps
        self._num_timesteps, self._steps_computed = len(steps), 0
        cache = StepCache(step_cache, len(steps))
        with self.on_device(self.transformer) as transformer, self.progress_bar(len(steps)) as bar:
            tokens = None if references is None else transformer.embed_image(references)
            frames, rows, columns = transformer.token_grid(latents)
            grid = (frames if references is None else 2 * frames, rows, columns)
            rope = transformer.rope(grid, latents.device)
            modulation = transformer.embed_time(steps)  # (S, 6, D)
            cond = self._branch(positive, tokens, cache)
            uncond = None if negative is None else self._branch(negative, tokens, cache)

            for i, timestep in enumerate(steps):
                if self.ends_at(i, latents, positive.embeds, None if negative is None else negative.embeds):
                    break
                self._current_timestep = timestep
                target = transformer.embed_image(latents)  # (B, N, D)
                guided = uncond is not None and self.guidance_scale > 1  # a callback may have turned it off
                branches = [cond, uncond] if guided else [cond]
                cache.begin(i)
                velocities = self._velocities(target, branches, modulation[i], rope, grid)
                self._steps_computed = cache.computed
                denoised = self._denoised(timestep, latents, *velocities) if DENOISED in names else None
                latents = self._step(timestep, latents, *velocities)
                if known is not None:
                    latents = known.put_back(latents, self.scheduler.sigmas[i + 1])
                    denoised = None if denoised is None else known.put_back(denoised, 0.0)

                tensors: dict[str, Tensor | None] = {"latents": latents, "prompt_embeds": positive.embeds}
                tensors["negative_prompt_embeds"] = None if negative is None else negative.embeds
                tensors[DENOISED] = denoised
                returned = self.call_back(callback, names, i, timestep, tensors)
                latents = returned["latents"]
                if returned["prompt_embeds"] is not positive.embeds:
                    positive = Prompt(returned["prompt_embeds"], positive.mask)
                    cond = self._branch(positive, tokens, cache)
                if negative is not None and returned["negative_prompt_embeds"] is not negative.embeds:
                    negative = Prompt(returned["negative_prompt_embeds"], negative.mask)
                    uncond = self._branch(negative, tokens, cache)
                bar.update()
        self._current_timestep = None
        return latents

    def _step(
        self, timestep: Tensor, latents: Tensor, velocity: Tensor, uncond: Tensor | None = None
    ) -> Tensor:
        """Latents (B, 1, C, 1, h, w) at the next noise level. velocity (B, C, 1, h, w); uncond: the one
        without the prompt, if there is guidance, of which an Euler step is part."""
        if uncond is not None:
            length = self.scheduler.step_length(timestep)
            if length is not None:
                return ops.guide(velocity, uncond, self.guidance_scale, True, latents[:, 0], length)[:, None]
            velocity = ops.guide(velocity, uncond, self.guidance_scale, True)
        velocity = velocity[:, None].to(latents.dtype)
        return self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]

    def _denoised(
        self, timestep: Tensor, latents: Tensor, velocity: Tensor, uncond: Tensor | None = None
    ) -> Tensor:
        """x0 (B, 1, C, 1, h, w) that `_step`, which comes next, heads for; arguments as there."""
        if uncond is not None:
            velocity = ops.guide(velocity, uncond, self.guidance_scale, True)
        return self.scheduler.denoised(velocity[:, None], timestep, latents)

    def _velocities(
        self, target: Tensor, branches: list[Branch], vec: Tensor, rope: Rope, grid: Grids
    ) -> list[Tensor]:
        """What the transformer predicts for the target latents in each branch. target (B, N, D) -> (B, C, 1,
        h, w) each."""
        groups = [group for branch in branches for group in branch]
        targets = [target if len(group.rows) == len(target) else target[group.rows] for group in groups]
        references = [group.references for group in groups]
        texts = [group.txt for group in groups]
        caches = as_argument(group.cache for group in groups)
        predict = self.graphed(self.transformer, self.transformer.predict_branches)
        parts = iter(predict(targets, references, texts, vec, rope, grid, **caches))
        return [in_order(branch, list(islice(parts, len(branch)))) for branch in branches]

    def _branch(self, prompt: Prompt, references: Tensor | None, cache: StepCache) -> Branch:
        """All samples under `prompt`, in groups whose prompts are of one length. references (B, M, D).
        cache: of the run."""
        mask = torch.ones_like(prompt.mask) if PADDED_PROMPTS in self.quirks else prompt.mask
        lengths = mask.sum(1)
        groups = []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            kept = prompt.embeds[rows][mask[rows].bool()].unflatten(0, (len(rows), length))  # (b, L, D)
            txt = self.transformer.embed_text(kept)
            own = None if references is None else references[rows]
            groups.append(Group(rows, txt, own, cache.branch()))
        return groups

    def _decode(
        self, latents: Tensor, output_type: str, enable_denormalization: bool, places: Places | None = None
    ) -> Images:
        """Latents (B, C, 1, h, w) to the output type."""
        if output_type == "latent":
            return latents[:, :, 0].float()
        if enable_denormalization:
            latents = self.denormalize_latents(latents)
        with self.on_device(self.vae) as vae:
            pixels = vae.decode(latents, return_dict=False)[0]
        write = im.to_output if places is None else places.output
        return write(pixels[:, :, 0], output_type)

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        max_sequence_length: int = 1024,
        template_type: str = "image",
    ) -> tuple[Tensor, Tensor]:
        """Embed prompts without pictures. Returns embeds (B, L, D) and mask (B, L), each prompt repeated
        `num_images_per_prompt` times in a row; the first `max_sequence_length` tokens are kept."""
        if template_type not in self.prompt_template_encode:
            raise ValueError(
                f"template_type={template_type!r}: must be one of {sorted(self.prompt_template_encode)}"
            )
        known = Prompt.of(prompt_embeds, prompt_embeds_mask)
        if known is None:
            texts = [prompt] if isinstance(prompt, str) else prompt
            template = self.prompt_template_encode[template_type]
            with self._reader() as reader:
                known = Prompt.pad(reader.read([template.format(text) for text in texts], None))
        kept = slice(None, max_sequence_length)
        known = Prompt(known.embeds[:, kept], known.mask[:, kept])
        return known.repeat(num_images_per_prompt).to(device)

    def encode_prompt_multiple_images(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        images: Picture | list[Picture] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        template_type: str | None = "multiple_images",
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed each prompt together with its picture. Returns embeds (B, L, D) and mask (B, L), each prompt
        repeated `num_images_per_prompt` times in a row; the last `max_sequence_length` tokens are kept.

        Raises ValueError when pictures and prompts do not match, or a prompt names a picture of its own.
        """
        if template_type != "multiple_images":
            raise ValueError(f"template_type={template_type!r}: must be 'multiple_images'")
        known = Prompt.of(prompt_embeds, prompt_embeds_mask)
        if known is None:
            texts = [prompt] if isinstance(prompt, str) else prompt
            photos = None if images is None else im.to_pil_list(images, "images", alpha=True)
            pictures = one_per_prompt(photos, len(texts))
            check_placeholders([texts], pictures)
            (known,) = self._embed_prompts([texts], pictures, max_sequence_length)
        return known.repeat(num_images_per_prompt).to(device)

    def _embed_prompts(
        self, prompts: list[list[str]], pictures: list[Image.Image] | None, max_sequence_length: int | None
    ) -> list[Prompt]:
        """Each list of B prompts embedded, with the B pictures if there are any; what they share is run
        once."""
        if not prompts:  # all came embedded
            return []
        if pictures is None:
            template, kept = self.prompt_template_encode["image"], slice(None, max_sequence_length)
        else:
            template = self.prompt_template_encode["multiple_images"].format(
                f"{USER}{VISION}{{}}<|im_end|>\n"
            )
            kept = slice(-max_sequence_length if max_sequence_length else None, None)
        texts = [[template.format(text) for text in each] for each in prompts]
        if pictures is not None and PADDED_PROMPTS in self.quirks:
            with self._reader() as reader:
                padded = [reader.read_padded(each, pictures) for each in texts]
            return [Prompt(p.embeds[:, kept], p.mask[:, kept]) for p in padded]
        with self._reader() as reader:
            shown = None if pictures is None else [[picture] for picture in pictures] * len(texts)
            states = reader.read([text for each in texts for text in each], shown)
        rows = iter(state[kept] for state in states)
        return [Prompt.pad(list(islice(rows, len(each)))) for each in texts]

    @contextlib.contextmanager
    def _reader(self) -> Iterator[PromptReader]:
        self.require("text_encoder", "tokenizer")
        with self.on_device(self.text_encoder) as encoder:
            limit = self.text_token_max_length
            yield PromptReader(
                encoder, self.tokenizer, self.processor, self.device, self.num_dropped_tokens, limit
            )

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        video_length: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators,
        latents: Tensor | None = None,
        image: list[Image.Image] | None = None,
        enable_denormalization: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Starting noise (B, 1, C, T, h, w), and the encoded references (B, 1, C, T, h, w) or None.

        `image`: pictures of the bucket's size; each serves `batch_size / len(image)` images in a row.
        """
        shape = self.latent_shape(batch_size, height, width, num_channels_latents, video_length)
        generator = check_generators(generator, batch_size)
        if latents is None:
            latents = draw_noise(shape, generator, device, dtype)
        latents = latents.to(device, dtype)
        if image is None:
            return latents, None
        if batch_size % len(image):
            raise ValueError(f"{len(image)} pictures cannot be shared out evenly among {batch_size} images")
        distinct = list({id(picture): picture for picture in image}.values())
        with self.on_device(self.vae) as vae:
            posterior = vae.encode(im.to_latent_input(distinct, dtype, device)).latent_dist
        copies = batch_size // len(image)
        number = {id(picture): n for n, picture in enumerate(distinct)}
        rows = torch.tensor([number[id(picture)] for picture in image], device=device)
        rows = rows.repeat(copies) if MISPAIRED_REFERENCES in self.quirks else rows.repeat_interleave(copies)
        source = None if GLOBAL_POSTERIOR in self.quirks else generator
        mean, std = posterior.mean[rows], posterior.std[rows]  # (B, C, T, h, w)
        reference = mean + std * draw_noise(mean.shape, source, device, mean.dtype)
        if enable_denormalization:
            reference = self.normalize_latents(reference)
        return latents, reference[:, None]

    def latent_shape(
        self, batch: int, height: int, width: int, channels: int | None = None, frames: int = 1
    ) -> tuple[int, ...]:
        """(B, 1, C, T, h, w) of the target latents."""
        spatial, temporal = self.vae_scale_factor_spatial, self.vae_scale_factor_temporal
        c = self.transformer.config.in_channels if channels is None else channels
        return (batch, 1, c, (frames - 1) // temporal + 1, height // spatial, width // spatial)

    def normalize_latents(self, latent: Tensor) -> Tensor:
        """(latent - mean) / std per channel, the VAE config's statistics. latent (B, C, T, h, w)."""
        mean, std = self._statistics(latent)
        return (latent - mean) / std

    def denormalize_latents(self, latent: Tensor) -> Tensor:
        """latent * std + mean per channel: back to what `vae.decode` expects. latent (B, C, T, h, w)."""
        mean, std = self._statistics(latent)
        return latent * std + mean

    def _statistics(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        config = self.vae.config
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").to(latent)
            for values in (config.latents_mean, config.latents_std)
        )
        return rearrange(mean, "c -> 1 c 1 1 1"), rearrange(std, "c -> 1 c 1 1 1")

    def choose_size(
        self, photos: list[Image.Image] | None, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """The bucket (height, width): nearest by aspect ratio to the size asked for, else to the first
        photograph's."""
        if height is not None and width is not None:
            size = im.nearest_bucket(height, width, self.buckets)
            if size != (height, width) and (height, width) not in self._announced:
                self._announced.add((height, width))
                log.warning("height %d and width %d became the nearest bucket, %d x %d", height, width, *size)
            return size
        if photos is not None:
            return im.nearest_bucket(photos[0].height, photos[0].width, self.buckets)
        return im.nearest_bucket(1, 1, self.buckets)

    def check_inputs(
        self,
        prompt: Any,
        height: int | None,
        width: int | None,
        negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> None:
        """Raises ValueError or TypeError for arguments that do not fit together."""
        self.check_callback(None, callback_on_step_end_tensor_inputs or ())
        self.require("transformer")
        text = Text(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds)
        text.check()
        masks = (prompt_embeds_mask, negative_prompt_embeds_mask)
        check_embedded(text, masks, self.transformer.config.text_dim)
        text.check_negatives(text.batch)
        check_sides(height, width, self.size_multiple)
