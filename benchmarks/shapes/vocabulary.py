"""Small byte-level BPE vocabularies of the world's own words, with the special tokens of the real ones."""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers, trainers
from torch import Tensor, nn

from benchmarks.random_checkpoint import unigram_tokenizer, write_special_tokens
from benchmarks.shapes import scenes, wording
from joyedit.checkpoints.json_files import write_json
from joyedit.loading.layouts import load
from joyedit.pipelines.joyimage_prompts import SYSTEM, USER
from joyedit.text.clip_tokenizer import CLIPTokenizer, build_clip_backend
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer, build_qwen_backend
from joyedit.text.t5_tokenizer import T5TokenizerFast
from joyedit.text.tokenizer import TextTokenizer


def qwen_tokenizer(texts: Iterable[str], limit: int = 1600) -> Qwen2Tokenizer:
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
    return unigram_tokenizer(sorted({word.strip(".,?") for text in texts for word in text.split()}))


def instructions(count: int = 4000, kinds: Sequence[str] = scenes.KINDS, varied: bool = False) -> list[str]:
    """What is said in the training world, of edits of some kinds: plainly, and if `varied`, in other ways."""
    plain = [scenes.make_edit(i, kinds=kinds).instruction for i in range(count)]
    return plain + _varied(plain, wording.reworded) if varied else plain


def captions(count: int = 4000, varied: bool = False) -> list[str]:
    """What pictures of the training world show: plainly, and if `varied`, in other ways."""
    plain = [scenes.caption(scenes.make_edit(i).source) for i in range(count)]
    return plain + _varied(plain, wording.reworded_caption) if varied else plain


def _varied(plain: Sequence[str], change: Callable[[str, np.random.Generator], str]) -> list[str]:
    """Four times each, and all of that in every case: a word is known in each of them."""
    rng = np.random.default_rng(0)
    once = [change(text, rng) for text in plain for _ in range(4)]
    return [*once, *map(str.lower, once), *map(str.upper, once), *map(str.title, once)]


SPACES = "\u0120\u2581"  # how Qwen and UMT5 write a space before a word
# Where a text encoder keeps a row for each token.
VOCABULARIES = ("embed_tokens.weight", "lm_head.weight", "shared.weight", "token_embedding.weight")


@torch.no_grad()
def begin_with(folder: Path, networks: Mapping[str, nn.Module], tokenizer: TextTokenizer) -> None:
    """Give networks the weights of a checkpoint that was trained with a smaller vocabulary."""
    pipe = load(folder, device="cpu", dtype="float32")
    old, new = _tokens(pipe.tokenizer), _tokens(tokenizer)
    rows = torch.tensor(rows_alike(old, new))
    for name, network in networks.items():
        state: dict[str, Tensor] = pipe.components[name].state_dict()
        named = {key: value[rows] if key.endswith(VOCABULARIES) else value for key, value in state.items()}
        network.load_state_dict(named)


def rows_alike(old: Sequence[str], new: Sequence[str]) -> list[int]:
    """For each of the tokens `new`, which of `old` it begins as: itself, the same word in other letters or at
    another place of a text, a word that means the same (`wording.LIKE`), or one that means nothing."""
    exact = {token: i for i, token in enumerate(old)}
    marked = {_small(token): i for token, i in exact.items()} | exact  # what is written small counts more
    words = {_word(token): i for i, token in reversed(list(enumerate(old)))}
    nothing = next(words[word] for word in wording.LIKE_NOTHING if word in words)
    rows = []
    for token in new:
        word = _word(token)
        like = words.get(word, words.get(wording.LIKE.get(word, word), nothing))
        rows.append(exact.get(token, marked.get(_small(token), like)))
    return rows


def _tokens(tokenizer: TextTokenizer) -> list[str]:
    return tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))


def _small(token: str) -> str:
    """A token in small letters, with its mark."""
    return token[:1] + token[1:].lower() if token[:1] in SPACES else token.lower()


def _word(token: str) -> str:
    """A token without the marks for a space before it (Qwen, UMT5) and the end of a word (CLIP)."""
    return re.sub(f"^[{SPACES}]|</w>$", "", token).lower()
