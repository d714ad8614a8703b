"""`joyedit batch` of lines that say what to make: what it takes, notes and refuses. Without the networks."""

import json
from pathlib import Path

import pytest
from PIL import Image

from joyedit.command import batch_run as many
from joyedit.loading import layouts
from tests.command.batches import GOOD, SEED, calls, desk, errors, files, lines, pipe

__all__ = ["calls", "desk", "pipe"]  # fixtures


def test_lines_say_what_to_make(run, calls):
    Path("sets").mkdir()
    Image.new("L", (96, 72), 255).save("photos/mask.png")
    name = lines(
        {"photo": "../photos/a.png", "output": "red/a.png", "prompt": "Make it red", "seed": 3},
        {"photo": "../photos/a.png", "mask": "../photos/mask.png", "num_inference_steps": 9},
        "",
        {"prompt": "A lighthouse", "output": "made.jpg", "height": 64, "width": 96},
        {"photo": "../photos/d.png", "output": "d.png", "camera": "yaw=30"},
        name="sets/jobs.jsonl",
    )
    status, out, _ = run("batch", name, "Make it blue", "--out", "out", *SEED)
    assert status == 0
    assert sorted(out.split()) == ["out/a-edit-7.png", "out/d.png", "out/made.jpg", "out/red/a.png"]
    said = {call["prompt"]: (call, seed) for call, seed in calls}
    assert {prompt[:12] for prompt in said} == {"Make it red", "Make it blue", "A lighthouse", "Move the cam"}
    assert said["Make it red"][1] == 3 and said["Make it red"][0]["num_inference_steps"] == 2
    assert said["Make it blue"][0]["num_inference_steps"] == 9 and "mask" in said["Make it blue"][0]
    assert "image" not in said["A lighthouse"][0] and said["A lighthouse"][0]["width"] == 96
    assert json.loads(Path("out/batch.json").read_text())["settings"]["prompt"] == "Make it blue"
    assert run("batch", name, "Make it blue", "--out", "out")[:2] == (0, "")


def test_a_line_is_recorded_as_by_edit(run, calls):
    name = lines({"photo": "photos/a.png", "output": "o.png", "prompt": "Make it red", "seed": 5})
    assert run("batch", name, "--out", "out")[0] == 0
    assert run("edit", "photos/a.png", "Make it red", "--seed", 5, "-o", "one.png")[0] == 0
    assert Path("out/o.png").read_bytes() == Path("one.png").read_bytes()


def test_a_line_whose_photograph_is_not_there_is_noted(run, calls):
    name = lines(
        {"photo": "no.png", "prompt": "x", "output": "n.png"}, {"photo": "photos/a.png", "prompt": "x"}
    )
    status, out, _ = run("batch", name, "--out", "out", *SEED)
    assert (status, out) == (1, "out/a-edit-7.png\n")
    (error,) = errors()
    assert (error["line"], error["file"], error["output"]) == (1, "no.png", "n.png")
    assert "does not exist" in error["message"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "is a list, not a JSON object"),
        ({**GOOD, "promt": "x"}, "'promt' is no field (did you mean prompt?)"),
        ({**GOOD, "input": {}}, "'input' is no field"),
        ({**GOOD, "seed": -1}, "seed: -1 is not within 0"),
        ({**GOOD, "seed": 1.5}, "seed is 1.5, not a whole number"),
        ({**GOOD, "prompt": 7}, "prompt is 7, not a text"),
        ({**GOOD, "prompt": " "}, "the instruction is empty"),
        ({**GOOD, "num_inference_steps": True}, "num_inference_steps is True, not a whole number"),
        ({**GOOD, "num_inference_steps": 0}, "num_inference_steps: 0 is not within 1"),
        ('{"photo": "photos/a.png", "prompt": "x", "guidance_scale": NaN}', "guidance_scale is nan"),
        ({**GOOD, "match_colors": "yes"}, "match_colors is 'yes', not true or false"),
        ({**GOOD, "height": 64}, "height and width go together"),
        ({**GOOD, "height": 65, "width": 64}, "height: 65 is not a multiple of 16"),
        ({**GOOD, "size": "big"}, "--size 'big': wanted input or WIDTHxHEIGHT"),
        ({**GOOD, "lora": "l.safetensors"}, "lora is one for all lines: give --lora"),
        ({**GOOD, "model": "tiny-diffedit"}, "model is one for all lines: give --model"),
        ({**GOOD, "target_prompt": "y"}, "target_prompt is not for tiny-joyimage, which takes prompt"),
        ({**GOOD, "reference": "photos/b.jpg"}, "JoyAI-Image-Edit-Plus"),
        ({**GOOD, "reference": "hat.jpg"}, "as in --model jdopensource/JoyAI-Image-Edit-Plus"),
        ({**GOOD, "reference": []}, "reference is [], not a path or a list of paths"),
        ({**GOOD, "reference": 5}, "reference is 5, not a path or a list of paths"),
        ({**GOOD, "reference": ["a\0"]}, "not a path or a list of paths"),
        ({**GOOD, "photo": 1}, "photo is 1, not the path of a file"),
        ({**GOOD, "move": "the cup"}, "--move and --box go together"),
        ({"photo": "photos/a.png"}, "tiny-joyimage edits by instruction"),
        ({"prompt": "x", "mask": "photos/a.png"}, "--mask is for a photograph"),
        ({**GOOD, "output": "../a.png"}, "output '../a.png' leaves --out"),
        ({**GOOD, "output": "/tmp/a.png"}, "output '/tmp/a.png' leaves --out"),
        ({**GOOD, "output": "a.gif"}, "output 'a.gif' does not end in .png"),
        ({**GOOD, "output": ""}, "output is '', not a path inside --out"),
        ({**GOOD, "output": ".joyedit-1/a.png"}, "names that begin with .joyedit-"),
        ({**GOOD, "output": ".JoyEdit-1/a.png"}, "names that begin with .joyedit-"),
        ({**GOOD, "output": "c:x.png"}, "output 'c:x.png' leaves --out"),
        ({**GOOD, "output": "Batch.json/a.png"}, "files of the batch"),
        ({**GOOD, "output": "errors-10.jsonl/a.png"}, "files of the batch"),
        ({**GOOD, "output": f"{'a' * 252}.png"}, "more than 255 bytes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_line_that_is_wrong_is_refused_before_any_work(run, desk, no_work, line, words, number):
    each = [{**GOOD, "output": "other.png"}]
    each.insert(number - 1, line)
    status, out, err = run("batch", lines(*each), "--out", "out")
    (told,) = [one for one in err.splitlines() if one.startswith("line ")]
    assert (status, out) == (2, "") and told.startswith(f"line {number}: ") and words in told
    assert not Path("out").exists()


def test_all_that_is_wrong_is_told(run, desk, no_work):
    name = lines(
        {**GOOD, "output": "o.png"},
        {**GOOD, "output": "./o.png"},
        "",
        {"photo": 1, "promt": "x"},
        b"\xff\xfe".decode("latin-1"),
        {**GOOD, "output": "o.png"},
    )
    Path(name).write_bytes(Path(name).read_bytes().replace(b"\xc3\xbf\xc3\xbe", b"\xff\xfe"))
    status, _, err = run("batch", name, "--out", "out")
    told = err.splitlines()
    assert status == 2 and [line.partition(":")[0] for line in told[:-1]] == [
        "line 2", "line 4", "line 4", "line 5", "line 6",
    ]  # fmt: skip
    assert "output 'o.png' is that of line 1" in told[0] and "not text in UTF-8" in told[3]
    assert told[-1].startswith("5 faults: nothing is edited")


def test_results_that_would_be_one_file_or_lie_in_one_another(run, desk, no_work):
    outputs = (
        "a.png",
        "x/a.png",
        "A.PNG",
        "a.png/b.png",
        "X/A.png/c.png",
        "d.png/e/f.png",
        "D.png",
        "x/b.png",
    )
    outputs += ("caf\u00e9.png", "cafe\u0301.png")
    name = lines(*({**GOOD, "output": output} for output in outputs))
    status, _, err = run("batch", name, "--out", "out")
    assert status == 2 and err.splitlines()[:-1] == [
        "line 3: output 'A.PNG' is that of line 1 but for the case of letters: each needs its own",
        "line 4: output 'a.png/b.png' has the output of line 1 as a folder",
        "line 5: output 'X/A.png/c.png' has the output of line 2 as a folder",
        "line 7: output 'D.png' is a folder in the output of line 6",
        "line 10: output 'cafe\u0301.png' is that of line 9 but for the case of letters: each needs its own",
    ]


def test_a_line_that_changes_meanwhile_is_noted(run, calls, monkeypatch):
    begin = many.Desk.__enter__

    def changed(desk):
        lines({**GOOD, "output": "a.png"}, {**GOOD, "output": "c.png"})
        return begin(desk)

    monkeypatch.setattr(many.Desk, "__enter__", changed)
    name = lines({**GOOD, "output": "a.png"}, {**GOOD, "output": "b.png"})
    assert run("batch", name, "--out", "out")[0] == 1 and files() == ["a.png", "batch.json", "errors-0.jsonl"]
    (error,) = errors()
    assert (error["line"], error["output"]) == (2, "b.png") and "has changed" in error["message"]


def test_names_that_follow_from_lines_must_differ_too(run, desk, no_work):
    status, _, err = run("batch", lines(GOOD, {**GOOD, "prompt": "y"}), "--out", "out", *SEED)
    assert status == 2 and "line 2: output 'a-edit-7.png' is that of line 1" in err


def test_other_lines_are_another_batch(run, calls):
    assert run("batch", lines(GOOD), "--out", "out")[0] == 0
    status, _, err = run("batch", lines({**GOOD, "prompt": "y"}), "--out", "out")
    assert status == 2 and "out holds another batch (jobs is" in err


def test_nothing_to_do_is_refused(run, desk, no_work):
    Path("empty").mkdir()
    assert "holds no picture" in run("batch", "empty", "x", "--out", "out")[2]
    status, _, err = run("batch", lines("", ""), "--out", "out")
    assert status == 2 and "holds no line" in err


def test_the_first_line_says_which_model(run, desk, monkeypatch):
    opened = []
    monkeypatch.setattr(layouts, "load", lambda name, **_: [opened.append(name), 1 / 0])
    captions = {"photo": "photos/a.png", "source_prompt": "a", "target_prompt": "b", "inpaint_strength": 0.5}
    with pytest.raises(ZeroDivisionError):
        run("batch", lines(captions), "--out", "out")
    wrong = {**captions, "inpaint_strength": 1.5, "output": "b.png"}
    assert (
        "inpaint_strength: 1.5 is not within 0 and 1" in run("batch", lines(captions, wrong), "--out", "o")[2]
    )
    assert "prompt is not for tiny-diffedit" in run("batch", lines(captions, GOOD), "--out", "o")[2]
    alone = ("batch", lines({"prompt": "x"}), "--out", "o", "--model", "tiny-chronoedit")
    assert "line 1: tiny-chronoedit edits photographs here" in run(*alone)[2]
    assert opened == ["tiny-diffedit"]


@pytest.mark.parametrize("scheme", ["http", "ftp"])
def test_keys_in_urls_are_not_repeated(run, calls, scheme):
    url = f"{scheme}://alice:SECRET@127.0.0.1:9/dogs/a.png?token=SECRET"
    status, _, err = run(
        "batch", lines({"photo": url, "prompt": "x"}), "--mask", url, "--out", "out", "-v", *SEED
    )
    assert status == 1 and "SECRET" not in err and "127.0.0.1:9/dogs/a.png" in err
    assert errors()[0]["file"] == f"{scheme}://127.0.0.1:9/dogs/a.png"
    assert "SECRET" not in "".join(Path("out", name).read_text() for name in files())
    again = run("batch", "jobs.jsonl", "--mask", url.replace("token=", "token=X"), "--out", "out")
    assert again[0] == 2 and "another batch (mask is" in again[2] and "SECRET" not in again[2]


def test_a_photograph_in_the_home_of_nobody_is_noted(run, calls):
    name = lines({"photo": "~nobody-of-that-name/x.png", "prompt": "x", "output": "n.png"}, GOOD)
    assert run("batch", name, "--out", "out", *SEED)[:2] == (1, "out/a-edit-7.png\n")
    assert "there is no user of that name" in errors()[0]["message"]


@pytest.mark.parametrize(
    "failure",
    [ValueError("encoding error 5: Image size exceeds WebP limit"), OSError("encoder error -2"), None],
)
def test_a_result_that_cannot_be_written_is_noted(run, calls, monkeypatch, failure):
    """By its format, or where something else is at its place."""
    write = many.write_image

    def failing(image, path, *rest):
        if failure is not None and path.name == "n.webp":
            raise failure
        write(image, path, *rest)

    monkeypatch.setattr(many, "write_image", failing)
    Path("out").mkdir()
    Path("out/file.png").write_bytes(b"another")
    name = lines({**GOOD, "output": "n.webp" if failure else "file.png/n.webp"}, GOOD)
    status, out, _ = run("batch", name, "--out", "out", *SEED)
    assert (status, out) == (1, "out/a-edit-7.png\n")
    (error,) = errors()
    assert error["line"] == 1 and (str(failure) if failure else "file.png") in error["message"]
