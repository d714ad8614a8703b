"""Prompts and pictures to one input of Qwen3-VL.

Source: transformers `processing_qwen3_vl.py`.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from joyedit.checkpoints.bounds import as_value_errors
from joyedit.checkpoints.hub import Origin
from joyedit.checkpoints.json_files import read_json, write_json
from joyedit.checkpoints.missing import PROCESSORS, lacking
from joyedit.checkpoints.option_spellings import check_saving
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.plain_text import shown
from joyedit.media.images import Qwen2VLImageConfig, Qwen2VLImageProcessor
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer
from joyedit.text.tokenizer import Batch, check_texts
from joyedit.text.tokenizer_files import TOKENIZER_FILES

IMAGE_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class Qwen3VLProcessor:
    """A tokenizer and an image processor: prompts with placeholders, and pictures, to one network input."""

    library = "transformers"
    image_token = "<|image_pad|>"
    missing = PROCESSORS

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

    def __getattr__(self, name: str) -> Any:
        raise lacking(type(self), name)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the tokenizer's files and the image settings, which open equal here and in transformers.
        options: push_to_hub=False."""
        check_saving(options)
        folder = Path(save_directory)
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
    raw = nested["image_processor"] if path == newer else read_json(path)
    for named, value in ((f"{path}: image settings", raw), (f"{path.parent}: video settings", videos or {})):
        if not isinstance(value, Mapping):
            raise ValueError(f"{named}: {shown(value)} is not a JSON object")
    try:
        with as_value_errors("the image settings do not fit one another"):
            return Qwen2VLImageConfig.from_dict(raw), videos
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
