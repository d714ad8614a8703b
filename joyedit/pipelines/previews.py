"""Previews: what a run is heading for, after each step, for next to nothing.

Of a picture's 8 x 8 pixels a latent holds, above all, their mean colour, and that almost linearly. So a
matrix of 3 x C and a constant make a small picture of latents, in place of the decoder. They are the least
squares between an autoencoder's latents of pictures and these pictures' means:

    weight, bias = argmin sum |weight latent + bias - mean of the pixels|^2

What is shown is x0, the picture that the step headed for (`denoised` of the callbacks), and not the latents
after it, which are mostly noise until the end.

The map of an autoencoder is read from `assets/previews.json`, where those of the small models stand with
their errors on pictures that they were not fitted to (`python -m benchmarks.previews` writes it). Another
autoencoder's is fitted when a preview is first made, from a few pictures that are drawn then: overlapping
shapes of all sizes ("dead leaves"), whose statistics are like those of photographs. It encodes as many pixels
as a picture of 384 x 384 has, and draws nothing from torch's generators.

B pictures   C latent channels   h, w latent size   H, W pixels, a multiple of h, w
Source of dead leaves: Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 41, 2001.
"""

import functools
import hashlib
import json
import logging
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.replacing import refuse_existing
from joyedit.media import images as im
from joyedit.models.sd_vae import AutoencoderKL
from joyedit.models.wan_vae import AutoencoderKLWan
from joyedit.pipelines.chronoedit_frames import FrameCoder
from joyedit.pipelines.pipeline import DENOISED, Pipeline, PipelineCallback
from joyedit.pipelines.sd_latents import LatentCoder

log = logging.getLogger("joyedit")

STORED = Path(__file__).parents[1] / "assets" / "previews.json"
MOST_SHOWN = 4  # of a batch
DRAWN, CELLS, LEAVES = 4, 24, 120  # pictures to fit to, latents along their sides, shapes in each

Autoencoder = AutoencoderKLWan | AutoencoderKL


class PreviewMap(NamedTuple):
    """From latents, as the denoiser has them, to mean colours in [0, 1]. The errors are of the pictures that
    it was judged by: PSNR in dB, and the share of the variance that it explains."""

    weight: Tensor  # (3, C)
    bias: Tensor  # (3,)
    psnr: float
    r2: float

    def colours(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> (B, 3, h, w) float32, about [0, 1]."""
        weight, bias = self.weight.to(latents.device), self.bias.to(latents.device)
        return torch.einsum("dc,bchw->bdhw", weight, latents.float()) + bias[:, None, None]

    def judged_by(self, latents: Tensor, pixels: Tensor) -> "PreviewMap":
        """With the errors on these latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]."""
        wanted = mean_colours(pixels, latents)
        error = (self.colours(latents) - wanted).square().mean().item()
        spread = (wanted - wanted.mean((0, 2, 3), keepdim=True)).square().mean().item()
        psnr = -10 * math.log10(max(error, 1e-10))
        return self._replace(psnr=psnr, r2=1 - error / max(spread, 1e-10))


def mean_colours(pixels: Tensor, latents: Tensor) -> Tensor:
    """Of pixels (B, 3, H, W) in [-1, 1] the mean in [0, 1] over what is one latent: (B, 3, h, w)."""
    return F.avg_pool2d(pixels.float().clamp(-1, 1) / 2 + 0.5, pixels.shape[-1] // latents.shape[-1])


def fit_map(latents: Tensor, pixels: Tensor) -> PreviewMap:
    """The least squares for latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1], with its errors on
    these; solved in float64 on the CPU."""
    rows = rearrange(latents, "b c h w -> (b h w) c").cpu().double()
    wanted = rearrange(mean_colours(pixels, latents), "b d h w -> (b h w) d").cpu().double()
    rows = torch.cat((rows, torch.ones_like(rows[:, :1])), dim=1)
    solution = torch.linalg.lstsq(rows, wanted).solution.float()  # (C + 1, 3)
    fitted = PreviewMap(solution[:-1].T.contiguous(), solution[-1], 0.0, 0.0)
    return fitted.judged_by(latents.cpu(), pixels.cpu())


@torch.no_grad()
def map_of(pipe: Pipeline) -> PreviewMap:
    """The map of a pipeline's autoencoder, as it is stored or fitted now, which a line of the log tells.
    Raises ValueError where the pipeline has no autoencoder."""
    pipe.require("vae")
    with pipe.on_device(pipe.components["vae"]) as vae:
        found = stored_maps().get(fingerprint(vae))
        if found is not None:
            return found
        start = time.monotonic()
        pixels = dead_leaves(DRAWN, CELLS * pixels_per_latent(vae)).to(pipe.device)
        fitted = fit_map(encode(vae, pixels), pixels)
    text = (
        "previews: fitted to the autoencoder in %.1f s (%.1f dB, %.0f %% of the variance of drawn pictures)"
    )
    log.info(text, time.monotonic() - start, fitted.psnr, 100 * fitted.r2)
    return fitted


@functools.cache
def stored_maps() -> dict[str, PreviewMap]:
    """Those in the package, by the fingerprints of their autoencoders."""
    numbers = functools.partial(torch.tensor, dtype=torch.float32, device="cpu")
    return {
        key: PreviewMap(numbers(one["weight"]), numbers(one["bias"]), one["psnr"], one["r2"])
        for key, one in read_json(STORED).items()
    }


def fingerprint(vae: Autoencoder) -> str:
    """What tells autoencoders apart, in whatever dtype they were loaded: the layers on both sides of the
    latents, rounded to bf16, and how a denoiser's latents are scaled. 16 hexadecimal digits."""
    names = ("latents_mean", "latents_std", "scaling_factor")
    digest = hashlib.sha256(json.dumps([vae.config.get(name) for name in names]).encode())
    for layer in (vae.quant_conv, vae.post_quant_conv):
        for parameter in layer.parameters():
            levels = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(levels.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def pixels_per_latent(vae: Autoencoder) -> int:
    """In height and in width."""
    return vae.config.factor if isinstance(vae, AutoencoderKL) else vae.config.scale_factor_spatial


def encode(vae: Autoencoder, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] -> the latents (B, C, h, w) fp32 that a denoiser is to make of them."""
    if isinstance(vae, AutoencoderKL):
        return LatentCoder(vae).encode(pixels, len(pixels), pixels.device)
    film = pixels.to(vae.dtype)[:, :, None]
    return FrameCoder(vae).condition(film, frames=1)[:, -vae.config.z_dim :, 0]


def dead_leaves(count: int, side: int) -> Tensor:
    """Pictures of random ellipses and rectangles, the large ones behind: (count, 3, side, side) in [-1, 1].
    The same ones each time."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        picture = PIL.Image.new("RGB", (side, side), tuple(rng.integers(0, 256, 3).tolist()))
        drawing = PIL.ImageDraw.Draw(picture)
        for radius in sorted(2 + side / 2 * rng.random(LEAVES) ** 2, reverse=True):
            x, y = rng.uniform(0, side, 2)
            across = radius * rng.uniform(0.5, 1.5)
            draw = drawing.ellipse if rng.random() < 0.5 else drawing.rectangle
            colour = tuple(rng.integers(0, 256, 3).tolist())
            draw((x - across, y - radius, x + across, y + radius), fill=colour)
        pictures.append(picture)
    return im.to_latent_input(pictures)[:, :, 0]


def edited_latents(denoised: Tensor) -> Tensor:
    """Of latents as a pipeline's callbacks get them those of the edited pictures, (B, C, h, w): of films
    (B, C, T, h, w) the last frame; JoyImage has (B, 1, C, 1, h, w)."""
    if denoised.ndim == 6:
        return denoised[:, 0, :, -1]
    return denoised[:, :, -1] if denoised.ndim == 5 else denoised


class Preview(PipelineCallback):
    """A `callback_on_step_end` that makes a picture of every step, for all pipelines that edit.

        preview = joyedit.previews.Preview("preview.png")
        pipe(photo, "make it red", callback_on_step_end=preview)

    It has the size that the run works at and the detail of latents. It is in `image` and, if there is one, in
    `file`, which is written anew each time, whole, in the format of its suffix, and stays after the run.
    Of a batch the first four are side by side. Nothing of the run changes. A file that cannot be written
    ends no run: a warning says it, and `image` goes on. Give one object to one call at a time.

    Raises ValueError for a suffix that cannot be written, FileExistsError for a file that exists, without
    `force`; what is written over later is the preview's own.
    """

    def __init__(self, file: str | Path | None = None, *, force: bool = False):
        super().__init__()
        self.file = None if file is None else Path(file)
        self.image: PIL.Image.Image | None = None
        self._force = force
        self._map: PreviewMap | None = None
        self._fitted_to: Any = None
        if self.file is not None:
            im.format_of(self.file)
            if not force:
                refuse_existing(self.file)

    @property
    def tensor_inputs(self) -> list[str]:
        return [DENOISED]

    @torch.no_grad()
    def callback_fn(
        self, pipeline: Pipeline, step_index: int, timestep: Tensor, callback_kwargs: dict
    ) -> dict:
        """See `PipelineCallback`; `callback_kwargs` comes back as it is."""
        vae = pipeline.components["vae"]
        if self._map is None or self._fitted_to is not vae:
            self._map, self._fitted_to = map_of(pipeline), vae
        latents = edited_latents(callback_kwargs[DENOISED])[:MOST_SHOWN]
        pictures = im.to_output(2 * self._map.colours(latents).nan_to_num() - 1, "pil")
        scale = pixels_per_latent(vae)
        size = (latents.shape[-1] * scale, latents.shape[-2] * scale)
        pictures = [picture.resize(size, PIL.Image.Resampling.BICUBIC) for picture in pictures]
        self.image = im.make_image_grid(pictures, 1, len(pictures))
        self._write(self.image)
        return callback_kwargs

    def _write(self, image: PIL.Image.Image) -> None:
        if self.file is None:
            return
        try:
            im.save_picture(image, self.file, force=self._force)
            self._force = True
        except OSError as error:
            log.warning("the preview is not written any more: %s", error)
            self.file = None
