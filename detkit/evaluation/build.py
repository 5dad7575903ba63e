"""Which evaluator scores a data set."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

from detkit.config import CfgNode
from detkit.data import DatasetCatalog, MetadataCatalog, register_declared_datasets
from detkit.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detkit.evaluation.coco import COCOEvaluator
from detkit.evaluation.evaluator import DatasetEvaluator, DatasetEvaluators
from detkit.evaluation.lvis_evaluation import LVISEvaluator
from detkit.evaluation.panoptic import COCOPanopticEvaluator
from detkit.evaluation.pascal_voc_evaluation import PascalVOCDetectionEvaluator
from detkit.evaluation.sem_seg_evaluation import SemSegEvaluator
from detkit.structures import ImageRecord
from detkit.utils.image import read_label_map
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """Build the evaluator of a data set: the `evaluator_type` of its metadata, by default "coco".

    "coco" and "pascal_voc" work on a data set of any format: to score one by another metric, set
    its `evaluator_type` in `MetadataCatalog`, or construct the evaluator yourself.

    Args:
        cfg: For `TEST`, `OUTPUT_DIR`, `DATASETS`, and whether the model predicts masks and
            keypoints.
        dataset_name: A registered data set.
        output_dir: Where the evaluator writes detections. None takes `OUTPUT_DIR/inference`, and a
            folder of the data set's name in it where `DATASETS.TEST` names several.

    Raises:
        ValueError: There is no evaluator of that type, or the data set cannot be scored.
    """
    register_declared_datasets(cfg.DATASETS.REGISTER)
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    output_dir = _default_output_dir(cfg, dataset_name) if output_dir is None else output_dir
    if evaluator_type not in _BUILDERS:
        raise ValueError(
            f"data set {dataset_name!r} asks for an evaluator of type {evaluator_type!r}; there are"
            f" {', '.join(map(repr, _BUILDERS))}.{did_you_mean(str(evaluator_type), _BUILDERS)}"
        )
    if evaluator_type not in _BY_COCOS_METRIC:
        for key in ("IOU_THRESHOLDS", "AREA_RANGES"):
            if cfg.TEST[key]:
                message = "TEST.%s is set, but has no effect on %r: %s has its own"
                logger.warning(message, key, dataset_name, evaluator_type)
    # Read once for all: COCO's validation set takes seconds.
    records = [] if evaluator_type in _WITHOUT_RECORDS else DatasetCatalog.get(dataset_name)
    return _BUILDERS[evaluator_type](_Request(cfg, dataset_name, output_dir, records))


@dataclass(frozen=True)
class _Request:
    cfg: CfgNode
    dataset_name: str
    output_dir: str
    records: list[ImageRecord]


def _default_output_dir(cfg: CfgNode, dataset_name: str) -> str:
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    return str(folder / dataset_name if len(cfg.DATASETS.TEST) > 1 else folder)


def _coco(request: _Request) -> DatasetEvaluator:
    cfg = request.cfg
    return COCOEvaluator(
        request.dataset_name,
        _tasks(cfg, COCOEvaluator.scored_tasks),
        output_dir=request.output_dir,
        max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        keypoint_max_dets_per_image=cfg.TEST.KEYPOINT_DETECTIONS_PER_IMAGE,
        iou_thresholds=cfg.TEST.IOU_THRESHOLDS,
        area_ranges=cfg.TEST.AREA_RANGES,
        records=request.records,
    )


def _tasks(cfg: CfgNode, scored_tasks: tuple[str, ...]) -> list[str]:
    switches = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return [task for task in scored_tasks if switches[task]]


def _lvis(request: _Request) -> DatasetEvaluator:
    return LVISEvaluator(
        request.dataset_name,
        _tasks(request.cfg, LVISEvaluator.scored_tasks),
        output_dir=request.output_dir,
        max_dets_per_image=request.cfg.TEST.DETECTIONS_PER_IMAGE,
        records=request.records,
    )


def _pascal_voc(request: _Request) -> DatasetEvaluator:
    return PascalVOCDetectionEvaluator(
        request.dataset_name, output_dir=request.output_dir, records=request.records
    )


def _sem_seg(request: _Request) -> DatasetEvaluator:
    return SemSegEvaluator(
        request.dataset_name,
        output_dir=request.output_dir,
        sem_seg_loading_fn=functools.partial(
            read_label_map, max_pixels=request.cfg.INPUT.MAX_IMAGE_PIXELS
        ),
        records=request.records,
    )


def _coco_panoptic(request: _Request) -> DatasetEvaluator:
    """Score segments, and pixels and instances where the data set has them: things and stuff joined
    have neither.
    """
    evaluators: list[DatasetEvaluator] = []
    if any("sem_seg_file_name" in record for record in request.records):
        evaluators.append(_sem_seg(request))
    if any("annotations" in record for record in request.records):
        evaluators.append(_coco(request))
    panoptic = COCOPanopticEvaluator(
        request.dataset_name,
        request.output_dir,
        records=request.records,
        max_image_pixels=request.cfg.INPUT.MAX_IMAGE_PIXELS,
    )
    return DatasetEvaluators([*evaluators, panoptic])


def _cityscapes_instance(request: _Request) -> DatasetEvaluator:
    return CityscapesInstanceEvaluator(
        request.dataset_name, max_image_pixels=request.cfg.INPUT.MAX_IMAGE_PIXELS
    )


def _cityscapes_sem_seg(request: _Request) -> DatasetEvaluator:
    return CityscapesSemSegEvaluator(
        request.dataset_name, max_image_pixels=request.cfg.INPUT.MAX_IMAGE_PIXELS
    )


_BY_COCOS_METRIC = ("coco", "coco_panoptic_seg")
# Cityscapes' ground truth is its pngs.
_WITHOUT_RECORDS = ("cityscapes_instance", "cityscapes_sem_seg")
_BUILDERS = {
    "coco": _coco,
    "pascal_voc": _pascal_voc,
    "lvis": _lvis,
    "sem_seg": _sem_seg,
    "coco_panoptic_seg": _coco_panoptic,
    "cityscapes_instance": _cityscapes_instance,
    "cityscapes_sem_seg": _cityscapes_sem_seg,
}
