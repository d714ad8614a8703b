"""Drift between pictures: windows into a photograph whose places are known, and colours that are."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import drift

ROOT = Path(__file__).resolve().parents[2]
SIDE, ZOOM = 96, 2.5  # pixels of a window, and of the photograph in each


@pytest.fixture(scope="module")
def window():
    """A function: the window into a photograph in which all lies `down` and `right` of where it was, `scale`
    times as large about the middle."""
    photo = Image.open(ROOT / "examples" / "coffee.jpg").convert("RGB")

    def window(down=0.0, right=0.0, scale=1.0):
        x, y = (edge / 2 - ZOOM * by / scale for edge, by in zip(photo.size, (right, down), strict=True))
        half = SIDE * ZOOM / scale / 2
        box = (x - half, y - half, x + half, y + half)
        return np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box), float) / 255

    return window


def noise(shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.01, shape)


@pytest.mark.parametrize(
    "known",
    [(0, 0, 1), (0.3, -0.45, 1), (-3.7, 2.2, 1.03), (9.5, 6.1, 0.92)],
    ids="still part some far".split(),
)
def test_shift_and_scale_are_those_of_the_window(window, known):
    after = (window(*known) * 0.9 + 0.06 + noise((SIDE, SIDE, 3))).clip(0, 1)
    found = drift.measure(window(), after)
    assert found.agreement > 0.95
    assert found.shift == pytest.approx(known[:2], abs=0.03) and found.scale == pytest.approx(
        known[2], abs=1e-3
    )


def test_large_pictures_are_looked_at_smaller_and_measured_in_their_pixels(window, monkeypatch):
    monkeypatch.setattr(drift, "LONGEST", 64)
    shift, scale, _ = drift.geometry(drift.grey(window()), drift.grey(window(3.2, -1.4, 1.02)))
    assert shift == pytest.approx((3.2, -1.4), abs=0.06) and scale == pytest.approx(1.02, abs=2e-3)


def test_an_edit_moves_nothing_and_colours_nothing(window):
    """Whether a mask says where it is or not; of a known place nothing is seen at all."""
    after = window(0.6, -0.2)
    edited = np.zeros((SIDE, SIDE), bool)
    edited[30:60, 25:70] = True
    after[edited] = (0.9, 0.1, 0.2)
    guessed, known = drift.measure(window(), after), drift.measure(window(), after, edited)
    for found, near in ((guessed, 0.08), (known, 0.03)):
        assert found.shift == pytest.approx((0.6, -0.2), abs=near), found
        assert found.scale == pytest.approx(1, abs=2e-3)
        assert np.abs(found.colour).max() < 1 and found.delta_e < 1.5

    still = window()
    still[edited] = np.random.default_rng(0).random(3)
    unmoved = drift.measure(window(), still, edited)
    assert unmoved.shift == pytest.approx((0, 0), abs=0.01) and np.abs(unmoved.colour).max() < 0.05


def test_colours_are_those_that_were_added(window):
    before = window() * 0.8 + 0.1  # nothing leaves the range
    added = np.array([5, -3, 8])
    found = drift.measure(before, before + added / 255)
    assert found.colour == pytest.approx(added, abs=0.1) and found.shift == (0, 0)
    half = np.zeros((SIDE, SIDE), bool)
    half[: SIDE // 2] = True
    after = before + half[..., None] * 0.05
    assert drift.measure(before, after, half).colour == pytest.approx((0, 0, 0), abs=0.2)
    assert drift.measure(before, after, ~half).colour == pytest.approx([0.05 * 255] * 3, abs=0.2)


def test_distance_of_greys_is_that_of_their_lightness():
    """L* = 116 Y^(1/3) - 16 of linear light Y, and greys differ in nothing else."""

    def lightness(level):
        return 116 * (((level / 255 + 0.055) / 1.055) ** 2.4) ** (1 / 3) - 16

    before, after = (np.full((16, 16, 3), level / 255) for level in (120, 140))
    _, delta_e = drift.colours(before, after, None)
    assert delta_e == pytest.approx(lightness(140) - lightness(120), rel=1e-3)


def test_negatives_lie_as_their_pictures(window):
    found = drift.geometry(drift.grey(window()), drift.grey(1 - window(-2.5, 1.5, 1.02)))
    assert found[0] == pytest.approx((-2.5, 1.5), abs=0.03) and found[1] == pytest.approx(1.02, abs=1e-3)


def test_nothing_in_common_is_said(window):
    before = window()
    flat = np.full_like(before, 0.5)
    for after in (flat + noise(before.shape), np.random.default_rng(0).random(before.shape)):
        found = drift.measure(before, after)
        assert found.shift is None and found.scale is None and found.agreement < drift.AGREEMENT
    assert drift.measure(flat, flat).shift is None
    everything = drift.measure(before, before, np.ones((SIDE, SIDE), bool))
    assert everything.colour is None and everything.delta_e is None and everything.shift == (0, 0)


def save(picture, path):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray((picture * 255).round().clip(0, 255).astype(np.uint8)).save(path)


@pytest.mark.parametrize("apart", [False, True])
def test_folder_of_pairs(window, tmp_path, capsys, apart):
    names = ("input/cup.png", "output/cup-7.png", "mask/cup.png")
    names = names if apart else ("cup.png", "cup-edit-7.png", "cup-mask.png")
    for name, picture in zip(names, (window(), window(1.5, 0), np.eye(SIDE)), strict=True):
        save(picture, tmp_path / name)
    save(window(), tmp_path / Path(names[0]).with_name("other.png"))  # it has no result
    out = tmp_path / "drift.json"
    drift.main([str(tmp_path), "--out", str(out)])
    (name, found), (title, summary) = reversed(json.loads(out.read_text(encoding="utf-8")).items())
    assert name == Path(names[1]).stem and title == "summary" and summary["pairs"] == 1
    assert found["shift"] == pytest.approx((1.5, 0), abs=0.03)
    assert summary["shift"]["mean"] == pytest.approx(found["shift"], abs=1e-3)
    assert f"{name} shift +1.5" in capsys.readouterr().out

    save(np.eye(20), tmp_path / names[2])
    with pytest.raises(ValueError, match="20, 20"):
        drift.main([str(tmp_path)])


def test_results_of_another_size_are_laid_on_their_input(window, tmp_path):
    """Pixels are those of the result."""
    save(window(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        picture.resize((SIDE // 2, SIDE // 2), Image.Resampling.LANCZOS).save(tmp_path / "a-edit.png")
    found = drift.measure_files(tmp_path / "a.png", tmp_path / "a-edit.png", None)
    assert found.shift == (0, 0) and found.scale == pytest.approx(1, abs=1e-3) and found.delta_e < 0.5


def test_bad_arguments(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="holds no NAME.png"):
        drift.main([str(tmp_path)])
    for arguments in (["--out", "a.json"], [str(tmp_path), "--model", "tiny-joyimage"]):
        with pytest.raises(SystemExit):
            drift.main(arguments)


def test_summary_tells_what_happens_always_from_what_happens():
    """Shifts that cancel have no mean, and lengths all the same."""
    drifts = [drift.Drift((0, y), 1 + y / 100, 1, (y, 0, 0), 2) for y in (-3, 1, 2)]
    found = drift.summary([*drifts, drift.Drift(None, None, 0, None, None)])
    assert found["pairs"] == 4 and found["placed"] == found["coloured"] == 3
    assert found["shift"] == {"mean": [0, 0], "median": 2, "95 %": 2.9}
    assert found["scale"] == {"mean": 0, "median": 0.02, "95 %": 0.029}
    assert found["colour"]["mean"] == [0, 0, 0] and found["delta_e"]["mean"] == 2
    assert drift.summary([])["shift"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", drift.MODELS)
def test_models_drift_as_recorded(name):
    recorded = json.loads((drift.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert recorded["edits"] >= drift.EDITS
    kinds = drift.measure_model(name, 2)
    found = drift.summary(one for drifts in kinds.values() for one in drifts)
    assert set(kinds) == set(recorded["kinds"]) and found["placed"] >= found["pairs"] / 2
    for what in ("shift", "scale", "delta_e"):
        assert found[what]["median"] <= recorded["summary"][what]["95 %"], what
