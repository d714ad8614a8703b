"""JoyAI-Image-Edit-Plus against diffusers: its network, whole runs on the same tiny random weights, and
recorded ones."""

import json
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan as ReferenceVAE
from diffusers import FlowMatchEulerDiscreteScheduler as ReferenceScheduler
from diffusers import JoyImageEditPlusPipeline as ReferencePipeline
from diffusers import JoyImageEditPlusTransformer3DModel as ReferenceTransformer
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2Tokenizer as ReferenceTokenizer
from transformers import Qwen3VLForConditionalGeneration as ReferenceEncoder

from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit import JoyImageEditPlusPipeline, JoyImageEditTransformer3DModel
from tests.parity.same_weights import difference
from tests.parity.test_joyimage_mmdit import TINY, ours_from, randomize, reference_model
from tests.parity.test_joyimage_pipeline import (
    BUCKETS,
    TOLERANCE,
    ReferenceProcessor,
    assert_same_run,
    distance,
    nearest,
    picture,
    run_ours,
)


def patches(latents):
    """(C, T, h, w) -> (T * h / 2 * w / 2, C, 1, 2, 2), as the reference takes them."""
    return rearrange(latents, "c t (h p) (w q) -> (t h w) c 1 p q", p=2, q=2)


def from_patches(tokens, grid):
    """(..., N, C, 1, 2, 2), the first of which fill the grid -> (..., C, 1, h, w)."""
    _, rows, columns = grid
    own = tokens[..., : rows * columns, :, :, :, :]
    return rearrange(own, "... (h w) c 1 p q -> ... c 1 (h p) (w q)", h=rows, w=columns)


def run_network(model, sample, timestep, prompt):
    """The target's velocity (C, 1, h, w). sample: latents (C, 1, h, w), the target first; prompt (L, D)."""
    grids = [model.token_grid(item[None]) for item in sample]
    target, *others = (model.embed_image(item[None]) for item in sample)
    references = torch.cat(others, dim=1) if others else None
    vec, rope = model.embed_time(timestep), model.rope(grids)
    return model.predict_target(target, references, model.embed_text(prompt[None]), vec, rope, grids)[0]


def random_sample(generator, *grids):
    return [torch.randn(16, 1, 2 * rows, 2 * columns, generator=generator) for rows, columns in grids]


def test_references_of_other_sizes_equal_the_masked_reference(tmp_path):
    """Two samples that the reference pads, pictures and prompts, and masks; here each runs as it is."""
    theirs = randomize(ReferenceTransformer.from_config(dict(TINY)))
    ours = ours_from(theirs, tmp_path)
    generator = torch.Generator().manual_seed(1)
    samples = [
        random_sample(generator, (3, 4), (4, 2), (2, 5)),
        random_sample(generator, (3, 4), (5, 1)),
        random_sample(generator, (3, 4)),
    ]
    lengths, timestep = (7, 4, 6), torch.tensor([1000.0, 300.25, 12.5])
    prompts = torch.randn(3, 7, 20, generator=generator)
    rows = [torch.cat([patches(item) for item in sample]) for sample in samples]
    with torch.no_grad():
        (wanted,) = theirs(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            timestep=timestep,
            encoder_hidden_states=prompts,
            encoder_hidden_states_mask=torch.tensor([[i < n for i in range(7)] for n in lengths]).long(),
            shape_list=[[(1, s.shape[-2] // 2, s.shape[-1] // 2) for s in sample] for sample in samples],
            return_dict=False,
        )
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        found = run_network(ours, sample, timestep[row : row + 1], prompts[row, :length])
        assert difference(found, from_patches(wanted[row], (1, 3, 4))) < 1e-5


def test_one_reference_of_the_same_size_is_edit(tmp_path):
    """The network of Plus is that of Edit: the same weights, result, and table of positions."""
    ours = ours_from(reference_model(TINY), tmp_path)
    latents = torch.randn(1, 2, 16, 1, 6, 10, generator=torch.Generator().manual_seed(2))
    timestep, prompt = torch.tensor([640.0]), torch.randn(1, 5, 20)
    wanted = ours(latents, timestep, prompt).sample[0, -1]
    assert torch.equal(run_network(ours, [latents[0, 1], latents[0, 0]], timestep, prompt[0]), wanted)
    one, several = ours.rope((3, 3, 5)), ours.rope([(1, 3, 5), (2, 3, 5)])
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    theirs = reference_model(TINY)(latents, timestep, prompt, return_dict=False)[0][0, -1]
    assert difference(wanted, theirs) < 1e-5


def test_tokens_that_do_not_fill_their_grids(tmp_path):
    ours = ours_from(reference_model(TINY), tmp_path)
    target, other = random_sample(torch.Generator(), (3, 4), (2, 5))
    with pytest.raises(
        ValueError, match=r"22 image tokens do not fill the grid \[\(1, 3, 4\), \(1, 2, 4\)\]"
    ):
        ours.predict_target(
            ours.embed_image(target[None]),
            ours.embed_image(other[None]),
            ours.embed_text(torch.zeros(1, 3, 20)),
            ours.embed_time(torch.zeros(1)),
            ours.rope([(1, 3, 4), (1, 2, 5)]),
            [(1, 3, 4), (1, 2, 4)],
        )


@pytest.mark.parametrize("case", ["one", "ragged", "target_only"])
def test_recorded_outputs_of_the_network(shared_data, case):
    folder = shared_data / "goldens"
    recorded = load_file(folder / "joyimage_plus/transformer.safetensors")
    about = json.loads((folder / "joyimage_plus/transformer.json").read_text())["cases"][case]
    ours = JoyImageEditTransformer3DModel.from_pretrained(
        folder / "tiny-joyimage-edit-plus", subfolder="transformer", dtype=torch.float32
    )
    for row, grids in enumerate(about["shape_list"]):
        kept, sample = recorded[f"{case}.hidden_states"][row], []
        for grid in grids:
            sample.append(from_patches(kept, grid))
            kept = kept[grid[1] * grid[2] :]
        prompt = recorded[f"{case}.encoder_hidden_states"][row]
        prompt = prompt[: sum(about["mask"][row])] if about["mask"] != "none" else prompt
        found = run_network(ours, sample, recorded[f"{case}.timestep"][row : row + 1], prompt)
        wanted = from_patches(recorded[f"{case}.output"][row], grids[0])
        assert difference(found, wanted) < 3e-5  # see tests/parity/test_joyimage_mmdit.py


class PlusProcessor(ReferenceProcessor):
    def __call__(self, text, images, padding, return_tensors):
        if images is not None:
            return super().__call__(text, images, padding, return_tensors)
        inputs = self.processor(text=text, padding=padding, return_tensors=return_tensors)
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        return inputs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, seed=5, dtype=torch.float32, plus=True)
    return folder


@pytest.fixture
def ours(checkpoint):
    pipe = JoyImageEditPlusPipeline.from_pretrained(checkpoint)
    pipe.buckets = BUCKETS
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def reference(checkpoint):
    return open_reference(checkpoint, torch.float32)


def open_reference(checkpoint, dtype):
    pipe = ReferencePipeline(
        scheduler=ReferenceScheduler.from_pretrained(checkpoint, subfolder="scheduler"),
        vae=ReferenceVAE.from_pretrained(checkpoint, subfolder="vae", dtype=dtype),
        text_encoder=ReferenceEncoder.from_pretrained(checkpoint / "text_encoder", dtype=dtype).eval(),
        tokenizer=ReferenceTokenizer.from_pretrained(checkpoint / "tokenizer"),
        transformer=ReferenceTransformer.from_pretrained(checkpoint, subfolder="transformer", dtype=dtype),
        processor=None,
    )
    own = JoyImageEditPlusPipeline.from_pretrained(checkpoint)
    pipe.processor = PlusProcessor(own.processor)
    # The byte vocabulary has a longer system turn than the 34 tokens that the reference drops.
    pipe.prompt_template_encode_start_idx = {"multiple_images": own.num_dropped_tokens}
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_reference(pipe, **call):
    """The image, and the target latents after each step."""
    steps = []

    def collect(pipe, i, t, tensors):
        steps.append(tensors["latents"].clone())
        return {}

    with patch("diffusers.pipelines.joyimage.image_processor.find_best_bucket", side_effect=nearest):
        image = pipe(output_type="np", callback_on_step_end=collect, **call).images
    grid = (1, image.shape[1] // 16, image.shape[2] // 16)
    return image, torch.stack([from_patches(step, grid)[:, None] for step in steps])


WIDE, TALL, SQUARE = picture(150, 100, 0), picture(90, 140, 1), picture(80, 80, 2)
CALLS = {
    "two references of two sizes": dict(
        images=[WIDE, TALL], prompt="Put the cat on the sofa.", num_inference_steps=4, guidance_scale=4.0
    ),
    "one, explicit size, own negative": dict(
        images=[TALL],
        prompt="你好 add snow",
        negative_prompt="blurry, low quality",
        height=80,
        width=112,
        num_inference_steps=3,
        guidance_scale=2.5,
    ),
    "empty negative": dict(
        images=[SQUARE, WIDE], prompt="a", negative_prompt="", num_inference_steps=2, guidance_scale=3.0
    ),
    "three, no guidance": dict(
        images=[WIDE, SQUARE, WIDE], prompt="a", num_inference_steps=2, guidance_scale=1.0
    ),
    "text to image": dict(prompt="a cat on a bench", height=96, width=48, num_inference_steps=3),
    "own sigmas": dict(images=[WIDE, TALL], prompt="x", sigmas=[1.0, 0.7, 0.2], guidance_scale=3.0),
    "short": dict(images=[WIDE, TALL], prompt="Make it night", num_inference_steps=2, max_sequence_length=50),
    "batch of ragged references": dict(
        images=[[WIDE, TALL], [SQUARE], [TALL, WIDE]],
        prompt=["Combine the two", "add snow to the photo and remove the background", "xy"],
        height=64,
        width=80,
        num_inference_steps=3,
        guidance_scale=3.0,
    ),
    "batch of text": dict(
        prompt=["a cat", "a person wearing a red hat"], height=64, width=64, num_inference_steps=2
    ),
}
SLOW = dict.fromkeys(("empty negative", "own sigmas", "batch of text"), pytest.mark.slow)


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in CALLS])
def test_runs_equal_the_reference(ours, reference, name):
    """One generator for a batch: every sample draws from it in turn."""
    call = CALLS[name]
    expected = run_reference(reference, generator=torch.Generator().manual_seed(7), **call)
    assert_same_run(run_ours(ours, generator=torch.Generator().manual_seed(7), **call), expected)


@pytest.mark.slow
def test_generators_and_latents_of_a_batch_equal_the_reference(ours, reference):
    call = dict(CALLS["batch of ragged references"], num_inference_steps=2)
    seeds = (3, 4, 5)
    expected = run_reference(reference, generator=[torch.Generator().manual_seed(s) for s in seeds], **call)
    found = run_ours(ours, generator=[torch.Generator().manual_seed(s) for s in seeds], **call)
    assert_same_run(found, expected)
    latents = torch.randn(3, 16, 1, 8, 10, generator=torch.Generator().manual_seed(1))
    assert_same_run(
        run_ours(ours, latents=latents, **call), run_reference(reference, latents=latents, **call)
    )


def test_prompt_embeddings_equal_the_reference(ours, reference):
    """Of turns as the pipelines write them, pictures in the middle of a text, and the last tokens of all."""
    turns = [
        "<|im_start|>user\n<image>\n<image>\nCombine both.<|im_end|>\n",
        "<|im_start|>user\nTake <image>\nand make the coffee red, and more<|im_end|>\n",
    ]
    pictures = [picture(96, 64, 0), picture(64, 96, 1), picture(96, 64, 2)]
    for length in (None, 50):
        call = dict(images=pictures, max_sequence_length=length)
        with torch.no_grad():
            theirs, mask = reference.encode_prompt_multiple_images(turns, **call)
        embeds, own = ours.encode_prompt_multiple_images(turns, **call)
        if length is None:  # the reference cuts a batch where its longest prompt is cut
            assert torch.equal(mask, own)
            longest = int(mask.sum(1).argmax())
            assert distance(embeds[own.bool()], theirs[mask.bool()]) <= 1e-5 * float(theirs.abs().max())
        else:
            assert own.shape[1] == length
            assert distance(embeds[longest], theirs[longest]) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.slow
def test_bf16_is_no_further_from_fp32_than_twice_the_reference(checkpoint, reference):
    ours = JoyImageEditPlusPipeline.from_pretrained(checkpoint, dtype="bf16")
    ours.buckets = BUCKETS
    ours.set_progress_bar_config(disable=True)
    theirs = open_reference(checkpoint, torch.bfloat16)
    call = dict(CALLS["batch of ragged references"], generator=None)
    errors = []
    start = torch.randn(3, 16, 1, 8, 10, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, exact = run_reference(reference, latents=start.float(), **call)
    for latents in (
        run_ours(ours, latents=start, **call)[1],
        run_reference(theirs, latents=start, **call)[1],
    ):
        assert latents.dtype == torch.bfloat16
        errors.append(float((latents.float() - exact).abs().mean()))
    assert 0 < errors[0] <= 2 * errors[1]


@pytest.mark.slow
def test_saved_checkpoint_opens_in_the_reference(ours, tmp_path):
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "JoyImageEditPlusPipeline"
    assert index["transformer"] == ["diffusers", "JoyImageEditPlusTransformer3DModel"]
    config = json.loads((tmp_path / "transformer/config.json").read_text())
    assert config["_class_name"] == "JoyImageEditPlusTransformer3DModel"
    assert "_class_name" not in json.loads((tmp_path / "text_encoder/config.json").read_text())
    theirs = ReferencePipeline.from_pretrained(tmp_path, processor=None, torch_dtype=torch.float32)
    assert type(theirs.transformer) is ReferenceTransformer
    for name, network in ours.networks.items():
        expected, found = getattr(theirs, name).state_dict(), network.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


RECORDED = ["edit_two_refs", "edit_one_ref_sized", "edit_batch2_ragged", "edit_no_cfg", "t2i"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_runs(shared_data, name):
    folder = shared_data / "goldens"
    pipe = JoyImageEditPlusPipeline.from_pretrained(folder / "tiny-joyimage-edit-plus", dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    info = json.loads((folder / "joyimage_plus" / f"{name}.json").read_text())
    golden = load_file(folder / "joyimage_plus" / f"{name}.safetensors")
    pipe.buckets = [tuple(size) for size in info["buckets"]]

    def photo(file):
        return Image.open(shared_data / "photos" / file).convert("RGB")

    coffee, cat = photo("coffee.png"), photo("chelsea.png")
    tall = photo("astronaut.png").crop((40, 0, 372, 460))
    images = {
        "edit_two_refs": [coffee, tall],
        "edit_one_ref_sized": [cat],
        "edit_batch2_ragged": [[coffee, tall], [cat]],
        "edit_no_cfg": [coffee],
        "t2i": None,
    }[name]
    seed = info["seed"]
    generator = [torch.Generator().manual_seed(s) for s in seed] if isinstance(seed, list) else None
    told = []
    image, steps = run_ours(
        pipe, told, images=images, generator=generator or torch.manual_seed(seed), **info["call"]
    )
    torch.testing.assert_close(torch.stack(told), golden["timesteps"], rtol=0, atol=0)
    wanted = from_patches(golden["latents_per_step"], info["shape_list"][0][0])
    assert distance(steps[:, :, 0], wanted) <= TOLERANCE
    assert distance(image, golden["image"]) <= TOLERANCE
    assert float(np.std(golden["image"].numpy())) > 0.02
