"""What DiffEdit's methods return.

B images   C latent channels   T steps taken   H, W pixels   h, w latent size
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from joyedit.media import images as im
from joyedit.media.clip_images import CLIPImageProcessor
from joyedit.media.masks import paste_back
from joyedit.models.clip import StableDiffusionSafetyChecker
from joyedit.pipelines.diffedit_request import Repaint
from joyedit.pipelines.pipeline import Pipeline

Images = list[Image.Image] | np.ndarray | Tensor


class StableDiffusionPipelineOutput(NamedTuple):
    images: Images
    nsfw_content_detected: list[bool] | None


class DiffEditInversionPipelineOutput(NamedTuple):
    """latents (B, T + 1, C, h, w), noisiest first, clean ones last; the pictures decoded from them, or
    None."""

    latents: Tensor
    images: Images | None


class DiffEditOutput(NamedTuple):
    """Of `edit`. mask (B, h, w) int64 of 0 and 1; heat_map (B, h, w) in [0, 1] that it was cut from, None for
    a mask that was given."""

    images: Images
    nsfw_content_detected: list[bool] | None
    mask: np.ndarray
    heat_map: np.ndarray | None


def finished(
    pipe: Pipeline, decode: Callable[[Tensor], Tensor], x: Tensor, work: Repaint, output_type: str
) -> StableDiffusionPipelineOutput:
    """Latents x (B, C, h, w) to the output type, with the photograph's pixels outside the mask, if these are
    to be pasted, and screened. decode: to pixels (B, 3, H, W)."""
    if output_type == "latent":
        return StableDiffusionPipelineOutput(x, None)
    pictures = decode(x)
    if work.pixels is not None:
        pictures = paste_back(pictures, work.pixels, work.mask)
    pictures, flagged = screened(pipe, pictures)
    return StableDiffusionPipelineOutput(im.to_output(pictures, output_type), flagged)


def screened(pipe: Pipeline, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
    """Pixels (B, 3, H, W) with flagged pictures black, and which those are; None where nobody looks."""
    checker, extractor = (pipe.components[name] for name in ("safety_checker", "feature_extractor"))
    if checker is None or extractor is None:
        return pixels, None
    with pipe.on_device(checker):
        return black_out(pixels, checker, extractor, pipe.device)


def black_out(
    pixels: Tensor, checker: StableDiffusionSafetyChecker, extractor: CLIPImageProcessor, device: torch.device
) -> tuple[Tensor, list[bool]]:
    """Pixels (B, 3, H, W) with the pictures that the checker flags in black, and which those are."""
    inputs = extractor(im.to_output(pixels, "pil"))["pixel_values"]
    _, flagged = checker(inputs.to(device, checker.dtype), pixels)
    black = torch.tensor(flagged, device=pixels.device)[:, None, None, None]
    return pixels.masked_fill(black, -1), flagged
