"""Prompts rewritten to what the editors were trained on, by a model that sees the photograph.

JoyAI-Image was trained on direct and specific instructions, with fixed words for some tasks; ChronoEdit on
reasoned ones of 80 to 100 words that begin "The user wants to". A person writes "make it winter". Qwen3-VL
rewrites that (JoyAI-Image's own text encoder, which is loaded for the edit anyway, or one by itself), or a
server does (`rewriting_server.py`). Neither does unless it is asked to, and where it fails the prompt stays.

Source: the rules are those of jd-opensource/JoyAI-Image `prompt_rewrite.py` and nv-tlabs/ChronoEdit
`scripts/prompt_enhancer.py`, in words of our own; phrases in quotes are theirs, to the letter.
"""

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from PIL.Image import Image, Resampling

from joyedit.checkpoints.plain_text import hides, shown
from joyedit.media.images import to_pil_list
from joyedit.models.qwen3_vl import Qwen3VLForConditionalGeneration
from joyedit.pipelines.generation import Sampling
from joyedit.pipelines.questions import check_question, refuse_placeholders, refuse_small, reply
from joyedit.pipelines.rewriting_server import Failed, Server

__all__ = ["FORMS", "Rewriting", "Server", "rewrite"]

log = logging.getLogger("joyedit")

SHORTER_SIDE, LONGER_SIDE = 1080, 3240  # pixels of a picture that goes along, at most
MAX_NEW_TOKENS = 512
LONGEST = 4000  # characters of a prompt; the editors read no more than some hundred words
BEGINNING = "The user wants to"

_JSON = (
    'Answer with one JSON object and nothing before or after it: {"Rewritten": "..."}. Double quotes inside '
    'the text are written \\".'
)

EDIT = f"""\
You improve instructions for a model that edits pictures. You see the picture that is to be edited (of \
several, the instruction counts them in this order) and what a user wrote, and give back one better \
instruction.

What the user wants stays what it is. Say it directly and specifically, in one or a few sentences. Where it \
is vague, contradicts itself or cannot be done, take the most reasonable reading, correct it, and add the \
details that are missing. Everything that is added or changed has to suit the scene and the style of the \
picture.

- Add, remove or replace: a clear instruction is only put into good language; a vague one gets the few \
details that it needs, such as what, where, how large, in which colour.
- Text in the picture: every text stands in English double quotes.
- People: say that they stay recognizably the same. Changes of expression or looks are natural and slight.
- Colour for a photograph without any: the instruction is "Restore and colorize the photo."
- Filling in a part that is missing: begin with "Perform inpainting on this image. The original caption is: \
" and go on with a caption of the whole picture.
- More of the scene around the picture: begin with "Extend the image beyond its boundaries using \
outpainting. The original caption is: " and go on with such a caption.

{_JSON}"""

GENERATE = f"""\
You improve descriptions for a model that makes pictures from words alone. You get what a user wrote, and \
give back one better description.

What the user wants to see stays what it is. Say directly and specifically what is there, where, how it \
looks, and in which style and light. Where the text is vague, contradicts itself or cannot be shown, take \
the most reasonable reading and add the details that are missing. Every text that is to be read in the \
picture stands in English double quotes.

{_JSON}"""

REASONED = f"""\
You write the reasoning that guides a model which edits a picture as a short film from the picture to its \
edit. You see the picture and what a user wrote. Do not edit, and do not describe the result alone: find \
out what kind of edit it is, and say how the picture has to change, precisely and so that it can be seen.

- Begin with "{BEGINNING} ..." and write 80 to 100 words, as one text.
- Pose and appearance are always described in detail. Keep the style of the picture (anime, CG art, \
cinematic, poster and so on); where it is not plain, choose one that suits it.
- Say which motion there is, of people or of the camera, where it matters, and let it be natural.
- Titles, names and texts in quotes stay as they are, in their language.
- Add, remove, replace, change an action: say what is replaced and what the new thing looks like; of text \
its place, colour and arrangement. To extract something is to keep it alone: say "while removing the \
background". Say what must not change: hair, clothes, expression, skin, age, posture, style, where things \
are, and the shot (close-up, medium shot, side view and so on).
- The same person or thing in another place: its looks, materials and marks stay, while pose and contact \
with what is around it change as the new place asks for (hands, direction of the body and of the face). The \
surroundings change as a whole. Say both, what stays and what changes.

{_JSON}"""

# Of which editor a prompt is to be -> (the instruction with pictures, that without; None: there must be one).
FORMS: Mapping[str, tuple[str, str | None]] = MappingProxyType(
    {"joyimage": (EDIT, GENERATE), "chronoedit": (REASONED, None)}
)


class Rewriting(NamedTuple):
    """prompt: what to edit with. original: what was to be rewritten, which the prompt is too where that
    failed. failure: why, or None."""

    prompt: str
    original: str
    failure: str | None = None


def rewrite(
    prompt: str,
    images: Any,
    by: Any,
    *,
    form: str = "joyimage",
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Rewriting:
    """A prompt as the editor was trained to read it.

    images: the picture that is to be edited, or a list of several (PIL, uint8 or [0, 1] arrays and tensors);
        [] for a picture from text alone. They are shown in at most 1080 pixels on the shorter side, and 3240
        on the longer.
    by: who rewrites: a JoyAI-Image pipeline, a `Qwen3VLPipeline`, or a `Server`, which gets pictures as JPEG.
    form: for which editor, "joyimage" or "chronoedit".
    max_new_tokens: how long the answer of a pipeline may be; a prompt of 100 words takes about 150.

    A failure (no answer in time, none that is a prompt, too little memory) is logged as one warning, and the
    prompt is kept. Raises ValueError or TypeError for arguments that do not fit, a small checkpoint among
    them, whose text encoder was not trained to answer.
    """
    check_question("prompt", prompt)
    if form not in FORMS:
        raise ValueError(f"form={shown(form, 40)}: known are {sorted(FORMS)}")
    none = isinstance(images, (list, tuple)) and not images
    pictures = [] if none else [smaller(picture) for picture in to_pil_list(images, "images")]
    with_pictures, without = FORMS[form]
    system = with_pictures if pictures else without
    if system is None:
        raise ValueError(f"form={form!r} needs a picture: images is an empty list")
    sampling = Sampling(max_new_tokens)
    check_rewriter(by)

    def read(text: str) -> str:
        return prompt_in(text, BEGINNING if form == "chronoedit" else "")

    question = f"User Input: {prompt.strip()}\n\nRewritten Prompt:"
    try:
        if isinstance(by, Server):
            return Rewriting(by.ask(system, pictures, question, read), prompt)
        return Rewriting(asked(by, system, pictures, question, sampling, read), prompt)
    except (Failed, ValueError, torch.OutOfMemoryError, MemoryError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
    log.warning("the prompt stays as it is: %s", reason)
    return Rewriting(prompt, prompt, reason)


def check_rewriter(by: Any) -> None:
    """Raises TypeError for what cannot rewrite, ValueError for a pipeline that lacks a part or is small."""
    if isinstance(by, Server):
        return
    kinds = getattr(by, "parts", {}).get("text_encoder", ())
    if Qwen3VLForConditionalGeneration not in kinds:
        more = ", whose text encoder only reads" if kinds else ""
        can = "a JoyAI-Image pipeline, a Qwen3VLPipeline or a Server"
        raise TypeError(f"by is a {type(by).__name__}{more}: {can} rewrites")
    refuse_small(by)
    by.require("text_encoder", "tokenizer", "processor")


def asked(
    pipe: Any,
    system: str,
    pictures: Sequence[Image],
    question: str,
    sampling: Sampling,
    read: Callable[[str], str],
) -> str:
    """What `read` makes of the model's answer, the most likely word each time. Raises Failed for an answer
    that is cut, or none."""
    answer = reply(pipe, system, list(pictures), question, sampling=sampling)
    if not answer.finished:
        raise Failed(f"the model did not come to an end within {len(answer.tokens)} tokens")
    try:
        return read(answer.text)
    except ValueError as error:
        raise Failed(f"the model answered what is no prompt: {error}") from None


def smaller(picture: Image) -> Image:
    """The picture within the size that it is shown in."""
    scale = min(SHORTER_SIDE / min(picture.size), LONGER_SIDE / max(picture.size), 1)
    if scale == 1:
        return picture
    width, height = (max(round(side * scale), 1) for side in picture.size)
    return picture.resize((width, height), Resampling.LANCZOS)


def prompt_in(text: str, beginning: str = "") -> str:
    """The prompt in an answer of the form {"Rewritten": "..."}, perhaps in a fence and after some thinking;
    on one line. Raises ValueError for another answer, and for a prompt without its beginning."""
    answer = text.rpartition("</think>")[2].strip()
    if fenced := re.search(r"```(?:json)?\s*(\{.*\})\s*```", answer, re.DOTALL | re.IGNORECASE):
        answer = fenced[1]
    try:
        found = json.loads(answer, strict=False)  # line breaks in a text are no reason
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON: {shown(answer, 80)}") from None
    prompt = found.get("Rewritten") if isinstance(found, dict) else None
    if not isinstance(prompt, str):
        raise ValueError(f'no "Rewritten" with a text in {shown(found, 80)}')
    prompt = "".join(letter for letter in " ".join(prompt.split()) if not hides(letter)).strip()
    if not prompt:
        raise ValueError("an empty text")
    if len(prompt) > LONGEST:
        raise ValueError(f"a text of {len(prompt):,} characters: at most {LONGEST:,}")
    if not prompt.lower().startswith(beginning.lower()):
        raise ValueError(f'it does not begin with "{beginning}": {shown(prompt, 80)}')
    refuse_placeholders("it", prompt)
    return prompt
