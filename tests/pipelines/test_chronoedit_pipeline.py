"""What users of ChronoEditPipeline meet: the film that comes out and how it is put together, batches, every
form of a photograph, presets and their warnings, refusals before work, work that is not done twice."""

import copy
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.random_checkpoint import write_random_chronoedit_checkpoint
from joyedit import (
    ChronoEditPipeline,
    FlowMatchEulerDiscreteScheduler,
    PipelineCallback,
)
from joyedit.memory.streaming import Transfers, blocks_of
from joyedit.pipelines.chronoedit import ChronoEditPipelineOutput
from joyedit.pipelines.chronoedit_frames import FrameCoder
from tests.pipelines.tiny_chronoedit import (
    HEIGHT,
    OTHER,
    PROMPT,
    WIDTH,
    close,
    counted,
    loaded_from,
    picture,
    reasoning,
    run,
    seeded,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_random_chronoedit_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return loaded_from(checkpoint)


@pytest.fixture
def pipe(loaded):
    made = ChronoEditPipeline(**loaded.components)
    made.set_progress_bar_config(disable=True)
    return made


def convolved(vae, work):
    """How often each convolution of the decoder runs during `work`, and how many frames it makes."""
    calls, frames, handles = {}, {}, []

    def note(name):
        def hook(module, inputs, output):
            calls[name] = calls.get(name, 0) + 1
            frames[name] = frames.get(name, 0) + (output.shape[2] if output.ndim == 5 else len(output))

        return hook

    for name, module in vae.decoder.named_modules():
        if isinstance(module, (nn.Conv3d, nn.Conv2d)):
            handles.append(module.register_forward_hook(note(name)))
    work()
    for handle in handles:
        handle.remove()
    return calls, frames


def test_forms_of_the_result(pipe):
    call = {"num_videos_per_prompt": 2}
    array = run(pipe, **call)
    assert array.shape == (2, 5, HEIGHT, WIDTH, 3) and array.dtype == np.float32
    tensor = run(pipe, output_type="pt", **call)
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 1, 4, 2, 3))
    films = run(pipe, output_type="pil", **call)
    assert [len(film) for film in films] == [5, 5]
    levels = np.stack([np.stack([np.asarray(frame) for frame in film]) for film in films])
    assert np.array_equal(levels, np.round(array * 255).astype(np.uint8))
    latents = run(pipe, output_type="latent", **call)
    assert latents.shape == (2, 16, 2, 4, 6) and latents.dtype == torch.float32
    decoded = pipe.vae.decode(FrameCoder(pipe.vae).std * latents + FrameCoder(pipe.vae).mean).sample
    assert close((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1), array)
    call = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 1}
    assert isinstance(pipe(picture(), PROMPT, **call), ChronoEditPipelineOutput)
    (again,) = pipe(picture(), PROMPT, return_dict=False, **call)
    assert again.shape == (1, 5, HEIGHT, WIDTH, 3)


def test_a_film_of_29_is_25_frames_of_the_way_and_4_of_the_edit(pipe):
    """Bit for bit what two decodes give, although the photograph passes the decoder once."""
    z = torch.randn(2, 16, 8, 4, 6, generator=seeded())
    coder = FrameCoder(pipe.vae)
    film = coder.decode(z)
    raw = z * coder.std + coder.mean
    way, edit = pipe.vae.decode(raw[:, :, :-1]).sample, pipe.vae.decode(raw[:, :, [0, -1]]).sample
    assert film.shape[2] == 29
    assert torch.equal(film[:, :, :25], way) and torch.equal(film[:, :, 25:], edit[:, :, 1:])
    assert not close(film[:, :, 25:], pipe.vae.decode(raw).sample[:, :, 25:], 1e-2)
    calls, _ = convolved(pipe.vae, lambda: coder.decode(z))
    assert calls["conv_in"] == calls["conv_out"] == 8  # two decodes: 9


@pytest.mark.parametrize("frames", [1, 2, 4], ids="{} latent frames".format)
def test_the_last_frame_alone_is_equal_and_takes_no_more_than_it_needs(pipe, frames):
    z = torch.randn(2, 16, frames, 4, 6, generator=seeded())
    coder = FrameCoder(pipe.vae)
    assert close(coder.decode(z, only_last=True), coder.decode(z)[:, :, -1:], 1e-6)
    calls, made = convolved(pipe.vae, lambda: coder.decode(z, only_last=True))
    if frames == 1:
        assert set(calls.values()) == {1}
        return
    all_calls, all_made = convolved(pipe.vae, lambda: coder.decode(z[:, :, [0, -1]]))
    assert sum(calls.values()) == sum(all_calls.values()) - 2
    spared = {name: (all_made[name], made[name]) for name in made if made[name] != all_made[name]}
    last = len(pipe.vae.decoder.up_blocks[-1].resnets) - 1
    assert spared == {"conv_out": (5, 1), f"up_blocks.3.resnets.{last}.conv2": (5, 3)}


@pytest.mark.parametrize("call", [{}, reasoning(1), reasoning(2)], ids=["edit", "pruned", "whole"])
def test_only_last_frame_of_a_run(pipe, call):
    whole, last = run(pipe, **call), run(pipe, only_last_frame=True, **call)
    assert last.shape == (1, 1, HEIGHT, WIDTH, 3) and close(last[:, -1], whole[:, -1], 1e-6)
    (film,) = run(pipe, only_last_frame=True, output_type="pil", **call)
    assert len(film) == 1


@pytest.mark.slow
@pytest.mark.parametrize("tiled", [False, True], ids=["sliced", "tiled"])
def test_slices_and_tiles_apply_to_the_parts_of_a_film(pipe, tiled):
    z = torch.randn(2, 16, 3, 8, 10, generator=seeded())
    coder = FrameCoder(pipe.vae)
    raw = z * coder.std + coder.mean
    plain = coder.decode(z)
    try:
        if tiled:
            tile = {f"tile_sample_min_{side}": 48 for side in ("height", "width")}
            pipe.enable_vae_tiling(**tile, **{name.replace("min", "stride"): 32 for name in tile})
        else:
            pipe.enable_vae_slicing()
        film, last = coder.decode(z), coder.decode(z, only_last=True)
        way, edit = pipe.vae.decode(raw[:, :, :-1]).sample, pipe.vae.decode(raw[:, :, [0, -1]]).sample
    finally:
        pipe.disable_vae_tiling()
        pipe.disable_vae_slicing()
    assert close(film, torch.cat((way, edit[:, :, 1:]), dim=2), 1e-6) and close(last, film[:, :, -1:], 1e-6)
    assert close(film, plain, 1e-5) is not tiled


@pytest.mark.slow
@pytest.mark.parametrize("euler", [False, True], ids=["UniPC", "Euler"])
@pytest.mark.parametrize("k", range(5))
def test_frames_between_are_denoised_until_they_are_dropped(pipe, monkeypatch, k, euler):
    if euler:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    calls = counted(monkeypatch, pipe.transformer, "predict_branches", "rope")
    film = run(pipe, guidance_scale=1.0, num_inference_steps=4, **reasoning(k))
    assert [shape[2] for shape in calls["predict_branches"]] == [4] * k + [2] * (4 - k)
    assert [grid[0] for grid in calls["rope"]] == [4] * (k > 0) + [2] * (k < 4)
    assert film.shape[1] == (13 if k == 4 else 5)


def test_a_film_of_two_latent_frames_has_nothing_to_drop(pipe):
    for k in (0, 1, 2):
        assert np.array_equal(run(pipe, **reasoning(k, 5)), run(pipe))


def test_a_batch_gives_each_the_film_it_would_get_alone(pipe):
    photos, prompts = [picture(1), picture(2, 50, 50)], [PROMPT, OTHER]
    batch = run(pipe, photos, prompts, generator=[seeded(5), seeded(6)], **reasoning(1))
    for i in range(2):
        alone = run(pipe, photos[i], prompts[i], generator=seeded(5 + i), **reasoning(1))
        assert close(batch[i : i + 1], alone)
    assert not close(batch[0], batch[1], 0.01)


def test_films_of_a_prompt_follow_one_another(pipe):
    photos, prompts = [picture(1), picture(2)], [PROMPT, OTHER]
    call = {"negative_prompt": ["a", ""], "generator": [seeded(i) for i in range(4)]}
    batch = run(pipe, photos, prompts, num_videos_per_prompt=2, **call)
    for i in range(4):
        call = {"negative_prompt": ["a", ""][i // 2], "generator": seeded(i)}
        assert close(batch[i : i + 1], run(pipe, photos[i // 2], prompts[i // 2], **call))


def test_one_prompt_serves_several_photographs_and_one_photograph_several_prompts(pipe):
    photos = [picture(1), picture(2)]
    two = [seeded(1), seeded(2)]
    several = run(pipe, photos, [PROMPT], negative_prompt=[""], generator=two)
    assert close(several[1:], run(pipe, photos[1], generator=seeded(2)))
    two = [seeded(1), seeded(2)]
    shared = run(pipe, photos[0], [PROMPT, OTHER], generator=two)
    assert close(shared[1:], run(pipe, photos[0], OTHER, generator=seeded(2)))


def test_forms_of_a_photograph(pipe):
    photo = picture()
    wanted = run(pipe, photo)
    turned = photo.transpose(Image.Transpose.ROTATE_270)
    turned.getexif()[0x0112] = 8
    array = np.asarray(photo)
    forms = [
        photo.convert("RGBA"),
        turned,
        array,
        array.astype(np.float32) / 255,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        torch.from_numpy(array.astype(np.float32) / 255).permute(2, 0, 1)[None],
        [photo],
    ]
    for form in forms:
        assert np.array_equal(run(pipe, form), wanted)
    grey = photo.convert("L")
    assert np.array_equal(run(pipe, grey), run(pipe, grey.convert("RGB")))


def test_what_clip_sees_may_be_given(pipe, monkeypatch):
    seen = pipe.encode_image([picture(1), picture(2)])
    assert seen.shape == (2, 17, 32)
    calls = counted(monkeypatch, pipe.image_encoder, "hidden_states")
    encodes = counted(monkeypatch, pipe.vae, "encode")
    wanted = run(pipe, picture(1))
    given = run(pipe, picture(1), image_embeds=seen[:1])
    assert np.array_equal(given, wanted) and len(calls["hidden_states"]) == 1
    assert not close(run(pipe, picture(1), image_embeds=seen[1:]), wanted, 1e-3)

    # Without a photograph no pixel is known: the mask says so, and every frame is grey.
    conditions = counted(monkeypatch, pipe.transformer, "predict_branches")
    inputs = []
    predict = pipe.transformer.predict_branches
    monkeypatch.setattr(
        pipe.transformer, "predict_branches", lambda x, *a: inputs.append(x) or predict(x, *a)
    )
    blind = pipe(
        None, PROMPT, image_embeds=seen, height=HEIGHT, width=WIDTH, num_inference_steps=1, generator=seeded()
    ).frames
    assert blind.shape[0] == 2 and not close(blind[0], blind[1], 1e-3) and conditions["predict_branches"]
    assert not inputs[0][:, 16:20].any() and len(encodes["encode"]) == 4
    run(pipe, picture(1), num_inference_steps=1)
    assert (inputs[-1][:, 16:20, 0] == 1).all() and not inputs[-1][:, 16:20, 1:].any()


def test_embeddings_are_repeated_for_every_film(pipe):
    positive, negative = pipe.encode_prompt([PROMPT, OTHER], ["a", ""], max_sequence_length=512)
    generators = [seeded(i) for i in range(4)]
    call = {"num_videos_per_prompt": 2, "generator": generators}
    found = run(pipe, prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative, **call)
    call["generator"] = [seeded(i) for i in range(4)]
    wanted = run(pipe, prompt=[PROMPT, OTHER], negative_prompt=["a", ""], **call)
    assert close(found, wanted)
    half = run(pipe, prompt=None, prompt_embeds=positive[:1])  # the negative prompt is read, as ""
    assert close(half, run(pipe))
    with pytest.raises(ValueError, match="exactly one of prompt and prompt_embeds"):
        pipe.encode_prompt(None)
    assert pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)[1] is None
    assert pipe.encode_prompt(PROMPT, num_videos_per_prompt=3)[0].shape == (3, 226, 32)
    assert pipe.encode_prompt(PROMPT, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_shorter_prompts_and_what_is_cut_off(pipe, caplog):
    with caplog.at_level(logging.WARNING, "joyedit"):
        short, longer = run(pipe, max_sequence_length=12), run(pipe, max_sequence_length=40)
    assert not close(short, longer, 1e-4)  # padding is attended to
    cut = [record for record in caplog.messages if "cut" in record]
    assert not cut
    with caplog.at_level(logging.WARNING, "joyedit"):
        run(pipe, prompt="a cat is in the basket", max_sequence_length=4, negative_prompt="a cat is it")
    cut = [record for record in caplog.messages if "cut" in record]
    assert len(cut) == 2 and "cut to 4 tokens; lost: 'in the basket'" in cut[0] and "'it'" in cut[1]


@pytest.mark.slow
@pytest.mark.parametrize("k", [0, 2, 5])
def test_reasoning_without_being_enabled_is_told(pipe, caplog, k):
    with caplog.at_level(logging.WARNING, "joyedit"):
        assert run(pipe, num_frames=29, num_temporal_reasoning_steps=k).shape[1] == 5
    assert "need enable_temporal_reasoning=True: 5 frames are made" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "joyedit"):
        run(pipe, num_frames=5)
        run(pipe, **reasoning(0, 29))
    assert not caplog.messages
    with caplog.at_level(logging.WARNING, "joyedit"):
        run(pipe, **reasoning(0, 13))
    assert "trained with num_frames=29, not 13" in caplog.text


def test_a_photograph_of_another_shape_is_told(pipe, caplog):
    with caplog.at_level(logging.WARNING, "joyedit"):
        run(pipe, picture(0, 96, 64))
        run(pipe, picture(0, 100, 62))
    assert "photograph" not in caplog.text
    with caplog.at_level(logging.WARNING, "joyedit"):
        run(pipe, picture(0, 60, 120), height=64, width=64)
    assert "60 x 120 pixels is stretched to 64 x 64; width=32, height=80 would fit" in caplog.text


def test_adapters_are_scaled_for_one_call(pipe, checkpoint, caplog):
    plain = run(pipe)
    pipe.load_lora_weights(checkpoint / "lora", "style", weight_name="chronoedit_distill_lora.safetensors")
    try:
        whole = run(pipe)
        half = run(pipe, attention_kwargs={"scale": 0.5})
        none = run(pipe, attention_kwargs={"scale": 0})
        again = run(pipe)
        assert "no effect" not in caplog.text
        pipe.fuse_lora(lora_scale=0.5)
        fused = run(pipe, attention_kwargs={"scale": 0.5})
        assert "scale=0.5 has no effect" in caplog.text
        pipe.unfuse_lora()
    finally:
        pipe.unload_lora_weights()
    assert np.array_equal(none, plain) and np.array_equal(again, whole) and close(half, fused)
    assert not close(whole, plain, 1e-3) and not close(whole, half, 1e-3)


class Zero(PipelineCallback):
    tensor_inputs = ["latents", "prompt_embeds"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {name: torch.zeros_like(tensor) for name, tensor in callback_kwargs.items()}


def test_callbacks_see_and_replace(pipe):
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        return {}

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    watched = run(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names, **reasoning(1))
    assert np.array_equal(watched, run(pipe, **reasoning(1)))
    text = (1, 512, 32)
    shapes = [{"latents": (1, 16, t, 4, 6), names[1]: text, names[2]: text} for t in (4, 2)]
    assert seen == [(0, 999, shapes[0]), (1, 833, shapes[1])] and pipe.num_timesteps == 2
    assert not run(pipe, output_type="latent", callback_on_step_end=Zero()).any()


def test_callbacks_without_guidance(pipe):
    """There is no negative prompt then, and what is not there can be handed back, but not replaced."""
    names = ["latents", "negative_prompt_embeds"]
    call = {"guidance_scale": 1.0, "callback_on_step_end_tensor_inputs": names}
    same = run(pipe, callback_on_step_end=lambda pipe, step, time, tensors: tensors, **call)
    assert np.array_equal(same, run(pipe, guidance_scale=1.0))
    for returned in ({"negative_prompt_embeds": EMBEDS}, {"latents": None}):
        with pytest.raises(ValueError, match=f"the callback returned a {next(iter(returned))} in place of"):
            run(pipe, callback_on_step_end=lambda *_, made=returned: made, **call)


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_changed_embeddings_are_used_from_the_next_step(pipe, name):
    def change(pipe, step, timestep, tensors):
        return {name: -tensors[name]}

    call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": [name]}
    latents = {"output_type": "latent"}
    assert not close(run(pipe, **call, **latents), run(pipe, **latents), 1e-3)
    last = {"num_inference_steps": 1, **latents}
    assert torch.equal(run(pipe, **call, **last), run(pipe, **last))


def test_guidance_may_end_before_the_run(pipe, monkeypatch):
    def end(pipe, step, timestep, tensors):
        pipe.guidance_scale = 1.0
        return {}

    calls = counted(monkeypatch, pipe.transformer, "predict_branches")
    run(pipe, num_inference_steps=3, callback_on_step_end=end)
    assert len(calls["predict_branches"]) == 2 + 1 + 1 and not pipe.do_classifier_free_guidance


def test_interrupt_stops_after_the_step(pipe):
    counts = []

    def stop(pipe, step, timestep, tensors):
        pipe.interrupt = step == 1
        counts.append(pipe.scheduler.step_index)
        return {}

    film = run(pipe, num_inference_steps=5, callback_on_step_end=stop, **reasoning(4))
    assert film.shape[1] == 13 and counts == [1, 2] and pipe.interrupt
    run(pipe, num_inference_steps=2, callback_on_step_end=lambda pipe, *_: counts.append(pipe.num_timesteps))
    assert not pipe.interrupt and counts[2:] == [2, 2]


def test_progress_counts_the_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    run(pipe, num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


def test_what_does_not_change_is_computed_once(pipe, monkeypatch):
    photo = picture(1)
    network = counted(
        monkeypatch, pipe.transformer, "embed_text", "embed_image", "embed_time", "rope", "predict_branches"
    )
    text = counted(monkeypatch, pipe.text_encoder.encoder, "forward")
    encodes = counted(monkeypatch, pipe.vae, "encode")
    clip = counted(monkeypatch, pipe.image_encoder, "hidden_states")
    tower = getattr(pipe.image_encoder, "vision_model", pipe.image_encoder)
    last = tower.encoder.layers[-1]
    monkeypatch.setattr(last, "forward", lambda x: pytest.fail("nothing reads the last layer of CLIP"))
    call = {"num_inference_steps": 3, "num_videos_per_prompt": 2, **reasoning(1)}
    run(pipe, [photo, photo], [PROMPT, PROMPT], **call)
    tokens = len(pipe.tokenizer.encode(PROMPT)) + 1  # and </s> of the empty negative prompt
    assert text["forward"] == [(tokens, 32)]
    assert encodes["encode"] == [(1, 3, 13, HEIGHT, WIDTH)] and [s[0] for s in clip["hidden_states"]] == [1]
    assert network["embed_text"] == [(1, 512, 32)] * 2 and network["embed_image"] == [(1, 17, 32)]
    assert network["embed_time"] == [(3,)] and network["rope"] == [(4, 2, 3), (2, 2, 3)]
    assert [shape[:3] for shape in network["predict_branches"]] == [(4, 36, 4)] * 2 + [(4, 36, 2)] * 4


def test_sequential_offload_brings_what_is_called_by_itself(loaded, monkeypatch):
    """In main memory the blocks' weights have the wrong sign, which only the copies for a call have not."""
    call = {"output_type": "latent", "num_inference_steps": 1, **reasoning(1)}
    pipe = ChronoEditPipeline(**copy.deepcopy(loaded.components))
    wanted = [run(pipe, **call), run(pipe, only_last_frame=True), run(pipe, **reasoning(2))]
    pipe.set_offload("sequential", device="cpu")
    monkeypatch.setattr(Transfers, "start", lambda self, target, source, after: target.copy_(-source))
    for network in pipe.networks.values():
        for parameter in {p for block in blocks_of(network) for p in block.parameters()}:
            parameter.data = -parameter.data
    found = [run(pipe, **call), run(pipe, only_last_frame=True), run(pipe, **reasoning(2))]
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not pipe.vae.block_streaming.passing.here


def test_half_precision_networks_leave_latents_and_guidance_in_fp32(loaded, checkpoint):
    exact = run(ChronoEditPipeline(**loaded.components), output_type="latent")
    parts = ChronoEditPipeline.from_pretrained(checkpoint, dtype="bfloat16").components
    for name, network in loaded.networks.items():
        parts[name].load_state_dict(network.state_dict())
    half = ChronoEditPipeline(**parts)
    assert half.transformer.dtype == torch.bfloat16
    latents = run(half, output_type="latent")
    assert latents.dtype == torch.float32 and not torch.equal(latents, latents.bfloat16().float())
    assert close(latents, exact, 0.05 * float(exact.abs().max())) and np.isfinite(run(half)).all()


EMBEDS = torch.zeros(1, 4, 32)
BAD_CALLS = [
    (dict(prompt=None), "exactly one of prompt and prompt_embeds"),
    (dict(prompt_embeds=EMBEDS), "exactly one of prompt and prompt_embeds"),
    (dict(prompt=7), "prompt must be a string"),
    (dict(prompt=[]), "prompt must be a string or a non-empty list"),
    (dict(negative_prompt="a", negative_prompt_embeds=EMBEDS), "negative_prompt or .*, not both"),
    (dict(negative_prompt=3), "negative_prompt must be a string"),
    (dict(negative_prompt=["a", "b"]), "negative_prompt is a list of 2, but there are 1"),
    (dict(negative_prompt_embeds=EMBEDS.repeat(2, 1, 1)), "for 2 prompts, but there are 1"),
    (dict(prompt=None, prompt_embeds=EMBEDS.numpy()), "prompt_embeds is a ndarray"),
    (dict(prompt=None, prompt_embeds=EMBEDS[..., :31]), r"wanted \(B, tokens, 32\)"),
    (dict(prompt=None, prompt_embeds=EMBEDS / 0), "prompt_embeds hold NaN"),
    (dict(image_embeds=EMBEDS[0]), "image_embeds have shape"),
    (dict(image=None), "image is needed"),
    (dict(image="photo.png"), "image is a str"),
    (dict(image=[]), "image is an empty list"),
    (dict(image=torch.full((3, 8, 8), 2.0)), r"must be in \[0, 1\]"),
    (dict(image=[picture()] * 3, prompt=["a", "b"]), "2 prompt, 3 image: give one for all"),
    (dict(image_embeds=EMBEDS.repeat(3, 1, 1), prompt=["a", "b"]), "give one for all, or one for each"),
    (dict(height=40), "height=40: must be a positive multiple of 16"),
    (dict(width=24), "width=24: must be a positive multiple of 16"),
    (dict(width=48.0), "width=48.0"),
    (dict(height=-16), "height=-16"),
    (dict(width=16400), "width=16400: must be at most 16384"),
    (dict(num_frames=0), "num_frames=0"),
    (dict(num_frames=29.0), "num_frames=29.0"),
    (dict(**reasoning(0, 5001)), "num_frames=5001"),
    (dict(**reasoning(3)), "num_temporal_reasoning_steps=3: must be 0 to 2"),
    (dict(**reasoning(-1)), "num_temporal_reasoning_steps=-1: must be 0 to 2"),
    (dict(**reasoning(1.0)), "num_temporal_reasoning_steps=1.0"),
    (dict(num_inference_steps=0), "num_inference_steps=0"),
    (dict(num_inference_steps=2.5), "num_inference_steps=2.5"),
    (dict(guidance_scale=float("nan")), "guidance_scale=nan"),
    (dict(guidance_scale="5"), "guidance_scale='5'"),
    (dict(num_videos_per_prompt=0), "num_videos_per_prompt=0"),
    (dict(max_sequence_length=0), "max_sequence_length=0"),
    (dict(output_type="mp4"), "output_type='mp4': must be one of pil, np, pt, latent"),
    (dict(attention_kwargs={"gligen": 1}), r"attention_kwargs has \['gligen'\]"),
    (dict(attention_kwargs={"scale": "1"}), "scale='1': must be a finite number"),
    (dict(callback_on_step_end=3), "callback_on_step_end is a int"),
    (dict(callback_on_step_end_tensor_inputs=["noise"]), "'noise'.*only"),
    (dict(generator=[seeded(), seeded()]), "list of 2, but there are 1"),
    (dict(generator=0), "generator is, or holds, a int"),
    (dict(latents=torch.zeros(1, 16, 2, 4, 5)), r"wanted \(1, 16, 2, 4, 6\)"),
    (dict(latents=torch.zeros(1, 16, 2, 4, 6), **reasoning(0)), r"wanted \(1, 16, 4, 4, 6\)"),
    (dict(latents=torch.full((1, 16, 2, 4, 6), float("inf"))), "NaN or infinite"),
    (dict(latents=[0.0]), "latents is a list"),
    (dict(preset="fast"), "preset='fast': known are"),
    (dict(preset="distill", num_inference_steps=50, **reasoning(51)), "must be 0 to 50"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[message for _, message in BAD_CALLS])
def test_bad_arguments_are_refused_before_any_work(pipe, monkeypatch, call, message):
    for network in pipe.networks.values():
        for name in ("encode", "decode_with", "hidden_states", "embed_image", "embed_text"):
            if hasattr(network, name):
                monkeypatch.setattr(network, name, lambda *a, **k: pytest.fail("work before the check"))
    usual = {"image": picture(), "prompt": "a", "height": 32, "width": 48, "num_inference_steps": 2}
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{**usual, **call})


def test_parts_that_do_not_fit_are_refused(loaded, checkpoint):
    from joyedit import ChronoEditTransformer3DModel

    config = loaded.transformer.config
    for changes, message in (
        ({"text_dim": 40}, "text_dim=40, but the other parts make 32"),
        ({"image_dim": 40}, "image_dim=40"),
        ({"in_channels": 32}, "in_channels=32, but the other parts make 36"),
        ({"out_channels": 8}, "do not fit"),
    ):
        with torch.device("meta"):
            other = ChronoEditTransformer3DModel(config.replace(**changes))
        with pytest.raises(ValueError, match=message):
            ChronoEditPipeline(**{**loaded.components, "transformer": other})
    with pytest.raises(TypeError, match="scheduler is a str"):
        ChronoEditPipeline(**{**loaded.components, "scheduler": "UniPC"})
    with pytest.raises(TypeError, match="vae is a object: ChronoEditPipeline takes Auto"):
        ChronoEditPipeline.from_pretrained(checkpoint, vae=object())
