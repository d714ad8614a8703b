"""What tests of `joyedit batch` share: photographs, and edits that return them, without the networks."""

import json
from pathlib import Path

import pytest
from PIL import Image

import joyedit
from joyedit.command import batch_run as many
from joyedit.command.instruction import Instruction
from joyedit.loading import layouts

SIZES = {"a.png": (96, 72), "b.jpg": (72, 96), "c.webp": (96, 96), "d.png": (96, 72)}
SHARDS = ("SLURM_ARRAY_TASK_ID", "SLURM_STEP_NUM_TASKS", "JOB_COMPLETION_INDEX", "RANK", "WORLD_SIZE")
SEED = ("--seed", 7)
GOOD = {"photo": "photos/a.png", "prompt": "x"}


@pytest.fixture(scope="module")
def pipe():
    return joyedit.load("tiny-joyimage", device="cpu")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in SHARDS:
        monkeypatch.delenv(name, raising=False)
    Path("photos").mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size, "green").save(f"photos/{name}")
    return tmp_path


@pytest.fixture
def calls(desk, pipe, monkeypatch):
    """The calls of edits, each with its seed."""
    made = []

    def run(system, pipe, call, seeds, args):
        made.append((call, *seeds))
        return [{"output": call.get("image", Image.new("RGB", (32, 32)))} for _ in seeds]

    monkeypatch.setattr(Instruction, "run", run)
    monkeypatch.setattr(layouts, "load", lambda *_, **__: pipe)
    monkeypatch.setattr(many, "warn_of_the_unknown", lambda *_: None)
    return made


def files(folder="out"):
    found = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
    return sorted(found)


def lines(*fields, name="jobs.jsonl"):
    text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in fields)
    Path(name).write_text(text + "\n", encoding="utf-8")
    return name


def errors(name="errors-0.jsonl"):
    return [json.loads(line) for line in Path("out", name).read_text().splitlines()]
