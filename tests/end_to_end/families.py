"""A small model of each family on the generated shapes, for tests that hold for all of them."""

from detkit.config import get_cfg
from detkit.data.datasets.shapes.scene import SHAPES_KEYPOINTS
from detkit.model_zoo import find_config

COMMON = {
    "MODEL.DEVICE": "cpu",
    "MODEL.ROI_BOX_HEAD.FC_DIM": 128,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 64,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 64,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 64,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "INPUT.MIN_SIZE_TRAIN": [64],
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.RANDOM_FLIP": "none",
    "SEED": 1,
}
KEYPOINT = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": len(SHAPES_KEYPOINTS),
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [64, 64],
    "DATASETS.TRAIN": ["shapes_train_keypoints"],
}
CASCADE = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}
C4 = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.5,  # boxes are read from a mean over the region, and take longer to learn
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 8,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8, 16, 32, 64]],
}
ROTATED_ON_ONE_MAP = {
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3"],
    "MODEL.RPN.IN_FEATURES": ["res3"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["res3"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[12, 24, 48, 96]],
}
RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RETINANET.NUM_CLASSES": 5,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[12, 17], [24, 34], [48, 68], [96, 136], [192, 270]],
}
FCOS = {
    "MODEL.META_ARCHITECTURE": "FCOS",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    # Two objects with nearly the same centre share the cells of stride 8 there.
    "MODEL.FCOS.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6", "p7"],
    "MODEL.FCOS.NUM_CLASSES": 5,
    "MODEL.FCOS.NUM_CONVS": 1,
    "MODEL.FCOS.NORM": "",
}
REGNET = {
    "MODEL.BACKBONE.NAME": "build_regnet_fpn_backbone",
    "MODEL.REGNET.DEPTH": 4,
    "MODEL.REGNET.W_0": 16,
    "MODEL.REGNET.W_A": 16.0,
    "MODEL.REGNET.W_M": 2.0,
    "MODEL.REGNET.GROUP_WIDTH": 8,
    "MODEL.REGNET.SE_RATIO": 0.25,
    "MODEL.REGNET.OUT_FEATURES": ["s1", "s2", "s3"],
    "MODEL.FPN.IN_FEATURES": ["s1", "s2", "s3"],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32]],
}
VIT = {
    "MODEL.BACKBONE.NAME": "build_vit_fpn_backbone",
    "MODEL.FPN.NORM": "LN",
    "MODEL.VIT.PATCH_SIZE": 8,
    "MODEL.VIT.EMBED_DIM": 48,
    "MODEL.VIT.DEPTH": 3,
    "MODEL.VIT.NUM_HEADS": 3,
    "MODEL.VIT.WINDOW_SIZE": 4,
    "MODEL.VIT.GLOBAL_BLOCKS": [2],
    "MODEL.VIT.DROP_PATH_RATE": 0.0,
    "MODEL.FPN.SCALE_FACTORS": [2.0, 1.0, 0.5],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64]],
}
SWIN = {
    "MODEL.BACKBONE.NAME": "build_swin_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.SWIN.EMBED_DIM": 24,
    "MODEL.SWIN.DEPTHS": [1, 2, 1, 1],
    "MODEL.SWIN.WINDOW_SIZE": 4,
    "MODEL.SWIN.DROP_PATH_RATE": 0.0,
    "MODEL.FPN.IN_FEATURES": ["p0", "p1", "p2", "p3"],
}
MVIT = {
    "MODEL.BACKBONE.NAME": "build_mvit_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.MVIT.EMBED_DIM": 16,
    "MODEL.MVIT.DEPTH": 5,
    "MODEL.MVIT.LAST_BLOCKS": [0, 1, 3, 4],
    "MODEL.MVIT.WINDOW_SIZE": 8,
    "MODEL.MVIT.IMAGE_SIZE": 64,
    "MODEL.MVIT.DROP_PATH_RATE": 0.0,
    "MODEL.FPN.IN_FEATURES": ["scale2", "scale3", "scale4", "scale5"],
}
FAMILIES = {
    "box": ("faster_rcnn", {}),
    "mask": ("faster_rcnn", {"MODEL.MASK_ON": True}),
    "keypoint": ("faster_rcnn", KEYPOINT),
    "cascade": ("faster_rcnn", CASCADE),
    "C4": ("faster_rcnn", C4),
    "rotated": ("rotated_faster_rcnn", {"MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.5}),
    "rotated on one map": ("rotated_faster_rcnn", ROTATED_ON_ONE_MAP),
    "RetinaNet": ("faster_rcnn", RETINANET),
    "FCOS": ("faster_rcnn", FCOS),
    "RegNet": ("faster_rcnn", REGNET),
    "ViT": ("faster_rcnn", VIT),
    "Swin": ("faster_rcnn", SWIN),
    "MViT": ("faster_rcnn", MVIT),
    "semantic": ("semantic", {}),
    "panoptic": ("panoptic_fpn", {"MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 64}),
}
"""By name: the quick-start config that it starts from, and what it changes in it."""
TIMM_VIT = {
    "MODEL.BACKBONE.NAME": "build_timm_vit_fpn_backbone",
    "MODEL.TIMM.NAME": "test_vit",
    "MODEL.FPN.NORM": "LN",
}
SLOW_FAMILIES = {"ViT of timm": ("faster_rcnn", TIMM_VIT)}
"""Those that differ from another one in where the layers come from."""


def family_config(family):
    """Return the config of a family's small model."""
    start, changes = (FAMILIES | SLOW_FAMILIES)[family]
    cfg = get_cfg()
    cfg.merge_from_file(find_config(f"quick_start/{start}_R_18_FPN_shapes.yaml"))
    cfg.merge_from_list([item for pair in {**COMMON, **changes}.items() for item in pair])
    return cfg
