"""`pytest -m gpu` needs what joyedit itself needs, and pytest; a whole run needs the references too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WITH_OPERATIONS = ROOT / "tests" / "kernel_tests" / "ops"

# A plugin that makes this machine one with a GPU, and without what tests need besides.
LEAN = """
import sys
for name in ("accelerate", "av", "diffusers", "ftfy", "peft", "scipy", "skimage", "transformers"):
    sys.modules[name] = None
import torch
torch.cuda.is_available = lambda: True
"""
OPTIONS = "-p lean -p no:xdist -p no:cacheprovider --color=no --collect-only -q"


@pytest.fixture
def collect(tmp_path):
    """A function: arguments of a pytest that only collects -> its exit status and output there."""
    (tmp_path / "lean.py").write_text(LEAN, encoding="utf-8")
    env = {**os.environ, "PYTEST_ADDOPTS": "", "TRITON_INTERPRET": "0"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tmp_path), env.get("PYTHONPATH"))))

    def collect(*arguments):
        command = [sys.executable, "-m", "pytest", *OPTIONS.split(), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout

    return collect


@pytest.mark.parametrize(
    "folders",
    [("tests/kernel_tests", "tests/parity"), pytest.param(("tests",), marks=pytest.mark.slow)],
    ids=["kernels and parity", "all"],
)
def test_it_collects_without_the_references(collect, folders):
    status, output = collect("-m", "gpu", *folders)
    assert status == 0, output
    files = {line.partition("::")[0] for line in output.splitlines() if "::" in line}
    assert files == set(for_a_gpu(folders))
    left_out = output.partition("not collected, diffusers not installed")[2]
    assert "tests/parity/test_wan_vae.py" in left_out.splitlines()
    assert not any(file in left_out for file in files)


def for_a_gpu(folders):
    """Files whose tests run on a GPU: those of the operations, and those that mark one."""
    for folder in folders:
        for path in (ROOT / folder).rglob("test_*.py"):
            marked = re.search(r"pytest\.mark\.gpu\b", path.read_text(encoding="utf-8"))
            if marked or WITH_OPERATIONS in path.parents:
                yield path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "marks",
    ["not slow", *(pytest.param(marks, marks=pytest.mark.slow) for marks in ("gpu or slow", "not gpu"))],
)
def test_a_run_of_other_tests_fails_without_them(collect, marks):
    status, output = collect("-m", marks, "tests/parity/test_ddim.py", "tests/test_gpu_lane.py")
    assert status == pytest.ExitCode.INTERRUPTED
    assert "ERROR tests/parity/test_ddim.py" in output and "not collected" not in output
