"""Pages of samples: pictures as they are, under the prompt and above their names."""

import numpy as np
from PIL import Image, ImageFont

from joyedit.training.pictures import GAP, captioned, readable, wrapped

PROMPT = "Move the yellow cross into the red box and finally remove the red box."


def test_pictures_stand_under_their_prompt_and_above_their_names():
    colours = {"control": (200, 0, 0), "base model": (0, 200, 0), "after 20 steps": (0, 0, 200)}
    made = captioned([(name, Image.new("RGB", (96, 64), c)) for name, c in colours.items()], PROMPT)
    page = np.asarray(made).astype(int)
    tops = []
    for i, colour in enumerate(colours.values()):
        left = GAP + i * (96 + GAP)
        rows, columns = (page == colour).all(-1).nonzero()
        assert (columns.min(), columns.max()) == (left, left + 95) and np.ptp(rows) == 63
        tops.append(rows.min())
        below = page[rows.max() + 1 :, left : left + 96]
        assert (below.max(-1) < 60).sum() > 20  # its name
    dark = (page[: min(tops)].max(-1) < 60).any(1)
    lines = np.flatnonzero(np.diff(np.r_[False, dark, False].astype(int)) == 1)
    assert len(set(tops)) == 1 and len(lines) == 2  # the prompt takes two lines of this width


def test_lines_hold_all_words_and_fit():
    font = ImageFont.load_default(11)
    lines = wrapped(PROMPT, 150, font)
    assert " ".join(lines) == PROMPT and len(lines) > 2
    assert all(font.getlength(line) <= 150 for line in lines)
    assert wrapped("Verschlimmbesserungsvorschlag", 20, font) == ["Verschlimmbesserungsvorschlag"]
    assert readable("Make it blue, \u628a\u732b.", font) == "Make it blue, ??."
