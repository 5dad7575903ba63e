"""Whole models: from the dicts of a data loader to losses or predictions."""

from detkit.modeling.meta_arch.base import Detector
from detkit.modeling.meta_arch.build import META_ARCH_REGISTRY, build_model
from detkit.modeling.meta_arch.rcnn import GeneralizedRCNN, ProposalNetwork

__all__ = ["META_ARCH_REGISTRY", "Detector", "GeneralizedRCNN", "ProposalNetwork", "build_model"]
