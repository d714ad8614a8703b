"""What a notebook shows of a pipeline, its adapters and settings; parts and embeddings of another kind."""

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit


@pytest.fixture(scope="module")
def pipe():
    return joyedit.load("tiny-joyimage", device="cpu")


def adapter(pipe):
    """Tensors of an adapter of one layer."""
    name, tensor = next((n, p) for n, p in pipe.transformer.named_parameters() if p.ndim == 2)
    layer = f"transformer.{name.removesuffix('.weight')}"
    up, down = torch.zeros(tensor.shape[0], 2), torch.zeros(2, tensor.shape[1])
    return {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}


def test_a_pipeline_shows_a_part_a_line(pipe):
    name, *lines = repr(pipe).splitlines()
    assert name == "JoyImageEditPipeline" and [line.split()[0] for line in lines] == list(pipe.components)
    shown = {line.split()[0]: line.split()[1:] for line in lines}
    count = f"{sum(p.numel() for p in pipe.vae.parameters()):,}"
    assert shown["vae"] == ["AutoencoderKLWan", count, "parameters", "bfloat16", "cpu"]
    assert shown["tokenizer"] == ["Qwen2Tokenizer"] and "bfloat16 + float32" in repr(pipe)
    assert max(map(len, lines)) < 120


def test_adapters_show_where_they_are(pipe):
    assert repr(pipe.adapters) == "no adapters"
    for name in ("first", "second", "third"):
        pipe.load_lora_weights(adapter(pipe), name)
    try:
        pipe.set_adapters(["second"], [0.5])
        pipe.fuse_lora(0.25, ["third"])
        lines = ["Adapters", "  first   loaded for transformer", "  second  active in transformer with 0.5"]
        lines.append("  third   fused into transformer with 0.25")
        assert repr(pipe.adapters).splitlines() == lines
        assert all(f"  {line}" in repr(pipe).splitlines() for line in lines[1:])
        pipe.adapters.disable_lora()
        assert "active in transformer with 0.5, disabled" in repr(pipe.adapters)
    finally:
        pipe.adapters.enable_lora()
        pipe.unfuse_lora()
        pipe.unload_lora_weights()


def test_settings_show_one_a_line_and_those_inside_them_further_in(pipe):
    config = pipe.text_encoder.config
    lines = repr(config).splitlines()
    assert lines[0] == "Qwen3VLConfig(" and lines[-1] == ")"
    assert (
        "  text_config=Qwen3VLTextConfig(" in lines
        and f"    hidden_size={config.text_config.hidden_size}," in lines
    )
    assert repr(copy.deepcopy(config)) == repr(config) == repr(pickle.loads(pickle.dumps(config)))
    for part in pipe.networks.values():
        assert all(f"  {key}=" in repr(part.config) for key in part.config)


def test_a_scheduler_of_another_library_is_named(pipe):
    import diffusers

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    wanted = (
        "joyedit, not of diffusers: FlowMatchEulerDiscreteScheduler.from_config.scheduler.config. makes one"
    )
    with pytest.raises(TypeError, match=wanted):
        pipe.scheduler = theirs
    assert joyedit.FlowMatchEulerDiscreteScheduler.from_config(theirs.config).config.shift == 2.0


@pytest.mark.parametrize("name", ["tiny-joyimage", "tiny-diffedit", "tiny-chronoedit"])
@pytest.mark.parametrize(
    ("embeds", "told"),
    [
        ([1, 2], "is a list: must be a tensor"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)), "is a tuple: must be a tensor"),
        (np.zeros((1, 3, 4)), "is a ndarray: must be a tensor"),
        ("text", "is a str: must be a tensor"),
        (5, "is a int: must be a tensor"),
        (torch.tensor(3.0), "has no axes: must be a tensor"),
    ],
)
def test_embeddings_of_another_form_are_named(name, embeds, told):
    pipe, picture = joyedit.load(name, device="cpu"), Image.new("RGB", (96, 96))
    for kind in ("prompt_embeds", "negative_prompt_embeds"):
        words = {"prompt": "x"} if kind != "prompt_embeds" else {}
        with pytest.raises(TypeError, match=f"{kind} {told}"):
            if name == "tiny-diffedit":
                pipe.invert(image=picture, **words, **{kind: embeds})
            else:
                pipe(image=picture, **words, **{kind: embeds}, height=96, width=96)
