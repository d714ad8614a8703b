"""Which checkpoints are JoyAI-Image-Edit-Plus's: it has the tensors of Edit, and other values in them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.loading import pipeline_name, save_checkpoint
from joyedit.loading.own_files import refuse_strangers

PLUS, EDIT = "JoyImageEditPlusPipeline", "JoyImageEditPipeline"
FILES = {  # published names: of Edit, of Plus
    "transformer": ("joyai_image_edit_bf16.safetensors", "joyai_image_edit_plus_bf16.safetensors"),
    "text_encoder": (
        "qwen3vl_8b_joyimage_edit_bf16.safetensors",
        "qwen3vl_8b_joyimage_edit_plus_bf16.safetensors",
    ),
    "vae": ("wan_2.1_vae.safetensors",) * 2,
}
FOLDERS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}


@pytest.fixture(scope="module")
def plus(tmp_path_factory):
    """As published: the settings of pictures in one file with those of videos."""
    folder = tmp_path_factory.mktemp("plus")
    write_random_checkpoint(folder, seed=2, plus=True)
    processor = folder / "processor"
    parts = {
        name: json.loads((processor / f"{file}preprocessor_config.json").read_text())
        for name, file in (("image_processor", ""), ("video_processor", "video_"))
    }
    for file in processor.glob("*preprocessor_config.json"):
        file.unlink()
    (processor / "processor_config.json").write_text(
        json.dumps({**parts, "processor_class": "Qwen3VLProcessor"})
    )
    return folder


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("edit")
    write_random_checkpoint(folder, seed=3)
    return folder


def add_comfyui_files(folder, source, which):
    """The files of a Diffusers folder under the published names of Edit (0) or Plus (1)."""
    for part, names in FILES.items():
        (folder / FOLDERS[part]).mkdir(exist_ok=True)
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        state = load_file(source / part / f"{stem}.safetensors")
        save_file(state, folder / FOLDERS[part] / names[which])
        shutil.copy(source / part / "config.json", folder / FOLDERS[part])


def assert_parts_of(pipe, source, parts=("transformer", "text_encoder")):
    for part in parts:
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        for name, tensor in load_file(source / part / f"{stem}.safetensors").items():
            assert torch.equal(getattr(pipe, part).state_dict()[name].to(tensor.dtype), tensor), name


def test_a_diffusers_folder(plus, edit):
    index = json.loads((plus / "model_index.json").read_text())
    assert index["_class_name"] == PLUS
    assert index["transformer"] == ["diffusers", "JoyImageEditPlusTransformer3DModel"]
    pipe = joyedit.load(plus, device="cpu")
    assert type(pipe) is joyedit.JoyImageEditPlusPipeline and pipeline_name(plus) == PLUS
    assert type(pipe.transformer) is joyedit.JoyImageEditTransformer3DModel
    assert joyedit.JoyImageEditPlusTransformer3DModel is joyedit.JoyImageEditTransformer3DModel
    assert pipe.processor.image_processor.config.max_pixels == 65536
    assert_parts_of(pipe, plus)
    assert len(pipe(prompt="a", height=32, width=32, num_inference_steps=1).images) == 1
    with pytest.raises(ValueError, match=f"holds a {PLUS}, not a {EDIT}"):
        joyedit.load(plus, device="cpu", pipeline=EDIT)
    with pytest.raises(ValueError, match=f"holds a {EDIT}, not a {PLUS}"):
        joyedit.load(edit, device="cpu", pipeline=PLUS)


def test_a_network_of_plus_by_itself(plus):
    network = joyedit.JoyImageEditTransformer3DModel.from_pretrained(plus, subfolder="transformer")
    assert network.config.hidden_size == 64


def test_a_comfyui_folder_goes_by_its_names(plus, tmp_path):
    add_comfyui_files(tmp_path, plus, 1)
    assert pipeline_name(tmp_path) == PLUS
    pipe = joyedit.load(tmp_path, device="cpu", processor=plus)
    assert type(pipe).__name__ == PLUS and pipe.scheduler.config.shift == 1.5
    assert_parts_of(pipe, plus, FILES)
    told = joyedit.load(tmp_path, device="cpu", processor=plus, pipeline=EDIT)
    assert type(told).__name__ == EDIT
    with pytest.raises(ValueError, match="is of a JoyImageEditPlusPipeline"):
        joyedit.load(tmp_path, device="cpu", processor=plus, pipeline="ChronoEditPipeline")


def test_files_of_both_side_by_side(plus, edit, tmp_path, caplog):
    for which, source in enumerate((edit, plus)):
        add_comfyui_files(tmp_path, source, which)
    assert_parts_of(joyedit.load(tmp_path, device="cpu", processor=plus), edit)
    assert_parts_of(joyedit.load(tmp_path, device="cpu", processor=plus, pipeline=PLUS), plus)
    assert "of their own" not in caplog.text
    (tmp_path / "text_encoders" / FILES["text_encoder"][1]).unlink()
    mixed = joyedit.load(tmp_path, device="cpu", processor=plus, pipeline=PLUS)
    assert_parts_of(mixed, plus, ["transformer"])
    assert_parts_of(mixed, edit, ["text_encoder"])
    assert "Edit and Edit-Plus have text encoders of their own, but" in caplog.text
    shutil.copy(tmp_path / "vae" / FILES["vae"][0], tmp_path / "vae" / "another.safetensors")
    with pytest.raises(FileNotFoundError, match="vae: wanted exactly one weight file"):
        joyedit.load(tmp_path, device="cpu", processor=plus)


@pytest.mark.parametrize(
    ("name", "pipeline", "wanted"),
    [
        ("JoyAI-Image-Edit-PLUS.safetensors", None, PLUS),
        ("joyai.safetensors", None, EDIT),
        ("joyai.safetensors", PLUS, PLUS),
    ],
)
def test_a_file_of_the_transformer(plus, tmp_path, name, pipeline, wanted):
    add_comfyui_files(tmp_path, plus, 1)
    file = (tmp_path / "diffusion_models" / FILES["transformer"][1]).rename(
        tmp_path / "diffusion_models" / name
    )
    parts = {part: plus for part in ("processor", "text_encoder", "vae")}
    pipe = joyedit.load(file, device="cpu", pipeline=pipeline, **parts)
    assert type(pipe).__name__ == wanted
    assert_parts_of(pipe, plus)


def test_saved_as_comfyui_files_it_stays_plus(plus, tmp_path):
    pipe = joyedit.load(plus, device="cpu")
    save_checkpoint(pipe, tmp_path / "comfyui", "comfyui")
    names = sorted(path.name for path in (tmp_path / "comfyui").rglob("*.safetensors"))
    assert names == [f"{part}_joyimage_plus.safetensors" for part in ("text_encoder", "transformer", "vae")]
    refuse_strangers(tmp_path / "comfyui", "comfyui")
    again = joyedit.load(tmp_path / "comfyui", device="cpu", processor=plus)
    assert type(again).__name__ == PLUS
    assert_parts_of(again, plus, FILES)
    with pytest.raises(ValueError, match="to='original': JoyAI-Image-Edit-Plus has no such layout"):
        save_checkpoint(pipe, tmp_path / "original", "original")
    assert not (tmp_path / "original").exists()


def test_parts_of_edit_are_saved_under_the_names_of_plus(edit, tmp_path):
    pipe = joyedit.JoyImageEditPlusPipeline(**joyedit.load(edit, device="cpu").components)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "transformer" / "config.json").read_text())["_class_name"] == (
        "JoyImageEditPlusTransformer3DModel"
    )
    assert type(joyedit.load(tmp_path, device="cpu")).__name__ == PLUS
