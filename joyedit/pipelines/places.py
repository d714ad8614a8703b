"""Where an edit may change a photograph, and the size in which the result comes back.

A mask keeps what lies outside in two ways. After every step, the latents outside are put back to what the
photograph's are at that noise level, (1 - sigma) z0 + sigma eps with the noise that the run began with, so
that what is made inside fits to them. And in the end the photograph's own pixels are pasted over the result,
with a soft edge that lies inside the mask: no autoencoder has touched what is outside.

White, at least half, says: edit here. At another size a pixel is white if any white is in it, and so is a
latent if any of its pixels is.

B prompts   N results, N / B in a row of each   H, W pixels   C latent channels   h, w latents (pixels / 8)
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from joyedit.checkpoints.plain_text import shown
from joyedit.media import geometry as geo
from joyedit.media import images as im
from joyedit.media.colors import match_colors
from joyedit.media.geometry import Geometry
from joyedit.media.masks import soft_edge, to_pixel_masks
from joyedit.pipelines.checks import as_number, is_integer

EDGE = 4  # pixels of the bucket over which an edit fades into the photograph: half a latent
SHORTEST_SIDE = 16
LARGEST_RESULT = 4  # times the bucket's pixels, unless the photograph has more

Fit = Callable[[tuple[int, int], tuple[int, int]], Geometry]  # a pipeline's own way into a bucket


class Asked(NamedTuple):
    """What a call asks: its arguments, as far as each is checked without the photograph."""

    mask: Any = None
    size: str | tuple[int, int] | None = None  # "input", or height and width
    match_colors: bool = False
    output_type: str = "pil"

    @classmethod
    def of(
        cls, mask: Any, size: Any, match: Any, output_type: str | None, photo: Any, sides: Sequence[Any]
    ) -> "Asked":
        """photo: what the call gave as image. sides: its height and width, None where it did not say them.

        Raises ValueError for values and combinations that are not possible.
        """
        output_type = output_type or "pil"
        size = check_size(size)
        if not isinstance(match, (bool, np.bool_)):
            raise ValueError(f"match_colors={shown(match, 40)}: must be True or False")
        for name, given in (("mask", mask is not None), ("match_colors", match), ("size", size == "input")):
            if given and photo is None:
                raise ValueError(f"{name} needs image: it is about a photograph")
        for name, given in (("size", size is not None), ("match_colors", match)):
            if given and output_type == "latent":
                raise ValueError(f"{name} is about pixels: output_type='latent' has none")
        if size is not None and any(side is not None for side in sides):
            raise ValueError(f"size={size!r} says how large the result is: leave out height and width")
        return cls(mask, size, bool(match), output_type)

    def shape(self, photo: tuple[int, int]) -> tuple[int, int]:
        """The shape (height, width) that the bucket is chosen by."""
        return self.size if isinstance(self.size, tuple) else photo

    def geometry(self, photo: tuple[int, int], bucket: tuple[int, int], own: Fit) -> Geometry:
        """How a photograph of this size goes into the bucket, by the pipeline's own way if no size is asked
        for. Raises ValueError for a size that is too large for it."""
        if self.size is None:
            return own(photo, bucket)
        size = self.shape(photo)
        most = max(LARGEST_RESULT * bucket[0] * bucket[1], photo[0] * photo[1])
        if size[0] * size[1] > most:
            raise ValueError(
                f"size={size} (height, width) has too many pixels: at most {most:,}, "
                f"{LARGEST_RESULT} times those worked at or as many as the photograph"
            )
        return geo.padded(photo, bucket, size)

    def padded(
        self, photos: Sequence[Image], bucket: tuple[int, int], resample: PIL.Image.Resampling
    ) -> list[Image]:
        """Photographs in the bucket, where a size is asked for; one that is there several times stays one
        object."""
        sizes = {id(photo): (photo.height, photo.width) for photo in photos}
        ways = {key: geo.padded(size, bucket, self.shape(size)) for key, size in sizes.items()}
        made = {id(photo): geo.to_bucket(photo, ways[id(photo)], resample) for photo in photos}
        return [made[id(photo)] for photo in photos]


def check_size(size: Any) -> str | tuple[int, int] | None:
    """Raises ValueError unless it is None, "input" or a height and a width of at least SHORTEST_SIDE."""
    if size is None or (isinstance(size, str) and size == "input"):
        return size
    sides = [as_number(side) for side in size] if isinstance(size, (list, tuple)) else []
    if len(sides) != 2 or not all(is_integer(side) and side >= SHORTEST_SIDE for side in sides):
        allowed = f"None, 'input' or (height, width), both at least {SHORTEST_SIDE} pixels"
        raise ValueError(f"size={shown(size, 80)}: must be {allowed}")
    return int(sides[0]), int(sides[1])


class Known(NamedTuple):
    """What is kept of latents (N, ..., h, w), and where they may change."""

    clean: Tensor  # (N, ..., h, w), of the photographs
    noise: Tensor  # of the same shape, what the run began with
    editable: Tensor  # bool, of a shape that broadcasts

    def put_back(self, latents: Tensor, sigma: Tensor | float) -> Tensor:
        """Latents of noise level `sigma` with the photograph's outside the mask."""
        known = (1 - sigma) * self.clean + sigma * self.noise
        return torch.where(self.editable, latents, known.to(latents))

    def frames(self, index: Sequence[int]) -> "Known":
        """Of these latent frames (N, C, T, h, w) alone."""
        return Known(self.clean[:, :, index], self.noise[:, :, index], self.editable)


class Places(NamedTuple):
    """What is known of the results of a call beside their latents, for each of B prompts."""

    asked: Asked
    geometries: list[Geometry]
    photos: list[Image] | None  # in the size of the result; None where they are not needed
    masks: list[Tensor] | None  # (H, W) bool in the size of the result
    cells: Tensor | None  # (B, h, w) bool: the latents that may change

    @classmethod
    def of(
        cls,
        asked: Asked,
        photos: Sequence[Image] | None,
        batch: int,
        bucket: tuple[int, int],
        own: Fit,
        working: list[Image] | None = None,
        cell: int = 8,
    ) -> "Places":
        """photos: those of `batch` prompts, if there are any. own: the pipeline's way into the bucket.
        working: those photographs as they came there, where `geometry.to_result` is not exactly the same.
        cell: pixels of a latent, in height and width.

        Raises ValueError or TypeError for a mask of another size than its photograph, one without white where
        the networks look, and photographs of several sizes where the output is one array.
        """
        sizes = [bucket] * batch if photos is None else [(photo.height, photo.width) for photo in photos]
        geometries = [asked.geometry(size, bucket, own) for size in sizes]
        if len({one.size for one in geometries}) > 1 and asked.output_type != "pil":
            raise ValueError(
                f"size='input' with photographs of several sizes: output_type={asked.output_type!r} is one "
                "array, 'pil' is not"
            )
        masks = cells = shown_photos = None
        if asked.mask is not None:
            given = list(zip(masks_of_each(asked.mask, sizes), geometries, strict=True))
            cells = torch.stack([_cells(mask, geometry, cell) for mask, geometry in given])
            if not cells.flatten(1).any(1).all():
                raise ValueError("mask has no white where the networks see the photograph")
            masks = [_resized(mask, geometry, geo.to_result) for mask, geometry in given]
        if asked.mask is not None or asked.match_colors:
            if working is None or asked.size is not None:
                pairs = zip(photos or [], geometries, strict=True)
                working = [geo.to_result(photo, geometry) for photo, geometry in pairs]
            shown_photos = [photo.convert("RGB") for photo in working]
        return cls(asked, geometries, shown_photos, masks, cells)

    @property
    def geometry(self) -> Geometry:
        """Of the first photograph."""
        return self.geometries[0]

    @property
    def untouched(self) -> bool:
        """Whether results are what the autoencoder makes, and nothing else."""
        return self.photos is None and self.asked.size is None

    def known(self, clean: Tensor | None, noise: Tensor) -> Known | None:
        """What to keep of a run from `noise` (N, ..., h, w); None without a mask."""
        if self.cells is None or clean is None:
            return None
        cells = self.cells.to(noise.device).repeat_interleave(len(noise) // len(self.cells), dim=0)
        return Known(clean, noise, cells.reshape(len(noise), *[1] * (noise.ndim - 3), *cells.shape[1:]))

    def output(self, pixels: Tensor, output_type: str) -> Any:
        """Decoded pixels (N, 3, H, W) in [-1, 1] as `images.to_output` gives them, in the sizes of the
        results, with colours and pixels of the photographs as asked."""
        if self.untouched:
            return im.to_output(pixels, output_type)
        parts = pixels.float().chunk(len(self.geometries))
        made = [im.to_output(self._finished(part, i), output_type) for i, part in enumerate(parts)]
        if output_type == "pil":
            return [picture for pictures in made for picture in pictures]
        return torch.cat(made) if output_type == "pt" else np.concatenate(made)

    def _finished(self, pixels: Tensor, i: int) -> Tensor:
        """The results (N / B, 3, H, W) of prompt i in the size that they are to have, in [-1, 1]."""
        geometry = self.geometries[i]
        pixels = geo.from_bucket(pixels, geometry)
        if self.photos is None:
            return pixels
        photo = im.to_latent_input([self.photos[i]], device=pixels.device)[0, :, 0]
        mask = None if self.masks is None else self.masks[i].to(pixels.device)
        if self.asked.match_colors:
            outside = None if mask is None else ~mask
            matched = [match_colors(one / 2 + 0.5, photo / 2 + 0.5, outside) * 2 - 1 for one in pixels]
            pixels = torch.stack(matched)
        if mask is None:
            return pixels
        edge = min(max(round(EDGE * geometry.size[0] / geometry.inner[0]), 1), 255)
        return torch.where(mask, torch.lerp(photo, pixels, soft_edge(mask, edge)), photo)


def masks_of_each(mask: Any, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """A mask (H, W) bool for each of B photographs of these sizes: one for all, or as many as divide B, in
    the order of the photographs. Raises ValueError or TypeError."""
    masks = to_pixel_masks(mask, "mask")
    if len(sizes) % len(masks):
        raise ValueError(f"{len(masks)} masks for {len(sizes)} edits: give one mask, or one for each")
    masks = masks * (len(sizes) // len(masks))
    for one, (height, width) in zip(masks, sizes, strict=True):
        if tuple(one.shape) != (height, width):
            given = f"{one.shape[1]} x {one.shape[0]}"
            raise ValueError(
                f"mask is {given} pixels, and the photograph {width} x {height}: they must be of one size"
            )
        if not one.any():
            raise ValueError("mask is all black: white, at least half, says where to edit")
    return masks


def _resized(mask: Tensor, geometry: Geometry, way: Callable[..., Image]) -> Tensor:
    """A mask of the photograph's size, (H, W) bool, in another."""
    picture = PIL.Image.fromarray(mask.numpy().astype(np.float32))
    return torch.from_numpy(np.array(way(picture, geometry, PIL.Image.Resampling.BILINEAR)) > 0)


def _cells(mask: Tensor, geometry: Geometry, cell: int) -> Tensor:
    """The latents (h, w) bool of which any pixel is white."""
    pixels = _resized(mask, geometry, geo.to_bucket)
    return F.max_pool2d(pixels[None].float(), cell)[0] > 0
