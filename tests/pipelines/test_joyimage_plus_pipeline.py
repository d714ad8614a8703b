"""What users of JoyImageEditPlusPipeline meet: references, sizes, outputs, refusals, and that nothing is
padded or done twice."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit import JoyImageEditPipeline, JoyImageEditPlusPipeline

BUCKETS = [(64, 96), (96, 64), (64, 64)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, seed=1, plus=True)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return JoyImageEditPlusPipeline.from_pretrained(checkpoint, dtype="float32")


@pytest.fixture
def pipe(loaded):
    made = JoyImageEditPlusPipeline(**loaded.components, buckets=BUCKETS)
    made.set_progress_bar_config(disable=True)
    return made


def photo(width, height, seed):
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 255, (5, 7, 3), dtype=np.uint8))
    return small.resize((width, height), Image.BICUBIC)


WIDE, TALL, SQUARE = photo(140, 100, 0), photo(90, 150, 1), photo(70, 70, 2)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipe, images, **call):
    call = {"prompt": "a", "num_inference_steps": 1, "generator": seeded(), "output_type": "np", **call}
    return pipe(images, **call).images


def test_the_size_is_that_of_the_last_reference_or_the_one_asked_for(pipe):
    assert run(pipe, [WIDE, TALL]).shape == (1, 96, 64, 3)
    assert run(pipe, [TALL, WIDE]).shape == (1, 64, 96, 3)
    assert run(pipe, [TALL], height=48, width=112).shape == (1, 48, 112, 3)
    assert run(pipe, None).shape == (1, 64, 64, 3)


def test_every_reference_and_their_order_count(pipe):
    both = run(pipe, [WIDE, TALL], height=64, width=64)
    for images in ([TALL, WIDE], [WIDE], [WIDE, SQUARE], [WIDE, TALL, TALL]):
        assert np.abs(run(pipe, images, height=64, width=64) - both).max() > 1e-4


def test_each_sample_of_a_batch_is_the_run_alone(pipe):
    samples = [[WIDE, TALL], [SQUARE], [TALL, WIDE], [SQUARE]]
    prompts, seeds = ["a", "a longer instruction", "a", "a"], (3, 4, 5, 6)
    size = dict(height=64, width=80)
    batch = run(pipe, samples, prompt=prompts, generator=[seeded(s) for s in seeds], **size)
    for row, (images, prompt, seed) in enumerate(zip(samples, prompts, seeds, strict=True)):
        alone = run(pipe, images, prompt=prompt, generator=seeded(seed), **size)
        np.testing.assert_allclose(batch[row], alone[0], atol=1e-5)


def test_one_list_serves_all_prompts(pipe):
    call = dict(prompt=["a", "bcd"], negative_prompt="n")
    flat = run(pipe, [WIDE, TALL], generator=[seeded(1), seeded(2)], **call)
    nested = run(pipe, [[WIDE, TALL], [WIDE, TALL]], generator=[seeded(1), seeded(2)], **call)
    np.testing.assert_array_equal(flat, nested)


@pytest.mark.slow
def test_forms_of_pictures(pipe):
    pixels = np.asarray(WIDE)
    expected = run(pipe, [WIDE, TALL])
    for first in (
        pixels,
        (pixels / 255).astype(np.float32),
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
    ):
        np.testing.assert_array_equal(run(pipe, [first, TALL]), expected)
    np.testing.assert_array_equal(run(pipe, WIDE), run(pipe, [WIDE]))
    np.testing.assert_array_equal(
        run(pipe, [WIDE.convert("L")]), run(pipe, [WIDE.convert("L").convert("RGB")])
    )
    seen_through = WIDE.convert("RGBA")
    seen_through.putalpha(40)
    assert np.abs(run(pipe, [seen_through]) - run(pipe, [WIDE])).max() > 1e-4  # the text encoder sees white


def test_outputs_and_callbacks_are_of_the_target(pipe):
    shapes = []
    floats = run(pipe, [WIDE, TALL], callback_on_step_end=lambda *now: shapes.append(now[3]["latents"].shape))
    assert shapes == [(1, 1, 16, 1, 12, 8)]
    (image,) = run(pipe, [WIDE, TALL], output_type="pil")
    np.testing.assert_array_equal(np.asarray(image), np.round(floats[0] * 255).astype(np.uint8))
    latent = run(pipe, [WIDE, TALL], output_type="latent")
    assert latent.shape == (1, 16, 12, 8) and latent.dtype == torch.float32
    decoded = pipe.vae.decode(pipe.denormalize_latents(latent[:, :, None])).sample
    pixels = (decoded[:, :, 0] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    np.testing.assert_allclose(pixels.numpy(), floats, atol=1e-6)
    (images,) = pipe([WIDE], "a", num_inference_steps=1, return_dict=False)
    assert images[0].size == (96, 64)


def test_callbacks_replace_latents_and_prompts_and_end_guidance(pipe, monkeypatch):
    expected, walks = run(pipe, [WIDE, TALL], num_inference_steps=3), []
    predict = pipe.transformer.predict_branches
    monkeypatch.setattr(
        pipe.transformer, "predict_branches", lambda *a: walks.append(len(a[2])) or predict(*a)
    )

    def change(pipe, step, timestep, tensors):
        pipe.guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5}

    names = ["latents", "prompt_embeds"]
    call = dict(num_inference_steps=3, callback_on_step_end_tensor_inputs=names)
    assert np.abs(run(pipe, [WIDE, TALL], callback_on_step_end=change, **call) - expected).max() > 1e-4
    assert walks == [2, 1, 1]
    zero = dict(output_type="latent", callback_on_step_end=lambda *now: {"latents": 0 * now[3]["latents"]})
    assert not run(pipe, [WIDE], **call, **zero).any()


def test_nothing_but_noise_is_drawn(pipe):
    """References are means: with given latents no generator has a say, and without it draws one noise."""
    latents = torch.randn(1, 16, 1, 12, 8, generator=seeded(4))
    found = [run(pipe, [WIDE, TALL], latents=latents, generator=seeded(seed)) for seed in (1, 2)]
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(run(pipe, [WIDE, TALL], generator=seeded(4)), found[0])


def test_defaults(pipe):
    defaults = inspect.signature(JoyImageEditPlusPipeline.__call__).parameters
    assert list(defaults)[1:5] == ["images", "prompt", "height", "width"]
    assert defaults["num_inference_steps"].default == 30 and defaults["guidance_scale"].default == 4.0
    expected = run(pipe, [WIDE])
    np.testing.assert_array_equal(run(pipe, [WIDE], negative_prompt=" "), expected)
    assert np.abs(run(pipe, [WIDE], negative_prompt="") - expected).max() > 1e-5


def test_prompts_that_come_embedded(pipe):
    embeds, masks = [], []
    for text in ("make it red", " "):
        turn = f"<|im_start|>user\n<image>\n<image>\n{text}<|im_end|>\n"
        pictures = [joyedit.images.resize_center_crop(one, *pipe.bucket_of(one)) for one in (WIDE, TALL)]
        one, mask = pipe.encode_prompt_multiple_images(turn, images=pictures)
        embeds.append(one)
        masks.append(mask)
    embedded = run(
        pipe,
        [WIDE, TALL],
        prompt=None,
        prompt_embeds=embeds[0],
        prompt_embeds_mask=masks[0],
        negative_prompt_embeds=embeds[1],
        negative_prompt_embeds_mask=masks[1],
    )
    np.testing.assert_allclose(embedded, run(pipe, [WIDE, TALL], prompt="make it red"), atol=1e-5)


def test_nothing_is_padded_and_nothing_done_twice(pipe, monkeypatch):
    """A ragged batch: as many tokens as there are, samples alike in one walk, equal pictures read once."""
    counts, walks = {}, []

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            if name == "predict_branches":
                walks.append(
                    [(*t.shape[:2], r.shape[1], x.shape[1]) for t, r, x in zip(*args[:3], strict=True)]
                )
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, names in (
        (pipe.transformer, ("rope", "embed_time", "predict_branches")),
        (pipe.text_encoder, ("encode_images", "prefill")),
        (pipe.vae, ("encode", "decode")),
    ):
        for name in names:
            count(owner, name)
    samples, prompts = [[WIDE, TALL], [SQUARE], [WIDE, TALL]], ["ab", "ab", "abcd"]
    run(pipe, samples, prompt=prompts, height=64, width=64, num_inference_steps=2)
    assert counts == {
        "rope": 2,  # of two references and of one
        "embed_time": 1,
        "predict_branches": 2 * 2,
        "encode_images": 2,
        "prefill": 2,
        "encode": 3,
        "decode": 1,
    }
    turn = "user\n<|im_end|>\n<|im_start|>assistant\n"
    seen = 2 + 4 * 5  # 64 x 96 pixels become 128 x 160 for the vision tower
    words = len(pipe.tokenizer.encode(turn)) + 2 * seen
    assert [tokens[:3] for tokens in walks[0]] == [(1, 16, 48), (1, 16, 48), (2, 16, 48)]
    assert [tokens[3] for tokens in walks[0]] == [words + 2, words + 4, words + 1]
    assert [tokens[:3] for tokens in walks[1]] == [(1, 16, 16)] * 2


def test_what_is_cut_is_said(pipe, caplog):
    full = run(pipe, [WIDE, TALL])
    assert "are cut" not in caplog.text
    assert np.abs(run(pipe, [WIDE, TALL], max_sequence_length=50) - full).max() > 1e-5
    assert "pictures included: the first 13 are cut (max_sequence_length=50)" in caplog.text


def test_long_texts_are_read_whole(pipe, caplog):
    """`text_token_max_length` is of Edit alone: the reference of Plus does not look at it."""
    expected = run(pipe, None, prompt="a prompt that is longer than eight tokens")
    pipe.text_token_max_length = 8
    found = run(pipe, None, prompt="a prompt that is longer than eight tokens")
    np.testing.assert_array_equal(found, expected)
    assert "cut" not in caplog.text


EMBEDS, MASK = torch.zeros(1, 3, 32), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(images=[]), "images is an empty list"),
        (dict(images=[[]]), r"images\[0\] is an empty list"),
        (dict(images=[SQUARE] * 7), "images holds 7 references: 1 to 6 are possible"),
        (dict(images=[[SQUARE], [SQUARE] * 7], prompt=["a", "b"]), r"images\[1\] holds 7 references"),
        (dict(images=[[SQUARE], [SQUARE]]), "references for 2 prompts, and there are 1"),
        (dict(images=[[SQUARE], [SQUARE]], prompt=["a", "b", "c"]), "for 2 prompts, and there are 3"),
        (dict(images=[SQUARE, "b.png"]), r"images\[1\] is a str"),
        (dict(images=[[SQUARE], ["b.png"]], prompt=["a", "b"]), r"images\[1\]\[0\] is a str"),
        (dict(images=3), "images is a int"),
        (dict(images=[np.full((8, 8, 3), np.nan)]), r"images\[0\] holds NaN"),
        (dict(height=264, width=256), "height=264: must be a positive multiple of 16"),
        (dict(height=256, width=72), "width=72: must be a positive multiple of 16"),
        (dict(height=64), "height=64, width=None: give both or neither"),
        (dict(height=0, width=64), "height=0"),
        (dict(height=64.0, width=64), "height=64.0"),
        (dict(prompt=None), "exactly one of prompt and prompt_embeds"),
        (dict(prompt=["a", "b"], negative_prompt=["x"]), "negative_prompt is a list of 1"),
        (dict(prompt=None, prompt_embeds=EMBEDS), "needs prompt_embeds_mask"),
        (dict(prompt=None, prompt_embeds=EMBEDS[..., 1:], prompt_embeds_mask=MASK), r"\(B, L, 32\)"),
        (dict(negative_prompt="n", negative_prompt_embeds=EMBEDS), "not both"),
        (dict(prompt="look: <image>\nand see"), "stands for a picture"),
        (dict(num_inference_steps=0), "num_inference_steps=0"),
        (dict(guidance_scale="4"), "guidance_scale='4'"),
        (dict(max_sequence_length=0), "max_sequence_length=0"),
        (dict(output_type="jpeg"), "output_type='jpeg'"),
        (dict(timesteps=[1000.0], sigmas=[1.0]), "timesteps or sigmas, not both"),
        (dict(generator=[seeded(), seeded()]), "list of 2, but there are 1 images"),
        (dict(latents=torch.zeros(1, 1, 16, 1, 8, 8)), r"wanted \(1, 16, 1, 8, 8\) \(B, C, 1, h, w\)"),
        (dict(latents=torch.full((1, 16, 1, 8, 8), float("nan"))), "NaN or infinite"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "'noise'.*only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused_before_any_work(pipe, monkeypatch, call, message):
    for network in pipe.networks.values():
        for name in ("encode", "decode", "encode_images", "prefill", "hidden_states", "embed_image"):
            if hasattr(network, name):
                monkeypatch.setattr(network, name, lambda *a, **k: pytest.fail("work before the check"))
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{"images": [SQUARE], "prompt": "a", "num_inference_steps": 1, **call})


def test_images_and_their_places_in_turns(pipe):
    with pytest.raises(ValueError, match="places for 2 images, and there are 1"):
        pipe.encode_prompt_multiple_images("<image>\n<image>\n", images=[SQUARE])
    with pytest.raises(ValueError, match="embed them apart"):
        pipe.encode_prompt_multiple_images(["<image>\n", "x"], images=[SQUARE])


def test_turns_that_speak_before_they_show(pipe):
    """The same picture after different words: what the turns share ends before it."""
    turns = ["<|im_start|>user\nSee <image>\n", "<|im_start|>user\nOr <image>\nagain"]
    embeds, mask = pipe.encode_prompt_multiple_images(turns, images=[SQUARE, SQUARE])
    for row, turn in enumerate(turns):
        alone, _ = pipe.encode_prompt_multiple_images(turn, images=[SQUARE])
        torch.testing.assert_close(embeds[row][mask[row].bool()], alone[0])


def test_buckets_and_parts(pipe, loaded):
    pipe.buckets = [(100, 100)]
    with pytest.raises(ValueError, match="multiples of 16"):
        run(pipe, [SQUARE], height=64, width=64)
    lacking = JoyImageEditPlusPipeline(**{**loaded.components, "processor": None}, buckets=BUCKETS)
    with pytest.raises(ValueError, match="needs processor"):
        run(lacking, [SQUARE])
    assert run(lacking, None).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match="known are"):
        JoyImageEditPlusPipeline(**loaded.components, reference_quirks=["global_posterior"])


def test_edit_and_plus_share_parts(loaded, pipe):
    """The same weights: with one reference they differ in what the pipelines do, not in the network."""
    edit = JoyImageEditPipeline.from_pipe(pipe)
    assert edit.transformer is pipe.transformer and edit.buckets == pipe.buckets
    again = JoyImageEditPlusPipeline.from_pipe(edit)
    np.testing.assert_array_equal(run(again, [WIDE, TALL]), run(pipe, [WIDE, TALL]))


@pytest.mark.slow
def test_offloading(checkpoint, pipe):
    moved = JoyImageEditPlusPipeline.from_pretrained(checkpoint, dtype="float32")
    moved.buckets = BUCKETS
    moved.set_progress_bar_config(disable=True)
    moved.set_offload("sequential", device="cpu")
    np.testing.assert_array_equal(run(moved, [WIDE, TALL]), run(pipe, [WIDE, TALL]))
