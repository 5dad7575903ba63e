"""From scored boxes to proposals, and the ground truth that is added to them.

Legend: N images, K candidate boxes per image over all levels, R_l boxes of level l.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.layers import batched_nms, batched_nms_rotated, nonzero_tuple
from detkit.layers.nms import nms_mask
from detkit.structures import BatchBoxes, Boxes, Instances, RowImages, boxes_in_image
from detkit.utils.errors import ContractError

# The logit of a probability of 1 - 1e-10: ground truth ranks above every predicted proposal.
_GROUND_TRUTH_LOGIT = math.log((1.0 - 1e-10) / 1e-10)


def top_indices_per_level(logits: Sequence[Tensor], topk: int) -> list[Tensor]:
    """Return the indices of the best-scored boxes of every level.

    Args:
        logits: Per level (N, R_l).
        topk: At most this many of a level.

    Returns:
        Per level (N, min(topk, R_l)) int64 indices, best first. In an exported graph (N, topk):
        on a level of fewer boxes the last one is repeated, and suppression drops it.
    """
    if torch.compiler.is_exporting():
        # The smaller of two numbers that export does not know makes it slow: 40 against 6 s.
        padded = [F.pad(logits_l, [0, topk], value=-torch.inf) for logits_l in logits]
        top = [logits_l.topk(topk, dim=1).indices for logits_l in padded]
        pairs = zip(top, logits, strict=True)
        return [idx.clamp(max=logits_l.shape[1] - 1) for idx, logits_l in pairs]
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
        image_sizes: See `select_proposals`; only images with a size are looked at.
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
    num_images = len(image_sizes)
    return select_proposals(
        torch.cat(boxes, dim=1)[:num_images],
        torch.cat(logits, dim=1)[:num_images],
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
    image_sizes: Sequence[tuple[int, int]] | Tensor,
    *,
    nms_thresh: float,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
    box_class: type[Boxes] = Boxes,
    score_thresh: float = 0.0,
) -> list[Instances]:
    """Clip candidates to the image, drop small ones, and suppress overlaps level by level.

    Args:
        boxes: (N, K, 4) float32; (N, K, 5) if they are rotated.
        logits: (N, K) float32.
        level_ids: (K,) level of each candidate; a box suppresses boxes of its level only.
        image_sizes: N times (height, width); or (N, 2), which gives one Instances for the batch.
        nms_thresh: IoU above which the lower-scored of two boxes is suppressed.
        post_nms_topk: At most this many proposals per image.
        min_box_size: Boxes must be wider and higher than this, in pixels, after clipping.
        training: Whether numbers that are not finite raise an error. In inference they are dropped.
        box_class: What boxes are: `Boxes` or `RotatedBoxes`.
        score_thresh: Candidates need this probability of an object, in [0, 1]; 0 takes all.

    Returns:
        N Instances with `proposal_boxes` and `objectness_logits`, best first.

    Raises:
        FloatingPointError: Training, and a box or a logit is not finite.
    """
    is_finite = torch.isfinite(boxes).all(dim=2) & torch.isfinite(logits)
    if isinstance(image_sizes, Tensor):
        images = _images_of_rows(boxes, image_sizes)
        sizes = [images]
        parts = [(boxes.flatten(0, 1), is_finite.flatten(), images)]
    else:
        images, sizes = None, image_sizes
        parts = zip(boxes, is_finite, sizes, strict=True)
    clipped: list[Tensor] = []
    valid: list[Tensor] = []
    for boxes_i, finite_i, size_i in parts:
        within = boxes_in_image(boxes_i, size_i, box_class)
        clipped.append(within.tensor)
        valid.append(finite_i & within.nonempty(threshold=min_box_size))
    is_valid = torch.stack(valid).view_as(logits)
    if score_thresh > 0:
        is_valid &= logits.sigmoid() >= score_thresh
    # What is not valid loses against all others, and has a place where it suppresses nothing: how
    # many there are is only asked once everything else is queued.
    boxes = torch.stack(clipped).view_as(boxes).masked_fill(~is_valid[..., None], 0.0)
    logits = logits.masked_fill(~is_valid, -torch.inf)
    if images is not None:
        return [_select_in_batch(boxes, logits, level_ids, images, nms_thresh, post_nms_topk)]
    groups = torch.where(is_valid, level_ids, len(level_ids))
    # Mostly the best hold enough that stay, of the 9,000 of an image in training.
    most = min(logits.shape[1], 4 * post_nms_topk)
    settings = (nms_thresh, post_nms_topk)
    keep, counts, all_finite = _suppress(boxes, logits, groups, is_finite, most, *settings)
    if training and not all_finite:
        raise FloatingPointError(
            "Predicted boxes or scores contain Inf or NaN: training has diverged. Likely causes:"
            " SOLVER.BASE_LR too high for the batch, too few SOLVER.WARMUP_ITERS, or weights that"
            " do not belong to this model."
        )
    if most < logits.shape[1] and min(counts) < post_nms_topk:
        keep, _, _ = _suppress(boxes, logits, groups, is_finite, logits.shape[1], *settings)
    return [
        Instances(
            size_i,
            proposal_boxes=box_class(boxes_i[keep_i[:post_nms_topk]]),
            objectness_logits=logits_i[keep_i[:post_nms_topk]],
        )
        for boxes_i, logits_i, keep_i, size_i in zip(boxes, logits, keep, sizes, strict=True)
    ]


def _images_of_rows(boxes: Tensor, image_sizes: Tensor) -> Any:
    index = torch.arange(boxes.shape[0], device=boxes.device)[:, None].repeat(1, boxes.shape[1])
    return RowImages(index.flatten(), image_sizes)


def _select_in_batch(
    boxes: Tensor,
    logits: Tensor,
    level_ids: Tensor,
    images: Any,
    nms_thresh: float,
    post_nms_topk: int,
) -> Instances:
    """Suppress overlaps in all images of an exported graph; see `select_proposals`.

    Args:
        boxes: (N, K, 4)
        logits: (N, K), -inf for what is no box.
        level_ids: (K,)
        images: `RowImages` of the N * K boxes.
        nms_thresh: See `select_proposals`.
        post_nms_topk: Likewise.
    """
    flat_boxes, flat_logits = boxes.flatten(0, 1), logits.flatten()
    num_levels = level_ids.max() + 1
    groups = images.index * num_levels + level_ids.repeat(logits.shape[0])
    is_kept = nms_mask(flat_boxes, flat_logits, groups, nms_thresh)
    kept_logits = flat_logits.masked_fill(~is_kept, -torch.inf).view_as(logits)
    best, index = kept_logits.sort(dim=1, descending=True, stable=True)
    best, index = best[:, :post_nms_topk], index[:, :post_nms_topk]
    image, rank = nonzero_tuple(best > -torch.inf)
    keep = image * logits.shape[1] + index[image, rank]
    # Export multiplies what it takes for the largest number of rows by that of classes: beyond the
    # integers of ONNX, if it is not told less.
    torch._check(keep.shape[0] < 2**31)
    return Instances(
        images[keep],
        proposal_boxes=BatchBoxes(flat_boxes[keep], images[keep]),
        objectness_logits=flat_logits[keep],
    )


# Boxes that are suppressed at a time: one by one, a GPU would wait for each image.
_NMS_BOXES = 8192


def _suppress(
    boxes: Tensor,
    logits: Tensor,
    groups: Tensor,
    is_finite: Tensor,
    most: int,
    nms_thresh: float,
    post_nms_topk: int,
) -> tuple[list[Tensor], list[int], bool]:
    """Suppress overlaps within the groups of each image.

    Args:
        boxes: (N, K, 4 or 5)
        logits: (N, K), -inf for what is no box.
        groups: (N, K) int64 in [0, K].
        is_finite: (N, K) bool, read along with the counts: each reading waits for the device.
        most: Only so many of the best of each image take part.
        nms_thresh: See `select_proposals`.
        post_nms_topk: Likewise; more than these may stay.

    Returns:
        Per image the indices of the boxes that stay, best first.
        Their numbers.
        Whether all is finite.
    """
    num_images, num_boxes = logits.shape
    top = torch.arange(num_boxes, device=logits.device).expand_as(logits)
    if most < num_boxes:
        # Stable, as NMS sorts: which of several equal logits comes first must not depend on `most`.
        top = logits.sort(dim=1, descending=True, stable=True).indices[:, :most]
        boxes = boxes.take_along_dim(top[..., None], dim=1)
        logits, groups = logits.gather(1, top), groups.gather(1, top)
    is_rotated = boxes.shape[2] == 5
    nms = batched_nms
    if is_rotated:
        nms = functools.partial(batched_nms_rotated, topk=post_nms_topk)
    images_at_once = 1 if is_rotated else max(1, _NMS_BOXES // max(1, most))
    image = torch.arange(num_images, device=logits.device)[:, None]
    own_groups = groups + image % images_at_once * (num_boxes + 1)
    kept: list[Tensor] = []
    for start in range(0, num_images, images_at_once):
        part = slice(start, start + images_at_once)
        keep = nms(
            boxes[part].flatten(0, 1),
            logits[part].flatten(),
            own_groups[part].flatten(),
            nms_thresh,
        )
        kept.append(start * most + keep)
    joined = torch.cat(kept)
    # By image, and within it by score, as suppression returns them. What is no box comes last.
    row = torch.where(logits.flatten()[joined] > -torch.inf, joined // most, num_images)
    joined = joined[row.argsort(stable=True)]
    per_image = [(row == i).sum() for i in range(num_images)]
    *counts, all_finite = torch.stack([*per_image, is_finite.all()]).tolist()
    index = top.flatten()[joined[: sum(counts)]]
    return list(index.split(counts)), counts, bool(all_finite)


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
        raise ContractError(
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
            raise ContractError(
                f"proposals have a field {name!r} that the ground truth lacks: it cannot be"
                " appended"
            )
    return Instances.cat([proposals, as_proposals])
