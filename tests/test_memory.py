"""Memory budgets: what comes when, what stays, and that results are those of networks that are all there."""

import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import joyedit
from benchmarks.quantised import in_form
from joyedit.checkpoints.sizes import parse_size
from joyedit.checkpoints.tensor_files import TensorFiles, save_tensors
from joyedit.memory import BlockStreaming, stream_blocks
from joyedit.memory.pages import PAGE, own_pages
from joyedit.memory.streaming import Passing, Transfers, TwoBuffers, blocks_of, tensors_of
from joyedit.quantised import quantised_weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (5, 5),
        ("7", 7),
        ("12G", 12 * 1024**3),
        ("12GB", 12 * 10**9),
        ("1.5g", 3 * 2**29),
        (" 300 MB ", 300 * 10**6),
        ("2T", 2**41),
        ("1024B", 1024),
        (1e9, 10**9),
    ],
)
def test_sizes(said, meant):
    assert parse_size(said) == meant


@pytest.mark.parametrize(
    "said", [0, -1, "0", "-3G", "12X", "G", "", "12 G B", 1.5, True, None, [1], "1.5B", "nan"]
)
def test_sizes_that_are_none(said):
    with pytest.raises(ValueError, match="^memory="):
        parse_size(said)


class Recorded(Transfers):
    """A stream that does its copies as late as it may: when somebody waits for them. What is read too early,
    or written over too early, is then wrong."""

    def __init__(self):
        self.log, self.open, self.count = [], {}, 0

    def start(self, target, source, after):
        self.count += 1
        self.open[self.count] = (target, source)
        self.log.append(("copy", target.data_ptr(), target.nbytes))
        return self.count

    def wait(self, mark):
        for number in sorted(n for n in self.open if n <= mark):  # in the order in which they were launched
            target, source = self.open.pop(number)
            target.copy_(source)
        self.log.append(("wait", mark))


class Block(nn.Linear):
    def __init__(self, number, log):
        super().__init__(16, 16)
        self.number, self.log = number, log

    def forward(self, x):
        self.log.append(("compute", self.number))
        return super().forward(x)


class Steps(nn.Module):
    """Blocks one after the other, each for all branches."""

    def __init__(self, log, number=5):
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, log) for i in range(number))

    def forward(self, *branches):
        for block in self.blocks:
            branches = [block(x) for x in branches]
        return branches

    @staticmethod
    def stays_behind(name):
        return False


def test_copies_run_ahead_of_what_computes():
    transfers = Recorded()
    network = Steps(transfers.log).requires_grad_(False)
    x, y = torch.randn(3, 16), torch.randn(2, 16)
    wanted = [network(x, y), network(x, y)]
    transfers.log.clear()
    streaming = BlockStreaming(network, torch.device("cpu"), transfers=transfers)
    passing = streaming.passing
    passing.pack(torch.empty(sum(passing.rows), dtype=torch.uint8))
    found = [network(x, y), network(x, y)]
    for a, b in zip(wanted, found, strict=True):
        assert all(map(torch.equal, a, b))
    copies = [entry for entry in transfers.log if entry[0] == "copy"]
    assert len({place for _, place, _ in copies}) == 2  # buffers
    assert {nbytes for *_, nbytes in copies} == {passing.rows[0]}  # whole blocks, in one piece
    assert len(copies) == 2 * 5 + 1  # each once a pass for both branches, and the first of a third pass
    started = computed = 0
    for kind, *_ in transfers.log:
        started, computed = started + (kind == "copy"), computed + (kind == "compute")
        if kind == "compute":
            blocks_before = (computed - 1) // 2
            assert started == blocks_before + 2, "of the next block the copy is under way, of no other"
    assert transfers.open, "the first block, again"
    streaming.end()
    assert not transfers.open, "what was on its way is waited for before its buffer is given up"
    assert not passing.here and not passing.buffers


class FixedRoom:
    """So many bytes are left, whatever is held."""

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def begin(self):
        pass

    def left(self):
        return self.nbytes


class Noted(Passing):
    """Moves nothing."""

    bring = settle = fetch = leave = lambda self, i: None


def test_blocks_stay_as_long_as_they_work_on_no_more_than_was_measured():
    """A vision tower and a decoder, whose keys and values grow by a token at a time, as in an answer."""
    passing, stay = Noted([nn.Linear(16, 16) for _ in range(4)], FixedRoom(3 * 1088)), []
    passing.enter(0, 5)
    passing.enter(1, 5)
    for loads in ((100, 100), (60, 60), (61, 61), (101, 61), (70, 102), (101, 102)):
        for i, load in zip((2, 3), loads, strict=True):
            passing.enter(i, load)
        stay.append(sorted(passing.staying))
    assert stay == [[], [2, 3], [2, 3], [], [], [2, 3]]


SYSTEMS = ("tiny-joyimage", "tiny-diffedit", "tiny-chronoedit")
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=SYSTEMS)
def pipe(request):
    made = joyedit.load(request.param, device="cpu", dtype="float32")
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe):
    """Three steps; the latents."""
    steps = {
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "guidance_scale": 2.0,
    }
    if "transformer" not in pipe.parts:
        return pipe.edit(PHOTO, "a red circle", "a blue circle", num_maps_per_mask=1, **steps).images
    size = {} if "processor" in pipe.parts else {"height": 64, "width": 64}
    return pipe(image=PHOTO, prompt="Make the red circle blue.", **size, **steps)[0]


@pytest.mark.parametrize(
    ("place", "share"),
    [
        ("in files", 0.5),
        ("in files", 2),
        ("in buffers", 0),
        pytest.param("in files", 0, marks=pytest.mark.slow),
        pytest.param("in buffers", 0.5, marks=pytest.mark.slow),
        pytest.param("in buffers", 2, marks=pytest.mark.slow),
    ],
)
def test_results_are_those_of_networks_that_are_all_there(pipe, place, share, monkeypatch):
    wanted = call(pipe)
    before = {name: n.state_dict() for name, n in pipe.networks.items()}
    nbytes = sum(t.nbytes for t in tensors_of(pipe.denoiser))
    most = []
    room = FixedRoom(int(share * nbytes))
    let_go = Passing.let_go
    monkeypatch.setattr(Passing, "let_go", lambda self: (most.append(len(self.staying)), let_go(self)))
    monkeypatch.setattr(
        TwoBuffers, "let_go", lambda self: (most.append(len(self.staying)), kept_let_go(self))
    )
    if place == "in buffers":
        monkeypatch.setattr("joyedit.memory.streaming.MappedPages", Buffered)
    try:
        stream_blocks(pipe.networks.values(), torch.device("cpu"), room)
        found = [call(pipe), call(pipe)]
    finally:
        pipe.set_memory(None)
    assert all(torch.equal(one, wanted) for one in found)
    blocks = len(blocks_of(pipe.denoiser))
    assert {0: max(most) == 0, 0.5: 0 < max(most), 2: max(most) == blocks}[share]
    for name, network in pipe.networks.items():
        assert all(torch.equal(t, before[name][key]) for key, t in network.state_dict().items())


@pytest.mark.parametrize("place", ["in files", "in buffers"])
@pytest.mark.parametrize("form", [pytest.param("fp8", marks=pytest.mark.slow), "int8_convrot"])
def test_quantised_weights_come_as_they_are_stored(form, place, monkeypatch):
    plain = joyedit.load("tiny-joyimage", device="cpu", dtype="float32")
    parts = {name: in_form(plain.components[name], form) for name in ("transformer", "text_encoder")}
    pipe = joyedit.load("tiny-joyimage", device="cpu", dtype="float32", **parts)
    pipe.set_progress_bar_config(disable=True)
    wanted, weights = call(pipe), quantised_weights(pipe.transformer)
    before = {name: weight.stored.clone() for name, weight in weights.items()}
    if place == "in buffers":
        monkeypatch.setattr("joyedit.memory.streaming.MappedPages", Buffered)
    nbytes = sum(t.nbytes for t in tensors_of(pipe.denoiser))
    stream_blocks(pipe.networks.values(), torch.device("cpu"), FixedRoom(nbytes // 2))
    assert torch.equal(call(pipe), wanted)
    pipe.set_memory(None)
    assert before and torch.equal(call(pipe), wanted)
    for name, weight in quantised_weights(pipe.transformer).items():
        assert weight.stored.dtype.itemsize == 1 and torch.equal(weight.stored, before[name])


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
def test_weights_that_were_changed_in_place_stay_changed(tmp_path):
    """Before they are streamed, and between two calls: the file has them as they were."""
    made = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
    save_tensors(tmp_path, "weights", made.state_dict())
    files = TensorFiles([tmp_path / "weights.safetensors"])
    network = Products([files[name] for name in made.state_dict()])
    x = torch.randn(2, 64)
    stream = BlockStreaming(network, torch.device("cpu"), FixedRoom(0))
    for changed in (0, 2):
        network.blocks[changed].weight.mul_(-2)
        made[changed].weight.data.mul_(-2)
        wanted = made[2](made[1](made[0](x)))
        for _ in range(2):
            stream.begin()
            assert torch.equal(network(x), wanted)
            assert torch.equal(network(x), wanted)
            stream.end()
        assert torch.equal(network.blocks[changed].weight, made[changed].weight)


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux alone")
def test_parts_that_are_called_before_any_block_are_given_back(tmp_path):
    save_tensors(tmp_path, "weights", {name: torch.randn(64, 64) for name in "ab"})
    files = TensorFiles([tmp_path / "weights.safetensors"])
    network = Products([files["a"], files["b"]], within=True)
    streaming = BlockStreaming(network, torch.device("cpu"), FixedRoom(0))
    start, end = own_pages(files["b"])
    streaming.begin()
    wanted = torch.ones(1, 64) @ files["b"].T
    assert resident(start, end) == (end - start) // PAGE > 0
    assert torch.equal(network.blocks[1].part(torch.ones(1, 64)), wanted)
    assert resident(start, end) == 0
    streaming.end()


def resident(start, end):
    """How many pages are there."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(start // PAGE * 8)
        return int((np.frombuffer(file.read((end - start) // PAGE * 8), np.uint64) >> 63).sum())


class Products(nn.Module):
    """within: each weight is in a part of its block."""

    def __init__(self, weights, within=False):
        super().__init__()
        layers = [nn.Linear(1, 1, bias=False) for _ in weights]
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)
        blocks = [nn.Sequential(OrderedDict(part=layer)) for layer in layers] if within else layers
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    @staticmethod
    def stays_behind(name):
        return False


kept_let_go = TwoBuffers.let_go


class Buffered(TwoBuffers):
    def __init__(self, blocks, room):
        super().__init__(blocks, torch.device("cpu"), room, Recorded())
        self.pack(torch.empty(sum(self.rows), dtype=torch.uint8))


RUN = """
import sys, threading, time, torch
from joyedit import JoyImageEditTransformer3DModel
from joyedit.memory import BlockStreaming, room_on, stream_blocks, visit
from joyedit.memory.budget import resident_bytes

folder, budget = sys.argv[1], int(sys.argv[2])
network = JoyImageEditTransformer3DModel.from_pretrained(folder)

@torch.no_grad()
def call():
    latents = torch.randn(1, 16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    tokens, text = network.embed_image(latents), network.embed_text(torch.ones(1, 8, 64))
    times, grid = network.embed_time(torch.tensor([500.0] * 4)), network.token_grid(latents)
    return torch.cat([
        velocity
        for time in times
        for velocity in network.predict_branches(tokens, None, [text, -text], time, network.rope(grid), grid)
    ])

peak, over = 0, threading.Event()
def sample():
    global peak
    while not over.wait(0.002):
        peak = max(peak, resident_bytes())
stays = 0
if budget:
    stream_blocks([network], torch.device("cpu"), room_on(torch.device("cpu"), budget))
start = resident_bytes()
thread = threading.Thread(target=sample)
thread.start()
with visit(network, None):
    result = call()
    stays = len(BlockStreaming.of(network).passing.staying) if budget else 0
over.set()
thread.join()
print(start, peak, stays, result.double().sum().item().hex(), result.abs().max().item())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_set_stays_within_the_budget(tmp_path):
    """Twelve blocks of 25 MB: with room for all, for some, and for no more than pass."""
    network = joyedit.JoyImageEditTransformer3DModel.from_config(
        hidden_size=512, num_attention_heads=4, num_layers=12, text_dim=64
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(parameter.numel()))
    network.save_pretrained(tmp_path)
    block = sum(p.nbytes for p in network.double_blocks[0].parameters())

    def run(budget):
        words = [sys.executable, "-c", RUN, str(tmp_path), str(budget)]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
        start, peak, stays, total, largest = done.stdout.split()
        assert float(largest) > 0.01
        return int(start), int(peak), int(stays), total

    start, whole, _, wanted = run(0)
    assert whole - start > 11 * block
    for room, least, most in ((4.5, 0, 2), (8.5, 3, 6), (40, 12, 12)):
        budget = start + int(room * block)
        _, peak, stays, total = run(budget)
        assert total == wanted and peak <= budget and least <= stays <= most, (room, stays, peak - budget)
