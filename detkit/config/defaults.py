"""All settings: default, meaning, unit and legal values.

Names and defaults are those of Detectron2 0.6, except where the text says detkit. Sizes are in
pixels of the resized image unless said otherwise; thresholds and fractions are in [0, 1]. Setting a
key with `unread`, which no code reads, logs a warning.
"""

import sys
from copy import deepcopy
from typing import Any

from detkit.config.cfg_node import CfgNode, KeySpec, KeyTable

_TABLE = KeyTable()


def _key(name: str, default: Any, meaning: str, **spec: Any) -> None:
    """Declare a key. `spec`: see `KeySpec`."""
    if name in _TABLE:
        raise ValueError(f"config key {name} is declared twice")
    _TABLE[name] = KeySpec(default, meaning, **spec)


def _device_name(name: Any) -> Any:
    """Return the name of a device; under `detkit.as_detectron2`, for auto one that torch knows."""
    # Detectron2's scripts give it to torch.device and `to`, outside of models too.
    if name != "auto" or "detkit.as_detectron2" not in sys.modules:
        return name
    # Imported here, as torch takes seconds to load.
    import torch

    from detkit.utils.env import resolve_device

    # Not is_available, after which CUDA reads CUDA_VISIBLE_DEVICES no more: scripts may set it yet.
    return "cuda" if torch.cuda.device_count() else str(resolve_device(name))


# Sections have the order of Detectron2's file; detkit's keys are in the section of their subject.
# Detectron2's names. The generalized IoU losses (giou, diou, ciou) work on decoded boxes.
_BOX_LOSSES = ("smooth_l1", "giou", "diou", "ciou")
# Group of keys -> detkit's builders that read them; builders of the user's own may read any.
_BUILDERS = {
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
_RES5_HEADS = ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads")
_AUGMENTATIONS = ("INPUT.AUGMENTATIONS",)
_DENSE = ("MODEL.META_ARCHITECTURE", "RetinaNet", "FCOS")
_POOLERS = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")

# fmt: off
# A table: name and default, then the meaning, then the checks of a value.

# --- The run ---

_key("VERSION", 2, "Version of the key names. Only 2 is understood.",
     choices=(2,), unread="a marker in files")
_key("OUTPUT_DIR", "./output",
     "Folder of all outputs of a run: log, metrics, checkpoints, results, images.")
_key("SEED", -1,
     "Seed of all random number generators; negative draws a random seed and logs it.")
_key("DETERMINISTIC", False,
     "detkit: use deterministic algorithms of torch, which may be slower; operations without one"
     " log a warning. Two runs with the same SEED are identical on a CPU.")
_key("CHECKPOINT_KEEP", 0,
     "detkit: number of periodic checkpoints to keep, the newest; 0 keeps all. The final and the"
     " best checkpoint are kept as well.",
     minimum=0, only_default_trainer=True)
_key("CUDNN_BENCHMARK", False, "Let cuDNN benchmark its algorithms. Faster if image sizes repeat.")
_key("FLOAT32_PRECISION", "",
     "Argument of torch.set_float32_matmul_precision; empty keeps torch's default.",
     choices=("", "highest", "high", "medium"))
_key("WRITERS", ["console", "json", "tensorboard"],
     "detkit: outputs of metrics: console, json (metrics.json), csv (metrics.csv:"
     " iteration,name,value), tensorboard, wandb, mlflow (the last two need their packages).")
_key("VIS_PERIOD", 0,
     "Iterations between images of predictions and ground truth; 0 or less draws none.",
     in_epochs=True, needs=("DATASETS.TEST",), only_default_trainer=True)
_key("VIS_LABELS", True,
     "detkit: write names and scores into pictures, those of training, of its end and of detkit"
     " predict.")
_key("VIS_COLORS", "class",
     "detkit: what the colours of objects in these pictures stand for: class, the same in every"
     " picture, or instance, so that neighbours of one class differ.",
     choices=("class", "instance"))
_key("GLOBAL.HACK", 1.0, "A free number for quick experiments.", unread="for code of your own")
_key("IMPORTS", [],
     "detkit: Python modules to import before anything is built, to register the parts in them."
     " This runs their code; --no-imports and DETKIT_NO_IMPORTS=1 refuse it.")

# --- Model ---

_key("MODEL.DEVICE", "auto",
     "Device of the model: auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps. Detectron2:"
     " cuda.",
     resolve=_device_name)
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
     unless=_DENSE)
_key("MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "Features from which regions are pooled.")
_key("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.5],
     "IoU with an object from which a proposal is positive.",
     minimum=0)
_key("MODEL.ROI_HEADS.IOU_LABELS", [0, 1], "Labels below and above the thresholds.")
_key("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 512, "Regions sampled per image.", minimum=1)
_key("MODEL.ROI_HEADS.POSITIVE_FRACTION", 0.25, "Largest fraction of positives in the sample.",
     minimum=0)
_key("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.05, "Detections below this score are dropped.",
     unless=_DENSE)
_key("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.5,
     "IoU above which the lower-scored of two detections of a class is dropped.",
     minimum=0, unless=_DENSE)
_key("MODEL.ROI_HEADS.PROPOSAL_APPEND_GT", True,
     "Add the ground truth to the proposals in training.")

_key("MODEL.ROI_BOX_HEAD.NAME", "", "Registered name of the box head.",
     unless=_RES5_HEADS)
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
     unless=_RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.FC_DIM", 1024, "Width of the fully connected layers.", minimum=1,
     unless=_RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.NUM_CONV", 0, "3x3 convolutions before the fully connected layers.",
     minimum=0, unless=_RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.CONV_DIM", 256, "Channels of these convolutions.", minimum=1,
     unless=_RES5_HEADS)
_key("MODEL.ROI_BOX_HEAD.NORM", "", _NORM_NAMES,
     unless=_RES5_HEADS)
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

# --- Input ---

_key("INPUT.FORMAT", "BGR",
     "Channel order of the model's input images. L is grey; RGBA has four channels, the last of"
     " which may be anything, such as depth. RAW takes values and channels as the files hold them:"
     " 8 or 16 bits or floating point, PNG, TIFF or NPY. PIXEL_MEAN and PIXEL_STD have as many"
     " numbers, in the unit of the values.",
     choices=("BGR", "RGB", "L", "RGBA", "CMYK", "YCbCr", "HSV", "RAW"))
_key("INPUT.MAX_IMAGE_PIXELS", 178_956_970,
     "detkit: images, label maps and panoptic pngs with more pixels in their header are refused"
     " before decoding. The default is Pillow's limit, half a gigabyte as RGB; code without a"
     " config (datasets/, the masks of Cityscapes) always uses it.",
     minimum=1)
_key("INPUT.REDUCED_JPEG", False,
     "detkit: decode JPEG files at 1/2, 1/4 or 1/8 of their sides, if these are multiples of it,"
     " where the resize (the first augmentation, without CROP) makes them smaller still. With a"
     " short side of 800, photographs of 12 megapixels load 1.7 times as fast, those of 24 2.7"
     " times. Pixels change by less than one level of 255 in the mean, 99 of 100 by at most 4.")
_key("INPUT.AUGMENTATIONS", [],
     "detkit: augmentations in training, in this order, in place of *_SIZE_TRAIN, RANDOM_FLIP and"
     " CROP: [{name: ResizeScale, min_scale: 0.1, max_scale: 2, target_height: 1024, target_width:"
     " 1024}, {name: FixedSizeCrop, crop_size: [1024, 1024]}, {name: RandomFlip}]. The fields are"
     " the arguments of the class in AUGMENTATION_REGISTRY; `p` is the probability to apply it,"
     " `until` the share of the run after which it ends.")
_key("INPUT.RECOMPUTE_BOXES", False,
     "detkit: replace boxes by those around the augmented masks, which is more exact after a crop."
     " INPUT.CROP does so in any case.",
     needs=("MODEL.MASK_ON",))
_key("INPUT.MIN_SIZE_TRAIN", (800,),
     "Length of the shortest side in training, in pixels; one of several is drawn.",
     minimum=0, unless=_AUGMENTATIONS)
_key("INPUT.MIN_SIZE_TRAIN_SAMPLING", "choice",
     "Draw one of MIN_SIZE_TRAIN, or from the range between two.",
     choices=("choice", "range"), unless=_AUGMENTATIONS)
_key("INPUT.MAX_SIZE_TRAIN", 1333, "Longest side in training, in pixels; overrides MIN_SIZE_TRAIN.",
     minimum=1, unless=_AUGMENTATIONS)
_key("INPUT.MIN_SIZE_TEST", 800, "Shortest side in testing, in pixels; 0 does not resize.",
     minimum=0)
_key("INPUT.MAX_SIZE_TEST", 1333, "Longest side in testing, in pixels.", minimum=1)
_key("INPUT.RESIZE", "detectron2",
     "detkit: detectron2 antialiases, and rounds pixels and sides; torchvision does not antialias,"
     " keeps pixels as floats, and rounds sides down.",
     choices=("detectron2", "torchvision"))
_key("INPUT.RANDOM_FLIP", "horizontal", "Flip with probability 0.5.",
     choices=("horizontal", "vertical", "none"), unless=_AUGMENTATIONS)
_key("INPUT.CROP.ENABLED", False, "Crop at random in training, before the resize.",
     unless=_AUGMENTATIONS)
_key("INPUT.CROP.TYPE", "relative_range",
     "Unit of CROP.SIZE: relative (fraction of the side), relative_range (from that fraction to 1),"
     " absolute (pixels), absolute_range (pixels, from and to).",
     choices=("relative", "relative_range", "absolute", "absolute_range"),
     needs=("INPUT.CROP.ENABLED",))
_key("INPUT.CROP.SIZE", [0.9, 0.9], "(height, width), or (from, to) for absolute_range.",
     minimum=0, needs=("INPUT.CROP.ENABLED",))
_key("INPUT.CROP.SINGLE_CATEGORY_MAX_AREA", 1.0,
     "detkit: largest fraction of a crop that one class of the label map may cover, in (0, 1]; 1"
     " disables the check. From Detectron2's DeepLab project; Chen et al. 2018, arXiv 1802.02611.",
     minimum=0, needs=("INPUT.CROP.ENABLED",))
_key("INPUT.TILES.SIZE", 0,
     "detkit: train on random tiles of this side, in pixels, instead of whole images, as for"
     " TEST.TILES; 0 does not. Tiles are cut around a random object, and then resized.",
     minimum=0, unless=_AUGMENTATIONS)
_key("INPUT.TILES.EMPTY", 0.1, "detkit: part of the tiles that are cut anywhere.",
     minimum=0, needs=("INPUT.TILES.SIZE",))
_key("INPUT.TILES.MIN_VISIBLE", 0.3,
     "detkit: an object of which less than this part of its box lies in the tile is left out.",
     minimum=0, needs=("INPUT.TILES.SIZE",))
_key("INPUT.MASK_FORMAT", "polygon",
     "Format of ground-truth masks: polygon, if all masks of an image are polygons; or bitmask.",
     choices=("polygon", "bitmask"))

# --- Data ---

_key("DATASETS.TRAIN", (), "Names of the data sets to train on.")
_key("DATASETS.TRAIN_RATIOS", [],
     "detkit: parts of the training images from each of DATASETS.TRAIN: [3, 1] draws three of the"
     " first for one of the second, whatever their sizes. Empty takes every image equally often.",
     minimum=0)
_key("DATASETS.TEST", (), "Names of the data sets to evaluate on.")
_key("DATASETS.REGISTER", [],
     "detkit: your own data sets, a list of {name, format: coco|voc|yolo|csv|labelme|cvat|"
     "open_images|hugging_face|dota|yolo_obb|auto|lvis|sem_seg|coco_panoptic, images, ...};"
     " paths are relative to the YAML file or to $DETKIT_DATASETS.",
     path_fields=("images", "annotations", "root", "split", "labels", "segments", "instances",
                  "data", "descriptions"))
_key("DATASETS.PROPOSAL_FILES_TRAIN", (), "Precomputed proposals, one file per training set.",
     needs=("MODEL.LOAD_PROPOSALS",))
_key("DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN", 2000, "Proposals taken per image.", minimum=1)
_key("DATASETS.PROPOSAL_FILES_TEST", (), "Precomputed proposals, one file per test set.",
     needs=("MODEL.LOAD_PROPOSALS",))
_key("DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST", 1000, "Proposals taken per image.", minimum=1)

_key("DATALOADER.NUM_WORKERS", 4,
     "Processes that load images, per training process; 0 loads in the training process.",
     minimum=0)
_key("DATALOADER.TIMEOUT", 600.0,
     "detkit: seconds without data from a worker process after which the run ends with an error; 0"
     " disables the limit.",
     minimum=0)
_key("DATALOADER.ON_BAD_IMAGE", "raise",
     "detkit: for training images that are missing, damaged or of another size than in their"
     " record: raise ends the run; skip leaves them out and logs them. Evaluation always raises,"
     " as scores on a part of the images are not comparable.",
     choices=("raise", "skip"))
_key("DATALOADER.ASPECT_RATIO_GROUPING", True,
     "Batch wide images and tall images separately, for less padding.")
_key("DATALOADER.SAMPLER_TRAIN", "TrainingSampler", "Order of the training images.",
     choices=("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler",
              "ClassAwareTrainingSampler"))
_key("DATALOADER.REPEAT_THRESHOLD", 0.0,
     "Fraction of images with a class below which it is repeated (RepeatFactorTrainingSampler).",
     minimum=0, needs=("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"))
_key("DATALOADER.REPEAT_SQRT", True,
     "Repeat sqrt(threshold / fraction) times. Gupta et al. 2019, arXiv 1908.03195.",
     needs=("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"))
_key("DATALOADER.RANDOM_SUBSET_RATIO", 1.0,
     "detkit: fraction of the images to train on, drawn once, in (0, 1]"
     " (RandomSubsetTrainingSampler).",
     minimum=0, needs=("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"))
_key("DATALOADER.FILTER_EMPTY_ANNOTATIONS", True,
     "Remove training images without objects, and log their number.")

# --- Solver ---

_key("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "Learning rate schedule.",
     choices=("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"))
_key("SOLVER.MAX_ITER", 40000, "Training iterations.", minimum=1)
_key("SOLVER.MAX_EPOCH", 0.0,
     "detkit: epochs, which replace MAX_ITER; 0 uses MAX_ITER. In any case, STEPS, WARMUP_ITERS,"
     " CHECKPOINT_PERIOD, TEST.EVAL_PERIOD and VIS_PERIOD accept '2ep' for two epochs.",
     minimum=0)
_key("SOLVER.IMS_PER_BATCH", 16,
     "Images per forward pass, over all processes; an iteration has SOLVER.ACCUM_STEPS passes.",
     minimum=1)
_key("SOLVER.ACCUM_STEPS", 1,
     "detkit: passes per iteration, whose gradients are averaged: an effective batch of ACCUM_STEPS"
     " * IMS_PER_BATCH images. MAX_ITER, STEPS and periods count iterations.",
     minimum=1, only_default_trainer=True)
_key("SOLVER.SKIP_NONFINITE_STEPS", 0,
     "detkit: number of iterations with non-finite losses or gradients to skip in a run, each with"
     " a warning; the next one stops the run. Steps that fp16 loss scaling skips are not counted.",
     minimum=0, only_default_trainer=True)
_key("SOLVER.BASE_LR", 0.001, "Learning rate after the warm-up.", minimum=0)
_key("SOLVER.BASE_LR_END", 0.0, "Learning rate at the end of WarmupCosineLR.",
     minimum=0, needs=("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"))
_key("SOLVER.OPTIMIZER", "SGD",
     "detkit: the optimizer. AdamW needs a smaller BASE_LR (1e-4) and a larger WEIGHT_DECAY (0.05)"
     " than SGD.",
     choices=("SGD", "AdamW"))
_key("SOLVER.ADAMW.BETAS", (0.9, 0.999),
     "detkit: AdamW's two decay rates of running means, each in [0, 1).",
     minimum=0, needs=("SOLVER.OPTIMIZER", "AdamW"))
_key("SOLVER.ADAMW.EPS", 1e-8, "detkit: AdamW's addend to the denominator, above 0.",
     minimum=0, needs=("SOLVER.OPTIMIZER", "AdamW"))
_key("SOLVER.LR_MULT", [],
     "detkit: pairs [regular expression, factor] for the learning rates of parameters whose name"
     " matches, such as [['^backbone', 0.1]]. If several match, the last pair counts.")
_key("SOLVER.LAYER_DECAY", 1.0,
     "detkit: factor on the learning rate of the backbone's last stage, applied once more for each"
     " earlier stage (stem, res2, ..., res5; strides in models of torchvision and timm). In (0,"
     " 1]; 1 disables it.",
     minimum=0)
_key("SOLVER.MOMENTUM", 0.9, "Momentum of SGD.", minimum=0, needs=("SOLVER.OPTIMIZER", "SGD"))
_key("SOLVER.NESTEROV", False, "Use Nesterov momentum.", needs=("SOLVER.OPTIMIZER", "SGD"))
_key("SOLVER.WEIGHT_DECAY", 0.0001, "Weight decay.", minimum=0)
_key("SOLVER.FREEZE", [],
     "detkit: regular expressions, searched in the names of the state_dict: '^backbone',"
     " 'rpn_head\\.conv'. Tensors that match are frozen, also statistics of batch norms.")
_key("SOLVER.WEIGHT_DECAY_NORM", 0.0, "Weight decay of norm layers.", minimum=0)
_key("SOLVER.WEIGHT_DECAY_BIAS", None, "Weight decay of biases; None uses WEIGHT_DECAY.",
     minimum=0)
_key("SOLVER.WEIGHT_DECAY_OVERRIDES", [],
     "detkit: pairs [last part of a parameter's name, weight decay], such as [['pos_embed', 0.0]];"
     " they override the other weight decays.")
_key("SOLVER.BIAS_LR_FACTOR", 1.0, "Factor on the learning rate of biases.", minimum=0)
_key("SOLVER.GAMMA", 0.1, "Factor on the learning rate at each of STEPS.", minimum=0,
     unless=("SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"))
_key("SOLVER.STEPS", (30000,),
     "Iterations at which the learning rate decreases; '60%' is a share of the run.",
     minimum=0, in_epochs=True, in_shares=True,
     needs=("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"))
_key("SOLVER.NUM_DECAYS", 3, "Number of decays of WarmupStepWithFixedGammaLR.",
     minimum=1, needs=("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"))
_key("SOLVER.WARMUP_FACTOR", 1.0 / 1000, "Fraction of the learning rate at the first iteration.",
     minimum=0)
_key("SOLVER.WARMUP_ITERS", 1000,
     "Iterations until the full learning rate; '0.5%' is a share of the run.",
     minimum=0, in_epochs=True, in_shares=True)
_key("SOLVER.WARMUP_METHOD", "linear", "Schedule of the warm-up.", choices=("linear", "constant"))
_key("SOLVER.RESCALE_INTERVAL", False,
     "Rescale the schedule to the iterations after the warm-up.")
_key("SOLVER.CHECKPOINT_PERIOD", 5000, "Iterations between checkpoints.", minimum=1, in_epochs=True)
_key("SOLVER.REFERENCE_WORLD_SIZE", 0,
     "Number of processes that the settings are for: batch size, learning rate and schedule are"
     " scaled linearly to the actual number. 0 disables it.",
     minimum=0, only_default_trainer=True)
_key("SOLVER.REFERENCE_BATCH", 0,
     "detkit: images per iteration that BASE_LR is for; the rates grow linearly with the actual"
     " number, IMS_PER_BATCH * ACCUM_STEPS. Lengths stay: give them in epochs. 0 disables it.",
     minimum=0)
_key("SOLVER.CLIP_GRADIENTS.ENABLED", False, "Clip gradients before each step.")
_key("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value",
     "value: each element; norm: the norm per parameter; full_model: the norm of all gradients.",
     choices=("value", "norm", "full_model"), needs=("SOLVER.CLIP_GRADIENTS.ENABLED",))
_key("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0, "Largest absolute value, or largest norm.",
     minimum=0, needs=("SOLVER.CLIP_GRADIENTS.ENABLED",))
_key("SOLVER.CLIP_GRADIENTS.NORM_TYPE", 2.0, "Order of the norm.",
     minimum=0, needs=("SOLVER.CLIP_GRADIENTS.ENABLED",))
_key("SOLVER.AMP.ENABLED", False,
     "Mixed precision: convolutions and matrix products in half precision.",
     only_default_trainer=True)
_key("SOLVER.AMP.DTYPE", "auto",
     "detkit: bf16; fp16, with loss scaling, on CUDA only; or auto: fp16 on CUDA, as in Detectron2,"
     " otherwise bf16.",
     choices=("auto", "bf16", "fp16"), needs=("SOLVER.AMP.ENABLED",))

_key("SOLVER.DDP.COMPRESSION", "",
     "detkit: send gradients between processes in half precision: half the traffic, and the digits"
     " of that type. Detectron2's Python configs use fp16.",
     choices=("", "fp16", "bf16"), only_default_trainer=True)
_key("SOLVER.DDP.STATIC_GRAPH", False,
     "detkit: tell DistributedDataParallel that the same parameters get gradients in every"
     " iteration, which saves time; a model where they differ fails.",
     only_default_trainer=True)

# --- Best checkpoint and early stopping ---

_key("BEST_METRIC", "",
     "detkit: metric of the evaluation whose best model is saved as model_best.pth, such as"
     " bbox/AP, or DATASET/bbox/AP if DATASETS.TEST has several; empty saves none.",
     only_default_trainer=True)
_key("BEST_METRIC_MODE", "max", "detkit: whether the largest or the smallest value is best.",
     choices=("max", "min"), needs=("BEST_METRIC",))
_key("EARLY_STOP.PATIENCE", 0,
     "detkit: end the run after this number of consecutive evaluations without a better"
     " BEST_METRIC; 0 disables it.",
     minimum=0, only_default_trainer=True)

# --- Moving average of the weights ---

_key("MODEL_EMA.ENABLED", False,
     "detkit: keep a moving average of the weights and of the norms' statistics. It is saved in"
     " checkpoints as `ema`, and each evaluation also reports its scores, as bbox_EMA, ...",
     only_default_trainer=True)
_key("MODEL_EMA.DECAY", 0.999, "detkit: decay rate of the average per iteration, in [0, 1).",
     minimum=0, needs=("MODEL_EMA.ENABLED",))
_key("MODEL_EMA.WARMUP", True,
     "detkit: use a lower decay rate at the start: at most (1 + n) / (10 + n) in iteration n.",
     needs=("MODEL_EMA.ENABLED",))
_key("MODEL_EMA.USE_FOR_PREDICTION", False,
     "detkit: use the average in the checkpoint MODEL.WEIGHTS for prediction and --eval-only."
     " Training always starts from the weights themselves.")

# --- Test ---

_key("TEST.EVAL_PERIOD", 0,
     "Iterations between evaluations; 0 or less evaluates at the end only.",
     in_epochs=True, needs=("DATASETS.TEST",))
_key("TEST.COMPUTE_LOSS", False,
     "detkit: also report the losses on DATASETS.TEST with each evaluation, as val/loss_cls, ...,"
     " val/total_loss. Statistics of norms and random number generators are not changed.",
     needs=("DATASETS.TEST",), only_default_trainer=True)
_key("TEST.DETECTIONS_PER_IMAGE", 100,
     "Maximum number of detections per image, in the model and in the evaluation.",
     minimum=1)
_key("TEST.EXPECTED_RESULTS", [],
     "Scores to verify, [[task, metric, value, tolerance], ...]; the run fails if one differs.",
     only_default_trainer=True)
_key("TEST.KEYPOINT_OKS_SIGMAS", [],
     "OKS sigma of each keypoint, relative to the size of the object, above 0; empty uses COCO's"
     " 17.",
     needs=("MODEL.KEYPOINT_ON",))
_key("TEST.KEYPOINT_DETECTIONS_PER_IMAGE", 20,
     "detkit: maximum number of detections per image and class in the keypoint metric; COCO's is"
     " 20.",
     minimum=1, needs=("MODEL.KEYPOINT_ON",))
_key("TEST.IOU_THRESHOLDS", [],
     "detkit: IoU thresholds of COCO's AP, increasing, in (0, 1]; the AP at each is also reported."
     " Empty uses COCO's 0.50, 0.55, ..., 0.95.")
_key("TEST.AREA_RANGES", [],
     "detkit: size classes of objects for COCO's AP, [[name, smallest, largest], ...] in square"
     " pixels. Empty uses COCO's small, medium and large.")
_key("TEST.NMS.METHOD", "hard",
     "detkit: NMS of the ROI heads, RetinaNet and FCOS: hard drops detections that overlap a better"
     " one; linear and gaussian lower their score (Soft-NMS, Bodla et al. 2017, arXiv 1704.04503).",
     choices=("hard", "linear", "gaussian"))
_key("TEST.NMS.SIGMA", 0.5, "detkit: width of the gaussian, exp(-IoU^2 / SIGMA). Above 0.",
     minimum=0, needs=("TEST.NMS.METHOD", "gaussian"))
_key("TEST.NMS.CLASS_AGNOSTIC", False,
     "detkit: detections of different classes also suppress each other.")
_key("TEST.AUG.ENABLED", False, "Also evaluate and predict with test-time augmentation.",
     only_default_trainer=True)
_key("TEST.AUG.MIN_SIZES", (400, 500, 600, 700, 800, 900, 1000, 1100, 1200),
     "Shortest sides of the resized images.",
     minimum=1, needs=("TEST.AUG.ENABLED",))
_key("TEST.AUG.MAX_SIZE", 4000, "Longest side of the resized images.",
     minimum=1, needs=("TEST.AUG.ENABLED",))
_key("TEST.AUG.FLIP", True, "Also use flipped images.",
     needs=("TEST.AUG.ENABLED",))
_key("TEST.TILES.SIZE", 0,
     "detkit: detect in tiles of this side, in pixels of the original image, for huge images and"
     " small objects; 0 detects in the whole image. Each tile is resized by INPUT.MIN_SIZE_TEST.",
     minimum=0, only_default_trainer=True)
_key("TEST.TILES.OVERLAP", 0.2,
     "detkit: part of a tile that the next one shows, too, in [0, 1); objects up to that size are"
     " whole in one of them.",
     minimum=0, needs=("TEST.TILES.SIZE",))
_key("TEST.TILES.MERGE", "nms",
     "detkit: the box of an object found in several tiles: nms, that of the best score; wbf, the"
     " mean weighted by scores (Solovyev et al. 2019, arXiv 1910.13302).",
     choices=("nms", "wbf"), needs=("TEST.TILES.SIZE",))
_key("TEST.TILES.BATCH_SIZE", 1, "detkit: tiles that go through the model together.",
     minimum=1, needs=("TEST.TILES.SIZE",))
_key("TEST.AMP.ENABLED", False,
     "detkit: evaluate and predict in mixed precision: convolutions and matrix products in half"
     " precision, boxes, scores and NMS in float32. Faster on GPUs and on CPUs with AMX or AVX-512"
     " BF16, slower on others.",
     only_default_trainer=True)
_key("TEST.AMP.DTYPE", "bf16",
     "detkit: bf16; or fp16, on CUDA only.",
     choices=("bf16", "fp16"), needs=("TEST.AMP.ENABLED",))
_key("TEST.PRECISE_BN.ENABLED", False,
     "Recompute the statistics of batch norm layers before each evaluation.",
     only_default_trainer=True)
_key("TEST.PRECISE_BN.NUM_ITER", 200, "Number of batches to compute them from.",
     minimum=1, needs=("TEST.PRECISE_BN.ENABLED",))
# fmt: on


def get_cfg() -> CfgNode:
    """Return a new tree of all settings with their defaults."""
    cfg = _C.clone()
    cfg.MODEL["DEVICE"] = _device_name(cfg.MODEL["DEVICE"])
    return cfg


def _defaults() -> CfgNode:
    cfg = CfgNode()
    for name, spec in _TABLE.items():
        *groups, leaf = name.split(".")
        node: Any = cfg
        for group in groups:
            node = node.setdefault(group, CfgNode())
        # An empty dict declares a group that accepts any key: MODEL.CUSTOM.
        node[leaf] = CfgNode(new_allowed=True) if spec.default == {} else deepcopy(spec.default)
    cfg.set_key_table(_TABLE)
    return cfg


# Detectron2's name: what is added to it is in all configs from then on.
_C = _defaults()


def explain(key: str) -> str:
    """Return the meaning, default and legal values of a key, as text.

    Raises:
        ConfigKeyError: The key is unknown.

    Example:
        >>> from detkit.config import explain
        >>> print(explain("SOLVER.NUM_DECAYS"))
        SOLVER.NUM_DECAYS = 3
        Number of decays of WarmupStepWithFixedGammaLR.
        At least: 1
        Needs: SOLVER.LR_SCHEDULER_NAME = 'WarmupStepWithFixedGammaLR'
    """
    get_cfg().get_by_full_key(key)
    if key not in _TABLE:
        below = [name for name in _TABLE if name.startswith(key + ".")]
        return f"{key}: a group of {len(below)} keys: {', '.join(below)}"
    spec = _TABLE[key]
    lines = [f"{key} = {spec.default!r}", spec.meaning]
    if spec.choices:
        lines.append(f"One of: {', '.join(map(repr, spec.choices))}")
    if spec.minimum is not None:
        lines.append(f"At least: {spec.minimum:g}")
    if spec.needs:
        decider, *values = spec.needs
        lines.append(f"Needs: {decider}{' = ' if values else ''}{' or '.join(map(repr, values))}")
    if spec.unless:
        decider, *values = spec.unless
        lines.append(f"Not read with: {decider} = {' or '.join(map(repr, values))}")
    if builders := _BUILDERS.get(key.rpartition(".")[0]):
        lines.append(f"Read by: {', '.join(builders)}")
    if spec.only_default_trainer:
        lines.append("Read by DefaultTrainer, not by tools/plain_train_net.py.")
    if spec.unread:
        lines.append(f"Not read by this version: {spec.unread}.")
    return "\n".join(lines)


def unread_settings(cfg: CfgNode) -> dict[str, str]:
    """Return the keys that a config sets and no code reads, each with the reason."""
    replaced = _replaced_groups(cfg)
    return {
        name: spec.unread
        for name, spec in _TABLE.items()
        if spec.unread
        and spec.default != {}
        and name.rpartition(".")[0] not in replaced
        and cfg.get_by_full_key(name) != spec.default
    }


def settings_without_effect(cfg: CfgNode) -> dict[str, str]:
    """Return the keys that a config sets without effect, each with the deciding setting.

    Example:
        >>> from detkit.config import get_cfg, settings_without_effect
        >>> cfg = get_cfg()
        >>> cfg.SOLVER.NUM_DECAYS = 4
        >>> settings_without_effect(cfg)
        {'SOLVER.NUM_DECAYS': "SOLVER.LR_SCHEDULER_NAME is 'WarmupMultiStepLR'"}
    """
    found = {}
    # These heads build a res5 of their own, whatever the backbone is.
    has_res5 = (
        cfg.MODEL.META_ARCHITECTURE not in _DENSE
    ) and cfg.MODEL.ROI_HEADS.NAME in _RES5_HEADS
    backbone = cfg.MODEL.BACKBONE.NAME
    is_own = any(backbone in builders for builders in _BUILDERS.values())
    replaced = _replaced_groups(cfg)
    for name, spec in _TABLE.items():
        group = name.rpartition(".")[0]
        if group in replaced:
            continue
        value = cfg.get_by_full_key(name)
        if value == spec.default or value == ():  # an empty list asks for nothing
            continue
        for condition, is_needed in ((spec.needs, True), (spec.unless, False)):
            if condition:
                decider, *values = condition
                decision = cfg.get_by_full_key(decider)
                is_met = decision in values if values else bool(decision)
                if is_met != is_needed:
                    found[name] = f"{decider} is {decision!r}"
        # Recipes of other backbones build on files for ResNets, which set this one.
        is_exempt = name == "MODEL.RESNETS.OUT_FEATURES" or (has_res5 and group == "MODEL.RESNETS")
        if is_own and not is_exempt and backbone not in _BUILDERS.get(group, (backbone,)):
            found[name] = f"MODEL.BACKBONE.NAME is {backbone!r}"
    return found


def _replaced_groups(cfg: CfgNode) -> set[str]:
    """Return the groups in whose place a project has put a node of its own, such as MODEL.FCOS."""
    replaced = set()
    for name in _TABLE:
        *groups, leaf = name.split(".")
        node: Any = cfg
        for group in groups:
            node = node.get(group, {})
        if leaf not in node:
            replaced.add(".".join(groups))
    return replaced


def default_trainer_settings() -> dict[str, Any]:
    """Return the keys that only `DefaultTrainer` reads, with their defaults, which disable them."""
    return {name: spec.default for name, spec in _TABLE.items() if spec.only_default_trainer}
