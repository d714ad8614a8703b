"""What a small checkpoint says of its use, and what the command line makes of it."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import (
    write_random_checkpoint,
    write_random_chronoedit_checkpoint,
    write_random_diffedit_checkpoint,
)
from joyedit.command import info
from joyedit.loading import layouts
from joyedit.media import images
from joyedit.pipelines.made_for import MadeFor, World, round_trip, words_of

WORLD = {"about": "drawn things", "words": ["a", "make", "it", "red"], "psnr": -20.0}
SAID = {"call": {"num_inference_steps": 3, "guidance_scale": 1.5}, "world": WORLD}
MODELS = {"joyimage": write_random_checkpoint, "diffedit": write_random_diffedit_checkpoint}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("made-for")
    for name, write in MODELS.items():
        write(root / name)
    write_random_chronoedit_checkpoint(root / "chronoedit")
    return root


@pytest.fixture
def desk(folders, tmp_path, monkeypatch):
    """The current folder, with a picture and the checkpoints."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save("photo.png")
    for name in (*MODELS, "chronoedit"):
        shutil.copytree(folders / name, name)


def say(name, said):
    file = Path(name, "model_index.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "made_for": said}))


def recorded(path):
    return images.read_metadata(path)


def settings(path):
    found = recorded(path)
    return found["num_inference_steps"], found["guidance_scale"]


def test_settings_hold_where_nothing_else_is_said(desk, run):
    say("joyimage", SAID)
    words = ("edit", "photo.png", "Make it red.", "-m", "joyimage", "--seed", 1, "-q")
    assert run(*words, "-o", "a.png")[0] == 0 and settings("a.png") == (3, 1.5)
    assert run(*words, "-o", "b.png", "--steps", 2)[0] == 0 and settings("b.png") == (2, 1.5)
    assert run(*words, "-o", "c.png", "--guidance-scale", 1)[0] == 0 and settings("c.png") == (3, 1.0)
    say("joyimage", {})
    assert run(*words[:-1], "--config-from", "a.png", "-o", "d.png")[0] == 0
    assert Path("d.png").read_bytes() == Path("a.png").read_bytes()
    told = recorded("b.png") | {"num_inference_steps": 2, "guidance_scale": 2.0}
    images.save_png(Image.new("RGB", (8, 8)), "told.png", told)
    say("joyimage", SAID)
    assert run(*words, "--config-from", "told.png", "-o", "e.png")[0] == 0
    assert settings("e.png") == (2, 2.0)


def test_settings_of_an_edit_between_captions(desk, run):
    call = {"num_inference_steps": 3, "inpaint_strength": 0.7, "num_maps_per_mask": 2, "composite": True}
    say("diffedit", {"call": call})
    words = ("edit", "photo.png", "--source", "a cat", "--target", "a dog", "-m", "diffedit", "-q")
    assert run(*words, "-o", "a.png", "--num-maps-per-mask", 1)[0] == 0
    assert recorded("a.png") | call | {"num_maps_per_mask": 1} == recorded("a.png")


def test_settings_of_a_film(desk, run):
    say("chronoedit", {**SAID, "basesize": 48})
    words = ("edit", "photo.png", "Make it red.", "-m", "chronoedit", "--seed", 1)
    assert run(*words, "-o", "a.png", "-q")[0] == 0
    assert settings("a.png") == (3, 1.5) and Image.open("a.png").size == (48, 32)
    assert run(*words, "-o", "b.png", "-q", "--preset", "distill")[0] == 0
    assert settings("b.png") == (8, 1.0)
    status, _, err = run(*words, "-o", "c.png", "--reasoning-steps", 4)
    assert status == 1 and "--reasoning-steps 4 is above the 3 steps" in err


@pytest.mark.slow
def test_one_line_says_what_a_small_model_does_not_know(desk, run):
    def lines(*words, model="joyimage"):
        status, _, err = run(*words, "-m", model, "--seed", 1, "--force", "-o", "out.png", "--steps", 1)
        assert status == 0
        return [line for line in err.splitlines() if "real weights" in line]

    def edit(prompt):
        return lines("edit", "photo.png", prompt)

    say("joyimage", SAID)
    assert edit("Make it red.") == [] == edit("MAKE, it red")
    real = "real edits need real weights, as in --model jdopensource/JoyAI-Image-Edit-Diffusers"
    known = "joyimage knows only drawn things: expect little of"
    assert edit("Make a cat rouge.") == [f"{known} 'cat', 'rouge'; {real}"]
    say("joyimage", {"world": {**WORLD, "psnr": 60}})
    assert edit("Make it red.") == [f"{known} this photograph; {real}"]
    assert edit("Make it übel.") == [f"{known} this photograph and of 'übel'; {real}"]
    lacking = "joyimage was made to edit drawn things, and cannot make a picture from text alone"
    assert lines("generate", "red") == [f"{lacking}: for that it takes {real.partition(' need ')[2]}"]
    assert run("edit", "photo.png", "cat", "-m", "joyimage", "--steps", 1, "-o", "q.png", "-q")[2] == ""
    say("joyimage", {})
    assert edit("Make a cat rouge.") == []
    say("diffedit", {"world": {**WORLD, "psnr": 60}})
    captions = ("edit", "photo.png", "--source", "a cat", "--target", "a red dog")
    (line,) = lines(*captions[:-1], "a red dog", model="diffedit")
    assert "expect little of this photograph and of 'cat', 'dog'; real" in line
    assert line.endswith("--model stable-diffusion-v1-5/stable-diffusion-v1-5")
    say("chronoedit", {"basesize": 48, "world": {**WORLD, "psnr": 60}})
    (line,) = lines("edit", "photo.png", "Make it red.", model="chronoedit")
    assert line.endswith(
        "this photograph; real edits need real weights, as in --model nvidia/ChronoEdit-14B-Diffusers"
    )


@pytest.mark.parametrize("name", [*MODELS, "chronoedit"])
def test_the_round_trip_is_that_of_the_autoencoder(desk, name):
    """A decoder that knows nothing shows grey; its PSNR is that of the picture's own spread."""
    pipe = joyedit.load(name, device="cpu", dtype="float32")
    for parameter in pipe.vae.decoder.parameters():
        parameter.data.zero_()
    flat, split = Image.new("RGB", (50, 35), (128, 128, 128)), Image.new("RGB", (48, 32))
    split.paste((255, 255, 255), (0, 0, 48, 16))
    assert round_trip(pipe, flat) > 40
    assert abs(round_trip(pipe, split) - 6.0206) < 0.01


def test_it_survives_loading_and_saving(desk, run):
    said = {**SAID, "world": {**WORLD, "later": 1}, "basesize": 48, "later": [2]}
    say("joyimage", said)
    pipe = joyedit.load("joyimage", device="cpu")
    assert pipe.made_for == MadeFor.from_dict(said) and pipe.made_for.to_dict() == said
    pipe.save_pretrained("again")
    assert json.loads(Path("again/model_index.json").read_text())["made_for"] == said
    assert run("convert", "again", "converted", "-q")[0] == 0
    assert layouts.read_made_for("converted") == MadeFor.from_dict(said)
    lines = info.describe("converted").lines()
    assert "made for: drawn things" in lines and "basesize: 48" in lines
    assert "made_for" in run("convert", "again", "original", "--to", "original")[2]
    assert joyedit.load("diffedit", device="cpu").made_for == MadeFor()
    assert layouts.read_made_for("diffedit") == MadeFor()
    assert layouts.read_made_for("diffedit/unet/diffusion_pytorch_model.safetensors") == MadeFor()


def test_diffusers_opens_such_a_folder(desk):
    import diffusers

    say("diffedit", {**SAID, "basesize": 48})
    pipe = diffusers.StableDiffusionDiffEditPipeline.from_pretrained("diffedit")
    assert pipe.unet.config.cross_attention_dim == 32


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([1], "made_for is damaged: [1]"),
        ({"call": 3}, "made_for is damaged"),
        ({"call": {"prompt": "x"}}, "call has prompt='x'"),
        ({"call": {"num_inference_steps": "2"}}, "call has num_inference_steps='2'"),
        ({"call": {"num_inference_steps": True}}, "call has num_inference_steps=True"),
        ({"call": {"composite": 1}}, "call has composite=1"),
        ({"basesize": 0}, "basesize=0 is no number of pixels"),
        ({"basesize": 9.5}, "basesize=9.5"),
        ({"world": {"about": "x"}}, "world is damaged"),
        ({"world": "x"}, "world is damaged"),
    ],
)
def test_a_damaged_entry_is_one_line_before_work(desk, run, no_work, said, message):
    say("joyimage", said)
    status, out, err = run("edit", "photo.png", "x", "-m", "joyimage")
    assert (status, out) == (1, "") and err.count("\n") == 1
    wanted = f"joyimage/model_index.json: {'' if 'made_for' in message else 'made_for: '}{message}"
    assert wanted in err
    with pytest.raises(ValueError, match=re.escape(wanted)):
        joyedit.JoyImageEditPipeline.from_pretrained("joyimage")


def test_words():
    assert words_of("Make the Red circle's box, 3 times: ÜBEL.") == [
        *("make", "the", "red", "circle", "s", "box", "3", "times", "übel"),
    ]
    world = World("", frozenset({"a", "cat"}), 0.0)
    assert world.unknown(["A dog, a cat", "a dog and"]) == ["dog", "and"]


def test_a_world_learns_words():
    world = World.from_dict(WORLD)
    assert world.unknown(["Tint it red", "Make it sepia"]) == ["tint", "sepia"]
    taught = MadeFor(world=world).taught(["Tint it sepia."]).world
    assert taught is not None and taught.unknown(["Tint it red", "Make it sepia"]) == []
    assert taught.words == ("a", "make", "it", "red", "tint", "sepia") and taught.psnr == world.psnr
    assert MadeFor().taught(["Tint it sepia."]) == MadeFor()
