"""Pictures of a data set's annotations and of a model's predictions.

Legend: M objects in one image, K keypoints of each, (H, W) the image.
"""

import colorsys
import enum
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from detkit.utils.colormap import AnyColor, as_shares, colormap, random_color, rgb2id, to_color
from detkit.utils.errors import DataError
from detkit.utils.image import read_image, read_label_map
from detkit.utils.image_file import MAX_IMAGE_PIXELS
from detkit.utils.overriding import is_overridden, overridable
from detkit.visualization.canvas import Canvas, Color, mask_bounds
from detkit.visualization.classes import Classes, as_color, text_labels
from detkit.visualization.generic_mask import GenericMask, segments_by_divisor
from detkit.visualization.overlay import (
    Segment,
    draw_keypoints,
    draw_labels,
    draw_segments,
    midst,
)
from detkit.visualization.plain_values import (
    annotated_boxes,
    binary_mask,
    common_length,
    is_polygons,
    keypoint_list,
    mask_list,
    to_array,
    to_bitmap,
    to_integers,
)
from detkit.visualization.vis_image import VisImage

# Imported where they are needed: what an exported model finds is arrays, drawn without torch.
if TYPE_CHECKING:
    import torch

    from detkit.structures import ImageRecord, Instances, ModelOutput

# Smallest share of the picture that gets a name: that of a smaller segment would hide more than it
# tells.
_NAMED_AREA = 0.002
_PIXELS_PER_POINT = 1.4


class ColorMode(enum.Enum):
    """What the colours of instances stand for."""

    IMAGE = 0
    """Each instance has its own colour, so that neighbours of one class differ."""
    SEGMENTATION = 1
    """Each class has its own colour: the metadata's `thing_colors` where there are any."""
    IMAGE_BW = 2
    """As IMAGE, over a picture that is grey except for masked pixels."""


COLOR_MODES = {"class": ColorMode.SEGMENTATION, "instance": ColorMode.IMAGE}
"""Values of VIS_COLORS."""


class Visualizer:
    """Draws instances, classes of pixels and segments into a picture.

    Example:
        >>> visualizer = Visualizer(np.zeros((120, 160, 3), np.uint8), scale=2.0)
        >>> picture = visualizer.overlay_instances(boxes=[[20, 30, 90, 100]], labels=["cat"])
        >>> picture.width, picture.height
        (320, 240)
    """

    def __init__(
        self,
        img_rgb: npt.NDArray[np.uint8],
        metadata: Any = None,
        scale: float = 1.0,
        instance_mode: ColorMode = ColorMode.IMAGE,
        show_labels: bool = True,
        *,
        font_size_scale: float = 1.0,
    ) -> None:
        """Start from a picture; it is copied, not changed.

        Args:
            img_rgb: (H, W, 3) uint8, red first; numbers with a fraction are cut to 0 to 255.
            metadata: Read for `thing_classes`, `thing_colors`, `stuff_classes`, `stuff_colors`,
                `ignore_label`, `keypoint_names` and `keypoint_connection_rules`. Without names, the
                numbers of classes are shown.
            scale: Size of the output relative to the input. Labels of small pictures need more than
                1 to be readable.
            instance_mode: What colours stand for.
            show_labels: Whether names and scores are written.
            font_size_scale: Size of names and scores relative to the usual one.

        Raises:
            ValueError: The picture has another shape or type, or `scale` is not positive.
        """
        img_rgb = np.asarray(img_rgb)
        if img_rgb.dtype.kind == "f":
            img_rgb = img_rgb.clip(0, 255).astype(np.uint8)
        # Detectron2's names, for subclasses.
        self.img, self.metadata = img_rgb, metadata
        self._canvas = Canvas(img_rgb, scale)
        self.output = VisImage(self._canvas)
        # Not `scale`: the output has whole pixels, so its two sides may be scaled a little
        # differently.
        height, width = img_rgb.shape[:2]
        self._stretch = np.array([self._canvas.width / width, self._canvas.height / height])
        self._image_size = (height, width)
        self._things = Classes(metadata, "thing")
        self._stuff = Classes(metadata, "stuff")
        ignore_label = getattr(metadata, "ignore_label", None)
        self._ignore_label = 255 if ignore_label is None else ignore_label
        self._keypoint_names = list(getattr(metadata, "keypoint_names", None) or [])
        self._connection_rules = list(getattr(metadata, "keypoint_connection_rules", None) or [])
        self._instance_mode = instance_mode
        self._show_labels = show_labels
        self._default_font_size *= font_size_scale

    # -- predictions and annotations

    def draw_output(
        self, output: "ModelOutput", score_threshold: float = 0.0, num_proposals: int = 20
    ) -> VisImage:
        """Draw everything in a model's output for the image.

        Args:
            output: In pixels of the picture, on any device. A panoptic result is drawn alone: it
                contains the others.
            score_threshold: Instances below this score are left out.
            num_proposals: How many of the best proposals of a model without instances are drawn.
        """
        if "panoptic_seg" in output:
            return self.draw_panoptic_seg(*output["panoptic_seg"])
        if "sem_seg" in output:
            self.draw_sem_seg(output["sem_seg"].argmax(0))
        if "instances" in output:
            instances = output["instances"]
            self.draw_instance_predictions(instances[instances.scores >= score_threshold])
        elif "proposals" in output:
            self.overlay_instances(boxes=output["proposals"][:num_proposals].proposal_boxes)
        return self.get_output()

    def draw_instance_predictions(self, predictions: "Instances") -> VisImage:
        """Draw the instances that a model predicts.

        Args:
            predictions: `pred_boxes`, `scores`, `pred_classes`, `pred_masks`, `pred_keypoints`, as
                far as present, on any device, in pixels of the picture.
        """
        fields = predictions.get_fields()
        classes = fields["pred_classes"].tolist() if "pred_classes" in fields else None
        if self._instance_mode is ColorMode.IMAGE_BW and "pred_masks" not in fields:
            self._grey_out(np.zeros(self._image_size, dtype=bool))
        return self.overlay_instances(
            boxes=fields.get("pred_boxes"),
            labels=text_labels(classes, fields.get("scores"), self._things.names),
            masks=fields.get("pred_masks"),
            keypoints=fields.get("pred_keypoints"),
            assigned_colors=self.instance_colors(classes, len(predictions) if fields else 0),
        )

    def draw_dataset_dict(
        self, dic: "ImageRecord", max_image_pixels: int = MAX_IMAGE_PIXELS
    ) -> VisImage:
        """Draw the annotations of a data set's record.

        Its label map and its panoptic png are read from their files. A panoptic png with
        `segments_info` is drawn alone: it contains the others.

        Args:
            dic: The record.
            max_image_pixels: As `max_pixels` in `read_image`, of these files.
        """
        from detkit.structures import as_flag

        if "pan_seg_file_name" in dic and "segments_info" in dic:
            segments = read_image(dic["pan_seg_file_name"], "RGB", max_pixels=max_image_pixels)
            return self.draw_panoptic_seg(rgb2id(segments), dic["segments_info"])
        annotations = dic.get("annotations") or []
        if "sem_seg_file_name" in dic:
            labels = read_label_map(dic["sem_seg_file_name"], max_pixels=max_image_pixels)
            labels = labels.astype(np.int64)
            if annotations and self._stuff.name(0) == "things":
                labels[labels == 0] = self._ignore_label  # the instances say more
            self.draw_sem_seg(labels)
        names = []
        for annotation in annotations:
            name = self._things.name(annotation["category_id"])
            if as_flag(annotation.get("iscrowd")):
                name += " (crowd)"
            elif as_flag(annotation.get("difficult")):
                name += " (difficult)"
            names.append(name)
        keypoints = [annotation.get("keypoints") for annotation in annotations]
        return self.overlay_instances(
            boxes=annotated_boxes(annotations),
            labels=names,
            masks=[annotation.get("segmentation") for annotation in annotations],
            keypoints=keypoints if any(keypoints) else None,
            assigned_colors=self.instance_colors(
                [annotation["category_id"] for annotation in annotations], len(annotations)
            ),
        )

    def draw_sem_seg(
        self, sem_seg: Any, area_threshold: float | None = None, alpha: float = 0.55
    ) -> VisImage:
        """Draw the class of every pixel.

        Args:
            sem_seg: (H, W) tensor or array of class numbers. Pixels of a class without a name are
                not drawn, nor are those of the metadata's `ignore_label` (255 where it has none).
            area_threshold: Classes of fewer pixels get no name; by default 0.2 % of the picture.
            alpha: Opacity.
        """
        labels = to_integers(sem_seg)
        num_names = len(self._stuff.names)
        segments = []
        for label in np.unique(labels).tolist():
            has_name = num_names == 0 or label < num_names
            if label >= 0 and label != self._ignore_label and has_name:
                segments.append(Segment(label, self._stuff.color(label), self._stuff.name(label)))
        return self._draw_segments(labels, segments, area_threshold, alpha)

    def draw_panoptic_seg(
        self,
        panoptic_seg: Any,
        segments_info: Sequence[Mapping[str, Any]] | None,
        area_threshold: float | None = None,
        alpha: float = 0.55,
    ) -> VisImage:
        """Draw the segment of every pixel.

        Args:
            panoptic_seg: (H, W) tensor or array of segment ids.
            segments_info: `id`, `category_id` and `isthing` of each segment, optionally `score` and
                `iscrowd`; None as for `PanopticPrediction`.
            area_threshold: Segments of fewer pixels get no name; by default 0.2 % of the picture.
            alpha: Opacity.
        """
        if segments_info is None:
            segments_info = segments_by_divisor(panoptic_seg, self.metadata)
        things = [info for info in segments_info if info.get("isthing", True)]
        thing_colors = iter(
            self.instance_colors([info["category_id"] for info in things], len(things))
        )
        segments = []
        for info in segments_info:
            is_thing, category = info.get("isthing", True), info["category_id"]
            color = next(thing_colors) if is_thing else self._stuff.color(category)
            text = (self._things if is_thing else self._stuff).name(category)
            if "score" in info:
                text += f" {info['score']:.0%}"
            if _is_crowd(info):
                text += " (crowd)"
            segments.append(Segment(info["id"], color, text))
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
        assigned_colors: Sequence[AnyColor] | None = None,
        alpha: float = 0.4,
    ) -> VisImage:
        """Draw instances, the largest first: masks, boxes, keypoints, and labels on top.

        Args:
            boxes: `Boxes`, or (M, 4) XYXY, in pixels of the input picture; or `RotatedBoxes`, or
                (M, 5) XYWHA.
            labels: One text per instance.
            masks: One per instance: a list of polygons `[x0, y0, ...]`, COCO's run-length encoding,
                an (H, W) array of bool, or None for an instance without; or `PolygonMasks`, or
                `BitMasks`, or (M, H, W).
            keypoints: `Keypoints`, or (M, K, 3) x, y and score or visibility; or a list of 3 K
                numbers, or None, per instance.
            assigned_colors: A colour per instance, RGB in 0 to 255 or 0 to 1, or a name: see
                `to_color`.
            alpha: Opacity of masks.

        Raises:
            ValueError: The arguments describe different numbers of instances.
        """
        if boxes is not None and is_overridden(self._convert_boxes):
            boxes = self._convert_boxes(boxes)
        if masks is not None and is_overridden(self._convert_masks):
            masks = self._convert_masks(masks)
        if keypoints is not None and is_overridden(self._convert_keypoints):
            keypoints = self._convert_keypoints(keypoints)
        rows = None if boxes is None else to_array(boxes)
        is_rotated = rows is not None and rows.shape[-1] == 5
        rows = None if rows is None else rows.reshape(-1, 5 if is_rotated else 4)
        all_masks = None if masks is None else mask_list(masks)
        points = None if keypoints is None else keypoint_list(keypoints)
        count = common_length(
            boxes=rows,
            labels=labels,
            masks=all_masks,
            keypoints=points,
            assigned_colors=assigned_colors,
        )
        colors = self._colors_of(assigned_colors, count)
        if is_rotated and is_overridden(self.overlay_rotated_instances):
            shares = [as_shares(color) for color in colors]
            return self.overlay_rotated_instances(rows, labels, shares)
        return self._draw_instances(rows, labels, all_masks, points, colors, alpha)

    def _colors_of(self, assigned: Sequence[AnyColor] | None, count: int) -> list[Color]:
        if assigned is None:
            return self.instance_colors(None, count)
        return [to_color(color) for color in assigned]

    def _draw_instances(
        self,
        boxes: npt.NDArray[np.float64] | None,
        labels: Sequence[str] | None,
        all_masks: Sequence[Any] | None,
        points: Sequence[Any] | None,
        colors: Sequence[Color],
        alpha: float,
    ) -> VisImage:
        """Draw M instances with boxes (M, 4) XYXY or (M, 5) XYWHA; see `overlay_instances`."""
        corners = turned = None
        if boxes is not None:
            corners = boxes
            if boxes.shape[1] == 5:
                turned, outlines = boxes, _corners(boxes)
                corners = np.concatenate([outlines.min(axis=1), outlines.max(axis=1)], axis=1)
            corners = corners * np.tile(self._stretch, 2)
        order = list(range(len(colors)))
        if corners is not None:
            areas = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
            order = np.argsort(-areas, kind="stable").tolist()
        if all_masks is not None:
            self._overlay_masks([all_masks[i] for i in order], [colors[i] for i in order], alpha)
        if turned is not None:
            is_own = is_overridden(self.draw_rotated_box_with_label)  # it writes the label, too
            texts = labels if is_own and self._show_labels else None
            labels = None if is_own else labels
            for i in order:
                self.draw_rotated_box_with_label(
                    turned[i].tolist(),
                    alpha=1.0,
                    edge_color=as_shares(colors[i]),
                    label=None if texts is None else texts[i],
                )
        elif corners is not None:
            for i in order:
                box = (corners[i] / np.tile(self._stretch, 2)).tolist()
                self.draw_box(box, alpha=1.0, edge_color=as_shares(colors[i]))
        if points is not None:
            for i in order:
                if is_overridden(self.draw_and_connect_keypoints):
                    self.draw_and_connect_keypoints(points[i])
                else:
                    self._draw_keypoints(points[i], colors[i])
        if corners is None and all_masks is not None and labels is not None:
            corners = self._boxes_of_masks(all_masks)
            order = np.flatnonzero(np.isfinite(corners).all(axis=1)).tolist()
        if corners is not None and labels is not None and self._show_labels:
            found = [(labels[i], corners[i], colors[i]) for i in order]
            self._write_labels(found)
        return self.get_output()

    def _write_labels(self, labels: Sequence[tuple[str, npt.NDArray[np.float64], Color]]) -> None:
        """Write texts at the corners of boxes, (4,) XYXY in pixels of the output."""
        if is_overridden(self._change_color_brightness):
            labels = [
                (text, box, to_color(self._change_color_brightness(as_shares(color), 0.7)))
                for text, box, color in labels
            ]
        if is_overridden(self.draw_text):
            for text, box, color in labels:
                corner = (box[:2] / self._stretch).tolist()
                self.draw_text(text, corner, color=as_shares(color), horizontal_alignment="left")
        else:
            draw_labels(self._canvas, [(text, box.tolist(), color) for text, box, color in labels])

    @overridable
    def overlay_rotated_instances(
        self,
        boxes: Any = None,
        labels: Sequence[str] | None = None,
        assigned_colors: Sequence[Sequence[float]] | None = None,
    ) -> VisImage:
        """Draw rotated boxes, as `overlay_instances` does: `RotatedBoxes`, or (M, 5) XYWHA.

        That one calls a subclass's own, without masks and keypoints, as Detectron2 does.
        """
        rows = to_array([] if boxes is None else boxes).reshape(-1, 5)
        count = common_length(boxes=rows, labels=labels, assigned_colors=assigned_colors)
        colors = self._colors_of(assigned_colors, count)
        return self._draw_instances(rows, labels, None, None, colors, alpha=0.4)

    def get_output(self) -> VisImage:
        """Return the picture with everything drawn so far."""
        return VisImage(self._canvas.to_array())

    # -- parts, for subclasses that draw more and for scripts; coordinates are those of the input

    @overridable
    def draw_text(
        self,
        text: str,
        position: Sequence[float],
        *,
        font_size: float | None = None,
        color: AnyColor = "g",
        horizontal_alignment: str = "center",
        rotation: float = 0,
    ) -> VisImage:
        """Write a line of text on a dark ground, below a point.

        Args:
            text: What to write.
            position: x and y of the point.
            font_size: In points of the output; None for a size that fits the picture.
            color: Of the letters; see `to_color`. A dark one is brightened.
            horizontal_alignment: Whether the point is at the "left", "center" or "right".
            rotation: Detectron2's; text is always level.

        Raises:
            ValueError: The alignment is none of these.
        """
        shares = {"left": 0.0, "center": 0.5, "right": 1.0}
        if horizontal_alignment not in shares:
            raise ValueError(
                f"horizontal_alignment must be left, center or right, got {horizontal_alignment!r}"
            )
        size = None if font_size is None else max(1, round(font_size * _PIXELS_PER_POINT))
        x, y = np.asarray(position, dtype=np.float64) * self._stretch
        width, _ = self._canvas.text_size(text, size)
        x -= shares[horizontal_alignment] * width
        letters = np.maximum(to_color(color), 51)
        brightest = tuple(int(level) for level in np.where(letters == letters.max(), 255, letters))
        self._canvas.draw_text(
            text,
            (x, y),
            color=(brightest[0], brightest[1], brightest[2]),
            background=(0, 0, 0),
            font_size=size,
        )
        return self.output

    def draw_box(
        self,
        box_coord: Sequence[float],
        alpha: float = 0.5,
        edge_color: AnyColor = "g",
        line_style: str = "-",
    ) -> VisImage:
        """Draw the border of an XYXY box; `line_style` is Detectron2's and changes nothing."""
        box = np.asarray(box_coord, dtype=np.float64) * np.tile(self._stretch, 2)
        self._canvas.draw_box(box.tolist(), to_color(edge_color), alpha=alpha)
        return self.output

    @overridable
    def draw_rotated_box_with_label(
        self,
        rotated_box: Sequence[float],
        alpha: float = 0.5,
        edge_color: AnyColor = "g",
        line_style: str = "-",
        label: str | None = None,
    ) -> VisImage:
        """Draw the border of an XYWHA box, and a label at its first corner.

        `line_style` changes nothing.
        """
        outline = _corners(np.array([list(rotated_box)], dtype=np.float64))[0]
        border = outline[[0, 1, 2, 3, 0]] * self._stretch
        self._strokes.draw_line(border, to_color(edge_color), alpha=alpha)
        if label is not None:
            self.draw_text(
                label, outline[0].tolist(), color=edge_color, horizontal_alignment="left"
            )
        return self.output

    @overridable
    def draw_circle(
        self, circle_coord: Sequence[float], color: AnyColor, radius: float = 3
    ) -> VisImage:
        """Fill a circle around a point; the radius is in pixels of the output."""
        center = (np.asarray(circle_coord, dtype=np.float64) * self._stretch).tolist()
        self._canvas.draw_circle(center, to_color(color), radius=radius)
        return self.output

    @overridable
    def draw_line(
        self,
        x_data: Sequence[float],
        y_data: Sequence[float],
        color: AnyColor,
        linestyle: str = "-",
        linewidth: float | None = None,
    ) -> VisImage:
        """Draw straight lines from point to point; `linestyle` changes nothing."""
        points = np.stack([np.asarray(x_data), np.asarray(y_data)], axis=1) * self._stretch
        self._canvas.draw_line(points, to_color(color), line_width=linewidth)
        return self.output

    @overridable
    def draw_binary_mask(
        self,
        binary_mask: Any,
        color: AnyColor | None = None,
        *,
        edge_color: AnyColor | None = None,
        text: str | None = None,
        alpha: float = 0.5,
        area_threshold: float = 10,
    ) -> VisImage:
        """Tint the pixels of a mask.

        Args:
            binary_mask: (H, W), not 0 where the object is.
            color: None for a random one.
            edge_color: Of the outline; None for that of the mask.
            text: Written in the middle.
            alpha: Opacity.
            area_threshold: Masks of fewer pixels get no text.
        """
        mask = to_bitmap(binary_mask)
        fill = to_color(random_color(rgb=True, maximum=1) if color is None else color)
        edge = fill if edge_color is None else to_color(edge_color)
        self._canvas.draw_mask(mask, fill, alpha=alpha, edge_color=edge)
        if text is not None and mask.sum() > max(area_threshold, 0):
            self._draw_text_in_mask(mask, text, as_shares(fill))
        return self.output

    def draw_soft_mask(
        self,
        soft_mask: Any,
        color: AnyColor | None = None,
        *,
        text: str | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Tint pixels by how much they belong to a mask, (H, W) in [0, 1].

        See `draw_binary_mask`.
        """
        shares = to_array(soft_mask)
        fill = to_color(random_color(rgb=True, maximum=1) if color is None else color)
        colors = np.broadcast_to(np.array(fill, dtype=np.uint8), (*shares.shape, 3))
        self._canvas.tint(np.ascontiguousarray(colors), shares, alpha=alpha)
        if text is not None:
            self._draw_text_in_mask(shares > 0.5, text, as_shares(fill))
        return self.output

    @overridable
    def draw_polygon(
        self,
        segment: Any,
        color: AnyColor,
        edge_color: AnyColor | None = None,
        alpha: float = 0.5,
    ) -> VisImage:
        """Fill a polygon, (P, 2) points, and draw its border, opaque."""
        points = np.asarray(segment, dtype=np.float64).reshape(-1, 2) * self._stretch
        edge = None if edge_color is None else to_color(edge_color)
        self._canvas.draw_polygon(points, to_color(color), edge_color=edge, alpha=alpha)
        return self.output

    @overridable
    def draw_and_connect_keypoints(self, keypoints: Any) -> VisImage:
        """Draw the keypoints of one object, (K, 3), in red, and the lines between them."""
        self._draw_keypoints(to_array(keypoints), (255, 0, 0))
        return self.output

    # -- parts of Detectron2's, which users' own drawing methods call

    @property
    def cpu_device(self) -> "torch.device":
        """The device on which results are drawn."""
        import torch

        return torch.device("cpu")

    @property
    def _default_font_size(self) -> float:
        return self._canvas.font_size / _PIXELS_PER_POINT

    @_default_font_size.setter
    def _default_font_size(self, points: float) -> None:
        self._canvas.font_size = max(1, round(points * _PIXELS_PER_POINT))

    @overridable
    def _jitter(self, color: AnyColor) -> tuple[float, float, float]:
        """Return a colour near another, as shares of red, green and blue."""
        shift = np.random.default_rng().uniform(-1, 1, 3)
        shares = np.array(to_color(color)) / 255 + shift / np.linalg.norm(shift) * 0.5
        return as_shares(to_color(shares.clip(0, 1)))

    @overridable
    def _change_color_brightness(
        self, color: AnyColor, brightness_factor: float
    ) -> tuple[float, float, float]:
        """Return a colour lighter (up to 1) or darker (down to -1), as shares."""
        shares = np.array(to_color(color)) / 255
        hue, light, saturation = colorsys.rgb_to_hls(*shares)
        return colorsys.hls_to_rgb(hue, min(1.0, light * (1 + brightness_factor)), saturation)

    @overridable
    def _create_grayscale_image(self, mask: Any = None) -> npt.NDArray[np.uint8]:
        """Return the picture in grey, but for the pixels of a mask."""
        grey = np.repeat(self.img.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
        return grey if mask is None else np.where(to_bitmap(mask)[..., None], self.img, grey)

    @overridable
    def _convert_boxes(self, boxes: Any) -> npt.NDArray[np.float64]:
        return to_array(boxes)

    @overridable
    def _convert_masks(self, masks_or_polygons: Any) -> list[GenericMask | None]:
        masks = mask_list(masks_or_polygons)
        is_generic = [isinstance(mask, GenericMask) for mask in masks]
        return [
            mask if is_one or mask is None else GenericMask(mask, *self._image_size)
            for mask, is_one in zip(masks, is_generic, strict=True)
        ]

    @overridable
    def _convert_keypoints(self, keypoints: Any) -> Any:
        return keypoint_list(keypoints) if isinstance(keypoints, list) else to_array(keypoints)

    @overridable
    def _draw_text_in_mask(self, binary_mask: Any, text: str, color: AnyColor) -> None:
        mask = to_bitmap(binary_mask)
        if mask.any():
            self.draw_text(text, midst(mask).tolist(), color=color)

    @property
    def _strokes(self) -> Canvas:
        is_own = is_overridden(self.draw_circle) or is_overridden(self.draw_line)
        return _OwnStrokes(self, self._canvas, self._stretch) if is_own else self._canvas

    def _draw_keypoints(self, keypoints: npt.NDArray[np.float64], color: Color) -> None:
        draw_keypoints(
            self._strokes,
            keypoints * [*self._stretch, 1],
            color,
            names=self._keypoint_names if len(keypoints) else [],
            connection_rules=self._connection_rules,
        )

    def instance_colors(self, classes: Sequence[int] | None, count: int) -> list[Color]:
        """Return the colours of instances in the mode of this picture, by class or by number."""
        if classes is None or self._instance_mode is not ColorMode.SEGMENTATION:
            palette = colormap(rgb=True)
            return [as_color(palette[i % len(palette)]) for i in range(count)]
        colors = [self._things.color(c) for c in classes]
        if is_overridden(self._jitter):
            colors = [to_color(self._jitter(as_shares(color))) for color in colors]
        return colors

    def _overlay_masks(self, masks: Sequence[Any], colors: Sequence[Color], alpha: float) -> None:
        if self._instance_mode is ColorMode.IMAGE_BW:
            binary = [binary_mask(m, *self._image_size) for m in masks if m is not None]
            self._grey_out(np.any([np.zeros(self._image_size, bool), *binary], axis=0))
        # Detectron2 draws all masks by their polygons.
        is_own = is_overridden(self.draw_polygon) and not is_overridden(self.draw_binary_mask)
        for mask, color in zip(masks, colors, strict=True):
            if mask is None:
                continue
            if is_own and not is_polygons(mask):
                mask = GenericMask(binary_mask(mask, *self._image_size), *self._image_size).polygons
            if not is_polygons(mask):
                bitmap, shares = binary_mask(mask, *self._image_size), as_shares(color)
                self.draw_binary_mask(bitmap, shares, edge_color=shares, alpha=alpha)
                continue
            for polygon in mask:
                points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
                self.draw_polygon(points, as_shares(color), alpha=alpha)

    def _grey_out(self, keep: npt.NDArray[np.bool_]) -> None:
        if is_overridden(self._create_grayscale_image):
            self.output.reset_image(self._create_grayscale_image(keep))
        else:
            self._canvas.grey_out(keep)

    def _boxes_of_masks(self, masks: Sequence[Any]) -> npt.NDArray[np.float64]:
        """Return (M, 4) XYXY in pixels of the output; NaN for an instance without a mask."""
        boxes = np.full((len(masks), 4), np.nan)
        for box, mask in zip(boxes, masks, strict=True):
            bounds = None if mask is None else mask_bounds(binary_mask(mask, *self._image_size))
            if bounds is not None:
                box[:] = bounds * np.tile(self._stretch, 2)
        return boxes

    def _draw_segments(
        self,
        segment_map: npt.NDArray[np.int64],
        segments: Sequence[Segment],
        min_area: float | None,
        alpha: float,
    ) -> VisImage:
        if segment_map.shape != self._image_size:
            raise DataError(
                f"a map has the size of its picture, {self._image_size}: got {segment_map.shape}"
            )
        if self._instance_mode is ColorMode.IMAGE_BW:
            self._grey_out(np.isin(segment_map, [segment.id for segment in segments]))
        if not self._show_labels:
            min_area = math.inf
        elif min_area is None:
            min_area = _NAMED_AREA * segment_map.size
        methods = (self.draw_text, self._draw_text_in_mask, self.draw_binary_mask)
        if not any(is_overridden(method) for method in methods):
            draw_segments(self._canvas, segment_map, segments, alpha=alpha, min_area=min_area)
            return self.get_output()
        masks = [segment_map == segment.id for segment in segments]
        for i in sorted(range(len(masks)), key=lambda i: -masks[i].sum()):
            _, color, text = segments[i]
            self.draw_binary_mask(
                masks[i],
                as_shares(color),
                edge_color="w",
                text=text,
                alpha=alpha,
                area_threshold=min_area,
            )
        return self.get_output()


class _OwnStrokes(Canvas):
    """Stands for a canvas: calls the methods of a visualizer that draw circles and lines."""

    def __init__(self, visualizer: Visualizer, canvas: Canvas, stretch: npt.NDArray[Any]) -> None:
        self._visualizer, self._stretch = visualizer, stretch
        self.line_width = canvas.line_width

    def draw_line(
        self, points: Any, color: Color, *, alpha: float = 1.0, line_width: float | None = None
    ) -> None:
        x, y = (np.asarray(points) / self._stretch).T.tolist()
        self._visualizer.draw_line(x, y, color=as_shares(color), linewidth=line_width)

    def draw_circle(
        self, center: Sequence[float], color: Color, *, radius: float, alpha: float = 1.0
    ) -> None:
        center = (np.asarray(center) / self._stretch).tolist()
        self._visualizer.draw_circle(center, color=as_shares(color), radius=radius)


def _is_crowd(info: Mapping[str, Any]) -> bool:
    if "iscrowd" not in info:
        return False
    from detkit.structures import as_flag

    return bool(as_flag(info["iscrowd"]))


def _corners(boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the corners (M, 4, 2) of rotated boxes (M, 5)."""
    import torch

    from detkit.structures import rotated_box_corners

    return rotated_box_corners(torch.from_numpy(boxes)).numpy()
