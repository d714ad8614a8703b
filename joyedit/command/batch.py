"""`joyedit batch`: one pipeline, and many edits, of which each is what `joyedit edit` makes.

First everything is looked at that can be (`jobs.py`), and the folder of the results taken
(`batch_record.py`). Then the part of this process (`shards.py`) is done, but for what is there already:
results appear whole, so a file at a result's name is one. `batch_run.py` does it.
"""

import argparse
import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from joyedit.checkpoints.places import expanded
from joyedit.command import several
from joyedit.command.batch_options import has_lines
from joyedit.command.batch_record import RECORD, claim, differences, is_of_batch, read_record, settings_of
from joyedit.command.batch_run import Errors, Plan, Run
from joyedit.command.jobs import Faulty, Lines, Photographs
from joyedit.command.make import (
    fill_from_checkpoint,
    open_pipeline,
    refuse_adapters,
    refuse_contradictions,
    system_for,
    take_in_prompt,
)
from joyedit.command.recorded import fill_from_image
from joyedit.command.results import existing_parent
from joyedit.command.rewrite import refuse_rewriter
from joyedit.command.shards import Shard, of_environment
from joyedit.command.systems import System
from joyedit.training.processes import ALONE, Processes, started

log = logging.getLogger("joyedit")

MOST_SEEDS = 2**32
SECONDS_BETWEEN_LOOKS = 0.5


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
        edits = "1 edit" if total == 1 else f"{total} edits"
        return f"{edits}: {self.made} made{each}{there}, {self.failed} failed"


def batch(
    args: argparse.Namespace, show: Callable[[Path], None], processes: Processes = ALONE
) -> Done | None:
    """Do what is not done of the part of this process. show: is called with each file that is written.

    Of several processes that make each edit together (`several.py`) the first one plans, reads, writes and
    tells the others, where None is returned, what comes next.

    Raises Faulty before the first edit for what cannot be done as it is said, and as `make` for models.
    """
    plans: list[Plan] = []

    def plan() -> tuple[System, bool]:
        plans.append(planned(args))
        return plans[0].system, bool(plans[0].jobs)

    system, busy = several.told(processes, args, plan)
    own = plans[0] if plans else None
    errors = None if own is None else Errors(own)
    seconds, made = 0.0, 0
    if own is not None:
        log.info("seed %d", own.seed)
        if own.shard.count > 1:
            log.info("part %s", own.shard)
    if busy:
        pipe = open_pipeline(args)
        pipe.set_progress_bar_config(disable=True)
        start = time.monotonic()  # of the edits: the model is loaded once, whatever their number
        with Run(system, pipe, together(args), processes, own, errors) as run, quiet_unless_asked(args):
            with bar_of(own, args) as bar:
                for path in run.results():
                    bar.update()
                    if path is not None:
                        made += 1
                        show(path)
        seconds = time.monotonic() - start
    if own is None or errors is None:
        return None
    done = Done(made, own.there, errors.count, seconds, errors.path)
    if several.size(args) == 1:
        let_others_finish(done.failed > 0)
    return done


def together(args: argparse.Namespace) -> int:
    """How many edits one call may take. Of the reference's defects some draw from the global generator, whose
    numbers are those of `joyedit edit` for the first one of a call alone."""
    if args.reference_quirks and args.batch_size > 1:
        log.warning("--batch-size %d: with --reference-quirks each is edited alone", args.batch_size)
        return 1
    return args.batch_size


def let_others_finish(failed: bool) -> None:
    """torchrun ends all its processes when one ends with another status than 0. So this one, if some of its
    edits failed, waits until the others have done theirs."""
    if not started().several or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    from torch.distributed.rendezvous import rendezvous

    store, _, count = next(rendezvous("env://"))
    name = f"joyedit batch {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store.add(name, 1)
    while failed and store.add(name, 0) < count:
        time.sleep(SECONDS_BETWEEN_LOOKS)


def planned(args: argparse.Namespace) -> Plan:
    shard = shard_of(args)
    args.command = "edit"
    take_in_prompt(args)
    if args.config_from is not None:
        fill_from_image(args, None)
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
        several.refuse_heads(plan.args)
        refuse_adapters(plan.args)
        refuse_rewriter(plan.args, plan.system, plan.made_for)
        if record is None:
            refuse_others(plan)
        record = claim(out, seed, facts_of(plan, args))
        if asked is not None or record["seed"] == seed:
            break
        seed = record["seed"]  # another process was first
    if wrong := differences(record, asked, facts_of(plan, args)):
        raise Faulty([f"{out} holds another batch ({'; '.join(wrong)}): {remedy(out)}"])
    own = list(plan.work.jobs(shard.of(len(plan.work))))
    done = set(finished(out, [job.output for job in own]))
    jobs = [job for job in own if job.output not in done]
    vars(args).update(vars(plan.args))  # what the checkpoint fills in
    return plan._replace(jobs=jobs, there=len(own) - len(jobs))


def shard_of(args: argparse.Namespace) -> Shard:
    """The part of this process, whose device is then its own among those that torchrun has started."""
    from joyedit.training.devices import device_of

    try:
        apart = several.size(args) == 1
        if apart and started().several:
            args.device = str(device_of(args.device or "auto"))
        return args.shard or of_environment(os.environ, torchrun=apart)
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


def remedy(out: Path) -> str:
    """What to do about the folder of another batch. It is not taken over even where it is empty: the other
    may be loading its model."""
    other = "name another folder with --out"
    if any(not is_of_batch(path.name) and path.name[0] != "." for path in out.iterdir()):
        return other
    return f"{other}, or delete {out / RECORD}, beside which there is no result, if nobody is at work there"


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


def bar_of(plan: Plan | None, args: argparse.Namespace) -> Any:
    """Progress with rate and time left: on a terminal, unless asked for or against."""
    from tqdm import tqdm

    disable = {-1: True, 0: None}.get(args.verbosity, False)
    if plan is None:
        return tqdm(disable=True)
    total = len(plan.jobs) + plan.there
    return tqdm(total=total, initial=plan.there, unit="edit", disable=disable, dynamic_ncols=True)
