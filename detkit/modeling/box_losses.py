"""Losses between predicted deltas and ground-truth boxes, for every head that regresses boxes.

Legend: P foreground boxes.
"""

from torch import Tensor

from detkit.layers import ciou_loss, diou_loss, giou_loss, smooth_l1_loss
from detkit.modeling.box_regression import Box2BoxTransform
from detkit.utils.near_miss import did_you_mean

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
