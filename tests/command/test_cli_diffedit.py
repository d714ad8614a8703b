"""`joyedit edit` between two captions: result, mask and grid, what is recorded and repeated, and refusals."""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_diffedit_checkpoint
from joyedit.command import arguments, cli
from joyedit.command.captions import Captions, trained_side, working_copy
from joyedit.loading import layouts
from joyedit.media import images
from joyedit.media.masks import mask_overlay

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ("--source", "a bowl of fruits", "--target", "a bowl of pears")
QUICK = ("--steps", 3, "-q")
pytestmark = pytest.mark.usefixtures("random_built_in")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "sd"
    write_random_diffedit_checkpoint(folder, seed=3)
    return folder


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A photograph of 100 x 68 pixels, in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.open(ROOT / "examples" / "coffee.jpg").resize((100, 68)).save("photo.png")
    return "photo.png"


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def recorded(path):
    return images.read_metadata(path)


def white(path):
    """The mask of a file at the size of the latents; every 8 x 8 pixels are alike."""
    levels = pixels(path)
    small = levels[::8, ::8]
    assert set(np.unique(levels)) <= {0, 255} and (np.kron(small, np.ones((8, 8))) == levels).all()
    return small > 0


def test_edit_writes_result_mask_and_grid(photo, run):
    words = ("--mask-out", "mask.png", "--grid", "grid.png", "--seed", 1, "--steps", 6)
    status, out, err = run("edit", photo, *CAPTIONS, *words)
    assert (status, out) == (0, "photo-edit-1.png\nmask.png\ngrid.png\n")
    assert "working at 96 x 64 pixels, the photograph has 100 x 68" in err
    result, mask, grid = pixels("photo-edit-1.png"), white("mask.png"), pixels("grid.png")
    assert result.shape == (64, 96, 3) and mask.shape == (8, 12) and Image.open("mask.png").mode == "L"
    assert 0 < mask.mean() < 0.5
    first, shown, last = np.split(grid, 3, axis=1)
    small = Image.open(photo).resize((96, 64), Image.Resampling.LANCZOS)
    assert (first == np.asarray(small)).all() and (last == result).all()
    inside = np.kron(mask, np.ones((8, 8))) > 0
    assert (shown[~inside] == first[~inside]).all()
    assert abs(shown[inside] - (first[inside] + [255, 0, 0]) / 2).max() <= 1


@pytest.mark.slow
def test_the_mask_depends_on_the_target(photo, run):
    for name, target in (("a", "a bowl of pears"), ("b", "a big dog")):
        words = ("--target", target, "--mask-out", f"{name}-mask.png", "-o", f"{name}.png", "--seed", 1)
        assert run("edit", photo, "--source", "a bowl of fruits", *words, *QUICK)[0] == 0
    assert (white("a-mask.png") != white("b-mask.png")).any()
    assert (pixels("a.png") != pixels("b.png")).any()


def round_trip(photo, size=(96, 64)):
    """Clean latents of the photograph (1, C, h, w), and its pixels after encoder and decoder."""
    pipe = joyedit.load("tiny-diffedit", device="cpu", dtype="float32")
    small = Image.open(photo).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    clean = pipe.invert("", small, inpaint_strength=0.0).latents[:, -1]
    return clean, images.to_output(pipe.vae.decode(clean / pipe.vae.config.scaling_factor).sample)[0]


@pytest.mark.slow
def test_outside_the_mask_is_the_round_trip_of_the_autoencoder(photo, run, monkeypatch):
    """Exactly so in the latents. The decoder mixes all pixels a little, so that of a picture only one with an
    empty mask can be compared."""
    clean, picture = round_trip(photo)
    decoded = []
    decode = joyedit.AutoencoderKL.decode
    monkeypatch.setattr(
        joyedit.AutoencoderKL, "decode", lambda vae, z: [decoded.append(z), decode(vae, z)][1]
    )
    words = ("--mask-out", "mask.png", "--seed", 1, "--dtype", "fp32", *QUICK)
    assert run("edit", photo, *CAPTIONS, *words)[0] == 0
    kept = ~torch.from_numpy(white("mask.png"))
    wanted = clean / 0.18215
    assert kept.any() and not kept.all()
    assert torch.equal(decoded[-1][..., kept], wanted[..., kept])
    assert (decoded[-1][..., ~kept] != wanted[..., ~kept]).any(dim=1).all()
    same = ("--source", "a cat", "--target", "a cat", "-o", "same.png", "--mask-out", "none.png")
    status, _, err = run("edit", photo, *same, "--seed", 1, "--steps", 3, "--dtype", "fp32")
    assert status == 0 and "the mask is empty" in err
    assert not white("none.png").any()
    assert (pixels("same.png") == np.asarray(picture)).all()


def test_composite_keeps_the_pixels_of_the_photograph(photo, run):
    words = ("--mask-out", "mask.png", "--composite", "-o", "out.png", "--seed", 1, *QUICK)
    assert run("edit", photo, *CAPTIONS, *words)[0] == 0
    outside = np.kron(white("mask.png"), np.ones((8, 8))) == 0
    small = np.asarray(Image.open(photo).resize((96, 64), Image.Resampling.LANCZOS)).astype(int)
    result = pixels("out.png")
    assert abs(result - small)[outside].max() <= 1 and abs(result - small)[~outside].max() > 10


SETTINGS = {
    "--steps": ("num_inference_steps", 4),
    "--guidance-scale": ("guidance_scale", 5.5),
    "--inpaint-strength": ("inpaint_strength", 0.75),
    "--mask-encode-strength": ("mask_encode_strength", 0.25),
    "--mask-thresholding-ratio": ("mask_thresholding_ratio", 2.5),
    "--num-maps-per-mask": ("num_maps_per_mask", 3),
    "--invert-guidance-scale": ("invert_guidance_scale", 1.5),
    "--negative-prompt": ("negative_prompt", "dull"),
}


@pytest.mark.slow
def test_every_setting_is_recorded_and_repeated(photo, run, checkpoint):
    words = [word for option, (_, value) in SETTINGS.items() for word in (option, value)]
    words += ["--composite", "-m", checkpoint, "--dtype", "fp32", "--seed", 9, "-o", "first.png", "-q"]
    words += ["--reference-quirks", "--mask-out", "mask.png"]
    assert run("edit", photo, *CAPTIONS, *words)[0] == 0
    found = recorded("first.png")
    wanted = dict(SETTINGS.values()) | {
        "source_prompt": "a bowl of fruits",
        "target_prompt": "a bowl of pears",
        "composite": True,
        "seed": 9,
        "model": str(checkpoint),
        "dtype": "fp32",
        "height": 64,
        "width": 96,
        "pipeline": "StableDiffusionDiffEditPipeline",
        "scheduler": "DDIMScheduler",
        "reference_quirks": True,
    }
    assert found | wanted == found and "prompt" not in found
    again = ("--config-from", "first.png", "-o", "again.png", "--mask-out", "again-mask.png", "-q")
    assert run("edit", photo, *again)[0] == 0
    assert Path("again.png").read_bytes() == Path("first.png").read_bytes()
    assert Path("again-mask.png").read_bytes() == Path("mask.png").read_bytes()
    changed = ("--target", "a dog", "--config-from", "first.png", "--no-composite", "-o", "changed.png", "-q")
    assert run("edit", photo, *changed)[0] == 0
    assert recorded("changed.png") == found | {"target_prompt": "a dog", "composite": False}
    assert "a bowl of pears\nNegative prompt: dull\nSteps: 4" in Image.open("first.png").info["parameters"]


def test_settings_that_are_not_given_are_those_of_the_pipeline(photo, run, monkeypatch):
    given = {}
    edit = joyedit.StableDiffusionDiffEditPipeline.edit

    def watched(pipe, **options):
        given.update(options)
        return edit(pipe, **options, num_inference_steps=3)

    watched.__signature__ = inspect.signature(edit)
    monkeypatch.setattr(joyedit.StableDiffusionDiffEditPipeline, "edit", watched)
    assert run("edit", photo, *CAPTIONS, "--seed", 1, "-q")[0] == 0
    assert set(given) == {"image", "source_prompt", "target_prompt", "generator"}
    found = recorded("photo-edit-1.png")
    assert (found["num_inference_steps"], found["inpaint_strength"], found["composite"]) == (50, 0.8, False)


@pytest.mark.slow
def test_each_of_several_images_equals_the_run_of_its_own_seed(photo, run):
    words = (*CAPTIONS, "--mask-out", "mask.png", "--grid", "grid.png", *QUICK)
    out = run("edit", photo, *words, "--seed", 4, "--num-images", 2, "-o", "many.png")[1]
    assert out.split() == [f"{name}-{n}.png" for n in (4, 5) for name in ("many", "mask", "grid")]
    assert run("edit", photo, *words, "--seed", 5, "-o", "one.png")[0] == 0
    assert (pixels("many-5.png") == pixels("one.png")).all()
    assert (white("mask-5.png") == white("mask.png")).all()
    assert (pixels("many-4.png") != pixels("many-5.png")).any()


@pytest.mark.parametrize(
    ("side", "size", "words", "wanted"),
    [
        (768, (96, 64), (), (96, 64)),
        (768, (103, 71), (), (96, 64)),
        (768, (1000, 700), (), (912, 640)),
        (768, (4000, 3000), (), (880, 664)),
        (512, (4000, 3000), (), (584, 440)),
        (64, (96, 96), (), (64, 64)),
        (64, (100, 68), (), (72, 48)),
        (768, (4000, 3000), ("--basesize", "256"), (288, 216)),
        (64, (96, 64), ("--basesize", "256"), (312, 208)),
        (64, (1000, 700), ("--height", "512", "--width", "512"), (512, 512)),
        (768, (3000, 2), (), (3000, 8)),
    ],
)
def test_size_to_work_at(side, size, words, wanted):
    commands = dict.fromkeys(
        ("edit", "generate", "batch", "ask", "estimate", "train", "demo", "convert", "verify", "info")
    )
    args = arguments.parse(["edit", "a.png", *CAPTIONS, *words], commands)
    made = working_copy(Image.new("RGB", size), args, side)
    assert made.size == wanted
    if not words and max(size) > side and min(size) > 8:
        assert made.width * made.height <= side**2


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "side"), [(64, 512), (96, 768), ([32, 48], 256), (None, 512), (8, 64)])
def test_pictures_are_as_large_as_those_of_the_training(
    checkpoint, tmp_path, photo, run, monkeypatch, stored, side
):
    """By the sample_size of the network, in latents."""
    shutil.copytree(checkpoint, "sized")
    config = Path("sized/unet/config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": stored}))
    assert trained_side(joyedit.load("sized", device="cpu")) == side
    monkeypatch.setattr(Captions, "run", lambda self, pipe, call, *_: [{"output": call["image"]}])
    Image.open(photo).resize((800, 800)).save("large.png")
    assert run("edit", "large.png", *CAPTIONS, "-m", "sized", "-o", "out.png", "-q")[0] == 0
    assert Image.open("out.png").size == (side, side)


def test_another_photograph_of_another_size_decides_itself(photo, run):
    assert run("edit", photo, *CAPTIONS, "--seed", 1, "-o", "first.png", *QUICK)[0] == 0
    Image.open(photo).resize((64, 80)).save("tall.png")
    status, _, err = run("edit", "tall.png", "--config-from", "first.png", "-o", "tall-edit.png")
    assert status == 0 and "another photograph" in err and Image.open("tall-edit.png").size == (64, 80)


ARGUMENT_ERRORS = {
    "--source a": "give both --source and --target",
    "--target a": "give both --source and --target",
    "x --source a --target b": "an instruction or --source and --target, not both",
    "x --grid g.png": "--grid is for --source and --target",
    "x --no-composite": "--composite is for --source and --target",
    "x --inpaint-strength 0.5": "--inpaint-strength is for --source and --target",
    "--source a --target b --inpaint-strength 1.5": "1.5 is not within 0 and 1",
    "--source a --target b --mask-thresholding-ratio 0": "0 is not above 0",
    "--source a --target b --num-maps-per-mask 0": "0 is not within 1",
    "--source a --target b --mask-out mask.tif": "argument --mask-out: 'mask.tif' does not end in .png",
    "--source a --target b --grid .": "argument --grid: '.' does not end in .png",
    "--source a --target b --height 64": "both --height and --width",
    "--source a --target b --prediction-type x0": "invalid choice",
    "": "Stable Diffusion takes --source and --target",
}


@pytest.mark.parametrize("words", ARGUMENT_ERRORS)
def test_wrong_arguments_end_with_2(words, photo, capsys, no_work):
    with pytest.raises(SystemExit) as ended:
        cli.main(["edit", photo, *words.split()])
    assert ended.value.code == 2
    assert ARGUMENT_ERRORS[words] in capsys.readouterr().err


def test_a_model_that_is_told_the_wrong_way_says_what_to_do(photo, run, no_work, checkpoint):
    for model in ("tiny-diffedit", checkpoint):
        status, out, err = run("edit", photo, "Make it red.", "-m", model)
        assert (status, out) == (1, "") and err.count("\n") == 1
        assert f"{model} takes no instruction" in err and "--source 'a bowl of fruits' --target" in err
    status, out, err = run("edit", photo, *CAPTIONS, "-m", "tiny-joyimage")
    assert (status, out) == (1, "") and "tiny-joyimage edits by instruction" in err and "Make it red." in err
    status, out, err = run("generate", "a cat", "-m", checkpoint)
    assert (status, out) == (1, "") and "edits photographs here: joyedit edit PHOTO --source TEXT" in err


def test_records_of_the_other_kind_are_not_mixed(photo, run):
    assert run("edit", photo, *CAPTIONS, "--seed", 1, "-o", "captions.png", *QUICK)[0] == 0
    assert run("edit", photo, "Make it red", "--seed", 1, "-o", "told.png", "--steps", 1, "-q")[0] == 0
    status, _, err = run("edit", photo, "Make it red", "--config-from", "captions.png", "-o", "a.png")
    assert status == 1 and "tiny-diffedit takes no instruction" in err
    status, _, err = run("edit", photo, *CAPTIONS, "--config-from", "told.png", "-o", "a.png")
    assert status == 1 and "tiny-joyimage edits by instruction" in err
    status, _, err = run("edit", photo, "--source", "a", "--config-from", "told.png", "-o", "a.png")
    assert status == 1 and "told.png records no prompt" in err
    status, _, err = run("generate", "--config-from", "captions.png", "-o", "a.png")
    assert status == 1 and "captions.png records no prompt" in err
    assert not Path("a.png").exists()


@pytest.mark.parametrize("words", [("--mask-out", "mask.png"), ("--grid", "grid.png"), ("--composite",)])
def test_options_between_captions_are_refused_where_an_instruction_was_recorded(photo, run, no_work, words):
    told = {"prompt": "Make it red", "model": "tiny-joyimage", "pipeline": "JoyImageEditPipeline"}
    images.save_png(Image.new("RGB", (8, 8)), "told.png", told)
    status, out, err = run("edit", photo, "--config-from", "told.png", *words, "-q")
    refused = f"joyedit: error: {words[0]} is for --source and --target, not for an instruction\n"
    assert (status, out, err) == (1, "", refused)


@pytest.mark.parametrize("existing", ["out.png", "mask.png", "grid.jpg"])
def test_no_file_is_replaced_without_force(photo, run, no_work, existing):
    Path(existing).write_text("mine")
    words = ("-o", "out.png", "--mask-out", "mask.png", "--grid", "grid.jpg")
    status, out, err = run("edit", photo, *CAPTIONS, *words)
    assert (status, out) == (1, "") and f"{existing} exists: pass --force" in err
    assert Path(existing).read_text() == "mine"


def test_two_results_do_not_share_a_file(photo, run, no_work):
    status, _, err = run("edit", photo, *CAPTIONS, "-o", "a.png", "--grid", "./a.png")
    assert status == 1 and "two results would be written to one file" in err


@pytest.mark.slow
def test_prediction_type_reaches_the_loader(photo, run, monkeypatch, tmp_path):
    seen = []

    def noting(real):
        def load(name, prediction_type=None, **options):
            seen.append(prediction_type)
            return real(name, **options)

        return load

    for name in ("load", "open_unread"):
        monkeypatch.setattr(layouts, name, noting(getattr(layouts, name)))
    words = ("--prediction-type", "v_prediction", "--seed", 1, *QUICK)
    assert run("edit", photo, *CAPTIONS, *words)[0] == 0
    assert recorded("photo-edit-1.png")["prediction_type"] == "v_prediction"
    assert run("edit", photo, "--config-from", "photo-edit-1.png", "-o", "b.png", "-q")[0] == 0
    assert run("convert", "tiny-diffedit", tmp_path / "out", "--prediction-type", "epsilon", "-q")[0] == 0
    assert seen == ["v_prediction", "v_prediction", "epsilon"]


def test_info_about_a_checkpoint_and_an_edit(photo, run, checkpoint):
    found = json.loads(run("info", checkpoint, "--json")[1])
    assert found["pipeline"] == "StableDiffusionDiffEditPipeline" and found["layout"] == "diffusers"
    assert found["parts"]["unet"]["config"]["cross_attention_dim"] == 32
    pipe = joyedit.load(checkpoint, device="cpu")
    for part, network in pipe.networks.items():
        assert found["parts"][part]["parameters"] == sum(value.numel() for value in network.parameters())
    assert run("info", "tiny-diffedit")[1].startswith("name: tiny-diffedit\n")
    assert run("edit", photo, *CAPTIONS, "--seed", 1, *QUICK)[0] == 0
    assert "target_prompt: a bowl of pears" in run("info", "photo-edit-1.png")[1].splitlines()


def test_overlay_takes_masks_and_pictures_of_any_mode():
    mask = Image.new("1", (2, 1))
    mask.putpixel((1, 0), 1)
    for mode in ("L", "RGB", "RGBA"):
        shown = mask_overlay(Image.new(mode, (8, 4), 0 if mode == "L" else "black"), mask)
        assert shown.mode == "RGB" and shown.getpixel((3, 3)) != shown.getpixel((4, 0))
        assert shown.getpixel((4, 0))[0] > shown.getpixel((4, 0))[1]


def test_ctrl_c_leaves_no_file(photo, run, monkeypatch, tmp_path):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(joyedit.StableDiffusionDiffEditPipeline, "edit", interrupt)
    words = ("--mask-out", "mask.png", "--grid", "grid.png")
    assert run("edit", photo, *CAPTIONS, *words)[0] == 130
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_a_broken_folder_is_one_line(photo, run, checkpoint):
    shutil.copytree(checkpoint, "broken")
    weights = Path("broken/unet/diffusion_pytorch_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    status, out, err = run("edit", photo, *CAPTIONS, "-m", "broken", "-q")
    assert (status, out) == (1, "") and "was cut off" in err and err.count("\n") == 1
