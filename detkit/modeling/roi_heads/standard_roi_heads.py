"""ROI heads with a branch per task, each with a pooler of its own.

Legend: N images, R regions over the batch, C channels, L levels, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.feature_selection import select_features
from detkit.modeling.poolers import ROIPooler
from detkit.modeling.roi_heads.build import ROI_HEADS_REGISTRY, build_box_head
from detkit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detkit.modeling.roi_heads.roi_heads import ROIHeads
from detkit.structures import Boxes, ImageList, Instances


@ROI_HEADS_REGISTRY.register()
class StandardROIHeads(ROIHeads):
    """A box branch, as in Fast R-CNN on a feature pyramid. Branches do not share layers.

    A further branch adds its parts in `from_config`, a term in `losses` and fields in `forward_with_given_boxes`.
    """

    @configurable
    def __init__(
        self,
        *,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_head: nn.Module,
        box_predictor: FastRCNNOutputLayers,
        train_on_pred_boxes: bool = False,
        **kwargs: Any,
    ) -> None:
        """Put the parts together.

        Args:
            box_in_features: Names of the L features that regions are pooled from, finest first.
            box_pooler: Features and boxes to features per region.
            box_head: Pooled features to what the predictor takes.
            box_predictor: Classes and boxes, their losses and inference.
            train_on_pred_boxes: Whether branches after the box branch are trained on its boxes instead of the
                proposals.
            **kwargs: Arguments of `ROIHeads`.
        """
        super().__init__(**kwargs)
        self.box_in_features = list(box_in_features)
        self.box_pooler = box_pooler
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.train_on_pred_boxes = train_on_pred_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments.

        Raises:
            ValueError: A branch is switched on that this version does not have.
        """
        for key, is_on in (("MODEL.MASK_ON", cfg.MODEL.MASK_ON), ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON)):
            if is_on:
                raise ValueError(f"{key} is True, but {cls.__name__} has only a box branch so far: set it to False")
        return {
            **super().from_config(cfg),
            **cls._init_box_head(cfg, input_shape),
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

    @staticmethod
    def _init_box_pooler(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> tuple[ROIPooler, ShapeSpec]:
        """Build the pooler of the box branch, and give the shape of what it pools."""
        in_features = cfg.MODEL.ROI_HEADS.IN_FEATURES
        shapes = select_features(input_shape, in_features, "MODEL.ROI_HEADS.IN_FEATURES")
        if len({shape.channels for shape in shapes}) != 1:
            raise ValueError(
                "MODEL.ROI_HEADS.IN_FEATURES must have the same channels, since one head serves them all; got "
                + ", ".join(f"{name}: {shape.channels}" for name, shape in zip(in_features, shapes, strict=True))
            )
        resolution = cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
        pooler = ROIPooler(
            output_size=resolution,
            scales=[1.0 / _stride(shape) for shape in shapes],
            sampling_ratio=cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO,
            pooler_type=cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE,
        )
        return pooler, ShapeSpec(channels=shapes[0].channels, height=resolution, width=resolution)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: Sequence[Instances],
        targets: Sequence[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Give the sampled proposals and the losses in training, detections and an empty dict else; see `ROIHeads`."""
        if not self.training:
            return self.predict(features, proposals), {}
        if targets is None:
            raise ValueError("the ROI heads need ground truth in training: targets is None")
        sampled = self.label_and_sample_proposals(proposals, targets)
        return sampled, self.losses(features, sampled, targets)

    def losses(
        self, features: dict[str, Tensor], proposals: Sequence[Instances], targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Give the losses of every branch.

        Args:
            features: The backbone's features by name.
            proposals: What `label_and_sample_proposals` gives. With `train_on_pred_boxes` their `proposal_boxes` become
                the predicted boxes, for the branches that follow.
            targets: N ground truths.
        """
        return self._box_losses(features, proposals, targets)

    def predict(self, features: dict[str, Tensor], proposals: Sequence[Instances]) -> list[Instances]:
        """Give the detections of every image, with the fields of every branch."""
        return self.forward_with_given_boxes(features, self._detect_boxes(features, proposals))

    def _box_losses(
        self, features: dict[str, Tensor], proposals: Sequence[Instances], targets: Sequence[Instances]
    ) -> dict[str, Tensor]:
        """Give the losses of the box branch; see `losses`."""
        predictions = self._predict_regions(features, proposals)
        losses = self.box_predictor.losses(predictions, proposals)
        if self.train_on_pred_boxes:
            with torch.no_grad():
                boxes = self.box_predictor.predict_boxes_for_gt_classes(predictions, proposals)
            for boxes_i, proposals_i in zip(boxes, proposals, strict=True):
                proposals_i.proposal_boxes = Boxes(boxes_i)
        return losses

    def _detect_boxes(self, features: dict[str, Tensor], proposals: Sequence[Instances]) -> list[Instances]:
        """Give what the box branch detects in every image: `pred_boxes`, `scores`, `pred_classes`."""
        instances, _ = self.box_predictor.inference(self._predict_regions(features, proposals), proposals)
        return instances

    def forward_with_given_boxes(self, features: dict[str, Tensor], instances: Sequence[Instances]) -> list[Instances]:
        """Add the fields of the branches that work on detected boxes, of which there is none yet; see `ROIHeads`."""
        for i, instances_i in enumerate(instances):
            for name in ("pred_boxes", "pred_classes"):
                if not instances_i.has(name):
                    raise ValueError(f"given instances of image {i} need a field {name!r}")
        return list(instances)

    def _predict_regions(self, features: dict[str, Tensor], proposals: Sequence[Instances]) -> tuple[Tensor, Tensor]:
        """Run the box branch over the regions of all images at once: class logits (R, K + 1) and deltas."""
        levels = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(levels, [p.proposal_boxes for p in proposals])
        return self.box_predictor(self.box_head(pooled))


def _stride(shape: ShapeSpec) -> int:
    if shape.stride is None:
        raise ValueError(f"regions can only be pooled from features of a known stride, got {shape}")
    return shape.stride
