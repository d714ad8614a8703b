"""The losses against formulas written out, against diffusers' training scripts, and against the samplers."""

import dataclasses
import math

import pytest
import torch
from diffusers import DDPMScheduler as ReferenceNoise
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr

from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from joyedit.models.sd_unet import UNet2DConditionModel
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.unipc import UniPCMultistepScheduler
from joyedit.training import losses
from tests.lora_layers import JOY, UNET, WAN, filled

SIGMA = torch.tensor([0.3, 0.85])


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squares(predicted, wanted):
    """The mean square of every sample, in float64."""
    return torch.stack([(p - w).double().square().mean() for p, w in zip(predicted, wanted, strict=True)])


def flow_loss(predict, latents, noise):
    """By the definition, sample by sample: x_t on the line from x0 to noise, its derivative as the truth."""
    noisy = torch.stack([x + s * (n - x) for x, n, s in zip(latents, noise, SIGMA, strict=True)])
    return squares(predict(noisy), noise - latents), noisy


def joy_case():
    network = filled(JoyImageEditTransformer3DModel.from_config(JOY))
    latents, noise = drawn(2, 16, 1, 6, 10, seed=1), drawn(2, 16, 1, 6, 10, seed=2)
    references = (drawn(2, 16, 1, 6, 10, seed=3), drawn(2, 16, 1, 6, 10, seed=4))
    return network, latents, losses.JoyImageConditioning(drawn(2, 5, 20, seed=5), references), noise


def wan_case(frames=2, batch=2):
    network = filled(ChronoEditTransformer3DModel.from_config({**WAN, "in_channels": 12}))
    latents, noise = drawn(batch, 4, frames, 4, 6, seed=1), drawn(batch, 4, frames, 4, 6, seed=2)
    known = losses.ChronoEditConditioning(
        drawn(batch, 8, frames, 4, 6, seed=3), drawn(batch, 5, 10, seed=4), drawn(batch, 3, 14, seed=5)
    )
    return network, latents, known, noise


def unet_case():
    network = filled(UNet2DConditionModel.from_config(UNET))
    latents, noise = drawn(2, 4, 8, 6, seed=1), drawn(2, 4, 8, 6, seed=2)
    return network, latents, losses.StableDiffusionConditioning(drawn(2, 5, 12, seed=3)), noise


def test_joyimage_is_flow_matching_on_the_target_alone():
    network, latents, conditioning, noise = joy_case()

    def predict(noisy):
        items = torch.stack((*conditioning.references, noisy), dim=1)  # as the whole network takes them
        return network(items, 1000 * SIGMA, conditioning.prompt).sample[:, -1]

    truth, _ = flow_loss(predict, latents, noise)
    found = losses.joyimage(network, latents, conditioning, noise, SIGMA)
    assert found.shape == (2,) and found.dtype == torch.float32
    assert torch.allclose(found.double(), truth, rtol=1e-5)
    drawn_alone = losses.JoyImageConditioning(conditioning.prompt)
    truth, _ = flow_loss(lambda x: network(x, 1000 * SIGMA, conditioning.prompt).sample, latents, noise)
    assert torch.allclose(
        losses.joyimage(network, latents, drawn_alone, noise, SIGMA).double(), truth, rtol=1e-5
    )


def test_references_of_other_sizes_are_taken():
    network, latents, conditioning, noise = joy_case()
    small = losses.JoyImageConditioning(conditioning.prompt, (drawn(2, 16, 1, 4, 4, seed=3),))
    assert losses.joyimage(network, latents, small, noise, SIGMA).isfinite().all()


@pytest.mark.parametrize("frames", [2, 5])
def test_chronoedit_is_flow_matching_on_every_frame(frames):
    network, latents, known, noise = wan_case(frames)

    def predict(noisy):
        x = torch.cat((noisy, known.condition), dim=1)
        return network(x, 1000 * SIGMA, known.prompt, known.image).sample

    truth, _ = flow_loss(predict, latents, noise)
    assert torch.allclose(losses.chronoedit(network, latents, known, noise, SIGMA).double(), truth, rtol=1e-5)


def test_a_film_without_its_way_is_an_edit_of_two_frames():
    network, latents, known, noise = wan_case(5)
    short = losses.ends(latents, known, noise)
    found = losses.chronoedit(network, short[0], short[1], short[2], SIGMA)
    first_and_last = [x[:, :, [0, 4]] for x in (latents, known.condition, noise)]
    pair = losses.ChronoEditConditioning(first_and_last[1], known.prompt, known.image)
    assert torch.equal(found, losses.chronoedit(network, first_and_last[0], pair, first_and_last[2], SIGMA))


def test_padding_is_the_last_row_again():
    network, latents, known, noise = wan_case()
    last = known.prompt[:, -1:].expand(-1, 5, -1)
    longer = dataclasses.replace(known, prompt=torch.cat((known.prompt, last), dim=1))
    padded = dataclasses.replace(known, padding=5)
    found, expected, without = (
        losses.chronoedit(network, latents, one, noise, SIGMA) for one in (padded, longer, known)
    )
    assert torch.allclose(found, expected, rtol=1e-5) and not torch.allclose(without, expected, rtol=1e-4)
    network.enable_gradient_checkpointing()  # keys and values are made in the blocks, then
    assert torch.equal(losses.chronoedit(network, latents, padded, noise, SIGMA), found)


def test_weights_multiply_squares_place_by_place():
    network, latents, conditioning, noise = joy_case()
    weight = torch.zeros(2, 1, 1, 6, 10)
    weight[:, :, :, 2:4, 5:8] = 3.0
    items = torch.stack((*conditioning.references, torch.zeros_like(latents)), dim=1)

    def predict(noisy):
        items[:, -1] = noisy
        return network(items, 1000 * SIGMA, conditioning.prompt).sample[:, -1]

    noisy = flow_loss(predict, latents, noise)[1]
    error = (predict(noisy) - (noise - latents))[..., 2:4, 5:8].double()
    truth = 3 * error.square().flatten(1).sum(1) / latents[0].numel()
    found = losses.joyimage(network, latents, conditioning, noise, SIGMA, weight=weight)
    assert torch.allclose(found.double(), truth, rtol=1e-5)


# Diffusers' training scripts, on the reference's own schedule: what `train_text_to_image.py` computes.


def scripted_loss(network, latents, prompt, noise, timesteps, prediction_type, snr_gamma):
    schedule = ReferenceNoise(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    noisy = schedule.add_noise(latents, noise, timesteps)
    target = noise if prediction_type == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
    loss = squares(network(noisy, timesteps, prompt).sample, target)
    if snr_gamma is None:
        return loss
    snr = compute_snr(schedule, timesteps)
    weights = torch.stack([snr, snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    return loss * weights / (snr if prediction_type == "epsilon" else snr + 1)


@pytest.mark.parametrize("min_snr", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_stable_diffusion_equals_diffusers_script(kind, min_snr):
    network, latents, conditioning, noise = unet_case()
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind
    )
    timesteps = torch.tensor([40, 700])  # with more signal than noise, and less
    sigma = losses.noise_levels(scheduler)[timesteps]
    truth = scripted_loss(network, latents, conditioning.prompt, noise, timesteps, kind, min_snr)
    found = losses.stable_diffusion(
        network, latents, conditioning, noise, sigma, scheduler=scheduler, min_snr=min_snr
    )
    assert torch.allclose(found.double(), truth.double(), rtol=1e-5)
    if kind == "epsilon":  # the default schedule
        assert torch.equal(
            found, losses.stable_diffusion(network, latents, conditioning, noise, sigma, min_snr=min_snr)
        )


def test_min_snr_without_signal():
    """Of epsilon the quotient of two zeros, whose limit is 1; v still says something."""
    nothing, much = torch.zeros(1), torch.tensor([20.0])
    assert losses.min_snr_weight(nothing, 5, "epsilon") == 1
    assert losses.min_snr_weight(nothing, 5, "v_prediction") == 0
    assert losses.min_snr_weight(much, 5, "epsilon") == 0.25
    assert losses.min_snr_weight(much, 5, "v_prediction") == pytest.approx(5 / 21)


def test_a_level_is_the_nearest_that_the_schedule_has():
    scheduler = losses.stable_diffusion_1()
    levels = [math.sqrt(1 - abar) for abar in scheduler.alphas_cumprod.tolist()]
    for sigma in (0.1, 0.5, 0.9, 1.0):
        nearest = min(range(1000), key=lambda t: abs(levels[t] - sigma))  # noqa: B023
        assert losses.nearest_timesteps(torch.tensor([sigma]), scheduler).tolist() == [nearest]
    drawn_levels = losses.draw_timestep_sigma(50, scheduler, torch.Generator().manual_seed(0))
    back = losses.nearest_timesteps(drawn_levels, scheduler)
    assert torch.equal(losses.noise_levels(scheduler)[back], drawn_levels) and len(back.unique()) > 40


def test_other_predictions_are_refused():
    network, latents, conditioning, noise = unet_case()
    with pytest.raises(ValueError, match="prediction_type='sample'"):
        losses.stable_diffusion(
            network, latents, conditioning, noise, SIGMA, scheduler=DDIMScheduler(prediction_type="sample")
        )


# Against the samplers: a network that is right has no loss, and one step of the solver from what it was
# shown, to no noise, by what it said, is x0.


def test_an_exact_velocity_has_no_loss_and_an_euler_step_takes_it_back(monkeypatch):
    network, latents, conditioning, noise = joy_case()
    shown, told = [], []
    embed_image, embed_time = network.embed_image, network.embed_time
    monkeypatch.setattr(network, "embed_image", lambda x: shown.append(x) or embed_image(x))
    monkeypatch.setattr(network, "embed_time", lambda t: told.append(t) or embed_time(t))
    monkeypatch.setattr(network, "predict_target", lambda *args: noise - latents)
    assert (losses.joyimage(network, latents, conditioning, noise, SIGMA) == 0).all()
    for i in range(2):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[SIGMA[i].item()])
        assert told[0][i] == scheduler.timesteps[0]
        x0 = scheduler.step((noise - latents)[i], scheduler.timesteps[0], shown[0][i]).prev_sample
        assert torch.allclose(x0, latents[i], atol=1e-6)
    assert torch.equal(shown[1], conditioning.references[0])  # clean


def test_an_exact_velocity_of_a_film_is_taken_back_by_the_flow_solver(monkeypatch):
    network, latents, known, noise = wan_case()
    shown = []

    def exact(x, *rest):
        shown.append(x)
        return noise - latents

    monkeypatch.setattr(network, "predict", exact)
    assert (losses.chronoedit(network, latents, known, noise, SIGMA) == 0).all()
    assert torch.equal(shown[0][:, 4:], known.condition)
    for i in range(2):
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        scheduler.set_timesteps(sigmas=[SIGMA[i].item()])
        velocity, noisy = (noise - latents)[i : i + 1], shown[0][i : i + 1, :4]
        x0 = scheduler.step(velocity, scheduler.timesteps[0], noisy).prev_sample
        assert torch.allclose(x0, latents[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_exact_noise_or_v_is_taken_back_by_ddim(kind, monkeypatch):
    network, latents, conditioning, noise = unet_case()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        clip_sample=False,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(1)
    timestep = scheduler.timesteps[0]
    sigma = losses.noise_levels(scheduler)[timestep].repeat(2)
    signal = (1 - sigma[0] ** 2).sqrt()
    exact = noise if kind == "epsilon" else signal * noise - sigma[0] * latents
    shown = []
    monkeypatch.setattr(network, "predict", lambda x, *rest: shown.append(x) or exact)
    loss = losses.stable_diffusion(network, latents, conditioning, noise, sigma, scheduler=scheduler)
    assert (loss < 1e-10).all()
    x0 = scheduler.step(exact, timestep, shown[0]).prev_sample
    assert torch.allclose(x0, latents, atol=1e-4)  # at the last level there is little of it to go by


@pytest.mark.parametrize("how", ["uniform", "shifted"])
def test_no_level_is_zero(how, monkeypatch):
    """Where there would be nothing to divide by, and nothing to learn."""
    monkeypatch.setattr(torch, "rand", lambda count, **options: torch.zeros(count))
    assert losses.draw_sigma(3, how, 3.0).tolist() == [1, 1, 1]


def test_levels_are_drawn_as_their_words_say():
    count = 20_000
    levels = {
        how: losses.draw_sigma(count, how, 3.0, torch.Generator().manual_seed(0)) for how in losses.SIGMAS
    }
    assert all(s.shape == (count,) and s.min() > 0 and s.max() <= 1 for s in levels.values())
    cumulative = {  # the share of levels below s
        "uniform": lambda s: s,
        "shifted": lambda s: s / (3 - 2 * s),  # where s = 3 u / (1 + 2 u)
        "logit-normal": lambda s: 0.5 * (1 + math.erf(math.log(s / (1 - s)) / math.sqrt(2))),
    }
    for how, s in levels.items():
        for at in (0.1, 0.3, 0.5, 0.7, 0.9):
            assert (s < at).double().mean().item() == pytest.approx(cumulative[how](at), abs=0.012), how
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", count, 0.0, 1.0, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(levels["logit-normal"], theirs)
    with pytest.raises(ValueError, match="sigma='cosine': must be one of shifted, logit-normal, uniform"):
        losses.draw_sigma(1, "cosine")
