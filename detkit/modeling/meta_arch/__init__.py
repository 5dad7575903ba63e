"""Whole models: from the dicts of a data loader to losses or predictions."""

from detkit.modeling.meta_arch.base import Detector
from detkit.modeling.meta_arch.build import META_ARCH_REGISTRY, build_model
from detkit.modeling.meta_arch.dense_detector import DenseDetector
from detkit.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork
from detkit.modeling.meta_arch.retinanet import RetinaNet
from detkit.modeling.meta_arch.retinanet_head import RetinaNetHead

__all__ = [
    "META_ARCH_REGISTRY",
    "DenseDetector",
    "Detector",
    "GeneralizedRCNN",
    "ProposalNetwork",
    "RetinaNet",
    "RetinaNetHead",
    "build_model",
]
