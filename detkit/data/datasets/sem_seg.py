"""Data sets for semantic segmentation: a folder of images, and one of label maps as png."""

import functools
import logging
import os
from pathlib import PurePosixPath
from typing import Any

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.json_file import listed
from detkit.structures import ImageRecord
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.file_io import PathManager

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
        DataError: There is no pair.
    """
    labels, images = _stems(gt_root, gt_ext), _stems(image_root, image_ext)
    both = sorted(labels & images)
    if not both:
        raise DataError(
            f"no image .{image_ext} in {image_root} ({len(images)} of them) has a label map"
            f" .{gt_ext} of the same name in {gt_root} ({len(labels)} of them)"
        )
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
            "file_name": os.path.join(image_root, f"{stem}.{image_ext}"),
            "image_id": stem,
            "sem_seg_file_name": os.path.join(gt_root, f"{stem}.{gt_ext}"),
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


def _stems(root: str, extension: str) -> set[str]:
    """Return the names of the files below a folder, without their extension."""
    local = PathManager.get_local_path(root)
    if not os.path.isdir(local):
        raise MissingFileError(f"folder {root} does not exist")
    suffix = f".{extension}"
    found = set()
    for folder, _, files in os.walk(local, followlinks=True):
        below = PurePosixPath(os.path.relpath(folder, local).replace(os.sep, "/"))
        found |= {str(below / file[: -len(suffix)]) for file in files if file.endswith(suffix)}
    return found
