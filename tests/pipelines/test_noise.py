"""Half precision draws the numbers of fp32, rounded: pyproject.toml asks for a PyTorch that does so."""

import re
import tomllib
from pathlib import Path

import pytest
import torch

from joyedit.noise import draw_noise

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 15, 16, 32, 4096])
def test_half_precision_draws_are_the_fp32_stream(dtype, count):
    """Before PyTorch 2.12 they were others from 16 on. (The last 16 still are if 16 does not divide all.)"""
    half, full = (
        draw_noise((count,), torch.Generator("cpu").manual_seed(0), "cpu", kind)
        for kind in (dtype, torch.float32)
    )
    assert half.dtype == dtype
    # Half precision rounds within the draw, too: twice its unit in the last place, of values up to 4.
    assert (half.float() - full).abs().max() <= 8 * torch.finfo(dtype).eps


def test_the_lower_bound_is_the_first_release_that_draws_so():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = [
        re.fullmatch(r"torch>=(\d+)\.(\d+)", one) for one in project["dependencies"] if "torch" in one
    ]
    assert bound is not None and (int(bound[1]), int(bound[2])) >= (2, 12)
