"""Pictures and masks of a partial edit: equal to diffusers where it is right, and what is accepted beyond."""

import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.deprecated.stable_diffusion_diffedit import (
    pipeline_stable_diffusion_diffedit as theirs,
)
from scipy import ndimage

from joyedit.media.masks import soft_edge, to_latent_mask, to_mask_images, to_model_pixels, to_pixel_masks


def photo(width: int, height: int, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return PIL.Image.fromarray(noise).convert(mode)


def grid(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape)


PIXELS = torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))
PICTURES = {
    "one": photo(64, 48),
    "one to be scaled": photo(67, 45),
    "two sizes": [photo(41, 60), photo(100, 30, seed=1)],
    "array": grid(2, 37, 50, 3).astype(np.float32),
    "array of one": grid(40, 48, 3).astype(np.float32),
    "arrays": [grid(37, 50, 3).astype(np.float32)] * 2,
    "tensor": PIXELS,
    "tensor of one": PIXELS[0],
    "tensors": list(PIXELS),
    "tensors with a batch": [PIXELS, PIXELS[:1]],
    "tensor in [-1, 1]": PIXELS * 2 - 1,
    "latents": torch.randn(2, 4, 5, 7),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("multiple", [8, 2])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_pixels_equal_diffusers(kind, multiple):
    given = PICTURES[kind]
    expected = VaeImageProcessor(vae_scale_factor=multiple).preprocess(given)
    made = to_model_pixels(given, multiple)
    assert made.dtype == torch.float32 and made.is_contiguous()
    assert torch.equal(made, expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    """The reference takes an RGBA picture for latents."""
    picture = photo(33, 24, "L" if mode == "I;16" else mode)
    if mode == "I;16":
        picture = PIL.Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
    expected = to_model_pixels(picture.convert("RGB") if mode != "I;16" else photo(33, 24, "L"))
    assert torch.equal(to_model_pixels(picture), expected) and expected.shape == (1, 3, 24, 32)


def test_integers_and_other_floats_are_scaled():
    picture = photo(48, 40)
    levels = np.asarray(picture)
    expected = to_model_pixels(picture)
    assert torch.equal(to_model_pixels(levels), expected)
    assert torch.equal(to_model_pixels(levels[None].astype(np.uint16)), expected)
    assert torch.equal(to_model_pixels(torch.tensor(levels).permute(2, 0, 1)), expected)
    for made in (to_model_pixels(levels / 255), to_model_pixels((levels / 255).astype(np.float16))):
        assert made.dtype == torch.float32
        torch.testing.assert_close(made, expected, rtol=0, atol=2e-3)
    flipped = to_model_pixels(levels[:, ::-1])
    assert torch.equal(flipped, expected.flip(3))


def test_what_is_passed_in_is_not_written_to():
    given = [grid(16, 16, 3), torch.rand(1, 3, 16, 16), torch.randn(1, 4, 5, 5)]
    kept = [one.copy() if isinstance(one, np.ndarray) else one.clone() for one in given]
    for one in given:
        to_model_pixels(one).mul_(0)
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(given, kept, strict=True))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("photo.png", TypeError, "image is, or holds, a str"),
        (None, TypeError, "a NoneType"),
        ([photo(9, 9), grid(9, 9, 3)], TypeError, "all of one kind"),
        (np.array([["a"]]), TypeError, "array of <U1"),
        ([], ValueError, "empty list"),
        (grid(16, 16), ValueError, r"shape \(16, 16\)"),
        (grid(16, 16, 4), ValueError, r"shape \(16, 16, 4\)"),
        (grid(3, 16, 16), ValueError, r"shape \(3, 16, 16\)"),
        (torch.rand(4, 16, 16), ValueError, r"shape \(4, 16, 16\)"),
        (torch.zeros(1, 4, 16, 16, dtype=torch.uint8), ValueError, "latents are a floating-point tensor"),
        (torch.rand(1, 3, 16, 0), ValueError, "not empty|shape"),
        (torch.rand(1, 3, 16, 16) * 255, ValueError, r"image holds .*: must be in \[-1, 1\]"),
        (torch.full((1, 3, 16, 16), torch.nan), ValueError, "NaN or infinity"),
        (torch.full((1, 3, 16, 16), 300), ValueError, "integers must be in 0 to 255"),
        (torch.rand(1, 3, 7, 16), ValueError, "image is 16 x 7 pixels: both sides must be at least 8"),
        (photo(7, 16), ValueError, "image is 7 x 16 pixels"),
        ([torch.rand(3, 16, 16), torch.rand(3, 16, 24)], ValueError, "different sizes"),
    ],
)
def test_pictures_that_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        to_model_pixels(given)


BINARY = (grid(5, 7) > 0.4).astype(np.int64)
THREE = (grid(3, 5, 7) > 0.4).astype(np.int64)
MASKS = {
    "array": (grid(5, 7), 1),
    "array of one": (grid(1, 5, 7), 1),
    "one for a batch": (grid(5, 7), 3),
    "arrays of a batch": (grid(3, 5, 7), 3),
    "arrays with a channel": (grid(3, 1, 5, 7), 3),
    "list of arrays": ([grid(5, 7), grid(5, 7).T.reshape(5, 7)], 2),
    "generate_mask's": (THREE, 3),
    "tensor": (torch.from_numpy(grid(5, 7)), 1),
    "tensors of a batch": (torch.from_numpy(grid(3, 1, 5, 7)), 3),
    "list of tensors": ([torch.from_numpy(one) for one in grid(2, 5, 7)], 2),
    "picture": (PIL.Image.fromarray((grid(5, 7) * 255).astype(np.uint8)), 1),
    "pictures": ([PIL.Image.fromarray(one) for one in (grid(2, 5, 7) * 255).astype(np.uint8)], 2),
    "coloured picture": (photo(7, 5), 1),
    "one half": (np.full((5, 7), 0.5), 1),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_equal_diffusers(kind):
    given, batch = MASKS[kind]
    copied = given.clone() if isinstance(given, torch.Tensor) else given
    expected = theirs.preprocess_mask(copied, batch).float().expand(batch, 1, 5, 7)
    made = to_latent_mask(given, (5, 7), batch)
    assert made.dtype == torch.float32 and made.shape == (batch, 1, 5, 7)
    assert torch.equal(made, expected) and 0 < made.mean() <= 1


def test_masks_in_every_dtype():
    expected = torch.tensor(BINARY)[None, None].float()
    for dtype in (bool, np.uint8, np.int32, np.int64, np.float16, np.float64):
        assert torch.equal(to_latent_mask(BINARY.astype(dtype), (5, 7)), expected)
    for dtype in (np.uint8, np.uint16, np.int64):
        assert torch.equal(to_latent_mask((BINARY * 255).astype(dtype), (5, 7)), expected)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16):
        assert torch.equal(to_latent_mask(torch.tensor(BINARY).to(dtype), (5, 7)), expected)
    assert torch.equal(to_latent_mask(torch.tensor(BINARY * 255), (5, 7)), expected)
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    for given in (grey, torch.tensor(grey), PIL.Image.fromarray(grey)):
        assert to_latent_mask(given, (1, 4)).flatten().tolist() == [0, 0, 1, 1]


def test_mask_that_is_passed_in_is_not_written_to():
    """The reference rounds a tensor in place."""
    given = torch.rand(2, 1, 5, 7)
    kept = given.clone()
    made = to_latent_mask(given, (5, 7), 2)
    made.mul_(0)
    assert torch.equal(given, kept)
    binary = given.round()
    to_latent_mask(binary, (5, 7), 2).mul_(0)
    assert binary.any()


def test_pictures_are_scaled_by_the_nearest_pixel():
    small = PIL.Image.fromarray(BINARY.astype(np.uint8) * 255)
    large = small.resize((7 * 8, 5 * 8), PIL.Image.Resampling.NEAREST)
    expected = torch.tensor(BINARY)[None, None].float()
    for mode in ("L", "1", "RGB", "RGBA", "P"):
        assert torch.equal(to_latent_mask(large.convert(mode), (5, 7)), expected), mode
    both = to_latent_mask([small, large.transpose(PIL.Image.Transpose.ROTATE_180)], (5, 7), 2)
    assert torch.equal(both[:1], expected) and torch.equal(both[1:], expected.flip(2, 3))
    noise = (grid(40, 56) > 0.5).astype(np.uint8) * 255
    made = to_latent_mask(PIL.Image.fromarray(noise), (5, 7))
    assert np.array_equal(made[0, 0].numpy(), noise[4::8, 4::8] / 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(to_latent_mask([large, BINARY], (5, 7), 2), expected.expand(2, -1, -1, -1))


def test_mask_images_go_there_and_back():
    masks = to_latent_mask(THREE, (5, 7), 3)
    for given in (masks, masks[:, 0], torch.tensor(THREE)):
        images = to_mask_images(given)
        assert [(one.mode, one.size, one.getextrema()) for one in images] == [("L", (7, 5), (0, 255))] * 3
        assert torch.equal(to_latent_mask(images, (5, 7), 3), masks)


@pytest.mark.parametrize(
    ("given", "batch", "error", "message"),
    [
        ("mask.png", 1, TypeError, "mask_image is, or holds, a str"),
        (None, 1, TypeError, "a NoneType"),
        ([[0, 1]], 1, TypeError, "a list"),
        ([], 1, ValueError, "empty list"),
        (grid(7), 1, ValueError, r"shape \(7,\)"),
        (grid(40, 56), 1, ValueError, "mask_image is 40 x 56, but the latents are 5 x 7"),
        ([BINARY, grid(40, 56)], 2, ValueError, "mask_image is 40 x 56, but the latents are 5 x 7"),
        (grid(7, 5), 1, ValueError, "mask_image is 7 x 5, but the latents are 5 x 7"),
        (grid(1, 3, 5, 7), 1, ValueError, "must have one channel"),
        (THREE, 1, ValueError, "holds 3 masks for a batch of 1: must be 1$"),
        (THREE, 2, ValueError, "holds 3 masks for a batch of 2: must be 1 or 2"),
        (grid(5, 7) + 0.5, 1, ValueError, r"mask_image holds .*: must be in \[0, 1\]"),
        (BINARY * 255.0, 1, ValueError, r"mask_image holds 0 to 255: must be in \[0, 1\]"),
        (grid(5, 7) - 0.5, 1, ValueError, r"must be in \[0, 1\]"),
        (BINARY - 1, 1, ValueError, r"must be in \[0, 1\]"),
        (BINARY * 256, 1, ValueError, "integers must be in 0 to 255"),
        (np.full((5, 7), np.nan), 1, ValueError, "NaN or infinity"),
    ],
)
def test_masks_that_are_refused(given, batch, error, message):
    with pytest.raises(error, match=message):
        to_latent_mask(given, (5, 7), batch)


def test_masks_of_pixels_are_white_from_one_half_on():
    levels = np.array([[0, 127, 128], [255, 1, 200]], np.uint8)
    white = levels >= 128
    forms = (
        levels,
        levels[None],
        levels / 255,
        white,
        white.astype(np.int64),
        torch.from_numpy(levels)[None, None],
        PIL.Image.fromarray(levels),
        PIL.Image.fromarray(levels).convert("RGB"),
    )
    for form in forms:
        (mask,) = to_pixel_masks(form)
        assert mask.dtype == torch.bool
        np.testing.assert_array_equal(mask.numpy(), white)
    joined = to_pixel_masks([np.stack([levels, 255 - levels]), PIL.Image.fromarray(levels)])
    assert [mask.sum().item() for mask in joined] == [3, 3, 3]


def test_a_soft_edge_lies_inside_the_mask():
    """Against the distance to the nearest pixel outside, and a stroke that is narrower than the edge."""
    rng = np.random.default_rng(0)
    mask = np.zeros((60, 80), dtype=bool)
    mask[:30, 20:70] = True  # the upper border is no edge
    mask[40:43, 5:75] = True
    mask[50, 5:75] = True
    mask[rng.integers(10, 20, 3), rng.integers(30, 60, 3)] = False
    alpha = soft_edge(torch.from_numpy(mask), 5).numpy()
    assert not alpha[~mask].any() and alpha[mask].min() == pytest.approx(1 / 5)
    padded = np.pad(mask, ((1, 1), (1, 1)), mode="edge")
    distance = ndimage.distance_transform_cdt(padded, "chessboard")[1:-1, 1:-1]
    wide = mask.copy()
    wide[35:] = False
    np.testing.assert_allclose(alpha[wide & (distance >= 5)], 1)
    np.testing.assert_allclose(alpha[25:30, 45], [1, 0.8, 0.6, 0.4, 0.2])
    assert (alpha[0, 25:65] == 1).all()
    np.testing.assert_allclose(alpha[40:43, 40], [0.5, 1, 0.5])
    assert alpha[50, 40] == 1
