"""Training the small DiffEdit: Stable Diffusion's UNet and CLIP text encoder, on latents of the trained VAE.

Nothing here edits: the network learns to draw a scene from its caption. DiffEdit asks it twice about the same
noisy picture, under two captions, and where the answers differ is the mask. So what counts is which word
belongs to which shape. Cells of latents that hold a shape weigh more, and scenes of one shape come before
those of two (`plan`). Noise is strong at first, so that colours, which captions tell, are not seen;
later it is of middle strength, where a place can be seen but not the shape that is there.

Scenes are drawn and encoded once, kept in a moving window (`Pool`), seen a few times each, and replaced.

B batch   C latent channels   h, w latent height and width   L prompt tokens
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.shapes import evaluate_diffedit, made_for, scenes, wording
from benchmarks.shapes.sd_vae import CPU, SIZE, to_tensor, training_scene
from benchmarks.shapes.training import SAVE_EVERY, Log, parameters_of
from benchmarks.shapes.vocabulary import begin_with, captions, clip_tokenizer
from joyedit.media.clip_images import CLIPImageConfig, CLIPImageProcessor
from joyedit.models.clip import CLIPTextConfig, CLIPTextModel
from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel
from joyedit.models.sd_vae import AutoencoderKL
from joyedit.pipelines.diffedit import StableDiffusionDiffEditPipeline
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.text.clip_tokenizer import CLIPTokenizer
from joyedit.training import losses
from joyedit.training.optimisers import Muon, is_kernel
from joyedit.training.run import Run, Stopping, rate_at
from joyedit.training.turns import turns

# Transformers where there are 8 x 8 positions; at 16 x 16 they would cost as much as all the rest.
CONFIG = UNet2DConditionConfig(
    sample_size=16,
    block_out_channels=(64, 104),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=64,
    norm_num_groups=8,
)
TOKENS = 32  # a caption of three shapes has 21
ROUNDS = (130_000, 40_000)  # samples; the rate falls in each
MORE = (44_000,)  # from a checkpoint
BATCH = 32
FRESH = 8  # new scenes per batch
POOL = 8192
RATE = 2e-3  # of kernels, under Muon
WEIGHT = 4.0  # of cells that hold a shape
OF_PAIRS = (1, 2, 2)  # shapes in a scene
PAIRS = 0.6  # from a checkpoint: share of samples that are edits of another scene
BEGIN = 0.9  # the latest timestep at which they begin, of N
NO_CAPTION = 0.1  # share of samples without one, for guidance


class Plan(NamedTuple):
    """What is drawn at some time of the training."""

    counts: tuple[int, ...]  # shapes in a scene, as often as listed
    strong: bool  # noise: see `draw_timesteps`


def plan(samples: int, first: int) -> Plan:
    """One shape, then mostly two; then as many scenes of one as of two, under noise of middle strength.

    `first`: the samples of the first round, in which this happens."""
    done = samples / first
    if done < 0.3:
        return Plan((1,) if done < 0.1 else (1, 2, 2), strong=True)
    return Plan((1, 2), strong=False)


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
    rounds = [math.ceil(samples * scale / BATCH) for samples in (MORE if start else ROUNDS)]
    first = rounds[0] * BATCH
    vae = AutoencoderKL.from_pretrained(vae_folder, dtype=torch.float32).to(device)
    tokenizer = make_tokenizer(folder / "tokenizer", varied=start is not None)
    unet = UNet2DConditionModel(CONFIG)
    encoder = CLIPTextModel(encoder_config(tokenizer))
    initialize(unet, encoder)
    if start:
        begin_with(start, {"unet": unet, "text_encoder": encoder}, tokenizer)
    networks = {
        "unet": unet.to(device, memory_format=torch.channels_last),
        "text_encoder": encoder.to(device),
    }
    run = Run(folder, parameters_of(networks), make_optimizer(unet, encoder), decay=0.998)
    log = Log(run, BATCH)
    pool = Pool(vae, tokenizer, first, POOL, varied=start is not None)
    pool.fill(run.step * FRESH)
    pipe = assemble(unet, encoder, vae, tokenizer)
    with Stopping() as stopping:
        for turn in turns(run, sum(rounds), stopping):
            if turn.due(300):
                with run.averaged():
                    report(log, pipe)
            if turn.saves(SAVE_EVERY):
                run.save()
            if turn.ends:
                break
            run.set_rate(rate(run.step, rounds))
            batch = pool.draw(BATCH).to(device)
            strong = not start and plan(log.samples, first).strong
            loss = denoising_loss(unet, encoder, batch, strong)
            loss.backward()
            run.update(clip=1.0)
            log.add(loss=loss.item())
            pool.renew(FRESH)


def rate(step: int, rounds: Sequence[int]) -> float:
    """The learning rate: all of it for half of a round, then half a cosine down."""
    warmup = 100
    for length in rounds:
        if step < length:
            return rate_at(step, length, RATE, "cosine", warmup, held=0.5, least=0.02)
        step, warmup = step - length, 0
    return 0.02 * RATE


def make_optimizer(unet: UNet2DConditionModel, encoder: CLIPTextModel) -> Muon:
    """Muon for the UNet's kernels; AdamW at half its rate for gains and biases and for words."""
    kernels = [p for p in unet.parameters() if is_kernel(p)]
    others = [p for p in unet.parameters() if not is_kernel(p)] + list(encoder.parameters())
    return Muon(kernels, others, RATE, share=0.5, betas=(0.9, 0.98), weight_decay=0.01)


def report(log: Log, pipe: StableDiffusionDiffEditPipeline) -> None:
    """Score held-out edits, write the checkpoint and every now and then a picture."""
    scores, picture = evaluate_diffedit.evaluate(pipe, 12, references=False)
    folder = log.run.folder
    log.write(**scores["model"])
    picture.save(folder / "held-out.png")
    if log.run.step % 1500 == 0:
        picture.save(folder / f"held-out-{log.samples:07d}.png")
    copy.deepcopy(pipe).to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    made_for.stamp(folder / "checkpoint", "diffedit")


class Batch(NamedTuple):
    latents: Tensor  # (B, C, h, w), scaled
    weight: Tensor  # (B, 1, h, w)
    tokens: Tensor  # (B, L)
    left: Tensor | None = None  # (B, C, h, w), another scene - latents: see `leftover`

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(part if part is None else part.to(device) for part in self))


def denoising_loss(
    unet: UNet2DConditionModel, encoder: CLIPTextModel, batch: Batch, strong: bool = True
) -> Tensor:
    """The weighted error of v, the mean over a batch."""
    x0 = batch.latents
    timesteps = draw_timesteps(len(x0), strong)
    noise = torch.randn(x0.shape).to(x0)  # drawn on the CPU: the same on every device
    if batch.left is not None:
        noise += leftover(timesteps).view(-1, 1, 1, 1).to(x0) * batch.left
    conditioning = losses.StableDiffusionConditioning(encoder.encode(batch.tokens))
    sigma = losses.noise_levels(SCHEDULER)[timesteps].to(x0)
    options = {"scheduler": SCHEDULER, "weight": batch.weight}
    return losses.stable_diffusion(unet, x0, conditioning, noise, sigma, **options).mean()


def leftover(timesteps: Tensor) -> Tensor:
    """How much of (another scene - x0) the noise holds, (B), when an edit begins with that scene.

    At a timestep T it is sqrt(abar) other + sqrt(1 - abar) noise, and taken for x0 under its caption that is
    sqrt(abar) x0 + sqrt(1 - abar) (noise + r (other - x0)), r = sqrt(abar / (1 - abar)) at T. A network that
    answers x0 keeps this noise down to timestep 0. Half of the edits begin at `timesteps`, as masks are
    found, the others anywhere above, up to BEGIN.
    """
    room = (BEGIN * len(ALPHAS) - timesteps).clamp_min(0) * (torch.rand(len(timesteps)) < 0.5)
    begun = ALPHAS[timesteps + (room * torch.rand(len(timesteps))).long()]
    return (begun / (1 - begun)).sqrt() * (begun < BRIGHTEST)


def draw_timesteps(count: int, strong: bool) -> Tensor:
    """(B) in [0, N): as square roots of even ones, twice as often the later; or normal before a sigmoid, two
    thirds of them between 0.4 N and 0.8 N."""
    steps = len(ALPHAS)
    share = torch.rand(count).sqrt() if strong else (0.6 + 0.9 * torch.randn(count)).sigmoid()
    return (steps * share).long().clamp_max(steps - 1)


def make_scheduler() -> DDIMScheduler:
    """The noise of Stable Diffusion, with the v that 2.x predicts."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


SCHEDULER = make_scheduler()
ALPHAS = SCHEDULER.alphas_cumprod.float()  # abar of every timestep
BRIGHTEST = ALPHAS[350]  # no edit begins with less noise than here


class Pool:
    """A window of encoded scenes that moves on through the training world.

    Which scenes are in it depends on the progress alone, so an interrupted training finds the same again.
    """

    def __init__(
        self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, first: int, size: int, varied: bool = False
    ):
        self.vae, self.tokenizer, self.first, self.size, self.varied = vae, tokenizer, first, size, varied
        side = SIZE // vae.config.factor
        self.latents = torch.zeros(size, vae.config.latent_channels, side, side, dtype=torch.half)
        self.others = torch.zeros_like(self.latents) if varied else None
        self.weight = torch.zeros(size, 1, side, side, dtype=torch.half)
        self.tokens = torch.zeros(size, tokenizer.model_max_length, dtype=torch.long)
        self.no_caption = self.encode_texts([""])
        self.next = 0

    def fill(self, renewed: int) -> None:
        """The window as it is after `renewed` scenes were exchanged."""
        self.next = renewed
        for _ in tqdm(range(self.size // 32), desc="drawing and encoding scenes", mininterval=20):
            self.renew(32)

    def renew(self, count: int) -> None:
        """Exchange the oldest `count` scenes for new ones."""
        indices = range(self.next, self.next + count)
        slots = torch.tensor(indices) % self.size
        self.next += count
        side = self.weight.shape[-1]
        if self.others is None:
            plans = [plan(max(index - self.size, 0) * BATCH // FRESH, self.first) for index in indices]
            drawn = [training_scene(i, now.counts) for i, now in zip(indices, plans, strict=True)]
            weights = torch.stack([cell_weights(scene, side) for scene in drawn])
            texts = [scenes.caption(scene) for scene in drawn]
        else:
            pairs = [scenes.make_caption_pair(index, "train", OF_PAIRS, SIZE) for index in indices]
            drawn = [pair.target for pair in pairs]
            self.others[slots] = self.encode_scenes([pair.source for pair in pairs])
            weights = torch.stack(
                [cell_weights(p.target, side).maximum(cell_weights(p.source, side)) for p in pairs]
            )
            texts = [
                wording.told(pair.target_caption, index, wording.reworded_caption)
                for index, pair in zip(indices, pairs, strict=True)
            ]
        self.latents[slots] = self.encode_scenes(drawn)
        self.weight[slots] = weights.half()
        self.tokens[slots] = self.encode_texts(texts)

    @torch.no_grad()
    def encode_scenes(self, drawn: Sequence[scenes.Scene]) -> Tensor:
        """Their latents, scaled."""
        pixels = to_tensor([as_seen(scene) for scene in drawn])
        latents = self.vae.encode(pixels.to(self.vae.device)).latent_dist.mean
        return (self.vae.config.scaling_factor * latents).half().cpu()

    def encode_texts(self, texts: list[str]) -> Tensor:
        """Padded as the pipeline does, (B, L)."""
        length = self.tokenizer.model_max_length
        padded = {"padding": "max_length", "max_length": length, "truncation": True}
        return self.tokenizer(texts, **padded, return_tensors="pt").input_ids

    def draw(self, count: int) -> Batch:
        """`count` scenes, a few of them without their captions."""
        slots = torch.randint(self.size, (count,))
        without = torch.rand(count, 1) < NO_CAPTION
        tokens = torch.where(without, self.no_caption, self.tokens[slots])
        latents, left = self.latents[slots].float(), None
        if self.others is not None:
            edited = (torch.rand(count, 1) < PAIRS) & ~without
            left = (self.others[slots].float() - latents) * edited[..., None, None]
        return Batch(latents, self.weight[slots].float(), tokens, left)


def cell_weights(scene: scenes.Scene, side: int) -> Tensor:
    """WEIGHT where a latent cell holds part of a shape, else 1. (1, side, side)"""
    covered = sum(scenes.coverage(thing, SIZE) for thing in scene.things)
    cells = F.adaptive_max_pool2d(torch.as_tensor(covered, dtype=torch.float32)[None], side)
    return 1 + (WEIGHT - 1) * (cells > 0).float()


def as_seen(scene: scenes.Scene) -> np.ndarray:
    """The picture of a scene in levels of 8 bits, as files have it, in [0, 1]."""
    return scenes.to_levels(scenes.draw(scene, SIZE)).astype(np.float32) / 255


def make_tokenizer(folder: Path, varied: bool = False) -> CLIPTokenizer:
    """The tokenizer of a run, kept in `folder`: a vocabulary must not change under a training."""
    if not (folder / "vocab.json").is_file():
        clip_tokenizer(captions(varied=varied), length=TOKENS).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def encoder_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Two layers."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONFIG.context_dim,
        intermediate_size=4 * CONFIG.context_dim,
        projection_dim=CONFIG.context_dim,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )


@torch.no_grad()
def initialize(unet: UNet2DConditionModel, encoder: CLIPTextModel) -> None:
    """Words far apart; residual branches and the output start small."""
    nn.init.normal_(encoder.embeddings.token_embedding.weight, std=0.5)
    nn.init.normal_(encoder.embeddings.position_embedding.weight, std=0.2)
    for name, p in unet.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")):
            p *= 0.3
    unet.conv_out.weight *= 0.1


def assemble(
    unet: UNet2DConditionModel, encoder: CLIPTextModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> StableDiffusionDiffEditPipeline:
    """The pipeline of the parts."""
    pipe = StableDiffusionDiffEditPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        feature_extractor=CLIPImageProcessor(CLIPImageConfig(size=SIZE, crop_size=(SIZE, SIZE))),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
