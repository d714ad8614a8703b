"""The command line: what it writes, what it records, what it refuses, and what it says.

Most tests call `main` in this process; two start Python, because imports and signals need one of their own.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.command import cli
from joyedit.command.instruction import Instruction
from joyedit.media import images

ROOT = Path(__file__).resolve().parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
QUICK = ("--steps", "1", "-q")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(folder, seed=3)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A gradient, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return gradient("photo.png")


def gradient(name, width=96, height=72):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width, dtype=np.uint8)
    pixels[..., 1] = np.linspace(255, 0, height, dtype=np.uint8)[:, None]
    Image.fromarray(pixels).save(name)
    return name


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def recorded(path):
    return images.read_metadata(path)


# ----------------------------------------------------------------------------------------------------- edit
def test_edit_writes_one_png_that_says_how_it_was_made(photo, run, tmp_path):
    status, out, err = run("edit", photo, "Make it red", "--seed", 7, "--steps", 3, "-m", "tiny-joyimage")
    assert (status, out) == (0, "photo-edit-7.png\n")
    assert "seed 7" in err
    found = recorded("photo-edit-7.png")
    assert (
        found
        | {
            "prompt": "Make it red",
            "seed": 7,
            "num_inference_steps": 3,
            "guidance_scale": 1.0,
            "height": 96,
            "width": 96,
            "model": "tiny-joyimage",
            "dtype": "auto",
            "weights_dtype": "bfloat16",
            "device": "cpu",
            "reference_quirks": False,
            "input": {"name": "photo.png", "sha256": hashlib.sha256(Path(photo).read_bytes()).hexdigest()},
            "pipeline": "JoyImageEditPipeline",
            "scheduler": "FlowMatchEulerDiscreteScheduler",
            "version": joyedit.__version__,
            "torch": torch.__version__,
        }
        == found
    )
    assert pixels("photo-edit-7.png").shape == (96, 96, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photo-edit-7.png", "photo.png"]


def test_metadata_names_the_photograph_without_its_folder(photo, run, tmp_path):
    assert run("edit", tmp_path / photo, "x", "-o", "out.png", *QUICK)[0] == 0
    content = Path("out.png").read_bytes()
    assert str(tmp_path).encode() not in content and b"photo.png" in content


def test_same_seed_gives_the_same_bytes(photo, run):
    for name, seed in (("a.png", 5), ("b.png", 5), ("c.png", 6)):
        assert run("edit", photo, "x", "--seed", seed, "-o", name, *QUICK)[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert (pixels("a.png") != pixels("c.png")).any()


def test_random_seed_is_told_and_recorded(photo, run):
    status, out, err = run("edit", photo, "x", "--steps", 1)
    seed = recorded(out.strip())["seed"]
    assert status == 0 and out == f"photo-edit-{seed}.png\n" and f"seed {seed}\n" in err
    assert run("edit", photo, "x", *QUICK)[1] != out


def test_each_of_several_images_equals_the_run_of_its_own_seed(photo, run, checkpoint):
    options = ("--steps", 2, "--dtype", "fp32", "-q", "-m", checkpoint)
    status, out, _ = run("edit", photo, "x", "--seed", 4, "--num-images", 3, "-o", "many.png", *options)
    assert (status, out.split()) == (0, ["many-4.png", "many-5.png", "many-6.png"])
    for seed in (4, 5, 6):
        assert recorded(f"many-{seed}.png")["seed"] == seed
        assert run("edit", photo, "x", "--seed", seed, "-o", f"one-{seed}.png", *options)[0] == 0
        assert abs(pixels(f"many-{seed}.png") - pixels(f"one-{seed}.png")).max() <= 1
        assert recorded(f"many-{seed}.png") == recorded(f"one-{seed}.png")
    assert abs(pixels("one-4.png") - pixels("one-5.png")).max() > 10
    assert run("edit", photo, "--config-from", "many-5.png", "-o", "again.png", "-q")[0] == 0
    assert pixels("again.png").tolist() == pixels("one-5.png").tolist()


def test_generate_makes_an_image_from_text(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run("generate", "A cat", "--seed", 3, *QUICK)
    assert (status, out) == (0, "generated-3.png\n")
    assert pixels("generated-3.png").shape == (96, 96, 3)
    found = recorded("generated-3.png")
    assert found["prompt"] == "A cat" and "input" not in found
    assert run("generate", "--config-from", "generated-3.png", "-o", "again.png", "-q")[0] == 0
    assert Path("again.png").read_bytes() == Path("generated-3.png").read_bytes()


def test_output_folder_suffixes_and_no_metadata(photo, run):
    Path("out").mkdir()
    assert run("edit", photo, "x", "--seed", 1, "-o", "out", *QUICK)[1] == f"{Path('out/photo-edit-1.png')}\n"
    status, out, err = run("edit", photo, "x", "--seed", 1, "-o", "new/a.jpg", "--steps", 1)
    assert (status, out) == (0, f"{Path('new/a.jpg')}\n") and "carries no parameters" in err
    assert Image.open("new/a.jpg").format == "JPEG"
    assert abs(pixels("new/a.jpg") - pixels("out/photo-edit-1.png")).mean() < 10
    assert run("edit", photo, "x", "-o", "bare.png", "--no-metadata", *QUICK)[0] == 0
    assert Image.open("bare.png").info == {}


def test_photograph_from_a_url(photo, run, monkeypatch):
    content = Path(photo).read_bytes()
    monkeypatch.setattr(images, "download", lambda url, timeout, max_bytes: content)
    url = "https://example.org/a/my%20cat.png?token=secret"
    assert run("edit", url, "x", "--seed", 2, *QUICK)[1] == "my cat-edit-2.png\n"
    digest = hashlib.sha256(content).hexdigest()
    assert recorded("my cat-edit-2.png")["input"] == {"name": "my cat.png", "sha256": digest}
    assert b"secret" not in Path("my cat-edit-2.png").read_bytes()
    assert run("edit", photo, "x", "--seed", 2, *QUICK)[0] == 0
    assert pixels("my cat-edit-2.png").tolist() == pixels("photo-edit-2.png").tolist()


def test_basesize_and_part_reach_the_pipeline(photo, run, checkpoint, monkeypatch):
    seen = {}

    def pretend(system, pipe, call, seeds, args):
        seen.update(buckets=pipe.buckets, vae=pipe.vae.state_dict()["quant_conv.bias"])
        return [{"output": Image.new("RGB", (64, 48))}]

    monkeypatch.setattr(Instruction, "run", pretend)
    part = f"vae={checkpoint}"
    assert run("edit", photo, "x", "--seed", 1, "--basesize", 512, "--part", part, "-q")[0] == 0
    stored = load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    assert seen["buckets"] == images.buckets(512)
    assert torch.equal(seen["vae"], stored["quant_conv.bias"])
    assert recorded("photo-edit-1.png")["basesize"] == 512
    assert recorded("photo-edit-1.png")["parts"] == {"vae": str(checkpoint)}


def test_quiet_says_nothing_and_verbose_shows_the_bar(photo, run):
    assert run("edit", photo, "x", *QUICK)[2] == ""
    assert "denoising: 100%" in run("edit", photo, "x", "--steps", 1, "-v")[2]


# ---------------------------------------------------------------------------------------------- config-from
def test_config_from_repeats_the_run(photo, run, checkpoint):
    first = (
        "--seed",
        9,
        "--steps",
        3,
        "--guidance-scale",
        2.5,
        "--negative-prompt",
        "dull",
        "--dtype",
        "bf16",
    )
    first += (
        "--height",
        320,
        "--width",
        192,
        "--reference-quirks",
        "-o",
        "first.png",
        "-q",
        "-m",
        checkpoint,
    )
    assert run("edit", photo, "Make it red", *first)[0] == 0
    assert pixels("first.png").shape == (320, 192, 3)
    assert run("edit", photo, "--config-from", "first.png", "-o", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path("first.png").read_bytes()
    changed = ("--seed", 10, "--no-reference-quirks", "--steps", 2, "-o", "changed.png", "-q")
    assert run("edit", photo, "Blue", "--config-from", "first.png", *changed)[0] == 0
    assert recorded("changed.png") == recorded("first.png") | {
        "prompt": "Blue",
        "seed": 10,
        "num_inference_steps": 2,
        "reference_quirks": False,
    }


def test_config_from_warns_of_another_photograph_and_lets_its_shape_decide(photo, run, checkpoint):
    assert run("edit", photo, "x", "--seed", 1, "-o", "first.png", "-m", checkpoint, *QUICK)[0] == 0
    tall = gradient("tall.png", 40, 90)
    status, _, err = run("edit", tall, "--config-from", "first.png", "-o", "second.png")
    assert status == 0 and "first.png was made from another photograph (photo.png)" in err
    assert pixels("second.png").shape[0] > pixels("second.png").shape[1]
    assert "another photograph" not in run("edit", photo, "--config-from", "first.png", "-o", "third.png")[2]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "carries no joyedit metadata"),
        ({"prompt": "x", "seed": "five"}, "the recorded seed is damaged: 'five'"),
        ({"prompt": "x", "seed": -1}, "seed -1 is not within"),
        ({"prompt": "x", "basesize": 300}, "base=300"),
        ({"prompt": "x", "input": "photo.png"}, "the recorded input is damaged"),
        ({"seed": 1}, "records no prompt"),
    ],
)
def test_config_from_a_bad_record_is_refused(photo, run, no_work, metadata, message):
    images.save_png(Image.new("RGB", (8, 8)), "bad.png", metadata)
    status, out, err = run("edit", photo, "--config-from", "bad.png", "-q")
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1


def test_config_from_takes_the_model_as_a_whole(photo, run, checkpoint):
    images.save_png(
        Image.new("RGB", (8, 8)),
        "recorded.png",
        {
            "prompt": "x",
            "model": "org/gone",
            "revision": "abc",
            "variant": "fp16",
            "parts": {"vae": "org/vae"},
        },
    )
    words = ("--config-from", "recorded.png", "-m", checkpoint, "--seed", 1, *QUICK)
    assert run("edit", photo, *words)[0] == 0
    assert recorded("photo-edit-1.png")["model"] == str(checkpoint)
    assert not {"revision", "variant", "parts"} & set(recorded("photo-edit-1.png"))


# ----------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("existing", "words"),
    [
        ("out.png", ["-o", "out.png"]),
        ("photo-edit-5.png", ["--seed", "5"]),
        ("out-6.jpg", ["-o", "out.jpg", "--seed", "5", "--num-images", "2"]),
    ],
)
def test_existing_output_is_refused_before_work(photo, run, no_work, existing, words):
    Path(existing).write_text("mine")
    status, out, err = run("edit", photo, "x", *words)
    assert (status, out) == (1, "") and f"{existing} exists: pass --force" in err
    assert Path(existing).read_text() == "mine"


def test_force_replaces(photo, run):
    Path("out.png").write_text("mine")
    assert run("edit", photo, "x", "-o", "out.png", "--force", *QUICK)[0] == 0
    assert Image.open("out.png").size == (96, 96)


ARGUMENT_ERRORS = {
    "": "required: COMMAND",
    "edit": "PHOTO",
    "edit photo.png": "an instruction or prompt is missing",
    "generate": "an instruction or prompt is missing",
    "edit photo.png x --steps 0": "--steps: 0 is not within 1",
    "edit photo.png x --seed -1": "--seed",
    "edit photo.png x --seed 1.5": "--seed: '1.5' is not a whole number",
    "edit photo.png x --guidance-scale nan": "nan is not finite",
    "edit photo.png x --height 64": "both --height and --width",
    "edit photo.png x --height 65 --width 64": "65 is not a multiple of 16",
    "edit photo.png x --basesize 300": "invalid choice",
    "edit photo.png x --dtype int8": "invalid choice",
    "edit photo.png x --offload all": "invalid choice",
    "edit photo.png x --graphs --device cpu": "--graphs needs a CUDA or ROCm device, and --device is 'cpu'",
    "edit photo.png x --graphs --device mps": "--graphs needs a CUDA or ROCm device, and --device is 'mps'",
    "edit photo.png x --graphs --offload model": "--offload model does not go with --graphs",
    "edit photo.png x --part vae": "NAME=PATH",
    "edit photo.png x -o out.gif": "'out.gif' is neither a folder nor ends in",
    "edit photo.png x --stpes 3": "unrecognized arguments: --stpes 3 (did you mean --steps?)",
    "edit photo.png x more": "'x' is no photograph that is here: an instruction of several words goes in",
    "edit photo.png x --mask- m.png": "ambiguous option: --mask- could match --mask-out, --mask-encode-",
    "edit a.png b.png": "an instruction is missing: b.png is a photograph",
    "generate a cat": "unrecognized arguments: cat; a text of several words goes in quotes",
    "convert a": "DST",
    "convert a b --to gguf": "invalid choice",
}


@pytest.mark.parametrize("words", ARGUMENT_ERRORS)
def test_wrong_arguments_end_with_2(words, capsys, no_work):
    with pytest.raises(SystemExit) as ended:
        cli.main(words.split())
    assert ended.value.code == 2
    assert ARGUMENT_ERRORS[words] in capsys.readouterr().err


def test_graphs_need_a_device_for_them(photo, run, no_work, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["x"], ["--config-from", "first.png"]):
        with pytest.raises(SystemExit) as ended:
            run("edit", photo, *words, "--graphs")
        assert ended.value.code == 2
        assert "--graphs needs a CUDA or ROCm device, and PyTorch finds none" in capsys.readouterr().err


def test_graphs_are_enabled_and_recorded_and_not_repeated(photo, run, monkeypatch):
    enabled = []
    monkeypatch.setattr("joyedit.command.arguments.has_graphs", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(joyedit.JoyImageEditPipeline, "enable_graphs", lambda pipe: enabled.append(pipe))
        assert run("edit", photo, "x", "--graphs", "-o", "first.png", *QUICK)[0] == 0
    assert len(enabled) == 1 and recorded("first.png")["graphs"] is True
    assert run("edit", photo, "--config-from", "first.png", "-o", "again.png", *QUICK)[0] == 0
    assert "graphs" not in recorded("again.png") and (pixels("again.png") == pixels("first.png")).all()
    status, _, err = run("edit", photo, "--config-from", "first.png", "-o", "third.png", "--graphs", *QUICK)
    device = recorded("first.png")["device"]  # it is repeated, and contradicts
    assert status == (0 if device == "cuda" else 1)
    assert device == "cuda" or f"--graphs needs a CUDA or ROCm device, and --device is {device!r}" in err


def test_instruction_may_follow_the_options(photo, run):
    assert run("edit", photo, "--seed", 1, *QUICK, "Make it red")[0] == 0
    assert recorded("photo-edit-1.png")["prompt"] == "Make it red"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("edit gone.png x", "'gone.png' does not exist"),
        ("edit notes.txt x", "'notes.txt' is not in an image format"),
        ("edit photo.png x -m ./gone", "does not exist"),
        ("edit photo.png x -m empty", "no checkpoint that joyedit knows"),
        ("edit photo.png x -m broken", "was cut off"),
        ("edit photo.png x --part lens=a", "unknown argument ['lens']"),
        ("edit photo.png x -o notes.txt/out.png", "no folder that you may write to"),
        ("edit photo.png x --config-from gone.png", "gone.png does not exist"),
        ("convert gone new", "gone"),
        ("info gone.png", "gone.png does not exist"),
        ("info photo.png", "carries no joyedit metadata"),
        ("info notes.txt", "not of weights"),
        ("info broken", "was cut off"),
    ],
)
def test_known_errors_are_one_line(photo, run, checkpoint, words, message):
    Path("notes.txt").write_text("no picture")
    Path("empty").mkdir()
    shutil.copytree(checkpoint, "broken")
    weights = Path("broken/vae/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    before = sorted(Path().rglob("*"))
    status, out, err = run(*words.split(), "-q")
    assert (status, out) == (1, "")
    assert err.startswith("joyedit: error: ") and err.count("\n") == 1 and message in err
    assert sorted(Path().rglob("*")) == before


def test_verbose_adds_the_traceback_and_a_defect_always_has_it(photo, run, monkeypatch):
    assert "Traceback" in run("edit", "gone.png", "x", "-v")[2]

    def fail(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Instruction, "run", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run("edit", photo, "x", "-q")


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("a\nb"), MemoryError(), RuntimeError("[enforce] can't allocate memory: 9")],
)
def test_out_of_memory_says_what_to_try(photo, run, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(Instruction, "run", fail)
    status, _, err = run("edit", photo, "x", "-q")
    assert status == 1 and "out of memory: try --offload model" in err and err.count("\n") == 1


IMPORTS_NOTHING = """
import sys
from joyedit.command.cli import main
wrong = ["edit"], ["edit", "a.png"], ["edit", "a.png", "x", "--steps", "0"]
for words in (["--help"], ["--version"], ["edit", "--help"], *wrong):
    try:
        main(words)
    except SystemExit as ended:
        assert ended.code == (0 if words[-1] in ("--help", "--version") else 2), words
heavy = {"torch", "numpy", "PIL", "safetensors", "huggingface_hub", "tqdm"}
print("loaded:", sorted(heavy & set(sys.modules)))
"""


def test_help_version_and_argument_errors_load_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", IMPORTS_NOTHING], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"joyedit {joyedit.__version__}" in done.stdout and "loaded: []" in done.stdout


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT between processes")
def test_ctrl_c_while_denoising_ends_with_130_and_leaves_no_file(photo, tmp_path):
    command = [sys.executable, "-m", "joyedit", "edit", photo, "x", "--steps", "5000", "-v", "-o", "out.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    ) as process:
        assert process.stderr and process.stdout
        seen = b""
        while b"/5000 [" not in seen.rpartition(b"denoising: ")[2] or b" 0/5000" in seen.rpartition(b"\r")[2]:
            chunk = os.read(process.stderr.fileno(), 4096)
            assert chunk, seen
            seen += chunk
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert err.endswith(b"joyedit: interrupted\n") and b"Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


# ------------------------------------------------------------------------------------------ info and the hub
def test_info_about_an_image_and_the_built_in_model(photo, run):
    assert run("edit", photo, "Ünïcode", "--seed", 1, *QUICK)[0] == 0
    lines = run("info", "photo-edit-1.png")[1].splitlines()
    assert {"prompt: Ünïcode", "seed: 1", "num_inference_steps: 1"} <= set(lines)
    assert json.loads(run("info", "photo-edit-1.png", "--json")[1]) == recorded("photo-edit-1.png")
    assert run("info", "tiny-joyimage")[1].startswith("name: tiny-joyimage\n")


@pytest.fixture
def hub_cache(checkpoint, tmp_path):
    """A download cache that holds the checkpoint as org/tiny."""
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(checkpoint, repository / "snapshots" / SHA)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    return tmp_path / "hub"


def test_commit_of_a_hub_model_is_recorded_and_repeated(photo, run, hub_cache):
    words = ("--offline", "--cache-dir", hub_cache, "-q")
    status, out, err = run("edit", photo, "x", "-m", "org/tiny", "--steps", 1, "-o", "a.png", *words)
    assert status == 0, err
    assert recorded("a.png")["model"] == "org/tiny" and recorded("a.png")["revision"] == SHA
    (hub_cache / "models--org--tiny" / "refs" / "main").unlink()  # the branch has moved on, say
    assert run("edit", photo, "--config-from", "a.png", "-o", "b.png", *words)[0] == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    found = json.loads(run("info", "org/tiny", "--revision", SHA, "--json", *words)[1])
    assert found["revision"] == SHA and found["parameters"] and found["licence"] == "apache-2.0"


def test_reader_that_goes_away_is_no_error(monkeypatch, capfd):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return os.dup(1)

    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["info", "--json"]) == 1
    monkeypatch.undo()
    assert capfd.readouterr().err == ""
