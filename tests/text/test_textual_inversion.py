"""Textual inversion: file formats, several words at once, expansion of prompts, exact removal, refusals."""

import json

import pytest
import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig
from transformers import CLIPTextModel as ReferenceTextModel
from transformers import CLIPTokenizer as ReferenceTokenizer

from joyedit.models.clip import CLIPTextModel
from joyedit.text.clip_tokenizer import CLIPTokenizer
from joyedit.text.textual_inversion import TextualInversion

WIDTH = 16
PROMPTS = [
    "a photo of <toy> and a cat",
    "<toy>",
    "a <TOY><style>",
    "no word of ours",
    "<style> <toy> <style>",
]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A folder with the alphabet of CLIP's tokenizer and no merges."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture
def tokenizer(vocabulary):
    return CLIPTokenizer.from_pretrained(vocabulary)


def settings(tokenizer):
    return dict(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
    )


@pytest.fixture
def text_encoder(tokenizer):
    network = CLIPTextModel.from_config(settings(tokenizer))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network.requires_grad_(False).eval()


@pytest.fixture
def inversion(tokenizer, text_encoder):
    return TextualInversion(tokenizer, text_encoder)


def rows(inversion, tokens):
    ids = inversion.tokenizer.convert_tokens_to_ids(tokens)
    return inversion.text_encoder.state_dict()["embeddings.token_embedding.weight"][ids]


def written(folder, form, vectors):
    """A file of that form, and the word that it is for."""
    match form:
        case "safetensors":
            save_file({"<toy>": vectors}, folder / "learned_embeds.safetensors")
            return folder, "<toy>"
        case "bin":
            torch.save({"<toy>": nn.Parameter(vectors)}, folder / "learned_embeds.bin")
            return folder, "<toy>"
        case "a1111":
            content = {
                "string_to_token": {"*": 265},
                "string_to_param": {"*": vectors},
                "name": "toy",
                "step": 500,
            }
            torch.save({**content, "sd_checkpoint": None}, folder / "x.pt")
            return folder / "x.pt", "toy"
        case "a1111 of a parameter dict":
            torch.save(
                {"string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors)})}, folder / "my-toy.pt"
            )
            return folder / "my-toy.pt", "my-toy"
        case "a1111 safetensors":
            save_file({"emb_params": vectors}, folder / "my-toy.safetensors")
            return folder / "my-toy.safetensors", "my-toy"


@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize(
    "form", ["safetensors", "bin", "a1111", "a1111 of a parameter dict", "a1111 safetensors"]
)
def test_every_format(form, vectors, inversion, tmp_path):
    learned = torch.randn(vectors, WIDTH)
    source, word = written(tmp_path, form, learned)
    first = len(inversion.tokenizer)
    assert inversion.load_textual_inversion(source) == [word]
    tokens = [word, f"{word}_1", f"{word}_2"][:vectors]
    assert inversion.words() == {word: tokens}
    assert inversion.tokenizer.convert_tokens_to_ids(tokens) == list(range(first, first + vectors))
    assert torch.equal(rows(inversion, tokens), learned)
    ids = inversion.tokenizer(inversion.expand(f"a {word}.")).input_ids
    assert ids[2:-2] == list(range(first, first + vectors))
    assert inversion.load_textual_inversion(source, token="other") == ["other"]


def test_state_dicts_and_tensors(inversion):
    one, two = torch.randn(WIDTH), torch.randn(2, WIDTH)
    assert inversion.load_textual_inversion(one, token="<one>") == ["<one>"]
    assert inversion.load_textual_inversion({"<two>": two}) == ["<two>"]
    assert inversion.load_textual_inversion({"string_to_param": {"*": one}, "name": "three"}) == ["three"]
    assert torch.equal(rows(inversion, ["<one>", "<two>", "<two>_1", "three"]), torch.stack([one, *two, one]))
    with pytest.raises(ValueError, match="the tensor does not name its word: give token="):
        inversion.load_textual_inversion(one)


def test_several_at_once(inversion):
    sources = [{"<toy>": torch.randn(3, WIDTH)}, torch.randn(WIDTH), {"<style>": torch.randn(1, WIDTH)}]
    words = inversion.load_textual_inversion(sources, token=[None, "<new>", "<look>"])
    assert words == ["<toy>", "<new>", "<look>"]
    assert torch.equal(
        rows(inversion, ["<new>", "<look>"]), torch.stack([sources[1], sources[2]["<style>"][0]])
    )
    with pytest.raises(ValueError, match="2 sources, but 1 tokens"):
        inversion.load_textual_inversion(sources[:2], token=["<a>"])
    with pytest.raises(ValueError, match="token '<b>' comes twice"):
        inversion.load_textual_inversion(sources[:2], token="<b>")


def test_expansion_of_prompts(inversion):
    assert inversion.expand("a toy") == "a toy"
    inversion.load_textual_inversion([{"toy": torch.ones(3, WIDTH)}, {"<Style>": torch.ones(2, WIDTH)}])
    inversion.load_textual_inversion({"single": torch.ones(WIDTH)})
    assert inversion.expand("a toy, a Toy") == "a toy toy_1 toy_2, a toy toy_1 toy_2"
    assert inversion.expand(["a single cat", "in <style>"]) == ["a single cat", "in <Style> <Style>_1"]
    assert inversion.expand("toy_1 alone") == "toy_1 alone"


def test_removing_restores_tokenizer_and_encoder_exactly(inversion, tokenizer, text_encoder):
    before = {name: tensor.clone() for name, tensor in text_encoder.state_dict().items()}
    vocabulary, config = tokenizer.backend.to_str(), text_encoder.config
    ids = tokenizer(PROMPTS[0]).input_ids
    inversion.load_textual_inversion([{"<toy>": torch.randn(3, WIDTH)}, {"<style>": torch.randn(2, WIDTH)}])
    assert text_encoder.config.vocab_size == len(tokenizer) == config.vocab_size + 5
    style = rows(inversion, ["<style>", "<style>_1"])
    inversion.unload_textual_inversion("<toy>")
    assert inversion.words() == {"<style>": ["<style>", "<style>_1"]}
    assert torch.equal(rows(inversion, ["<style>", "<style>_1"]), style)
    assert text_encoder.config.vocab_size == len(tokenizer) == config.vocab_size + 2
    inversion.unload_textual_inversion()
    assert tokenizer.backend.to_str() == vocabulary and tokenizer(PROMPTS[0]).input_ids == ids
    assert text_encoder.config == config
    assert list(text_encoder.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in text_encoder.state_dict().items())
    inversion.unload_textual_inversion()
    with pytest.raises(ValueError, match=r"\['<toy>'\] are no learned words; there are \[\]"):
        inversion.unload_textual_inversion("<toy>")


def test_words_are_saved_with_their_encoder_and_cast_with_it(inversion, tokenizer, text_encoder, tmp_path):
    text_encoder.to(torch.bfloat16)
    learned = torch.randn(2, WIDTH)
    inversion.load_textual_inversion({"<toy>": learned})
    assert torch.equal(rows(inversion, ["<toy>", "<toy>_1"]), learned.bfloat16())
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = TextualInversion(
        CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
        CLIPTextModel.from_pretrained(tmp_path / "text_encoder"),
    )
    assert again.expand("a <toy>") == "a <toy> <toy>_1"
    assert torch.equal(rows(again, ["<toy>", "<toy>_1"]), learned.bfloat16())


REFUSED = [
    ({"a</w>": torch.ones(WIDTH)}, "'a</w>' is in the vocabulary already"),
    (
        {"<a>": torch.ones(2, 768)},
        "'<a>' has vectors of 768, the text encoder 16, it is for Stable Diffusion 1",
    ),
    ({"<a>": torch.ones(1024)}, "vectors of 1024, the text encoder 16, it is for Stable Diffusion 2"),
    ({"<a>": torch.ones(17)}, "'<a>' has vectors of 17, the text encoder 16$"),
    ({"clip_g": torch.ones(1280), "clip_l": torch.ones(768)}, "no textual inversion.*Stable Diffusion XL"),
    ({"<a>": torch.ones(1, 2, WIDTH)}, r"holds a tensor of shape \(1, 2, 16\), wanted"),
    ({"a": torch.ones(3), "b": torch.ones(3)}, r"the state dict is no .* it holds the keys \['a', 'b'\]"),
    ({"string_to_param": {"*": torch.ones(WIDTH)}}, "does not name its word"),
    ([{"<a>": torch.ones(WIDTH)}, {"<a>_1": torch.ones(WIDTH)}], "<a>_1 exists, and would be read as"),
    ({"<old>": torch.ones(WIDTH)}, "'<old>' is in the vocabulary already"),
    ({"<old>_1": torch.ones(WIDTH)}, "'<old>_1' would be read as a vector of '<old>'"),
]


@pytest.mark.parametrize(("source", "message"), REFUSED)
def test_what_does_not_fit_is_refused_whole(source, message, inversion):
    inversion.load_textual_inversion({"<old>": torch.ones(WIDTH)})
    with pytest.raises(ValueError, match=message):
        inversion.load_textual_inversion(
            [{"<good>": torch.ones(WIDTH)}, *(source if isinstance(source, list) else [source])]
        )
    assert list(inversion.words()) == ["<old>"]
    assert len(inversion.text_encoder.state_dict()["embeddings.token_embedding.weight"]) == len(
        inversion.tokenizer
    )


def test_files_that_are_refused(inversion, tmp_path):
    with pytest.raises(FileNotFoundError, match="looks like a path"):
        inversion.load_textual_inversion(tmp_path / "none.pt")
    (tmp_path / "x.pt").write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="x.pt cannot be opened as weights only"):
        inversion.load_textual_inversion(tmp_path)
    with pytest.raises(FileNotFoundError, match="is a pickle, and use_safetensors=True"):
        inversion.load_textual_inversion(tmp_path, use_safetensors=True)
    with pytest.raises(TypeError, match="unknown argument 'weights'"):
        inversion.load_textual_inversion(tmp_path, weights="x")


def test_a_tokenizer_of_another_size_is_refused(inversion, tokenizer):
    tokenizer.append_tokens(["<more>"])
    with pytest.raises(ValueError, match=f"the tokenizer has {len(tokenizer)} tokens, the text encoder"):
        inversion.load_textual_inversion({"<toy>": torch.ones(WIDTH)})


class Reference(TextualInversionLoaderMixin):
    def __init__(self, vocabulary, text_encoder):
        self.tokenizer = ReferenceTokenizer.from_pretrained(vocabulary)
        self.text_encoder = ReferenceTextModel(CLIPTextConfig(**settings(self.tokenizer))).eval()
        self.text_encoder.load_state_dict(text_encoder.state_dict())
        self.components = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}
        self.hf_device_map = None

    @torch.no_grad()
    def encode(self, prompts):
        prompts = self.maybe_convert_prompt(prompts, self.tokenizer)
        ids = self.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return self.text_encoder(ids)[0]


def test_prompts_are_encoded_as_by_the_reference(inversion, tokenizer, text_encoder, vocabulary, tmp_path):
    reference = Reference(vocabulary, text_encoder)
    folder, _ = written(tmp_path, "safetensors", torch.randn(3, WIDTH))
    style = {"string_to_param": {"*": torch.randn(1, WIDTH)}, "name": "<style>"}
    for each in (reference, inversion):
        each.load_textual_inversion(str(folder))
        each.load_textual_inversion(style)
    prompts = [prompt.replace("<TOY>", "<toy>") for prompt in PROMPTS]  # the reference expands only this case
    theirs = reference.encode(prompts)
    ids = tokenizer(
        inversion.expand(prompts), padding="max_length", max_length=77, return_tensors="pt"
    ).input_ids
    ours = text_encoder(ids)[0]
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert inversion.expand(PROMPTS[2]) == "a <toy> <toy>_1 <toy>_2<style>"
