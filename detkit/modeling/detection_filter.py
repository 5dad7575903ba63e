"""Which of the scored boxes of an image become its detections.

Legend: N candidates.
"""

from dataclasses import dataclass

from torch import Tensor

from detkit.config import CfgNode
from detkit.layers import NMSMethod, suppress
from detkit.layers.nms import suppress_in_batch
from detkit.structures import RowImages


@dataclass(frozen=True)
class DetectionFilter:
    """The thresholds that candidates pass to become detections."""

    score_thresh: float
    """Detections must score higher."""
    nms_thresh: float
    """IoU above which the lower-scored of two boxes of a class is suppressed."""
    topk: int
    """Largest number of detections per image; negative keeps all."""
    nms: NMSMethod = NMSMethod()
    """How boxes suppress each other."""

    def __call__(
        self, boxes: Tensor, scores: Tensor, classes: Tensor, images: RowImages | None = None
    ) -> tuple[Tensor, Tensor]:
        """Suppress the candidates of one image.

        Args:
            boxes: (N, 4)
            scores: (N,), above `score_thresh`: callers filter before they decode boxes. Only
                scores that soft suppression lowers are compared with it here.
            classes: (N,) int64
            images: Those of the candidates, where these are of a whole batch.

        Returns:
            int64 indices of the detections, best first, and their scores.
        """
        if images is not None:
            keep = suppress_in_batch(
                boxes, scores, classes, images, self.nms_thresh, self.nms, self.topk
            )
            return keep, scores[keep]
        return suppress(
            boxes,
            scores,
            classes,
            self.nms_thresh,
            self.nms,
            min_score=self.score_thresh,
            topk=self.topk,
        )


def nms_method(cfg: CfgNode) -> NMSMethod:
    """Return the suppression that TEST.NMS describes."""
    nms = cfg.TEST.NMS
    return NMSMethod(method=nms.METHOD, sigma=nms.SIGMA, class_agnostic=nms.CLASS_AGNOSTIC)
