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
    "PipelineCallback": "joyedit.pipelines.pipeline",
    "MultiPipelineCallbacks": "joyedit.pipelines.pipeline",
    "JoyImageEditTransformer3DModel": "joyedit.models.joyimage_mmdit",
    "AutoencoderKLWan": "joyedit.models.wan_vae",
    "UNet2DConditionModel": "joyedit.models.sd_unet",
    "Qwen3VLForConditionalGeneration": "joyedit.models.qwen3_vl",
    "Qwen2Tokenizer": "joyedit.tokenizers",
    "Qwen3VLProcessor": "joyedit.tokenizers",
    "CLIPTokenizer": "joyedit.tokenizers",
    "CLIPImageProcessor": "joyedit.clip_images",
    "FlowMatchEulerDiscreteScheduler": "joyedit.schedulers.flow_match",
    "DDIMScheduler": "joyedit.schedulers.ddim",
    "DDIMInverseScheduler": "joyedit.schedulers.ddim",
    "load_image": "joyedit.images",
    "make_image_grid": "joyedit.images",
    "hf_hub_download": "huggingface_hub",
}

if TYPE_CHECKING:
    from huggingface_hub import hf_hub_download as hf_hub_download

    from joyedit.clip_images import CLIPImageProcessor as CLIPImageProcessor
    from joyedit.images import load_image as load_image
    from joyedit.images import make_image_grid as make_image_grid
    from joyedit.loading import load as load
    from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel as JoyImageEditTransformer3DModel
    from joyedit.models.qwen3_vl import Qwen3VLForConditionalGeneration as Qwen3VLForConditionalGeneration
    from joyedit.models.sd_unet import UNet2DConditionModel as UNet2DConditionModel
    from joyedit.models.wan_vae import AutoencoderKLWan as AutoencoderKLWan
    from joyedit.pipelines.joyimage import JoyImageEditPipeline as JoyImageEditPipeline
    from joyedit.pipelines.joyimage import JoyImageEditPipelineOutput as JoyImageEditPipelineOutput
    from joyedit.pipelines.pipeline import MultiPipelineCallbacks as MultiPipelineCallbacks
    from joyedit.pipelines.pipeline import PipelineCallback as PipelineCallback
    from joyedit.schedulers.ddim import DDIMInverseScheduler as DDIMInverseScheduler
    from joyedit.schedulers.ddim import DDIMScheduler as DDIMScheduler
    from joyedit.schedulers.flow_match import (
        FlowMatchEulerDiscreteScheduler as FlowMatchEulerDiscreteScheduler,
    )
    from joyedit.tokenizers import CLIPTokenizer as CLIPTokenizer
    from joyedit.tokenizers import Qwen2Tokenizer as Qwen2Tokenizer
    from joyedit.tokenizers import Qwen3VLProcessor as Qwen3VLProcessor

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
