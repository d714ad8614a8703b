"""FlowMatchEulerDiscreteScheduler: tables and steps equal to diffusers', and the original JoyAI schedule."""

import copy
import inspect
import json
import pickle
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file

from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler as Ours
from joyedit.schedulers.scheduler import FAMILY, beta_ppf

Theirs = diffusers.FlowMatchEulerDiscreteScheduler
GOLDENS = Path(__file__).resolve().parents[2] / "../shared/data/goldens/joyimage"
STEPS = (1, 2, 4, 30, 40, 50)
SHIFTS = (0.3, 1.0, 1.5, 3, 4.0, 7.0)

# name: settings, arguments of set_timesteps beside N
OPTIONS = {
    "plain": ({"shift": 1.5}, {}),
    "other training length": ({"shift": 1.5, "num_train_timesteps": 250}, {}),
    "exponential mu": ({"use_dynamic_shifting": True}, {"mu": 0.83}),
    "linear mu": ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"mu": 2.3}),
    "mu without effect": ({"shift": 2.0}, {"mu": 2.3}),
    "terminal": ({"shift": 1.5, "shift_terminal": 0.1}, {}),
    "terminal, exponential mu": ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, {"mu": 1.1}),
    "karras": ({"shift": 1.5, "use_karras_sigmas": True}, {}),
    "exponential": ({"shift": 3.0, "use_exponential_sigmas": True}, {}),
    "beta": ({"shift": 1.5, "use_beta_sigmas": True}, {}),
    "beta, terminal": ({"shift": 3.0, "use_beta_sigmas": True, "shift_terminal": 0.05}, {}),
    "inverted": ({"shift": 1.5, "invert_sigmas": True}, {}),
    "inverted karras": ({"shift": 1.5, "invert_sigmas": True, "use_karras_sigmas": True}, {}),
    "stochastic": ({"shift": 1.5, "stochastic_sampling": True}, {}),
}
CUSTOM = {
    "sigmas": {"sigmas": [1.0, 0.81, 0.6, 0.37, 0.2]},
    "sigmas and N": {"sigmas": [1.0, 0.81, 0.6, 0.37, 0.2], "num_inference_steps": 5},
    "sigmas as an array": {"sigmas": np.linspace(1, 0.2, 5)},
    "timesteps": {"timesteps": [1000, 800.5, 600, 400.25, 100]},
    "both": {"timesteps": [999.0, 777.5, 500.0], "sigmas": [0.95, 0.7, 0.4], "num_inference_steps": 3},
}


def both(settings, n=None, **arguments):
    ours, theirs = Ours(**settings), Theirs(**settings)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(n, **arguments) if n else scheduler.set_timesteps(**arguments)
    return ours, theirs


def assert_same_tables(ours, theirs, exactly=True):
    for name in ("sigmas", "timesteps"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype == torch.float32 and a.shape == b.shape
        scale = 1000 if name == "timesteps" else 1
        torch.testing.assert_close(a, b, rtol=0, atol=0 if exactly else 1e-6 * scale)
    if hasattr(theirs, "num_inference_steps"):
        assert ours.num_inference_steps == theirs.num_inference_steps
    assert (ours.step_index, ours.begin_index) == (theirs.step_index, theirs.begin_index)


def assert_same_trajectory(ours, theirs, dtype, shape=(2, 3, 5, 7)):
    """Every step bit-equal, from the reference's own sample each time and from ours."""
    torch.manual_seed(0)
    mine = sample = torch.randn(shape).to(dtype)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for i, t in enumerate(ours.timesteps):
        velocity = torch.randn(shape).to(dtype)
        mine = ours.step(velocity, t, mine, generator=generators[0]).prev_sample
        sample = theirs.step(velocity, t, sample, generator=generators[1]).prev_sample
        assert mine.dtype == sample.dtype == dtype
        assert ours.step_index == theirs.step_index == i + 1
        assert torch.equal(mine, sample), f"step {i}: {(mine - sample).abs().max()}"


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("n", STEPS)
def test_tables_and_steps_for_every_shift(n, shift):
    ours, theirs = both({"shift": shift}, n)
    assert_same_tables(ours, theirs)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert_same_trajectory(ours, theirs, dtype, (2, 3, 5))


@pytest.mark.parametrize(
    "option, n",
    # test_one_step_with_a_terminal_shift says why not these
    [
        (o, n)
        for o, (settings, _) in OPTIONS.items()
        for n in STEPS
        if n > 1 or "shift_terminal" not in settings
    ],
)
def test_tables_and_steps_for_every_option(option, n):
    settings, arguments = OPTIONS[option]
    ours, theirs = both(settings, n, **arguments)
    exactly = not settings.get("use_beta_sigmas")
    assert_same_tables(ours, theirs, exactly)
    for dtype in (torch.float32, torch.bfloat16):
        ours.set_timesteps(n, **arguments)
        theirs.set_timesteps(n, **arguments)
        if not exactly:
            ours.timesteps, ours.sigmas = theirs.timesteps, theirs.sigmas
        assert_same_trajectory(ours, theirs, dtype)


@pytest.mark.parametrize("settings", [s for s, _ in OPTIONS.values() if not s.get("use_dynamic_shifting")])
@pytest.mark.parametrize("custom", CUSTOM)
def test_custom_tables(custom, settings):
    ours, theirs = both(settings, **CUSTOM[custom])
    exactly = not settings.get("use_beta_sigmas")
    assert_same_tables(ours, theirs, exactly)
    if exactly:
        assert_same_trajectory(ours, theirs, torch.float32)


def test_custom_sigmas_with_mu():
    assert_same_tables(*both({"use_dynamic_shifting": True}, sigmas=[1.0, 0.7, 0.2], mu=1.3))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_one_step_with_a_terminal_shift():
    """The reference divides 0 by 0."""
    ours, theirs = both({"shift": 1.5, "shift_terminal": 0.1}, 1)
    assert theirs.sigmas.isnan().any()
    assert ours.sigmas.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("settings", [{}, {"shift": 4.0}, {"shift": 4.0, "use_dynamic_shifting": True}])
def test_before_set_timesteps(settings):
    ours, theirs = Ours(**settings), Theirs(**settings)
    assert_same_tables(ours, theirs)
    assert (ours.sigma_min, ours.sigma_max) == (theirs.sigma_min, theirs.sigma_max)
    assert ours.num_inference_steps is None
    assert len(ours) == len(theirs) == 1000
    assert ours.order == theirs.order == 1 and ours.init_noise_sigma == 1.0


def test_set_shift_keeps_sigma_min():
    ours, theirs = Ours(shift=1.5), Theirs(shift=1.5)
    for scheduler in (ours, theirs):
        scheduler.set_shift(3.0)
        scheduler.set_timesteps(7)
    assert ours.shift == 3.0
    assert_same_tables(ours, theirs)


def test_a_run_that_starts_in_the_middle():
    """The first timestep says where, whatever it is; then steps are counted, whatever timestep is passed."""
    ours, theirs = both({"shift": 1.5}, 10)
    velocity, a = torch.randn(2, 3), torch.randn(2, 3)
    b = a
    for i in (4, 0, 9, 9):
        t = ours.timesteps[i]
        a, b = ours.step(velocity, t, a)[0], theirs.step(velocity, t, b)[0]
        assert torch.equal(a, b) and ours.step_index == theirs.step_index
    ours.set_timesteps(10)
    assert ours.step_index is None


def test_a_python_float_is_a_timestep_too():
    ours, theirs = both({"shift": 1.5}, 4)
    velocity, sample = torch.randn(2, 3), torch.randn(2, 3)
    t = ours.timesteps[2].item()
    assert torch.equal(ours.step(velocity, t, sample)[0], theirs.step(velocity, t, sample)[0])


def test_begin_index_and_repeated_timesteps():
    repeated = {"timesteps": [900.0, 500.0, 500.0, 500.0, 100.0], "sigmas": [0.9, 0.5, 0.4, 0.3, 0.1]}
    for begin in (None, 0, 2):
        ours, theirs = both({"shift": 1.5}, **repeated)
        if begin is not None:
            ours.set_begin_index(begin)
            theirs.set_begin_index(begin)
        velocity, sample = torch.randn(2, 3), torch.randn(2, 3)
        t = torch.tensor(500.0)
        assert torch.equal(ours.step(velocity, t, sample)[0], theirs.step(velocity, t, sample)[0])
        assert ours.step_index == theirs.step_index == (3 if begin in (None, 2) else 1)
        assert ours.begin_index == theirs.begin_index == begin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [None, 3])
def test_scale_noise(begin, dtype):
    ours, theirs = both({"shift": 1.5}, 10)
    sample, noise = torch.randn(2, 3, 5).to(dtype), torch.randn(2, 3, 5).to(dtype)
    t = ours.timesteps[[2, 7]]
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(begin)
    for _ in range(2):
        a, b = ours.scale_noise(sample, t, noise), theirs.scale_noise(sample, t, noise)
        assert torch.equal(a, b) and a.dtype == dtype
        ours.step(noise, ours.timesteps[2], sample)
        theirs.step(noise, theirs.timesteps[2], sample)


@pytest.mark.parametrize("stochastic", [False, True])
def test_per_token_timesteps(stochastic):
    ours, theirs = both({"shift": 1.5, "stochastic_sampling": stochastic}, 6)
    sample, velocity = torch.randn(2, 5, 3), torch.randn(2, 5, 3).bfloat16()
    levels = torch.rand(2, 5) * 1000
    levels[0, :3] = ours.timesteps[1:4]
    outputs = []
    for scheduler in (ours, theirs):
        g = torch.Generator().manual_seed(0)
        t = scheduler.timesteps[0]
        options = {"generator": g, "per_token_timesteps": levels, "return_dict": False}
        outputs.append(scheduler.step(velocity, t, sample, **options)[0])
    assert torch.equal(*outputs) and outputs[0].dtype == torch.float32


def test_stochastic_sampling_with_one_generator_per_sample():
    ours, theirs = both({"shift": 1.5, "stochastic_sampling": True}, 6)
    sample, velocity = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    results = []
    for scheduler in (ours, theirs):
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        results.append(scheduler.step(velocity, scheduler.timesteps[0], sample, generator=generators)[0])
    assert torch.equal(*results)


def test_what_step_returns():
    ours, _ = both({}, 3)
    sample = torch.randn(2, 3)
    out = ours.step(sample, ours.timesteps[0], sample)
    assert out.prev_sample is out[0]
    plain = ours.step(sample, ours.timesteps[1], sample, return_dict=False)
    assert type(plain) is tuple and len(plain) == 1


def test_the_target_alone_steps_as_in_the_whole():
    whole, part = both({"shift": 1.5}, 3)[0], both({"shift": 1.5}, 3)[0]
    sample, velocity = torch.randn(1, 2, 16, 1, 4, 4), torch.randn(1, 2, 16, 1, 4, 4)
    for t in whole.timesteps:
        target = sample[:, 1:]
        sample = whole.step(velocity, t, sample)[0]
        assert torch.equal(part.step(velocity[:, 1:], t, target)[0], sample[:, 1:])


# Subclasses.


@pytest.fixture(scope="module")
def heun():
    """The solver of docs/changing-the-code.md."""
    page = (Path(__file__).resolve().parents[2] / "docs/changing-the-code.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n((?:(?!```).)*?class .*?)^pipe = ", page, re.DOTALL | re.MULTILINE)
    names = {}
    exec(source, names)
    return names["FlowMatchHeunDiscreteScheduler"]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_subclass_of_second_order_equals_the_references(n, heun):
    ours, theirs = heun(shift=1.5), diffusers.FlowMatchHeunDiscreteScheduler(shift=1.5)
    sample, weights = torch.randn(2, 3, 5), torch.randn(5, 5)
    for _ in range(2):  # a run leaves nothing behind
        ours.set_timesteps(n)
        theirs.set_timesteps(n)
        assert ours.timesteps.shape == (2 * n - 1,) and ours.sigmas.shape == (2 * n,)
        torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
        mine, wanted = sample, sample
        for t, their_t in zip(ours.timesteps, theirs.timesteps, strict=True):
            assert ours.step_length(t) is None
            mine = ours.step((mine @ weights).tanh(), t, mine).prev_sample
            wanted = theirs.step((wanted @ weights).tanh(), their_t, wanted).prev_sample
            assert ours.step_index == theirs.step_index
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
        with pytest.raises(IndexError, match=f"all {2 * n - 1} steps were taken"):
            ours.count_step(ours.timesteps[-1])
    assert (mine - sample).abs().max() > 0.1


def test_a_run_of_second_order_that_starts_in_the_middle(heun):
    whole, part = heun(shift=1.5), heun(shift=1.5)
    for scheduler in (whole, part):
        scheduler.set_timesteps(4)
    sample, weights = torch.randn(2, 3, 5), torch.randn(5, 5)
    for i, t in enumerate(whole.timesteps):
        if i == 4:
            middle = sample
        sample = whole.step((sample @ weights).tanh(), t, sample).prev_sample
    for t in part.timesteps[4:]:  # its timestep is there twice: the second is where a step begins
        middle = part.step((middle @ weights).tanh(), t, middle).prev_sample
    assert torch.equal(middle, sample)


def test_an_own_step_is_not_passed_over():
    class Twice(Ours):
        def step(self, model_output, timestep, sample, return_dict=True):
            return super().step(2 * model_output, timestep, sample, return_dict=return_dict)

    class TwiceAtOnce(Twice):
        def step_length(self, timestep):
            return 2 * self.step_lengths[self.count_step(timestep)]

    class Even(Ours):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.sigmas = torch.linspace(1, 0, len(self.sigmas))
            self.timesteps = 1000 * self.sigmas[:-1]

    made = [kind(shift=1.5) for kind in (Twice, TwiceAtOnce, Even, Ours)]
    for scheduler in made:
        scheduler.set_timesteps(4)
    twice, at_once, even, plain = made
    assert twice.step_length(twice.timesteps[0]) is None and twice.step_index is None
    first = plain.sigmas[1] - plain.sigmas[0]
    assert plain.step_length(plain.timesteps[0]) == first
    assert at_once.step_length(at_once.timesteps[0]) == 2 * first and at_once.step_index == 1
    assert even.step_length(even.timesteps[0]) == even.step_lengths[3] == -0.25
    assert even.step(torch.ones(1, 2), even.timesteps[1], torch.ones(1, 2))[0].tolist() == [[0.75, 0.75]]
    plain.step = twice.step  # of one object alone
    assert plain.step_length(plain.timesteps[1]) is None and plain.step_index == 1


# The original repository's schedule: specification 6.1.


@pytest.mark.parametrize("shift", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("n", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_original_joyai_schedule(n, shift, dtype):
    ours = Ours(shift=shift, joyai_original=True)
    ours.set_timesteps(n)
    s = torch.linspace(1, 0, n + 1)
    s = shift * s / (1 + (shift - 1) * s)
    torch.testing.assert_close(ours.sigmas, s, rtol=0, atol=2e-7)
    torch.testing.assert_close(ours.timesteps, s[:-1] * 1000, rtol=0, atol=2e-4)
    mine = sample = torch.randn(2, 3, 5).to(dtype)
    for i, t in enumerate(ours.timesteps):
        velocity = torch.randn(2, 3, 5).to(dtype)
        mine = ours.step(velocity, t, mine)[0]
        sample = sample.float() + velocity.float() * (s[i + 1] - s[i])
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, sample, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "shift, sigmas",
    [(4.0, [1, 0.92307693, 0.8, 0.57142858, 0]), (1.5, [1, 0.81818181, 0.6, 0.33333334, 0])],
)
def test_original_joyai_values(shift, sigmas):
    ours = Ours(shift=shift, joyai_original=True)
    ours.set_timesteps(4)
    torch.testing.assert_close(ours.sigmas, torch.tensor(sigmas), rtol=0, atol=1e-7)
    custom = Ours(shift=shift)
    custom.set_timesteps(sigmas=torch.linspace(1, 0, 5)[:-1])  # how to get it from the other grid
    assert torch.equal(custom.sigmas, ours.sigmas)


def test_check_values():
    """Specification 6.2 and 9."""
    assert Ours(shift=1.5).sigma_min == 0.0014992504147812724
    assert Ours(shift=4.0).sigma_min == 0.0039880359545350075
    expected = {
        2: {0: 1, 1: 0.00224719, 2: 0},
        4: {1: 0.75042158, 2: 0.42967245, 3: 0.00224719, 4: 0},
        40: {1: 0.98278469, 2: 0.96527046, 3: 0.94744939, 37: 0.0770268, 38: 0.04010923, 39: 0.00224719},
        30: {1: 0.976779, 5: 0.878243, 26: 0.149363, 28: 0.052944, 29: 0.002247},
        50: {1: 0.986322, 5: 0.929687, 46: 0.091095, 48: 0.03246, 49: 0.002247},
    }
    for n, values in expected.items():
        ours, _ = both({"shift": 1.5}, n)
        for i, value in values.items():
            assert ours.sigmas[i].item() == pytest.approx(value, abs=6e-7), (n, i)


def test_goldens():
    if not GOLDENS.is_dir():
        pytest.skip("needs ../shared")
    tensors = load_file(GOLDENS / "scheduler.safetensors")
    notes = json.loads((GOLDENS / "scheduler.json").read_text())
    runs = {f"shift{shift}.n{n}": ({"shift": shift}, {"n": n}) for shift in (1.0, 1.5, 4.0) for n in STEPS}
    runs["custom_sigmas_shift4"] = ({"shift": 4.0}, {"sigmas": notes["custom_sigmas_shift4"]["sigmas"]})
    runs["dynamic_mu1_n4"] = ({"use_dynamic_shifting": True}, {"n": 4, "mu": 1.0})
    for name in ("use_karras_sigmas", "use_exponential_sigmas"):
        runs[f"{name}_shift1.5_n6"] = ({"shift": 1.5, name: True}, {"n": 6})
    for name, (settings, arguments) in runs.items():
        ours, _ = both(settings, **arguments)
        for table in ("sigmas", "timesteps"):
            assert torch.equal(getattr(ours, table), tensors.pop(f"{name}.{table}")), name
    for dtype in ("fp32", "bf16"):
        velocities = tensors.pop(f"trajectory_{dtype}.model_outputs")
        samples = tensors.pop(f"trajectory_{dtype}.samples")
        ours, _ = both({"shift": 1.5}, len(velocities))
        for i, t in enumerate(ours.timesteps):
            assert torch.equal(ours.step(velocities[i], t, samples[i])[0], samples[i + 1])
    assert not tensors, "goldens that no test reads"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scipy's root finder, for some p
@pytest.mark.parametrize("a, b", [(0.6, 0.6), (0.5, 2.0), (3.0, 0.7), (2.0, 5.0), (1.0, 1.0)])
def test_beta_quantiles_equal_scipys(a, b):
    p = np.concatenate([np.linspace(0, 1, 1001), np.logspace(-12, -3, 50), 1 - np.logspace(-12, -3, 50)])
    np.testing.assert_allclose(beta_ppf(p, a, b), scipy.stats.beta.ppf(p, a, b), rtol=0, atol=1e-9)


# Configs.


def test_config_round_trip_through_both(tmp_path):
    changed = {
        "num_train_timesteps": 500,
        "shift": 2.5,
        "use_dynamic_shifting": True,
        "base_shift": 0.4,
        "max_shift": 1.2,
        "base_image_seq_len": 128,
        "max_image_seq_len": 2048,
        "invert_sigmas": True,
        "shift_terminal": 0.1,
        "use_karras_sigmas": True,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "time_shift_type": "linear",
        "stochastic_sampling": True,
    }
    assert {*changed} == {*inspect.signature(Theirs.__init__).parameters} - {"self"}
    Ours(**changed).save_pretrained(tmp_path / "ours")
    theirs = Theirs.from_pretrained(tmp_path / "ours")
    assert {key: theirs.config[key] for key in changed} == changed
    assert "joyai_original" not in json.loads((tmp_path / "ours/scheduler_config.json").read_text())
    theirs.save_pretrained(tmp_path / "theirs" / "scheduler")
    for back in (
        Ours.from_pretrained(tmp_path / "theirs", subfolder="scheduler"),
        Ours.from_config(tmp_path / "theirs" / "scheduler"),
        Ours.from_config(str(tmp_path / "theirs" / "scheduler" / "scheduler_config.json")),
        Ours.from_config(theirs.config),
        Ours.from_config(dict(theirs.config)),
        Ours.from_config(Ours(**changed).config),
    ):
        assert dict(back.config) == {**changed, "joyai_original": False}
    assert Ours.from_pretrained(tmp_path / "ours", shift=9.0).config.shift == 9.0


def test_defaults_are_those_of_the_class_in_diffusers():
    theirs = {k: p.default for k, p in inspect.signature(Theirs.__init__).parameters.items() if k != "self"}
    assert dict(Ours().config) == {**theirs, "joyai_original": False}
    assert Ours(shift=1.5).config.shift == Ours(shift=1.5).config["shift"] == Ours(shift=1.5).shift == 1.5


def test_original_joyai_option_survives_both(tmp_path):
    Ours(shift=4.0, joyai_original=True).save_pretrained(tmp_path / "ours")
    assert Ours.from_pretrained(tmp_path / "ours").config.joyai_original
    theirs = Theirs.from_pretrained(tmp_path / "ours")  # it warns that it does not know the key
    assert theirs.config.shift == 4.0
    theirs.save_pretrained(tmp_path / "theirs")
    assert Ours.from_pretrained(tmp_path / "theirs").config == Ours(shift=4.0, joyai_original=True).config


RELATIVES = """
    DDIMScheduler DDIMInverseScheduler DDPMScheduler PNDMScheduler EulerDiscreteScheduler
    LMSDiscreteScheduler EulerAncestralDiscreteScheduler DPMSolverMultistepScheduler
    DPMSolverSinglestepScheduler HeunDiscreteScheduler DPMSolverMultistepInverseScheduler
    UniPCMultistepScheduler FlowMatchHeunDiscreteScheduler LCMScheduler KDPM2DiscreteScheduler
    KDPM2AncestralDiscreteScheduler DEISMultistepScheduler SASolverScheduler TCDScheduler
    FlowMatchLCMScheduler EDMEulerScheduler
""".split()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of their numpy calls
@pytest.mark.parametrize("relative", RELATIVES)
def test_keys_of_relatives_survive(relative, tmp_path):
    relative = getattr(diffusers, relative)
    settings = {*inspect.signature(relative.__init__).parameters} - {"self", "args", "kwargs"}
    assert settings <= FAMILY
    relative().save_config(tmp_path / "theirs")
    theirs = relative.from_pretrained(
        tmp_path / "theirs"
    )  # none of its settings counts as left at its default
    ours = Ours.from_config(theirs.config, shift=3.0)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "scheduler_config.json").read_text())
    again = relative.from_pretrained(tmp_path)
    kept = {key: value for key, value in theirs.config.items() if not key.startswith("_") and key != "shift"}
    assert {key: saved[key] for key in kept} == json.loads(json.dumps(kept))
    for key, value in kept.items():
        assert again.config[key] == value
        assert ours.config[key] == value or ours.config[key] == tuple(value)
    ours.set_timesteps(4)
    reference = Theirs(shift=3.0, num_train_timesteps=theirs.config.get("num_train_timesteps", 1000))
    reference.set_timesteps(4)
    assert torch.equal(ours.sigmas, reference.sigmas)


def test_copies():
    ours = Ours.from_config(diffusers.PNDMScheduler(skip_prk_steps=True).config, shift=2.0)
    ours.set_timesteps(3)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.config == ours.config and torch.equal(twin.sigmas, ours.sigmas)
        assert twin.config["skip_prk_steps"] is True
        assert twin.config.handed_on() == ours.config.handed_on()


# Errors.


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, ValueError, "only one of"),
        ({"use_exponential_sigmas": True, "use_beta_sigmas": True}, ValueError, "only one of"),
        ({"time_shift_type": "cubic"}, ValueError, "time_shift_type='cubic'.*'exponential' or 'linear'"),
        ({"shift": 0}, ValueError, "shift=0: must be positive"),
        ({"shifts": 1.5}, TypeError, "no setting 'shifts'.*'shift'"),
        ({"skip_prk_steps": True}, TypeError, "no setting 'skip_prk_steps'"),
    ],
)
def test_settings_refused(settings, error, message):
    with pytest.raises(error, match=message):
        Ours(**settings)
    with pytest.raises(error, match=message):
        Ours.from_config({"shift": 2.0, "skip_prk_steps": True}, **settings)


def test_unknown_key_of_a_config_is_refused():
    with pytest.raises(ValueError, match="no scheduler has .'shfit'"):
        Ours.from_config({"shfit": 1.5})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "one of num_inference_steps, sigmas or timesteps"),
        ({"num_inference_steps": 0}, "at least 1"),
        ({"sigmas": [1.0, 0.5], "timesteps": [1000.0]}, "must agree: .*'sigmas': 2, 'timesteps': 1"),
        ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "must agree"),
        ({"timesteps": [1000.0, 500.0], "num_inference_steps": 3}, "must agree"),
        ({"sigmas": []}, "sigmas must be a list of finite numbers"),
        ({"sigmas": [1.0, float("nan")]}, "sigmas must be a list of finite numbers"),
        ({"timesteps": [[1000.0, 500.0]]}, "timesteps must be a list of finite numbers"),
    ],
)
def test_arguments_of_set_timesteps_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ours().set_timesteps(**arguments)


def test_missing_mu_is_refused():
    with pytest.raises(ValueError, match="mu must be given"):
        Ours(use_dynamic_shifting=True).set_timesteps(4)


def test_exponential_sigmas_down_to_0_are_refused():
    with pytest.raises(ValueError, match="positive values, not 1.0 and 0.0"):
        Ours(use_exponential_sigmas=True).set_timesteps(sigmas=[1.0, 0.5, 0.0])


def test_timesteps_of_step_refused():
    ours, theirs = both({}, 4)
    x = torch.zeros(2)
    for whole in (1, torch.tensor(1), torch.tensor(1, dtype=torch.int32)):
        for scheduler in (ours, theirs):
            with pytest.raises(ValueError, match="timesteps"):
                scheduler.step(x, whole, x)
    with pytest.raises(ValueError, match="timestep 123.0 is not one of"):
        ours.step(x, 123.0, x)
    for t in ours.timesteps:
        ours.step(x, t, x)
    with pytest.raises(IndexError, match="all 4 steps were taken"):
        ours.step(x, ours.timesteps[0], x)


def test_folder_without_the_file(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match="has no scheduler_config.json; .*scheduler/scheduler_config.json"
    ):
        Ours.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unknown argument 'shfit'.*did you mean 'shift'"):
        Ours.from_pretrained(tmp_path, subfolder="scheduler", shfit=2.0)


def test_warning_about_timesteps_alone_comes_once(caplog):
    from joyedit.schedulers import flow_match

    flow_match._warn_timesteps_alone.cache_clear()
    for _ in range(2):
        Ours().set_timesteps(timesteps=[1000.0, 500.0])
    assert len(caplog.records) == 1
