"""What one-stage detectors share: a head over every cell of a feature pyramid.

Legend: N images, L levels, A anchors per cell, H x W cells of a level, R_l = H_l * W_l * A anchors
    of level l, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detkit.config import declare_architecture
from detkit.layers import nonzero_tuple
from detkit.modeling.backbone import Backbone
from detkit.modeling.box_regression import Box2BoxTransform
from detkit.modeling.meta_arch.base import Detector, rescale_outputs
from detkit.structures import Boxes, ImageList, Instances, ModelInput, ModelOutput

HeadOutput = tuple[list[Tensor], ...]
"""One list per kind of prediction, each with a map (N, A * D, H, W) per level."""


# Not an architecture itself: test-time augmentation uses these keys for subclasses without any.
@declare_architecture(
    score_thresholds=["MODEL.RETINANET.SCORE_THRESH_TEST"],
    nms_threshold="MODEL.RETINANET.NMS_THRESH_TEST",
)
class DenseDetector(Detector):
    """A backbone and a head. A subclass implements `forward_training` and `forward_inference`."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: Sequence[str] | None = None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `Detector`.

        Args:
            head: A list of L features to `HeadOutput`.
            head_in_features: Names of the L features; None takes all of the backbone, finest first.
        """
        super().__init__(backbone, pixel_mean, pixel_std, memory_format)
        self.head = head
        if head_in_features is None:
            shapes = backbone.output_shape()
            head_in_features = sorted(shapes, key=lambda name: shapes[name].stride or 0)
        self.head_in_features = list(head_in_features)

    def losses(self, batched_inputs: list[ModelInput]) -> dict[str, Tensor]:
        """Return the losses by name, for inputs with `instances`."""
        targets = self.take_field(batched_inputs, "instances")
        images = self.preprocess_image(batched_inputs)
        features = self._head_features(images)
        return self.forward_training(images, features, self.head(features), targets)

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
    transform: Box2BoxTransform,
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
