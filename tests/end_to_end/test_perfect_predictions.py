"""Ground truth of the generated shapes as predictions, through the evaluators that the data sets ask for."""

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util

from detkit.config import get_cfg
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.evaluation import build_evaluator
from detkit.structures import Boxes, BoxMode, Instances
from detkit.utils.colormap import rgb2id
from detkit.utils.image import read_image, read_label_map


def perfect_instances(record):
    size, annotations = (record["height"], record["width"]), record["annotations"]
    boxes = [
        BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations
    ]
    masks = [
        mask_util.decode(mask_util.frPyObjects(a["segmentation"], *size)).any(axis=2)
        for a in annotations
    ]
    return Instances(
        size,
        pred_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)),
        scores=torch.ones(len(annotations)),
        pred_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        pred_masks=torch.from_numpy(np.array(masks).reshape(-1, *size)),
        pred_keypoints=torch.tensor([a["keypoints"] for a in annotations])
        .float()
        .reshape(len(annotations), -1, 3),
    )


def perfect_pixels(record, num_classes):
    labels = torch.from_numpy(read_label_map(record["sem_seg_file_name"]).astype(np.int64))
    return (labels == torch.arange(num_classes)[:, None, None]).float()


def perfect_segments(name, record):
    """From the joined form of the same data set."""
    joined = {r["image_id"]: r for r in DatasetCatalog.get(name.removesuffix("_separated"))}[
        record["image_id"]
    ]
    ids = rgb2id(read_image(joined["pan_seg_file_name"], "RGB"))
    is_separated = name.endswith("_separated")
    num_things = len(MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id)
    segments = []
    for segment in joined["segments_info"]:
        category = segment["category_id"]
        if is_separated and not segment["isthing"]:
            category += 1 - num_things
        segments.append(
            {"id": segment["id"], "isthing": segment["isthing"], "category_id": category}
        )
    return torch.from_numpy(ids), segments


@pytest.mark.parametrize(
    ("suffix", "tasks"),
    [
        pytest.param("", ["bbox", "segm", "keypoints"], id="instances"),
        pytest.param("_sem_seg", ["sem_seg"], id="pixels"),
        pytest.param("_panoptic", ["panoptic_seg"], id="joined"),
        pytest.param(
            "_panoptic_separated", ["sem_seg", "bbox", "segm", "panoptic_seg"], id="separated"
        ),
    ],
)
def test_ground_truth_of_the_shapes_scores_100(suffix, tasks, datasets, monkeypatch, tmp_path):
    monkeypatch.setenv("DETKIT_DATASETS", str(datasets))
    name = f"shapes_val{suffix}"
    records = DatasetCatalog.get(name)
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = "segm" in tasks
    cfg.MODEL.KEYPOINT_ON = "keypoints" in tasks
    if "keypoints" in tasks:
        cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.05] * len(MetadataCatalog.get(name).keypoint_names)
    evaluator = build_evaluator(cfg, name, str(tmp_path))
    evaluator.reset()
    for record in records:
        output = {}
        if "bbox" in tasks:
            output["instances"] = perfect_instances(record)
        if "sem_seg" in tasks:
            output["sem_seg"] = perfect_pixels(record, len(MetadataCatalog.get(name).stuff_classes))
        if "panoptic_seg" in tasks:
            output["panoptic_seg"] = perfect_segments(name, record)
        evaluator.process(
            [{key: record[key] for key in ("image_id", "file_name") if key in record}], [output]
        )
    results = evaluator.evaluate()
    assert list(results) == tasks
    for task, metrics in results.items():
        known = {metric: value for metric, value in metrics.items() if not math.isnan(value)}
        assert known == {metric: pytest.approx(100) for metric in known}, task
        assert {
            "bbox": "AP",
            "segm": "AP",
            "keypoints": "AP",
            "sem_seg": "mIoU",
            "panoptic_seg": "PQ",
        }[task] in known
