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
    "config.config": ("config", "config.defaults"),
    "data.build": ("data", "data.dataset_dicts", "data.training_stream"),
    "data.common": ("data.wrappers", "data.training_stream"),
    "data.datasets": ("data.datasets.lvis",),
    "data.datasets.cityscapes_panoptic": ("data.datasets.cityscapes",),
    "data.datasets.coco": ("data.datasets.coco_export", "data.datasets.sem_seg"),
    "data.datasets.register_coco": ("data.datasets",),
    "data.samplers.grouped_batch_sampler": ("data.samplers",),
    "data.transforms.augmentation": ("data.transforms",),
    "data.transforms.augmentation_impl": ("data.transforms",),
    "data.transforms.transform": ("data.transforms",),
    "engine.defaults": ("engine",),
    "engine.hooks": ("engine.train_loop",),
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
    "layers.blocks": ("layers",),
    "layers.mask_ops": ("structures.mask_ops", "layers"),
    "layers.nms": ("layers",),
    "layers.roi_align": ("layers",),
    "layers.roi_align_rotated": ("layers",),
    "layers.rotated_boxes": ("structures",),
    "layers.shape_spec": ("layers",),
    "layers.wrappers": ("layers",),
    "modeling.backbone.fpn": ("modeling.backbone",),
    "modeling.backbone.resnet": ("modeling.backbone.resnet_blocks", "modeling.backbone"),
    "modeling.meta_arch.semantic_seg": ("modeling.meta_arch",),
    "modeling.proposal_generator": ("modeling.proposal_generator.rpn",),
    "modeling.proposal_generator.proposal_utils": ("modeling.proposal_generator.proposals",),
    "modeling.proposal_generator.rpn": ("modeling.proposal_generator",),
    "modeling.proposal_generator.rrpn": ("modeling.proposal_generator",),
    "modeling.roi_heads.box_head": ("modeling.roi_heads",),
    "modeling.roi_heads.keypoint_head": ("modeling.roi_heads",),
    "modeling.roi_heads.mask_head": ("modeling.roi_heads",),
    "modeling.roi_heads.roi_heads": ("modeling.roi_heads",),
    "modeling.roi_heads.rotated_fast_rcnn": ("modeling.roi_heads",),
    "solver": ("solver.lr_scheduler",),
    "solver.build": ("solver.param_groups",),
    "structures.boxes": ("structures",),
    "structures.masks": ("structures", "structures.mask_formats"),
    "utils.collect_env": ("utils.env",),
    "utils.visualizer": ("visualization", "visualization.visualizer"),
    "utils.video_visualizer": ("visualization",),
}

# A name of Detectron2 -> the same thing under its name here.
RENAMED: dict[str, str] = {}

_LAZY = (
    "LazyConfig is left out: settings are YAML (get_cfg, merge_from_file), its zoo comes as YAML"
)
_TORCHSCRIPT = "TorchScript is left out, which torch no longer develops: use ONNX or torch.export"
_CAFFE2 = "Caffe2 is left out, which torch no longer contains: use ONNX or torch.export"
_VERSION_1 = "configs of version 1, from before 2019, are left out: write the keys of version 2"
_GLOBAL = "the global config is left out: pass cfg to the function that needs it"
_MMDET = "the wrapper of MMDetection's models is left out: load its weights into a model of the zoo"

# What is missing on purpose: it can be imported, and this is what its use says.
LEFT_OUT: dict[str, str] = {
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
    "config.upgrade_config": _VERSION_1,
    "config.downgrade_config": _VERSION_1,
    "config.compat.upgrade_config": _VERSION_1,
    "config.compat.downgrade_config": _VERSION_1,
    "evaluation.fast_eval_api.COCOeval_opt": (
        "the compiled COCO scorer is left out: COCOEvaluator scores with faster-coco-eval"
    ),
    "export.Caffe2Model": _CAFFE2,
    "export.Caffe2Tracer": _CAFFE2,
    "export.add_export_config": _CAFFE2,
    "export.export_caffe2_model": _CAFFE2,
    "export.TracingAdapter": _TORCHSCRIPT,
    "export.scripting_with_instances": _TORCHSCRIPT,
    "export.dump_torchscript_IR": _TORCHSCRIPT,
    "export.STABLE_ONNX_OPSET_VERSION": _CAFFE2,
    "export.flatten.TracingAdapter": _TORCHSCRIPT,
    "export.flatten.flatten_to_tuple": _TORCHSCRIPT,
    "modeling.MMDetBackbone": _MMDET,
    "modeling.MMDetDetector": _MMDET,
    "modeling.mmdet_wrapper.MMDetBackbone": _MMDET,
    "modeling.mmdet_wrapper.MMDetDetector": _MMDET,
}

# Packages of which nothing is here: whatever is imported from them says so when it is used.
LEFT_OUT_PACKAGES: dict[str, str] = {
    "tracking": "detectron2.tracking is left out: track boxes with a package made for it",
}


# Modules that are asked for names that they lack.
_MODULES = {*ROOMS, *(name.rpartition(".")[0] for name in (*RENAMED, *LEFT_OUT))}


class LeftOutError(UserError, NotImplementedError):
    """Something of Detectron2 is used that detkit leaves out on purpose."""


class _LeftOut(type):
    """The class of a class that cannot be used, only imported and derived from."""

    sentence: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise LeftOutError(cls.sentence)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise LeftOutError(cls.sentence)


def answer(module: str, name: str) -> Any:
    """Return what a module of Detectron2 has under a name.

    Args:
        module: The module's path below the package, such as `utils.visualizer`.
        name: The name in it.

    Raises:
        AttributeError: detkit has no answer.
    """
    if not name.startswith("__"):
        full_name = f"{module}.{name}"
        if full_name in RENAMED:
            room, _, own_name = RENAMED[full_name].rpartition(".")
            return getattr(importlib.import_module(f"detkit.{room}"), own_name)
        for room in ROOMS.get(module, ()):
            found = vars(importlib.import_module(f"detkit.{room}"))
            if name in found:
                return found[name]
        sentence = LEFT_OUT.get(full_name) or LEFT_OUT_PACKAGES.get(module.partition(".")[0])
        if sentence:
            return _LeftOut(name, (), {"sentence": f"detectron2.{full_name}: {sentence}"})
    raise AttributeError(f"module 'detkit.{module}' has no attribute {name!r}")


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
        is_left_out = name.partition(".")[0] in LEFT_OUT_PACKAGES
        if package != "detkit" or not (name in _MODULES or is_left_out):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            is_package = is_left_out or name in ("export", "tracking")
            spec = ModuleSpec(fullname, _EmptyModule(), is_package=is_package)
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
