"""What a denoiser is trained to do, each formula beside the step of the sampler that takes it back.

                     x_t                       trained to predict   x0 is then         taken back by
    JoyImage         (1 - s) x0 + s noise      noise - x0           x_t - s v          flow_match.py, Euler
    ChronoEdit       (1 - s) x0 + s noise      noise - x0           x_t - s v          unipc.py, flow
    Stable Diffusion a x0 + s noise            noise (epsilon)      (x_t - s eps) / a  ddim.py
      a = (1 - s^2)^.5                         a noise - s x0 (v)   a x_t - s v

Every loss is `(network, latents, conditioning, noise, sigma) -> (B,)`, the mean squared error of each sample,
in fp32. latents: x0, normalised as the pipeline has them; noise: of the same shape; sigma (B): the s of the
table, in (0, 1]. `weight` multiplies the squared errors, place by place. Noise and levels are drawn outside:
a validation passes the same ones every time.

B batch   C latent channels   T latent frames   h, w latent height and width   L prompt tokens
M image tokens   N timesteps
Source: arXiv 2210.02747 (flow matching), 2403.03206 section 3 (levels, shift), 2006.11239 equation 14
(epsilon), 2202.00512 appendix D (v), 2303.09556 section 3.4 (min-SNR); diffusers' training scripts
`train_text_to_image.py`, `train_dreambooth_lora_flux2_img2img.py`.
"""

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor

from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel, Context
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionModel
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.schedulers.scheduler import shift_sigmas

SIGMAS = ("shifted", "logit-normal", "uniform")
TIMESTEPS = 1000  # what a flow's network is told of a level is sigma times this
ENDS = (0, -1)  # the latent frames of a film that are the photograph and the edit


@dataclasses.dataclass(frozen=True)
class JoyImageConditioning:
    """prompt (B, L, D_text): embeddings, all of one length, since the network knows no padding.
    references: latents (B, C, 1, h, w) each, clean, in any sizes; none for text to image."""

    prompt: Tensor
    references: tuple[Tensor, ...] = ()


def joyimage(
    network: JoyImageEditTransformer3DModel,
    latents: Tensor,
    conditioning: JoyImageConditioning,
    noise: Tensor,
    sigma: Tensor,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Flow matching on the target alone; references stay clean. latents, noise (B, C, 1, h, w)."""
    noisy = flow_noised(latents, noise, sigma)
    velocity = joyimage_velocity(network, noisy, conditioning, sigma)
    return mean_square(velocity - (noise - latents), weight)


def joyimage_velocity(
    network: JoyImageEditTransformer3DModel, noisy: Tensor, conditioning: JoyImageConditioning, sigma: Tensor
) -> Tensor:
    """What the sampler asks the network, (B, C, 1, h, w) fp32."""
    items = (noisy, *conditioning.references)
    grids = [network.token_grid(item) for item in items]
    target, *references = (network.embed_image(item) for item in items)
    reference = torch.cat(references, dim=1) if references else None
    txt, vec = network.embed_text(conditioning.prompt), network.embed_time(TIMESTEPS * sigma)
    return network.predict_target(target, reference, txt, vec, network.rope(grids), grids).float()


@dataclasses.dataclass(frozen=True)
class ChronoEditConditioning:
    """condition (B, 4 + C, T, h, w): mask and latents of the photograph, as `FrameCoder.condition` makes
    them. prompt (B, L, D_text): embeddings with their padding, which is attended to. image (B, M, D_image):
    what CLIP sees of the photograph; None for a network without image tokens. padding: how often the last row
    of the prompt comes again; its keys and values are computed once."""

    condition: Tensor
    prompt: Tensor
    image: Tensor | None = None
    padding: int = 0

    def frames(self, which: Any) -> Self:
        """Of these latent frames alone."""
        return dataclasses.replace(self, condition=self.condition[:, :, which])


def chronoedit(
    network: ChronoEditTransformer3DModel,
    latents: Tensor,
    conditioning: ChronoEditConditioning,
    noise: Tensor,
    sigma: Tensor,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Flow matching on all frames of a film. latents, noise (B, C, T, h, w).

    Two latent frames, photograph and edit, are an edit without reasoning, which the network holds apart in
    time; more are a film with the way between them, whose last one is encoded as if it followed the first. A
    sampler that reasons drops the way after some steps: below that level, train on `ends`.
    """
    noisy = flow_noised(latents, noise, sigma)
    velocity = chronoedit_velocity(network, noisy, conditioning, sigma)
    return mean_square(velocity - (noise - latents), weight)


def chronoedit_velocity(
    network: ChronoEditTransformer3DModel, noisy: Tensor, conditioning: ChronoEditConditioning, sigma: Tensor
) -> Tensor:
    """What the sampler asks the network, (B, C, T, h, w) fp32."""
    x = torch.cat((noisy, conditioning.condition.to(noisy)), dim=1)
    rope, vec = network.rope(network.token_grid(x)), network.embed_time(TIMESTEPS * sigma)
    text = repeat_last(network.embed_text(conditioning.prompt), conditioning.padding)
    image = None if conditioning.image is None else network.embed_image(conditioning.image)
    return network.predict(x, vec, text, image, rope).float()


def repeat_last(context: Context, count: int) -> Context:
    """Of which the last row stands `count` times more."""

    def longer(x: Tensor) -> Tensor:
        return torch.cat((x, x[:, -1:].expand(-1, count, *x.shape[2:])), dim=1)

    if not count:
        return context
    return tuple(longer(x) if isinstance(x, Tensor) else (longer(x[0]), longer(x[1])) for x in context)


def ends(
    latents: Tensor, conditioning: ChronoEditConditioning, noise: Tensor
) -> tuple[Tensor, ChronoEditConditioning, Tensor]:
    """A film without its way, as the sampler goes on after its reasoning: with the same noise."""
    return latents[:, :, ENDS], conditioning.frames(ENDS), noise[:, :, ENDS]


@dataclasses.dataclass(frozen=True)
class StableDiffusionConditioning:
    """prompt (B, L, D_text): embeddings of the captions."""

    prompt: Tensor


def stable_diffusion(
    network: UNet2DConditionModel,
    latents: Tensor,
    conditioning: StableDiffusionConditioning,
    noise: Tensor,
    sigma: Tensor,
    *,
    scheduler: DDIMScheduler | None = None,
    min_snr: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """The error of epsilon or v, whichever the scheduler says that the network predicts. latents, noise
    (B, C, h, w).

    The network knows the levels of the schedule alone: of sigma the nearest one is taken. scheduler: default
    that of Stable Diffusion 1.x. min_snr: the largest signal-to-noise ratio that counts, 5 in the paper;
    None: all count alike. Raises ValueError for a scheduler that predicts something else.
    """
    scheduler = scheduler or stable_diffusion_1()
    kind = scheduler.config.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type={kind!r}: there is a loss for epsilon and v_prediction")
    timesteps = nearest_timesteps(sigma, scheduler)
    latents, noise = latents.float(), noise.float()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    wanted = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    error = mean_square(stable_diffusion_output(network, noisy, conditioning, timesteps) - wanted, weight)
    if min_snr is None:
        return error
    return error * min_snr_weight(snr_of(timesteps, scheduler), min_snr, kind).to(error.device)


def stable_diffusion_output(
    network: UNet2DConditionModel, noisy: Tensor, conditioning: StableDiffusionConditioning, timesteps: Tensor
) -> Tensor:
    """What the sampler asks the network, (B, C, h, w) fp32."""
    context, time = network.embed_context(conditioning.prompt), network.embed_time(timesteps)
    return network.predict(noisy, time, context).float()


def stable_diffusion_1() -> DDIMScheduler:
    """The schedule of Stable Diffusion 1.x."""
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def noise_levels(scheduler: DDIMScheduler) -> Tensor:
    """(N) sqrt(1 - abar) of every timestep, rising."""
    return (1 - scheduler.alphas_cumprod).sqrt()


def nearest_timesteps(sigma: Tensor, scheduler: DDIMScheduler) -> Tensor:
    """(B) levels -> (B) the timesteps of the schedule whose levels are nearest."""
    levels = noise_levels(scheduler).to(sigma.device, sigma.dtype)
    return (sigma[:, None] - levels).abs().argmin(dim=1)


def snr_of(timesteps: Tensor, scheduler: DDIMScheduler) -> Tensor:
    """abar / (1 - abar), (B)."""
    abar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return abar / (1 - abar)


def min_snr_weight(snr: Tensor, most: float, prediction_type: str) -> Tensor:
    """(B): min(snr, most) for the error of x0, which is that of epsilon / snr, and that of v / (snr + 1).
    Where nothing is left of the signal, epsilon keeps the weight 1."""
    if prediction_type == "epsilon":
        return (most / snr).clamp(max=1)
    return snr.clamp(max=most) / (snr + 1)


def draw_sigma(
    count: int, how: str = "shifted", shift: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Noise levels to train at, (count) fp32 in (0, 1], drawn on the CPU: the same on every device.

    uniform: all alike. shifted: those, moved up by the `shift` of the schedule, where a sampler's steps are.
    logit-normal: a normal before a sigmoid, mostly of middle strength. Raises ValueError for another word.
    """
    if how not in SIGMAS:
        raise ValueError(f"sigma={how!r}: must be one of {', '.join(SIGMAS)}")
    if how == "logit-normal":
        return torch.randn(count, generator=generator, device="cpu").sigmoid()
    u = 1 - torch.rand(count, generator=generator, device="cpu")  # never 0, where nothing is to be learned
    return shift_sigmas(u, shift) if how == "shifted" else u


def draw_timestep_sigma(
    count: int, scheduler: DDIMScheduler, generator: torch.Generator | None = None
) -> Tensor:
    """Levels of Stable Diffusion, (count): those of its timesteps, each as often as the others."""
    timesteps = torch.randint(len(scheduler), (count,), generator=generator, device="cpu")
    return noise_levels(scheduler)[timesteps]


def flow_noised(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma noise, in fp32. sigma (B)."""
    s = sigma.to(latents.device, torch.float32).view(-1, *(1,) * (latents.ndim - 1))
    return (1 - s) * latents.float() + s * noise.float()


def mean_square(error: Tensor, weight: Tensor | None) -> Tensor:
    """(B, ...) -> (B). weight: broadcasts to the error; None: 1."""
    square = error.float().square()
    return (square if weight is None else weight.to(square) * square).flatten(1).mean(1)
