"""Whole ChronoEdit runs against diffusers, on the same tiny random weights.

Where the reference fails, the truth is what its parts give when the fault is gone around: one prompt in place
of several films of it, two attributes that its Euler scheduler lacks, one constant in its attention.
"""

import logging

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan as ReferenceVAE
from diffusers import ChronoEditPipeline as ReferencePipeline
from diffusers import ChronoEditTransformer3DModel as ReferenceTransformer
from diffusers import FlowMatchEulerDiscreteScheduler as ReferenceEuler
from diffusers import UniPCMultistepScheduler as ReferenceUniPC
from diffusers.models.transformers.transformer_chronoedit import WanAttnProcessor
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, UMT5Config
from transformers import CLIPVisionModel as ReferenceVision
from transformers import UMT5EncoderModel as ReferenceText
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.random_checkpoint import write_random_chronoedit_checkpoint
from joyedit import (
    AutoencoderKLWan,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    CLIPImageProcessor,
    CLIPVisionModel,
    FlowMatchEulerDiscreteScheduler,
    T5TokenizerFast,
    UMT5EncoderModel,
    UniPCMultistepScheduler,
)
from joyedit.pipelines.chronoedit import TENSOR_IMAGES

TOLERANCE = 1e-5  # of latents after each step, relative to the largest
FRAMES = 5e-5  # of frames, absolute, in [0, 1]
HEIGHT, WIDTH = 32, 48
PROMPT, OTHER = "a bowl of fruit, &amp; a  cat ", "the dog is on it"
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


@torch.no_grad()
def filled(network, seed):
    """Weights that keep the scale of what passes; norms, biases and tables away from ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith(("weight", "gamma")):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.ndim == 1 or name.endswith("scale_shift_table"):
            parameter.copy_(0.3 * noise)
        elif "embed" in name or name.startswith("shared"):
            parameter.copy_(noise if parameter.ndim < 3 and "embedder" not in name else 0.3 * noise)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return network.requires_grad_(False).eval()


def picture(seed=0, width=61, height=42):
    """Smooth colours: something for the vision tower to tell apart."""
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


class ReferenceTokenizer:
    """Our tokenizer in the reference's place: that of transformers 5 changes what tokenizer.json says."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, add_special_tokens, return_attention_mask, **how):
        assert add_special_tokens and return_attention_mask
        return self.tokenizer(texts, **how)


@pytest.fixture(scope="module")
def networks():
    """The reference's, by part."""
    transformer = ReferenceTransformer(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        image_dim=20,
        added_kv_proj_dim=24,
    )
    text = UMT5Config(vocab_size=380, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    vision = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=30,
        num_hidden_layers=3,
        num_attention_heads=2,
        patch_size=14,
        image_size=42,
        hidden_act="gelu",
    )
    vae = ReferenceVAE(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    made = {
        "transformer": transformer,
        "text_encoder": ReferenceText(text),
        "image_encoder": ReferenceVision(vision),
        "vae": vae,
    }
    return {part: filled(network, seed) for seed, (part, network) in enumerate(made.items())}


@pytest.fixture(scope="module")
def folder(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_chronoedit_checkpoint(folder)  # of which only the tokenizer stays
    for part, network in networks.items():
        for file in (folder / part).iterdir():
            file.unlink()
        network.save_pretrained(folder / part)
    CLIPImageProcessorPil(size={"shortest_edge": 42}, crop_size=42).save_pretrained(
        folder / "image_processor"
    )
    return folder


@pytest.fixture
def reference(networks, folder):
    pipe = ReferencePipeline(
        **networks,
        tokenizer=None,
        image_processor=CLIPImageProcessorPil.from_pretrained(folder / "image_processor"),
        scheduler=ReferenceUniPC(**UNIPC),
    )
    pipe.tokenizer = ReferenceTokenizer(T5TokenizerFast.from_pretrained(folder, subfolder="tokenizer"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def ours(folder):
    kinds = {
        "tokenizer": T5TokenizerFast,
        "text_encoder": UMT5EncoderModel,
        "image_encoder": CLIPVisionModel,
        "image_processor": CLIPImageProcessor,
        "transformer": ChronoEditTransformer3DModel,
        "vae": AutoencoderKLWan,
    }
    parts = {part: kind.from_pretrained(folder, subfolder=part) for part, kind in kinds.items()}
    pipe = ChronoEditPipeline(**parts, scheduler=UniPCMultistepScheduler(**UNIPC))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def use_euler(reference, ours):
    reference.scheduler = ReferenceEuler(shift=5.0)
    reference.scheduler.model_outputs, reference.scheduler.last_sample = [], None  # or pruning fails
    ours.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)


def run(pipe, image=None, **call):
    """The films, and the latents after each step."""
    steps = []

    def collect(pipe, i, t, tensors):
        steps.append(tensors["latents"].clone())
        return {}

    call = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, **call}
    if "generator" not in call:
        call["generator"] = torch.Generator().manual_seed(7)
    image = picture() if image is None else image
    return pipe(image, callback_on_step_end=collect, **call).frames, steps


def distance(a, b):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).abs().max())


def assert_same(ours, theirs):
    for found, wanted in zip(ours[1], theirs[1], strict=True):
        assert distance(found, wanted) <= TOLERANCE * float(wanted.abs().max())
    assert distance(ours[0], theirs[0]) <= FRAMES
    assert float(np.std(theirs[0])) > 0.1 and float(np.ptp(theirs[0][:, -1])) > 0.5, "an empty picture"


def reasoning(k, frames=29):
    return {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": k, "num_frames": frames}


CALLS = {
    "edit": dict(prompt=PROMPT),
    "own negative": dict(prompt=PROMPT, negative_prompt="a photo", guidance_scale=2.5),
    "no guidance": dict(prompt=OTHER, guidance_scale=1.0),
    "two prompts": dict(prompt=[PROMPT, OTHER], negative_prompt=["", "a pear"], num_inference_steps=2),
    "reasoning to the end": dict(prompt=PROMPT, **reasoning(3)),
    "pruned at once": dict(prompt=PROMPT, guidance_scale=1.0, **reasoning(0)),
    "pruned after the first": dict(prompt=PROMPT, num_inference_steps=4, **reasoning(1)),
    "pruned in the middle": dict(prompt=PROMPT, num_inference_steps=4, guidance_scale=3.0, **reasoning(2)),
    "pruned before the last": dict(prompt=OTHER, num_inference_steps=4, **reasoning(3)),
    "pruned from thirteen": dict(prompt=PROMPT, num_inference_steps=5, **reasoning(3, 13)),
    "nine frames": dict(prompt=OTHER, guidance_scale=1.0, **reasoning(3, 9)),
    "one frame to five": dict(prompt=PROMPT, guidance_scale=1.0, **reasoning(1, 1)),
    "one frame": dict(prompt=PROMPT, guidance_scale=1.0, **reasoning(3, 1)),
    "a cut prompt": dict(prompt="a cat " * 300, guidance_scale=1.0, num_inference_steps=1),
}


# Of where the frames between go, the ends are slow.
OTHER_ENDS = ("pruned at once", "pruned after the first", "pruned before the last")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in OTHER_ENDS else n for n in CALLS]
)
def test_runs_equal_the_reference(ours, reference, name):
    assert_same(run(ours, **CALLS[name]), run(reference, **CALLS[name]))


@pytest.mark.parametrize("frames", [0, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 8))])
def test_frame_counts_are_rounded_as_in_the_reference(ours, reference, frames, caplog):
    call = {"prompt": OTHER, "guidance_scale": 1.0, "num_inference_steps": 1, "output_type": "latent"}
    wanted = run(reference, **call, **reasoning(1, frames))[0]
    if frames == 0:
        with pytest.raises(ValueError, match="num_frames=0"):
            run(ours, **call, **reasoning(1, frames))
        return
    with caplog.at_level(logging.WARNING, "joyedit"):
        assert distance(run(ours, **call, **reasoning(1, frames))[0], wanted) <= TOLERANCE
    assert f"num_frames={frames} is not 1 + 4k, and became {4 * wanted.shape[2] - 3}" in caplog.text


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(dict(prompt=PROMPT), marks=pytest.mark.slow),
        dict(prompt=PROMPT, guidance_scale=1.0, **reasoning(2, 13)),
    ],
    ids=["edit", "pruned"],
)
def test_flow_match_euler(ours, reference, call):
    use_euler(reference, ours)
    assert_same(run(ours, **call), run(reference, **call))


def test_several_films_of_a_prompt(ours, reference):
    wanted = run(reference, prompt=[PROMPT, PROMPT, OTHER, OTHER], negative_prompt=["a", "a", "", ""])
    found = run(ours, prompt=[PROMPT, OTHER], negative_prompt=["a", ""], num_videos_per_prompt=2)
    assert_same(found, wanted)


def test_several_photographs_each_with_its_own_generator(ours, reference):
    photos = [picture(1), picture(2, 40, 50)]
    alone = [
        run(reference, photo, prompt=text, generator=torch.Generator().manual_seed(seed), **reasoning(1, 13))
        for photo, text, seed in zip(photos, (PROMPT, OTHER), (3, 4), strict=True)
    ]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    found = run(ours, photos, prompt=[PROMPT, OTHER], generator=generators, **reasoning(1, 13))
    for i, wanted in enumerate(alone):
        assert_same((found[0][i : i + 1], [step[i : i + 1] for step in found[1]]), wanted)


def test_embeddings_and_latents_in_place_of_their_sources(ours, reference, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    given = {
        "prompt_embeds": torch.randn(2, 512, 32, generator=generator),
        "negative_prompt_embeds": torch.randn(2, 512, 32, generator=generator),
        "latents": torch.randn(2, 16, 2, 4, 6, generator=generator),
    }
    assert_same(run(ours, **given), run(reference, **given))
    seen = torch.randn(1, 10, 20, generator=generator)
    monkeypatch.setattr(reference, "encode_image", lambda image, device: seen)
    assert_same(run(ours, image_embeds=seen, **given), run(reference, **given))


def test_shorter_prompts_where_the_reference_counts_on_512(ours, reference, monkeypatch):
    code = WanAttnProcessor.__call__.__code__
    constants = tuple(9 if constant == 512 else constant for constant in code.co_consts)
    assert constants != code.co_consts
    monkeypatch.setattr(WanAttnProcessor.__call__, "__code__", code.replace(co_consts=constants))
    call = {"prompt": PROMPT, "negative_prompt": "a cat", "max_sequence_length": 9}
    assert_same(run(ours, **call), run(reference, **call))


def test_prompts_are_embedded_as_in_the_reference(ours, reference):
    call = {"prompt": [PROMPT, OTHER], "num_videos_per_prompt": 2}
    for found, wanted in zip(ours.encode_prompt(**call), reference.encode_prompt(**call), strict=True):
        assert found.shape == (4, 226, 32) and distance(found, wanted) <= 1e-5 * float(wanted.abs().max())
    photo = picture()
    assert distance(ours.encode_image(photo), reference.encode_image(photo)) <= 1e-5


@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["unfused", "fused"]
)
def test_adapters(ours, reference, networks, fused, tmp_path):
    """peft factors, in the transformer that all tests share; so they are taken out again."""
    state = {}
    for number, (name, module) in enumerate(networks["transformer"].named_modules()):
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks"):
            generator = torch.Generator().manual_seed(number)
            down = torch.randn(3, module.in_features, generator=generator) / module.in_features**0.5
            up = 0.3 * torch.randn(module.out_features, 3, generator=generator)
            state |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(state, tmp_path / "style.safetensors")
    call = {"prompt": PROMPT, **reasoning(1, 13), "num_inference_steps": 2}
    plain = run(ours, **call)
    for pipe in (reference, ours):
        pipe.load_lora_weights(str(tmp_path / "style.safetensors"))
    try:
        if fused:
            for pipe in (reference, ours):
                pipe.fuse_lora(lora_scale=0.7)
        else:
            call["attention_kwargs"] = {"scale": 0.7}
        wanted, found = run(reference, **call), run(ours, **call)
    finally:
        if fused:
            reference.unfuse_lora()
        reference.unload_lora_weights()
    assert_same(found, wanted)
    assert distance(found[0], plain[0]) > 0.01


def test_quirk_of_tensor_images(ours, reference, folder):
    """A photograph as a tensor is all but black to CLIP, and is resized without a filter."""
    photo = torch.rand(1, 3, 42, 61, generator=torch.Generator().manual_seed(0))
    wanted = run(reference, photo, prompt=PROMPT)
    as_in_reference = ChronoEditPipeline(**ours.components, reference_quirks=TENSOR_IMAGES)
    as_in_reference.set_progress_bar_config(disable=True)
    assert_same(run(as_in_reference, photo, prompt=PROMPT), wanted)
    assert_same(run(as_in_reference, prompt=PROMPT), run(reference, prompt=PROMPT))
    assert distance(run(ours, photo, prompt=PROMPT)[0], wanted[0]) > 0.01
