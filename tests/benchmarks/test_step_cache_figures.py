"""The measurement of the step cache: its committed figures, and that it runs."""

import json

import pytest

from benchmarks import step_cache

COMMITTED = json.loads((step_cache.RESULTS / "step_cache" / "small_models.json").read_text(encoding="utf-8"))


def test_larger_thresholds_compute_fewer_steps_and_are_farther_from_exact():
    for model in COMMITTED["models"].values():
        rows = list(model["thresholds"].values())
        assert [float(threshold) for threshold in model["thresholds"]] == list(step_cache.THRESHOLDS)
        steps = [model["steps"], *(row["computed"] for row in rows)]
        medians = [row["psnr"]["median"] for row in rows]
        assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1] >= 2
        assert medians == sorted(medians, reverse=True)


@pytest.mark.slow
def test_what_is_left_of_a_step_that_reuses():
    """One of 40 blocks and a head; of Stable Diffusion its first level, both ways."""
    found = step_cache.left()
    assert found == COMMITTED["left"]
    assert found["JoyAI-Image-Edit"] == pytest.approx(1 / 40, rel=0.05)
    assert found["ChronoEdit-14B"] == pytest.approx(1 / 40, rel=0.05)


@pytest.mark.slow
def test_a_small_measurement_is_near_the_committed_one():
    found, known = step_cache.measure("tiny-joyimage", 1), COMMITTED["models"]["tiny-joyimage"]
    assert found["steps"] == known["steps"]
    for threshold, row in known["thresholds"].items():
        mine = found["thresholds"][threshold]
        assert mine["computed"] == pytest.approx(row["computed"], abs=1.5)
        assert mine["psnr"]["median"] == pytest.approx(row["psnr"]["median"], abs=8)
