"""What DiffEdit is asked to do: the arguments of its methods, once they are found to fit together.

B images   L text tokens   D width   C latent channels   h, w latent size   T steps taken
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from joyedit.media.masks import LATENT_CHANNELS, to_latent_mask
from joyedit.pipelines.checks import as_number, check_count, check_output_type, check_share, is_number
from joyedit.pipelines.sd_latents import LatentCoder, check_levels
from joyedit.pipelines.sd_prompts import Embeds


class Run(NamedTuple):
    """What the UNet is run with, step by step."""

    steps: Tensor  # timesteps, (T,)
    embeds: Embeds
    adapter_scale: float | None  # of the adapters that are not fused; None leaves them alone


class MaskRun(NamedTuple):
    """What a mask is made with: `maps` noises per image, as strong as at timestep number `at`; differences
    are cut off at `ratio` times their mean."""

    at: int
    maps: int
    ratio: float
    guidance_scale: float
    adapter_scale: float | None


class Repaint(NamedTuple):
    """What is repainted where: the photographs' levels and masks, and their pixels if the call has them."""

    levels: Tensor  # (B, T or T + 1, C, h, w), noisiest first
    mask: Tensor  # (B, 1, h, w)
    pixels: Tensor | None  # (I, 3, H, W), I dividing B


def steps_taken(steps: Any, name: str, strength: Any) -> int:
    """How many of `steps` a strength in [0, 1] takes, rounded down. Raises ValueError for others."""
    steps = check_count("num_inference_steps", steps)
    return min(int(steps * check_share(name, strength)), steps)


def mask_run(
    steps: int, strength: Any, maps: Any, ratio: Any, guidance_scale: float, scale: float | None
) -> MaskRun:
    """The noise of a mask is at least one of `steps` from the clean end. Raises ValueError."""
    noised = max(steps_taken(steps, "mask_encode_strength", strength), 1)
    maps = check_count("num_maps_per_mask", maps)
    number = as_number(ratio)
    if not is_number(number) or not number > 0:
        raise ValueError(f"mask_thresholding_ratio={ratio!r}: must be above 0")
    return MaskRun(steps - noised, maps, float(number), guidance_scale, scale)


def check_picture(output_type: Any, composite: bool, pixels: Tensor | None) -> None:
    """Raises ValueError for a result that cannot be made. pixels: of the photograph, if there is one."""
    check_output_type(output_type)
    if composite and (pixels is None or pixels.shape[1] == LATENT_CHANNELS or output_type == "latent"):
        raise ValueError(
            "composite=True pastes pixels of the photograph: it needs image=, and pixels as output"
        )


def check_repaint(
    mask_image: Any, image_latents: Any, pixels: Tensor | None, batch: int, taken: int, coder: LatentCoder
) -> Repaint:
    """Raises ValueError or TypeError unless mask, levels and photograph are of `batch` images of one size,
    and the levels of a run of `taken` steps."""
    if mask_image is None or image_latents is None:
        raise ValueError("mask_image (of generate_mask) and image_latents (of invert) are both needed")
    levels = check_levels(image_latents, batch, taken)
    size = (levels.shape[3], levels.shape[4])
    mask = to_latent_mask(mask_image, size, batch)
    if pixels is not None and coder.size(pixels) != size:
        raise ValueError(f"image makes latents of {coder.size(pixels)}, image_latents are {size}")
    return Repaint(levels, mask, pixels)


def check_start(latents: Tensor | None, shape: Sequence[int], batch: int, copies: int) -> None:
    """Raises ValueError for latents to start from that are not `shape` for each image, or for each copy."""
    starts = [(count, *shape) for count in (batch, batch * copies)]
    if latents is not None and tuple(latents.shape) not in starts:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, wanted {starts[-1]}")
