"""Training the small JoyAI-Image-Edit: MMDiT and Qwen3-VL together, on latents of the trained VAE.

The loss is that of flow matching (`flow_matching`). Latent cells that hold a shape or change count four
times; to weigh only the changed ones turns the bystanders to smears. Scenes of one shape come first, then
several (`plan`): among several shapes the choice of one is hardly learned before there is anything that could
be done to it.

Edits are drawn and encoded once, kept in a moving window (`Pool`), seen about five times each, and replaced.
A batch is three groups of prompts of equal length: the network knows no padding.

B batch   C latent channels   h, w latent height and width   L prompt tokens   D text width
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.random_checkpoint import SPECIAL_TOKENS
from benchmarks.shapes import evaluate, made_for, scenes, wording
from benchmarks.shapes.flow_matching import SHIFT, flow_loss
from benchmarks.shapes.init_mmdit import initialize_editor
from benchmarks.shapes.training import SAVE_EVERY, Log, parameters_of
from benchmarks.shapes.vocabulary import begin_with, instructions, qwen_tokenizer
from joyedit.media.images import Qwen2VLImageConfig, Qwen2VLImageProcessor, patchify, to_latent_input
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from joyedit.models.wan_vae import AutoencoderKLWan
from joyedit.pipelines.joyimage import JoyImageEditPipeline
from joyedit.pipelines.joyimage_prompts import SYSTEM, USER, VISION
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer
from joyedit.text.qwen3_vl_processor import Qwen3VLProcessor
from joyedit.training import losses
from joyedit.training.optimisers import RatedAdamW
from joyedit.training.run import Run, Stopping, rate_at
from joyedit.training.turns import turns

CONFIG = JoyImageEditConfig(
    hidden_size=192,
    num_attention_heads=6,
    num_layers=5,
    mlp_width_ratio=2.0,
    text_dim=128,
    rope_dim_list=(8, 12, 12),
    theta=20,
)
CPU = torch.device("cpu")
SEEN_PIXELS = 64 * 64  # Qwen3-VL sees a picture as 2 x 2 tokens
SAMPLES = 400_000
MORE, MORE_RATE = 15_000, 0.4  # from a checkpoint: samples, and the share of the rate
BATCH, GROUPS = 24, 3
FRESH = 5  # new edits per batch
POOL = 4096
RATE = 7e-4
WEIGHT = 4.0  # of cells that hold a shape or change
NO_PROMPT = 0.05  # share of groups without an instruction, for guidance


class Plan(NamedTuple):
    """What is drawn at some time of the training: kinds and numbers of shapes, as often as listed."""

    kinds: tuple[str, ...]
    counts: tuple[int, ...]
    own: float = 0.0  # share of samples that start from the network's own answer, see `flow_loss`


OF_SHAPES = ("recolour",) * 3 + ("remove",) * 2 + ("add",) * 3 + ("move",) * 3 + ("replace",) * 3
OF_PICTURES = ("background",) * 2 + ("grey", "negative")


def plan(samples: int, total: int) -> Plan:
    """One shape, then up to two, then up to four; at last also from where the first step of an edit leads."""
    done = samples / total
    if done < 0.2:
        return Plan(OF_SHAPES + OF_PICTURES, (1,))
    return Plan(
        OF_SHAPES + OF_PICTURES, (1, 2, 2) if done < 0.4 else (1, 2, 2, 3, 3, 4), own=0.7 * (done >= 0.8)
    )


def plan_more(samples: int, total: int) -> Plan:
    """Of a training from a checkpoint: up to four shapes; then also from where the first step of an edit
    leads."""
    return Plan(OF_SHAPES + OF_PICTURES, (1, 2, 2, 3, 3, 4), own=0.7 * (samples >= 0.5 * total))


def train(
    folder: Path,
    vae_folder: Path,
    scale: float = 1.0,
    seed: int = 0,
    device: torch.device = CPU,
    start: Path | None = None,
) -> None:
    """Train, or go on, in `folder`; `folder/checkpoint` is the checkpoint. `start`: one to begin with."""
    torch.manual_seed(seed)
    total = int((MORE if start else SAMPLES) * scale)
    plan_of, share = (plan_more, MORE_RATE) if start else (plan, 1.0)
    vae = AutoencoderKLWan.from_pretrained(vae_folder, dtype=torch.float32).to(device)
    processor = make_processor(folder / "tokenizer", varied=start is not None)
    transformer = JoyImageEditTransformer3DModel(CONFIG)
    rates = initialize_editor(transformer, seed)
    encoder = Qwen3VLForConditionalGeneration(encoder_config(processor.tokenizer))
    initialize_encoder(encoder)
    networks = {"transformer": transformer.to(device), "text_encoder": encoder.to(device)}
    if start:
        begin_with(start, networks, processor.tokenizer)
    shares = {p: rates[n].to(device) for n, p in transformer.named_parameters() if n in rates}
    parameters = [p for network in networks.values() for p in network.parameters() if p.requires_grad]
    optimizer = RatedAdamW(parameters, shares, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(folder, parameters_of(networks), optimizer, decay=0.998)
    log = Log(run, BATCH)
    pool = Pool(vae, processor, total, plan_of=plan_of, varied=start is not None)
    pool.fill(run.step * FRESH)
    pipe = assemble(transformer, encoder, vae, processor)
    steps = math.ceil(total / BATCH)
    with Stopping() as stopping:
        for turn in turns(run, steps, stopping):
            now = plan_of(log.samples, total)
            if turn.due(500):
                with run.averaged():
                    report(log, pipe, now)
            if turn.saves(SAVE_EVERY):
                run.save()
            if turn.ends:
                break
            run.set_rate(rate_at(run.step, steps, share * RATE, "cosine", 100, held=0.5, least=0.03))
            total_loss = 0.0
            for _ in range(GROUPS):
                batch = pool.draw(BATCH // GROUPS).to(device)
                loss = editing_loss(transformer, encoder, batch, now.own) / GROUPS
                loss.backward()
                total_loss += loss.item()
            run.update(clip=1.0)
            log.add(loss=total_loss)
            pool.renew(FRESH)


def report(log: Log, pipe: JoyImageEditPipeline, now: Plan) -> None:
    """Score held-out edits like those of now, write the checkpoint and every now and then a picture."""
    kinds = tuple(dict.fromkeys(now.kinds))
    edits = evaluate.held_out(8, now.counts, kinds)
    results = evaluate.run(pipe, edits, evaluate.STEPS)
    log.write(**evaluate.summarize(evaluate.judge(e, r) for e, r in zip(edits, results, strict=True)))
    picture = evaluate.grid(edits, results, columns=8)
    folder = log.run.folder
    picture.save(folder / "held-out.png")
    if log.run.step % 2500 == 0:
        picture.save(folder / f"held-out-{log.samples:07d}.png")
    copy.deepcopy(pipe).to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    made_for.stamp(folder / "checkpoint", "joyimage")


class Batch(NamedTuple):
    target: Tensor  # (B, C, 1, h, w), normalised
    reference: Tensor  # (B, C, 1, h, w)
    weight: Tensor  # (B, 1, 1, h, w)
    prefix: Tensor  # (1, P), the tokens before the picture, of which `dropped` are not given on
    tokens: Tensor  # (B, L), the picture and the instruction
    pixels: Tensor  # patches as the vision tower reads them
    grids: Tensor  # (B, 3)
    dropped: int

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part.to(device) if isinstance(part, Tensor) else part for part in self))


def editing_loss(
    transformer: JoyImageEditTransformer3DModel,
    encoder: Qwen3VLForConditionalGeneration,
    batch: Batch,
    own: float = 0.0,
) -> Tensor:
    """`flow_loss` of a batch."""
    conditioning = losses.JoyImageConditioning(read(encoder, batch), (batch.reference,))
    formulas = losses.joyimage, losses.joyimage_velocity
    return flow_loss(*formulas, transformer, batch.target, conditioning, batch.weight, own)


def read(encoder: Qwen3VLForConditionalGeneration, batch: Batch) -> Tensor:
    """The embeddings of the prompts, (B, L, D)."""
    images = encoder.encode_images(batch.pixels, batch.grids)
    prefix = encoder.prefill(batch.prefix, keep_from=batch.dropped)
    states = encoder.hidden_states(batch.tokens, images=images, prefix=prefix)
    return torch.cat((prefix.states.expand(len(states), -1, -1), states), dim=1)


class Pool:
    """A window of encoded edits that moves on through the training world.

    Which edits are in it depends on the progress alone, so an interrupted training finds the same again.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        processor: Qwen3VLProcessor,
        total: int,
        size: int = POOL,
        plan_of: Callable[[int, int], Plan] = plan,
        varied: bool = False,
    ):
        self.vae, self.processor, self.total, self.size = vae, processor, total, size
        self.plan_of, self.varied = plan_of, varied
        config = vae.config
        self.mean, self.std = (
            torch.tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std)
        )
        side = scenes.SIZE // config.scale_factor_spatial
        self.target = torch.zeros(size, config.z_dim, 1, side, side, dtype=torch.half)
        self.reference = torch.zeros_like(self.target)
        self.weight = torch.zeros(size, 1, 1, side, side, dtype=torch.half)
        seen = int(SEEN_PIXELS**0.5)
        self.pixels = torch.zeros(size, 3, seen, seen, dtype=torch.uint8)
        self.tokens: list[Tensor] = [torch.zeros(0, dtype=torch.long)] * size
        self.lengths = torch.zeros(size, dtype=torch.long)
        self.next = 0
        prompt = f"{USER}{VISION}{{}}<|im_end|>\n"
        self.template = JoyImageEditPipeline.prompt_template_encode["multiple_images"].format(prompt)
        count = SEEN_PIXELS // (processor.image_processor.config.patch_size * 2) ** 2
        self.template = self.template.replace("<|image_pad|>", "<|image_pad|>" * count)
        self.prefix = processor.tokenizer.encode(f"{SYSTEM}{USER}<|vision_start|>")
        self.dropped = len(processor.tokenizer.encode(SYSTEM + "<|im_start|>"))
        self.no_prompt = self.encode_text("")

    def fill(self, renewed: int) -> None:
        """The window as it is after `renewed` edits were exchanged."""
        self.next = renewed
        for _ in tqdm(range(self.size // 32), desc="drawing and encoding edits", mininterval=20):
            self.renew(32)

    def renew(self, count: int) -> None:
        """Exchange the oldest `count` edits for new ones."""
        edits = []
        for index in range(self.next, self.next + count):
            now = self.plan_of(max(index - self.size, 0) * BATCH // FRESH, self.total)
            edits.append(scenes.make_edit(index, "train", now.kinds, now.counts))
        slots = torch.arange(self.next, self.next + count) % self.size
        generators = [torch.Generator().manual_seed(self.next + i // 2) for i in range(2 * count)]
        self.next += count
        pictures = [as_image(scene) for edit in edits for scene in (edit.source, edit.target)]
        with torch.no_grad():
            posterior = self.vae.encode(to_latent_input(pictures).to(self.vae.device)).latent_dist
        # As in the pipeline, the reference is a sample of the posterior.
        source, target = posterior.sample(generators)[::2].cpu(), posterior.mean[1::2].cpu()
        self.reference[slots] = ((source - self.mean) / self.std).half()
        self.target[slots] = ((target - self.mean) / self.std).half()
        self.weight[slots] = torch.stack([cell_weights(edit, self.weight.shape[-1]) for edit in edits]).half()
        self.pixels[slots] = torch.stack([self.processor.image_processor.resize(p) for p in pictures[::2]])
        for index, (slot, edit) in enumerate(zip(slots.tolist(), edits, strict=True), self.next - count):
            text = wording.told(edit.instruction, index) if self.varied else edit.instruction
            self.tokens[slot] = self.encode_text(text)
            self.lengths[slot] = len(self.tokens[slot])

    def encode_text(self, instruction: str) -> Tensor:
        """The tokens after the prefix, (L)."""
        ids = self.processor.tokenizer.encode(self.template.format(instruction))
        assert ids[: len(self.prefix)] == self.prefix
        return torch.tensor(ids[len(self.prefix) :])

    def draw(self, count: int) -> Batch:
        """`count` edits whose prompts are equally long, or without their prompts."""
        first = torch.randint(self.size, ())
        alike = (self.lengths == self.lengths[first]).nonzero()[:, 0]
        slots = alike[torch.randint(len(alike), (count,))]
        tokens = torch.stack([self.tokens[slot] for slot in slots.tolist()])
        if torch.rand(()) < NO_PROMPT:
            slots = torch.randint(self.size, (count,))
            tokens = self.no_prompt.expand(count, -1)
        images = self.processor.image_processor
        pixels = torch.cat([patchify(images.normalize(one)) for one in self.pixels[slots]])
        side = self.pixels.shape[-1] // images.config.patch_size
        return Batch(
            self.target[slots].float(),
            self.reference[slots].float(),
            self.weight[slots].float(),
            torch.tensor([self.prefix]),
            tokens,
            pixels,
            torch.tensor([(1, side, side)] * count),
            self.dropped,
        )


def cell_weights(edit: scenes.Edit, side: int) -> Tensor:
    """WEIGHT where a latent cell holds part of a shape or of the box, before or after; else 1. (1, 1, side,
    side)"""
    local = edit.changed() if edit.kind in scenes.LOCAL else 0
    for scene in (edit.source, edit.target):
        for thing in scene.things:
            local = local + (scenes.coverage(thing) > 0)
    cells = F.adaptive_max_pool2d(torch.as_tensor(local, dtype=torch.float32)[None], side)
    return 1 + (WEIGHT - 1) * (cells[None] > 0).float()


def as_image(scene: scenes.Scene) -> Image.Image:
    return Image.fromarray(scenes.to_levels(scenes.draw(scene)))


def make_processor(folder: Path, varied: bool = False) -> Qwen3VLProcessor:
    """The processor of a run, kept in `folder`: a vocabulary must not change under a training."""
    if not (folder / "tokenizer.json").is_file():
        images = Qwen2VLImageProcessor(Qwen2VLImageConfig(min_pixels=SEEN_PIXELS, max_pixels=SEEN_PIXELS))
        Qwen3VLProcessor(images, qwen_tokenizer(instructions(varied=varied))).save_pretrained(folder)
    return Qwen3VLProcessor.from_pretrained(folder)


def encoder_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    """Two layers of text, one of vision, one DeepStack feature."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen3VLConfig.from_dict(
        {
            "text_config": {
                "model_type": "qwen3_vl_text",
                "vocab_size": len(tokenizer),
                "hidden_size": CONFIG.text_dim,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "rope_theta": 10000.0,
                "rope_scaling": {
                    "rope_type": "default",
                    "mrope_interleaved": True,
                    "mrope_section": [8, 4, 4],
                },
                "bos_token_id": ids["<|endoftext|>"],
                "eos_token_id": ids["<|im_end|>"],
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": CONFIG.text_dim,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
            "tie_word_embeddings": False,
        }
    )


@torch.no_grad()
def initialize_encoder(encoder: Qwen3VLForConditionalGeneration) -> None:
    """Pictures enter softly; the head and the last norm, which embeddings never use, do not learn."""
    text, visual = encoder.model.language_model, encoder.model.visual
    nn.init.normal_(text.embed_tokens.weight, std=0.5)
    for merger in (visual.merger, *visual.deepstack_merger_list):
        merger.linear_fc2.weight *= 0.1
    for unused in (encoder.lm_head, text.norm):
        unused.requires_grad_(False)


def assemble(
    transformer: JoyImageEditTransformer3DModel,
    encoder: Qwen3VLForConditionalGeneration,
    vae: AutoencoderKLWan,
    processor: Qwen3VLProcessor,
) -> JoyImageEditPipeline:
    """The pipeline of the parts."""
    pipe = JoyImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=encoder,
        tokenizer=processor.tokenizer,
        transformer=transformer,
        processor=processor,
        buckets=[(scenes.SIZE, scenes.SIZE)],
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
