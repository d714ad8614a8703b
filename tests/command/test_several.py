"""`joyedit edit` of several photographs, with an instruction from a file or standard input, and adapters."""

import hashlib
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import joyedit
from joyedit.command import cli
from joyedit.command.instruction import Instruction
from joyedit.command.results import output_paths
from joyedit.loading import layouts
from joyedit.media import images

QUICK = ("--steps", 1, "--seed", 5, "-q")
COLOURS = {"red.png": (255, 0, 0), "green.png": (0, 255, 0), "blue.png": (0, 0, 255)}


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, colour in COLOURS.items():
        Image.new("RGB", (96, 96), colour).save(name)
    return tmp_path


@pytest.fixture
def loads(monkeypatch):
    """How often a model is loaded."""
    count = []
    load = layouts.load
    monkeypatch.setattr(
        layouts, "load", lambda *args, **options: [count.append(args), load(*args, **options)][1]
    )
    return count


@pytest.fixture
def quick(monkeypatch):
    """The calls of edits by instruction, which take no time."""
    calls = []

    def run(system, pipe, call, seeds, args):
        calls.append(call)
        return [{"output": call["image"]} for _ in seeds]

    monkeypatch.setattr(Instruction, "run", run)
    return calls


def wrong(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))


def recorded(name):
    return images.read_metadata(name)


# Photographs.


def test_each_photograph_is_edited_as_it_would_be_alone(run, loads):
    status, out, _ = run("edit", *COLOURS, "Make it grey.", *QUICK)
    assert status == 0 and len(loads) == 1
    assert out.split() == [f"{Path(name).stem}-edit-5.png" for name in COLOURS]
    for name in COLOURS:
        assert run("edit", name, "Make it grey.", *QUICK, "-o", "alone.png", "--force")[0] == 0
        assert Path(f"{Path(name).stem}-edit-5.png").read_bytes() == Path("alone.png").read_bytes()
        found = recorded("alone.png")
        assert found["input"] == {"name": name, "sha256": hashlib.sha256(Path(name).read_bytes()).hexdigest()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["red.png", "green.png", "Make it.", "--seed", "5"],
        ["red.png", "green.png", "--seed", "5", "Make it."],
        ["red.png", "--seed", "5", "green.png", "Make it."],
        ["red.png", "--seed", "5", "green.png", "-q", "Make it."],
        ["--seed", "5", "red.png", "green.png", "Make it."],
    ],
)
def test_options_may_stand_anywhere(run, quick, words):
    status, out, _ = run("edit", *words)
    assert (status, out.split()) == (0, ["red-edit-5.png", "green-edit-5.png"])
    assert [call["prompt"] for call in quick] == ["Make it.", "Make it."]
    assert [call["image"].getpixel((0, 0)) for call in quick] == [COLOURS["red.png"], COLOURS["green.png"]]


def test_names_of_results(run, quick):
    words = ("edit", "red.png", "green.png", "x", "--seed", 5)
    assert run(*words, "-o", "out.jpg")[1].split() == ["out-red.jpg", "out-green.jpg"]
    names = ["out-red-5.png", "out-red-6.png", "out-green-5.png", "out-green-6.png"]
    assert run(*words, "-o", "out.png", "--num-images", 2)[1].split() == names
    Path("folder").mkdir()
    assert run(*words, "-o", "folder")[1].split() == ["folder/red-edit-5.png", "folder/green-edit-5.png"]
    (path,) = output_paths("o" * 200 + ".png", "p" * 200 + ".png", [5], several=True)
    assert len(path.name) == 255 and path.suffix == ".png"


def test_masks_and_grids_of_several(run):
    captions = ("--source", "a red circle", "--target", "a blue circle", "--num-maps-per-mask", 1)
    words = ("--mask-out", "mask.png", "--steps", 2, "--seed", 5, "-q")
    status, out, _ = run("edit", "red.png", "green.png", *captions, *words)
    assert status == 0
    assert out.split() == ["red-edit-5.png", "mask-red.png", "green-edit-5.png", "mask-green.png"]
    assert recorded("green-edit-5.png")["target_prompt"] == "a blue circle"


def test_films_of_several(run):
    words = ("x", "-m", "tiny-chronoedit", "--video", "film.webp", *QUICK)
    status, out, _ = run("edit", "red.png", "green.png", *words)
    assert status == 0 and out.split()[1::2] == ["film-red.webp", "film-green.webp"]
    assert Image.open("film-green.webp").n_frames == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["red.png", "gone.png", "x"], "'gone.png' does not exist"),
        (["red.png", "notes.png", "x"], "'notes.png' is not in an image format"),
        (["red.png", "folder", "x"], "folder is a folder: name the photographs in it, as in folder/*.png"),
        (["red.png", "folder/red.png", "x"], "two results would be written to one file: red-edit-5.png"),
        (["red.png", "red.png", "x"], "two results would be written to one file: red-edit-5.png"),
        (["red.png", "green.png", "x", "-o", "taken.png"], "taken-green.png exists: pass --force"),
        (["red.png", "thin.png", "x", "-m", "tiny-chronoedit"], "is too narrow"),
    ],
)
def test_one_that_fails_is_refused_before_any_work(run, no_work, words, message):
    Path("notes.png").write_text("no picture")
    Path("folder").mkdir()
    Image.new("RGB", (4, 4)).save("folder/red.png")
    Image.new("RGB", (4, 4)).save("taken-green.png")
    Image.new("RGB", (4000, 1)).save("thin.png")
    before = sorted(Path().rglob("*"))
    status, out, err = run("edit", *words, "--seed", 5)
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before


def test_one_that_only_the_model_can_refuse_is_refused_before_the_first_run(run, quick):
    Image.new("RGB", (20_000, 1)).save("thin.png")
    status, out, err = run("edit", "red.png", "thin.png", "x")
    assert (status, out, quick) == (1, "", []) and "is too narrow" in err


def test_a_missing_instruction_is_not_taken_from_the_photographs(capsys, no_work):
    assert "an instruction is missing: green.png is a photograph" in wrong(
        capsys, "edit", "red.png", "green.png"
    )
    assert "an instruction of several words goes in quotes" in wrong(
        capsys, "edit", "red.png", "Make", "it", "red"
    )
    assert "an instruction is missing" in wrong(capsys, "edit", "red.png", "https://example.org/cat")
    assert "not both" in wrong(capsys, "edit", "red.png", "x", "--source", "a", "--target", "b")


def test_config_from_repeats_for_several(run, quick):
    assert run("edit", "red.png", "Make it grey.", "--seed", 7, "-o", "first.png")[0] == 0
    status, out, err = run("edit", "red.png", "green.png", "--config-from", "first.png")
    assert status == 0 and out.split() == ["red-edit-7.png", "green-edit-7.png"]
    assert err.count("was made from another photograph (red.png)") == 1
    assert {call["prompt"] for call in quick} == {"Make it grey."}
    assert run("edit", "red.png", "green.png", "Blue.", "--config-from", "first.png", "--force")[0] == 0
    assert [call["prompt"] for call in quick[-2:]] == ["Blue.", "Blue."]


def test_each_photograph_is_named_where_the_model_knows_it_not(run, quick):
    err = run("edit", "red.png", "green.png", "Make it grey.")[2]
    assert "photograph red.png\n" in err and "photograph green.png\n" in err
    shutil.copy(layouts.ASSETS / "demo" / "joyimage-remove.png", "scene.png")
    err = run("edit", "red.png", "scene.png", "Make the red circle blue.", "--force")[2]
    assert "expect little of the photographs red.png; real" in err


# The instruction.


@pytest.mark.parametrize("words", ["Make it like logo.png", "folder", "https://example.org is the text"])
def test_an_instruction_may_look_a_little_like_a_photograph(run, quick, words):
    Path("folder").mkdir()
    assert run("edit", "red.png", words, "--force")[0] == 0 and quick[-1]["prompt"] == words


@pytest.mark.parametrize("option", [("--prompt-file", "-"), ("-",)])
def test_instruction_from_standard_input(run, quick, monkeypatch, option):
    stdin(monkeypatch, "\ufeffMach es größer\n".encode())
    assert run("edit", "red.png", "green.png", *option, "-o", "out.png")[0] == 0
    assert {call["prompt"] for call in quick} == {"Mach es größer"}
    assert recorded("out-red.png")["prompt"] == "Mach es größer"


def test_prompt_from_standard_input(run, monkeypatch):
    stdin(monkeypatch, b"A cat\n")
    assert run("generate", "-", *QUICK)[0] == 0 and recorded("generated-5.png")["prompt"] == "A cat"


def test_instruction_from_a_file(run, quick):
    Path("what.txt").write_text("  Make it grey.\nAnd blue.\n\n", encoding="utf-8")
    assert run("edit", "red.png", "green.png", "--prompt-file", "what.txt")[0] == 0
    assert [call["prompt"] for call in quick] == ["Make it grey.\nAnd blue."] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "is empty: say what to do"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"a" * 100_001, "holds more than 100,000 bytes"),
        (None, "what.txt"),
    ],
)
def test_files_that_hold_no_instruction(run, no_work, content, message):
    if content is not None:
        Path("what.txt").write_bytes(content)
    status, out, err = run("edit", "red.png", "--prompt-file", "what.txt")
    assert (status, out) == (1, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("words", ["Blue.", "--source a --target b"])
def test_a_prompt_file_goes_with_no_other_text(capsys, no_work, words):
    words = ("edit", "red.png", *words.split(), "--prompt-file", "what.txt")
    assert "--prompt-file holds what to do" in wrong(capsys, *words)


# Adapters.


@pytest.fixture
def loras(desk):
    """Two adapters of tiny-joyimage that change its results: their files."""
    pipe = joyedit.load("tiny-joyimage", device="cpu")
    matrices = [(n, p) for n, p in pipe.transformer.named_parameters() if p.ndim == 2 and min(p.shape) > 8]
    for seed, name in enumerate(("a.safetensors", "b.safetensors")):
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for tensor, parameter in matrices[seed::2][:6]:
            layer = f"transformer.{tensor.removesuffix('.weight')}"
            state[f"{layer}.lora_A.weight"] = torch.randn(2, parameter.shape[1], generator=generator) * 0.2
            state[f"{layer}.lora_B.weight"] = torch.randn(parameter.shape[0], 2, generator=generator) * 0.2
        save_file(state, desk / name)
    return ["a.safetensors", "b.safetensors"]


def pixels(name):
    return np.asarray(Image.open(name)).astype(int)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("scales", "used"), [((), (1, 1)), ((0.5,), (0.5, 0.5)), ((0.5, -2), (0.5, -2))])
def test_several_adapters_are_used_recorded_and_repeated(run, loras, scales, used, fuse):
    words = ["--fuse-lora"] * fuse + [word for name in loras for word in ("--lora", name)]
    words += [word for scale in scales for word in ("--lora-scale", scale)]
    options = ("--dtype", "fp32", *QUICK)
    assert run("edit", "red.png", "Make it grey.", *words, "-o", "both.png", *options)[0] == 0
    pipe = joyedit.load("tiny-joyimage", device="cpu", dtype="float32")
    names = [pipe.load_lora_weights(name).name for name in loras]
    pipe.set_adapters(names, list(used))
    if fuse:
        pipe.fuse_lora(adapter_names=names)
    generator = [torch.Generator().manual_seed(5)]
    words_of_call = {"num_inference_steps": 1, "guidance_scale": 1, "generator": generator}
    made = pipe(images.load_image("red.png"), "Make it grey.", **words_of_call)
    assert np.array_equal(np.asarray(made.images[0]).astype(int), pixels("both.png"))
    found = recorded("both.png")
    assert found["lora"] == loras and found.get("fuse_lora") == (fuse or None)
    assert found.get("lora_scale") == {0: None, 1: 0.5, 2: [0.5, -2]}[len(scales)]
    assert run("edit", "red.png", "--config-from", "both.png", "-o", "again.png", "-q")[0] == 0
    assert Path("again.png").read_bytes() == Path("both.png").read_bytes()
    assert (
        run("edit", "red.png", "--config-from", "both.png", "--lora-scale", 0, "-o", "none.png", "-q")[0] == 0
    )
    assert (pixels("none.png") != pixels("both.png")).any()


def test_a_scale_belongs_to_its_adapter(run, loras):
    words = ("--lora", loras[0], "--lora", loras[1], "--lora-scale", 0.5, "--lora-scale", 2, *QUICK)
    assert run("edit", "red.png", "x", *words, "-o", "both.png")[0] == 0
    words = ("--config-from", "both.png", "--lora", loras[0], "-q")
    assert run("edit", "red.png", *words, "-o", "one.png")[0] == 0
    assert recorded("one.png")["lora"] == loras[0] and "lora_scale" not in recorded("one.png")
    assert json.dumps(recorded("both.png")["lora_scale"]) == "[0.5, 2.0]"


def test_numbers_of_scales_that_fit_no_adapters(capsys, run, no_work, loras):
    adapters = ("--lora", loras[0], "--lora", loras[1])
    scales = ("--lora-scale", 1, "--lora-scale", 2, "--lora-scale", 3)
    told = "3 times --lora-scale for 2 times --lora: give one scale for all adapters, or one for each"
    assert told in wrong(capsys, "edit", "red.png", "x", *adapters, *scales)
    status, _, err = run("edit", "red.png", "x", *adapters, "--lora", "gone.safetensors")
    assert status == 1 and "gone.safetensors does not exist" in err
