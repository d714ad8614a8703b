"""What successive calls of a pipeline have in common, computed once: embedded prompts, what is seen of a
photograph, and its latents.

Off unless a caller asks for it, as a batch of edits does. Functions whose result depends on nothing but their
arguments are told apart by the content of these, so what comes is what would be computed again, to the bit.
What was used longest ago is let go of first.
"""

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from joyedit.pipelines.pipeline import Pipeline

MOST_BYTES = 2**28

# Methods of pipelines, and of their parts, as far as they have them.
OF_PIPELINES = ("_embed_prompts", "_read_turns", "_embed", "encode_image")
OF_PARTS = {"text_encoder": "encode_images", "vae": "encode"}


class Results:
    """Results by what they were computed from, of at most `most` bytes in all."""

    def __init__(self, most: int = MOST_BYTES):
        self.most = most
        self.held = 0
        self.known: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()

    def of(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function of that name, which computes only what is not known."""

        def known_or_computed(*args: Any, **options: Any) -> Any:
            digest = hashlib.sha256()
            add(digest, (name, args, sorted(options.items())))
            key = digest.digest()
            if key in self.known:
                self.known.move_to_end(key)
                return self.known[key][0]
            result = function(*args, **options)
            self.keep(key, result, size_of(result))
            return result

        return known_or_computed

    def keep(self, key: bytes, result: Any, size: int) -> None:
        if size > self.most:
            return
        self.known[key] = result, size
        self.held += size
        while self.held > self.most:
            _, (_, freed) = self.known.popitem(last=False)
            self.held -= freed


@contextlib.contextmanager
def reused(pipe: Pipeline, most: int = MOST_BYTES) -> Iterator[Results]:
    """While this is entered, calls of the pipeline take what earlier ones computed of the same."""
    results = Results(most)
    owners = [(pipe, name) for name in OF_PIPELINES]
    owners += [(getattr(pipe, part), name) for part, name in OF_PARTS.items() if hasattr(pipe, part)]
    found = [(owner, name) for owner, name in owners if hasattr(owner, name)]
    for owner, name in found:
        vars(owner)[name] = results.of(f"{type(owner).__name__}.{name}", getattr(owner, name))
    try:
        yield results
    finally:
        for owner, name in found:
            del vars(owner)[name]


def add(digest: Any, value: Any) -> None:
    """Add the content of an argument. Raises TypeError for one whose content is not known here."""
    if isinstance(value, Tensor):
        digest.update(f"tensor {value.dtype} {value.device} {tuple(value.shape)} ".encode())
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    elif isinstance(value, Image):
        palette = value.getpalette() if value.mode == "P" else None
        digest.update(f"picture {value.mode} {value.size} {palette} ".encode())
        digest.update(value.tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"array {value.dtype} {value.shape} ".encode())
        digest.update(value.tobytes())
    elif isinstance(value, (list, tuple)):
        digest.update(f"{type(value).__name__} {len(value)} ".encode())
        for one in value:
            add(digest, one)
    elif value is None or isinstance(value, (str, int, float, torch.dtype, torch.device)):
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)} ".encode() + text)
    else:
        raise TypeError(f"a {type(value).__name__} says nothing of its content")


def size_of(value: Any) -> int:
    """Bytes of the tensors in a result."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, (list, tuple)):
        return sum(map(size_of, value))
    return sum(map(size_of, vars(value).values())) if hasattr(value, "__dict__") else 0
