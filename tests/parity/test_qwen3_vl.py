"""Qwen3-VL against transformers: the same random weights in both, read by ours from files."""

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig as TheirConfig
from transformers import Qwen3VLForConditionalGeneration as Theirs

from joyedit import ops
from joyedit.checkpoints.json_files import read_json
from joyedit.checkpoints.network import load_network, open_weights
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.qwen3_vl import FLAT
from joyedit.models.qwen3_vl import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLTextConfig
from tests.parity.same_weights import difference, recorded_shapes, shapes

# What a fork adds to the network, as patterns ("*.temperature"): the reference has no such tensors.
NEW_PARAMETERS: tuple[str, ...] = ()

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared")

IMAGE, VIDEO, START, END = 90, 91, 92, 93  # special tokens of the small vocabulary; 1..60 are words
TEXT = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    rope_parameters=dict(
        rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=[4, 2, 2]
    ),
)
VISION = dict(
    depth=4,
    hidden_size=24,
    intermediate_size=40,
    num_heads=2,
    patch_size=4,
    out_hidden_size=32,
    num_position_embeddings=49,
    deepstack_visual_indexes=[0, 1, 2],
)
SHAPES = {
    "small": ({}, {}),
    # the head widths and sections of the 8B, one key head, a wide theta, taps between distant blocks
    "heads": (
        dict(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=128,
            rope_parameters=dict(
                rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=[24, 20, 20]
            ),
        ),
        dict(hidden_size=72, num_heads=1, depth=5, deepstack_visual_indexes=[1, 4], out_hidden_size=48),
    ),
    # no more decoder layers than DeepStack features: the last feature comes after the state that is read
    # and small thetas, so that the last frequencies turn: some of them by the time only
    "shallow": (
        dict(
            num_hidden_layers=2,
            rms_norm_eps=1e-5,
            rope_parameters=dict(
                rope_type="default", rope_theta=50.0, mrope_interleaved=True, mrope_section=[6, 1, 1]
            ),
        ),
        dict(rope_parameters=dict(rope_type="axial", rope_theta=100.0)),
    ),
    # the depths of the 8B
    "deep": (
        dict(num_hidden_layers=36, num_attention_heads=2, num_key_value_heads=1),
        dict(depth=27, deepstack_visual_indexes=[8, 16, 24]),
    ),
}


def randomise(module, sharpness, seed=0):
    """Every parameter non-trivial: gains near one, weights that keep the scale, uneven attention."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            value = sharpness + 0.1 * noise
        elif parameter.ndim == 1:
            value = 0.1 * noise + (0 if name.endswith("bias") else 1)
        else:
            value = noise * (0.5 if "embed" in name else parameter[0].numel() ** -0.5)
        parameter.data.copy_(value)
    return module.requires_grad_(False).eval()


@functools.cache
def their_model(shape, dtype=torch.float32):
    text, vision = SHAPES[shape]
    config = TheirConfig(
        text_config=copy.deepcopy(TEXT | text),
        vision_config=copy.deepcopy(VISION | vision),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    if dtype == torch.float32:
        return randomise(Theirs(config), sharpness=1.2 if shape == "deep" else 1.7)
    model = copy.deepcopy(their_model(shape))  # float64: of the bf16 weights, what bf16 approximates
    for parameter in model.parameters():  # not the buffers: from_pretrained keeps the frequencies in fp32
        parameter.data = parameter.data.bfloat16().to(dtype)
    return model


def load(folder, dtype=None):
    config = Qwen3VLConfig.from_dict(read_json(folder / "config.json"))
    files = open_weights(folder, "model")
    return load_network(Qwen3VLForConditionalGeneration, config, files, dtype, NEW_PARAMETERS)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Our network from a folder that transformers saved."""

    @functools.cache
    def build(shape, dtype=None):
        folder = tmp_path_factory.mktemp(shape)
        their_model(shape).save_pretrained(folder)
        return load(folder, dtype)

    return build


def make_inputs(shape, *rows, seed=1, patch=None):
    """Prompts from rows like (5, (4, 6), 3): runs of words and images by grid; padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    prompts, grids = [], []
    for row in rows:
        ids = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(1, 60, (part,), generator=generator).tolist()
            else:
                ids += [START, *[IMAGE] * (part[0] * part[1] // 4), END]
                grids.append((1, *part))
        prompts.append(ids)
    length = max(map(len, prompts))
    inputs = dict(
        input_ids=torch.tensor([ids + [0] * (length - len(ids)) for ids in prompts]),
        attention_mask=torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in prompts]),
    )
    if grids:
        vision = their_model(shape).config.vision_config
        width = 3 * vision.temporal_patch_size * vision.patch_size**2
        patches = sum(h * w for _, h, w in grids)
        inputs["pixel_values"] = torch.rand(patches, width, generator=generator) * 2 - 1
        inputs["image_grid_thw"] = torch.tensor(grids)
    return inputs


PROMPTS = {
    "text": [(11,)],
    "text_batch": [(11,), (4,), (7,)],
    "image": [(5, (4, 6), 3)],
    "images": [(3, (8, 2), 2, (2, 6), (14, 18), 6)],
    "batch": [(5, (4, 6), 9), (2, (8, 8), (2, 2), 1), (6,)],
}


def run_theirs(model, inputs):
    """Logits, the output of each decoder layer as hooked, and the position ids that the layers saw."""
    inputs = dict(inputs)
    if "pixel_values" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    layers, seen = [], {}
    text = model.model.language_model
    hooks = [layer.register_forward_hook(lambda m, i, o: layers.append(o)) for layer in text.layers]
    hooks.append(text.rotary_emb.register_forward_pre_hook(lambda m, args: seen.update(positions=args[1])))
    with torch.no_grad():
        logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits, layers, seen["positions"].expand(3, *inputs["input_ids"].shape)


def run_ours(model, inputs):
    """The same of ours, through `hidden_states` for the states and `forward` for the logits."""
    layers = []
    hooks = [
        layer.register_forward_hook(lambda m, i, o: layers.append(o[0]))
        for layer in model.model.language_model.layers
    ]
    states = hidden(model, inputs)
    for hook in hooks:
        hook.remove()
    return model(**inputs).logits, layers, states


def hidden(model, inputs, **options):
    images = None
    if "pixel_values" in inputs:
        images = model.encode_images(inputs["pixel_values"], inputs["image_grid_thw"])
    return model.hidden_states(inputs["input_ids"], inputs.get("attention_mask"), images, **options)


ROUNDING = 1e-12  # of the same function in another order, in float64


def close(a, b, tolerance=1e-5):
    assert difference(a, b) <= tolerance


# The deep one has the depth of the released vision tower: one prompt of pictures shows it.
CASES = [
    pytest.param(shape, prompt, marks=pytest.mark.slow if shape == "deep" and prompt != "images" else ())
    for shape in SHAPES
    for prompt in PROMPTS
]


@pytest.mark.parametrize(("shape", "prompt"), CASES)
def test_every_layer_and_logits(ours, shape, prompt):
    inputs = make_inputs(shape, *PROMPTS[prompt])
    logits, layers, positions = run_theirs(their_model(shape), inputs)
    our_logits, our_layers, states = run_ours(ours(shape), inputs)
    for mine, theirs in zip(our_layers, layers, strict=True):
        close(mine, theirs)  # padded rows too
    close(states, layers[-1])
    close(our_logits, logits)
    got = ours(shape).position_ids(
        inputs["input_ids"], inputs.get("image_grid_thw"), inputs["attention_mask"]
    )
    assert torch.equal(got, positions)


@pytest.mark.parametrize("shape", SHAPES)
def test_vision_tower(ours, shape):
    inputs = make_inputs(shape, ((4, 6), (2, 2), (14, 18), (16, 2)))
    pixels, grids = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        theirs = their_model(shape).model.visual(pixels, grid_thw=grids)
    mine = ours(shape).encode_images(pixels, grids)
    close(mine.embeds, theirs.pooler_output)
    for a, b in zip(mine.deepstack, theirs.deepstack_features, strict=True):
        close(a, b)


@pytest.mark.parametrize("prompt", ["text", "images", "batch"])
@pytest.mark.parametrize("narrow", ["computed", "upcast"])
@pytest.mark.parametrize("shape", [pytest.param("small", marks=pytest.mark.slow), "heads"])
def test_bf16_is_as_close_as_the_reference(ours, shape, narrow, prompt, monkeypatch):
    """bf16 weights, computed in bf16 or upcast where they are used, against the float64 of those weights."""
    dtype = torch.bfloat16 if narrow == "computed" else torch.float32
    monkeypatch.setattr(ops, "compute_dtype", lambda *_: dtype)
    inputs = make_inputs(shape, *PROMPTS[prompt])
    exact = run_theirs(their_model(shape, torch.float64), inputs)
    theirs = run_theirs(their_model(shape, torch.bfloat16), inputs)
    mine = run_ours(ours(shape, torch.bfloat16), inputs)
    for a, b, c in ((mine[0], theirs[0], exact[0]), (mine[2], theirs[1][-1], exact[1][-1])):
        assert a.dtype == torch.bfloat16
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm()
        assert difference(a, c) <= 2 * difference(b, c)


def test_valid_rows_need_no_mask(ours):
    inputs = make_inputs("small", *PROMPTS["batch"])
    valid = inputs["attention_mask"].bool()
    want = hidden(ours("small"), inputs)
    unmasked = {key: value for key, value in inputs.items() if key != "attention_mask"}
    close(hidden(ours("small"), unmasked)[valid], want[valid])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_keep_from_leaves_out_the_first_states(ours, prompt):
    model, inputs = ours("small", torch.float64), make_inputs("small", *PROMPTS[prompt])
    close(hidden(model, inputs, keep_from=3), hidden(model, inputs)[:, 3:], ROUNDING)


@pytest.mark.parametrize("shape", ["small", "heads", "shallow"])
@pytest.mark.parametrize("head", [(9,), (5, (4, 6)), (2, (2, 8), (6, 2), 1)])
def test_prefix_is_exact_and_reads_the_images_once(ours, shape, head):
    """One prefix, then a positive and a negative tail, unpadded and as a padded batch."""
    model, calls = ours(shape, torch.float64), []
    start = make_inputs(shape, head)
    tails = make_inputs(shape, (7,), (3,), seed=2)
    whole = dict(start)
    whole["input_ids"] = torch.cat((start["input_ids"].expand(2, -1), tails["input_ids"]), 1)
    whole["attention_mask"] = torch.cat((start["attention_mask"].expand(2, -1), tails["attention_mask"]), 1)
    hook = model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    images = None
    if "pixel_values" in start:
        whole["pixel_values"] = start["pixel_values"].repeat(2, 1)
        whole["image_grid_thw"] = start["image_grid_thw"].repeat(2, 1)
        images = model.encode_images(start["pixel_values"], start["image_grid_thw"])
    prefix = model.prefill(start["input_ids"], images, keep_from=2)
    both = model.hidden_states(tails["input_ids"], tails["attention_mask"], prefix=prefix)
    alone = [
        model.hidden_states(tails["input_ids"][i : i + 1, :n], prefix=prefix) for i, n in enumerate((7, 3))
    ]
    hook.remove()
    assert len(calls) == (images is not None)
    want = hidden(model, whole)
    _, layers, _ = run_theirs(their_model(shape), whole)
    cut = start["input_ids"].shape[1]
    close(torch.cat((prefix.states.expand(2, -1, -1), both), 1), want[:, 2:], ROUNDING)
    close(both, layers[-1][:, cut:])
    for i, n in enumerate((7, 3)):
        close(alone[i], want[i : i + 1, cut : cut + n], ROUNDING)


@pytest.mark.parametrize("head", [(4,), (4, (2, 8))])
def test_an_image_may_follow_a_prefix(ours, head):
    """The prefix with or without an image of its own, two rows of unequal length after it."""
    model = ours("small", torch.float64)
    inputs = make_inputs("small", (*head, 2, (6, 4), 5), (*head, 1, (2, 2)))
    ids, mask, grids = inputs["input_ids"], inputs["attention_mask"], inputs["image_grid_thw"]
    ids[1, :4] = ids[0, :4]
    cut = int(make_inputs("small", head)["attention_mask"].sum())
    pixels = list(inputs["pixel_values"].split([g.prod().item() for g in grids]))
    own = len(head) - 1
    if own:
        pixels[2] = pixels[0]
    inputs["pixel_values"] = torch.cat(pixels)
    images = model.encode_images(pixels[0], grids[:1]) if own else None
    prefix = model.prefill(ids[:1, :cut], images)
    later = model.encode_images(torch.cat(pixels[own :: own + 1]), grids[own :: own + 1])
    rest = model.hidden_states(ids[:, cut:], mask[:, cut:], later, prefix)
    close(torch.cat((prefix.states.expand(2, -1, -1), rest), 1), hidden(model, inputs), ROUNDING)


def test_positions_of_the_published_example():
    ids = torch.tensor([[1, 2, 3, START, *[IMAGE] * 6, END, 4]])
    model = Qwen3VLForConditionalGeneration.__new__(Qwen3VLForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model.config = Qwen3VLConfig(image_token_id=IMAGE)
    want = [[4, 4, 4, 4, 4, 4, 7, 8], [4, 4, 4, 5, 5, 5, 7, 8], [4, 5, 6, 4, 5, 6, 7, 8]]
    assert model.position_ids(ids, torch.tensor([[1, 4, 6]]))[:, 0, 4:].tolist() == want


@pytest.mark.parametrize(
    ("rows", "grids"),
    [
        ([(5, (4, 6), 3)], [(1, 4, 4)]),
        ([(5, (4, 6), 3)], [(1, 4, 6), (1, 2, 2)]),
        ([(5, (4, 6), (2, 2))], [(1, 4, 6)]),
    ],
)
def test_images_must_match_the_prompt(ours, rows, grids):
    ids = make_inputs("small", *rows)["input_ids"]
    with pytest.raises(ValueError, match="grids"):
        ours("small").position_ids(ids, torch.tensor(grids))


def test_bad_inputs_are_named(ours):
    model = ours("small")
    inputs = make_inputs("small", (5, (4, 6), 3))
    pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
    with pytest.raises(ValueError, match="stills only"):
        model.encode_images(pixels.repeat(2, 1), torch.tensor([[2, 4, 6]]))
    with pytest.raises(ValueError, match="multiples of 2"):
        model.encode_images(pixels, torch.tensor([[1, 8, 3]]))
    with pytest.raises(ValueError, match="pixel_values"):
        model.encode_images(pixels[:-1], grid)
    with pytest.raises(ValueError, match="image_grid_thw"):
        model(inputs["input_ids"], pixel_values=pixels)
    left = inputs["attention_mask"].clone()
    left[0, 0] = 0
    with pytest.raises(ValueError, match="right padded"):
        model.hidden_states(inputs["input_ids"], left)


def patches(name, width, height):
    """The corner of a photo as the processor gives it, and its grid: pairs of rows and columns of patches."""
    image = np.asarray(Image.open(SHARED / "photos" / name).convert("RGB").crop((0, 0, width, height)))
    image = (torch.from_numpy(image.copy()).float() - 127.5) / 127.5
    rows = rearrange(
        image.expand(2, -1, -1, -1),
        "t (bh ih ph) (bw iw pw) c -> (bh bw ih iw) (c t ph pw)",
        ih=2,
        iw=2,
        ph=16,
        pw=16,
    )
    return rows, (1, height // 16, width // 16)


@needs_shared
@pytest.mark.parametrize("case", ["text", "image", "images_batch", "reduced"])
def test_goldens(case):
    recorded = load_file(SHARED / "goldens/joyimage/text_encoder.safetensors")
    golden = {k.removeprefix(case + "."): v for k, v in recorded.items() if k.startswith(case + ".")}
    folder = SHARED / "goldens/tiny-joyimage-edit/text_encoder"
    model = load(folder, torch.float32)
    images = grids = None
    if case == "reduced":
        processed = load_file(SHARED / "goldens/joyimage/processor.safetensors")
        images = model.encode_images(processed["reduced.pixel_values"], processed["reduced.image_grid_thw"])
        close(images.embeds, golden["vision_merged"])
        return
    if case != "text":
        coffee, astronaut = patches("coffee.png", 192, 128), patches("astronaut.png", 128, 192)
        pixels, grids = zip(
            *{"image": [coffee], "images_batch": [coffee, astronaut, coffee]}[case], strict=True
        )
        grids = torch.tensor(grids)
        assert case != "image" or torch.equal(grids, golden["image_grid_thw"])
        images = model.encode_images(torch.cat(pixels), grids)
        close(images.embeds, golden["vision_merged"])
        for i, feature in enumerate(images.deepstack):
            if f"vision_deepstack_{i}" in golden:
                close(feature, golden[f"vision_deepstack_{i}"])
    layers = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda m, i, o: layers.append(o[0]))
    ids, mask = golden["input_ids"], golden["attention_mask"]
    states = model.hidden_states(ids, mask, images)
    close(states, golden["prenorm"])
    close(model.model.language_model.norm(states), golden["postnorm"])
    for i, layer in enumerate(layers):
        if f"layer_{i}" in golden:
            close(layer, golden[f"layer_{i}"])
    if "position_ids" in golden:
        assert torch.equal(model.position_ids(ids, grids, mask), golden["position_ids"])


@needs_shared
def test_published_names_and_shapes():
    folder = SHARED / "joyai-image-edit/text_encoder"
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration.from_config(folder)
        theirs = Theirs(TheirConfig.from_pretrained(folder))
    assert model.config == Qwen3VLConfig()  # the defaults are the published values
    mine = shapes(model)
    assert len(mine) == 750
    assert mine == shapes(theirs) == recorded_shapes(SHARED, "qwen3_vl_8b")
    assert sum(p.numel() for p in model.parameters()) == 8_767_123_696


OLD_ROPE = dict(
    rope_theta=5e6, rope_scaling=dict(rope_type="default", mrope_section=[4, 2, 2], mrope_interleaved=True)
)


def test_both_spellings_of_the_rotary_settings():
    new = {key: value for key, value in TEXT.items() if key != "rope_parameters"}
    assert Qwen3VLTextConfig.from_dict(TEXT) == Qwen3VLTextConfig.from_dict(new | OLD_ROPE)
    assert Qwen3VLTextConfig.from_dict(TEXT).rope_scaling.mrope_section == (4, 2, 2)
    assert Qwen3VLTextConfig.from_dict({"rope_scaling": None}) == Qwen3VLTextConfig()
    assert Qwen3VLTextConfig.from_dict(TEXT).replace(rope_theta=1e4).rope_scaling.mrope_section == (4, 2, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2_5_vl"},
        {"tie_word_embeddings": True},
        {"text_config": {"hidden_act": "gelu"}},
        {"text_config": {"attention_bias": True}},
        {"text_config": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}},
        {"text_config": {"rope_scaling": {"type": "dynamic"}}},
        {"text_config": {"rope_scaling": {"mrope_interleaved": False}}},
        {"vision_config": {"hidden_act": "silu"}},
        {"vision_config": {"rope_parameters": {"rope_type": "default"}}},
    ],
)
def test_settings_that_are_not_computed_are_refused(change):
    with pytest.raises(ValueError, match="not supported"):
        Qwen3VLConfig.from_dict(change)


def test_unknown_keys_and_dtype_survive_a_save(ours, tmp_path):
    model = ours("small", torch.bfloat16)
    raw = model.config.to_dict() | {"torch_dtype": "float32", "future": {"a": [1, None]}}
    again = Qwen3VLForConditionalGeneration.from_config(raw).bfloat16()
    again.save_pretrained(tmp_path)
    saved = read_json(tmp_path / "config.json")
    assert saved["future"] == {"a": [1, None]}
    assert [saved["dtype"], saved["text_config"]["dtype"], saved["vision_config"]["dtype"]] == [
        "bfloat16"
    ] * 3
    assert "_class_name" not in saved and "torch_dtype" not in saved
    assert saved["architectures"] == ["Qwen3VLForConditionalGeneration"]


@pytest.mark.parametrize("shape", ["small", "heads"])
def test_saved_folder_opens_in_transformers(ours, tmp_path, shape):
    model = ours(shape)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    theirs, report = Theirs.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert theirs.dtype == torch.float32
    inputs = make_inputs(shape, *PROMPTS["batch"])
    want, layers, _ = run_theirs(their_model(shape), inputs)
    got, again, _ = run_theirs(theirs.eval(), inputs)
    assert torch.equal(got, want) and torch.equal(again[-1], layers[-1])
    close(load(tmp_path)(**inputs).logits, want)


def test_flat_names(ours, tmp_path):
    """The names in the manner of Qwen2-VL, made here without the table; and back."""
    state = ours("small").state_dict()
    old = {}
    for name, tensor in state.items():
        top, _, rest = name.partition("model.")
        tower, _, tail = rest.partition(".")
        old[{"visual": f"visual.{tail}", "language_model": f"model.{tail}"}.get(tower, name)] = tensor
    assert {
        "visual.patch_embed.proj.weight",
        "visual.deepstack_merger_list.2.norm.bias",
        "lm_head.weight",
    } <= set(old)
    assert {
        "model.embed_tokens.weight",
        "model.layers.4.self_attn.q_norm.weight",
        "model.norm.weight",
    } <= set(old)
    assert len(old) == len(state)
    save_file(old, tmp_path / "flat.safetensors")
    files = TensorFiles([tmp_path / "flat.safetensors"])
    model = load_network(Qwen3VLForConditionalGeneration, ours("small").config, files)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert FLAT.invert(state).keys() == old.keys()


def test_only_what_is_computed_is_read(ours):
    """The states of the prompt take neither the final norm nor lm_head."""
    model = copy.deepcopy(ours("small"))
    inputs = make_inputs("small", *PROMPTS["image"])
    want = hidden(ours("small"), inputs)
    model.model.language_model.norm.weight.data.fill_(torch.nan)
    model.lm_head.weight.data.fill_(torch.nan)
    assert torch.equal(hidden(model, inputs), want)
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
