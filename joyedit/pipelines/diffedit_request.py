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
    step_cache: float | None = None  # threshold of a `StepCache`


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


def steps_taken(num_inference_steps: Any, inpaint_strength: Any) -> tuple[int, int]:
    """How many steps there are, and how many of them, rounded down, a strength in [0, 1] takes. Raises
    ValueError for others."""
    steps = check_count("num_inference_steps", num_inference_steps)
    return steps, min(int(steps * check_share("inpaint_strength", inpaint_strength)), steps)


def check_mask_run(
    num_inference_steps: Any, num_maps_per_mask: Any, mask_encode_strength: Any, mask_thresholding_ratio: Any
) -> tuple[int, int, float]:
    """`at`, `maps` and `ratio` of a `MaskRun`: the noise is at least one step from the clean end. Raises
    ValueError."""
    steps = check_count("num_inference_steps", num_inference_steps)
    noised = int(steps * check_share("mask_encode_strength", mask_encode_strength))
    maps = check_count("num_maps_per_mask", num_maps_per_mask)
    ratio = as_number(mask_thresholding_ratio)
    if not is_number(ratio) or not ratio > 0:
        raise ValueError(f"mask_thresholding_ratio={mask_thresholding_ratio!r}: must be above 0")
    return steps - max(noised, 1), maps, float(ratio)


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
