"""The training of the small DiffEdit and its autoencoder, and what judges its edits."""

import copy
import inspect
import os
import signal
import sys

import numpy as np
import pytest
import torch
from einops import rearrange

import joyedit
from benchmarks.shapes import diffedit, evaluate_diffedit, scenes, sd_vae, train
from benchmarks.shapes.init_sd_vae import initialize_sd_vae
from benchmarks.shapes.vocabulary import captions, clip_tokenizer
from joyedit.models.clip import CLIPTextModel
from joyedit.models.sd_unet import UNet2DConditionConfig, UNet2DConditionModel
from joyedit.models.sd_vae import AutoencoderKL

SMALL = UNet2DConditionConfig.from_dict(
    {**diffedit.CONFIG.to_dict(), "block_out_channels": (16, 24), "cross_attention_dim": 16}
)


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    network = AutoencoderKL(sd_vae.CONFIG)
    initialize_sd_vae(network, torch.cat([sd_vae.pictures(-i, 8) for i in range(1, 7)]))
    network.config = network.config.replace(scaling_factor=0.8)
    return network


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer(captions(1000), length=diffedit.TOKENS)


@pytest.fixture(scope="module")
def networks(tokenizer):
    torch.manual_seed(1)
    unet, encoder = (
        UNet2DConditionModel(diffedit.CONFIG),
        CLIPTextModel(diffedit.encoder_config(tokenizer)),
    )
    diffedit.initialize(unet, encoder)
    return unet, encoder


@pytest.fixture(scope="module")
def pool(vae, tokenizer):
    pool = diffedit.Pool(vae, tokenizer, 1000, size=32)
    pool.fill(0)
    return pool


def reached(networks):
    """The names of parameters, and whether their gradient is any."""
    return {
        name: p.grad is not None and bool(p.grad.any())
        for network in networks
        for name, p in network.named_parameters()
        if p.requires_grad
    }


# The autoencoder


def test_the_untrained_encoder_is_a_transform_codec(vae):
    pictures = sd_vae.test_pictures(16)
    with torch.no_grad():
        z = vae.encode(pictures).latent_dist.mean
    assert z.shape == (32, 4, 16, 16) and 0.5 < z.std() < 2
    patches = rearrange(pictures, "b c (h p) (w q) -> (b h w) (c p q)", p=4, q=4)
    inputs = torch.cat((rearrange(z, "b c h w -> (b h w) c"), torch.ones(len(patches), 1)), dim=1)
    rest = patches - inputs @ torch.linalg.lstsq(inputs, patches).solution
    assert -10 * torch.log10((rest / 2).square().mean()) > 24


@pytest.mark.parametrize("stage", sd_vae.SAMPLES)
def test_every_stage_of_the_vae_reaches_its_weights_alone(vae, stage):
    vae = copy.deepcopy(vae)
    pictures = sd_vae.test_pictures(1)
    before = vae.encode(pictures).latent_dist.mean.detach()
    optimizer = sd_vae.make_optimizer(sd_vae.trained(vae, stage), 1e-2)
    loss, parts = sd_vae.reconstruction_loss(vae, sd_vae.pictures(0, 2), stage)
    loss.backward()
    assert set(parts) == {"squared", "absolute", "kl"}
    # A constant on all keys changes no attention.
    missed = [n for n, was in reached([vae]).items() if not was and not n.endswith("to_k.bias")]
    assert not missed
    optimizer.step()
    same = torch.equal(vae.encode(pictures).latent_dist.mean, before)
    assert same == (stage == "decoder")  # which keeps the latents to the bit


def test_latents_are_saved_with_their_scale(vae, tmp_path):
    vae = copy.deepcopy(vae)
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 3
    sd_vae.write(vae, tmp_path)
    opened = AutoencoderKL.from_pretrained(tmp_path)
    z = opened.encode(sd_vae.test_pictures(16)).latent_dist.mean * opened.config.scaling_factor
    assert z.std().item() == pytest.approx(1, abs=0.2)


# Captions


def test_words_of_captions_are_one_token_each(tokenizer):
    for i in range(100):
        text = scenes.caption(scenes.make_edit(i, "held-out").source)
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.replace(",", " ,").split()) + 2 <= diffedit.TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == text


def test_the_vocabulary_is_in_the_order_of_clip(tokenizer):
    size = len(tokenizer)
    assert size < 700
    assert tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"]) == [size - 2, size - 1]
    assert all(tokenizer.convert_tokens_to_ids(f"{s}</w>") == 256 + i for s, i in (("!", 0), ("a", 64)))
    other = "Zwölf Äpfel & 3 日本語!"  # bytes, where there are no words
    ids = tokenizer.encode(other)
    assert (ids[0], ids[-1]) == (size - 2, size - 1) and size - 1 not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "zwölfäpfel&3日本語!"
    assert tokenizer.encode("<|startoftext|><|endoftext|>")[1:-1] == [size - 2, size - 1]


# What the denoiser learns from


def test_training_sees_pictures_and_captions_as_the_pipeline_does(pool, networks, vae):
    pipe = diffedit.assemble(*networks, vae, pool.tokenizer)
    scene = sd_vae.training_scene(3, (1,))
    image = evaluate_diffedit.as_image(scene)
    levels = pipe.invert(scenes.caption(scene), image, inpaint_strength=0.0).latents
    assert torch.allclose(levels[0, 0], pool.latents[3].float(), atol=2e-3)
    embeds, empty = pipe.encode_prompt(scenes.caption(scene))
    encoder = networks[1]
    with torch.no_grad():
        assert torch.equal(encoder.encode(pool.tokens[3:4]), embeds)
        assert torch.allclose(encoder.encode(pool.no_caption), empty, atol=1e-6)


def test_the_pool_can_be_filled_again(pool, vae):
    moved, again = (diffedit.Pool(vae, pool.tokenizer, 1000, size=32) for _ in range(2))
    moved.fill(0)
    moved.renew(10)
    again.fill(10)
    for name in ("latents", "weight", "tokens"):
        assert torch.allclose(getattr(again, name), getattr(moved, name), atol=2e-3), name
    assert not torch.equal(pool.tokens[:10], moved.tokens[:10])


def test_cells_of_shapes_count_more_and_some_captions_are_left_out(pool):
    scene = sd_vae.training_scene(5, (1,))
    weights = diffedit.cell_weights(scene, 16)[0]
    (thing,) = scene.things
    row, column = (int((c + 1) * 8) for c in (thing.y, thing.x))
    assert weights[row, column] == diffedit.WEIGHT and (weights == 1).float().mean() > 0.6
    torch.manual_seed(0)
    batch = pool.draw(400)
    without = (batch.tokens == pool.no_caption).all(dim=1).float().mean()
    assert 0.05 < without < 0.16
    assert batch.latents.shape == (400, 4, 16, 16) and batch.weight.shape == (400, 1, 16, 16)


def test_one_shape_comes_before_several():
    assert diffedit.plan(0, 1000).counts == (1,)
    assert set(diffedit.plan(999, 1000).counts) == {1, 2}


def test_the_rate_falls_in_every_round():
    steps = (0, 99, 199, 300, 399, 400, 479, 559)
    shares = [diffedit.rate(step, (400, 160)) / diffedit.RATE for step in steps]
    assert shares[0] == pytest.approx(0.01) and shares[1] == shares[2] == shares[5] == shares[6] == 1
    assert shares[3] == pytest.approx(0.51) and max(shares[4], shares[7]) < 0.04


def test_noise_is_strong_and_later_of_middle_strength():
    torch.manual_seed(0)
    strong, middle = (diffedit.draw_timesteps(4000, diffedit.plan(n, 1000).strong) for n in (0, 999))
    for timesteps in (strong, middle):
        assert timesteps.dtype == torch.long and timesteps.min() >= 0 and timesteps.max() < 1000
    assert strong.float().mean() == pytest.approx(667, abs=15)
    assert (strong >= 750).float().mean() == pytest.approx(1 - 0.75**2, abs=0.03)
    assert middle.float().quantile(0.5) == pytest.approx(646, abs=15)
    assert ((middle > 400) & (middle < 800)).float().mean() > 0.6


class Oracle:
    """A UNet that is asked once, and answers with `answer` of the noisy latents and sqrt(abar)."""

    def __init__(self, answer):
        self.answer = answer

    def embed_context(self, states):
        self.states = states

    def embed_time(self, timesteps):
        self.timesteps = timesteps

    def predict(self, noisy, time, context):
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        signal = (1 - betas).cumprod(0)[self.timesteps].sqrt().view(-1, 1, 1, 1).float()
        self.answered = self.answer(noisy, signal)
        return self.answered


def test_the_loss_is_the_weighted_error_of_v(networks, pool):
    batch = pool.draw(256)
    encoder = networks[1]

    def velocity(noisy, signal):  # from x = signal x0 + noise_level noise
        return (signal * noisy - batch.latents) / (1 - signal**2).sqrt()

    with torch.no_grad():
        oracle = Oracle(velocity)
        assert diffedit.denoising_loss(oracle, encoder, batch) < 1e-6
        assert torch.equal(oracle.states, encoder.encode(batch.tokens))

        wrong = torch.randn_like(batch.latents)
        oracle = Oracle(lambda noisy, signal: velocity(noisy, signal) + wrong)
        expected = (batch.weight * wrong**2).sum() / wrong.numel()
        assert torch.allclose(diffedit.denoising_loss(oracle, encoder, batch), expected, rtol=1e-3)


@pytest.mark.slow
def test_training_reaches_every_weight_and_learns(networks, pool):
    unet, encoder = (copy.deepcopy(network) for network in networks)
    optimizer = diffedit.make_optimizer(unet, encoder)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len([*unet.parameters(), *encoder.parameters()])
    torch.manual_seed(2)
    batch = pool.draw(8)
    losses = []
    for _ in range(5):
        torch.manual_seed(1)
        loss = diffedit.denoising_loss(unet, encoder, batch)
        loss.backward()
        names = reached([unet, encoder])
        # A constant on all keys changes no attention.
        assert not [n for n, was in names.items() if not was and not n.endswith("k_proj.bias")]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


# Runs


@pytest.fixture
def small(monkeypatch):
    """A training of five steps, whose reports are short."""
    monkeypatch.setattr(diffedit, "CONFIG", SMALL)
    monkeypatch.setattr(diffedit, "captions", lambda varied: captions(300))
    for name, value in (("ROUNDS", (12, 8)), ("BATCH", 4), ("FRESH", 2), ("POOL", 32)):
        monkeypatch.setattr(diffedit, name, value)
    full = evaluate_diffedit.evaluate
    short = {"num_inference_steps": 2, "num_maps_per_mask": 1}
    monkeypatch.setattr(
        evaluate_diffedit, "evaluate", lambda pipe, count, **kwargs: full(pipe, 1, **kwargs, **short)
    )


@pytest.mark.slow
def test_the_command_trains_and_a_stopped_training_goes_on(small, vae, tmp_path, monkeypatch):
    vae.save_pretrained(tmp_path / "vae")

    def command(name):
        train.main(["diffedit", "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / name)])

    command("whole")
    original, calls = diffedit.denoising_loss, []
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit("ended"))

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(diffedit, "denoising_loss", stopping)
    with pytest.raises(SystemExit, match="ended"):
        command("part")
    signal.signal(signal.SIGTERM, before)
    assert torch.load(tmp_path / "part" / "state.pt")["step"] == 3
    command("part")
    assert len(calls) == 5
    states = [torch.load(tmp_path / name / "state.pt") for name in ("whole", "part")]
    for name, value in states[0]["average"].items():
        assert torch.allclose(states[1]["average"][name], value, atol=1e-4), name
    assert (tmp_path / "part" / "held-out.png").is_file()
    pipe = joyedit.load(tmp_path / "part" / "checkpoint")
    assert pipe.tokenizer.model_max_length == diffedit.TOKENS


def test_the_checkpoint_is_small(networks, vae, tokenizer, tmp_path):
    pipe = copy.deepcopy(diffedit.assemble(*networks, vae, tokenizer)).to(torch.bfloat16)
    pipe.save_pretrained(tmp_path)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) < 7.5e6


# Judgement


def test_a_perfect_edit_and_a_missing_one():
    cases = evaluate_diffedit.held_out(3)
    perfect = [
        evaluate_diffedit.Answer(scenes.draw(case.pair.target, sd_vae.SIZE), case.pair.region)
        for case in cases
    ]
    scores = [evaluate_diffedit.score(*both) for both in zip(cases, perfect, strict=True)]
    assert all(s.edit.ok and s.iou == 1 and s.kept > 30 and s.masked > 30 for s in scores)
    report = evaluate_diffedit.summarize(scores)
    assert report["ok"] == report["iou"] == report["mean_iou"] == 1
    for row in report["kinds"].values():
        assert row["edits"] == 3 and row["ok"] == row["iou"] == row["overlap"] == 1

    missing = zip(cases, evaluate_diffedit.nothing(cases), strict=True)
    scores = [evaluate_diffedit.score(*both) for both in missing]
    assert all(not s.edit.ok and s.iou == 0 and min(s.kept, s.masked) > 99 for s in scores)


def test_cases_are_the_same_scenes_twice():
    cases = evaluate_diffedit.held_out(4)
    assert [case.edit.kind for case in cases] == ["recolour"] * 4 + ["replace"] * 4
    for case in cases:
        assert (case.edit.source, case.edit.target) == (case.pair.source, case.pair.target)
        assert len(case.edit.pairs) in evaluate_diffedit.COUNTS
    (replaced,) = evaluate_diffedit.held_out(1, (2,), ("replace",))
    assert replaced.edit.kind == "replace" and len(replaced.edit.pairs) == 2


def test_scores_are_of_the_places_that_they_name():
    case = evaluate_diffedit.held_out(1)[0]
    source, region = scenes.draw(case.pair.source, sd_vae.SIZE), case.pair.region
    mask = np.roll(region, 3, axis=1)
    picture = source.copy()
    picture[region & ~mask] += 0.1
    score = evaluate_diffedit.score(case, evaluate_diffedit.Answer(picture, mask))
    assert score.kept == pytest.approx(100)
    share = (region & ~mask).sum() / (~mask).sum()
    assert score.masked == pytest.approx(-10 * np.log10(0.01 * share), abs=0.01)
    assert score.iou == pytest.approx((region & mask).sum() / (region | mask).sum())


def test_evaluation_reports_all_sides_and_draws(networks, vae, tokenizer):
    pipe = diffedit.assemble(*networks, vae, tokenizer)
    report, picture = evaluate_diffedit.evaluate(
        pipe, 1, (1, 2), ("recolour", "replace"), num_inference_steps=2, num_maps_per_mask=1
    )
    assert list(report) == ["model", "nothing", "ceiling"]
    assert report["nothing"]["ok"] == 0 and report["ceiling"]["iou"] > 0.5
    assert picture.width > 3 * 4 * sd_vae.SIZE
    assert set(evaluate_diffedit.SETTINGS) <= set(inspect.signature(pipe.edit).parameters)
