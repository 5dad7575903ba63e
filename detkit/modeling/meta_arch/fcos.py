"""FCOS: one stage without anchor boxes; every cell of a pyramid predicts the box around it.

Source: Tian et al. 2019, arXiv 1904.01355; sampling at the centres of objects and scores as
    geometric means: Tian et al. 2020, arXiv 2006.09214. As in Detectron2, without the learned scale
    per level: distances are in units of the level's stride.

Legend: N images, C channels, L levels, H x W cells of a level, R_l = H_l * W_l cells of level l, R
    cells of all levels, K classes, M objects in one image.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable, declare_architecture
from detkit.layers import NMSMethod, ShapeSpec, cat, nonzero_tuple
from detkit.modeling.anchor_generator import DefaultAnchorGenerator
from detkit.modeling.backbone import Backbone, select_features
from detkit.modeling.box_regression import Box2BoxTransformLinear, box_regression_loss
from detkit.modeling.detection_filter import nms_method
from detkit.modeling.meta_arch.build import META_ARCH_REGISTRY
from detkit.modeling.meta_arch.dense_detector import (
    DenseDetector,
    HeadOutput,
    focal_loss_of_levels,
    indexed_sizes,
)
from detkit.modeling.meta_arch.retinanet import RetinaNetHead, run_subnet
from detkit.structures import Boxes, ImageList, Instances

# Detectron2's: the average number of foreground cells before the first batch.
_INITIAL_NORMALIZER = 300.0


class FCOSHead(RetinaNetHead):
    """RetinaNet's subnets for one box per cell, and its centreness from the subnet of the boxes."""

    _features_key = "MODEL.FCOS.IN_FEATURES"

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        conv_dims: Sequence[int],
        norm: str = "GN",
        prior_prob: float = 0.01,
    ) -> None:
        """Build the layers. The arguments are those of `RetinaNetHead`."""
        super().__init__(
            input_shape=input_shape,
            num_classes=num_classes,
            num_anchors=1,
            conv_dims=conv_dims,
            norm=norm,
            prior_prob=prior_prob,
        )
        channels = conv_dims[-1] if conv_dims else input_shape[0].channels or 0
        self.ctrness = nn.Conv2d(channels, 1, kernel_size=3, padding=1)
        nn.init.normal_(self.ctrness.weight, std=0.01)
        nn.init.zeros_(self.get_parameter("ctrness.bias"))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        fcos = cfg.MODEL.FCOS
        return {
            "input_shape": input_shape,
            "num_classes": fcos.NUM_CLASSES,
            "conv_dims": [input_shape[0].channels] * fcos.NUM_CONVS,
            "norm": fcos.NORM,
            "prior_prob": fcos.PRIOR_PROB,
        }

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """Predict for every cell of every level.

        Args:
            features: L maps (N, C, H, W).

        Returns:
            Per level the class logits (N, K, H, W), the distances (N, 4, H, W) to the sides of the
            box in strides, and the logits (N, 1, H, W) of the centreness.

        Raises:
            ValueError: There are not L features.
        """
        self.check_levels(features)
        logits, deltas, centreness = [], [], []
        for level, x in enumerate(features):
            logits.append(self.cls_score(run_subnet(self.cls_subnet, x, level)))
            hidden = run_subnet(self.bbox_subnet, x, level)
            deltas.append(self.predict_boxes(hidden))
            centreness.append(self.ctrness(hidden))
        return logits, deltas, centreness


@META_ARCH_REGISTRY.register()
@declare_architecture(
    num_classes="MODEL.FCOS.NUM_CLASSES",
    score_thresholds=["MODEL.FCOS.SCORE_THRESH_TEST"],
    nms_threshold="MODEL.FCOS.NMS_THRESH_TEST",
)
class FCOS(DenseDetector):
    """Classifies every cell of a feature pyramid, and measures how far the sides of its box are."""

    @configurable
    def __init__(
        self,
        *,
        # The parts.
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str] | None = None,
        num_classes: int,
        # Training.
        center_sampling_radius: float = 1.5,
        focal_loss_alpha: float = 0.25,
        focal_loss_gamma: float = 2.0,
        # Inference.
        test_score_thresh: float = 0.2,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        test_nms: NMSMethod = NMSMethod(),
        max_detections_per_image: int = 100,
        # Images.
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `DenseDetector`.

        Args:
            head: See `FCOSHead`.
            num_classes: K. Background is no class: there all scores are low.
            center_sampling_radius: A cell is trained on an object if its centre is closer to that
                of the object than this along both axes, in strides.
            focal_loss_alpha: See `sigmoid_focal_loss`.
            focal_loss_gamma: Likewise.
            test_score_thresh: See `DetectionFilter`.
            test_topk_candidates: Number of candidates of a level that enter NMS.
            test_nms_thresh: See `DetectionFilter`.
            test_nms: Likewise.
            max_detections_per_image: As `topk` of `DetectionFilter`.

        Raises:
            ValueError: The strides of the features do not grow.
        """
        super().__init__(
            backbone=backbone,
            head=head,
            head_in_features=head_in_features,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.num_classes = num_classes
        self.center_sampling_radius = center_sampling_radius
        self.focal_loss_alpha = focal_loss_alpha
        self.focal_loss_gamma = focal_loss_gamma
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.test_nms = test_nms
        self.max_detections_per_image = max_detections_per_image
        self.box2box_transform = Box2BoxTransformLinear()
        # A cell as a box of one stride around its centre: the source of the distances.
        shapes = backbone.output_shape()
        strides = [shapes[name].stride or 0 for name in self.head_in_features]
        if any(coarse <= fine for fine, coarse in itertools.pairwise(strides)):
            raise ValueError(
                f"head_in_features must be finest first: {self.head_in_features} have strides"
                f" {strides}"
            )
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides, offset=0.5
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to arguments."""
        fcos = cfg.MODEL.FCOS
        arguments = super().from_config(cfg)
        features = arguments["backbone"].output_shape()
        shapes = select_features(features, fcos.IN_FEATURES, "MODEL.FCOS.IN_FEATURES")
        return {
            **arguments,
            "head": FCOSHead(cfg, shapes),
            "head_in_features": fcos.IN_FEATURES,
            "num_classes": fcos.NUM_CLASSES,
            "center_sampling_radius": fcos.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": fcos.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": fcos.FOCAL_LOSS_GAMMA,
            "test_score_thresh": fcos.SCORE_THRESH_TEST,
            "test_topk_candidates": fcos.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": fcos.NMS_THRESH_TEST,
            "test_nms": nms_method(cfg),
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: HeadOutput,
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Return `loss_fcos_cls`, `loss_fcos_loc` and `loss_fcos_ctr`.

        Each is a sum over all cells of the batch, divided by the moving average of the number of
        foreground cells.
        """
        logits, deltas, centreness = self._by_anchor(predictions)
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, logits, gt_labels, deltas, gt_boxes, centreness)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        pred_centerness: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return the three losses; see `forward_training`.

        Args:
            anchors: Cells of each level.
            pred_logits: Per level (N, R_l, K).
            gt_labels: Per image (R,); see `label_anchors`.
            pred_anchor_deltas: Per level (N, R_l, 4).
            gt_boxes: Per image (R, 4).
            pred_centerness: Per level (N, R_l, 1).
        """
        labels = torch.stack(gt_labels)
        is_positive = labels != self.num_classes
        normalizer = self.update_normalizer(is_positive.sum(), len(labels), _INITIAL_NORMALIZER)
        # One wait for the device, to compare boxes of the foreground cells only.
        positive = nonzero_tuple(is_positive)
        src_boxes = Boxes.cat(anchors).tensor[positive[1]]
        true_boxes = torch.stack(gt_boxes)[positive]
        loss_loc = box_regression_loss(
            cat(pred_anchor_deltas, dim=1)[positive],
            src_boxes,
            true_boxes,
            transform=self.box2box_transform,
            loss_type="giou",
            smooth_l1_beta=0.0,
        )
        loss_ctr = F.binary_cross_entropy_with_logits(
            cat(pred_centerness, dim=1)[positive][:, 0],
            self.compute_ctrness_targets(anchors, gt_boxes)[positive],
            reduction="sum",
        )
        loss_cls = focal_loss_of_levels(
            pred_logits, labels, alpha=self.focal_loss_alpha, gamma=self.focal_loss_gamma
        )
        return {
            "loss_fcos_cls": loss_cls / normalizer,
            "loss_fcos_loc": loss_loc / normalizer,
            "loss_fcos_ctr": loss_ctr / normalizer,
        }

    @torch.no_grad()
    def compute_ctrness_targets(self, anchors: list[Boxes], gt_boxes: list[Tensor]) -> Tensor:
        """Return how central each cell is in its object, in [0, 1] for foreground cells: (N, R).

        Args:
            anchors: Cells of each level.
            gt_boxes: Per image (R, 4); see `label_anchors`.
        """
        cells = Boxes.cat(anchors).tensor
        distances = [self.box2box_transform.get_deltas(cells, boxes_i) for boxes_i in gt_boxes]
        left, top, right, bottom = torch.stack(distances).unbind(dim=-1)
        ratio_x = torch.minimum(left, right) / torch.maximum(left, right)
        ratio_y = torch.minimum(top, bottom) / torch.maximum(top, bottom)
        return (ratio_x * ratio_y).sqrt()

    @torch.no_grad()
    def label_anchors(
        self, anchors: Sequence[Boxes], gt_instances: Sequence[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return `label_cells` of each image: the labels, and the boxes."""
        labelled = [self.label_cells(anchors, gt_i) for gt_i in gt_instances]
        return [labels_i for labels_i, _ in labelled], [boxes_i for _, boxes_i in labelled]

    def label_cells(self, anchors: Sequence[Boxes], gt: Instances) -> tuple[Tensor, Tensor]:
        """Assign each cell of an image to an object or to the background.

        A cell belongs to an object whose box it is in, near its centre, and whose farthest side is
        at a distance that its level is responsible for; to the smallest of several.

        Args:
            anchors: Cells of each level.
            gt: Ground truth of the image: `gt_boxes` and `gt_classes`.

        Returns:
            (R,) int64 labels: a class in [0, K), or K for background; and the (R, 4) boxes of the
            objects, which mean something where the label is a class.
        """
        cells = Boxes.cat(list(anchors))
        labels = gt.gt_classes.new_full((len(cells),), self.num_classes)
        if len(gt) == 0:
            return labels, torch.zeros_like(cells.tensor)
        strides = cells.tensor[:, 2] - cells.tensor[:, 0]
        offsets = cells.get_centers()[:, None] - gt.gt_boxes.get_centers()  # (R, M, 2)
        is_near = offsets.abs().amax(dim=2) < self.center_sampling_radius * strides[:, None]
        x, y = cells.get_centers()[:, None].unbind(dim=2)
        x1, y1, x2, y2 = gt.gt_boxes.tensor.unbind(dim=1)
        distances = torch.stack([x - x1, y - y1, x2 - x, y2 - y])  # (4, R, M)
        # Each level has the objects of its octave, the first and the last all beyond it (section
        # 3.2: 64, 128, 256 and 512 pixels between the levels of strides 8 to 128).
        lower, upper = 4 * strides, 8 * strides
        lower[: len(anchors[0])] = 0
        upper[len(cells) - len(anchors[-1]) :] = float("inf")
        farthest = distances.amax(dim=0)
        is_of_level = (farthest > lower[:, None]) & (farthest < upper[:, None])
        is_match = is_near & (distances.amin(dim=0) > 0) & is_of_level
        area, match = gt.gt_boxes.area().masked_fill(~is_match, float("inf")).min(dim=1)
        labels = torch.where(area.isfinite(), gt.gt_classes[match], labels)
        return labels, gt.gt_boxes.tensor[match]

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: HeadOutput
    ) -> list[Instances]:
        """Return detections with `pred_boxes`, `scores` and `pred_classes`, best first."""
        logits, deltas, centreness = self._by_anchor(predictions)
        anchors = self.anchor_generator(features)
        results: list[Instances] = []
        for i, size_i in indexed_sizes(images):
            # The geometric mean (equation 4 of arXiv 2006.09214): a box from the border of its
            # object scores low, though it is an object.
            scores = [
                (logits_l[i].sigmoid() * centreness_l[i].sigmoid()).sqrt()
                for logits_l, centreness_l in zip(logits, centreness, strict=True)
            ]
            deltas_i = [deltas_l[i] for deltas_l in deltas]
            results.append(self.inference_single_image(anchors, scores, deltas_i, size_i))
        return results

    def _by_anchor(self, predictions: HeadOutput) -> list[list[Tensor]]:
        """Return per level logits (N, R_l, K), deltas (N, R_l, 4) and centreness (N, R_l, 1)."""
        return self._transpose_dense_predictions(predictions, [self.num_classes, 4, 1])
