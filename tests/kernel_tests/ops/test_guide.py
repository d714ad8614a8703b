"""guide against float64, and against the Euler step that it includes."""

import copy

import pytest
import torch

from joyedit import ops
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler


def plain(cond, uncond, scale, rescale=False, sample=None, delta=None):
    out = uncond + scale * (cond - uncond)
    if rescale:
        ratio = cond.norm(dim=1, keepdim=True) / out.norm(dim=1, keepdim=True).clamp_min(1e-6)
        out = out * ratio
    return out if sample is None else sample + delta * out


SHAPES = [(1, 1, 1), (2, 4, 7, 5), (1, 16, 1, 9, 11), (2, 3, 257), (2, 100, 3), (1, 4, 0, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combination(compare, randn, dtype, shape):
    cond, uncond = (randn(*shape, dtype=dtype) for _ in range(2))
    compare(ops.guide, plain, cond, uncond, 7.5, backward=None)
    compare(ops.guide, plain, cond, uncond, 4.0, True, backward=None)


@pytest.mark.parametrize("rescale", [False, True], ids=["plain", "rescaled"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step(compare, randn, dtype, shape, rescale):
    cond, uncond, sample = (randn(*shape, dtype=dtype) for _ in range(3))
    delta = torch.tensor([-0.03, -0.0525], device=sample.device)[1]
    compare(ops.guide, plain, cond, uncond, 4.0, rescale, sample, delta, backward=None)


def test_other_layouts(compare, randn, dtype):
    """Halves of a batch, channels-last maps, and frames of a longer film."""
    both = randn(4, 4, 5, 6, dtype=dtype)
    compare(ops.guide, plain, *both.chunk(2), 3.0, True, backward=None)
    last = randn(2, 5, 6, 4, dtype=dtype).movedim(-1, 1)
    compare(ops.guide, plain, last, both[:2], 3.0, True, both[2:], randn(1)[0], backward=None)
    compare(ops.guide, plain, both[2:], last, 3.0, False, last, randn(1)[0], backward=None)
    film = randn(1, 4, 5, 3, 7, dtype=dtype)
    compare(
        ops.guide,
        plain,
        film[:, :, ::4],
        film[:, :, 1:3],
        3.0,
        True,
        film[:, :, 2:4],
        randn(1)[0],
        backward=None,
    )


def test_latents_wider_than_the_velocities(randn, dtype):
    """The result has the dtype of the sample, and no more error than what is rounded on the way."""
    cond, uncond, sample, delta = *randn(2, 1, 16, 9, dtype=dtype), randn(1, 16, 9), randn(1)[0]
    with ops.backend("triton"):
        out = ops.guide(cond, uncond, 4.0, True, sample, delta)
    wanted = plain(cond.double(), uncond.double(), 4.0, True, sample.double(), delta.double())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_combination_of_nothing_stays_finite(randn):
    cond, uncond = randn(1, 4, 6), randn(1, 4, 6)
    cond[..., :3] = uncond[..., :3] = 0
    for backend in ("triton", "torch"):
        with ops.backend(backend):
            out = ops.guide(cond, uncond, 4.0, True)
        assert (out[..., :3] == 0).all() and out.isfinite().all()


def test_equals_the_scheduler(randn):
    """Combination, then the solver's own step."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5)
    scheduler.set_timesteps(3, device=randn(1).device)
    cond, uncond, sample = randn(3, 2, 16, 1, 5, 7)
    counting = copy.deepcopy(scheduler)
    for timestep in scheduler.timesteps:
        delta = counting.step_length(timestep)
        with ops.backend("torch"):
            velocity = ops.guide(cond, uncond, 4.0, True)
            fused = ops.guide(cond, uncond, 4.0, True, sample, delta)
        with ops.backend("triton"):
            ours = ops.guide(cond, uncond, 4.0, True, sample, delta)
        wanted = scheduler.step(velocity, timestep, sample)[0]
        assert torch.equal(fused, wanted)
        torch.testing.assert_close(ours, wanted)
        assert counting.step_index == scheduler.step_index
        sample = wanted
    with pytest.raises(IndexError, match="all 3 steps were taken"):
        counting.step_length(scheduler.timesteps[-1])


@pytest.mark.parametrize("setting", ["stochastic_sampling", "joyai_original"])
def test_a_step_that_is_more_is_left_to_the_scheduler(setting):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.5, **{setting: True})
    scheduler.set_timesteps(3)
    assert scheduler.step_length(scheduler.timesteps[0]) is None
    assert scheduler.step_index is None


def test_with_a_gradient_it_is_pytorch(launches, randn):
    cond, uncond = randn(1, 4, 6).requires_grad_(), randn(1, 4, 6)
    with ops.backend("triton"), pytest.raises(RuntimeError, match="no backward"):
        ops.guide(cond, uncond, 4.0)
    with launches() as counts:
        out = ops.guide(cond, uncond, 4.0)
    assert counts == {} and out.requires_grad


def test_what_does_not_fit_is_refused(randn):
    x, delta = randn(1, 4, 6), randn(1)[0]
    for given in ((x, None), (None, delta)):
        with pytest.raises(ValueError, match="sample and delta"):
            ops.guide(x, x, 2.0, False, *given)
    with ops.backend("triton"):
        for args in ((x, x[..., :1], 2.0), (x, x, 2.0, False, x[:, :1], delta)):
            with pytest.raises(RuntimeError, match="one shape"):
                ops.guide(*args)
        with pytest.raises(RuntimeError, match="129 channels"):
            ops.guide(*randn(2, 1, 129, 2), 2.0)


@pytest.mark.slow
def test_registration(randn):
    from joyedit.kernels.guide import guide

    cond, uncond, sample = randn(3, 2, 4, 3, 5)
    torch.library.opcheck(guide, (cond, uncond, 4.0, True, sample, randn(1)[0]))
    torch.library.opcheck(guide, (cond, uncond, 4.0, False, None, None))
    torch.library.opcheck(guide, (cond.transpose(2, 3), uncond.transpose(2, 3), 4.0, True, None, None))
