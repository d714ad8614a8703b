"""What `from_pretrained` takes beside the parts: a dtype, which files, and where they come from."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch

from joyedit.checkpoints.config import nearest
from joyedit.checkpoints.new_parameters import NewParameters
from joyedit.checkpoints.option_spellings import WITHOUT_VALUE, check_without_value, parse_device_map

log = logging.getLogger("joyedit")


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """What `from_pretrained` and `joyedit.load` accept beside the parts.

    dtypes: of some parts, where one was given by part; `dtype` is that of the others.
    """

    dtype: torch.dtype | None = None  # None: as stored, except large fp32 networks, which become bf16
    dtypes: Mapping[str, torch.dtype | None] = dataclasses.field(default_factory=dict)
    device: torch.device | None = None  # where the networks go; None: they stay where they were read
    variant: str | None = None
    use_safetensors: bool | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    new_parameters: NewParameters = dataclasses.field(default_factory=NewParameters)
    unread: bool = False  # weights stay in their files: see `Network.unread`

    ORIGIN: ClassVar[tuple[str, ...]] = (
        "revision",
        "token",
        "cache_dir",
        "local_files_only",
        "force_download",
    )
    DTYPES: ClassVar[tuple[str, ...]] = ("dtype", "torch_dtype", "mindspore_dtype")
    WITHOUT_EFFECT: ClassVar[tuple[str, ...]] = (
        "low_cpu_mem_usage",
        "requires_safety_checker",
        "resume_download",
    )

    @classmethod
    def parse(cls, given: Mapping[str, Any], also: Iterable[str] = ()) -> Self:
        """Read keyword arguments. `also`: names that the caller takes itself, for the message.

        Raises TypeError for an unknown name, ValueError for two different dtypes, or a value that asks for
        what is not done here.
        """
        accepted = {*cls.ORIGIN, *cls.DTYPES, *cls.WITHOUT_EFFECT}
        accepted |= {"variant", "use_safetensors", "new_parameters", "device_map"}
        for name in given:
            if name in WITHOUT_VALUE:
                check_without_value(name, given[name])
            elif name not in accepted:
                known = accepted | set(also)
                raise TypeError(f"unknown argument {name!r}{nearest(name, known)}; accepted: {sorted(known)}")
            if name in cls.WITHOUT_EFFECT:
                log.info("%s has no effect here", name)
        read = {name: parse_dtypes(given[name]) for name in cls.DTYPES if name in given}
        if any(one != next(iter(read.values())) for one in read.values()):
            raise ValueError(f"two different dtypes were given: { ({name: given[name] for name in read}) }")
        dtype, by_part = next(iter(read.values()), (None, {}))
        return cls(
            dtype=dtype,
            dtypes=by_part,
            device=parse_device_map(given.get("device_map")),
            variant=given.get("variant"),
            use_safetensors=given.get("use_safetensors"),
            origin={name: given[name] for name in cls.ORIGIN if name in given},
            new_parameters=NewParameters(given.get("new_parameters", ())),
        )

    def of_part(self, part: str, otherwise: torch.dtype | None = None) -> Self:
        """The options for one part of a pipeline. otherwise: its dtype where none was asked for."""
        return dataclasses.replace(self, dtype=self.dtypes.get(part, self.dtype) or otherwise, dtypes={})

    def check_parts(self, parts: Iterable[str]) -> None:
        """Raises ValueError when a dtype was given for something that is no part."""
        for name in self.dtypes:
            if name not in (known := sorted(parts)):
                raise ValueError(
                    f"torch_dtype: there is no part {name!r}{nearest(name, known)} among {known}"
                )


def parse_dtypes(value: Any) -> tuple[torch.dtype | None, dict[str, torch.dtype | None]]:
    """A dtype, and those of parts, from what `parse_dtype` reads, or {"unet": torch.float16, "default": ...}.
    Parts that are not named, where there is no "default", load as if no dtype was asked for."""
    if not isinstance(value, Mapping):
        return parse_dtype(value), {}
    read = {name: parse_dtype(one) for name, one in value.items()}
    return read.pop("default", None), read


def parse_dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from itself or its name ("bf16", "float32", ...); None and "auto" mean as stored."""
    names = {
        **dict.fromkeys(("fp32", "float32", "float"), torch.float32),
        **dict.fromkeys(("fp16", "float16", "half"), torch.float16),
        **dict.fromkeys(("bf16", "bfloat16"), torch.bfloat16),
    }
    if value is None or value == "auto":
        return None
    found = names.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if found not in set(names.values()):
        raise ValueError(f"dtype={value!r}: must be float32, float16, bfloat16 or 'auto'")
    return found
