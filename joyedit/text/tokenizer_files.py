"""The files of a tokenizer: settings, added tokens, vocabulary. Each is read here and nowhere else.

What is returned has the types that its users rely on; whatever else a file holds is a ValueError that names
file and key.

Source: transformers `tokenization_utils_base.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.plain_text import shown, visible
from joyedit.checkpoints.replacing import replacing
from joyedit.checkpoints.small_files import read_text

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
LARGEST_VOCABULARY = 64 * 2**20  # bytes; UMT5's has 17 million
LARGEST_TEMPLATE = 2**20
LONGEST_INPUT = 10**7  # tokens: what "max_length" pads to
MOST_IDS = 2**24
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


def read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json. special_tokens_map.json overrides it in folders so old that the former does not
    describe the added tokens. Raises ValueError naming file and key for values of other types."""
    config, special = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    settings = read_json(config) if config.is_file() else {}
    _check_settings(config, settings)
    if "added_tokens_decoder" not in settings and special.is_file():
        overriding = read_json(special)
        _check_settings(special, overriding)
        settings.update(overriding)
    return settings


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if key.endswith("_token") and not isinstance(value, (bool, type(None))):
            _text_of(path, key, value)
        elif key in ("additional_special_tokens", "extra_special_tokens") and value is not None:
            if isinstance(value, Mapping):  # extra_special_tokens: name -> token
                value = list(value.values())
            if not isinstance(value, list):
                raise ValueError(f"{path}: {key}={shown(value)} must be a list of tokens")
            for token in value:
                _text_of(path, key, token)
        elif key == "model_max_length" and value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 1:
                raise ValueError(f"{path}: {key}={shown(value)} must be a number of at least 1")


def _text_of(path: Path, key: str, token: Any) -> str:
    """A token's text, of a text or a mapping with "content"."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise ValueError(f"{path}: {key}={shown(token)} must be a token: a text, or content with flags")
    if isinstance(token, Mapping):
        for flag in FLAGS:
            if not isinstance(token.get(flag, False), bool):
                raise ValueError(f"{path}: {flag} of {key} is {shown(token[flag])}, must be true or false")
    return text


def longest_input(settings: Mapping[str, Any], default: int) -> int:
    """model_max_length; the default where it says that there is no limit, as transformers does by 10^30.
    Raises ValueError for what no model reads."""
    length = settings["model_max_length"]
    if length > 10**9:
        return default
    if not 1 <= length <= LONGEST_INPUT:
        raise ValueError(f"model_max_length={shown(length)}: must be from 1 to {LONGEST_INPUT:,}")
    return int(length)


def declared_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The added tokens that the folder names beside its tokenizer.json, by id."""
    if "added_tokens_decoder" in settings:
        path, table = folder / "tokenizer_config.json", settings["added_tokens_decoder"]
        if not isinstance(table, Mapping) or not all(isinstance(token, Mapping) for token in table.values()):
            raise ValueError(f"{path}: added_tokens_decoder must be tokens by their ids")
        return {
            _id_of(path, key): AddedToken(
                _text_of(path, f"added_tokens_decoder[{shown(key)}]", token),
                **{flag: token.get(flag, False) for flag in FLAGS},
            )
            for key, token in table.items()
        }
    path = folder / "added_tokens.json"
    if not path.is_file():
        return {}
    listed = [settings.get(key) or () for key in ("additional_special_tokens", "extra_special_tokens")]
    several = [one.values() if isinstance(one, Mapping) else one for one in listed]
    special = {token_text(v) for k, v in settings.items() if k.endswith("_token") and v}
    special |= {token_text(token) for tokens in several for token in tokens}
    return {
        _id_of(path, token_id): AddedToken(text, special=text in special, normalized=text not in special)
        for text, token_id in read_json(path).items()
    }


def _id_of(path: Path, written: Any) -> int:
    digits = isinstance(written, str) and written.isascii() and written.isdigit() and len(written) < 10
    number = int(written) if digits else written
    if type(number) is not int or not 0 <= number < MOST_IDS:
        raise ValueError(f"{path}: {shown(written)} is no token's id: must be from 0 to {MOST_IDS - 1:,}")
    return number


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


def token_text(token: Any) -> str:
    """Raises ValueError for what is no token."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        raise ValueError(f"{shown(token)} is no token: it must be a text, or content with flags")
    return text


def open_backend(path: Path) -> Tokenizer:
    """A tokenizer.json, without the truncation and padding that it may hold."""
    _refuse_large(path)
    backend = _built(lambda: Tokenizer.from_file(str(path)), f"{path} is not a readable tokenizer.json")
    backend.no_truncation()
    backend.no_padding()
    return backend


def read_bpe(vocab: Path, merges: Path, **options: Any) -> models.BPE:
    for path in (vocab, merges):
        _refuse_large(path)
    failed = f"{vocab} and {merges.name} are not a BPE vocabulary"
    return _built(lambda: models.BPE.from_file(str(vocab), str(merges), **options), failed)


def _refuse_large(path: Path) -> None:
    if not path.is_file() or path.stat().st_size > LARGEST_VOCABULARY:
        raise ValueError(f"{path} is no file of at most {LARGEST_VOCABULARY:,} bytes, as vocabularies are")


def _built(build: Any, failed: str) -> Any:
    """What `build` returns. Raises ValueError when it fails."""
    try:
        return build()
    except Exception as error:  # the library raises plain Exception for every kind of damage
        reason = error
    except BaseException as error:  # and Rust's own failures as what is no Exception
        if type(error).__name__ != "PanicException":
            raise
        reason = error
    raise ValueError(f"{failed}: {visible(reason)}")


def read_template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    return read_text(path, LARGEST_TEMPLATE) if path.is_file() else None


def add_tokens(backend: Tokenizer, tokens: Mapping[int, AddedToken], folder: Path) -> None:
    """Register the tokens that the backend does not match as a whole yet. Raises ValueError when one would
    get another id than the folder gives it."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens([token for _, token in sorted(tokens.items()) if token.content not in known])
    for token_id, token in tokens.items():
        if backend.token_to_id(token.content) != token_id:
            found = backend.token_to_id(token.content)
            raise ValueError(
                f"{folder}: added token {shown(token.content)} has id {token_id}, but comes out as {found}"
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
