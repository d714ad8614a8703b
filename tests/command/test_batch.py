"""`joyedit batch`: what it makes of a folder, what it passes over, refuses and survives. Lines have tests of
their own (`test_batch_lines.py`).

The networks are left out here: an edit returns the photograph. What they make is in `test_batch_runs.py`.
"""

import contextlib
import errno
import importlib
import json
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from torch.distributed import HashStore

from joyedit.command import batch as planning
from joyedit.command import batch_record, cli
from joyedit.command import batch_run as many
from joyedit.command.arguments import parse
from joyedit.command.instruction import Instruction
from joyedit.media import images
from joyedit.pipelines import reuse, rewriting_server
from tests.answering import answering, rewritten
from tests.command.batches import GOOD, SEED, SIZES, calls, desk, errors, files, lines, pipe

OTHERS = ("edit", "generate", "ask", "estimate", "train", "demo", "convert", "verify", "info")

__all__ = ["calls", "desk", "pipe"]  # fixtures


# --------------------------------------------------------------------------------------------------- a folder
def test_a_name_is_no_person_s_home(run, calls):
    os.chdir("photos")
    Path("a.png").rename("~nobody-of-that-name.png")
    assert run("batch", ".", "x", "--out", "../out", *SEED)[0] == 0
    assert "~nobody-of-that-name-edit-7.png" in files("../out")


def test_what_is_linked_is_looked_into_once(run, calls):
    Path("else/deep").mkdir(parents=True)
    Image.new("RGB", (96, 96)).save("else/deep/e.png")
    for name, target in (("one", "../else"), ("two", "../else/deep"), ("three", "."), ("up", "..")):
        Path("photos", name).symlink_to(target)
    assert run("batch", "photos", "x", "--out", "out", *SEED)[0] == 0
    names = ["a", "b", "c", "d", "two/e"]
    assert files() == sorted(["batch.json", *(f"{name}-edit-7.png" for name in names)])


def test_only_the_edits_are_timed(run, calls, monkeypatch):
    clock = [0.0]
    load, edit = planning.open_pipeline, Instruction.run

    def spend(seconds, function):
        return lambda *args: [clock.__setitem__(0, clock[0] + seconds), function(*args)][1]

    monkeypatch.setattr(planning.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(planning, "open_pipeline", spend(1000, load))
    monkeypatch.setattr(Instruction, "run", spend(3, edit))
    assert "4 made, 3.00 s each" in run("batch", "photos", "x", "--out", "out")[2]


def test_a_text_that_is_no_utf_8_is_recorded(run, calls):
    strange = os.fsdecode(b"red \xff")
    assert run("batch", "photos", "x", "--negative-prompt", strange, "--out", "out")[0] == 0
    assert json.loads(Path("out/batch.json").read_bytes())["settings"]["negative_prompt"] == strange
    assert run("batch", "photos", "x", "--negative-prompt", strange, "--out", "out")[:2] == (0, "")


def test_the_record_of_another_batch_may_go_where_there_is_no_result(run, calls, monkeypatch):
    Path("out").mkdir()
    batch_record.claim(Path("out"), 7, {"settings": {"prompt": "Make it rde"}})
    Path("out/errors-0.jsonl").touch()
    status, _, err = run("batch", "photos", "Make it red", "--out", "out")
    assert status == 2 and "or delete out/batch.json, beside which there is no result" in err
    Path("out/dogs").mkdir()
    assert "or delete" not in run("batch", "photos", "Make it red", "--out", "out")[2]


def test_settings_of_an_image_are_taken_over_without_a_warning(run, calls):
    assert run("edit", "photos/a.png", "Make it red", "--steps", 5, "-o", "one.png", *SEED)[0] == 0
    calls.clear()
    status, _, err = run("batch", "photos", "--config-from", "one.png", "--out", "out")
    assert status == 0 and "another photograph" not in err
    assert {(call["prompt"], call["num_inference_steps"], seed) for call, seed in calls} == {
        ("Make it red", 5, 7)
    }
    assert all("height" not in call for call, _ in calls)


def test_pictures_of_a_folder_and_nothing_else(run, calls):
    for name in ("photos/more/e.PNG", "photos/.hidden/f.png", "photos/older/g.png", "photos/more/b.jpg"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (96, 96)).save(name)
    Path("photos/notes.txt").write_text("not a picture")
    Path("photos/.h.png").write_bytes(b"not one either")
    Path("photos/older/batch.json").write_text("{}")
    Path("photos/a.jpg").write_bytes(Path("photos/b.jpg").read_bytes())
    status, out, err = run("batch", "photos", "Make it red", "--out", "out", *SEED)
    results = ["a-jpg", "a-png", "b", "c", "d", "more/b", "more/e"]
    assert status == 0 and files() == sorted(["batch.json", *(f"{name}-edit-7.png" for name in results)])
    assert sorted(out.split()) == [f"out/{name}-edit-7.png" for name in results]
    assert "seed 7\n" in err and "7 edits: 7 made" in err and "0 failed" in err
    assert [call["prompt"] for call, _ in calls] == ["Make it red"] * 7
    record = json.loads(Path("out/batch.json").read_text())
    settings = {"prompt": "Make it red", "model": "tiny-joyimage"}
    assert (record["seed"], record["photographs"]) == (7, str(Path("photos").resolve()))
    assert record["settings"] == settings


def test_a_result_is_recorded_as_by_edit(run, calls):
    words = ("--steps", 3, "--guidance-scale", 2.5, *SEED)
    assert run("batch", "photos", "Make it red", "--out", "out", *words)[0] == 0
    assert run("edit", "photos/a.png", "Make it red", "-o", "one.png", *words)[0] == 0
    assert Path("out/a-edit-7.png").read_bytes() == Path("one.png").read_bytes()
    assert images.read_metadata("one.png")["num_inference_steps"] == 3


def test_the_seed_is_drawn_once_and_what_is_there_is_passed_over(run, calls):
    assert run("batch", "photos", "x", "--out", "out")[0] == 0
    seed = json.loads(Path("out/batch.json").read_text())["seed"]
    before = {name: Path("out", name).stat().st_mtime_ns for name in files()}
    assert {f"{name}-edit-{seed}.png" for name in "abcd"} < {*before}
    Path(f"out/b-edit-{seed}.png").unlink()
    Path(f"out/c-edit-{seed}.png").write_bytes(b"")  # no result is empty
    calls.clear()
    status, out, err = run("batch", "photos", "x", "--out", "out")
    assert status == 0 and sorted(out.split()) == [f"out/{name}-edit-{seed}.png" for name in "bc"]
    assert [seed for _, seed in calls] == [seed] * 2 and "2 were there" in err
    after = {name: Path("out", name).stat().st_mtime_ns for name in files()}
    assert {name for name in before if before[name] != after[name]} == {
        f"{name}-edit-{seed}.png" for name in "bc"
    }


def test_several_seeds_of_each(run, calls):
    assert run("batch", "photos", "x", "--out", "out", "--num-images", 2, *SEED)[0] == 0
    wanted = [f"{name}-edit-{seed}.png" for name in "abcd" for seed in (7, 8)]
    assert files() == sorted(["batch.json", *wanted])


def test_one_that_fails_is_noted_and_tried_again(run, calls):
    Path("photos/b.jpg").write_bytes(b"no picture")
    Image.new("RGB", (100_000, 1)).save("photos/stripe.png")
    status, out, err = run("batch", "photos", "x", "--out", "out", *SEED)
    assert status == 1 and len(out.split()) == 3
    assert "5 edits: 3 made" in err and "2 failed" in err and "see out/errors-0.jsonl" in err
    assert {one["file"]: one["output"] for one in errors()} == {
        "photos/b.jpg": "b-edit-7.png", "photos/stripe.png": "stripe-edit-7.png",
    }  # fmt: skip
    assert all(one["line"] is None and one["message"] for one in errors())
    assert run("batch", "photos", "x", "--out", "out")[0] == 1 and len(calls) == 3
    Image.new("RGB", (72, 96)).save("photos/b.jpg")
    Path("photos/stripe.png").unlink()
    assert run("batch", "photos", "x", "--out", "out")[0] == 0
    assert files() == sorted(["batch.json", *(f"{name}-edit-7.png" for name in "abcd")])


@pytest.mark.parametrize(
    "words", [["Make it blue"], ["x", "--seed", 8], ["x", "--steps", 2], ["x", "--negative-prompt", "y"]]
)
def test_the_folder_of_another_batch_is_refused(run, calls, words):
    assert run("batch", "photos", "x", "--out", "out", *SEED)[0] == 0
    before = files()
    status, out, err = run("batch", "photos", *words, "--out", "out")
    assert (status, out) == (2, "") and "out holds another batch" in err and "name another folder" in err
    assert files() == before and len(calls) == 4


def test_photographs_of_another_folder_are_another_batch(run, calls):
    assert run("batch", "photos", "x", "--out", "out", *SEED)[0] == 0
    Path("photos").rename("others")
    status, _, err = run("batch", "others", "x", "--out", "out")
    assert status == 2 and "photographs is" in err and "others" in err


def test_files_of_no_batch_are_not_taken_for_results(run, calls):
    Path("out").mkdir()
    Path("out/a-edit-7.png").write_bytes(b"something else")
    status, _, err = run("batch", "photos", "x", "--out", "out", *SEED)
    assert status == 2 and "a-edit-7.png exists, and is of no batch" in err
    assert files() == ["a-edit-7.png"] and not calls
    assert run("batch", "photos", "x", "--out", "out", "--seed", 8)[0] == 0


def test_a_damaged_record_is_an_error(run, calls, monkeypatch):
    monkeypatch.setattr(batch_record, "PATIENCE", 0.01)
    Path("out").mkdir()
    for text in ("", '{"seed": 1}', '{"settings": {}, "seed": "x"}'):
        Path("out/batch.json").write_text(text)
        status, _, err = run("batch", "photos", "x", "--out", "out")
        assert status == 1 and "batch.json" in err


def test_who_comes_first_draws_the_seed(tmp_path):
    barrier = threading.Barrier(8)

    def claim(seed):
        barrier.wait()
        return batch_record.claim(tmp_path / "out", seed, {"settings": {}})

    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(claim, range(8)))
    assert len({record["seed"] for record in records}) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["batch.json"]


def test_the_seed_is_that_of_who_was_a_moment_earlier(run, calls, monkeypatch):
    """Another process writes the record after this one has looked for it."""
    look = planning.refuse_others

    def other(plan):
        look(plan)
        batch_record.claim(plan.out, 5, planning.facts_of(plan, plan.args))

    monkeypatch.setattr(planning, "refuse_others", other)
    monkeypatch.setattr(planning, "facts_of", lambda plan, args: {"settings": {}})
    status, out, err = run("batch", "photos", "x", "--out", "out")
    assert status == 0 and sorted(out.split()) == [f"out/{name}-edit-5.png" for name in "abcd"]
    assert [seed for _, seed in calls] == [5] * 4 and "seed 5\n" in err


# ----------------------------------------------------------------------------------------------------- shards
def test_shards_make_each_once(run, calls, monkeypatch):
    printed = []
    for index in range(3):
        status, out, _ = run("batch", "photos", "x", "--out", "out", "--shard", f"{index}/3")
        assert status == 0
        printed += out.split()
    assert len(printed) == len(set(printed)) == 4 and len(calls) == 4
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setenv("JOB_COMPLETIONS", "2")
    Path(printed[0]).unlink()  # of the first half, which is not this one's
    assert run("batch", "photos", "x", "--out", "out")[1] == ""
    assert run("batch", "photos", "x", "--out", "out", "--shard", "0/1")[1].split() == printed[:1]


def test_ranks_of_torchrun_are_parts(run, calls, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, names in enumerate((("a", "b"), ("c", "d"))):
        monkeypatch.setenv("RANK", str(rank))
        status, out, err = run("batch", "photos", "x", "--out", "out", *SEED)
        assert (status, sorted(out.split())) == (0, [f"out/{name}-edit-7.png" for name in names])
        assert "2 edits: 2 made" in err


def test_a_rank_with_failures_ends_when_the_others_are_done(run, calls, monkeypatch):
    """torchrun would end them with it."""
    store, waits = HashStore(), []

    def other_ends(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            store.add("joyedit batch 0", 1)

    meeting = importlib.import_module("torch.distributed.rendezvous")
    monkeypatch.setattr(meeting, "rendezvous", lambda url: iter([(store, 0, 2)]))
    monkeypatch.setattr(planning.time, "sleep", other_ends)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "none")):
        monkeypatch.setenv(name, value)
    assert run("batch", "photos", "x", "--out", "well")[0] == 0 and not waits
    assert store.add("joyedit batch 0", 0) == 1
    store.add("joyedit batch 0", -1)
    Path("photos/a.png").write_bytes(b"no picture")
    assert run("batch", "photos", "x", "--out", "out")[0] == 1 and len(waits) == 3


def test_an_environment_that_fits_nothing_is_refused(run, calls, monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    status, _, err = run("batch", "photos", "x", "--out", "out")
    assert status == 2 and "JOB_COMPLETIONS is not" in err and not Path("out").exists()


def test_what_shards_left_that_are_no_more_is_cleared_away(run, calls):
    Path("photos/b.jpg").write_bytes(b"no picture")
    assert run("batch", "photos", "x", "--out", "out", "--shard", "1/3")[0] == 1
    Path("out/.joyedit-2/made").mkdir(parents=True)  # as a process leaves it that is killed
    assert errors("errors-1.jsonl")
    assert run("batch", "photos", "x", "--out", "out", "--shard", "0/2")[0] == 1
    assert Path("out/errors-1.jsonl").exists() and not Path("out/.joyedit-2").exists()
    assert run("batch", "photos", "x", "--out", "out")[0] == 1
    assert [path.name for path in Path("out").glob("errors*")] == ["errors-0.jsonl"]


def test_a_process_of_the_same_part_does_not_touch_what_another_is_making(run, calls, monkeypatch):
    """The whole other run goes by while this one has written, but not yet moved, its first result."""
    write, begun = many.write_image, []

    def written(image, path, temporary, record, profile):
        write(image, path, temporary, record, profile)
        if not begun:
            begun.append(Path(temporary).read_bytes())
            for words in (["--shard", "1/2"], []):
                assert cli.main(["batch", "photos", "x", "--out", "out", "-q", *words]) == 0
            assert Path(temporary).read_bytes() == begun[0]

    monkeypatch.setattr(many, "write_image", written)
    monkeypatch.setattr(reuse, "reused", contextlib.nullcontext)  # one pipeline is here for all runs
    assert run("batch", "photos", "x", "--out", "out", "--shard", "1/2", *SEED)[0] == 0
    assert begun and files() == ["a-edit-7.png", "b-edit-7.png", "batch.json", "c-edit-7.png", "d-edit-7.png"]
    for name in SIZES:
        assert Image.open(f"out/{name[0]}-edit-7.png").size == SIZES[name]
        assert images.read_metadata(f"out/{name[0]}-edit-7.png")["input"]["name"] == name


def test_a_part_that_is_given_wins_over_ranks(run, calls, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words, wanted, part in ((["--shard", "0/2"], "ab", "0/2"), ([], "cd", "1/2")):
        status, out, err = run("batch", "photos", "x", "--out", "out", *SEED, *words)
        assert status == 0 and f"part {part}\n" in err
        assert sorted(out.split()) == [f"out/{name}-edit-7.png" for name in wanted]


# ----------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["photos", "x"], "--out"),
        (["photos", "--out", "out"], "say what to do"),
        (["photos", "Make", "it", "red", "--out", "out"], "goes in quotes"),
        (["photos", "x", "--out", "out", "--sharp", "0/2"], "did you mean --shard"),
        (["nowhere", "x", "--out", "out"], "is no folder, and no file"),
        (["photos", "x", "--out", "photos"], "among the photographs"),
        (["photos", "x", "--out", "photos/a.png"], "is no folder"),
        (["photos", "x", "--out", "out", "--shard", "2/2"], "of 2 shards"),
        (["photos", "x", "--out", "out", "--batch-size", "0"], "not within 1"),
        (["photos", "x", "--out", "out", "--grid", "g.png"], "--grid is about one result"),
        (["photos", "x", "--out", "out", "--video", "v.mp4"], "--video is about one result"),
        (["photos", "x", "--out", "out", "-o", "o.png"], "unrecognized arguments: -o"),
        (["photos", "x", "--out", "out", "--rewrite", "some/model"], "--rewrite local or --rewrite URL"),
        (["jobs.jsonl", "x", "--out", "out", "--num-images", "2"], "a line makes one picture"),
        (["photos/a.png", "x", "--out", "out"], "is one picture, no file with jobs: joyedit edit has it"),
        (["pipe", "x", "--out", "out"], "is neither a folder nor a file"),
        (["photos", "x", "--out", "out", "--source", "y"], "not both"),
    ],
)
def test_words_that_are_wrong(desk, no_work, capsys, words, said):
    os.mkfifo("pipe")
    lines(GOOD)
    with pytest.raises(SystemExit) as ended:
        cli.main(["batch", *words])
    assert ended.value.code == 2 and said in capsys.readouterr().err and not Path("out").exists()


# ------------------------------------------------------------------------------------------------ on its way
def test_one_size_after_the_other(run, calls):
    for number in range(6):
        Image.new("RGB", [(96, 72), (72, 96)][number % 2]).save(f"photos/{number}.png")
    assert run("batch", "photos", "x", "--out", "out")[0] == 0
    shapes = [call["image"].size for call, _ in calls]
    assert len(shapes) == 10 and sum(a != b for a, b in zip(shapes, shapes[1:], strict=False)) == 2


def test_those_of_one_size_go_together(run, calls, monkeypatch):
    together = []

    def run_together(system, pipe, calls, seeds, args):
        together.append([call["image"].size for call in calls])
        if any(call["image"].getpixel((0, 0)) == (255, 0, 0) for call in calls):
            raise ValueError("a red one")
        return [call["image"] for call in calls]

    monkeypatch.setattr(Instruction, "run_together", run_together)
    for number in range(3):
        Image.new("RGB", (96, 72)).save(f"photos/{number}.png")
    Image.new("RGB", (72, 96), "red").save("photos/r.png")
    assert run("batch", "photos", "x", "--out", "out", "--batch-size", 2, *SEED)[0] == 0
    assert together == [[(72, 96)] * 2, [(96, 96), (96, 72)], [(96, 72)] * 2, [(96, 72)] * 2]
    assert [call["image"].size for call, _ in calls] == [(72, 96)] * 2  # what went wrong together
    assert len(files()) == 9


def test_with_quirks_each_goes_alone(run, calls, monkeypatch):
    """They draw from the global generator."""
    monkeypatch.setattr(Instruction, "run_together", lambda *_: 1 / 0)
    status, _, err = run("batch", "photos", "x", "--out", "out", "--batch-size", 2, "--reference-quirks")
    assert status == 0 and len(calls) == 4 and "each is edited alone" in err


def test_the_next_is_read_and_the_last_is_written_while_one_is_computed(run, calls, monkeypatch):
    """Each waits for the other thread, which would never come if one followed the other."""
    read, edit, write = many.read_photo, Instruction.run, many.write_image
    opened = [threading.Event() for _ in range(5)]
    computing, written = [threading.Event() for _ in range(5)], [threading.Event() for _ in range(5)]
    number = {"read": 0, "edit": 0, "write": 0}

    def next_of(kind):
        number[kind] += 1
        return number[kind] - 1

    def read_photo(file):
        photo = read(file)
        opened[next_of("read")].set()
        return photo

    def compute(*args):
        own = next_of("edit")
        computing[own].set()
        assert own == 3 or opened[own + 1].wait(20)
        assert own == 0 or written[own - 1].wait(20)
        return edit(*args)

    def write_image(*args):
        own = next_of("write")
        assert own == 3 or computing[own + 1].wait(20)
        write(*args)
        written[own].set()

    monkeypatch.setattr(many, "read_photo", read_photo)
    monkeypatch.setattr(Instruction, "run", compute)
    monkeypatch.setattr(many, "write_image", write_image)
    assert run("batch", "photos", "x", "--out", "out")[0] == 0 and number == dict.fromkeys(number, 4)


def test_what_is_not_begun_is_not_read_after_the_end(run, calls, monkeypatch):
    read, opened, ended = many.read_photo, [], threading.Event()

    def read_photo(file):
        opened.append(file)
        assert len(opened) == 1 or ended.wait(20)
        return read(file)

    def end(*_):
        threading.Timer(0.2, ended.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(many, "read_photo", read_photo)
    monkeypatch.setattr(many.Run, "called", end)
    assert run("batch", "photos", "x", "--out", "out", "--batch-size", 3)[0] == 130 and len(opened) == 2


def test_lines_with_settings_of_their_own_go_alone(run, calls, monkeypatch):
    monkeypatch.setattr(Instruction, "run_together", lambda *_: 1 / 0)
    name = lines(
        *({**GOOD, "output": f"{steps}.png", "num_inference_steps": steps} for steps in (2, 3)),
        {**GOOD, "output": "size.png", "num_inference_steps": 3, "size": "input"},
    )
    assert run("batch", name, "--out", "out", "--batch-size", 3)[0] == 0 and len(calls) == 3


def test_no_more_than_a_few_photographs_are_open(run, calls, monkeypatch):
    opened, most = [], []
    read, edit = many.read_photo, Instruction.run

    def read_photo(file):
        opened.append(weakref.ref((photo := read(file)).image))
        return photo

    def count(*args):
        most.append(sum(one() is not None for one in opened))
        made = edit(*args)
        calls.clear()
        return made

    monkeypatch.setattr(many, "read_photo", read_photo)
    monkeypatch.setattr(Instruction, "run", count)
    for number in range(12):
        Image.new("RGB", (96, 96)).save(f"photos/{number}.png")
    assert run("batch", "photos", "x", "--out", "out")[0] == 0
    assert len(most) == 16 and max(most) <= 5


def test_a_photograph_of_several_lines_is_read_once(run, calls, monkeypatch):
    read, opened = many.read_photo, []
    monkeypatch.setattr(many, "read_photo", lambda file: [opened.append(file), read(file)][1])
    name = lines(*({**GOOD, "output": f"{number}.png", "prompt": f"x{number}"} for number in range(3)))
    assert run("batch", name, "--out", "out")[0] == 0 and opened == ["photos/a.png"]


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        ("write_image", OSError(errno.ENOSPC, "full"), "No space left on device: out/"),
        ("read_photo", OSError(errno.EMFILE, "too many"), "too many"),
        ("read_photo", MemoryError(), "out of memory"),
        ("record_of", RuntimeError("can't allocate memory"), "out of memory"),
    ],
)
def test_what_is_no_picture_s_fault_ends_the_run(run, calls, monkeypatch, place, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(many, place, fail)
    status, out, err = run("batch", "photos", "x", "--out", "out")
    assert (status, out) == (1, "") and said in err and files() == ["batch.json"]


def test_a_checkpoint_that_breaks_ends_the_run(run, calls, pipe, monkeypatch):
    def fail(*_):
        raise ValueError("of every picture")

    def broken(self):
        raise ValueError("weights.safetensors has become shorter")

    monkeypatch.setattr(Instruction, "run", fail)
    monkeypatch.setattr(type(pipe), "for_one_call", broken)
    status, _, err = run("batch", "photos", "x", "--out", "out")
    assert status == 1 and "has become shorter" in err and files() == ["batch.json"]


@pytest.mark.parametrize("ending", [KeyboardInterrupt, cli.Ended])
def test_an_end_leaves_whole_files_alone(run, calls, monkeypatch, ending):
    edit = Instruction.run

    def ended(*args):
        if len(calls) == 2:
            raise ending(*([cli.signal.SIGTERM] if ending is cli.Ended else []))
        return edit(*args)

    monkeypatch.setattr(Instruction, "run", ended)
    status, _, err = run("batch", "photos", "x", "--out", "out")
    assert status == (130 if ending is KeyboardInterrupt else 143)
    left = [path for path in Path("out").rglob("*") if path.name != "batch.json"]
    assert len(left) == 2 and all(Image.open(path).size for path in left)


def test_results_are_moved_to_their_places(run, calls, monkeypatch):
    """So that nobody sees half of one, and none is left where a process dies."""
    replace, moved = os.replace, []

    def watched(source, target):
        if Path(target).parent == Path("out") and Path(target).suffix == ".png":
            assert Image.open(source).load() and not Path(target).exists()
            moved.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    assert run("batch", "photos", "x", "--out", "out", *SEED)[0] == 0
    assert sorted(moved) == [f"{name}-edit-7.png" for name in "abcd"]


def test_progress_and_what_is_said(run, calls):
    *_, err = run("batch", "photos", "x", "--out", "out", "-v")
    assert "4/4" in err and "edit/s" in err
    assert run("batch", "photos", "x", "--out", "quiet", "-q")[2] == ""


def test_results_are_written_when_the_output_is_closed(calls, monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    args = parse(["batch", "photos", "x", "--out", "out", "-q"], {"batch": cli.batch} | dict.fromkeys(OTHERS))
    monkeypatch.setattr("builtins.print", closed)
    with pytest.raises(BrokenPipeError):
        args.run(args)
    assert len(files()) == 5


def test_a_rewritten_instruction_or_none(run, calls, monkeypatch):
    monkeypatch.setattr(rewriting_server, "PAUSE", 0.001)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with answering() as serve:
        server = serve(rewritten("Make the circle red."))
        assert run("batch", "photos", "red", "--out", "out", "--rewrite", server.base, *SEED)[0] == 0
        assert {call["prompt"] for call, _ in calls} == {"Make the circle red."}
        assert images.read_metadata("out/a-edit-7.png")["original_prompt"] == "red"
        silent = serve((500, "", {}))
        status, out, _ = run("batch", "photos", "red", "--out", "none", "--rewrite", silent.base, *SEED)
        assert (status, out) == (1, "") and files("none") == ["batch.json", "errors-0.jsonl"]


def test_an_adapter_that_is_not_there_takes_no_folder(run, desk, no_work):
    status, _, err = run("batch", "photos", "x", "--out", "out", "--lora", "none.safetensors")
    assert status == 1 and "none.safetensors" in err and not Path("out").exists()
