"""Small data sets, and predictions on them."""

import itertools

import numpy as np
import pytest
import torch

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.structures import Boxes, BoxMode, Instances

_counter = itertools.count()


@pytest.fixture
def register():
    """A function that registers records under a new name, for the time of a test, and gives the name."""
    names = []

    def add(records, class_names=("cat", "dog"), **metadata):
        names.append(f"evaluation_test_{next(_counter)}")
        DatasetCatalog.register(names[-1], lambda: records)
        MetadataCatalog.get(names[-1]).set(thing_classes=list(class_names), **metadata)
        return names[-1]

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def make_record():
    """A function that gives the record of an image with XYXY boxes: (box, class id) or (box, class id, extra keys)."""

    def make(image_id, *objects):
        annotations = [
            {
                "bbox": list(map(float, box)),
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": class_id,
                **dict(*extra),
            }
            for box, class_id, *extra in objects
        ]
        size = {"height": 100, "width": 100}
        return {
            "file_name": f"{image_id}.jpg",
            "image_id": image_id,
            **size,
            "annotations": annotations,
        }

    return make


@pytest.fixture
def make_instances():
    """A function that gives the output of a detector from (box, class id, score) per detection."""

    def make(*detections):
        return Instances(
            (100, 100),
            pred_boxes=Boxes([box for box, _, _ in detections]),
            pred_classes=torch.tensor(
                [class_id for _, class_id, _ in detections], dtype=torch.int64
            ),
            scores=torch.tensor([score for _, _, score in detections], dtype=torch.float32),
        )

    return make


@pytest.fixture
def score(make_instances):
    """A function that feeds an evaluator with detections per image id, and gives what it evaluates to."""

    def run(evaluator, detections_of):
        evaluator.reset()
        for image_id, detections in detections_of.items():
            evaluator.process(
                [{"image_id": image_id}], [{"instances": make_instances(*detections)}]
            )
        return evaluator.evaluate()

    return run


@pytest.fixture
def truth_as_detections():
    """A function that gives the ground truth of records as detections of score 1, crowds left out."""

    def convert(records):
        return {
            record["image_id"]: [
                (
                    BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS),
                    a["category_id"],
                    1.0,
                )
                for a in record["annotations"]
                if not a.get("iscrowd")
            ]
            for record in records
        }

    return convert


@pytest.fixture
def random_problem(make_record):
    """A function that gives random records and detections per image id, of 4 classes, of which the last has no object.

    With crowds, difficult objects, images without objects, images without detections, equal scores, boxes on whole
    pixels (so that overlaps hit thresholds exactly), boxes without area, and more than a hundred detections of a class in an image.
    """

    def make(seed):
        rng = np.random.default_rng(seed)
        whole, tied = rng.random() < 0.5, rng.random() < 0.5
        num_classes = int(rng.choice([1, 3]))
        max_objects, max_detections = (
            rng.choice([0, 1, 5, 20], p=[0.1, 0.2, 0.3, 0.4]),
            rng.choice([2, 10, 60, 250]),
        )
        records, detections_of = [], {}
        for image_id in rng.permutation(int(rng.integers(1, 9))).tolist():
            objects = [
                _random_object(rng, whole, num_classes)
                for _ in range(rng.integers(0, max_objects + 1))
            ]
            records.append(make_record(image_id, *objects))
            if rng.random() < 0.9:
                count = rng.integers(0, max_detections + 1)
                detections_of[image_id] = [
                    _random_detection(rng, objects, whole, tied, num_classes) for _ in range(count)
                ]
        return records, detections_of

    return make


def _random_object(rng, whole, num_classes):
    corner, side = rng.uniform(0, 200, 2), rng.uniform(1, rng.choice([12, 60, 250]), 2)
    box = np.concatenate([corner, corner + side])
    extra = {"iscrowd": int(rng.random() < 0.15), "difficult": int(rng.random() < 0.15)}
    if rng.random() < 0.5:
        extra["area"] = float(rng.choice([side.prod() * 0.7, 32.0**2, 96.0**2]))
    return _rounded(box, whole), int(rng.integers(num_classes)), extra


def _random_detection(rng, objects, whole, tied, num_classes):
    class_id = int(rng.choice([*range(num_classes), 3]))
    if objects and rng.random() < 0.7:
        box, class_id, _ = objects[rng.integers(len(objects))]
        box = np.array(box) + rng.normal(0, rng.choice([0, 1, 10]), 4)
    else:
        box = rng.uniform(0, 200, 4)
    box = np.concatenate([box[:2], np.maximum(box[:2], box[2:])])
    value = float(rng.random())
    return _rounded(box, whole), class_id, round(value, 1) if tied else value


def _rounded(box, whole):
    # Numbers that float32 holds, because boxes come out of a model as such.
    return (box.round() if whole else box.astype(np.float32)).tolist()
