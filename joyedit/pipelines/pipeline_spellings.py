"""What pipelines have because users of diffusers type it: the methods of adapters, switches without effect,
the file of settings, an image processor. Nothing in joyedit calls these.

Source: diffusers `pipelines/pipeline_utils.py`, `loaders/lora_base.py`, `loaders/lora_pipeline.py`.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor, from_numpy

from joyedit.checkpoints.config_spellings import ConfigSpellings
from joyedit.checkpoints.lora_files import WEIGHT_NAME, open_lora
from joyedit.checkpoints.lora_spellings import packed_layers, packed_metadata
from joyedit.checkpoints.lora_writing import write_lora
from joyedit.checkpoints.missing import PIPELINES, Missing, lacking
from joyedit.checkpoints.option_spellings import check_saving
from joyedit.lora import Adapters, LoraReport, divided
from joyedit.media import images as im

log = logging.getLogger("joyedit")

ADAPTED = ("transformer", "unet", "text_encoder")  # the prefixes of adapter files


class PipelineConfig(dict[str, Any]):
    """What a pipeline was made of, with its entries as attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:
            raise AttributeError(f"the pipeline's config has no {name!r}; it has {sorted(self)}")
        return self[name]


class SavesLora:
    """`save_lora_weights`, of an object: one of its adapters, or layers; of a class: layers alone."""

    def __get__(self, pipe: Any, owner: Any) -> Any:
        def save_lora_weights(
            save_directory: str | Path,
            adapter_name: str | None = None,
            *,
            weight_name: str | None = None,
            **options: Any,
        ) -> Path:
            """As `Adapters.save_lora_weights`; also safe_serialization=True and its like. Of a class, with
            `..._lora_layers` alone. Returns the file."""
            layers = {name: options[name] for name in options if "_lora_" in name}
            check_saving(
                {k: v for k, v in options.items() if k not in layers}, ("adapter_name", "weight_name")
            )
            if pipe is not None:
                return pipe.adapters.save_lora_weights(
                    save_directory, adapter_name, weight_name=weight_name, **layers
                )
            if adapter_name is not None:
                raise ValueError(
                    f"adapter_name={adapter_name!r}: a class holds no adapters, give ..._lora_layers"
                )
            layers, metadata = divided(layers)
            state = packed_layers(layers, [name for name in owner.parts if name in ADAPTED])
            if not state:
                raise ValueError("save_lora_weights: there is nothing to save, give ..._lora_layers")
            return write_lora(
                Path(save_directory) / (weight_name or WEIGHT_NAME), state, packed_metadata(metadata)
            )

        return save_lora_weights


class PipelineSpellings(ConfigSpellings):
    """Methods of `Pipeline` that no algorithm calls."""

    config_name = "model_index.json"
    missing: ClassVar[Mapping[str, str]] = PIPELINES
    parts: ClassVar[Mapping[str, tuple[type, ...]]]

    download = Missing()
    from_config = Missing()

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property that failed: its own error
            return object.__getattribute__(self, name)
        raise lacking(type(self), name)

    @property
    def adapters(self) -> Adapters:
        """The LoRA adapters of the networks that files of them name."""
        networks: Mapping[str, Any] = self.networks  # type: ignore[attr-defined]
        return Adapters({name: network for name, network in networks.items() if name in ADAPTED})

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **options: Any) -> LoraReport:
        """Load an adapter; see `joyedit.lora.Adapters`, also for the methods below."""
        return self.adapters.load_lora_weights(source, adapter_name, **options)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        self.adapters.set_adapters(adapter_names, adapter_weights)

    def get_active_adapters(self) -> list[str]:
        return self.adapters.get_active_adapters()

    def get_list_adapters(self) -> dict[str, list[str]]:
        return self.adapters.get_list_adapters()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        self.adapters.delete_adapters(adapter_names)

    def enable_lora(self) -> None:
        self.adapters.enable_lora()

    def disable_lora(self) -> None:
        self.adapters.disable_lora()

    def fuse_lora(
        self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None, **options: Any
    ) -> None:
        self.adapters.fuse_lora(lora_scale, adapter_names, **options)

    def unfuse_lora(self, **options: Any) -> None:
        self.adapters.unfuse_lora(**options)

    def unload_lora_weights(self) -> None:
        self.adapters.unload_lora_weights()

    @property
    def fused_loras(self) -> set[str]:
        return self.adapters.fused_loras

    @property
    def num_fused_loras(self) -> int:
        return len(self.fused_loras)

    @classmethod
    def lora_state_dict(
        cls,
        source: str | Path | Mapping[str, Tensor],
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        return_lora_metadata: bool = False,
        **options: Any,
    ) -> Any:
        """The tensors of an adapter under the names of its file, as `load_lora_weights` takes them.

        Of a pipeline with a UNet (tensors, None), as the reference gives factors and alphas; alphas stay
        among the tensors here. return_lora_metadata: the settings in the file's header, or None, come last.
        Options and errors as of `Adapters.load_lora_weights`.
        """
        files, settings = (
            (source, {})
            if isinstance(source, Mapping)
            else open_lora(source, weight_name, subfolder or "", options)
        )
        tensors = {name: files[name] for name in files}
        last = (settings or None,) if return_lora_metadata else ()
        if "unet" in cls.parts:
            return tensors, None, *last
        return (tensors, *last) if last else tensors

    save_lora_weights = SavesLora()

    def enable_attention_slicing(self, slice_size: Any = "auto") -> None:
        log.info("attention is not sliced: joyedit.ops.attention does not hold the matrix of scores")

    def set_attention_slice(self, slice_size: Any = None) -> None:
        self.enable_attention_slicing(slice_size)

    def disable_attention_slicing(self) -> None:
        self.enable_attention_slicing()

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        log.info("xformers is not used: joyedit.ops.attention is memory efficient by itself")

    def disable_xformers_memory_efficient_attention(self) -> None:
        self.enable_xformers_memory_efficient_attention()

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


def move(pipe: Any, device: torch.device | None, offload: str) -> None:
    """Bring a loaded pipeline where `device_map` says; with an `offload`, that is where it computes."""
    if offload != "none":
        pipe.set_offload(offload, None if device is None or device.type == "cpu" else device)
    elif device is not None:
        pipe.to(device)
