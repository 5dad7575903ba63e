"""Boxes as deltas from other boxes, which is what a head predicts.

Source: Girshick et al. 2013, arXiv 1311.2524, appendix C; the clamp on sizes is Detectron's.

Legend: N boxes, K deltas per box (classes, or 1).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DEFAULT_SCALE_CLAMP = math.log(1000.0 / 16)
"""Largest log of a change in size. Training starts with wild deltas, and exp() of those would
overflow.
"""


class Box2BoxTransform:
    """Converts between boxes and deltas `(dx, dy, dw, dh)`.

    `dx` and `dy` move the centre in units of the source's width and height; `dw` and `dh` are logs
    of the change in size.
    """

    def __init__(self, weights: Sequence[float], scale_clamp: float = DEFAULT_SCALE_CLAMP) -> None:
        """Set the scale of the deltas.

        Args:
            weights: Factors on (dx, dy, dw, dh). They bring the targets of a loss to variance of
                about 1.
            scale_clamp: `dw` and `dh`, weights removed, are limited to this when deltas are
                applied.

        Raises:
            ValueError: There are not four positive weights.
        """
        if len(weights) != 4 or not all(w > 0 for w in weights):
            raise ValueError(
                "BBOX_REG_WEIGHTS must be four positive numbers for (dx, dy, dw, dh), got"
                f" {weights}"
            )
        self.weights = tuple(float(w) for w in weights)
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the deltas that lead from one set of boxes to another.

        Args:
            src_boxes: (N, 4), of positive width and height. That is not checked: on a GPU it would
                wait for the device.
            target_boxes: (N, 4), likewise.

        Returns:
            (N, 4). `apply_deltas` inverts it.
        """
        src_w, src_h, src_x, src_y = _size_and_center(src_boxes)
        target_w, target_h, target_x, target_y = _size_and_center(target_boxes)
        wx, wy, ww, wh = self.weights
        dx = wx * (target_x - src_x) / src_w
        dy = wy * (target_y - src_y) / src_h
        dw = ww * torch.log(target_w / src_w)
        dh = wh * torch.log(target_h / src_h)
        return torch.stack([dx, dy, dw, dh], dim=1)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Return the boxes that deltas lead to.

        Args:
            deltas: (N, 4 K). Those of class k are the columns 4 k to 4 k + 3.
            boxes: (N, 4) to start from.

        Returns:
            (N, 4 K) float32, also under autocast: a half-precision coordinate of 1000 is off by
            half a pixel.

        Raises:
            ValueError: The shapes do not fit.
        """
        if deltas.dim() != 2 or deltas.shape[1] % 4 or boxes.shape != (deltas.shape[0], 4):
            raise ValueError(
                f"need deltas (N, 4 K) and boxes (N, 4): got {tuple(deltas.shape)} and"
                f" {tuple(boxes.shape)}"
            )
        wx, wy, ww, wh = self.weights
        width, height, center_x, center_y = (t[:, None] for t in _size_and_center(boxes.float()))
        dx, dy, dw, dh = deltas.float().unflatten(1, (-1, 4)).unbind(dim=2)
        x = dx / wx * width + center_x
        y = dy / wy * height + center_y
        half_w = 0.5 * width * torch.exp((dw / ww).clamp(max=self.scale_clamp))
        half_h = 0.5 * height * torch.exp((dh / wh).clamp(max=self.scale_clamp))
        return torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=2).flatten(1)


def _size_and_center(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    width, height = x2 - x1, y2 - y1
    return width, height, x1 + 0.5 * width, y1 + 0.5 * height
