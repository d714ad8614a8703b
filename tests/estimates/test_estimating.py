"""Whole estimates: of checkpoints in all layouts, configs alone, and Hub repositories by their headers."""

import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import joyedit
from benchmarks import estimates
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.checkpoints.network import build_on_meta
from joyedit.checkpoints.options import LoadOptions
from joyedit.checkpoints.sizes import parse_size, written_size
from joyedit.command.cli import main
from joyedit.estimates.counting import Tally, storage
from joyedit.estimates.estimating import CARDS, RESERVED, Plan
from joyedit.estimates.parts import Part
from joyedit.estimates.stages import Size, Visit
from joyedit.loading.layouts import ASSETS, find_checkpoint, save_checkpoint
from joyedit.memory import least_budget, smallest
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.qwen3_vl import Qwen3VLConfig
from joyedit.models.wan_vae import AutoencoderKLWanConfig

SMALL = {"height": 64, "width": 96, "device": "cpu"}


def header(path: Path) -> dict:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return {k: v for k, v in json.loads(content[8 : 8 + length]).items() if k != "__metadata__"}


def bytes_of(path: Path) -> int:
    """Of the tensors in a safetensors file, from its header."""
    return sum(end - start for start, end in (entry["data_offsets"] for entry in header(path).values()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimates") / "joyai"
    write_random_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The configs of JoyAI-Image-Edit, and nothing else."""
    folder = tmp_path_factory.mktemp("estimates") / "released"
    shutil.copytree(ASSETS / "tiny-joyimage", folder, ignore=shutil.ignore_patterns("*.safetensors", "tok*"))
    index = json.loads((folder / "model_index.json").read_text())
    del index["buckets"], index["made_for"]
    (folder / "model_index.json").write_text(json.dumps(index))
    kinds = {"transformer": JoyImageEditConfig, "text_encoder": Qwen3VLConfig, "vae": AutoencoderKLWanConfig}
    for part, kind in kinds.items():
        (folder / part / "config.json").write_text(json.dumps(kind().to_dict()))
    return folder


@pytest.mark.parametrize(
    "name", ["tiny-joyimage", pytest.param("tiny-diffedit", marks=pytest.mark.slow), "tiny-chronoedit"]
)
def test_weights_are_those_of_the_headers(name):
    found = joyedit.estimate(name, **SMALL)
    files = {path.parent.name: path for path in (ASSETS / name).glob("*/*.safetensors")}
    assert found.disk == sum(path.stat().st_size for path in files.values())
    kept = {part: count for part, count in found.weights.items() if part not in ("vae", "image_encoder")}
    assert kept == {part: bytes_of(files[part]) for part in kept}
    wide = joyedit.estimate(name, dtype="float32", **SMALL).weights["vae"]
    assert wide == sum(4 * torch.Size(e["shape"]).numel() for e in header(files["vae"]).values())


@pytest.mark.slow
def test_every_layout_is_the_same_model(folder, tmp_path):
    pipe = joyedit.load(folder, device="cpu")
    wanted = joyedit.estimate(folder, **SMALL).to_dict()
    for layout in ("original", "comfyui"):
        save_checkpoint(pipe, tmp_path / layout, layout)
        found = joyedit.estimate(tmp_path / layout, **SMALL).to_dict()
        assert {**found, "disk": 0, "peak": 0} == {**wanted, "disk": 0, "peak": 0}, layout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="files there have no holes")
def test_of_a_file_alone_the_other_networks_are_as_released(tmp_path, released):
    entries, end = {}, 0
    for name, tensor in (
        build_on_meta(JoyImageEditTransformer3DModel, JoyImageEditConfig()).state_dict().items()
    ):
        start, end = end, end + 2 * tensor.numel()
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    content = json.dumps(entries).encode()
    file = tmp_path / "joy_image_edit_bf16.safetensors"
    file.write_bytes(struct.pack("<Q", len(content)) + content)
    os.truncate(file, 8 + len(content) + end)  # 32 GB that nobody reads
    wanted = joyedit.estimate(released, device="cuda")
    found = joyedit.estimate(file, device="cuda")
    assert found.weights["text_encoder"] == wanted.weights["text_encoder"]
    # As files of bf16 hold it: the time embedding's, too, which is held in fp32.
    assert found.weights == wanted.weights and found.peak == wanted.peak


def test_configs_alone_are_the_published_sizes(released):
    found = joyedit.estimate(released, device="cuda")
    # The published files: 16.3 B, 8.77 B and 0.127 B parameters in bf16.
    assert found.weights == {
        "vae": 253_785_062,
        "text_encoder": 17_534_247_392,
        "transformer": 32_563_019_904,
    }
    assert found.disk == sum(found.weights.values())
    assert found.size == Size(1024, 1024, 1, 40)
    assert found.fits["80"] == "" and found.fits["48"] == "--offload model"
    assert found.fits["24"] == "--memory 23G" and found.fits["8"] == "--memory 7G"
    # lm_head, 1.24 GB, is never moved to where prompts are embedded.
    assert found.peak["text"] > sum(found.weights.values()) - 151936 * 4096 * 2
    assert found.peak["text"] < sum(found.weights.values())
    # Two branches of 40 blocks, each with four products of D x D and two of D x 4 D for each token.
    tokens, words, width = 2 * 4096, 1024 + 37 - 34 + 8, 4096
    products = 2 * 40 * 2 * (tokens + words) * 12 * width**2
    attention = 2 * 40 * 4 * (tokens + words) ** 2 * width
    assert found.operations_per_step == pytest.approx(products + attention, rel=0.03)


@pytest.mark.slow
def test_quantised_weights_are_half_as_large(released):
    plain = joyedit.estimate(released, device="cuda").weights
    found = joyedit.estimate(released, device="cuda", quantize="int8_convrot")
    layers = 40 * 2 * (4 * 4096**2 + 2 * 4 * 4096**2)  # 16.1 B weights of linear layers in blocks
    scales = 40 * 2 * (3 * 4096 + 4096 + 16384 + 4096)
    assert plain["transformer"] - found.weights["transformer"] == layers - 4 * scales
    assert found.fits["48"] == "--quantize int8_convrot"


@pytest.mark.slow
def test_a_cpu_reads_what_it_needs(released):
    """Of mapped files neither the head of the language model nor most of its table is read; and what a later
    stage needs is not there before."""
    found = joyedit.estimate(released, device="cpu", height=256, width=256)
    table = 151936 * 4096 * 2
    assert found.peak["text"] < sum(found.weights.values()) - found.weights["transformer"] - 2 * table + 1e9
    assert found.peak["denoise"] > found.peak["text"] + found.weights["transformer"] * 0.9
    cast = joyedit.estimate(released, device="cpu", height=256, width=256, dtype="float32")
    assert cast.peak["text"] > 2 * sum(found.weights.values()), "what is cast is in memory from the start"


@pytest.mark.slow
def test_a_budget_is_kept_and_the_smallest_is_named(released):
    size = {"device": "cuda", "height": 256, "width": 256}
    with pytest.raises(ValueError, match=r"memory='\d\.\dG'$") as caught:
        joyedit.estimate(released, memory="100MB", **size)
    named = str(caught.value).split("'")[-2]
    smallest = joyedit.estimate(released, memory=named, **size).smallest
    assert written_size(smallest) == named
    with pytest.raises(ValueError, match=f"'{named}'"):
        joyedit.estimate(released, memory=smallest - 1, **size)
    held = joyedit.estimate(released, memory="6G", **size)
    assert max(held.peak.values()) <= 6 * 2**30
    assert held.peak["denoise"] > 0.9 * 6 * 2**30, "blocks stay where there is room"
    assert held.seconds > joyedit.estimate(released, **size).seconds, "the others are fetched in every step"
    roomy = joyedit.estimate(released, memory="200G", **size)
    assert roomy.peak["denoise"] < 40 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_flags_are_accepted_where_they_are_used(released, place, monkeypatch):
    """By what a pipeline refuses before it has computed anything."""
    found = find_checkpoint(released)
    made = Plan.make(found, LoadOptions.parse({}), (512, 512, None, None), place, False)
    networks = {name: part.network for name, part in made.parts.items()}
    monkeypatch.setattr(smallest, "is_mapped", lambda tensor, ranges: True)
    monkeypatch.setattr(smallest, "_resident_of_files", lambda addresses: 0)
    monkeypatch.setattr(smallest, "resident_bytes", lambda: RESERVED["cpu"])
    least, _ = least_budget(networks, torch.device("cpu" if place == "cpu" else "mps"))
    flags = [made.flags(card, None) for card in CARDS]
    budgets = [parse_size(said.split()[-1]) for said in flags if said and "--memory" in said]
    assert least < made.smallest() <= min(budgets) and len(budgets) >= 3
    assert least > 0.5 * made.smallest(), "that bound would refuse nearly nothing"


def plan(kind="cuda", whole=16):
    """A network of 32 GiB in 4 blocks, and one of `whole` GiB that has none; 1 GiB of activations."""
    blocks = torch.nn.ModuleList(torch.nn.Linear(2**15, 2**16, bias=False, device="meta") for _ in range(4))
    other = torch.nn.Linear(2**15, whole * 2**13, bias=False, device="meta")
    networks = {"transformer": torch.nn.Sequential(blocks), "vae": other}
    for network in networks.values():
        network.stays_behind = lambda name: False
    parts = {name: Part(network, 0, True) for name, network in networks.items()}
    read = [set(map(storage, network.parameters())) for network in networks.values()]
    gib = 2**30
    work = Tally(
        peak=gib,
        read=read[0],
        reading=(33 + whole) * gib,
        passing=9 * gib,
        blocks=dict.fromkeys(range(4), (8 * gib, 2)),
    )
    rest = dataclasses.replace(work, read=read[1], passing=gib, blocks={})
    visits = [Visit("denoise", "transformer", work), Visit("decode", "vae", rest)]
    return Plan(parts, visits, Size(64, 64, 1, 1), kind)


def test_flags_from_the_least_to_the_most():
    found = plan()
    flags = [None, None, None, "--memory 23G", "--offload model", ""]
    assert [found.flags(size, None) for size in CARDS] == flags
    assert [found.peak(stage) for stage in ("text", "denoise", "decode")] == [0, 49 * 2**30, 49 * 2**30]
    assert plan("cpu").flags(48, None) == "--memory 47G", "there is nothing to offload from"


def test_the_smallest_budget_is_two_blocks_or_a_network_without():
    """On a CPU, one block."""
    gib = 2**30
    assert plan(whole=8).smallest() == pytest.approx((2 * 8 + 1) * gib / 0.98)
    assert plan(whole=20).smallest() == pytest.approx((20 + 1) * gib / 0.98)
    # On a CPU the interpreter counts too, and what was read beside blocks stays.
    assert plan("cpu", whole=8).smallest() == pytest.approx((8 + 1) * gib / 0.98 + RESERVED["cpu"], rel=0.01)
    assert plan("cpu", whole=12).smallest() == pytest.approx(13 * gib / 0.98 + RESERVED["cpu"], rel=0.01)
    found = plan(whole=8)
    assert found.peak("denoise", 24 * gib) == (2 * 8 + 1) * gib, "no block stays in part"
    assert found.peak("denoise", 26 * gib) == (3 * 8 + 1) * gib, "blocks stay where there is room"
    assert found.peak("denoise", 400 * gib) == (32 + 16 + 1) * gib, "all of them, and two empty buffers"
    assert found.peak("decode", 24 * gib) == 9 * gib
    denoise, decode = found.visits
    blocks = {i: (8 * gib, 1 + (i == 0)) for i in range(4)}
    once = dataclasses.replace(denoise, tally=dataclasses.replace(denoise.tally, blocks=blocks))
    found = dataclasses.replace(found, visits=[once, decode])
    assert found.peak("denoise", 400 * gib) == (3 * 8 + 1) * gib, "what passes once does not stay"


def test_what_was_read_beside_blocks_stays_on_a_cpu():
    """Also where it was read before, in a visit that called no block."""
    found = plan("cpu")
    network = found.parts["transformer"].network
    network.append(torch.nn.Linear(2**15, 2**15, bias=False, device="meta"))  # 4 GiB
    ahead = Visit("text", "transformer", Tally(read={storage(network[-1].weight)}))
    visits = [ahead, *found.visits]
    found = Plan(
        {"transformer": Part(network, 0, True), "vae": found.parts["vae"]}, visits, found.size, "cpu"
    )
    assert [least / 2**30 for least, _ in found.streamed] == [4, 4 + 9, 4 + 16 + 1]


@pytest.mark.slow
def test_time_goes_with_the_machine():
    slow = joyedit.estimate("tiny-joyimage", tflops=1, bandwidth=1, **SMALL)
    fast = joyedit.estimate("tiny-joyimage", tflops=2, bandwidth=2, **SMALL)
    assert slow.seconds == pytest.approx(2 * fast.seconds)
    longer = joyedit.estimate("tiny-joyimage", tflops=1, bandwidth=1, steps=20, **SMALL)
    twice = joyedit.estimate("tiny-joyimage", tflops=1, bandwidth=1, steps=38, **SMALL)
    step = (twice.seconds - longer.seconds) / 18
    assert step >= slow.bytes_per_step / 0.8e9 and step >= slow.operations_per_step / 0.72e12
    assert step <= slow.bytes_per_step / 0.8e9 + slow.operations_per_step / 0.57e12


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"height": 64}, "height and width"),
        ({"height": 60, "width": 64}, "height=60: must be a multiple of 16"),
        ({"height": 64, "width": 10**6}, "width=1000000"),
        ({"frames": 5}, "frames=5: must be 1"),
        ({"steps": 0}, "steps=0"),
        ({"steps": True}, "steps=True"),
        ({"memory": "12X"}, "memory="),
        ({"memory": -1}, "memory=-1"),
        ({"dtype": "int3"}, "dtype="),
        ({"quantize": "int3"}, "quantize='int3': must be one of int8_convrot"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"tflops": 0}, "tflops=0"),
        ({"bandwidth": float("nan")}, "bandwidth=nan"),
        ({"pipeline": "Other"}, "pipeline='Other'"),
    ],
)
def test_what_does_not_fit_is_named(wrong, said):
    with pytest.raises(ValueError, match=said):
        joyedit.estimate("tiny-joyimage", **wrong)


def test_other_systems_refuse_by_name(tmp_path):
    with pytest.raises(ValueError, match="frames=7: must be 5, 9"):
        joyedit.estimate("tiny-chronoedit", frames=7)
    with pytest.raises(ValueError, match="quantize='int8_convrot' is for JoyAI-Image"):
        joyedit.estimate("tiny-diffedit", quantize="int8_convrot")
    with pytest.raises(FileNotFoundError):
        joyedit.estimate(tmp_path / "nothing")
    longer = joyedit.estimate("tiny-chronoedit", frames=29, **SMALL)
    assert longer.operations_per_step > 2 * joyedit.estimate("tiny-chronoedit", **SMALL).operations_per_step


def test_command(capsys):
    assert main(["estimate", "tiny-chronoedit", "--device", "cuda", "--frames", "9", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == joyedit.estimate("tiny-chronoedit", device="cuda", frames=9).to_dict()
    assert list(printed) == "weights disk peak bytes_per_step operations_per_step seconds fits".split()
    assert list(printed["peak"]) == ["text", "denoise", "decode"]
    assert list(printed["fits"]) == "8 12 16 24 48 80".split()
    assert main(["estimate", "tiny-chronoedit", "--device", "cuda", "--memory", "8G"]) == 0
    text = capsys.readouterr().out
    assert "transformer" in text and "80 GB  yes" in text
    assert main(["estimate", "tiny-joyimage", "--memory", "1kB"]) == 1
    assert "memory='" in capsys.readouterr().err


@pytest.mark.slow
def test_little_is_imported(released):
    """What takes longer to import than an estimate takes: PyTorch's compiler, sympy, Triton."""
    source = (
        f"import sys, joyedit; joyedit.estimate({str(released)!r}, quantize='int8_convrot');"
        "print([name for name in ('sympy', 'torch._dynamo', 'triton') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_of_a_hub_repository_headers_are_read(folder, tmp_path, monkeypatch):
    asked = []
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    class HfApi:
        def __init__(self, token=None):
            pass

        def model_info(self, name, *, revision, files_metadata):
            siblings = [SimpleNamespace(rfilename=f, size=(folder / f).stat().st_size) for f in files]
            return SimpleNamespace(siblings=siblings, sha="abc")

        def parse_safetensors_file_metadata(self, name, file, *, revision):
            asked.append(file)
            entries = header(folder / file)
            tensors = {k: SimpleNamespace(dtype=v["dtype"], shape=v["shape"]) for k, v in entries.items()}
            return SimpleNamespace(tensors=tensors)

    def snapshot_download(repo_id, *, allow_patterns, **options):
        for name in allow_patterns:
            assert not name.endswith(".safetensors"), "weights are downloaded"
            (tmp_path / name).parent.mkdir(exist_ok=True)
            shutil.copy(folder / name, tmp_path / name)
        return str(tmp_path)

    def cached(repo_id, name, cache_dir, revision):
        return str(tmp_path / name) if (tmp_path / name).exists() else None

    for name, fake in (
        ("HfApi", HfApi), ("snapshot_download", snapshot_download), ("try_to_load_from_cache", cached),
    ):  # fmt: skip
        monkeypatch.setattr(huggingface_hub, name, fake)
    found = joyedit.estimate("someone/something", **SMALL)
    assert found.to_dict() == joyedit.estimate(folder, **SMALL).to_dict()
    assert sorted(asked) == sorted(file for file in files if file.endswith(".safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", estimates.ROWS)
def test_the_committed_table_is_of_now(name):
    committed, now = json.loads(estimates.RESULTS.read_text())[name], estimates.row(name)
    assert committed["weights"] == now["weights"] and committed["fits"] == now["fits"]
    for key in ("peak", "times"):
        assert committed[key] == pytest.approx(now[key], rel=0.05), "run: python -m benchmarks.estimates"
