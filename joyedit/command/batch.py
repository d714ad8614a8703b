"""`joyedit batch`: one pipeline, and many edits, of which each is what `joyedit edit` makes.

First everything is looked at that can be (`jobs.py`), and the folder of the results taken
(`batch_record.py`). Then the part of this process (`shards.py`) is done, but for what is there already:
results appear whole, so a file at a result's name is one. While one picture is computed, the next is decoded
and the last one written, each by a thread of its own. A picture that fails is noted, and the rest goes on;
what is no picture's fault ends the run.
"""

import argparse
import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import visible
from joyedit.command import places
from joyedit.command.batch_options import has_lines
from joyedit.command.batch_record import RECORD, claim, differences, read_record, settings_of
from joyedit.command.calls import OF_EACH
from joyedit.command.jobs import Faulty, Job, Lines, Photographs
from joyedit.command.make import (
    fill_from_checkpoint,
    open_pipeline,
    record_of,
    refuse_adapters,
    refuse_contradictions,
    system_for,
    take_in_prompt,
    warn_of_no_effect,
    warn_of_the_unknown,
)
from joyedit.command.photos import Photo, read_photo
from joyedit.command.recorded import fill_from_image
from joyedit.command.references import open_references
from joyedit.command.results import existing_parent, write_image
from joyedit.command.rewrite import refuse_rewriter, rewritten
from joyedit.command.shards import Shard, of_environment
from joyedit.command.systems import System
from joyedit.media.download import is_url

if TYPE_CHECKING:
    from joyedit.pipelines.made_for import MadeFor

log = logging.getLogger("joyedit")

WINDOW = 1024  # edits among which those of one size are looked for
MOST_SEEDS = 2**32
# What no picture is to blame for, where files are read.
OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}


class Done(NamedTuple):
    """How many edits are made, were there already, and failed; `errors`: the file that says why."""

    made: int
    there: int
    failed: int
    seconds: float
    errors: Path

    def __str__(self) -> str:
        total = self.made + self.there + self.failed
        each = f", {self.seconds / self.made:.2f} s each" if self.made else ""
        there = f", {self.there} were there" if self.there else ""
        return f"{total} edits: {self.made} made{each}{there}, {self.failed} failed"


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


def batch(args: argparse.Namespace, show: Callable[[Path], None]) -> Done:
    """Do what is not done of the part of this process. show: is called with each file that is written.

    Raises Faulty before the first edit for what cannot be done as it is said, and as `make` for models.
    """
    plan = planned(args)
    log.info("seed %d", plan.seed)
    errors = Errors(plan)
    start = time.monotonic()
    made = 0
    if plan.jobs:
        pipe = open_pipeline(plan.args)
        pipe.set_progress_bar_config(disable=True)
        with Run(plan, pipe, errors) as run, quiet_unless_asked(args), bar_of(plan, args) as bar:
            for path in run.results():
                bar.update()
                if path is not None:
                    made += 1
                    show(path)
    return Done(made, plan.there, errors.count, time.monotonic() - start, errors.path)


# ------------------------------------------------------------------------------------------------ before work
def planned(args: argparse.Namespace) -> Plan:
    shard = shard_of(args)
    args.command = "edit"
    take_in_prompt(args)
    if args.config_from is not None:
        fill_from_image(args, ())
        refuse_contradictions(args)
    out, source = expanded(args.out), expanded(args.source)
    folder = existing_parent(out / RECORD)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise Faulty([f"{out} cannot be written: {folder} is no folder that you may write to"])
    asked, record = args.seed, read_record(out)
    seed = record["seed"] if asked is None and record else asked
    seed = secrets.randbelow(MOST_SEEDS) if seed is None else seed
    while True:
        plan = looked_at(args, source, out, seed, shard)
        if record is None:
            refuse_others(plan)
        record = claim(out, seed, facts_of(plan, args))
        if asked is not None or record["seed"] == seed:
            break
        seed = record["seed"]  # another process was first
    if wrong := differences(record, asked, facts_of(plan, args)):
        raise Faulty([f"{out} holds another batch ({'; '.join(wrong)}): name another folder with --out"])
    refuse_adapters(plan.args)
    refuse_rewriter(plan.args, plan.system, plan.made_for)
    own = list(plan.work.jobs(shard.of(len(plan.work))))
    done = set(finished(out, [job.output for job in own]))
    jobs = [job for job in own if job.output not in done]
    return plan._replace(jobs=jobs, there=len(own) - len(jobs))


def shard_of(args: argparse.Namespace) -> Shard:
    try:
        return args.shard or of_environment(os.environ)
    except ValueError as error:
        raise Faulty([str(error)]) from None


def looked_at(args: argparse.Namespace, source: Path, out: Path, seed: int, shard: Shard) -> Plan:
    """What there is to do, with that seed."""
    if has_lines(args):
        work = Lines(source, args, seed)
        return Plan(args, work, work.system, work.made_for, out, seed, shard, [], 0)
    system = system_for(args)
    filled = argparse.Namespace(**vars(args))
    made_for = fill_from_checkpoint(filled, system)
    return Plan(filled, Photographs(source, filled, seed, out), system, made_for, out, seed, shard, [], 0)


def facts_of(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    return {"settings": settings_of(args), **plan.work.facts}


def refuse_others(plan: Plan) -> None:
    """Raises Faulty where files are at the names of results, and no batch has been here."""
    there = finished(plan.out, plan.work.outputs())
    first = next(there, None)
    if first is not None and read_record(plan.out) is None:
        raise Faulty([f"{plan.out / first} exists, and is of no batch: name another folder with --out"])


def finished(out: Path, outputs: Iterable[str]) -> Iterator[str]:
    """Those of the results that are there. Raises IsADirectoryError for a folder at such a name.

    Folders are listed, once each: over a network that is quicker than to ask for a million names.
    """
    listed: dict[str, set[str]] = {}
    for output in outputs:
        folder, name = os.path.split(output)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(out / folder))
            except (FileNotFoundError, NotADirectoryError):
                listed[folder] = set()
        if name in listed[folder]:
            if (out / output).is_dir():
                raise IsADirectoryError(f"{out / output} is a folder, and a result is to go there")
            if (out / output).stat().st_size:
                yield output


class Errors:
    """The file of what failed, a line each; absent until there is one."""

    def __init__(self, plan: Plan):
        self.path = plan.out / f"errors-{plan.shard.index}.jsonl"
        self.work, self.count = plan.work, 0
        for old in [self.path, *(remains(plan, "errors-*.jsonl") if plan.shard.index == 0 else [])]:
            old.unlink(missing_ok=True)  # what failed is tried again

    def add(self, job: Job, file: str | None, error: Exception) -> None:
        message = visible(error, 2000) or type(error).__name__
        said = {"file": file, "line": self.work.line_of(job), "output": job.output, "message": message}
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(said) + "\n")
        log.error("%s: %s", visible(file or job.output, 80), message)
        self.count += 1


def remains(plan: Plan, pattern: str) -> list[Path]:
    """What shards have left that there are no more, of another division of the same batch."""
    found = ((path, path.name.split(".jsonl")[0].rpartition("-")[2]) for path in plan.out.glob(pattern))
    return [path for path, index in found if index.isdecimal() and int(index) >= plan.shard.count]


@contextlib.contextmanager
def quiet_unless_asked(args: argparse.Namespace) -> Iterator[None]:
    """Without the lines that say how each photograph is worked at."""
    before = log.level
    if args.verbosity == 0:
        log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)


def bar_of(plan: Plan, args: argparse.Namespace) -> Any:
    """Progress with rate and time left: on a terminal, unless asked for or against."""
    from tqdm import tqdm

    disable = {-1: True, 0: None}.get(args.verbosity, False)
    total = len(plan.jobs) + plan.there
    return tqdm(total=total, initial=plan.there, unit="edit", disable=disable, dynamic_ncols=True)


# ------------------------------------------------------------------------------------------------------- work
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
    error: Exception


class Run:
    """The edits of a plan by a pipeline that is open."""

    def __init__(self, plan: Plan, pipe: Any, errors: Errors):
        self.plan, self.pipe, self.errors = plan, pipe, errors
        self.system, self.size = plan.system, plan.args.batch_size
        self.making = plan.out / f".making-{plan.shard.index}"
        self.last: tuple[str, Photo] | None = None
        self.warned = False
        self.open = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        from joyedit.pipelines.reuse import reused

        for old in [self.making, *(remains(self.plan, ".making-*") if self.plan.shard.index == 0 else [])]:
            shutil.rmtree(old, ignore_errors=True)  # of one that was killed
        self.open.enter_context(reused(self.pipe))
        self.open.callback(shutil.rmtree, self.making, ignore_errors=True)
        self.reading = self.open.enter_context(ThreadPoolExecutor(1))
        self.writing = self.open.enter_context(ThreadPoolExecutor(1))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def results(self) -> Iterator[Path | None]:
        """The files that are written, each when it is; None for an edit that failed."""
        waiting: deque[Future[Path]] = deque()
        for made in self.made():
            if made is None:
                yield None
                continue
            waiting.append(self.writing.submit(self.write, *made))
            while len(waiting) > self.size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def made(self) -> Iterator[tuple[Any, ...] | None]:
        """What to write of each edit, or None."""
        together: list[tuple[Picture, dict[str, Any]]] = []
        for one in self.read_ahead():
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

    def read_ahead(self) -> Iterator[Picture | Failed]:
        """The pictures in an order in which those of one size follow each other, read before they are wanted:
        as many as one call takes."""
        waiting: deque[Future[Picture | Failed]] = deque()
        for job, own in self.in_order():
            waiting.append(self.reading.submit(self.read, job, own))
            if len(waiting) > self.size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def in_order(self) -> Iterator[tuple[Job, argparse.Namespace | ValueError]]:
        """Jobs with their arguments. Networks work at sizes that follow from the photograph's shape."""
        jobs = iter(self.plan.jobs)
        while window := list(islice(jobs, WINDOW)):
            several = [(job, self.args_of(job)) for job in window]
            yield from sorted(several, key=lambda one: shape_of(one[1])) if len(window) > 1 else several

    def args_of(self, job: Job) -> argparse.Namespace | ValueError:
        try:
            return self.plan.work.args_of(job)
        except ValueError as error:
            return error

    def read(self, job: Job, own: argparse.Namespace | ValueError) -> Picture | Failed:
        """In a thread of its own."""
        if isinstance(own, ValueError):
            return Failed(job, None, own)
        file = own.photos[0] if own.photos else None
        try:
            photo = None if file is None else self.photo(file)
            photos = [] if photo is None else [photo]
            own.references, own.mask = open_references(own), places.open_mask(own, photos)
            image = None if photo is None else self.system.prepare(photo.image, own, self.plan.made_for)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
                raise
            return Failed(job, file, error)
        return Picture(job, own, photo, image)

    def photo(self, file: str) -> Photo:
        """Read once where jobs that follow each other have the same."""
        if self.last is None or self.last[0] != file:
            self.last = None  # before the next one is read: two may be too much
            self.last = file, read_photo(file)
        return self.last[1]

    def called(self, one: Picture | Failed) -> tuple[Picture, dict[str, Any]] | None:
        """What the pipeline is called with for it; None, once that is noted, where that fails."""
        if isinstance(one, Failed):
            self.errors.add(one.job, one.file, one.error)
            return None
        try:
            if one.args.rewrite is not None and one.args.rewritten_by is None:
                one = self.rewritten(one)
            call = self.system.call(self.pipe, one.image, one.args)
        except ValueError as error:
            self.errors.add(one.job, one.file, error)
            return None
        if not self.warned:
            self.warned = True
            warn_of_no_effect(one.args, self.system, self.pipe, call)
            photos = [] if one.photo is None else [one.photo]
            warn_of_the_unknown(one.args, self.system, self.pipe, photos, [call], self.plan.made_for)
        return one, call

    def rewritten(self, one: Picture) -> Picture:
        """With the instruction in other words. Raises ValueError where nobody answers: it is tried again."""
        photos = [] if one.photo is None else [one.photo]
        by = None if is_url(one.args.rewrite) else self.pipe
        (own,) = rewritten(one.args, self.system, photos, by)
        if own.rewritten_by is None:
            raise ValueError("the instruction could not be rewritten")
        return one._replace(args=own)

    def run(self, several: Sequence[tuple[Picture, dict[str, Any]]]) -> Iterator[tuple[Any, ...] | None]:
        """What to write of edits that are alike. One alone is run as `joyedit edit` runs it."""
        seeds, calls = [one.args.seed for one, _ in several], [call for _, call in several]
        first, own = several[0][0], several[0][0].args
        try:
            if len(several) == 1:
                images = [self.system.run(self.pipe, calls[0], seeds, own)[0]["output"]]
            else:
                images = self.system.run_together(self.pipe, calls, seeds, own)
        except (ValueError, TypeError) as error:
            self.pipe.for_one_call()  # raises where the fault is the checkpoint's
            if len(several) > 1:
                for one in several:
                    yield from self.run([one])
                return
            self.errors.add(first.job, first.file, error)
            yield None
            return
        for (one, call), image in zip(several, images, strict=True):
            record = record_of(one.args, self.system, self.pipe, call, one.photo, one.args.seed, image)
            profile = None if one.photo is None else one.photo.profile
            yield one.job, image, record, profile

    def write(self, job: Job, image: Any, record: dict[str, Any] | None, profile: bytes | None) -> Path:
        """In a thread of its own. The file appears whole."""
        path = self.plan.out / job.output
        temporary = self.making / f"result{path.suffix}"
        try:
            self.making.mkdir(parents=True, exist_ok=True)
            write_image(image, path, temporary, record, profile)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(error.errno or errno.EIO, f"{reason}: {path} cannot be written") from error
        return path


def shape_of(own: argparse.Namespace | ValueError) -> tuple[float, int]:
    """What photographs of one size to work at have alike: their shape; (0, 0) where it is not known yet."""
    from joyedit.media.decoding import size_in_header

    file = None if isinstance(own, ValueError) or not own.photos else own.photos[0]
    size = None if file is None or is_url(file) else size_in_header(expanded(file))
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
