"""How transformers calls encoders: words for what one is to return, and words that ask for nothing here.

Source: transformers `utils/generic.py`.
"""

import functools
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# Word of a call -> why a value other than None and False is refused.
UNUSED: Mapping[str, str] = {
    "output_attentions": "attention does not hold its matrix of scores",
    "position_ids": "positions follow from the tokens",
    "interpolate_pos_encoding": "the image processor brings pictures to the size of the tower",
    "inputs_embeds": "give input_ids",
    "head_mask": "all heads run",
    "past_key_values": "prompts are read, not continued",
    "cache": "prompts are read, not continued",
    "use_cache": "prompts are read, not continued",
    "cache_position": "prompts are read, not continued",
    "labels": "no loss is computed here",
    "logits_to_keep": "cut the logits",
    "pixel_values_videos": "stills only",
    "video_grid_thw": "stills only",
    "rope_deltas": "positions follow from the tokens",
    "mm_encoder_outputs": "give pixel_values",
    "second_per_grid_ts": "stills only",
}


def check_unused(given: Mapping[str, Any]) -> None:
    """Raises ValueError for a word of a call that asks for what is not done here, TypeError for one that no
    encoder has."""
    for name, value in given.items():
        if name not in UNUSED:
            raise TypeError(f"an encoder has no argument {name!r}")
        if isinstance(value, Tensor) or not (value is None or value is False or value == 0):
            raise ValueError(f"{name} is not supported here: {UNUSED[name]}")


def check_all_attended(attention_mask: Tensor | None) -> None:
    """Raises ValueError for a mask that leaves something out, where padding is attended to like text."""
    if attention_mask is not None and not attention_mask.bool().all():
        raise ValueError(
            "attention_mask leaves tokens out: this encoder attends to padding like to text, as Stable "
            "Diffusion does. Leave the mask away"
        )


def answer(output: Any, states: Sequence[Tensor] | None, return_dict: bool | None) -> Any:
    """An encoder's output (a named tuple) as it was asked for: with `hidden_states` as its last field where
    there are any, and as a plain tuple with return_dict=False."""
    if states is not None:
        output = _with_states(type(output))(*output, tuple(states))
    return tuple(output) if return_dict is False else output


@functools.cache
def _with_states(kind: type) -> type:
    return namedtuple(kind.__name__, (*kind._fields, "hidden_states"))  # type: ignore[attr-defined]
