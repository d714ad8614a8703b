"""How the command line is read: argparse, whose errors are one line, and whose left-over words find a place.

`joyedit edit` takes any number of photographs before an instruction that may be missing, and options between
all of them, which argparse alone does not sort.
"""

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from joyedit.checkpoints.plain_text import visible
from joyedit.command import spatial
from joyedit.command.film import WORDED
from joyedit.command.results import OUTPUT_SUFFIXES
from joyedit.media.download import is_url

LONGEST_MESSAGE = 600  # characters; most are a fifth of that
# Endings of names that are meant as photographs, whether or not such a file is there.
PHOTO_SUFFIXES = {*OUTPUT_SUFFIXES, ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".tif", ".tiff"}


class Parser(argparse.ArgumentParser):
    """An error is one line and names the help; argparse would print the usage, 17 lines of options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)} (see `{self.prog} --help`)\n")


def one_line(message: str, longest: int = LONGEST_MESSAGE) -> str:
    """The message without line breaks, with escapes for what a terminal would obey; of a very long one, which
    repeats what somebody wrote, beginning and end."""
    line = visible(" ".join(message.split()), None)
    half = longest // 2
    return line if len(line) <= longest else f"{line[:half]} ... {line[-half:]}"


def take_in_words(args: argparse.Namespace, left: Sequence[str]) -> str | None:
    """Put the words that argparse had no place for in theirs; what is wrong with them, if anything.

    Of `joyedit edit` all words are photographs but the last, which is the instruction where nothing else says
    what to do. With --config-from, which may repeat one, a last word that can only be words is one, too.
    """
    unknown = [word for word in left if word.startswith("-") and word != "-"]
    photos = getattr(args, "photos", None)
    if unknown or (photos is None and left):
        return unrecognized(args, left)
    if photos is None:
        return None
    words = [*photos, *([args.prompt] if args.prompt is not None else []), *left]
    told = args.config_from is not None or args.prompt_file is not None
    told = told or args.source_prompt is not None or args.target_prompt is not None
    told = told or any(getattr(args, name) is not None for name in spatial.TELLING) or args.preset in WORDED
    args.prompt = None
    if len(words) > 1 and not (told and is_photo(words[-1])):
        args.prompt = words.pop()
    args.photos = words
    if not told and args.prompt is not None and is_photo_name(args.prompt):
        return f"an instruction is missing: {args.prompt} is a photograph"
    strange = next((word for word in words[1:] if not is_photo(word)), None)
    if strange is not None:
        photograph = f"{visible(strange, 40)!r} is no photograph that is here"
        return f"{photograph}: an instruction of several words goes in quotes"
    return None


def unrecognized(args: argparse.Namespace, left: Sequence[str]) -> str:
    """What is wrong with words that have no place."""
    unknown = [word for word in left if word.startswith("-") and word != "-"]
    quotes = "; a text of several words goes in quotes" if hasattr(args, "prompt") and not unknown else ""
    return f"unrecognized arguments: {' '.join(left)}{nearest_option(args.parser, unknown)}{quotes}"


def take_in_question(args: argparse.Namespace, left: Sequence[str]) -> str | None:
    """Of `joyedit ask`: all words are photographs but the last, which is the question. What is wrong with
    them, if anything."""
    unknown = [word for word in left if word.startswith("-") and word != "-"]
    if unknown:
        return unrecognized(args, left)
    *args.photos, args.question = [*args.photos, args.question, *left]
    if is_photo_name(args.question):
        return f"a question is missing: {args.question} is a photograph"
    if not any(letter.isprintable() and not letter.isspace() for letter in args.question):
        return "the question is empty: say what to answer"
    strange = next((word for word in args.photos if not is_photo(word)), None)
    if strange is not None:
        photograph = f"{visible(strange, 40)!r} is no photograph that is here"
        return f"{photograph}: a question of several words goes in quotes, after the photographs"
    return None


def is_photo(word: str) -> bool:
    """Whether a word of the command line is meant as a photograph, a URL or a path, not as an instruction."""
    try:
        return is_photo_name(word) or os.path.lexists(os.path.expanduser(word))
    except (OSError, ValueError):  # no file has such a name
        return False


def is_photo_name(word: str) -> bool:
    """Whether it is by its form alone: an instruction that ends in "like logo.png" is not."""
    known = is_url(word) or Path(word).suffix.lower() in PHOTO_SUFFIXES
    return known and len(word.split()) == 1


def nearest_option(parser: Any, unknown: Sequence[str]) -> str:
    """The option that may be meant by the first of these, with a question mark."""
    known = [option for action in parser._actions for option in action.option_strings]
    word = unknown[0].partition("=")[0] if unknown else ""
    match = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {match[0]}?)" if match else ""
