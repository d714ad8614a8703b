"""Answers against transformers: the same random Qwen3-VL in both, ours opened from the folder that it saved.

The reference's processor needs torchvision; tests of ours hold it to recorded patches (`tests/text`).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, GenerationConfig
from transformers import Qwen3VLConfig as TheirConfig
from transformers import Qwen3VLForConditionalGeneration as Theirs

import joyedit
from joyedit.pipelines import generation, questions
from tests.parity.same_weights import difference

GOLDENS = Path(__file__).resolve().parents[1] / "goldens" / "tiny-joyimage-edit"
NEW = 16


@pytest.fixture(scope="module")
def theirs():
    """Uneven attention, and logits that no rounding reorders."""
    raw = json.loads((GOLDENS / "text_encoder" / "config.json").read_text())
    torch.manual_seed(1)
    model = Theirs(TheirConfig.from_dict(raw)).float().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.copy_(1.7 + 0.1 * torch.randn_like(parameter))
        elif parameter.ndim == 1:
            parameter.copy_(0.1 * torch.randn_like(parameter) + (0 if name.endswith("bias") else 1))
        else:
            scale = 0.5 if "embed" in name else parameter[0].numel() ** -0.5
            parameter.copy_(scale * torch.randn_like(parameter))
    model.lm_head.weight.mul_(3)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """A plain folder of Qwen3-VL, as transformers writes it."""
    folder = tmp_path_factory.mktemp("qwen")
    theirs.save_pretrained(folder)
    shutil.copytree(GOLDENS / "tokenizer", folder, dirs_exist_ok=True)
    shutil.copy(GOLDENS / "processor" / "preprocessor_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return joyedit.load(folder, device="cpu")


@pytest.fixture
def pipe(loaded):
    return joyedit.Qwen3VLPipeline.from_pipe(loaded)


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


ONE, TWO, THREE = picture(96, 64), picture(70, 150, seed=1), picture(33, 40, seed=2)

# The arguments of `ask`, and the prompt to the letter.
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
CONVERSATIONS = {
    "text": (([], "a cat"), {}, "<|im_start|>user\na cat<|im_end|>\n"),
    "image": ((ONE, "a cat?"), {}, f"<|im_start|>user\n{SEEN}a cat?<|im_end|>\n"),
    "images": (([ONE, TWO, THREE], "Ä\n b"), {}, f"<|im_start|>user\n{SEEN * 3}Ä\n b<|im_end|>\n"),
    "turns": (
        ([TWO, THREE], "and these?"),
        {"history": [(ONE, "a cat?", "no "), ("why", "")]},
        f"<|im_start|>user\n{SEEN}a cat?<|im_end|>\n<|im_start|>assistant\nno <|im_end|>\n"
        "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        f"<|im_start|>user\n{SEEN * 2}and these?<|im_end|>\n",
    ),
    "images first": (
        ([], "b"),
        {"history": [([ONE, TWO], "a", "c")]},
        f"<|im_start|>user\n{SEEN * 2}a<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n",
    ),
}
every_conversation = pytest.mark.parametrize("name", CONVERSATIONS)


def pictures_in(name):
    (images, _), call, _ = CONVERSATIONS[name]
    listed = [turn[0] for turn in call.get("history", ()) if len(turn) == 3] + [images]
    return [picture for one in listed for picture in (one if isinstance(one, list) else [one])]


def ask_theirs(model, pipe, name, **options):
    """New tokens, and the logits that each was chosen from."""
    prompt = SYSTEM + CONVERSATIONS[name][2] + "<|im_start|>assistant\n"
    inputs = pipe.processor(text=[prompt], images=pictures_in(name) or None)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).int()
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    made = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return made.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(made.logits)


def ask_ours(monkeypatch, pipe, name, **options):
    """The same, and all of the answer."""
    logits, choose = [], generation.choose

    def watched(scores, *rest):
        logits.append(scores.clone())
        return choose(scores, *rest)

    monkeypatch.setattr(generation, "choose", watched)
    arguments, call, _ = CONVERSATIONS[name]
    answer = pipe.ask(*arguments, **{"max_new_tokens": NEW, **call, **options})
    return answer, torch.stack(logits)


@every_conversation
def test_greedy_tokens_and_logits(theirs, pipe, monkeypatch, name):
    tokens, logits = ask_theirs(theirs, pipe, name)
    assert len(set(tokens)) > NEW // 3  # not one word again and again
    for use_cache in (True, False):
        answer, ours = ask_ours(monkeypatch, pipe, name, use_cache=use_cache)
        assert answer.tokens == tokens and not answer.finished
        assert difference(ours, logits) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"temperature": 1.0}, marks=pytest.mark.slow),
        {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.4},
        pytest.param({"temperature": 0.4}, marks=pytest.mark.slow),
        pytest.param({"temperature": 2.5, "top_k": 5}, marks=pytest.mark.slow),
        pytest.param({"temperature": 3.0, "top_p": 0.6}, marks=pytest.mark.slow),
        pytest.param({"temperature": 1.5, "top_k": 10**6, "repetition_penalty": 0.8}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_draws(theirs, pipe, monkeypatch, options):
    """The same random numbers, and so the same tokens where the shares are the same."""
    drawn = set()
    for seed in range(2):
        torch.manual_seed(seed)
        tokens, _ = ask_theirs(theirs, pipe, "image", do_sample=True, **{"top_k": 0, **options})
        generator = torch.Generator().manual_seed(seed)
        answer, _ = ask_ours(monkeypatch, pipe, "image", generator=generator, **options)
        assert answer.tokens == tokens
        drawn.add(tuple(tokens))
    assert len(drawn) == 2
    torch.manual_seed(1)  # the global generator draws, where none is given
    assert ask_ours(monkeypatch, pipe, "image", **options)[0].tokens == tokens


@pytest.mark.parametrize(
    "penalty", [1.3, *(pytest.param(penalty, marks=pytest.mark.slow) for penalty in (0.7, 3.0))]
)
def test_repetition_penalty_without_a_draw(theirs, pipe, monkeypatch, penalty):
    plain, _ = ask_theirs(theirs, pipe, "images")
    tokens, _ = ask_theirs(theirs, pipe, "images", repetition_penalty=penalty)
    answer, _ = ask_ours(monkeypatch, pipe, "images", repetition_penalty=penalty)
    assert answer.tokens == tokens != plain


def test_it_ends_where_the_reference_does(theirs, pipe, monkeypatch):
    tokens, _ = ask_theirs(theirs, pipe, "image")
    last = tokens[5]
    ended, _ = ask_theirs(theirs, pipe, "image", eos_token_id=[last, tokens[7]])
    monkeypatch.setattr(pipe.text_encoder, "generation", {"eos_token_id": [tokens[7], last]})
    answer, _ = ask_ours(monkeypatch, pipe, "image")
    assert answer.tokens == ended == tokens[: tokens.index(last) + 1] and answer.finished


def test_the_published_template(shared_data):
    """The prompts of these tests, and what `ask` makes, are what the published chat template makes."""
    template = (shared_data / "joyai-image-edit" / "tokenizer" / "chat_template.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tokenizer", chat_template=template)
    for (images, question), call, prompt in CONVERSATIONS.values():
        turns = [questions.check_turn(turn) for turn in call.get("history", ())]
        pictures = questions.pictures_of(images, "images")
        messages = [{"role": "system", "content": "You are a helpful assistant."}]
        for turn in (*turns, questions.Turn(pictures, question, None)):
            content = [{"type": "image"} for _ in turn.images] + [{"type": "text", "text": turn.question}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": turn.answer})
        said = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        assert said == SYSTEM + prompt + "<|im_start|>assistant\n"
        assert questions.chat(questions.SYSTEM, turns, pictures, question) == said
