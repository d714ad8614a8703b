"""The measurement of quantised weights: its committed figures, and that it runs."""

import json

import pytest

from benchmarks import quantised

COMMITTED = json.loads((quantised.RESULTS / "quantised" / "small_models.json").read_text(encoding="utf-8"))


def test_bytes_of_the_released_networks_are_those_of_their_settings():
    """As published: 16.4 GB of the transformer and 10.06 GB of its text encoder in int8_convrot."""
    found = quantised.released()
    assert found == COMMITTED["released"]
    transformer, encoder = (list(found.values())[i]["bytes_int8_convrot"] for i in (0, 1))
    assert abs(transformer / 16.43e9 - 1) < 0.005 and abs(encoder / 10.06e9 - 1) < 0.005


def test_the_committed_check_against_comfy_kitchen():
    for name, row in COMMITTED["comfy_kitchen"].items():
        if name != "version":
            assert row["equal_numbers"] and row["equal_scales"]
            assert row["fp32_over_largest"] < 1e-6 and row["bf16_units"] <= 1


@pytest.mark.slow
def test_a_small_measurement_is_near_the_committed_one():
    found, known = quantised.measure("tiny-joyimage", 1), COMMITTED["models"]["tiny-joyimage"]
    for form, row in known["forms"].items():
        for part, errors in row["networks"].items():
            mine = found["forms"][form]["networks"][part]
            assert mine["bytes"] == errors["bytes"]
            assert mine["weights"] == pytest.approx(errors["weights"], rel=0.01)
            assert mine["output"] == pytest.approx(errors["output"], rel=0.1)
        assert found["forms"][form]["psnr"]["least"] > 35
