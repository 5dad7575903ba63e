"""Test-time augmentation: detect in several views of an image, resized and mirrored, and merge.

Legend: N images, V views of one image, M detections of one image, K keypoints.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable, find_architecture
from detkit.data import transforms as T
from detkit.layers import NMSMethod
from detkit.modeling.detection_filter import DetectionFilter, nms_method
from detkit.modeling.meta_arch import DenseDetector, GeneralizedRCNN, PanopticFPN
from detkit.modeling.postprocessing import detector_postprocess
from detkit.structures import Boxes, Instances, ModelInput, ModelOutput, heatmaps_to_keypoints
from detkit.utils.errors import ConfigError, UserError
from detkit.utils.image import read_image
from detkit.utils.overriding import is_overridden, overridable
from detkit.utils.resize_rule import shortest_edge_size


class UnsupportedModelError(UserError, TypeError):
    """A model that test-time augmentation cannot be applied to."""


@dataclass(frozen=True)
class View:
    """One way to show an image. Sizes are (height, width) in pixels."""

    size: tuple[int, int]
    is_mirrored: bool

    def image(self, image: Tensor) -> Tensor:
        """Return a (C, H, W) image as this view shows it, in its dtype."""
        if image.shape[1:] != self.size:
            dtype = image.dtype
            # Antialiased, as Pillow resizes in the data loader.
            batch = image[None].float()
            (image,) = F.interpolate(batch, self.size, mode="bilinear", antialias=True)
            if not dtype.is_floating_point:
                # Bytes again, as a resized image from the data loader has them.
                image = image.round().clamp(0, 255).to(dtype)
        return image.flip(2) if self.is_mirrored else image

    def boxes_into(self, boxes: Tensor, from_size: tuple[int, int]) -> Tensor:
        """Move (M, 4) boxes from an image of another size into this view."""
        return self._mirrored(_scaled(boxes, from_size, self.size))

    def boxes_out(self, boxes: Tensor, to_size: tuple[int, int]) -> Tensor:
        """Move (M, 4) boxes from this view to an image of another size."""
        return _scaled(self._mirrored(boxes), self.size, to_size)

    def _mirrored(self, boxes: Tensor) -> Tensor:
        if not self.is_mirrored:
            return boxes
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        width = self.size[1]
        return torch.stack([width - x2, y1, width - x1, y2], dim=1)


@dataclass(frozen=True)
class _OwnView(View):
    """A view by transforms other than resizes and mirrors, from a mapper of the user's own."""

    transforms: T.TransformList

    def boxes_into(self, boxes: Tensor, from_size: tuple[int, int]) -> Tensor:
        return boxes.new_tensor(self.transforms.apply_box(boxes.cpu().numpy()))

    def boxes_out(self, boxes: Tensor, to_size: tuple[int, int]) -> Tensor:
        return boxes.new_tensor(self.transforms.inverse().apply_box(boxes.cpu().numpy()))


def _view_of(image: Tensor, transforms: T.TransformList) -> View:
    """Return how an image (C, H, W) shows another one, of which transforms have made it."""
    height, width = image.shape[1:]
    is_mirrored = T.is_mirrored(transforms)
    kinds = T.ResizeTransform | T.HFlipTransform | T.NoOpTransform
    if all(isinstance(single, kinds) for single in transforms.transforms):
        return View((height, width), is_mirrored)
    return _OwnView((height, width), is_mirrored, transforms)


def _scaled(boxes: Tensor, from_size: tuple[int, int], to_size: tuple[int, int]) -> Tensor:
    (height, width), (new_height, new_width) = from_size, to_size
    x, y = new_width / width, new_height / height
    return boxes * boxes.new_tensor([x, y, x, y])


class DatasetMapperTTA:
    """Turns one model input into several, one per view."""

    @configurable
    def __init__(self, *, min_sizes: Sequence[int], max_size: int, flip: bool) -> None:
        """Set the views.

        Args:
            min_sizes: Shortest side of each size, in pixels.
            max_size: Longest side, in pixels; wins over `min_sizes`.
            flip: Whether to show every size mirrored too.

        Raises:
            ValueError: `min_sizes` is empty.
        """
        if not min_sizes:
            raise ValueError("min_sizes must have at least one size, got none")
        self.min_sizes = list(min_sizes)
        self.max_size = max_size
        self.flip = flip

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to arguments."""
        return {
            "min_sizes": cfg.TEST.AUG.MIN_SIZES,
            "max_size": cfg.TEST.AUG.MAX_SIZE,
            "flip": cfg.TEST.AUG.FLIP,
        }

    @overridable
    def __call__(self, dataset_dict: ModelInput) -> list[dict[str, Any]]:
        """Return the views of an input.

        Each is the input with the `image`, and `proposals` if there are any, of the view; and as in
        Detectron2 with `transforms`, a `TransformList` from the size of the output into the view.
        """
        model_input = dataset_dict
        image = model_input["image"]
        height, width = image.shape[1:]
        output_size = (model_input.get("height", height), model_input.get("width", width))
        views: list[dict[str, Any]] = []
        for min_size in self.min_sizes:
            size = shortest_edge_size(height, width, min_size, self.max_size)
            for is_mirrored in (False, True) if self.flip else (False,):
                view = View(size, is_mirrored)
                transforms: list[T.Transform] = [T.ResizeTransform(*output_size, *size)]
                if is_mirrored:
                    transforms.append(T.HFlipTransform(size[1]))
                view_input: dict[str, Any] = {
                    **model_input,
                    "image": view.image(image),
                    "transforms": T.TransformList(transforms),
                }
                if "proposals" in model_input:
                    proposals = model_input["proposals"]
                    boxes = view.boxes_into(proposals.proposal_boxes.tensor, (height, width))
                    fields = {**proposals.get_fields(), "proposal_boxes": Boxes(boxes)}
                    view_input["proposals"] = Instances(size, **fields)
                views.append(view_input)
        return views


TTAMapper = Callable[[ModelInput], list[dict[str, Any]]]

# Steps of Detectron2's; where one of them is overridden, an image goes through all of them.
_STEPS = (
    "_batch_inference",
    "_get_augmented_boxes",
    "_rescale_detected_boxes",
    "_reduce_pred_masks",
    "_turn_off_roi_heads",
)


class GeneralizedRCNNWithTTA(nn.Module):
    """A model that detects in several views of every image, and is called like the model itself.

    Boxes of all views are merged by NMS. Masks and keypoints are then predicted for the merged
    boxes in every view, and averaged cell by cell before they are thresholded.
    """

    @configurable
    def __init__(
        self,
        *,
        model: GeneralizedRCNN | DenseDetector,
        tta_mapper: TTAMapper,
        batch_size: int = 3,
        nms_thresh: float = 0.5,
        nms: NMSMethod = NMSMethod(),
        score_thresh: float = 0.0,
        topk_per_image: int = 100,
        keypoint_flip_indices: Sequence[int] | None = None,
        image_format: str = "BGR",
        cfg: CfgNode | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: Its weights are shared.
            tta_mapper: Makes the views of an input, as `DatasetMapperTTA` does; also a function.
            batch_size: Views in one pass.
            nms_thresh: See `DetectionFilter`, which merges the boxes of all views.
            nms: Likewise.
            score_thresh: Likewise.
            topk_per_image: Likewise.
            keypoint_flip_indices: (K,) the keypoint that each one is in a mirrored image. Needed
                by a model with keypoints whose views are mirrored.
            image_format: See `read_image`; of images that come as files.
            cfg: For subclasses, which find it under this name in Detectron2.

        Raises:
            ConfigError: `keypoint_flip_indices` is missing.
            TypeError: The model is of another kind.
        """
        super().__init__()
        # A PanopticFPN is a GeneralizedRCNN, but its pixel classes would have to be merged too.
        if not isinstance(model, GeneralizedRCNN | DenseDetector) or isinstance(model, PanopticFPN):
            raise UnsupportedModelError(
                "test-time augmentation (TEST.AUG.ENABLED) is for instances: it takes a"
                f" GeneralizedRCNN or a one-stage detector, got {type(model).__name__}"
            )
        self.model = model
        self.tta_mapper = tta_mapper
        self.batch_size = batch_size
        self.image_format = image_format
        self.cfg = cfg
        self.detection_filter = DetectionFilter(score_thresh, nms_thresh, topk_per_image, nms)
        self.keypoint_flip_indices = (
            None if keypoint_flip_indices is None else list(keypoint_flip_indices)
        )
        flips = getattr(tta_mapper, "flip", False)
        if self._branch_is_on("keypoint") and flips and keypoint_flip_indices is None:
            raise ConfigError(
                "TEST.AUG.FLIP is on and the model predicts keypoints: pass keypoint_flip_indices,"
                " the keypoint that each one is in a mirrored image"
            )
        self.train(model.training)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: TTAMapper | None = None,
        batch_size: int = 3,
        keypoint_flip_indices: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Map config keys to arguments."""
        if cfg.MODEL.ROTATED_BOXES:
            raise UnsupportedModelError(
                "test-time augmentation (TEST.AUG.ENABLED) is for upright boxes, and"
                " MODEL.ROTATED_BOXES is on"
            )
        keys = find_architecture(type(model))
        if keys is None or keys.nms_threshold is None or not keys.score_thresholds:
            keys = find_architecture(GeneralizedRCNN)
        assert keys is not None  # declared in meta_arch/rcnn.py, as is the threshold
        assert keys.nms_threshold is not None
        return {
            "model": model,
            "tta_mapper": DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper,
            "batch_size": batch_size,
            "nms_thresh": cfg.get_by_full_key(keys.nms_threshold),
            "nms": nms_method(cfg),
            "score_thresh": cfg.get_by_full_key(keys.score_thresholds[0]),
            "topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "keypoint_flip_indices": keypoint_flip_indices,
            "image_format": cfg.INPUT.FORMAT,
            "cfg": cfg.clone(),
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[ModelInput]) -> list[ModelOutput]:
        """Return the instances in every image, in the size that each input asks for.

        As in Detectron2, an input without `image` may have the `file_name` of one.

        Raises:
            RuntimeError: The model is in training mode.
        """
        if self.training:
            raise RuntimeError(
                "test-time augmentation is for inference: call eval() on the model first"
            )
        return [self._inference_one_image(self._with_image(x)) for x in batched_inputs]

    def _with_image(self, model_input: ModelInput) -> ModelInput:
        """Return an input with `image`, `height` and `width`."""
        if "image" in model_input:
            image = model_input["image"]
        else:
            pixels = read_image(model_input["file_name"], self.image_format)
            image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        height, width = image.shape[1:]
        size = {"height": height, "width": width}
        return cast(ModelInput, {**size, **model_input, "image": image})

    def _inference_one_image(self, model_input: ModelInput) -> ModelOutput:
        """Return the instances in one image."""
        if any(is_overridden(getattr(self, name)) for name in _STEPS):
            return self._inference_in_steps(model_input)
        image = model_input["image"]
        height, width = image.shape[1:]
        size = (model_input.get("height", height), model_input.get("width", width))
        if not is_overridden(self.tta_mapper.__call__):
            # Moved to the device before it is resized: that is quicker than nine sizes of a picture
            # on the CPU, and one transfer instead of nine. Mappers of users' own work in NumPy.
            image = image.to(self.model.device)
        inputs, transforms = self._get_augmented_inputs(
            cast(ModelInput, {**model_input, "image": image})
        )
        views = [
            (seen, _view_of(seen["image"], transforms_i))
            for seen, transforms_i in zip(inputs, transforms, strict=True)
        ]
        merged = self._merged_boxes(views, size)
        if not self._has_branches():
            return {"instances": merged}
        self._add_to_boxes(merged, views)
        return {"instances": detector_postprocess(merged, *size)}

    def _get_augmented_inputs(
        self, model_input: ModelInput
    ) -> tuple[list[ModelInput], list[T.TransformList]]:
        """Return the inputs that show an image, and how each does."""
        inputs = [dict(view) for view in self.tta_mapper(model_input)]
        transforms = [view.pop("transforms") for view in inputs]
        return cast(list[ModelInput], inputs), transforms

    def _merged_boxes(
        self, views: Sequence[tuple[ModelInput, View]], size: tuple[int, int]
    ) -> Instances:
        """Detect boxes in all views, and merge them by NMS in an image of the given size."""
        boxes: list[Tensor] = []
        scores: list[Tensor] = []
        classes: list[Tensor] = []
        for start in range(0, len(views), self.batch_size):
            batch = views[start : start + self.batch_size]
            found = self._boxes_in([x for x, _ in batch])
            for found_i, (_, view) in zip(found, batch, strict=True):
                boxes.append(view.boxes_out(found_i.pred_boxes.tensor, size))
                scores.append(found_i.scores)
                classes.append(found_i.pred_classes)
        return self._merge_detections(torch.cat(boxes), torch.cat(scores), torch.cat(classes), size)

    def _merge_detections(
        self,
        all_boxes: Tensor,
        all_scores: Tensor | list[Tensor],
        all_classes: Tensor | list[Tensor],
        shape_hw: tuple[int, int],
    ) -> Instances:
        """Merge the boxes (M, 4) of all views, in an image of (height, width), by NMS."""
        # Lists, as Detectron2's `_get_augmented_boxes` returns.
        if isinstance(all_scores, list):
            all_scores = torch.stack(all_scores) if all_scores else all_boxes.new_zeros(0)
        if isinstance(all_classes, list):
            all_classes = torch.stack(all_classes) if all_classes else all_boxes.new_zeros(0).long()
        boxes = Boxes(all_boxes)
        # Clipped after the views are brought to one image: NMS compares what is reported.
        boxes.clip(shape_hw)
        keep, scores = self.detection_filter(boxes.tensor, all_scores, all_classes)
        return Instances(
            shape_hw, pred_boxes=boxes[keep], scores=scores, pred_classes=all_classes[keep]
        )

    def _boxes_in(self, inputs: list[ModelInput]) -> list[Instances]:
        """Return the boxes in each input, in its coordinates."""
        model = self.model
        # Masks of the views are not used. An `inference` of the user's own decides itself.
        is_own = is_overridden(model.inference)
        if isinstance(model, GeneralizedRCNN) and self._has_branches() and not is_own:
            return model.detect_boxes(inputs)
        return cast(list[Instances], model.inference(inputs, do_postprocess=False))

    def _add_to_boxes(self, merged: Instances, views: Sequence[tuple[ModelInput, View]]) -> None:
        """Set `pred_masks` and `pred_keypoints` to the means over the views.

        Cells of a mask or heatmap are relative to the box, so those of all sizes can be averaged.
        """
        # Summed up view by view: the maps of all at once would take V times the memory.
        masks: Tensor | None = None
        heatmaps: Tensor | None = None
        for result, view in self._with_fields(merged, views):
            if result.has("pred_masks"):
                maps = result.pred_masks.flip(3) if view.is_mirrored else result.pred_masks
                masks = maps if masks is None else masks + maps
            if result.has("pred_keypoint_heatmaps"):
                maps = result.pred_keypoint_heatmaps
                if view.is_mirrored:
                    # A mirror turns a left eye into a right one.
                    maps = maps.flip(3)[:, self.keypoint_flip_indices]
                heatmaps = maps if heatmaps is None else heatmaps + maps
        if masks is not None:
            merged.pred_masks = masks / len(views)
        if heatmaps is not None:
            keypoints = heatmaps_to_keypoints(heatmaps / len(views), merged.pred_boxes.tensor)
            merged.pred_keypoints = keypoints[:, :, [0, 1, 3]]

    def _with_fields(
        self, merged: Instances, views: Sequence[tuple[ModelInput, View]]
    ) -> Iterator[tuple[Instances, View]]:
        """Yield the merged boxes in each view, with the fields that the model adds to them."""
        for start in range(0, len(views), self.batch_size):
            batch = views[start : start + self.batch_size]
            given: list[Instances] = []
            for _, view in batch:
                boxes = view.boxes_into(merged.pred_boxes.tensor, merged.image_size)
                fields = {**merged.get_fields(), "pred_boxes": Boxes(boxes)}
                given.append(Instances(view.size, **fields))
            results = cast(GeneralizedRCNN, self.model).inference(
                [x for x, _ in batch], given, do_postprocess=False
            )
            for result, (_, view) in zip(cast(list[Instances], results), batch, strict=True):
                yield result, view

    def _has_branches(self) -> bool:
        return self._branch_is_on("mask") or self._branch_is_on("keypoint")

    def _branch_is_on(self, name: str) -> bool:
        return bool(getattr(getattr(self.model, "roi_heads", None), f"{name}_on", False))

    # As in Detectron2, for subclasses that change one of these steps, or call them in an
    # `_inference_one_image` of their own. They keep the maps of all views at once.

    def _inference_in_steps(self, model_input: ModelInput) -> ModelOutput:
        if self._branch_is_on("keypoint"):
            raise UnsupportedModelError(
                f"{type(self).__name__} overrides a step of test-time augmentation that has no"
                " keypoints, as in Detectron2: override _inference_one_image, or leave the steps"
            )
        height, width = model_input["image"].shape[1:]
        size = (model_input.get("height", height), model_input.get("width", width))
        inputs, transforms = self._get_augmented_inputs(model_input)
        with self._turn_off_roi_heads(["mask_on", "keypoint_on"]):
            found = self._get_augmented_boxes(inputs, transforms)
        merged = self._merge_detections(*found, size)
        if not self._branch_is_on("mask"):
            return {"instances": merged}
        given = self._rescale_detected_boxes(inputs, merged, transforms)
        outputs = self._batch_inference(inputs, given)
        merged.pred_masks = self._reduce_pred_masks(outputs, transforms)
        return {"instances": detector_postprocess(merged, *size)}

    @overridable
    @contextmanager
    def _turn_off_roi_heads(self, attrs: Sequence[str]) -> Iterator[None]:
        """Switch branches of the ROI heads off, by the names of their switches, in the block."""
        roi_heads = getattr(self.model, "roi_heads", None)
        earlier = {name: getattr(roi_heads, name) for name in attrs if hasattr(roi_heads, name)}
        for name in earlier:
            setattr(roi_heads, name, False)
        try:
            yield
        finally:
            for name, value in earlier.items():
                setattr(roi_heads, name, value)

    @overridable
    def _batch_inference(
        self,
        batched_inputs: list[ModelInput],
        detected_instances: list[Instances] | None = None,
    ) -> list[Instances]:
        """Return the instances in each input, or those that are given with fields added."""
        outputs: list[Instances] = []
        for start in range(0, len(batched_inputs), self.batch_size):
            batch = slice(start, start + self.batch_size)
            given = () if detected_instances is None else (detected_instances[batch],)
            model = cast(GeneralizedRCNN, self.model)
            found = model.inference(batched_inputs[batch], *given, do_postprocess=False)
            outputs += cast(list[Instances], found)
        return outputs

    @overridable
    def _get_augmented_boxes(
        self, augmented_inputs: list[ModelInput], tfms: list[T.TransformList]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and classes in all views, boxes in the image that is asked for."""
        found = self._batch_inference(augmented_inputs)
        boxes = []
        for found_i, transforms in zip(found, tfms, strict=True):
            of_view = found_i.pred_boxes.tensor
            boxes.append(of_view.new_tensor(transforms.inverse().apply_box(of_view.cpu().numpy())))
        scores = torch.cat([found_i.scores for found_i in found])
        return torch.cat(boxes), scores, torch.cat([found_i.pred_classes for found_i in found])

    @overridable
    def _rescale_detected_boxes(
        self,
        augmented_inputs: list[ModelInput],
        merged_instances: Instances,
        tfms: list[T.TransformList],
    ) -> list[Instances]:
        """Return the merged detections in each view."""
        boxes = merged_instances.pred_boxes.tensor
        detected = []
        for seen, transforms in zip(augmented_inputs, tfms, strict=True):
            height, width = seen["image"].shape[1:]
            in_view = boxes.new_tensor(transforms.apply_box(boxes.cpu().numpy()))
            fields = {**merged_instances.get_fields(), "pred_boxes": Boxes(in_view)}
            detected.append(Instances((height, width), **fields))
        return detected

    @overridable
    def _reduce_pred_masks(self, outputs: list[Instances], tfms: list[T.TransformList]) -> Tensor:
        """Return the mean of the masks (M, 1, S, S) of all views."""
        masks = [
            output.pred_masks.flip(3) if T.is_mirrored(transforms) else output.pred_masks
            for output, transforms in zip(outputs, tfms, strict=True)
        ]
        return torch.stack(masks).mean(dim=0)
