"""What users of diffusers and transformers type around networks, beside the reference."""

import functools
import logging

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file

import joyedit
from joyedit.checkpoints import network_spellings
from joyedit.checkpoints.missing import NotHereError

UNET = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
KL = {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
NAMES = {
    "UNet2DConditionModel": ("tiny-diffedit", "unet"),
    "AutoencoderKL": ("tiny-diffedit", "vae"),
    "CLIPTextModel": ("tiny-diffedit", "text_encoder"),
    "JoyImageEditTransformer3DModel": ("tiny-joyimage", "transformer"),
    "AutoencoderKLWan": ("tiny-joyimage", "vae"),
    "Qwen3VLForConditionalGeneration": ("tiny-joyimage", "text_encoder"),
    "ChronoEditTransformer3DModel": ("tiny-chronoedit", "transformer"),
    "UMT5EncoderModel": ("tiny-chronoedit", "text_encoder"),
    "CLIPVisionModelWithProjection": ("tiny-chronoedit", "image_encoder"),
}


@functools.cache
def tiny(name):
    return joyedit.load(name, device="cpu")


@pytest.fixture
def unet():
    return joyedit.UNet2DConditionModel.from_config(UNET).eval().requires_grad_(False)


def run(unet, **options):
    torch.manual_seed(3)
    return unet(torch.randn(1, 4, 8, 8), torch.tensor([7]), torch.randn(1, 3, 12), **options).sample


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_here_or_named(name):
    """Names that a later release of the reference adds fail here too."""
    checkpoint, part = NAMES[name]
    ours = getattr(tiny(checkpoint), part)
    theirs = getattr(diffusers, name, None) or getattr(transformers, name)
    for public in sorted(n for n in dir(theirs) if not n.startswith("_")):
        try:
            getattr(ours, public)
        except NotHereError as error:
            assert not hasattr(ours, public) and len(str(error)) > 30
    with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
        ours.nothing  # noqa: B018


def test_names_that_are_not_here_lead_on(unet):
    with pytest.raises(NotHereError, match=r"has no set_attn_processor: attention is one function"):
        unet.set_attn_processor(None)
    with pytest.raises(NotHereError, match=r"has no disable_lora: joyedit.lora.Adapters"):
        unet.disable_lora()
    assert not hasattr(unet, "gradient_checkpointing_enable")
    assert unet.conv_in.weight is dict(unet.named_parameters())["conv_in.weight"]


def test_counts(unet):
    reference = diffusers.UNet2DConditionModel.from_config(UNET)
    assert unet.num_parameters() == reference.num_parameters()
    assert unet.get_memory_footprint() == reference.get_memory_footprint()
    reference.requires_grad_(False)
    for network in (unet, reference):
        network.conv_in.weight.requires_grad_(True)
    assert unet.num_parameters(only_trainable=True) == reference.num_parameters(only_trainable=True) > 0
    unet.requires_grad_(False)


def test_configs_are_saved_and_loaded_by_each_other(unet, tmp_path):
    reference = diffusers.UNet2DConditionModel.from_config(UNET)
    unet.save_config(tmp_path / "ours")
    reference.save_config(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = joyedit.UNet2DConditionModel.load_config(tmp_path / folder)
        assert loaded == dict(diffusers.UNet2DConditionModel.load_config(tmp_path / folder))
        assert joyedit.UNet2DConditionModel.from_config(loaded).config == unet.config
        made = diffusers.UNet2DConditionModel.from_config(loaded)
        assert made.num_parameters() == unet.num_parameters()
    (tmp_path / "theirs" / "inside").mkdir()
    unet.save_config(tmp_path / "theirs" / "inside")
    found = joyedit.UNet2DConditionModel.load_config(tmp_path / "theirs", subfolder="inside")
    assert found == joyedit.UNet2DConditionModel.load_config(tmp_path / "ours" / "config.json")
    with pytest.raises(FileNotFoundError, match="config.json"):
        joyedit.UNet2DConditionModel.load_config(tmp_path)


def foreign(network, layout):
    found = next(one for one in network.layouts() if one.name == layout)
    return {name: value.contiguous().clone() for name, value in found.invert(network.state_dict()).items()}


def equal_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_networks_from_single_files(unet, tmp_path):
    """Of one network and of a whole model, with a config in each form that it may have."""
    vae = joyedit.AutoencoderKL.from_config(KL)
    whole = {**foreign(unet, "ldm-single-file"), **foreign(vae, "ldm-first-stage"), "other": torch.zeros(1)}
    save_file(whole, tmp_path / "whole.safetensors")
    save_file(foreign(vae, "ldm"), tmp_path / "vae.safetensors")
    unet.save_config(tmp_path / "folder" / "unet")
    for config in (
        UNET,
        unet.config,
        tmp_path / "folder" / "unet",
        tmp_path / "folder" / "unet" / "config.json",
    ):
        again = joyedit.UNet2DConditionModel.from_single_file(tmp_path / "whole.safetensors", config=config)
        assert equal_weights(again, unet) and again.config == unet.config
    again = joyedit.UNet2DConditionModel.from_single_file(
        tmp_path / "whole.safetensors",
        config=tmp_path / "folder",
        subfolder="unet",
        torch_dtype=torch.bfloat16,
    )
    assert again.dtype == torch.bfloat16 and torch.equal(again.conv_in.weight, unet.conv_in.weight.bfloat16())
    for name in ("whole", "vae"):
        found = joyedit.AutoencoderKL.from_single_file(tmp_path / f"{name}.safetensors", config=KL)
        assert equal_weights(found, vae)
    vae.save_config(tmp_path)  # beside the files
    assert joyedit.AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors")).config == vae.config


def test_single_files_that_cannot_be(unet, tmp_path):
    save_file(foreign(unet, "ldm"), tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="not the weights of this UNet2DConditionModel"):
        joyedit.UNet2DConditionModel.from_single_file(tmp_path / "unet.safetensors")
    url = "https://huggingface.co/somebody/model/blob/main/unet.safetensors"
    with pytest.raises(FileNotFoundError, match="fetch it with hf_hub_download"):
        joyedit.UNet2DConditionModel.from_single_file(url)


@pytest.mark.slow
def test_compile_reaches_the_blocks_in_place(unet):
    before = run(unet)
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    blocks = network_spellings.repeated_blocks(unet)
    middle = [*unet.mid_block.resnets, *unet.mid_block.attentions]
    assert {*blocks} == {*unet.down_blocks, *unet.up_blocks, *middle}
    for compiling in (unet.compile, unet.compile_repeated_blocks):
        compiled.clear()
        torch._dynamo.reset()
        assert compiling(backend=backend) is None
        assert torch.equal(run(unet), before) and len(compiled) >= len(blocks)
    assert (
        unet._compiled_call_impl is None and unet.state_dict().keys() == dict(unet.named_parameters()).keys()
    )


def test_a_hook_on_a_whole_network_is_warned_of_once(unet, caplog):
    network_spellings._warn_of_hook.cache_clear()
    calls = []
    for _ in range(2):
        unet.register_forward_hook(lambda *seen: calls.append(seen))
        unet.register_forward_pre_hook(lambda *seen: calls.append(seen))
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "UNet2DConditionModel" in line and "hook its blocks" in line
    run(unet)
    assert len(calls) == 4


def test_hooks_on_blocks_run_in_a_pipeline(caplog):
    from PIL import Image

    pipe = joyedit.load("tiny-diffedit", device="cpu")
    seen = []
    hook = pipe.unet.down_blocks[0].register_forward_hook(lambda *found: seen.append(1))
    photo = Image.new("RGB", (64, 64), "red")
    mask = Image.new("L", (64, 64), 255)
    pipe.edit(photo, "a red circle", "a blue circle", mask_image=mask, num_inference_steps=2)
    hook.remove()
    assert seen and not [r for r in caplog.records if "forward hook" in r.getMessage()]


@pytest.mark.parametrize("name", ["enable_xformers_memory_efficient_attention", "set_attention_slice"])
def test_switches_without_effect_say_so(unet, caplog, name):
    caplog.set_level(logging.INFO, "joyedit")
    assert getattr(unet, name)() is None
    assert "joyedit.ops.attention" in caplog.records[-1].getMessage()
