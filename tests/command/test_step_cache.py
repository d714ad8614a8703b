"""`--step-cache` on the command line: what it says, records and repeats, and what it refuses."""

import numpy as np
import pytest
from PIL import Image

from joyedit.command import cli
from joyedit.media import images


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save("photo.png")
    Image.new("L", (64, 64), 255).save("white.png")
    return "photo.png"


# What is said, and of how many steps each run is.
EDITS = {
    "instruction": (("Make it red", "--guidance-scale", 2), 5),
    "film": (("Make it red", "-m", "tiny-chronoedit"), 5),
    "captions": (("--source", "a", "--target", "b", "--inpaint-strength", 1, "--mask", "white.png"), 10),
}


@pytest.mark.slow
@pytest.mark.parametrize(("words", "steps"), EDITS.values(), ids=EDITS)
def test_it_says_what_was_computed_records_it_and_repeats_it(words, steps, photo, run):
    words = ("edit", photo, *words, "--steps", 5, "--seed", 1, "-o")
    assert "step" not in run(*words, "exact.png")[2].replace("steps/s", "").replace("denoising", "")
    status, out, err = run(*words, "near.png", "--step-cache", 1e6)
    assert (status, out) == (0, "near.png\n")
    assert f"--step-cache 1e+06: {4 if steps == 10 else 2} of {steps} steps were computed" in err
    exact, near = images.read_metadata("exact.png"), images.read_metadata("near.png")
    assert "step_cache" not in exact and near == exact | {"step_cache": 1e6}
    assert (np.asarray(Image.open("near.png")) != np.asarray(Image.open("exact.png"))).any()
    status, _, err = run("edit", photo, "--config-from", "near.png", "-o", "again.png")
    assert status == 0 and f"of {steps} steps were computed" in err
    with open("near.png", "rb") as one, open("again.png", "rb") as other:
        assert one.read() == other.read()
    assert run("edit", photo, "--config-from", "near.png", "--step-cache", 0, "-o", "off.png", "-q")[0] == 0
    assert (np.asarray(Image.open("off.png")) == np.asarray(Image.open("exact.png"))).all()


def test_several_seeds_and_generate(photo, run):
    status, _, err = run("generate", "a red circle", "--steps", 4, "--num-images", 2, "--step-cache", 1e6)
    assert status == 0 and err.count("2 of 4 steps were computed") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--step-cache -0.1", "--step-cache: -0.1 is below 0"),
        ("--step-cache nan", "--step-cache: nan is not finite"),
        ("--step-cache inf", "--step-cache: inf is not finite"),
        ("--step-cache often", "--step-cache: 'often' is not a number"),
        (
            "--step-cache 0.1 --graphs",
            "--graphs does not go with --step-cache 0.1: a graph repeats what it recorded",
        ),
    ],
)
def test_what_is_refused(words, message, photo, no_work, capsys, monkeypatch):
    monkeypatch.setattr("joyedit.command.arguments.has_graphs", lambda: True)
    with pytest.raises(SystemExit) as ended:
        cli.main(["edit", photo, "x", *words.split()])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("value", [-0.5, "0.1", True])
def test_a_record_that_is_damaged_is_refused(value, photo, run, no_work):
    images.save_png(Image.new("RGB", (8, 8)), "bad.png", {"prompt": "x", "step_cache": value})
    status, out, err = run("edit", photo, "--config-from", "bad.png", "-q")
    assert (status, out) == (1, "") and "step_cache" in err
