"""Encoders called as transformers calls them: masks that say nothing, hidden states, plain tuples."""

import logging

import pytest
import torch
import transformers

import joyedit

TEXT = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 24,
}
UMT5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}
QWEN_TEXT = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
}
QWEN_VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
IMAGE, START, END = 70, 71, 72


def qwen_config():
    return transformers.Qwen3VLConfig(
        text_config=QWEN_TEXT,
        vision_config=QWEN_VISION,
        image_token_id=IMAGE,
        video_token_id=73,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )


CONFIGS = {
    "CLIPTextModel": lambda: transformers.CLIPTextConfig(**TEXT, **HEADS, eos_token_id=59, bos_token_id=1),
    "CLIPVisionModel": lambda: transformers.CLIPVisionConfig(**VISION, **HEADS),
    "CLIPVisionModelWithProjection": lambda: transformers.CLIPVisionConfig(**VISION, **HEADS),
    "UMT5EncoderModel": lambda: transformers.UMT5Config(**UMT5),
    "Qwen3VLForConditionalGeneration": qwen_config,
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Class -> (ours, theirs), of the same weights."""
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(1)
        theirs = getattr(transformers, name)(config()).eval().requires_grad_(False)
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
        folder = tmp_path_factory.mktemp(name)
        theirs.save_pretrained(folder)
        made[name] = getattr(joyedit, name).from_pretrained(folder), theirs
    return made


def inputs_of(name):
    ids = torch.tensor([[1, 7, 9, 4, 59], [1, 8, 3, 2, 59]])
    if name.startswith("CLIPVision"):
        return {"pixel_values": torch.randn(2, 3, 28, 28)}
    if name.startswith("Qwen"):
        image = [START, IMAGE, IMAGE, END]
        ids = torch.tensor([[1, *image, 7, 8], [2, *image, 9, 3]])
        patches = torch.rand(16, 3 * 2 * 4 * 4) * 2 - 1
        kinds = (ids == IMAGE).int()
        grid = torch.tensor([[1, 2, 4], [1, 2, 4]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": kinds,
        }
    return {"input_ids": ids}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_those_of_the_reference(networks, name):
    ours, theirs = networks[name]
    inputs = inputs_of(name)
    expected = theirs(**inputs, output_hidden_states=True, return_dict=True)
    found = ours(**inputs, output_hidden_states=True, return_dict=True)
    assert len(found.hidden_states) == len(expected.hidden_states) > 3
    for mine, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(mine, other)
    for field in ("last_hidden_state", "pooler_output", "image_embeds", "logits"):
        assert hasattr(found, field) == (getattr(expected, field, None) is not None)
        if hasattr(found, field):
            close(getattr(found, field), expected[field])


@pytest.mark.parametrize("name", CONFIGS)
def test_tuples_and_words_that_ask_for_nothing(networks, name):
    ours, theirs = networks[name]
    inputs = inputs_of(name)
    expected = theirs(**inputs, return_dict=False)
    found = ours(**inputs, output_hidden_states=False, return_dict=False, output_attentions=False)
    assert type(found) is tuple
    close(found[0], expected[0])
    assert len(ours(**inputs, output_hidden_states=True, return_dict=False)) == len(found) + 1
    usual = ours(**inputs)
    assert torch.equal(usual[0], found[0]) and len(usual) == len(found)
    with pytest.raises(ValueError, match="output_attentions is not supported here: attention does not hold"):
        ours(**inputs, output_attentions=True)
    with pytest.raises(TypeError, match="an encoder has no argument 'colour'"):
        ours(**inputs, colour=1)


def test_a_mask_that_says_nothing_is_taken(networks):
    ours, _ = networks["CLIPTextModel"]
    ids = inputs_of("CLIPTextModel")["input_ids"]
    expected = ours(ids).last_hidden_state
    assert torch.equal(ours(ids, attention_mask=None).last_hidden_state, expected)
    assert torch.equal(ours(ids, attention_mask=torch.ones_like(ids)).last_hidden_state, expected)
    with pytest.raises(ValueError, match="attention_mask leaves tokens out"):
        ours(ids, attention_mask=torch.tensor([[1, 1, 0, 0, 0]] * 2))


def test_hidden_states_of_padded_prompts(networks):
    """Rows of padding are zero here, and whatever the reference computes there."""
    ours, theirs = networks["UMT5EncoderModel"]
    ids = torch.tensor([[5, 7, 9, 1], [5, 1, 0, 0]])
    mask = (ids != 0).long()
    expected = theirs(ids, mask, output_hidden_states=True).hidden_states
    found = ours(ids, mask, output_hidden_states=True).hidden_states
    for mine, other in zip(found, expected, strict=True):
        close(mine[mask.bool()], other[mask.bool()])
        assert not mine[~mask.bool()].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_counts(networks, name):
    ours, theirs = networks[name]
    theirs = theirs.float()
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.num_parameters(only_trainable=True) == 0
    assert ours.num_parameters(exclude_embeddings=True) < ours.num_parameters()
    if name != "Qwen3VLForConditionalGeneration":  # theirs has tables that are computed, as buffers
        assert ours.get_memory_footprint() == 4 * ours.num_parameters()


def test_hidden_states_in_half_precision(networks, caplog):
    caplog.set_level(logging.WARNING)
    ours, _ = networks["CLIPVisionModelWithProjection"]
    pixels = inputs_of("CLIPVisionModel")["pixel_values"]
    states = ours(pixels.bfloat16(), output_hidden_states=True).hidden_states
    assert {state.dtype for state in states} == {torch.bfloat16}
    assert torch.equal(states[-2], ours.hidden_states(pixels.bfloat16(), -2))
    assert not caplog.records
