"""The code blocks of the README and of the published guide that the API follows, run on a tiny checkpoint."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import joyedit
from joyedit.cli import main
from joyedit.random_checkpoint import write_random_checkpoint

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "joyai"
    write_random_checkpoint(folder)
    return folder


@pytest.fixture
def desk(checkpoint, tmp_path, monkeypatch):
    """A working folder with the photograph that the examples name; downloads come from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JOYEDIT_CACHE", str(tmp_path / "cache"))
    photo = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    photo.save("astronaut.jpg")
    load_image = joyedit.load_image
    monkeypatch.setattr(joyedit, "load_image", lambda name: load_image(Path(str(name)).name))
    return tmp_path


def made_local(source, checkpoint):
    """The same code with the published ids, the device and the number of steps made small."""
    source = re.sub(r'"jdopensource/[\w.-]+"', repr(str(checkpoint)), source)
    source = source.replace('"cuda"', '"cpu"')
    return re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", source)


def test_first_block_is_install_and_run_install_and_test():
    first, second = blocks(README, "bash")[0].strip().splitlines()
    assert first.startswith("pip install torch==2.13.0 -e . && joyedit ")
    assert second == 'pip install torch==2.13.0 -e ".[test]" && pytest'


def test_first_command_edits_the_photograph_that_it_names(desk, capsys):
    command = blocks(README, "bash")[0].splitlines()[0].split("&& ")[1]
    name, *arguments = shlex.split(command)
    assert name == "joyedit"
    arguments[1] = str(ROOT / arguments[1])
    assert main([*arguments, "--steps", "1", "--seed", "3"]) == 0
    printed = Path(capsys.readouterr().out.strip())
    assert Image.open(printed).size[0] > 0 and printed.name == "coffee-edit-3.png"


def test_python_blocks_of_the_readme(desk, checkpoint, monkeypatch):
    found = blocks(README, "python")
    assert found
    for source in found:
        source = made_local(source, checkpoint).replace("generator=", "num_inference_steps=2, generator=")
        exec(compile(source, "README.md", "exec"), {})
    assert Image.open("wings.png").size[0] > 0


def test_command_lines_of_the_readme(desk, checkpoint, capsys):
    for line in blocks(README, "bash")[1].strip().splitlines():
        name, *arguments = shlex.split(line)
        assert name == "joyedit"
        arguments = [re.sub(r"^jdopensource/[\w.-]+$", str(checkpoint), word) for word in arguments]
        if arguments[0] == "edit":
            arguments += ["--steps", "1"]
        assert main(arguments) == 0, line
    assert "Add wings to the astronaut." in capsys.readouterr().out


def test_readme_names_files_and_classes_that_exist():
    for path in re.findall(r"`((?:joyedit|convert|tests|examples)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    table = README.split("## I want to change X, touch Y")[1].split("##")[0]
    mmdit = (ROOT / "joyedit/models/joyimage_mmdit.py").read_text(encoding="utf-8")
    for name in re.findall(r"`([A-Z]\w+)`", table):
        assert f"class {name}" in mmdit, name


def test_readme_lists_every_quirk():
    listed = set(re.findall(r"switch `(\w+)`", README))
    assert listed == joyedit.JoyImageEditPipeline.quirk_names


def guide_blocks(shared_data):
    (guide,) = (shared_data.parent / "seeds").glob("000_*")
    for source in blocks(guide.read_text(encoding="utf-8"), "python"):
        lines = source.strip("\n").splitlines()
        if lines[0].startswith(">>>"):
            lines = [line[4:] for line in lines]
        source = re.sub(
            r"from (diffusers|diffusers\.utils|transformers) import", "from joyedit import", "\n".join(lines)
        )
        yield source


def test_code_blocks_of_the_guide_run_with_their_imports_changed(shared_data, desk, checkpoint):
    sources = list(guide_blocks(shared_data))
    assert len(sources) == 2
    for source, output in zip(sources, ("joyimage_edit_output.png", "joyimage_edit.png"), strict=True):
        torch.manual_seed(0)
        exec(compile(made_local(source, checkpoint), "guide", "exec"), {})
        assert Image.open(output).size[0] > 0
