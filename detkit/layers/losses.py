"""Loss functions of detection, all defined for empty inputs.

`reduction` is "none", "mean" or "sum" throughout. The mean of an empty loss is 0 and stays in the
graph: distributed training waits for a gradient of every parameter, also in a process whose images
have no objects.

Legend: N pairs of boxes, R rows, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss


def smooth_l1_loss(input: Tensor, target: Tensor, beta: float, reduction: str = "none") -> Tensor:
    """Return `0.5 x^2 / beta` for `|x| < beta`, else `|x| - 0.5 beta`, of `x = input - target`.

    Source: Girshick 2015, arXiv 1504.08083, equation 3, with a free switch point.

    Args:
        beta: Difference at which the square turns into a line. 0 is the plain L1 loss.
    """
    return _reduced(F.smooth_l1_loss(input, target, beta=beta, reduction="none"), reduction)


def giou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Return 1 - GIoU of (N, 4) XYXY boxes with their partners, in [0, 2].

    Source: Rezatofighi et al. 2019, arXiv 1902.09630.
    """
    return generalized_box_iou_loss(boxes1, boxes2, reduction, eps)


def diou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Return 1 - DIoU of (N, 4) XYXY boxes with their partners, in [0, 2].

    DIoU is IoU less the squared distance of the centers over that of the hull's corners.

    Source: Zheng et al. 2020, arXiv 1911.08287.
    """
    return distance_box_iou_loss(boxes1, boxes2, reduction, eps)


def ciou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """Return 1 - CIoU of (N, 4) XYXY boxes with their partners.

    CIoU is DIoU less a term for the difference in aspect ratio.

    Source: Zheng et al. 2020, arXiv 1911.08287.
    """
    return complete_box_iou_loss(boxes1, boxes2, reduction, eps)


def cross_entropy(
    input: Tensor, target: Tensor, *, reduction: str = "mean", **kwargs: Any
) -> Tensor:
    """Return `torch.nn.functional.cross_entropy`; its mean over no rows is 0 instead of NaN.

    Args:
        input: (R, K) logits.
        target: (R,) int64 class in [0, K).
        **kwargs: As in torch.
    """
    if target.numel() == 0 and reduction == "mean":
        return input.sum() * 0.0
    return F.cross_entropy(input, target, reduction=reduction, **kwargs)


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = -1.0,
    gamma: float = 2.0,
    reduction: str = "none",
) -> Tensor:
    """Return the binary cross entropy times `(1 - p_t)^gamma`, the loss of RetinaNet.

    `p_t` is the probability predicted for the true answer.

    Source: Lin et al. 2017, arXiv 1708.02002, equation 5.

    Args:
        inputs: Logits of any shape.
        targets: Of the same shape: 1 or True for positives, 0 or False for negatives.
        alpha: Weight of positives, in [0, 1]; negatives have 1 - alpha. Below 0: no weights.
        gamma: Exponent that lowers the loss of easy examples. 0 is cross entropy.
    """
    # p_t is the sigmoid of the logit with the sign of the target: no log(0), and no probability
    # that is kept for the backward pass.
    signed = torch.where(targets.bool(), inputs, -inputs)
    loss = -F.logsigmoid(signed)
    if gamma != 0:
        loss = loss * torch.sigmoid(-signed) ** gamma
    if alpha >= 0:
        loss = loss * torch.where(targets.bool(), alpha, 1 - alpha)
    return _reduced(loss, reduction)


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.mean() if loss.numel() > 0 else loss.sum() * 0.0
    raise ValueError(f"reduction must be 'none', 'mean' or 'sum': got {reduction!r}")


def empty_input_loss_func_wrapper(loss_func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a loss function that is 0, and part of the graph, for an empty input.

    Args:
        loss_func: Takes input, target and keyword arguments, with `reduction`.
    """

    @functools.wraps(loss_func)
    def wrapped(input: Tensor, target: Tensor, *, reduction: str = "mean", **kwargs: Any) -> Tensor:
        if target.numel() == 0 and reduction == "mean":
            return input.sum() * 0.0
        return loss_func(input, target, reduction=reduction, **kwargs)

    return wrapped
