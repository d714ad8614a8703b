"""Weight files written tensor by tensor: as their own libraries write them, and never what does not open."""

import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from joyedit.checkpoints import stored_tensors
from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.checkpoints.writing import write_pickle, write_safetensors
from joyedit.convert.table import Layout, fuse, rename, split

FORMS = pytest.mark.parametrize("form", [True, False], ids=["zip", "older"])


def tensors():
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return {
        "b.whole": torch.randn(3, 5, 7),
        "b.turned": base.T,
        "part": base[2:4],
        "Ü": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "half": torch.randn(5).bfloat16(),
        "flags": torch.randn(3) > 0,
    }


def assert_same(found, wanted):
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


def test_safetensors_are_byte_for_byte_those_of_the_library(tmp_path):
    state = tensors()
    write_safetensors(tmp_path / "ours", TensorFiles.of(state), {"format": "pt"})
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_pickles_open_in_torch(tmp_path):
    state = tensors()
    write_pickle(tmp_path / "x.pth", TensorFiles.of(state))
    for options in ({"mmap": True}, {"weights_only": False}):
        found = torch.load(tmp_path / "x.pth", **options)
        assert type(found) is OrderedDict
        assert_same(found, state)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values())
    torch.save(OrderedDict(state), tmp_path / "theirs.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as ours, zipfile.ZipFile(tmp_path / "theirs.pth") as theirs:
        assert ours.testzip() is None  # the sums of all records
        records = {name.partition("/")[2] for name in theirs.namelist()}
        needed = {name for name in records if not name.startswith((".", "data/"))}
        assert needed < {name.partition("/")[2] for name in ours.namelist()}


@FORMS
@pytest.mark.parametrize("piece", [8, 64, 2**24])
def test_stored_tensors_are_read_one_by_one(tmp_path, form, piece, monkeypatch):
    monkeypatch.setattr(stored_tensors, "PIECE", piece)
    state = tensors()
    torch.save(state, tmp_path / "x.pth", _use_new_zipfile_serialization=form)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "x.safetensors")
    for file in ("x.pth", "x.safetensors"):
        files = TensorFiles([tmp_path / file])
        assert_same({name: files.read_once(name) for name in state}, state)
        assert_same({name: files[name] for name in state}, state)
        for name, tensor in state.items():
            pieces = [piece.clone() for piece in files.pieces(name)]
            assert torch.equal(torch.cat([*pieces, tensor.new_empty(0)]), tensor.flatten())
            assert all(one.nbytes <= piece for one in pieces) or not tensor.is_contiguous()


def test_one_form_becomes_another_in_pieces(tmp_path, monkeypatch):
    """Renamed, cast, put together and taken apart, against the same done in memory."""
    monkeypatch.setattr(stored_tensors, "PIECE", 16)
    torch.manual_seed(1)
    state = {f"l.{n}.{part}": torch.randn(4, 3) for n in range(2) for part in "qkvo"}
    layout = Layout("other", (split("a.{n}.qk", ["l.{n}.q", "l.{n}.k"]), rename("a.{n}.v", "l.{n}.v"),
                              fuse(["a.{n}.o1", "a.{n}.o2"], "l.{n}.o", dim=1)))  # fmt: skip
    halves = {name: one[:, :2].contiguous() for name, one in state.items()}
    save_file(halves, tmp_path / "ours.safetensors")
    foreign = TensorFiles([tmp_path / "ours.safetensors"]).spelled(layout)
    save_tensors(tmp_path, "foreign", foreign)
    wanted = {}
    for n in range(2):
        q, k, v, o = (halves[f"l.{n}.{part}"] for part in "qkvo")
        wanted |= {
            f"a.{n}.qk": torch.cat([q, k]),
            f"a.{n}.v": v,
            f"a.{n}.o1": o[:, :1],
            f"a.{n}.o2": o[:, 1:],
        }
    found = load_file(tmp_path / "foreign.safetensors")
    assert_same(dict(sorted(found.items())), dict(sorted(wanted.items())))
    steps, _, _ = layout.plan(list(found))
    dtypes = dict.fromkeys(halves, torch.bfloat16)
    ours = TensorFiles.made(steps, TensorFiles([tmp_path / "foreign.safetensors"]), dtypes)
    assert ours.nbytes() == sum(one.nbytes for one in halves.values()) // 2
    write_pickle(tmp_path / "back.pth", ours)
    back = TensorFiles([tmp_path / "back.pth"])
    assert_same({name: back[name] for name in halves}, {k: v.bfloat16() for k, v in halves.items()})
    assert max(one.nbytes for one in ours.pieces("l.0.v")) == 8  # bf16 of 16 bytes


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_breaks_off_does_not_open(tmp_path, suffix, monkeypatch):
    pieces, path = TensorFiles.pieces, tmp_path / f"x{suffix}"

    def broken(self, name):
        if name == "half":
            raise KeyboardInterrupt
        yield from pieces(self, name)

    monkeypatch.setattr(TensorFiles, "pieces", broken)
    with pytest.raises(KeyboardInterrupt):
        if suffix == ".pth":
            write_pickle(path, TensorFiles.of(tensors()))
        else:
            write_safetensors(path, TensorFiles.of(tensors()), {})
    assert path.stat().st_size > 400  # something is there
    with pytest.raises(ValueError, match="was cut off or damaged|is larger than its record"):
        TensorFiles([path])


def test_a_tensor_that_is_not_what_was_said_of_it(tmp_path):
    for wrong in (torch.zeros(3), torch.zeros(5), torch.zeros(4).double()):
        files = TensorFiles.of({"a": torch.zeros(4)})
        files._where["a"] = lambda wrong=wrong, once=False: wrong
        with pytest.raises(ValueError, match="a is not of the size and dtype that were planned for it"):
            write_safetensors(tmp_path / "x", files, {})


def test_a_file_that_has_become_shorter_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    files = TensorFiles([path])
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"x\.safetensors has become shorter while it was read: it ends at"):
        files.read_once("a")
    path.unlink()
    with pytest.raises(OSError, match=r"x\.safetensors cannot be read: No such file"):
        files.read_once("a")


@FORMS
def test_negated_tensors_are_refused(tmp_path, form):
    """Of these the bytes do not say what they are."""
    torch.save({"a": torch._neg_view(torch.ones(2))}, tmp_path / "x.pth", _use_new_zipfile_serialization=form)
    with pytest.raises(ValueError, match="a tensor in it is stored negated or conjugated"):
        TensorFiles([tmp_path / "x.pth"])
