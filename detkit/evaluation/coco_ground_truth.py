"""The ground truth of a data set in the form that COCO's metrics take, whatever format it came in.

Legend: N images, M objects in one image, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from detkit.data.catalog import DatasetCatalog
from detkit.data.datasets.coco_export import category_ids_of, class_names_of, coco_image_ids, records_to_coco_dict


@dataclass(frozen=True)
class CocoGroundTruth:
    """A data set as COCO json, with the ways from its own ids to those in the json."""

    dataset_name: str
    coco: dict[str, Any]
    """As ``records_to_coco_dict`` gives it, always with ``annotations``. Not to be changed."""
    class_names: list[str]
    """(K,)"""
    category_ids: list[int]
    """(K,) category id in the json per contiguous class id."""
    image_ids: dict[int | str, int]
    """Image id of the records -> image id in the json."""

    @property
    def num_objects(self) -> int:
        """Objects that can be found: all but crowd regions."""
        return sum(not annotation["iscrowd"] for annotation in self.coco["annotations"])

    def objects_per_image(self) -> dict[int, list[dict[str, Any]]]:
        """Give the annotations of each image, by its id in the json."""
        objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in self.coco["images"]}
        for annotation in self.coco["annotations"]:
            objects[annotation["image_id"]].append(annotation)
        return objects


def load_coco_ground_truth(dataset_name: str) -> CocoGroundTruth:
    """Load the ground truth of a registered data set.

    It comes from the data set's records, not from ``metadata.json_file``: there is one way for all formats, and what is
    scored is what the loader shows.

    Raises:
        ValueError: As ``records_to_coco_dict``.
    """
    records = DatasetCatalog.get(dataset_name)
    coco = records_to_coco_dict(dataset_name, records)
    coco.setdefault("annotations", [])
    return CocoGroundTruth(
        dataset_name=dataset_name,
        coco=coco,
        class_names=class_names_of(dataset_name),
        category_ids=category_ids_of(dataset_name),
        image_ids=coco_image_ids(dataset_name, records),
    )


def boxes_xyxy(annotations: list[dict[str, Any]]) -> np.ndarray:
    """Give the (M, 4) float64 XYXY boxes of annotations."""
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
