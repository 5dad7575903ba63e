"""Score boxes by COCO's AP, against pycocotools.

What makes it fair: ground truth and detections are in memory, detkit's as its evaluator holds them,
pycocotools' as the list of dicts that it reads; both sides then build their indices, match,
accumulate and sum up. That they return the same AP is checked before anything is timed.
"""

import contextlib
import copy
import io
from typing import Any, cast

import numpy as np
from contest import Contest, Setting
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detkit.evaluation.coco.ground_truth import CocoGroundTruth
from detkit.evaluation.coco.results import CocoProtocol, coco_metrics, coco_result_dicts
from detkit.evaluation.coco.scoring import score_detections
from detkit.evaluation.detections import ImageDetections

_NUM_CLASSES = 80
_HEIGHT, _WIDTH = 480, 640


def eval_contest(setting: Setting) -> Contest:
    """Detections of a whole data set to AP; scoring runs on the CPU."""
    num_images = 500 if setting.quick else 13_158
    truth, detections = synthetic_detections(num_images)
    coco = _quietly_indexed(truth)
    results = coco_result_dicts(detections, truth.image_ids, truth.category_ids)

    def ours() -> float:
        return coco_metrics(score_detections(truth, detections, CocoProtocol()), truth.class_names)[
            "AP"
        ]

    def theirs() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            # A copy, because loading writes into the dicts.
            evaluation = COCOeval(coco, coco.loadRes(cast(Any, copy.deepcopy(results))), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return 100 * float(evaluation.stats[0])

    return Contest(
        name="eval",
        task=(
            f"AP of {len(results)} detections on {num_images} images with"
            f" {len(truth.coco['annotations'])} objects"
        ),
        opponent="pycocotools",
        ours=ours,
        theirs=theirs,
        target=20.0,
        # The other side takes a minute or more.
        rounds=1,
        has_warm_up=False,
        check=_require_same_ap,
    )


def _require_same_ap(ours: float, theirs: float) -> None:
    if abs(ours - theirs) > 1e-6:
        raise ValueError(
            f"the two sides do not score alike: detkit has AP {ours}, pycocotools {theirs}"
        )


def synthetic_detections(
    num_images: int, seed: int = 0
) -> tuple[CocoGroundTruth, list[ImageDetections]]:
    """Make up ground truth and detections in the proportions of COCO val2017.

    An image has 7 objects and 38 detections on average. Most objects are found, displaced by up to
    a third of their size, some twice or as another class; the other detections lie anywhere.
    Classes are as uneven as in COCO, where one in three objects is a person.

    Args:
        num_images: Images of 480x640.
        seed: Equal seeds give equal data.
    """
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, _NUM_CLASSES + 1)
    share /= share.sum()
    annotations = []
    detections = []
    for image_id in range(1, num_images + 1):
        boxes = _random_boxes(rng, int(rng.poisson(7)))
        classes = rng.choice(_NUM_CLASSES, len(boxes), p=share)
        annotations += _annotations(image_id, boxes, classes, first_id=len(annotations) + 1)
        detections.append(_detect(rng, image_id, boxes, classes, share))
    images = [
        {"id": i, "file_name": f"{i}.jpg", "height": _HEIGHT, "width": _WIDTH}
        for i in range(1, num_images + 1)
    ]
    names = [f"class {i}" for i in range(_NUM_CLASSES)]
    category_ids = list(range(1, _NUM_CLASSES + 1))
    categories = [{"id": i, "name": name} for i, name in zip(category_ids, names, strict=True)]
    coco = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    image_ids: dict[int | str, int] = {image["id"]: image["id"] for image in images}
    return CocoGroundTruth("synthetic", coco, names, category_ids, image_ids), detections


def _random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) XYXY, sides from 8 pixels to the whole image, small ones more often."""
    sides = np.exp(rng.uniform(np.log(8), np.log([_WIDTH, _HEIGHT]), (count, 2)))
    corners = rng.uniform(0, 1, (count, 2)) * ([_WIDTH, _HEIGHT] - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def _annotations(
    image_id: int, boxes: np.ndarray, classes: np.ndarray, first_id: int
) -> list[dict]:
    sides = boxes[:, 2:] - boxes[:, :2]
    xywh = np.concatenate([boxes[:, :2], sides], axis=1)
    return [
        {
            "id": number,
            "image_id": image_id,
            "category_id": category + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(number % 100 == 0),
        }
        for number, (box, category) in enumerate(
            zip(xywh.tolist(), classes.tolist(), strict=True), start=first_id
        )
    ]


def _detect(
    rng: np.random.Generator,
    image_id: int,
    boxes: np.ndarray,
    classes: np.ndarray,
    share: np.ndarray,
) -> ImageDetections:
    found = np.repeat(np.arange(len(boxes)), rng.integers(0, 4, len(boxes)))
    sides = np.tile(boxes[found, 2:] - boxes[found, :2], 2)
    hits = boxes[found] + rng.normal(0, 0.1, (len(found), 4)) * sides
    hit_classes = np.where(
        rng.random(len(found)) < 0.9, classes[found], rng.choice(_NUM_CLASSES, len(found))
    )
    misses = _random_boxes(rng, int(rng.poisson(27.5)))
    scores = np.concatenate([rng.beta(4, 2, len(hits)), rng.beta(1, 6, len(misses))])
    all_classes = np.concatenate([hit_classes, rng.choice(_NUM_CLASSES, len(misses), p=share)])
    return ImageDetections(
        image_id, np.concatenate([hits, misses]), scores, all_classes.astype(np.int64)
    )


def _quietly_indexed(truth: CocoGroundTruth) -> COCO:
    coco = COCO()
    coco.dataset = cast(Any, truth.coco)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
