"""Training the small ChronoEdit: WAN transformer, UMT5 and CLIP together, on latents of the trained VAE.

An edit is a film of five frames, in latents two: the photograph and the edited picture. With temporal
reasoning it has 29 frames, in latents eight, and the way is a drawn one, too. A latent frame after the first
is the code of the last of its four frames, as long as the encoder's temporal parts are at their start: so no
film is ever encoded, only pictures.

The loss is that of flow matching (`flow_matching`). Latent cells that hold a shape or change count four
times, but in the first frame, which is known. A step takes mostly edits of two latent frames and a film or so
of eight.

Padding of prompts is attended to. Some batches get as much of it as the pipeline makes, most get little: it
is all one row of keys and values.

B batch   C latent channels   T latent frames   h, w latent height and width   L prompt tokens
"""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks.shapes import evaluate, evaluate_chronoedit, made_for, scenes, wording
from benchmarks.shapes.flow_matching import SHIFT, flow_loss
from benchmarks.shapes.init_chronoedit import initialize_editor, initialize_encoders
from benchmarks.shapes.joyimage import OF_PICTURES, OF_SHAPES, Plan, as_image
from benchmarks.shapes.training import SAVE_EVERY, Log, parameters_of
from benchmarks.shapes.vocabulary import begin_with, instructions, umt5_tokenizer
from joyedit.media.clip_images import CLIPImageConfig, CLIPImageProcessor
from joyedit.media.images import to_latent_input
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.clip import CLIPVisionConfig, CLIPVisionModel
from joyedit.models.umt5 import UMT5Config, UMT5EncoderModel
from joyedit.models.wan_vae import AutoencoderKLWan
from joyedit.pipelines.chronoedit import EDIT_FRAMES, REASONING_FRAMES, ChronoEditPipeline
from joyedit.pipelines.chronoedit_frames import FrameCoder
from joyedit.schedulers.unipc import UniPCMultistepScheduler
from joyedit.text.t5_tokenizer import T5TokenizerFast
from joyedit.training import losses
from joyedit.training.optimisers import RatedAdamW
from joyedit.training.run import Run, Stopping, rate_at
from joyedit.training.turns import turns

CONFIG = ChronoEditConfig(
    num_attention_heads=6,
    attention_head_dim=32,
    text_dim=128,
    ffn_dim=512,
    num_layers=4,
    image_dim=32,
    added_kv_proj_dim=192,
)
CPU = torch.device("cpu")
SEEN_SIDE = 32  # pixels; CLIP sees a picture as 2 x 2 patches
SAMPLES = 150_000
MORE, MORE_RATE = 75_000, 0.7  # from a checkpoint: samples, and the share of the rate
EDITS, FILMS = 23, 1  # of a batch
BATCH = EDITS + FILMS
FRESH_EDITS, FILM_STEPS = 4, 4  # new edits per batch; batches per new film
EDIT_POOL, FILM_POOL = 4096, 512
RATE = 1.2e-3
SLOW_START = 0.36, 7 / 12  # until this share of the samples, this share of the rate
WEIGHT = 4.0  # of cells that hold a shape or change
FILM_WEIGHT = 0.2  # of the films in the loss
NO_PROMPT = 0.05  # share of samples without an instruction, for guidance
LEARNED = ("recolour",) * 3 + ("remove",) * 3 + ("add",) * 3 + ("move",) * 3 + ("grey", "negative")
# From a checkpoint: what was not learned before, most often.
WEAK = ("recolour",) * 2 + ("remove",) + ("add",) * 2 + ("move",) * 4 + ("replace",) * 4
WEAK += ("background",) * 3 + ("grey", "negative")
PADDING = (1, 1, 1, 8, 64, 500)  # rows, each equally often


class Editor(NamedTuple):
    """The networks that learn."""

    transformer: ChronoEditTransformer3DModel
    text_encoder: UMT5EncoderModel
    image_encoder: CLIPVisionModel


def plan(samples: int, total: int) -> Plan:
    """One shape, then up to two; then only the kinds that so few samples suffice for; at last also from where
    the first step of an edit leads."""
    done = samples / total
    if done < 0.4:
        return Plan(OF_SHAPES + OF_PICTURES, (1,) if done < 0.2 else (1, 2, 2))
    return Plan(LEARNED, (1, 2, 2), own=0.7 * (done >= 0.8))


def plan_more(samples: int, total: int) -> Plan:
    """Of a training from a checkpoint: up to two shapes; at last also from where the first step leads."""
    return Plan(WEAK, (1, 2, 2), own=0.7 * (samples >= 0.75 * total))


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
    tokenizer = kept_tokenizer(folder / "tokenizer", varied=start is not None)
    editor, rates = make_editor(tokenizer, seed)
    if start:
        begin_with(start, editor._asdict(), tokenizer)
    for network in editor:
        network.to(device)
    shares = {p: rates[n].to(device) for n, p in editor.transformer.named_parameters() if n in rates}
    parameters = [p for network in editor for p in network.parameters() if p.requires_grad]
    optimizer = RatedAdamW(parameters, shares, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    run = Run(folder, parameters_of(editor._asdict()), optimizer, decay=0.998)
    log = Log(run, BATCH)
    how: dict[str, Any] = {"plan_of": plan_of, "varied": start is not None}
    edits = Pool(vae, tokenizer, total, EDIT_FRAMES, EDIT_POOL, BATCH / FRESH_EDITS, **how)
    films = Pool(vae, tokenizer, total, REASONING_FRAMES, FILM_POOL, FILM_STEPS * BATCH, **how)
    edits.fill(run.step * FRESH_EDITS)
    films.fill(run.step // FILM_STEPS)
    pipe = assemble(editor, vae, tokenizer)
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
            early = SLOW_START[1] if run.step < SLOW_START[0] * steps and not start else share
            run.set_rate(rate_at(run.step, steps, early * RATE, "cosine", 100, held=0.5, least=0.03))
            edit_loss = editing_loss(editor, edits.draw(EDITS).to(device), now.own)
            ((1 - FILM_WEIGHT) * edit_loss).backward()
            film_loss = editing_loss(editor, films.draw(FILMS).to(device), now.own)
            (FILM_WEIGHT * film_loss).backward()
            run.update(clip=1.0)
            log.add(loss=edit_loss.item(), film_loss=film_loss.item())
            edits.renew(FRESH_EDITS)
            if run.step % FILM_STEPS == 0:
                films.renew(1)


def report(log: Log, pipe: ChronoEditPipeline, now: Plan) -> None:
    """Score held-out edits like those of now, write the checkpoint and every now and then a picture."""
    edits = evaluate.held_out(8, now.counts, tuple(dict.fromkeys(now.kinds)))
    results = evaluate_chronoedit.run(pipe, edits, evaluate_chronoedit.STEPS)
    log.write(**evaluate.summarize(evaluate.judge(e, r) for e, r in zip(edits, results, strict=True)))
    picture = evaluate.grid(edits, results, columns=8)
    folder = log.run.folder
    picture.save(folder / "held-out.png")
    films = evaluate_chronoedit.film_grid(edits[::8], evaluate_chronoedit.films(pipe, edits[::8], steps=4))
    films.save(folder / "films.png")
    if log.run.step % 2500 == 0:
        picture.save(folder / f"held-out-{log.samples:07d}.png")
    copy.deepcopy(pipe).to(torch.bfloat16).save_pretrained(folder / "checkpoint")
    made_for.stamp(folder / "checkpoint", "chronoedit")


class Batch(NamedTuple):
    frames: Tensor  # (B, C, T, h, w), normalised: the photograph and what becomes of it
    condition: Tensor  # (B, 4 + C, T, h, w), as the pipeline makes it
    weight: Tensor  # (B, 1, T, h, w)
    tokens: Tensor  # (B, L), padded
    mask: Tensor  # (B, L), 1 at tokens
    padding: int  # rows that follow L
    pixels: Tensor  # (B, 3, SEEN_SIDE, SEEN_SIDE), as CLIP reads them

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device) if isinstance(x, Tensor) else x for x in self))


def editing_loss(editor: Editor, batch: Batch, own: float = 0.0) -> Tensor:
    """`flow_loss` of a batch."""
    formulas = losses.chronoedit, losses.chronoedit_velocity
    return flow_loss(*formulas, editor.transformer, batch.frames, read(editor, batch), batch.weight, own)


def read(editor: Editor, batch: Batch) -> losses.ChronoEditConditioning:
    """What the transformer is told of a batch. Padding is all alike: a row of zeros."""
    states = F.pad(editor.text_encoder.encode(batch.tokens, batch.mask), (0, 0, 0, 1))
    image = editor.image_encoder.hidden_states(batch.pixels, layer=-2)
    return losses.ChronoEditConditioning(batch.condition, states, image, padding=batch.padding - 1)


class Pool:
    """A window of encoded edits of so many frames, that moves on through the training world.

    Which edits are in it depends on the progress alone, so an interrupted training finds the same again.
    `samples`: how many are seen of a training before an edit is exchanged.
    """

    def __init__(
        self,
        vae: AutoencoderKLWan,
        tokenizer: T5TokenizerFast,
        total: int,
        frames: int,
        size: int,
        samples: float,
        plan_of: Callable[[int, int], Plan] = plan,
        varied: bool = False,
    ):
        self.vae, self.coder, self.tokenizer, self.total = vae, FrameCoder(vae), tokenizer, total
        self.size, self.samples, self.plan_of, self.varied = size, samples, plan_of, varied
        self.times = torch.linspace(0, 1, 1 + (frames - 1) // vae.config.scale_factor_temporal).tolist()
        self.first = 2**30 if len(self.times) > 2 else 0  # films are not those of the edits
        side = scenes.SIZE // vae.config.scale_factor_spatial
        self.frames = torch.zeros(size, vae.config.z_dim, len(self.times), side, side, dtype=torch.half)
        self.weight = torch.zeros(size, 1, len(self.times), side, side, dtype=torch.half)
        self.pixels = torch.zeros(size, 3, SEEN_SIDE, SEEN_SIDE, dtype=torch.half)
        self.tokens: list[Tensor] = [torch.zeros(0, dtype=torch.long)] * size
        self.next = 0
        self.seen = image_processor()
        self.no_prompt = torch.tensor(tokenizer.encode(""))
        self.grey = self.encode([Image.new("RGB", (scenes.SIZE, scenes.SIZE))], level=0.0)

    def fill(self, renewed: int) -> None:
        """The window as it is after `renewed` edits were exchanged."""
        self.next = renewed
        for _ in tqdm(range(self.size // 32), desc="drawing and encoding edits", mininterval=20):
            self.renew(32)

    def renew(self, count: int) -> None:
        """Exchange the oldest `count` edits for new ones."""
        edits = []
        for index in range(self.next, self.next + count):
            now = self.plan_of(int(max(index - self.size, 0) * self.samples), self.total)
            edits.append(scenes.make_edit(self.first + index, "train", now.kinds, now.counts))
        slots = torch.arange(self.next, self.next + count) % self.size
        self.next += count
        shown = [[edit.between(t * t * (3 - 2 * t)) for t in self.times] for edit in edits]  # scenes.clip
        pictures = [as_image(scene) for film in shown for scene in film]
        latents = self.encode(pictures).unflatten(0, (count, -1))  # (count, T, C, 1, h, w)
        self.frames[slots] = latents[:, :, :, 0].transpose(1, 2).half()
        numbers = range(self.first + self.next - count, self.first + self.next)
        for slot, edit, film, number in zip(slots.tolist(), edits, shown, numbers, strict=True):
            self.weight[slot] = cell_weights(edit, film, self.weight.shape[-1]).half()
            text = wording.told(edit.instruction, number) if self.varied else edit.instruction
            self.tokens[slot] = torch.tensor(self.tokenizer.encode(text))
        self.pixels[slots] = self.seen(pictures[:: len(self.times)])["pixel_values"].half()

    @torch.no_grad()
    def encode(self, pictures: Sequence[Image.Image], level: float | None = None) -> Tensor:
        """Normalised latents of pictures, (B, C, 1, h, w)."""
        pixels = to_latent_input(pictures).to(self.vae.device)
        if level is not None:
            pixels = torch.full_like(pixels, level)
        return self.coder.condition(pixels, 1)[:, self.vae.config.scale_factor_temporal :].cpu()

    def draw(self, count: int) -> Batch:
        """`count` edits, some without their prompts."""
        slots = torch.randint(self.size, (count,))
        silent = torch.rand(count) < NO_PROMPT
        prompts = [
            self.no_prompt if s else self.tokens[i]
            for i, s in zip(slots.tolist(), silent.tolist(), strict=True)
        ]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        frames = self.frames[slots].float()
        return Batch(
            frames,
            condition_of(frames, self.grey, self.vae.config.scale_factor_temporal),
            self.weight[slots].float(),
            torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True),
            (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            PADDING[int(torch.randint(len(PADDING), ()))],
            self.pixels[slots].float(),
        )


def condition_of(frames: Tensor, grey: Tensor, mask_channels: int) -> Tensor:
    """What is known of films (B, C, T, h, w), (B, mask + C, T, h, w): the first frame; grey (1, C, 1, h, w)
    stands for the others. The same as of `FrameCoder.condition`, without encoding anything."""
    b, _, t, h, w = frames.shape
    mask = frames.new_zeros(b, mask_channels, t, h, w)
    mask[:, :, 0] = 1
    latents = torch.cat((frames[:, :, :1], grey.expand(b, -1, t - 1, -1, -1)), dim=2)
    return torch.cat((mask, latents), dim=1)


def cell_weights(edit: scenes.Edit, film: Sequence[scenes.Scene], side: int) -> Tensor:
    """WEIGHT where a latent cell ever holds part of a shape or of the box; else, and in the first frame, 1.
    (1, T, side, side)"""
    local = edit.changed() if edit.kind in scenes.LOCAL else 0
    for scene in film:
        for thing in scene.things:
            local = local + (scenes.coverage(thing) > 0)
    cells = F.adaptive_max_pool2d(torch.as_tensor(local, dtype=torch.float32)[None], side)
    weight = (1 + (WEIGHT - 1) * (cells > 0).float()).repeat(len(film), 1, 1)
    weight[0] = 1
    return weight[None]


def kept_tokenizer(folder: Path, varied: bool = False) -> T5TokenizerFast:
    """The tokenizer of a run, kept in `folder`: a vocabulary must not change under a training."""
    if not (folder / "tokenizer.json").is_file():
        umt5_tokenizer(instructions(varied=varied)).save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(CLIPImageConfig(size=SEEN_SIDE, crop_size=(SEEN_SIDE, SEEN_SIDE)))


def make_editor(
    tokenizer: T5TokenizerFast, seed: int = 0, **options: int
) -> tuple[Editor, dict[str, Tensor]]:
    """The untrained networks, and the transformer's shares of the learning rate. Options: those of
    `initialize_editor`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ChronoEditTransformer3DModel(CONFIG)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=CONFIG.text_dim,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
            )
        )
        assert CONFIG.image_dim is not None
        image_encoder = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=CONFIG.image_dim,
                intermediate_size=64,
                projection_dim=CONFIG.image_dim,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=SEEN_SIDE,
                patch_size=16,
                architectures=("CLIPVisionModel",),
            )
        )
        initialize_encoders(text_encoder, image_encoder)
    return Editor(transformer, text_encoder, image_encoder), initialize_editor(transformer, seed, **options)


def assemble(editor: Editor, vae: AutoencoderKLWan, tokenizer: T5TokenizerFast) -> ChronoEditPipeline:
    """The pipeline of the parts."""
    pipe = ChronoEditPipeline(
        tokenizer=tokenizer,
        text_encoder=editor.text_encoder,
        image_encoder=editor.image_encoder,
        image_processor=image_processor(),
        transformer=editor.transformer,
        vae=vae,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
