"""How much memory `joyedit convert` takes, on files many times larger: the peak of a process's resident
memory, anonymous and mapped together, above what it holds after its imports.

Tensors that are only renamed and cast pass in pieces. Where several of ours are one in a file, or the other
way round, these sources and results are in memory.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.random_checkpoint import (
    write_random_checkpoint,
    write_random_chronoedit_checkpoint,
    write_random_diffedit_checkpoint,
)
from joyedit.checkpoints.network import build_on_meta
from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.checkpoints.writing import write_pickle
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.clip import CLIPTextConfig, CLIPTextModel
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel
from joyedit.models.sd_vae import AutoencoderKL, AutoencoderKLConfig

ROOT = Path(__file__).resolve().parents[2]
SLACK = 48 << 20  # names, headers, the small parts
MB = 1 << 20

pytestmark = pytest.mark.slow


class Repeated(TensorFiles):
    """Random tensors of a network, made when they are asked for."""

    def __init__(self, network, dtype=torch.float32):
        super().__init__([])
        noise = torch.randn(MB, generator=torch.Generator().manual_seed(0)).to(dtype)

        def made(shape, once=True):
            count = torch.Size(shape).numel()
            return noise.repeat(count // MB + 1)[:count].view(shape)

        for name, tensor in network.state_dict().items():
            self._shapes[name], self._dtypes[name] = tuple(tensor.shape), dtype
            self._where[name] = functools.partial(made, self._shapes[name])


CODE = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import joyedit.command.info, joyedit.loading.layouts
from joyedit.command import cli
from joyedit import *  # the classes of all systems

def memory(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.ones(1000, 1000).bfloat16()  # what the first computation takes
before = memory("VmRSS")
status = cli.main(sys.argv[1:])
print(json.dumps({"status": status, "used": memory("VmHWM") - before, "before": before}), file=sys.stderr)
"""


def converted(*words):
    return used("convert", *words)


def used(*words):
    """Bytes that a command takes above what the process holds after its imports."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *map(str, words), "-q"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stderr.splitlines()[-1])
    assert found["status"] == 0, done.stderr
    print(words, {key: f"{value / MB:.0f} MB" for key, value in found.items()})
    return found["used"]


def network_folder(folder, network, dtype=torch.float32, limit="300MB"):
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    save_tensors(folder, network.weights_stem, Repeated(network, dtype), limit)
    (folder / "config.json").write_text(json.dumps(network.config_to_save()))


JOYIMAGE = JoyImageEditConfig(
    hidden_size=1024, num_attention_heads=8, num_layers=5, text_dim=32, rope_dim_list=(16, 56, 56)
)


@pytest.fixture(scope="module")
def joyimage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joyimage") / "checkpoint"
    write_random_checkpoint(folder)
    network_folder(folder / "transformer", build_on_meta(JoyImageEditTransformer3DModel, JOYIMAGE))
    yield folder
    shutil.rmtree(folder.parent)


def stored(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_joyimage_to_all_layouts(joyimage, tmp_path):
    assert stored(joyimage) > 450 * MB
    assert used("verify", joyimage, "--full") < SLACK  # several files at a time
    for source, to in ((joyimage, "diffusers"), (joyimage, "original"), (tmp_path / "original", "comfyui")):
        assert converted(source, tmp_path / to, "--to", to, "--dtype", "bf16") < SLACK
        assert stored(tmp_path / to) > 225 * MB


def test_joyimage_to_eight_bits_and_back(joyimage, tmp_path):
    """A weight is in memory whole, in the dtype that it is written in or quantised from, or in int8."""
    network = build_on_meta(JoyImageEditTransformer3DModel, JOYIMAGE)
    largest = max(tensor.numel() for tensor in network.parameters())
    words = ["--to", "comfyui", "--quantize", "int8_convrot", "--dtype", "bf16"]
    assert converted(joyimage, tmp_path / "int8", *words) < SLACK + 6 * largest
    assert 100 * MB < stored(tmp_path / "int8") < 160 * MB
    words = ["--part", f"processor={joyimage}"]
    assert converted(tmp_path / "int8", tmp_path / "plain", *words) < SLACK + largest
    assert stored(tmp_path / "plain") > 225 * MB


@pytest.mark.parametrize("mapped", [True, False], ids=["zip", "old form"])
def test_chronoedit_of_a_pickle_in_wans_names(tmp_path, mapped):
    """Pickles of the old form cannot be mapped, and are read tensor by tensor all the same."""
    config = ChronoEditConfig(
        num_attention_heads=8, ffn_dim=6144, num_layers=5, added_kv_proj_dim=1024, text_dim=32, image_dim=32
    )
    network = build_on_meta(ChronoEditTransformer3DModel, config)
    write_random_chronoedit_checkpoint(tmp_path / "source")
    network_folder(tmp_path / "source" / "transformer", network)
    assert stored(tmp_path / "source") > 450 * MB
    words = [tmp_path / "source", tmp_path / "out", "--dtype", "fp16"]
    if mapped:
        assert converted(*words) < SLACK
        shutil.rmtree(tmp_path / "out")
    (tmp_path / "wan").mkdir()
    shutil.copy(tmp_path / "source" / "transformer" / "config.json", tmp_path / "wan")
    original = Repeated(network).spelled(network.layouts()[1])
    if mapped:
        write_pickle(tmp_path / "wan" / "wan.pth", original)
    else:
        torch.save(dict(original), tmp_path / "wan" / "wan.pth", _use_new_zipfile_serialization=False)
    part = f"transformer={tmp_path / 'wan' / 'wan.pth'}"
    assert converted(*words, "--part", part) < SLACK
    shutil.rmtree(tmp_path)


def test_a_single_file_whose_layers_hold_three_tensors_in_one(tmp_path):
    """Stable Diffusion 2.x: queries, keys and values of its text encoder are one tensor."""
    width = 2048
    text = CLIPTextConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=width // 64,
        hidden_act="gelu",
    )
    unet = UNet2DConditionConfig(
        block_out_channels=(64,) * 4,
        layers_per_block=1,
        attention_head_dim=(1,) * 4,
        cross_attention_dim=width,
        use_linear_projection=True,
    )
    vae = AutoencoderKLConfig(block_out_channels=(32,) * 4, layers_per_block=1)
    layouts = {
        CLIPTextModel: (text, "openclip-ldm"),
        UNet2DConditionModel: (unet, "ldm-single-file"),
        AutoencoderKL: (vae, "ldm-first-stage"),
    }
    state = {}
    for cls, (config, name) in layouts.items():
        network = build_on_meta(cls, config)
        state |= Repeated(network).spelled(next(one for one in network.layouts() if one.name == name))
    write_random_diffedit_checkpoint(tmp_path / "tiny")
    save_tensors(tmp_path, "sd", state)
    assert (tmp_path / "sd.safetensors").stat().st_size > 600 * MB
    group = 3 * width * width * (4 + 2)
    words = [tmp_path / "sd.safetensors", tmp_path / "out", "--dtype", "fp16"]
    parts = ["--part", f"tokenizer={tmp_path / 'tiny'}", "--prediction-type", "epsilon"]
    assert group + SLACK < 200 * MB
    assert converted(*words, *parts) < group + SLACK
    shutil.rmtree(tmp_path)
