"""Text to token ids, on the `tokenizers` library.

A tokenizer is a backend (`tokenizers.Tokenizer`: normaliser, split, BPE) and the settings of its folder
(padding token, longest input, chat template). Encoding leaves the backend as it is: truncation and padding
happen on the lists of ids, so that one tokenizer can serve several threads.

B texts   L tokens

Padding is always on the right, whatever the folder says: the pipelines drop a prefix of fixed length.

Source: transformers `tokenization_qwen2.py`, `processing_qwen3_vl.py`, `tokenization_clip.py`,
`tokenization_t5_fast.py`.
"""

import html
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from joyedit.hub import Origin
from joyedit.images import Qwen2VLImageConfig, Qwen2VLImageProcessor
from joyedit.weights import LoadOptions, read_json, replacing, write_json

log = logging.getLogger("joyedit")

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
IMAGE_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class Batch(dict):
    """What tokenizers and processors return: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {sorted(self)}") from None

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move the tensors to `device`; those of floating point also to `dtype`. In place, returns itself."""
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(device, dtype if value.is_floating_point() else None)
        return self


class TextTokenizer:
    """What the tokenizers have in common. Each says what it reads a vocabulary as, and what it puts around a
    text."""

    library = "transformers"  # under which model_index.json lists it
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
                raise ValueError(f"{name}={self.settings[name]!r} is not supported, only {value!r}")
        self.pad_token: str = self.settings["pad_token"]
        self.eos_token: str = self.settings["eos_token"]
        self.eos_token_id = backend.token_to_id(self.eos_token)
        self.pad_token_id = self._known("pad_token")
        if self.settings["model_max_length"] > 10**9:  # transformers writes 10^30 where it knows of no limit
            self.settings["model_max_length"] = self.defaults["model_max_length"]
        self.model_max_length = int(self.settings["model_max_length"])

    def _known(self, name: str) -> int:
        """The id of a token that the settings name."""
        token_id = self.backend.token_to_id(self.settings[name])
        if token_id is None:
            raise ValueError(f"{name} {self.settings[name]!r} is not in the vocabulary of {len(self)} tokens")
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
        path = folder / "chat_template.jinja"
        template = path.read_text(encoding="utf-8") if path.is_file() else None
        try:
            return cls(backend, settings, template)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Batch:
        """Ids and mask (1 on tokens, 0 on padding) of one text or several.

        padding: False, True or "longest", or "max_length". truncation=True keeps the first `max_length`
        tokens (default: model_max_length). Gives lists, L or (B, L); with return_tensors="pt" int64 (B, L).
        """
        texts = check_texts([text] if isinstance(text, str) else text)
        limit = check_length(max_length, padding, truncation, self.model_max_length)
        rows = [self.encode(one) for one in texts]
        if truncation:
            rows = [self.truncate(row, limit) for row in rows]
        batch = pad_rows(rows, self.pad_token_id, padding, limit)
        if isinstance(text, str) and return_tensors is None:
            return Batch({name: values[0] for name, values in batch.items()})
        return to_tensors(batch, return_tensors)

    def encode(self, text: str) -> list[int]:
        """The ids of one text, not cut or padded."""
        return self.backend.encode(check_texts([text])[0]).ids

    def truncate(self, row: list[int], limit: int) -> list[int]:
        """The first `limit` of the ids that `encode` gave."""
        return row[:limit]

    def decode(self, ids: int | Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str:
        """The text of one row of ids; bytes that are not valid UTF-8 become U+FFFD."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        return self.backend.decode([ids] if isinstance(ids, int) else list(ids), skip_special_tokens)

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False) -> list[str]:
        return [self.decode(row, skip_special_tokens) for row in rows]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of a token, or the list of several; None for what is not in the vocabulary."""
        if isinstance(tokens, str):
            return self.backend.token_to_id(tokens)
        return [self.backend.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """The token of an id, or the list of several; None for what is not in the vocabulary."""
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(token_id) for token_id in ids]

    def __len__(self) -> int:
        """All tokens, the added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """The tokens without the added ones."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and its companions, which open equal here and in transformers."""
        save_tokenizer(Path(folder), self.backend, {**self.settings, "tokenizer_class": type(self).__name__})
        if self.chat_template is not None:
            with replacing(Path(folder) / "chat_template.jinja") as temporary:
                temporary.write_text(self.chat_template, encoding="utf-8")


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

    def add_tokens(self, tokens: Sequence[str]) -> list[int]:
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
        """Take back what `add_tokens` appended; returns the ids that the tokens had. Later tokens move up, as
        the rows of an embedding do when these rows are deleted.

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


def read_bpe(vocab: Path, merges: Path, **options: Any) -> models.BPE:
    try:
        return models.BPE.from_file(str(vocab), str(merges), **options)
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise ValueError(f"{vocab} and {merges.name} are not a BPE vocabulary: {error}") from None


class Qwen3VLProcessor:
    """A tokenizer and an image processor: prompts with placeholders, and pictures, to one network input."""

    library = "transformers"
    image_token = "<|image_pad|>"

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessor,
        tokenizer: Qwen2Tokenizer,
        video_settings: Mapping[str, Any] | None = None,
    ):
        """`video_settings` are only kept for saving. Raises ValueError when the image token is unknown."""
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.video_settings = video_settings
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None:
            raise ValueError(f"the tokenizer has no {self.image_token!r}")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        tokenizer: Qwen2Tokenizer | None = None,
        **options: Any,
    ) -> Self:
        """Open a folder or Hub repository with preprocessor_config.json, or the newer processor_config.json,
        and the tokenizer's files, which are not read when a `tokenizer` is given.

        Options and errors as in `Qwen2Tokenizer.from_pretrained`.
        """
        origin = Origin(str(name_or_path), **LoadOptions.parse(options, also=("tokenizer",)).origin)
        files = IMAGE_FILES if tokenizer is not None else (*IMAGE_FILES, *TOKENIZER_FILES)
        folder = origin.fetch_files(subfolder or "", files)
        return cls.from_folder(folder, tokenizer)

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Qwen2Tokenizer | None = None) -> Self:
        images, videos = _read_processor(folder)
        return cls(Qwen2VLImageProcessor(images), tokenizer or Qwen2Tokenizer.from_folder(folder), videos)

    def __call__(
        self,
        *,
        text: str | Sequence[str],
        images: Any = None,
        padding: bool | str = False,
        return_tensors: str | None = "pt",
    ) -> Batch:
        """Each <|image_pad|> of the texts stands for the next of `images` (a flat list over all texts, as in
        `images.to_pil_list`) and becomes as many tokens as the vision tower gives for it.

        Returns input_ids and attention_mask (B, L), and with images pixel_values (patches, 1536) float32 and
        image_grid_thw (images, 3). Raises ValueError when placeholders and images differ in number.
        """
        texts = check_texts([text] if isinstance(text, str) else text)
        found = sum(one.count(self.image_token) for one in texts)
        pictures = {} if images is None else self.image_processor(images)
        given = len(pictures["image_grid_thw"]) if pictures else 0
        if found != given:
            raise ValueError(
                f"text holds {found} {self.image_token} placeholders (prompts included), images {given}"
            )
        if pictures:
            merged = self.image_processor.config.merge_size**2
            counts = iter((pictures["image_grid_thw"].prod(dim=1) // merged).tolist())
            texts = [re.sub(re.escape(self.image_token), lambda m: m[0] * next(counts), one) for one in texts]
        return Batch(**self.tokenizer(texts, padding=padding, return_tensors=return_tensors), **pictures)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer's files and the image settings, which open equal here and in transformers."""
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        named = {"processor_class": type(self).__name__}
        write_json(folder / "preprocessor_config.json", {**self.image_processor.config.to_dict(), **named})
        videos = self.video_settings or {"video_processor_type": "Qwen3VLVideoProcessor"}
        write_json(folder / "video_preprocessor_config.json", {**videos, **named})


def _read_processor(folder: Path) -> tuple[Qwen2VLImageConfig, Mapping[str, Any] | None]:
    """Image settings and raw video settings; those in processor_config.json win, as in transformers."""
    newer, older, video = (folder / name for name in IMAGE_FILES)
    nested = read_json(newer) if newer.is_file() else {}
    videos = nested.get("video_processor") or (read_json(video) if video.is_file() else None)
    path = newer if "image_processor" in nested else older
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds neither preprocessor_config.json nor a full processor_config.json"
        )
    try:
        return Qwen2VLImageConfig.from_dict(
            nested["image_processor"] if path == newer else read_json(path)
        ), videos
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


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


def to_tensors(batch: Batch, return_tensors: str | None) -> Batch:
    if return_tensors is None:
        return batch
    if return_tensors != "pt":
        raise ValueError(f"return_tensors={return_tensors!r}: must be 'pt' or None")
    lengths = {len(row) for row in batch.input_ids}
    if len(lengths) > 1:
        raise ValueError(f"texts of {sorted(lengths)} tokens make no tensor: pass padding=True")
    return Batch({name: torch.tensor(rows, dtype=torch.int64) for name, rows in batch.items()})


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json. special_tokens_map.json overrides it in folders so old that the former does not
    describe the added tokens."""
    config, special = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = read_json(config) if config.is_file() else {}
    if "added_tokens_decoder" not in settings and special.is_file():
        settings.update(read_json(special))
    return settings


def declared_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The added tokens that the folder names beside its tokenizer.json, by id."""
    if "added_tokens_decoder" in settings:
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        return {
            int(token_id): AddedToken(token["content"], **{flag: token.get(flag, False) for flag in flags})
            for token_id, token in settings["added_tokens_decoder"].items()
        }
    path = folder / "added_tokens.json"
    if not path.is_file():
        return {}
    listed = (settings.get(key) or () for key in ("additional_special_tokens", "extra_special_tokens"))
    special = {token_text(v) for k, v in settings.items() if k.endswith("_token") and v}
    special |= {token_text(token) for tokens in listed for token in tokens}
    return {
        token_id: AddedToken(text, special=text in special, normalized=text not in special)
        for text, token_id in read_json(path).items()
    }


def plain_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with special tokens as text, without their flags."""
    return {
        k: token_text(v) if k.endswith("_token") and isinstance(v, Mapping) else v
        for k, v in settings.items()
    }


def special_tokens(settings: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The tokens that the settings name, by text. Of one that has several roles the last says whether it is
    looked for in the text as typed or in the lower-case one (`normalized`), as in transformers."""
    flags = ("lstrip", "rstrip", "normalized", "single_word")
    found = {}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings[role]
        given = token if isinstance(token, Mapping) else {}
        text = token_text(token)
        found[text] = AddedToken(text, special=True, **{flag: given.get(flag, False) for flag in flags})
    return found


def token_text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def open_backend(path: Path) -> Tokenizer:
    """A tokenizer.json, without the truncation and padding that it may hold."""
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for every kind of damage
        raise ValueError(f"{path} is not a readable tokenizer.json: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def add_tokens(backend: Tokenizer, tokens: Mapping[int, AddedToken], folder: Path) -> None:
    """Register the tokens that the backend does not match as a whole yet. Raises ValueError when one would
    get another id than the folder gives it."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for _, token in sorted(tokens.items()) if token.content not in known])
    for token_id, token in tokens.items():
        if backend.token_to_id(token.content) != token_id:
            found = backend.token_to_id(token.content)
            raise ValueError(
                f"{folder}: added token {token.content!r} has id {token_id}, but comes out as {found}"
            )


def save_tokenizer(folder: Path, backend: Tokenizer, settings: Mapping[str, Any]) -> None:
    """tokenizer.json, and tokenizer_config.json with all added tokens, so that older files have no say."""
    added = {
        str(token_id): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for token_id, token in backend.get_added_tokens_decoder().items()
    }
    with replacing(folder / "tokenizer.json") as temporary:
        backend.save(str(temporary))
    write_json(folder / "tokenizer_config.json", {**settings, "added_tokens_decoder": added})
