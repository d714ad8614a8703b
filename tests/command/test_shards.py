"""Which part of many edits a process takes, by option and by the environments of schedulers."""

import argparse

import pytest

from joyedit.command.batch import shard_of
from joyedit.command.shards import Shard, of_environment, shard

ARRAY = {f"SLURM_ARRAY_TASK_{name}": value for name, value in zip(
    ("ID", "MIN", "STEP", "COUNT"), ("7", "3", "2", "4"), strict=True
)}  # fmt: skip
INDEXED = {"JOB_COMPLETION_INDEX": "2", "JOB_COMPLETIONS": "5"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, (0, 1)),
        (ARRAY, (2, 4)),
        (INDEXED, (2, 5)),
        (TORCHRUN, (1, 2)),
        ({"JOB_COMPLETIONS": "5"}, (0, 1)),
        ({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1)),
        ({**ARRAY, **TORCHRUN}, (5, 8)),
        ({**INDEXED, **TORCHRUN}, (5, 10)),
        ({"SLURM_STEP_NUM_TASKS": "4", "RANK": "5", "WORLD_SIZE": "8"}, (5, 8)),
        ({"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "2", **ARRAY, **TORCHRUN}, (5, 8)),
        ({"SLURM_STEP_NUM_TASKS": "1", **ARRAY}, (2, 4)),
    ],
)
def test_schedulers_say_which(environment, wanted):
    assert of_environment(environment) == wanted


def test_ranks_that_compute_together_are_no_parts():
    assert of_environment({**ARRAY, **TORCHRUN}, torchrun=False) == (2, 4)
    assert of_environment({"SLURM_STEP_NUM_TASKS": "2", **TORCHRUN}, torchrun=False) == (0, 1)


@pytest.mark.parametrize("environment", [ARRAY, INDEXED, TORCHRUN, {"JOB_COMPLETION_INDEX": "1"}])
def test_a_part_that_is_given_wins(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = argparse.Namespace(shard=Shard(1, 3), parallel=None, device="cpu")
    assert shard_of(args) == (1, 3)
    args.shard = None
    if len(environment) > 1:
        assert shard_of(args) == of_environment(environment) != (1, 3)


@pytest.mark.parametrize("number", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_make_the_whole(number, count):
    parts = [list(Shard(index, count).of(number)) for index in range(count)]
    assert [place for part in parts for place in part] == list(range(number))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JOB_COMPLETION_INDEX": "0"}, "JOB_COMPLETION_INDEX is set, and JOB_COMPLETIONS is not"),
        ({**INDEXED, "JOB_COMPLETION_INDEX": "5"}, "JOB_COMPLETION_INDEX 5 is not one of 5 parts"),
        ({**INDEXED, "JOB_COMPLETIONS": "0"}, "is not one of 0 parts"),
        ({**INDEXED, "JOB_COMPLETIONS": "five"}, "JOB_COMPLETIONS is 'five'"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "11"}, "SLURM_ARRAY_TASK_ID 11, from 3 in steps of 2"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "6"}, "no whole number of steps of 2 above 3"),
        ({**ARRAY, "SLURM_ARRAY_TASK_STEP": "0"}, "no whole number of steps"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_ID is set, and SLURM_ARRAY_TASK_MIN is not"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "SLURM_STEP_NUM_TASKS is '4', and several tasks of one step"),
        ({"SLURM_STEP_NUM_TASKS": "2", **ARRAY}, "SLURM_STEP_NUM_TASKS is '2', and several tasks"),
        ({"SLURM_STEP_NUM_TASKS": "2", "GROUP_WORLD_SIZE": "1", **TORCHRUN}, "as one torchrun"),
        ({"RANK": "1"}, "RANK is set, and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, and RANK is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 is not one of 2 parts"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
    ],
)
def test_what_fits_nothing_is_refused_by_name(environment, words):
    with pytest.raises(ValueError) as refused:
        of_environment(environment)
    assert words in str(refused.value) and "--shard" in str(refused.value)


@pytest.mark.parametrize("text", ["2/2", "0/0", "1", "1/", "a/b", "-1/2", "0/2/3", "0/9999999", "1.0/2", ""])
def test_an_option_that_is_none_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        shard(text)
    assert shard("1/2") == (1, 2)
