"""`joyedit edit` with ChronoEdit: the picture, the film, what is recorded and repeated, and refusals."""

import contextlib
import functools
import hashlib
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import joyedit
from benchmarks.random_checkpoint import write_random_chronoedit_checkpoint
from joyedit.command import cli
from joyedit.command import film as film_command
from joyedit.command.film import Film
from joyedit.command.instruction import Instruction
from joyedit.loading import layouts
from joyedit.media import images, video
from joyedit.pipelines import chronoedit, chronoedit_presets

ROOT = Path(__file__).resolve().parents[2]
COFFEE = ROOT / "examples" / "coffee.jpg"
TINY = ("-m", "tiny-chronoedit")
SIZE = ("--height", 32, "--width", 48)
QUICK = (*TINY, *SIZE, "--steps", 2, "-q")
pytestmark = pytest.mark.usefixtures("random_built_in")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "chrono"
    write_random_chronoedit_checkpoint(folder, seed=3)
    return folder


@pytest.fixture(scope="module")
def pipe(random_built_in):
    return joyedit.load("tiny-chronoedit", device="cpu")


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A real photograph, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(COFFEE, "coffee.jpg")
    return "coffee.jpg"


@pytest.fixture
def untouched(tmp_path):
    """A function that fails when the folder holds anything but the photograph and these names."""

    def check(*names):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["coffee.jpg", *names])

    return check


def film(pipe, photo, seed=1, size=(48, 32), steps=2, **options):
    """The film through the library: (F, H, W, 3) uint8."""
    image = joyedit.load_image(photo).resize(size)
    generator = torch.Generator().manual_seed(seed)
    options = {"image": image, "prompt": "Make it red.", "output_type": "pil", **options}
    result = pipe(**options, width=size[0], height=size[1], num_inference_steps=steps, generator=generator)
    return np.stack([np.asarray(frame) for frame in result.frames[0]])


def pixels(path):
    return np.asarray(Image.open(path))


def recorded(path):
    return images.read_metadata(path)


def read_film(path):
    """(F, H, W, 3) uint8 of an mp4, and its stream."""
    with av.open(str(path)) as opened:
        frames = [frame.to_ndarray(format="rgb24") for frame in opened.decode(video=0)]
        return np.stack(frames), opened.streams.video[0]


def read_animation(path):
    with Image.open(path) as opened:
        durations, frames = [], []
        for frame in ImageSequence.Iterator(opened):
            frames.append(np.asarray(frame.convert("RGB")))
            durations.append(frame.info["duration"])
        return np.stack(frames), durations


def test_a_photograph_becomes_a_png_and_an_mp4(photo, run, pipe, untouched):
    words = (*SIZE, "--steps", 2, "--seed", 1, "--video", "out.mp4")
    status, out, err = run("edit", photo, "Make it red.", *words)
    assert (status, out) == (0, "coffee-edit-1.png\nout.mp4\n")
    assert "working at 48 x 32 pixels, the photograph has 480 x 320" in err
    wanted = film(pipe, photo)
    assert np.array_equal(pixels("coffee-edit-1.png"), wanted[-1])
    frames, stream = read_film("out.mp4")
    assert frames.shape == wanted.shape == (5, 32, 48, 3)
    assert stream.average_rate == 16 and stream.codec_context.name == "h264"
    # Of half the colour samples little can be said: the right frame is nearer than any other.
    nearness = np.abs(frames[:, None].astype(float).mean(-1) - wanted.astype(float).mean(-1)).mean((2, 3))
    assert nearness.argmin(axis=1).tolist() == [0, 1, 2, 3, 4]
    found = recorded("coffee-edit-1.png")
    assert (
        found
        | {
            "prompt": "Make it red.",
            "num_frames": 5,
            "num_inference_steps": 2,
            "guidance_scale": 5.0,
            "model": "tiny-chronoedit",
            "pipeline": "ChronoEditPipeline",
            "scheduler": "UniPCMultistepScheduler",
            "seed": 1,
            "height": 32,
            "width": 48,
            "input": {"name": photo, "sha256": hashlib.sha256(Path(photo).read_bytes()).hexdigest()},
        }
        == found
    )
    assert not {"num_temporal_reasoning_steps", "fps", "preset", "lora", "video"} & set(found)
    untouched("coffee-edit-1.png", "out.mp4")


def watch(monkeypatch, owner, name):
    """The keyword arguments of the calls to a method."""
    calls, plain = [], getattr(owner, name)

    @functools.wraps(plain)
    def watched(*args, **options):
        calls.append(options)
        return plain(*args, **options)

    monkeypatch.setattr(owner, name, watched)
    return calls


def test_without_a_film_only_its_last_frame_is_decoded(photo, run, monkeypatch, untouched):
    calls = watch(monkeypatch, joyedit.ChronoEditPipeline, "__call__")
    assert run("edit", photo, "Make it red.", *QUICK, "--seed", 1, "-o", "a.png")[0] == 0
    assert run("edit", photo, "Make it red.", *QUICK, "--seed", 1, "-o", "b.png", "--video", "b.webp")[0] == 0
    assert [call["only_last_frame"] for call in calls] == [True, False]
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    untouched("a.png", "b.png", "b.webp")


def test_reasoning_makes_the_way_of_29_frames(photo, run, pipe):
    words = ("--reasoning-steps", 2, "--video", "way.mp4", "--fps", 8, "--seed", 4, "-o", "a.png")
    assert run("edit", photo, "Make it red.", *QUICK, *words)[1] == "a.png\nway.mp4\n"
    options = {"num_frames": 29, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2}
    wanted = film(pipe, photo, 4, **options)
    assert np.array_equal(pixels("a.png"), wanted[-1])
    frames, stream = read_film("way.mp4")
    assert frames.shape == wanted.shape == (29, 32, 48, 3) and stream.average_rate == 8
    found = recorded("a.png")
    assert (found["num_frames"], found["num_temporal_reasoning_steps"], found["fps"]) == (29, 2, 8)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "frames", "made"), [(1, 13, 5), (0, 13, 5), (2, 13, 13)])
def test_frames_and_steps_of_reasoning(photo, run, pipe, steps, frames, made):
    words = ("--reasoning-steps", steps, "--frames", frames, "--video", "out", "--seed", 2, "-o", "a.png")
    status, out, err = run("edit", photo, "Make it red.", *TINY, *SIZE, "--steps", 2, *words)
    assert (status, out) == (0, "a.png\nout\n") and "trained with num_frames=29" in err
    paths = sorted(Path("out").iterdir())
    assert [path.name for path in paths] == [f"frame_{i:04}.png" for i in range(made)]
    options = {"num_frames": frames, "num_temporal_reasoning_steps": steps}
    wanted = film(pipe, photo, 2, enable_temporal_reasoning=True, **options)
    assert np.array_equal(np.stack([pixels(path) for path in paths]), wanted)
    assert np.array_equal(pixels("a.png"), wanted[-1])
    assert recorded("a.png")["num_temporal_reasoning_steps"] == steps


def test_other_lengths_become_those_that_there_are(photo, run):
    words = ("--reasoning-steps", 2, "--frames", 7, "--video", "out")
    status, _, err = run("edit", photo, "x", *TINY, *SIZE, "--steps", 2, *words)
    assert status == 0 and "num_frames=7 is not 1 + 4k, and became 5" in err
    assert len(list(Path("out").iterdir())) == 5


def test_an_animation(photo, run, pipe):
    words = ("--video", "out.webp", "--fps", 12.5, "--seed", 1)
    assert run("edit", photo, "Make it red.", *QUICK, *words)[0] == 0
    frames, durations = read_animation("out.webp")
    wanted = film(pipe, photo)
    assert frames.shape == wanted.shape and durations == [80] * 5
    assert np.abs(frames.astype(float) - wanted).mean() < 20
    assert recorded("coffee-edit-1.png")["fps"] == 12.5


SIZES = {
    "": (304, 208),
    "--basesize 512": (624, 416),
    "--height 160 --width 240": (240, 160),
    "--height 64 --width 240": (240, 64),
    "-m {folder}": (1168, 784),
    "-m {folder} --basesize 256": (304, 208),
}


@pytest.fixture
def seen(monkeypatch):
    """The photographs that edits are given, which are their results."""
    photos = []

    def pretend(system, pipe, call, seeds, args):
        photos.append(call["image"])
        return [{"output": call["image"]}]

    monkeypatch.setattr(Film, "run", pretend)
    return photos


@pytest.mark.parametrize("words", SIZES)
def test_size_to_work_at(photo, run, seen, checkpoint, words):
    """Of 480 x 320 pixels."""
    words_given = words.format(folder=checkpoint).split()
    status, _, err = run("edit", photo, "x", *TINY, "--seed", 1, *words_given)
    assert status == 0 and seen[0].size == SIZES[words] == pixels("coffee-edit-1.png").shape[1::-1]
    assert seen[0].tobytes() == joyedit.load_image(photo).resize(SIZES[words]).tobytes()
    assert ("stretches the photograph" in err) == (words == "--height 64 --width 240")


@pytest.mark.parametrize("height,width", [(320, 480), (480, 320), (1, 1), (511, 2000), (3000, 1999), (17, 9)])
@pytest.mark.parametrize("area", [720 * 1280, 256 * 256])
def test_size_of_area_is_that_of_the_published_example(height, width, area):
    ratio = height / width
    wanted = (round(np.sqrt(area * ratio)) // 16 * 16, round(np.sqrt(area / ratio)) // 16 * 16)
    assert images.size_of_area(height, width, area) == wanted
    found = images.size_of_area(height, width, area, 8)
    assert all(0 <= 8 * (side // 8) - fit <= 8 for side, fit in zip(found, wanted, strict=True))


def test_size_of_area_refuses_what_it_cannot_fit():
    assert images.size_of_area(9, 16) == (720, 1280)
    for size in ((0, 5), (5, 0), (-1, 5)):
        with pytest.raises(ValueError, match="must be positive"):
            images.size_of_area(*size)
    with pytest.raises(ValueError, match="4000 x 1 pixels is too narrow"):
        images.size_of_area(1, 4000, 256 * 256)


SETTINGS = {
    "--steps": ("num_inference_steps", 3),
    "--guidance-scale": ("guidance_scale", 2.5),
    "--negative-prompt": ("negative_prompt", "dull"),
    "--frames": ("num_frames", 9),
    "--reasoning-steps": ("num_temporal_reasoning_steps", 3),
    "--fps": ("fps", 12.0),
    "--height": ("height", 48),
    "--width": ("width", 32),
    "--dtype": ("dtype", "bf16"),
    "--seed": ("seed", 9),
    "--lora-scale": ("lora_scale", 0.5),
}


@pytest.mark.slow
def test_every_setting_is_recorded_and_repeated(photo, run, checkpoint):
    words = [word for option, (_, value) in SETTINGS.items() for word in (option, value)]
    lora = checkpoint / "lora" / "chronoedit_distill_lora.safetensors"
    words += ["-m", checkpoint, "--lora", lora, "--reference-quirks", "-o", "first.png", "-q"]
    assert run("edit", photo, "Make it red.", *words, "--video", "first.mp4")[0] == 0
    found = recorded("first.png")
    others = {"prompt": "Make it red.", "lora": str(lora), "model": str(checkpoint), "reference_quirks": True}
    assert found | dict(SETTINGS.values()) | others == found and found["weights_dtype"] == "bfloat16"
    again = ("--config-from", "first.png", "-q")
    assert run("edit", photo, *again, "-o", "again.png", "--video", "again.mp4")[0] == 0
    assert Path("again.png").read_bytes() == Path("first.png").read_bytes()
    assert np.array_equal(read_film("again.mp4")[0], read_film("first.mp4")[0])
    assert len(read_film("again.mp4")[0]) == 9 and read_film("again.mp4")[1].average_rate == 12
    assert run("edit", photo, *again, "-o", "alone.png")[0] == 0
    assert Path("alone.png").read_bytes() == Path("first.png").read_bytes()
    changed = ("--seed", 10, "--reasoning-steps", 1, "-o", "changed.png")
    assert run("edit", photo, "Blue", *again, *changed)[0] == 0
    new = {"prompt": "Blue", "seed": 10, "num_temporal_reasoning_steps": 1}
    assert recorded("changed.png") == found | new
    lines = run("info", "first.png")[1].splitlines()
    assert {"num_temporal_reasoning_steps: 3", "num_frames: 9", "fps: 12.0", f"lora: {lora}"} <= set(lines)


def test_what_was_recorded_of_a_film_is_no_matter_to_other_models(photo, run, checkpoint, monkeypatch):
    monkeypatch.setattr(Instruction, "run", lambda *_: [{"output": Image.new("RGB", (48, 32))}])
    words = ("--reasoning-steps", 2, "-o", "first.png", "--fps", 8, "--video", "a.webp")
    assert run("edit", photo, "Make it red.", *QUICK, *words, "--seed", 3)[0] == 0
    again = ("--config-from", "first.png", "-q", "-o", "other.png")
    assert run("edit", photo, *again, "-m", "tiny-joyimage", "--steps", 1)[0] == 0
    found = recorded("other.png")
    assert found["pipeline"] == "JoyImageEditPipeline" and found["seed"] == 3
    assert not {*Film.options} & set(found)
    assert run("edit", photo, *again, "-m", checkpoint, "--force")[0] == 0
    found = recorded("other.png")
    assert (found["model"], found["num_frames"], found["fps"]) == (str(checkpoint), 29, 8)


def test_reasoning_after_a_run_without_it_makes_the_whole_film(photo, run):
    assert run("edit", photo, "x", *QUICK, "-o", "a.png")[0] == 0 and recorded("a.png")["num_frames"] == 5
    again = ("--config-from", "a.png", "--reasoning-steps", 1, "-q", "-o")
    assert run("edit", photo, *again, "b.png")[0] == 0 and recorded("b.png")["num_frames"] == 29
    assert run("edit", photo, *again, "c.png", "--frames", 9)[0] == 0
    assert recorded("c.png")["num_frames"] == 9


def test_a_recorded_adapter_is_no_matter_to_other_models(photo, run, checkpoint, monkeypatch):
    monkeypatch.setattr(Instruction, "run", lambda *_: [{"output": Image.new("RGB", (48, 32))}])
    lora = checkpoint / "lora" / "chronoedit_distill_lora.safetensors"
    words = ("--lora", lora, "--lora-scale", 0.5, "-o", "first.png")
    assert run("edit", photo, "Make it red.", *QUICK, *words)[0] == 0
    again = ("--config-from", "first.png", "-o", "other.png", "--steps", 1)
    status, _, err = run("edit", photo, *again, "-m", "tiny-joyimage")
    assert status == 0 and "is for a ChronoEditPipeline: it is left out" in err
    assert not {"lora", "lora_scale"} & set(recorded("other.png"))
    status, _, err = run("edit", photo, *again, "-m", checkpoint, "--force")
    assert status == 0 and "left out" not in err and recorded("other.png")["lora_scale"] == 0.5


def test_another_photograph_keeps_its_own_shape(photo, run, seen):
    assert run("edit", photo, "x", *QUICK, "--basesize", 256, "-o", "first.png")[0] == 0
    Image.open(photo).resize((60, 240)).save("tall.png")
    words = ("--config-from", "first.png", "-o", "tall-edit.png", "--steps", 2)  # `seen` counts none
    status, _, err = run("edit", "tall.png", *words)
    assert status == 0 and "another photograph" in err and Image.open("tall-edit.png").size == (128, 512)


def test_preset_takes_adapter_steps_and_guidance(photo, run, untouched):
    words = ("--preset", "distill", *SIZE, "--seed", 1, "-q")
    assert run("edit", photo, "Make it red.", *words, "-o", "a.png")[:2] == (0, "a.png\n")
    found = recorded("a.png")
    assert (found["preset"], found["model"]) == ("distill", "tiny-chronoedit")
    assert (found["num_inference_steps"], found["guidance_scale"]) == (8, 1.0)
    distilled = joyedit.load("tiny-chronoedit", device="cpu", preset="distill")
    assert np.array_equal(pixels("a.png"), film(distilled, photo, steps=8)[-1])
    assert run("edit", photo, "--config-from", "a.png", "-o", "again.png")[0] == 0
    assert Path("again.png").read_bytes() == Path("a.png").read_bytes()
    plain = ("--guidance-scale", 2, "--seed", 1, "-o", "plain.png")
    assert run("edit", photo, "Make it red.", *QUICK, *plain)[0] == 0
    assert run("edit", photo, "--config-from", "plain.png", "--preset", "distill", "-o", "b.png")[0] == 0
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes() != Path("plain.png").read_bytes()
    untouched("a.png", "again.png", "plain.png", "b.png")


def test_what_is_said_wins_over_a_preset_even_where_it_is_the_usual_value(photo, run):
    words = (
        "--preset",
        "distill",
        *SIZE,
        "--steps",
        2,
        "--guidance-scale",
        5,
        "--seed",
        1,
        "-q",
        "-o",
        "a.png",
    )
    assert run("edit", photo, "Make it red.", *words)[0] == 0
    found = recorded("a.png")
    assert (found["num_inference_steps"], found["guidance_scale"]) == (2, 5.0)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 0.25, 0])
def test_an_adapter_runs_with_its_scale(photo, run, checkpoint, scale):
    shutil.copy(checkpoint / "lora" / "chronoedit_distill_lora.safetensors", "mine.safetensors")
    words = () if scale is None else ("--lora-scale", scale)
    lora = ("--lora", "mine.safetensors", *words, "--seed", 1, "-o", "a.png")
    assert run("edit", photo, "Make it red.", *QUICK, *lora)[0] == 0
    other = joyedit.load("tiny-chronoedit", device="cpu")
    plain = film(other, photo)[-1]
    other.load_lora_weights("mine.safetensors")
    wanted = film(other, photo, attention_kwargs={"scale": 1 if scale is None else scale})[-1]
    assert np.array_equal(pixels("a.png"), wanted)
    assert np.array_equal(wanted, plain) == (scale == 0)
    assert recorded("a.png").get("lora_scale") == scale and recorded("a.png")["lora"] == "mine.safetensors"


def test_upscaling_needs_no_instruction_and_works_at_its_own_size(photo, run, checkpoint, monkeypatch):
    upscale = chronoedit_presets.PRESETS["upscale"]
    status, out, err = run("edit", photo, "--preset", "upscale", "-m", checkpoint, *SIZE)
    assert (status, out) == (1, "") and f"has no {upscale.adapters[0]}" in err
    calls = []

    def note(system, pipe, call, seeds, args):
        calls.append((pipe.preset, call["prompt"], call["image"].size))
        return [{"output": call["image"]} for _ in seeds]

    monkeypatch.setattr(Film, "run", note)
    monkeypatch.setattr(Film, "facts", lambda system, pipe, call, args: {"preset": args.preset})
    lora = checkpoint / "lora"
    for adapter in (*upscale.adapters, *chronoedit_presets.PRESETS["paintbrush"].adapters[1:]):
        shutil.copy(lora / "chronoedit_distill_lora.safetensors", checkpoint / adapter.file)
    try:
        words = ("-m", checkpoint, "-q", "--seed", 1)
        assert run("edit", photo, "--preset", "upscale", *words, "-o", "a.png")[0] == 0
        assert run("edit", photo, "--config-from", "a.png", "-o", "b.png", "-q")[0] == 0
        assert calls == [("upscale", upscale.prompt, (1584, 1056))] * 2  # the photograph is 3 : 2
        found = recorded("a.png")
        assert (found["preset"], found["prompt"]) == ("upscale", upscale.prompt)
        assert run("edit", photo, "a cat", "--preset", "paintbrush", *words, *SIZE, "-o", "c.png")[0] == 0
        assert calls[2] == ("paintbrush", "a cat", (48, 32))
        with pytest.raises(SystemExit):
            run("edit", photo, "--preset", "paintbrush", *words, "-o", "d.png")
    finally:
        for adapter in ("upsample_lora_diffusers", "paintbrush_lora_diffusers"):
            (lora / f"{adapter}.safetensors").unlink()


def test_an_adapter_joins_the_one_of_a_preset(photo, run, checkpoint):
    shutil.copy(checkpoint / "lora" / "chronoedit_distill_lora.safetensors", "mine.safetensors")
    words = ("--preset", "distill", "--lora", "mine.safetensors", *SIZE, "--seed", 1, "-q", "-o", "a.png")
    assert run("edit", photo, "Make it red.", *words)[0] == 0
    both = joyedit.load("tiny-chronoedit", device="cpu", preset="distill")
    alone = film(both, photo, steps=8)[-1]
    both.load_lora_weights("mine.safetensors")
    wanted = film(both, photo, steps=8)[-1].astype(int)
    assert np.abs(pixels("a.png") - wanted).max() <= 1 and np.abs(alone - wanted).max() > 1


def test_each_of_several_equals_the_run_of_its_own_seed(photo, run):
    words = ("--seed", 4, "--num-images", 2, "-o", "many.png", "--video", "film.mp4")
    out = run("edit", photo, "Make it red.", *QUICK, *words)[1]
    assert out.split() == [
        f"{name}-{n}.{end}" for n in (4, 5) for name, end in (("many", "png"), ("film", "mp4"))
    ]
    for n in (4, 5):
        words = ("--seed", n, "-o", "one.png", "--video", "one.mp4", "--force")
        assert run("edit", photo, "Make it red.", *QUICK, *words)[0] == 0
        assert np.abs(pixels(f"many-{n}.png").astype(int) - pixels("one.png")).max() <= 1
        assert recorded(f"many-{n}.png") == recorded("one.png")
        assert np.abs(read_film(f"film-{n}.mp4")[0].astype(float) - read_film("one.mp4")[0]).mean() < 2
    assert np.abs(pixels("many-4.png").astype(int) - pixels("many-5.png")).max() > 10


def test_options_of_the_machine_reach_the_loader(photo, run, monkeypatch):
    calls = watch(monkeypatch, layouts, "load")
    words = ("--device", "cpu", "--dtype", "fp32", "--offload", "model", "--reference-quirks")
    assert run("edit", photo, "x", *QUICK, *words, "--seed", 1)[0] == 0
    wanted = {"device": "cpu", "dtype": "fp32", "offload": "model", "reference_quirks": True}
    assert calls[0] | wanted == calls[0] and "preset" not in calls[0]
    assert recorded("coffee-edit-1.png")["weights_dtype"] == "float32"


def test_progress_goes_to_stderr(photo, run):
    status, out, err = run("edit", photo, "x", *TINY, *SIZE, "--steps", 2, "--seed", 1, "-v")
    assert (status, out) == (0, "coffee-edit-1.png\n") and "denoising: 100%" in err and "2/2" in err
    assert run("edit", photo, "x", *QUICK)[2] == ""


ARGUMENT_ERRORS = {
    "x --video out.gif": "argument --video: 'out.gif' does not end in .mp4, .mov, .mkv, .webp, or in nothing",
    "x --fps 8": "--fps is for the film that --video names",
    "x --fps 0 --video a.mp4": "--fps 0 is not above 0, and at most 1000",
    "x --fps 1001 --video a.mp4": "--fps 1001 is not above 0",
    "x --fps nan --video a.mp4": "nan is not finite",
    "x --frames 0": "--frames: 0 is not within 1",
    "x --frames 5.5": "--frames: '5.5' is not a whole number",
    "x --frames 29": "--frames 29 is for --reasoning-steps",
    "x --reasoning-steps -1": "--reasoning-steps",
    "x --reasoning-steps 51": "--reasoning-steps 51 is above the 50 steps",
    "x --reasoning-steps 4 --steps 3": "--reasoning-steps 4 is above the 3 steps",
    "x --reasoning-steps 9 --preset distill": "--reasoning-steps 9 is above the 8 steps",
    "x --preset fast": "invalid choice: 'fast'",
    "x --lora-scale 0.5": "--lora-scale is for the adapter",
    "x --fuse-lora": "--fuse-lora is for the adapter",
    "x --lora a --lora-scale inf": "inf is not finite",
    "x --height 40 --width 64": "40 is not a multiple of 16",
    "x --height 64": "both --height and --width",
    "--source a --target b --video a.mp4": "--video is for ChronoEdit, which takes an instruction",
    "--source a --target b --reasoning-steps 0": "--reasoning-steps is for ChronoEdit",
    "--video a.mp4": "an instruction or prompt is missing",
}


@pytest.mark.parametrize("words", ARGUMENT_ERRORS)
def test_wrong_arguments_end_with_2(words, photo, capsys, no_work):
    with pytest.raises(SystemExit) as ended:
        cli.main(["edit", photo, *words.split()])
    assert ended.value.code == 2
    assert ARGUMENT_ERRORS[words] in capsys.readouterr().err


REFUSALS = {
    "edit coffee.jpg x --video a.mp4 -m tiny-joyimage": "tiny-joyimage makes no film: --video is for Chrono",
    "edit coffee.jpg x --reasoning-steps 2 -m tiny-joyimage": "--reasoning-steps is for ChronoEdit, as in "
    "--model nvidia/ChronoEdit-14B-Diffusers, or tiny-chronoedit",
    "edit coffee.jpg x --preset distill -m tiny-joyimage": "--preset is for ChronoEdit",
    "edit coffee.jpg --source a --target b -m tiny-chronoedit": "tiny-chronoedit edits by instruction",
    "generate x -m tiny-chronoedit": "tiny-chronoedit edits photographs here: joyedit edit PHOTO INSTRUCTION",
    "edit gone.jpg x --video a.mp4": "'gone.jpg' does not exist",
    "edit coffee.jpg x --video coffee.jpg/a.mp4": "no folder that you may write to",
    "edit coffee.jpg x --video taken": "taken exists: pass --force",
    "edit coffee.jpg x --video old.mp4": "old.mp4 exists: pass --force",
    "edit coffee.jpg x --video notes --force": "notes is a file: --video without a suffix names a folder",
    "edit coffee.jpg x --video folder.mp4 --force": "folder.mp4 is a folder",
    "edit coffee.jpg x --video . -m tiny-chronoedit": "would lie among the frames in .",
    "edit coffee.jpg x --video new -o new/a.png": "new/a.png would lie among the frames in new",
    "edit coffee.jpg x --video a.webp -o a.webp": "two results would be written to one file",
    "edit coffee.jpg x --lora gone.safetensors -m tiny-chronoedit": "gone.safetensors does not exist",
    "edit coffee.jpg x --lora notes -m tiny-chronoedit": "notes cannot be opened as weights",
    "edit stripe.png x -m tiny-chronoedit": "is too narrow",
    "edit coffee.jpg --config-from other.png --frames 13": "--frames 13 is for --reasoning-steps",
    "edit coffee.jpg --config-from other.png --reasoning-steps 8": "--reasoning-steps 8 is above the 4 steps",
    "edit coffee.jpg --config-from other.png --lora-scale 2": "--lora-scale is for the adapter",
    "edit coffee.jpg --config-from damaged.png": "the recorded num_frames is damaged: 'five'",
    "edit coffee.jpg --config-from fps.png --video a.mp4": "--fps 0 is not above 0",
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals_before_work_are_one_line(words, photo, run, no_work, tmp_path):
    for name in ("old.mp4", "notes", "taken/mine"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("mine")
    Path("folder.mp4").mkdir()
    Image.new("RGB", (9000, 2)).save("stripe.png")
    records = {
        "other": {"num_inference_steps": 4},
        "damaged": {"num_frames": "five"},
        "fps": {"fps": 0},
    }
    for name, facts in records.items():
        said = {"prompt": "x", "model": "tiny-chronoedit", "pipeline": "ChronoEditPipeline", **facts}
        images.save_png(Image.new("RGB", (8, 8)), f"{name}.png", said)
    before = sorted(tmp_path.rglob("*"))
    status, out, err = run(*words.split(), "-q")
    assert (status, out) == (1, "")
    assert err.startswith("joyedit: error: ") and err.count("\n") == 1 and REFUSALS[words] in err
    assert sorted(tmp_path.rglob("*")) == before and Path("old.mp4").read_text() == "mine"


def test_a_film_without_pyav_says_what_to_install(photo, run, no_work, monkeypatch, untouched):
    monkeypatch.setitem(sys.modules, "av", None)
    status, out, err = run("edit", photo, "x", "--video", "a.mp4", "-q")
    assert (status, out) == (1, "") and err.count("\n") == 1 and "pip install joyedit[video]" in err
    untouched()
    monkeypatch.undo()


def test_an_animation_needs_no_pyav(photo, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert run("edit", photo, "x", *QUICK, "--video", "a.webp", "--seed", 1)[0] == 0
    assert read_animation("a.webp")[0].shape == (5, 32, 48, 3)


def test_force_replaces_the_frames_of_a_longer_film(photo, run):
    words = (*QUICK, "--seed", 1, "-o", "a.png", "--video", "out")
    assert run("edit", photo, "x", *words, "--reasoning-steps", 2, "--frames", 9)[0] == 0
    Path("out/notes.txt").write_text("mine")
    assert len(list(Path("out").glob("frame_*.png"))) == 9
    assert run("edit", photo, "x", *words, "--force")[0] == 0
    assert [path.name for path in sorted(Path("out").glob("frame_*.png"))][-1] == "frame_0004.png"
    assert len(list(Path("out").iterdir())) == 6 and Path("out/notes.txt").read_text() == "mine"
    assert np.array_equal(pixels("out/frame_0004.png"), pixels("a.png"))


def test_an_empty_folder_takes_frames(photo, run):
    Path("out").mkdir()
    assert run("edit", photo, "x", *QUICK, "--seed", 1, "--video", "out")[1] == "coffee-edit-1.png\nout\n"
    assert len(list(Path("out").iterdir())) == 5


@pytest.mark.slow
@pytest.mark.parametrize("target", ["out.mp4", "out.webp", "new/out.mov", "frames", "new/frames"])
def test_ctrl_c_while_the_film_is_written_leaves_no_file(photo, run, monkeypatch, target, tmp_path):
    """The film is all there under a temporary name, or the third of its frames."""
    replacing, save_png, saved = video.replacing, video.save_png, []

    @contextlib.contextmanager
    def interrupted(path):
        with replacing(path) as temporary:
            yield temporary
            raise KeyboardInterrupt

    def interrupted_png(*args, **options):
        saved.append(save_png(*args, **options))
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(video, "replacing", interrupted)
    monkeypatch.setattr(video, "save_png", interrupted_png)
    assert run("edit", photo, "x", *QUICK, "--seed", 1, "--video", target)[0] == 130
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["coffee.jpg"]


def test_ctrl_c_while_denoising_leaves_no_file(photo, run, monkeypatch, untouched):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(joyedit.UniPCMultistepScheduler, "step", interrupt)
    status, out, err = run("edit", photo, "x", *QUICK, "--video", "out.mp4")
    assert (status, out) == (130, "") and err.endswith("joyedit: interrupted\n")
    untouched()


def test_the_picture_is_kept_when_the_film_fails(photo, run, monkeypatch, untouched):
    def full(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr(video, "export_to_video", full)
    status, out, err = run("edit", photo, "x", *TINY, *SIZE, "--steps", 2, "--seed", 1, "--video", "out.mp4")
    assert (status, out) == (1, "") and err.endswith("joyedit: error: no space left\n")
    assert "coffee-edit-1.png is written, but not the film" in err
    assert recorded("coffee-edit-1.png")["seed"] == 1
    untouched("coffee-edit-1.png")


def test_constants_of_the_parser_are_those_of_the_library():
    assert set(film_command.VIDEO_SUFFIXES) == {*video.FILMS, ".webp"}
    assert (film_command.FRAMES, film_command.REASONING_FRAMES) == (chronoedit.EDIT_FRAMES, 29)
    assert chronoedit.REASONING_FRAMES == film_command.REASONING_FRAMES
    usual = (chronoedit.DEFAULT_STEPS, chronoedit.DEFAULT_GUIDANCE)
    presets = chronoedit_presets.PRESETS.items()
    settings = {name: (preset.num_inference_steps, preset.guidance_scale) for name, preset in presets}
    assert {None: usual, **settings} == film_command.PRESETS
