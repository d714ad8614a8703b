"""The drawn world's sentences said in other ways, and trainings that begin with a checkpoint."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.shapes import diffedit, evaluate, publish, scenes, vocabulary, wording
from benchmarks.shapes.vocabulary import clip_tokenizer, instructions, qwen_tokenizer, umt5_tokenizer
from joyedit.models.umt5 import UMT5Config, UMT5EncoderModel

SAME = {"disc": "circle", "violet": "purple", "grey": "gray", "greyscale": "grayscale"}
MEANT = {*scenes.SHAPES, *scenes.COLOURS, *scenes.BACKGROUNDS, "light", "top", "bottom", "left", "right"}


def meant(text):
    """The words by which edits differ, in order of the alphabet."""
    words = [SAME.get(word, word) for word in re.findall(r"\w+", text.lower())]
    return sorted({word for word in words if word in MEANT})


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_other_words_mean_the_same(kind):
    plain = [scenes.make_edit(i, kinds=(kind,)).instruction for i in range(60)]
    told = [wording.told(text, i) for i, text in enumerate(plain)]
    assert told == [wording.told(text, i) for i, text in enumerate(plain)]
    assert 0.1 < np.mean([a == b for a, b in zip(plain, told, strict=True)]) < 0.4
    for before, after in zip(plain, told, strict=True):
        extra = {"black", "white"} if kind == "grey" else {"red"} if kind == "move" else set()
        assert set(meant(after)) - extra == set(meant(before)) - extra, after
    shares = {
        "please": np.mean(["please" in text.lower() for text in told]),
        "upper": np.mean([text.isupper() for text in told]),
        "lower": np.mean([text.islower() for text in told]),
        "no stop": np.mean([text[-1].isalpha() for text in told]),
    }
    assert all(share > 0.04 for share in shares.values()), shares


def test_every_instruction_has_other_sentences():
    for kind in scenes.KINDS:
        for i in range(6):
            text = scenes.make_edit(i, kinds=(kind,)).instruction
            assert sum(re.fullmatch(pattern, text) is not None for pattern, _ in wording.SENTENCES) > 0, text
            rng = np.random.default_rng(i)
            assert len({wording.other_words(text, rng) for _ in range(30)}) > 1, text


def test_captions_in_other_words_show_the_same():
    for i in range(60):
        plain = scenes.caption(scenes.make_edit(i).source)
        assert meant(wording.told(plain, i, wording.reworded_caption)) == meant(plain)


def test_wordings():
    said = {name: change("Remove the red box.") for name, change in wording.WORDINGS.items()}
    assert said == {
        "plain": "Remove the red box.",
        "lower case": "remove the red box.",
        "upper case": "REMOVE THE RED BOX.",
        "no full stop": "Remove the red box",
        "please": "Please remove the red box.",
    }


@pytest.mark.parametrize("make", [qwen_tokenizer, umt5_tokenizer, clip_tokenizer])
def test_words_begin_as_they_were_or_as_what_they_are_like(make):
    """A word in other letters or after another one has the row of the word; a synonym that of its like."""
    texts = ["Remove the red circle.", "Change the color of the red circle to gray."]
    new = ["remove THE red CIRCLE", "REMOVE the gray DISC", "please remove Grey colour"]
    old, varied = make(texts), make([*texts, *new])
    was, now = (vocabulary._tokens(tokenizer) for tokenizer in (old, varied))
    rows = vocabulary.rows_alike(was, now)

    def words(text):
        tokens = (was[rows[i]] for i in varied.encode(text, add_special_tokens=False))
        return [vocabulary._word(token) for token in tokens]

    for text in texts:
        expected = old.encode(text, add_special_tokens=False)
        assert [rows[i] for i in varied.encode(text, add_special_tokens=False)] == expected
    assert words("remove THE red CIRCLE") == ["remove", "the", "red", "circle"]
    assert words("REMOVE the gray DISC") == ["remove", "the", "gray", "circle"]
    assert words("please remove Grey colour") == ["the", "remove", "gray", "color"]


def test_a_network_begins_with_the_weights_and_reads_other_letters_alike(monkeypatch):
    texts = instructions(60, ("recolour", "replace", "grey"))
    old, new = umt5_tokenizer(texts), umt5_tokenizer([*texts, *map(str.upper, texts)])
    torch.manual_seed(0)
    before, after = (
        UMT5EncoderModel(
            UMT5Config(vocab_size=len(t), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
        for t in (old, new)
    )
    pipe = SimpleNamespace(tokenizer=old, components={"text_encoder": before})
    monkeypatch.setattr(vocabulary, "load", lambda folder, **options: pipe)
    vocabulary.begin_with("anywhere", {"text_encoder": after}, new)
    for text in texts[:5]:
        tokens = torch.tensor([old.encode(text)])
        wanted = before.encode(tokens, torch.ones_like(tokens))
        for said in (text, text.upper()):
            tokens = torch.tensor([new.encode(said)])
            assert torch.equal(after.encode(tokens, torch.ones_like(tokens)), wanted)


def test_what_is_left_of_another_scene_is_what_an_edit_begins_with():
    """Noised at T, the other scene is x0 in a noise that holds the rest of the other."""
    torch.manual_seed(0)
    timesteps = torch.arange(0, 1000, 7)
    rest = diffedit.leftover(timesteps).double()
    ratio = (diffedit.ALPHAS / (1 - diffedit.ALPHAS)).sqrt().double()
    edited = rest > 0
    begun = (ratio[None] - rest[:, None]).abs().argmin(1)  # T of each
    assert torch.allclose(ratio[begun][edited], rest[edited], rtol=1e-6)
    assert (begun >= timesteps)[edited].all() and (begun[edited] > 350).all()
    assert 0.4 < (begun == timesteps)[timesteps > 350].float().mean() < 0.7
    assert (begun[(timesteps < 300) & edited] <= 900).all()
    x0, other, noise = torch.randn(3, len(timesteps), dtype=torch.double)
    alpha = diffedit.ALPHAS[begun].double()
    noised = alpha.sqrt() * other + (1 - alpha).sqrt() * noise
    seen = alpha.sqrt() * x0 + (1 - alpha).sqrt() * (noise + rest * (other - x0))
    assert torch.allclose(noised[edited], seen[edited], atol=1e-6)


def test_success_is_told_for_every_wording(monkeypatch):
    """Of an editor that reads small letters only, and removes nothing."""
    monkeypatch.setattr(evaluate, "WORDED", 2)
    edits = evaluate.held_out(3, (1,), ("recolour", "remove"))
    read = []

    def edited(told):
        read.extend(edit.instruction for edit in told)
        able = [edit.instruction.islower() and edit.kind == "recolour" for edit in told]
        return [scenes.draw(e.target if can else e.source) for e, can in zip(told, able, strict=True)]

    found = evaluate.in_other_words(edits, edited)
    assert list(found) == list(wording.WORDINGS)
    for name, change in wording.WORDINGS.items():
        ok = float(name == "lower case")
        assert found[name] == {"edits": 4, "ok": ok / 2, "kinds": {"recolour": ok, "remove": 0.0}}
        assert [change(edits[i].instruction) for i in (0, 1, 3, 4)] == read[:4]
        del read[:4]
    table = publish._wordings(found)
    assert table[0].startswith("4 of these edits") and "| lower case | 50 % | 100 % | 0 % |" in table


@pytest.mark.parametrize("name", ["joyimage", "chronoedit", "diffedit"])
def test_every_wording_succeeds_nearly_as_often(name):
    """As recorded, within 5 points of the plain one."""
    found = json.loads((publish.RESULTS / f"{name}.json").read_text())["held_out"]["wordings"]
    assert list(found) == list(wording.CAPTION_WORDINGS if name == "diffedit" else wording.WORDINGS)
    assert found["plain"]["edits"] >= 40
    for one in found.values():
        assert abs(one["ok"] - found["plain"]["ok"]) <= 0.05
