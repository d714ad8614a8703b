"""The worked example of README.md: an instruction that tiny-joyimage does not know, learned by an adapter."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import joyedit
from benchmarks.shapes import evaluate, new_instruction, scenes
from joyedit.command.cli import main
from joyedit.training import loop
from joyedit.training.data import find_pairs
from joyedit.training.pictures import GAP

ROOT = Path(__file__).resolve().parents[2]


def levels(picture):
    return np.asarray(picture.convert("RGB")).astype(float)


def test_the_set_is_what_it_says(tmp_path):
    """In the documented form, of the new kind and of known ones; sepia by its definition."""
    new_instruction.write_pairs(tmp_path, 4, 1)
    pairs, faults = find_pairs(tmp_path)
    assert not faults and len(pairs) == 12 and len(find_pairs(tmp_path / "valid")[0]) == 3
    new = [pair for name, pair in pairs.items() if name.endswith("sepia")]
    assert {pair.prompt for pair in new} == set(new_instruction.PHRASES) and len(new) == 4
    for pair in new:
        control = levels(Image.open(pair.controls[0])) / 255
        grey = control[..., :1] * 0.299 + control[..., 1:2] * 0.587 + control[..., 2:] * 0.114
        brown = [64 + 186 * grey, 31 + 173 * grey, 5 + 135 * grey]  # of 255, from dark to light
        assert np.abs(np.concatenate(brown, -1) - levels(Image.open(pair.target))).max() < 2
        known_places = levels(Image.open(pair.mask))[..., 0]
        assert set(np.unique(known_places)) == {63, 255}  # shapes stand out from a ground with a slope
        assert np.abs(control - np.median(control, (0, 1))).max(-1)[known_places == 63].max() < 0.2
    others = [pair for pair in pairs.values() if pair not in new]
    assert len(others) == 8 and all("sepia" not in pair.prompt for pair in others)


def test_success_is_sepia_and_nothing_else():
    edits = [new_instruction.make_edit(i, "held-out") for i in range(8)]

    def succeed(tone):
        pictures = [scenes.draw(edit.target._replace(tone=tone)) for edit in edits]
        return sum(evaluate.judge(*both).ok for both in zip(edits, pictures, strict=True))

    assert [succeed(tone) for tone in ("sepia", "grey", "negative")] == [8, 0, 0]
    assert succeed("") < 3  # brown scenes are nearly sepia as they are


def test_the_readme_trains_with_what_was_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (options,) = re.findall(r"joyedit train sepia --model tiny-joyimage --out \S+ (.*)", readme)
    measured = json.loads((ROOT / "benchmarks/results/new_instruction.json").read_text(encoding="utf-8"))
    assert options == new_instruction.OPTIONS == measured["options"]
    before, after = measured["before"]["kinds"], measured["after"]["kinds"]
    assert after["sepia"]["ok"] > 0.9 > 0.2 > before["sepia"]["ok"]
    assert set(after) == {"sepia", *scenes.KINDS}
    assert all(after[kind]["ok"] >= before[kind]["ok"] - 0.05 - 1e-9 for kind in scenes.KINDS)


@pytest.mark.slow
def test_an_instruction_is_learned_and_the_file_edits_as_the_trainer_did(tmp_path, monkeypatch):
    """In fewer steps than the README's. The picture that the trainer took of the adapter, the pipeline's and
    the command's are one; and the base model's is none of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "SAMPLED", 1)
    new_instruction.write_pairs(tmp_path / "sepia", 32, 1)
    words = ["train", "sepia", "--model", "tiny-joyimage", "--out", "run", "--device", "cpu", "-q"]
    words += [*new_instruction.OPTIONS.split(), "--trigger", "sepia"]
    words[words.index("--steps") + 1], words[words.index("--lr") + 1] = "100", "4e-3"
    assert main([*words, "--valid-every", "100", "--sample-every", "100"]) == 0

    report, _ = new_instruction.judge(Path("run/lora.safetensors"), 8)
    before, after = (report[side]["kinds"] for side in ("before", "after"))
    assert before["sepia"]["ok"] <= 0.25 and after["sepia"]["ok"] >= 0.5
    known = [sum(side[kind]["ok"] for kind in scenes.KINDS) / len(scenes.KINDS) for side in (before, after)]
    assert known[1] > known[0] - 0.15  # 64 edits, and a training cut short

    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    valid = {line["step"]: line["valid_loss"] for line in lines if line.get("sigma") == 0.9}
    assert valid[100] < valid[0]
    with safe_open("run/lora.safetensors", "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "sepia"

    photo = Image.open("sepia/valid/control/0000-sepia.png")
    base, sample = beside(levels(photo), levels(Image.open("run/samples/000100.png")))
    text = Path("sepia/valid/target/0000-sepia.txt").read_text().strip()
    asked = ["edit", "sepia/valid/control/0000-sepia.png", text, "--device", "cpu", "-q", "--seed", "0"]
    asked += ["--model", "tiny-joyimage", "--dtype", "float32"]
    assert main([*asked, "-o", "plain.png"]) == 0
    assert main([*asked, "--lora", "run/lora.safetensors", "-o", "command.png"]) == 0
    pipe = joyedit.load("tiny-joyimage", device="cpu", dtype=torch.float32)
    pipe.load_lora_weights("run/lora.safetensors")
    generator = torch.Generator().manual_seed(0)
    loaded = pipe(photo, text, generator=generator, **pipe.made_for.call).images[0]
    assert (levels(Image.open("command.png")) == levels(loaded)).all()
    # The trainer's prompts were read by a text encoder in bf16, as the checkpoint has it.
    assert np.abs(levels(loaded) - sample).mean() < 0.25
    assert np.abs(levels(Image.open("plain.png")) - base).mean() < 0.25
    assert np.abs(sample - base).mean() > 10


def beside(control, page):
    """What stands beside a control on a page of samples: the base model's picture, and the trained one's."""
    height, width = control.shape[:2]
    left = 2 * GAP
    top = next(
        top
        for top in range(len(page))
        if np.array_equal(page[top : top + height, left : left + width], control)
    )
    starts = [left + i * (width + GAP) for i in (1, 2)]
    return [page[top : top + height, start : start + width] for start in starts]
