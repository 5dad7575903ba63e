"""Tiles on a picture of 4,000 x 4,000 with 2,000 objects, beside SAHI with the same tiles.

    python benchmarks/tiles.py --model output/quick_start/model_final.pth

Both run the same model on the same tiles; what differs is how they merge. SAHI (pip install sahi)
is run by its adapter for Detectron2, on `detkit.as_detectron2`, with its own settings.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import detkit.as_detectron2  # noqa: F401 - SAHI's adapter imports detectron2
from detkit.data.datasets.shapes.scene import draw_scene
from detkit.engine import Predictor
from detkit.engine.predictor import config_of_checkpoint
from detkit.utils.events import peak_memory_mb

SIDE, NUM_OBJECTS = 4000, 2000


def picture_and_truth(seed: int = 0) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return an RGB picture, and its objects in COCO's form.

    It is made of scenes of the quick start at half their size.
    """
    rng = np.random.default_rng(seed)
    picture = np.full((SIDE, SIDE, 3), 128, dtype=np.uint8)
    objects: list[dict[str, Any]] = []
    y = 0
    while len(objects) < NUM_OBJECTS:
        x, row = 0, 0
        while len(objects) < NUM_OBJECTS:
            scene = draw_scene(rng)
            height, width = (side // 2 for side in scene.image.shape[:2])
            if x + width > SIDE or y + height > SIDE:
                break
            picture[y : y + height, x : x + width] = np.asarray(
                Image.fromarray(scene.image).resize((width, height), Image.Resampling.BOX)
            )
            for found in scene.objects:
                x1, y1, x2, y2 = (side / 2 for side in found.box)
                box = [x1 + x, y1 + y, x2 - x1, y2 - y1]
                objects.append({"category_id": found.class_index + 1, "bbox": box})
            x, row = x + width, max(row, height)
        if not row:
            raise ValueError(f"no room for {NUM_OBJECTS} objects")
        y += row
    objects = objects[:NUM_OBJECTS]
    for index, entry in enumerate(objects):
        area = entry["bbox"][2] * entry["bbox"][3]
        entry |= {"id": index + 1, "image_id": 1, "iscrowd": 0, "area": area}
    return picture, objects


def score(truth: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, float]:
    """Return AP, and how many objects have no, one and several detections of a score over 0.5."""
    coco, evaluated = COCO(), None
    coco.dataset = cast(
        Any,
        {
            "images": [{"id": 1, "height": SIDE, "width": SIDE}],
            "annotations": truth,
            "categories": [{"id": k, "name": str(k)} for k in {e["category_id"] for e in truth}],
        },
    )
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluated = COCOeval(coco, coco.loadRes(cast(Any, found)), "bbox")
        evaluated.params.maxDets = [1, 100, 10_000]
        evaluated.evaluate()
        evaluated.accumulate()
    precision = evaluated.eval["precision"][:, :, :, 0, 2]
    counts = np.zeros(len(truth), dtype=int)
    boxes = np.array([entry["bbox"] for entry in truth])
    classes = np.array([entry["category_id"] for entry in truth])
    for entry in found:
        if entry["score"] > 0.5:
            overlap = _iou(np.array(entry["bbox"]), boxes) * (classes == entry["category_id"])
            counts[overlap.argmax()] += overlap.max() > 0.5
    return {
        "AP": 100 * float(precision[precision > -1].mean()),
        "AP50": 100 * float(precision[0][precision[0] > -1].mean()),
        "detections": len(found),
        "missed": int((counts == 0).sum()),
        "found once": int((counts == 1).sum()),
        "found more often": int((counts > 1).sum()),
    }


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    low = np.maximum(box[:2], others[:, :2])
    high = np.minimum(box[:2] + box[2:], others[:, :2] + others[:, 2:])
    shared = (high - low).clip(0).prod(axis=1)
    return shared / (box[2:].prod() + others[:, 2:].prod(axis=1) - shared)


def with_detkit(cfg: Any, picture: np.ndarray, tile: int, overlap: float, merge: str) -> list:
    """Return what detkit finds, in COCO's form."""
    cfg = cfg.clone()
    cfg.TEST.TILES.MERGE = merge
    found = Predictor(cfg, tile=tile, overlap=overlap)(picture, input="rgb").instances
    boxes = found.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {"image_id": 1, "category_id": k + 1, "bbox": box, "score": value}
        for box, value, k in zip(
            boxes.tolist(), found.scores.tolist(), found.pred_classes.tolist(), strict=True
        )
    ]


def with_sahi(cfg: Any, picture: np.ndarray, tile: int, overlap: float) -> list:
    """Return what SAHI finds, in COCO's form."""
    from sahi import AutoDetectionModel
    from sahi.predict import get_sliced_prediction

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(cfg.dump(), encoding="utf-8")
        model = AutoDetectionModel.from_pretrained(
            model_type="detectron2",
            model_path=cfg.MODEL.WEIGHTS,
            config_path=str(config),
            confidence_threshold=0.05,
            device=cfg.MODEL.DEVICE,
        )
        found = get_sliced_prediction(
            picture,
            model,
            slice_height=tile,
            slice_width=tile,
            overlap_height_ratio=overlap,
            overlap_width_ratio=overlap,
            perform_standard_pred=False,
            verbose=0,
        )
    return [
        {
            "image_id": 1,
            "category_id": entry.category.id + 1,
            "bbox": [float(v) for v in entry.bbox.to_xywh()],
            "score": float(entry.score.value),
        }
        for entry in found.object_prediction_list
    ]


def main() -> None:
    """Print the scores of both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint of the quick start")
    parser.add_argument("--tile", type=int, default=320)
    parser.add_argument("--overlap", type=float, default=0.3)
    parser.add_argument("--runs", nargs="+", default=["nms", "wbf", "SAHI"])
    args = parser.parse_args()
    cfg = config_of_checkpoint(args.model)
    # Objects are then as large as in training.
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 2 * args.tile, 2 * args.tile
    cfg.MODEL.DEVICE = "cpu"
    picture, truth = picture_and_truth()
    runs = {
        "nms": lambda: with_detkit(cfg, picture, args.tile, args.overlap, "nms"),
        "wbf": lambda: with_detkit(cfg, picture, args.tile, args.overlap, "wbf"),
        "SAHI": lambda: with_sahi(cfg, picture, args.tile, args.overlap),
    }
    for name in args.runs:
        start = time.perf_counter()
        found = runs[name]()
        seconds = round(time.perf_counter() - start, 1)
        result = {k: round(v, 2) for k, v in score(truth, found).items()}
        memory = round(peak_memory_mb())
        print(
            json.dumps({"run": name, **result, "seconds": seconds, "peak_mb": memory}), flush=True
        )


if __name__ == "__main__":
    main()
