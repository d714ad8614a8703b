"""The code blocks of the README and of the published guides that the API follows, run on tiny checkpoints."""

import contextlib
import json
import re
import shlex
import sys
import types
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import (
    write_random_checkpoint,
    write_random_chronoedit_checkpoint,
    write_random_diffedit_checkpoint,
)
from benchmarks.shapes import evaluate, joyimage, train, wan_vae
from joyedit.command.cli import main

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


def test_first_command_makes_a_picture(desk, capsys):
    command = blocks(README, "bash")[0].splitlines()[0].split("&& ")[1]
    name, *arguments = shlex.split(command)
    assert name == "joyedit"
    assert main([str(ROOT / word) if (ROOT / word).is_file() else word for word in arguments]) == 0
    printed = Path(capsys.readouterr().out.strip())
    assert Image.open(printed).size[0] > 0 and printed.suffix == ".png"


def test_python_blocks_of_the_readme(desk, checkpoint, stable_diffusion, chronoedit):
    for source in blocks(README, "python"):
        source = made_local(source, checkpoint).replace("generator=", "num_inference_steps=2, generator=")
        source = source.replace('"stable-diffusion-v1-5/stable-diffusion-v1-5"', repr(str(stable_diffusion)))
        source = source.replace('"nvidia/ChronoEdit-14B-Diffusers"', repr(str(chronoedit)))
        source = source.replace("(photo.height, photo.width)", "(photo.height, photo.width, 32 * 48)")
        exec(compile(source, "README.md", "exec"), {})
    for result in ("wings.png", "robot.png"):
        assert Image.open(result).size[0] > 0
    assert Path("flight.mp4").stat().st_size > 0


def test_command_lines_of_the_readme(desk, checkpoint, stable_diffusion, chronoedit, capsys):
    published = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": [stable_diffusion],
        "nvidia/ChronoEdit-14B-Diffusers": [chronoedit, "--basesize", "256"],
    }
    for line in blocks(README, "bash")[1].strip().splitlines():
        name, *arguments = shlex.split(line)
        assert name == "joyedit"
        arguments = [re.sub(r"^jdopensource/[\w.-]+$", str(checkpoint), word) for word in arguments]
        arguments = [str(word) for name in arguments for word in published.get(name, [name])]
        if arguments[0] == "edit":
            arguments += ["--steps", "1"]
        assert main(arguments) == 0, line
    assert "Add wings to the astronaut." in capsys.readouterr().out


def test_training_commands_of_the_readme(monkeypatch):
    called = []
    for module in (joyimage, wan_vae):
        monkeypatch.setattr(module, "train", lambda folder, *args, **options: called.append(folder.name))
    monkeypatch.setattr(
        evaluate, "evaluate_checkpoint", lambda folder, *_: called.append(folder.name) or 1 / 0
    )
    programs = {"benchmarks.shapes.train": train.main, "benchmarks.shapes.evaluate": evaluate.main}
    for line in blocks(README, "bash")[2].strip().splitlines():
        python, option, module, *arguments = shlex.split(line)
        assert (python, option) == ("python", "-m")
        with contextlib.suppress(ZeroDivisionError):
            programs[module](arguments)
    assert called == ["wan-vae", "joyimage", "checkpoint"]


def test_readme_names_files_and_classes_that_exist():
    for path in re.findall(r"`((?:joyedit|convert|kernels|benchmarks|tests|examples)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    table = README.split("## I want to change X, touch Y")[1].split("##")[0]
    mmdit = (ROOT / "joyedit/models/joyimage_mmdit.py").read_text(encoding="utf-8")
    for name in re.findall(r"`([A-Z]\w+)`", table):
        assert f"class {name}" in mmdit, name


def test_readme_lists_every_quirk():
    listed = set(re.findall(r"switch `(\w+)`", README))
    pipelines = (
        joyedit.JoyImageEditPipeline,
        joyedit.ChronoEditPipeline,
        joyedit.StableDiffusionDiffEditPipeline,
    )
    assert listed == frozenset().union(*(pipeline.quirk_names for pipeline in pipelines))


def guide_blocks(shared_data, number="000", language="python"):
    """The code of a published guide, its prompts taken off and its imports changed."""
    (guide,) = (shared_data.parent / "seeds").glob(f"{number}_*")
    for source in blocks(guide.read_text(encoding="utf-8"), language):
        lines = source.strip("\n").splitlines()
        if lines[0].startswith(">>>"):
            lines = [line[4:] for line in lines]
        source = "\n".join(lines).replace("import mindspore", "import torch as mindspore")
        yield re.sub(
            r"from (mindone\.)?(diffusers|diffusers\.utils|transformers) import",
            "from joyedit import",
            source,
        )


def test_code_blocks_of_the_guide_run_with_their_imports_changed(shared_data, desk, checkpoint):
    sources = list(guide_blocks(shared_data))
    assert len(sources) == 2
    for source, output in zip(sources, ("joyimage_edit_output.png", "joyimage_edit.png"), strict=True):
        torch.manual_seed(0)
        exec(compile(made_local(source, checkpoint), "guide", "exec"), {})
        assert Image.open(output).size[0] > 0


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A folder as 2.1 was published: a text-to-image pipeline that predicts v, without an inverse scheduler
    and a safety checker."""
    folder = tmp_path_factory.mktemp("documents") / "stable-diffusion-2-1"
    write_random_diffedit_checkpoint(folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["inverse_scheduler"]
    index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    scheduler["prediction_type"] = "v_prediction"
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.fixture
def web(desk, monkeypatch):
    """`requests`, which the guide downloads its photograph with, finds that on the desk."""
    Image.linear_gradient("L").convert("RGB").save("origin.png")

    def get(url):
        return types.SimpleNamespace(content=Path(url.rpartition("/")[2]).read_bytes())

    requests = types.ModuleType("requests")
    monkeypatch.setattr(requests, "get", get, raising=False)
    monkeypatch.setitem(sys.modules, "requests", requests)


def made_small(source, folder):
    """The same code on the tiny checkpoint, and a small photograph."""
    changed = source.replace('"stabilityai/stable-diffusion-2-1"', repr(str(folder)))
    return changed.replace("(768, 768)", "(64, 64)")


def public_names():
    return {name: getattr(joyedit, name) for name in joyedit.__all__}


def test_code_blocks_of_the_diffedit_reference_run_with_their_imports_changed(
    shared_data, web, stable_diffusion
):
    """They use names that they do not import; these come from joyedit too."""
    sources = list(guide_blocks(shared_data, "001", "py"))
    assert len(sources) == 2
    results = [public_names() for _ in sources]
    for source, names in zip(sources, results, strict=True):
        exec(compile(made_small(source, stable_diffusion), "reference", "exec"), names)
        assert type(names["pipeline"].inverse_scheduler) is joyedit.DDIMInverseScheduler
        assert names["pipeline"].scheduler.config.prediction_type == "v_prediction"
        assert names["pipeline"].dtype is torch.float16
    whole, inversion = results
    assert whole["mask_image"].shape == (1, 8, 8) and whole["image"].size == (64, 64)
    assert whole["image_latents"].shape == inversion["inverted_latents"].shape == (1, 41, 4, 8, 8)


def test_code_blocks_of_the_diffedit_guide_run_with_their_imports_changed(shared_data, web, stable_diffusion):
    """One after the other, as a reader types them."""
    sources = list(guide_blocks(shared_data, "003", "py"))
    assert len(sources) == 7
    names = {}
    for source in sources:
        exec(compile(made_small(source, stable_diffusion), "guide", "exec"), names)
    assert names["pipeline"].vae.use_slicing and names["pipeline"].dtype is torch.float16
    assert names["inv_latents"].shape == (1, 41, 4, 8, 8)
    assert names["mask_image"].size == names["output_image"].size == (64, 64)
    grid = names["make_image_grid"]([names["raw_image"], names["mask_image"], names["output_image"]], 1, 3)
    assert grid.size == (192, 64)


@pytest.fixture(scope="module")
def chronoedit(tmp_path_factory):
    """A folder as ChronoEdit was published: classes under WAN's names, the transformer in fp32 shards, and
    the distillation LoRA beside them."""
    folder = tmp_path_factory.mktemp("documents") / "ChronoEdit-14B-Diffusers"
    write_random_chronoedit_checkpoint(folder)
    return folder


def chronoedit_sources(shared_data):
    """The code of the ChronoEdit page: three blocks that run on into the text after them, and the example of
    the call, with prompts. They are as published but for imports, device and the area of the pictures."""
    (guide,) = (shared_data.parent / "seeds").glob("002_*")
    text = guide.read_text(encoding="utf-8")
    plain = r"""^(?:import torch|output = pipe\().*?\.save\("output\.png"\)"""
    example = re.findall(r"^(?:>>>|\.\.\.) (.*)$", text, re.MULTILINE)
    sources = re.findall(plain, text, re.DOTALL | re.MULTILINE)
    sources.append("\n".join(example).partition("fps=16)")[0] + "fps=16)")
    for source in sources:
        source = re.sub(
            r"from (diffusers|diffusers\.utils|transformers) import", "from joyedit import", source
        )
        source = source.replace('"cuda"', '"cpu"').replace("720 * 1280", "32 * 48")
        yield source


@pytest.fixture
def released_chronoedit(desk, chronoedit, monkeypatch):
    """That folder, in which `hf_hub_download` finds its files; the photograph of the page is on the desk."""
    Image.open(ROOT / "examples" / "coffee.jpg").save("3.png")
    monkeypatch.setattr(
        joyedit, "hf_hub_download", lambda repo_id, filename: str(Path(repo_id) / filename), raising=False
    )
    return chronoedit


def test_code_blocks_of_the_chronoedit_page_run_with_their_imports_changed(shared_data, released_chronoedit):
    """The second goes on from the first; the third uses names that it does not import."""
    first, second, third, example = chronoedit_sources(shared_data)
    page: dict = {}
    made = []
    for source, names in ((first, page), (second, page), (third, public_names()), (example, {})):
        for result in ("output.png", "output.mp4"):
            Path(result).unlink(missing_ok=True)
        source = source.replace('"nvidia/ChronoEdit-14B-Diffusers"', repr(str(released_chronoedit)))
        exec(compile(source, "page", "exec"), names)
        pipe, output = names["pipe"], names["output"]
        assert type(pipe) is joyedit.ChronoEditPipeline and pipe.dtype is torch.bfloat16
        assert pipe.vae.dtype is pipe.image_encoder.dtype is torch.float32
        assert output.shape[1:] == (32, 48, 3) and np.isfinite(output).all()
        picture, film = Path("output.png").exists(), None
        if picture:
            last = (output[-1] * 255).clip(0, 255).astype("uint8")
            assert np.array_equal(np.asarray(Image.open("output.png")), last)
        if Path("output.mp4").exists():
            with av.open("output.mp4") as opened:
                film = len(list(opened.decode(video=0)))
                assert opened.streams.video[0].average_rate == 16
        distilled = (pipe.num_timesteps, pipe.scheduler.config.flow_shift, len(pipe.adapters.fused_loras))
        made.append((len(output), picture, film, distilled))
    assert made == [
        (5, True, None, (50, 5, 0)),
        (29, True, 29, (50, 5, 0)),
        (5, True, 5, (8, 2, 1)),
        (5, False, 5, (50, 5, 0)),
    ]
