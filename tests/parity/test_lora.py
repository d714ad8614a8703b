"""LoRA against diffusers and PEFT: the same file in the same network, unfused and fused, both ways."""

import copy

import pytest
import torch
from diffusers import ChronoEditTransformer3DModel
from diffusers import UNet2DConditionModel as Reference
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin, WanLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as ReferenceTextModel

from joyedit.convert.table import IDENTITY, Layout, rename
from joyedit.lora import Adapters
from joyedit.models.clip import CLIPTextModel
from joyedit.models.sd_unet import UNet2DConditionModel
from tests.lora_layers import WAN

SD1 = dict(
    block_out_channels=[16, 32],
    layers_per_block=2,
    sample_size=8,
    down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    cross_attention_dim=12,
    attention_head_dim=[2, 4],
    norm_num_groups=8,
)
SD2 = {**SD1, "use_linear_projection": True}


@torch.no_grad()
def filled(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise / parameter[0].numel() ** 0.5)
    return network.requires_grad_(False).eval()


def pair(config):
    reference = filled(Reference.from_config(dict(config)))
    ours = UNet2DConditionModel.from_config(config)
    ours.load_state_dict(reference.state_dict())
    return reference, ours.requires_grad_(False).eval()


def run(network, dtype=torch.float32, **kwargs):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 7, 9, generator=generator), torch.randn(2, 5, 12, generator=generator)
    return network(latents.to(dtype), torch.tensor([501, 20]), text.to(dtype), **kwargs).sample.float()


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def layers(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def factors(module, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = module.weight.shape
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator)
    return down / down[0].numel() ** 0.5, 0.3 * up


def peft_file(network, path, seed=0, rank=3):
    state = {}
    for number, (name, module) in enumerate(layers(network).items()):
        down, up = factors(module, rank, 1000 * seed + number)
        state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    save_file(state, path)
    return path


def kohya_file(network, path, rank=4):
    state = {}
    for number, (name, module) in enumerate(layers(network).items()):
        down, up = factors(module, rank, number)
        base = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
        state[f"{base}.alpha"] = torch.tensor(3.0)  # the reference ignores an attention layer's own alpha
    save_file(state, path)
    return path


def load_reference(reference, path, name="default"):
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(path), return_lora_metadata=True
    )
    reference.load_lora_adapter(
        state, prefix="unet", network_alphas=alphas, adapter_name=name, metadata=metadata
    )


@pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
@pytest.mark.parametrize("write", [peft_file, kohya_file])
def test_unet_equals_the_reference(config, write, tmp_path):
    reference, ours = pair(config)
    path = write(ours, tmp_path / "style.safetensors")
    plain = run(reference)
    load_reference(reference, path)
    adapters = Adapters({"unet": ours})
    report = adapters.load_lora_weights(path)
    assert set(report.matched["unet"]) == {f"{name}.weight" for name in layers(ours)} and not report.unmatched
    theirs = run(reference)
    assert difference(theirs, plain) > 0.1
    assert difference(run(ours), theirs) < 1e-5
    with adapters.scaled(0.6):
        halfway = run(reference, cross_attention_kwargs={"scale": 0.6})
        assert difference(run(ours), halfway) < 1e-5
    reference.fuse_lora(lora_scale=0.8)
    adapters.fuse_lora(lora_scale=0.8)
    assert difference(run(ours), run(reference)) < 1e-5


def test_several_adapters_equal_the_reference(tmp_path):
    reference, ours = pair(SD1)
    adapters = Adapters({"unet": ours})
    for seed, name in enumerate(("ink", "oil")):
        path = peft_file(ours, tmp_path / f"{name}.safetensors", seed=seed, rank=2 + seed)
        load_reference(reference, path, name)
        adapters.load_lora_weights(path, name)
    assert reference.active_adapters() == adapters.get_active_adapters() == ["oil"]
    assert difference(run(ours), run(reference)) < 1e-5
    reference.set_adapters(["ink", "oil"], [0.7, -0.4])
    adapters.set_adapters(["ink", "oil"], [0.7, -0.4])
    assert difference(run(ours), run(reference)) < 1e-5
    reference.disable_lora()
    adapters.disable_lora()
    assert difference(run(ours), run(reference)) < 1e-5
    reference.enable_lora()
    adapters.enable_lora()
    reference.fuse_lora()
    adapters.fuse_lora()
    assert difference(run(ours), run(reference)) < 1e-5


WEIGHTS_BY_BLOCK = [
    {"down": 0.5, "mid": -1, "up": 2},
    {"down": {"block_0": 0.3}},
    {"down": {"block_0": [0.2, -0.7]}, "mid": [0.4]},
    {"up": {"block_1": [0.1, 0.9, -0.5]}},
    {"up": {"block_1": [0.6]}, "down": 0},
    {},
]


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS_BY_BLOCK, ids=str)
def test_weights_by_block_equal_the_reference(weights, tmp_path):
    """Of layers inside of blocks: for the others the reference's rule fails."""
    reference, ours = pair(SD1)
    adapters = Adapters({"unet": ours})
    path = peft_file(ours, tmp_path / "ink.safetensors")
    inside = {key: value for key, value in load_file(path).items() if "_block" in key}
    save_file(inside, path)
    load_reference(reference, path, "ink")
    adapters.load_lora_weights(path, "ink")
    full = run(reference)
    reference.set_adapters("ink", dict(copy.deepcopy(weights)))
    adapters.set_adapters("ink", {"unet": weights})
    theirs = run(reference)
    assert difference(run(ours), theirs) < 1e-5
    assert bool(weights) == (difference(theirs, full) > 1e-3)
    assert adapters.active_weights["ink"] == {"unet": weights}
    if weights:
        with adapters.scaled(0.5):
            halfway = run(reference, cross_attention_kwargs={"scale": 0.5})
            assert difference(run(ours), halfway) < 1e-5
    adapters.fuse_lora()
    assert difference(run(ours), theirs) < 1e-5
    adapters.unfuse_lora()
    adapters.set_adapters(["ink"], [{"unet": 0.7}])
    reference.set_adapters("ink", 0.7)
    assert difference(run(ours), run(reference)) < 1e-5


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"down": {"block_1": 1}}, "down has no .'block_1'.; with transformers are .'block_0'."),
        ({"up": {"block_1": [1, 2]}}, "up wants 3 numbers"),
        ({"side": 1}, "'side'. is none of down, mid, up"),
        ({"mid": "much"}, "'much' for mid is not a number"),
    ],
)
def test_weights_of_blocks_that_are_not_there(weights, message, tmp_path):
    ours = pair(SD1)[1]
    adapters = Adapters({"unet": ours})
    adapters.load_lora_weights(peft_file(ours, tmp_path / "ink.safetensors"), "ink")
    with pytest.raises(ValueError, match=message):
        adapters.set_adapters("ink", {"unet": weights})
    assert adapters.active_weights["ink"] == {"unet": 1.0}


def test_half_precision_is_as_close_to_the_truth_as_the_reference(tmp_path):
    reference, ours = pair(SD2)
    path = peft_file(reference, tmp_path / "style.safetensors")
    exact = copy.deepcopy(reference).double()
    for network in (reference, exact):
        load_reference(network, path)
    truth = run(exact.double(), torch.float64)
    theirs = run(reference.bfloat16(), torch.bfloat16)
    adapters = Adapters({"unet": ours.bfloat16()})
    adapters.load_lora_weights(path)
    error, limit = difference(run(ours, torch.bfloat16), truth), difference(theirs, truth)
    assert 0 < error <= 2 * limit


def test_adapter_saved_here_opens_in_the_reference(tmp_path):
    reference, ours = pair(SD1)
    adapters = Adapters({"unet": ours})
    adapters.load_lora_weights(kohya_file(ours, tmp_path / "style.safetensors"))
    adapters.save_lora_weights(tmp_path / "saved")
    load_reference(reference, tmp_path / "saved" / "pytorch_lora_weights.safetensors")
    assert difference(run(reference), run(ours)) < 1e-5


def test_adapter_saved_by_the_reference_opens_here(tmp_path):
    """With the strength in the header of the file, where this reader looks for it."""
    reference, ours = pair(SD1)
    load_reference(reference, kohya_file(ours, tmp_path / "style.safetensors"))
    reference.save_lora_adapter(tmp_path / "one")
    config = reference.peft_config["default"].to_dict()
    metadata = {key: config[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}
    state = load_file(tmp_path / "one" / "pytorch_lora_weights.safetensors")
    StableDiffusionLoraLoaderMixin.save_lora_weights(
        tmp_path / "two", unet_lora_layers=state, unet_lora_adapter_metadata=metadata
    )
    adapters = Adapters({"unet": ours})
    assert not adapters.load_lora_weights(tmp_path / "two").unmatched
    assert difference(run(ours), run(reference)) < 1e-5


TEXT = dict(
    vocab_size=60,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=9,
    hidden_act="quick_gelu",
    bos_token_id=0,
    eos_token_id=2,
)
TEXT_LAYERS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)


def text_pair():
    reference = filled(ReferenceTextModel(CLIPTextConfig(**TEXT)))
    ours = CLIPTextModel.from_config(TEXT)
    ours.load_state_dict(reference.state_dict())
    return reference, ours.requires_grad_(False).eval()


def run_text(network):
    ids = torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(1))
    return network(ids)[0]


def text_file(network, path, form, layers):
    state, wanted = {}, {}
    for number, layer in enumerate(layers):
        module = network.get_submodule(layer)
        down, up = factors(module, 3, number)
        base = {
            "diffusers": f"text_encoder.text_model.{layer}.lora_linear_layer",
            "kohya": f"lora_te_text_model_{layer.replace('.', '_')}.lora",
            "kohya, SDXL's prefix": f"lora_te1_text_model_{layer.replace('.', '_')}.lora",
            "peft": f"text_encoder.{layer}.lora",
            "peft, older": f"text_encoder.text_model.{layer}.lora",
            "processor": f"text_encoder.text_model.{layer.replace('out_proj', 'to_out_lora')}",
        }[form]
        a, b = ("_A", "_B") if form.startswith("peft") else (".down", ".up")
        if form.startswith("kohya"):
            a, b = "_down", "_up"
            state[base.removesuffix(".lora") + ".alpha"] = torch.tensor(1.5)
        if form == "processor":
            for part in "qkv":
                base = base.replace(f"{part}_proj", f"to_{part}_lora")
        state |= {f"{base}{a}.weight": down, f"{base}{b}.weight": up}
        scale = 0.5 if form.startswith("kohya") else 1.0
        wanted[f"{layer}.weight"] = module.weight + scale * torch.einsum("or,ri->oi", up, down)
    save_file(state, path)
    return path, wanted


FORMS = ["diffusers", "peft", "peft, older", "kohya", "kohya, SDXL's prefix", "processor"]


@pytest.mark.parametrize("form", FORMS)
def test_text_encoder_follows_the_formula_and_equals_the_reference(form, tmp_path):
    """Where the reference drops layers (those of attention in kohya's names) or fails, the formula decides:
    its network with the weights of the formula."""
    reference, ours = text_pair()
    kinds = TEXT_LAYERS[:4] if form == "processor" else TEXT_LAYERS
    layers = [f"encoder.layers.{n}.{kind}" for n in range(2) for kind in kinds]
    path, wanted = text_file(ours, tmp_path / "style.safetensors", form, layers)
    plain = run_text(reference)
    adapters = Adapters({"text_encoder": ours})
    report = adapters.load_lora_weights(path)
    assert sorted(report.matched["text_encoder"]) == sorted(wanted) and not report.unmatched
    reference.load_state_dict({**reference.state_dict(), **wanted})
    theirs = run_text(reference)
    assert difference(theirs, plain) > 0.1
    assert difference(run_text(ours), theirs) < 1e-5
    adapters.fuse_lora()
    assert all(difference(ours.state_dict()[name], tensor) < 1e-6 for name, tensor in wanted.items())
    assert difference(run_text(ours), theirs) < 1e-5


@pytest.mark.parametrize(("form", "kinds"), [("diffusers", TEXT_LAYERS[:4]), ("kohya", TEXT_LAYERS[4:])])
def test_text_encoder_equals_what_the_reference_loads(form, kinds, tmp_path):
    reference, ours = text_pair()
    layers = [f"encoder.layers.{n}.{kind}" for n in range(2) for kind in kinds]
    path, _ = text_file(ours, tmp_path / "style.safetensors", form, layers)
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(path))
    plain = run_text(reference)
    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
        state, alphas, reference, prefix="text_encoder"
    )
    theirs = run_text(reference)
    assert difference(theirs, plain) > 0.1
    Adapters({"text_encoder": ours}).load_lora_weights(path)
    assert difference(run_text(ours), theirs) < 1e-5


def test_saved_text_adapter_opens_in_the_reference(tmp_path):
    reference, ours = text_pair()
    layers = [f"encoder.layers.{n}.{kind}" for n in range(2) for kind in TEXT_LAYERS]
    path, _ = text_file(ours, tmp_path / "style.safetensors", "kohya", layers)
    adapters = Adapters({"text_encoder": ours})
    adapters.load_lora_weights(path)
    saved = adapters.save_lora_weights(tmp_path / "saved")
    state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(str(saved))
    StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
        state, alphas, reference, prefix="text_encoder"
    )
    assert difference(run_text(reference), run_text(ours)) < 1e-5


WAN_LAYERS = {  # of the original code -> of diffusers
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
WAN_ENDS = {"time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out"}


def wan_network():
    """The reference's network, which tells its spellings as ours do."""
    network = filled(ChronoEditTransformer3DModel(**WAN))
    rules = [
        rename(f"blocks.{{n}}.{a}.{{leaf}}", f"blocks.{{n}}.{b}.{{leaf}}") for a, b in WAN_LAYERS.items()
    ]
    rules += [rename(f"{a}.{{leaf}}", f"{b}.{{leaf}}") for a, b in WAN_ENDS.items()]
    layouts = (Layout("diffusers", (IDENTITY,)), Layout("original", tuple(rules)))
    network.layouts = lambda: layouts
    return network


def wan_file(network, path, form):
    """As the tools for WAN write it; the original form has whole biases too."""
    state = {}
    names = {f"blocks.{n}.{a}": f"blocks.{n}.{b}" for n in range(2) for a, b in WAN_LAYERS.items()}
    names |= WAN_ENDS if form == "original" else {}
    for number, (original, ours) in enumerate(names.items()):
        down, up = factors(network.get_submodule(ours), 3, number)
        match form:
            case "peft":
                state |= {f"transformer.{ours}.lora_A.weight": down, f"transformer.{ours}.lora_B.weight": up}
            case "original":
                base = f"diffusion_model.{original}"
                state |= {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
                state[f"{base}.diff_b"] = 0.1 * up[:, 0].clone()
            case "original, alpha":
                base = f"diffusion_model.{original}"
                state |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
                state[f"{base}.alpha"] = torch.tensor(0.25 * (1 + number))
            case "musubi":
                base = f"lora_unet_{original.replace('.', '_')}"
                state |= {f"{base}.lora_down.weight": down, f"{base}.lora_up.weight": up}
                state[f"{base}.alpha"] = torch.tensor(0.25 * (1 + number))
    save_file(state, path)
    return path


def run_wan(network, **kwargs):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 6, 3, 4, 6, generator=generator)
    text, image = torch.randn(2, 5, 10, generator=generator), torch.randn(2, 4, 14, generator=generator)
    return network(latents, torch.tensor([501.0, 20.0]), text, image, **kwargs).sample


@pytest.mark.parametrize("form", ["peft", "original", "original, alpha", "musubi"])
def test_wan_formats_equal_the_reference(form, tmp_path):
    reference, ours = wan_network(), wan_network()
    path = wan_file(ours, tmp_path / "style.safetensors", form)
    adapters = Adapters({"transformer": ours})
    assert not adapters.load_lora_weights(path).unmatched
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(path), return_lora_metadata=True)
    plain = run_wan(reference)
    reference.load_lora_adapter(state, prefix="transformer", metadata=metadata, adapter_name="default")
    theirs = run_wan(reference)
    assert difference(theirs, plain) > 0.1
    assert difference(run_wan(ours), theirs) < 1e-5
    with adapters.scaled(0.6):
        assert difference(run_wan(ours), run_wan(reference, attention_kwargs={"scale": 0.6})) < 1e-5
    adapters.fuse_lora(lora_scale=0.8)
    reference.fuse_lora(lora_scale=0.8)
    assert difference(run_wan(ours), run_wan(reference)) < 1e-5
