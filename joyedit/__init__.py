"""Image editing with JoyAI-Image-Edit in plain PyTorch.

`joyedit.load(name_or_path)` returns a pipeline; `help(joyedit.load)` tells what it takes. The names below are
read from their modules when first used: `import joyedit` loads neither torch nor triton.
"""

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A public name takes two lines: here, and below for type checkers and editors.
_MODULE_OF = {
    "load": "joyedit.loading.layouts",
    "estimate": "joyedit.estimates.estimating",
    "JoyImageEditPipeline": "joyedit.pipelines.joyimage",
    "JoyImageEditPipelineOutput": "joyedit.pipelines.joyimage",
    "JoyImageEditPlusPipeline": "joyedit.pipelines.joyimage_plus",
    "JoyImageEditPlusPipelineOutput": "joyedit.pipelines.joyimage_plus",
    "ChronoEditPipeline": "joyedit.pipelines.chronoedit",
    "ChronoEditPipelineOutput": "joyedit.pipelines.chronoedit",
    "StableDiffusionDiffEditPipeline": "joyedit.pipelines.diffedit",
    "StableDiffusionPipelineOutput": "joyedit.pipelines.diffedit",
    "DiffEditInversionPipelineOutput": "joyedit.pipelines.diffedit",
    "Qwen3VLPipeline": "joyedit.pipelines.qwen3_vl",
    "PipelineCallback": "joyedit.pipelines.pipeline",
    "MultiPipelineCallbacks": "joyedit.pipelines.pipeline",
    "JoyImageEditTransformer3DModel": "joyedit.models.joyimage_mmdit",
    "JoyImageEditPlusTransformer3DModel": "joyedit.models.joyimage_mmdit",
    "ChronoEditTransformer3DModel": "joyedit.models.chronoedit_dit",
    "AutoencoderKLWan": "joyedit.models.wan_vae",
    "AutoencoderKL": "joyedit.models.sd_vae",
    "UNet2DConditionModel": "joyedit.models.sd_unet",
    "Qwen3VLForConditionalGeneration": "joyedit.models.qwen3_vl",
    "CLIPTextModel": "joyedit.models.clip",
    "CLIPVisionModel": "joyedit.models.clip",
    "CLIPVisionModelWithProjection": "joyedit.models.clip",
    "StableDiffusionSafetyChecker": "joyedit.models.clip",
    "UMT5EncoderModel": "joyedit.models.umt5",
    "Qwen2Tokenizer": "joyedit.text.qwen2_tokenizer",
    "Qwen3VLProcessor": "joyedit.text.qwen3_vl_processor",
    "CLIPTokenizer": "joyedit.text.clip_tokenizer",
    "T5TokenizerFast": "joyedit.text.t5_tokenizer",
    "CLIPImageProcessor": "joyedit.media.clip_images",
    "FlowMatchEulerDiscreteScheduler": "joyedit.schedulers.flow_match",
    "DDIMScheduler": "joyedit.schedulers.ddim",
    "DDIMInverseScheduler": "joyedit.schedulers.ddim",
    "UniPCMultistepScheduler": "joyedit.schedulers.unipc",
    "load_image": "joyedit.media.images",
    "make_image_grid": "joyedit.media.images",
    "export_to_video": "joyedit.media.video",
    "hf_hub_download": "huggingface_hub",
}

# Modules that documents name without their room: `joyedit.images` is `joyedit.media.images`.
_ROOM_OF = {
    "joyedit.clip_images": "joyedit.media.clip_images",
    "joyedit.images": "joyedit.media.images",
    "joyedit.masks": "joyedit.media.masks",
    "joyedit.previews": "joyedit.pipelines.previews",
    "joyedit.rewriting": "joyedit.pipelines.rewriting",
    "joyedit.spatial": "joyedit.media.spatial",
    "joyedit.video": "joyedit.media.video",
}

if TYPE_CHECKING:
    from huggingface_hub import hf_hub_download as hf_hub_download

    from joyedit.estimates.estimating import estimate as estimate
    from joyedit.loading.layouts import load as load
    from joyedit.media.clip_images import CLIPImageProcessor as CLIPImageProcessor
    from joyedit.media.images import load_image as load_image
    from joyedit.media.images import make_image_grid as make_image_grid
    from joyedit.media.video import export_to_video as export_to_video
    from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel as ChronoEditTransformer3DModel
    from joyedit.models.clip import CLIPTextModel as CLIPTextModel
    from joyedit.models.clip import CLIPVisionModel as CLIPVisionModel
    from joyedit.models.clip import CLIPVisionModelWithProjection as CLIPVisionModelWithProjection
    from joyedit.models.clip import StableDiffusionSafetyChecker as StableDiffusionSafetyChecker
    from joyedit.models.joyimage_mmdit import (
        JoyImageEditPlusTransformer3DModel as JoyImageEditPlusTransformer3DModel,
    )
    from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel as JoyImageEditTransformer3DModel
    from joyedit.models.qwen3_vl import Qwen3VLForConditionalGeneration as Qwen3VLForConditionalGeneration
    from joyedit.models.sd_unet import UNet2DConditionModel as UNet2DConditionModel
    from joyedit.models.sd_vae import AutoencoderKL as AutoencoderKL
    from joyedit.models.umt5 import UMT5EncoderModel as UMT5EncoderModel
    from joyedit.models.wan_vae import AutoencoderKLWan as AutoencoderKLWan
    from joyedit.pipelines.chronoedit import ChronoEditPipeline as ChronoEditPipeline
    from joyedit.pipelines.chronoedit import ChronoEditPipelineOutput as ChronoEditPipelineOutput
    from joyedit.pipelines.diffedit import DiffEditInversionPipelineOutput as DiffEditInversionPipelineOutput
    from joyedit.pipelines.diffedit import StableDiffusionDiffEditPipeline as StableDiffusionDiffEditPipeline
    from joyedit.pipelines.diffedit import StableDiffusionPipelineOutput as StableDiffusionPipelineOutput
    from joyedit.pipelines.joyimage import JoyImageEditPipeline as JoyImageEditPipeline
    from joyedit.pipelines.joyimage import JoyImageEditPipelineOutput as JoyImageEditPipelineOutput
    from joyedit.pipelines.joyimage_plus import JoyImageEditPlusPipeline as JoyImageEditPlusPipeline
    from joyedit.pipelines.joyimage_plus import (
        JoyImageEditPlusPipelineOutput as JoyImageEditPlusPipelineOutput,
    )
    from joyedit.pipelines.pipeline import MultiPipelineCallbacks as MultiPipelineCallbacks
    from joyedit.pipelines.pipeline import PipelineCallback as PipelineCallback
    from joyedit.pipelines.qwen3_vl import Qwen3VLPipeline as Qwen3VLPipeline
    from joyedit.schedulers.ddim import DDIMInverseScheduler as DDIMInverseScheduler
    from joyedit.schedulers.ddim import DDIMScheduler as DDIMScheduler
    from joyedit.schedulers.flow_match import (
        FlowMatchEulerDiscreteScheduler as FlowMatchEulerDiscreteScheduler,
    )
    from joyedit.schedulers.unipc import UniPCMultistepScheduler as UniPCMultistepScheduler
    from joyedit.text.clip_tokenizer import CLIPTokenizer as CLIPTokenizer
    from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer as Qwen2Tokenizer
    from joyedit.text.qwen3_vl_processor import Qwen3VLProcessor as Qwen3VLProcessor
    from joyedit.text.t5_tokenizer import T5TokenizerFast as T5TokenizerFast

__all__ = ["__version__", *_MODULE_OF]  # pyright: ignore[reportUnsupportedDunderAll]

logging.getLogger("joyedit").addHandler(logging.NullHandler())


class _ShortNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module of `_ROOM_OF` under its short name: one module, two names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _ROOM_OF else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(_ROOM_OF[spec.name])
        spec.loader_state = module.__spec__  # the import puts its own in this place
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_ShortNames())


def __getattr__(name: str) -> Any:
    if f"joyedit.{name}" in _ROOM_OF:
        return importlib.import_module(f"joyedit.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'joyedit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
