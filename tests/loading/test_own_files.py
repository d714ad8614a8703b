"""What may be replaced: a checkpoint as joyedit or diffusers writes it, and nothing with other things."""

from pathlib import Path

import pytest
import torch

import joyedit
from joyedit.loading import save_checkpoint
from joyedit.loading.own_files import refuse_strangers

LAYOUTS = [
    ("tiny-joyimage", "diffusers"),
    ("tiny-joyimage", "original"),
    ("tiny-joyimage", "comfyui"),
    ("tiny-diffedit", "diffusers"),
    ("tiny-chronoedit", "diffusers"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function: built-in name, layout -> the folder it was written to, one for all tests."""
    folders = {}

    def write(name, layout):
        if (name, layout) not in folders:
            folders[name, layout] = tmp_path_factory.mktemp(f"{name}-{layout}") / "checkpoint"
            save_checkpoint(joyedit.load(name), folders[name, layout], layout)
        return folders[name, layout]

    return write


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_what_we_write_may_be_replaced(written, name, layout):
    refuse_strangers(written(name, layout), layout)


def test_shards_and_variants_may_be_replaced(tmp_path):
    pipe = joyedit.load("tiny-joyimage", dtype=torch.float32)
    pipe.save_pretrained(tmp_path, max_shard_size="1MB", variant="fp16")
    assert len(list(tmp_path.glob("transformer/*.safetensors"))) > 1
    refuse_strangers(tmp_path, "diffusers")


def test_what_diffusers_writes_may_be_replaced(sd_reference, tmp_path):
    for part, network in sd_reference[1].items():
        network.save_pretrained(tmp_path / part)
    (tmp_path / "model_index.json").write_text("{}")
    refuse_strangers(tmp_path, "diffusers")


STRANGERS = [
    "README.md",
    ".git/HEAD",
    "vae/other.safetensors",
    "vae/deep/config.json",
    "loras/a.safetensors",
    "empty/",
]


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_named(written, name, layout, stranger):
    folder = written(name, layout)
    path = folder / stranger
    if stranger.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    try:
        with pytest.raises(FileExistsError, match=stranger.strip("/").replace(".", r"\.")):
            refuse_strangers(folder, layout)
    finally:
        path.rmdir() if path.is_dir() else path.unlink()
        if path.parent not in (folder, folder / "vae"):
            path.parent.rmdir()


def test_a_link_is_a_stranger(written, tmp_path):
    folder = written("tiny-diffedit", "diffusers")
    link = folder / "outputs"
    link.symlink_to(tmp_path, target_is_directory=True)
    try:
        with pytest.raises(FileExistsError, match="outputs"):
            refuse_strangers(folder, "diffusers")
    finally:
        Path(link).unlink()
