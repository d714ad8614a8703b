"""What programs import from joyedit: every name stays, wherever its module moves.

The lists are written out, so that a name that is taken away fails here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import joyedit

ROOT = Path(__file__).resolve().parents[1]

NAMES = """
    __version__ load
    JoyImageEditPipeline JoyImageEditPipelineOutput JoyImageEditPlusPipeline JoyImageEditPlusPipelineOutput
    ChronoEditPipeline ChronoEditPipelineOutput
    StableDiffusionDiffEditPipeline StableDiffusionPipelineOutput DiffEditInversionPipelineOutput
    Qwen3VLPipeline PipelineCallback MultiPipelineCallbacks
    JoyImageEditTransformer3DModel JoyImageEditPlusTransformer3DModel ChronoEditTransformer3DModel
    AutoencoderKLWan AutoencoderKL UNet2DConditionModel Qwen3VLForConditionalGeneration CLIPTextModel
    CLIPVisionModel CLIPVisionModelWithProjection StableDiffusionSafetyChecker UMT5EncoderModel
    Qwen2Tokenizer Qwen3VLProcessor CLIPTokenizer T5TokenizerFast CLIPImageProcessor
    FlowMatchEulerDiscreteScheduler DDIMScheduler DDIMInverseScheduler UniPCMultistepScheduler
    load_image make_image_grid export_to_video hf_hub_download
""".split()

# Modules that the documents and docstrings name, the module that each is, and what they name of it.
MODULES = {
    "joyedit.images": (
        "joyedit.media.images",
        "buckets load_image make_image_grid read_metadata resize_center_crop save_png size_of_area",
    ),
    "joyedit.video": ("joyedit.media.video", "export_to_png export_to_video export_to_webp save_video"),
    "joyedit.masks": ("joyedit.media.masks", "mask_overlay to_latent_mask to_mask_images"),
    "joyedit.previews": ("joyedit.pipelines.previews", "Preview PreviewMap fit_map map_of"),
    "joyedit.rewriting": ("joyedit.pipelines.rewriting", "FORMS Rewriting Server rewrite"),
    "joyedit.spatial": ("joyedit.media.spatial", "VIEWS ZOOMS Move camera move rotate"),
    "joyedit.clip_images": ("joyedit.media.clip_images", "CLIPImageConfig CLIPImageProcessor"),
    "joyedit.loading": ("joyedit.loading", "load read_made_for pipeline_name save_checkpoint"),
    "joyedit.lora": ("joyedit.lora", "AdapterState Adapters LoraReport"),
    "joyedit.step_cache": ("joyedit.step_cache", "BranchCache StepCache"),
    "joyedit.ops": ("joyedit.ops", "attention backend rms_norm"),
}

# Imports in processes that know nothing of ours yet; torch, which takes a second, is loaded before they part.
IMPORTS = """
import importlib, json, os, sys
import torch
for module, (home, names) in json.loads(sys.argv[1]).items():
    short = module.removeprefix("joyedit.")
    statements = [f"import {module}; found = {module}", f"from joyedit import {short} as found"]
    if module != home:
        statements.append(f"import joyedit; found = joyedit.{short}")
        statements.append(f"import {home} as first; import {module} as found")
    for statement in statements:
        assert not any(name.partition(".")[0] == "joyedit" for name in sys.modules)
        child = os.fork()
        if child == 0:
            try:
                exec(statement)
                assert found is importlib.import_module(home) is sys.modules[module], statement
                assert found.__name__ == found.__spec__.name == home, found.__spec__
                missing = [name for name in names.split() if not hasattr(found, name)]
                assert not missing, f"{module} lost {missing}"
            except BaseException as error:
                print(f"{statement}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, statement
"""

# Everything that may be done with a name before it is used.
UNUSED = """
import importlib.util, sys
import joyedit
assert set(joyedit.__all__) <= set(dir(joyedit))
for name in sys.argv[1:]:
    assert importlib.util.find_spec(name) is not None, name
print(sorted({"torch", "triton", "numpy", "PIL"} & set(sys.modules)))
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_names_are_there():
    assert set(NAMES) <= set(joyedit.__all__), "taken away"
    assert all(getattr(joyedit, name) is not None for name in NAMES)


def test_names_import_by_statement():
    for name in NAMES:
        found: dict = {}
        exec(f"from joyedit import {name}", found)
        assert found[name] is getattr(joyedit, name)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork")
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["joyedit.images", "joyedit.lora"], id="two"),
        pytest.param([*MODULES], id="all", marks=pytest.mark.slow),
    ],
)
def test_modules_import_by_their_short_names(names):
    python(IMPORTS, json.dumps({name: MODULES[name] for name in names}))


def test_nothing_is_loaded_before_it_is_used():
    assert python(UNUSED, *MODULES) == "[]"
