"""Words of strangers, made fit for a message, a log or a terminal.

What a file, a server or another library says may hold control sequences that a terminal obeys, marks that
turn the direction of writing, a million letters, or the password of a URL.
"""

import re
import reprlib
import unicodedata
from typing import Any

LONGEST = 200  # letters of a stranger's words in a message
JOINERS = "\u200c\u200d"  # hidden, but Indic scripts and emoji are written with them
# Control characters (terminals obey them), invisible ones (which turn text round or hide it), lone surrogates
# (which no encoding can write), separators of lines and paragraphs.
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
USERINFO = re.compile(r"(?<=://)[^/?#\s@]*@")


def visible(text: object, longest: int | None = LONGEST) -> str:
    r"""The text with control and invisible characters written as \x1b, on one line, without the passwords of
    URLs, and cut to `longest` characters; None: all of it."""
    whole = str(text)
    start = USERINFO.sub("", whole if longest is None else whole[: 2 * longest])
    plain = "".join(_escape(c) if hides(c) else c for c in start.replace("\n", " ").replace("\t", " "))
    if longest is None or (len(plain) <= longest and len(whole) <= 2 * longest):
        return plain
    return plain[:longest] + "..."


def hides(character: str) -> bool:
    return unicodedata.category(character) in HIDDEN and character not in JOINERS


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def shown(value: Any, longest: int = LONGEST) -> str:
    """`repr(value)`, cut: of a list that holds itself twice, and so on fifty times, it would not end."""
    cut = reprlib.Repr()
    cut.maxlevel, cut.maxstring, cut.maxother, cut.maxlong = 4, longest, longest, longest
    cut.maxlist = cut.maxtuple = cut.maxdict = cut.maxset = 20
    text = cut.repr(value)
    return text if len(text) <= longest else text[:longest] + "..."
