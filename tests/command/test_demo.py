"""`joyedit demo`: the page and the files behind it, and what is said of pictures that nobody drew."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from benchmarks.shapes import demo_scenes
from joyedit.checkpoints.json_files import read_json
from joyedit.command import demo
from joyedit.command.cli import main
from joyedit.loading import layouts
from joyedit.media import images
from joyedit.pipelines.made_for import round_trip

ROOT = Path(__file__).resolve().parents[2]
PLAN = read_json(demo.SCENES / "demo.json")
EDITS = [(system, edit) for system in demo.FILES for edit in PLAN[system]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `joyedit demo` wrote, run once."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "out"
    assert demo.run(folder) == folder / "demo.png"
    return folder


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def path_of(folder, system, edit, file):
    return folder / f"{system}-{edit['name']}-{file}"


def test_the_scenes_are_those_of_the_held_out_world(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_scenes, "FOLDER", tmp_path)
    demo_scenes.main()
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in demo.SCENES.iterdir()}
    assert read_json(tmp_path / "demo.json") == PLAN
    for path in tmp_path.glob("*.png"):
        assert np.array_equal(pixels(path), pixels(demo.SCENES / path.name))
        assert (demo.SCENES / path.name).stat().st_size < 5000


def test_what_is_shown():
    kinds = [edit["name"] for edit in PLAN["joyimage"]]
    assert len(set(kinds)) == len(kinds) >= 6 and {"recolour", "remove", "add", "move"} <= set(kinds)
    assert len(PLAN["diffedit"]) >= 2
    assert {edit.get("reasoning", False) for edit in PLAN["chronoedit"]} == {False, True}


@pytest.mark.slow
def test_files(folder):
    names = {path_of(folder, system, edit, file) for system, edit in EDITS for file in demo.FILES[system]}
    assert set(folder.iterdir()) == {*names, folder / "demo.png"}
    for system, edit in EDITS:
        given = path_of(folder, system, edit, "input.png")
        assert given.read_bytes() == (demo.SCENES / f"{system}-{edit['name']}.png").read_bytes()
        photo, result = pixels(given), pixels(path_of(folder, system, edit, "result.png"))
        assert photo.shape == result.shape and (photo != result).any()
        found = images.read_metadata(path_of(folder, system, edit, "result.png"))
        said = [edit[key] for key in ("instruction", "source", "target") if key in edit]
        assert [found[key] for key in ("prompt", "source_prompt", "target_prompt") if key in found] == said
        assert found["seed"] == edit["seed"] and found["model"] == f"tiny-{system}"
        assert found | layouts.read_made_for(found["model"]).call == found


def test_masks_and_films(folder):
    for edit in PLAN["diffedit"]:
        mask = Image.open(path_of(folder, "diffedit", edit, "mask.png"))
        levels = np.asarray(mask)
        assert mask.mode == "L" and set(np.unique(levels)) == {0, 255}
        assert levels.shape == pixels(path_of(folder, "diffedit", edit, "result.png")).shape[:2]
    for edit in PLAN["chronoedit"]:
        with Image.open(path_of(folder, "chronoedit", edit, "film.webp")) as opened:
            shown = [frame.convert("RGB").info["duration"] for frame in ImageSequence.Iterator(opened)]
        length = 29 if edit.get("reasoning") else 5
        assert sum(shown) == 125 * length  # equal frames in a row are one


def test_the_page_shows_every_picture(folder):
    page = Image.open(folder / "demo.png").convert("RGB")
    assert page.width == 1244 and 1200 < page.height < 2200
    levels = np.asarray(page).astype(int)
    for corner in (levels[:20], levels[-20:], levels[:, :20], levels[:, -20:]):
        assert (corner == 255).all()
    side = 192
    spots = [(i % 2 * (demo.WIDTH - 2 * side - 178), i // 2) for i in range(len(PLAN["joyimage"]))]
    for (x, row), edit in zip(spots, PLAN["joyimage"], strict=True):
        y = demo.MARGIN + 94 + row * (side + demo.ROW)
        for name, left in (("input", x), ("result", x + side + 178)):
            left += demo.MARGIN
            there = levels[y : y + side, left : left + side]
            picture = Image.open(path_of(folder, "joyimage", edit, f"{name}.png")).convert("RGB")
            wanted = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)).astype(int)
            assert np.array_equal(there[1:-1, 1:-1], wanted[1:-1, 1:-1])
        between = levels[y : y + side, x + demo.MARGIN + side + 1 : x + demo.MARGIN + side + 178 - 1]
        assert 100 < (between.min(-1) < 128).sum() < between[..., 0].size / 4, "the instruction"


@pytest.mark.slow
@pytest.mark.parametrize(("system", "edit"), EDITS)
def test_the_scenes_are_of_the_world_that_the_models_know(system, edit):
    world = layouts.read_made_for(f"tiny-{system}").world
    assert not world.unknown(edit[key] for key in ("instruction", "source", "target") if key in edit)
    pipe = layouts.load(f"tiny-{system}", device="cpu")
    with Image.open(demo.SCENES / f"{system}-{edit['name']}.png") as picture:
        assert round_trip(pipe, picture) > world.psnr


@pytest.mark.parametrize(
    "system", [pytest.param(s, marks=() if s == "joyimage" else pytest.mark.slow) for s in demo.FILES]
)
def test_an_edit_can_be_repeated_to_the_byte(folder, run, tmp_path, system):
    edit = PLAN[system][-1]
    given, result = (path_of(folder, system, edit, f"{name}.png") for name in ("input", "result"))
    again = tmp_path / "again.png"
    status, _, err = run("edit", given, "--config-from", result, "-o", again)
    assert status == 0 and "another photograph" not in err
    assert np.array_equal(pixels(again), pixels(result))
    (once,) = (made.results[-1 if system != "chronoedit" else 1] for made in [one_more(system, edit)])
    assert np.array_equal(np.asarray(once), pixels(result))


def one_more(system, edit):
    pipe = layouts.load(f"tiny-{system}", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return demo.EDITORS[system](pipe, edit)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """A demonstration of one edit, in the current folder."""
    monkeypatch.chdir(tmp_path)
    scenes = tmp_path / "scenes"
    shutil.copytree(demo.SCENES, scenes)
    plan = {"joyimage": PLAN["joyimage"][:1], "diffedit": [], "chronoedit": []}
    (scenes / "demo.json").write_text(json.dumps(plan))
    monkeypatch.setattr(demo, "SCENES", scenes)
    return [f"joyimage-{PLAN['joyimage'][0]['name']}-{file}" for file in demo.FILES["joyimage"]]


@pytest.mark.slow
def test_the_command_prints_where_the_picture_is(quick, run):
    status, out, err = run("demo")
    assert (status, out) == (0, f"{Path('joyedit-demo/demo.png')}\n") and "editing" not in err
    assert {path.name for path in Path("joyedit-demo").iterdir()} == {*quick, "demo.png"}
    before = Path("joyedit-demo/demo.png").read_bytes()
    assert run("demo", "--force", "-q")[2] == "" and Path("joyedit-demo/demo.png").read_bytes() == before
    assert "editing: 100%" in run("demo", "--out", "b/c", "-v")[2] and Path("b/c/demo.png").is_file()


@pytest.mark.slow
def test_the_bar_is_for_terminals(quick, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        assert main(["demo", "--out", f"out-{shown}"]) == 0
        assert ("editing: 100%" in stream.getvalue()) == shown


@pytest.mark.slow
def test_files_are_not_replaced_without_force(quick, run, monkeypatch):
    for name in (quick[1], "demo.png"):
        Path("out").mkdir()
        Path("out", name).write_text("mine")
        with monkeypatch.context() as patch:
            patch.setattr(demo, "load", None)
            status, out, err = run("demo", "--out", "out")
        assert (status, out) == (1, "") and f"{name} exists: pass --force" in err and err.count("\n") == 1
        assert [path.read_text() for path in Path("out").iterdir()] == ["mine"]
        Path("out", "notes.txt").write_text("mine")
        assert run("demo", "--out", "out", "--force", "-q")[0] == 0
        assert Path("out", "notes.txt").read_text() == "mine" and Image.open(Path("out", name)).size
        shutil.rmtree("out")
    Path("file").write_text("mine")
    status, _, err = run("demo", "--out", "file")
    assert status == 1 and "no folder that you may write to" in err


def test_ctrl_c_leaves_no_file(quick, run, monkeypatch):
    def interrupt(made):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "draw_page", interrupt)
    assert run("demo", "--out", "out")[0] == 130
    assert not list(Path("out").iterdir())


def test_texts_are_wrapped():
    lines = demo.wrapped("Move the red circle into the red box and finally remove the red box.", 17, 150)
    assert " ".join(lines).endswith("remove the red box.") and 3 < len(lines) < 7
    assert demo.wrapped("", 17, 150) == [""] and demo.wrapped("a " + "b" * 99, 17, 150) == ["a", "b" * 99]


@pytest.mark.parametrize("known", [True, False])
def test_a_photograph_and_other_words_are_edited_with_one_honest_line(run, tmp_path, known):
    add = next(edit for edit in PLAN["joyimage"] if edit["name"] == "add")
    given = demo.SCENES / "joyimage-add.png" if known else ROOT / "examples" / "coffee.jpg"
    text = add["instruction"] if known else "Make the coffee red."
    status, out, err = run("edit", given, text, "--seed", 1, "-o", tmp_path / "out.png")
    assert status == 0 and Image.open(out.strip()).size == (96, 96)
    honest = [line for line in err.splitlines() if line.startswith("tiny-joyimage knows only")]
    assert len(honest) == (not known)
    for line in honest:
        assert "such as 'Make the red circle blue.'" in line and "this photograph and of 'coffee'" in line
        assert line.endswith("--model jdopensource/JoyAI-Image-Edit-Diffusers")
