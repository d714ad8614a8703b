"""Small byte-level BPE vocabularies of the world's own words, with the special tokens of the real ones."""

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import pre_tokenizers, trainers

from benchmarks.random_checkpoint import unigram_tokenizer, write_special_tokens
from benchmarks.shapes import scenes
from joyedit.checkpoints.json_files import write_json
from joyedit.pipelines.joyimage_prompts import SYSTEM, USER
from joyedit.text.clip_tokenizer import CLIPTokenizer, build_clip_backend
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer, build_qwen_backend
from joyedit.text.t5_tokenizer import T5TokenizerFast


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


def clip_tokenizer(texts: Iterable[str], limit: int = 1000, length: int = 77) -> CLIPTokenizer:
    """A vocabulary of at most `limit` tokens in which the words of `texts` are one each, in CLIP's order:
    bytes within a word, bytes at its end, merges, the special tokens. Prompts are padded to `length`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    start, end = "<|startoftext|>", "<|endoftext|>"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        write_json(vocab, {symbol: i for i, symbol in enumerate([*alphabet, end])})
        merges.write_text("#version: 0.2\n", encoding="utf-8")
        backend = build_clip_backend(vocab, merges)
        trainer = trainers.BpeTrainer(
            vocab_size=limit - len(alphabet) - 2,  # all ends of words and the special tokens come on top
            min_frequency=1,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        backend.model.save(temporary)
        lines = merges.read_text(encoding="utf-8").splitlines()[1:]
        merged = [line.replace(" ", "") for line in lines]
        tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet), *merged, start, end]
        write_json(vocab, {token: i for i, token in enumerate(dict.fromkeys(tokens))})
        special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
        write_json(folder / "special_tokens_map.json", special)
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
        write_json(folder / "tokenizer_config.json", {**settings, **special})
        return CLIPTokenizer.from_pretrained(folder)


def umt5_tokenizer(texts: Iterable[str]) -> T5TokenizerFast:
    """A vocabulary in which the words of `texts` are one token each; other words are spelled."""
    return unigram_tokenizer(sorted({word.strip(".,") for text in texts for word in text.split()}))


def instructions(count: int = 4000, kinds: Sequence[str] = scenes.KINDS) -> list[str]:
    """What is said in the training world, of edits of some kinds."""
    return [scenes.make_edit(i, kinds=kinds).instruction for i in range(count)]


def captions(count: int = 4000) -> list[str]:
    """What pictures of the training world show."""
    return [scenes.caption(scenes.make_edit(i).source) for i in range(count)]
