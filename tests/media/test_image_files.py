"""Photographs of every kind from files and the web, what is refused, and PNG files with metadata."""

import contextlib
import http.server
import io
import math
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import PIL.PngImagePlugin
import pytest
from diffusers.utils import load_image

import joyedit
from joyedit.media import images as im

ORIENTATION = 0x0112


def picture(width: int = 7, height: int = 5, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    shape = (height, width) if channels == 1 else (height, width, channels)
    noise = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    return PIL.Image.frombytes(mode, (width, height), noise.tobytes())


def encoded(image: PIL.Image.Image, fmt: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def pixels(image: PIL.Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


KINDS = {
    "rgb.png": (picture(), "PNG", {}),
    "rgba.png": (picture(mode="RGBA"), "PNG", {}),
    "grey.png": (picture(mode="L"), "PNG", {}),
    "grey_alpha.png": (picture(mode="LA"), "PNG", {}),
    "bilevel.png": (picture(mode="L").convert("1"), "PNG", {}),
    "palette.png": (picture().quantize(8), "PNG", {}),
    "palette_transparent.png": (
        picture().quantize(8),
        "PNG",
        {"transparency": bytes([0, 128, 255] + [255] * 5)},
    ),
    "palette.gif": (picture().quantize(8), "GIF", {"transparency": 3}),
    "cmyk.jpg": (picture(mode="CMYK"), "JPEG", {}),
    "cmyk.tif": (picture(mode="CMYK"), "TIFF", {}),
    "lossless.webp": (picture(), "WEBP", {"lossless": True}),
    "bottom_up.bmp": (picture(), "BMP", {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_photograph_reads_as_in_diffusers(name, tmp_path):
    image, fmt, options = KINDS[name]
    path = tmp_path / name
    path.write_bytes(encoded(image, fmt, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers leaves its files open
        expected = load_image(str(path))
    with PIL.Image.open(path) as opened:
        for given in (path, str(path), opened):
            assert np.array_equal(pixels(im.load_image(given)), pixels(expected))
        (listed,) = im.to_pil_list(opened)
    assert np.array_equal(pixels(listed), pixels(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation, tmp_path):
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "turned.png"
    image = picture(6, 3)
    image.save(path, exif=exif)
    turns = {2: "fliplr", 3: "rot180", 4: "flipud", 5: "transpose", 6: "rot270", 7: "transverse", 8: "rot90"}
    turned = {
        None: lambda a: a,
        "fliplr": lambda a: a[:, ::-1],
        "rot180": lambda a: a[::-1, ::-1],
        "flipud": lambda a: a[::-1],
        "transpose": lambda a: a.transpose(1, 0, 2),
        "rot270": lambda a: np.rot90(a, -1),
        "transverse": lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        "rot90": lambda a: np.rot90(a),
    }[turns.get(orientation)]
    loaded = im.load_image(path)
    assert np.array_equal(pixels(loaded), turned(np.asarray(image)))
    assert np.array_equal(pixels(im.to_pil_list(loaded)[0]), pixels(loaded))
    with PIL.Image.open(path) as opened:
        assert np.array_equal(pixels(im.to_pil_list([opened])[0]), pixels(loaded))
        assert im.load_image(opened, lambda image: image.convert("L")).size == loaded.size


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_an_animation_is_read(fmt, tmp_path):
    frames = [PIL.Image.new("RGB", (6, 4), color) for color in ("red", "blue", "lime")]
    path = tmp_path / f"animated.{fmt.lower()}"
    options = {"lossless": True} if fmt == "WEBP" else {}
    frames[0].save(path, fmt, save_all=True, append_images=frames[1:], **options)
    with PIL.Image.open(path) as opened:
        assert opened.n_frames == 3
    assert im.load_image(path).getcolors() == [(24, (255, 0, 0))]


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_to_eight(fmt, tmp_path):
    levels = np.array([[0, 128, 129, 257], [25700, 32767, 32768, 65535]], np.uint16)
    path = tmp_path / "deep"
    path.write_bytes(encoded(PIL.Image.fromarray(levels), fmt))
    expected = np.array([[0, 0, 1, 1], [100, 127, 128, 255]])
    assert np.array_equal(pixels(im.load_image(path)), np.repeat(expected[..., None], 3, axis=2))


def test_other_number_formats_of_pil():
    levels = np.array([[0, 257, 65535]])
    for mode, dtype in (("I", np.int32), ("I;16B", ">u2")):
        image = PIL.Image.frombytes(mode, (3, 1), levels.astype(dtype).tobytes())
        assert pixels(im.to_rgb(image))[0, :, 1].tolist() == [0, 1, 255]
    floats = PIL.Image.fromarray(np.array([[0, 0.5, 1]], np.float32))
    assert floats.mode == "F" and pixels(im.to_rgb(floats))[0, :, 2].tolist() == [0, 128, 255]
    for wrong in (np.array([[0, 70000]], np.int32), np.array([[0, 70000]], np.float32)):
        with pytest.raises(ValueError, match="image cannot be read: image of mode"):
            im.to_pil_list(PIL.Image.fromarray(wrong))


def test_loading_gives_a_picture_of_its_own():
    image = picture()
    before = image.copy()
    loaded = im.load_image(image)
    loaded.paste((0, 0, 0), (0, 0, 7, 5))
    assert np.array_equal(pixels(image), pixels(before))
    assert im.load_image(image, lambda given: given.convert("CMYK")).mode == "CMYK"


def bad_files() -> dict[str, tuple[bytes, str]]:
    png, jpg = encoded(picture(64, 64), "PNG"), encoded(picture(64, 64), "JPEG")
    broken = bytearray(png)
    broken[60:80] = bytes(20)
    return {
        "empty.png": (b"", "not in an image format"),
        "text.png": (b"this is not a picture\n", "not in an image format"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "not in an image format"),
        "drawing.eps": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "not in an image format",
        ),
        "header.png": (png[:20], "not in an image format|damaged"),
        "cut.png": (png[: len(png) // 2], "damaged"),
        "cut.jpg": (jpg[: len(jpg) // 2], "damaged"),
        "broken.png": (bytes(broken), "damaged"),
    }


@pytest.mark.parametrize("name", bad_files())
def test_files_that_are_not_images_are_refused_by_name(name, tmp_path):
    content, message = bad_files()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"image '.*{name}' .*({message})"):
        im.load_image(tmp_path / name)


def test_missing_files_folders_and_other_things_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        im.load_image(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match="not a file"):
        im.load_image(tmp_path)
    for wrong in (None, 3, b"bytes", np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(TypeError, match="must be a path"):
            im.load_image(wrong)


def test_truncated_picture_given_as_pil_is_refused():
    png = encoded(picture(64, 64), "PNG")
    with pytest.raises(ValueError, match=r"image\[1\] cannot be read: "):
        im.to_pil_list([picture(), PIL.Image.open(io.BytesIO(png[: len(png) // 2]))])


def test_decompression_limit_is_an_error_from_twice_as_many_pixels_on(tmp_path, monkeypatch, caplog):
    (tmp_path / "huge.png").write_bytes(encoded(picture(), "PNG"))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 17)
    with pytest.raises(ValueError, match="huge.png' has more pixels than the limit of 34 .*scale it down"):
        im.load_image(tmp_path / "huge.png")
    assert not caplog.records
    for limit, warned in ((18, 1), (34, 1), (35, 0), (None, 0)):
        caplog.clear()
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
        assert im.load_image(tmp_path / "huge.png").size == (7, 5)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * warned


class Pages(http.server.BaseHTTPRequestHandler):
    photo = encoded(picture(40, 30), "PNG")

    def do_GET(self):
        headers = {"Content-Length": str(len(self.photo))}
        body, status = self.photo, 200
        if self.path in ("/missing.png", "/broken.png"):
            status, body, headers = (404 if "missing" in self.path else 500), b"", {"Content-Length": "0"}
        elif self.path == "/page.png":
            body, headers = b"<html></html>", {"Content-Length": "13"}
        elif self.path == "/moved.png":
            status, body, headers = 302, b"", {"Location": "/photo.png", "Content-Length": "0"}
        elif self.path == "/unsaid.png":
            headers = {}
        elif self.path == "/short.png":
            body = self.photo[:500]
        elif self.path == "/silent.png":
            self.server.stop.wait(20)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.path == "/dripping.png":
            with contextlib.suppress(OSError):
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    if self.server.stop.wait(0.02):
                        return
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    server.stop = threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.parametrize("page", ["photo.png", "moved.png", "unsaid.png", "photo of a café.png"])
def test_photographs_come_from_the_web(page, site):
    assert np.array_equal(pixels(im.load_image(f"{site}/{page}")), pixels(picture(40, 30)))


@pytest.mark.parametrize(
    ("page", "error", "message"),
    [
        ("missing.png", FileNotFoundError, "missing.png.*404"),
        ("broken.png", ConnectionError, "broken.png.*500"),
        ("page.png", ValueError, "page.png.*not in an image format"),
        ("short.png", ConnectionError, "short.png.*cut off"),
    ],
)
def test_failed_downloads_name_the_page(page, error, message, site):
    with pytest.raises(error, match=message):
        im.load_image(f"{site}/{page}")


@pytest.mark.parametrize("page", ["photo.png", "unsaid.png"], ids=["announced", "not announced"])
def test_download_is_limited_in_size(page, site):
    with pytest.raises(ValueError, match=rf"{page}.*max_bytes=1,000"):
        im.load_image(f"{site}/{page}", max_bytes=1000)
    assert im.load_image(f"{site}/{page}", max_bytes=len(Pages.photo)).size == (40, 30)


@pytest.mark.parametrize("page", ["silent.png", "dripping.png"])
def test_download_is_limited_in_time(page, site):
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"{page}.*timeout=0.3"):
        im.load_image(f"{site}/{page}", timeout=0.3)
    assert time.monotonic() - start < 15


def test_unreachable_server_is_a_connection_error(site):
    with contextlib.closing(http.server.HTTPServer(("127.0.0.1", 0), Pages).socket) as socket:
        port = socket.getsockname()[1]
    with pytest.raises(ConnectionError, match="could not be fetched"):
        im.load_image(f"http://127.0.0.1:{port}/photo.png")


METADATA = {
    "prompt": 'Füge "Flügel" hinzu\nund 翅膀 👩‍🚀',
    "negative_prompt": "blurry",
    "seed": 2**64 - 1,
    "num_inference_steps": 40,
    "guidance_scale": 4.0,
    "width": 7,
    "height": 5,
    "model": "jdopensource/JoyAI-Image-Edit",
    "input": {"name": "not utf-8 \udcff.png", "sha256": "0" * 64},
    "nothing": None,
}


def test_metadata_comes_back(tmp_path):
    path = im.save_png(picture(), tmp_path / "new" / "out.PNG", METADATA)
    assert im.read_metadata(path) == {"schema": 1, **METADATA}
    assert np.array_equal(pixels(im.load_image(path)), pixels(picture()))
    assert [p.name for p in path.parent.iterdir()] == ["out.PNG"]
    with PIL.Image.open(path) as opened:
        assert sorted(opened.text) == ["Software", "joyedit", "parameters"]
        assert isinstance(opened.text["joyedit"], PIL.PngImagePlugin.iTXt)
        assert opened.text["Software"] == f"joyedit {joyedit.__version__} (AI-edited)"
        assert opened.text["parameters"] == (
            f"{METADATA['prompt']}\nNegative prompt: blurry\n"
            f"Steps: 40, CFG scale: 4.0, Seed: {2**64 - 1}, Size: 7x5, Model: jdopensource/JoyAI-Image-Edit"
        )


def test_without_metadata_the_file_carries_nothing(tmp_path):
    path = im.save_png(picture(), tmp_path / "out.png")
    with PIL.Image.open(path) as opened:
        assert opened.text == {}
    with pytest.raises(ValueError, match="out.png carries no joyedit metadata"):
        im.read_metadata(path)


def test_colour_profile_is_kept_and_everything_else_of_the_photograph_dropped(tmp_path):
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = 1
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 0.0)
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("Author", "somebody")
    (tmp_path / "photo.png").write_bytes(
        encoded(picture(), "PNG", exif=exif, icc_profile=profile, pnginfo=text, dpi=(300, 300))
    )
    photo = im.load_image(tmp_path / "photo.png")
    assert photo.info["icc_profile"] == profile
    path = im.save_png(photo, tmp_path / "out.png", {}, icc_profile=photo.info["icc_profile"])
    with PIL.Image.open(path) as opened:
        opened.load()
        assert opened.info["icc_profile"] == profile
        assert not opened.getexif() and {"exif", "Author", "dpi"}.isdisjoint(opened.info)
    photo.info["transparency"] = (1, 2, 3)
    im.save_png(photo, path, force=True)
    with PIL.Image.open(path) as opened:
        assert opened.info == {}
    grey = profile[:16] + b"GRAY" + profile[20:]
    with PIL.Image.open(im.save_png(photo, path, force=True, icc_profile=grey)) as opened:
        assert opened.info == {}


def test_nothing_is_overwritten_and_nothing_half_written_is_left(tmp_path, monkeypatch):
    path = im.save_png(picture(seed=1), tmp_path / "out.png", METADATA)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="out.png"):
        im.save_png(picture(seed=2), path, METADATA)

    def disk_full(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PIL.Image.Image, "save", disk_full)
    with pytest.raises(OSError, match="No space left"):
        im.save_png(picture(seed=2), path, METADATA, force=True)
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out.png"]
    im.save_png(picture(seed=2), path, METADATA, force=True)
    assert np.array_equal(pixels(im.load_image(path)), pixels(picture(seed=2)))


@pytest.mark.parametrize(
    "wrong", [{"a": math.nan}, {"a": object()}, {"a": {1, 2}}], ids=["nan", "object", "set"]
)
def test_metadata_that_is_not_json_is_refused_before_writing(wrong, tmp_path):
    with pytest.raises(ValueError, match="metadata cannot be written as JSON"):
        im.save_png(picture(), tmp_path / "out.png", wrong)
    assert not list(tmp_path.iterdir())


def test_files_without_readable_metadata_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must end in .png"):
        im.save_png(picture(), tmp_path / "out.jpg")
    with pytest.raises(FileNotFoundError):
        im.read_metadata(tmp_path / "nowhere.png")
    for content, message in (
        (b"text", "not a readable image"),
        (encoded(picture(), "JPEG"), "carries no joyedit"),
    ):
        (tmp_path / "given").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            im.read_metadata(tmp_path / "given")
    for damaged in ("{", "[1]", "nul"):
        text = PIL.PngImagePlugin.PngInfo()
        text.add_itxt("joyedit", damaged)
        (tmp_path / "given").write_bytes(encoded(picture(), "PNG", pnginfo=text))
        with pytest.raises(ValueError, match="joyedit metadata is"):
            im.read_metadata(tmp_path / "given")


def test_parameters_without_settings_are_the_prompt():
    assert im.parameters_text({"prompt": "a cat"}) == "a cat"
    assert im.parameters_text({}) == ""
