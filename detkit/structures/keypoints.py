"""Keypoints of objects, and the heatmaps that a keypoint head learns and predicts.

Legend: M objects in one image, R regions over the batch, K keypoints of an object, S cells of a
    heatmap along a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from detkit.structures.boxes import check_boxes_of, check_class
from detkit.utils.errors import ContractError

# Floats of enlarged heatmaps that are held at a time on a GPU: 256 MiB.
_MAX_FLOATS = 2**26


class Keypoints:
    """The keypoints of M objects: a thin wrapper around `tensor`, (M, K, 3) float32.

    A keypoint is `(x, y, visibility)`. Visibility is 0 for not labelled, 1 for hidden, 2 for
    visible. Coordinates are continuous pixels: the center of the pixel in column c is c + 0.5.
    """

    tensor: Tensor

    def __init__(self, keypoints: Tensor | Sequence[Any] | Any) -> None:
        """Hold (M, K, 3) keypoints; a float32 tensor is kept, anything else converted.

        Raises:
            ValueError: It is not (M, K, 3).
        """
        points = torch.as_tensor(keypoints).to(torch.float32)
        if points.dim() != 3 or points.shape[2] != 3:
            raise ContractError(
                "keypoints are (M, K, 3), x, y and visibility of each: got shape"
                f" {tuple(points.shape)}"
            )
        self.tensor = points

    @property
    def device(self) -> torch.device:
        """The device that holds the keypoints."""
        return self.tensor.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Keypoints:
        """Return the keypoints on another device. Not a copy when they are there already."""
        return Keypoints(self.tensor.to(device=device, non_blocking=non_blocking))

    def to_heatmap(self, boxes: Tensor, heatmap_size: int) -> tuple[Tensor, Tensor]:
        """Return the cell of each keypoint on a grid over its box: the target of a keypoint head.

        A point exactly on the right or lower side of the box belongs to the last cell.

        Source: He et al. 2017, arXiv 1703.06870, section 5: one hot cell per keypoint.

        Args:
            boxes: (M, 4) XYXY, one per object.
            heatmap_size: S

        Returns:
            (M, K) int64 `row * S + column`, and (M, K) int64 that is 1 where the keypoint is
            labelled and lies in the box; where it is 0, so is the cell.

        Raises:
            ValueError: There is not one box per object.
        """
        check_boxes_of("object", len(self), boxes)
        boxes = boxes.to(self.tensor.dtype)[:, None, :]
        points, sides = self.tensor[..., :2], boxes[..., 2:] - boxes[..., :2]
        cells = (points - boxes[..., :2]) * (heatmap_size / sides)
        cells = cells.floor().masked_fill(points == boxes[..., 2:], heatmap_size - 1)
        # Compared as floats: a point far outside, or a box with a side of 0, may give a number that
        # no integer holds.
        is_inside = ((cells >= 0) & (cells < heatmap_size)).all(dim=2)
        is_valid = is_inside & (self.tensor[..., 2] > 0)
        column, row = torch.where(is_valid[..., None], cells, 0.0).long().unbind(dim=2)
        return row * heatmap_size + column, is_valid.long()

    @classmethod
    def cat(cls, keypoints_list: Sequence[Keypoints]) -> Keypoints:
        """Join several sets with the same K into one with its own memory.

        Raises:
            ValueError: There are none, so K is unknown.
            TypeError: An item is something else.
        """
        if len(keypoints_list) == 0:
            raise ContractError("need at least one Keypoints to join")
        check_class(Keypoints, keypoints_list)
        return cls(torch.cat([keypoints.tensor for keypoints in keypoints_list]))

    def __getitem__(self, item: int | slice | Tensor | Sequence[int]) -> Keypoints:
        """Select objects by an index (one object), a slice, a bool mask, or int64 indices."""
        selected = self.tensor[item]
        return Keypoints(selected.unsqueeze(0) if isinstance(item, int) else selected)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the objects, each (K, 3)."""
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Keypoints(num_instances={len(self)})"


@torch.no_grad()
def heatmaps_to_keypoints(maps: Tensor, rois: Tensor) -> Tensor:
    """Return the best pixel of each heatmap, resized to its region, as a keypoint.

    Args:
        maps: (R, K, S, S) logits.
        rois: (R, 4) XYXY regions in pixels; sides below one pixel count as one.

    Returns:
        (R, K, 4) float32 as `(x, y, logit, score)`. The score is the softmax of the resized map at
        its best pixel, with the sum taken over the original map, so that scores of large and small
        regions can be compared.
    """
    maps, rois = maps.float(), rois.float()
    sizes = (rois[:, 2:] - rois[:, :2]).clamp(min=1)
    # Resized to whole pixels (bicubically, as OpenCV does); positions are scaled back below.
    whole_sizes = sizes.ceil()
    if torch.compiler.is_exporting():
        # All regions at once, padded to the largest; with one more, as there may be none.
        sides = torch.cat([whole_sizes, whole_sizes.new_ones(1, 2)]).amax(dim=0).long()
        width: Any = sides[0].item()
        height: Any = sides[1].item()
        xy, logit = _best_pixels(maps, whole_sizes, width, height)
        return _as_keypoints(maps, rois, sizes / whole_sizes, xy, logit)
    if len(maps) == 0:
        return maps.new_zeros(0, maps.shape[1], 4)
    best = []
    # Not under autocast: in half precision many pixels around a maximum are equal.
    with torch.autocast(maps.device.type, enabled=False):
        # One wait for the device: the sizes are shapes of what follows. One region at a time fills
        # a CPU with work.
        max_pixels = 0 if maps.device.type == "cpu" else _MAX_FLOATS // maps.shape[1]
        for start, end, width, height in _groups(whole_sizes.long().tolist(), max_pixels):
            best.append(_best_pixels(maps[start:end], whole_sizes[start:end], width, height))
    xy, logit = (torch.cat(values) for values in zip(*best, strict=True))
    return _as_keypoints(maps, rois, sizes / whole_sizes, xy, logit)


def _as_keypoints(maps: Tensor, rois: Tensor, scale: Tensor, xy: Tensor, logit: Tensor) -> Tensor:
    xy = (xy + 0.5) * scale[:, None, :] + rois[:, None, :2]
    score = 1 / (maps - logit[..., None, None]).exp_().sum(dim=(2, 3))
    return torch.cat([xy, logit[..., None], score[..., None]], dim=2)


def _groups(sizes: Sequence[Sequence[int]], max_pixels: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield groups of regions to resize together, as `(start, end, width, height)`.

    Args:
        sizes: `(width, height)` of each of R > 0 regions.
        max_pixels: Pixels of a group, if each region is resized to the group's largest width and
            height. A single region may have more.
    """
    start, width, height = 0, 0, 0
    for i, (width_i, height_i) in enumerate(sizes):
        wider, higher = max(width, width_i), max(height, height_i)
        if i > start and (i + 1 - start) * wider * higher > max_pixels:
            yield start, i, width, height
            start, wider, higher = i, width_i, height_i
        width, height = wider, higher
    yield start, len(sizes), width, height


def _best_pixels(maps: Tensor, sizes: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Return column and row (R, K, 2) float32, and logit (R, K), of the best pixel of resized maps.

    Args:
        maps: (R, K, S, S)
        sizes: (R, 2) whole `(width, height)` of each resized map.
        width: The largest of them.
        height: The largest of them.
    """
    # Resizing is separable: two matrix products, in 0.6 of the time of `F.interpolate` on a CPU.
    columns = _bicubic_weights(sizes[:, 0], width, maps.shape[3]).transpose(1, 2)
    rows = _bicubic_weights(sizes[:, 1], height, maps.shape[2])
    if torch.compiler.is_exporting():
        # One keypoint at a time: all of them, enlarged in all regions, would fill the memory.
        best = [_best_position(rows @ (maps_k @ columns)) for maps_k in maps.unbind(dim=1)]
        xy, logit = (torch.stack(values, dim=1) for values in zip(*best, strict=True))
    else:
        xy, logit = _best_position(rows[:, None] @ (maps @ columns[:, None]))
    # Pixels beyond a region are as its last one.
    return xy.minimum(sizes[:, None] - 1), logit


def _best_position(maps: Tensor) -> tuple[Tensor, Tensor]:
    # Row by row: an index in all pixels would be divided by the width, which ONNX takes for fixed.
    # Values by index: a runtime that took both from the maps might hold them until it wants each.
    column = maps.argmax(dim=-1, keepdim=True)
    best_of_row = maps.gather(-1, column)[..., 0]
    row = best_of_row.argmax(dim=-1, keepdim=True)
    xy = torch.cat([column[..., 0].gather(-1, row), row], dim=-1)
    return xy.float(), best_of_row.gather(-1, row)[..., 0]


def _bicubic_weights(sizes: Tensor, num_pixels: int, num_cells: int) -> Tensor:
    """Return the (R, `num_pixels`, S) weights of cells in resized pixels along an axis.

    Source: Keys 1981, with a = -0.75 as in OpenCV and torch.

    Args:
        sizes: (R,) pixels of each region along the axis; further pixels are as the last one.
        num_pixels: The largest of them.
        num_cells: S
    """
    pixel = torch.arange(num_pixels, device=sizes.device).minimum(sizes[:, None] - 1) + 0.5
    position = pixel * (num_cells / sizes)[:, None] - 0.5
    cell = torch.arange(-2, num_cells + 2, device=sizes.device)
    distance = (position[:, :, None] - cell).abs_()
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
    weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    # Two more cells at either end stand for what is beyond the border: the value at the border.
    weights[:, :, 2] += weights[:, :, :2].sum(dim=2)
    weights[:, :, -3] += weights[:, :, -2:].sum(dim=2)
    return weights[:, :, 2:-2]
