"""How much memory `joyedit convert` takes, on files many times larger: in a process of its own, the peak of its
resident memory, anonymous and mapped together, above what it holds after its imports.

Allowed are the sources and the result of the largest group of tensors that one step converts, and SLACK.
"""

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
)
from joyedit.checkpoints.network import build_on_meta
from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel

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
            self._where[name] = lambda shape=tuple(tensor.shape), once=True: made(shape)


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
    """Bytes that a conversion takes above what the process holds after its imports."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, "convert", *map(str, words), "-q"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stderr.splitlines()[-1])
    assert found["status"] == 0, done.stderr
    print(words, {key: f"{value / MB:.0f} MB" for key, value in found.items()})
    return found["used"]


def on_meta(cls, config):
    return build_on_meta(cls, config)


def network_folder(folder, network, dtype=torch.float32, limit="300MB"):
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    save_tensors(folder, network.weights_stem, Repeated(network, dtype), limit)
    (folder / "config.json").write_text(json.dumps(network.config_to_save()))


JOY = JoyImageEditConfig(
    hidden_size=1024, num_attention_heads=8, num_layers=5, text_dim=32, rope_dim_list=(16, 56, 56)
)


@pytest.fixture(scope="module")
def joyimage(tmp_path_factory):
    folder = tmp_path_factory.mktemp("joyimage") / "checkpoint"
    write_random_checkpoint(folder)
    network_folder(folder / "transformer", on_meta(JoyImageEditTransformer3DModel, JOY))
    yield folder
    shutil.rmtree(folder.parent)


def stored(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_joyimage(joyimage, tmp_path):
    assert stored(joyimage) > 450 * MB
    largest = 4 * 4096 * 1024
    group = largest + largest // 2
    for to in ("diffusers", "original", "comfyui"):
        assert converted(joyimage, tmp_path / to, "--to", to, "--dtype", "bf16") < group + SLACK
    assert converted(tmp_path / "original", tmp_path / "back", "--dtype", "fp32") < group + SLACK
    shutil.rmtree(tmp_path / "back")
    assert converted(tmp_path / "original", tmp_path / "back") < group + SLACK
