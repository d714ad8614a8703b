"""The Stable Diffusion VAE against diffusers: sizes, tiles, the posterior, every layout of the weights."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL as Reference
from safetensors.torch import save_file

from joyedit import ops
from joyedit.checkpoints.network import load_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.sd_vae import layouts
from joyedit.convert.table import plan_conversion
from joyedit.models import sd_vae
from joyedit.models.latents import DiagonalGaussian
from joyedit.models.sd_vae import AutoencoderKL, AutoencoderKLConfig
from tests.parity.same_weights import (
    check_layouts_run_backwards,
    difference,
    recorded_shapes,
    shapes,
    with_weights_of,
)


def stages(*widths: int) -> dict:
    return dict(
        block_out_channels=list(widths),
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
    )


# What a fork adds to the network, as patterns ("*.temperature"): the reference has no such tensors.
NEW_PARAMETERS: tuple[str, ...] = ()

CONFIGS = {
    "four_stages": dict(**stages(8, 16, 24, 24), layers_per_block=2, norm_num_groups=4, sample_size=32),
    "two_stages": dict(**stages(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=24),
    "other_channels": dict(
        **stages(6, 6, 12),
        layers_per_block=3,
        norm_num_groups=3,
        sample_size=32,
        in_channels=4,
        out_channels=2,
        latent_channels=5,
        act_fn="swish",
    ),
}
SHAPES = [(2, 37, 50), (1, 64, 40), (2, 19, 24)]  # B, H, W


def reference(name: str, **changes) -> Reference:
    """A random reference network; norms, which start as the identity, are noise too."""
    torch.manual_seed(1)
    model = Reference(**{**CONFIGS[name], **changes}).eval().requires_grad_(False)
    for key, p in model.named_parameters():
        if "norm" in key or key.endswith("bias"):
            p.add_(0.2 * torch.randn_like(p))
        else:
            p.mul_(1.5)
    return model


def config_of(model: Reference) -> AutoencoderKLConfig:
    return AutoencoderKLConfig.from_dict(json.loads(model.to_json_string()))


def ours(model: Reference) -> AutoencoderKL:
    return with_weights_of(model, AutoencoderKL, NEW_PARAMETERS)


def pixels(model: Reference, shape) -> torch.Tensor:
    b, h, w = shape
    return torch.rand(b, model.config.in_channels, h, w) * 2 - 1


def latents(model: Reference, shape) -> torch.Tensor:
    b, h, w = shape
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    return torch.randn(b, model.config.latent_channels, h // factor, w // factor)


def check_codes(network, model, x, z, tolerance=1e-5):
    wanted, found = model.encode(x).latent_dist, network.encode(x).latent_dist
    for part in ("mean", "logvar", "std"):
        assert difference(getattr(found, part), getattr(wanted, part)) <= tolerance
    assert found.mode() is found.mean
    wanted, found = model.decode(z).sample, network.decode(z).sample
    assert wanted.abs().max() > 1, "a clamp would not be noticed"
    assert found.is_contiguous() and found.dtype is z.dtype
    assert difference(found, wanted) <= tolerance


# Each form in one size, and one form in all of them.
FORMS = [(name, SHAPES[0]) for name in CONFIGS] + [("other_channels", shape) for shape in SHAPES[1:]]
OTHERS = [(name, shape) for name in ("four_stages", "two_stages") for shape in SHAPES[1:]]


@pytest.mark.parametrize(
    ("name", "shape"), [*FORMS, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)], ids=str
)
def test_encode_and_decode(name, shape):
    model = reference(name)
    check_codes(ours(model), model, pixels(model, shape), latents(model, shape))


def test_faint_activations():
    """Norms of small values, where their eps counts."""
    model = reference("four_stages")
    for key, p in model.named_parameters():
        if re.search(r"conv|to_", key) and "norm" not in key:
            p.mul_(2e-2)
    x, z = pixels(model, (1, 24, 40)), latents(model, (1, 24, 40))
    network = ours(model)
    assert difference(network.encode(x).latent_dist.mean, model.encode(x).latent_dist.mean) <= 1e-5
    assert difference(network.decode(z).sample, model.decode(z).sample) <= 1e-5


def test_smallest_pictures():
    model = reference("four_stages")
    check_codes(ours(model), model, pixels(model, (2, 8, 15)), torch.randn(2, 4, 1, 1))


def test_forward_and_the_forms_of_the_result():
    model = reference("four_stages")
    network = ours(model)
    x = pixels(model, (2, 24, 33))
    assert difference(network(x).sample, model(x).sample) <= 1e-5
    wanted = model(x, sample_posterior=True, generator=torch.Generator().manual_seed(4)).sample
    found = network(x, sample_posterior=True, generator=torch.Generator().manual_seed(4)).sample
    assert difference(found, wanted) <= 1e-5
    (posterior,) = network.encode(x, return_dict=False)
    (sample,) = network.decode(posterior.mean, return_dict=False)
    assert torch.equal(sample, network.decode(posterior.mean)[0])

    theirs = model.encode(x).latent_dist
    generators = [[torch.Generator().manual_seed(seed) for seed in (7, 8)] for _ in range(2)]
    assert difference(posterior.sample(generators[0]), theirs.sample(generators[1])) <= 1e-5
    assert torch.equal(DiagonalGaussian(posterior.parameters).mode(), posterior.mean)


@pytest.mark.parametrize("has_bf16", [True, False], ids=["bf16_units", "no_bf16_units"])
def test_bf16_is_at_most_twice_as_far_from_float64_as_the_reference(monkeypatch, has_bf16):
    monkeypatch.setattr(ops, "CPU_HAS_BF16", has_bf16)
    half = reference("two_stages").to(torch.bfloat16)
    exact = reference("two_stages").to(torch.bfloat16).double()
    network = ours(half)
    assert network.dtype is torch.bfloat16
    x, z = pixels(half, (2, 33, 40)).bfloat16(), latents(half, (2, 33, 40)).bfloat16()

    truth = exact.encode(x.double()).latent_dist
    found, theirs = network.encode(x).latent_dist, half.encode(x).latent_dist
    assert found.mean.dtype is torch.bfloat16
    for part in ("mean", "logvar"):
        limit = 2 * difference(getattr(theirs, part), getattr(truth, part))
        assert difference(getattr(found, part), getattr(truth, part)) <= limit
    truth = exact.decode(z.double()).sample
    assert difference(network.decode(z).sample, truth) <= 2 * difference(half.decode(z).sample, truth)


def test_narrow_weights_with_wide_input(monkeypatch):
    """fp32 pictures, bf16 weights, a CPU without bf16 units: computed and returned in fp32."""
    monkeypatch.setattr(ops, "CPU_HAS_BF16", False)
    half = reference("four_stages").to(torch.bfloat16)
    x, z = pixels(half, (1, 16, 24)), latents(half, (1, 16, 24))
    check_codes(ours(half), half.float(), x, z)


def test_gradients():
    """Training works through the whole network, although it writes in place where nothing is saved."""
    model = reference("two_stages").requires_grad_(True)
    network = ours(model)
    network.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    network.requires_grad_(True)
    x = pixels(model, (1, 16, 24))
    for net in (model, network):
        posterior = net.encode(x).latent_dist
        (net.decode(posterior.mean).sample.square().mean() + posterior.logvar.square().mean()).backward()
    theirs = dict(model.named_parameters())
    for name, p in network.named_parameters():
        if name.endswith("to_k.bias"):  # the softmax does not see it: only rounding is left
            continue
        assert p.grad is not None, name
        assert difference(p.grad, theirs[name].grad) <= 1e-3, name


def test_group_norm_of_large_channels_last_maps():
    """PyTorch's own kernel is ten times as far from float64 here, and its error grows with the map."""
    x = (torch.randn(2, 12, 128, 131) * 2 + 1.5).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(12), torch.randn(12)
    grown = [t.double().requires_grad_() for t in (x, weight, bias)]
    truth = F.group_norm(grown[0], 3, *grown[1:], eps=1e-6)
    mine = [t.requires_grad_() for t in (x, weight, bias)]
    found = ops.group_norm(mine[0], mine[1], mine[2], 3, 1e-6)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert difference(found, truth) <= 5e-7
    assert difference(ops.group_norm_silu(mine[0], mine[1], mine[2], 3, 1e-6), F.silu(truth)) <= 5e-7
    slope = torch.randn_like(found)
    (found * slope).sum().backward()
    (truth * slope).sum().backward()
    for a, b in zip(mine, grown, strict=True):
        assert difference(a.grad, b.grad) <= 2e-6
    flat = torch.full((1, 12, 128, 128), 0.3).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        ops.group_norm(flat, weight, bias, 3, 1e-6)[0, :, 5, 7], bias, atol=1e-3, rtol=0
    )


def test_large_maps():
    """Sizes at which the norms of the outer stages are taken line by line."""
    model = reference("four_stages")
    check_codes(ours(model), model, pixels(model, (1, 128, 144)), latents(model, (1, 128, 144)))


@pytest.mark.slow
def test_real_width():
    """The channels-last convolutions add up 4608 products in another order than the reference's."""
    with torch.device("meta"):
        network = AutoencoderKL()
    torch.manual_seed(0)
    model = Reference.from_config(AutoencoderKLConfig().to_dict()).eval().requires_grad_(False)
    network.load_state_dict(model.state_dict(), assign=True)
    x, z = pixels(model, (1, 128, 136)), latents(model, (1, 128, 136))
    check_codes(network, model, x, z, tolerance=2e-5)


TILED = {
    "four_stages": [(2, 40, 72), (1, 41, 70), (1, 32, 47)],
    "two_stages": [(1, 45, 56), (2, 20, 63)],
    "other_channels": [(1, 59, 29)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name, shape", [(name, shape) for name in TILED for shape in TILED[name]], ids=str)
def test_tiling(name, shape):
    model = reference(name)
    network = ours(model)
    for part in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        assert getattr(network, part) == getattr(model, part)
    x, z = pixels(model, shape), latents(model, shape)
    untiled = network.encode(x).latent_dist.mean, network.decode(z).sample
    for net in (model, network):
        net.enable_tiling()
    check_codes(network, model, x, z)
    assert difference(network.decode(z).sample, untiled[1]) > 1e-3
    assert difference(network.encode(x).latent_dist.mean, untiled[0]) > 1e-4
    network.disable_tiling()
    assert torch.equal(network.encode(x).latent_dist.mean, untiled[0])
    assert torch.equal(network.decode(z).sample, untiled[1])


def test_tiles_of_another_size_and_small_pictures():
    model = reference("four_stages")
    network = ours(model)
    small = pixels(model, (1, 32, 32)), latents(model, (1, 32, 32))
    whole = network.encode(small[0]).latent_dist.mean, network.decode(small[1]).sample
    for net in (model, network):
        net.enable_tiling()
    assert torch.equal(network.encode(small[0]).latent_dist.mean, whole[0])
    assert torch.equal(network.decode(small[1]).sample, whole[1])
    for net in (model, network):
        net.tile_sample_min_size, net.tile_latent_min_size, net.tile_overlap_factor = 48, 6, 0.5
    check_codes(network, model, pixels(model, (1, 56, 63)), latents(model, (1, 56, 63)))


@pytest.mark.slow
@pytest.mark.parametrize("size, overlap", [(5, 0.25), (6, 0.4), (1, 0.25), (3, 0.0)])
def test_tiles_that_do_not_divide_evenly_keep_the_size_of_the_picture(size, overlap):
    """The reference rounds the steps of pixels and of latents apart, and its results are too large."""
    network = ours(reference("four_stages"))
    network.enable_tiling()
    network.tile_sample_min_size, network.tile_latent_min_size = 8 * size, size
    network.tile_overlap_factor = overlap
    x, z = torch.rand(1, 3, 64, 75) * 2 - 1, torch.randn(1, 4, 8, 9)
    moments, sample = network.encode(x).latent_dist.parameters, network.decode(z).sample
    assert moments.shape == (1, 8, 8, 9) and sample.shape == (1, 3, 64, 72)
    keep = max(int(size * (1 - overlap)), 1)
    first = network.decode_tile(z[..., :size, :size])[..., : 8 * keep, : 8 * keep]
    assert difference(sample[..., : 8 * keep, : 8 * keep], first) <= 1e-5
    first = network.encode_tile(x[..., : 8 * size, : 8 * size])[..., :keep, :keep]
    assert difference(moments[..., :keep, :keep], first) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("width", [49, 55])
def test_a_last_tile_of_less_than_one_latent_is_left_out(width):
    """The reference fails there: tiles begin every 24 pixels, and fewer than 8 make no latent."""
    network = ours(reference("four_stages"))
    x = pixels(reference("four_stages"), (1, 40, width))
    network.enable_tiling()
    found = network.encode(x).latent_dist.mean
    assert found.shape[2:] == (5, 6)
    # the missing tile would have been blended into nothing before it
    assert difference(found[..., :3], network.encode(x[..., :48]).latent_dist.mean[..., :3]) <= 1e-6


@pytest.mark.parametrize("tiling", [False, True])
def test_slicing(tiling):
    model = reference("four_stages")
    network = ours(model)
    x, z = pixels(model, (3, 40, 35)), latents(model, (3, 40, 35))
    sizes = []
    network.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    network.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for net in (model, network):
        net.enable_slicing()
        if tiling:
            net.enable_tiling()
    check_codes(network, model, x, z)
    assert set(sizes) == {1}
    network.disable_slicing()
    check_codes(network, model, x, z)
    assert set(sizes) == {1, 3}


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_real_configs_have_the_names_and_shapes_of_the_reference(shared_data, name):
    folder = {"sd15": "stable-diffusion-v1-5", "sd21": "stable-diffusion-2-1"}[name]
    raw = json.loads((shared_data / folder / "vae" / "config.json").read_text())
    with torch.device("meta"):
        network = AutoencoderKL(AutoencoderKLConfig.from_dict(raw))
    assert shapes(network) == recorded_shapes(shared_data, f"{name}_vae")
    assert len(shapes(network)) == 248 and all(p.is_meta for p in network.parameters())

    def count(part):
        return sum(p.numel() for p in part.parameters())

    assert (count(network), count(network.encoder), count(network.decoder)) == (83653863, 34163592, 49490179)
    assert (count(network.quant_conv), count(network.post_quant_conv)) == (72, 20)
    assert network.config.scaling_factor == 0.18215
    assert (
        network.tile_latent_min_size * 8 == network.tile_sample_min_size == {"sd15": 512, "sd21": 768}[name]
    )


def test_configs(shared_data):
    raw = json.loads((shared_data / "stable-diffusion-v1-5" / "vae" / "config.json").read_text())
    config = AutoencoderKLConfig.from_dict(raw)
    assert config == AutoencoderKLConfig()
    theirs = {k: v for k, v in reference("two_stages").config.items() if not k.startswith("_")}
    assert set(config) == set(theirs)
    absent = {key: theirs[key] for key in theirs if key not in raw}
    assert {key: config[key] for key in absent} == absent


# Written down from the original's module structure; `to_ldm` makes the other 238.
BY_HAND = {
    "quant_conv.weight": "quant_conv.weight",
    "encoder.conv_in.bias": "encoder.conv_in.bias",
    "encoder.down.1.block.0.nin_shortcut.weight": "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
    "encoder.down.2.downsample.conv.bias": "encoder.down_blocks.2.downsamplers.0.conv.bias",
    "encoder.mid.attn_1.q.weight": "encoder.mid_block.attentions.0.to_q.weight",
    "encoder.mid.block_2.norm1.bias": "encoder.mid_block.resnets.1.norm1.bias",
    "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.to_out.0.bias",
    "decoder.up.3.block.2.conv2.weight": "decoder.up_blocks.0.resnets.2.conv2.weight",
    "decoder.up.1.upsample.conv.weight": "decoder.up_blocks.2.upsamplers.0.conv.weight",
    "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
}


def to_ldm(name: str, stages: int) -> str:
    """The original's name of one of the reference's tensors."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = name.replace("down_blocks", "down").replace("downsamplers.0", "downsample")
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{stages - 1 - int(m[1])}", name)
    name = name.replace("upsamplers.0", "upsample")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"\.resnets\.(\d+)", r".block.\1", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
    return re.sub(
        r"attn_1\.to_(q|k|v|out)(\.0)?\.", lambda m: f"attn_1.{m[1].replace('out', 'proj_out')}.", name
    )


def to_old(name: str) -> str:
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def to_ldm_state(state: dict, stages: int, prefix: str = "") -> dict:
    """With the linear weights of the attention as 1x1 convolutions."""
    return {
        prefix + to_ldm(key, stages): value[:, :, None, None].clone()
        if ".to_" in key and value.ndim == 2
        else value
        for key, value in state.items()
    }


@pytest.mark.parametrize("layout", ["diffusers-old", "ldm", "ldm-first-stage", "ldm-vae"])
def test_layouts_of_the_real_config(layout, shared_data):
    wanted = recorded_shapes(shared_data, "sd15_vae")
    state = {key: torch.empty(shape, device="meta") for key, shape in wanted.items()}
    prefix = {"ldm-first-stage": "first_stage_model.", "ldm-vae": "vae."}.get(layout, "")
    if layout == "diffusers-old":
        names = {key: to_old(key) for key in wanted}
        assert sum(names[key] != key for key in names) == 16
        found = {names[key]: shape for key, shape in wanted.items()}
    else:
        names = {key: prefix + to_ldm(key, 4) for key in wanted}
        assert {names[key]: key for key in BY_HAND.values()} == {prefix + k: v for k, v in BY_HAND.items()}
        found = shapes(to_ldm_state(state, 4, prefix))
        assert sum(len(shape) == 4 and ".attn_1." in key for key, shape in found.items()) == 8
    assert len(found) == 248
    plan = plan_conversion(layouts(AutoencoderKLConfig()), found, wanted)
    assert plan.layout.name == layout and not plan.dropped
    assert {key: step.sources for key, step in plan.steps.items()} == {key: (names[key],) for key in wanted}


@pytest.mark.parametrize(
    "name",
    ["four_stages", *(pytest.param(n, marks=pytest.mark.slow) for n in ("two_stages", "other_channels"))],
)
@pytest.mark.parametrize("form", ["ckpt", "single_file", "vae", "old", "old_convolutions"])
def test_foreign_files_load_and_compute_the_same(tmp_path, name, form):
    model = reference(name)
    number = len(model.config.block_out_channels)
    state = model.state_dict()
    path = tmp_path / "vae.safetensors"
    if form == "ckpt":
        path = tmp_path / "vae.ckpt"
        extra = {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.ones(())}
        torch.save({"state_dict": {**to_ldm_state(state, number), **extra}, "global_step": 1}, path)
    elif form.startswith("old"):
        convolutions = form == "old_convolutions"
        save_file(
            {
                to_old(key): value[..., None, None].clone()
                if convolutions and "weight" in key and ".to_" in key
                else value
                for key, value in state.items()
            },
            path,
        )
    else:
        prefix = {"single_file": "first_stage_model.", "vae": "vae."}[form]
        save_file(to_ldm_state(state, number, prefix), path)
    network = load_network(AutoencoderKL, config_of(model), TensorFiles([path]))
    check_codes(network, model, pixels(model, (1, 24, 16)), latents(model, (1, 24, 16)))


def test_layouts_run_backwards():
    model = reference("four_stages")
    network = ours(model)
    written = check_layouts_run_backwards(network.layouts(), network.state_dict())
    assert {len(foreign) for foreign in written.values()} == {len(network.state_dict())}
    assert shapes(written["ldm"]) == shapes(to_ldm_state(model.state_dict(), 4))


def test_weights_of_other_stages_are_refused(tmp_path):
    model = reference("four_stages")
    save_file(to_ldm_state(model.state_dict(), 4), tmp_path / "vae.safetensors")
    config = config_of(reference("two_stages"))
    with pytest.raises(ValueError, match="not the weights of this AutoencoderKL.*unknown"):
        load_network(AutoencoderKL, config, TensorFiles([tmp_path / "vae.safetensors"]))


def test_folders_open_here_and_there(tmp_path):
    model = reference("other_channels")
    model.save_pretrained(tmp_path / "theirs")
    network = AutoencoderKL.from_pretrained(tmp_path / "theirs")
    x, z = pixels(model, (1, 21, 16)), latents(model, (1, 21, 16))
    check_codes(network, model, x, z)
    network.save_pretrained(tmp_path / "ours")
    again = Reference.from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == {
        k: v for k, v in model.config.items() if not k.startswith("_")
    }
    check_codes(network, again, x, z)


@pytest.fixture
def idle(monkeypatch):
    """A network that must not start to work."""
    network = AutoencoderKL(AutoencoderKLConfig.from_dict(CONFIGS["four_stages"]))

    def started(*args):
        raise AssertionError("work started before the input was checked")

    for part in (sd_vae.Encoder, sd_vae.Decoder, sd_vae.Conv2d):
        monkeypatch.setattr(part, "forward", started)
    return network


@pytest.mark.parametrize("shape", [(1, 3, 7, 16), (1, 3, 16, 0), (1, 4, 16, 16), (3, 16, 16), (0, 3, 16, 16)])
def test_pictures_that_do_not_fit(idle, shape):
    with pytest.raises(ValueError, match=r"x has shape.*\(batch, 3, height, width\) of at least 8"):
        idle.encode(torch.zeros(shape))


def test_other_input_that_does_not_fit(idle):
    with pytest.raises(TypeError, match="uint8.*floating point"):
        idle.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    for shape in ((1, 3, 2, 2), (4, 2, 2), (0, 4, 2, 2), (1, 4, 0, 2)):
        with pytest.raises(ValueError, match=r"z has shape.*\(batch, 4, height, width\)$"):
            idle.decode(torch.zeros(shape))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shift_factor": 0.1}, "shift_factor=0.1 is not supported, only None"),
        ({"latents_mean": [0.0]}, "latents_mean"),
        ({"latents_std": [1.0]}, "latents_std"),
        ({"act_fn": "gelu"}, "act_fn='gelu'.*'silu'"),
        ({"use_quant_conv": False}, "use_quant_conv"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types.*4 times 'DownEncoderBlock2D'"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types.*'UpDecoderBlock2D'"),
        ({"norm_num_groups": 24}, "128 is no multiple of norm_num_groups=24"),
        ({"sample_size": [512, 512]}, "sample_size"),
        ({"latent_channel": 4}, "did you mean 'latent_channels'"),
    ],
)
def test_configs_that_are_not_computed(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLConfig.from_dict(changes)


@pytest.mark.parametrize("silu", [False, True], ids=["norm", "norm and silu"])
def test_group_norm_of_nearly_plain_maps(silu):
    """As of a grey picture: what a sum of squares would leave of such a variance is rounding."""
    x = 3 + 1e-3 * torch.randn(2, 16, 48, 40)
    weight, bias = torch.rand(16) + 0.5, torch.randn(16)
    exact = torch.nn.functional.group_norm(x.double(), 4, weight.double(), bias.double(), 1e-6)
    exact = torch.nn.functional.silu(exact) if silu else exact
    norm = ops.group_norm_silu if silu else ops.group_norm
    plain = (norm(x, weight, bias, 4, 1e-6) - exact).abs().max()
    last = norm(x.contiguous(memory_format=torch.channels_last), weight, bias, 4, 1e-6)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert (last - exact).abs().max() <= 2 * plain
    assert plain < 1e-3
