"""Which of the sampled proposals a branch is trained on.

Legend: S sampled proposals of one image.
"""

from collections.abc import Sequence

from torch import Tensor

from detkit.layers import nonzero_tuple
from detkit.structures import Instances
from detkit.utils.events import get_event_storage, has_event_storage


def select_foreground_proposals(
    proposals: Sequence[Instances], bg_label: int
) -> tuple[list[Instances], list[Tensor]]:
    """Keep the proposals that stand for an object: those that masks and keypoints are trained on.

    Args:
        proposals: Per image S proposals with `gt_classes`.
        bg_label: Class of background. -1 is ignored and not kept either.

    Returns:
        The foreground proposals of each image, and per image the (S,) bool mask that selects them.

    Raises:
        ValueError: Proposals have no `gt_classes`.
    """
    for i, proposals_i in enumerate(proposals):
        if not proposals_i.has("gt_classes"):
            raise ValueError(
                f"proposals of image {i} have no gt_classes: they must come from"
                " label_and_sample_proposals"
            )
    masks = [(p.gt_classes != -1) & (p.gt_classes != bg_label) for p in proposals]
    # Indices, not the mask: each field that a mask selects from would wait for the device again.
    selected = [p[nonzero_tuple(mask)[0]] for p, mask in zip(proposals, masks, strict=True)]
    return selected, masks


def select_proposals_with_visible_keypoints(proposals: Sequence[Instances]) -> list[Instances]:
    """Keep the proposals that hold at least one labelled keypoint of their object: others teach no keypoint head.

    Args:
        proposals: Per image its foreground proposals, with `proposal_boxes` and, where there is
            any, `gt_keypoints`.

    Raises:
        ValueError: Foreground proposals have no `gt_keypoints`.
    """
    for i, proposals_i in enumerate(proposals):
        if len(proposals_i) > 0 and not proposals_i.has("gt_keypoints"):
            raise ValueError(
                f"proposals of image {i} have no gt_keypoints: MODEL.KEYPOINT_ON needs a data set"
                " with keypoints"
            )
    selected = [p[nonzero_tuple(_has_keypoint(p))[0]] if len(p) > 0 else p for p in proposals]
    counts = [len(kept) for kept, p in zip(selected, proposals, strict=True) if len(p) > 0]
    if has_event_storage():
        get_event_storage().put_scalar(
            "keypoint_head/num_fg_samples", sum(counts) / max(len(counts), 1)
        )
    return selected


def _has_keypoint(proposals: Instances) -> Tensor:
    """Tell (S,) bool which proposals hold a labelled keypoint; on their border counts."""
    keypoints, boxes = proposals.gt_keypoints.tensor, proposals.proposal_boxes.tensor[:, None]
    points = keypoints[:, :, :2]
    is_inside = ((points >= boxes[..., :2]) & (points <= boxes[..., 2:])).all(dim=2)
    return (is_inside & (keypoints[:, :, 2] >= 1)).any(dim=1)
