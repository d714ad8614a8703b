"""The systems that `joyedit edit` and `joyedit generate` know, and what each says of itself.

A system is one file with one small object: its options, how it is told what to do, how its photograph is
prepared, how its pipeline is called, and what it writes and records. A new one is a new file and a row below.

It sees the arguments of the command (`args`), where None is what nobody has said. They fill up on the way
(`make.py`): first from the command line, then from an image made here (`--config-from`), then from the
checkpoint. `call` is what its pipeline is called with, by the names of its parameters.
"""

import argparse
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from joyedit.command.captions import Captions
from joyedit.command.film import Film
from joyedit.command.instruction import Instruction
from joyedit.command.references import References

if TYPE_CHECKING:
    from PIL.Image import Image

    from joyedit.pipelines.made_for import MadeFor


class System(Protocol):
    """What a system is to the commands.

    pipeline: the class of its pipeline. model: the checkpoint, where none is named, or "" where there is
    no small one; occasion: when that is.
    commands: those that it has.
    texts: the arguments that say what to do.
    options: the arguments that it alone knows, and how they are spelt on the command line.
    settings: those of its options that a result records and `--config-from` takes over, and their JSON types.
    files: those of its options that name what it writes beside the result.
    places: those of `places.OPTIONS` that it takes.
    form: in which of `rewriting.FORMS` it reads an instruction, or "" where it takes none; answers: whether
    its own text encoder can rewrite one.

    Three are what is said when a model, {model}, is asked for something else. usage: the command that it has,
    where it lacks the one that was called. untold: where it is not told what to do in its own way. foreign:
    where a model of another system gets one of its options, {option}.
    """

    pipeline: str
    model: str
    occasion: str
    commands: Sequence[str]
    texts: Sequence[str]
    options: Mapping[str, str]
    settings: Mapping[str, type | tuple[type, ...]]
    files: Sequence[str]
    places: Sequence[str]
    form: str
    answers: bool
    usage: str
    untold: str
    foreign: str

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Those of its texts and options that not every command has."""
        ...

    def is_meant(self, args: argparse.Namespace) -> bool:
        """Whether what is said is for this system, when no model is named."""
        ...

    def misuse(self, args: argparse.Namespace) -> str | None:
        """What is wrong with its options as they stand on the command line."""
        ...

    def contradiction(self, args: argparse.Namespace) -> str | None:
        """What is wrong with its options together, once all are known."""
        ...

    def replaced(self, args: argparse.Namespace, source: Mapping[str, Any]) -> Collection[str]:
        """Arguments that are not taken over from `source`, a record or a checkpoint, because of what is
        said."""
        ...

    def prepare(self, photo: "Image", args: argparse.Namespace, made_for: "MadeFor") -> "Image":
        """The photograph in the size to work at, as far as that is known before the model is loaded.

        Raises ValueError for one that cannot be worked at.
        """
        ...

    def call(self, pipe: Any, photo: "Image | None", args: argparse.Namespace) -> dict[str, Any]:
        """What the pipeline is called with, but for what the seeds decide; `image` is the photograph."""
        ...

    def seen(self, pipe: Any, call: Mapping[str, Any]) -> "Image":
        """The photograph as the networks see it."""
        ...

    def run(
        self, pipe: Any, call: Mapping[str, Any], seeds: Sequence[int], args: argparse.Namespace
    ) -> list[dict[str, Any]]:
        """For each seed, which has a generator of its own, "output" and what `files` may ask for."""
        ...

    def shape(self, pipe: Any, call: Mapping[str, Any]) -> tuple[int, ...]:
        """Height and width that the networks work at; calls of one shape may go together."""
        ...

    def run_together(
        self, pipe: Any, calls: Sequence[Mapping[str, Any]], seeds: Sequence[int], args: argparse.Namespace
    ) -> "list[Image]":
        """The "output" of `run` for each call with a seed of its own, of several that are alike, at once."""
        ...

    def guidance(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> float:
        """How strongly the run is guided, at most. At 1 and below, negative prompts have no effect."""
        ...

    def facts(self, pipe: Any, call: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
        """After a run: steps, guidance and `settings` as they were, the pipeline's own defaults included;
        None for what there was not."""
        ...


# In the order in which their options are shown. The first that is meant is taken; the last always is.
SYSTEMS: tuple[System, ...] = (Captions(), Film(), References(), Instruction())


def system_of(pipeline: Any) -> System | None:
    """The system with this class of pipeline."""
    return next((system for system in SYSTEMS if system.pipeline == pipeline), None)
