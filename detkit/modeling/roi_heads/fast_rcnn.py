"""Fast R-CNN: the class and the box of every region, their losses, and the detections.

Source: Girshick 2015, arXiv 1504.08083.

Legend: N images, R regions over the batch, R_i regions of image i, K classes, F features per
    region, D candidates above the threshold, B numbers per box (4; 5 of rotated boxes).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import NMSMethod, ShapeSpec, cat, cross_entropy, nonzero_tuple
from detkit.modeling.box_regression import (
    Box2BoxTransform,
    Box2BoxTransformRotated,
    box_regression_loss,
    check_box_loss_type,
)
from detkit.modeling.detection_filter import DetectionFilter, nms_method
from detkit.modeling.sampling import find_foreground
from detkit.structures import Boxes, Instances, RotatedBoxes, RowImages, boxes_in_image
from detkit.utils.errors import ConfigError
from detkit.utils.events import get_event_storage, has_event_storage
from detkit.utils.overriding import is_overridden, overridable

Predictions: TypeAlias = tuple[Tensor, Tensor]
"""Class logits (R, K + 1), background last, and deltas (R, B K) or (R, B)."""

# With a sigmoid per class, nearly all answers are no: starting from a probability of 0.01 keeps the
# first losses small. Source: Lin et al. 2017, arXiv 1708.02002, section 3.3.
_SIGMOID_PRIOR = 0.01


class FastRCNNOutputLayers(nn.Module):
    """A linear layer for the classes and one for the deltas, with their losses and inference."""

    fed_loss_cls_weights: Tensor | None
    class_weights: Tensor | None

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec | int,
        *,
        box2box_transform: Box2BoxTransform,
        num_classes: int,
        test_score_thresh: float = 0.0,
        test_nms_thresh: float = 0.5,
        test_topk_per_image: int = 100,
        test_nms: NMSMethod = NMSMethod(),
        cls_agnostic_bbox_reg: bool = False,
        smooth_l1_beta: float = 0.0,
        box_reg_loss_type: str = "smooth_l1",
        loss_weight: float | dict[str, float] = 1.0,
        use_sigmoid_ce: bool = False,
        fed_loss_cls_weights: Sequence[float] | None = None,
        fed_loss_num_classes: int = 50,
        class_weights: Sequence[float] | None = None,
        focal_loss_gamma: float = 0.0,
        use_fed_loss: bool = False,
        get_fed_loss_cls_weights: Callable[[], Sequence[float]] | None = None,
    ) -> None:
        """Build the two layers.

        Args:
            input_shape: Shape of the features per region, which are flattened to F; or F.
            box2box_transform: Encodes boxes as deltas.
            num_classes: K, without background.
            test_score_thresh: See `DetectionFilter`.
            test_nms_thresh: Likewise.
            test_topk_per_image: Likewise.
            test_nms: Likewise.
            cls_agnostic_bbox_reg: Whether to predict one box per region instead of one per class.
            smooth_l1_beta: See `box_regression_loss`.
            box_reg_loss_type: See `BOX_LOSS_TYPES`.
            loss_weight: Factor on both losses, or one per name.
            use_sigmoid_ce: Whether to use a sigmoid per class instead of a softmax over all.
            fed_loss_cls_weights: K weights to sample classes by, for a federated loss; see
                `sample_federated_classes`. None takes the loss over all classes.
            fed_loss_num_classes: Number of sampled classes.
            class_weights: K factors on the classification loss of regions of each class, or K + 1
                with that of background, which is 1 otherwise. With a sigmoid per class they are
                factors on the loss of each sigmoid, and there is none of background.
            focal_loss_gamma: Exponent of the focal loss; 0 is plain cross entropy.
            use_fed_loss: Detectron2's way to ask for a federated loss, with the weights that the
                next argument returns.
            get_fed_loss_cls_weights: Returns `fed_loss_cls_weights`; called with `use_fed_loss`.

        Raises:
            ValueError: A federated loss without a sigmoid per class, or without class weights.
            ValueError: `class_weights` has another length, or negative numbers.
        """
        super().__init__()
        self.num_classes = num_classes
        self.box2box_transform = box2box_transform
        is_rotated = isinstance(box2box_transform, Box2BoxTransformRotated)
        self.box_class = RotatedBoxes if is_rotated else Boxes
        self.box_dim = self.box_class.box_dim
        self.test_score_thresh = test_score_thresh
        self.test_nms_thresh = test_nms_thresh
        self.test_topk_per_image = test_topk_per_image
        self.test_nms = test_nms
        self.smooth_l1_beta = smooth_l1_beta
        self.box_reg_loss_type = check_box_loss_type(box_reg_loss_type, box2box_transform)
        if not isinstance(loss_weight, dict):
            loss_weight = {"loss_cls": loss_weight, "loss_box_reg": loss_weight}
        self.loss_weight = loss_weight
        self.use_sigmoid_ce = use_sigmoid_ce
        self.fed_loss_num_classes = fed_loss_num_classes
        if use_fed_loss:
            if get_fed_loss_cls_weights is None:
                raise ValueError("use_fed_loss needs get_fed_loss_cls_weights, got None")
            fed_loss_cls_weights = torch.as_tensor(get_fed_loss_cls_weights()).tolist()
        if fed_loss_cls_weights is not None and not use_sigmoid_ce:
            raise ValueError("use_sigmoid_ce must be True for a federated loss, got False")
        # A buffer, as in Detectron2: it is saved with the weights, so that no later run has to
        # count classes again.
        self.register_buffer(
            "fed_loss_cls_weights",
            None if fed_loss_cls_weights is None else torch.tensor(fed_loss_cls_weights).float(),
        )
        weights = None if class_weights is None else _with_background(class_weights, num_classes)
        # Settings of the loss, not part of the weights: files stay as they are.
        self.register_buffer("class_weights", weights, persistent=False)
        self.focal_loss_gamma = focal_loss_gamma
        if isinstance(input_shape, int):
            input_shape = ShapeSpec(channels=input_shape)
        channels, height, width = input_shape.channels, input_shape.height, input_shape.width
        in_features = (channels or 1) * (height or 1) * (width or 1)
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        num_boxes = 1 if cls_agnostic_bbox_reg else num_classes
        self.bbox_pred = nn.Linear(in_features, num_boxes * self.box_dim)
        # The standard deviations of section 2.3.
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.bbox_pred.bias)
        prior = -math.log((1 - _SIGMOID_PRIOR) / _SIGMOID_PRIOR) if use_sigmoid_ce else 0.0
        nn.init.constant_(self.cls_score.bias, prior)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Map config keys to arguments."""
        head, heads = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS
        weights: list[float] | None = None
        if head.USE_FED_LOSS:
            counts = head.FED_LOSS_CLASS_COUNTS or [1] * heads.NUM_CLASSES
            if len(counts) != heads.NUM_CLASSES:
                raise ConfigError(
                    "MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS needs a number for each of"
                    f" {heads.NUM_CLASSES} classes, got {len(counts)}"
                )
            weights = [count**head.FED_LOSS_FREQ_WEIGHT_POWER for count in counts]
        return {
            "input_shape": input_shape,
            "box2box_transform": cls._init_box2box_transform(cfg),
            "num_classes": heads.NUM_CLASSES,
            "test_score_thresh": heads.SCORE_THRESH_TEST,
            "test_nms_thresh": heads.NMS_THRESH_TEST,
            "test_topk_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "test_nms": nms_method(cfg),
            "cls_agnostic_bbox_reg": head.CLS_AGNOSTIC_BBOX_REG,
            "smooth_l1_beta": head.SMOOTH_L1_BETA,
            "box_reg_loss_type": head.BBOX_REG_LOSS_TYPE,
            "loss_weight": {"loss_box_reg": head.BBOX_REG_LOSS_WEIGHT},
            "use_sigmoid_ce": head.USE_SIGMOID_CE,
            "fed_loss_cls_weights": weights,
            "fed_loss_num_classes": head.FED_LOSS_NUM_CLASSES,
            "class_weights": head.CLASS_WEIGHTS or None,
            "focal_loss_gamma": head.FOCAL_LOSS_GAMMA if head.LOSS == "focal" else 0.0,
        }

    @classmethod
    def _init_box2box_transform(cls, cfg: CfgNode) -> Box2BoxTransform:
        """Build the encoding of boxes as deltas."""
        return Box2BoxTransform(weights=cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)

    def forward(self, x: Tensor) -> Predictions:
        """Predict classes and deltas from features per region: (R, F), or (R, ...) to flatten."""
        x = x.flatten(1)
        return self.cls_score(x), self.bbox_pred(x)

    def losses(self, predictions: Predictions, proposals: Sequence[Instances]) -> dict[str, Tensor]:
        """Compute the losses of the sampled proposals.

        Args:
            predictions: Output of `forward`.
            proposals: Per image the sampled proposals, with `proposal_boxes`, `gt_classes` in [0,
                K], and, in images with objects, `gt_boxes`. There may be no image.

        Returns:
            `loss_cls` and `loss_box_reg`; zeros that are part of the graph when there is no region.
        """
        # Float32 under autocast too: the sum over some thousand regions needs its digits.
        scores, deltas = predictions[0].float(), predictions[1]
        if not proposals:
            return {"loss_cls": 0.0 * scores.sum(), "loss_box_reg": 0.0 * deltas.sum()}
        gt_classes = cat([p.gt_classes for p in proposals], dim=0)
        # Boxes are compared for the foreground only.
        found = find_foreground([p.gt_classes for p in proposals], self.num_classes)
        starts = [0, *itertools.accumulate(map(len, proposals))]
        foreground = cat(
            [start + index for start, (index, _) in zip(starts[:-1], found, strict=True)], dim=0
        )
        if has_event_storage():
            _log_accuracy(scores.detach(), gt_classes, foreground)
        losses = {
            "loss_cls": self._classification_loss(scores, gt_classes),
            "loss_box_reg": self._box_reg_loss(deltas, proposals, gt_classes, foreground),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def _classification_loss(self, scores: Tensor, gt_classes: Tensor) -> Tensor:
        if self.use_sigmoid_ce:
            return self.sigmoid_cross_entropy_loss(scores, gt_classes)
        if self.class_weights is None and not self.focal_loss_gamma:
            return cross_entropy(scores, gt_classes, reduction="mean")
        loss = self._focal(cross_entropy(scores, gt_classes, reduction="none"))
        if self.class_weights is not None:
            loss = loss * self.class_weights[gt_classes]
        return loss.sum() / max(len(gt_classes), 1)

    def _focal(self, loss: Tensor) -> Tensor:
        """Return cross entropies, each times `(1 - p)^gamma`, p the probability of the truth.

        Source: Lin et al. 2017, arXiv 1708.02002, equation 4.
        """
        if not self.focal_loss_gamma:
            return loss
        # A cross entropy is -log(p). The root of an exact 0 has no finite slope.
        missing = (-torch.expm1(-loss)).clamp(min=torch.finfo(loss.dtype).eps)
        return loss * missing**self.focal_loss_gamma

    def sigmoid_cross_entropy_loss(self, pred_class_logits: Tensor, gt_classes: Tensor) -> Tensor:
        """Return the loss of a sigmoid per class, over the sampled classes of a federated loss.

        Args:
            pred_class_logits: (R, K + 1), of which the last column is not used.
            gt_classes: (R,) in [0, K].
        """
        scores = pred_class_logits
        # Background is no class of its own here: its column is cut off, and all targets are 0.
        target = F.one_hot(gt_classes, self.num_classes + 1)[:, :-1].to(scores.dtype)
        loss = F.binary_cross_entropy_with_logits(scores[:, :-1], target, reduction="none")
        loss = self._focal(loss)
        if self.class_weights is not None:
            loss = loss * self.class_weights[:-1]
        if self.fed_loss_cls_weights is not None:
            num_sampled, weights = self.fed_loss_num_classes, self.fed_loss_cls_weights
            if is_overridden(self.get_fed_loss_classes):
                classes = self.get_fed_loss_classes(
                    gt_classes, num_sampled, self.num_classes, weights
                )
                # Background, which it may return as a class, has no column.
                is_sampled = weights.new_zeros(self.num_classes + 1).index_fill(0, classes, 1)[:-1]
            else:
                is_sampled = sample_federated_classes(gt_classes, num_sampled, weights)
            loss = loss * is_sampled
        return loss.sum() / max(len(gt_classes), 1)

    @overridable
    def get_fed_loss_classes(
        self, gt_classes: Tensor, num_fed_loss_classes: int, num_classes: int, weight: Tensor
    ) -> Tensor:
        """Return the classes of a federated loss; see `sample_federated_classes`.

        For subclasses that override it: the loss itself needs no indices, which wait for a device.
        """
        return nonzero_tuple(sample_federated_classes(gt_classes, num_fed_loss_classes, weight))[0]

    def _box_reg_loss(
        self, deltas: Tensor, proposals: Sequence[Instances], gt_classes: Tensor, foreground: Tensor
    ) -> Tensor:
        """Return the loss of the deltas of the true class over the foreground regions."""
        proposal_boxes = cat([p.proposal_boxes.tensor for p in proposals], dim=0)
        # An image without objects has no gt_boxes and no foreground: anything of the right shape
        # fills the gap.
        gt_boxes = cat(
            [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals],
            dim=0,
        )
        if is_overridden(self.box_reg_loss):
            return self.box_reg_loss(proposal_boxes, gt_boxes, deltas, gt_classes)
        return self._loss_of(deltas, proposal_boxes, gt_boxes, gt_classes, foreground)

    @overridable
    def box_reg_loss(
        self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        """Return the loss of the deltas of the true class over the foreground regions.

        For subclasses that override it or call it.

        Args:
            proposal_boxes: (R, B).
            gt_boxes: (R, B); they mean something for foreground only.
            pred_deltas: (R, B K) or (R, B).
            gt_classes: (R,) in [0, K].
        """
        (foreground,) = nonzero_tuple((gt_classes >= 0) & (gt_classes < self.num_classes))
        return self._loss_of(pred_deltas, proposal_boxes, gt_boxes, gt_classes, foreground)

    def _loss_of(
        self,
        deltas: Tensor,
        proposal_boxes: Tensor,
        gt_boxes: Tensor,
        gt_classes: Tensor,
        foreground: Tensor,
    ) -> Tensor:
        if deltas.shape[1] == self.box_dim:
            deltas = deltas[foreground]
        else:
            deltas = deltas.unflatten(1, (self.num_classes, self.box_dim))
            deltas = deltas[foreground, gt_classes[foreground]]
        loss = box_regression_loss(
            deltas,
            proposal_boxes[foreground],
            gt_boxes[foreground],
            transform=self.box2box_transform,
            loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        # Divided by all regions, not by the foreground, so that a foreground region has the same
        # weight in every batch. Otherwise those of an image with few objects would weigh more.
        return loss / max(len(gt_classes), 1)

    def inference(
        self, predictions: Predictions, proposals: Sequence[Instances]
    ) -> tuple[list[Instances], list[Tensor]]:
        """Return the detections of every image and their proposals; see `fast_rcnn_inference`."""
        boxes = self.predict_boxes(predictions, proposals)
        scores = self.predict_probs(predictions, proposals)
        return self.detect(boxes, scores, [p.image_size for p in proposals])

    def detect(
        self,
        boxes: Sequence[Tensor],
        scores: Sequence[Tensor],
        image_shapes: Sequence[tuple[int, int]],
    ) -> tuple[list[Instances], list[Tensor]]:
        """Return `fast_rcnn_inference` with the thresholds of this layer."""
        return fast_rcnn_inference(
            boxes,
            scores,
            image_shapes,
            self.test_score_thresh,
            self.test_nms_thresh,
            self.test_topk_per_image,
            self.test_nms,
            self.box_class,
        )

    def predict_boxes(
        self, predictions: Predictions, proposals: Sequence[Instances]
    ) -> list[Tensor]:
        """Return, per image, (R_i, B K) boxes, or (R_i, B) where classes share them. Float32."""
        if not proposals:
            return []
        # All images at once: a few large operations instead of many small ones.
        start = cat([p.proposal_boxes.tensor for p in proposals], dim=0)
        boxes = self.box2box_transform.apply_deltas(predictions[1], start)
        return list(boxes.split([p.proposal_boxes.tensor.shape[0] for p in proposals]))

    def predict_boxes_for_gt_classes(
        self, predictions: Predictions, proposals: Sequence[Instances]
    ) -> list[Tensor]:
        """Return, per image, the (R_i, B) boxes predicted for the `gt_classes` of the proposals.

        Background has no box; its regions get that of the last class.
        """
        boxes = self.predict_boxes(predictions, proposals)
        if predictions[1].shape[1] == self.box_dim:
            return boxes
        chosen = []
        for boxes_i, proposals_i in zip(boxes, proposals, strict=True):
            classes_i = proposals_i.gt_classes.clamp(0, self.num_classes - 1)
            rows_i = torch.arange(len(classes_i), device=classes_i.device)
            boxes_i = boxes_i.unflatten(1, (self.num_classes, self.box_dim))
            chosen.append(boxes_i[rows_i, classes_i])
        return chosen

    def predict_probs(
        self, predictions: Predictions, proposals: Sequence[Instances]
    ) -> list[Tensor]:
        """Return, per image, (R_i, K + 1) probabilities, background last. Float32."""
        scores = predictions[0].float()
        probs = scores.sigmoid() if self.use_sigmoid_ce else scores.softmax(dim=-1)
        return list(probs.split([p.proposal_boxes.tensor.shape[0] for p in proposals]))


def _log_accuracy(
    scores: Tensor, gt_classes: Tensor, foreground: Tensor, prefix: str = "fast_rcnn"
) -> None:
    """Log how well regions are classified. The numbers stay on the device until they are read."""
    if len(gt_classes) == 0:
        return
    storage = get_event_storage()
    background = scores.shape[1] - 1
    predicted = scores.argmax(dim=1)
    storage.put_scalar(f"{prefix}/cls_accuracy", (predicted == gt_classes).float().mean())
    if len(foreground) > 0:
        predicted, gt_classes = predicted[foreground], gt_classes[foreground]
        storage.put_scalar(f"{prefix}/fg_cls_accuracy", (predicted == gt_classes).float().mean())
        storage.put_scalar(f"{prefix}/false_negative", (predicted == background).float().mean())


def _with_background(class_weights: Sequence[float], num_classes: int) -> Tensor:
    """Return (K + 1,) factors on the classification loss; that of background is 1 by default."""
    weights = torch.tensor(class_weights).float()
    if len(weights) not in (num_classes, num_classes + 1) or float(weights.min()) < 0:
        raise ValueError(
            "class_weights (MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS) needs a number of at least 0"
            f" for each of {num_classes} classes, and may have one for background, the"
            f" last; got {len(weights)}: {weights.tolist()}"
        )
    return weights if len(weights) > num_classes else torch.cat([weights, torch.ones(1)])


def fast_rcnn_inference(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    image_shapes: Sequence[tuple[int, int]],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    nms: NMSMethod = NMSMethod(),
    box_class: type[Boxes] = Boxes,
) -> tuple[list[Instances], list[Tensor]]:
    """Return the detections of every image.

    Args:
        boxes: Per image (R_i, B K), or (R_i, B) for boxes that all classes share.
        scores: Per image (R_i, K + 1) in [0, 1], the last column background.
        image_shapes: N times (height, width).
        score_thresh: See `DetectionFilter`.
        nms_thresh: Likewise.
        topk_per_image: Likewise.
        nms: Likewise.
        box_class: What boxes are: `Boxes` or `RotatedBoxes`.

    Returns:
        Per image Instances with `pred_boxes`, `scores` and `pred_classes`, best first.
        Per image the (len(instances),) index of the region that each came from.

    Example:
        >>> import torch
        >>> from detkit.modeling.roi_heads import fast_rcnn_inference
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [50, 50, 60, 60]])
        >>> scores = torch.tensor([[0.8, 0.2], [0.9, 0.1], [0.6, 0.4]])  # one class, background
        >>> _, regions = fast_rcnn_inference([boxes], [scores], [(64, 64)], 0.05, 0.5, 100)
        >>> regions[0].tolist()
        [1, 2]
    """
    instances: list[Instances] = []
    regions: list[Tensor] = []
    for boxes_i, scores_i, shape_i in zip(boxes, scores, image_shapes, strict=True):
        instances_i, regions_i = fast_rcnn_inference_single_image(
            boxes_i, scores_i, shape_i, score_thresh, nms_thresh, topk_per_image, nms, box_class
        )
        instances.append(instances_i)
        regions.append(regions_i)
    return instances, regions


def fast_rcnn_inference_single_image(
    boxes: Tensor,
    scores: Tensor,
    image_shape: tuple[int, int],
    score_thresh: float,
    nms_thresh: float,
    topk_per_image: int,
    nms: NMSMethod = NMSMethod(),
    box_class: type[Boxes] = Boxes,
) -> tuple[Instances, Tensor]:
    """Return the detections of one image; see `fast_rcnn_inference`."""
    # A region with a number that is not finite is left out as a whole: its other numbers mean
    # nothing either.
    is_finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
    scores = scores[:, :-1]
    # The threshold comes first: of some 80,000 candidates (1,000 regions, 80 classes) it mostly
    # leaves a few hundred.
    regions, classes = nonzero_tuple((scores > score_thresh) & is_finite[:, None])
    scores = scores[regions, classes]
    boxes = boxes.unflatten(1, (-1, box_class.box_dim))
    box_classes = classes if boxes.shape[1] > 1 else torch.zeros_like(classes)
    images: Any = image_shape[regions] if isinstance(image_shape, RowImages) else None
    candidates = boxes_in_image(boxes[regions, box_classes], images or image_shape, box_class)
    detection_filter = DetectionFilter(score_thresh, nms_thresh, topk_per_image, nms)
    keep, scores = detection_filter(candidates.tensor, scores, classes, images)
    instances = Instances(
        image_shape if images is None else images[keep],
        pred_boxes=candidates[keep],
        scores=scores,
        pred_classes=classes[keep],
    )
    return instances, regions[keep]


def sample_federated_classes(gt_classes: Tensor, num_sampled: int, weights: Tensor) -> Tensor:
    """Draw the classes of a federated loss: all that appear in a batch, and others by weight.

    In data such as LVIS an image is annotated for some classes only, and says nothing about most.

    Source: Zhou et al. 2021, arXiv 2103.07461, section 5.1, after Gupta et al. 2019, arXiv
    1908.03195.

    Args:
        gt_classes: (R,) in [0, K], K for background.
        num_sampled: Number of classes. More are drawn if more appear; fewer if weights above 0 run
            out.
        weights: (K,) relative chance of each class that does not appear. One of 0 is never drawn.

    Returns:
        (K,) bool.
    """
    # Background counts as a class where it appears, as in Detectron2.
    appears = torch.zeros(len(weights) + 1, dtype=torch.bool, device=weights.device)
    appears[gt_classes] = True
    num_missing = num_sampled - appears.sum()
    appears = appears[:-1]
    # Drawing without replacement is taking the largest of log weight plus Gumbel noise (Yellott
    # 1977). Unlike torch.multinomial over those left, it needs no count from the device.
    keys = weights.log() - torch.empty_like(weights).exponential_().log()
    keys = keys.masked_fill(appears | ~(weights > 0), -torch.inf)
    top, classes = keys.topk(min(num_sampled, len(weights)))
    is_drawn = (torch.arange(len(top), device=top.device) < num_missing) & (top > -torch.inf)
    return appears.scatter(0, classes, appears[classes] | is_drawn)


def log_classification_stats(
    pred_logits: Tensor, gt_classes: Tensor, prefix: str = "fast_rcnn"
) -> None:
    """Log how well regions are classified.

    Args:
        pred_logits: (R, K + 1).
        gt_classes: (R,) in [0, K], K for background.
        prefix: Start of the names.
    """
    background = pred_logits.shape[1] - 1
    (foreground,) = nonzero_tuple((gt_classes >= 0) & (gt_classes < background))
    _log_accuracy(pred_logits.detach(), gt_classes, foreground, prefix)
