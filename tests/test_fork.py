"""docs/changing-the-code.md, carried out: its edits are made in a copy of the package, where its code runs.

The page is read, not repeated: an edit that no longer applies, or code that no longer runs, is a page that no
longer tells the truth. What is asked beside it is in `CHECKS`, one for each section.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import joyedit

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "changing-the-code.md"


def sections() -> dict[str, str]:
    """Heading -> text."""
    parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", sections()[section], re.DOTALL | re.MULTILINE)


def apply_edits(edits: str, folder: Path) -> list[str]:
    """Make the edits of a diff block. A hunk, from one @@ to the next, has no line numbers: what it takes
    away and what stands around it must be in the file once. Returns the files."""
    files = re.split(r"^--- (.*)\n", edits, flags=re.MULTILINE)
    assert files[0] == "" and len(files) > 1, edits
    for name, body in zip(files[1::2], files[2::2], strict=True):
        source = (folder / name).read_text(encoding="utf-8")
        hunks = re.split(r"^@@.*\n", body, flags=re.MULTILINE)
        assert hunks[0] == "" and len(hunks) > 1, body
        for hunk in hunks[1:]:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] or "\n" for line in lines if line[0] != "+")
            after = "".join(line[1:] or "\n" for line in lines if line[0] != "-")
            assert source.count(before) == 1, (
                f"{PAGE.name}: {source.count(before)} places in {name} for\n{hunk}"
            )
            source = source.replace(before, after)
        (folder / name).write_text(source, encoding="utf-8")
    return files[1::2]


@pytest.fixture
def fork(tmp_path) -> Path:
    """A clone of the repository: what the page edits or runs is copied, the rest is linked."""
    folder = tmp_path / "fork"
    skip = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("joyedit", "convert", "kernels", "tests/parity"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=skip)
    for name in ("joyedit/assets", "examples", "benchmarks", "tests/conftest.py", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# Edits from the same noise, to compare.
EDITED = """
import joyedit
import torch


def edited(pipe):
    photo, words = joyedit.load_image("examples/coffee.jpg"), "make the circle red"
    options = dict(num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    return pipe(photo, words, generator=torch.Generator().manual_seed(3), **options).images.numpy()
"""
# What every section's code is followed by, and then by its own checks: whose code ran.
AFTERWARDS = """
import numpy as np
from pathlib import Path

assert Path(joyedit.__file__).parents[1] == Path.cwd(), joyedit.__file__
"""
CHECKS = {
    "A new parameter: a temperature for every head": """
        stored = dict(pipe.transformer.state_dict())  # of the saved folder, loaded without a word
        names = [name for name in stored if "temperature" in name]
        assert len(names) == len(pipe.transformer.double_blocks) > 1
        assert all(torch.equal(stored[name], torch.ones_like(stored[name])) for name in names)
        assert stored[names[0]].shape == (pipe.transformer.config.num_attention_heads,)
        assert stored[names[0]].dtype == pipe.transformer.dtype
        np.save("published", edited(pipe))
        for block in pipe.transformer.double_blocks:
            block.attn.temperature.fill_(0.5)
        np.save("changed", edited(pipe))
        try:
            joyedit.load("tiny-joyimage", device="cpu")
        except ValueError as error:
            print(error)
        """,
    "A gated MLP": """
        state = pipe.transformer.state_dict()
        gates = [name for name in state if ".gate." in name]
        assert len(gates) == 4 * len(pipe.transformer.double_blocks)
        assert not any(state[name].any() for name in gates)
        np.save("published", edited(pipe))
        for name in gates:
            state[name].fill_(0.1)
        np.save("changed", edited(pipe))
        try:
            joyedit.load("tiny-joyimage", device="cpu")
        except ValueError as error:
            print(error)
        """,
    "A new sampler: Heun": """
        calls, predict = [], type(pipe.transformer).predict_branches
        def counted(network, target, references, texts, *others):
            calls.extend(texts)
            return predict(network, target, references, texts, *others)
        type(pipe.transformer).predict_branches = counted
        np.save("changed", edited(pipe))
        assert len(calls) == 2 * 3, len(calls)  # with guidance
        assert type(pipe.scheduler) is FlowMatchHeunDiscreteScheduler
        pipe.scheduler = joyedit.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        np.save("published", edited(pipe))
        try:
            joyedit.load("with-heun", device="cpu")
        except ValueError as error:
            print(error)
        """,
}
REFUSED = {
    "A new parameter: a temperature for every head": (
        r"tensors missing .*new_parameters=\['double_blocks.\*.attn.temperature'\]"
    ),
    "A gated MLP": r"tensors missing .*new_parameters=\['double_blocks.\*.img_mlp.gate.weight', ",
    "A new sampler: Heun": r"scheduler is a FlowMatchHeunDiscreteScheduler; .* pass scheduler= ",
}


@pytest.fixture(scope="module")
def published() -> np.ndarray:
    """The edit that the package makes as it is."""
    names: dict = {}
    with contextlib.chdir(ROOT):
        exec(EDITED, names)
        return names["edited"](joyedit.load("tiny-joyimage", device="cpu"))


# The two sections on parameters are of one kind.
SECTIONS = [pytest.param(s, marks=pytest.mark.slow) if s == "A gated MLP" else s for s in CHECKS]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_page_does_what_it_says(section, fork, published):
    for edits in blocks(section, "diff"):
        apply_edits(edits, fork)
    (code,) = blocks(section, "python")
    program = "\n".join((code, EDITED, AFTERWARDS, textwrap.dedent(CHECKS[section])))
    said = run([sys.executable, "-c", program], fork)
    assert re.search(REFUSED[section], said), said
    same, changed = (np.load(fork / f"{name}.npy") for name in ("published", "changed"))
    assert np.abs(same - published).max() <= 1e-5 * np.abs(published).max()
    assert np.abs(changed - published).max() > 1e-3 * np.abs(published).max()


@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name in CHECKS if blocks(name, "bash")])
def test_the_tests_that_the_page_names_pass_in_the_fork(section, fork):
    for edits in blocks(section, "diff"):
        apply_edits(edits, fork)
    command, *_ = blocks(section, "bash")
    program, *words = command.split()
    assert program == "pytest"
    assert " passed" in run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words], fork)


@pytest.mark.slow
@pytest.mark.parametrize("section", [name for name in CHECKS if len(blocks(name, "bash")) > 1])
def test_what_was_changed_is_trained(section, fork):
    """By the command of the page, for a step: what it writes is there, and what is new has moved."""
    for edits in blocks(section, "diff"):
        apply_edits(edits, fork)
    for name in ("target", "control"):
        (fork / "pairs" / name).mkdir(parents=True)
        shutil.copy(ROOT / "examples" / "coffee.jpg", fork / "pairs" / name / "0.jpg")
    (fork / "pairs" / "target" / "0.txt").write_text("Make it blue.")
    (code,) = blocks(section, "python")
    run([sys.executable, "-c", code], fork)
    _, command = blocks(section, "bash")
    program, *words = shlex.split(command)
    words[words.index("--steps") + 1] = "1"
    made = run([sys.executable, "-m", program, *words, "--device", "cpu", "--sample-every", "0"], fork)
    state = torch.load(fork / words[words.index("--out") + 1] / "state.pt", weights_only=True)
    new = {name: p for name, p in state["parameters"].items() if "temperature" in name or ".gate" in name}
    if "--full" in words:
        assert Path(made.strip()).name == "checkpoint" and len(state["parameters"]) > 2 * len(new) > 0
        assert all((p != 1).any() for p in new.values())
    else:
        assert Path(made.strip()).name == "lora.safetensors" and list(new) == list(state["parameters"])
        # The last block's words lead nowhere, and nothing is learned there.
        assert len(new) == 2 * len([n for n in new if ".lora_A" in n]) > 8
        assert len([name for name, p in new.items() if not p.any()]) == 1


def test_every_file_of_the_table_is_there():
    table = sections()["I want to change X, touch Y"]
    files = re.findall(r"`([\w/]+\.py)`", table)
    assert len(files) > 20 and [name for name in files if not (ROOT / name).is_file()] == []
    for name in re.findall(r"`([A-Z]\w+)`", table):
        sources = [(ROOT / file).read_text(encoding="utf-8") for file in files]
        assert any(f"class {name}" in source for source in sources), name
