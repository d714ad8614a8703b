"""How JoyAI-Image reads prompts: Qwen3-VL's states of the last layer, before its final norm.

Positive and negative prompt of a picture or several begin alike (system turn, user, pictures), so these go
through the vision tower once, and what the texts have in common at their start goes through the decoder once.

B prompts   L tokens kept of a prompt   D width
Source: diffusers `pipeline_joyimage_edit.py`.
"""

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from joyedit.models.qwen3_vl import ImageFeatures, Prefix, Qwen3VLForConditionalGeneration
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer
from joyedit.text.qwen3_vl_processor import Qwen3VLProcessor

log = logging.getLogger("joyedit")

Tokens = tuple[int, ...]  # a text, by the numbers of its tokens

SYSTEM = (
    "<|im_start|>system\n \\nDescribe the image by detailing the color, shape, size, texture, quantity, "
    "text, spatial relationships of the objects and background:<|im_end|>\n"
)
USER = "<|im_start|>user\n"
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_MARK = "<image>\n"  # how a prompt may name a picture


class Prompt(NamedTuple):
    """Embedded prompts, the pair that the encode methods return: embeds (B, L, D), mask (B, L), nonzero at
    valid tokens."""

    embeds: Tensor
    mask: Tensor

    @classmethod
    def of(cls, embeds: Tensor | None, mask: Tensor | None) -> "Prompt | None":
        return None if embeds is None or mask is None else cls(embeds, mask.bool().long())

    @classmethod
    def pad(cls, states: list[Tensor]) -> "Prompt":
        """From a list of (L, D), zeros after the shorter ones."""
        masks = [s.new_ones(len(s), dtype=torch.long) for s in states]
        return cls(pad_sequence(states, batch_first=True), pad_sequence(masks, batch_first=True))

    def repeat(self, count: int) -> "Prompt":
        """Each prompt `count` times in a row."""
        return Prompt(self.embeds.repeat_interleave(count, 0), self.mask.repeat_interleave(count, 0))

    def to(self, device: torch.device | None) -> "Prompt":
        return Prompt(self.embeds.to(device), self.mask.to(device))


class PromptReader:
    """Reads chat texts. `dropped` tokens at their start, the system turn, are not part of what is kept;
    texts without a picture are cut after `limit` more, if there is one."""

    def __init__(
        self,
        encoder: Qwen3VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        processor: Qwen3VLProcessor,
        device: torch.device,
        dropped: int,
        limit: int | None,
    ):
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.processor = processor
        self.device = device
        self.dropped = dropped
        self.limit = limit

    def read(self, texts: list[str], pictures: Sequence[Sequence[Image]] | None) -> list[Tensor]:
        """(L, D) of each text. pictures: for each text those that it names; texts about the same objects see
        them once."""
        states: dict[int, Tensor] = {}
        for rows in _rows_by_pictures(pictures, len(texts)):
            seen = None if pictures is None else self._see(pictures[rows[0]])
            ids = {row: tuple(self._token_ids(texts[row], seen)) for row in rows}
            distinct = list(dict.fromkeys(ids.values()))
            known = dict(zip(distinct, self._read_together(distinct, seen), strict=True))
            states.update({row: known[ids[row]] for row in rows})
        return [states[row] for row in range(len(texts))]

    def read_padded(self, texts: list[str], pictures: list[Image]) -> Prompt:
        """As the reference: one right-padded batch whose padding has states of its own."""
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(
            self.device
        )
        seen = self.encoder.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
        states = self.encoder.hidden_states(inputs["input_ids"], inputs["attention_mask"], seen)
        return Prompt(states[:, self.dropped :], inputs["attention_mask"][:, self.dropped :])

    def _read_together(self, distinct: list[Tokens], seen: ImageFeatures | None) -> list[Tensor]:
        """States of different token sequences about the same pictures or none."""
        shared = _common_prefix(distinct)
        ahead = distinct[0][:shared].count(self.encoder.config.image_token_id)
        if shared < self.dropped or (seen is not None and ahead < len(seen.embeds)):
            wholes = [self._tensor([ids]) for ids in distinct]
            return [self.encoder.hidden_states(w, images=seen, keep_from=self.dropped)[0] for w in wholes]
        prefix = self.encoder.prefill(self._tensor([distinct[0][:shared]]), seen, keep_from=self.dropped)
        tails = self._read_on(prefix, [ids[shared:] for ids in distinct])
        return [torch.cat((prefix.states[0], tail)) for tail in tails]

    def _read_on(self, prefix: Prefix, tails: list[Tokens]) -> list[Tensor]:
        """States of what follows a prefix. Every pass reads all weights, so tails of similar length go
        together, the shorter ones padded where nothing looks."""
        longest = max(map(len, tails))
        if longest * len(tails) > 1.5 * sum(map(len, tails)):
            return [self.encoder.hidden_states(self._tensor([tail]), prefix=prefix)[0] for tail in tails]
        padding = [longest - len(tail) for tail in tails]
        ids = [(*tail, *(0,) * more) for tail, more in zip(tails, padding, strict=True)]
        mask = [(1,) * len(tail) + (0,) * more for tail, more in zip(tails, padding, strict=True)]
        states = self.encoder.hidden_states(self._tensor(ids), self._tensor(mask), prefix=prefix)
        return [row[: len(tail)] for row, tail in zip(states, tails, strict=True)]

    def _see(self, pictures: Sequence[Image]) -> ImageFeatures:
        inputs = self.processor.image_processor(pictures)
        pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
        return self.encoder.encode_images(pixels.to(self.device), grid.to(self.device))

    def _token_ids(self, text: str, seen: ImageFeatures | None) -> list[int]:
        if seen is not None:
            merged = self.encoder.config.vision_config.spatial_merge_size**2
            counts = iter((seen.grid_thw.prod(dim=1) // merged).tolist())
            text = re.sub(re.escape("<|image_pad|>"), lambda pad: pad[0] * next(counts), text)
        ids = self.tokenizer.encode(text)
        if seen is not None or self.limit is None:
            return ids
        limit = self.limit + self.dropped
        if len(ids) > limit:
            lost = self.tokenizer.decode(ids[limit:])
            log.warning("a prompt of %d tokens was cut; lost: %r", len(ids), lost)
        return ids[:limit]

    def _tensor(self, rows: list[Tokens]) -> Tensor:
        return torch.tensor(rows, device=self.device)


def _rows_by_pictures(pictures: Sequence[Sequence[Image]] | None, count: int) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for row in range(count):
        seen = () if pictures is None else tuple(map(id, pictures[row]))
        groups.setdefault(seen, []).append(row)
    return list(groups.values())


def _common_prefix(ids: list[Tokens]) -> int:
    """How many tokens different texts share at their start, one left over for each. Zero for a single one."""
    if len(ids) == 1:
        return 0
    shortest = min(len(i) for i in ids) - 1
    return next((n for n in range(shortest) if len({i[n] for i in ids}) > 1), shortest)
