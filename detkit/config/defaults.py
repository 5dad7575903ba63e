"""All settings: default, meaning, unit and legal values.

Names and defaults are those of Detectron2 0.6, except where the text says detkit. Sizes are in
pixels of the resized image unless said otherwise; thresholds and fractions are in [0, 1]. Setting a
key with `unread`, which no code reads, logs a warning.
"""

from copy import deepcopy
from typing import Any

from detkit.config.cfg_node import CfgNode, KeyTable
from detkit.config.model_keys import BUILDERS, DENSE, MODEL_KEYS, RES5_HEADS, device_name

_TABLE = KeyTable()
_key = _TABLE.declare
_AUGMENTATIONS = ("INPUT.AUGMENTATIONS",)

# fmt: off
# A table: name and default, then the meaning, then the checks of a value. Sections have the order
# of Detectron2's file; detkit's keys are in the section of their subject.

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

# --- Model: see `model_keys` ---

_TABLE.update(MODEL_KEYS)

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
    cfg.MODEL["DEVICE"] = device_name(cfg.MODEL["DEVICE"])
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
    if builders := BUILDERS.get(key.rpartition(".")[0]):
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
    is_two_stage = cfg.MODEL.META_ARCHITECTURE not in DENSE
    has_res5 = is_two_stage and cfg.MODEL.ROI_HEADS.NAME in RES5_HEADS
    backbone = cfg.MODEL.BACKBONE.NAME
    is_own = any(backbone in builders for builders in BUILDERS.values())
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
        if is_own and not is_exempt and backbone not in BUILDERS.get(group, (backbone,)):
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
