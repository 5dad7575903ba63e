"""Whole models: from the dicts of a data loader to losses or predictions."""

from detkit.modeling.meta_arch.base import Detector
from detkit.modeling.meta_arch.build import (
    META_ARCH_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
    build_model,
    build_sem_seg_head,
)
from detkit.modeling.meta_arch.dense_detector import DenseDetector
from detkit.modeling.meta_arch.fcos import FCOS, FCOSHead
from detkit.modeling.meta_arch.panoptic_fpn import (
    PanopticFPN,
    combine_semantic_and_instance_outputs,
)
from detkit.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork
from detkit.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detkit.modeling.meta_arch.semantic_seg import SemanticSegmentor, SemSegFPNHead

__all__ = [
    "FCOS",
    "META_ARCH_REGISTRY",
    "SEM_SEG_HEADS_REGISTRY",
    "DenseDetector",
    "Detector",
    "FCOSHead",
    "GeneralizedRCNN",
    "PanopticFPN",
    "ProposalNetwork",
    "RetinaNet",
    "RetinaNetHead",
    "SemSegFPNHead",
    "SemanticSegmentor",
    "build_model",
    "build_sem_seg_head",
    "combine_semantic_and_instance_outputs",
]
