"""Damage is found and named, at once where a header tells it and else by reading; what is whole stays so."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_checkpoint import write_random_checkpoint, write_random_chronoedit_checkpoint
from joyedit.checkpoints import verify as verifying
from joyedit.checkpoints.verify import verify

SHARD = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "chronoedit"
    write_random_chronoedit_checkpoint(folder)
    return folder


@pytest.fixture
def folder(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "copy"))


def problems(found):
    return {name: report.problems for name, report in found.files.items() if report.problems}


@pytest.mark.parametrize("full", [False, True])
def test_whole_checkpoints(published, full):
    found = verify(published, full=full)
    assert found.ok and problems(found) == {} and found.not_finite == {}
    weights = {path.relative_to(published).as_posix() for path in published.rglob("*.safetensors")}
    assert len(weights) == 6 and weights < found.files.keys()
    assert all(found.files[name].bytes == (published / name).stat().st_size for name in weights)
    for path in published.rglob("*.safetensors"):
        assert verify(path, full=full).files.keys() == {path.name}


@pytest.mark.parametrize("to", ["original", "comfyui"])
def test_other_layouts(tmp_path, run, to):
    write_random_checkpoint(tmp_path / "tiny")
    assert run("convert", tmp_path / "tiny", tmp_path / to, "--to", to, "-q")[0] == 0
    assert verify(tmp_path / to, full=True).ok
    largest = max((p for p in (tmp_path / to).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size - 1)
    (name,) = problems(verify(tmp_path / to))
    assert tmp_path / to / name == largest


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def broken_off(path):
    os.truncate(path, path.stat().st_size // 2)


def without_a_tensor(path):
    state = load_file(path)
    state.pop("proj_out.bias")
    save_file(state, path, {"format": "pt"})


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def link_to_nothing(path):
    path.unlink()
    path.symlink_to("gone")


def of_no_object(path):
    path.write_text("[]")


DAMAGE = {
    "cut": (SHARD, cut, SHARD, "was cut off or damaged"),
    "empty": (SHARD, lambda path: os.truncate(path, 0), SHARD, "is not a safetensors file, or was cut off"),
    "missing": (SHARD, Path.unlink, SHARD, f"it is missing: {INDEX} names it"),
    "linked": (SHARD, link_to_nothing, SHARD, "it is a link to nothing: gone"),
    "without a tensor": (SHARD, without_a_tensor, SHARD, f"it lacks proj_out.bias, which {INDEX} promises"),
    "index": (INDEX, broken_off, INDEX, "not valid JSON"),
    "index of nothing": (INDEX, of_no_object, INDEX, "not an index of weight files"),
    "pointer": ("vae/diffusion_pytorch_model.safetensors", pointer, None, "is a git-lfs pointer"),
    "no weights": ("vae/diffusion_pytorch_model.safetensors", Path.unlink, "vae/config.json", "no weights"),
    "no folder": ("text_encoder", shutil.rmtree, "model_index.json", "lists text_encoder, and there is no"),
    "index of parts": ("model_index.json", of_no_object, "model_index.json", "not a JSON object"),
    "config": (
        "scheduler/scheduler_config.json",
        broken_off,
        "scheduler/scheduler_config.json",
        "not valid JSON",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen_at_once(folder, name):
    place, damage, named, message = DAMAGE[name]
    damage(folder / place)
    found = verify(folder)
    assert not found.ok and {*problems(found)} == {named or place}
    assert message in problems(found)[named or place][0]
    assert found.lines()[0].startswith(f"{named or place}: ") and "1 with problems" in found.lines()[-1]


def test_a_part_without_files_is_no_damage(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "safety_checker": [None, None]}))
    assert verify(folder).ok


@pytest.mark.parametrize("form", [True, False], ids=["zip", "older"])
def test_pickles(tmp_path, form, monkeypatch):
    monkeypatch.setattr(verifying, "PIECE", 64)
    base = torch.arange(400.0).view(20, 20)
    base[3, 4] = base[7, 7] = torch.nan
    half = torch.ones(333, dtype=torch.float16)
    half[-1] = torch.inf
    state = {
        "whole": base,
        "turned": base.T,
        "part": base[3],
        "alike": base,
        "half": half,
        "n": torch.ones(3).int(),
    }
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=form)
    assert verify(tmp_path / "x.pth").ok
    found = verify(tmp_path / "x.pth", full=True)
    assert found.not_finite == {"whole": 2, "turned": 2, "part": 1, "alike": 2, "half": 1} and not found.ok
    cut(tmp_path / "x.pth")
    assert "cannot be opened as weights only" in problems(verify(tmp_path / "x.pth"))["x.pth"][0]


def test_numbers_that_are_not_finite_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(verifying, "PIECE", 64)
    torch.manual_seed(0)
    state = {name: torch.randn(50, 3).to(dtype) for name, dtype in (
        ("a", torch.float32), ("b", torch.bfloat16), ("c", torch.float16), ("d", torch.float64),
        ("e", torch.float8_e4m3fn), ("f", torch.float8_e5m2))}  # fmt: skip
    wanted = {"a": 3, "b": 1, "c": 150, "d": 2, "e": 2, "f": 1}
    for name, count in wanted.items():
        numbers = state[name].view(-1)
        numbers[torch.randperm(150)[:count]] = torch.nan if name in "ae" else torch.inf
    state["b"].view(-1)[state["b"].view(-1).isinf()] = -torch.inf
    state |= {"empty": torch.zeros(0, 3), "i": torch.full((9,), -1), "fine": torch.full((40,), 3e38)}
    state["text.attn_mask"] = torch.full((4, 4), -torch.inf).triu(1)  # which is meant so
    save_file(state, tmp_path / "x.safetensors")
    found = verify(tmp_path / "x.safetensors", full=True)
    assert found.not_finite == wanted == found.to_dict()["not_finite"]
    assert len(problems(found)["x.safetensors"]) == 6
    save_file({"a": torch.full((2,), torch.inf)}, tmp_path / "y.safetensors")
    assert verify(tmp_path, full=True).not_finite == {**wanted, "a": 5}


def test_scales_and_numbers_of_quantised_files(tmp_path):
    """A scale that is no number is one of its own tensor; the mark of scaled fp8 is none."""
    scales = torch.rand(6, 1)
    scales[2] = torch.nan
    fp8, infinite = torch.zeros(6, 8).to(torch.float8_e4m3fn), torch.tensor(torch.inf)
    state = {"a.weight": torch.ones(6, 8, dtype=torch.int8), "a.weight_scale": scales}
    state |= {"b.weight": fp8, "b.scale_weight": infinite}
    fp8.view(torch.uint8)[3, 1:4] = 0x7F  # NaN
    state["scaled_fp8"] = torch.full((2,), torch.nan).to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "x.safetensors")
    found = verify(tmp_path / "x.safetensors", full=True)
    assert found.not_finite == {"a.weight_scale": 1, "b.weight": 3, "b.scale_weight": 1}


# As `git hash-object` and `sha256sum` print them.
GIT_SHA1 = {"config.json": ("{}\n", "0967ef424bce6791893e9a57bb952f80fd536e93")}
SHA256_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture
def cache(tmp_path):
    """A Hub cache of one repository, and what its files are links to."""
    top = tmp_path / "hub" / "models--some--model"
    root = top / "snapshots" / ("0" * 40)
    root.mkdir(parents=True)
    (top / "blobs").mkdir()
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("0" * 40)
    save_file({"a": torch.arange(500.0)}, tmp_path / "x")
    digest = os.popen(f"sha256sum {tmp_path / 'x'}").read().split()[0]
    content = {
        "config.json": (b"{}\n", GIT_SHA1["config.json"][1]),
        "notes.txt": (b"abc", SHA256_OF_ABC),
        "model.safetensors": ((tmp_path / "x").read_bytes(), digest),
    }
    for name, (data, digest) in content.items():
        (top / "blobs" / digest).write_bytes(data)
        (root / name).symlink_to(Path("..", "..", "blobs", digest))
    return root


def flip_the_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_contents_are_held_against_the_names_of_blobs(cache, monkeypatch):
    monkeypatch.setattr(verifying, "PIECE", 64)
    in_cache = {"cache_dir": cache.parents[2]}
    found = verify("some/model", full=True, **in_cache)
    assert found.ok and {name: one.hash for name, one in found.files.items()} == {
        "config.json": "git-sha1",
        "notes.txt": "sha256",
        "model.safetensors": "sha256",
    }
    assert "3 of them held against a hash" in found.lines()[-1]
    assert verify("some/model", **in_cache).files.keys() == {"config.json", "model.safetensors"}
    for name in found.files:
        flip_the_last_bit(cache / name)
        for damaged in (verify("some/model", full=True, **in_cache), verify(cache, full=True)):
            assert {*problems(damaged)} == {name}
            assert f"its content is not that of its {found.files[name].hash}" in problems(damaged)[name][-1]
        flip_the_last_bit(cache / name)
    assert verify(cache / "model.safetensors", full=True).files["model.safetensors"].hash == "sha256"
    with pytest.raises(FileNotFoundError, match="some/other is not in the cache"):
        verify("some/other", **in_cache)


def test_downloads_into_a_folder_have_their_hashes_noted(folder):
    noted = folder / ".cache" / "huggingface" / "download" / "vae" / "config.json.metadata"
    noted.parent.mkdir(parents=True)
    noted.write_text(f"{'0' * 40}\n{GIT_SHA1['config.json'][1]}\n1700000000.0\n")
    assert verify(folder).ok
    assert {*problems(verify(folder, full=True))} == {"vae/config.json"}
    (folder / "vae" / "config.json").write_text("{}\n")
    assert verify(folder, full=True).files["vae/config.json"].hash == "git-sha1"
    assert not problems(verify(folder, full=True))
    noted.write_text("")
    assert verify(folder, full=True).files["vae/config.json"].hash is None


def test_a_broken_download_is_mentioned(cache):
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (cache / "model.safetensors.index.json").write_text(json.dumps(index))
    (cache.parents[1] / "blobs" / "00.incomplete").write_text("")
    ((text,),) = problems(verify("some/model", cache_dir=cache.parents[2])).values()
    assert "it is missing" in text and "a download was broken off" in text


def test_a_file_that_shrinks_while_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(verifying, "PIECE", 1024)
    counted = verifying.count_not_finite

    def shrink(numbers):
        os.truncate(folder / SHARD, 10_000)
        return counted(numbers)

    monkeypatch.setattr(verifying, "count_not_finite", shrink)
    assert "has become shorter while it was read" in problems(verify(folder, full=True))[SHARD][0]


def test_places_without_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for place, message in ((tmp_path, "holds no weights"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(FileNotFoundError, match=message):
            verify(place)


def test_the_command(folder, run):
    status, out, err = run("verify", folder)
    assert (status, err) == (0, "") and out.endswith(": whole\n")
    status, out, err = run("verify", folder, "--full", "-v")
    assert status == 0 and "none of them held against a hash" in out and "reading" in err
    state = load_file(folder / SHARD)
    state["proj_out.bias"][:2] = torch.nan
    save_file(state, folder / SHARD, {"format": "pt"})
    cut(folder / "vae" / "diffusion_pytorch_model.safetensors")
    status, out, err = run("verify", folder, "--full", "--json", "-q")
    found = json.loads(out)
    assert (status, err, found["ok"], found["not_finite"]) == (1, "", False, {"proj_out.bias": 2})
    bad = [name for name, one in found["files"].items() if one["problems"]]
    assert bad == [SHARD, "vae/diffusion_pytorch_model.safetensors"]
    status, out, _ = run("verify", folder)
    assert status == 1 and out.splitlines()[0].startswith("vae/diffusion_pytorch_model.safetensors: was cut")
    assert run("verify", "tiny-joyimage", "--full", "-q")[0] == 0
    status, out, err = run("verify", folder / "nowhere")
    assert (status, out) == (1, "") and "does not exist" in err
