"""`joyedit ask`: the answer alone on standard output, and what is refused."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import joyedit
from benchmarks.random_checkpoint import write_random_checkpoint
from joyedit.command.cli import main
from joyedit.loading import layouts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ask") / "joyai"
    write_random_checkpoint(folder, seed=4)
    return folder


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save("a.png")
    Image.new("RGB", (40, 80), "red").save("b.png")
    return tmp_path


@pytest.fixture
def no_load(monkeypatch):
    monkeypatch.setattr(layouts, "load", lambda *_, **__: pytest.fail("a model is loaded"))


def test_info_about_a_folder_of_qwen(checkpoint, tmp_path, capsys):
    pipe = joyedit.load(checkpoint, device="cpu")
    for part in (pipe.text_encoder, pipe.processor):
        part.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "pipeline: Qwen3VLPipeline" in out and "layout: qwen3-vl" in out
    count = sum(parameter.numel() for parameter in pipe.text_encoder.parameters())
    assert re.search(rf"text_encoder +Qwen3VLForConditionalGeneration +{count:,} +bfloat16", out)
    assert main(["convert", str(tmp_path), str(tmp_path.parent / "written")]) == 0
    again = joyedit.load(tmp_path.parent / "written", device="cpu")
    assert again.ask([], "what?", max_new_tokens=3).tokens == pipe.ask([], "what?", max_new_tokens=3).tokens
    assert main(["edit", "a.png", "make it red", "-m", str(tmp_path)]) == 1


def asked(checkpoint, names, **options):
    pipe = joyedit.load(checkpoint, device="cpu")
    return pipe.ask([joyedit.load_image(name) for name in names], "what?", max_new_tokens=5, **options)


@pytest.mark.parametrize("names", [[], ["a.png"], ["a.png", "b.png"]])
def test_the_answer_is_all_that_is_printed(desk, checkpoint, capsys, names):
    words = [*names, "--model", str(checkpoint), "what?", "--device", "cpu", "--max-new-tokens", "5"]
    assert main(["ask", *words]) == 0
    out, err = capsys.readouterr()
    assert out == asked(checkpoint, names).text + "\n"
    assert "the answer is cut after 5 tokens" in err


def test_sampling_reaches_the_pipeline(desk, checkpoint, capsys):
    options = (
        "--temperature 3 --top-p 0.9 --top-k 40 --repetition-penalty 1.2 --seed 7 --dtype float32".split()
    )
    assert main(["ask", "a.png", "what?", "-m", str(checkpoint), "--max-new-tokens", "5", *options]) == 0
    generator = torch.Generator().manual_seed(7)
    pipe = joyedit.load(checkpoint, device="cpu", dtype="float32")
    call = dict(temperature=3.0, top_p=0.9, top_k=40, repetition_penalty=1.2, generator=generator)
    answer = pipe.ask(joyedit.load_image("a.png"), "what?", max_new_tokens=5, **call)
    assert capsys.readouterr().out == answer.text + "\n"


def test_words_come_one_by_one_on_a_terminal(desk, checkpoint, monkeypatch):
    """And what a terminal would obey is escaped there; in a file it stands as it is."""

    class Terminal(io.StringIO):
        parts: list[str] = []

        def isatty(self):
            return True

        def write(self, text):
            self.parts.append(text)

    def write(*_, stream, **options):
        for piece in ("red", " \x1b[2J", "\nblue"):
            if stream:
                stream(piece)
        return type("Answer", (), {"text": "red \x1b[2J\nblue", "finished": True, "tokens": []})

    monkeypatch.setattr(joyedit.Qwen3VLPipeline, "ask", write)
    terminal, file = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["ask", "what?", "-m", str(checkpoint)]) == 0
    assert [part for part in terminal.parts if part] == ["red", " \\x1b[2J", "\nblue", "\n"]
    monkeypatch.setattr(sys, "stdout", file)
    assert main(["ask", "what?", "-m", str(checkpoint)]) == 0
    assert file.getvalue() == "red \x1b[2J\nblue\n"


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: QUESTION"),
        (["a.png"], "a question is missing: a.png is a photograph"),
        (["a.png", " "], "the question is empty"),
        (["what", "is", "this"], "'what' is no photograph that is here: a question of several words goes in"),
        (["what?", "--temperature", "warm"], "argument --temperature: 'warm' is not a number"),
        (["what?", "--frames", "0"], "unrecognized arguments: --frames"),
        (["what?", "--temperature", "-1"], "argument --temperature: -1 is below 0"),
        (["what?", "--temperature", "nan"], "argument --temperature: nan is not finite"),
        (["what?", "--max-new-tokens", "0"], "argument --max-new-tokens: 0 is not within 1"),
        (["what?", "--top-p", "0"], "argument --top-p: 0 is not above 0"),
        (["what?", "--top-p", "1.5"], "argument --top-p: 1.5 is not within 0 and 1"),
        (["what?", "--top-k", "-1"], "argument --top-k: -1 is not within 0"),
        (["what?", "--repetition-penalty", "0"], "argument --repetition-penalty: 0 is not above 0"),
        (["what?", "--model", "https://example.org/x"], "a URL is not read here"),
        (["what?", "--dtype", "int8"], "argument --dtype: invalid choice"),
    ],
)
def test_wrong_arguments_end_with_2(desk, capsys, no_load, words, message):
    with pytest.raises(SystemExit) as ended:
        main(["ask", *words])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["what?"], "tiny-joyimage cannot answer: it knows only drawn scenes"),
        (["what?", "-m", "tiny-joyimage"], "real weights"),
        (
            ["what?", "-m", "tiny-chronoedit"],
            "tiny-chronoedit holds a ChronoEditPipeline, which has no words",
        ),
        (["none.png", "what?"], "none.png"),
        (["broken.png", "what?"], "broken.png"),
        (["what?", "-m", "nowhere/at/all"], "nowhere"),
    ],
)
def test_what_cannot_be_asked_is_one_line_before_work(desk, capsys, no_load, words, message):
    Path("broken.png").write_text("no picture")
    assert main(["ask", *words]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message.lower() in err.lower() and len(err.splitlines()) == 1
