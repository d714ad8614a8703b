"""Presets of ChronoEdit: what they set, their adapters and words, and what is said of half of one."""

import numpy as np
import pytest
import torch

from benchmarks.random_checkpoint import write_random_chronoedit_checkpoint
from joyedit import ChronoEditPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from joyedit.pipelines.chronoedit_presets import PRESETS, shift_of, with_shift
from tests.pipelines.tiny_chronoedit import HEIGHT, PROMPT, WIDTH, counted, loaded_from, picture, run, seeded


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


def messages(caplog):
    found = [message for message in caplog.messages if "distilled" in message]
    caplog.clear()
    return found


def test_preset_sets_what_the_call_leaves_open(pipe, caplog, monkeypatch):
    assert (PRESETS["distill"].num_inference_steps, PRESETS["distill"].guidance_scale) == (8, 1.0)
    calls = counted(monkeypatch, pipe.transformer, "predict_branches")
    before = pipe.scheduler
    wanted = {"num_inference_steps": 8, "guidance_scale": 1.0}
    plain = {"height": HEIGHT, "width": WIDTH}
    seen = []

    def look(pipe, step, timestep, tensors):
        seen.append((shift_of(pipe.scheduler), pipe.scheduler.timesteps[step] == timestep))

    call = {"preset": "distill", "callback_on_step_end": look}
    found = pipe(picture(), PROMPT, generator=seeded(), **call, **plain).frames
    assert seen == [(2.0, True)] * 8
    assert len(calls["predict_branches"]) == 8 and pipe.scheduler is before and shift_of(before) == 5.0
    assert len(messages(caplog)) == 1  # no adapter
    pipe.scheduler = UniPCMultistepScheduler.from_config(before.config, flow_shift=2.0)
    assert np.array_equal(found, run(pipe, **wanted)) and not messages(caplog)
    pipe.preset = "distill"
    assert np.array_equal(found, pipe(picture(), PROMPT, generator=seeded(), **plain).frames)
    calls["predict_branches"].clear()
    run(pipe, num_inference_steps=3, guidance_scale=2.0)
    assert len(calls["predict_branches"]) == 6
    (message,) = messages(caplog)[1:]
    assert "num_inference_steps=8, guidance_scale=1, flow_shift=2" in message
    assert "here there is num_inference_steps=3, guidance_scale=2, no adapter" in message


def test_preset_with_its_adapter_is_one_call(pipe, checkpoint, caplog):
    path = checkpoint / "lora" / "chronoedit_distill_lora.safetensors"
    by_hand = ChronoEditPipeline(**pipe.components)
    by_hand.set_progress_bar_config(disable=True)
    try:
        by_hand.load_lora_weights(path)
        run(by_hand)
        (message,) = messages(caplog)
        assert message.endswith("num_inference_steps=2, guidance_scale=5, flow_shift=5")
        by_hand.fuse_lora()
        run(by_hand)
        assert messages(caplog)
        by_hand.scheduler = UniPCMultistepScheduler.from_config(by_hand.scheduler.config, flow_shift=2.0)
        wanted = run(by_hand, num_inference_steps=8, guidance_scale=1.0)
        assert not messages(caplog)
    finally:
        by_hand.unfuse_lora()
        by_hand.unload_lora_weights()
    run(by_hand)
    assert not messages(caplog)
    try:
        report = pipe.use_preset("distill", lora=path, reversible=True)
        assert report.name == "distill" and pipe.adapters.fused_loras == {"distill"}
        assert pipe.preset == "distill" and shift_of(pipe.scheduler) == 2.0
        found = pipe(picture(), PROMPT, generator=seeded(), height=HEIGHT, width=WIDTH).frames
        assert np.array_equal(found, wanted) and not messages(caplog)
    finally:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()


@pytest.mark.parametrize("name", ["my-Distill", "style"])
def test_a_distilled_adapter_is_known_by_its_name_or_its_file(pipe, checkpoint, caplog, name):
    options = {"weight_name": "chronoedit_distill_lora.safetensors"}
    if name == "my-Distill":
        (checkpoint / "lora" / "steps.safetensors").write_bytes(
            (checkpoint / "lora" / options["weight_name"]).read_bytes()
        )
        options["weight_name"] = "steps.safetensors"
    try:
        pipe.load_lora_weights(checkpoint / "lora", name, **options)
        run(pipe, num_inference_steps=1)
    finally:
        pipe.unload_lora_weights()
    assert messages(caplog)


def test_another_adapter_is_no_reason_to_warn(pipe, checkpoint, caplog):
    (checkpoint / "lora" / "brush.safetensors").write_bytes(
        (checkpoint / "lora" / "chronoedit_distill_lora.safetensors").read_bytes()
    )
    try:
        pipe.load_lora_weights(str(checkpoint / "lora" / "brush.safetensors"))
        run(pipe, num_inference_steps=1)
    finally:
        pipe.unload_lora_weights()
    assert not messages(caplog)


def test_failing_presets_change_nothing(pipe, tmp_path):
    before = pipe.scheduler
    with pytest.raises(ValueError, match="preset='fast': known are \\['distill', 'paintbrush', 'upscale'\\]"):
        pipe.use_preset("fast")
    with pytest.raises(FileNotFoundError):
        pipe.use_preset("distill", lora=tmp_path / "nothing.safetensors")
    assert pipe.preset is None and pipe.scheduler is before and not pipe.get_active_adapters()


SKETCH = "The user wants to change the sketch to a "


def test_presets_have_words_of_their_own(pipe, monkeypatch):
    read = []
    embed = type(pipe)._embed
    monkeypatch.setattr(
        type(pipe), "_embed", lambda self, texts, length: read.extend(texts) or embed(self, texts, length)
    )
    plain = dict(height=HEIGHT, width=WIDTH, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    for preset, prompt, said in (
        ("upscale", None, PRESETS["upscale"].prompt),
        ("upscale", "Make the words readable.", "Make the words readable."),
        ("paintbrush", "a cat", SKETCH + "cat"),
        ("paintbrush", "crown", SKETCH + "crown"),
        ("paintbrush", PRESETS["paintbrush"].prompt.format("hat"), SKETCH + "hat"),
        ("paintbrush", ["an owl", "a"], SKETCH + "a"),
        ("distill", PROMPT, PROMPT),
    ):
        read.clear()
        pipe(picture(), prompt, preset=preset, generator=seeded(), **plain)
        assert read[-1].endswith(said) and read[-1].startswith(
            said[:4] if SKETCH not in said else "Turn the pencil"
        )
    assert PRESETS["upscale"].prompt.startswith("The user want to enhance image clarity")
    with pytest.raises(ValueError, match="preset='paintbrush' needs a prompt"):
        pipe(picture(), preset="paintbrush", **plain)
    with pytest.raises(ValueError, match="exactly one of prompt"):
        pipe(picture(), preset="distill", **plain)


def test_a_preset_of_two_adapters(pipe, checkpoint):
    path = checkpoint / "lora" / "chronoedit_distill_lora.safetensors"
    with pytest.raises(
        ValueError, match="preset='paintbrush' has 2 adapters: .*distill_lora.* and .*paintbrush_lora"
    ):
        pipe.use_preset("paintbrush", lora=path)
    with pytest.raises(FileNotFoundError):
        pipe.use_preset("paintbrush", lora=[path, checkpoint / "nothing.safetensors"])
    assert pipe.preset is None and not pipe.get_active_adapters() and not pipe.get_list_adapters()
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    try:
        pipe.use_preset("paintbrush", lora=[path, path], reversible=True)
        assert pipe.adapters.fused_loras == {"distill", "paintbrush"} == {*pipe.get_active_adapters()}
        twice = {n: t.clone() for n, t in pipe.transformer.state_dict().items()}
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        pipe.use_preset("distill", lora=path, reversible=True)
        once = pipe.transformer.state_dict()
        changed = [name for name in before if not torch.equal(before[name], once[name])]
        assert changed
        for name in changed:  # the same factors twice are twice the change
            torch.testing.assert_close(
                twice[name] - before[name], 2 * (once[name] - before[name]), rtol=1e-3, atol=1e-5
            )
    finally:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()


def test_shifts_of_both_schedulers():
    euler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    moved = with_shift(euler, 2.0)
    assert type(moved) is type(euler) and shift_of(moved) == 2.0 and shift_of(euler) == 5.0
    assert with_shift(moved, 2.0) is moved
    euler.set_shift(3.0)
    assert shift_of(euler) == 3.0 and shift_of(with_shift(euler, 5.0)) == 5.0
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    joint = UniPCMultistepScheduler(**flow, solver_p=UniPCMultistepScheduler(**flow))
    with pytest.raises(ValueError, match="solver_p"):
        with_shift(joint, 2.0)
