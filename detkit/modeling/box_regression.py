"""Boxes as deltas from other boxes, which is what a head predicts.

Source: Girshick et al. 2013, arXiv 1311.2524, appendix C; the clamp on sizes is Detectron's.

Legend: N boxes, K deltas per box (classes, or 1).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.layers import ciou_loss, diou_loss, giou_loss, smooth_l1_loss
from detkit.utils.near_miss import did_you_mean

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


_IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}

BOX_LOSS_TYPES = ("smooth_l1", *_IOU_LOSSES)
"""Legal values of BBOX_REG_LOSS_TYPE."""


def check_box_loss_type(loss_type: str) -> str:
    """Return the loss type back if there is one of that name: heads call this when they are built, not in the first step.

    Raises:
        ValueError: There is none.
    """
    if loss_type not in BOX_LOSS_TYPES:
        hint = did_you_mean(loss_type, BOX_LOSS_TYPES)
        raise ValueError(
            f"BBOX_REG_LOSS_TYPE must be one of {', '.join(BOX_LOSS_TYPES)}, got"
            f" {loss_type!r}.{hint}"
        )
    return loss_type


def box_regression_loss(
    pred_deltas: Tensor,
    src_boxes: Tensor,
    gt_boxes: Tensor,
    *,
    transform: Box2BoxTransform,
    loss_type: str,
    smooth_l1_beta: float,
) -> Tensor:
    """Sum the loss of boxes that are predicted as deltas.

    Args:
        pred_deltas: (P, 4). Float32 arithmetic whatever the type.
        src_boxes: (P, 4) anchors or proposals that the deltas start from.
        gt_boxes: (P, 4) boxes they should lead to.
        transform: What the deltas mean.
        loss_type: `smooth_l1` compares deltas; `giou`, `diou` and `ciou` compare the boxes they
            lead to.
        smooth_l1_beta: Where smooth L1 turns from square to line; 0 is L1.

    Returns:
        Scalar, not divided by anything. With P = 0 a zero that is part of the graph, so that every
        parameter still gets a gradient (of zero) and distributed training does not wait for it.
    """
    pred_deltas = pred_deltas.float()
    if loss_type == "smooth_l1":
        target = transform.get_deltas(src_boxes, gt_boxes)
        return smooth_l1_loss(pred_deltas, target, beta=smooth_l1_beta, reduction="sum")
    pred_boxes = transform.apply_deltas(pred_deltas, src_boxes)
    return _IOU_LOSSES[check_box_loss_type(loss_type)](pred_boxes, gt_boxes, reduction="sum")
