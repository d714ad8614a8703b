"""Frames to a film, a folder of pictures or an animation; and the frames of a film.

Frames come as pipelines return them: PIL images, numpy (T, H, W, 3), tensors (T, 3, H, W), uint8 or floating
point in [0, 1], or lists of single ones. Floating point is rounded to 8 bit (the reference cuts it off, which
darkens by half a level).

An mp4 is H.264 with every second colour sample in both directions (yuv420p, which every player reads), so
its pixels are near those of the frames, not equal; it needs PyAV. PNG files are equal. An animated WebP opens
in browsers and needs Pillow only.

T frames   H, W pixels
Source: diffusers `utils/export_utils.py`; imageio-ffmpeg for the meaning of `quality`; ITU-R BT.709.
"""

import math
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.features
from PIL.Image import Image

from joyedit.checkpoints.replacing import replacing
from joyedit.media.images import save_png, to_pil_list

FILMS = (".mp4", ".mov", ".mkv")
BT709 = 1  # ITU-T H.273: primaries, transfer and matrix of high definition have the same number
LIMITED_RANGE = 1


def save_video(frames: Any, path: str | Path, fps: float = 10, *, force: bool = False) -> Path:
    """Write frames as what the name asks for: .mp4, .mov and .mkv a film, .webp an animation, no suffix a
    folder of PNG files. Returns the path. Raises as `check_video_path` and the writers do."""
    path = Path(path)
    check_video_path(path, force=force)
    write: Callable[..., Any]
    write = export_to_video if path.suffix.lower() in FILMS else export_to_webp
    if path.suffix:
        write(frames, path, fps=fps)
    else:
        export_to_png(frames, path, force=force)
    return path


def check_video_path(path: str | Path, *, force: bool = False) -> None:
    """What `save_video` would refuse, before frames are computed: ValueError for a name of another kind,
    FileExistsError for what is there already and not `force`, ImportError for a film without PyAV."""
    path = Path(path)
    if path.suffix.lower() not in ("", ".webp", *FILMS):
        known = ", ".join((*FILMS, ".webp"))
        raise ValueError(f"path {str(path)!r} must end in {known}, or in nothing for a folder of PNG files")
    if path.exists() and not force and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; pass force=True to replace it")
    if path.suffix.lower() in FILMS:
        _import_av()


def export_to_video(
    video_frames: Any,
    output_video_path: str | Path | None = None,
    fps: float = 10,
    quality: float | None = 5.0,
    bitrate: int | None = None,
    macro_block_size: int | None = 2,
) -> str:
    """Write frames as H.264 (.mp4, .mov or .mkv); returns the path, of a temporary file when none is given.

    quality: from 0 to 10, the best; None leaves it to the encoder. bitrate: bits per second instead of it.
    macro_block_size: sides that are no multiple of it are made longer, with copies of the last row and
        column. (The reference stretches pictures, to multiples of 16.) yuv420p needs at least 2.

    An existing file is replaced; the file appears whole or not at all. Raises ImportError without PyAV,
    ValueError for frames that are not images of one size, and for settings out of their range.
    """
    if output_video_path is not None and Path(output_video_path).suffix.lower() not in FILMS:
        raise ValueError(f"output_video_path {str(output_video_path)!r} must end in {', '.join(FILMS)}")
    if quality is not None and not 0 <= quality <= 10:
        raise ValueError(f"quality={quality!r}: must be from 0 to 10")
    if bitrate is not None and bitrate < 1:
        raise ValueError(f"bitrate={bitrate!r}: must be positive")
    frames, rate = _frames(video_frames), _rate(fps)
    block = 1 if macro_block_size is None else macro_block_size
    if block < 1:
        raise ValueError(f"macro_block_size={macro_block_size!r}: must be positive")
    height, width = (math.ceil(side / block) * block for side in (frames[0].height, frames[0].width))
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width} x {height}: H.264 needs even sides (macro_block_size=2)")

    av = _import_av()
    path = Path(output_video_path or Path(tempfile.mkdtemp(prefix="joyedit-"), "video.mp4"))
    options = {} if quality is None or bitrate is not None else {"crf": str(int((1 - quality / 10) * 51))}
    with replacing(path) as temporary, av.open(str(temporary), "w", options=_container(path)) as film:
        stream = film.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if bitrate is not None:
            stream.bit_rate = bitrate
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        for frame in frames:
            pixels = np.asarray(frame)
            border = ((0, height - frame.height), (0, width - frame.width), (0, 0))
            picture = av.VideoFrame.from_ndarray(np.pad(pixels, border, mode="edge"), format="rgb24")
            film.mux(stream.encode(picture.reformat(format="yuv420p", dst_colorspace=BT709)))
        film.mux(stream.encode(None))
    return str(path)


def export_to_png(video_frames: Any, folder: str | Path, *, force: bool = False) -> list[Path]:
    """Write frames as frame_0000.png, frame_0001.png, ... into a folder; returns their paths.

    They appear together, when the last one is written. Files of those names are replaced. Further frames in
    the folder would be taken for a part of this film: with `force` they are removed, without it they raise
    FileExistsError.
    """
    folder, frames = Path(folder), _frames(video_frames)
    paths = [folder / f"frame_{i:04}.png" for i in range(len(frames))]
    others = sorted({*folder.glob("frame_*.png")} - {*paths})
    if others and not force:
        raise FileExistsError(f"{folder} holds frames of another film ({others[0].name}): remove them first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        for frame, path in zip(frames, paths, strict=True):
            save_png(frame, Path(temporary, path.name))
        folder.mkdir(exist_ok=True)
        for path in paths:
            Path(temporary, path.name).replace(path)
        for other in others:
            other.unlink()
    return paths


def export_to_webp(
    video_frames: Any, path: str | Path, fps: float = 10, quality: float = 90, lossless: bool = False
) -> str:
    """Write frames as an animated WebP that repeats for ever; returns the path.

    quality: from 0 to 100, the best; with `lossless` the effort. Equal frames in a row become one, shown
    longer. An existing file is replaced. Raises ValueError as `export_to_video`, and when Pillow has no WebP.
    """
    path = Path(path)
    if path.suffix.lower() != ".webp":
        raise ValueError(f"path {str(path)!r} must end in .webp")
    if not 0 <= quality <= 100:
        raise ValueError(f"quality={quality!r}: must be from 0 to 100")
    if not PIL.features.check("webp"):
        raise ValueError("this build of Pillow cannot write WebP")
    frames, rate = _frames(video_frames), _rate(fps)
    # Whole milliseconds, so that the film as a whole has the right length.
    starts = [round(i * 1000 / rate) for i in range(len(frames) + 1)]
    durations = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    with replacing(path) as temporary:
        frames[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            quality=quality,
            lossless=lossless,
        )
    return str(path)


def read_video(path: str | Path) -> list[Image]:
    """All frames of a film, RGB, upright. Raises FileNotFoundError, ValueError for what is no film or is
    damaged, ImportError without PyAV."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"film {str(path)!r} does not exist")
    av = _import_av("reading")
    try:
        with av.open(str(path)) as film:
            frames = list(film.decode(video=0))
    except (av.FFmpegError, IndexError) as error:  # no stream of pictures
        raise ValueError(f"film {str(path)!r} cannot be read: {error}") from None
    turns = {90: 2, 180: 3, -180: 3, -90: 4}  # counter-clockwise, as PIL.Image.Transpose numbers them
    return [
        picture.transpose(turns[turn]) if (turn := round(frame.rotation)) in turns else picture
        for frame in frames
        for picture in [frame.to_image()]
    ]


def _frames(video_frames: Any) -> list[Image]:
    frames = to_pil_list(video_frames, "video_frames")
    sizes = {frame.size for frame in frames}
    if len(sizes) > 1:
        raise ValueError(f"video_frames have several sizes: {sorted(sizes)}")
    return frames


def _rate(fps: float) -> Fraction:
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps!r}: must be positive, and at most 1000")
    return Fraction(fps).limit_denominator(1001)


def _container(path: Path) -> dict[str, str]:
    """The index of an mp4 goes to its beginning: a player can start before it has read the file."""
    return {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}


def _import_av(work: str = "writing") -> Any:
    try:
        import av
    except ImportError:
        raise ImportError(f"{work} a film needs PyAV: pip install joyedit[video]") from None
    if work == "writing" and "libx264" not in av.codecs_available:
        raise ImportError("this build of PyAV has no libx264; that of `pip install joyedit[video]` has")
    return av
