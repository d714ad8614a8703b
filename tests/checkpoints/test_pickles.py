"""Pickles: what state dicts need is read in both forms, all else is refused before torch opens the file."""

import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from joyedit.checkpoints.pickles import load_pickle
from joyedit.checkpoints.tensor_files import TensorFiles

ROOT = Path(__file__).resolve().parents[2]
FORMS = pytest.mark.parametrize("form", [True, False], ids=["zip", "older"])


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@FORMS
def test_state_dicts_are_read_as_they_are(tmp_path, form):
    network = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
    state = network.state_dict()  # an OrderedDict with _metadata, and one integer
    base = torch.arange(12.0)
    state |= {"transposed": base.view(3, 4).T, "part": base[4:6], "half": base.half(), "flag": base > 3}
    state["parameter"] = nn.Parameter(torch.randn(2, 3))
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=form)
    files = TensorFiles([tmp_path / "x.pt"])
    assert list(files) == list(state)
    for name, tensor in state.items():
        assert torch.equal(files[name], tensor) and files.dtypes[name] == tensor.dtype


def test_dtypes_without_a_storage_class_of_their_own(tmp_path):
    state = {"a": torch.arange(4.0).to(torch.float8_e4m3fn), "b": torch.arange(3).to(torch.uint32)}
    torch.save(state, tmp_path / "x.pt")
    files = TensorFiles([tmp_path / "x.pt"])
    assert torch.equal(files["a"].float(), torch.arange(4.0)) and files.dtypes["b"] == torch.uint32


@FORMS
def test_what_trainers_write_beside_the_tensors(tmp_path, monkeypatch, form):
    names = [
        "pytorch_lightning",
        "pytorch_lightning.callbacks",
        "pytorch_lightning.callbacks.model_checkpoint",
    ]
    with monkeypatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, type(sys)(name))
        callback = type("ModelCheckpoint", (), {"__module__": names[-1]})
        patch.setattr(sys.modules[names[-1]], "ModelCheckpoint", callback, raising=False)
        beside = {"callbacks": {callback: {"best": None, "n": 3}}, "global_step": 7, 4: 5, "bytes": b"ab"}
        value = {**beside, "state_dict": OrderedDict(a=torch.ones(2)), "size": torch.Size([1])}
        torch.save(value, tmp_path / "x.ckpt", _use_new_zipfile_serialization=form)
    files = TensorFiles([tmp_path / "x.ckpt"])
    assert torch.equal(files["a"], torch.ones(2)) and files.numbers == {"global_step": 7}


EXPANDED = torch.zeros(1).expand(10**6, 4)
REFUSED = {
    "bytearray": (Call(bytearray, 6 * 10**9), "asks for '__builtin__.bytearray'"),
    "storage": (Call(torch.FloatStorage, 2 * 10**9), "calls 'torch.FloatStorage' with other arguments"),
    "tensor": (Call(torch.Tensor, 10**5, 10**5), "asks for 'torch.Tensor'"),
    "code": (Call(print, "x"), "asks for '__builtin__.print'"),
    "expanded": (EXPANDED, r"shape \(1000000, 4\) is larger than its storage of 1 elements"),
    "sparse": (torch.eye(3).to_sparse(), "holds a sparse tensor"),
    "complex": (torch.zeros(2, dtype=torch.complex64), "holds complex numbers"),
    "quantised": (torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "a quantised tensor"),
    "meta": (torch.zeros(2, device="meta"), "a tensor without numbers"),
}


@FORMS
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_weights_need_is_refused(tmp_path, name, form):
    value, message = REFUSED[name]
    torch.save({"a": value}, tmp_path / "x.pt", _use_new_zipfile_serialization=form)
    with pytest.raises(ValueError, match=rf"x\.pt cannot be opened as weights only: .*{message}") as raised:
        TensorFiles([tmp_path / "x.pt"])
    assert "weights_only=" not in str(raised.value)


@pytest.mark.slow
def test_a_pickle_of_gigabytes_takes_none(tmp_path):
    """Two kilobytes, which torch's own reader makes six gigabytes of."""
    torch.save({"a": REFUSED["bytearray"][0]}, tmp_path / "x.pt")
    code = (
        "import sys; from joyedit.checkpoints.tensor_files import TensorFiles\n"
        "try: TensorFiles([__import__('pathlib').Path(sys.argv[1])])\n"
        "except ValueError: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert int(done.stdout) < 10**6, "kilobytes"


def rewritten(path, compression=zipfile.ZIP_STORED, **changes):
    """The archive with some records changed (name without folder -> content, None: gone)."""
    with zipfile.ZipFile(path) as old:
        records = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, content in records.items():
            content = changes.get(name.partition("/")[2].replace("/", "_").replace(".", "_"), content)
            if content is not None:
                new.writestr(name, content)


def test_archives_that_are_not_as_torch_writes_them(tmp_path):
    path = tmp_path / "x.pt"

    def refused(message, **changes):
        torch.save({"a": torch.zeros(300)}, path)
        rewritten(path, **changes)
        with pytest.raises(ValueError, match=message):
            TensorFiles([path])

    torch.save({"a": torch.zeros(300)}, path)
    rewritten(path)
    assert torch.equal(TensorFiles([path])["a"], torch.zeros(300))
    refused("its record 'x/data.pkl' is compressed", compression=zipfile.ZIP_DEFLATED)
    refused("a zip archive without data.pkl", data_pkl=None)
    refused("its storage '0' is larger than its record", data_0=b"\0" * 1199)
    refused("its storage '0' is larger than its record", data_0=None)
    refused(r"data.pkl has more than 16,777,216 bytes", data_pkl=b"\0" * (2**24 + 1))
    refused("its pickle is damaged", data_pkl=b"\x80\x02}")


def storage(numel):
    return b"".join(
        (b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0", b"0X\x03\0\0\0cpu", long(numel), b"tQ")
    )


def long(number):
    return b"\x8a\x09" + number.to_bytes(9, "little", signed=True)


def tensor(numel, offset, size, stride):
    sizes = b"".join((b"(", *map(long, size), b"t(", *map(long, stride), b"t"))
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return rebuild + storage(numel) + long(offset) + sizes + b"\x89ccollections\nOrderedDict\n)RtR"


PROGRAMS = {
    "whole": (tensor(300, 0, [300], [1]), None),
    "numel": (tensor(2**62, 0, [300], [1]), "is said to have 4611686018427387904 elements"),
    "negative": (tensor(-1, 0, [300], [1]), "is said to have -1 elements"),
    "beyond": (tensor(300, 1, [300], [1]), "is larger than its storage of 300"),
    "offset": (tensor(300, -1, [300], [1]), "wrong offset or stride"),
    "stride": (tensor(300, 0, [10], [2**40]), "is larger than its storage"),
    "size": (tensor(300, 0, [-1], [1]), "holds what is no length of an axis"),
    "axes": (tensor(300, 0, [300], [1, 1]), "wrong offset or stride"),
    "key": (b"K\x01", "holds no state dict"),
    "bytes": (b"\x8e" + b"\xff" * 8, "pickle is damaged|instruction"),
    "text": (b"X\xff\xff\xff\x7fab", "one piece of it|damaged"),
    "set": (b"\x8f", "instruction EMPTY_SET"),
    "tuple as key": (b"N" + b"s" + b"(K\x01tK\x02", "a tuple is a key"),
    "deep tuple": (b"(" + b")" + b"\x85" * 300_000 + b"t", "holds no state dict"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_followed(tmp_path, name):
    value, message = PROGRAMS[name]
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(300.0)}, path)
    rewritten(path, data_pkl=b"\x80\x02}X\x01\0\0\0a" + value + b"s.")
    if message is None:
        assert torch.equal(TensorFiles([path])["a"], torch.arange(300.0))
        return
    with pytest.raises(ValueError, match=message):
        TensorFiles([path])


def older(program, keys=b"](X\x01\0\0\x000e", data=b""):
    head = b"".join(pickle.dumps(one, 2) for one in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + b"\x80\x02" + program + b".\x80\x02" + keys + b"." + data


@pytest.mark.parametrize(
    ("program", "keys", "data", "message"),
    [
        (tensor(2**40, 0, [3], [1]), b"](X\x01\0\0\x000e", b"", "was cut off: .* its tensors need"),
        (tensor(3, 0, [3], [1]), b"](e", b"\0" * 40, "list of storages is not that of its tensors"),
        (tensor(3, 0, [3], [1]), b"K\x03", b"\0" * 40, "list of storages is none"),
        (b"N", b"](e", b"", "holds no state dict"),
    ],
)
def test_the_older_form_allocates_no_more_than_the_file_has(tmp_path, program, keys, data, message):
    path = tmp_path / "x.pt"
    path.write_bytes(older(b"}X\x01\0\0\0a" + program + b"s", keys, data))
    with pytest.raises(ValueError, match=message):
        TensorFiles([path])


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04 no zip", b"not a pickle", b"\x80\x04N."])
def test_damage_is_told_in_our_own_words(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.pt cannot be opened as weights only: it") as raised:
        load_pickle(tmp_path / "x.pt")
    assert "weights_only=" not in str(raised.value) and str(raised.value).isprintable()


def test_names_must_be_text_that_can_be_shown(tmp_path):
    for key, message in ((3, "name 3 is no text"), ("a\x1b[31m", r"a\\\\x1b\[31m' is too long or holds")):
        torch.save({key: torch.zeros(1)}, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=message):
            TensorFiles([tmp_path / "x.pt"])
