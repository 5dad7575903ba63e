"""ROI heads that run the last stage of a ResNet over every region: the "C4" models.

Source: He et al. 2015, arXiv 1512.03385, appendix A.

Legend: N images, R regions over the batch, C channels, K classes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import CNNBlockBase, ShapeSpec
from detkit.modeling.backbone import make_configured_stage
from detkit.modeling.feature_selection import select_features
from detkit.modeling.poolers import ROIPooler
from detkit.modeling.roi_heads.build import ROI_HEADS_REGISTRY
from detkit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detkit.modeling.roi_heads.roi_heads import ROIHeads
from detkit.structures import Boxes, ImageList, Instances


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
        **kwargs: Any,
    ) -> None:
        """Put the parts together.

        Args:
            in_features: Name of the one feature that regions are pooled from.
            pooler: Feature and boxes to features per region.
            res5: Pooled features to what the branches share; or the blocks of a sequence.
            box_predictor: Classes and boxes, from the mean over the cells of a region.
            **kwargs: Arguments of `ROIHeads`.
        """
        super().__init__(**kwargs)
        self.in_features = list(in_features)
        self.pooler = pooler
        self.res5 = res5 if isinstance(res5, nn.Module) else nn.Sequential(*res5)
        self.box_predictor = box_predictor

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments.

        Raises:
            ValueError: There is not exactly one feature, or a branch is switched on that these heads do not have.
        """
        shape = _only_feature(cfg, input_shape)
        if cfg.MODEL.KEYPOINT_ON:
            raise ValueError(
                f"MODEL.KEYPOINT_ON is True, but {cls.__name__} has no keypoint branch: use StandardROIHeads"
            )
        if cfg.MODEL.MASK_ON:
            raise ValueError(f"MODEL.MASK_ON is True, but {cls.__name__} has only a box branch so far: set it to False")
        head = cfg.MODEL.ROI_BOX_HEAD
        blocks = cls._build_res5_block(cfg, shape)
        return {
            **super().from_config(cfg),
            "in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "pooler": ROIPooler(
                output_size=head.POOLER_RESOLUTION,
                scales=[1.0 / (shape.stride or 1)],
                sampling_ratio=head.POOLER_SAMPLING_RATIO,
                pooler_type=head.POOLER_TYPE,
            ),
            "res5": blocks,
            "box_predictor": FastRCNNOutputLayers(cfg, ShapeSpec(channels=blocks[-1].out_channels, height=1, width=1)),
        }

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode, shape: ShapeSpec) -> list[CNNBlockBase]:
        """Give the blocks over the pooled features. A subclass may build others."""
        return make_configured_stage(cfg.MODEL.RESNETS, 3, shape.channels or 0)

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
        return sampled, self.losses(features, sampled)

    def losses(self, features: dict[str, Tensor], proposals: Sequence[Instances]) -> dict[str, Tensor]:
        """Give the losses of every branch.

        Args:
            features: The backbone's features by name.
            proposals: What `label_and_sample_proposals` gives.
        """
        regions = self._region_features(features, [p.proposal_boxes for p in proposals])
        return self.box_predictor.losses(self.box_predictor(regions.mean(dim=(2, 3))), proposals)

    def predict(self, features: dict[str, Tensor], proposals: Sequence[Instances]) -> list[Instances]:
        """Give the detections of every image, with the fields of every branch."""
        regions = self._region_features(features, [p.proposal_boxes for p in proposals])
        instances, _ = self.box_predictor.inference(self.box_predictor(regions.mean(dim=(2, 3))), proposals)
        return self.forward_with_given_boxes(features, instances)

    def forward_with_given_boxes(self, features: dict[str, Tensor], instances: Sequence[Instances]) -> list[Instances]:
        """Add the fields of the branches that work on detected boxes; see `ROIHeads`."""
        for i, instances_i in enumerate(instances):
            for name in ("pred_boxes", "pred_classes"):
                if not instances_i.has(name):
                    raise ValueError(f"given instances of image {i} need a field {name!r}")
        return list(instances)

    def _region_features(self, features: dict[str, Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """Give (R, C, H, W): what all branches look at."""
        return self.res5(self.pooler([features[name] for name in self.in_features], boxes))


def _only_feature(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ShapeSpec:
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    shapes = select_features(input_shape, names, "MODEL.ROI_HEADS.IN_FEATURES")
    if len(shapes) != 1:
        raise ValueError(f"MODEL.ROI_HEADS.IN_FEATURES must be one feature for Res5ROIHeads, got {list(names)}")
    return shapes[0]
