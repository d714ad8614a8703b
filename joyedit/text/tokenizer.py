"""Text to token ids, on the `tokenizers` library: what the vocabularies share, and their files.

A tokenizer is a backend (`tokenizers.Tokenizer`: normaliser, split, BPE) and the settings of its folder
(padding token, longest input, chat template). Encoding leaves the backend as it is: truncation and padding
happen on the lists of ids, so that one tokenizer can serve several threads.

B texts   L tokens

Padding is always on the right, whatever the folder says: the pipelines drop a prefix of fixed length.

Source: transformers `tokenization_utils_fast.py`, `tokenization_utils_base.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor

from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.missing import TOKENIZERS
from joyedit.checkpoints.option_spellings import check_saving
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.plain_text import shown
from joyedit.checkpoints.replacing import replacing
from joyedit.media.batch import Batch
from joyedit.text.tokenizer_files import (
    TOKENIZER_FILES,
    add_tokens,
    declared_tokens,
    longest_input,
    open_backend,
    plain_tokens,
    read_settings,
    read_template,
    save_tokenizer,
    token_text,
)
from joyedit.text.tokenizer_spellings import Reading, TokenizerSpellings, to_tensors


class TextTokenizer(TokenizerSpellings):
    """What the tokenizers have in common. Each says what it reads a vocabulary as, and what it puts around a
    text."""

    library = "transformers"  # under which model_index.json lists it
    missing = TOKENIZERS
    defaults: ClassVar[Mapping[str, Any]]  # of a folder that does not say
    only: ClassVar[Mapping[str, Any]]  # settings that change the ids -> the one value that is supported

    def __init__(
        self, backend: Tokenizer, settings: Mapping[str, Any] | None = None, chat_template: str | None = None
    ):
        """`settings`: the keys of tokenizer_config.json. Raises ValueError when the padding token is not in
        the vocabulary, or a setting asks for what this class does not do."""
        self.backend = backend
        given = {key: value for key, value in (settings or {}).items() if value is not None}
        self.settings = {**self.defaults, **plain_tokens(given)}
        self.chat_template = chat_template
        for name, value in self.only.items():
            if self.settings.get(name, value) != value:
                raise ValueError(f"{name}={shown(self.settings[name])} is not supported, only {value!r}")
        self.pad_token: str = token_text(self.settings["pad_token"])
        self.eos_token: str = token_text(self.settings["eos_token"])
        self.eos_token_id = backend.token_to_id(self.eos_token)
        self.pad_token_id = self._known("pad_token")
        self.model_max_length = longest_input(self.settings, self.defaults["model_max_length"])
        self.settings["model_max_length"] = self.model_max_length

    def _known(self, name: str) -> int:
        """The id of a token that the settings name."""
        token = token_text(self.settings[name])
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"{name} {shown(token)} is not in the vocabulary of {len(self)} tokens")
        return token_id

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, subfolder: str | None = None, **options: Any
    ) -> Self:
        """Open a folder or Hub repository with tokenizer.json, or with vocab.json and merges.txt.

        Options: revision, token, cache_dir, local_files_only, force_download. Raises FileNotFoundError when
        files are missing, ValueError when they are damaged or do not fit each other.
        """
        origin = Origin(str(name_or_path), **LoadOptions.parse(options).origin)
        return cls.from_folder(origin.fetch_files(subfolder or "", TOKENIZER_FILES))

    @staticmethod
    def build_backend(vocab: Path, merges: Path) -> Tokenizer:
        """The pipeline of a folder without tokenizer.json. Raises ValueError when the files are damaged."""
        raise NotImplementedError

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        settings = read_settings(folder)
        if (folder / "tokenizer.json").is_file():
            backend = open_backend(folder / "tokenizer.json")
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend = cls.build_backend(folder / "vocab.json", folder / "merges.txt")
        else:
            raise FileNotFoundError(
                f"{folder} holds no tokenizer.json, and not both vocab.json and merges.txt"
            )
        add_tokens(backend, declared_tokens(folder, settings), folder)
        template = read_template(folder)
        try:
            return cls(backend, settings, template)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str | None = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        **others: Any,
    ) -> Batch:
        """Ids and mask (1 on tokens, 0 on padding) of one text or several.

        padding: False, True or "longest", or "max_length". truncation=True keeps the first `max_length`
        tokens (default: model_max_length). Gives lists, L or (B, L); with return_tensors="pt" int64 (B, L),
        with "np" arrays. add_special_tokens=False: the text alone, without what is put around it. others: see
        `tokenizer_spellings`.
        """
        reading = Reading.of(padding, truncation, others)
        texts = check_texts([text] if isinstance(text, str) else text)
        limit = check_length(max_length, reading.padding, reading.truncation, self.model_max_length)
        rows = [self.encode(one, add_special_tokens) for one in texts]
        if reading.truncation:
            rows = [self.truncate(row, limit) if add_special_tokens else row[:limit] for row in rows]
        batch = reading.shown(pad_rows(rows, self.pad_token_id, reading.padding, limit))
        if isinstance(text, str) and return_tensors is None:
            return Batch({name: values[0] for name, values in batch.items()})
        return to_tensors(batch, return_tensors)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text, not cut or padded."""
        return self.backend.encode(check_texts([text])[0], add_special_tokens=add_special_tokens).ids

    def truncate(self, row: list[int], limit: int) -> list[int]:
        """The first `limit` of the ids that `encode` gave."""
        return row[:limit]

    def decode(
        self, ids: int | Sequence[int] | np.ndarray | Tensor, skip_special_tokens: bool = False
    ) -> str:
        """The text of one row of ids; bytes that are not valid UTF-8 become U+FFFD."""
        row = np.atleast_1d(np.asarray(ids)).astype(np.int64).tolist()
        return self.backend.decode(row, skip_special_tokens)

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or the list of several; None for what is not in the vocabulary."""
        if isinstance(tokens, str):
            return self.backend.token_to_id(tokens)
        return [self.backend.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of an id, or the list of several; None for what is not in the vocabulary."""
        if isinstance(ids, (int, np.integer)):
            return self.backend.id_to_token(int(ids))
        return [self.backend.id_to_token(int(token_id)) for token_id in ids]

    def __len__(self) -> int:
        """All tokens, the added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """The tokens without the added ones."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write tokenizer.json and its companions, which open equal here and in transformers. options:
        push_to_hub=False and its like."""
        check_saving(options)
        folder = Path(save_directory)
        save_tokenizer(folder, self.backend, {**self.settings, "tokenizer_class": type(self).__name__})
        if self.chat_template is not None:
            with replacing(folder / "chat_template.jinja") as temporary:
                temporary.write_text(self.chat_template, encoding="utf-8")


def check_texts(texts: Any) -> list[str]:
    """A list of str. Raises TypeError for anything else, ValueError for text that has no UTF-8 form."""
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        kinds = (
            sorted({type(text).__name__ for text in texts})
            if isinstance(texts, (list, tuple))
            else type(texts)
        )
        raise TypeError(f"text must be a str or a list of str, not {kinds}")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {text[:40]!r} is not valid Unicode: {error.reason}") from None
    return list(texts)


def check_length(max_length: int | None, padding: bool | str, truncation: bool, longest: int) -> int:
    """The length to cut and pad to. Raises ValueError for an unknown `padding` or a useless `max_length`."""
    if padding not in (False, True, "longest", "max_length"):
        raise ValueError(f"padding={padding!r}: must be False, True, 'longest' or 'max_length'")
    if max_length is None:
        return longest
    if max_length < 1:
        raise ValueError(f"max_length={max_length}: must be positive")
    if not truncation and padding != "max_length":
        raise ValueError(f"max_length={max_length} needs truncation=True or padding='max_length'")
    return max_length


def pad_rows(rows: Sequence[list[int]], pad_id: int, padding: bool | str, limit: int) -> Batch:
    """Rows of ids, made equally long on the right as `padding` says, and their masks."""
    length = 0
    if padding:
        length = limit if padding == "max_length" else max(map(len, rows), default=0)
    return Batch(
        input_ids=[row + [pad_id] * (length - len(row)) for row in rows],
        attention_mask=[[1] * len(row) + [0] * (length - len(row)) for row in rows],
    )
