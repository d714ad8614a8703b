"""`--preview FILE`: a picture of what a run is heading for, written anew at every step."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from joyedit.command import cli
from joyedit.media import images
from joyedit.pipelines.previews import Preview

DEMO = Path(images.__file__).parents[1] / "assets" / "demo"
CAPTIONS = (
    "--source",
    "a red circle on a white background",
    "--target",
    "a blue circle on a white background",
)
WORDS = {
    "joyimage": ("Make the circle red.",),
    "chronoedit": ("Make the circle red.", "--model", "tiny-chronoedit"),
    "diffedit": (*CAPTIONS, "--num-maps-per-mask", 1),
}


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEMO / "joyimage-recolour.png", "a.png")
    shutil.copy(DEMO / "diffedit-1.png", "b.png")
    return tmp_path


@pytest.fixture
def steps(monkeypatch):
    """The content of the file after every step."""
    found = []
    step = Preview.callback_fn

    def keep(preview, *args):
        returned = step(preview, *args)
        found.append(preview.file.read_bytes())
        return returned

    monkeypatch.setattr(Preview, "callback_fn", keep)
    return found


def pixels(name):
    return np.asarray(Image.open(name).convert("RGB"))


@pytest.mark.parametrize(
    "system",
    ["joyimage", *(pytest.param(name, marks=pytest.mark.slow) for name in ("diffedit", "chronoedit"))],
)
def test_the_result_is_the_same_and_the_preview_stays(system, run, steps):
    photo = "b.png" if system == "diffedit" else "a.png"
    words = ("edit", photo, *WORDS[system], "--seed", 1, "--steps", 3, "-q")
    assert run(*words, "-o", "alone.png") == (0, "alone.png\n", "")
    assert run(*words, "-o", "out.png", "--preview", "now.png") == (0, "out.png\n", "")
    assert len(steps) == (2 if system == "diffedit" else 3) and len(set(steps)) == len(steps)
    assert Path("now.png").read_bytes() == steps[-1]
    assert np.array_equal(pixels("out.png"), pixels("alone.png"))
    assert pixels("now.png").shape == pixels("out.png").shape
    assert np.abs(pixels("now.png").astype(int) - pixels("out.png")).mean() < 12
    recorded = images.read_metadata("out.png")
    assert recorded.pop("preview") == "now.png"
    assert recorded == images.read_metadata("alone.png")


def test_repeating_an_image_writes_no_preview(run):
    words = ("edit", "a.png", *WORDS["joyimage"], "--seed", 1, "--steps", 1, "-q")
    assert run(*words, "-o", "out.png", "--preview", "sub/now.jpg")[0] == 0
    assert images.read_metadata("out.png")["preview"] == "now.jpg"
    Path("sub/now.jpg").write_bytes(b"another thing by now")
    assert run("edit", "a.png", "--config-from", "out.png", "-o", "again.png", "-q")[0] == 0
    assert Path("sub/now.jpg").read_bytes() == b"another thing by now"
    assert np.array_equal(pixels("again.png"), pixels("out.png"))
    assert "preview" not in images.read_metadata("again.png")


def test_one_file_for_all_photographs_and_images(run, steps):
    words = ("edit", "a.png", "b.png", *WORDS["joyimage"], "--num-images", 2, "--steps", 1, "-q")
    assert run(*words, "--preview", "now.png")[0] == 0
    assert len(steps) == 2 and len(set(steps)) == 2
    assert Image.open("now.png").size == (2 * 96, 96)


def wrong(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main(["edit", "a.png", "Make it red.", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ("now.gif", "now", ".png", "folder"))
def test_a_name_that_no_preview_has_is_refused_at_once(name, capsys, no_work):
    Path("folder").mkdir()
    said = wrong(capsys, "--preview", name)
    assert "argument --preview: " in said and "in .png, .jpg, .jpeg, .webp" in said


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("-o", "out.png", "--preview", "./out.png"), "two results would be written to one file: out.png"),
        (("-o", "out.png", "--preview", "b.png"), "b.png exists: pass --force to replace it"),
        (("-o", "out.png", "--preview", "folder.png"), "folder.png is a folder"),
        (("-o", "out.png", "--preview", "b.png/now.png"), "cannot be written: .*b.png is no folder"),
        (("--video", "way", "--preview", "way/now.png"), "way/now.png would lie among the frames in way"),
    ],
)
def test_a_file_that_cannot_be_is_refused_before_work(words, reason, run, no_work):
    Path("folder.png").mkdir()
    before = Path("b.png").read_bytes()
    status, out, said = run("edit", "a.png", "Make it red.", *words)
    assert (status, out) == (1, "")
    assert re.search(reason, said), said
    assert Path("b.png").read_bytes() == before


def test_force_replaces(run):
    words = ("edit", "a.png", *WORDS["joyimage"], "--steps", 1, "-o", "out.png", "-q")
    assert run(*words, "--preview", "b.png", "--force")[0] == 0
    assert pixels("b.png").shape == pixels("out.png").shape == (96, 96, 3)
