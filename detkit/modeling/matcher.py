"""Which ground-truth box each anchor or proposal is to learn.

Legend: M ground-truth boxes, R predicted boxes (anchors, proposals).
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from detkit.structures import Boxes, pairwise_iou

# Pairs that are compared at a time: 32 MB per matrix, of which half a dozen are alive at once. A
# crowded image has thousands of objects and 250,000 anchors, so 5 GB per matrix.
_MAX_PAIRS = 1 << 23


class Matcher:
    """Gives each predicted box the ground-truth box it fits best, and a label by how well it fits.

    Source: Ren et al. 2015, arXiv 1506.01497, section 3.1.2.
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        labels: Sequence[int],
        allow_low_quality_matches: bool = False,
    ) -> None:
        """Set what counts as a match.

        Args:
            thresholds: Rising and positive. They cut the qualities into intervals, closed below and
                open above.
            labels: One per interval, so one more than thresholds: 1 a match, 0 background, -1 to be
                ignored.
            allow_low_quality_matches: Also label 1 the predicted boxes that fit a ground-truth box
                best among all, so that every ground-truth box has one.

        Raises:
            ValueError: Thresholds do not rise, labels are others than these three, or their numbers
                do not fit.
        """
        if not all(low < high for low, high in pairwise([0.0, *thresholds])):
            raise ValueError(f"IOU_THRESHOLDS must be positive and rise, got {list(thresholds)}")
        if not set(labels) <= {-1, 0, 1}:
            raise ValueError(
                f"IOU_LABELS must be -1 (ignored), 0 (background) or 1 (match), got {list(labels)}"
            )
        if len(labels) != len(thresholds) + 1:
            raise ValueError(
                f"IOU_LABELS needs one label more than IOU_THRESHOLDS: got {list(labels)} for"
                f" {list(thresholds)}"
            )
        self.thresholds = list(thresholds)
        self.labels = list(labels)
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Match the columns of a matrix to its rows.

        Args:
            match_quality_matrix: (M, R), not negative: IoU of M ground-truth boxes with R predicted
                ones.

        Returns:
            matches: (R,) int64 best ground-truth box, in [0, M). 0 everywhere when M is 0.
            match_labels: (R,) int8 label. That of the lowest interval everywhere when M is 0.
        """
        return self._match([match_quality_matrix])

    def match_boxes(
        self, gt_boxes: Boxes, boxes: Boxes, *, max_pairs: int = _MAX_PAIRS
    ) -> tuple[Tensor, Tensor]:
        """Match boxes by IoU: the same as `matcher(pairwise_iou(gt_boxes, boxes))`, in bounded memory.

        Args:
            gt_boxes: M boxes.
            boxes: R boxes.
            max_pairs: So many IoUs are held at a time, at least R.

        Returns:
            As in `__call__`.
        """
        num_rows = max(1, max_pairs // max(1, len(boxes)))
        chunks = (
            gt_boxes[first : first + num_rows]
            for first in range(0, max(1, len(gt_boxes)), num_rows)
        )
        return self._match(pairwise_iou(chunk, boxes) for chunk in chunks)

    def _match(self, rows: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Match the columns of a matrix that comes in groups of rows, one at least."""
        rows = iter(rows)
        first = next(rows)
        num_gt, num_pred = first.shape
        if num_gt == 0 or num_pred == 0:
            matches = first.new_zeros(num_pred, dtype=torch.int64)
            return matches, torch.full_like(matches, self.labels[0], dtype=torch.int8)
        quality, matches = first.max(dim=0)
        is_best = _is_best_of_a_row(first) if self.allow_low_quality_matches else None
        for group in rows:
            group_quality, group_matches = group.max(dim=0)
            # Strictly: of equal qualities the first row's stays.
            is_better = group_quality > quality
            quality = torch.where(is_better, group_quality, quality)
            matches = torch.where(is_better, group_matches + num_gt, matches)
            num_gt += len(group)
            if is_best is not None:
                is_best |= _is_best_of_a_row(group)
        match_labels = self._label(quality)
        if is_best is not None:
            match_labels.masked_fill_(is_best, 1)
        return matches, match_labels

    def _label(self, quality: Tensor) -> Tensor:
        labels = torch.full_like(quality, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds, self.labels[1:], strict=True):
            labels.masked_fill_(quality >= threshold, label)
        return labels


def _is_best_of_a_row(quality: Tensor) -> Tensor:
    """Tell (R,) which columns hold the largest value of a row, ties included.

    The box that a column is matched to stays the best one of the column, which may be another row:
    what changes is the label only. A row that nothing overlaps has no best; Detectron2 takes its
    zeros as a tie of all columns.
    """
    best = quality.max(dim=1, keepdim=True).values
    return ((quality == best) & (best > 0)).any(dim=0)
