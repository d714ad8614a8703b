"""Stable Diffusion folders as they are published and as the reference saves them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import joyedit
from benchmarks.random_checkpoint import write_random_diffedit_checkpoint
from joyedit.command import info


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "sd"
    write_random_diffedit_checkpoint(folder)
    return folder


def assert_same(pipe, states):
    for part, state in states.items():
        found = getattr(pipe, part).state_dict()
        state = {name: value for name, value in state.items() if not name.endswith("position_ids")}
        assert found.keys() == state.keys(), part
        assert all(torch.equal(found[name], state[name]) for name in state), part


@pytest.fixture(scope="module")
def published(tmp_path_factory, sd_reference, tiny):
    """A folder of 1.x as the reference's text-to-image pipeline saves it, PNDM and all."""
    import diffusers
    import transformers

    root = tmp_path_factory.mktemp("published") / "sd"
    pipe = diffusers.StableDiffusionPipeline(
        **sd_reference[1],
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tiny / "tokenizer"),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=transformers.CLIPImageProcessor(),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(root)
    return root


@pytest.fixture
def folder(published, tmp_path):
    shutil.copytree(published, tmp_path / "sd")
    return tmp_path / "sd"


def edit_json(path, **changes):
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value != "drop"}))


def test_a_text_to_image_folder_gives_the_pipeline(published, sd_states):
    index = json.loads((published / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["scheduler"][1] == "PNDMScheduler"
    assert "inverse_scheduler" not in index
    pipe = joyedit.load(published, device="cpu")
    assert type(pipe) is joyedit.StableDiffusionDiffEditPipeline
    assert_same(pipe, sd_states[1])
    assert type(pipe.scheduler) is joyedit.DDIMScheduler and not pipe.scheduler.config.clip_sample
    assert type(pipe.inverse_scheduler) is joyedit.DDIMInverseScheduler
    assert pipe.inverse_scheduler.config.steps_offset == pipe.scheduler.config.steps_offset == 1
    assert pipe.safety_checker is None and pipe.feature_extractor is not None
    for name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionDiffEditPipeline"):
        assert joyedit.loading.layouts.pipeline_for(name) == "StableDiffusionDiffEditPipeline"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusionInpaintPipeline", "an inpainting UNet takes 9 channels"),
        ("StableDiffusionXLPipeline", "Stable Diffusion XL has other networks"),
        ("StableDiffusionXLImg2ImgPipeline", "Stable Diffusion XL has other networks"),
    ],
)
def test_folders_of_other_pipelines_are_refused_by_name(folder, name, reason):
    edit_json(folder / "model_index.json", _class_name=name)
    with pytest.raises(ValueError, match=f"holds a {name}: {reason}"):
        joyedit.load(folder, device="cpu")


def test_networks_of_other_models_are_refused(folder):
    sdxl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    sdxl |= {"projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10, 10]}
    config = json.loads((folder / "unet" / "config.json").read_text())
    edit_json(folder / "unet" / "config.json", **sdxl)
    with pytest.raises(ValueError, match="unet.config.json.*is of an SDXL UNet"):
        joyedit.load(folder, device="cpu")
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_in.weight"] = torch.zeros(32, 9, 3, 3)
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(ValueError, match="inpainting UNet"):
        joyedit.load(folder, device="cpu")


def test_older_names_in_index_scheduler_and_processor(folder, sd_states):
    entry = ["transformers", "CLIPFeatureExtractor"]
    edit_json(
        folder / "model_index.json", feature_extractor=entry, safety_checker="drop", image_encoder="drop"
    )
    older = {"crop_size": 224, "size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    edit_json(folder / "feature_extractor" / "preprocessor_config.json", image_processor_type="drop", **older)
    edit_json(folder / "scheduler" / "scheduler_config.json", clip_sample="drop", steps_offset=0)
    pipe = joyedit.load(folder, device="cpu")
    assert pipe.feature_extractor.config.size == 224 and pipe.safety_checker is None
    assert not pipe.scheduler.config.clip_sample and not pipe.inverse_scheduler.config.clip_sample
    assert pipe.scheduler.config.steps_offset == pipe.inverse_scheduler.config.steps_offset == 1
    assert_same(pipe, sd_states[1])


KINDS = [pytest.param(f"{kind}Scheduler", marks=pytest.mark.slow) for kind in ("DPMSolverMultistep", "DDIM")]


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", *KINDS])
def test_both_schedulers_come_from_whatever_file_is_there(folder, kind):
    import diffusers

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    getattr(diffusers, kind)(**settings, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    edit_json(folder / "model_index.json", scheduler=["diffusers", kind])
    pipe = joyedit.load(folder, device="cpu")
    for scheduler in (pipe.scheduler, pipe.inverse_scheduler):
        assert scheduler.config.prediction_type == "v_prediction"
        assert scheduler.config.timestep_spacing == "leading"
        scheduler.set_timesteps(10)
    assert pipe.scheduler.timesteps.tolist() == pipe.inverse_scheduler.timesteps.tolist()[::-1]


@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param({"steps_offset": offset}, marks=pytest.mark.slow) for offset in (0, 1)),
        {"timestep_spacing": "linspace"},
    ],
)
def test_a_scheduler_of_ones_own_stays_one(tiny, settings):
    """Also where its settings have no inverse, and it is built again with others."""

    class Own(joyedit.DDIMScheduler):
        pass

    pipe = joyedit.load(tiny, device="cpu", scheduler=Own(clip_sample=False, **settings))
    assert type(pipe.scheduler) is Own and pipe.scheduler.config.steps_offset == 1
    for scheduler in (pipe.scheduler, pipe.inverse_scheduler):
        scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps.tolist() == pipe.inverse_scheduler.timesteps.tolist()[::-1]


def test_safety_checker_is_loaded_or_left_out(tmp_path):
    write_random_diffedit_checkpoint(tmp_path / "sd", safety_checker=True)
    pipe = joyedit.load(tmp_path / "sd", device="cpu")
    assert type(pipe.safety_checker) is joyedit.StableDiffusionSafetyChecker
    without = joyedit.load(tmp_path / "sd", device="cpu", safety_checker=None)
    assert without.safety_checker is None and without.feature_extractor is not None
    direct = joyedit.StableDiffusionDiffEditPipeline.from_pretrained(
        tmp_path / "sd", safety_checker=None, requires_safety_checker=False
    )
    assert direct.safety_checker is None
    edit_json(tmp_path / "sd" / "model_index.json", feature_extractor=[None, None])
    with pytest.raises(ValueError, match="safety_checker needs a feature_extractor"):
        joyedit.load(tmp_path / "sd", device="cpu")


def test_requires_safety_checker_survives_a_round_trip(folder, tmp_path):
    pipe = joyedit.load(folder, device="cpu")
    assert pipe.requires_safety_checker is False
    pipe.save_pretrained(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved" / "model_index.json").read_text())["requires_safety_checker"] is False
    )
    edit_json(folder / "model_index.json", requires_safety_checker="drop")
    assert joyedit.load(folder, device="cpu").requires_safety_checker is True


STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def weights_of(folder, part):
    return folder / part / f"{STEMS[part]}.safetensors"


def to_variant(folder, part, variant, factor=3):
    state = {name: value * factor for name, value in load_file(weights_of(folder, part)).items()}
    save_file(state, folder / part / f"{STEMS[part]}.{variant}.safetensors", {"format": "pt"})
    return state


def to_pickle(folder, part, variant=None, factor=1):
    state = {name: value * factor for name, value in load_file(weights_of(folder, part)).items()}
    stem = "pytorch_model" if part == "text_encoder" else STEMS[part]
    torch.save(state, folder / part / f"{stem}{f'.{variant}' if variant else ''}.bin")


def test_variants_fall_back_folder_by_folder(folder, sd_states, caplog):
    """non_ema of the UNet alone, as 1.4 and 1.5 have it."""
    to_variant(folder, "unet", "non_ema")
    pipe = joyedit.load(folder, device="cpu", variant="non_ema")
    tripled = {name: value * 3 for name, value in sd_states[1]["unet"].items()}
    assert_same(pipe, {**sd_states[1], "unet": tripled})
    assert "no variant 'non_ema' of" in caplog.text and "vae" in caplog.text
    direct = joyedit.StableDiffusionDiffEditPipeline.from_pretrained(folder, variant="non_ema")
    assert_same(direct, {"unet": tripled})
    assert_same(joyedit.load(folder, device="cpu"), sd_states[1])
    described = info.describe(str(folder), variant="non_ema")
    assert described.parts["unet"].files == ("unet/diffusion_pytorch_model.non_ema.safetensors",)
    assert described.parts["vae"].files == ("vae/diffusion_pytorch_model.safetensors",)
    with pytest.raises(FileNotFoundError, match="no weights of variant 'int8'"):
        joyedit.load(folder, device="cpu", variant="int8")


@pytest.mark.slow
def test_order_of_preference_of_weight_files(folder, sd_states):
    """Variant as safetensors, variant as pickle, plain safetensors, plain pickle."""

    def factor(variant, **options):
        options = {"torch_dtype": torch.float32, "variant": variant, **options}
        pipe = joyedit.StableDiffusionDiffEditPipeline.from_pretrained(folder, **options)
        name = "conv_in.weight"
        return round((pipe.unet.state_dict()[name] / sd_states[1]["unet"][name]).mean().item())

    for part in STEMS:
        to_pickle(folder, part, factor=2)
        to_pickle(folder, part, "fp16", factor=4)
        to_variant(folder, part, "fp16", factor=3)
    assert factor("fp16") == 3 and factor(None) == 1
    assert factor("fp16", use_safetensors=False) == 4 and factor(None, use_safetensors=False) == 2
    for part in STEMS:
        (folder / part / f"{STEMS[part]}.fp16.safetensors").unlink()
    assert factor("fp16") == 4
    with pytest.raises(FileNotFoundError, match="pickles are refused"):
        factor("fp16", use_safetensors=True)
    for part in STEMS:
        weights_of(folder, part).unlink()
    assert factor(None) == 2
    with pytest.raises(FileNotFoundError, match="pickles are refused"):
        factor(None, use_safetensors=True)


@pytest.mark.parametrize("flat", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_old_names_of_vae_and_text_encoder(folder, sd_states, flat):
    """Pickles of 2022: other names in the VAE's attention, convolutions copied as they were, position ids."""
    words = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in sd_states[1]["vae"].items():
        for new, older in words.items():
            if f".{new}." in name:
                name = name.replace(new, older)
                value = value if flat or value.ndim == 1 else value[..., None, None]
        old[name] = value
    assert any("proj_attn" in name for name in old)
    text = {f"text_model.{name}": value for name, value in sd_states[1]["text_encoder"].items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for part, state in (("vae", old), ("text_encoder", text)):
        weights_of(folder, part).unlink()
        torch.save(state, folder / part / f"{'pytorch_model' if part == 'text_encoder' else STEMS[part]}.bin")
    assert_same(joyedit.load(folder, device="cpu"), sd_states[1])


def test_the_reference_opens_what_we_save(published, sd_states, tmp_path):
    import diffusers

    joyedit.load(published, device="cpu").save_pretrained(tmp_path / "saved")
    pipe = diffusers.StableDiffusionDiffEditPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert_same(pipe, sd_states[1])
    assert pipe.inverse_scheduler.config.steps_offset == 1
    again = joyedit.load(tmp_path / "saved", device="cpu")
    assert_same(again, sd_states[1])


RELEASES = {  # UNet, VAE, text encoder; what the scheduler says; the tokenizer's padding
    "stable-diffusion-v1-5": ((686, 248, 196), "epsilon", 49407),
    "stable-diffusion-2-1": ((686, 248, 372), "v_prediction", 0),
    "stable-diffusion-2-1-base": ((686, 248, 372), "epsilon", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASES)
def test_published_folders_at_their_own_size(shared_data, sd_released, write_zeros, tmp_path, name):
    counts, prediction_type, padding = RELEASES[name]
    root = tmp_path / name
    shutil.copytree(shared_data / name, root)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "clip-tokenizer" / file, root / "tokenizer" / file)
    networks = sd_released(name)
    for part, state in networks.items():
        stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        write_zeros(root / part / f"{stem}.safetensors", state)
    pipe = joyedit.load(root, device="cpu")
    assert type(pipe) is joyedit.StableDiffusionDiffEditPipeline
    assert tuple(len(getattr(pipe, part).state_dict()) for part in STEMS) == counts
    assert pipe.scheduler.config.prediction_type == prediction_type
    assert pipe.inverse_scheduler.config.prediction_type == prediction_type
    assert not pipe.scheduler.config.clip_sample and pipe.scheduler.config.steps_offset == 1
    assert (pipe.safety_checker is not None) == (name == "stable-diffusion-v1-5")
    assert pipe.tokenizer.pad_token_id == padding
    found = info.describe(str(root))
    assert found.parts["unet"].parameters == (859_520_964 if "v1-5" in name else 865_910_724)
    assert found.parts["vae"].parameters == 83_653_863
