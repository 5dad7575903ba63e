"""Random samples of labelled boxes, so that the many background boxes do not dominate a loss.

Legend: R boxes; ... any leading dimensions (images).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from detkit.layers import nonzero_tuple
from detkit.layers.tensor_ops import split_nonzero


def subsample_labels(
    labels: Tensor, num_samples: int, positive_fraction: float, bg_label: int
) -> tuple[Tensor, Tensor]:
    """Draw boxes at random, foreground first.

    Args:
        labels: (R,) class of each box; `bg_label` is background, -1 is never drawn, all others are
            foreground.
        num_samples: Number of boxes to draw. Fewer are drawn if there are not enough.
        positive_fraction: Largest share of foreground, in [0, 1], rounded down to whole boxes.
            Background fills what is missing.
        bg_label: The label of background.

    Returns:
        int64 indices of the drawn foreground, and of the drawn background.
    """
    positive, negative = subsample_masks(labels, num_samples, positive_fraction, bg_label)
    return nonzero_tuple(positive)[0], nonzero_tuple(negative)[0]


def subsample_masks(
    labels: Tensor, num_samples: int, positive_fraction: float, bg_label: int
) -> tuple[Tensor, Tensor]:
    """Draw like `subsample_labels`, for several images at once and without waiting for the device.

    Args:
        labels: (..., R); each row is sampled independently.
        num_samples: See `subsample_labels`; per row.
        positive_fraction: Likewise.
        bg_label: Likewise.

    Returns:
        Two (..., R) bool: the drawn foreground and the drawn background.
    """
    is_positive = (labels != -1) & (labels != bg_label)
    positive = _random_subset(is_positive, int(num_samples * positive_fraction))
    num_missing = num_samples - positive.sum(dim=-1, keepdim=True)
    negative = _random_subset(labels == bg_label, num_samples, num_missing)
    return positive, negative


def _random_subset(candidates: Tensor, max_num: int, num: Tensor | None = None) -> Tensor:
    """Pick up to `max_num` true entries of every row at random; if given, up to `num` (..., 1)."""
    # The candidates with the largest random keys are a uniform sample. Unlike randperm of their
    # indices this needs no count of candidates, which is on the device.
    keys = torch.rand(candidates.shape, device=candidates.device).masked_fill_(~candidates, -1.0)
    top, where = keys.topk(min(max_num, candidates.shape[-1]), dim=-1)
    picked = top >= 0
    if num is not None:
        picked &= torch.arange(picked.shape[-1], device=picked.device) < num
    return torch.zeros_like(candidates).scatter_(-1, where, picked)


def note_foreground_first(gt_classes: Tensor, count: int, bg_label: int) -> None:
    """Note on a tensor of classes that its first `count` entries, and no others, are foreground.

    `find_foreground` then need not ask the device. The note is void once the tensor is changed.
    """
    # Tensors of torch.inference_mode do not tell whether they were changed.
    if not gt_classes.is_inference():
        vars(gt_classes)["_num_foreground"] = (count, bg_label, gt_classes._version)


def find_foreground(gt_classes: Sequence[Tensor], bg_label: int) -> list[tuple[Tensor, np.ndarray]]:
    """Return where the foreground is, waiting for the device once, or not at all if it is noted.

    Args:
        gt_classes: Per image (R_i,) classes; `bg_label` and -1 are not foreground.
        bg_label: The label of background.

    Returns:
        Per image the rising int64 indices on the device, and the same on the host.
    """
    notes: list[int] = []
    for classes in gt_classes:
        note = vars(classes).get("_num_foreground")
        if note is not None and note[1:] == (bg_label, classes._version):
            notes.append(note[0])
    if len(notes) == len(gt_classes):
        return [
            (torch.arange(count, device=classes.device), np.arange(count))
            for count, classes in zip(notes, gt_classes, strict=True)
        ]
    masks = [(classes != -1) & (classes != bg_label) for classes in gt_classes]
    ends = np.cumsum([len(mask) for mask in masks])
    on_host = [np.flatnonzero(mask) for mask in np.split(torch.cat(masks).cpu().numpy(), ends[:-1])]
    return list(zip(split_nonzero(masks, [len(i) for i in on_host]), on_host, strict=True))
