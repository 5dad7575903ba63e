"""A mask for every region: the head, its loss, and how masks are read from it.

Source: He et al. 2017, arXiv 1703.06870.

Legend: N images, R regions over the batch, C channels, K classes (1 where they share a mask), S
    cells of a mask along a side.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import Conv2d, ShapeSpec, c2_msra_fill, cat
from detkit.layers.conv import conv_norm_relu
from detkit.modeling.roi_heads.build import ROI_MASK_HEAD_REGISTRY
from detkit.structures import Instances, PolygonMasks
from detkit.utils.errors import DataError
from detkit.utils.events import get_event_storage, has_event_storage


def mask_rcnn_loss(
    pred_mask_logits: Tensor, instances: Sequence[Instances], vis_period: int = 0
) -> Tensor:
    """Compute the mean binary cross entropy of the true class's mask over regions and cells.

    Args:
        pred_mask_logits: (R, K, S, S)
        instances: Per image its foreground proposals, R over the batch, with `proposal_boxes`,
            `gt_classes` and `gt_masks`. An image without any needs no fields but the boxes.
        vis_period: Detectron2's; models do not draw.

    Returns:
        A scalar; 0, and part of the graph, when R is 0.

    Raises:
        DataError: An image has foreground, but no `gt_masks`.
    """
    with_objects = [x for x in instances if len(x) > 0]
    for x in with_objects:
        if not x.has("gt_masks"):
            raise DataError(
                f"masks are trained on gt_masks, but instances have only {sorted(x.get_fields())}:"
                " MODEL.MASK_ON needs a data set with segmentations"
            )
    if not with_objects:
        return pred_mask_logits.sum() * 0
    # The target is the part of the object within the proposal, at the resolution of the prediction.
    size = pred_mask_logits.shape[2]
    masks, boxes = [x.gt_masks for x in with_objects], [x.proposal_boxes for x in with_objects]
    if all(isinstance(masks_i, PolygonMasks) for masks_i in masks):
        # All images at once: the boxes are fetched from the device, and the masks brought there.
        masks, boxes = [PolygonMasks.cat(masks)], [type(boxes[0]).cat(boxes)]
    targets = [
        masks_i.crop_and_resize(boxes_i.tensor, size)
        for masks_i, boxes_i in zip(masks, boxes, strict=True)
    ]
    device = pred_mask_logits.device
    target = cat([target_i.to(device, non_blocking=True) for target_i in targets])
    # Only the mask of the true class is trained: classes do not compete for a cell (section 3).
    logits = _masks_of_classes(pred_mask_logits, [x.gt_classes for x in with_objects])[:, 0]
    # Float32 under autocast too: a mean over a hundred thousand cells needs its digits.
    logits = logits.float()
    if has_event_storage():
        _log_accuracy(logits.detach(), target)
    return F.binary_cross_entropy_with_logits(logits, target.float())


def mask_rcnn_inference(pred_mask_logits: Tensor, pred_instances: Sequence[Instances]) -> None:
    """Set `pred_masks` on the detections of every image.

    Args:
        pred_mask_logits: (R, K, S, S)
        pred_instances: Per image its detections, R over the batch, with `pred_classes`.
            `pred_masks` becomes (M, 1, S, S) float32: the probability that a cell of the box
            belongs to the object.
    """
    logits = _masks_of_classes(pred_mask_logits, [x.pred_classes for x in pred_instances])
    masks = logits.float().sigmoid().split([x.pred_classes.shape[0] for x in pred_instances])
    for instances_i, masks_i in zip(pred_instances, masks, strict=True):
        instances_i.pred_masks = masks_i


def _masks_of_classes(logits: Tensor, classes: Sequence[Tensor]) -> Tensor:
    """Select from (R, K, S, S) the mask of each region's class: (R, 1, S, S)."""
    if logits.shape[1] == 1:
        return logits
    region = torch.arange(logits.shape[0], device=logits.device)
    return logits[region, cat(classes)][:, None]


def _log_accuracy(logits: Tensor, target: Tensor) -> None:
    """Log how well the masks fit. The numbers stay on the device until they are read."""
    is_wrong = (logits > 0) != target  # a logit of 0 is a probability of one half
    num_positive = target.sum()
    num_negative = target.numel() - num_positive
    false_positive = (is_wrong & ~target).sum() / num_negative.clamp(min=1)
    false_negative = (is_wrong & target).sum() / num_positive.clamp(min=1)
    storage = get_event_storage()
    storage.put_scalar("mask_rcnn/accuracy", 1 - is_wrong.float().mean())
    storage.put_scalar("mask_rcnn/false_positive", false_positive)
    storage.put_scalar("mask_rcnn/false_negative", false_negative)


class BaseMaskRCNNHead(nn.Module):
    """Base of mask heads: loss and inference. A subclass implements `layers`."""

    @configurable
    def __init__(self, *, loss_weight: float = 1.0, vis_period: int = 0) -> None:
        """Set the factor on the loss; `vis_period` is Detectron2's, models do not draw."""
        super().__init__()
        self.loss_weight = loss_weight
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Map config keys to the arguments of this base class."""
        return {"vis_period": cfg.VIS_PERIOD}

    def forward(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor] | list[Instances]:
        """Return `losses` in training, else `inference`.

        Args:
            x: (R, C, H, W) pooled features.
            instances: Per image the regions: foreground proposals in training, else detections.
        """
        return self.losses(x, instances) if self.training else self.inference(x, instances)

    def losses(self, x: Tensor, instances: list[Instances]) -> dict[str, Tensor]:
        """Return `loss_mask` of foreground proposals; see `mask_rcnn_loss`."""
        return {"loss_mask": mask_rcnn_loss(self.layers(x), instances) * self.loss_weight}

    def inference(self, x: Tensor, instances: list[Instances]) -> list[Instances]:
        """Return the detections with `pred_masks`; see `mask_rcnn_inference`."""
        mask_rcnn_inference(self.layers(x), instances)
        return instances

    def layers(self, x: Tensor) -> Tensor:
        """Turn (R, C, H, W) pooled features into (R, K, S, S) logits."""
        raise NotImplementedError(f"{type(self).__name__} does not implement layers")


@ROI_MASK_HEAD_REGISTRY.register()
class MaskRCNNConvUpsampleHead(BaseMaskRCNNHead, nn.Sequential):
    """3x3 convolutions, an upsampling by 2, and a 1x1 convolution that predicts: S = 2 H.

    Source: He et al. 2017, arXiv 1703.06870, figure 4 (right).
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        num_classes: int,
        conv_dims: Sequence[int],
        conv_norm: str = "",
        loss_weight: float = 1.0,
        vis_period: int = 0,
    ) -> None:
        """Stack the layers.

        Args:
            input_shape: C of the pooled features.
            num_classes: K
            conv_dims: Channels of each convolution; the last number is that of the upsampling.
            conv_norm: Norm after each convolution, as for `get_norm`.
            loss_weight: Factor on the loss.
            vis_period: See `BaseMaskRCNNHead`.

        Raises:
            ValueError: `conv_dims` is empty.
            ValueError: C is not known.
        """
        super().__init__(loss_weight=loss_weight, vis_period=vis_period)
        channels = input_shape.channels
        if not conv_dims:
            raise ValueError("conv_dims is empty, but needs the channels of the upsampling")
        if channels is None:
            raise ValueError(f"the mask head needs the channels of its input, got {input_shape}")
        # Names are those of Detectron2's checkpoints; `layers` runs the layers in this order.
        self.conv_norm_relus: list[nn.Module] = []
        for k, dim in enumerate(conv_dims[:-1], start=1):
            self.conv_norm_relus.append(conv_norm_relu(channels, dim, conv_norm))
            self.add_module(f"mask_fcn{k}", self.conv_norm_relus[-1])
            channels = dim
        self.deconv = nn.ConvTranspose2d(channels, conv_dims[-1], kernel_size=2, stride=2)
        self.deconv_relu = nn.ReLU(inplace=True)
        self.predictor = Conv2d(conv_dims[-1], num_classes, kernel_size=1)
        c2_msra_fill(self.deconv)
        # Small, so that every cell starts at a probability of about one half.
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.get_parameter("bias"))

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Map config keys to arguments."""
        head = cfg.MODEL.ROI_MASK_HEAD
        return {
            **super().from_config(cfg, input_shape),
            "input_shape": input_shape,
            "num_classes": 1 if head.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "conv_dims": [head.CONV_DIM] * (head.NUM_CONV + 1),
            "conv_norm": head.NORM,
        }

    def layers(self, x: Tensor) -> Tensor:
        """Turn (R, C, H, W) pooled features into (R, K, 2 H, 2 W) logits."""
        for layer in self:
            x = layer(x)
        return x
