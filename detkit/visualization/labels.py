"""Texts at boxes, placed so that they hide each other as little as can be."""

from collections.abc import Iterable, Sequence

from detkit.visualization.canvas import Canvas, Color


def draw_labels(canvas: Canvas, labels: Iterable[tuple[str, Sequence[float], Color]]) -> None:
    """Write (text, XYXY box, colour) at the boxes, where they hide no other label if there is such
    a place.
    """
    taken: list[tuple[float, float, float, float]] = []
    for text, (x1, y1, x2, y2), color in labels:
        width, height = canvas.text_size(text)
        # Above the box, inside it, below it; left-aligned with it, then right-aligned.
        places = [(x, y) for x in (x1, x2 - width) for y in (y1 - height, y1, y2, y2 - height)]
        inside = [
            (min(max(x, 0), max(canvas.width - width, 0)), y)
            for x, y in places
            if 0 <= y <= canvas.height - height
        ]
        free = [
            p
            for p in inside
            if not any(_overlap((*p, p[0] + width, p[1] + height), other) for other in taken)
        ]
        x, y = (free or inside or places)[0]
        taken.append((x, y, x + width, y + height))
        canvas.draw_text(text, (x, y), background=color)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
