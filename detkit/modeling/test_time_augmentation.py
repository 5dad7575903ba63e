"""Test-time augmentation: an image is seen at several sizes and mirrored, and what is found is merged.

Legend: N images, V views of one image, M detections of one image, K keypoints.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import NMSMethod, suppress
from detkit.modeling.image_view import DatasetMapperTTA, View
from detkit.modeling.meta_arch import DenseDetector, GeneralizedRCNN, PanopticFPN
from detkit.modeling.nms_settings import nms_method
from detkit.modeling.postprocessing import detector_postprocess
from detkit.structures import Boxes, Instances, ModelInput, ModelOutput, heatmaps_to_keypoints


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
        head = cfg.MODEL.RETINANET if isinstance(model, DenseDetector) else cfg.MODEL.ROI_HEADS
        return {
            "model": model,
            "tta_mapper": DatasetMapperTTA(cfg) if tta_mapper is None else tta_mapper,
            "batch_size": batch_size,
            "nms_thresh": head.NMS_THRESH_TEST,
            "nms": nms_method(cfg),
            "score_thresh": head.SCORE_THRESH_TEST,
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
