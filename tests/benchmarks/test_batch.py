"""The benchmark of a batch beside a loop: it runs, and reports nothing of results that differ."""

import json

import pytest
from PIL import Image

from benchmarks import batch
from benchmarks.side_by_side import UnequalResults


@pytest.mark.slow
def test_both_sides_are_timed(tmp_path):
    out = tmp_path / "batch.json"
    batch.main(["--pictures", "2", "--rounds", "1", "--steps", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["pictures"] == 2 and {"cpu", "torch", "threads"} <= {*report["machine"]}
    for kind, place in (("processor", 0), ("clock", 1)):
        loop, done = (report["rounds"][side][0][place] for side in ("loop", "batch"))
        assert loop > 0 and report[f"{kind}_ratio"] == pytest.approx(done / loop, rel=0.01)


@pytest.mark.parametrize("wrong", ["missing", "other name", "pixels"])
def test_results_that_differ_are_refused(tmp_path, wrong):
    for side in ("loop", "batch"):
        (tmp_path / side).mkdir()
        for name in "ab":
            Image.new("RGB", (4, 4)).save(tmp_path / side / f"{name}.png")
    batch.compare(tmp_path / "loop", tmp_path / "batch", 2)
    if wrong == "missing":
        (tmp_path / "loop" / "b.png").unlink()
    elif wrong == "other name":
        (tmp_path / "batch" / "b.png").rename(tmp_path / "batch" / "c.png")
    else:
        Image.new("RGB", (4, 4), "white").save(tmp_path / "batch" / "b.png")
    with pytest.raises(UnequalResults):
        batch.compare(tmp_path / "loop", tmp_path / "batch", 2)
