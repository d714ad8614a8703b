"""What is different from system to system: what a pair becomes, what the network is trained to do, and how an
edit is made of it. Here is what they have in common; each is a file, `joyimage`, `chronoedit`,
`stable_diffusion`, and a row of `plan.SYSTEMS`.

    see      a pair's pictures -> what is kept of them         first pass, with encoders, without denoiser
    read     prompts -> embeddings
    draw     what is kept -> a sample: latents, noise, level   second pass, with the denoiser alone
    loss     samples of one form -> (B,)
    edit     a picture, as the pipeline makes it

Latents are kept as mean and deviation of the posterior, and drawn in every step.

C latent channels   T latent frames   h, w latent height and width   L prompt tokens   D text width
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from joyedit.estimates.parts import Part
from joyedit.noise import draw_noise
from joyedit.pipelines.made_for import MadeFor
from joyedit.training import losses
from joyedit.training.cache import Hashes
from joyedit.training.data import Size
from joyedit.training.examples import Example
from joyedit.training.pairs import Fault, Pair

Kept = Mapping[str, Tensor]  # what `see` made of the pictures of a pair, by name


class Said(NamedTuple):
    """Embeddings (L, D) of a prompt, and of the one that says nothing."""

    words: Tensor
    blank: Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one step sees of a pair, without a batch axis. sigma: noise level. given: the rest, by name."""

    latents: Tensor
    noise: Tensor
    sigma: Tensor
    given: Mapping[str, Tensor]

    def to(self, device: torch.device) -> "Sample":
        parts = (self.latents.to(device), self.noise.to(device), self.sigma.to(device))
        return Sample(*parts, {name: tensor.to(device) for name, tensor in self.given.items()})


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How samples are drawn. sigma: how levels are, see `losses.draw_sigma`; shift: of the checkpoint's own
    sampler, whose steps lie there. scheduler, min_snr: of Stable Diffusion."""

    sigma: str = "shifted"
    shift: float = 1.0
    scheduler: Any = None
    min_snr: float | None = None

    @classmethod
    def by(cls, scheduler: Any, sigma: str, min_snr: float | None) -> "Drawing":
        """As the sampler of a checkpoint wants it."""
        config = scheduler.config
        shift = next((float(config[name]) for name in ("shift", "flow_shift") if name in config), 1.0)
        return cls(sigma, shift, scheduler, min_snr)


class System(Protocol):
    """What each system has.

    denoiser: which network of the pipeline is trained; encoders: which the second pass does without; blank:
    the prompt that says nothing.
    """

    denoiser: str
    encoders: tuple[str, ...]
    blank: str

    def tables(
        self, bases: Sequence[int], own: Sequence[Size] | None, config: Any, made_for: MadeFor
    ) -> Sequence[Sequence[Size]]:
        """The buckets of each base size, or of none that was said. own: those that the checkpoint has;
        config: the denoiser's."""
        ...

    def accept(self, pair: Pair) -> Pair | Fault:
        """The pair as it is trained on, or why it is not."""
        ...

    def names(self, pair: Pair, bucket: Size, hashes: Hashes) -> tuple[str, str, str]:
        """Under which names what `see` makes of it, its prompt, and the blank one are kept."""
        ...

    def see(self, pipe: Any, example: Example, target: Image, controls: list[Image]) -> dict[str, Tensor]:
        """What is kept of pictures, without a batch axis, with `target_mean` and `target_std` among it."""
        ...

    def read(self, pipe: Any, prompts: list[str], controls: list[Image]) -> list[Tensor]:
        """(L, D) each."""
        ...

    def stand_in(self, parts: Mapping[str, Part], example: Example) -> tuple[Kept, Tensor]:
        """Tensors of the sizes that the cache will hold of an example, and its prompt, of which only the
        length of two sentences is known: for estimates."""
        ...

    def draw(
        self,
        kept: Kept,
        prompt: Tensor,
        how: Drawing,
        generator: torch.Generator,
        sigma: float | None = None,
    ) -> Sample:
        """sigma: that level, and the mean of the target's posterior, as validation wants it."""
        ...

    def loss(self, network: Any, samples: Sequence[Sample], how: Drawing) -> Tensor:
        """(B,) of samples of one form."""
        ...

    def edit(
        self, pipe: Any, example: Example, kept: Kept, controls: list[Image], said: Said, seed: int
    ) -> Image:
        """A picture of the bucket's size; the pipeline has no text encoders."""
        ...


def flow_level(how: Drawing, generator: torch.Generator, sigma: float | None) -> Tensor:
    """The noise level of a flow."""
    if sigma is not None:
        return torch.tensor(sigma)
    return losses.draw_sigma(1, how.sigma, how.shift, generator)[0]


def drawn(kept: Kept, name: str, generator: torch.Generator, sampled: bool = True) -> Tensor:
    """Latents of that name: drawn of the posterior, or its mean where that is asked for or all there is."""
    mean = kept[f"{name}_mean"].float()
    if f"{name}_std" not in kept:
        return mean
    noise = draw_noise(mean.shape, generator)  # drawn in any case, so that what comes after it is the same
    return mean + kept[f"{name}_std"].float() * noise if sampled else mean


def with_weight(given: dict[str, Tensor], kept: Kept) -> dict[str, Tensor]:
    return {**given, "weight": kept["weight"]} if "weight" in kept else given


def weight_of(mask: Image, shape: Sequence[int]) -> Tensor:
    """What cells of latents (C, ..., h, w) count: how white the mask is there, (1, ..., h, w)."""
    levels = torch.from_numpy(np.array(mask, dtype=np.float32) / 255)
    cells = F.interpolate(levels[None, None], tuple(shape[-2:]), mode="area")[0]
    return cells.reshape(*[1] * (len(shape) - 2), *shape[-2:])


def stacked(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Latents, noise, levels and the rest of samples of one form, with a batch axis."""
    parts = [(one.latents, one.noise, one.sigma) for one in samples]
    latents, noise, sigma = (torch.stack(each) for each in zip(*parts, strict=True))
    given = {name: torch.stack([one.given[name] for one in samples]) for name in samples[0].given}
    return latents, noise, sigma, given


def embeds_of(said: Said, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """As calls take them, (1, L, D)."""
    pairs = (("prompt_embeds", said.words), ("negative_prompt_embeds", said.blank))
    return {name: embeds.to(device, dtype)[None] for name, embeds in pairs}
