"""Random samples of labelled boxes: most are background, and a loss over all of them would learn only that.

Legend: R boxes; ... any leading dimensions (images).
"""

import torch
from torch import Tensor

from detkit.layers import nonzero_tuple


def subsample_labels(
    labels: Tensor, num_samples: int, positive_fraction: float, bg_label: int
) -> tuple[Tensor, Tensor]:
    """Draw boxes at random, foreground first.

    Args:
        labels: (R,) class of each box; `bg_label` is background, -1 is never drawn, all else
            foreground.
        num_samples: How many to draw in all. Fewer come when there are not enough.
        positive_fraction: Largest share of foreground, in [0, 1]. What it lacks is made up with
            background.
        bg_label: The label of background.

    Returns:
        int64 indices of the drawn foreground, and of the drawn background.
    """
    positive, negative = subsample_masks(labels, num_samples, positive_fraction, bg_label)
    return nonzero_tuple(positive)[0], nonzero_tuple(negative)[0]


def subsample_masks(
    labels: Tensor, num_samples: int, positive_fraction: float, bg_label: int
) -> tuple[Tensor, Tensor]:
    """Draw as `subsample_labels` does, for several images at once and without waiting for the device.

    Args:
        labels: (..., R); each row is sampled by itself.
        num_samples: As in `subsample_labels`, per row.
        positive_fraction: As in `subsample_labels`.
        bg_label: As in `subsample_labels`.

    Returns:
        Two (..., R) bool: the drawn foreground and the drawn background.
    """
    is_positive = (labels != -1) & (labels != bg_label)
    positive = _random_subset(is_positive, int(num_samples * positive_fraction))
    num_missing = num_samples - positive.sum(dim=-1, keepdim=True)
    negative = _random_subset(labels == bg_label, num_samples, num_missing)
    return positive, negative


def _random_subset(candidates: Tensor, max_num: int, num: Tensor | None = None) -> Tensor:
    """Pick up to `max_num` true entries of every row at random; up to `num` (..., 1) of them where
    that is given.
    """
    keys = torch.rand(candidates.shape, device=candidates.device).masked_fill_(~candidates, -1.0)
    # The largest keys of a row are a uniform sample of its candidates. How many there are stays on
    # the device.
    top, where = keys.topk(min(max_num, candidates.shape[-1]), dim=-1)
    picked = top >= 0
    if num is not None:
        picked &= torch.arange(picked.shape[-1], device=picked.device) < num
    return torch.zeros_like(candidates).scatter_(-1, where, picked)
