"""The ground truth of a data set of any format, in the form that COCO's metrics take.

Legend: N images, M objects in one image, K classes.
"""

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.coco_export import (
    category_ids_of,
    class_names_of,
    coco_image_ids,
    records_to_coco_dict,
)
from detkit.structures import BoxMode, ImageRecord
from detkit.structures.mask_formats import as_polygon, polygon_runs, rle_counts
from detkit.utils.errors import DataError
from detkit.utils.text import listed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoGroundTruth:
    """A data set as COCO json, with the mapping from its own ids to those in the json."""

    dataset_name: str
    coco: dict[str, Any]
    """As `records_to_coco_dict` returns it, always with `annotations`. Not to be changed."""
    class_names: list[str]
    """(K,)"""
    category_ids: list[int]
    """(K,) category id in the json per contiguous class id."""
    image_ids: dict[int | str, int]
    """Image id of the records -> image id in the json."""
    rotated: bool = False
    """Whether the boxes in the json are XYWHA, else XYWH."""
    records: Sequence[ImageRecord] = ()
    """Source of the json: LVIS needs keys that the json does not have."""

    @property
    def num_objects(self) -> int:
        """Number of objects that can be found: all but crowd regions."""
        return sum(not annotation["iscrowd"] for annotation in self.coco["annotations"])

    @cached_property
    def image_sizes(self) -> dict[int, tuple[int, int]]:
        """(height, width) by image id in the json, of the images whose size is known."""
        return {
            image["id"]: (image["height"], image["width"])
            for image in self.coco["images"]
            if "height" in image and "width" in image
        }

    @cached_property
    def _masks(self) -> dict[int, dict[str, Any]]:
        # Cached: the polygons are encoded once, not in each evaluation of a training run.
        annotations = self.coco["annotations"]
        masks = {a["id"]: self._encode(a) for a in annotations if a.get("segmentation")}
        if len(masks) < len(annotations):
            lacking = {a["image_id"] for a in annotations if a["id"] not in masks}
            files = [image["file_name"] for image in self.coco["images"] if image["id"] in lacking]
            logger.warning(
                "%d of %d objects of %s have no mask: in the score of masks they do not count, and"
                " neither do detections that lie mostly in their boxes. They are in %s",
                len(annotations) - len(masks),
                len(annotations),
                self.dataset_name,
                listed(files, 3),
            )
        return masks

    def only(self, image_ids: Collection[int | str]) -> "CocoGroundTruth":
        """Return the ground truth of some of the images, by the ids of the records."""
        ids = {
            of_record: id_ for of_record, id_ in self.image_ids.items() if of_record in image_ids
        }
        kept = set(ids.values())
        images = [image for image in self.coco["images"] if image["id"] in kept]
        annotations = [a for a in self.coco["annotations"] if a["image_id"] in kept]
        coco = {**self.coco, "images": images, "annotations": annotations}
        return dataclasses.replace(self, coco=coco, image_ids=ids)

    def encode_masks(self) -> None:
        """Encode all masks now, for their errors; otherwise the first score does it."""
        _ = self._masks

    def mask_entry(self, annotation: Mapping[str, Any]) -> dict[str, Any]:
        """Return the compressed mask of an annotation, as `segmentation`.

        Raises:
            DataError: The mask cannot be read or has another size than the image, or the size of
                the image is not known.
        """
        if annotation.get("segmentation"):
            return {"segmentation": self._masks[annotation["id"]]}
        # An object without a mask becomes a crowd region of its box's shape: it costs nothing to
        # miss, and detections in it are not wrong.
        x, y, width, height = annotation["bbox"]
        corners = [x, y, x + width, y, x + width, y + height, x, y + height]
        box_mask = self._encode({**annotation, "segmentation": [corners]})
        return {"segmentation": box_mask, "iscrowd": 1}

    def check_mask_size(self, image_id: int | str, size: Sequence[int]) -> None:
        """Refuse predicted masks of another size than the image.

        Args:
            image_id: The image's id in the records.
            size: (height, width) of the masks.

        Raises:
            DataError: The size is not that of the image.
        """
        # COCO's code computes an overlap of -1 for such masks instead of failing.
        expected = self.image_sizes.get(self.image_ids[image_id], tuple(size))
        if tuple(size) != expected:
            raise DataError(
                f"the masks that the model gives for image {image_id!r} are {size[0]}x{size[1]},"
                f" but the image is {expected[0]}x{expected[1]} (height x width) in data set"
                f" {self.dataset_name!r}: are 'height' and 'width' in the inputs of the model?"
            )

    def _encode(self, annotation: Mapping[str, Any]) -> dict[str, Any]:
        """Compress a mask by the code that COCO's tools use, so that no pixel differs."""
        segmentation, image_id = annotation["segmentation"], annotation["image_id"]
        where = f"object {annotation['id']} in image {image_id} of data set {self.dataset_name!r}"
        size = self.image_sizes.get(image_id)
        if size is None:
            raise DataError(
                f"the mask of {where} needs height and width of the image, which are not in its"
                " record"
            )
        try:
            if not isinstance(segmentation, Mapping):
                polygons = [as_polygon(polygon) for polygon in segmentation]
                rle: Any = mask_util.merge(polygon_runs(polygons, *size))
            else:
                # pycocotools reads and writes beyond its memory where runs and size differ.
                rle_counts(segmentation)
                counts = segmentation["counts"]
                if isinstance(counts, list):
                    runs: Any = segmentation
                    rle = mask_util.frPyObjects(runs, *segmentation["size"])
                else:
                    counts = counts.encode("ascii") if isinstance(counts, str) else counts
                    rle = {"size": segmentation["size"], "counts": counts}
        except (ValueError, TypeError, IndexError, OverflowError) as error:
            raise DataError(f"the mask of {where} cannot be read: {error}") from error
        if tuple(rle["size"]) != size:
            raise DataError(
                f"the mask of {where} has the size {tuple(rle['size'])}, the image {size}"
            )
        return rle

    def objects_per_image(self) -> dict[int, list[dict[str, Any]]]:
        """Return the annotations of each image, by its id in the json."""
        objects: dict[int, list[dict[str, Any]]] = {
            image["id"]: [] for image in self.coco["images"]
        }
        for annotation in self.coco["annotations"]:
            objects[annotation["image_id"]].append(annotation)
        return objects


def _by_contiguous_ids(dataset_name: str, records: Sequence[ImageRecord]) -> Sequence[ImageRecord]:
    """Number the classes of a data set whose loader leaves the ids of its file, as DensePose's do.

    Such projects number them in a training loader of their own, and Detectron2 scores by the file.
    """
    metadata = MetadataCatalog.get(dataset_name)
    classes = metadata.get("thing_dataset_id_to_contiguous_id")
    if not classes or not metadata.get("json_file"):
        return records
    num_classes = len(class_names_of(dataset_name))
    ids = {a["category_id"] for record in records for a in record.get("annotations", ())}
    if all(class_id in range(num_classes) for class_id in ids):
        return records
    logger.warning(
        "objects of data set %r have the category ids of %s: they are numbered by"
        " thing_dataset_id_to_contiguous_id, and those of %d other categories do not count",
        dataset_name,
        metadata.json_file,
        len(ids - set(classes)),
    )
    numbered: list[Any] = []
    for record in records:
        annotations = [
            {**annotation, "category_id": classes[annotation["category_id"]]}
            for annotation in record.get("annotations", ())
            if annotation["category_id"] in classes
        ]
        numbered.append({**record, "annotations": annotations})
    return numbered


def load_coco_ground_truth(
    dataset_name: str, records: Sequence[ImageRecord] | None = None, *, rotated: bool = False
) -> CocoGroundTruth:
    """Load the ground truth of a registered data set.

    Args:
        dataset_name: Its name.
        records: What its loader returns, if it has been called already; None calls it.
        rotated: Whether all boxes are to be XYWHA; otherwise all are upright.

    Raises:
        ValueError: As `records_to_coco_dict`.
    """
    # From the records, not from `metadata.json_file`: one way for all formats, and what is scored
    # is what the loader returns.
    records = DatasetCatalog.get(dataset_name) if records is None else records
    records = _by_contiguous_ids(dataset_name, records)
    coco = records_to_coco_dict(dataset_name, records)
    for annotation in coco.setdefault("annotations", []):
        box = annotation["bbox"]
        if rotated and len(box) == 4:
            annotation["bbox"] = BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)
        elif not rotated and len(box) == 5:
            box = BoxMode.convert(box, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
            annotation["bbox"] = BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    return CocoGroundTruth(
        dataset_name=dataset_name,
        coco=coco,
        class_names=class_names_of(dataset_name),
        category_ids=category_ids_of(dataset_name),
        image_ids=coco_image_ids(dataset_name, records),
        rotated=rotated,
        records=records,
    )


def truth_boxes(annotations: list[dict[str, Any]], rotated: bool) -> np.ndarray:
    """Return the float64 boxes of annotations: (M, 5) XYWHA if rotated, else (M, 4) XYXY."""
    boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64)
    if rotated:
        return boxes.reshape(-1, 5)
    boxes = boxes.reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def image_numbers(truth: CocoGroundTruth) -> dict[int, int]:
    """Number the images from 1 in rising order of the data set's own ids."""
    # C++ holds ids as doubles (collisions above 2**53), and the order of the images decides between
    # equal scores: see the head of `scoring.py`.
    return {coco_id: number for number, coco_id in enumerate(sorted(truth.image_ids.values()), 1)}
