"""UMT5 against transformers: the same random weights in both."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import UMT5Config as TheirConfig
from transformers import UMT5EncoderModel as TheirModel
from transformers import UMT5Model as TheirWhole

import joyedit
from joyedit import ops
from joyedit.checkpoints.network import load_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.umt5 import layouts
from joyedit.models.umt5 import UMT5Config, UMT5EncoderModel, distance_buckets, without_fp16
from tests.parity.same_weights import difference, recorded_shapes, shapes

# What a fork adds to the network, as patterns ("*.temperature"): the reference has no such tensors.
NEW_PARAMETERS: tuple[str, ...] = ()

CONFIGS = {
    "plain": dict(vocab_size=61, d_model=32, d_kv=8, d_ff=50, num_layers=3, num_heads=4),
    "wide": dict(  # heads wider than the model, other buckets, another epsilon
        vocab_size=99,
        d_model=24,
        d_kv=16,
        d_ff=37,
        num_layers=2,
        num_heads=5,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=20,
        layer_norm_epsilon=1e-3,
    ),
    "odd": dict(  # half of the buckets is an odd number
        vocab_size=40,
        d_model=21,
        d_kv=7,
        d_ff=16,
        num_layers=4,
        num_heads=3,
        relative_attention_num_buckets=14,
        relative_attention_max_distance=300,
    ),
}
LENGTHS = [(7, 19), (1, 4, 4), (150, 33)]
BLOCK = "encoder.block.0.layer"


def their_config(name, **changes):
    return TheirConfig(**{**CONFIGS[name], "num_decoder_layers": 1, "dropout_rate": 0.0, **changes})


def randomise(module, seed=0):
    """Every parameter non-trivial: gains near one, uneven attention, distances that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "layer_norm" in name:
            value = 1 + 0.3 * noise
        elif "relative_attention_bias" in name:
            value = 1.5 * noise
        elif "shared" in name:
            value = noise
        else:
            narrow = 0.6 if name.endswith((".q.weight", ".k.weight")) else 1.5  # the scores are not scaled
            value = narrow * noise * parameter.shape[1] ** -0.5
        parameter.data.copy_(value)
    return module.requires_grad_(False).eval()


def their_model(name="plain", **changes):
    return randomise(TheirModel(their_config(name, **changes)))


def files(tmp_path, state, name="model.safetensors"):
    save_file({k: v.clone().contiguous() for k, v in state.items()}, tmp_path / name)
    return TensorFiles([tmp_path / name])


def ours(model, tmp_path, dtype=None):
    """Our network from a file of the reference's weights."""
    config = UMT5Config.from_dict(model.config.to_dict())
    file = files(tmp_path, model.state_dict())
    return load_network(UMT5EncoderModel, config, file, dtype, NEW_PARAMETERS)


def prompts(model, lengths, padded=None):
    """Ids of these lengths, padded with 0 on the right, and their mask."""
    ids = torch.zeros(len(lengths), padded or max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(2, model.config.vocab_size, (length,))
        ids[row, length - 1] = 1
        mask[row, :length] = 1
    return ids, mask


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_states(name, lengths, tmp_path):
    model = their_model(name)
    network = ours(model, tmp_path)
    ids, mask = prompts(model, lengths)
    wanted = model(ids, mask).last_hidden_state
    found = network.encode(ids, mask)
    valid = mask.bool()
    assert difference(found[valid], wanted[valid]) <= 1e-5
    assert (found[~valid] == 0).all() and found.dtype == torch.float32
    assert torch.equal(network(ids, mask).last_hidden_state, found)
    assert difference(network.encode(ids), model(ids).last_hidden_state) <= 1e-5, "without a mask all count"


def test_true_length_is_equal_to_padded_to_512(tmp_path):
    model = their_model("plain")
    network = ours(model, tmp_path)
    ids, mask = prompts(model, (23, 1), padded=512)
    wanted = model(ids, mask).last_hidden_state * mask[..., None]
    padded = network.encode(ids, mask)
    assert difference(padded, wanted) <= 1e-5
    for row, length in enumerate((23, 1)):
        alone = network.encode(ids[row : row + 1, :length])
        assert difference(alone[0], wanted[row, :length]) <= 1e-5
        assert difference(alone[0], padded[row, :length]) <= 1e-6


def test_padding_is_never_computed(tmp_path, monkeypatch):
    network = ours(their_model(), tmp_path)
    rows = []
    linear = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, *args: rows.append(len(x)) or linear(x, *args))
    ids, mask = prompts(network, (5, 3), padded=512)
    network.encode(ids, mask)
    assert rows == [8] * 7 * 3  # q k v o wi_0 wi_1 wo, three layers


def test_padding_on_the_left(tmp_path):
    model = their_model()
    ids, mask = prompts(model, (9, 4))
    ids, mask = ids.flip(1), mask.flip(1)
    wanted = model(ids, mask).last_hidden_state * mask[..., None]
    assert difference(ours(model, tmp_path).encode(ids, mask), wanted) <= 1e-5


def test_full_depth(tmp_path):
    model = their_model("plain", num_layers=24)
    ids, mask = prompts(model, (31, 12))
    wanted = model(ids, mask).last_hidden_state * mask[..., None]
    assert difference(ours(model, tmp_path).encode(ids, mask), wanted) <= 1e-5


def test_every_layer_has_its_own_distances(tmp_path):
    model = their_model()
    ids, mask = prompts(model, (11, 8))
    for layer in range(3):
        changed = copy.deepcopy(model)
        table = changed.encoder.block[layer].layer[0].SelfAttention.relative_attention_bias.weight
        table.copy_(torch.randn(table.shape))
        wanted = changed(ids, mask).last_hidden_state * mask[..., None]
        assert difference(ours(changed, tmp_path).encode(ids, mask), wanted) <= 1e-5
        assert difference(wanted, model(ids, mask).last_hidden_state * mask[..., None]) > 1e-2


def test_buckets():
    distances = torch.tensor([-300, -127, -8, -2, -1, 0, 1, 2, 8, 127, 300])
    assert distance_buckets(distances, 32, 128).tolist() == [15, 15, 8, 2, 1, 0, 17, 18, 24, 31, 31]
    for name in CONFIGS:
        attention = their_model(name).encoder.block[0].layer[0].SelfAttention
        config = attention.config
        distances = torch.arange(-1000, 1001)
        found = distance_buckets(
            distances, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        assert torch.equal(found, attention._relative_position_bucket(distances))


@pytest.mark.parametrize("has_bf16", [True, False], ids=["bf16_units", "no_bf16_units"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_is_at_most_twice_as_far_from_float64_as_the_reference(monkeypatch, tmp_path, name, has_bf16):
    monkeypatch.setattr(ops, "CPU_HAS_BF16", has_bf16)
    half = their_model(name).bfloat16()
    network = ours(half, tmp_path)
    ids, mask = prompts(half, (40, 17, 25))
    truth = (copy.deepcopy(half).double()(ids, mask).last_hidden_state)[mask.bool()]
    stream = []
    network.encoder.block[-1].register_forward_hook(lambda module, args, out: stream.append(out.dtype))
    found = network.encode(ids, mask)
    assert found.dtype == network.dtype == torch.bfloat16 and stream == [torch.float32]
    limit = 2 * difference(half(ids, mask).last_hidden_state[mask.bool()], truth)
    assert difference(found[mask.bool()], truth) <= limit


def test_fp16_is_finite_where_its_range_is_exceeded(monkeypatch, tmp_path):
    """As on a device with fp16 units. The reference keeps `wo` in fp32 and clamps what is fp16."""
    monkeypatch.setattr(ops, "compute_dtype", lambda dtype, device: dtype)
    model = their_model()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.weight *= 10_000
    half = copy.deepcopy(model).half()
    for block in half.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    ids, mask = prompts(model, (12, 7))
    truth = model.double()(ids, mask).last_hidden_state[mask.bool()]
    network = ours(half, tmp_path, torch.float16)
    assert {p.dtype for p in network.encoder.parameters()} == {torch.float16}
    found = network.encode(ids, mask)
    assert found.dtype == torch.float16
    limit = 2 * difference(half(ids, mask).last_hidden_state[mask.bool()], truth)
    assert difference(found[mask.bool()], truth) <= limit < 0.1
    states = []
    half.encoder.block[-1].register_forward_hook(lambda module, args, out: states.append(out))
    half(ids, mask)
    assert states[0].abs().max() > 65504, "the case exceeds the range of fp16"


def test_clamp():
    x = torch.tensor([float("inf"), -float("inf"), 3.0])
    assert without_fp16(x.half()).tolist() == [65504.0, -65504.0, 3.0]
    assert without_fp16(x.half()).dtype == torch.float32
    assert without_fp16(x) is x and without_fp16(x.bfloat16()).dtype == torch.bfloat16


def test_embedding_table_stays_behind(tmp_path):
    """Of the table a few rows are read, so it stays in main memory; the network is where its encoder is."""
    network = ours(their_model(), tmp_path).to("meta", torch.bfloat16)
    assert network.shared.weight.device.type == "cpu" and network.shared.weight.dtype == torch.bfloat16
    assert network.device.type == "meta" and {p.is_meta for p in network.encoder.parameters()} == {True}


def test_embedding_table_under_either_name(tmp_path):
    """Alone under each, and under both, when the second may hold zeros."""
    model = their_model()
    config = UMT5Config.from_dict(model.config.to_dict())
    state = {k: v.clone() for k, v in model.state_dict().items()}
    second = state.pop("encoder.embed_tokens.weight")
    ids, mask = prompts(model, (6, 3))
    wanted = model(ids, mask).last_hidden_state * mask[..., None]
    for extra, left_out in (
        ({}, ()),
        ({"encoder.embed_tokens.weight": second}, ("shared.weight",)),
        ({"encoder.embed_tokens.weight": torch.zeros_like(second)}, ()),
        ({"spiece_model": torch.zeros(5, dtype=torch.uint8)}, ()),
    ):
        stored = {k: v for k, v in {**state, **extra}.items() if k not in left_out}
        network = load_network(UMT5EncoderModel, config, files(tmp_path, stored))
        assert difference(network.encode(ids, mask), wanted) <= 1e-5


def test_encoder_of_a_whole_model(tmp_path):
    whole = randomise(TheirWhole(their_config("plain")))
    config = UMT5Config.from_dict(whole.config.to_dict())
    stored = {**whole.state_dict(), "lm_head.weight": torch.ones(61, 32)}
    network = load_network(UMT5EncoderModel, config, files(tmp_path, stored))
    ids, mask = prompts(whole, (6, 3))
    wanted = whole.encoder(ids, mask).last_hidden_state * mask[..., None]
    assert difference(network.encode(ids, mask), wanted) <= 1e-5
    assert network.config_to_save()["architectures"] == ["UMT5EncoderModel"]


def test_save_and_load_in_both_directions(tmp_path):
    model = their_model("wide")
    ids, mask = prompts(model, (13, 5))
    wanted = model(ids, mask).last_hidden_state * mask[..., None]
    model.save_pretrained(tmp_path / "theirs")
    network = UMT5EncoderModel.from_pretrained(tmp_path / "theirs")
    assert difference(network.encode(ids, mask), wanted) <= 1e-5
    network.save_pretrained(tmp_path / "ours")
    assert "encoder.embed_tokens.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    again, info = TheirModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert difference(again(ids, mask).last_hidden_state * mask[..., None], wanted) <= 1e-6


def test_published_config_names_and_shapes(shared_data):
    raw = json.loads((shared_data / "chronoedit-14b/text_encoder/config.json").read_text())
    config = UMT5Config.from_dict(raw)
    for name in UMT5Config():
        assert config[name] == UMT5Config()[name], f"{name}: the default is not the published value"
    saved = {key: value for key, value in config.to_dict().items() if key in raw}
    assert saved == {key: value for key, value in raw.items() if key != "torch_dtype"}
    with torch.device("meta"):
        network = joyedit.UMT5EncoderModel(config)
    keys = recorded_shapes(shared_data, "umt5_encoder")
    assert len(keys) == 243 and keys.pop("encoder.embed_tokens.weight") == keys["shared.weight"]
    assert shapes(network) == keys
    assert sum(p.numel() for p in network.parameters()) == 5_680_910_336


ORIGINAL_BY_HAND = {
    "token_embedding.weight": "shared.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
    "blocks.0.norm1.weight": f"{BLOCK}.0.layer_norm.weight",
    "blocks.0.attn.q.weight": f"{BLOCK}.0.SelfAttention.q.weight",
    "blocks.0.attn.o.weight": f"{BLOCK}.0.SelfAttention.o.weight",
    "blocks.0.pos_embedding.embedding.weight": f"{BLOCK}.0.SelfAttention.relative_attention_bias.weight",
    "blocks.0.norm2.weight": f"{BLOCK}.1.layer_norm.weight",
    "blocks.0.ffn.gate.0.weight": f"{BLOCK}.1.DenseReluDense.wi_0.weight",
    "blocks.0.ffn.fc1.weight": f"{BLOCK}.1.DenseReluDense.wi_1.weight",
    "blocks.0.ffn.fc2.weight": f"{BLOCK}.1.DenseReluDense.wo.weight",
    "blocks.23.attn.k.weight": "encoder.block.23.layer.0.SelfAttention.k.weight",
    "blocks.23.attn.v.weight": "encoder.block.23.layer.0.SelfAttention.v.weight",
}


def test_original_names(tmp_path):
    """`models_t5_umt5-xxl-enc-bf16.pth`: a pickle of 242 tensors."""
    with torch.device("meta"):
        wanted = UMT5EncoderModel().state_dict()
    original = next(layout for layout in layouts(UMT5Config()) if layout.name == "original")
    names = original.renames(list(wanted))
    assert len(names) == len(wanted) == 242 and set(names.values()) == set(wanted)
    assert {k: names[k] for k in ORIGINAL_BY_HAND} == ORIGINAL_BY_HAND
    assert set(original.invert(wanted)) == set(names)

    model = their_model()
    config = UMT5Config.from_dict(model.config.to_dict())
    ids, mask = prompts(model, (6, 3))
    expected = model(ids, mask).last_hidden_state * mask[..., None]
    state = {k: v for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
    foreign = original.invert(state)
    torch.save(foreign, tmp_path / "umt5.pth")
    for loaded in (TensorFiles([tmp_path / "umt5.pth"]), files(tmp_path, foreign)):
        network = load_network(UMT5EncoderModel, config, loaded)
        assert difference(network.encode(ids, mask), expected) <= 1e-5
    again = original.invert(network.state_dict())
    assert set(again) == set(foreign) and all(torch.equal(again[k], foreign[k]) for k in foreign)


def test_input_that_does_not_fit(tmp_path):
    network = ours(their_model(), tmp_path)
    ids = torch.tensor([[5, 6, 1], [7, 1, 0]])
    for wrong, message in (
        (torch.tensor([5, 6, 1]), r"input_ids \(3,\): must be \(batch, tokens\)"),
        (torch.zeros(2, 0, dtype=torch.long), "not empty"),
        (torch.tensor([[61, 1]]), "input_ids from 1 to 61: the encoder has 61 tokens"),
        (torch.tensor([[-1, 1]]), "input_ids from -1 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            network.encode(wrong)
    for mask, message in (
        (torch.ones(2, 4), r"attention_mask \(2, 4\): must be \(2, 3\)"),
        (torch.tensor([[1, 0, 1], [1, 1, 0]]), "one run"),
        (torch.tensor([[1, 1, 1], [0, 0, 0]]), "one run"),
    ):
        with pytest.raises(ValueError, match=message):
            network.encode(ids, mask)


@pytest.mark.parametrize(
    "changes",
    [
        {"feed_forward_proj": "gated-silu"},
        {"dense_act_fn": "relu"},
        {"is_gated_act": False},
        {"model_type": "t5"},
        {"relative_attention_num_buckets": 7},
        {"relative_attention_num_buckets": 2},
        {"relative_attention_max_distance": 8},
    ],
    ids=str,
)
def test_configs_that_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        UMT5Config.from_dict({**UMT5Config(), **changes})
