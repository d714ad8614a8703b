"""Budgets that are too small, disks that are full, weight files that shrink: refused or reported by name."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import joyedit
from joyedit.checkpoints.sizes import parse_size, written_size
from joyedit.command.cli import main
from joyedit.memory import least_budget
from joyedit.memory.budget import MARGIN, Watched, resident_bytes
from joyedit.memory.pages import mapped_copies
from joyedit.pipelines.placement import Placed

ROOT = Path(__file__).resolve().parents[1]
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
SMALLEST = r"the smallest that works is memory='(\d+(?:\.\d)?[KMG])'$"


def test_sizes_are_written_as_they_are_read():
    assert [written_size(n) for n in (2**30, 2469606196, 101 * 2**20, 5 * 2**20, 7)] == [
        "1G", "2.4G", "110M", "5120K", "1K",
    ]  # fmt: skip
    for n in np.random.default_rng(0).integers(1, 2**42, 200).tolist():
        assert n <= parse_size(written_size(n)) <= max(1.1 * n, n + 1024)


def test_what_is_too_little_is_refused_and_the_smallest_named(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match=f"^memory='1M' is too little: .*{SMALLEST}") as refused:
        joyedit.load("tiny-joyimage", device="cpu", memory="1M")
    smallest = re.search(SMALLEST, str(refused.value))[1]
    pipe = joyedit.load("tiny-joyimage", device="cpu", memory=smallest)
    with pytest.raises(ValueError, match=SMALLEST):
        pipe.set_memory(10**6)
    assert pipe.placement() == {"memory": f"{parse_size(smallest):,} bytes"}, "what was set stays"
    monkeypatch.chdir(tmp_path)
    PHOTO.save("photo.png")
    assert main("edit photo.png red --memory 1M --device cpu -m tiny-joyimage".split()) == 1
    assert re.search(
        f"^joyedit: error: memory='1M' is too little: .*{SMALLEST}", capsys.readouterr().err, re.M
    )


class Blocks(nn.Module):
    """Three blocks of 64, 256 and 128 bytes, and a table of 80 beside 20 of other weights."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(n, 16, bias=False) for n in (1, 4, 2))
        self.table = nn.Embedding(10, 2)
        self.last = nn.Linear(5, 1, bias=False)
        self.behind = nn.Linear(10, 10)

    @staticmethod
    def stays_behind(name):
        return name.startswith("behind")


def test_the_least_is_the_rest_and_two_blocks_or_one_of_a_file(monkeypatch):
    networks = {"small": nn.Linear(1, 1), "unet": Blocks()}
    networks["small"].stays_behind = networks["unet"].stays_behind
    least, why = least_budget(networks, torch.device("mps"))
    assert least == 2 * 256 + 80 + 20 and "the unet needs 612 at once" in why
    monkeypatch.setattr("joyedit.memory.smallest.resident_bytes", lambda: 10_000)
    monkeypatch.setattr("joyedit.memory.smallest.is_mapped", lambda tensor, ranges: True)
    monkeypatch.setattr("joyedit.memory.smallest._resident_of_files", lambda addresses: 1000)
    assert least_budget(networks, torch.device("cpu"))[0] == 10_000 - 1000 + 256 + 20
    monkeypatch.undo()
    monkeypatch.setattr("joyedit.memory.smallest.resident_bytes", lambda: 10_000)
    assert least_budget(networks, torch.device("cpu"))[0] == 10_000 - (64 + 256 + 128) + 256


def test_what_was_read_of_the_weights_does_not_count(tmp_path):
    network = joyedit.JoyImageEditTransformer3DModel.from_config(
        hidden_size=512, num_attention_heads=4, num_layers=4, text_dim=64
    )
    network.save_pretrained(tmp_path)
    network = joyedit.JoyImageEditTransformer3DModel.from_pretrained(tmp_path)
    before, _ = least_budget({"transformer": network}, torch.device("cpu"))
    resident = resident_bytes()
    total = sum(parameter.double().sum().item() for parameter in network.parameters())  # all of 100 MB
    after, _ = least_budget({"transformer": network}, torch.device("cpu"))
    assert np.isfinite(total) and resident_bytes() > resident + 80 * 10**6
    assert abs(after - before) < 20 * 10**6


class Told(Watched):
    """Holds what it is told."""

    held = 0

    def most(self):
        return self.held

    def forget(self):
        self.held = 0


def test_more_than_the_budget_is_said_once(caplog):
    room = Told(1000 * 2**20)

    def visit(*amounts):
        before = len(caplog.records)
        with room.visit("UNet"):
            for amount in amounts:
                room.held = amount * 2**20
                room.begin()  # of a pass, which forgets what was most before
        return [record.getMessage() for record in caplog.records[before:]]

    assert visit(900, 1000, 3) == []
    (said,) = visit(1500, 20)
    assert "memory='1000M' was not enough" in said and "1,572,864,000 bytes" in said and "UNet" in said
    named = re.search("memory='([^']+)'$", said)[1]
    assert 1500 * 2**20 / (1 - MARGIN) <= parse_size(named) < 1600 * 2**20
    assert visit(1500) == [] and visit(1200) == []
    assert len(visit(1700)) == 1


AT_THE_SMALLEST = """
import re, sys, torch, joyedit
from joyedit.checkpoints.sizes import parse_size
from joyedit.memory.budget import resident_bytes
from tests.test_memory import call
name = sys.argv[1]
try:
    joyedit.load(name, device="cpu", memory="1M")
except ValueError as error:
    smallest = re.search("memory='([^']+)'$", str(error))[1]
pipe = joyedit.load(name, device="cpu", memory=smallest)
pipe.set_progress_bar_config(disable=True)
found = call(pipe)
room = pipe._room
assert room.peak and room.enough == room.total, (room.peak, room.total)
pipe.set_memory(None)
assert torch.equal(found, call(pipe))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["tiny-joyimage", "tiny-diffedit", "tiny-chronoedit"])
def test_small_pictures_are_made_within_the_smallest(name):
    subprocess.run([sys.executable, "-c", AT_THE_SMALLEST, name], check=True, cwd=ROOT)


def test_a_weight_file_that_shrinks_is_named_before_it_is_read(tmp_path):
    joyedit.load("tiny-diffedit", device="cpu").save_pretrained(tmp_path)
    pipes = [joyedit.load(tmp_path, device="cpu") for _ in range(2)]
    pipes[1].to(torch.float64)
    file = next((tmp_path / "unet").glob("*.safetensors"))
    whole = file.read_bytes()
    os.truncate(file, len(whole) // 2)
    settings = {"num_inference_steps": 2, "num_maps_per_mask": 1}
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} has become shorter since"):
        pipes[0].edit(PHOTO, "a red circle", "a blue circle", **settings)
    pipes[1].for_one_call()  # of which nothing is in that file
    file.write_bytes(whole)
    pipes[0].for_one_call()
    os.replace(file, tmp_path / "moved")
    file.write_bytes(b"another file in its place")
    pipes[0].for_one_call()


def test_weights_that_the_disk_has_no_room_for(tmp_path, monkeypatch):
    def full(descriptor, start, nbytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=f"{re.escape(str(tmp_path))} has no room for 64 bytes.*TMPDIR"):
        mapped_copies([torch.ones(4)], str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_budget_is_shared_with_pipelines_of_the_same_parts():
    pipe = joyedit.load("tiny-joyimage", device="cpu", memory="16G")
    assert type(pipe).from_pipe(pipe).in_use() == {"memory"}
    assert Placed._room is None


def test_devices_that_do_not_say_what_they_hold_are_refused(monkeypatch):
    pipe = joyedit.load("tiny-joyimage", device="cpu")
    with pytest.raises(ValueError, match="^memory: .* not for mps .*offload='sequential'"):
        pipe.set_memory("6G", "mps")
    monkeypatch.setattr("joyedit.memory.budget.sys.platform", "darwin")
    with pytest.raises(ValueError, match="^memory: .* not for cpu on darwin"):
        pipe.set_memory("6G")
    assert "memory" not in pipe.in_use() and pipe.device.type == "cpu"
