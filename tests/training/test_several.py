"""Training in several processes: what one alone does, whichever number computes it, saves it and goes on."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import joyedit
from joyedit.training import loop, models, sharding
from joyedit.training.processes import Processes, joined
from joyedit.training.run import Run
from joyedit.training.sharding import Rows
from joyedit.training.states import Saved, cut, find_state, open_saved
from tests.training.test_training import circle, metrics, settings

SHAPES = {"five": (5, 3), "one": (1, 4), "none": (7,)}  # rows that no two or three processes share evenly


@pytest.fixture(scope="module")
def circles(tmp_path_factory):
    """Three pairs and three to validate on, one of another shape."""
    root = tmp_path_factory.mktemp("circles")
    for place in (root, root / "valid"):
        for name in ("target", "control"):
            (place / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            size = (140 if i == 2 else 96, 96)
            circle("red", size, (20 * i, 30)).save(place / "control" / f"{i}.png")
            circle("blue", size, (20 * i, 30)).save(place / "target" / f"{i}.png")
            (place / "target" / f"{i}.txt").write_text("Make the red circle blue.")
    return root


def trained(given, out):
    return loop.train(given, out, disable_progress=True)


def saved(out) -> Saved:
    return open_saved(find_state(out))


def differences(one, other):
    """The largest of the parameters (and of their average), and of the first moments, beside the largest
    gradient that there is."""
    assert one.step == other.step and one.shapes == other.shapes
    assert [bool(kept) for kept in one.kept] == [bool(kept) for kept in other.kept]
    pairs = [(one.parameters, other.parameters)] + ([(one.average, other.average)] if one.average else [])
    gaps = [cut(a[name], None) - cut(b[name], None) for a, b in pairs for name in a]
    moments = [[cut(kept["exp_avg"], None) for kept in state.kept if kept] for state in (one, other)]
    scale = max(moment.abs().max().item() for moment in moments[0])
    apart = [(a - b).abs().max().item() for a, b in zip(*moments, strict=True)]
    return max(gap.abs().max().item() for gap in gaps), max(apart) / scale


def toy(folder, until, count=1, rank=0):
    """A training of some rows in each process: what a step brings depends on the row alone."""
    torch.manual_seed(3)
    whole = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    processes = Processes(rank, count)
    rows = {name: Rows(torch.Size(shape), rank, count) for name, shape in SHAPES.items() if count > 1}
    rows.pop("none", None)  # each process has it whole
    held = {n: nn.Parameter(t[rows[n].start : rows[n].stop] if n in rows else t) for n, t in whole.items()}
    optimizer = torch.optim.AdamW(held.values(), lr=0.1)
    run = Run(folder, held, optimizer, 0.9, processes, rows)
    while run.step < until:
        for name, parameter in held.items():
            grad = torch.randn(SHAPES[name], generator=loop.generator(name, run.step))
            parameter.grad = grad[rows[name].start : rows[name].stop] if name in rows else grad
        norm = run.update(1e9 if run.step != 1 else 0.5)
        run.log(norm=norm)
    run.save()


def toy_of_this(folder, until):
    import torch.distributed as dist

    toy(folder, until, dist.get_world_size(), dist.get_rank())


def assert_readable(folder, state):
    """By PyTorch's own reader, and equal."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    read = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    load(read, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(read[name], cut(state.parameters[name], None)) for name in SHAPES)


def toy_on_a_full_disk(folder, until):
    import torch.distributed as dist

    def full(state, path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(torch, "save", full)
        try:
            toy_of_this(folder, until)
        except Exception as error:
            return type(error).__name__, str(error)


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_leaves_the_last_state(tmp_path, workers):
    workers.run(toy_of_this, tmp_path, 2)
    before = {path: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    first, second = workers.run(toy_on_a_full_disk, tmp_path, 3)
    assert first is not None and second[0] == "OSError" and "No space left on device" in second[1]
    assert {path: path.read_bytes() for path in (tmp_path / "state").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "state"]


@pytest.mark.slow
def test_states_go_from_one_number_of_processes_to_another(tmp_path, workers):
    """Rows, moments, averages and the length of gradients, through both forms of files."""
    toy(tmp_path / "whole", 4)
    toy(tmp_path / "by", 1)
    for until, count in ((2, 2), (3, 3)):
        workers.run(toy_of_this, tmp_path / "by", until, count=count)
        assert not (tmp_path / "by" / "state.pt").exists()
        torch.load(tmp_path / "by" / "state" / "rest-00001.pt", weights_only=True)
        assert_readable(tmp_path / "by" / "state", saved(tmp_path / "by"))
    toy(tmp_path / "by", 4)
    assert not (tmp_path / "by" / "state").exists()
    one, other = (saved(tmp_path / name) for name in ("whole", "by"))
    parameters, moments = differences(one, other)
    assert parameters < 1e-6 and moments < 1e-6 and torch.equal(one.random, other.random)
    norms = [[line["norm"] for line in metrics(tmp_path / name)] for name in ("whole", "by")]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, full", [("tiny-joyimage", False), ("tiny-chronoedit", True), ("tiny-diffedit", True)]
)
def test_three_steps_in_two_processes_equal_those_of_one(tmp_path, circles, workers, model, full):
    """With validation on three pictures, of which one process has two; the norm of the gradient is cut."""
    options = {"full": full, "steps": 3, "batch": 2, "save_every": 3, "clip": 0.5}
    options["valid_every"] = 0 if full else 3
    given = settings(circles, model, **options, lr=1e-5 if full else 1e-4)
    made = workers.run(trained, given, tmp_path / "two")
    shutil.copytree(tmp_path / "two" / "cache", tmp_path / "one" / "cache")
    trained(given, tmp_path / "one")
    parameters, moments = differences(saved(tmp_path / "one"), saved(tmp_path / "two"))
    assert parameters < 1e-5 and moments < 3e-5  # these add up what rounding did in each of the steps
    for line, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert line == pytest.approx(other, rel=1e-4)
    pipe = joyedit.load(model if not full else made[0], device="cpu")
    if not full:
        pipe.load_lora_weights(made[1])


@pytest.mark.slow
def test_all_weights_go_on_in_another_number_of_processes(tmp_path, circles, workers):
    """One step alone, two in two processes, one in three, averaged, with pictures; the checkpoint is the
    average."""
    options = {"full": True, "batch": 6, "save_every": 1, "valid_every": 0, "ema": 0.9, "lr": 1e-5}
    trained(settings(circles, **options, steps=1), tmp_path / "by")
    shutil.copytree(tmp_path / "by", tmp_path / "one")
    options["sample_every"] = 2
    workers.run(trained, settings(circles, **options, steps=3), tmp_path / "by")
    (made, *_) = workers.run(trained, settings(circles, **options, steps=4), tmp_path / "by", count=3)
    trained(settings(circles, **{**options, "sample_every": 0}, steps=4), tmp_path / "one")
    one, other = (saved(tmp_path / name) for name in ("one", "by"))
    parameters, moments = differences(one, other)
    assert parameters < 1e-5 and moments < 1e-5
    pipe = joyedit.load(made, device="cpu")
    for name, tensor in pipe.transformer.state_dict().items():
        mean = cut(other.average[f"transformer.{name}"], None)
        assert torch.equal(tensor, mean.to(tensor.dtype))
    assert (tmp_path / "by" / "samples" / "000004.png").is_file()


def trained_in_bf16(given, out):
    """And the dtypes in which a block, and a norm in it, compute."""
    from joyedit.models.chronoedit_dit import Block, GatedResidualNorm

    seen, block, norm = set(), Block.forward, GatedResidualNorm.forward

    def block_forward(self, *args):
        seen.update({("ffn", self.ffn.net[2].weight.dtype), ("table", self.scale_shift_table.dtype)})
        return block(self, *args)

    def norm_forward(self, *args):
        seen.add(("norm", self.weight.dtype))
        return norm(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "computed_in", lambda *_: torch.bfloat16)
        patch.setattr(Block, "forward", block_forward)
        patch.setattr(GatedResidualNorm, "forward", norm_forward)
        trained(given, out)
    return seen


@pytest.mark.slow
def test_bf16_with_masters_in_fp32(tmp_path, circles, workers):
    """What shall stay in fp32 does; the loss is that of fp32 within what bf16 resolves."""
    options = {"full": True, "steps": 1, "batch": 2, "save_every": 1, "valid_every": 0, "lr": 1e-5}
    given = settings(circles, "tiny-chronoedit", **options)
    seen = workers.run(trained_in_bf16, given, tmp_path / "two")[0]
    assert seen == {("ffn", torch.bfloat16), ("norm", torch.float32), ("table", torch.float32)}
    shutil.copytree(tmp_path / "two" / "cache", tmp_path / "one" / "cache")
    trained(given, tmp_path / "one")
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    state = saved(tmp_path / "two")
    assert all(piece.dtype == torch.float32 for pieces in state.parameters.values() for _, piece in pieces)
    joyedit.load(tmp_path / "two" / "checkpoint", device="cpu")


def trained_with_kinds(given, out):
    """And the dtypes that the base is held in."""
    kinds, plain = set(), models.fill

    def fill(network, device):
        plain(network, device)
        kinds.update((p.dtype, len(sharding.local(p)) < len(p)) for p in network.parameters() if len(p) > 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "fill", fill)
        trained(given, out)
    return kinds


@pytest.mark.slow
def test_an_int8_base_is_divided_as_it_is(tmp_path, circles, workers):
    """In eight bits, its scales in fp32 and the rest in bf16. One process takes one sample after the other,
    since bf16 rounds otherwise in another batch."""
    options = {"base": "int8", "steps": 1, "batch": 2, "save_every": 1, "valid_every": 0, "lr": 1e-4}
    kinds = workers.run(trained_with_kinds, settings(circles, **options), tmp_path / "two")[0]
    assert kinds == {(kind, True) for kind in (torch.int8, torch.bfloat16, torch.float32)}
    shutil.copytree(tmp_path / "two" / "cache", tmp_path / "one" / "cache")
    trained(settings(circles, **options, accumulate=2), tmp_path / "one")
    parameters, moments = differences(saved(tmp_path / "one"), saved(tmp_path / "two"))
    assert parameters < 1e-5 and moments < 1e-5


ONE_IS_STOPPED = """
import os, signal, sys
from joyedit.training import run
from joyedit.command.cli import main

plain = run.Run.update

def update(self, clip):
    norm = plain(self, clip)
    if self.step == 2 and self.processes.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return norm

run.Run.update = update
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_torchrun_and_a_signal_for_one_process(tmp_path, circles):
    """One of two is told to end after two steps: both have saved these, and one process goes on."""
    (tmp_path / "stopped.py").write_text(ONE_IS_STOPPED)
    words = ["train", circles, "--model", "tiny-joyimage", "--device", "cpu", "--batch", "2", "--rank", "4"]
    words += ["--lr", "1e-4", "--steps", "3", "--sample-every", "0", "--valid-every", "0"]
    words += ["--out", tmp_path / "two"]
    script = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", tmp_path / "stopped.py"]
    root = str(Path(joyedit.__file__).parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    done = subprocess.run(
        list(map(str, script + words)), env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode != 0 and done.stderr.count("stopped after 2 steps") == 1, done.stderr
    assert saved(tmp_path / "two").step == 2 and len(metrics(tmp_path / "two")) == 2
    given = settings(circles, steps=3, lr=1e-4, valid_every=0, save_every=250)
    trained(given, tmp_path / "two")
    shutil.copytree(tmp_path / "two" / "cache", tmp_path / "one" / "cache")
    trained(given, tmp_path / "one")
    parameters, moments = differences(saved(tmp_path / "one"), saved(tmp_path / "two"))
    assert parameters < 1e-5 and moments < 1e-5


def failing(port):
    """What each process says when the second one fails."""
    import torch.distributed as dist

    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with joined(torch.device("cpu")) as processes:
            if processes.rank == 1:
                raise ValueError("what is wrong")
            processes.wait()
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.slow
def test_one_that_fails_ends_all_and_says_why(workers):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    first, second = workers.run(failing, port)
    assert second == ("ValueError", "what is wrong") and first[0] == "FailedElsewhere"


def test_batches_that_processes_cannot_share():
    several = Processes(1, 2)
    for changes, said in (
        ({"batch": 3}, "batch=3: must be a multiple of the 2 processes"),
        ({"batch": 6, "accumulate": 2}, "times accumulate=2"),
        ({"batch": 2, "memory": "4G"}, "memory='4G'"),
    ):
        with pytest.raises(ValueError, match=said):
            loop.check_share(settings("pairs", **changes), several)
    loop.check_share(settings("pairs", batch=4, accumulate=2), several)
    assert [list(Processes(rank, 3).share(7)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5, 6]]
    turns = [Processes(rank, 2).turns(3) for rank in range(2)]
    assert turns == [[(0, True), (2, True)], [(1, True), (2, False)]]
