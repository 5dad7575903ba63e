"""Pictures of what a data set says and of what a model says.

Shapes: M objects in one image, K keypoints of each, (H, W) the image.
"""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from detkit.structures import BoxMode, Instances
from detkit.structures.records import ImageRecord, ModelOutput
from detkit.utils.colormap import colormap
from detkit.utils.image import read_image, read_label_map
from detkit.utils.image_file import MAX_IMAGE_PIXELS
from detkit.utils.segment_ids import rgb2id
from detkit.visualization.canvas import Canvas, Color
from detkit.visualization.labels import draw_labels
from detkit.visualization.mask_form import binary_mask, is_polygons, mask_list
from detkit.visualization.plain_values import (
    common_length,
    keypoint_list,
    to_array,
    to_integers,
    to_list,
)
from detkit.visualization.segments import Segment, draw_segments
from detkit.visualization.skeleton import draw_keypoints
from detkit.visualization.vis_image import VisImage

# A speck's name would hide more of the picture than it tells. A share of the picture's area.
_NAMED_AREA = 0.002


class ColorMode(enum.Enum):
    """What the colours of instances tell."""

    IMAGE = 0
    """Each instance has its own colour, so that neighbours of one class stand apart."""
    SEGMENTATION = 1
    """Each class has its own colour: the metadata's `thing_colors` where there are any."""
    IMAGE_BW = 2
    """As IMAGE, on a grey picture in which only masked pixels keep their colour."""


class Visualizer:
    """Draws instances, classes of pixels and segments into a picture.

    Example:
        >>> picture = Visualizer(image_rgb, metadata).draw_instance_predictions(outputs["instances"])
        >>> picture.save("prediction.jpg")
    """

    def __init__(
        self,
        img_rgb: npt.NDArray[np.uint8],
        metadata: Any = None,
        scale: float = 1.0,
        instance_mode: ColorMode = ColorMode.IMAGE,
    ) -> None:
        """Start from a picture; it is copied, not changed.

        Args:
            img_rgb: (H, W, 3) uint8, red first.
            metadata: Read for `thing_classes`, `thing_colors`, `stuff_classes`, `stuff_colors`,
                `ignore_label`, `keypoint_names` and `keypoint_connection_rules`. Without names, the
                numbers of classes are shown.
            scale: Size of the output in sizes of the input. Labels of small pictures need more than
                1 to be readable.
            instance_mode: What colours tell.

        Raises:
            ValueError: The picture has another shape or type, or `scale` is not positive.
        """
        self._canvas = Canvas(np.asarray(img_rgb), scale)
        # Not `scale`: the output has whole pixels, so its two sides may be scaled a little
        # differently.
        height, width = img_rgb.shape[:2]
        self._stretch = np.array([self._canvas.width / width, self._canvas.height / height])
        self._image_size = (height, width)
        self._things = _Classes(metadata, "thing")
        self._stuff = _Classes(metadata, "stuff")
        ignore_label = getattr(metadata, "ignore_label", None)
        self._ignore_label = 255 if ignore_label is None else ignore_label
        self._keypoint_names = list(getattr(metadata, "keypoint_names", None) or [])
        self._connection_rules = list(getattr(metadata, "keypoint_connection_rules", None) or [])
        self._mode = instance_mode

    # -- what a model or a data set says
    # -----------------------------------------------------------------------------

    def draw_output(
        self, output: ModelOutput, score_threshold: float = 0.0, num_proposals: int = 20
    ) -> VisImage:
        """Draw all that a model says about the image.

        Args:
            output: In pixels of the picture, on any device. Where there is a panoptic result, it
                alone: it is made of the others.
            score_threshold: Instances below this score are left out.
            num_proposals: How many of the best proposals are drawn, of a model without instances.
        """
        if "panoptic_seg" in output:
            return self.draw_panoptic_seg(*output["panoptic_seg"])
        if "sem_seg" in output:
            self.draw_sem_seg(output["sem_seg"].argmax(dim=0))
        if "instances" in output:
            instances = output["instances"]
            self.draw_instance_predictions(instances[instances.scores >= score_threshold])
        elif "proposals" in output:
            self.overlay_instances(boxes=output["proposals"][:num_proposals].proposal_boxes)
        return self.get_output()

    def draw_instance_predictions(self, predictions: Instances) -> VisImage:
        """Draw what a model found.

        Args:
            predictions: `pred_boxes`, `scores`, `pred_classes`, `pred_masks`, `pred_keypoints`:
                those that are there, on any device, in pixels of the picture.
        """
        fields = predictions.get_fields()
        classes = to_list(fields.get("pred_classes"))
        labels = self._labels(classes, to_list(fields.get("scores")))
        return self.overlay_instances(
            boxes=fields.get("pred_boxes"),
            labels=labels,
            masks=fields.get("pred_masks"),
            keypoints=fields.get("pred_keypoints"),
            assigned_colors=self._colors(classes, len(predictions) if fields else 0),
        )

    def draw_dataset_dict(
        self, dic: ImageRecord, max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> VisImage:
        """Draw all that a data set's record says; its label map and its panoptic png are read from their files.

        Where there is a panoptic png with `segments_info`, it alone is drawn: it holds the others.

        Args:
            dic: The record.
            max_image_pixels: As `max_pixels` in `read_image`, of these files.
        """
        if "pan_seg_file_name" in dic and "segments_info" in dic:
            segments = read_image(dic["pan_seg_file_name"], "RGB", max_pixels=max_image_pixels)
            return self.draw_panoptic_seg(rgb2id(segments), dic["segments_info"])
        annotations = dic.get("annotations") or []
        if "sem_seg_file_name" in dic:
            labels = read_label_map(dic["sem_seg_file_name"], max_pixels=max_image_pixels).astype(
                np.int64
            )
            if annotations and self._stuff.name(0) == "things":
                labels[labels == 0] = self._ignore_label  # the instances say more
            self.draw_sem_seg(labels)
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        classes = [a["category_id"] for a in annotations]
        names = self._labels(classes, None)
        marks = [
            " (crowd)" if a.get("iscrowd") else " (difficult)" if a.get("difficult") else ""
            for a in annotations
        ]
        keypoints = [a.get("keypoints") for a in annotations]
        return self.overlay_instances(
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            labels=[name + mark for name, mark in zip(names or [], marks, strict=True)],
            masks=[a.get("segmentation") for a in annotations],
            keypoints=keypoints if any(keypoints) else None,
            assigned_colors=self._colors(classes, len(annotations)),
        )

    def draw_sem_seg(
        self, sem_seg: Any, area_threshold: float | None = None, alpha: float = 0.55
    ) -> VisImage:
        """Draw a class for every pixel.

        Args:
            sem_seg: (H, W) tensor or array of class numbers. Those without a name stay as they are,
                or, without any names, the metadata's `ignore_label` (255 where it has none).
            area_threshold: Classes of fewer pixels get no name; by default 0.2 % of the picture.
            alpha: Opacity.
        """
        labels = to_integers(sem_seg)
        present = [
            int(label) for label in np.unique(labels) if label >= 0 and label != self._ignore_label
        ]
        known = [
            label for label in present if not self._stuff.names or label < len(self._stuff.names)
        ]
        segments = [
            Segment(label, self._stuff.color(label), self._stuff.name(label)) for label in known
        ]
        return self._draw_segments(labels, segments, area_threshold, alpha)

    def draw_panoptic_seg(
        self,
        panoptic_seg: Any,
        segments_info: Sequence[Mapping[str, Any]],
        area_threshold: float | None = None,
        alpha: float = 0.55,
    ) -> VisImage:
        """Draw a segment for every pixel.

        Args:
            panoptic_seg: (H, W) tensor or array of segment ids.
            segments_info: `id`, `category_id` and `isthing` of each segment, and maybe `score` and
                `iscrowd`.
            area_threshold: Segments of fewer pixels get no name; by default 0.2 % of the picture.
            alpha: Opacity.
        """
        things = [info for info in segments_info if info.get("isthing", True)]
        thing_colors = iter(self._colors([info["category_id"] for info in things], len(things)))
        segments = []
        for info in segments_info:
            is_thing, category = info.get("isthing", True), info["category_id"]
            color = next(thing_colors) if is_thing else self._stuff.color(category)
            text = (self._things if is_thing else self._stuff).name(category)
            text += f" {info['score']:.0%}" if "score" in info else ""
            segments.append(
                Segment(info["id"], color, text + (" (crowd)" if info.get("iscrowd") else ""))
            )
        return self._draw_segments(to_integers(panoptic_seg), segments, area_threshold, alpha)

    # The name it has in Detectron2's demo.
    draw_panoptic_seg_predictions = draw_panoptic_seg

    def overlay_instances(
        self,
        *,
        boxes: Any = None,
        labels: Sequence[str] | None = None,
        masks: Any = None,
        keypoints: Any = None,
        assigned_colors: Sequence[Sequence[float]] | None = None,
        alpha: float = 0.4,
    ) -> VisImage:
        """Draw instances: masks, boxes over them, keypoints, labels on top, the largest instances first.

        Args:
            boxes: `Boxes`, or (M, 4) XYXY numbers, in pixels of the input picture.
            labels: One text per instance.
            masks: One per instance: a list of polygons `[x0, y0, ...]`, COCO's run-length encoding,
                an (H, W) array of bool, or None for an instance without; or `PolygonMasks`, or
                `BitMasks`, or (M, H, W).
            keypoints: `Keypoints`, or (M, K, 3) x, y and score or visibility; or a list of 3 K
                numbers, or None, per instance.
            assigned_colors: RGB per instance, 0 to 255.
            alpha: Opacity of masks.

        Raises:
            ValueError: The arguments describe different numbers of instances.
        """
        corners = (
            None if boxes is None else to_array(boxes).reshape(-1, 4) * np.tile(self._stretch, 2)
        )
        all_masks = None if masks is None else mask_list(masks)
        points = None if keypoints is None else keypoint_list(keypoints)
        count = common_length(
            boxes=corners,
            labels=labels,
            masks=all_masks,
            keypoints=points,
            assigned_colors=assigned_colors,
        )
        colors = [
            _as_color(c)
            for c in (assigned_colors if assigned_colors is not None else self._colors(None, count))
        ]
        order = list(range(count))
        if corners is not None:
            areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
            order = np.argsort(-areas, kind="stable").tolist()
        if all_masks is not None:
            self._overlay_masks([all_masks[i] for i in order], [colors[i] for i in order], alpha)
        if corners is not None:
            for i in order:
                self._canvas.draw_box(corners[i].tolist(), colors[i])
        if points is not None:
            for i in order:
                self._overlay_keypoints(points[i], colors[i])
        if corners is not None and labels is not None:
            draw_labels(self._canvas, [(labels[i], corners[i].tolist(), colors[i]) for i in order])
        return self.get_output()

    def get_output(self) -> VisImage:
        """Return the picture with everything drawn so far."""
        return VisImage(self._canvas.to_array())

    # -- names and colours
    # -------------------------------------------------------------------------------------------

    def _labels(
        self, classes: Sequence[int] | None, scores: Sequence[float] | None
    ) -> list[str] | None:
        names = None if classes is None else [self._things.name(c) for c in classes]
        if scores is None:
            return names
        percents = [f"{score:.0%}" for score in scores]
        return (
            percents
            if names is None
            else [f"{n} {p}" for n, p in zip(names, percents, strict=True)]
        )

    def _colors(self, classes: Sequence[int] | None, count: int) -> list[Color]:
        if classes is None or self._mode is not ColorMode.SEGMENTATION:
            palette = colormap(rgb=True)
            return [_as_color(palette[i % len(palette)]) for i in range(count)]
        return [self._things.color(c) for c in classes]

    # -- parts
    # -------------------------------------------------------------------------------------------------------

    def _overlay_masks(self, masks: Sequence[Any], colors: Sequence[Color], alpha: float) -> None:
        if self._mode is ColorMode.IMAGE_BW:
            binary = [binary_mask(m, *self._image_size) for m in masks if m is not None]
            self._canvas.grey_out(np.any([np.zeros(self._image_size, bool), *binary], axis=0))
        for mask, color in zip(masks, colors, strict=True):
            if mask is None:
                continue
            if not is_polygons(mask):
                self._canvas.draw_mask(
                    binary_mask(mask, *self._image_size), color, alpha=alpha, edge_color=color
                )
                continue
            for polygon in mask:
                points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2) * self._stretch
                self._canvas.draw_polygon(points, color, alpha=alpha)

    def _overlay_keypoints(self, keypoints: npt.NDArray[np.float64], color: Color) -> None:
        placed = keypoints * [*self._stretch, 1]
        names = self._keypoint_names if len(placed) else []
        draw_keypoints(
            self._canvas, placed, color, names=names, connection_rules=self._connection_rules
        )

    def _draw_segments(
        self,
        segment_map: npt.NDArray[np.int64],
        segments: Sequence[Segment],
        min_area: float | None,
        alpha: float,
    ) -> VisImage:
        if segment_map.shape != self._image_size:
            raise ValueError(
                f"a map has the size of its picture, {self._image_size}: got {segment_map.shape}"
            )
        if self._mode is ColorMode.IMAGE_BW:
            self._canvas.grey_out(np.isin(segment_map, [segment.id for segment in segments]))
        if min_area is None:
            min_area = _NAMED_AREA * segment_map.size
        draw_segments(self._canvas, segment_map, segments, alpha=alpha, min_area=min_area)
        return self.get_output()


class _Classes:
    """Names and colours of things, or of stuff, as far as the metadata has them."""

    def __init__(self, metadata: Any, kind: str) -> None:
        self.names: Sequence[str] = getattr(metadata, f"{kind}_classes", None) or ()
        self._colors: Sequence[Sequence[int]] = getattr(metadata, f"{kind}_colors", None) or ()

    def name(self, index: int) -> str:
        return self.names[index] if 0 <= index < len(self.names) else str(index)

    def color(self, index: int) -> Color:
        palette = colormap(rgb=True)
        return _as_color(
            self._colors[index] if 0 <= index < len(self._colors) else palette[index % len(palette)]
        )


def _as_color(color: Sequence[float] | npt.NDArray[Any]) -> Color:
    red, green, blue = (round(float(v)) for v in color)
    return red, green, blue
