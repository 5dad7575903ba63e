"""The forms in which masks reach a picture, and what they come down to: polygons, or an (H, W)
bitmap.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from detkit.structures import polygons_to_bitmask, rle_to_bitmask


def mask_list(masks: Any) -> list[Any]:
    """Return the masks of a container one by one: of `PolygonMasks`, of `BitMasks`, of a tensor or
    array (M, H, W).
    """
    masks = getattr(masks, "polygons", getattr(masks, "tensor", masks))
    return list(masks.detach().cpu().numpy()) if hasattr(masks, "detach") else list(masks)


def is_polygons(mask: Any) -> bool:
    """Whether a mask is a list of polygons."""
    return isinstance(mask, list | tuple)


def binary_mask(mask: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return any form of a mask as (H, W) bool: polygons, run-length encoding, or a bitmap of that size.

    Raises:
        ValueError: The mask has another size.
    """
    if isinstance(mask, dict):
        return rle_to_bitmask(mask, height, width)
    if is_polygons(mask):
        return polygons_to_bitmask(_flat(mask), height, width)
    bitmap = np.asarray(mask).astype(bool)
    if bitmap.shape != (height, width):
        raise ValueError(
            f"a mask has the size of its picture, {height} x {width}: got shape {bitmap.shape}"
        )
    return bitmap


def _flat(polygons: Sequence[Any]) -> list[npt.NDArray[np.float64]]:
    return [np.asarray(polygon, dtype=np.float64).reshape(-1) for polygon in polygons]
