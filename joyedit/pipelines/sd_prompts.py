"""Prompts of Stable Diffusion: checked against the networks, cut or padded to equal length, and read once.

A pipeline's prompts are `Text`s: positive and negative, each as words or as embeddings. Words that are equal,
in whichever of a call's texts, are one row of one batch of the text encoder. So equal prompts have embeddings
that are equal to the last bit, which differences between predictions rely on.

B prompts   L tokens (77 if no embeddings of another length are given)   D width of the text encoder
Source: arXiv 2112.10752; diffusers `pipeline_stable_diffusion.py`.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from joyedit.models.clip import CLIPTextModel
from joyedit.pipelines.checks import Text, as_list
from joyedit.text.clip_tokenizer import CLIPTokenizer
from joyedit.text.textual_inversion import TextualInversion

log = logging.getLogger("joyedit")


class Embeds(NamedTuple):
    """Prompts as the UNet reads them, (B, L, D) each; no negative ones without guidance."""

    positive: Tensor
    negative: Tensor | None


class Item(NamedTuple):
    """What the text encoder is to read."""

    words: str
    tokens: int
    skipped: int  # layers of the encoder that are left out, from the end


class PromptReader:
    """A tokenizer and its text encoder, for prompts `width` wide; without these, of what came embedded."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, width: int, dtype: torch.dtype):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.width = width
        self.dtype = dtype

    def check(self, text: Text, name: str = "") -> tuple[int, int]:
        """Its B and L, once everything is found to fit; `name` is the prefix of the arguments. Raises
        ValueError or TypeError."""
        text.check(name)
        if text.embeds is not None and text.negative_embeds is not None:
            if text.embeds.shape != text.negative_embeds.shape:
                shapes = f"{tuple(text.embeds.shape)} and {tuple(text.negative_embeds.shape)}"
                raise ValueError(f"{name}prompt_embeds and its negatives differ in shape: {shapes}")
        wanted = (text.batch, self._length(text), self.width)
        for kind, embeds in (
            ("prompt_embeds", text.embeds),
            ("negative_prompt_embeds", text.negative_embeds),
        ):
            if embeds is not None and (tuple(embeds.shape) != wanted or 0 in wanted):
                raise ValueError(f"{name}{kind} has shape {tuple(embeds.shape)}, wanted {wanted} (B, L, D)")
        return wanted[:2]

    def check_pair(self, target: Text, source: Text) -> int:
        """B of two texts that are to be compared. Raises ValueError or TypeError."""
        (batch, length), (others, tokens) = self.check(target, "target_"), self.check(source, "source_")
        if (batch, length) != (others, tokens):
            raise ValueError(
                "target and source must be as many prompts of as many tokens, but there are "
                f"{batch} target prompts of {length} and {others} source prompts of {tokens}"
            )
        return batch

    def read(
        self, texts: Sequence[Text], guided: bool, skips: tuple[int, int], device: torch.device
    ) -> list[Embeds]:
        """Embeddings of each text, in `dtype`; no negative ones unless guided.

        skips: how many layers are left out for positive and for negative prompts.
        """
        wanted: list[Item] = []
        for text in texts:
            if text.embeds is None:
                prompts = as_list(text.prompt, text.batch, "prompt")
                wanted += [Item(words, self._length(text), skips[0]) for words in prompts]
            if guided and text.negative_embeds is None:
                negatives = as_list(text.negative, text.batch, "negative_prompt")
                wanted += [Item(words, self._length(text), skips[1]) for words in negatives]
        states = self._states(wanted, device)
        rows = iter(states[item] for item in wanted)

        def known_or_read(embeds: Tensor | None, batch: int) -> Tensor:
            found = torch.stack([next(rows) for _ in range(batch)]) if embeds is None else embeds
            return found.to(device, self.dtype)

        found: list[Embeds] = []
        for text in texts:
            positive = known_or_read(text.embeds, text.batch)
            negative = known_or_read(text.negative_embeds, text.batch) if guided else None
            found.append(Embeds(positive, negative))
        return found

    def _states(self, wanted: list[Item], device: torch.device) -> dict[Item, Tensor]:
        """The embedding (L, D) of each item."""
        states: dict[Item, Tensor] = {}
        for tokens, skipped in dict.fromkeys((item.tokens, item.skipped) for item in wanted):
            items = [one for one in dict.fromkeys(wanted) if (one.tokens, one.skipped) == (tokens, skipped)]
            ids = self._token_ids([one.words for one in items], tokens).to(device)
            states |= zip(items, self.text_encoder.encode(ids, skipped), strict=True)
        return states

    def _token_ids(self, texts: list[str], length: int) -> Tensor:
        texts = TextualInversion(self.tokenizer, self.text_encoder).expand(texts)
        for text in texts:
            ids = self.tokenizer.encode(text)
            if len(ids) > length:
                lost = self.tokenizer.decode(ids[length - 1 : -1])
                log.warning("a prompt was cut to %d tokens; lost: %r", length, lost)
        padded = {"padding": "max_length", "max_length": length, "truncation": True}
        return self.tokenizer(texts, **padded, return_tensors="pt").input_ids

    def _length(self, text: Text) -> int:
        """L: of the prompt's embeddings if they are given, else what the tokenizer pads to."""
        if text.embeds is None or text.embeds.ndim != 3:
            return 77 if self.tokenizer is None else self.tokenizer.model_max_length
        return text.embeds.shape[1]
