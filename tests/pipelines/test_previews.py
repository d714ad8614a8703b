"""Previews: x0 as callbacks get it, the map from latents to colours, and the pictures of each step."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import joyedit
from benchmarks.previews import SHIPPED, drawn_scenes, errors
from joyedit.loading import layouts
from joyedit.pipelines import previews
from joyedit.pipelines.chronoedit_frames import FrameCoder
from joyedit.schedulers.ddim import DDIMScheduler
from joyedit.schedulers.flow_match import FlowMatchEulerDiscreteScheduler
from joyedit.schedulers.unipc import UniPCMultistepScheduler

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ("joyimage", "chronoedit", "diffedit")
every_system = pytest.mark.parametrize("system", SYSTEMS)
PSNR = 24  # of a whole preview against the result, blurred alike: the maps have 26.6 and 27.2 on scenes


@pytest.fixture(scope="module")
def pipes():
    found = {system: joyedit.load(f"tiny-{system}", device="cpu", dtype="float32") for system in SYSTEMS}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


def photo(side=96):
    return Image.fromarray(
        ((drawn_scenes("held-out", side, 1)[0].permute(1, 2, 0) + 1) * 127.5).byte().numpy()
    )


def edit(pipe, callback=None, **call):
    """The edited pictures, two of JoyImage, with this callback."""
    call |= {"generator": torch.Generator().manual_seed(1), "callback_on_step_end": callback}
    if type(pipe) is joyedit.StableDiffusionDiffEditPipeline:
        texts = "a red circle on a white background", "a blue circle on a white background"
        return pipe.edit(
            photo(64), *texts, num_inference_steps=4, num_maps_per_mask=1, inpaint_strength=0.8, **call
        ).images
    text = "Make the circle red."
    if type(pipe) is joyedit.ChronoEditPipeline:
        call |= {"height": 96, "width": 96, "num_frames": 5, "output_type": "pil"}
        return pipe(photo(), text, num_inference_steps=3, **call).frames[0][-1:]
    return pipe(
        photo(), text, num_inference_steps=3, guidance_scale=2.0, num_images_per_prompt=2, **call
    ).images


@pytest.fixture(scope="module")
def watched(pipes):
    """Of each system the results of a run, what callbacks saw, and its last preview."""

    def watch(pipe):
        preview, tape = previews.Preview(), Tape("latents", "denoised")
        return edit(pipe, joyedit.MultiPipelineCallbacks([preview, tape])), tape.seen, preview.image

    return {system: watch(pipe) for system, pipe in pipes.items()}


class Tape(joyedit.PipelineCallback):
    """Keeps what callbacks may see."""

    def __init__(self, *names):
        super().__init__()
        self.names, self.seen = names, []

    @property
    def tensor_inputs(self):
        return [*self.names]

    def callback_fn(self, pipe, step, timestep, tensors):
        self.seen.append({name: tensors[name] for name in self.names})
        return tensors


def mixed(x0, eps, signal, noise):
    return signal * x0 + noise * eps


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=1.5),
        FlowMatchEulerDiscreteScheduler(shift=4.0, joyai_original=True),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        UniPCMultistepScheduler(prediction_type="epsilon", predict_x0=False),
        UniPCMultistepScheduler(prediction_type="v_prediction"),
    ],
    ids=lambda s: type(s).__name__,
)
def test_denoised_is_what_the_sample_was_mixed_from(scheduler):
    """A network that knows x0 and eps, and the solver's own samples; at the end the sample is x0 itself."""
    torch.manual_seed(1)
    x0, eps = torch.randn(2, 1, 3, 5, 7, dtype=torch.float64)
    scheduler.set_timesteps(4)
    flow = not hasattr(scheduler.config, "use_flow_sigmas") or scheduler.config.use_flow_sigmas
    sigmas = scheduler.sigmas.double()
    signal = 1 - sigmas if flow else 1 / (1 + sigmas**2).sqrt()
    noise = sigmas if flow else sigmas * signal
    x = mixed(x0, eps, signal[0], noise[0])
    for i, t in enumerate(scheduler.timesteps):
        kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
        velocity = signal[i] * eps - noise[i] * x0
        output = {"flow_prediction": eps - x0, "epsilon": eps, "v_prediction": velocity}[kind]
        found = scheduler.denoised(output, t, x)
        assert scheduler.denoised(output, t, x).equal(found), "a step was counted"
        torch.testing.assert_close(found, x0, atol=1e-4, rtol=0)  # the factors are fp32's
        x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(x.double(), x0, atol=1e-4, rtol=0)


@every_system
def test_denoised_follows_from_the_latents_before_and_after(system, pipes, watched):
    """Along straight or DDIM's lines between two levels; UniPC's are bent, but its last step ends at x0."""
    pipe, (_, seen, _) = pipes[system], watched[system]
    latents = [each["latents"] for each in seen]
    denoised = [each["denoised"] for each in seen]
    assert [x.shape for x in denoised] == [x.shape for x in latents] and len(latents) >= 3
    assert all(x.dtype is torch.float32 for x in denoised)
    if system == "joyimage":
        pipe.scheduler.set_timesteps(3)
        sigmas = pipe.scheduler.sigmas
        for i in (1, 2):
            slope = (latents[i] - latents[i - 1]) / (sigmas[i + 1] - sigmas[i])
            torch.testing.assert_close(denoised[i], latents[i - 1] - sigmas[i] * slope, atol=1e-4, rtol=0)
    elif system == "chronoedit":
        torch.testing.assert_close(denoised[-1], latents[-1], atol=1e-5, rtol=0)
        assert (denoised[0] - latents[0]).abs().max() > 0.1
    else:
        solver = DDIMScheduler.from_config(pipe.scheduler.config)
        solver.set_timesteps(4)
        times, abar = solver.timesteps[-len(latents) :], solver.alphas_cumprod.double()
        for i in range(1, len(latents)):
            here, there = abar[times[i]], abar[times[i] - 250] if times[i] >= 250 else abar[0]
            signal, noise, signal_, noise_ = here**0.5, (1 - here) ** 0.5, there**0.5, (1 - there) ** 0.5
            x0 = (noise_ * latents[i - 1] - noise * latents[i]) / (noise_ * signal - noise * signal_)
            inside = (denoised[i] - x0).abs().amax(1) < 1e-3
            outside = (denoised[i] == denoised[0]).all(1)  # the photograph's
            assert (inside | outside).all() and inside.any() and outside.any()


@every_system
def test_a_preview_changes_nothing_and_costs_nothing_where_there_is_none(system, pipes, watched, monkeypatch):
    for solver in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler):
        monkeypatch.setattr(solver, "denoised", None)  # to call it would fail
    alone, images = edit(pipes[system], Tape("latents")), watched[system][0]
    assert len(images) == len(alone) == (2 if system == "joyimage" else 1)
    assert all(map(np.array_equal, images, alone))


def test_denoised_is_there_to_look_at(pipes):
    with pytest.raises(ValueError, match="another denoised: that is computed at every step"):
        edit(pipes["joyimage"], lambda *_: {"denoised": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"only \['latents', .*\] can be replaced") as error:
        edit(pipes["joyimage"], lambda *_: {"denoise": None})
    assert "denoised" not in str(error.value)


def psnr(a, b):
    return -10 * math.log10(float((a - b).square().mean()))


def blurred(image, cells):
    """Means of a picture's cells in [0, 1], (3, cells, cells)."""
    x = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
    return F.avg_pool2d(x, x.shape[-1] // cells)


@every_system
def test_the_last_preview_is_the_result_at_the_detail_of_latents(system, watched):
    images, _, shown = watched[system]
    assert shown.size == (len(images) * images[0].width, images[0].height)
    cells = 16 if system == "diffedit" else 12
    for i, image in enumerate(images):
        one = shown.crop((i * image.width, 0, (i + 1) * image.width, image.height))
        assert psnr(blurred(one, cells), blurred(image, cells)) > PSNR


@pytest.mark.parametrize("system", ("joyimage", "chronoedit"))
def test_outside_a_mask_the_photograph_is_shown(system, pipes):
    """Whatever the network makes there; at the end that is what the latents are."""
    mask, tape = Image.new("L", (96, 96)), Tape("latents", "denoised")
    mask.paste(255, (48, 0, 96, 96))
    size = {} if system == "joyimage" else {"height": 96, "width": 96}
    call = {"mask": mask, "callback_on_step_end": tape, "output_type": "latent", **size}
    pipes[system](photo(), "Make it red.", num_inference_steps=2, **call)
    first, last = (each["denoised"] for each in tape.seen)
    assert first[..., :6].equal(last[..., :6]) and not first[..., 6:].equal(last[..., 6:])
    torch.testing.assert_close(last, tape.seen[-1]["latents"], atol=1e-5, rtol=0)


def test_the_plus_pipeline_shows_its_target(pipes):
    plus = joyedit.JoyImageEditPlusPipeline.from_pipe(pipes["joyimage"])
    preview, tape = previews.Preview(), Tape("latents", "denoised")
    call = {"callback_on_step_end": joyedit.MultiPipelineCallbacks([preview, tape]), "num_inference_steps": 2}
    (image,) = plus([photo()], "Make it red.", 48, 96, guidance_scale=2.0, **call).images
    assert preview.image.size == image.size == (96, 48)
    torch.testing.assert_close(tape.seen[-1]["denoised"], tape.seen[-1]["latents"], atol=1e-5, rtol=0)
    assert (tape.seen[0]["denoised"] - tape.seen[0]["latents"]).abs().max() > 0.01
    plus(None, "Make it red.", 48, 96, num_inference_steps=1, output_type="latent")  # nobody asks


def test_films_show_their_last_frame():
    film = torch.arange(24.0).reshape(1, 2, 3, 2, 2)
    assert previews.edited_latents(film).equal(film[:, :, 2])
    joy = torch.arange(16.0).reshape(2, 1, 2, 1, 2, 2)
    assert previews.edited_latents(joy).equal(joy.reshape(2, 2, 2, 2))


def test_of_a_batch_the_first_four_are_shown(pipes):
    preview = previews.Preview()
    tensors = {"denoised": torch.zeros(6, 1, 16, 1, 3, 5)}
    assert preview(pipes["joyimage"], 0, torch.tensor(0), tensors) is tensors
    assert preview.image.size == (4 * 40, 24)


def test_the_map_is_the_least_squares():
    """Against the normal equations in float64, and the errors against their definitions."""
    torch.manual_seed(2)
    latents, pixels = torch.randn(3, 5, 4, 6), torch.rand(3, 3, 8, 12) * 2 - 1
    found = previews.fit_map(latents, pixels)
    x = latents.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
    x = np.concatenate((x, np.ones_like(x[:, :1])), axis=1)
    y = (
        pixels.reshape(3, 3, 4, 2, 6, 2).mean((3, 5)).permute(0, 2, 3, 1).reshape(-1, 3).double().numpy() / 2
        + 0.5
    )
    wanted = np.linalg.solve(x.T @ x, x.T @ y)
    assert np.allclose(found.weight, wanted[:-1].T, atol=1e-6) and np.allclose(
        found.bias, wanted[-1], atol=1e-6
    )
    rest = ((x @ wanted - y) ** 2).sum()
    assert found.r2 == pytest.approx(1 - rest / ((y - y.mean(0)) ** 2).sum(), abs=1e-4)
    assert found.psnr == pytest.approx(-10 * np.log10(rest / y.size), abs=1e-3)


def decoded(vae, latents):
    """What the autoencoder makes of latents (B, C, h, w), in [-1, 1]."""
    if isinstance(vae, joyedit.AutoencoderKL):
        return vae.decode(latents / vae.config.scaling_factor).sample
    return FrameCoder(vae).decode(latents[:, :, None])[:, :, 0]


@torch.no_grad()
@pytest.mark.parametrize("name", ("tiny-joyimage", "tiny-diffedit"))
def test_stored_maps_are_those_of_the_small_models(name, pipes):
    """Their errors on held-out scenes are those stored, and about the same against what is decoded."""
    vae = pipes[name.removeprefix("tiny-")].vae
    found = previews.stored_maps()[previews.fingerprint(vae)]
    pictures = drawn_scenes("held-out", SHIPPED[name])
    latents = previews.encode(vae, pictures)
    judged = found.judged_by(latents, pictures)
    assert errors(judged) == errors(found)
    assert f"{found.psnr:.1f} dB" in (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    few = latents[:16]
    shown, truth = found.colours(few), (decoded(vae, few).clamp(-1, 1) + 1) / 2
    truth = F.avg_pool2d(truth, truth.shape[-1] // shown.shape[-1])
    assert psnr(shown, truth) > found.psnr - 3
    nothing = psnr(truth.mean((0, 2, 3), keepdim=True), truth)
    assert psnr(shown, truth) > nothing + 10


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_a_stored_map_is_found_in_every_dtype(name):
    folder = layouts.ASSETS / name
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kind = joyedit.AutoencoderKL if name == "tiny-diffedit" else joyedit.AutoencoderKLWan
        vae = kind.from_pretrained(folder, subfolder="vae", dtype=dtype)
        assert previews.fingerprint(vae) in previews.stored_maps() and vae.dtype is dtype
        vae.quant_conv.weight.data[0] *= 1.5
        assert previews.fingerprint(vae) not in previews.stored_maps()


def test_another_autoencoder_is_fitted_once(pipes, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "joyedit")
    state = torch.random.get_rng_state()
    for system in ("joyimage", "diffedit"):
        pipe, preview = pipes[system], previews.Preview()
        stored = previews.map_of(pipe)
        with monkeypatch.context() as patch:
            patch.setattr(previews, "stored_maps", dict)
            fitted = previews.map_of(pipe)
            caplog.clear()
            channels = fitted.weight.shape[1]
            for _ in range(2):
                preview(pipe, 0, torch.tensor(0), {"denoised": torch.zeros(1, channels, 2, 2)})
        said = [record.message for record in caplog.records if "previews: fitted" in record.message]
        assert len(said) == 1 and f"{fitted.psnr:.1f} dB" in said[0]
        pictures = drawn_scenes("held-out", 96 if system == "joyimage" else 64, 16)
        latents = previews.encode(pipe.vae, pictures)
        judged = fitted.judged_by(latents, pictures)
        assert 0.9 < judged.r2 < stored.judged_by(latents, pictures).r2
        assert not fitted.weight.equal(stored.weight)
    assert torch.random.get_rng_state().equal(state)
    blind = type(pipes["joyimage"]).from_pipe(pipes["joyimage"], vae=None)
    with pytest.raises(ValueError, match="needs vae"):
        previews.map_of(blind)


class Watch(previews.Preview):
    """Opens the file after every step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.pages = []

    def callback_fn(self, pipe, step, timestep, tensors):
        tensors = super().callback_fn(pipe, step, timestep, tensors)
        with Image.open(self.file) as image:
            self.pages.append(np.asarray(image.convert("RGB")))
        assert [*self.file.parent.iterdir()] == [self.file], "something is left beside it"
        return tensors


@pytest.mark.parametrize("suffix", ["png", pytest.param("webp", marks=pytest.mark.slow)])
def test_the_file_is_written_anew_at_every_step(suffix, pipes, tmp_path):
    watch = Watch(tmp_path / f"now.{suffix}")
    edit(pipes["diffedit"], watch)
    assert len(watch.pages) == 3 and not np.array_equal(watch.pages[0], watch.pages[1])
    last = np.asarray(watch.image)
    assert np.abs(watch.pages[-1].astype(int) - last).mean() < (1 if suffix == "png" else 6)


def test_files_that_are_there_and_files_that_cannot_be(pipes, tmp_path, monkeypatch, caplog):
    file = tmp_path / "now.png"
    with pytest.raises(ValueError, match=r"must end in \.png"):
        previews.Preview(tmp_path / "now.txt")
    file.write_text("a thesis")
    with pytest.raises(FileExistsError, match="exists: pass force=True"):
        previews.Preview(file)
    assert file.read_text() == "a thesis"
    preview = previews.Preview(file, force=True)
    tensors = {"denoised": torch.zeros(1, 1, 16, 1, 3, 5)}
    preview(pipes["joyimage"], 0, torch.tensor(0), tensors)
    before = file.read_bytes()

    def half(image, name, **options):
        open(name, "wb").write(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", half)
    for _ in range(2):  # the run goes on, and it is said once
        preview(pipes["joyimage"], 0, torch.tensor(0), tensors)
    assert file.read_bytes() == before and preview.image is not None
    assert [record.message for record in caplog.records].count(
        "the preview is not written any more: the disk is full"
    ) == 1


def test_what_appears_after_the_beginning_is_not_replaced(pipes, tmp_path, caplog):
    preview = previews.Preview(tmp_path / "now.png")
    (tmp_path / "now.png").write_text("a thesis")
    preview(pipes["joyimage"], 0, torch.tensor(0), {"denoised": torch.zeros(1, 1, 16, 1, 3, 5)})
    assert (tmp_path / "now.png").read_text() == "a thesis" and "not written" in caplog.text
