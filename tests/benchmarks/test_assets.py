"""The small checkpoints in the package: their sizes and cards, and that they are ordinary ones."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.shapes import scenes, sd_vae
from benchmarks.shapes.made_for import MADE_FOR
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.command import info
from joyedit.command.captions import trained_side
from joyedit.loading import layouts
from joyedit.media.images import resize_center_crop
from joyedit.pipelines.made_for import round_trip

ROOT = Path(__file__).resolve().parents[2]
CLASSES = {
    "tiny-joyimage": "JoyImageEditPipeline",
    "tiny-diffedit": "StableDiffusionDiffEditPipeline",
    "tiny-chronoedit": "ChronoEditPipeline",
}
every_one = pytest.mark.parametrize("name", CLASSES)


def folder(name):
    return layouts.ASSETS / name


def size(path):
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_built_in_names():
    assert set(layouts.BUILT_IN) == set(CLASSES)
    found = {path.name for path in layouts.ASSETS.iterdir()}
    assert found == {*CLASSES, "demo", "previews.json"}
    assert size(layouts.ASSETS) <= 30e6


@every_one
def test_a_folder_as_published(name):
    """Diffusers' layout, in safetensors, bf16 but for what is kept in fp32 everywhere."""
    assert size(folder(name)) <= 12.5e6
    index = read_json(folder(name) / "model_index.json")
    assert index["_class_name"] == CLASSES[name] == layouts.pipeline_name(name)
    assert layouts.layout_of(name, [path.name for path in folder(name).iterdir()]) == "diffusers"
    kinds = {file.suffix for file in folder(name).rglob("*") if file.is_file()}
    assert kinds <= {".json", ".txt", ".md", ".safetensors"}
    shown = info.describe(name)
    for part in shown.parts.values():
        stored = dict(part.dtypes or {})
        assert stored.get("bfloat16", 0) >= 0.95 * sum(stored.values()), stored


@every_one
def test_it_loads(name, tmp_path):
    pipe = joyedit.load(name, device="cpu")
    assert type(pipe).__name__ == CLASSES[name] and pipe.dtype is torch.bfloat16
    for network in pipe.networks.values():
        assert all(value.isfinite().all() for value in network.state_dict().values())
    shutil.copytree(folder(name), tmp_path / "elsewhere")
    other = joyedit.load(tmp_path / "elsewhere", device="cpu")
    for part, network in pipe.networks.items():
        state = other.components[part].state_dict()
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@every_one
def test_the_files_hold_what_the_networks_have_and_no_more(name):
    pipe = joyedit.load(name, device="cpu")
    for part, network in pipe.networks.items():
        stored = TensorFiles(sorted((folder(name) / part).glob("*.safetensors")))
        assert sum(torch.Size(shape).numel() for shape in stored.shapes.values()) == sum(
            value.numel() for value in network.state_dict().values()
        )


@every_one
def test_the_model_card(name):
    text = (folder(name) / "README.md").read_text(encoding="utf-8")
    assert layouts.licence_of(layouts.Origin(str(folder(name))), ["README.md"]) == "apache-2.0"
    assert info.describe(name).licence == "apache-2.0"
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings == ["Data", "Training", "Scores"]
    parts = dict(zip(headings, re.split(r"^## .+$", text, flags=re.MULTILINE)[1:], strict=True))
    assert "licence" in parts["Data"]
    model = name.removeprefix("tiny-")
    assert re.search(rf"^python -m benchmarks\.shapes\.train {model} ", parts["Training"], re.MULTILINE)
    assert "--seed" in parts["Training"] and "minutes" in parts["Training"]
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", parts["Training"])
    assert parts["Scores"].count("|") > 20


@every_one
def test_its_own_size_steps_and_world(name):
    pipe, made_for = joyedit.load(name, device="cpu"), layouts.read_made_for(name)
    assert made_for.world is not None
    assert made_for.call["num_inference_steps"] <= 20
    if name == "tiny-joyimage":
        assert pipe.buckets == [(scenes.SIZE, scenes.SIZE)]
    elif name == "tiny-chronoedit":
        assert made_for.basesize == scenes.SIZE
    else:
        assert trained_side(pipe) == sd_vae.SIZE


def held_out(name, count):
    """Pictures in the size of the model, and what is said of them."""
    for i in range(count):
        if name == "tiny-diffedit":
            pair = scenes.make_caption_pair(i, "held-out", size=sd_vae.SIZE)
            scene, texts, side = pair.source, (pair.source_caption, pair.target_caption), sd_vae.SIZE
        else:
            kinds = MADE_FOR[name.removeprefix("tiny-")]["kinds"]
            edit = scenes.make_edit(i, "held-out", kinds)
            scene, texts, side = edit.source, (edit.instruction,), scenes.SIZE
        yield Image.fromarray(scenes.to_levels(scenes.draw(scene, side))), texts


@pytest.mark.slow
@every_one
def test_its_world_holds_scenes_and_no_photograph(name):
    pipe, world = joyedit.load(name, device="cpu"), layouts.read_made_for(name).world
    side = sd_vae.SIZE if name == "tiny-diffedit" else scenes.SIZE
    photo = resize_center_crop(joyedit.load_image(ROOT / "examples" / "coffee.jpg"), side, side)
    assert round_trip(pipe, photo) < world.psnr - 3
    assert world.unknown(["Make the coffee red."])
    for picture, texts in held_out(name, 40):
        assert round_trip(pipe, picture) > world.psnr
        assert world.unknown(texts) == []
