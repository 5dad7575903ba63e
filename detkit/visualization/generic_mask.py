"""Masks in the form that is asked for: of one object, and of the segments of an image.

Legend: (H, W) the image.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from detkit.visualization.plain_values import binary_mask, is_polygons, to_integers


class GenericMask:
    """A mask of any form: polygons, run lengths, or a bitmap."""

    def __init__(self, mask_or_polygons: Any, height: int, width: int) -> None:
        """Take the mask of an image of a size.

        Args:
            mask_or_polygons: A list of polygons [x0, y0, ...], a run-length mask, or an (H, W)
                array.
            height: H
            width: W
        """
        self.height, self.width = height, width
        self._polygons: list[npt.NDArray[np.float64]] | None = None
        self._mask: npt.NDArray[np.uint8] | None = None
        self._has_holes: bool | None = None
        if is_polygons(mask_or_polygons):
            self._polygons = [np.asarray(p, dtype=np.float64).reshape(-1) for p in mask_or_polygons]
            self._has_holes = False
        else:
            self._mask = binary_mask(mask_or_polygons, height, width).astype(np.uint8)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.asarray(self.mask, dtype)

    @property
    def mask(self) -> npt.NDArray[np.uint8]:
        """The (H, W) uint8 bitmap."""
        if self._mask is None:
            self._mask = self.polygons_to_mask(self.polygons)
        return self._mask

    @property
    def polygons(self) -> list[npt.NDArray[np.float64]]:
        """The outlines, [x0, y0, ...] each."""
        if self._polygons is None:
            self._polygons, self._has_holes = self.mask_to_polygons(self.mask)
        return self._polygons

    @property
    def has_holes(self) -> bool:
        """Whether a bitmap encloses pixels that are not in it; polygons never do."""
        if self._has_holes is None:
            self._polygons, self._has_holes = self.mask_to_polygons(self.mask)
        return self._has_holes

    def mask_to_polygons(
        self, mask: npt.NDArray[np.uint8]
    ) -> tuple[list[npt.NDArray[np.float64]], bool]:
        """Return polygons that cover a bitmap, and whether it has holes."""
        from detkit.structures.mask_formats import bitmask_to_polygons, has_holes

        return bitmask_to_polygons(mask), has_holes(mask)

    def polygons_to_mask(self, polygons: Any) -> npt.NDArray[np.uint8]:
        """Return the (H, W) uint8 bitmap of polygons."""
        if len(polygons) == 0:
            return np.zeros((self.height, self.width), np.uint8)
        from detkit.structures import polygons_to_bitmask

        return polygons_to_bitmask(polygons, self.height, self.width).astype(np.uint8)

    def area(self) -> int:
        """Return the number of pixels in the mask."""
        return int(self.mask.sum())

    def bbox(self) -> npt.NDArray[np.float64]:
        """Return the (4,) XYXY box around the mask; zeros for an empty one."""
        if self._mask is None:
            points = np.concatenate([p.reshape(-1, 2) for p in self.polygons] or [np.zeros((1, 2))])
            return np.concatenate([points.min(axis=0), points.max(axis=0)])
        rows, columns = np.nonzero(self._mask)
        if len(rows) == 0:
            return np.zeros(4)
        corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        return np.array(corners, dtype=np.float64)


class PanopticPrediction:
    """The segments of a panoptic result as masks."""

    def __init__(
        self,
        panoptic_seg: Any,
        segments_info: Sequence[Mapping[str, Any]] | None,
        metadata: Any = None,
    ) -> None:
        """Take a result.

        Args:
            panoptic_seg: (H, W) segment ids.
            segments_info: `id`, `category_id` and `isthing` of each segment; None for ids that are
                category * label_divisor + instance, as the metadata's `label_divisor` says.
            metadata: Read for `label_divisor` and `thing_dataset_id_to_contiguous_id`.
        """
        self._seg = to_integers(panoptic_seg)
        if segments_info is None:
            segments_info = segments_by_divisor(self._seg, metadata)
        self._sinfo = {int(info["id"]): info for info in segments_info}

    def non_empty_mask(self) -> npt.NDArray[np.bool_]:
        """Return (H, W) bool: the pixels of the segments."""
        return np.isin(self._seg, list(self._sinfo))

    def semantic_masks(self) -> Iterator[tuple[npt.NDArray[np.bool_], Mapping[str, Any]]]:
        """Yield the mask and the entry of each segment of stuff."""
        return self._masks(is_thing=False)

    def instance_masks(self) -> Iterator[tuple[npt.NDArray[np.bool_], Mapping[str, Any]]]:
        """Yield the mask and the entry of each segment of things."""
        return self._masks(is_thing=True)

    def _masks(self, *, is_thing: bool) -> Iterator[tuple[npt.NDArray[np.bool_], Any]]:
        for id_, info in self._sinfo.items():
            mask = self._seg == id_
            if bool(info.get("isthing", True)) == is_thing and mask.any():
                yield mask, info


def segments_by_divisor(panoptic_seg: Any, metadata: Any) -> list[dict[str, Any]]:
    """Return `id`, `category_id` and `isthing` of the segments; see `PanopticPrediction`."""
    things = set(metadata.thing_dataset_id_to_contiguous_id.values())
    ids = [id_ for id_ in np.unique(to_integers(panoptic_seg)).tolist() if id_ != -1]
    categories = [id_ // metadata.label_divisor for id_ in ids]
    return [
        {"id": id_, "category_id": category, "isthing": category in things}
        for id_, category in zip(ids, categories, strict=True)
    ]
