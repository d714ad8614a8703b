"""`joyedit.load`: every layout of a checkpoint, replaced parts, and what is refused."""

import importlib
import json
import pkgutil
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.loading.layouts import BUILT_IN, layout_of, place_of, read_infer_config, save_checkpoint


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diffusers")
    write_random_checkpoint(folder, seed=2)
    return folder


@pytest.fixture(scope="module")
def states(diffusers_folder):
    parts = {
        "transformer": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    }
    return {part: load_file(diffusers_folder / part / f"{stem}.safetensors") for part, stem in parts.items()}


INFER_CONFIG = """
import os
os.abort()  # a reader that ran this file would not live to tell

class Config(InferConfig):
    dit_arch_config: dict = field(default_factory=lambda: {
        "target": "modules.models.Transformer3DModel",
        "params": {
            "hidden_size": 64, "in_channels": 16, "out_channels": 16, "heads_num": 2,
            "mm_double_blocks_depth": 3, "patch_size": [1, 2, 2], "rope_dim_list": [8, 12, 12],
            "text_states_dim": 32, "mlp_width_ratio":
            2.0, "rope_type": "rope", "dit_modulation_type": "wanx", "theta": 10000, "attn_backend":
            "flash_attn",
        },
    })
    vae_arch_config: dict = field(default_factory=lambda: {"pretrained": os.path.join(ROOT, "vae")})
    scheduler_arch_config: dict = field(default_factory=lambda: {
        "target": "modules.FlowMatchDiscreteScheduler", "params": {"num_train_timesteps": 1000, "shift":
        3.0}})
"""


def original_transformer_name(key):
    for stream in ("img", "txt"):
        key = key.replace(f".attn.{stream}_attn_", f".{stream}_attn_")
    return key


@pytest.fixture(scope="module")
def original_folder(tmp_path_factory, diffusers_folder, states):
    """The layout of the original repository, written with this test's own names."""
    root = tmp_path_factory.mktemp("original")
    (root / "transformer").mkdir()
    renamed = {original_transformer_name(key): value for key, value in states["transformer"].items()}
    torch.save({"model": renamed}, root / "transformer" / "transformer.pth")
    shutil.copytree(diffusers_folder / "text_encoder", root / "JoyAI-Image-Und")
    shutil.copytree(diffusers_folder / "processor", root / "JoyAI-Image-Und", dirs_exist_ok=True)
    shutil.copytree(diffusers_folder / "vae", root / "vae")
    (root / "infer_config.py").write_text(INFER_CONFIG)
    return root


def assert_same_weights(pipe, states):
    for part, state in states.items():
        found = getattr(pipe, part).state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key].float(), state[key].float()) for key in state), part


def test_diffusers_folder(diffusers_folder, states):
    pipe = joyedit.load(diffusers_folder, device="cpu")
    assert type(pipe).__name__ == "JoyImageEditPipeline" and pipe.scheduler.config.shift == 1.5
    assert pipe.dtype is torch.bfloat16
    assert_same_weights(pipe, states)


def test_original_layout(original_folder, states):
    pipe = joyedit.load(original_folder, device="cpu", dtype="float32")
    assert_same_weights(pipe, states)
    assert pipe.transformer.config.num_attention_heads == 2 and pipe.transformer.config.text_dim == 32
    pipe.scheduler.set_timesteps(4)
    s = torch.linspace(1, 0, 5)
    torch.testing.assert_close(pipe.scheduler.sigmas, 3 * s / (1 + 2 * s))
    assert len(pipe(prompt="a", num_inference_steps=1, generator=torch.manual_seed(0)).images) == 1


def test_original_layout_accepts_exactly_one_vae_file(original_folder, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(original_folder, root)
    save_file({"a": torch.zeros(1)}, root / "vae" / "another.safetensors")
    with pytest.raises(FileNotFoundError, match="vae: wanted exactly one weight file"):
        joyedit.load(root, device="cpu")
    shutil.rmtree(root / "transformer")
    (root / "transformer").mkdir()
    (root / "transformer" / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match="transformer: wanted exactly one weight file, found none"):
        joyedit.load(root, device="cpu")


def test_infer_config_is_read_and_never_run(tmp_path):
    path = tmp_path / "infer_config.py"
    path.write_text(INFER_CONFIG)
    settings = read_infer_config(path)
    assert settings["params"]["mm_double_blocks_depth"] == 3 and settings["shift"] == 3.0
    path.write_text("class Config(:")
    with pytest.raises(ValueError, match="not readable Python"):
        read_infer_config(path)


@pytest.fixture
def comfyui_folder(tmp_path, diffusers_folder, states):
    names = {
        "transformer": "diffusion_models/joy_image_edit_bf16.safetensors",
        "text_encoder": "text_encoders/qwen3vl_joyimage_bf16.safetensors",
        "vae": "vae/joy_image_edit_vae.safetensors",
    }
    for part, name in names.items():
        file = tmp_path / name
        file.parent.mkdir()
        prefix = "model.diffusion_model." if part == "transformer" else ""
        save_file({prefix + key: value for key, value in states[part].items()}, file)
        shutil.copy(diffusers_folder / part / "config.json", file.parent)
    return tmp_path


def test_comfyui_folder_and_single_files(comfyui_folder, diffusers_folder, states):
    with pytest.raises(ValueError, match="holds no processor: pass processor="):
        joyedit.load(comfyui_folder, device="cpu")
    tokenizer = joyedit.Qwen2Tokenizer.from_pretrained(diffusers_folder, subfolder="tokenizer")
    with pytest.raises(ValueError, match="holds no processor: pass processor="):
        joyedit.load(comfyui_folder, device="cpu", tokenizer=tokenizer)
    pipe = joyedit.load(comfyui_folder, device="cpu", processor=diffusers_folder)
    assert_same_weights(pipe, states)
    assert pipe.scheduler.config.shift == 1.5
    single = joyedit.load(
        comfyui_folder / "diffusion_models" / "joy_image_edit_bf16.safetensors",
        device="cpu",
        processor=diffusers_folder / "processor",
        text_encoder=diffusers_folder,
        vae=comfyui_folder / "vae" / "joy_image_edit_vae.safetensors",
    )
    assert_same_weights(single, states)


@pytest.mark.parametrize("to", ["original", "comfyui"])
def test_converting_there_and_back_changes_no_tensor(diffusers_folder, states, tmp_path, to):
    pipe = joyedit.load(diffusers_folder, device="cpu")
    save_checkpoint(pipe, tmp_path / to, to)
    for part in ("transformer", "vae", "text_encoder"):  # sizes that a foreign layout does not carry
        for place in {
            "original": [part],
            "comfyui": [{"transformer": "diffusion_models"}.get(part, part + "s"), part],
        }[to]:
            if (tmp_path / to / place).is_dir() and part != "text_encoder" or to == "comfyui":
                folder = tmp_path / to / place
                if folder.is_dir():
                    shutil.copy(diffusers_folder / part / "config.json", folder)
    again = joyedit.load(
        tmp_path / to, device="cpu", **({"processor": diffusers_folder} if to == "comfyui" else {})
    )
    assert_same_weights(again, states)
    with pytest.raises(FileExistsError):
        save_checkpoint(pipe, tmp_path / to, to)


def test_written_original_layout_has_the_original_names(diffusers_folder, states, tmp_path):
    save_checkpoint(joyedit.load(diffusers_folder, device="cpu"), tmp_path / "out", "original")
    written = torch.load(tmp_path / "out" / "transformer" / "transformer.pth", weights_only=True)
    assert set(written) == {original_transformer_name(key) for key in states["transformer"]}
    vae = torch.load(tmp_path / "out" / "vae" / "Wan2.1_VAE.pth", weights_only=True)
    assert "encoder.downsamples.0.residual.0.gamma" in vae and "decoder.head.2.weight" in vae


def test_parts_can_be_replaced_and_given_parts_are_not_cast(diffusers_folder):
    vae = joyedit.AutoencoderKLWan.from_pretrained(diffusers_folder, subfolder="vae", dtype="float32")
    pipe = joyedit.load(diffusers_folder, device="cpu", dtype="bf16", vae=vae)
    assert pipe.vae is vae and vae.dtype is torch.float32 and pipe.dtype is torch.bfloat16
    direct = joyedit.JoyImageEditPipeline.from_pretrained(
        diffusers_folder, vae=vae, torch_dtype=torch.float32
    )
    assert direct.vae is vae and direct.dtype is torch.float32


class Own(joyedit.FlowMatchEulerDiscreteScheduler):
    """A solver of the user's."""


def test_a_scheduler_of_ones_own(diffusers_folder, tmp_path):
    own = Own(shift=2.5)
    pipe = joyedit.load(diffusers_folder, device="cpu", scheduler=own)
    assert pipe.scheduler is own
    pipe.scheduler = Own.from_config(own.config, shift=3.5)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="scheduler is a Own; JoyImageEditPipeline takes .* pass scheduler= "
    ):
        joyedit.load(tmp_path, device="cpu")
    saved = Own.from_pretrained(tmp_path, subfolder="scheduler")
    for load in (joyedit.load, joyedit.JoyImageEditPipeline.from_pretrained):
        again = load(tmp_path, scheduler=saved)
        assert type(again.scheduler) is Own and again.scheduler.shift == 3.5


def test_built_in_names_are_folders_of_the_package(diffusers_folder, monkeypatch, tmp_path, caplog):
    folder = Path(joyedit.__file__).parent / "assets"
    for name in BUILT_IN:
        assert place_of(name) == str(folder / name) and place_of(folder / name) == str(folder / name)
    with caplog.at_level("INFO", logger="joyedit"):
        pipe = joyedit.load(device="cpu", reference_quirks=True)
    assert pipe.quirks == pipe.quirk_names and "JoyImageEditPipeline from tiny-joyimage (" in caplog.text
    stored = load_file(folder / "tiny-joyimage" / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(pipe.vae.state_dict()["quant_conv.bias"], stored["quant_conv.bias"])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(diffusers_folder, "tiny-joyimage")  # a folder of that name here comes first
    stored = load_file(diffusers_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(
        joyedit.load(device="cpu").vae.state_dict()["quant_conv.bias"], stored["quant_conv.bias"]
    )


def test_load_is_still_the_function_after_every_submodule_is_imported(diffusers_folder):
    for module in pkgutil.walk_packages(joyedit.__path__, "joyedit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert callable(joyedit.load) and joyedit.load(diffusers_folder, device="cpu").dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(device="gpu"), ValueError, "device='gpu'"),
        (dict(dtype="int4"), ValueError, "dtype='int4'"),
        (dict(offload="disk"), ValueError, "offload='disk': must be"),
        (
            dict(pipeline="FluxPipeline"),
            ValueError,
            "pipeline='FluxPipeline': must be one of JoyImageEditPipeline",
        ),
        (dict(unet=None), TypeError, "unet.*has the parts scheduler, vae"),
    ],
    ids=str,
)
def test_bad_options(diffusers_folder, arguments, error, message):
    with pytest.raises(error, match=message):
        joyedit.load(diffusers_folder, **{"device": "cpu", **arguments})


def test_a_missing_accelerator_is_named(diffusers_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no CUDA"):
        joyedit.load(diffusers_folder, device="cuda")


def test_places_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        joyedit.load(tmp_path / "nowhere")
    (tmp_path / "photo.txt").write_text("")
    with pytest.raises(ValueError, match="no checkpoint that joyedit knows.*photo.txt"):
        joyedit.load(tmp_path)
    with pytest.raises(ValueError, match="not of weights"):
        joyedit.load(tmp_path / "photo.txt")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="holds a FluxPipeline"):
        joyedit.load(tmp_path)


def test_damaged_diffusers_folders(diffusers_folder, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(diffusers_folder, root)
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(
        json.dumps({**index, "scheduler": ["diffusers", "EulerScheduler"]})
    )
    with pytest.raises(ValueError, match="scheduler is a EulerScheduler; JoyImageEditPipeline takes Flow"):
        joyedit.load(root)
    (root / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "vae"}))
    with pytest.raises(ValueError, match="lists no 'vae'"):
        joyedit.load(root)
    (root / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match="holds a FluxPipeline, not a JoyImageEditPipeline"):
        joyedit.JoyImageEditPipeline.from_pretrained(root)
    (root / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(root / "text_encoder")
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        joyedit.load(root)


def test_layouts_are_told_apart_by_their_files():
    assert layout_of("x", ["model_index.json", "transformer/a"]) == "diffusers"
    assert layout_of("x", ["JoyAI-Image-Und/config.json", "transformer/t.pth", "vae/v.pth"]) == "original"
    assert layout_of("x", ["diffusion_models/a.safetensors"]) == "comfyui"
    assert layout_of("x.safetensors", []) == "comfyui"


def test_licence_is_taken_from_the_model_card(diffusers_folder, tmp_path, caplog):
    root = tmp_path / "copy"
    shutil.copytree(diffusers_folder, root)
    (root / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n")
    with caplog.at_level("INFO", logger="joyedit"):
        joyedit.load(root, device="cpu")
    assert "licence of the weights: apache-2.0" in caplog.text
