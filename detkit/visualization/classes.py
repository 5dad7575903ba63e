"""Names and colours of classes, and the texts of instances."""

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from detkit.utils.colormap import colormap
from detkit.visualization.canvas import Color
from detkit.visualization.plain_values import to_array


class Classes:
    """Names and colours of things, or of stuff, where the metadata has them."""

    def __init__(self, metadata: Any, kind: str) -> None:
        self.names: Sequence[str] = getattr(metadata, f"{kind}_classes", None) or ()
        self._colors: Sequence[Sequence[int]] = getattr(metadata, f"{kind}_colors", None) or ()

    def name(self, index: int) -> str:
        """Return the name of a class; without one, its number."""
        return self.names[index] if 0 <= index < len(self.names) else str(index)

    def color(self, index: int) -> Color:
        """Return the colour of a class; without one, that of its number in the palette."""
        if 0 <= index < len(self._colors):
            return as_color(self._colors[index])
        palette = colormap(rgb=True)
        return as_color(palette[index % len(palette)])


def as_color(color: Sequence[float] | npt.NDArray[Any]) -> Color:
    """Return a colour of floats, in 0 to 255, as whole levels."""
    red, green, blue = (round(float(v)) for v in color)
    return red, green, blue


def text_labels(
    classes: Sequence[int] | None,
    scores: Any,
    class_names: Sequence[str] | None,
    is_crowd: Sequence[bool] | None = None,
) -> list[str] | None:
    """Return the texts of instances, such as "cat 98%"; None where nothing is known of them.

    Args:
        classes: Contiguous class ids.
        scores: In [0, 1].
        class_names: Names by class id; without them the ids are shown.
        is_crowd: Which instances are crowds.
    """
    labels = None
    if classes is not None:
        names = class_names or ()
        labels = [names[c] if 0 <= c < len(names) else str(c) for c in classes]
    if scores is not None:
        percents = [f"{score * 100:.0f}%" for score in to_array(scores).tolist()]
        labels = (
            percents
            if labels is None
            else [f"{n} {p}" for n, p in zip(labels, percents, strict=True)]
        )
    if labels is not None and is_crowd is not None:
        labels = [
            f"{label}|crowd" if crowd else label
            for label, crowd in zip(labels, is_crowd, strict=True)
        ]
    return labels
