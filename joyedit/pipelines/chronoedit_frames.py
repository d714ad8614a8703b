"""Frames of ChronoEdit: what the transformer is told of the photograph, and how its latents become pictures.

An edit is a film that begins with the photograph. The film that the autoencoder encodes for it has the
photograph as its first frame and mid-grey (0) in all others, and a mask says which latent frame is known.

In the end the first latent frame is the photograph and the last one the edited picture; those between them,
of temporal reasoning, are the way there. The edited picture is decoded as if it followed the photograph, so
it looks the same whether or not there is a way, and the way is decoded without it: 25 + 4 frames of a film
of 29. Both decodes begin with the photograph, which is decoded once: what the autoencoder remembers of it is
copied. For the edited picture alone, the last two convolutions leave out what only other frames would see.

B films   C channels   F frames   T latent frames   h, w latent size (pixels / 8)
Source: diffusers `pipeline_chronoedit.py`; nv-tlabs/ChronoEdit; arXiv 2510.04290.
"""

from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor

from joyedit.models.wan_vae import AutoencoderKLWan, Past, ResidualBlock, UpBlock

ENDS = (0, -1)  # the latent frames of the photograph and of the edited picture


class FrameCoder:
    """An autoencoder, with the mean and deviation of its latents, which the transformer has normalised."""

    def __init__(self, vae: AutoencoderKLWan):
        self.vae = vae
        self.mean, self.std = (
            rearrange(torch.tensor(values, dtype=torch.float32, device="cpu"), "c -> 1 c 1 1 1")
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )

    def condition(self, pictures: Tensor, frames: int, known: bool = True) -> Tensor:
        """What is known of films of 1 + 4k frames, (B, 4 + C, T, h, w) fp32: the mask of each of the four
        frames in a latent one, and normalised latents.

        pictures (B, 3, 1, H, W) in [-1, 1], their first frames; `known=False`: these are as good as any.
        """
        b, c, _, height, width = pictures.shape
        film = pictures.new_zeros(b, c, frames, height, width)
        film[:, :, :1] = pictures
        latents = self.vae.encode(film).latent_dist.mode().float()
        latents = (latents - self.mean.to(latents)) / self.std.to(latents)
        mask = latents.new_zeros(b, self.vae.config.scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = float(known)
        return torch.cat((mask, latents), dim=1)

    def still(self, pictures: Tensor, frames: int) -> Tensor:
        """Normalised latents (B, C, T, h, w) fp32 of films of 1 + 4k frames that stay their first; pictures
        (B, 3, 1, H, W) in [-1, 1]. As in `decode`, the last one follows the first."""
        shown = max(frames - 4, 5)  # causal: the last of five is also the second of the way
        latents = self.vae.encode(pictures.expand(-1, -1, shown, -1, -1)).latent_dist.mode().float()
        latents = (latents - self.mean.to(latents)) / self.std.to(latents)
        return latents[:, :, [*range((frames - 1) // 4), 1]]

    def decode(self, latents: Tensor, only_last: bool = False) -> Tensor:
        """Normalised latents (B, C, T, h, w) -> pixels (B, 3, F, H, W) in [-1, 1]; only_last: the last frame
        alone, which is the edited picture."""
        latents = latents * self.std.to(latents) + self.mean.to(latents)
        if latents.shape[2] == 1:
            return self.vae.decode(latents).sample
        if only_last:
            return self.vae.decode_with(self._last_frame, latents[:, :, ENDS])
        return self.vae.decode_with(self._all_frames, latents)

    def _all_frames(self, z: Tensor) -> Tensor:
        """z (B, C, T, h, w), not normalised -> 1 + 4 (T - 2) frames of the way, then 4 of the edit."""
        first, *way, edit = self.vae.post_quant_conv(z).split(1, dim=2)
        past: Past = {}
        start = self.vae.decoder(first, past)
        end = self.vae.decoder(edit, dict(past))
        each = end.shape[2]
        film = start.new_empty(*start.shape[:2], 1 + each * (len(way) + 1), *start.shape[3:])
        film[:, :, :1], film[:, :, -each:] = start, end
        for i, frame in enumerate(way):
            film[:, :, 1 + each * i : 1 + each * (i + 1)] = self.vae.decoder(frame, past)
        return film

    def _last_frame(self, z: Tensor) -> Tensor:
        """z (B, C, 2, h, w), not normalised -> the last of the five frames, (B, 3, 1, H, W).

        The last convolution looks at three frames, the one before it at all five: only these two have frames
        to leave out.
        """
        decoder = self.vae.decoder
        blocks = cast(list[UpBlock], list(decoder.up_blocks))
        *layers, final = [layer for block in blocks for layer in (*block.resnets, *block.upsamplers)]
        assert isinstance(final, ResidualBlock)  # the last block has no upsampler
        past: Past = {}
        hidden = []
        for frame in self.vae.post_quant_conv(z).split(1, dim=2):
            x = decoder.mid_block(decoder.conv_in(frame, past), past)
            for layer in layers:
                x = layer(x, past)
            hidden.append(final.norm2(final.conv1(final.norm1(x), past)))
        window = torch.cat(hidden, dim=2)
        x = final.conv_shortcut(x[:, :, -3:]) + final.conv2(window[:, :, 2:], {final.conv2: window[:, :, :2]})
        x = decoder.norm_out(x)
        return decoder.conv_out(x[:, :, 2:], {decoder.conv_out: x[:, :, :2]})


def for_all(x: Tensor, batch: int, copies: int) -> Tensor:
    """One row of each prompt, or one for all of them, to `copies` rows in a row of each. (1 or B, ...)."""
    return repeat(x.expand(batch, *x.shape[1:]), "b ... -> (b n) ...", n=copies)
