"""What successive calls have in common is computed once, and is what would be computed again."""

import numpy as np
import pytest
import torch
from PIL import Image

import joyedit
from joyedit.pipelines.reuse import Results, reused


def picture(seed, size=(96, 72)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def counted():
    """A function of one argument, the arguments that it was called with, and results of 40 bytes."""
    seen = []
    return (lambda x, **options: (seen.append(x), torch.full((10,), float(len(seen))))[1]), seen


@pytest.mark.parametrize(
    ("same", "other"),
    [
        (lambda: "red", lambda: "blue"),
        (lambda: ["a", "b"], lambda: ["ab"]),
        (lambda: 1, lambda: "1"),
        (lambda: None, lambda: "None"),
        (lambda: 1, lambda: True),
        (lambda: picture(0), lambda: picture(1)),
        (lambda: picture(0, (96, 72)), lambda: picture(0, (72, 96))),
        (lambda: picture(0).convert("L"), lambda: picture(0)),
        (lambda: [picture(0)], lambda: picture(0)),
        (lambda: torch.ones(2, 3), lambda: torch.ones(3, 2)),
        (lambda: torch.ones(4), lambda: torch.ones(4, dtype=torch.bfloat16)),
        (lambda: torch.ones(4)[::2], lambda: torch.zeros(2)),
        (lambda: torch.ones(()), lambda: torch.zeros(())),
        (lambda: np.ones(3, np.float32), lambda: np.ones(3, np.int32)),
        (lambda: torch.zeros(2, 0), lambda: torch.zeros(0, 2)),
    ],
)
def test_arguments_are_told_apart_by_content(counted, same, other):
    function, seen = counted
    known = Results().of("f", function)
    first = known(same())
    assert known(same()) is first and len(seen) == 1
    assert known(other()) is not first and len(seen) == 2
    assert known(same()) is first and known(same(), option=1) is not first


def test_functions_of_another_name_are_others(counted):
    function, seen = counted
    results = Results()
    assert results.of("f", function)("x") is not results.of("g", function)("x") and len(seen) == 2


def test_what_says_nothing_of_its_content_is_refused(counted):
    with pytest.raises(TypeError, match="a Generator says nothing of its content"):
        Results().of("f", counted[0])(torch.Generator())


def test_no_more_is_held_than_is_allowed(counted):
    function, seen = counted
    results = Results(most=100)
    known = results.of("f", function)
    for word in ("a", "b", "a", "c", "a", "b"):  # c takes the place of b, which was used longest ago
        known(word)
    assert seen == ["a", "b", "c", "b"] and results.held == 80 and len(results.known) == 2
    large = Results(most=39)
    assert large.of("f", function)("a") is not None and (large.held, len(large.known)) == (0, 0)


@pytest.fixture(scope="module", params=["tiny-joyimage", "tiny-chronoedit", "tiny-diffedit"])
def pipe(request):
    made = joyedit.load(request.param, device="cpu", dtype=torch.float32)
    made.set_progress_bar_config(disable=True)
    return made


def edited(pipe, photo, text):
    generator = torch.Generator("cpu").manual_seed(0)
    if hasattr(pipe, "edit"):
        steps = {"num_inference_steps": 2, "num_maps_per_mask": 2}
        return pipe.edit(photo, "a red circle", text, generator=generator, output_type="np", **steps).images
    call = {"num_inference_steps": 1, "guidance_scale": 2.0, "generator": generator, "output_type": "np"}
    if "Chrono" in type(pipe).__name__:
        return pipe(photo, text, height=64, width=96, num_frames=5, **call).frames
    return pipe(photo, text, **call).images


@pytest.mark.slow
def test_calls_that_follow_each_other(pipe, monkeypatch):
    """The same photograph and prompt, the same photograph, the same prompt, and the first again."""
    counts = {"text": 0, "photo": 0}

    def count(owner, name, kind):
        function = getattr(owner, name)

        def counting(*args, **options):
            counts[kind] += 1
            return function(*args, **options)

        monkeypatch.setitem(vars(owner), name, counting)

    joy = hasattr(pipe, "processor")
    count(pipe.vae, "_encode", "photo")
    count(pipe.text_encoder, "prefill" if joy else "encode", "text")
    calls = [(0, "blue"), (0, "blue"), (0, "green"), (1, "green"), (0, "blue")]
    alone = [edited(pipe, picture(number), text) for number, text in calls]
    each = {kind: number // len(calls) for kind, number in counts.items()}
    assert counts == {kind: len(calls) * number for kind, number in each.items()} and each["photo"] in (1, 2)
    counts.update(text=0, photo=0)
    with reused(pipe) as results:
        again = [edited(pipe, picture(number), text) for number, text in calls]
    assert all((a == b).all() for a, b in zip(alone, again, strict=True))
    assert not (alone[0] == alone[2]).all() and not (alone[2] == alone[3]).all()
    # JoyImage's text encoder reads the photograph, too.
    assert counts == {"text": 3 if joy else 2, "photo": 2} and results.held > 0
    counts.update(text=0, photo=0)
    edited(pipe, picture(0), "blue")
    assert counts == each
