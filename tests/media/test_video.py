"""Films, PNG sequences and animations, read again with other programs than the ones under test."""

import sys

import av
import numpy as np
import PIL.Image
import pytest
import torch

import joyedit
from joyedit.media.video import check_video_path, export_to_png, export_to_video, export_to_webp, save_video

HEIGHT, WIDTH, COUNT = 48, 80, 5


@pytest.fixture
def frames():
    """(T, H, W, 3) float in [0, 1]: gradients, with blue that rises from frame to frame."""
    y, x, t = np.mgrid[0:HEIGHT, 0:WIDTH, 0:COUNT]
    film = np.stack([x / (WIDTH - 1), y / (HEIGHT - 1), t / (COUNT - 1)], axis=-1)
    return np.moveaxis(film, 2, 0).astype(np.float32)


def read(path):
    """(T, H, W, 3) uint8 of a film, and its stream."""
    with av.open(str(path)) as film:
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        return np.stack(pictures), film.streams.video[0]


def test_a_film_is_read_again(frames, tmp_path):
    path = tmp_path / "new folder" / "out.mp4"
    assert export_to_video(frames, path, fps=16) == str(path)
    pictures, stream = read(path)
    assert pictures.shape == (COUNT, HEIGHT, WIDTH, 3)
    assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert stream.average_rate == 16
    context = stream.codec_context
    assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (
        1,
        1,
        1,
        1,
    )
    assert [p.name for p in path.parent.iterdir()] == ["out.mp4"]
    error = pictures - 255.0 * frames
    assert np.abs(error).mean() < 4 and np.abs(error).max() < 25
    assert np.abs(error.mean(axis=(0, 1, 2))).max() < 3


@pytest.mark.parametrize("value", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 30, 120), (128, 128, 128)])
def test_colours(value, tmp_path):
    """Saturated ones differ by 20 levels and more when the matrix written is not the one declared."""
    flat = np.full((3, 32, 32, 3), value, dtype=np.uint8)
    pictures, _ = read(export_to_video(flat, tmp_path / "flat.mp4", quality=10))
    assert np.abs(pictures.astype(int) - value).max() <= 4


def test_floats_are_rounded(tmp_path):
    """A level of 199.7 is 200, not 199; the reference cuts it off."""
    [path] = export_to_png(np.full((1, 4, 4, 3), 199.7 / 255), tmp_path)
    assert np.unique(np.asarray(PIL.Image.open(path))).tolist() == [200]


@pytest.mark.parametrize("kind", ["floats", "uint8", "list", "PIL", "grey PIL", "tensor", "bf16", "tensors"])
def test_kinds_of_frames(kind, frames, tmp_path):
    levels = (frames * 255).round().astype(np.uint8)
    tensor = torch.from_numpy(frames).movedim(-1, 1)
    given = {
        "floats": frames,
        "uint8": levels,
        "list": list(frames),
        "PIL": [PIL.Image.fromarray(page) for page in levels],
        "grey PIL": [PIL.Image.fromarray(page[..., 0]) for page in levels],
        "tensor": tensor,
        "bf16": tensor.bfloat16(),
        "tensors": list(tensor),
    }[kind]
    paths = export_to_png(given, tmp_path / "png")
    assert [p.name for p in paths] == [f"frame_{i:04}.png" for i in range(COUNT)]
    pictures = np.stack([np.asarray(PIL.Image.open(p)) for p in paths])
    if kind == "grey PIL":
        levels = np.repeat(levels[..., :1], 3, axis=-1)
    assert pictures.dtype == np.uint8 and np.abs(pictures.astype(int) - levels).max() <= (kind == "bf16")
    film, _ = read(export_to_video(given, tmp_path / "out.mp4"))
    assert film.shape == levels.shape
    assert np.abs(film.astype(float) - levels).mean() < 5


@pytest.mark.parametrize("fps", [8, 10, 16, 23.976, 30.0])
def test_frames_per_second(fps, frames, tmp_path):
    with av.open(export_to_video(frames, tmp_path / "out.mp4", fps=fps)) as film:
        times = [frame.time for frame in film.decode(video=0)]
        assert float(film.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-4)
    np.testing.assert_allclose(times, np.arange(COUNT) / fps, atol=2e-3)


def test_quality_and_bitrate(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    sizes, errors = [], []
    for quality in (0, 5, 10):
        path = tmp_path / f"{quality}.mp4"
        pictures, _ = read(export_to_video(noise, path, quality=quality))
        sizes.append(path.stat().st_size)
        errors.append(np.abs(pictures.astype(float) - noise).mean())
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True) and sizes[0] < sizes[2] / 4
    low, high = (tmp_path / f"rate{rate}.mp4" for rate in (100_000, 4_000_000))
    export_to_video(noise, low, bitrate=100_000)
    export_to_video(noise, high, bitrate=4_000_000, quality=None)
    assert low.stat().st_size < high.stat().st_size


def test_odd_sizes_are_padded_with_their_border(tmp_path):
    flat = np.full((3, 15, 21, 3), (200, 30, 120), dtype=np.uint8)
    pictures, _ = read(export_to_video(flat, tmp_path / "odd.mp4", quality=10))
    assert pictures.shape == (3, 16, 22, 3)
    assert np.abs(pictures.astype(int) - (200, 30, 120)).max() <= 4
    pictures, _ = read(export_to_video(flat, tmp_path / "blocks.mp4", macro_block_size=16))
    assert pictures.shape == (3, 16, 32, 3)
    for block in (None, 1):
        with pytest.raises(ValueError, match="21 x 15.*macro_block_size"):
            export_to_video(flat, tmp_path / "no.mp4", macro_block_size=block)
    assert not (tmp_path / "no.mp4").exists()


def test_without_a_path_a_temporary_file_is_written(frames):
    path = joyedit.export_to_video(frames)
    assert path.endswith(".mp4") and len(read(path)[0]) == COUNT


@pytest.mark.parametrize("suffix", [".mov", ".mkv", ".MP4"])
def test_other_containers(suffix, frames, tmp_path):
    assert len(read(export_to_video(frames, tmp_path / f"out{suffix}"))[0]) == COUNT


def test_one_frame(frames, tmp_path):
    assert len(read(export_to_video(frames[:1], tmp_path / "one.mp4"))[0]) == 1


def test_a_failure_leaves_what_was_there(frames, tmp_path, monkeypatch):
    path = tmp_path / "out.mp4"
    export_to_video(frames, path)
    before = path.read_bytes()

    def fails(*_, **__):
        raise RuntimeError("full disk")

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fails)
    with pytest.raises(RuntimeError, match="full disk"):
        export_to_video(frames[:2], path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_existing_film_is_replaced(frames, tmp_path):
    export_to_video(frames, tmp_path / "out.mp4")
    export_to_video(frames[:2], tmp_path / "out.mp4")
    assert len(read(tmp_path / "out.mp4")[0]) == 2


def test_without_pyav(frames, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install joyedit\[video\]"):
        export_to_video(frames, tmp_path / "out.mp4")
    with pytest.raises(ImportError, match=r"pip install joyedit\[video\]"):
        check_video_path(tmp_path / "out.mp4")
    check_video_path(tmp_path / "out.webp")
    assert len(export_to_png(frames, tmp_path / "png")) == COUNT
    export_to_webp(frames, tmp_path / "out.webp")


def test_an_encoder_that_is_missing(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"png"})
    with pytest.raises(ImportError, match="libx264"):
        export_to_video(frames, tmp_path / "out.mp4")


def test_what_else_a_photograph_carries_is_not_written(tmp_path):
    photo = PIL.Image.new("RGB", (4, 4))
    photo.info["comment"] = photo.info["icc_profile"] = b"private"
    [path] = export_to_png([photo], tmp_path)
    assert b"private" not in path.read_bytes() and photo.info["comment"] == b"private"


def test_frames_of_another_film_are_not_mixed_in(frames, tmp_path):
    export_to_png(frames, tmp_path)
    export_to_png(frames[::-1], tmp_path)
    assert np.asarray(PIL.Image.open(tmp_path / "frame_0000.png"))[0, 0, 2] == 255
    with pytest.raises(FileExistsError, match="frame_0002.png"):
        export_to_png(frames[:2], tmp_path)


@pytest.mark.parametrize("fps", [16, 7.5])
def test_an_animation(fps, frames, tmp_path):
    export_to_webp(frames, tmp_path / "out.webp", fps=fps, lossless=True)
    with PIL.Image.open(tmp_path / "out.webp") as opened:
        assert opened.n_frames == COUNT and opened.info["loop"] == 0
        duration = 0
        for i, frame in enumerate(frames):
            opened.seek(i)
            opened.load()
            duration += opened.info["duration"]
            assert np.array_equal(np.asarray(opened.convert("RGB")), (frame * 255).round().astype(np.uint8))
    assert abs(duration - 1000 * COUNT / fps) < 1
    export_to_webp(frames, tmp_path / "lossy.webp", quality=80)
    with PIL.Image.open(tmp_path / "lossy.webp") as opened:
        assert np.abs(np.asarray(opened.convert("RGB")) - 255 * frames[0]).mean() < 6


def test_the_name_says_what_is_written(frames, tmp_path):
    for name, kind in {"a.mp4": "film", "a.webp": "animation", "frames": "pictures"}.items():
        path = tmp_path / name
        assert save_video(frames, path, fps=8) == path
        with pytest.raises(FileExistsError, match=name):
            save_video(frames, path)
        save_video(frames, path, force=True)
        if kind == "film":
            pictures, stream = read(path)
            assert len(pictures) == COUNT and stream.average_rate == 10
        elif kind == "animation":
            assert PIL.Image.open(path).n_frames == COUNT
        else:
            assert len(list(path.glob("*.png"))) == COUNT
    with pytest.raises(ValueError, match="must end in .mp4"):
        check_video_path(tmp_path / "a.gif")
    (tmp_path / "empty").mkdir()
    check_video_path(tmp_path / "empty")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"output_video_path": "out.avi"}, "out.avi"),
        ({"fps": 0}, "fps=0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"quality": 11}, "quality=11"),
        ({"bitrate": 0}, "bitrate=0"),
        ({"macro_block_size": 0}, "macro_block_size=0"),
        ({"video_frames": []}, "video_frames is an empty list"),
        ({"video_frames": np.full((2, 4, 4, 3), 1.5)}, "video_frames holds"),
        ({"video_frames": np.zeros((2, 4, 4))}, "video_frames has shape"),
        ({"video_frames": [np.zeros((4, 4, 3)), np.zeros((4, 6, 3))]}, "several sizes"),
    ],
)
def test_what_is_refused(arguments, message, frames, tmp_path):
    arguments = {"video_frames": frames, "output_video_path": tmp_path / "out.mp4", **arguments}
    with pytest.raises(ValueError, match=message):
        export_to_video(**arguments)
    assert not list(tmp_path.iterdir())


def test_what_an_animation_refuses(frames, tmp_path):
    with pytest.raises(ValueError, match="webp"):
        export_to_webp(frames, tmp_path / "out.gif")
    with pytest.raises(ValueError, match="quality=101"):
        export_to_webp(frames, tmp_path / "out.webp", quality=101)
    with pytest.raises(ValueError, match="fps=-1"):
        export_to_webp(frames, tmp_path / "out.webp", fps=-1)
    with pytest.raises(TypeError, match="video_frames"):
        export_to_png("frames.png", tmp_path)
