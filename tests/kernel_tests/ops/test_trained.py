"""The trained checkpoints of the package, edited by kernels and by PyTorch: the same picture."""

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.shapes import scenes
from joyedit import ops

pytestmark = pytest.mark.slow  # a minute under the interpreter


def picture(edit, size):
    return Image.fromarray(scenes.to_levels(scenes.draw(edit.source, size)))


def by_instruction(pipe, edit):
    return pipe(
        picture(edit, scenes.SIZE),
        edit.instruction,
        num_inference_steps=1,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("name, run", [("tiny-joyimage", by_instruction)])
def test_kernels_make_the_same_picture(name, run, launches, device):
    pipe = joyedit.load(name, device=device, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    edit = scenes.make_edit(0, "held-out", ("recolour",), (2,))
    with ops.backend("torch"):
        wanted = run(pipe, edit)
    with ops.backend("triton"), launches() as kernels:
        made = run(pipe, edit)
    assert sum(kernels.values()) > 100
    assert np.abs(wanted - made).max() < 1e-4  # a fortieth of a level of 8 bits
    assert np.square(wanted - scenes.draw(edit.source)).mean() > 1e-4, "nothing was edited"
