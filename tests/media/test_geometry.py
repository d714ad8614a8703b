"""The way of a photograph into a bucket and back: where points come to lie, and that nothing is moved."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from joyedit.media.geometry import Geometry, covering, from_bucket, padded, stretched, to_bucket, to_result
from joyedit.media.images import resize_center_crop, to_latent_input, to_output

PHOTO, BUCKET = (180, 250), (112, 144)
DOTS = tuple(
    (y, x) for y in range(30, 170, 40) for x in range(25, 240, 40)
)  # centres, from the upper left edge


@functools.cache
def dotted(dots=DOTS, size=PHOTO):
    """White discs on black, drawn at eight times the size."""
    y, x = (np.arange(8 * side) / 8 + 1 / 16 for side in size)
    levels = np.zeros((len(y), len(x)))
    for cy, cx in dots:
        levels[(y[:, None] - cy) ** 2 + (x - cx) ** 2 < 8**2] = 255
    levels = levels.reshape(size[0], 8, size[1], 8).mean((1, 3)).round().astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")


def centres(picture):
    """Centroids of the discs, in pixels from the upper left edge."""
    levels = np.asarray(picture.convert("L"), dtype=float)
    found, count = ndimage.label(levels > 60)
    middles = ndimage.center_of_mass(
        np.where(levels > 20, levels, 0), ndimage.grey_dilation(found, 5), range(1, count + 1)
    )
    return np.array(middles) + 0.5


def nearest(points, others):
    """For each of the points the distance to the nearest of the others."""
    return np.linalg.norm(np.array(points)[:, None] - np.array(others)[None], axis=-1).min(1)


def whole(points, scale, box):
    """Which discs lie within top, left, bottom and right, filters included."""
    margin = 8 * scale + 3
    low, high = np.array(box[:2]) + margin, np.array(box[2:]) - margin
    return ((points > low) & (points < high)).all(1)


WAYS = {
    "covering": covering(PHOTO, BUCKET),
    "stretched": stretched(PHOTO, BUCKET),
    "padded": padded(PHOTO, BUCKET, PHOTO),
    "smaller": padded(PHOTO, BUCKET, (90, 70)),
    "larger": padded(PHOTO, BUCKET, (200, 260)),
}
every_way = pytest.mark.parametrize("geometry", WAYS.values(), ids=WAYS)


@every_way
def test_points_lie_in_the_bucket_where_the_geometry_says(geometry):
    expected = (np.array(DOTS) - geometry.crop[:2]) * geometry.scale + geometry.padding[:2]
    found = centres(to_bucket(dotted(), geometry))
    top, left, bottom, right = geometry.padding
    photo = (top, left, BUCKET[0] - bottom, BUCKET[1] - right)
    inside = whole(expected, max(geometry.scale), photo)
    assert sum(inside) >= 4
    assert nearest(expected[inside], found).max() < 0.15


@every_way
def test_the_way_back_ends_within_half_a_pixel_of_the_photograph(geometry):
    """What networks that change nothing would return."""
    worked_at = to_latent_input([to_bucket(dotted(), geometry)])[:, :, 0]
    (result,) = to_output(from_bucket(worked_at, geometry))
    assert result.size == geometry.size[::-1]
    seen = np.array(PHOTO) - geometry.crop[:2] - geometry.crop[2:]
    expected = (np.array(DOTS) - geometry.crop[:2]) * geometry.size / seen
    inside = whole(expected, max(geometry.size / seen), (0, 0, *geometry.size))
    assert sum(inside) >= 4
    assert nearest(expected[inside], centres(result)).max() < 0.3
    assert nearest(expected[inside], centres(to_result(dotted(), geometry))).max() < 0.3


def test_covering_is_the_resize_and_crop_that_there_was():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 12, 3), np.uint8)).resize(
        (250, 180)
    )
    old = np.asarray(resize_center_crop(picture, *BUCKET), dtype=int)
    new = np.asarray(to_bucket(picture, covering(PHOTO, BUCKET), Image.Resampling.BILINEAR), dtype=int)
    assert np.abs(old - new).max() <= 2


def test_padding_repeats_the_edges_and_what_fits_exactly_is_copied():
    picture = dotted()
    geometry = padded((64, 96), (96, 96), (64, 96))
    small = picture.resize((96, 64))
    pixels = np.asarray(to_bucket(small, geometry))
    assert geometry.padding == (16, 0, 16, 0) and geometry.scale == (1, 1) and geometry.crop == (0, 0, 0, 0)
    np.testing.assert_array_equal(pixels[16:80], np.asarray(small))
    np.testing.assert_array_equal(pixels[:16], np.repeat(np.asarray(small)[:1], 16, 0))
    np.testing.assert_array_equal(pixels[80:], np.repeat(np.asarray(small)[-1:], 16, 0))
    levels = to_latent_input([to_bucket(small, geometry)])[:, :, 0]
    assert to_output(from_bucket(levels, geometry))[0].tobytes() == small.tobytes()


def test_any_sizes_fit():
    """Of any photograph and size: nothing but padding is beside what is seen, in the middle, as large as can
    be, and of the wanted shape to within a pixel of the bucket."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        photo, bucket, size = (tuple(int(n) for n in rng.integers(16, 400, 2)) for _ in range(3))
        g = padded(photo, bucket, size)
        assert min(g.padding) >= 0 and min(g.crop) >= 0 and min(g.inner) >= 1
        assert abs(g.padding[0] - g.padding[2]) <= 1 and abs(g.padding[1] - g.padding[3]) <= 1
        assert min(g.padding[0] + g.padding[2], g.padding[1] + g.padding[3]) == 0
        seen = (photo[0] - g.crop[0] - g.crop[2], photo[1] - g.crop[1] - g.crop[3])
        assert seen[0] / seen[1] == pytest.approx(size[0] / size[1])
        assert min(g.crop[0], g.crop[1]) == pytest.approx(0, abs=1e-9)
        assert np.abs(np.array(seen) * min(bucket[0] / seen[0], bucket[1] / seen[1]) - g.inner).max() <= 1
        assert to_bucket(Image.new("RGB", photo[::-1]), g).size == bucket[::-1]
        assert from_bucket(torch.zeros(1, 3, *bucket), g).shape[2:] == size


def test_it_is_told_in_a_line():
    assert str(padded((100, 150), (96, 96), (120, 100))) == (
        "photograph of 150 x 100 less 67 columns, at scale 0.96 in 96 x 96, 16 columns of padding; "
        "result of 100 x 120"
    )
    assert str(Geometry((80, 60), (40, 60), (0.5, 1.0), (0, 0, 0, 0), (0, 0, 0, 0), (40, 60))) == (
        "photograph of 60 x 80, at scale 1 across, 0.5 down in 60 x 40; result of 60 x 40"
    )
