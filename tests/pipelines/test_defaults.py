"""What a call works with where its caller says nothing: the preset's settings, else those that the checkpoint
was made for, else the signature's, which are the reference's."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from joyedit.pipelines.defaults import Unsaid, plain, unsaid
from joyedit.pipelines.made_for import MadeFor, World

PHOTO = Image.linear_gradient("L").resize((64, 64)).convert("RGB")


@pytest.fixture(scope="module")
def loaded():
    return {
        system: joyedit.load(f"tiny-{system}", device="cpu", dtype="float32")
        for system in ("joyimage", "diffedit", "chronoedit")
    }


@pytest.fixture
def pipes(loaded):
    made = {system: type(pipe).from_pipe(pipe) for system, pipe in loaded.items()}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def settings(pipe, **call):
    """Steps and guidance of a call."""
    call = {"generator": torch.Generator().manual_seed(0), "output_type": "latent", **call}
    if "processor" not in pipe.parts:
        call = {"height": 64, "width": 64, **call}
    seen = []

    def look(mine, *_):
        seen.append((mine.num_timesteps, mine.guidance_scale))
        mine.interrupt = True
        return {}

    pipe(image=PHOTO, prompt="Make it red.", callback_on_step_end=look, **call)
    return seen[0]


@pytest.mark.parametrize(("system", "usual"), [("joyimage", (40, 4.0)), ("chronoedit", (50, 5.0))])
def test_a_small_checkpoint_has_its_own_settings(pipes, system, usual):
    pipe = pipes[system]
    assert settings(pipe) == (2, 1.0)
    steps, guidance = usual
    assert settings(pipe, num_inference_steps=steps) == (steps, 1.0)
    assert settings(pipe, guidance_scale=guidance) == (2, guidance)
    assert settings(pipe, num_inference_steps=3, guidance_scale=1.5) == (3, 1.5)
    pipe.made_for = MadeFor()
    assert settings(pipe) == usual


def test_a_preset_comes_before_the_checkpoint_and_after_the_caller(pipes):
    pipe = pipes["chronoedit"]
    assert settings(pipe, preset="distill") == (8, 1.0)
    assert settings(pipe, preset="distill", num_inference_steps=50) == (50, 1.0)
    assert settings(pipe, preset="distill", guidance_scale=5.0) == (8, 5.0)
    pipe.preset = "distill"
    assert settings(pipe) == (8, 1.0) and settings(pipe, num_inference_steps=50) == (50, 1.0)


@pytest.mark.slow
def test_the_settings_of_an_edit_between_captions(pipes, monkeypatch):
    pipe = pipes["diffedit"]
    said = {"num_inference_steps": 5, "inpaint_strength": 0.6, "guidance_scale": 3.0, "composite": True}
    masks = {"mask_encode_strength": 0.4, "mask_thresholding_ratio": 2.0, "num_maps_per_mask": 3}
    others = {"invert_guidance_scale": 1.5, "negative_prompt": "grey"}
    pipe.made_for = MadeFor({**said, **masks, **others})
    words = {"source_prompt": "a red circle", "target_prompt": "a blue circle"}

    def edit(**call):
        return pipe.edit(PHOTO, generator=torch.Generator().manual_seed(0), output_type="np", **words, **call)

    silent = edit()
    pipe.made_for = MadeFor()
    assert np.array_equal(silent.images, edit(**said, **masks, **others).images)
    for name in {**said, **masks, **others}:
        rest = {key: value for key, value in {**said, **masks, **others}.items() if key != name}
        assert not np.array_equal(silent.images, edit(**{**rest, "num_maps_per_mask": 1}).images), name
    pipe.made_for = MadeFor({**said, **masks, **others})
    usual = {name: plain(one.default) for name, one in inspect.signature(pipe.edit).parameters.items()}
    told = {name: usual[name] for name in {**said, **masks, **others} if name != "negative_prompt"}
    told = {**told, "num_inference_steps": 4, "negative_prompt": "a red circle"}
    spoken = edit(**told)
    pipe.made_for = MadeFor()
    assert np.array_equal(spoken.images, edit(num_inference_steps=4).images)

    pipe.made_for = MadeFor(said | others)
    levels = pipe.invert("a red circle", PHOTO)
    assert levels.latents.shape[1] == 4 and pipe.guidance_scale == 1.5
    pipe("a blue circle", torch.ones(16, 16), levels.latents, image=PHOTO)
    assert pipe.num_timesteps == 3 and pipe.guidance_scale == 3.0


def test_signatures_show_the_defaults_of_the_reference():
    pairs = [
        (joyedit.JoyImageEditPipeline.__call__, diffusers.JoyImageEditPipeline.__call__),
        (joyedit.ChronoEditPipeline.__call__, diffusers.ChronoEditPipeline.__call__),
    ]
    theirs = diffusers.StableDiffusionDiffEditPipeline
    for name in ("__call__", "generate_mask", "invert"):
        pairs.append((getattr(joyedit.StableDiffusionDiffEditPipeline, name), getattr(theirs, name)))
    for mine, theirs in pairs:
        defaults = {name: one.default for name, one in inspect.signature(mine).parameters.items()}
        for name, one in inspect.signature(theirs).parameters.items():
            if name in ("num_inference_steps", "guidance_scale", "inpaint_strength", "num_maps_per_mask"):
                assert defaults[name] == one.default and isinstance(defaults[name], Unsaid), name
                assert repr(defaults[name]) == repr(one.default)
    text = str(inspect.signature(joyedit.JoyImageEditPipeline.__call__))
    assert "num_inference_steps: int = 40," in text and "guidance_scale: float = 4.0," in text
    assert "composite: bool = False" in str(inspect.signature(joyedit.StableDiffusionDiffEditPipeline.edit))


def test_a_default_is_the_number_that_it_shows():
    for value in (40, 4.0, False, True):
        default = unsaid(value)
        assert default == value and repr(default) == repr(value) and str(default) == str(value)
        assert type(plain(default)) is type(value) and plain(default) == value and plain(value) is value
        assert json.dumps(plain(default)) == json.dumps(value) and bool(default) is bool(value)


def test_words_that_a_small_checkpoint_does_not_know(pipes):
    pipe = pipes["diffedit"]
    assert pipe.unknown_words(["a red circle"]) == []
    assert pipe.unknown_words(["a red zebra", "a gnu"]) == ["zebra", "gnu"]
    try:
        pipe.load_textual_inversion(torch.zeros(pipe.text_encoder.config.hidden_size), "<gnu>")
        assert pipe.unknown_words(["a red zebra", "a <gnu>"]) == ["zebra"]
    finally:
        pipe.unload_textual_inversion()
    unet = pipe.unet
    layer = next(name[:-7] for name, _ in unet.named_parameters() if name.endswith("to_q.weight"))
    out, width = unet.get_parameter(f"{layer}.weight").shape
    state = {f"unet.{layer}.lora_A.weight": torch.ones(2, width)}
    state[f"unet.{layer}.lora_B.weight"] = torch.zeros(out, 2)
    try:
        pipe.load_lora_weights(state)
        pipe.fuse_lora()
        assert pipe.unknown_words(["a red zebra"]) == []
        pipe.unfuse_lora()
    finally:
        pipe.unload_lora_weights()
    assert pipe.unknown_words(["a red zebra"]) == ["zebra"]
    pipe.made_for = MadeFor(world=World("anything", ("a",), 0.0))
    assert pipe.unknown_words(["a red"]) == ["red"]
    pipe.made_for = MadeFor()
    assert pipe.unknown_words(["a red zebra"]) == []
