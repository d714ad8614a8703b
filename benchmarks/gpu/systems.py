"""A guided denoising step of each system at its published size, ours and diffusers', with random weights.

JoyImage edits 1024 x 1024 pixels with one reference, ChronoEdit makes 5 frames of 720p, Stable Diffusion 1.5
and 2.1 work on 512 x 512 pixels. A step is what the pipeline does between two callbacks: both branches of the
network, the guidance and the solver. What a run prepares once (prompts, timesteps, references, rotary tables)
is done before. diffusers' pipelines prepare their prompts alone; their solvers' few operations are left out.

B batch   C latent channels   T frames   h, w height and width of latents   L text tokens
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.block import CLIP_TOKENS, TINY_CHRONOEDIT, TINY_JOYIMAGE
from benchmarks.gpu.measuring import normal, random_network
from joyedit import ops
from joyedit.checkpoints.network import Network
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.unipc import UniPCMultistepScheduler

STEPS = 40
GUIDANCE = 4.0


class System(NamedTuple):
    """network: ours; diffusers has one by the same name. ours, theirs: what makes a step of each."""

    network: type[Network]
    config: Any
    dtype: torch.dtype
    latents: tuple[int, ...]  # (B, C, T, h, w), or (B, C, h, w)
    text: int  # L of each prompt
    ours: Callable[..., "Step"]
    theirs: Callable[..., Callable[[], Tensor]]


class Step(NamedTuple):
    network: Any
    predict: Callable[[int], Any]  # both branches of the network, in step i of a run
    whole: Callable[[], Tensor]  # latents after the next step; after the last of a run the first of another


def directly(network: Network, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """How a network is called without a graph."""
    return function(*args, **kwargs)


def run_after_run(scheduler: Any, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """The steps of a run, again and again: number and timestep."""
    while True:
        scheduler.set_timesteps(STEPS, device=device)
        yield from enumerate(scheduler.timesteps)


def joyimage(system: System, device: torch.device, call: Callable[..., Any] = directly) -> Step:
    network = random_network(system.network, system.config, device, system.dtype)
    tensor = partial(normal, device=device, dtype=system.dtype)
    latents = tensor(*system.latents)[:, None]  # (B, 1, C, T, h, w)
    references = network.embed_image(tensor(*latents.shape))
    frames, rows, columns = network.token_grid(latents)
    grid = (2 * frames, rows, columns)
    rope = network.rope(grid)
    texts = [network.embed_text(tensor(1, system.text, system.config.text_dim)) for _ in range(2)]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    steps = run_after_run(scheduler, device)
    scheduler.set_timesteps(STEPS, device=device)
    vec = network.embed_time(scheduler.timesteps)

    def predict(i: int) -> list[Tensor]:
        target = network.embed_image(latents)
        return call(network, network.predict_branches, target, references, texts, vec[i], rope, grid)

    def whole() -> Tensor:
        i, timestep = next(steps)
        cond, uncond = predict(i)
        length = scheduler.step_length(timestep)
        return ops.guide(cond, uncond, GUIDANCE, True, latents[:, 0], length)

    return Step(network, predict, whole)


def chronoedit(system: System, device: torch.device, call: Callable[..., Any] = directly) -> Step:
    network, config = random_network(system.network, system.config, device, system.dtype), system.config
    tensor = partial(normal, device=device, dtype=system.dtype)
    batch, channels, *size = system.latents
    latents = normal(batch, channels, *size, device=device)
    condition = normal(batch, config.in_channels - channels, *size, device=device)
    rope = network.rope((size[0], size[1] // config.patch_size[1], size[2] // config.patch_size[2]))
    texts = [network.embed_text(tensor(1, system.text, config.text_dim)) for _ in range(2)]
    image = network.embed_image(tensor(1, CLIP_TOKENS, config.image_dim))
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    steps = run_after_run(scheduler, device)
    scheduler.set_timesteps(STEPS, device=device)
    vec = network.embed_time(scheduler.timesteps)

    def predict(i: int) -> list[Tensor]:
        x = torch.cat((latents, condition), dim=1)
        return call(network, network.predict_branches, x, vec[i], texts, image, rope)

    def whole() -> Tensor:
        i, timestep = next(steps)
        cond, uncond = predict(i)
        velocity = ops.guide(cond, uncond, GUIDANCE)
        return scheduler.step(velocity, timestep, latents, return_dict=False)[0]

    return Step(network, predict, whole)


def diffedit(system: System, device: torch.device, call: Callable[..., Any] = directly) -> Step:
    network, width = (
        random_network(system.network, system.config, device, system.dtype),
        system.config.context_dim,
    )
    tensor = partial(normal, device=device, dtype=system.dtype)
    latents = tensor(*system.latents)
    context = network.embed_context(tensor(2, system.text, width))
    scheduler = DDIMScheduler(steps_offset=1)
    steps = run_after_run(scheduler, device)
    scheduler.set_timesteps(STEPS, device=device)
    times = network.embed_time(scheduler.timesteps)

    def predict(i: int) -> Tensor:
        return call(network, network.predict, latents, times[i], context, branches=2)

    def whole() -> Tensor:
        i, timestep = next(steps)
        uncond, cond = predict(i).chunk(2)
        return scheduler.step(ops.guide(cond, uncond, GUIDANCE), timestep, latents)[0]

    return Step(network, predict, whole)


def joyimage_of_diffusers(system: System, network: Any, device: torch.device) -> Callable[[], Tensor]:
    tensor = partial(normal, device=device, dtype=system.dtype)
    batch, *size = system.latents
    latents = tensor(batch, 2, *size)  # reference and target
    texts = [tensor(1, system.text, system.config.text_dim) for _ in range(2)]
    timestep = torch.tensor([500.0], device=device)

    def whole() -> Tensor:
        cond, uncond = (network(latents, timestep, text, return_dict=False)[0] for text in texts)
        velocity = uncond + GUIDANCE * (cond - uncond)
        return velocity * (
            cond.norm(dim=2, keepdim=True) / velocity.norm(dim=2, keepdim=True).clamp_min(1e-6)
        )

    return whole


def chronoedit_of_diffusers(system: System, network: Any, device: torch.device) -> Callable[[], Tensor]:
    tensor, config = partial(normal, device=device, dtype=system.dtype), system.config
    batch, _, *size = system.latents
    latents = tensor(batch, config.in_channels, *size)
    texts = [tensor(1, system.text, config.text_dim) for _ in range(2)]
    image = tensor(1, CLIP_TOKENS, config.image_dim)
    timestep = torch.tensor([500], device=device)

    def whole() -> Tensor:
        cond, uncond = (network(latents, timestep, text, image, return_dict=False)[0] for text in texts)
        return uncond + GUIDANCE * (cond - uncond)

    return whole


def diffedit_of_diffusers(system: System, network: Any, device: torch.device) -> Callable[[], Tensor]:
    tensor = partial(normal, device=device, dtype=system.dtype)
    latents, texts = tensor(*system.latents), tensor(2, system.text, system.config.context_dim)
    timestep = torch.tensor(500, device=device)

    def whole() -> Tensor:
        both = network(torch.cat((latents, latents)), timestep, texts, return_dict=False)[0]
        uncond, cond = both.chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    return whole


JOYIMAGE = System(
    JoyImageEditTransformer3DModel,
    JoyImageEditConfig(),
    torch.bfloat16,
    (1, 16, 1, 128, 128),
    1100,
    joyimage,
    joyimage_of_diffusers,
)
CHRONOEDIT = System(
    ChronoEditTransformer3DModel,
    ChronoEditConfig(),
    torch.bfloat16,
    (1, 16, 2, 90, 160),
    512,
    chronoedit,
    chronoedit_of_diffusers,
)
DIFFEDIT_15 = System(
    UNet2DConditionModel,
    UNet2DConditionConfig(),
    torch.float16,
    (1, 4, 64, 64),
    77,
    diffedit,
    diffedit_of_diffusers,
)
DIFFEDIT_21 = DIFFEDIT_15._replace(
    config=UNet2DConditionConfig(
        attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    )
)
TINY_UNET = UNet2DConditionConfig(
    block_out_channels=(16,),
    norm_num_groups=2,
    attention_head_dim=1,
    cross_attention_dim=16,
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("CrossAttnUpBlock2D",),
)
SYSTEMS = {
    "joyimage, 1024 px": JOYIMAGE,
    "chronoedit, 5 frames of 720p": CHRONOEDIT,
    "stable diffusion 1.5, 512 px": DIFFEDIT_15,
    "stable diffusion 2.1, 512 px": DIFFEDIT_21,
}
TINY = {
    "joyimage, tiny": JOYIMAGE._replace(
        config=TINY_JOYIMAGE.replace(num_layers=2), dtype=torch.float32, latents=(1, 16, 1, 4, 6), text=5
    ),
    "chronoedit, tiny": CHRONOEDIT._replace(
        config=TINY_CHRONOEDIT, dtype=torch.float32, latents=(1, 16, 2, 4, 6), text=5
    ),
    "stable diffusion, tiny": DIFFEDIT_15._replace(
        config=TINY_UNET, dtype=torch.float32, latents=(1, 4, 4, 6), text=5
    ),
}
