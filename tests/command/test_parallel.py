"""`--parallel`: one edit by several processes is the edit of one, written and told once; what is refused, and
how all end when one fails."""

import argparse
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import joyedit
from joyedit.command import cli, several
from joyedit.loading import layouts
from joyedit.media import images
from joyedit.pipelines.made_for import MadeFor
from joyedit.training import devices, ending
from joyedit.training.processes import ALONE, Processes, started
from tests.answering import answering, rewritten

BLUE = "Make the red square blue."
GUIDED = ("--guidance-scale", 2.5, "--steps", 3)


def photo(folder, name="photo.png", size=(96, 80)):
    picture = Image.new("RGB", size, "white")
    ImageDraw.Draw(picture).rectangle((20, 20, 50, 60), "red")
    picture.save(Path(folder, name))


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    photo(tmp_path)
    return tmp_path


@pytest.fixture
def two(monkeypatch):
    """The environment of the second of two processes."""
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))


def pixels(name):
    return np.asarray(Image.open(name).convert("RGB")).astype(int)


# What is refused.


def wrong(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("cfg=2,sequence=4", {"cfg": 2, "sequence": 4}),
        ("sequence=3", {"cfg": 1, "sequence": 3}),
        (" cfg = 2 ", {"cfg": 2, "sequence": 1}),
    ],
)
def test_a_mesh_as_it_is_read(text, found):
    assert several.mesh(text) == found
    assert (
        several.spelt(argparse.Namespace(parallel=found))
        == f"cfg={found['cfg']},sequence={found['sequence']}"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfg=3", "cfg: 3 is not within 1 and 2"),
        ("sequence=0", "sequence: 0 is not within 1 and 1024"),
        ("sequence=two", "sequence: 'two' is not a whole number"),
        ("sequence", "sequence: '' is not a whole number"),
        ("tensor=2", "'tensor=2': wanted cfg=1 or cfg=2, sequence=N, or both as in cfg=2,sequence=4"),
        ("cfg=2,", "'': wanted cfg=1"),
        ("cfg=2,cfg=1", "cfg is given twice: wanted cfg=1"),
    ],
)
def test_a_mesh_that_is_none(text, message, no_work, capsys):
    assert f"argument --parallel: {message}" in wrong(capsys, "edit", "photo.png", BLUE, "--parallel", text)


@pytest.mark.parametrize(
    ("command", "count", "words", "message"),
    [
        ("edit", 1, "--parallel cfg=2,sequence=4", "8 processes, and this is one alone: start it with "
         "torchrun --nproc-per-node 8 -m joyedit edit ... --parallel cfg=2,sequence=4"),
        ("generate", 1, "--parallel sequence=2", "2 -m joyedit generate ... --parallel cfg=1,sequence=2"),
        ("edit", 2, "", "2 processes would all make the same and write one file"),
        ("generate", 4, "", "as in --parallel sequence=4, or start one alone, without torchrun"),
        ("edit", 2, "--parallel cfg=2,sequence=2", "takes 4 processes (cfg times sequence), and there are 2"),
        ("edit", 2, "--parallel cfg=1", "takes 1 processes (cfg times sequence), and there are 2"),
        ("edit", 2, "--parallel cfg=2 --device cuda:1", "'cuda:1': with --parallel each process has its own: "
         "say cuda"),
    ],
)  # fmt: skip
def test_processes_that_do_not_fit(command, count, words, message, no_work, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(count))
    told = ["photo.png"] if command == "edit" else []
    assert message in wrong(capsys, command, *told, BLUE, "--guidance-scale", 2, *words.split())


CFG = ("--parallel", "cfg=2")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--source", "a", "--target", "b", *CFG), "is for an instruction, not for --source and --target"),
        (
            (BLUE, *CFG, "--guidance-scale", 1),
            "at --guidance-scale 1 there is no guidance, whose two branches",
        ),
        ((BLUE, *CFG, "--preset", "distill"), "at --guidance-scale 1 there is no guidance"),
        ((BLUE, *CFG, "--step-cache", 0.1), "--step-cache 0.1 does not go with --parallel cfg=2,sequence=1"),
        ((BLUE, *CFG, "--graphs"), "--graphs does not go with --parallel cfg=2,sequence=1"),
    ],
)
def test_what_does_not_go_with_it(words, message, no_work, capsys, monkeypatch):
    monkeypatch.setattr("joyedit.command.arguments.has_graphs", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert message in wrong(capsys, "edit", "photo.png", *words)
    without = [word for word in words if word not in CFG]
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(cli, "make", lambda *_: [])
    assert cli.main(["edit", "photo.png", *map(str, without)]) == 0


@pytest.mark.parametrize("who", ["the checkpoint", "--config-from"])
def test_guidance_that_others_turn_off(who, run, no_work, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(several, "joined", lambda args: contextlib.nullcontext(ALONE))
    words = ["edit", "photo.png", BLUE, *CFG]
    if who == "the checkpoint":
        made_for = MadeFor({"guidance_scale": 1.0})
        monkeypatch.setattr(layouts, "read_made_for", lambda *_, **__: made_for)
    else:
        images.save_png(Image.new("RGB", (8, 8)), "before.png", {"prompt": BLUE, "guidance_scale": 0.5})
        words += ["--config-from", "before.png"]
    status, out, err = run(*words)
    assert (status, out) == (1, "") and "there is no guidance, whose two branches cfg=2 divides" in err


@pytest.mark.parametrize("model", ["tiny-joyimage", "tiny-chronoedit"])
def test_heads_are_counted_before_weights_are_read(model, run, no_work, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(several, "joined", lambda args: contextlib.nullcontext(ALONE))
    words = ("-m", model, "--parallel", "sequence=4")
    for command in (["edit", "photo.png", BLUE], ["batch", ".", BLUE, "--out", "out"]):
        status, out, err = run(*command, *words)
        assert (status, out) == (1, "") and "does not divide the 6 heads of attention: 1, 2, 3, 6 do" in err


def test_more_processes_than_gpus(two, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    for count in (1, 2):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda count=count: count)
        if count == 1:
            with pytest.raises(ValueError, match="this machine has 1: start no more"):
                devices.device_of("cuda")
    assert devices.device_of("cuda") == torch.device("cuda:1") == chosen.pop() and not chosen
    assert devices.device_of("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="several processes have one each: say 'cuda'"):
        devices.device_of("cuda:0")


def test_wrong_words_are_said_once(two, capsys, monkeypatch):
    """The second process leaves it to the first, and says it only if that has nothing to say."""
    heard = []
    monkeypatch.setattr(several.time, "sleep", lambda seconds: heard.append((seconds, capsys.readouterr())))
    message = wrong(capsys, "edit", "photo.png", BLUE, "--colour")
    assert message.startswith("joyedit edit: error: unrecognized arguments: --colour")
    assert heard == [(several.FIRST_SPEAKS, ("", ""))]


def test_a_rank_alone_is_no_second_process(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(several.time, "sleep", lambda seconds: pytest.fail("waits for nobody"))
    assert "unrecognized arguments: --colour" in wrong(capsys, "edit", "photo.png", BLUE, "--colour")
    args = argparse.Namespace(parallel=None, command="edit")
    assert several.misuse(args) is None and started() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert started() == Processes(3, 4) and several.misuse(args)
    assert several.misuse(argparse.Namespace(parallel=None, command="batch")) is None


# What several processes make.


def commanded(folder, *words, given=""):
    """A command in this process, in a folder of its own, with that on standard input: its status, standard
    output, standard error, and the files that are new there."""
    own = Path(folder, str(Processes(int(os.environ["RANK"])).rank))
    own.mkdir(exist_ok=True)
    before = {*os.listdir(own)}
    back, stdin = os.getcwd(), sys.stdin
    os.chdir(own)
    sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode() if os.environ["RANK"] == "0" else b""))
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(io.StringIO()) as err,
        ):
            status = cli.main([str(word) for word in words])
    finally:
        os.chdir(back)
        sys.stdin = stdin
    return status, out.getvalue(), err.getvalue(), sorted({*os.listdir(own)} - before)


SILENT = (0, "", "", [])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-joyimage", "tiny-chronoedit"])
def test_the_first_of_two_makes_the_picture_of_one(model, desk, workers):
    """The second one has neither photograph nor words: it is told both, and the seed that nobody gave."""
    (desk / "0").mkdir()
    photo(desk / "0")
    words = ("edit", "photo.png", "-", "--model", model, *GUIDED)
    first, second = workers.run(
        commanded, desk, *words, *CFG, "--preview", "now.png", "-o", "two.png", given=BLUE
    )
    assert first[:2] == (0, "two.png\n") and first[3] == ["now.png", "two.png"] and second == SILENT
    (seed,) = re.findall(r"^seed (\d+)$", first[2], re.M)
    one = images.read_metadata(desk / "0" / "two.png")
    assert one["seed"] == int(seed) and one["parallel"] == "cfg=2,sequence=1" and one["prompt"] == BLUE

    again = ("edit", "photo.png", "--config-from", "two.png", "-q")
    alone = workers.run(commanded, desk, *again, "-o", "one.png", count=1)
    assert alone == [(0, "one.png\n", "", ["one.png"])]
    other = images.read_metadata(desk / "0" / "one.png")
    assert {**other, "parallel": "cfg=2,sequence=1", "preview": "now.png"} == one
    assert (pixels(desk / "0" / "one.png") == pixels(desk / "0" / "two.png")).all()

    exact = (*again, "--dtype", "float32")
    workers.run(commanded, desk, *exact, "-o", "exact.png", count=1)
    divided = workers.run(commanded, desk, *exact, "--parallel", "sequence=2", "-o", "divided.png")
    assert divided == [(0, "divided.png\n", "", ["divided.png"]), SILENT]
    gap = np.abs(pixels(desk / "0" / "exact.png") - pixels(desk / "0" / "divided.png"))
    assert gap.max() <= 1 and (gap > 0).mean() < 0.01


@pytest.mark.slow
def test_several_photographs_and_a_server_that_is_asked_once_for_each(desk, workers):
    (desk / "0").mkdir()
    for name, size in (("a.png", (96, 80)), ("b.png", (80, 96))):
        photo(desk / "0", name, size)
    with answering() as serve:
        server = serve(rewritten(BLUE))
        words = ("edit", "a.png", "b.png", "blue", *GUIDED, "--seed", 4, "--num-images", 2)
        found = workers.run(commanded, desk, *words, *CFG, "--rewrite", server.base)
        assert len(server.asked) == 2
    names = [f"{photo}-edit-{seed}.png" for photo in "ab" for seed in (4, 5)]
    assert found[0][:2] == (0, "".join(f"{name}\n" for name in names)) and found[1] == SILENT
    told = images.read_metadata(desk / "0" / "b-edit-5.png")
    assert (told["prompt"], told["original_prompt"], told["seed"]) == (BLUE, "blue", 5)
    status, _, err, files = workers.run(commanded, desk, "edit", "b.png", BLUE, *GUIDED, "--seed", 4,
                                        "--num-images", 2, "-o", "alone.png", count=1)[0]  # fmt: skip
    assert status == 0, err
    for file, seed in zip(files, (4, 5), strict=True):
        assert (pixels(desk / "0" / file) == pixels(desk / "0" / f"b-edit-{seed}.png")).all()


@pytest.mark.slow
def test_a_picture_from_text(desk, workers):
    words = ("generate", "A red circle.", *GUIDED, "--seed", 4, "--dtype", "float32", "-q")
    alone = workers.run(commanded, desk, *words, "-o", "alone.png", count=1)
    found = workers.run(commanded, desk, *words, "--parallel", "sequence=2")
    assert alone[0][:2] == (0, "alone.png\n") and found == [
        (0, "generated-4.png\n", "", ["generated-4.png"]),
        SILENT,
    ]
    assert np.abs(pixels(desk / "0" / "alone.png") - pixels(desk / "0" / "generated-4.png")).max() <= 1


# How they end.


class Store:
    """What the store of the processes knows. gone: with the process that kept it."""

    def __init__(self, failed="", gone=False):
        self.failed, self.gone = failed, gone

    def check(self, names):
        assert names == [ending.NOTE]
        if self.gone:
            raise ConnectionError
        return bool(self.failed)

    def compare_set(self, name, expected, value):
        self.failed = self.failed or value
        return self.failed.encode()


@pytest.mark.parametrize(
    ("store", "sent", "status", "said"),
    [
        (Store("0"), [], 1, ""),
        (Store(), [signal.SIGTERM], 143, "ended by SIGTERM while waiting for another process"),
        (Store("0"), [signal.SIGINT], 130, ""),
        (Store(), [], None, ""),
        (Store(gone=True), [], None, ""),
        (Store(), [signal.SIGTERM, ending.LEFT], None, ""),
    ],
    ids=["failed elsewhere", "signal", "signal for all", "nothing", "no store", "ends by itself"],
)
def test_what_ends_a_process_that_waits(store, sent, status, said, monkeypatch, caplog):
    """The thread beside it, with the seconds that the process has to end by itself; those without an end are
    left by their block."""
    monkeypatch.setattr(ending, "LOOK", 0.01)
    monkeypatch.setattr(ending, "GRACE", 0.05 if ending.LEFT not in sent else 60)
    ended, looks = [], threading.Event()

    def exits(status):
        ended.append(status)
        looks.set()

    monkeypatch.setattr(ending.os, "_exit", exits)
    before = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(before)
    with ending.watched(store, 1, at_signals=True):
        told = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(told)
        assert told not in (-1, before)
        for byte in sent:
            os.write(told, bytes([byte]))
        assert looks.wait(60 if status is not None else 0.1) == (status is not None)
    assert ended == ([] if status is None else [status]) and said in caplog.text
    assert ("ended by" in caplog.text) == bool(said) and signal.set_wakeup_fd(before) == before


ONE_FAILS = """
import datetime, os, signal, sys
import torch.distributed as dist
from joyedit.command.cli import main
from joyedit.pipelines.joyimage import JoyImageEditPipeline

plain, steps = JoyImageEditPipeline._step, []

def step(self, *args):
    steps.append(1)
    how = os.environ["HOW"] if len(steps) == 2 else "is well"
    if how == "killed" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises" and os.environ["RANK"] == "1":
        raise ValueError("what is wrong")
    if how != "is well":  # as in NCCL, which does not notice that the other one is gone
        dist.distributed_c10d._get_default_store().wait(["nobody sets this"], datetime.timedelta(hours=1))
    return plain(self, *args)

JoyImageEditPipeline._step = step
sys.exit(main(sys.argv[1:]))
"""


def by_torchrun(desk, how):
    """An edit by two processes, in which this happens to the second: exit status, output, errors."""
    (desk / "script.py").write_text(ONE_FAILS)
    script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["script.py", "edit", "photo.png", BLUE, *GUIDED, *CFG, "--device", "cpu", "-o", "out/two.png"]
    root = str(Path(joyedit.__file__).parents[1])
    done = subprocess.run(
        list(map(str, script + words)),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HOW": how},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stderr.count("\nseed ") == 1, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_torchrun(desk):
    status, out, err = by_torchrun(desk, "is well")
    assert (status, out.split()) == (0, [str(Path("out", "two.png"))]), err
    assert sorted(path.name for path in desk.rglob("*.png")) == ["photo.png", "two.png"]
    assert images.read_metadata("out/two.png")["parallel"] == "cfg=2,sequence=1" and "joyedit:" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said", "own"),
    [
        ("raises", "joyedit: error: what is wrong\n", 1),
        ("killed", "joyedit: ended by SIGTERM while waiting for another process\n", 143),
    ],
    ids=["raises", "killed"],
)
def test_one_that_fails_ends_all(how, said, own, desk):
    """The second one, in the middle of the steps, while the first waits for it in C++ and hears nothing.
    torchrun would kill that after 30 seconds: it ends before, by itself, and leaves nothing."""
    status, out, err = by_torchrun(desk, how)
    assert (status, out) == (1, "")
    assert err.count(said) == 1 and len(re.findall("^joyedit:", err, re.M)) == 1, err
    assert re.findall(r"rank +: 0 .*\n +exitcode +: (-?\d+)", err) == [str(own)], err
    assert sorted(os.listdir(desk)) == ["photo.png", "script.py"]
