"""Prompts rewritten by a server or by Qwen3-VL: what is asked for, which answers are taken, and that after
every failure the prompt is kept, with one warning and without the key."""

import base64
import io
import logging
import pickle
import re
import socket
import time
import traceback

import numpy as np
import pytest
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint, write_random_chronoedit_checkpoint
from joyedit.pipelines import rewriting_server
from joyedit.rewriting import FORMS, Rewriting, Server, rewrite
from tests.answering import answering, completion, rewritten

KEY = "sk-local-0123456789abcdef"
RED = Image.new("RGB", (64, 32), "red")
CHRONO = "The user wants to make it winter. Snow covers the roofs."


@pytest.fixture
def serve(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(rewriting_server, "PAUSE", 0.001)
    with answering() as make:
        yield make


@pytest.fixture
def kept(caplog):
    """Asks for a rewriting that must fail: the prompt is kept, one warning says why, and nothing that is
    logged or raised has the key. Returns the reason."""

    def check(by, prompt="make it winter", images=RED, **options):
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            found = rewrite(prompt, images, by, **options)
        assert found == Rewriting(prompt, prompt, found.failure) and found.failure
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.getMessage() == f"the prompt stays as it is: {found.failure}"
        assert not tells(record.getMessage())
        return found.failure

    return check


def tells(text):
    return any(KEY[i : i + 8] in text for i in range(len(KEY) - 7))


def test_what_a_server_is_asked(serve):
    server = serve(rewritten("Make it winter."))
    photo = Image.linear_gradient("L").resize((2400, 1200)).convert("RGB")
    exif = photo.getexif()
    exif[0x010E] = "where we live"
    file = io.BytesIO()
    photo.save(file, "JPEG", exif=exif, comment=b"where we live")
    found = rewrite(" make it winter\n", Image.open(file), Server(server.base, "some-model"))
    assert found == ("Make it winter.", " make it winter\n", None)
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions" and asked.headers["Authorization"] == f"Bearer {KEY}"
    assert asked.headers["Content-Type"] == "application/json"
    body = asked.body
    assert (body["model"], body["temperature"]) == ("some-model", 0)
    assert body["response_format"] == {"type": "json_object"}
    system, user = body["messages"]
    assert system == {"role": "system", "content": FORMS["joyimage"][0]} and user["role"] == "user"
    picture, text = user["content"]
    assert text == {"type": "text", "text": "User Input: make it winter\n\nRewritten Prompt:"}
    start, _, data = picture["image_url"]["url"].partition(",")
    assert start == "data:image/jpeg;base64" and len(data) < 1_000_000
    sent = base64.b64decode(data)
    seen = Image.open(io.BytesIO(sent))
    assert seen.size == (2160, 1080) and not seen.getexif() and b"where we live" not in sent
    wanted = photo.resize((2160, 1080), Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(seen).astype(int) - np.asarray(wanted)).mean() < 1


def test_the_environment_has_a_proxy(serve, monkeypatch):
    proxy = serve(rewritten("Make it winter."))
    monkeypatch.setenv("http_proxy", proxy.origin)
    monkeypatch.setenv("no_proxy", "")
    assert rewrite("winter", RED, Server("http://api.example/v1")).prompt == "Make it winter."
    assert proxy.asked[0].path == "http://api.example/v1/chat/completions"


def test_pictures_in_their_order_and_none(serve):
    server = serve(rewritten("Both."))
    assert rewrite("both", [RED, RED.resize((16, 48))], Server(server.base)).prompt == "Both."
    assert rewrite("a lighthouse", [], Server(server.base, key="")).prompt == "Both."
    two, none = (asked.body for asked in server.asked)
    urls = [part["image_url"]["url"] for part in two["messages"][1]["content"][:-1]]
    opened = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
    assert [one.size for one in opened] == [(64, 32), (16, 48)]
    assert none["messages"][0]["content"] == FORMS["joyimage"][1] != FORMS["joyimage"][0]
    assert none["messages"][1]["content"] == "User Input: a lighthouse\n\nRewritten Prompt:"
    assert two["temperature"] == 1 and two["model"] == "gpt-5"  # which takes no other
    assert "Authorization" in server.asked[0].headers and "Authorization" not in server.asked[1].headers


def test_the_instructions_have_the_publishers_words():
    edit, generate = FORMS["joyimage"]
    for phrase in (
        '"Restore and colorize the photo."',
        '"Perform inpainting on this image. The original caption is: "',
        '"Extend the image beyond its boundaries using outpainting. The original caption is: "',
    ):
        assert phrase in edit
    reasoned, without = FORMS["chronoedit"]
    assert 'Begin with "The user wants to ..."' in reasoned and "80 to 100 words" in reasoned
    assert '"while removing the background"' in reasoned and without is None
    assert all('{"Rewritten": "..."}' in text and "\\\n" not in text for text in (edit, generate, reasoned))


@pytest.mark.parametrize(
    "answer",
    [
        '{"Rewritten": "Make it \\"winter\\"."}',
        '```json\n{"Rewritten": "Make it \\"winter\\"."}\n```',
        'Here it is:\n```JSON\n{"Rewritten": "Make it \\"winter\\"."}```\nAnything else?',
        '<think>{"Rewritten": "no"}</think>\n\n{"Rewritten": " Make it\n\\"winter\\".\\u001b\\ud800 "}',
    ],
)
def test_answers_that_are_taken(serve, answer):
    assert rewrite("winter", RED, Server(serve(answer).base)).prompt == 'Make it "winter".'


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("Make it winter.", "answered what is no prompt: not JSON: 'Make it winter.'"),
        ('{"Rewritten": ""}', "answered what is no prompt: an empty text"),
        ('{"Rewritten": " \\u200b\\n"}', "an empty text"),
        ('{"rewritten": "x"}', 'no "Rewritten" with a text in'),
        ('{"Rewritten": ["x"]}', 'no "Rewritten" with a text in'),
        ('["x"]', 'no "Rewritten" with a text in'),
        ("[" * 100_000, "not JSON"),
        (rewritten("x" * 4001), "a text of 4,001 characters: at most 4,000"),
        (rewritten("see <|image_pad|>"), "it holds '<|image_pad|>', which stands for a picture"),
        ((200, completion(None), {}), "answered None in place of a text"),
        ((200, {"choices": []}, {}), "answered no chat completion"),
        ((200, ["hello"], {}), "answered no chat completion"),
        ((200, b"<html>hello</html>", {}), "answered no chat completion: <html>hello</html>"),
        ((200, b"\xff\xfe", {}), "answered no chat completion"),
        ((500, b"", {}), "answered 500 Internal Server Error: nothing"),
        (
            (503, {"error": {"message": "loading the model"}}, {}),
            "Service Unavailable: loading the model",
        ),
        ((429, {"error": "slow down"}, {}), "answered 429 Too Many Requests: slow down"),
    ],
)
def test_an_answer_that_is_none_is_asked_for_again_and_then_given_up(serve, kept, answer, reason):
    server = serve(answer)
    said = kept(Server(server.base))
    assert reason in said and said.startswith(server.origin) and said.endswith("(asked 3 times)")
    assert len(server.asked) == 3 and len(said) < 300


def test_the_next_answer_counts(serve):
    server = serve((503, b"", {}), "no", rewritten("Make it winter."))
    assert rewrite("winter", RED, Server(server.base)) == ("Make it winter.", "winter", None)
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "answer, reason",
    [
        ((401, {"error": {"message": f"wrong key {KEY}"}}, {}), "it does not take the key in OPENAI_API_KEY"),
        ((403, b"", {}), "answered 403 Forbidden: it does not take the key in OPENAI_API_KEY"),
        ((404, {"detail": "no such model"}, {}), "answered 404 Not Found for model 'gpt-5': no such model"),
        ((413, b"too large", {}), "answered 413 Request Entity Too Large: too large"),
        ((418, {"error": {"message": f"your key is {KEY[:12]}"}}, {}), "repeats a part of the key"),
        ((418, f"<b>{KEY}</b>".encode(), {}), "repeats a part of the key"),
        (rewritten(f"Write {KEY} on the wall."), "answered with a part of the key"),
        ((302, b"", {"Location": f"http://{KEY}.example.org/v1"}), "repeats a part of the key"),
        ((307, b"", {"Location": "relative"}), "answered 307 Temporary Redirect and leads to elsewhere"),
    ],
)
def test_what_another_attempt_would_not_change(serve, kept, answer, reason):
    server = serve(answer)
    assert reason in kept(Server(server.base))
    assert len(server.asked) == 1


def test_a_server_that_wants_a_key_and_gets_none(serve, kept, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "answered 401 Unauthorized: set OPENAI_API_KEY" in kept(Server(serve((401, b"", {})).base))


def test_a_word_that_stands_for_no_key_is_no_secret(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " none ")
    server = serve(rewritten("Leave none of it."))
    assert rewrite("less", RED, Server(server.base)).prompt == "Leave none of it."
    assert server.asked[0].headers["Authorization"] == "Bearer none"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_neither_key_nor_photograph_follows_a_redirect(serve, kept, status):
    other = serve(rewritten("Stolen."))
    server = serve((status, b"", {"Location": f"{other.base}/chat/completions"}))
    assert f"leads to {other.origin}, which is not followed" in kept(Server(server.base))
    assert other.asked == []


def test_a_server_without_json_mode_is_asked_without(serve):
    server = serve((400, {"error": {"message": "response_format"}}, {}), rewritten("Make it winter."))
    assert rewrite("winter", RED, Server(server.base)).prompt == "Make it winter."
    assert ["response_format" in asked.body for asked in server.asked] == [True, False]


def test_one_that_finds_another_fault_says_so(serve, kept):
    server = serve((400, {"error": {"message": "no pictures"}}, {}))
    assert kept(Server(server.base)).endswith("answered 400 Bad Request: no pictures (asked 2 times)")
    busy = serve((503, b"", {}), (503, b"", {}), (400, b"", {}))
    assert kept(Server(busy.base)).endswith("answered 400 Bad Request: nothing (asked 3 times)")


@pytest.mark.parametrize("kind", ["hang", "trickle"])
def test_a_server_that_hangs(serve, kept, kind):
    server = serve(lambda handler: getattr(server, kind)(handler))
    begin = time.monotonic()
    assert "did not answer within 0.2 seconds" in kept(Server(server.base, timeout=0.2))
    assert time.monotonic() - begin < 3 and len(server.asked) == 1


def test_a_pause_that_the_deadline_does_not_allow_is_not_begun(serve, kept, monkeypatch):
    monkeypatch.setattr(rewriting_server, "PAUSE", 1.0)
    server = serve((500, b"", {}))
    assert kept(Server(server.base, timeout=0.9)).endswith("answered 500 Internal Server Error: nothing")
    assert len(server.asked) == 1


def test_a_server_that_is_not_there(serve, kept, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = kept(Server(f"http://127.0.0.1:{port}/v1", timeout=5))
    assert said.startswith(f"http://127.0.0.1:{port} could not be reached: ") and "refused" in said
    assert said.endswith("(asked 3 times)")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    said = kept(Server("http://nowhere.example/v1"))
    assert said.startswith("http://nowhere.example could not be reached: ") and "not known" in said


def unknown(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_server_that_hangs_up(serve, kept):
    server = serve(lambda handler: handler.connection.close())
    assert "could not be reached" in kept(Server(server.base)) and len(server.asked) == 3
    long = serve((200, b" " * (1 << 21), {}))
    assert "answered more than 1,048,576 bytes" in kept(Server(long.base))


@pytest.mark.parametrize(
    "base, reason",
    [
        ("http://me:hunter2@localhost:8000/v1", "no URL with a user or password is taken"),
        ("http://hunter2@localhost/v1", "no URL with a user or password is taken"),
        ("http://me:hun/ter2@localhost/v1", "no URL with a user or password is taken"),
        (
            "https://localhost/v1?key=hunter2",
            "no URL with a query is taken; the key goes into",
        ),
        ("https://localhost/v1#hunter2", "no URL with a query is taken"),
        ("http://localhost:8000/hunter2", "must end in /v1, as in http://localhost:8000/v1"),
        ("http://localhost:8000", "must end in /v1"),
        ("http://localhost/v1/chat/completions", "must end in /v1"),
        ("http://localhost:hunter2/v1", "malformed"),
        ("http:///v1", "malformed"),
        ("ftp://localhost/v1", "must be an http or https URL"),
        ("localhost:8000/v1", "must be an http or https URL"),
    ],
)
def test_addresses_that_are_refused(base, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        Server(base)
    told = "".join(traceback.format_exception(error.value))
    assert "hunter2" not in told and "ter2" not in told.replace("hunter2", "")


def test_a_path_before_v1_is_used_and_not_shown(serve, kept):
    server = serve((500, b"", {}))
    made = Server(f"{server.origin}/gateway/0123456789/v1/", key="")
    assert "0123456789" not in kept(made) and str(made) == server.origin
    assert server.asked[0].path == "/gateway/0123456789/v1/chat/completions"


def test_the_key_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server("http://localhost:8000/v1")
    assert server.key == KEY == pickle.loads(pickle.dumps(server)).key
    assert not tells(repr(server)) and not tells(str(server)) and not tells(f"{server}")
    for key in (f"{KEY}\r\nX: y", f"{KEY} x", f"{KEY}é"):
        with pytest.raises(ValueError, match="no header can") as error:
            Server("http://localhost:8000/v1", key=key)
        assert not tells("".join(traceback.format_exception(error.value)))


@pytest.mark.parametrize(
    "arguments, options, kind, reason",
    [
        (("", RED), {}, ValueError, "prompt is empty"),
        ((3, RED), {}, TypeError, "prompt is a int"),
        (("<|image_pad|>", RED), {}, ValueError, "stands for a picture"),
        (("x", "photo.png"), {}, TypeError, "images is a str"),
        (("x", RED), {"form": "sketch"}, ValueError, "form='sketch': known are ['chronoedit', 'joyimage']"),
        (("x", []), {"form": "chronoedit"}, ValueError, "form='chronoedit' needs a picture"),
        (("x", RED), {"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        (("x", RED), {"by": "local"}, TypeError, "by is a str: a JoyAI-Image pipeline, a Qwen3VLPipeline or"),
        (("x", RED), {"by": None}, TypeError, "by is a NoneType"),
    ],
)
def test_arguments_that_do_not_fit(arguments, options, kind, reason):
    options = {"by": Server("http://127.0.0.1:9/v1"), **options}
    with pytest.raises(kind, match=re.escape(reason)):
        rewrite(*arguments, **options)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"timeout": 0}, "timeout=0: must be above 0"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": 1e9}, "at most 3600 seconds"),
        ({"timeout": "1"}, "timeout is a str"),
        ({"model": ""}, "model is empty"),
        ({"base": 3}, "the server is a int"),
    ],
)
def test_servers_that_do_not_fit(options, reason):
    with pytest.raises((TypeError, ValueError), match=re.escape(reason)):
        Server(**{"base": "http://localhost/v1", **options})


def test_what_chronoedit_gets(serve, kept):
    server = serve(rewritten(CHRONO))
    assert rewrite("winter", RED, Server(server.base), form="chronoedit").prompt == CHRONO
    assert server.asked[0].body["messages"][0]["content"] == FORMS["chronoedit"][0]
    other = serve(rewritten("Make it winter."))
    assert 'it does not begin with "The user wants to": ' in kept(Server(other.base), form="chronoedit")
    assert len(other.asked) == 3


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewriting") / "joyai"
    write_random_checkpoint(folder, seed=2)
    return joyedit.load(folder, device="cpu", dtype="float32")


@pytest.fixture
def pipe(loaded):
    return joyedit.JoyImageEditPipeline.from_pipe(loaded)


def say(monkeypatch, pipe, text):
    """Make the model write this, whatever it is asked, and end. What it reads is in the list that comes
    back."""
    tokens, read = iter([*pipe.tokenizer.encode(text), pipe.tokenizer.eos_token_id]), []

    def choose(logits, before, *_):
        read.append(list(before))
        return next(tokens)

    monkeypatch.setattr("joyedit.pipelines.generation.choose", choose)
    return read


@pytest.mark.parametrize("form", FORMS)
def test_the_text_encoder_that_is_loaded_rewrites(pipe, monkeypatch, form):
    read = say(monkeypatch, pipe, f"```json\n{rewritten(CHRONO)}\n```")
    found = rewrite("make it winter", RED, pipe, form=form)
    assert found == (CHRONO, "make it winter", None)
    text = pipe.tokenizer.decode(read[0])
    seen = text.count("<|image_pad|>")
    assert seen > 1
    assert re.sub(r"(<\|image_pad\|>)+", "*", text) == (
        f"<|im_start|>system\n{FORMS[form][0]}<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|>*<|vision_end|>User Input: make it winter\n\nRewritten Prompt:"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_qwen_alone_rewrites_and_what_it_says_otherwise_is_kept(pipe, monkeypatch, kept):
    alone = joyedit.Qwen3VLPipeline.from_pipe(pipe)
    say(monkeypatch, alone, rewritten("Make it winter."))
    assert rewrite("winter", [], alone).prompt == "Make it winter."
    say(monkeypatch, alone, "I am sorry.")
    assert kept(alone) == "the model answered what is no prompt: not JSON: 'I am sorry.'"


def test_an_answer_that_is_cut_is_none(pipe, kept):
    assert kept(pipe, max_new_tokens=3) == "the model did not come to an end within 3 tokens"


def test_too_little_memory_is_a_failure(pipe, kept, monkeypatch):
    import torch

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr("joyedit.pipelines.generation.choose", full)
    assert kept(pipe) == "CUDA out of memory."


def test_models_that_cannot_rewrite(tmp_path):
    with pytest.raises(ValueError, match="cannot answer: it knows only drawn scenes"):
        rewrite("make it red", RED, joyedit.load("tiny-joyimage", device="cpu"))
    write_random_chronoedit_checkpoint(tmp_path / "chrono")
    chrono = joyedit.load(tmp_path / "chrono", device="cpu")
    with pytest.raises(TypeError, match="a ChronoEditPipeline, whose text encoder only reads: a JoyAI"):
        rewrite("make it red", RED, chrono)


SHORT = "Make the roofs white, with much snow on them and icicles below, please, now."  # 14 words
LONG = "make it winter " * 5


@pytest.mark.parametrize(
    "call, warned",
    [
        ({"prompt": SHORT}, 1),
        ({"prompt": LONG}, 0),
        ({"prompt": [LONG, SHORT]}, 1),
        ({"prompt": "把照片改成冬天，屋顶上有很多雪，屋檐下有冰"}, 0),  # a letter is a word
        ({"prompt": "改成冬天"}, 1),
        ({"prompt": SHORT, "preset": "distill"}, 1),
        ({"prompt": "a cat", "preset": "paintbrush"}, 0),
        ({"preset": "upscale"}, 0),
    ],
)
def test_chronoedit_warns_once_of_a_short_prompt(caplog, chrono, call, warned):
    pipe = joyedit.ChronoEditPipeline.from_pipe(chrono)
    small = dict(height=32, width=48, num_frames=5, num_inference_steps=1, guidance_scale=1.0)
    images = [RED] * (len(call["prompt"]) if isinstance(call.get("prompt"), list) else 1)
    for _ in range(2):
        pipe(images, **call, **small, output_type="latent")
    messages = [one.getMessage() for one in caplog.records if "80 to 100 words" in one.getMessage()]
    assert len(messages) == warned
    if warned:
        assert "--rewrite" in messages[0] and "joyedit.rewriting.rewrite" in messages[0]


@pytest.fixture(scope="module")
def chrono(tmp_path_factory):
    folder = tmp_path_factory.mktemp("short") / "chrono"
    write_random_chronoedit_checkpoint(folder, seed=3)
    return joyedit.load(folder, device="cpu")


def test_chronoedit_says_nothing_of_what_it_was_made_for_or_got_embedded(chrono, caplog):
    small = dict(height=32, width=48, num_frames=5, num_inference_steps=1, guidance_scale=1.0)
    pipe = joyedit.ChronoEditPipeline.from_pipe(chrono)
    embeds, _ = pipe.encode_prompt("winter", do_classifier_free_guidance=False)
    pipe(RED, prompt_embeds=embeds, **small, output_type="latent")
    pipe.made_for = type(pipe.made_for)(call={"num_inference_steps": 2})
    pipe(RED, "winter", **small, output_type="latent")
    assert not [one for one in caplog.records if "80 to 100 words" in one.getMessage()]
