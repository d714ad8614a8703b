"""The three systems from photograph to result with every operation forced to its kernel: the result is what
PyTorch computes, every kernel was launched as often as the sizes of the networks say, and PyTorch computed
nothing of that kind but what is listed here.

Under "triton" an operation that its kernel cannot take raises an error, so none falls back. What has no
kernel by design is counted like the kernels:

    attention with a mask: the distances of UMT5, and ends of prompts of unequal length
    attention with one head as wide as feature maps: once per picture in each half of an autoencoder
    exact and quick GELU: CLIP and what follows a vision tower, once per picture or prompt
    SiLU of the timesteps' embeddings: one row per step, all of them once per run

How far results may be apart: where PyTorch is one unit in the last place (of the largest value) away from the
exact result, a kernel is at most three, by its own tests, so there are four between them. A run is a chain of
launches. The networks norm what they add up, so that a launch makes no earlier error larger in proportion;
errors of unlike operations are independent, so that they grow with the root of their number. Guidance by g
makes of errors in both predictions at most 2 g - 1 as much.
"""

import collections
import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from benchmarks.random_checkpoint import (
    write_random_checkpoint,
    write_random_chronoedit_checkpoint,
    write_random_diffedit_checkpoint,
)
from joyedit import ChronoEditPipeline, JoyImageEditPipeline, StableDiffusionDiffEditPipeline, ops

PROMPT, OTHER = "a cat", "a dog on it"
GUIDANCE = 3.0
WAN = {"dim_mult": (1, 2, 2), "temperal_downsample": (True, True), "scale_factor_spatial": 4}

# Functions of PyTorch that do what the operations do, or parts of it. Sums and products are everywhere.
LIKE_KERNELS = {
    *("layer_norm", "group_norm", "rms_norm", "normalize", "silu", "sigmoid", "gelu", "softmax"),
    *(
        "scaled_dot_product_attention",
        "norm",
        "linalg_norm",
        "linalg_vector_norm",
        "var",
        "rsqrt",
        "tanh",
        "erf",
        "addcmul",
        "addcmul_",
    ),
    *("view_as_complex", "complex", "addcdiv", "native_layer_norm", "native_group_norm", "_addmm_activation"),
}


BY_PYTORCH = "F.scaled_dot_product_attention"


class Counts(collections.Counter):
    """How often what is called, by name."""

    def __mul__(self, times: int) -> "Counts":
        return Counts({name: times * count for name, count in self.items()})

    def __add__(self, other) -> "Counts":
        return Counts(super().__add__(other))


class PyTorch(TorchFunctionMode):
    """Counts the calls of LIKE_KERNELS, as "F.gelu"."""

    def __init__(self):
        super().__init__()
        self.counts = Counts()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in LIKE_KERNELS:
            self.counts[f"F.{func.__name__}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A pipeline of a tiny checkpoint of the given kind; each kind is written once."""
    folders = {}

    def load(kind, write):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("tiny")
            write(folders[kind])
        return kind.from_pretrained(folders[kind], dtype="float32")

    return load


@pytest.fixture(autouse=True)
def full_precision():
    """Of convolutions on a GPU: they would round unlike inputs to unlike numbers of ten bits."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def joyimage(load, device):
    pipe = load(JoyImageEditPipeline, write_random_checkpoint)
    text, vision = pipe.text_encoder.config.text_config, pipe.text_encoder.config.vision_config
    images = pipe.processor.image_processor
    images.config = dataclasses.replace(images.config, min_pixels=2048, max_pixels=4096)
    parts = {
        "transformer": smaller(pipe.transformer, num_layers=2),
        "vae": smaller(pipe.vae, **WAN),
        "text_encoder": smaller(
            pipe.text_encoder,
            text_config=dataclasses.replace(text, num_hidden_layers=2),
            vision_config=dataclasses.replace(vision, depth=2, deepstack_visual_indexes=(0,)),
        ),
    }
    return assembled(pipe, parts, device, buckets=[(16, 24)])


@pytest.fixture
def diffedit(load, device):
    pipe = load(StableDiffusionDiffEditPipeline, write_random_diffedit_checkpoint)
    pipe.tokenizer.model_max_length = 20
    parts = {
        "unet": smaller(
            pipe.unet,
            block_out_channels=(16, 32),
            norm_num_groups=2,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        "vae": smaller(
            pipe.vae,
            block_out_channels=(8, 16),
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        "text_encoder": smaller(pipe.text_encoder),
    }
    return assembled(pipe, parts, device, requires_safety_checker=False)


@pytest.fixture
def chronoedit(load, device):
    pipe = load(ChronoEditPipeline, write_random_chronoedit_checkpoint)
    parts = {
        "transformer": smaller(pipe.transformer, num_layers=2),
        "vae": smaller(pipe.vae, **WAN),
        "text_encoder": smaller(pipe.text_encoder),
        "image_encoder": smaller(pipe.image_encoder, image_size=28),
    }
    images = pipe.image_processor
    images.config = dataclasses.replace(images.config, size=28, crop_size=(28, 28))
    return assembled(pipe, parts, device)


def smaller(network, **settings):
    """A network with other settings, and random weights that keep the scale of what passes."""
    made = type(network)(dataclasses.replace(network.config, **settings)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(len(settings))
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name and name.endswith(("weight", "gamma"))
        if is_norm:
            noise = 1 + 0.2 * noise
        elif parameter.ndim == 1:
            noise *= 0.2
        elif name.endswith("table"):  # of modulation: gates that let layers show
            noise *= 0.5
        elif not ("embedding" in name or "embed_tokens" in name or name == "shared.weight"):
            noise /= parameter[0].numel() ** 0.5
        parameter.copy_(noise)
    return made


def assembled(pipe, parts, device, **settings):
    made = type(pipe)(**{**pipe.components, **parts}, **settings).to(device)
    made.set_progress_bar_config(disable=True)
    return made


def photo(width, height):
    small = np.random.default_rng(0).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def both_ways(launches, run):
    """The results of `run` by PyTorch and by the kernels, the launches then, and what else was called."""
    with ops.backend("torch"), launches() as none:
        wanted = run()
    assert not none
    with ops.backend("triton"), launches() as kernels, PyTorch() as rest:
        result = run()
    return wanted, result, Counts(kernels), rest.counts


def check_same(wanted, result, kernels):
    """See the top of this file."""
    wanted, result = (torch.as_tensor(x).double() for x in (wanted, result))
    unit = torch.finfo(torch.float32).eps * wanted.abs().max().item()
    tolerance = 4 * unit * math.sqrt(kernels.total()) * (2 * GUIDANCE - 1)
    error = (wanted - result).abs().max().item()
    assert wanted.std() > 0.01, "a picture of one colour shows nothing"
    assert error <= tolerance, f"{error:.1e} apart, {tolerance:.1e} are explained"


@pytest.mark.slow
def test_joyimage(joyimage, launches):
    steps = 2

    def run():
        edit = joyimage(
            photo(24, 16),
            PROMPT,
            negative_prompt=OTHER,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        return edit.images.cpu()

    wanted, result, kernels, rest = both_ways(launches, run)
    branches = 2
    encoder, vae = joyimage.text_encoder.config, joyimage.vae.config
    assert kernels + rest == (
        qwen_vision(encoder.vision_config)
        + qwen_text(encoder.text_config)  # what both prompts begin with
        + qwen_text(encoder.text_config, masked=True)  # their ends, padded to one length
        + wan_encoder(vae)
        + Counts({"F.silu": 2, "gelu_tanh": branches})  # embeddings of timesteps and of prompts
        + joyimage_transformer(joyimage.transformer.config) * (steps * branches)
        + Counts(guide=steps)
        + wan_decoder(vae)
    )
    check_same(wanted, result, kernels)


@pytest.mark.slow
def test_diffedit(diffedit, launches):
    steps = 2

    def run():
        edit = diffedit.edit(
            photo(16, 12),
            PROMPT,
            OTHER,
            num_inference_steps=steps,
            inpaint_strength=1.0,
            guidance_scale=GUIDANCE,
            num_maps_per_mask=1,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        )
        return edit.heat_map, edit.mask, edit.images.cpu()

    wanted, result, kernels, rest = both_ways(launches, run)
    text, unet, vae = (part.config for part in (diffedit.text_encoder, diffedit.unet, diffedit.vae))
    assert kernels + rest == (
        clip_text(text)
        + kl_encoder(vae) * 2  # for the mask, and for the inversion
        + sd_unet(unet) * (1 + 2 * steps)  # all prompts of the mask at once; inversion, denoising
        + Counts({"F.silu": 2}) * 3  # embeddings of timesteps
        + Counts(guide=steps)
        + kl_decoder(vae)
    )
    for a, b in zip(wanted[::2], result[::2], strict=True):  # heat map and picture
        check_same(a, b, kernels)
    assert 0 < wanted[1].mean() < 1 and (wanted[1] == result[1]).all()


def film(pipe, frames, cut):
    """What ChronoEdit makes: 5 frames from so many, if more, until step `cut`."""
    reasoning = (
        {} if cut is None else {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": cut}
    )
    out = pipe(
        photo(24, 16),
        PROMPT,
        OTHER,
        height=16,
        width=24,
        num_frames=frames,
        num_inference_steps=2,
        guidance_scale=GUIDANCE,
        max_sequence_length=12,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **reasoning,
    )
    return out.frames.float().cpu()


@pytest.mark.slow
@pytest.mark.parametrize(
    "frames, cut",
    [
        pytest.param(5, None, id="edit"),
        pytest.param(9, 1, id="pruned reasoning", marks=pytest.mark.slow),
    ],
)
def test_chronoedit(chronoedit, launches, frames, cut):
    wanted, result, kernels, rest = both_ways(launches, lambda: film(chronoedit, frames, cut))
    assert wanted.shape == (1, 5, 3, 16, 24)
    assert kernels + rest == chronoedit_run(chronoedit, encoded=1 + (frames - 1) // 4)
    check_same(wanted, result, kernels)


@pytest.mark.slow
def test_chronoedit_in_bf16(chronoedit, launches, monkeypatch):
    """About as far from fp32 as PyTorch is in bf16: both round between layers, which is most of the error."""
    monkeypatch.setattr(ops, "CPU_HAS_BF16", True)
    chronoedit.to(torch.bfloat16)
    half, result, kernels, rest = both_ways(launches, lambda: film(chronoedit, 5, None))
    assert kernels + rest == chronoedit_run(chronoedit, encoded=2)
    chronoedit.to(torch.float32)
    with ops.backend("torch"):
        exact = film(chronoedit, 5, None)
    error, plain_error = ((x - exact).square().mean().sqrt().item() for x in (result, half))
    assert 1e-4 < plain_error < 0.5 * exact.std(), "this is not bf16"
    assert error <= 1.5 * plain_error, f"error {error:.1e}, PyTorch {plain_error:.1e}"


def chronoedit_run(pipe, encoded, steps=2, branches=2):
    """An edit that ends with two latent frames; `encoded`: those it begins with."""
    transformer = pipe.transformer.config
    layers = transformer.num_layers
    return (
        umt5(pipe.text_encoder.config, prompts=branches)
        + clip_vision(pipe.image_encoder.config)
        + wan_encoder(pipe.vae.config) * encoded
        + Counts({"F.silu": 2})  # embeddings of timesteps
        + Counts(gelu_tanh=1, rms_norm=layers) * branches  # of prompts: their keys are normed in every block
        + Counts({"layer_norm": 2, "F.gelu": 1, "rms_norm": layers})  # of the photograph
        + chronoedit_transformer(transformer) * (steps * branches)
        + Counts(guide=steps)
        + wan_decoder(pipe.vae.config) * 2
    )


def qwen_vision(config) -> Counts:
    mergers = 1 + len(config.deepstack_visual_indexes)
    block = Counts(layer_norm=2, qk_norm_rope=1, attention=1, gelu_tanh=1)
    return block * config.depth + Counts({"layer_norm": 1, "F.gelu": 1}) * mergers


def qwen_text(config, masked=False) -> Counts:
    attention = BY_PYTORCH if masked else "attention"
    layer = Counts({"rms_norm": 1, "qk_norm_rope": 1, attention: 1, "add_rms_norm": 1, "swiglu": 1})
    return layer * config.num_hidden_layers


def joyimage_transformer(config) -> Counts:
    """Two streams, which write q, k and v where the attention reads both; in the last block only what the
    target's tokens need."""
    to_attention = Counts(ada_layer_norm=1, qk_norm_rope_out=1)
    stream = to_attention + Counts(gate_residual_norm=1, gate_residual=1, gelu_tanh=1)
    block = stream * 2 + Counts(attention=1)
    last = stream + to_attention + Counts(attention=1)
    return block * (config.num_layers - 1) + last + Counts(layer_norm=1)


def chronoedit_transformer(config) -> Counts:
    attention = Counts(ada_layer_norm=1, qk_norm_rope=1, attention=1, gate_residual_layer_norm=1)
    to_context = Counts(rms_norm=1, attention=1)
    mlp = Counts(gate_residual_norm=1, gelu_tanh=1, gate_residual=1)
    return (attention + to_context + mlp) * config.num_layers + Counts(ada_layer_norm=1)


def sd_unet(config) -> Counts:
    layers, levels = config.layers_per_block, len(config.block_out_channels)
    resnets = levels * layers + 2 + levels * (layers + 1)
    down = sum(kind.startswith("CrossAttn") for kind in config.down_block_types) * layers
    up = sum(kind.startswith("CrossAttn") for kind in config.up_block_types) * (layers + 1)
    transformer = Counts(group_norm=1, layer_norm=3, attention=2, geglu=1)
    return Counts(group_norm_silu=2) * resnets + transformer * (down + 1 + up) + Counts(group_norm_silu=1)


def kl_encoder(config) -> Counts:
    resnets = len(config.block_out_channels) * config.layers_per_block + 2
    return Counts({"group_norm_silu": 2 * resnets + 1, "group_norm": 1, BY_PYTORCH: 1})


def kl_decoder(config) -> Counts:
    return kl_encoder(config) + Counts(group_norm_silu=2) * len(config.block_out_channels)


def wan_encoder(config) -> Counts:
    """For one latent frame."""
    blocks = len(config.dim_mult) * config.num_res_blocks + 2
    return Counts({"channel_rms_norm_silu": 2 * blocks + 1, "channel_rms_norm": 1, BY_PYTORCH: 1})


def wan_decoder(config) -> Counts:
    return wan_encoder(config) + Counts(channel_rms_norm_silu=2) * len(config.dim_mult)


def clip_text(config) -> Counts:
    layer = Counts({"layer_norm": 2, "attention": 1, "F.sigmoid": 1})
    return layer * config.num_hidden_layers + Counts(layer_norm=1)


def clip_vision(config) -> Counts:
    """Without the last layer, which ChronoEdit does not read."""
    layer = Counts({"layer_norm": 2, "attention": 1, "F.gelu": 1})
    return Counts(layer_norm=1) + layer * (config.num_hidden_layers - 1)


def umt5(config, prompts) -> Counts:
    layer = Counts({"rms_norm": 1, BY_PYTORCH: prompts, "add_rms_norm": 1, "geglu_tanh": 1})
    return layer * config.num_layers + Counts(rms_norm=1)
