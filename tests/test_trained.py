"""The trained checkpoints of the package edit as their model cards say, and every way to compute an edit
gives nearly the same picture."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.shapes import evaluate, publish, scenes
from joyedit import ops

COUNTS = (1, 2, 2, 3, 3, 4)
RESULTS = Path(publish.RESULTS)


def recorded(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def opened(name):
    pipe = joyedit.load(name, device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def joyimage():
    return opened("tiny-joyimage")


def edit(pipe, edits, seed=0, output_type="np"):
    """All of them at once."""
    return pipe(
        [Image.fromarray(scenes.to_levels(scenes.draw(e.source))) for e in edits],
        [e.instruction for e in edits],
        num_inference_steps=2,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(len(edits))],
        output_type=output_type,
    ).images


def psnr(a, b):
    return -10 * np.log10(np.square(np.asarray(a, np.float64) - b).mean((1, 2, 3)))


def test_joyimage_edits_held_out_worlds_as_its_card_says(joyimage):
    stated = recorded("joyimage")["held_out"]["model"]["kinds"]
    known = [kind for kind, row in stated.items() if row["ok"] >= 0.8]
    assert len(known) >= 6 and "move" in known
    edits = evaluate.held_out(8, COUNTS, known)
    scores = [evaluate.judge(e, r) for e, r in zip(edits, evaluate.run(joyimage, edits, 2), strict=True)]
    found = evaluate.summarize(scores)
    expected = sum(stated[kind]["ok"] for kind in known) / len(known)
    assert found["ok"] >= expected - 0.1  # of 48 edits and more
    for kind, row in found["kinds"].items():
        assert row["ok"] >= stated[kind]["ok"] - 0.3, kind  # of 8
        if kind in scenes.LOCAL:
            assert row["outside"] >= 30, f"{kind}: what is not edited stays"


def test_an_instruction_decides(joyimage):
    """The same pictures told to become grey become grey instead."""
    edits = evaluate.held_out(4, (1,), ("recolour",))
    told = [dataclasses.replace(e, instruction="Make the image black and white.") for e in edits]
    colour, grey = (np.ptp(np.asarray(edit(joyimage, some)), axis=-1).mean() for some in (edits, told))
    assert grey < 0.3 * colour


def test_same_seed_same_bytes_and_a_batch_is_its_edits_one_by_one(joyimage):
    edits = evaluate.held_out(1, COUNTS, scenes.KINDS)
    together = np.asarray(edit(joyimage, edits))
    assert (np.asarray(edit(joyimage, edits)) == together).all()
    assert (np.asarray(edit(joyimage, edits, seed=100)) != together).any((1, 2, 3)).all()
    alone = np.concatenate([np.asarray(edit(joyimage, [e], seed=i)) for i, e in enumerate(edits)])
    assert np.abs(alone - together).max() < 2e-5


def test_bf16_stays_near_fp32(joyimage, monkeypatch):
    monkeypatch.setattr(ops, "CPU_HAS_BF16", True)
    edits = evaluate.held_out(1, COUNTS, scenes.KINDS)
    half = copy.deepcopy(joyimage).to(torch.bfloat16)
    exact, rounded = (edit(p, edits, output_type="latent").float() for p in (joyimage, half))
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-4 < error < 0.04
    assert psnr(edit(half, edits), edit(joyimage, edits)).min() > 45
