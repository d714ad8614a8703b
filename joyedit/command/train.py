"""`joyedit train`: its options, and what it says of a set before it trains on it."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from joyedit.command.estimate import gigabytes
from joyedit.command.parsing import one_line
from joyedit.command.values import finite, memory_size, place, whole, whole_number

if TYPE_CHECKING:
    from joyedit.training.check import Found

MOST = 2**31 - 1  # of steps and the like


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "data",
        metavar="DATA",
        nargs="?",
        type=place,
        help="folder with target/ and control/, or metadata.jsonl",
    )
    add("--model", metavar="M", type=place, help="folder or Hub name of the base model, or a built-in one")
    add("--revision", help="branch, tag or commit of a Hub repository")
    add("--out", metavar="RUN", type=place, required=True, help="folder of the run; the same command goes on")
    add(
        "--config", metavar="FILE", type=place, help="settings of another run, its run.toml; options go first"
    )
    add("--check", action="store_true", help="look at the set: faults, buckets, crops, memory; train nothing")
    add = parser.add_argument_group("what is trained").add_argument
    add("--full", action="store_true", default=None, help="all weights, in fp32, instead of an adapter")
    add("--rank", type=count, metavar="R", help="of the adapter, default 32")
    add("--alpha", type=finite, metavar="A", help="its strength is alpha / rank; default: the rank")
    add(
        "--targets", metavar="WHAT", help="attention (default), all, or a regular expression of layers' names"
    )
    add("--trigger", metavar="WORDS", help="what prompts say to use the adapter, to be noted in its file")
    add("--base", choices=("fp32", "bf16", "int8"), help="of the frozen weights; default bf16, on a CPU fp32")
    add = parser.add_argument_group("how").add_argument
    add("--steps", type=count, metavar="N", help="default 2000")
    add("--batch", type=count, metavar="B", help="samples of a step in all, default 1")
    add("--accumulate", type=count, metavar="A", help="parts that a batch is computed in, default 1")
    add("--optimizer", choices=("adamw", "muon"), help="default adamw; muon: orthogonalised momentum")
    add("--lr", type=finite, metavar="RATE", help="learning rate, default 1e-4, with --full 1e-5")
    add("--lr-schedule", choices=("constant", "cosine", "linear"), help="after the warmup, default constant")
    add("--warmup", type=natural, metavar="N", help="steps in which the rate rises, default 0")
    add("--clip", type=finite, metavar="C", help="the largest norm of the gradient, default 1")
    add("--ema", type=finite, metavar="D", help="average the weights, as 0.999; that is what is written")
    add("--basesize", type=sizes, metavar="N,...", help="sizes to train at, as 512,768,1024")
    add("--sigma", choices=("shifted", "logit-normal", "uniform"), help="noise levels, default shifted")
    add(
        "--min-snr", type=finite, metavar="G", help="of Stable Diffusion: the largest weight of a level, as 5"
    )
    add("--dropout", type=finite, metavar="P", help="share of samples without their prompt, default 0.05")
    add("--frames", type=count, metavar="N", help="of ChronoEdit's clips, default 29")
    add("--seed", type=whole("seed"), help="default 0")
    add = parser.add_argument_group("where, and what is looked at").add_argument
    add("--device", metavar="DEVICE", help="auto (an accelerator if there is one), cpu, cuda, cuda:1, mps")
    add("--memory", metavar="SIZE", type=memory_size, help="hold at most that where it is computed, as 24G")
    add(
        "--no-checkpointing",
        dest="checkpointing",
        action="store_false",
        default=None,
        help="keep what blocks computed for the way back: faster, and takes more memory",
    )
    add("--sample-every", type=natural, metavar="N", help="steps between pictures, default 250; 0: none")
    add("--valid-every", type=natural, metavar="N", help="steps between validations, default 250; 0: none")
    add("--save-every", type=count, metavar="N", help="steps between saved states, default 250")


def count(text: str) -> int:
    return whole_number(text, 1, MOST)


def natural(text: str) -> int:
    return whole_number(text, 0, MOST)


def sizes(text: str) -> list[int]:
    return [count(one) for one in text.split(",")]


def train(args: argparse.Namespace, disable_progress: bool | None) -> Path:
    """Train, or go on. Returns what was made. Raises as `training.loop.train`; SystemExit(2) for settings
    that are wrong in themselves."""
    from joyedit.training.loop import train as run

    return run(settings_of(args), args.out, disable_progress)


def check(args: argparse.Namespace) -> "Found":
    from joyedit.training.check import check as look

    return look(settings_of(args), args.out)


def settings_of(args: argparse.Namespace) -> Any:
    """Those of the file that --config names, and in their place those that were said."""
    from joyedit.training.settings import Settings, read_settings

    given: dict[str, Any] = {}
    if args.config is not None:
        given = read_settings(Path(args.config).expanduser())
    given |= {name: value for name in Settings.names() if (value := getattr(args, name)) is not None}
    if "data" not in given:
        args.parser.error("DATA is missing: a folder with target/ and control/")
    if "model" not in given:
        args.parser.error("--model is missing: the base model")
    try:
        return Settings(**given)
    except (TypeError, ValueError) as error:
        args.parser.error(one_line(str(error)))


def lines(found: "Found") -> Iterator[str]:
    """What was found, for people."""
    yield f"{found.pairs} examples to train on, {found.valid} to validate on"
    for (height, width), count in sorted(found.buckets.items()):
        yield f"  {width} x {height}: {count}"
    needed = found.needed
    if needed is not None:
        yield f"first pass: encoders with {gigabytes(needed.encoders)} of weights"
        parts = (needed.weights, needed.trained, needed.step)
        weights, trained, step = map(gigabytes, parts)
        whole = gigabytes(needed.second_pass)
        yield f"second pass: {whole}: weights {weights}, what is trained {trained}, a step {step}"
