"""Tensors that are the bytes of a file."""

import json
import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.memory.pages import PAGE, is_mapped, mapped_ranges

linux = pytest.mark.skipif(sys.platform != "linux", reason="files are mapped otherwise there")
STATE = {"a": torch.arange(50, dtype=torch.float32).view(5, 10), "b": torch.ones(3, dtype=torch.int8)}


@pytest.fixture(params=["safetensors", "pth"])
def path(request, tmp_path):
    if request.param == "pth":
        torch.save(STATE, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"
    save_tensors(tmp_path, "weights", STATE)
    return tmp_path / "weights.safetensors"


@linux
@pytest.mark.skipif(
    sys.platform == "linux" and Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2",
    reason="nothing that may be written to can be larger than main memory there",
)
def test_a_file_larger_than_main_memory(tmp_path):
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    rows = (sizes["MemTotal"] + sizes["SwapTotal"]) * 1024 // 8192 + 1
    entry = {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, rows * 8192]}
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:  # a hole: it takes no disk
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 8192)
    weight = TensorFiles([path])["w"]
    assert weight.shape == (rows, 4096) and not weight[-1].any()
    weight[-1, 7] = 2
    assert weight[-1].float().sum() == 2 and not TensorFiles([path])["w"][-1].any()


@linux
def test_the_bytes_of_the_file_are_the_memory(path):
    files, ranges = TensorFiles([path]), None
    for name, wanted in STATE.items():
        tensor = files[name]
        ranges = ranges or mapped_ranges()
        assert torch.equal(tensor, wanted) and is_mapped(tensor, ranges)
        assert tensor.data_ptr() % PAGE == files.stored[name].start % PAGE
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # what a copy of it takes


def test_the_file_stays_as_it_is(path):
    before = path.read_bytes()
    weight = TensorFiles([path])["a"]
    weight.mul_(2)
    assert torch.equal(weight, 2 * STATE["a"]) and path.read_bytes() == before
    assert torch.equal(TensorFiles([path])["a"], STATE["a"])


@linux
def test_a_file_that_became_shorter_is_named(path):
    files = TensorFiles([path])
    os.truncate(path, 100)
    with pytest.raises(ValueError, match=f"{path.name} has become shorter"):
        files["a"]


def test_pickles_of_another_byte_order_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(STATE, tmp_path / "own.pth")
    other = "big" if sys.byteorder == "little" else "little"
    with zipfile.ZipFile(tmp_path / "own.pth") as own, zipfile.ZipFile(path, "w") as made:
        for entry in own.infolist():
            of_order = entry.filename.endswith("byteorder")
            made.writestr(entry.filename, other.encode() if of_order else own.read(entry))
    with pytest.raises(ValueError, match=f"the byte order '{other}'"):
        TensorFiles([path])
