"""Masks of objects, in whichever form a data set has them, through the augmentations and into what a model takes.

Polygons stay polygons as long as all masks of an image are: they cost next to nothing to move, and
only what of them lies in a proposal is ever drawn. Anything else becomes bitmaps, and so do the
polygons beside it. Nobody has to say which.

Legend: M objects in one image, H and W height and width of the image that the model sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from detkit.data import transforms as T
from detkit.structures import BitMasks, PolygonMasks
from detkit.structures.mask_formats import as_polygon, polygons_to_bitmask, rle_to_bitmask

MASK_FORMATS = ("polygon", "bitmask")


def transform_segmentation(
    segmentation: Any, transforms: T.Transform, original_size: tuple[int, int] | None = None
) -> list[np.ndarray] | np.ndarray:
    """Return a mask after the image was transformed: its polygons, or a bitmap.

    Args:
        segmentation: Polygons, a mask in run-length encoding, or a bitmap; it is not changed.
        transforms: What was done to the image.
        original_size: `(height, width)` of the image before; None takes what run lengths say.

    Returns:
        Flat float64 arrays `[x0, y0, ...]`, none where nothing is left of them; or (H, W) uint8.

    Raises:
        ValueError: A polygon is none, or run lengths or bitmap have another size than the image.
    """
    if isinstance(segmentation, list | tuple):
        polygons = [as_polygon(polygon).reshape(-1, 2) for polygon in segmentation]
        return [polygon.reshape(-1) for polygon in transforms.apply_polygons(polygons)]
    return transforms.apply_segmentation(_bitmap(segmentation, original_size).view(np.uint8))


def _bitmap(segmentation: Any, size: tuple[int, int] | None) -> np.ndarray:
    """Return (H, W) bool of run lengths or of a bitmap."""
    if isinstance(segmentation, Mapping):
        return rle_to_bitmask(segmentation, *(size or (None, None)))
    if not isinstance(segmentation, np.ndarray) or segmentation.ndim != 2:
        raise ValueError(
            "a mask is a list of polygons, run lengths ({size, counts}) or an (H, W) array, got "
            f"{type(segmentation).__name__} {getattr(segmentation, 'shape', '')}".rstrip()
        )
    if size is not None and segmentation.shape != tuple(size):
        raise ValueError(
            f"a bitmap has the size of its image: got {segmentation.shape} for an image of"
            f" {tuple(size)}"
        )
    return segmentation != 0


def masks_of(
    segmentations: Sequence[list[np.ndarray] | np.ndarray],
    image_size: tuple[int, int],
    mask_format: str = "polygon",
) -> PolygonMasks | BitMasks:
    """Return the masks of one image's M objects as a model takes them.

    Args:
        segmentations: As `transform_segmentation` gives them.
        image_size: `(height, width)` of the image that the model sees.
        mask_format: "polygon" keeps polygons where all masks are; "bitmask" draws them.

    Raises:
        ValueError: An unknown format, or a bitmap of another size.
    """
    if mask_format not in MASK_FORMATS:
        raise ValueError(
            f"INPUT.MASK_FORMAT must be one of {', '.join(MASK_FORMATS)}, got {mask_format!r}"
        )
    if mask_format == "polygon" and all(
        isinstance(segmentation, list) for segmentation in segmentations
    ):
        return PolygonMasks(list(segmentations))  # type: ignore[arg-type] - all are lists
    bitmaps = np.zeros((len(segmentations), *image_size), dtype=bool)
    for bitmap, segmentation in zip(bitmaps, segmentations, strict=True):
        mask = (
            polygons_to_bitmask(segmentation, *image_size)
            if isinstance(segmentation, list)
            else segmentation
        )
        if mask.shape != tuple(image_size):
            raise ValueError(
                f"a mask of shape {mask.shape} is not of the image, which is {tuple(image_size)}"
            )
        bitmap[:] = mask
    return BitMasks(torch.from_numpy(bitmaps))
