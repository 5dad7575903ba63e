import numpy as np
import pytest

from detkit.visualization.canvas import Canvas
from detkit.visualization.segments import Segment, draw_segments, midst


def _drawn(segment_map: np.ndarray, segments: list[Segment], **kwargs) -> np.ndarray:
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
    image = _drawn(_rectangles(), SEGMENTS)
    assert image[10, 10].tolist() == [10, 200, 30]
    assert image[10, 40].tolist() == [200, 10, 20]
    assert image[30, 10].tolist() == [90, 90, 90]


def test_a_line_lies_where_two_segments_meet() -> None:
    image = _drawn(_rectangles(), SEGMENTS)
    assert image[10, 29].min() > 150
    assert image[10, 30].tolist() == [200, 10, 20]


def test_segment_without_pixels_changes_nothing() -> None:
    absent = Segment(3, (1, 2, 3), "c")
    assert np.array_equal(
        _drawn(_rectangles(), [absent, *SEGMENTS], min_area=0),
        _drawn(_rectangles(), SEGMENTS, min_area=0),
    )


@pytest.mark.parametrize(("min_area", "count"), [(375, 2), (376, 0)], ids=["at-limit", "below"])
def test_small_segments_get_no_name(
    min_area: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    monkeypatch.setattr(
        Canvas, "draw_text", lambda self, text, position, **kwargs: texts.append(text)
    )
    _drawn(_rectangles(), SEGMENTS, min_area=min_area)
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
