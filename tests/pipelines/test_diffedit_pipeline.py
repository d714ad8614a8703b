"""What users of StableDiffusionDiffEditPipeline meet: the properties of an edit that hold without another
implementation, callbacks, refusals before work, and the work that is not done twice."""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_diffedit_checkpoint
from joyedit import DDIMInverseScheduler, DDIMScheduler, PipelineCallback, StableDiffusionDiffEditPipeline
from joyedit.media.masks import to_model_pixels
from joyedit.pipelines.diffedit import LATE_BLEND, SAMPLED_INVERSION

SIZE = (9, 12)  # of latents
SOURCE, TARGET, OTHER = "a bowl of fruits", "a basket of pears, on a table", "a dog in the snow"
STEPS = {"num_inference_steps": 5, "inpaint_strength": 0.6}
TAKEN = 3


def filled(network, seed):
    """Random weights that keep the scale of what passes, so that prompts and pictures show in the result."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            wide = noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.2 * noise
            is_norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if is_norm else noise if "embedding" in name else wide)
    return network


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_diffedit_checkpoint(folder, dtype=torch.float32, safety_checker=True)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(checkpoint, dtype="float32")
    for seed, part in enumerate((pipe.unet, pipe.vae, pipe.text_encoder)):
        filled(part, seed)
    return pipe


def build(loaded, **parts):
    usual = {**loaded.components, "safety_checker": None, "requires_safety_checker": False}
    made = StableDiffusionDiffEditPipeline(**{**usual, **parts})
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pipe(loaded):
    return build(loaded)


def picture(seed=0, width=100, height=77):
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 255, (7, 9, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photo():
    return picture()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def half_mask(batch=1):
    mask = torch.zeros(batch, *SIZE)
    mask[:, 2:6, 3:10] = 1
    return mask


def make_mask(pipe, photo, target=TARGET, source=SOURCE, **call):
    call = {"num_maps_per_mask": 2, "num_inference_steps": 5, "generator": seeded(), **call}
    return pipe.generate_mask(photo, target_prompt=target, source_prompt=source, **call)


def invert(pipe, photo, prompt=SOURCE, **call):
    return pipe.invert(prompt, photo, **{**STEPS, "guidance_scale": 1.0, **call}).latents


def repaint(pipe, levels, mask=None, prompt=TARGET, **call):
    call = {**STEPS, "output_type": "np", "negative_prompt": SOURCE, **call}
    return pipe(prompt, half_mask() if mask is None else mask, levels, **call).images


def reconstruction(pipe, photo):
    """The photograph through the autoencoder and back, without the pipeline. (B, H, W, 3) in [0, 1]."""
    pixels = pipe.vae.decode(pipe.vae.encode(to_model_pixels(photo)).latent_dist.mode()).sample
    return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach().numpy()


def both(first, second):
    def run(*args, **kwargs):
        first(*args, **kwargs)
        return second(*args, **kwargs)

    return run


@contextlib.contextmanager
def counted(pipe):
    """How often each network runs in the block, and with how many samples."""
    counts = {"unet": [], "context": [], "time": [], "encode": [], "decode": [], "text": []}
    watched = [
        (pipe.unet, "predict", lambda x, *_, branches=1: counts["unet"].append(branches * len(x))),
        (pipe.unet, "embed_context", lambda x: counts["context"].append(len(x))),
        (pipe.unet, "embed_time", lambda t: counts["time"].append(t.numel())),
        (pipe.vae, "encode", lambda x: counts["encode"].append(len(x))),
        (pipe.vae, "decode", lambda x: counts["decode"].append(len(x))),
        (pipe.text_encoder, "encode", lambda x, *_: counts["text"].append(len(x))),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for network, name, count in watched:
            patch.setattr(network, name, both(count, getattr(network, name)))
        yield counts


def test_outside_an_empty_mask_nothing_changes(pipe, photo):
    levels = invert(pipe, photo)
    assert levels.shape == (1, TAKEN + 1, 4, *SIZE) and levels.dtype == torch.float32
    for mask in (np.zeros(SIZE), torch.zeros(1, 1, *SIZE), Image.new("L", (33, 20))):
        np.testing.assert_allclose(repaint(pipe, levels, mask), reconstruction(pipe, photo), atol=1e-5)
    clean = pipe.vae.encode(to_model_pixels(photo)).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(levels[:, -1], clean)
    latents = pipe(TARGET, half_mask(), levels, **STEPS, output_type="latent").images
    outside = half_mask()[0] == 0
    assert torch.equal(latents[..., outside], levels[:, -1][..., outside])
    assert (latents - levels[:, -1])[..., ~outside].abs().min() > 0


def test_every_step_leaves_the_level_that_it_reached_outside_the_mask(pipe, photo):
    levels, seen = invert(pipe, photo), []
    repaint(pipe, levels, callback=lambda i, t, x: seen.append(x.clone()))
    outside = half_mask()[0] == 0
    for i, x in enumerate(seen):
        assert torch.equal(x[..., outside], levels[:, i + 1][..., outside])


def test_whatever_is_in_the_mask_is_denoised(pipe, photo):
    """With everything repainted the levels matter only at the start."""
    levels = invert(pipe, photo)
    first = repaint(pipe, levels, torch.ones(SIZE))
    others = torch.cat((levels[:, :1], torch.randn(1, TAKEN, 4, *SIZE)), dim=1)
    assert np.array_equal(repaint(pipe, others, torch.ones(SIZE)), first)
    assert np.abs(repaint(pipe, levels, torch.ones(SIZE), prompt=OTHER) - first).max() > 0.01


def test_equal_prompts_make_an_empty_mask(pipe, photo, caplog):
    with counted(pipe) as counts:
        mask = make_mask(pipe, photo, SOURCE, SOURCE)
    assert mask.shape == (1, *SIZE) and not mask.any() and "the mask is empty" in caplog.text
    assert counts["unet"] == counts["encode"] == []
    caplog.clear()
    heat = make_mask(pipe, photo, [TARGET, SOURCE, OTHER], [SOURCE] * 3, output_type="heat")
    assert heat[0].any() and not heat[1].any() and heat[2].any()
    assert "the mask is empty" in caplog.text
    caplog.clear()
    distinct = dict(target_negative_prompt=OTHER, guidance_scale=3.0)
    assert make_mask(pipe, photo, SOURCE, SOURCE, **distinct).any() and not caplog.text


def test_masks_of_a_batch_are_those_of_single_runs(pipe):
    photos, targets, sources = [picture(1), picture(2)], [TARGET, OTHER], [SOURCE, "a cat"]
    alone = [
        make_mask(pipe, *args, generator=seeded(seed), output_type="heat")
        for seed, *args in zip((5, 6), photos, targets, sources, strict=True)
    ]
    lists = [seeded(5), seeded(6)]
    batch = make_mask(pipe, photos, targets, sources, generator=lists, output_type="heat")
    np.testing.assert_allclose(batch, np.concatenate(alone), atol=1e-4)
    masks = make_mask(pipe, photos, targets, sources, generator=[seeded(5), seeded(6)])
    assert np.array_equal(masks, batch > 0.5) and masks.dtype == np.int64
    assert 0 < masks[0].mean() < 0.9 and not np.array_equal(*masks)
    shared = make_mask(pipe, photos[0], targets, sources, generator=[seeded(5), seeded(6)])
    second = make_mask(pipe, photos[0], targets[1], sources[1], generator=seeded(6))
    assert np.array_equal(shared, np.concatenate((masks[:1], second)))
    every_map = make_mask(pipe, photos, targets, sources, generator=[seeded(s) for s in range(4)])
    first = make_mask(pipe, photos[0], targets[0], sources[0], generator=[seeded(0), seeded(1)])
    assert np.array_equal(every_map[:1], first)


def test_inversion_and_edit_of_a_batch_are_those_of_single_runs(pipe):
    photos, sources, targets = [picture(1), picture(2)], [SOURCE, "a cat"], [TARGET, OTHER]
    call = dict(guidance_scale=3.0, num_reg_steps=1)
    alone = [
        invert(pipe, *args, **call, generator=[seeded(s)])
        for s, *args in zip((1, 2), photos, sources, strict=True)
    ]
    levels = invert(pipe, photos, sources, **call, generator=[seeded(1), seeded(2)])
    torch.testing.assert_close(levels, torch.cat(alone), atol=1e-4, rtol=1e-4)
    masks = torch.cat((half_mask(), half_mask().flip(1)))
    call = dict(eta=0.7, negative_prompt=sources, generator=[seeded(3), seeded(4)])
    batch = repaint(pipe, levels, masks, targets, **call)
    for i in range(2):
        call = dict(eta=0.7, negative_prompt=sources[i], generator=seeded(3 + i))
        single = repaint(pipe, levels[i : i + 1], masks[i : i + 1], targets[i], **call)
        np.testing.assert_allclose(batch[i : i + 1], single, atol=1e-4)


def test_several_images_per_prompt_keep_their_masks_levels_and_photographs(pipe):
    photos, sources, targets = [picture(1), picture(2)], [SOURCE, "a cat"], [TARGET, OTHER]
    levels = invert(pipe, photos, sources)
    masks = torch.cat((half_mask(), half_mask().flip(1)))
    call = dict(num_images_per_prompt=2, negative_prompt=sources, image=photos, composite=True, eta=1.0)
    many = repaint(pipe, levels, masks, targets, **call, generator=[seeded(s) for s in range(4)])
    for i in range(4):
        own = slice(i // 2, i // 2 + 1)
        call = dict(negative_prompt=sources[own], image=photos[own], composite=True, eta=1.0)
        alone = repaint(pipe, levels[own], masks[own], targets[own], **call, generator=[seeded(i)])
        np.testing.assert_allclose(many[i : i + 1], alone, atol=1e-4)


def test_guidance_of_masks_has_the_sign_of_the_paper(pipe, photo):
    """The formula, with the networks called one by one."""
    scale, ratio, maps = 3.0, 2.5, 2
    generator = seeded(9)
    posterior = pipe.vae.encode(to_model_pixels(photo)).latent_dist
    noise = torch.randn(maps, 4, *SIZE, generator=generator)
    latents = (posterior.mean + posterior.std * noise) * pipe.vae.config.scaling_factor
    noise = torch.randn(maps, 4, *SIZE, generator=generator)
    signal = pipe.scheduler.alphas_cumprod[601]  # 3 of 5 steps
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise

    def eps(prompt):
        embeds = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0]
        return pipe.unet(noisy, 401 + 200, embeds.expand(maps, -1, -1)).sample

    def guided(prompt, negative):
        return eps(negative) + scale * (eps(prompt) - eps(negative))

    with torch.no_grad():
        difference = (guided(TARGET, "blurry") - guided(SOURCE, OTHER)).abs().mean(dim=(0, 1))
    heat = (difference / (ratio * difference.mean())).clamp(max=1)
    found = pipe.generate_mask(
        photo,
        target_prompt=TARGET,
        target_negative_prompt="blurry",
        source_prompt=SOURCE,
        source_negative_prompt=OTHER,
        num_maps_per_mask=maps,
        mask_encode_strength=0.8,
        mask_thresholding_ratio=ratio,
        num_inference_steps=5,
        guidance_scale=scale,
        generator=seeded(9),
        output_type="heat",
    )
    np.testing.assert_allclose(found[0], heat.numpy(), atol=1e-4)


def test_guidance_scale_and_equal_negatives_make_no_difference_to_masks(pipe, photo):
    masks = [make_mask(pipe, photo, output_type="heat", guidance_scale=g) for g in (1.0, 7.5)]
    np.testing.assert_allclose(*masks, atol=1e-5)
    same = dict(target_negative_prompt=OTHER, source_negative_prompt=OTHER)
    np.testing.assert_allclose(make_mask(pipe, photo, output_type="heat", **same), masks[0], atol=1e-5)


def test_inversion_and_solver_are_inverse(pipe, photo, monkeypatch):
    """Where the prediction does not depend on the latents, the way back ends where the way there began."""
    eps = torch.randn(1, 4, *SIZE)
    monkeypatch.setattr(pipe.unet, "predict", lambda x, time, *_, **__: eps * (2 + time.sum().sin()))
    levels = invert(pipe, photo)
    latents = pipe(TARGET, torch.ones(SIZE), levels, **STEPS, guidance_scale=1.0, output_type="latent").images
    torch.testing.assert_close(latents, levels[:, -1], atol=1e-5, rtol=1e-5)
    assert (levels[:, 0] - levels[:, -1]).abs().max() > 0.5


def test_levels_without_the_clean_one(pipe, photo, caplog, loaded):
    levels = invert(pipe, photo)
    whole = repaint(pipe, levels)
    assert not caplog.text
    np.testing.assert_allclose(repaint(pipe, levels[:, :-1], image=photo), whole, atol=1e-6)
    np.testing.assert_allclose(repaint(pipe, levels[:, :-1], image=levels[:, -1]), whole, atol=1e-6)
    assert not caplog.text
    without = repaint(pipe, levels[:, :-1])
    assert "or the photograph as image=" in caplog.text
    late = build(loaded, reference_quirks=[LATE_BLEND])
    assert np.array_equal(repaint(late, levels[:, :-1]), without) and np.abs(without - whole).max() > 1e-3
    assert torch.equal(invert(late, photo), levels[:, :-1])
    for form in (levels.flatten(0, 1), [levels], list(levels)):
        np.testing.assert_array_equal(repaint(pipe, form), whole)


@pytest.mark.parametrize("size", [(100, 77), (96, 72)])
def test_composite_pastes_exact_pixels(pipe, size):
    photo = picture(3, *size)
    levels = invert(pipe, photo)
    call = dict(output_type="pil", image=photo)
    plain, pasted = (np.asarray(repaint(pipe, levels, **call, composite=c)[0]) for c in (False, True))
    original = np.asarray(photo.resize((96, 72), Image.Resampling.LANCZOS))
    inside = np.kron(half_mask()[0].numpy(), np.ones((8, 8))) > 0
    assert np.array_equal(pasted[~inside], original[~inside])
    assert np.array_equal(pasted[inside], plain[inside])
    assert not np.array_equal(plain[~inside], original[~inside])
    assert not np.array_equal(plain[inside], original[inside])


def test_a_strength_without_steps_gives_the_reconstruction(pipe, photo):
    nothing = dict(num_inference_steps=5, inpaint_strength=0.1)
    levels = pipe.invert(SOURCE, photo, **nothing, decode_latents=True, output_type="np")
    assert levels.latents.shape == (1, 1, 4, *SIZE)
    np.testing.assert_allclose(levels.images, reconstruction(pipe, photo), atol=1e-5)
    with counted(pipe) as counts:
        images = pipe(TARGET, torch.ones(SIZE), levels.latents, **nothing, output_type="np").images
    assert counts["unet"] == []
    np.testing.assert_allclose(images, reconstruction(pipe, photo), atol=1e-5)
    assert make_mask(pipe, photo, mask_encode_strength=0.0).any()  # the least noise that there is


def test_latents_are_where_the_run_starts(pipe, photo):
    levels = invert(pipe, photo)
    start = torch.randn(1, 4, *SIZE)
    moved = torch.cat((start[:, None], levels[:, 1:]), dim=1)
    found = repaint(pipe, levels, latents=start)
    assert np.array_equal(found, repaint(pipe, moved)) and not np.array_equal(found, repaint(pipe, levels))
    many = repaint(pipe, levels, latents=torch.cat((start, levels[:, 0])), num_images_per_prompt=2)
    np.testing.assert_allclose(many, np.concatenate((found, repaint(pipe, levels))), atol=1e-4)


def test_inversion_repeats_without_a_seed(pipe, loaded, photo):
    assert torch.equal(invert(pipe, photo), invert(pipe, photo))
    drawn = build(loaded, reference_quirks=SAMPLED_INVERSION)
    first, again, other = (invert(drawn, photo, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_regularisation_brings_predictions_towards_noise(pipe, photo):
    last = []
    for steps in (0, 3):
        outputs = []
        step = both(lambda _, output, *a, outputs=outputs: outputs.append(output), DDIMInverseScheduler.step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DDIMInverseScheduler, "step", step)
            invert(pipe, photo, num_reg_steps=steps, lambda_auto_corr=0.0, lambda_kl=5.0)
        last.append(float((outputs[0].var() - 1).abs()))
    assert last[1] < last[0]


def test_callbacks_of_both_kinds(pipe, photo):
    for run, timesteps in ((invert, [1, 201, 401]), (None, [401, 201, 1])):
        levels, seen, legacy = invert(pipe, photo), [], []

        def on_step_end(self, i, t, tensors, seen=seen):
            assert self.unet is pipe.unet and set(tensors) == {"latents"}
            seen.append((i, int(t)))
            return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else None

        call = dict(
            callback_on_step_end=on_step_end,
            callback=lambda i, t, x, legacy=legacy: legacy.append((i, int(t), float(x.abs().max()))),
            callback_steps=2,
        )
        found = run(pipe, photo, **call) if run else repaint(pipe, levels, **call, output_type="latent")
        assert seen == list(enumerate(timesteps))
        assert [entry[:2] for entry in legacy] == [(0, timesteps[0]), (2, timesteps[2])]
        assert not found[:, -3].any() if run else found.any()

    class Stop(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            pipeline.interrupt = step_index == self.cutoff_step_index
            return callback_kwargs

    stop = Stop(cutoff_step_ratio=None, cutoff_step_index=1)
    with counted(pipe) as counts:
        levels = invert(pipe, photo, callback_on_step_end=stop)
    assert counts["unet"] == [1, 1] and levels.shape[1] == 3
    assert invert(pipe, photo).shape[1] == TAKEN + 1  # the next call runs again


def test_nothing_is_computed_twice(pipe, photo):
    with counted(pipe) as counts:
        make_mask(pipe, photo, num_maps_per_mask=5)
    assert counts["unet"] == [2 * 5] and counts["context"] == [2] and counts["time"] == [1]
    assert counts["encode"] == [1] and counts["text"] == [3]  # two captions and the empty one
    with counted(pipe) as counts:
        make_mask(pipe, photo, target_negative_prompt=OTHER)
    assert counts["unet"] == [4 * 2] and counts["text"] == [4]
    with counted(pipe) as counts:
        make_mask(pipe, photo, target_negative_prompt=SOURCE, guidance_scale=2.0)
    assert counts["unet"] == [3 * 2]
    with counted(pipe) as counts:
        levels = invert(pipe, photo, guidance_scale=7.5)
    assert counts["unet"] == [2] * TAKEN and counts["context"] == [2] and counts["time"] == [TAKEN]
    assert counts["encode"] == [1] and counts["decode"] == []
    with counted(pipe) as counts:
        repaint(pipe, levels, num_images_per_prompt=3)
    assert counts["unet"] == [6] * TAKEN and counts["context"] == [2] and counts["time"] == [TAKEN]
    assert counts["encode"] == [] and counts["decode"] == [3]
    with counted(pipe) as counts:
        repaint(pipe, levels, negative_prompt=TARGET)
    assert counts["unet"] == [1] * TAKEN and counts["text"] == [1]
    with counted(pipe) as counts:
        pipe.invert(SOURCE, photo, **STEPS, guidance_scale=1, decode_latents=True)
    assert counts["decode"] == [1] * (TAKEN + 1)
    with counted(pipe) as counts:
        pipe.edit(photo, SOURCE, TARGET, **STEPS, num_maps_per_mask=4)
    assert counts["text"] == [3] and counts["unet"] == [8, *[1] * TAKEN, *[2] * TAKEN]


def test_edit_is_the_three_stages(pipe, photo):
    call = dict(num_maps_per_mask=2, guidance_scale=4.0)
    found = pipe.edit(photo, SOURCE, TARGET, **STEPS, **call, output_type="np", generator=seeded(3))
    mask = make_mask(pipe, photo, generator=seeded(3), guidance_scale=4.0)
    assert np.array_equal(found.mask, mask) and found.mask.dtype == np.int64 and mask.any()
    assert np.array_equal(found.mask, found.heat_map > 0.5) and found.nsfw_content_detected is None
    images = repaint(pipe, invert(pipe, photo), mask, guidance_scale=4.0)
    np.testing.assert_allclose(found.images, images, atol=1e-5)
    assert not np.array_equal(
        pipe.edit(photo, SOURCE, OTHER, **STEPS, **call, generator=seeded(3)).mask, mask
    )
    given = pipe.edit(photo, SOURCE, TARGET, mask_image=half_mask(), **STEPS, output_type="np")
    assert given.heat_map is None and np.array_equal(given.mask, half_mask().numpy())
    np.testing.assert_allclose(given.images, repaint(pipe, invert(pipe, photo)), atol=1e-5)


def test_edit_of_a_batch_is_single_edits(pipe):
    photos, sources, targets = [picture(1), picture(2)], [SOURCE, "a cat"], [TARGET, OTHER]
    call = dict(**STEPS, num_maps_per_mask=3, eta=0.5, output_type="np", composite=True)
    batch = pipe.edit(photos, sources, targets, generator=[seeded(1), seeded(2)], **call)
    for i in range(2):
        alone = pipe.edit(photos[i], sources[i], targets[i], generator=seeded(1 + i), **call)
        assert np.array_equal(batch.mask[i : i + 1], alone.mask)
        np.testing.assert_allclose(batch.images[i : i + 1], alone.images, atol=1e-4)


def test_masks_come_in_every_form_and_are_not_written_to(pipe, photo):
    levels = invert(pipe, photo)
    soft = half_mask() * 0.6 + 0.2
    before = soft.clone()
    whole = repaint(pipe, levels)
    assert np.array_equal(repaint(pipe, levels, soft), whole) and torch.equal(soft, before)
    large = Image.fromarray(np.kron(half_mask()[0].numpy(), np.ones((8, 8))).astype("uint8") * 255)
    for form in (large, large.convert("RGB"), half_mask().numpy(), half_mask()[None], half_mask().bool()):
        assert np.array_equal(repaint(pipe, levels, form), whole)
    assert [m.mode for m in make_mask(pipe, photo, output_type="pil")] == ["L"]
    as_array = make_mask(pipe, photo)
    assert np.array_equal(np.asarray(make_mask(pipe, photo, output_type="pil")[0]), as_array[0] * 255)


@pytest.mark.parametrize("form", ["rgba", "uint8 array", "float array", "tensor", "list"])
def test_every_form_of_photograph_is_one_photograph(pipe, photo, form):
    photo = photo.resize((96, 72))
    pixels = np.asarray(photo)
    forms = {
        "rgba": photo.convert("RGBA"),
        "uint8 array": pixels,
        "float array": pixels / 255,
        "tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255,
        "list": [photo],
    }
    torch.testing.assert_close(invert(pipe, forms[form]), invert(pipe, photo), atol=1e-5, rtol=1e-5)


def test_clip_skip_is_for_every_stage_and_both_prompts(pipe, photo):
    skipped = pipe.encode_prompt(SOURCE, negative_prompt=OTHER, clip_skip=1)
    for mine, words in zip(skipped, (SOURCE, OTHER), strict=True):
        ids = pipe.tokenizer([words], padding="max_length", truncation=True, return_tensors="pt").input_ids
        torch.testing.assert_close(mine, pipe.text_encoder.encode(ids, 1))
    assert not torch.equal(invert(pipe, photo, clip_skip=1), invert(pipe, photo))
    heat = [make_mask(pipe, photo, output_type="heat", clip_skip=k) for k in (None, 1)]
    assert np.abs(heat[0] - heat[1]).max() > 1e-3
    with pytest.raises(ValueError, match="clip_skip"):
        invert(pipe, photo, clip_skip=99)


def test_embeddings_stand_for_prompts(pipe, photo, caplog):
    positive, negative = pipe.encode_prompt([TARGET], negative_prompt=SOURCE)
    call = dict(prompt=None, negative_prompt=None)
    levels = invert(pipe, photo)
    found = repaint(pipe, levels, **call, prompt_embeds=positive, negative_prompt_embeds=negative)
    np.testing.assert_allclose(found, repaint(pipe, levels), atol=1e-5)
    short = positive[:, :20]
    assert repaint(pipe, levels, prompt=None, prompt_embeds=short).shape == found.shape
    pipe.encode_prompt("a " * 75 + "fruit Bowl")
    assert "a prompt was cut to 77 tokens; lost: 'fruit bowl'" in caplog.text


def test_networks_in_half_precision(checkpoint, photo):
    pipe = StableDiffusionDiffEditPipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    levels = invert(pipe, photo, guidance_scale=2.0)
    assert pipe.dtype == torch.bfloat16 and levels.dtype == torch.float32
    wide = StableDiffusionDiffEditPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    wide.set_progress_bar_config(disable=True)
    exact = invert(wide, photo, guidance_scale=2.0)
    assert (levels - exact).abs().max() < 0.05 * exact.abs().max()
    edited = pipe.edit(photo, SOURCE, TARGET, **STEPS, composite=True, mask_image=half_mask(), eta=0.1)
    outside = np.kron(1 - half_mask()[0].numpy(), np.ones((8, 8))) > 0
    original = np.asarray(photo.resize((96, 72), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(edited.images[0])[outside], original[outside])


def test_memory_helpers_change_nothing(pipe, photo):
    call = dict(**STEPS, output_type="np")
    found, brought, on_device = [], [], pipe.on_device
    for helper in (lambda: None, pipe.enable_vae_slicing, lambda: pipe.set_offload("model", "cpu")):
        helper()
        found.append(pipe.edit(photo, SOURCE, TARGET, **call, generator=seeded()).images)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    pipe.disable_vae_slicing()
    pipe.on_device = both(brought.append, on_device)
    pipe.edit(photo, SOURCE, TARGET, **call)
    text, unet, vae = pipe.text_encoder, pipe.unet, pipe.vae
    assert brought == [text, vae, unet, vae, unet, unet, vae]  # each stage after the other


def test_safety_checker_sees_what_is_returned(loaded, photo):
    checker, extractor = filled(loaded.safety_checker, 4), copy.copy(loaded.feature_extractor)
    pipe = build(loaded, safety_checker=checker, feature_extractor=extractor)
    seen = []
    extractor.crop = both(seen.append, extractor.crop)
    for threshold, flagged in ((5.0, [False]), (-5.0, [True])):
        checker.concept_embeds_weights.data.fill_(threshold)
        call = dict(image=photo, composite=True, output_type="pil")
        out = pipe(TARGET, half_mask(), invert(pipe, photo), **STEPS, **call)
        assert out.nsfw_content_detected == flagged
        assert not np.asarray(out.images[0]).any() if flagged[0] else out.images[0] == seen[-1]


def test_schedulers_are_made_to_fit(loaded, checkpoint, tmp_path):
    old = DDIMScheduler.from_config(loaded.scheduler.config, steps_offset=0)
    made = build(loaded, scheduler=old, inverse_scheduler=None)
    for solver in (made.scheduler, made.inverse_scheduler):
        assert solver.config.steps_offset == 1 and solver.config.clip_sample is False
    linear = DDIMScheduler.from_config(loaded.scheduler.config, timestep_spacing="linspace")
    made = build(loaded, scheduler=linear)
    assert made.scheduler.config.timestep_spacing == "leading"
    made.scheduler = DDIMScheduler.from_config(made.scheduler.config, timestep_spacing="trailing")
    made.inverse_scheduler = DDIMInverseScheduler.from_config(made.scheduler.config)
    assert build(made).inverse_scheduler is made.inverse_scheduler
    assert build(made, scheduler=loaded.scheduler).inverse_scheduler.config.timestep_spacing == "leading"

    settings = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}
    loaded.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["_class_name"], index["inverse_scheduler"] = "StableDiffusionPipeline", [None, None]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for clips in (None, True):
        written = {**settings, **({} if clips is None else {"clip_sample": clips})}
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(written))
        opened = StableDiffusionDiffEditPipeline.from_pretrained(tmp_path)
        assert opened.scheduler.config.clip_sample is bool(clips)
        assert opened.inverse_scheduler.config.clip_sample is bool(clips)


def test_parts_that_do_not_fit_are_refused(loaded, caplog):
    wide = joyedit.UNet2DConditionModel.from_config({**loaded.unet.config, "cross_attention_dim": 24})
    with pytest.raises(ValueError, match="text_encoder is 32 wide, but unet reads prompts that are 24 wide"):
        build(loaded, unet=wide)
    with pytest.raises(ValueError, match="inpainting UNet"):
        build(loaded, unet=joyedit.UNet2DConditionModel.from_config({**loaded.unet.config, "in_channels": 9}))
    with pytest.raises(ValueError, match="needs a feature_extractor"):
        build(loaded, safety_checker=loaded.safety_checker, feature_extractor=None)
    assert not caplog.text
    build(loaded, requires_safety_checker=True)
    assert "safety_checker" in caplog.text


LEVELS = torch.zeros(1, TAKEN + 1, 4, *SIZE)
EMBEDS = torch.zeros(1, 77, 32)
SAME = {
    "both or neither of a prompt and its embeddings": (
        dict(prompt=SOURCE, prompt_embeds=EMBEDS),
        "exactly one",
    ),
    "no prompt": (dict(prompt=None), "exactly one"),
    "a prompt that is a number": (dict(prompt=3), "must be a string"),
    "an empty list": (dict(prompt=[]), "non-empty"),
    "two negatives": (dict(negative_prompt="a", negative_prompt_embeds=EMBEDS), "not both"),
    "embeddings of another width": (
        dict(prompt=None, prompt_embeds=EMBEDS[..., :8]),
        r"wanted \(1, 77, 32\)",
    ),
    "embeddings of no batch": (dict(prompt=None, prompt_embeds=EMBEDS[0]), "wanted"),
    "embeddings of no prompt": (dict(prompt=None, prompt_embeds=EMBEDS[:0]), "wanted"),
    "negatives of another batch": (dict(negative_prompt_embeds=EMBEDS.repeat(2, 1, 1)), "wanted"),
    "negatives of another length": (dict(negative_prompt_embeds=EMBEDS[:, :9]), "wanted"),
    "too many negatives": (dict(negative_prompt=["a", "b"]), "list of 2, but there are 1"),
    "strength above 1": (dict(inpaint_strength=1.1), r"inpaint_strength=1.1: must be in \[0, 1\]"),
    "strength None": (dict(inpaint_strength=None), "inpaint_strength=None"),
    "strength that is no number": (dict(inpaint_strength=float("nan")), "inpaint_strength=nan"),
    "callback_steps 0": (dict(callback_steps=0), "callback_steps=0"),
    "callback_steps None": (dict(callback_steps=None), "callback_steps=None"),
    "another tensor": (dict(callback_on_step_end_tensor_inputs=["eps"]), "eps"),
    "no steps": (dict(num_inference_steps=0), "num_inference_steps=0"),
    "too many steps": (dict(num_inference_steps=1001, inpaint_strength=0.003), "from 1 to 1000"),
    "an unknown output": (dict(output_type="jpg"), "output_type='jpg'"),
    "too many generators": (dict(generator=[seeded(), seeded()]), "list of 2, but there are 1"),
    "unknown attention arguments": (dict(cross_attention_kwargs={"gain": 1}), "only 'scale' is known"),
    "a scale that is no number": (dict(cross_attention_kwargs={"scale": "1"}), "scale='1': must be a finite"),
    "three images": (dict(image=[picture()] * 3), "3 images for 1 prompts"),
    "a path": (dict(image="photo.png"), "image is, or holds, a str"),
}
INVERT = {
    **SAME,
    "no image": (dict(image=None), "image is needed"),
    "two images for three prompts": (dict(prompt=["a"] * 3, image=[picture()] * 2), "2 images for 3"),
    "latents as pictures": (dict(output_type="latent"), "must be one of pil, np, pt$"),
}
CALL = {
    **SAME,
    "no mask": (dict(mask_image=None), "both needed"),
    "no latents": (dict(image_latents=None), "both needed"),
    "no images per prompt": (dict(num_images_per_prompt=0), "num_images_per_prompt=0"),
    "eta above 1": (dict(eta=1.5), "eta=1.5"),
    "a mask of another size": (dict(mask_image=torch.zeros(72, 96)), "72 x 96, but the latents are 9 x 12"),
    "a mask of colours": (dict(mask_image=torch.zeros(1, 3, *SIZE)), "one channel"),
    "a mask outside [0, 1]": (dict(mask_image=torch.full(SIZE, 1.5)), r"must be in \[0, 1\]"),
    "too many masks": (dict(mask_image=torch.zeros(2, *SIZE)), "2 masks for a batch of 1"),
    "latents of other settings": (
        dict(num_inference_steps=50),
        "have 4 levels, but num_inference_steps and inpaint_strength make 30 steps, for 31 levels",
    ),
    "latents of two images": (
        dict(image_latents=LEVELS.repeat(2, 1, 1, 1, 1)),
        "of 2 images, but there are 1",
    ),
    "latents of another shape": (dict(image_latents=LEVELS[0, 0]), "wanted"),
    "latents of pictures": (dict(image_latents=LEVELS[:, :, :3]), "wanted"),
    "latents that are none": (dict(image_latents="x"), "a str"),
    "a start of another size": (dict(latents=torch.zeros(1, 4, 9, 9)), r"wanted \(1, 4, 9, 12\)"),
    "nothing to paste": (dict(composite=True), "composite=True"),
    "latents to paste": (dict(composite=True, image=torch.zeros(1, 4, *SIZE)), "composite=True"),
    "nothing to paste on": (dict(composite=True, image=picture(), output_type="latent"), "composite=True"),
    "another photograph": (
        dict(composite=True, image=picture(0, 64, 64)),
        r"\(8, 8\), image_latents are \(9, 12\)",
    ),
}
MASK = {
    "no source": (dict(source_prompt=None), "source_prompt"),
    "no target": (dict(target_prompt=None), "target_prompt"),
    "two sources": (dict(source_prompt_embeds=EMBEDS), "exactly one of source_prompt"),
    "another number of sources": (
        dict(source_prompt=["a", "b"]),
        "1 target prompts of 77 and 2 source prompts",
    ),
    "sources of another length": (
        dict(source_prompt=None, source_prompt_embeds=EMBEDS[:, :9]),
        "1 target prompts of 77 and 1 source prompts of 9",
    ),
    "no maps": (dict(num_maps_per_mask=0), "num_maps_per_mask=0"),
    "maps None": (dict(num_maps_per_mask=None), "num_maps_per_mask=None"),
    "ratio 0": (dict(mask_thresholding_ratio=0.0), "mask_thresholding_ratio=0.0"),
    "ratio None": (dict(mask_thresholding_ratio=None), "mask_thresholding_ratio=None"),
    "strength": (dict(mask_encode_strength=-0.1), "mask_encode_strength=-0.1"),
    "an unknown output": (dict(output_type="pt"), "must be one of np, pil, heat"),
    "generators for neither images nor maps": (dict(generator=[seeded()] * 3), "list of 3, but there are 2"),
    "no image": (dict(image=None), "image is needed"),
    "an image too small": (dict(image=picture(0, 7, 80)), "at least 8"),
}
EDIT = {
    "other numbers of prompts": (dict(target_prompt=["a", "b"]), "2 target prompts of 77 and 1 source"),
    "a mask of another size": (dict(mask_image=torch.zeros(5, 5)), "5 x 5, but the latents are 9 x 12"),
    "eta": (dict(eta=-1), "eta=-1"),
    "output": (dict(output_type="jpg"), "output_type='jpg'"),
    "strength": (dict(inpaint_strength=2), "inpaint_strength=2"),
    "too many generators": (dict(generator=[seeded()] * 2), "list of 2"),
}


@pytest.mark.parametrize(
    ("method", "case"),
    [
        *(("invert", case) for case in INVERT),
        *(("__call__", case) for case in CALL),
        *(("generate_mask", case) for case in MASK),
        *(("edit", case) for case in EDIT),
    ],
)
def test_refusals_come_before_any_work(pipe, photo, method, case):
    usual, cases = {
        "invert": (dict(prompt=SOURCE, image=photo, **STEPS), INVERT),
        "__call__": (dict(prompt=TARGET, mask_image=half_mask(), image_latents=LEVELS, **STEPS), CALL),
        "generate_mask": (
            dict(image=photo, target_prompt=TARGET, source_prompt=SOURCE, num_maps_per_mask=2),
            MASK,
        ),
        "edit": (dict(image=photo, source_prompt=SOURCE, target_prompt=TARGET), EDIT),
    }[method]
    change, message = cases[case]
    with counted(pipe) as counts, pytest.raises((ValueError, TypeError), match=message):
        getattr(pipe, method)(**{**usual, **change})
    assert not any(counts.values())
