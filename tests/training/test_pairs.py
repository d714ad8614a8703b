"""Training sets: which pairs a folder holds, what is wrong with it, and where pixels come to lie."""

import csv
import json
import random
from hashlib import sha256

import numpy as np
import pytest
from PIL import Image

from joyedit.media import images as im
from joyedit.media.video import export_to_video
from joyedit.training import data
from joyedit.training.cache import Hashes
from joyedit.training.data import load_film, load_mask, load_pair, open_frames, read_pairs, same_shape
from joyedit.training.pairs import FaultyPairs


def picture(path, size=(40, 32), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def text(path, words="make it blue"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words, encoding="utf-8")


def whole_set(folder, names=("0001", "0002")):
    for name in names:
        picture(folder / "target" / f"{name}.png")
        text(folder / "target" / f"{name}.txt", f"edit {name}\n")
        picture(folder / "control" / f"{name}.jpg")
    return folder


def faults(folder):
    with pytest.raises(FaultyPairs) as caught:
        read_pairs(folder)
    for fault in caught.value.faults:
        assert fault.name in str(caught.value)
    return {fault.name: fault.reason for fault in caught.value.faults}


def test_pairs_by_name(tmp_path):
    whole_set(tmp_path)
    (tmp_path / "target" / ".DS_Store").write_bytes(b"x")
    picture(tmp_path / "mask" / "0002.png")
    whole_set(tmp_path / "valid", ["v"])
    pairs = read_pairs(tmp_path)
    assert list(pairs) == ["0001", "0002"]
    one, two = pairs.values()
    assert one.prompt == "edit 0001" and one.controls == (tmp_path / "control" / "0001.jpg",)
    assert one.mask is None and two.mask == tmp_path / "mask" / "0002.png"
    assert list(read_pairs(tmp_path / "valid")) == ["v"]


def test_several_references_in_their_order(tmp_path):
    whole_set(tmp_path, ["a"])
    (tmp_path / "control" / "a.jpg").unlink()
    for number in (10, 2, 0, 1, *range(3, 10)):
        picture(tmp_path / "control" / f"a_{number}.png")
    assert [path.stem for path in read_pairs(tmp_path)["a"].controls] == [f"a_{i}" for i in range(11)]
    (tmp_path / "control" / "a_4.png").unlink()
    assert "control/a_4 is missing" in faults(tmp_path)["a"]


def test_further_folders_hold_further_references(tmp_path):
    whole_set(tmp_path, ["a"])
    picture(tmp_path / "control_2" / "a.png")
    assert [path.parent.name for path in read_pairs(tmp_path)["a"].controls] == ["control", "control_2"]


def test_targets_alone(tmp_path):
    picture(tmp_path / "images" / "x.webp")
    text(tmp_path / "images" / "x.txt", "a red square")
    assert read_pairs(tmp_path)["x"].controls == ()


def test_every_fault_is_named_at_once(tmp_path):
    names = ["alone", "blank", "broken", "cut", "good", "latin", "silent", "twice"]
    whole_set(tmp_path, names)
    (tmp_path / "control" / "alone.jpg").unlink()
    text(tmp_path / "target" / "blank.txt", " \n")
    (tmp_path / "control" / "broken.jpg").write_bytes(b"no picture")
    whole = (tmp_path / "target" / "cut.png").read_bytes()
    (tmp_path / "target" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "target" / "latin.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "target" / "silent.txt").unlink()
    picture(tmp_path / "target" / "twice.jpg")
    picture(tmp_path / "control" / "orphan.png")
    text(tmp_path / "target" / "lost.txt")
    found = faults(tmp_path)
    assert found.keys() == {*names, "orphan", "lost"} - {"good"}
    assert "no control" in found["alone"] and "empty" in found["blank"] and "no caption" in found["silent"]
    assert "broken.jpg" in found["broken"] and "cut.png" in found["cut"] and "UTF-8" in found["latin"]
    assert "one name" in found["twice"] and "no target" in found["orphan"] and "lost.txt" in found["lost"]


@pytest.mark.parametrize(
    ("target", "control", "prompt"),
    [
        ("image", "edit_image", "prompt"),  # DiffSynth-Studio
        ("image_path", "control_path", "caption"),  # musubi-tuner
        ("file_name", "source", "text"),  # image folders of Hugging Face
        ("target", "input_image", "instruction"),
    ],
)
def test_columns_of_other_trainers(tmp_path, target, control, prompt):
    after, before = picture(tmp_path / "after" / "x.png"), picture(tmp_path / "before" / "x.png")
    rows = [{target: "after/x.png", control: "before/x.png", prompt: f"edit, {i}"} for i in range(2)]
    rows[1][target] = str(after)  # musubi-tuner writes whole paths
    (tmp_path / "jsonl").mkdir()
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    of_csv = list(read_pairs(tmp_path).values())
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert list(read_pairs(tmp_path).values()) == of_csv
    assert [pair.prompt for pair in of_csv] == ["edit, 0", "edit, 1"]
    assert {pair.target for pair in of_csv} == {after} and {pair.controls for pair in of_csv} == {(before,)}
    del rows[1][control]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [reason for reason in faults(tmp_path).values()] == ["has no control"]


def test_references_in_a_list_or_in_numbered_columns(tmp_path):
    for name in ("t", "a", "b"):
        picture(tmp_path / f"{name}.png")
    lines = [
        {"image": "t.png", "edit_image": ["b.png", "a.png"], "prompt": "x"},
        {"image": "t.png", "control_path_1": "a.png", "control_path_0": "b.png", "prompt": "y"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for pair in read_pairs(tmp_path).values():
        assert [path.stem for path in pair.controls] == ["b", "a"]


def test_faults_of_metadata(tmp_path):
    for name in ("t", "u", "c"):
        picture(tmp_path / f"{name}.png")
    lines = [
        json.dumps({"image": "t.png", "control": "c.png", "prompt": "fine"}),
        "{",
        json.dumps({"image": "gone.png", "control": "c.png", "prompt": "x"}),
        json.dumps({"image": "u.png", "prompt": ""}),
        json.dumps({"control": "c.png", "prompt": "x"}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(FaultyPairs) as caught:
        read_pairs(tmp_path)
    found = [str(fault) for fault in caught.value.faults]
    assert found == [
        "gone: its target 'gone.png' does not exist",
        "metadata.jsonl line 2: is not JSON",
        "metadata.jsonl line 5: has no target (a column target, image, image_path, file_name)",
        "u: has no control",
        "u: its caption is empty",
    ]
    (tmp_path / "metadata.csv").write_text("image,prompt\n")
    with pytest.raises(ValueError, match="which one"):
        read_pairs(tmp_path)


def test_what_was_read_is_not_decoded_again_until_it_changes(tmp_path, monkeypatch):
    whole_set(tmp_path / "set")
    opened = []
    monkeypatch.setattr(data, "open_frames", lambda path: (opened.append(path.name), open_frames(path))[1])
    pairs = list(read_pairs(tmp_path / "set", decode=False).values())
    broken = tmp_path / "set" / "control" / "0002.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(b"no picture")

    def look():
        """What is wrong, and which files were opened; as a new process does it."""
        opened.clear()
        known = Hashes(tmp_path / "files.json")
        found = [fault.name for fault in data.unreadable(pairs, known)]
        digests = [known[path] for pair in pairs for path in pair.files]
        known.save()
        assert digests == [sha256(path.read_bytes()).hexdigest() for pair in pairs for path in pair.files]
        return found, sorted(opened)

    every = ["0001.jpg", "0001.png", "0002.jpg", "0002.png"]
    assert look() == (["0002"], every)
    assert look() == (["0002"], ["0002.jpg"])  # what could not be read is looked at again
    broken.write_bytes(whole)
    assert look() == ([], ["0002.jpg"])
    assert look() == ([], [])
    assert Hashes(tmp_path / "files.json").shape_of(broken) == (32, 40)
    picture(tmp_path / "set" / "target" / "0001.png", (44, 33))
    assert look() == ([], ["0001.png"])


def test_no_set(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_pairs(tmp_path / "nothing")
    with pytest.raises(ValueError, match="neither target/"):
        read_pairs(tmp_path)
    (tmp_path / "target").mkdir()
    with pytest.raises(ValueError, match="no pairs"):
        read_pairs(tmp_path)


LINES = (0.42, 0.57)  # where a white line crosses the picture, down and across


def crossed(height, width, orientation=1):
    """A white cross on black, lines a twentieth thick, each pixel as white as the line covers it."""

    def profile(count, at):
        edges = np.linspace(0, 1, count + 1)
        low, high = at - 0.025, at + 0.025
        return np.clip(np.minimum(edges[1:], high) - np.maximum(edges[:-1], low), 0, None) * count

    rows, columns = profile(height, LINES[0]), profile(width, LINES[1])
    levels = np.maximum(rows[:, None], columns[None])
    stored = np.rot90(levels, {1: 0, 6: 1, 3: 2, 8: 3}[orientation])
    return Image.fromarray((255 * stored).round().astype(np.uint8)).convert("RGB")


def centres(image):
    """Where the lines are, in pixels from the upper and the left edge, measured at the rim of the picture."""
    levels = np.asarray(image.convert("L")).astype(float)
    rows, columns = levels[:, :4].sum(1), levels[:4].sum(0)
    return tuple((each * (np.arange(len(each)) + 0.5)).sum() / each.sum() for each in (rows, columns))


def test_control_lies_under_target_at_odd_sizes(tmp_path):
    """At 30 sizes and shapes, controls of other sizes and turned by EXIF among them, within half a pixel; and
    within a pixel of where the formula puts the lines."""
    draw = random.Random(5)
    buckets = im.buckets(256)
    (tmp_path / "target").mkdir()
    (tmp_path / "control").mkdir()
    for i in range(30):
        height, width = draw.randrange(151, 480, 2), draw.randrange(151, 480, 2)
        factor = (1, 1, 0.5, 1.3)[i % 4]
        orientation = (1, 6, 3, 8, 1)[i % 5]
        exif = Image.Exif()
        exif[0x0112] = orientation
        crossed(height, width).save(tmp_path / "target" / f"{i}.png")
        text(tmp_path / "target" / f"{i}.txt", "edit")
        control = crossed(round(height * factor), round(width * factor), orientation)
        control.save(tmp_path / "control" / f"{i}.png", exif=exif)
    for i, pair in enumerate(read_pairs(tmp_path).values()):
        target, (control,) = load_pair(pair, buckets)
        assert target.size == control.size and target.size[::-1] in buckets
        with Image.open(pair.target) as file:
            size = file.size[::-1]
        scale = max(one / other for one, other in zip(target.size[::-1], size, strict=True))
        for at, below, above, side, out in zip(
            LINES, centres(target), centres(control), size, target.size[::-1], strict=True
        ):
            assert abs(below - above) < 0.5, (i, size, target.size)
            assert abs(below - (out / 2 + (at - 0.5) * side * scale)) < 1, (i, size, target.size)


def test_the_crop_is_that_of_the_pipeline(tmp_path):
    whole_set(tmp_path, ["a"])
    crossed(150, 233).save(tmp_path / "target" / "a.png")
    crossed(150, 233).save(tmp_path / "control" / "a.png")
    (tmp_path / "control" / "a.jpg").unlink()
    target, (control,) = load_pair(read_pairs(tmp_path)["a"], im.buckets(256))
    bucket = im.nearest_bucket(150, 233, im.buckets(256))
    wanted = im.resize_center_crop(crossed(150, 233), *bucket)
    assert np.array_equal(target, wanted) and np.array_equal(control, wanted)


def test_controls_of_other_shapes(tmp_path):
    whole_set(tmp_path, ["a"])
    picture(tmp_path / "target" / "a.png", (200, 100))
    picture(tmp_path / "control" / "a.jpg", (100, 150))
    buckets = [(64, 128), (128, 128), (144, 96)]
    target, controls = load_pair(read_pairs(tmp_path)["a"], buckets)
    assert [one.size for one in (target, *controls)] == [(128, 64), (128, 64)]
    picture(tmp_path / "control_2" / "a.png", (50, 51))
    target, controls = load_pair(read_pairs(tmp_path)["a"], buckets)
    assert [one.size for one in (target, *controls)] == [(128, 64), (96, 144), (128, 128)]


def test_transparent_controls_stay_so(tmp_path):
    whole_set(tmp_path, ["a"])
    (tmp_path / "control" / "a.jpg").unlink()
    Image.new("RGBA", (40, 32), (9, 9, 9, 0)).save(tmp_path / "control" / "a.png")
    target, (control,) = load_pair(read_pairs(tmp_path)["a"], [(64, 64)])
    assert (target.mode, control.mode) == ("RGB", "RGBA")


def test_a_mask_is_cropped_as_its_target(tmp_path):
    whole_set(tmp_path, ["a"])
    crossed(301, 151).save(tmp_path / "target" / "a.png")
    picture(tmp_path / "mask" / "a.png")
    crossed(301 * 2, 151 * 2).convert("L").save(tmp_path / "mask" / "a.png")
    pair, buckets = read_pairs(tmp_path)["a"], [(128, 128), (256, 192)]
    mask = load_mask(pair, buckets)
    assert mask is not None and mask.mode == "L" and mask.size == (192, 256)
    assert np.abs(np.subtract(centres(mask), centres(load_pair(pair, buckets)[0]))).max() < 0.5


def test_same_shape():
    assert same_shape((1001, 799), (500, 399)) and same_shape((500, 400), (1001, 799))
    assert same_shape((33, 50), (33, 50)) and not same_shape((500, 400), (500, 404))
    assert not same_shape((799, 1001), (1001, 799)) and not same_shape((512, 512), (1024, 1100))


def test_clips(tmp_path):
    frames = [Image.new("RGB", (64, 48), (i * 20, 0, 0)) for i in range(9)]
    (tmp_path / "target").mkdir()
    export_to_video(frames, tmp_path / "target" / "film.mp4")
    text(tmp_path / "target" / "film.txt")
    picture(tmp_path / "control" / "unused.png")
    picture(tmp_path / "target" / "unused.png")
    text(tmp_path / "target" / "unused.txt")
    pair = read_pairs(tmp_path)["film"]
    assert pair.is_clip
    target, (control,) = load_pair(pair, [(48, 64)])
    red = [np.asarray(one)[..., 0].mean() for one in (control, target, *load_film(pair, [(48, 64)], 5))]
    assert np.allclose(red, [0, 160, 0, 40, 80, 120, 160], atol=6)
    (tmp_path / "target" / "film.mp4").write_bytes(b"no film")
    assert "film.mp4" in faults(tmp_path)["film"]
