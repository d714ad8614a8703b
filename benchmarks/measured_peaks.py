"""What `joyedit estimate` says against what edits take: `python -m benchmarks.measured_peaks`.

Of each system a checkpoint with random weights, of some hundred MB, is written, and an edit is made on a CPU
in a process of its own: with all weights where they are, and within budgets. The most of the resident set in
each stage, less what the interpreter had after a small edit, goes to results/estimates/measured.json beside
the estimate.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import joyedit
from benchmarks.random_checkpoint import (
    write_random_checkpoint,
    write_random_chronoedit_checkpoint,
    write_random_diffedit_checkpoint,
)
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.sizes import parse_size
from joyedit.estimates.estimating import STAGES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results" / "estimates" / "measured.json"

WRITERS = {
    "joyimage": write_random_checkpoint,
    "chronoedit": write_random_chronoedit_checkpoint,
    "diffedit": write_random_diffedit_checkpoint,
}
# What is larger than in the tiny checkpoints: the class of a part, and its settings.
GROWN: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "joyimage": {
        "transformer": (
            "JoyImageEditTransformer3DModel",
            {
                "hidden_size": 1024, "num_attention_heads": 8, "num_layers": 8, "mlp_width_ratio": 4.0,
                "text_dim": 1024, "rope_dim_list": (16, 56, 56),
            },
        ),
        "text_encoder": (
            "Qwen3VLForConditionalGeneration",
            {
                "text_config": {
                    "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8,
                    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 128,
                    "rope_scaling": {
                        "rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20],
                    },
                },
                "vision_config": {
                    "depth": 6, "hidden_size": 512, "intermediate_size": 2048, "num_heads": 8,
                    "out_hidden_size": 1024, "num_position_embeddings": 2304,
                },
            },
        ),
        "vae": ("AutoencoderKLWan", {"base_dim": 96, "num_res_blocks": 2}),
    },
    "chronoedit": {
        "transformer": (
            "ChronoEditTransformer3DModel",
            {
                "num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 8,
                "text_dim": 1024, "freq_dim": 256, "image_dim": 1024, "added_kv_proj_dim": 1024,
            },
        ),
        "text_encoder": (
            "UMT5EncoderModel",
            {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 6, "num_heads": 16},
        ),
        "image_encoder": (
            "CLIPVisionModelWithProjection",
            {
                "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
                "num_attention_heads": 16,
            },
        ),
        "vae": ("AutoencoderKLWan", {"base_dim": 96, "num_res_blocks": 2}),
    },
    "diffedit": {
        "unet": (
            "UNet2DConditionModel",
            {
                "block_out_channels": (160, 320, 640, 640), "layers_per_block": 2, "attention_head_dim": 8,
                "norm_num_groups": 32, "cross_attention_dim": 512,
            },
        ),
        "text_encoder": (
            "CLIPTextModel",
            {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
        ),
        "vae": (
            "AutoencoderKL",
            {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32},
        ),
    },
}  # fmt: skip
SIZES = {"joyimage": (512, 512), "chronoedit": (192, 320), "diffedit": (320, 256)}  # height, width
BUDGETS = {"joyimage": "900M", "chronoedit": "2.5G", "diffedit": "900M"}


def write_grown(folder: Path, system: str, parts: Any = None) -> None:
    """A checkpoint with random weights in bf16. parts: as an entry of GROWN."""
    WRITERS[system](folder)
    for part, (kind, changes) in (GROWN[system] if parts is None else parts).items():
        settings = read_json(folder / part / "config.json")
        for name, value in changes.items():
            settings[name] = {**settings[name], **value} if isinstance(value, dict) else value
        settings = {key: value for key, value in settings.items() if not key.startswith("_")}
        network = getattr(joyedit, kind).from_config(settings).to(torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        for tensor in network.parameters():
            if tensor.ndim > 1:
                nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5, generator=generator)
        for old in (folder / part).glob("*.safetensors*"):
            old.unlink()
        network.save_pretrained(folder / part)


MEASURE = """
import contextlib, gc, json, sys
from pathlib import Path
import numpy as np
from PIL import Image
import joyedit
from joyedit.memory.budget import resident_bytes

folder, system, height, width, budget = sys.argv[1:]
height, width = int(height), int(width)

def load(name, **options):
    pipe = joyedit.load(name, device="cpu", **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def edit(pipe, height, width):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    if system == "diffedit":
        words = "a red circle on a plain ground", "a blue circle on a plain ground"
        return pipe.edit(photo, *words, num_inference_steps=5)
    size = {"height": height, "width": width}
    if system == "joyimage":
        pipe.buckets, size = [(height, width)], {}
    words = "Make the red circle on the left of the picture blue, and leave all else as it is."
    return pipe(image=photo, prompt=words, num_inference_steps=2, guidance_scale=4.0, **size)

small = load(f"tiny-{system}")
edit(small, 64, 64)
del small
gc.collect()
base, peaks, steps = resident_bytes(), {"text": 0, "denoise": 0, "decode": 0}, set()
pipe = load(folder, **({"memory": budget} if budget != "0" else {}))
on_device = pipe.on_device

def stage_of(network):
    if network is pipe.denoiser:
        steps.add("denoise")
        return "denoise"
    return "decode" if steps and network is pipe.components["vae"] else "text"

@contextlib.contextmanager
def watched(self, network):
    with on_device(network):
        Path("/proc/self/clear_refs").write_text("5")
        yield network
        stage = stage_of(network)
        most = resident_bytes("VmHWM")
        if self._room is not None:  # which forgets what was most before, for each pass
            self._room.begin()
            most = max(most, self._room.peak)
        peaks[stage] = max(peaks[stage], most)

type(pipe).on_device = watched
edit(pipe, height, width)
print(json.dumps({"base": base, "peak": {stage: most - base for stage, most in peaks.items()}}))
"""


def measured(folder: Path, system: str, size: tuple[int, int], budget: str = "0") -> dict[str, Any]:
    """The interpreter's resident set, and of each stage the most above it."""
    words = [sys.executable, "-c", MEASURE, str(folder), system, *map(str, size), budget]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    return json.loads(done.stdout)


def estimated(folder: Path, size: tuple[int, int], budget: str = "0") -> dict[str, int]:
    memory = {} if budget == "0" else {"memory": parse_size(budget)}
    found = joyedit.estimate(folder, device="cpu", height=size[0], width=size[1], **memory)
    return {stage: found.peak[stage] for stage in STAGES}


def rows(system: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Budget, or "0" for none; the interpreter, the peaks as estimated and as measured, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), SIZES[system]
        write_grown(folder, system)
        for budget in ("0", BUDGETS[system]):
            said = estimated(folder, size, budget)
            real = measured(folder, system, size, budget)
            ratio = {stage: round(said[stage] / real["peak"][stage], 3) for stage in STAGES}
            row = {"size": size, "estimated": said, "measured": real["peak"], "ratio": ratio}
            yield budget, {**row, "interpreter": real["base"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("systems", nargs="*", help=", ".join(WRITERS))
    args = parser.parse_args()
    content = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    content["machine"] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in args.systems or WRITERS:
        content[name] = {}
        for budget, row in rows(name):
            content[name][budget] = row
            print(name, budget, row["ratio"], flush=True)
            RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
