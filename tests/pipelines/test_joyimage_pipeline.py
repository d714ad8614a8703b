"""What users of JoyImageEditPipeline meet: inputs, outputs, callbacks, refusals, and the work that is not
done twice."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit import JoyImageEditPipeline, MultiPipelineCallbacks, PipelineCallback

BUCKETS = [(64, 96), (96, 64), (64, 64)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_checkpoint(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return JoyImageEditPipeline.from_pretrained(checkpoint, dtype="float32")


@pytest.fixture
def pipe(loaded):
    made = JoyImageEditPipeline(**loaded.components, buckets=BUCKETS)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def photo():
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 255, (5, 7, 3), dtype=np.uint8))
    return small.resize((140, 100), Image.BICUBIC)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(pipe, photo, **call):
    call = {"prompt": "a", "num_inference_steps": 2, "generator": seeded(), "output_type": "np", **call}
    return pipe(image=photo, **call).images


def test_output_types_agree(pipe, photo):
    floats = run(pipe, photo)
    assert (
        floats.shape == (1, 64, 96, 3)
        and floats.dtype == np.float32
        and 0 <= floats.min() <= floats.max() <= 1
    )
    tensor = run(pipe, photo, output_type="pt")
    assert tensor.shape == (1, 3, 64, 96)
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), floats)
    (image,) = run(pipe, photo, output_type="pil")
    assert image.size == (96, 64) and image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.round(floats[0] * 255).astype(np.uint8))
    latent = run(pipe, photo, output_type="latent")
    assert latent.shape == (1, 16, 8, 12) and latent.dtype == torch.float32
    decoded = pipe.vae.decode(pipe.denormalize_latents(latent[:, :, None])).sample
    np.testing.assert_allclose(
        (decoded[:, :, 0] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), floats, atol=1e-6
    )


def test_return_dict_false_is_a_tuple_and_the_output_unpacks(pipe, photo):
    call = dict(image=photo, prompt="a", num_inference_steps=1, generator=seeded())
    output = pipe(**call)
    (images,) = output
    assert output.images is images and output[0] is images
    tupled = pipe(**{**call, "generator": seeded()}, return_dict=False)
    assert type(tupled) is tuple and tupled[0][0].tobytes() == images[0].tobytes()


@pytest.mark.parametrize(
    "form", ["array", "float array", "tensor", "batch tensor", "list", "gray", "rgba", "palette"]
)
def test_every_form_of_photograph_is_one_photograph(pipe, photo, form):
    pixels = np.asarray(photo)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    forms = {
        "array": pixels,
        "float array": (pixels / 255).astype(np.float32),
        "tensor": tensor,
        "batch tensor": tensor[None],
        "list": [photo],
        "rgba": photo.convert("RGBA"),
    }
    if form in forms:
        np.testing.assert_array_equal(run(pipe, forms[form]), run(pipe, photo))
    else:
        converted = photo.convert({"gray": "L", "palette": "P"}[form])
        np.testing.assert_array_equal(run(pipe, converted), run(pipe, converted.convert("RGB")))


def test_same_seed_same_image_other_seed_another(pipe, photo):
    torch.manual_seed(1)
    first = run(pipe, photo)
    torch.manual_seed(2)  # the global generator has no say
    np.testing.assert_array_equal(run(pipe, photo), first)
    assert np.abs(run(pipe, photo, generator=seeded(1)) - first).max() > 0.05


def test_prompt_and_photograph_change_the_image(pipe, photo):
    first = run(pipe, photo, guidance_scale=5.0)
    assert np.abs(run(pipe, photo, prompt="something else", guidance_scale=5.0) - first).max() > 1e-4
    assert np.abs(run(pipe, photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) - first).max() > 1e-3


def test_a_batch_of_unequal_prompts_is_the_single_runs(pipe, photo):
    prompts = ["a", "a much longer instruction than that", "b"]
    photos = [photo, photo.rotate(90), photo.rotate(180)]
    batch = run(pipe, photos, prompt=prompts, generator=[seeded(s) for s in (3, 4, 5)])
    for row, (prompt, one, seed) in enumerate(zip(prompts, photos, (3, 4, 5), strict=True)):
        np.testing.assert_allclose(
            batch[row], run(pipe, one, prompt=prompt, generator=seeded(seed))[0], atol=1e-5
        )


def test_one_photograph_serves_all_prompts_and_a_list_of_one_generator_is_that_generator(pipe, photo):
    two = run(pipe, photo, prompt=["a", "bc"], generator=[seeded(1), seeded(2)])
    np.testing.assert_allclose(two[1], run(pipe, photo, prompt="bc", generator=[seeded(2)])[0], atol=1e-5)


def test_images_per_prompt_keep_prompt_and_photograph_together(pipe, photo):
    photos = [photo, photo.rotate(180)]
    seeds = [1, 2, 3, 4]
    images = run(
        pipe, photos, prompt=["a", "bcd"], num_images_per_prompt=2, generator=[seeded(s) for s in seeds]
    )
    for row, seed in enumerate(seeds):
        alone = run(pipe, photos[row // 2], prompt=["a", "bcd"][row // 2], generator=seeded(seed))
        np.testing.assert_allclose(images[row], alone[0], atol=1e-5)


def test_callbacks_see_and_replace_latents_and_prompts(pipe, photo):
    seen = []

    def replace(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape, tensors["prompt_embeds"].shape[0]))
        return {
            "latents": torch.zeros_like(tensors["latents"]),
            "prompt_embeds": tensors["prompt_embeds"] * 2,
        }

    names = ["latents", "prompt_embeds"]
    latent = run(
        pipe,
        photo,
        output_type="latent",
        callback_on_step_end=replace,
        callback_on_step_end_tensor_inputs=names,
        num_inference_steps=3,
    )
    assert [s[0] for s in seen] == [0, 1, 2] and seen[0][1] == 1000.0 and seen[0][2] == (1, 1, 16, 1, 8, 12)
    assert not latent.any()


def test_changed_prompt_embeds_are_used_from_the_next_step(pipe, photo):
    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * 0}

    names = ["prompt_embeds"]
    changed = run(pipe, photo, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    assert np.abs(changed - run(pipe, photo)).max() > 1e-4


def test_interrupt_stops_after_the_step(pipe, photo):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe.interrupt = step == 1
        return {}

    run(pipe, photo, num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0, 1]
    assert pipe.num_timesteps == 5


class Halve(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": callback_kwargs["latents"] / 2}


def test_callback_objects_bring_their_own_tensor_names(pipe, photo):
    once = run(pipe, photo, callback_on_step_end=Halve(), num_inference_steps=1, output_type="latent")
    twice = run(
        pipe,
        photo,
        callback_on_step_end=MultiPipelineCallbacks([Halve(), Halve()]),
        num_inference_steps=1,
        output_type="latent",
    )
    torch.testing.assert_close(once / 2, twice)


def test_what_does_not_change_is_computed_once(pipe, photo, monkeypatch):
    counts = {}

    def count(owner, name):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for owner, names in (
        (pipe.transformer, ("rope", "embed_time", "embed_text", "embed_image", "predict_branches")),
        (pipe.text_encoder, ("encode_images", "prefill", "hidden_states")),
        (pipe.vae, ("encode", "decode")),
    ):
        for name in names:
            count(owner, name)
    monkeypatch.setattr(F, "conv3d", lambda *a, **k: pytest.fail("a single picture needs no 3-D convolution"))
    monkeypatch.setattr(torch, "conv3d", F.conv3d)
    monkeypatch.setattr(pipe.text_encoder.lm_head, "forward", lambda x: pytest.fail("no logits are wanted"))
    run(pipe, photo, num_inference_steps=3)
    assert counts == {
        "rope": 1,
        "embed_time": 1,
        "embed_text": 2,  # positive and negative
        "embed_image": 1 + 3,  # the reference, and the target at each step
        "predict_branches": 3,  # both branches of the guidance in one walk
        "encode_images": 1,
        "prefill": 1,
        "hidden_states": 1,  # the two tails together
        "encode": 1,
        "decode": 1,
    }


def test_the_decoder_sees_the_target_alone(pipe, photo, monkeypatch):
    shapes = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **k: shapes.append(tuple(z.shape)) or decode(z, **k))
    run(pipe, photo)
    assert shapes == [(1, 16, 1, 8, 12)]


EMBEDS = torch.zeros(1, 3, 32)
MASK = torch.ones(1, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(prompt=None), "exactly one of prompt and prompt_embeds"),
        (
            dict(prompt="a", prompt_embeds=EMBEDS, prompt_embeds_mask=MASK),
            "exactly one of prompt and prompt_embeds",
        ),
        (dict(prompt=None, prompt_embeds=EMBEDS), "needs prompt_embeds_mask"),
        (
            dict(prompt=None, prompt_embeds=torch.zeros(1, 3, 31), prompt_embeds_mask=MASK),
            r"must be \(B, L, 32\)",
        ),
        (dict(prompt=None, prompt_embeds=EMBEDS, prompt_embeds_mask=MASK * 0), "without a token"),
        (
            dict(negative_prompt="n", negative_prompt_embeds=EMBEDS, negative_prompt_embeds_mask=MASK),
            "negative_prompt or negative_prompt_embeds, not both",
        ),
        (dict(negative_prompt_embeds=EMBEDS), "needs negative_prompt_embeds_mask"),
        (dict(prompt=["a", "b"], negative_prompt=["x", "y", "z"]), "negative_prompt is a list of 3"),
        (dict(prompt=[]), "prompt must be a string or a non-empty list"),
        (dict(prompt=7), "prompt must be a string"),
        (dict(height=64), "height=64, width=None: give both or neither"),
        (dict(height=50, width=64), "height=50: must be a positive multiple of 16"),
        (dict(height=64, width=-16), "width=-16: must be a positive multiple of 16"),
        (dict(height=64, width=0), "width=0"),
        (dict(height=64.0, width=64), "height=64.0"),
        (dict(num_inference_steps=0), "num_inference_steps=0"),
        (dict(num_images_per_prompt=0), "num_images_per_prompt=0"),
        (dict(max_sequence_length=0), "max_sequence_length=0"),
        (dict(guidance_scale=float("nan")), "guidance_scale=nan"),
        (dict(output_type="jpeg"), "output_type='jpeg': must be one of pil, np, pt, latent"),
        (dict(timesteps=[1000.0], sigmas=[1.0]), "timesteps or sigmas, not both"),
        (dict(generator=[seeded(), seeded()]), "list of 2, but there are 1 images"),
        (dict(latents=torch.zeros(1, 1, 16, 1, 9, 12)), r"wanted \(1, 1, 16, 1, 8, 12\)"),
        (dict(latents=torch.full((1, 1, 16, 1, 8, 12), float("nan"))), "NaN or infinite"),
        (dict(latents=torch.full((1, 1, 16, 1, 8, 12), float("inf"))), "NaN or infinite"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "'noise'.*only"),
        (dict(timesteps=[]), "num_inference_steps|at least 1|must be"),
        (dict(timesteps="abc"), "timesteps"),
        (dict(sigmas=[float("nan")]), "sigmas"),
        (dict(generator=0), "generator is, or holds, a int"),
        (dict(generator=[0]), "generator is, or holds, a int"),
        (dict(guidance_scale="4"), "guidance_scale='4'"),
        (dict(guidance_scale=None), "guidance_scale=None"),
        (dict(latents=np.zeros(3)), "latents is a ndarray"),
        (dict(prompt=None, prompt_embeds=EMBEDS.numpy(), prompt_embeds_mask=MASK), "embeds is a ndarray"),
        (dict(prompt=None, prompt_embeds=EMBEDS / 0, prompt_embeds_mask=MASK), "prompt_embeds hold NaN"),
        (
            dict(prompt=["a", "b"], negative_prompt_embeds=EMBEDS, negative_prompt_embeds_mask=MASK),
            "for 1 prompts, but there are 2",
        ),
        (dict(callback_on_step_end=3), "callback_on_step_end is a int"),
        (dict(prompt="look: <image>\nand see"), "stands for a picture"),
        (dict(prompt="look: <|image_pad|>"), "image_pad"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_refused_before_any_work(pipe, photo, monkeypatch, call, message):
    for network in pipe.networks.values():
        for name in ("encode", "decode", "encode_images", "prefill", "hidden_states", "embed_image"):
            if hasattr(network, name):
                monkeypatch.setattr(network, name, lambda *a, **k: pytest.fail("work before the check"))
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{"image": photo, "prompt": "a", "num_inference_steps": 1, **call})


@pytest.mark.parametrize(
    ("photos", "prompts"), [(2, "a"), (3, ["a", "b"]), (2, ["a", "b", "c"]), (0, "a")], ids=str
)
def test_photographs_that_do_not_match_the_prompts(pipe, photo, photos, prompts):
    with pytest.raises(ValueError, match="image"):
        pipe(image=[photo] * photos, prompt=prompts, num_inference_steps=1)


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4)), np.full((8, 8, 3), np.nan), torch.ones(3, 8, 8) * 2, "photo.png", 3], ids=str
)
def test_what_is_not_a_photograph(pipe, bad):
    with pytest.raises((ValueError, TypeError), match="image"):
        pipe(image=bad, prompt="a", num_inference_steps=1)


def test_a_size_that_is_no_bucket_is_said_aloud(pipe, photo, caplog):
    image = run(pipe, photo, height=512, width=512)
    assert image.shape[1:3] == (64, 64)
    assert "height 512 and width 512 became the nearest bucket, 64 x 64" in caplog.text


def test_a_cut_prompt_is_said_aloud(pipe, caplog):
    pipe.text_token_max_length = 8
    run(pipe, None, prompt="a prompt that is longer than eight tokens")
    assert "was cut" in caplog.text


def test_buckets_that_fit_no_token_grid(pipe, photo):
    pipe.buckets = [(100, 100)]
    with pytest.raises(ValueError, match="multiples of 16"):
        pipe(image=photo, prompt="a", num_inference_steps=1)


def test_parts_of_another_class(loaded):
    parts = loaded.components
    with pytest.raises(TypeError, match="vae is a JoyImageEditTransformer3DModel: .* takes AutoencoderKLWan"):
        JoyImageEditPipeline(**{**parts, "vae": parts["transformer"]})
    with pytest.raises(TypeError, match="scheduler is a NoneType"):
        JoyImageEditPipeline(**{**parts, "scheduler": None})
    made = JoyImageEditPipeline(**parts)
    with pytest.raises(TypeError, match="compile its blocks in place"):
        made.transformer = torch.compile(parts["transformer"])


def test_masks_mark_valid_tokens_by_any_value(pipe, photo):
    embeds = torch.randn(1, 5, 32, generator=seeded(3))
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    call = dict(prompt=None, prompt_embeds=embeds, negative_prompt_embeds=embeds, guidance_scale=2.0)
    plain = run(pipe, photo, prompt_embeds_mask=mask, negative_prompt_embeds_mask=mask, **call)
    odd = run(pipe, photo, prompt_embeds_mask=mask * 2.5, negative_prompt_embeds_mask=mask.bool(), **call)
    np.testing.assert_array_equal(plain, odd)


def test_a_callback_may_turn_guidance_off(pipe, photo, monkeypatch):
    calls = []
    predict = pipe.transformer.predict_branches
    monkeypatch.setattr(pipe.transformer, "predict_branches", lambda *a: calls.extend(a[2]) or predict(*a))

    def off(pipe, step, timestep, tensors):
        pipe.guidance_scale = 1.0
        return {}

    run(pipe, photo, num_inference_steps=4, callback_on_step_end=off)
    assert len(calls) == 2 + 3


def test_a_callback_that_fails_leaves_the_pipeline_usable(checkpoint, pipe, photo):
    offloaded = JoyImageEditPipeline.from_pretrained(checkpoint, dtype="float32")
    offloaded.buckets = BUCKETS
    offloaded.set_offload("sequential", device="cpu")

    def fail(*_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(offloaded, photo, callback_on_step_end=fail)
    np.testing.assert_array_equal(run(offloaded, photo), run(pipe, photo))


def test_replaced_tensors_must_keep_their_shape(pipe, photo):
    with pytest.raises(ValueError, match=r"latents of shape \(1,\), wanted \(1, 1, 16, 1, 8, 12\)"):
        run(pipe, photo, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


def test_one_pipeline_serves_several_sizes_and_unicode(pipe, photo):
    first = run(pipe, photo, prompt="你好 🐱")
    assert run(pipe, photo.rotate(90, expand=True), prompt="").shape[1:3] == (96, 64)
    np.testing.assert_array_equal(run(pipe, photo, prompt="你好 🐱"), first)


def test_buckets_may_be_lists(pipe, photo):
    """As JSON has them."""
    expected = run(pipe, photo)
    pipe.buckets = [list(size) for size in BUCKETS]
    np.testing.assert_array_equal(run(pipe, photo), expected)
    assert run(pipe, None).shape[1:3] == (64, 64)


def test_a_copied_pipeline_is_its_own(pipe, photo):
    copied = copy.deepcopy(pipe)
    expected = run(pipe, photo)
    with torch.no_grad():
        for parameter in pipe.transformer.proj_out.parameters():
            kept = parameter.clone()
            parameter.zero_()
            np.testing.assert_array_equal(run(copied, photo), expected)
            parameter.copy_(kept)


def test_unknown_quirk(loaded):
    with pytest.raises(ValueError, match="known are"):
        JoyImageEditPipeline(**loaded.components, reference_quirks=["sloppy"])
    one = JoyImageEditPipeline(**loaded.components, reference_quirks="padded_prompts")
    assert one.quirks == {"padded_prompts"}


def test_slicing_equals_and_tiling_runs(pipe, photo):
    plain = run(pipe, [photo, photo.rotate(180)], prompt=["a", "b"])
    pipe.enable_vae_slicing()
    try:
        np.testing.assert_allclose(run(pipe, [photo, photo.rotate(180)], prompt=["a", "b"]), plain, atol=1e-5)
    finally:
        pipe.disable_vae_slicing()
    pipe.enable_vae_tiling(
        tile_sample_min_height=48,
        tile_sample_min_width=48,
        tile_sample_stride_height=32,
        tile_sample_stride_width=32,
    )
    try:
        tiled = run(pipe, [photo, photo.rotate(180)], prompt=["a", "b"])
    finally:
        pipe.disable_vae_tiling()
    assert tiled.shape == plain.shape and np.abs(tiled - plain).max() > 0


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offload_gives_the_same_image(checkpoint, pipe, photo, offload):
    """With the CPU in the accelerator's place: the copies and hooks run, the image stays the same."""
    expected = run(pipe, photo)
    offloaded = JoyImageEditPipeline.from_pretrained(checkpoint, dtype="float32")
    offloaded.buckets = BUCKETS
    offloaded.set_progress_bar_config(disable=True)
    offloaded.set_offload(offload, device="cpu")
    np.testing.assert_array_equal(run(offloaded, photo), expected)
    offloaded.disable_offload()
    np.testing.assert_array_equal(run(offloaded, photo), expected)


def test_offload_without_an_accelerator_does_nothing(pipe, photo, monkeypatch):
    monkeypatch.setattr("joyedit.pipelines.placement.accelerator_device", lambda: None)
    pipe.enable_model_cpu_offload()
    pipe.enable_sequential_cpu_offload(gpu_id=0)
    assert pipe.device == torch.device("cpu")
    run(pipe, photo, num_inference_steps=1)


def test_an_offloaded_pipeline_is_not_moved(checkpoint):
    pipe = JoyImageEditPipeline.from_pretrained(checkpoint)
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="disable_offload"):
        pipe.to("cpu")
    pipe.disable_offload()
    pipe.to("cpu")


def test_bf16_is_near_fp32(checkpoint, pipe, photo):
    half = joyedit.load(checkpoint, device="cpu", dtype="bf16")
    half.buckets = BUCKETS
    half.set_progress_bar_config(disable=True)
    assert half.dtype is torch.bfloat16
    assert {p.dtype for p in half.transformer.condition_embedder.time_embedder.parameters()} == {
        torch.float32
    }
    assert np.abs(run(half, photo) - run(pipe, photo)).mean() < 0.02


def test_progress_bar_can_be_configured(pipe, photo, capsys):
    pipe.set_progress_bar_config(disable=False, desc="painting")
    run(pipe, photo)
    assert "painting" in capsys.readouterr().err
