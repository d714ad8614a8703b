"""The trained checkpoints of the package, edited by kernels and by PyTorch: the same picture."""

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.shapes import scenes, sd_vae
from joyedit import ops

pytestmark = pytest.mark.slow  # minutes under the interpreter

EDIT = scenes.make_edit(0, "held-out", ("recolour",), (2,))


def picture(size):
    return Image.fromarray(scenes.to_levels(scenes.draw(EDIT.source, size)))


def seeded():
    return torch.Generator().manual_seed(0)


def by_instruction(pipe):
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "generator": seeded(), "output_type": "np"}
    return pipe(picture(scenes.SIZE), EDIT.instruction, **options).images[0]


def by_film(pipe):
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "generator": seeded()}
    size = {"height": scenes.SIZE, "width": scenes.SIZE, "num_frames": 5, "only_last_frame": True}
    return pipe(picture(scenes.SIZE), EDIT.instruction, **size, **options).frames[0, -1]


def by_captions(pipe):
    return pipe.edit(
        picture(sd_vae.SIZE),
        scenes.caption(EDIT.source),
        scenes.caption(EDIT.target),
        num_inference_steps=2,
        inpaint_strength=1.0,
        num_maps_per_mask=1,
        generator=seeded(),
        output_type="np",
    ).images[0]


@pytest.mark.parametrize(
    ("name", "run"),
    [("tiny-joyimage", by_instruction), ("tiny-chronoedit", by_film), ("tiny-diffedit", by_captions)],
)
def test_kernels_make_the_same_picture(name, run, launches, device):
    pipe = joyedit.load(name, device=device, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    with ops.backend("torch"):
        wanted = run(pipe)
    with ops.backend("triton"), launches() as kernels:
        made = run(pipe)
    assert sum(kernels.values()) > 100
    assert np.abs(wanted - made).max() < 1e-4  # a fortieth of a level of 8 bits
    assert np.square(wanted - scenes.draw(EDIT.source, len(wanted))).mean() > 1e-4, "nothing was edited"
