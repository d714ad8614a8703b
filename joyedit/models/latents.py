"""What the autoencoders share: the posterior of latents, the forms of their results, and the seams of tiles.

B batch   C channels   h, w height and width of latents; T frames where there are any
"""

from typing import NamedTuple

import torch
from torch import Tensor

from joyedit.noise import Generators, draw_noise


class DiagonalGaussian:
    """The posterior of latents: independent normals.

    parameters (B, 2 C, ...): mean, then logvar, which is clamped to [-30, 20]. `mean`, `logvar` and `std` are
    (B, C, ...).
    """

    def __init__(self, parameters: Tensor):
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30, 20)
        self.std = (0.5 * self.logvar).exp()

    def sample(self, generator: Generators = None) -> Tensor:
        """One draw (B, C, ...), from one generator for the batch or a list of one for each sample.

        A CPU generator draws on the CPU and the noise is moved: a seed gives the same sample everywhere.
        Raises ValueError for a list of another length.
        """
        mean = self.mean
        return mean + self.std * draw_noise(mean.shape, generator, mean.device, mean.dtype)

    def mode(self) -> Tensor:
        return self.mean


class AutoencoderKLOutput(NamedTuple):
    latent_dist: DiagonalGaussian


class DecoderOutput(NamedTuple):
    sample: Tensor


def join_tiles(rows: list[list[Tensor]], overlap: tuple[int, int], keep: tuple[int, int]) -> Tensor:
    """One picture of overlapping tiles (..., h, w), row by row; overlap and keep: height, width.

    Each tile is blended with the one above, then with the one at its left, as those are after their own
    blending, and gives its first `keep` rows and columns. Writes to the tiles.
    """
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            if i > 0:
                blend(rows[i - 1][j], tile, overlap[0], dim=-2)
            if j > 0:
                blend(row[j - 1], tile, overlap[1], dim=-1)
    strips = [torch.cat([tile[..., : keep[0], : keep[1]] for tile in row], dim=-1) for row in rows]
    return torch.cat(strips, dim=-2)


def blend(before: Tensor, tile: Tensor, overlap: int, dim: int) -> None:
    """Fade linearly from the end of `before` to the start of `tile`, in place, along `dim` (-1 or -2)."""
    overlap = min(before.shape[dim], tile.shape[dim], overlap)
    start = tile.narrow(dim, 0, overlap)
    end = before.narrow(dim, before.shape[dim] - overlap, overlap)
    weight = torch.arange(overlap, device=tile.device, dtype=tile.dtype) / max(overlap, 1)
    start.copy_(torch.lerp(end, start, weight.view(-1, *(1,) * (-1 - dim))))
