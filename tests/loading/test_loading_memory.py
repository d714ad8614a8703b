"""How much memory loading takes, on files of ChronoEdit's real size that take no place on the disk.

The transformer was published as 65.6 GB of fp32 in 14 shards, and runs in bf16. Sparse files have its headers
and its length; holes read as zeros through the same path as data. What is measured is the peak resident
memory of a process of its own, mapped pages included.
"""

import json
import os
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import joyedit
from joyedit.checkpoints.network import build_on_meta
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.command import info
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS, BYTES = 16_394_878_784, 65_579_515_136
IN_FP32 = 29_196_800  # parameters that stay so
STEM = "diffusion_pytorch_model"
PIECE = 1 << 20  # numbers that repeat in a tensor with data


def shapes_of(config):
    network = build_on_meta(ChronoEditTransformer3DModel, config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def piece(name):
    """What a tensor with data repeats."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(PIECE, dtype=np.float32)


def write_shards(folder, shapes, limit, real=()):
    """fp32 safetensors of at most `limit` bytes with an index, as diffusers writes them: headers and length,
    and data in those whose number is in `real`. Returns which tensors are in which shard."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        nbytes = 4 * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    folder.mkdir(parents=True)
    where = {}
    for number, names in enumerate(shards):
        file = f"{STEM}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        where.update(dict.fromkeys(names, file))
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            start, end = end, end + 4 * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            for name in names if number in real else ():
                data, left = piece(name), torch.Size(shapes[name]).numel()
                for _ in range(left // PIECE):
                    out.write(data)
                out.write(data[: left % PIECE])
            out.truncate(8 + len(encoded) + end)
    total = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return shards


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """transformer/ of the released size: its folder."""
    folder = tmp_path_factory.mktemp("published") / "transformer"
    write_shards(folder, shapes_of(ChronoEditConfig()), limit=5 * 10**9)
    config = {"_class_name": "WanTransformer3DModel", **ChronoEditConfig().to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_process(code, *arguments):
    """Run `code` in a process of its own and return what it prints as JSON. It has the functions `peak()`
    (the largest resident memory so far, in bytes) and `planned(checkpoint)`."""
    start = """
        import json, sys
        from pathlib import Path
        import torch
        torch.set_num_threads(1)
        from joyedit.checkpoints.hub import Origin
        from joyedit.checkpoints.json_files import read_json
        from joyedit.checkpoints.network import build_on_meta, load_network, open_weights
        from joyedit.checkpoints.network import plan_folder, read_planned
        from joyedit.checkpoints.options import LoadOptions, parse_dtype
        from joyedit.models.chronoedit_dit import *

        def peak():
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.split("VmHWM:")[1].split()[0])

        def size(tensors):
            return sum(tensor.nbytes for tensor in tensors)

        def planned(folder):
            options = LoadOptions()
            return plan_folder(ChronoEditTransformer3DModel, Origin(str(folder)), "transformer", options)

        torch.ones(1000, 1000).bfloat16()  # what the first computation takes
        """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LOAD = """
    folder, layers, dtype = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    config = ChronoEditConfig.from_dict({**read_json(folder / "config.json"), "num_layers": layers})
    before = peak()
    files = open_weights(folder, "diffusion_pytorch_model")
    names = build_on_meta(ChronoEditTransformer3DModel, config).state_dict()
    files = files.renamed({name: name for name in names})
    network = load_network(ChronoEditTransformer3DModel, config, files, parse_dtype(dtype))
    used, state = peak() - before, network.state_dict()
    largest = max(4 * tensor.numel() for tensor in state.values())
    found = {"used": used, "result": size(state.values()), "stored": files.nbytes(), "largest": largest}
    found["mappings"] = Path("/proc/self/maps").read_text().count(".safetensors")
    """
SLACK = 24 << 20  # headers, names and modules


@pytest.mark.slow
def test_casting_takes_the_result_and_little_else(tmp_path):
    config = ChronoEditConfig(num_attention_heads=8, ffn_dim=6144, num_layers=4, added_kv_proj_dim=1024)
    shards = write_shards(tmp_path / "t", shapes_of(config), limit=5 * 10**7)
    assert len(shards) > 4
    (tmp_path / "t" / "config.json").write_text(json.dumps(config.to_dict()))
    found = in_process(LOAD + "print(json.dumps(found))", tmp_path / "t", 4, "bfloat16")
    assert found["stored"] > 3e8 and found["result"] < 0.51 * found["stored"]
    beside = found["largest"] + SLACK  # a stored tensor while it is cast
    assert 0.95 * found["result"] < found["used"] < found["result"] + beside
    as_stored = in_process(LOAD + "print(json.dumps(found))", tmp_path / "t", 4, "float32")
    assert as_stored["result"] == as_stored["stored"] and as_stored["used"] < SLACK  # mapped
    assert 0 < as_stored["mappings"] < 3 * len(shards)  # and once, where memory is promised to mappings


def test_the_released_size_is_opened_and_checked_without_its_memory(published):
    shards = sorted(published.glob("*.safetensors"))
    assert len(shards) == 14 and sum(os.stat(shard).st_blocks * 512 for shard in shards) < 2e6
    index = json.loads((published / f"{STEM}.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == BYTES and len(index["weight_map"]) == 1303
    found = in_process(
        """
        before = peak()
        one, counted = planned(sys.argv[1]), {}
        state = one.network.state_dict()
        for name, dtype in one.dtypes.items():
            counted[str(dtype)] = counted.get(str(dtype), 0) + state[name].numel()
        print(json.dumps({"used": peak() - before, "stored": one.files.nbytes(), "counted": counted}))
        """,
        published.parent,
    )
    assert found["stored"] == BYTES and found["used"] < 2 * SLACK
    counted = found["counted"]
    assert counted == {"torch.bfloat16": PARAMETERS - IN_FP32, "torch.float32": IN_FP32}


def test_info_about_the_released_size(published):
    described = info.describe_file(published / f"{STEM}-00001-of-00014.safetensors")
    assert described.parts["unknown"].dtypes.keys() == {"float32"}
    whole = info.Part("ChronoEditTransformer3DModel", (), BYTES, PARAMETERS, {"float32": PARAMETERS})
    assert whole.bytes_as(None) == 2 * PARAMETERS


@pytest.fixture
def no_tensors(monkeypatch):
    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorFiles, "__getitem__", read)
    monkeypatch.setattr(TensorFiles, "read_once", read)
    monkeypatch.setattr(TensorFiles, "pieces", read)


def test_damage_to_the_released_size_is_seen_before_memory_is_taken(published, no_tensors):
    def load():
        joyedit.ChronoEditTransformer3DModel.from_pretrained(published, torch_dtype="bf16")

    shard = published / f"{STEM}-00009-of-00014.safetensors"
    size = shard.stat().st_size
    try:
        os.truncate(shard, size - 4096)
        with pytest.raises(
            ValueError, match=f"00009-of-00014.safetensors was cut off or damaged: {size - 4096}"
        ):
            load()
    finally:
        os.truncate(shard, size)
    hidden = shard.rename(shard.with_suffix(".part"))
    try:
        with pytest.raises(FileNotFoundError, match="00009-of-00014.safetensors"):
            load()
    finally:
        hidden.rename(shard)
    with pytest.raises(AssertionError, match="was read"):
        load()  # whole again


@pytest.mark.slow
def test_two_shards_of_the_released_size(tmp_path):
    """Of the 14 shards two hold data, 10 GB: a network of the blocks in them is loaded out of the whole set.
    Then every tensor of the whole set passes through."""
    folder = tmp_path / "transformer"
    shapes = shapes_of(ChronoEditConfig())
    shards = write_shards(folder, shapes, limit=5 * 10**9, real=(0, 1))
    (folder / "config.json").write_text(json.dumps(ChronoEditConfig().to_dict()))
    in_two = {*shards[0], *shards[1]}
    by_block = [[name for name in shapes if name.startswith(f"blocks.{n}.")] for n in range(40)]
    layers = next(n for n in range(40) if not in_two.issuperset(by_block[n]))
    assert len(shards) == 14 and layers == 5
    check = """
    sys.path.insert(0, sys.argv[4])
    from test_loading_memory import PIECE, piece
    holes = []
    for name, tensor in state.items():
        flat = tensor.flatten()
        wanted = torch.from_numpy(piece(name)).to(tensor.dtype)
        if not flat.any():
            holes.append(name)
        else:
            assert all(torch.equal(part, wanted[: len(part)]) for part in flat.split(PIECE)), name
    kept = {name for name, tensor in state.items() if tensor.dtype is torch.float32}
    assert kept == {name for name in state if network.stays_fp32(name)}
    print(json.dumps({**found, "holes": holes}))
    """
    found = in_process(LOAD + check, folder, layers, "bfloat16", Path(__file__).parent)
    print(found)
    assert found["holes"] == ["proj_out.weight", "proj_out.bias"]
    assert found["stored"] > 8.5e9 and found["largest"] == 4 * 30720 * 5120
    assert found["used"] < found["result"] + SLACK
    passed = in_process(
        """
        before = peak()
        one = planned(sys.argv[1])
        written = sum(tensor.nbytes for _, tensor in read_planned(one.plan, one.files, one.dtypes))
        print(json.dumps({"used": peak() - before, "written": written}))
        """,
        tmp_path,
    )
    print(passed)
    assert passed["written"] == 2 * (PARAMETERS - IN_FP32) + 4 * IN_FP32
    assert passed["used"] < 0.5 * found["largest"] + 2 * SLACK  # what becomes of the largest tensor
