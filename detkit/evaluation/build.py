"""Which evaluator scores a data set."""

from __future__ import annotations

from pathlib import Path

from detkit.config import CfgNode
from detkit.data import MetadataCatalog, register_declared_datasets
from detkit.evaluation.coco_evaluation import COCOEvaluator
from detkit.evaluation.evaluator import DatasetEvaluator
from detkit.evaluation.pascal_voc_evaluation import PascalVOCDetectionEvaluator
from detkit.utils.near_miss import did_you_mean

_EVALUATOR_TYPES = ("coco", "pascal_voc")


def build_evaluator(cfg: CfgNode, dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """Give the evaluator that a data set's metadata asks for by ``evaluator_type``: "coco" (default) or "pascal_voc".

    Either works on a data set of any format: to score one by the other metric, set its ``evaluator_type`` in
    ``MetadataCatalog``, or construct the evaluator yourself.

    Args:
        cfg: For ``TEST.DETECTIONS_PER_IMAGE``, ``OUTPUT_DIR`` and ``DATASETS``.
        dataset_name: A registered data set.
        output_dir: Where the evaluator writes detections. None takes ``OUTPUT_DIR/inference``, and a folder of the data
            set's name in it where ``DATASETS.TEST`` names several.

    Raises:
        ValueError: If there is no evaluator of that type, or the data set cannot be scored.
    """
    register_declared_datasets(cfg.DATASETS.REGISTER)
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    output_dir = _default_output_dir(cfg, dataset_name) if output_dir is None else output_dir
    if evaluator_type == "coco":
        max_dets = cfg.TEST.DETECTIONS_PER_IMAGE
        return COCOEvaluator(dataset_name, output_dir=output_dir, max_dets_per_image=max_dets)
    if evaluator_type == "pascal_voc":
        return PascalVOCDetectionEvaluator(dataset_name, output_dir=output_dir)
    raise ValueError(
        f"data set {dataset_name!r} asks for an evaluator of type {evaluator_type!r}; there are "
        f"{', '.join(map(repr, _EVALUATOR_TYPES))}.{did_you_mean(str(evaluator_type), _EVALUATOR_TYPES)}"
    )


def _default_output_dir(cfg: CfgNode, dataset_name: str) -> str:
    folder = Path(cfg.OUTPUT_DIR) / "inference"
    return str(folder / dataset_name if len(cfg.DATASETS.TEST) > 1 else folder)
