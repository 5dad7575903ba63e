"""`VideoVisualizer`: frames in which an object keeps its colour.

Legend: M objects in a frame, T of the frames before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from detkit.utils.colormap import random_colors
from detkit.visualization.canvas import mask_bounds
from detkit.visualization.classes import text_labels
from detkit.visualization.plain_values import to_array, to_bitmap, to_integers
from detkit.visualization.vis_image import VisImage
from detkit.visualization.visualizer import ColorMode, Visualizer

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
    """A run-length mask, or one of another form, or None."""
    color: Any
    """RGB in [0, 1], or None as long as it has none."""
    ttl: int = _TIME_TO_LIVE
    """Frames for which it is remembered."""


class _Mask(NamedTuple):
    """A mask within its bounds: whole ones of many frames would fill the memory."""

    bitmap: npt.NDArray[np.bool_]
    bounds: tuple[int, int, int, int]
    """x1, y1, x2, y2; zeros for an empty mask."""
    area: int
    image_size: tuple[int, ...]

    @classmethod
    def of(cls, mask: Any) -> "_Mask":
        if isinstance(mask, cls):
            return mask
        if isinstance(mask, dict):
            from detkit.structures import rle_to_bitmask

            mask = rle_to_bitmask(mask, *mask["size"])
        bitmap = to_bitmap(mask)
        x1, y1, x2, y2 = bounds = mask_bounds(bitmap) or (0, 0, 0, 0)
        return cls(bitmap[y1:y2, x1:x2].copy(), bounds, int(bitmap.sum()), bitmap.shape)

    def iou(self, other: "_Mask") -> float:
        if self.image_size != other.image_size:
            return 0.0
        x1, y1 = np.maximum(self.bounds[:2], other.bounds[:2])
        x2, y2 = np.minimum(self.bounds[2:], other.bounds[2:])
        if x1 >= x2 or y1 >= y2:
            return 0.0
        here, there = (
            mask.bitmap[y1 - top : y2 - top, x1 - left : x2 - left]
            for mask, (left, top, _, _) in ((self, self.bounds), (other, other.bounds))
        )
        shared = int((here & there).sum())
        return shared / (self.area + other.area - shared)


class VideoVisualizer:
    """Draws predictions into the frames of a video; an object keeps its colour while it is seen.

    Objects are followed by class and overlap, which is not enough where they are fast.
    """

    def __init__(
        self,
        metadata: Any,
        instance_mode: ColorMode = ColorMode.IMAGE,
        *,
        show_labels: bool = True,
    ) -> None:
        """Take the metadata of the data set, the mode, and whether names are written."""
        self.metadata = metadata
        self._instance_mode = instance_mode
        self._show_labels = show_labels
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
        visualizer = Visualizer(
            frame,
            self.metadata,
            instance_mode=self._instance_mode,
            show_labels=self._show_labels,
        )
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
        bitmaps = None if masks is None else to_bitmap(masks)
        if "COLOR" in fields:
            colors = [tuple(color) for color in fields["COLOR"]]
        else:
            detected = [
                DetectedInstance(
                    label=-1 if classes is None else classes[i],
                    bbox=None if upright is None else upright[i],
                    mask_rle=None if bitmaps is None else _Mask.of(bitmaps[i]),
                    color=None,
                )
                for i in range(count)
            ]
            colors = self._assign_colors(detected)
        names = getattr(self.metadata, "thing_classes", None)
        visualizer.overlay_instances(
            boxes=None if bitmaps is not None else boxes,
            masks=None if bitmaps is None else list(bitmaps),
            labels=text_labels(classes, fields.get("scores"), names),
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
        iou, needed = _Mask.of(first.mask_rle).iou(_Mask.of(second.mask_rle)), _SAME_OBJECT["mask"]
    elif first.bbox is not None and second.bbox is not None:
        (x1, y1, x2, y2), (u1, v1, u2, v2) = first.bbox, second.bbox
        shared = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
        union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
        iou, needed = shared / union if union > 0 else 0.0, _SAME_OBJECT["box"]
    else:
        return 0.0
    return float(iou) if iou > needed else 0.0
