"""The JoyAI-Image-Edit MMDiT against diffusers: values, names, layouts, and the pieces against the whole."""

from pathlib import Path

import pytest
import torch
from diffusers import JoyImageEditTransformer3DModel as Reference
from diffusers.models.transformers.transformer_joyimage import JoyImageTransformerBlock as ReferenceBlock
from safetensors.torch import load_file, save_file

from joyedit import ops
from joyedit.checkpoints.network import load_network
from joyedit.checkpoints.new_parameters import NewParameters
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.joyimage_mmdit import layouts
from joyedit.convert.table import plan_conversion
from joyedit.models.joyimage_mmdit import (
    DoubleStreamBlock,
    JoyImageEditConfig,
    JoyImageEditTransformer3DModel,
)
from joyedit.models.layers import sinusoidal_embedding
from joyedit.models.rope import grid_rope
from tests.parity.same_weights import check_layouts_run_backwards, difference, recorded_shapes, shapes

GOLDENS = Path(__file__).resolve().parents[2] / "../shared/data/goldens"
needs_shared = pytest.mark.skipif(not GOLDENS.is_dir(), reason="needs ../shared")

# What a fork adds to the network, as patterns ("*.temperature"): the reference has no such tensors.
NEW_PARAMETERS: tuple[str, ...] = ()

WIDE_HEAD = dict(  # head width and rotary split of the released model
    hidden_size=256, num_attention_heads=2, num_layers=2, text_dim=24, rope_dim_list=[16, 56, 56], theta=10000
)
TINY = dict(
    hidden_size=48, num_attention_heads=3, num_layers=3, text_dim=20, rope_dim_list=[4, 6, 6], theta=10000
)

# name: config, latents (B, items, C, T, H, W) or (B, C, T, H, W), text length
CASES = {
    "no reference, batch 2": (WIDE_HEAD, (2, 1, 16, 1, 10, 6), 7),
    "one reference, batch 2": (WIDE_HEAD, (2, 2, 16, 1, 6, 14), 11),
    "two references, odd grid": (WIDE_HEAD, (1, 3, 16, 1, 18, 10), 5),
    "three tiny layers": (TINY, (2, 2, 16, 1, 14, 6), 3),
    "other channels": ({**TINY, "in_channels": 5, "out_channels": 7, "theta": 256}, (2, 2, 5, 1, 6, 10), 1),
    "out_channels like in_channels": (
        {**TINY, "in_channels": 3, "out_channels": None},
        (1, 2, 3, 1, 2, 6),
        4,
    ),
    "thirds of the head": (
        {**TINY, "num_attention_heads": 2, "rope_dim_list": None, "mlp_width_ratio": 2.5},
        (1, 2, 16, 1, 6, 10),
        4,
    ),
    "five dimensions": (TINY, (2, 16, 1, 10, 6), 9),
    "five dimensions, frames": (TINY, (2, 16, 3, 6, 10), 6),
    "items of two frames": (TINY, (1, 2, 16, 2, 6, 10), 6),
    "patches of frames": ({**TINY, "patch_size": [2, 3, 2]}, (2, 16, 4, 9, 10), 6),
    "one item, patches of frames": ({**TINY, "patch_size": [2, 1, 2]}, (2, 1, 16, 4, 5, 6), 6),
}


@torch.no_grad()
def randomize(module, seed=0):
    """Weights of the size that keeps activations near 1; tables, biases and norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        elif name.endswith("modulate_table"):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.requires_grad_(False).eval()


def reference_model(config, seed=0):
    return randomize(Reference.from_config(dict(config)), seed)


def ours_from(reference, folder, dtype=None, rename=lambda key: key):
    """Our network from the reference's weights, through a file and the loader."""
    state = {rename(key): tensor.contiguous() for key, tensor in reference.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    config = JoyImageEditConfig.from_dict(dict(reference.config))
    files = TensorFiles([folder / "weights.safetensors"])
    return load_network(JoyImageEditTransformer3DModel, config, files, dtype, NEW_PARAMETERS)


def inputs(config, shape, length, seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(shape, generator=generator)
    timestep = 1000 * torch.rand(shape[0], generator=generator)
    prompt = torch.randn(shape[0], length, config["text_dim"], generator=generator)
    return latents, timestep, prompt


def run_pieces(model, latents, timestep, prompt):
    """The target's velocity as a pipeline computes it. latents (B, I, C, T, H, W), the target last."""
    target, reference = latents[:, -1:], latents[:, :-1]
    grid = model.token_grid(latents)
    tokens = model.embed_image(reference) if reference.shape[1] else None
    txt, vec = model.embed_text(prompt), model.embed_time(timestep)
    return model.predict_target(model.embed_image(target), tokens, txt, vec, model.rope(grid), grid)


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_reference(name, tmp_path):
    config, shape, length = CASES[name]
    reference = reference_model(config)
    ours = ours_from(reference, tmp_path)
    batch = inputs(config, shape, length)
    wanted = reference(*batch, return_dict=False)[0]
    got = ours(*batch)
    assert got.sample.shape == wanted.shape and got.sample.dtype == torch.float32
    assert difference(got.sample, wanted) < 1e-5
    (as_tuple,) = ours(*batch, return_dict=False)
    assert torch.equal(as_tuple, got.sample)


@pytest.mark.parametrize("name", [name for name, (_, shape, _) in CASES.items() if len(shape) == 6])
def test_target_alone_equals_its_part_of_the_reference(name, tmp_path):
    config, shape, length = CASES[name]
    reference = reference_model(config)
    ours = ours_from(reference, tmp_path)
    batch = inputs(config, shape, length)
    got = run_pieces(ours, *batch)
    assert difference(got, ours(*batch).sample[:, -1]) < 1e-6
    assert difference(got, reference(*batch, return_dict=False)[0][:, -1]) < 1e-5


def test_pieces_are_what_a_pipeline_caches(tmp_path):
    """One vector of a whole schedule, tokens of items apart, and one timestep for a batch."""
    reference = reference_model(TINY)
    ours = ours_from(reference, tmp_path)
    latents, _, prompt = inputs(TINY, (2, 3, 16, 1, 6, 10), 5)
    timesteps = torch.tensor([1000.0, 750.4215698, 2.2471909])
    vec = ours.embed_time(timesteps)
    assert vec.shape == (3, 6, 48) and vec.dtype == torch.float32
    for i, timestep in enumerate(timesteps):
        wanted = reference.condition_embedder(timestep[None], prompt)[1].unflatten(1, (6, -1))
        assert difference(vec[i : i + 1], wanted) < 1e-6
    grid = ours.token_grid(latents)
    assert grid == (3, 3, 5)
    tokens = ours.embed_image(latents[:, -1:]), ours.embed_image(latents[:, :-1])
    whole = torch.cat([latents[:, -1:], latents[:, :-1]], dim=1)
    assert difference(torch.cat(tokens, dim=1), ours.embed_image(whole)) < 1e-6
    got = ours.predict_target(*tokens, ours.embed_text(prompt), vec[1], ours.rope(grid), grid)
    assert difference(got, reference(latents, timesteps[1:2], prompt, return_dict=False)[0][:, -1]) < 1e-5
    with pytest.raises(ValueError, match=r"45 image tokens do not fill the grid \(2, 3, 5\)"):
        ours.predict_target(*tokens, ours.embed_text(prompt), vec[1], ours.rope(grid), (2, 3, 5))


def test_branches_in_one_walk_equal_the_reference(tmp_path):
    """Texts of unequal lengths under one target; targets and references of each branch's own, or none; every
    block is visited once for all of them."""
    reference = reference_model(TINY)
    ours = ours_from(reference, tmp_path)
    latents, timestep, prompt = inputs(TINY, (2, 2, 16, 1, 6, 10), 5)
    texts = [prompt, prompt[:, :3], 2 * prompt]
    grid, vec = ours.token_grid(latents), ours.embed_time(timestep)
    target, known = ours.embed_image(latents[:, -1:]), ours.embed_image(latents[:, :-1])
    walk, visits = [ours.embed_text(text) for text in texts], []
    blocks = [
        block.register_forward_pre_hook(lambda m, _: visits.append(id(m))) for block in ours.double_blocks
    ]
    found = ours.predict_branches(target, known, walk, vec, ours.rope(grid), grid)
    assert visits == [id(block) for block in ours.double_blocks for _ in texts]
    for hook in blocks:
        hook.remove()
    assert len(found) == len(texts)
    for got, text in zip(found, texts, strict=True):
        assert difference(got, reference(latents, timestep, text, return_dict=False)[0][:, -1]) < 1e-5

    rows = [slice(0, 1), slice(1, 2)]
    parts = [[t[r] for r in rows] for t in (target, known, walk[0])]
    apart = ours.predict_branches(*parts, vec[:1], ours.rope(grid), grid)
    for got, row in zip(apart, rows, strict=True):
        wanted = reference(latents[row], timestep[:1], prompt[row], return_dict=False)[0][:, -1]
        assert difference(got, wanted) < 1e-5

    alone = latents[:, -1:]
    (got,) = ours.predict_branches(target, None, walk[:1], vec, ours.rope((1, 3, 5)), (1, 3, 5))
    assert difference(got, reference(alone, timestep, prompt, return_dict=False)[0][:, -1]) < 1e-5
    assert ours.predict_branches(target, None, [], vec, ours.rope((1, 3, 5)), (1, 3, 5)) == []
    with pytest.raises(ValueError, match=r"15 image tokens do not fill the grid \(2, 3, 5\)"):
        ours.predict_branches(target, [None, known, known], walk, vec, ours.rope(grid), grid)
    with pytest.raises(ValueError, match="argument"):
        ours.predict_branches([target], known, walk, vec, ours.rope(grid), grid)


def test_each_block_equals_the_reference(tmp_path):
    reference = reference_model(WIDE_HEAD)
    ours = ours_from(reference, tmp_path)
    seen = []
    for block in reference.double_blocks:
        block.register_forward_hook(lambda _, args, kwargs, out: seen.append((kwargs, out)), with_kwargs=True)
    latents, timestep, prompt = inputs(WIDE_HEAD, (2, 2, 16, 1, 10, 6), 7)
    reference(latents, timestep, prompt)
    rope = ours.rope(ours.token_grid(latents))
    for block, (given, (img, txt)) in zip(ours.double_blocks, seen, strict=True):
        args = given["hidden_states"], given["encoder_hidden_states"], given["temb"], rope
        got_img, got_txt = block(*args)
        assert difference(got_img, img) < 1e-5
        assert difference(got_txt, txt) < 1e-5
        got_img, same_txt = block(*args, 15)
        assert difference(got_img, img[:, :15]) < 1e-5
        assert same_txt is args[1]


@torch.no_grad()
def test_both_ways_through_a_block_agree():
    """Needs no reference: it still means something after the block was changed."""
    block = randomize(DoubleStreamBlock(48, 3, 96))
    img, txt, vec = torch.randn(2, 12, 48), torch.randn(2, 5, 48), torch.randn(2, 6, 48)
    rope = grid_rope((2, 2, 3), (4, 6, 6), 10000)
    whole, _ = block(img, txt, vec, rope)
    for targets in (1, 6, 12):
        part, _ = block(img, txt, vec, rope, targets)
        assert difference(part, whole[:, :targets]) <= 1e-6


def test_forty_narrow_blocks(tmp_path):
    config = {**TINY, "hidden_size": 32, "num_attention_heads": 2, "num_layers": 40, "mlp_width_ratio": 2.0}
    reference = reference_model(config)
    ours = ours_from(reference, tmp_path)
    batch = inputs(config, (1, 2, 16, 1, 6, 10), 5)
    wanted = reference(*batch, return_dict=False)[0]
    assert difference(ours(*batch).sample, wanted) < 1e-5
    assert difference(run_pieces(ours, *batch), wanted[:, -1]) < 1e-5


@pytest.mark.slow
def test_block_of_the_released_width():
    """4096 wide, 32 heads of 128; both sides hold the same 1.6 GB of weights."""
    with torch.device("meta"):
        theirs, ours = ReferenceBlock(4096, 32, 128), DoubleStreamBlock(4096, 32, 16384)
    randomize(theirs.to_empty(device="cpu"))
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    generator = torch.Generator().manual_seed(2)
    img, txt = torch.randn(1, 24, 4096, generator=generator), torch.randn(1, 5, 4096, generator=generator)
    vec = 0.5 * torch.randn(1, 6, 4096, generator=generator)
    cos, sin = grid_rope((2, 3, 4), (16, 56, 56), 10000)
    tables = cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1)
    with torch.no_grad():
        wanted_img, wanted_txt = theirs(img, txt, vec, (tables, None))
        got_img, got_txt = ours(img, txt, vec, (cos, sin))
        target, _ = ours(img, txt, vec, (cos, sin), 12)
    assert difference(got_img, wanted_img) < 1e-5
    assert difference(got_txt, wanted_txt) < 1e-5
    assert difference(target, wanted_img[:, :12]) < 1e-5


@pytest.mark.parametrize("bf16_units", [True, False])
@pytest.mark.parametrize("name", ["one reference, batch 2", "three tiny layers"])
def test_bf16_is_no_further_from_fp64_than_the_reference(name, bf16_units, tmp_path, monkeypatch):
    config, shape, length = CASES[name]
    reference_model(config).to(torch.bfloat16).save_pretrained(tmp_path)  # every weight rounded, as published
    monkeypatch.setattr(ops, "CPU_HAS_BF16", bf16_units)
    theirs = Reference.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = JoyImageEditTransformer3DModel.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16, new_parameters=NEW_PARAMETERS
    )
    kept = {name for name, parameter in ours.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {name for name, parameter in theirs.named_parameters() if parameter.dtype == torch.float32}
    assert len(kept) == 4

    latents, timestep, prompt = inputs(config, shape, length)
    latents, prompt = latents.bfloat16(), prompt.bfloat16()
    exact = Reference.from_pretrained(tmp_path).double()
    with torch.no_grad():
        wanted = exact(latents.double(), timestep, prompt.double(), return_dict=False)[0]
        their_error = difference(theirs(latents, timestep, prompt, return_dict=False)[0], wanted)
    got = ours(latents, timestep, prompt).sample
    assert got.dtype == torch.bfloat16
    assert difference(got, wanted) < 2 * their_error
    target = run_pieces(ours, latents, timestep, prompt)
    assert target.dtype == (torch.bfloat16 if bf16_units else torch.float32)
    assert difference(target, wanted[:, -1]) < 2 * their_error


def test_half_precision_keeps_the_time_embedder():
    model = JoyImageEditTransformer3DModel.from_config(TINY).bfloat16()
    assert model.dtype == torch.bfloat16
    kept = [name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32]
    assert len(kept) == 4 and all(name.startswith("condition_embedder.time_embedder.") for name in kept)


@needs_shared
@pytest.mark.parametrize("case", ["n1", "n2", "n3", "five_dim", "five_dim_frames"])
def test_recorded_outputs(case):
    recorded = load_file(GOLDENS / "joyimage/transformer.safetensors")
    folder = GOLDENS / "tiny-joyimage-edit"
    ours = JoyImageEditTransformer3DModel.from_pretrained(
        folder, subfolder="transformer", dtype=torch.float32
    )
    batch = [recorded[f"{case}.{name}"] for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    # The recording machine's exp differs by an ulp, which a timestep of 1000 makes an angle of 1e-4: the live
    # reference is 8e-6 from its own recording. The blocks below start from the recorded conditioning.
    assert difference(ours(*batch).sample, recorded[f"{case}.output"]) < 3e-5
    if case != "n2":
        return
    latents, timestep, prompt = batch
    txt, vec = ours.embed_text(prompt), recorded["n2.timestep_proj"].unflatten(1, (6, -1))
    assert difference(txt, recorded["n2.txt"]) < 1e-5
    assert difference(ours.embed_time(timestep), vec) < 1e-5
    img, rope = ours.embed_image(latents.flip(1)), ours.rope(ours.token_grid(latents))
    for i, block in enumerate(ours.double_blocks):
        img, txt = block(img, txt, vec, rope)
        assert difference(img, recorded[f"n2.block_{i}.img"]) < 1e-5
        assert difference(txt, recorded[f"n2.block_{i}.txt"]) < 1e-5


def test_time_embedding_values():
    got = sinusoidal_embedding(torch.tensor([437.5]), 256)[0]
    wanted = {0: -0.6832286716, 1: 0.2850187719, 2: -0.2930929363, 127: 0.9988950491}
    wanted |= {128: -0.7302044631, 129: -0.9585219622, 255: 0.0469967611}
    torch.testing.assert_close(got[list(wanted)], torch.tensor(list(wanted.values())), rtol=0, atol=1e-6)


def test_rope_values():
    cos, sin = JoyImageEditTransformer3DModel.from_config({**WIDE_HEAD, "num_layers": 1}).rope((2, 4, 5))
    pairs = [column // 2 for column in (0, 2, 16, 18, 72, 74)]  # row 33 is frame 1, row 2, column 3
    wanted_cos = torch.tensor([0.5403023, 0.9504153, -0.4161468, 0.131047, -0.9899925, -0.554915])
    wanted_sin = torch.tensor([0.841471, 0.3109836, 0.9092974, 0.9913762, 0.14112, 0.831907])
    torch.testing.assert_close(cos[33, pairs], wanted_cos, rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[33, pairs], wanted_sin, rtol=0, atol=1e-6)
    assert cos.shape == sin.shape == (40, 64)


@pytest.fixture(scope="module")
def released():
    """The network at its defaults and the reference at the released config, both without memory."""
    with torch.device("meta"):
        ours = JoyImageEditTransformer3DModel()
        theirs = Reference.from_config({**ours.config.to_dict()})
    return ours, theirs


def published(module):
    """The published names and their shapes: without what a fork adds."""
    found = shapes(module)
    new = NewParameters(NEW_PARAMETERS).among(found)
    return {name: shape for name, shape in found.items() if name not in new}


def test_released_names_and_shapes(released):
    ours, theirs = released
    assert len(published(ours)) == 894
    assert published(ours) == shapes(theirs)
    assert sum(torch.Size(shape).numel() for shape in published(ours).values()) == 16_263_675_968
    assert dict(ours.named_buffers()) == {}


def test_recorded_names_and_shapes(released, shared_data):
    assert published(released[0]) == recorded_shapes(shared_data, "joyimage_transformer")


ORIGINAL_NAMES = {  # written out by hand: ours -> original
    "img_in.weight": "img_in.weight",
    "condition_embedder.time_embedder.linear_1.weight": "condition_embedder.time_embedder.linear_1.weight",
    "condition_embedder.text_embedder.linear_2.bias": "condition_embedder.text_embedder.linear_2.bias",
    "double_blocks.0.attn.img_attn_qkv.weight": "double_blocks.0.img_attn_qkv.weight",
    "double_blocks.0.attn.txt_attn_qkv.bias": "double_blocks.0.txt_attn_qkv.bias",
    "double_blocks.7.attn.img_attn_q_norm.weight": "double_blocks.7.img_attn_q_norm.weight",
    "double_blocks.39.attn.txt_attn_k_norm.weight": "double_blocks.39.txt_attn_k_norm.weight",
    "double_blocks.12.attn.txt_attn_proj.bias": "double_blocks.12.txt_attn_proj.bias",
    "double_blocks.25.img_mod.modulate_table": "double_blocks.25.img_mod.modulate_table",
    "double_blocks.39.txt_mlp.net.0.proj.weight": "double_blocks.39.txt_mlp.net.0.proj.weight",
}


def original_name(key):
    return ORIGINAL_NAMES.get(key) or key.replace(".attn.", ".")


FOREIGN = {
    "original": original_name,
    "comfyui": lambda key: "model.diffusion_model." + key,
    "comfyui-original": lambda key: "model.diffusion_model." + original_name(key),
}


@pytest.mark.parametrize("layout", FOREIGN)
def test_released_names_in_foreign_layouts(layout, released):
    wanted = shapes(released[1])
    name = FOREIGN[layout]
    found = {name(key): shape for key, shape in wanted.items()}
    assert len(found) == 894
    plan = plan_conversion(layouts(released[0].config), found, wanted)
    assert plan.layout.name == layout and not plan.dropped
    assert {key: step.sources for key, step in plan.steps.items()} == {key: (name(key),) for key in wanted}
    changed = sum(key != name(key).removeprefix("model.diffusion_model.") for key in wanted)
    assert changed == (480 if "original" in layout else 0)


def test_hand_written_names_follow_the_rule(released):
    assert set(ORIGINAL_NAMES) <= set(shapes(released[1]))
    assert all(key.replace(".attn.", ".") == name for key, name in ORIGINAL_NAMES.items())


@pytest.mark.parametrize("layout", FOREIGN)
def test_values_from_foreign_layouts(layout, tmp_path):
    reference = reference_model(TINY)
    ours = ours_from(reference, tmp_path, rename=FOREIGN[layout])
    got = ours.state_dict()
    assert all(torch.equal(got[name], tensor) for name, tensor in reference.state_dict().items())


@pytest.mark.parametrize("wrapped", [True, False])
def test_original_pickle(wrapped, tmp_path):
    reference = reference_model(TINY)
    state = {original_name(key): tensor for key, tensor in reference.state_dict().items()}
    torch.save({"model": state} if wrapped else state, tmp_path / "transformer.pth")
    config = JoyImageEditConfig.from_dict(dict(reference.config))
    files = TensorFiles([tmp_path / "transformer.pth"])
    ours = load_network(JoyImageEditTransformer3DModel, config, files, None, NEW_PARAMETERS)
    batch = inputs(TINY, (1, 2, 16, 1, 6, 10), 5)
    assert difference(ours(*batch).sample, reference(*batch, return_dict=False)[0]) < 1e-5


def test_layouts_run_backwards():
    state = reference_model(TINY).state_dict()
    written = check_layouts_run_backwards(layouts(JoyImageEditConfig.from_dict(TINY)), state)
    for layout, foreign in written.items():
        name = FOREIGN.get(layout, lambda key: key)
        assert len(foreign) == len(state) and set(foreign) == {name(key) for key in state}


@pytest.mark.parametrize("layout", ["diffusers", *FOREIGN])
@pytest.mark.parametrize("damage", ["unknown", "missing", "shape"])
def test_files_that_do_not_fit_are_refused(layout, damage, tmp_path):
    name = FOREIGN.get(layout, lambda key: key)
    state = {name(key): tensor for key, tensor in reference_model(TINY).state_dict().items()}
    ours = "double_blocks.1.attn.txt_attn_q_norm.weight"
    if damage == "unknown":
        bad = name("double_blocks.1.attn.txt_attn_extra.weight")
        state[bad] = torch.zeros(3)
    elif damage == "missing":
        bad = ours
        del state[name(ours)]
    else:
        bad = name(ours)
        state[bad] = torch.zeros(17)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=bad.replace(".", r"\.")):
        files = TensorFiles([tmp_path / "weights.safetensors"])
        config = JoyImageEditConfig.from_dict(TINY)
        load_network(JoyImageEditTransformer3DModel, config, files, None, NEW_PARAMETERS)


def test_saved_folder_opens_in_the_reference(tmp_path):
    reference = reference_model(TINY)
    ours = ours_from(reference, tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    again = Reference.from_pretrained(tmp_path / "saved")
    assert {**again.config} == {**again.config, **ours.config.to_dict()}
    wanted = reference.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())


def test_fresh_weights_start_like_the_reference():
    """Tables at zero and everything else at the size that the reference draws."""
    theirs, ours = Reference.from_config(dict(TINY)), JoyImageEditTransformer3DModel.from_config(TINY)
    for name, wanted in theirs.named_parameters():
        got = ours.get_parameter(name)
        if wanted.numel() >= 1000 or not wanted.any():
            assert got.abs().mean().item() == pytest.approx(wanted.abs().mean().item(), rel=0.15), name


def test_config_defaults_are_the_released_ones():
    config = JoyImageEditConfig()
    assert (config.hidden_size, config.num_attention_heads, config.num_layers) == (4096, 32, 40)
    assert (config.head_dim, config.rope_dims, config.theta) == (128, (16, 56, 56), 10000)
    assert config["patch_size"] == config.patch_size == (1, 2, 2)


def test_early_config_spellings():
    early = {
        "_class_name": "JoyImageEditTransformer3DModel",
        "hidden_size": 48,
        "heads_num": 3,
        "mm_double_blocks_depth": 5,
        "text_states_dim": 20,
        "rope_theta": 256,
        "rope_dim_list": [4, 6, 6],
        "attn_backend": "torch_spda",
        "dit_modulation_type": "wanx",
        "is_repa": True,
        "repa_layer": 13,
        "unpatchify_new": True,
        "enable_activation_checkpointing": True,
    }
    plain = {**TINY, "num_layers": 5, "theta": 256}
    assert JoyImageEditConfig.from_dict(early) == JoyImageEditConfig.from_dict(plain)
    assert "heads_num" not in JoyImageEditConfig.from_dict(early).to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"rope_type": "mrope"},
        {"dit_modulation_type": "adaln"},
        {"unpatchify_new": False},
        {"rope_dim_list": [4, 6, 8]},
        {"rope_dim_list": [5, 5, 6]},
        {"rope_dim_list": [8, 8]},
        {"rope_dim_list": None, "num_attention_heads": 6, "hidden_size": 60},
        {"num_attention_heads": 5},
        {"num_layers": 0},
        {"patch_size": [2, 2]},
        {"guidance_embeds": True},
    ],
    ids=str,
)
def test_unsupported_configs_are_refused(change):
    name = next(iter(change))
    with pytest.raises(ValueError, match=name):
        JoyImageEditConfig.from_dict({**TINY, **change})


def test_unknown_config_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"'num_layer' \(did you mean 'num_layers'\?\)"):
        JoyImageEditConfig.from_dict({"num_layer": 40})


@pytest.mark.parametrize(
    ("patch", "shape", "message"),
    [
        ([1, 2, 2], (1, 2, 16, 1, 5, 6), "multiples of the patch"),
        ([1, 2, 2], (1, 2, 15, 1, 4, 6), "wanted"),
        ([1, 2, 2], (16, 1, 4, 6), "wanted"),
        ([2, 2, 2], (1, 2, 16, 2, 4, 6), "patch_size"),
    ],
)
def test_latents_that_do_not_fit_are_refused(patch, shape, message):
    model = JoyImageEditTransformer3DModel.from_config({**TINY, "patch_size": patch})
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(shape), torch.zeros(1), torch.zeros(1, 3, 20))
    with pytest.raises(ValueError, match="prompt embeddings"):
        model.embed_text(torch.zeros(1, 3, 21))


def test_nothing_is_convolved(monkeypatch):
    """The patch embedding is a matrix product: a bf16 conv3d takes 150 times as long on a CPU."""
    model = JoyImageEditTransformer3DModel.from_config(TINY)
    monkeypatch.delattr(torch.nn.functional, "conv3d")
    with torch.no_grad():
        model(*inputs(TINY, (1, 2, 16, 1, 6, 10), 5))
