"""Textual inversion: new words for a text encoder, each a few learned rows of its token embedding.

A word of V vectors becomes V tokens, `word`, `word_1`, ..., appended to the tokenizer, and V rows appended to
the embedding. Prompts that contain the word must name all its tokens: `expand` writes them out, before the
tokenizer sees the text. All state is in the tokenizer and the text encoder, so saving both keeps the words.

V vectors   D width of the text encoder
Source: arXiv 2208.01618; diffusers `loaders/textual_inversion.py`.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.network import Network
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.pickles import load_pickle
from joyedit.checkpoints.plain_text import shown
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.text.clip_tokenizer import CLIPTokenizer

log = logging.getLogger("joyedit")

USUAL_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
NAMELESS = "emb_params"  # the key in files whose name is the word
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "Stable Diffusion XL"}

MOST_VECTORS = 1000  # of a word; 75 fit into a prompt
LONGEST_WORD = 200

Source = str | Path | Tensor | Mapping[str, Any]


class TextualInversion:
    """The learned words of a tokenizer and its text encoder."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: Network):
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder

    def load_textual_inversion(
        self,
        source: Source | Sequence[Source],
        token: str | Sequence[str | None] | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        hf_token: str | bool | None = None,
        **options: Any,
    ) -> list[str]:
        """Add words, each from a file, folder, Hub repository, state dict or tensor. Returns the words.

        source: one or a list. {word: (D) or (V, D)}; a file of the A1111 interface; a plain tensor, which
        needs a `token`. token: the word to use instead of the file's, one for each source.
        options: hf_token (the Hub's), revision, cache_dir, local_files_only, force_download, use_safetensors.
        Nothing is changed when it raises: FileNotFoundError; ValueError for other contents, a word that the
        vocabulary has, and a width that is not the text encoder's.
        """
        sources: list[Any] = list(source) if isinstance(source, (list, tuple)) else [source]
        words = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
        if len(words) != len(sources):
            raise ValueError(f"{len(sources)} sources, but {len(words)} tokens: wanted one for each")
        if hf_token is not None:
            options["token"] = hf_token
        found: dict[str, Tensor] = {}
        for one, word in zip(sources, words, strict=True):
            word, vectors = read_word(one, word, weight_name, subfolder or "", options)
            if word in found:
                raise ValueError(f"token {word!r} comes twice: give each source a token of its own")
            found[word] = vectors
        self._add(found)
        return list(found)

    def unload_textual_inversion(self, tokens: str | Sequence[str] | None = None) -> None:
        """Take words (default: all) out of the tokenizer and the embedding. Raises ValueError for others."""
        words = [tokens] if isinstance(tokens, str) else self.words() if tokens is None else list(tokens)
        if unknown := [word for word in words if word not in self.words()]:
            raise ValueError(f"{unknown} are no learned words; there are {sorted(self.words())}")
        ids = self.tokenizer.remove_tokens([token for word in words for token in self.words()[word]])
        weight = self._embedding.weight.data
        kept = torch.ones(len(weight), dtype=torch.bool, device="cpu")
        kept[ids] = False
        self._set_embedding(weight[kept.to(weight.device)])

    def words(self) -> dict[str, list[str]]:
        """Each learned word and its tokens."""
        added = self.tokenizer.backend.get_added_tokens_decoder().items()
        appended = [
            t.content
            for i, t in sorted(added, key=lambda entry: entry[0])
            if i >= self.tokenizer.vocab_size and not t.special
        ]
        chains: dict[str, list[str]] = {}
        for token in appended:
            word, _, number = token.rpartition("_")
            if word in chains and number == str(len(chains[word])):
                chains[word].append(token)
            else:
                chains[token] = [token]
        return chains

    def expand(self, prompt: Any) -> Any:
        """A prompt, or a list of them; each word of several vectors is followed by its other tokens."""
        if isinstance(prompt, (list, tuple)):
            return [self.expand(one) for one in prompt]
        words = self.words()
        longest_first = sorted((t for tokens in words.values() for t in tokens), key=len, reverse=True)
        if not longest_first:
            return prompt
        whole = {word.lower(): " ".join(tokens) for word, tokens in words.items()}
        pattern = "|".join(map(re.escape, longest_first))
        return re.sub(pattern, lambda m: whole.get(m[0].lower(), m[0]), prompt, flags=re.IGNORECASE)

    def _add(self, found: Mapping[str, Tensor]) -> None:
        weight = self._embedding.weight.data
        rows, width = weight.shape
        if rows != len(self.tokenizer):
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the text encoder {rows}: they do not fit"
            )
        chains: dict[str, list[str]] = {}
        for word, vectors in found.items():
            if vectors.shape[1] != width:
                family = f", it is for {FAMILIES[n]}" if (n := vectors.shape[1]) in FAMILIES else ""
                raise ValueError(f"token {word!r} has vectors of {n}, the text encoder {width}{family}")
            chains[word] = [word, *(f"{word}_{i}" for i in range(1, len(vectors)))]
        known = {*self.words(), *found}
        for word in found:
            stem, _, number = word.rpartition("_")
            if self.tokenizer.convert_tokens_to_ids(f"{word}_1") is not None or f"{word}_1" in found:
                raise ValueError(f"token {word!r}: {word}_1 exists, and would be read as its second vector")
            if number.isdigit() and stem in known:
                raise ValueError(
                    f"token {word!r} would be read as a vector of {stem!r}: give it another name"
                )
        added = torch.cat([vectors.to(weight.device, weight.dtype) for vectors in found.values()])
        longer = torch.cat((weight, added))
        # Whatever may fail comes before the first change: half a word would shift the ids of the next one.
        tokens = [token for chain in chains.values() for token in chain]
        ids = self.tokenizer.append_tokens(tokens)
        if ids != list(range(rows, len(longer))):
            self.tokenizer.remove_tokens(
                [token for token, one in zip(tokens, ids, strict=True) if one >= rows]
            )
            raise ValueError(f"the tokens of {sorted(found)} get other ids than the rows of the embedding")
        self._set_embedding(longer)

    @property
    def _embedding(self) -> nn.Embedding:
        modules = dict(self.text_encoder.named_modules())
        return next(modules[name] for name in modules if name.endswith("token_embedding"))  # type: ignore

    def _set_embedding(self, weight: Tensor) -> None:
        self._embedding.weight = nn.Parameter(weight, requires_grad=False)
        self._embedding.num_embeddings = len(weight)
        self.text_encoder.config = self.text_encoder.config.replace(vocab_size=len(weight))


def read_word(
    source: Source, word: str | None, weight_name: str | None, subfolder: str, options: Mapping[str, Any]
) -> tuple[str, Tensor]:
    """The word and its vectors (V, D). `word` wins over the name in the file."""
    name, label, content = None, "the state dict", source
    if isinstance(source, Tensor):
        label, content = "the tensor", {NAMELESS: source}
    elif not isinstance(source, Mapping):
        parsed = LoadOptions.parse(options, also=("token", "weight_name", "subfolder", "hf_token"))
        path = Origin(str(source), **parsed.origin).fetch_file(subfolder, weight_name, USUAL_NAMES)
        if parsed.use_safetensors and path.suffix != ".safetensors":
            raise FileNotFoundError(f"{path} is a pickle, and use_safetensors=True refuses those")
        name, label = path.stem, str(path)
        is_pickle = path.suffix != ".safetensors"
        content = load_pickle(path, parameter_dicts=True) if is_pickle else TensorFiles([path])
    if isinstance(content, Tensor):
        content = {NAMELESS: content}
    if not isinstance(content, Mapping):
        raise ValueError(f"{label} is no textual inversion: it holds a {type(content).__name__}")
    written = _star_of(content.get("string_to_param"))
    if written is not None:
        name, vectors = content.get("name") or name, written
    elif len(content) == 1:
        ((key, vectors),) = content.items()
        name = name if key == NAMELESS else key
    else:
        kind = " (it is for Stable Diffusion XL)" if "clip_g" in content else ""
        vectors = f"the keys {shown(sorted(map(str, content))[:4])}{kind}"
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2) or 0 in vectors.shape:
        found = f"a tensor of shape {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else vectors
        raise ValueError(f"{label} is no textual inversion: it holds {found}, wanted {{word: (D) or (V, D)}}")
    if not vectors.is_floating_point() or vectors.layout != torch.strided:
        raise ValueError(f"{label} is no textual inversion: its vectors are {vectors.layout} {vectors.dtype}")
    if vectors.ndim == 2 and len(vectors) > MOST_VECTORS:
        raise ValueError(
            f"{label}: {len(vectors):,} vectors are more than the {MOST_VECTORS} that a word may have"
        )
    if word is None and name is None:
        raise ValueError(f"{label} does not name its word: give token=")
    chosen = word if word is not None else name
    if not isinstance(chosen, str) or not chosen.isprintable() or len(chosen) > LONGEST_WORD:
        raise ValueError(f"{label}: {shown(chosen, 60)} can be no word of a prompt: give another token=")
    if word is not None and name is not None and word != name:
        log.info("%s: the word is %r instead of %s", label, word, shown(name))
    return chosen, vectors.detach().reshape(-1, vectors.shape[-1])


def _star_of(written: Any) -> Any:
    """What the A1111 interface's trainer wrote under "*", in a dict or a ParameterDict; None where it has
    none. A ParameterDict is looked into as an object: releases of torch keep its tensors in different places.
    """
    if isinstance(written, nn.ParameterDict):
        inside = written.__dict__
        for place in (inside.get("_parameters"), inside):
            if isinstance(place, Mapping) and "*" in place:
                return place["*"]
        return None
    return written.get("*") if isinstance(written, Mapping) else None
