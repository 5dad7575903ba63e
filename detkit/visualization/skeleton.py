"""Keypoints and the lines between them.

Shapes: M objects in one image, K keypoints of each.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from detkit.visualization.canvas import Canvas, Color

# Of a prediction the third number is a score, of ground truth the visibility: 0, 1 or 2.
_MIN_VISIBLE = 0.05

# A person's midline runs between keypoints that nobody annotates, so no rule can name it: from the
# middle of the shoulders to the nose and to the middle of the hips.
_SHOULDERS, _HIPS, _NOSE = (
    ("left_shoulder", "right_shoulder"),
    ("left_hip", "right_hip"),
    ("nose", "nose"),
)
_MIDLINE = ((_SHOULDERS, _NOSE), (_SHOULDERS, _HIPS))
_MIDLINE_COLOR = (255, 90, 60)

ConnectionRule = tuple[str, str, Sequence[int]]
"""Two names of keypoints, and the RGB colour of the line between them."""


def draw_keypoints(
    canvas: Canvas,
    keypoints: npt.NDArray[np.float64],
    color: Color,
    *,
    names: Sequence[str] = (),
    connection_rules: Sequence[ConnectionRule] = (),
) -> None:
    """Draw the keypoints of one object: lines between those that are connected, and a dot on each.

    Args:
        canvas: Drawn into.
        keypoints: (K, 3): x, y in pixels of the canvas, and a score or visibility; those of 0.05
            and less are left out.
        color: Of the dots.
        names: K names. Without them no lines are drawn.
        connection_rules: Which keypoints are connected; a rule of a name that is not among `names`
            is left out.

    Raises:
        ValueError: There are names, but not K.
    """
    if names and len(names) != len(keypoints):
        raise ValueError(
            f"the metadata has {len(names)} keypoint_names, an object has {len(keypoints)}"
            " keypoints"
        )
    visible = keypoints[:, 2] > _MIN_VISIBLE
    place = {
        name: xy
        for name, xy, seen in zip(names, keypoints[:, :2].tolist(), visible, strict=False)
        if seen
    }
    for start, end, line_color in connection_rules:
        if start in place and end in place:
            red, green, blue = line_color
            canvas.draw_line([place[start], place[end]], (red, green, blue))
    for start, end in _MIDLINE if connection_rules else ():
        if place.keys() >= {*start, *end}:
            ends = [np.mean([place[name] for name in pair], axis=0) for pair in (start, end)]
            canvas.draw_line(ends, _MIDLINE_COLOR)
    for xy in keypoints[visible, :2].tolist():
        # A dark rim, so that a dot stands out from a line or a mask of its colour.
        canvas.draw_circle(xy, (0, 0, 0), radius=canvas.line_width * 1.4)
        canvas.draw_circle(xy, color, radius=canvas.line_width)
