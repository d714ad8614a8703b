"""Small byte-level BPE vocabularies of the world's own words, with the special tokens of the real ones."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from tokenizers import pre_tokenizers, trainers

from benchmarks.shapes import scenes
from joyedit.pipelines.joyimage_prompts import SYSTEM, USER
from joyedit.tokenizers import Qwen2Tokenizer, build_qwen_backend
from joyedit.weights import write_json

QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


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
        size = backend.get_vocab_size(with_added_tokens=False)
        added = {token: size + i for i, token in enumerate(QWEN_TOKENS)}
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        write_json(folder / "added_tokens.json", added)
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in added.items()},
                "additional_special_tokens": list(QWEN_TOKENS[1:]),
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "model_max_length": 262144,
            },
        )
        return Qwen2Tokenizer.from_pretrained(folder)


def instructions(count: int = 4000) -> list[str]:
    """What is said in the training world."""
    return [scenes.make_edit(i).instruction for i in range(count)]
