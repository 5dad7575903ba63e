"""RetinaNet: one stage, with a loss that does not drown the objects in background.

Source: Lin et al. 2017, arXiv 1708.02002.

Legend: N images, L levels, A anchors per cell, R_l anchors of level l, R anchors of all levels, K
classes, M objects in one image.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
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
    suppress,
)
from detkit.modeling.anchor_generator import AnchorGenerator, build_anchor_generator
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
    decode_level,
    predictions_by_anchor,
)
from detkit.structures import Boxes, ImageList, Instances
from detkit.utils.events import get_event_storage, has_event_storage

# The losses are divided by a moving average of the foreground anchors in a batch, as in Detectron:
# the number itself varies much in a batch of one or two images. Both numbers are Detectron2's.
_INITIAL_NORMALIZER = 100.0
_NORMALIZER_MOMENTUM = 0.9


@META_ARCH_REGISTRY.register()
@declare_architecture(
    num_classes="MODEL.RETINANET.NUM_CLASSES",
    score_thresholds=["MODEL.RETINANET.SCORE_THRESH_TEST"],
    nms_threshold="MODEL.RETINANET.NMS_THRESH_TEST",
)
class RetinaNet(DenseDetector):
    """Classifies and refines every anchor of a pyramid."""

    loss_normalizer: Tensor | None

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str],
        anchor_generator: AnchorGenerator,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: Matcher,
        num_classes: int,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.5,
        test_nms: NMSMethod = NMSMethod(),
        test_clip_before_nms: bool = False,
        max_detections_per_image: int = 100,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Put the parts together.

        Args:
            backbone: Images to features by name.
            head: L features to class logits and deltas; see `RetinaNetHead`.
            head_in_features: Names of the L features, in the order of the anchor generator.
            anchor_generator: Features to anchors.
            box2box_transform: What the deltas mean.
            anchor_matcher: Labels anchors by their IoU with the ground truth.
            num_classes: K. There is no class of background: it is where all scores are low.
            focal_loss_alpha: See `sigmoid_focal_loss`.
            focal_loss_gamma: See `sigmoid_focal_loss`.
            smooth_l1_beta: See `box_regression_loss`.
            box_reg_loss_type: See `BOX_LOSS_TYPES`.
            test_score_thresh: Detections must score higher.
            test_topk_candidates: At most this many of a level enter NMS.
            test_nms_thresh: IoU above which the lower-scored of two boxes of a class goes.
            test_nms: How boxes suppress each other.
            test_clip_before_nms: Clip boxes to the image before they suppress each other; they are
                clipped at the end in any case.
            max_detections_per_image: At most this many.
            pixel_mean: See `Detector`.
            pixel_std: See `Detector`.
            memory_format: See `Detector`.
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
        foreground ones.
        """
        logits, deltas = self._by_anchor(predictions)
        anchors = self.anchor_generator(features)
        labelled = self.label_anchors(anchors, gt_instances)
        labels = torch.stack([labels_i for labels_i, _ in labelled])
        gt_boxes = torch.stack([boxes_i for _, boxes_i in labelled])
        is_positive = (labels >= 0) & (labels != self.num_classes)
        normalizer = self._update_normalizer(is_positive.sum(), len(labels))
        # One wait for the device, to compare the boxes of the few foreground anchors only.
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
            boxes matched with the anchors, of meaning where the label is a class.
        """
        all_anchors = Boxes.cat(list(anchors))
        return [self._label_anchors_of_image(all_anchors, gt_i) for gt_i in gt_instances]

    def _label_anchors_of_image(self, anchors: Boxes, gt: Instances) -> tuple[Tensor, Tensor]:
        matches, match_labels = self.anchor_matcher.match_boxes(gt.gt_boxes, anchors)
        if len(gt) == 0:
            return torch.full_like(matches, self.num_classes), torch.zeros_like(anchors.tensor)
        labels = gt.gt_classes[matches].masked_fill(match_labels == 0, self.num_classes)
        return labels.masked_fill(match_labels == -1, -1), gt.gt_boxes.tensor[matches]

    def _focal_loss(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Sum over all classes of all anchors that are not ignored.

        Args:
            logits: Per level (N, R_l, K).
            labels: (N, R), as `label_anchors` gives them.
        """
        classes = torch.arange(self.num_classes, device=labels.device)
        losses = []
        # Level by level, and ignored anchors by a factor of 0: to join the levels and to pick
        # anchors would copy the largest tensors of the model, and wait for the device.
        for logits_l, labels_l in zip(
            logits, labels.split([x.shape[1] for x in logits], dim=1), strict=True
        ):
            loss = sigmoid_focal_loss(
                logits_l,
                labels_l[..., None] == classes,
                alpha=self.focal_loss_alpha,
                gamma=self.focal_loss_gamma,
            )
            losses.append(loss.masked_fill(labels_l[..., None] < 0, 0.0).sum())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _update_normalizer(self, num_positive: Tensor, num_images: int) -> Tensor:
        """Move the average towards the number of foreground anchors of this batch, at least 1, and
        give it.
        """
        if has_event_storage():
            get_event_storage().put_scalar("num_pos_anchors", num_positive / num_images)
        value = num_positive.clamp(min=1).float()
        old = (
            torch.full_like(value, _INITIAL_NORMALIZER)
            if self.loss_normalizer is None
            else self.loss_normalizer
        )
        self.loss_normalizer = old * _NORMALIZER_MOMENTUM + value * (1 - _NORMALIZER_MOMENTUM)
        return self.loss_normalizer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Weights with an average bring it along; those without, such as Detectron2's, start it
        # afresh.
        saved = state_dict.get(f"{prefix}loss_normalizer")
        self.loss_normalizer = (
            None if saved is None else torch.zeros_like(saved, device=self.device)
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: HeadOutput
    ) -> list[Instances]:
        """Return the detections of every image: `pred_boxes`, `scores`, `pred_classes`, best first."""
        logits, deltas = self._by_anchor(predictions)
        anchors = self.anchor_generator(features)
        return [
            self._detect(anchors, [x[i].sigmoid() for x in logits], [x[i] for x in deltas], size_i)
            for i, size_i in enumerate(images.image_sizes)
        ]

    def _detect(
        self,
        anchors: Sequence[Boxes],
        scores: list[Tensor],
        deltas: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Return the detections of one image, from per level (R_l, K) scores and (R_l, 4) deltas."""
        levels = [
            decode_level(
                anchors_l,
                scores_l,
                deltas_l,
                self.box2box_transform,
                score_thresh=self.test_score_thresh,
                topk_candidates=self.test_topk_candidates,
                image_size=image_size,
            )
            for anchors_l, scores_l, deltas_l in zip(anchors, scores, deltas, strict=True)
        ]
        found = Instances.cat(levels)
        if self.test_clip_before_nms:
            found.pred_boxes.clip(image_size)
        keep, kept_scores = suppress(
            found.pred_boxes.tensor,
            found.scores,
            found.pred_classes,
            self.test_nms_thresh,
            self.test_nms,
            min_score=self.test_score_thresh,
            topk=self.max_detections_per_image,
        )
        found = found[keep]
        found.scores = kept_scores
        return found

    def _by_anchor(self, predictions: HeadOutput) -> tuple[list[Tensor], list[Tensor]]:
        """Return per level the logits (N, R_l, K) and the deltas (N, R_l, 4)."""
        logits, deltas = predictions
        return [predictions_by_anchor(x, self.num_classes) for x in logits], [
            predictions_by_anchor(x, 4) for x in deltas
        ]


class RetinaNetHead(nn.Module):
    """A subnet of 3x3 convolutions for the classes and one for the boxes; the levels share them, the tasks do not.

    Batch norm keeps statistics per level, since what it sees there differs; its weights are shared.
    Any other norm is shared whole.
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
        """Build the head.

        Args:
            input_shape: Shapes of the L levels, all of C channels.
            num_classes: K.
            num_anchors: A, the same on every level.
            conv_dims: Channels of each convolution of a subnet.
            norm: Name of the norm after each of them, as in `get_norm`.
            prior_prob: Score of every class at the start, in (0, 1): nearly all answers are no, and
                a start from 0.5 would drown the few objects.

        Raises:
            ValueError: The levels differ in channels, or the probability is outside.
        """
        super().__init__()
        if not 0 < prior_prob < 1:
            raise ValueError(
                f"MODEL.RETINANET.PRIOR_PROB must lie between 0 and 1, got {prior_prob}"
            )
        in_channels = _only(
            [shape.channels for shape in input_shape], "channels", "MODEL.RETINANET.IN_FEATURES"
        )
        channels = [in_channels, *conv_dims]
        self.num_levels = len(input_shape)
        self.cls_subnet = _subnet(channels, norm, self.num_levels)
        self.bbox_subnet = _subnet(channels, norm, self.num_levels)
        self.cls_score = Conv2d(channels[-1], num_anchors * num_classes, kernel_size=3, padding=1)
        self.bbox_pred = Conv2d(channels[-1], num_anchors * 4, kernel_size=3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments.

        Raises:
            ValueError: The levels differ in the number of anchors per cell.
        """
        num_anchors = build_anchor_generator(cfg, input_shape).num_anchors
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "num_anchors": _only(num_anchors, "anchors per cell", "MODEL.ANCHOR_GENERATOR"),
            "conv_dims": [input_shape[0].channels] * cfg.MODEL.RETINANET.NUM_CONVS,
            "norm": cfg.MODEL.RETINANET.NORM,
            "prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB,
        }

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
        logits = [
            self.cls_score(_apply(self.cls_subnet, x, level)) for level, x in enumerate(features)
        ]
        deltas = [
            self.bbox_pred(_apply(self.bbox_subnet, x, level)) for level, x in enumerate(features)
        ]
        return logits, deltas


def _subnet(channels: Sequence[int], norm: str, num_levels: int) -> nn.Sequential:
    make_norm = _norm_per_level(norm, num_levels)
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise(channels):
        layers.append(Conv2d(c_in, c_out, kernel_size=3, padding=1))
        norm_layer = make_norm(c_out)
        layers += [] if norm_layer is None else [norm_layer]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _norm_per_level(norm: str, num_levels: int) -> Callable[[int], nn.Module | None]:
    if norm in ("BN", "SyncBN"):
        return lambda channels: CycleBatchNormList(num_levels, norm, channels)
    return lambda channels: get_norm(norm, channels)


def _apply(subnet: nn.Sequential, x: Tensor, level: int) -> Tensor:
    for layer in subnet:
        x = layer(x, level) if isinstance(layer, CycleBatchNormList) else layer(x)
    return x


def _only(values: Sequence[int | None], what: str, key: str) -> int:
    """Return the number that all levels share."""
    if len(set(values)) != 1 or values[0] is None:
        raise ValueError(
            f"{key}: the RetinaNet head is shared by all levels, which need the same {what}; got"
            f" {list(values)}"
        )
    return values[0]
