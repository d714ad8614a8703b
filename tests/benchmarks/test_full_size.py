"""Edits by networks of the released sizes: that the measurement measures, and its committed figures."""

import argparse
import json
import os
import shutil
import signal

import pytest
import torch

import joyedit
from benchmarks import full_size, random_weights, streaming_speed
from joyedit.checkpoints.network import build_on_meta
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.estimates.estimating import RESERVED
from joyedit.memory import MARGIN
from joyedit.quantised import QuantisedWeight

SMALL = {"hidden_size": 64, "num_attention_heads": 2, "num_layers": 2, "text_dim": 32}


@pytest.fixture
def committed():
    return json.loads(full_size.OUT.read_text(encoding="utf-8"))


def test_the_committed_edits_stayed_within_their_budgets(committed):
    edits = {name: row for name, row in committed.items() if name != "streaming"}
    assert edits["joyimage"]["layers"] == 40 and edits["joyimage"]["memory"] == 6 * 2**30
    for row in edits.values():
        processes = row["processes"]
        assert row["peak"] == max(p["peak"]["rss"] for p in processes) <= row["memory"]
        assert all(block["bits_equal"] for process in processes for block in process["blocks"])
        weights = max(sum(process["weights"].values()) for process in processes)
        assert row["layers"] < 40 or weights > 2 * row["memory"]


def test_committed_streaming_is_as_fast_as_it_shall_be(committed):
    row = committed["streaming"]
    assert max(row["ratio"], row["ratio_of_processor_seconds"]) <= row["expected"] == 1.07
    assert max(row[side]["page_faults"] for side in ("resident", "streamed")) > 0


def test_the_estimate_of_whole_edits_within_a_budget_is_right_within_a_tenth(committed):
    whole = [row for row in committed.values() if row["layers"] == 40 and len(row["processes"]) == 1]
    assert len(whole) == 2
    for row in whole:
        estimated = max(row["processes"][0]["estimate"]["peak"].values())
        assert abs((row["peak"] - RESERVED["cpu"]) / estimated - 1) < 0.1


def test_the_estimate_of_a_run_without_a_budget_is_right_within_a_tenth():
    (row,) = json.loads(full_size.OUT.with_name("full_size_tenth.json").read_text(encoding="utf-8")).values()
    (process,) = row["processes"]
    for stage, estimated in process["estimate"]["peak"].items():
        assert abs((process["stages"][stage]["rss"] - RESERVED["cpu"]) / estimated - 1) < 0.1, stage


@pytest.fixture
def part(tmp_path):
    """A small transformer in int8: its class, config and file."""
    cls = joyedit.JoyImageEditTransformer3DModel
    config = cls.Config(**SMALL, rope_dim_list=(8, 12, 12))
    nbytes = random_weights.write_part(tmp_path, cls, config, torch.bfloat16, 3, "int8_convrot")
    assert nbytes == random_weights.part_bytes(cls, config, torch.bfloat16, "int8_convrot")
    return cls, config, tmp_path / f"{cls.weights_stem}.safetensors"


def test_random_weights_are_drawn_again_the_same(part):
    cls, config, path = part
    files = TensorFiles([path])
    drawn = random_weights.drawn(build_on_meta(cls, config), torch.bfloat16, 3, "int8_convrot")
    other = random_weights.drawn(build_on_meta(cls, config), torch.bfloat16, 4, "int8_convrot")
    assert set(files) == set(drawn)
    for name in files:
        assert torch.equal(files[name], drawn[name]) and files.dtypes[name] == drawn.dtypes[name], name
    same = {name for name in files if torch.equal(files[name], other[name])}
    assert same == {name for name in files if name.endswith(".comfy_quant")}


def test_weights_are_read_back_without_joyedit(part):
    cls, config, path = part
    network = cls.from_pretrained(path.parent)
    plain = random_weights.read_module(path, "double_blocks.1")
    stored, groups = random_weights.read_stored(path, "double_blocks.1")
    assert groups
    for name, wide in plain.items():
        own = network.get_submodule("double_blocks.1").get_submodule(name.rpartition(".")[0])
        weight = getattr(own, name.rpartition(".")[2])
        meant = weight.to(torch.float32)
        torch.testing.assert_close(wide, meant, rtol=0, atol=1e-6 * wide.abs().max().item())
        kept = weight.stored if isinstance(weight, QuantisedWeight) else weight
        assert torch.equal(stored[name], kept) and stored[name].data_ptr() % 64 == kept.data_ptr() % 64


def test_too_little_disk_is_said_before(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=3 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: free)
    full_size.check_room(tmp_path, 2 * 10**9, "it")
    with pytest.raises(SystemExit, match=r"has 2\.0 GB to give, and the files of joyimage .* 17\.5 GB"):
        full_size.main(["--place", str(tmp_path), "--models", "joyimage"])
    assert not list(tmp_path.iterdir())


def test_files_are_gone_when_it_is_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt), full_size.folder_in(tmp_path) as folder:
        (folder / "weights").write_bytes(b"1")
        os.kill(os.getpid(), signal.SIGTERM)
    assert not list(tmp_path.iterdir())


def test_a_block_that_gives_something_else_is_refused(part):
    """The comparison of recorded calls: of the right output, and of one that is a little off."""
    cls, config, path = part
    network = cls.from_pretrained(path.parent)
    img, txt, vec = torch.randn(1, 4, 64), torch.randn(1, 3, 64), torch.randn(1, 6, 64)
    args = (img.bfloat16(), txt.bfloat16(), vec, network.rope((1, 2, 2)))
    with torch.no_grad():
        output = network.double_blocks[1](*args)
    call = {"part": "transformer", "block": "double_blocks.1", "args": args, "kwargs": {}, "output": output}
    checkpoint = argparse.Namespace(
        classes={"transformer": cls}, configs={"transformer": config}, weights=lambda part: path
    )
    found = full_size.compared(checkpoint, call)
    assert found["bits_equal"] and 0 < found["relative_error"] < 0.01
    for wrong in (1.0001 * output[0].float(), 1.1 * output[0]):
        with pytest.raises(RuntimeError, match=r"transformer.double_blocks.1: error"):
            full_size.compared(checkpoint, {**call, "output": (wrong.to(output[0].dtype) + 2**-9,)})


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_a_tenth_of_the_layers_within_a_budget(tmp_path):
    """Without a budget, and with one in which not all blocks of the transformer stay."""

    def measured(memory):
        out, words = tmp_path / f"{memory}.json", ["--depth", "0.1", "--width", "4", "--place", str(tmp_path)]
        full_size.main([*words, "--models", "joyimage-int8", "--memory", memory, "--out", str(out)])
        assert [path.suffix for path in tmp_path.iterdir()] == [".json"] * len(list(tmp_path.iterdir()))
        return json.loads(out.read_text())["joyimage-int8"]

    whole = measured("none")
    (process,) = whole["processes"]
    least = int(process["estimate"]["smallest"] * (1 - MARGIN)) - RESERVED["cpu"]
    budget = process["interpreter"] + least + 140 * 10**6  # of which half is for code that is loaded later
    within = measured(str(budget))
    assert whole["layers"] == 4 and within["peak"] <= budget < whole["peak"]
    (found,) = within["processes"]
    assert found["picture"] == process["picture"]
    assert found["blocks_staying"][-1] < 4 and len(found["blocks"]) == 4
    assert all(block["bits_equal"] for block in found["blocks"])
    assert set(found["stages"]) == {"load", "text", "denoise", "decode"}


@pytest.mark.slow
def test_streaming_against_resident_measures(tmp_path):
    found = streaming_speed.measure(tmp_path, 4, 2, width=16)
    assert found["ratio"] > 0 and len(found["pairs"]) == 2
