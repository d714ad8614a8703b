"""What JoyAI-Image is asked to do: the arguments of a call, once they are found to fit together.

B prompts   L text tokens   D width
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from joyedit.media.images import to_pil_list
from joyedit.noise import Generators
from joyedit.pipelines.checks import Text, check_finite, check_side
from joyedit.pipelines.joyimage_prompts import IMAGE_MARK, Prompt
from joyedit.pipelines.places import Places

MOST_REFERENCES = 6  # of one sample of Edit-Plus


class Request(NamedTuple):
    """A call that was checked. Of texts and embedded there is one entry for the positive prompts and, under
    guidance, one for the negative ones."""

    texts: list[list[str]]  # B each
    embedded: list[Prompt | None]  # what came embedded, and is not to be read
    pictures: list[Image.Image] | None  # one per prompt, equal ones being one object, brought to `size`
    size: tuple[int, int]  # height and width of the bucket
    copies: int  # images of each prompt, in a row
    generator: Generators
    places: Places

    @property
    def batch(self) -> int:
        """How many images there will be."""
        return len(self.texts[0]) * self.copies

    @property
    def unread(self) -> list[list[str]]:
        """The texts that did not come embedded."""
        return [texts for texts, known in zip(self.texts, self.embedded, strict=True) if known is None]


def check_embedded(text: Text, masks: Sequence[Tensor | None], width: int) -> None:
    """Raises ValueError or TypeError unless embedded prompts are (B, L, width) and have a mask (B, L) that
    leaves each a token. masks: of positive and negative prompts."""
    for name, embeds, mask in (
        ("prompt_embeds", text.embeds, masks[0]),
        ("negative_prompt_embeds", text.negative_embeds, masks[1]),
    ):
        if embeds is None:
            continue
        if mask is None:
            raise ValueError(f"{name} needs {name}_mask")
        if not isinstance(embeds, Tensor) or not isinstance(mask, Tensor):
            raise TypeError(f"{name} and {name}_mask must be tensors")
        check_finite(name, embeds)
        if embeds.ndim != 3 or embeds.shape[-1] != width or mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"{name} must be (B, L, {width}) and {name}_mask (B, L), "
                f"not {tuple(embeds.shape)} and {tuple(mask.shape)}"
            )
        if not mask.bool().any(1).all():
            raise ValueError(f"{name}_mask leaves a prompt without a token")


def check_sides(height: Any, width: Any, multiple: int) -> None:
    """Raises ValueError unless both are None, or both are positive multiples of `multiple`."""
    if (height is None) != (width is None):
        raise ValueError(f"height={height}, width={width}: give both or neither")
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_side(name, side, multiple)


def check_placeholders(texts: Sequence[Sequence[str]], pictures: Sequence[Any] | None) -> None:
    """Raises ValueError for a prompt that names a picture: it would take the place of the one it comes
    with."""
    refused = ["<|image_pad|>"] + [IMAGE_MARK] * (pictures is not None)
    for text in chain.from_iterable(texts):
        if found := [word for word in refused if word in text]:
            raise ValueError(
                f"a prompt holds {found[0]!r}, which stands for a picture; give that beside the prompt"
            )


def one_per_prompt(photos: list[Image.Image] | None, batch: int) -> list[Image.Image] | None:
    """As many photographs as there are prompts: a shorter list is repeated when that comes out even. Raises
    ValueError otherwise."""
    if photos is None:
        return None
    if not photos or batch % len(photos):
        raise ValueError(f"{len(photos)} images for {batch} prompts: give one image, or one per prompt")
    return photos * (batch // len(photos))


def references_of_each(images: Any, batch: int) -> list[list[Image.Image]] | None:
    """The references of each of `batch` prompts: a flat list is that of all of them.

    Raises ValueError or TypeError for other numbers than one list for all prompts or one for each, and 1 to
    MOST_REFERENCES pictures in a list.
    """
    if images is None:
        return None
    nested = isinstance(images, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in images)
    samples = list(images) if nested else [images]
    if len(samples) not in (1, batch):
        raise ValueError(f"images holds references for {len(samples)} prompts, and there are {batch}")
    opened: dict[int, list[Image.Image]] = {}
    for number, sample in enumerate(samples):
        name = f"images[{number}]" if nested else "images"
        if id(sample) not in opened:
            opened[id(sample)] = to_pil_list(sample, name, alpha=True)
        if (count := len(opened[id(sample)])) > MOST_REFERENCES:
            raise ValueError(f"{name} holds {count} references: 1 to {MOST_REFERENCES} are possible")
    return [opened[id(sample)] for sample in samples] * (batch // len(samples))


def each_once(
    photos: list[Image.Image] | None, change: Callable[[Image.Image], Image.Image]
) -> list[Image.Image] | None:
    """The changed photos; one that is in the list several times is changed once and stays one object."""
    if photos is None:
        return None
    done = {key: change(photo) for key, photo in {id(photo): photo for photo in photos}.items()}
    return [done[id(photo)] for photo in photos]
