"""Image editing with JoyAI-Image-Edit in plain PyTorch.

`joyedit.load(name_or_path)` returns a pipeline; `help(joyedit.load)` tells what it takes. The names below are
read from their modules when first used: `import joyedit` loads neither torch nor triton.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# A public name takes two lines: here, and below for type checkers and editors.
_MODULE_OF = {
    "load": "joyedit.loading",
    "JoyImageEditPipeline": "joyedit.pipelines.joyimage",
    "JoyImageEditPipelineOutput": "joyedit.pipelines.joyimage",
    "ChronoEditPipeline": "joyedit.pipelines.chronoedit",
    "ChronoEditPipelineOutput": "joyedit.pipelines.chronoedit",
    "StableDiffusionDiffEditPipeline": "joyedit.pipelines.diffedit",
    "StableDiffusionPipelineOutput": "joyedit.pipelines.diffedit",
    "DiffEditInversionPipelineOutput": "joyedit.pipelines.diffedit",
    "PipelineCallback": "joyedit.pipelines.pipeline",
    "MultiPipelineCallbacks": "joyedit.pipelines.pipeline",
    "JoyImageEditTransformer3DModel": "joyedit.models.joyimage_mmdit",
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
    "Qwen2Tokenizer": "joyedit.tokenizers",
    "Qwen3VLProcessor": "joyedit.tokenizers",
    "CLIPTokenizer": "joyedit.tokenizers",
    "T5TokenizerFast": "joyedit.tokenizers",
    "CLIPImageProcessor": "joyedit.clip_images",
    "FlowMatchEulerDiscreteScheduler": "joyedit.schedulers.flow_match",
    "DDIMScheduler": "joyedit.schedulers.ddim",
    "DDIMInverseScheduler": "joyedit.schedulers.ddim",
    "UniPCMultistepScheduler": "joyedit.schedulers.unipc",
    "load_image": "joyedit.images",
    "make_image_grid": "joyedit.images",
    "export_to_video": "joyedit.video",
    "hf_hub_download": "huggingface_hub",
}

if TYPE_CHECKING:
    from huggingface_hub import hf_hub_download as hf_hub_download

    from joyedit.clip_images import CLIPImageProcessor as CLIPImageProcessor
    from joyedit.images import load_image as load_image
    from joyedit.images import make_image_grid as make_image_grid
    from joyedit.loading import load as load
    from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel as ChronoEditTransformer3DModel
    from joyedit.models.clip import CLIPTextModel as CLIPTextModel
    from joyedit.models.clip import CLIPVisionModel as CLIPVisionModel
    from joyedit.models.clip import CLIPVisionModelWithProjection as CLIPVisionModelWithProjection
    from joyedit.models.clip import StableDiffusionSafetyChecker as StableDiffusionSafetyChecker
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
    from joyedit.pipelines.pipeline import MultiPipelineCallbacks as MultiPipelineCallbacks
    from joyedit.pipelines.pipeline import PipelineCallback as PipelineCallback
    from joyedit.schedulers.ddim import DDIMInverseScheduler as DDIMInverseScheduler
    from joyedit.schedulers.ddim import DDIMScheduler as DDIMScheduler
    from joyedit.schedulers.flow_match import (
        FlowMatchEulerDiscreteScheduler as FlowMatchEulerDiscreteScheduler,
    )
    from joyedit.schedulers.unipc import UniPCMultistepScheduler as UniPCMultistepScheduler
    from joyedit.tokenizers import CLIPTokenizer as CLIPTokenizer
    from joyedit.tokenizers import Qwen2Tokenizer as Qwen2Tokenizer
    from joyedit.tokenizers import Qwen3VLProcessor as Qwen3VLProcessor
    from joyedit.tokenizers import T5TokenizerFast as T5TokenizerFast
    from joyedit.video import export_to_video as export_to_video

__all__ = ["__version__", *_MODULE_OF]  # pyright: ignore[reportUnsupportedDunderAll]

logging.getLogger("joyedit").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'joyedit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
