"""Test-time augmentation: detect in several views of an image, resized and mirrored, and merge.

Legend: N images, V views of one image, M detections of one image, K keypoints.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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
from detkit.utils.text import shortened


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


def _view_of(model_input: ModelInput, transforms: T.TransformList) -> tuple[View, tuple[int, int]]:
    """Return how an input shows an image, by transforms of that image, and the image's size."""
    height, width = model_input["image"].shape[1:]
    is_mirrored = T.is_mirrored(transforms)
    resizes = [t for t in transforms.transforms if isinstance(t, T.ResizeTransform)]
    size = (resizes[0].h, resizes[0].w) if resizes else (height, width)
    kinds = T.ResizeTransform | T.HFlipTransform | T.NoOpTransform
    if all(isinstance(single, kinds) for single in transforms.transforms):
        return View((height, width), is_mirrored), size
    return _OwnView((height, width), is_mirrored, transforms), size


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
        Detectron2 with `transforms`, a `TransformList` from the size of the output to that of the
        image, and from there into the view.
        """
        model_input, image = dataset_dict, dataset_dict["image"]
        height, width = image.shape[1:]
        output_size = (model_input.get("height", height), model_input.get("width", width))
        to_image = T.ResizeTransform(*output_size, height, width)
        views: list[dict[str, Any]] = []
        for min_size in self.min_sizes:
            size = shortest_edge_size(height, width, min_size, self.max_size)
            for is_mirrored in (False, True) if self.flip else (False,):
                view = View(size, is_mirrored)
                transforms: list[T.Transform] = [to_image]
                transforms.append(T.ResizeTransform(height, width, *size))
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
            cfg: Kept as `cfg`, for subclasses written for Detectron2.

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
        self.cfg = cfg
        self.model = model
        self.tta_mapper = tta_mapper
        self.batch_size = batch_size
        self.image_format = image_format
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
        if isinstance(model, DistributedDataParallel):
            model = model.module
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
        if self.model.training:
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
        with self._turn_off_roi_heads(["mask_on", "keypoint_on"]):
            boxes, scores, classes = self._get_augmented_boxes(inputs, transforms)
        merged = self._merge_detections(boxes, scores, classes, size)
        if not self._has_branches():
            return {"instances": merged}
        self._add_to_boxes(merged, inputs, transforms)
        return {"instances": detector_postprocess(merged, *size)}

    # The steps of Detectron2, which its users' subclasses call and override.

    def _get_augmented_inputs(
        self, model_input: ModelInput
    ) -> tuple[list[ModelInput], list[T.TransformList]]:
        """Return the inputs that show an image, and how each does."""
        views = self.tta_mapper(model_input)
        if not all(isinstance(view, Mapping) and "transforms" in view for view in views):
            raise TypeError(
                "a mapper for test-time augmentation returns inputs with `transforms`, as"
                f" DatasetMapperTTA does: got {shortened(views)}"
            )
        inputs = [dict(view) for view in views]
        transforms = [view.pop("transforms") for view in inputs]
        return cast(list[ModelInput], inputs), transforms

    @contextlib.contextmanager
    def _turn_off_roi_heads(self, attrs: Sequence[str]) -> Iterator[None]:
        """Switch off branches of the ROI heads, such as `mask_on`, as far as they are on."""
        heads = getattr(self.model, "roi_heads", None)
        switches = {name: getattr(heads, name) for name in attrs if hasattr(heads, name)}
        try:
            for name in switches:
                setattr(heads, name, False)
            yield
        finally:
            for name, value in switches.items():
                setattr(heads, name, value)

    def _batch_inference(
        self,
        batched_inputs: Sequence[ModelInput],
        detected_instances: Sequence[Instances] | None = None,
    ) -> list[Instances]:
        """Return what the model finds in each input, `batch_size` of them at a time."""
        model: Any = self.model
        found: list[Instances] = []
        for start in range(0, len(batched_inputs), self.batch_size):
            part = slice(start, start + self.batch_size)
            given = () if detected_instances is None else (detected_instances[part],)
            found += model.inference(batched_inputs[part], *given, do_postprocess=False)
        return found

    def _get_augmented_boxes(
        self, augmented_inputs: Sequence[ModelInput], tfms: Sequence[T.TransformList]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes in all views, brought back into the image, their scores and classes."""
        found = self._batch_inference(augmented_inputs)
        boxes: list[Tensor] = []
        for seen, found_i, transforms in zip(augmented_inputs, found, tfms, strict=True):
            view, size = _view_of(seen, transforms)
            boxes.append(view.boxes_out(found_i.pred_boxes.tensor, size))
        scores, classes = ([x.get(name) for x in found] for name in ("scores", "pred_classes"))
        return torch.cat(boxes), torch.cat(scores), torch.cat(classes)

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

    def _rescale_detected_boxes(
        self,
        augmented_inputs: Sequence[ModelInput],
        merged_instances: Instances,
        tfms: Sequence[T.TransformList],
    ) -> list[Instances]:
        """Return the merged boxes as they are seen in each view."""
        moved: list[Instances] = []
        for seen, transforms in zip(augmented_inputs, tfms, strict=True):
            view, _ = _view_of(seen, transforms)
            boxes = view.boxes_into(merged_instances.pred_boxes.tensor, merged_instances.image_size)
            fields = {**merged_instances.get_fields(), "pred_boxes": Boxes(boxes)}
            moved.append(Instances(view.size, **fields))
        return moved

    def _reduce_pred_masks(
        self, outputs: Sequence[Instances], tfms: Sequence[T.TransformList]
    ) -> Tensor:
        """Return the mean of the masks (M, 1, h, w) of all views."""
        masks = [
            found.pred_masks.flip(3) if T.is_mirrored(transforms) else found.pred_masks
            for found, transforms in zip(outputs, tfms, strict=True)
        ]
        return torch.stack(masks).mean(dim=0)

    def _add_to_boxes(
        self,
        merged: Instances,
        inputs: Sequence[ModelInput],
        transforms: Sequence[T.TransformList],
    ) -> None:
        """Set `pred_masks` and `pred_keypoints` to the means over the views.

        Cells of a mask or heatmap are relative to the box, so those of all sizes can be averaged.
        """
        given = self._rescale_detected_boxes(inputs, merged, transforms)
        outputs: list[Instances] = []
        heatmaps: Tensor | None = None
        # The heatmaps of all views at once take hundreds of megabytes.
        at_once = self.batch_size if self._branch_is_on("keypoint") else len(inputs)
        for start in range(0, len(inputs), at_once):
            part = slice(start, start + at_once)
            found = self._batch_inference(inputs[part], given[part])
            for found_i, transforms_i in zip(found, transforms[part], strict=True):
                if not found_i.has("pred_keypoint_heatmaps"):
                    continue
                maps = found_i.pred_keypoint_heatmaps
                found_i.remove("pred_keypoint_heatmaps")
                if T.is_mirrored(transforms_i):
                    # A mirror turns a left eye into a right one.
                    maps = maps.flip(3)[:, self.keypoint_flip_indices]
                heatmaps = maps if heatmaps is None else heatmaps + maps
            outputs += found
        if outputs[0].has("pred_masks"):
            merged.pred_masks = self._reduce_pred_masks(outputs, transforms)
        if heatmaps is not None:
            keypoints = heatmaps_to_keypoints(heatmaps / len(inputs), merged.pred_boxes.tensor)
            merged.pred_keypoints = keypoints[:, :, [0, 1, 3]]

    def _has_branches(self) -> bool:
        return self._branch_is_on("mask") or self._branch_is_on("keypoint")

    def _branch_is_on(self, name: str) -> bool:
        return bool(getattr(getattr(self.model, "roi_heads", None), f"{name}_on", False))
