"""What users of transformers type when they call tokenizers.

Source: transformers `tokenization_utils_base.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer

from joyedit.checkpoints.config import nearest
from joyedit.checkpoints.missing import lacking
from joyedit.media.batch import Batch

PADDINGS: Mapping[Any, bool] = {"do_not_pad": False, None: False, "longest": True}
TRUNCATIONS = {"do_not_truncate": False, None: False, "longest_first": True, "only_first": True}

# Word of a call -> why another value than None and False is refused.
UNUSED: Mapping[str, str] = {
    "text_pair": "one text at a time: pairs are not encoded",
    "text_target": "prompts have no target",
    "text_pair_target": "prompts have no target",
    "stride": "what does not fit is cut",
    "is_split_into_words": "give the text itself",
    "pad_to_multiple_of": "pad with padding='max_length', max_length=",
    "return_token_type_ids": "a text has no types",
    "return_overflowing_tokens": "what does not fit is cut; encode(text) gives all",
    "return_special_tokens_mask": "compare the ids with those of eos_token_id, pad_token_id, ...",
    "return_offsets_mapping": "`backend`.encode(text).offsets",
    "return_length": "attention_mask.sum(dim=-1)",
    "split_special_tokens": "special tokens in a text are read as such",
    "verbose": "",
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a call wants its texts: the words of transformers in the form in which they are used here."""

    padding: bool | str
    truncation: bool
    mask: bool

    @classmethod
    def of(cls, padding: Any, truncation: Any, others: Mapping[str, Any]) -> Self:
        """Raises TypeError for a word that no tokenizer has, ValueError for a value that is not served."""
        for name, value in others.items():
            if name in ("return_attention_mask", "padding_side"):
                continue
            if name not in UNUSED:
                raise TypeError(f"unknown argument {name!r}{nearest(name, [*UNUSED, 'padding_side'])}")
            if value and name != "verbose":
                raise ValueError(f"{name}={value!r} is not supported: {UNUSED[name]}")
        if others.get("padding_side", "right") not in ("right", None):
            raise ValueError("padding_side: always 'right', since pipelines drop a prefix of fixed length")
        if isinstance(truncation, str) or truncation is None:
            if truncation not in TRUNCATIONS:
                raise ValueError(f"truncation={truncation!r}: must be True, False or 'longest_first'")
            truncation = TRUNCATIONS[truncation]
        if isinstance(padding, str) or padding is None:
            padding = PADDINGS.get(padding, padding)
        mask: Any = others.get("return_attention_mask")
        return cls(padding, bool(truncation), mask is not False)

    def shown(self, batch: Batch) -> Batch:
        return batch if self.mask else Batch(input_ids=batch.input_ids)


class TokenizerSpellings:
    """Methods that only callers use."""

    backend: Tokenizer
    missing: ClassVar[Mapping[str, str]]

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property that failed: its own error
            return object.__getattribute__(self, name)
        raise lacking(type(self), name)

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Append what is not in the vocabulary yet; texts then contain it as a whole. Returns how many."""
        given = [new_tokens] if isinstance(new_tokens, (str, AddedToken)) else list(new_tokens)
        flags = {"special": special_tokens, "normalized": not special_tokens}
        tokens = [AddedToken(one, **flags) if isinstance(one, str) else one for one in given]
        fresh = {one.content: one for one in tokens if self.backend.token_to_id(one.content) is None}
        return self.backend.add_tokens(list(fresh.values()))


def to_tensors(batch: Batch, return_tensors: str | None) -> Batch:
    """The rows of a batch as int64: "pt" tensors, "np" arrays; None leaves lists. Raises ValueError for rows
    of unequal length."""
    if return_tensors is None:
        return batch
    if return_tensors not in ("pt", "np"):
        raise ValueError(f"return_tensors={return_tensors!r}: must be 'pt', 'np' or None")
    lengths = {len(row) for row in batch.input_ids}
    if len(lengths) > 1:
        raise ValueError(f"texts of {sorted(lengths)} tokens make no tensor: pass padding=True")
    if return_tensors == "np":
        return Batch({name: np.asarray(rows, dtype=np.int64) for name, rows in batch.items()})
    return Batch({name: torch.tensor(rows, dtype=torch.int64, device="cpu") for name, rows in batch.items()})
