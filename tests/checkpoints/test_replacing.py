"""Files and folders that appear whole or not at all: whatever stops the process, old or new is there."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from joyedit.checkpoints.replacing import PREFIX, clear_remains, replacing, replacing_all, replacing_folder

ROOT = Path(__file__).resolve().parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_under_its_own_name(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.name == path.name and not path.exists()
    assert path.read_text() == "new" and names(path.parent) == ["a.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("length", [200, 255])
def test_the_longest_names_have_room(tmp_path, length):
    path = tmp_path / ("x" * (length - 4) + ".txt")
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_and_nothing_lost_after_a_failure(tmp_path, error):
    old = tmp_path / "old.txt"
    old.write_text("old")
    with pytest.raises(error), replacing_all([old, tmp_path / "new.txt"]) as (first, second):
        first.write_text("half")
        second.write_text("half")
        raise error
    assert names(tmp_path) == ["old.txt"] and old.read_text() == "old"


def test_several_files_appear_together_and_older_ones_go(tmp_path):
    paths = [tmp_path / "a" / "1.txt", tmp_path / "b" / "2.txt"]
    older = tmp_path / "a" / "0.txt"
    older.parent.mkdir()
    older.write_text("old")
    with replacing_all(paths, removing=[older]) as temporaries:
        for temporary in temporaries:
            temporary.write_text("new")
        assert older.exists() and not any(path.exists() for path in paths)
    assert not older.exists() and [path.read_text() for path in paths] == ["new", "new"]


@pytest.mark.parametrize("what", ["file", "folder", "dangling link", "looping link"])
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_without_force_nothing_that_is_there_is_replaced(tmp_path, what, when):
    path = tmp_path / "a.txt"

    def appear():
        if what == "file":
            path.write_text("old")
        elif what == "folder":
            path.mkdir()
        else:
            path.symlink_to(path if what == "looping link" else tmp_path / "nowhere")

    if when == "before":
        appear()
    with pytest.raises(FileExistsError, match=r"a\.txt"), replacing(path, force=False) as temporary:
        temporary.write_text("new")
        appear()
    assert names(tmp_path) == ["a.txt"] and not (tmp_path / "nowhere").exists()
    assert path.is_dir() if what == "folder" else path.is_symlink() or path.read_text() == "old"


def test_without_links_a_name_is_still_taken_only_once(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "no links on this file system")

    monkeypatch.setattr(os, "link", refused)
    with replacing(tmp_path / "a", force=False) as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    with pytest.raises(FileExistsError), replacing(tmp_path / "b", force=False) as temporary:
        temporary.write_text("new")
        (tmp_path / "b").write_text("theirs")
    assert (tmp_path / "b").read_text() == "theirs"


def fill(folder, text):
    folder.mkdir()
    (folder / "weights").write_text(text)


@pytest.mark.parametrize("at_once", [True, False], ids=["swapped", "moved away and in"])
def test_a_folder_takes_the_place_of_one_that_may_be_replaced(tmp_path, monkeypatch, at_once):
    target = tmp_path / "checkpoint"
    if not at_once:
        monkeypatch.setattr("joyedit.checkpoints.replacing.swap", lambda one, other: False)
    for text in ("first", "second"):
        with replacing_folder(target, may_replace=lambda folder: None) as temporary:
            fill(temporary, text)
        assert (target / "weights").read_text() == text and names(tmp_path) == ["checkpoint"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot exchange folders")
def test_there_is_a_folder_at_every_moment(tmp_path):
    """What SIGKILL would leave at any call that the system is asked for."""
    target, missing = tmp_path / "checkpoint", []
    fill(target, "old")
    watching = True

    def watch(event, args):
        if watching and event.startswith(("os.", "open", "shutil.", "ctypes.")):
            missing.extend([event] * (not (target / "weights").exists()))

    with replacing_folder(target, may_replace=lambda folder: None) as temporary:
        fill(temporary, "new")
        sys.addaudithook(watch)
    watching = False
    assert (target / "weights").read_text() == "new" and not missing


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with replacing_folder(tmp_path / "checkpoint") as temporary:
        fill(temporary, "new")
    assert (tmp_path / "checkpoint" / "weights").read_text() == "new"


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_folder_with_work_in_it_stays(tmp_path, when):
    target = tmp_path / "checkpoint"

    def refuse(folder):
        raise FileExistsError(f"{folder} holds {names(folder)[0]}")

    def appear():
        target.mkdir()
        (target / "thesis.tex").write_text("mine")

    for may_replace in (None, refuse):
        if when == "before" and not target.exists():
            appear()
        with pytest.raises(FileExistsError), replacing_folder(target, may_replace) as temporary:
            fill(temporary, "new")
            if not target.exists():
                appear()
        assert names(tmp_path) == ["checkpoint"] and names(target) == ["thesis.tex"]


def test_one_of_two_that_fill_the_same_folder_wins(tmp_path):
    target = tmp_path / "checkpoint"
    with pytest.raises(FileExistsError), replacing_folder(target) as temporary:
        fill(temporary, "first")
        with replacing_folder(target) as other:
            fill(other, "second")
    assert (target / "weights").read_text() == "second"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_takes_the_place_of_nothing_else(tmp_path, kind):
    target = tmp_path / "checkpoint"
    target.write_text("mine") if kind == "file" else target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match=kind), replacing_folder(target, lambda folder: None):
        pytest.fail("the work began")


STUCK = """
import sys
from pathlib import Path
from joyedit.checkpoints.replacing import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_what_a_dead_process_left_is_cleared_and_what_a_live_one_makes_is_not(tmp_path):
    command = [sys.executable, "-c", STUCK, str(tmp_path / "theirs")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    for alive in (True, False):
        with replacing(tmp_path / f"mine-{alive}") as temporary:
            temporary.write_text("new")
        hidden = [name for name in names(tmp_path) if name.startswith(PREFIX)]
        assert len(hidden) == alive
        process.kill()
        process.communicate()
    assert names(tmp_path) == ["mine-False", "mine-True"]


@pytest.mark.parametrize("replaced_by", ["nobody", "somebody"])
def test_a_folder_that_was_being_replaced_comes_back(tmp_path, replaced_by):
    left = tmp_path / f"{PREFIX}dead"
    (left / "made").mkdir(parents=True)
    (left / "replaced").mkdir()
    fill(left / "replaced" / "checkpoint", "old")
    if replaced_by == "somebody":
        fill(tmp_path / "checkpoint", "new")
    clear_remains(tmp_path)
    assert names(tmp_path) == ["checkpoint"]
    assert (tmp_path / "checkpoint" / "weights").read_text() == {"nobody": "old"}.get(replaced_by, "new")


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="thesis.txt cannot be written") as caught:
        with replacing(tmp_path / "thesis.txt") as temporary:
            temporary.write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC and names(tmp_path) == []


@pytest.mark.parametrize("writer", ["safetensors", "torch"])
def test_a_full_disk_names_the_file_whoever_writes(tmp_path, writer):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tensors = {"a": torch.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"weights\.bin cannot be written"):
            with replacing(tmp_path / "weights.bin") as temporary:
                save_file(tensors, temporary) if writer == "safetensors" else torch.save(tensors, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


def test_other_threads_write_too(tmp_path):
    def work(number):
        with replacing(tmp_path / f"{number}") as temporary:
            temporary.write_text(str(number))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == sorted(map(str, range(8)))


# A forked child is sent a signal at its n-th audit event, for every n.
AT_EVERY_EVENT = """
import os, signal, sys
from pathlib import Path
from joyedit.checkpoints.replacing import replacing_all, replacing_folder

base, number = Path(sys.argv[1]), getattr(signal, sys.argv[2])
state = {"left": None}

def hook(event, args):
    if state["left"] is not None and event.split(".")[0] in ("open", "os", "shutil", "tempfile", "fcntl"):
        state["left"] -= 1
        if state["left"] == 0:
            os.kill(os.getpid(), number)

class Ended(BaseException):
    pass

def end(*_):
    raise Ended

def work(folder):
    with replacing_all([folder / "a", folder / "b"], force=True) as (a, b):
        a.write_text("new")
        b.write_text("new")
    with replacing_folder(folder / "c", lambda _: None) as made:
        made.mkdir()
        (made / "d").write_text("new")

sys.addaudithook(hook)
n = 0
while True:
    n += 1
    folder = base / str(n)
    (folder / "c").mkdir(parents=True)
    for name in ("a", "b", "c/d"):
        (folder / name).write_text("old")
    child = os.fork()
    if child == 0:
        if number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end)
        try:
            state["left"] = n
            work(folder)
            reached = state["left"] > 0
            state["left"] = None
            os._exit(0 if reached else 3)
        except (KeyboardInterrupt, Ended):
            state["left"] = None
        os._exit(3)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(n, status, *sorted(os.listdir(folder)), *[(folder / p).read_text() if (folder / p).exists() else "-"
          for p in ("a", "b", "c/d")], flush=True)
    if status == 0:
        break
"""


@pytest.mark.parametrize(
    "name",
    ["SIGINT", "SIGKILL", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGHUP"))],
)
def test_a_signal_at_any_moment_leaves_the_old_or_the_new(tmp_path, name):
    command = [sys.executable, "-c", AT_EVERY_EVENT, str(tmp_path), name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 20 and lines[-1][1] == "0"
    seen = set()
    for number, status, *rest in lines:
        found, (a, b, d) = rest[:-3], rest[-3:]
        if name == "SIGKILL" and status != "0":
            assert status == str(-signal.SIGKILL)
            clear_remains(tmp_path / number)
            found = names(tmp_path / number)
            d = (tmp_path / number / "c" / "d").read_text()
            assert {a, b} <= {"old", "new"}
        else:
            assert a == b  # together
        assert found == ["a", "b", "c"] and {a, b, d} <= {"old", "new"}, (number, rest)
        seen.add((a, d))
    assert seen >= {("old", "old"), ("new", "old"), ("new", "new")}
