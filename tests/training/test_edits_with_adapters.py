"""A trained adapter in an edit gives what it gave in training: live, loaded, and by the command."""

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from joyedit.command import cli

PROMPT = "make the circle red"


def edit(pipe, photo):
    generator = [torch.Generator().manual_seed(5)]
    made = pipe(photo, PROMPT, num_inference_steps=2, guidance_scale=2.0, generator=generator)
    return np.asarray(made.images[0]).astype(int)


@pytest.mark.slow
def test_an_edit_is_the_trainers_sample(tmp_path, monkeypatch):
    """On the shipped weights, which are in bf16: an adapter so small that their sum would lose most of it."""
    monkeypatch.chdir(tmp_path)
    Image.effect_mandelbrot((96, 96), (-2, -1.5, 1, 1.5), 60).convert("RGB").save("photo.png")
    photo = joyedit.load_image("photo.png")
    pipe = joyedit.load("tiny-joyimage", device="cpu")
    assert pipe.transformer.dtype == torch.bfloat16
    plain = edit(pipe, photo)
    torch.manual_seed(0)
    made = pipe.adapters.add_lora(4, targets="all")
    assert (edit(pipe, photo) == plain).all()
    with torch.no_grad():
        for name, factor in made.items():
            if "lora_B" in name:
                factor.normal_(std=0.02)
    sample = edit(pipe, photo)
    assert (sample != plain).any()
    path = pipe.adapters.save_lora("mine.safetensors", base="tiny-joyimage")

    other = joyedit.load("tiny-joyimage", device="cpu")
    other.load_lora_weights(path)
    assert (edit(other, photo) == sample).all()
    words = [
        "photo.png",
        PROMPT,
        "--lora",
        "mine.safetensors",
        "--steps",
        "2",
        "--guidance",
        "2",
        "--seed",
        "5",
    ]
    assert cli.main(["edit", *words, "-m", "tiny-joyimage", "-o", "made.png", "-q"]) == 0
    assert (np.asarray(Image.open("made.png")).astype(int) == sample).all()
    other.fuse_lora()
    assert (edit(other, photo) != sample).any()  # the sums are rounded
