"""`python -m benchmarks.previews`: the stored maps are what it writes."""

import json

import pytest
from PIL import Image

import joyedit
from benchmarks import previews as script
from benchmarks.shapes import scenes
from joyedit.pipelines import previews

pytestmark = pytest.mark.slow


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Where it writes, in place of the package: a copy of what is there."""
    file = tmp_path / "previews.json"
    file.write_text(previews.STORED.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(previews, "STORED", file)
    return file


def test_the_stored_maps_are_made_again(written):
    """The numbers up to the last digit, which another processor may round otherwise."""
    before = json.loads(written.read_text(encoding="utf-8"))
    written.unlink()
    script.main([])
    after = json.loads(written.read_text(encoding="utf-8"))
    assert after.keys() == before.keys()
    for key, one in after.items():
        assert one["of"] == before[key]["of"] and one["pictures"] == script.SCENES
        for name in ("psnr", "r2"):
            assert one[name] == pytest.approx(before[key][name], abs=0.011)
            assert one["drawn"][name] < one[name], "drawn shapes fit the world better than its own scenes"
        for row, wanted in zip(rows(one), rows(before[key]), strict=True):
            assert row == pytest.approx(wanted, abs=3e-5)


def rows(one):
    return [*one["weight"], one["bias"]]


def test_another_autoencoder_is_added(written, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        picture = scenes.to_levels(scenes.draw(scenes.make_edit(i, "held-out").target))
        Image.fromarray(picture).save(pictures / f"{i}.png")
    pipe = joyedit.load("tiny-diffedit", device="cpu")
    pipe.vae.quant_conv.weight.data *= -1
    pipe.save_pretrained(tmp_path / "other")
    before = json.loads(written.read_text(encoding="utf-8"))
    script.main(["--model", str(tmp_path / "other"), "--pictures", str(pictures)])
    after = json.loads(written.read_text(encoding="utf-8"))
    (key,) = after.keys() - before.keys()
    assert key == previews.fingerprint(pipe.vae) and after[key]["of"] == ["other"]
    assert after[key]["pictures"] == 2 and after[key]["r2"] > 0.5
    assert {name: after[name] for name in before} == before and "other" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(["--model", "tiny-joyimage"])
