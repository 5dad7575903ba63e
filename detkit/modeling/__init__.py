"""Models and their parts, each selected from a config by its registered name."""

from detkit.layers import ShapeSpec
from detkit.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    DefaultAnchorGenerator,
    build_anchor_generator,
)
from detkit.modeling.backbone import (
    BACKBONE_REGISTRY,
    FPN,
    Backbone,
    LastLevelMaxPool,
    ResNet,
    build_backbone,
    build_fpn,
    build_resnet_backbone,
    build_resnet_fpn_backbone,
    build_retinanet_fpn,
)
from detkit.modeling.box_regression import Box2BoxTransform
from detkit.modeling.matcher import Matcher
from detkit.modeling.meta_arch import (
    META_ARCH_REGISTRY,
    DenseDetector,
    Detector,
    GeneralizedRCNN,
    ProposalNetwork,
    RetinaNet,
    RetinaNetHead,
    build_model,
)
from detkit.modeling.poolers import ROIPooler
from detkit.modeling.postprocessing import detector_postprocess
from detkit.modeling.proposal_generator import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN_HEAD_REGISTRY,
    build_proposal_generator,
    build_rpn_head,
)
from detkit.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    ROIHeads,
    StandardROIHeads,
    build_box_head,
    build_roi_heads,
)

__all__ = [
    "ANCHOR_GENERATOR_REGISTRY",
    "BACKBONE_REGISTRY",
    "FPN",
    "META_ARCH_REGISTRY",
    "PROPOSAL_GENERATOR_REGISTRY",
    "ROI_BOX_HEAD_REGISTRY",
    "ROI_HEADS_REGISTRY",
    "RPN_HEAD_REGISTRY",
    "Backbone",
    "Box2BoxTransform",
    "CascadeROIHeads",
    "DefaultAnchorGenerator",
    "DenseDetector",
    "Detector",
    "FastRCNNOutputLayers",
    "GeneralizedRCNN",
    "LastLevelMaxPool",
    "Matcher",
    "ProposalNetwork",
    "ROIHeads",
    "ROIPooler",
    "Res5ROIHeads",
    "ResNet",
    "RetinaNet",
    "RetinaNetHead",
    "ShapeSpec",
    "StandardROIHeads",
    "build_anchor_generator",
    "build_backbone",
    "build_box_head",
    "build_fpn",
    "build_model",
    "build_proposal_generator",
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_fpn",
    "build_roi_heads",
    "build_rpn_head",
    "detector_postprocess",
]
