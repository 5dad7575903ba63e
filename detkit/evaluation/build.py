"""Which evaluator scores a data set."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from detkit.config import CfgNode
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detkit.evaluation.coco import COCOEvaluator, RotatedCOCOEvaluator
from detkit.evaluation.evaluator import DatasetEvaluator, DatasetEvaluators
from detkit.evaluation.lvis_evaluation import LVISEvaluator
from detkit.evaluation.panoptic import COCOPanopticEvaluator
from detkit.evaluation.pascal_voc_evaluation import PascalVOCDetectionEvaluator
from detkit.evaluation.sem_seg_evaluation import SemSegEvaluator
from detkit.structures import ImageRecord
from detkit.utils.errors import ConfigError
from detkit.utils.image import read_label_map
from detkit.utils.text import did_you_mean, file_stem

logger = logging.getLogger(__name__)


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_dir: str | None = None
) -> DatasetEvaluator:
    """Build the evaluator of a data set: the `evaluator_type` of its metadata, by default "coco".

    "coco" and "pascal_voc" work on a data set of any format: to score one by another metric, set
    its `evaluator_type` in `MetadataCatalog`, or construct the evaluator yourself.

    Args:
        cfg: `TEST`, `OUTPUT_DIR`, `DATASETS`, and whether the model predicts masks and keypoints.
        dataset_name: A registered data set; `detkit.engine.prepare` and the loaders register
            those that a config declares.
        output_dir: Where the evaluator writes detections. None for `OUTPUT_DIR/inference`, and a
            folder of the data set's name in it if `DATASETS.TEST` names several.

    Raises:
        ConfigError: There is no evaluator of that type.
        ValueError: The data set cannot be scored.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if output_dir is None:
        folder = Path(cfg.OUTPUT_DIR) / "inference"
        if len(cfg.DATASETS.TEST) > 1:
            folder /= file_stem(dataset_name)
        output_dir = str(folder)
    if evaluator_type not in _BUILDERS:
        raise ConfigError(
            f"data set {dataset_name!r} asks for an evaluator of type {evaluator_type!r}; there are"
            f" {', '.join(map(repr, _BUILDERS))}.{did_you_mean(str(evaluator_type), _BUILDERS)}"
        )
    # Panoptic data sets may have instances, which are scored by COCO's metric.
    if evaluator_type not in ("coco", "coco_panoptic_seg"):
        for key in ("IOU_THRESHOLDS", "AREA_RANGES"):
            if cfg.TEST[key]:
                message = "TEST.%s is set, but has no effect on %r: %s has its own"
                logger.warning(message, key, dataset_name, evaluator_type)
    # Cityscapes' ground truth is its pngs. Other records are read once for all evaluators: COCO's
    # validation set takes seconds.
    needs_records = evaluator_type not in ("cityscapes_instance", "cityscapes_sem_seg")
    records = DatasetCatalog.get(dataset_name) if needs_records else []
    return _BUILDERS[evaluator_type](_Request(cfg, dataset_name, output_dir, records))


@dataclass(frozen=True)
class _Request:
    cfg: CfgNode
    dataset_name: str
    output_dir: str
    records: list[ImageRecord]


def _coco(request: _Request) -> DatasetEvaluator:
    test = request.cfg.TEST
    rotated = request.cfg.MODEL.ROTATED_BOXES
    evaluator_class = RotatedCOCOEvaluator if rotated else COCOEvaluator
    return evaluator_class(
        request.dataset_name,
        _tasks(request.cfg, evaluator_class.scored_tasks),
        output_dir=request.output_dir,
        max_dets_per_image=_limit(test.DETECTIONS_PER_IMAGE),
        kpt_oks_sigmas=test.KEYPOINT_OKS_SIGMAS,
        keypoint_max_dets_per_image=test.KEYPOINT_DETECTIONS_PER_IMAGE,
        iou_thresholds=test.IOU_THRESHOLDS,
        area_ranges=test.AREA_RANGES,
        records=request.records,
    )


def _limit(detections_per_image: int) -> int | None:
    """Return a limit of detections for scoring: that of the protocol where models keep all."""
    return detections_per_image if detections_per_image > 0 else None


def _tasks(cfg: CfgNode, scored_tasks: tuple[str, ...]) -> list[str]:
    switches = {"bbox": True, "segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return [task for task in scored_tasks if switches[task]]


def _lvis(request: _Request) -> DatasetEvaluator:
    return LVISEvaluator(
        request.dataset_name,
        _tasks(request.cfg, LVISEvaluator.scored_tasks),
        output_dir=request.output_dir,
        max_dets_per_image=_limit(request.cfg.TEST.DETECTIONS_PER_IMAGE),
        records=request.records,
    )


def _pascal_voc(request: _Request) -> DatasetEvaluator:
    return PascalVOCDetectionEvaluator(
        request.dataset_name, output_dir=request.output_dir, records=request.records
    )


def _sem_seg(request: _Request) -> DatasetEvaluator:
    max_pixels = request.cfg.INPUT.MAX_IMAGE_PIXELS
    return SemSegEvaluator(
        request.dataset_name,
        output_dir=request.output_dir,
        sem_seg_loading_fn=functools.partial(read_label_map, max_pixels=max_pixels),
        records=request.records,
    )


def _coco_panoptic(request: _Request) -> DatasetEvaluator:
    evaluators: list[DatasetEvaluator] = []
    # Data sets with things and stuff joined have neither label maps nor instances.
    if any("sem_seg_file_name" in record for record in request.records):
        evaluators.append(_sem_seg(request))
    if any("annotations" in record for record in request.records):
        evaluators.append(_coco(request))
    evaluators.append(
        COCOPanopticEvaluator(
            request.dataset_name,
            request.output_dir,
            records=request.records,
            max_image_pixels=request.cfg.INPUT.MAX_IMAGE_PIXELS,
        )
    )
    return DatasetEvaluators(evaluators)


def _cityscapes(
    evaluator_class: type[CityscapesInstanceEvaluator | CityscapesSemSegEvaluator],
    request: _Request,
) -> DatasetEvaluator:
    return evaluator_class(
        request.dataset_name, max_image_pixels=request.cfg.INPUT.MAX_IMAGE_PIXELS
    )


_BUILDERS: dict[str, Callable[[_Request], DatasetEvaluator]] = {
    "coco": _coco,
    "pascal_voc": _pascal_voc,
    "lvis": _lvis,
    "sem_seg": _sem_seg,
    "coco_panoptic_seg": _coco_panoptic,
    "cityscapes_panoptic_seg": _coco_panoptic,
    "cityscapes_instance": functools.partial(_cityscapes, CityscapesInstanceEvaluator),
    "cityscapes_sem_seg": functools.partial(_cityscapes, CityscapesSemSegEvaluator),
}
