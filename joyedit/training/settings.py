"""The settings of a run: what they are by themselves, and the file that they are written to and read from.

`run.toml` of a run is a record of what it was trained with, and `--config run.toml` reads it for another.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joyedit.checkpoints.config import nearest
from joyedit.checkpoints.replacing import replacing

FILE = "run.toml"
FOUND = "found"  # the table of what a run found: the base model, the pairs


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a training. Words and numbers are as the command takes them; see `joyedit train --help`."""

    data: str
    model: str
    revision: str | None = None
    device: str = "auto"
    full: bool = False
    rank: int = 32
    alpha: float | None = None
    targets: str = "attention"
    trigger: str | None = None
    base: str | None = None  # fp32, bf16 or int8; None: fp32 of a CPU and of --full, else bf16
    memory: str | None = None
    checkpointing: bool = True
    steps: int = 2000
    batch: int = 1
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float | None = None  # None: 1e-4, of --full 1e-5
    lr_schedule: str = "constant"
    warmup: int = 0
    clip: float = 1.0
    ema: float | None = None
    basesize: tuple[int, ...] = ()
    sigma: str = "shifted"
    min_snr: float | None = None
    dropout: float = 0.05
    frames: int = 29
    sample_every: int = 250
    valid_every: int = 250
    save_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError for a value that is not allowed, TypeError for one of another kind."""
        object.__setattr__(self, "basesize", tuple(self.basesize))
        for name, kinds in KINDS.items():
            value = getattr(self, name)
            if isinstance(value, bool) and bool not in kinds or not isinstance(value, kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
                raise TypeError(f"{name}={value!r}: must be of {wanted}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value!r}: must be at least {least}")
        for name, words in WORDS.items():
            value = getattr(self, name)
            if value is not None and value not in words:
                raise ValueError(f"{name}={value!r}: must be one of {', '.join(words)}")
        for name in ("dropout", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value!r}: must be in [0, 1)")
        for name in ("lr", "clip", "alpha", "min_snr"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value!r}: must be positive")
        if self.batch % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate}: must divide batch={self.batch}")
        if self.full and self.base not in (None, "fp32"):
            raise ValueError(
                f"base={self.base!r} is of weights that stay as they are: full trains all, in fp32"
            )
        if self.memory is not None and (self.full or not self.checkpointing):
            reason = "all weights stay, with full" if self.full else "blocks come again on the way back"
            raise ValueError(f"memory={self.memory!r}: {reason}: train an adapter, with checkpointing")
        if self.frames % 4 != 1:
            raise ValueError(f"frames={self.frames}: must be 1 + 4k")
        if any(base < 64 or base % 16 for base in self.basesize):
            raise ValueError(f"basesize={list(self.basesize)}: must be multiples of 16, from 64 on")

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]

    @property
    def rate(self) -> float:
        """The learning rate where the schedule does not lower it."""
        return self.lr if self.lr is not None else 1e-5 if self.full else 1e-4

    def to_toml(self, found: Mapping[str, str]) -> str:
        lines = [f"{name} = {text}" for name in self.names() if (text := toml_of(getattr(self, name)))]
        lines += ["", f"[{FOUND}]", *(f"{name} = {toml_of(value)}" for name, value in found.items())]
        return "\n".join(lines) + "\n"


KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("data", "model", "device", "targets", "optimizer"), (str,)),
    **dict.fromkeys(("revision", "trigger", "memory"), (str, type(None))),
    **dict.fromkeys(("full", "checkpointing"), (bool,)),
    **dict.fromkeys(
        ("rank", "steps", "batch", "accumulate", "warmup", "frames")
        + ("sample_every", "valid_every", "save_every", "seed"),
        (int,),
    ),
    **dict.fromkeys(("clip", "dropout"), (int, float)),
    **dict.fromkeys(("lr", "alpha", "ema", "min_snr"), (int, float, type(None))),
    "basesize": (tuple,),
}
LEAST = {"rank": 1, "steps": 1, "batch": 1, "accumulate": 1, "warmup": 0, "frames": 9, "seed": 0}
LEAST |= {"sample_every": 0, "valid_every": 0, "save_every": 1}
WORDS = {
    "base": ("fp32", "bf16", "int8"),
    "optimizer": ("adamw", "muon"),
    "lr_schedule": ("constant", "cosine", "linear"),
    "sigma": ("shifted", "logit-normal", "uniform"),
}
# What may be another when a run goes on: where it computes, and how often it is looked at. Its length may,
# where the learning rate does not depend on it.
FREE = {"data", "model", "revision", "device", "memory", "checkpointing"}
FREE |= {"sample_every", "valid_every", "save_every"}


def toml_of(value: Any) -> str | None:
    """A value as TOML has it; None for none."""
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(str(toml_of(one)) for one in value)}]"
    if isinstance(value, str):  # a JSON string is a TOML string, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def read_settings(path: Path) -> dict[str, Any]:
    """What a file says of settings, by name. Raises FileNotFoundError, ValueError for another file."""
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} is no TOML file: {error}") from None
    said.pop(FOUND, None)
    known = Settings.names()
    for name in said:
        if name not in known:
            raise ValueError(f"{path}: unknown setting {name!r}{nearest(name, known)}")
    return said


def settle(folder: Path, settings: Settings, found: Mapping[str, str]) -> None:
    """Write the settings of a run to its folder, or see that they are those that it was begun with.

    found: what it trains on, by name. Raises ValueError that names each setting that differs, what it was and
    what it is now.
    """
    path = folder / FILE
    if path.is_file():
        refuse_others(path, settings, found)
    with replacing(path) as temporary:
        temporary.write_text(settings.to_toml(found), encoding="utf-8")


def refuse_others(path: Path, settings: Settings, found: Mapping[str, str]) -> None:
    before = Settings(**read_settings(path))
    found_before = tomllib.loads(path.read_text(encoding="utf-8")).get(FOUND, {})
    free = FREE | ({"steps"} if settings.lr_schedule == "constant" else set())
    differing = [
        f"{name} was {old!r} and is now {new!r}"
        for name in settings.names()
        if name not in free and (old := getattr(before, name)) != (new := getattr(settings, name))
    ]
    differing += [
        f"the {name} was {old} and is now {new}"
        for name, new in found.items()
        if (old := found_before.get(name)) is not None and old != new
    ]
    if differing:
        raise ValueError(f"{path.parent} is a run of other settings: {'; '.join(differing)}")
