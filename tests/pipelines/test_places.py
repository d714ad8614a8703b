"""mask=, size= and match_colors= of JoyImage and ChronoEdit, on the small trained models: what is outside a
mask stays, latents and pixels, results have the size that was asked for, and nothing is moved."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import joyedit
from benchmarks.shapes import evaluate, scenes
from joyedit import JoyImageEditPipeline, JoyImageEditPlusPipeline
from joyedit.media.images import to_latent_input, to_output
from joyedit.pipelines.chronoedit_frames import FrameCoder
from joyedit.pipelines.made_for import MadeFor
from tests.pipelines.tiny_chronoedit import filled

SYSTEMS = ("joyimage", "chronoedit")
every_system = pytest.mark.parametrize("system", SYSTEMS)
mostly_joyimage = pytest.mark.parametrize(
    "system", ["joyimage", pytest.param("chronoedit", marks=pytest.mark.slow)]
)


@pytest.fixture(scope="module")
def loaded():
    return {name: joyedit.load(f"tiny-{name}", device="cpu", dtype="float32") for name in SYSTEMS}


@pytest.fixture
def pipes(loaded):
    made = {name: type(pipe).from_pipe(pipe) for name, pipe in loaded.items()}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def edit():
    """A held-out scene with two shapes, one of which gets another colour."""
    return evaluate.held_out(2, (1, 2), ("recolour",))[1]


@pytest.fixture(scope="module")
def scene(edit):
    return Image.fromarray(scenes.to_levels(scenes.draw(edit.source)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def around(edit, size, margin):
    """A mask, white where the edit changes the scene and `margin` pixels around."""
    changed = torch.from_numpy(edit.changed(size))[None].float()
    grown = torch.nn.functional.max_pool2d(changed, 2 * margin + 1, 1, margin)[0]
    return Image.fromarray((grown * 255).byte().numpy())


def run(pipe, image, prompt, **call):
    """The output of a call, and the edited pictures in it."""
    call = {"generator": seeded(), "output_type": "pil", **call}
    if isinstance(pipe, JoyImageEditPipeline):
        out = pipe(image=image, prompt=prompt, **call)
        return out, out.images
    sides = {} if "size" in call else {"height": 96, "width": 96}
    out = pipe(image=image, prompt=prompt, **{"only_last_frame": True, **sides, **call})
    return out, [film[-1] for film in out.frames]


def black(mask):
    return np.asarray(mask) < 128


@every_system
def test_a_masked_edit_edits_inside_and_is_the_photograph_outside(pipes, edit, scene, system):
    mask = around(edit, 96, 6)
    out, (result,) = run(pipes[system], scene, edit.instruction, mask=mask)
    np.testing.assert_array_equal(np.asarray(result)[black(mask)], np.asarray(scene)[black(mask)])
    score = evaluate.judge(edit, np.asarray(result) / 255)
    assert score.ok and score.outside > 38, score
    assert str(out.geometry) == "photograph of 96 x 96, at scale 1 in 96 x 96; result of 96 x 96"


@every_system
def test_with_the_photographs_size_it_is_the_photograph_bit_for_bit(pipes, edit, scene, system):
    """A photograph of another shape, which is drawn again; the mask has soft edges."""
    photo = scene.resize((210, 140), Image.Resampling.LANCZOS)
    soft = around(edit, 96, 6).resize((210, 140), Image.Resampling.BICUBIC)
    out, (result,) = run(pipes[system], photo, edit.instruction, mask=soft, size="input", match_colors=True)
    assert result.size == photo.size and out.geometry.size == out.geometry.photo == (140, 210)
    assert out.geometry.crop == (0, 0, 0, 0)
    np.testing.assert_array_equal(np.asarray(result)[black(soft)], np.asarray(photo)[black(soft)])
    score = evaluate.judge(edit, np.asarray(result.resize((96, 96), Image.Resampling.LANCZOS)) / 255)
    assert score.inside < 0.12 and score.overlap > 0.7, score


def cells(mask):
    """The latents of which any pixel is white."""
    white = ~black(mask)
    return torch.tensor(
        [[bool(white[y : y + 8, x : x + 8].any()) for x in range(0, 96, 8)] for y in range(0, 96, 8)]
    )


def watched(seen):
    """A callback that keeps, after every step, the latents with the noise level that they have, and x0."""

    def watch(pipe, step, timestep, tensors):
        level = float(pipe.scheduler.sigmas[step + 1])
        seen.append((tensors["latents"].clone(), tensors["denoised"], level))
        return {}

    return watch


def check_known(latents, clean, noise, sigma, editable):
    known = (1 - sigma) * clean + sigma * noise
    difference = (latents - known).abs().amax(1)  # (B, T, h, w)
    assert difference[:, :, ~editable].max() < 1e-5
    assert difference[:, :, editable].min() > 1e-4


def test_the_known_latents_of_joyimage_are_the_noised_photograph(pipes, edit, scene):
    """Noise and the draw from the posterior in the order of the generator; two images of a prompt."""
    pipe, seen = pipes["joyimage"], []
    mask = around(edit, 96, 2)
    run(
        *(pipe, scene, edit.instruction),
        mask=mask,
        num_images_per_prompt=2,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=watched(seen),
        callback_on_step_end_tensor_inputs=["latents", "denoised"],
    )
    generator = seeded()
    noise, draw = (torch.randn(2, 16, 1, 12, 12, generator=generator) for _ in range(2))
    posterior = pipe.vae.encode(to_latent_input([scene])).latent_dist
    mean, std = (
        torch.tensor(values)[None, :, None, None, None]
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    clean = (posterior.mean + posterior.std * draw - mean) / std
    assert len(seen) == 3 and seen[-1][2] == 0 and cells(mask).any() and not cells(mask).all()
    for latents, denoised, sigma in seen:
        check_known(latents[:, 0], clean, noise, sigma, cells(mask))
        check_known(denoised[:, 0], clean, noise, 0, cells(mask))


@pytest.mark.parametrize("reasoning", [False, True])
def test_the_known_latents_of_chronoedit_are_the_noised_still_film(pipes, edit, scene, reasoning):
    """With reasoning until the second step: the way, too, and the edit follows the photograph."""
    pipe, seen = pipes["chronoedit"], []
    mask = around(edit, 96, 2)
    way = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 1, "num_frames": 13}
    run(
        *(pipe, scene, edit.instruction),
        mask=mask,
        num_videos_per_prompt=2,
        num_inference_steps=3,
        output_type="latent",
        callback_on_step_end=watched(seen),
        callback_on_step_end_tensor_inputs=["latents", "denoised"],
        **(way if reasoning else {}),
    )
    config = pipe.vae.config
    mean, std = (
        torch.tensor(v)[None, :, None, None, None] for v in (config.latents_mean, config.latents_std)
    )

    def still(frames):
        film = to_latent_input([scene]).repeat(1, 1, frames, 1, 1)
        return (pipe.vae.encode(film).latent_dist.mode() - mean) / std

    clean = torch.cat((still(9), still(5)[:, :, 1:]), 2) if reasoning else still(5)
    noise = torch.randn(2, config.z_dim, clean.shape[2], 12, 12, generator=seeded())
    for step, (latents, denoised, sigma) in enumerate(seen):
        if reasoning and step == 1:
            clean, noise = clean[:, :, [0, 3]], noise[:, :, [0, 3]]
        assert latents.shape == noise.shape
        check_known(latents, clean, noise, sigma, cells(mask))
        check_known(denoised, clean, noise, 0, cells(mask))


def test_the_edit_of_a_still_film_follows_the_photograph_at_any_length(pipes):
    """Of an autoencoder in which later frames of a still film are not as the second."""
    coder = FrameCoder(filled(copy.deepcopy(pipes["chronoedit"].vae), seed=0))
    pixels = torch.rand(1, 3, 1, 16, 24, generator=seeded()) * 2 - 1
    short, long = coder.still(pixels, 5), coder.still(pixels, 13)
    assert short.shape[2] == 2 and long.shape[2] == 4
    torch.testing.assert_close(long[:, :, [0, -1]], short)
    torch.testing.assert_close(coder.condition(pixels, 13)[:, 4:, :1], short[:, :, :1])
    film = coder.vae.encode(pixels.repeat(1, 1, 9, 1, 1)).latent_dist.mode()
    torch.testing.assert_close(long[:, :, :3] * coder.std + coder.mean, film)
    assert (long[:, :, 2] - long[:, :, 3]).abs().max() > 1e-3


@pytest.mark.slow
def test_every_frame_of_a_film_keeps_what_is_outside(pipes, edit, scene):
    mask = around(edit, 96, 6)
    way = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2, "num_frames": 13}
    way["only_last_frame"] = False
    out, _ = run(pipes["chronoedit"], scene, edit.instruction, mask=mask, size="input", **way)
    assert len(out.frames[0]) == 13
    for frame in out.frames[0]:
        np.testing.assert_array_equal(np.asarray(frame)[black(mask)], np.asarray(scene)[black(mask)])
    assert (np.asarray(frame)[~black(mask)] != np.asarray(scene)[~black(mask)]).any()


def test_a_callback_may_still_replace_latents(pipes, edit, scene):
    pipe = pipes["joyimage"]

    def zero(mine, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 1 else {}

    latents = run(
        *(pipe, scene, edit.instruction),
        mask=around(edit, 96, 6),
        output_type="latent",
        callback_on_step_end=zero,
    )[0].images
    assert not latents.any()


def nothing_done(pipe, padded):
    """A callback after which the latents are those of a picture, as if nothing had been edited."""

    def replace(mine, step, timestep, tensors):
        encoded = pipe.vae.encode(to_latent_input([padded])).latent_dist.mode()
        config = pipe.vae.config
        mean, std = (
            torch.tensor(v)[None, :, None, None, None] for v in (config.latents_mean, config.latents_std)
        )
        encoded = (encoded - mean) / std
        shape = tensors["latents"].shape
        return {"latents": encoded[:, None] if len(shape) == 6 else encoded.repeat(1, 1, shape[2], 1, 1)}

    return replace


@every_system
def test_what_is_not_edited_stays_in_its_place(pipes, system):
    """A disc of which the middle is known, in a photograph that is padded to 96 x 96."""
    photo = Image.new("RGB", (240, 160), (178, 212, 245))
    ImageDraw.Draw(photo).ellipse((60.5, 40.5, 119.5, 99.5), fill=(219, 33, 33))  # around (90, 70)
    padded = Image.new("RGB", (96, 96), (178, 212, 245))
    padded.paste(photo.resize((96, 64), Image.Resampling.LANCZOS), (0, 16))
    pipe = pipes[system]
    if system == "chronoedit":  # its own size would be 112 x 64, for which the disc is not square
        padded = photo.resize((96, 64), Image.Resampling.LANCZOS).crop((0, 0, 96, 64))
        wide = Image.new("RGB", (112, 64), (178, 212, 245))
        wide.paste(padded, (8, 0))
        padded = wide
    call = {"size": "input", "callback_on_step_end": nothing_done(pipe, padded)}
    out, (result,) = run(pipe, photo, "Make the red circle blue.", **call)
    assert result.size == (240, 160) and out.geometry.bucket == padded.size[::-1]
    y, x = np.mgrid[:160, :240] + 0.5
    red = (178 - np.asarray(result)[..., 1].astype(float)).clip(60) - 60  # of green there is less in the disc
    middle = np.array([(y * red).sum(), (x * red).sum()]) / red.sum()
    np.testing.assert_allclose(middle, (70, 90), atol=0.5)
    assert np.abs(np.asarray(result, int) - np.asarray(photo, int)).mean() < 6


@mostly_joyimage
def test_of_a_photograph_that_fits_the_size_changes_nothing(pipes, edit, scene, system):
    """Nor do arguments that ask for nothing: bit for bit."""
    plain, (expected,) = run(pipes[system], scene, edit.instruction)
    _, (same,) = run(pipes[system], scene, edit.instruction, mask=None, match_colors=False)
    _, (sized,) = run(pipes[system], scene, edit.instruction, size="input")
    assert same.tobytes() == sized.tobytes() == expected.tobytes()
    (unpacked,) = plain
    assert plain[0] is unpacked and len(plain) == 1
    for copied in (copy.copy(plain), pickle.loads(pickle.dumps(plain))):
        assert copied.geometry == plain.geometry and plain.geometry.photo == (96, 96)


def test_the_own_ways_into_a_bucket_are_told(pipes, edit, scene):
    photo = scene.resize((150, 100))
    out, (result,) = run(pipes["joyimage"], photo, edit.instruction, num_inference_steps=1)
    assert result.size == (96, 96) and out.geometry.crop == pytest.approx((0, 25, 0, 25))
    out, (result,) = run(pipes["chronoedit"], photo, edit.instruction, num_inference_steps=1)
    assert result.size == (96, 96) and out.geometry.scale == pytest.approx((0.96, 0.64))


def test_without_a_size_it_is_the_working_copy_outside(pipes, edit, scene):
    """Cut from a photograph of twice the size: a pixel is black if all that it is made of is."""
    photo = scene.resize((240, 192), Image.Resampling.LANCZOS)
    mask = around(edit, 96, 6).resize((240, 192), Image.Resampling.NEAREST)
    working = joyedit.images.resize_center_crop(photo, 96, 96)
    grey = np.asarray(joyedit.images.resize_center_crop(mask.convert("RGB"), 96, 96))[..., 0]
    _, (result,) = run(pipes["joyimage"], photo, edit.instruction, mask=mask)
    outside = torch.nn.functional.max_pool2d(torch.tensor(grey > 0)[None].float(), 3, 1, 1)[0] == 0
    assert 0.4 < outside.float().mean() < 1
    np.testing.assert_array_equal(np.asarray(result)[outside], np.asarray(working)[outside])


@mostly_joyimage
@pytest.mark.parametrize("size", [(100, 131), pytest.param((57, 30), marks=pytest.mark.slow)])
def test_a_size_is_honoured_to_the_pixel(pipes, edit, scene, system, size):
    photo = scene.resize((150, 100))
    pipe, call = pipes[system], {"num_inference_steps": 1, "size": size}
    out, (result,) = run(pipe, photo, edit.instruction, **call)
    assert result.size == size[::-1] and out.geometry.size == size
    for kind in ("np", "pt"):
        array = run(pipe, photo, edit.instruction, output_type=kind, **call)[1]
        levels = torch.as_tensor(array[0])
        levels = levels.permute(1, 2, 0) if kind == "pt" else levels
        np.testing.assert_array_equal((levels * 255).round().byte(), np.asarray(result))


def test_a_size_needs_no_photograph(pipes):
    out, (result,) = run(pipes["joyimage"], None, "a red circle", num_inference_steps=1, size=(40, 80))
    _, (whole,) = run(pipes["joyimage"], None, "a red circle", num_inference_steps=1)
    assert result.size == (80, 40) and out.geometry is None
    expected = np.asarray(whole.crop((0, 24, 96, 72)).resize((80, 40), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(np.asarray(result) - expected).max() <= 3


def test_photographs_of_several_sizes_come_back_in_theirs(pipes, edit, scene):
    """In a batch of prompts of several lengths, twice each: what each alone gives."""
    pipe = pipes["joyimage"]
    photos = [scene, scene.resize((130, 96))]
    masks = [around(edit, 96, 6), around(edit, 96, 4).resize((130, 96), Image.Resampling.NEAREST)]
    prompts = [edit.instruction, "Make the image black and white."]
    call = {"size": "input", "match_colors": True, "num_images_per_prompt": 2}
    generators = [seeded(i) for i in range(4)]
    _, together = run(pipe, photos, prompts, mask=masks, generator=generators, **call)
    assert [one.size for one in together] == [(96, 96)] * 2 + [(130, 96)] * 2
    for i in range(2):
        generators = [seeded(2 * i), seeded(2 * i + 1)]
        _, alone = run(pipe, photos[i], prompts[i], mask=masks[i], generator=generators, **call)
        for one, other in zip(together[2 * i :], alone, strict=False):
            assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
            np.testing.assert_array_equal(
                np.asarray(one)[black(masks[i])], np.asarray(photos[i])[black(masks[i])]
            )


def test_masks_come_in_any_form(pipes, edit, scene):
    mask = around(edit, 96, 6)
    levels = np.asarray(mask)
    forms = (mask, levels > 0, torch.from_numpy(levels / 255)[None, None], [mask])
    call = {"num_inference_steps": 1}
    results = {
        run(pipes["joyimage"], scene, edit.instruction, mask=form, **call)[1][0].tobytes() for form in forms
    }
    assert len(results) == 1


@mostly_joyimage
def test_colours_are_matched_to_the_photograph(pipes, edit, scene, system, monkeypatch):
    """An autoencoder that darkens everything: with a mask what is inside is as with a right one, without a
    mask everything is."""
    pipe = pipes[system]
    mask = around(edit, 96, 6)
    _, (right,) = run(pipe, scene, edit.instruction, mask=mask)
    _, (whole,) = run(pipe, scene, edit.instruction)
    code = type(pipe.vae)._code

    def darker(self, how, x):
        pixels = code(self, how, x)
        return pixels if pixels.shape[1] != 3 else (pixels + 1) * 0.85 - 0.95

    monkeypatch.setattr(type(pipe.vae), "_code", darker)
    for expected, call in ((right, {"mask": mask}), (whole, {})):
        dark, matched = (
            np.abs(
                np.asarray(run(pipe, scene, edit.instruction, match_colors=match, **call)[1][0], int)
                - np.asarray(expected, int)
            )
            for match in (False, True)
        )
        inside = ~black(mask)
        assert dark[inside].mean() > 10 and matched[inside].mean() < 3
        if call:
            assert not matched[~inside].any()


REFUSED = [
    (
        {"mask": Image.new("L", (50, 96), 255)},
        ValueError,
        "mask is 50 x 96 pixels, and the photograph 96 x 96",
    ),
    ({"mask": Image.new("L", (96, 96))}, ValueError, "mask is all black"),
    ({"mask": np.full((96, 96), 0.4)}, ValueError, "mask is all black"),
    ({"mask": [Image.new("L", (96, 96), 255)] * 2}, ValueError, "2 masks for 1 edits"),
    ({"mask": np.ones((96, 96, 3), np.uint8)}, ValueError, "mask is 3 x 96 pixels|mask holds|masks for 1"),
    ({"mask": np.full((96, 96), 1.5)}, ValueError, r"mask holds 1.5 to 1.5: must be in \[0, 1\]"),
    ({"mask": "mask.png"}, TypeError, "mask is, or holds, a str"),
    ({"mask": []}, ValueError, "mask is an empty list"),
    ({"size": "photo"}, ValueError, "size='photo': must be None, 'input' or"),
    ({"size": (0, 0)}, ValueError, r"size=\(0, 0\): must be"),
    ({"size": (96,)}, ValueError, "size="),
    ({"size": 96}, ValueError, "size=96"),
    ({"size": (96.5, 96)}, ValueError, "size="),
    ({"size": (15, 96)}, ValueError, "both at least 16 pixels"),
    ({"size": (4000, 4000)}, ValueError, "size=.* has too many pixels: at most"),
    (
        {"size": "input", "height": 96, "width": 96},
        ValueError,
        "size='input' says how large the result is: leave out",
    ),
    ({"size": "input", "output_type": "latent"}, ValueError, "size is about pixels"),
    ({"match_colors": True, "output_type": "latent"}, ValueError, "match_colors is about pixels"),
    ({"match_colors": "yes"}, ValueError, "match_colors='yes'"),
]


@every_system
@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_what_is_refused_is_refused_before_any_work(pipes, scene, system, call, error, message, monkeypatch):
    pipe = pipes[system]
    monkeypatch.setattr(type(pipe), "on_device", None)
    with pytest.raises(error, match=message):
        run(pipe, scene, "Make it red.", **call)


def test_what_needs_a_photograph_says_so(pipes):
    white = Image.new("L", (96, 96), 255)
    for call, name in (
        ({"mask": white}, "mask"),
        ({"size": "input"}, "size"),
        ({"match_colors": True}, "match_colors"),
    ):
        with pytest.raises(ValueError, match=f"{name} needs image"):
            run(pipes["joyimage"], None, "a", **call)


def test_a_mask_that_lies_in_what_is_cut_off_is_refused(pipes, scene):
    mask = Image.new("L", (150, 100))
    mask.paste(255, (0, 0, 10, 100))
    with pytest.raises(ValueError, match="mask has no white where the networks see the photograph"):
        run(pipes["joyimage"], scene.resize((150, 100)), "Make it red.", mask=mask)


def test_photographs_of_several_sizes_are_no_array(pipes, scene):
    photos = [scene, scene.resize((130, 96))]
    with pytest.raises(ValueError, match="photographs of several sizes"):
        run(pipes["joyimage"], photos, ["a", "b"], size="input", output_type="np")


def test_chronoedit_works_at_the_size_that_the_checkpoint_was_made_for(pipes, scene):
    pipe = pipes["chronoedit"]
    call = {"size": "input", "num_inference_steps": 1}
    assert run(pipe, scene, "a", **call)[0].geometry.bucket == (96, 96)
    pipe.made_for = MadeFor(basesize=64)
    assert run(pipe, scene.resize((140, 100)), "a", **call)[0].geometry.bucket == (48, 64)


def test_edit_plus_has_none_of_it(pipes):
    pipe = JoyImageEditPlusPipeline.from_pipe(pipes["joyimage"])
    for name in ("mask", "size", "match_colors"):
        with pytest.raises(TypeError, match=name):
            pipe([], "a", **{name: None})


def test_to_output_is_as_it_was():
    """What the pipelines hand their pixels to when nothing is asked."""
    pixels = torch.rand(2, 3, 16, 16, generator=seeded()) * 2 - 1
    levels = np.asarray(to_output(pixels)[1])
    np.testing.assert_array_equal(levels, ((pixels[1] / 2 + 0.5) * 255).round().byte().permute(1, 2, 0))
