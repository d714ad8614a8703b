"""`joyedit edit` with spatial edits in place of an instruction."""

import json

import numpy as np
import pytest
from PIL import Image

import joyedit
from joyedit.command import cli
from joyedit.command.instruction import Instruction
from joyedit.media import images

MOVE = "Move the apple into the red box and finally remove the red box."


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The calls of edits, which take no time."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 96), "green").save("a.png")
    Image.new("RGB", (96, 96), "green").save("b.png")
    found = []

    def run(system, pipe, call, seeds, args):
        found.append(call)
        return [{"output": call["image"]} for _ in seeds]

    monkeypatch.setattr(Instruction, "run", run)
    return found


def edit(*words):
    return cli.main(["edit", *map(str, words), "-q"])


def boxed(picture) -> int:
    return int((np.asarray(picture) == (255, 0, 0)).all(-1).sum())


def test_move_draws_the_box_and_says_the_sentence(calls):
    assert edit("a.png", "b.png", "--move", "the apple", "--box", "0.25,0.25,0.5,0.5", "--seed", 1) == 0
    outline = 48 * 48 - 44 * 44
    assert [(call["prompt"], boxed(call["image"])) for call in calls] == [(MOVE, outline)] * 2
    recorded = images.read_metadata("a-edit-1.png")
    assert (recorded["prompt"], recorded["move"], recorded["box"]) == (MOVE, "the apple", "0.25,0.25,0.5,0.5")
    assert edit("a.png", "--config-from", "a-edit-1.png", "-o", "again.png") == 0
    assert calls[2]["prompt"] == MOVE and boxed(calls[2]["image"]) == outline
    assert edit("a.png", "Make it red.", "--config-from", "a-edit-1.png", "-o", "red.png") == 0
    assert calls[3]["prompt"] == "Make it red." and not boxed(calls[3]["image"])
    assert "move" not in images.read_metadata("red.png")


def test_rotate_and_camera_are_sentences(calls):
    assert edit("a.png", "--rotate", "car", "--view", "front left", "-o", "r.png") == 0
    assert edit("a.png", "--camera", "yaw=30,pitch=-10,zoom=in", "-o", "c.png") == 0
    assert edit("a.png", "--camera", "zoom=out", "--config-from", "r.png", "-o", "d.png") == 0
    first, second, third = (call["prompt"] for call in calls)
    assert first == joyedit.spatial.rotate("car", "front left")
    assert second == joyedit.spatial.camera(30, -10, "in")
    assert third == joyedit.spatial.camera(zoom="out")
    assert {"rotate", "view"} & images.read_metadata("d.png").keys() == set()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--move", "apple"], "--move and --box go together"),
        (["--box", "0,0,1,1"], "--move and --box go together"),
        (["--rotate", "car"], "--rotate and --view go together"),
        (["--rotate", "car", "--view", "top"], "must be one of front, right"),
        (["--camera", "yaw=a"], "yaw must be a number of degrees"),
        (["--camera", "roll=3"], "wanted yaw, pitch and zoom once each"),
        (["--camera", "zoom=near"], "must be one of in, out, unchanged"),
        (["--move", "apple", "--box", "1,2,3"], "wanted four numbers"),
        (["--move", " ", "--box", "0,0,1,1"], "say what"),
        (["--camera", "yaw=3", "--rotate", "car", "--view", "rear"], "one edit at a time"),
        (["Make it red.", "--camera", "yaw=3"], "stands for an instruction"),
    ],
)
def test_misuse_ends_with_2(calls, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        edit("a.png", *words)
    assert ended.value.code == 2 and message in capsys.readouterr().err and not calls


def test_boxes_beyond_the_photograph_and_other_models_are_refused_before_loading(calls, capsys, monkeypatch):
    monkeypatch.setattr("joyedit.loading.layouts.load", lambda *a, **k: pytest.fail("loaded"))
    assert edit("a.png", "--move", "apple", "--box", "50,50,60,20") == 1
    assert "must lie within the picture of 96 x 96 pixels" in capsys.readouterr().err
    assert edit("a.png", "--camera", "yaw=3", "--model", "tiny-chronoedit") == 1
    assert "--camera is for JoyAI-Image-Edit" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["generate", "--camera", "yaw=3"])
    assert "joyedit edit PHOTO" in capsys.readouterr().err
    record = {"prompt": "x", "pipeline": "JoyImageEditPipeline", "move": "apple", "box": "no"}
    images.save_png(Image.new("RGB", (96, 96)), "bad.png", record)
    assert edit("a.png", "--config-from", "bad.png") == 1
    assert json.dumps(record) and "wanted four numbers" in capsys.readouterr().err
