"""Data sets for semantic segmentation: a folder of images, and one of label maps as png."""

import functools
import logging
import os
from typing import Any

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.structures import ImageRecord
from detkit.utils.errors import DataError
from detkit.utils.file_io import files_below
from detkit.utils.text import listed

logger = logging.getLogger(__name__)


def load_sem_seg(
    gt_root: str,
    image_root: str,
    gt_ext: str = "png",
    image_ext: str = "jpg",
    *,
    warn_of_unlabelled: bool = True,
) -> list[ImageRecord]:
    """Pair images with label maps of the same name.

    Args:
        gt_root: Folder of label maps, with all folders in it.
        image_root: Folder of images, with the same folders in it.
        gt_ext: Ending of label maps.
        image_ext: Ending of images.
        warn_of_unlabelled: Whether to warn of images without a label map.

    Returns:
        A record per pair, in the order of the names; `image_id` is the name without its ending.
        Images and label maps without a partner are left out, with a warning.

    Raises:
        MissingFileError: A folder does not exist.
        DataError: There is no pair, or two files differ in the case of their ending alone.
    """
    label_files = files_below(gt_root, [f".{gt_ext}"], "label maps")
    image_files = files_below(image_root, [f".{image_ext}"], "images")
    labels, images = set(label_files), set(image_files)
    both = sorted(labels & images)
    if not both:
        raise DataError(
            f"no image .{image_ext} in {image_root} ({len(images)} of them) has a label map"
            f" .{gt_ext} of the same name in {gt_root} ({len(labels)} of them)"
        )
    for root, files in ((gt_root, label_files), (image_root, image_files)):
        for same in files.values():
            if len(same) > 1:
                raise DataError(f"{root} has {' and '.join(same)}: remove one of them")
    unlabelled = images - labels if warn_of_unlabelled else set()
    for missing, root, kind in (
        (unlabelled, gt_root, "label map"),
        (labels - images, image_root, "image"),
    ):
        if missing:
            names = listed(sorted(missing), 5)
            logger.warning(
                "%d files left out: they have no %s in %s: %s", len(missing), kind, root, names
            )
    return [
        {
            "file_name": os.path.join(image_root, image_files[stem][0]),
            "image_id": stem,
            "sem_seg_file_name": os.path.join(gt_root, label_files[stem][0]),
        }
        for stem in both
    ]


def register_sem_seg(
    name: str, metadata: dict[str, Any], image_root: str, gt_root: str, **extensions: str
) -> None:
    """Register a data set of images and label maps.

    Args:
        name: Its name, as in `DATASETS.TRAIN`.
        metadata: `stuff_classes`, and further metadata.
        image_root: See `load_sem_seg`.
        gt_root: As there.
        **extensions: `gt_ext` and `image_ext`, as there.

    Raises:
        ConfigError: The name is taken by another data set.
    """
    DatasetCatalog.register(
        name, functools.partial(load_sem_seg, gt_root, image_root, **extensions)
    )
    noted = {"evaluator_type": "sem_seg", "ignore_label": 255, **metadata}
    MetadataCatalog.get(name).set(image_root=image_root, sem_seg_root=gt_root, **noted)
