"""Detectron2's name for a `COCOeval` in C++.

Nothing else imports this file: faster-coco-eval imports OpenCV, which takes longer than all of
detkit.
"""

from typing import Any, cast

from faster_coco_eval import COCOeval_faster
from pycocotools.cocoeval import COCOeval


class COCOeval_opt(COCOeval_faster):
    """What Detectron2 calls a `COCOeval` in C++: with the summary, and `stats`, of pycocotools."""

    def summarize(self) -> None:
        """Print the twelve numbers, ten of keypoints, as `pycocotools.cocoeval` does."""
        COCOeval.summarize(cast(Any, self))
