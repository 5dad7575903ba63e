"""Augmentation of images and of everything annotated on them; imported as `T`."""

from detkit.data.transforms.augmentation import (
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
    PadTransform,
    RandomCrop,
    RandomCrop_CategoryAreaConstraint,
    RandomCropAroundInstance,
)
from detkit.data.transforms.geometry import (
    HFlipTransform,
    RandomFlip,
    Resize,
    ResizeShortestEdge,
    ResizeTransform,
    TorchvisionResizeShortestEdge,
    TorchvisionResizeTransform,
    VFlipTransform,
)
from detkit.data.transforms.transform import NoOpTransform, Transform, TransformList

__all__ = [
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "BlendTransform",
    "CropTransform",
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
    "ResizeShortestEdge",
    "ResizeTransform",
    "TorchvisionResizeShortestEdge",
    "TorchvisionResizeTransform",
    "Transform",
    "TransformList",
    "VFlipTransform",
    "apply_augmentations",
]
