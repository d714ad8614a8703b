"""`joyedit convert` and `joyedit info`: equal tensors, nothing lost, facts without reading weights."""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.checkpoints.tensor_files import TensorFiles, safetensors_header
from joyedit.command import cli
from joyedit.command import info as facts
from joyedit.loading import layouts

SHA = "0123456789abcdef0123456789abcdef01234567"
STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PARTS = (*STEMS, "scheduler", "tokenizer", "processor")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_random_checkpoint(folder, seed=3)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture(scope="module")
def converted(checkpoint):
    """The checkpoint in each layout, written by `joyedit convert`."""
    folders = {"diffusers": checkpoint}
    for to in ("original", "comfyui"):
        folders[to] = checkpoint.with_name(to)
        assert cli.main(["convert", str(checkpoint), str(folders[to]), "--to", to, "-q"]) == 0
    return folders


# ------------------------------------------------------------------------------------------------- convert
def states(folder):
    return {part: load_file(folder / part / f"{stem}.safetensors") for part, stem in STEMS.items()}


def assert_same_tensors(found, wanted):
    for part in STEMS:
        assert found[part].keys() == wanted[part].keys()
        for name, tensor in wanted[part].items():
            assert found[part][name].dtype is tensor.dtype and torch.equal(found[part][name], tensor), name


def test_convert_to_original_and_back_gives_identical_tensors(converted, run, tmp_path):
    target = tmp_path / "deep" / "back"
    status, out, _ = run("convert", converted["original"], target)
    assert (status, out) == (0, f"{target}\n")
    assert_same_tensors(states(target), states(converted["diffusers"]))
    assert [path.name for path in target.parent.iterdir()] == ["back"]
    for part, file in (("transformer", "transformer.pth"), ("vae", "Wan2.1_VAE.pth")):
        stored = states(converted["diffusers"])[part].values()
        size = sum(tensor.nbytes for tensor in stored)
        assert (converted["original"] / part / file).stat().st_size < 1.1 * size + 50_000


def test_converted_to_comfyui_opens_with_a_processor(converted, run):
    pipe = joyedit.load(converted["comfyui"], device="cpu", processor=converted["diffusers"])
    found = {part: getattr(pipe, part).state_dict() for part in STEMS}
    assert_same_tensors(found, states(converted["diffusers"]))


def test_converted_files_say_where_they_come_from(converted, run, tmp_path):
    assert run("convert", converted["diffusers"], tmp_path / "a", "-q")[0] == 0
    files = [tmp_path / "a" / part / f"{stem}.safetensors" for part, stem in STEMS.items()]
    for file in (*files, *converted["comfyui"].rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {
                "format": "pt",
                "joyedit.version": joyedit.__version__,
                "joyedit.source": "tiny",
                "joyedit.source_revision": "",
                "license": "apache-2.0",
            }


def test_convert_changes_the_dtype(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["convert", str(checkpoint), str(tmp_path / "a"), "--dtype", "fp32", "-q"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("joyedit.convert", run_name="__main__")
    assert ended.value.code == 0
    for part, state in states(tmp_path / "a").items():
        wanted = states(checkpoint)[part]
        assert all(t.dtype is torch.float32 and torch.equal(t, wanted[n].float()) for n, t in state.items())
    planned = facts.describe(str(checkpoint)).bytes_as("fp32")
    written = sum(path.stat().st_size for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert abs(planned - written) < 0.05 * written


def test_convert_refuses_a_target_that_holds_something(checkpoint, run, no_work, tmp_path):
    other, mine = tmp_path / "other", tmp_path / "mine"
    shutil.copytree(checkpoint, other)
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    for words, message in (
        ((checkpoint, other), "exists and is not empty: pass --force"),
        ((checkpoint, mine, "--force"), "is no checkpoint: --force does not replace it"),
        ((checkpoint, tmp_path / "file"), "is a file"),
        ((checkpoint, tmp_path / "a.safetensors"), "DST is a folder"),
        ((checkpoint, checkpoint, "--force"), "in each other"),
        ((checkpoint, checkpoint / "inside"), "in each other"),
        ((checkpoint, checkpoint.parent, "--force"), "in each other"),
    ):
        status, out, err = run("convert", *words)
        assert (status, out) == (1, "") and message in err
    assert (mine / "thesis.txt").read_text() == "years" and len(list(tmp_path.iterdir())) == 3


def test_convert_with_force_replaces_a_checkpoint(checkpoint, converted, run, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "a")
    assert "README.md" in run("convert", checkpoint, tmp_path / "a", "--to", "comfyui", "--force", "-q")[2]
    (tmp_path / "a" / "README.md").unlink()
    assert run("convert", checkpoint, tmp_path / "a", "--to", "comfyui", "--force", "-q")[0] == 0
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "diffusion_models",
        "text_encoders",
        "vae",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_convert_asks_the_disk_first(checkpoint, run, no_work, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    status, _, err = run("convert", checkpoint, tmp_path / "a")
    needed = facts.size(sum(path.stat().st_size for part in PARTS for path in (checkpoint / part).iterdir()))
    assert status == 1 and f"needs {needed}, and the disk has 1.00 MB free" in err
    assert list(tmp_path.iterdir()) == []


def test_convert_asks_the_disk_for_what_parts_from_elsewhere_take(checkpoint, run, tmp_path, monkeypatch):
    assert run("convert", checkpoint, tmp_path / "fp32", "--dtype", "fp32", "-q")[0] == 0
    network = joyedit.JoyImageEditTransformer3DModel.from_pretrained(checkpoint, subfolder="transformer")
    more = sum(parameter.nbytes for parameter in network.parameters())
    usage = shutil.disk_usage(tmp_path)._replace(free=facts.describe(str(checkpoint)).bytes + more // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run("convert", checkpoint, tmp_path / "a", "-q")[0] == 0
    status, _, err = run("convert", checkpoint, tmp_path / "b", "--part", f"transformer={tmp_path / 'fp32'}")
    assert status == 1 and f"{tmp_path / 'b'} needs " in err and "and the disk has" in err
    assert {path.name for path in tmp_path.iterdir()} == {"fp32", "a"}


@pytest.mark.parametrize("to", ["diffusers", "original"])
def test_convert_names_a_source_that_shrinks_while_it_is_read(converted, run, tmp_path, monkeypatch, to):
    shutil.copytree(converted[to], tmp_path / "source")
    (file,) = [
        path
        for path in (tmp_path / "source" / "transformer").iterdir()
        if path.suffix in (".pth", ".safetensors")
    ]
    save = layouts.save_checkpoint

    def shrink(*args, **options):
        os.truncate(file, file.stat().st_size // 2)
        save(*args, **options)

    monkeypatch.setattr(layouts, "save_checkpoint", shrink)
    status, out, err = run("convert", tmp_path / "source", tmp_path / "a", "-q")
    assert (status, out) == (1, "") and f"{file} has become shorter while it was read" in err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("force", [False, True])
def test_interrupted_conversion_leaves_things_as_they_were(checkpoint, run, tmp_path, monkeypatch, force):
    if force:
        shutil.copytree(checkpoint, tmp_path / "a", ignore=shutil.ignore_patterns("README.md"))

    def interrupt(self, folder):
        assert list(Path(folder).parent.rglob("*.safetensors")), "something was written before"
        raise KeyboardInterrupt

    monkeypatch.setattr(joyedit.Qwen3VLProcessor, "save_pretrained", interrupt)
    status, out, err = run("convert", checkpoint, tmp_path / "a", *["--force"] * force, "-q")
    assert (status, out, err) == (130, "", "joyedit: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] * force
    if force:
        assert_same_tensors(states(tmp_path / "a"), states(checkpoint))


# ---------------------------------------------------------------------------------------------------- info
@pytest.fixture
def no_tensors(monkeypatch):
    """Reading a tensor is a failure."""

    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorFiles, "__getitem__", read)


def test_info_about_this_installation(run):
    status, out, err = run("info")
    lines = dict(line.split(": ", 1) for line in out.splitlines())
    assert (status, err) == (0, "")
    assert lines["joyedit"] == joyedit.__version__ and lines["python"] == sys.version.split()[0]
    assert {"torch", "triton", "system", "cpu", "accelerators"} <= lines.keys()
    assert lines["bfloat16 weights on the cpu"] in ("computed in bfloat16", "computed in float32")
    assert json.loads(run("info", "--json")[1])["joyedit"] == joyedit.__version__


@pytest.mark.parametrize("layout", ["diffusers", "original", "comfyui"])
def test_info_about_a_checkpoint(converted, run, no_tensors, layout):
    status, out, _ = run("info", converted[layout], "--json")
    found = json.loads(out)
    wanted = states(converted["diffusers"])
    counts = {part: sum(tensor.numel() for tensor in state.values()) for part, state in wanted.items()}
    assert status == 0 and found["layout"] == layout and found["pipeline"] == "JoyImageEditPipeline"
    assert found["licence"] == "apache-2.0"
    assert {part: found["parts"][part]["parameters"] for part in STEMS} == counts
    assert found["parameters"] == sum(counts.values())
    for part, state in wanted.items():
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
        assert set(found["parts"][part]["dtypes"]) == dtypes
        files = [converted[layout] / file for file in found["parts"][part]["files"]]
        assert found["parts"][part]["bytes"] == sum(file.stat().st_size for file in files)
    used = {file for part in found["parts"].values() for file in part["files"]}
    assert found["bytes"] == sum((converted[layout] / file).stat().st_size for file in used)
    assert found["parts"]["transformer"]["config"]["num_layers"] == 3
    assert found["parts"]["vae"]["class_name"] == "AutoencoderKLWan"
    assert found["parts"]["text_encoder"]["config"]["text_config"]["num_hidden_layers"] == 4

    lines = run("info", converted[layout])[1].splitlines()
    row = next(line.split() for line in lines if line.startswith("vae "))
    assert row == ["vae", "AutoencoderKLWan", f"{counts['vae']:,}", "bfloat16", row[4], "MB"]
    assert next(line.split() for line in lines if line.startswith("total"))[1] == f"{sum(counts.values()):,}"
    assert any(line.startswith("transformer: ") and "hidden_size=64" in line for line in lines)


@pytest.mark.parametrize("part", STEMS)
def test_info_about_a_single_file(converted, run, no_tensors, part):
    folder = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}[part]
    (file,) = (converted["comfyui"] / folder).glob("*.safetensors")
    found = json.loads(run("info", file, "--json")[1])
    assert list(found["parts"]) == [part] and found["bytes"] == file.stat().st_size
    assert found["provenance"]["joyedit.source"] == "tiny"
    header = safetensors_header(file)
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    assert found["parameters"] == sum(int(np.prod(shape)) for shape in shapes)


def test_info_about_an_unknown_file_and_a_folder_without_weights(checkpoint, run, tmp_path):
    torch.save({"a": torch.zeros(3, 5)}, tmp_path / "a.pth")
    assert "not recognised" in run("info", tmp_path / "a.pth")[1]
    shutil.copytree(checkpoint, tmp_path / "b", ignore=shutil.ignore_patterns("*.safetensors"))
    assert "no files" in run("info", tmp_path / "b")[1]


def test_info_about_a_hub_model_that_is_not_downloaded(checkpoint, run, tmp_path, monkeypatch):
    """Sizes come from the Hub; only small JSON files (and the card) are fetched."""
    import huggingface_hub

    files = {
        path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()
    }
    big = {
        name: 10**9 if name.endswith(".safetensors") else path.stat().st_size for name, path in files.items()
    }
    fetched = []

    class Api:
        def __init__(self, token=None):
            pass

        def model_info(self, name, revision=None, files_metadata=False):
            siblings = [huggingface_hub.hf_api.RepoSibling(rfilename=n, size=s) for n, s in big.items()]
            return type("Info", (), {"sha": SHA, "siblings": siblings})()

    def snapshot_download(repo_id, allow_patterns=(), **options):
        root = tmp_path / "snapshots" / SHA
        for name in allow_patterns:
            fetched.append(name)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(files[name], root / name)
        return str(root)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    status, out, err = run("info", "org/tiny", "--json", "--cache-dir", tmp_path, "-q")
    assert status == 0, err
    found = json.loads(out)
    assert found["revision"] == SHA and found["parameters"] is None and found["licence"] == "apache-2.0"
    assert found["parts"]["vae"]["bytes"] == 10**9 and found["bytes"] > 3 * 10**9
    assert found["parts"]["vae"]["config"]["base_dim"] == 8
    assert fetched and all(name.endswith((".json", "README.md")) for name in fetched)
