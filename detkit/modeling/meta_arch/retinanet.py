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
    sigmoid_focal_loss,
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
from detkit.modeling.detection_filter import DetectionFilter, nms_method
from detkit.modeling.matcher import Matcher
from detkit.modeling.meta_arch.build import META_ARCH_REGISTRY
from detkit.modeling.meta_arch.dense_detector import (
    DenseDetector,
    HeadOutput,
    decode_level,
    predictions_by_anchor,
)
from detkit.structures import Boxes, ImageList, Instances
from detkit.utils.events import get_event_storage, has_event_storage

# The losses are divided by a moving average of the foreground anchors in a batch, as in Detectron:
# the number itself varies much in a batch of one or two images. Both numbers are Detectron2's.
_INITIAL_NORMALIZER = 100.0
_NORMALIZER_MOMENTUM = 0.9


class RetinaNetHead(nn.Module):
    """A subnet of 3x3 convolutions for the classes and one for the boxes (section 4 of the paper).

    The levels share both subnets. Batch norm shares its weights but keeps statistics per level,
    since they differ there. Any other norm is shared completely.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: Sequence[int],
        norm: str = "",
        prior_prob: float = 0.01,
    ) -> None:
        """Build the layers.

        Args:
            input_shape: Shapes of the L levels, all of C channels.
            num_classes: K
            num_anchors: A, the same on every level.
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
            [shape.channels for shape in input_shape], "channels", "MODEL.RETINANET.IN_FEATURES"
        )
        self.cls_subnet = self._subnet(in_channels, conv_dims, norm)
        self.bbox_subnet = self._subnet(in_channels, conv_dims, norm)
        channels = conv_dims[-1] if conv_dims else in_channels
        self.cls_score = Conv2d(channels, num_anchors * num_classes, kernel_size=3, padding=1)
        self.bbox_pred = Conv2d(channels, num_anchors * 4, kernel_size=3, padding=1)
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
        """Map config keys to arguments.

        Raises:
            ConfigError: The levels differ in the number of anchors per cell.
        """
        retinanet = cfg.MODEL.RETINANET
        num_anchors = build_anchor_generator(cfg, input_shape).num_anchors
        return {
            "input_shape": input_shape,
            "num_classes": retinanet.NUM_CLASSES,
            "num_anchors": same_on_all_levels(
                num_anchors, "anchors per cell", "MODEL.ANCHOR_GENERATOR"
            ),
            "conv_dims": [input_shape[0].channels] * retinanet.NUM_CONVS,
            "norm": retinanet.NORM,
            "prior_prob": retinanet.PRIOR_PROB,
        }

    def _subnet(self, channels: int, conv_dims: Sequence[int], norm: str) -> nn.Sequential:
        levels, per_level = self.num_levels, norm in ("BN", "SyncBN")
        layers: list[nn.Module] = []
        for dim in conv_dims:
            layers.append(Conv2d(channels, dim, kernel_size=3, padding=1))
            norm_layer = CycleBatchNormList(levels, norm, dim) if per_level else get_norm(norm, dim)
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
        if len(features) != self.num_levels:
            raise ValueError(
                f"the head is built for {self.num_levels} levels, got {len(features)} features"
            )
        logits, deltas = [], []
        for level, x in enumerate(features):
            logits.append(self.cls_score(_run_subnet(self.cls_subnet, x, level)))
            deltas.append(self.bbox_pred(_run_subnet(self.bbox_subnet, x, level)))
        return logits, deltas


def _run_subnet(subnet: nn.Sequential, x: Tensor, level: int) -> Tensor:
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

    loss_normalizer: Tensor | None

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
        memory_format: torch.memory_format = torch.contiguous_format,
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
            memory_format=memory_format,
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
        # None, and so not in the state_dict, until the first training step: a fresh model has the
        # names of Detectron2's checkpoints, and a resumed run goes on from its own average.
        self.register_buffer("loss_normalizer", None)

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
        labelled = self.label_anchors(anchors, gt_instances)
        labels = torch.stack([labels_i for labels_i, _ in labelled])
        gt_boxes = torch.stack([boxes_i for _, boxes_i in labelled])
        is_positive = (labels >= 0) & (labels != self.num_classes)
        normalizer = self._update_normalizer(is_positive.sum(), len(labels))
        # One wait for the device, to compare boxes of the few foreground anchors only.
        positive = nonzero_tuple(is_positive)
        loss_box_reg = box_regression_loss(
            cat(deltas, dim=1)[positive],
            Boxes.cat(anchors).tensor[positive[1]],
            gt_boxes[positive],
            transform=self.box2box_transform,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        return {
            "loss_cls": self._focal_loss(logits, labels) / normalizer,
            "loss_box_reg": loss_box_reg / normalizer,
        }

    @torch.no_grad()
    def label_anchors(
        self, anchors: Sequence[Boxes], gt_instances: Sequence[Instances]
    ) -> list[tuple[Tensor, Tensor]]:
        """Match anchors with the ground truth.

        Args:
            anchors: Anchors of each level.
            gt_instances: Ground truth of each image: `gt_boxes` and `gt_classes`.

        Returns:
            Per image (R,) int64 labels: a class in [0, K), K background, -1 ignored; and the (R, 4)
            boxes matched with the anchors, which mean something where the label is a class.
        """
        all_anchors = Boxes.cat(list(anchors))
        labelled: list[tuple[Tensor, Tensor]] = []
        for gt_i in gt_instances:
            matches, match_labels = self.anchor_matcher.match_boxes(gt_i.gt_boxes, all_anchors)
            if len(gt_i) == 0:
                labels = torch.full_like(matches, self.num_classes)
                labelled.append((labels, torch.zeros_like(all_anchors.tensor)))
                continue
            labels = gt_i.gt_classes[matches].masked_fill(match_labels == 0, self.num_classes)
            labels = labels.masked_fill(match_labels == -1, -1)
            labelled.append((labels, gt_i.gt_boxes.tensor[matches]))
        return labelled

    def _focal_loss(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Sum over all classes of all anchors that are not ignored.

        Args:
            logits: Per level (N, R_l, K).
            labels: (N, R), see `label_anchors`.
        """
        classes = torch.arange(self.num_classes, device=labels.device)
        labels_by_level = labels.split([x.shape[1] for x in logits], dim=1)
        losses: list[Tensor] = []
        # Level by level, and ignored anchors by a factor of 0: joining the levels and selecting
        # anchors would copy the largest tensors of the model, and wait for the device.
        for logits_l, labels_l in zip(logits, labels_by_level, strict=True):
            loss = sigmoid_focal_loss(
                logits_l,
                # Background, K, equals no class: all its targets are 0.
                labels_l[..., None] == classes,
                alpha=self.focal_loss_alpha,
                gamma=self.focal_loss_gamma,
            )
            losses.append(loss.masked_fill(labels_l[..., None] < 0, 0.0).sum())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _update_normalizer(self, num_positive: Tensor, num_images: int) -> Tensor:
        """Update the moving average of foreground anchors in a batch, and return it."""
        if has_event_storage():
            get_event_storage().put_scalar("num_pos_anchors", num_positive / num_images)
        value = num_positive.clamp(min=1).float()
        old = self.loss_normalizer
        if old is None:
            old = torch.full_like(value, _INITIAL_NORMALIZER)
        self.loss_normalizer = old * _NORMALIZER_MOMENTUM + value * (1 - _NORMALIZER_MOMENTUM)
        return self.loss_normalizer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Weights with an average restore it; those without, such as Detectron2's, reset it.
        saved = state_dict.get(f"{prefix}loss_normalizer")
        self.loss_normalizer = (
            None if saved is None else torch.zeros_like(saved, device=self.device)
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: HeadOutput
    ) -> list[Instances]:
        """Return detections with `pred_boxes`, `scores` and `pred_classes`, best first."""
        logits, deltas = self._by_anchor(predictions)
        anchors = self.anchor_generator(features)
        detection_filter = DetectionFilter(
            self.test_score_thresh,
            self.test_nms_thresh,
            self.max_detections_per_image,
            self.test_nms,
        )
        results: list[Instances] = []
        for i, size_i in enumerate(images.image_sizes):
            levels: list[Instances] = []
            for anchors_l, logits_l, deltas_l in zip(anchors, logits, deltas, strict=True):
                candidates = decode_level(
                    anchors_l,
                    logits_l[i].sigmoid(),
                    deltas_l[i],
                    self.box2box_transform,
                    score_thresh=self.test_score_thresh,
                    topk_candidates=self.test_topk_candidates,
                    image_size=size_i,
                )
                levels.append(candidates)
            detections = Instances.cat(levels)
            if self.test_clip_before_nms:
                detections.pred_boxes.clip(size_i)
            keep, scores = detection_filter(
                detections.pred_boxes.tensor, detections.scores, detections.pred_classes
            )
            detections = detections[keep]
            detections.scores = scores
            results.append(detections)
        return results

    def _by_anchor(self, predictions: HeadOutput) -> tuple[list[Tensor], list[Tensor]]:
        """Return per level the logits (N, R_l, K) and the deltas (N, R_l, 4)."""
        logits, deltas = predictions
        return (
            [predictions_by_anchor(x, self.num_classes) for x in logits],
            [predictions_by_anchor(x, 4) for x in deltas],
        )
