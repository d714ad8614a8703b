"""What users of diffusers type that has another name here, or no use.

Nothing in joyedit calls these; what is behind each is one line away.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image
from torch import Tensor, from_numpy

from joyedit.media import images as im


class PipelineConfig(dict[str, Any]):
    """What a pipeline was made of, with its entries as attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:
            raise AttributeError(f"the pipeline's config has no {name!r}; it has {sorted(self)}")
        return self[name]


class DiffusersSpellings:
    """The methods of `Pipeline` that are only spellings."""

    @property
    def config(self) -> PipelineConfig:
        """Class, parts and settings, as `model_index.json` has them. A new one each time."""
        pipe: Any = self
        settings = {name: getattr(pipe, name) for name in pipe.settings()}
        return PipelineConfig(_class_name=type(self).__name__, **pipe.listed_parts(), **settings)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Pictures (B, H, W, C) or (H, W, C) in [0, 1], of three channels or one."""
        return ImageProcessor.numpy_to_pil(images)


class ImageProcessor:
    """The `image_processor` of a pipeline: pictures to the tensors of an autoencoder, and back."""

    def __init__(self, vae_scale_factor: int = 8):
        self.config: Mapping[str, Any] = PipelineConfig(vae_scale_factor=vae_scale_factor)

    def preprocess(self, image: Any, height: int | None = None, width: int | None = None) -> Tensor:
        """Images as in `to_pil_list`, resized to height x width (default: their own, rounded down to what the
        autoencoder takes) -> (B, 3, H, W) in [-1, 1]."""
        pictures = im.to_pil_list(image, "image")
        factor = self.config["vae_scale_factor"]
        size = (
            width or pictures[0].width // factor * factor,
            height or pictures[0].height // factor * factor,
        )
        resized = [picture.resize(size, Image.Resampling.LANCZOS) for picture in pictures]
        return im.to_latent_input(resized)[:, :, 0]

    def postprocess(self, image: Tensor, output_type: str = "pil") -> Any:
        """Pixels (B, 3, H, W), about [-1, 1], as "pil", "np" or "pt"; "latent" gives them back."""
        return image if output_type == "latent" else im.to_output(image, output_type)

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        pages = images[None] if images.ndim == 3 else images
        levels = (pages * 255).round().astype("uint8")
        return [Image.fromarray(page[..., 0] if page.shape[-1] == 1 else page) for page in levels]

    @staticmethod
    def numpy_to_pt(images: np.ndarray) -> Tensor:
        return rearrange(from_numpy(images), "... h w c -> ... c h w")

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray:
        return rearrange(images.cpu().float(), "... c h w -> ... h w c").numpy()
