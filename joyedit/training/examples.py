"""What is trained on: each pair at each base size, where its tensors are kept, and in which order it comes.

Several bases show a pair at several sizes. Samples of a batch that are of one form (sizes, lengths of
prompts, numbers of references) go through the network together, others one after the other, since no network
here knows padding; so the order puts alike ones next to each other where it can.
"""

import dataclasses
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

from joyedit.media.decoding import orientation
from joyedit.media.images import BUCKET_BASES, buckets, fit_cover, nearest_bucket, size_of_area
from joyedit.training.cache import Cache, Hashes
from joyedit.training.data import Size, open_frames, size_of
from joyedit.training.pairs import Fault, Pair


@dataclasses.dataclass(frozen=True)
class Example:
    """A pair at one size. pictures, words, blank: under which names its latents, its prompt, and the prompt
    that says nothing are kept."""

    pair: Pair
    table: tuple[Size, ...]
    bucket: Size
    pictures: str
    words: str
    blank: str

    @property
    def names(self) -> tuple[str, str, str]:
        return self.pictures, self.words, self.blank


def table_of(base: int, multiple: int = 16) -> tuple[Size, ...]:
    """The sizes of about base x base pixels with sides that are multiples of `multiple`: the buckets of
    JoyAI-Image, or sizes of their shapes."""
    if base in BUCKET_BASES and base // 16 % multiple == 0:
        return tuple(buckets(base))
    shapes = [(h, w) for h, w in buckets(256) if max(h, w) <= 2 * min(h, w)]
    return tuple(sorted({size_of_area(h, w, base * base, multiple) for h, w in shapes}))


def plan_examples(
    pairs: Mapping[str, Pair],
    tables: Sequence[Sequence[Size]],
    hashes: Hashes,
    names: Callable[[Pair, Size, Hashes], tuple[str, str, str]],
) -> tuple[list[Example], list[Fault]]:
    """All pairs at all sizes, and those that fit none. names: of the system, see `content`."""
    examples, faults = [], []
    for pair in pairs.values():
        shape = hashes.shape_of(pair.target) or shape_of(pair.target)
        for table in tables:
            bucket = nearest_bucket(*shape, table)
            try:
                fit_cover(shape, bucket)
            except ValueError as error:
                faults.append(Fault(pair.name, str(error)))
                continue
            examples.append(Example(pair, tuple(table), bucket, *names(pair, bucket, hashes)))
    return examples, faults


def shape_of(path: Path) -> Size:
    """Height and width of a picture, upright, or of a clip, without decoding a picture."""
    if Pair("", path, "").is_clip:
        return size_of(open_frames(path)[0])
    with PIL.Image.open(path) as opened:
        width, height = opened.size
        return (width, height) if orientation(opened) >= 5 else (height, width)


def content(
    pair: Pair, bucket: Size, hashes: Hashes, revisions: Mapping[str, str], **others: Any
) -> dict[str, Any]:
    """What the tensors of a pair depend on: its files, the bucket, the networks that read them."""
    files: dict[str, Any] = {
        "target": hashes[pair.target],
        "controls": [hashes[path] for path in pair.controls],
    }
    files |= {} if pair.mask is None else {"mask": hashes[pair.mask]}
    return {**files, "bucket": list(bucket), **{f"by {k}": v for k, v in revisions.items()}, **others}


def form_of(tensors: Mapping[str, Tensor]) -> Hashable:
    """What samples that go through a network together have in common."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in sorted(tensors.items()))


class Order:
    """Which samples are in which step: a function of the seed and the step alone, so that a run that goes on
    finds its place without anything kept.

    In an epoch each sample comes at least once, in an order of its own; `batch` alike ones together, those
    that are left over among others; what the last batch lacks comes again.
    """

    def __init__(self, forms: Sequence[Hashable], batch: int, seed: int):
        self.forms, self.batch, self.seed = list(forms), batch, seed
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.forms) // self.batch)

    def __getitem__(self, step: int) -> list[int]:
        """The samples of step 0, 1, ..."""
        epoch, place = divmod(step, len(self))
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        return self._epoch[1][place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        draw = random.Random(f"{self.seed} {epoch}")
        alike: dict[Hashable, list[int]] = {}
        for sample in draw.sample(range(len(self.forms)), len(self.forms)):
            alike.setdefault(self.forms[sample], []).append(sample)
        batches, rest = [], []
        for samples in alike.values():
            whole = len(samples) // self.batch * self.batch
            batches += [samples[i : i + self.batch] for i in range(0, whole, self.batch)]
            rest += samples[whole:]
        batches += [rest[i : i + self.batch] for i in range(0, len(rest), self.batch)]
        while len(batches[-1]) < self.batch:
            batches[-1].append(draw.randrange(len(self.forms)))
        draw.shuffle(batches)
        return batches


def missing_from(cache: Cache, examples: Sequence[Example]) -> list[Example]:
    """The examples of which something is not in the cache."""
    present: dict[str, bool] = {}

    def there(name: str) -> bool:
        if name not in present:
            present[name] = name in cache
        return present[name]

    return [example for example in examples if not all(map(there, example.names))]
