"""Adapters train on a base whose blocks come one at a time: the gradients are those of a base that is there.

Where a weight waits it holds nonsense here, as if a device could not look at it; copies come as late as they
may. What computes with a weight that is not there, forward or back, gives a wrong gradient.
"""

import shutil
import subprocess
import sys

import pytest
import torch

import joyedit
from joyedit.lora import Adapters
from joyedit.memory import BlockStreaming, blocks_of, stream_blocks, visit
from joyedit.memory.streaming import Passing, TwoBuffers, tensors_of
from joyedit.training import loop
from joyedit.training.models import quantised
from tests.test_memory import ROOT, FixedRoom, Recorded
from tests.training.test_training import circle, settings


class Elsewhere(Recorded):
    """What waits is somewhere else than where it seems to be."""

    def __init__(self):
        super().__init__()
        self.real = {}

    def start(self, target, source, after):
        return super().start(target, self.real.get(source.data_ptr(), source), after)


class Spoilt(TwoBuffers):
    def __init__(self, blocks, room):
        super().__init__(blocks, torch.device("cpu"), room, Elsewhere())
        self.pack(torch.empty(sum(self.rows), dtype=torch.uint8))
        for homes in self.homes:
            for tensor, home in homes.items():
                homes[tensor] = tensor.data = torch.full_like(
                    home, 113 if home.dtype == torch.int8 else torch.nan
                )
                self.transfers.real[tensor.data_ptr()] = home


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(network, seed):
    """Two samples, and timesteps."""
    config, times = network.config, torch.tensor([501.0, 20.0])
    if hasattr(config, "context_dim"):
        return drawn(2, 4, 8, 8, seed=seed), times, drawn(2, 5, config.context_dim, seed=seed + 1)
    if not hasattr(config, "image_dim"):
        return drawn(2, 2, 16, 1, 4, 6, seed=seed), times, drawn(2, 5, config.text_dim, seed=seed + 1)
    latents = drawn(2, config.in_channels, 2, 4, 6, seed=seed)
    image = drawn(2, 3, config.image_dim, seed=seed + 2) if config.image_dim else None
    return latents, times, drawn(2, 7, config.text_dim, seed=seed + 1), image


def trained(model, targets, base):
    """A denoiser with an adapter whose factors are something."""
    pipe = joyedit.load(model, device="cpu", dtype="float32")
    name = "unet" if model == "tiny-diffedit" else "transformer"
    network = pipe.components[name] if base == "fp32" else quantised(pipe.components[name])
    network.enable_gradient_checkpointing()
    made = Adapters({name: network}).add_lora(3, targets=targets)
    for number, factor in enumerate(made.values()):
        factor.data = 0.2 * drawn(*factor.shape, seed=number)
    return network, made


def steps(network, made):
    """The gradients of three steps; before the last, a look without gradients."""
    found = []
    for step in range(3):
        if step == 2:
            with torch.no_grad():
                network(*inputs(network, 9))
        out = network(*inputs(network, step))[0]
        (out.sin() * torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()).sum().backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad for p in made.values()])
        for p in made.values():
            p.grad = None
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "targets", "base", "share"),
    [
        ("tiny-joyimage", "attention", "int8", 0.5),
        ("tiny-joyimage", "all", "fp32", 0),
        ("tiny-chronoedit", "attention", "fp32", 0),
        ("tiny-chronoedit", "attention", "fp32", 0.5),
        ("tiny-chronoedit", "all", "int8", 2),
        ("tiny-diffedit", "attention", "fp32", 0.5),
        ("tiny-diffedit", "all", "fp32", 0),
        ("tiny-diffedit", "all", "fp32", 2),
    ],
)
def test_gradients_are_those_of_a_network_that_is_all_there(model, targets, base, share, monkeypatch):
    wanted = steps(*trained(model, targets, base))
    network, made = trained(model, targets, base)
    nbytes = sum(tensor.nbytes for tensor in tensors_of(network))
    monkeypatch.setattr("joyedit.memory.streaming.MappedPages", Spoilt)
    stream_blocks([network], torch.device("cpu"), FixedRoom(int(share * nbytes)))
    with visit(network, None):
        found = steps(network, made)
        stay = len(BlockStreaming.of(network).passing.staying)
    assert {0: stay == 0, 0.5: 0 < stay < len(blocks_of(network)), 2: stay == len(blocks_of(network))}[share]
    for one, other in zip(found, wanted, strict=True):
        assert sum(bool(grad.any()) for grad in other) > 0.8 * len(
            made
        )  # the last block has words for nobody
        assert all(map(torch.equal, one, other))


RUN = """
import sys, threading, torch
from joyedit import JoyImageEditTransformer3DModel
from joyedit.lora import Adapters
from joyedit.memory import BlockStreaming, room_on, stream_blocks, visit
from joyedit.memory.budget import resident_bytes

def adapted(network):
    network.enable_gradient_checkpointing()
    made = Adapters({"transformer": network}).add_lora(2)
    torch.manual_seed(0)
    for p in made.values():
        p.data.normal_(std=0.1)
    return made

folder, budget = sys.argv[1], int(sys.argv[2])
small = JoyImageEditTransformer3DModel.from_config(  # brings what libraries take
    hidden_size=64, num_attention_heads=2, num_layers=2, text_dim=64, rope_dim_list=[8, 12, 12]
)
network = JoyImageEditTransformer3DModel.from_pretrained(folder)
torch.manual_seed(1)
given = torch.randn(1, 2, 16, 1, 8, 8), torch.tensor([500.0]), torch.randn(1, 8, 64)
peak, over = 0, threading.Event()
def sample():
    global peak
    while not over.wait(0.002):
        peak = max(peak, resident_bytes())
adapted(small)
small(*given)[0].sum().backward()
made, stays = adapted(network), []
if budget:
    stream_blocks([network], torch.device("cpu"), room_on(torch.device("cpu"), budget))
start = resident_bytes()
thread = threading.Thread(target=sample)
thread.start()
with visit(network, None):
    for step in range(3):
        network(*given)[0].square().sum().backward()
        if budget:
            stays.append(len(BlockStreaming.of(network).passing.staying))
over.set()
thread.join()
total = sum(p.grad.double().abs().sum() for p in made.values() if p.grad is not None)
print(start, peak, max(stays, default=0), total.item().hex())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_training_stays_within_the_budget(tmp_path):
    """Nine blocks of 25 MB, forward and back, with room for some."""
    network = joyedit.JoyImageEditTransformer3DModel.from_config(
        hidden_size=512, num_attention_heads=4, num_layers=9, text_dim=64
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(parameter.numel()))
    network.save_pretrained(tmp_path)
    block = sum(p.nbytes for p in network.double_blocks[0].parameters())

    def run(budget):
        words = [sys.executable, "-c", RUN, str(tmp_path), str(budget)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
        start, peak, stays, total = done.stdout.split()
        return int(start), int(peak), int(stays), total

    start, whole, _, wanted = run(0)
    assert whole - start > 8 * block
    budget = start + 6 * block
    _, peak, stays, total = run(budget)
    assert total == wanted and peak <= budget and 1 <= stays <= 4, (stays, peak - budget)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
def test_a_run_within_a_budget_is_the_run_without(tmp_path, monkeypatch):
    """The adapter and the pictures, bit by bit; blocks came and went."""
    monkeypatch.setattr(loop, "SAMPLED", 1)
    for name, color in (("target", "blue"), ("control", "red")):
        circle(color, (96, 96), (9, 9)).save(folder(tmp_path / "set" / name) / "0.png")
    (tmp_path / "set" / "target" / "0.txt").write_text("Make the red circle blue.")
    made, passed = [], []
    enter = Passing.enter
    monkeypatch.setattr(Passing, "enter", lambda self, i, load: (passed.append(i), enter(self, i, load)))
    for place, memory in (("without", None), ("within", "64G")):
        out = tmp_path / place
        shutil.copytree(tmp_path / "without" / "cache", out / "cache") if memory else None
        given = settings(
            tmp_path / "set", steps=2, batch=1, base="int8", memory=memory, sample_every=2, valid_every=0
        )
        made.append(loop.train(given, out, disable_progress=True).read_bytes())
        made.append((out / "samples" / "000002.png").read_bytes())
        assert bool(passed) == (memory is not None)
    assert made[:2] == made[2:]


def folder(place):
    place.mkdir(parents=True)
    return place
