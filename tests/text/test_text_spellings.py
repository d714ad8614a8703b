"""What users of transformers type when they call tokenizers and processors, beside transformers."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

import joyedit
from joyedit.checkpoints.missing import NotHereError
from joyedit.text.tokenizer import TextTokenizer

ASSETS = Path(joyedit.__file__).parent / "assets"
FOLDERS = {
    "CLIPTokenizer": ASSETS / "tiny-diffedit" / "tokenizer",
    "Qwen2Tokenizer": ASSETS / "tiny-joyimage" / "tokenizer",
    "T5TokenizerFast": ASSETS / "tiny-chronoedit" / "tokenizer",
}
TEXTS = ["a red circle", "two blue squares beside a green circle and more"]


@pytest.fixture(params=FOLDERS)
def pair(request):
    """A tokenizer of ours and transformers' of the same folder."""
    folder = FOLDERS[request.param]
    return (
        getattr(joyedit, request.param).from_pretrained(folder),
        getattr(transformers, request.param).from_pretrained(folder),
    )


CALLS = {
    "np": {"padding": True, "return_tensors": "np"},
    "no special tokens": {"add_special_tokens": False},
    "no special tokens, cut": {
        "add_special_tokens": False,
        "truncation": True,
        "max_length": 3,
        "padding": "max_length",
    },
    "do_not_pad": {"padding": "do_not_pad", "truncation": "do_not_truncate"},
    "longest_first": {"padding": "longest", "truncation": "longest_first", "max_length": 4},
    "no mask": {"return_attention_mask": False, "padding": True, "return_tensors": "pt"},
    "right": {"padding_side": "right", "padding": True, "return_overflowing_tokens": False},
}


@pytest.mark.parametrize("call", CALLS)
def test_calls(pair, call):
    ours, theirs = pair
    found, expected = ours(TEXTS, **CALLS[call]), theirs(TEXTS, **CALLS[call])
    assert set(found) == set(expected) - {"token_type_ids"}
    for name, value in found.items():
        assert type(value) is type(expected[name])
        assert (
            np.array_equal(value, expected[name])
            if call == "np"
            else list(map(list, value)) == list(map(list, expected[name]))
        )
    assert ours.encode(TEXTS[1], add_special_tokens=False) == theirs.encode(
        TEXTS[1], add_special_tokens=False
    )


def test_one_text_as_arrays(pair):
    ours, theirs = pair
    found, expected = (one("a red circle", return_tensors="np")["input_ids"] for one in (ours, theirs))
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.int64
    assert np.array_equal(found, expected)


def test_added_tokens_are_counted(pair):
    ours, theirs = pair
    more = len(theirs) - len(ours)  # transformers adds 100 words to every T5
    for new in (["<one>", "<two>"], ["<two>", "<three>"], "<three>", [], ["<one>", "<one>"]):
        assert ours.add_tokens(new) == theirs.add_tokens(new)
        assert len(ours) + more == len(theirs)
    assert ours.add_tokens(["<special>"], special_tokens=True) == 1
    theirs.add_tokens(["<special>"], special_tokens=True)
    if more:
        return
    text = "a <one> circle<special><three>"
    assert ours(text).input_ids == theirs(text).input_ids
    ids = ours(text).input_ids
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)


def test_every_public_name_is_here_or_named(pair):
    ours, theirs = pair
    for public in (n for n in dir(theirs) if not n.startswith("_")):
        try:
            getattr(ours, public)
        except NotHereError as error:
            assert not hasattr(ours, public) and len(str(error)) > 30
    with pytest.raises(AttributeError, match="object has no attribute 'nothing'"):
        ours.nothing  # noqa: B018


def test_saving_words(pair, tmp_path):
    ours, _ = pair
    ours.save_pretrained(save_directory=tmp_path, push_to_hub=False)
    assert type(ours).from_pretrained(tmp_path)(TEXTS) == ours(TEXTS)
    with pytest.raises(ValueError, match="push_to_hub=True"):
        ours.save_pretrained(tmp_path, push_to_hub=True)


def test_a_property_that_fails_says_so_itself():
    class Own(TextTokenizer):
        @property
        def broken(self):
            return self.lost_inside  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="lost_inside"):
        Own.__new__(Own).broken  # noqa: B018


SIZES = [
    {"size": 32},
    {"size": {"shortest_edge": 32}, "crop_size": 32},
    {"size": 33, "crop_size": {"height": 50, "width": 49}},
    {"size": 40, "crop_size": {"height": 30, "width": 50}},
    {"crop_size": 48, "image_mean": [0.5, 0.5, 0.5]},
]


@pytest.mark.parametrize("settings", SIZES, ids=str)
def test_image_processors_from_settings(settings):
    noise = np.random.default_rng(0).integers(0, 255, (41, 60, 3), np.uint8)
    photo = PIL.Image.fromarray(noise)
    expected = transformers.CLIPImageProcessorPil(**settings)(photo, return_tensors="pt")
    ours = joyedit.CLIPImageProcessor(**settings)
    found = ours(photo, return_tensors="pt")
    assert torch.equal(found.pixel_values, expected.pixel_values)
    assert found.to(dtype=torch.bfloat16).pixel_values.dtype == torch.bfloat16
    assert found["pixel_values"] is found.pixel_values


def test_unknown_image_settings_are_refused():
    with pytest.raises(ValueError, match="do_resize=False is not supported"):
        joyedit.CLIPImageProcessor(do_resize=False)


def test_processors_names():
    ours = joyedit.CLIPImageProcessor()
    for public in (n for n in dir(transformers.CLIPImageProcessorPil()) if not n.startswith("_")):
        try:
            getattr(ours, public)
        except NotHereError:
            assert not hasattr(ours, public)
    processor = joyedit.load("tiny-joyimage", device="cpu").processor
    for public in (n for n in dir(transformers.Qwen3VLProcessor) if not n.startswith("_")):
        try:
            getattr(processor, public)
        except NotHereError:
            assert not hasattr(processor, public)
