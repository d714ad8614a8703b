"""The sentences of spatial edits, letter by letter, and the red box."""

import numpy as np
import pytest
import torch
from PIL import Image

from joyedit import spatial


@pytest.fixture
def photo():
    return Image.new("RGB", (200, 100), (10, 20, 30))


def outlined(image) -> np.ndarray:
    return (np.asarray(image) == spatial.RED).all(-1)


def test_sentences_are_those_of_the_card():
    assert spatial.rotate("the car", "front left") == "Rotate the car to show the front left side view."
    assert (
        spatial.rotate("The old  car", " Rear-Right ")
        == "Rotate the old car to show the rear right side view."
    )
    assert spatial.rotate("theatre", "rear") == "Rotate the theatre to show the rear side view."
    assert spatial.camera(yaw=30.0, pitch=-10, zoom="in") == (
        "Move the camera.\n- Camera rotation: Yaw 30°, Pitch -10°.\n- Camera zoom: in.\n"
        "- Keep the 3D scene static; only change the viewpoint."
    )
    assert "Yaw 0°, Pitch 2.5°.\n- Camera zoom: unchanged.\n" in spatial.camera(-0.0, np.float32(2.5))


@pytest.mark.parametrize("box", [(0.25, 0.5, 0.5, 0.25), (50, 50, 100, 25), np.array([50.0, 50, 100, 25])])
def test_the_box_is_drawn_where_it_is_asked_for(photo, box):
    image, prompt = moved = spatial.move(photo, "the apple", box)
    assert prompt == "Move the apple into the red box and finally remove the red box."
    assert (moved.image, moved.prompt) == (image, prompt)
    wanted = np.zeros((100, 200), bool)
    wanted[50:75, 50:150] = True
    wanted[52:73, 52:148] = False
    np.testing.assert_array_equal(outlined(image), wanted)
    assert (np.asarray(image)[~wanted] == (10, 20, 30)).all()
    assert not outlined(photo).any(), "the photograph itself was drawn on"


def test_a_box_may_be_the_whole_picture_of_any_kind():
    for picture in (np.zeros((64, 32, 3), np.uint8), torch.zeros(3, 64, 32), Image.new("L", (32, 64))):
        for box in ((0, 0, 1, 1), (0, 0, 32, 64)):
            seen = outlined(spatial.move(picture, "sun", box).image)
            assert seen[[0, -1]].all() and seen[:, [0, -1]].all() and not seen[2:-2, 2:-2].any()


@pytest.mark.parametrize(
    "box, message",
    [
        ((50, 50, 0, 10), "width and height must be above 0"),
        ((0.5, 0.5, 0.2, -0.1), "width and height must be above 0"),
        ((150, 50, 60, 10), "must lie within the picture of 200 x 100 pixels"),
        ((0.9, 0, 0.2, 0.5), "must lie within the picture of 200 x 100 pixels"),
        ((-1, 0, 20, 20), "must lie within"),
        ((0.5, 0.5, 0.001, 0.001), "holds no pixel"),
        ((1, 2, 3), "wanted four numbers"),
        ("0,0,1,1", "wanted four numbers"),
        ((0, 0, float("nan"), 1), "wanted four numbers"),
        ((True, True, True, True), "wanted four numbers"),
        (None, "wanted four numbers"),
    ],
)
def test_boxes_that_are_none(photo, box, message):
    with pytest.raises(ValueError, match="box=.*" + message):
        spatial.move(photo, "apple", box)


def test_other_values_that_do_not_fit(photo):
    for call, message in (
        (
            lambda: spatial.rotate("car", "top"),
            "view='top': must be one of front, right, left, rear, front right",
        ),
        (lambda: spatial.rotate("car", 3), "view=3: must be one of"),
        (lambda: spatial.camera(yaw="30"), "yaw='30': must be a number of degrees"),
        (lambda: spatial.camera(pitch=float("inf")), "pitch=inf: must be a number of degrees"),
        (lambda: spatial.camera(pitch=True), "pitch=True: must be a number"),
        (lambda: spatial.camera(yaw=361), "yaw=361: must be a number of degrees within -360 and 360"),
        (lambda: spatial.camera(zoom="closer"), "zoom='closer': must be one of in, out, unchanged"),
        (lambda: spatial.rotate("the ", "rear"), "object='the ': say what"),
        (lambda: spatial.move(photo, 3, (0, 0, 1, 1)), "object=3: wanted a text"),
        (lambda: spatial.move([photo, photo], "car", (0, 0, 1, 1)), "photo: one picture is wanted, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
