"""Stable Diffusion UNet against diffusers: configs like 1.x and 2.x, the pieces, all layouts of weights."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel as Reference
from safetensors.torch import save_file

from joyedit import ops
from joyedit.checkpoints.network import load_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.sd_unet import SINGLE_FILE_PREFIX, layouts
from joyedit.convert.table import plan_conversion
from joyedit.models.layers import sinusoidal_embedding
from joyedit.models.sd_unet import CrossAttention, ResnetBlock, UNet2DConditionConfig, UNet2DConditionModel
from tests.parity.same_weights import difference, recorded_shapes, shapes, with_weights_of

# What a fork adds to the network, as patterns ("*.temperature"): the reference has no such tensors.
NEW_PARAMETERS: tuple[str, ...] = ()

THREE = dict(
    block_out_channels=[16, 32, 48],
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    norm_num_groups=8,
)
CONFIGS = {
    "sd1": dict(**THREE, attention_head_dim=4, cross_attention_dim=24),
    "sd2": dict(
        **THREE,
        attention_head_dim=[2, 4, 6],
        cross_attention_dim=40,
        use_linear_projection=True,
        upcast_attention=True,
        layers_per_block=1,
    ),
    "text_enters_late": dict(
        block_out_channels=[16, 40],
        layers_per_block=[1, 2],
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        attention_head_dim=[2, 5],
        cross_attention_dim=[24, 24],
        norm_num_groups=8,
        norm_eps=1e-4,
        in_channels=9,
        out_channels=5,
    ),
}
SHAPES = [(2, 17, 19), (1, 16, 24), (2, 7, 12)]  # B, h, w
REAL = {"stable-diffusion-v1-5": "sd15", "stable-diffusion-2-1": "sd21", "stable-diffusion-2-1-base": None}


def reference(name: str) -> Reference:
    """A random reference network; norms, which start as the identity, are noise too."""
    torch.manual_seed(1)
    model = Reference(**CONFIGS[name]).eval().requires_grad_(False)
    for key, p in model.named_parameters():
        if "norm" in key or key.endswith("bias"):
            p.add_(0.2 * torch.randn_like(p))
        else:
            p.mul_(1.5)
    return model


def ours(model: Reference) -> UNet2DConditionModel:
    return with_weights_of(model, UNet2DConditionModel, NEW_PARAMETERS)


def inputs(model: Reference, shape=(2, 8, 12), prompts: int | None = None):
    b, h, w = shape
    c = model.config
    width = c.cross_attention_dim if isinstance(c.cross_attention_dim, int) else c.cross_attention_dim[0]
    return torch.randn(b, c.in_channels, h, w), torch.randn(prompts or b, 7, width)


# Each form in one size, and one form in all of them.
FORMS = [(name, SHAPES[-1]) for name in CONFIGS] + [("text_enters_late", shape) for shape in SHAPES[:-1]]
OTHERS = [(name, shape) for name in ("sd1", "sd2") for shape in SHAPES[:-1]]


@pytest.mark.parametrize(
    ("name", "shape"), [*FORMS, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)], ids=str
)
def test_forward(name, shape):
    model = reference(name)
    network = ours(model)
    x, text = inputs(model, shape)
    times = [981, torch.tensor(1), 1.0, torch.tensor([500]), torch.tensor([701, 20])[: len(x)]]
    for t in times:
        out = network(x, t, text).sample
        assert difference(out, model(x, t, text).sample) <= 1e-5
        assert out.is_contiguous() and out.dtype is x.dtype
    assert difference(network(x, 981, text).sample, network(x, 1, text).sample) > 1e-2, "time does nothing"
    assert difference(network(x, 1, -text).sample, network(x, 1, text).sample) > 1e-3, "text does nothing"


def test_smallest_latents():
    model = reference("sd1")
    for shape in ((1, 1, 1), (1, 1, 5)):
        x, text = inputs(model, shape)
        assert difference(ours(model)(x, 3, text).sample, model(x, 3, text).sample) <= 1e-5


def test_faint_activations():
    """Norms of small values, where their eps counts: 1e-6 before a transformer, 1e-5 in it."""
    model = reference("sd1")
    for key, p in model.named_parameters():
        if any(
            part in key for part in ("conv_in", "conv2", "conv_shortcut", "proj_in", "proj_out", "to_out")
        ):
            p.mul_(5e-3)
    x, text = inputs(model)
    assert difference(ours(model)(x, 3, text).sample, model(x, 3, text).sample) <= 1e-5


def test_forms_of_the_call():
    model = reference("sd1")
    network = ours(model)
    x, text = inputs(model)
    wanted = network(x, 9, text).sample
    (sample,) = network(sample=x, timestep=9, encoder_hidden_states=text, return_dict=False)
    assert torch.equal(sample, wanted)
    for kwargs in ({}, {"scale": 0.5}, None):
        assert torch.equal(network(x, 9, text, cross_attention_kwargs=kwargs).sample, wanted)
    with pytest.raises(ValueError, match="'gligen'.*only 'scale'"):
        network(x, 9, text, cross_attention_kwargs={"gligen": {}, "scale": 1.0})
    for bad, message in (
        (x[:, :3], r"sample \(2, 3, 8, 12\)"),
        (x[0], r"sample \(4, 8, 12\)"),
        (x[..., :0], r"sample \(2, 4, 8, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            network(bad, 9, text)
    with pytest.raises(ValueError, match=r"encoder_hidden_states \(2, 7, 23\).*24"):
        network(x, 9, text[..., :23])
    with pytest.raises(ValueError, match="3 timesteps for 2 samples"):
        network(x, torch.tensor([1, 2, 3]), text)
    with pytest.raises(ValueError, match="3 prompts for 2 samples"):
        network(x, 9, text[:1].expand(3, -1, -1))


@pytest.mark.parametrize("name", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), "text_enters_late"])
def test_pieces_equal_forward_and_compute_nothing_twice(name):
    model = reference(name)
    network = ours(model)
    x, text = inputs(model, (2, 9, 12))
    timesteps = torch.tensor([981, 721, 461, 201])
    wanted = [network(x, t, text).sample for t in timesteps]

    calls = []
    once = [network.time_embedding]
    for module in network.modules():
        if isinstance(module, ResnetBlock):
            once.append(module.time_emb_proj)
        elif isinstance(module, CrossAttention):
            once += [module.to_k, module.to_v]
    for module in once:
        module.register_forward_hook(lambda module, args, out: calls.append(module))
    time, context = network.embed_time(timesteps), network.embed_context(text)
    assert len(time) == 4
    for i, out in enumerate(wanted):
        assert difference(network.predict(x, time[i], context), out) <= 1e-6
        assert difference(network.predict(x, time[i : i + 1], context), out) <= 1e-6
    assert len(calls) == len(once) and set(calls) == set(once)

    each = network.predict(x, time[1:3], context)
    assert difference(each, torch.cat((wanted[1][:1], wanted[2][1:]))) <= 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_branches_are_one_until_text_enters(name):
    """The two halves of guidance, (negative, prompt) for all samples, from one set of samples."""
    model = reference(name)
    network = ours(model)
    x, text = inputs(model, (2, 7, 12), prompts=4)
    timesteps = torch.tensor([700, 3])
    batches = {"conv_in": [], "first": [], "last": []}
    for part, module in (
        ("conv_in", network.conv_in),
        ("first", network.down_blocks[0].resnets[0]),
        ("last", network.conv_out),
    ):
        module.register_forward_hook(lambda module, args, out, part=part: batches[part].append(len(out)))
    for t, time in ((700, network.embed_time(700)), (timesteps.repeat(2), network.embed_time(timesteps))):
        wanted = model(torch.cat((x, x)), t, text).sample
        found = network.predict(x, time, network.embed_context(text), branches=2)
        assert difference(found, wanted) <= 1e-5
    assert batches == {"conv_in": [2, 2], "first": [2, 2], "last": [4, 4]}


def test_prompts_serve_samples_that_follow_one_another():
    model = reference("sd2")
    network = ours(model)
    x, text = inputs(model, (6, 8, 5), prompts=2)
    wanted = model(x, 40, text.repeat_interleave(3, dim=0)).sample
    assert difference(network(x, 40, text).sample, wanted) <= 1e-5
    assert difference(network(x, 40, text[:1]).sample[:3], wanted[:3]) <= 1e-5
    doubled = network.predict(x[:3], network.embed_time(40), network.embed_context(text), branches=2)
    wanted = model(x[:3].repeat(2, 1, 1, 1), 40, text.repeat_interleave(3, dim=0)).sample
    assert difference(doubled, wanted) <= 1e-5
    with pytest.raises(ValueError, match="4 prompts for 6 samples"):
        network(x, 40, torch.cat((text, text)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_feature_maps_keep_the_layout_of_the_weights(layout):
    """No convolution meets a feature map or a weight that it would have to copy."""
    model = reference("sd1")
    network = ours(model).to(memory_format=layout)
    assert network.layout is layout
    x, text = inputs(model, (2, 8, 12), prompts=4)
    seen = []

    def check(module, args):
        if isinstance(module, torch.nn.Conv2d) and args[0].ndim == 4:
            seen.append(module)
            assert args[0].is_contiguous(memory_format=layout)
            assert module.weight.is_contiguous(memory_format=layout)

    for module in network.modules():
        module.register_forward_pre_hook(check)
    found = network.predict(x, network.embed_time(5), network.embed_context(text), branches=2)
    assert len(seen) > 30
    assert difference(found, model(torch.cat((x, x)), 5, text).sample) <= 1e-5
    assert found.is_contiguous()


@pytest.mark.parametrize("has_bf16", [True, False], ids=["bf16_units", "no_bf16_units"])
@pytest.mark.parametrize("name", ["sd1", pytest.param("sd2", marks=pytest.mark.slow)])
def test_bf16_is_at_most_twice_as_far_from_float64_as_the_reference(monkeypatch, name, has_bf16):
    monkeypatch.setattr(ops, "CPU_HAS_BF16", has_bf16)
    half = reference(name).to(torch.bfloat16)
    exact = reference(name).to(torch.bfloat16).double()
    network = ours(half)
    assert network.dtype is torch.bfloat16
    x, text = (tensor.bfloat16() for tensor in inputs(half, (2, 9, 12)))
    truth = exact(x.double(), 601, text.double()).sample
    found = network(x, 601, text).sample
    assert found.dtype is torch.bfloat16
    assert difference(found, truth) <= 2 * difference(half(x, 601, text).sample, truth)


def test_narrow_weights_with_wide_input(monkeypatch):
    """fp32 latents, bf16 weights, a CPU without bf16 units: computed and returned in fp32."""
    monkeypatch.setattr(ops, "CPU_HAS_BF16", False)
    half = reference("sd1").to(torch.bfloat16)
    network = ours(half)
    x, text = inputs(half)
    assert difference(network(x, 601, text).sample, half.float()(x, 601, text).sample) <= 1e-5


def test_gradients():
    model = reference("sd2").requires_grad_(True)
    network = ours(model)
    network.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    network.requires_grad_(True)
    x, text = inputs(model, (1, 5, 6))
    grads = []
    for net in (network, model):
        latents = x.clone().requires_grad_(True)
        net(latents, 77, text).sample.square().mean().backward()
        grads.append(latents.grad)
    assert difference(*grads) <= 1e-4
    theirs = dict(model.named_parameters())
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert difference(p.grad, theirs[name].grad) <= 1e-3, name


def test_changed_weights_are_used():
    """No copy of a weight is kept: a fused adapter shows in the next call."""
    model = reference("sd1")
    network = ours(model)
    network.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    x, text = inputs(model)
    network(x, 1, text)
    for net in (network, model):
        for name, p in net.named_parameters():
            if name.endswith("weight"):
                p.data.mul_(0.9)
    assert difference(network(x, 1, text).sample, model(x, 1, text).sample) <= 1e-5


def test_time_embedding():
    """cos first, then sin, of t * 10000 ** (-i / 160)."""
    waves = sinusoidal_embedding(torch.tensor([981]), 320)[0]
    torch.testing.assert_close(waves[:3], torch.tensor([0.6799572, -0.7984292, 0.5780641]), rtol=0, atol=4e-5)
    torch.testing.assert_close(
        waves[160:163], torch.tensor([0.7332518, 0.6020887, 0.8159913]), rtol=0, atol=4e-5
    )


# The released networks: names, shapes, layouts.


def real_config(shared_data, folder: str) -> dict:
    return json.loads((shared_data / folder / "unet" / "config.json").read_text(encoding="utf-8"))


def on_meta(cls, config):
    with torch.device("meta"):
        return cls.from_config(config)


@pytest.mark.parametrize("folder", REAL)
def test_real_configs(shared_data, folder):
    raw = real_config(shared_data, folder)
    found = shapes(on_meta(UNet2DConditionModel, raw))
    assert len(found) == 686
    assert found == shapes(on_meta(Reference, raw))
    total = sum(torch.Size(shape).numel() for shape in found.values())
    assert total == (859_520_964 if folder.endswith("v1-5") else 865_910_724)
    if REAL[folder]:
        assert found == recorded_shapes(shared_data, f"{REAL[folder]}_unet")


def test_defaults_are_those_of_sd15(shared_data):
    assert UNet2DConditionConfig() == UNet2DConditionConfig.from_dict(
        real_config(shared_data, "stable-diffusion-v1-5")
    )
    assert shapes(on_meta(UNet2DConditionModel, None)) == shapes(
        on_meta(UNet2DConditionModel, real_config(shared_data, "stable-diffusion-v1-5"))
    )


# CompVis names of whole tensors, from the published single files.
BY_HAND = {
    "input_blocks.0.0.weight": "conv_in.weight",
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight"
    ),
    "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.4.0.skip_connection.weight": "down_blocks.1.resnets.0.conv_shortcut.weight",
    "input_blocks.11.0.emb_layers.1.bias": "down_blocks.3.resnets.1.time_emb_proj.bias",
    "middle_block.1.proj_in.weight": "mid_block.attentions.0.proj_in.weight",
    "middle_block.2.out_layers.3.weight": "mid_block.resnets.1.conv2.weight",
    "output_blocks.2.1.conv.weight": "up_blocks.0.upsamplers.0.conv.weight",
    "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
    "output_blocks.8.2.conv.weight": "up_blocks.2.upsamplers.0.conv.weight",
    "output_blocks.9.1.norm.bias": "up_blocks.3.attentions.0.norm.bias",
    "output_blocks.11.0.in_layers.2.weight": "up_blocks.3.resnets.2.conv1.weight",
    "out.0.weight": "conv_norm_out.weight",
    "out.2.bias": "conv_out.bias",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def compvis_modules(num_levels: int, num_res_blocks: int, attention_levels: set[int]) -> list[str]:
    """Module paths in the order in which the original's constructor appends them."""
    inputs: list[list[str]] = [["conv_in"]]
    for level in range(num_levels):
        for _ in range(num_res_blocks):
            inputs.append(["resnet", *(["attention"] if level in attention_levels else [])])
        if level != num_levels - 1:
            inputs.append(["downsampler"])
    outputs = []
    for level in reversed(range(num_levels)):
        for i in range(num_res_blocks + 1):
            layers = ["resnet", *(["attention"] if level in attention_levels else [])]
            if level and i == num_res_blocks:
                layers.append("upsampler")
            outputs.append(layers)
    middle = [[kind] for kind in ("resnet", "attention", "resnet")]
    named = [(f"input_blocks.{n}.{k}", kind) for n, ks in enumerate(inputs) for k, kind in enumerate(ks)]
    named += [(f"middle_block.{n}", kind) for n, (kind,) in enumerate(middle)]
    named += [(f"output_blocks.{n}.{k}", kind) for n, ks in enumerate(outputs) for k, kind in enumerate(ks)]
    endings = {"downsampler": ".op", "upsampler": ".conv"}
    return [path + endings.get(kind, "") for path, kind in named]


def diffusers_modules(model) -> list[str]:
    """The same modules in the order in which data passes them."""
    paths = ["conv_in"]
    blocks = [(f"down_blocks.{i}", block) for i, block in enumerate(model.down_blocks)]
    blocks += [("mid_block", model.mid_block)]
    blocks += [(f"up_blocks.{i}", block) for i, block in enumerate(model.up_blocks)]
    for name, block in blocks:
        for j in range(len(block.resnets)):
            paths.append(f"{name}.resnets.{j}")
            if j < len(getattr(block, "attentions", ())):
                paths.append(f"{name}.attentions.{j}")
        for kind in ("downsamplers", "upsamplers"):
            if getattr(block, kind, None):
                paths.append(f"{name}.{kind}.0.conv")
    return paths


def compvis_names(model, num_res_blocks: int, attention_levels: set[int]) -> dict[str, str]:
    """Original name of each tensor -> the reference's, without the tables under test."""
    modules = dict(
        zip(
            diffusers_modules(model),
            compvis_modules(len(model.down_blocks), num_res_blocks, attention_levels),
            strict=True,
        )
    )
    modules |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    modules |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
    names = {}
    for key in model.state_dict():
        owner = next(path for path in modules if key.startswith(f"{path}."))
        rest = key.removeprefix(f"{owner}.")
        if ".resnets." in owner:
            layer, _, leaf = rest.partition(".")
            rest = f"{RESNET[layer]}.{leaf}"
        names[f"{modules[owner]}.{rest}"] = key
    assert len(names) == len(model.state_dict())
    return names


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["stable-diffusion-v1-5", "stable-diffusion-2-1"])
def test_original_names_of_real_configs(shared_data, folder):
    raw = real_config(shared_data, folder)
    wanted = shapes(on_meta(UNet2DConditionModel, raw))
    names = compvis_names(on_meta(Reference, raw), 2, {0, 1, 2})
    assert len(names) == 686 and set(names.values()) == set(wanted)
    for original, name in BY_HAND.items():
        assert names[original] == name

    config = UNet2DConditionConfig.from_dict(raw)
    for prefix, layout in (("", "ldm"), (SINGLE_FILE_PREFIX, "ldm-single-file")):
        found = {prefix + original: wanted[name] for original, name in names.items()}
        plan = plan_conversion(layouts(config), found, wanted)
        assert plan.layout.name == layout and not plan.dropped
        assert {step.sources for step in plan.steps.values()} == {(key,) for key in found}
        for original, name in names.items():
            assert plan.steps[name].sources == (prefix + original,)
        state = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
        assert shapes(plan.layout.invert(state)) == found
    found["output_blocks.2.2.conv.weight"] = found.pop(f"{prefix}output_blocks.2.1.conv.weight")
    with pytest.raises(
        ValueError, match="1 of 686 .*up_blocks.0.upsamplers.0.*1 unknown .*output_blocks.2.2"
    ):
        plan_conversion(layouts(config), found, wanted)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("sd1", SINGLE_FILE_PREFIX),
        ("sd2", ""),
        pytest.param("sd1", "", marks=pytest.mark.slow),
        pytest.param("sd2", SINGLE_FILE_PREFIX, marks=pytest.mark.slow),
    ],
)
def test_loads_files_in_original_names(tmp_path, name, prefix):
    model = reference(name)
    state = model.state_dict()
    names = compvis_names(model, CONFIGS[name].get("layers_per_block", 2), {0, 1})
    path = tmp_path / "model.safetensors"
    save_file({prefix + original: state[key] for original, key in names.items()}, path)
    config = UNet2DConditionConfig.from_dict(CONFIGS[name])
    network = load_network(UNet2DConditionModel, config, TensorFiles([path]))
    x, text = inputs(model)
    assert difference(network(x, 5, text).sample, model(x, 5, text).sample) <= 1e-5
    inverse = next(la for la in network.layouts() if la.name == "ldm").invert(network.state_dict())
    assert set(inverse) == set(names)
    assert all(torch.equal(inverse[original], state[key]) for original, key in names.items())


def test_uneven_layers_in_original_names():
    """Levels of unequal length, and transformers below levels without."""
    network = ours(reference("text_enters_late"))
    names = set(network.layouts()[1].invert(network.state_dict()))
    assert len(names) == len(network.state_dict())
    assert {"input_blocks.2.0.op.weight", "input_blocks.4.1.proj_in.weight"} <= names
    assert {"output_blocks.2.2.conv.weight", "output_blocks.4.0.skip_connection.weight"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_folders_open_equal_here_and_there(tmp_path, name):
    model = reference(name)
    model.save_pretrained(tmp_path / "theirs")
    network = UNet2DConditionModel.from_pretrained(tmp_path / "theirs")
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert {key for key in saved if not key.startswith("_")} == set(network.config)
    network.save_pretrained(tmp_path / "ours")
    again = Reference.from_pretrained(tmp_path / "ours")
    x, text = inputs(model)
    wanted = model(x, 5, text).sample
    assert difference(network(x, 5, text).sample, wanted) <= 1e-5
    assert all(torch.equal(p, model.state_dict()[key]) for key, p in again.state_dict().items())


REFUSED = {
    "addition_embed_type": ("text_time", "SDXL"),
    "num_class_embeds": (1000, "not supported"),
    "class_embed_type": ("timestep", "not supported"),
    "dual_cross_attention": (True, "not supported"),
    "only_cross_attention": (True, "not supported"),
    "center_input_sample": (True, "not supported"),
    "flip_sin_to_cos": (False, "not supported"),
    "freq_shift": (1, "not supported"),
    "resnet_time_scale_shift": ("scale_shift", "not supported"),
    "time_embedding_type": ("fourier", "not supported"),
    "time_cond_proj_dim": (256, "not supported"),
    "encoder_hid_dim": (1024, "not supported"),
    "act_fn": ("gelu", "not supported"),
    "downsample_padding": (0, "not supported"),
    "mid_block_type": ("UNetMidBlock2D", "not supported"),
    "mid_block_scale_factor": (2, "not supported"),
    "transformer_layers_per_block": ([1, 2, 10, 10], "not supported"),
    "num_attention_heads": (8, "not supported"),
    "attention_type": ("gated", "not supported"),
    "conv_in_kernel": (1, "not supported"),
    "down_block_types": (["CrossAttnDownBlock2D"] * 3 + ["AttnDownBlock2D"], "must be DownBlock2D or Cross"),
    "up_block_types": (["UpBlock2D"] * 3, "must be UpBlock2D or CrossAttnUpBlock2D for each of"),
    "block_out_channels": ([320, 640, 1280, 1281], "multiples of norm_num_groups=32"),
    "attention_head_dim": ([5, 10, 20, 21], "number of heads"),
    "layers_per_block": ([2, 2], "one positive number, or 4 of them"),
    "cross_attention_dim": ([768, 768, 768, 1024], "equal everywhere"),
    "norm_num_groups": (None, "must be of type int"),
    "in_channels": (0, "positive"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_settings_are_refused_by_name(key):
    value, message = REFUSED[key]
    with pytest.raises(ValueError, match=key) as raised:
        UNet2DConditionConfig.from_dict({key: value})
    assert message in str(raised.value)


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="did you mean 'sample_size'"):
        UNet2DConditionConfig.from_dict({"sample_sizes": 64})


def test_inputs_beside_the_latents():
    UNet2DConditionConfig().check_input_is_latents()
    for channels, kind in ((9, "an inpainting UNet"), (5, "a depth UNet"), (7, "a UNet")):
        config = UNet2DConditionConfig(in_channels=channels)
        with pytest.raises(ValueError, match=f"in_channels={channels}: this is {kind} that takes more"):
            config.check_input_is_latents()
