"""The region proposal network: where objects may be, over every cell of a feature pyramid.

Source: Ren et al. 2015, arXiv 1506.01497; on a pyramid: Lin et al. 2016, arXiv 1612.03144,
    section 4.1.

Legend: N images, C channels, L levels of H x W cells, A anchors per cell, B numbers per box (4; 5
if rotated), R_l = H_l * W_l * A anchors of level l, R anchors of all levels, M objects in one
image.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import Conv2d, ShapeSpec, cat
from detkit.layers.tensor_ops import split_nonzero
from detkit.modeling.anchor_generator import (
    AnchorGenerator,
    build_anchor_generator,
    same_on_all_levels,
)
from detkit.modeling.backbone import select_features
from detkit.modeling.box_regression import (
    Box2BoxTransform,
    box_regression_loss,
    check_box_loss_type,
)
from detkit.modeling.matcher import Matcher
from detkit.modeling.proposal_generator.build import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN_HEAD_REGISTRY,
    build_rpn_head,
)
from detkit.modeling.proposal_generator.proposals import select_proposals, top_indices_per_level
from detkit.modeling.sampling import subsample_masks
from detkit.structures import Boxes, ImageList, Instances
from detkit.utils.events import get_event_storage, has_event_storage
from detkit.utils.overriding import is_overridden, overridable


@RPN_HEAD_REGISTRY.register()
class StandardRPNHead(nn.Module):
    """3x3 convolutions, then a 1x1 each for objectness and deltas. All levels share them.

    Where levels differ in their number of anchors, a level uses the first of the predictions.

    Source: Ren et al. 2015, arXiv 1506.01497, section 3.1.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_anchors: int | Sequence[int],
        box_dim: int = 4,
        conv_dims: Sequence[int] = (-1,),
    ) -> None:
        """Build the head.

        Args:
            in_channels: C of every level.
            num_anchors: A of all levels, or of each level.
            box_dim: B, the deltas per anchor.
            conv_dims: Channels of each 3x3 convolution; -1 keeps those of its input.

        Raises:
            ValueError: There is no convolution.
            ValueError: Channels are neither positive nor -1.
        """
        super().__init__()
        if not conv_dims or not all(dim == -1 or dim > 0 for dim in conv_dims):
            raise ValueError(
                "conv_dims must have a number per convolution, positive or -1 (as the input), got"
                f" {list(conv_dims)}"
            )
        convs: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for k, dim in enumerate(conv_dims):
            out_channels = channels if dim == -1 else dim
            convs[f"conv{k}"] = self._get_rpn_conv(channels, out_channels)
            channels = out_channels
        # Names of weights as in Detectron2: `conv` for a single one, `conv.conv0`, `conv.conv1`,
        # ... for several.
        self.conv = convs["conv0"] if len(convs) == 1 else nn.Sequential(convs)
        self._anchors_per_level = None if isinstance(num_anchors, int) else list(num_anchors)
        self._box_dim = box_dim
        most = num_anchors if isinstance(num_anchors, int) else max(num_anchors)
        self.objectness_logits = nn.Conv2d(channels, most, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(channels, most * box_dim, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def _get_rpn_conv(self, in_channels: int, out_channels: int) -> nn.Module:
        """Return one of the 3x3 convolutions, with its activation. A subclass may take another."""
        # The ReLU works in place: the convolution does not need its output for the gradient, and
        # that of p2 is among the largest maps.
        relu = nn.ReLU(inplace=True)
        return Conv2d(in_channels, out_channels, kernel_size=3, padding=1, activation=relu)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments.

        Raises:
            ConfigError: The levels differ in channels.
        """
        anchor_generator = build_anchor_generator(cfg, input_shape)
        channels = [shape.channels for shape in input_shape]
        num_anchors = anchor_generator.num_anchors
        return {
            "in_channels": same_on_all_levels(channels, "channels", "MODEL.RPN.IN_FEATURES"),
            "num_anchors": num_anchors[0] if len(set(num_anchors)) == 1 else num_anchors,
            "box_dim": anchor_generator.box_dim,
            "conv_dims": cfg.MODEL.RPN.CONV_DIMS,
        }

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict for every anchor of every level.

        Args:
            features: Maps (N, C, H, W).

        Returns:
            Per level the objectness logits (N, A, H, W). Per level the deltas (N, A * B, H, W):
            those of anchor a are the channels B a to B a + B - 1.
        """
        hidden = [self.conv(x) for x in features]
        logits = [self.objectness_logits(x) for x in hidden]
        deltas = [self.anchor_deltas(x) for x in hidden]
        if self._anchors_per_level is not None:
            for level, num_anchors in enumerate(self._anchors_per_level):
                logits[level] = logits[level][:, :num_anchors]
                deltas[level] = deltas[level][:, : num_anchors * self._box_dim]
        return logits, deltas


@PROPOSAL_GENERATOR_REGISTRY.register()
class RPN(nn.Module):
    """Scores and refines the anchors of every level, and returns the best as proposals."""

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        head: nn.Module,
        anchor_generator: AnchorGenerator,
        anchor_matcher: Matcher,
        box2box_transform: Box2BoxTransform,
        batch_size_per_image: int,
        positive_fraction: float,
        pre_nms_topk: tuple[int, int],
        post_nms_topk: tuple[int, int],
        nms_thresh: float = 0.7,
        min_box_size: float = 0.0,
        score_thresh: float = 0.0,
        anchor_boundary_thresh: int = -1,
        loss_weight: float | dict[str, float] = 1.0,
        box_reg_loss_type: str = "smooth_l1",
        smooth_l1_beta: float = 0.0,
    ) -> None:
        """Set the parts.

        Args:
            in_features: Names of the L features, in the order of the anchor generator.
            head: Features to logits and deltas; see `RPN_HEAD_REGISTRY`.
            anchor_generator: Features to anchors.
            anchor_matcher: Labels anchors by their IoU with the ground truth.
            box2box_transform: Encodes boxes as deltas.
            batch_size_per_image: Anchors per image that the losses sample.
            positive_fraction: Largest share of them that is foreground.
            pre_nms_topk: Proposals per level before NMS, in (training, inference).
            post_nms_topk: Proposals per image after NMS, in (training, inference).
            nms_thresh: IoU above which the lower-scored of two proposals of a level is suppressed.
            min_box_size: Proposals must be wider and higher than this, in pixels.
            score_thresh: Proposals need this probability of an object, in [0, 1]; 0 takes all.
            anchor_boundary_thresh: Anchors that extend over the image by more pixels than this are
                not trained; negative trains all.
            loss_weight: Factor on both losses, or one per name.
            box_reg_loss_type: See `BOX_LOSS_TYPES`.
            smooth_l1_beta: See `box_regression_loss`.
        """
        super().__init__()
        self.in_features = list(in_features)
        self.rpn_head = head
        self.anchor_generator = anchor_generator
        self.anchor_matcher = anchor_matcher
        self.box2box_transform = box2box_transform
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.pre_nms_topk = {True: pre_nms_topk[0], False: pre_nms_topk[1]}
        self.post_nms_topk = {True: post_nms_topk[0], False: post_nms_topk[1]}
        self.nms_thresh = nms_thresh
        self.min_box_size = min_box_size
        self.score_thresh = score_thresh
        self.anchor_boundary_thresh = anchor_boundary_thresh
        if not isinstance(loss_weight, dict):
            loss_weight = {"loss_rpn_cls": loss_weight, "loss_rpn_loc": loss_weight}
        self.loss_weight = loss_weight
        self.box_reg_loss_type = check_box_loss_type(box_reg_loss_type, box2box_transform)
        self.smooth_l1_beta = smooth_l1_beta

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        rpn = cfg.MODEL.RPN
        shapes = select_features(input_shape, rpn.IN_FEATURES, "MODEL.RPN.IN_FEATURES")
        return {
            "in_features": rpn.IN_FEATURES,
            "head": build_rpn_head(cfg, shapes),
            "anchor_generator": build_anchor_generator(cfg, shapes),
            # The best anchor of an object is foreground even below the threshold (section 3.1.2):
            # small objects may have no anchor above it.
            "anchor_matcher": Matcher(
                rpn.IOU_THRESHOLDS, rpn.IOU_LABELS, allow_low_quality_matches=True
            ),
            "box2box_transform": cls._init_box2box_transform(cfg),
            "batch_size_per_image": rpn.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": rpn.POSITIVE_FRACTION,
            "pre_nms_topk": (rpn.PRE_NMS_TOPK_TRAIN, rpn.PRE_NMS_TOPK_TEST),
            "post_nms_topk": (rpn.POST_NMS_TOPK_TRAIN, rpn.POST_NMS_TOPK_TEST),
            "nms_thresh": rpn.NMS_THRESH,
            "min_box_size": cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE,
            "score_thresh": rpn.SCORE_THRESH,
            "anchor_boundary_thresh": rpn.BOUNDARY_THRESH,
            "loss_weight": {
                "loss_rpn_cls": rpn.LOSS_WEIGHT,
                "loss_rpn_loc": rpn.BBOX_REG_LOSS_WEIGHT * rpn.LOSS_WEIGHT,
            },
            "box_reg_loss_type": rpn.BBOX_REG_LOSS_TYPE,
            "smooth_l1_beta": rpn.SMOOTH_L1_BETA,
        }

    @classmethod
    def _init_box2box_transform(cls, cfg: CfgNode) -> Box2BoxTransform:
        """Build the encoding of boxes as deltas."""
        return Box2BoxTransform(weights=cfg.MODEL.RPN.BBOX_REG_WEIGHTS)

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: Sequence[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Propose boxes; in training also compute the losses.

        Args:
            images: The batch; only its sizes are used.
            features: Features of the backbone, by name.
            gt_instances: N ground truths with `gt_boxes`; needed in training.

        Returns:
            Per image the proposals, best first: `proposal_boxes` and `objectness_logits`, without
            gradient. The losses `loss_rpn_cls` and `loss_rpn_loc` in training, else an empty dict.
        """
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(levels)
        logit_maps, delta_maps = self.rpn_head(levels)
        # From maps (N, A, H, W) and (N, A * B, H, W) to the order of the anchors, (N, H * W * A)
        # and (N, H * W * A, B). Without a copy if the maps are channels-last and float32.
        logits = [x.permute(0, 2, 3, 1).flatten(1).float() for x in logit_maps]
        box_dim = self.anchor_generator.box_dim
        deltas = [
            x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, box_dim)).float() for x in delta_maps
        ]
        losses: dict[str, Tensor] = {}
        if self.training:
            if gt_instances is None:
                raise ValueError("the RPN needs ground truth in training: gt_instances is None")
            gt_labels, gt_boxes = self.label_and_sample_anchors(anchors, gt_instances)
            losses = self.losses(anchors, logits, gt_labels, deltas, gt_boxes)
        return self.predict_proposals(anchors, logits, deltas, images.image_sizes), losses

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: Sequence[Boxes], gt_instances: Sequence[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors with the ground truth, and sample those that the losses use.

        Args:
            anchors: Anchors of each level.
            gt_instances: Ground truth of each image; without objects all anchors are background.

        Returns:
            Per image (R,) int8 labels: 1 foreground, 0 background, -1 not used.
            Per image (R, B) boxes matched with the anchors; they mean something for label 1 only.
        """
        all_anchors = type(anchors[0]).cat(list(anchors))
        labels: list[Tensor] = []
        matched_boxes: list[Tensor] = []
        for gt_i in gt_instances:
            gt_boxes = gt_i.gt_boxes
            matches_i, labels_i = self.anchor_matcher.match_boxes(gt_boxes, all_anchors)
            if self.anchor_boundary_thresh >= 0:
                # Section 3.3 of the paper; its follow-up on pyramids trains all anchors.
                is_inside = all_anchors.inside_box(gt_i.image_size, self.anchor_boundary_thresh)
                labels_i = labels_i.masked_fill(~is_inside, -1)
            labels.append(labels_i)
            # Without objects nothing is foreground, and any box will do.
            if len(gt_boxes) > 0:
                matched_boxes.append(gt_boxes.tensor[matches_i])
            else:
                matched_boxes.append(torch.zeros_like(all_anchors.tensor))
        if is_overridden(self._subsample_labels):
            return [self._subsample_labels(labels_i) for labels_i in labels], matched_boxes
        # All images at once, without waiting for the device.
        return list(self._subsample_labels(torch.stack(labels))), matched_boxes

    @overridable
    def _subsample_labels(self, label: Tensor) -> Tensor:
        """Return int8 labels in which the anchors that are not sampled are -1.

        A subclass that overrides it is called with the labels of one image at a time.

        Args:
            label: (..., R) labels: 1, 0 or -1.
        """
        positive, negative = subsample_masks(
            label, self.batch_size_per_image, self.positive_fraction, bg_label=0
        )
        return torch.where(positive, 1, torch.where(negative, 0, -1)).to(torch.int8)

    def losses(
        self,
        anchors: Sequence[Boxes],
        pred_objectness_logits: Sequence[Tensor],
        gt_labels: Sequence[Tensor],
        pred_anchor_deltas: Sequence[Tensor],
        gt_boxes: Sequence[Tensor],
    ) -> dict[str, Tensor]:
        """Compute the losses of the sampled anchors.

        Args:
            anchors: Anchors of each level.
            pred_objectness_logits: Per level (N, R_l).
            gt_labels: Per image (R,): 1, 0 or -1; see `label_and_sample_anchors`.
            pred_anchor_deltas: Per level (N, R_l, B).
            gt_boxes: Per image (R, B).

        Returns:
            `loss_rpn_cls` and `loss_rpn_loc`, each a sum divided by N * batch_size_per_image.
        """
        labels = torch.stack(list(gt_labels))
        num_images = len(labels)
        # One wait for the device, to gather the few hundred sampled anchors of some 270,000 per
        # image: losses over all anchors would cost time and memory instead.
        masks = [labels.flatten() >= 0, labels.flatten() == 1]
        num_sampled, num_positive = torch.stack([mask.sum() for mask in masks]).tolist()
        sampled, positive = (
            (index // labels.shape[1], index % labels.shape[1])
            for index in split_nonzero(masks, [num_sampled, num_positive])
        )
        if has_event_storage():
            storage = get_event_storage()
            storage.put_scalar("rpn/num_pos_anchors", num_positive / num_images)
            storage.put_scalar("rpn/num_neg_anchors", (num_sampled - num_positive) / num_images)
        loss_cls = F.binary_cross_entropy_with_logits(
            cat(list(pred_objectness_logits), dim=1)[sampled],
            labels[sampled].float(),
            reduction="sum",
        )
        loss_loc = box_regression_loss(
            cat(list(pred_anchor_deltas), dim=1)[positive],
            type(anchors[0]).cat(list(anchors)).tensor[positive[1]],
            torch.stack(list(gt_boxes))[positive],
            transform=self.box2box_transform,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        # The same divisor for both losses and however many anchors could be sampled, so that an
        # anchor has the same weight in every batch.
        normalizer = self.batch_size_per_image * num_images
        losses = {"loss_rpn_cls": loss_cls / normalizer, "loss_rpn_loc": loss_loc / normalizer}
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: Sequence[Boxes],
        pred_objectness_logits: Sequence[Tensor],
        pred_anchor_deltas: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """Decode the best predictions of every level and reduce them to proposals.

        Args:
            anchors: Anchors of each level.
            pred_objectness_logits: Per level (N, R_l).
            pred_anchor_deltas: Per level (N, R_l, B).
            image_sizes: N times (height, width).
        """
        # No gradient flows through the boxes: the ROI heads take them as given ("approximate joint
        # training", section 3.2 of the paper).
        #
        # The best of each level are picked before boxes are decoded: of some 270,000 anchors per
        # image a few thousand.
        picked = top_indices_per_level(pred_objectness_logits, self.pre_nms_topk[self.training])
        if is_overridden(self._decode_proposals):
            decoded = self._decode_proposals(list(anchors), list(pred_anchor_deltas))
            return self._proposals_of(
                [_gathered(x, idx) for x, idx in zip(decoded, picked, strict=True)],
                pred_objectness_logits,
                picked,
                image_sizes,
                type(anchors[0]),
            )
        deltas: list[Tensor] = []
        start: list[Tensor] = []
        for level, idx in enumerate(picked):
            deltas.append(_gathered(pred_anchor_deltas[level], idx))
            start.append(anchors[level].tensor[idx])
        start_boxes = cat(start, dim=1)
        boxes = self.box2box_transform.apply_deltas(
            cat(deltas, dim=1).flatten(0, 1), start_boxes.flatten(0, 1)
        )
        return self._proposals_of(
            [boxes.view_as(start_boxes)],
            pred_objectness_logits,
            picked,
            image_sizes,
            type(anchors[0]),
        )

    @overridable
    def _decode_proposals(
        self, anchors: list[Boxes], pred_anchor_deltas: list[Tensor]
    ) -> list[Tensor]:
        """Return per level the (N, R_l, B) boxes of all anchors.

        For subclasses that override it; otherwise only the best anchors are decoded.
        """
        return [
            self.box2box_transform.apply_deltas(
                deltas_l.flatten(0, 1), anchors_l.tensor.repeat(len(deltas_l), 1)
            ).view_as(deltas_l)
            for anchors_l, deltas_l in zip(anchors, pred_anchor_deltas, strict=True)
        ]

    def _proposals_of(
        self,
        boxes: Sequence[Tensor],
        logits: Sequence[Tensor],
        picked: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        box_class: type[Boxes],
    ) -> list[Instances]:
        """Reduce the picked boxes, (N, K, B) in the order of the levels, to proposals."""
        pairs = zip(logits, picked, strict=True)
        return select_proposals(
            cat(list(boxes), dim=1),
            cat([logits_l.gather(1, idx) for logits_l, idx in pairs], dim=1),
            cat([torch.full_like(idx[0], level) for level, idx in enumerate(picked)], dim=0),
            image_sizes,
            nms_thresh=self.nms_thresh,
            post_nms_topk=self.post_nms_topk[self.training],
            min_box_size=self.min_box_size,
            training=self.training,
            box_class=box_class,
            score_thresh=self.score_thresh,
        )


def _gathered(values: Tensor, idx: Tensor) -> Tensor:
    """Return the (N, K, B) values at indices (N, K) of (N, R_l, B)."""
    return values.gather(1, idx[..., None].expand(-1, -1, values.shape[-1]))
