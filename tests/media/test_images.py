"""Images as arrays, buckets, crops, patches, tensors, grids: equal to torch, diffusers and recordings."""

import itertools
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.pipelines.joyimage import image_processor as reference
from diffusers.utils import make_image_grid
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen_reference

from joyedit.media import images as im

GOLDENS = Path(__file__).parents[1] / "goldens"

# The table of diffusers, base 1024.
BUCKETS_1024 = [
    *[(512, 1792), (512, 1856), (512, 1920), (512, 1984), (512, 2048), (576, 1600), (576, 1664)],
    *[(576, 1728), (576, 1792), (640, 1472), (640, 1536), (640, 1600), (704, 1344), (704, 1408)],
    *[(704, 1472), (768, 1216), (768, 1280), (768, 1344), (832, 1152), (832, 1216), (896, 1088)],
    *[(896, 1152), (960, 1024), (960, 1088), (1024, 960), (1024, 1024), (1088, 896), (1088, 960)],
    *[(1152, 832), (1152, 896), (1216, 768), (1216, 832), (1280, 768), (1344, 704), (1344, 768)],
    *[(1408, 704), (1472, 640), (1472, 704), (1536, 640), (1600, 576), (1600, 640), (1664, 576)],
    *[(1728, 576), (1792, 512), (1792, 576), (1856, 512), (1920, 512), (1984, 512), (2048, 512)],
]


def picture(width: int = 7, height: int = 5, seed: int = 0) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def pixels(image: PIL.Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def test_arrays_and_tensors_become_pictures():
    levels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    floats = (levels / 255).astype(np.float32)
    channels_first = torch.from_numpy(levels).permute(0, 3, 1, 2)
    batches = [
        levels,
        floats,
        floats.astype(np.float64),
        channels_first,
        torch.from_numpy(floats).permute(0, 3, 1, 2),
    ]
    batches += [
        list(levels),
        list(channels_first),
        [levels[:1], PIL.Image.fromarray(levels[1])],
        tuple(floats),
    ]
    for batch in batches:
        made = im.to_pil_list(batch)
        assert [image.size for image in made] == [(7, 5)] * 2
        assert np.array_equal(np.stack([pixels(image) for image in made]), levels)
    assert np.array_equal(pixels(im.to_pil_list(floats[0])[0]), levels[0])
    half = im.to_pil_list(torch.full((3, 2, 2), 0.5, dtype=torch.bfloat16, requires_grad=True))
    assert pixels(half[0]).max() == pixels(half[0]).min() == 128  # 127.5 rounds to even


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 4)), r"shape \(4, 4\): must be \(H, W, 3\) or \(B, H, W, 3\)"),
        (np.zeros((4, 4, 4)), "shape"),
        (np.zeros((3, 4, 5)), "shape"),
        (np.zeros((0, 4, 3)), "shape"),
        (torch.zeros(4, 5, 3), r"shape \(4, 5, 3\): must be \(3, H, W\) or \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 3, 4, 4), "shape"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64: must be uint8, or floating point"),
        (torch.zeros(3, 4, 4, dtype=torch.bool), "dtype bool"),
        (np.full((4, 4, 3), np.nan), "NaN or infinity"),
        (torch.full((3, 4, 4), torch.inf), "NaN or infinity"),
        (torch.full((3, 4, 4), -0.01), r"holds -0.01 to -0.01: must be in \[0, 1\]"),
        (np.linspace(0, 255, 48).reshape(4, 4, 3), r"holds 0 to 255"),
        (PIL.Image.new("RGB", (0, 3)), "is empty: 0 x 3 pixels"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(given, message):
    with pytest.raises(ValueError, match=f"photo .*{message}"):
        im.to_pil_list(given, "photo")
    with pytest.raises(ValueError, match=rf"photo\[1\] .*{message}"):
        im.to_pil_list([picture(), given], "photo")


def test_other_things_are_refused():
    with pytest.raises(ValueError, match="photo is an empty list"):
        im.to_pil_list([], "photo")
    for wrong in (None, 3, "photo.png", [[picture()]]):
        with pytest.raises(TypeError, match=r"photo(\[0\])? is a .*load_image"):
            im.to_pil_list(wrong, "photo")


def size_rules() -> list[list[int]]:
    rows = json.loads((GOLDENS / "size_rules.json").read_text())["rows"]
    assert len(rows) == 211
    return rows


def test_buckets_are_the_published_ones():
    assert im.buckets() == im.buckets(1024) == BUCKETS_1024
    for base in (256, 512, 768):
        assert im.buckets(base) == [(h * base // 1024, w * base // 1024) for h, w in BUCKETS_1024]
    for wrong in (0, 1000, 2048, None):
        with pytest.raises(ValueError, match=r"must be one of \(256, 512, 768, 1024\)"):
            im.buckets(wrong)


def test_choice_of_bucket_and_smart_resize_equal_the_recorded_ones():
    for height, width, new_height, new_width, bucket_height, bucket_width in size_rules():
        assert im.smart_resize(height, width) == (new_height, new_width)
        assert im.nearest_bucket(height, width, BUCKETS_1024) == (bucket_height, bucket_width)


def test_choice_of_bucket_on_known_sizes_and_ties():
    sizes = {
        (512, 512): (1024, 1024),
        (1920, 1080): (768, 1344),
        (1080, 1920): (1344, 768),
        (333, 777): (1472, 640),
    }
    for (width, height), bucket in {**sizes, (4000, 100): (512, 2048), (2396, 2995): (1088, 896)}.items():
        assert im.nearest_bucket(height, width, BUCKETS_1024) == bucket
    for bucket in BUCKETS_1024:
        assert im.nearest_bucket(*bucket, BUCKETS_1024) == bucket
    with pytest.raises(ValueError, match="both must be positive"):
        im.nearest_bucket(0, 5, BUCKETS_1024)


def test_buckets_equal_diffusers():
    assert reference.BUCKETS[1024] == BUCKETS_1024
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 5000, (300, 2)).tolist():
        assert im.nearest_bucket(height, width, BUCKETS_1024) == reference.find_best_bucket(
            height, width, 1024
        )


def test_smart_resize_on_known_sizes():
    known = {(64, 64): (256, 256), (300, 100): (448, 160), (47, 33): (320, 224), (4000, 5000): (3648, 4576)}
    known |= {(720, 1280): (704, 1280), (1000, 1000): (992, 992), (48, 4000): (64, 4000)}
    for size, expected in known.items():
        assert im.smart_resize(*size) == expected
    assert im.smart_resize(20, 4000)[0] >= 32
    with pytest.raises(ValueError, match="4001 x 20 pixels is too narrow"):
        im.smart_resize(20, 4001)


def test_smart_resize_equals_transformers():
    rng = np.random.default_rng(1)
    for height, width in (2 ** rng.uniform(5.5, 13, (500, 2))).astype(int).tolist():
        for low, high in ((65_536, 16_777_216), (16_384, 65_536), (3136, 3136)):
            expected = qwen_reference.smart_resize(height, width, 32, low, high)
            assert im.smart_resize(height, width, 32, low, high) == expected


@pytest.mark.parametrize("size", [(600, 400), (451, 300), (37, 91), (64, 64), (1, 3), (200, 7)], ids=str)
def test_crop_equals_diffusers(size):
    crop = reference.JoyImageEditImageProcessor().resize_center_crop
    photo = picture(*size)
    for bucket in ((192, 256), (256, 192), (97, 101), (size[1], size[0])):
        made = im.resize_center_crop(photo, *bucket)
        assert made.size == bucket[::-1]
        assert np.array_equal(pixels(made), pixels(crop(photo, bucket)))


def test_fit_tells_where_the_photograph_lies():
    fit = im.fit_cover((400, 600), (256, 256))
    assert fit == (0.64, 256, 384, 0, 64)
    assert im.fit_cover((600, 400), (255, 256)) == (0.64, 384, 256, 64, 0)
    for size, bucket in itertools.product([(300, 451), (91, 37), (400, 30)], [(512, 2048), (1024, 1024)]):
        fit = im.fit_cover(size, bucket)
        assert fit.height >= bucket[0] and fit.width >= bucket[1]
        assert 0 <= fit.top <= fit.height - bucket[0] and 0 <= fit.left <= fit.width - bucket[1]
    with pytest.raises(ValueError, match="image of 9000 x 1 pixels is too narrow to fill 2048 x 512"):
        im.resize_center_crop(PIL.Image.new("RGB", (9000, 1)), 512, 2048)


TINY = im.Qwen2VLImageConfig(min_pixels=16384, max_pixels=65536)


def test_patches_equal_the_recorded_ones():
    recorded = load_file(GOLDENS / "processor.safetensors")
    made = im.Qwen2VLImageProcessor(TINY)(PIL.Image.fromarray(recorded["enlarged.image"].numpy()))
    values = made["pixel_values"].unflatten(1, (3, 2, 16, 16))
    expected = (recorded["enlarged.levels"].float() - 127.5) / 127.5
    assert torch.equal(values[:, :, 0], expected) and torch.equal(values[:, :, 1], expected)
    assert torch.equal(made["image_grid_thw"], recorded["enlarged.image_grid_thw"])


@pytest.mark.parametrize("name", ["no_resize", "enlarged", "reduced", "rounded"])
def test_patches_equal_every_recorded_one(name, shared_data):
    recorded = load_file(shared_data / "goldens" / "joyimage" / "processor.safetensors")
    made = im.Qwen2VLImageProcessor(TINY)(PIL.Image.fromarray(recorded[f"{name}.image_u8"].numpy()))
    assert torch.equal(made["pixel_values"], recorded[f"{name}.pixel_values"])
    assert torch.equal(made["image_grid_thw"], recorded[f"{name}.image_grid_thw"])


@pytest.mark.parametrize("size", [(70, 100), (451, 300), (33, 150), (256, 128)], ids=str)
def test_resize_is_the_antialiased_bicubic_one_on_uint8(size):
    photo = picture(*size)
    made = im.Qwen2VLImageProcessor(TINY).resize(photo)
    height, width = im.smart_resize(photo.height, photo.width, 32, 16384, 65536)
    levels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
    expected = F.interpolate(levels, size=(height, width), mode="bicubic", antialias=True)[0]
    assert made.dtype == torch.uint8 and torch.equal(made, expected)


def test_patch_rows_lie_in_blocks_of_the_merger():
    height, width, patch = 8, 12, 2
    grid = torch.arange(3 * height * width, dtype=torch.float32).reshape(3, height, width)
    rows = im.patchify(grid, patch, 2, 2)
    assert rows.shape == (height * width // 4, 3 * 2 * patch * patch)
    row = 0
    for block_y, block_x in itertools.product(range(2), range(3)):
        for y, x in itertools.product(range(2), range(2)):
            top, left = (block_y * 2 + y) * patch, (block_x * 2 + x) * patch
            one = grid[:, top : top + patch, left : left + patch]
            assert torch.equal(rows[row], torch.stack([one, one], dim=1).flatten())
            row += 1


def test_normalisation_with_other_means():
    config = im.Qwen2VLImageConfig(image_mean=(0.48, 0.46, 0.41), image_std=(0.27, 0.26, 0.28))
    levels = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, None]
    made = im.Qwen2VLImageProcessor(config).normalize(levels)
    for channel, (mean, std) in enumerate(zip(config.image_mean, config.image_std, strict=True)):
        assert torch.allclose(made[channel, 0], (levels[channel, 0] / 255 - mean) / std, atol=1e-6)


def test_image_settings_are_read_in_every_spelling():
    read = im.Qwen2VLImageConfig.from_dict
    assert read({"size": {"shortest_edge": 5, "longest_edge": 6}}).to_dict()["size"] == {
        "shortest_edge": 5,
        "longest_edge": 6,
    }
    for raw in (
        {"size": {"min_pixels": 5, "max_pixels": 6}},
        {"min_pixels": 5, "max_pixels": 6},
        {"size": {"shortest_edge": 1, "longest_edge": 6}, "min_pixels": 5, "max_pixels": None},
    ):
        config = read(raw)
        assert (config.min_pixels, config.max_pixels) == (5, 6)
        assert read(config.to_dict()) == config
    assert im.Qwen2VLImageConfig().replace(min_pixels=7).min_pixels == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_input_is_scaled_in_its_dtype(dtype):
    ramp = PIL.Image.fromarray(np.arange(768, dtype=np.uint8).reshape(4, 64, 3))
    made = im.to_latent_input([ramp, picture(64, 4)], dtype)
    assert made.shape == (2, 3, 1, 4, 64) and made.dtype == dtype and made.is_contiguous()
    levels = torch.from_numpy(np.array(ramp)).permute(2, 0, 1)
    assert torch.equal(made[0, :, 0], levels.to(dtype) / 127.5 - 1.0)
    with pytest.raises(ValueError, match="one size"):
        im.to_latent_input([picture(4, 4), picture(4, 5)])


def test_output_types():
    decoded = torch.linspace(-1.3, 1.3, 2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    expected = (decoded * 0.5 + 0.5).clamp(0, 1)
    assert torch.equal(im.to_output(decoded, "pt"), expected)
    array = im.to_output(decoded.bfloat16().float(), "np")
    assert array.shape == (2, 5, 7, 3) and array.dtype == np.float32
    made = im.to_output(decoded)
    assert np.array_equal(
        np.stack([pixels(i) for i in made]), (expected.permute(0, 2, 3, 1).numpy() * 255).round()
    )
    levels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None]
    assert np.array_equal(pixels(im.to_output(levels / 127.5 - 1)[0]), pixels(picture()))
    with pytest.raises(ValueError, match="output_type='jpg'"):
        im.to_output(decoded, "jpg")


def test_output_of_an_overflowed_run_is_black_with_a_warning(caplog):
    decoded = torch.full((1, 3, 2, 2), torch.nan)
    assert pixels(im.to_output(decoded)[0]).max() == 0
    assert "NaN" in caplog.text
    assert np.isnan(im.to_output(decoded, "np")).all()


def test_grid_equals_diffusers():
    frames = [picture(6, 4, seed=i) for i in range(6)]
    for rows, cols, resize in ((2, 3, None), (6, 1, None), (3, 2, 5)):
        expected = make_image_grid(frames, rows, cols, resize)
        assert np.array_equal(pixels(im.make_image_grid(frames, rows, cols, resize)), pixels(expected))
    with pytest.raises(ValueError, match="6 images do not fill rows=2 x cols=2"):
        im.make_image_grid(frames, 2, 2)
    with pytest.raises(ValueError, match="0 images"):
        im.make_image_grid([], 0, 0)
