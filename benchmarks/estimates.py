"""Which machine the released models need, as `joyedit estimate` says it: `python -m benchmarks.estimates`.

From their settings alone, which are the defaults of our configs; nothing is downloaded. Writes
results/estimates/released.json, which the table of docs/which-machine.md is made from.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import joyedit

RESULTS = Path(__file__).resolve().parent / "results" / "estimates" / "released.json"

PARTS = {
    "JoyImageEditPipeline": {
        "transformer": "JoyImageEditTransformer3DModel",
        "text_encoder": "Qwen3VLForConditionalGeneration",
        "vae": "AutoencoderKLWan",
    },
    "ChronoEditPipeline": {
        "transformer": "ChronoEditTransformer3DModel",
        "text_encoder": "UMT5EncoderModel",
        "image_encoder": "CLIPVisionModelWithProjection",
        "vae": "AutoencoderKLWan",
    },
    "StableDiffusionDiffEditPipeline": {
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
        "vae": "AutoencoderKL",
    },
}
JOYAI, CHRONOEDIT, SD = PARTS
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "JoyAI-Image-Edit, 1024 x 1024": (JOYAI, {"height": 1024, "width": 1024}),
    "the same in int8": (JOYAI, {"height": 1024, "width": 1024, "quantize": "int8_convrot"}),
    "JoyAI-Image-Edit, 512 x 512": (JOYAI, {"height": 512, "width": 512}),
    "ChronoEdit, 1280 x 720": (CHRONOEDIT, {"height": 720, "width": 1280}),
    "ChronoEdit, 832 x 480": (CHRONOEDIT, {"height": 480, "width": 832}),
    "DiffEdit, Stable Diffusion 1.5, 512 x 512": (SD, {"height": 512, "width": 512}),
}


def write_configs(folder: Path, pipeline: str) -> None:
    """A Diffusers folder of a released model without its weights."""
    index: dict[str, Any] = {"_class_name": pipeline}
    for part, kind in PARTS[pipeline].items():
        (folder / part).mkdir(parents=True)
        settings = json.dumps(getattr(joyedit, kind).Config().to_dict())
        (folder / part / "config.json").write_text(settings, encoding="utf-8")
        index[part] = ["diffusers", kind]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


def row(name: str) -> dict[str, Any]:
    """What is estimated for a GPU, and the time on the machines that are known."""
    pipeline, options = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder), pipeline)
        found = joyedit.estimate(folder, device="cuda", tflops=165, bandwidth=1010, **options)
    return {**found.to_dict(), "smallest": found.smallest, "times": dict(found.times)}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    content = {name: row(name) for name in ROWS}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
