"""Training the WAN VAE of the small checkpoints; JoyImage and ChronoEdit share it.

Three stages. `pictures`: encoder and decoder on crops of pictures. `decoder`: the encoder rests, so the
latents no longer change and a denoiser may start on them; the decoder learns to put up with latents that are
not quite right, as a denoiser's are. `clips`: what of the decoder concerns later frames only (the earlier
temporal slices of the kernels and the convolutions over time) learns on clips of edits; the rest is fixed, so
that pictures are coded to the bit as before. A latent of the encoder is the last of its four frames, from
beginning to end: clips need no latents of their own, and the decoder fills in the frames between.

B batch   C channels   T frames
Source of the recipe: principal components first, then Muon and a squared error (an absolute one never finds
all colour axes).
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from benchmarks.shapes import scenes
from benchmarks.shapes.init_vae import initialize_vae
from benchmarks.shapes.training import SAVE_EVERY, Log, parameters_of
from joyedit.models.latents import DiagonalGaussian
from joyedit.models.wan_vae import (
    AutoencoderKLWan,
    AutoencoderKLWanConfig,
    CausalConv3d,
    DoubleFrames,
    HalveFrames,
)
from joyedit.training.optimisers import Muon, is_kernel
from joyedit.training.run import Run, Stopping, rate_at
from joyedit.training.turns import turns

# Wide where the maps are small, which is where width is cheap.
CONFIG = AutoencoderKLWanConfig(
    base_dim=8,
    decoder_base_dim=8,
    dim_mult=(1, 2, 4, 8),
    num_res_blocks=1,
    latents_mean=(0.0,) * 16,
    latents_std=(1.0,) * 16,
)
CPU = torch.device("cpu")
CROP, BATCH = 64, 6
FILM, CLIP_BATCH = 29, 2  # frames of a whole film of an edit
SAMPLES = {"pictures": 20_000, "decoder": 60_000, "clips": 8_000}
STAGES = tuple(SAMPLES)
RATES = {"pictures": 4e-3, "decoder": 3e-3, "clips": 2e-3}


def train(
    folder: Path,
    stages: Sequence[str] = STAGES,
    scale: float = 1.0,
    seed: int = 0,
    device: torch.device = CPU,
) -> None:
    """Train, or go on, in `folder`; `folder/vae` is the checkpoint. `scale`: of the numbers of samples."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(CONFIG)
    initialize_vae(vae, torch.cat([crops(-i, 6) for i in range(1, 13)]))
    vae.to(device)
    for stage in stages:
        optimizer = make_optimizer(trained(vae, stage), RATES[stage])
        run = Run(folder / stage, parameters_of({"vae": vae}), optimizer, decay=0.998)
        test = test_clips() if stage == "clips" else test_pictures()
        draw, batch = (some_clips, CLIP_BATCH) if stage == "clips" else (crops, BATCH)
        log, steps = Log(run, batch), math.ceil(SAMPLES[stage] * scale / batch)
        with Stopping() as stopping:
            for turn in turns(run, steps, stopping):
                if turn.due(400):
                    with run.averaged():
                        log.write(**judge(vae, test))
                        write(vae, folder / "vae")
                if turn.saves(SAVE_EVERY):
                    run.save()
                if turn.ends:
                    break
                run.set_rate(rate_at(run.step, steps, RATES[stage], "cosine", 50, least=0.02))
                loss, parts = reconstruction_loss(vae, draw(log.samples, batch).to(device), stage)
                loss.backward()
                run.update(clip=math.inf)
                log.add(**parts)
        with run.averaged():
            vae = copy.deepcopy(vae)


def reconstruction_loss(vae: AutoencoderKLWan, pixels: Tensor, stage: str) -> tuple[Tensor, dict[str, float]]:
    """8 squared error + 0.3 absolute error + 0.2 absolute error of gradients + 1e-5 KL.

    pixels (B, 3, T, H, W) in [-1, 1]."""
    if stage == "pictures":
        posterior = DiagonalGaussian(vae.encode_frames(pixels))
        z = posterior.sample()
        kl = 0.5 * (posterior.mean.square() + posterior.std.square() - 1 - posterior.logvar).sum(1).mean()
    else:
        with torch.no_grad():
            mean = vae.encode_frames(pixels).chunk(2, dim=1)[0]
            std = mean.std(dim=(0, 2, 3, 4), keepdim=True)
            noise = 0.1 * torch.rand(len(mean), 1, 1, 1, 1, device=mean.device) * std
            z, kl = mean + noise * torch.randn_like(mean), mean.new_zeros(())
    return weighed(vae.decode_frames(z) - pixels, kl)


def weighed(error: Tensor, kl: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The loss of an error (..., H, W), and its parts."""
    squared, absolute = error.square().mean(), error.abs().mean()
    edges = error.diff(dim=-2).abs().mean() + error.diff(dim=-1).abs().mean()
    loss = 8 * squared + 0.3 * absolute + 0.2 * edges + 1e-5 * kl
    return loss, {"squared": squared.item(), "absolute": absolute.item(), "kl": kl.item()}


def trained(vae: AutoencoderKLWan, stage: str) -> list[nn.Parameter]:
    """What learns in a stage; everything else gets `requires_grad` False."""
    over_time = set()
    for module in vae.modules():
        if isinstance(module, (HalveFrames, DoubleFrames)):
            over_time.update(module.parameters())
    earlier = {m.weight for m in vae.modules() if isinstance(m, CausalConv3d) and m.weight.shape[-1] > 1}
    for name, p in vae.named_parameters():
        rests = stage != "pictures" and name.startswith(("encoder.", "quant_conv."))
        learns = p in over_time or p in earlier if stage == "clips" else p not in over_time
        p.requires_grad_(learns and not rests)
    if stage == "clips":
        for p in earlier:  # of these kernels only the earlier slices
            if p.requires_grad:
                p.register_hook(_without_last_slice)
    return [p for p in vae.parameters() if p.requires_grad]


def _without_last_slice(grad: Tensor) -> Tensor:
    return torch.cat((grad[:, :, :-1], torch.zeros_like(grad[:, :, -1:])), dim=2)


def make_optimizer(parameters: list[nn.Parameter], rate: float) -> Muon:
    """Muon for kernels; Adam at half its rate for gains and biases."""
    kernels, others = ([p for p in parameters if is_kernel(p) == which] for which in (True, False))
    return Muon(kernels, others, rate, share=0.5, betas=(0.9, 0.98), weight_decay=0)


@torch.no_grad()
def judge(vae: AutoencoderKLWan, test: Tensor) -> dict[str, float]:
    """PSNR in dB of what comes back of held-out pictures or clips, mean and worst."""
    parts = [part.to(vae.device) for part in test.split(8)]
    back = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample.cpu() for part in parts])
    psnr = -10 * torch.log10(((back - test) / 2).square().flatten(1).mean(1))
    return {"psnr": psnr.mean().item(), "worst": psnr.min().item()}


def test_pictures(count: int = 24) -> Tensor:
    """Sources and targets of held-out edits, (2 count, 3, 1, S, S)."""
    edits = [scenes.make_edit(i, "held-out") for i in range(count)]
    return to_tensor(np.stack([scenes.draw(s)[None] for e in edits for s in (e.source, e.target)]))


def test_clips(count: int = 12, frames: int = 9) -> Tensor:
    """Held-out edits as clips, (count, 3, frames, S, S)."""
    return to_tensor(np.stack([scenes.clip(scenes.make_edit(i, "held-out"), frames) for i in range(count)]))


def write(vae: AutoencoderKLWan, folder: Path) -> None:
    """Save with the statistics of its latents, by which denoisers normalise them."""
    pictures = torch.cat([to_tensor(random_pictures(-100 - i, 16)[:, None]) for i in range(8)])
    with torch.no_grad():
        parts = [part.to(vae.device) for part in pictures.split(16)]
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    vae.config = vae.config.replace(
        latents_mean=tuple(round(v, 4) for v in mean.tolist()),
        latents_std=tuple(round(v, 4) for v in std.tolist()),
    )
    vae.save_pretrained(folder)


def random_pictures(index: int, count: int) -> np.ndarray:
    """Pictures of the training world, (count, S, S, 3): sources, targets and what is between them."""
    rng = np.random.default_rng((7, abs(index), index < 0))
    pictures = []
    for _ in range(count):
        edit = scenes.make_edit(int(rng.integers(2**31)))
        progress = (0.0, 1.0, float(rng.uniform()))[int(rng.integers(3))]
        pictures.append(scenes.draw(edit.between(progress)))
    return np.stack(pictures)


def crops(index: int, count: int) -> Tensor:
    """Training batch number `index`: (count, 3, 1, CROP, CROP) in [-1, 1]."""
    rng = np.random.default_rng((8, abs(index), index < 0))
    cut = []
    for picture in random_pictures(index, count):
        top, left = rng.integers(0, scenes.SIZE - CROP + 1, 2)
        picture = picture[top : top + CROP, left : left + CROP]
        cut.append(picture[:, ::-1] if rng.integers(2) else picture)
    return to_tensor(np.stack(cut)[:, None])


def some_clips(index: int, count: int) -> Tensor:
    """Training clips, (count, 3, 5 or 9 frames, CROP, CROP) in [-1, 1]: of the whole edit in so few frames,
    or out of the middle of a long film of it."""
    rng = np.random.default_rng((9, index))
    frames, whole = int(rng.choice((5, 9))), bool(rng.integers(2))
    cut = []
    for _ in range(count):
        edit = scenes.make_edit(int(rng.integers(2**31)))
        start = 0 if whole else 4 * int(rng.integers((FILM - frames) // 4 + 1))
        clip = scenes.clip(edit, frames if whole else FILM, only=slice(start, start + frames))
        top, left = rng.integers(0, scenes.SIZE - CROP + 1, 2)
        cut.append(clip[:, top : top + CROP, left : left + CROP])
    return to_tensor(np.stack(cut))


def to_tensor(frames: np.ndarray) -> Tensor:
    """(B, T, H, W, 3) in [0, 1] -> (B, 3, T, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "b t h w c -> b c t h w") * 2 - 1
