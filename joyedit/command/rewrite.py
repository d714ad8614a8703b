"""`--rewrite`: the instruction in the words that the editor was trained on, written by a model or a server.

Off unless it is asked for. A result records the rewritten text as its prompt, the original beside it and who
rewrote it; `--config-from` takes these over and asks nobody. The key of a server comes from the environment
and is never among the arguments.
"""

import argparse
import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from joyedit.checkpoints.plain_text import visible
from joyedit.command.ask import check_reader, open_reader
from joyedit.command.calls import spelt
from joyedit.command.film import PHRASED
from joyedit.command.photos import Photo
from joyedit.command.spatial import OPTIONS as SPATIAL
from joyedit.command.values import above_zero, place
from joyedit.media.download import is_url
from joyedit.training.processes import ALONE, Processes

if TYPE_CHECKING:
    from joyedit.command.systems import System
    from joyedit.pipelines.made_for import MadeFor

log = logging.getLogger("joyedit")

LOCAL = "local"
# What a result records of a rewriting, beside the prompt.
RECORDED: dict[str, type] = {"original_prompt": str, "rewritten_by": str}
OTHERS = "--rewrite FOLDER asks one of Qwen3-VL or JoyAI-Image, --rewrite URL a server"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rewriting the instruction, if this is wanted").add_argument
    add(
        "--rewrite",
        metavar="local|NAME|URL",
        type=rewriter,
        help="have the instruction written as the model was trained to read it, by one that sees the "
        "photograph: local (JoyAI-Image's own text encoder), a folder or Hub name of Qwen3-VL or "
        "JoyAI-Image, or an OpenAI-compatible server (http://localhost:8000/v1), which gets instruction and "
        "photograph, and the key in OPENAI_API_KEY",
    )
    add("--rewrite-model", metavar="NAME", help="what the server calls its model, default gpt-5")
    add(
        "--rewrite-timeout",
        metavar="SECONDS",
        type=above_zero,
        help="how long the server may take, all attempts together; default 60",
    )
    parser.set_defaults(**dict.fromkeys(RECORDED))


def rewriter(text: str) -> str:
    """`local`, a folder or Hub name, or the address of a server, which must hold no key."""
    if not is_url(text):
        return place(text)
    from joyedit.pipelines.rewriting_server import check_base

    try:
        return check_base(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def misuse(args: argparse.Namespace) -> str | None:
    """What is wrong with the options as they stand on the command line."""
    own = spelt(args, {"rewrite_model": "--rewrite-model", "rewrite_timeout": "--rewrite-timeout"})
    if own and not is_url(args.rewrite or ""):
        return f"{own[0]} is for a server: --rewrite URL"
    if args.rewrite is not None and is_url(args.rewrite):
        try:
            server_of(args)
        except ValueError as error:
            return str(error)
    return None


def contradiction(args: argparse.Namespace) -> str | None:
    """What is wrong with the options together, once all are known."""
    if args.rewrite is None:
        return None
    if options := spelt(args, SPATIAL):
        return f"{options[0]} has words of its own, which are not rewritten: leave out --rewrite"
    if args.preset in PHRASED:
        return f"--preset {args.preset} has words of its own, which are not rewritten: leave out --rewrite"
    return None


def refuse_rewriter(args: argparse.Namespace, system: "System", made_for: "MadeFor") -> None:
    """Raises ValueError for a system that takes no instruction, and for a model that cannot rewrite; as
    `check_reader` for another that is named."""
    if args.rewrite is None:
        return
    if not system.form:
        raise ValueError(f"--rewrite is for an instruction, and {args.model} takes --source and --target")
    if args.rewrite == LOCAL:
        if not system.answers:
            reads = "the text encoder of ChronoEdit (UMT5) reads, and cannot write"
            raise ValueError(f"--rewrite local: {reads}: {OTHERS}")
        if made_for.world is not None:
            from joyedit.pipelines.questions import no_answers

            raise ValueError(f"--rewrite local: {no_answers(args.model, made_for.world.about)}. {OTHERS}")
    elif not is_url(args.rewrite):
        check_reader(args.rewrite, elsewhere(args))


def rewritten(
    args: argparse.Namespace,
    system: "System",
    photos: Sequence[Photo],
    processes: Processes = ALONE,
    pipe: Any = None,
) -> list[argparse.Namespace]:
    """The arguments for each photograph, or once for none, with a prompt of its own. pipe: what rewrites,
    where that is the editor itself; others are let go of before this returns. Of several processes the first
    asks, and tells the others.

    A failure is one warning, and nobody is asked for the photographs that follow.
    """
    found = [copy.copy(args) for _ in photos or [None]]
    if processes.first:
        rewrite_each(found, system, photos, pipe)
    names = ("prompt", *RECORDED)
    words = processes.told([{name: getattr(one, name) for name in names} for one in found])
    for one, own in zip(found, words, strict=True):
        vars(one).update(own)
    return found


def rewrite_each(
    found: Sequence[argparse.Namespace], system: "System", photos: Sequence[Photo], pipe: Any
) -> None:
    """The prompts in place, each with its photograph."""
    from joyedit.pipelines.rewriting import rewrite

    args, by = found[0], pipe
    if by is None:
        by = server_of(args) if is_url(args.rewrite) else open_reader(args.rewrite, args, elsewhere(args))
    name = f"{by.model} at {by}" if is_url(args.rewrite) else args.rewrite
    references = [reference.image for reference in args.references or ()]
    original = args.original_prompt or args.prompt
    for one, photo in zip(found, photos or [None], strict=True):
        pictures = references if photo is None else [photo.image, *references]
        made = rewrite(original, pictures, by, form=system.form)
        if made.failure is not None:
            return
        one.prompt, one.original_prompt, one.rewritten_by = made.prompt, original, name
        of = f" for {photo.name}" if photo is not None and len(photos) > 1 else ""
        log.info("the prompt%s is now: %s", of, visible(made.prompt, None))


def server_of(args: argparse.Namespace) -> Any:
    from joyedit.pipelines.rewriting_server import Server

    chosen = {"model": args.rewrite_model, "timeout": args.rewrite_timeout}
    return Server(args.rewrite, **{name: value for name, value in chosen.items() if value is not None})


def elsewhere(args: argparse.Namespace) -> dict[str, Any]:
    """Where the files of the model that rewrites come from: --revision and --variant are the editor's."""
    return {"cache_dir": args.cache_dir, "local_files_only": args.offline}
