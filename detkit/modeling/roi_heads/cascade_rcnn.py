"""Cascade R-CNN: box heads in a row, each on the boxes of the one before.

Every stage is trained for a higher overlap than the one before, which improves the boxes that the
next one sees. A single head trained for a high overlap would find too few foreground proposals.

Source: Cai and Vasconcelos 2017, arXiv 1712.00726.

Legend: N images, R regions over the batch, R_i regions of image i, S stages, L levels, K classes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.box_regression import Box2BoxTransform
from detkit.modeling.matcher import Matcher
from detkit.modeling.poolers import ROIPooler
from detkit.modeling.roi_heads.build import ROI_HEADS_REGISTRY, build_box_head
from detkit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, Predictions
from detkit.modeling.roi_heads.roi_heads import Features, Losses
from detkit.modeling.roi_heads.standard_roi_heads import StandardROIHeads, build_pooler
from detkit.structures import Instances, boxes_in_image
from detkit.utils.errors import ConfigError
from detkit.utils.events import get_event_storage, has_event_storage


@ROI_HEADS_REGISTRY.register()
class CascadeROIHeads(StandardROIHeads):
    """A box branch of S stages. The other branches are those of `StandardROIHeads`.

    They use the boxes of the last stage, and are trained on the proposals of the first.
    """

    box_head: nn.ModuleList
    box_predictor: nn.ModuleList

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        proposal_matchers: Sequence[Matcher],
        proposal_append_gt: bool = True,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[FastRCNNOutputLayers],
        mask_in_features: Sequence[str] | None = None,
        mask_pooler: ROIPooler | None = None,
        mask_head: nn.Module | None = None,
        keypoint_in_features: Sequence[str] | None = None,
        keypoint_pooler: ROIPooler | None = None,
        keypoint_head: nn.Module | None = None,
        train_on_pred_boxes: bool = False,
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `StandardROIHeads`.

        Args:
            proposal_matchers: One per stage: the overlap that makes a proposal foreground there.
            box_pooler: Features and boxes to features per region, for all stages.
            box_heads: One per stage.
            box_predictors: One per stage, each with one box for all classes.

        Raises:
            ValueError: The stages do not agree in number.
            ValueError: A predictor has a box per class.
        """
        counts = (len(box_heads), len(box_predictors), len(proposal_matchers))
        if len(set(counts)) != 1 or counts[0] == 0:
            raise ValueError(
                f"a cascade needs a box head, a predictor and a matcher per stage: got {counts}"
            )
        for k, predictor in enumerate(box_predictors):
            bbox_pred = getattr(predictor, "bbox_pred", None)
            # Predictors of the user's own may have any layers.
            if isinstance(bbox_pred, nn.Linear) and bbox_pred.out_features != 4:
                raise ValueError(
                    f"stage {k} of a cascade needs one box for all classes:"
                    " cls_agnostic_bbox_reg=True"
                )
        super().__init__(
            num_classes=num_classes,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_matcher=proposal_matchers[0],
            proposal_append_gt=proposal_append_gt,
            box_in_features=box_in_features,
            box_pooler=box_pooler,
            box_head=nn.ModuleList(box_heads),
            box_predictor=nn.ModuleList(box_predictors),  # type: ignore[arg-type]
            mask_in_features=mask_in_features,
            mask_pooler=mask_pooler,
            mask_head=mask_head,
            keypoint_in_features=keypoint_in_features,
            keypoint_pooler=keypoint_pooler,
            keypoint_head=keypoint_head,
            train_on_pred_boxes=train_on_pred_boxes,
        )
        self.proposal_matchers = list(proposal_matchers)
        self.num_cascade_stages = len(box_heads)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        arguments = super().from_config(cfg, input_shape)
        del arguments["proposal_matcher"]  # the first of the matchers takes its place
        return arguments

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build one pooler, and a head, a predictor and a matcher per stage."""
        _check_settings(cfg)
        pooler, pooled_shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        # All heads before the predictors: the order decides which random weights each one gets.
        heads = [build_box_head(cfg, pooled_shape) for _ in cascade.IOUS]
        predictors: list[FastRCNNOutputLayers] = []
        for head, weights in zip(heads, cascade.BBOX_REG_WEIGHTS, strict=True):
            # Deltas shrink from stage to stage, so each has weights of its own (section 4.1).
            transform = Box2BoxTransform(weights=weights)
            predictors.append(
                FastRCNNOutputLayers(cfg, head.output_shape, box2box_transform=transform)
            )
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler,
            "box_heads": heads,
            "box_predictors": predictors,
            "proposal_matchers": [Matcher([iou], [0, 1]) for iou in cascade.IOUS],
        }

    @property
    def _predictors(self) -> list[FastRCNNOutputLayers]:
        return cast(list[FastRCNNOutputLayers], list(self.box_predictor))

    def losses(
        self, features: Features, proposals: Sequence[Instances], targets: Sequence[Instances]
    ) -> Losses:
        """Return the losses of every branch; see `StandardROIHeads`."""
        losses = dict(cast(Losses, self._forward_box(features, proposals, targets)))
        losses.update(cast(Losses, self._forward_mask(features, proposals)))
        losses.update(cast(Losses, self._forward_keypoint(features, proposals)))
        return losses

    def _forward_box(
        self,
        features: Features,
        proposals: Sequence[Instances],
        targets: Sequence[Instances] | None = None,
    ) -> Losses | list[Instances]:
        if self.training:
            return self.box_losses(features, proposals, targets)
        return self.predict_boxes(features, proposals)

    def box_losses(
        self,
        features: Features,
        proposals: Sequence[Instances],
        targets: Sequence[Instances] | None = None,
    ) -> Losses:
        """Return `loss_cls_stage0`, `loss_box_reg_stage0`, ...: the losses of every stage."""
        losses: Losses = {}
        stages = self._run_stages(features, proposals, targets)
        for k, (predictions, proposals_k) in enumerate(stages):
            with _name_scope(k):
                losses_k = self._predictors[k].losses(predictions, proposals_k)
            losses.update((f"{name}_stage{k}", loss) for name, loss in losses_k.items())
        return losses

    def predict_boxes(self, features: Features, proposals: Sequence[Instances]) -> list[Instances]:
        """Return the boxes of the last stage, scored by the mean over all stages (section 4.2)."""
        stages = self._run_stages(features, proposals)
        # Region by region: no stage drops or reorders regions in inference.
        probs = [self._predictors[k].predict_probs(*stage) for k, stage in enumerate(stages)]
        scores = [torch.stack(probs_i).mean(dim=0) for probs_i in zip(*probs, strict=True)]
        last = self._predictors[-1]
        boxes = last.predict_boxes(*stages[-1])
        instances, _ = last.detect(boxes, scores, [p.image_size for p in proposals])
        return instances

    def _run_stages(
        self,
        features: Features,
        proposals: Sequence[Instances],
        targets: Sequence[Instances] | None = None,
    ) -> list[tuple[Predictions, Sequence[Instances]]]:
        """Return the predictions of each stage, and the proposals they are made for.

        Args:
            features: Features of the backbone, by name.
            proposals: Those of the first stage; in training sampled and labelled.
            targets: N ground truths in training, which label the proposals of the later stages.
        """
        levels = [features[name] for name in self.box_in_features]
        image_sizes = [p.image_size for p in proposals]
        stages: list[tuple[Predictions, Sequence[Instances]]] = []
        for k in range(self.num_cascade_stages):
            if k > 0:
                boxes = self._predictors[k - 1].predict_boxes(*stages[-1])
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
                if targets is not None:
                    proposals = self._match_and_label_boxes(proposals, k, targets)
            stages.append((self._run_stage(levels, proposals, k), proposals))
        return stages

    def _run_stage(
        self, features: Sequence[Tensor], proposals: Sequence[Instances], stage: int
    ) -> Predictions:
        pooled = self.box_pooler(features, [p.proposal_boxes for p in proposals])
        if self.training:
            # The paper's code averages the losses of the stages, but scales the gradients of the
            # heads up again. Adding the losses and scaling down the gradient of the features is
            # the same.
            pooled = _ScaleGradient.apply(pooled, 1.0 / self.num_cascade_stages)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _create_proposals_from_boxes(
        self, boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Turn the predictions of a stage into proposals of the next: clipped, without gradient."""
        proposals = []
        for boxes_i, size_i in zip(boxes, image_sizes, strict=True):
            clipped = boxes_in_image(boxes_i.detach(), size_i)
            # Empty boxes are dropped in training only: in inference the scores of all stages are
            # averaged region by region.
            if self.training:
                clipped = clipped[clipped.nonempty()]
            proposals.append(Instances(size_i, proposal_boxes=clipped))
        return proposals

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: Sequence[Instances], stage: int, targets: Sequence[Instances]
    ) -> list[Instances]:
        """Label all proposals by the overlap of this stage. Nothing is sampled: there are few.

        Returns:
            Proposals with `gt_classes` too, K for background, and `gt_boxes`, which mean something
            for foreground only.
        """
        matcher = self.proposal_matchers[stage]
        labelled: list[Instances] = []
        for proposals_i, targets_i in zip(proposals, targets, strict=True):
            boxes = proposals_i.proposal_boxes
            matches, labels = matcher.match_boxes(targets_i.gt_boxes, boxes)
            if len(targets_i) > 0:
                classes = targets_i.gt_classes[matches].masked_fill(labels == 0, self.num_classes)
                gt_boxes = targets_i.gt_boxes[matches]
            else:
                classes, gt_boxes = torch.full_like(matches, self.num_classes), boxes
            # With the fields that a subclass has given them: Detic's keep their objectness.
            fields = {**proposals_i.get_fields(), "gt_classes": classes, "gt_boxes": gt_boxes}
            labelled.append(Instances(proposals_i.image_size, **fields))
        with _name_scope(stage):
            self._log_sample(labelled)
        return labelled


def _name_scope(stage: int) -> AbstractContextManager[None]:
    """Return a context in which scalars are logged under the name of a stage."""
    if not has_event_storage():
        return nullcontext()
    return get_event_storage().name_scope(f"stage{stage}")


class _ScaleGradient(torch.autograd.Function):
    """Identity that multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.scale, None


def _check_settings(cfg: CfgNode) -> None:
    cascade, heads = cfg.MODEL.ROI_BOX_CASCADE_HEAD, cfg.MODEL.ROI_HEADS
    first = heads.IOU_THRESHOLDS[0]
    if len(cascade.IOUS) == 0 or len(cascade.BBOX_REG_WEIGHTS) != len(cascade.IOUS):
        raise ConfigError(
            "MODEL.ROI_BOX_CASCADE_HEAD.IOUS and BBOX_REG_WEIGHTS need a value per stage each, got "
            f"{len(cascade.IOUS)} and {len(cascade.BBOX_REG_WEIGHTS)}"
        )
    if first != cascade.IOUS[0]:
        raise ConfigError(
            "MODEL.ROI_HEADS.IOU_THRESHOLDS[0] and MODEL.ROI_BOX_CASCADE_HEAD.IOUS[0] are both the"
            f" overlap of the first stage and must be the same, got {first} and {cascade.IOUS[0]}"
        )
    # A stage of a cascade ignores no proposal.
    if len(heads.IOU_THRESHOLDS) != 1 or list(heads.IOU_LABELS) != [0, 1]:
        raise ConfigError(
            "MODEL.ROI_HEADS.IOU_THRESHOLDS and IOU_LABELS must be one overlap and [0, 1], for a"
            f" cascade; got {list(heads.IOU_THRESHOLDS)} and {list(heads.IOU_LABELS)}"
        )
    if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES and (cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON):
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True, but CascadeROIHeads trains its later"
            " branches on the proposals of the first stage: set it to False"
        )
    # Otherwise the next stage would not know which of the boxes of a region to start from.
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ConfigError(
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, but the stages of CascadeROIHeads"
            " pass on one box per region: set it to True"
        )
