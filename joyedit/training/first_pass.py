"""The first pass over a set: what encoders make of it goes to the cache, without the denoiser in memory."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from joyedit.training.cache import Cache
from joyedit.training.data import load_mask, load_pair
from joyedit.training.examples import Example, missing_from
from joyedit.training.processes import ALONE, Processes
from joyedit.training.systems import Said, System, weight_of

log = logging.getLogger("joyedit")


def fill(
    cache: Cache,
    examples: Sequence[Example],
    system: System,
    open_encoders: Callable[[], Any],
    disable_progress: bool | None = False,
    processes: Processes = ALONE,
) -> None:
    """Encode what is not in the cache, each process its share. open_encoders: the pipeline without its
    denoiser; it is not called if there is nothing to do."""
    missing = missing_from(cache, examples)
    processes.wait()  # all have seen the same
    if missing:
        log.info("%d of %d examples are to be encoded", len(missing), len(examples))
    if mine := [missing[i] for i in processes.share(len(missing))]:
        pipe = open_encoders()
        with torch.no_grad():
            for example in tqdm(mine, desc="encoding", disable=disable_progress):
                encode(cache, example, system, pipe)
    processes.wait()


def encode(cache: Cache, example: Example, system: System, pipe: Any) -> None:
    """One pair at one size."""
    target, controls = load_pair(example.pair, example.table)
    if example.pictures not in cache:
        seen = system.see(pipe, example, target, controls)
        if (mask := load_mask(example.pair, example.table)) is not None:
            seen["weight"] = weight_of(mask, seen["target_mean"].shape)
        cache.write(example.pictures, seen)
    prompts = {example.words: example.pair.prompt, example.blank: system.blank}
    unread = {name: text for name, text in prompts.items() if name not in cache}
    if unread:
        read = system.read(pipe, list(unread.values()), controls)
        for name, embeds in zip(unread, read, strict=True):
            cache.write(name, {"prompt": embeds})


def kept_of(cache: Cache, example: Example) -> tuple[Mapping[str, Tensor], Said]:
    """What the second pass reads of an example."""
    pictures = cache.read(example.pictures)
    return pictures, Said(cache.read(example.words)["prompt"], cache.read(example.blank)["prompt"])
