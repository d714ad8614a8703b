"""README.md and the pages of docs/: their code runs on tiny checkpoints, and what they name is there.

So does the code of the published guides that the API follows.
"""

import builtins
import contextlib
import json
import pkgutil
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
from benchmarks.shapes import evaluate, joyimage, new_instruction, train, wan_vae
from joyedit.command.cli import main
from joyedit.pipelines.rewriting import rewrite
from tests.answering import answering, rewritten

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README = TEXTS["README.md"]
PAGES = [name for name in TEXTS if name.startswith("docs/")]

# What it shows are changes to the package, which that test makes and runs on a copy.
RUN_ELSEWHERE = {"docs/changing-the-code.md": "tests/test_fork.py"}

UNWANTED = {"utils.py"}  # a file that the texts name as one not to write

every_text = pytest.mark.parametrize("name", TEXTS)


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def blocks_to_run(language):
    """(page, code) of every block; the first of the README, which installs, has tests of its own."""
    found = [(name, source) for name, text in TEXTS.items() for source in blocks(text, language)]
    found = [(name, source) for name, source in found if name not in RUN_ELSEWHERE]
    return [(name, source) for name, source in found if not source.startswith("pip install")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "joyai"
    write_random_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def plus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents") / "joyai-plus"
    write_random_checkpoint(folder, plus=True)
    return folder


@pytest.fixture
def desk(checkpoint, tmp_path, monkeypatch):
    """A working folder with the photograph that the examples name; downloads come from it."""
    monkeypatch.chdir(tmp_path)
    photo = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    photo.save("astronaut.jpg")
    photo.rotate(180).save("hat.jpg")
    photo.convert("L").save("where.png")
    Path("photos").mkdir()
    for name in ("a.jpg", "b.jpg"):
        photo.save(f"photos/{name}")
    photo.convert("L").save("b-mask.png")
    jobs = re.findall(r"^ *(\{.*\})$", TEXTS["docs/command-line.md"], re.M)
    Path("jobs.jsonl").write_text("\n".join(jobs))
    for name in ("target", "control"):
        Path("pairs", name).mkdir(parents=True)
        photo.save(f"pairs/{name}/0001.png")
    Path("pairs/target/0001.txt").write_text("Add wings to the astronaut.")
    load_image = joyedit.load_image
    monkeypatch.setattr(joyedit, "load_image", lambda name: load_image(Path(str(name)).name))
    monkeypatch.setitem(rewrite.__kwdefaults__, "max_new_tokens", 8)  # random weights come to no end
    return tmp_path


@pytest.fixture
def server():
    with answering() as serve:
        yield serve(rewritten("The user wants to add wings to the astronaut."))


@pytest.fixture
def published(checkpoint, plus, stable_diffusion, chronoedit, server):
    """Published names -> the tiny checkpoints that stand for them, and a server's address -> one that is."""
    return {
        "http://localhost:8000/v1": server.base,
        "jdopensource/JoyAI-Image-Edit-Diffusers": checkpoint,
        "jdopensource/JoyAI-Image-Edit": checkpoint,
        "jdopensource/JoyAI-Image-Edit-Plus-Diffusers": plus,
        "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion,
        "nvidia/ChronoEdit-14B-Diffusers": chronoedit,
    }


def made_local(source, published):
    """The same code with the published names, the device, the sizes and the number of steps made small."""
    changed = source
    for name, folder in published.items():
        changed = changed.replace(f'"{name}"', repr(str(folder)))
    if changed != source and "num_inference_steps" not in source:
        changed = changed.replace("generator=", "num_inference_steps=2, generator=")
    changed = changed.replace('"cuda"', '"cpu"').replace("(photo.height, photo.width)", "(64, 96, 32 * 48)")
    changed = re.sub(r"\b(height|width)=\d{3,}", r"\1=64", changed)
    return re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", changed)


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


def test_every_page_has_its_code_run():
    """A block in a language that no test runs would be a promise without a test."""
    for name, text in TEXTS.items():
        languages = set(re.findall(r"^```(\w+)", text, re.MULTILINE))
        if name in RUN_ELSEWHERE and languages:
            assert Path(name).name in (ROOT / RUN_ELSEWHERE[name]).read_text(encoding="utf-8")
        elif name != "CONTRIBUTING.md":
            assert languages <= {"python", "bash"}, name


IN_SEVERAL = [block for block in blocks_to_run("python") if "LOCAL_RANK" in block[1]]  # processes
IN_ONE = [block for block in blocks_to_run("python") if block not in IN_SEVERAL]


def run_in(folder, page, source):
    with contextlib.chdir(folder):
        exec(compile(source, page, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize(("page", "source"), IN_SEVERAL)
def test_python_blocks_of_several_processes(page, source, desk, published, workers):
    source = made_local(source, published).replace("f\"cuda:{os.environ['LOCAL_RANK']}\"", '"cpu"')
    workers.run(run_in, str(desk), page, source)
    assert Image.open("wings.png").size[0] > 0


def test_there_is_a_block_of_several_processes():
    assert [page for page, _ in IN_SEVERAL] == ["docs/which-machine.md"]


@pytest.mark.parametrize(("page", "source"), IN_ONE)
def test_python_blocks(page, source, desk, published):
    names: dict = {}
    exec(compile(made_local(source, published), page, "exec"), names)
    for result in re.findall(r'(?:save|export_to_video)\(.*?"([\w.]+)"', source):
        assert Path(result).stat().st_size > 0, result
    if page == "docs/small-models.md":  # its edits are real ones
        for result, size, channels in (("blue.png", 96, [2]), ("green.png", 64, [1])):
            red_green_blue = Image.open(result).convert("RGB").getpixel((28 * size // 96, 64 * size // 96))
            assert [c for c in range(3) if red_green_blue[c] > 128] == channels, red_green_blue
        first, last = names["film"][0][64, 28], names["film"][-1][64, 28]
        assert first[1] < 0.4 < 0.6 < last[1], "the circle was not made yellow"


def run_joyedit(words, published, capsys):
    """Runs a command of a page, small and in one step. Every path that it prints is there."""
    small = ["--steps", "1"] if words[0] in ("edit", "generate", "batch", "train") else []
    if words[0] == "train":
        small += ["--basesize", "64", "--sample-every", "0", "--valid-every", "0", "--device", "cpu"]
    if "nvidia/ChronoEdit-14B-Diffusers" in words or "--height" in words:
        small += ["--height", "32", "--width", "48"]
    if "--reasoning-steps" in words:
        words[words.index("--reasoning-steps") + 1] = "1"
    assert main([str(published.get(word, word)) for word in words] + small) == 0, words
    printed = capsys.readouterr().out
    if words[0] == "ask":
        assert printed.strip()
    elif words[0] == "verify":
        assert ": whole;" in printed
    elif words[0] == "estimate":
        assert "transformer" in printed and "80" in printed
    elif words[0] == "info":
        assert "Add wings to the astronaut." in printed or not words[-1].endswith(".png")
        assert "tiny" not in printed and len(printed.splitlines()) > 3
    else:
        assert all(Path(line).exists() for line in printed.splitlines())


def run_training(words, monkeypatch):
    """Parses a command of `benchmarks.shapes`; returns the folder that it would work on."""
    called = []
    for module in (joyimage, wan_vae):
        monkeypatch.setattr(module, "train", lambda folder, *args, **options: called.append(folder.name))
    monkeypatch.setattr(
        evaluate, "evaluate_checkpoint", lambda folder, *_: called.append(folder.name) or 1 / 0
    )
    monkeypatch.setattr(new_instruction, "PAIRS", 1)
    monkeypatch.setattr(new_instruction, "VALID", 1)
    monkeypatch.setattr(evaluate, "EDITS", 1)
    programs = {"benchmarks.shapes.train": train.main, "benchmarks.shapes.evaluate": evaluate.main}
    programs["benchmarks.shapes.new_instruction"] = new_instruction.main
    python, option, module, *arguments = words
    assert (python, option) == ("python", "-m")
    with contextlib.suppress(ZeroDivisionError):
        programs[module](arguments)
    return called


@pytest.mark.parametrize(("page", "source"), blocks_to_run("bash"))
def test_command_lines(page, source, desk, published, capsys, monkeypatch):
    worked_on = []
    for line in source.strip().splitlines():
        words = shlex.split(line)
        if words[0] == "joyedit":
            run_joyedit(words[1:], published, capsys)
        elif words[0] != "torchrun":
            worked_on += run_training(words, monkeypatch)
    if page == "docs/small-models.md":
        assert worked_on == ["wan-vae", "joyimage", "checkpoint"]


def started_by_torchrun(folder, words):
    with contextlib.chdir(folder):
        return main(words)


@pytest.mark.slow
def test_command_lines_of_several_processes(desk, workers):
    """They are one edit each."""
    lines = [line for _, source in blocks_to_run("bash") for line in source.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("torchrun")]
    assert commands
    for number, (_, option, count, *rest) in enumerate(commands):
        assert option == "--nproc-per-node" and rest[:2] == ["-m", "joyedit"]
        result = f"{number}.png"
        words = [*rest[2:], "--steps", "1", "--device", "cpu", "-o", result]
        assert workers.run(started_by_torchrun, str(desk), words, count=int(count)) == [0] * int(count)
        assert Image.open(result).size[0] > 0


def test_options_that_the_pages_name_exist(capsys):
    known = set()
    for command in (
        "edit",
        "generate",
        "batch",
        "ask",
        "estimate",
        "train",
        "convert",
        "verify",
        "info",
        "demo",
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known |= set(re.findall(r"--[a-z][\w-]*", capsys.readouterr().out))
    named = re.findall(r"--[a-z][\w-]*", TEXTS["docs/command-line.md"])
    others = {
        "--help",
        "--nproc-per-node",
        "--nnodes",
        "--array",
        "--workers",
        "--gpus",
    }  # torchrun's, SLURM's, the example's
    assert len(named) > 10 and set(named) <= known | others


def test_readme_is_short_and_asks_what_each_page_answers():
    assert len(README.splitlines()) <= 150
    asked = dict(re.findall(r"^\| (.*\?) \| \[.*?\]\((docs/.*?)\) \|$", README, re.MULTILINE))
    answered = {TEXTS[name].splitlines()[2]: name for name in PAGES}
    assert asked == answered


def prose(text):
    """The text without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text):
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_text
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[name])):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.is_file(), f"{name} links {target}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{name} links {target}"


def quoted(text):
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(text))


@every_text
def test_files_that_a_page_names_exist(name):
    """In full from the root, or the last parts of a path, such as `train.py`."""
    folders = ("joyedit", "convert", "kernels", "benchmarks", "tests", "examples", "docs")
    sources = [path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py")]
    for word in quoted(TEXTS[name]):
        if re.fullmatch(rf"(?:{'|'.join(folders)})/[\w./*-]+", word):
            assert [*ROOT.glob(word), *ROOT.glob(f"{word}.py")], f"{name} names {word}"
        elif re.fullmatch(r"[\w/]+\.py", word):
            there = any(path.endswith(f"/{word}") for path in sources)
            assert there != (word in UNWANTED), f"{name} names {word}"
        for module in re.findall(r"python -m ([\w.]+)", word):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{name}: {word}"


@every_text
def test_modules_and_classes_that_a_page_names_exist(name):
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("joyedit", "convert", "kernels", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    )
    for word in quoted(TEXTS[name]):
        if match := re.match(r"joyedit(?:\.\w+)+", word):
            pkgutil.resolve_name(match[0])
        if re.fullmatch(r"(?:[A-Z]+[a-z0-9]+){2,}[A-Z]*\w*", word):
            known = word in joyedit.__all__ or hasattr(builtins, word)
            assert known or re.search(rf"^class {word}\b", code, re.MULTILINE), f"{name} names {word}"


def test_differences_lists_every_quirk():
    listed = re.findall(r"switch `(\w+)`", TEXTS["docs/differences.md"])
    pipelines = (
        joyedit.JoyImageEditPipeline,
        joyedit.ChronoEditPipeline,
        joyedit.StableDiffusionDiffEditPipeline,
    )
    quirks = [name for pipeline in pipelines for name in pipeline.quirk_names]
    assert sorted(listed) == sorted(set(quirks))


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


@pytest.mark.slow
def test_code_blocks_of_the_guide_run_with_their_imports_changed(shared_data, desk, published):
    sources = list(guide_blocks(shared_data))
    assert len(sources) == 2
    for source, output in zip(sources, ("joyimage_edit_output.png", "joyimage_edit.png"), strict=True):
        torch.manual_seed(0)
        exec(compile(made_local(source, published), "guide", "exec"), {})
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
