"""WAN 2.1 VAE against diffusers: images, videos, tiles, the posterior, every layout of the weights."""

import json
import re

import pytest
import torch
from diffusers import AutoencoderKLWan as Reference
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from joyedit import ops
from joyedit.checkpoints.network import load_network
from joyedit.checkpoints.tensor_files import TensorFiles
from joyedit.convert.table import plan_conversion
from joyedit.convert.wan_vae import layouts
from joyedit.models import wan_vae
from joyedit.models.wan_vae import AutoencoderKLWan, AutoencoderKLWanConfig, DiagonalGaussian
from tests.parity.same_weights import check_layouts_run_backwards, difference, shapes, with_weights_of

# What a fork adds to the network, as patterns ("*.temperature"): the reference has no such tensors.
NEW_PARAMETERS: tuple[str, ...] = ()

CONFIGS = {
    "narrow": dict(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=16),
    "uneven": dict(base_dim=4, decoder_base_dim=6, dim_mult=[1, 2, 2, 3], num_res_blocks=2, z_dim=5),
    # wide enough for frames in pairs
    "wide": dict(base_dim=32, dim_mult=[1, 1, 1, 1], num_res_blocks=1, z_dim=16),
    "three_stages": dict(
        base_dim=6,
        dim_mult=[1, 2, 1],
        num_res_blocks=1,
        z_dim=4,
        in_channels=4,
        out_channels=2,
        temperal_downsample=[True, False],
        scale_factor_spatial=4,
        scale_factor_temporal=2,
    ),
}
SHAPES = [(2, 1, 24, 40), (1, 1, 40, 16), (1, 5, 16, 24), (2, 5, 24, 8), (1, 9, 8, 16)]  # B, T, H, W


def reference(name: str, **changes) -> Reference:
    """A random reference network; its norms' gains, which start at one, are noise too."""
    torch.manual_seed(1)
    model = Reference(**{**CONFIGS[name], **changes}).eval().requires_grad_(False)
    for key, p in model.named_parameters():
        if key.endswith("gamma"):
            p.add_(0.3 * torch.randn_like(p))
        elif key.endswith("bias"):
            p.add_(0.2 * torch.randn_like(p))
        else:
            p.mul_(1.5)
    return model


def ours(model: Reference) -> AutoencoderKLWan:
    return with_weights_of(model, AutoencoderKLWan, NEW_PARAMETERS)


def pixels(model: Reference, shape) -> torch.Tensor:
    b, t, h, w = shape
    return torch.rand(b, model.config.in_channels, t, h, w) * 2 - 1


def latents(model: Reference, shape) -> torch.Tensor:
    b, t, h, w = shape
    time, space = model.config.scale_factor_temporal, model.config.scale_factor_spatial
    return torch.randn(b, model.config.z_dim, 1 + (t - 1) // time, h // space, w // space)


def check_codes(network, model, x, z, tolerance=1e-5):
    wanted = model.encode(x).latent_dist
    found = network.encode(x).latent_dist
    for part in ("mean", "logvar", "std"):
        assert difference(getattr(found, part), getattr(wanted, part)) <= tolerance
    assert found.mode() is found.mean
    wanted = model.decode(z).sample
    assert (wanted.abs() < 1).float().mean() > 0.5, "most of the picture is clamped, which proves nothing"
    found = network.decode(z).sample
    assert found.is_contiguous()
    assert difference(found, wanted) <= tolerance


# Each form with a picture and with films, and one form in every size.
QUICK = [(name, shape) for name in CONFIGS for shape in (SHAPES if name == "uneven" else SHAPES[:4:3])]
OTHERS = [(name, shape) for name in CONFIGS for shape in SHAPES if (name, shape) not in QUICK]


@pytest.mark.parametrize(
    ("name", "shape"), [*QUICK, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)], ids=str
)
def test_encode_and_decode(name, shape):
    model = reference(name)
    check_codes(ours(model), model, pixels(model, shape), latents(model, shape))


def test_forward_and_the_forms_of_the_result():
    model = reference("narrow")
    network = ours(model)
    x = pixels(model, (2, 5, 16, 8))
    assert difference(network(x).sample, model(x).sample) <= 1e-5
    torch.manual_seed(3)
    wanted = model(x, sample_posterior=True, generator=torch.Generator().manual_seed(4)).sample
    found = network(x, sample_posterior=True, generator=torch.Generator().manual_seed(4)).sample
    assert difference(found, wanted) <= 1e-5
    (posterior,) = network.encode(x, return_dict=False)
    (sample,) = network.decode(posterior.mean, return_dict=False)
    assert torch.equal(sample, network.decode(posterior.mean)[0])


@pytest.mark.parametrize("fault", [0.0, 1.0, "nothing"], ids=["black", "white", "zero"])
def test_flat_pictures(fault):
    """Zero features divide by zero in a norm that does not guard against it."""
    model = reference("narrow")
    for key, p in model.named_parameters():
        if key.endswith("bias"):
            p.zero_()
    network = ours(model)
    x = torch.full((1, 3, 5, 16, 8), 0.0 if fault == "nothing" else 2 * fault - 1)
    found, wanted = network.encode(x).latent_dist, model.encode(x).latent_dist
    assert torch.isfinite(found.parameters).all()
    assert torch.allclose(found.parameters, wanted.parameters, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_bf16", [True, False], ids=["bf16_units", "no_bf16_units"])
@pytest.mark.parametrize("frames", [1, 5])
def test_bf16_is_at_most_twice_as_far_from_float64_as_the_reference(monkeypatch, frames, has_bf16):
    monkeypatch.setattr(ops, "CPU_HAS_BF16", has_bf16)
    half = reference("uneven").to(torch.bfloat16)
    exact = reference("uneven").to(torch.bfloat16).double()
    network = ours(half)
    assert network.dtype is torch.bfloat16
    x, z = pixels(half, (2, frames, 24, 16)).bfloat16(), latents(half, (2, frames, 24, 16)).bfloat16()

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
    half = reference("narrow").to(torch.bfloat16)
    x, z = pixels(half, (1, 5, 16, 8)), latents(half, (1, 5, 16, 8))
    check_codes(ours(half), half.float(), x, z)


def test_gradients():
    """Training works through the whole network, although it writes in place where nothing is saved."""
    model = reference("uneven").requires_grad_(True)
    network = ours(model)
    network.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    network.requires_grad_(True)
    x = pixels(model, (1, 5, 16, 8))
    for net in (model, network):
        posterior = net.encode(x).latent_dist
        (net.decode(posterior.mean).sample.square().mean() + posterior.logvar.square().mean()).backward()
    theirs = dict(model.named_parameters())
    for name, p in network.named_parameters():
        assert p.grad is not None, name
        assert difference(p.grad, theirs[name].grad) <= 1e-3, name


def test_recorded_outputs(shared_data):
    folder = shared_data / "goldens" / "tiny-joyimage-edit"
    vae = AutoencoderKLWan.from_pretrained(folder, subfolder="vae", dtype=torch.float32)
    recorded = load_file(shared_data / "goldens" / "joyimage" / "vae.safetensors")

    def close(a, name):
        torch.testing.assert_close(a, recorded[name], rtol=0, atol=1e-5)

    for case in ("photo_1", "noise_1", "frames_5", "frames_9"):
        posterior = vae.encode(recorded[f"encode.{case}.x"]).latent_dist
        for part in ("mean", "logvar", "std"):
            close(getattr(posterior, part), f"encode.{case}.{part}")
    for case in ("t1", "t2", "t3"):
        close(vae.decode(recorded[f"decode.{case}.z"]).sample, f"decode.{case}.x")
    close(vae.decode(recorded["encode.photo_1.mean"]).sample, "decode.photo_1.x")

    torch.manual_seed(77)
    close(vae.encode(recorded["encode.photo_1.x"]).latent_dist.sample(), "encode.photo_1.sample_seed77")
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    close((recorded["encode.photo_1.mean"] - mean) / std, "encode.photo_1.normalised_mean")

    close(vae.encode(recorded["tiled.x"]).latent_dist.mean, "untiled.mean")
    close(vae.decode(recorded["tiled.mean"]).sample, "untiled.decoded_mean")
    vae.enable_tiling(64, 64, 48, 48)
    posterior = vae.encode(recorded["tiled.x"]).latent_dist
    close(posterior.mean, "tiled.mean")
    close(posterior.logvar, "tiled.logvar")
    close(vae.decode(recorded["tiled.mean"]).sample, "tiled.decoded_mean")


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that run, by the number of axes of their kernels."""

    def __enter__(self):
        self.counts = {2: 0, 3: 0}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.convolution:
            self.counts[args[1].ndim - 2] += 1
        return func(*args, **(kwargs or {}))


def through_3d(monkeypatch):
    """Make first frames and pointwise layers take 3-D convolutions, with the zeros that come before them."""

    def first_frame(conv, x):
        return torch.nn.functional.conv3d(
            torch.nn.functional.pad(x, (0, 0, 0, 0, 2, 0)), conv.weight, conv.bias, padding=conv.padding
        )

    def point(conv, x):
        return torch.nn.functional.conv3d(x, conv.weight, conv.bias)

    monkeypatch.setattr(wan_vae.CausalConv3d, "first_frame", first_frame)
    monkeypatch.setattr(wan_vae.PointConv3d, "forward", point)


@pytest.mark.parametrize(("frames", "flat", "deep"), [(3, 0, 1), (4, 4, 0), (5, 4, 1), (6, 8, 0)])
def test_frames_in_pairs(frames, flat, deep):
    """Two frames take four 2-D convolutions, a last one a 3-D convolution; the sums are the same."""
    x, weight = torch.randn(2, 32, frames, 5, 6).double(), torch.randn(33, 32, 3, 3, 3).double()
    bias = torch.randn(33).double()
    with Convolutions() as counted:
        found = ops.conv3d((x[:, :, :2], x[:, :, 2:]), weight, bias, padding=(1, 1))
    assert counted.counts == {2: flat, 3: deep}
    assert difference(found, torch.nn.functional.conv3d(x, weight, bias, padding=(0, 1, 1))) <= 1e-13
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    with Convolutions() as counted:
        narrow = ops.conv3d((x.bfloat16(),), weight, padding=(1, 1))
    assert counted.counts[2] == 0 and narrow.dtype is torch.bfloat16


def test_doubled_pictures_are_never_made():
    x, weight, bias = (
        torch.randn(2, 5, 4, 3).double(),
        torch.randn(7, 5, 3, 3).double(),
        torch.randn(7).double(),
    )
    doubled = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact")
    wanted = torch.nn.functional.conv2d(doubled, weight, bias, padding=1)
    assert difference(ops.doubling_conv2d(x, weight, bias), wanted) <= 1e-13


def test_channels_stay_last():
    """An axis of size 1 with a wrong stride, and every layer after it works on the other layout."""
    network = ours(reference("wide"))
    lost = []

    def look(module, given, found):
        if isinstance(found, torch.Tensor) and found.ndim == 5:
            b, c, t, h, w = found.shape
            if found.stride() != (t * h * w * c, 1, h * w * c, w * c, c):
                lost.append(type(module).__name__)

    for part in (network.encoder, network.decoder):
        for module in part.modules():
            module.register_forward_hook(look)
    network.encode(torch.randn(1, 3, 5, 32, 48))
    network.decode(torch.randn(1, 16, 2, 4, 6))
    assert not lost


@pytest.mark.parametrize("name", CONFIGS)
def test_one_frame_is_a_2d_network(monkeypatch, name):
    model = reference(name)
    network = ours(model).double()
    x, z = pixels(model, (2, 1, 24, 16)).double(), latents(model, (2, 1, 24, 16)).double()
    with Convolutions() as flat:
        mean, sample = network.encode(x).latent_dist.mean, network.decode(z).sample
    assert flat.counts[3] == 0 and flat.counts[2] > 20

    through_3d(monkeypatch)
    with Convolutions() as deep:
        assert difference(mean, network.encode(x).latent_dist.mean) <= 1e-12
        assert difference(sample, network.decode(z).sample) <= 1e-12
    assert deep.counts[3] > 20


def test_convolutions_over_time_never_run_on_one_frame():
    model = reference("uneven")
    network = ours(model)
    x, z = pixels(model, (1, 1, 16, 24)), latents(model, (1, 1, 16, 24))
    mean, sample = network.encode(x).latent_dist.mean, network.decode(z).sample
    for name, p in network.named_parameters():
        if "time_conv" in name:
            p.fill_(float("nan"))
        elif p.ndim == 5 and p.shape[2] == 3:
            p[:, :, :2] = float("nan")
    assert torch.equal(network.encode(x).latent_dist.mean, mean)
    assert torch.equal(network.decode(z).sample, sample)


def test_one_frame_keeps_nothing():
    """The inputs of sixty convolutions would be kept for a next chunk that never comes."""
    model = reference("narrow")
    network = ours(model)
    pasts = []
    for part in (network.encoder, network.decoder):
        part.register_forward_pre_hook(lambda module, args: pasts.append(args[1]))
    network.encode(pixels(model, (1, 1, 16, 24)))
    network.decode(latents(model, (1, 1, 16, 24)))
    assert pasts == [None, None]
    network.decode(latents(model, (1, 5, 16, 24)))
    temporal = [m for m in network.decoder.modules() if isinstance(m, wan_vae.CausalConv3d)]
    assert pasts[2] is pasts[3] and pasts[2].keys() == set(temporal)
    assert {kept.shape[2] for kept in pasts[2].values()} == {2}
    assert {kept.untyped_storage().nbytes() / kept.nbytes for kept in pasts[2].values()} == {1.0}


def test_changed_weights_are_used():
    """No copy of the weights is kept: an adapter or a training step shows in the next call."""
    model = reference("narrow")
    network = ours(model)
    network.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    x, z = pixels(model, (1, 1, 16, 24)), latents(model, (1, 1, 16, 24))
    check_codes(network, model, x, z)
    for net in (model, network):
        for name, p in net.named_parameters():
            if name.endswith("weight"):
                p.data.mul_(0.9)
    check_codes(network, model, x, z)


def test_decode_of_the_first_latents_is_the_start_of_the_whole():
    model = reference("uneven")
    network = ours(model)
    z = torch.randn(2, 5, 4, 3, 2)
    whole = network.decode(z).sample
    for k in (1, 2, 3):
        assert difference(network.decode(z[:, :, :k]).sample, whole[:, :, : 1 + 4 * (k - 1)]) <= 1e-6


def test_the_past_can_be_forked():
    """One `Past` continued in two ways: its tensors are never written to, and a copied dict is enough."""
    network = ours(reference("uneven"))
    z = torch.randn(1, 5, 3, 2, 3)
    past: wan_vae.Past = {}
    first = network.decoder(network.post_quant_conv(z[:, :, :1]), past)
    before = {conv: kept.clone() for conv, kept in past.items()}
    for index in (2, 1):
        frames = torch.cat(
            (first, network.decoder(network.post_quant_conv(z[:, :, [index]]), dict(past))), dim=2
        )
        assert difference(frames.clamp(-1, 1), network.decode(z[:, :, [0, index]]).sample) <= 1e-5
        assert past.keys() == before.keys()
        assert all(torch.equal(past[conv], before[conv]) for conv in past)


TILES = {
    "both_axes": ((2, 1, 72, 104), (32, 48, 24, 32)),
    "video": ((1, 5, 56, 40), (32, 32, 16, 24)),
    "one_axis": ((1, 1, 24, 80), (32, 32, 24, 16)),
    "no_overlap": ((1, 1, 64, 48), (32, 32, 32, 32)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", TILES)
def test_tiling(case):
    shape, sizes = TILES[case]
    model = reference("narrow")
    network = ours(model)
    x, z = pixels(model, shape), latents(model, shape)
    untiled = network.encode(x).latent_dist.mean, network.decode(z).sample
    assert not network.use_tiling
    model.enable_tiling(*sizes)
    network.enable_tiling(*sizes)
    assert network.use_tiling
    assert (network.tile_sample_min_width, network.tile_sample_stride_height) == (sizes[1], sizes[2])
    check_codes(network, model, x, z)
    assert difference(network.decode(z).sample, untiled[1]) > 1e-3
    network.disable_tiling()
    assert torch.equal(network.encode(x).latent_dist.mean, untiled[0])
    assert torch.equal(network.decode(z).sample, untiled[1])


def test_tiling_of_another_factor_and_small_pictures():
    model = reference("three_stages")
    network = ours(model)
    for net in (model, network):
        net.enable_tiling(tile_sample_min_height=24, tile_sample_stride_height=16)
        net.enable_tiling(tile_sample_min_width=20, tile_sample_stride_width=12)
    check_codes(network, model, pixels(model, (1, 5, 36, 44)), latents(model, (1, 5, 36, 44)))
    check_codes(network, model, pixels(model, (1, 1, 24, 20)), latents(model, (1, 1, 24, 20)))


@pytest.mark.slow
@pytest.mark.parametrize("tiling", [False, True])
def test_slicing(tiling):
    model = reference("narrow")
    network = ours(model)
    x, z = pixels(model, (3, 5, 40, 24)), latents(model, (3, 5, 40, 24))
    sizes = []
    network.encoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for net in (model, network):
        net.enable_slicing()
        if tiling:
            net.enable_tiling(32, 32, 24, 24)
    assert network.use_slicing
    check_codes(network, model, x, z)
    assert set(sizes) == {1}
    network.disable_slicing()
    check_codes(network, model, x, z)
    assert set(sizes) == {1, 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_posterior(dtype):
    parameters = (torch.randn(3, 8, 2, 3, 5) * 25).to(dtype)
    found, wanted = DiagonalGaussian(parameters), DiagonalGaussianDistribution(parameters)
    assert found.logvar.min() == -30 and found.logvar.max() == 20
    for part in ("mean", "logvar", "std"):
        assert torch.equal(getattr(found, part), getattr(wanted, part))

    def draws(posterior):
        torch.manual_seed(5)
        yield posterior.sample()
        yield posterior.sample(torch.Generator().manual_seed(6))
        yield posterior.sample([torch.Generator().manual_seed(seed) for seed in (7, 8, 9)])

    for a, b in zip(draws(found), draws(wanted), strict=True):
        assert a.dtype is dtype and torch.equal(a, b)
    alone = DiagonalGaussian(parameters[1:2]).sample(torch.Generator().manual_seed(8))
    listed = found.sample([torch.Generator().manual_seed(seed) for seed in (7, 8, 9)])
    assert torch.equal(listed[1:2], alone)
    with pytest.raises(ValueError, match="list of 2.* 3 images"):
        found.sample([torch.Generator(), torch.Generator()])


def test_real_config_has_the_names_and_shapes_of_the_reference():
    with torch.device("meta"):
        network, model = AutoencoderKLWan(), Reference()
    assert shapes(network) == shapes(model)
    assert len(shapes(network)) == 194
    assert sum(p.numel() for p in network.parameters()) == 126_892_531
    assert all(p.is_meta for p in network.parameters())


def test_defaults_are_the_published_configs(shared_data):
    for folder in ("joyai-image-edit", "chronoedit-14b"):
        raw = json.loads((shared_data / folder / "vae" / "config.json").read_text())
        config = AutoencoderKLWanConfig.from_dict(raw)
        assert config == AutoencoderKLWanConfig()
        assert {key: config.to_dict()[key] for key in raw if not key.startswith("_")} == {
            key: value for key, value in raw.items() if not key.startswith("_")
        }


# Written down from the original's module structure; `to_original` makes the other 184.
BY_HAND = {
    "conv1.weight": "quant_conv.weight",
    "conv2.bias": "post_quant_conv.bias",
    "encoder.conv1.bias": "encoder.conv_in.bias",
    "encoder.downsamples.3.shortcut.weight": "encoder.down_blocks.3.conv_shortcut.weight",
    "encoder.downsamples.5.time_conv.weight": "encoder.down_blocks.5.time_conv.weight",
    "encoder.middle.1.to_qkv.weight": "encoder.mid_block.attentions.0.to_qkv.weight",
    "decoder.middle.2.residual.6.weight": "decoder.mid_block.resnets.1.conv2.weight",
    "decoder.upsamples.7.resample.1.bias": "decoder.up_blocks.1.upsamplers.0.resample.1.bias",
    "decoder.upsamples.14.residual.3.gamma": "decoder.up_blocks.3.resnets.2.norm2.gamma",
    "decoder.head.2.weight": "decoder.conv_out.weight",
}


def to_original(name: str, num_res_blocks: int) -> str:
    """The original's name of one of the reference's tensors, by arithmetic on the numbers in it."""
    name = re.sub(r"^quant_conv", "conv1", name)
    name = re.sub(r"^post_quant_conv", "conv2", name)
    name = re.sub(r"coder\.conv_in\.", "coder.conv1.", name)
    name = re.sub(r"norm_out", "head.0", name)
    name = re.sub(r"conv_out", "head.2", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle.1").replace("down_blocks", "downsamples")
    per_stage = num_res_blocks + 2  # one resnet more than in the encoder, one upsampler
    name = re.sub(
        r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)",
        lambda m: (
            f"upsamples.{int(m[1]) * per_stage + (per_stage - 1 if m[2] == 'upsamplers' else int(m[3]))}"
        ),
        name,
    )
    block = r"((?:middle|downsamples|upsamples)\.\d+)\."
    name = re.sub(block + r"norm([12])\.", lambda m: f"{m[1]}.residual.{3 * int(m[2]) - 3}.", name)
    name = re.sub(block + r"conv([12])\.", lambda m: f"{m[1]}.residual.{4 * int(m[2]) - 2}.", name)
    return name.replace("conv_shortcut", "shortcut")


@pytest.mark.parametrize("layout", ["original", "comfyui-first-stage", "comfyui-vae"])
def test_original_layout_of_the_real_config(layout):
    with torch.device("meta"):
        wanted = shapes(Reference())
    prefix = {"original": "", "comfyui-first-stage": "first_stage_model.", "comfyui-vae": "vae."}[layout]
    names = {name: to_original(name, 2) for name in wanted}
    assert {names[ours]: ours for ours in BY_HAND.values()} == BY_HAND
    found = {prefix + names[name]: shape for name, shape in wanted.items()}
    assert len(found) == 194
    plan = plan_conversion(layouts(AutoencoderKLWanConfig()), found, wanted)
    assert plan.layout.name == layout and not plan.dropped
    assert {name: step.sources for name, step in plan.steps.items()} == {
        name: (prefix + names[name],) for name in wanted
    }


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["pth", "prefix"])
def test_original_files_load_and_compute_the_same(tmp_path, name, form):
    model = reference(name)
    state = {
        to_original(key, model.config.num_res_blocks): value.clone()
        for key, value in model.state_dict().items()
    }
    if form == "pth":
        path = tmp_path / "Wan2.1_VAE.pth"
        torch.save(state, path)
    else:
        path = tmp_path / "wan.safetensors"
        save_file({f"first_stage_model.{key}": value for key, value in state.items()}, path)
    config = AutoencoderKLWanConfig.from_dict(json.loads(model.to_json_string()))
    network = load_network(AutoencoderKLWan, config, TensorFiles([path]))
    check_codes(network, model, pixels(model, (1, 5, 16, 8)), latents(model, (1, 5, 16, 8)))


def test_layouts_run_backwards():
    network = ours(reference("uneven"))
    written = check_layouts_run_backwards(network.layouts(), network.state_dict())
    assert {len(foreign) for foreign in written.values()} == {len(network.state_dict())}


def test_a_layout_for_other_stages_is_refused(tmp_path):
    model = reference("uneven")
    state = {to_original(key, 2): value.clone() for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "vae.pth")
    config = AutoencoderKLWanConfig.from_dict(json.loads(model.to_json_string())).replace(num_res_blocks=1)
    with pytest.raises(ValueError, match="not the weights of this AutoencoderKLWan.*unknown"):
        load_network(AutoencoderKLWan, config, TensorFiles([tmp_path / "vae.pth"]))


def test_folders_open_here_and_there(tmp_path):
    model = reference("uneven")
    model.save_pretrained(tmp_path / "theirs")
    network = AutoencoderKLWan.from_pretrained(tmp_path / "theirs")
    x, z = pixels(model, (1, 5, 16, 8)), latents(model, (1, 5, 16, 8))
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
    network = AutoencoderKLWan(AutoencoderKLWanConfig.from_dict(CONFIGS["narrow"]))

    def started(*args):
        raise AssertionError("work started before the input was checked")

    monkeypatch.setattr(wan_vae.Encoder, "forward", started)
    monkeypatch.setattr(wan_vae.Decoder, "forward", started)
    monkeypatch.setattr(wan_vae.PointConv3d, "forward", started)
    return network


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 2, 16, 16), "2 frames.*1, 5, 9"),
        ((1, 3, 3, 16, 16), "3 frames"),
        ((1, 3, 4, 16, 16), "4 frames"),
        ((1, 3, 7, 16, 16), "7 frames"),
        ((1, 3, 0, 16, 16), "shape"),
        ((1, 3, 1, 20, 16), "height 20.*multiple of 8"),
        ((1, 3, 1, 16, 31), "width 31.*multiple of 8"),
        ((1, 3, 1, 0, 16), "shape"),
        ((1, 4, 1, 16, 16), "3, frames"),
        ((3, 16, 16), "shape"),
        ((1, 3, 16, 16), "shape"),
    ],
)
def test_pictures_that_do_not_fit(idle, shape, message):
    with pytest.raises(ValueError, match=message):
        idle.encode(torch.zeros(shape))


def test_other_input_that_does_not_fit(idle):
    with pytest.raises(TypeError, match="uint8.*floating point"):
        idle.encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    for shape in ((1, 3, 1, 2, 2), (1, 16, 2, 2), (0, 16, 1, 2, 2), (1, 16, 0, 2, 2)):
        with pytest.raises(ValueError, match="z has shape.*16, frames"):
            idle.decode(torch.zeros(shape))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"tile_sample_min_height": 100}, "tile_sample_min_height=100.*multiple of 8"),
        ({"tile_sample_stride_width": -8}, "tile_sample_stride_width=-8"),
        ({"tile_sample_min_width": 64}, "tile_sample_stride_width=192 leaves gaps between tiles of 64"),
    ],
)
def test_tiles_that_do_not_fit(idle, sizes, message):
    with pytest.raises(ValueError, match=message):
        idle.enable_tiling(**sizes)
    assert not idle.use_tiling and idle.tile_sample_min_width == 256


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"is_residual": True}, "is_residual=True is not supported, only False"),
        ({"patch_size": 2}, "patch_size=2"),
        ({"attn_scales": [1.0]}, "attn_scales"),
        ({"dropout": 0.1}, "dropout"),
        ({"temperal_downsample": [True, True]}, "temperal_downsample.*3 values"),
        ({"temperal_downsample": [True, True, True], "scale_factor_temporal": 8}, "at most two"),
        ({"scale_factor_temporal": 8}, "scale_factor_temporal=8.*4"),
        ({"dim_mult": [1, 2], "temperal_downsample": [True]}, "scale_factor_spatial=8.*2"),
        ({"base_dims": 96}, "did you mean 'base_dim'"),
    ],
)
def test_configs_that_are_not_computed(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLWanConfig.from_dict(changes)
