"""What every test shares: few threads, a fixed seed, and the place of the recorded data."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

GOLDENS = Path(__file__).resolve().parent / "goldens"

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of recorded runs and published configs beside the checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    return folder


@pytest.fixture(scope="session")
def goldens(tmp_path_factory) -> SimpleNamespace:
    """What `tests/goldens/record.py` recorded from the reference.

    checkpoint: the folder in the published layout. cases and runs: arguments and tensors of whole runs.
    described and encoders: the same of the processor and the prompt encoder. photos(case): the `image`
    argument.
    """
    checkpoint = tmp_path_factory.mktemp("goldens") / "tiny-joyimage-edit"
    shutil.copytree(GOLDENS / checkpoint.name, checkpoint)
    shutil.copytree(checkpoint / "tokenizer", checkpoint / "processor", dirs_exist_ok=True)
    recorded = json.loads((GOLDENS / "recorded.json").read_text(encoding="utf-8"))

    def photos(name):
        opened = [Image.open(GOLDENS / "photos" / photo) for photo in recorded["cases"][name]["image"] or ()]
        return opened[0] if len(opened) == 1 else opened or None

    return SimpleNamespace(
        checkpoint=checkpoint,
        cases=recorded["cases"],
        described=recorded["encoders"],
        photos=photos,
        runs=load_file(GOLDENS / "runs.safetensors"),
        encoders=load_file(GOLDENS / "encoders.safetensors"),
    )
