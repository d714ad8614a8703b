"""What a training set is made of, and what can be wrong with it."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif")
CLIPS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A picture as it shall be, and what it shall be made of.

    name: what messages call it. target: the picture, or a clip that begins with the photograph and ends with
    the edited picture. prompt: the instruction, or of a picture without controls its caption. controls: the
    photograph, or several references in the order in which the prompt speaks of them. mask: a grey picture of
    the target's shape, white where the loss counts.
    """

    name: str
    target: Path
    prompt: str
    controls: tuple[Path, ...] = ()
    mask: Path | None = None

    @property
    def is_clip(self) -> bool:
        return self.target.suffix.lower() in CLIPS

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.target, *self.controls, *([] if self.mask is None else [self.mask]))


class Fault(NamedTuple):
    """What is wrong with the pair, or the file, of that name."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class FaultyPairs(ValueError):
    """A set that cannot be trained on. faults: everything that is wrong with it."""

    def __init__(self, place: Path, faults: Iterable[Fault]):
        self.faults = sorted(set(faults))
        count = len({fault.name for fault in self.faults})
        things = "1 pair is" if count == 1 else f"{count} pairs are"
        super().__init__(f"{place}: {things} faulty: {'; '.join(map(str, self.faults))}")
