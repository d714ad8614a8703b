"""ChronoEdit's transformer against diffusers: values, names, layouts, and the pieces against the whole."""

import json

import pytest
import torch
from diffusers import ChronoEditTransformer3DModel as Reference
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

from joyedit import ops
from joyedit.checkpoints.lora_files import find_layer, layer_spellings
from joyedit.checkpoints.network import build_on_meta, load_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.chronoedit_dit import layouts
from joyedit.convert.table import plan_conversion
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from tests.parity.same_weights import check_layouts_run_backwards, difference, recorded_shapes, shapes

# What a fork adds to the network, as patterns ("*.temperature"): the reference has no such tensors.
NEW_PARAMETERS: tuple[str, ...] = ()

TINY = dict(
    num_attention_heads=3,
    attention_head_dim=8,
    in_channels=7,
    out_channels=4,
    text_dim=20,
    freq_dim=16,
    ffn_dim=40,
    num_layers=3,
    image_dim=18,
    added_kv_proj_dim=24,
)
WIDE_HEAD = {  # head width, and with it the rotary split, of the released model
    **TINY,
    **dict(num_attention_heads=2, attention_head_dim=128, in_channels=36, out_channels=16, freq_dim=256),
    **dict(num_layers=2, added_kv_proj_dim=256),
}
JOINT = {**TINY, "added_kv_proj_dim": None}  # image and text tokens in one softmax
NO_IMAGE = {**JOINT, "image_dim": None}
TEXT = 512  # rows of a prompt; with added K/V the reference counts on them

# name: config, latents (B, C, T, H, W), text rows, image tokens
CASES = {
    "edit, batch 2": (TINY, (2, 7, 2, 10, 6), TEXT, 5),
    "one frame": (TINY, (2, 7, 1, 6, 14), TEXT, 9),
    "reasoning, eight frames": (TINY, (1, 7, 8, 6, 10), TEXT, 257),
    "three frames, released head": (WIDE_HEAD, (1, 36, 3, 10, 6), TEXT, 5),
    "edit, released head": (WIDE_HEAD, (2, 36, 2, 6, 10), TEXT, 7),
    "added K/V without an image": (TINY, (2, 7, 2, 6, 10), TEXT, None),
    "no norm, another epsilon": (
        {**TINY, "cross_attn_norm": False, "eps": 1e-3, "patch_size": [1, 3, 2]},
        (2, 7, 2, 9, 10),
        TEXT,
        5,
    ),
    "joint, edit, batch 2": (JOINT, (2, 7, 2, 10, 6), 11, 5),
    "joint, one frame, another epsilon": ({**JOINT, "eps": 1e-3}, (1, 7, 1, 6, 14), TEXT, 4),
    "joint, eight frames": ({**JOINT, "attention_head_dim": 12}, (2, 7, 8, 6, 10), 3, 6),
    "no image, edit, batch 2": (NO_IMAGE, (2, 7, 2, 6, 10), 13, None),
    "no image, eight frames": ({**NO_IMAGE, "attention_head_dim": 32}, (1, 7, 8, 10, 6), 5, None),
    "no image, one frame": ({**NO_IMAGE, "out_channels": None}, (2, 7, 1, 2, 6), 1, None),
    "another jump": ({**TINY, "rope_temporal_skip_len": 5}, (1, 7, 2, 6, 10), TEXT, 5),
    "a jump beyond the table": (
        {**TINY, "rope_temporal_skip_len": 30, "rope_max_seq_len": 12},
        (1, 7, 2, 6, 10),
        TEXT,
        5,
    ),
}


@torch.no_grad()
def randomize(module, seed=0):
    """Weights of the size that keeps activations near 1; tables, biases and norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(1 + 0.3 * noise)
        elif name.endswith("scale_shift_table"):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return module.requires_grad_(False).eval()


def reference_model(config, seed=0):
    return randomize(Reference.from_config(dict(config)), seed)


def ours_from(reference, folder, rename=None):
    """Our network from the reference's weights, through a file and the loader."""
    state = {rename[k] if rename else k: tensor for k, tensor in reference.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    files = TensorFiles([folder / "weights.safetensors"])
    config = ChronoEditConfig.from_dict(dict(reference.config))
    return load_network(ChronoEditTransformer3DModel, config, files, new_parameters=NEW_PARAMETERS)


def inputs(config, shape, length, tokens, seed=1):
    """The arguments of `forward`; the last third of a prompt is padding."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(shape, generator=generator)
    timestep = 1000 * torch.rand(shape[0], generator=generator)
    prompt = torch.randn(shape[0], length, config["text_dim"], generator=generator)
    prompt[:, length - length // 3 :] = 0
    if tokens is None:
        return latents, timestep, prompt, None
    return latents, timestep, prompt, torch.randn(shape[0], tokens, config["image_dim"], generator=generator)


def run_pieces(model, latents, timestep, prompt, image):
    """The velocity as a pipeline computes it."""
    vec, rope = model.embed_time(timestep), model.rope(model.token_grid(latents))
    text = model.embed_text(prompt)
    return model.predict(latents, vec, text, None if image is None else model.embed_image(image), rope)


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_reference(name, tmp_path):
    config, shape, length, tokens = CASES[name]
    reference = reference_model(config)
    ours = ours_from(reference, tmp_path)
    batch = inputs(config, shape, length, tokens)
    wanted = reference(*batch, return_dict=False)[0]
    got = ours(*batch)
    assert got.sample.dtype == torch.float32
    assert difference(got.sample, wanted) < 1e-5
    (as_tuple,) = ours(*batch, return_dict=False, attention_kwargs={"scale": 1.0})
    assert torch.equal(as_tuple, got.sample)
    assert torch.equal(run_pieces(ours, *batch), got.sample)


@pytest.mark.parametrize("config", [TINY, JOINT], ids=["added", "joint"])
def test_pieces_are_what_a_pipeline_caches(config, tmp_path, monkeypatch):
    """One vector of a whole schedule; a photograph of one sample for two; K and V are not computed again."""
    reference = reference_model(config)
    ours = ours_from(reference, tmp_path)
    latents, _, prompts, image = inputs(config, (2, 7, 2, 6, 10), TEXT, 5)
    image = image[:1]
    timesteps = torch.tensor([999, 750, 3])
    vec = ours.embed_time(timesteps)
    assert vec.shape == (3, 7, 24) and vec.dtype == torch.float32
    temb, six, _, _ = reference.condition_embedder(timesteps, prompts)
    assert difference(vec[:, :6], six.unflatten(1, (6, -1))) < 1e-6
    assert difference(vec[:, 6], temb) < 1e-6
    rope = ours.rope(ours.token_grid(latents))
    texts, photograph = ours.embed_text(prompts), ours.embed_image(image)

    visits, others = [], 2 * prompts
    hooks = [block.register_forward_pre_hook(lambda m, _: visits.append(m)) for block in ours.blocks]
    branches = ours.predict_branches(latents, vec[1], [texts, ours.embed_text(others)], photograph, rope)
    assert visits == [block for block in ours.blocks for _ in branches]
    for hook in hooks:
        hook.remove()
    for got, prompt in zip(branches, (prompts, others), strict=True):
        args = latents, timesteps[1:2], prompt, image.expand(2, -1, -1)
        assert difference(got, reference(*args, return_dict=False)[0]) < 1e-5

    called = []
    for name, module in ours.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    for i, timestep in enumerate(timesteps):
        got = ours.predict(latents, vec[i], texts, photograph, rope)
        for j in (0, 1):
            args = latents[j : j + 1], timestep[None], prompts[j : j + 1], image
            assert difference(got[j : j + 1], reference(*args, return_dict=False)[0]) < 1e-5
    assert not [name for name in called if "condition_embedder" in name]
    assert {n.rpartition(".")[2] for n in called if ".attn2." in n} == {"to_q", "norm_q", "0"}


def test_text_of_any_length_with_added_keys(tmp_path):
    """The reference needs 512 rows: each of 64 eight times is the same softmax."""
    reference = reference_model(TINY)
    ours = ours_from(reference, tmp_path)
    latents, timestep, prompt, image = inputs(TINY, (2, 7, 2, 6, 10), 64, 5)
    image = 0.01 * image  # small enough to tell the epsilon of the image embedder's norms
    wanted = reference(latents, timestep, prompt.repeat(1, 8, 1), image, return_dict=False)[0]
    assert difference(ours(latents, timestep, prompt, image).sample, wanted) < 1e-5


@pytest.mark.parametrize("config", [WIDE_HEAD, {**JOINT, "num_layers": 2}], ids=["added", "joint"])
def test_each_block_equals_the_reference(config, tmp_path):
    reference = reference_model(config)
    ours = ours_from(reference, tmp_path)
    seen = []
    for block in reference.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    latents, timestep, prompt, image = inputs(config, (2, config["in_channels"], 2, 10, 6), TEXT, 7)
    reference(latents, timestep, prompt, image)
    text, photograph = ours.embed_text(prompt), ours.embed_image(image)
    rope = ours.rope((2, 5, 3))
    for i, (block, (args, wanted)) in enumerate(zip(ours.blocks, seen, strict=True)):
        x, context, vec, tables = args
        assert context.shape[1] == TEXT + 7
        assert torch.equal(rope[0], tables[0][0, :, 0, ::2]) and torch.equal(
            rope[1], tables[1][0, :, 0, 1::2]
        )
        assert difference(block(x, vec, text[i], photograph[i], rope), wanted) < 1e-5


@pytest.mark.slow
def test_forty_narrow_blocks(tmp_path):
    config = {**TINY, "num_layers": 40}
    reference = reference_model(config)
    ours = ours_from(reference, tmp_path)
    batch = inputs(config, (1, 7, 2, 6, 10), TEXT, 5)
    assert difference(ours(*batch).sample, reference(*batch, return_dict=False)[0]) < 1e-5


def kept_in_fp32(module):
    return {name for name, parameter in module.named_parameters() if parameter.dtype == torch.float32}


@pytest.mark.parametrize("bf16_units", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "edit, released head",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("edit, batch 2", "joint, eight frames")),
    ],
)
def test_bf16_is_no_further_from_fp64_than_the_reference(name, bf16_units, tmp_path, monkeypatch):
    config, shape, length, tokens = CASES[name]
    reference_model(config).to(torch.bfloat16).save_pretrained(tmp_path)  # every weight rounded
    monkeypatch.setattr(ops, "CPU_HAS_BF16", bf16_units)
    theirs = Reference.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = ChronoEditTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert kept_in_fp32(ours) == kept_in_fp32(theirs)

    latents, timestep, prompt, image = inputs(config, shape, length, tokens)
    batch = latents.bfloat16(), timestep, prompt.bfloat16(), image.bfloat16()
    exact = Reference.from_pretrained(tmp_path).double()
    with torch.no_grad():
        wanted = exact(*(t.double() for t in batch), return_dict=False)[0]
        their_error = difference(theirs(*batch, return_dict=False)[0], wanted)
    got = ours(*batch).sample
    assert got.dtype == torch.bfloat16
    assert difference(got, wanted) < 2 * their_error
    in_fp32 = run_pieces(ours, batch[0].float(), *batch[1:])
    assert in_fp32.dtype == torch.float32 and difference(in_fp32, wanted) < 2 * their_error


@torch.no_grad()
def test_modulation_is_not_rounded_to_bf16():
    """A gate of 1.0035, which bf16 holds as 1, on an MLP's 256 over a residual of -256."""
    block = ChronoEditTransformer3DModel.from_config(TINY).bfloat16().blocks[0]
    for layer in (block.attn1.to_out[0], block.attn2.to_out[0], block.ffn.net[2]):
        layer.weight.zero_()
        layer.bias.fill_(256 if layer is block.ffn.net[2] else 0)
    block.scale_shift_table.zero_()
    vec = torch.zeros(1, 6, 24)
    vec[:, 5] = 1.0035
    x = torch.full((1, 4, 24), -256.0, dtype=torch.bfloat16)
    text = torch.zeros(2, 1, 1, 3, 8, dtype=torch.bfloat16).unbind()
    out = block(x, vec, text, None, (torch.ones(4, 4), torch.zeros(4, 4)))
    assert out.unique().item() == pytest.approx(256 * 0.0035, rel=2**-8)


def test_half_precision_keeps_tables_norms_and_time():
    model = ChronoEditTransformer3DModel.from_config(TINY).bfloat16()
    assert model.dtype == torch.bfloat16
    parts = ("time_embedder.", "image_embedder.norm", ".norm2.", "scale_shift_table")
    names = {name for name, _ in model.named_parameters()}
    assert kept_in_fp32(model) == {name for name in names if any(part in name for part in parts)}
    assert "blocks.1.attn1.norm_q.weight" in names - kept_in_fp32(model)


@pytest.mark.parametrize("width", [8, 12, 24, 30, 32, 128])
def test_rope_equals_the_reference(width):
    config = {**NO_IMAGE, "num_layers": 1, "attention_head_dim": width}
    ours, reference = ChronoEditTransformer3DModel.from_config(config), Reference.from_config(config)
    for frames in (1, 2, 3, 8):
        cos, sin = ours.rope((frames, 5, 3))
        wanted_cos, wanted_sin = reference.rope(torch.zeros(1, 7, frames, 10, 6))
        assert torch.equal(cos.repeat_interleave(2, 1), wanted_cos[0, :, 0])
        assert torch.equal(sin.repeat_interleave(2, 1), wanted_sin[0, :, 0])


def test_two_frames_are_seven_apart():
    model = ChronoEditTransformer3DModel.from_config({**WIDE_HEAD, "num_layers": 1})
    assert model.config.rope_dims == (44, 42, 42)
    pair, video = model.rope((2, 5, 3)), model.rope((8, 5, 3))
    for two, eight in zip(pair, video, strict=True):
        assert torch.equal(two[:15], eight[:15]) and torch.equal(two[15:], eight[-15:])
    assert pair[1][15, 0].item() == pytest.approx(0.6569866)  # sin 7
    assert not torch.equal(model.rope((3, 5, 3))[0][-15:], pair[0][15:])


@pytest.fixture(scope="module")
def released(shared_data):
    """The network of the published config and the reference, both without memory."""
    config = json.loads((shared_data / "chronoedit-14b/transformer/config.json").read_text())
    ours = build_on_meta(ChronoEditTransformer3DModel, ChronoEditConfig.from_dict(config))
    with torch.device("meta"):
        theirs = Reference.from_config(config)
    return ours, theirs


def test_released_names_and_shapes(released, shared_data):
    ours, theirs = released
    assert ours.config == ChronoEditConfig()
    assert shapes(ours) == shapes(theirs) == recorded_shapes(shared_data, "chronoedit_transformer")
    assert len(shapes(ours)) == 1303
    sizes = {name: parameter.numel() for name, parameter in ours.named_parameters()}
    assert sum(sizes.values()) == 16_394_878_784
    assert sum(size for name, size in sizes.items() if name.startswith("blocks.7.")) == 403_838_464
    assert sum(size for name, size in sizes.items() if ours.stays_fp32(name)) == 29_196_800
    assert dict(ours.named_buffers()) == {}


ORIGINAL_NAMES = {  # written out by hand: ours -> original
    "patch_embedding.weight": "patch_embedding.weight",
    "condition_embedder.time_proj.bias": "time_projection.1.bias",
    "condition_embedder.image_embedder.ff.net.2.weight": "img_emb.proj.3.weight",
    "blocks.0.attn1.to_out.0.weight": "blocks.0.self_attn.o.weight",
    "blocks.39.attn1.norm_q.weight": "blocks.39.self_attn.norm_q.weight",
    "blocks.12.attn2.add_k_proj.bias": "blocks.12.cross_attn.k_img.bias",
    "blocks.7.attn2.norm_added_k.weight": "blocks.7.cross_attn.norm_k_img.weight",
    "blocks.7.norm2.weight": "blocks.7.norm3.weight",
    "blocks.25.ffn.net.0.proj.weight": "blocks.25.ffn.0.weight",
    "blocks.25.scale_shift_table": "blocks.25.modulation",
    "scale_shift_table": "head.modulation",
    "proj_out.bias": "head.head.bias",
}
PREFIXES = {  # layout -> prefix, and whether the original names follow
    "original": ("", True),
    "comfyui": ("model.diffusion_model.", True),
    "comfyui-short": ("diffusion_model.", True),
    "comfyui-diffusers": ("model.diffusion_model.", False),
    "comfyui-short-diffusers": ("diffusion_model.", False),
}


def foreign_names(layout, module):
    """Ours -> the layout's, by the reference's own converter run on an inverse that it checks."""
    prefix, original = PREFIXES[layout]
    names = list(module.state_dict())
    if not original:
        return {name: prefix + name for name in names}
    table = next(found for found in layouts(module.config) if found.name == "original")
    marks = {name: torch.tensor(i) for i, name in enumerate(names)}
    converted = convert_wan_transformer_to_diffusers(table.invert(marks))
    assert {name: int(mark) for name, mark in converted.items()} == {n: i for i, n in enumerate(names)}
    return {names[int(mark)]: prefix + foreign for foreign, mark in table.invert(marks).items()}


@pytest.mark.parametrize("layout", PREFIXES)
def test_released_names_in_foreign_layouts(layout, released):
    ours, theirs = released
    name, wanted = foreign_names(layout, ours), shapes(theirs)
    if PREFIXES[layout][1]:
        prefix = PREFIXES[layout][0]
        assert {key: name[key].removeprefix(prefix) for key in ORIGINAL_NAMES} == ORIGINAL_NAMES
    found = {name[key]: shape for key, shape in wanted.items()}
    assert len(found) == 1303
    plan = plan_conversion(ours.layouts(), found, wanted)
    assert plan.layout.name == layout and not plan.dropped
    assert {key: step.sources for key, step in plan.steps.items()} == {key: (name[key],) for key in wanted}


@pytest.mark.parametrize("config", [TINY, NO_IMAGE], ids=["added", "no image"])
@pytest.mark.parametrize("layout", PREFIXES)
def test_values_from_foreign_layouts(layout, config, tmp_path):
    reference = reference_model(config)
    names = foreign_names(layout, ChronoEditTransformer3DModel.from_config(config))
    ours = ours_from(reference, tmp_path, rename=names)
    wanted = reference.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.state_dict().items())


def test_layouts_run_backwards():
    state = reference_model(TINY).state_dict()
    written = check_layouts_run_backwards(layouts(ChronoEditConfig.from_dict(TINY)), state)
    assert {len(foreign) for foreign in written.values()} == {len(state)}


def test_every_layer_is_found_in_every_spelling_of_adapters():
    network = build_on_meta(ChronoEditTransformer3DModel, ChronoEditConfig.from_dict(TINY))
    spellings = layer_spellings({"transformer": network})
    original = foreign_names("original", network)
    for ours, theirs in original.items():
        if not ours.endswith(".weight"):
            continue
        ours, theirs = ours.removesuffix(".weight"), theirs.removesuffix(".weight")
        for key in (
            f"transformer.{ours}.lora_A.weight",
            f"diffusion_model.{theirs}.lora_B.weight",
            f"{theirs}.lora_A.default.weight",
            f"lora_unet_{theirs.replace('.', '_')}.lora_up.weight",
            f"diffusion_model.{theirs}.diff",
        ):
            found = find_layer(key, spellings)
            assert found is not None and found[0] == ("transformer", ours), key


def test_original_pickle(tmp_path):
    reference = reference_model(TINY)
    names = foreign_names("original", reference)
    torch.save({names[k]: tensor for k, tensor in reference.state_dict().items()}, tmp_path / "wan.pth")
    config = ChronoEditConfig.from_dict(TINY)
    ours = load_network(ChronoEditTransformer3DModel, config, TensorFiles([tmp_path / "wan.pth"]))
    batch = inputs(TINY, (1, 7, 2, 6, 10), TEXT, 5)
    assert difference(ours(*batch).sample, reference(*batch, return_dict=False)[0]) < 1e-5


def test_a_stray_norm_of_image_queries_is_dropped(tmp_path):
    state = reference_model(TINY).state_dict()
    state["blocks.2.attn2.norm_added_q.weight"] = torch.ones(24)
    save_file(state, tmp_path / "weights.safetensors")
    files = TensorFiles([tmp_path / "weights.safetensors"])
    ours = load_network(ChronoEditTransformer3DModel, ChronoEditConfig.from_dict(TINY), files)
    assert all(torch.equal(tensor, state[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("layout", ["diffusers", "original", "comfyui"])
@pytest.mark.parametrize("damage", ["unknown", "missing", "shape"])
def test_files_that_do_not_fit_are_refused(layout, damage, tmp_path):
    reference = reference_model(TINY)
    names = {name: name for name in reference.state_dict()}
    names = names if layout == "diffusers" else foreign_names(layout, reference)
    state = {names[k]: tensor for k, tensor in reference.state_dict().items()}
    ours = "blocks.1.attn2.norm_added_k.weight"
    bad = names[ours] if damage != "missing" else ours
    if damage == "unknown":
        bad = bad.replace("_k", "_extra")
        state[bad] = torch.zeros(3)
    elif damage == "missing":
        del state[names[ours]]
    else:
        state[bad] = torch.zeros(17)
    save_file(state, tmp_path / "weights.safetensors")
    files = TensorFiles([tmp_path / "weights.safetensors"])
    with pytest.raises(ValueError, match=bad.replace(".", r"\.")):
        load_network(ChronoEditTransformer3DModel, ChronoEditConfig.from_dict(TINY), files)


def test_saved_folder_opens_in_the_reference(tmp_path):
    reference = reference_model(TINY)
    ours = ours_from(reference, tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    again = Reference.from_pretrained(tmp_path / "saved")
    assert {**again.config} == {**again.config, **ours.config.to_dict()}
    wanted = reference.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())


def test_fresh_weights_start_like_the_reference():
    theirs, ours = Reference.from_config(dict(TINY)), ChronoEditTransformer3DModel.from_config(TINY)
    fresh = dict(ours.named_parameters())
    for name, wanted in theirs.named_parameters():
        if wanted.numel() >= 1000 or not (wanted - wanted.flatten()[0]).any():
            assert fresh[name].abs().mean().item() == pytest.approx(wanted.abs().mean().item(), rel=0.15), (
                name
            )
    tables = torch.stack([block.scale_shift_table for block in ours.blocks])
    assert tables.std().item() == pytest.approx(24**-0.5, rel=0.15)


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": "rms_norm"},
        {"pos_embed_seq_len": 514},
        {"attention_head_dim": 16},
        {"attention_head_dim": 9, "added_kv_proj_dim": 27},
        {"attention_head_dim": 64, "added_kv_proj_dim": 192},
        {"added_kv_proj_dim": 25},
        {"added_kv_proj_dim": 24, "image_dim": None},
        {"patch_size": [2, 2, 2]},
        {"patch_size": [2, 2]},
        {"freq_dim": 15},
        {"num_layers": 0},
        {"rope_temporal_skip_len": 0},
        {"window_size": [-1, -1]},
    ],
    ids=str,
)
def test_unsupported_configs_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        ChronoEditConfig.from_dict({**TINY, **change})


def test_unknown_config_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"'num_layer' \(did you mean 'num_layers'\?\)"):
        ChronoEditConfig.from_dict({"num_layer": 40})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 7, 2, 5, 6)}, "multiples of the patch"),
        ({"hidden_states": torch.zeros(1, 8, 2, 4, 6)}, "wanted"),
        ({"hidden_states": torch.zeros(7, 2, 4, 6)}, "wanted"),
        ({"hidden_states": torch.zeros(1, 7, 2, 4, 2050)}, "no axis may be longer than 1024"),
        ({"timestep": torch.zeros(1, 12)}, "timestep"),
        ({"encoder_hidden_states": torch.zeros(1, 3, 21)}, "prompt embeddings"),
        ({"encoder_hidden_states_image": torch.zeros(3, 18)}, "image embeddings"),
        ({"attention_kwargs": {"scale": 0.5}}, "scale"),
        ({"attention_kwargs": {"gligen": 1}}, "gligen"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    given = dict(zip(names, inputs(TINY, (1, 7, 2, 4, 6), 3, 5), strict=True))
    model = ChronoEditTransformer3DModel.from_config(TINY)
    with pytest.raises(ValueError, match=message):
        model(**{**given, **change})


def test_pieces_that_do_not_fit_are_refused():
    model = ChronoEditTransformer3DModel.from_config(NO_IMAGE)
    with pytest.raises(ValueError, match="no image_dim"):
        model.embed_image(torch.zeros(1, 5, 18))
    with pytest.raises(ValueError, match=r"table of 48 tokens does not fit the grid \(2, 2, 3\)"):
        rope = model.rope((8, 2, 3))
        model.predict(
            torch.zeros(1, 7, 2, 4, 6),
            torch.zeros(7, 24),
            model.embed_text(torch.zeros(1, 3, 20)),
            None,
            rope,
        )


def test_nothing_is_convolved(monkeypatch):
    """The patch embedding is a matrix product: a bf16 conv3d takes 150 times as long on a CPU."""
    model = ChronoEditTransformer3DModel.from_config(TINY)
    monkeypatch.delattr(torch.nn.functional, "conv3d")
    with torch.no_grad():
        model(*inputs(TINY, (1, 7, 2, 6, 10), 5, 4))
