"""What models and data sets hold (tensors, lists, masks in several forms) as arrays to draw from.

Legend: M objects in one image, K keypoints of each, H and W height and width of the picture.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from detkit.utils.errors import DataError

# Imported where they are needed: what an exported model finds is arrays, drawn without torch.
if TYPE_CHECKING:
    from detkit.structures import AnnotationRecord


def to_array(values: Any) -> npt.NDArray[np.float64]:
    """Return numbers of a tensor on any device, of `Boxes`, or of nested lists."""
    values = getattr(values, "tensor", values)
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


def to_bitmap(mask: Any) -> npt.NDArray[np.bool_]:
    """Return where a tensor on any device, or an array, is not 0."""
    if hasattr(mask, "detach"):
        mask = mask.detach().cpu()
    return np.asarray(mask).astype(bool, copy=False)


def annotated_boxes(annotations: "Sequence[AnnotationRecord]") -> npt.NDArray[np.float64]:
    """Return the boxes of M annotations: (M, 4) XYXY, or (M, 5) XYWHA if one is rotated."""
    from detkit.structures import BoxMode

    if not any(annotation["bbox_mode"] == BoxMode.XYWHA_ABS for annotation in annotations):
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
        return np.array(boxes, dtype=np.float64).reshape(-1, 4)
    boxes = []
    for annotation in annotations:
        box, mode = annotation["bbox"], annotation["bbox_mode"]
        if mode != BoxMode.XYWHA_ABS:
            box = BoxMode.convert(box, mode, BoxMode.XYWH_ABS)
            box = BoxMode.convert(box, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS)
        boxes.append(box)
    return np.array(boxes, dtype=np.float64)


def to_integers(values: Any) -> npt.NDArray[np.int64]:
    """Return whole numbers of a tensor on any device, or of an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values).astype(np.int64)


def keypoint_list(keypoints: Any) -> list[npt.NDArray[np.float64]]:
    """Return (K, 3) of each instance; (0, 3) of one without."""
    if not isinstance(keypoints, list | tuple):
        return list(to_array(keypoints))
    return [
        np.zeros((0, 3)) if k is None else np.asarray(k, dtype=np.float64).reshape(-1, 3)
        for k in keypoints
    ]


def mask_list(masks: Any) -> list[Any]:
    """Return the masks of `PolygonMasks`, `BitMasks`, a tensor or array (M, H, W), one by one."""
    masks = getattr(masks, "polygons", getattr(masks, "tensor", masks))
    return list(masks.detach().cpu().numpy()) if hasattr(masks, "detach") else list(masks)


def is_polygons(mask: Any) -> bool:
    """Return whether a mask is a list of polygons."""
    return isinstance(mask, list | tuple)


def binary_mask(mask: Any, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Return a mask as (H, W) bool: polygons, run-length encoding, or a bitmap of that size.

    Raises:
        DataError: The mask has another size.
    """
    if isinstance(mask, dict):
        from detkit.structures import rle_to_bitmask

        return rle_to_bitmask(mask, height, width)
    if is_polygons(mask):
        from detkit.structures import polygons_to_bitmask

        flat = [np.asarray(polygon, dtype=np.float64).reshape(-1) for polygon in mask]
        return polygons_to_bitmask(flat, height, width)
    bitmap = np.asarray(mask).astype(bool, copy=False)
    if bitmap.shape != (height, width):
        raise DataError(
            f"a mask has the size of its picture, {height} x {width}: got shape {bitmap.shape}"
        )
    return bitmap


def common_length(**columns: Any) -> int:
    """Return the length that all columns share, ignoring those that are None; 0 if all are.

    Raises:
        ValueError: They differ.
    """
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"need the same number of instances everywhere: got {given}")
    return next(iter(lengths.values()), 0)
