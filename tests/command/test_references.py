"""`joyedit edit PHOTO --reference FILE ...`: several pictures, what the result records of them, repeating."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.command import cli
from joyedit.command.references import MOST_REFERENCES
from joyedit.media import images
from joyedit.pipelines import joyimage_request

SIZE = ("--height", 32, "--width", 48)
QUICK = ("--steps", 1, "-q")


@pytest.fixture(scope="module")
def plus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "plus"
    write_random_checkpoint(folder, seed=4, dtype=torch.float32, plus=True)
    return folder


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ramp = Image.linear_gradient("L").convert("RGB")
    for name, size, turn in (("a.png", (96, 64), 0), ("b.png", (64, 96), 90), ("c.png", (70, 70), 180)):
        ramp.rotate(turn).resize(size).save(name)
    return tmp_path


def recorded(name):
    return images.read_metadata(name)


def facts(name):
    return {"name": name, "sha256": hashlib.sha256(Path(name).read_bytes()).hexdigest()}


def pixels(name):
    return np.asarray(Image.open(name))


def wrong(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_references_are_what_the_pipeline_gets(run, plus):
    words = ("edit", "a.png", "--reference", "b.png", "--reference", "c.png", "Combine them.", "--seed", 5)
    status, out, _ = run(*words, "--model", plus, *SIZE, *QUICK, "--num-images", 2)
    assert (status, out.split()) == (0, ["a-edit-5.png", "a-edit-6.png"])
    pipe = joyedit.load(plus, device="cpu")
    pictures = [Image.open(name).convert("RGB") for name in ("a.png", "b.png", "c.png")]
    for seed in (5, 6):
        (alone,) = pipe(
            pictures,
            "Combine them.",
            32,
            48,
            num_inference_steps=1,
            generator=torch.Generator().manual_seed(seed),
        ).images
        difference = np.abs(pixels(f"a-edit-{seed}.png").astype(int) - np.asarray(alone)).max()
        assert difference <= 1  # a batch of two is the same up to rounding
        found = recorded(f"a-edit-{seed}.png")
        assert found["input"] == facts("a.png")
        assert found["references"] == [facts("b.png"), facts("c.png")]
        assert (found["height"], found["width"], found["num_inference_steps"]) == (32, 48, 1)


def test_the_size_is_that_of_the_last(run, plus):
    assert run("edit", "a.png", "--reference", "b.png", "x", "--model", plus, *QUICK, "--seed", 1)[0] == 0
    height, width = joyedit.images.buckets(256)[0]
    height, width = images.nearest_bucket(96, 64, joyedit.images.buckets(256))
    assert Image.open("a-edit-1.png").size == (width, height) and height > width


@pytest.mark.slow
def test_without_a_photograph(run, plus):
    words = ("generate", "x", "--model", plus, *SIZE, *QUICK)
    assert run(*words, "--seed", 1)[0] == 0
    assert "references" not in recorded("generated-1.png")
    assert run(*words, "--seed", 2, "--reference", "b.png")[0] == 0
    assert recorded("generated-2.png")["references"] == [facts("b.png")]
    assert "input" not in recorded("generated-2.png")


@pytest.mark.slow
def test_one_photograph_is_a_reference_of_one(run, plus):
    status, _, _ = run("edit", "a.png", "c.png", "x", "--model", plus, *SIZE, *QUICK, "--seed", 1)
    assert status == 0 and Path("a-edit-1.png").is_file() and Path("c-edit-1.png").is_file()


def test_repeating_finds_the_references_by_name_and_content(run, plus, tmp_path):
    words = ("edit", "a.png", "--reference", "b.png", "Mix.", "--model", plus, *SIZE, *QUICK, "--seed", 3)
    assert run(*words)[0] == 0
    again = ("edit", "a.png", "--config-from", "a-edit-3.png", "-q", "--force", "-o", "again.png")
    assert run(*again)[0] == 0
    np.testing.assert_array_equal(pixels("again.png"), pixels("a-edit-3.png"))
    assert recorded("again.png")["references"] == [facts("b.png")]

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("b.png", "a-edit-3.png"):  # beside the result
        Path(name).rename(elsewhere / name)
    Image.new("RGB", (8, 8)).save("b.png")  # of that name, but another picture
    moved = (*again[:3], elsewhere / "a-edit-3.png", *again[4:])
    assert run(*moved)[0] == 0
    np.testing.assert_array_equal(pixels("again.png"), pixels(elsewhere / "a-edit-3.png"))

    (elsewhere / "b.png").unlink()
    status, out, err = run(*moved)
    assert (status, out) == (1, "") and "was made with the reference b.png, and no such file" in err
    assert run(*moved, "--reference", "c.png")[0] == 0  # said on the command line
    assert recorded("again.png")["references"] == [facts("c.png")]
    assert run(*moved, "--model", "tiny-joyimage")[0] == 0  # which takes none
    assert "references" not in recorded("again.png")


@pytest.mark.parametrize("damage", [3, [], ["b.png"], [{"name": 3}], [{"name": "b.png"}]], ids=str)
def test_damaged_records(run, plus, no_work, damage):
    metadata = {"prompt": "x", "model": str(plus), "references": damage, "input": facts("a.png")}
    images.save_png(Image.new("RGB", (8, 8)), "made.png", metadata)
    status, _, err = run("edit", "a.png", "--config-from", "made.png")
    assert status == 1 and "made.png: the recorded reference" in err and "damaged" in err, err


def test_a_record_of_too_many(run, plus, no_work):
    metadata = {
        "prompt": "x",
        "model": str(plus),
        "references": [facts("b.png")] * 6,
        "input": facts("a.png"),
    }
    images.save_png(Image.new("RGB", (8, 8)), "made.png", metadata)
    status, _, err = run("edit", "a.png", "--config-from", "made.png")
    assert status == 1 and "7 pictures" in err


def test_a_recorded_name_leads_nowhere_else(run, plus, tmp_path, no_work, monkeypatch):
    inside = tmp_path / "inside"
    inside.mkdir()
    outside = {**facts("b.png"), "name": "../b.png"}
    metadata = {"prompt": "x", "model": str(plus), "references": [outside], "input": facts("a.png")}
    images.save_png(Image.new("RGB", (8, 8)), inside / "made.png", metadata)
    Path("a.png").rename(inside / "a.png")
    monkeypatch.chdir(inside)
    assert Path("../b.png").is_file()
    status, _, err = run("edit", "a.png", "--config-from", "made.png")
    assert status == 1 and "no such file" in err


REFERENCE = ("--reference", "b.png")


def test_what_is_wrong_by_itself(capsys, plus, no_work):
    said = wrong(capsys, "edit", "a.png", "x", *REFERENCE)
    assert "name its checkpoint, as in --model jdopensource/JoyAI-Image-Edit-Plus-Diffusers" in said
    said = wrong(capsys, "edit", "a.png", "x", *(REFERENCE * 6), "--model", plus)
    assert "7 pictures" in said and "at most 6" in said
    said = wrong(capsys, "edit", "a.png", "--source", "x", "--target", "y", *REFERENCE)
    assert "--reference goes with an instruction" in said
    for size in (24, 40):
        said = wrong(
            capsys, "edit", "a.png", "x", *REFERENCE, "--model", plus, "--height", size, "--width", 64
        )
        assert f"{size} is not a multiple of 16" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reference", "nothing.png", "--model", "{plus}"), "'nothing.png' does not exist"),
        (("--reference", "notes.txt", "--model", "{plus}"), "notes.txt"),
        (("--reference", ".", "--model", "{plus}"), "is a folder"),
        ((*REFERENCE, "--model", "tiny-joyimage"), "tiny-joyimage takes one picture: --reference is for"),
        ((*REFERENCE, "--model", "tiny-chronoedit"), "tiny-chronoedit takes one picture: --reference is for"),
        (
            (*REFERENCE, "--preset", "distill", "--model", "{plus}"),
            "makes no film: --preset is for ChronoEdit",
        ),
    ],
)
def test_what_is_refused_before_work(run, plus, no_work, words, message):
    Path("notes.txt").write_text("no picture")
    words = [word.format(plus=plus) for word in words]
    status, out, err = run("edit", "a.png", "x", *words)
    assert (status, out) == (1, "") and message in err


def test_a_stripe_is_refused_before_the_first_run(run, plus, monkeypatch):
    monkeypatch.setattr(joyedit.JoyImageEditPlusPipeline, "__call__", lambda *a, **k: pytest.fail("a run"))
    Image.new("RGB", (4000, 2)).save("stripe.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    status, _, err = run("edit", "a.png", "x", "--reference", "stripe.png", "--model", plus)
    assert status == 1 and "too narrow" in err


def test_info_says_what_it_is(run, plus):
    status, out, _ = run("info", plus, "--json")
    said = json.loads(out)
    assert (status, said["pipeline"]) == (0, "JoyImageEditPlusPipeline")
    assert said["parts"]["transformer"]["class_name"] == "JoyImageEditPlusTransformer3DModel"
    assert said["parts"]["transformer"]["config"]["hidden_size"] == 64


def test_as_many_as_the_pipeline_takes():
    assert joyimage_request.MOST_REFERENCES == MOST_REFERENCES
