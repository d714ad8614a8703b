"""What a small checkpoint was made for, and whether a picture and words are such as it knows.

Published checkpoints edit anything, in many steps, at the size of photographs. A small one says otherwise in
`made_for` of its model_index.json; every key may be missing:

  call      arguments of the pipeline's call that on the command line take the place of its defaults:
            {"num_inference_steps": 2, "guidance_scale": 1.0}
  basesize  96 to work on as many pixels as 96 x 96 have (a model with buckets or a sample_size has its sizes
            there, and needs no such word)
  world     {"about": what it knows, in words; "words": all words of its instructions or captions, in small
            letters; "psnr": what its autoencoder makes of pictures that it knows, in dB, at least}

A picture is judged by the model's own autoencoder: what that cannot hold, no edit can keep.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from joyedit.checkpoints.bounds import check_value
from joyedit.checkpoints.plain_text import shown, visible

if TYPE_CHECKING:
    from PIL.Image import Image

# What `call` may hold, and how.
CALL: dict[str, type | tuple[type, ...]] = {
    "num_inference_steps": int,
    "guidance_scale": (int, float),
    "inpaint_strength": (int, float),
    "mask_encode_strength": (int, float),
    "mask_thresholding_ratio": (int, float),
    "num_maps_per_mask": int,
    "negative_prompt": str,
    "invert_guidance_scale": (int, float),
    "composite": bool,
}


@dataclasses.dataclass(frozen=True)
class World:
    about: str
    words: Collection[str]
    psnr: float
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_dict(cls, raw: Any) -> Self:
        """Raises ValueError for what is not of the form above."""
        try:
            about = visible(raw["about"], None)
            words, psnr = tuple(map(str, raw["words"])), float(raw["psnr"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise ValueError(f"made_for: world is damaged: {shown(raw)}") from None
        return cls(about, words, psnr, _without(raw, ("about", "words", "psnr")))

    def to_dict(self) -> dict[str, Any]:
        return {**self.others, "about": self.about, "psnr": self.psnr, "words": list(self.words)}

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """The words of texts that it does not have, in small letters and in their order."""
        return list(
            dict.fromkeys(word for text in texts for word in words_of(text) if word not in self.words)
        )

    def taught(self, texts: Iterable[str]) -> Self:
        """The world of a model that was trained on these texts as well."""
        words = dict.fromkeys([*self.words, *(word for text in texts for word in words_of(text))])
        return dataclasses.replace(self, words=tuple(words))


@dataclasses.dataclass(frozen=True)
class MadeFor:
    """As in model_index.json; of released checkpoints empty. `others`, here and of the world, are entries of
    later versions, which are only kept."""

    call: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    basesize: int | None = None
    world: World | None = None
    others: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_index(cls, index: Mapping[str, Any], name: str) -> Self:
        """What the model_index.json of the checkpoint `name` says. Raises ValueError where that is not of the
        form above."""
        try:
            return cls.from_dict(index.get("made_for", {}))
        except ValueError as error:
            raise ValueError(f"{name}/model_index.json: {error}") from None

    @classmethod
    def from_dict(cls, raw: Any) -> Self:
        """Raises ValueError for what is not of the form above."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("call", {}), Mapping):
            raise ValueError(f"made_for is damaged: {shown(raw)}")
        call, basesize, world = raw.get("call", {}), raw.get("basesize"), raw.get("world")
        for name, value in call.items():
            if not _is(value, CALL.get(name, ())):
                raise ValueError(f"made_for: call has {visible(name)}={shown(value)}")
            check_value(name, value)
        if basesize is not None and (not _is(basesize, int) or basesize < 1):
            raise ValueError(f"made_for: basesize={shown(basesize)} is no number of pixels")
        check_value("basesize", basesize)
        read = None if world is None else World.from_dict(world)
        return cls(dict(call), basesize, read, _without(raw, ("call", "basesize", "world")))

    def taught(self, texts: Iterable[str]) -> Self:
        """Of a model that was trained on these texts as well."""
        return self if self.world is None else dataclasses.replace(self, world=self.world.taught(texts))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads: equal to what it read."""
        world = None if self.world is None else self.world.to_dict()
        found = {"basesize": self.basesize, "call": dict(self.call) or None, "world": world}
        return {**self.others, **{name: value for name, value in found.items() if value is not None}}


def _without(raw: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in names}


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def round_trip(pipe: Any, picture: "Image") -> float:
    """What the autoencoder of a pipeline makes of a picture: PSNR in dB of encoding and decoding, with the
    sides cut to multiples of 8."""
    import torch

    from joyedit.media.images import to_latent_input

    width, height = (side // 8 * 8 for side in picture.size)
    pixels = to_latent_input([picture.crop((0, 0, width, height))], device=pipe.device)  # (1, 3, 1, H, W)
    flat = "unet" in pipe.components  # Stable Diffusion's knows no time
    pixels = pixels[:, :, 0] if flat else pixels
    with torch.no_grad(), pipe.on_device(pipe.vae) as vae:
        seen = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.float()
    error = (seen.clamp(-1, 1) - pixels).square().mean().item() / 4  # of a range of 1
    return -10 * math.log10(max(error, 1e-10))
