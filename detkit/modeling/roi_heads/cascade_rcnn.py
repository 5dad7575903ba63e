"""Cascade R-CNN: box heads in a row, each on the boxes of the one before and trained for a higher overlap.

Source: Cai and Vasconcelos 2017, arXiv 1712.00726.

Legend: N images, R regions over the batch, R_i regions of image i, S stages, L levels, K classes.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.box_regression import Box2BoxTransform
from detkit.modeling.matcher import Matcher
from detkit.modeling.poolers import ROIPooler
from detkit.modeling.roi_heads.build import ROI_HEADS_REGISTRY, build_box_head
from detkit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, Predictions
from detkit.modeling.roi_heads.standard_roi_heads import StandardROIHeads
from detkit.structures import Boxes, Instances
from detkit.utils.events import get_event_storage, has_event_storage


@ROI_HEADS_REGISTRY.register()
class CascadeROIHeads(StandardROIHeads):
    """A box branch of S stages. The other branches are those of `StandardROIHeads`.

    They look at the boxes of the last stage, and are trained on the proposals of the first.
    """

    box_head: nn.ModuleList
    box_predictor: nn.ModuleList

    @configurable
    def __init__(
        self,
        *,
        box_in_features: Sequence[str],
        box_pooler: ROIPooler,
        box_heads: Sequence[nn.Module],
        box_predictors: Sequence[FastRCNNOutputLayers],
        proposal_matchers: Sequence[Matcher],
        **kwargs: Any,
    ) -> None:
        """Put the parts together.

        Args:
            box_in_features: Names of the L features that regions are pooled from, finest first.
            box_pooler: Features and boxes to features per region, for all stages.
            box_heads: One per stage; see `StandardROIHeads`.
            box_predictors: One per stage, each with one box for all classes.
            proposal_matchers: One per stage: what counts as an object there.
            **kwargs: Arguments of `StandardROIHeads`.

        Raises:
            ValueError: The stages do not agree in number, or a predictor has a box per class.
        """
        counts = (len(box_heads), len(box_predictors), len(proposal_matchers))
        if len(set(counts)) != 1 or counts[0] == 0:
            raise ValueError(
                f"a cascade needs a box head, a predictor and a matcher per stage: got {counts}"
            )
        for k, predictor in enumerate(box_predictors):
            if predictor.bbox_pred.out_features != 4:
                raise ValueError(
                    f"stage {k} of a cascade needs one box for all classes:"
                    " cls_agnostic_bbox_reg=True"
                )
        super().__init__(
            box_in_features=box_in_features,
            box_pooler=box_pooler,
            box_head=nn.ModuleList(box_heads),
            box_predictor=nn.ModuleList(box_predictors),  # type: ignore[arg-type]
            proposal_matcher=proposal_matchers[0],
            **kwargs,
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
        """Build the parts of the box branch: one pooler, and a head, a predictor and a matcher per
        stage.
        """
        _check_settings(cfg)
        pooler, pooled_shape = cls._init_box_pooler(cfg, input_shape)
        cascade = cfg.MODEL.ROI_BOX_CASCADE_HEAD
        heads = [build_box_head(cfg, pooled_shape) for _ in cascade.IOUS]
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler,
            "box_heads": heads,
            "box_predictors": [
                FastRCNNOutputLayers(
                    cfg, head.output_shape, box2box_transform=Box2BoxTransform(weights=weights)
                )
                for head, weights in zip(heads, cascade.BBOX_REG_WEIGHTS, strict=True)
            ],
            "proposal_matchers": [
                Matcher([iou], [0, 1], allow_low_quality_matches=False) for iou in cascade.IOUS
            ],
        }

    @property
    def _predictors(self) -> list[FastRCNNOutputLayers]:
        return list(self.box_predictor)  # type: ignore[arg-type]

    def _box_losses(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Instances],
        targets: Sequence[Instances],
    ) -> dict[str, Tensor]:
        """Return `loss_cls_stage0`, `loss_box_reg_stage0`, ...: the losses of every stage."""
        losses: dict[str, Tensor] = {}
        for k, (predictions, proposals_k) in enumerate(
            self._run_stages(features, proposals, targets)
        ):
            with (
                get_event_storage().name_scope(f"stage{k}")
                if has_event_storage()
                else nullcontext()
            ):
                losses_k = self._predictors[k].losses(predictions, proposals_k)
            losses.update((f"{name}_stage{k}", loss) for name, loss in losses_k.items())
        return losses

    def _detect_boxes(
        self, features: dict[str, Tensor], proposals: Sequence[Instances]
    ) -> list[Instances]:
        """Return the boxes of the last stage, scored by the mean over all stages."""
        stages = self._run_stages(features, proposals)
        probs = [self._predictors[k].predict_probs(*stage) for k, stage in enumerate(stages)]
        scores = [torch.stack(probs_i).mean(dim=0) for probs_i in zip(*probs, strict=True)]
        last = self._predictors[-1]
        boxes = last.predict_boxes(*stages[-1])
        instances, _ = last.detect(boxes, scores, [p.image_size for p in proposals])
        return instances

    def _run_stages(
        self,
        features: dict[str, Tensor],
        proposals: Sequence[Instances],
        targets: Sequence[Instances] | None = None,
    ) -> list[tuple[Predictions, Sequence[Instances]]]:
        """Return what each stage predicts, and for which proposals.

        Args:
            features: The backbone's features by name.
            proposals: Those of the first stage; in training sampled and labelled.
            targets: N ground truths in training, which label the proposals of the later stages.
        """
        levels = [features[name] for name in self.box_in_features]
        image_sizes = [p.image_size for p in proposals]
        stages: list[tuple[Predictions, Sequence[Instances]]] = []
        for k in range(self.num_cascade_stages):
            if stages:
                boxes = self._predictors[k - 1].predict_boxes(*stages[-1])
                proposals = self._create_proposals_from_boxes(boxes, image_sizes)
                if targets is not None:
                    proposals = self._match_and_label_boxes(proposals, k, targets)
            stages.append((self._run_stage(levels, proposals, k), proposals))
        return stages

    def _run_stage(
        self, levels: Sequence[Tensor], proposals: Sequence[Instances], stage: int
    ) -> Predictions:
        pooled = self.box_pooler(levels, [p.proposal_boxes for p in proposals])
        if self.training:
            # The paper's code averages the losses of the stages, but scales the gradients of the
            # heads up again. To add the losses and scale down what reaches the features comes to
            # the same.
            pooled = _ScaleGradient.apply(pooled, 1.0 / self.num_cascade_stages)
        return self.box_predictor[stage](self.box_head[stage](pooled))

    def _create_proposals_from_boxes(
        self, boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> list[Instances]:
        """Return what a stage predicts as proposals of the next: clipped to the image and without gradient.

        Boxes that are empty then are left out in training only: in inference the scores of all
        stages are averaged, region by region.
        """
        proposals = []
        for boxes_i, size_i in zip(boxes, image_sizes, strict=True):
            clipped = Boxes(boxes_i.detach())
            clipped.clip(size_i)
            proposals.append(
                Instances(
                    size_i, proposal_boxes=clipped[clipped.nonempty()] if self.training else clipped
                )
            )
        return proposals

    @torch.no_grad()
    def _match_and_label_boxes(
        self, proposals: Sequence[Instances], stage: int, targets: Sequence[Instances]
    ) -> list[Instances]:
        """Label all proposals by the overlap that this stage asks for. Nothing is sampled: there are few enough.

        Returns:
            Proposals with `gt_classes`, K for background, and `gt_boxes`, of meaning for foreground
            only.
        """
        labelled = [
            self._label(p, t, self.proposal_matchers[stage])
            for p, t in zip(proposals, targets, strict=True)
        ]
        if has_event_storage():
            with get_event_storage().name_scope(f"stage{stage}"):
                self._log_sample(labelled)
        return labelled

    def _label(self, proposals: Instances, targets: Instances, matcher: Matcher) -> Instances:
        matches, labels = matcher.match_boxes(targets.gt_boxes, proposals.proposal_boxes)
        if len(targets) > 0:
            classes = targets.gt_classes[matches].masked_fill(labels == 0, self.num_classes)
            gt_boxes = targets.gt_boxes[matches]
        else:
            classes, gt_boxes = torch.full_like(matches, self.num_classes), proposals.proposal_boxes
        boxes = proposals.proposal_boxes
        return Instances(
            proposals.image_size, proposal_boxes=boxes, gt_classes=classes, gt_boxes=gt_boxes
        )


class _ScaleGradient(torch.autograd.Function):
    """Gives its input, and passes a multiple of the gradient back."""

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
        raise ValueError(
            "MODEL.ROI_BOX_CASCADE_HEAD.IOUS and BBOX_REG_WEIGHTS need a value per stage each, got "
            f"{len(cascade.IOUS)} and {len(cascade.BBOX_REG_WEIGHTS)}"
        )
    if first != cascade.IOUS[0]:
        raise ValueError(
            "MODEL.ROI_HEADS.IOU_THRESHOLDS[0] and MODEL.ROI_BOX_CASCADE_HEAD.IOUS[0] are both the"
            f" overlap of the first stage and must be the same, got {first} and {cascade.IOUS[0]}"
        )
    if len(heads.IOU_THRESHOLDS) != 1 or list(heads.IOU_LABELS) != [0, 1]:
        raise ValueError(
            "MODEL.ROI_HEADS.IOU_THRESHOLDS and IOU_LABELS must be one overlap and [0, 1], since a"
            f" stage of a cascade ignores no proposal; got {list(heads.IOU_THRESHOLDS)} and"
            f" {list(heads.IOU_LABELS)}"
        )
    if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES and (cfg.MODEL.MASK_ON or cfg.MODEL.KEYPOINT_ON):
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True, but the later branches of"
            " CascadeROIHeads are trained on the proposals of the first stage: set it to False, or"
            " use StandardROIHeads"
        )
    if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG is False, but the stages of CascadeROIHeads"
            " hand on one box per region: set it to True"
        )
