"""RetinaNet: one stage, trained on every anchor with a loss that background cannot dominate.

Of some 100,000 anchors in an image nearly all are easy background. A two-stage detector leaves them
out by sampling; the focal loss weighs them down instead, so that no second stage is needed.

Source: Lin et al. 2017, arXiv 1708.02002.

Legend: N images, C channels, L levels, A anchors per cell, H x W cells of a level, R_l anchors of
    level l, R anchors of all levels, K classes, M objects in one image.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable, declare_architecture
from detkit.layers import (
    Conv2d,
    CycleBatchNormList,
    NMSMethod,
    ShapeSpec,
    cat,
    get_norm,
    nonzero_tuple,
)
from detkit.modeling.anchor_generator import (
    AnchorGenerator,
    build_anchor_generator,
    same_on_all_levels,
)
from detkit.modeling.backbone import Backbone, select_features
from detkit.modeling.box_regression import (
    Box2BoxTransform,
    box_regression_loss,
    check_box_loss_type,
)
from detkit.modeling.detection_filter import nms_method
from detkit.modeling.matcher import Matcher
from detkit.modeling.meta_arch.build import META_ARCH_REGISTRY
from detkit.modeling.meta_arch.dense_detector import (
    DenseDetector,
    HeadOutput,
    focal_loss_of_levels,
    indexed_sizes,
)
from detkit.structures import Boxes, ImageList, Instances

# Detectron2's: the average number of foreground anchors before the first batch.
_INITIAL_NORMALIZER = 100.0


class RetinaNetHead(nn.Module):
    """A subnet of 3x3 convolutions for the classes and one for the boxes (section 4 of the paper).

    The levels share both subnets. Batch norm shares its weights but keeps statistics per level,
    since they differ there. Any other norm is shared completely.
    """

    _features_key = "MODEL.RETINANET.IN_FEATURES"

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: int | Sequence[int],
        conv_dims: Sequence[int],
        norm: str = "",
        prior_prob: float = 0.01,
    ) -> None:
        """Build the layers.

        Args:
            input_shape: Shapes of the L levels, all of C channels.
            num_classes: K
            num_anchors: A of all levels, or of each level, which then uses the first of the
                predictions.
            conv_dims: Channels of each convolution of a subnet.
            norm: Name of the norm after each of them; see `get_norm`.
            prior_prob: Score of every class before training, in (0, 1).

        Raises:
            ValueError: `prior_prob` is out of range.
            ConfigError: The levels differ in channels.
        """
        super().__init__()
        if not 0 < prior_prob < 1:
            raise ValueError(f"prior_prob must be between 0 and 1, got {prior_prob}")
        self.num_levels = len(input_shape)
        in_channels = same_on_all_levels(
            [shape.channels for shape in input_shape], "channels", self._features_key
        )
        self.cls_subnet = self._subnet(in_channels, conv_dims, norm)
        self.bbox_subnet = self._subnet(in_channels, conv_dims, norm)
        channels = conv_dims[-1] if conv_dims else in_channels
        self.num_classes = num_classes
        self.num_anchors = (
            [num_anchors] * self.num_levels if isinstance(num_anchors, int) else list(num_anchors)
        )
        most = max(self.num_anchors)
        self.cls_score = Conv2d(channels, most * num_classes, kernel_size=3, padding=1)
        self.bbox_pred = Conv2d(channels, most * 4, kernel_size=3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        # Nearly all anchors are background: from a score of one half, their losses would outweigh
        # those of the few objects at first (section 3.3 of the paper).
        prior = -math.log((1 - prior_prob) / prior_prob)
        nn.init.constant_(self.get_parameter("cls_score.bias"), prior)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        retinanet = cfg.MODEL.RETINANET
        num_anchors = build_anchor_generator(cfg, input_shape).num_anchors
        return {
            "input_shape": input_shape,
            "num_classes": retinanet.NUM_CLASSES,
            "num_anchors": num_anchors,
            "conv_dims": [input_shape[0].channels] * retinanet.NUM_CONVS,
            "norm": retinanet.NORM,
            "prior_prob": retinanet.PRIOR_PROB,
        }

    def _subnet(self, channels: int, conv_dims: Sequence[int], norm: str) -> nn.Sequential:
        layers: list[nn.Module] = []
        for dim in conv_dims:
            layers.append(Conv2d(channels, dim, kernel_size=3, padding=1))
            norm_layer = get_norm(norm, dim)
            if norm_layer is not None and norm in ("BN", "SyncBN"):
                # Of the class that this process uses: SyncBN may be a plain BN.
                kind = type(norm_layer)
                norm_layer = CycleBatchNormList(self.num_levels, kind, num_features=dim)
            if norm_layer is not None:
                layers.append(norm_layer)
            layers.append(nn.ReLU(inplace=True))
            channels = dim
        return nn.Sequential(*layers)

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict for every anchor of every level.

        Args:
            features: L maps (N, C, H, W).

        Returns:
            Per level the class logits (N, A * K, H, W): those of anchor a are the channels K a to K
            a + K - 1. Per level the deltas (N, A * 4, H, W), likewise.

        Raises:
            ValueError: There are not L features.
        """
        self.check_levels(features)
        logits, deltas = [], []
        for level, x in enumerate(features):
            num_anchors = self.num_anchors[level]
            scores = self.cls_score(run_subnet(self.cls_subnet, x, level))
            logits.append(scores[:, : num_anchors * self.num_classes])
            boxes = self.predict_boxes(run_subnet(self.bbox_subnet, x, level))
            deltas.append(boxes[:, : num_anchors * 4])
        return logits, deltas

    def predict_boxes(self, hidden: Tensor) -> Tensor:
        """Return the deltas (N, A * 4, H, W) of one level from the last map of the box subnet.

        They are in the dtype of the weights, also under autocast, except in training.
        """
        device_type = hidden.device.type
        if self.training or not torch.is_autocast_enabled(device_type):
            return self.bbox_pred(hidden)
        # bfloat16 has 8 bits: a distance of 100 pixels would be off by 0.2, which took 0.23 off the
        # AP of FCOS's quick start, and 0.08 so.
        with torch.autocast(device_type, enabled=False):
            return self.bbox_pred(hidden.to(self.bbox_pred.weight.dtype))

    def check_levels(self, features: Sequence[Tensor]) -> None:
        """Raise a ValueError if there are not L features."""
        if len(features) != self.num_levels:
            raise ValueError(
                f"the head is built for {self.num_levels} levels, got {len(features)} features"
            )


def run_subnet(subnet: nn.Sequential, x: Tensor, level: int) -> Tensor:
    """Return the map (N, C, H, W) of one level after the layers of a subnet."""
    for layer in subnet:
        x = layer(x, level) if isinstance(layer, CycleBatchNormList) else layer(x)
    return x


@META_ARCH_REGISTRY.register()
@declare_architecture(
    num_classes="MODEL.RETINANET.NUM_CLASSES",
    score_thresholds=["MODEL.RETINANET.SCORE_THRESH_TEST"],
    nms_threshold="MODEL.RETINANET.NMS_THRESH_TEST",
)
class RetinaNet(DenseDetector):
    """Classifies and refines every anchor of a feature pyramid."""

    @configurable
    def __init__(
        self,
        *,
        # The parts.
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        anchor_generator: AnchorGenerator,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: Matcher,
        num_classes: int,
        # Training.
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        # Inference.
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        test_nms: NMSMethod = NMSMethod(),
        test_clip_before_nms: bool = False,
        max_detections_per_image: int = 100,
        # Images.
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str | None = None,
        vis_period: int = 0,
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `DenseDetector`.

        Args:
            head: See `RetinaNetHead`.
            anchor_generator: Features to anchors.
            box2box_transform: Encodes boxes as deltas.
            anchor_matcher: Labels anchors by their IoU with the ground truth.
            num_classes: K. Background is no class: there all scores are low.
            focal_loss_alpha: See `sigmoid_focal_loss`.
            focal_loss_gamma: Likewise.
            smooth_l1_beta: See `box_regression_loss`.
            box_reg_loss_type: See `BOX_LOSS_TYPES`.
            test_score_thresh: See `DetectionFilter`.
            test_topk_candidates: Number of candidates of a level that enter NMS.
            test_nms_thresh: See `DetectionFilter`.
            test_nms: Likewise.
            test_clip_before_nms: Whether to clip boxes to the image before NMS. They are clipped at
                the end in any case.
            max_detections_per_image: As `topk` of `DetectionFilter`.
        """
        super().__init__(
            backbone=backbone,
            head=head,
            head_in_features=head_in_features,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
            input_format=input_format,
            vis_period=vis_period,
        )
        self.anchor_generator = anchor_generator
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.num_classes = num_classes
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = check_box_loss_type(box_reg_loss_type)
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.test_nms = test_nms
        self.test_clip_before_nms = test_clip_before_nms
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to arguments."""
        retinanet = cfg.MODEL.RETINANET
        arguments = super().from_config(cfg)
        features = arguments["backbone"].output_shape()
        shapes = select_features(features, retinanet.IN_FEATURES, "MODEL.RETINANET.IN_FEATURES")
        return {
            **arguments,
            "head": RetinaNetHead(cfg, shapes),
            "head_in_features": retinanet.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": Box2BoxTransform(weights=retinanet.BBOX_REG_WEIGHTS),
            "anchor_matcher": Matcher(
                retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS, allow_low_quality_matches=True
            ),
            "num_classes": retinanet.NUM_CLASSES,
            "focal_loss_alpha": retinanet.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": retinanet.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": retinanet.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": retinanet.BBOX_REG_LOSS_TYPE,
            "test_score_thresh": retinanet.SCORE_THRESH_TEST,
            "test_topk_candidates": retinanet.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": retinanet.NMS_THRESH_TEST,
            "test_nms": nms_method(cfg),
            "test_clip_before_nms": retinanet.CLIP_BEFORE_NMS,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: HeadOutput,
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Return `loss_cls` and `loss_box_reg`.

        Each is a sum over all anchors of the batch, divided by the moving average of the number of
        foreground anchors.
        """
        logits, deltas = self._by_anchor(predictions)
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return `loss_cls` and `loss_box_reg`; see `forward_training`.

        Args:
            anchors: Anchors of each level.
            pred_logits: Per level (N, R_l, K).
            gt_labels: Per image (R,); see `label_anchors`.
            pred_anchor_deltas: Per level (N, R_l, 4).
            gt_boxes: Per image (R, 4).
        """
        labels = torch.stack(gt_labels)
        is_positive = (labels >= 0) & (labels != self.num_classes)
        normalizer = self.update_normalizer(is_positive.sum(), len(labels), _INITIAL_NORMALIZER)
        # One wait for the device, to compare boxes of the few foreground anchors only.
        positive = nonzero_tuple(is_positive)
        loss_box_reg = box_regression_loss(
            cat(pred_anchor_deltas, dim=1)[positive],
            Boxes.cat(anchors).tensor[positive[1]],
            torch.stack(gt_boxes)[positive],
            transform=self.box2box_transform,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        loss_cls = focal_loss_of_levels(
            pred_logits, labels, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
        )
        return {
            "loss_cls": loss_cls / normalizer,
            "loss_box_reg": loss_box_reg / normalizer,
        }

    @torch.no_grad()
    def label_anchors(
        self, anchors: Sequence[Boxes], gt_instances: Sequence[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Match anchors with the ground truth.

        Args:
            anchors: Anchors of each level.
            gt_instances: Ground truth of each image: `gt_boxes` and `gt_classes`.

        Returns:
            Per image (R,) int64 labels: a class in [0, K), K background, -1 ignored. Per image the
            (R, 4) boxes matched with the anchors, which mean something where the label is a class.
        """
        all_anchors = Boxes.cat(list(anchors))
        all_labels: list[Tensor] = []
        matched_boxes: list[Tensor] = []
        for gt_i in gt_instances:
            matches, match_labels = self.anchor_matcher.match_boxes(gt_i.gt_boxes, all_anchors)
            if len(gt_i) == 0:
                all_labels.append(torch.full_like(matches, self.num_classes))
                matched_boxes.append(torch.zeros_like(all_anchors.tensor))
                continue
            labels = gt_i.gt_classes[matches].masked_fill(match_labels == 0, self.num_classes)
            all_labels.append(labels.masked_fill(match_labels == -1, -1))
            matched_boxes.append(gt_i.gt_boxes.tensor[matches])
        return all_labels, matched_boxes

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: HeadOutput
    ) -> list[Instances]:
        """Return detections with `pred_boxes`, `scores` and `pred_classes`, best first."""
        logits, deltas = self._by_anchor(predictions)
        anchors = self.anchor_generator(features)
        return [
            self.inference_single_image(
                anchors,
                [logits_l[i].sigmoid() for logits_l in logits],
                [deltas_l[i] for deltas_l in deltas],
                size_i,
            )
            for i, size_i in indexed_sizes(images)
        ]

    def _by_anchor(self, predictions: HeadOutput) -> list[list[Tensor]]:
        """Return per level the logits (N, R_l, K) and the deltas (N, R_l, 4)."""
        return self._transpose_dense_predictions(predictions, [self.num_classes, 4])
