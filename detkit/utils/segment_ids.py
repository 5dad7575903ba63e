"""Segment ids as colours: how panoptic pngs hold, in each pixel, the number of the segment that it belongs to.

Format: https://cocodataset.org/#format-data, panoptic segmentation: red + 256 green + 65536 blue; 0
    is no segment.
"""

import numpy as np

_MOST_IDS = 256**3


def rgb2id(color: np.ndarray) -> np.ndarray:
    """Return the (...,) int32 segment ids of (..., 3) colours in the order red, green, blue, in [0,
    255].
    """
    channels = np.asarray(color).astype(np.int32)
    return channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """Return the (..., 3) uint8 colours of (...,) segment ids.

    Raises:
        ValueError: An id lies outside [0, 2**24).
    """
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= _MOST_IDS):
        raise ValueError(
            f"a png holds segment ids in [0, {_MOST_IDS}), got {ids.min()} to {ids.max()}"
        )
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
