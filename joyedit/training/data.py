"""Pairs from a folder, and their pictures as the networks take them.

    data/target/0001.png  data/target/0001.txt     the picture as it shall be, and the instruction
    data/control/0001.jpg                          the photograph; several references: 0001_0.jpg, 0001_1.jpg
    data/mask/0001.png                             optional: white counts
    data/valid/{target,control}/...                optional: what the validation loss is measured on

or one metadata.jsonl or metadata.csv (see `metadata`). ChronoEdit also takes clips as targets, DiffEdit takes
targets alone.

A control must lie under its target to the pixel: an adapter learns whatever shift or stretch there is between
them, and repeats it in every edit. So the target chooses the bucket and the crop, and a control of the same
shape, whatever its size, gets the same crop. A photograph's EXIF orientation is applied first.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
from PIL.Image import Image

from joyedit.media import images as im
from joyedit.media.decoding import to_rgb
from joyedit.media.video import read_video
from joyedit.training import folders, metadata
from joyedit.training.cache import Hashes
from joyedit.training.pairs import Fault, FaultyPairs, Pair

Size = tuple[int, int]  # height, width

VALID = "valid"


def read_pairs(folder: str | Path, *, decode: bool = True) -> dict[str, Pair]:
    """The pairs of a folder by name, in the order of the names, or of the lines of its metadata.

    Raises FileNotFoundError for no folder, ValueError for one that holds no set, and FaultyPairs, which names
    every pair and file that cannot be used: without partner or caption, or, if they are decoded, unreadable.
    """
    pairs, faults = find_pairs(folder)
    if decode:
        faults = faults + unreadable(list(pairs.values()))
    if faults:
        raise FaultyPairs(Path(folder), faults)
    return pairs


def find_pairs(folder: str | Path) -> tuple[dict[str, Pair], list[Fault]]:
    """The pairs of a folder by name that are whole, as far as names and captions say, and what is wrong with
    the others. Raises FileNotFoundError for no folder, ValueError for one that holds no set."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    table = metadata.find(folder)
    if table is None and not folders.is_set(folder):
        names = ", ".join(metadata.FILES[:2])
        raise ValueError(f"{folder} holds no training set: neither target/ (or images/) nor {names}")
    pairs, faults = folders.read_folders(folder) if table is None else metadata.read_metadata(table)
    if not pairs and not faults:
        raise ValueError(f"{table or folder} holds no pairs")
    return {pair.name: pair for pair in pairs}, faults


def unreadable(pairs: Sequence[Pair], known: Hashes | None = None) -> list[Fault]:
    """What cannot be decoded; a file of several pairs is looked at once, and not again if it is known."""
    names: dict[Path, list[str]] = {}
    for pair in pairs:
        for path in pair.files:
            names.setdefault(path, []).append(pair.name)

    def look(path: Path) -> Size | str:
        try:
            return size_of(open_frames(path)[0])
        except (OSError, ValueError) as error:
            return str(error)

    files = [path for path in names if known is None or known.shape_of(path) is None]
    faults = []
    with ThreadPoolExecutor() as pool:
        for path, found in zip(files, pool.map(look, files), strict=True):
            if isinstance(found, str):
                faults += [Fault(name, found) for name in names[path]]
            elif known is not None:
                known.note(path, found)
    return faults


def open_frames(path: Path) -> list[Image]:
    """The frames of a clip, RGB; of a picture one, RGB, or RGBA where it is transparent, upright."""
    if Pair("", path, "").is_clip:
        frames = read_video(path)
        if len(frames) < 2:
            raise ValueError(f"clip {str(path)!r} has {len(frames)} frames: it must begin before the edit")
        return frames
    return [im.load_image(path, lambda image: to_rgb(image, alpha=True))]


def load_pair(pair: Pair, buckets: Sequence[Size]) -> tuple[Image, list[Image]]:
    """The target in the bucket, (height, width), nearest to it, and the controls.

    A control of the target's shape lies under it to the pixel. One of another shape, if it is the only one,
    covers the target's bucket; of several references each covers the bucket nearest to itself. Transparent
    controls stay transparent. Of a clip, the first frame is the control and the last one the target.
    """
    frames = open_frames(pair.target)
    target = frames[-1].convert("RGB")
    controls = frames[:1] if pair.is_clip else [open_frames(path)[0] for path in pair.controls]
    shape = size_of(target)
    bucket = im.nearest_bucket(*shape, buckets)
    fit = im.fit_cover(shape, bucket)
    placed = []
    for control in controls:
        own = size_of(control)
        if same_shape(own, shape):
            placed.append(crop(control, fit, bucket))
        else:
            other = bucket if len(controls) == 1 else im.nearest_bucket(*own, buckets)
            placed.append(im.resize_center_crop(control, *other))
    return crop(target, fit, bucket), placed


def load_film(pair: Pair, buckets: Sequence[Size], count: int) -> list[Image]:
    """`count` frames of a clip in its bucket, from the first to the last, equally far apart in time."""
    frames = open_frames(pair.target)
    shape = size_of(frames[-1])
    bucket = im.nearest_bucket(*shape, buckets)
    fit = im.fit_cover(shape, bucket)
    last = len(frames) - 1
    return [crop(frames[round(i * last / (count - 1))], fit, bucket) for i in range(count)]


def load_mask(pair: Pair, buckets: Sequence[Size]) -> Image | None:
    """The pair's mask, grey, cropped as its target."""
    if pair.mask is None:
        return None
    shape = size_of(open_frames(pair.target)[-1])
    bucket = im.nearest_bucket(*shape, buckets)
    grey = im.load_image(pair.mask).convert("L")
    if same_shape(size_of(grey), shape):
        return crop(grey, im.fit_cover(shape, bucket), bucket)
    return im.resize_center_crop(grey, *bucket)


def crop(image: Image, fit: im.Fit, bucket: Size) -> Image:
    """Resized and cropped as `fit` says, whatever size the picture has. For the picture that the fit was made
    for, this is `images.resize_center_crop`."""
    resized = image.resize((fit.width, fit.height), PIL.Image.Resampling.BILINEAR)
    return resized.crop((fit.left, fit.top, fit.left + bucket[1], fit.top + bucket[0]))


def size_of(image: Image) -> Size:
    return image.height, image.width


def same_shape(one: Size, other: Size) -> bool:
    """Whether one size is the other scaled and rounded to whole pixels, up or down."""
    small, large = sorted((one, other))
    ranges = [((b - 1) / a, (b + 1) / a) for a, b in zip(small, large, strict=True)]
    (low, high), (lowest, highest) = ranges
    return max(low, lowest) <= min(high, highest)
