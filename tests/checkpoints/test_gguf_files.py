"""GGUF files, as ComfyUI-GGUF and llama.cpp write them: dequantised by their own package on loading."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

import joyedit
from joyedit.checkpoints import gguf_files
from joyedit.checkpoints.network import build_on_meta, load_network, plan_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.checkpoints.verify import verify
from joyedit.command import cli
from joyedit.models.joyimage_mmdit import JoyImageEditConfig, JoyImageEditTransformer3DModel
from joyedit.models.umt5 import UMT5Config, UMT5EncoderModel
from joyedit.quantised import quantised_weights

gguf = pytest.importorskip("gguf")
Q8_0, Q4_0, BF16 = (getattr(gguf.GGMLQuantizationType, kind) for kind in ("Q8_0", "Q4_0", "BF16"))
JOY = JoyImageEditConfig.from_dict(
    dict(hidden_size=64, num_attention_heads=2, num_layers=2, mlp_width_ratio=2.0, in_channels=4, text_dim=12)
    | dict(out_channels=4, rope_dim_list=[8, 12, 12])
)
PRODUCTS = [
    f"double_blocks.{n}.{layer}.weight" for n in (0, 1) for layer in ("attn.img_attn_qkv", "txt_mlp.net.2")
]


def plain_state(cls, config):
    generator = torch.Generator().manual_seed(0)
    shapes = build_on_meta(cls, config).state_dict()
    made = {name: torch.randn(t.shape, generator=generator) / 8 for name, t in shapes.items()}
    return {name: t if cls.stays_fp32(name) else t.bfloat16() for name, t in made.items()}


@pytest.fixture(scope="module")
def joy():
    return plain_state(JoyImageEditTransformer3DModel, JOY)


def write_gguf(path, state, quantised):
    """As ComfyUI-GGUF's converter writes: what has five axes in two, with its true shape beside it."""
    writer = gguf.GGUFWriter(path, "wan")
    meant = {}
    for name, tensor in state.items():
        values, kind = tensor.float().numpy(), quantised.get(name)
        if values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(len(values), -1)
        if kind is None:
            writer.add_tensor(name, values)
        else:
            packed = gguf.quantize(values, kind)
            meant[name] = torch.from_numpy(gguf.dequantize(packed, kind)).view(tensor.shape)
            writer.add_tensor(name, packed, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return meant


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_gguf_is_dequantised_to_the_wanted_dtype(joy, tmp_path, dtype):
    kinds = dict(zip(PRODUCTS, [Q8_0, Q4_0, Q8_0, Q4_0], strict=True))
    meant = write_gguf(tmp_path / "x.gguf", joy, kinds)
    files = TensorFiles([tmp_path / "x.gguf"])
    network = load_network(JoyImageEditTransformer3DModel, JOY, files, dtype)
    wanted = dtype or torch.bfloat16
    assert network.dtype is wanted and not quantised_weights(network)
    for name, tensor in network.state_dict().items():
        kind = torch.float32 if network.stays_fp32(name) else wanted
        assert torch.equal(tensor, meant.get(name, joy[name]).float().to(kind)), name


def test_gguf_in_fp16_stays_so(joy, tmp_path):
    """Norms and biases are in fp32 there, as always in GGUF."""
    half = {name: t.half() if name in PRODUCTS else t.float() for name, t in joy.items()}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    for name, tensor in half.items():
        if tensor.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
            tensor = tensor.flatten(1)
        writer.add_tensor(name, tensor.numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    network = load_network(JoyImageEditTransformer3DModel, JOY, TensorFiles([tmp_path / "x.gguf"]))
    assert network.dtype is torch.float16
    assert all(torch.equal(network.state_dict()[name], half[name]) for name in PRODUCTS)


@pytest.mark.parametrize("prefix", [pytest.param("", marks=pytest.mark.slow), "model.diffusion_model."])
def test_load_takes_a_gguf_file_of_a_part(tmp_path, prefix):
    network = joyedit.load("tiny-chronoedit", device="cpu").transformer
    layout = next(one for one in network.layouts() if one.name == "original")  # WAN's names
    state = {prefix + name: tensor.detach() for name, tensor in layout.invert(network.state_dict()).items()}
    product = f"{prefix}blocks.0.ffn.0.weight"
    meant = write_gguf(tmp_path / "x.gguf", state, {product: Q8_0})[product]
    (tmp_path / "config.json").write_text(json.dumps(network.config_to_save()))
    found = joyedit.load("tiny-chronoedit", device="cpu", transformer=str(tmp_path / "x.gguf")).transformer
    for name, tensor in network.state_dict().items():
        wanted = meant.to(found.dtype) if name == "blocks.0.ffn.net.0.proj.weight" else tensor
        assert torch.equal(found.state_dict()[name], wanted.to(found.state_dict()[name].dtype)), name


def test_gguf_of_the_text_encoder_has_names_of_llama_cpp(tmp_path):
    config = UMT5Config.from_dict(dict(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2))
    state = plain_state(UMT5EncoderModel, config)
    short = {"SelfAttention.": "attn_", "relative_attention_bias": "rel_b", "DenseReluDense.": "ffn_"}
    norms = {"0.layer_norm": "attn_norm", "1.layer_norm": "ffn_norm"}
    parts = {"wi_0": "gate", "wi_1": "up", "wo": "down", **norms}
    named = {}
    for name, tensor in state.items():
        for old, new in {**short, **parts, "shared": "token_embd", "encoder.block": "enc.blk"}.items():
            name = name.replace(old, new)
        name = name.replace("layer.0.", "").replace("layer.1.", "").replace("layer.", "")
        named[name.replace("encoder.final_layer_norm", "enc.output_norm")] = tensor
    assert "enc.blk.1.attn_rel_b.weight" in named and "enc.blk.0.ffn_norm.weight" in named
    write_gguf(tmp_path / "x.gguf", named, {})
    network = load_network(UMT5EncoderModel, config, TensorFiles([tmp_path / "x.gguf"]), torch.bfloat16)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_gguf_that_is_damaged_or_needs_the_package(joy, tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "x.gguf", joy, {PRODUCTS[0]: Q8_0})
    content = (tmp_path / "x.gguf").read_bytes()
    for cut in (10, 300, len(content) - 1000):
        (tmp_path / "cut.gguf").write_bytes(content[:cut])
        with pytest.raises(ValueError, match="cut.gguf is no readable GGUF file"):
            TensorFiles([tmp_path / "cut.gguf"])
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "wan", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("a", torch.ones(4).numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    with pytest.raises(ValueError, match="other.gguf is a GGUF file of another byte order"):
        TensorFiles([tmp_path / "other.gguf"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install joyedit\[gguf\]"):
        TensorFiles([tmp_path / "x.gguf"])
    assert cli.main(["verify", str(tmp_path / "x.gguf")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install joyedit[gguf]")


@pytest.mark.parametrize("piece", [gguf_files.PIECE, 100])
def test_numbers_of_gguf_files_that_are_not_finite_are_counted(tmp_path, monkeypatch, piece):
    """A block of Q8_0 is a scale in fp16 and 32 numbers; one of Q4_0 likewise. Of BF16 each is for itself."""
    monkeypatch.setattr(gguf_files, "PIECE", piece)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "wan")
    for name, kind in (("a", Q8_0), ("b", Q4_0), ("fine", Q8_0)):
        packed = gguf.quantize(torch.randn(6, 64).numpy(), kind)
        if name != "fine":
            size = gguf.GGML_QUANT_SIZES[kind][1]
            packed[1, :2] = packed[5, size : size + 2] = [0, 0x7E]  # NaN
        writer.add_tensor(name, packed, raw_dtype=kind)
    plain = torch.randn(3, 5)
    plain[1, 1], plain[2, 4] = torch.inf, torch.nan
    writer.add_tensor("plain", plain.numpy())
    writer.add_tensor("short", plain.bfloat16().view(torch.int16).numpy().view("uint8"), raw_dtype=BF16)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    assert verify(tmp_path / "x.gguf").ok
    found = verify(tmp_path / "x.gguf", full=True)
    assert found.not_finite == {"a": 64, "b": 64, "plain": 2, "short": 2} and not found.ok
    assert torch.equal(TensorFiles([tmp_path / "x.gguf"])["plain"].isfinite(), plain.isfinite())


def test_a_gguf_file_that_has_become_shorter_is_named(joy, tmp_path):
    write_gguf(tmp_path / "x.gguf", joy, {PRODUCTS[0]: Q8_0})
    files = TensorFiles([tmp_path / "x.gguf"])
    os.truncate(tmp_path / "x.gguf", 5000)
    for name in (PRODUCTS[0], "proj_out.weight"):
        with pytest.raises(ValueError, match="x.gguf has become shorter while it was read"):
            files[name]


def test_gguf_is_converted_weight_by_weight(joy, tmp_path):
    meant = write_gguf(tmp_path / "x.gguf", joy, dict.fromkeys(PRODUCTS, Q8_0))
    for dtype in (torch.bfloat16, torch.float32):
        files = TensorFiles([tmp_path / "x.gguf"])
        planned = plan_network(JoyImageEditTransformer3DModel, JOY, files, dtype)
        planned.opened(unread=True).save_pretrained(tmp_path / str(dtype))
        found = load_file(tmp_path / str(dtype) / "diffusion_pytorch_model.safetensors")
        assert found.keys() == joy.keys()
        for name, tensor in found.items():
            kind = torch.float32 if JoyImageEditTransformer3DModel.stays_fp32(name) else dtype
            assert tensor.dtype is kind and torch.equal(tensor, meant.get(name, joy[name]).to(kind)), name
