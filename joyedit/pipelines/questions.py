"""Questions about pictures, answered in words: `pipe.ask`, and what it is made of.

JoyAI-Image's text encoder is a whole Qwen3-VL, which can also talk. It gets the conversation in its chat
template (a system turn, then questions and answers in turn), each picture before the text of its question and
in its own size, and goes on from there.

Source: transformers `generation/utils.py`, `generation/streamers.py`; jd-opensource/JoyAI-Image
`inference_und.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL.Image import Image

from joyedit.checkpoints.plain_text import shown
from joyedit.media.images import to_pil_list
from joyedit.pipelines.checks import check_generators
from joyedit.pipelines.generation import Sampling, generate
from joyedit.text.qwen2_tokenizer import Qwen2Tokenizer

SYSTEM = "You are a helpful assistant."
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
PLACEHOLDERS = ("<|image_pad|>", "<|video_pad|>")  # in a text they would stand for a picture
STOPS = ("<|im_end|>", "<|endoftext|>")  # of a checkpoint without generation_config.json


class Turn(NamedTuple):
    """A question with its pictures, and its answer."""

    images: list[Image]
    question: str
    answer: str


class Answer(NamedTuple):
    """text: without special tokens. tokens: the new ones, with the one that ended the answer. finished: False
    where it was cut, by max_new_tokens or an interruption. history: what a next question passes on."""

    text: str
    tokens: list[int]
    finished: bool
    history: tuple[Turn, ...]


def ask(
    pipe: Any,
    images: Any,
    question: str,
    *,
    history: Sequence[Any] = (),
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    stream: Callable[[str], Any] | None = None,
) -> Answer:
    """Answer a question about pictures with the text encoder.

    images: one picture or a list of several (PIL, uint8 or [0, 1] arrays and tensors), which stand before the
        question; [] for a question about none. They are read in their own size, up to that of the processor.
    history: what was said before, `(question, answer)` or `(images, question, answer)` for each turn: the
        pictures stand where they were shown, once. `answer.history` is that of the next question.
    temperature: 0 takes the most likely token each time; others draw, 0.7 with top_p 0.8 as in JoyAI's
        own script.
    top_p, top_k: draw among the most likely tokens with that share together, or among so many (0: all).
    repetition_penalty: above 1 makes what was said already less likely, the question included.
    use_cache: False reads everything again for each token, for comparison.
    generator: draws, on the device that it is of; None: the global one.
    stream: called with each new piece of text; all pieces together are the answer's text.

    Ends at a token that the checkpoint's generation_config.json names as `eos_token_id` (otherwise <|im_end|>
    and <|endoftext|>), after `max_new_tokens`, or when `pipe.interrupt` is set. Raises ValueError or
    TypeError before any work when an argument does not fit, ValueError for a small checkpoint whose text
    encoder was not trained to answer, and for logits that are not finite.
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty)
    return reply(pipe, SYSTEM, images, question, history, sampling, use_cache, generator, stream)


@torch.no_grad()
def reply(
    pipe: Any,
    system: str,
    images: Any,
    question: str,
    history: Sequence[Any] = (),
    sampling: Sampling | None = None,
    use_cache: bool = True,
    generator: torch.Generator | None = None,
    stream: Callable[[str], Any] | None = None,
) -> Answer:
    """`ask` under another system turn. pipe: with `text_encoder`, `tokenizer` and `processor`."""
    pipe = pipe.for_one_call()
    refuse_small(pipe)
    turns = [check_turn(turn) for turn in check_history(history)]
    shown_now = pictures_of(images, "images")
    check_question("question", question)
    check_generators(generator, 1)
    if stream is not None and not callable(stream):
        raise TypeError(f"stream is a {type(stream).__name__}, which cannot be called")
    pictures = [picture for turn in turns for picture in turn.images] + shown_now
    pipe.require("text_encoder", "tokenizer", *(["processor"] if pictures else []))

    prompt = chat(system, turns, shown_now, question)
    inputs: Any = (
        pipe.processor(text=[prompt], images=pictures, return_tensors="pt")
        if pictures
        else pipe.tokenizer([prompt], return_tensors="pt")
    )
    ids = inputs["input_ids"][0].tolist()
    most = pipe.text_encoder.config.text_config.max_position_embeddings
    if len(ids) > most:
        raise ValueError(f"the conversation is of {len(ids)} tokens, pictures included: at most {most}")

    words = Words(pipe.tokenizer, stream)
    tokens: list[int] = []
    with pipe.on_device(pipe.text_encoder) as encoder:
        stops = encoder.stop_tokens or known_stops(pipe.tokenizer)
        seen = None
        if pictures:
            pixels, grid = inputs["pixel_values"], inputs["image_grid_thw"]
            seen = encoder.encode_images(pixels.to(pipe.device), grid.to(pipe.device))
        for token in generate(
            encoder, ids, seen, sampling or Sampling(), stops, pipe.device, use_cache, generator
        ):
            tokens.append(token)
            words.add(token)
            if pipe.interrupt:
                break
    text = words.end()
    finished = bool(tokens) and tokens[-1] in stops
    return Answer(text, tokens, finished, (*turns, Turn(shown_now, question, text)))


def chat(system: str, turns: Sequence[Turn], images: Sequence[Image], question: str) -> str:
    """The conversation in Qwen3-VL's chat template, up to where the answer begins."""
    parts = [("system", system)]
    for turn in turns:
        parts += [("user", VISION * len(turn.images) + turn.question), ("assistant", turn.answer)]
    parts.append(("user", VISION * len(images) + question))
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in parts)
    return f"{said}<|im_start|>assistant\n"


class Words:
    """The text of tokens as they come. A letter may be several tokens: what is no whole one waits."""

    def __init__(self, tokenizer: Qwen2Tokenizer, stream: Callable[[str], Any] | None):
        self.tokenizer = tokenizer
        self.stream = stream
        self.waiting: list[int] = []
        self.pieces: list[str] = []

    def add(self, token: int) -> None:
        self.waiting.append(token)
        if not self._text().endswith("\N{REPLACEMENT CHARACTER}"):
            self._give()

    def end(self) -> str:
        """The whole text."""
        self._give()
        return "".join(self.pieces)

    def _text(self) -> str:
        return self.tokenizer.decode(self.waiting, skip_special_tokens=True)

    def _give(self) -> None:
        piece = self._text()
        self.waiting = []
        if piece:
            self.pieces.append(piece)
            if self.stream is not None:
                self.stream(piece)


def known_stops(tokenizer: Qwen2Tokenizer) -> list[int]:
    return [token for token in tokenizer.convert_tokens_to_ids(STOPS) if token is not None]


def refuse_small(pipe: Any) -> None:
    """Raises ValueError for a small checkpoint: its text encoder learned to read instructions."""
    if pipe.made_for.world is not None:
        raise ValueError(no_answers("this checkpoint", pipe.made_for.world.about))


def no_answers(name: str, about: str) -> str:
    return (
        f"{name} cannot answer: it knows only {about}, and its text encoder was trained to read "
        "instructions, not to answer questions. Real weights are: jdopensource/JoyAI-Image-Edit-Diffusers, "
        "or a folder of Qwen3-VL"
    )


def check_history(history: Any) -> Sequence[Any]:
    if not isinstance(history, (list, tuple)):
        raise TypeError(f"history is a {type(history).__name__}: must be a list of (question, answer)")
    return history


def check_turn(turn: Any) -> Turn:
    """One turn of a history. Raises TypeError or ValueError for anything else than a question with its
    answer, and perhaps pictures before them."""
    if not isinstance(turn, (list, tuple)) or len(turn) not in (2, 3):
        wanted = "(question, answer) or (images, question, answer)"
        raise TypeError(f"history holds {shown(turn, 80)}: each turn must be {wanted}")
    *images, question, answer = turn
    check_question("a question of history", question)
    if not isinstance(answer, str):
        raise TypeError(f"an answer of history is a {type(answer).__name__}: must be a string")
    refuse_placeholders("an answer of history", answer)
    return Turn(pictures_of(images[0], "images of history") if images else [], question, answer)


def pictures_of(images: Any, name: str) -> list[Image]:
    """As `to_pil_list`, but there may be none."""
    return [] if isinstance(images, (list, tuple)) and not images else to_pil_list(images, name, alpha=True)


def check_question(name: str, text: Any) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}: must be a string")
    if not any(letter.isprintable() and not letter.isspace() for letter in text):
        raise ValueError(f"{name} is empty: say what is to be answered")
    refuse_placeholders(name, text)


def refuse_placeholders(name: str, text: str) -> None:
    if found := [word for word in PLACEHOLDERS if word in text]:
        raise ValueError(
            f"{name} holds {found[0]!r}, which stands for a picture; give the picture as images="
        )
