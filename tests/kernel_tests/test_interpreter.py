"""The tests of the operations, under Triton's interpreter in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def test_operations_under_the_interpreter():
    interpreted("not slow")


@pytest.mark.slow
def test_whole_systems_and_other_dtypes_under_the_interpreter():
    interpreted("slow")


def interpreted(marks):
    options = ["-q", "--tb=short", "--color=no", "-rfEs", "--durations=5"]
    options += ["-p", "no:cacheprovider", "-p", "no:xdist"]  # the process that waits has its core
    command = [sys.executable, "-m", "pytest", *options, "-m", marks, str(HERE / "ops")]
    env = {**os.environ, "TRITON_INTERPRET": "1", "JOYEDIT_OPS": "auto"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=env, capture_output=True, text=True)
    summary = done.stdout[-8000:]
    assert done.returncode == 0, f"{summary}\n{done.stderr[-2000:]}"
    assert " passed" in summary and "skipped" not in summary, summary
