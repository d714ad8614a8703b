"""JoyAI-Image-Edit-Plus: an instruction and one to six pictures in, one picture out; or text to image.

The network is that of JoyAI-Image-Edit, with weights of its own. Every reference keeps its own shape: each
goes to the bucket nearest to it, the text encoder reads all of them before the instruction, and to the
transformer the target and the references are frames one after another, each with a grid of its own. The size
of the result is the one that is asked for, or else the bucket of the last reference.

Other than in Edit, a reference is the mean of the VAE's posterior, so that nothing but noise is drawn; the
negative prompt is a space by default, and there are 30 steps.

Nothing is padded: samples whose references have the same sizes go through the transformer together, in groups
whose prompts are of one length, and each sample gets the image it would get alone. The reference pads and
masks, with the same result.

B samples   L prompt tokens   D width   C latent channels   h, w latent height and width (pixels / 8)
Source: diffusers `pipeline_joyimage_edit_plus.py`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from joyedit.media import images as im
from joyedit.models.joyimage_mmdit import Grid, Rope
from joyedit.noise import Generators, draw_noise
from joyedit.pipelines.checks import (
    Text,
    as_list,
    as_number,
    check_count,
    check_generators,
    check_number,
    check_output_type,
    check_tensor,
)
from joyedit.pipelines.defaults import unsaid
from joyedit.pipelines.joyimage import Branch, Images, JoyImageEditPipeline, Picture, in_order
from joyedit.pipelines.joyimage_prompts import IMAGE_MARK, USER, VISION, Prompt, PromptReader
from joyedit.pipelines.joyimage_request import check_placeholders, references_of_each
from joyedit.pipelines.pipeline import DENOISED
from joyedit.step_cache import StepCache

log = logging.getLogger("joyedit")

BLANK = " "  # the negative prompt where none is given

Sample = list[Image.Image]  # the references of one sample


class JoyImageEditPlusPipelineOutput(NamedTuple):
    images: Images


class Layout(NamedTuple):
    """Samples whose references have the same sizes: b of the B samples, M tokens of references."""

    rows: Tensor  # (b,)
    references: Tensor | None  # (b, M, D)
    grids: list[Grid]  # the target's, then one of each reference
    rope: Rope


class JoyImageEditPlusPipeline(JoyImageEditPipeline):
    """Edit by instruction with several reference images.

    Parts and settings are those of `JoyImageEditPipeline`; `buckets` are the sizes that references are
    brought to. None of its `reference_quirks` is known here.
    """

    quirk_names = frozenset()
    saved_as = {"JoyImageEditTransformer3DModel": "JoyImageEditPlusTransformer3DModel"}

    @torch.no_grad()
    def __call__(
        self,
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = unsaid(30),
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = unsaid(4.0),
        negative_prompt: str | list[str] | None = None,
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
        step_cache: float | None = None,
    ) -> JoyImageEditPlusPipelineOutput | tuple:
        """Make a picture from `images` as `prompt` says; without images, from the prompt alone.

        images: one to six references in the order in which the prompt speaks of them, or for several prompts
            a list of such lists; one list serves all prompts. Pictures as in `JoyImageEditPipeline`.
        height, width: both or neither, multiples of 16, used as they are; otherwise the bucket of the last
            reference of the first sample.
        guidance_scale: 1 or less turns guidance off.
        num_inference_steps, guidance_scale, negative_prompt: a small checkpoint may have others to be left
            at, `made_for.call`.
        generator: one for the whole batch, or a list with one per sample; it draws nothing but noise.
        latents: starting noise (B, C, 1, h, w). prompt_embeds (B, L, D) with prompt_embeds_mask (B, L)
            replace the prompt, likewise the negative ones.
        output_type: "pil", "np" (B, H, W, 3) in [0, 1], "pt" (B, 3, H, W) in [0, 1], or "latent"
            (B, C, h, w), normalised, the target's.
        max_sequence_length: tokens kept of pictures and prompt, the last ones; a line says what was cut.
        callback_on_step_end(pipe, step, timestep, tensors) may return replacements; its `latents`
            (B, 1, C, 1, h, w) are the target's, and `denoised`, if it asks for that, is the x0 of the step,
            to look at.
        step_cache: as in `JoyImageEditPipeline`.

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
            negative_prompt = BLANK if negative_prompt is None else negative_prompt
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
        batch = Text(prompt, embeds=prompt_embeds).batch
        generator = check_generators(generator, batch)
        texts = [as_list(prompt, batch, "prompt"), as_list(negative_prompt, batch, "negative_prompt")]
        embedded = [Prompt.of(prompt_embeds, prompt_embeds_mask)]
        embedded += [Prompt.of(negative_prompt_embeds, negative_prompt_embeds_mask)] * (guidance_scale > 1)
        samples = references_of_each(images, batch)
        check_placeholders(texts, samples)
        size = self.choose_size(None if samples is None else samples[0], as_number(height), as_number(width))
        samples = self.bucketed(samples)
        if latents is not None:
            _, _, *shape = self.latent_shape(batch, *size)
            check_tensor("latents", latents, (batch, *shape), "B, C, 1, h, w")
        unread = [each for each, known in zip(texts, embedded, strict=False) if known is None]
        if unread:
            self.require("text_encoder", "tokenizer", *(["processor"] if samples else []))
        if samples or output_type != "latent":
            self.require("vae")

        count = num_inference_steps if timesteps is None and sigmas is None else None
        self.scheduler.set_timesteps(count, device=self.device, timesteps=timesteps, sigmas=sigmas)
        self._guidance_scale = guidance_scale

        read = iter(self._read_prompts(unread, samples, max_sequence_length))
        prompts = [(known or next(read)).to(self.device) for known in embedded]
        dtype, channels = prompts[0].embeds.dtype, self.transformer.config.in_channels
        target, references = self.prepare_latents(
            batch, channels, *size, dtype, self.device, generator, samples, latents
        )
        watch = {"callback": callback_on_step_end, "names": names}
        target = self._denoise(target, references, *prompts, step_cache=threshold, **watch)
        result = self._decode(target[:, 0], output_type or "pil", True)
        return JoyImageEditPlusPipelineOutput(result) if return_dict else (result,)

    def choose_size(self, photos: Sample | None, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of the result: as asked for, else the bucket of the last of these references."""
        if height is not None and width is not None:
            return height, width
        return self.bucket_of(photos[-1]) if photos else self.bucket_of(Image.new("L", (1, 1)))

    def bucket_of(self, picture: Image.Image) -> tuple[int, int]:
        """The bucket (height, width) nearest to a picture. Raises ValueError for one of no whole tokens."""
        bucket = im.nearest_bucket(picture.height, picture.width, self.buckets)
        if min(bucket) < 1 or any(side % self.size_multiple for side in bucket):
            raise ValueError(
                f"buckets hold {bucket}: both sides must be positive multiples of {self.size_multiple}"
            )
        return bucket

    def bucketed(self, samples: list[Sample] | None) -> list[Sample] | None:
        """Every reference in the bucket nearest to it; one that is there several times stays one object."""
        if samples is None:
            return None
        distinct = {id(one): one for sample in samples for one in sample}
        made = {key: im.resize_center_crop(one, *self.bucket_of(one)) for key, one in distinct.items()}
        return [[made[id(one)] for one in sample] for sample in samples]

    def _read_prompts(
        self, prompts: list[list[str]], samples: list[Sample] | None, max_sequence_length: int
    ) -> list[Prompt]:
        """Each list of B prompts embedded, after the references of each sample if there are any."""
        counts = [len(sample) for sample in samples] if samples else [0] * len(prompts[0] if prompts else [])
        texts = [
            f"{USER}{VISION * count}{text}<|im_end|>\n"
            for each in prompts
            for text, count in zip(each, counts, strict=True)
        ]
        states = iter(self._read_turns(texts, samples and samples * len(prompts), max_sequence_length))
        return [Prompt.pad(list(islice(states, len(each)))) for each in prompts]

    def _read_turns(
        self, turns: list[str], samples: list[Sample] | None, max_sequence_length: int | None
    ) -> list[Tensor]:
        """(L, D) of each turn of a user, its last `max_sequence_length` tokens."""
        if not turns:
            return []
        template = self.prompt_template_encode["multiple_images"]
        with self._reader() as reader:
            states = reader.read([template.format(turn) for turn in turns], samples)
        longest, limit = max(map(len, states)), max_sequence_length
        if limit is None or longest <= limit:
            return states
        cut = "a prompt has %d tokens, pictures included: the first %d are cut (max_sequence_length=%d)"
        log.warning(cut, longest, longest - limit, limit)
        return [state[-limit:] for state in states]

    @contextlib.contextmanager
    def _reader(self) -> Iterator[PromptReader]:
        with super()._reader() as reader:
            reader.limit = None  # here nothing is cut before it is read
            yield reader

    def encode_prompt_multiple_images(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        images: Picture | list[Picture] | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embed turns of a user as `__call__` writes them,
        "<|im_start|>user\\n<image>\\n<image>\\nCombine both.<|im_end|>\\n": each "<image>\\n" is the next of
        `images`, which are read in the sizes that they have. Returns embeds (B, L, D) and mask (B, L).

        Raises ValueError when there are more or fewer images than such places.
        """
        turns = [prompt] if isinstance(prompt, str) else prompt
        turns = [turn.replace(IMAGE_MARK, VISION) for turn in turns]
        counts = [turn.count(VISION) for turn in turns]
        pictures = [] if images is None else im.to_pil_list(images, "images", alpha=True)
        if sum(counts) != len(pictures):
            raise ValueError(
                f"the prompts have places for {sum(counts)} images, and there are {len(pictures)}"
            )
        if 0 < counts.count(0) < len(counts):
            raise ValueError("some prompts name images and others none: embed them apart")
        following = iter(pictures)
        samples = [list(islice(following, count)) for count in counts] if pictures else None
        return Prompt.pad(self._read_turns(turns, samples, max_sequence_length)).to(device)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: Generators,
        reference_images: list[Sample] | None = None,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, list[list[Tensor]] | None]:
        """Starting noise (B, 1, C, 1, h, w), and the encoded references of each sample, each (1, C, 1, h, w)
        in its own size, or None.

        latents: noise (B, C, 1, h, w) to start from. Each sample's noise is drawn by itself.
        """
        generator = check_generators(generator, batch_size)
        if latents is None:
            each = generator if isinstance(generator, (list, tuple)) else [generator] * batch_size
            shape = self.latent_shape(1, height, width, num_channels_latents)
            noise = torch.cat([draw_noise(shape, one, device, dtype) for one in each])
        else:
            noise = latents.to(device, dtype)[:, None]
        if reference_images is None:
            return noise, None
        distinct = {id(picture): picture for sample in reference_images for picture in sample}
        encoded = {}
        with self.on_device(self.vae) as vae:
            for key, picture in distinct.items():
                pixels = im.to_latent_input([picture], torch.float32, device).to(dtype)
                encoded[key] = self.normalize_latents(vae.encode(pixels).latent_dist.mode().to(dtype))
        return noise, [[encoded[id(picture)] for picture in sample] for sample in reference_images]

    def _denoise(
        self,
        latents: Tensor,
        references: list[list[Tensor]] | None,
        positive: Prompt,
        negative: Prompt | None = None,
        *,
        step_cache: float | None = None,
        callback: Callable | None = None,
        names: Sequence[str] = (),
    ) -> Tensor:
        """Target latents (B, 1, C, 1, h, w) from noise to image; guided when there is a negative prompt.
        step_cache: the threshold of a `StepCache`."""
        steps = self.scheduler.timesteps
        self._num_timesteps, self._steps_computed = len(steps), 0
        cache = StepCache(step_cache, len(steps))
        with self.on_device(self.transformer) as transformer, self.progress_bar(len(steps)) as bar:
            layouts = self._layouts(latents, references)
            modulation = transformer.embed_time(steps)  # (S, 6, D)
            cond = self._branches(positive, layouts, cache)
            uncond = None if negative is None else self._branches(negative, layouts, cache)

            for i, timestep in enumerate(steps):
                if self.ends_at(i, latents, positive.embeds, None if negative is None else negative.embeds):
                    break
                self._current_timestep = timestep
                target = transformer.embed_image(latents)  # (B, N, D)
                guided = uncond is not None and self.guidance_scale > 1  # a callback may have turned it off
                branches = [cond, uncond] if guided else [cond]
                cache.begin(i)
                velocities = self._predict(target, branches, modulation[i], layouts)
                self._steps_computed = cache.computed
                denoised = self._denoised(timestep, latents, *velocities) if DENOISED in names else None
                latents = self._step(timestep, latents, *velocities)

                tensors: dict[str, Tensor | None] = {"latents": latents, "prompt_embeds": positive.embeds}
                tensors["negative_prompt_embeds"] = None if negative is None else negative.embeds
                tensors[DENOISED] = denoised
                returned = self.call_back(callback, names, i, timestep, tensors)
                latents = returned["latents"]
                if returned["prompt_embeds"] is not positive.embeds:
                    positive = Prompt(returned["prompt_embeds"], positive.mask)
                    cond = self._branches(positive, layouts, cache)
                if negative is not None and returned["negative_prompt_embeds"] is not negative.embeds:
                    negative = Prompt(returned["negative_prompt_embeds"], negative.mask)
                    uncond = self._branches(negative, layouts, cache)
                bar.update()
        self._current_timestep = None
        return latents

    def _layouts(self, latents: Tensor, references: list[list[Tensor]] | None) -> list[Layout]:
        """All samples, in groups whose references have the same sizes."""
        transformer, device = self.transformer, latents.device
        target = transformer.token_grid(latents)
        alike: dict[tuple[Grid, ...], list[int]] = {}
        for row, sample in enumerate(references or [[]] * len(latents)):
            alike.setdefault(tuple(map(transformer.token_grid, sample)), []).append(row)
        layouts = []
        for others, rows in alike.items():
            tokens = None
            if references is not None:
                one_by_one = [torch.cat([*map(transformer.embed_image, references[row])], 1) for row in rows]
                tokens = torch.cat(one_by_one)
            grids = [target, *others]
            layouts.append(
                Layout(torch.tensor(rows, device=device), tokens, grids, transformer.rope(grids, device))
            )
        return layouts

    def _branches(self, prompt: Prompt, layouts: list[Layout], cache: StepCache) -> list[Branch]:
        """Of each layout all its samples under `prompt`."""
        return [
            self._branch(Prompt(prompt.embeds[rows], prompt.mask[rows]), references, cache)
            for rows, references, _, _ in layouts
        ]

    def _predict(
        self, target: Tensor, branches: list[list[Branch]], vec: Tensor, layouts: list[Layout]
    ) -> list[Tensor]:
        """What the transformer predicts for the target latents under each prompt. target (B, N, D) ->
        (B, C, 1, h, w) each."""
        parts = [
            self._velocities(target[layout.rows], [*under], vec, layout.rope, layout.grids)
            for layout, *under in zip(layouts, *branches, strict=True)
        ]
        return [in_order(layouts, list(each)) for each in zip(*parts, strict=True)]
