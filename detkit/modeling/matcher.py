"""Which ground-truth box each anchor or proposal is trained to predict.

Legend: M ground-truth boxes, R predicted boxes (anchors, proposals).
"""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from detkit.structures import Boxes, RotatedBoxes, pairwise_iou
from detkit.utils.errors import ConfigError, ContractError
from detkit.utils.overriding import is_overridden, overridable

# Pairs that are compared at a time: 32 MB per matrix, of which half a dozen are alive at once. A
# crowded image has thousands of objects and 250,000 anchors, which would be 5 GB per matrix.
_MAX_PAIRS = 1 << 23


class Matcher:
    """Assigns to each predicted box its best ground-truth box, and a label by the overlap.

    Source: Ren et al. 2015, arXiv 1506.01497, section 3.1.2.

    Example:
        >>> import torch
        >>> from detkit.modeling import Matcher
        >>> matcher = Matcher([0.3, 0.7], [0, -1, 1])
        >>> iou = torch.tensor([[0.1, 0.5, 0.8], [0.2, 0.0, 0.9]])  # 2 objects, 3 anchors
        >>> matches, labels = matcher(iou)
        >>> matches.tolist(), labels.tolist()
        ([1, 0, 1], [0, -1, 1])
    """

    def __init__(
        self,
        thresholds: Sequence[float],
        labels: Sequence[int],
        allow_low_quality_matches: bool = False,
    ) -> None:
        """Set what counts as a match.

        Args:
            thresholds: 0 < t1 < t2 < ... They cut the qualities into intervals [0, t1), [t1, t2),
                ...
            labels: One per interval: 1 is a match, 0 background, -1 is ignored.
            allow_low_quality_matches: Whether to label 1 also the predicted boxes that overlap a
                ground-truth box most, below the thresholds or not.

        Raises:
            ValueError: Thresholds do not rise.
            ValueError: A label is none of -1, 0 and 1.
            ValueError: There is not one label more than thresholds.
        """
        if not all(low < high for low, high in pairwise([0.0, *thresholds])):
            raise ContractError(f"thresholds must be positive and rise, got {list(thresholds)}")
        if not set(labels) <= {-1, 0, 1}:
            raise ContractError(f"labels must be -1, 0 or 1, got {list(labels)}")
        if len(labels) != len(thresholds) + 1:
            raise ContractError(
                f"labels must be one more than thresholds: got {list(labels)} for"
                f" {list(thresholds)}"
            )
        # From end to end, as in Detectron2, for a subclass that goes through the intervals itself.
        self.thresholds = [-math.inf, *thresholds, math.inf]
        self.labels = list(labels)
        self.allow_low_quality_matches = allow_low_quality_matches

    @overridable
    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Match the columns of a matrix to its rows.

        Args:
            match_quality_matrix: (M, R) IoU of M ground-truth boxes with R predicted ones, >= 0.

        Returns:
            matches: (R,) int64 best ground-truth box, in [0, M); the first one of a tie. All 0 when
                M is 0.
            match_labels: (R,) int8 label. All that of the lowest interval when M is 0.
        """
        if not self._has_own_low_quality() or match_quality_matrix.numel() == 0:
            return self._match([match_quality_matrix])
        matches, match_labels = self._match([match_quality_matrix])
        self.set_low_quality_matches_(match_labels, match_quality_matrix)
        return matches, match_labels

    @overridable
    def set_low_quality_matches_(self, match_labels: Tensor, match_quality_matrix: Tensor) -> None:
        """Label 1, in place, the predicted boxes that overlap a ground-truth box most.

        Args:
            match_labels: (R,) int8.
            match_quality_matrix: (M, R) IoU.
        """
        match_labels.masked_fill_(_is_best_of_a_row(match_quality_matrix), 1)

    def _has_own_low_quality(self) -> bool:
        is_own = is_overridden(self.set_low_quality_matches_)
        return self.allow_low_quality_matches and is_own

    def match_boxes(
        self, gt_boxes: Boxes, boxes: Boxes, *, max_pairs: int = _MAX_PAIRS
    ) -> tuple[Tensor, Tensor]:
        """Return `matcher(pairwise_iou(gt_boxes, boxes))`, computed in bounded memory.

        A subclass that matches in its own way is given the whole matrix.

        Args:
            gt_boxes: M boxes.
            boxes: R boxes.
            max_pairs: Number of IoUs that are held at a time; at least R are.

        Raises:
            ConfigError: One of them is rotated, the other not.
        """
        if isinstance(gt_boxes, RotatedBoxes) != isinstance(boxes, RotatedBoxes):
            raise ConfigError(
                f"ground truth is {type(gt_boxes).__name__}, but the model predicts"
                f" {type(boxes).__name__}: MODEL.ROTATED_BOXES must be True with RRPN and"
                " RROIHeads, and False with heads of upright boxes"
            )
        if is_overridden(self.__call__) or self._has_own_low_quality():
            return self(pairwise_iou(gt_boxes, boxes))
        num_rows = max(1, max_pairs // max(1, len(boxes)))
        starts = range(0, max(1, len(gt_boxes)), num_rows)
        return self._match(pairwise_iou(gt_boxes[i : i + num_rows], boxes) for i in starts)

    def _match(self, rows: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Match the columns of a matrix that comes in groups of rows, at least one."""
        rows = iter(rows)
        first = next(rows)
        num_gt, num_pred = first.shape
        if num_gt == 0 or num_pred == 0:
            matches = first.new_zeros(num_pred, dtype=torch.int64)
            return matches, torch.full_like(matches, self.labels[0], dtype=torch.int8)
        quality, matches = first.max(dim=0)
        is_best = None
        if self.allow_low_quality_matches and not self._has_own_low_quality():
            is_best = _is_best_of_a_row(first)
        for group in rows:
            group_quality, group_matches = group.max(dim=0)
            # Strictly better: of a tie the first row stays, as in one max over the whole matrix.
            is_better = group_quality > quality
            quality = torch.where(is_better, group_quality, quality)
            matches = torch.where(is_better, group_matches + num_gt, matches)
            num_gt += len(group)
            if is_best is not None:
                is_best |= _is_best_of_a_row(group)
        match_labels = torch.full_like(quality, self.labels[0], dtype=torch.int8)
        for threshold, label in zip(self.thresholds[1:-1], self.labels[1:], strict=True):
            match_labels.masked_fill_(quality >= threshold, label)
        if is_best is not None:
            match_labels.masked_fill_(is_best, 1)
        return matches, match_labels


def _is_best_of_a_row(quality: Tensor) -> Tensor:
    """Return (R,) whether a column holds the largest value of a row, ties included.

    Only the label of such a column changes. It stays matched to the best row of the column, which
    may be another one.
    """
    best = quality.max(dim=1, keepdim=True).values
    # A row that nothing overlaps has no best column; Detectron2 takes its zeros as a tie of all.
    return ((quality == best) & (best > 0)).any(dim=0)
