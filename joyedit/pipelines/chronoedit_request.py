"""What ChronoEdit is asked to do: the arguments of a call, once they are found to fit together.

B prompts, or photographs if there are more of them   L prompt tokens   M tokens of the photograph   D width
"""

import contextlib
import logging
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from joyedit.media import images as im
from joyedit.models.chronoedit_dit import ChronoEditConfig
from joyedit.noise import Generators
from joyedit.pipelines.checks import Text, as_list, check_side, check_tensor
from joyedit.pipelines.chronoedit_presets import preset_called
from joyedit.pipelines.made_for import MadeFor
from joyedit.pipelines.places import Places

log = logging.getLogger("joyedit")

EXAMPLES_AREA = 720 * 1280
SHORT = 15  # words of a prompt; it was trained on 80 to 100
# Where no spaces stand between words (Japanese, Chinese), each letter counts as one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


class Photographs(NamedTuple):
    """The photographs of a call, each once, and which of them every prompt has."""

    distinct: list[Image.Image] | Tensor  # a float tensor as it came (P, 3, H, W), where quirks ask for that
    order: list[int]  # B entries, or one for all prompts

    @classmethod
    def of(cls, photos: list[Image.Image], raw: Tensor | None) -> "Photographs":
        """photos: equal objects are one photograph. raw: the tensor that takes their place."""
        distinct = list({id(photo): photo for photo in photos}.values())
        order = [next(i for i, one in enumerate(distinct) if one is photo) for photo in photos]
        return cls(distinct if raw is None else raw, order)


class Request(NamedTuple):
    """A call that was checked: B films, each `copies` times."""

    text: Text  # B of everything that the call gave; of negative prompts always words, if only ""
    photos: Photographs | None
    image_embeds: Tensor | None  # (1 or B, M, D)
    batch: int  # B
    copies: int  # films of each prompt, in a row
    height: int
    width: int
    frames: int  # that are denoised
    generator: Generators
    places: Places


def check_embedded(text: Text, image_embeds: Tensor | None, config: ChronoEditConfig) -> None:
    """Raises ValueError or TypeError for embeddings that the transformer does not read."""
    for name, embeds, width in (
        ("prompt_embeds", text.embeds, config.text_dim),
        ("negative_prompt_embeds", text.negative_embeds, config.text_dim),
        ("image_embeds", image_embeds, config.image_dim),
    ):
        if embeds is not None:
            check_tensor(name, embeds, ("B", "tokens", width))


def check_size(height: Any, width: Any, multiple: int, most: int) -> None:
    """Raises ValueError for sides that are no multiples of `multiple`, or more than `most` times as long."""
    for name, size in (("height", height), ("width", width)):
        if check_side(name, size, multiple) > most * multiple:
            raise ValueError(f"{name}={size}: must be at most {most * multiple}")


def working_area(made_for: MadeFor, preset: str | None) -> int:
    """How many pixels a run is worked at where no height and width say it: the checkpoint's, else the
    preset's, else those of ChronoEdit's examples."""
    own = None if preset is None else preset_called(preset).area
    return made_for.basesize**2 if made_for.basesize else own or EXAMPLES_AREA


def batch_of(text: Text, photos: Sequence[Image.Image], image_embeds: Tensor | None) -> int:
    """How many films, copies aside: as many as there are of one, where each is one for all or one each.
    Raises ValueError for other numbers."""
    prompts = "prompt" if text.embeds is None else "prompt_embeds"
    seen = 0 if image_embeds is None else len(image_embeds)
    counts = {prompts: text.batch, "image": len(photos), "image_embeds": seen}
    counts = {name: count for name, count in counts.items() if count}
    batch = max(counts.values())
    if any(count not in (1, batch) for count in counts.values()):
        told = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"{told}: give one for all, or one for each")
    return batch


def text_of_each(text: Text, batch: int) -> Text:
    """B of everything. There are B prompts, or one for all photographs; and negative ones, unless it is a
    text alone, one for each of these. Raises ValueError for other numbers."""

    def each(texts: str | list[str] | None, name: str) -> list[str]:
        if isinstance(texts, list) and len(texts) == text.batch == 1:
            texts = texts[0]
        return as_list(texts, batch, name)

    if text.negative_embeds is not None and len(text.negative_embeds) != batch:
        text.check_negatives(text.batch)
    prompt = None if text.prompt is None else each(text.prompt, "prompt")
    rows = (None if x is None else x.expand(batch, -1, -1) for x in (text.embeds, text.negative_embeds))
    return Text(prompt, each(text.negative, "negative_prompt"), *rows)


def warn_if_stretched(photos: Sequence[Image.Image], height: int, width: int, multiple: int) -> None:
    """Log a warning that names a size which the first photograph that would be badly out of shape fits."""
    for photo in photos:
        own = (photo.height, photo.width)
        if (now := im.stretch(own, (height, width))) <= im.STRETCH:
            continue
        with contextlib.suppress(ValueError):  # too narrow for any size of that area
            size = im.size_of_area(*own, height * width, multiple)
            if im.stretch(own, size) < now:
                change = f"{photo.width} x {photo.height} pixels is stretched to {width} x {height}"
                log.warning("a photograph of %s; width=%d, height=%d would fit it", change, size[1], size[0])
                return


def warn_if_short(prompt: str | Sequence[str]) -> bool:
    """Log a warning for a prompt, or the shortest of several, that says much less than those of the training;
    whether there is one."""
    count = min(len(WORD.findall(text)) for text in ([prompt] if isinstance(prompt, str) else prompt))
    if count < SHORT:
        trained = "prompts of 80 to 100 words that begin 'The user wants to'"
        makes = "--rewrite, in Python joyedit.rewriting.rewrite, makes such a one of it"
        log.warning("ChronoEdit was trained on %s, and this one has %d: %s", trained, count, makes)
    return count < SHORT
