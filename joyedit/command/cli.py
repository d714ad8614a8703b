"""The command line: `joyedit edit`, `generate`, `ask`, `estimate`, `train`, `demo`, `convert`, `verify` and
`info`.

The paths of what was made, or the answer, are all that goes to standard output; log, progress and errors go
to standard error. A run ends with 0, with 2 for arguments that are wrong in themselves, with 1 and one line
for what else is known to go wrong (`-v` adds the traceback), and with 128 and the signal's number after
Ctrl-C (130) and other signals that end a process, which leave no file behind. What cannot be printed is
written all the same.

Nothing heavy is imported before the arguments are read, so `--help`, `--version` and a misspelt option are
quick. What the user did not say is what the checkpoint was made for (`pipelines/made_for.py`), if it says so;
else it stays None down to the pipeline, whose own defaults then hold.
"""

import argparse
import contextlib
import io
import itertools
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from joyedit.checkpoints.places import expanded
from joyedit.checkpoints.plain_text import visible
from joyedit.command import convert as conversion
from joyedit.command import several
from joyedit.command.arguments import DEMO_FOLDER, parse
from joyedit.command.ask import answer
from joyedit.command.calls import source_options
from joyedit.command.make import make
from joyedit.command.parsing import one_line
from joyedit.command.results import OUTPUT_SUFFIXES
from joyedit.training.ending import FailedElsewhere
from joyedit.training.processes import started

log = logging.getLogger("joyedit")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status; wrong arguments raise SystemExit(2)."""
    commands = {"edit": edit, "generate": edit, "ask": ask, "estimate": estimate}
    commands |= {"train": train, "demo": demo, "convert": convert, "verify": verify, "info": info}
    with several.said_once():
        args = parse(argv, commands)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the console has no letters for
    with log_to_stderr(args.verbosity), signals_raise():
        try:
            return args.run(args) or 0
        except KeyboardInterrupt:
            print("joyedit: interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        except Ended as error:
            print(f"joyedit: ended by {error.number.name}", file=sys.stderr)
            return 128 + error.number
        except BrokenPipeError:  # the reader of our output went away, as in `joyedit info | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except FailedElsewhere as error:
            log.debug("%s", error)
            return 1
        except (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError) as error:
            message = known_error(error)
            if message is None:
                raise
            if args.verbosity > 0:
                print(plain(traceback.format_exc()), end="", file=sys.stderr)
            print(f"joyedit: error: {message}", file=sys.stderr)
            return 1


class Ended(BaseException):
    """A signal asks the process to end."""

    def __init__(self, number: signal.Signals):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Signals that would end the process at once end it as Ctrl-C does, and nothing is left behind."""

    def end(number: int, frame: Any) -> None:
        raise Ended(signal.Signals(number))

    before = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def known_error(error: Exception) -> str | None:
    """One line that says what went wrong; None for a failure that is a defect and deserves its traceback."""
    line = one_line(str(error), 2000)
    gpu_is_full = type(error).__name__ == "OutOfMemoryError"
    if gpu_is_full or "can't allocate memory" in line or isinstance(error, MemoryError):
        return f"out of memory: try --offload model, a smaller --basesize, fewer --num-images ({line[:200]})"
    if isinstance(error, RuntimeError) or (isinstance(error, ImportError) and "pip install" not in line):
        return None
    return line or type(error).__name__


class PlainText(logging.Formatter):
    """What is logged, as `plain` shows it."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def plain(text: str) -> str:
    """Lines with escapes for what a terminal would obey, whoever wrote it."""
    return "\n".join(visible(line, None) for line in text.split("\n"))


@contextlib.contextmanager
def log_to_stderr(verbosity: int) -> Iterator[None]:
    """Show the library's log: errors alone with -q, everything with -v."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainText("%(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel({-1: logging.ERROR, 0: logging.INFO}.get(verbosity, logging.DEBUG))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def edit(args: argparse.Namespace) -> None:
    """Edit a photograph; without one, generate. All results are written, whatever becomes of the output."""
    unprinted = None
    with several.joined(args) as processes:
        for paths in make(args, processes):
            try:
                print(*paths, sep="\n", flush=True)
            except (OSError, ValueError) as error:  # the reader went away; the output was closed
                unprinted = unprinted or error
    if unprinted is not None:
        raise unprinted


def ask(args: argparse.Namespace) -> None:
    """Print the answer to a question, on a terminal word by word."""

    def show(piece: str) -> None:
        print(plain(piece), end="", flush=True)

    live = sys.stdout is not None and sys.stdout.isatty()
    text = answer(args, show if live else None)
    print("" if live else text, flush=True)


def estimate(args: argparse.Namespace) -> None:
    """Print what memory and time an edit will take."""
    from joyedit.command import estimate as estimates
    from joyedit.command.info import json_text

    found = estimates.estimated(args)
    print(json_text(found.to_dict()) if args.json else "\n".join(estimates.lines(found)))


def train(args: argparse.Namespace) -> int:
    """Train, and print where the result is; with --check look at the set, and print its contact sheet. 1 for
    a set that cannot be trained on, with all its faults on standard error. Of several processes one speaks:
    the first, or the first that fails."""
    from joyedit.command import train as training
    from joyedit.training.pairs import FaultyPairs

    disable, first = {-1: True, 0: None}.get(args.verbosity, False), started().first
    if args.check and not first:
        return 0
    try:
        with several.heard(args, first):
            if not args.check:
                print(training.train(args, disable), flush=True)
                return 0
            found = training.check(args)
            for line in training.lines(found):
                log.info("%s", line)
            if found.sheet is not None:
                print(found.sheet, flush=True)
            faults = found.faults
    except FaultyPairs as error:
        faults = error.faults
    for fault in faults:
        log.error("%s", fault)
    if faults:
        log.error("%d faults: nothing is trained on this set before they are gone", len(faults))
    return 1 if faults else 0


def demo(args: argparse.Namespace) -> None:
    """Write a picture of edits by the three built-in models, and the files behind it, to a folder."""
    from joyedit.command.demo import run

    disable = {-1: True, 0: None}.get(args.verbosity, False)
    folder = expanded(args.out or (DEMO_FOLDER if args.force else free_folder(DEMO_FOLDER)))
    print(run(folder, force=args.force, disable_progress=disable), flush=True)


def free_folder(name: str) -> str:
    """That name or, where such a thing is there already, the first of name-2, name-3, ... that is not."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = next(name for name in names if not os.path.lexists(name))
    if free != name:
        log.info("%s is there already: this goes to %s", name, free)
    return free


def convert(args: argparse.Namespace) -> None:
    """Write a checkpoint in another layout or dtype."""
    print(conversion.convert(args), flush=True)


def verify(args: argparse.Namespace) -> int:
    """Print whether the files of a checkpoint are whole; 1 where they are not."""
    from joyedit.checkpoints.verify import verify
    from joyedit.command.info import json_text
    from joyedit.loading.layouts import place_of

    disable = {-1: True, 0: None}.get(args.verbosity, False)
    options = {"revision": args.revision, "cache_dir": args.cache_dir, "disable_progress": disable}
    found = verify(place_of(args.target), full=args.full, **options)
    text = json_text({**found.to_dict(), "name": args.target}) if args.json else "\n".join(found.lines())
    print(text, flush=True)
    return 0 if found.ok else 1


def info(args: argparse.Namespace) -> None:
    """Print what a checkpoint holds, how an image was made, or what this installation is."""
    from joyedit.command import info as facts
    from joyedit.media.images import read_metadata

    if args.target is None:
        found = facts.environment()
        shown = facts.lines_of(found)
    elif Path(args.target).suffix.lower() in OUTPUT_SUFFIXES:
        found = read_metadata(args.target)
        shown = facts.lines_of(found)
    else:
        checkpoint = facts.describe(args.target, **source_options(args))
        found, shown = checkpoint.to_dict(), checkpoint.lines()
    print(facts.json_text(found) if args.json else "\n".join(shown))
