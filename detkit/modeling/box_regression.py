"""Boxes as deltas from other boxes, which is what heads predict, and the losses on them.

Source: Girshick et al. 2013, arXiv 1311.2524, appendix C; the clamp on sizes is Detectron's.
Distances to the sides: Tian et al. 2019, arXiv 1904.01355, section 3.1.

Legend: N boxes, K deltas per box (classes, or 1), P foreground boxes, B numbers per box.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from detkit.config import CfgNode
from detkit.layers import ciou_loss, diou_loss, giou_loss, smooth_l1_loss
from detkit.structures.rotated_boxes import normalized
from detkit.utils.text import did_you_mean

# Largest log of a change in size. Training starts with wild deltas, whose exp() would overflow.
DEFAULT_SCALE_CLAMP = math.log(1000.0 / 16)


class BoxTransform(Protocol):
    """Converts between boxes and deltas."""

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the (N, 4) deltas that lead from (N, 4) boxes to (N, 4) others."""
        ...

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Return the (N, 4 K) boxes that (N, 4 K) deltas lead to from (N, 4) boxes."""
        ...


class Box2BoxTransform:
    """Converts between boxes and deltas `(dx, dy, dw, dh)`.

    `dx` and `dy` move the centre in units of the source's width and height; `dw` and `dh` are logs
    of the change in size.

    Example:
        >>> import torch
        >>> from detkit.modeling import Box2BoxTransform
        >>> transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))
        >>> source = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
        >>> transform.get_deltas(source, source + 5.0).tolist()
        [[0.5, 0.25, 0.0, 0.0]]
    """

    delta_names: ClassVar[tuple[str, ...]] = ("dx", "dy", "dw", "dh")

    def __init__(self, weights: Sequence[float], scale_clamp: float = DEFAULT_SCALE_CLAMP) -> None:
        """Set the scale of the deltas.

        Args:
            weights: Factors on the deltas, one for each of `delta_names`, which bring the targets
                of a loss to a variance of about 1.
            scale_clamp: Upper limit of `dw` and `dh`, without weights, when deltas are applied.

        Raises:
            ValueError: `weights` are not as many positive numbers.
        """
        if len(weights) != len(self.delta_names) or not all(w > 0 for w in weights):
            count = {4: "four", 5: "five"}[len(self.delta_names)]
            names = ", ".join(self.delta_names)
            raise ValueError(
                f"weights must be {count} positive numbers for ({names}), got {weights}"
            )
        self.weights = tuple(float(w) for w in weights)
        self.scale_clamp = scale_clamp

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the deltas that lead from one set of boxes to another.

        Args:
            src_boxes: (N, 4), of positive width and height. Not checked: on a GPU the check would
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
            (N, 4 K) float32.

        Raises:
            ValueError: The shapes do not fit.
        """
        if deltas.dim() != 2 or deltas.shape[1] % 4 or boxes.shape != (deltas.shape[0], 4):
            raise ValueError(
                f"need deltas (N, 4 K) and boxes (N, 4): got {tuple(deltas.shape)} and"
                f" {tuple(boxes.shape)}"
            )
        wx, wy, ww, wh = self.weights
        # Float32 under autocast too: a half-precision coordinate of 1000 is off by half a pixel.
        width, height, center_x, center_y = (t[:, None] for t in _size_and_center(boxes.float()))
        dx, dy, dw, dh = deltas.float().unflatten(1, (-1, 4)).unbind(dim=2)
        x = dx / wx * width + center_x
        y = dy / wy * height + center_y
        half_w = 0.5 * width * torch.exp((dw / ww).clamp(max=self.scale_clamp))
        half_h = 0.5 * height * torch.exp((dh / wh).clamp(max=self.scale_clamp))
        return torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=2).flatten(1)


class Box2BoxTransformLinear:
    """Converts between boxes and the distances of their four sides from a point.

    The point is the centre of the source box, and distances are in units of its width and height:
    `(left, top, right, bottom)`, all positive where the point is inside the target.
    """

    def __init__(self, normalize_by_size: bool = True) -> None:
        """Set the unit of the distances: the source's width and height, or else pixels."""
        self.normalize_by_size = normalize_by_size

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return (N, 4) distances of the centres of boxes (N, 4) to the sides of others (N, 4)."""
        width, height, x, y = self._unit_and_center(src_boxes)
        x1, y1, x2, y2 = target_boxes.unbind(dim=1)
        distances = [(x - x1) / width, (y - y1) / height, (x2 - x) / width, (y2 - y) / height]
        return torch.stack(distances, dim=1)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Return the boxes (N, 4 K), float32, of distances (N, 4 K) from the centres of (N, 4).

        Negative distances count as 0, so that every box is valid.
        """
        # Float32 under autocast too, as in `Box2BoxTransform`.
        width, height, x, y = (t[:, None] for t in self._unit_and_center(boxes.float()))
        left, top, right, bottom = deltas.float().relu().unflatten(1, (-1, 4)).unbind(dim=2)
        sides = [x - left * width, y - top * height, x + right * width, y + bottom * height]
        return torch.stack(sides, dim=2).flatten(1)

    def _unit_and_center(self, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        width, height, x, y = _size_and_center(boxes)
        if not self.normalize_by_size:
            width = height = torch.ones_like(width)
        return width, height, x, y


class Box2BoxTransformRotated(Box2BoxTransform):
    """Converts between rotated boxes XYWHA and deltas `(dx, dy, dw, dh, da)`.

    The first four are those of `Box2BoxTransform`, and `da` is the change of the angle in radians.

    As in Detectron2, the centre moves along the axes of the image by default. A head that sees
    regions turned upright, by `ROIAlignRotated`, can hardly tell where these are: for it the centre
    should move along the sides of the box.

    Source: Ma et al. 2017, arXiv 1703.01086, section III-C; along the sides: Ding et al. 2018,
    arXiv 1812.00155, equation 1.

    Example:
        >>> import torch
        >>> from detkit.modeling import Box2BoxTransformRotated
        >>> transform = Box2BoxTransformRotated(weights=(1.0, 1.0, 1.0, 1.0, 1.0))
        >>> source = torch.tensor([[0.0, 0.0, 10.0, 20.0, 170.0]])
        >>> target = torch.tensor([[5.0, 5.0, 10.0, 20.0, -100.0]])
        >>> deltas = transform.get_deltas(source, target)
        >>> [round(delta, 4) for delta in deltas[0].tolist()]
        [0.5, 0.25, 0.0, 0.0, 1.5708]
    """

    delta_names = ("dx", "dy", "dw", "dh", "da")

    def __init__(
        self,
        weights: Sequence[float],
        scale_clamp: float = DEFAULT_SCALE_CLAMP,
        angle_period: float = 360.0,
        along_sides: bool = False,
    ) -> None:
        """Set the scale of the deltas, as in `Box2BoxTransform`.

        Args:
            weights: Five factors.
            scale_clamp: As in `Box2BoxTransform`.
            angle_period: Degrees between angles that count as equal: 360, or 180, where an object
                that faces the other way need not be told apart.
            along_sides: Whether `dx` and `dy` are along the sides of the source box.

        Raises:
            ValueError: `weights` are not five positive numbers, or the period is another one.
        """
        super().__init__(weights, scale_clamp)
        if angle_period not in (180, 360):
            raise ValueError(f"angle_period must be 180 or 360 degrees, got {angle_period}")
        self.angle_period = angle_period
        self.along_sides = along_sides

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the (N, 5) deltas that lead from one set of boxes, (N, 5), to another.

        The angle changes by at most half a period. Sides must be positive, which is not checked.
        """
        src_x, src_y, src_w, src_h, src_a = src_boxes.unbind(dim=1)
        target_x, target_y, target_w, target_h, target_a = target_boxes.unbind(dim=1)
        dx, dy = target_x - src_x, target_y - src_y
        if self.along_sides:
            cos, sin = torch.deg2rad(src_a).cos(), torch.deg2rad(src_a).sin()
            dx, dy = dx * cos - dy * sin, dx * sin + dy * cos
        deltas = [
            dx / src_w,
            dy / src_h,
            torch.log(target_w / src_w),
            torch.log(target_h / src_h),
            torch.deg2rad(normalized(target_a - src_a, self.angle_period)),
        ]
        # Numbers, not a tensor of weights: on a GPU that would be a copy, and a wait, per call.
        weighted = [w * delta for w, delta in zip(self.weights, deltas, strict=True)]
        return torch.stack(weighted, dim=1)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        """Return the boxes that deltas lead to.

        Args:
            deltas: (N, 5 K). Those of class k are the columns 5 k to 5 k + 4.
            boxes: (N, 5) to start from.

        Returns:
            (N, 5 K) float32, angles in [-180, 180).

        Raises:
            ValueError: The shapes do not fit.
        """
        if deltas.dim() != 2 or deltas.shape[1] % 5 or boxes.shape != (deltas.shape[0], 5):
            raise ValueError(
                f"need deltas (N, 5 K) and boxes (N, 5): got {tuple(deltas.shape)} and"
                f" {tuple(boxes.shape)}"
            )
        x, y, width, height, angle = boxes.float()[:, None].unbind(dim=2)
        columns = deltas.float().unflatten(1, (-1, 5)).unbind(dim=2)
        dx, dy, dw, dh, da = (d / w for d, w in zip(columns, self.weights, strict=True))
        dx, dy = dx * width, dy * height
        if self.along_sides:
            cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
            dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
        moved = [
            dx + x,
            dy + y,
            torch.exp(dw.clamp(max=self.scale_clamp)) * width,
            torch.exp(dh.clamp(max=self.scale_clamp)) * height,
            normalized(torch.rad2deg(da) + angle),
        ]
        return torch.stack(moved, dim=2).flatten(1)


def rotated_transform(cfg: CfgNode, weights: Sequence[float]) -> Box2BoxTransformRotated:
    """Return the transform of rotated boxes as the config has it, with these weights."""
    return Box2BoxTransformRotated(
        weights,
        angle_period=cfg.MODEL.ROTATED_BOX_PERIOD,
        along_sides=cfg.MODEL.ROTATED_BOX_ALONG_SIDES,
    )


def _size_and_center(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return width, height, and the x and y of the centre of (N, 4) boxes."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    width, height = x2 - x1, y2 - y1
    return width, height, x1 + 0.5 * width, y1 + 0.5 * height


_IOU_LOSSES = {"giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}

BOX_LOSS_TYPES = ("smooth_l1", *_IOU_LOSSES)
"""Legal values of `box_reg_loss_type`."""


def check_box_loss_type(loss_type: str, transform: BoxTransform | None = None) -> str:
    """Return the loss type if it is known. Heads check it when they are built.

    Raises:
        ValueError: It is not known, or not defined on the boxes of the transform.
    """
    if loss_type not in BOX_LOSS_TYPES:
        hint = did_you_mean(loss_type, BOX_LOSS_TYPES)
        raise ValueError(
            f"box_reg_loss_type must be one of {', '.join(BOX_LOSS_TYPES)}, got"
            f" {loss_type!r}.{hint}"
        )
    if loss_type in _IOU_LOSSES and isinstance(transform, Box2BoxTransformRotated):
        raise ValueError(
            f"box_reg_loss_type of rotated boxes must be smooth_l1: {loss_type} compares upright"
            " boxes"
        )
    return loss_type


def box_regression_loss(
    pred_deltas: Tensor,
    src_boxes: Tensor,
    gt_boxes: Tensor,
    *,
    transform: BoxTransform,
    loss_type: str,
    smooth_l1_beta: float,
) -> Tensor:
    """Sum the loss of boxes that are predicted as deltas.

    Args:
        pred_deltas: (P, B). Float32 arithmetic whatever the dtype.
        src_boxes: (P, B) anchors or proposals that the deltas start from.
        gt_boxes: (P, B) boxes they should lead to.
        transform: Encodes boxes as deltas.
        loss_type: `smooth_l1` compares deltas; `giou`, `diou` and `ciou` compare boxes.
        smooth_l1_beta: Where smooth L1 turns from quadratic to linear; 0 is L1.

    Returns:
        Scalar, not divided by anything; 0, and part of the graph, when P is 0.
    """
    # The sum over no boxes stays part of the graph, so that every parameter gets a gradient (of
    # zero) and distributed training does not wait for it.
    pred_deltas = pred_deltas.float()
    if loss_type == "smooth_l1":
        target = transform.get_deltas(src_boxes, gt_boxes)
        return smooth_l1_loss(pred_deltas, target, beta=smooth_l1_beta, reduction="sum")
    pred_boxes = transform.apply_deltas(pred_deltas, src_boxes)
    return _IOU_LOSSES[check_box_loss_type(loss_type)](pred_boxes, gt_boxes, reduction="sum")


def dense_box_regression_loss(
    anchors: Sequence[Any],
    box2box_transform: BoxTransform,
    pred_anchor_deltas: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    fg_mask: Tensor,
    box_reg_loss_type: str = "smooth_l1",
    smooth_l1_beta: float = 0.0,
) -> Tensor:
    """Sum the loss of the boxes of foreground anchors over the levels of all images.

    Args:
        anchors: Boxes of each level.
        box2box_transform: Encodes boxes as deltas.
        pred_anchor_deltas: Per level (N, R_l, 4).
        gt_boxes: Per image (R, 4).
        fg_mask: (N, R) bool.
        box_reg_loss_type: See `box_regression_loss`.
        smooth_l1_beta: Likewise.
    """
    start = torch.cat([getattr(boxes, "tensor", boxes) for boxes in anchors])
    return box_regression_loss(
        torch.cat(list(pred_anchor_deltas), dim=1)[fg_mask],
        start.expand(len(gt_boxes), -1, -1)[fg_mask],
        torch.stack(list(gt_boxes))[fg_mask],
        transform=box2box_transform,
        loss_type=box_reg_loss_type,
        smooth_l1_beta=smooth_l1_beta,
    )
