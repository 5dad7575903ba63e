"""How many training images hold each class.

Legend: K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from detkit.data.catalog import DatasetCatalog, MetadataCatalog


def count_images_per_class(dataset_names: Sequence[str], num_classes: int) -> list[int]:
    """Return, for each of K classes, the number of images with an object of it, over all data sets.

    A data set whose metadata has `class_image_count`, a list of `{"id", "image_count"}` with a
    class in the order of the ids each, as LVIS has it, is not read for that.

    Args:
        dataset_names: Registered names.
        num_classes: K

    Raises:
        ValueError: A `class_image_count` has not K entries.
    """
    totals = Counter[int]()
    for name in dataset_names:
        known = MetadataCatalog.get(name).get("class_image_count")
        if known is None:
            for record in DatasetCatalog.get(name):
                totals.update(
                    {annotation["category_id"] for annotation in record.get("annotations", [])}
                )
        elif len(known) != num_classes:
            raise ValueError(
                f"class_image_count of data set {name!r} has {len(known)} classes,"
                f" MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}"
            )
        else:
            ordered = sorted(known, key=lambda entry: entry["id"])
            totals.update({k: entry["image_count"] for k, entry in enumerate(ordered)})
    return [totals[k] for k in range(num_classes)]
