"""Layers and functions that models are made of, over torch and torchvision."""

from detkit.layers.checkpointing import CheckpointedSequential
from detkit.layers.conv import CNNBlockBase, Conv2d, ShapeSpec, c2_msra_fill, c2_xavier_fill
from detkit.layers.cpu import cpu_kernels, cpu_kernels_enabled
from detkit.layers.cpu.prepared_weights import PreparedWeights
from detkit.layers.deform_conv import DeformConv, ModulatedDeformConv
from detkit.layers.losses import (
    ciou_loss,
    cross_entropy,
    diou_loss,
    giou_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from detkit.layers.nms import (
    NMS_METHODS,
    NMSMethod,
    batched_nms,
    batched_nms_rotated,
    nms,
    nms_rotated,
    suppress,
)
from detkit.layers.norm import (
    NORM_NAMES,
    CycleBatchNormList,
    EvalBatchNorm2d,
    FrozenBatchNorm2d,
    LayerNorm2d,
    get_norm,
)
from detkit.layers.roi_align import ROIAlign, roi_align
from detkit.layers.roi_align_rotated import ROIAlignRotated, roi_align_rotated
from detkit.layers.tensor_ops import cat, nonzero_tuple
from detkit.structures import pairwise_iou_rotated, paste_masks_in_image

__all__ = [
    "NMS_METHODS",
    "NORM_NAMES",
    "CNNBlockBase",
    "CheckpointedSequential",
    "Conv2d",
    "CycleBatchNormList",
    "DeformConv",
    "EvalBatchNorm2d",
    "FrozenBatchNorm2d",
    "LayerNorm2d",
    "ModulatedDeformConv",
    "NMSMethod",
    "PreparedWeights",
    "ROIAlign",
    "ROIAlignRotated",
    "ShapeSpec",
    "batched_nms",
    "batched_nms_rotated",
    "c2_msra_fill",
    "c2_xavier_fill",
    "cat",
    "ciou_loss",
    "cpu_kernels",
    "cpu_kernels_enabled",
    "cross_entropy",
    "diou_loss",
    "get_norm",
    "giou_loss",
    "nms",
    "nms_rotated",
    "nonzero_tuple",
    "pairwise_iou_rotated",
    "paste_masks_in_image",
    "roi_align",
    "roi_align_rotated",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "suppress",
]
