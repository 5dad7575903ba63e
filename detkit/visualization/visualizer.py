"""Pictures of what a data set says and of what a model says, alone or side by side.

Shapes: M objects in one image, (H, W) the image.
"""

import enum
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from detkit.structures import BoxMode, Instances
from detkit.structures.records import ImageRecord
from detkit.utils.colormap import colormap
from detkit.visualization.canvas import Canvas, Color, VisImage

# The longer side that `readable_scale` aims at: labels of several neighbours fit there, and on a screen.
_READABLE_SIDE = 640
_TITLE_COLOR = (32, 32, 32)


class ColorMode(enum.Enum):
    """What the colours of instances tell."""

    IMAGE = 0
    """Each instance has its own colour, so that neighbours of one class stand apart."""
    SEGMENTATION = 1
    """Each class has its own colour: the metadata's `thing_colors` where there are any."""
    IMAGE_BW = 2
    """As IMAGE, on a grey picture in which only masked pixels keep their colour."""


class Visualizer:
    """Draws instances into a picture.

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
            metadata: Read for `thing_classes` and `thing_colors`; without them the numbers of classes are shown.
            scale: Size of the output in sizes of the input. Labels of small pictures need more than 1 to be readable.
            instance_mode: What colours tell.

        Raises:
            ValueError: The picture has another shape or type, or `scale` is not positive.
        """
        self._canvas = Canvas(np.asarray(img_rgb), scale)
        # Not `scale`: the output has whole pixels, so its two sides may be scaled a little differently.
        height, width = img_rgb.shape[:2]
        self._stretch = np.array([self._canvas.width / width, self._canvas.height / height])
        self._image_size = (height, width)
        self._class_names: Sequence[str] = getattr(metadata, "thing_classes", None) or ()
        self._class_colors: Sequence[Sequence[int]] = getattr(metadata, "thing_colors", None) or ()
        self._mode = instance_mode

    def draw_instance_predictions(self, predictions: Instances) -> VisImage:
        """Draw what a model found.

        Args:
            predictions: `pred_boxes`, `scores`, `pred_classes`, `pred_masks`: those that are there, on any device, in
                pixels of the picture.
        """
        fields = predictions.get_fields()
        classes = _to_list(fields.get("pred_classes"))
        labels = self._labels(classes, _to_list(fields.get("scores")))
        return self.overlay_instances(
            boxes=fields.get("pred_boxes"),
            labels=labels,
            masks=fields.get("pred_masks"),
            assigned_colors=self._colors(classes, len(predictions) if fields else 0),
        )

    def draw_dataset_dict(self, dic: ImageRecord) -> VisImage:
        """Draw the annotations of a data set's record."""
        annotations = dic.get("annotations") or []
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        classes = [a["category_id"] for a in annotations]
        labels = self._labels(classes, None)
        marks = [" (crowd)" if a.get("iscrowd") else " (difficult)" if a.get("difficult") else "" for a in annotations]
        return self.overlay_instances(
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            labels=[label + mark for label, mark in zip(labels or [], marks, strict=True)],
            masks=[a.get("segmentation") for a in annotations],
            assigned_colors=self._colors(classes, len(annotations)),
        )

    def overlay_instances(
        self,
        *,
        boxes: Any = None,
        labels: Sequence[str] | None = None,
        masks: Any = None,
        assigned_colors: Sequence[Sequence[float]] | None = None,
        alpha: float = 0.4,
    ) -> VisImage:
        """Draw instances: masks, boxes over them, labels on top, the largest instances first.

        Args:
            boxes: `Boxes`, or (M, 4) XYXY numbers, in pixels of the input picture.
            labels: One text per instance.
            masks: One per instance: a list of polygons `[x0, y0, ...]`, COCO's run-length encoding, an (H, W) array of
                bool, or None for an instance without; or `PolygonMasks`, or `BitMasks`, or (M, H, W).
            assigned_colors: RGB per instance, 0 to 255.
            alpha: Opacity of masks.

        Raises:
            ValueError: The arguments describe different numbers of instances.
        """
        corners = None if boxes is None else _to_array(boxes).reshape(-1, 4) * np.tile(self._stretch, 2)
        mask_list = None if masks is None else _mask_list(masks)
        count = _common_length(boxes=corners, labels=labels, masks=mask_list, assigned_colors=assigned_colors)
        colors = [_as_color(c) for c in (assigned_colors if assigned_colors is not None else self._colors(None, count))]
        if mask_list is not None:
            self._overlay_masks(mask_list, colors, alpha)
        if corners is None:
            return self.get_output()
        areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
        order = np.argsort(-areas, kind="stable").tolist()
        for i in order:
            self._canvas.draw_box(corners[i].tolist(), colors[i])
        if labels is not None:
            texts = list(labels)
            self._draw_labels([(texts[i], corners[i].tolist(), colors[i]) for i in order])
        return self.get_output()

    def get_output(self) -> VisImage:
        """Give the picture with everything drawn so far."""
        return VisImage(self._canvas.to_array())

    # -- names and colours -------------------------------------------------------------------------------------------

    def _labels(self, classes: Sequence[int] | None, scores: Sequence[float] | None) -> list[str] | None:
        names = None if classes is None else [self._class_name(c) for c in classes]
        if scores is None:
            return names
        percents = [f"{score:.0%}" for score in scores]
        return percents if names is None else [f"{n} {p}" for n, p in zip(names, percents, strict=True)]

    def _class_name(self, class_index: int) -> str:
        return self._class_names[class_index] if 0 <= class_index < len(self._class_names) else str(class_index)

    def _colors(self, classes: Sequence[int] | None, count: int) -> list[Color]:
        palette = colormap(rgb=True)
        if classes is None or self._mode is not ColorMode.SEGMENTATION:
            return [_as_color(palette[i % len(palette)]) for i in range(count)]
        own = self._class_colors
        return [_as_color(own[c] if 0 <= c < len(own) else palette[c % len(palette)]) for c in classes]

    # -- parts of an instance ----------------------------------------------------------------------------------------

    def _overlay_masks(self, masks: Sequence[Any], colors: Sequence[Color], alpha: float) -> None:
        if self._mode is ColorMode.IMAGE_BW:
            binary = [_binary_mask(m, *self._image_size) for m in masks if m is not None]
            self._canvas.grey_out(np.any([np.zeros(self._image_size, bool), *binary], axis=0))
        for mask, color in zip(masks, colors, strict=True):
            if mask is None:
                continue
            if not _is_polygons(mask):
                self._canvas.draw_mask(_binary_mask(mask, *self._image_size), color, alpha=alpha)
                continue
            for polygon in mask:
                points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2) * self._stretch
                self._canvas.draw_polygon(points, color, alpha=alpha)

    def _draw_labels(self, labels: Iterable[tuple[str, Sequence[float], Color]]) -> None:
        """Write (text, box, color) at the boxes, where they hide no other label if there is such a place."""
        taken: list[tuple[float, float, float, float]] = []
        for text, (x1, y1, x2, y2), color in labels:
            width, height = self._canvas.text_size(text)
            # Above the box, inside it, below it; left-aligned with it, then right-aligned.
            places = [(x, y) for x in (x1, x2 - width) for y in (y1 - height, y1, y2, y2 - height)]
            inside = [
                (min(max(x, 0), max(self._canvas.width - width, 0)), y)
                for x, y in places
                if 0 <= y <= self._canvas.height - height
            ]
            free = [p for p in inside if not any(_overlap((*p, p[0] + width, p[1] + height), other) for other in taken)]
            x, y = (free or inside or places)[0]
            taken.append((x, y, x + width, y + height))
            self._canvas.draw_text(text, (x, y), background=color)


def readable_scale(image_size: tuple[int, int]) -> float:
    """Give the scale at which labels of a picture of `(height, width)` are readable: 1, or more for a small one."""
    return max(1.0, _READABLE_SIDE / max(image_size))


def side_by_side(
    truth: VisImage, prediction: VisImage, titles: tuple[str, str] = ("ground truth", "prediction")
) -> VisImage:
    """Put two pictures beside each other, each under its title.

    Raises:
        ValueError: They differ in height.
    """
    if truth.height != prediction.height:
        raise ValueError(f"pictures side by side need one height, got {truth.height} and {prediction.height}")
    columns = [_with_title(picture, title) for picture, title in zip((truth, prediction), titles, strict=True)]
    gap = np.full((columns[0].shape[0], max(4, truth.width // 100), 3), 255, np.uint8)
    return VisImage(np.concatenate([columns[0], gap, columns[1]], axis=1))


def _with_title(picture: VisImage, title: str) -> npt.NDArray[np.uint8]:
    font_size = Canvas(picture.get_image()).font_size
    bar_height = math.ceil(font_size * 1.8)
    bar = Canvas(np.full((bar_height, picture.width, 3), 255, np.uint8))
    width, height = bar.text_size(title, font_size)
    corner = ((picture.width - width) / 2, (bar_height - height) / 2)
    bar.draw_text(title, corner, color=_TITLE_COLOR, font_size=font_size)
    return np.concatenate([bar.to_array(), picture.get_image()], axis=0)


# ------------------------------------------------------------------------------------------------------- conversions


def _to_array(values: Any) -> npt.NDArray[np.float64]:
    """Numbers of a tensor on any device, of `Boxes`, or of nested lists."""
    values = getattr(values, "tensor", values)
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


def _to_list(values: Any) -> list[Any] | None:
    return None if values is None else values.tolist()


def _as_color(color: Sequence[float] | npt.NDArray[Any]) -> Color:
    red, green, blue = (round(float(v)) for v in color)
    return red, green, blue


def _mask_list(masks: Any) -> list[Any]:
    masks = getattr(masks, "polygons", getattr(masks, "tensor", masks))
    return list(masks.detach().cpu().numpy()) if hasattr(masks, "detach") else list(masks)


def _is_polygons(mask: Any) -> bool:
    return isinstance(mask, list | tuple)


def _binary_mask(mask: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Any form of a mask as (H, W) bool."""
    if isinstance(mask, dict):
        rle: Any = mask
        if not isinstance(mask["counts"], str | bytes):
            rle = coco_mask.frPyObjects(rle, height, width)
        return coco_mask.decode(rle).astype(bool)
    if _is_polygons(mask):
        polygons = [np.asarray(p, dtype=np.float64).reshape(-1).tolist() for p in mask]
        if not polygons:
            return np.zeros((height, width), bool)
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))).astype(bool)
    return np.asarray(mask).astype(bool)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _common_length(**columns: Any) -> int:
    """The length all given columns share."""
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"need the same number of instances everywhere: got {given}")
    return next(iter(lengths.values()), 0)
