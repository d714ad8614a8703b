"""Arguments that several pipelines take, checked before any work.

A check raises ValueError for a value that does not fit, TypeError for one of another kind, and names the
argument as the call does.

B prompts   L text tokens   D width
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from joyedit.checkpoints.plain_text import shown
from joyedit.media.images import OUTPUT_TYPES
from joyedit.noise import Generators


class Text(NamedTuple):
    """Prompts as a call gives them: positive and negative, each as words or embedded (B, L, D)."""

    prompt: str | list[str] | None = None
    negative: str | list[str] | None = None
    embeds: Tensor | None = None
    negative_embeds: Tensor | None = None

    @property
    def batch(self) -> int:
        """B: how many there are of what says what to do; a text alone is one."""
        if self.embeds is not None:
            return len(self.embeds)
        return len(self.prompt) if isinstance(self.prompt, list) else 1

    def check(self, name: str = "") -> None:
        """Raises ValueError or TypeError when these do not fit together; `name` is the arguments' prefix."""
        check_prompts(f"{name}prompt", self.prompt, f"{name}prompt_embeds", self.embeds)
        if self.negative is not None and self.negative_embeds is not None:
            raise ValueError(f"give {name}negative_prompt or {name}negative_prompt_embeds, not both")
        check_text(f"{name}negative_prompt", self.negative)
        for kind, embeds in (("", self.embeds), ("negative_", self.negative_embeds)):
            if embeds is not None and not (isinstance(embeds, Tensor) and embeds.ndim):
                form = "has no axes" if isinstance(embeds, Tensor) else f"is a {type(embeds).__name__}"
                raise TypeError(f"{name}{kind}prompt_embeds {form}: must be a tensor (B, L, D)")

    def check_negatives(self, batch: int) -> None:
        """Raises ValueError for embedded negative prompts of another number than `batch`."""
        if self.negative_embeds is not None and len(self.negative_embeds) != batch:
            raise ValueError(
                f"negative_prompt_embeds are for {len(self.negative_embeds)} prompts, but there are {batch}"
            )


def check_prompts(name: str, prompt: Any, embeds_name: str, embeds: Tensor | None) -> None:
    """Raises ValueError unless exactly one is given, TypeError for a prompt that is no text or list of
    texts."""
    if (prompt is None) == (embeds is None):
        raise ValueError(f"give exactly one of {name} and {embeds_name}")
    check_text(name, prompt)


def check_text(name: str, text: Any) -> None:
    if text is not None and not isinstance(text, str):
        if not isinstance(text, list) or not text or not all(isinstance(t, str) for t in text):
            raise TypeError(f"{name} must be a string or a non-empty list of strings, not {shown(text)}")


def as_list(text: str | list[str] | None, batch: int, name: str) -> list[str]:
    """One text for each of `batch` prompts. Raises ValueError for a list of another length."""
    texts = text if isinstance(text, list) else [text or ""] * batch
    if len(texts) != batch:
        raise ValueError(f"{name} is a list of {len(texts)}, but there are {batch} prompts")
    return texts


def as_number(value: Any) -> Any:
    """A number of numpy or torch, or an array or tensor that is just one, as Python's; anything else as it
    is. A sweep's `for s in np.arange(...)` gives such."""
    return value.item() if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0 else value


def is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a real number; True and False are none, NaN and infinity are."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_count(name: str, count: Any, least: int = 1) -> int:
    """Raises ValueError unless `count` is an integer of at least `least`, which is 1 or 0."""
    number = as_number(count)
    if not is_integer(number) or number < least:
        raise ValueError(
            f"{name}={count!r}: must be {'a positive integer' if least else 'an integer from 0 on'}"
        )
    return int(number)


def check_copies(name: str, copies: Any) -> int:
    """How many results each prompt gets, None meaning one. Raises ValueError as `check_count`."""
    return 1 if copies is None else check_count(name, copies)


def check_number(name: str, value: Any) -> float:
    """Raises ValueError unless `value` is a finite number."""
    number = as_number(value)
    if not is_number(number) or not math.isfinite(number):
        raise ValueError(f"{name}={value!r}: must be a finite number")
    return float(number)


def check_step_cache(value: Any) -> float | None:
    """The threshold of `step_cache`, None for what leaves nothing out. Raises ValueError unless it is None or
    a finite number of at least 0."""
    number = as_number(value)
    if number is None or (is_number(number) and number == 0):
        return None
    if not is_number(number) or not 0 < number < math.inf:
        raise ValueError(f"step_cache={shown(value)}: must be None, or a finite number of at least 0")
    return float(number)


def check_share(name: str, value: Any) -> float:
    """Raises ValueError unless `value` is a number in [0, 1]."""
    number = as_number(value)
    if not is_number(number) or not 0 <= number <= 1:
        raise ValueError(f"{name}={value!r}: must be in [0, 1]")
    return float(number)


def check_side(name: str, side: Any, multiple: int) -> int:
    """Raises ValueError unless `side` is a positive multiple of `multiple`."""
    number = as_number(side)
    if not is_integer(number) or number < 1 or number % multiple:
        raise ValueError(f"{name}={side!r}: must be a positive multiple of {multiple}")
    return int(number)


def check_generators(generator: Any, count: int) -> Generators:
    """Raises TypeError for what is no generator, ValueError for a list without one for each of `count`
    images."""
    listed = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
    for one in listed:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator is, or holds, a {type(one).__name__}: must be a torch.Generator")
    if listed is generator and len(listed) != count:
        raise ValueError(f"generator is a list of {len(listed)}, but there are {count} images (one each)")
    return listed[0] if listed and count == 1 else generator


def check_tensor(name: str, value: Any, wanted: Sequence[int | str | None], axes: str = "") -> None:
    """Raises TypeError for what is no tensor, ValueError for one of another shape or with values that are
    not finite.

    wanted: the size of each axis; where it is a word, any size but 0 will do. axes: what the sizes mean.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: must be a tensor")
    shape = tuple(value.shape)
    fits = (n > 0 if isinstance(size, str) else n == size for n, size in zip(shape, wanted, strict=False))
    if len(shape) != len(wanted) or not all(fits):
        sizes = ", ".join(str(size) for size in wanted)
        raise ValueError(f"{name} have shape {shape}, wanted ({sizes}){axes and f' ({axes})'}")
    check_finite(name, value)


def check_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinite values")


def check_output_type(output_type: Any, kinds: Sequence[str] = OUTPUT_TYPES) -> None:
    if output_type not in kinds:
        raise ValueError(f"output_type={output_type!r}: must be one of {', '.join(kinds)}")


def adapter_scale(name: str, kwargs: Mapping[str, Any] | None) -> float | None:
    """What an argument {"scale": s} multiplies the adapters that are not fused with; None, if it says
    nothing of it. Raises ValueError for other keys, and for anything but a finite number."""
    if unknown := set(kwargs or {}) - {"scale"}:
        raise ValueError(f"{name} has {sorted(unknown)}; only 'scale' is known")
    scale = (kwargs or {}).get("scale")
    return None if scale is None else check_number(f"{name}: scale", scale)
