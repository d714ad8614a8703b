"""A disk that is full while a run saves: what was saved before is whole, and the run goes on from it."""

import errno
import shutil

import pytest
import torch

from joyedit.checkpoints import lora_writing, tensor_files
from joyedit.training import loop
from tests.training.test_training import metrics, settings


def files(place):
    """The content of a file, or of all in a folder, by name."""
    paths = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {path.relative_to(place.parent): path.read_bytes() for path in paths}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "full"), [("what is made", False), ("what is made", True), ("the state", True)]
)
def test_the_last_save_is_whole_and_the_run_goes_on(tmp_path, pairs, full, place, monkeypatch):
    """At the last of two steps, with an average; then the same command."""
    given = settings(pairs, steps=2, batch=1, full=full, ema=0.9, valid_every=0, save_every=1)
    made = loop.train(given, tmp_path / "whole", disable_progress=True)
    wanted, out = files(made), tmp_path / "cut"
    shutil.copytree(tmp_path / "whole" / "cache", out / "cache")
    module, writer = {
        ("what is made", False): (lora_writing, "write_safetensors"),
        ("what is made", True): (tensor_files, "write_safetensors"),
    }.get((place, full), (torch, "save"))
    write, before = getattr(module, writer), []

    def fill(*args):
        target = args[0] if writer == "write_safetensors" else args[1]
        there = out / made.name
        begun = there if place == "what is made" else out / "state.pt"
        if "cache" in target.parts or not begun.exists():
            return write(*args)
        before.append((files(there) if place == "what is made" else None, (out / "state.pt").read_bytes()))
        target.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, writer, fill)
        with pytest.raises(OSError, match="No space left on device: .* cannot be written"):
            loop.train(given, out, disable_progress=True)
    ((there, state),) = before
    assert there is None or files(out / made.name) == there != wanted
    assert (out / "state.pt").read_bytes() == state
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 1
    assert not list(out.rglob("*begun*")) and not list(out.rglob(".joyedit-*/made/*"))
    assert files(loop.train(given, out, disable_progress=True)) == wanted
    assert [line["step"] for line in metrics(out)] == [1, 2]
