"""Photographs to tensors and back.

Reading (a file or URL, see `decoding` and `download`), the lists of images that pipelines take, buckets and
the crop into them, the patches that the Qwen vision tower reads, the pixels that an autoencoder reads and
writes, PNG files that carry their parameters, grids.

B images   H, W pixels   gh, gw patches (gh = H / 16, gw = W / 16)

Sizes are (height, width) everywhere, except PIL's own `size`. Pixels are uint8 until the last step: the
resize before the vision tower is the bicubic one on uint8 tensors, which differs visibly from that on floats.

Source: diffusers `pipelines/joyimage/image_processor.py`, `utils/loading_utils.py`; transformers
`image_processing_qwen2_vl.py`; the JoyAI-Image bucket generator.
"""

import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import torch
from einops import rearrange, repeat
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F

from joyedit import __version__
from joyedit.checkpoints.config import Config
from joyedit.checkpoints.plain_text import visible
from joyedit.checkpoints.replacing import replacing
from joyedit.media.decoding import decode, reason, to_rgb, turned
from joyedit.media.download import download, is_url, shown_url, url_scheme

log = logging.getLogger("joyedit")

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
BUCKET_BASES = (256, 512, 768, 1024)
DOWNLOAD_SECONDS = 30.0
DOWNLOAD_BYTES = 200_000_000


def load_image(
    image: str | Path | Image,
    convert_method: Callable[[Image], Image] | None = None,
    *,
    size: tuple[int, int] | None = None,
    timeout: float = DOWNLOAD_SECONDS,
    max_bytes: int = DOWNLOAD_BYTES,
) -> Image:
    """An RGB photograph from a path, an http(s) URL or a PIL image, turned as its EXIF orientation says.

    Transparency is dropped, as in diffusers; of an animated file the first frame is read. `convert_method`
    replaces the conversion to RGB. size: the (height, width) at which it is wanted; only a JPEG of more than
    PIL.Image.MAX_IMAGE_PIXELS is then read smaller, but not below it. A download may take `timeout` seconds
    in all, and `max_bytes` bytes.

    Raises FileNotFoundError for a missing file or page, TimeoutError or ConnectionError when a download
    fails, ValueError for what is not an image, is damaged, or has more than twice as many pixels as that
    limit of Pillow's (between once and twice a warning is logged).
    Source: diffusers `load_image`; pictures of 16 bit are scaled to 8 bit here, there they are cut off at
    255.
    """
    if isinstance(image, Image):
        return _convert(image, convert_method)
    if not isinstance(image, (str, Path)):
        raise TypeError(f"image is a {type(image).__name__}: must be a path, an http(s) URL or a PIL image")
    if is_url(str(image)):
        content = download(str(image), timeout, max_bytes)
        return _read(io.BytesIO(content), shown_url(str(image)), convert_method, size)
    path = _local_path(image)
    with path.open("rb") as file:
        return _read(file, str(path), convert_method, size)


def load_photo(source: str | Path, *, size: tuple[int, int] | None = None) -> tuple[Image, str]:
    """The photograph as `load_image` gives it, and the sha256 of its file. Errors as there."""
    if is_url(str(source)):
        content = download(str(source), DOWNLOAD_SECONDS, DOWNLOAD_BYTES)
        image = _read(io.BytesIO(content), shown_url(str(source)), None, size)
        return image, hashlib.sha256(content).hexdigest()
    path = _local_path(source)
    with path.open("rb") as file:
        image = _read(file, str(path), None, size)
    with path.open("rb") as file:
        return image, hashlib.file_digest(file, "sha256").hexdigest()


def _local_path(source: str | Path) -> Path:
    """Raises FileNotFoundError or ValueError when there is no file."""
    path = Path(os.path.expanduser(source))  # which leaves the name of an unknown user as it is
    if not path.exists():
        scheme = url_scheme(str(source))
        if scheme is not None:
            raise ValueError(f"image {shown_url(str(source))!r}: only http and https are read, not {scheme}")
        raise FileNotFoundError(f"image {str(path)!r} does not exist")
    if not path.is_file():
        raise ValueError(f"image {str(path)!r} is not a file")
    return path


def on_white(image: Image) -> Image:
    """An RGB picture of an RGBA one before a white ground, which is how encoders that were trained on web
    pages see it; any other itself. Source: transformers `convert_to_rgb`."""
    if image.mode != "RGBA":
        return image
    ground = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(ground, image).convert("RGB")


def to_pil_list(images: Any, name: str = "image", alpha: bool = False) -> list[Image]:
    """What a pipeline was given as images, as RGB PIL images; with alpha, those of transparent ones as RGBA.

    Takes PIL images of any mode, numpy (H, W, 3) or (B, H, W, 3), tensors (3, H, W) or (B, 3, H, W), and flat
    lists of these; arrays and tensors are uint8, or floating point in [0, 1], which is rounded to 8 bit.
    Raises ValueError (shape, dtype, NaN or infinity, range, nothing) and TypeError, naming the argument.
    """
    if isinstance(images, (list, tuple)):
        if not images:
            raise ValueError(f"{name} is an empty list")
        return [one for i, item in enumerate(images) for one in _to_pil(item, f"{name}[{i}]", alpha)]
    return _to_pil(images, name, alpha)


def _to_pil(image: Any, name: str, alpha: bool) -> list[Image]:
    if isinstance(image, Image):
        if 0 in image.size:
            raise ValueError(f"{name} is empty: {image.width} x {image.height} pixels")
        try:
            return [to_rgb(image, alpha)]
        except Exception as error:  # of the decoder, if the file was not read yet
            raise ValueError(f"{name} cannot be read: {reason(error)}") from None
    if isinstance(image, np.ndarray):
        array, channels, shapes = image, -1, "(H, W, 3) or (B, H, W, 3)"
    elif isinstance(image, Tensor):
        plain = image.detach().cpu()
        array = (plain.float() if plain.is_floating_point() else plain).numpy()
        channels, shapes = -3, "(3, H, W) or (B, 3, H, W)"
    else:
        allowed = "a PIL image, a numpy array, a tensor, or a list of these (paths and URLs: load_image)"
        raise TypeError(f"{name} is a {type(image).__name__}: must be {allowed}")
    if array.ndim not in (3, 4) or array.shape[channels] != 3 or 0 in array.shape:
        raise ValueError(f"{name} has shape {tuple(array.shape)}: must be {shapes}, and not empty")
    pages = np.moveaxis(array if array.ndim == 4 else array[None], channels, -1)
    pages = pages if pages.dtype == np.uint8 else _to_uint8(pages, name)
    return [PIL.Image.fromarray(np.ascontiguousarray(page)) for page in pages]


def _to_uint8(array: np.ndarray, name: str) -> np.ndarray:
    """Floating point in [0, 1] to 0..255, rounded half to even as the reference does."""
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} has dtype {array.dtype}: must be uint8, or floating point in [0, 1]")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity")
    if array.min() < 0 or array.max() > 1:
        raise ValueError(f"{name} holds {array.min():.4g} to {array.max():.4g}: must be in [0, 1]")
    return (array.astype(np.float32) * 255).round().astype(np.uint8)


def _read(
    file: Any, name: str, convert_method: Callable[[Image], Image] | None, size: tuple[int, int] | None
) -> Image:
    opened = decode(file, name, size)
    try:
        return _convert(opened, convert_method)
    except ValueError as error:
        raise ValueError(f"image {name!r}: {error}") from None


def _convert(image: Image, convert_method: Callable[[Image], Image] | None) -> Image:
    converted = turned(image) if convert_method else to_rgb(image)
    own = converted.copy() if converted is image else converted
    return convert_method(own) if convert_method else own


def buckets(base: int = 1024) -> list[tuple[int, int]]:
    """The sizes (height, width) that a checkpoint trained at `base` works in: about base x base pixels, sides
    multiples of base / 16, at most 4 : 1, from wide to tall.

    Raises ValueError for a base other than 256, 512, 768 and 1024.
    Source: the JoyAI-Image generator (a walk along the largest areas at base 256, enlarged), in diffusers'
    order, which decides between two buckets that are equally near.
    """
    if base not in BUCKET_BASES:
        raise ValueError(f"base={base!r}: must be one of {BUCKET_BASES}")
    found = []
    height, width = 4096, 16
    while height > 0:
        if max(height, width) <= 4 * min(height, width):
            found.append((height * base // 256, width * base // 256))
        if height * (width + 16) <= 256 * 256:
            width += 16
        else:
            height -= 16
    return sorted(found)


def nearest_bucket(height: int, width: int, table: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket (height, width) whose height / width is nearest; of several equally near the first."""
    if height < 1 or width < 1:
        raise ValueError(f"height={height}, width={width}: both must be positive")
    return min(table, key=lambda bucket: abs(bucket[0] / bucket[1] - height / width))


def size_of_area(height: int, width: int, area: int = 720 * 1280, multiple: int = 16) -> tuple[int, int]:
    """The size (height, width) of at most about `area` pixels with the aspect ratio of the given one, sides
    rounded down to multiples of `multiple`. Raises ValueError when a side would be shorter than that.

    Source: the sizing recipe of ChronoEdit's examples, which resize the photograph to it.
    """
    if height < 1 or width < 1:
        raise ValueError(f"height={height}, width={width}: both must be positive")
    ratio = height / width
    size = (
        round(math.sqrt(area * ratio)) // multiple * multiple,
        round(math.sqrt(area / ratio)) // multiple * multiple,
    )
    if min(size) < multiple:
        raise ValueError(f"an image of {width} x {height} pixels is too narrow for an area of {area}")
    return size


STRETCH = 1.1  # the change of aspect ratio that is worth a warning


def stretch(size: tuple[int, int], other: tuple[int, int]) -> float:
    """The factor by which the aspect ratios of two sizes (height, width) differ, 1 or more."""
    change = size[0] * other[1] / (size[1] * other[0])
    return max(change, 1 / change)


class Fit(NamedTuple):
    """Where a photograph comes to lie in a bucket: resized to (height, width), about `scale` times its size,
    then cropped from (top, left) on."""

    scale: float
    height: int
    width: int
    top: int
    left: int


def fit_cover(size: tuple[int, int], bucket: tuple[int, int]) -> Fit:
    """The smallest resize of a photograph of `size` that covers `bucket` (both height, width), and the crop.

    Raises ValueError when the resized picture would be larger than Pillow's limit on decompression; into its
    nearest bucket that happens only to a stripe of more than 300 : 1.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    height, width = math.ceil(size[0] * scale), math.ceil(size[1] * scale)
    if height * width > (PIL.Image.MAX_IMAGE_PIXELS or math.inf):
        given, wanted = f"{size[1]} x {size[0]} pixels", f"{bucket[1]} x {bucket[0]}"
        raise ValueError(f"an image of {given} is too narrow to fill {wanted}")
    return Fit(scale, height, width, top=(height - bucket[0]) // 2, left=(width - bucket[1]) // 2)


def resize_center_crop(image: Image, height: int, width: int) -> Image:
    """Scale to cover (height, width) with PIL's antialiased bilinear filter, and crop the centre."""
    fit = fit_cover((image.height, image.width), (height, width))
    resized = image.resize((fit.width, fit.height), PIL.Image.Resampling.BILINEAR)
    return resized.crop((fit.left, fit.top, fit.left + width, fit.top + height))


@dataclasses.dataclass(frozen=True)
class Qwen2VLImageConfig(Config):
    """What `preprocessor_config.json` says that changes the patches; other keys are kept for saving."""

    image_processor_type: str = "Qwen2VLImageProcessorFast"
    patch_size: int = 16
    merge_size: int = 2
    temporal_patch_size: int = 2
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resample: int = 3  # PIL's number for bicubic
    do_convert_rgb: bool | None = True
    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_center_crop: bool | None = None
    do_pad: bool | None = None

    keeps_unknown = True
    supported = {
        "image_processor_type": tuple(
            f"Qwen{n}VLImageProcessor{kind}" for n in (2, 3) for kind in ("", "Fast", "Pil")
        ),
        "resample": (3,),
        "do_convert_rgb": (True, None),
        "do_resize": (True,),
        "do_rescale": (True,),
        "do_normalize": (True,),
        "do_center_crop": (False, None),
        "do_pad": (False, None),
    }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Pixel counts may be spelled size.shortest_edge / longest_edge (counts in spite of their names),
        size.min_pixels / max_pixels, or min_pixels / max_pixels, of which the last wins."""
        size = raw.get("size") or {}
        low = raw.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge")
        high = raw.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge")
        if not low or not high:
            raise ValueError("size says neither shortest_edge and longest_edge nor min_pixels and max_pixels")
        others = {key: value for key, value in raw.items() if key != "size"}
        return super().from_dict({**others, "min_pixels": low, "max_pixels": high})

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        low, high = values.pop("min_pixels"), values.pop("max_pixels")
        return {**values, "size": {"shortest_edge": low, "longest_edge": high}}


class Qwen2VLImageProcessor:
    """Pictures to the patches that the Qwen3-VL vision tower reads."""

    def __init__(self, config: Qwen2VLImageConfig | None = None):
        self.config = config or Qwen2VLImageConfig()

    def __call__(self, images: Any) -> dict[str, Tensor]:
        """Images as in `to_pil_list`, transparent ones before white -> pixel_values (sum of gh * gw, 1536)
        float32 in [-1, 1], a row per patch in the order (c, t, y, x), patches in 2 x 2 blocks;
        image_grid_thw (B, 3) of (1, gh, gw)."""
        config = self.config
        rows, grids = [], []
        for image in to_pil_list(images, "images", alpha=True):
            pixels = self.normalize(self.resize(on_white(image)))
            rows.append(patchify(pixels, config.patch_size, config.merge_size, config.temporal_patch_size))
            grids.append((1, pixels.shape[1] // config.patch_size, pixels.shape[2] // config.patch_size))
        return {"pixel_values": torch.cat(rows), "image_grid_thw": torch.tensor(grids, device="cpu")}

    def resize(self, image: Image) -> Tensor:
        """RGB image -> (3, H, W) uint8 with sides that are multiples of patch_size * merge_size."""
        config = self.config
        pixels = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w")
        factor = config.patch_size * config.merge_size
        size = smart_resize(image.height, image.width, factor, config.min_pixels, config.max_pixels)
        if size != (image.height, image.width):
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
        return pixels[0]

    def normalize(self, pixels: Tensor) -> Tensor:
        """(3, H, W) uint8 -> float32. Rescaling and normalisation in one step, to round as the reference."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device) * (1 / self.config.rescale_factor)
            for values in (self.config.image_mean, self.config.image_std)
        )
        return (pixels.float() - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def smart_resize(
    height: int, width: int, factor: int = 32, min_pixels: int = 65_536, max_pixels: int = 16_777_216
) -> tuple[int, int]:
    """The size (height, width) nearest to the given one with sides that are multiples of `factor` and an area
    between `min_pixels` and `max_pixels`. Raises ValueError for an aspect ratio above 200.

    Halves round to even. Source: transformers `image_processing_qwen2_vl.py`.
    """
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"an image of {width} x {height} pixels is too narrow: at most 200 : 1")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def patchify(
    pixels: Tensor, patch_size: int = 16, merge_size: int = 2, temporal_patch_size: int = 2
) -> Tensor:
    """(3, H, W) -> (gh * gw, 3 * t * p * p). Patches that the merger joins follow each other; a still picture
    is its own second frame."""
    return repeat(
        pixels,
        "c (h m1 p1) (w m2 p2) -> (h w m1 m2) (c t p1 p2)",
        m1=merge_size,
        m2=merge_size,
        p1=patch_size,
        p2=patch_size,
        t=temporal_patch_size,
    )


def to_latent_input(
    images: Sequence[Image], dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Images of one size -> (B, 3, 1, H, W) in [-1, 1]. The scaling happens in `dtype`, as in the reference.

    Raises ValueError for images of different sizes.
    """
    sizes = {image.size for image in images}
    if len(sizes) != 1:
        raise ValueError(f"images must have one size, not {sorted(sizes)} (width, height)")
    pixels = torch.from_numpy(np.stack([np.asarray(to_rgb(image)) for image in images]))
    return rearrange(pixels, "b h w c -> b c 1 h w").contiguous().to(device, dtype) / 127.5 - 1


def to_output(pixels: Tensor, output_type: str = "pil") -> Any:
    """Decoded (B, 3, H, W) in [-1, 1] -> "pil": list of images; "np": (B, H, W, 3) float32 in [0, 1]; "pt":
    (B, 3, H, W) float32 in [0, 1]. Raises ValueError for another `output_type`."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type={output_type!r}: must be 'pil', 'np' or 'pt'")
    pixels = (pixels.float() * 0.5 + 0.5).clamp(0, 1)
    if pixels.isnan().any():
        log.warning("the decoded image holds NaN: the run overflowed, try dtype=torch.float32 or bfloat16")
    if output_type == "pt":
        return pixels
    array = rearrange(pixels, "b c h w -> b h w c").cpu().numpy()
    if output_type == "np":
        return array
    levels = (np.nan_to_num(array) * 255).round().astype(np.uint8)
    return [PIL.Image.fromarray(page) for page in levels]


def make_image_grid(images: Sequence[Image], rows: int, cols: int, resize: int | None = None) -> Image:
    """`rows` x `cols` images in one, cells of the first image's size, or of `resize` x `resize`.

    Raises ValueError when there are not rows * cols images. Source: diffusers `make_image_grid`.
    """
    if not images or len(images) != rows * cols:
        raise ValueError(f"{len(images)} images do not fill rows={rows} x cols={cols}")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = PIL.Image.new("RGB", (cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % cols * width, i // cols * height))
    return grid


def save_png(
    image: Image,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    icc_profile: bytes | None = None,
    software: str = f"joyedit {__version__}",
) -> Path:
    """Write a PNG file that says how it was made; returns its path.

    With `metadata` the file gets three texts: "joyedit" (all of it, as JSON), "parameters" (what other
    programs read) and "Software". Nothing else that the image carries (EXIF, position, texts) is written; an
    ICC profile only when given (usually `photo.info.get("icc_profile")`) and meant for RGB.

    The file appears whole or not at all. Raises FileExistsError when it exists and not `force`, ValueError
    when its name does not end in .png or `metadata` is not JSON.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path {str(path)!r} must end in .png")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; pass force=True to replace it")
    texts = PIL.PngImagePlugin.PngInfo()
    if metadata is not None:
        texts.add_itxt("joyedit", _storable(_to_json({"schema": 1, **metadata})))
        texts.add_itxt("parameters", _storable(parameters_text(metadata)))
        texts.add_text("Software", f"{software} (AI-edited)")
    with replacing(path) as temporary:
        _bare(image).save(temporary, format="PNG", pnginfo=texts, icc_profile=_rgb_profile(icc_profile))
    return path


def save_picture(
    image: Image,
    path: str | Path,
    metadata: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    icc_profile: bytes | None = None,
    quality: int = 95,
) -> Path:
    """Write a picture in the format that the name's suffix says, with an ICC profile if it is one for RGB.

    A PNG file is as `save_png` writes it. Other formats carry no `metadata`; `quality` is that of the lossy
    ones (JPEG, WebP). The file appears whole or not at all. Raises FileExistsError when it exists and not
    `force`, ValueError for a suffix that Pillow does not write.
    """
    path, kind = Path(path), format_of(path)
    if path.suffix.lower() == ".png":
        return save_png(image, path, metadata, force=force, icc_profile=icc_profile)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; pass force=True to replace it")
    with replacing(path, force=force) as temporary:
        _bare(image).save(temporary, format=kind, quality=quality, icc_profile=_rgb_profile(icc_profile))
    return path


def format_of(path: str | Path) -> str:
    """The format that a file's suffix names, as Pillow calls it. Raises ValueError for one that Pillow does
    not write."""
    kind = PIL.Image.registered_extensions().get(Path(path).suffix.lower())
    if kind not in PIL.Image.SAVE:
        raise ValueError(f"path {str(path)!r} must end in .png, .jpg, .webp or another format to write")
    return kind


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_png` wrote. Raises FileNotFoundError; ValueError when the file carries none."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # no pixels are read
            with PIL.Image.open(file) as opened:
                text = opened.info.get("joyedit")
    except Exception as error:  # of the decoder, which may raise anything
        raise ValueError(f"{path} is not a readable image: {reason(error)}") from None
    if text is None:
        raise ValueError(f"{path} carries no joyedit metadata")
    try:
        metadata = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its joyedit metadata is damaged: {visible(error)}") from None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: its joyedit metadata is a {type(metadata).__name__}, not a JSON object")
    return metadata


def parameters_text(metadata: Mapping[str, Any]) -> str:
    """The text that image browsers and other programs read: prompt, negative prompt, a line of settings."""
    labels = {
        "num_inference_steps": "Steps",
        "scheduler": "Sampler",
        "guidance_scale": "CFG scale",
        "seed": "Seed",
        "size": "Size",
        "model": "Model",
        "version": "Version",
    }
    shown = dict(metadata)
    if "size" not in shown and {"width", "height"} <= shown.keys():
        shown["size"] = f"{shown['width']}x{shown['height']}"
    negative = shown.get("negative_prompt")
    settings = ", ".join(
        f"{label}: {shown[key]}" for key, label in labels.items() if shown.get(key) is not None
    )
    prompt = str(shown.get("prompt") or shown.get("target_prompt") or "")
    lines = [prompt, f"Negative prompt: {negative}" if negative else "", settings]
    return "\n".join(line for line in lines if line)


def _to_json(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(metadata, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata cannot be written as JSON: {error}") from None


def _bare(image: Image) -> Image:
    """A copy that carries nothing but pixels: writers take EXIF and transparency out of `info`."""
    bare = image.copy()
    bare.info = {}
    return bare


def _storable(text: str) -> str:
    """PNG texts are UTF-8 without NUL; a file name that is not UTF-8 becomes an escape that JSON reads."""
    return text.replace("\0", " ").encode("utf-8", "backslashreplace").decode()


def _rgb_profile(profile: bytes | None) -> bytes | None:
    """The colour profile when it describes RGB data (ICC.1, header bytes 16 to 19): that of a grey or CMYK
    photograph does not fit the result."""
    return profile if profile and profile[16:20] == b"RGB " else None
