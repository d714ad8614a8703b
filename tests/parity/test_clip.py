"""CLIP against transformers, and the safety checker against diffusers: the same random weights in both."""

import copy
import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker as TheirChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig as TheirCLIPConfig
from transformers import CLIPTextConfig as TheirTextConfig
from transformers import CLIPTextModel as TheirText
from transformers import CLIPVisionConfig as TheirVisionConfig
from transformers import CLIPVisionModel as TheirVision
from transformers import CLIPVisionModelWithProjection as TheirProjection

from joyedit import ops
from joyedit.checkpoints.network import load_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.clip import layouts
from joyedit.convert.table import plan_conversion
from joyedit.models.clip import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    StableDiffusionSafetyChecker,
    StableDiffusionSafetyCheckerConfig,
)
from tests.parity.same_weights import (
    check_layouts_run_backwards,
    difference,
    recorded_shapes,
    with_weights_of,
)

# What a fork adds to the network, as patterns ("*.temperature"): the reference has no such tensors.
NEW_PARAMETERS: tuple[str, ...] = ()

EOS = 97  # of "sd2"; words are below it
TEXT = {
    "sd1": dict(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=23,
        hidden_act="quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
    ),
    "sd2": dict(
        vocab_size=99,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=19,
        hidden_act="gelu",
        layer_norm_eps=1e-3,
        bos_token_id=96,
        eos_token_id=EOS,
    ),
}
VISION = {
    "exact": dict(
        hidden_size=32,
        intermediate_size=37,
        projection_dim=11,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=28,
        patch_size=7,
        hidden_act="gelu",
    ),
    "quick": dict(
        hidden_size=24,
        intermediate_size=50,
        projection_dim=30,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=30,
        patch_size=7,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-3,
    ),
}
SHAPES = [(2, 19), (3, 7), (1, 1)]  # B, L


def randomise(module, seed=0):
    """Every parameter non-trivial: gains near one, weights that keep the scale, uneven attention."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            value = 0.3 * noise + (0 if name.endswith("bias") else 1)
        elif parameter.ndim == 1:
            value = 0.2 * noise
        else:
            value = noise * (0.7 if "embed" in name else 1.5 * parameter[0].numel() ** -0.5)
        parameter.data.copy_(value)
    return module.requires_grad_(False).eval()


def their_text(name, dtype=torch.float32):
    return randomise(TheirText(TheirTextConfig(**TEXT[name]))).to(dtype)


def their_vision(name, cls=TheirProjection):
    return randomise(cls(TheirVisionConfig(**VISION[name])))


def their_checker(name="quick", seed=0):
    config = TheirCLIPConfig(text_config={}, vision_config=VISION[name], projection_dim=16)
    return randomise(TheirChecker(config), seed)


OURS = {
    TheirText: CLIPTextModel,
    TheirVision: CLIPVisionModel,
    TheirProjection: CLIPVisionModelWithProjection,
    TheirChecker: StableDiffusionSafetyChecker,
}


def ours(model, cls=None):
    """Our network with the reference's weights, through its config and the key table."""
    return with_weights_of(model, cls or OURS[type(model)], NEW_PARAMETERS)


def prompts(name, shape, seed=1):
    """Ids below the end token, which is the largest of a row and may come twice, as padding does."""
    b, length = shape
    ids = torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(seed))
    for row in range(b):
        ids[row, min(length - 1, 2 + 3 * row) :] = EOS
    return ids


def pictures(model, number=2):
    config = getattr(model.config, "vision_config", model.config)
    return torch.randn(number, 3, config.image_size, config.image_size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TEXT)
def test_text(name, shape):
    model = their_text(name)
    network = ours(model)
    ids = prompts(name, shape)
    wanted = model(ids, output_hidden_states=True)
    found = network(ids)
    assert difference(found.last_hidden_state, wanted.last_hidden_state) <= 1e-5
    assert difference(found.pooler_output, wanted.pooler_output) <= 1e-5
    for layer, state in enumerate(wanted.hidden_states):
        assert difference(network.hidden_states(ids, layer), state) <= 1e-5
        assert difference(network.hidden_states(ids, layer - len(wanted.hidden_states)), state) <= 1e-5
    for skip in range(model.config.num_hidden_layers + 1):
        embeds = model.final_layer_norm(wanted.hidden_states[-(skip + 1)])
        assert difference(network.encode(ids, clip_skip=skip), embeds) <= 1e-5
    assert torch.equal(network.encode(ids), network.encode(ids, clip_skip=0))


def test_pooling():
    """The largest id where the config says 2, else the first end token; neither where padding is larger."""
    ids = torch.tensor([[5, EOS, 98, 98], [5, 6, EOS, EOS]])
    for name, rows in (("sd1", (2, 2)), ("sd2", (1, 2))):
        model = their_text(name)
        found = ours(model)(ids)
        assert difference(found.pooler_output, model(ids).pooler_output) <= 1e-5
        for row, place in enumerate(rows):
            assert torch.equal(found.pooler_output[row], found.last_hidden_state[row, place])


def test_text_looks_back_only_and_padding_is_text():
    network = ours(their_text("sd1"))
    ids = prompts("sd1", (1, 9))
    changed = ids.clone()
    changed[0, 5:] = 0
    a, b = network.encode(ids), network.encode(changed)
    assert torch.equal(a[:, :5], b[:, :5]) and difference(a[:, 5:], b[:, 5:]) > 1e-2


def test_later_layers_do_not_run():
    model = their_vision("exact")
    vision, text = ours(model), ours(their_text("sd1"))
    for network, layer in ((vision.vision_model, "post_layernorm"), (text, "final_layer_norm")):
        for module in (network.encoder.layers[-1], getattr(network, layer)):
            for p in module.parameters():
                p.fill_(float("nan"))
    assert torch.isfinite(vision.hidden_states(pictures(model), -2)).all()
    assert torch.isfinite(text.hidden_states(prompts("sd1", (1, 5)), -2)).all()


def test_learned_words_are_rows_after_the_vocabulary():
    model = their_text("sd1")
    network = ours(model)
    rows = torch.randn(2, 32)
    for net in (model, network):
        weight = net.embeddings.token_embedding.weight
        net.embeddings.token_embedding.weight = torch.nn.Parameter(torch.cat((weight, rows)), False)
    ids = torch.tensor([[7, 99, 100, 8]])
    assert difference(network(ids).last_hidden_state, model(ids).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("name", VISION)
def test_vision(name):
    model = their_vision(name)
    network, tower = ours(model), ours(model, CLIPVisionModel)
    x = pictures(model, 3)
    wanted = model(x, output_hidden_states=True)
    found = network(x)
    assert difference(found.image_embeds, wanted.image_embeds) <= 1e-5
    assert difference(found.last_hidden_state, wanted.last_hidden_state) <= 1e-5
    assert difference(tower(x).pooler_output, model.vision_model(x).pooler_output) <= 1e-5
    assert torch.equal(tower(x).last_hidden_state, found.last_hidden_state)
    for layer, state in enumerate(wanted.hidden_states):
        for number in (layer, layer - len(wanted.hidden_states)):
            assert difference(network.hidden_states(x, number), state) <= 1e-5
            assert torch.equal(tower.hidden_states(x, number), network.hidden_states(x, number))


@pytest.mark.parametrize("has_bf16", [True, False], ids=["bf16_units", "no_bf16_units"])
@pytest.mark.parametrize(
    "kind", ["sd2", "quick", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sd1", "exact"))]
)
def test_bf16_is_at_most_twice_as_far_from_float64_as_the_reference(monkeypatch, kind, has_bf16):
    monkeypatch.setattr(ops, "CPU_HAS_BF16", has_bf16)
    half = (their_text(kind) if kind in TEXT else their_vision(kind)).bfloat16()
    exact = copy.deepcopy(half).double()
    network = ours(half)
    x = prompts(kind, (4, 19)) if kind in TEXT else pictures(half, 4).bfloat16()
    truth = exact(x if kind in TEXT else x.double(), output_hidden_states=True)
    theirs, found = half(x, output_hidden_states=True), network(x)
    assert found[0].dtype is found[1].dtype is torch.bfloat16
    parts = ("last_hidden_state", "pooler_output" if kind in TEXT else "image_embeds")
    for part in parts:
        limit = 2 * difference(getattr(theirs, part), getattr(truth, part))
        assert difference(getattr(found, part), getattr(truth, part)) <= limit
    limit = 2 * difference(theirs.hidden_states[-2], truth.hidden_states[-2])
    assert difference(network.hidden_states(x, -2), truth.hidden_states[-2]) <= limit


def test_narrow_weights_with_wide_input(monkeypatch):
    """fp32 pictures, bf16 weights, a CPU without bf16 units: computed and returned in fp32."""
    monkeypatch.setattr(ops, "CPU_HAS_BF16", False)
    half = their_vision("exact").bfloat16()
    x = pictures(half)
    network = ours(half)
    assert difference(network(x).image_embeds, half.float()(x).image_embeds) <= 1e-5


def scores_by_hand(model, x):
    """The rule of the specification, one number at a time, on the reference's embeddings."""
    embeds = model.visual_projection(model.vision_model(x).pooler_output)
    special, concepts = [], []
    for embed in embeds:
        more = 0.0
        for table, weights, out in (
            (model.special_care_embeds, model.special_care_embeds_weights, special),
            (model.concept_embeds, model.concept_embeds_weights, concepts),
        ):
            out.append([])
            for concept, threshold in zip(table, weights, strict=True):
                cosine = F.cosine_similarity(embed, concept, dim=0).item()
                out[-1].append(round(cosine - threshold.item() + more, 3))
                if out is special and out[-1][-1] > 0:
                    more = 0.01
    return torch.tensor(special), torch.tensor(concepts)


def test_safety_scores():
    flags, stricter = [], 0
    for seed in range(12):
        model = their_checker(seed=seed)
        x = pictures(model, 5)
        embeds = F.normalize(model.visual_projection(model.vision_model(x).pooler_output))
        for part in ("special_care", "concept"):
            cosines = embeds @ F.normalize(getattr(model, f"{part}_embeds")).T
            noise = 0.004 * torch.randn(cosines.shape[1]) + (0.006 if part == "concept" else 0)
            # near the largest of the batch: few concepts are beyond it, more are with special care
            getattr(model, f"{part}_embeds_weights").copy_(cosines.amax(dim=0) + noise)
        found = ours(model).scores(x)
        special, concepts = scores_by_hand(model, x)
        # one unit of the last digit where the cosine is at a half
        assert (found.special - special).abs().max() < 1.5e-3
        assert (found.concepts - concepts).abs().max() < 1.5e-3
        agree = ((found.concepts - concepts).abs() < 1e-5).float().mean()
        assert agree > 0.97
        images = torch.ones(5, 3, 4, 4)
        blackened, found_flags = ours(model)(x, images)
        theirs, their_flags = model(x, images.clone())
        assert found_flags == their_flags == (concepts > 0).any(dim=1).tolist()
        assert torch.equal(blackened, theirs) and images.min() == 1
        flags += found_flags
        plain = embeds @ F.normalize(model.concept_embeds).T - model.concept_embeds_weights
        stricter += int(((plain > 0).any(dim=1) != torch.tensor(found_flags)).sum())
    assert 5 < sum(flags) < 55, "some are flagged and some are not"
    assert stricter > 3, "special care decided some"


def test_special_care_counts_for_the_following_concepts():
    """Two special concepts at the same distance: the first triggers the second."""
    model = their_checker()
    x = pictures(model, 1)
    embed = F.normalize(model.visual_projection(model.vision_model(x).pooler_output))[0]
    model.special_care_embeds.copy_(embed)
    model.concept_embeds.copy_(embed)
    for thresholds, wanted in (
        ([0.998, 1.005, 1.005], [0.002, 0.005, 0.005]),
        ([1.005, 0.998, 1.005], [-0.005, 0.002, 0.005]),
        ([1.005, 1.005, 1.005], [-0.005, -0.005, -0.005]),
    ):
        model.special_care_embeds_weights.copy_(torch.tensor(thresholds))
        model.concept_embeds_weights.copy_(torch.linspace(1.008, 1.02, 17))
        network = ours(model)
        found = network.scores(x)
        torch.testing.assert_close(found.special[0], torch.tensor(wanted), atol=1e-6, rtol=0)
        assert network(x, torch.ones(1, 3))[1] == [(found.concepts > 0).any()] == [max(wanted) > 0]


@pytest.mark.parametrize(
    "form",
    [
        "tensor",
        "list of arrays",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("array", "list of tensors")),
    ],
)
def test_flagged_pictures_are_black_copies(form, caplog):
    model = their_checker()
    network = ours(model)
    x = pictures(model, 3)
    concepts = network.scores(x).concepts
    model.concept_embeds_weights.add_(concepts[1].max() + concepts.max())  # nobody
    network = ours(model)
    images = np.random.default_rng(0).random((3, 5, 4, 3), dtype=np.float32) + 1
    if "tensor" in form:
        images = torch.from_numpy(images)
    images = list(images) if form.startswith("list") else images
    before = copy.deepcopy(images)
    out, flags = network(x, images)
    assert flags == [False] * 3 and not caplog.records
    assert all((a == b).all() for a, b in zip(out, images, strict=True))
    model.concept_embeds_weights.copy_(torch.full((17,), 2.0))
    cosines = (
        F.normalize(model.visual_projection(model.vision_model(x).pooler_output))
        @ F.normalize(model.concept_embeds[:1]).T
    )
    model.concept_embeds_weights[0] = cosines.flatten().sort().values[1:].mean()  # one of three is beyond it
    out, flags = ours(model)(x, images)
    assert flags == (cosines.flatten() == cosines.max()).tolist()
    assert "1 of 3 images" in caplog.text
    for a, b, flag, old in zip(out, images, flags, before, strict=True):
        assert (b == old).all() and type(a) is type(b)
        assert (a == 0).all() if flag else (a == b).all()
    with pytest.raises(ValueError, match="3 pictures, images 2"):
        network(x, images[:2])


def on_meta(cls, raw):
    with torch.device("meta"):
        network = cls(cls.Config.from_dict(raw))
    assert all(p.is_meta for p in network.parameters())
    return {key: tuple(p.shape) for key, p in network.state_dict().items()}, sum(
        p.numel() for p in network.parameters()
    )


@pytest.mark.parametrize(
    "folder, name, tensors, parameters",
    [
        ("stable-diffusion-v1-5", "sd15", 196, 123_060_480),
        ("stable-diffusion-2-1", "sd21", 372, 340_387_840),
        ("stable-diffusion-2-1-base", "sd21", 372, 340_387_840),
    ],
)
def test_real_text_configs(shared_data, folder, name, tensors, parameters):
    raw = json.loads((shared_data / folder / "text_encoder" / "config.json").read_text())
    shapes, count = on_meta(CLIPTextModel, raw)
    assert shapes == recorded_shapes(shared_data, f"{name}_clip_text")
    assert (len(shapes), count) == (tensors, parameters)
    if name == "sd15":
        assert CLIPTextConfig.from_dict(raw) == CLIPTextConfig()
    saved = CLIPTextConfig.from_dict(raw).to_dict()
    assert {k: saved["dtype" if k == "torch_dtype" else k] for k in raw} == raw


def test_real_vision_config(shared_data):
    raw = json.loads((shared_data / "chronoedit-14b" / "image_encoder" / "config.json").read_text())
    wanted = recorded_shapes(shared_data, "clip_vit_h_vision")
    shapes, count = on_meta(CLIPVisionModelWithProjection, raw)
    assert shapes == wanted and (len(shapes), count) == (520, 632_076_800)
    shapes, count = on_meta(CLIPVisionModel, raw)
    assert shapes == {k.removeprefix("vision_model."): v for k, v in wanted.items() if "projection" not in k}
    assert count == 630_766_080
    assert CLIPVisionConfig.from_dict(raw) == CLIPVisionConfig()


def test_real_safety_checker_config(shared_data):
    raw = json.loads((shared_data / "stable-diffusion-v1-5" / "safety_checker" / "config.json").read_text())
    config = StableDiffusionSafetyCheckerConfig.from_dict(raw)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    for name in (*fields, "patch_size", "hidden_act", "layer_norm_eps", "num_channels"):
        assert config.vision_config[name] == StableDiffusionSafetyCheckerConfig().vision_config[name]
    assert config.projection_dim == 768 and config["text_config"]["num_attention_heads"] == 12
    with torch.device("meta"):
        model = TheirChecker(TheirCLIPConfig.from_dict(raw))
    shapes, count = on_meta(StableDiffusionSafetyChecker, raw)
    assert shapes == {key: tuple(p.shape) for key, p in model.state_dict().items()}
    assert 0 < 1_215_981_830 - 4 * count < 200_000  # the published fp32 pickle, less its names


def test_nested_vision_configs():
    """Keys that an older file leaves out have the defaults of transformers, not those of ViT-L/14."""
    theirs = TheirVisionConfig().to_dict()
    absent = CLIPVisionConfig.WHEN_ABSENT
    assert {
        key: theirs[key] for key in absent if key not in ("architectures", "dtype")
    }.items() <= absent.items()
    for key in ("num_channels", "image_size", "layer_norm_eps"):
        assert CLIPVisionConfig()[key] == theirs[key]
    for raw in (
        {"vision_config": {"hidden_size": 96}},
        {"vision_config": {"hidden_size": 96, "patch_size": 14}, "vision_config_dict": {"hidden_size": 48}},
    ):
        config = StableDiffusionSafetyCheckerConfig.from_dict({**raw, "projection_dim": 16})
        vision = TheirCLIPConfig.from_dict(copy.deepcopy({**raw, "projection_dim": 16})).vision_config
        for key in ("hidden_size", "num_hidden_layers", "patch_size", "hidden_act", "intermediate_size"):
            assert config.vision_config[key] == getattr(vision, key), key
        assert copy.deepcopy(config) == config == config.replace(projection_dim=16)


# Written down from the original's module structure; `to_openclip` makes the others.
OPENCLIP_BY_HAND = {
    "token_embedding.weight": ["embeddings.token_embedding.weight"],
    "positional_embedding": ["embeddings.position_embedding.weight"],
    "ln_final.bias": ["final_layer_norm.bias"],
    "transformer.resblocks.0.ln_1.weight": ["encoder.layers.0.layer_norm1.weight"],
    "transformer.resblocks.22.ln_2.bias": ["encoder.layers.22.layer_norm2.bias"],
    "transformer.resblocks.7.mlp.c_fc.weight": ["encoder.layers.7.mlp.fc1.weight"],
    "transformer.resblocks.7.mlp.c_proj.bias": ["encoder.layers.7.mlp.fc2.bias"],
    "transformer.resblocks.12.attn.out_proj.weight": ["encoder.layers.12.self_attn.out_proj.weight"],
    "transformer.resblocks.12.attn.in_proj_weight": [
        f"encoder.layers.12.self_attn.{part}_proj.weight" for part in "qkv"
    ],
    "transformer.resblocks.22.attn.in_proj_bias": [
        f"encoder.layers.22.self_attn.{part}_proj.bias" for part in "qkv"
    ],
}
LEFT_OUT = {"text_projection": (48, 48), "logit_scale": (), "attn_mask": (19, 19)}
LEFT_OUT_BLOCK = ("ln_1.weight", "ln_2.bias", "attn.in_proj_weight", "attn.out_proj.bias", "mlp.c_fc.weight")


def to_openclip(name):
    name = name.replace("embeddings.token_embedding", "token_embedding")
    name = name.replace("embeddings.position_embedding.weight", "positional_embedding")
    name = name.replace("final_layer_norm", "ln_final").replace("encoder.layers", "transformer.resblocks")
    name = re.sub(r"layer_norm(\d)", r"ln_\1", name).replace("fc1", "c_fc").replace("fc2", "c_proj")
    name = re.sub(r"self_attn\.[qkv]_proj\.(weight|bias)", r"attn.in_proj_\1", name)
    return name.replace("self_attn", "attn")


def to_openclip_state(state, layers, prefix=""):
    """The reference's tensors as OpenCLIP holds them, with the rest of its file."""
    out = {}
    for key, value in state.items():
        if "q_proj" in key:
            value = torch.cat([state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
        if "k_proj" not in key and "v_proj" not in key:
            out[prefix + to_openclip(key)] = value.clone()
    for key, shape in LEFT_OUT.items():
        out[prefix + key] = torch.ones(shape)
    for key in LEFT_OUT_BLOCK:
        out[f"{prefix}transformer.resblocks.{layers}.{key}"] = torch.ones(3)
    return out


@pytest.mark.parametrize("prefix", ["", "cond_stage_model.model."])
def test_openclip_layout_of_the_real_config(shared_data, prefix):
    wanted = recorded_shapes(shared_data, "sd21_clip_text")
    raw = json.loads((shared_data / "stable-diffusion-2-1" / "text_encoder" / "config.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in wanted.items()}
    found = {key: tuple(value.shape) for key, value in to_openclip_state(state, 23, prefix).items()}
    assert len(found) == 372 - 23 * 4 + len(LEFT_OUT) + len(LEFT_OUT_BLOCK)
    assert found[f"{prefix}transformer.resblocks.0.attn.in_proj_weight"] == (3072, 1024)
    plan = plan_conversion(layouts(CLIPTextConfig.from_dict(raw)), found, wanted)
    assert plan.layout.name == ("openclip-ldm" if prefix else "openclip")
    assert len(plan.dropped) == len(LEFT_OUT) + len(LEFT_OUT_BLOCK) and all(plan.dropped.values())
    for source, names in OPENCLIP_BY_HAND.items():
        for index, name in enumerate(names):
            assert (plan.steps[name].sources, plan.steps[name].index) == ((prefix + source,), index)


@pytest.mark.parametrize("form", ["openclip", "openclip_ckpt", "ldm", "ldm_flat_ids", "published", "bin"])
def test_foreign_text_files_load_and_compute_the_same(tmp_path, form):
    name = "sd2" if form.startswith("openclip") else "sd1"
    model = their_text(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    path = tmp_path / ("text.safetensors" if form in ("openclip", "ldm", "published") else "text.bin")
    if form.startswith("openclip"):
        prefix = "cond_stage_model.model." if form == "openclip_ckpt" else ""
        state = to_openclip_state(state, 3, prefix)
    else:
        prefix = "cond_stage_model.transformer." if form.startswith("ldm") else ""
        state = {f"{prefix}text_model.{key}": value for key, value in state.items()}
        state[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(23)[None]
    if path.suffix == ".bin":
        torch.save({"state_dict": state} if "ckpt" in form or "ldm" in form else state, path)
    else:
        save_file(state, path)
    config = CLIPTextConfig.from_dict(model.config.to_dict())
    network = load_network(CLIPTextModel, config, TensorFiles([path]))
    ids = prompts(name, (2, 11))
    assert difference(network(ids).last_hidden_state, model(ids).last_hidden_state) <= 1e-5
    network.save_pretrained(tmp_path / "saved")  # thirds of one tensor are saved as their own
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == set(model.state_dict())


def test_layouts_run_backwards():
    for model in (their_text("sd2"), their_vision("quick", TheirVision), their_checker()):
        network = ours(model)
        check_layouts_run_backwards(network.layouts(), network.state_dict())


def test_folders_open_here_and_there(tmp_path):
    ids = prompts("sd2", (2, 11))
    for model in (
        their_text("sd2"),
        their_vision("quick", TheirVision),
        their_vision("exact"),
        their_checker(),
    ):
        cls, name = OURS[type(model)], type(model).__name__
        x = ids if cls is CLIPTextModel else pictures(model)
        model.save_pretrained(tmp_path / "theirs" / name)
        network = cls.from_pretrained(tmp_path / "theirs" / name)
        network.save_pretrained(tmp_path / "ours" / name)
        again, told = type(model).from_pretrained(tmp_path / "ours" / name, output_loading_info=True)
        assert not any(told[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        theirs, config = (
            json.loads((tmp_path / who / name / "config.json").read_text()) for who in ("theirs", "ours")
        )
        for key, value in theirs.items():
            assert value.items() <= config[key].items() if isinstance(value, dict) else value == config[key]
        if cls is StableDiffusionSafetyChecker:
            assert torch.equal(again.concept_embeds, model.concept_embeds)
            model, again, network = model.vision_model, again.vision_model, network.vision_model
        for found in (network(x)[0], again(x)[0]):
            assert difference(found, model(x)[0]) <= 1e-5
    half = CLIPTextModel.from_pretrained(tmp_path / "ours" / "CLIPTextModel", torch_dtype="fp16")
    half.save_pretrained(tmp_path / "half")
    assert TheirText.from_pretrained(tmp_path / "half").dtype is torch.float16


def test_vision_tower_alone_from_a_file_with_the_projection(tmp_path):
    """How ChronoEdit opens its image encoder; older files have position ids, too."""
    model = their_vision("exact")
    folder = tmp_path / "image_encoder"
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, folder / "model.safetensors")
    network = CLIPVisionModel.from_pretrained(tmp_path, subfolder="image_encoder", torch_dtype=torch.float32)
    x = pictures(model)
    wanted = model(x, output_hidden_states=True).hidden_states[-2]
    assert difference(network.hidden_states(x, layer=-2), wanted) <= 1e-5
    network.save_pretrained(tmp_path / "saved")
    assert TheirVision.from_pretrained(tmp_path / "saved")(x).last_hidden_state.shape == (2, 17, 32)
    assert difference(CLIPVisionModelWithProjection.from_pretrained(folder)(x)[0], model(x)[0]) <= 1e-5


def test_published_safety_checker_names(tmp_path):
    model = their_checker()
    state = {
        re.sub(r"^vision_model\.", "vision_model.vision_model.", k): v for k, v in model.state_dict().items()
    }
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, tmp_path / "model.safetensors")
    config = StableDiffusionSafetyCheckerConfig.from_dict(model.config.to_dict())
    network = load_network(
        StableDiffusionSafetyChecker, config, TensorFiles([tmp_path / "model.safetensors"])
    )
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in network.state_dict().items())


def test_files_that_do_not_fit(tmp_path):
    model = their_vision("exact", TheirVision)
    save_file(model.state_dict(), tmp_path / "tower.safetensors")
    config = CLIPVisionConfig.from_dict(model.config.to_dict())
    with pytest.raises(ValueError, match="not the weights of this CLIPVisionModelWithProjection"):
        load_network(CLIPVisionModelWithProjection, config, TensorFiles([tmp_path / "tower.safetensors"]))
    save_file(to_openclip_state(their_text("sd2").state_dict(), 3), tmp_path / "text.safetensors")
    config = CLIPTextConfig.from_dict({**TEXT["sd2"], "num_hidden_layers": 2})
    with pytest.raises(ValueError, match="closest layout 'openclip'.*unknown"):
        load_network(CLIPTextModel, config, TensorFiles([tmp_path / "text.safetensors"]))


@pytest.mark.parametrize(
    "ids, message",
    [
        (torch.zeros(5, dtype=torch.long), r"input_ids \(5,\).*1 to 23 tokens"),
        (torch.zeros(1, 24, dtype=torch.long), r"input_ids \(1, 24\)"),
        (torch.zeros(1, 0, dtype=torch.long), r"input_ids \(1, 0\)"),
        (torch.tensor([[1, 99]]), "from 1 to 99.*99 tokens"),
        (torch.tensor([[-1, 9]]), "from -1 to 9"),
    ],
)
def test_tokens_that_do_not_fit(ids, message):
    with pytest.raises(ValueError, match=message):
        ours(their_text("sd1"))(ids)


def test_other_input_that_does_not_fit():
    network, text = ours(their_vision("exact")), ours(their_text("sd1"))
    for shape in ((1, 3, 28, 27), (1, 1, 28, 28), (3, 28, 28), (0, 3, 28, 28)):
        with pytest.raises(ValueError, match=r"pixel_values.*'batch', 3, 28, 28"):
            network(torch.zeros(shape))
    for layer in (5, -6):
        with pytest.raises(ValueError, match=f"layer={layer}.*0 to 4, or -5 to -1"):
            network.hidden_states(torch.zeros(1, 3, 28, 28), layer)
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="layer=6.*0 to 5"):
        text.hidden_states(ids, 6)
    for skip in (6, -1):
        with pytest.raises(ValueError, match=f"clip_skip={skip}.*between 0 and 5"):
            text.encode(ids, skip)


@pytest.mark.parametrize(
    "cls, changes, message",
    [
        (CLIPTextConfig, {"hidden_act": "gelu_new"}, "hidden_act='gelu_new'.*'quick_gelu' or 'gelu'"),
        (CLIPTextConfig, {"model_type": "clip"}, "model_type='clip'.*'clip_text_model'"),
        (CLIPTextConfig, {"use_attention_mask": True}, "use_attention_mask"),
        (CLIPTextConfig, {"num_attention_heads": 7}, "hidden_size=768.*num_attention_heads=7"),
        (CLIPTextConfig, {"eos_token_id": [2, 3]}, "eos_token_id=.*(one integer|type int)"),
        (CLIPVisionConfig, {"hidden_act": "relu"}, "hidden_act"),
        (CLIPVisionConfig, {"model_type": "siglip_vision_model"}, "model_type"),
        (CLIPVisionConfig, {"patch_size": [14, 14]}, "patch_size=.*(one integer|type int)"),
        (StableDiffusionSafetyCheckerConfig, {"model_type": "siglip"}, "model_type"),
        (StableDiffusionSafetyCheckerConfig, {"vision_config": {"hidden_act": "relu"}}, "hidden_act"),
    ],
)
def test_configs_that_are_not_computed(cls, changes, message):
    with pytest.raises(ValueError, match=message):
        cls.from_dict(changes)
