"""`joyedit ask`: a question about photographs, answered on standard output.

Of a JoyAI-Image checkpoint only the text encoder is read, which is a Qwen3-VL; a folder of Qwen3-VL does as
well. On a terminal the words are shown as they come.
"""

import argparse
import logging
from collections.abc import Callable, Mapping
from typing import Any

from joyedit.command import devices
from joyedit.command.calls import origin_options, said, source_options
from joyedit.command.photos import read_photo
from joyedit.command.values import above_zero, from_zero, place, share, whole

log = logging.getLogger("joyedit")

MODEL = "tiny-joyimage"
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


def add_options(parser: argparse.ArgumentParser) -> None:
    about = "paths or URLs of the photographs, which may be none"
    parser.add_argument("photos", metavar="PHOTO", nargs="*", help=about)
    parser.add_argument("question", metavar="QUESTION", help="what to answer")
    add = parser.add_argument_group("the answer").add_argument
    add(
        "--max-new-tokens",
        type=whole("max_new_tokens"),
        metavar="N",
        help="how long the answer may be, default 512; a word is about one and a half",
    )
    add(
        "--temperature",
        type=from_zero,
        metavar="T",
        help="0 (the default) takes the most likely word each time; others draw, 0.7 for example",
    )
    add("--top-p", type=some_share, metavar="P", help="draw among the most likely words of this share")
    add("--top-k", type=whole("top_k"), metavar="K", help="draw among so many most likely words; 0: all")
    add(
        "--repetition-penalty",
        type=above_zero,
        metavar="R",
        help="above 1: what was said already becomes less likely",
    )
    add("--seed", type=whole("seed"), help="seed of the draws; default: a random one")
    add = parser.add_argument_group("the model").add_argument
    add(
        "-m",
        "--model",
        metavar="NAME",
        type=place,
        help="folder or Hub name, of JoyAI-Image or of Qwen3-VL; small models cannot answer",
    )
    devices.add_options(add)


def answer(args: argparse.Namespace, stream: Callable[[str], None] | None) -> str:
    """The answer; each piece of it goes to `stream` as it comes. What can be refused is refused before the
    model is loaded."""
    photos = [read_photo(source) for source in args.photos]
    where = origin_options(args)
    hint = "" if args.model else " (--model names them)"
    model = args.model or MODEL
    check_reader(model, where, hint)
    pipe = open_reader(model, args, source_options(args))
    import torch

    sampling = said(args, SAMPLING)
    if args.seed is not None:
        sampling["generator"] = torch.Generator().manual_seed(args.seed)
    found = pipe.ask([photo.image for photo in photos], args.question, **sampling, stream=stream)
    if not found.finished:
        made = len(found.tokens)
        log.warning("the answer is cut after %d tokens: --max-new-tokens says how many it may have", made)
    return found.text


def check_reader(model: str, where: Mapping[str, Any], hint: str = "") -> None:
    """Raises ValueError for a checkpoint without a part that answers; where: see `origin_options`."""
    from joyedit.loading.layouts import pipeline_name, read_made_for
    from joyedit.pipelines.questions import no_answers

    pipeline = pipeline_name(model, **where)
    if not pipeline.startswith(("JoyImage", "Qwen3VL")):
        raise ValueError(f"{model} holds a {pipeline}, which has no words: ask JoyAI-Image or Qwen3-VL")
    if (world := read_made_for(model, **where).world) is not None:
        raise ValueError(no_answers(model, world.about) + hint)


def open_reader(model: str, args: argparse.Namespace, where: Mapping[str, Any]) -> Any:
    """The part of a checkpoint that answers."""
    from joyedit.loading.layouts import load

    options = said(args, ("device", "dtype", "offload", "memory"))
    return load(model, pipeline="Qwen3VLPipeline", **options, **where)


def some_share(text: str) -> float:
    """Above 0, and at most 1."""
    return above_zero(text) and share(text)
