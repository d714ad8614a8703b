"""Transparent pictures: text and vision encoders see them before white, as in transformers."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from joyedit.media import images as im
from joyedit.media.clip_images import CLIPImageProcessor
from joyedit.media.decoding import EXIF_ORIENTATION

WIDTH, HEIGHT = 96, 64
COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
RAMP = Image.linear_gradient("L").resize((WIDTH, HEIGHT))


def with_alpha(mode):
    picture = COLOURS.convert(mode)
    picture.putalpha(RAMP)
    return picture


def with_colour(mode, transparency):
    picture = COLOURS.convert(mode)
    picture.info["transparency"] = transparency
    return picture


def palette():
    picture = with_colour("P", bytes(range(0, 256, 2)))
    assert len(picture.getcolors()) > 100
    return picture


def turned():
    picture = with_alpha("RGBA")
    exif = picture.getexif()
    exif[EXIF_ORIENTATION] = 6
    picture.info["exif"] = exif.tobytes()
    return picture


TRANSPARENT = {
    "RGBA": lambda: with_alpha("RGBA"),
    "LA": lambda: with_alpha("LA"),
    "palette, several": palette,
    "palette, one": lambda: with_colour("P", 0),
    "grey, one": lambda: with_colour("L", COLOURS.convert("L").getpixel((0, 0))),
    "RGB, one": lambda: with_colour("RGB", COLOURS.getpixel((WIDTH // 2, HEIGHT // 2))),
    "opaque": lambda: COLOURS.convert("RGBA"),
    "RGB": lambda: COLOURS,
}


@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.parametrize(
    "processor", [im.Qwen2VLImageProcessor(), CLIPImageProcessor()], ids=["Qwen", "CLIP"]
)
def test_encoders_see_transparent_pictures_on_white(processor, kind):
    picture = TRANSPARENT[kind]()
    white = Image.fromarray(convert_to_rgb(picture, return_numpy=True))
    found, wanted = processor([picture])["pixel_values"], processor([white])["pixel_values"]
    assert torch.equal(found, wanted)
    dropped = processor([picture.convert("RGBA").convert("RGB")])["pixel_values"]
    assert torch.equal(found, dropped) is (kind in ("opaque", "RGB"))


def test_what_is_transparent_is_turned_with_the_picture():
    (picture,) = im.to_pil_list(turned(), alpha=True)
    assert picture.mode == "RGBA" and picture.size == (HEIGHT, WIDTH)
    assert picture.tobytes() == with_alpha("RGBA").transpose(Image.Transpose.ROTATE_270).tobytes()
    assert [one.mode for one in im.to_pil_list([turned(), COLOURS])] == ["RGB", "RGB"]
    assert [one.mode for one in im.to_pil_list([np.asarray(COLOURS), COLOURS], alpha=True)] == ["RGB", "RGB"]
