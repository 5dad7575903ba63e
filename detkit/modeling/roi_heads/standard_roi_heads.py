"""ROI heads with a branch per task, each with its own pooler.

Legend: N images, R regions over the batch, C channels, L levels, K classes.
"""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.backbone import select_features
from detkit.modeling.matcher import Matcher
from detkit.modeling.poolers import ROIPooler
from detkit.modeling.roi_heads.build import (
    ROI_HEADS_REGISTRY,
    build_box_head,
    build_keypoint_head,
    build_mask_head,
)
from detkit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, Predictions
from detkit.modeling.roi_heads.roi_heads import (
    Features,
    Losses,
    ROIHeads,
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from detkit.structures import Boxes, Instances
from detkit.utils.errors import ConfigError


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(ROIHeads):
    """A box branch, as in Fast R-CNN on a feature pyramid, and optional mask and keypoint branches.

    Branches do not share layers. Each has a method for its losses and one for its predictions:
    `box_losses` and `predict_boxes`, `mask_losses` and `predict_masks`, `keypoint_losses` and
    `predict_keypoints`. All are called through `_forward_box`, `_forward_mask` and
    `_forward_keypoint`, which subclasses written for Detectron2 override. A subclass builds other
    parts for a branch in `_init_box_head`, `_init_mask_head` or `_init_keypoint_head`.

    Source: Girshick 2015, arXiv 1504.08083; He et al. 2017, arXiv 1703.06870; on a pyramid: Lin et
    al. 2016, arXiv 1612.03144, section 4.2.
    """

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        proposal_append_gt: bool = True,
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
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `ROIHeads`.

        Args:
            box_in_features: Names of the L features that regions are pooled from, finest first.
            box_pooler: Features and boxes to features per region.
            box_head: Pooled features to the input of the predictor.
            box_predictor: Classes and boxes, with their losses and inference; see
                `FastRCNNOutputLayers`.
            mask_in_features: As for boxes. None builds no mask branch.
            mask_pooler: As for boxes. None passes the features to the mask head by name.
            mask_head: See `ROI_MASK_HEAD_REGISTRY`.
            keypoint_in_features: As for boxes. None builds no keypoint branch.
            keypoint_pooler: As for masks.
            keypoint_head: See `ROI_KEYPOINT_HEAD_REGISTRY`.
            train_on_pred_boxes: Whether the later branches are trained on the predicted boxes
                instead of the proposals.
        """
        super().__init__(
            num_classes=num_classes,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_matcher=proposal_matcher,
            proposal_append_gt=proposal_append_gt,
        )
        self.in_features = self.box_in_features = list(box_in_features)
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        # The parts of a branch that is off are no attributes, as in Detectron2.
        self.mask_on = mask_in_features is not None
        if mask_in_features is not None:
            self.mask_in_features = list(mask_in_features)
            self.mask_pooler = mask_pooler
            self.mask_head = cast(nn.Module, mask_head)
        self.keypoint_on = keypoint_in_features is not None
        if keypoint_in_features is not None:
            self.keypoint_in_features = list(keypoint_in_features)
            self.keypoint_pooler = keypoint_pooler
            self.keypoint_head = cast(nn.Module, keypoint_head)
        self.train_on_pred_boxes = train_on_pred_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        arguments = super().from_config(cfg)
        # A classmethod per branch, so that a subclass can replace the parts of one. As in
        # Detectron2, a subclass that has made it a method of the object calls it itself.
        for build in (cls._init_box_head, cls._init_mask_head, cls._init_keypoint_head):
            if inspect.ismethod(build):
                arguments.update(build(cfg, input_shape))
        arguments["train_on_pred_boxes"] = cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES
        return arguments

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build the parts of the box branch."""
        pooler, pooled_shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        head = build_box_head(cfg, pooled_shape)
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler,
            "box_head": head,
            "box_predictor": FastRCNNOutputLayers(cfg, head.output_shape),
        }

    @classmethod
    def _init_mask_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build the parts of the mask branch, if MODEL.MASK_ON."""
        if not cfg.MODEL.MASK_ON:
            return {}
        pooler, pooled_shape = build_pooler(cfg, cfg.MODEL.ROI_MASK_HEAD, input_shape)
        return {
            "mask_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "mask_pooler": pooler,
            "mask_head": build_mask_head(cfg, pooled_shape),
        }

    @classmethod
    def _init_keypoint_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build the parts of the keypoint branch, if MODEL.KEYPOINT_ON."""
        if not cfg.MODEL.KEYPOINT_ON:
            return {}
        pooler, pooled_shape = build_pooler(cfg, cfg.MODEL.ROI_KEYPOINT_HEAD, input_shape)
        return {
            "keypoint_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "keypoint_pooler": pooler,
            "keypoint_head": build_keypoint_head(cfg, pooled_shape),
        }

    def losses(
        self, features: Features, proposals: Sequence[Instances], targets: Sequence[Instances]
    ) -> Losses:
        """Return the losses of every branch.

        Args:
            features: Features of the backbone, by name.
            proposals: Output of `label_and_sample_proposals`. With `train_on_pred_boxes` their
                `proposal_boxes` become the predicted boxes, for the branches that follow.
            targets: N ground truths.
        """
        losses = dict(cast(Losses, self._forward_box(features, proposals)))
        losses.update(cast(Losses, self._forward_mask(features, proposals)))
        losses.update(cast(Losses, self._forward_keypoint(features, proposals)))
        return losses

    def predict(self, features: Features, proposals: Sequence[Instances]) -> list[Instances]:
        """Return the detections of every image, with the fields of every branch."""
        detections = cast(list[Instances], self._forward_box(features, proposals))
        # The later branches use the detected boxes, not the proposals: those are fewer and
        # more accurate (He et al. 2017, section 3.1, inference).
        return self.forward_with_given_boxes(features, detections)

    def forward_with_given_boxes(
        self, features: Features, instances: Sequence[Instances]
    ) -> list[Instances]:
        """Add `pred_masks` and `pred_keypoints` to detected boxes, as far as there are branches.

        Args:
            features: Features of the backbone, by name.
            instances: N detections with `pred_boxes` and `pred_classes`. Fields are set on them.

        Raises:
            RuntimeError: The heads are in training mode.
            ValueError: Instances lack a field.
        """
        self._check_given(instances)
        instances = cast(list[Instances], self._forward_mask(features, list(instances)))
        return cast(list[Instances], self._forward_keypoint(features, instances))

    # Detectron2's entry points of the branches: its users' subclasses override them, and return
    # losses or detections by `self.training`. The methods they call return one type each.

    def _forward_box(
        self, features: Features, proposals: Sequence[Instances]
    ) -> Losses | list[Instances]:
        run = self.box_losses if self.training else self.predict_boxes
        return run(features, proposals)

    def _forward_mask(
        self, features: Features, instances: Sequence[Instances]
    ) -> Losses | list[Instances]:
        run = self.mask_losses if self.training else self.predict_masks
        return run(features, instances)

    def _forward_keypoint(
        self, features: Features, instances: Sequence[Instances]
    ) -> Losses | list[Instances]:
        run = self.keypoint_losses if self.training else self.predict_keypoints
        return run(features, instances)

    def box_losses(self, features: Features, proposals: Sequence[Instances]) -> Losses:
        """Return the losses of the box branch; see `losses`."""
        predictions = self._run_box_head(features, proposals)
        losses = self.box_predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            # The later branches see in training what they see in inference: refined boxes. No
            # gradient flows through the coordinates.
            with torch.no_grad():
                boxes = self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
            for boxes_i, proposals_i in zip(boxes, proposals, strict=True):
                proposals_i.proposal_boxes = type(proposals_i.proposal_boxes)(boxes_i)
        return losses

    def predict_boxes(self, features: Features, proposals: Sequence[Instances]) -> list[Instances]:
        """Return detections with `pred_boxes`, `scores` and `pred_classes`."""
        predictions = self._run_box_head(features, proposals)
        instances, _ = self.box_predictor.inference(predictions, proposals)
        return instances

    def mask_losses(self, features: Features, proposals: Sequence[Instances]) -> Losses:
        """Return the losses of the mask branch for sampled proposals; none without a branch."""
        if not self.mask_on:
            return {}
        # The loss is defined on foreground only (He et al. 2017, section 3.1).
        foreground, _ = select_foreground_proposals(proposals, self.num_classes)
        boxes = [p.proposal_boxes for p in foreground]
        pooled = _pool(features, self.mask_in_features, self.mask_pooler, boxes)
        return self.mask_head(pooled, foreground)

    def predict_masks(self, features: Features, instances: Sequence[Instances]) -> list[Instances]:
        """Return the detections with `pred_masks`; as they are if there is no mask branch."""
        if not self.mask_on:
            return list(instances)
        boxes = [x.pred_boxes for x in instances]
        pooled = _pool(features, self.mask_in_features, self.mask_pooler, boxes)
        return self.mask_head(pooled, list(instances))

    def keypoint_losses(self, features: Features, proposals: Sequence[Instances]) -> Losses:
        """Return the losses of the keypoint branch for sampled proposals; none without a branch."""
        if not self.keypoint_on:
            return {}
        foreground, _ = select_foreground_proposals(proposals, self.num_classes)
        foreground = select_proposals_with_visible_keypoints(foreground)
        boxes = [p.proposal_boxes for p in foreground]
        pooled = _pool(features, self.keypoint_in_features, self.keypoint_pooler, boxes)
        return self.keypoint_head(pooled, foreground)

    def predict_keypoints(
        self, features: Features, instances: Sequence[Instances]
    ) -> list[Instances]:
        """Return the detections with `pred_keypoints`; as they are if there is no branch."""
        if not self.keypoint_on:
            return list(instances)
        boxes = [x.pred_boxes for x in instances]
        pooled = _pool(features, self.keypoint_in_features, self.keypoint_pooler, boxes)
        return self.keypoint_head(pooled, list(instances))

    def _run_box_head(self, features: Features, proposals: Sequence[Instances]) -> Predictions:
        boxes = [p.proposal_boxes for p in proposals]
        pooled = _pool(features, self.box_in_features, self.box_pooler, boxes)
        return self.box_predictor(self.box_head(pooled))


def build_pooler(cfg: CfgNode, head: CfgNode, input_shape: dict[str, ShapeSpec]) -> tuple[Any, Any]:
    """Build the pooler of a branch.

    Args:
        cfg: The config; MODEL.ROI_HEADS.IN_FEATURES names the features.
        head: The node of the branch, with `POOLER_RESOLUTION` and the like.
        input_shape: Shapes of the backbone's features, by name.

    Returns:
        The pooler, and the shape of the pooled features. Without a `POOLER_TYPE` None, and the
        shapes of the features themselves by name.
    """
    in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
    if not head.POOLER_TYPE:
        return None, {name: input_shape[name] for name in in_features}
    shapes = select_features(input_shape, in_features, "MODEL.ROI_HEADS.IN_FEATURES")
    channels = {name: input_shape[name].channels for name in in_features}
    if len(set(channels.values())) != 1:
        listed = ", ".join(f"{name}: {number}" for name, number in channels.items())
        raise ConfigError(
            "MODEL.ROI_HEADS.IN_FEATURES must have the same channels, since one head serves all"
            f" of them; got {listed}"
        )
    scales: list[float] = []
    for shape in shapes:
        if shape.stride is None:
            raise ValueError(f"regions are pooled from features of a known stride, got {shape}")
        scales.append(1.0 / shape.stride)
    resolution = head.POOLER_RESOLUTION
    pooler = ROIPooler(
        output_size=resolution,
        scales=scales,
        sampling_ratio=head.POOLER_SAMPLING_RATIO,
        pooler_type=head.POOLER_TYPE,
    )
    return pooler, ShapeSpec(channels=shapes[0].channels, height=resolution, width=resolution)


def _pool(
    features: Features, names: Sequence[str], pooler: ROIPooler | None, boxes: Sequence[Boxes]
) -> Any:
    """Pool the regions from the named features; without a pooler, return the features by name."""
    # As in Detectron2: heads such as PointRend's sample features at points of their own.
    if pooler is None:
        return {name: features[name] for name in names}
    return pooler([features[name] for name in names], boxes)
