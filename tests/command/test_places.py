"""`joyedit edit --mask --size --match-colors`: what pipelines get, what is recorded, repeating, refusals."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import joyedit
from joyedit.command import arguments, cli, places
from joyedit.command.film import Film
from joyedit.command.photos import read_photo
from joyedit.command.recorded import fill_from_image
from joyedit.media import images
from joyedit.pipelines import places as pipelines_places

BLUE = "Change the color of the red circle to blue."
SIZE = (120, 96)  # of the photograph, width x height
CAPTIONS = ("--source", "a red circle on a light blue background")
CAPTIONS += ("--target", "a green circle on a light blue background")


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    """Two circles, with a mask around the one on the left."""
    monkeypatch.chdir(tmp_path)
    photo = Image.new("RGB", SIZE, (178, 212, 245))
    draw = ImageDraw.Draw(photo)
    draw.ellipse((8, 40, 44, 76), fill=(219, 33, 33))
    draw.ellipse((74, 12, 108, 46), fill=(219, 33, 33))
    photo.save("photo.png")
    mask = Image.new("L", SIZE)
    ImageDraw.Draw(mask).rectangle((2, 34, 50, 82), fill=255)
    mask.save("mask.png")
    return tmp_path


def pixels(name):
    return np.asarray(Image.open(name).convert("RGB")).astype(int)


def recorded(name):
    return images.read_metadata(name)


def facts(name):
    return {"name": name, "sha256": hashlib.sha256(Path(name).read_bytes()).hexdigest()}


def black(size=SIZE):
    """Where the mask is black, in a size (width x height) where all of it is."""
    return np.asarray(Image.open("mask.png").convert("F").resize(size, Image.Resampling.BOX)) == 0


def wrong(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in words])
    assert ended.value.code == 2
    return capsys.readouterr().err


PLACES = ("--mask", "mask.png", "--size", "input", "--match-colors")


def test_an_edit_stays_in_its_mask(run):
    status, _, err = run("edit", "photo.png", BLUE, *PLACES, "--seed", 1)
    photo, result, outside = pixels("photo.png"), pixels("photo-edit-1.png"), black()
    assert status == 0 and result.shape == photo.shape
    assert (result[outside] == photo[outside]).all()
    assert (result[58, 26] - photo[58, 26])[[0, 2]] @ (-1, 1) > 200, "the circle is not blue"
    pipe = joyedit.load("tiny-joyimage")
    asked = {"mask": Image.open("mask.png"), "size": "input", "match_colors": True}
    generator = torch.Generator().manual_seed(1)
    made = pipe(Image.open("photo.png"), BLUE, **asked, **pipe.made_for.call, generator=generator)
    np.testing.assert_array_equal(np.asarray(made.images[0]), result)
    assert f"{made.geometry}\n" in err and str(made.geometry).count("120 x 96") == 2
    found = recorded("photo-edit-1.png")
    assert found["mask"] == facts("mask.png") and (found["size"], found["match_colors"]) == ("input", True)
    assert (found["height"], found["width"]) == (96, 120)


@pytest.mark.slow
def test_repeating_makes_the_same(run):
    assert run("edit", "photo.png", BLUE, *PLACES, "--seed", 1)[0] == 0
    again = ("edit", "photo.png", "--config-from", "photo-edit-1.png", "--force", "-o", "again.png")
    assert run(*again)[0] == 0
    np.testing.assert_array_equal(pixels("again.png"), pixels("photo-edit-1.png"))
    assert recorded("again.png")["mask"] == facts("mask.png")
    assert run(*again, "--no-match-colors", "--size", "80x60")[0] == 0  # said on the command line
    assert "match_colors" not in recorded("again.png") and pixels("again.png").shape == (60, 80, 3)
    # Another model takes what it can: no size.
    assert run(*again, *CAPTIONS, "-m", "tiny-diffedit", "--steps", 2)[0] == 0
    assert "size" not in recorded("again.png") and recorded("again.png")["mask"] == facts("mask.png")


@pytest.fixture
def made():
    """A function: the arguments of a run that repeats a record of these, after what else is said."""
    metadata = {"prompt": BLUE, "model": "tiny-joyimage", "pipeline": "JoyImageEditPipeline"}
    metadata |= {"input": facts("photo.png"), "height": 48, "width": 64}

    def made(record, *words, photo="photo.png"):
        images.save_png(Image.new("RGB", (8, 8)), "made.png", metadata | record, force=True)
        words = ["edit", photo, *words, "--config-from", "made.png"]
        args = arguments.parse(
            words,
            dict.fromkeys(
                ("edit", "generate", "batch", "ask", "estimate", "train", "demo", "convert", "verify", "info")
            ),
        )
        photos = [read_photo(photo)]
        fill_from_image(args, photos)
        args.mask = places.open_mask(args, photos)
        return args

    return made


def test_what_is_taken_over_of_a_record(made, caplog):
    record = {"mask": facts("mask.png"), "size": "input", "match_colors": True}
    args = made(record)
    assert (args.size, args.match_colors, args.height) == ("input", True, None)
    assert np.array_equal(np.asarray(args.mask.image) == 0, black()) and args.mask.facts == facts("mask.png")
    assert made(record, "--size", "50x40", "--no-match-colors").size == "50x40"
    args = made(record, "--height", "96", "--width", "96")
    assert (args.size, args.height, args.mask is None) == (None, 96, False)
    # Without a size the result's own is one to work at.
    assert (made({}).height, made({}).width, made({}).size) == (48, 64, None)
    assert made({}, "--size", "input").height is None
    other = made(record, "Paint it.", "-m", "tiny-chronoedit")
    assert other.size == "input" and other.mask is not None
    captions = made(record, *CAPTIONS, "-m", "tiny-diffedit")
    assert (captions.size, captions.match_colors, captions.mask is None) == (None, None, False)
    moved = made(record, "--move", "the red circle", "--box", "0,0,9,9")
    assert moved.mask is None and moved.size == "input"

    Image.new("RGB", SIZE).save("another.png")
    args = made(record, photo="another.png")
    assert args.mask is None and args.size == "input" and "made from another photograph" in caplog.text


def test_a_recorded_mask_that_is_not_here(made):
    record = {"mask": facts("mask.png")}
    Path("mask.png").rename("other.png")
    Image.new("L", SIZE, 255).save("mask.png")  # of that name, but another picture
    with pytest.raises(FileNotFoundError, match="was made with the mask mask.png, and no such.*--mask"):
        made(record)
    assert made(record, "--mask", "other.png").mask.name == "other.png"


@pytest.mark.parametrize(
    "damage", [3, ["mask.png"], {"name": "mask.png"}, {"name": 3, "sha256": "a"}], ids=str
)
def test_damaged_masks_and_sizes(run, no_work, damage):
    metadata = {"prompt": "x", "input": facts("photo.png")}
    again = ("edit", "photo.png", "--config-from", "made.png")
    images.save_png(Image.new("RGB", (8, 8)), "made.png", {**metadata, "mask": damage})
    status, _, err = run(*again)
    assert status == 1 and "made.png: the recorded mask is damaged" in err
    images.save_png(Image.new("RGB", (8, 8)), "made.png", {**metadata, "size": "large"}, force=True)
    status, _, err = run(*again)
    assert status == 1 and "--size 'large': wanted input or WIDTHxHEIGHT" in err


@pytest.mark.slow
@pytest.mark.parametrize("size", ["input", "100x64"])
def test_a_film_has_that_size(run, size):
    words = ("-m", "tiny-chronoedit", "--mask", "mask.png", "--size", size, "--video", "way", "-o", "out.png")
    status, _, err = run("edit", "photo.png", "Make the red circle yellow.", *words, "--seed", 1)
    result, photo = pixels("out.png"), pixels("photo.png")
    assert status == 0 and recorded("out.png")["size"] == size
    assert (
        result.shape
        == pixels("way/frame_0000.png").shape
        == ((64, 100, 3) if size != "input" else photo.shape)
    )
    assert "photograph of 120 x 96" in err and f"result of {result.shape[1]} x {result.shape[0]}" in err
    if size == "input":
        assert (result[black()] == photo[black()]).all() and (result[~black()] != photo[~black()]).any()


@pytest.mark.slow
def test_a_film_of_another_size_is_worked_at_in_the_size_that_is_said(run, monkeypatch):
    worked_at = []

    def made(film, pipe, call, seeds, args):
        worked_at.append(pipe.made_for.basesize)
        return [{"output": call["image"]} for _ in seeds]

    monkeypatch.setattr(Film, "run", made)
    monkeypatch.setattr(Film, "facts", lambda *args: {})
    words = ("-m", "tiny-chronoedit", "--size", "input", "--basesize", 256)
    status, _, err = run("edit", "photo.png", "Make the red circle yellow.", *words)
    assert (status, worked_at) == (0, [256])
    assert "at scale 2.27 in 272 x 224, 6 rows of padding" in err  # 272 / 120; 224 - 96 * 272 / 120


@pytest.mark.slow
def test_a_film_in_its_own_size_keeps_the_working_copy(run):
    words = ("-m", "tiny-chronoedit", "--mask", "mask.png", "--height", 48, "--width", 64, "-o", "out.png")
    assert run("edit", "photo.png", "Make the red circle yellow.", *words)[0] == 0
    small = np.asarray(Image.open("photo.png").resize((64, 48), Image.Resampling.BICUBIC))
    kept, result = black((64, 48)), pixels("out.png")
    assert kept.mean() > 0.5 and (result[kept] == small[kept]).all() and (result != small).any()


@pytest.mark.slow
def test_between_captions_it_is_the_mask_and_none_is_made(run, monkeypatch):
    pipeline = joyedit.StableDiffusionDiffEditPipeline
    monkeypatch.setattr(pipeline, "generate_mask", lambda *a, **k: pytest.fail("a mask was made"))
    words = ("--mask", "mask.png", "--mask-out", "used.png", "--steps", 2, "-o", "out.png", "--composite")
    assert run("edit", "photo.png", *CAPTIONS, *words)[0] == 0
    used, result = np.asarray(Image.open("used.png")) > 0, pixels("out.png")
    small = np.asarray(Image.open("photo.png").resize(used.shape[::-1], Image.Resampling.LANCZOS))
    assert (result[~used] == small[~used]).all()
    white = ~black(used.shape[::-1])
    assert (used >= white).all() and used.sum() < 1.5 * white.sum()
    assert recorded("out.png")["mask"] == facts("mask.png")


def test_a_mask_in_another_size_is_white_where_any_white_is():
    mask = Image.new("L", (3000, 2000))
    mask.putpixel((2999, 0), 255)
    small = np.asarray(places.mask_at(mask, (3, 2)))
    assert small.tolist() == [[0, 0, 255], [0, 0, 0]]
    pattern = np.random.default_rng(0).random((21, 35)) < 0.2
    shrunk = places.mask_at(Image.fromarray(pattern), (5, 3))
    wanted = pattern.reshape(3, 7, 5, 7).any((1, 3))
    assert np.array_equal(np.asarray(shrunk) > 0, wanted)
    assert np.array_equal(
        np.asarray(places.mask_at(shrunk, (35, 21))) > 0, np.kron(wanted, np.ones((7, 7))) > 0
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "0x0"), "both sides must be within 16 and"),
        (("--size", "10x"), "wanted input or WIDTHxHEIGHT in pixels, as in 640x480"),
        (("--size", "large"), "wanted input or WIDTHxHEIGHT"),
        (("--size", "-64x64"), "expected one argument"),
        (("--size", "16000x16000"), "pixels in all"),
        (("--size", "99999x64"), "both sides must be within"),
        (("--size", "input", "--height", 96, "--width", 96), "leave out --height and --width"),
        (("--mask", "mask.png", "--reference", "photo.png", "-m", "plus"), "is for edits of one photograph"),
        (("--size", "64x64", "--reference", "photo.png", "-m", "plus"), "give --height and --width"),
        (("--mask", "mask.png", "--move", "x", "--box", "0,0,1,1"), "would keep the red box"),
    ],
)
def test_misuse_of_an_instruction(capsys, no_work, words, message):
    instruction = () if "--move" in words else ("x",)
    assert message in wrong(capsys, "edit", "photo.png", *instruction, *words)


def test_other_misuse(capsys, no_work):
    for option in (("--mask", "mask.png"), ("--match-colors",), ("--size", "input")):
        assert "is for a photograph: joyedit edit PHOTO" in wrong(capsys, "generate", "x", *option)
    for option in (("--match-colors",), ("--size", "input")):
        assert "is for an instruction" in wrong(capsys, "edit", "photo.png", *CAPTIONS, *option)
    making = ("--mask", "mask.png", "--num-maps-per-mask", 3)
    assert "--mask names one" in wrong(capsys, "edit", "photo.png", *CAPTIONS, *making)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("small.png", "small.png has 20 x 10 pixels, and the photograph photo.png 120 x 96"),
        ("black.png", "black.png is all black: white, at least half, says where to edit"),
        ("nothing.png", "'nothing.png' does not exist"),
        (".", "is a folder"),
        ("notes.txt", "notes.txt"),
    ],
)
def test_masks_are_refused_before_work(run, no_work, mask, message):
    Image.new("L", (20, 10), 255).save("small.png")
    Image.new("L", SIZE, 127).save("black.png")
    Path("notes.txt").write_text("no picture")
    for told in (("x",), CAPTIONS):
        status, out, err = run("edit", "photo.png", *told, "--mask", mask)
        assert (status, out) == (1, "") and message in err


@pytest.mark.parametrize("option", [("--mask", "mask.png"), ("--size", "64x64"), ("--match-colors",)])
def test_edit_plus_takes_none(run, no_work, monkeypatch, option):
    monkeypatch.setattr("joyedit.loading.layouts.pipeline_name", lambda *a, **k: "JoyImageEditPlusPipeline")
    status, out, err = run("edit", "photo.png", "x", "-m", "plus", *option)
    assert (status, out) == (1, "") and f"{option[0]} is for edits of one photograph by instruction" in err


@pytest.mark.parametrize("model", ["tiny-joyimage", pytest.param("tiny-chronoedit", marks=pytest.mark.slow)])
def test_a_size_that_is_too_large_is_refused_before_the_first_run(run, monkeypatch, model):
    pipeline = type(joyedit.load(model))
    monkeypatch.setattr(pipeline, "__call__", lambda *a, **k: pytest.fail("a run"))
    status, out, err = run("edit", "photo.png", "x", "-m", model, "--size", "4000x4000")
    assert (status, out) == (1, "") and "too many pixels: at most" in err


@pytest.mark.slow
def test_generate_makes_that_size(run):
    assert run("generate", "a red circle", "--size", "100x60", "--steps", 1, "-o", "out.png")[0] == 0
    assert pixels("out.png").shape == (60, 100, 3) and recorded("out.png")["size"] == "100x60"


def test_as_the_pipelines_take():
    assert places.SHORTEST_SIDE == pipelines_places.SHORTEST_SIDE
