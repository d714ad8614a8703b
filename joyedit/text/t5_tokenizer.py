"""The vocabulary of T5 and UMT5, ChronoEdit's, and the cleaning of its prompts.

Source: transformers `tokenization_t5_fast.py`; diffusers `pipeline_wan_i2v.py` (prompt cleaning).
"""

import html
import logging
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from joyedit.text.tokenizer import TextTokenizer

log = logging.getLogger("joyedit")


class T5TokenizerFast(TextTokenizer):
    """The SentencePiece vocabulary of T5 and UMT5: ids of a text, then that of </s>.

    The folder's tokenizer.json is taken as it is. transformers 5 rebuilds it from the vocabulary, and then
    reads white space and special tokens inside a text otherwise than the releases that WAN was trained with.
    """

    relatives = frozenset({"T5Tokenizer"})  # its other name in model_index.json

    defaults = {
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "model_max_length": 512,
    }
    only = {"split_special_tokens": False}

    def __init__(
        self, backend: Tokenizer, settings: Mapping[str, Any] | None = None, chat_template: str | None = None
    ):
        super().__init__(backend, settings, chat_template)
        self.eos_token_id = self._known("eos_token")

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no tokenizer.json; that of google/umt5-xxl fits ChronoEdit. spiece.model "
                "is not read"
            )
        return super().from_folder(folder)

    def truncate(self, row: list[int], limit: int) -> list[int]:
        """As many ids as fit in `limit`, the last of them always </s>."""
        return row if len(row) <= limit else [*row[: limit - 1], self.eos_token_id]


# What ftfy.fix_text may change beside the entities that Python knows, NFC and white space: control and format
# characters, quotes, ligatures, widths, and what may be UTF-8 that was read in a code page.
FTFY_CHANGES = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\uffff\ud800-\udfff]"
    "|[\u02bc\u2018-\u201f\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\ufb00-\ufb06\uff01-\uffef]"
    "|[\u00c2-\u017f][\u00a0-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc"
    "\u2013\u2014\u201a-\u203a\u20ac\u2122]"
    "|&[A-Z]{2,24};"
)


def clean_prompt(text: str) -> str:
    """A prompt as WAN's training data was cleaned: ftfy.fix_text, HTML entities twice, single spaces.

    Without ftfy (`pip install "joyedit[chrono]"`) NFC and entities are all of its work that is done, and a
    warning is logged for a text that may come out otherwise. Source: diffusers `prompt_clean`.
    """
    try:
        import ftfy
    except ImportError:
        fixed = unicodedata.normalize("NFC", text if "<" in text else html.unescape(text))
        cleaned = html.unescape(html.unescape(fixed))
        if FTFY_CHANGES.search(cleaned):
            log.warning(
                "ftfy is not installed, and this prompt may be read otherwise than in the reference: %r. "
                'Either pip install "joyedit[chrono]", or write straight quotes and plain characters',
                text[:80],
            )
    else:
        cleaned = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", cleaned).strip()
