"""`joyedit edit --rewrite`: who is asked and with what, what the result records and what repeats it, and that
neither a failure nor a key goes any further."""

import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint, write_random_chronoedit_checkpoint
from joyedit.command import cli
from joyedit.command.captions import Captions
from joyedit.command.film import PHRASED, Film
from joyedit.command.instruction import Instruction
from joyedit.command.references import References
from joyedit.loading import layouts
from joyedit.media import images
from joyedit.pipelines import rewriting, rewriting_server
from joyedit.pipelines.chronoedit_presets import PRESETS
from tests.answering import answering, rewritten

KEY = "sk-local-0123456789abcdef"
RED = "Make the circle red."
CHRONO = "The user wants to make it winter. Snow covers the roofs, icicles hang below them, all else stays."


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(rewriting_server, "PAUSE", 0.001)
    for name, size in (("a.png", (96, 96)), ("b.png", (80, 96)), ("c.png", (96, 80))):
        Image.new("RGB", size, "green").save(name)


@pytest.fixture
def serve():
    with answering() as make:
        yield make


@pytest.fixture
def calls(monkeypatch):
    """The calls of edits, which take no time."""
    found = []

    def run(system, pipe, call, seeds, args):
        found.append(call)
        picture = Image.new("RGB", (32, 32))
        return [{"output": picture, "video": None} for _ in seeds]

    for system in (Instruction, References, Film, Captions):
        monkeypatch.setattr(system, "run", run)
    monkeypatch.setattr(Film, "facts", lambda *_: {})
    return found


@pytest.fixture(scope="module")
def joyai(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewrite") / "joyai"
    write_random_checkpoint(folder, seed=2, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def chrono(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewrite") / "chrono"
    write_random_chronoedit_checkpoint(folder, seed=3)
    return folder


@pytest.fixture
def saying(monkeypatch, joyai):
    """Make Qwen3-VL write this, whatever it is asked, and end."""
    tokenizer = joyedit.Qwen2Tokenizer.from_pretrained(joyai, subfolder="tokenizer")

    def say(text):
        tokens = iter([*tokenizer.encode(text), tokenizer.eos_token_id])
        monkeypatch.setattr("joyedit.pipelines.generation.choose", lambda *_: next(tokens))

    return say


def recorded(name):
    assert KEY[:8].encode() not in Path(name).read_bytes()
    found = images.read_metadata(name)
    return tuple(found.get(key) for key in ("prompt", "original_prompt", "rewritten_by"))


def asked_for(server):
    """The words that came along."""
    contents = [asked.body["messages"][1]["content"] for asked in server.asked]
    texts = [content if isinstance(content, str) else content[-1]["text"] for content in contents]
    return [text.removeprefix("User Input: ").removesuffix("\n\nRewritten Prompt:") for text in texts]


def test_a_server_rewrites_once_and_repeating_asks_nobody(run, serve):
    server = serve(rewritten(RED))
    words = ("edit", "a.png", "red please", "--seed", 1, "--num-images", 2, "-v")
    status, out, err = run(*words, "--rewrite", f"{server.base}/", "--rewrite-model", "some-model")
    assert status == 0 and out.split() == ["a-edit-1.png", "a-edit-2.png"]
    assert f"the prompt is now: {RED}" in err and KEY[:8] not in err
    assert asked_for(server) == ["red please"] and server.asked[0].body["model"] == "some-model"
    assert server.asked[0].headers["Authorization"] == f"Bearer {KEY}"
    told = (RED, "red please", f"some-model at {server.origin}")
    assert recorded("a-edit-1.png") == recorded("a-edit-2.png") == told
    plain = ("edit", "a.png", RED, "--seed", 1, "--num-images", 2, "-q", "-o", "plain.png")
    assert run(*plain)[0] == 0 and len(server.asked) == 1
    assert Image.open("plain-1.png").tobytes() == Image.open("a-edit-1.png").tobytes()

    again = ("edit", "a.png", "--config-from", "a-edit-1.png", "--num-images", 2, "-o", "again.png", "-q")
    assert run(*again)[0] == 0
    assert len(server.asked) == 1 and recorded("again-1.png") == told
    assert Image.open("again-1.png").tobytes() == Image.open("a-edit-1.png").tobytes()


def test_what_a_new_prompt_and_a_new_wish_do_to_the_record(run, serve, calls):
    server = serve(rewritten(RED), rewritten("Make the circle blue."))
    ask = ("--rewrite", server.base, "-q")
    assert run("edit", "a.png", "red please", "-o", "r.png", *ask)[0] == 0
    assert run("edit", "a.png", "Make it green.", "--config-from", "r.png", "-o", "g.png", "-q")[0] == 0
    assert recorded("g.png") == ("Make it green.", None, None) and len(server.asked) == 1
    assert run("edit", "a.png", "--config-from", "r.png", "-o", "b2.png", *ask)[0] == 0
    assert asked_for(server) == ["red please"] * 2  # not what was rewritten already
    assert recorded("b2.png")[:2] == ("Make the circle blue.", "red please")
    assert [call["prompt"] for call in calls] == [RED, "Make it green.", "Make the circle blue."]
    server.answers = ["no"]
    assert run("edit", "a.png", "--config-from", "r.png", "-o", "kept.png", *ask)[0] == 0
    assert recorded("kept.png") == recorded("r.png")  # the prompt that there was


def test_nothing_is_sent_unless_it_is_asked_for(run, serve, calls, monkeypatch):
    server = serve(rewritten(RED))
    monkeypatch.setenv("OPENAI_BASE_URL", server.base)
    monkeypatch.setattr(rewriting, "rewrite", lambda *_, **__: pytest.fail("rewritten"))
    assert run("edit", "a.png", "red please", "-o", "r.png", "-q")[0] == 0
    assert server.asked == [] and recorded("r.png") == ("red please", None, None)


@pytest.mark.parametrize("answer", ["no JSON", (500, b"", {}), (401, {"error": KEY}, {}), "hang"])
def test_a_failure_is_one_warning_and_the_prompt_stays(run, serve, calls, answer):
    server = serve((lambda handler: server.hang(handler)) if answer == "hang" else answer)
    words = ("edit", "a.png", "b.png", RED, "--seed", 1, "-v", "--rewrite-timeout", "0.2")
    status, _, err = run(*words, "--rewrite", server.base)
    assert status == 0 and err.count("the prompt stays as it is: ") == 1 and KEY[:8] not in err
    assert [call["prompt"] for call in calls] == [RED, RED]
    assert {*asked_for(server)} == {RED} and len(server.asked) <= 3  # nobody asks for the second
    for name in ("a-edit-1.png", "b-edit-1.png"):
        assert recorded(name) == (RED, None, None)


def test_every_photograph_has_a_prompt_of_its_own(run, serve, calls):
    server = serve(rewritten(RED), rewritten("Make the circle blue."))
    status, _, err = run("edit", "a.png", "b.png", "red", "--seed", 1, "--rewrite", server.base)
    assert status == 0 and f"the prompt for a.png is now: {RED}" in err
    assert recorded("a-edit-1.png")[:2] == (RED, "red")
    assert recorded("b-edit-1.png")[:2] == ("Make the circle blue.", "red")
    assert len(server.asked) == 2
    assert [call["prompt"] for call in calls] == [RED, "Make the circle blue."]


def test_edit_plus_shows_all_pictures_and_generate_none(run, serve, calls, tmp_path):
    write_random_checkpoint(tmp_path / "plus", seed=4, plus=True)
    server = serve(rewritten(RED))
    ask = ("--rewrite", server.base, "-q")
    more = ("--reference", "b.png", "--reference", "c.png", "-m", tmp_path / "plus")
    assert run("edit", "a.png", "mix", *more, *ask, "-o", "m.png")[0] == 0
    assert run("generate", "a circle", "-o", "g.png", *ask)[0] == 0
    mixed, made = (asked.body["messages"] for asked in server.asked)
    assert len(mixed[1]["content"]) == 4 and isinstance(made[1]["content"], str)
    assert [one["content"] for one in (mixed[0], made[0])] == [*rewriting.FORMS["joyimage"]]
    assert recorded("m.png")[:2] == (RED, "mix") and recorded("g.png")[:2] == (RED, "a circle")


def test_the_text_encoder_of_the_editor_is_loaded_once(run, calls, saying, joyai, monkeypatch):
    loads, load = [], layouts.load
    monkeypatch.setattr(layouts, "load", lambda *a, **k: loads.append(load(*a, **k)) or loads[-1])
    saying(f"```json\n{rewritten(RED)}\n```")
    words = ("edit", "a.png", "red please", "-o", "r.png", "--device", "cpu", "-q")
    assert run(*words, "-m", joyai, "--rewrite", "local")[0] == 0
    assert len(loads) == 1 and type(loads[0]).__name__ == "JoyImageEditPipeline"
    assert recorded("r.png") == (RED, "red please", "local") and calls[0]["prompt"] == RED


def test_another_model_has_gone_when_the_editor_is_loaded(run, calls, saying, joyai, chrono, monkeypatch):
    loads, load = [], layouts.load

    def watched(name, **options):
        alive = [encoder() for _, encoder in loads if encoder() is not None]
        pipe = load(name, **options)
        loads.append((type(pipe).__name__, weakref.ref(pipe.text_encoder)))
        assert not alive
        return pipe

    monkeypatch.setattr(layouts, "load", watched)
    saying(rewritten(CHRONO))
    words = ("edit", "a.png", "make it winter", "-o", "w.png", "--device", "cpu")
    status, _, err = run(*words, "-m", chrono, "--rewrite", joyai)
    assert status == 0 and [name for name, _ in loads] == ["Qwen3VLPipeline", "ChronoEditPipeline"]
    assert recorded("w.png") == (CHRONO, "make it winter", str(joyai)) and calls[0]["prompt"] == CHRONO
    assert "80 to 100 words" not in err


def test_a_server_writes_for_chronoedit(run, serve, calls, chrono):
    server = serve(rewritten(CHRONO))
    words = ("edit", "a.png", "make it winter", "-m", chrono, "--preset", "distill")
    assert run(*words, "--rewrite", server.base, "-o", "w.png", "-q")[0] == 0
    assert server.asked[-1].body["messages"][0]["content"] == rewriting.FORMS["chronoedit"][0]
    assert recorded("w.png")[:2] == (CHRONO, "make it winter")


def test_damaged_records_are_refused(run, calls, no_work):
    image = Image.new("RGB", (96, 96))
    images.save_png(image, "x.png", {"prompt": "x", "original_prompt": 3, "model": "tiny-joyimage"})
    status, _, err = run("edit", "a.png", "--config-from", "x.png")
    assert status == 1 and "the recorded original_prompt is damaged: 3" in err


def test_presets_with_words_of_their_own():
    assert sorted(PHRASED) == sorted(name for name, preset in PRESETS.items() if preset.prompt is not None)


@pytest.mark.parametrize(
    "words, message",
    [
        (["x", "--rewrite", "http://me:hunter2@localhost/v1"], "no URL with a user or password is taken"),
        (["x", "--rewrite", "https://localhost/v1?key=hunter2"], "no URL with a query is taken"),
        (["x", "--rewrite", "http://localhost:8000/hunter2"], "must end in /v1"),
        (["x", "--rewrite", "ftp://hunter2@localhost/v1"], "a URL is not read here"),
        (["x", "--rewrite"], "expected one argument"),
        (["x", "--rewrite-model", "gpt-5"], "--rewrite-model is for a server: --rewrite URL"),
        (["x", "--rewrite", "local", "--rewrite-timeout", "3"], "--rewrite-timeout is for a server"),
        (["x", "--rewrite", "http://localhost/v1", "--rewrite-timeout", "0"], "0 is not above 0"),
        (["x", "--rewrite", "http://localhost/v1", "--rewrite-timeout", "9999"], "at most 3600 seconds"),
        (["x", "--rewrite", "http://localhost/v1", "--rewrite-timeout", "soon"], "'soon' is not a number"),
        (["x", "--rewrite", "http://localhost/v1", "--rewrite-model", " "], "model is empty"),
        (["--source", "a", "--target", "b", "--rewrite", "local"], "--rewrite is for an instruction"),
        (["--camera", "yaw=3", "--rewrite", "http://localhost/v1"], "--camera has words of its own"),
        (["--preset", "upscale", "--rewrite", "some/folder"], "--preset upscale has words of its own"),
        (["cat", "--preset", "paintbrush", "--rewrite", "some/folder"], "--preset paintbrush has words of"),
    ],
)
def test_wrong_arguments_end_with_2(capsys, no_work, words, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["edit", "a.png", *words])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and message in err and len(err.splitlines()) == 1
    assert "hunter2" not in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--rewrite", "local"], "--rewrite local: tiny-joyimage cannot answer: it knows only drawn scenes"),
        (["--rewrite", "tiny-joyimage", "-m", "tiny-chronoedit"], "tiny-joyimage cannot answer"),
        (["--rewrite", "local", "-m", "tiny-chronoedit"], "(UMT5) reads, and cannot write: --rewrite FOLDER"),
        (["--rewrite", "tiny-chronoedit"], "tiny-chronoedit holds a ChronoEditPipeline, which has no words"),
        (["--rewrite", "nowhere/at/all"], "nowhere"),
        (["--rewrite", "local", "-m", "tiny-diffedit"], "tiny-diffedit takes no instruction"),
        (["--rewrite", "local", "--config-from", "moved.png"], "--camera has words of its own"),
    ],
)
def test_what_cannot_rewrite_is_refused_before_work(run, no_work, words, message):
    made = {"prompt": "x", "camera": "yaw=3", "model": "tiny-joyimage", "pipeline": "JoyImageEditPipeline"}
    images.save_png(Image.new("RGB", (96, 96)), "moved.png", made)
    told = [] if "--config-from" in words else ["make it red"]
    status, out, err = run("edit", "a.png", *told, *words)
    assert status == 1 and out == "" and message in err.splitlines()[-1]


def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(capsys, no_work, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX: y")
    with pytest.raises(SystemExit):
        cli.main(["edit", "a.png", "x", "--rewrite", "http://localhost/v1", "-v"])
    err = capsys.readouterr().err
    assert "the key (of OPENAI_API_KEY" in err and KEY[:8] not in err


def test_an_edit_between_captions_takes_over_no_rewriting(run, calls):
    made = {"prompt": RED, "original_prompt": "red", "rewritten_by": "local", "model": "tiny-joyimage"}
    images.save_png(Image.new("RGB", (96, 96)), "x.png", made)
    words = ("--source", "a", "--target", "b", "--config-from", "x.png", "-m", "tiny-diffedit", "-q")
    assert run("edit", "a.png", *words, "-o", "y.png")[0] == 0
    assert recorded("y.png") == (None, None, None) and calls[0]["target_prompt"] == "b"
