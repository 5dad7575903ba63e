"""What one-stage detectors share: a head over every cell of a feature pyramid.

Legend: N images, L levels, A anchors per cell, H x W cells of a level, R_l = H_l * W_l * A anchors
    of level l, K classes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import declare_architecture
from detkit.layers import NMSMethod, nonzero_tuple, sigmoid_focal_loss
from detkit.modeling.backbone import Backbone
from detkit.modeling.box_regression import BoxTransform
from detkit.modeling.detection_filter import DetectionFilter
from detkit.modeling.meta_arch.base import Detector, rescale_outputs
from detkit.structures import (
    BatchBoxes,
    Boxes,
    ImageList,
    Instances,
    ModelInput,
    ModelOutput,
    RowImages,
)
from detkit.utils.events import get_event_storage, has_event_storage
from detkit.utils.overriding import overridable

HeadOutput = tuple[list[Tensor], ...]
"""One list per kind of prediction, each with a map (N, A * D, H, W) per level."""


# The losses are divided by a moving average of the foreground anchors in a batch, as in Detectron:
# the number itself varies much in a batch of one or two images.
_NORMALIZER_MOMENTUM = 0.9


# Not an architecture itself: test-time augmentation uses these keys for subclasses without any.
@declare_architecture(
    score_thresholds=["MODEL.RETINANET.SCORE_THRESH_TEST"],
    nms_threshold="MODEL.RETINANET.NMS_THRESH_TEST",
)
class DenseDetector(Detector):
    """A backbone and a head. A subclass implements `forward_training` and `forward_inference`."""

    loss_normalizer: Tensor | None
    # Of subclasses that use the steps below.
    box2box_transform: BoxTransform
    test_score_thresh: float
    test_topk_candidates: int
    test_nms_thresh: float
    test_nms: NMSMethod
    max_detections_per_image: int
    test_clip_before_nms: bool = False

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str] | None = None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str | None = None,
        vis_period: int = 0,
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `Detector`.

        Args:
            head: A list of L features to `HeadOutput`.
            head_in_features: Names of the L features; None takes all of the backbone, finest first.
        """
        super().__init__(
            backbone, pixel_mean, pixel_std, input_format=input_format, vis_period=vis_period
        )
        self.head = head
        if head_in_features is None:
            shapes = backbone.output_shape()
            head_in_features = sorted(shapes, key=lambda name: shapes[name].stride or 0)
        self.head_in_features = list(head_in_features)
        # None, and so not in the state_dict, until the first training step: a fresh model has the
        # names of Detectron2's checkpoints, and a resumed run goes on from its own average.
        self.register_buffer("loss_normalizer", None)

    def training_losses(self, batched_inputs: list[ModelInput]) -> dict[str, Tensor]:
        """Return the losses by name, for inputs with `instances`."""
        targets = self.take_field(batched_inputs, "instances")
        images = self.preprocess_image(batched_inputs)
        features = self._head_features(images)
        return self.forward_training(images, features, self.head(features), targets)

    @overridable
    def inference(
        self, batched_inputs: list[ModelInput], do_postprocess: bool = True
    ) -> list[ModelOutput] | list[Instances]:
        """Return the instances in every image; see `GeneralizedRCNN.inference`."""
        images = self.preprocess_image(batched_inputs)
        features = self._head_features(images)
        results = self.forward_inference(images, features, self.head(features))
        return rescale_outputs(results, batched_inputs, "instances") if do_postprocess else results

    def _head_features(self, images: ImageList) -> list[Tensor]:
        features = self.backbone(images.tensor)
        return [features[name] for name in self.head_in_features]

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: HeadOutput,
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Return the losses of the predictions, by name."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward_training")

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: HeadOutput
    ) -> list[Instances]:
        """Return the detections of every image, in the coordinates of the network's input."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward_inference")

    @torch.no_grad()
    def update_normalizer(self, num_positive: Tensor, num_images: int, initial: float) -> Tensor:
        """Update the moving average of foreground anchors in a batch, and return it.

        Args:
            num_positive: Scalar; foreground anchors in this batch.
            num_images: N
            initial: The average before the first batch.
        """
        if has_event_storage():
            get_event_storage().put_scalar("num_pos_anchors", num_positive / num_images)
        return self._ema_update("loss_normalizer", num_positive.clamp(min=1).float(), initial)

    def _ema_update(
        self,
        name: str,
        value: Tensor | float,
        initial_value: float,
        momentum: float = _NORMALIZER_MOMENTUM,
    ) -> Any:
        """Update the moving average in an attribute, and return it; Detectron2's name.

        Args:
            name: The attribute, such as `loss_normalizer`, which is saved with the weights.
            value: The new value.
            initial_value: The average before the first one.
            momentum: Share of the old average.
        """
        is_buffer = name in self._buffers
        if is_buffer:  # never a number
            value = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        old = getattr(self, name, None)
        average = (initial_value if old is None else old) * momentum + value * (1 - momentum)
        setattr(self, name, average)
        return average

    # Detectron2's steps, for subclasses that call or override them.

    def _transpose_dense_predictions(
        self, predictions: Sequence[Sequence[Tensor]], dims_per_anchor: Sequence[int]
    ) -> list[list[Tensor]]:
        """Return the maps (N, A * D, H, W) of each kind as (N, R_l, D), for each D given."""
        return [
            [predictions_by_anchor(x, dim) for x in maps]
            for maps, dim in zip(predictions, dims_per_anchor, strict=True)
        ]

    @overridable
    def _decode_per_level_predictions(
        self,
        anchors: Boxes,
        pred_scores: Tensor,
        pred_deltas: Tensor,
        score_thresh: float,
        topk_candidates: int,
        image_size: tuple[int, int],
    ) -> Instances:
        """Return the best-scored boxes of one level in one image; see `decode_level`."""
        return decode_level(
            anchors,
            pred_scores,
            pred_deltas,
            self.box2box_transform,
            score_thresh=score_thresh,
            topk_candidates=topk_candidates,
            image_size=image_size,
        )

    def _decode_multi_level_predictions(
        self,
        anchors: Sequence[Boxes],
        pred_scores: Sequence[Tensor],
        pred_deltas: Sequence[Tensor],
        score_thresh: float,
        topk_candidates: int,
        image_size: tuple[int, int],
    ) -> Instances:
        """Return the best-scored boxes of all levels in one image."""
        levels = zip(anchors, pred_scores, pred_deltas, strict=True)
        if isinstance(image_size, Tensor):
            return _decode_in_batch(
                list(levels), self.box2box_transform, score_thresh, topk_candidates, image_size
            )
        return Instances.cat(
            [
                self._decode_per_level_predictions(
                    *level, score_thresh, topk_candidates, image_size
                )
                for level in levels
            ]
        )

    def inference_single_image(
        self,
        anchors: list[Boxes],
        box_cls: list[Tensor],
        box_delta: list[Tensor],
        image_size: tuple[int, int],
    ) -> Instances:
        """Return the detections in one image, best first.

        Args:
            anchors: Per level the R_l anchors.
            box_cls: Per level (R_l, K) scores in [0, 1].
            box_delta: Per level (R_l, 4).
            image_size: (height, width) of the image.
        """
        candidates = self._decode_multi_level_predictions(
            anchors,
            box_cls,
            box_delta,
            self.test_score_thresh,
            self.test_topk_candidates,
            image_size,
        )
        if self.test_clip_before_nms:
            candidates.pred_boxes.clip(image_size)
        detection_filter = DetectionFilter(
            self.test_score_thresh,
            self.test_nms_thresh,
            self.max_detections_per_image,
            self.test_nms,
        )
        images: Any = candidates.image_size
        keep, kept_scores = detection_filter(
            candidates.pred_boxes.tensor,
            candidates.scores,
            candidates.pred_classes,
            images if isinstance(images, RowImages) else None,
        )
        detections = candidates[keep]
        detections.scores = kept_scores
        return detections

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Weights with an average restore it; those without, such as Detectron2's, reset it.
        saved = state_dict.get(f"{prefix}loss_normalizer")
        self.loss_normalizer = (
            None if saved is None else torch.zeros_like(saved, device=self.device)
        )
        super()._load_from_state_dict(state_dict, prefix, *args)


def indexed_sizes(images: ImageList) -> Iterable[tuple[Any, Any]]:
    """Return index and size of every image; in an exported graph one of all images, and (N, 2)."""
    sizes = images.image_sizes
    return [(slice(None), sizes)] if isinstance(sizes, Tensor) else enumerate(sizes)


def focal_loss_of_levels(
    logits: Sequence[Tensor], labels: Tensor, *, alpha: float, gamma: float
) -> Tensor:
    """Sum the focal loss over all classes of all anchors that are not ignored.

    Args:
        logits: Per level (N, R_l, K).
        labels: (N, R) int64 over all levels: a class in [0, K), K background, -1 ignored.
        alpha: See `sigmoid_focal_loss`.
        gamma: Likewise.
    """
    classes = torch.arange(logits[0].shape[-1], device=labels.device)
    labels_by_level = labels.split([x.shape[1] for x in logits], dim=1)
    losses: list[Tensor] = []
    # Level by level, and ignored anchors by a factor of 0: joining the levels and selecting
    # anchors would copy the largest tensors of the model, and wait for the device.
    for logits_l, labels_l in zip(logits, labels_by_level, strict=True):
        # Background, K, equals no class: all its targets are 0.
        targets = labels_l[..., None] == classes
        loss = sigmoid_focal_loss(logits_l, targets, alpha=alpha, gamma=gamma)
        losses.append(loss.masked_fill(labels_l[..., None] < 0, 0.0).sum())
    return torch.stack(losses).sum()


def predictions_by_anchor(maps: Tensor, dim: int) -> Tensor:
    """Turn a map (N, A * D, H, W) into (N, H * W * A, D) float32, the order of the anchors.

    Args:
        maps: Predictions of one level; those of anchor a are the channels D a to D a + D - 1.
        dim: D, numbers per anchor.
    """
    # Without a copy if the maps are channels-last and float32.
    return maps.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, dim)).float()


def decode_level(
    anchors: Boxes,
    scores: Tensor,
    deltas: Tensor,
    transform: BoxTransform,
    *,
    score_thresh: float,
    topk_candidates: int,
    image_size: tuple[int, int],
) -> Instances:
    """Return the best-scored boxes of one level in one image.

    Args:
        anchors: The R_l anchors.
        scores: (R_l, K) in [0, 1].
        deltas: (R_l, 4).
        transform: Encodes boxes as deltas.
        score_thresh: Candidates must score higher.
        topk_candidates: Largest number of candidates.
        image_size: (height, width) of the image.

    Returns:
        `pred_boxes`, `scores` and `pred_classes`, best first. Not clipped to the image. An anchor
        may appear with several classes. Boxes and scores that are not finite are left out.
    """
    # The threshold comes before top-k: of some ten million scores it leaves thousands.
    anchor_ids, classes = nonzero_tuple(scores > score_thresh)
    top, order = scores[anchor_ids, classes].topk(min(topk_candidates, len(anchor_ids)))
    anchor_ids, classes = anchor_ids[order], classes[order]
    # Only the boxes of candidates are decoded.
    boxes = transform.apply_deltas(deltas[anchor_ids], anchors.tensor[anchor_ids])
    candidates = Instances(image_size, pred_boxes=Boxes(boxes), scores=top, pred_classes=classes)
    return candidates[nonzero_tuple(torch.isfinite(boxes).all(dim=1))[0]]


def _decode_in_batch(
    levels: Sequence[tuple[Boxes, Tensor, Tensor]],
    transform: BoxTransform,
    score_thresh: float,
    topk_candidates: int,
    image_sizes: Tensor,
) -> Instances:
    """Return the best-scored boxes of all levels in all images, in an exported graph.

    Args:
        levels: Each the R_l anchors, (N, R_l, K) scores, and (N, R_l, 4) deltas.
        transform: See `decode_level`.
        score_thresh: Likewise.
        topk_candidates: Likewise.
        image_sizes: (N, 2)
    """
    boxes, scores, classes = [], [], []
    for anchors, scores_l, deltas in levels:
        num_classes = scores_l.shape[2]
        # Filled up, so that there are always as many; no score is below 0.
        filled = F.pad(scores_l.flatten(1), [0, topk_candidates], value=-1.0)
        top, index = filled.topk(topk_candidates, dim=1)
        ids = (index // num_classes).clamp(max=scores_l.shape[1] - 1)
        start = anchors.tensor[ids]
        decoded = transform.apply_deltas(
            deltas.gather(1, ids[..., None].expand(-1, -1, 4)).flatten(0, 1), start.flatten(0, 1)
        )
        boxes.append(decoded.view_as(start))
        scores.append(top)
        classes.append(index % num_classes)
    all_boxes, all_scores = torch.cat(boxes, dim=1), torch.cat(scores, dim=1)
    is_candidate = (all_scores > score_thresh) & torch.isfinite(all_boxes).all(dim=2)
    rows = nonzero_tuple(is_candidate)
    images: Any = RowImages(rows[0], image_sizes)
    return Instances(
        images,
        pred_boxes=BatchBoxes(all_boxes[rows], images),
        scores=all_scores[rows],
        pred_classes=torch.cat(classes, dim=1)[rows],
    )
