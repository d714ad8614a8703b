"""What is said on the command line reaches what is drawn and what is minimised."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from joyedit.models.sd_unet import UNet2DConditionModel
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.unipc import UniPCMultistepScheduler
from joyedit.training import loop, losses
from joyedit.training.joyimage import JoyImage
from joyedit.training.plan import make_plan
from joyedit.training.stable_diffusion import StableDiffusion
from joyedit.training.systems import Drawing, Said
from tests.lora_layers import UNET, filled
from tests.training.test_training import settings

COUNT = 1000
KEPT = {"target_mean": torch.zeros(1, 1, 1, 1), "target_std": torch.ones(1, 1, 1, 1)}
SAID = Said(torch.ones(1, 1), torch.zeros(1, 1))


def samples(system, how, dropout):
    source = torch.Generator().manual_seed(0)
    plan = SimpleNamespace(system=system)
    return [loop.draw(plan, (KEPT, SAID), how, source, dropout) for _ in range(COUNT)]


def within(share, wanted):
    """Of COUNT draws, within four deviations."""
    return abs(share - wanted) <= 4 * math.sqrt(wanted * (1 - wanted) / COUNT)


@pytest.mark.parametrize(
    ("sigma", "below"),
    [
        ("uniform", {0.25: 0.25, 0.5: 0.5}),
        ("shifted", {0.25: 1 / 13, 0.5: 0.2}),  # u / (4 - 3 u) of a shift of 4
        ("logit-normal", {0.25: 0.5 * math.erfc(math.log(3) / math.sqrt(2)), 0.5: 0.5}),
    ],
)
def test_levels_and_silence(sigma, below):
    how = Drawing.by(FlowMatchEulerDiscreteScheduler(shift=4.0), sigma, None)
    assert Drawing.by(UniPCMultistepScheduler(flow_shift=5.0, use_flow_sigmas=True), sigma, None).shift == 5
    found = samples(JoyImage(SimpleNamespace(call={}), {}), how, 0.1)
    for level, share in below.items():
        assert within(sum(bool(one.sigma < level) for one in found) / COUNT, share), level
    assert within(sum(not one.given["prompt"].any() for one in found) / COUNT, 0.1)
    latents = torch.stack([one.latents for one in found])
    assert abs(latents.std() - 1) < 0.05  # drawn of the posterior


def test_no_prompt_is_left_out_without_dropout():
    found = samples(JoyImage(SimpleNamespace(call={}), {}), Drawing(), 0.0)
    assert all(one.given["prompt"].all() for one in found)


def test_signal_to_noise_is_bounded():
    network = filled(UNet2DConditionModel.from_config(UNET))
    system = StableDiffusion(SimpleNamespace(call={}), {})
    kept = {"target_mean": torch.randn(4, 7, 9), "target_std": torch.ones(4, 7, 9)}
    found = {}
    for bound in (None, 5.0):
        how = Drawing.by(DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False), "shifted", bound)
        sample = system.draw(kept, torch.ones(5, 12), how, torch.Generator().manual_seed(0), 0.1)
        found[bound] = system.loss(network, [sample], how)
    abar = (
        1
        - losses.noise_levels(how.scheduler)[losses.nearest_timesteps(torch.tensor([0.1]), how.scheduler)]
        ** 2
    )
    assert torch.allclose(found[5.0] / found[None], 5 * (1 - abar) / abar, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes", "said"),
    [
        ("tiny-joyimage", {"min_snr": 5.0}, "min_snr=5: weighs Stable Diffusion's loss"),
        ("tiny-diffedit", {"sigma": "uniform"}, "sigma='uniform': Stable Diffusion's noise levels"),
        ("tiny-joyimage", {"targets": "mlpp"}, "targets='mlpp' matches no linear layer"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_read(tmp_path, pairs, model, changes, said):
    with pytest.raises(ValueError, match=said):
        make_plan(settings(pairs, model, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_base_in_bf16_on_a_cpu(tmp_path, pairs, monkeypatch):
    """Of a model that ships in bf16: the weights stay as they are stored, the steps are those in fp32 but for
    rounding; what trains is in fp32. The settings arrive in the loss."""
    seen, plain = [], JoyImage.loss

    def loss(self, network, samples, how):
        seen.append((network.dtype, how.sigma, {p.dtype for p in network.parameters()}))
        return plain(self, network, samples, how)

    monkeypatch.setattr(JoyImage, "loss", loss)
    found = {}
    for base in ("fp32", "bf16"):
        given = settings(pairs, steps=3, batch=1, base=base, sigma="uniform", valid_every=0, save_every=3)
        made = loop.train(given, tmp_path / base, disable_progress=True)
        found[base] = [json.loads(line)["loss"] for line in (tmp_path / base / "metrics.jsonl").open()]
        state = torch.load(tmp_path / base / "state.pt", weights_only=True)
        assert {p.dtype for p in state["parameters"].values()} == {torch.float32} and made.exists()
    assert seen[0][:2] == (torch.float32, "uniform") and seen[-1][:2] == (torch.bfloat16, "uniform")
    assert torch.bfloat16 in seen[-1][2] and torch.bfloat16 not in seen[0][2]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=3e-2)
