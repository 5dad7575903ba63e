"""Methods that Detectron2's users override are the ones that are called in a real run."""

import functools
import inspect
from collections import Counter

import pytest
import torch

import detkit.modeling as modeling
from detkit.checkpoint import DetectionCheckpointer
from detkit.config import declare_architecture, find_architecture
from detkit.data import DatasetMapper, build_detection_train_loader
from detkit.data.samplers import (
    InferenceSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detkit.engine import DefaultTrainer, hooks
from detkit.evaluation import COCOEvaluator
from detkit.modeling.anchor_generator import ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator
from detkit.modeling.meta_arch import SemSegFPNHead
from detkit.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detkit.modeling.roi_heads import FastRCNNConvFCHead
from tests.end_to_end.families import family_config

# Class -> the methods of it that run in training, in evaluation, or in both.
TWO_STAGE = {
    modeling.GeneralizedRCNN: ("forward", "inference", "preprocess_image", "_postprocess"),
    modeling.FPN: ("forward", "output_shape"),
    RPN: (
        "forward",
        "label_and_sample_anchors",
        "_subsample_labels",
        "losses",
        "predict_proposals",
        "_decode_proposals",
    ),
    StandardRPNHead: ("forward",),
    DefaultAnchorGenerator: ("forward",),
    modeling.StandardROIHeads: (
        "forward",
        "label_and_sample_proposals",
        "_sample_proposals",
        "_forward_box",
        "_forward_mask",
        "_forward_keypoint",
        "forward_with_given_boxes",
        "_init_box_head",
        "_init_mask_head",
        "_init_keypoint_head",
    ),
    FastRCNNConvFCHead: ("forward",),
    modeling.FastRCNNOutputLayers: (
        "forward",
        "losses",
        "box_reg_loss",
        "inference",
        "predict_boxes",
        "predict_probs",
    ),
    modeling.MaskRCNNConvUpsampleHead: ("forward", "layers"),
    modeling.KRCNNConvDeconvUpsampleHead: ("forward", "layers"),
    DatasetMapper: ("__call__", "_transform_annotations"),
    COCOEvaluator: (
        "reset",
        "process",
        "evaluate",
        "_eval_predictions",
        "_tasks_from_predictions",
        "_derive_coco_results",
    ),
    DetectionCheckpointer: ("save", "load", "_load_file", "_load_model"),
    hooks.EvalHook: ("_do_eval", "after_step", "after_train"),
    hooks.LRScheduler: ("before_train", "after_step"),
    DefaultTrainer: (
        "build_model",
        "build_optimizer",
        "build_lr_scheduler",
        "build_train_loader",
        "build_test_loader",
        "build_evaluator",
        "build_hooks",
        "build_writers",
        "resume_or_load",
        "train",
        "before_train",
        "before_step",
        "run_step",
        "_write_metrics",
        "after_step",
        "after_train",
        "test",
        "state_dict",
    ),
}
CASCADE = {
    modeling.CascadeROIHeads: (
        "_forward_box",
        "_run_stage",
        "_match_and_label_boxes",
        "_create_proposals_from_boxes",
    )
}
C4 = {modeling.Res5ROIHeads: ("forward", "_shared_roi_transform", "_build_res5_block")}
DENSE = (
    "forward",
    "forward_training",
    "forward_inference",
    "label_anchors",
    "losses",
    "inference_single_image",
    "_transpose_dense_predictions",
    "_decode_multi_level_predictions",
    "_decode_per_level_predictions",
)
RETINANET = {modeling.RetinaNet: DENSE}
FCOS = {modeling.FCOS: (*DENSE, "compute_ctrness_targets")}
PANOPTIC = {
    modeling.PanopticFPN: ("forward", "inference"),
    SemSegFPNHead: ("forward", "layers", "losses"),
}
SEMANTIC = {modeling.SemanticSegmentor: ("forward", "inference", "preprocess_image")}
AUGMENTED = {
    modeling.GeneralizedRCNNWithTTA: (
        "forward",
        "_inference_one_image",
        "_get_augmented_inputs",
        "_turn_off_roi_heads",
        "_batch_inference",
        "_get_augmented_boxes",
        "_merge_detections",
        "_rescale_detected_boxes",
        "_reduce_pred_masks",
    ),
    modeling.DatasetMapperTTA: ("__call__",),
}
SAMPLERS = {
    TrainingSampler: ("_infinite_indices",),
    RepeatFactorTrainingSampler: ("_infinite_indices", "_get_epoch_indices"),
    InferenceSampler: ("_get_local_indices",),
}
ALL = {**TWO_STAGE, **CASCADE, **C4, **RETINANET, **FCOS}
ALL |= {**PANOPTIC, **SEMANTIC, **AUGMENTED, **SAMPLERS}
called: Counter[tuple[type, str]] = Counter()


def overriding(base, methods):
    """Return a subclass that notes each call of the methods, and calls those of its base."""

    def noted(name):
        original = getattr(base, name)
        is_class_method = hasattr(original, "__self__")

        @functools.wraps(original)
        def method(self, *args, **kwargs):
            called[base, name] += 1
            return getattr(super(kind, self), name)(*args, **kwargs)

        @functools.wraps(original)
        def static(*args, **kwargs):
            called[base, name] += 1
            return original(*args, **kwargs)

        if isinstance(inspect.getattr_static(base, name), staticmethod):
            return staticmethod(static)
        return classmethod(method) if is_class_method else method

    kind = type(f"Own{base.__name__}", (base,), {name: noted(name) for name in methods})
    return kind


def registered(registry, base, table):
    kind = overriding(base, table[base])
    if (keys := find_architecture(base)) is not None and registry is modeling.META_ARCH_REGISTRY:
        declare_architecture(**vars(keys))(kind)
    if kind.__name__ not in registry:
        registry.register(kind)
    return kind.__name__


def small_cfg(folder, family, changes):
    cfg = family_config(family)
    cfg.merge_from_list([item for pair in changes.items() for item in pair])
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 1, 0
    cfg.SOLVER.CHECKPOINT_PERIOD = 100
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    # Something is to be found by weights that are random.
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.FCOS.SCORE_THRESH_TEST = 0.0
    cfg.VIS_PERIOD = 0
    return cfg


def make_trainer():
    base = overriding(DefaultTrainer, TWO_STAGE[DefaultTrainer])
    mapper = overriding(DatasetMapper, TWO_STAGE[DatasetMapper])
    evaluator = overriding(COCOEvaluator, TWO_STAGE[COCOEvaluator])
    eval_hook = overriding(hooks.EvalHook, TWO_STAGE[hooks.EvalHook])
    lr_hook = overriding(hooks.LRScheduler, TWO_STAGE[hooks.LRScheduler])

    class Trainer(base):
        @classmethod
        def build_train_loader(cls, cfg):
            called[DefaultTrainer, "build_train_loader"] += 1
            return build_detection_train_loader(cfg, mapper=mapper(cfg, True))

        @classmethod
        def build_evaluator(cls, cfg, dataset_name):
            called[DefaultTrainer, "build_evaluator"] += 1
            return evaluator(dataset_name, output_dir=cfg.OUTPUT_DIR, kpt_oks_sigmas=[0.1] * 5)

        def build_hooks(self):
            found = [h for h in super().build_hooks() if not isinstance(h, hooks.LRScheduler)]
            return [lr_hook(), eval_hook(0, dict), *found]

    return Trainer


@pytest.fixture(scope="module")
def _runs(datasets, tmp_path_factory):
    """Train, save, load and evaluate a model of each table whose every class is a subclass."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETKIT_DATASETS", str(datasets))
        run_two_stage(folder / "two_stage")
        for family, base, table, registry, key in (
            ("cascade", modeling.CascadeROIHeads, CASCADE, "ROI_HEADS", "ROI_HEADS.NAME"),
            ("C4", modeling.Res5ROIHeads, C4, "ROI_HEADS", "ROI_HEADS.NAME"),
            ("RetinaNet", modeling.RetinaNet, RETINANET, "META_ARCH", "META_ARCHITECTURE"),
            ("FCOS", modeling.FCOS, FCOS, "META_ARCH", "META_ARCHITECTURE"),
            ("panoptic", modeling.PanopticFPN, PANOPTIC, "META_ARCH", "META_ARCHITECTURE"),
            ("semantic", modeling.SemanticSegmentor, SEMANTIC, "META_ARCH", "META_ARCHITECTURE"),
        ):  # fmt: skip
            own = registered(getattr(modeling, f"{registry}_REGISTRY"), base, table)
            cfg = small_cfg(folder / family, family, {f"MODEL.{key}": own})
            if base is modeling.PanopticFPN:
                head = registered(modeling.SEM_SEG_HEADS_REGISTRY, SemSegFPNHead, PANOPTIC)
                cfg.MODEL.SEM_SEG_HEAD.NAME = head
            trainer = DefaultTrainer(cfg)
            trainer.resume_or_load(resume=False)
            trainer.train()
        yield


def run_two_stage(folder):
    registries = {
        "MODEL.META_ARCHITECTURE": (modeling.META_ARCH_REGISTRY, modeling.GeneralizedRCNN),
        "MODEL.PROPOSAL_GENERATOR.NAME": (modeling.PROPOSAL_GENERATOR_REGISTRY, RPN),
        "MODEL.RPN.HEAD_NAME": (modeling.RPN_HEAD_REGISTRY, StandardRPNHead),
        "MODEL.ANCHOR_GENERATOR.NAME": (ANCHOR_GENERATOR_REGISTRY, DefaultAnchorGenerator),
        "MODEL.ROI_BOX_HEAD.NAME": (modeling.ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead),
        "MODEL.ROI_MASK_HEAD.NAME": (
            modeling.ROI_MASK_HEAD_REGISTRY,
            modeling.MaskRCNNConvUpsampleHead,
        ),
        "MODEL.ROI_KEYPOINT_HEAD.NAME": (
            modeling.ROI_KEYPOINT_HEAD_REGISTRY,
            modeling.KRCNNConvDeconvUpsampleHead,
        ),
    }
    names = {key: registered(*entry, TWO_STAGE) for key, entry in registries.items()}
    predictor = overriding(modeling.FastRCNNOutputLayers, TWO_STAGE[modeling.FastRCNNOutputLayers])
    pyramid = overriding(modeling.FPN, TWO_STAGE[modeling.FPN])
    heads = overriding(modeling.StandardROIHeads, TWO_STAGE[modeling.StandardROIHeads])

    class OwnPredictorHeads(heads):
        @classmethod
        def _init_box_head(cls, cfg, input_shape):
            parts = super()._init_box_head(cfg, input_shape)
            return {**parts, "box_predictor": predictor(cfg, parts["box_head"].output_shape)}

    def own_pyramid_backbone(cfg, input_shape):
        resnet = modeling.build_resnet_backbone(cfg, input_shape)
        top = modeling.LastLevelMaxPool()
        return pyramid(resnet, cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS, "", top)

    for registry, part, key in (
        (modeling.ROI_HEADS_REGISTRY, OwnPredictorHeads, "MODEL.ROI_HEADS.NAME"),
        (modeling.BACKBONE_REGISTRY, own_pyramid_backbone, "MODEL.BACKBONE.NAME"),
    ):
        registry.register(part)
        names[key] = part.__name__
    cfg = small_cfg(folder, "keypoint", {"MODEL.MASK_ON": True, **names})
    trainer = make_trainer()(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    kind = overriding(DetectionCheckpointer, TWO_STAGE[DetectionCheckpointer])
    checkpointer = kind(trainer.model, str(folder), trainer=trainer)
    mapper = overriding(modeling.DatasetMapperTTA, AUGMENTED[modeling.DatasetMapperTTA])
    kind = overriding(modeling.GeneralizedRCNNWithTTA, AUGMENTED[modeling.GeneralizedRCNNWithTTA])
    augmented = kind(cfg, trainer.model, mapper(min_sizes=[32], max_size=48, flip=False))
    augmented.eval()([{"image": torch.zeros(3, 40, 40)}])
    samplers = [overriding(base, methods) for base, methods in SAMPLERS.items()]
    next(iter(samplers[0](3)))
    next(iter(samplers[1](torch.ones(3))))
    samplers[2](3)
    checkpointer.save("again")
    checkpointer.load(str(folder / "again.pth"))


@pytest.mark.parametrize(
    ("base", "method"),
    [
        pytest.param(base, method, id=f"{base.__name__}.{method}")
        for base, methods in ALL.items()
        for method in methods
    ],
)
@pytest.mark.usefixtures("_runs")
def test_overridden_method_is_called(base, method):
    assert called[base, method] > 0
