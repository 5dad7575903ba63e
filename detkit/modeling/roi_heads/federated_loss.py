"""Which classes a federated loss looks at, for data in which an image says nothing about most classes.

Source: Zhou et al. 2021, arXiv 2103.07461, section 5.1, after Gupta et al. 2019, arXiv 1908.03195.

Legend: R regions over the batch, K classes.
"""

import torch
from torch import Tensor


def sample_federated_classes(gt_classes: Tensor, num_sampled: int, weights: Tensor) -> Tensor:
    """Draw the classes of a batch: all that appear in it, and further ones by their weights.

    Nothing waits for the device, whatever the number of classes that appear.

    Args:
        gt_classes: (R,) in [0, K], K for background.
        num_sampled: Classes in all. Background counts as one where it appears, as in Detectron2.
            More if more appear; fewer if weights above 0 run out.
        weights: (K,) chance of each class that does not appear, in any unit. One of 0 is never
            drawn.

    Returns:
        (K,) bool.
    """
    appears = torch.zeros(len(weights) + 1, dtype=torch.bool, device=weights.device)
    appears[gt_classes] = True
    num_missing = num_sampled - appears.sum()
    appears = appears[:-1]
    # To draw without replacement is to take the largest of log weight plus Gumbel noise (Yellott
    # 1977).
    keys = weights.log() - torch.empty_like(weights).exponential_().log()
    top, classes = keys.masked_fill(appears | ~(weights > 0), -torch.inf).topk(
        min(num_sampled, len(weights))
    )
    is_drawn = (torch.arange(len(top), device=top.device) < num_missing) & (top > -torch.inf)
    return appears.scatter(0, classes, appears[classes] | is_drawn)
