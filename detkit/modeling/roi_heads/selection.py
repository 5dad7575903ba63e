"""Which of the sampled proposals a branch is trained on.

Legend: S sampled proposals of one image.
"""

from collections.abc import Sequence

from torch import Tensor

from detkit.layers import nonzero_tuple
from detkit.structures import Instances


def select_foreground_proposals(proposals: Sequence[Instances], bg_label: int) -> tuple[list[Instances], list[Tensor]]:
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
                f"proposals of image {i} have no gt_classes: they must come from label_and_sample_proposals"
            )
    masks = [(p.gt_classes != -1) & (p.gt_classes != bg_label) for p in proposals]
    # Indices, not the mask: each field that a mask selects from would wait for the device again.
    selected = [p[nonzero_tuple(mask)[0]] for p, mask in zip(proposals, masks, strict=True)]
    return selected, masks
