"""Where Detectron2's names live here: the table behind `import detkit.x.y` of its other modules.

Detectron2's packages are detkit's, but the modules in them are not all the same. A name that
`detectron2.x.y` has is answered by `detkit.x.y` too: by the module itself, or from the rooms that
`ROOMS` gives. What is left out on purpose can be imported and says so when it is used.
"""

import functools
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from detkit.utils.errors import UserError

# Module of Detectron2 -> modules of detkit that have its names, relative to the package. A module
# that detkit has as well is asked first.
ROOMS: dict[str, tuple[str, ...]] = {
    "modeling.backbone.utils": ("modeling.backbone.transformer.attention",),
    "modeling.backbone.mvit": ("modeling.backbone.transformer.mvit",),
    "modeling.backbone.swin": ("modeling.backbone.transformer.swin",),
    "modeling.backbone.vit": ("modeling.backbone.transformer.vit",),
    "utils.tracing": ("utils.env",),
    "utils.torch_version_utils": ("utils.env",),
    "modeling.backbone": ("modeling.backbone.resnet_blocks",),
    "modeling": ("modeling.backbone", "modeling.meta_arch"),
    "utils.testing": ("model_zoo.testing",),
    "utils.analysis": ("modeling.analysis",),
    "structures.rotated_boxes": ("structures",),
    "checkpoint.c2_model_loading": ("checkpoint.detection_checkpoint",),
    "layers.aspp": ("layers.atrous",),
    "layers": ("layers.atrous", "layers.tensor_ops", "layers.losses"),
    "data.detection_utils": (
        "data.annotations",
        "data.dataset_mapper",
        "data.transforms.build",
        "utils.image",
    ),
    "config.config": ("config", "config.defaults"),
    "data.build": (
        "data",
        "data.dataset_dicts",
        "data.training_stream",
        "data.detection_utils",
        "data.samplers",
    ),
    "data.common": ("data.wrappers", "data.training_stream"),
    "data.datasets": ("data.datasets.lvis",),
    "data.datasets.builtin": ("data.datasets", "data.datasets.builtin_meta"),
    "data.datasets.cityscapes_panoptic": ("data.datasets.cityscapes",),
    "data.datasets.coco": ("data.datasets.coco_export", "data.datasets.sem_seg", "structures"),
    "data.datasets.register_coco": ("data.datasets",),
    "data.samplers.grouped_batch_sampler": ("data.samplers",),
    "data.transforms.augmentation": ("data.transforms",),
    "data.transforms.augmentation_impl": ("data.transforms",),
    "data.transforms.transform": ("data.transforms",),
    "engine": ("engine.hooks",),
    "engine.defaults": (
        "engine",
        "checkpoint",
        "data",
        "evaluation",
        "modeling",
        "solver",
        "utils",
        "utils.env",
        "utils.events",
        "utils.file_io",
        "utils.logger",
    ),
    "engine.hooks": ("engine.train_loop", "evaluation.testing"),
    "engine.train_loop": ("engine.simple_trainer",),
    "evaluation.cityscapes_evaluation": ("evaluation", "evaluation.cityscapes.evaluator"),
    "evaluation.coco_evaluation": (
        "evaluation",
        "evaluation.coco.evaluator",
        "evaluation.coco.results",
    ),
    "evaluation.panoptic_evaluation": ("evaluation", "evaluation.panoptic.evaluator"),
    "evaluation.rotated_coco_evaluation": ("evaluation",),
    "layers.batch_norm": ("layers", "layers.norm"),
    "layers.blocks": ("layers", "layers.atrous"),
    "layers.mask_ops": ("structures.mask_ops", "layers"),
    "layers.nms": ("layers",),
    "layers.roi_align": ("layers",),
    "layers.roi_align_rotated": ("layers",),
    "layers.rotated_boxes": ("structures", "structures.rotated_boxes"),
    "layers.shape_spec": ("layers",),
    "layers.wrappers": ("layers", "layers.tensor_ops", "layers.losses"),
    "modeling.backbone.fpn": ("modeling.backbone",),
    "modeling.backbone.resnet": ("modeling.backbone.resnet_blocks", "modeling.backbone"),
    "modeling.meta_arch.rcnn": ("modeling.backbone", "modeling.postprocessing"),
    "modeling.meta_arch.semantic_seg": ("modeling.meta_arch",),
    "modeling.proposal_generator": ("modeling.proposal_generator.rpn",),
    "modeling.proposal_generator.proposal_utils": ("modeling.proposal_generator.proposals",),
    "modeling.proposal_generator.rpn": (
        "modeling.proposal_generator",
        "modeling.box_regression",
        "modeling.sampling",
    ),
    "modeling.proposal_generator.rrpn": ("modeling.proposal_generator",),
    "modeling.roi_heads.box_head": ("modeling.roi_heads",),
    "modeling.roi_heads.keypoint_head": ("modeling.roi_heads",),
    "modeling.roi_heads.mask_head": ("modeling.roi_heads",),
    "modeling.roi_heads.cascade_rcnn": ("modeling.roi_heads.fast_rcnn",),
    "modeling.roi_heads.fast_rcnn": ("layers",),
    "modeling.roi_heads.roi_heads": (
        "modeling.roi_heads",
        "modeling.backbone",
        "modeling.poolers",
        "structures",
    ),
    "modeling.roi_heads.rotated_fast_rcnn": ("modeling.roi_heads", "modeling.roi_heads.fast_rcnn"),
    "solver": ("solver.lr_scheduler",),
    "solver.build": ("solver.param_groups",),
    "structures.boxes": ("structures",),
    "structures.masks": ("structures", "structures.mask_formats", "structures.polygon_masks"),
    "utils.collect_env": ("utils.env",),
    "utils.visualizer": ("visualization", "visualization.visualizer"),
    "utils.video_visualizer": ("visualization", "visualization.video"),
}

# A name of Detectron2 -> the same thing under its name here, or in another package.
RENAMED: dict[str, str] = {
    "data.common.NumpySerializedList": "data.wrappers._PickledItems",
    "data.common.TorchSerializedList": "data.wrappers._PickledItems",
    "data.datasets.pascal_voc.CLASS_NAMES": "data.datasets.builtin_meta.VOC_CLASSES",
    "data.datasets.builtin._get_builtin_metadata": "data.datasets.builtin_meta.builtin_metadata",
    "data.datasets.builtin_meta._get_builtin_metadata": (
        "data.datasets.builtin_meta.builtin_metadata"
    ),
    "data.datasets.builtin_meta._get_coco_instances_meta": (
        "data.datasets.builtin_meta.coco_metadata"
    ),
    "utils.logger._log_api_usage": "utils.logger.log_api_usage",
    "utils.develop.create_dummy_class": "utils.detectron2_names.create_dummy_class",
    "utils.develop.create_dummy_func": "utils.detectron2_names.create_dummy_class",
    "utils.visualizer._PanopticPrediction": "visualization.generic_mask.PanopticPrediction",
    "checkpoint.Checkpointer": "checkpoint.DetectionCheckpointer",
    "data.detection_utils._apply_exif_orientation": "data.detection_utils.apply_exif_orientation",
    "data.detection_utils.build_transform_gen": "data.transforms.build.build_augmentation",
    "data.transforms.augmentation._transform_to_aug": (
        "data.transforms.augmentation.as_augmentation"
    ),
    "data.transforms.ScaleTransform": "data.transforms.ResizeTransform",
    "evaluation.coco_evaluation._evaluate_predictions_on_coco": (
        "evaluation.coco.evaluator.evaluate_predictions_on_coco"
    ),
    "evaluation.coco_evaluation.COCOevalMaxDets": "evaluation.coco.evaluator.COCOevalMaxDets",
    "evaluation.fast_eval_api.COCOeval_opt": "pycocotools.cocoeval.COCOeval",
    "layers.BatchNorm2d": "torch.nn.BatchNorm2d",
    "layers.ConvTranspose2d": "torch.nn.ConvTranspose2d",
    "layers.Linear": "torch.nn.Linear",
    "layers.NaiveSyncBatchNorm": "layers.norm.SyncBatchNorm2d",
    "layers.batch_norm.BatchNorm2d": "torch.nn.BatchNorm2d",
    "layers.batch_norm.LayerNorm": "layers.LayerNorm2d",
    "layers.batch_norm.NaiveSyncBatchNorm": "layers.norm.SyncBatchNorm2d",
    "layers.wrappers.BatchNorm2d": "torch.nn.BatchNorm2d",
    "layers.wrappers.ConvTranspose2d": "torch.nn.ConvTranspose2d",
    "layers.wrappers.Linear": "torch.nn.Linear",
    "layers.wrappers.check_if_dynamo_compiling": "torch.compiler.is_compiling",
    "layers.wrappers._NewEmptyTensorOp": "layers.tensor_ops.NewEmptyTensor",
    "modeling.ResNetBlockBase": "layers.CNNBlockBase",
    "modeling.backbone.ResNetBlockBase": "layers.CNNBlockBase",
    "modeling.backbone.resnet.ResNetBlockBase": "layers.CNNBlockBase",
    "modeling.anchor_generator._broadcast_params": "modeling.anchor_generator._per_level",
    "modeling.box_regression._DEFAULT_SCALE_CLAMP": "modeling.box_regression.DEFAULT_SCALE_CLAMP",
    "modeling.box_regression._dense_box_regression_loss": (
        "modeling.box_regression.dense_box_regression_loss"
    ),
    "modeling.meta_arch.dense_detector.permute_to_N_HWA_K": (
        "modeling.meta_arch.dense_detector.predictions_by_anchor"
    ),
    "modeling.meta_arch.retinanet.permute_to_N_HWA_K": (
        "modeling.meta_arch.dense_detector.predictions_by_anchor"
    ),
    "modeling.proposal_generator.proposal_utils._is_tracing": "torch.jit.is_tracing",
    "modeling.roi_heads.fast_rcnn._log_classification_stats": (
        "modeling.roi_heads.fast_rcnn.log_classification_stats"
    ),
    "solver.build._expand_param_groups": "solver.param_groups.expand_param_groups",
    "solver.lr_scheduler._get_warmup_factor_at_iter": "solver.lr_scheduler.warmup_factor_at",
    "structures.boxes.matched_boxlist_iou": "structures.boxes.matched_pairwise_iou",
    "utils.video_visualizer._DetectedInstance": "visualization.video.DetectedInstance",
    "utils.events.TensorBoardXWriter": "utils.events.TensorboardXWriter",
    "utils.registry._convert_target_to_string": "utils.registry.qualified_name",
    "utils.visualizer._KEYPOINT_THRESHOLD": "visualization.overlay._MIN_VISIBLE",
    "utils.visualizer._create_text_labels": "visualization.classes.text_labels",
}

_LAZY = (
    "LazyConfig is left out: settings are YAML (get_cfg, merge_from_file), its zoo comes as YAML"
)
_TORCHSCRIPT = "TorchScript is left out: `detkit export` writes a model as ONNX"
_CAFFE2 = "Caffe2 is left out: `detkit export` writes a model as ONNX"
_GLOBAL = "the global config is left out: pass cfg to the function that needs it"
_MMDET = "the wrapper of MMDetection's models is left out: load its weights into a model of the zoo"

_CATALOG = (
    "the catalog is left out: give the address, detectron2://ImageNetPretrained/MSRA/R-50.pkl"
)
_ADE20K = "ADE20K is no built-in data set: its label maps are left out, see register_sem_seg"
_CAFFE2_WEIGHTS = (
    "functions on Caffe2's names are left out: DetectionCheckpointer.load translates such files"
)
_BENCHMARK = "the benchmark of loaders is left out: run `detkit benchmark data`"
_LVIS = "tables of LVIS's names are left out: register_lvis_instances reads them from its json"
_ZOO = "the table of addresses is left out: call model_zoo.get_checkpoint_url"
_OUTPUTS = "FastRCNNOutputs is left out since Detectron2 0.4: override FastRCNNOutputLayers"
_PASTE = "the older way to paste is left out: call paste_masks_in_image"
_RECALL = "this function is left out: COCOEvaluator scores `proposals` by their recall"
_BUILTIN = (
    "functions that register built-in data sets are left out: they are registered below"
    " $DETECTRON2_DATASETS"
)

_COMPILED = (
    "compiled operators are left out: those of detectron2.layers and detectron2.structures"
    " (nms_rotated, pairwise_iou_rotated, ROIAlignRotated, DeformConv, ...) run in torch"
)
_REGNET = "this part is left out: build_regnet_backbone builds RegNets from MODEL.REGNET"
_LAYER_DECAY = "this function is left out: SOLVER.LAYER_DECAY sets the rates of a ViT's layers"
_ATTENTION = "this function is left out: ViT, Swin and MViT share modeling.backbone.transformer"

# What is missing on purpose: it can be imported, and this is what its use says.
LEFT_OUT: dict[str, str] = {
    "modeling.backbone.get_vit_lr_decay_rate": _LAYER_DECAY,
    "modeling.backbone.regnet.AnyNet": _REGNET,
    "modeling.backbone.regnet.ResBottleneckBlock": _REGNET,
    "modeling.backbone.regnet.SimpleStem": _REGNET,
    "modeling.backbone.utils.add_decomposed_rel_pos": _ATTENTION,
    "modeling.backbone.utils.get_abs_pos": _ATTENTION,
    "modeling.backbone.utils.get_rel_pos": _ATTENTION,
    "modeling.backbone.utils.window_partition": _ATTENTION,
    "modeling.backbone.utils.window_unpartition": _ATTENTION,
    "modeling.backbone.vit.get_vit_lr_decay_rate": _LAYER_DECAY,
    "modeling.get_vit_lr_decay_rate": _LAYER_DECAY,
    "data.datasets.builtin_meta.ADE20K_SEM_SEG_CATEGORIES": _ADE20K,
    "checkpoint.c2_model_loading.convert_basic_c2_names": _CAFFE2_WEIGHTS,
    "checkpoint.c2_model_loading.convert_c2_detectron_names": _CAFFE2_WEIGHTS,
    "checkpoint.catalog.ModelCatalog": _CATALOG,
    "checkpoint.catalog.ModelCatalogHandler": _CATALOG,
    "data.benchmark.DataLoaderBenchmark": _BENCHMARK,
    "data.datasets.builtin.register_all_ade20k": _BUILTIN,
    "data.datasets.builtin.register_all_cityscapes": _BUILTIN,
    "data.datasets.builtin.register_all_cityscapes_panoptic": _BUILTIN,
    "data.datasets.builtin.register_all_coco": _BUILTIN,
    "data.datasets.builtin.register_all_lvis": _BUILTIN,
    "data.datasets.builtin.register_all_pascal_voc": _BUILTIN,
    "data.datasets.cityscapes_panoptic.register_all_cityscapes_panoptic": _BUILTIN,
    "data.datasets.lvis_v0_5_categories.LVIS_CATEGORIES": _LVIS,
    "data.datasets.lvis_v1_categories.LVIS_CATEGORIES": _LVIS,
    "evaluation.coco_evaluation._evaluate_box_proposals": _RECALL,
    "layers.mask_ops.paste_mask_in_image_old": _PASTE,
    "model_zoo.model_zoo._ModelZooUrls": _ZOO,
    "modeling.roi_heads.fast_rcnn.FastRCNNOutputs": _OUTPUTS,
    "utils.testing.convert_scripted_instances": _TORCHSCRIPT,
    "utils.testing.has_dynamic_axes": _TORCHSCRIPT,
    "utils.testing.reload_lazy_config": _LAZY,
    "utils.testing.reload_script_model": _TORCHSCRIPT,
    "config.LazyCall": _LAZY,
    "config.LazyConfig": _LAZY,
    "config.instantiate": _LAZY,
    "config.lazy.LazyCall": _LAZY,
    "config.lazy.LazyConfig": _LAZY,
    "config.instantiate.instantiate": _LAZY,
    "config.instantiate.dump_dataclass": _LAZY,
    "config.global_cfg": _GLOBAL,
    "config.set_global_cfg": _GLOBAL,
    "config.config.global_cfg": _GLOBAL,
    "config.config.set_global_cfg": _GLOBAL,
    "export.Caffe2Model": _CAFFE2,
    "export.Caffe2Tracer": _CAFFE2,
    "export.add_export_config": _CAFFE2,
    "export.export_caffe2_model": _CAFFE2,
    "export.TracingAdapter": _TORCHSCRIPT,
    "export.scripting_with_instances": _TORCHSCRIPT,
    "export.dump_torchscript_IR": _TORCHSCRIPT,
    "export.STABLE_ONNX_OPSET_VERSION": _CAFFE2,
    "modeling.MMDetBackbone": _MMDET,
    "modeling.MMDetDetector": _MMDET,
    "modeling.mmdet_wrapper.MMDetBackbone": _MMDET,
    "modeling.mmdet_wrapper.MMDetDetector": _MMDET,
}

# Modules of which nothing is here: whatever is imported from them, or from modules in them, says so
# when it is used.
LEFT_OUT_PACKAGES: dict[str, str] = {
    "_C": _COMPILED,
    "export.api": _CAFFE2,
    "export.c10": _CAFFE2,
    "export.caffe2_export": _CAFFE2,
    "export.caffe2_inference": _CAFFE2,
    "export.caffe2_modeling": _CAFFE2,
    "export.caffe2_patch": _CAFFE2,
    "export.flatten": _TORCHSCRIPT,
    "export.shared": _CAFFE2,
    "export.torchscript": _TORCHSCRIPT,
    "export.torchscript_patch": _TORCHSCRIPT,
    "tracking": "detectron2.tracking is left out: track boxes with a package made for it",
}


# Modules that are asked for names that they lack.
_MODULES = {*ROOMS, *(name.rpartition(".")[0] for name in (*RENAMED, *LEFT_OUT))}


class LeftOutError(UserError, NotImplementedError):
    """Something of Detectron2 is used that detkit leaves out on purpose."""


class _LeftOut(type):
    """The class of a class that cannot be used, only imported and derived from."""

    error: Exception

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise cls.error

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise cls.error


def create_dummy_class(klass: str, dependency: str | Sequence[str], message: str = "") -> Any:
    """Return a class, or function, whose use is an ImportError: what it needs is not installed.

    Args:
        klass: Its name.
        dependency: The missing packages.
        message: Added to the error.
    """
    names = dependency if isinstance(dependency, str) else ", ".join(dependency)
    error = ImportError(f"{klass} needs {names}, which cannot be imported. {message}".strip())
    return _LeftOut(klass, (), {"error": error})


def answer(module: str, name: str) -> Any:
    """Return what a module of Detectron2 has under a name.

    Args:
        module: The module's path below the package, such as `utils.visualizer`.
        name: The name in it.

    Raises:
        AttributeError: detkit has no answer.
    """
    loader = getattr(sys.modules.get(f"detkit.{module}"), "__loader__", None)
    if name == "__all__" and isinstance(loader, _EmptyModule):
        return names_of(module)
    if not name.startswith("__"):
        full_name = f"{module}.{name}"
        if full_name in RENAMED:
            room, _, own_name = RENAMED[full_name].rpartition(".")
            is_foreign = room.startswith(("torch", "pycocotools"))
            room = room if is_foreign else f"detkit.{room}"
            return getattr(importlib.import_module(room), own_name)
        for room in ROOMS.get(module, ()):
            found = vars(importlib.import_module(f"detkit.{room}"))
            if name in found:
                return found[name]
        sentence = LEFT_OUT.get(full_name) or why_left_out(module)
        if sentence:
            error = LeftOutError(f"detectron2.{full_name}: {sentence}")
            return _LeftOut(name, (), {"error": error})
    raise AttributeError(f"module 'detkit.{module}' has no attribute {name!r}")


def why_left_out(module: str) -> str:
    """Return the sentence about a module of Detectron2 of which nothing is here, else ""."""
    parts = module.split(".")
    paths = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
    return next((LEFT_OUT_PACKAGES[path] for path in paths if path in LEFT_OUT_PACKAGES), "")


def names_of(module: str) -> list[str]:
    """Return the names of a module of Detectron2 that detkit's module of that path lacks."""
    names = {full.removeprefix(f"{module}.") for full in (*RENAMED, *LEFT_OUT)}
    for room in ROOMS.get(module, ()):
        found = vars(importlib.import_module(f"detkit.{room}"))
        own = [k for k, v in found.items() if getattr(v, "__module__", "") == f"detkit.{room}"]
        # A list may have been made longer by names that the room itself has from elsewhere.
        names |= set(found.get("__all__", own)) & set(found)
    return sorted(name for name in names if "." not in name and not name.startswith("_"))


class _CallableModule(ModuleType):
    """A module that hides a function of its name, which is left out."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise LeftOutError(f"{self.__name__}: {LEFT_OUT[self.__name__.partition('.')[2]]}")


class _EmptyModule(Loader):
    """Makes a module that has nothing of its own."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return _CallableModule(spec.name) if spec.name.partition(".")[2] in LEFT_OUT else None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "A module of Detectron2, whose names live elsewhere in detkit."


class _Finder(MetaPathFinder):
    """Lets modules answer names of Detectron2 that they lack."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        is_left_out = bool(why_left_out(name))
        if package != "detkit" or not (name in _MODULES or is_left_out):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            spec = ModuleSpec(fullname, _EmptyModule(), is_package=is_left_out)
        assert spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # Before the module runs: what it imports may ask it for names already.
            module.__dict__["__getattr__"] = functools.partial(answer, name)
            run(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def answer_detectron2_names() -> None:
    """Let detkit's modules answer the names of Detectron2's modules; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
