"""Keypoints of every region: the head, its loss, and how keypoints are read from it.

Source: He et al. 2017, arXiv 1703.06870, section 5.

Legend: N images, R regions over the batch, C channels, K keypoints, S cells of a heatmap along a
    side.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import Conv2d, ShapeSpec, cat
from detkit.modeling.roi_heads.build import ROI_KEYPOINT_HEAD_REGISTRY
from detkit.structures import Instances, heatmaps_to_keypoints
from detkit.utils.errors import DataError

_IGNORED = -1


def keypoint_rcnn_loss(
    pred_keypoint_logits: Tensor, instances: Sequence[Instances], normalizer: float | None
) -> Tensor:
    """Compute the cross entropy, over all cells, of the one cell that each keypoint lies in.

    Args:
        pred_keypoint_logits: (R, K, S, S)
        instances: Per image its proposals, R over the batch, with `proposal_boxes` and
            `gt_keypoints`. An image without any needs no fields but the boxes.
        normalizer: Divisor of the sum over keypoints. None divides by the number of those that
            count: those that are labelled and lie in the proposal.

    Returns:
        A scalar; 0, and part of the graph, when no keypoint counts.

    Raises:
        DataError: An image has proposals, but no `gt_keypoints`, or the wrong number of them.
    """
    num_keypoints, size = pred_keypoint_logits.shape[1:3]
    with_objects = [x for x in instances if len(x) > 0]
    for x in with_objects:
        if not x.has("gt_keypoints"):
            raise DataError(
                "keypoints are trained on gt_keypoints, but instances have only"
                f" {sorted(x.get_fields())}: MODEL.KEYPOINT_ON needs a data set with keypoints"
            )
        if x.gt_keypoints.tensor.shape[1] != num_keypoints:
            raise DataError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num_keypoints}, but the data has"
                f" {x.gt_keypoints.tensor.shape[1]} keypoints per object"
            )
    if not with_objects:
        return pred_keypoint_logits.sum() * 0
    cells, is_valid = [], []
    for x in with_objects:
        cells_i, is_valid_i = x.gt_keypoints.to_heatmap(x.proposal_boxes.tensor, size)
        cells.append(cells_i)
        is_valid.append(is_valid_i)
    valid = cat(is_valid)
    # Keypoints without a label or outside the proposal are ignored, not left out: the number of
    # the others would be a shape, which waits for the device.
    target = cat(cells).masked_fill(valid == 0, _IGNORED).flatten()
    # Float32 under autocast too: this is a softmax over some thousand cells.
    logits = pred_keypoint_logits.float().flatten(2).flatten(0, 1)
    loss = F.cross_entropy(logits, target, reduction="sum", ignore_index=_IGNORED)
    return loss / (valid.sum().clamp(min=1) if normalizer is None else normalizer)


def keypoint_rcnn_inference(
    pred_keypoint_logits: Tensor, pred_instances: Sequence[Instances]
) -> None:
    """Set `pred_keypoints` and `pred_keypoint_heatmaps` on the detections of every image.

    Args:
        pred_keypoint_logits: (R, K, S, S)
        pred_instances: Per image its detections, R over the batch, with `pred_boxes`.
            `pred_keypoints` becomes (M, K, 3) float32 as `(x, y, score)`; see
            `heatmaps_to_keypoints`. `pred_keypoint_heatmaps` becomes the (M, K, S, S) logits.
    """
    logits = pred_keypoint_logits.detach()
    boxes = cat([x.pred_boxes.tensor for x in pred_instances])
    # Column 2 is the logit of the cell, column 3 its probability.
    keypoints = heatmaps_to_keypoints(logits, boxes)[:, :, [0, 1, 3]]
    counts = [x.pred_boxes.tensor.shape[0] for x in pred_instances]
    for x, keypoints_i, logits_i in zip(
        pred_instances, keypoints.split(counts), logits.split(counts), strict=True
    ):
        x.pred_keypoints = keypoints_i
        x.pred_keypoint_heatmaps = logits_i


class BaseKeypointRCNNHead(nn.Module):
    """Base of keypoint heads: loss and inference. A subclass implements `layers`."""

    @configurable
    def __init__(
        self,
        *,
        num_keypoints: int,
        loss_weight: float = 1.0,
        loss_normalizer: float | Literal["visible"] = "visible",
    ) -> None:
        """Set how the loss is scaled.

        Args:
            num_keypoints: K
            loss_weight: Factor on the loss.
            loss_normalizer: Divisor of the sum over keypoints: a number per image, or `"visible"`
                for the keypoints that count; see `keypoint_rcnn_loss`.

        Raises:
            ValueError: `loss_normalizer` is another word.
        """
        super().__init__()
        if isinstance(loss_normalizer, str) and loss_normalizer != "visible":
            raise ValueError(
                f"loss_normalizer must be a number or 'visible', got {loss_normalizer!r}"
            )
        self.num_keypoints = num_keypoints
        self.loss_weight = loss_weight
        self.loss_normalizer = loss_normalizer

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Map config keys to the arguments of this base class."""
        head, heads = cfg.MODEL.ROI_KEYPOINT_HEAD, cfg.MODEL.ROI_HEADS
        # The most keypoints that an image can have: all of its foreground, all labelled.
        constant = head.NUM_KEYPOINTS * heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION
        return {
            "num_keypoints": head.NUM_KEYPOINTS,
            "loss_weight": head.LOSS_WEIGHT,
            "loss_normalizer": "visible" if head.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS else constant,
        }

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """Return `losses` in training, else `inference`.

        Args:
            x: (R, C, H, W) pooled features.
            instances: Per image the regions: foreground proposals in training, else detections.
        """
        return self.losses(x, instances) if self.training else self.inference(x, instances)

    def losses(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor]:
        """Return `loss_keypoint` of foreground proposals; see `keypoint_rcnn_loss`."""
        normalizer = None
        if self.loss_normalizer != "visible":
            normalizer = len(instances) * float(self.loss_normalizer)
        loss = keypoint_rcnn_loss(self.layers(x), instances, normalizer)
        return {"loss_keypoint": loss * self.loss_weight}

    def inference(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """Return the detections with `pred_keypoints`; see `keypoint_rcnn_inference`."""
        keypoint_rcnn_inference(self.layers(x), instances)
        return instances

    def layers(self, x: Tensor) -> Tensor:
        """Turn (R, C, H, W) pooled features into (R, K, S, S) logits."""
        raise NotImplementedError(f"{type(self).__name__} does not implement layers")


@ROI_KEYPOINT_HEAD_REGISTRY.register()
class KRCNNConvDeconvUpsampleHead(BaseKeypointRCNNHead, nn.Sequential):
    """3x3 convolutions, an upsampling by 2 that predicts, and a bilinear one: S = 4 H."""

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_keypoints: int,
        conv_dims: Sequence[int],
        loss_weight: float = 1.0,
        loss_normalizer: float | Literal["visible"] = "visible",
    ) -> None:
        """Stack the layers.

        Args:
            input_shape: C of the pooled features.
            num_keypoints: K
            conv_dims: Channels of each convolution.
            loss_weight: Factor on the loss.
            loss_normalizer: Divisor of the loss; see `BaseKeypointRCNNHead`.

        Raises:
            ValueError: C is not known.
        """
        super().__init__(
            num_keypoints=num_keypoints, loss_weight=loss_weight, loss_normalizer=loss_normalizer
        )
        channels = input_shape.channels
        if channels is None:
            raise ValueError(
                f"the keypoint head needs the channels of its input, got {input_shape}"
            )
        # Names are those of Detectron2's checkpoints; `layers` runs the layers in this order.
        for k, dim in enumerate(conv_dims, start=1):
            self.add_module(f"conv_fcn{k}", Conv2d(channels, dim, kernel_size=3, padding=1))
            self.add_module(f"conv_fcn_relu{k}", nn.ReLU(inplace=True))
            channels = dim
        self.score_lowres = nn.ConvTranspose2d(
            channels, num_keypoints, kernel_size=4, stride=2, padding=1
        )
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Map config keys to arguments."""
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "conv_dims": cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS,
        }

    def layers(self, x: Tensor) -> Tensor:
        """Turn (R, C, H, W) pooled features into (R, K, 4 H, 4 W) logits."""
        for layer in self:
            x = layer(x)
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
