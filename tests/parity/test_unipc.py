"""UniPCMultistepScheduler: tables and steps equal to diffusers', and right where those are not."""

import copy
import itertools
import json
import pickle

import diffusers
import numpy as np
import pytest
import torch

import joyedit
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.scheduler import FAMILY
from joyedit.schedulers.unipc import UniPCMultistepScheduler as Ours

Theirs = diffusers.UniPCMultistepScheduler

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CHRONO = {**FLOW, "flow_shift": 5.0}
SIGMAS = {
    "diffusion": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "flow": {"use_flow_sigmas": True, "flow_shift": 5.0},
    "flow karras": {"use_flow_sigmas": True, "use_karras_sigmas": True},
}

# name: settings, arguments of set_timesteps beside S
OPTIONS = {
    "other training length": ({"num_train_timesteps": 250}, {}),
    "other training length, flow": ({**CHRONO, "num_train_timesteps": 250}, {}),
    "scaled linear, leading, offset": (
        {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1},
        {},
    ),
    "cosine, trailing": ({"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}, {}),
    "trained betas": ({"trained_betas": np.linspace(1e-3, 0.1, 50), "num_train_timesteps": 50}, {}),
    "sigma_min, trailing": ({"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}, {}),
    "no signal at the end": ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
    "no signal, v": ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {}),
    "karras between": ({"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0}, {}),
    "exponential between": ({"use_exponential_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0}, {}),
    "beta between": ({"use_beta_sigmas": True, "sigma_min": 0.1, "sigma_max": 20.0}, {}),
    "thresholding": ({"thresholding": True, "sample_max_value": 1.7}, {}),
    "thresholding, flow": ({**CHRONO, "thresholding": True, "dynamic_thresholding_ratio": 0.9}, {}),
    "disabled corrector": ({**CHRONO, "disable_corrector": [0, 2, 3]}, {}),
    "shift below 1": ({**FLOW, "flow_shift": 0.5}, {}),
    "exponential mu": ({**FLOW, "use_dynamic_shifting": True}, {"mu": 0.83}),
    "linear mu": ({**FLOW, "use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 2.3}),
    "terminal": ({**CHRONO, "shift_terminal": 0.1}, {}),
    "terminal, mu": ({**FLOW, "use_dynamic_shifting": True, "shift_terminal": 0.02}, {"mu": 1.1}),
    "order 4": ({**CHRONO, "solver_order": 4}, {}),
    "older solver type": ({"solver_type": "midpoint"}, {}),
}


def both(settings, n=None, **arguments):
    ours, theirs = Ours(**settings), Theirs(**settings)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(n, **arguments)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.timesteps.dtype == torch.int64
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    assert ours.sigmas.dtype == torch.float32
    assert ours.num_inference_steps == theirs.num_inference_steps
    assert (ours.step_index, ours.begin_index) == (theirs.step_index, theirs.begin_index) == (None, None)
    return ours, theirs


def assert_same_steps(ours, theirs, shape=(2, 3, 5), dtype=torch.float32, limit=0.0):
    """Every step within `limit` of the largest value, from ours each time. Where the reference has no finite
    result, ours must."""
    mine = sample = torch.randn(shape, dtype=dtype)
    for i, t in enumerate(theirs.timesteps):
        output = torch.randn(shape, dtype=dtype)
        mine = ours.step(output, t, mine).prev_sample
        assert mine.isfinite().all() and mine.dtype == dtype
        try:
            sample = theirs.step(output, t, sample).prev_sample
        except (AssertionError, torch.linalg.LinAlgError):
            return
        if not sample.isfinite().all():
            return
        assert ours.step_index == theirs.step_index == i + 1
        error = ((mine - sample).abs().max() / sample.abs().max()).item()
        assert error <= limit, f"step {i}: {error}"


@pytest.mark.parametrize(
    ("solver_type", "order"),
    [
        *(("bh1", 3), ("bh2", 1), ("bh2", 2)),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("bh1", 1), ("bh1", 2), ("bh2", 3))),
    ],
)
@pytest.mark.parametrize("sigmas", SIGMAS)
def test_tables_and_steps(sigmas, solver_type, order):
    kinds = ("epsilon", "sample", "v_prediction", "flow_prediction")
    flags = (True, False)
    rules = ("zero", "sigma_min")
    for kind, predict_x0, final, lower in itertools.product(kinds, flags, rules, flags):
        settings = {
            **SIGMAS[sigmas],
            "solver_order": order,
            "solver_type": solver_type,
            "prediction_type": kind,
            "predict_x0": predict_x0,
            "final_sigmas_type": final,
            "lower_order_final": lower,
        }
        if kind == "flow_prediction" and not ("use_flow_sigmas" in settings and predict_x0):
            continue  # the reference has no such solver, or one of no meaning
        assert_same_steps(*both(settings, 6 if lower else 4), limit=2e-7 if sigmas == "beta" else 0)


@pytest.mark.parametrize("sigmas", SIGMAS)
def test_few_steps(sigmas):
    for n, order in itertools.product((1, 2, 3), (1, 3)):
        assert_same_steps(*both({**SIGMAS[sigmas], "solver_order": order}, n), limit=2e-7)


@pytest.mark.parametrize("option", OPTIONS)
def test_tables_and_steps_for_every_option(option):
    settings, arguments = OPTIONS[option]
    for n in (2, 3, 10):
        assert_same_steps(*both(settings, n, **arguments), limit=2e-7 if "beta" in option else 0)


@pytest.mark.parametrize("n", [1, 2, 8, 50, 150])
def test_as_chronoedit_uses_it(n):
    for shift in (2.0, 5.0):
        assert_same_steps(*both({**CHRONO, "flow_shift": shift}, n), shape=(1, 2, 3, 4, 5))


@pytest.mark.parametrize("given", [[0.95, 0.7, 0.2], [1.0, 0.81, 0.6, 0.37, 0.2], np.linspace(1, 0.2, 5)])
def test_custom_sigmas(given):
    array = np.array(given)  # the reference fails on lists
    assert_same_steps(*both(CHRONO, sigmas=array))
    assert_same_steps(*both({**FLOW, "use_dynamic_shifting": True}, sigmas=array, mu=1.3))
    assert array.tolist() == list(given)
    ours = Ours(**CHRONO)
    ours.set_timesteps(sigmas=array)
    table = ours.sigmas
    for same in (list(given), torch.tensor(array)):
        ours.set_timesteps(len(given), sigmas=same)
        assert torch.equal(ours.sigmas, table) and ours.num_inference_steps == len(given)


def test_check_values():
    """Specification 6.1 and 6.3."""
    expected = {
        (50, 5.0): [999, 995, 991, 987, 982, 305, 244, 175, 96],
        (8, 2.0): [999, 933, 857, 769, 667, 546, 400, 223],
        (4, 5.0): [999, 937, 833, 625],
    }
    for (n, shift), values in expected.items():
        ours = Ours(**{**FLOW, "flow_shift": shift})
        ours.set_timesteps(n)
        found = ours.timesteps.tolist()
        assert found[:5] + found[-4:] == values if n == 50 else found == values
    ours = Ours(**CHRONO)
    ours.set_timesteps(50)
    ends = [ours.sigmas[0], ours.sigmas[-2], ours.sigmas[-1]]
    np.testing.assert_allclose(ends, [0.99999899, 0.09677836, 0], rtol=1e-7)
    orders = []
    sample = torch.randn(1, 2)
    for t in ours.timesteps[:4]:
        ours.step(sample, t, sample)
        orders.append(ours._last_order)
    assert orders == [1, 2, 2, 2]
    for spacing, first, second, last in (
        ("linspace", 999, 899, 100),
        ("leading", 900, 810, 90),
        ("trailing", 999, 899, 99),
    ):
        ours = Ours(timestep_spacing=spacing)
        ours.set_timesteps(10)
        assert ours.timesteps[[0, 1, -1]].tolist() == [first, second, last]
    ours = Ours(use_flow_sigmas=True, use_karras_sigmas=True)
    ours.set_timesteps(6)
    assert ours.timesteps.tolist() == [993, 980, 928, 707, 208, 9]


@pytest.mark.parametrize("settings", [CHRONO, {"use_karras_sigmas": True}, {**CHRONO, "solver_order": 3}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sample_dtype", ["same", torch.float32])
def test_half_precision_is_no_worse_than_the_references(settings, dtype, sample_dtype):
    """Against float64, over a whole run. ChronoEdit: fp32 latents, velocities in bf16."""
    kept = dtype if sample_dtype == "same" else sample_dtype
    torch.manual_seed(1)
    start = torch.randn(2, 4, 8, 8).to(kept)
    outputs = [torch.randn(2, 4, 8, 8).to(dtype) for _ in range(12)]
    results = []
    for kind, of_sample, of_output in (
        (Ours, kept, dtype),
        (Theirs, kept, dtype),
        (Theirs, torch.float64, torch.float64),
    ):
        scheduler = kind(**settings)
        scheduler.set_timesteps(12)
        x = start.to(of_sample)
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            x = scheduler.step(output.to(of_output), t, x).prev_sample
        assert x.dtype == of_sample
        results.append(x.double())
    ours, theirs, exact = results
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()
    assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()


def test_half_precision_is_rounded_at_the_end_of_a_step():
    ours, _ = both(CHRONO, 4)
    whole = copy.deepcopy(ours)
    sample, velocity = torch.randn(2, 3, 50).bfloat16(), torch.randn(2, 3, 50).bfloat16()
    t = ours.timesteps[0]
    expected = whole.step(velocity.float(), t, sample.float()).prev_sample
    assert torch.equal(ours.step(velocity, t, sample).prev_sample, expected.bfloat16())


def test_float64_stays():
    assert_same_steps(*both(CHRONO, 6), dtype=torch.float64, limit=1e-14)


# What the reference gets wrong. The solver of a model that knows x0 and eps must stay on the line between.


def assert_on_the_line(settings, n, limit=2e-6, **arguments):
    """With the true output every step lands on alpha x0 + s eps, whatever the order; the last on x0."""
    ours = Ours(**settings)
    ours.set_timesteps(n, **arguments)
    x0, eps = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    signal, noise = (factor.double() for factor in ours._signal_and_noise(ours.sigmas))
    x = signal[0] * x0 + noise[0] * eps
    for i, t in enumerate(ours.timesteps):
        output = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": signal[i] * eps - noise[i] * x0,
            "flow_prediction": eps - x0,
        }[ours.config.prediction_type]
        x = ours.step(output, t, x).prev_sample
        torch.testing.assert_close(x, signal[i + 1] * x0 + noise[i + 1] * eps, rtol=0, atol=limit)
    assert ours.step_index == len(ours.timesteps)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_the_step_to_sigma_0(sigmas, solver_type, kind):
    for order, predict_x0, lower in itertools.product((1, 2, 3), (True, False), (True, False)):
        rest = {"solver_order": order, "predict_x0": predict_x0, "lower_order_final": lower}
        rest = {"prediction_type": kind, "solver_type": solver_type, **rest}
        if "flow" in sigmas and (kind == "v_prediction" or not predict_x0):
            continue  # the first is defined where alpha^2 + s^2 = 1, the second divides by alpha = 1e-6
        if not predict_x0 and kind != "epsilon":
            continue  # eps from x0 divides by s, which is small at the end
        assert_on_the_line({**SIGMAS[sigmas], **rest}, 6, limit=1e-4 if predict_x0 else 1e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_reference_fails_there():
    def last(**settings):
        theirs = Theirs(**settings)
        theirs.set_timesteps(4)
        x = torch.randn(1, 2, 3)
        for t in theirs.timesteps:
            x = theirs.step(torch.randn(1, 2, 3), t, x).prev_sample
        return x

    assert last(solver_type="bh1").isnan().all()
    assert not last(lower_order_final=False).isfinite().any()
    assert last(predict_x0=False).isnan().all()
    with pytest.raises(torch.linalg.LinAlgError):
        last(lower_order_final=False, solver_order=3)


@pytest.mark.parametrize("spacing", ["use_exponential_sigmas", "use_beta_sigmas", "use_karras_sigmas"])
def test_spaced_flow_sigmas_are_converted(spacing):
    """The reference converts those of Karras only and takes sigma = 157 for a flow level: NaN."""
    settings = {**FLOW, spacing: True}
    diffusion, flow = Ours(**{spacing: True}), Ours(**settings)
    for scheduler in (diffusion, flow):
        scheduler.set_timesteps(6)
    sigma = diffusion.sigmas.double()
    torch.testing.assert_close(flow.sigmas.double(), sigma / (1 + sigma))
    assert flow.timesteps.tolist() == (sigma / (1 + sigma) * 1000)[:-1].long().tolist()
    assert_on_the_line(settings, 6)
    if spacing != "use_karras_sigmas":
        theirs = Theirs(**settings)
        theirs.set_timesteps(6)
        assert theirs.sigmas[0] > 100


def test_many_steps_that_share_timesteps():
    """With shift 5 the first two of 300 levels have the same whole timestep. The reference starts at the
    second and has none left for its last step."""
    ours, theirs = both(CHRONO, 300)
    assert ours.timesteps[0] == ours.timesteps[1]
    x = sample = torch.randn(1, 2)
    for i, t in enumerate(ours.timesteps):
        assert ours.step_index == (i or None)
        x = ours.step(sample, t, x).prev_sample
    assert x.isfinite().all()
    with pytest.raises(AssertionError):
        for t in theirs.timesteps:
            theirs.step(sample, t, sample)
    theirs.set_timesteps(300)
    theirs.set_begin_index(0)
    ours.set_timesteps(300)
    for t in ours.timesteps[:20]:
        output = torch.randn(1, 2)
        assert torch.equal(ours.step(output, t, sample)[0], theirs.step(output, t, sample)[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_step_with_a_terminal_shift():
    theirs = Theirs(**CHRONO, shift_terminal=0.1)
    theirs.set_timesteps(1)
    assert theirs.sigmas.isnan().any()
    assert_on_the_line({**CHRONO, "shift_terminal": 0.1}, 1)


def test_trailing_spacing_has_as_many_steps_as_asked_for():
    theirs = Theirs(timestep_spacing="trailing")
    theirs.set_timesteps(61)
    assert len(theirs.timesteps) == 62 and theirs.timesteps[-1] == -1
    ours = Ours(timestep_spacing="trailing")
    ours.set_timesteps(61)
    assert torch.equal(ours.timesteps, theirs.timesteps[:-1])


def test_x0_is_reached_whatever_the_model():
    """The last step of the recipe is of order 1 and ends at the last x0 itself."""
    ours = Ours(**CHRONO)
    ours.set_timesteps(3)
    x = torch.randn(1, 2, 3)
    for t in ours.timesteps:
        velocity, level = torch.randn(1, 2, 3), ours.sigmas[ours.step_index or 0]
        expected = x - level * velocity
        x = ours.step(velocity, t, x).prev_sample
    assert torch.equal(x, expected)


# Frames.


@pytest.mark.parametrize("settings", [CHRONO, {**CHRONO, "solver_order": 3}])
@pytest.mark.parametrize("k", [0, 1, 3, 5])
@pytest.mark.parametrize("index", [[0, -1], torch.tensor([0, 3]), [True, False, False, True]], ids=repr)
def test_select_frames_in_the_middle_of_a_run(index, k, settings):
    """Equal to the reference whose history its pipeline cuts, and to a run of those frames alone."""
    index = torch.tensor(index) if isinstance(index[0], bool) else index
    ours, theirs = both(settings, 6)
    alone, _ = both(settings, 6)
    x = sample = torch.randn(2, 3, 4, 5, 6)
    few = x[:, :, [0, -1]]
    for i, t in enumerate(ours.timesteps):
        if i == k:
            x, sample = x[:, :, [0, -1]], sample[:, :, [0, -1]]
            ours.select_frames(index)
            theirs.model_outputs = [m if m is None else m[:, :, [0, -1]] for m in theirs.model_outputs]
            if theirs.last_sample is not None:
                theirs.last_sample = theirs.last_sample[:, :, [0, -1]]
        velocity = torch.randn(x.shape)
        few = alone.step(velocity[:, :, [0, -1]], t, few).prev_sample
        x = ours.step(velocity, t, x).prev_sample
        sample = theirs.step(velocity, t, sample).prev_sample
        assert torch.equal(x[:, :, [0, -1]], few)
        torch.testing.assert_close(x, sample, rtol=0, atol=3e-7 * sample.abs().max().item())


def test_frames_that_were_cut_without_a_word_are_refused():
    ours = Ours(**CHRONO)
    ours.set_timesteps(4)
    x = torch.randn(1, 2, 4, 3, 3)
    x = ours.step(x, ours.timesteps[0], x).prev_sample[:, :, :1]
    with pytest.raises(ValueError, match="select_frames"):
        ours.step(x, ours.timesteps[1], x)
    with pytest.raises(ValueError, match="model_output"):
        ours.step(torch.randn(1, 2, 1, 3, 3), ours.timesteps[1], torch.randn(1, 2, 4, 3, 3))
    assert ours.step_index == 1


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(shift=5.0), DDIMScheduler()])
def test_solvers_without_a_history_have_nothing_to_select(scheduler):
    scheduler.set_timesteps(4)
    x = torch.randn(1, 2, 4, 3, 3)
    x = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    other = copy.deepcopy(scheduler)
    scheduler.select_frames([0, -1])
    few = x[:, :, [0, -1]]
    cut = scheduler.step(few, scheduler.timesteps[1], few).prev_sample
    assert torch.equal(cut, other.step(x, scheduler.timesteps[1], x).prev_sample[:, :, [0, -1]])


# Runs.


def test_set_timesteps_forgets_the_run():
    ours, theirs = both(CHRONO, 4)
    for t in ours.timesteps[:3]:
        ours.step(torch.randn(1, 2, 3), t, torch.randn(1, 2, 3))
    ours.set_begin_index(1)
    ours.set_timesteps(4)
    assert ours.step_index is ours.begin_index is ours.last_sample is None and not ours.model_outputs
    assert_same_steps(ours, theirs)
    with pytest.raises(IndexError, match="4 steps"):
        ours.step(torch.randn(2, 3, 5), ours.timesteps[-1], torch.randn(2, 3, 5))


@pytest.mark.parametrize("begin", [None, 3])
def test_a_run_that_starts_in_the_middle(begin):
    ours, theirs = both({**CHRONO, "solver_order": 3}, 9)
    x = sample = torch.randn(2, 3, 5)
    if begin is not None:
        ours.set_begin_index(begin)
        theirs.set_begin_index(begin)
    for t in ours.timesteps[3:]:
        velocity = torch.randn(2, 3, 5)
        x, sample = ours.step(velocity, t, x)[0], theirs.step(velocity, int(t), sample)[0]
        assert torch.equal(x, sample) and ours.step_index == theirs.step_index
    assert ours.begin_index == begin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [None, 3])
@pytest.mark.parametrize("settings", [CHRONO, {}])
def test_noise_is_added(settings, begin, dtype):
    ours, theirs = both(settings, 10)
    sample, noise = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 3, 5).to(dtype)
    t = ours.timesteps[[2, 7]]
    tolerance = {"rtol": 0, "atol": 0 if dtype == torch.float32 else 0.05}
    for scheduler in (ours, theirs):
        if begin is not None:
            scheduler.set_begin_index(begin)
    for _ in range(2):
        a, b = ours.add_noise(sample, noise, t), theirs.add_noise(sample, noise, t)
        torch.testing.assert_close(a, b, **tolerance)
        assert torch.equal(ours.scale_noise(sample, t, noise), a)
        ours.step(noise, ours.timesteps[2], sample)
        theirs.step(noise, theirs.timesteps[2], sample)
    assert ours.scale_model_input(sample, t) is sample


def test_another_predictor():
    """solver_p: its steps, our corrections."""
    ours = Ours(solver_p=DDIMScheduler(clip_sample=False), timestep_spacing="trailing")
    theirs = Theirs(solver_p=diffusers.DDIMScheduler(clip_sample=False), timestep_spacing="trailing")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
        assert scheduler.solver_p.num_inference_steps == 8
    assert_same_steps(ours, theirs, limit=1e-6)
    assert "solver_p" not in ours.config
    changed = Ours.from_config(Ours().config, solver_p=DDIMScheduler())
    assert isinstance(changed.solver_p, DDIMScheduler)
    changed.set_timesteps(3)
    changed.select_frames([0])


def test_what_step_returns():
    ours, _ = both(CHRONO, 3)
    sample = torch.randn(2, 3)
    out = ours.step(sample, ours.timesteps[0], sample)
    assert out.prev_sample is out[0]
    plain = ours.step(sample, ours.timesteps[1], sample, return_dict=False)
    assert type(plain) is tuple and len(plain) == 1


def test_before_set_timesteps():
    ours, theirs = Ours(), Theirs()
    assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert len(ours) == len(theirs) and ours.order == theirs.order
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    with pytest.raises(ValueError, match="set_timesteps"):
        ours.step(torch.randn(1), 999, torch.randn(1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_in_the_middle_goes_on_alone(copied):
    ours, _ = both({**CHRONO, "disable_corrector": [3]}, 6)
    x = torch.randn(1, 2, 3)
    for t in ours.timesteps[:3]:
        x = ours.step(x, t, x).prev_sample
    other, y = copied(ours), x
    for t in ours.timesteps[3:]:
        x = ours.step(x, t, x).prev_sample
    assert other.step_index == 3 and len(other.model_outputs) == 2
    for t in other.timesteps[3:]:
        y = other.step(y, t, y).prev_sample
    assert torch.equal(x, y)


# Configs.


def test_the_published_config(shared_data):
    found = sorted((shared_data / "chronoedit-14b").rglob("scheduler_config.json"))
    raw = json.loads(found[0].read_text())
    ours = Ours.from_config(found[0])
    assert (ours.config.flow_shift, ours.config.solver_order) == (5.0, 2)
    assert ours.config_to_save().items() >= {k: v for k, v in raw.items() if not k.startswith("_")}.items()
    theirs = Theirs.from_config(raw)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(50)
    assert_same_steps(ours, theirs)
    distilled = joyedit.UniPCMultistepScheduler.from_config(ours.config, flow_shift=2.0)
    distilled.set_timesteps(8)
    assert distilled.timesteps.tolist() == [999, 933, 857, 769, 667, 546, 400, 223]


def test_config_round_trip_through_both(tmp_path):
    changed = {"flow_shift": 2.5, **FLOW, "solver_order": 3, "disable_corrector": [1, 4], "steps_offset": 1}
    changed |= {"solver_type": "bh1", "sample_max_value": 2.0, "final_sigmas_type": "sigma_min"}
    Ours(**changed).save_pretrained(tmp_path / "ours")
    Theirs(**changed).save_pretrained(tmp_path / "theirs")
    for source in ("ours", "theirs"):
        ours, theirs = Ours.from_pretrained(tmp_path / source), Theirs.from_pretrained(tmp_path / source)
        for name, value in changed.items():
            expected = tuple(value) if isinstance(value, list) else value
            assert ours.config[name] == expected and theirs.config[name] == value
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(6)
        assert_same_steps(ours, theirs)
    again = Ours.from_pretrained(tmp_path / "ours", flow_shift=3.0, use_karras_sigmas=True)
    assert (again.config.flow_shift, again.config.use_karras_sigmas) == (3.0, True)


def test_defaults_are_the_references():
    theirs = {k: v for k, v in Theirs().config.items() if not k.startswith("_") and k != "solver_p"}
    assert Ours().config.to_dict() == theirs
    assert theirs.keys() <= FAMILY


def test_from_a_flow_match_config():
    """The reference makes an epsilon solver of it, without a word."""
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = Ours.from_config(flow.config)
    assert (ours.config.use_flow_sigmas, ours.config.prediction_type) == (True, "flow_prediction")
    assert ours.config.flow_shift == 3.0
    assert not Theirs.from_config(dict(flow.config)).config.use_flow_sigmas
    ours.set_timesteps(8)
    expected = Theirs(**FLOW, flow_shift=3.0)
    expected.set_timesteps(8)
    assert torch.equal(ours.sigmas, expected.sigmas)

    distilled = Ours.from_config(flow.config, flow_shift=2.0)
    assert distilled.config.flow_shift == 2.0
    assert FlowMatchEulerDiscreteScheduler.from_config(distilled.config).shift == 2.0  # and back
    assert Ours.from_config(distilled.config, flow_shift=4.0).config.shift == 4.0
    assert Ours.from_config(distilled.config).config == distilled.config
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    dynamic = Ours.from_config(theirs.config)
    dynamic.set_timesteps(4, mu=0.5)
    assert dynamic.config.use_dynamic_shifting
    assert_on_the_line(dict(FLOW, use_dynamic_shifting=True), 4, mu=0.5)


def test_flow_match_from_our_config():
    assert FlowMatchEulerDiscreteScheduler.from_config(Ours(**CHRONO).config).shift == 5.0
    assert FlowMatchEulerDiscreteScheduler.from_config(Ours(flow_shift=5.0).config).shift == 1.0
    assert FlowMatchEulerDiscreteScheduler.from_config(Ours(**CHRONO).config, shift=2.0).shift == 2.0


@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_from_the_file_of_a_relative(kind, tmp_path):
    stable = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    relative = getattr(diffusers, kind)(**stable, prediction_type="v_prediction", timestep_spacing="leading")
    relative.save_pretrained(tmp_path)
    ours, theirs = Ours.from_config(tmp_path), Theirs.from_config(relative.config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert_same_steps(ours, theirs)
    raw = json.loads((tmp_path / "scheduler_config.json").read_text())
    kept = {k: v for k, v in raw.items() if not k.startswith("_") and k != "solver_type"}
    assert ours.config_to_save().items() >= kept.items()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"solver_order": 0}, "solver_order=0"),
        ({"num_train_timesteps": 0}, "num_train_timesteps=0"),
        ({"solver_type": "bh3"}, "bh1"),
        ({"prediction_type": "x0"}, "v_prediction"),
        ({"beta_schedule": "sigmoid"}, "scaled_linear"),
        ({"timestep_spacing": "even"}, "trailing"),
        ({"final_sigmas_type": "none"}, "sigma_min"),
        ({"time_shift_type": "cubic"}, "linear"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
        ({"use_flow_sigmas": True, "flow_shift": 0}, "flow_shift=0"),
        ({"shift_terminal": 0.1}, "shift_terminal needs"),
        ({"prediction_type": "flow_prediction"}, "needs use_flow_sigmas"),
        ({**FLOW, "predict_x0": False}, "needs predict_x0"),
        ({"trained_betas": []}, "trained_betas is empty"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Ours(**settings)


def test_other_settings_that_are_refused():
    with pytest.raises(TypeError, match="shift"):
        Ours(shift=3.0)
    with pytest.raises(ValueError, match="solver_p"):
        Ours.from_config({"solver_p": "DDIMScheduler"})
    assert Ours.from_config({"solver_p": None, "disable_corrector": None}).config.disable_corrector == ()


@pytest.mark.parametrize(
    "settings, arguments, message",
    [
        ({}, {}, "num_inference_steps=None"),
        ({}, {"num_inference_steps": 0}, "num_inference_steps=0"),
        ({}, {"num_inference_steps": True}, "num_inference_steps=True"),
        ({}, {"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
        ({}, {"num_inference_steps": 1000}, "do not fall"),
        ({"timestep_spacing": "leading"}, {"num_inference_steps": 1000}, "do not fall"),
        ({}, {"sigmas": [0.9, 0.5]}, "use_flow_sigmas"),
        ({**CHRONO, "use_karras_sigmas": True}, {"sigmas": [0.9, 0.5]}, "use_karras_sigmas"),
        (CHRONO, {"sigmas": [0.9, 0.5], "num_inference_steps": 3}, "2 sigmas"),
        (CHRONO, {"sigmas": [0.5, 0.9]}, "falling"),
        (CHRONO, {"sigmas": [0.5, 0.5]}, "falling"),
        (CHRONO, {"sigmas": [1.2, 0.5]}, "falling"),
        (CHRONO, {"sigmas": [0.5, 0.0]}, "falling"),
        (CHRONO, {"sigmas": [0.5, float("nan")]}, "falling"),
        (CHRONO, {"sigmas": []}, "falling"),
        ({**FLOW, "use_dynamic_shifting": True}, {"num_inference_steps": 4}, "mu must"),
    ],
)
def test_tables_that_are_refused(settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        Ours(**settings).set_timesteps(**arguments)


def test_a_timestep_that_is_not_in_the_table():
    """The reference takes its last step instead."""
    ours, _ = both(CHRONO, 4)
    with pytest.raises(ValueError, match="998"):
        ours.step(torch.randn(1), 998, torch.randn(1))
    with pytest.raises(ValueError, match="998"):
        ours.add_noise(torch.randn(1), torch.randn(1), torch.tensor([998]))
