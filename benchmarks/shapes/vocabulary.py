"""Small byte-level BPE vocabularies of the world's own words, with the special tokens of the real ones."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import pre_tokenizers, trainers

from benchmarks.shapes import scenes
from joyedit.pipelines.joyimage_prompts import SYSTEM, USER
from joyedit.random_checkpoint import write_special_tokens
from joyedit.tokenizers import Qwen2Tokenizer, build_qwen_backend
from joyedit.weights import write_json


def qwen_tokenizer(texts: Iterable[str], limit: int = 600) -> Qwen2Tokenizer:
    """A vocabulary of at most `limit` tokens in which the words of `texts` and of the chat are one each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_json(folder / "vocab.json", {symbol: i for i, symbol in enumerate(alphabet)})
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        backend = build_qwen_backend(folder / "vocab.json", folder / "merges.txt")
        trainer = trainers.BpeTrainer(
            vocab_size=limit, min_frequency=1, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator([*texts, SYSTEM, USER, "assistant\n"], trainer)
        backend.model.save(temporary)
        write_special_tokens(folder, backend.get_vocab_size(with_added_tokens=False))
        return Qwen2Tokenizer.from_pretrained(folder)


def instructions(count: int = 4000) -> list[str]:
    """What is said in the training world."""
    return [scenes.make_edit(i).instruction for i in range(count)]
