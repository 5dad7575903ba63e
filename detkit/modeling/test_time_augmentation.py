"""Test-time augmentation: an image is seen at several sizes and mirrored, and what is found is merged.

Legend: N images, V views of one image, M detections of one image, K keypoints.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable, find_architecture
from detkit.layers import NMSMethod, suppress
from detkit.modeling.detection_filter import nms_method
from detkit.modeling.meta_arch import DenseDetector, GeneralizedRCNN, PanopticFPN
from detkit.modeling.postprocessing import detector_postprocess
from detkit.structures import Boxes, Instances, ModelInput, ModelOutput, heatmaps_to_keypoints


@dataclass(frozen=True)
class View:
    """One way to see an image: in a size, and mirrored or not. Sizes are (height, width) in pixels."""

    size: tuple[int, int]
    is_mirrored: bool

    def image(self, image: Tensor) -> Tensor:
        """Return a (C, H, W) image as this view shows it, in its dtype."""
        if image.shape[1:] != self.size:
            resized = F.interpolate(
                image[None].float(), self.size, mode="bilinear", antialias=True
            )[0]
            # Bytes again, as a resized image from the data loader has them.
            image = (
                resized
                if image.is_floating_point()
                else resized.round().clamp(0, 255).to(image.dtype)
            )
        return image.flip(2) if self.is_mirrored else image

    def boxes_into(self, boxes: Tensor, from_size: tuple[int, int]) -> Tensor:
        """Return (M, 4) boxes of an image of another size in the coordinates of this view."""
        return self._mirrored(_scaled(boxes, from_size, self.size))

    def boxes_out(self, boxes: Tensor, to_size: tuple[int, int]) -> Tensor:
        """Return (M, 4) boxes of this view in the coordinates of an image of another size."""
        return _scaled(self._mirrored(boxes), self.size, to_size)

    def _mirrored(self, boxes: Tensor) -> Tensor:
        if not self.is_mirrored:
            return boxes
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        width = self.size[1]
        return torch.stack([width - x2, y1, width - x1, y2], dim=1)


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
            min_sizes: Length of the shortest side of each size, in pixels.
            max_size: Longest side, in pixels; wins over `min_sizes`.
            flip: Whether every size is also seen mirrored.

        Raises:
            ValueError: There is no size.
        """
        if not min_sizes:
            raise ValueError("TEST.AUG.MIN_SIZES needs at least one size, got none")
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

    def __call__(self, model_input: ModelInput) -> list[tuple[ModelInput, View]]:
        """Return the views of an input, each with what it shows: `image`, and `proposals` where
        there are any.
        """
        height, width = model_input["image"].shape[1:]
        views = []
        for min_size in self.min_sizes:
            size = _resized((height, width), min_size, self.max_size)
            views += [
                View(size, is_mirrored) for is_mirrored in ([False, True] if self.flip else [False])
            ]
        return [(_seen(model_input, view), view) for view in views]


def _resized(size: tuple[int, int], min_size: int, max_size: int) -> tuple[int, int]:
    """Return the (height, width) of an image resized to a shortest side, rounded as Detectron2
    does.
    """
    height, width = size
    scale = min_size / min(height, width)
    new = (min_size, scale * width) if height < width else (scale * height, min_size)
    shrink = min(1.0, max_size / max(new))
    return max(1, int(new[0] * shrink + 0.5)), max(1, int(new[1] * shrink + 0.5))


def _seen(model_input: ModelInput, view: View) -> ModelInput:
    image = model_input["image"]
    seen: ModelInput = {"image": view.image(image)}
    if "proposals" in model_input:
        proposals = model_input["proposals"]
        fields = proposals.get_fields()
        boxes = view.boxes_into(proposals.proposal_boxes.tensor, (image.shape[1], image.shape[2]))
        seen["proposals"] = Instances(view.size, **{**fields, "proposal_boxes": Boxes(boxes)})
    return seen


class GeneralizedRCNNWithTTA(nn.Module):
    """A model that looks at every image in several views; otherwise it is called as the model itself.

    Boxes of all views are merged by NMS. Masks and keypoints are then predicted for the merged
    boxes in every view, and averaged cell by cell before anything is decided on them.
    """

    @configurable
    def __init__(
        self,
        *,
        model: GeneralizedRCNN | DenseDetector,
        tta_mapper: DatasetMapperTTA,
        batch_size: int = 3,
        nms_thresh: float = 0.5,
        nms: NMSMethod = NMSMethod(),
        score_thresh: float = 0.0,
        topk_per_image: int = 100,
        keypoint_flip_indices: Sequence[int] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: Its weights are shared.
            tta_mapper: Gives the views of an input.
            batch_size: Views in one pass.
            nms_thresh: IoU above which the lower-scored of two merged boxes of a class goes.
            nms: How merged boxes suppress each other.
            score_thresh: Scores that a soft suppression lowers must stay above it.
            topk_per_image: At most this many detections per image.
            keypoint_flip_indices: (K,) which keypoint each one is in a mirrored image. Needed by a
                model with keypoints whose views are mirrored.

        Raises:
            TypeError: The model is of another kind.
            ValueError: `keypoint_flip_indices` is missing.
        """
        super().__init__()
        # A PanopticFPN is a GeneralizedRCNN, but one whose label maps nothing here would merge.
        if not isinstance(model, GeneralizedRCNN | DenseDetector) or isinstance(model, PanopticFPN):
            raise TypeError(
                "test-time augmentation (TEST.AUG.ENABLED) is for instances: it takes a"
                f" GeneralizedRCNN or a one-stage detector, got {type(model).__name__}"
            )
        self.model = model
        self.tta_mapper = tta_mapper
        self.batch_size = batch_size
        self.nms_thresh = nms_thresh
        self.nms = nms
        self.score_thresh = score_thresh
        self.topk_per_image = topk_per_image
        self.keypoint_flip_indices = (
            None if keypoint_flip_indices is None else list(keypoint_flip_indices)
        )
        if self._branch_is_on("keypoint") and tta_mapper.flip and keypoint_flip_indices is None:
            raise ValueError(
                "TEST.AUG.FLIP is on and the model predicts keypoints: give keypoint_flip_indices,"
                " the keypoint that each one is in a mirrored image"
            )
        self.train(model.training)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: DatasetMapperTTA | None = None,
        batch_size: int = 3,
        keypoint_flip_indices: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Map config keys to arguments."""
        keys = find_architecture(type(model))
        if keys is None or keys.nms_threshold is None or not keys.score_thresholds:
            keys = find_architecture(GeneralizedRCNN)
        assert keys is not None and keys.nms_threshold is not None  # declared in meta_arch/rcnn.py
        return {
            "model": model,
            "tta_mapper": DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper,
            "batch_size": batch_size,
            "nms_thresh": cfg.get_by_full_key(keys.nms_threshold),
            "nms": nms_method(cfg),
            "score_thresh": cfg.get_by_full_key(keys.score_thresholds[0]),
            "topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "keypoint_flip_indices": keypoint_flip_indices,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[ModelInput]) -> list[ModelOutput]:
        """Return the instances in every image, in the size that each input asks for.

        Raises:
            RuntimeError: In training.
        """
        if self.training:
            raise RuntimeError(
                "test-time augmentation is for inference: call eval() on the model first"
            )
        return [{"instances": self._detect(x)} for x in batched_inputs]

    def _detect(self, model_input: ModelInput) -> Instances:
        height, width = model_input["image"].shape[1:]
        size = (model_input.get("height", height), model_input.get("width", width))
        # On the device before it is resized: nine sizes of a picture are its work.
        on_device = cast(
            ModelInput, {**model_input, "image": model_input["image"].to(self.model.device)}
        )
        seen = self.tta_mapper(on_device)
        merged = self._merged_boxes(seen, size)
        branches = [name for name in ("mask", "keypoint") if self._branch_is_on(name)]
        if not branches:
            return merged
        self._add_to_boxes(merged, seen)
        return detector_postprocess(merged, *size)

    def _merged_boxes(
        self, seen: Sequence[tuple[ModelInput, View]], size: tuple[int, int]
    ) -> Instances:
        """Return what the box branch finds in all views, in an image of the given size and reduced
        by NMS.
        """
        with _BoxesOnly(self.model):
            found = list(self._run_in_batches([x for x, _ in seen]))
        boxes = Boxes(
            torch.cat(
                [
                    v.boxes_out(f.pred_boxes.tensor, size)
                    for f, (_, v) in zip(found, seen, strict=True)
                ]
            )
        )
        boxes.clip(size)
        scores, classes = (
            torch.cat([f.scores for f in found]),
            torch.cat([f.pred_classes for f in found]),
        )
        keep, scores = suppress(
            boxes.tensor,
            scores,
            classes,
            self.nms_thresh,
            self.nms,
            min_score=self.score_thresh,
            topk=self.topk_per_image,
        )
        return Instances(size, pred_boxes=boxes[keep], scores=scores, pred_classes=classes[keep])

    def _add_to_boxes(self, merged: Instances, seen: Sequence[tuple[ModelInput, View]]) -> None:
        """Set `pred_masks` and `pred_keypoints`: means over the views, which do not depend on the
        size of a view.
        """
        boxes = merged.pred_boxes.tensor
        given = [
            Instances(
                v.size,
                pred_boxes=Boxes(v.boxes_into(boxes, merged.image_size)),
                pred_classes=merged.pred_classes,
                scores=merged.scores,
            )
            for _, v in seen
        ]
        # Summed up view by view: the maps of all at once would take V times the memory.
        masks: list[Tensor] = []
        heatmaps: list[Tensor] = []
        for result, (_, view) in zip(
            self._run_in_batches([x for x, _ in seen], given), seen, strict=True
        ):
            if result.has("pred_masks"):
                _add(masks, result.pred_masks.flip(3) if view.is_mirrored else result.pred_masks)
            if result.has("pred_keypoint_heatmaps"):
                maps = result.pred_keypoint_heatmaps
                _add(
                    heatmaps,
                    maps.flip(3)[:, self.keypoint_flip_indices] if view.is_mirrored else maps,
                )
        if masks:
            merged.pred_masks = masks[0] / len(seen)
        if heatmaps:
            merged.pred_keypoints = heatmaps_to_keypoints(heatmaps[0] / len(seen), boxes)[
                :, :, [0, 1, 3]
            ]

    def _run_in_batches(
        self, inputs: list[ModelInput], given: list[Instances] | None = None
    ) -> Iterator[Instances]:
        """Return the model's detections for each input in its coordinates; for given boxes, what it
        adds to them.
        """
        for start in range(0, len(inputs), self.batch_size):
            part = slice(start, start + self.batch_size)
            more = {} if given is None else {"detected_instances": given[part]}
            yield from cast(
                "list[Instances]", self.model.inference(inputs[part], do_postprocess=False, **more)
            )

    def _branch_is_on(self, name: str) -> bool:
        return bool(getattr(getattr(self.model, "roi_heads", None), f"{name}_on", False))


class _BoxesOnly:
    """While it lasts, the ROI heads of a model predict boxes and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        heads = getattr(model, "roi_heads", None)
        self._heads = heads
        self._was_on = {
            name: getattr(heads, name)
            for name in ("mask_on", "keypoint_on")
            if getattr(heads, name, False)
        }

    def __enter__(self) -> None:
        for name in self._was_on:
            setattr(self._heads, name, False)

    def __exit__(self, *exc: object) -> None:
        for name, value in self._was_on.items():
            setattr(self._heads, name, value)


def _add(total: list[Tensor], maps: Tensor) -> None:
    """Add to a sum that starts as an empty list."""
    total[:] = [total[0] + maps] if total else [maps]
