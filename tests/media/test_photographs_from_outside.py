"""Photographs as strangers make them: damaged, odd, huge, of wide numbers, with metadata that lies."""

import io
import random
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest

from joyedit.checkpoints.plain_text import visible
from joyedit.media import images as im
from joyedit.media.decoding import orientation, orientation_in
from joyedit.media.masks import to_latent_mask

LEVELS = np.random.default_rng(0).integers(0, 256, (6, 9), np.uint8)
LEVELS[0, :2] = 0, 255
COLOURS = np.random.default_rng(1).integers(0, 256, (16, 24, 3), np.uint8)
PHOTO = PIL.Image.fromarray(COLOURS)


def encoded(image: PIL.Image.Image, fmt: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def rgb(levels: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(levels)[..., None], 3, axis=2)


# Modes of wide numbers


def wide(levels: np.ndarray, mode: str, scale: float) -> PIL.Image.Image:
    types = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2", "F": "<f4"}
    values = (levels.astype(np.float64) * scale).astype(types[mode])
    return PIL.Image.frombytes(mode, levels.shape[::-1], values.tobytes())


WIDE = [(mode, scale) for mode in ("I", "I;16", "I;16B", "F") for scale in (1, 257)] + [
    ("F", np.float32(1 / 255))
]


@pytest.mark.parametrize(("mode", "scale"), WIDE)
def test_wide_modes_are_photographs_and_masks_whatever_their_white_is(mode, scale):
    picture = wide(LEVELS, mode, scale)
    assert np.array_equal(np.asarray(im.load_image(picture)), rgb(LEVELS))
    assert np.array_equal(np.asarray(im.to_pil_list([picture])[0]), rgb(LEVELS))
    mask = wide(np.where(LEVELS > 99, 255, 0), mode, scale)
    assert np.array_equal(to_latent_mask(mask, LEVELS.shape)[0, 0].numpy(), LEVELS > 99)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("scale", [1, 257])
def test_wide_files_are_photographs(dtype, scale, tmp_path):
    PIL.Image.fromarray((LEVELS.astype(np.float64) * scale).astype(dtype)).save(tmp_path / "wide.tif")
    assert np.array_equal(np.asarray(im.load_image(tmp_path / "wide.tif")), rgb(LEVELS))


def test_the_largest_value_decides_what_white_is():
    def levels(values, mode):
        return np.asarray(im.to_rgb(wide(np.array([values]), mode, 1)))[0, :, 0].tolist()

    for mode in ("I", "I;16", "I;16B"):
        assert levels([0, 1, 254, 255], mode) == [0, 1, 254, 255]
        assert levels([0, 1, 255, 256], mode) == [0, 0, 1, 1]
        assert levels([0, 0, 0, 0], mode) == [0, 0, 0, 0]
        assert levels([0, 32767, 32768, 65535], mode) == [0, 127, 128, 255]
    assert levels([0, 0.25, 1], "F") == [0, 64, 255]
    assert levels([0, 0.25, 1.5, 255], "F") == [0, 0, 2, 255]
    assert levels([0, 128.5, 257, 65535], "F") == [0, 0, 1, 255]


@pytest.mark.parametrize("values", [[-1, 5], [0, 65536], [0, np.nan], [0, np.inf], [-0.5, 0.5]])
def test_wide_modes_out_of_every_range_are_refused(values):
    mode = (
        "F"
        if any(value % 1 for value in values if np.isfinite(value)) or not np.isfinite(values).all()
        else "I"
    )
    with pytest.raises(ValueError, match=f"image of mode {mode} holds"):
        im.load_image(wide(np.array([values]), mode, 1))


# Decoders


class Decoder:
    """A plugin of Pillow's whose decoder raises what it is told to."""

    def __init__(self, error: BaseException):
        self.error = error

    def __call__(self, *args):
        raise self.error


ERRORS = [
    struct.error("unpack requires a buffer of 4 bytes"),
    SyntaxError("broken \x1b[31mheader"),
    IndexError(3),
    KeyError("mode"),
    EOFError(),
    ZeroDivisionError("division by zero"),
    OverflowError("too large"),
    MemoryError(),
    zlib.error("Error -3"),
    TypeError("an integer is required"),
    RuntimeError("Failed to decode frame 0: \x1b]0;x\x07"),
    NotImplementedError("Unimplemented pixel format 1"),
    AttributeError("'NoneType' object has no attribute 'read'"),
    AssertionError(),
    RecursionError("maximum recursion depth exceeded"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    OSError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["opening", "reading"])
def test_whatever_a_decoder_raises_names_the_picture(error, where, tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(PHOTO, "PNG"))
    target = (PIL.Image, "open") if where == "opening" else (PIL.Image.Image, "load")
    opened = PIL.Image.open(path)
    monkeypatch.setattr(*target, Decoder(error))
    if where == "reading":
        monkeypatch.setattr(type(opened), "load", Decoder(error))
    with pytest.raises(ValueError, match=r"^image '.*photo.png' (is damaged: .|needs more memory)") as caught:
        im.load_image(path)
    assert "\x1b" not in str(caught.value)
    if where == "opening":
        with pytest.raises(ValueError, match="photo.png is not a readable image: ."):
            im.read_metadata(path)
    else:
        with pytest.raises(ValueError, match=r"^image\[0\] cannot be read: .") as caught:
            im.to_pil_list([opened])
        assert "\x1b" not in str(caught.value)


DAMAGED = {
    # A compression that its reader does not know, a size that no file has, a palette that is not there.
    "encoding.blp": b"BLP2" + struct.pack("<I4B2I", 1, 9, 8, 7, 0, 8, 8) + bytes(2000),
    "short.blp": b"BLP1" + struct.pack("<7I", 0, 8, 8, 8, 5, 0, 0),
    "format.dds": b"DDS "
    + struct.pack("<4I", 124, 0x1007, 8, 8)
    + bytes(56)
    + struct.pack("<2I", 32, 4)
    + bytes(60),
    "short.dds": b"DDS " + struct.pack("<I", 124) + bytes(20),
    "cut.avif": b"",
    "size.qoi": b"qoif" + struct.pack(">IIBB", 2**31, 2**31, 3, 0),
    "layers.psd": b"8BPS" + struct.pack(">H6xHIIHH", 1, 99, 8, 8, 8, 3) + bytes(30),
    "frames.fli": struct.pack("<IHHHHHHI", 128, 0xAF11, 9, 8, 8, 8, 3, 0) + bytes(112),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_formats_of_games_and_phones_that_are_damaged(name, tmp_path):
    (tmp_path / name).write_bytes(DAMAGED[name] or encoded(PHOTO, "AVIF")[:-40])
    with pytest.raises(ValueError, match=f"^image '.*{name}' (is|has) "):
        im.load_image(tmp_path / name)


def random_damage(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    at = draw.randrange(len(damaged))
    match draw.randrange(4):
        case 0:
            return bytes(damaged[:at])
        case 1:
            del damaged[at : at + draw.randrange(40)]
        case 2:
            damaged[at : at + 4] = draw.choice(
                [b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
            )
        case 3:
            for _ in range(draw.randrange(1, 9)):
                damaged[draw.randrange(min(200, len(damaged)))] = draw.choice([0, 1, 127, 128, 255])
    return bytes(damaged)


def damage_pictures(rounds: int, tmp_path) -> int:
    """Damage every format that Pillow writes, and the ones above; how many were refused."""
    PIL.Image.init()
    seeds = [content for content in DAMAGED.values() if content]
    for fmt in sorted(PIL.Image.SAVE.keys() - {"PDF"}):
        for mode in ("RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "F"):
            try:
                seeds.append(encoded(PHOTO.convert(mode), fmt))
            except (OSError, ValueError, KeyError):
                continue
    assert len(seeds) > 60
    draw, path, refused = random.Random(0), tmp_path / "damaged.picture", 0
    for content in seeds * rounds:
        path.write_bytes(random_damage(content, draw))
        try:
            assert im.load_image(path).mode == "RGB"
        except ValueError as error:  # and nothing else
            refused += 1
            assert str(error).startswith(f"image {str(path)!r}") and visible(error, None) == str(error)
    return refused


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_raise_value_errors_only(tmp_path):
    assert damage_pictures(3, tmp_path) > 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_damaged_pictures_raise_value_errors_only(tmp_path):
    assert damage_pictures(40, tmp_path) > 800


# Orientation


def exif(*entries: tuple[int, int, int, bytes], order: str = "<", cut: int | None = None) -> bytes:
    """An EXIF block of one directory: (tag, type, count, the four bytes of the value or its place)."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    listed = b"".join(struct.pack(f"{order}HHL", *entry[:3]) + entry[3] for entry in entries)
    block = start + struct.pack(f"{order}LH", 8, len(entries)) + listed + bytes(68)
    return b"Exif\0\0" + block[:cut]


def turned_to(number: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return 0x0112, 3, 1, struct.pack(f"{order}HH", number, 0)


ODD = {
    "value beyond the end": (0x010E, 2, 40, 5000),
    "value of 4 GB": (0x010E, 7, 2**32 - 1, 26),
    "place beyond 2 GB": (0x010E, 2, 9, 2**32 - 1),
    "unknown type": (0x0100, 99, 1, 0),
    "type 0": (0x0100, 0, 1, 0),
    "fraction without end": (0x011A, 5, 1, 5000),
    "fraction over zero": (0x011A, 5, 1, 60),
    "no value": (0x0132, 2, 0, 0),
    "text as number": (0x0131, 4, 1, 7),
    "number as text": (0x011B, 2, 3, 7),
    "wrong type of numbers": (0x0102, 9, 3, 26),
    "directory in itself": (0x8769, 4, 1, 8),
    "directory beyond the end": (0x8769, 4, 1, 2**31),
    "place of another type": (0x8825, 2, 4, 8),
    "directories in a text": (0x8769, 7, 1, 8),
    "tag of no name": (0xFFFE, 12, 3, 26),
}
FORMATS = ["JPEG", "PNG", "WEBP"]


def in_file(block: bytes, fmt: str) -> bytes:
    return encoded(PHOTO, fmt, exif=block, **({"lossless": True} if fmt == "WEBP" else {}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", ["before", "behind"])
def test_pixels_are_turned_whatever_else_the_exif_block_holds(name, place, tmp_path):
    tag, kind, count, value = ODD[name]
    for order in "<>":
        entries = [(tag, kind, count, struct.pack(f"{order}L", value)), turned_to(6, order)]
        block = exif(*(entries if place == "before" else entries[::-1]), order=order)
        for fmt in FORMATS:
            (tmp_path / "turned").write_bytes(in_file(block, fmt))
            loaded = im.load_image(tmp_path / "turned")
            assert loaded.size == (16, 24), (order, fmt)
            if fmt != "JPEG":
                assert np.array_equal(np.asarray(loaded), np.rot90(COLOURS, -1))
            with PIL.Image.open(tmp_path / "turned") as opened:
                assert im.to_pil_list(opened)[0].tobytes() == loaded.tobytes()
            # Once: also by those who look again.
            assert im.to_pil_list([loaded])[0].tobytes() == loaded.tobytes()
            assert (
                im.load_image(tmp_path / "turned", lambda image: im.to_rgb(image)).tobytes()
                == loaded.tobytes()
            )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0",
        b"Exif\0\0XX*\0\x08\0\0\0",
        b"hello",
        exif(turned_to(0)),
        exif(turned_to(9)),
        exif((0x0112, 2, 1, b"6\0\0\0")),
        exif((0x0112, 3, 0, b"\6\0\0\0"), cut=10),
        exif(turned_to(6), cut=14),
        struct.pack("<4sL", b"II*\0", 2**32 - 1),
    ],
)
def test_blocks_without_an_orientation_turn_nothing(block, tmp_path):
    picture = PHOTO.copy()
    picture.info["exif"] = block
    assert orientation(picture) == 1 and im.to_rgb(picture) is picture
    (tmp_path / "photo.png").write_bytes(encoded(PHOTO, "PNG", exif=block))
    assert np.array_equal(np.asarray(im.load_image(tmp_path / "photo.png")), COLOURS)


@pytest.mark.parametrize("order", "<>")
def test_the_orientation_read_alone(order):
    for number in range(1, 9):
        assert orientation_in(exif(turned_to(number, order), order=order)) == number
        entry = (0x0112, 4, 1, struct.pack(f"{order}L", number))
        assert orientation_in(exif((0x0100, 3, 1, bytes(4)), entry, order=order)[6:]) == number
    assert orientation_in(exif((0x0113, 3, 1, bytes(4)), order=order)) is None


def test_an_orientation_that_was_taken_out_turns_nothing():
    picture = PIL.Image.open(io.BytesIO(in_file(exif(turned_to(6)), "PNG")))
    assert orientation(picture) == 6
    del picture.getexif()[0x0112]
    assert orientation(picture) == 1


def test_the_rest_of_a_readable_block_is_kept(tmp_path):
    block = PIL.Image.Exif()
    block[0x0112], block[0x010F] = 6, "a camera"
    (tmp_path / "turned.png").write_bytes(encoded(PHOTO, "PNG", exif=block))
    found = im.load_image(tmp_path / "turned.png").getexif()
    assert found.get(0x010F) == "a camera" and 0x0112 not in found


# Size


@pytest.mark.parametrize("number", [1, 6])
def test_a_huge_jpeg_is_decoded_near_the_size_that_is_wanted(number, tmp_path, monkeypatch, caplog):
    smooth = np.linspace(0, 255, 800).round().astype(np.uint8)
    photo = PIL.Image.fromarray(rgb(np.broadcast_to(smooth, (400, 800))))
    (tmp_path / "huge.jpg").write_bytes(encoded(photo, "JPEG", exif=exif(turned_to(number))))
    turn = (lambda size: size) if number == 1 else (lambda size: size[::-1])
    assert im.load_image(tmp_path / "huge.jpg", size=(10, 10)).size == turn((800, 400))  # not huge
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 200_000)
    for size, expected in (((100, 200), (200, 100)), ((90, 190), (200, 100)), ((100, 201), (400, 200))):
        caplog.clear()
        small, digest = im.load_photo(tmp_path / "huge.jpg", size=turn(size))
        assert small.size == turn(expected) and len(digest) == 64
        (record,) = caplog.records
        assert "huge.jpg' has 800 x 400 pixels, and is read at " in record.getMessage()
        upright = small if number == 1 else small.rotate(90, expand=True)
        whole = np.asarray(photo.resize(expected, PIL.Image.Resampling.BOX)).astype(int)
        assert np.abs(np.asarray(upright) - whole).max() <= 4
    assert im.load_image(tmp_path / "huge.jpg").size == turn((800, 400))
    (tmp_path / "huge.png").write_bytes(encoded(photo, "PNG"))
    assert im.load_image(tmp_path / "huge.png", size=(10, 10)).size == (800, 400)


# Text


def test_what_a_terminal_would_obey_is_made_visible():
    assert visible("a\x1b[31mb\x07\x9b2J\x00\x7f") == r"a\x1b[31mb\x07\x9b2J\x00\x7f"
    assert visible("\u202egnp.exe\u2066\u200b\ufeff\u2028\ud800\r") == (
        r"\u202egnp.exe\u2066\u200b\ufeff\u2028\ud800\r"
    )
    assert visible("two\nlines\tand more") == "two lines and more"
    for plain in ("Füge Flügel 翅膀\u3000👩\u200d🚀 é\u00a0", "", r"a\x1b"):
        assert visible(plain) == plain
    assert visible(ValueError("a\x1bb")) == r"a\x1bb"
    assert visible("at http://me:secret@host:8/x, socks5://u@h") == "at http://host:8/x, socks5://h"
    assert visible("see https://host/@me and me@host") == "see https://host/@me and me@host"


# Writing


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".tif"])
def test_the_colour_profile_goes_into_every_format_that_holds_one(suffix, tmp_path):
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    picture = PIL.Image.new("RGB", PHOTO.size, (200, 100, 50))
    picture.info.update(exif=exif(turned_to(6)), transparency=(1, 2, 3), icc_profile=b"of the photograph")
    path = im.save_picture(picture, tmp_path / f"out{suffix}", {"prompt": "a cat"}, icc_profile=profile)
    with PIL.Image.open(path) as opened:
        assert opened.info["icc_profile"] == profile and opened.size == PHOTO.size
        assert orientation(opened) == 1 and "transparency" not in opened.info
        assert np.abs(np.asarray(opened.convert("RGB")).astype(int) - (200, 100, 50)).max() <= 3
    with pytest.raises(FileExistsError):
        im.save_picture(picture, path)
    grey = profile[:16] + b"GRAY" + profile[20:]
    for wrong in (None, grey, b""):
        with PIL.Image.open(im.save_picture(picture, path, icc_profile=wrong, force=True)) as opened:
            assert not opened.info.get("icc_profile")
    assert [child.name for child in tmp_path.iterdir()] == [path.name]


def test_pictures_are_written_in_formats_that_pillow_writes(tmp_path):
    for name in ("out", "out.txt", "out.cur", ".png"):
        with pytest.raises(ValueError, match="must end in"):
            im.save_picture(PHOTO, tmp_path / name)
    assert not list(tmp_path.iterdir())
    assert im.read_metadata(im.save_picture(PHOTO, tmp_path / "out.png", {"seed": 1})) == {
        "schema": 1,
        "seed": 1,
    }
    coarse = im.save_picture(PHOTO, tmp_path / "coarse.jpg", quality=10).stat().st_size
    assert coarse < im.save_picture(PHOTO, tmp_path / "fine.jpg").stat().st_size


def test_an_unknown_user_in_a_path_is_a_missing_file():
    with pytest.raises(FileNotFoundError, match="~nobody_of_that_name/photo.png"):
        im.load_image("~nobody_of_that_name/photo.png")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200), "HEIC.*pillow-heif"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "not in an image format"),
    ],
)
def test_what_is_no_picture_is_named_as_what_it_is(tmp_path, content, said):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        im.load_image(path)
