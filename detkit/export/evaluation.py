"""Exported models scored by the evaluators that score a model in training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from detkit.config import CfgNode, find_architecture
from detkit.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detkit.data.build import MODEL_NAMES
from detkit.evaluation import build_evaluator, inference_on_dataset
from detkit.export.runtime import Detections, ExportedPredictor, ModelMetadata
from detkit.structures import Boxes, Instances, ModelInput, ModelOutput
from detkit.utils.errors import ConfigError


def describe_model(cfg: CfgNode, metadata: ModelMetadata) -> None:
    """Set what loaders and evaluators ask a config about the model, as an exported one says it.

    Args:
        cfg: Changed.
        metadata: Of the model.
    """
    cfg.MODEL.META_ARCHITECTURE = metadata.architecture
    cfg.MODEL.MASK_ON = "masks" in metadata.outputs
    cfg.MODEL.KEYPOINT_ON = "keypoints" in metadata.outputs
    cfg.MODEL.LOAD_PROPOSALS = False
    if "max_detections" in metadata.document:
        cfg.TEST.DETECTIONS_PER_IMAGE = metadata.max_detections
    architecture = find_architecture(metadata.architecture)
    if architecture is not None:
        counts = [
            (architecture.num_classes, metadata.thing_classes),
            (architecture.num_stuff_classes, metadata.stuff_classes),
            ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", metadata.keypoint_names),
        ]
        for key, names in counts:
            if key and names:
                cfg.merge_from_list([key, len(names)])


def evaluate_exported(
    predictor: ExportedPredictor, cfg: CfgNode, *, batch_size: int = 1
) -> dict[str, Any]:
    """Evaluate an exported model on each data set of DATASETS.TEST.

    Args:
        predictor: The model.
        cfg: That of the training run, or one that `describe_model` has changed.
        batch_size: Images that run together.

    Returns:
        Name of the data set -> task -> metric -> number.

    Raises:
        ConfigError: DATASETS.TEST is empty, or names a data set that is not known or that is
            scored by what the model does not predict.
        DataError: A data set has other classes than the model.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("there is nothing to evaluate on: give --dataset, or DATASETS.TEST")
    # By the predictor's rule: it turns BGR into RGB where the model wants that.
    order = predictor.metadata.input_format
    mapper = DatasetMapper(
        is_train=False, augmentations=[], image_format="BGR" if order == "RGB" else order
    )
    results = {}
    for name in cfg.DATASETS.TEST:
        # The loader refuses a data set whose classes are others, as with a checkpoint of a run.
        for key, model_key in MODEL_NAMES.items():
            if names := getattr(predictor.metadata, key):
                MetadataCatalog.get(name).set(**{model_key: list(names)})
        kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
        if kind in ("coco", "pascal_voc", "lvis") and "boxes" not in predictor.metadata.outputs:
            raise ConfigError(
                f"data set {name!r} is scored by objects, and the model finds none: its outputs are"
                f" {', '.join(predictor.metadata.outputs)}"
            )
        # The loader first: class names of a COCO file are known once it has been read.
        loader = build_detection_test_loader(cfg, name, mapper=mapper, batch_size=batch_size)
        evaluator = build_evaluator(cfg, name)
        results[name] = inference_on_dataset(as_model(predictor), loader, evaluator)
    return results


def headline(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the first metric of each task, such as `{"bbox AP": 40.2}`.

    Example:
        >>> headline({"bbox": {"AP": 40.2, "AP50": 60.1}, "my_val": {"sem_seg": {"mIoU": 71.0}}})
        {'bbox AP': 40.2, 'my_val sem_seg mIoU': 71.0}
    """
    numbers: dict[str, float] = {}
    for name, metrics in results.items():
        first = next(iter(metrics), None)
        if first is None:
            continue
        if isinstance(metrics[first], Mapping):
            numbers |= {f"{name} {key}": value for key, value in headline(metrics).items()}
        else:
            numbers[f"{name} {first}"] = metrics[first]
    return numbers


def as_model(
    predictor: ExportedPredictor,
) -> Callable[[Sequence[ModelInput]], list[ModelOutput]]:
    """Return a function that evaluators take for a model: from inputs to outputs with tensors.

    The images of its inputs have the size of their files.
    """

    def model(batched_inputs: Sequence[ModelInput]) -> list[ModelOutput]:
        images = [x["image"].permute(1, 2, 0).numpy() for x in batched_inputs]
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        found = predictor.predict(images)
        return [_with_tensors(x, size) for x, size in zip(found, sizes, strict=True)]

    return model


def _with_tensors(found: dict[str, Any], size: tuple[int, int]) -> ModelOutput:
    output: ModelOutput = {}
    if "instances" in found:
        output["instances"] = _instances(found["instances"], size)
    if "proposals" in found:
        proposals: Detections = found["proposals"]
        output["proposals"] = Instances(
            size,
            proposal_boxes=Boxes(torch.from_numpy(proposals.pred_boxes)),
            objectness_logits=torch.from_numpy(proposals.scores),
        )
    if "sem_seg" in found:
        output["sem_seg"] = torch.from_numpy(np.ascontiguousarray(found["sem_seg"]))
    if "panoptic_seg" in found:
        segments, infos = found["panoptic_seg"]
        output["panoptic_seg"] = (torch.from_numpy(segments), infos)
    return output


def _instances(found: Detections, size: tuple[int, int]) -> Instances:
    fields = {name: torch.from_numpy(value) for name, value in found.get_fields().items()}
    return Instances(size, **{**fields, "pred_boxes": Boxes(fields["pred_boxes"])})
