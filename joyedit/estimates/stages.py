"""What each system runs in an edit: the networks' own functions, with inputs of the sizes of a real edit.

Three stages: "text", all that is read before the steps, prompt and photograph; "denoise"; "decode". The
pipelines are the authority: here stands, in their order, what they call of their networks.

h, w latent height and width   L text tokens   D width
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from joyedit import ops
from joyedit.checkpoints.network import Network
from joyedit.estimates.counting import Counted, Tally
from joyedit.estimates.repeats import Repeats
from joyedit.media.images import smart_resize
from joyedit.memory import blocks_of, tensors_of
from joyedit.models.qwen3_vl import ImageFeatures, Qwen3VLForConditionalGeneration, mrope
from joyedit.pipelines.chronoedit_frames import FrameCoder

TEXT, DENOISE, DECODE = "text", "denoise", "decode"

# Tokens of a prompt of two sentences, and of what the chat template puts around the picture and at the end.
PROMPT, TEMPLATE, END = 48, 37, 8
PADDED = 512  # tokens of ChronoEdit's prompts
CLIP_TOKENS = 77
MAPS = 10  # noises that DiffEdit's mask is averaged over
STRENGTH = 0.8  # the share of DiffEdit's steps that are taken


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the picture that is made, in pixels; of a film, the frames; the steps, and whether a negative prompt
    guides them."""

    height: int
    width: int
    frames: int
    steps: int
    guided: bool = True


@dataclasses.dataclass(frozen=True)
class Visit:
    """A stretch of work of one network. times: how often an edit does it; is_step: whether it is a step."""

    stage: str
    part: str
    tally: Tally
    times: int = 1
    is_step: bool = False


class Stages:
    """Runs networks that have no memory, and notes what each visit takes."""

    def __init__(self, networks: Mapping[str, Network], mapped: Collection[str] = ()):
        self.networks = networks
        self.visits: list[Visit] = []
        weights = {name: tensors_of(network) for name, network in networks.items()}
        in_files = (t for name in mapped for t in weights[name])
        self.counted = Counted(itertools.chain.from_iterable(weights.values()), in_files)
        repeats = Repeats(self.counted)
        for network in networks.values():
            repeats.watch(blocks_of(network))

    @contextlib.contextmanager
    def visit(self, stage: str, part: str, times: int = 1, is_step: bool = False) -> Iterator[Any]:
        self.counted.heap_of_visit = 0
        with self.counted.measure() as tally:
            yield self.networks[part]
        self.visits.append(Visit(stage, part, tally, times, is_step))


def run(
    class_name: str, networks: Mapping[str, Network], size: Size, mapped: Collection[str] = ()
) -> list[Visit]:
    """The visits of an edit by a pipeline of this class. Networks that it does not have are not visited.
    mapped: names of those whose weights take memory when they are read."""
    stages = Stages(networks, mapped)
    with torch.no_grad(), stages.counted:
        SYSTEMS[class_name](stages, size)
    return stages.visits


def joyimage(stages: Stages, size: Size) -> None:
    latent = (1, 1, stages.networks["transformer"].config.in_channels, 1, size.height // 8, size.width // 8)
    texts = qwen_prompts(stages, size)
    with stages.visit(TEXT, "vae") as vae:
        pixels = empty(1, 3, 1, size.height, size.width, dtype=vae.dtype)
        posterior = vae.encode(pixels).latent_dist
        reference = (posterior.mean + posterior.std * torch.empty_like(posterior.mean))[:, None]
        del pixels, posterior
    latents = empty(*latent, dtype=reference.dtype)
    with stages.visit(DENOISE, "transformer") as transformer:
        tokens = transformer.embed_image(reference)
        frames, rows, columns = transformer.token_grid(latents)
        grid = (2 * frames, rows, columns)
        rope = transformer.rope(grid, latents.device)
        vec = transformer.embed_time(empty(size.steps))
        texts = [transformer.embed_text(text) for text in texts]
    with stages.visit(DENOISE, "transformer", size.steps, is_step=True) as transformer:
        target = transformer.embed_image(latents)
        branches = transformer.predict_branches(target, tokens, texts, vec[0], rope, grid)
        step = branches[0]
        if size.guided:
            step = ops.guide(branches[0], branches[1], 4.0, True, latents[:, 0], empty(1))
        latents = step[:, None]
        del target, branches, step
    del tokens, rope, vec, texts, reference
    with stages.visit(DECODE, "vae") as vae:
        vae.decode(latents[:, 0])


def qwen_prompts(stages: Stages, size: Size) -> list[Tensor]:
    """Embeddings of a prompt about one picture and of an empty one, which begin alike."""
    with stages.visit(TEXT, "text_encoder") as encoder:
        features = see(encoder, size)
        prefix = read(encoder, TEMPLATE + len(features.embeds), features, keep_from=TEMPLATE - 3)
        states, cache = prefix
        counts = (PROMPT + END, END) if size.guided else (PROMPT + END,)
        tails = [read(encoder, count, None, cache)[0] for count in counts]
        return [torch.cat((states, tail), dim=1) for tail in tails]


def see(encoder: Qwen3VLForConditionalGeneration, size: Size) -> ImageFeatures:
    vision = encoder.config.vision_config
    edge = vision.patch_size * vision.spatial_merge_size
    height, width = smart_resize(size.height, size.width, edge)
    gh, gw = height // vision.patch_size, width // vision.patch_size
    row = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    dtype = ops.compute_dtype(encoder.dtype, "meta")
    embeds, deepstack = encoder.model.visual(empty(gh * gw, row).to(dtype), [(gh, gw)])
    return ImageFeatures(embeds, deepstack, empty(1, 3))


def read(
    encoder: Qwen3VLForConditionalGeneration,
    length: int,
    images: ImageFeatures | None,
    past: list[tuple[Tensor, Tensor]] | None = None,
    keep_from: int = 0,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The states of `length` tokens, and keys and values: `hidden_states` and `prefill`, without tokens."""
    text, config = encoder.model.language_model, encoder.config.text_config
    cache: list[tuple[Tensor, Tensor]] = []
    x = text.embed_tokens(empty(1, length, dtype=torch.long)).to(ops.compute_dtype(encoder.dtype, "meta"))
    places = empty(1, length, dtype=torch.bool)
    if images is not None:
        x = x.masked_scatter(places[..., None], images.embeds.to(x.dtype))
    rope = mrope(empty(3, 1, length), config.head_dim, config.rope_theta, config.rope_scaling.mrope_section)
    deepstack = images.deepstack if images else ()
    states = text(x, rope, None, places, deepstack, past, keep_from, cache)
    return states.to(encoder.dtype), cache


def qwen(stages: Stages, size: Size) -> None:
    """A question about a picture, and the first token of the answer."""
    with stages.visit(TEXT, "text_encoder") as encoder:
        features = see(encoder, size)
        read(encoder, TEMPLATE + len(features.embeds) + PROMPT, features, keep_from=0)


def chronoedit(stages: Stages, size: Size) -> None:
    config = stages.networks["transformer"].config
    with stages.visit(TEXT, "text_encoder") as encoder:
        dtype = torch.promote_types(ops.compute_dtype(encoder.dtype, "meta"), torch.float32)
        count = 1 + size.guided
        numbers = empty(count * PROMPT, dtype=torch.long)
        encoder.encoder(encoder.shared(numbers).to(dtype), [PROMPT] * count)
        texts = [empty(1, PADDED, config.text_dim, dtype=encoder.dtype) for _ in range(count)]
    with stages.visit(TEXT, "image_encoder") as encoder:
        edge = encoder.config.image_size
        seen = encoder.hidden_states(empty(1, 3, edge, edge), layer=-2)
    with stages.visit(TEXT, "vae") as vae:
        pixels = empty(1, 3, 1, size.height, size.width)
        condition = FrameCoder(vae).condition(pixels, size.frames)
        del pixels
    latents = torch.empty_like(condition[:, -vae.config.z_dim :])
    with stages.visit(DENOISE, "transformer") as transformer:
        vec = transformer.embed_time(empty(size.steps))
        image = transformer.embed_image(seen) if config.image_dim else None
        contexts = [transformer.embed_text(text) for text in texts]
    with stages.visit(DENOISE, "transformer", size.steps, is_step=True) as transformer:
        x = torch.cat((latents, condition), dim=1)
        rope = transformer.rope(transformer.token_grid(x), x.device)
        branches = transformer.predict_branches(x, vec[0], contexts, image, rope)
        latents = ops.guide(branches[0], branches[1], 5.0) if size.guided else branches[0]
        del x, branches
    del vec, image, contexts, rope
    with stages.visit(DECODE, "vae") as vae:
        FrameCoder(vae).decode(latents)


def diffedit(stages: Stages, size: Size) -> None:
    taken = int(size.steps * STRENGTH)
    with stages.visit(TEXT, "text_encoder") as encoder:
        width = ops.compute_dtype(encoder.dtype, "meta")
        x = encoder.embeddings.token_embedding(empty(3, CLIP_TOKENS, dtype=torch.long)).to(width)
        states = encoder.encoder(x, encoder.config.num_hidden_layers)
        prompts = encoder.final_layer_norm(states).to(encoder.dtype)[:2]
        del x, states
    with stages.visit(TEXT, "vae") as vae:
        posterior = vae.encode(empty(1, 3, size.height, size.width, dtype=vae.dtype)).latent_dist
        latents = posterior.mean.float()
        del posterior
    levels = latents.new_empty(taken + 1, *latents.shape[1:])
    with stages.visit(DENOISE, "unet") as unet:  # the mask
        times = unet.embed_time(empty(size.steps))
        noisy = latents.new_empty(MAPS, *latents.shape[1:])
        unet.predict(noisy, times[0], unet.embed_context(prompts), branches=2)
        del noisy
    with stages.visit(DENOISE, "unet", taken) as unet:  # the inversion
        unet.predict(latents, times[0], unet.embed_context(prompts[:1]))
    with stages.visit(DENOISE, "unet", taken, is_step=True) as unet:
        count = 1 + size.guided
        branches = unet.predict(latents, times[0], unet.embed_context(prompts[:count]), count).chunk(count)
        latents = ops.guide(branches[1], branches[0], 7.5) if size.guided else branches[0]
        del branches
    del times, levels
    with stages.visit(DECODE, "vae") as vae:
        vae.decode(latents.to(vae.dtype))


SYSTEMS: dict[str, Callable[[Stages, Size], None]] = {
    "JoyImageEditPipeline": joyimage,
    "JoyImageEditPlusPipeline": joyimage,
    "ChronoEditPipeline": chronoedit,
    "StableDiffusionDiffEditPipeline": diffedit,
    "Qwen3VLPipeline": qwen,
}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
