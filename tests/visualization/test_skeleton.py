import numpy as np
import pytest

from detkit.visualization.canvas import Canvas
from detkit.visualization.skeleton import draw_keypoints

NAMES = ["nose", "left_shoulder", "right_shoulder", "left_hip", "right_hip"]
PERSON = np.array([[50.0, 10, 1], [30, 40, 1], [70, 40, 1], [35, 80, 1], [65, 80, 1]])
RULES = [("left_shoulder", "right_shoulder", (10, 240, 30))]


def _drawn(keypoints: np.ndarray, **kwargs) -> np.ndarray:
    canvas = Canvas(np.full((100, 100, 3), 90, np.uint8))
    draw_keypoints(canvas, keypoints, (250, 10, 20), **kwargs)
    return canvas.to_array()


def test_dots_lie_on_the_keypoints() -> None:
    image = _drawn(PERSON)
    changed = (image != 90).any(axis=2)
    assert all(image[int(y), int(x)].tolist() == [250, 10, 20] for x, y, _ in PERSON)
    assert changed.sum() < 5 * 40


def test_lines_join_what_the_rules_name() -> None:
    image = _drawn(PERSON, names=NAMES, connection_rules=RULES)
    assert image[40, 60].tolist() == [10, 240, 30]


def test_midline_runs_between_the_middles_of_shoulders_and_hips() -> None:
    image = _drawn(PERSON, names=NAMES, connection_rules=RULES)
    assert (image[[25, 60], 50] != 90).any(axis=1).all()


@pytest.mark.parametrize("score", [0.0, 0.05])
def test_keypoint_that_is_not_seen_has_neither_dot_nor_line(score: float) -> None:
    hidden = PERSON.copy()
    hidden[1, 2] = score
    image = _drawn(hidden, names=NAMES, connection_rules=RULES)
    assert image[40, 30].tolist() == image[40, 60].tolist() == [90, 90, 90]
    assert image[60, 50].tolist() == [90, 90, 90]


def test_rule_about_an_unknown_name_is_left_out() -> None:
    rules = [("nose", "tail", (1, 2, 3))]
    assert np.array_equal(
        _drawn(PERSON[:1], names=["nose"], connection_rules=rules), _drawn(PERSON[:1])
    )


def test_no_keypoints_change_nothing() -> None:
    assert (_drawn(np.zeros((0, 3))) == 90).all()


def test_names_must_be_as_many_as_keypoints() -> None:
    with pytest.raises(ValueError, match="5 keypoint_names, an object has 4 keypoints"):
        _drawn(PERSON[:4], names=NAMES)
