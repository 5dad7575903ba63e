"""The settings below MODEL: see `detkit.config.defaults`, which holds all others."""

import sys
from typing import Any

from detkit.config.cfg_node import KeyTable

MODEL_KEYS = KeyTable()
_key = MODEL_KEYS.declare


def device_name(name: Any) -> Any:
    """Return the name of a device; under `detkit.as_detectron2`, for auto one that torch knows."""
    # Detectron2's scripts give it to torch.device and `to`, outside of models too.
    if name != "auto" or "detkit.as_detectron2" not in sys.modules:
        return name
    # Imported here, as torch takes seconds to load.
    import torch

    from detkit.utils.env import resolve_device

    # Not is_available, after which CUDA reads CUDA_VISIBLE_DEVICES no more: scripts may set it yet.
    return "cuda" if torch.cuda.device_count() else str(resolve_device(name))


# Detectron2's names. The generalized IoU losses (giou, diou, ciou) work on decoded boxes.
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
# Group of keys -> detkit's builders that read them; builders of the user's own may read any.
BUILDERS = {
    f"MODEL.{group}": tuple(f"build_{form}_backbone" for form in forms)
    for group, forms in {
        "RESNETS": ("resnet", "resnet_fpn", "retinanet_resnet_fpn"),
        "REGNET": ("regnet", "regnet_fpn", "retinanet_regnet_fpn"),
        "TORCHVISION": ("torchvision", "torchvision_fpn", "retinanet_torchvision_fpn"),
        "TIMM": ("timm", "timm_fpn", "retinanet_timm_fpn", "timm_vit_fpn"),
        "VIT": ("vit", "vit_fpn"),
        "SWIN": ("swin", "swin_fpn"),
        "MVIT": ("mvit", "mvit_fpn"),
    }.items()
}
_TIMM_VIT = ("MODEL.BACKBONE.NAME", "build_timm_vit_fpn_backbone")
RES5_HEADS = ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads")
DENSE = ("MODEL.META_ARCHITECTURE", "RetinaNet", "FCOS")
_POOLERS = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")

# fmt: off
# A table, as in `defaults`.

# --- The whole model ---

_key("MODEL.DEVICE", "auto",
     "Device of the model: auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps. Detectron2:"
     " cuda.",
     resolve=device_name)
_key("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "Registered name of the model.")
_key("MODEL.WEIGHTS", "",
     "Initial weights: path, https://, detectron2:// or torchvision:// address; empty for random"
     " weights.")
_key("MODEL.MEMORY_FORMAT", "auto",
     "detkit: memory layout of images and convolutions. channels_last is faster on CPUs and on GPUs"
     " with tensor cores; auto is channels_last, but contiguous for a model with classes of your"
     " own, whose `x.view(...)` may fail on channels_last.",
     choices=("auto", "channels_last", "contiguous"))
_key("MODEL.COMPILE", "none",
     "detkit: what torch.compile runs, in training and inference: backbone, with its pyramid, or"
     " dense, also the heads of RPN, one-stage detectors and semantic segmentation. The first steps"
     " take a minute or more; needs a C++ compiler.",
     choices=("none", "backbone", "dense"))
_key("MODEL.FSDP", False,
     "detkit: share out parameters, gradients and optimizer states over the processes (torch's"
     " fully_shard) instead of keeping all of them in each: for ViT-L and ViT-H. Checkpoints are"
     " as without it. Zhao et al. 2023, arXiv 2304.11277.",
     only_default_trainer=True)
_key("MODEL.PIXEL_MEAN", [103.530, 116.280, 123.675],
     "Mean per channel in the order of INPUT.FORMAT, in [0, 255] (default: ImageNet's in BGR). Its"
     " length is the number of input channels.")
_key("MODEL.PIXEL_STD", [1.0, 1.0, 1.0],
     "Standard deviation per channel; 1 for MSRA's weights, [57.375, 57.12, 58.395] for weights"
     " trained on normalised images.")
_key("MODEL.MASK_ON", False, "Predict instance masks.")
_key("MODEL.KEYPOINT_ON", False, "Predict keypoints.")
_key("MODEL.ROTATED_BOXES", False,
     "detkit: boxes have an angle. Ground truth is RotatedBoxes, and detections are scored by"
     " RotatedCOCOEvaluator. Needs RotatedAnchorGenerator, RRPN and RROIHeads.")
_key("MODEL.ROTATED_BOX_PERIOD", 360.0,
     "detkit: degrees after which a turned box is the same object when angles are learnt; 180 where"
     " objects that face the other way need not be told apart.",
     choices=(180.0, 360.0), needs=("MODEL.ROTATED_BOXES",))
_key("MODEL.ROTATED_BOX_ALONG_SIDES", False,
     "detkit: centers are predicted along the sides of a turned box, as its region is seen by the"
     " head, and not along the axes of the image.",
     needs=("MODEL.ROTATED_BOXES",))
_key("MODEL.LOAD_PROPOSALS", False,
     "Take proposals from DATASETS.PROPOSAL_FILES_* instead of an RPN.")

_key("MODEL.BACKBONE.NAME", "build_resnet_backbone", "Registered name of the backbone's builder.")
_key("MODEL.BACKBONE.FREEZE_AT", 2,
     "Number of frozen stages: 0 or less none, 1 the stem, 2 the stem and res2, ... 5 up to res5."
     " In models of torchvision and timm, all layers up to stride 2^FREEZE_AT.")

_NORM_NAMES = "Norm after each convolution: FrozenBN, BN, SyncBN, GN, LN, or empty for none."
_key("MODEL.RESNETS.DEPTH", 50,
     "Layers: 18, 34 (basic blocks), 50, 101, 152 (bottlenecks). He et al. 2015, arXiv 1512.03385.")
_key("MODEL.RESNETS.OUT_FEATURES", ["res4"], "Stages returned, of stem, res2 to res5 (res6).")
_key("MODEL.RESNETS.NORM", "FrozenBN", _NORM_NAMES)
_key("MODEL.RESNETS.NUM_GROUPS", 1,
     "Groups of the 3x3 convolution; 32 or 64 in ResNeXt (Xie et al. 2016, arXiv 1611.05431).",
     minimum=1)
_key("MODEL.RESNETS.WIDTH_PER_GROUP", 64,
     "Channels per group in the bottleneck of res2; doubles with each stage.",
     minimum=1)
_key("MODEL.RESNETS.STRIDE_IN_1X1", True,
     "Put a bottleneck's stride in its first 1x1 convolution (MSRA's weights) instead of the 3x3"
     " (torchvision's).")
_key("MODEL.RESNETS.RES2_OUT_CHANNELS", 256,
     "Channels of res2; doubles with each stage. Depths 18 and 34 take 64 if it is left at 256.",
     minimum=1)
_key("MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "Channels of the stem.", minimum=1)
_key("MODEL.RESNETS.RES5_DILATION", 1, "Dilation of res5: 2 keeps the stride at 16 (DC5).",
     choices=(1, 2))
_key("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, False],
     "Deformable 3x3 convolutions in res2 to res5, of bottlenecks only. Dai et al. 2017, arXiv"
     " 1703.06211.")
_key("MODEL.RESNETS.DEFORM_MODULATED", False,
     "Deformable convolution with modulation (v2): arXiv 1811.11168.")
_key("MODEL.RESNETS.DEFORM_NUM_GROUPS", 1, "Groups of channels with offsets of their own.",
     minimum=1)
_key("MODEL.RESNETS.DEFORM_ON_STRIDE", True,
     "detkit: whether blocks with a stride are deformable too.")
_key("MODEL.RESNETS.PLUGINS", [],
     "detkit: blocks inserted into residual blocks, a list of {name: ContextBlock (Cao et al. 2019,"
     " arXiv 1904.11492) or SqueezeExcitation (Hu et al. 2017, arXiv 1709.01507), position:"
     " after_conv1, after_conv2 or after_conv3, stages: [res3, res4] (default: all), ratio: inner"
     " channels per channel (default: 0.0625)}.")
_key("MODEL.RESNETS.CONV_WS", False,
     "detkit: weight standardisation of all convolutions, usually with GN. Qiao et al. 2019, arXiv"
     " 1903.10520.")
_key("MODEL.RESNETS.NORM_EPS", None,
     "detkit: addend to the variance; None is the norm's own: 1e-5, in LN 1e-6.",
     minimum=0)
_key("MODEL.RESNETS.NORM_MOMENTUM", None,
     "detkit: share of a batch in the running statistics of BN and SyncBN; None is 0.1.",
     minimum=0)
_key("MODEL.RESNETS.NORM_GROUPS", 32, "detkit: groups of GN.",
     minimum=1, needs=("MODEL.RESNETS.NORM", "GN"))
_key("MODEL.RESNETS.DEEP_STEM", False,
     "detkit: three 3x3 convolutions instead of a 7x7 in the stem. He et al. 2018, arXiv"
     " 1812.01187, model C.")
_key("MODEL.RESNETS.AVG_DOWN", False,
     "detkit: average pooling instead of a strided convolution in shortcuts (ResNet-D). arXiv"
     " 1812.01187, model D.")
_key("MODEL.RESNETS.STEM_KERNEL_SIZE", 7, "detkit: kernel of the stem's convolution.",
     choices=(3, 5, 7))
_key("MODEL.RESNETS.NUM_STAGES", 4,
     "detkit: number of stages, from res2 on: 1 to 5. res6 needs BLOCKS_PER_STAGE; lists of four"
     " values mean stride 2, dilation 1 and no deformation there.",
     choices=(1, 2, 3, 4, 5))
_key("MODEL.RESNETS.BLOCKS_PER_STAGE", [],
     "detkit: number of blocks in each stage, such as [2, 3, 4, 3, 4]; empty takes those of DEPTH,"
     " which still says what kind of blocks they are.",
     minimum=1)
_key("MODEL.RESNETS.STRIDE_PER_STAGE", [1, 2, 2, 2], "detkit: strides of res2 to res5, at least 1.",
     minimum=1)
_key("MODEL.RESNETS.DILATION_PER_STAGE", [1, 1, 1, 1],
     "detkit: dilations of the 3x3 convolutions in res2 to res5, at least 1. RES5_DILATION: 2 is"
     " short for stride 1 and dilation 2 in res5.",
     minimum=1)
_key("MODEL.RESNETS.DILATION_STYLE", "detectron2",
     "detkit: what DILATION_PER_STAGE dilates: detectron2 all 3x3 convolutions of a stage,"
     " mmdetection in basic blocks the first only, torchvision the first block as the stage before"
     " (replace_stride_with_dilation).",
     choices=("detectron2", "mmdetection", "torchvision"))
_key("MODEL.RESNETS.CHECKPOINT_PER_STAGE", [False, False, False, False],
     "detkit: activation checkpointing of the blocks in res2 to res5: less memory, more time, the"
     " same gradients. Chen et al. 2016, arXiv 1604.06174.")
_key("MODEL.RESNETS.ZERO_INIT_LAST_NORM", False,
     "detkit: initialise the last norm of each block with zero, so that blocks start as the"
     " identity. Needs a trainable norm. Goyal et al. 2017, arXiv 1706.02677.")
_key("MODEL.RESNETS.NORM_EVAL", False,
     "detkit: keep batch norms in eval mode in training: fixed running statistics, trainable weight"
     " and bias. NORM: BN or SyncBN.")

_key("MODEL.REGNET.DEPTH", 23,
     "detkit: blocks. Radosavovic et al. 2020, arXiv 2003.13678. The default is RegNetX-4.0GF.",
     minimum=1)
_key("MODEL.REGNET.W_0", 96, "detkit: width of the first block before rounding, a multiple of 8.",
     minimum=8)
_key("MODEL.REGNET.W_A", 38.65, "detkit: increase of the width from block to block.", minimum=0)
_key("MODEL.REGNET.W_M", 2.43, "detkit: ratio of the widths of two stages, above 1.", minimum=1)
_key("MODEL.REGNET.GROUP_WIDTH", 40, "detkit: channels in each group of the 3x3 convolutions.",
     minimum=1)
_key("MODEL.REGNET.SE_RATIO", 0.0,
     "detkit: squeeze-and-excitation, in channels per input channel of the block; 0 (RegNet X) for"
     " none, 0.25 in RegNet Y.",
     minimum=0)
_key("MODEL.REGNET.STEM_WIDTH", 32, "detkit: channels of the stem.", minimum=1)
_key("MODEL.REGNET.NORM", "BN", f"detkit: {_NORM_NAMES}")
_key("MODEL.REGNET.OUT_FEATURES", ["s1", "s2", "s3", "s4"],
     "detkit: stages returned, of stem and s1 (stride 4) to s4 (stride 32).")
_key("MODEL.REGNET.CHECKPOINT", False,
     "detkit: activation checkpointing of the blocks: less memory, more time, the same gradients.")

_DROP_PATH = (
    "detkit: probability to drop the branches of the last block in training, less before it."
)
_CHECKPOINT = (
    "detkit: activation checkpointing of each block: less memory, more time, the same gradients."
)
_TRAINED_BLOCKS = (
    "detkit: train the last blocks only, this many; 0 freezes the whole transformer, -1 trains all"
    " of it. Frozen parts take no memory for gradients. In place of BACKBONE.FREEZE_AT."
)
_FOREIGN_FEATURES = (
    "detkit: feature maps returned, by their stride: s2, s4, s8, s16, s32, if the model has them."
)
_FOREIGN_NORM = "detkit: replacement of its batch norms: FrozenBN, SyncBN, or empty to keep them."
_key("MODEL.TORCHVISION.NAME", "resnet50", "detkit: a classification model of torchvision.models.")
_key("MODEL.TORCHVISION.WEIGHTS", "",
     "detkit: published weights, such as DEFAULT or IMAGENET1K_V1; empty for random weights.")
_key("MODEL.TORCHVISION.OUT_FEATURES", ["s4", "s8", "s16", "s32"], _FOREIGN_FEATURES,
     unless=("MODEL.TORCHVISION.NODES",))
_key("MODEL.TORCHVISION.NODES", [],
     "detkit: feature maps by modules or nodes of the model's graph, in place of OUT_FEATURES:"
     " pairs [node, name of the map], such as [[layer1, low], [layer3, high]]. Also for models"
     " without padding, such as [[features, s32]] of alexnet.")
_key("MODEL.TORCHVISION.NORM", "", _FOREIGN_NORM, choices=("", "FrozenBN", "SyncBN"))
_key("MODEL.TIMM.NAME", "resnet50",
     "detkit: a model of timm, with or without a tag of its weights: resnet50.a1_in1k; for"
     " build_timm_vit_fpn_backbone a plain transformer: vit_small_patch14_dinov2.")
_key("MODEL.TIMM.PRETRAINED", False,
     "detkit: start from the published weights of its tag, or of the default tag.")
_key("MODEL.TIMM.OUT_FEATURES", ["s4", "s8", "s16", "s32"], _FOREIGN_FEATURES,
     unless=_TIMM_VIT)
_key("MODEL.TIMM.NORM", "", _FOREIGN_NORM, choices=("", "FrozenBN", "SyncBN"),
     unless=_TIMM_VIT)
_key("MODEL.TIMM.DROP_PATH_RATE", 0.0, _DROP_PATH, minimum=0, needs=_TIMM_VIT)
_key("MODEL.TIMM.CHECKPOINT", False, _CHECKPOINT, needs=_TIMM_VIT)
_key("MODEL.TIMM.TRAINED_BLOCKS", -1, _TRAINED_BLOCKS, minimum=-1, needs=_TIMM_VIT)

_key("MODEL.VIT.PATCH_SIZE", 16,
     "detkit: side of a patch in pixels, for build_vit_fpn_backbone. Dosovitskiy et al. 2020, arXiv"
     " 2010.11929; Li et al. 2022, arXiv 2203.16527. Defaults are ViT-B of ViTDet.",
     minimum=1)
_key("MODEL.VIT.EMBED_DIM", 768, "detkit: channels: 768 in ViT-B, 1024 in -L, 1280 in -H.",
     minimum=1)
_key("MODEL.VIT.DEPTH", 12, "detkit: blocks: 12 in ViT-B, 24 in -L, 32 in -H.", minimum=1)
_key("MODEL.VIT.NUM_HEADS", 12, "detkit: heads of the attention: 12 in ViT-B, 16 in -L and -H.",
     minimum=1)
_key("MODEL.VIT.MLP_RATIO", 4.0, "detkit: hidden channels of the MLPs, in EMBED_DIM.", minimum=0)
_key("MODEL.VIT.QKV_BIAS", True, "detkit: a bias of queries, keys and values.")
_key("MODEL.VIT.DROP_PATH_RATE", 0.1, _DROP_PATH, minimum=0)
_key("MODEL.VIT.WINDOW_SIZE", 14,
     "detkit: side of the attention's windows, in patches; 0 attends globally in all blocks.",
     minimum=0)
_key("MODEL.VIT.GLOBAL_BLOCKS", [2, 5, 8, 11],
     "detkit: blocks that attend globally, from 0; the others within windows.",
     minimum=0, needs=("MODEL.VIT.WINDOW_SIZE",))
_key("MODEL.VIT.RESIDUAL_BLOCKS", [],
     "detkit: blocks that are followed by a bottleneck of convolutions.",
     minimum=0)
_key("MODEL.VIT.ABSOLUTE_POSITIONS", True, "detkit: add learnt positions to the patches.")
_key("MODEL.VIT.RELATIVE_POSITIONS", True,
     "detkit: decomposed relative positions in the attention. Li et al. 2021, arXiv 2112.01526.")
_key("MODEL.VIT.IMAGE_SIZE", 1024,
     "detkit: side of the images, in pixels, that the relative positions of global blocks are for;"
     " they are interpolated for others.",
     minimum=1, needs=("MODEL.VIT.RELATIVE_POSITIONS",))
_key("MODEL.VIT.PRETRAIN_IMAGE_SIZE", 224,
     "detkit: side of the images that the absolute positions are for; they are interpolated.",
     minimum=1, needs=("MODEL.VIT.ABSOLUTE_POSITIONS",))
_key("MODEL.VIT.PRETRAIN_CLS_TOKEN", True,
     "detkit: whether the absolute positions have a row for a class token, which is not used.",
     needs=("MODEL.VIT.ABSOLUTE_POSITIONS",))
_key("MODEL.VIT.CHECKPOINT", False, _CHECKPOINT)
_key("MODEL.VIT.TRAINED_BLOCKS", -1, _TRAINED_BLOCKS, minimum=-1)

_key("MODEL.SWIN.PATCH_SIZE", 4,
     "detkit: side of a patch in pixels, for build_swin_fpn_backbone. Liu et al. 2021, arXiv"
     " 2103.14030. Defaults are Swin-T. BACKBONE.FREEZE_AT 1 freezes the patches, 2 also the first"
     " stage, ...",
     minimum=1)
_key("MODEL.SWIN.EMBED_DIM", 96, "detkit: channels of the first stage: 96 in Swin-T and -S, 128 in"
     " -B, 192 in -L.", minimum=1)
_key("MODEL.SWIN.DEPTHS", [2, 2, 6, 2],
     "detkit: blocks of each stage: [2, 2, 18, 2] from Swin-S on.", minimum=1)
_key("MODEL.SWIN.NUM_HEADS", [3, 6, 12, 24],
     "detkit: heads of each stage: [4, 8, 16, 32] in Swin-B, [6, 12, 24, 48] in -L.", minimum=1)
_key("MODEL.SWIN.WINDOW_SIZE", 7, "detkit: side of the windows, in tokens.", minimum=2)
_key("MODEL.SWIN.MLP_RATIO", 4.0, "detkit: hidden channels of the MLPs, in channels.", minimum=0)
_key("MODEL.SWIN.QKV_BIAS", True, "detkit: a bias of queries, keys and values.")
_key("MODEL.SWIN.DROP_PATH_RATE", 0.2, _DROP_PATH, minimum=0)
_key("MODEL.SWIN.ABSOLUTE_POSITIONS", False, "detkit: add learnt positions to the patches.")
_key("MODEL.SWIN.PRETRAIN_IMAGE_SIZE", 224,
     "detkit: side of the images that the absolute positions are for; they are interpolated.",
     minimum=1, needs=("MODEL.SWIN.ABSOLUTE_POSITIONS",))
_key("MODEL.SWIN.OUT_STAGES", [0, 1, 2, 3],
     "detkit: stages returned, from 0, as p0 to p3 of strides 4 to 32.", minimum=0)
_key("MODEL.SWIN.CHECKPOINT", False, _CHECKPOINT)

_key("MODEL.MVIT.IMAGE_SIZE", 224,
     "detkit: side of the images, in pixels, that the relative positions are for, which are"
     " interpolated; for build_mvit_fpn_backbone. Li et al. 2021, arXiv 2112.01526. Defaults are"
     " MViTv2-T. BACKBONE.FREEZE_AT 1 freezes the patches, 2 also the first stage, ...",
     minimum=1, needs=("MODEL.MVIT.RELATIVE_POSITIONS",))
_key("MODEL.MVIT.EMBED_DIM", 96, "detkit: channels of the first stage.", minimum=1)
_key("MODEL.MVIT.DEPTH", 10, "detkit: blocks of all stages.", minimum=1)
_key("MODEL.MVIT.NUM_HEADS", 1, "detkit: heads of the first stage.", minimum=1)
_key("MODEL.MVIT.LAST_BLOCKS", [0, 2, 7, 9], "detkit: the last block of each stage, from 0.",
     minimum=0)
_key("MODEL.MVIT.KV_STRIDE", 4,
     "detkit: stride of keys and values in the first stage; halved with each.", minimum=1)
_key("MODEL.MVIT.WINDOW_SIZE", 56,
     "detkit: side of the windows in the first stage, in tokens; halved with each. The last blocks"
     " of the later stages attend globally. 0 has no windows.",
     minimum=0)
_key("MODEL.MVIT.RESIDUAL_POOLING", True, "detkit: add the pooled queries to the output.")
_key("MODEL.MVIT.MLP_RATIO", 4.0, "detkit: hidden channels of the MLPs, in channels.", minimum=0)
_key("MODEL.MVIT.QKV_BIAS", True, "detkit: a bias of queries, keys and values.")
_key("MODEL.MVIT.DROP_PATH_RATE", 0.2, _DROP_PATH, minimum=0)
_key("MODEL.MVIT.RELATIVE_POSITIONS", True,
     "detkit: decomposed relative positions in the attention.")
_key("MODEL.MVIT.ABSOLUTE_POSITIONS", False, "detkit: add learnt positions to the patches.")
_key("MODEL.MVIT.OUT_FEATURES", ["scale2", "scale3", "scale4", "scale5"],
     "detkit: stages returned, of strides 4 to 32.")
_key("MODEL.MVIT.CHECKPOINT", False, _CHECKPOINT)

_key("MODEL.FPN.IN_FEATURES", [],
     "Backbone stages that the pyramid merges, finest first. Lin et al. 2016, arXiv 1612.03144.")
_key("MODEL.FPN.OUT_CHANNELS", 256, "Channels of every level.", minimum=1)
_key("MODEL.FPN.NORM", "", _NORM_NAMES)
_key("MODEL.FPN.P6_FROM", "C5",
     "detkit: input of RetinaNet's P6, the coarsest map of the backbone (C5) or of the pyramid"
     " (P5), as always over a plain transformer.",
     choices=("C5", "P5"))
_key("MODEL.FPN.FUSE_TYPE", "sum", "How a level is merged with the one above: sum or mean.",
     choices=("sum", "avg"))
_key("MODEL.FPN.TOP_BLOCK", "",
     "detkit: further levels on top: LastLevelMaxPool (p6), LastLevelP6P7 (P6_FROM), none; empty is"
     " that of the builder: RetinaNet's are P6 and P7, the others' is the max pool.",
     choices=("", "none", "LastLevelMaxPool", "LastLevelP6P7"))
_key("MODEL.FPN.UPSAMPLE_MODE", "nearest",
     "detkit: interpolation of the level above: nearest, bilinear or bicubic.",
     choices=("nearest", "bilinear", "bicubic"))
_key("MODEL.FPN.ALIGN_CORNERS", False,
     "detkit: whether the outermost pixels of the two maps lie on each other.",
     needs=("MODEL.FPN.UPSAMPLE_MODE", "bilinear", "bicubic"))

_key("MODEL.FPN.SQUARE_PAD", 0,
     "detkit: pad images to a square of this side, in pixels; 0 pads to the largest of a batch.",
     minimum=0)
_key("MODEL.FPN.SCALE_FACTORS", [4.0, 2.0, 1.0, 0.5],
     "detkit: sizes of the levels of a plain transformer's pyramid, relative to its map. Li et al."
     " 2022, arXiv 2203.16527.",
     minimum=0,
     needs=("MODEL.BACKBONE.NAME", "build_vit_fpn_backbone", "build_timm_vit_fpn_backbone"))

_key("MODEL.INIT", [],
     "detkit: initialisation of parameters, a list of {names: regular expression, searched in the"
     " names of the state_dict, type: function of torch.nn.init without its underscore, ...}; the"
     " other fields are its arguments: {names: 'backbone.*conv', type: normal, std: 0.01}. Later"
     " entries override earlier ones; weights that are loaded override all.")

_key("MODEL.CUSTOM", {}, "detkit: keys for parts of your own; their values are not checked.",
     unread="for code of your own")

# --- Anchors and proposals ---

_key("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchorGenerator", "Registered name.")
_key("MODEL.ANCHOR_GENERATOR.SIZES", [[32, 64, 128, 256, 512]],
     "Square roots of anchor areas in pixels: one list per level, or one list for all levels.")
_key("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0, 2.0]],
     "Height / width, per level or for all levels. Levels may differ in their number: the head,"
     " which they share, predicts for the most, and a level uses the first of its predictions.")
_key("MODEL.ANCHOR_GENERATOR.ANGLES", [[-90, 0, 90]],
     "Degrees counter-clockwise of RotatedAnchorGenerator, per level or for all levels.")
_key("MODEL.ANCHOR_GENERATOR.OFFSET", 0.0,
     "Offset of the anchor centres in units of the stride, in [0, 1).",
     minimum=0)

_key("MODEL.PROPOSAL_GENERATOR.NAME", "RPN", "Registered name; PrecomputedProposals uses no RPN.")
_key("MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 0, "Shortest side of a proposal, in pixels.", minimum=0)

_key("MODEL.RPN.HEAD_NAME", "StandardRPNHead",
     "Registered name. Ren et al. 2015, arXiv 1506.01497.")
_key("MODEL.RPN.IN_FEATURES", ["res4"], "Input features of the RPN.")
_key("MODEL.RPN.CONV_DIMS", [-1],
     "Output channels of the head's convolutions; -1 keeps the number of input channels.")
_key("MODEL.RPN.BOUNDARY_THRESH", -1,
     "Anchors that exceed the image by more pixels are ignored in training; -1 uses all anchors.")
_key("MODEL.RPN.IOU_THRESHOLDS", [0.3, 0.7],
     "Thresholds on the IoU of anchors and objects, between IOU_LABELS.",
     minimum=0)
_key("MODEL.RPN.IOU_LABELS", [0, -1, 1],
     "0 background, -1 ignored, 1 object, below, between and above the thresholds.")
_key("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 256, "Anchors sampled per image.", minimum=1)
_key("MODEL.RPN.POSITIVE_FRACTION", 0.5, "Largest fraction of positives in the sample.", minimum=0)
_key("MODEL.RPN.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0),
     "Factors on (dx, dy, dw, dh); RRPN has a fifth, on the angle in radians.")
_key("MODEL.RPN.BBOX_REG_LOSS_TYPE", "smooth_l1", "Loss of the box deltas.", choices=_BOX_LOSSES)
_key("MODEL.RPN.BBOX_REG_LOSS_WEIGHT", 1.0, "Factor on loss_rpn_loc, besides LOSS_WEIGHT.",
     minimum=0)
_key("MODEL.RPN.SMOOTH_L1_BETA", 0.0, "Where smooth L1 turns from square to line; 0 is L1.",
     minimum=0)
_key("MODEL.RPN.LOSS_WEIGHT", 1.0, "Factor on both RPN losses.", minimum=0)
_key("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 12000, "Proposals per level before NMS, in training.",
     minimum=1)
_key("MODEL.RPN.PRE_NMS_TOPK_TEST", 6000, "Proposals per level before NMS, in testing.", minimum=1)
_key("MODEL.RPN.POST_NMS_TOPK_TRAIN", 2000,
     "Proposals per image after NMS, over all levels, in training.",
     minimum=1)
_key("MODEL.RPN.POST_NMS_TOPK_TEST", 1000,
     "Proposals per image after NMS, over all levels, in testing.",
     minimum=1)
_key("MODEL.RPN.SCORE_THRESH", 0.0,
     "detkit: proposals need this probability of an object; 0 takes all.",
     minimum=0)
_key("MODEL.RPN.NMS_THRESH", 0.7, "IoU above which the lower-scored of two proposals is dropped.",
     minimum=0)

# --- ROI heads ---

_key("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "Registered name.")
_key("MODEL.ROI_HEADS.NUM_CLASSES", 80, "Object classes, background not counted.", minimum=1,
     unless=DENSE)
_key("MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "Features from which regions are pooled.")
_key("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.5],
     "IoU with an object from which a proposal is positive.",
     minimum=0)
_key("MODEL.ROI_HEADS.IOU_LABELS", [0, 1], "Labels below and above the thresholds.")
_key("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512, "Regions sampled per image.", minimum=1)
_key("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.25, "Largest fraction of positives in the sample.",
     minimum=0)
_key("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05, "Detections below this score are dropped.",
     unless=DENSE)
_key("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.5,
     "IoU above which the lower-scored of two detections of a class is dropped.",
     minimum=0, unless=DENSE)
_key("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", True,
     "Add the ground truth to the proposals in training.")

_key("MODEL.ROI_BOX_HEAD.NAME", "", "Registered name of the box head.",
     unless=RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "smooth_l1", "Loss of the boxes.",
     choices=_BOX_LOSSES)
_key("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", 1.0, "Factor on loss_box_reg.", minimum=0)
_key("MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS", (10.0, 10.0, 5.0, 5.0),
     "Factors on (dx, dy, dw, dh); RROIHeads have a fifth, on the angle in radians.")
_key("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", 0.0,
     "Where smooth L1 turns from square to line; 0 is L1.",
     minimum=0)
_key("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 14, "Side of a pooled region, in cells.", minimum=1)
_key("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 0,
     "Sampling points per cell and axis; 0 adapts it to the size of the region.",
     minimum=0)
_key("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2",
     "ROIAlignV2 shifts by half a pixel (aligned), ROIAlign does not. RROIHeads need"
     " ROIAlignRotated.",
     choices=_POOLERS)
_key("MODEL.ROI_BOX_HEAD.NUM_FC", 0, "Fully connected layers.", minimum=0,
     unless=RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.FC_DIM", 1024, "Width of the fully connected layers.", minimum=1,
     unless=RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "3x3 convolutions before the fully connected layers.",
     minimum=0, unless=RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.CONV_DIM", 256, "Channels of these convolutions.", minimum=1,
     unless=RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.NORM", "", _NORM_NAMES,
     unless=RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False,
     "One box per region instead of one per class.")
_key("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", False,
     "Train later heads on the predicted boxes instead of the proposals.")
_key("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", False, "A sigmoid per class instead of a softmax (LVIS).")
_key("MODEL.ROI_BOX_HEAD.LOSS", "ce",
     "detkit: loss of the classes: cross entropy, or focal, which gives little weight to what is"
     " classified well already. Lin et al. 2017, arXiv 1708.02002.",
     choices=("ce", "focal"))
_key("MODEL.ROI_BOX_HEAD.FOCAL_LOSS_GAMMA", 2.0, "detkit: exponent of the focal loss.",
     minimum=0, needs=("MODEL.ROI_BOX_HEAD.LOSS", "focal"))
_key("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", [],
     "detkit: factors on the loss of the classes, one per class, and one more for background if it"
     " is not 1; empty for 1 everywhere.",
     minimum=0)
_key("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", False,
     "Federated loss (LVIS). Zhou et al. 2021, arXiv 2103.07461.",
     only_default_trainer=True)
_key("MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER", 0.5,
     "Exponent of the class frequency, by which the federated loss samples classes.",
     needs=("MODEL.ROI_BOX_HEAD.USE_FED_LOSS",))
_key("MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES", 50, "Number of sampled classes.",
     minimum=1, needs=("MODEL.ROI_BOX_HEAD.USE_FED_LOSS",))
_key("MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS", [],
     "detkit: number of training images with each class, in the order of the classes. If empty,"
     " DefaultTrainer counts them in DATASETS.TRAIN; without it, all classes are equally frequent.",
     minimum=0, needs=("MODEL.ROI_BOX_HEAD.USE_FED_LOSS",))

_key("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
     ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)),
     "Factors on (dx, dy, dw, dh), per stage. Cai and Vasconcelos 2017, arXiv 1712.00726.")
_key("MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.6, 0.7),
     "IoU with an object from which a box is positive, per stage.")

_key("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
     "Registered name. He et al. 2017, arXiv 1703.06870.")
_key("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14, "Side of a pooled region, in cells.", minimum=1)
_key("MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO", 0, "As in ROI_BOX_HEAD.", minimum=0)
_key("MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignV2",
     "As in ROI_BOX_HEAD; empty gives the head the feature maps themselves, by name.",
     choices=("", *_POOLERS))
_key("MODEL.ROI_MASK_HEAD.NUM_CONV", 0, "3x3 convolutions before the upsampling.", minimum=0)
_key("MODEL.ROI_MASK_HEAD.CONV_DIM", 256, "Channels of these convolutions.", minimum=1)
_key("MODEL.ROI_MASK_HEAD.NORM", "", _NORM_NAMES)
_key("MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", False,
     "One mask per region instead of one per class.")

_key("MODEL.ROI_KEYPOINT_HEAD.NAME", "KRCNNConvDeconvUpsampleHead", "Registered name.")
_key("MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION", 14, "Side of a pooled region, in cells.",
     minimum=1)
_key("MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO", 0, "As in ROI_BOX_HEAD.", minimum=0)
_key("MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE", "ROIAlignV2", "As in ROI_MASK_HEAD.",
     choices=("", *_POOLERS))
_key("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (512,) * 8, "Channels of its convolutions.")
_key("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17, "Keypoints per object.", minimum=1)
_key("MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", 1,
     "Images with fewer visible keypoints are not used in training.",
     minimum=0)
_key("MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", True,
     "Divide the loss by the number of visible keypoints in the batch instead of a constant.")
_key("MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT", 1.0, "Factor on loss_keypoint.", minimum=0)

# --- Semantic and panoptic segmentation ---

_key("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead",
     "Registered name. Kirillov et al. 2019, arXiv 1901.02446.")
_key("MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"], "Input features.")
_key("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 255, "Label of pixels without a loss.")
_key("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 54, "Classes, stuff and things.", minimum=1)
_key("MODEL.SEM_SEG_HEAD.CONVS_DIM", 128, "Channels of its convolutions.", minimum=1)
_key("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 4, "Stride of its output.", minimum=1)
_key("MODEL.SEM_SEG_HEAD.NORM", "GN", _NORM_NAMES)
_key("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 1.0, "Factor on loss_sem_seg.", minimum=0)

_key("MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", 1.0, "Factor on the losses of the instances.",
     minimum=0)
_key("MODEL.PANOPTIC_FPN.COMBINE.ENABLED", True, "Merge instances and stuff into one map.")
_key("MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH", 0.5,
     "An instance is dropped if a larger fraction of it is covered by better ones.",
     minimum=0)
_key("MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT", 4096, "Stuff with fewer pixels is dropped.",
     minimum=0)
_key("MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH", 0.5,
     "Instances below this score are dropped.")

# --- RetinaNet ---

_key("MODEL.RETINANET.NUM_CLASSES", 80, "Object classes. Lin et al. 2017, arXiv 1708.02002.",
     minimum=1)
_key("MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"],
     "Input features of the heads.")
_key("MODEL.RETINANET.NUM_CONVS", 4, "Convolutions per head.", minimum=0)
_key("MODEL.RETINANET.NORM", "", _NORM_NAMES)
_key("MODEL.RETINANET.IOU_THRESHOLDS", [0.4, 0.5], "IoU between IOU_LABELS.", minimum=0)
_key("MODEL.RETINANET.IOU_LABELS", [0, -1, 1], "0 background, -1 ignored, 1 object.")
_key("MODEL.RETINANET.PRIOR_PROB", 0.01, "Score of every class at the start.", minimum=0)
_key("MODEL.RETINANET.SCORE_THRESH_TEST", 0.05, "Detections below this score are dropped.")
_key("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 1000, "Candidates per level before NMS.", minimum=1)
_key("MODEL.RETINANET.NMS_THRESH_TEST", 0.5,
     "IoU above which the lower-scored detection is dropped.",
     minimum=0)
_key("MODEL.RETINANET.CLIP_BEFORE_NMS", False,
     "detkit: clip boxes to the image before NMS, as torchvision does.")
_key("MODEL.RETINANET.BBOX_REG_WEIGHTS", (1.0, 1.0, 1.0, 1.0), "Factors on (dx, dy, dw, dh).")
_key("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "smooth_l1", "Loss of the boxes.", choices=_BOX_LOSSES)
_key("MODEL.RETINANET.SMOOTH_L1_LOSS_BETA", 0.1, "Where smooth L1 turns from square to line.",
     minimum=0)
_key("MODEL.RETINANET.FOCAL_LOSS_GAMMA", 2.0, "Exponent of the focal loss.", minimum=0)
_key("MODEL.RETINANET.FOCAL_LOSS_ALPHA", 0.25, "Weight of objects against background.")

# --- FCOS ---

_key("MODEL.FCOS.NUM_CLASSES", 80,
     "detkit: object classes. Tian et al. 2019, arXiv 1904.01355.",
     minimum=1)
_key("MODEL.FCOS.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"],
     "detkit: input features of the head, finest first.")
_key("MODEL.FCOS.NUM_CONVS", 4, "detkit: convolutions per subnet of the head.", minimum=0)
_key("MODEL.FCOS.NORM", "GN", f"detkit: {_NORM_NAMES}")
_key("MODEL.FCOS.PRIOR_PROB", 0.01, "detkit: score of every class at the start.", minimum=0)
_key("MODEL.FCOS.CENTER_SAMPLING_RADIUS", 1.5,
     "detkit: distance from the centre of an object, in strides, within which cells are trained on"
     " it.",
     minimum=0)
_key("MODEL.FCOS.SCORE_THRESH_TEST", 0.2,
     "detkit: detections below this score, the geometric mean of class and centreness, are"
     " dropped.")
_key("MODEL.FCOS.TOPK_CANDIDATES_TEST", 1000, "detkit: candidates per level before NMS.", minimum=1)
_key("MODEL.FCOS.NMS_THRESH_TEST", 0.6,
     "detkit: IoU above which the lower-scored detection is dropped.",
     minimum=0)
_key("MODEL.FCOS.FOCAL_LOSS_GAMMA", 2.0, "detkit: exponent of the focal loss.", minimum=0)
_key("MODEL.FCOS.FOCAL_LOSS_ALPHA", 0.25, "detkit: weight of objects against background.")
# fmt: on
