"""Replayed calls give what the calls themselves give, and are replayed only where they do.

A graph exists on a GPU alone: here tapes stand for graphs. Tests of the real ones are marked `gpu`.
"""

import contextlib
import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves

import joyedit
from joyedit import ops
from joyedit.graphs import CudaCapture, GraphedCalls, NotRecorded
from tests.tapes import Counted, memory

SYSTEMS = ("tiny-joyimage", "tiny-diffedit", "tiny-chronoedit")
THREADS = 3


class Small(nn.Module):
    """A network of one layer, whose function takes what the functions of networks take."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("offset", torch.ones(3))

    def step(self, x, context, factor=1):
        pair, named = context
        x = self.layer(x.float()) * factor + self.offset
        return [x + pair[0], {"inner": x.sin() * named[self] if named else x.cos()}]


@pytest.fixture
def graphs():
    return Counted()


@pytest.fixture
def small():
    return Small().requires_grad_(False)


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step(graphs, network, x=None, **more):
    """One step by graphs; it is what the network itself computes."""
    x = made(2, 3) if x is None else x
    context = ((made(2, 3, seed=1),), {network: made(3, seed=2)})
    with torch.no_grad():
        wanted = network.step(x, context, **more)
        found = graphs(network, network.step, x, context, **more)
    assert equal(found, wanted), "another result"
    return found


def equal(found, wanted):
    pairs = zip(tree_leaves(found), tree_leaves(wanted), strict=True)
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)


def test_a_kind_of_call_is_recorded_once_and_then_replayed(graphs, small):
    for seed in range(4):
        step(graphs, small, made(2, 3, seed=seed))
    assert graphs.numbers == (1, 3) and len(graphs) == 1


@torch.no_grad()
def test_results_are_nobody_elses_memory(graphs, small):
    results, wanted = [], []
    calls = [(made(2, 3, seed=seed), ((made(2, 3, seed=-seed),), {})) for seed in range(4)]
    for call in calls:
        wanted.append(small.step(*call))
        results.append(graphs(small, small.step, *call))
    assert equal(results, wanted)
    assert equal(calls, [(made(2, 3, seed=seed), ((made(2, 3, seed=-seed),), {})) for seed in range(4)])
    assert len({memory(tensor) for tensor in tree_leaves(results)}) == 8
    kept = {memory(t) for t in tree_leaves([graph[:2] for graph in graphs.kept.values()])}
    assert not kept & {memory(t) for t in tree_leaves(results)}


@pytest.mark.parametrize(
    "other",
    [{"x": made(1, 3)}, {"x": made(2, 3).half()}, {"factor": 2}, {"factor": 1.0}],
    ids=["batch", "dtype", "number", "kind of number"],
)
def test_other_arguments_have_a_graph_of_their_own(graphs, small, other):
    for more in ({}, other, {}, other):
        step(graphs, small, **{"factor": 1, **more})
    assert graphs.numbers == (2, 2)


def test_inputs_may_lie_in_memory_as_they_like(graphs, small):
    for x in (made(2, 3), made(3, 2).t(), made(2, 6)[:, ::2], made(1, 3).expand(2, 3)):
        step(graphs, small, x)
    assert graphs.numbers == (1, 3)


WEIGHTS = {
    "moved": lambda network: setattr(network.layer.weight, "data", network.layer.weight * 2),
    "replaced": lambda network: setattr(network.layer, "weight", nn.Parameter(made(3, 3), False)),
    "layer": lambda network: setattr(network, "layer", nn.Linear(3, 3).requires_grad_(False)),
    "buffer": lambda network: setattr(network, "offset", made(3)),
    "strides": lambda network: setattr(network.layer.weight, "data", network.layer.weight.data.t()),
}


@pytest.mark.parametrize("change", WEIGHTS)
def test_weights_elsewhere_have_a_graph_of_their_own(graphs, small, change):
    step(graphs, small)
    WEIGHTS[change](small)
    before = step(graphs, small)
    assert graphs.numbers == (2, 0)
    small.layer.weight.mul_(2)  # where they are, they may change
    assert not equal(step(graphs, small), before)
    assert graphs.numbers == (2, 1)


class Settling(Small):
    """Has its weights in another place after the first step, as an adapter that is brought to its device."""

    settled = False

    def step(self, x, context, factor=1):
        if not self.settled:
            self.layer.weight.data = self.layer.weight.clone()
            self.settled = True
        return super().step(x, context, factor)


def test_the_first_step_may_move_weights(graphs):
    network = Settling().requires_grad_(False)
    with torch.no_grad():
        for seed in range(3):
            x, context = made(2, 3, seed=seed), ((made(2, 3),), {})
            assert equal(graphs(network, network.step, x, context), network.step(x, context))
    assert graphs.numbers == (1, 2)


@pytest.mark.parametrize("enter", [lambda: ops.backend("torch"), torch.inference_mode])
def test_other_settings_have_a_graph_of_their_own(graphs, small, enter):
    for _ in range(2):
        step(graphs, small)
        with enter():
            step(graphs, small)
    assert graphs.numbers == (2, 2)


def test_the_graph_that_was_used_longest_ago_goes_first(small):
    graphs = Counted(most=2)
    for factor in (1, 2, 1, 3, 1, 2, 1):  # 3 takes the place of 2, and 2 that of 3
        step(graphs, small, factor=factor)
    assert graphs.numbers == (4, 3) and len(graphs) == 2


class Unfit(Small):
    """Asks the device for a number, for which a graph cannot wait."""

    def step(self, x, context, factor=1):
        return super().step(x, context, factor * (2 if x.sum().item() > 0 else 3))


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(graphs, caplog):
    network = Unfit().requires_grad_(False)
    for seed in range(3):
        step(graphs, network, made(2, 3, seed=seed))
    assert graphs.numbers == (0, 0) and len(graphs) == 0
    told = "Unfit runs without a graph: operation not permitted when stream is capturing"
    assert caplog.messages == [told]


def test_hooks_are_called(graphs, small, caplog):
    step(graphs, small)
    seen = []
    hook = small.layer.register_forward_hook(lambda *_: seen.append(1))
    step(graphs, small)
    step(graphs, small)
    hook.remove()
    assert len(seen) == 4 and caplog.messages == [
        "Small runs without a graph: its Linear has hooks, as streamed blocks have"
    ]
    step(graphs, small)
    assert graphs.numbers == (1, 1)


def test_nothing_is_recorded_under_autocast_with_gradients_or_on_other_devices(small, caplog):
    x, context = made(2, 3), ((made(2, 3),), {})
    graphs = Counted()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert equal(graphs(small, small.step, x, context), small.step(x, context))
    wanted = x.clone().requires_grad_()
    graphs(small, small.step, wanted, context)[0].sum().backward()
    assert wanted.grad is not None and not graphs.captures
    real = GraphedCalls()
    with torch.no_grad():
        assert equal(real(small, small.step, x, context), small.step(x, context))
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "it runs under autocast, which keeps weights in other memory",
        "it computes on cpu, and graphs need a CUDA or ROCm device",
    ]
    with pytest.raises(NotRecorded, match="CUDA or ROCm"):
        CudaCapture(torch.device("cpu"))


def test_unknown_arguments_are_not_taken_for_equal(graphs, small, caplog):
    numbers = np.ones(3)

    def add(x, numbers):
        return x + torch.from_numpy(numbers)

    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(graphs(small, add, made(2, 3), numbers), add(made(2, 3), numbers))
            numbers += 1
    assert caplog.messages == ["Small runs without a graph: a ndarray is among its arguments"]


def test_a_copy_begins_without_graphs(graphs, small):
    step(graphs, small)
    for copied in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert type(copied) is Counted and len(copied) == 0
        step(copied, small)
        step(copied, small)
        assert copied.numbers == (1, 1)
    graphs.clear()
    assert len(graphs) == 0
    step(graphs, small)
    assert graphs.numbers == (1, 0)


# Pipelines.


@pytest.fixture(scope="module")
def loaded():
    made = {name: joyedit.load(name, device="cpu", dtype="float32") for name in SYSTEMS}
    made["tiny-joyimage"].buckets = [(64, 64), (64, 96)]
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def quick(system):
    """That one, and the others in the slow lane."""
    return [system, *(pytest.param(other, marks=pytest.mark.slow) for other in SYSTEMS if other != system)]


@pytest.fixture(params=SYSTEMS)
def pipes(loaded, request):
    """A pipeline, and one of the same parts with graphs."""
    pipe = loaded[request.param]
    return pipe, with_graphs(pipe)


def with_graphs(pipe, graphs=None):
    made = type(pipe).from_pipe(pipe)
    made._graphs = graphs or Counted()
    return made


def photo(size, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def edit(pipe, seed=0, size=(64, 64), batch=1, **more):
    """Latents after a few guided steps."""
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent", **more}
    if "unet" in pipe.parts:
        latents = made(
            batch, 4, 4, size[1] // 4, size[0] // 4, seed=seed
        )  # of three levels and the photograph
        texts = {"prompt": ["a blue circle", "a red square"][:batch], "negative_prompt": "a red circle"}
        return pipe(
            mask_image=Image.new("L", size, 255),
            image_latents=latents,
            inpaint_strength=1.0,
            **texts,
            **settings,
        ).images
    shape = {} if "processor" in pipe.parts else dict(zip(("width", "height"), size, strict=True))
    photos = [photo(size, seed + i) for i in range(batch)]
    generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    texts = ["Make the red circle blue.", "Remove the circle."][:batch]  # of two lengths
    return pipe(image=photos, prompt=texts, generator=generators, **shape, **settings)[0]


@pytest.fixture
def check(pipes, caplog):
    """A function that makes one edit with both, and gives its latents and how many graphs it recorded."""

    def check(**call):
        plain = edit(pipes[0], **call)
        before = len(pipes[1]._graphs)
        found = edit(pipes[1], **call)
        assert torch.equal(found, plain), "another edit"
        assert not [record for record in caplog.records if "graph" in record.message]
        return plain, len(pipes[1]._graphs) - before

    return check


def test_edits_are_the_same_and_further_ones_are_replayed(pipes, check):
    first, recorded = check()
    second, more = check(seed=1)
    assert (recorded, more) == (1, 0) and not torch.equal(first, second)
    assert pipes[1]._graphs.numbers == (1, 5)


def test_a_whole_edit_between_captions(loaded):
    """Of two kinds of steps: the way to noise is not guided."""
    pipe = loaded["tiny-diffedit"]
    fast = with_graphs(pipe)
    found, wanted = (
        one.edit(
            photo((64, 64)),
            "a red circle",
            "a blue circle",
            num_inference_steps=4,
            inpaint_strength=0.8,
            num_maps_per_mask=1,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        )
        for one in (fast, pipe)
    )
    assert np.array_equal(found.images, wanted.images) and fast._graphs.numbers == (2, 6 - 2)


@pytest.mark.parametrize("pipes", quick("tiny-joyimage"), indirect=True)
@pytest.mark.parametrize(
    "other",
    [{"batch": 2}, pytest.param({"size": (96, 64)}, marks=pytest.mark.slow)],
    ids=["batch", "size"],
)
def test_another_batch_or_size_has_graphs_of_its_own(check, other):
    """Of JoyAI's batch, prompts of two lengths run side by side."""
    assert check()[1] and check(**other)[1] and not check()[1]


@pytest.mark.parametrize("pipes", quick("tiny-chronoedit"), indirect=True)
def test_a_callback_may_end_the_guidance_and_change_what_is_read(pipes, check):
    def change(pipe, step, timestep, tensors):
        if step == 1:
            pipe.guidance_scale = 1.0
        return {name: 0.9 * tensor for name, tensor in tensors.items()} if step == 0 else {}

    names = ["latents", "prompt_embeds"] if "transformer" in pipes[0].parts else ["latents"]
    call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    changed, recorded = check(**call)
    assert recorded == 2 and not torch.equal(changed, check()[0])


def adapter(pipe):
    """Of the first attention of each block."""
    name = "unet" if "unet" in pipe.parts else "transformer"
    generator, state = torch.Generator().manual_seed(3), {}
    for tensor, parameter in getattr(pipe, name).named_parameters():
        if tensor.endswith(("attn1.to_q.weight", "img_attn_qkv.weight")):
            wide, narrow = parameter.shape
            layer = f"{name}.{tensor.removesuffix('.weight')}"
            state[f"{layer}.lora_A.weight"] = torch.randn(2, narrow, generator=generator)
            state[f"{layer}.lora_B.weight"] = torch.randn(wide, 2, generator=generator)
    return state


@pytest.mark.parametrize("pipes", quick("tiny-diffedit"), indirect=True)
def test_adapters_may_change_between_runs_and_within_them(loaded, pipes, check):
    pipe = pipes[0]

    def weaken(mine, step, timestep, tensors):
        mine.set_adapters("style", (0.5, 0.25, 1.0)[step])
        return {}

    seen = [check()[0]]
    try:
        pipe.load_lora_weights(adapter(pipe), "style")
        seen.append(check()[0])
        seen.append(check(callback_on_step_end=weaken)[0])
        assert torch.equal(check()[0], seen[1])
        pipe.fuse_lora()
        fused, recorded = check()
        assert recorded and (fused - seen[1]).abs().max() < 1e-4
        pipe.unfuse_lora()
    finally:
        pipe.unload_lora_weights()
    assert torch.equal(check()[0], seen[0])
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.slow
@pytest.mark.parametrize("system", ["tiny-diffedit", "tiny-chronoedit"])
def test_the_scale_of_adapters_is_that_of_the_call(loaded, system):
    pipe = copy.deepcopy(loaded[system])
    pipe.load_lora_weights(adapter(pipe), "style")
    fast = with_graphs(pipe)
    argument = "cross_attention_kwargs" if "unet" in pipe.parts else "attention_kwargs"
    for scale in (1.0, 0.5, 0.0, 1.0):
        call = {argument: {"scale": scale}}
        assert torch.equal(edit(fast, **call), edit(pipe, **call))
    assert len(fast._graphs) == 3


def test_frames_that_are_dropped_on_the_way_have_a_graph_less(loaded):
    pipe = loaded["tiny-chronoedit"]
    fast = with_graphs(pipe)
    call = {"num_frames": 13, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2}
    call["num_inference_steps"] = 5  # of which the solver remembers what the network said
    wanted = edit(pipe, **call)
    assert wanted.shape[2] == 2 and torch.equal(edit(fast, **call), wanted)
    assert fast._graphs.numbers == (2, 3)


@pytest.mark.parametrize("system", quick("tiny-diffedit"))
def test_threads_share_the_graphs(loaded, system):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would not be equal to the bit
    try:
        pipe, begin = loaded[system], threading.Barrier(THREADS)
        fast = with_graphs(pipe)
        wanted = [edit(pipe, seed) for seed in range(THREADS)]

        def run(seed):
            begin.wait(timeout=60)
            return edit(fast, seed)

        with ThreadPoolExecutor(THREADS) as pool:
            assert equal(list(pool.map(run, range(THREADS))), wanted)
        assert len(fast._graphs) == 1
    finally:
        torch.set_num_threads(before)


def test_moved_weights_drop_the_graphs(loaded):
    pipe = with_graphs(copy.deepcopy(loaded["tiny-diffedit"]))
    edit(pipe)
    assert len(pipe._graphs) == 1
    assert len(pipe.to(torch.float64)._graphs) == 0
    found = edit(pipe)
    assert len(pipe._graphs) == 1 and torch.equal(found, edit(copy.deepcopy(pipe)))
    pipe.disable_graphs()
    assert torch.equal(found, edit(pipe)) and "graphs" not in repr(pipe)


def test_graphs_where_there_are_none(loaded, monkeypatch):
    pipe = copy.deepcopy(loaded["tiny-diffedit"])
    pipe.disable_graphs()
    with pytest.raises(ValueError, match="graphs need a CUDA or ROCm device, and this pipeline is on cpu"):
        pipe.enable_graphs()
    for offload in ("model", "sequential"):
        pipe.set_offload(offload, device="cpu")
        with pytest.raises(ValueError, match="enable_graphs.* does not go with offload.*disable_offload"):
            pipe.enable_graphs()
        pipe.disable_offload()
    monkeypatch.setattr(type(pipe), "device", torch.device("cuda"))
    pipe.enable_graphs()
    assert repr(pipe).split()[-3:] == ["graphs", "0", "recorded"]
    with pytest.raises(
        ValueError, match="offload='model' does not go with graphs: it moves .*disable_graphs"
    ):
        pipe.set_offload("model", device="cpu")
    pipe.set_offload("none")
    pipe.disable_graphs()
    pipe.set_offload("model", device="cpu")


# The real ones.


class Driver:
    """Stands for `torch.cuda` where `CudaCapture` uses it, and notes what is asked of it."""

    def __init__(self, monkeypatch):
        self.notes, self.current, self.graphs = [], "default", 0
        driver = self

        class Stream:
            def __init__(self, device=None, name="side"):
                self.name = name

            def wait_event(self, event):
                driver.notes.append(f"{self.name} waits for the last use")

            def wait_stream(self, other):
                driver.notes.append(f"{self.name} waits for {other.name}")

        class Event:
            def record(self, stream):
                driver.notes.append(f"last use on {stream.name}")

            def synchronize(self):
                driver.notes.append("all wait for the last use")

        class CUDAGraph:
            def __init__(self):
                driver.graphs += 1
                self.number = driver.graphs

            def pool(self):
                return f"pool of {self.number}"

            def replay(self):
                driver.notes.append(f"replay {self.number} on {driver.current}")

        @contextlib.contextmanager
        def stream(chosen):
            before, driver.current = driver.current, chosen.name
            try:
                yield
            finally:
                driver.current = before

        @contextlib.contextmanager
        def graph(graph, pool, stream, capture_error_mode):
            driver.notes.append(f"capture {graph.number} in {pool} on {stream.name}, {capture_error_mode}")
            driver.current = "lost"  # as PyTorch leaves it when a capture fails
            yield
            driver.current = stream.name

        for name, one in {
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "stream": stream,
            "graph": graph,
            "current_stream": lambda device: Stream(name=driver.current),
        }.items():
            monkeypatch.setattr(torch.cuda, name, one)

    def heard(self):
        notes, self.notes = self.notes, []
        return notes


def test_graphs_share_their_pool_and_take_turns(monkeypatch):
    driver = Driver(monkeypatch)
    capture = CudaCapture(torch.device("cuda", 0))

    def run():
        return driver.current

    with capture.in_turn():
        assert capture.warm_up(run) == "side"
        _, first = capture.capture(run)
        first()
    assert driver.current == "default" and driver.heard() == [
        "default waits for the last use",
        "side waits for default",
        "default waits for side",
        "capture 1 in None on side, thread_local",
        "replay 1 on default",
        "last use on default",
    ]

    def fail():
        raise RuntimeError("no")

    _, second = capture.capture(run)
    with pytest.raises(RuntimeError, match="no"):
        capture.capture(fail)
    assert driver.current == "default"
    _, third = capture.capture(run)  # the pool in which one failed is left
    _, fourth = capture.capture(run)
    del third, fourth
    capture.capture(run)
    capture.finish()
    pools = ["pool of 1", "pool of 1", "None", "pool of 4", "None"]
    notes = [f"capture {i} in {pool} on side, thread_local" for i, pool in enumerate(pools, 2)]
    assert driver.heard() == [*notes, "all wait for the last use"]


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return torch.device("cuda", torch.cuda.current_device())


def near(found, wanted):
    """Kernels may be chosen by where inputs begin in memory, which no bit is promised for."""
    for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
        assert (a.float() - b.float()).abs().max() <= 1e-3 * b.float().abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("system", SYSTEMS)
def test_edits_on_a_gpu(gpu, system, caplog):
    """Calls of several kinds in turn; the same on another stream; with an adapter; and of several threads."""
    pipe = joyedit.load(system, device=gpu, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    calls = [{}, {"seed": 1}, {"batch": 2}, {"seed": 2}, {"size": (96, 64)}, {"batch": 2, "seed": 3}]
    wanted = [edit(pipe, **call) for call in calls]
    pipe.enable_graphs()
    near([edit(pipe, **call) for call in calls], wanted)
    recorded = len(pipe._graphs)
    assert recorded and "runs without a graph" not in caplog.text
    with torch.cuda.stream(torch.cuda.Stream()):
        again = [edit(pipe, **call) for call in calls]
    torch.cuda.synchronize()
    near(again, wanted)
    assert len(pipe._graphs) == recorded
    pipe.load_lora_weights(adapter(pipe), "style")
    adapted = edit(pipe)
    pipe.disable_graphs()
    near(adapted, edit(pipe))
    pipe.enable_graphs()
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda seed: edit(pipe, seed), range(THREADS)))
    pipe.disable_graphs()
    near(found, [edit(pipe, seed) for seed in range(THREADS)])


@pytest.mark.gpu
def test_a_capture_that_fails_on_a_gpu_leaves_everything_usable(gpu, caplog):
    network, small = (kind().requires_grad_(False).to(gpu) for kind in (Unfit, Small))
    graphs, stream = GraphedCalls(), torch.cuda.current_stream()
    x, context = made(2, 3).to(gpu), ((made(2, 3, seed=1).to(gpu),), {})
    with torch.no_grad():
        for _ in range(3):
            near(graphs(small, small.step, x, context), small.step(x, context))
            near(graphs(network, network.step, x, context), network.step(x, context))
            assert torch.cuda.current_stream() == stream
            context = ((context[0][0] + 1,), {})
        near(graphs(small, small.step, x, context, factor=2), small.step(x, context, factor=2))
    assert len(graphs) == 2 and caplog.text.count("Unfit runs without a graph") == 1
