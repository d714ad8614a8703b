"""Calls at the same time: of one pipeline, and of several that share networks, schedulers and adapters. Each
gives what it gives alone, and none is stopped, moved or scaled with another."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from joyedit.memory import at_rest, visit
from joyedit.memory.streaming import Transfers, blocks_of

THREADS = 3
SYSTEMS = ("tiny-joyimage", "tiny-diffedit", "tiny-chronoedit")
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def call(pipe, seed, **more):
    """A call with a number of steps and a seed of its own; the latents."""
    steps = {"num_inference_steps": 4 + seed % 3, "generator": seeded(seed), "output_type": "latent", **more}
    if "transformer" not in pipe.parts:
        captions = PHOTO, "a red circle", "a blue circle"
        own = {"mask_thresholding_ratio": 3.0, "mask_encode_strength": 0.6, "inpaint_strength": 0.8}
        return pipe.edit(*captions, num_maps_per_mask=1, guidance_scale=2.0, **own, **steps).images
    size = {} if "processor" in pipe.parts else {"height": 64, "width": 64}
    return pipe(image=PHOTO, prompt="Make the red circle blue.", guidance_scale=2.0, **size, **steps)[0]


@pytest.fixture(scope="module")
def loaded():
    return {name: joyedit.load(name, device="cpu", dtype="float32") for name in SYSTEMS}


@pytest.fixture(params=SYSTEMS)
def pipe(loaded, request):
    made = type(loaded[request.param]).from_pipe(loaded[request.param])
    made.set_progress_bar_config(disable=True)
    return made


# Of what all of them have from their base.
ONE = pytest.mark.parametrize(
    "pipe",
    [
        "tiny-joyimage",
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("tiny-diffedit", "tiny-chronoedit")),
    ],
    indirect=True,
)


@pytest.fixture(autouse=True)
def one_thread_each():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in another order would not be equal to the bit
    yield
    torch.set_num_threads(before)


def at_once(function, arguments):
    """What the function gives for each argument, all of them begun before one ends."""
    arguments = list(arguments)
    begin = threading.Barrier(THREADS)

    def run(argument):
        begin.wait(timeout=60)
        return function(argument)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, arguments))


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("pipe", "own"),
    [
        ("tiny-joyimage", True),
        ("tiny-diffedit", False),
        ("tiny-chronoedit", False),
        pytest.param("tiny-joyimage", False, marks=pytest.mark.slow),
        pytest.param("tiny-diffedit", True, marks=pytest.mark.slow),
        pytest.param("tiny-chronoedit", True, marks=pytest.mark.slow),
    ],
    indirect=["pipe"],
)
def test_calls_at_once_give_what_they_give_alone(pipe, own):
    """own: of pipelines that share parts, and else of one."""
    wanted = [call(pipe, seed) for seed in range(THREADS)]
    assert not torch.equal(wanted[0], wanted[1])

    def run(seed):
        return call(type(pipe).from_pipe(pipe) if own else pipe, seed)

    assert same(at_once(run, range(THREADS)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_networks_stay_while_they_run(loaded, monkeypatch, offload):
    """With the CPU in the accelerator's place, where nothing shows a network that was moved away; so its
    weights change sign with its place."""
    pipe = copy.deepcopy(loaded["tiny-diffedit"])
    pipe.set_progress_bar_config(disable=True)
    wanted = [call(pipe, seed) for seed in range(THREADS)]
    pipe.set_offload(offload, device="cpu")
    networks, away = list(pipe.networks.values()), set()

    def move(network, place):
        if place == "cpu" and network in away or place != "cpu" and network not in away:
            away.symmetric_difference_update({network})
            for parameter in network.parameters():
                parameter.data = -parameter.data
        return network

    if offload == "model":
        for network in networks:
            for parameter in network.parameters():
                parameter.data = -parameter.data
            monkeypatch.setattr(network, "to", lambda place, network=network: move(network, place))
        pipe._offload_device = torch.device("meta")  # told from "cpu" by its name alone
        monkeypatch.setattr(type(pipe), "device", torch.device("cpu"))
    else:
        monkeypatch.setattr(Transfers, "start", lambda self, target, source, after: target.copy_(-source))
        for network in networks:
            for parameter in {p for block in blocks_of(network) for p in block.parameters()}:
                parameter.data = -parameter.data
    found = at_once(lambda seed: call(pipe, seed), range(THREADS))
    assert same(found, wanted) and not away


def test_visitors_wait_for_each_other():
    with torch.device("meta"):
        network = joyedit.CLIPTextModel.from_config(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    first, second, order = torch.device("cpu"), torch.device("meta"), []
    inside, leave = threading.Event(), threading.Event()

    def stay():
        with visit(network, first):
            inside.set()
            leave.wait(timeout=60)
            order.append("left")

    def come():
        with visit(network, second):
            order.append(network.device.type)

    def moved(self, place):
        order.append(f"to {torch.device(place).type}")
        return self

    stayer, comer = threading.Thread(target=stay), threading.Thread(target=come)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(network), "to", moved)
        stayer.start()
        inside.wait(timeout=60)
        with visit(network, first):  # another in the same place does not wait
            with pytest.raises(RuntimeError, match="runs on cpu now, not on meta"), visit(network, second):
                pass
        assert at_rest(network) == torch.device("cpu") != network.device
        comer.start()
        comer.join(timeout=0.2)
        assert comer.is_alive() and order == ["to cpu"]
        leave.set()
        stayer.join(timeout=60)
        comer.join(timeout=60)
    assert order == ["to cpu", "left", "to cpu", "to meta", "meta", "to cpu"]


def adapter(network, prefix, seed):
    generator, state = seeded(seed), {}
    for name, parameter in network.named_parameters():
        if name.endswith("to_q.weight"):
            out, width = parameter.shape
            state[f"{prefix}.{name[:-7]}.lora_A.weight"] = torch.randn(4, width, generator=generator)
            state[f"{prefix}.{name[:-7]}.lora_B.weight"] = torch.randn(out, 4, generator=generator)
    return state


@pytest.mark.slow
@pytest.mark.parametrize("system", ["tiny-diffedit", "tiny-chronoedit"])
def test_a_scale_of_adapters_is_that_of_its_call(loaded, system):
    pipe = copy.deepcopy(loaded[system])
    pipe.set_progress_bar_config(disable=True)
    network, prefix = (pipe.unet, "unet") if "unet" in pipe.parts else (pipe.transformer, "transformer")
    pipe.load_lora_weights(adapter(network, prefix, 3))
    argument = "cross_attention_kwargs" if "unet" in pipe.parts else "attention_kwargs"
    scales = [{}, {argument: {"scale": 0.0}}, {argument: {"scale": 0.5}}]
    wanted = [call(pipe, 0, **scale) for scale in scales]
    assert not any(torch.equal(wanted[i], wanted[j]) for i, j in ((0, 1), (1, 2), (0, 2)))

    def run(scale):
        return call(type(pipe).from_pipe(pipe), 0, **scale)

    assert same(at_once(run, scales), wanted)


def stopping(pipe, runs, stop):
    """The number of steps that each of the runs takes. stop: called with the outer and the call's pipeline,
    and the run's number, after each step."""
    taken = [0] * runs
    both_run = threading.Barrier(runs)

    def run(number):
        def look(mine, step, timestep, tensors):
            if step == 0 and runs > 1:
                both_run.wait(timeout=60)
            stop(pipe, mine, number)
            taken[number] += 1
            if step == 0 and runs > 1:
                both_run.wait(timeout=60)
            return {}

        if "transformer" in pipe.parts:
            call(pipe, 2, callback_on_step_end=look)
        else:
            pipe.invert("a cat", PHOTO, 6, 1.0, 1.0, callback_on_step_end=look)

    with ThreadPoolExecutor(runs) as pool:
        list(pool.map(run, range(runs)))
    return taken


@ONE
def test_an_interrupt_stops_its_own_call_or_from_outside_all(pipe):
    def by_callback(outer, mine, number):
        mine.interrupt = mine.interrupt or number == 0

    def by_diffusers_name(outer, mine, number):
        mine._interrupt = mine.interrupt or number == 0

    def from_outside(outer, mine, number):
        if number == 0:
            outer.interrupt = True

    assert stopping(pipe, 2, by_callback) == [1, 6]
    assert stopping(pipe, 2, by_diffusers_name) == [1, 6]
    assert stopping(pipe, 2, from_outside) == [1, 1]
    assert pipe.interrupt
    pipe.interrupt = True  # with none to stop
    assert stopping(pipe, 1, lambda *_: None) == [6]
    assert not pipe.interrupt


def test_an_interrupt_from_outside_reaches_calls_within_calls(loaded, monkeypatch):
    pipe = type(loaded["tiny-diffedit"]).from_pipe(loaded["tiny-diffedit"])
    predict, calls = pipe.unet.predict, []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:  # one for the mask, two for the way to noise
            pipe.interrupt = True
        return predict(*args, **kwargs)

    monkeypatch.setattr(pipe.unet, "predict", stop)
    call(pipe, 2, output_type="np")
    assert len(calls) == 3 and pipe.interrupt
    calls[:] = [1] * 3
    call(pipe, 2)
    assert len(calls) == 3 + 1 + 4 + 4 and not pipe.interrupt


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guidance_scale", "_guidance_scale"])
def test_a_callback_changes_the_guidance_of_its_call(pipe, name):
    """And the pipeline says afterwards what its last call had."""
    counts, network = [], pipe.networks.get("transformer") or pipe.networks["unet"]
    with pytest.MonkeyPatch.context() as patch:
        method = "predict_branches" if hasattr(network, "predict_branches") else "predict"
        plain = getattr(network, method)

        def counted(*args, **keywords):
            counts.append(len(args[2]) if method == "predict_branches" else keywords.get("branches", 1))
            return plain(*args, **keywords)

        patch.setattr(network, method, counted)

        def end(mine, step, timestep, tensors):
            assert mine.guidance_scale == (2.0 if step < 2 else 1.0) and mine.current_timestep == timestep
            assert mine.scheduler is not pipe.scheduler
            if step == 1:
                setattr(mine, name, 1.0)
            return {}

        guided(pipe, callback_on_step_end=end)
    assert sum(counts) == 2 * 2 + 4
    assert pipe.guidance_scale == 1.0 and not pipe.do_classifier_free_guidance
    assert pipe.num_timesteps == 6 and pipe.current_timestep is None
    changed = guided(pipe, callback_on_step_end=lambda mine, *_: setattr(mine, name, 5.0))
    assert not torch.equal(changed, guided(pipe)) and pipe.guidance_scale == 2.0


def guided(pipe, **more):
    if "transformer" in pipe.parts:
        return call(pipe, 2, **more)
    latents = torch.randn(1, 7, 4, 8, 8, generator=seeded(1))
    levels = {"image_latents": latents, "mask_image": torch.ones(8, 8)}
    settings = {"inpaint_strength": 1.0, "num_inference_steps": 6, "guidance_scale": 2.0}
    return pipe("a red circle", output_type="latent", **levels, **settings, **more).images


def test_what_a_callback_keeps_on_its_pipeline_is_found_there(pipe):
    def keep(mine, step, timestep, tensors):
        mine.last_step = step
        return {}

    guided(pipe, callback_on_step_end=keep)
    assert pipe.last_step == 5


def test_a_call_leaves_the_scheduler_of_its_pipeline_as_it_was(pipe):
    def state():
        solvers = [getattr(pipe, name) for name in pipe.parts if "scheduler" in name]
        return repr([{k: value for k, value in vars(one).items() if k != "_levels"} for one in solvers])

    before = state()
    call(pipe, 1)
    assert state() == before


@pytest.mark.slow
def test_pipelines_are_copied_and_pickled_also_during_a_call(pipe):
    copies = []

    def look(mine, *_):
        if not copies:
            copies.extend((copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), copy.copy(mine)))
        return {}

    wanted = guided(pipe)
    guided(pipe, callback_on_step_end=look)
    for made in copies:
        assert torch.equal(guided(made), wanted)


@pytest.mark.slow
def test_a_pipeline_with_active_adapters_is_pickled(loaded):
    pipe = copy.deepcopy(loaded["tiny-diffedit"])
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(adapter(pipe.unet, "unet", 3), "style")
    wanted = [call(pipe, 0), call(pipe, 0, cross_attention_kwargs={"scale": 0.5})]
    for made in (pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)):
        assert made.get_active_adapters() == ["style"]
        found = [call(made, 0), call(made, 0, cross_attention_kwargs={"scale": 0.5})]
        assert same(found, wanted)
        made.unload_lora_weights()
        assert torch.equal(call(made, 0), call(loaded["tiny-diffedit"], 0))
