"""torch's own defaults, which another library of the same process may have set, change no result."""

import contextlib

import numpy as np
import PIL.Image
import pytest
import torch

import joyedit
from benchmarks.quantised import in_form
from joyedit.schedulers.ddim import DDIMInverseScheduler, DDIMScheduler
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.unipc import UniPCMultistepScheduler

PHOTO = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),  # where nothing can be computed: each stray tensor fails
}


def load(name: str, dtype: torch.dtype):
    pipe = joyedit.load(name, device="cpu", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def joyimage(dtype: torch.dtype) -> list[np.ndarray]:
    drawn = {"generator": torch.Generator("cpu").manual_seed(0), "num_inference_steps": 2}
    pipe = load("tiny-joyimage", dtype)
    words = {"prompt": "Make the red circle blue.", "guidance_scale": 3.0}
    edit = pipe(image=PHOTO, output_type="pt", **words, **drawn)
    made = pipe(prompt="A red circle.", height=64, width=64, output_type="np", **drawn)
    return [edit.images.numpy(), made.images]


def in_eight_bits(dtype: torch.dtype) -> list[np.ndarray]:
    """Within a budget, and with most of the steps left out."""
    pipe = load("tiny-joyimage", dtype)
    pipe.transformer = in_form(pipe.transformer, "int8_convrot")
    pipe.set_memory("8G")
    drawn = {"generator": torch.Generator("cpu").manual_seed(0), "num_inference_steps": 3}
    return [pipe(image=PHOTO, prompt="Make it blue.", step_cache=1e6, output_type="np", **drawn).images]


def chronoedit(dtype: torch.dtype) -> list[np.ndarray]:
    drawn = {"generator": torch.Generator("cpu").manual_seed(0), "num_inference_steps": 2}
    size = {"height": 64, "width": 96, "num_frames": 5, "output_type": "np"}
    film = load("tiny-chronoedit", dtype)(image=PHOTO, prompt="Make it blue.", **size, **drawn).frames
    return [film]


def diffedit(dtype: torch.dtype) -> list[np.ndarray]:
    pipe = load("tiny-diffedit", dtype)
    drawn = {"generator": torch.Generator("cpu").manual_seed(0), "num_inference_steps": 4}
    photo = PHOTO.resize((64, 64))
    words = {"source_prompt": "a blue square", "target_prompt": "a red circle"}
    heat = pipe.generate_mask(photo, output_type="heat", **words, **drawn)
    none = pipe.generate_mask(photo, source_prompt="a red circle", target_prompt="a red circle", **drawn)
    latents = pipe.invert("a blue square", photo, **drawn).latents
    half = np.zeros(heat.shape, np.float32)
    half[..., :4] = 1
    given = {"mask_image": half, "image_latents": latents, "output_type": "np"}
    edit = pipe(prompt="a red circle", **given, **drawn).images
    return [heat, none, latents.float().numpy(), edit]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["run in fp32", "run in bf16"])
@pytest.mark.parametrize("run", [joyimage, in_eight_bits, chronoedit, diffedit], ids=lambda run: run.__name__)
def test_pipelines_do_not_follow_torch_defaults(run, dtype):
    expected = run(dtype)
    assert all(np.isfinite(array).all() for array in expected)
    for name, setting in DEFAULTS.items():
        with setting():
            found = run(dtype)
        for i, (array, right) in enumerate(zip(found, expected, strict=True)):
            assert array.dtype == right.dtype and np.array_equal(array, right), (name, i)


SCHEDULERS = {
    "ddim": (DDIMScheduler, {}),
    "ddim, alpha not one": (DDIMScheduler, {"set_alpha_to_one": False, "beta_schedule": "squaredcos_cap_v2"}),
    "ddim, linear": (DDIMScheduler, {"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
    "ddim, betas": (DDIMScheduler, {"trained_betas": [0.001 * i for i in range(1, 1001)]}),
    "inverse": (DDIMInverseScheduler, {}),
    "flow": (FlowMatchEulerDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "unipc, flow": (
        UniPCMultistepScheduler,
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
}


def walk(kind: type, settings: dict) -> list[torch.Tensor]:
    """What a scheduler makes of a fixed prediction, step by step, and of noise."""
    scheduler = kind(**settings)
    begin = scheduler.timesteps.clone()
    scheduler.set_timesteps(4)
    sample = torch.linspace(-1, 1, 8, dtype=torch.float32, device="cpu").reshape(1, 2, 2, 2)
    states = [begin, scheduler.timesteps.clone()]
    for t in scheduler.timesteps:
        sample = scheduler.step(0.5 * sample, t, sample).prev_sample
        states.append(sample)
    if hasattr(scheduler, "add_noise"):
        states.append(scheduler.add_noise(sample, sample.flip(-1), scheduler.timesteps[:1]))
    return states


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_do_not_follow_torch_defaults(name):
    expected = walk(*SCHEDULERS[name])
    for label, setting in DEFAULTS.items():
        with setting():
            found = walk(*SCHEDULERS[name])
        for state, right in zip(found, expected, strict=True):
            assert (state.dtype, state.device) == (right.dtype, right.device), label
            assert torch.equal(state, right), label
