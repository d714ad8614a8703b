"""Text of strangers as it may be shown: in a message, a log, a terminal."""

import re
import unicodedata

# Line breaks, and the two joiners that Indic scripts and emoji are written with.
KEPT = "\n\t\u200c\u200d"
# Control characters (terminals obey them), invisible ones (which turn text round or hide it), lone surrogates
# (which no encoding can write), separators of lines and paragraphs.
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
USERINFO = re.compile(r"(?<=://)[^/?#\s@]*@")


def visible(text: object) -> str:
    r"""The text with its control and invisible characters written as \x1b, and without the passwords of URLs.

    What a server, a file's metadata or another library's error says goes through here before it is shown.
    """
    shown = (
        char.encode("unicode_escape").decode() if char not in KEPT and hides(char) else char
        for char in USERINFO.sub("", str(text))
    )
    return "".join(shown)


def hides(char: str) -> bool:
    return unicodedata.category(char) in HIDDEN
