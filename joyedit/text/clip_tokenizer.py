"""The vocabulary of CLIP, Stable Diffusion's.

Source: transformers `tokenization_clip.py`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from torch import Tensor

from joyedit.text.tokenizer import TextTokenizer
from joyedit.text.tokenizer_files import read_bpe, special_tokens


class CLIPTokenizer(TextTokenizer):
    """The lower-casing BPE of CLIP: ids of a text stand between those of <|startoftext|> and <|endoftext|>.

    Stable Diffusion 2 pads with "!", id 0. Where a folder names that as its padding token, "!" is looked for
    as a whole, and has this id in prompts too.
    """

    defaults = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
        "model_max_length": 77,
    }
    only = {"add_prefix_space": False, "split_special_tokens": False, "do_lower_case": True}

    def __init__(
        self, backend: Tokenizer, settings: Mapping[str, Any] | None = None, chat_template: str | None = None
    ):
        super().__init__(backend, settings, chat_template)
        self.bos_token: str = self.settings["bos_token"]
        self.bos_token_id, self.eos_token_id = self._known("bos_token"), self._known("eos_token")
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        flagged = {key: value for key, value in (settings or {}).items() if value is not None}
        special = special_tokens({**self.settings, **flagged})
        backend.add_special_tokens([token for text, token in special.items() if text not in known])
        end, start = (self.eos_token, self.eos_token_id), (self.bos_token, self.bos_token_id)
        trim_offsets = add_prefix_space = False
        backend.post_processor = processors.RobertaProcessing(end, start, trim_offsets, add_prefix_space)

    @staticmethod
    def build_backend(vocab: Path, merges: Path) -> Tokenizer:
        return build_clip_backend(vocab, merges)

    def truncate(self, row: list[int], limit: int) -> list[int]:
        """As many ids as fit in `limit`, the last token of all kept. Raises ValueError if not even two do."""
        if limit < 2:
            raise ValueError(f"max_length={limit}: must be at least 2, for {self.bos_token}{self.eos_token}")
        return row if len(row) <= limit else [*row[: limit - 1], self.eos_token_id]

    def decode(self, ids: int | Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """The text of one row of ids, lower-case, one space after each word."""
        return super().decode(ids, skip_special_tokens).replace("</w>", " ").strip()

    def append_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Append tokens, which texts then contain as a whole, whatever the case; returns their new ids.

        Raises ValueError, before any is added, for one that is in the vocabulary, is blank or comes twice.
        """
        for i, token in enumerate(tokens):
            if not token.strip():
                raise ValueError(f"token {token!r} is blank")
            if token in tokens[:i] or self.backend.token_to_id(token) is not None:
                raise ValueError(f"token {token!r} is in the vocabulary already: give it another name")
        self.backend.add_tokens([AddedToken(token, special=False, normalized=True) for token in tokens])
        return self.convert_tokens_to_ids(list(tokens))

    def remove_tokens(self, tokens: Sequence[str]) -> list[int]:
        """Take back what `append_tokens` appended; returns the ids that the tokens had. Later tokens move up,
        as the rows of an embedding do when these rows are deleted.

        Raises ValueError, before any is removed, for a token that was not appended.
        """
        appended = {
            token.content: token_id
            for token_id, token in self.backend.get_added_tokens_decoder().items()
            if token_id >= self.vocab_size
        }
        for token in tokens:
            if token not in appended:
                raise ValueError(f"token {token!r} was not added; those that were: {sorted(appended)}")
        removed = [appended[token] for token in tokens]
        raw = json.loads(self.backend.to_str())  # the library itself only adds
        kept = [entry for entry in raw["added_tokens"] if entry["id"] not in removed]
        for entry in kept:
            entry["id"] -= sum(token_id < entry["id"] for token_id in removed)
        self.backend = Tokenizer.from_str(json.dumps({**raw, "added_tokens": kept}))
        return removed


def build_clip_backend(vocab: Path, merges: Path) -> Tokenizer:
    """The CLIP pipeline: NFC, single spaces, lower case, split into words, single digits and punctuation,
    bytes, BPE with a mark on the last piece of a word."""
    marks = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>"}
    backend = Tokenizer(read_bpe(vocab, merges, unk_token="<|endoftext|>", fuse_unk=False, **marks))
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
