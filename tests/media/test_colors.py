"""Colours of a result brought back to the photograph's: a known drift is found in spite of an edit."""

import numpy as np
import pytest
import torch
from skimage import data

from joyedit.media.colors import fit_gain_and_offset, match_colors

GAIN, OFFSET = (0.9, 1.1, 0.8), (0.06, -0.04, 0.1)


@pytest.fixture(scope="module")
def photo():
    """(3, H, W) in [0.15, 0.85], so that no drift of the tests is cut off."""
    pixels = torch.from_numpy(data.astronaut()[::3, ::3].copy()).permute(2, 0, 1) / 255
    return 0.15 + 0.7 * pixels


def drifted(photo):
    gain, offset = (torch.tensor(values)[:, None, None] for values in (GAIN, OFFSET))
    return photo * gain + offset


def edited(picture, kind, share):
    """The picture with a share of its pixels replaced."""
    _, height, width = picture.shape
    generator = torch.Generator().manual_seed(0)
    picture = picture.clone()
    if kind == "noise":
        where = torch.rand(height, width, generator=generator) < share
        picture[:, where] = torch.rand(3, int(where.sum()), generator=generator)
    elif kind == "patch":
        picture[:, : round(height * share)] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    else:  # the same place, darker
        picture[:, : round(height * share)] *= 0.4
    return picture


@pytest.mark.parametrize("kind", ["noise", "patch", "darker"])
def test_a_known_gain_and_offset_are_found_beside_30_percent_that_is_edited(photo, kind):
    result = edited(
        drifted(photo) + 0.01 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(1)),
        kind,
        0.3,
    )
    gain, offset = fit_gain_and_offset(result.flatten(1).double(), photo.flatten(1).double())
    np.testing.assert_allclose(gain, 1 / np.array(GAIN), atol=0.02)
    np.testing.assert_allclose(offset, -np.array(OFFSET) / GAIN, atol=0.01)
    kept = edited(torch.zeros_like(photo), kind, 0.3).sum(0) == 0
    if kind == "darker":
        kept = torch.arange(photo.shape[1])[:, None].expand(photo.shape[1:]) >= round(photo.shape[1] * 0.3)
    before, after = ((one - photo)[:, kept].abs().mean() for one in (result, match_colors(result, photo)))
    assert after < 0.012 < 0.025 < before


def test_without_drift_hardly_anything_changes(photo):
    assert (match_colors(photo, photo) - photo).abs().max() < 1e-6
    result = edited(photo, "patch", 0.3)
    assert (match_colors(result, photo) - result).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["noise", "patch"])
def test_an_edit_of_nearly_everything_is_left_alone(photo, kind):
    result = edited(drifted(photo), kind, 0.7)
    assert torch.equal(match_colors(result, photo), result)


def test_grey_is_not_coloured_and_a_flat_picture_not_stretched(photo):
    grey = photo.mean(0).expand(3, -1, -1)
    spread = [(one.amax(0) - one.amin(0)).mean() for one in (match_colors(grey, photo), photo)]
    assert spread[0] < 0.3 * spread[1]
    flat = torch.full((3, 40, 40), 0.5)
    torch.testing.assert_close(match_colors(flat + 0.03, flat), flat)
    assert torch.equal(match_colors(photo * 0.3, photo), photo * 0.3)  # a gain of 3 is no drift


def test_only_the_pixels_that_are_named_are_compared(photo):
    where = torch.zeros(photo.shape[1:], dtype=torch.bool)
    where[:40] = True
    result = drifted(photo)
    result[:, 40:] = 0.2  # three quarters, which none of it says anything about
    matched = match_colors(result, photo, where)
    assert (matched - photo)[:, :40].abs().max() < 1e-3
    expected = (0.2 - np.array(OFFSET)) / GAIN
    np.testing.assert_allclose(matched[:, 50, 3], expected, atol=1e-3)
    few = torch.zeros_like(where)
    few[:7, :9] = True
    assert torch.equal(match_colors(result, photo, few), result)
