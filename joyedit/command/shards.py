"""Which part of many edits this process does: what `--shard` says, or else the scheduler that started it.

Each scheduler tells its processes in the environment who they are:

- SLURM, of an array: (SLURM_ARRAY_TASK_ID - MIN) / STEP of SLURM_ARRAY_TASK_COUNT;
- Kubernetes, of an indexed job: JOB_COMPLETION_INDEX of JOB_COMPLETIONS, which the manifest sets;
- torchrun: RANK of WORLD_SIZE.

Two of them at once, an array whose tasks are torchruns, divide the parts of the first once more. What is half
there or fits nothing is refused: a process that took itself for the only one would do everything. So are
several tasks of one SLURM step that are not one torchrun, for all would do the same.
"""

import argparse
import re
from collections.abc import Mapping
from typing import NamedTuple

from joyedit.checkpoints.plain_text import shown

MOST = 10**6  # shards
ARRAY = ("ID", "MIN", "STEP", "COUNT")
RANKS = ("RANK", "WORLD_SIZE")


class Shard(NamedTuple):
    """Part `index`, from 0, of `count`."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def of(self, number: int) -> range:
        """The places of this part among so many: neighbours, of which several may have one photograph."""
        return range(self.index * number // self.count, (self.index + 1) * number // self.count)

    def divided(self, part: "Shard") -> "Shard":
        """That part of this one."""
        return Shard(self.index * part.count + part.index, self.count * part.count)


def shard(text: str) -> Shard:
    """What `--shard` says, as argparse's `type` wants it."""
    found = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{shown(text, 40)} is not of the form i/n, as in 0/8")
    index, count = int(found[1]), int(found[2])
    if not 1 <= count <= MOST:
        raise argparse.ArgumentTypeError(f"{text}: there are 1 to {MOST:,} shards")
    if index >= count:
        raise argparse.ArgumentTypeError(f"{text}: of {count} shards i is within 0 and {count - 1}")
    return Shard(index, count)


def of_environment(environment: Mapping[str, str], torchrun: bool = True) -> Shard:
    """What the schedulers say; the only part where there is none. torchrun: False where its processes compute
    each edit together. Raises ValueError naming the variable that is wrong or missing."""
    found = slurm(environment).divided(kubernetes(environment))
    return found.divided(ranks(environment)) if torchrun else found


def slurm(environment: Mapping[str, str]) -> Shard:
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ARRAY]
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and not one_torchrun(environment):
        remedy = '--shard "$SLURM_PROCID/$SLURM_NTASKS"'
        if names[0] in environment:
            remedy = "a --shard for each, or let each be a task of the array"
        raise ValueError(
            f"SLURM_STEP_NUM_TASKS is {shown(tasks, 40)}, and several tasks of one step would do the same: "
            f"start them as one torchrun, or tell them apart by {remedy}"
        )
    if names[0] not in environment:
        return Shard()
    number, first, step, count = (whole(environment, name, names[0]) for name in names)
    if step < 1 or (number - first) % step:
        raise ValueError(
            f"{names[0]} {number} is no whole number of steps of {step} above {first}: give --shard"
        )
    return placed((number - first) // step, count, f"{names[0]} {number}, from {first} in steps of {step}")


def one_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether the tasks of a SLURM step are nodes of one torchrun, whose ranks tell them apart; not so where
    each task has started one for itself."""
    return RANKS[0] in environment and environment.get("GROUP_WORLD_SIZE") != "1"


def kubernetes(environment: Mapping[str, str]) -> Shard:
    names = ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")
    if names[0] not in environment:
        return Shard()
    index, count = (whole(environment, name, names[0]) for name in names)
    return placed(index, count, f"{names[0]} {index}")


def ranks(environment: Mapping[str, str]) -> Shard:
    if not any(name in environment for name in RANKS):
        return Shard()
    first = next(name for name in RANKS if name in environment)
    index, count = (whole(environment, name, first) for name in RANKS)
    return placed(index, count, f"RANK {index}")


def whole(environment: Mapping[str, str], name: str, beside: str) -> int:
    """The number that a variable holds, which is there because `beside` is."""
    text = environment.get(name)
    if text is None:
        hint = (
            " (the manifest sets it, see examples/kubernetes_job.yaml)" if name == "JOB_COMPLETIONS" else ""
        )
        raise ValueError(f"{beside} is set, and {name} is not{hint}: set it, or give --shard")
    if re.fullmatch(r"[0-9]{1,9}", text) is None:
        raise ValueError(
            f"{name} is {shown(text, 40)}, not a whole number from 0: correct it, or give --shard"
        )
    return int(text)


def placed(index: int, count: int, words: str) -> Shard:
    if not index < count <= MOST:
        raise ValueError(f"{words} is not one of {count} parts (1 to {MOST:,}): give --shard")
    return Shard(index, count)
