"""What was found in the images of a data set, held in each process and gathered at the end.

What travels are a few long arrays of all images, not an object per image and mask.

Legend: L images that have an array of a name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from detkit.utils import comm


class OfImage(Protocol):
    """Anything that belongs to one image, and can be told in arrays."""

    @property
    def image_id(self) -> int | str:
        """The image's id in the data set's records."""
        ...

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, by name: arrays of at least one dimension. All but the first is alike
        in all images that have an array of the name with something in it; none has to have it."""
        ...

    @classmethod
    def from_arrays(cls, image_id: Any, arrays: Mapping[str, np.ndarray]) -> Any:
        """Return what was told in the arrays."""
        ...


ItemT = TypeVar("ItemT", bound=OfImage)


class ImageCollector(Generic[ItemT]):
    """Holds what was found in a data set, image by image; no image may come twice, or from
    elsewhere.
    """

    def __init__(
        self, item_type: type[ItemT], dataset_name: str, image_ids: Collection[int | str]
    ) -> None:
        """Start with nothing.

        Args:
            item_type: What is held.
            dataset_name: For error messages.
            image_ids: The images that the data set has, in the same order in all processes.
        """
        self._item_type = item_type
        self._dataset_name = dataset_name
        self._image_ids = image_ids
        self._items: dict[int | str, ItemT] = {}

    def __len__(self) -> int:
        return len(self._items)

    def reset(self) -> None:
        """Forget everything."""
        self._items.clear()

    def add(self, item: ItemT) -> None:
        """Take in what was found in one image.

        Raises:
            ValueError: The image is not in the data set, or has come before.
        """
        self.check(item.image_id)
        self._items[item.image_id] = item

    def check(self, image_id: int | str) -> None:
        """Refuse an image that is not in the data set, or has come before.

        Raises:
            ValueError: It is one of these.
        """
        if image_id not in self._image_ids:
            raise ValueError(
                f"image {image_id!r} was predicted, but is not in data set {self._dataset_name!r}: "
                "the test loader has to load the data set that the evaluator was made for"
            )
        if image_id in self._items:
            raise self._predicted_twice(image_id)

    def gather(self, distributed: bool) -> list[ItemT] | None:
        """Return what all processes have, or this one only, in the order of the data set.

        The order makes sums and the ranking of equal scores the same with any number of processes.

        Returns:
            None in all processes but the main one, unless each gets its own.

        Raises:
            ValueError: In all processes, if two of them predicted the same image.
        """
        numbers = {image_id: number for number, image_id in enumerate(self._image_ids)}
        if not distributed or comm.get_world_size() == 1:
            return sorted(self._items.values(), key=lambda item: numbers[item.image_id])
        own = np.array([numbers[image_id] for image_id in self._items], dtype=np.int64)
        images = self._images_of_all(own)
        columns = comm.concatenate_in_main(
            _to_columns(own, [item.to_arrays() for item in self._items.values()])
        )
        if columns is None:
            return None
        image_ids, arrays = list(self._image_ids), _from_columns(columns)
        return [
            self._item_type.from_arrays(image_ids[i], arrays.get(i, {})) for i in images.tolist()
        ]

    def _images_of_all(self, own: np.ndarray) -> np.ndarray:
        """Return the numbers of the images that any process has, sorted."""
        images, times = np.unique(np.concatenate(comm.all_gather(own)), return_counts=True)
        for number in images[times > 1].tolist():
            raise self._predicted_twice(list(self._image_ids)[number])
        return images

    def _predicted_twice(self, image_id: int | str) -> ValueError:
        return ValueError(
            f"image {image_id!r} of data set {self._dataset_name!r} was predicted twice: either the"
            " test loader gives an image more than once (a sampler that pads or repeats), or the"
            " evaluator was not reset"
        )


_ROWS_OF = "rows of "


def _to_columns(
    images: np.ndarray, items: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Lay the arrays of a name behind each other; beside them (L, 2) number of the image and rows
    of each.
    """
    columns: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for item in items for name in item):
        arrays = [
            (number, item[name])
            for number, item in zip(images.tolist(), items, strict=True)
            if name in item
        ]
        filled = [array for _, array in arrays if len(array)]
        columns[name] = np.concatenate(filled) if filled else arrays[0][1]
        columns[_ROWS_OF + name] = np.array(
            [(number, len(array)) for number, array in arrays], dtype=np.int64
        )
    return columns


def _from_columns(columns: Mapping[str, np.ndarray]) -> dict[int, dict[str, np.ndarray]]:
    """Return the arrays by number of the image and by name."""
    arrays: dict[int, dict[str, np.ndarray]] = {}
    for rows_of_name, rows in columns.items():
        if rows_of_name.startswith(_ROWS_OF):
            name = rows_of_name.removeprefix(_ROWS_OF)
            ends = np.cumsum(rows[:, 1])
            for (number, count), end in zip(rows.tolist(), ends.tolist(), strict=True):
                arrays.setdefault(number, {})[name] = columns[name][end - count : end]
    return arrays
