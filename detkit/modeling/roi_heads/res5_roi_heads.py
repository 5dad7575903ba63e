"""ROI heads that run the last stage of a ResNet over every region: the "C4" models.

Source: He et al. 2015, arXiv 1512.03385, appendix A.

Legend: N images, R regions over the batch, C channels, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import CNNBlockBase, ShapeSpec
from detkit.modeling.backbone import make_configured_stage, select_features, stage_module
from detkit.modeling.poolers import ROIPooler
from detkit.modeling.roi_heads.build import ROI_HEADS_REGISTRY, build_mask_head
from detkit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detkit.modeling.roi_heads.roi_heads import ROIHeads, select_foreground_proposals
from detkit.structures import Boxes, Instances


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(ROIHeads):
    """One pooler and one stage of residual blocks, which all branches share."""

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        pooler: ROIPooler,
        res5: nn.Module | Sequence[nn.Module],
        box_predictor: FastRCNNOutputLayers,
        mask_head: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Put the parts together.

        Args:
            in_features: Name of the one feature that regions are pooled from.
            pooler: Feature and boxes to features per region.
            res5: Pooled features to what the branches share; or the blocks of a sequence.
            box_predictor: Classes and boxes, from the mean over the cells of a region.
            mask_head: Masks, from the cells; see `ROI_MASK_HEAD_REGISTRY`. None is no mask branch.
            **kwargs: Arguments of `ROIHeads`.
        """
        super().__init__(**kwargs)
        self.in_features = list(in_features)
        self.pooler = pooler
        self.res5 = res5 if isinstance(res5, nn.Module) else nn.Sequential(*res5)
        self.box_predictor = box_predictor
        self.mask_on = mask_head is not None
        if mask_head is not None:
            self.mask_head = mask_head

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments.

        Raises:
            ValueError: There is not exactly one feature, or something is asked for that these heads
                do not have.
        """
        shape = _only_feature(cfg, input_shape)
        _check_settings(cfg, cls.__name__)
        head = cfg.MODEL.ROI_BOX_HEAD
        blocks = cls._build_res5_block(cfg, shape)
        channels = blocks[-1].out_channels
        # As in Detectron2 the size of the pooled regions, not of what res5 leaves of them: no mask
        # head asks for it.
        pooled_shape = ShapeSpec(
            channels=channels, height=head.POOLER_RESOLUTION, width=head.POOLER_RESOLUTION
        )
        return {
            **super().from_config(cfg),
            "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "pooler": ROIPooler(
                output_size=head.POOLER_RESOLUTION,
                scales=[1.0 / (shape.stride or 1)],
                sampling_ratio=head.POOLER_SAMPLING_RATIO,
                pooler_type=head.POOLER_TYPE,
            ),
            "res5": stage_module(cfg.MODEL.RESNETS, 3, blocks),
            "box_predictor": FastRCNNOutputLayers(
                cfg, ShapeSpec(channels=channels, height=1, width=1)
            ),
            "mask_head": build_mask_head(cfg, pooled_shape) if cfg.MODEL.MASK_ON else None,
        }

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode, shape: ShapeSpec) -> list[CNNBlockBase]:
        """Build the blocks over the pooled features. A subclass may build others."""
        return make_configured_stage(cfg.MODEL.RESNETS, 3, shape.channels or 0)

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Instances],
        targets: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """Return the losses of every branch; see `ROIHeads`."""
        regions = self._region_features(features, [p.proposal_boxes for p in proposals])
        losses = self.box_predictor.losses(self.box_predictor(regions.mean(dim=(2, 3))), proposals)
        if self.mask_on:
            foreground, is_foreground = select_foreground_proposals(proposals, self.num_classes)
            losses.update(self.mask_head(regions[torch.cat(is_foreground)], foreground))
        return losses

    def predict(
        self, features: dict[str, Tensor], proposals: Sequence[Instances]
    ) -> list[Instances]:
        """Return the detections of every image, with the fields of every branch."""
        regions = self._region_features(features, [p.proposal_boxes for p in proposals])
        instances, _ = self.box_predictor.inference(
            self.box_predictor(regions.mean(dim=(2, 3))), proposals
        )
        return self.forward_with_given_boxes(features, instances)

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: Sequence[Instances]
    ) -> list[Instances]:
        """Add `pred_masks`, if there is a mask branch, to detections with `pred_boxes` and `pred_classes`.

        Args:
            features: The backbone's features by name.
            instances: N times detections. The field is set on them.

        Raises:
            RuntimeError: In training, where the branch gives losses.
            ValueError: Instances lack a field.
        """
        self._check_given(instances)
        if not self.mask_on:
            return list(instances)
        return self.mask_head(
            self._region_features(features, [x.pred_boxes for x in instances]), list(instances)
        )

    def _region_features(self, features: dict[str, Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """Return (R, C, H, W): what all branches look at."""
        return self.res5(self.pooler([features[name] for name in self.in_features], boxes))


def _only_feature(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ShapeSpec:
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    shapes = select_features(input_shape, names, "MODEL.ROI_HEADS.IN_FEATURES")
    if len(shapes) != 1:
        raise ValueError(
            f"MODEL.ROI_HEADS.IN_FEATURES must be one feature for Res5ROIHeads, got {list(names)}"
        )
    return shapes[0]


def _check_settings(cfg: CfgNode, name: str) -> None:
    if cfg.MODEL.KEYPOINT_ON:
        raise ValueError(
            f"MODEL.KEYPOINT_ON is True, but {name} has no keypoint branch: use StandardROIHeads"
        )
    if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES and cfg.MODEL.MASK_ON:
        raise ValueError(
            f"MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True, but the branches of {name} share what"
            " is pooled from the proposals: set it to False, or use StandardROIHeads"
        )
