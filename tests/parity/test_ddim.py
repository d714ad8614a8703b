"""DDIM and its inverse: tables and steps equal to diffusers', the published sums, the way there and back."""

import copy
import itertools
import json
import logging
import pickle

import diffusers
import numpy as np
import pytest
import torch

import joyedit.schedulers.ddim as module
from joyedit.schedulers.ddim import DDIMInverseScheduler, DDIMScheduler
from joyedit.schedulers.scheduler import FAMILY

SPACINGS = ("leading", "trailing", "linspace")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
STEPS = (1, 2, 5, 7, 50, 333)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LATENT = {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
SHAPE = (2, 3, 5, 7)

# The settings that decide about the noise levels, and those that decide about a step.
TABLES = {
    "defaults": {},
    "Stable Diffusion": SD,
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "fewer timesteps": {"num_train_timesteps": 250, "beta_end": 0.03},
    "trained": {"num_train_timesteps": 50, "trained_betas": np.linspace(0.001, 0.3, 50) ** 2},
    "zero terminal": {**SD, "rescale_betas_zero_snr": True},
}
OPTIONS = {
    "latents": {"clip_sample": False},
    "clipped": {},
    "clipped further": {"clip_sample_range": 2.5},
    "thresholded": {"thresholding": True, "sample_max_value": 3.0},
    "thresholded lower": {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.0},
    "ends at alpha 0": {"set_alpha_to_one": False, "clip_sample": False},
}


@pytest.fixture(autouse=True)
def quiet_diffusers():
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def both(settings, steps=None, inverse=False):
    name = "DDIMInverseScheduler" if inverse else "DDIMScheduler"
    pair = getattr(module, name)(**settings), getattr(diffusers, name)(**settings)
    for scheduler in pair:
        if steps is not None:
            scheduler.set_timesteps(steps)
    return pair


def assert_equal(mine, theirs, at):
    """Bit-equal; without signal both divide by zero, and NaN counts as equal to NaN."""
    assert mine.dtype == theirs.dtype, at
    assert torch.equal(mine.nan_to_num(), theirs.nan_to_num()), (at, (mine - theirs).abs().max())


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_noise_levels(table, inverse):
    for set_alpha_to_one in (True, False):
        ours, theirs = both({**TABLES[table], "set_alpha_to_one": set_alpha_to_one}, inverse=inverse)
        assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
        name = "initial_alpha_cumprod" if inverse else "final_alpha_cumprod"
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert len(ours) == len(theirs) and ours.num_inference_steps is None
        assert (ours.order, ours.init_noise_sigma) == (1, 1.0)


def test_published_noise_levels():
    """Specification 5.1."""
    abar = DDIMScheduler(**SD).alphas_cumprod
    expected = {0: 0.99914998, 1: 0.99829602, 21: 0.98038065, 781: 0.04345597, 981: 0.00577550}
    for timestep, value in {**expected, 999: 0.00466010}.items():
        assert abar[timestep].item() == pytest.approx(value, abs=5e-9)
    assert DDIMScheduler(**SD, rescale_betas_zero_snr=True).alphas_cumprod[-1] == 0


BOTH_WAYS = [
    (spacing, way) for spacing in SPACINGS for way in (False, True) if not (way and spacing == "linspace")
]


@pytest.mark.parametrize(("spacing", "inverse"), BOTH_WAYS, ids=str)  # the inverse has no linspace
def test_timesteps_of_every_length(spacing, inverse):
    for offset, count in itertools.product((0, 1, 3), (1000, 777)):
        settings = {"timestep_spacing": spacing, "steps_offset": offset, "num_train_timesteps": count}
        ours, theirs = both(settings, inverse=inverse)
        for steps in (*range(1, 130), 333, 500, count):
            ours.set_timesteps(steps)
            theirs.set_timesteps(steps)
            assert ours.timesteps.dtype == torch.int64 and ours.num_inference_steps == steps
            # For some lengths rounding gives the reference one more timestep, -1.
            kept = theirs.timesteps[theirs.timesteps >= 0]
            assert torch.equal(ours.timesteps, kept) and len(kept) == steps


def test_published_timesteps():
    """Specification 5.2, 5.3 and 9.2."""
    for inverse in (False, True):
        turn = -1 if inverse else 1
        ours, _ = both(LATENT, 5, inverse)
        assert ours.timesteps.tolist() == [801, 601, 401, 201, 1][::turn]
        ours.set_timesteps(50)
        assert ours.timesteps.tolist() == list(range(981, 0, -20))[::turn]
        ours, _ = both({**LATENT, "timestep_spacing": "trailing"}, 50, inverse)
        assert ours.timesteps.tolist() == list(range(999, 0, -20))[::turn]
    ours, _ = both({"timestep_spacing": "trailing"}, 7)
    assert ours.timesteps.tolist()[:4] == [999, 856, 713, 570]
    reference = diffusers.DDIMScheduler(timestep_spacing="trailing")
    reference.set_timesteps(61)
    ours.set_timesteps(61)
    assert reference.timesteps[-1] == -1 and ours.timesteps[-1] >= 0 and len(ours.timesteps) == 61


def run_both(ours, theirs, **options):
    """Every step bit-equal, each time from the reference's own sample."""
    sample = torch.randn(SHAPE)
    for t in ours.timesteps:
        output = torch.randn(SHAPE)
        mine, expected = ours.step(output, t, sample, **options), theirs.step(output, t, sample, **options)
        assert_equal(mine.prev_sample, expected.prev_sample, int(t))
        assert_equal(mine.pred_original_sample, expected.pred_original_sample, int(t))
        sample = torch.randn(SHAPE) + expected.prev_sample.nan_to_num() * 0.1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_step_of_the_solver(option, prediction):
    for spacing, offset, (steps, table) in itertools.product(
        SPACINGS, (0, 1), [(1, "Stable Diffusion"), (7, "Stable Diffusion"), (9, "cosine")]
    ):
        settings = {**TABLES[table], **OPTIONS[option], "prediction_type": prediction}
        ours, theirs = both({**settings, "timestep_spacing": spacing, "steps_offset": offset}, steps)
        run_both(ours, theirs, use_clipped_model_output=bool(offset))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_every_step_of_the_inverse(set_alpha_to_one, prediction):
    for spacing, offset, clip, (steps, table) in itertools.product(
        SPACINGS[:2], (0, 1), (0.0, 1.5), [(1, "cosine"), (7, "Stable Diffusion"), (30, "defaults")]
    ):
        settings = {"prediction_type": prediction, "set_alpha_to_one": set_alpha_to_one}
        settings |= {"timestep_spacing": spacing, "steps_offset": offset}
        settings |= {"clip_sample": bool(clip), "clip_sample_range": clip}
        run_both(*both({**TABLES[table], **settings}, steps, inverse=True))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_steps_to_and_from_zero_signal(inverse):
    settings = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    for prediction in PREDICTIONS[1:]:
        run_both(*both({**settings, "prediction_type": prediction}, 11, inverse))


@pytest.mark.parametrize("eta", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_steps_with_fresh_noise(prediction, eta):
    for spacing, clip, table in itertools.product(SPACINGS, (True, False), ("Stable Diffusion", "cosine")):
        settings = {**TABLES[table], "prediction_type": prediction, "clip_sample": clip}
        ours, theirs = both({**settings, "timestep_spacing": spacing}, 9)
        generators = [torch.Generator().manual_seed(1) for _ in range(2)]
        for t in ours.timesteps:
            output, sample, noise = torch.randn(3, *SHAPE)
            for drawn in (True, False):
                mine, expected = (
                    s.step(
                        output, t, sample, eta, **({"generator": g} if drawn else {"variance_noise": noise})
                    )
                    for s, g in zip((ours, theirs), generators, strict=True)
                )
                assert_equal(mine[0], expected[0], int(t))


def test_one_generator_per_sample_draws_as_for_the_sample_alone():
    ours, theirs = both(LATENT, 4)
    output, sample = torch.randn(2, *SHAPE)
    made = [
        scheduler.step(output, 501, sample, 0.7, generator=[torch.Generator().manual_seed(s) for s in (5, 6)])
        for scheduler in (ours, theirs)
    ]
    torch.testing.assert_close(made[0][0], made[1][0], rtol=0, atol=1e-6)
    alone = ours.step(output[1:], 501, sample[1:], 0.7, generator=torch.Generator().manual_seed(6))
    assert torch.equal(made[0][0][1:], alone[0])


@pytest.mark.parametrize(
    ("timestep", "before", "variance"),
    [(420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979), (999, 998, 0.02)],
)
def test_published_variances(timestep, before, variance):
    levels = DDIMScheduler()._levels
    assert levels.noise_parts(timestep, before, 1.0)[1] ** 2 == pytest.approx(variance, abs=1e-5)


def full_loop(scheduler, from_noise_at=None):
    """|sum| and mean at the end of ten steps with the published dummy network."""
    scheduler.set_timesteps(10)
    start = (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)
    timesteps = scheduler.timesteps
    sample = start
    if from_noise_at is not None:
        noise = start.flip(3)
        timesteps = timesteps[from_noise_at:]
        sample = scheduler.add_noise(start, noise, timesteps[:1])
    for t in timesteps:
        sample = scheduler.step(sample * t / (t + 1), t, sample).prev_sample
    return sample.abs().sum().item(), sample.abs().mean().item()


NEAR_ONE = {"set_alpha_to_one": True, "beta_start": 0.01}
NEAR_FIRST = {"set_alpha_to_one": False, "beta_start": 0.01}


@pytest.mark.parametrize(
    ("kind", "settings", "total", "mean"),
    [
        (DDIMScheduler, {}, 172.0067, 0.223967),
        (DDIMScheduler, {"prediction_type": "v_prediction"}, 52.5302, 0.0684),
        (DDIMScheduler, NEAR_ONE, 149.8295, 0.1951),
        (DDIMScheduler, NEAR_FIRST, 149.0784, 0.1941),
        (DDIMInverseScheduler, {}, 671.6816, 0.8746),
        (DDIMInverseScheduler, {"prediction_type": "v_prediction"}, 1394.2185, 1.8154),
        (DDIMInverseScheduler, NEAR_ONE, 539.9622, 0.7031),
        (DDIMInverseScheduler, NEAR_FIRST, 542.6722, 0.7066),
    ],
    ids=str,
)
def test_published_sums(kind, settings, total, mean):
    """Specification 9.2."""
    made = full_loop(kind(**{"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": True, **settings}))
    assert made == (pytest.approx(total, abs=1e-2), pytest.approx(mean, abs=1e-3))


def test_published_sum_from_added_noise():
    made = full_loop(DDIMScheduler(beta_start=0.0001, beta_end=0.02), from_noise_at=8)
    assert made == (pytest.approx(354.5418, abs=1e-2), pytest.approx(0.4616, abs=1e-3))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS[:2])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_inverse_and_solver_are_inverse_of_each_other(steps, spacing, prediction):
    """With an eps that does not depend on the state: from the level before the first timestep up and down."""
    settings = {**LATENT, "timestep_spacing": spacing, "prediction_type": prediction}
    up, down = DDIMInverseScheduler(**settings), DDIMScheduler(**settings)
    up.set_timesteps(steps)
    down.set_timesteps(steps)
    start, eps = torch.randn(2, *SHAPE, dtype=torch.float64)

    def network(x, signal, noise):
        x0 = (x - noise * eps) / signal
        return {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - noise * x0}[prediction]

    levels, stride, x = down._levels, 1000 // steps, start
    for t in up.timesteps.tolist():
        here = max(t - stride, -1)
        x = up.step(network(x, levels.signal[here], levels.noise[here]), t, x).prev_sample
    top = down.timesteps[0]
    # The factors are fp32 numbers: their squares add up to 1 within rounding, on which v relies at each step.
    largest = max(start.abs().max().item(), eps.abs().max().item())
    exactly = 1e-9 if prediction != "v_prediction" else (steps + 10) * 2**-23 * largest
    if 1000 % steps == 0:  # else the levels of two steps do not meet
        top = int(down.timesteps[0])
        x0 = (start - levels.noise[-1] * eps) / levels.signal[-1]
        assert (x - levels.signal[top] * x0 - levels.noise[top] * eps).abs().max() < exactly
    assert (x - start).abs().max() > (0.01 if steps == 1 and spacing == "leading" else 0.5)
    for t in down.timesteps.tolist():
        x = down.step(network(x, levels.signal[t], levels.noise[t]), t, x).prev_sample
    assert x.dtype == torch.float64 and (x - start).abs().max() < exactly


def test_first_inverse_step_is_tiny_with_stable_diffusions_file():
    """From abar[0] to abar[1], as steps_offset is 1 and the level before timestep 0 that of timestep 0."""
    ours, theirs = both(LATENT, 50, inverse=True)
    sample, eps = torch.randn(2, *SHAPE)
    moved = ours.step(eps, 1, sample)[0] - sample
    assert moved.abs().max() < 0.1
    assert torch.equal(ours.step(eps, 1, sample)[0], theirs.step(eps, 1, sample)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_add_noise_and_velocity(dtype):
    ours, theirs = both(SD, 10)
    clean, noise = torch.randn(2, *SHAPE).to(dtype)
    exact = diffusers.DDIMScheduler(**SD)
    exact.alphas_cumprod = exact.alphas_cumprod.double()
    for t in (torch.tensor([3, 981]), torch.tensor([500]), torch.tensor(721)):
        for name in ("add_noise", "get_velocity"):
            mine, expected = (getattr(s, name)(clean, noise, t) for s in (ours, theirs))
            truth = getattr(exact, name)(clean.double(), noise.double(), t)
            assert mine.dtype == expected.dtype == dtype
            if dtype in (torch.float32, torch.float64):
                assert torch.equal(mine, expected)
            assert (mine - truth).abs().max() <= (expected - truth).abs().max() + 1e-12
    assert torch.equal(ours.add_noise(clean, noise, 721), ours.add_noise(clean, noise, torch.tensor(721)))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_fp32(dtype, inverse):
    ours, theirs = both({**LATENT, "prediction_type": "v_prediction"}, 20, inverse)
    for t in ours.timesteps:
        output, sample = torch.randn(2, *SHAPE).to(dtype)
        mine, expected = ours.step(output, t, sample), theirs.step(output, t, sample)
        truth = theirs.step(output.double(), t, sample.double())
        for one, other, true in zip(mine, expected.to_tuple(), truth.to_tuple(), strict=True):
            assert one.dtype == dtype
            assert (one - true).abs().max() <= (other - true).abs().max()
    assert ours.step(output.float(), t, sample)[0].dtype == dtype
    assert ours.step(output, t, sample.float())[0].dtype == torch.float32


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_timesteps_are_read_in_any_form_and_order(inverse):
    ours, theirs = both(LATENT, 10, inverse)
    output, sample = torch.randn(2, *SHAPE)
    for t in (901, 1, 444, 100, 901):  # 444 is not in the table
        expected = theirs.step(output, t, sample)[0]
        for form in (t, torch.tensor(t), torch.tensor([t]), torch.tensor(float(t)), np.int64(t)):
            assert torch.equal(ours.step(output, form, sample)[0], expected)
    for place in (3, 0, 7):
        views = [ours.timesteps[place], ours.timesteps[place - 10 :][0], ours.timesteps[place].expand(1)]
        expected = theirs.step(output, theirs.timesteps[place], sample)[0]
        assert all(torch.equal(ours.step(output, view, sample)[0], expected) for view in views)
    old = ours.timesteps
    ours.set_timesteps(10)
    assert torch.equal(ours.step(output, old[4], sample)[0], ours.step(output, ours.timesteps[4], sample)[0])
    with pytest.raises(ValueError, match=r"timestep of shape \(2,\)"):
        ours.step(output, ours.timesteps[:2], sample)


def test_timesteps_on_an_accelerator_are_not_read_back():
    """A tensor on the meta device has no value to be read."""
    ours = DDIMScheduler(**LATENT)
    ours.set_timesteps(10, device="meta")
    output, sample = torch.randn(2, *SHAPE)
    expected = [ours.step(output, t, sample)[0] for t in range(901, 0, -100)]
    made = [ours.step(output, t, sample)[0] for t in ours.timesteps]
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_what_step_returns(inverse):
    ours, _ = both(LATENT, 4, inverse)
    output, sample = torch.randn(2, *SHAPE)
    before = output.clone(), sample.clone()
    made = ours.step(output, 501, sample)
    assert made.prev_sample is made[0] and made.pred_original_sample is made[1]
    plain = ours.step(output, 501, sample, return_dict=False)
    assert type(plain) is tuple and all(torch.equal(a, b) for a, b in zip(plain, made, strict=True))
    assert torch.equal(output, before[0]) and torch.equal(sample, before[1])
    assert ours.scale_model_input(sample, 501) is sample


# Configs.


SD_FILE = {
    **{"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012},
    **{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000},
    **{"set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None},
}


@pytest.mark.parametrize("kind", [DDIMScheduler, DDIMInverseScheduler])
def test_file_of_a_solver_that_never_clips(kind, tmp_path):
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SD_FILE))
    ours = kind.from_pretrained(tmp_path, subfolder="scheduler")
    assert ours.config.clip_sample is False and ours.config.skip_prk_steps is True
    assert ours.config.steps_offset == 1 and ours.config.set_alpha_to_one is False
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"):
        assert kind.from_config({**SD_FILE, "_class_name": name}).config.clip_sample is False
    for name in ("DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"):
        assert kind.from_config({**SD_FILE, "_class_name": name}).config.clip_sample is True
    assert kind.from_config({**SD_FILE, "clip_sample": True}).config.clip_sample is True
    assert kind.from_config(SD_FILE, clip_sample=True).config.clip_sample is True
    assert kind().config.clip_sample is True


@pytest.mark.parametrize(
    "model", ["stable-diffusion-v1-5", "stable-diffusion-2-1", "stable-diffusion-2-1-base"]
)
def test_published_files(model, shared_data, tmp_path):
    """Read, and written so that diffusers opens the same solver; one class from the other as in the seeds."""
    ours = DDIMScheduler.from_pretrained(shared_data / model, subfolder="scheduler")
    inverse = DDIMInverseScheduler.from_config(ours.config)
    theirs = diffusers.DDIMScheduler.from_pretrained(shared_data / model, subfolder="scheduler")
    for scheduler, reference in (
        (ours, theirs),
        (inverse, diffusers.DDIMInverseScheduler.from_config(theirs.config)),
    ):
        scheduler.save_pretrained(tmp_path / type(scheduler).__name__)
        again = type(reference).from_pretrained(tmp_path / type(scheduler).__name__)
        scheduler.set_timesteps(8)
        for other in (reference, again):
            other.set_timesteps(8)
            run_both(scheduler, other)
    assert DDIMScheduler.from_config(inverse.config).config == ours.config


def test_what_is_changed_reaches_the_inverse():
    """The reference loses what its pipeline patched: there the copy has steps_offset 0."""
    ours = DDIMScheduler(**SD, steps_offset=1, thresholding=True)
    inverse = DDIMInverseScheduler.from_config(ours.config)
    assert inverse.config.steps_offset == 1 and inverse.config["thresholding"] is True
    assert DDIMScheduler.from_config(inverse.config).config == ours.config


# All but one, which needs a package that the tests do not install.
RELATIVES = {d.name for d in diffusers.schedulers.KarrasDiffusionSchedulers} - {"DPMSolverSDEScheduler"}


@pytest.mark.parametrize("name", sorted(RELATIVES))
@pytest.mark.filterwarnings("ignore")
def test_configs_of_every_relative(name):
    config = dict(getattr(diffusers, name)().config)
    config.pop("_use_default_values", None)  # as in a file
    assert {key for key in config if not key.startswith("_")} <= FAMILY
    ours = DDIMScheduler.from_config(config, beta_end=0.015)
    theirs = diffusers.DDIMScheduler.from_config(config, beta_end=0.015)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    for key in theirs.config:
        if key != "clip_sample" and not key.startswith("_") and key in ours.Config.names():
            assert ours.config[key] == theirs.config[key], key


def test_settings_are_the_references():
    for ours, theirs in both({}), both({}, inverse=True):
        expected = {key: value for key, value in theirs.config.items() if not key.startswith("_")}
        assert ours.config.to_dict() == expected


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_older_name_of_the_level_before_timestep_0(value):
    for other in (True, False):
        settings = {**SD, "set_alpha_to_one": other, "set_alpha_to_zero": value}
        ours, theirs = DDIMInverseScheduler(**settings), diffusers.DDIMInverseScheduler(**settings)
        assert torch.equal(ours.initial_alpha_cumprod, theirs.initial_alpha_cumprod)
        assert ours.config.set_alpha_to_one is value and "set_alpha_to_zero" not in ours.config


def test_trained_betas_survive_a_round_trip(tmp_path):
    ours = DDIMScheduler(**TABLES["trained"])
    ours.save_pretrained(tmp_path)
    again = DDIMScheduler.from_pretrained(tmp_path)
    assert again.config == ours.config and torch.equal(again.alphas_cumprod, ours.alphas_cumprod)
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    assert torch.equal(theirs.alphas_cumprod, ours.alphas_cumprod)


def test_copies_are_whole():
    ours, _ = both(LATENT, 10)
    output, sample = torch.randn(2, *SHAPE)
    expected = ours.step(output, ours.timesteps[3], sample)[0]
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied.step(output, copied.timesteps[3], sample)[0], expected)
        assert copied.config == ours.config


# What is refused.


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"beta_schedule": "sigmoid"}, ValueError, "beta_schedule='sigmoid'"),
        ({"prediction_type": "flow_prediction"}, ValueError, "prediction_type='flow_prediction'"),
        ({"timestep_spacing": "log"}, ValueError, "timestep_spacing='log'"),
        ({"trained_betas": []}, ValueError, "trained_betas is empty"),
        ({"num_train_timesteps": 0}, ValueError, "num_train_timesteps=0"),
        ({"solver_order": 2}, TypeError, "no setting 'solver_order'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [DDIMScheduler, DDIMInverseScheduler])
def test_settings_that_are_refused(settings, error, message, kind):
    with pytest.raises(error, match=message):
        kind(**settings)
    if error is ValueError:
        with pytest.raises(ValueError, match=message):
            kind.from_config(settings)


def test_pair_of_a_file_that_cannot_be_inverted():
    config = {**SD_FILE, "_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}
    solver, inverse = module.ddim_pair(config, prediction_type="v_prediction")
    for scheduler in (solver, inverse):
        scheduler.set_timesteps(50)
        assert scheduler.config.prediction_type == "v_prediction" and not scheduler.config.clip_sample
    assert solver.timesteps.tolist() == inverse.timesteps.tolist()[::-1] == list(range(981, 0, -20))
    solver, inverse = module.ddim_pair({**SD_FILE, "timestep_spacing": "trailing"})
    assert solver.config.timestep_spacing == inverse.config.timestep_spacing == "trailing"


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, True, None, "5"])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDIMInverseScheduler])
def test_numbers_of_steps_that_are_refused(kind, steps):
    with pytest.raises(ValueError, match="num_inference_steps=.*from 1 to 1000"):
        kind().set_timesteps(steps)


def test_calls_that_are_refused():
    output = sample = torch.randn(SHAPE)
    for kind in (DDIMScheduler, DDIMInverseScheduler):
        scheduler = kind(**LATENT)
        with pytest.raises(ValueError, match="call set_timesteps before step"):
            scheduler.step(output, 1, sample)
        scheduler.set_timesteps(1000)
        for timestep in (1000, -1):
            with pytest.raises(IndexError, match=f"timestep {timestep}: .* 0 to 999"):
                scheduler.step(output, timestep, sample)
        scheduler.step(output, 999, sample)
    with pytest.raises(ValueError, match="'linspace' cannot be inverted"):
        DDIMInverseScheduler(timestep_spacing="linspace").set_timesteps(5)
    solver = DDIMScheduler(**LATENT)
    solver.set_timesteps(5)
    for eta in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="eta="):
            solver.step(output, 1, sample, eta=eta)
    with pytest.raises(ValueError, match="exclude each other"):
        solver.step(output, 1, sample, eta=0.5, generator=torch.Generator(), variance_noise=sample)
