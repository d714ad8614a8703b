"""`step_cache` of the pipelines: off, it changes nothing; on, it leaves steps out and goes with the rest."""

import functools
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from joyedit.memory import stream_blocks
from joyedit.memory.streaming import BlockStreaming, Transfers, TwoBuffers, blocks_of, tensors_of

OTHERS = ("tiny-chronoedit", "tiny-diffedit", "plus")
SYSTEMS = ("tiny-joyimage", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS))
PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
ALL = 1e9  # a threshold that every change is below
STEPS = 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@functools.cache
def loaded(name):
    return joyedit.load(name, device="cpu", dtype="float32")


@pytest.fixture(params=SYSTEMS)
def pipe(request):
    return of(request.param)


def of(name):
    if name == "plus":
        made = joyedit.JoyImageEditPlusPipeline.from_pipe(loaded("tiny-joyimage"))
    else:
        made = type(loaded(name)).from_pipe(loaded(name))
    made.set_progress_bar_config(disable=True)
    return made


def call(pipe, **more):
    """A guided edit in four steps, of DiffEdit in four of inversion and four of denoising; the latents."""
    said = {
        "num_inference_steps": STEPS,
        "generator": seeded(),
        "output_type": "latent",
        "guidance_scale": 2.0,
    }
    said |= more
    if "unet" in pipe.parts:
        settings = {"inpaint_strength": 1.0, "num_maps_per_mask": 1, "mask_image": np.ones((16, 16))}
        return pipe.edit(PHOTO, "a red circle", "a blue circle", **settings, **said).images
    if "processor" not in pipe.parts:
        return pipe(PHOTO, "Make the red circle blue.", height=64, width=64, **said)[0]
    several = isinstance(pipe, joyedit.JoyImageEditPlusPipeline)
    photo = [[PHOTO, PHOTO]] if several else PHOTO
    return pipe(photo, "Make the red circle blue.", **said)[0]


def runs_of(pipe):
    """How many runs of steps a call is."""
    return 2 if "unet" in pipe.parts else 1


class Counted:
    """Calls of each block while it is there."""

    def __init__(self, network):
        self.calls = [0] * len(blocks_of(network))
        self.hooks = [
            block.register_forward_pre_hook(lambda block, args, i=i: self.count(i))
            for i, block in enumerate(blocks_of(network))
        ]

    def count(self, i):
        self.calls[i] += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def test_off_is_today_and_a_large_threshold_leaves_all_but_two_steps_out(pipe):
    exact, runs = call(pipe), runs_of(pipe)
    assert pipe.steps_computed == STEPS * runs
    for off in (None, 0, 0.0, np.float32(0)):
        assert torch.equal(call(pipe, step_cache=off), exact) and pipe.steps_computed == STEPS * runs
    with Counted(pipe.denoiser) as counted:
        found = call(pipe, step_cache=ALL)
    assert pipe.steps_computed == 2 * runs and not torch.equal(found, exact)
    assert (found - exact).abs().mean() < exact.abs().mean()
    most = max(counted.calls)
    if runs == 1:  # two branches, through the first block in every step
        assert counted.calls == [2 * STEPS, *[2 * 2] * (len(counted.calls) - 1)]
    else:  # both branches at once
        outer = {0, len(counted.calls) - 1, *(i for i, n in enumerate(counted.calls) if n == most)}
        assert most == 2 * STEPS and len(outer) < len(counted.calls)
        assert {n for i, n in enumerate(counted.calls) if i not in outer} == {2 * 2}
    exactly = call(pipe, step_cache=1e-30)
    assert pipe.steps_computed == STEPS * runs and (exactly - exact).abs().max() < 1e-5 * exact.abs().max()
    if runs == 1:
        assert torch.equal(exactly, exact)


@pytest.mark.parametrize("value", [-0.1, -1, float("nan"), float("inf"), True, False, "0.1", "", [0.1], {}])
def test_other_values_are_refused_by_name_before_any_work(pipe, value, monkeypatch):
    for network in pipe.networks.values():
        monkeypatch.setattr(network, "forward", None)
    with pytest.raises(ValueError, match="^step_cache="):
        call(pipe, step_cache=value)


@pytest.mark.slow
def test_of_diffedit_each_part_refuses_and_counts():
    pipe = of("tiny-diffedit")
    steps = {"num_inference_steps": STEPS, "inpaint_strength": 1.0}
    levels = pipe.invert("a circle", PHOTO, **steps, step_cache=ALL).latents
    assert pipe.steps_computed == 2 and levels.shape[1] == STEPS + 1
    part = {"mask_image": np.ones((16, 16)), "image_latents": levels, "output_type": "latent"}
    pipe("a square", **part, **steps, step_cache=ALL)
    assert pipe.steps_computed == 2
    part["image_latents"] = levels[:, -1:]
    pipe("a square", **part, num_inference_steps=STEPS, inpaint_strength=0.0)
    assert pipe.steps_computed == 0
    with pytest.raises(ValueError, match="^step_cache=-1"):
        pipe.invert("a", PHOTO, step_cache=-1)
    with pytest.raises(ValueError, match="^step_cache=-1"):
        pipe("a", **part, num_inference_steps=STEPS, inpaint_strength=0.0, step_cache=-1)


def test_graphs_exclude_it(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "in_use", lambda self: {"graphs"})
    with pytest.raises(ValueError, match=r"^step_cache=0.1 does not go with graphs: .*disable_graphs\(\)"):
        call(pipe, step_cache=0.1)
    call(pipe, step_cache=0, num_inference_steps=1)


def test_interrupted_runs_count_what_they_did(pipe):
    def stop(pipe, step, timestep, tensors):
        seen.append(pipe.steps_computed)
        pipe.interrupt = step == 1

    seen = []
    call(pipe, step_cache=ALL, callback_on_step_end=stop)
    assert seen == [1, 1] and pipe.steps_computed == 1 + 2 * (runs_of(pipe) - 1)
    call(pipe, callback_on_step_end=stop)
    assert seen[2:] == [1, 2]


@pytest.mark.slow
def test_a_run_that_is_interrupted_before_its_first_step_counts_none(pipe, monkeypatch):
    call(pipe)
    bar = type(pipe).progress_bar

    def interrupted(self, *args):
        self.interrupt = True
        return bar(self, *args)

    monkeypatch.setattr(type(pipe), "progress_bar", interrupted)
    call(pipe)
    assert pipe.steps_computed == 0


@pytest.mark.parametrize("name", [SYSTEMS[0], SYSTEMS[1], SYSTEMS[3]])
def test_other_prompts_are_computed_anew(name):
    """A callback that brings other words: the branch of these has nothing to reuse, and the other reuses."""
    pipe, calls = of(name), []
    predict = pipe.transformer.predict_branches

    def watched(*args, caches=None):
        due = [cache.first is None for cache in caches]
        calls.append(due)
        return predict(*args, caches=caches)

    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": 0.5 * tensors["prompt_embeds"]} if step == 1 else None

    pipe.transformer.predict_branches = watched
    try:
        call(
            pipe,
            step_cache=ALL,
            callback_on_step_end=change,
            callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        )
    finally:
        del pipe.transformer.predict_branches
    assert calls == [[True, True], [False, False], [True, False], [False, False]]
    assert pipe.steps_computed == 3


@pytest.mark.slow
def test_guidance_may_end_on_the_way(pipe):
    def end(pipe, step, timestep, tensors):
        pipe.guidance_scale = 1.0

    exact = call(pipe, callback_on_step_end=end)
    found = call(pipe, callback_on_step_end=end, step_cache=1e-30)
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    call(pipe, callback_on_step_end=end, step_cache=ALL)
    assert pipe.steps_computed == 2 * runs_of(pipe)


@pytest.mark.slow
def test_where_frames_are_dropped_a_step_is_computed():
    pipe = of("tiny-chronoedit")
    film = {"enable_temporal_reasoning": True, "num_frames": 13, "num_inference_steps": 6}
    call(pipe, **film, num_temporal_reasoning_steps=3, step_cache=ALL)
    assert pipe.steps_computed == 3  # the first, the fourth, the last
    call(pipe, **film, num_temporal_reasoning_steps=6, step_cache=ALL)
    assert pipe.steps_computed == 2


@pytest.mark.slow
def test_several_prompts_and_copies():
    """Groups of prompts of unequal length, each with a cache of its own."""
    pipe = of("tiny-joyimage")
    said = {"generator": [seeded(i) for i in range(4)], "num_images_per_prompt": 2, "output_type": "latent"}
    said |= {"num_inference_steps": STEPS, "guidance_scale": 2.0}
    prompts = ["Make the red circle blue.", "Remove the large green square from the picture."]

    def run(**more):
        generators = [seeded(i) for i in range(4)]
        return pipe(PHOTO, prompts, **{**said, "generator": generators, **more})[0]

    exact = run()
    assert torch.equal(run(step_cache=1e-30), exact)
    found = run(step_cache=ALL)
    assert pipe.steps_computed == 2
    for i, image in enumerate(found):  # each group goes by itself, so also alone
        alone = {"generator": seeded(i), "num_inference_steps": STEPS, "guidance_scale": 2.0}
        one = pipe(PHOTO, prompts[i // 2], **alone, output_type="latent", step_cache=ALL)[0][0]
        assert (one - image).abs().max() < 1e-4 * image.abs().max()


@pytest.mark.slow
def test_calls_at_once_do_not_meet(pipe):
    wanted = [call(pipe, step_cache=threshold) for threshold in (None, ALL)]
    before = [set(vars(network)) for network in pipe.networks.values()]
    found = [None] * 4
    counts = [0] * 4

    def work(i):
        def look(pipe, step, timestep, tensors):
            counts[i] = pipe.steps_computed

        found[i] = call(pipe, step_cache=(None, ALL)[i % 2], callback_on_step_end=look)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], wanted[i % 2]) for i in range(4)) and counts == [4, 2, 4, 2]
    assert [set(vars(network)) for network in pipe.networks.values()] == before


class Late(Transfers):
    """Copies that are done when somebody waits for them, and counted."""

    def __init__(self):
        self.waiting, self.count = {}, 0

    def start(self, target, source, after):
        self.count += 1
        self.waiting[self.count] = target, source
        return self.count

    def wait(self, mark):
        for number in [n for n in self.waiting if n <= mark]:
            target, source = self.waiting.pop(number)
            target.copy_(source)


class Buffered(TwoBuffers):
    def __init__(self, blocks, room):
        super().__init__(blocks, torch.device("cpu"), room, Late())
        self.pack(torch.empty(sum(self.rows), dtype=torch.uint8))


@pytest.mark.parametrize("place", [pytest.param("in files", marks=pytest.mark.slow), "in buffers"])
def test_with_a_budget_the_results_are_the_same(pipe, place, monkeypatch):
    wanted = call(pipe, step_cache=ALL)
    if place == "in buffers":
        monkeypatch.setattr("joyedit.memory.streaming.MappedPages", Buffered)

    class Half:
        def begin(self):
            pass

        def left(self):
            return sum(t.nbytes for t in tensors_of(pipe.denoiser)) // 3

    try:
        stream_blocks(pipe.networks.values(), torch.device("cpu"), Half())
        found = [call(pipe, step_cache=ALL), call(pipe, step_cache=ALL)]
    finally:
        pipe.set_memory(None)
    assert all(torch.equal(one, wanted) for one in found)


@pytest.mark.parametrize("name", SYSTEMS[:2])
def test_blocks_that_are_left_out_do_not_come(name):
    """Of the ten steps, eight compute the first block alone: after the one that was fetched ahead nothing
    comes, up to the last step."""
    pipe, copies = of(name), []
    network, late = pipe.transformer, Late()
    streaming = BlockStreaming(network, torch.device("cpu"), transfers=late)
    streaming.passing.pack(torch.empty(sum(streaming.passing.rows), dtype=torch.uint8))
    network.__dict__["block_streaming"] = streaming
    try:
        watch = {"callback_on_step_end": lambda *a: copies.append(late.count)}
        call(pipe, num_inference_steps=10, step_cache=ALL, **watch)
    finally:
        BlockStreaming.detach(network)
    blocks = len(blocks_of(network))
    came = np.diff(copies)
    assert list(came[1:8]) == [0] * 7 and came[0] <= 1
    assert blocks - 2 <= came[8] <= blocks  # the others, in the last step


@pytest.mark.slow
def test_with_adapters():
    pipe = of("tiny-joyimage")
    plain = call(pipe, step_cache=ALL)
    width = pipe.transformer.config.hidden_size
    name = "transformer.double_blocks.2.attn.img_attn_proj"
    adapter = {
        f"{name}.lora_A.weight": torch.randn(2, width, generator=seeded(1)) / 8,
        f"{name}.lora_B.weight": torch.randn(width, 2, generator=seeded(2)),
    }
    pipe.load_lora_weights(adapter)
    try:
        beside = call(pipe, step_cache=ALL)
        pipe.fuse_lora()
        fused = call(pipe, step_cache=ALL)
        pipe.unfuse_lora()
    finally:
        pipe.unload_lora_weights()
    assert (beside - plain).abs().max() > 1e-3 and (beside - fused).abs().max() < 1e-3
    assert torch.equal(call(pipe, step_cache=ALL), plain)


@pytest.mark.slow
def test_with_compiled_blocks():
    pipe = joyedit.load("tiny-joyimage", device="cpu", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    wanted = call(pipe, step_cache=ALL)
    for block in pipe.transformer.double_blocks:
        block.compile(backend="eager")  # traced, which is where caches could matter
    found = call(pipe, step_cache=ALL)
    assert pipe.steps_computed == 2 and (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
