"""Training the SD VAE of the small DiffEdit checkpoint.

Two stages. `pictures`: encoder and decoder. `decoder`: the encoder rests, so the latents no longer change and
a denoiser may start on them; the decoder learns to put up with latents that are not quite right, as a
denoiser's are.

Twelve numbers of a picture become one, as in the WAN VAE, but here on 4 x 4 pixels instead of 8 x 8: a
denoiser of 16 x 16 latents is what two processor cores can train.

B batch   C channels   S size of pictures
Source of the recipe: `wan_vae`.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.shapes import scenes
from benchmarks.shapes.init_sd_vae import initialize_sd_vae
from benchmarks.shapes.training import SAVE_EVERY, Log, parameters_of
from benchmarks.shapes.wan_vae import make_optimizer, weighed
from joyedit.models.latents import DiagonalGaussian
from joyedit.models.sd_vae import AutoencoderKL, AutoencoderKLConfig
from joyedit.training.run import Run, Stopping, rate_at
from joyedit.training.turns import turns

SIZE = 64  # pixels; the shapes are as large a part of the picture as everywhere
COUNTS = (1, 2, 2, 3)  # shapes in a scene

CPU = torch.device("cpu")

# Wide where the maps are small, which is where width is cheap.
CONFIG = AutoencoderKLConfig(
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(8, 16, 48),
    layers_per_block=1,
    norm_num_groups=1,
    sample_size=SIZE,
    scaling_factor=1.0,
)
BATCH = 8
SAMPLES = {"pictures": 16_000, "decoder": 20_000}
RATES = {"pictures": 4e-3, "decoder": 3e-3}
NOISE = 0.2  # most of what the decoder is taught to put up with, as a share of the deviation of latents


def train(
    folder: Path,
    scale: float = 1.0,
    seed: int = 0,
    device: torch.device = CPU,
    stages: Sequence[str] = ("pictures", "decoder"),
) -> None:
    """Train, or go on, in `folder`; `folder/vae` is the checkpoint. `scale`: of the numbers of samples."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(CONFIG)
    initialize_sd_vae(vae, torch.cat([pictures(-i, 8) for i in range(1, 13)]))
    vae.to(device, memory_format=torch.channels_last)
    test = test_pictures().to(device)
    for stage in stages:
        optimizer = make_optimizer(trained(vae, stage), RATES[stage])
        run = Run(folder / stage, parameters_of({"vae": vae}), optimizer, decay=0.998)
        log, steps = Log(run, BATCH), math.ceil(SAMPLES[stage] * scale / BATCH)
        with Stopping() as stopping:
            for turn in turns(run, steps, stopping):
                if turn.due(250):
                    with run.averaged():
                        log.write(**judge(vae, test))
                        write(vae, folder / "vae")
                if turn.saves(SAVE_EVERY):
                    run.save()
                if turn.ends:
                    break
                run.set_rate(rate_at(run.step, steps, RATES[stage], "cosine", 50, least=0.02))
                loss, parts = reconstruction_loss(vae, pictures(log.samples, BATCH).to(device), stage)
                loss.backward()
                run.update(clip=math.inf)
                log.add(**parts)
        with run.averaged():
            vae = copy.deepcopy(vae)


def reconstruction_loss(vae: AutoencoderKL, pixels: Tensor, stage: str) -> tuple[Tensor, dict[str, float]]:
    """8 squared error + 0.3 absolute error + 0.2 absolute error of gradients + 1e-5 KL.

    pixels (B, 3, H, W) in [-1, 1]."""
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    if stage == "decoder":
        with torch.no_grad():
            mean = vae.encode_tile(pixels).chunk(2, dim=1)[0]
            std = mean.std(dim=(0, 2, 3), keepdim=True)
            noise = NOISE * torch.rand(len(mean), 1, 1, 1, device=mean.device) * std
            z, kl = mean + noise * torch.randn_like(mean), torch.zeros(())
    else:
        posterior = DiagonalGaussian(vae.encode_tile(pixels))
        z = posterior.sample()
        kl = 0.5 * (posterior.mean.square() + posterior.std.square() - 1 - posterior.logvar).sum(1).mean()
    return weighed(vae.decode_tile(z) - pixels, kl)


def trained(vae: AutoencoderKL, stage: str) -> list[nn.Parameter]:
    """What learns in a stage; everything else gets `requires_grad` False."""
    for name, p in vae.named_parameters():
        p.requires_grad_(stage != "decoder" or not name.startswith(("encoder.", "quant_conv.")))
    return [p for p in vae.parameters() if p.requires_grad]


@torch.no_grad()
def judge(vae: AutoencoderKL, test: Tensor) -> dict[str, float]:
    """PSNR in dB of what comes back of held-out pictures, mean and worst."""
    back = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in test.split(16)])
    psnr = -10 * torch.log10(((back - test) / 2).square().flatten(1).mean(1))
    return {"psnr": psnr.mean().item(), "worst": psnr.min().item()}


def test_pictures(count: int = 32) -> Tensor:
    """Sources and targets of held-out caption pairs, (2 count, 3, S, S)."""
    pairs = [scenes.make_caption_pair(i, "held-out", size=SIZE) for i in range(count)]
    return to_tensor([scenes.draw(s, SIZE) for pair in pairs for s in (pair.source, pair.target)])


def write(vae: AutoencoderKL, folder: Path) -> None:
    """Save with the scale by which denoisers see latents of unit variance."""
    with torch.no_grad():
        parts = [vae.encode(pictures(-100 - i, 16).to(vae.device)).latent_dist.mode() for i in range(8)]
    vae.config = vae.config.replace(scaling_factor=round(1 / torch.cat(parts).std().item(), 5))
    vae.save_pretrained(folder)


def pictures(index: int, count: int) -> Tensor:
    """Training batch number `index`: (count, 3, S, S) in [-1, 1]."""
    rng = np.random.default_rng((10, abs(index), index < 0))
    numbers = [int(rng.integers(2**31)) for _ in range(count)]
    return to_tensor([scenes.draw(training_scene(number, COUNTS), SIZE) for number in numbers])


def training_scene(index: int, counts: Sequence[int]) -> scenes.Scene:
    """Scene number `index` of the training world, with as many shapes as one of `counts`."""
    rng = np.random.default_rng((scenes.SPLITS["train"], 11, index))
    return scenes.random_scene(rng, counts[int(rng.integers(len(counts)))])


def to_tensor(frames: Sequence[np.ndarray]) -> Tensor:
    """Pictures (H, W, 3) in [0, 1] -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous() * 2 - 1
