"""ComfyUI's files of JoyAI under the names of three generations, and what `convert --quantize` writes."""

import json
import re
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.command import cli
from joyedit.command.info import describe
from joyedit.eight_bits import largest_group, quantise
from joyedit.loading import save_checkpoint
from joyedit.loading.comfyui import comfyui_files
from joyedit.quantised import quantised_weights

STEMS = {"transformer": "diffusion_pytorch_model", "text_encoder": "model", "vae": "diffusion_pytorch_model"}
GENERATIONS = {
    "first": (
        "diffusion_models/joy_image_edit_bf16",
        "text_encoders/qwen3vl_joyimage_bf16",
        "vae/joy_image_edit_vae",
    ),
    "first, in one folder": ("joy_image_edit_bf16", "qwen3vl_joyimage_bf16", "joy_image_edit_vae"),
    "second": (
        "split_files/diffusion_models/joyai_image_edit_bf16",
        "split_files/text_encoders/qwen_3vl_8b_joyimage_bf16",
        "split_files/vae/wan_2.1_vae",
    ),
    "third": (
        "diffusion_models/joyai_image_edit_bf16",
        "text_encoders/qwen3vl_8b_joyimage_edit_bf16",
        "vae/wan_2.1_vae",
    ),
}
DiskUsage = namedtuple("DiskUsage", "total used free")
QUANTISED = (
    "diffusion_models/joyai_image_edit_int8_convrot.safetensors",
    "text_encoders/qwen3vl_8b_joyimage_edit_int8_convrot.safetensors",
    "vae/wan_2.1_vae.safetensors",
)


@pytest.fixture(scope="module")
def diffusers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    write_random_checkpoint(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def states(diffusers):
    return {part: load_file(diffusers / part / f"{stem}.safetensors") for part, stem in STEMS.items()}


@pytest.fixture(scope="module")
def quantised(diffusers):
    """Written by the command."""
    folder = diffusers.with_name("quantised")
    words = ["convert", str(diffusers), str(folder), "--to", "comfyui", "--quantize", "int8_convrot", "-q"]
    assert cli.main(words) == 0
    return folder


def place(folder, names, diffusers):
    for part, name in zip(STEMS, names, strict=True):
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(diffusers / part / f"{STEMS[part]}.safetensors", file)
        shutil.copy(diffusers / part / "config.json", file.parent)


def assert_same(pipe, states):
    for part, state in states.items():
        found = pipe.components[part].state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items()), part


@pytest.mark.parametrize("generation", [name for name in GENERATIONS if "folder" not in name])
def test_folders_of_every_generation_open(diffusers, states, tmp_path, generation):
    place(tmp_path, GENERATIONS[generation], diffusers)
    assert_same(joyedit.load(tmp_path, device="cpu", processor=diffusers), states)
    found = describe(str(tmp_path))
    assert found.layout == "comfyui"
    names = [f"{name}.safetensors" for name in GENERATIONS[generation]]
    assert [found.parts[part].files for part in STEMS] == [(name,) for name in names]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_parts_by_their_files_names(generation):
    names = [f"{name}.safetensors" for name in GENERATIONS[generation]]
    found = comfyui_files([*names, "README.md", "loras/joy_image_edit_style.safetensors"])
    assert found == {part: [name] for part, name in zip(STEMS, names, strict=True)}


def test_plus_and_quantised_files_are_known_by_their_names():
    for plus in ("", "_plus"):
        names = [f"joyai_image_edit{plus}_int8_convrot.safetensors", "wan_2.1_vae.safetensors"]
        names += [f"qwen3vl_8b_joyimage_edit{plus}_int8_convrot.safetensors"]
        assert set(comfyui_files(names)) == set(STEMS)
    assert comfyui_files(["model.safetensors", "config.json", "joy_image_edit_vae.safetensors"]) == {}


def test_the_command_writes_the_published_names(quantised, diffusers, states):
    files = sorted(str(path.relative_to(quantised).as_posix()) for path in quantised.rglob("*.safetensors"))
    assert files == sorted(QUANTISED)
    for part, file in zip(STEMS, QUANTISED, strict=True):
        prefix = "model.diffusion_model." if part == "transformer" else ""
        found, state, stored = load_file(quantised / file), states[part], 0
        for name, tensor in state.items() if part != "vae" else ():
            written = found[prefix + name]
            if written.dtype is not torch.int8:
                assert torch.equal(written, tensor)
                continue
            module, stored, group = name.removesuffix(".weight"), stored + 1, largest_group(tensor.shape[1])
            q, scale = quantise(tensor, group)
            assert torch.equal(written, q) and torch.equal(found[f"{prefix}{module}.weight_scale"], scale)
            mark = json.loads(bytes(found[f"{prefix}{module}.comfy_quant"].tolist()))
            assert mark == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
        blocks = [name for name in state if re.search(r"\.\d+\.", name)]
        products = [name for name in blocks if state[name].ndim == 2 and name.endswith(".weight")]
        assert stored == (len(products) if part != "vae" else 0)
    assert "decoder.conv1.weight" in load_file(quantised / QUANTISED[2])  # ComfyUI's names, WAN's own


def test_what_was_written_opens(quantised, diffusers, states):
    pipe = joyedit.load(quantised, device="cpu", processor=diffusers)
    assert_same(pipe, {"vae": states["vae"]})
    for part in ("transformer", "text_encoder"):
        weights = quantised_weights(pipe.components[part])
        assert weights and pipe.components[part].dtype is states[part][next(iter(weights))].dtype
        for name, weight in weights.items():
            error = weight.to(torch.float32) - states[part][name]
            assert error.norm() < 0.015 * states[part][name].float().norm(), name
    single = joyedit.load(diffusers, device="cpu", transformer=str(quantised / QUANTISED[0]))
    again = quantised_weights(single.transformer)
    assert all(torch.equal(again[n].stored, w.stored) for n, w in quantised_weights(pipe.transformer).items())


@pytest.mark.slow
def test_quantised_again_and_back(quantised, diffusers, states, tmp_path):
    """Numbers that are quantised anew are the same; in other layouts they are written as what they mean."""
    pipe = joyedit.load(quantised, device="cpu", processor=diffusers)
    save_checkpoint(pipe, tmp_path / "again", "comfyui", quantize="int8_convrot")
    for file in QUANTISED[:2]:
        first, second = load_file(quantised / file), load_file(tmp_path / "again" / file)
        assert all(torch.equal(second[name], t) for name, t in first.items() if t.dtype is torch.int8)
    for to in ("comfyui", "original", "diffusers"):
        save_checkpoint(pipe, tmp_path / to, to)
        options = {"processor": diffusers} if to == "comfyui" else {}
        plain = joyedit.load(tmp_path / to, device="cpu", **options).transformer
        for name, weight in quantised_weights(pipe.transformer).items():
            assert torch.equal(plain.state_dict()[name], weight.to(pipe.transformer.dtype)), (to, name)


@pytest.mark.slow
def test_the_command_writes_what_quantised_files_mean(quantised, diffusers, tmp_path):
    """Weight by weight, from the files: as the network that was read would be saved."""
    pipe = joyedit.load(quantised, device="cpu", processor=diffusers)
    pipe.save_pretrained(tmp_path / "saved")
    words = ["convert", str(quantised), str(tmp_path / "out"), "--part", f"processor={diffusers}", "-q"]
    assert cli.main(words) == 0
    for part, stem in STEMS.items():
        found, wanted = (load_file(tmp_path / at / part / f"{stem}.safetensors") for at in ("out", "saved"))
        assert found.keys() == wanted.keys()
        assert all(found[name].dtype is t.dtype and torch.equal(found[name], t) for name, t in wanted.items())


def test_the_disk_must_hold_what_is_quantised_and_no_more(quantised, diffusers, capsys, monkeypatch):
    needed = sum((quantised / file).stat().st_size for file in QUANTISED)
    plain = sum(path.stat().st_size for path in diffusers.rglob("*.safetensors"))
    words = ["convert", str(diffusers), str(quantised), "--to", "comfyui", "--quantize", "int8_convrot"]
    free = (needed + plain) // 2
    monkeypatch.setattr("joyedit.command.convert.shutil.disk_usage", lambda place: DiskUsage(0, 0, free))
    assert needed < free < plain and cli.main([*words, "-q", "--force"]) == 0
    free = needed // 2
    assert cli.main([*words, "-q", "--force"]) == 1
    assert "and the disk has" in capsys.readouterr().err


def test_files_side_by_side(quantised, diffusers, states, tmp_path):
    place(tmp_path, GENERATIONS["third"], diffusers)
    for file in QUANTISED[:2]:
        shutil.copy(quantised / file, tmp_path / file)
    assert_same(joyedit.load(tmp_path, device="cpu", processor=diffusers), states)
    pipe = joyedit.load(tmp_path, device="cpu", processor=diffusers, variant="int8_convrot")
    assert quantised_weights(pipe.transformer) and quantised_weights(pipe.text_encoder)
    (tmp_path / GENERATIONS["third"][0]).with_suffix(".safetensors").unlink()
    shutil.copy(quantised / QUANTISED[0], tmp_path / "diffusion_models" / "joyai_image_edit_int8.safetensors")
    with pytest.raises(FileNotFoundError, match=r'found .* pass variant="joyai.*", or transformer='):
        joyedit.load(tmp_path, device="cpu", processor=diffusers)


def test_plus_is_written_under_its_own_names(tmp_path):
    write_random_checkpoint(tmp_path / "plus", seed=2, plus=True)
    pipe = joyedit.load(tmp_path / "plus", device="cpu")
    save_checkpoint(pipe, tmp_path / "out", "comfyui", quantize="int8_convrot")
    names = sorted(path.name for path in (tmp_path / "out").rglob("*.safetensors"))
    assert names == [
        "joyai_image_edit_plus_int8_convrot.safetensors",
        "qwen3vl_8b_joyimage_edit_plus_int8_convrot.safetensors",
        "wan_2.1_vae.safetensors",
    ]
    again = joyedit.load(tmp_path / "out", device="cpu", processor=tmp_path / "plus")
    assert type(again).__name__ == "JoyImageEditPlusPipeline"
    files = {
        "transformer": tmp_path / "out" / "diffusion_models" / names[0],
        "text_encoder": str(tmp_path / "out" / "text_encoders" / names[1]),
    }
    parts = joyedit.load(tmp_path / "plus", device="cpu", **files)
    for part in files:
        weights = quantised_weights(parts.components[part])
        same = quantised_weights(again.components[part])
        assert weights and all(torch.equal(same[name].stored, w.stored) for name, w in weights.items())


def test_the_command_replaces_its_own_files_and_refuses_other_layouts(quantised, diffusers, capsys):
    words = ["convert", str(diffusers), str(quantised), "--quantize", "int8_convrot", "-q"]
    assert cli.main([*words, "--to", "comfyui", "--force"]) == 0
    for to in ([], ["--to", "original"]):
        assert cli.main([*words[:2], str(quantised.with_name("no")), *words[3:], *to]) == 1
        assert "--quantize int8_convrot is written with --to comfyui" in capsys.readouterr().err
    pipe = joyedit.load(diffusers, device="cpu")
    with pytest.raises(ValueError, match="quantize='int4'"):
        save_checkpoint(pipe, quantised.with_name("no"), "comfyui", quantize="int4")
    assert not quantised.with_name("no").exists()


def test_weights_that_are_no_numbers_are_not_quantised(diffusers, tmp_path):
    pipe = joyedit.load(diffusers, device="cpu")
    name = "double_blocks.0.img_mlp.net.2.weight"
    pipe.transformer.get_parameter(name).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{name} holds infinite values or no numbers"):
        save_checkpoint(pipe, tmp_path / "out", "comfyui", quantize="int8_convrot")
    assert not list((tmp_path / "out" / "diffusion_models").glob("*.safetensors"))


def test_info_knows_a_quantised_file(quantised, diffusers, tmp_path):
    path = quantised / QUANTISED[0]
    found = describe(str(path))
    assert found.parts["transformer"].class_name == "JoyImageEditTransformer3DModel"
    plain = describe(str(diffusers)).parts["transformer"]
    assert found.parts["transformer"].dtypes["int8"] > 0
    assert found.parts["transformer"].parameters == plain.parameters  # scales and marks are none
    assert describe(str(quantised)).parts["transformer"].dtypes == found.parts["transformer"].dtypes
    assert found.parts["transformer"].dtypes.keys() == {*plain.dtypes, "int8"}
    state = load_file(path)
    state = {name: t for name, t in state.items() if not name.endswith("img_mlp.net.2.weight_scale")}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="img_mlp.net.2 is quantised, and .* is missing"):
        joyedit.load(diffusers, device="cpu", transformer=tmp_path / "x.safetensors")
