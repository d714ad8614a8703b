"""Nothing of a user is lost: what a command replaces, what stops it, and names and consoles that are odd."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from joyedit.checkpoints.replacing import PREFIX
from joyedit.command import cli
from joyedit.command.instruction import Instruction
from joyedit.loading import layouts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Edits take no time: the result is one colour."""

    def run(self, pipe, call, seeds, args):
        for seed in seeds:
            yield {"output": Image.new("RGB", (32, 16), (seed % 256, 0, 0))}

    monkeypatch.setattr(Instruction, "run", run)


def photo(name="photo.png"):
    Image.linear_gradient("L").resize((48, 48)).convert("RGB").save(name, format="PNG")
    return name


def tree(folder="."):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


def weights(name):
    (file,) = Path(name, "unet").glob("*.safetensors")
    return file.stat().st_mtime_ns


# What convert --force may replace.


def test_force_replaces_a_checkpoint(run):
    assert run("convert", "tiny-diffedit", "ck")[0] == 0
    before = weights("ck")
    assert run("convert", "tiny-diffedit", "ck")[0] == 1 and weights("ck") == before
    assert run("convert", "tiny-diffedit", "ck", "--force")[0] == 0 and weights("ck") > before
    assert tree()[0] == "ck" and not list(Path().glob(f"{PREFIX}*"))


@pytest.mark.parametrize("stranger", ["README.md", ".git/HEAD", "vae/thesis.tex", "loras/style.safetensors"])
def test_force_never_takes_what_is_no_part_of_a_checkpoint(run, no_work, stranger):
    path = Path("ck", stranger)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    Path("ck/model_index.json").write_text("{}")
    status, _, err = run("convert", "tiny-diffedit", "ck", "--force")
    assert status == 1 and stranger in err and path.read_text() == "mine"


def test_force_never_takes_other_models_of_a_comfyui_tree(run, no_work):
    for name in ("diffusion_models/flux.safetensors", "vae/ae.safetensors", "text_encoders/t5.safetensors"):
        Path("models", name).parent.mkdir(parents=True)
        Path("models", name).write_text("mine")
    status, _, err = run("convert", "tiny-joyimage", "models", "--to", "comfyui", "--force")
    assert status == 1 and ".safetensors" in err and "move it away" in err
    assert len([path for path in tree("models") if path.endswith(".safetensors")]) == 3


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_folder_that_appears_meanwhile_stays(run, monkeypatch, force):
    save = layouts.save_checkpoint

    def slow(*args, **kwargs):
        save(*args, **kwargs)
        Path("ck").mkdir()
        Path("ck/thesis.tex").write_text("mine")

    monkeypatch.setattr(layouts, "save_checkpoint", slow)
    status, out, err = run("convert", "tiny-diffedit", "ck", *force)
    assert status == 1 and out == "" and "ck" in err
    assert tree() == ["ck", "ck/thesis.tex"]


@pytest.mark.parametrize("target", ["nowhere", "ck"], ids=["dangling", "looping"])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_link_to_nothing_stays(run, no_work, target, force):
    Path("ck").symlink_to(target)
    status, _, err = run("convert", "tiny-diffedit", "ck", *force)
    assert status == 1 and "link" in err and os.readlink("ck") == target


def test_behind_a_link_to_a_folder_the_folder_is_replaced(run):
    assert run("convert", "tiny-diffedit", "real")[0] == 0
    before = weights("real")
    Path("ck").symlink_to("real")
    assert run("convert", "tiny-diffedit", "ck", "--force")[0] == 0
    assert Path("ck").is_symlink() and weights("real") > before


@pytest.mark.parametrize("output", ["dangling.png", "looping.png"])
def test_a_result_takes_no_link_without_force(run, no_work, output):
    Path(output).symlink_to(output if "looping" in output else "nowhere.png")
    status, _, err = run("edit", photo(), "x", "-o", output)
    assert status == 1 and output in err and Path(output).is_symlink() and not Path("nowhere.png").exists()


def test_a_result_takes_no_file_that_appears_meanwhile(run, monkeypatch):
    def slow(self, pipe, call, seeds, args):
        Path("a.png").write_text("mine")
        yield {"output": Image.new("RGB", (8, 8))}

    monkeypatch.setattr(Instruction, "run", slow)
    status, out, err = run("edit", photo(), "x", "-o", "a.png")
    assert status == 1 and out == "" and "a.png exists" in err and Path("a.png").read_text() == "mine"


# Names and consoles.


@pytest.mark.parametrize("letter", ["x", "é", "字"])
@pytest.mark.parametrize("length", [200, 240, 251])
def test_long_names_of_photographs(run, quick, letter, length):
    name = letter * (length // len(letter.encode())) + ".png"
    status, out, _ = run("edit", photo(name), "x", "--seed", 2**63 - 1)
    (printed,) = out.splitlines()
    assert status == 0 and Path(printed).is_file() and Path(printed).name.endswith(f"-edit-{2**63 - 1}.png")
    assert name.startswith(Path(printed).name.partition("-edit-")[0])


@pytest.mark.parametrize("words", [("-o", "x" * 252 + ".png"), ("-o", "a.png", "--num-images", 2)])
def test_names_without_room_are_refused_before_the_work(run, no_work, words):
    words = ["x" * 250 + ".png" if word == "a.png" else word for word in words]
    status, _, err = run("edit", photo(), "x", *words, "--seed", 1)
    assert status == 1 and "too long" in err


@pytest.mark.parametrize(
    "output", [".png", "here/.JPG", "~nobody-of-that-name/a.png", "~nobody-of-that-name"]
)
def test_outputs_that_are_no_name(run, no_work, output, capsys):
    with pytest.raises(SystemExit) as ended:
        run("edit", photo(), "x", "-o", output)
    assert ended.value.code == 2 and output.split("/")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [("edit", "~nobody-of-that-name/a.png", "x"), ("info", "~nobody-of-that-name")]
)
def test_the_home_of_nobody_is_an_error_of_one_line(run, no_work, words):
    status, _, err = run(*words)
    assert status == 1 and "nobody-of-that-name" in err and "Traceback" not in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_console_without_the_letters_loses_no_picture(quick, monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    words = ["edit", photo("кошка.png"), "x", "--num-images", "3", "--seed", "1"]
    assert cli.main(words) == 0
    assert len(list(Path().glob("кошка-edit-*.png"))) == 3
    printed = out.buffer.getvalue().decode(encoding).splitlines()
    assert len(printed) == 3 and all(line.endswith(".png") for line in printed)
    assert cli.main(["info", str(next(Path().glob("кошка-edit-*.png")))]) == 0


def test_a_reader_that_went_away_loses_no_picture(quick, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["edit", photo(), "x", "--num-images", "3", "--seed", "1"]) == 1
    assert len(list(Path().glob("photo-edit-*.png"))) == 3


# Signals.

AT_EVENTS = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from joyedit.command import cli

number, step, first = getattr(signal, sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
left = [None]

def hook(event, args):
    if event == "open" and args[1] in ("r", "rb"):
        return  # reading changes nothing
    if left[0] is not None and event.split(".")[0] in ("open", "os", "shutil", "tempfile"):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

sys.addaudithook(hook)
convert = ["convert", "tiny-diffedit", "ck", "--force", "-q"]
assert cli.main(convert) == 0
n = first
while True:
    child = os.fork()
    if child == 0:
        left[0] = n
        status = cli.main(convert)
        reached, left[0] = left[0] <= 0, None
        os._exit(status if reached else 99)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = sorted(os.listdir())
    whole = sum(len(files) for _, _, files in os.walk("ck"))
    print(n, status, whole, *found, flush=True)
    if status == 99:
        break
    n += step
"""


def at_events(name, step, first=1):
    command = [sys.executable, "-c", AT_EVENTS, name, str(step), str(first)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if line[0].isdigit()]
    assert len(lines) > 3
    files = {int(line[2]) for line in lines}
    assert len(files) == 1 and files.pop() > 8  # a whole checkpoint, each time
    for n, status, _, *found in lines[:-1]:
        if name == "SIGKILL":
            assert status == str(-signal.SIGKILL)
        else:
            assert status in ("0", str(128 + getattr(signal, name))) and found == ["ck"], (n, status, found)
    assert lines[-1][3:] == ["ck"]  # what a killed one left is swept by the next


@pytest.mark.parametrize("name", ["SIGTERM"])
def test_a_conversion_that_is_stopped_leaves_the_old_or_the_new(name):
    at_events(name, 97)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 3), ("SIGKILL", 3), ("SIGINT", 10), ("SIGHUP", 11)])
def test_a_conversion_that_is_stopped_at_any_event_leaves_the_old_or_the_new(name, step):
    at_events(name, step)


LEFT_BY_A_KILLED_ONE = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import joyedit
from joyedit.command import cli

to, step = sys.argv[1], int(sys.argv[2])
left = [None]

def hook(event, args):
    if left[0] is not None and (event.startswith("os.") or event == "open" and args[1] not in ("r", "rb")):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}

sys.addaudithook(hook)
quantised = to == "int8_convrot"
to = "comfyui" if quantised else to
convert = ["convert", "tiny-joyimage", "ck", "--to", to, "-q", *["--quantize", "int8_convrot"] * quantised]
assert cli.main([*convert[:2], "whole", *convert[3:]]) == 0
whole, n = files(Path("whole")), step
while True:
    child = os.fork()
    if child == 0:
        left[0] = n
        cli.main(convert)
        os._exit(99)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 99:
        break
    n += step
    if Path("ck").exists():
        continue
    for folder in Path().glob(".joyedit-*/made/ck"):
        try:
            joyedit.load(folder, device="cpu", **({"processor": "tiny-joyimage"} if to == "comfyui" else {}))
        except (OSError, ValueError):
            print("refused", len(files(folder)), flush=True)
        else:
            print("opened", files(folder) == whole, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("to", ["diffusers", "original", "comfyui", "int8_convrot"])
def test_what_a_killed_conversion_leaves_does_not_open(to):
    """Until all of it is there, even in its hidden place."""
    command = [sys.executable, "-c", LEFT_BY_A_KILLED_ONE, to, "25"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert "opened False" not in lines and len({line for line in lines if line.startswith("refused")}) > 2
    assert Path("ck").is_dir()
