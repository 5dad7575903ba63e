"""Augmentation of images and of everything annotated on them; imported as `T`."""

from detkit.data.transforms.augmentation import (
    AUGMENTATION_REGISTRY,
    AugInput,
    Augmentation,
    AugmentationList,
    RandomApply,
    apply_augmentations,
)
from detkit.data.transforms.color import (
    BlendTransform,
    RandomBrightness,
    RandomContrast,
    RandomLighting,
    RandomSaturation,
)
from detkit.data.transforms.crop import (
    CropTransform,
    FixedSizeCrop,
    PadTransform,
    RandomCrop,
    RandomCrop_CategoryAreaConstraint,
    RandomCropAroundInstance,
)
from detkit.data.transforms.geometry import (
    HFlipTransform,
    RandomFlip,
    Resize,
    ResizeScale,
    ResizeShortestEdge,
    ResizeTransform,
    TorchvisionResizeShortestEdge,
    TorchvisionResizeTransform,
    VFlipTransform,
)
from detkit.data.transforms.transform import NoOpTransform, Transform, TransformList

__all__ = [
    "AUGMENTATION_REGISTRY",
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "BlendTransform",
    "CropTransform",
    "FixedSizeCrop",
    "HFlipTransform",
    "NoOpTransform",
    "PadTransform",
    "RandomApply",
    "RandomBrightness",
    "RandomContrast",
    "RandomCrop",
    "RandomCropAroundInstance",
    "RandomCrop_CategoryAreaConstraint",
    "RandomFlip",
    "RandomLighting",
    "RandomSaturation",
    "Resize",
    "ResizeScale",
    "ResizeShortestEdge",
    "ResizeTransform",
    "TorchvisionResizeShortestEdge",
    "TorchvisionResizeTransform",
    "Transform",
    "TransformList",
    "VFlipTransform",
    "apply_augmentations",
]
