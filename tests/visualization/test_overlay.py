import numpy as np
import pytest

from detkit.visualization.canvas import Canvas
from detkit.visualization.overlay import (
    Segment,
    draw_keypoints,
    draw_labels,
    draw_segments,
    midst,
)


def _canvas() -> Canvas:
    return Canvas(np.full((240, 320, 3), 90, np.uint8))


def test_labels_of_neighbours_do_not_hide_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    monkeypatch.setattr(
        "detkit.visualization.canvas.Canvas.draw_text",
        lambda self, text, position, **kwargs: places.append(position),
    )
    boxes = [[50, 60, 150, 160], [52, 60, 152, 160], [50, 62, 150, 158]]
    draw_labels(_canvas(), [("cat", box, (9, 9, 9)) for box in boxes])
    width, height = 30, 15  # less than a label takes
    for i, (x, y) in enumerate(places):
        assert all(abs(x - x2) >= width or abs(y - y2) >= height for x2, y2 in places[:i])


@pytest.mark.parametrize(
    "box", [[0, 0, 40, 40], [300, 0, 320, 240], [0, 0, 320, 240], [-50, -50, 400, 400]]
)
def test_label_lies_inside_the_picture(box: list[float]) -> None:
    canvas = _canvas()
    draw_labels(canvas, [("a label", box, (200, 0, 0))])
    rows, columns = np.nonzero((canvas.to_array() != 90).any(axis=2))
    width, height = canvas.text_size("a label")
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (width, height)


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """Where texts are written."""
    positions = []
    monkeypatch.setattr(
        Canvas, "draw_text", lambda self, text, position, **kwargs: positions.append(position)
    )
    return positions


def test_label_goes_to_the_first_place_that_is_free(positions) -> None:
    canvas, box = _canvas(), [50, 60, 250, 160]
    width, height = canvas.text_size("cat")
    draw_labels(canvas, [("cat", box, (9, 9, 9))] * 8)
    x1, y1, x2, y2 = box
    rows = [y1 - height, y1, y2, y2 - height]  # above, inside, below, inside
    left, right = [(x1, y) for y in rows], [(x2 - width, y) for y in rows]
    assert positions == left + right


def test_label_with_no_free_place_goes_to_the_first_inside_the_picture(positions) -> None:
    canvas, box = _canvas(), [0, 0, 320, 240]  # no room around it
    width, height = canvas.text_size("cat")
    draw_labels(canvas, [("cat", box, (9, 9, 9))] * 5)
    x = 320 - width
    assert positions == [(0, 0), (0, 240 - height), (x, 0), (x, 240 - height), (0, 0)]


def test_label_goes_beside_a_box_that_is_full(positions) -> None:
    canvas, box = _canvas(), [100, 0, 200, 240]  # no room above and below
    width, height = canvas.text_size("cat")
    draw_labels(canvas, [("cat", box, (9, 9, 9))] * 7)
    assert positions[4:] == [(200, 0), (200, 240 - height), (100 - width, 0)]


def test_label_hides_least_where_it_hides_something(positions) -> None:
    width, height = _canvas().text_size("cat")
    canvas = Canvas(np.full((height, 200, 3), 90, np.uint8))  # as high as the label
    canvas.labels = np.array([[0.0, 0, 200, height], [50, 0, 60, height]])
    draw_labels(canvas, [("cat", [55, 0, 60 + width, height], (9, 9, 9))])
    assert positions == [(60, 0)]


def test_label_does_not_hide_small_objects(positions) -> None:
    canvas = _canvas()
    _, height = canvas.text_size("cat")
    neighbour = [102, 100 - height, 110, 108 - height]  # where the label would go first
    draw_labels(canvas, [("cat", [100, 100, 112, 112], (9, 9, 9)), ("", neighbour, (9, 9, 9))])
    assert positions[0] == (100, 112)


def test_label_hides_a_small_object_rather_than_a_label(positions) -> None:
    width, height = _canvas().text_size("cat")
    canvas = Canvas(np.full((height, 200, 3), 90, np.uint8))  # as high as the label
    canvas.labels = np.array([[0.0, 0, 110, height]])
    ball = [110, 0, 110 + width, height]  # a label to the right of the box hides it
    draw_labels(canvas, [("cat", [60, 0, 110, height], (9, 9, 9)), ("", ball, (9, 9, 9))])
    assert positions[0] == (110, 0)


def test_names_of_segments_do_not_hide_each_other(positions) -> None:
    ids = np.zeros((240, 320), int)
    ids[100:140, 100:130], ids[100:140, 130:160] = 1, 2
    canvas = _canvas()
    draw_segments(
        canvas,
        ids,
        [Segment(1, (9, 9, 9), "a long name"), Segment(2, (9, 9, 9), "a long name")],
        alpha=0.5,
        min_area=0,
    )
    width, height = canvas.text_size("a long name")
    (x1, y1), (x2, y2) = positions
    assert abs(x1 - x2) < width
    assert abs(y1 - y2) == height


def test_labels_of_a_second_call_keep_clear_of_the_first(positions) -> None:
    canvas = _canvas()
    for _ in range(2):
        draw_labels(canvas, [("cat", [50, 60, 250, 160], (9, 9, 9))])
    assert positions[0] != positions[1]


def test_labels_that_touch_do_not_overlap(positions) -> None:
    canvas = _canvas()
    width, _ = canvas.text_size("cat")
    boxes = [[50, 60, 150, 160], [50 + width, 60, 150 + width, 160]]
    draw_labels(canvas, [("cat", box, (9, 9, 9)) for box in boxes])
    assert positions[1][0] - positions[0][0] == width
    assert positions[1][1] == positions[0][1]


def test_labels_of_dense_scenes_are_smaller_and_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(
        Canvas,
        "draw_text",
        lambda self, text, position, *, font_size, **_: written.append((*position, font_size)),
    )
    rng = np.random.default_rng(0)
    corners = rng.uniform((0, 0), (300, 220), (300, 2))
    boxes = np.concatenate([corners, corners + 20], axis=1).tolist()
    canvas = _canvas()
    draw_labels(canvas, [("person 98%", box, (9, 9, 9)) for box in boxes[:2]])
    assert [size for *_, size in written] == [canvas.font_size] * 2
    written.clear()
    draw_labels(canvas, [("person 98%", box, (9, 9, 9)) for box in boxes])
    assert {size for *_, size in written} == {8}
    assert 5 < len(written) < 30
    width, height = canvas.text_size("person 98%", 8)
    for i, (x, y, _) in enumerate(written):
        assert all(abs(x - a) >= width or abs(y - b) >= height for a, b, _ in written[:i])


def test_no_labels_change_nothing() -> None:
    canvas = _canvas()
    draw_labels(canvas, [])
    assert (canvas.to_array() == 90).all()


NAMES = ["nose", "left_shoulder", "right_shoulder", "left_hip", "right_hip"]
PERSON = np.array([[50.0, 10, 1], [30, 40, 1], [70, 40, 1], [35, 80, 1], [65, 80, 1]])
RULES = [("left_shoulder", "right_shoulder", (10, 240, 30))]


def _with_keypoints(keypoints: np.ndarray, **kwargs) -> np.ndarray:
    canvas = Canvas(np.full((100, 100, 3), 90, np.uint8))
    draw_keypoints(canvas, keypoints, (250, 10, 20), **kwargs)
    return canvas.to_array()


def test_dots_lie_on_the_keypoints() -> None:
    image = _with_keypoints(PERSON)
    changed = (image != 90).any(axis=2)
    assert all(image[int(y), int(x)].tolist() == [250, 10, 20] for x, y, _ in PERSON)
    assert changed.sum() < 5 * 40


def test_lines_join_what_the_rules_name() -> None:
    image = _with_keypoints(PERSON, names=NAMES, connection_rules=RULES)
    assert image[40, 60].tolist() == [10, 240, 30]


def test_midline_runs_between_the_middles_of_shoulders_and_hips() -> None:
    image = _with_keypoints(PERSON, names=NAMES, connection_rules=RULES)
    assert (image[[25, 60], 50] != 90).any(axis=1).all()


@pytest.mark.parametrize("score", [0.0, 0.05])
def test_keypoint_that_is_not_seen_has_neither_dot_nor_line(score: float) -> None:
    hidden = PERSON.copy()
    hidden[1, 2] = score
    image = _with_keypoints(hidden, names=NAMES, connection_rules=RULES)
    assert image[40, 30].tolist() == image[40, 60].tolist() == [90, 90, 90]
    assert image[60, 50].tolist() == [90, 90, 90]


def test_rule_about_an_unknown_name_is_left_out() -> None:
    rules = [("nose", "tail", (1, 2, 3))]
    assert np.array_equal(
        _with_keypoints(PERSON[:1], names=["nose"], connection_rules=rules),
        _with_keypoints(PERSON[:1]),
    )


def test_lines_of_a_small_object_are_thinner() -> None:
    canvas = Canvas(np.full((1000, 1000, 3), 90, np.uint8))
    assert canvas.line_width == 3
    changed = {}
    for size in (1, 8):
        canvas = Canvas(np.full((1000, 1000, 3), 90, np.uint8))
        draw_keypoints(canvas, PERSON * [size, size, 1], (250, 10, 20))
        changed[size] = (canvas.to_array() != 90).any(axis=2).sum()
    assert changed[1] < 0.6 * changed[8]


def test_no_keypoints_change_nothing() -> None:
    assert (_with_keypoints(np.zeros((0, 3))) == 90).all()


def test_names_must_be_as_many_as_keypoints() -> None:
    with pytest.raises(ValueError, match="5 keypoint_names, an object has 4 keypoints"):
        _with_keypoints(PERSON[:4], names=NAMES)


def _with_segments(segment_map: np.ndarray, segments: list[Segment], **kwargs) -> np.ndarray:
    canvas = Canvas(np.full((*segment_map.shape, 3), 90, np.uint8))
    draw_segments(canvas, segment_map, segments, **{"alpha": 1.0, "min_area": np.inf} | kwargs)
    return canvas.to_array()


def _rectangles() -> np.ndarray:
    segment_map = np.zeros((40, 60), int)
    segment_map[5:20, 5:30] = 7
    segment_map[5:20, 30:55] = 900
    return segment_map


SEGMENTS = [Segment(900, (200, 10, 20), "b"), Segment(7, (10, 200, 30), "a")]


def test_segments_have_their_colours_and_the_rest_stays() -> None:
    image = _with_segments(_rectangles(), SEGMENTS)
    assert image[10, 10].tolist() == [10, 200, 30]
    assert image[10, 40].tolist() == [200, 10, 20]
    assert image[30, 10].tolist() == [90, 90, 90]


def test_a_line_lies_where_two_segments_meet() -> None:
    image = _with_segments(_rectangles(), SEGMENTS)
    assert image[10, 29].min() > 150
    assert image[10, 30].tolist() == [200, 10, 20]


def test_segment_without_pixels_changes_nothing() -> None:
    absent = Segment(3, (1, 2, 3), "c")
    assert np.array_equal(
        _with_segments(_rectangles(), [absent, *SEGMENTS], min_area=0),
        _with_segments(_rectangles(), SEGMENTS, min_area=0),
    )


@pytest.mark.parametrize(("min_area", "count"), [(375, 2), (376, 0)], ids=["at-limit", "below"])
def test_small_segments_get_no_name(
    min_area: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    monkeypatch.setattr(
        Canvas, "draw_text", lambda self, text, position, **kwargs: texts.append(text)
    )
    _with_segments(_rectangles(), SEGMENTS, min_area=min_area)
    assert len(texts) == count


@pytest.mark.parametrize("size", [1, 2, 3, 50, 200, 333])
@pytest.mark.parametrize("seed", range(3))
def test_midst_lies_inside(size: int, seed: int) -> None:
    y, x = np.mgrid[:size, :size]
    random = np.random.RandomState(seed)
    mask = np.zeros((size, size), bool)
    for _ in range(3):
        cy, cx, radius = random.uniform(0, size, 3)
        mask |= np.hypot(y - cy, x - cx) <= radius / 3
    mask[size // 2, size // 2] = True
    column, row = midst(mask)
    assert mask[int(row), int(column)]


def test_midst_of_a_ring_lies_on_the_ring_and_of_a_disc_at_its_centre() -> None:
    y, x = np.mgrid[:200, :200]
    distance = np.hypot(y - 99.5, x - 99.5)
    assert np.abs(midst(distance < 80) - 100).max() <= 4
    column, row = midst((distance < 80) & (distance > 50)).astype(int)
    assert 50 < distance[row, column] < 80


def test_midst_of_a_line_lies_on_it() -> None:
    mask = np.zeros((300, 300), bool)
    mask[17, 20:280] = True
    column, row = midst(mask)
    assert mask[int(row), int(column)]


def test_names_are_written_from_the_largest_segment_to_the_smallest(monkeypatch) -> None:
    # A later name may cover an earlier one: the small segment has no other place for its own.
    segment_map = np.zeros((40, 60), int)
    segment_map[:, :10], segment_map[:, 10:] = 1, 2
    texts = []
    monkeypatch.setattr(
        Canvas, "draw_text", lambda self, text, position, **kwargs: texts.append(text)
    )
    segments = [Segment(1, (9, 9, 9), "small"), Segment(2, (7, 7, 7), "large")]
    _with_segments(segment_map, segments, min_area=0)
    assert texts == ["large", "small"]
