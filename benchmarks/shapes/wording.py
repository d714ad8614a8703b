"""The sentences of the drawn world, said in other ways: letters, full stop, politeness and words.

`scenes.Edit.instruction` and `scenes.caption` are the plain wording, by which models are scored. Trainings
from a checkpoint read what `reworded` and `reworded_caption` make of it; WORDINGS and CAPTION_WORDINGS are
the ways in which models are scored, too.
"""

import re
from collections.abc import Callable

import numpy as np

# One whole sentence: what it is, and what may be said in its place.
_REMOVE = (
    "Remove {it}.",
    "Delete {it}.",
    "Erase {it}.",
    "Take {it} away.",
    "Take away {it}.",
    "Get rid of {it}.",
)
_RECOLOUR = (
    "Change the colour of {it} to {colour}.",
    "Change {it} to {colour}.",
    "Color {it} {colour}.",
    "Make {it} {colour}.",
    "Paint {it} {colour}.",
    "Give {it} the color {colour}.",
    "The color of {it} should be {colour}.",
)
_REPLACE = (
    "Replace {it} with {new}.",
    "Replace {it} by {new}.",
    "Swap {it} for {new}.",
    "Make {it} {new}.",
    "Put {new} in place of {it}.",
)
_BACKGROUND = (
    "Set the background to {colour}.",
    "Make the background {colour}.",
    "Change the background color to {colour}.",
    "Paint the background {colour}.",
    "Use {colour} for the background.",
)
_MOVE = (
    "Move {it} into the red box and remove the red box.",
    "Move {it} into the red box.",
    "Move {it} to the red box, then remove the box.",
    "Put {it} into the red box and delete the box.",
)
_GREY = (
    "Make it black and white.",
    "Turn the picture black and white.",
    "Convert it to grayscale.",
    "Take the colors away.",
    "Remove all colors.",
)
_NEGATIVE = ("Invert the picture.", "Invert all colors.", "Make it a negative.", "Reverse the colors.")
SENTENCES = (
    (r"Move (?P<it>the .+) into the red box and finally remove the red box\.", _MOVE),
    (
        r"(?:(?:Change|Make) the background (?:to )?|Replace the background with )(?P<colour>.+)\.",
        _BACKGROUND,
    ),
    (r"(?:Make|Convert|Turn) .*(?:black and white|grayscale)\.", _GREY),
    (r"Invert .*|(?:Make|Turn) .*negative.*", _NEGATIVE),
    (r"(?:Remove|Delete|Erase|Take) (?P<it>the \w+ \w+)(?: from the picture| away)?\.", _REMOVE),
    (r"(?:Replace|Change|Turn) (?P<it>the \w+ \w+) (?:with|to|into) (?P<new>an? .+)\.", _REPLACE),
    (r"(?:Change the color of|Make|Paint|Turn) (?P<it>the \w+ \w+)(?: to)? (?P<colour>\w+)\.", _RECOLOUR),
    (
        r"(?:Add|Put|Draw) (?P<new>an? .+) (?P<place>in the .+)\.",
        ("Add {new} {place}.", "Place {new} {place}.", "Insert {new} {place}.", "{place}, draw {new}."),
    ),
)
# Single words of any sentence.
WORDS = {
    "color": ("colour", "color"),
    "colors": ("colours", "colors"),
    "gray": ("grey", "gray"),
    "grayscale": ("greyscale", "grayscale"),
    "picture": ("image", "photo", "picture"),
    "image": ("picture", "photo", "image"),
    "photo": ("picture", "image", "photo"),
    "center": ("middle", "centre", "center"),
    "circle": ("disc", "circle", "circle"),
    "purple": ("violet", "purple", "purple"),
}
CORNERS = (r"in the (top|bottom) (left|right) corner", ("at the {0} {1}", "in the {0} {1}", "at {0} {1}"))
# What a new word is like to begin with: a word that was learned before.
LIKE = {
    "colour": "color",
    "colours": "colors",
    "grey": "gray",
    "greyscale": "grayscale",
    "middle": "center",
    "centre": "center",
    "disc": "circle",
    "violet": "purple",
    "insert": "add",
    "place": "put",
    "swap": "replace",
    "reverse": "invert",
    "get": "remove",
    "set": "change",
    "give": "make",
    "use": "make",
    "by": "with",
    "for": "with",
    "then": "finally",
    "at": "in",
    "to": "into",
    "into": "to",
    "image": "picture",
    "photo": "picture",
    "color": "paint",
}
LIKE_NOTHING = ("the", "a")  # the first of them that is known


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


WORDINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "lower case": str.lower,
    "upper case": str.upper,
    "no full stop": lambda text: text.removesuffix("."),
    "please": lambda text: f"Please {lower_first(text)}",
}
CAPTION_WORDINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper case": str.upper,
    "full stop": lambda text: f"{upper_first(text)}.",
    "please": lambda text: f"Please draw {text}.",
}


def reworded(text: str, rng: np.random.Generator) -> str:
    """An instruction as somebody else might say it; now and then as it is."""
    if rng.random() < 0.2:
        return text
    if rng.random() < 0.5:
        text = other_words(text, rng)
    text = text.removesuffix(".")
    polite = rng.random()
    if polite < 0.25:
        text = f"Please {lower_first(text)}"
    elif polite < 0.33:
        text = f"{text}, please"
    elif polite < 0.4:
        text = f"{_pick(rng, ('Can you', 'Could you', 'Could you please'))} {lower_first(text)}?"
    if rng.random() < 0.6 and not text.endswith("?"):
        text += "."
    return other_case(text, rng)


def reworded_caption(text: str, rng: np.random.Generator) -> str:
    """A caption as somebody else might write it; now and then as it is."""
    if rng.random() < 0.3:
        return text
    if rng.random() < 0.5:
        text = _other_single_words(text, rng)
    begin = _pick(rng, ("", "", "", "a picture of ", "an image of ", "there is ", "please draw ", "draw "))
    text = begin + text
    if rng.random() < 0.2:
        text = text.replace(" on a ", ", ")
    return text + "." * bool(rng.random() < 0.5)


def told(text: str, number: int, change: Callable[[str, np.random.Generator], str] = reworded) -> str:
    """The text of sample `number` of a training, always the same."""
    return change(text, np.random.default_rng((12, number)))


def other_case(text: str, rng: np.random.Generator) -> str:
    case = rng.random()
    if case < 0.25:
        return text.lower()
    if case < 0.45:
        return text.upper()
    if case < 0.5:
        return text.title()
    return text


def other_words(text: str, rng: np.random.Generator) -> str:
    """The same said with other words, with a capital first and a full stop last."""
    for pattern, others in SENTENCES:
        found = re.fullmatch(pattern, text)
        if found and rng.random() < 0.7:
            text = upper_first(_pick(rng, others).format(**found.groupdict()))
            break
    pattern, others = CORNERS
    if rng.random() < 0.4:
        text = re.sub(pattern, lambda found: _pick(rng, others).format(*found.groups()), text)
    return _other_single_words(text, rng)


def _other_single_words(text: str, rng: np.random.Generator) -> str:
    return re.sub(r"\w+", lambda word: _pick(rng, WORDS.get(word[0], (word[0],))), text)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
