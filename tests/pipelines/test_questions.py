"""What users of `ask` meet: streaming, history, interruption, stop tokens, one text encoder for both uses,
and what is refused. That answers are right is in `tests/parity/test_questions.py`."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.pipelines.questions import Words, reply

RED = Image.new("RGB", (64, 32), "red")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions") / "joyai"
    write_random_checkpoint(folder, seed=2)
    return folder


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return joyedit.load(checkpoint, device="cpu", dtype="float32")


@pytest.fixture
def pipe(loaded):
    return joyedit.JoyImageEditPipeline.from_pipe(loaded)


def ask(pipe, images=RED, question="what?", **options):
    return pipe.ask(images, question, **{"max_new_tokens": 6, **options})


def say(monkeypatch, pipe, text):
    """Make the model write this, whatever it is asked, and end."""
    ids = [*pipe.tokenizer.encode(text), pipe.tokenizer.eos_token_id]
    tokens = iter(ids)
    monkeypatch.setattr("joyedit.pipelines.generation.choose", lambda *_: next(tokens))
    return ids


def test_pieces_are_the_text_and_a_letter_is_never_broken(pipe, monkeypatch):
    text = "größer ≤ 京都, 👩‍🚀 n"
    ids, pieces = say(monkeypatch, pipe, text), []
    answer = ask(pipe, max_new_tokens=99, stream=pieces.append)
    assert answer.text == text == "".join(pieces) and answer.tokens == ids and answer.finished
    assert pieces == list(text)  # one byte a token, and a piece is a letter
    assert len(ids) > len(text) + 1


def test_bytes_that_are_no_letter_come_at_the_end(pipe):
    pieces = []
    words = Words(pipe.tokenizer, pieces.append)
    first, second = pipe.tokenizer.encode("京")[:2]
    for token in (*pipe.tokenizer.encode("a"), first, second):
        words.add(token)
    assert pieces == ["a"]
    assert words.end() == "a\N{REPLACEMENT CHARACTER}" == "".join(pieces)


def test_history_of_an_answer_is_the_conversation(pipe):
    first = ask(pipe, [RED], "what?")
    again = ask(pipe, [], "why?", history=first.history)
    assert again.tokens == ask(pipe, [], "why?", history=[(RED, "what?", first.text)]).tokens
    assert [turn.question for turn in again.history] == ["what?", "why?"]
    assert again.history[-1].answer == again.text and again.history[-1].images == []


def test_pictures_are_seen(pipe):
    """Logits of the first token, which are near another only by chance."""
    found = []

    def logits(images):
        encoder = pipe.text_encoder
        head, found[:] = encoder.next_logits, []
        encoder.next_logits = lambda *args: found.append(head(*args)) or found[-1]
        try:
            ask(pipe, images, max_new_tokens=1)
        finally:
            del encoder.next_logits
        return found[0]

    red, blue = logits(RED), logits(Image.new("RGB", (64, 32), "blue"))
    assert torch.equal(red, logits(np.asarray(RED))) and torch.equal(red, logits([RED.convert("RGBA")]))
    assert (red - blue).norm() > 1e-3 * red.norm() and (red - logits([])).norm() > 1e-3 * red.norm()


def test_interruption_keeps_what_was_said(pipe, monkeypatch):
    say(monkeypatch, pipe, "abcdef")

    def stop(piece):
        pipe.interrupt = piece == "c"

    answer = ask(pipe, max_new_tokens=99, stream=stop)
    assert answer.text == "abc" and not answer.finished
    assert ask(pipe, max_new_tokens=2).text == "de"  # the next call begins without


def test_a_system_turn_of_another_kind(pipe):
    asked = ask(pipe)
    assert reply(pipe, "You are a helpful assistant.", RED, "what?").tokens[:6] == asked.tokens
    prompts, read = [], pipe.tokenizer.encode
    pipe.tokenizer.encode = lambda text, *rest: prompts.append(text) or read(text, *rest)
    try:
        reply(pipe, "Rewrite.", [], "what?")
    finally:
        del pipe.tokenizer.encode
    assert prompts[0].startswith("<|im_start|>system\nRewrite.<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>")


def test_one_text_encoder_edits_and_answers(pipe, monkeypatch):
    """And an edit is what it was without the question."""
    edit = dict(
        prompt="a", num_inference_steps=1, height=64, width=64, output_type="latent", guidance_scale=1.0
    )
    pipe.buckets = [(64, 64)]
    before = pipe(RED, **edit, generator=torch.Generator().manual_seed(0)).images
    reader = joyedit.Qwen3VLPipeline.from_pipe(pipe)
    assert reader.text_encoder is pipe.text_encoder
    assert ask(pipe).tokens == ask(reader).tokens
    assert torch.equal(before, pipe(RED, **edit, generator=torch.Generator().manual_seed(0)).images)


def test_no_edit_reads_the_head(pipe, monkeypatch):
    """What answers alone takes stays unread, and what a mapped file holds unread takes no memory."""
    monkeypatch.delitem(pipe.text_encoder._modules, "lm_head")
    pipe.buckets = [(64, 64)]
    pipe(RED, "a", num_inference_steps=1, output_type="latent")
    with pytest.raises(AttributeError):
        ask(pipe)


def test_of_joyai_only_what_answers_is_read(checkpoint, pipe, tmp_path):
    """In the published layout and in the original one; a plain folder of Qwen3-VL holds no more."""
    part = tmp_path / "part"
    for name in ("text_encoder", "tokenizer", "processor"):
        shutil.copytree(checkpoint / name, part / name)
    shutil.copy(checkpoint / "model_index.json", part)
    original = tmp_path / "original"
    joyedit.loading.save_checkpoint(pipe, original, "original")
    wanted = ask(pipe).tokens
    for folder, options in (
        (part, {"pipeline": "Qwen3VLPipeline"}),
        (original, {"pipeline": "Qwen3VLPipeline"}),
        (original / "JoyAI-Image-Und", {}),
    ):
        reader = joyedit.load(folder, device="cpu", dtype="float32", **options)
        assert type(reader) is joyedit.Qwen3VLPipeline and ask(reader).tokens == wanted
    reader.save_pretrained(tmp_path / "saved")
    assert ask(joyedit.load(tmp_path / "saved", device="cpu")).tokens == wanted


def test_stop_tokens_of_the_checkpoint_come_back_when_it_is_saved(pipe, tmp_path):
    tokens = ask(pipe).tokens
    folder = tmp_path / "text_encoder"
    pipe.text_encoder.save_pretrained(folder)
    assert not (folder / "generation_config.json").exists()
    said = {"eos_token_id": [tokens[2], 7], "temperature": 0.7}
    (folder / "generation_config.json").write_text(json.dumps(said))
    encoder = type(pipe.text_encoder).from_pretrained(folder)
    encoder.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == said
    pipe.text_encoder = encoder
    answer = ask(pipe)
    assert answer.finished and answer.tokens == tokens[: tokens.index(tokens[2]) + 1]


def test_without_a_word_of_the_checkpoint_the_turn_ends(pipe, monkeypatch):
    ids = say(monkeypatch, pipe, "ab<|endoftext|>c")
    assert ask(pipe).tokens == ids[:3]


@pytest.mark.parametrize("ends", ["x", 288, [3, -1], [True], 1.5])
def test_stop_tokens_that_are_none_are_refused(pipe, tmp_path, ends):
    pipe.text_encoder.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id=.* from 0 to 287"):
        type(pipe.text_encoder).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"question": ""}, ValueError, "question is empty"),
        ({"question": " \n\u200b"}, ValueError, "question is empty"),
        ({"question": None}, TypeError, "question is a NoneType"),
        ({"question": ["a"]}, TypeError, "question is a list"),
        ({"question": "a <|image_pad|>"}, ValueError, "stands for a picture"),
        ({"temperature": -0.1}, ValueError, "temperature=-0.1: must be 0"),
        ({"temperature": float("nan")}, ValueError, "temperature=nan: must be a finite number"),
        ({"top_p": 0}, ValueError, "top_p=0.0: must be above 0, and at most 1"),
        ({"top_p": 1.01}, ValueError, "top_p=1.01: must be above 0, and at most 1"),
        ({"top_k": -1}, ValueError, "top_k=-1: must be an integer from 0 on"),
        ({"top_k": 2.5}, ValueError, "top_k=2.5: must be an integer"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0: must be a positive integer"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty=0.0: must be above 0"),
        ({"repetition_penalty": "1"}, ValueError, "repetition_penalty='1': must be a finite number"),
        ({"images": None}, TypeError, "images is a NoneType"),
        ({"images": ["a.png"]}, TypeError, r"images\[0\] is a str: must be a PIL image"),
        ({"images": torch.full((3, 8, 8), torch.nan)}, ValueError, "images holds NaN"),
        ({"images": np.zeros((8, 8), np.uint8)}, ValueError, r"images has shape \(8, 8\)"),
        ({"images": Image.new("RGB", (2000, 1))}, ValueError, "too narrow"),
        ({"history": "what?"}, TypeError, "history is a str"),
        ({"history": ["what?"]}, TypeError, r"each turn must be \(question, answer\)"),
        ({"history": [("what?",)]}, TypeError, "each turn must be"),
        ({"history": [("what?", None)]}, TypeError, "an answer of history is a NoneType"),
        ({"history": [("", "a")]}, ValueError, "a question of history is empty"),
        ({"history": [("what.png", "a", "b")]}, TypeError, "images of history is a str"),
        ({"generator": 3}, TypeError, "must be a torch.Generator"),
        ({"stream": "print"}, TypeError, "stream is a str, which cannot be called"),
    ],
)
def test_bad_input_is_refused_before_work(pipe, monkeypatch, options, error, message):
    monkeypatch.setattr(type(pipe.text_encoder), "prefill", lambda *_: pytest.fail("it works"))
    with pytest.raises(error, match=message):
        ask(pipe, **options)


def test_numbers_of_numpy_are_numbers(pipe):
    options = {"max_new_tokens": np.int64(3), "temperature": np.float32(0), "top_k": torch.tensor(2)}
    assert ask(pipe, **options).tokens == ask(pipe, max_new_tokens=3).tokens


def test_a_conversation_that_is_too_long_is_refused(pipe):
    config = pipe.text_encoder.config
    text = config.text_config.replace(max_position_embeddings=50)
    pipe.text_encoder.config = config.replace(text_config=text)
    try:
        with pytest.raises(ValueError, match=r"is of \d+ tokens, pictures included: at most 50"):
            ask(pipe)
    finally:
        pipe.text_encoder.config = config


def test_a_temperature_near_zero_takes_the_most_likely(pipe):
    assert ask(pipe, temperature=1e-30).tokens == ask(pipe).tokens


def test_logits_that_are_not_finite_are_told(pipe, monkeypatch):
    whole = pipe.text_encoder.next_logits
    for value in (torch.nan, torch.inf):
        monkeypatch.setattr(pipe.text_encoder, "next_logits", lambda *args, value=value: whole(*args) + value)
        for temperature in (0, 1):
            with pytest.raises(ValueError, match="logits that are not finite"):
                ask(pipe, temperature=temperature)


def test_missing_parts_are_named(pipe):
    pipe.processor = None
    assert ask(pipe, []).tokens
    with pytest.raises(ValueError, match="this needs processor"):
        ask(pipe)
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="this needs text_encoder"):
        ask(pipe, [])


def test_a_small_model_says_why_it_has_no_answer():
    pipe = joyedit.load("tiny-joyimage", device="cpu")
    for asked in (pipe, joyedit.Qwen3VLPipeline.from_pipe(pipe)):
        with pytest.raises(ValueError, match="trained to read instructions, not to answer questions"):
            asked.ask([], "what?")


def test_folders_of_other_models_are_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(ValueError, match="holds a model of type qwen2_vl: joyedit reads qwen3_vl"):
        joyedit.load(tmp_path)
