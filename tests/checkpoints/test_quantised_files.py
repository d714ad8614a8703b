"""Quantised weight files: ComfyUI's int8_convrot and scaled fp8 are kept as they are stored and mean what the
formula says, and whatever does not fit is refused by the name of its module."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import joyedit
from joyedit.checkpoints import quantised_files
from joyedit.checkpoints.network import build_on_meta, load_network, plan_network, putting_away
from joyedit.checkpoints.quantised_files import as_int8_convrot
from joyedit.checkpoints.summary import cells
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.eight_bits import quantise
from joyedit.lora import Adapters
from joyedit.models.chronoedit_dit import ChronoEditConfig, ChronoEditTransformer3DModel
from joyedit.models.clip import CLIPTextConfig, CLIPTextModel
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.sd_vae import AutoencoderKL, AutoencoderKLConfig
from joyedit.quantised import QuantisedLinear, quantised_weights

H4 = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
JOY = JoyImageEditConfig.from_dict(
    dict(hidden_size=64, num_attention_heads=2, num_layers=2, mlp_width_ratio=2.0, in_channels=4, text_dim=12)
    | dict(out_channels=4, rope_dim_list=[8, 12, 12])
)
CHRONO = ChronoEditConfig.from_dict(
    dict(num_attention_heads=2, attention_head_dim=12, added_kv_proj_dim=24, text_dim=8, ffn_dim=20)
    | dict(num_layers=1, image_dim=6, freq_dim=8)
)
MLP = "double_blocks.1.img_mlp.net.2"  # a layer of 128 inputs
QKV = "double_blocks.0.attn.txt_attn_qkv"


def plain_state(cls, config):
    """Random weights of every tensor of a network, in bf16 but for those that are always in fp32."""
    shapes = build_on_meta(cls, config).state_dict()
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(t.shape, generator=generator) / 8 for name, t in shapes.items()}
    return {name: t if cls.stays_fp32(name) else t.bfloat16() for name, t in made.items()}


def as_bytes(mark):
    return torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)


def as_int8(state, modules, group=16, mark=None):
    """The state with random numbers in place of the weights of `modules`, and what they mean in float64."""
    state, meant = dict(state), {}
    generator = torch.Generator().manual_seed(1)
    rotation = torch.ones(1, 1, dtype=torch.float64)
    while len(rotation) < group:
        rotation = torch.kron(rotation, H4)
    for module in modules:
        shape = state[f"{module}.weight"].shape
        stored = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        scale = torch.rand(shape[0], 1, generator=generator) / 1000
        weight = (stored.double() * scale).unflatten(1, (-1, group)) @ rotation
        meant[f"{module}.weight"] = weight.flatten(1)
        default = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
        state |= {f"{module}.weight": stored, f"{module}.weight_scale": scale}
        state[f"{module}.comfy_quant"] = as_bytes(mark or default)
    return state, meant


def joy_modules(state):
    return [*(name.removesuffix(".weight") for name in state if name.endswith("attn_qkv.weight")), MLP]


def opened(path, state, cls=JoyImageEditTransformer3DModel, config=JOY, dtype=None, metadata=None):
    save_file(state, path / "x.safetensors", metadata)
    return load_network(cls, config, TensorFiles([path / "x.safetensors"]), dtype)


@pytest.fixture(scope="module")
def joy():
    return plain_state(JoyImageEditTransformer3DModel, JOY)


def assert_means(network, meant):
    """Kept in eight bits, and within half a unit in the last place of bf16 what the formula says."""
    weights = quantised_weights(network)
    assert weights.keys() == meant.keys()
    for name, weight in weights.items():
        wide = weight.to(torch.float32)
        assert (wide - meant[name]).abs().max() <= 1e-6 * meant[name].abs().max(), name
        assert weight.stored.dtype.itemsize == 1


@pytest.mark.parametrize("params", [False, True])
@pytest.mark.parametrize("group", [4, *(pytest.param(g, marks=pytest.mark.slow) for g in (16, 64))])
@pytest.mark.parametrize("layout", ["diffusers", "original", "comfyui", "comfyui-original"])
def test_int8_convrot_of_the_transformer_in_every_layout(joy, tmp_path, layout, group, params):
    modules, fields = joy_modules(joy), {"convrot": True, "convrot_groupsize": group}
    mark = {"format": "int8_tensorwise"} | ({"params": fields} if params else fields)
    state, meant = as_int8(joy, modules, group, mark)
    prefix = "model.diffusion_model." if "comfyui" in layout else ""
    level = ".attn." if "original" in layout else "."
    state = {prefix + name.replace(level, "."): t for name, t in state.items()}
    network = opened(tmp_path, state)
    assert network.dtype is torch.bfloat16
    assert_means(network, meant)
    plain = {name: t for name, t in joy.items() if name not in meant}
    assert all(torch.equal(network.state_dict()[name], t) for name, t in plain.items())


def test_a_quantised_network_computes_as_the_one_it_stands_for(joy, tmp_path):
    """In fp32, beside a network that holds what the weights mean: the same output, but for roundings."""
    state, meant = as_int8(joy, joy_modules(joy))
    network = opened(tmp_path, state, dtype=torch.float32)
    other = opened(tmp_path, joy | {n: t.float() for n, t in meant.items()}, dtype=torch.float32)
    x, text = torch.randn(1, 2, 4, 1, 4, 6), torch.randn(1, 3, 12)
    results = [n(x, torch.tensor([300.0]), text, return_dict=False)[0] for n in (network, other)]
    assert network.dtype is torch.float32
    torch.testing.assert_close(*results, atol=1e-5 * results[1].abs().max().item(), rtol=0)


def test_its_dtype_is_that_of_computing_and_its_weights_stay_stored(joy, tmp_path):
    state, meant = as_int8(joy, [MLP])
    network = opened(tmp_path, state)
    for dtype in (torch.float16, torch.float32):
        assert network.to(dtype).dtype is dtype
        layer = network.get_submodule(MLP)
        assert layer.weight.dtype is dtype and layer.weight.stored.dtype is torch.int8
        assert layer.weight_scale.dtype is torch.float32
        assert_means(network, meant)
    assert opened(tmp_path, state, dtype=torch.float16).dtype is torch.float16
    count = sum(t.numel() for t in joy.values())
    assert network.num_parameters() == count and f"{count:,} parameters" in cells(network)


def test_the_weights_stay_parts_of_the_mapped_file(joy, tmp_path):
    """A safetensors file is one mapping, of which tensors that are used as they are stored are parts."""
    state, _ = as_int8(joy, [MLP, QKV])
    network = opened(tmp_path, state)
    start, places = 8, {}
    content = (tmp_path / "x.safetensors").read_bytes()
    start += int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:start]).items():
        places[name] = entry["data_offsets"][0]
    weights = network.state_dict()
    apart = weights[f"{MLP}.weight"].data_ptr() - weights[f"{QKV}.weight"].data_ptr()
    assert apart == places[f"{MLP}.weight"] - places[f"{QKV}.weight"]


@pytest.mark.parametrize("where", ["tensors", "header"])
def test_what_is_written_beside_or_into_the_header(joy, tmp_path, where):
    state, meant = as_int8(joy, [MLP])
    metadata = None
    if where == "header":
        del state[f"{MLP}.comfy_quant"]
        mark = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {MLP: mark}})}
    assert_means(opened(tmp_path, state, metadata=metadata), meant)


def test_a_header_names_modules_as_the_file_does(joy, tmp_path):
    state, meant = as_int8(joy, [MLP])
    del state[f"{MLP}.comfy_quant"]
    prefix, mark = "model.diffusion_model.", {"format": "int8_tensorwise", "convrot": True}
    layers = {prefix + MLP: mark | {"convrot_groupsize": 16}}
    state = {prefix + name: tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "x.safetensors", {"_quantization_metadata": json.dumps({"layers": layers})})
    network = JoyImageEditTransformer3DModel.from_single_file(
        tmp_path / "x.safetensors", config=JOY.to_dict()
    )
    assert_means(network, meant)


@pytest.mark.parametrize("shape", [(), (1,), (64, 1), (64,)])
def test_int8_without_a_rotation_and_its_scales(joy, tmp_path, shape):
    state, _ = as_int8(joy, [MLP], 1, {"format": "int8_tensorwise"})
    scale = torch.rand(shape)
    state[f"{MLP}.weight_scale"] = scale
    wanted = state[f"{MLP}.weight"].double() * scale.double().reshape(-1, 1)
    assert_means(opened(tmp_path, state), {f"{MLP}.weight": wanted})


def wan_names(ours):
    """Our name of each tensor of ChronoEdit's transformer -> ComfyUI's, which is WAN's own."""
    layouts = {one.name: one for one in ChronoEditTransformer3DModel(CHRONO).layouts()}
    return {name: theirs for theirs, name in layouts["comfyui"].renames(list(ours)).items()}


def test_int8_convrot_under_the_names_of_wan(tmp_path):
    ours = plain_state(ChronoEditTransformer3DModel, CHRONO)
    names = wan_names(ours)
    layers = {name: names[name].removesuffix(".weight") for name in ours if ".ffn.net." in name}
    modules = [layer for name, layer in layers.items() if name.endswith(".weight")]
    state, meant = as_int8({names[name]: tensor for name, tensor in ours.items()}, modules, 4)
    back = {theirs: name for name, theirs in names.items()}
    network = opened(tmp_path, state, ChronoEditTransformer3DModel, CHRONO)
    assert len(meant) == 2 and "model.diffusion_model.blocks.0.ffn.2.weight" in meant
    assert_means(network, {back[name]: weight for name, weight in meant.items()})


@pytest.mark.parametrize("old", [True, False])
def test_scaled_fp8_as_wan_files_have_it(tmp_path, old):
    """Under WAN's own names, with the scales of activations, which are not heeded; of both generations."""
    cls, config = ChronoEditTransformer3DModel, CHRONO
    ours = plain_state(cls, config)
    names = wan_names(ours)
    state, meant = {names[name]: t.clone() for name, t in ours.items()}, {}
    for name, tensor in ours.items():
        if name.startswith("blocks") and tensor.ndim == 2 and name.endswith(".weight"):
            module, scale = names[name].removesuffix(".weight"), torch.rand(1 if old else ()) + 0.5
            stored = (tensor / scale).to(torch.float8_e4m3fn)
            leaves = ("scale_weight", "scale_input") if old else ("weight_scale", "input_scale")
            state |= {
                f"{module}.{leaf}": t for leaf, t in zip(leaves, (scale, torch.tensor(7.0)), strict=True)
            }
            state[f"{module}.weight"] = stored
            if not old:
                state[f"{module}.comfy_quant"] = as_bytes({"format": "float8_e4m3fn"})
            meant[name] = stored.double() * scale.double()
    if old:
        state["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    network = opened(tmp_path, state, cls, config)
    assert_means(network, meant)
    assert network.dtype is torch.bfloat16 and network.to(torch.float32).dtype is torch.float32
    assert_means(network, meant)


def test_what_is_no_linear_layer_is_rebuilt_when_it_is_read(tmp_path):
    """A table of words in scaled fp8, beside a linear layer."""
    config = CLIPTextConfig.from_dict(
        dict(vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    network = CLIPTextModel(config)
    layout = next(one for one in network.layouts() if one.name == "openclip")
    state = {name: t.detach().clone().bfloat16() for name, t in layout.invert(network.state_dict()).items()}
    meant = dict(state)
    for name in ("token_embedding.weight", "transformer.resblocks.0.attn.out_proj.weight"):
        stored = state[name].to(torch.float8_e4m3fn)
        state |= {name: stored, f"{name.removesuffix('.weight')}.scale_weight": torch.tensor(0.3)}
        meant[name] = (stored.float() * 0.3).bfloat16()
    found = opened(tmp_path, state, CLIPTextModel, config)
    assert set(quantised_weights(found)) == {"encoder.layers.0.self_attn.out_proj.weight"}
    table = found.state_dict()["embeddings.token_embedding.weight"]
    assert torch.equal(table, meant["token_embedding.weight"])


def test_what_a_layout_reshapes_is_rebuilt(tmp_path):
    """Linear layers of the autoencoder are convolutions of one pixel in the original."""
    kinds = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    config = AutoencoderKLConfig.from_dict(
        dict(block_out_channels=[16], norm_num_groups=8, layers_per_block=1) | kinds
    )
    network = AutoencoderKL(config)
    layout = next(one for one in network.layouts() if one.name == "ldm")
    state = {name: t.detach().clone().bfloat16() for name, t in layout.invert(network.state_dict()).items()}
    stored = state["decoder.mid.attn_1.q.weight"].to(torch.float8_e4m3fn)
    state |= {"decoder.mid.attn_1.q.weight": stored, "decoder.mid.attn_1.q.scale_weight": torch.tensor(0.3)}
    found = opened(tmp_path, state, AutoencoderKL, config)
    assert not quantised_weights(found)
    weight = found.state_dict()["decoder.mid_block.attentions.0.to_q.weight"]
    assert torch.equal(weight, (stored.float() * 0.3).bfloat16().flatten(1))


REFUSED = {
    "no scales": ({f"{MLP}.weight_scale": None}, f"{MLP} is quantised, and {MLP}.weight_scale is missing"),
    "no weight": ({f"{MLP}.weight": None}, f"{MLP} is quantised, and {MLP}.weight is missing"),
    "scales of another shape": (
        {f"{MLP}.weight_scale": torch.rand(128, 1)},
        rf"{MLP}.weight_scale has shape \(128, 1\), which does not fit the weight of {MLP}, \(64, 128\)",
    ),
    "scales in blocks": (
        {f"{MLP}.weight_scale": torch.rand(64, 2)},
        rf"{MLP}.weight_scale has shape \(64, 2\)",
    ),
    "scales that are integers": (
        {f"{MLP}.weight_scale": torch.ones(64, 1, dtype=torch.int32)},
        f"{MLP}.weight_scale holds no numbers of floating point",
    ),
    "scales that are no numbers": (
        {f"{MLP}.weight_scale": torch.full((64, 1), torch.nan)},
        f"{MLP}.weight_scale holds scales that are negative, infinite or no numbers",
    ),
    "no mark": ({f"{MLP}.comfy_quant": None}, rf"no comfy_quant that says how \({MLP}.weight_scale"),
    "nothing beside": (
        {f"{MLP}.comfy_quant": None, f"{MLP}.weight_scale": None},
        rf"{MLP}.weight is quantised \(int8\), and its scales are missing",
    ),
    "another format": (
        {f"{MLP}.comfy_quant": as_bytes({"format": "nvfp4"})},
        f"{MLP} is quantised in the format 'nvfp4', which is not read here",
    ),
    "another dtype": (
        {f"{MLP}.comfy_quant": as_bytes({"format": "float8_e4m3fn"})},
        f"{MLP}.weight is in int8, and the format of {MLP} is float8_e4m3fn",
    ),
    "no JSON": ({f"{MLP}.comfy_quant": torch.tensor([123], dtype=torch.uint8)}, f"{MLP}.comfy_quant"),
    "no object": ({f"{MLP}.comfy_quant": as_bytes([1])}, f"{MLP}: its comfy_quant is no JSON object"),
    "a text of other numbers": ({f"{MLP}.comfy_quant": torch.ones(3)}, f"{MLP}.comfy_quant is no text"),
} | {
    f"a group of {group!r}": (
        {
            f"{MLP}.comfy_quant": as_bytes(
                {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
            )
        },
        rf"{MLP}.* {words}",
    )
    for group, words in {
        256: "256 does not divide its 128 inputs",
        32: "power of 4, not 32",
        0: "power of 4, not 0",
        "16": "power of 4, not '16'",
        True: "power of 4, not True",
    }.items()
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_the_name_of_its_module(joy, tmp_path, case):
    changes, message = REFUSED[case]
    state, _ = as_int8(joy, [QKV, MLP])
    state = {name: t for name, t in (state | changes).items() if t is not None}
    with pytest.raises(ValueError, match=message) as raised:
        opened(tmp_path, state)
    if "that are no numbers" not in case:  # whose numbers have to be read
        assert str(raised.value).startswith(str(tmp_path / "x.safetensors"))


def test_fp8_weights_without_scales_beside_others_that_have_them(joy, tmp_path):
    state = dict(joy)
    for module in (QKV, MLP):
        state[f"{module}.weight"] = state[f"{module}.weight"].to(torch.float8_e4m3fn)
    state[f"{QKV}.scale_weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=rf"{MLP}.weight is quantised \(float8_e4m3fn\), and its scales"):
        opened(tmp_path, state)
    state |= {f"{MLP}.scale_weight": torch.ones(2)}
    with pytest.raises(ValueError, match=rf"{MLP}.scale_weight has shape \(2,\)"):
        opened(tmp_path, state)


def test_an_adapter_stays_beside_quantised_weights(joy, tmp_path):
    state, meant = as_int8(joy, [MLP])
    network = opened(tmp_path, state)
    adapters = Adapters({"transformer": network})
    up, down = torch.randn(64, 3), torch.randn(3, 128)
    keys = {f"transformer.{MLP}.lora_A.weight": down, f"transformer.{MLP}.lora_B.weight": up}
    adapters.load_lora_weights(keys)
    layer = network.get_submodule(MLP)
    assert isinstance(layer, QuantisedLinear)
    weight = meant[f"{MLP}.weight"]
    wanted = weight + 0.5 * up.double() @ down.double()
    with adapters.scaled(0.5):
        found = layer.weight
    assert found.dtype is torch.bfloat16
    assert (found - wanted).abs().max() <= 2**-8 * wanted.abs().max()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    with pytest.raises(ValueError, match=rf"fuse_lora: {MLP}.weight of the transformer.* as int8_convrot"):
        adapters.fuse_lora()
    assert not adapters.fused_loras
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    adapters.unload_lora_weights()
    assert_means(network, meant)


def test_saved_it_is_plain_and_computes_the_same(joy, tmp_path):
    state, meant = as_int8(joy, joy_modules(joy))
    network = opened(tmp_path, state)
    network.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    assert stored.keys() == joy.keys()
    for name, tensor in stored.items():
        assert tensor.dtype is joy[name].dtype
    for name, weight in quantised_weights(network).items():
        assert torch.equal(stored[name], weight.to(torch.bfloat16))


def as_fp8(state, modules):
    state = dict(state)
    for module in modules:
        state[f"{module}.weight"] = state[f"{module}.weight"].to(torch.float8_e4m3fn)
        state[f"{module}.scale_weight"] = torch.rand(1) + 0.5
    return state


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_to_be_written_elsewhere_it_is_rebuilt_some_rows_at_a_time(joy, tmp_path, monkeypatch, form):
    """A network that was opened unread has every tensor as one that was read, whole and in pieces."""
    state = as_int8(joy, joy_modules(joy))[0] if form == "int8" else as_fp8(joy, joy_modules(joy))
    network = opened(tmp_path, state)
    files = TensorFiles([tmp_path / "x.safetensors"])
    planned = plan_network(JoyImageEditTransformer3DModel, JOY, files)
    found, weights = planned.opened(unread=True).tensors(), quantised_weights(network)
    assert set(found) == set(joy) and len(weights) > 4
    monkeypatch.setattr(quantised_files, "BLOCK", 300)
    for name, tensor in joy.items():
        wanted = weights[name].to(torch.bfloat16) if name in weights else tensor
        pieces = [piece.clone() for piece in found.pieces(name)]
        assert found.dtypes[name] is wanted.dtype and found.shapes[name] == tuple(wanted.shape)
        assert torch.equal(torch.cat(pieces).view(wanted.shape), wanted), name
        assert torch.equal(found[name], wanted), name
        if name in weights:
            assert len(pieces) >= wanted.numel() / 300


def test_rows_are_quantised_alike_whatever_is_read_with_them(joy, monkeypatch):
    name = f"{MLP}.weight"  # of 64 rows
    plain = TensorFiles.of({name: joy[name]})
    stored, scale = quantise(joy[name], 64)
    for block in (2**21, 128 * 24):
        monkeypatch.setattr(quantised_files, "BLOCK", block)
        made = as_int8_convrot(plain, [name])
        assert torch.equal(made[name], stored) and torch.equal(made[f"{MLP}.weight_scale"], scale)
        pieces = [piece.clone() for piece in made.pieces(name)]
        assert len(pieces) == -(-64 * 128 // block) and torch.equal(torch.cat(pieces), stored.flatten())


def test_within_a_budget_only_parts_of_the_file_stay_where_they_are(joy, tmp_path):
    """What is computed of a file, and what was in memory from the start, is put away; see `loading.load`."""
    state, _ = as_int8(joy, [MLP])
    save_file(state | {QKV + ".weight": state[QKV + ".weight"].float()}, tmp_path / "x.safetensors")
    seen = {}

    def put_away(tensor):
        copy = tensor.clone()
        seen[copy.data_ptr()] = copy
        return copy

    def put_away_of(files):
        with putting_away(put_away):
            network = load_network(JoyImageEditTransformer3DModel, JOY, files, torch.bfloat16)
        return {name for name, tensor in network.state_dict().items() if tensor.data_ptr() in seen}

    path = tmp_path / "x.safetensors"
    assert put_away_of(TensorFiles([path])) == {f"{QKV}.weight"}
    assert put_away_of(TensorFiles.of(load_file(path))) == {*joy, f"{MLP}.weight_scale"}


def test_load_takes_a_quantised_file_of_a_part(tmp_path):
    """The edit is nearly the one of the plain weights, and not the same."""
    pipe = joyedit.load("tiny-joyimage", device="cpu")
    state = {name: t.detach() for name, t in pipe.transformer.state_dict().items()}
    modules = [f"double_blocks.{i}.img_mlp.net.0.proj" for i in range(5)]
    path = tmp_path / "joyai_image_edit_int8_convrot.safetensors"
    for module in modules:
        weight = state[f"{module}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        state[f"{module}.weight"] = (weight / scale).round().to(torch.int8)
        state[f"{module}.weight_scale"] = scale
        state[f"{module}.comfy_quant"] = as_bytes({"format": "int8_tensorwise"})
    save_file(state, path)
    (tmp_path / "config.json").write_text(json.dumps(pipe.transformer.config_to_save()))
    found = joyedit.load("tiny-joyimage", device="cpu", transformer=str(path))
    assert len(quantised_weights(found.transformer)) == 5
    photo = joyedit.load_image("examples/coffee.jpg")
    image = found(photo, "make the circle red", num_inference_steps=1, generator=torch.manual_seed(0))
    plain = pipe(photo, "make the circle red", num_inference_steps=1, generator=torch.manual_seed(0))
    apart = np.asarray(image.images[0], float) - np.asarray(plain.images[0], float)
    assert 0 < np.abs(apart).max() < 40 and np.abs(apart).mean() < 1
