import numpy as np
import pytest

from detkit.visualization.canvas import Canvas
from detkit.visualization.labels import draw_labels


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


def test_no_labels_change_nothing() -> None:
    canvas = _canvas()
    draw_labels(canvas, [])
    assert (canvas.to_array() == 90).all()
