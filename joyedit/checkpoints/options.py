"""What `from_pretrained` takes beside the parts: a dtype, which files, and where they come from."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

import torch

from joyedit.checkpoints.config import nearest
from joyedit.checkpoints.new_parameters import NewParameters

log = logging.getLogger("joyedit")


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """What `from_pretrained` and `joyedit.load` accept beside the parts."""

    dtype: torch.dtype | None = None  # None: as stored, except large fp32 networks, which become bf16
    variant: str | None = None
    use_safetensors: bool | None = None
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    new_parameters: NewParameters = dataclasses.field(default_factory=NewParameters)

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

        Raises TypeError for an unknown name, ValueError for two different dtypes.
        """
        accepted = {*cls.ORIGIN, *cls.DTYPES, *cls.WITHOUT_EFFECT}
        accepted |= {"variant", "use_safetensors", "new_parameters"}
        for name in given:
            if name not in accepted:
                known = accepted | set(also)
                raise TypeError(f"unknown argument {name!r}{nearest(name, known)}; accepted: {sorted(known)}")
            if name in cls.WITHOUT_EFFECT:
                log.info("%s has no effect here", name)
        dtypes = {name: parse_dtype(given[name]) for name in cls.DTYPES if name in given}
        if len(set(dtypes.values())) > 1:
            raise ValueError(f"two different dtypes were given: {dtypes}")
        return cls(
            dtype=next(iter(dtypes.values()), None),
            variant=given.get("variant"),
            use_safetensors=given.get("use_safetensors"),
            origin={name: given[name] for name in cls.ORIGIN if name in given},
            new_parameters=NewParameters(given.get("new_parameters", ())),
        )


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
