"""Masks of boxes, painted into the image.

Legend: M objects in one image, h x w cells of the mask of a box, H x W pixels of the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detkit.structures.boxes import Boxes

# Floats of the painted, not yet thresholded masks that are held at a time on a GPU: 512 MiB.
_MAX_PIXELS = 2**27


@torch.no_grad()
def paste_masks_in_image(
    masks: Tensor, boxes: Boxes | Tensor, image_shape: tuple[int, int], threshold: float = 0.5
) -> Tensor:
    """Paint each mask into its box, bilinearly: the mask's cells tile the box, and outside there is 0.

    Bilinear interpolation over a box is a weight per row times a weight per column, so that painting is two products
    of small matrices: the same numbers as ``grid_sample``, without its grid.

    Args:
        masks: (M, h, w) probabilities in [0, 1].
        boxes: M boxes in pixels of the image, or their (M, 4) coordinates. A degenerate box is painted as nothing.
        image_shape: ``(height, width)`` of the image.
        threshold: A pixel belongs to the mask where the probability is at least this. Negative asks for the
            probabilities themselves.

    Returns:
        (M, H, W) bool; with a negative threshold uint8, the probability times 255.

    Raises:
        ValueError: If there is not one mask (h, w) per box.
    """
    coordinates = boxes.tensor if isinstance(boxes, Boxes) else boxes
    if masks.dim() != 3 or len(masks) != len(coordinates):
        raise ValueError(f"need a mask (h, w) per box: got masks {tuple(masks.shape)} and {len(coordinates)} boxes")
    height, width = image_shape
    painted = torch.zeros(
        len(masks), height, width, dtype=torch.bool if threshold >= 0 else torch.uint8, device=masks.device
    )
    # In full precision under autocast too: a step of bfloat16 at 0.5 is 0.004, which moves outlines.
    with torch.autocast(masks.device.type, enabled=False):
        masks, coordinates = masks.float(), coordinates.float()
        if masks.device.type == "cpu":
            _paste_within_boxes(painted, masks, coordinates, threshold)
        else:
            _paste_in_chunks(painted, masks, coordinates, threshold)
    return painted


def _paste_within_boxes(painted: Tensor, masks: Tensor, boxes: Tensor, threshold: float) -> None:
    """Fill (M, H, W) mask by mask, looking only at pixels that the mask can reach: what a CPU is fastest at."""
    _, height, width = painted.shape
    # Bilinear interpolation with 0 reaches half a cell beyond the box.
    reach = (boxes[:, 2:] - boxes[:, :2]) / (2 * torch.tensor([masks.shape[2], masks.shape[1]]))
    limit = torch.tensor([width, height])
    first = (boxes[:, :2] - reach).floor().clamp(min=0).minimum(limit).long().tolist()
    last = (boxes[:, 2:] + reach).ceil().clamp(min=0).minimum(limit).long().tolist()
    rows = _interpolation(boxes[:, 1], boxes[:, 3], masks.shape[1], height)
    columns = _interpolation(boxes[:, 0], boxes[:, 2], masks.shape[2], width)
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(first, last, strict=True)):
        values = rows[i, y0:y1] @ (masks[i] @ columns[i, x0:x1].T)
        painted[i, y0:y1, x0:x1] = _thresholded(values, threshold)


def _paste_in_chunks(painted: Tensor, masks: Tensor, boxes: Tensor, threshold: float) -> None:
    """Fill (M, H, W) as many masks at a time as memory allows, over the whole image: without waiting for the device."""
    _, height, width = painted.shape
    size = max(1, _MAX_PIXELS // max(1, height * width))
    for start in range(0, len(masks), size):
        chunk = slice(start, start + size)
        rows = _interpolation(boxes[chunk, 1], boxes[chunk, 3], masks.shape[1], height)
        columns = _interpolation(boxes[chunk, 0], boxes[chunk, 2], masks.shape[2], width)
        painted[chunk] = _thresholded(rows @ (masks[chunk] @ columns.transpose(1, 2)), threshold)


def _interpolation(low: Tensor, high: Tensor, num_cells: int, num_pixels: int) -> Tensor:
    """Give (M, pixels, cells) how much each pixel along an axis takes from each cell.

    Args:
        low: (M,) where the boxes begin along the axis.
        high: (M,) where they end.
        num_cells: Cells of the mask along the axis.
        num_pixels: Pixels of the image along the axis.
    """
    pixel = torch.arange(num_pixels, device=low.device) + 0.5
    size = (high - low)[:, None]
    position = (pixel - low[:, None]) / size.clamp(min=torch.finfo(size.dtype).tiny) * num_cells - 0.5
    cell = torch.arange(num_cells, device=low.device)
    # A hat around each cell's center: neighbours share what lies between them, and beyond the outer ones it falls to 0.
    weights = (1 - (position[:, :, None] - cell).abs_()).clamp_(min=0)
    return weights * (size > 0)[:, :, None]


def _thresholded(values: Tensor, threshold: float) -> Tensor:
    if threshold < 0:
        return (values * 255).to(torch.uint8)
    # What no cell reaches never belongs to the mask, at a threshold of 0 either.
    return values >= max(threshold, torch.finfo(torch.float32).tiny)
