"""The benchmark of training: what is committed, and that unequal sides are not measured."""

import json

import pytest
import torch

from benchmarks import training
from benchmarks.side_by_side import RESULTS, UnequalResults


def test_what_is_committed_is_of_every_case():
    found = json.loads((RESULTS / "training.json").read_text(encoding="utf-8"))
    names = [training.name_of(system, full, again) for system in training.SYSTEMS
             for full in (False, True) for again in (False, True)]  # fmt: skip
    assert list(found["rows"]) == names
    for name, row in found["rows"].items():
        assert row["difference"] < training.TOLERANCE and len(row["pairs"]) == training.PAIRS, name
        assert 0 < row["trained"] <= row["parameters"] and (row["trained"] == row["parameters"]) == (
            "full" in name
        )


@pytest.mark.slow
def test_a_row_is_measured_and_unequal_sides_are_not(monkeypatch):
    cpu = torch.device("cpu")
    row = training.measure("joyimage", False, True, True, cpu)
    assert row["bytes_ours"] > 0 < row["seconds_ours"] and row["difference"] < training.TOLERANCE

    def longer(side):
        factor = 1.001 if isinstance(side.network, training.JoyImageEditTransformer3DModel) else 1
        return factor * side.network(*side.given)[0].square().mean()

    monkeypatch.setattr(training.Side, "loss", longer)
    with pytest.raises(UnequalResults):
        training.measure("joyimage", False, True, True, cpu)
