"""From boxes and scores per class to detections.

Legend: N images, R_i regions of image i, K classes, D candidates above the threshold.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.layers import NMSMethod, nonzero_tuple, suppress
from detkit.structures import Boxes, Instances


def fast_rcnn_inference(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    nms: NMSMethod = NMSMethod(),
) -> tuple[list[Instances], list[Tensor]]:
    """Return the detections of every image.

    Args:
        boxes: Per image (R_i, 4 K), or (R_i, 4) for boxes that all classes share.
        scores: Per image (R_i, K + 1), the last column background. In [0, 1].
        image_shapes: N times (height, width).
        score_thresh: Detections must score higher.
        nms_thresh: IoU above which the lower-scored of two boxes of a class goes.
        topk_per_image: At most this many; negative gives all.
        nms: How boxes suppress each other.

    Returns:
        Per image Instances with `pred_boxes`, `scores` and `pred_classes`, best first.
        Per image the (len(instances),) index of the region that each came from.
    """
    results = [
        fast_rcnn_inference_single_image(
            boxes_i, scores_i, shape_i, score_thresh, nms_thresh, topk_per_image, nms
        )
        for boxes_i, scores_i, shape_i in zip(boxes, scores, image_shapes, strict=True)
    ]
    return [instances for instances, _ in results], [regions for _, regions in results]


def fast_rcnn_inference_single_image(
    boxes: Tensor,
    scores: Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    nms: NMSMethod = NMSMethod(),
) -> tuple[Instances, Tensor]:
    """Return the detections of one image; see `fast_rcnn_inference`."""
    # The threshold comes first: what it leaves of some 80,000 boxes is mostly a few hundred.
    regions, classes, boxes, scores = _above_threshold(boxes, scores, score_thresh)
    clipped = Boxes(boxes)
    clipped.clip(image_shape)
    keep, scores = suppress(
        clipped.tensor,
        scores,
        classes,
        nms_thresh,
        nms,
        min_score=score_thresh,
        topk=topk_per_image,
    )
    instances = Instances(
        image_shape,
        pred_boxes=Boxes(clipped.tensor[keep]),
        scores=scores,
        pred_classes=classes[keep],
    )
    return instances, regions[keep]


def _above_threshold(
    boxes: Tensor, scores: Tensor, thresh: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pick the candidates: (D,) region, (D,) class, (D, 4) box, (D,) score."""
    # A region with a number that is not finite is left out as a whole: its other numbers mean
    # nothing either.
    is_finite = torch.isfinite(boxes).all(dim=1, keepdim=True) & torch.isfinite(scores).all(
        dim=1, keepdim=True
    )
    scores = scores[:, :-1]
    regions, classes = nonzero_tuple((scores > thresh) & is_finite)
    boxes = boxes.unflatten(1, (-1, 4))
    box_classes = classes if boxes.shape[1] > 1 else torch.zeros_like(classes)
    return regions, classes, boxes[regions, box_classes], scores[regions, classes]
