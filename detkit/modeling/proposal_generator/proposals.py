"""From scored boxes to proposals, and the ground truth that is added to them.

Legend: N images, K candidate boxes per image over all levels, R_l boxes of level l.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.layers import batched_nms, batched_nms_rotated, nonzero_tuple
from detkit.structures import Boxes, Instances, RotatedBoxes

# The logit of a probability of 1 - 1e-10: ground truth ranks above every predicted proposal.
_GROUND_TRUTH_LOGIT = math.log((1.0 - 1e-10) / 1e-10)


def top_indices_per_level(logits: Sequence[Tensor], topk: int) -> list[Tensor]:
    """Return the indices of the best-scored boxes of every level.

    Args:
        logits: Per level (N, R_l).
        topk: At most this many of a level.

    Returns:
        Per level (N, min(topk, R_l)) int64 indices, best first.
    """
    return [logits_l.topk(min(topk, logits_l.shape[1]), dim=1).indices for logits_l in logits]


def find_top_rpn_proposals(
    proposals: Sequence[Tensor],
    pred_objectness_logits: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
    *,
    box_class: type[Boxes] = Boxes,
) -> list[Instances]:
    """Return `select_proposals` of the best boxes of every level.

    The RPN itself picks the best before it decodes them.

    Args:
        proposals: Per level (N, R_l, 4) boxes.
        pred_objectness_logits: Per level (N, R_l).
        image_sizes: See `select_proposals`.
        nms_thresh: Likewise.
        pre_nms_topk: At most this many boxes of a level.
        post_nms_topk: See `select_proposals`.
        min_box_size: Likewise.
        training: Likewise.
        box_class: Likewise.
    """
    picked = top_indices_per_level(pred_objectness_logits, pre_nms_topk)
    boxes, logits, level_ids = [], [], []
    for level, idx in enumerate(picked):
        boxes.append(proposals[level].take_along_dim(idx[..., None], dim=1))
        logits.append(pred_objectness_logits[level].gather(1, idx))
        level_ids.append(torch.full_like(idx[0], level))
    return select_proposals(
        torch.cat(boxes, dim=1),
        torch.cat(logits, dim=1),
        torch.cat(level_ids),
        image_sizes,
        nms_thresh=nms_thresh,
        post_nms_topk=post_nms_topk,
        min_box_size=min_box_size,
        training=training,
        box_class=box_class,
    )


def select_proposals(
    boxes: Tensor,
    logits: Tensor,
    level_ids: Tensor,
    image_sizes: Sequence[tuple[int, int]],
    *,
    nms_thresh: float,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
    box_class: type[Boxes] = Boxes,
) -> list[Instances]:
    """Clip candidates to the image, drop small ones, and suppress overlaps level by level.

    Args:
        boxes: (N, K, 4) float32; (N, K, 5) if they are rotated.
        logits: (N, K) float32.
        level_ids: (K,) level of each candidate; a box suppresses boxes of its level only.
        image_sizes: N times (height, width).
        nms_thresh: IoU above which the lower-scored of two boxes is suppressed.
        post_nms_topk: At most this many proposals per image.
        min_box_size: Boxes must be wider and higher than this, in pixels, after clipping.
        training: Whether numbers that are not finite raise an error. In inference they are dropped.
        box_class: What boxes are: `Boxes` or `RotatedBoxes`.

    Returns:
        N Instances with `proposal_boxes` and `objectness_logits`, best first.

    Raises:
        FloatingPointError: Training, and a box or a logit is not finite.
    """
    is_finite = torch.isfinite(boxes).all(dim=2) & torch.isfinite(logits)
    # This waits for the device, but NMS would wait for the same boxes a moment later.
    if training and not is_finite.all():
        raise FloatingPointError(
            "Predicted boxes or scores contain Inf or NaN: training has diverged. Likely causes:"
            " SOLVER.BASE_LR too high for the batch, too few SOLVER.WARMUP_ITERS, or weights that"
            " do not belong to this model."
        )
    nms = batched_nms_rotated if issubclass(box_class, RotatedBoxes) else batched_nms
    proposals: list[Instances] = []
    for boxes_i, logits_i, finite_i, size_i in zip(
        boxes, logits, is_finite, image_sizes, strict=True
    ):
        clipped = box_class(boxes_i)
        clipped.clip(size_i)
        # Indices, found once: a mask would be searched, and waited for, at each of the three
        # selections.
        (valid,) = nonzero_tuple(finite_i & clipped.nonempty(threshold=min_box_size))
        valid_boxes, valid_logits = clipped.tensor[valid], logits_i[valid]
        keep = nms(valid_boxes, valid_logits, level_ids[valid], nms_thresh)
        keep = keep[:post_nms_topk]
        proposals.append(
            Instances(
                size_i,
                proposal_boxes=box_class(valid_boxes[keep]),
                objectness_logits=valid_logits[keep],
            )
        )
    return proposals


def add_ground_truth_to_proposals(
    gt: Sequence[Instances] | Sequence[Boxes], proposals: Sequence[Instances]
) -> list[Instances]:
    """Append the ground truth to the proposals of every image.

    Args:
        gt: N ground truths: `gt_boxes`, and every field of the proposals besides box and logit.
        proposals: N proposals: `proposal_boxes`, `objectness_logits`. Not changed.

    Raises:
        ValueError: There is not one ground truth per image.
        ValueError: The ground truth lacks a field that the proposals have.
    """
    # So that the heads see good boxes, and every object, from the first step on.
    if len(gt) != len(proposals):
        raise ValueError(
            f"need ground truth for every image: got {len(gt)} for {len(proposals)} images"
        )
    return [
        add_ground_truth_to_proposals_single_image(gt_i, proposals_i)
        for gt_i, proposals_i in zip(gt, proposals, strict=True)
    ]


def add_ground_truth_to_proposals_single_image(
    gt: Instances | Boxes, proposals: Instances
) -> Instances:
    """Append the ground truth to the proposals of an image; see `add_ground_truth_to_proposals`."""
    gt_boxes = gt if isinstance(gt, Boxes) else gt.gt_boxes
    if len(gt_boxes) == 0:
        return proposals
    as_proposals = Instances(proposals.image_size)
    for name in proposals.get_fields():
        if name == "proposal_boxes":
            as_proposals.proposal_boxes = gt_boxes
        elif name == "objectness_logits":
            as_proposals.objectness_logits = gt_boxes.tensor.new_full(
                (len(gt_boxes),), _GROUND_TRUTH_LOGIT
            )
        elif isinstance(gt, Instances) and gt.has(name):
            as_proposals.set(name, gt.get(name))
        else:
            raise ValueError(
                f"proposals have a field {name!r} that the ground truth lacks: it cannot be"
                " appended"
            )
    return Instances.cat([proposals, as_proposals])
