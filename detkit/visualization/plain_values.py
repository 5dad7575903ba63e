"""What models and data sets give, tensors or lists, as arrays to draw from.

Legend: K keypoints.
"""

from typing import Any

import numpy as np
import numpy.typing as npt


def to_array(values: Any) -> npt.NDArray[np.float64]:
    """Return numbers of a tensor on any device, of `Boxes`, or of nested lists."""
    values = getattr(values, "tensor", values)
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    return np.asarray(values, dtype=np.float64)


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


def to_list(values: Any) -> list[Any] | None:
    """Return a list of the values of a tensor, or None for None."""
    return None if values is None else values.tolist()


def common_length(**columns: Any) -> int:
    """Return the length that all columns share, those that are None aside; 0 if there are none.

    Raises:
        ValueError: They differ.
    """
    lengths = {name: len(column) for name, column in columns.items() if column is not None}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(f"need the same number of instances everywhere: got {given}")
    return next(iter(lengths.values()), 0)
