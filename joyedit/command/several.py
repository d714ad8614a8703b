"""`--parallel cfg=2,sequence=4`: one edit in several processes, each with a GPU of its own.

torchrun starts the same command in all of them. The first reads what the user gives (photographs, standard
input, the image of --config-from), sees whether the results may be written, draws the seed, has the
instruction rewritten, and tells the others. All load the model and compute their share of each step; the
first writes. It alone is heard, log, progress and standard output, except for what goes wrong: that says the
process to which it happens first, and all end (`training/ending.py`).
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from joyedit.checkpoints.plain_text import shown
from joyedit.command.calls import origin_options, source_options
from joyedit.command.film import PRESETS
from joyedit.command.values import whole_number
from joyedit.training.processes import ALONE, Processes, started

log = logging.getLogger("joyedit")

Found = TypeVar("Found")

MOST = {"cfg": 2, "sequence": 1024}  # guidance has two branches
FORM = "wanted cfg=1 or cfg=2, sequence=N, or both as in cfg=2,sequence=4"
OWN = ("run", "parser", "verbosity")  # arguments that each process keeps
FIRST_SPEAKS = 10  # seconds in which torchrun ends the others


def add_option(add: Callable[..., Any]) -> None:
    """add: `add_argument` of a parser or of a group."""
    add(
        "--parallel",
        metavar="cfg=N,sequence=N",
        type=mesh,
        help="divide each edit among as many processes as cfg times sequence, which torchrun starts, each "
        "with a GPU: cfg=2 computes the two branches of the guidance apart, sequence=N a share of the tokens "
        "in each process",
    )


def mesh(text: str) -> dict[str, int]:
    """cfg and sequence, each 1 where it is not said."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in MOST:
            raise argparse.ArgumentTypeError(f"{shown(part, 40)}: {FORM}")
        if name in found:
            raise argparse.ArgumentTypeError(f"{name} is given twice: {FORM}")
        try:
            found[name] = whole_number(number, 1, MOST[name])
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{name}: {error}") from None
    return {**dict.fromkeys(MOST, 1), **found}


def spelt(args: argparse.Namespace) -> str | None:
    """The mesh, as it is written."""
    if args.parallel is None:
        return None
    return ",".join(f"{name}={number}" for name, number in args.parallel.items())


def size(args: argparse.Namespace) -> int:
    """How many processes make one edit."""
    return 1 if args.parallel is None else args.parallel["cfg"] * args.parallel["sequence"]


def misuse(args: argparse.Namespace) -> str | None:
    """What is wrong with --parallel as it stands on the command line, and with the processes that there
    are."""
    count, wanted = started().count, size(args)
    if args.parallel is None:
        if count == 1 or args.command == "batch":  # whose processes have pictures of their own
            return None
        return (
            f"{count} processes would all make the same and write one file: say how they share it, as in "
            f"--parallel sequence={count}, or start one alone, without torchrun"
        )
    asked = f"--parallel {spelt(args)} takes {wanted} processes"
    if count == 1 < wanted:
        start = f"torchrun --nproc-per-node {wanted} -m joyedit {args.command} ..."
        return f"{asked}, and this is one alone: start it with {start} --parallel {spelt(args)}"
    if count != wanted:
        return f"{asked} (cfg times sequence), and there are {count}"
    if wanted > 1 and ":" in (args.device or ""):
        own = args.device.partition(":")[0]
        return f"--device {shown(args.device, 40)}: with --parallel each process has its own: say {own}"
    return None


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with --parallel beside other options, once all are known."""
    if args.parallel is None:
        return None
    if args.source_prompt is not None or args.target_prompt is not None:
        return f"--parallel {spelt(args)} is for an instruction, not for --source and --target (DiffEdit)"
    guidance = PRESETS[args.preset][1] if args.guidance_scale is None else args.guidance_scale
    if args.parallel["cfg"] > 1 and guidance <= 1:
        return (
            f"--parallel {spelt(args)}: at --guidance-scale {guidance:g} there is no guidance, whose two "
            "branches cfg=2 divides: leave it to sequence=N"
        )
    return None


def refuse_heads(args: argparse.Namespace) -> None:
    """Raises ValueError where the model has another number of heads than --parallel can divide, before its
    weights are read."""
    if size(args) == 1 or "transformer" in (args.parts or {}):
        return
    from joyedit import parallel
    from joyedit.checkpoints.options import LoadOptions
    from joyedit.estimates.parts import config_of
    from joyedit.loading.layouts import find_checkpoint

    found = find_checkpoint(args.model, **origin_options(args))
    config = config_of(found, "transformer", LoadOptions.parse(source_options(args)))
    parallel.check_heads(config.num_attention_heads, args.parallel["sequence"])


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[Processes]:
    """The processes of --parallel, while the block runs, or this one alone. The first of them is heard."""
    if size(args) == 1:
        yield ALONE
        return
    import torch

    from joyedit.pipelines.placement import accelerator_device
    from joyedit.training import processes

    # What carries the messages. Which device is this process's, and whether there is one, is for `told`: all
    # know each other then, and one says what is wrong.
    kind = None if args.device == "cpu" else accelerator_device()
    with heard(args, started().first):
        with processes.joined(kind or torch.device("cpu"), at_signals=True) as them:
            yield them


@contextlib.contextmanager
def heard(args: argparse.Namespace, first: bool) -> Iterator[None]:
    """While the block runs, a process that is not the first says nothing but errors: no log, no progress, no
    warnings, nothing on standard output."""
    if first:
        yield
        return
    import warnings

    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    level, verbosity = log.level, args.verbosity
    log.setLevel(logging.ERROR)
    args.verbosity = -1
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        args.verbosity = verbosity


def told(processes: Processes, args: argparse.Namespace, ask: Callable[[], Found]) -> Found:
    """What `ask` finds on the first process, which alone calls it, with the arguments as it leaves them; the
    device among these is then this process's own."""
    if not processes.several:
        return ask()
    from joyedit.training.devices import device_of

    answer: Any = None
    if processes.first:
        found = ask()
        answer = found, {name: value for name, value in vars(args).items() if name not in OWN}
    found, arguments = processes.told(answer)
    vars(args).update(arguments)
    args.device = str(device_of(args.device or "auto"))
    return found


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """What is wrong with the command line is so in every process: the first says it and ends, and torchrun
    ends the others. One that is alone with it says it a little later."""
    if started().first:
        yield
        return
    try:
        with contextlib.redirect_stderr(io.StringIO()) as words, contextlib.redirect_stdout(io.StringIO()):
            yield
    except SystemExit as ended:
        if ended.code:
            time.sleep(FIRST_SPEAKS)
            sys.stderr.write(words.getvalue())
        raise
