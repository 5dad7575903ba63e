"""`VideoVisualizer`: frames in which an object keeps its colour.

Legend: M objects in a frame, T of the frames before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from detkit.utils.colormap import random_colors
from detkit.visualization.plain_values import to_array, to_integers
from detkit.visualization.vis_image import VisImage
from detkit.visualization.visualizer import ColorMode, Visualizer, text_labels

if TYPE_CHECKING:
    from detkit.structures import Instances

# Objects of the same class in two frames are one if they overlap by more.
_SAME_OBJECT = {"mask": 0.6, "box": 0.5}
# Frames for which an object that is not seen keeps its colour.
_TIME_TO_LIVE = 8
_NUM_COLORS = 74


@dataclass
class DetectedInstance:
    """An object in the last frame that showed it."""

    label: int
    bbox: Any
    """(4,) XYXY, or None."""
    mask_rle: Any
    """A run-length mask, or None."""
    color: Any
    """RGB in [0, 1], or None as long as it has none."""
    ttl: int = _TIME_TO_LIVE
    """Frames for which it is remembered."""


class VideoVisualizer:
    """Draws predictions into the frames of a video; an object keeps its colour while it is seen.

    Objects are followed by class and overlap, which is not enough where they are fast.
    """

    def __init__(self, metadata: Any, instance_mode: ColorMode = ColorMode.IMAGE) -> None:
        """Take the metadata of the data set, and what colours stand for."""
        self.metadata = metadata
        self._instance_mode = instance_mode
        self._old_instances: list[DetectedInstance] = []
        self._color_pool = [tuple(c.tolist()) for c in random_colors(_NUM_COLORS, True, 1)]
        self._color_idx_set = set(range(len(self._color_pool)))

    def draw_instance_predictions(
        self, frame: npt.NDArray[np.uint8], predictions: "Instances"
    ) -> VisImage:
        """Draw the instances of the next frame.

        Args:
            frame: (H, W, 3) RGB.
            predictions: As in `Visualizer.draw_instance_predictions`. Fields `COLOR` (RGB in
                [0, 1]) and `ID`, of a tracker, take the place of the matching of frames.
        """
        visualizer = Visualizer(frame, self.metadata, instance_mode=self._instance_mode)
        count = len(predictions) if predictions.get_fields() else 0
        if count == 0:
            return visualizer.output
        fields = predictions.get_fields()
        boxes = to_array(fields["pred_boxes"]) if "pred_boxes" in fields else None
        # Rotated objects are followed by the upright boxes around them.
        is_rotated = boxes is not None and boxes.shape[-1] == 5
        upright = to_array(fields["pred_boxes"].upright()) if is_rotated else boxes
        classes = to_integers(fields["pred_classes"]).tolist() if "pred_classes" in fields else None
        masks = fields.get("pred_masks")
        bitmaps = None if masks is None else to_array(masks) != 0
        if "COLOR" in fields:
            colors = [tuple(color) for color in fields["COLOR"]]
        else:
            detected = [
                DetectedInstance(
                    label=-1 if classes is None else classes[i],
                    bbox=None if upright is None else upright[i],
                    mask_rle=None if bitmaps is None else bitmaps[i],
                    color=None,
                )
                for i in range(count)
            ]
            colors = self._assign_colors(detected)
        names = getattr(self.metadata, "thing_classes", None)
        visualizer.overlay_instances(
            boxes=None if bitmaps is not None else boxes,
            masks=None if bitmaps is None else list(bitmaps),
            labels=None
            if bitmaps is not None
            else text_labels(classes, fields.get("scores"), names),
            keypoints=fields.get("pred_keypoints"),
            assigned_colors=colors,
            alpha=0.5,
        )
        return visualizer.output

    def draw_sem_seg(
        self, frame: npt.NDArray[np.uint8], sem_seg: Any, area_threshold: float | None = None
    ) -> VisImage:
        """Draw the class of every pixel; see `Visualizer.draw_sem_seg`."""
        visualizer = Visualizer(frame, self.metadata)
        visualizer.draw_sem_seg(sem_seg, area_threshold)
        return visualizer.output

    def draw_panoptic_seg_predictions(
        self,
        frame: npt.NDArray[np.uint8],
        panoptic_seg: Any,
        segments_info: Sequence[dict[str, Any]],
        area_threshold: float | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Draw the segment of every pixel; see `Visualizer.draw_panoptic_seg`."""
        visualizer = Visualizer(frame, self.metadata, instance_mode=self._instance_mode)
        visualizer.draw_panoptic_seg(panoptic_seg, segments_info, area_threshold, alpha)
        return visualizer.output

    def _assign_colors(self, instances: list[DetectedInstance]) -> list[Any]:
        """Give each object the colour it had in the frames before, or an unused one."""
        overlaps = np.zeros((len(self._old_instances), len(instances)))
        for i, old in enumerate(self._old_instances):
            for j, new in enumerate(instances):
                if old.label == new.label:
                    overlaps[i, j] = _overlap(old, new)
        # The best pair first; an object is one other at most.
        for i, j in np.argwhere(overlaps > 0)[np.argsort(-overlaps[overlaps > 0], kind="stable")]:
            if self._old_instances[i].color is not None and instances[j].color is None:
                instances[j].color = self._old_instances[i].color
                self._old_instances[i].color = None
        kept = []
        for old in self._old_instances:
            if old.color is None:
                continue
            old.ttl -= 1
            if old.ttl > 0:
                kept.append(old)
            else:
                self._color_idx_set.add(self._color_pool.index(old.color))
        for new in instances:
            if new.color is None:
                new.color = self._next_color()
        self._old_instances = [*instances, *kept]
        return [new.color for new in instances]

    def _next_color(self) -> Any:
        if not self._color_idx_set:  # all are in use: some object shares its colour
            self._color_idx_set = set(range(len(self._color_pool)))
        return self._color_pool[self._color_idx_set.pop()]


def _overlap(first: DetectedInstance, second: DetectedInstance) -> float:
    """Return the IoU of two objects, 0 where it is too small to be the same object."""
    if first.mask_rle is not None and second.mask_rle is not None:
        masks = [_bitmap(first.mask_rle), _bitmap(second.mask_rle)]
        if masks[0].shape != masks[1].shape:
            return 0.0
        union = (masks[0] | masks[1]).sum()
        iou, needed = (masks[0] & masks[1]).sum() / max(union, 1), _SAME_OBJECT["mask"]
    elif first.bbox is not None and second.bbox is not None:
        (x1, y1, x2, y2), (u1, v1, u2, v2) = first.bbox, second.bbox
        shared = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
        union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
        iou, needed = shared / union if union > 0 else 0.0, _SAME_OBJECT["box"]
    else:
        return 0.0
    return float(iou) if iou > needed else 0.0


def _bitmap(mask: Any) -> npt.NDArray[np.bool_]:
    if isinstance(mask, dict):
        from detkit.structures import rle_to_bitmask

        return rle_to_bitmask(mask, *mask["size"])
    return np.asarray(mask)
