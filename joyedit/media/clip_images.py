"""Pictures to what the CLIP vision towers read.

The central square, 224 pixels wide, of a picture whose shorter side was scaled to that by Pillow's bicubic
filter. Stable Diffusion calls this the feature extractor of its safety checker, ChronoEdit its image
processor.

B images
Source: transformers `image_processing_pil_clip.py`; `preprocessor_config.json` of both checkpoints.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from PIL.Image import Image

from joyedit.checkpoints.config import Config
from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.missing import PROCESSORS, lacking
from joyedit.checkpoints.option_spellings import check_saving
from joyedit.checkpoints.options import LoadOptions
from joyedit.media.batch import Batch
from joyedit.media.images import on_white, to_pil_list


@dataclasses.dataclass(frozen=True)
class CLIPImageConfig(Config):
    """What `preprocessor_config.json` says that changes the pixels; other keys are kept for saving."""

    image_processor_type: str = "CLIPImageProcessor"
    size: int = 224  # of the shorter side
    crop_size: tuple[int, int] = (224, 224)  # height, width
    resample: int = 3  # PIL's number for bicubic
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    do_convert_rgb: bool | None = True
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True

    keeps_unknown = True
    aliases = {"feature_extractor_type": "image_processor_type"}
    supported = {
        "image_processor_type": (
            *(f"CLIPImageProcessor{kind}" for kind in ("", "Fast", "Pil")),
            "CLIPFeatureExtractor",
        ),
        "resample": tuple(range(6)),
        **{f"do_{what}": (True,) for what in ("resize", "center_crop", "rescale", "normalize")},
    }

    def __post_init__(self):
        super().__post_init__()
        if min(*self.crop_size, self.size) < 1:
            raise ValueError(
                f"size={self.size}, crop_size={self.crop_size} (height, width): must be positive"
            )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """`size` and `crop_size` may be numbers, as in old files, or {"shortest_edge"} and {"height",
        "width"}. A null means the default."""
        values = {key: value for key, value in raw.items() if value is not None}
        size, crop = values.get("size", 224), values.get("crop_size", 224)
        if isinstance(size, Mapping):
            given = {key for key, value in size.items() if value is not None}
            if given != {"shortest_edge"}:
                raise ValueError(f"size={dict(size)!r} is not supported, only a shortest_edge")
            size = size["shortest_edge"]
        if isinstance(crop, Mapping):
            crop = crop["height"], crop["width"]
        elif isinstance(crop, int):
            crop = crop, crop
        return super().from_dict({**values, "size": size, "crop_size": crop})

    def to_dict(self) -> dict[str, Any]:
        height, width = self.crop_size
        return {
            **super().to_dict(),
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": self.size},
            "crop_size": {"height": height, "width": width},
        }


class CLIPImageProcessor:
    """Pictures to what the CLIP vision towers read: the central square of each, 224 pixels wide."""

    library = "transformers"  # under which model_index.json lists it
    # Its other names there; of a CLIPProcessor's files the tokenizer is not read.
    relatives = frozenset({"CLIPFeatureExtractor", "CLIPImageProcessorPil", "CLIPProcessor"})

    missing = PROCESSORS

    def __init__(self, config: CLIPImageConfig | None = None, **settings: Any):
        """settings: keys of preprocessor_config.json in any of its forms, `size=32`, to use instead."""
        config = config or CLIPImageConfig()
        self.config = CLIPImageConfig.from_dict({**config, **settings}) if settings else config

    def __getattr__(self, name: str) -> Any:
        raise lacking(type(self), name)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, subfolder: str | None = None, **options: Any
    ) -> Self:
        """Open a folder or Hub repository with preprocessor_config.json.

        Options: revision, token, cache_dir, local_files_only, force_download. Raises FileNotFoundError when
        there is no such file, ValueError for settings that are not supported.
        """
        origin = Origin(str(name_or_path), **LoadOptions.parse(options).origin)
        return cls.from_folder(origin.fetch_files(subfolder or "", ("preprocessor_config.json",)))

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        path = folder / "preprocessor_config.json"
        try:
            return cls(CLIPImageConfig.from_dict(read_json(path)))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def __call__(self, images: Any, return_tensors: str = "pt") -> Batch:
        """Images as in `to_pil_list`, transparent ones before white -> pixel_values (B, 3, 224, 224) float32,
        normalised."""
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: must be 'pt'")
        config = self.config
        pictures = [on_white(image) for image in to_pil_list(images, "images", alpha=True)]
        squares = np.stack([np.asarray(self.crop(picture)) for picture in pictures])
        pixels = rearrange(torch.from_numpy(squares), "b h w c -> b c h w").contiguous()
        pixels = (pixels.double() * config.rescale_factor).float()  # rounded once, as in the reference
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=pixels.device)
            for values in (config.image_mean, config.image_std)
        )
        return Batch(pixel_values=(pixels - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))

    def crop(self, image: Image) -> Image:
        """Scale the shorter side of an RGB image to `size` and crop the centre, with black around an image
        that is smaller."""
        config = self.config
        shorter = min(image.size)
        width, height = (int(config.size * side / shorter) for side in image.size)
        if width * height > (PIL.Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"an image of {image.width} x {image.height} pixels is too narrow")
        top, left = (height - config.crop_size[0]) // 2, (width - config.crop_size[1]) // 2
        resized = image.resize((width, height), PIL.Image.Resampling(config.resample))
        return resized.crop((left, top, left + config.crop_size[1], top + config.crop_size[0]))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write preprocessor_config.json, which opens equal here and in transformers. options:
        push_to_hub=False."""
        check_saving(options)
        write_json(Path(save_directory) / "preprocessor_config.json", self.config.to_dict())
