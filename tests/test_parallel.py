"""One edit in several processes against the same in one: networks forward and backward, whole edits, and what
is refused. What a command adds to it is in tests/command/test_parallel.py."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit import ops, parallel
from joyedit.lora import Adapters
from joyedit.models.chronoedit_dit import ChronoEditTransformer3DModel
from joyedit.models.joyimage_mmdit import JoyImageEditTransformer3DModel
from tests.lora_layers import JOY, WAN, factors
from tests.pipelines.tiny_chronoedit import filled

HEADS = {"num_attention_heads": 4, "rope_dim_list": [4, 4, 4]}  # of 48 channels
NETWORKS = {
    "joyimage": (JoyImageEditTransformer3DModel, {**JOY, **HEADS, "num_layers": 3}),
    "chronoedit": (ChronoEditTransformer3DModel, {**WAN, "num_attention_heads": 4, "added_kv_proj_dim": 48}),
}
TIMES = torch.tensor([501.0, 20.0])
CPU = torch.device("cpu")


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scaled_difference(found, truth):
    return float((found.double() - truth.double()).abs().max() / truth.double().abs().max())


# ---------------------------------------------------------------------------------------------- networks
def network_of(kind):
    cls, config = NETWORKS[kind]
    network = filled(cls.from_config(config), 0)
    for name, parameter in network.named_parameters():  # tables that begin with zeros hide what is behind
        if name.endswith("modulate_table"):
            parameter.data = 0.3 * drawn(*parameter.shape, seed=3)
    return network


def inputs_of(kind):
    """Tokens 45 and 30: odd numbers for the target of the MMDiT, of which there are two more items."""
    if kind == "joyimage":
        return [drawn(2, 3, 16, 1, 6, 10, seed=1), TIMES, drawn(2, 5, 20, seed=2)]
    return [drawn(2, 6, 2, 6, 10, seed=1), TIMES, drawn(2, 7, 10, seed=2), drawn(2, 3, 14, seed=3)]


def branches_of(kind, network, inputs, other):
    """The velocities under two texts, by the pieces that an edit calls."""
    latents, times, text, *image = inputs
    vec, texts = network.embed_time(times), [network.embed_text(text), other]
    if kind == "chronoedit":
        texts[1] = network.embed_text(other)
    if kind == "joyimage":
        grid = network.token_grid(latents)
        target, references = network.embed_image(latents).split([15, 30], dim=1)
        return network.predict_branches(target, references, texts, vec, network.rope(grid), grid)
    rope = network.rope(network.token_grid(latents))
    return network.predict_branches(latents, vec, texts, network.embed_image(image[0]), rope)


def passed(kind, mesh=None, checkpointing=False, adapter=False):
    """What the network gives for both ways of calling it, and what comes back to weights and inputs."""
    network = network_of(kind).requires_grad_(not adapter)
    trained = dict(network.named_parameters())
    if adapter:
        layers = {"joyimage": "img_attn_qkv|txt_mlp", "chronoedit": "attn1.to_q|attn2.to_k"}[kind]
        trained = Adapters({"transformer": network}).add_lora(2, targets=layers)
        for i, tensor in enumerate(trained.values()):
            tensor.data = 0.2 * drawn(*tensor.shape, seed=i)
    if checkpointing:
        network.enable_gradient_checkpointing()
    if mesh is not None:
        parallel.divide(network, parallel.meet(*mesh, CPU))
    found = {}
    for way in ("whole", "branches"):
        inputs = [x.clone().requires_grad_(x is not TIMES) for x in inputs_of(kind)]
        if way == "whole":
            outputs = [network(*inputs).sample]
        else:  # the second text, of another length, is one branch's alone
            width = 48 if kind == "joyimage" else inputs[2].shape[2]  # embedded, and not
            other = drawn(2, 4, width, seed=4).requires_grad_()
            outputs = branches_of(kind, network, inputs, other)
            inputs.append(other)
        loss = sum((x * drawn(*x.shape, seed=i)).sum() for i, x in enumerate(outputs))
        loss = loss + sum(tensor.square().sum() for tensor in trained.values())  # beside the network
        loss.backward()
        found |= {f"{way} {i}": x.detach() for i, x in enumerate(outputs)}
        found |= {f"{way} grad of input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None}
        found |= {f"{way} grad of {name}": tensor.grad.clone() for name, tensor in trained.items()}
        for tensor in trained.values():
            tensor.grad = None
    if mesh is not None:
        parallel.undo(network)
        assert not any(tensor._backward_hooks for tensor in trained.values())
        assert parallel.mesh_of(network) is None
        assert all(module.attend is ops.attention for module in parallel.attending(network))
        assert scaled_difference(network(*inputs_of(kind)).sample, found["whole 0"]) <= 1e-5
    return found


def assert_same_passes(workers, kind, mesh, count, **options):
    truth = passed(kind, **options)
    for found in workers.run(passed, kind, mesh, count=count, **options):
        assert found.keys() == truth.keys()
        # Biases of keys shift all scores alike, and have no gradient but rounding's.
        worst = {name: scaled_difference(found[name], truth[name]) for name in truth}
        assert max(worst.values()) <= 1e-5, sorted(worst.items(), key=lambda item: -item[1])[:4]
        if mesh[1] == 1:
            outputs = [name for name in truth if "grad" not in name]
            assert all(torch.equal(found[name], truth[name]) for name in outputs)


@pytest.mark.parametrize("kind", NETWORKS)
def test_passes_and_gradients_are_those_of_one_process(workers, kind):
    assert_same_passes(workers, kind, (1, 2), 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("options", [{"checkpointing": True}, {"adapter": True}], ids=str)
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=str)
def test_passes_of_every_kind(workers, kind, mesh, options):
    assert_same_passes(workers, kind, mesh, 2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_passes_of_branches_and_of_both(workers, kind):
    assert_same_passes(workers, kind, (2, 1), 2)
    assert_same_passes(workers, kind, (2, 2), 4)


def more_processes_than_tokens(mesh):
    network = network_of("joyimage")
    parallel.divide(network, parallel.meet(*mesh, CPU))
    with torch.no_grad():
        return network(drawn(1, 16, 1, 2, 2, seed=1), TIMES[:1], drawn(1, 2, 20, seed=2)).sample


@pytest.mark.slow
def test_a_process_may_have_no_token_of_a_segment(workers):
    with torch.no_grad():
        truth = network_of("joyimage")(
            drawn(1, 16, 1, 2, 2, seed=1), TIMES[:1], drawn(1, 2, 20, seed=2)
        ).sample
    for found in workers.run(more_processes_than_tokens, (1, 4), count=4):
        assert scaled_difference(found, truth) <= 1e-5


# ------------------------------------------------------------------------------------------------ whole edits
def picture(width, height, seed):
    small = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


STEPS = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent"}
WORDS = ["Make the circle blue.", "Remove it."]  # of other lengths


def joyimage(pipe):
    pipe.buckets = [(48, 80)]  # 15 tokens
    photos = [picture(90, 60, 0), picture(80, 48, 1)]
    return pipe(image=photos, prompt=WORDS, negative_prompt="a", generator=seeds(1, 2), **STEPS).images


def from_text(pipe):
    pipe.buckets = [(48, 80)]
    return pipe(prompt=WORDS[0], generator=seeds(1), **STEPS).images


def with_lora(pipe):
    load_lora(pipe)
    return joyimage(pipe)


def load_lora(pipe):
    layers = ("double_blocks.1.attn.img_attn_qkv", "double_blocks.0.txt_mlp.net.2", "img_in")
    generator = torch.random.get_rng_state()
    torch.manual_seed(7)
    made = {layer: factors(pipe.transformer, layer) for layer in layers}
    torch.random.set_rng_state(generator)
    pipe.load_lora_weights(
        {
            f"transformer.{layer}.lora_{side}.weight": tensor
            for layer, pair in made.items()
            for side, tensor in zip("AB", pair, strict=True)
        },
        "one",
    )


def film(pipe):
    photo = picture(80, 48, 3)
    size = {"height": 48, "width": 80}
    return pipe(photo, WORDS, negative_prompt="a", generator=seeds(1, 2), **size, **STEPS).frames


def film_with_reasoning(pipe):
    thought = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 1, "num_frames": 13}
    size = {"height": 48, "width": 80}
    return pipe(picture(80, 48, 3), WORDS[0], generator=seeds(1), **size, **thought, **STEPS).frames


def plus(pipe):
    pipe.buckets = [(48, 80), (80, 48), (64, 64)]
    photos = [picture(90, 60, 0), picture(48, 80, 1)]
    call = {"prompt": WORDS, "height": 48, "width": 112, "generator": seeds(1, 2), **STEPS}  # 21 tokens
    two_and_one = pipe([photos, photos[1:]], **call).images
    return torch.cat([two_and_one, pipe(None, **call).images])


EDITS = {  # what is done, with which checkpoint; None: a random one of Edit-Plus
    "joyimage": (joyimage, "tiny-joyimage"),
    "text": (from_text, "tiny-joyimage"),
    "lora": (with_lora, "tiny-joyimage"),
    "film": (film, "tiny-chronoedit"),
    "reasoning": (film_with_reasoning, "tiny-chronoedit"),
    "plus": (plus, None),
}


def opened(name, checkpoint, dtype="float32"):
    model = EDITS[name][1]
    pipe = joyedit.load(model or checkpoint, device="cpu", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edits(names, checkpoint, mesh=None, dtype="float32"):
    found = {}
    for name in names:
        pipe = opened(name, checkpoint, dtype)
        if mesh is not None:
            pipe.parallelize(*mesh)
        found[name] = EDITS[name][0](pipe)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plus")
    write_random_checkpoint(folder, seed=1, plus=True)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_edits_by_two_branches_are_equal_to_the_bit(workers, checkpoint, dtype):
    truth = edits(EDITS, checkpoint, dtype=dtype)
    for found in workers.run(edits, list(EDITS), checkpoint, (2, 1), dtype):
        assert [name for name in EDITS if not torch.equal(found[name], truth[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "names"), [((1, 2), list(EDITS)), ((2, 2), ["joyimage", "film"])], ids=str)
def test_edits_with_divided_tokens_are_equal(workers, checkpoint, mesh, names):
    truth = edits(names, checkpoint)
    for found in workers.run(edits, names, checkpoint, mesh, count=mesh[0] * mesh[1]):
        worst = {name: scaled_difference(found[name], truth[name]) for name in names}
        assert max(worst.values()) <= 1e-4, worst


def shares_of_work(mesh):
    """How many tokens go through the first MLP for each branch, and how many branches."""
    pipe = opened("joyimage", None)
    pipe.parallelize(*mesh)
    seen = []
    pipe.transformer.double_blocks[0].img_mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    joyimage(pipe)
    return seen


@pytest.mark.slow
def test_each_process_computes_its_share_alone(workers):
    """Two samples of 15 target and 15 reference tokens, in groups by the length of their prompts."""
    halves = workers.run(shares_of_work, (1, 2))
    assert [{shape[1] for shape in seen} for seen in halves] == [{16}, {14}]
    branches = workers.run(shares_of_work, (2, 1))
    assert [sum(shape[0] for shape in seen) for seen in branches] == [3 * 2, 3 * 2]
    assert {shape[1] for seen in branches for shape in seen} == {30}


# ------------------------------------------------------------------------------------ settings, and agreement
def with_setting(setting, mesh=None, before=True):
    """The mesh made before the setting, or after it, as the command does."""
    pipe = opened("joyimage", None)
    if mesh is not None and before:
        pipe.parallelize(*mesh)
    if setting == "memory":
        pipe.set_memory("64G", "cpu")
    elif setting == "offload":
        pipe.set_offload("sequential", "cpu")
    else:
        load_lora(pipe)
        if setting == "fused_lora":
            pipe.fuse_lora()
    if mesh is not None and not before:
        pipe.parallelize(*mesh)
    return joyimage(pipe)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["memory", "offload", "lora", "fused_lora"])
def test_settings_that_go_together_with_it(workers, setting):
    truth = with_setting(setting)
    for before in (True, False):
        for found in workers.run(with_setting, setting, (1, 2), before):
            assert scaled_difference(found, truth) <= 1e-4


def agreements(mesh):
    """What processes do that are not told the same: the draws of nobody's generator, an interruption by one
    of them, other seeds, other prompts."""
    import torch.distributed as dist

    rank = dist.get_rank()
    pipe = opened("joyimage", None)
    pipe.parallelize(*mesh)
    pipe.buckets = [(48, 80)]
    call = {"image": picture(90, 60, 0), "prompt": WORDS[0], **STEPS}
    torch.manual_seed(rank)
    unseeded = pipe(**call).images

    def interrupt(pipe, step, timestep, tensors):
        if rank == 1 and step == 0:
            pipe.interrupt = True
        return None

    steps = []
    pipe(**call, callback_on_step_end=lambda *now: (steps.append(now[1]), interrupt(*now))[1])
    messages = []
    two = {"prompt": [WORDS[0]] * 2, "generator": seeds(0, rank)}  # the second of them differs
    steps_of = {"num_inference_steps": 3 - rank}
    alone = ({"generator": seeds(rank)}, {"prompt": WORDS[rank]}, {"guidance_scale": 2.0 + rank})
    for other in (*alone, two, steps_of):
        try:
            pipe(**{**call, "generator": seeds(0), **other})
        except ValueError as error:
            messages.append(str(error))
    again = pipe(**call, generator=seeds(0)).images  # nothing is left behind
    return unseeded, steps, messages, again


@pytest.mark.slow
def test_processes_agree_or_say_so(workers):
    pipe = opened("joyimage", None)
    pipe.buckets = [(48, 80)]
    call = {"image": picture(90, 60, 0), "prompt": WORDS[0], **STEPS}
    torch.manual_seed(0)
    drawn_by_the_first, seeded = pipe(**call).images, pipe(**call, generator=seeds(0)).images
    for unseeded, steps, messages, again in workers.run(agreements, (1, 2)):
        assert scaled_difference(unseeded, drawn_by_the_first) <= 1e-4
        assert steps == [0]
        assert len(messages) == 5 and all("not called with the same" in message for message in messages)
        assert scaled_difference(again, seeded) <= 1e-4


# -------------------------------------------------------------------------------------------------- refusals
def refusals():
    """The messages of what is refused in two processes."""
    pipe, messages = opened("joyimage", None), {}
    meshes = {"processes": (2, 2), "heads": (1, 4), "cfg": (3, 1), "zero": (1, 0), "text": ("2", 1)}
    for name, mesh in meshes.items():
        with contextlib.suppress(ValueError):
            messages[name] = refused(pipe.parallelize, *mesh)
    pipe.parallelize(cfg=2)
    messages["guidance"] = refused(joyimage_without_guidance, pipe)
    messages["step cache"] = refused(
        pipe, image=picture(90, 60, 0), prompt="a", step_cache=0.1, guidance_scale=2.0
    )
    messages["graphs"] = refused(pipe.enable_graphs)
    pipe.parallelize()
    assert pipe.mesh is None and joyimage_without_guidance(pipe) is not None
    pipe.transformer.compile(backend="eager")
    messages["compile"] = refused(pipe.parallelize, 2)
    diffedit = joyedit.load("tiny-diffedit", device="cpu")
    messages["diffedit"] = refused(diffedit.parallelize, 2)
    return messages


def refused(function, *args, **call):
    try:
        function(*args, **call)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def joyimage_without_guidance(pipe):
    pipe.buckets = [(48, 80)]
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(image=picture(90, 60, 0), prompt="a", **call).images


def test_what_cannot_be_divided_is_refused(workers):
    for messages in workers.run(refusals):
        assert "cfg=2 x sequence=2 is 4 processes, not 2" in messages["processes"]
        assert "does not divide the 6 heads of attention: 1, 2, 3, 6 do" in messages["heads"]
        assert messages["cfg"] == "cfg=3: must be 1 or 2, guidance has two branches"
        assert messages["zero"] == "sequence=0: must be a whole number from 1"
        assert messages["text"] == "cfg='2': must be a whole number from 1"
        assert "guidance_scale=1 turns guidance off" in messages["guidance"]
        assert "step_cache=0.1 does not go with parallel" in messages["step cache"]
        assert "enable_graphs() does not go with parallel" in messages["graphs"]
        assert "parallelize(cfg=2, sequence=1) does not go with compile" in messages["compile"]
        assert "UNet2DConditionModel cannot be divided" in messages["diffedit"]


def test_what_carries_messages():
    from torch.distributed.distributed_c10d import BackendConfig

    backends = {kind: parallel.backend_of(torch.device(kind)) for kind in ("cpu", "cuda")}
    assert BackendConfig(backends["cuda"]).device_backend_map == {"cpu": "gloo", "cuda": "nccl"}
    assert BackendConfig(backends["cpu"]).device_backend_map["cpu"] == "gloo"


def test_a_pipeline_that_was_moved_is_refused():
    pipe = opened("joyimage", None)
    parallel.divide(pipe.transformer, parallel.Mesh(1, 2, 0, device=torch.device("cuda")))
    with pytest.raises(ValueError, match="went from cuda to cpu since it was divided"):
        pipe(prompt="a", **STEPS)


def test_one_process_alone_is_refused(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    pipe = opened("joyimage", None)
    with pytest.raises(
        ValueError, match="is 2 processes, not 1: start them with `torchrun --nproc-per-node 2`"
    ):
        pipe.parallelize(sequence=2)
    assert pipe.mesh is None
    pipe.parallelize()
    assert pipe.mesh is None
