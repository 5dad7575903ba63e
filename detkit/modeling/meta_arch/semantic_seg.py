"""Semantic segmentation: a class for every pixel.

Source: Kirillov et al. 2019, arXiv 1901.02446, section 3: the semantic branch of Panoptic FPN.

Legend: N images, K classes, C channels, H x W pixels of a padded image, S the stride of the head's
    output.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable, declare_architecture
from detkit.layers import Conv2d, ShapeSpec, c2_msra_fill
from detkit.layers.conv import conv_norm_relu
from detkit.modeling.backbone import Backbone, select_features
from detkit.modeling.meta_arch.base import Detector
from detkit.modeling.meta_arch.build import (
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    build_sem_seg_head,
)
from detkit.modeling.postprocessing import sem_seg_postprocess
from detkit.structures import ImageList, ModelInput, ModelOutput
from detkit.utils.errors import DataError, UserError
from detkit.utils.overriding import overridable


@SEM_SEG_HEADS_REGISTRY.register()
class SemSegFPNHead(nn.Module):
    """Upsamples the levels of a pyramid to one stride, adds them up, and classifies every pixel."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        num_classes: int,
        conv_dims: int,
        common_stride: int,
        loss_weight: float = 1.0,
        norm: str | None = None,
        ignore_value: int = -1,
    ) -> None:
        """Build the layers.

        Args:
            input_shape: Channels and stride of the features, by name.
            num_classes: K.
            conv_dims: Channels of every convolution.
            common_stride: S. The stride of each feature is S, 2 S, 4 S, ...
            loss_weight: Factor on the loss.
            norm: See `get_norm`.
            ignore_value: Label of pixels that are not trained.

        Raises:
            ValueError: There is no feature.
            ValueError: A stride is not S times a power of two.
        """
        super().__init__()
        if not input_shape:
            raise ValueError("input_shape must have at least one feature, got none")
        self.num_classes = num_classes
        self.ignore_value = ignore_value
        self.common_stride = common_stride
        self.loss_weight = loss_weight
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride or 0)
        self.in_features = [name for name, _ in shapes]
        # Each is a module under the name of its feature, as in Detectron2's checkpoints.
        for name, shape in shapes:
            self.add_module(name, _scale_head(name, shape, conv_dims, common_stride, norm))
        self.predictor = Conv2d(conv_dims, num_classes, kernel_size=1)
        c2_msra_fill(self.predictor)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        head = cfg.MODEL.SEM_SEG_HEAD
        shapes = select_features(input_shape, head.IN_FEATURES, "MODEL.SEM_SEG_HEAD.IN_FEATURES")
        return {
            "input_shape": dict(zip(head.IN_FEATURES, shapes, strict=True)),
            "num_classes": head.NUM_CLASSES,
            "conv_dims": head.CONVS_DIM,
            "common_stride": head.COMMON_STRIDE,
            "loss_weight": head.LOSS_WEIGHT,
            "norm": head.NORM,
            "ignore_value": head.IGNORE_VALUE,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return (None, losses) in training, else ((N, K, H, W) logits, {}).

        Args:
            features: By name.
            targets: (N, H, W) int64 labels, in training.
        """
        logits = self.layers(features)
        if not self.training:
            return self._upsampled(logits), {}
        if targets is None:
            raise ValueError("SemSegFPNHead needs targets in training")
        return None, self.losses(logits, targets)

    def layers(self, features: dict[str, Tensor]) -> Tensor:
        """Return (N, K, H / S, W / S) logits."""
        first, *others = [self.get_submodule(name)(features[name]) for name in self.in_features]
        total = first
        for scaled in others:
            total = total + scaled
        return self.predictor(total)

    def losses(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the cross entropy per labelled pixel; 0 if none is labelled.

        Args:
            predictions: (N, K, H / S, W / S) logits.
            targets: (N, H, W) int64 labels.
        """
        # Float32 under autocast too: the sum over all pixels of a batch needs its digits. A sum and
        # a count instead of the mean, which is NaN if no pixel is labelled.
        total = F.cross_entropy(
            self._upsampled(predictions.float()),
            targets,
            ignore_index=self.ignore_value,
            reduction="sum",
        )
        labelled = (targets != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": total / labelled * self.loss_weight}

    def _upsampled(self, logits: Tensor) -> Tensor:
        return F.interpolate(
            logits, scale_factor=self.common_stride, mode="bilinear", align_corners=False
        )


def _scale_head(
    name: str, shape: ShapeSpec, conv_dims: int, common_stride: int, norm: str | None
) -> nn.Sequential:
    """Return a convolution and an upsampling per halving of the stride; at least a convolution."""
    channels, stride = shape.channels, shape.stride
    if channels is None or stride is None:
        raise ValueError(f"SemSegFPNHead needs channels and stride of {name!r}, got {shape}")
    halvings = math.log2(stride / common_stride)
    if halvings < 0 or not halvings.is_integer():
        raise ValueError(
            f"input_shape has {name!r} of stride {stride}, which is not common_stride ="
            f" {common_stride} times 1, 2, 4, ..."
        )
    layers: list[nn.Module] = []
    # Upsampled by 2 after each convolution (figure 3 of the paper), not once at the end.
    for k in range(max(1, int(halvings))):
        layers.append(conv_norm_relu(channels if k == 0 else conv_dims, conv_dims, norm))
        if halvings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


@META_ARCH_REGISTRY.register()
@declare_architecture(num_stuff_classes="MODEL.SEM_SEG_HEAD.NUM_CLASSES")
class SemanticSegmentor(Detector):
    """A backbone and a head that classifies pixels."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """Set the parts. Arguments that are not listed are those of `Detector`.

        Args:
            sem_seg_head: See `SEM_SEG_HEADS_REGISTRY`.
        """
        super().__init__(backbone, pixel_mean, pixel_std)
        self.sem_seg_head = sem_seg_head

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Map config keys to arguments."""
        arguments = super().from_config(cfg)
        shapes = arguments["backbone"].output_shape()
        return {**arguments, "sem_seg_head": build_sem_seg_head(cfg, shapes)}

    def training_losses(self, batched_inputs: list[ModelInput]) -> dict[str, Tensor]:
        """Return the losses of the head by name, for inputs with `sem_seg`."""
        images = self.preprocess_image(batched_inputs)
        targets = sem_seg_targets(batched_inputs, images, self.sem_seg_head)
        _, losses = self.sem_seg_head(self.backbone(images.tensor), targets)
        return losses

    @overridable
    def inference(self, batched_inputs: list[ModelInput]) -> list[ModelOutput]:
        """Return `sem_seg` (K, height, width) scores, of the size that each input asks for."""
        images = self.preprocess_image(batched_inputs)
        scores, _ = self.sem_seg_head(self.backbone(images.tensor), None)
        return [{"sem_seg": result} for result in rescale_sem_seg(scores, images, batched_inputs)]


class LabelTypeError(UserError, TypeError):
    """Labels of pixels that are not integers."""


def sem_seg_targets(
    batched_inputs: Sequence[ModelInput], images: ImageList, head: nn.Module
) -> Tensor:
    """Return the labels of a batch, (N, H, W) int64, padded with the label that is not trained.

    Args:
        batched_inputs: N inputs with `sem_seg` of the size of their image.
        images: The batch, on the device that the labels are moved to.
        head: See `SEM_SEG_HEADS_REGISTRY`.

    Raises:
        DataError: An input has no `sem_seg`.
        DataError: `sem_seg` is not of the size of its image.
        DataError: A label is no class of the head.
        LabelTypeError: Labels are not integers.
    """
    ignore_value: int = head.ignore_value  # pyright: ignore[reportAssignmentType]
    num_classes = getattr(head, "num_classes", None)
    shape = (len(images), *images.tensor.shape[-2:])
    # Padding is labelled as ignored, so it takes no part in the loss.
    targets = torch.full(shape, ignore_value, dtype=torch.int64, device=images.device)
    for i, (x, (height, width)) in enumerate(zip(batched_inputs, images.image_sizes, strict=True)):
        labels = _checked_labels(x, i, (height, width), num_classes, ignore_value)
        targets[i, :height, :width] = labels.to(images.device, non_blocking=True)
    return targets


def _checked_labels(
    x: ModelInput, index: int, size: tuple[int, int], num_classes: int | None, ignore_value: int
) -> Tensor:
    where = f"image {index} of the batch ({x.get('file_name', 'no file name')})"
    if "sem_seg" not in x:
        raise DataError(
            f"semantic segmentation needs 'sem_seg' in training: {where} has only {sorted(x)}"
        )
    labels = x["sem_seg"]
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise LabelTypeError(f"sem_seg must be integer labels: that of {where} is {labels.dtype}")
    if tuple(labels.shape) != size:
        raise DataError(
            f"sem_seg must have the size of its image, {size}: that of {where} has"
            f" {tuple(labels.shape)}"
        )
    # Loaders return labels on the CPU, where this costs a millisecond. On a GPU, a label out of
    # range is a device-side assert that names nothing and ends the process.
    if num_classes is not None and labels.device.type == "cpu":
        unknown = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_value)
        if unknown.any():
            raise DataError(
                f"sem_seg of {where} has the labels {labels[unknown].unique().tolist()[:8]}; legal"
                f" are 0 to {num_classes - 1} (MODEL.SEM_SEG_HEAD.NUM_CLASSES = {num_classes}) and"
                f" {ignore_value} (MODEL.SEM_SEG_HEAD.IGNORE_VALUE)"
            )
    return labels


def rescale_sem_seg(
    scores: Tensor, images: ImageList, batched_inputs: Sequence[ModelInput]
) -> list[Tensor]:
    """Rescale (N, K, H, W) scores to the `height` and `width` of each input, else of its image."""
    return [
        sem_seg_postprocess(scores_i, size, x.get("height", size[0]), x.get("width", size[1]))
        for scores_i, size, x in zip(scores, images.image_sizes, batched_inputs, strict=True)
    ]
