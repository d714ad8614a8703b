"""Where a photograph lies in the picture that the networks work at, and the way there and back.

The networks take pictures of certain sizes, here called buckets. Three ways lead into one: the photograph
covers it and what sticks out is cut off (`covering`, JoyAI-Image's own), it is stretched to it (`stretched`,
ChronoEdit's own), or it lies in it as a whole, with its edge pixels repeated around it (`padded`). The third
is for results that have the photograph's size again, or one that is asked for: nothing is lost and nothing
stretched, and the padding is cut off again.

H, W pixels. Sizes are (height, width), sides (top, left, bottom, right). A point y of the photograph is at
(y - crop.top) * scale + padding.top of the bucket, both measured from the upper edge of the first pixel.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from joyedit.media.images import fit_cover

LANCZOS = PIL.Image.Resampling.LANCZOS


class Geometry(NamedTuple):
    """What became of a photograph on its way through a pipeline."""

    photo: tuple[int, int]  # pixels of the photograph
    bucket: tuple[int, int]  # pixels that the networks worked at
    scale: tuple[float, float]  # bucket pixels per photograph pixel, down and across
    crop: tuple[float, float, float, float]  # photograph pixels that the networks did not see
    padding: tuple[int, int, int, int]  # bucket pixels that are no photograph
    size: tuple[int, int]  # pixels of the result

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what the networks saw of the photograph, as Pillow counts."""
        top, left, bottom, right = self.crop
        return left, top, self.photo[1] - right, self.photo[0] - bottom

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of the photograph within the bucket."""
        top, left, bottom, right = self.padding
        return self.bucket[0] - top - bottom, self.bucket[1] - left - right

    def __str__(self) -> str:
        down, across = self.scale
        scale = f"{across:.3g}" if abs(down / across - 1) < 0.01 else f"{across:.3g} across, {down:.3g} down"
        cut, around = _rows_and_columns(self.crop), _rows_and_columns(self.padding)
        photo, bucket, size = (f"{w} x {h}" for h, w in (self.photo, self.bucket, self.size))
        photo += f" less {cut}" if cut else ""
        bucket += f", {around} of padding" if around else ""
        return f"photograph of {photo}, at scale {scale} in {bucket}; result of {size}"


def _rows_and_columns(sides: Sequence[float]) -> str:
    counts = {"rows": round(sides[0] + sides[2]), "columns": round(sides[1] + sides[3])}
    return " and ".join(f"{count} {name}" for name, count in counts.items() if count)


def covering(photo: tuple[int, int], bucket: tuple[int, int]) -> Geometry:
    """Of `images.resize_center_crop`. Raises ValueError as `images.fit_cover`."""
    fit = fit_cover(photo, bucket)
    down, across = fit.height / photo[0], fit.width / photo[1]
    bottom, right = fit.height - bucket[0] - fit.top, fit.width - bucket[1] - fit.left
    crop = (fit.top / down, fit.left / across, bottom / down, right / across)
    return Geometry(photo, bucket, (down, across), crop, (0, 0, 0, 0), bucket)


def stretched(photo: tuple[int, int], bucket: tuple[int, int]) -> Geometry:
    """Of a photograph that is resized to the bucket, whatever its shape."""
    scale = (bucket[0] / photo[0], bucket[1] / photo[1])
    return Geometry(photo, bucket, scale, (0.0, 0.0, 0.0, 0.0), (0, 0, 0, 0), bucket)


def padded(photo: tuple[int, int], bucket: tuple[int, int], size: tuple[int, int]) -> Geometry:
    """Of the centre of a photograph that has the shape of `size`, as large as fits into the bucket, in the
    middle of it; the result has that size."""
    shape = min(photo[0] / size[0], photo[1] / size[1])
    seen = (size[0] * shape, size[1] * shape)
    fit = min(bucket[0] / seen[0], bucket[1] / seen[1])
    inner = [min(max(round(side * fit), 1), most) for side, most in zip(seen, bucket, strict=True)]
    down, across = inner[0] / seen[0], inner[1] / seen[1]
    rows, columns = (max(0.0, (whole - part) / 2) for whole, part in zip(photo, seen, strict=True))
    top, left = (bucket[0] - inner[0]) // 2, (bucket[1] - inner[1]) // 2
    padding = (top, left, bucket[0] - inner[0] - top, bucket[1] - inner[1] - left)
    return Geometry(photo, bucket, (down, across), (rows, columns, rows, columns), padding, size)


def to_bucket(image: Image, geometry: Geometry, resample: PIL.Image.Resampling = LANCZOS) -> Image:
    """A picture of the photograph's size as the networks work at it, edge pixels repeated in the padding."""
    height, width = geometry.inner
    inner = image.resize((width, height), resample, box=geometry.box)
    top, left, bottom, right = geometry.padding
    if inner.size == geometry.bucket[::-1]:
        return inner
    pixels = np.asarray(inner)
    around = [(top, bottom), (left, right), *[(0, 0)] * (pixels.ndim - 2)]
    return PIL.Image.fromarray(np.pad(pixels, around, mode="edge"))


def to_result(image: Image, geometry: Geometry, resample: PIL.Image.Resampling = LANCZOS) -> Image:
    """A picture of the photograph's size as it would be in the result, not by way of the bucket."""
    height, width = geometry.size
    return image.resize((width, height), resample, box=geometry.box)


def from_bucket(pixels: Tensor, geometry: Geometry) -> Tensor:
    """What the networks made, (B, C, H, W) in [-1, 1], in the size of the result: the padding is cut off and
    the rest resized with the antialiased bicubic filter."""
    top, left, _, _ = geometry.padding
    height, width = geometry.inner
    inner = pixels[..., top : top + height, left : left + width]
    if geometry.inner == geometry.size:
        return inner
    return F.interpolate(inner.float(), geometry.size, mode="bicubic", antialias=True).clamp(-1, 1)
