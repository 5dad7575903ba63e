"""The size that an image is resized to."""

import math


def shortest_edge_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return the `(height, width)` with a shorter side of `min_size` and none over `max_size`."""
    # Detectron2's rounding, in its order of steps, so that sizes agree to the pixel.
    scale = min_size / min(height, width)
    new_height, new_width = scale * height, scale * width
    if height < width:
        new_height = min_size
    else:
        new_width = min_size
    if max(new_height, new_width) > max_size:
        shrink = max_size / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    # A very long and thin image would otherwise lose its short side.
    return max(1, math.floor(new_height + 0.5)), max(1, math.floor(new_width + 0.5))


def torchvision_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Return the size of `shortest_edge_size` as torchvision's detectors round it: down."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
