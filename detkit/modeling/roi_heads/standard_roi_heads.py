"""ROI heads with a branch per task, each with a pooler of its own.

Legend: N images, R regions over the batch, C channels, L levels, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.backbone import select_features
from detkit.modeling.poolers import ROIPooler
from detkit.modeling.roi_heads.build import (
    ROI_HEADS_REGISTRY,
    build_box_head,
    build_keypoint_head,
    build_mask_head,
)
from detkit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detkit.modeling.roi_heads.roi_heads import (
    ROIHeads,
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from detkit.structures import Boxes, Instances


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(ROIHeads):
    """A box branch, as in Fast R-CNN on a feature pyramid, and where wanted one for masks and one for keypoints.

    Branches do not share layers. A subclass replaces the parts of a branch in `_init_box_head`,
    `_init_mask_head` or `_init_keypoint_head`, and what is done with them in `_box_losses`,
    `_detect_boxes`, `_forward_mask` or `_forward_keypoint`.
    """

    @configurable
    def __init__(
        self,
        *,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_head: nn.Module,
        box_predictor: FastRCNNOutputLayers,
        mask_in_features: Sequence[str] | None = None,
        mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None,
        keypoint_in_features: Sequence[str] | None = None,
        keypoint_pooler: ROIPooler | None = None,
        keypoint_head: nn.Module | None = None,
        train_on_pred_boxes: bool = False,
        **kwargs: Any,
    ) -> None:
        """Put the parts together.

        Args:
            box_in_features: Names of the L features that regions are pooled from, finest first.
            box_pooler: Features and boxes to features per region.
            box_head: Pooled features to what the predictor takes.
            box_predictor: Classes and boxes, their losses and inference.
            mask_in_features: As for boxes. None is no mask branch.
            mask_pooler: As for boxes.
            mask_head: Pooled features and regions to losses, or to instances with masks; see
                `ROI_MASK_HEAD_REGISTRY`.
            keypoint_in_features: As for boxes. None is no keypoint branch.
            keypoint_pooler: As for boxes.
            keypoint_head: As for masks; see `ROI_KEYPOINT_HEAD_REGISTRY`.
            train_on_pred_boxes: Whether branches after the box branch are trained on its boxes
                instead of the proposals.
            **kwargs: Arguments of `ROIHeads`.
        """
        super().__init__(**kwargs)
        self.box_in_features = list(box_in_features)
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_on = mask_in_features is not None
        if mask_in_features is not None:
            self.mask_in_features = list(mask_in_features)
            self.mask_pooler = _part(mask_pooler, "mask_pooler")
            self.mask_head = _part(mask_head, "mask_head")
        self.keypoint_on = keypoint_in_features is not None
        if keypoint_in_features is not None:
            self.keypoint_in_features = list(keypoint_in_features)
            self.keypoint_pooler = _part(keypoint_pooler, "keypoint_pooler")
            self.keypoint_head = _part(keypoint_head, "keypoint_head")
        self.train_on_pred_boxes = train_on_pred_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        return {
            **super().from_config(cfg),
            **cls._init_box_head(cfg, input_shape),
            **cls._init_mask_head(cfg, input_shape),
            **cls._init_keypoint_head(cfg, input_shape),
            "train_on_pred_boxes": cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES,
        }

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build the parts of the box branch. A subclass may build others."""
        pooler, pooled_shape = cls._init_box_pooler(cfg, input_shape)
        head = build_box_head(cfg, pooled_shape)
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler,
            "box_head": head,
            "box_predictor": FastRCNNOutputLayers(cfg, head.output_shape),
        }

    @classmethod
    def _init_box_pooler(
        cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]
    ) -> tuple[ROIPooler, ShapeSpec]:
        """Build the pooler of the box branch, and give the shape of what it pools."""
        head = cfg.MODEL.ROI_BOX_HEAD
        shapes = _shapes_to_pool_from(cfg, input_shape)
        return _pooler(shapes, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO, head.POOLER_TYPE)

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build the parts of the mask branch, none where MODEL.MASK_ON is off. A subclass may build
        others.
        """
        if not cfg.MODEL.MASK_ON:
            return {}
        head = cfg.MODEL.ROI_MASK_HEAD
        shapes = _shapes_to_pool_from(cfg, input_shape)
        pooler, pooled_shape = _pooler(
            shapes, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO, head.POOLER_TYPE
        )
        return {
            "mask_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "mask_pooler": pooler,
            "mask_head": build_mask_head(cfg, pooled_shape),
        }

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build the parts of the keypoint branch, none where MODEL.KEYPOINT_ON is off. A subclass
        may build others.
        """
        if not cfg.MODEL.KEYPOINT_ON:
            return {}
        head = cfg.MODEL.ROI_KEYPOINT_HEAD
        shapes = _shapes_to_pool_from(cfg, input_shape)
        pooler, pooled_shape = _pooler(
            shapes, head.POOLER_RESOLUTION, head.POOLER_SAMPLING_RATIO, head.POOLER_TYPE
        )
        return {
            "keypoint_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "keypoint_pooler": pooler,
            "keypoint_head": build_keypoint_head(cfg, pooled_shape),
        }

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Instances],
        targets: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """Return the losses of every branch.

        Args:
            features: The backbone's features by name.
            proposals: What `label_and_sample_proposals` gives. With `train_on_pred_boxes` their
                `proposal_boxes` become the predicted boxes, for the branches that follow.
            targets: N ground truths.
        """
        losses = self._box_losses(features, proposals, targets)
        return {
            **losses,
            **self._forward_mask(features, proposals),
            **self._forward_keypoint(features, proposals),
        }

    def predict(
        self, features: dict[str, Tensor], proposals: Sequence[Instances]
    ) -> list[Instances]:
        """Return the detections of every image, with the fields of every branch."""
        return self.forward_with_given_boxes(features, self._detect_boxes(features, proposals))

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: Sequence[Instances]
    ) -> list[Instances]:
        """Add the fields of the branches that work on detected boxes: `pred_masks` and `pred_keypoints`.

        Args:
            features: The backbone's features by name.
            instances: N times detections with `pred_boxes` and `pred_classes`. The fields are set
                on them.

        Raises:
            RuntimeError: In training, where these branches give losses.
            ValueError: Instances lack a field.
        """
        self._check_given(instances)
        return self._forward_keypoint(features, self._forward_mask(features, list(instances)))

    def _box_losses(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Instances],
        targets: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """Return the losses of the box branch; see `losses`."""
        predictions = self._predict_regions(features, proposals)
        losses = self.box_predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            with torch.no_grad():
                boxes = self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
            for boxes_i, proposals_i in zip(boxes, proposals, strict=True):
                proposals_i.proposal_boxes = Boxes(boxes_i)
        return losses

    def _detect_boxes(
        self, features: dict[str, Tensor], proposals: Sequence[Instances]
    ) -> list[Instances]:
        """Return what the box branch detects in every image: `pred_boxes`, `scores`,
        `pred_classes`.
        """
        instances, _ = self.box_predictor.inference(
            self._predict_regions(features, proposals), proposals
        )
        return instances

    def _forward_mask(self, features: dict[str, Tensor], instances: Sequence[Instances]) -> Any:
        """Run the mask branch: losses for sampled proposals in training, else detections with
        `pred_masks`.
        """
        if not self.mask_on:
            return {} if self.training else instances
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
        pooled = self.mask_pooler(
            [features[name] for name in self.mask_in_features], self._boxes(instances)
        )
        return self.mask_head(pooled, instances)

    def _forward_keypoint(self, features: dict[str, Tensor], instances: Sequence[Instances]) -> Any:
        """Run the keypoint branch: losses for sampled proposals in training, else detections with
        `pred_keypoints`.
        """
        if not self.keypoint_on:
            return {} if self.training else instances
        if self.training:
            instances, _ = select_foreground_proposals(instances, self.num_classes)
            instances = select_proposals_with_visible_keypoints(instances)
        pooled = self.keypoint_pooler(
            [features[name] for name in self.keypoint_in_features], self._boxes(instances)
        )
        return self.keypoint_head(pooled, instances)

    def _boxes(self, instances: Sequence[Instances]) -> list[Boxes]:
        """Return the boxes that masks and keypoints are looked for in: proposals in training, else
        detections.
        """
        return [x.proposal_boxes if self.training else x.pred_boxes for x in instances]

    def _predict_regions(
        self, features: dict[str, Tensor], proposals: Sequence[Instances]
    ) -> tuple[Tensor, Tensor]:
        """Run the box branch over the regions of all images at once: class logits (R, K + 1) and
        deltas.
        """
        levels = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(levels, [p.proposal_boxes for p in proposals])
        return self.box_predictor(self.box_head(pooled))


def _shapes_to_pool_from(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> list[ShapeSpec]:
    """Return the shapes of the features that MODEL.ROI_HEADS.IN_FEATURES names."""
    in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
    shapes = select_features(input_shape, in_features, "MODEL.ROI_HEADS.IN_FEATURES")
    if len({shape.channels for shape in shapes}) != 1:
        raise ValueError(
            "MODEL.ROI_HEADS.IN_FEATURES must have the same channels, since one head serves them"
            " all; got "
            + ", ".join(
                f"{name}: {shape.channels}" for name, shape in zip(in_features, shapes, strict=True)
            )
        )
    return shapes


def _pooler(
    shapes: Sequence[ShapeSpec], resolution: int, sampling_ratio: int, pooler_type: str
) -> tuple[ROIPooler, ShapeSpec]:
    """Build a pooler, see `ROIPooler`, and give the shape of what it pools."""
    pooler = ROIPooler(
        output_size=resolution,
        scales=[1.0 / _stride(shape) for shape in shapes],
        sampling_ratio=sampling_ratio,
        pooler_type=pooler_type,
    )
    return pooler, ShapeSpec(channels=shapes[0].channels, height=resolution, width=resolution)


def _stride(shape: ShapeSpec) -> int:
    if shape.stride is None:
        raise ValueError(f"regions can only be pooled from features of a known stride, got {shape}")
    return shape.stride


def _part(module: nn.Module | None, name: str) -> nn.Module:
    if module is None:
        raise ValueError(f"a branch with features needs all of its parts, but {name} is None")
    return module
