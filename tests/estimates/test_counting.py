"""What is counted on tensors without memory: against sums by hand, closed forms, and PyTorch's own record of
allocations in real runs."""

import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry

import joyedit
from joyedit import ops
from joyedit.checkpoints.network import build_on_meta
from joyedit.estimates import shapes
from joyedit.estimates.counting import ATTENTION, OTHER, PRODUCT, Counted, Tally, storage
from joyedit.estimates.machines import Machine, seconds_of
from joyedit.estimates.repeats import Repeats
from joyedit.memory import blocks_of, tensors_of
from joyedit.models.chronoedit_dit import Block, ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import DoubleStreamBlock


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_a_chain_by_hand():
    weight = meta(50, 100)
    with torch.no_grad(), Counted([weight]) as counted:
        x = meta(10, 100)  # 4000 bytes
        y = x * 2  # and 4000
        y = y.view(20, 50).t()  # no memory
        del x
        z = torch.nn.functional.linear(y.t().reshape(10, 100), weight)  # and 2000
        z = z + 1  # 2000 more, before the first goes
    assert counted.tally.peak == 4000 + 4000
    assert counted.tally.operations == 2 * 10 * 100 * 50
    assert counted.tally.bytes == 2 * 4000 + (4000 + 20_000 + 2000) + 2 * 2000
    assert len(counted.tally.read) == 1
    counted.forget()
    assert counted.live == 4000 + 2000


MB = 2**20


def test_what_is_freed_in_small_pieces_is_kept_and_weights_count_when_they_are_read():
    first, second, elsewhere = meta(3 * MB), meta(5 * MB), meta(7 * MB)
    with torch.no_grad(), Counted([first, second, elsewhere], mapped=[first, second]) as counted:
        counted.block = 11
        x = first + 1  # 12 MB, and 12 of weights
        x = meta(5 * MB)
        x += second  # 20, and 32 of weights; there was a moment with 32
        del x
        y = meta(10 * MB)  # 40 in one piece, beside 32 that are kept
        y = None
        elsewhere * 2  # 28 of what is kept
    tally = counted.tally
    assert y is None and tally.peak == 40 * MB and tally.passing == (32 + 40) * MB + 11
    assert tally.reading == (32 + 32 + 40) * MB


def test_a_convolution_copies_what_has_no_channels_last():
    x, out = meta(1, 96, 50, 40), meta(1, 3, 50, 40)
    assert shapes.convolved(x, out) == 4 * 96 * 2000
    assert shapes.convolved(out, meta(1, 8, 50, 40)) == 4 * 16 * 2000
    assert shapes.convolved(x.contiguous(memory_format=torch.channels_last), out) == 0


CONVOLUTION = """
import torch
from pathlib import Path
from joyedit.memory.budget import resident_bytes
layer = torch.nn.Conv2d(64, 48, 3, padding=1).requires_grad_(False)
x = torch.ones(1, 64, 512, 512)
layer(x[..., :8, :8].contiguous())
Path("/proc/self/clear_refs").write_text("5")
before = resident_bytes()
out = layer(x)
print(resident_bytes("VmHWM") - before - out.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_convolution_takes_beside_its_result():
    done = subprocess.run([sys.executable, "-c", CONVOLUTION], capture_output=True, text=True, check=True)
    wanted = shapes.convolved(meta(1, 64, 512, 512), meta(1, 48, 512, 512))
    assert int(done.stdout) == pytest.approx(wanted, rel=0.15)


def test_attention_is_one_operation():
    q, k = meta(1, 70, 3, 8), meta(1, 110, 3, 8)
    with Counted() as counted:
        ops.attention(q, k, k)
    assert counted.tally.operations == 2 * 2 * 70 * 110 * 3 * 8
    assert counted.tally.peak < 3 * 70 * 110 * 4, "the scores were stored"


def test_a_block_does_what_the_formula_says():
    width, hidden, image, text = 64, 160, 30, 7
    with torch.device("meta"):
        block = DoubleStreamBlock(width, 4, hidden)
    rope = meta(image, 8), meta(image, 8)
    with torch.no_grad(), Counted(tensors_of(block)) as counted:
        block(meta(1, image, width), meta(1, text, width), meta(1, 6, width), rope)
    tokens = image + text
    products = 2 * tokens * (4 * width * width + 2 * width * hidden)
    attention = 4 * tokens * tokens * width
    done = {kind: sum(o * n for (k, o, _), n in counted.tally.calls.items() if k == kind) for kind in kinds()}
    assert done == {PRODUCT: products, ATTENTION: attention, OTHER: 0}
    assert counted.tally.operations == products + attention
    assert len(counted.tally.read) == len(tensors_of(block))


def kinds():
    return PRODUCT, ATTENTION, OTHER


def decode(network, device):
    network.decode(torch.zeros(1, 16, 1, 16, 24, device=device))


def decode_film(network, device):
    network.decode(torch.zeros(1, 16, 2, 8, 12, device=device))


def encode(network, device):
    network.encode(torch.zeros(1, 3, 5, 32, 48, device=device))


def denoise(network, device):
    tokens = network.embed_image(torch.zeros(1, 1, 16, 1, 32, 32, device=device))
    vec = network.embed_time(torch.zeros(2, device=device))
    texts = [network.embed_text(torch.zeros(1, n, network.config.text_dim, device=device)) for n in (40, 9)]
    grid = (2, 16, 16)
    network.predict_branches(tokens, tokens, texts, vec[0], network.rope(grid, device), grid)


def predict(network, device):
    time = network.embed_time(torch.zeros(2, device=device))[0]
    context = network.embed_context(torch.zeros(2, 77, network.config.context_dim, device=device))
    network.predict(torch.zeros(1, 4, 16, 16, device=device), time, context, 2)


RUNS = {
    "decode": ("tiny-joyimage", "vae", decode),
    "decode a film": ("tiny-joyimage", "vae", decode_film),
    "encode a film": ("tiny-chronoedit", "vae", encode),
    "MMDiT": ("tiny-joyimage", "transformer", denoise),
    "UNet": ("tiny-diffedit", "unet", predict),
}


@pytest.fixture(scope="module")
def network():
    """A network of a built-in checkpoint by the name of a run."""
    pipes = {}

    def load(run):
        name, part, _ = RUNS[run]
        if name not in pipes:
            pipes[name] = joyedit.load(name, device="cpu", reference_quirks=False)
        return pipes[name].components[part]

    return load


# In fp32 PyTorch computes convolutions as small as most of these from copies of their patches, and in bf16 a
# CPU without units for it computes in fp32.
needs_bf16 = pytest.mark.skipif(not ops.CPU_HAS_BF16, reason="a CPU without bf16")
CASES = [("decode", torch.float32), ("MMDiT", torch.float32)]
CASES += [
    pytest.param(run, torch.bfloat16, marks=[needs_bf16, *([] if run == "MMDiT" else [pytest.mark.slow])])
    for run in RUNS
]


@pytest.mark.parametrize(("run", "dtype"), CASES)
def test_peaks_are_those_of_real_runs(run, dtype, network):
    """PyTorch's profiler sees every allocation of a real run, also those inside of operations."""
    call, real = RUNS[run][2], network(run).to(dtype)
    with ops.standing_for("cpu"), torch.no_grad():
        empty = build_on_meta(type(real), real.config).to(dtype)
        counted = Counted(tensors_of(empty))
        with counted:
            call(empty, "meta")
    assert counted.tally.peak == pytest.approx(allocated_by(lambda: call(real, "cpu")), rel=0.04)


def allocated_by(function):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    total = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", RUNS)
def test_shapes_are_pytorchs(run, kind, network, monkeypatch):
    """Every operation of the networks: dtype and shape of what is returned are those of PyTorch's own meta
    functions, and multiplications those of its own table."""
    seen, answer = set(), shapes.result

    def both(func, args, kwargs):
        ours = answer(func, args, kwargs)
        if not func._schema.is_mutable and func.overloadpacket is not torch.ops.aten._reshape_alias:
            theirs = func(*args, **kwargs)
            seen.add(func)
            first = [x[0] if isinstance(x, (tuple, list)) else x for x in (ours, theirs)]
            formula = flop_registry.get(func.overloadpacket)
            wanted = 0 if formula is None else formula(*args, **kwargs, out_val=theirs)
            assert shapes.multiplied(func, args, ours) == wanted, func
            if isinstance(first[0], torch.Tensor):
                assert first[0].shape == first[1].shape and first[0].dtype == first[1].dtype, func
        return ours

    monkeypatch.setattr("joyedit.estimates.counting.result", both)
    real = network(run)
    with ops.standing_for(kind), torch.no_grad():
        empty = build_on_meta(type(real), real.config).to(torch.float32 if kind == "cpu" else torch.bfloat16)
        with Counted(tensors_of(empty)):
            RUNS[run][2](empty, "meta")
    assert len(seen) > 8


def test_blocks_that_are_alike_are_run_once(monkeypatch):
    config = ChronoEditTransformer3DModel.Config(
        num_attention_heads=2,
        attention_head_dim=8,
        text_dim=12,
        ffn_dim=20,
        num_layers=5,
        image_dim=10,
        added_kv_proj_dim=16,
    )
    calls, forward = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *args: calls.append(self) or forward(self, *args))

    def run(once):
        network = build_on_meta(ChronoEditTransformer3DModel, config).requires_grad_(False)
        counted = Counted(tensors_of(network))
        if once:
            Repeats(counted).watch(blocks_of(network))
        with torch.no_grad(), counted:
            x = meta(1, 36, 2, 4, 6)
            texts = [network.embed_text(meta(1, 9, 12)) for _ in range(2)]
            image = network.embed_image(meta(1, 4, 10))
            rope = network.rope(network.token_grid(x), "meta")
            network.predict_branches(x, network.embed_time(meta(3))[0], texts, image, rope)
        tally = counted.tally
        read = {name for name, p in network.named_parameters() if storage(p) in tally.read}
        return tally.peak, tally.bytes, tally.operations, tally.calls, read

    wanted = run(once=False)
    assert len(calls) == 10
    assert run(once=True) == wanted
    assert len(calls) == 11


def test_what_repeated_blocks_keep_adds_up():
    """Each takes 4000 bytes on the way and keeps 2000 of them: the last one finds what all before it keep."""
    blocks = [torch.nn.Linear(10, 50, bias=False, device="meta") for _ in range(4)]
    for block in blocks:
        block.forward = lambda x: (x.new_empty(10, 100), x.new_empty(10, 50))[1]
    counted = Counted(weight for block in blocks for weight in block.parameters())
    Repeats(counted).watch(blocks)
    with counted:
        x = meta(1)
        kept = [block(x) for block in blocks]
    assert len({storage(each) for each in kept}) == 4
    assert counted.tally.peak == 4 + 3 * 2000 + 6000


def test_seconds_by_hand():
    machine = Machine(bandwidth=1e12, matrix=1e14, vector=1e13)
    tally = Tally()
    for _ in range(2):
        tally.note(PRODUCT, 72 * 10**12, 10**9)  # 1 s of products
    tally.note(PRODUCT, 10**6, 8 * 10**11)  # which reads for 1 s
    tally.note(ATTENTION, 57 * 10**12, 0)
    tally.note(OTHER, 0, 4 * 10**11)
    assert seconds_of(tally.calls, machine) == pytest.approx(2 + 1 + 1 + 0.5)
    assert tally.operations == 2 * 72 * 10**12 + 10**6 + 57 * 10**12
