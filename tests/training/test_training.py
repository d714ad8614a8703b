"""`joyedit train` from its command to what it leaves, on the small models that ship with the package.

The pictures are plain: circles that turn from red to blue. What is tested is the loop, not what is learned.
"""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open

import joyedit
from joyedit.command.cli import main
from joyedit.loading.layouts import ASSETS
from joyedit.pipelines.chronoedit_frames import FrameCoder
from joyedit.training import loop
from joyedit.training.cache import Cache
from joyedit.training.first_pass import encode, kept_of
from joyedit.training.models import open_encoders
from joyedit.training.plan import make_plan
from joyedit.training.settings import Settings
from joyedit.training.systems import Drawing

MODELS = ("tiny-joyimage", "tiny-chronoedit", "tiny-diffedit")


def circle(color, size, at):
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).ellipse((*at, at[0] + 30, at[1] + 30), fill=color)
    return image


@pytest.fixture(scope="module")
def circles(tmp_path_factory):
    """Five pairs and two to validate on; one is wide, one has a mask."""
    root, draw = tmp_path_factory.mktemp("circles"), random.Random(0)
    for place, count in ((root, 5), (root / "valid", 2)):
        for name in ("target", "control"):
            (place / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            size, at = (140 if i == 3 else 96, 96), (draw.randrange(60), draw.randrange(60))
            circle("red", size, at).save(place / "control" / f"{i}.png")
            circle("blue", size, at).save(place / "target" / f"{i}.png")
            words = ("Make the red circle blue.", "Paint the circle blue.")[i % 2]
            (place / "target" / f"{i}.txt").write_text(words)
    (root / "mask").mkdir()
    mask = Image.new("L", (96, 96))
    mask.paste(255, (20, 20, 60, 60))
    mask.save(root / "mask" / "1.png")
    return root


def settings(data, model="tiny-joyimage", **changes):
    quick = {
        "steps": 5,
        "batch": 2,
        "rank": 4,
        "sample_every": 0,
        "valid_every": 3,
        "save_every": 2,
        "lr": 1e-3,
    }
    return Settings(data=str(data), model=model, device="cpu", **{**quick, **changes})


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def command(*words):
    return main(["train", *map(str, words)])


def contents(out):
    """All that a run leaves that the next step depends on, or that is what it is for."""
    state = torch.load(out / "state.pt", weights_only=True)
    tensors = []

    def walk(value):
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                walk(value[key])
        elif isinstance(value, list):
            for one in value:
                walk(one)
        else:
            tensors.append(torch.tensor(value if isinstance(value, (int, float)) else 0.0))

    walk(state)
    made = (out / "lora.safetensors").read_bytes()
    return tensors, made, (out / "metrics.jsonl").read_text()


KILLED = """
import os, signal, sys
from joyedit.training import run
from joyedit.command.cli import main

plain, number, step = run.Run.log, getattr(signal, sys.argv[1]), int(sys.argv[2])

def log(self, **values):
    plain(self, **values)
    if self.step == step and "loss" in values:
        os.kill(os.getpid(), number)

run.Run.log = log
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.slow
def test_interrupted_and_continued_equals_uninterrupted(tmp_path, circles):
    """Bit by bit: weights, average, optimiser, random state, adapter and metrics; after a SIGTERM, which
    saves, and after a SIGKILL, which does not."""
    words = [circles, "--model", "tiny-joyimage", "--device", "cpu", "--steps", "5", "--batch", "2"]
    words += ["--rank", "4", "--sample-every", "0", "--valid-every", "3", "--save-every", "2", "--ema", "0.9"]
    words += ["--lr", "1e-3", "--dropout", "0.3", "-q", "--out"]
    assert command(*words, tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole" / "cache", tmp_path / "cut" / "cache")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for name, step, status in (("SIGTERM", 3, 128 + 15), ("SIGKILL", 5, -9)):
        script = [sys.executable, "-c", KILLED, name, str(step), "train", *map(str, words), tmp_path / "cut"]
        done = subprocess.run(
            script, env=environment, cwd=Path(joyedit.__file__).parents[1], capture_output=True
        )
        assert done.returncode == status, done.stderr.decode()
        saved = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)["step"]
        assert saved == {"SIGTERM": 3, "SIGKILL": 4}[name]
    assert len(metrics(tmp_path / "cut")) == 5 + 2 * 5  # five losses, and validations at 0 and 3
    assert command(*words, tmp_path / "cut") == 0
    (tensors, made, lines), (others, made_too, lines_too) = map(
        contents, (tmp_path / "whole", tmp_path / "cut")
    )
    assert len(tensors) == len(others) and all(map(torch.equal, tensors, others))
    assert made == made_too and lines == lines_too


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_run_of_each_system(tmp_path, circles, model, monkeypatch):
    """Validation from before the first to after the last step, a picture beside the base model's, a file that
    loads, and nothing to do when the command is given again."""
    monkeypatch.setattr(loop, "SAMPLED", 1)
    options = {"model": model, "steps": 3, "sample_every": 3, "valid_every": 2}
    made = loop.train(settings(circles, **options), tmp_path, disable_progress=True)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    levels = [(line["step"], line["sigma"]) for line in lines if "sigma" in line]
    assert levels == [(step, sigma) for step in (0, 2, 3) for sigma in (0.9, 0.7, 0.5, 0.3, 0.1)]
    assert all(0 < line.get("loss", line.get("valid_loss")) < 10 for line in lines)
    shown = Image.open(tmp_path / "samples" / "000003.png")
    assert shown.height > 96 and (tmp_path / "samples" / "base-0.png").is_file()
    pipe = joyedit.load(model, device="cpu")
    assert made == tmp_path / "lora.safetensors"
    pipe.load_lora_weights(made)
    with safe_open(made, "pt") as file:
        assert file.metadata()["joyedit.base"].startswith(f"{model} ")
        prefix = "lora_unet_" if model == "tiny-diffedit" else "diffusion_model."
        assert all(name.startswith(prefix) for name in file.keys())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "run.toml"}
    loop.train(settings(circles, **options), tmp_path, disable_progress=True)
    assert {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "run.toml"
    } == before


@pytest.mark.slow
def test_all_weights_and_a_checkpoint_that_loads(tmp_path, circles):
    """The checkpoint is replaced, holds what was trained, and knows the words. With accumulation the batch is
    the same."""
    data = shutil.copytree(circles, tmp_path / "data")
    (data / "target" / "1.txt").write_text("Tint the circle blue.")
    options = {
        "full": True,
        "checkpointing": False,
        "steps": 2,
        "save_every": 1,
        "valid_every": 0,
        "lr": 1e-4,
        "clip": 1e9,
    }
    made = loop.train(settings(data, **options), tmp_path / "a", disable_progress=True)
    assert made == tmp_path / "a" / "checkpoint"
    pipe, base = (joyedit.load(name, device="cpu") for name in (made, "tiny-joyimage"))
    state = torch.load(tmp_path / "a" / "state.pt", weights_only=True)["parameters"]
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, state[f"transformer.{name}"].to(tensor.dtype))
    changed = [
        not torch.equal(*pair)
        for pair in zip(
            pipe.transformer.state_dict().values(), base.transformer.state_dict().values(), strict=True
        )
    ]
    assert sum(changed) > len(changed) / 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            pipe.text_encoder.state_dict().values(), base.text_encoder.state_dict().values(), strict=True
        )
    )
    assert pipe.buckets == base.buckets and pipe.made_for.call == base.made_for.call
    assert base.unknown_words(["Tint the star blue."]) and not pipe.unknown_words(["Tint the star blue."])
    shutil.copytree(tmp_path / "a" / "cache", tmp_path / "b" / "cache")
    loop.train(settings(data, accumulate=2, **options), tmp_path / "b", disable_progress=True)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    states = [
        torch.load(tmp_path / name / "state.pt", weights_only=True)["optimizer"]["state"] for name in "ab"
    ]
    for one, other in zip(*(state.values() for state in states), strict=True):
        scale = one["exp_avg"].abs().max().item()
        assert torch.allclose(one["exp_avg"], other["exp_avg"], atol=1e-3 * scale)


@pytest.mark.slow
def test_pictures_stay_where_they_are_through_the_cache(tmp_path):
    """Control and target of odd sizes, encoded, kept, read and decoded: their lines are within half a pixel
    of each other."""
    from tests.training.test_pairs import centres, crossed, text

    draw = random.Random(2)
    for i in range(30):
        height, width = draw.randrange(101, 300, 2), draw.randrange(101, 300, 2)
        factor = (1, 0.7, 1.4)[i % 3]
        for name, scale in (("target", 1), ("control", factor)):
            path = tmp_path / name / f"{i}.png"
            path.parent.mkdir(exist_ok=True)
            crossed(round(height * scale), round(width * scale)).save(path)
        text(tmp_path / "target" / f"{i}.txt", "Make it blue.")
    given = settings(tmp_path, basesize=(96,))
    plan, faults = make_plan(given, tmp_path / "cache")
    assert not faults and len(plan.examples) == 30
    cache, pipe = Cache(tmp_path / "cache"), open_encoders(given, plan, torch.device("cpu"))
    for example in plan.examples:
        with torch.no_grad():
            encode(cache, example, plan.system, pipe)
            kept, _ = kept_of(cache, example)
            latents = torch.stack([kept["target_mean"], kept["reference_0_mean"]])
            pixels = pipe.vae.decode(pipe.denormalize_latents(latents)).sample[:, :, 0]
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(1, -1).numpy()
        bright = np.maximum(levels.astype(int) - 40, 0).astype(np.uint8)  # above what the ground has of noise
        places = [centres(Image.fromarray(one)) for one in bright]
        assert np.abs(np.subtract(*places)).max() < 0.5, (example.pair.name, example.bucket)


@pytest.mark.slow
def test_the_cache_is_named_by_content_alone(tmp_path, circles):
    """Moved files find what was made of them; another picture, word, size or autoencoder does not; a cut-off
    file is made again."""
    given = settings(circles)
    plan, _ = make_plan(given, tmp_path / "cache")
    names = [example.names for example in plan.examples]
    shutil.copytree(circles, tmp_path / "moved")
    moved, _ = make_plan(settings(tmp_path / "moved"), tmp_path / "cache")
    assert [example.names for example in moved.examples] == names
    (tmp_path / "moved" / "target" / "0.txt").write_text("Erase it.")
    circle("green", (96, 96), (9, 9)).save(tmp_path / "moved" / "control" / "2.png")
    moved, _ = make_plan(settings(tmp_path / "moved"), tmp_path / "cache")
    differs = [[a != b for a, b in zip(one.names, other, strict=True)]
               for one, other in zip(moved.examples, names, strict=True)]  # fmt: skip
    assert differs == [[False, True, False], [False] * 3, [True] * 3, [False] * 3, [False] * 3]
    larger, _ = make_plan(settings(circles, basesize=(96, 128)), tmp_path / "cache")
    assert len(larger.examples) == 2 * len(names)
    assert len({example.pictures for example in larger.examples}) == 2 * len(names)

    cache, pipe = Cache(tmp_path / "cache"), open_encoders(given, plan, torch.device("cpu"))
    with torch.no_grad():
        encode(cache, plan.examples[1], plan.system, pipe)
    kept, said = kept_of(cache, plan.examples[1])
    assert kept["weight"].shape == (1, 1, 12, 12) and kept["weight"].mean() == pytest.approx((40 / 96) ** 2)
    assert said.words.shape[1] == said.blank.shape[1] and not torch.equal(said.words[:5], said.words[5:10])
    path = tmp_path / "cache" / f"{plan.examples[1].words}.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert plan.examples[1].words not in cache and plan.examples[1].pictures in cache


def without_weights(name, place):
    shutil.copytree(ASSETS / name, place, ignore=shutil.ignore_patterns("*.safetensors"))
    return place


@pytest.mark.slow
def test_check_needs_no_weights(tmp_path, circles, capsys):
    """It prints the contact sheet's place, and says buckets and memory."""
    model = without_weights("tiny-joyimage", tmp_path / "model")
    words = [circles, "--model", model, "--out", tmp_path / "run", "--check"]
    assert command(*words) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "run" / "contact-sheet.png")
    assert "5 examples to train on, 2 to validate on" in said.err and "96 x 96: 5" in said.err
    assert "second pass:" in said.err
    with Image.open(said.out.strip()) as sheet:
        assert sheet.width > 4 * 160 and np.asarray(sheet).std() > 10


@pytest.mark.slow
def test_faulty_sets_are_refused_before_anything_is_read(tmp_path, circles, capsys):
    """Every faulty pair by name, with and without --check."""
    data = shutil.copytree(circles, tmp_path / "data")
    (data / "control" / "0.png").unlink()
    (data / "target" / "1.txt").write_text("")
    (data / "valid" / "target" / "1.png").write_bytes(b"no picture")
    model = without_weights("tiny-joyimage", tmp_path / "model")
    for more in ((), ("--check",)):
        words = [data, "--model", model, "--out", tmp_path / "run", *more]
        assert command(*words) == 1
        said = capsys.readouterr().err
        for name in ("0: target/0.png has no control", "1: the caption", "valid/1: image"):
            assert name in said
    assert not (tmp_path / "run" / "state.pt").exists()


def test_wrong_options_are_two(tmp_path, circles, capsys):
    for words, said in (
        ([circles, "--out", tmp_path], "--model is missing"),
        (["--out", tmp_path, "--model", "tiny-joyimage"], "DATA is missing"),
        ([circles, "--model", "tiny-joyimage", "--out", tmp_path, "--rank", "0"], "rank"),
        (
            [circles, "--model", "tiny-joyimage", "--out", tmp_path, "--batch", "3", "--accumulate", "2"],
            "accumulate",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            command(*words)
        assert ended.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.slow
def test_targets_that_match_nothing(tmp_path, circles, capsys):
    words = [
        circles,
        "--model",
        "tiny-joyimage",
        "--out",
        tmp_path,
        "--no-checkpointing",
        "--targets",
        "mlpp",
    ]
    assert command(*words, "--check") == 1
    assert "mlpp" in capsys.readouterr().err


def test_settings_of_another_run(tmp_path, monkeypatch, capsys):
    """--config takes them, and what is said goes first."""
    taken = []
    monkeypatch.setattr(loop, "train", lambda given, out, *_: taken.append(given) or tmp_path)
    before = settings("pairs", rank=7, basesize=(96, 128), trigger="in my way")
    (tmp_path / "run.toml").write_text(before.to_toml({"model": "abc"}))
    assert command("--config", tmp_path / "run.toml", "--out", tmp_path, "--rank", "8", "--full") == 0
    assert taken == [dataclasses.replace(before, rank=8, full=True)]
    capsys.readouterr()


def test_settings_that_exclude_each_other():
    with pytest.raises(ValueError, match="memory='4G': all weights stay"):
        settings("pairs", memory="4G", full=True)
    with pytest.raises(ValueError, match="memory='4G': blocks come again"):
        settings("pairs", memory="4G", checkpointing=False)


@pytest.mark.slow
def test_clips_are_films_with_the_way(tmp_path):
    """A clip of nine frames that brighten: three latent frames, of which the last follows the first, as it is
    decoded; the photograph alone is known. Half of the samples are the ends."""
    (tmp_path / "target").mkdir()
    frames = [Image.new("RGB", (96, 96), (25 * i, 0, 0)) for i in range(10)]
    joyedit.export_to_video(frames, tmp_path / "target" / "a.mp4")
    (tmp_path / "target" / "a.txt").write_text("Make it red.")
    given = settings(tmp_path, "tiny-chronoedit", frames=9)
    plan, faults = make_plan(given, tmp_path / "cache")
    assert not faults
    pipe, cache = open_encoders(given, plan, torch.device("cpu")), Cache(tmp_path / "cache")
    with torch.no_grad():
        encode(cache, plan.examples[0], plan.system, pipe)
        kept, said = kept_of(cache, plan.examples[0])
        film = FrameCoder(pipe.vae).decode(kept["target_mean"][None])
    assert kept["target_mean"].shape == kept["target_std"].shape == (16, 3, 12, 12)
    assert torch.equal(kept["condition"][:4].mean((2, 3)), torch.tensor([[1.0, 0, 0]] * 4))
    red = (film[0, 0].mean((1, 2)) + 1) * 127.5
    # Six of the ten frames: the way is 0, 2, 4, 5, 7, and the edit 9.
    assert film.shape[2] == 9 and torch.allclose(red[[0, 4, -1]], torch.tensor([0.0, 175, 225]), atol=10)
    draws = [plan.system.draw(kept, said.words, Drawing(), loop.generator(i)) for i in range(40)]
    whole = sum(sample.latents.shape[1] == 3 for sample in draws)
    assert 8 < whole < 32 and all(s.given["condition"].shape[1] == s.noise.shape[1] for s in draws)


@pytest.mark.slow
def test_several_references_keep_their_shapes(tmp_path):
    """Of Plus: each in its bucket, the mean of its posterior; of a prompt that says nothing, the blank."""
    plus = shutil.copytree(ASSETS / "tiny-joyimage", tmp_path / "plus")
    index = json.loads((plus / "model_index.json").read_text())
    (plus / "model_index.json").write_text(json.dumps({**index, "_class_name": "JoyImageEditPlusPipeline"}))
    for name in ("target", "control"):
        (tmp_path / name).mkdir()
    circle("blue", (96, 96), (9, 9)).save(tmp_path / "target" / "a.png")
    (tmp_path / "target" / "a.txt").write_text("Make it blue.")
    for i, size in enumerate([(96, 96), (96, 160)]):
        circle("red", size, (9, 9)).save(tmp_path / "control" / f"a_{i}.png")
    refused, faults = make_plan(settings(tmp_path), tmp_path / "cache")
    assert not refused.examples and "Edit-Plus takes" in faults[0].reason
    given = settings(tmp_path, str(plus), basesize=(96,))
    plan, faults = make_plan(given, tmp_path / "cache")
    assert not faults and plan.system.blank == " "
    pipe, cache = open_encoders(given, plan, torch.device("cpu")), Cache(tmp_path / "cache")
    with torch.no_grad():
        encode(cache, plan.examples[0], plan.system, pipe)
    kept, said = kept_of(cache, plan.examples[0])
    assert kept["reference_0_mean"].shape == (16, 1, 12, 12) and "reference_0_std" not in kept
    height, width = kept["reference_1_mean"].shape[-2:]
    assert height > width and height * width <= 150
    sample = plan.system.draw(kept, said.words, Drawing(), loop.generator(0))
    assert torch.equal(sample.given["reference_1"], kept["reference_1_mean"])
    assert not torch.equal(sample.latents, kept["target_mean"])
