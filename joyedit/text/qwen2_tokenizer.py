"""The vocabulary of Qwen2 and later, JoyImage's.

Source: transformers `tokenization_qwen2.py`.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors

from joyedit.text.tokenizer import TextTokenizer
from joyedit.text.tokenizer_files import read_bpe


class Qwen2Tokenizer(TextTokenizer):
    """The byte-level BPE of Qwen2 and later: no token is added before or after a text."""

    defaults = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "model_max_length": 262_144}
    only = dict.fromkeys(
        ("add_bos_token", "add_eos_token", "add_prefix_space", "split_special_tokens"), False
    )

    @staticmethod
    def build_backend(vocab: Path, merges: Path) -> Tokenizer:
        return build_qwen_backend(vocab, merges)


def build_qwen_backend(vocab: Path, merges: Path) -> Tokenizer:
    """The Qwen2 pipeline: NFC, split into words, single digits and punctuation, bytes, BPE."""
    backend = Tokenizer(read_bpe(vocab, merges))
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend
