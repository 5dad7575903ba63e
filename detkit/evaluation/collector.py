"""Predictions or counts of each image of a data set, held per process and gathered at the end.

Legend: L images that have an array of a name.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from detkit.utils import comm

logger = logging.getLogger(__name__)


class OfImage(Protocol):
    """Anything that belongs to one image and can be stored in arrays."""

    @property
    def image_id(self) -> int | str:
        """The image's id in the data set's records."""
        ...

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as arrays by name.

        Arrays have at least one dimension, of any length; the other dimensions and the type are the
        same in all images that have a non-empty array of the name. Images may lack a name.
        """
        ...

    @classmethod
    def from_arrays(cls, image_id: Any, arrays: Mapping[str, np.ndarray]) -> Any:
        """Build the object back from the arrays that `to_arrays` returned."""
        ...


ItemT = TypeVar("ItemT", bound=OfImage)


class ImageCollector(Generic[ItemT]):
    """Holds one item per image of a data set; each image comes once at most."""

    def __init__(
        self, item_type: type[ItemT], dataset_name: str, image_ids: Collection[int | str]
    ) -> None:
        """Start empty.

        Args:
            item_type: Type of the items.
            dataset_name: For error messages.
            image_ids: The images of the data set, in the same order in all processes.
        """
        self._item_type = item_type
        self.dataset_name = dataset_name
        self.image_ids = image_ids
        self._items: dict[int | str, ItemT] = {}

    def __len__(self) -> int:
        return len(self._items)

    def reset(self) -> None:
        """Remove all items."""
        self._items.clear()

    def take(self) -> list[ItemT]:
        """Remove all items, and return them as they came."""
        items = list(self._items.values())
        self._items.clear()
        return items

    def add(self, item: ItemT) -> None:
        """Add the item of an image.

        Raises:
            ValueError: The image is not in the data set, or was added before.
        """
        self.check(item.image_id)
        self._items[item.image_id] = item

    def check(self, image_id: int | str) -> None:
        """Refuse an image that cannot be added.

        Raises:
            ValueError: The image is not in the data set, or was added before.
        """
        if image_id not in self.image_ids:
            raise ValueError(
                f"image {image_id!r} was predicted, but is not in data set {self.dataset_name!r}: "
                "the test loader has to load the data set that the evaluator was made for"
            )
        if image_id in self._items:
            raise self._predicted_twice(image_id)

    def gather(self, distributed: bool) -> list[ItemT] | None:
        """Return the items of all processes, or of this one only, in the order of the data set.

        Args:
            distributed: Whether to gather from all processes.

        Returns:
            None in all processes but the main one if `distributed`.

        Raises:
            ValueError: In all processes, if two of them hold the same image.
        """
        # Sums of floats and the ranking of equal scores depend on the order: with that of the data
        # set they are the same for any number of processes.
        numbers = {image_id: number for number, image_id in enumerate(self.image_ids)}
        if not distributed or comm.get_world_size() == 1:
            return sorted(self._items.values(), key=lambda item: numbers[item.image_id])
        own = np.array([numbers[image_id] for image_id in self._items], dtype=np.int64)
        image_ids = list(self.image_ids)
        images, times = np.unique(np.concatenate(comm.all_gather(own)), return_counts=True)
        if (times > 1).any():
            raise self._predicted_twice(image_ids[images[times > 1][0]])
        columns = comm.concatenate_in_main(
            _to_columns(own, [item.to_arrays() for item in self._items.values()])
        )
        if columns is None:
            return None
        arrays = _from_columns(columns)
        return [
            self._item_type.from_arrays(image_ids[number], arrays.get(number, {}))
            for number in images.tolist()
        ]

    def warn_if_incomplete(self, items: Sequence[ItemT], consequence: str) -> bool:
        """Warn if some images of the data set have no item; return whether that is so."""
        is_incomplete = len(items) < len(self.image_ids)
        if is_incomplete:
            logger.warning(
                "only %d of the %d images of %s were predicted: %s",
                len(items),
                len(self.image_ids),
                self.dataset_name,
                consequence,
            )
        return is_incomplete

    def _predicted_twice(self, image_id: int | str) -> ValueError:
        return ValueError(
            f"image {image_id!r} of data set {self.dataset_name!r} was predicted twice: either the"
            " test loader gives an image more than once (a sampler that pads or repeats), or the"
            " evaluator was not reset"
        )


_ROWS_OF = "rows of "


def _to_columns(
    images: np.ndarray, items: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Concatenate the arrays of each name; "rows of NAME" is (L, 2): image, number of rows."""
    # A few long arrays travel as raw bytes, without a pickle of an object per image and mask.
    arrays_of: dict[str, list[np.ndarray]] = {}
    rows_of: dict[str, list[tuple[int, int]]] = {}
    for number, item in zip(images.tolist(), items, strict=True):
        for name, array in item.items():
            arrays_of.setdefault(name, []).append(array)
            rows_of.setdefault(name, []).append((number, len(array)))
    columns: dict[str, np.ndarray] = {}
    for name, arrays in arrays_of.items():
        # Empty arrays may differ in shape and type, so they do not join the others.
        filled = [array for array in arrays if len(array)]
        columns[name] = np.concatenate(filled) if filled else arrays[0]
        columns[_ROWS_OF + name] = np.array(rows_of[name], dtype=np.int64)
    return columns


def _from_columns(columns: Mapping[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """Return the arrays by number of the image and by name."""
    arrays: dict[int, dict[str, np.ndarray]] = {}
    # Slices of the long arrays, not copies.
    for rows_of_name, rows in columns.items():
        if rows_of_name.startswith(_ROWS_OF):
            name = rows_of_name.removeprefix(_ROWS_OF)
            ends = np.cumsum(rows[:, 1])
            for (number, count), end in zip(rows.tolist(), ends.tolist(), strict=True):
                arrays.setdefault(number, {})[name] = columns[name][end - count : end]
    return arrays
