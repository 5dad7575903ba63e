"""Keypoints of objects, and the heatmaps that a keypoint head learns and predicts.

Legend: M objects in one image, R regions over the batch, K keypoints of an object, S cells of a heatmap along a side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Keypoints:
    """The keypoints of M objects: a thin hull around ``tensor``, (M, K, 3) float32 as ``(x, y, visibility)``.

    Visibility is 0 for a point that is not labelled, 1 for one that is hidden, 2 for one that is visible. Coordinates
    are continuous pixels: the center of the pixel in column c is c + 0.5.
    """

    tensor: Tensor

    def __init__(self, keypoints: Tensor | Sequence[Any] | Any) -> None:
        """Hold (M, K, 3) keypoints. A float32 tensor is kept, not copied; anything else is converted.

        Raises:
            ValueError: If it is not (M, K, 3).
        """
        points = torch.as_tensor(keypoints).to(torch.float32)
        if points.dim() != 3 or points.shape[2] != 3:
            raise ValueError(f"keypoints are (M, K, 3), x, y and visibility of each: got shape {tuple(points.shape)}")
        self.tensor = points

    @property
    def device(self) -> torch.device:
        """The device that holds the keypoints."""
        return self.tensor.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Keypoints:
        """Give the keypoints on another device. Not a copy when they are there already."""
        return Keypoints(self.tensor.to(device=device, non_blocking=non_blocking))

    def to_heatmap(self, boxes: Tensor, heatmap_size: int) -> tuple[Tensor, Tensor]:
        """Give the cell that each keypoint lies in, on a grid over its box: the target of a keypoint head.

        Source: He et al. 2017, arXiv 1703.06870, section 5: one hot cell per keypoint. A point exactly on the right or
        lower side of the box belongs to the last cell.

        Args:
            boxes: (M, 4) XYXY, one per object.
            heatmap_size: S

        Returns:
            (M, K) int64 ``row * S + column``, and (M, K) int64 that is 1 where the keypoint is labelled and lies in the
            box. Where it is not, the cell is 0 and means nothing.

        Raises:
            ValueError: If there is not one box per object.
        """
        if boxes.dim() != 2 or boxes.shape != (len(self), 4):
            raise ValueError(
                f"need a box (x1, y1, x2, y2) per object: got {tuple(boxes.shape)} for {len(self)} objects"
            )
        boxes = boxes.to(self.tensor.dtype)[:, None, :]
        points, sides = self.tensor[..., :2], boxes[..., 2:] - boxes[..., :2]
        cells = (points - boxes[..., :2]) * (heatmap_size / sides)
        cells = cells.floor().masked_fill(points == boxes[..., 2:], heatmap_size - 1)
        # Compared before they become integers, which what is far outside, or divided by a side of 0, may not fit in.
        is_inside = ((cells >= 0) & (cells < heatmap_size)).all(dim=2)
        is_valid = is_inside & (self.tensor[..., 2] > 0)
        column, row = torch.where(is_valid[..., None], cells, 0.0).long().unbind(dim=2)
        return row * heatmap_size + column, is_valid.long()

    @classmethod
    def cat(cls, keypoints_list: Sequence[Keypoints]) -> Keypoints:
        """Join several sets with the same K into one with its own memory.

        Raises:
            ValueError: If there are none, since K is not known then.
        """
        if len(keypoints_list) == 0:
            raise ValueError("need at least one Keypoints to join")
        for index, keypoints in enumerate(keypoints_list):
            if not isinstance(keypoints, Keypoints):
                raise TypeError(f"Keypoints.cat takes Keypoints: item {index} is {type(keypoints).__name__}")
        return cls(torch.cat([keypoints.tensor for keypoints in keypoints_list]))

    def __getitem__(self, item: int | slice | Tensor | Sequence[int]) -> Keypoints:
        """Select objects by an index (giving one object), a slice, a bool mask, or int64 indices."""
        return Keypoints(self.tensor[item].unsqueeze(0) if isinstance(item, int) else self.tensor[item])

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Go through the objects, each (K, 3)."""
        yield from self.tensor

    def __repr__(self) -> str:
        return f"Keypoints(num_instances={len(self)})"


@torch.no_grad()
def heatmaps_to_keypoints(maps: Tensor, rois: Tensor) -> Tensor:
    """Read keypoints from heatmaps: the best pixel of each, once the map is enlarged to the size of its region.

    Args:
        maps: (R, K, S, S) logits.
        rois: (R, 4) XYXY regions in pixels. One below a pixel in width or height counts as a pixel wide or high.

    Returns:
        (R, K, 4) float32 as ``(x, y, logit, score)``. The score is the softmax of the enlarged map at its best pixel,
        with the sum taken over the map as it came, so that scores of large and small regions can be compared.
    """
    maps, rois = maps.float(), rois.float()
    sizes = (rois[:, 2:] - rois[:, :2]).clamp(min=1)
    whole_sizes = sizes.ceil()
    # One wait for the device: the sizes are shapes of what follows. A region is enlarged to whole pixels (bicubically,
    # as OpenCV does), and positions are brought back to its true size.
    best = [_best_pixel(maps[i : i + 1], int(h), int(w)) for i, (w, h) in enumerate(whole_sizes.tolist())]
    if not best:
        return maps.new_zeros(0, maps.shape[1], 4)
    xy, logit = (torch.stack(values) for values in zip(*best, strict=True))
    xy = (xy + 0.5) * (sizes / whole_sizes)[:, None, :] + rois[:, None, :2]
    score = 1 / (maps - logit[..., None, None]).exp_().sum(dim=(2, 3))
    return torch.cat([xy, logit[..., None], score[..., None]], dim=2)


def _best_pixel(maps: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Give column and row, (K, 2) float32, and logit, (K,), of the best pixel of enlarged (1, K, S, S) maps."""
    enlarged = F.interpolate(maps, size=(height, width), mode="bicubic", align_corners=False)[0].flatten(1)
    logit, position = enlarged.max(dim=1)
    return torch.stack([position % width, position // width], dim=1).float(), logit
