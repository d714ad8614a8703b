"""Words out of files from strangers, made fit for a message.

What a file says may hold control sequences that a terminal obeys, marks that turn the direction of writing,
or a million letters. Whatever is not a printable character is written as its escape, as `repr` does it.
"""

import reprlib
from typing import Any

LONGEST = 200  # letters of a file's words in a message


def visible(text: str, longest: int | None = LONGEST) -> str:
    """The text with escapes for what is not printable, white space other than a plain blank included, and
    cut to `longest` characters; None: all of it."""
    start = text if longest is None else text[:longest]
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in start)
    if longest is None or (len(text) <= longest and len(plain) <= longest):
        return plain
    return plain[:longest] + "..."


def shown(value: Any, longest: int = LONGEST) -> str:
    """`repr(value)`, cut: of a list that holds itself twice, and so on fifty times, it would not end."""
    cut = reprlib.Repr()
    cut.maxlevel, cut.maxstring, cut.maxother, cut.maxlong = 4, longest, longest, longest
    cut.maxlist = cut.maxtuple = cut.maxdict = cut.maxset = 20
    text = cut.repr(value)
    return text if len(text) <= longest else text[:longest] + "..."
