"""The edits of `joyedit batch`, by a pipeline that is open.

While one picture is computed, the next is decoded and the last one written, each by a thread of its own. A
picture that fails is noted, and the rest goes on; what is no picture's fault ends the run. Where several
processes make each edit together, the first one has the desk, and tells the others what comes next.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import visible
from joyedit.checkpoints.replacing import workplace
from joyedit.command import places, several
from joyedit.command.calls import OF_EACH
from joyedit.command.jobs import Job, Lines, Photographs
from joyedit.command.make import record_of, warn_of_no_effect, warn_of_the_unknown
from joyedit.command.photos import Photo, read_photo, shown_file
from joyedit.command.references import open_references
from joyedit.command.results import write_image
from joyedit.command.rewrite import rewritten
from joyedit.command.shards import Shard
from joyedit.command.systems import System
from joyedit.media.download import is_url
from joyedit.training.processes import Processes

if TYPE_CHECKING:
    from joyedit.pipelines.made_for import MadeFor

log = logging.getLogger("joyedit")

WINDOW = 1024  # edits among which those of one size are looked for
# What no picture is to blame for, where files are read; and what is the fault of one result, where they are
# written: its name, or (None) what its format cannot hold.
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
OF_THE_RESULT = {None, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST}


class Plan(NamedTuple):
    """What this process has to do. jobs: those of its part that are not done."""

    args: argparse.Namespace
    work: Photographs | Lines
    system: System
    made_for: "MadeFor"
    out: Path
    seed: int
    shard: Shard
    jobs: list[Job]
    there: int


class Errors:
    """The file of what failed, a line each; absent until there is one."""

    def __init__(self, plan: Plan):
        self.path = plan.out / f"errors-{plan.shard.index}.jsonl"
        self.work, self.count = plan.work, 0
        for old in [self.path, *(remains(plan) if plan.shard.index == 0 else [])]:
            old.unlink(missing_ok=True)  # what failed is tried again

    def add(self, job: Job, file: str | None, message: str) -> None:
        file = None if file is None else shown_file(file)
        said = {"file": file, "line": self.work.line_of(job), "output": job.output, "message": message}
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(said) + "\n")
        log.error("%s: %s", visible(file or job.output, 80), message)
        self.count += 1


def remains(plan: Plan) -> list[Path]:
    """Errors of shards that there are no more, of another division of the same batch. What these have left is
    this one's to do or another's, and noted again where it fails."""
    found = ((path, path.stem.rpartition("-")[2]) for path in plan.out.glob("errors-*.jsonl"))
    return [path for path, index in found if index.isdecimal() and int(index) >= plan.shard.count]


class Picture(NamedTuple):
    """A job that is ready for the networks."""

    job: Job
    args: argparse.Namespace
    photo: Photo | None
    image: Any

    @property
    def file(self) -> str | None:
        return self.args.photos[0] if self.args.photos else None


class Failed(NamedTuple):
    job: Job
    file: str | None
    message: str

    @classmethod
    def of(cls, job: Job, file: str | None, error: Exception) -> "Failed":
        return cls(job, file, visible(error, 2000) or type(error).__name__)


class Desk:
    """Where photographs are read and results written, by threads of their own, while others are computed."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.last: tuple[str, Photo] | None = None
        self.open = contextlib.ExitStack()

    def __enter__(self) -> "Desk":
        self.making = self.open.enter_context(workplace(self.plan.out)) / "made"
        self.writing = self.open.enter_context(ThreadPoolExecutor(1))
        self.reading = ThreadPoolExecutor(1)
        # At Ctrl-C what is made is still written, and nothing more read.
        self.open.callback(self.reading.shutdown, cancel_futures=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def read_ahead(self, size: int) -> Iterator[Picture | Failed]:
        """The pictures in an order in which those of one size follow each other, read before they are wanted:
        as many as one call takes."""
        waiting: deque[Future[Picture | Failed]] = deque()
        for job, own in self.in_order():
            waiting.append(self.reading.submit(self.read, job, own))
            if len(waiting) > size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def in_order(self) -> Iterator[tuple[Job, argparse.Namespace | ValueError]]:
        """Jobs with their arguments. Networks work at sizes that follow from the photograph's shape."""
        jobs = iter(self.plan.jobs)
        while window := list(islice(jobs, WINDOW)):
            told = [(job, self.args_of(job)) for job in window]
            yield from sorted(told, key=lambda one: shape_of(one[1])) if len(window) > 1 else told

    def args_of(self, job: Job) -> argparse.Namespace | ValueError:
        try:
            return self.plan.work.args_of(job)
        except ValueError as error:
            return error

    def read(self, job: Job, own: argparse.Namespace | ValueError) -> Picture | Failed:
        """In a thread of its own."""
        if isinstance(own, ValueError):
            return Failed.of(job, None, own)
        file = own.photos[0] if own.photos else None
        try:
            photo = None if file is None else self.photo(file)
            photos = [] if photo is None else [photo]
            own.references, own.mask = open_references(own), places.open_mask(own, photos)
            image = None if photo is None else self.plan.system.prepare(photo.image, own, self.plan.made_for)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
                raise
            return Failed.of(job, file, error)
        for name in several.OWN:  # which no other process could be told
            vars(own).pop(name, None)
        return Picture(job, own, photo, image)

    def photo(self, file: str) -> Photo:
        """Read once where jobs that follow each other have the same."""
        if self.last is None or self.last[0] != file:
            self.last = None  # before the next one is read: two may be too much
            self.last = file, read_photo(file)
        return self.last[1]

    def write(
        self, one: Picture, image: Any, record: dict[str, Any] | None, profile: bytes | None
    ) -> Path | Failed:
        """In a thread of its own. The file appears whole."""
        path = self.plan.out / one.job.output
        temporary = self.making / f"result{path.suffix}"
        try:
            self.making.mkdir(parents=True, exist_ok=True)
            write_image(image, path, temporary, record, profile)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        except ValueError as error:  # a format that has no pictures of that size
            return Failed.of(one.job, one.file, error)
        except OSError as error:
            if error.errno in OF_THE_RESULT:
                return Failed.of(one.job, one.file, error)
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(error.errno or errno.EIO, f"{reason}: {path} cannot be written") from error
        return path


class Run:
    """Edits by a pipeline that is open. plan: which; None on a process that is told by another."""

    def __init__(
        self,
        system: System,
        pipe: Any,
        size: int,
        processes: Processes,
        plan: Plan | None,
        errors: Errors | None,
    ):
        self.system, self.pipe, self.size, self.processes = system, pipe, size, processes
        self.errors = errors
        self.warned = False
        self.desk = None if plan is None else Desk(plan)
        self.open = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        from joyedit.pipelines.reuse import reused

        self.open.enter_context(reused(self.pipe))
        if self.desk is not None:
            self.open.enter_context(self.desk)
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def results(self) -> Iterator[Path | None]:
        """The files that are written, each when it is; None for an edit that failed."""
        waiting: deque[Future[Path | Failed]] = deque()
        for made in self.made():
            if made is None:
                yield None
            elif self.desk is not None:
                waiting.append(self.desk.writing.submit(self.desk.write, *made))
            while len(waiting) > self.size:
                yield self.written(waiting.popleft().result())
        while waiting:
            yield self.written(waiting.popleft().result())

    def written(self, one: Path | Failed) -> Path | None:
        return self.failed(one) if isinstance(one, Failed) else one

    def made(self) -> Iterator[tuple[Any, ...] | None]:
        """What to write of each edit, or None."""
        together: list[tuple[Picture, dict[str, Any]]] = []
        for one in self.coming():
            ready = self.called(one)
            if ready is None:
                yield None
                continue
            if together and not alike(self.system, self.pipe, together[-1], ready):
                yield from self.run(together)
                together = []
            together.append(ready)
            if len(together) == self.size:
                yield from self.run(together)
                together = []
        if together:
            yield from self.run(together)

    def coming(self) -> Iterator["Picture | Failed"]:
        """The pictures, the same ones on every process."""
        if not self.processes.several:
            assert self.desk is not None
            yield from self.desk.read_ahead(self.size)
            return
        pictures = None if self.desk is None else self.desk.read_ahead(self.size)
        while True:
            one = self.processes.told(None if pictures is None else next(pictures, None))
            if one is None:
                return
            yield one

    def called(self, one: Picture | Failed) -> tuple[Picture, dict[str, Any]] | None:
        """What the pipeline is called with for it; None, once that is noted, where that fails."""
        if isinstance(one, Failed):
            return self.failed(one)
        try:
            if one.args.rewrite is not None and one.args.rewritten_by is None:
                one = self.rewritten(one)
            call = self.system.call(self.pipe, one.image, one.args)
        except ValueError as error:
            return self.failed(Failed.of(one.job, one.file, error))
        if self.desk is not None and not self.warned:
            self.warned = True
            warn_of_no_effect(one.args, self.system, self.pipe, call)
            photos = [] if one.photo is None else [one.photo]
            warn_of_the_unknown(one.args, self.system, self.pipe, photos, [call], self.desk.plan.made_for)
        return one, call

    def failed(self, one: Failed) -> None:
        if self.errors is not None:
            self.errors.add(*one)

    def rewritten(self, one: Picture) -> Picture:
        """With the instruction in other words. Raises ValueError where nobody answers: it is tried again."""
        photos = [] if one.photo is None else [one.photo]
        by = None if is_url(one.args.rewrite) else self.pipe
        (own,) = rewritten(one.args, self.system, photos, self.processes, by)
        if own.rewritten_by is None:
            raise ValueError("the instruction could not be rewritten")
        return one._replace(args=own)

    def run(self, those: Sequence[tuple[Picture, dict[str, Any]]]) -> Iterator[tuple[Any, ...] | None]:
        """What to write of edits that are alike. One alone is run as `joyedit edit` runs it."""
        seeds, calls = [one.args.seed for one, _ in those], [call for _, call in those]
        first, own = those[0][0], those[0][0].args
        try:
            if len(those) == 1:
                images = [self.system.run(self.pipe, calls[0], seeds, own)[0]["output"]]
            else:
                images = self.system.run_together(self.pipe, calls, seeds, own)
        except (ValueError, TypeError) as error:
            self.pipe.for_one_call()  # raises where the fault is the checkpoint's
            if len(those) > 1:
                for one in those:
                    yield from self.run([one])
                return
            yield self.failed(Failed.of(first.job, first.file, error))
            return
        for (one, call), image in zip(those, images, strict=True):
            record = record_of(one.args, self.system, self.pipe, call, one.photo, one.args.seed, image)
            profile = None if one.photo is None else one.photo.profile
            yield one, image, record, profile


def shape_of(own: argparse.Namespace | ValueError) -> tuple[float, int]:
    """What photographs of one size to work at have alike: their shape; (0, 0) where it is not known yet."""
    from joyedit.media.decoding import size_in_header

    file = None if isinstance(own, ValueError) or not own.photos else own.photos[0]
    try:
        size = None if file is None or is_url(file) else size_in_header(expanded(file))
    except ValueError:  # the home of nobody, which is said where the photograph is read
        size = None
    return (0.0, 0) if size is None else (size[0] / size[1], size[0])


def alike(
    system: System, pipe: Any, one: tuple[Picture, dict[str, Any]], other: tuple[Picture, dict[str, Any]]
) -> bool:
    """Whether two edits may be one call."""
    return likeness(system, pipe, *one) == likeness(system, pipe, *other)


def likeness(system: System, pipe: Any, picture: Picture, call: dict[str, Any]) -> tuple[Any, ...]:
    """What edits of one call have in common. Where a size, a mask or colours bring the result back to the
    photograph, that is the photograph's size, too."""
    rest = {name: value for name, value in call.items() if name not in OF_EACH}
    own = picture.args
    exact = own.size is not None or own.mask is not None or own.match_colors
    size = picture.photo.image.size if exact and picture.photo is not None else None
    return sorted(call), rest, system.shape(pipe, call), size
