"""ROI heads that run the last stage of a ResNet over every region: the "C4" models.

Source: He et al. 2015, arXiv 1512.03385, appendix A.

Legend: N images, R regions over the batch, C channels, K classes.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.backbone import make_configured_stage, select_features, stage_module
from detkit.modeling.matcher import Matcher
from detkit.modeling.poolers import ROIPooler
from detkit.modeling.roi_heads.build import ROI_HEADS_REGISTRY, build_mask_head
from detkit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detkit.modeling.roi_heads.roi_heads import (
    Features,
    Losses,
    ROIHeads,
    select_foreground_proposals,
)
from detkit.structures import Boxes, Instances
from detkit.utils.errors import ConfigError
from detkit.utils.overriding import is_overridden, overridable


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeads(ROIHeads):
    """One pooler and one stage of residual blocks, which all branches share."""

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matcher: Matcher,
        proposal_append_gt: bool = True,
        in_features: Sequence[str],
        pooler: ROIPooler,
        res5: nn.Module | Sequence[nn.Module],
        box_predictor: FastRCNNOutputLayers,
        mask_head: nn.Module | None = None,
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `ROIHeads`.

        Args:
            in_features: Name of the one feature that regions are pooled from.
            pooler: Feature and boxes to features per region.
            res5: Pooled features to the features that branches share; or a sequence of blocks.
            box_predictor: Classes and boxes, from the mean over the cells of a region.
            mask_head: Masks, from the cells; see `ROI_MASK_HEAD_REGISTRY`. None builds no mask
                branch.
        """
        super().__init__(
            num_classes=num_classes,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_matcher=proposal_matcher,
            proposal_append_gt=proposal_append_gt,
        )
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
            ConfigError: There is not exactly one feature.
            ConfigError: A setting asks for something that these heads do not have.
        """
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        shapes = select_features(input_shape, names, "MODEL.ROI_HEADS.IN_FEATURES")
        if len(shapes) != 1:
            raise ConfigError(
                "MODEL.ROI_HEADS.IN_FEATURES must be one feature for Res5ROIHeads, got"
                f" {list(names)}"
            )
        if cfg.MODEL.KEYPOINT_ON:
            raise ConfigError(
                f"MODEL.KEYPOINT_ON is True, but {cls.__name__} has no keypoint branch"
            )
        if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES and cfg.MODEL.MASK_ON:
            raise ConfigError(
                "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True, but the branches of"
                f" {cls.__name__} share features of the proposals: set it to False"
            )
        head = cfg.MODEL.ROI_BOX_HEAD
        size = head.POOLER_RESOLUTION
        build: Any = cls._build_res5_block
        if not is_overridden(build):
            res5, channels = build(cfg, shapes[0].channels)
        elif inspect.ismethod(build):
            res5, channels = build(cfg)
        else:  # no classmethod in older code, such as MoCo's; Detectron2 makes it one
            res5, channels = build(cls, cfg)
        predictor = FastRCNNOutputLayers(cfg, ShapeSpec(channels=channels, height=1, width=1))
        mask_head = None
        if cfg.MODEL.MASK_ON:
            # As in Detectron2 the size before the stride of res5. No mask head depends on it.
            mask_head = build_mask_head(cfg, ShapeSpec(channels=channels, height=size, width=size))
        return {
            **super().from_config(cfg),
            "in_features": names,
            "pooler": ROIPooler(
                output_size=size,
                scales=[1.0 / (shapes[0].stride or 1)],
                sampling_ratio=head.POOLER_SAMPLING_RATIO,
                pooler_type=head.POOLER_TYPE,
            ),
            "res5": res5,
            "box_predictor": predictor,
            "mask_head": mask_head,
        }

    @classmethod
    @overridable
    def _build_res5_block(
        cls, cfg: CfgNode, in_channels: int | None = None
    ) -> tuple[nn.Module, int]:
        """Return the stage over the pooled features, and its channels.

        A subclass that builds another is given the config alone.

        Args:
            cfg: The config.
            in_channels: Of the pooled features; None for those of res4.
        """
        settings = cfg.MODEL.RESNETS
        blocks = make_configured_stage(settings, 3, in_channels or settings.RES2_OUT_CHANNELS * 4)
        return stage_module(settings, 3, blocks), blocks[-1].out_channels

    def losses(
        self, features: Features, proposals: Sequence[Instances], targets: Sequence[Instances]
    ) -> Losses:
        """Return the losses of every branch; see `ROIHeads`."""
        regions = self._regions(features, [p.proposal_boxes for p in proposals])
        # The mean over the cells, as the classifier of a ResNet averages its last stage.
        predictions = self.box_predictor(regions.mean(dim=(2, 3)))
        losses = self.box_predictor.losses(predictions, proposals)
        if self.mask_on:
            # The same features as for the boxes: res5 is the costly part, and runs once.
            foreground, is_foreground = select_foreground_proposals(proposals, self.num_classes)
            losses.update(self.mask_head(regions[torch.cat(is_foreground)], foreground))
        return losses

    def predict(self, features: Features, proposals: Sequence[Instances]) -> list[Instances]:
        """Return the detections of every image, with the fields of every branch."""
        regions = self._regions(features, [p.proposal_boxes for p in proposals])
        predictions = self.box_predictor(regions.mean(dim=(2, 3)))
        instances, _ = self.box_predictor.inference(predictions, proposals)
        return self.forward_with_given_boxes(features, instances)

    def forward_with_given_boxes(
        self, features: Features, instances: Sequence[Instances]
    ) -> list[Instances]:
        """Add `pred_masks`, if there is a mask branch, to detected boxes.

        Args:
            features: Features of the backbone, by name.
            instances: N detections with `pred_boxes` and `pred_classes`. The field is set on them.

        Raises:
            RuntimeError: The heads are in training mode.
            ValueError: Instances lack a field.
        """
        self._check_given(instances)
        if not self.mask_on:
            return list(instances)
        # Pooled again: detected boxes are not where the proposals were.
        regions = self._regions(features, [x.pred_boxes for x in instances])
        return self.mask_head(regions, list(instances))

    def _regions(self, features: Features, boxes: Sequence[Boxes]) -> Tensor:
        return self._shared_roi_transform([features[name] for name in self.in_features], boxes)

    def _shared_roi_transform(self, features: list[Tensor], boxes: Sequence[Boxes]) -> Tensor:
        """Return (R, C, H, W) features of the regions, which all branches share."""
        return self.res5(self.pooler(features, boxes))
