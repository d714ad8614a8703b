"""Whole JoyAI-Image-Edit runs against diffusers: recorded ones, and live ones on the same tiny random
weights."""

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan as ReferenceVAE
from diffusers import FlowMatchEulerDiscreteScheduler as ReferenceScheduler
from diffusers import JoyImageEditPipeline as ReferencePipeline
from diffusers import JoyImageEditTransformer3DModel as ReferenceTransformer
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer as ReferenceTokenizer
from transformers import Qwen3VLForConditionalGeneration as ReferenceEncoder
from transformers.image_transforms import convert_to_rgb

from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.pipelines.joyimage import (
    GLOBAL_POSTERIOR,
    MISPAIRED_REFERENCES,
    PADDED_PROMPTS,
    JoyImageEditPipeline,
)

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
BUCKETS = [(64, 96), (96, 64), (64, 64)]
TOLERANCE = 1e-4  # of whole runs, absolute; images are in [0, 1], latents of the order of 1


def distance(a, b):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.double() - b.double()).abs().max())


def picture(width, height, seed):
    """Smooth colour ramps with a rectangle: something for the vision tower to tell apart."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    ramps = np.stack([np.sin(x * a + y * b) for a, b in generator.uniform(1, 9, (3, 2))], axis=-1)
    pixels = np.uint8(127 + 120 * ramps)
    pixels[height // 4 : height // 2, width // 3 : width // 2] = generator.integers(0, 255, 3)
    return Image.fromarray(pixels)


def transparent(image, mode):
    """The picture with an opaque left side, a ramp, and a right side of which nothing is seen."""
    ramp = np.linspace(400, -150, image.width).clip(0, 255)
    image = image.convert(mode)
    image.putalpha(Image.fromarray(np.uint8(np.broadcast_to(ramp, (image.height, image.width)))))
    return image


class ReferenceProcessor:
    """Our processor in the reference's place: the reference's needs torchvision, and ours equals its
    recordings. What is transparent is put on white by the reference's own function."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, text, images, padding, return_tensors):
        images = [Image.fromarray(convert_to_rgb(image, return_numpy=True)) for image in images]
        inputs = self.processor(text=text, images=images, padding=padding, return_tensors=return_tensors)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.processor.image_token_id).long()
        return inputs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, seed=3, dtype=torch.float32)
    return folder


@pytest.fixture
def ours(checkpoint):
    pipe = JoyImageEditPipeline.from_pretrained(checkpoint)
    pipe.buckets = BUCKETS
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def reference(checkpoint):
    processor = JoyImageEditPipeline.from_pretrained(checkpoint).processor
    pipe = ReferencePipeline(
        scheduler=ReferenceScheduler.from_pretrained(checkpoint, subfolder="scheduler"),
        vae=ReferenceVAE.from_pretrained(checkpoint, subfolder="vae"),
        text_encoder=ReferenceEncoder.from_pretrained(
            checkpoint / "text_encoder", dtype=torch.float32
        ).eval(),
        tokenizer=ReferenceTokenizer.from_pretrained(checkpoint / "tokenizer"),
        transformer=ReferenceTransformer.from_pretrained(checkpoint, subfolder="transformer"),
        processor=None,
    )
    pipe.processor = ReferenceProcessor(processor)
    # The byte vocabulary has a longer system turn than the 34 tokens that the reference drops.
    dropped = JoyImageEditPipeline.from_pretrained(checkpoint).num_dropped_tokens
    pipe.prompt_template_encode_start_idx = {"image": dropped, "multiple_images": dropped}
    pipe.set_progress_bar_config(disable=True)
    return pipe


def nearest(height, width, basesize=None):
    return min(BUCKETS, key=lambda hw: abs(hw[0] / hw[1] - height / width))


def run_reference(pipe, **call):
    """The image, and the target latents after each step."""
    steps = []

    def collect(pipe, i, t, tensors):
        steps.append(tensors["latents"][:, -1:].clone())
        return {}

    with patch("diffusers.pipelines.joyimage.image_processor.find_best_bucket", side_effect=nearest):
        image = pipe(output_type="np", callback_on_step_end=collect, **call).images
    return image, torch.stack(steps)


def run_ours(pipe, told=None, **call):
    """As `run_reference`; `told` gets the timesteps."""
    steps, told = [], [] if told is None else told

    def collect(pipe, i, t, tensors):
        steps.append(tensors["latents"].clone())
        told.append(t)

    image = pipe(output_type="np", callback_on_step_end=collect, **call).images
    return image, torch.stack(steps)


def assert_same_run(ours, reference):
    assert distance(ours[1], reference[1]) <= TOLERANCE
    assert distance(ours[0], reference[0]) <= TOLERANCE
    assert float(np.std(reference[0])) > 0.02  # an empty picture would prove nothing


CALLS = {
    "edit": dict(
        image=picture(150, 100, 0), prompt="Make the coffee red.", num_inference_steps=4, guidance_scale=4.0
    ),
    "tall, own negative": dict(
        image=picture(90, 140, 1),
        prompt="你好 add snow",
        negative_prompt="blurry, low quality",
        num_inference_steps=3,
        guidance_scale=2.5,
    ),
    "transparent": dict(
        image=transparent(picture(150, 100, 7), "RGBA"), prompt="a", num_inference_steps=2, guidance_scale=3.0
    ),
    "transparent grey": dict(
        image=transparent(picture(80, 100, 8), "LA"), prompt="a", num_inference_steps=2, guidance_scale=3.0
    ),
    "no guidance": dict(image=picture(64, 64, 2), prompt="a", num_inference_steps=2, guidance_scale=1.0),
    "text to image": dict(prompt="a cat on a bench", height=96, width=64, num_inference_steps=3),
    "own sigmas": dict(image=picture(96, 64, 5), prompt="x", sigmas=[1.0, 0.7, 0.2], guidance_scale=3.0),
    "raw latents": dict(
        image=picture(96, 64, 5), prompt="x", num_inference_steps=2, enable_denormalization=False
    ),
    "short": dict(
        image=picture(96, 64, 5), prompt="Make it night", num_inference_steps=2, max_sequence_length=16
    ),
    "short text": dict(prompt="a cat on a bench", num_inference_steps=2, max_sequence_length=5),
}


@pytest.mark.parametrize("name", CALLS)
def test_single_runs_equal_the_reference(ours, reference, name):
    # One stream for noise and posterior, as our pipeline draws them: the global generator serves both there.
    expected = run_reference(reference, generator=torch.manual_seed(11), **CALLS[name])
    assert_same_run(run_ours(ours, generator=torch.manual_seed(11), **CALLS[name]), expected)


def test_runs_from_prompt_embeds_equal_the_reference(ours, reference):
    generator = torch.Generator().manual_seed(5)
    embeds, negative = torch.randn(2, 9, 32, generator=generator), torch.randn(2, 6, 32, generator=generator)
    call = dict(
        image=[picture(100, 66, 0), picture(66, 100, 1)],
        prompt_embeds=embeds,
        prompt_embeds_mask=torch.ones(2, 9, dtype=torch.long),
        negative_prompt_embeds=negative,
        negative_prompt_embeds_mask=torch.ones(2, 6, dtype=torch.long),
        num_inference_steps=3,
    )
    expected = run_reference(reference, generator=torch.manual_seed(1), **call)
    assert_same_run(run_ours(ours, generator=torch.manual_seed(1), **call), expected)


BATCH = dict(
    image=[picture(120, 80, 3), picture(100, 70, 4)],
    prompt=["a dog", "Make the coffee red, add snow to the photo and remove the background."],
    num_inference_steps=2,
    guidance_scale=3.0,
)


@pytest.mark.parametrize("per_prompt", [1, 2])
def test_quirks_reproduce_the_reference_on_batches(ours, reference, per_prompt):
    """Padding attended to, references in the wrong order, and the posterior from the global generator."""
    call = dict(BATCH, num_images_per_prompt=per_prompt)
    torch.manual_seed(8)
    expected = run_reference(reference, generator=torch.Generator().manual_seed(2), **call)
    ours.quirks = ours.quirk_names
    torch.manual_seed(8)
    quirky = run_ours(ours, generator=torch.Generator().manual_seed(2), **call)
    assert_same_run(quirky, expected)
    # Each quirk matters here: without it the run is another one.
    for quirk in [GLOBAL_POSTERIOR, PADDED_PROMPTS] + [MISPAIRED_REFERENCES] * (per_prompt > 1):
        ours.quirks = ours.quirk_names - {quirk}
        torch.manual_seed(8)
        other = run_ours(ours, generator=torch.Generator().manual_seed(2), **call)
        assert distance(other[1], expected[1]) > 10 * TOLERANCE, quirk


def test_text_to_image_batch_with_quirks(ours, reference):
    call = dict(prompt=["a cat", "a person wearing a red hat, with a dog"], num_inference_steps=2)
    expected = run_reference(reference, generator=torch.manual_seed(3), **call)
    ours.quirks = ours.quirk_names
    assert_same_run(run_ours(ours, generator=torch.manual_seed(3), **call), expected)


def test_each_sample_of_a_batch_is_the_reference_alone(ours, reference):
    """Unequal prompts, two images each, one generator per image: every result is that of a single reference
    run."""
    seeds = [21, 22, 23, 24]
    batch = run_ours(
        ours,
        generator=[torch.Generator().manual_seed(s) for s in seeds],
        **dict(BATCH, num_images_per_prompt=2),
    )
    for row, seed in enumerate(seeds):
        alone = dict(BATCH, image=BATCH["image"][row // 2], prompt=BATCH["prompt"][row // 2])
        image, steps = run_reference(reference, generator=torch.manual_seed(seed), **alone)
        assert distance(batch[0][row : row + 1], image) <= TOLERANCE
        assert distance(batch[1][:, row : row + 1], steps) <= TOLERANCE


def test_prompt_embeddings_equal_the_reference(ours, reference):
    pictures = [picture(96, 64, 0), picture(96, 64, 1)]
    prompts = ["a dog", "Make the coffee red and more"]
    theirs, mask = reference.encode_prompt_multiple_images(prompts, images=pictures, num_images_per_prompt=2)
    embeds, our_mask = ours.encode_prompt_multiple_images(prompts, images=pictures, num_images_per_prompt=2)
    # Embeddings come as [p0, p0, p1, p1], but the reference repeats its masks as [p0, p1, p0, p1].
    assert torch.equal(mask[[0, 2, 1, 3]], our_mask)
    mask = our_mask
    scale = float(theirs.detach().abs().max())
    assert distance(embeds[mask.bool()], theirs[mask.bool()]) <= 1e-5 * scale
    theirs, mask = reference.encode_prompt(prompts, max_sequence_length=20)
    embeds, our_mask = ours.encode_prompt(prompts, max_sequence_length=20)
    assert torch.equal(mask, our_mask)
    assert distance(embeds, theirs) <= 1e-5 * float(
        theirs.abs().max()
    )  # here the padding is zeros on both sides


def test_saved_checkpoint_opens_in_the_reference(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "JoyImageEditTransformer3DModel"]
    assert index["text_encoder"] == ["transformers", "Qwen3VLForConditionalGeneration"]
    assert index["buckets"] == [list(size) for size in BUCKETS]
    theirs = ReferencePipeline.from_pretrained(tmp_path, processor=None, torch_dtype=torch.float32)
    for name, network in ours.networks.items():
        expected = getattr(theirs, name).state_dict()
        found = network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    assert theirs.tokenizer("a dog <|im_end|>").input_ids == ours.tokenizer("a dog <|im_end|>").input_ids


RECORDED = [
    "edit",
    "edit_negative",
    "edit_no_guidance",
    "edit_batch",
    "edit_single_0",
    "edit_single_1",
    "edit_two_images",
    "text",
    "text_batch",
]


def recorded_pipe(goldens, **options):
    pipe = JoyImageEditPipeline.from_pretrained(goldens.checkpoint, **{"dtype": "float32", **options})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_recorded_image(image, expected):
    """Most recorded images are stored as uint8."""
    if expected.dtype == torch.uint8:
        assert distance(image, expected / 255) <= 0.5 / 255 + TOLERANCE
    else:
        assert distance(image, expected) <= TOLERANCE


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs(goldens, name):
    pipe = recorded_pipe(
        goldens, reference_quirks=[PADDED_PROMPTS] if name in ("edit_batch", "text_batch") else False
    )
    case = goldens.cases[name]
    generator = torch.manual_seed(case["seed"])
    told = []
    call = dict(image=goldens.photos(name), generator=generator, told=told, **case["call"])
    image, steps = run_ours(pipe, **call)
    torch.testing.assert_close(torch.stack(told), goldens.runs[f"{name}.timesteps"], rtol=0, atol=0)
    assert distance(steps, goldens.runs[f"{name}.latents"]) <= TOLERANCE
    assert_recorded_image(image, goldens.runs[f"{name}.image"])


def test_recorded_singles_are_the_rows_of_a_batch(goldens):
    """The same prompts and photographs in one batch, a generator each: no padding, each as it was alone."""
    pipe = recorded_pipe(goldens)
    batch = goldens.cases["edit_batch"]
    seeds = [goldens.cases[f"edit_single_{row}"]["seed"] for row in (0, 1)]
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    image, steps = run_ours(pipe, image=goldens.photos("edit_batch"), generator=generator, **batch["call"])
    for row in (0, 1):
        assert distance(steps[:, row : row + 1], goldens.runs[f"edit_single_{row}.latents"]) <= TOLERANCE
        assert_recorded_image(image[row : row + 1], goldens.runs[f"edit_single_{row}.image"])


def test_recorded_prompts_and_pixels(goldens):
    pipe = recorded_pipe(goldens)
    for name in ("image", "resized"):
        about = goldens.described[name]
        photo = Image.open(GOLDENS / "photos" / about["photo"]).convert("RGB").crop(about["box"])
        inputs = pipe.processor.image_processor([photo])
        levels = goldens.encoders[f"{name}.levels"]
        assert torch.equal(inputs["pixel_values"], (levels.float() - 127.5) / 127.5)
        assert torch.equal(inputs["image_grid_thw"], goldens.encoders[f"{name}.image_grid_thw"])
    pixels = (goldens.encoders["image.levels"].float() - 127.5) / 127.5
    seen = pipe.text_encoder.encode_images(pixels, goldens.encoders["image.image_grid_thw"])
    for found, key in (
        (seen.embeds, "image.vision_merged"),
        (seen.deepstack[0], "image.vision_deepstack_0"),
        (seen.deepstack[1], "image.vision_deepstack_1"),
        (pipe.text_encoder.hidden_states(goldens.encoders["image.input_ids"], images=seen), "image.states"),
        (pipe.text_encoder.hidden_states(goldens.encoders["plain.input_ids"]), "plain.states"),
    ):
        expected = goldens.encoders[key]
        assert distance(found, expected) <= 1e-5 * float(expected.abs().max()), key


def test_bf16_is_no_further_from_fp32_than_twice_the_reference(goldens):
    case = goldens.cases["edit_bf16"]
    pipe = recorded_pipe(goldens, dtype="bf16")
    generator = torch.manual_seed(case["seed"])
    _, steps = run_ours(pipe, image=goldens.photos("edit_bf16"), generator=generator, **case["call"])
    exact = goldens.runs["edit_single_1.latents"]

    def error(latents):
        return float((latents.float() - exact).abs().mean())

    assert error(steps) <= 2 * error(goldens.runs["edit_bf16.latents"])


RECORDED_AT_LENGTH = ["edit", "edit_tall_negative", "edit_no_cfg", "edit_batch2", "t2i", "t2i_batch2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED_AT_LENGTH)
def test_larger_recorded_runs(shared_data, name):
    folder = shared_data / "goldens"
    pipe = JoyImageEditPipeline.from_pretrained(folder / "tiny-joyimage-edit", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    info = json.loads((folder / "joyimage" / f"{name}.json").read_text())
    golden = load_file(folder / "joyimage" / f"{name}.safetensors")
    pipe.buckets = info["buckets"]
    if "batch" in name:
        pipe.quirks = frozenset({PADDED_PROMPTS})

    def photo(file):
        return Image.open(shared_data / "photos" / file).convert("RGB")

    photos = {
        "edit": photo("coffee.png"),
        "edit_tall_negative": photo("astronaut.png").crop((40, 0, 372, 460)),
        "edit_no_cfg": photo("chelsea.png"),
        "edit_batch2": [photo("chelsea.png"), photo("coffee.png")],
    }
    generator = torch.manual_seed(info["seed"])
    image, steps = run_ours(pipe, image=photos.get(name), generator=generator, **info["call"])
    assert distance(steps, golden["latents_per_step"][:, :, -1:]) <= TOLERANCE
    assert distance(image, golden["image"]) <= TOLERANCE
