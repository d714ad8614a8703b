import pytest


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A folder with one pair."""
    from tests.training.test_training import circle

    root = tmp_path_factory.mktemp("pairs")
    for name, color in (("target", "blue"), ("control", "red")):
        (root / name).mkdir()
        circle(color, (96, 96), (9, 9)).save(root / name / "0.png")
    (root / "target" / "0.txt").write_text("Make the red circle blue.")
    return root
