"""Tokenizers and learned words of strangers: values of other types and sizes are refused, by file and key."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from joyedit.models.clip import CLIPTextModel
from joyedit.text import tokenizer_files
from joyedit.text.clip_tokenizer import CLIPTokenizer
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer
from joyedit.text.qwen3_vl_processor import Qwen3VLProcessor
from joyedit.text.textual_inversion import TextualInversion

ASSETS = Path(__file__).parents[2] / "joyedit" / "assets"
CLIP, QWEN, PROCESSOR = "tiny-diffedit/tokenizer", "tiny-joyimage/tokenizer", "tiny-joyimage/processor"
WIDTH = 12


@pytest.fixture
def folder(tmp_path):
    """A function: an asset -> its copy, in which one key of tokenizer_config.json is another value."""

    def copy(asset, **changes):
        target = tmp_path / "copy"
        shutil.copytree(ASSETS / asset, target)
        path = target / "tokenizer_config.json"
        if changes:
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return target

    return copy


TOKEN = {"content": "<x>", "lstrip": False}
SETTINGS = {
    "pad_token": (3, "tokenizer_config.json: pad_token=3 must be a token"),
    "eos_token": ({"content": 3}, "eos_token={'content': 3} must be a token"),
    "bos_token": ([["x"]], "bos_token=.* must be a token"),
    "unk_token": ({"content": "a", "lstrip": "yes"}, "lstrip of unk_token is 'yes', must be true or false"),
    "model_max_length": ("77", "model_max_length='77' must be a number of at least 1"),
    "model_max_length ": (-1, "model_max_length=-1 must be a number"),
    "model_max_length  ": (10**8, "model_max_length=100000000: must be from 1 to 10,000,000"),
    "model_max_length   ": (True, "model_max_length=True must be a number"),
    "added_tokens_decoder": ([1], "tokenizer_config.json: added_tokens_decoder must be tokens by their ids"),
    "added_tokens_decoder ": ({"1": "x"}, "added_tokens_decoder must be tokens by their ids"),
    "added_tokens_decoder  ": ({"x": TOKEN}, "tokenizer_config.json: 'x' is no token's id"),
    "added_tokens_decoder   ": ({"9" * 5000: TOKEN}, "tokenizer_config.json: '999.* is no token's id"),
    "added_tokens_decoder    ": ({"-1": TOKEN}, "'-1' is no token's id"),
    "added_tokens_decoder     ": (
        {"1": {"content": None}},
        r"added_tokens_decoder\['1'\]=.* must be a token",
    ),
    "additional_special_tokens": (3, "additional_special_tokens=3 must be a list of tokens"),
    "additional_special_tokens ": ([3], "additional_special_tokens=3 must be a token"),
}


@pytest.mark.parametrize("kind", [CLIP, QWEN])
@pytest.mark.parametrize("key", SETTINGS)
def test_entries_of_other_types_name_file_and_key(folder, kind, key):
    value, message = SETTINGS[key]
    cls = CLIPTokenizer if kind == CLIP else Qwen2Tokenizer
    with pytest.raises(ValueError, match=message):
        cls.from_pretrained(folder(kind, **{key.strip(): value}))


def test_other_files_of_a_tokenizer(folder):
    copy = folder(QWEN)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    for content, message in (
        ('{"<x>": "3"}', None),
        ('{"<x>": [3]}', r"added_tokens.json: \[3\] is no token's id"),
        ('{"<x>": 1e3}', "added_tokens.json: 1000.0 is no token's id"),
        ('{"<x>": 4611686018427387904}', "added_tokens.json: 4611686018427387904 is no token's id"),
    ):
        (copy / "added_tokens.json").write_text(content)
        with pytest.raises(ValueError, match=message or "'<x>' has id 3, but comes out as"):
            Qwen2Tokenizer.from_pretrained(copy)
    (copy / "added_tokens.json").unlink()
    (copy / "special_tokens_map.json").write_text('{"pad_token": [1]}')
    with pytest.raises(ValueError, match="special_tokens_map.json: pad_token=.1. must be a token"):
        Qwen2Tokenizer.from_pretrained(copy)
    (copy / "special_tokens_map.json").unlink()
    (copy / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="chat_template.jinja is not UTF-8"):
        Qwen2Tokenizer.from_pretrained(copy)
    (copy / "chat_template.jinja").write_bytes(b" " * (2**20 + 1))
    with pytest.raises(ValueError, match="chat_template.jinja has more than 1,048,576 bytes"):
        Qwen2Tokenizer.from_pretrained(copy)


def test_vocabularies_of_gigabytes_are_not_read(folder, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "LARGEST_VOCABULARY", 100)
    with pytest.raises(ValueError, match="tokenizer.json is no file of at most 100 bytes"):
        CLIPTokenizer.from_pretrained(folder(CLIP))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 3}, "AttributeError"),
        ({"size": [1]}, "AttributeError"),
        ({"min_pixels": 2**31}, "min_pixels"),
    ],
)
def test_image_settings_of_other_types(folder, changes, message):
    copy = folder(PROCESSOR)
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json: .*{message}"):
        Qwen3VLProcessor.from_folder(copy)
    path.write_text(json.dumps({"min_pixels": 1, "max_pixels": 2}))
    for name, value in (("image_processor", 3), ("video_processor", [1])):
        (copy / "processor_config.json").write_text(json.dumps({name: value}))
        with pytest.raises(ValueError, match=r"settings: .* is not a JSON object"):
            Qwen3VLProcessor.from_folder(copy)


@pytest.fixture
def inversion():
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / CLIP)
    sizes = dict(hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    network = CLIPTextModel.from_config({"vocab_size": len(tokenizer), **sizes})
    return TextualInversion(tokenizer, network.requires_grad_(False).eval())


def state_of(inversion):
    weight = inversion.text_encoder.state_dict()["embeddings.token_embedding.weight"]
    config = inversion.text_encoder.config.vocab_size
    return weight.clone(), len(inversion.tokenizer), inversion.words(), config


WORDS = {
    "no rows": (torch.ones(0, WIDTH), r"holds a tensor of shape \(0, 12\), wanted"),
    "no columns": (torch.ones(2, 0), r"holds a tensor of shape \(2, 0\), wanted"),
    "number": (torch.tensor(1.0), r"holds a tensor of shape \(\), wanted"),
    "integers": (torch.ones(2, WIDTH, dtype=torch.int64), "its vectors are torch.strided torch.int64"),
    "complex": (torch.ones(2, WIDTH, dtype=torch.complex64), "its vectors are .* torch.complex64"),
    "sparse": (torch.ones(2, WIDTH).to_sparse(), "its vectors are torch.sparse_coo"),
    "expanded": (torch.ones(1).expand(10**9, WIDTH), "1,000,000,000 vectors are more than the 1000"),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_of_no_use_leave_nothing_behind(inversion, name):
    vectors, message = WORDS[name]
    inversion.load_textual_inversion({"<kept>": torch.ones(2, WIDTH)})
    before = state_of(inversion)
    with pytest.raises(ValueError, match=message):
        inversion.load_textual_inversion([{"<good>": torch.ones(WIDTH)}, {"<bad>": vectors}])
    for one, other in zip(before, state_of(inversion), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert inversion.load_textual_inversion({"<next>": torch.ones(WIDTH)}) == ["<next>"]


@pytest.mark.parametrize("name", ["no rows", "integers", "number"])
def test_files_of_such_words(inversion, tmp_path, name):
    vectors, _ = WORDS[name]
    save_file({"<bad>": vectors}, tmp_path / "x.safetensors")
    torch.save({"string_to_param": {"*": vectors}, "name": "bad"}, tmp_path / "x.pt")
    before = state_of(inversion)
    for file in ("x.safetensors", "x.pt"):
        with pytest.raises(ValueError, match=rf"{file} is no textual inversion"):
            inversion.load_textual_inversion(tmp_path / file)
    assert state_of(inversion)[1:] == before[1:]


@pytest.mark.parametrize(
    "word", [3, ["<a>"], "a\x1b[31m", "a" * 1000, "a\nb"], ids=lambda word: str(word)[:8]
)
def test_names_that_are_no_words(inversion, tmp_path, word):
    torch.save({"string_to_param": {"*": torch.ones(WIDTH)}, "name": word}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt: .* can be no word of a prompt") as raised:
        inversion.load_textual_inversion(tmp_path / "x.pt")
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300
    assert inversion.load_textual_inversion(tmp_path / "x.pt", token="<a>") == ["<a>"]


def test_memory_that_runs_out_leaves_nothing_behind(inversion, monkeypatch):
    """What is added to the tokenizer first could not be taken back by the one who called."""

    def full(*args):
        raise RuntimeError("not enough memory")

    before = state_of(inversion)
    monkeypatch.setattr(torch, "cat", full)
    with pytest.raises(RuntimeError, match="not enough memory"):
        inversion.load_textual_inversion({"<a>": torch.ones(WIDTH)})
    monkeypatch.undo()
    assert state_of(inversion)[1:] == before[1:]


@pytest.mark.parametrize("content", [[torch.ones(WIDTH)], "text", 3, {}], ids=str)
def test_files_that_hold_something_else(inversion, tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is no textual inversion"):
        inversion.load_textual_inversion(tmp_path / "x.pt")
    odd = nn.ParameterDict({"a": nn.Parameter(torch.ones(WIDTH))})
    torch.save({"string_to_param": odd}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt is no textual inversion"):
        inversion.load_textual_inversion(tmp_path / "x.pt")
