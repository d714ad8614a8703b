"""The picture and the mask of an edit that changes only a part, as the diffusion model takes them.

Pictures become pixels in [-1, 1] whose sides are multiples of what one latent stands for; masks become zeros
(keep) and ones (repaint) at the size of the latents, or stay at that of the photograph (`to_pixel_masks`).
Nothing that is passed in is written to.

B images   H, W pixels   h, w latents (h = H / 8, w = W / 8)
Source: diffusers `image_processor.py` (VaeImageProcessor), `pipeline_stable_diffusion_diffedit.py`.
"""

from typing import Any

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from joyedit.media.images import to_pil_list

LATENT_CHANNELS = 4


def to_model_pixels(images: Any, multiple: int = 8) -> Tensor:
    """What a pipeline was given as images -> (B, 3, H, W) float32 in [-1, 1], sides multiples of `multiple`.

    PIL images of any mode are scaled with Lanczos' filter to the size of the first, rounded down. Arrays
    (H, W, 3) or (B, H, W, 3) and tensors (3, H, W) or (B, 3, H, W), uint8 or floating point in [0, 1], are
    scaled by the nearest pixel; floating point with values below 0 is taken as [-1, 1]. Lists of one kind are
    joined. A tensor (B, 4, h, w) of floating point is latents already, and is returned as it is.

    Raises ValueError (shape, dtype, range, NaN, too small, different sizes) and TypeError, naming the
    argument.
    """
    items = list(images) if isinstance(images, (list, tuple)) else [images]
    if not items:
        raise ValueError("image is an empty list")
    if all(isinstance(item, Image) for item in items):
        pictures = to_pil_list(items, "image")
        height, width = _round_down(pictures[0].height, pictures[0].width, multiple)
        lanczos = PIL.Image.Resampling.LANCZOS
        levels = np.stack([np.asarray(one.resize((width, height), lanczos)) for one in pictures])
        return rearrange(torch.from_numpy(levels), "b h w c -> b c h w").contiguous().float() / 255 * 2 - 1

    parts = [_to_channels_first(item) for item in items]
    if len({part.shape[1:] for part in parts}) > 1:
        raise ValueError(f"image is a list of different sizes: {[tuple(part.shape) for part in parts]}")
    pixels = torch.cat(parts)
    if pixels.shape[1] == LATENT_CHANNELS:
        return pixels
    pixels = _to_unit_range(pixels, "image", lowest=-1).float()
    size = _round_down(pixels.shape[2], pixels.shape[3], multiple)
    if size != pixels.shape[2:]:
        pixels = F.interpolate(pixels, size=size)
    return pixels if pixels.min() < 0 else pixels * 2 - 1


def to_latent_mask(masks: Any, size: tuple[int, int], batch: int = 1) -> Tensor:
    """What a pipeline was given as masks -> (batch, 1, h, w) float32, 1 where a value is at least one half.

    size: (h, w) of the latents. PIL images of any mode are read as grey and scaled by the nearest pixel.
    Arrays and tensors (h, w), (B, h, w) or (B, 1, h, w) are of that size already: bool, floating point in
    [0, 1], or integers, which are 0 and 1, or else 0 to 255. Lists are joined. One mask serves the whole
    batch.

    Raises ValueError (shape, size, number, range, NaN) and TypeError, naming the argument.
    """
    items = list(masks) if isinstance(masks, (list, tuple)) else [masks]
    if not items:
        raise ValueError("mask_image is an empty list")
    mask = torch.cat([_to_mask(item, *size) for item in items])
    if len(mask) not in (1, batch):
        allowed = "1" if batch == 1 else f"1 or {batch}"
        raise ValueError(f"mask_image holds {len(mask)} masks for a batch of {batch}: must be {allowed}")
    return (mask >= 0.5).float().expand(batch, -1, -1, -1)


def to_pixel_masks(masks: Any, name: str = "mask") -> list[Tensor]:
    """What a pipeline was given as masks, each as (H, W) bool: True where a value is at least one half.

    PIL images of any mode are read as grey. Arrays and tensors (H, W), (B, H, W) or (B, 1, H, W) are bool,
    floating point in [0, 1], or integers, which are 0 and 1, or else 0 to 255. Lists are joined. Raises
    ValueError (shape, range, NaN) and TypeError, naming the argument.
    """
    items = list(masks) if isinstance(masks, (list, tuple)) else [masks]
    if not items:
        raise ValueError(f"{name} is an empty list")
    return [page >= 0.5 for item in items for page in _to_levels(item, name)]


def soft_edge(mask: Tensor, width: int) -> Tensor:
    """How much of the edit every pixel of a mask (H, W) bool shows, in [0, 1]: 0 outside; inside it rises to
    1 over `width` pixels, or over half of what is narrower than that. The picture's border is no edge.
    width: 1 to 255."""
    depth = left = mask.to(torch.uint8)
    for _ in range(width - 1):
        left = 1 - _grown(1 - left)  # without its outermost pixels
        depth = depth + left  # pixels to the outside, 1 to `width`
    summit = depth
    for _ in range(width):
        summit = _grown(summit)  # the largest depth nearby
    return depth / summit.clamp(min=1)


def _grown(levels: Tensor) -> Tensor:
    """The largest among every pixel and its eight neighbours; levels (H, W) from 0 on."""
    around = F.pad(levels, (1, 1, 1, 1))
    rows = torch.maximum(torch.maximum(around[:-2], around[1:-1]), around[2:])
    return torch.maximum(torch.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def to_mask_images(mask: Tensor) -> list[Image]:
    """Masks (B, h, w) or (B, 1, h, w) of zeros and ones -> grey PIL images of 0 and 255."""
    levels = (mask.reshape(-1, *mask.shape[-2:]) > 0).to(torch.uint8).cpu() * 255
    return [PIL.Image.fromarray(page) for page in levels.numpy()]


def mask_overlay(image: Image, mask: Image) -> Image:
    """The picture in RGB, reddened where the mask is white. A mask of another size is scaled by the nearest
    pixel."""
    picture = to_pil_list(image, "image")[0]
    white = mask.convert("L").resize(picture.size, PIL.Image.Resampling.NEAREST)
    red = PIL.Image.blend(picture, PIL.Image.new("RGB", picture.size, (255, 0, 0)), 0.5)
    return PIL.Image.composite(red, picture, white)


def paste_back(pictures: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """The original pixels (B, 3, H, W) outside the mask (B, 1, h, w), the edited pictures (B, 3, H, W)
    inside."""
    inside = F.interpolate(mask.to(pictures), size=pictures.shape[-2:]) > 0
    return torch.where(inside, pictures, pixels.to(pictures))


def _to_channels_first(item: Any) -> Tensor:
    """One picture or several -> (B, C, H, W), values as they are."""
    pixels = _to_tensor(item, "image")
    if isinstance(item, np.ndarray) and pixels.ndim in (3, 4):
        pixels = rearrange(pixels, "... h w c -> ... c h w").contiguous()
    elif pixels.ndim == 4 and pixels.shape[1] == LATENT_CHANNELS and pixels.is_floating_point():
        return pixels
    if pixels.ndim not in (3, 4) or pixels.shape[-3] != 3 or 0 in pixels.shape:
        shapes = "(H, W, 3) or (B, H, W, 3) as an array, (3, H, W) or (B, 3, H, W) as a tensor"
        latents = f"latents are a floating-point tensor (B, {LATENT_CHANNELS}, h, w)"
        raise ValueError(f"image has shape {tuple(item.shape)}: must be {shapes}; {latents}")
    return pixels if pixels.ndim == 4 else pixels[None]


def _to_mask(item: Any, height: int, width: int) -> Tensor:
    """One mask or several -> (B, 1, h, w) float32 in [0, 1]."""
    if isinstance(item, Image):
        grey = to_pil_list(item, "mask_image")[0].convert("L")
        levels = np.array(grey.resize((width, height), PIL.Image.Resampling.NEAREST))
        return torch.from_numpy(levels)[None, None].float() / 255
    mask = _to_levels(item, "mask_image")
    if mask.shape[-2:] != (height, width):
        given = f"{mask.shape[-2]} x {mask.shape[-1]}"
        raise ValueError(
            f"mask_image is {given}, but the latents are {height} x {width} (height x width): "
            "pass a PIL image to have it scaled"
        )
    return mask[:, None]


def _to_levels(item: Any, name: str) -> Tensor:
    """One mask or several, whatever their size -> (B, H, W) float32 in [0, 1]."""
    if isinstance(item, Image):
        grey = np.array(to_pil_list(item, name)[0].convert("L"))
        return torch.from_numpy(grey)[None].float() / 255
    mask = _to_tensor(item, name)
    if mask.ndim not in (2, 3, 4) or 0 in mask.shape:
        shapes = "(h, w), (B, h, w) or (B, 1, h, w)"
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: must be {shapes}, and not empty")
    if mask.ndim == 4 and mask.shape[1] != 1:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}: must have one channel")
    if not mask.is_floating_point() and mask.max() <= 1:
        mask = mask.float()  # bool, or the zeros and ones that generate_mask gives
    return _to_unit_range(mask, name, lowest=0).float().reshape(-1, *mask.shape[-2:])


def _to_tensor(item: Any, name: str) -> Tensor:
    if isinstance(item, Tensor):
        return item.detach()
    if not isinstance(item, np.ndarray):
        allowed = "PIL images, numpy arrays or tensors, all of one kind"
        raise TypeError(f"{name} is, or holds, a {type(item).__name__}: must be {allowed}")
    if item.dtype.kind not in "biuf":
        raise TypeError(f"{name} is an array of {item.dtype}: must be of numbers")
    values = np.array(item, order="C")  # a copy: torch takes no negative strides, and warns if not writable
    return torch.from_numpy(values.astype(np.int64) if values.dtype.kind in "iu" else values)


def _to_unit_range(values: Tensor, name: str, lowest: int) -> Tensor:
    """Integers of 0 to 255 to [0, 1]; floating point as it is, once its range was checked."""
    low, high = values.min().item(), values.max().item()
    if not values.is_floating_point():
        if values.dtype == torch.bool or low < 0 or high > 255:
            raise ValueError(f"{name} holds {values.dtype} of {low} to {high}: integers must be in 0 to 255")
        return values.float() / 255
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity")
    if low < lowest or high > 1:
        raise ValueError(f"{name} holds {low:.4g} to {high:.4g}: must be in [{lowest}, 1]")
    return values


def _round_down(height: int, width: int, multiple: int) -> tuple[int, int]:
    if min(height, width) < multiple:
        raise ValueError(f"image is {width} x {height} pixels: both sides must be at least {multiple}")
    return height - height % multiple, width - width % multiple
