"""A small ChronoEdit with random weights, and short words for what its tests do with it."""

import numpy as np
import torch
from PIL import Image

from joyedit import ChronoEditPipeline

HEIGHT, WIDTH = 32, 48
PROMPT, OTHER = "a bowl of fruit", "the dog is on it"


@torch.no_grad()
def filled(network, seed):
    """Random weights that keep the scale of what passes, so that prompts and pictures show in the result."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        wide = noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2 * noise
        is_norm = "norm" in name and name.endswith(("weight", "gamma"))
        parameter.copy_(1 + 0.2 * noise if is_norm else noise if name == "shared.weight" else wide)
    return network


def picture(seed=0, width=61, height=42):
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipe, image=None, prompt=PROMPT, **call):
    call = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "generator": seeded(), **call}
    return pipe(picture() if image is None else image, prompt, **call).frames


def reasoning(k, frames=13):
    return {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": k, "num_frames": frames}


def close(a, b, tolerance=2e-5):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).abs().max()) <= tolerance


def counted(monkeypatch, owner, *names):
    """The shapes of the first argument of every call of these methods; of a prediction, for each branch."""
    calls = {name: [] for name in names}

    def count(name, original):
        def call(first, *args, **kwargs):
            shape = tuple(first.shape) if isinstance(first, torch.Tensor) else first
            calls[name] += [shape] * (len(args[1]) if name == "predict_branches" else 1)
            return original(first, *args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for name in names:
        count(name, getattr(owner, name))
    return calls


def loaded_from(folder):
    """The pipeline of a folder, its networks `filled`."""
    pipe = ChronoEditPipeline.from_pretrained(folder, dtype="float32")
    for seed, network in enumerate(pipe.networks.values()):
        filled(network, seed)
    return pipe
