"""What a model says about one image, as one entry of `predictions.json` and as png maps beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detkit.structures import BoxMode, Instances, ModelOutput, bitmask_to_rle
from detkit.utils.colormap import id2rgb


def describe_output(output: ModelOutput, metadata: Any) -> dict[str, Any]:
    """Return `instances` and `segments`, of which the model says anything, as plain lists and
    numbers.
    """
    described: dict[str, Any] = {}
    if "instances" in output:
        described["instances"] = _describe_instances(output["instances"].to("cpu"), metadata)
    if "panoptic_seg" in output:
        described["segments"] = [
            _describe_segment(info, metadata) for info in output["panoptic_seg"][1]
        ]
    return described


def write_maps(output: ModelOutput, folder: Path, name: str) -> dict[str, str]:
    """Write what a model says of every pixel, and give the files, relative to the folder.

    Args:
        output: For one image.
        folder: Gets `sem_seg/NAME.png`, grey, a class per pixel, and `panoptic/NAME.png`, a
            segment's id per pixel as COCO's colours: red + 256 green + 65536 blue.
        name: Unlike that of any other image.
    """
    maps: dict[str, np.ndarray] = {}
    if "sem_seg" in output:
        labels = output["sem_seg"].argmax(dim=0).cpu().numpy()
        maps["sem_seg"] = labels.astype(np.uint8 if len(output["sem_seg"]) <= 256 else np.uint16)
    if "panoptic_seg" in output:
        maps["panoptic"] = id2rgb(output["panoptic_seg"][0].cpu().numpy())
    files = {kind: f"{kind}/{name}.png" for kind in maps}
    for kind, file in files.items():
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(maps[kind]).save(folder / file)
    return files


def _describe_instances(instances: Instances, metadata: Any) -> list[dict[str, Any]]:
    boxes = BoxMode.convert(
        instances.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS
    ).tolist()
    found: list[dict[str, Any]] = [
        {
            "category": _name(metadata, "thing_classes", category),
            "category_id": category,
            "score": round(score, 4),
            "bbox": [round(v, 2) for v in box],
        }
        for category, score, box in zip(
            instances.pred_classes.tolist(), instances.scores.tolist(), boxes, strict=True
        )
    ]
    if instances.has("pred_masks"):
        for entry, mask in zip(found, instances.pred_masks.numpy(), strict=True):
            entry["segmentation"] = bitmask_to_rle(mask)
    if instances.has("pred_keypoints"):
        for entry, keypoints in zip(
            found, instances.pred_keypoints.flatten(1).tolist(), strict=True
        ):
            entry["keypoints"] = [round(v, 3) for v in keypoints]
    return found


def _describe_segment(info: Mapping[str, Any], metadata: Any) -> dict[str, Any]:
    classes = "thing_classes" if info["isthing"] else "stuff_classes"
    described = {"category": _name(metadata, classes, info["category_id"]), **info}
    if "score" in described:
        described["score"] = round(described["score"], 4)
    return described


def _name(metadata: Any, classes: str, category: int) -> str:
    names = getattr(metadata, classes, None) or []
    return names[category] if category < len(names) else str(category)
